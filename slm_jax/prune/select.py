"""Exact selection of the largest scores, without sort or gather, with a traced budget."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from slm_jax.config import require


def keep_largest(scores: Sequence[jax.Array], share: jax.Array | float) -> list[jax.Array]:
  """`largest` with k = round(share * n) of the n scores. `share` may be traced; float32 is exact to n = 2^24."""
  n = sum(s.size for s in scores)
  traced = isinstance(share, jax.Array)
  return largest(scores, jnp.round(share * n).astype(jnp.int32) if traced else jnp.int32(round(share * n)))


def largest(scores: Sequence[jax.Array], k: jax.Array) -> list[jax.Array]:
  """Boolean arrays that are True at exactly k (int32, traced or not) of the scores: the largest; of equal, the first.

  Float32 numbers of equal sign order like their bits, so the k-th largest is found by bisecting the bits: 32 counting
  passes. Ties are cut by bisecting the position in the same way. Neither needs a sort or, on sharded arrays, any
  communication but the sum of a count. NaN counts as smallest. ConfigError for 2^31 scores or more: they need budgets
  of their own, since a count is an int32.
  """
  n = sum(s.size for s in scores)
  require(n < 2**31, f'a budget for {n} weights at once: allowed are fewer than 2^31; use one for each layer')
  keys = [ordered(s) for s in scores]
  threshold = bisect(lambda t: _total(key >= t for key in keys) >= k)  # largest t with at least k keys above or at it
  ties = k - _total(key > threshold for key in keys)  # so many of the keys equal to t are kept

  starts = [sum(s.size for s in scores[:i]) for i in range(len(scores))]
  positions = [places(s.shape) + jnp.uint32(start) for s, start in zip(scores, starts, strict=True)]
  equal = [key == threshold for key in keys]
  end = bisect(lambda e: _total(q & (p < e) for q, p in zip(equal, positions, strict=True)) <= ties)
  return [(k > 0) & ((key > threshold) | (q & (p < end))) for key, q, p in zip(keys, equal, positions, strict=True)]


def bisect(holds: Callable[[jax.Array], jax.Array]) -> jax.Array:
  """The largest uint32 for which `holds` is true; `holds` is true at 0 and false above some number."""

  def body(i, low):
    higher = low | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
    return jnp.where(holds(higher), higher, low)

  return jax.lax.fori_loop(0, 32, body, jnp.uint32(0))


def _total(masks) -> jax.Array:
  return sum(mask.sum(dtype=jnp.int32) for mask in masks)


def places(shape: tuple[int, ...]) -> jax.Array:
  """Row-major positions, computed where they are needed: no reshape, which would move a sharded array."""
  out = jnp.zeros(shape, jnp.uint32)
  for axis in range(len(shape)):
    out += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(math.prod(shape[axis + 1 :]))
  return out


def ordered(score: jax.Array) -> jax.Array:
  """uint32 keys that order like the float32 scores; -0 equals +0, NaN is 0."""
  sign = jnp.uint32(1 << 31)
  bits = jax.lax.bitcast_convert_type(score.astype(jnp.float32), jnp.uint32)
  bits = jnp.where(bits == sign, jnp.uint32(0), bits)
  key = jnp.where(bits >= sign, ~bits, bits | sign)
  return jnp.where(jnp.isnan(score), jnp.uint32(0), key)
