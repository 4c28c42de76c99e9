"""Criteria against what they claim to measure, their invariances, and stacks of layers against layers alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax.model import decoder
from slm_jax.model.api import Feature
from slm_jax.model.config import ModelConfig
from slm_jax.prune import criteria
from slm_jax.prune.choose import by_activations
from slm_jax.prune.matrices import SITES, matrices
from slm_jax.prune.stats import _strength_of_parts, collect

TINY = ModelConfig(vocab_size=32, d_model=12, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=4, d_ff=20, max_len=16)
MODEL = decoder.build(TINY)
stats_of = jax.jit(lambda params, batch: collect(MODEL, params, batch))
inputs_of = jax.jit(
  lambda params, batch: {
    kind: jnp.stack(
      list(MODEL.features(params, batch, [Feature(kind, i + 1) for i in range(TINY.n_layers)])[1].values())
    )
    for kind in ('into_qkv', 'into_o', 'into_mlp', 'into_down')
  }
)


@functools.cache
def params():
  return jax.tree.map(lambda p: p * 8 if p.ndim > 2 else p, jax.jit(MODEL.init)(jax.random.PRNGKey(0)))


@functools.cache
def batch():
  rng = np.random.default_rng(0)
  segments = (np.arange(8) < rng.integers(3, 9, 6)[:, None]).astype(np.int32)
  return {'inputs': jnp.asarray(rng.integers(0, 32, (6, 8)), jnp.int32), 'segments': jnp.asarray(segments)}


@functools.cache
def stats():
  return stats_of(params(), batch())


def some_derivatives(w):
  rng = np.random.default_rng(1)
  g, h = ({name: jnp.asarray(rng.normal(size=x.shape), jnp.float32) for name, x in w.items()} for _ in range(2))
  return g, {name: x**2 for name, x in h.items()}


def scores(w, stats, name, derivatives=None):
  g, h = derivatives or some_derivatives(w)
  return {
    'magnitude': lambda: criteria.magnitude(w),
    'predicted': lambda: criteria.predicted(w, g, h),
    'first_order': lambda: criteria.first_order(w, g),
    'obd': lambda: criteria.obd(w, h),
    'wanda': lambda: criteria.wanda(w, stats),
    'ria': lambda: criteria.ria(w, stats),
    'flap': lambda: criteria.flap(w, stats),
    'minitron': lambda: criteria.minitron(stats),
  }[name]()


CRITERIA = ['magnitude', 'predicted', 'first_order', 'obd', 'wanda', 'ria', 'flap', 'minitron']


def kept(scores, axes):
  """Masks of the larger half, among the entries along `axes`."""
  out = {}
  for name, s in scores.items():
    s = np.moveaxis(np.asarray(s), axes, range(-len(axes), 0))
    flat = s.reshape(*s.shape[: s.ndim - len(axes)], -1)
    out[name] = np.argsort(np.argsort(-flat, axis=-1, kind='stable'), axis=-1) < flat.shape[-1] // 2
  return out


def same(a, b):
  return {name: bool((a[name] == b[name]).all()) for name in a}


# -------------------------------------------------------------------------------------------------- what they measure


def test_wanda_squared_is_the_squared_error_of_deleting_that_weight():
  """||X dW^T||^2 over the tokens, of each of some hundred deletions in each matrix."""
  w = {name: np.asarray(w_LIO, np.float64) for name, w_LIO in matrices(params()).items()}
  found = jax.tree.map(np.asarray, criteria.wanda(matrices(params()), stats()))
  real = np.asarray(batch()['segments']) > 0
  inputs = jax.tree.map(lambda x: np.asarray(x, np.float64), inputs_of(params(), batch()))
  rng = np.random.default_rng(0)
  for name, w_LIO in w.items():
    x_LNI = inputs[SITES[name].into].reshape(TINY.n_layers, *real.shape, -1)[:, real]
    for _ in range(100):
      layer, i, o = (rng.integers(n) for n in w_LIO.shape)
      without_IO = w_LIO[layer].copy()
      without_IO[i, o] = 0
      error = ((x_LNI[layer] @ (without_IO - w_LIO[layer])) ** 2).sum()
      np.testing.assert_allclose(np.float64(found[name][layer, i, o]) ** 2, error, rtol=1e-5)


def test_flap_is_the_error_of_freezing_an_input_at_its_mean_as_a_z_score():
  w_LIO = matrices(params())['down']
  real = np.asarray(batch()['segments']) > 0
  x_LNI = np.asarray(inputs_of(params(), batch())['into_down'], np.float64)[:, real]
  apart_LNI = x_LNI - x_LNI.mean(1, keepdims=True)
  error_LI = ((apart_LNI[..., None] * np.asarray(w_LIO, np.float64)[:, None]) ** 2).sum((1, 3))
  expected_LI = (error_LI - error_LI.mean(1, keepdims=True)) / error_LI.std(1, keepdims=True)
  found_LI = criteria.flap({'down': w_LIO}, stats())['down']
  np.testing.assert_allclose(found_LI, expected_LI, rtol=1e-3, atol=1e-4)
  np.testing.assert_allclose(found_LI.mean(1), np.zeros(TINY.n_layers), atol=1e-5)
  np.testing.assert_allclose(found_LI.std(1), np.ones(TINY.n_layers), rtol=1e-5)


def test_ria_by_hand():
  """W[out, in] = [[1, 3], [2, 2]], norms 4 and 9 of the inputs: the formula of the paper, written out."""
  w_LIO = jnp.asarray([[[1.0, -2.0], [-3.0, 2.0]]])
  moments = (
    stats().moments['into_down']._replace(count=jnp.float32(1), mean=jnp.zeros((1, 2)), m2=jnp.array([[16.0, 81]]))
  )
  one = stats()._replace(moments={**stats().moments, 'into_down': moments})
  expected = [[[(1 / 4 + 1 / 3) * 2, (2 / 4 + 2 / 3) * 2], [(3 / 4 + 3 / 5) * 3, (2 / 4 + 2 / 5) * 3]]]
  np.testing.assert_allclose(criteria.ria({'down': w_LIO}, one)['down'], expected, rtol=1e-6)
  np.testing.assert_allclose(criteria.ria({'down': w_LIO}, one, a=0)['down'][0, 0, 0], 1 / 4 + 1 / 3, rtol=1e-6)


def test_predictions_are_exact_for_a_quadratic_loss():
  """L = b w + w^T diag(h) w / 2: deleting one weight changes it by -g w + h w^2 / 2."""
  rng = np.random.default_rng(0)
  w, b, h = rng.normal(size=(1, 3, 4)), rng.normal(size=(1, 3, 4)), rng.random((1, 3, 4))

  def loss(w):
    return (b * w + h * w**2 / 2).sum()

  found = criteria.predicted(*({'up': jnp.asarray(x)} for x in (w, b + h * w, h)))['up']
  for at in np.ndindex(w.shape):
    without = w.copy()
    without[at] = 0
    np.testing.assert_allclose(found[at], loss(without) - loss(w), rtol=1e-4, atol=1e-6)


def test_minitron_aggregates_what_each_token_gives():
  """A loop over layers, sequences and tokens, by the formulas of arXiv 2407.14679: a head's size at a token is the L2
  norm of its output; then the mean over the tokens of a sequence, then the L2 norm over sequences."""
  inputs, real = inputs_of(params(), batch()), np.asarray(batch()['segments']) > 0
  shape = (TINY.n_layers, *real.shape, TINY.n_kv_heads, TINY.n_heads // TINY.n_kv_heads, TINY.head_dim)
  z = np.asarray(inputs['into_o'], np.float64).reshape(shape)
  scores = by_activations(TINY, stats())
  width = np.zeros(TINY.d_model)
  for layer in range(TINY.n_layers):

    def aggregate(size_of, layer=layer):
      """sqrt(sum over sequences of (mean over tokens of a size)^2)"""
      total = 0.0
      for row in range(len(real)):
        sizes = [size_of(layer, row, t) for t in range(real.shape[1]) if real[row, t]]
        total = total + (sum(sizes) / len(sizes)) ** 2
      return np.sqrt(total)

    for g in range(shape[3]):
      of_group = aggregate(lambda *at, g=g: np.linalg.norm(z[at][g]))
      np.testing.assert_allclose(scores.groups[layer, g], of_group, rtol=1e-5)
      for r in range(shape[4]):
        of_head = aggregate(lambda *at, g=g, r=r: np.linalg.norm(z[at][g, r]))
        np.testing.assert_allclose(scores.queries[layer, g, r], of_head, rtol=1e-5)
    x = {kind: np.abs(np.asarray(inputs[kind], np.float64)) for kind in ('into_down', 'into_qkv', 'into_mlp')}
    np.testing.assert_allclose(scores.channels[layer], aggregate(lambda *at, x=x: x['into_down'][at]), rtol=1e-5)
    width += sum(aggregate(lambda *at, x=x, kind=kind: x[kind][at]) for kind in ('into_qkv', 'into_mlp'))
  np.testing.assert_allclose(scores.width, width, rtol=1e-5)  # layer-wise scores are summed


def test_a_head_whose_channels_take_turns_is_larger_than_one_with_a_single_channel():
  """The norm of the channels' means says 0.71 where each token has a head of length 1."""
  turns, single = np.zeros((1, 2, 2)), np.zeros((1, 2, 2))
  turns[0, 0, 0] = turns[0, 1, 1] = 1
  single[0, :, 0] = 0.9
  both = jnp.asarray(np.concatenate([turns, single], -1), jnp.float32)
  found = jnp.sqrt(_strength_of_parts(2, both, jnp.ones((1, 2), bool)))
  np.testing.assert_allclose(found, [1.0, 0.9], rtol=1e-6)


