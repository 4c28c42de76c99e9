"""Pruning of a whole model with compensation, one layer after another, on calibration data: runs on the host.

    params, masks = sequential(model, params, batches, 0.5)          # SparseGPT (arXiv 2301.00774)
    params = compensated(model, params, masks, batches, 'least_squares')   # masks of any criterion

What a layer is given once the layers before it are pruned is not what the dense model gave it. So the statistics of
each matrix's inputs are taken of the model as it is when that matrix's turn comes: layer by layer, and in a layer q, k
and v, then o, then gate and up, then down. All that a matrix's inputs depend on is then in its final state.
"""

import functools
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from slm_jax.config import require
from slm_jax.model.api import Batch, Feature, Model, Params
from slm_jax.prune import compensate
from slm_jax.prune.matrices import SITES, Into, Matrices, matrices, put
from slm_jax.prune.stats import distinct_tokens

Budget = float | tuple[int, int] | Mapping[str, Any]
How = Literal['least_squares', 'mean_shift']


class Inputs(NamedTuple):
  """Sums over tokens of what goes into a matrix, float32; those of disjoint batches add up."""

  tokens: jax.Array
  sum_I: jax.Array
  h_II: jax.Array  # x^T x


def sequential(
  model: Model, params: Params, batches: Iterable[Batch], keep: Budget, block: int = compensate.BLOCK
) -> tuple[Params, Matrices]:
  """SparseGPT: (pruned parameters, masks [L,I,O] of the layers' matrices).

  batches: their inputs and segments; all of one shape, tokens of segments > 0 count. keep: a sparsity, or one for each
  matrix of each layer, [L] by name; or (n, m), n of every m inputs. block: see `compensate.sparsegpt`.

  The same programs serve all layers. Each of the 4 L steps runs all layers on all batches, and memory holds one
  kind of input of all layers for one batch, [L,B,T,I]: have batches small. Fewer tokens than a matrix has inputs is a
  warning: H is then singular, and damping decides what the data does not. ConfigError if there is no token, a sparsity
  is not in [0, 1), m does not divide the inputs, or activations are not finite.
  """
  own = matrices(params)
  n_of_m = keep if isinstance(keep, tuple) else None
  sparsities = _sparsities(0.0 if isinstance(keep, tuple) else keep, own)
  masks = {name: jnp.ones(w.shape, bool) for name, w in own.items()}

  def prune(params: Params, names: list[str], layer: int, given: Inputs) -> Params:
    factor, w = _checked_factor(given, f'{names[0]} of layer {layer + 1}'), matrices(params)
    for name in names:
      w[name], masks[name] = _prune(n_of_m, block, w[name], masks[name], factor, layer, sparsities[name][layer])
    return put(params, {name: w[name] for name in names})

  return _in_turn(model, params, batches, prune), masks


def compensated(model: Model, params: Params, masks: Matrices, batches: Iterable[Batch], how: How) -> Params:
  """The parameters with zeros where the masks [L,I,O] are False, and what makes up for them.

  least_squares: the weights that stay are those which keep the matrix's outputs best, X being what the pruned model
    gives it: `compensate.least_squares` with H damped as SparseGPT's. O solves of size I a matrix: O(O I^3).
  mean_shift: the weights that stay are as they were, and the bias takes up what those that went gave on average
    (FLAP, arXiv 2312.11983): `compensate.mean_shift`. ConfigError if the model has no biases.

  Batches, cost, memory, warning and errors are as in `sequential`.
  """
  if how == 'mean_shift':
    require_bias(model.config.bias, 'compensate')

  def refit(params: Params, names: list[str], layer: int, given: Inputs) -> Params:
    damping = _checked_factor(given, f'{names[0]} of layer {layer + 1}').damping
    w = matrices(params)
    return put(params, {name: _refit(w[name], masks[name], given.h_II, damping, layer) for name in names})

  def shift(params: Params, names: list[str], layer: int, given: Inputs) -> Params:
    mean_I, layers = given.sum_I / given.tokens, dict(params['layers'])
    w = matrices(params)
    for name in names:
      lost_O = compensate.mean_shift(w[name][layer], masks[name][layer], mean_I)
      bias = layers[f'{name}_bias']
      layers[f'{name}_bias'] = bias.at[layer].add(lost_O.reshape(bias.shape[1:]).astype(bias.dtype))
    masked = {name: w[name].at[layer].multiply(masks[name][layer]) for name in names}
    return put({**params, 'layers': layers}, masked)

  return _in_turn(model, params, batches, refit if how == 'least_squares' else shift, singular=how == 'mean_shift')


