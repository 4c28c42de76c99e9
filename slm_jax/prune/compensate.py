"""What makes up for weights that are pruned: SparseGPT, least squares, a bias. Pure functions of one layer's matrix.

    factor = inverse_factor(h_II)
    new_IO, mask_IO = sparsegpt(w_IO, factor, 0.5)        # or (2, 4), or a mask that is given
    new_IO = least_squares(w_IO, damped(h_II), mask_IO)   # the best weights that this mask allows

h_II = X^T X, a sum over tokens of the matrix's inputs X_NI; with it ||X (new - w)||^2 = sum_O d_O^T H d_O. w_IO is
W[out, in]^T of the papers: their columns are our inputs I, their rows our outputs O. G: inputs of a group, B: of a
block. All is float32 and runs under jit, and under vmap over a leading axis L. Masks are True where a weight is kept.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from slm_jax.config import require
from slm_jax.prune.select import keep_largest

DAMPING = 0.01  # lambda / mean(diag H) (SparseGPT's percdamp)
RETRIES = 8  # each with ten times as much
BLOCK = 128  # inputs whose weights SparseGPT compares with each other

Keep = jax.Array | float | tuple[int, int]  # a mask [I,O], a sparsity, or n of every m
_matmul = functools.partial(jnp.matmul, precision='highest')  # the default is TF32 on GPUs, bfloat16 on TPUs


class Factor(NamedTuple):
  """Of the inverse of a damped H; see `inverse_factor`."""

  u_II: jax.Array  # upper triangular, U^T U = Hd^-1
  live_I: jax.Array  # False where H_jj = 0: inputs that were 0 for all tokens
  damping: jax.Array  # lambda / mean(diag H)


def damped(h_II: jax.Array, damping: jax.Array | float = DAMPING) -> jax.Array:
  """Hd = H + damping * mean(diag H) * I; the mean is that of live inputs, and a dead one (H_jj = 0) gets Hd_jj = 1.

  So dead inputs change nothing for the others.
  """
  h_II = h_II.astype(jnp.float32)
  diagonal_I = jnp.diagonal(h_II)
  live_I = diagonal_I != 0
  mean = diagonal_I.sum() / jnp.maximum(live_I.sum(), 1)
  return h_II + jnp.diag(jnp.where(live_I, damping * mean, 1.0))


def inverse_factor(h_II: jax.Array) -> Factor:
  """U, the upper Cholesky factor of Hd^-1 (in the code of SparseGPT: chol(inv(Hd))^T; arXiv 2301.00774).

  Damping starts at .01 and is multiplied by 10, at most 8 times, for as long as U has a NaN: rounding can leave H with
  eigenvalues below 0. `damping` says how much it took. An H that is not finite gives a U that is not.
  """
  h_II = h_II.astype(jnp.float32)

  def failed(carry):
    tries, u_II = carry
    return (tries == 0) | ((tries <= RETRIES) & ~jnp.isfinite(u_II).all())

  def attempt(carry):
    tries, _ = carry
    return tries + 1, _upper(damped(h_II, DAMPING * 10.0**tries))

  tries, u_II = jax.lax.while_loop(failed, attempt, (jnp.int32(0), h_II))
  return Factor(u_II, jnp.diagonal(h_II) != 0, DAMPING * 10.0 ** (tries - 1))


def _upper(h_II: jax.Array) -> jax.Array:
  """U with U^T U = H^-1, without that inverse: with J the reversal of the order, U = J chol(J H J)^-1 J."""
  lower_II = jnp.linalg.cholesky(h_II[::-1, ::-1])
  inverse_II = jax.scipy.linalg.solve_triangular(lower_II, jnp.eye(len(h_II)), lower=True)
  return jnp.triu(inverse_II[::-1, ::-1])


# --------------------------------------------------------------------------------------------------------- SparseGPT


def sparsegpt(w_IO: jax.Array, factor: Factor, keep: Keep, block: int = BLOCK) -> tuple[jax.Array, jax.Array]:
  """Prunes input after input, and changes the weights of later inputs so that outputs stay as they were; (w, mask).

  With score_jo = w_jo^2 / U_jj^2, which is the error that pruning w_jo adds at its turn, and q_jo = w_jo where it is
  kept and 0 where not, for j = 1..I (SparseGPT, arXiv 2301.00774, algorithm 1):

      e_jo = (w_jo - q_jo) / U_jj ;     w_ko -= U_jk e_jo  for k >= j

  keep: a sparsity s, which may be traced: before each block of `block` inputs (the last one may have fewer) its
  weights are chosen, exactly round((1 - s) * size) of them, of equal scores the first; the outputs compete. (n, m):
  before every m inputs, the n best of them for each output. A mask [I,O]: that one. Weights of dead inputs become 0.
  ConfigError if m does not divide I.
  """
  require(block > 0, f'block={block}: must be positive')
  inputs, outputs = w_IO.shape
  group, choose, mask_IO = _rule(keep, w_IO.shape)
  block = min(max(block // group, 1) * group, inputs)
  w_IO = jnp.where(factor.live_I[:, None], w_IO.astype(jnp.float32), 0)

  def of_block(start, size, carry):
    w_IO, mask_IO = carry
    u_BI = jax.lax.dynamic_slice(factor.u_II, (start, 0), (size, inputs))
    u_BB = jax.lax.dynamic_slice(u_BI, (0, start), (size, size))
    w_BO, mask_BO = (jax.lax.dynamic_slice(x, (start, 0), (size, outputs)) for x in carry)
    w_BO, mask_BO, e_BO = _prune_block(w_BO, mask_BO, u_BB, choose, group if group > 1 else size)
    w_IO = w_IO - _matmul(u_BI.T, e_BO)  # right for the inputs that follow; those before have U = 0
    return tuple(jax.lax.dynamic_update_slice(x, new, (start, 0)) for x, new in ((w_IO, w_BO), (mask_IO, mask_BO)))

  whole, rest = divmod(inputs, block)
  carry = jax.lax.fori_loop(0, whole, lambda i, carry: of_block(i * block, block, carry), (w_IO, mask_IO))
  w_IO, mask_IO = of_block(whole * block, rest, carry) if rest else carry
  return jnp.where(mask_IO, w_IO, 0), mask_IO


def _rule(keep: Keep, shape: tuple[int, ...]) -> tuple[int, Callable, jax.Array]:
  """(inputs that are chosen among at once, 1 for a whole block; (scores, given) -> mask; the mask that is given)."""
  if isinstance(keep, tuple):
    n, m = keep
    require(0 < n <= m, f'n:m={n}:{m}: need 0 < n <= m')
    require(shape[0] % m == 0, f'n:m={n}:{m}: {m} does not divide the {shape[0]} inputs of the matrix')
    best = jax.vmap(lambda scores_G: keep_largest([scores_G], n / m)[0], in_axes=1, out_axes=1)
    return m, lambda scores_GO, given_GO: best(scores_GO), jnp.ones(shape, bool)
  keep = jnp.asarray(keep)
  if keep.ndim:
    require(keep.shape == shape, f'a mask of shape {keep.shape} for a matrix of shape {shape}')
    return 1, lambda scores_BO, given_BO: given_BO, keep.astype(bool)
  return 1, lambda scores_BO, given_BO: keep_largest([scores_BO], 1 - keep)[0], jnp.ones(shape, bool)


def _prune_block(
  w_BO: jax.Array, mask_BO: jax.Array, u_BB: jax.Array, choose: Callable, group: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(w, mask, errors e) of a block; groups of its inputs are chosen from as it goes."""
  size, outputs = w_BO.shape
  u_B1 = jnp.diagonal(u_BB)[:, None]

  def of_input(j, carry):
    w_BO, e_BO, mask_BO = carry
    e_O = jnp.where(mask_BO[j], 0, w_BO[j]) / u_BB[j, j]
    return w_BO - u_BB[j][:, None] * e_O[None], e_BO.at[j].set(e_O), mask_BO

  def of_group(g, carry):
    w_BO, e_BO, mask_BO = carry
    at, shape = (g * group, 0), (group, outputs)
    score_GO = jnp.square(jax.lax.dynamic_slice(w_BO / u_B1, at, shape))
    mask_GO = choose(score_GO, jax.lax.dynamic_slice(mask_BO, at, shape))
    carry = w_BO, e_BO, jax.lax.dynamic_update_slice(mask_BO, mask_GO, at)
    return jax.lax.fori_loop(g * group, (g + 1) * group, of_input, carry)

  w_BO, e_BO, mask_BO = jax.lax.fori_loop(0, size // group, of_group, (w_BO, jnp.zeros_like(w_BO), mask_BO))
  return w_BO, mask_BO, e_BO


# ------------------------------------------------------------------------------------------------- with a given mask


def least_squares(w_IO: jax.Array, h_II: jax.Array, mask_IO: jax.Array) -> jax.Array:
  """The weights w' of least ||X (w' - w)||^2 that are 0 where the mask is False.

  For each output, with R what is kept and P what is pruned: w'_R = H_RR^-1 (H w)_R = w_R + H_RR^-1 H_RP w_P; the second
  form is the one computed. Rows and columns of H that are pruned are replaced by those of the identity: one solve of
  size I for each output, some at a time, O(O I^3) in all. H must be positive definite on R; `damped` makes it so.
  """
  w_IO, h_II = w_IO.astype(jnp.float32), h_II.astype(jnp.float32)
  missing_IO = _matmul(h_II, jnp.where(mask_IO, 0, w_IO))
  eye_II = jnp.eye(len(h_II))

  def of_output(one):
    mask_I, missing_I = one
    h_RR = jnp.where(mask_I[:, None] & mask_I[None], h_II, eye_II)
    return jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(h_RR), True), jnp.where(mask_I, missing_I, 0))

  change_OI = jax.lax.map(of_output, (mask_IO.T, missing_IO.T), batch_size=16)
  return jnp.where(mask_IO, w_IO + change_OI.T, 0)


def mean_shift(w_IO: jax.Array, mask_IO: jax.Array, mean_I: jax.Array) -> jax.Array:
  """bias_O = sum_j (1 - M_jo) w_jo mean_j: what the pruned weights gave on average (FLAP, arXiv 2312.11983)."""
  return _matmul(mean_I.astype(jnp.float32), jnp.where(mask_IO, 0, w_IO.astype(jnp.float32)))


def error(w_IO: jax.Array, new_IO: jax.Array, h_II: jax.Array) -> jax.Array:
  """||X (new - w)||^2 of each output [O], summed over the tokens of H."""
  d_IO = new_IO.astype(jnp.float32) - w_IO.astype(jnp.float32)
  return (d_IO * _matmul(h_II.astype(jnp.float32), d_IO)).sum(0)
