"""Surgery: a smaller model out of a larger one, by the indices that stay. Runs on the host.

    config, params = cut(config, params, Kept(channels=kept_LF, layers=[0, 2, 3]))

The result is what the model computes when all that goes is masked with zeros, exactly so with RMS norms (below). It is
described by its configuration alone.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from slm_jax.config import require
from slm_jax.model import decoder
from slm_jax.model.api import Params
from slm_jax.model.config import ModelConfig
from slm_jax.prune.spec import UNITS, size

Index = np.ndarray | Sequence[Any] | None

_AXES = {'layers': 1, 'channels': 2, 'groups': 2, 'queries': 3, 'width': 1, 'vocabulary': 1}  # of the index arrays


class Kept(NamedTuple):
  """What stays of each unit (spec.py), increasing, tokens in any order; None: all. L and G are of the old model."""

  layers: Index = None  # [l]
  channels: Index = None  # [L,f]
  groups: Index = None  # [L,g]
  queries: Index = None  # [L,G,r]: of each group, its query heads 0..R-1
  width: Index = None  # [d]
  vocabulary: Index = None  # [v]


def smaller(config: ModelConfig, kept: Kept) -> ModelConfig:
  """The configuration of what stays. ConfigError if an index does not fit, or if no configuration describes the rest.

  With RMS norms over D of which d channels stay, norm_eps becomes eps D / d; see `cut`.
  """
  check(config, kept)
  n = {unit: size(config, unit) if getattr(kept, unit) is None else np.shape(getattr(kept, unit))[-1] for unit in UNITS}
  rms = config.norm == 'rms' and kept.width is not None
  return dataclasses.replace(
    config,
    n_layers=n['layers'],
    d_ff=n['channels'],
    n_kv_heads=n['groups'],
    n_heads=n['groups'] * n['queries'],
    d_model=n['width'],
    vocab_size=n['vocabulary'],
    norm_eps=config.norm_eps * config.d_model / n['width'] if rms else config.norm_eps,
    qk_norm_eps=config.qk_norm_eps or config.norm_eps if rms and config.qk_norm else config.qk_norm_eps,
    unroll=min(config.unroll, n['layers']),
  )


def check(config: ModelConfig, kept: Kept) -> None:
  """ConfigError, one line, for indices that do not fit or leave nothing."""
  layers = (config.n_layers,)
  whole: dict[str, tuple[int, ...]] = {
    'channels': layers,
    'groups': layers,
    'queries': (config.n_layers, config.n_kv_heads),
  }
  for unit in UNITS:
    index = getattr(kept, unit)
    if index is None:
      continue
    found, total = np.asarray(index), size(config, unit)
    expected = ''.join(f'{n}, ' for n in whole.get(unit, ())) + f'1..{total}'
    fits = found.ndim == _AXES[unit] and found.shape[:-1] == whole.get(unit, ()) and 0 < found.shape[-1] <= total
    require(fits, f'kept.{unit}: indices of shape {found.shape}, expected ({expected})')
    ordered = (np.diff(np.sort(found) if unit == 'vocabulary' else found, axis=-1) > 0).all()
    how = 'differ' if unit == 'vocabulary' else 'increase'
    good = ordered and found.min() >= 0 and found.max() < total
    require(bool(good), f'kept.{unit}: indices must {how} and lie in 0..{total - 1}')
  require(
    kept.width is None or not config.mup_base_width,
    f'kept.width: cannot be cut with mup_base_width={config.mup_base_width}, whose scales depend on it; allowed: 0',
  )
  if config.window and kept.layers is not None:
    is_global = [(i + 1) % config.global_every == 0 for i in kept.layers]
    pattern = [(i + 1) % config.global_every == 0 for i in range(len(is_global))]
    require(
      is_global == pattern,
      f'kept.layers={list(kept.layers)}: after the cut, every layer that is global must again be a multiple of '
      f'global_every={config.global_every}',
    )


def cut(config: ModelConfig, params: Params, kept: Kept) -> tuple[ModelConfig, Params]:
  """(configuration, parameters) of what stays.

  An RMS norm over D channels, of which D - d are masked and so are 0, divides by sqrt(sum x^2 / D + eps); over the d
  that stay it is the same with eps D / d and gains times sqrt(D / d). With a layer norm there is no such exact way: the
  mean and the variance over fewer channels are others.
  """
  new = smaller(config, kept)
  out = cut_tree(config, params, kept)
  if config.norm == 'rms' and kept.width is not None:
    ratio, offset = math.sqrt(config.d_model / new.d_model), config.norm_offset

    def rescaled(path, axes, x):
      of_width = path[-1].key.endswith('norm') and axes.endswith('D')
      return ((offset + x) * ratio - offset).astype(x.dtype) if of_width else x

    out = jax.tree.map_with_path(rescaled, decoder.letters(config), out)
  return new, out


def cut_tree(config: ModelConfig, tree: Any, kept: Kept) -> Any:
  """What stays of arrays that are shaped like the parameters: moments of an optimiser, averages, masks."""
  check(config, kept)
  index = _by_letter(config, kept)
  return jax.tree.map(lambda axes, x: _taken(np.asarray(x), axes, index), decoder.letters(config), tree)


def cut_state(config: ModelConfig, state: Any, kept: Kept) -> Any:
  """An optimiser's state: whatever stands under the name of a parameter and has its shape is cut with it.

  ConfigError for what has another shape, such as Adafactor's factors: that optimiser is to be started anew.
  """
  check(config, kept)
  index = _by_letter(config, kept)
  table = jax.tree.leaves_with_path(decoder.letters(config))
  shapes = [s.shape for s in jax.tree.leaves(decoder.shapes(config))]
  known = {_keys(path): (axes, shape) for (path, axes), shape in zip(table, shapes, strict=True)}

  def of(path: Any, x: Any) -> Any:
    keys = _keys(path)
    own = next((known[keys[i:]] for i in range(len(keys)) if keys[i:] in known), None)
    if own is None or np.shape(x) in ((), (1,)):  # a count, or what stands in for nothing
      return x
    axes, shape = own
    name = '.'.join(map(str, keys))
    require(np.shape(x) == shape, f'{name}: has shape {np.shape(x)}, not {shape} of its parameter; start it anew')
    return _taken(np.asarray(x), axes, index)

  return jax.tree.map_with_path(of, state)


def _keys(path: Any) -> tuple[Any, ...]:
  return tuple(getattr(entry, 'key', getattr(entry, 'name', getattr(entry, 'idx', None))) for entry in path)


def _taken(x: np.ndarray, axes: str, index: dict[str, Index]) -> np.ndarray:
  for axis in reversed(range(len(axes))):  # layers come last: indices by layer are those of the old ones
    if (at := index.get(axes[axis])) is None:
      continue
    at = np.asarray(at)
    if at.ndim == 1:
      x = np.take(x, at, axis)
    else:
      x = np.take_along_axis(x, np.expand_dims(at, tuple(a for a in range(1, x.ndim) if a != axis)), axis)
  return x


def _by_letter(config: ModelConfig, kept: Kept) -> dict[str, Index]:
  return {
    'F': kept.channels,
    'G': kept.groups,
    'H': heads(config, kept),
    'D': kept.width,
    'V': kept.vocabulary,
    'L': kept.layers,
  }


def heads(config: ModelConfig, kept: Kept) -> np.ndarray | None:
  """[L, g r]: the query heads that stay; None: all."""
  if kept.groups is None and kept.queries is None:
    return None
  layers, groups, per_group = config.n_layers, config.n_kv_heads, config.n_heads // config.n_kv_heads
  own = np.broadcast_to(np.arange(groups), (layers, groups)) if kept.groups is None else np.asarray(kept.groups)
  queries = (
    np.broadcast_to(np.arange(per_group), (layers, groups, per_group))
    if kept.queries is None
    else np.asarray(kept.queries)
  )
  chosen = np.take_along_axis(queries, own[:, :, None], axis=1)
  return (own[:, :, None] * per_group + chosen).reshape(layers, -1)
