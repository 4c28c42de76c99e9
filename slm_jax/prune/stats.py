"""What a forward pass says of the inputs of a layer's matrices: sums over tokens, which merge as a monoid.

    stats = collect_all(model, params, batches)

Only tokens in a document count (segments > 0). A sequence is a row of the batch. Legend of shapes: L layers, I inputs
of a matrix (heads and their sizes are one axis), B batch, T time, D model width.
"""

import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from slm_jax.config import require
from slm_jax.model.api import Batch, Feature, Model, Params
from slm_jax.prune.matrices import SITES, Into

KINDS: tuple[Into, ...] = tuple(dict.fromkeys(site.into for site in SITES.values()))


class Moments(NamedTuple):
  """Of each input over tokens; float32."""

  count: jax.Array  # type: ignore[assignment]  # hides tuple.count; tokens, []
  mean: jax.Array  # [L,I]
  m2: jax.Array  # sum_t (x_t - mean)^2, [L,I]

  @property
  def squares(self) -> jax.Array:
    """sum_t x_t^2 = m2 + count * mean^2, [L,I]: the square of Wanda's ||X_j||."""
    return self.m2 + self.count * self.mean**2

  @property
  def variance(self) -> jax.Array:
    """m2 / (count - 1), [L,I]."""
    return self.m2 / jnp.maximum(self.count - 1, 1)


class Stats(NamedTuple):
  """Sums over the tokens that were seen, float32; by kind of input where there are several. Zeros are the neutral one.

  moments: for Wanda (arXiv 2306.11695) and FLAP (arXiv 2312.11983).
  strength: sum over sequences of (mean_t s_t)^2, for Minitron (arXiv 2407.14679). s is the size |x| of an input, [L,I].
    For 'heads' [L,H] and 'groups' [L,G] it is the L2 norm of what a head gives to o, or a group of heads together.
  gram: [L,I,I] sum_t x_t x_t^T, for SparseGPT (arXiv 2301.00774); empty unless asked for.
  influence: [L] sum_t of 1 - cos(x_i, x_{i+1}), hidden states before and after a layer (ShortGPT, arXiv 2403.03853).
  angle: [L+1,L+1] sum_t of arccos(cos(x_i, x_j)) / pi, hidden states after i and after j layers: of every block of
    layers (arXiv 2403.17887, which takes the last token of a sequence only).
  """

  tokens: jax.Array
  sequences: jax.Array
  moments: dict[Into, Moments]
  strength: dict[str, jax.Array]
  gram: dict[Into, jax.Array]
  influence: jax.Array
  angle: jax.Array


def collect(model: Model, params: Params, batch: Batch, gram: bool = False) -> Stats:
  """Stats of one batch by one forward pass; jittable. Reads its inputs and segments.

  Sums are float32; the products of a gram are of activations in the model's own dtype. Where the model's layers are a
  loop (model.unroll), memory holds the inputs of all of them, [L,B,T,I].
  """
  n_layers = model.config.n_layers
  real_BT = batch['segments'] > 0
  stream = [Feature('hidden', i) for i in range(n_layers + 1)]
  into = {kind: [Feature(kind, i + 1) for i in range(n_layers)] for kind in KINDS}
  _, features = model.features(params, batch, [*stream, *(feature for kind in KINDS for feature in into[kind])])

  def stacked(of, kind):  # layer by layer, so that no more than the results is stacked
    rows = [_masked(features[feature], real_BT) for feature in into[kind]]
    return jax.tree.map(lambda *layers: jnp.stack(layers), *[of(x_BTI, real_BT) for x_BTI in rows])

  tokens = real_BT.sum(dtype=jnp.float32)
  influence, angle = _turns(jnp.stack([_masked(features[feature], real_BT) for feature in stream]), real_BT)
  return Stats(
    tokens=tokens,
    sequences=real_BT.any(1).sum(dtype=jnp.float32),
    moments={kind: Moments(tokens, *stacked(_moments, kind)) for kind in KINDS},
    strength={kind: stacked(_strength, kind) for kind in KINDS}
    | {
      'heads': stacked(functools.partial(_strength_of_parts, model.config.n_heads), 'into_o'),
      'groups': stacked(functools.partial(_strength_of_parts, model.config.n_kv_heads), 'into_o'),
    },
    gram={kind: stacked(_gram, kind) for kind in KINDS} if gram else {},
    influence=influence,
    angle=angle,
  )