def test_a_layer_that_does_nothing_has_no_influence_and_one_that_turns_the_stream_around_has_two():
  layers = params()['layers']
  idle = {name: layers[name].at[1].set(0) for name in ('o', 'down')}
  found = stats_of({**params(), 'layers': {**layers, **idle}}, batch())
  influence = criteria.block_influence(found)
  assert influence[1] == pytest.approx(0, abs=1e-6)
  assert float(influence[jnp.array([0, 2])].min()) > 0.01
  distance = criteria.block_distance(found, 1)
  assert distance[1] == pytest.approx(0, abs=1e-3)
  two = criteria.block_distance(found, 2)
  np.testing.assert_allclose(two, [distance[0], distance[2]], atol=1e-3)  # each of a block with the idle layer in it
  assert criteria.block_distance(found, 3).shape == (1,)
  opposite = found._replace(influence=2 * found.tokens * jnp.ones(3))
  np.testing.assert_allclose(criteria.block_influence(opposite), [2, 2, 2])


# ------------------------------------------------------------------------------------------------------- what is true


def only(layer, x):
  return x[layer : layer + 1] if x.ndim > 1 else x


@pytest.mark.parametrize('name', CRITERIA)
def test_a_stack_of_layers_is_scored_layer_by_layer(name):
  """A layer alone, without the others' parameters and statistics, gets the scores that it gets in the stack."""
  w, derivatives = matrices(params()), some_derivatives(matrices(params()))
  together = scores(w, stats(), name, derivatives)
  for layer in range(TINY.n_layers):
    one = jax.tree.map(functools.partial(only, layer), (w, stats(), derivatives))
    single = scores(*one[:2], name, one[2])
    axes = (1,) if name in ('flap', 'minitron') else (1, 2)
    part = {key: x[layer : layer + 1] for key, x in together.items()}
    assert all(same(kept(single, axes), kept(part, axes)).values())
    for key in single:
      np.testing.assert_allclose(single[key], part[key], rtol=1e-5, atol=1e-6)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(together))


