"""Which layers, channels, heads stay: scores of a model's units, and the best of them for a smaller shape.

    params = fit(params, source, target, by_magnitude(source, params))

Scores come without data (`by_magnitude`, `at_random`) or from statistics of calibration text (`by_activations`).
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from slm_jax.config import require
from slm_jax.model import decoder
from slm_jax.model.api import Model, Params
from slm_jax.model.config import ModelConfig
from slm_jax.prune import criteria
from slm_jax.prune.cut import Kept, cut
from slm_jax.prune.spec import Unit, size
from slm_jax.prune.stats import Stats, collect_all

By = Literal['magnitude', 'activations', 'random']

# What may differ between a model and one that is cut from it, beside the sizes of units.
_FREE = ('n_layers', 'd_ff', 'n_heads', 'n_kv_heads', 'd_model', 'max_len', 'dtype', 'remat', 'unroll', 'init_std')
_EPSILONS = ('norm_eps', 'qk_norm_eps')  # which a cut of the width scales


class Scores(NamedTuple):
  """The larger, the rather it stays."""

  channels: np.ndarray  # [L,F]
  groups: np.ndarray  # [L,G]
  queries: np.ndarray  # [L,G,R]
  width: np.ndarray  # [D]
  layers: np.ndarray | None = None  # [L]; None: those that stay are spread evenly, from the first


def by_magnitude(config: ModelConfig, params: Params) -> Scores:
  """Products of the L2 norms of a unit's parts, which do not change when one is scaled up and the other down.

      channels |gate| |up| |down|     groups |q| |k| |v| |o|     queries |q| |o|

  width: the L2 norm of all matrices' rows and columns of that channel together, embeddings included.
  """
  layers = {name: np.asarray(x, np.float64) for name, x in params['layers'].items()}
  table = decoder.letters(config)

  def norms(name: str, letter: str) -> np.ndarray:
    """[L,n], over all axes but those of the layers and the letter's."""
    axes = table['layers'][name]
    return np.sqrt((layers[name] ** 2).sum(tuple(i for i, a in enumerate(axes) if a not in ('L', letter))))

  groups = config.n_kv_heads
  heads = (norms('q', 'H') * norms('o', 'H')).reshape(config.n_layers, groups, -1)
  of_groups = [np.sqrt((norms(name, 'H').reshape(*heads.shape) ** 2).sum(-1)) for name in ('q', 'o')]
  of_width = 0.0
  for (path, axes), x in zip(jax.tree.leaves_with_path(table), jax.tree.leaves(params), strict=True):
    if 'D' in axes and len(axes.replace('L', '')) > 1 and path[-1].key != 'positions':
      other = tuple(i for i, a in enumerate(axes) if a != 'D')
      of_width = of_width + (np.asarray(x, np.float64) ** 2).sum(other)
  return Scores(
    channels=np.prod([norms(name, 'F') for name in ('gate', 'up', 'down') if name in layers], axis=0),
    groups=of_groups[0] * of_groups[1] * norms('k', 'G') * norms('v', 'G'),
    queries=heads,
    width=np.sqrt(of_width),
  )


