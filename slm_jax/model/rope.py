"""Rotary position embedding, split-half: dimensions d and d + K/2 are a pair, as in Hugging Face."""

import jax
import jax.numpy as jnp
import numpy as np


def frequencies(head_dim: int, theta: float, scaling: tuple[float, ...] = ()) -> np.ndarray:
  """float32 [K/2], radians a position: f_d = theta^(-2d/K) (RoFormer, arXiv 2104.09864).

  scaling (Llama 3, arXiv 2407.21783): (factor, low, high, original positions P). Frequencies that turn fewer than `low`
  times in P positions are divided by `factor`, those that turn more than `high` times stay, those between are blended:
  f * (s + (1 - s)/factor) with s = clip((P f/2pi - low)/(high - low), 0, 1).
  """
  f = theta ** (-np.arange(0, head_dim, 2) / head_dim)
  if scaling:
    factor, low, high, positions = scaling
    s = np.clip((positions * f / (2 * np.pi) - low) / (high - low), 0, 1)
    f = f * (s + (1 - s) / factor)
  return f.astype(np.float32)


def angles(position_BT: jax.Array, frequencies: np.ndarray) -> tuple[jax.Array, jax.Array]:
  """float32 (cos, sin) of position times frequency, each [B,T,1,K/2]: the same for all heads."""
  angle = position_BT[..., None, None].astype(jnp.float32) * frequencies[None, None, None]
  return jnp.cos(angle), jnp.sin(angle)


def rotate(x_BTHK: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """(x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), x1 and x2 the halves of a head; computed in float32."""
  x1, x2 = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x_BTHK.dtype)
