"""Criteria: what each weight, channel, head or layer is worth. Small scores go first.

Of weights: `Matrices` [L,I,O] to `Matrices`; of channels: [L,I]; of heads: [L,H]; of layers: [L]. All float32 and of
whole stacks; a layer's scores depend on that layer alone. Inputs that are never active, and weights of a matrix that
is 0, score 0, and nothing is divided by 0. Legend: matrices.py. In the formulas W is [out, in], as in the papers.
"""

import zlib

import jax
import jax.numpy as jnp

from slm_jax.prune.matrices import SITES, Matrices
from slm_jax.prune.stats import Stats


def random(w: Matrices, key: jax.Array) -> Matrices:
  """Uniform in [0, 1): the baseline. A matrix's numbers depend on its name and not on which others there are."""
  return {
    name: jax.random.uniform(jax.random.fold_in(key, zlib.crc32(name.encode())), x.shape) for name, x in w.items()
  }


def magnitude(w: Matrices) -> Matrices:
  """|w|."""
  return {name: jnp.abs(_f32(w_LIO)) for name, w_LIO in w.items()}


def predicted(w: Matrices, g: Matrices, h: Matrices | None = None) -> Matrices:
  """The change of the loss if the weight alone is deleted: -g w, with h: -g w + h w^2 / 2; nats a token. Signed.

  g: gradient of the mean loss, h: diagonal of its Hessian (fisher.py has both).
  """
  first = {name: -_f32(g[name]) * _f32(w_LIO) for name, w_LIO in w.items()}
  if h is None:
    return first
  second = obd(w, h)
  return {name: first[name] + second[name] for name in w}


def first_order(w: Matrices, g: Matrices) -> Matrices:
  """|g w|: Taylor. Best at ranking single weights, worst at choosing many (their changes cancel)."""
  return {name: jnp.abs(x) for name, x in predicted(w, g).items()}


def obd(w: Matrices, h: Matrices) -> Matrices:
  """h w^2 / 2, nats a token: Optimal Brain Damage (LeCun 1989), at a minimum and with a diagonal Hessian h."""
  return {name: 0.5 * _f32(h[name]) * _f32(w_LIO) ** 2 for name, w_LIO in w.items()}


def wanda(w: Matrices, stats: Stats) -> Matrices:
  """|W_ij| ||X_j||_2 (arXiv 2306.11695): the error of the output's i-th column over the tokens if W_ij is deleted.

  To be compared among the inputs of one output. Of which model the activations are, the statistics say: of the dense
  one, or, layer by layer, of the one that is pruned up to there (`OneShot.activations`).
  """
  return {name: jnp.abs(_f32(w_LIO)) * _norms(stats, name)[..., None] for name, w_LIO in w.items()}


def ria(w: Matrices, stats: Stats, a: float = 0.5) -> Matrices:
  """(|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) ||X_j||^a: relative importance and activations.

  Zhang et al., Plug-and-Play, ICLR 2024. To be compared among the inputs of one output.
  """

  def of(name, w_LIO):
    size_LIO = jnp.abs(_f32(w_LIO))
    share_LIO = _over(size_LIO, size_LIO.sum(1, keepdims=True)) + _over(size_LIO, size_LIO.sum(2, keepdims=True))
    return share_LIO * (_norms(stats, name) ** a)[..., None]

  return {name: of(name, w_LIO) for name, w_LIO in w.items()}


def flap(w: Matrices, stats: Stats) -> dict[str, jax.Array]:
  """Var_t(X_j) ||W_:j||^2 of each input of each matrix, as z-scores of its layer (arXiv 2312.11983). [L,I] by name.

  What its output varies by if input j is frozen at its mean. Of 'o' and 'down' they are the worth of heads' channels
  and of the MLP's; z-scores make layers and the two kinds comparable by one threshold.
  """

  def of(name, w_LIO):
    s_LI = stats.moments[SITES[name].into].variance * (_f32(w_LIO) ** 2).sum(2)
    apart_LI = s_LI - s_LI.mean(1, keepdims=True)
    return _over(apart_LI, s_LI.std(1, keepdims=True))

  return {name: of(name, w_LIO) for name, w_LIO in w.items()}


def minitron(stats: Stats) -> dict[str, jax.Array]:
  """Computes sqrt(sum over sequences of (mean_t s_t)^2), [L,n] by kind: (batch=L2, seq=mean) of arXiv 2407.14679.

  into_down: s is the size of a channel of the MLP. heads, groups: s is the L2 norm of a head's output, or of all the
  outputs of a group of heads. into_qkv, into_mlp: s is the size of a channel of the residual stream, after a norm.
  """
  return {kind: jnp.sqrt(s_Ln) for kind, s_Ln in stats.strength.items()}


def block_influence(stats: Stats) -> jax.Array:
  """1 - E_t cos(x_i, x_{i+1}) of each layer, [L] in [0, 2] (ShortGPT, arXiv 2403.03853)."""
  return stats.influence / jnp.maximum(stats.tokens, 1)


def block_distance(stats: Stats, n: int) -> jax.Array:
  """E_t arccos(cos(x_i, x_{i+n})) / pi of each block of n layers, by its first one: [L - n + 1] in [0, 1].

  arXiv 2403.17887; there of the last token of each sequence, here of all.
  """
  return jnp.diagonal(stats.angle, n) / jnp.maximum(stats.tokens, 1)


def _f32(x: jax.Array) -> jax.Array:
  return x.astype(jnp.float32)


def _norms(stats: Stats, name: str) -> jax.Array:
  """||X_j||_2 of the inputs of this matrix, [L,I]."""
  return jnp.sqrt(stats.moments[SITES[name].into].squares)


def _over(a: jax.Array, b: jax.Array) -> jax.Array:
  """a / b, and 0 where b is."""
  return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)
