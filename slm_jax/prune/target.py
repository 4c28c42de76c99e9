"""A smaller shape for a budget: "give me 60 % of the latency".

    found = search(config, share=0.6, cost=COSTS['latency'](config, batch=8, seq_len=128))

Depth, key/value groups and width are tried at a few levels each; of each combination, the feed-forward width is the
largest that still fits. What is best among those is for a score to say: the command (command.py) takes the loss after
each cut.

    python -m slm_jax.prune.target --model=WORKDIR/arms/ID --share=0.6 --cost=latency
"""

import dataclasses
import functools
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from slm_jax.config import require
from slm_jax.model import decoder
from slm_jax.model.config import ModelConfig
from slm_jax.model.flops import flops_per_token, parameter_count

Cost = Callable[[ModelConfig], float]
LEVELS = (1.0, 0.75, 0.5)  # of layers, groups and width
TURNS = 5  # of a measurement


class Candidate(NamedTuple):
  config: ModelConfig
  share: float  # of the whole model's cost


def kv_bytes(config: ModelConfig) -> int:
  """Of the cache of keys and values, a token: 2 L G K times the bytes of a number."""
  return 2 * config.n_layers * config.n_kv_heads * config.head_dim * jnp.dtype(config.dtype).itemsize


def latency(config: ModelConfig, batch: int, seq_len: int) -> Cost:
  """Seconds of a forward pass with logits, measured here as a multiple of the whole model's, taken in turns with it."""
  whole = _forward(config, batch, seq_len)

  def of(small: ModelConfig) -> float:
    if small == config:
      return 1.0
    pass_of = _forward(small, batch, seq_len)
    pairs = [(pass_of(), whole()) for _ in range(TURNS)]
    return min(a for a, _ in pairs) / min(b for _, b in pairs)

  return of


def _forward(config: ModelConfig, batch: int, seq_len: int) -> Callable[[], float]:
  """A function that takes one pass and says its seconds."""
  model = decoder.build(config)
  params = jax.jit(model.init)(jax.random.PRNGKey(0))
  tokens = jnp.zeros((batch, seq_len), jnp.int32)
  run = jax.jit(lambda params, tokens: model.head(params, model.hidden(params, {'inputs': tokens})))
  jax.block_until_ready(run(params, tokens))

  def once() -> float:
    start = time.perf_counter()
    jax.block_until_ready(run(params, tokens))
    return time.perf_counter() - start

  return once


COSTS: dict[str, Callable[[ModelConfig, int, int], Cost]] = {
  'parameters': lambda config, batch, seq_len: parameter_count,
  'flops': lambda config, batch, seq_len: lambda c: flops_per_token(c, seq_len, backward=False),
  'kv_bytes': lambda config, batch, seq_len: kv_bytes,
  'latency': latency,
}


def search(config: ModelConfig, share: float, cost: Cost, multiple: int = 8) -> list[Candidate]:
  """Shapes that cost at most `share` of what `config` does, none of which is smaller than another in all sizes.

  multiple: what d_ff and d_model are rounded to, down: 128 on TPU, 8 or 64 elsewhere. A cost must not fall as a size
  grows. ConfigError if nothing fits.
  """
  require(0 < share <= 1, f'share={share}: must lie in (0, 1]')
  require(multiple > 0, f'multiple={multiple}: must be positive')
  cost = functools.cache(cost)  # it may be a measurement
  whole, found = cost(config), []
  for family in _families(config, multiple):
    widths = range(multiple, config.d_ff + 1, multiple) or (config.d_ff,)
    sizes = [dataclasses.replace(family, d_ff=d_ff) for d_ff in widths]
    if (largest := _largest(sizes, lambda one: cost(one) <= share * whole)) is not None:
      found.append(largest)
  best = [one for one in found if not any(_within(one, other) for other in found)]
  require(
    bool(best),
    f'share={share}: nothing fits; the least that is tried costs {cost(_least(config, multiple)) / whole:.2f}',
  )
  return [Candidate(one, cost(one) / whole) for one in best]


def _families(config: ModelConfig, multiple: int) -> Iterator[ModelConfig]:
  """Depths, groups and widths; with muP the width stays, with local layers the depth does, as neither can be cut."""
  per_group = config.n_heads // config.n_kv_heads
  layers = _levels(config.n_layers, 1) if not config.window else [config.n_layers]
  widths = _levels(config.d_model, multiple) if not config.mup_base_width else [config.d_model]
  for n_layers, groups, width in itertools.product(layers, _levels(config.n_kv_heads, 1), widths):
    yield dataclasses.replace(
      config,
      n_layers=n_layers,
      n_kv_heads=groups,
      n_heads=groups * per_group,
      d_model=width,
      unroll=min(config.unroll, n_layers),
    )


def _least(config: ModelConfig, multiple: int) -> ModelConfig:
  return dataclasses.replace(list(_families(config, multiple))[-1], d_ff=min(multiple, config.d_ff))


def _levels(n: int, multiple: int) -> list[int]:
  """The sizes n times LEVELS, rounded down to the multiple, each once; n itself is one."""
  sizes = [n, *(math.floor(n * level / multiple) * multiple for level in LEVELS[1:])]
  return sorted({size for size in sizes if size > 0}, reverse=True)


def _largest(sizes: Sequence[ModelConfig], fits: Callable[[ModelConfig], bool]) -> ModelConfig | None:
  """By bisection; None if none fits."""
  low, high = 0, len(sizes)
  while low < high:
    middle = (low + high + 1) // 2
    low, high = (middle, high) if fits(sizes[middle - 1]) else (low, middle - 1)
  return sizes[low - 1] if low else None


def _within(one: ModelConfig, other: ModelConfig) -> bool:
  sizes = [np.array([c.n_layers, c.n_kv_heads, c.d_model, c.d_ff]) for c in (one, other)]
  return bool((sizes[0] <= sizes[1]).all() and (sizes[0] < sizes[1]).any())


if __name__ == '__main__':
  from slm_jax.prune.command import main  # which imports this module

  sys.exit(main())
