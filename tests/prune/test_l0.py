"""Hard-concrete gates: their probability, their target shape, and the smaller model that comes of them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from slm_jax import metrics, train
from slm_jax.config import ConfigError, check, override
from slm_jax.distill.logits import Distill
from slm_jax.model import decoder
from slm_jax.model.config import ModelConfig
from slm_jax.preempt import EXIT_DONE
from slm_jax.prune.choose import by_magnitude, fit
from slm_jax.prune.l0 import L0, drawn, gated, open_share, settled
from slm_jax.step import Context

SMALL = ModelConfig(vocab_size=48, d_model=16, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=12, max_len=16)


def test_a_gate_is_open_as_often_as_the_formula_says():
  log_alpha = jnp.array([[-3.0, -1.0, 0.0, 0.5, 2.0, 4.0]])
  z = drawn(jnp.broadcast_to(log_alpha[0], (20_000, 6)), jax.random.PRNGKey(0))
  p = np.array([float(open_share(log_alpha[:, i : i + 1])[0]) for i in range(6)])
  found = np.asarray(z > 0).mean(0)
  assert (np.abs(found - p) <= 4 * np.sqrt(p * (1 - p) / 20_000)).all()
  assert float(z.min()) == 0
  assert float(z.max()) == 1
  assert np.isfinite(jax.grad(lambda a: drawn(a, jax.random.PRNGKey(0)).sum())(log_alpha)).all()


def test_exactly_the_target_is_left_in_each_layer_and_of_equal_gates_the_first():
  log_alpha = jnp.array([[1.0, 3.0, 2.0, 3.0], [2.0, 2.0, 2.0, 2.0]])
  z = np.asarray(settled(log_alpha, 2))
  assert (z > 0).tolist() == [[False, True, False, True], [True, True, False, False]]
  assert (z[z > 0] > 0.9).all()


@pytest.mark.parametrize('unit', ['channels', 'groups'])
def test_a_gated_model_is_cut_to_the_same_function(unit):
  """Gates other than 0 and 1 go into the weights."""
  params = decoder.build(SMALL).init(jax.random.PRNGKey(0))
  total = {'channels': SMALL.d_ff, 'groups': SMALL.n_kv_heads}[unit]
  z = settled(jax.random.normal(jax.random.PRNGKey(1), (3, total)), total // 2)
  whole = gated(SMALL, params, {unit: z})
  smaller = {'channels': {'d_ff': 6}, 'groups': {'n_kv_heads': 1, 'n_heads': 2}}[unit]
  target = dataclasses.replace(SMALL, **smaller)
  cut = fit(whole, SMALL, target, by_magnitude(SMALL, whole))
  tokens = jnp.arange(30).reshape(2, 15)
  np.testing.assert_allclose(
    decoder.Decoder(target).apply({'params': cut}, tokens),
    decoder.Decoder(SMALL).apply({'params': whole}, tokens),
    atol=1e-5,
  )


def test_multipliers_ascend_and_gates_close_while_there_are_too_many():
  spec = L0(channels=0.5, warm=0.1)
  transform, _ = spec.build(type('R', (), {'model': decoder.build(SMALL), 'steps': 10})())
  params = {'l0': transform.extra(jax.random.PRNGKey(0), {})}

  def objective(params):
    context = Context(jnp.int32(5), jax.random.PRNGKey(0), {}, {})
    terms = transform.loss((), lambda *given: {})(params, None, {}, context)
    return sum(term.weight * term.sum / term.count for term in terms.values())

  grads = jax.grad(objective)(params)['l0']
  assert (grads['multipliers']['channels'] < 0).all()  # descent makes them larger
  pressed = {'l0': {**params['l0'], 'multipliers': {'channels': jnp.ones((3, 2))}}}
  assert (jax.grad(objective)(pressed)['l0']['log_alpha']['channels'] > 0).all()  # and gates smaller


@pytest.fixture(scope='module')
def family(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('l0')
  plain = {'transforms': (), 'eval.samples': 0, 'eval.every': 150}
  base = override(tiny.config(150), plain)
  learnt = override(base, {'transforms': (L0(channels=0.5, groups=1.0, warm=0.3),)})
  both = override(base, {'transforms': (L0(channels=0.25, warm=0.3), Distill('base')), 'train.steps': 10})
  cut = override(base, {'init.arm': 'learnt', 'model.d_ff': 16, 'train.steps': 0})
  for name, config in {'base': base, 'learnt': learnt, 'both': both, 'cut': cut}.items():
    assert train.run(override(config, {'name': name}), workdir, name) == EXIT_DONE
  return workdir


def summary(workdir, arm):
  return json.loads((workdir / 'arms' / arm / 'run.json').read_text())['summary']


def test_the_expected_share_comes_to_the_target(family):
  lines = [line for line in metrics.read(family / 'arms' / 'learnt' / 'metrics.jsonl') if 'l0_channels' in line]
  assert lines[0]['l0_channels'] > 0.9
  assert lines[-1]['l0_channels'] == pytest.approx(0.5, abs=0.06)


def test_what_is_learnt_can_be_cut_out(family):
  assert summary(family, 'cut')['loss'] == pytest.approx(summary(family, 'learnt')['loss'], abs=1e-4)
  assert summary(family, 'cut')['parameters'] < summary(family, 'learnt')['parameters']
  assert summary(family, 'learnt')['loss'] < summary(family, 'base')['loss'] + 0.3


def test_it_goes_along_with_a_teacher(family):
  assert summary(family, 'both')['kl'] > 0


@pytest.mark.parametrize(
  'settings,message',
  [
    ({'channels': 0.0}, r'channels=0.0: must lie in \(0, 1\]'),
    ({'channels': 1.0}, 'nothing is to go'),
    ({'warm': 0.0}, 'warm=0.0'),
    ({'rate': 0.0}, 'rate=0.0: must be positive'),
    ({'channels': 0.01}, 'channels=0.01: leaves none of them in a layer'),
  ],
)
def test_bad_settings(settings, message):
  with pytest.raises(ConfigError, match=message):
    check(override(tiny.config(4), {'transforms': (L0(**settings),)}), 'config')
