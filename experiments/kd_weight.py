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

from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import launch
from slm_jax.ablate import stats
from slm_jax.ablate.results import Row
from slm_jax.ablate.sweep import product, seeds
from slm_jax.data.config import DataConfig
from slm_jax.distill.logits import Distill
from slm_jax.experiment import Config, EvalConfig, RunConfig, TrainConfig
from slm_jax.model.config import ModelConfig
from slm_jax.optim import OptimConfig

WEIGHTS = (0.25, 0.5, 0.75, 1.0)
TEMPERATURES = (1.0, 2.0, 4.0)
SEEDS = 3
BASELINE = 'no teacher'

Setting = tuple[float, float]  # weight, temperature


def config() -> Config:
  """A student; the teacher has the same depth and twice the width."""
  return Config(
    model=ModelConfig(
      vocab_size=512,
      d_model=64,
      n_layers=2,
      n_heads=4,
      n_kv_heads=4,
      head_dim=16,
      d_ff=128,
      max_len=64,
      qk_norm=True,
      init_std=0.05,
    ),
    data=DataConfig(tokenizer='sentencepiece', vocab_size=512, seq_len=64, batch_size=16),
    optim=OptimConfig(learning_rate=1e-2, warmup=30),
    train=TrainConfig(steps=250),
    eval=EvalConfig(every=125, sequences=256, samples=0),
    transforms=(Distill('teacher', weight=1.0, temperature=1.0),),
    run=RunConfig(keep=1),
  )


def sweep(base: Config) -> Iterator[dict[str, Any]]:
  wide = {f'model.{name}': 2 * getattr(base.model, name) for name in ('d_model', 'n_heads', 'n_kv_heads', 'd_ff')}
  yield {'name': 'teacher', 'transforms': (), 'train.steps': 5 * base.train.steps, **wide}
  settings = [(0.0, 1.0), *((w, t) for w in WEIGHTS for t in TEMPERATURES)]
  students = [
    {'name': name_of(w, t), 'transforms.distill.weight': w, 'transforms.distill.temperature': t} for w, t in settings
  ]
  yield from product(students, seeds(SEEDS))


def name_of(weight: float, temperature: float) -> str:
  return f'w={weight:g} T={temperature:g}' if weight else BASELINE


def report(rows: Sequence[Row]) -> str:
  """Means over the seeds, and what became of the expectation, one paired comparison a line."""
  losses: dict[Setting, dict[Hashable, float]] = {}
  for row in rows:
    if row.name != 'teacher':
      setting = row.config['transforms.distill.weight'], row.config['transforms.distill.temperature']
      losses.setdefault(setting, {})[row.seeds] = row.summary['loss']
  lines = ['    weight   ' + ''.join(f'T = {t:<18g}' for t in TEMPERATURES)]
  for weight in sorted({w for w, _ in losses}):
    cells = [stats.interval(losses[weight, t].values()) for t in TEMPERATURES if (weight, t) in losses]
    lines.append(f'    {weight:<9g}' + ''.join(f'{stats.digits(cell.mean, cell.half):22}' for cell in cells))
  for other in ((0.0, 1.0), (0.5, 1.0), (1.0, 2.0), (1.0, 4.0)):
    difference = stats.paired(losses[1.0, 1.0], losses[other])
    shown = stats.digits(difference.mean, difference.half, '+')
    verdict = f'{shown} nats, n={difference.n}: {stats.expectation(difference)}'
    lines.append(f'- {name_of(1, 1)} < {name_of(*other)}: {verdict}')
  return '\n'.join(lines)


if __name__ == '__main__':
  launch.main()