def at_random(config: ModelConfig, seed: int) -> Scores:
  """The control of all others. Layers are spread evenly."""
  rng, c = np.random.default_rng(seed), config
  shape = (c.n_layers, c.n_kv_heads, c.n_heads // c.n_kv_heads)
  return Scores(rng.random((c.n_layers, c.d_ff)), rng.random(shape[:2]), rng.random(shape), rng.random(c.d_model))


def by_activations(config: ModelConfig, stats: Stats) -> Scores:
  """Minitron (arXiv 2407.14679): how large a unit's activations are; see criteria.minitron.

  channels: at the input of down. queries, groups: the L2 norm over the dimensions of the input of o. width: at the
  outputs of both norms, over all layers. layers: block influence.
  """
  of: dict[str, Any] = {into: np.asarray(x, np.float64) for into, x in criteria.minitron(stats).items()}
  queries = np.asarray(criteria.heads(of['into_o'], config.n_heads)).reshape(config.n_layers, config.n_kv_heads, -1)
  return Scores(
    channels=of['into_down'],
    groups=np.asarray(criteria.heads(of['into_o'], config.n_kv_heads)),
    queries=queries,
    width=np.sqrt((of['into_qkv'] ** 2 + of['into_mlp'] ** 2).sum(0)),
    layers=np.asarray(criteria.block_influence(stats)),
  )


def scored(by: By, model: Model, params: Params, batches: Iterable[Any], seed: int) -> Scores:
  """By one of the three; batches are read for activations only, the seed counts for what is random only."""
  if by == 'activations':
    return by_activations(model.config, collect_all(model, params, batches))
  return by_magnitude(model.config, params) if by == 'magnitude' else at_random(model.config, seed)


def choose(source: ModelConfig, target: ModelConfig, scores: Scores, layers: Sequence[int] = ()) -> Kept:
  """The units with the highest scores, as many as the target has; of equal ones the first. layers: those that stay.

  ConfigError if the models differ in anything else, or if the target is larger.
  """
  for name in ('n_layers', 'd_ff', 'n_heads', 'n_kv_heads', 'd_model', 'max_len'):
    require(
      getattr(target, name) <= getattr(source, name) or (name == 'max_len' and target.positions == 'rope'),
      f'model.{name}={getattr(target, name)}: larger than {getattr(source, name)} of the arm it is cut from',
    )
  free = _FREE if target.d_model == source.d_model else _FREE + _EPSILONS
  names = [f.name for f in dataclasses.fields(ModelConfig) if f.name not in free]
  changed = [name for name in names if getattr(source, name) != getattr(target, name)]
  require(
    not changed,
    f'init.arm: its model differs in {", ".join(changed)}; only layers, widths and heads can be cut',
  )
  per_group = size(target, 'queries')
  require(
    per_group <= size(source, 'queries'),
    f'model.n_heads={target.n_heads}: {per_group} for each of {target.n_kv_heads} key/value heads, but the arm it is '
    f'cut from has {size(source, "queries")}',
  )
  even = np.zeros(source.n_layers)
  even[[i * source.n_layers // target.n_layers for i in range(target.n_layers)]] = 1
  by_unit: dict[Unit, np.ndarray] = {
    'layers': even if scores.layers is None else scores.layers,
    'channels': scores.channels,
    'groups': scores.groups,
    'queries': scores.queries,
    'width': scores.width,
  }
  kept = {unit: best(x, size(target, unit)) for unit, x in by_unit.items() if size(target, unit) < size(source, unit)}
  if layers:
    n = target.n_layers
    require(len(layers) == n, f'init.layers={tuple(layers)}: model.n_layers={n} of them are needed')
    kept['layers'] = np.array(layers)
  return Kept(**kept)


def of_tokens(config: ModelConfig, params: Params, kept: np.ndarray, vocab_size: int) -> tuple[ModelConfig, Params]:
  """The model of these tokens, by their ids; beyond them are rows of some that are gone, which stand for nothing."""
  gone = np.setdiff1d(np.arange(config.vocab_size), kept)
  n = vocab_size - len(kept)
  require(
    0 <= n <= len(gone),
    f'model.vocab_size={vocab_size}: allowed: {len(kept)}..{config.vocab_size}, of the tokenizer and of the arm it is '
    f'cut from',
  )
  return cut(config, params, Kept(vocabulary=np.concatenate([kept, gone[:n]])))


def best(scores: np.ndarray, n: int) -> np.ndarray:
  """Indices of the n largest along the last axis, increasing."""
  return np.sort(np.argsort(-scores, axis=-1, kind='stable')[..., :n], axis=-1)


def fit(params: Params, source: ModelConfig, target: ModelConfig, scores: Scores, layers: Sequence[int] = ()) -> Params:
  """Parameters of `source`, cut to the shape of `target`; see `choose`."""
  _, params = cut(source, params, choose(source, target, scores, layers))
  if 'positions' in params['embed']:
    params = {**params, 'embed': {**params['embed'], 'positions': params['embed']['positions'][: target.max_len]}}
  return params
