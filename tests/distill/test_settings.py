"""What an experiment file says of distillation is what the step computes: no setting is left by the way."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax import losses
from slm_jax.distill import signals
from slm_jax.distill.cached import CachedDistill
from slm_jax.distill.divergences import DIVERGENCES
from slm_jax.distill.logits import Distill, Moving, SelfDistill, _moved
from slm_jax.ema import follow
from slm_jax.model import decoder
from slm_jax.model.config import ModelConfig
from slm_jax.optim import OptimConfig, optimizer
from slm_jax.step import Context, Resources, chain, init_state, make_step

V, T = 8, 6
CONFIG = ModelConfig(
  vocab_size=12, d_model=8, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=4, d_ff=8, max_len=16, init_std=0.8
)
MODEL, TEACHER = decoder.build(CONFIG), decoder.build(dataclasses.replace(CONFIG, n_layers=2))
STUDENT, A, B = (m.init(jax.random.PRNGKey(i)) for i, m in enumerate((MODEL, TEACHER, TEACHER)))
ARMS = {'a': (TEACHER, A), 'b': (TEACHER, B)}
RESOURCES = Resources(10, T, V, MODEL, ARMS.__getitem__, Path(), 2, 0)
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(3, V, (3, T + 1)).astype(np.int32)
BATCH = {
  'inputs': jnp.asarray(TOKENS[:, :-1]),
  'targets': jnp.asarray(TOKENS[:, 1:]),
  'segments': jnp.ones((3, T), jnp.int32),
  'mask': jnp.asarray(RNG.random((3, T)) < 0.7, jnp.float32),
}
DIFFERENT = sorted(DIVERGENCES)
TAILS = ['bucket', 'none', 'renormalize_teacher', 'renormalize_both']
ONE = jnp.float32(1)


def logits(model, params, vocab=12):
  return model.head(params, model.hidden(params, BATCH))[..., :vocab]


Q, P, P_B = logits(MODEL, STUDENT, V), logits(TEACHER, A, V), logits(TEACHER, B, V)


def mean(nats):
  return (nats * BATCH['mask']).sum() / BATCH['mask'].sum()


def objective(spec, step=0, **entries):
  """params -> the term, as an arm with this transform has it in that step."""
  transform, frozen = spec.build(RESOURCES)
  hparams = {k: jnp.float32(v) for k, v in transform.hparams.items()}
  context = Context(jnp.int32(step), jax.random.PRNGKey(0), hparams, frozen)
  slot = transform.init(context.key, STUDENT)
  batch = transform.data(slot, STUDENT, {**BATCH, **entries}, context)

  def term(params):
    found = transform.token_loss(slot, losses.cross_entropy())(logits(MODEL, params), batch, context)[spec.kind]
    return found.sum / found.count

  return term


def term_of(spec, step=0, **entries):
  return float(objective(spec, step, **entries)(STUDENT))


@pytest.mark.parametrize('name', DIFFERENT)
def test_the_divergence_is_the_one_that_was_named(name):
  expected = {each: float(mean(DIVERGENCES[each](P, Q, 0.3))) for each in DIFFERENT}
  found = term_of(Distill('a', divergence=name, mix=0.3))
  assert found == pytest.approx(expected.pop(name), rel=1e-5)
  assert all(abs(found - other) > 1e-3 * found for other in expected.values())


@pytest.mark.parametrize('name', [name for name in DIFFERENT if name not in ('kl', 'mse')])
def test_and_so_is_that_of_the_own_average(name):
  """Which is the student's at first, so it is asked by another one."""
  transform, _ = SelfDistill(divergence=name, mix=0.3).build(RESOURCES)
  context = Context(jnp.int32(0), jax.random.PRNGKey(0), {k: jnp.float32(v) for k, v in transform.hparams.items()}, {})
  other = MODEL.init(jax.random.PRNGKey(9))
  slot = transform.init(context.key, other)
  batch = transform.data(slot, STUDENT, BATCH, context)
  found = transform.token_loss(slot, losses.cross_entropy())(logits(MODEL, STUDENT), batch, context)['self_distill']
  assert found.sum / found.count == pytest.approx(float(mean(DIVERGENCES[name](logits(MODEL, other, V), Q, 0.3))), 1e-5)


