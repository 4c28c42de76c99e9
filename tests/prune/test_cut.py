"""A cut model is the masked one, made physically smaller."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.config import ConfigError
from slm_jax.model import decoder
from slm_jax.model.config import ModelConfig
from slm_jax.prune.cut import cut, keep_channels, keep_layers

LLAMA = ModelConfig(vocab_size=64, d_model=32, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=48, max_len=32)
GPT2 = dataclasses.replace(LLAMA, norm='layer', mlp='gelu', bias=True, positions='learned', n_kv_heads=4)


def noisy(config):
  """Parameters without the zeros and ones of an initialiser."""
  params = decoder.build(config).init(jax.random.PRNGKey(0))
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.PRNGKey(1), len(leaves))
  return tree.unflatten([x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])


def logits(config, params):
  tokens = jnp.arange(24).reshape(2, 12) % 60
  return decoder.Decoder(config).apply({'params': params}, tokens)


@pytest.mark.parametrize('config', [LLAMA, GPT2])
def test_cut_channels_equal_masked_channels(config):
  params, small = noisy(config), dataclasses.replace(config, d_ff=16)
  cut_params = cut(params, config, small)
  kept_down = np.asarray(cut_params['layers']['down'])
  masked = dict(params['layers'])
  for layer in range(config.n_layers):
    rows = {row.tobytes() for row in kept_down[layer]}
    dropped = [i for i, row in enumerate(np.asarray(masked['down'][layer])) if row.tobytes() not in rows]
    assert len(dropped) == 32
    masked['down'] = masked['down'].at[layer, jnp.array(dropped)].set(0)
  np.testing.assert_allclose(logits(small, cut_params), logits(config, {**params, 'layers': masked}), atol=1e-5)


@pytest.mark.parametrize('config', [LLAMA, GPT2])
def test_cut_layers_equal_layers_that_do_nothing(config):
  params, small = noisy(config), dataclasses.replace(config, n_layers=2)
  idle = dict(params['layers'])
  for name in ('o', 'down', 'o_bias', 'down_bias'):  # layers 1 and 3 add nothing to the residual stream
    if name in idle:
      idle[name] = idle[name].at[jnp.array([1, 3])].set(0)
  np.testing.assert_allclose(
    logits(small, cut(params, config, small)), logits(config, {**params, 'layers': idle}), atol=1e-5
  )


def test_every_other_layer():
  assert [keep_layers({'x': np.arange(n)}, m)['x'].tolist() for n, m in ((4, 2), (6, 3), (6, 4), (3, 3))] == [
    [0, 2],
    [0, 2, 4],
    [0, 1, 3, 4],
    [0, 1, 2],
  ]


def test_the_strongest_channels_stay_and_scale_between_up_and_down_does_not_matter():
  rng = np.random.default_rng(0)
  layers = {'up': rng.normal(size=(1, 8, 6)), 'down': rng.normal(size=(1, 6, 8))}
  layers['down'][0, 2] = 0  # a dead channel
  kept = keep_channels(layers, 5)
  assert not (kept['down'] == 0).all(axis=2).any()
  scaled = {'up': layers['up'] * 4.0, 'down': layers['down'] / 4.0}
  np.testing.assert_allclose(keep_channels(scaled, 3)['up'] / 4.0, keep_channels(layers, 3)['up'])


@pytest.mark.parametrize(
  'changes,message',
  [
    ({'d_model': 64}, 'differs in d_model'),
    ({'n_layers': 5}, 'model.n_layers=5: larger than 4'),
    ({'d_ff': 99}, 'd_ff'),
  ],
)
def test_impossible_cuts(changes, message):
  with pytest.raises(ConfigError, match=message):
    cut(noisy(LLAMA), LLAMA, dataclasses.replace(LLAMA, **changes))
