"""Hard-concrete gates: their probability, their target shape, and the smaller model that comes of them."""

import dataclasses
import json
from types import SimpleNamespace

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
from slm_jax.prune.choose import by_gates, choose, fit
from slm_jax.prune.l0 import BETA, GAMMA, L0, STIFF, ZETA, drawn, gated, open_share, settled
from slm_jax.prune.spec import size
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


def test_the_distribution_of_a_gate_is_the_closed_form():
  """P(z = 0), P(z = 1) and E z = integral of P(z > t) over t in [0, 1], for gates from closed to open."""
  log_alpha, n = np.array([-3.0, -1.0, 0.0, 0.5, 2.0, 4.0]), 40_000
  z = np.asarray(drawn(jnp.broadcast_to(jnp.asarray(log_alpha), (n, 6)), jax.random.PRNGKey(3)), np.float64)

  def above(t):
    return 1 / (1 + np.exp(-(log_alpha - BETA * np.log((t - GAMMA) / (ZETA - t)))))

  t = (np.arange(2000) + 0.5)[:, None] / 2000
  mean = above(t).mean(0)
  for found, expected in (((z == 0).mean(0), 1 - above(0.0)), ((z == 1).mean(0), above(1.0 - 1e-12))):
    assert (np.abs(found - expected) <= 4 * np.sqrt(expected * (1 - expected) / n) + 1e-4).all()
  assert (np.abs(z.mean(0) - mean) <= 4 * z.std(0) / np.sqrt(n) + 1e-4).all()
  np.testing.assert_allclose(open_share(jnp.asarray(log_alpha)[:, None]), above(0.0), rtol=1e-5)


FAMILIES = {
  'llama': SMALL,
  'gpt2': dataclasses.replace(SMALL, norm='layer', mlp='gelu', bias=True, positions='learned'),
  'biases': dataclasses.replace(SMALL, bias=True, positions='learned', tied=False),
  'gemma': dataclasses.replace(SMALL, post_norms=True, norm_offset=1.0, qk_norm=True, norm_eps=1e-2),
}
CUTS = {
  'channels': (3, {'d_ff': 6}),
  'groups': (3, {'n_kv_heads': 1, 'n_heads': 2}),
  'layers': (1, {'n_layers': 2}),
  'width': (1, {'d_model': 12}),
}


def noisy(config):
  params = decoder.build(config).init(jax.random.PRNGKey(0))
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.PRNGKey(1), len(leaves))
  return tree.unflatten([x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])


def logits(config, params):
  return decoder.Decoder(config).apply({'params': params}, jnp.arange(30).reshape(2, 15))


@pytest.mark.parametrize(
  'units,family',
  [(units, family) for units in [*CUTS, 'all'] for family in FAMILIES if (units, family) != ('width', 'gpt2')],
)
def test_a_gated_model_is_cut_to_the_same_function(units, family):
  """Gates other than 0 and 1 go into the weights; what is closed is read off the weights, and cut out."""
  config, params = FAMILIES[family], noisy(FAMILIES[family])
  names = [name for name in CUTS if units in (name, 'all')]
  if config.norm == 'layer':  # over fewer channels it is another one
    names = [name for name in names if name != 'width']
  shape, gates = {}, {}
  for name in names:
    rows, smaller = CUTS[name]
    left = {'channels': 6, 'groups': 1, 'layers': 2, 'width': 12}[name]
    log_alpha = jax.random.normal(jax.random.PRNGKey(len(shape)), (rows, size(config, name)))
    gates[name], shape = settled(log_alpha, left), {**shape, **smaller}
  if 'width' in names:  # the epsilon with which the cut is exact
    shape |= {'norm_eps': config.norm_eps * 16 / 12, 'qk_norm_eps': config.norm_eps if config.qk_norm else 0.0}
  whole, target = gated(config, params, gates), dataclasses.replace(config, **shape)
  small = fit(whole, config, target, by_gates(config, whole))
  expected = logits(config, whole)
  np.testing.assert_allclose(logits(target, small), expected, atol=1e-5 * max(1, np.abs(expected).max()))
  assert np.abs(expected - logits(config, params)).max() > 1e-2


@pytest.mark.parametrize('family', FAMILIES)
def test_open_gates_change_nothing_and_all_of_an_ordinary_model_is_open(family):
  config, params = FAMILIES[family], noisy(FAMILIES[family])
  ones = {name: jnp.ones((rows, size(config, name))) for name, (rows, _) in CUTS.items()}
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gated(config, params, ones), params)
  scores = by_gates(config, params)
  assert all(np.asarray(x).all() for x in (scores.channels, scores.groups, scores.width, scores.layers))


def test_a_shape_other_than_the_one_that_was_learnt_is_refused():
  z = settled(jax.random.normal(jax.random.PRNGKey(1), (3, 12)), 6)
  scores = by_gates(SMALL, gated(SMALL, noisy(SMALL), {'channels': z}))
  for changes, message in (
    ({'d_ff': 5}, 'init.by=gates: 6 of 12 channels are open in the arm it is cut from, and 5 are to stay; allowed: 6'),
    ({}, '6 of 12 channels are open .* and 12 are to stay'),
    ({'d_ff': 6, 'n_layers': 2}, '3 of 3 layers are open .* and 2 are to stay; allowed: 3'),
    ({'d_ff': 6, 'd_model': 12}, '16 of 16 width are open'),
  ):
    with pytest.raises(ConfigError, match=message):
      choose(SMALL, dataclasses.replace(SMALL, **changes), scores)


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


