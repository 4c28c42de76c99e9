"""SparseGPT of a whole model, one layer after another, on calibration data (arXiv 2301.00774): runs on the host.

What a layer is given once the layers before it are pruned is not what the dense model gave it. So H = X^T X of each
matrix is taken of the model as it is when that matrix's turn comes: layer by layer, and in a layer q, k and v, then o,
then gate and up, then down. All that a matrix's inputs depend on is then in its final state.
"""

import functools
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slm_jax.config import require
from slm_jax.model.api import Batch, Feature, Model, Params
from slm_jax.prune import compensate
from slm_jax.prune.matrices import SITES, Into, Matrices, matrices, put

Budget = float | tuple[int, int] | Mapping[str, Any]


def sequential(
  model: Model, params: Params, batches: Iterable[Batch], keep: Budget, block: int = compensate.BLOCK
) -> tuple[Params, Matrices]:
  """(pruned parameters, masks [L,I,O] of the layers' matrices).

  batches: their inputs and segments; all of one shape, tokens of segments > 0 count. keep: a sparsity, or one for each
  matrix of each layer, [L] by name; or (n, m), n of every m inputs. block: see `compensate.sparsegpt`.

  The same programs serve all layers. Each of the 4 L steps runs all layers on all batches, and memory holds one
  kind of input of all layers for one batch, [L,B,T,I]: have batches small. Fewer tokens than a matrix has inputs is a
  warning: H is then singular, and damping decides what the data does not. ConfigError if there is no token, a sparsity
  is not in [0, 1), m does not divide the inputs, or activations are not finite.
  """
  data: list[Batch] = [{name: batch[name] for name in ('inputs', 'segments')} for batch in batches]
  own, layers = matrices(params), model.config.n_layers
  n_of_m = keep if isinstance(keep, tuple) else None
  sparsities = _sparsities(0.0 if isinstance(keep, tuple) else keep, own)
  groups: dict[Into, list[str]] = {}
  for name in own:
    groups.setdefault(SITES[name].into, []).append(name)
  _check_tokens(data, {into: own[names[0]].shape[1] for into, names in groups.items()})

  masks = {name: jnp.ones(w.shape, bool) for name, w in own.items()}
  visited = []
  for layer in range(layers):
    for into, names in groups.items():
      h_II = functools.reduce(jnp.add, [_gram(model, into, params, batch, layer) for batch in data])
      factor = _factor(h_II)
      _check_factor(factor, f'{into} of layer {layer + 1}')
      for name in names:
        own[name], masks[name] = _prune(n_of_m, block, own[name], masks[name], factor, layer, sparsities[name][layer])
        visited.append((name, layer))
      params = put(params, {name: own[name] for name in names})
  assert sorted(visited) == sorted((name, layer) for name in own for layer in range(layers)), 'a matrix was left out'
  return params, masks


@functools.partial(jax.jit, static_argnums=(0, 1))
def _gram(model: Model, into: Into, params: Params, batch: Batch, layer: jax.Array) -> jax.Array:
  """H_II = sum over tokens of x^T x, float32, of what goes into that layer's matrices. `layer` from 0, traced."""
  wanted = [Feature(into, i + 1) for i in range(model.config.n_layers)]
  features = model.features(params, batch, wanted)[1]
  x_BTI = jnp.stack([features[feature] for feature in wanted])[layer].astype(jnp.float32)
  x_NI = x_BTI.reshape(batch['segments'].size, -1)
  x_NI = jnp.where(batch['segments'].reshape(-1, 1) > 0, x_NI, 0)
  return jnp.matmul(x_NI.T, x_NI, precision='highest')


@functools.partial(jax.jit, static_argnums=(0, 1))
def _prune(
  n_of_m: tuple[int, int] | None,
  block: int,
  w_LIO: jax.Array,
  mask_LIO: jax.Array,
  factor: compensate.Factor,
  layer: jax.Array,
  sparsity: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """A matrix of that layer; the others stay."""
  new_IO, mask_IO = compensate.sparsegpt(w_LIO[layer], factor, n_of_m or sparsity, block)
  return w_LIO.at[layer].set(new_IO.astype(w_LIO.dtype)), mask_LIO.at[layer].set(mask_IO)


_factor = jax.jit(compensate.inverse_factor)


# ------------------------------------------------------------------------------------------ what is wrong or suspicious


def _sparsities(keep: float | Mapping[str, Any], own: Matrices) -> dict[str, np.ndarray]:
  """float32 [L] by name."""
  given = keep if isinstance(keep, Mapping) else dict.fromkeys(own, keep)
  require(given.keys() == own.keys(), f'sparsity of {", ".join(given)}: the matrices are {", ".join(own)}')
  out = {}
  for name, w in own.items():
    value = np.asarray(given[name], np.float32)
    require(value.shape in ((), w.shape[:1]), f'sparsity of {name}: shape {value.shape} for {w.shape[0]} layers')
    require(bool(((value >= 0) & (value < 1)).all()), f'sparsity of {name}={value}: must lie in [0, 1)')
    out[name] = np.broadcast_to(value, w.shape[:1])
  return out


def _check_tokens(batches: list[Batch], inputs: dict[Into, int]) -> None:
  tokens = sum(int((np.asarray(batch['segments']) > 0).sum()) for batch in batches)
  require(tokens > 0, 'calibration: no tokens (of segments > 0)')
  few = [f'{size} of {into}' for into, size in inputs.items() if tokens < size]
  if few:
    logging.warning(
      'calibration: %d tokens are fewer than the inputs (%s): H is singular, and damping decides what they do not',
      tokens,
      ', '.join(few),
    )


def _check_factor(factor: compensate.Factor, where: str) -> None:
  finite, damping = bool(jnp.isfinite(factor.u_II).all()), float(factor.damping)
  require(finite, f'{where}: not finite on the calibration data')
  if damping > 2 * compensate.DAMPING:
    logging.warning('%s: H took a damping of %.2g of its mean diagonal, not %g', where, damping, compensate.DAMPING)
