"""Cutting a trained model down to a smaller one: fewer layers, narrower feed-forward blocks. Runs on the host.

Data-free first version of structured pruning: layers by position, channels by magnitude.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from slm_jax.config import require
from slm_jax.model.api import Params
from slm_jax.model.config import ModelConfig

_FREE = ('n_layers', 'd_ff', 'max_len', 'dtype', 'remat', 'unroll', 'init_std')  # may differ between the two models
_CHANNEL_AXIS = {'gate': 2, 'up': 2, 'down': 1, 'gate_bias': 1, 'up_bias': 1}  # of arrays stacked over layers


def cut(params: Params, source: ModelConfig, target: ModelConfig) -> Params:
  """Parameters of `source`, cut to the shape of `target`.

  Layers: floor(i * L_source / L_target), so half of them means every other one. Channels: in each layer the d_ff
  strongest, by |gate_f| |up_f| |down_f| (L2 norms over the model width), which does not change when a channel's input
  is scaled up and its output down. Raises ConfigError if the models differ in anything else, or the target is larger.
  """
  changed = [
    f.name
    for f in dataclasses.fields(ModelConfig)
    if f.name not in _FREE and getattr(source, f.name) != getattr(target, f.name)
  ]
  require(not changed, f'init.arm: its model differs in {", ".join(changed)}; only n_layers and d_ff can be cut')
  for name in ('n_layers', 'd_ff', 'max_len'):
    require(
      getattr(target, name) <= getattr(source, name) or (name == 'max_len' and target.positions == 'rope'),
      f'model.{name}={getattr(target, name)}: larger than {getattr(source, name)} of the arm it is cut from',
    )
  layers = keep_layers({k: np.asarray(v) for k, v in params['layers'].items()}, target.n_layers)
  if target.d_ff < source.d_ff:
    layers = keep_channels(layers, target.d_ff)
  embed = {k: v[: target.max_len] if k == 'positions' else v for k, v in params['embed'].items()}
  return {**params, 'embed': embed, 'layers': {k: jnp.asarray(v) for k, v in layers.items()}}


def keep_layers(layers: dict[str, np.ndarray], n: int) -> dict[str, np.ndarray]:
  """n of the stacked layers, evenly spaced from the first."""
  total = len(next(iter(layers.values())))
  kept = [i * total // n for i in range(n)]
  return {name: x[kept] for name, x in layers.items()}


def keep_channels(layers: dict[str, np.ndarray], n: int) -> dict[str, np.ndarray]:
  """The n strongest feed-forward channels of each layer, in their old order."""
  strength = 1.0
  for name in ('gate', 'up', 'down'):
    if name in layers:
      width_axis = 3 - _CHANNEL_AXIS[name]
      strength = strength * np.sqrt((layers[name].astype(np.float64) ** 2).sum(axis=width_axis))  # [L, F]
  kept_LF = np.sort(np.argsort(-strength, axis=1, kind='stable')[:, :n], axis=1)
  out = dict(layers)
  for name, axis in _CHANNEL_AXIS.items():
    if name in layers:
      index = np.expand_dims(kept_LF, tuple(a for a in range(1, layers[name].ndim) if a != axis))
      out[name] = np.take_along_axis(layers[name], index, axis=axis)
  return out
