"""Which channels and heads stay, learnt along with the weights: hard-concrete gates with a target shape.

    z = clip(s (zeta - gamma) + gamma, 0, 1),   s = sigmoid((log u - log(1 - u) + log_alpha) / beta),  u ~ U(0, 1)
    P(z > 0) = sigmoid(log_alpha - beta log(-gamma / zeta)),   beta = 2/3, gamma = -0.1, zeta = 1.1

(Louizos et al., arXiv 1712.01312.) A gate multiplies what a feed-forward channel, or the heads of a key/value group,
add to the residual stream. In each layer the expected share of open gates, s', is held to a target s by a Lagrangian,
lambda_1 (s' - s) + lambda_2 (s' - s)^2, whose multipliers ascend (Sheared LLaMA, arXiv 2310.06694); the target comes
down from 1 linearly. The finished model has exactly the target's channels and groups in each layer, the others are
zero: an arm of that shape with `init.arm` cuts them out."""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from slm_jax.config import require, setting
from slm_jax.losses import Term
from slm_jax.model.api import Params
from slm_jax.model.config import ModelConfig
from slm_jax.step import Resources, Transform, TransformConfig

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
STIFF = 100.0  # lambda_2 at the start (0 in the paper): without it, the share swings far beyond its target
OPEN = 3.0  # log_alpha at the start: nine gates of ten are 1, or nearly so
_AXES = {
  'channels': ('down', 1),
  'groups': ('o', 1),
}  # the matrix whose rows a unit's gate multiplies; axis of the unit


@dataclasses.dataclass(frozen=True)
class L0(TransformConfig):
  """Learn which feed-forward channels and key/value groups stay."""

  kind: ClassVar[str] = 'l0'
  online: ClassVar[bool] = False
  channels: float = setting(0.5, traced=False)  # share that stays in each layer
  groups: float = setting(1.0, traced=False)
  warm: float = 0.5  # share of the steps over which the target comes down
  rate: float = setting(10.0, traced=True)  # learning rate of gates and multipliers, as a multiple of the model's

  def check(self, key: str) -> None:
    for name in ('channels', 'groups'):
      require(0 < getattr(self, name) <= 1, f'{key}.{name}={getattr(self, name)}: must lie in (0, 1]')
    require(self.channels < 1 or self.groups < 1, f'{key}.channels=1, groups=1: nothing is to go')
    require(0 < self.warm <= 1, f'{key}.warm={self.warm}: must lie in (0, 1]')
    require(self.rate > 0, f'{key}.rate={self.rate}: must be positive')

  def check_in(self, config: Any, key: str) -> None:
    for unit, left in counts(config.model, self).items():
      require(left > 0, f'{key}.{unit}={getattr(self, unit)}: leaves none of them in a layer')

  def build(self, resources: Resources) -> tuple[Transform, dict[str, Any]]:
    left = counts(resources.model.config, self)
    return l0(resources.model.config, left, self.rate, max(1, int(self.warm * resources.steps))), {}


def counts(config: ModelConfig, spec: L0) -> dict[str, int]:
  """How many of each unit stay in a layer; units of which all do are left out."""
  total = {'channels': config.d_ff, 'groups': config.n_kv_heads}
  return {unit: round(getattr(spec, unit) * n) for unit, n in total.items() if getattr(spec, unit) < 1}


def l0(config: ModelConfig, left: dict[str, int], rate: float, warm: int) -> Transform:
  """Gates and multipliers are trained with the parameters, as params['l0'], at `l0.rate` times the learning rate.

  left: how many of each unit stay. warm: steps over which the target comes down. Logs 'l0_<unit>', the expected share
  of open gates; its Lagrangian is in the objective.
  """
  total = {'channels': config.d_ff, 'groups': config.n_kv_heads}

  def extra(key, params):
    gates = {unit: jnp.full((config.n_layers, total[unit]), OPEN) for unit in left}
    return {
      'log_alpha': gates,
      'multipliers': {unit: jnp.tile(jnp.array([0.0, STIFF]), (config.n_layers, 1)) for unit in left},
    }

  def view(slot, params, context):
    keys = jax.random.split(jax.random.fold_in(context.key, 0), len(left))
    gates = {unit: drawn(params['l0']['log_alpha'][unit], key) for unit, key in zip(sorted(left), keys, strict=True)}
    return gated(config, params, gates)

  def loss(slot, fn):
    def with_lagrangian(params, hidden_BTD, batch, context):
      terms, learnt = fn(params, hidden_BTD, batch, context), params['l0']
      come = jnp.minimum(context.step / warm, 1.0)
      one = jnp.float32(1)
      for unit, n in left.items():
        share_L = open_share(learnt['log_alpha'][unit])
        off_L = share_L - (1 - come * (1 - n / total[unit]))
        ascent_L2 = 2 * jax.lax.stop_gradient(learnt['multipliers'][unit]) - learnt['multipliers'][unit]
        penalty = (ascent_L2[:, 0] * off_L + ascent_L2[:, 1] * off_L**2).sum()
        terms = {**terms, f'l0_{unit}': Term(share_L.mean(), one, 0.0), f'l0_{unit}_penalty': Term(penalty, one, 1.0)}
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


def settled(log_alpha_LN: jax.Array, n: int) -> jax.Array:
  """z without noise, of the n of each layer that are the most open; the others are 0. Of equal ones the first stay."""
  _, best_Ln = jax.lax.top_k(log_alpha_LN, n)
  there = jnp.zeros(log_alpha_LN.shape, bool).at[jnp.arange(len(log_alpha_LN))[:, None], best_Ln].set(True)
  return jnp.where(there, _stretched(jax.nn.sigmoid(log_alpha_LN)), 0.0)


def _stretched(s: jax.Array) -> jax.Array:
  return jnp.clip(s * (ZETA - GAMMA) + GAMMA, 0, 1)


def open_share(log_alpha_LN: jax.Array) -> jax.Array:
  """[L], the mean of P(z > 0)."""
  return jax.nn.sigmoid(log_alpha_LN - BETA * math.log(-GAMMA / ZETA)).mean(-1)


def gated(config: ModelConfig, params: Params, gates: dict[str, jax.Array]) -> Params:
  """The parameters with the rows of down and o that belong to a unit times its gate."""
  layers = dict(params['layers'])
  for unit, z_LN in gates.items():
    name, axis = _AXES[unit]
    if unit == 'groups':
      z_LN = jnp.repeat(z_LN, config.n_heads // config.n_kv_heads, axis=1)
    z = jnp.expand_dims(z_LN, range(axis + 1, layers[name].ndim))
    layers[name] = (layers[name] * z).astype(layers[name].dtype)
  return {**params, 'layers': layers}