def require_bias(bias: bool, key: str) -> None:
  """ConfigError for a model without biases, which a mean cannot be put into."""
  require(bias, f'{key}=mean_shift: needs biases, and model.bias=false; allowed: none, least_squares')


def _in_turn(
  model: Model,
  params: Params,
  batches: Iterable[Batch],
  change: Callable[[Params, list[str], int, Inputs], Params],
  singular: bool = False,
) -> Params:
  """The parameters after `change` of each layer's matrices, those with one input at once; none is left out.

  singular: whether it does no harm if H is.
  """
  data: list[Batch] = [{name: batch[name] for name in ('inputs', 'segments')} for batch in batches]
  params = jax.tree.map(jnp.asarray, params)  # those of a cut are numpy's
  own, layers = matrices(params), model.config.n_layers
  groups: dict[Into, list[str]] = {}
  for name in own:
    groups.setdefault(SITES[name].into, []).append(name)
  _check_tokens(data, {} if singular else {into: own[names[0]].shape[1] for into, names in groups.items()})
  visited = []
  for layer in range(layers):
    for into, names in groups.items():
      each = [_inputs(model, into, params, batch, layer) for batch in data]
      given = functools.reduce(_add, each)
      require(bool(jnp.isfinite(given.h_II).all()), f'{into} of layer {layer + 1}: not finite on the calibration data')
      params = change(params, names, layer, given)
      visited += [(name, layer) for name in names]
  assert sorted(visited) == sorted((name, layer) for name in own for layer in range(layers)), 'a matrix was left out'
  return params


@functools.partial(jax.jit, static_argnums=(0, 1))
def _inputs(model: Model, into: Into, params: Params, batch: Batch, layer: jax.Array) -> Inputs:
  """Of what goes into that layer's matrices. `layer` from 0, traced."""
  wanted = [Feature(into, i + 1) for i in range(model.config.n_layers)]
  features = model.features(params, batch, wanted)[1]
  x_BTI = jnp.stack([features[feature] for feature in wanted])[layer].astype(jnp.float32)
  x_NI = x_BTI.reshape(batch['segments'].size, -1)
  real_N1 = batch['segments'].reshape(-1, 1) > 0
  x_NI = jnp.where(real_N1, x_NI, 0)
  return Inputs(real_N1.sum(dtype=jnp.float32), x_NI.sum(0), jnp.matmul(x_NI.T, x_NI, precision='highest'))


def _add(a: Inputs, b: Inputs) -> Inputs:
  return jax.tree.map(jnp.add, a, b)


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


@jax.jit
def _refit(w_LIO: jax.Array, mask_LIO: jax.Array, h_II: jax.Array, damping: jax.Array, layer: jax.Array) -> jax.Array:
  new_IO = compensate.least_squares(w_LIO[layer], compensate.damped(h_II, damping), mask_LIO[layer])
  return w_LIO.at[layer].set(new_IO.astype(w_LIO.dtype))


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
  tokens = distinct_tokens(batches)
  require(tokens > 0, 'calibration: no tokens (of segments > 0)')
  few = [f'{size} of {into}' for into, size in inputs.items() if tokens < size]
  if few:
    logging.warning(
      'calibration: %d distinct tokens are fewer than the inputs (%s): H is singular, and damping decides what they '
      'do not',
      tokens,
      ', '.join(few),
    )


def _checked_factor(given: Inputs, where: str) -> compensate.Factor:
  factor = _factor(given.h_II)
  if float(factor.damping) > 2 * compensate.DAMPING:
    logging.warning(
      '%s: H took a damping of %.2g of its mean diagonal, not %g', where, factor.damping, compensate.DAMPING
    )
  return factor
