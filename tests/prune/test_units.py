"""Which units stay by their fluctuations or by principal directions: what a cut may not change, and what it costs."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from slm_jax import train
from slm_jax.checkpoint import load_model
from slm_jax.config import ConfigError, check, override
from slm_jax.model import decoder
from slm_jax.model.api import Feature
from slm_jax.model.config import ModelConfig
from slm_jax.preempt import EXIT_DONE
from slm_jax.prune.choose import choose, fit, ranked
from slm_jax.prune.cut import Kept, cut, smaller

GPT = ModelConfig(
  vocab_size=48,
  d_model=16,
  n_layers=3,
  n_heads=6,
  n_kv_heads=3,
  head_dim=4,
  d_ff=20,
  max_len=16,
  norm='layer',
  mlp='gelu',
  bias=True,
  positions='learned',
)
LLAMA = dataclasses.replace(GPT, norm='rms', mlp='swiglu', bias=False, positions='rope', tied=False)
BATCHES = [
  {
    'inputs': np.random.default_rng(i).integers(0, 48, (4, 16), dtype=np.int32),
    'segments': np.array([[1] * 9 + [2] * 5 + [0] * 2] * 4, np.int32),
  }
  for i in range(3)
]


def noisy(config, draw=0):
  params = decoder.build(config).init(jax.random.PRNGKey(2 * draw))
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.PRNGKey(2 * draw + 1), len(leaves))
  return tree.unflatten([x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])


def logits(config, params):
  return decoder.Decoder(config).apply({'params': params}, jnp.arange(24).reshape(2, 12) % 40)


# -------------------------------------------------------------------------------------------------------- fluctuation


def test_what_never_fluctuates_goes_and_its_bias_takes_it_up_without_a_trace():
  """Channels and heads that are large, and the same for every token: by magnitude they would stay."""
  params = noisy(GPT)
  layers = dict(params['layers'])
  layers['up'] = layers['up'].at[:, :, 3:10].set(0)  # gelu(bias), whatever comes
  layers['up_bias'] = layers['up_bias'].at[:, 3:10].set(2.0)
  layers['down'] = layers['down'].at[:, 3:10].multiply(100)
  layers['v'] = layers['v'].at[:, :, 1].set(0)  # a group whose values are its bias
  params = {**params, 'layers': layers}
  target = dataclasses.replace(GPT, d_ff=13, n_kv_heads=2, n_heads=4)
  _, _, scores = ranked('flap', decoder.build(GPT), params, BATCHES, 0)
  kept = choose(GPT, target, scores)
  assert (np.asarray(kept.channels) == [*range(3), *range(10, 20)]).all()
  assert (np.asarray(kept.groups) == [0, 2]).all()
  whole, ours = logits(GPT, params), logits(target, fit(params, GPT, target, scores))
  np.testing.assert_allclose(ours, whole, atol=2e-4 * np.abs(whole).max())
  without = logits(target, fit(params, GPT, target, scores._replace(means=None)))
  assert np.abs(without - whole).max() > 0.1 * np.abs(whole).max()


def test_a_score_is_the_variance_times_the_squared_norm_of_what_reads_it():
  """Against numpy; z-scores keep the order within a layer. A head's is the mean of its inputs', a group's of its."""
  config, params = LLAMA, noisy(LLAMA)
  _, _, scores = ranked('flap', decoder.build(config), params, BATCHES, 0)
  wanted = [Feature(into, l + 1) for into in ('into_o', 'into_down') for l in range(3)]
  each = [decoder.build(config).features(params, one, wanted)[1] for one in BATCHES]
  real = np.concatenate([one['segments'] > 0 for one in BATCHES])
  for l in range(3):
    x = {w: np.concatenate([f[w] for f in each])[real].astype(np.float64) for w in wanted}
    down = x[Feature('into_down', l + 1)].var(0, ddof=1) * (np.asarray(params['layers']['down'][l]) ** 2).sum(1)
    o = x[Feature('into_o', l + 1)].var(0, ddof=1) * (np.asarray(params['layers']['o'][l]) ** 2).sum(-1)
    z = lambda s, of: (s - of.mean()) / of.std()  # noqa: E731
    np.testing.assert_allclose(scores.channels[l], z(down, down), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(scores.queries[l].ravel(), z(o, o).mean(-1), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(scores.groups[l], z(o, o).reshape(3, -1).mean(-1), rtol=1e-3, atol=1e-4)


def test_biases_take_up_the_mean_of_what_goes():
  """The mean of what down puts out on the calibration text stays, in the first layer whose inputs are the same."""
  params = noisy(GPT)
  target = dataclasses.replace(GPT, d_ff=8)
  _, _, scores = ranked('flap', decoder.build(GPT), params, BATCHES, 0)
  small = fit(params, GPT, target, scores)
  real = np.concatenate([one['segments'] > 0 for one in BATCHES])

  def mean_out(config, params):
    x = [decoder.build(config).features(params, one, [Feature('into_down', 1)])[1] for one in BATCHES]
    x_F = np.concatenate([f[Feature('into_down', 1)] for f in x])[real].mean(0)
    return x_F @ params['layers']['down'][0] + params['layers']['down_bias'][0]

  np.testing.assert_allclose(mean_out(target, small), mean_out(GPT, params), atol=1e-4)


def test_flap_has_nothing_to_say_of_the_width():
  _, _, scores = ranked('flap', decoder.build(LLAMA), noisy(LLAMA), BATCHES, 0)
  with pytest.raises(ConfigError, match='init.by=flap: .*model.d_model=8 is less than 16.*allowed: magnitude'):
    choose(LLAMA, dataclasses.replace(LLAMA, d_model=8), scores)


# ------------------------------------------------------------------------------------------------ principal directions


@pytest.mark.parametrize(
  'changes',
  [{}, {'tied': True}, {'qk_norm': True, 'norm_offset': 1.0, 'embed_scale': 4.0}, {'bias': True, 'mlp': 'gelu'}],
  ids=['llama', 'tied', 'gains', 'biases'],
)
def test_a_cut_by_principal_directions_is_the_rotated_model_with_channels_masked(changes):
  source = dataclasses.replace(LLAMA, norm_eps=1e-2, **changes)
  params = noisy(source)
  config, turned, scores = ranked('principal', decoder.build(source), params, BATCHES, 0)
  whole = logits(source, params)
  np.testing.assert_allclose(logits(config, turned), whole, atol=1e-4 * np.abs(whole).max())  # a rotation alone
  target = dataclasses.replace(config, d_model=10)
  kept = choose(config, target, scores)
  assert list(kept.width) == list(range(10))
  masked = jax.tree.map(
    lambda axes, x: (
      jnp.where(jnp.expand_dims(jnp.arange(16) < 10, [i for i, a in enumerate(axes) if a != 'D']), x, 0)
      if 'D' in axes
      else x
    ),
    decoder.letters(config),
    turned,
  )
  exact = smaller(config, Kept(width=kept.width))  # with the epsilon that makes it exact
  _, small = cut(config, turned, kept)
  np.testing.assert_allclose(logits(exact, small), logits(config, masked), atol=1e-4)
  ours = fit(turned, config, target, scores)
  jax.tree.map(np.testing.assert_array_equal, ours, small)


def test_principal_directions_lose_least_of_what_the_norms_put_out():
  """Of all bases they drop the least of what the norms put out: so less than the channels as they are.

  Of a single model the logits may say otherwise: they are no linear function of what the norms put out.
  """
  source = LLAMA
  models = [noisy(source, draw) for draw in range(5)]

  def lost(by):
    total = 0.0
    for params in models:
      config, new, scores = ranked(by, decoder.build(source), params, BATCHES, 0)
      target = dataclasses.replace(config, d_model=12)
      cut = logits(target, fit(new, config, target, scores))
      total += float(np.square(cut - logits(source, params)).mean()) / len(models)
    return total

  losses = {by: lost(by) for by in ('principal', 'activations', 'random')}
  print('mean squared change of logits:', losses)
  assert losses['principal'] < min(losses['activations'], losses['random'])


def test_arms_start_from_such_cuts_and_load_from_their_configuration(tmp_path):
  parent = override(tiny.config(60), {'name': 'parent', 'transforms': (), 'eval.samples': 0, 'eval.every': 60})
  arms = {'parent': parent}
  start = {'init.arm': 'parent', 'init.sequences': 16, 'train.steps': 0}
  for by, changes in {
    'flap': {'model.d_ff': 20},
    'principal': {'model.d_model': 12, 'model.tied': False},
    'activations': {'model.d_model': 12},
    'rotated': {'model.tied': False},
  }.items():
    arms[by] = override(parent, {**start, **changes, 'init.by': 'principal' if by == 'rotated' else by})
  loss = {}
  for name, config in arms.items():
    assert train.run(override(check(config, 'config'), {'name': name}), tmp_path, name) == EXIT_DONE
    loss[name] = json.loads((tmp_path / 'arms' / name / 'run.json').read_text())['summary']['loss']
  assert loss['rotated'] == pytest.approx(loss['parent'], abs=1e-4)
  config, params, _ = load_model(tmp_path / 'arms' / 'principal' / 'model')
  assert config == arms['principal'].model
  assert params['layers']['q'].shape == (2, 12, 2, 8)


@pytest.mark.parametrize(
  'changes,message',
  [
    ({'model.tied': True}, 'init.by=principal: model.tied=true: .*allowed: false'),
    ({'model.norm': 'layer'}, 'init.by=principal: model.norm=layer: .*allowed: rms'),
    ({'model.post_norms': True}, 'init.by=principal: model.post_norms=true: .*allowed: false'),
  ],
)
def test_families_whose_stream_cannot_be_rotated(changes, message):
  arm = override(tiny.config(4), {'init.arm': 'x', 'init.by': 'principal', 'model.tied': False, **changes})
  with pytest.raises(ConfigError, match=message) as error:
    check(arm, 'config')
  assert '\n' not in str(error.value)
