"""Attention over an interval of slots, and the cache of keys and values.

Every mask here is an interval: the query in slot t sees the slots low..t, where low is the first token of its own
document, or the first inside its sliding window if that is later. Two integers a query say all of it, for packed
documents, ragged prompts and sliding windows alike, and no [T,S] mask is stored. `low` of a global layer also numbers
the documents, which is what fused kernels want as segment ids.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


def document_starts(segments_BT: jax.Array) -> jax.Array:
  """Slot of the first token of each token's document. A run of equal ids is a document; padding (0) is one as well."""
  slot_BT = jnp.arange(segments_BT.shape[1])[None]
  changed_BT = jnp.diff(segments_BT, axis=1, prepend=-1) != 0
  return jax.lax.cummax(jnp.where(changed_BT, slot_BT, 0), axis=1)


def attention(
  q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, low_BT: jax.Array, high_BT: jax.Array, scale: float
) -> jax.Array:
  """softmax(scale * q k^T) v over the slots low..high of each query; float32 softmax; returns [B,T,H,K].

  Query heads h*R..h*R+R-1 share key/value head h (R = H/G); the shared heads are never copied. The leading axis of
  `low` and `high` may be 1. An empty interval is not allowed.
  """
  (b, t, h, k), (s, g) = q_BTHK.shape, k_BSGK.shape[1:3]
  q_BTGRK = (q_BTHK * scale).reshape(b, t, g, h // g, k)
  scores_BGRTS = jnp.einsum('btgrk,bsgk->bgrts', q_BTGRK, k_BSGK, preferred_element_type=jnp.float32)
  slot_BTS = jnp.arange(s)[None, None]
  seen_BTS = (low_BT[..., None] <= slot_BTS) & (slot_BTS <= high_BT[..., None])
  scores_BGRTS = jnp.where(seen_BTS[:, None, None], scores_BGRTS, -jnp.inf)
  weights_BGRTS = jax.nn.softmax(scores_BGRTS, axis=-1).astype(v_BSGK.dtype)
  return jnp.einsum('bgrts,bsgk->btgrk', weights_BGRTS, v_BSGK).reshape(b, t, h, k)


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
