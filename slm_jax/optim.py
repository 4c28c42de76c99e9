"""Optimisers and learning-rate schedules by optax, as functions of traced numbers."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from slm_jax.config import require, setting


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  name: Literal['adamw', 'muon', 'adafactor'] = 'adamw'
  learning_rate: float = setting(1e-3, '(0, inf)', traced=True)
  schedule: Literal['cosine', 'wsd', 'linear', 'constant'] = 'cosine'
  warmup: int = setting(100, '[0, 2^31)')  # steps
  decay: float = setting(0.2, '(0, 1]')  # share of the steps in the last, decaying part of 'wsd'
  final: float = setting(0.1, '[0, 1]')  # learning rate at the end, as a share of the peak
  weight_decay: float = setting(0.1, '[0, inf)', traced=True)  # of matrices only: not norms, biases
  # Of adamw, and of muon for what is no matrix; adafactor has none of these three.
  b1: float = setting(0.9, '[0, 1)')
  b2: float = setting(0.95, '[0, 1)')  # and muon's momentum
  eps: float = setting(1e-8, '(0, inf)')
  clip: float = setting(1.0, '[0, inf)', traced=True)  # largest global norm of a gradient; 0: no clipping


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
      # consistent_rms=0.2 gives matrices and Adam's vectors one learning rate (Moonlight, arXiv 2502.16982).
      # Without decay: Muon's own mask for it does not reach what is left to Adam, and norms would decay.
      direction = optax.contrib.muon(
        1.0,
        beta=config.b2,
        eps=config.eps,
        adam_b1=config.b1,
        adam_b2=config.b2,
        muon_weight_dimension_numbers=_matrices,
        consistent_rms=0.2,
      )
      update = optax.chain(
        direction,
        optax.scale(-1.0),  # it comes as a descent already
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
  """count -> learning rate as a share of its peak; count is 0 in the first step, which already learns.

  Linear warm-up over `warmup` steps, times one of
    constant  1
    linear    1 - (1 - final) p                   p: share of the steps after warm-up
    cosine    final + (1 - final)(1 + cos pi p)/2
    wsd       1, then linear to `final` over the last `decay` of all steps (warm-up, stable, decay; arXiv 2404.06395)
  """

  def shape(count):
    t = jnp.asarray(count, jnp.float32)
    warm = jnp.minimum((t + 1) / max(config.warmup, 1), 1.0)
    p = jnp.clip((t - config.warmup) / max(steps - config.warmup, 1), 0, 1)
    tail = jnp.clip((t / max(steps, 1) - (1 - config.decay)) / config.decay, 0, 1)
    drop = {
      'constant': jnp.zeros_like(p),
      'linear': p,
      'cosine': (1 - jnp.cos(jnp.pi * p)) / 2,
      'wsd': tail,
    }[config.schedule]
    return warm * (1 - (1 - config.final) * drop)

  return shape


def _matrices(params: Any) -> Any:
  """Muon's view of the layers' weights: which axes are summed over, which are outputs; the layer axis is neither."""
  out = optax.contrib.MuonDimensionNumbers
  axes = {
    'q': out((1,), (2, 3)),
    'k': out((1,), (2, 3)),
    'v': out((1,), (2, 3)),
    'o': out((1, 2), (3,)),
    'gate': out((1,), (2,)),
    'up': out((1,), (2,)),
    'down': out((1,), (2,)),
  }

  def of(path, _):
    return axes.get(path[-1].key) if path[0].key == 'layers' else None

  return jax.tree_util.tree_map_with_path(of, params)


def _is_vector(path: tuple[Any, ...]) -> bool:
  return any('norm' in part.key or 'bias' in part.key for part in path)
