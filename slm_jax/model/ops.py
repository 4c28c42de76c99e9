"""The small pure functions that a decoder layer is made of, each replaceable by a faster one with the same contract.

Statistics are float32 whatever the dtype of the activations. Legend of shapes: slm_jax/model/config.py.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp

from slm_jax.model.products import ANYWHERE, Products


def embed(table_VD: jax.Array, tokens_BT: jax.Array, scale: float, dtype: str) -> jax.Array:
  """Rows of the table times `scale`: x_BTD in `dtype`. A token beyond the vocabulary gives NaN, not another one."""
  return jnp.take(table_VD, tokens_BT, axis=0, mode='fill').astype(dtype) * scale


def linear(x: jax.Array, w: jax.Array, n_in: int = 1, products: Products = ANYWHERE) -> jax.Array:
  """Contracts the last `n_in` axes of x with the first of w.

  As one matrix product of all tokens with all outputs: XLA's CPU backend turns a product with more axes into strided
  loops and transposes in the backward pass (a step of a 0.8M model took 1.6 times the CPU time).
  """
  rows, inside, outside = x.shape[: x.ndim - n_in], w.shape[:n_in], w.shape[n_in:]
  x_NI = x.reshape(math.prod(rows), math.prod(inside))
  w_IO = w.reshape(math.prod(inside), math.prod(outside))
  return products.narrow('ni,io->no', x_NI, w_IO).reshape(*rows, *outside)


def unembed(x: jax.Array, table_VD: jax.Array, softcap: float, products: Products = ANYWHERE) -> jax.Array:
  """x_...D -> float32 logits_...V; with a soft-cap c: c * tanh(logits / c)."""
  x_ND = x.reshape(-1, x.shape[-1])
  logits = products.wide('nd,vd->nv', x_ND, table_VD).reshape(*x.shape[:-1], table_VD.shape[0])
  return softcap * jnp.tanh(logits / softcap) if softcap else logits


def along(vector: jax.Array, x: jax.Array) -> jax.Array:
  """`vector` with leading axes of size 1, as many axes as x: broadcasting that is written down."""
  return jnp.expand_dims(vector, range(x.ndim - vector.ndim))


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
  """scale * x / sqrt(mean(x^2) + eps) over the last axis (arXiv 1910.07467)."""
  x32 = x.astype(jnp.float32)
  x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
  return (x32 * along(scale.astype(jnp.float32), x)).astype(x.dtype)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
  """scale * (x - mean) / sqrt(var + eps) + bias over the last axis (arXiv 1607.06450)."""
  x32 = x.astype(jnp.float32)
  x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
  x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
  x32 = x32 * along(scale.astype(jnp.float32), x) + along(bias.astype(jnp.float32), x)
  return x32.astype(x.dtype)


def activation(kind: Literal['swiglu', 'geglu', 'gelu'], up: jax.Array, gate: jax.Array | None) -> jax.Array:
  """silu(gate) * up, gelu(gate) * up, or, without a gate, gelu(up); GELU by tanh (arXiv 2002.05202, 1606.08415)."""
  if gate is None:
    return jax.nn.gelu(up, approximate=True)
  return (jax.nn.silu(gate) if kind == 'swiglu' else jax.nn.gelu(gate, approximate=True)) * up
