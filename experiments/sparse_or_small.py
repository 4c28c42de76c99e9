"""A large model with three quarters of its weights at zero, or a small dense one with as many that are not?

394K parameters of which, while it trains, 75 % of the layers' matrices become zero (magnitude, cubic schedule over
the middle half of the run; Zhu & Gupta, arXiv 1710.01878), against 147K that are all there; as many are not zero in
both, embeddings included. Equal tokens. Masks save no time: XLA multiplies the zeros too. So "small, equal FLOPs" is
the small model trained until it has used what the large one did. Controls: the large one dense, and with masks at
random.

Expected, written before the run: large sparse < small by 0.10 nats at equal tokens (arXiv 1710.01878; 2309.08520 has
0.18 to 0.37 at 1M to 20M parameters); large sparse < random mask; at equal FLOPs nothing is left: small is not worse.

Found (2 CPU cores, 3 seeds, 611K tokens, 95 % intervals): small 0.704 +- 0.009, large sparse 0.671 +- 0.011, random
mask 0.782 +- 0.009, large dense 0.635 +- 0.005; small with the large one's FLOPs 0.607 +- 0.008. Large sparse is
ahead of small by 0.032 +- 0.017, and not by 0.10: NOT REPRODUCED. Ahead of a random mask by 0.111 +- 0.004,
REPRODUCED. At equal FLOPs small is ahead of it by 0.065 +- 0.018, REPRODUCED: masks are no bargain where zeros are
multiplied too.

    python -m experiments.sparse_or_small
"""

from collections.abc import Iterator, Sequence
from typing import Any

import launch
from experiments.common import student, table, wider
from slm_jax.ablate.claims import Claim, less, values
from slm_jax.ablate.results import Row
from slm_jax.ablate.sweep import product, seeds
from slm_jax.config import override
from slm_jax.experiment import Config
from slm_jax.model.flops import flops_per_token
from slm_jax.prune.transform import Prune

SEEDS = 3
SPARSITY = 0.75
MARGIN = 0.10  # nats
BASELINE = 'small'


def config() -> Config:
  """d_ff so that parameters are those of the large one that are not zero: 147K."""
  return override(student(600), {'model.d_ff': 213, 'optim.learning_rate': 5e-3})


def sweep(base: Config) -> Iterator[dict[str, Any]]:
  large = {**wider(override(base, {'model.d_ff': 128}), 1), 'name': 'large dense'}
  its = flops_per_token(override(base, large).model, base.data.seq_len)
  longer = round(base.train.steps * its / flops_per_token(base.model, base.data.seq_len))
  arms = [
    {'name': 'small'},
    {'name': 'small, equal FLOPs', 'train.steps': longer, 'eval.every': max(longer // 4, 1)},
    large,
    {**large, 'name': 'large sparse', 'transforms': (Prune(SPARSITY),)},
    {**large, 'name': 'large, random mask', 'transforms': (Prune(SPARSITY, criterion='random'),)},
  ]
  yield from product(arms, seeds(SEEDS))


def report(rows: Sequence[Row]) -> list[str | Claim]:
  losses = values(rows)
  sparse = losses['large sparse']
  return [
    *table(rows, {'loss': 'loss (nats)', 'ece': 'calibration error'}),
    less(f'large sparse < small by {MARGIN}', sparse, losses['small'], MARGIN, primary=True),
    less('large sparse < random mask', sparse, losses['large, random mask'], primary=True),
    less('small, equal FLOPs < large sparse', losses['small, equal FLOPs'], sparse, primary=True),
    less('large dense < large sparse', losses['large dense'], sparse),
  ]


if __name__ == '__main__':
  launch.main()