@pytest.mark.parametrize('tail', TAILS)
def test_the_tail_is_the_one_that_was_named(tail):
  """Of a teacher that is asked in the step, and of one that was asked earlier."""
  told = signals.top_k(P, 3)
  expected = {each: float(mean(signals.top_k_loss(each)(told, Q, {}, ONE, ONE))) for each in TAILS}
  entries = {f'cached_distill_{name}': getattr(told, name) for name in ('ids', 'log_p', 'log_rest')}
  found = [
    term_of(Distill('a', signal='top_k', k=3, tail=tail)),
    term_of(CachedDistill('a', k=3, tail=tail), **entries),
  ]
  assert found == pytest.approx([expected.pop(tail)] * 2, rel=1e-5)
  assert all(abs(found[0] - other) > 1e-3 * found[0] for other in expected.values())


def test_teachers_are_averaged_as_was_said():
  spec = Distill('a', co_teachers=('b',), shares=(3.0, 1.0))
  p = 0.75 * jax.nn.softmax(P) + 0.25 * jax.nn.softmax(P_B)
  assert term_of(spec) == pytest.approx(float(mean(DIVERGENCES['kl'](jnp.log(p), Q))), rel=1e-5)
  z = 0.75 * P + 0.25 * P_B
  spec = dataclasses.replace(spec, average='logits')
  assert term_of(spec) == pytest.approx(float(mean(DIVERGENCES['kl'](z, Q))), rel=1e-5)


def test_draws_and_precisions_are_no_others():
  draws = [term_of(Distill('a', signal='sampled', draws=n)) for n in (3, 50, 200)]
  precisions = [term_of(Distill('a', precision=each)) for each in ('own', 'bfloat16', 'int8')]
  assert len(set(draws)) == len(set(precisions)) == 3
  assert precisions == pytest.approx([precisions[0]] * 3, rel=0.1)


def test_numbers_go_from_their_start_to_their_end():
  spec = Distill('a', temperature=1.0, temperature_end=4.0)
  for step, temperature in ((0, 1.0), (3, 2.0), (9, 4.0), (20, 4.0)):
    expected = mean(temperature**2 * DIVERGENCES['kl'](P / temperature, Q / temperature))
    assert term_of(spec, step) == pytest.approx(float(expected), rel=1e-5)


def test_taids_target_is_between_student_and_teacher_and_a_constant():
  def by_hand(params):
    target = jax.lax.stop_gradient(0.7 * Q + 0.3 * P)
    return mean(DIVERGENCES['kl'](target, logits(MODEL, params, V)))

  term = objective(Distill('a', divergence='taid', mix=0.3))
  assert term(STUDENT) == pytest.approx(float(by_hand(STUDENT)), rel=1e-5)
  ours, expected = (jax.grad(f)(STUDENT) for f in (term, by_hand))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ours, expected)


def test_taids_target_hurries_where_the_loss_falls():
  first = _moved(Moving(jnp.float32(0.3), jnp.float32(0), jnp.float32(0)), jnp.float32(2), 0.3, 0.0)
  assert first.t == pytest.approx(0.3 + 5e-4 * 0.5 * 0.7)
  falls = _moved(Moving(jnp.float32(0.6), jnp.float32(2), jnp.float32(0)), jnp.float32(1), 0.3, 0.0)
  assert falls.momentum == pytest.approx(0.01 * 0.5)
  assert falls.t == pytest.approx(0.6 + 5e-4 / (1 + np.exp(-0.005)) * 0.4)
  assert _moved(falls, jnp.float32(1), 0.3, 0.9).t == pytest.approx(0.93)  # the line from 0.3 to 1


@pytest.mark.parametrize('decay', [0.0, 0.3])
def test_the_own_average_decays_as_was_said(decay):
  transform, frozen = SelfDistill(decay=decay).build(RESOURCES)
  optim = optimizer(OptimConfig(learning_rate=1e-2, warmup=0), 10)
  state = init_state(jax.random.PRNGKey(0), STUDENT, optim, chain(transform))
  step, average = jax.jit(make_step(MODEL, optim, transform)), STUDENT
  for i in range(6):
    state, _ = step(state, BATCH, frozen)
    average = follow(average, state.params, jnp.int32(i), jnp.float32(decay))
  found = state.slots['self_distill']['source']
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, average)
  if decay == 0:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), found, state.params)
