"""Wanda and RIA layer by layer: against a loop by hand, against the dense model's activations, and where neither is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from slm_jax.config import ConfigError, check, override
from slm_jax.model import decoder
from slm_jax.model.api import Feature
from slm_jax.model.config import ModelConfig
from slm_jax.prune.matrices import SITES, matrices, put
from slm_jax.prune.sparse import OneShot, sparse

CONFIG = ModelConfig(
  vocab_size=32, d_model=16, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=4, d_ff=24, max_len=16, init_std=0.3
)
MODEL = decoder.build(CONFIG)


@functools.cache
def params():
  return jax.jit(MODEL.init)(jax.random.PRNGKey(0))


def text():
  """Two batches, ragged."""
  rng = np.random.default_rng(0)
  for _ in range(2):
    segments = (np.arange(8) < rng.integers(3, 9, 6)[:, None]).astype(np.int32)
    yield {'inputs': jnp.asarray(rng.integers(0, 32, (6, 8)), jnp.int32), 'segments': jnp.asarray(segments)}


def pruned(**settings):
  return {name: np.asarray(w) for name, w in matrices(sparse(OneShot(**settings), MODEL, params(), text(), 0)).items()}


def norms(weights, into, layer):
  """||X_j|| over the tokens, of what goes into a layer's matrices."""
  total = 0.0
  for batch in text():
    x = MODEL.features(weights, batch, [Feature(into, layer + 1)])[1][Feature(into, layer + 1)]
    real = np.asarray(batch['segments']) > 0
    total = total + (np.asarray(x, np.float64).reshape(*real.shape, -1)[real] ** 2).sum(0)
  return np.sqrt(total)


def by_hand(criterion, keep):
  """The loop of github.com/locuslab/wanda, lib/prune.py: all matrices of a layer by the activations that it has dense,
  once the layers before it are pruned. Of each output, so many inputs with the largest scores stay."""
  weights = params()
  for layer in range(CONFIG.n_layers):
    new = {}
    for name, w_LIO in matrices(weights).items():
      w, x = np.asarray(w_LIO[layer], np.float64), norms(weights, SITES[name].into, layer)
      size = abs(w)
      score = size * x[:, None]
      if criterion == 'ria':
        score = (size / size.sum(0) + size / size.sum(1, keepdims=True)) * np.sqrt(x)[:, None]
      stays = np.argsort(np.argsort(-score, axis=0), axis=0) < keep * len(w)
      new[name] = w_LIO.at[layer].set(jnp.asarray(w * stays, jnp.float32))
    weights = put(weights, new)
  return {name: np.asarray(w) for name, w in matrices(weights).items()}


@pytest.mark.parametrize('criterion', ['wanda', 'ria'])
def test_layer_by_layer_is_the_official_loop(criterion):
  found = pruned(criterion=criterion, sparsity=0.5, pattern='output', activations='layerwise')
  for name, expected in by_hand(criterion, 0.5).items():
    np.testing.assert_array_equal(found[name], expected, name)


@pytest.mark.parametrize('criterion', ['wanda', 'ria'])
@pytest.mark.parametrize('how', [{'pattern': 'output'}, {'pattern': '2:4'}, {'allocation': 'erk'}], ids=str)
def test_the_first_layer_is_that_of_the_dense_activations_and_later_ones_are_not(criterion, how):
  dense, layerwise = (pruned(criterion=criterion, activations=a, **how) for a in ('dense', 'layerwise'))
  for name in dense:
    np.testing.assert_array_equal(dense[name][0], layerwise[name][0], name)
    np.testing.assert_array_equal((dense[name] == 0).sum((1, 2)), (layerwise[name] == 0).sum((1, 2)), name)
  for layer in range(1, CONFIG.n_layers):
    assert any((dense[name][layer] != layerwise[name][layer]).any() for name in dense)


def test_dense_is_what_there_was_before():
  assert OneShot().activations == 'dense'


@pytest.mark.parametrize(
  'settings, message',
  [
    ({'criterion': 'magnitude'}, 'is for wanda and ria; criterion=magnitude reads none; allowed: dense'),
    ({'criterion': 'random'}, 'criterion=random reads none'),
    ({'criterion': 'first_order'}, 'criterion=first_order reads none'),
    ({'criterion': 'obd'}, 'criterion=obd reads none'),
    ({'criterion': 'none'}, 'criterion=none reads none'),
    ({'criterion': 'sparsegpt'}, 'criterion=sparsegpt takes them so in any case; allowed: dense'),
    ({'criterion': 'wanda', 'allocation': 'owl'}, 'allocation=owl compares the scores of all layers; allowed: uniform'),
    ({'criterion': 'ria', 'allocation': 'global'}, 'allocation=global compares the scores of all layers'),
    ({'criterion': 'ria', 'allocation': 'tensor'}, 'allocation=tensor compares the scores of all layers'),
    ({'criterion': 'wanda', 'compensate': 'least_squares'}, 'compensate=least_squares changes what later layers'),
  ],
)
def test_where_it_has_no_meaning_it_is_refused(settings, message):
  changes = {'init.arm': 'x', 'init.sparse': OneShot(**settings, activations='layerwise')}
  with pytest.raises(ConfigError, match=f'init.sparse.activations=layerwise: .*{message}') as error:
    check(override(tiny.config(4), changes), 'config')
  assert '\n' not in str(error.value)
