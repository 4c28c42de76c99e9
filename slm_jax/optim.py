"""Optimisers and learning-rate schedules by optax, as functions of traced numbers."""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from slm_jax.conditions import Needs
from slm_jax.config import require, setting

MUON_RMS = 0.2  # root mean square of Muon's updates; about that of Adam's


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  name: Literal['adamw', 'muon', 'adafactor'] = 'adamw'
  learning_rate: float = setting(1e-3, '(0, inf)', traced=True)
  schedule: Literal['cosine', 'wsd', 'linear', 'constant'] = 'cosine'
  warmup: int = setting(100, '[0, 2^31)')  # steps
  # Share of the steps in the last, decaying part of 'wsd'; or what the warm-up leaves of it.
  decay: float = setting(0.2, '(0, 1]')
  final: float = setting(0.1, '[0, 1]')  # learning rate of the last step, as a share of the peak
  weight_decay: float = setting(0.1, '[0, inf)', traced=True)  # of matrices only: not norms, biases
  # Of adamw, and of muon for what is no matrix; adafactor has none of these three.
  b1: float = setting(0.9, '[0, 1)')
  b2: float = setting(0.95, '[0, 1)')  # and muon's momentum
  eps: float = setting(1e-8, '(0, inf)')
  clip: float = setting(1.0, '[0, inf)', traced=True)  # largest global norm of a gradient; 0: no clipping

  needs: ClassVar[Needs] = {
    'decay': (lambda its: its.schedule == 'wsd', 'schedule=wsd'),
    'final': (lambda its: its.schedule != 'constant', 'a schedule that falls, such as cosine'),
    **dict.fromkeys(('b1', 'b2', 'eps'), (lambda its: its.name != 'adafactor', 'name=adamw or muon')),
  }


class Optimizer(NamedTuple):
  """An optax transformation as a function of traced numbers; its state's structure may not depend on them."""

  hparams: Mapping[str, float]
  make: Callable[[Mapping[str, jax.Array]], optax.GradientTransformation]
  rate: Callable[[Mapping[str, jax.Array], jax.Array], jax.Array]  # (hparams, step) -> learning rate, for the log


def optimizer(config: OptimConfig, steps: int, width_ratio: float = 1.0) -> Optimizer:
  """Clipping, then the named optimiser with decoupled weight decay: w <- w - lr(t) * (direction + weight_decay * w).

  width_ratio: r of muP (ModelConfig); the direction of a layer's matrices is divided by it. The decay is not: its pull
  lr(t) * weight_decay is the same at all widths, and transfers better than one that is divided too (arXiv 2203.03466).
  It does follow the schedule, and the base learning rate; the fully independent decay of arXiv 2309.14322 would be
  weight_decay varied as 1 / learning_rate. ConfigError for r != 1 without adamw.

  Parameters that a transform adds under a key of their own, and for which there is a number `key.rate`, are a group
  of their own: their learning rate is multiplied by it, they do not decay, and they are clipped by their own norm.
  """
  require(
    width_ratio == 1 or config.name == 'adamw',
    f'optim.name={config.name}: has no muP, and the width is {width_ratio:g} times the base; allowed: adamw',
  )
  shape = schedule(config, steps)

  def learning_rate(hparams, count):
    return hparams['optim.learning_rate'] * shape(count)

  def make(hparams):
    def rate(count):
      return learning_rate(hparams, count)

    decay, clip = hparams['optim.weight_decay'], hparams['optim.clip']
    rates = {name.removesuffix('.rate'): value for name, value in hparams.items() if name.endswith('.rate')}

    def decayed(params):
      """True for matrices: all but norms and biases, by name, since stacked layers add an axis to all of them."""
      return jax.tree_util.tree_map_with_path(lambda path, _: path[0].key not in rates and not _is_vector(path), params)

    if config.name == 'adamw':
      update = optax.chain(
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        divide_hidden(width_ratio),
        optax.add_decayed_weights(decay, decayed),
        optax.scale_by_learning_rate(rate),
      )
    elif config.name == 'muon':
      update = optax.chain(
        muon(config),
        optax.identity(),  # see `muon`
        optax.add_decayed_weights(decay, decayed),
        optax.scale_by_learning_rate(rate),
      )
    else:  # Adafactor's own decay is not multiplied by the learning rate: do so here
      update = optax.adafactor(rate, weight_decay_rate=lambda count: rate(count) * decay, weight_decay_mask=decayed)
    clipping = optax.clip_by_global_norm(jnp.where(clip > 0, clip, jnp.inf))
    return in_float32(optax.chain(clip_groups(clipping, rates), update, multiply_groups(rates)))

  names = ('learning_rate', 'weight_decay', 'clip')
  return Optimizer({f'optim.{name}': getattr(config, name) for name in names}, make, learning_rate)


