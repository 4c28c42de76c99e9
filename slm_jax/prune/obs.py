"""Optimal Brain Surgeon on an explicit Hessian, for small problems; Optimal Brain Damage and magnitude beside it.

Near a minimum, deleting weight q of N and moving the others costs at least, with H the Hessian of the loss,

    min_dw dw^T H dw / 2  with  dw_q = -w_q      =  w_q^2 / (2 [H^-1]_qq),    at  dw = -(w_q / [H^-1]_qq) H^-1 e_q

(Hassibi & Stork 1993). OBD is its case of a diagonal H, without a step. `woodbury` gives H^-1 from gradients.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from slm_jax.config import require

By = Literal['obs', 'obd', 'magnitude']


def obs_saliency(w: jax.Array, inverse: jax.Array) -> jax.Array:
  """w_q^2 / (2 [H^-1]_qq) of w [...,N], in units of the loss; inverse: H^-1 [...,N,N], positive definite."""
  return 0.5 * w**2 / jnp.diagonal(inverse, axis1=-2, axis2=-1)


def obd_saliency(w: jax.Array, hessian: jax.Array) -> jax.Array:
  """h_qq w_q^2 / 2 of w [...,N], in units of the loss; hessian [...,N,N] (LeCun 1989)."""
  return 0.5 * w**2 * jnp.diagonal(hessian, axis1=-2, axis2=-1)


def obs_step(w_N: jax.Array, inverse_NN: jax.Array, q: jax.Array | int) -> jax.Array:
  """dw = -(w_q / [H^-1]_qq) H^-1 e_q, [N]: deletes weight q and moves the others to where the loss is least."""
  column_N = jnp.take(inverse_NN, q, axis=1)
  return -(jnp.take(w_N, q) / jnp.take(column_N, q)) * column_N


def remove(
  w_N: jax.Array, hessian_of: Callable[[jax.Array], jax.Array], k: int, by: By = 'obs', damping: float = 0.0
) -> tuple[jax.Array, jax.Array]:
  """Deletes k weights one after another, the least salient first: (w [N], which are left [N] bool). jittable.

  hessian_of: w_N -> H [N,N], asked anew before each deletion; a constant one makes this the greedy minimisation of a
  quadratic. by: 'obs' moves the other weights at each step; 'obd' and 'magnitude' leave them. damping: is added to the
  diagonal of H for its inverse (the prior of arXiv 2004.14340, alpha of the paper), which H of fewer samples than
  weights needs. Deleted weights are exactly 0.
  """
  require(0 <= k <= w_N.size, f'obs: {k} of {w_N.size} weights cannot be deleted')

  def body(_, carry):
    w_N, left_N = carry
    hessian = hessian_of(w_N)
    if by == 'obs':
      inverse = _inverse(hessian, left_N, damping)
      saliency_N = obs_saliency(w_N, inverse)
    else:
      saliency_N = obd_saliency(w_N, hessian) if by == 'obd' else jnp.abs(w_N)
    q = jnp.argmin(jnp.where(left_N, saliency_N, jnp.inf))
    left_N = left_N & (jnp.arange(w_N.size) != q)
    moved_N = w_N + obs_step(w_N, inverse, q) if by == 'obs' else w_N
    return jnp.where(left_N, moved_N, 0), left_N

  return jax.lax.fori_loop(0, k, body, (w_N, jnp.ones(w_N.shape, bool)))


def _inverse(hessian_NN: jax.Array, left_N: jax.Array, damping: float) -> jax.Array:
  """H^-1 of the weights that are left; 1 on the diagonal and else 0 of the others, so that they move nothing."""
  eye = jnp.eye(left_N.size, dtype=hessian_NN.dtype)
  both = left_N[:, None] & left_N[None]
  return jnp.linalg.inv(jnp.where(both, hessian_NN + damping * eye, eye))


def woodbury(g_MN: jax.Array, damping: float, block: int) -> jax.Array:
  """Inverse of the blocks along the diagonal of F = damping I + (1/M) sum_m g_m g_m^T: [N/block, block, block].

  F^-1 = (I - G^T (M damping I + G G^T)^-1 G) / damping, G [M,block]: an M x M system for each block (WoodFisher,
  arXiv 2004.14340; oBERT, arXiv 2203.07259). g: gradients of M samples. For `obs_saliency` with w as [N/block, block].
  """
  m, n = g_MN.shape
  require(damping > 0, f'obs.damping={damping}: must be positive, fewer gradients than weights have no inverse')
  require(n % block == 0, f'obs.block={block}: must divide the {n} weights')

  def of_block(g_MB):
    inner_MM = m * damping * jnp.eye(m, dtype=g_MB.dtype) + g_MB @ g_MB.T
    return (jnp.eye(block, dtype=g_MB.dtype) - g_MB.T @ jnp.linalg.solve(inner_MM, g_MB)) / damping

  return jax.vmap(of_block)(jnp.moveaxis(g_MN.reshape(m, n // block, block), 1, 0))
