"""Logits, of the whole vocabulary at once or of a block of it at a time, and what losses ask of them.

Shapes: V vocabulary, W tokens of a block, K ids. A loss that is written with the functions below does not know which of
the two it reads: of an array they are the plain operation; of `Blocks`, a loop in which one block exists at a time, and
is computed again for the gradient. All blocks are read once by each function, so a block's matrix product is done anew
for each: memory for time.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

ABSENT = -1e30  # stands for log 0 where -inf would make the gradient of a log-sum NaN


@dataclasses.dataclass(frozen=True)
class Blocks:
  """[..., V] that never exists whole: `read` of a block's pieces is [..., W]. Beyond `size` tokens it means nothing."""

  pieces: Any  # a tree of arrays [n, ...], one entry for each block
  read: Callable[[Any], Any]
  width: int  # W
  size: int  # V


Logits = jax.Array | Blocks


def blocks(of: Callable[[jax.Array], jax.Array], table: jax.Array, width: int) -> Blocks:
  """of(rows [W, ...] of the table [V, ...]) -> logits [..., W]."""
  return Blocks(_pieces(table, 0, width, 'constant'), of, width, len(table))


def first(logits: Logits, vocab: int | None) -> Logits:
  """Those of the first tokens; the others are padding."""
  if not isinstance(logits, Blocks):
    return logits[..., :vocab]
  size = logits.size if vocab is None else min(vocab, logits.size)
  pieces = jax.tree.map(lambda x: x[: -(-size // logits.width)], logits.pieces)
  return dataclasses.replace(logits, pieces=pieces, size=size)


def each(fn: Callable[..., Any], *logits: Logits) -> Any:
  """fn(*logits), elementwise along the vocabulary; it may broadcast against what has a last axis of 1."""
  widths = {one.width for one in logits if isinstance(one, Blocks)}
  if not widths:
    return fn(*logits)
  (width,) = widths
  parts = [one if isinstance(one, Blocks) else _split(one, width) for one in logits]
  (size,) = {part.size for part in parts}

  def read(pieces):
    return fn(*(part.read(piece) for part, piece in zip(parts, pieces, strict=True)))

  return Blocks(tuple(part.pieces for part in parts), read, width, size)


def constant(tree: Any) -> Any:
  """Without a gradient."""
  return jax.tree.map(lambda x: each(jax.lax.stop_gradient, x), tree, is_leaf=lambda x: isinstance(x, Blocks))


def whole(logits: Logits) -> jax.Array:
  """As an array."""
  if not isinstance(logits, Blocks):
    return logits
  read = jnp.moveaxis(jax.lax.map(logits.read, logits.pieces), 0, -2)
  return read.reshape(*read.shape[:-2], -1)[..., : logits.size]


# --------------------------------------------------------------------------------------------------------- reductions


def total(fn: Callable[..., Any], *logits: Logits) -> Any:
  """sum_v fn(*logits)[v], or a tree of such sums, [...]. A token of -inf must be a term of 0: fn says so."""
  of = each(fn, *logits)
  if not isinstance(of, Blocks):
    return jax.tree.map(lambda x: x.sum(-1), of)
  zeros = jax.tree.map(lambda x: 0.0, _shapes(of))

  def add(sums, block, there, start):
    return jax.tree.map(lambda s, x: s + jnp.where(there, x, 0.0).sum(-1), sums, block)

  return _fold(add, zeros, of)


def log_z(logits: Logits, without: jax.Array | None = None) -> jax.Array:
  """log sum_v exp z_v; without: ids [..., K] that are left out of the sum."""
  if not isinstance(logits, Blocks):
    return jax.nn.logsumexp(logits if without is None else _without(logits, without, 0, -jnp.inf), axis=-1)

  def add(carry, block, there, start):
    block = jnp.where(there, jnp.maximum(block, ABSENT), ABSENT)
    block = block if without is None else _without(block, without, start, ABSENT)
    return jnp.logaddexp(carry, jax.nn.logsumexp(block, axis=-1))

  return _fold(add, ABSENT, logits)


def log_softmax(logits: Logits, lowest: float) -> Logits:
  """With `lowest` in place of -inf."""
  if not isinstance(logits, Blocks):
    return jnp.maximum(jax.nn.log_softmax(logits), lowest)
  normal = log_z(logits)[..., None]
  return each(lambda z: jnp.maximum(z - normal, lowest), logits)


def at(logits: Logits, ids: jax.Array) -> jax.Array:
  """z of the ids [..., K]."""
  if not isinstance(logits, Blocks):
    return _one_of(logits, ids) if ids.shape[-1] == 1 else jnp.take_along_axis(logits, ids, axis=-1)

  def add(carry, block, there, start):
    here = (ids >= start) & (ids < start + logits.width)
    found = jnp.take_along_axis(block, jnp.clip(ids - start, 0, logits.width - 1), axis=-1)
    return carry + jnp.where(here, found, 0.0)

  return _fold(add, 0.0, logits, ids.shape[-1:])


@jax.custom_vjp
def _one_of(logits: jax.Array, ids: jax.Array) -> jax.Array:
  """[..., 1]. Its gradient is a comparison, which fuses with what else there is; a gather's would be a scatter, between
  the softmax's gradient and the products that take it: two more passes over float32 logits, on a GPU."""
  return jnp.take_along_axis(logits, ids, axis=-1)


def _pull_one(saved: tuple[jax.Array, int], cotangent: jax.Array) -> tuple[jax.Array, None]:
  ids, size = saved
  tokens = jax.lax.broadcasted_iota(ids.dtype, (*ids.shape[:-1], size), ids.ndim - 1)
  return jnp.where(tokens == ids, cotangent, 0.0), None


_one_of.defvjp(lambda logits, ids: (jnp.take_along_axis(logits, ids, axis=-1), (ids, logits.shape[-1])), _pull_one)


def largest(logits: Logits, k: int) -> tuple[jax.Array, jax.Array]:
  """The k largest and their ids, [..., K] each, the first one of equals first."""
  if not isinstance(logits, Blocks):
    values, ids = jax.lax.top_k(logits, k)
    return values, ids

  def better(carry, block, there, start):
    values, ids = carry
    its = jnp.broadcast_to(start + jnp.arange(logits.width), block.shape)
    best, which = jax.lax.top_k(jnp.concatenate([values, jnp.where(there, block, -jnp.inf)], axis=-1), k)
    return best, jnp.take_along_axis(jnp.concatenate([ids, its], axis=-1), which, axis=-1)

  return _fold(better, (-jnp.inf, 0), logits, (k,))


def most_likely(logits: Logits) -> jax.Array:
  """The id of the largest, the first one of equals."""
  if not isinstance(logits, Blocks):
    return jnp.argmax(logits, axis=-1)
  return largest(constant(logits), 1)[1][..., 0]


def log_z_and_most_likely(logits: Logits) -> tuple[jax.Array, jax.Array]:
  """Both; an array is read twice for them, and not three times: the largest logit is that of the most likely token."""
  best = most_likely(logits)
  if isinstance(logits, Blocks):
    return log_z(logits), best
  peak = jax.lax.stop_gradient(at(logits, best[..., None]))
  return jnp.log(jnp.exp(logits - peak).sum(-1)) + peak[..., 0], best


def drawn(logits: Logits, uniform: jax.Array) -> jax.Array:
  """One draw for each of the numbers in [0, 1), [..., U], by the inverse of the cumulative distribution. int32."""
  if not isinstance(logits, Blocks):
    sums = jnp.cumsum(jax.nn.softmax(logits), axis=-1)
    return jnp.minimum(_reached(sums, uniform * sums[..., -1:]), logits.shape[-1] - 1)
  normal = log_z(logits)[..., None]
  probabilities = each(lambda z: jnp.exp(z - normal), logits)

  def add(carry, block, there, start):
    before, ids, last = carry
    block = jnp.where(there, block, 0.0)
    sums = before[..., None] + jnp.cumsum(block, axis=-1)
    its = jnp.where(block > 0, start + jnp.arange(logits.width), 0).max(-1)
    return sums[..., -1], ids + _reached(sums, uniform), jnp.maximum(last, its)

  _, ids, last = _fold(add, (0.0, jnp.zeros(uniform.shape[-1:], jnp.int32), 0), probabilities)
  return jnp.minimum(ids, last[..., None])  # rounding leaves the last sum beside 1


def _reached(sums: jax.Array, targets: jax.Array) -> jax.Array:
  """How many of the increasing sums [..., W] are at most each of the targets [..., U]: no entry of 0 is ever next."""
  flat = sums.reshape(-1, sums.shape[-1]), targets.reshape(-1, targets.shape[-1])
  found = jax.vmap(lambda sums, u: jnp.searchsorted(sums, u, side='right'))(*flat)
  return found.astype(jnp.int32).reshape(targets.shape)


def _without(values: jax.Array, ids: jax.Array, start: jax.Array | int, instead: float) -> jax.Array:
  """[..., W] of tokens from `start` on, with another value at the ids [..., K] among them."""
  width = values.shape[-1]
  rows, local = values.reshape(-1, width), (ids - start).reshape(-1, ids.shape[-1])
  local = jnp.where((local >= 0) & (local < width), local, width)  # a negative index would count from the end
  return rows.at[jnp.arange(len(rows))[:, None], local].set(instead, mode='drop').reshape(values.shape)


def _pieces(x: jax.Array, axis: int, width: int, beyond: str) -> jax.Array:
  """[n, ...] with W of that axis in each."""
  n = -(-x.shape[axis] // width)
  padding = [(0, 0)] * x.ndim
  padding[axis] = (0, n * width - x.shape[axis])
  x = jnp.pad(x, padding, mode=beyond)
  return jnp.moveaxis(x.reshape(*x.shape[:axis], n, width, *x.shape[axis + 1 :]), axis, 0)


def _split(logits: jax.Array, width: int) -> Blocks:
  """An array in blocks; the values beyond its end are ones that it has, so that no gradient is NaN there."""
  return Blocks(_pieces(logits, logits.ndim - 1, width, 'edge'), lambda piece: piece, width, logits.shape[-1])


def _shapes(logits: Blocks) -> Any:
  """Of one block."""
  return jax.eval_shape(logits.read, jax.tree.map(lambda x: x[0], logits.pieces))


def _fold(fn: Callable[..., Any], zero: Any, logits: Blocks, last: tuple[int, ...] = ()) -> Any:
  """fn(carry, block, there, start) over all blocks: whose tokens are from `start` on, those that are `there`.

  zero: what the carry begins with, for every token of text; last: the last axis of what is a number in it.
  """
  lead = jax.tree.leaves(_shapes(logits))[0].shape[:-1]
  starts = jnp.arange(0, logits.size, logits.width)

  @jax.checkpoint
  def body(carry, at):
    piece, start = at
    there = start + jnp.arange(logits.width) < logits.size
    return fn(carry, logits.read(piece), there, start), None

  def begin(value):
    value = jnp.asarray(value, jnp.float32 if isinstance(value, float) else jnp.int32)
    return jnp.broadcast_to(value, (*lead, *(value.shape or last)))

  return jax.lax.scan(body, jax.tree.map(begin, zero), (logits.pieces, starts))[0]