def in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
  """`inner` with a state and arithmetic of float32, whatever the parameters and gradients are."""

  def wide(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

  def update(updates, state, params):
    return inner.update(wide(updates), state, wide(params))

  return optax.GradientTransformation(lambda params: inner.init(wide(params)), update)


def muon(config: OptimConfig) -> optax.GradientTransformation:
  """Muon for the layers' matrices, Adam for all else: embeddings, head, norms, biases, what transforms add.

  MUON_RMS * sqrt(max(inputs, outputs)) gives a matrix's update the size of Adam's, so that both take one learning rate
  (Moonlight, arXiv 2502.16982). The identities have no effect. They keep the structure of the state that
  optax.contrib.muon makes, so that checkpoints from the time when that was used are resumed.
  """
  empty = optax.identity()
  matrices = scale_by_orthogonal_momentum(config.b2, config.eps)
  rest = optax.scale_by_adam(config.b1, config.b2, config.eps)
  of_matrices, of_rest = optax.chain(matrices, scale_matrices(MUON_RMS), empty, empty), optax.chain(rest, empty, empty)
  return optax.partition({'muon': of_matrices, 'adam': of_rest}, _muon_or_adam)


def scale_by_orthogonal_momentum(beta: float, eps: float) -> optax.GradientTransformation:
  """Muon's direction for the layers' matrices, as its author publishes it (github.com/KellerJordan/Muon, muon.py).

      m <- beta m + (1 - beta) g,    direction = orthogonal((1 - beta) g + beta m)

  `orthogonal` is five Newton-Schulz iterations, which optax has. optax's own Nesterov mix corrects the bias of m and of
  g by different factors, so that g counts for more in the first steps: the direction was 13 to 31 % off at step 2. The
  older published form, m <- beta m + g and g + beta m, gives the same direction, since its length does not matter.
  """
  orthogonal = optax.contrib.scale_by_muon(beta=0.0, eps=eps, nesterov=False, weight_dimension_numbers=_dimensions)

  def update(updates, state, params=None):
    def mix(slow, fast):
      return jax.tree.map(lambda s, f: beta * s + (1 - beta) * f, slow, fast)

    mu = mix(state.mu, updates)
    directions, used = orthogonal.update(mix(mu, updates), state)  # with beta=0 it reads no momentum
    return directions, used._replace(mu=mu)

  return optax.GradientTransformation(orthogonal.init, update)


def scale_matrices(rms: float) -> optax.GradientTransformation:
  """Multiplies Muon's directions by rms * sqrt(max(inputs, outputs)) of the matrix."""

  def scale(path, update):
    sizes = [math.prod(update.shape[axis] for axis in axes) for axes in _MATRICES[path[-1].key]]
    return update * (rms * math.sqrt(max(sizes)))

  return optax.stateless(lambda updates, params=None: jax.tree_util.tree_map_with_path(scale, updates))


def divide_hidden(by: float) -> optax.GradientTransformation:
  """Divides the updates of the layers' matrices, the only ones whose inputs and outputs both grow with the width."""

  def divide(path, update):
    hidden = path[0].key == 'layers' and not _is_vector(path)
    return update / by if hidden else update

  def divide_all(updates, params=None):
    return jax.tree_util.tree_map_with_path(divide, updates)

  return optax.identity() if by == 1 else optax.stateless(divide_all)


def clip_groups(clipping: optax.GradientTransformation, groups: Collection[str]) -> optax.GradientTransformation:
  """`clipping`, which remembers nothing, of each group by itself and of all the rest together."""

  def clip_all(updates, params=None):
    parts = {name: clipping.update(updates[name], optax.EmptyState())[0] for name in groups}
    rest = {name: tree for name, tree in updates.items() if name not in groups}
    return parts | clipping.update(rest, optax.EmptyState())[0]

  return optax.stateless(clip_all) if groups else clipping


def multiply_groups(rates: Mapping[str, jax.Array]) -> optax.GradientTransformation:
  """Multiplies the updates of each group by its rate."""

  def multiply(updates, params=None):
    return {**updates, **{name: jax.tree.map(lambda u, r=r: u * r, updates[name]) for name, r in rates.items()}}

  return optax.stateless(multiply) if rates else optax.identity()


def schedule(config: OptimConfig, steps: int) -> Callable[[jax.Array], jax.Array]:
  """Returns count -> learning rate as a share of its peak; count is 0 in the first step, which already learns.

  The warm-up is linear, and reaches the peak in step `warmup` (in the first step without one). From there, with p going
  linearly from 0 to 1 in the last step, in which the learning rate is `final`:

    constant  1
    linear    1 - (1 - final) p
    cosine    final + (1 - final)(1 + cos pi p)/2
    wsd       1, then linear over the last `decay` of all steps (warm-up, stable, decay; arXiv 2404.06395)

  A warm-up that is as long as the run, or longer, leaves no step for that.
  """
  last, start = steps - 1, float(max(config.warmup, 1) - 1)  # counted from 0: the last step, and that of the peak
  if config.schedule == 'wsd':
    start = max(start, last - config.decay * steps)

  def shape(count):
    t = jnp.asarray(count, jnp.float32)
    warm = jnp.minimum((t + 1) / max(config.warmup, 1), 1.0)
    p = jnp.clip(1 - (last - t) / (last - start), 0, 1) if start < last else jnp.zeros_like(t)
    drop = {'constant': jnp.zeros_like(p), 'linear': p, 'wsd': p, 'cosine': (1 - jnp.cos(jnp.pi * p)) / 2}[
      config.schedule
    ]
    return warm * ((1 - drop) + config.final * drop)  # exact at both ends

  return shape


_MATRICES = {  # of a layer: which axes are inputs, which are outputs; that of the layers is neither
  'q': optax.contrib.MuonDimensionNumbers((1,), (2, 3)),
  'k': optax.contrib.MuonDimensionNumbers((1,), (2, 3)),
  'v': optax.contrib.MuonDimensionNumbers((1,), (2, 3)),
  'o': optax.contrib.MuonDimensionNumbers((1, 2), (3,)),
  'gate': optax.contrib.MuonDimensionNumbers((1,), (2,)),
  'up': optax.contrib.MuonDimensionNumbers((1,), (2,)),
  'down': optax.contrib.MuonDimensionNumbers((1,), (2,)),
}


def _matrix(path: tuple[Any, ...]) -> optax.contrib.MuonDimensionNumbers | None:
  """The axes of a matrix of the layers; None for all other parameters."""
  return _MATRICES.get(path[-1].key) if path[0].key == 'layers' else None


def _dimensions(params: Any) -> Any:
  return jax.tree_util.tree_map_with_path(lambda path, _: _matrix(path), params)


def _muon_or_adam(params: Any) -> Any:
  return jax.tree_util.tree_map_with_path(lambda path, _: 'muon' if _matrix(path) else 'adam', params)


def _is_vector(path: tuple[Any, ...]) -> bool:
  return any('norm' in part.key or 'bias' in part.key for part in path)
