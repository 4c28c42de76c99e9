"""Which layers, channels, heads stay: scores of a model's units, and the best of them for a smaller shape.

    source, params, scores = ranked('activations', model, params, batches, seed)
    params = fit(params, source, target, scores)

Scores come without data (`by_magnitude`, `by_gates`, `at_random`) or from statistics of calibration text
(`by_activations`, `by_fluctuation`); `ranked` also knows the width's principal directions, for which the model is
rotated first.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from slm_jax.config import require
from slm_jax.model import decoder
from slm_jax.model.api import Model, Params
from slm_jax.model.config import ModelConfig
from slm_jax.prune import compensate, criteria, rotate
from slm_jax.prune.cut import Kept, cut, heads
from slm_jax.prune.l0 import exits
from slm_jax.prune.matrices import matrices
from slm_jax.prune.spec import Unit, size
from slm_jax.prune.stats import Stats, collect_all

By = Literal['magnitude', 'activations', 'flap', 'principal', 'gates', 'random']

# What may differ between a model and one that is cut from it, beside the sizes of units.
_FREE = ('n_layers', 'd_ff', 'n_heads', 'n_kv_heads', 'd_model', 'max_len', 'dtype', 'remat', 'unroll', 'init_std')
_EPSILONS = ('norm_eps', 'qk_norm_eps')  # which a cut of the width scales


class Scores(NamedTuple):
  """The larger, the rather it stays."""

  channels: np.ndarray  # [L,F]
  groups: np.ndarray  # [L,G]
  queries: np.ndarray  # [L,G,R]
  width: np.ndarray | None  # [D]; None: it cannot be cut
  layers: np.ndarray | None = None  # [L]; None: those that stay are spread evenly, from the first
  exact: bool = False  # 1 for what stays and 0 for what goes: a smaller shape is to have as many
  means: dict[str, Any] | None = None  # [L,I] of inputs of 'o' and 'down', for the biases to take up; None: they do not


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
  of_width = np.zeros(config.d_model)
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
  """Scores units by the size of their activations (Minitron, arXiv 2407.14679); see criteria.minitron.

  channels: at the input of down. queries, groups: by the L2 norm of their part of the input of o at each token. width:
  at the outputs of both norms, summed over all layers. layers: block influence.
  """
  of: dict[str, Any] = {kind: np.asarray(x, np.float64) for kind, x in criteria.minitron(stats).items()}
  return Scores(
    channels=of['into_down'],
    groups=of['groups'],
    queries=of['heads'].reshape(config.n_layers, config.n_kv_heads, -1),
    width=(of['into_qkv'] + of['into_mlp']).sum(0),
    layers=np.asarray(criteria.block_influence(stats)),
  )


def by_fluctuation(config: ModelConfig, params: Params, stats: Stats) -> Scores:
  """FLAP (arXiv 2312.11983): what the output varies by if a unit's inputs of down or o are frozen at their means.

  channels: Var_t(X_j) ||W_:j||^2 at the input of down, W all that reads it. queries, groups: the mean of that over the
  inputs of o that are theirs. Both as z-scores of their layer, which do not matter here: they make layers comparable,
  for a budget that is shared out among them (the paper's), and here each layer keeps as many. layers: spread evenly.
  Width: FLAP says nothing of it. ConfigError if it is to be cut.

  What the units that go gave on average moves to the biases of o and down (`fit`), W (1 - M) mean(X), where the model
  has biases. **Without biases (model.bias=false) this is left out**: the paper adds biases to a Llama then; here the
  cut model would no longer be of the family that it was cut from, so the shift of the mean remains as an error.
  """
  of = {name: np.asarray(s, np.float64) for name, s in criteria.flap(matrices(params), stats).items()}
  shape = (config.n_layers, config.n_kv_heads)
  return Scores(
    channels=of['down'],
    groups=of['o'].reshape(*shape, -1).mean(-1),
    queries=of['o'].reshape(*shape, size(config, 'queries'), -1).mean(-1),
    width=None,
    means={name: stats.moments[into].mean for name, into in (('o', 'into_o'), ('down', 'into_down'))},  # type: ignore[index]
  )


def by_gates(config: ModelConfig, params: Params) -> Scores:
  """What the gates of l0.py left open in a finished model: 1, and 0 where nothing is added to the residual stream.

  All of any other model is open. `choose` wants a shape with exactly as many of each unit.
  """
  layers = {name: np.asarray(x) != 0 for name, x in params['layers'].items()}
  out = exits(config)[0]
  if out.endswith('norm'):
    layers[out] = np.asarray(params['layers'][out]) + config.norm_offset != 0
  shape = (config.n_layers, config.n_kv_heads)
  heads_LH = layers['o'].any((2, 3))
  return Scores(
    channels=layers['down'].any(2),
    groups=heads_LH.reshape(*shape, -1).any(2),
    queries=heads_LH.reshape(*shape, -1),
    width=(np.asarray(params['embed']['tokens']) != 0).any(0),
    layers=layers[out].any(tuple(range(1, layers[out].ndim))),
    exact=True,
  )


def check_gates(source: ModelConfig, target: ModelConfig, scores: Scores) -> None:
  """ConfigError for a shape that is not the one which was learnt. Of closed layers, other units do not matter."""
  assert scores.layers is not None
  alive = np.asarray(scores.layers, bool)
  found = {
    'layers': {int(alive.sum())},
    'width': {int(np.asarray(scores.width).sum())},
    'channels': set(scores.channels[alive].sum(-1).tolist()),
    'groups': set(scores.groups[alive].sum(-1).tolist()),
  }
  for unit, counts in found.items():
    wanted = size(target, unit)  # type: ignore[arg-type]
    shown = ' or '.join(map(str, sorted(counts)))
    require(
      counts == {wanted},
      f'init.by=gates: {shown} of {size(source, unit)} {unit} are open in the arm it is cut from, '  # type: ignore[arg-type]
      f'and {wanted} are to stay; allowed: {shown}',
    )


def ranked(
  by: By, model: Model, params: Params, batches: Iterable[Any], seed: int
) -> tuple[ModelConfig, Params, Scores]:
  """(config, params, scores): the model, or with 'principal' the same one in another basis, and what its units score.

  principal: width by SliceGPT's principal directions of the residual stream (rotate.py), all else by activations.
  Batches are read for activations, flap and principal, the seed counts for what is random.
  """
  config = model.config
  if by == 'magnitude':
    return config, params, by_magnitude(config, params)
  if by == 'gates':
    return config, params, by_gates(config, params)
  if by == 'random':
    return config, params, at_random(config, seed)
  batches = list(batches)
  stats = collect_all(model, params, batches)
  if by == 'flap':
    return config, params, by_fluctuation(config, params, stats)
  scores = by_activations(config, stats)
  if by == 'principal':
    config, params = rotate.rotate(config, params, rotate.gram(config, params, batches))
    scores = scores._replace(width=-np.arange(config.d_model))
  return config, params, scores


def check_shape(source: ModelConfig, target: ModelConfig, layers: Sequence[int] = (), width: bool = True) -> None:
  """ConfigError for a model that cannot be cut out of another one, by their configurations alone.

  layers: those that stay, if they are named. width: whether anything tells channels of the residual stream apart.
  """
  for name in ('n_layers', 'd_ff', 'n_heads', 'n_kv_heads', 'd_model', 'max_len'):
    require(
      getattr(target, name) <= getattr(source, name) or (name == 'max_len' and target.positions == 'rope'),
      f'model.{name}={getattr(target, name)}: larger than {getattr(source, name)} of the arm it is cut from',
    )
  narrower = target.d_model < source.d_model
  free = _FREE + _EPSILONS if narrower else _FREE
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
  what = f'model.d_model={target.d_model} is less than {source.d_model} of the arm it is cut from'
  require(
    width or not narrower,
    f'init.by=flap: does not tell channels of the residual stream apart, and {what}; allowed: magnitude, activations, '
    'principal, gates, random',
  )
  require(
    not (narrower and source.mup_base_width), f'{what}: cannot be cut with mup_base_width={source.mup_base_width}'
  )
  if layers:
    n, named = target.n_layers, f'init.layers={tuple(layers)}'
    require(len(layers) == n, f'{named}: model.n_layers={n} of them are needed')
    good = all(a < b for a, b in itertools.pairwise(layers)) and layers[0] >= 0 and layers[-1] < source.n_layers
    require(good, f'{named}: must increase and lie in 0..{source.n_layers - 1}')


def choose(source: ModelConfig, target: ModelConfig, scores: Scores, layers: Sequence[int] = ()) -> Kept:
  """The units with the highest scores, as many as the target has; of equal ones the first. layers: those that stay.

  ConfigError if the models differ in anything else, or if the target is larger.
  """
  check_shape(source, target, layers, scores.width is not None)
  if scores.exact:
    check_gates(source, target, scores)
  even = np.zeros(source.n_layers)
  even[[i * source.n_layers // target.n_layers for i in range(target.n_layers)]] = 1
  by_unit: dict[Unit, Any] = {
    'layers': even if scores.layers is None else scores.layers,
    'channels': scores.channels,
    'groups': scores.groups,
    'queries': scores.queries,
    'width': scores.width,
  }
  kept = {unit: best(x, size(target, unit)) for unit, x in by_unit.items() if size(target, unit) < size(source, unit)}
  if layers:
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
  return np.sort(np.argsort(-np.asarray(scores, np.float64), axis=-1, kind='stable')[..., :n], axis=-1)


def fit(params: Params, source: ModelConfig, target: ModelConfig, scores: Scores, layers: Sequence[int] = ()) -> Params:
  """Parameters of `source`, cut to the shape of `target`; see `choose`. Biases take up the means that are known."""
  kept = choose(source, target, scores, layers)
  if scores.means is not None and source.bias:
    params = shifted(source, params, kept, scores.means)
  _, params = cut(source, params, kept)
  if 'positions' in params['embed']:
    params = {**params, 'embed': {**params['embed'], 'positions': params['embed']['positions'][: target.max_len]}}
  return params


def shifted(config: ModelConfig, params: Params, kept: Kept, means: dict[str, Any]) -> Params:
  """The parameters with W (1 - M) mean(X) added to the biases of o and down; M: the heads and channels that stay."""
  layers = dict(params['layers'])
  for name, index in (('o', heads(config, kept)), ('down', kept.channels)):
    if index is None:
      continue
    w_LIO, bias_LD = matrices(params)[name], layers[f'{name}_bias']
    units = config.n_heads if name == 'o' else config.d_ff
    stays = np.zeros((config.n_layers, units), bool)
    np.put_along_axis(stays, np.asarray(index), True, axis=1)
    mask_LIO = np.repeat(stays, w_LIO.shape[1] // units, axis=1)[..., None]
    lost_LD = jax.vmap(compensate.mean_shift)(w_LIO, jnp.asarray(mask_LIO), means[name])
    layers[f'{name}_bias'] = (bias_LD + lost_LD).astype(bias_LD.dtype)
  return {**params, 'layers': layers}
