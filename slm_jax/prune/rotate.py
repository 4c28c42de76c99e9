"""SliceGPT's rotation: the residual stream of an RMS-norm model in the basis of its principal directions (2401.15024).

RMSNorm without gains commutes with a rotation: x Q / rms(x Q) = (x / rms(x)) Q. So gains are folded into the matrices
that read the norm's output, then all that writes to the residual stream is multiplied by Q and all that reads from it
by Q^T, and the model computes what it did before. Its stream then has the most important directions first, so that
the last channels are the ones to cut.

    config, params = rotate(config, params, gram(config, params, batches))

**One Q serves the whole stream**, so skip connections need nothing. SliceGPT itself has a Q_l before each attention and
each MLP block, from the PCA of that block's own inputs, and multiplies the skip by a matrix Q_l^T Q_{l+1} [D,D] each:
it cuts with less loss, but adds two matrices a layer and makes a model that no other tool can open.

Runs on the host in float64.
"""

import dataclasses
import logging
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slm_jax.config import require
from slm_jax.model.api import Batch, Feature, Params
from slm_jax.model.config import ModelConfig
from slm_jax.model.decoder import build, logical_axes, shapes
from slm_jax.prune.stats import distinct_tokens

_READERS = {'attn_norm': ('q', 'k', 'v'), 'mlp_norm': ('gate', 'up')}


def rotate(config: ModelConfig, params: Params, gram_DD: Any) -> tuple[ModelConfig, Params]:
  """The same model in the basis of `directions(gram_DD)`: (its config, its parameters as numpy arrays; dtypes stay).

  gram_DD: sum of x^T x over what is to survive a cut, for example of x / rms(x) after every layer, so that each counts
  the same (the stream grows with depth). Gains become 1; a tied embedding becomes an embedding and a head. ConfigError
  if the model has what does not commute with a rotation: LayerNorm, norms after blocks; or if gram is not [D,D].
  """
  shape = (config.d_model, config.d_model)
  require(np.shape(gram_DD) == shape, f'rotate: a gram of shape {np.shape(gram_DD)}; of this model it is {shape}')
  dtypes = jax.tree.map(lambda p: p.dtype, {'head': params['embed']['tokens'], **params})
  config, params = fold(config, params)
  q_DD = directions(gram_DD)

  def turn(path, axes, w, dtype):
    """Sum over d of w[..., d, ...] Q[d, e]: x Q for what writes to the stream, Q^T w for what reads from it."""
    if 'embed' in axes and not path[-1].key.endswith('norm'):
      axis = axes.index('embed')
      w = np.moveaxis(np.tensordot(w, q_DD, ([axis], [0])), -1, axis)
    return np.ascontiguousarray(w.astype(dtype))

  return config, jax.tree_util.tree_map_with_path(
    turn, logical_axes(config), params, dtypes, is_leaf=lambda node: type(node) is tuple
  )


def gram(config: ModelConfig, params: Params, batches: Iterable[Batch]) -> np.ndarray:
  """[D,D], float64: sum of x^T x over the tokens of all batches and over all norms, x = what a norm puts out, no gains.

  So each place where the stream is read counts the same, however long the stream is there. Reads inputs and segments.
  Fewer tokens than channels are a warning: directions that they do not span are in no order. ConfigError without any.
  """
  batches = list(batches)
  tokens = distinct_tokens(batches)
  require(tokens > 0, 'calibration: no tokens (of segments > 0)')
  if tokens < config.d_model:
    logging.warning(
      'calibration: %d distinct tokens are fewer than the %d channels of the residual stream: they do not span it',
      tokens,
      config.d_model,
    )
  config, whole = fold(config, params)
  model = build(config)
  folded = jax.tree.map(lambda p, s: jnp.asarray(p, s.dtype), whole, shapes(config))
  wanted = [Feature(kind, i + 1) for kind in ('into_qkv', 'into_mlp') for i in range(config.n_layers)]

  @jax.jit
  def of(params: Params, batch: Batch) -> jax.Array:
    hidden_BTD, features = model.features(params, batch, wanted)
    real_BT = batch['segments'] > 0
    total = jnp.zeros((config.d_model, config.d_model), jnp.float32)
    for x_BTD in (hidden_BTD, *features.values()):
      x_BTD = jnp.where(real_BT[..., None], x_BTD.astype(jnp.float32), 0)
      total += jnp.einsum('btd,bte->de', x_BTD, x_BTD, precision='highest')
    return total

  each = [np.asarray(of(folded, {n: one[n] for n in ('inputs', 'segments')}), np.float64) for one in batches]
  return np.sum(each, axis=0)


def check(config: ModelConfig, key: str, cut: bool = True) -> None:
  """ConfigError for a model that cannot be rotated; cut: that cannot be what is left of a rotated one."""
  needs: list[tuple[str, object, str]] = [
    ('norm', 'rms', 'other norms do not commute with a rotation'),
    ('post_norms', False, 'gains after a block cannot be folded into a matrix'),
  ]
  if cut:
    needs.append(('tied', False, "the last norm's gains go into the head, which then is not the embeddings"))
  for name, value, why in needs:
    found, allowed = (str(x).lower() for x in (getattr(config, name), value))
    require(found == allowed, f'{key}: model.{name}={found}: {why}; allowed: {allowed}')


def fold(config: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
  """The same model, untied, with the gains of its norms 1 and in the matrices that follow: (config, float64 numpy)."""
  check(config, 'rotate', cut=False)
  params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
  layers, offset = dict(params['layers']), config.norm_offset
  for norm, readers in _READERS.items():
    gain_LD = offset + layers[norm]
    layers[norm] = np.full_like(gain_LD, 1 - offset)
    for name in readers:
      if name in layers:
        layers[name] = layers[name] * gain_LD.reshape(*gain_LD.shape, *[1] * (layers[name].ndim - 2))
  head_DV = params['embed']['tokens'].T if config.tied else params['head']
  final_D = offset + params['final_norm']
  return dataclasses.replace(config, tied=False), {
    **params,
    'layers': layers,
    'final_norm': np.full_like(final_D, 1 - offset),
    'head': head_DV * final_D[:, None],
  }


def directions(gram_DD: Any) -> np.ndarray:
  """Q_DD, float64: the orthonormal eigenvectors of a gram matrix as columns, that of the largest eigenvalue first."""
  gram_DD = np.asarray(gram_DD, np.float64)
  return np.linalg.eigh((gram_DD + gram_DD.T) / 2)[1][:, ::-1]
