"""Exponential moving average of the parameters, as a transform: what evaluation and export see is the average."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from slm_jax.config import setting
from slm_jax.model.api import Params
from slm_jax.step import Resources, Transform, TransformConfig


@dataclasses.dataclass(frozen=True)
class Ema(TransformConfig):
  kind: ClassVar[str] = 'ema'
  decay: float = setting(0.99, '[0, 1)', traced=True)

  def build(self, resources: Resources) -> tuple[Transform, dict[str, Any]]:
    return ema(self.decay), {}


def ema(decay: float) -> Transform:
  """What evaluation and export see is the average; see `follow`."""

  def init(key, params):
    return jax.tree.map(lambda p: p.astype(jnp.float32), params)

  def after(average, state, update):
    return follow(average, state.params, update.context.step, state.hparams['ema.decay']), state

  def instead(average, params):
    return jax.tree.map(lambda a, p: a.astype(p.dtype), average, params)

  return Transform('ema', {'ema.decay': decay}, init=init, after=after, instead=instead)


def follow(average: Params, params: Params, step: jax.Array, decay: jax.Array) -> Params:
  """average <- d_t * average + (1 - d_t) * params, d_t = min(decay, (1 + t)/(10 + t)), in float32.

  The ramp lets the average follow the fast early phase (TensorFlow's ExponentialMovingAverage does the same).
  """
  t = step.astype(jnp.float32)
  d = jnp.minimum(decay, (1 + t) / (10 + t))
  return jax.tree.map(lambda a, p: d * a + (1 - d) * p.astype(jnp.float32), average, params)
