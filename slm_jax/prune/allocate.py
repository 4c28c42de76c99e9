"""How many weights each matrix of each layer keeps, of a total share that may be traced: one executable, any budget.

Counts are int32 [L] by name of the matrix; each is at least 1, so no budget empties a layer's matrix. Legend:
matrices.py. A share of which less than one weight would be left is a ConfigError where it is known beforehand
(`patterns.check_budget`).
"""

from collections.abc import Callable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from slm_jax.config import require
from slm_jax.prune.matrices import Matrices
from slm_jax.prune.select import bisect, largest, places

Allocation = Literal['uniform', 'erk', 'owl', 'tensor', 'global']
Counts = dict[str, jax.Array]  # int32 [L] by name
Shapes = Mapping[str, tuple[int, ...]]  # (L, I, O) by name


def allocate(
  scores: Matrices, keep: jax.Array | float, allocation: Allocation = 'uniform', most: Counts | None = None
) -> Counts:
  """Counts that a total share `keep` of the weights comes to. `most`: that each may have; unless given, all.

  uniform: every matrix of every layer keeps round(keep I O).
  erk:     e (I + O), at most all: shares proportional to (I+O)/(I O) (Erdos-Renyi kernel, arXiv 1911.11134).
  owl:     a layer's share follows its share of outliers: see `owl`.
  tensor:  as many as are among the round(keep L I O) best of the matrix in all layers.
  global:  as many as are among the round(keep n) best of all n weights. It and `tensor` keep the best of each matrix.
  The totals of erk, owl and global are exact to one weight while float32 counts so far, which is to 2^24.
  """
  if allocation in ('tensor', 'global'):
    return {name: kept.sum((1, 2), jnp.int32) for name, kept in pooled(scores, keep, allocation).items()}
  layers = next(iter(scores.values())).shape[0]
  size_M1 = np.array([[s[0].size] for s in scores.values()], np.float32)
  most_ML = jnp.broadcast_to(size_M1, (len(scores), layers))
  if most is not None:
    most_ML = jnp.stack(list(most.values())).astype(jnp.float32)
  keep = jnp.asarray(keep, jnp.float32)
  ends_M1 = np.array([[s.shape[1] + s.shape[2]] for s in scores.values()], np.float32)
  off_L = owl(scores, keep) - keep if allocation == 'owl' else jnp.zeros(layers)

  def counts_at(level):  # they rise with it
    ideal_ML = level * ends_M1 if allocation == 'erk' else (level + off_L[None]) * size_M1
    return jnp.clip(jnp.round(jnp.minimum(ideal_ML, most_ML)), 1, None).astype(jnp.int32)

  if allocation == 'uniform':
    count_ML = counts_at(keep)
  else:
    count_ML = meet(counts_at, _rounded(keep, sum(s.size for s in scores.values())))
  return dict(zip(scores, count_ML, strict=True))


def meet(counts_at: Callable[[jax.Array], jax.Array], total: jax.Array) -> jax.Array:
  """Counts [...] that sum to `total`, or come as near as they can: those at the highest level that is not above it.

  What is then missing goes to those that rise next, in their order. So a larger total takes from none, as it may where
  all are rounded and the sum is corrected (for levels that are shares it is Webster's method).
  """

  def at(bits):
    return counts_at(jax.lax.bitcast_convert_type(bits, jnp.float32))

  largest_float = jnp.uint32(0x7F7FFFFF)
  low = bisect(lambda bits: (bits <= largest_float) & (at(bits).sum() <= total))
  counts = at(low)
  rise = at(jnp.minimum(low + 1, largest_float)) - counts
  before = jnp.cumsum(rise.ravel()).reshape(rise.shape) - rise
  return counts + jnp.clip(total - counts.sum() - before, 0, rise)


def pooled(scores: Matrices, keep: jax.Array | float, allocation: Allocation) -> Matrices:
  """Masks of the best, compared over the layers of one matrix ('tensor') or over everything ('global').

  The best of each matrix of each layer comes first: none is emptied.
  """
  first = {name: _best_first(s) for name, s in scores.items()}
  pools = [[name] for name in first] if allocation == 'tensor' else [list(first)]
  masks: Matrices = {}
  for names in pools:
    pool = [first[name] for name in names]
    k = jnp.maximum(_rounded(keep, sum(s.size for s in pool)), sum(s.shape[0] for s in pool))
    masks |= dict(zip(names, largest(pool, k), strict=True))
  return masks


def erk(shapes: Shapes, keep: float) -> np.ndarray:
  """Shares [M] of the matrices: min(1, e (I+O)/(I O)), with the e for which they come to `keep` of all. On the host.

  The total grows with e in straight lines, which bend where a matrix is full: so e is found by interpolation.
  """
  size = np.array([i * o for _, i, o in shapes.values()], np.float64)
  full_at = np.array([i * o / (i + o) for _, i, o in shapes.values()])
  bends = np.concatenate([[0.0], np.sort(full_at)])
  totals = [(size * np.minimum(1.0, e / full_at)).sum() / size.sum() for e in bends]
  return np.minimum(1.0, np.interp(keep, totals, bends) / full_at)


def owl(scores: Matrices, keep: jax.Array, times: float = 5.0, apart: float = 0.08) -> jax.Array:
  """Shares [L] of the layers, with mean `keep`, all within `apart` of it (OWL, arXiv 2310.05175: M = 5, lambda = .08).

  A layer's share is linear in D_l, the share of its scores that are above `times` their mean; that of the layer
  furthest from the average differs by `apart`, or by as much as there is room for in [0, 1]. (The authors' code scales
  D to a range of 2 lambda and then shifts it to its mean, which can leave the range by as much again.) Scores of
  pruned weights (-inf) and negative ones count as 0.
  """
  positive = [jnp.maximum(s, 0.0) for s in scores.values()]
  size = sum(s[0].size for s in positive)
  mean_L = jnp.stack([s.sum((1, 2)) for s in positive]).sum(0) / size
  above = [s > times * mean_L[:, None, None] for s in positive]
  outliers_L = jnp.stack([a.sum((1, 2), dtype=jnp.float32) for a in above]).sum(0) / size
  off_L = outliers_L - outliers_L.mean()
  furthest = jnp.abs(off_L).max()
  room = jnp.minimum(apart, jnp.minimum(keep, 1 - keep))
  return keep + room * off_L / jnp.where(furthest > 0, furthest, 1.0)


def _rounded(keep: jax.Array | float, n: int) -> jax.Array:
  """round(keep n), int32."""
  require(n < 2**31, f'a budget for {n} weights at once: allowed are fewer than 2^31; use allocation=uniform')
  return jnp.round(jnp.asarray(keep, jnp.float32) * n).astype(jnp.int32)


def _best_first(score_LIO: jax.Array) -> jax.Array:
  """The scores, with +inf for the best of each layer (of equal ones the first). NaN is -inf."""
  s = jnp.where(jnp.isnan(score_LIO), -jnp.inf, score_LIO.astype(jnp.float32))
  place = places(s.shape)
  best = jnp.where(s == s.max((1, 2), keepdims=True), place, jnp.uint32(2**32 - 1))
  return jnp.where(place == best.min((1, 2), keepdims=True), jnp.inf, s)
