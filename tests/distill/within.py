"""A small student and its teacher, for the laws of distillation from within."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from toy import toy_batch

from slm_jax.distill import features
from slm_jax.distill.features import projected, related
from slm_jax.model import decoder
from slm_jax.model.config import ModelConfig
from slm_jax.optim import OptimConfig, optimizer
from slm_jax.step import Context, init_state, make_step

SMALL = ModelConfig(
  vocab_size=11, d_model=8, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=4, d_ff=12, init_std=0.5, unroll=1
)
MODEL, TEACHER = decoder.build(SMALL), decoder.build(dataclasses.replace(SMALL, d_model=12, n_layers=4, n_kv_heads=4))
FROZEN = {'teacher': jax.jit(TEACHER.init)(jax.random.PRNGKey(7))}
OPTIM = optimizer(OptimConfig(learning_rate=1e-2, warmup=0), 100)
PAIRS = [(1, 1), (2, 4)]


def hidden_states(weight=1.0, rate=1.0, distance=features.mse, teacher=TEACHER, pairs=PAIRS):
  return projected(teacher, pairs, distance, {'features.weight': weight, 'features.rate': rate})


def relations(weight=1.0, teacher=TEACHER, layers=(2, 4), kinds=('qq', 'kk', 'vv'), heads=2):
  return related(teacher, SMALL, layers, kinds, heads, weight)


BOTH = [hidden_states, relations]


def batch_of(seed=0, b=8, t=6):
  """Two documents in some rows."""
  batch = toy_batch(seed, b, t)
  return {**batch, 'segments': jnp.ones((b, t), jnp.int32).at[: b // 2, t // 2 :].set(2)}


@functools.cache
def fresh(seed=0):
  return jax.jit(MODEL.init)(jax.random.PRNGKey(seed + 1))


def start(transform, seed=0, optim=OPTIM):
  made = jax.jit(lambda key, params: init_state(key, params, optim, transform))
  return made(jax.random.PRNGKey(seed), fresh(seed))


def run(transform, n=3, frozen=FROZEN, state=None, optim=OPTIM, **options):
  step = jax.jit(make_step(MODEL, optim, transform, **options))
  state = start(transform, optim=optim) if state is None else state
  for i in range(n):
    state, metrics = step(state, batch_of(i), frozen)
  return state, metrics


def measured_by(transform):
  """A compiled function (batch, frozen) -> (the term, its gradient with respect to all parameters) before any step."""
  params = {**fresh(), **extra_of(transform)}
  hparams = {k: jnp.float32(v) for k, v in transform.hparams.items()}

  def mean(params, batch, frozen):
    context = Context(jnp.int32(0), jax.random.PRNGKey(0), hparams, frozen)
    hidden, found = MODEL.features(params, batch, transform.wants)
    taught = transform.data((), params, batch, context)
    fn = transform.loss((), lambda *args: {})
    term = fn(params, hidden, taught, context._replace(features=found))[transform.name]
    return term.sum / term.count

  compiled = jax.jit(jax.value_and_grad(mean))
  return lambda batch, frozen=FROZEN: compiled(params, batch, frozen)


def extra_of(transform):
  its = transform.extra(jax.random.PRNGKey(3), fresh())
  return {transform.name: its} if its else {}


def own(params):
  return {k: v for k, v in params.items() if k != 'features'}


def close(a, b, tolerance=1e-6):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)