def rescaled(channel, factor):
  """The same function: the input of `down` is multiplied by what its weights are divided by."""
  layers = params()['layers']
  up = layers['up'].at[:, :, channel].multiply(factor)
  down = layers['down'].at[:, channel].divide(factor)
  return {**params(), 'layers': {**layers, 'up': up, 'down': down}}


def test_wanda_sees_through_a_rescaled_input_and_magnitude_does_not():
  """x_j * 16 and W_:j / 16, a power of two: nothing is rounded, so masks within an output are the same to the bit."""
  before, after = params(), rescaled(jnp.arange(0, TINY.d_ff, 3), 16.0)
  hidden = jax.jit(MODEL.hidden)
  np.testing.assert_array_equal(hidden(before, batch()), hidden(after, batch()))

  def masks(params):
    w, found = matrices(params), stats_of(params, batch())
    return kept(criteria.wanda(w, found), (1,)), kept(criteria.magnitude(w), (1,))

  (wanda, magnitude), (wanda_after, magnitude_after) = masks(before), masks(after)
  assert all(same(wanda, wanda_after).values())
  assert not same(magnitude, magnitude_after)['down']
  down = [criteria.wanda(matrices(p), stats_of(p, batch()))['down'] for p in (before, after)]
  np.testing.assert_array_equal(*down)


def test_dead_inputs_and_dead_matrices_score_nothing_and_divide_nothing():
  """A channel that is always 0, an output without weights, a matrix of zeros, no tokens at all."""
  layers = params()['layers']
  dead = {**layers, 'up': layers['up'].at[:, :, 3].set(0), 'q': layers['q'].at[:, :, 1].set(0), 'k': layers['k'] * 0}
  dying = {**params(), 'layers': dead}
  w, found = matrices(dying), stats_of(dying, batch())
  for name in CRITERIA:
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(scores(w, found, name))), name
  for name in ('wanda', 'ria'):
    down = scores(w, found, name)['down']
    assert (down[:, 3] == 0).all()
    assert (down[:, 4] > 0).all()
    assert (scores(w, found, name)['k'] == 0).all()
  nothing = stats_of(params(), {**batch(), 'segments': jnp.zeros((6, 8), jnp.int32)})
  for name in CRITERIA:
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(scores(w, nothing, name))), name
  assert np.isfinite(criteria.block_influence(nothing)).all()


def test_random_scores_are_of_the_key_and_the_name():
  w = matrices(params())
  a, b = criteria.random(w, jax.random.PRNGKey(0)), criteria.random(w, jax.random.PRNGKey(1))
  assert not same(a, b)['up']
  assert not np.array_equal(a['up'], a['gate'])
  np.testing.assert_array_equal(criteria.random({'gate': w['gate']}, jax.random.PRNGKey(0))['gate'], a['gate'])
  assert 0.4 < float(a['up'].mean()) < 0.6
