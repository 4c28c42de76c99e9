"""The algebra of sweeps: plain generators of `{'dotted.key': value}`, to be combined in experiment files.

    def sweep():
      yield from product(({'optim.learning_rate': lr} for lr in (1e-3, 3e-3)), seeds(3))

One sweep after the other is `yield from` twice; side by side is a loop over `zip`.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from slm_jax.config import ConfigError

Changes = Mapping[str, Any]

SEEDS = ('seed', 'data.seed')  # the keys in which repetitions of one arm differ


def seeds(n: int, first: int = 0) -> Iterator[Changes]:
  """n repetitions: other initial parameters and another order of the data in each; equal seeds make arms paired."""
  for seed in range(first, first + n):
    yield dict.fromkeys(SEEDS, seed)


def product(*sweeps: Iterable[Changes]) -> Iterator[Changes]:
  """Every combination of one element of each sweep, the last one varying fastest. ConfigError if two set one key."""
  for parts in itertools.product(*sweeps):
    merged: dict[str, Any] = {}
    for part in parts:
      both = sorted(merged.keys() & part.keys())
      if both:
        raise ConfigError(f'product of sweeps: {both[0]} is set by two of them')
      merged.update(part)
    yield merged