def merge(a: Stats, b: Stats) -> Stats:
  """The stats of both sets of tokens together; associative and commutative up to rounding."""
  require(a.gram.keys() == b.gram.keys(), 'merge: one of the two has a gram and the other has none')
  sums = jax.tree.map(jnp.add, a._replace(moments={}), b._replace(moments={}))
  return sums._replace(moments={kind: _chan(a.moments[kind], b.moments[kind]) for kind in a.moments})


def collect_all(model: Model, params: Params, batches: Iterable[Batch], gram: bool = False) -> Stats:
  """Returns the stats of all batches together. ConfigError if there are no tokens."""
  return collector(model, gram)(params, batches)


def collector(model: Model, gram: bool = False) -> Callable[[Params, Iterable[Batch]], Stats]:
  """Returns (params, batches) -> stats of all batches, compiled once for all parameters and batches of one shape."""
  one = jax.jit(lambda params, batch: collect(model, params, batch, gram))
  both = jax.jit(merge, donate_argnums=0)

  def of(params: Params, batches: Iterable[Batch]) -> Stats:
    total = None
    for batch in batches:
      new = one(params, {name: batch[name] for name in ('inputs', 'segments')})
      total = new if total is None else both(total, new)
    require(total is not None and bool(total.tokens > 0), 'calibration: no tokens (of segments > 0)')
    assert total is not None
    return total

  return of


def distinct_tokens(batches: Iterable[Batch]) -> int:
  """How many tokens of documents there are to learn from: a sequence that comes several times counts once."""
  rows: dict[bytes, int] = {}
  for batch in batches:
    for inputs_T, segments_T in zip(np.asarray(batch['inputs']), np.asarray(batch['segments']), strict=True):
      rows[inputs_T.tobytes() + segments_T.tobytes()] = int((segments_T > 0).sum())
  return sum(rows.values())


def _chan(a: Moments, b: Moments) -> Moments:
  """Chan, Golub & LeVeque 1979; the old means stay apart from the new one."""
  count = a.count + b.count
  apart = b.mean - a.mean
  share = b.count / jnp.maximum(count, 1)
  return Moments(count, a.mean + apart * share, a.m2 + b.m2 + apart**2 * (a.count * share))


def _masked(x: jax.Array, real_BT: jax.Array) -> jax.Array:
  """[B,T,...] as [B,T,I], 0 where there is no token."""
  return jnp.where(real_BT[..., None], x.reshape(*real_BT.shape, -1), 0)


def _moments(x_BTI: jax.Array, real_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
  mean_I = x_BTI.sum((0, 1), dtype=jnp.float32) / jnp.maximum(real_BT.sum(), 1)
  apart_BTI = jnp.where(real_BT[..., None], x_BTI.astype(jnp.float32) - mean_I[None, None], 0)
  return mean_I, (apart_BTI**2).sum((0, 1))


def _strength(x_BTI: jax.Array, real_BT: jax.Array) -> jax.Array:
  mean_BI = jnp.abs(x_BTI).sum(1, dtype=jnp.float32) / jnp.maximum(real_BT.sum(1), 1)[:, None]
  return (mean_BI**2).sum(0)


def _strength_of_parts(parts: int, x_BTI: jax.Array, real_BT: jax.Array) -> jax.Array:
  """Of the L2 norms of so many equal parts of the inputs."""
  squares_BTI = jnp.square(x_BTI.astype(jnp.float32))
  return _strength(jnp.sqrt(squares_BTI.reshape(*real_BT.shape, parts, -1).sum(-1)), real_BT)


def _gram(x_BTI: jax.Array, real_BT: jax.Array) -> jax.Array:
  del real_BT  # x is 0 there
  return jnp.einsum('bti,btj->ij', x_BTI, x_BTI, preferred_element_type=jnp.float32)


def _turns(x_SBTD: jax.Array, real_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Influence [S-1] and angle [S,S] of S states of the stream; a state of length 0 is at right angles to all."""
  dots = jnp.einsum('ibtd,jbtd->ijbt', x_SBTD, x_SBTD, preferred_element_type=jnp.float32, precision='highest')
  norm_SBT = jnp.sqrt(jnp.einsum('iibt->ibt', dots))
  lengths = norm_SBT[:, None] * norm_SBT[None]
  cosines = jnp.where(lengths > 0, dots / jnp.where(lengths > 0, lengths, 1), 0).clip(-1, 1)
  real, same = real_BT[None], jnp.eye(len(x_SBTD), dtype=bool)[..., None, None]  # arccos would magnify their rounding
  influence = jnp.where(real, 1 - jnp.einsum('iibt->ibt', cosines[:-1, 1:]), 0).sum((1, 2))
  return influence, jnp.where(real[None] & ~same, jnp.arccos(cosines) / jnp.pi, 0).sum((2, 3))
