"""Does a small model lose anything when it computes in bfloat16, or when its parameters are kept in it as well?

Three arms that differ in nothing but dtypes: all in float32; activations and products in bfloat16, parameters and
optimiser in float32; and all parameters in bfloat16 too, which halves the memory of the model and of AdamW's moments.

Expected, written before the run: the second ends within 0.02 nats of the first (mixed precision, arXiv 1710.03740;
losses, statistics and reductions are float32 in all three). The third is behind the first by 0.02 or more: an update
that is less than 1/256 of its parameter is rounded away, and most are towards the end of a run.

Found (2 CPU cores, 5 seeds, 95 % intervals): 0.6384 +- 0.0031, 0.6387 +- 0.0039 and 0.6356 +- 0.0028. Arithmetic costs
nothing: +0.0003 +- 0.0016, REPRODUCED. Nor do parameters in bfloat16, whose loss is lower by 0.0028 +- 0.0048: NOT
REPRODUCED. 1,200 steps at a high learning rate are few; that longer runs with smaller steps lose nothing is not said.

    python -m experiments.low_precision
"""

from collections.abc import Iterator, Sequence
from typing import Any

import launch
from experiments.common import student, table
from slm_jax.ablate.claims import Claim, equal, less, values
from slm_jax.ablate.results import Row
from slm_jax.ablate.sweep import product, seeds
from slm_jax.experiment import Config

SEEDS = 5
BASELINE = 'float32'
MARGIN = 0.02  # nats


def config() -> Config:
  return student(1200)


def sweep() -> Iterator[dict[str, Any]]:
  low = {'model.dtype': 'bfloat16'}
  arms = [
    {'name': BASELINE},
    {'name': 'bfloat16', **low},
    {'name': 'parameters too', **low, 'model.param_dtype': 'bfloat16'},
  ]
  yield from product(arms, seeds(SEEDS))


def report(rows: Sequence[Row]) -> list[str | Claim]:
  losses = values(rows)
  full, low, all_low = (losses.get(name, {}) for name in (BASELINE, 'bfloat16', 'parameters too'))
  return [
    *table(rows, {'loss': 'loss (nats)', 'ece': 'calibration error'}),
    equal(f'bfloat16 = float32 within {MARGIN}', low, full, MARGIN, primary=True),
    less(f'float32 < parameters too by {MARGIN}', full, all_low, MARGIN, primary=True),
  ]


if __name__ == '__main__':
  launch.main()
