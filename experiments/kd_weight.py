"""How much should a student listen to its teacher, and at which temperature?

One teacher, and one population of students that differ in the weight of its term (the data's has the rest) and in the
temperature at which both distributions are compared: (1 - w) CE + w T^2 KL(p_T || q_T). Weight 0 is training without a
teacher. All see the same tokens; what is measured is the plain loss on held-out text, at temperature 1.

Expected, written before the run: the teacher alone (weight 1) at temperature 1 is best: better than no teacher, better
than half and half, and better than at temperatures 2 and 4. Busbridge et al. (arXiv 2502.08606) distil language models
in this way after looking at both settings: what a student is judged by is the distribution at temperature 1, and data
that are samples of it add noise to a teacher that knows it. Hinton et al. (arXiv 1503.02531) found temperatures above 1
and a small weight of the data best for classifiers. A teacher that is not much better than its students should be
listened to less (WORKSPACE.md has a case); this one has seen five times their tokens and is twice as wide.

    python -m experiments.kd_weight
"""

from collections.abc import Iterator, Sequence
from typing import Any

import launch
from experiments.common import TEACHER, student, wider
from slm_jax.ablate import stats
from slm_jax.ablate.claims import Claim, all_of, less, values
from slm_jax.ablate.results import Row
from slm_jax.ablate.sweep import product, seeds
from slm_jax.config import override
from slm_jax.distill.logits import Distill
from slm_jax.experiment import Config

WEIGHTS = (0.25, 0.5, 0.75, 1.0)
TEMPERATURES = (1.0, 2.0, 4.0)
SEEDS = 3
BASELINE = 'no teacher'

Setting = tuple[float, float]  # weight, temperature


def config() -> Config:
  """A student; the teacher has the same depth and twice the width."""
  one = Distill(TEACHER, weight=1.0, temperature=1.0)
  return override(student(250), {'eval.every': 125, 'transforms': (one,)})


def sweep(base: Config) -> Iterator[dict[str, Any]]:
  yield wider(base, 5)
  settings = [(0.0, 1.0), *((w, t) for w in WEIGHTS for t in TEMPERATURES)]
  students = [
    {'name': name_of(w, t), 'transforms.distill.weight': w, 'transforms.distill.temperature': t} for w, t in settings
  ]
  yield from product(students, seeds(SEEDS))


def name_of(weight: float, temperature: float) -> str:
  return f'w={weight:g} T={temperature:g}' if weight else BASELINE


def report(rows: Sequence[Row]) -> list[str | Claim]:
  """Means over the seeds, and what became of the expectation."""
  settings = {
    row.name: (row.config['transforms.distill.weight'], row.config['transforms.distill.temperature'])
    for row in rows
    if row.name != TEACHER
  }
  losses = {settings[name]: loss for name, loss in values(rows).items() if name in settings}
  lines = ['    weight   ' + ''.join(f'T = {t:<18g}' for t in TEMPERATURES)]
  for weight in sorted({w for w, _ in losses}):
    cells = [stats.interval(losses[weight, t].values()) for t in TEMPERATURES if (weight, t) in losses]
    lines.append(f'    {weight:<9g}' + ''.join(f'{stats.digits(cell.mean, cell.half):22}' for cell in cells))
  others = ((0.0, 1.0), (0.5, 1.0), (1.0, 2.0), (1.0, 4.0))
  ahead = [less(f'{name_of(1, 1)} < {name_of(*other)}', losses[1.0, 1.0], losses[other]) for other in others]
  return [*lines, all_of(f'{name_of(1, 1)} is the best of five', ahead, primary=True), *ahead]


if __name__ == '__main__':
  launch.main()