@pytest.mark.parametrize('warm', [1, 2, 5, 10])
def test_the_target_comes_down_from_1_and_is_reached_in_the_last_step_of_the_warm_up(warm):
  transform, _ = L0(channels=0.5, warm=warm / 10).build(SimpleNamespace(model=decoder.build(SMALL), steps=10))
  params = {'l0': transform.extra(jax.random.PRNGKey(0), {})}
  share_L = np.asarray(open_share(params['l0']['log_alpha']['channels']))
  for step in range(10):
    context = Context(jnp.int32(step), jax.random.PRNGKey(0), {}, {})
    penalty = transform.loss((), lambda *given: {})(params, None, {}, context)['l0_channels_penalty'].sum
    target = 0.5 if step >= warm - 1 and step > 0 else 1 - 0.5 * step / max(warm - 1, 1)
    assert float(penalty) == pytest.approx(float((STIFF * (share_L - target) ** 2).sum()), rel=1e-4)


@pytest.fixture(scope='module')
def family(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('l0')
  plain = {'transforms': (), 'eval.samples': 0, 'eval.every': 150, 'run.checkpoint_every': 150, 'run.log_every': 10}
  base = override(tiny.config(150), plain)
  learnt = override(base, {'transforms': (L0(channels=0.5, groups=1.0, warm=0.3),)})
  both = override(base, {'transforms': (L0(channels=0.25, warm=0.3), Distill('base')), 'train.steps': 10})
  cut = override(base, {'init.arm': 'learnt', 'init.by': 'gates', 'model.d_ff': 16, 'train.steps': 0})
  arms = {'base': base, 'learnt': learnt, 'both': both, 'cut': cut}
  deep = override(base, {'model.n_layers': 4, 'model.n_heads': 4, 'model.n_kv_heads': 2, 'model.d_model': 32})
  arms['shape'] = override(deep, {'transforms': (L0(channels=0.5, groups=0.5, layers=0.5, width=0.75, warm=0.3),)})
  target = {'n_layers': 2, 'n_heads': 2, 'n_kv_heads': 1, 'd_model': 24, 'd_ff': 16, 'norm_eps': 1e-5 * 32 / 24}
  start = {'init.arm': 'shape', 'init.by': 'gates', 'train.steps': 0}
  arms['shape, cut'] = override(deep, {**start, **{f'model.{name}': value for name, value in target.items()}})
  for name, config in arms.items():
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


def test_a_whole_shape_is_learnt_and_cut_out(family):
  """Depth, width, groups and channels at once: each expected share comes to its target, and the cut loses nothing."""
  lines = [line for line in metrics.read(family / 'arms' / 'shape' / 'metrics.jsonl') if 'l0_channels' in line]
  for unit, target in {'channels': 0.5, 'groups': 0.5, 'layers': 0.5, 'width': 0.75}.items():
    assert lines[0][f'l0_{unit}'] > 0.9
    assert lines[-1][f'l0_{unit}'] == pytest.approx(target, abs=0.1), unit
  assert summary(family, 'shape, cut')['loss'] == pytest.approx(summary(family, 'shape')['loss'], abs=1e-4)
  assert summary(family, 'shape, cut')['parameters'] < 0.5 * summary(family, 'shape')['parameters']


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
    ({'layers': 0.1}, 'layers=0.1: leaves none of them$'),
    ({'width': 1.5}, r'width=1.5: must lie in \(0, 1\]'),
  ],
)
def test_bad_settings(settings, message):
  with pytest.raises(ConfigError, match=message):
    check(override(tiny.config(4), {'transforms': (L0(**settings),)}), 'config')


@pytest.mark.parametrize(
  'model,settings,message',
  [
    ({'norm': 'layer'}, {'width': 0.5}, 'width=0.5: cannot be cut out of a model with model.norm=layer; allowed: rms'),
    ({'mup_base_width': 8}, {'width': 0.5}, 'width=0.5: cannot be cut out of a model with muP'),
    ({'window': 4, 'global_every': 2}, {'layers': 0.5}, 'layers=0.5: layers that go would change which are local'),
  ],
)
def test_shapes_that_could_not_be_cut_out(model, settings, message):
  changes = {f'model.{name}': value for name, value in model.items()}
  with pytest.raises(ConfigError, match=message):
    check(override(tiny.config(4), {**changes, 'transforms': (L0(**settings),)}), 'config')


def test_layers_that_are_learnt_cannot_be_named():
  with pytest.raises(ConfigError, match=r'init.layers=\(0,\): with config.init.by=gates they are learnt'):
    check(override(tiny.config(4), {'init.arm': 'x', 'init.by': 'gates', 'init.layers': (0,)}), 'config')
