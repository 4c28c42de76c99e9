"""What stays of a model, learnt along with its weights: hard-concrete gates with a target shape.

    z = clip(s (zeta - gamma) + gamma, 0, 1),   s = sigmoid((log u - log(1 - u) + log_alpha) / beta),  u ~ U(0, 1)
    P(z > t) = sigmoid(log_alpha - beta log((t - gamma) / (zeta - t))), 0 <= t < 1;  beta = 2/3, gamma = -.1, zeta = 1.1

(Louizos et al., arXiv 1712.01312.) A gate multiplies what its unit adds to the residual stream:

    channels   of the feed-forward block, [L,F]                          rows of down
    groups     of attention: a key/value head and its queries, [L,G]     rows of o
    layers     [1,L]                     o and down, their biases; with norms after blocks, the gains of those
    width      channels of the stream itself, [1,D]     columns of all that writes to it: embeddings, o, down, biases

The expected share of open gates, s' (of each layer's, where a unit is of a layer), is held to a target s by a
Lagrangian, lambda_1 (s' - s) + lambda_2 (s' - s)^2, whose multipliers ascend (Sheared LLaMA, arXiv 2310.06694); the
target comes down from 1 linearly. The finished model has exactly the target's shape, what else there is is zero: an arm
of that shape with `init.arm` and `init.by=gates` cuts it out. An RMS norm over a stream of which channels are closed
divides by all of them, open or not, as it does while it is trained; the cut puts that into the gains (`cut.cut`)."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from slm_jax.config import require, setting
from slm_jax.losses import Term
from slm_jax.model import decoder
from slm_jax.model.api import Params
from slm_jax.model.config import ModelConfig
from slm_jax.prune.spec import Unit, size
from slm_jax.step import Resources, Transform, TransformConfig

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
STIFF = 100.0  # lambda_2 at the start (0 in the paper): without it, the share swings far beyond its target
OPEN = 3.0  # log_alpha at the start: nine gates of ten are 1, or nearly so
LEAST = 1e-3  # of a gate that stays in the finished model: so it can be told from one that goes
UNITS: tuple[Unit, ...] = ('channels', 'groups', 'layers', 'width')
_OF_LAYERS = ('channels', 'groups')  # each layer has its own; the others are of the whole model


@dataclasses.dataclass(frozen=True)
class L0(TransformConfig):
  """Learn which feed-forward channels, key/value groups, layers and channels of the residual stream stay."""

  kind: ClassVar[str] = 'l0'
  channels: float = setting(0.5, '(0, 1]')  # share that stays in each layer
  groups: float = setting(1.0, '(0, 1]')
  layers: float = setting(1.0, '(0, 1]')
  width: float = setting(1.0, '(0, 1]')
  # Share of the steps over which the target comes down; it is reached in the last of them.
  warm: float = setting(0.5, '(0, 1]')
  # Learning rate of gates and multipliers, as a multiple of the model's.
  rate: float = setting(10.0, '(0, inf)', traced=True)

  def check(self, key: str) -> None:
    require(any(getattr(self, name) < 1 for name in UNITS), f'{key}.{"=1, ".join(UNITS)}=1: nothing is to go')

  def check_in(self, config: Any, key: str) -> None:
    model = config.model
    for unit, left in counts(model, self).items():
      require(left > 0, f'{key}.{unit}={getattr(self, unit)}: leaves none of them{_where(unit)}')
    what = f'{key}.width={self.width}: cannot be cut out of a model with'
    require(self.width == 1 or model.norm == 'rms', f'{what} model.norm={model.norm}; allowed: rms')
    require(self.width == 1 or not model.mup_base_width, f'{what} muP; allowed: model.mup_base_width=0')
    require(
      self.layers == 1 or not model.window,
      f'{key}.layers={self.layers}: layers that go would change which are local (model.window={model.window}); '
      'allowed: 1',
    )

  def build(self, resources: Resources) -> tuple[Transform, dict[str, Any]]:
    left = counts(resources.model.config, self)
    return l0(resources.model.config, left, self.rate, max(1, int(self.warm * resources.steps))), {}


def counts(config: ModelConfig, spec: L0) -> dict[Unit, int]:
  """How many of each unit stay; units of which all do are left out."""
  return {unit: round(getattr(spec, unit) * size(config, unit)) for unit in UNITS if getattr(spec, unit) < 1}


def l0(config: ModelConfig, left: Mapping[Unit, int], rate: float, warm: int) -> Transform:
  """Gates and multipliers are trained with the parameters, as params['l0'], at `l0.rate` times the learning rate.

  left: how many of each unit stay. warm: steps in the last of which the target is reached. Logs 'l0_<unit>', the
  expected share of open gates; its Lagrangian is in the objective.
  """
  shapes = {unit: (config.n_layers if unit in _OF_LAYERS else 1, size(config, unit)) for unit in left}

  def extra(key, params):
    return {
      'log_alpha': {unit: jnp.full(shape, OPEN, jnp.float32) for unit, shape in shapes.items()},
      'multipliers': {unit: jnp.tile(jnp.array([0.0, STIFF]), (rows, 1)) for unit, (rows, _) in shapes.items()},
    }

  def view(slot, params, context):
    keys = jax.random.split(jax.random.fold_in(context.key, 0), len(left))
    gates = {unit: drawn(params['l0']['log_alpha'][unit], key) for unit, key in zip(sorted(left), keys, strict=True)}
    return gated(config, params, gates)

  def loss(slot, fn):
    def with_lagrangian(params, hidden_BTD, batch, context):
      terms, learnt = fn(params, hidden_BTD, batch, context), params['l0']
      come = jnp.minimum(context.step / max(warm - 1, 1), 1.0)
      one = jnp.float32(1)
      for unit, n in left.items():
        share_R = open_share(learnt['log_alpha'][unit])
        off_R = share_R - (1 - come * (1 - n / shapes[unit][1]))
        ascent_R2 = 2 * jax.lax.stop_gradient(learnt['multipliers'][unit]) - learnt['multipliers'][unit]
        penalty = (ascent_R2[:, 0] * off_R + ascent_R2[:, 1] * off_R**2).sum()
        terms = {**terms, f'l0_{unit}': Term(share_R.mean(), one, 0.0), f'l0_{unit}_penalty': Term(penalty, one, 1.0)}
      return terms

    return with_lagrangian

  def final(slot, params):
    gates = {unit: settled(params['l0']['log_alpha'][unit], n) for unit, n in left.items()}
    return gated(config, params, gates)

  return Transform('l0', {'l0.rate': rate}, extra=extra, view=view, loss=loss, final=final)


def drawn(log_alpha: jax.Array, key: jax.Array) -> jax.Array:
  """A sample of z."""
  u = jax.random.uniform(key, log_alpha.shape, minval=1e-6, maxval=1 - 1e-6)
  return _stretched(jax.nn.sigmoid((jnp.log(u) - jnp.log1p(-u) + log_alpha) / BETA))


def settled(log_alpha_RN: jax.Array, n: int) -> jax.Array:
  """z without noise, of the n of each row that are the most open; the others are 0. Of equal ones the first stay."""
  _, best_Rn = jax.lax.top_k(log_alpha_RN, n)
  there = jnp.zeros(log_alpha_RN.shape, bool).at[jnp.arange(len(log_alpha_RN))[:, None], best_Rn].set(True)
  return jnp.where(there, jnp.maximum(_stretched(jax.nn.sigmoid(log_alpha_RN)), LEAST), 0.0)


def _stretched(s: jax.Array) -> jax.Array:
  return jnp.clip(s * (ZETA - GAMMA) + GAMMA, 0, 1)


def open_share(log_alpha_RN: jax.Array) -> jax.Array:
  """[R], the mean of P(z > 0)."""
  return jax.nn.sigmoid(log_alpha_RN - BETA * math.log(-GAMMA / ZETA)).mean(-1)


def gated(config: ModelConfig, params: Params, gates: Mapping[Unit, jax.Array]) -> Params:
  """The parameters with what each unit adds to the residual stream times its gate; gates: [L,N], [1,N] by unit."""
  embed, layers, table = dict(params['embed']), dict(params['layers']), decoder.letters(config)
  out = [name for name in ('o', 'down', 'o_bias', 'down_bias') if name in layers]

  def times(tree: Params, name: str, axes: str, letters: str, z: jax.Array) -> None:
    """z: [n] of one letter, or [L,n] of two, which stand in this order among the axes of the parameter."""
    shape = [n if letter in letters else 1 for letter, n in zip(axes, tree[name].shape, strict=True)]
    tree[name] = (tree[name] * z.reshape(shape)).astype(tree[name].dtype)

  if 'channels' in gates:
    times(layers, 'down', table['layers']['down'], 'LF', gates['channels'])
  if 'groups' in gates:
    of_heads = jnp.repeat(gates['groups'], size(config, 'queries'), axis=1)
    times(layers, 'o', table['layers']['o'], 'LH', of_heads)
  if 'width' in gates:
    for name in embed:
      times(embed, name, table['embed'][name], 'D', gates['width'][0])
    for name in out:
      times(layers, name, table['layers'][name], 'D', gates['width'][0])
  if 'layers' in gates:
    z_L = gates['layers'][0]
    for name in exits(config):
      offset = config.norm_offset if name.endswith('norm') else 0.0
      layers[name] = layers[name] + offset
      times(layers, name, table['layers'][name], 'L', z_L)
      layers[name] = layers[name] - offset
  return {**params, 'embed': embed, 'layers': layers}


def exits(config: ModelConfig) -> list[str]:
  """The parameters of a layer that what it adds to the residual stream is proportional to: 0 in them, it adds none."""
  names = list(decoder.letters(config)['layers'])
  ends = ('attn_post_norm', 'mlp_post_norm') if config.post_norms else ('o', 'down')
  return [name for name in names if name.removesuffix('_bias') in ends]


def _where(unit: Unit) -> str:
  return ' in a layer' if unit in _OF_LAYERS else ''
