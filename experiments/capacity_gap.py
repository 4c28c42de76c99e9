"""Is the better teacher the better teacher? One student, and teachers that are checkpoints of one long run.

The teacher trains at a constant rate, so a shorter run is a checkpoint of the longest; its width is twice the
student's. Each student sees the same tokens and learns from one of them, weight 1, temperature 1.

Expected, written before the run: a teacher that is worse than what the student reaches alone holds it back (that
student is worse than without a teacher), and the best teacher's student is better than without. In between, Busbridge
et al. (arXiv 2502.08606) find that the student's loss falls with the teacher's down to a point and rises beyond it, for
teachers that leave the student far behind; with a teacher of four times the parameters we expect no rise: the longest
run's student is not worse than the run's of half the length, within 0.02 nats.

Found (2 CPU cores, 3 seeds, 407K tokens, 95 % intervals): alone 0.797 +- 0.018; by teachers at 1.711, 1.080, 0.818,
0.730 and 0.662: 1.779 +- 0.011, 1.144 +- 0.006, 0.906 +- 0.007, 0.847 +- 0.013, 0.809 +- 0.007. Alone < taught by the
shortest run: -0.982 +- 0.028, REPRODUCED. Taught by the longest run < alone: +0.012 +- 0.013, CANNOT TELL (and not to
be expected any more). Longest = half of it within 0.02: -0.038 +- 0.010, NOT REPRODUCED: the better teacher is the
better one, up to the end. No gap in sight; at weight 1 a student follows its teacher down, 0.07 to 0.15 nats behind,
and a teacher must be ahead of what the student reaches alone by more than that before it is of any use.

    python -m experiments.capacity_gap
"""

from collections.abc import Iterator, Sequence
from typing import Any

import launch
from experiments.common import TEACHER, student, table, wider
from slm_jax.ablate.claims import Claim, equal, less, values
from slm_jax.ablate.results import Row
from slm_jax.ablate.sweep import product, seeds
from slm_jax.distill.logits import Distill
from slm_jax.experiment import Config

SEEDS = 3
LENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the teacher's run, as multiples of the student's
BASELINE = 'alone'


def config() -> Config:
  return student(400)


def sweep(base: Config) -> Iterator[dict[str, Any]]:
  for length in LENGTHS:
    constant = {'optim.schedule': 'constant', 'optim.learning_rate': 3e-3}
    yield {**wider(base, length), **constant, 'name': f'{TEACHER} {length:g}x'}
  arms: list[dict[str, Any]] = [{'name': 'alone'}]
  arms += [
    {'name': f'taught by {length:g}x', 'transforms': (Distill(f'{TEACHER} {length:g}x', weight=1.0),)}
    for length in LENGTHS
  ]
  yield from product(arms, seeds(SEEDS))


def report(rows: Sequence[Row]) -> list[str | Claim]:
  losses = values(rows)
  first, half, last = (losses[f'taught by {length:g}x'] for length in (LENGTHS[0], LENGTHS[-2], LENGTHS[-1]))
  return [
    *table(rows, {'loss': 'loss (nats)', 'ece': 'calibration error'}),
    less('alone < taught by the shortest run', losses['alone'], first, primary=True),
    less('taught by the longest run < alone', last, losses['alone'], primary=True),
    equal('taught by the longest run = by half of it, within 0.02', last, half, 0.02, primary=True),
  ]


if __name__ == '__main__':
  launch.main()
