"""Attention over an interval of slots, and the cache of keys and values.

Every mask here is an interval: the query in slot t sees the slots low..t, where low is the first token of its own
document, or the first inside its sliding window if that is later. Two integers a query say all of it, for packed
documents, ragged prompts and sliding windows alike, and no [T,S] mask is stored. `low` of a global layer also numbers
the documents, which is what fused kernels want as segment ids.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from slm_jax.model.products import ANYWHERE, Products


def document_starts(segments_BT: jax.Array) -> jax.Array:
  """Slot of the first token of each token's document. A run of equal ids is a document; padding (0) is one as well."""
  slot_BT = jnp.arange(segments_BT.shape[1])[None]
  changed_BT = jnp.diff(segments_BT, axis=1, prepend=-1) != 0
  return jax.lax.cummax(jnp.where(changed_BT, slot_BT, 0), axis=1)


def attention(
  q_BTHK: jax.Array,
  k_BSGK: jax.Array,
  v_BSGK: jax.Array,
  low_BT: jax.Array,
  high_BT: jax.Array,
  scale: float,
  products: Products = ANYWHERE,
) -> jax.Array:
  """Computes softmax(scale * q k^T) v over the slots low..high of each query: [B,T,H,K].

  The softmax is float32, its scale and normaliser included; its weights are rounded once, to the dtype of v.

  Query heads h*R..h*R+R-1 share key/value head h (R = H/G); the shared heads are never copied. The leading axis of
  `low` and `high` may be 1. An empty interval is not allowed, nor one that ends after the query's own slot.

  Where queries and keys are the same tokens, they are taken in a few blocks, and a block's keys end where its queries
  do: of the square that causality leaves half empty, five eighths are computed.
  """
  t, s = q_BTHK.shape[1], k_BSGK.shape[1]
  blocks = 4 if t == s and t % 4 == 0 and t >= 128 else 1
  width, out = t // blocks, []
  for end in range(width, t + 1, width):
    rows, keys = slice(end - width, end), slice(0, end if blocks > 1 else s)
    seen = k_BSGK[:, keys], v_BSGK[:, keys], low_BT[:, rows], high_BT[:, rows]
    part = _attend(products, scale, q_BTHK[:, rows], *seen)
    out.append(part)
  return jnp.concatenate(out, axis=1) if blocks > 1 else out[0]


def _attend(
  products: Products,
  scale: float,
  q_BTHK: jax.Array,
  k_BSGK: jax.Array,
  v_BSGK: jax.Array,
  low_BT: jax.Array,
  high_BT: jax.Array,
) -> jax.Array:
  """Computes one block of queries. The mask is added: fewer passes over the scores.

  In float32 the division by the weights' sum comes last, on the smaller array. In a narrower dtype it comes before the
  weights are rounded: rounding them and their sum before that doubles the error in the gradients of queries and keys,
  and saves 0 to 6 % of a step on a CPU.
  """
  (b, t, h, k), (s, g) = q_BTHK.shape, k_BSGK.shape[1:3]
  r = h // g
  slot_11S = jnp.arange(s)[None, None]
  seen_BTS = (low_BT[..., None] <= slot_11S) & (slot_11S <= high_BT[..., None])
  bias_B11TS = jnp.where(seen_BTS, 0.0, -1e30)[:, None, None]

  q_BGRTK = jnp.moveaxis(q_BTHK.reshape(b, t, g, r, k), 1, 3)
  k_BGSK, v_BGSK = jnp.moveaxis(k_BSGK, 1, 2), jnp.moveaxis(v_BSGK, 1, 2)
  # The R heads and T queries of a group are the rows of one matrix product.
  scores_BGNS = products.wide('bgnk,bgsk->bgns', q_BGRTK.reshape(b, g, r * t, k), k_BGSK)
  scores_BGRTS = scale * scores_BGNS.reshape(b, g, r, t, s) + bias_B11TS
  peak_BGRT1 = jax.lax.stop_gradient(scores_BGRTS.max(-1, keepdims=True))
  weights_BGRTS = jnp.exp(scores_BGRTS - peak_BGRT1)
  total_BGRT1 = weights_BGRTS.sum(-1, keepdims=True)
  rounds = v_BGSK.dtype != jnp.float32
  if rounds:
    weights_BGRTS = weights_BGRTS * (1 / total_BGRT1)
  weights_BGNS = weights_BGRTS.reshape(b, g, r * t, s).astype(v_BGSK.dtype)
  z_BGRTK = products.narrow('bgns,bgsk->bgnk', weights_BGNS, v_BGSK).reshape(b, g, r, t, k)
  if not rounds:
    z_BGRTK = z_BGRTK / total_BGRT1
  return jnp.moveaxis(z_BGRTK, 3, 1).reshape(b, t, h, k)


class Cache(NamedTuple):
  """Keys and values of the tokens so far; `extend` of slm_jax/model/decode.py fills it from slot 0 on."""

  k_LBSGK: jax.Array
  v_LBSGK: jax.Array
  start_B: jax.Array  # slot of each row's first token; what stands before it is padding
  used: jax.Array  # int32, slots filled, the same in all rows

  def insert(self, layer: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array) -> tuple[jax.Array, jax.Array, 'Cache']:
    """Writes T tokens of one layer at slot `used`; returns all keys [B,S,G,K] and values of that layer, and the cache.

    Does not move `used`: that is for when all layers are written.
    """
    at = (layer, 0, self.used, 0, 0)
    k_LBSGK = jax.lax.dynamic_update_slice(self.k_LBSGK, k_BTGK[None], at)
    v_LBSGK = jax.lax.dynamic_update_slice(self.v_LBSGK, v_BTGK[None], at)
    return k_LBSGK[layer], v_LBSGK[layer], self._replace(k_LBSGK=k_LBSGK, v_LBSGK=v_LBSGK)
