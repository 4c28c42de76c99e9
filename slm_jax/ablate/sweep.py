"""The algebra of sweeps: plain generators of `{'dotted.key': value}`, to be combined in experiment files.

    def sweep():
      yield from product(({'optim.learning_rate': lr} for lr in (1e-3, 3e-3)), seeds(3))

product     every combination                  zipped      side by side, element by element
chain       one after the other                seeds       repetitions
sample      a few elements of a sweep, or a few points of a space:

    sample({'optim.learning_rate': loguniform(1e-4, 1e-2), 'optim.clip': choice(0.5, 1.0)}, k=20, seed=0)
"""

import itertools
import math
import numbers
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from slm_jax.config import ConfigError, require

Changes = Mapping[str, Any]
Quantile = Callable[[float], Any]  # a distribution, as the function from [0, 1) to its values

SEEDS = ('seed', 'data.seed')  # the keys in which repetitions of one arm differ
LARGEST = 1_000_000  # elements of a sweep that are in memory at once: an arm takes some kilobytes


def seeds(n: int, first: int = 0) -> Iterator[Changes]:
  """n repetitions: other initial parameters and another order of the data in each; equal seeds make arms paired."""
  require(isinstance(n, numbers.Integral), f'seeds: n={n!r}: expected int')
  require(first >= 0, f'seeds: first={first}: must not be negative')
  require(first + n <= 2**32, f'seeds: n={n}, first={first}: seeds must lie in [0, 2^32)')
  for seed in range(first, first + n):
    yield dict.fromkeys(SEEDS, seed)


def product(*sweeps: Iterable[Changes]) -> Iterator[Changes]:
  """Every combination of one element of each sweep, the last one varying fastest. ConfigError if two set one key."""
  for parts in itertools.product(*(listed(sweep, 'product of sweeps') for sweep in sweeps)):
    yield _merged(parts, 'product of sweeps')


def zipped(*sweeps: Iterable[Changes]) -> Iterator[Changes]:
  """The first elements together, the second ones together, ... ConfigError if the lengths differ or two set one key."""
  lists = [listed(sweep, 'zipped sweeps') for sweep in sweeps]
  lengths = [len(sweep) for sweep in lists]
  require(len(set(lengths)) < 2, f'zipped sweeps: of {", ".join(map(str, lengths))} elements; they must be as many')
  for parts in zip(*lists, strict=True):
    yield _merged(parts, 'zipped sweeps')


def chain(*sweeps: Iterable[Changes]) -> Iterator[Changes]:
  """The elements of the first sweep, then those of the second, ..."""
  return itertools.chain(*sweeps)


def listed(sweep: Iterable[Changes], what: str) -> list[Changes]:
  """The elements of a sweep. ConfigError if they are more than `LARGEST`, before memory ends."""
  found = list(itertools.islice(sweep, LARGEST + 1))
  require(len(found) <= LARGEST, f'{what}: more than {LARGEST:,} elements')
  return found


def _merged(parts: Sequence[Changes], what: str) -> Changes:
  merged: dict[str, Any] = {}
  for part in parts:
    both = sorted(merged.keys() & part.keys())
    if both:
      raise ConfigError(f'{what}: {both[0]} is set by two of them')
    merged.update(part)
  return merged


# ------------------------------------------------------------------------------------------------------- sampling


def sample(source: Iterable[Changes] | Mapping[str, Quantile], k: int, seed: int = 0) -> Iterator[Changes]:
  """k elements of a finite sweep, none twice and in its order; or k random points of a space `{key: distribution}`.

  The same for the same seed, on any machine. A larger k adds to what a smaller one gives; in a space, so does another
  key, and the order of the keys is of no matter: arms that have been run stay arms of the sweep.
  ConfigError if a sweep has fewer than k elements.
  """
  require(isinstance(k, numbers.Integral), f'sample: k={k!r}: expected int')
  require(k > 0, f'sample: k={k}: must be positive')
  if isinstance(source, Mapping):
    for key, value in source.items():
      require(callable(value), f'sample: {key}={value!r}: expected a distribution; a constant is choice({value!r})')
    for i in range(k):
      yield {key: quantile(random.Random(f'{seed}/{i}/{key}').random()) for key, quantile in source.items()}
    return
  elements = listed(source, 'sample')
  require(k <= len(elements), f'sample: k={k}: the sweep has only {len(elements)} elements')
  order = sorted(range(len(elements)), key=lambda i: random.Random(f'{seed}/{i}').random())
  for i in sorted(order[:k]):
    yield elements[i]


def uniform(low: float, high: float) -> Quantile:
  """Every value between is equally likely. Values have four digits: names and tables show them as they are."""
  require(
    math.isfinite(low) and math.isfinite(high) and low < high, f'uniform({low!r}, {high!r}): low < high is needed'
  )
  return lambda u: _rounded(low + u * (high - low), low, high)


def loguniform(low: float, high: float) -> Quantile:
  """Every ratio is equally likely: as many values between 1e-4 and 1e-3 as between 1e-3 and 1e-2. Four digits."""
  require(0 < low < high < math.inf, f'loguniform({low!r}, {high!r}): 0 < low < high is needed')
  return lambda u: _rounded(low * (high / low) ** u, low, high)


def choice(*values: Any) -> Quantile:
  """One of the values, all equally likely."""
  require(len(values) > 0, 'choice(): needs at least one value')
  return lambda u: values[int(u * len(values))]


def _rounded(value: float, low: float, high: float) -> float:
  return min(max(float(f'{value:.4g}'), low), high)
