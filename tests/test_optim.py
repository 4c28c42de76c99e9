"""Optimisers and schedules against optax's own, with numbers traced."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from slm_jax.optim import OptimConfig, optimizer, schedule


def params():
  keys = jax.random.split(jax.random.PRNGKey(0), 5)
  return {
    'embed': {'tokens': jax.random.normal(keys[0], (10, 8))},
    'layers': {
      'attn_norm': jnp.ones((2, 8)),
      'q': jax.random.normal(keys[1], (2, 8, 2, 4)),
      'o': jax.random.normal(keys[2], (2, 2, 4, 8)),
      'up_bias': jnp.ones((2, 16)),
      'up': jax.random.normal(keys[3], (2, 8, 16)),
    },
  }


def apply(tx, grads, p):
  return optax.apply_updates(p, tx.update(grads, tx.init(p), p)[0])


def test_adamw_is_optax_adamw_and_spares_norms_and_biases():
  config = OptimConfig(learning_rate=1e-2, warmup=0, schedule='constant', weight_decay=0.3, clip=0.0)
  opt = optimizer(config, 10)
  ours = apply(opt.make({k: jnp.float32(v) for k, v in opt.hparams.items()}), params(), params())
  mask = jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in ('tokens', 'q', 'o', 'up'), params())
  reference = apply(optax.adamw(1e-2, 0.9, 0.95, 1e-8, weight_decay=0.3, mask=mask), params(), params())
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, reference)


def test_adamw_follows_its_schedule_as_optax_adamw_does():
  """Over a warm-up and a decay, with gradients that change and a decay that is multiplied by the learning rate."""
  config = OptimConfig(learning_rate=1e-2, warmup=5, b1=0.8, b2=0.9, weight_decay=0.3, clip=0.0)
  opt = optimizer(config, 20)
  mask = jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in ('tokens', 'q', 'o', 'up'), params())
  warm, cosine = optax.linear_schedule(2e-3, 1e-2, 4), optax.cosine_decay_schedule(1e-2, 15, alpha=0.1)
  rate = optax.join_schedules([warm, cosine], [5])
  both = [
    opt.make({k: jnp.float32(v) for k, v in opt.hparams.items()}),
    optax.adamw(rate, 0.8, 0.9, 1e-8, weight_decay=0.3, mask=mask),
  ]
  trained = []
  for tx in both:
    p, state, update = params(), tx.init(params()), jax.jit(tx.update)
    for i in range(20):
      updates, state = update(jax.tree.map(lambda x, i=i: jnp.cos(i + 3 * x), p), state, p)
      p = optax.apply_updates(p, updates)
    trained.append(p)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *trained)


@pytest.mark.parametrize('name', ['adamw', 'muon', 'adafactor'])
def test_the_first_update_is_that_of_a_constant_rate_times_the_warm_up(name):
  """Its decay as well."""
  config = OptimConfig(name, learning_rate=1e-2, warmup=8)
  first = []
  for its in (config, dataclasses.replace(config, schedule='constant', warmup=0)):
    opt = optimizer(its, 20)
    tx = opt.make({k: jnp.float32(v) for k, v in opt.hparams.items()})
    grads = jax.tree.map(jnp.cos, params())
    first.append(tx.update(grads, tx.init(params()), params())[0])
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b / 8, rtol=1e-4, atol=1e-9), *first)


@pytest.mark.parametrize('name', ['adamw', 'muon', 'adafactor'])
def test_without_a_gradient_matrices_shrink_and_norms_and_biases_stay(name):
  opt = optimizer(OptimConfig(name, learning_rate=1e-2, warmup=0, schedule='constant', weight_decay=0.3), 10)
  zeros = jax.tree.map(jnp.zeros_like, params())
  after = apply(opt.make({k: jnp.float32(v) for k, v in opt.hparams.items()}), zeros, params())

  def check(path, new, old):
    factor = 1 if path[-1].key in ('attn_norm', 'up_bias') else 1 - 1e-2 * 0.3
    np.testing.assert_allclose(new, factor * old, rtol=1e-5)

  jax.tree_util.tree_map_with_path(check, after, params())


@pytest.mark.parametrize('name', ['adamw', 'muon', 'adafactor'])
def test_every_optimiser_descends_and_takes_traced_numbers(name):
  opt = optimizer(OptimConfig(name=name, learning_rate=1e-2, warmup=0), 100)

  @jax.jit
  def step(p, state, hparams):
    grads = jax.grad(lambda p: sum((x**2).sum() for x in jax.tree.leaves(p)))(p)
    updates, state = opt.make(hparams).update(grads, state, p)
    return optax.apply_updates(p, updates), state

  def final(hparams):
    p = params()
    state = opt.make(hparams).init(p)
    for _ in range(20):
      p, state = step(p, state, hparams)
    return sum(float((x**2).sum()) for x in jax.tree.leaves(p))

  hparams = {k: jnp.float32(v) for k, v in opt.hparams.items()}
  start = sum(float((x**2).sum()) for x in jax.tree.leaves(params()))
  slow = final(hparams | {'optim.learning_rate': jnp.float32(1e-3)})
  assert final(hparams) < slow < start
  assert final(hparams | {'optim.weight_decay': jnp.float32(5.0)}) < final(hparams)
  assert step._cache_size() == 1


@pytest.mark.parametrize('name', ['adamw', 'muon', 'adafactor'])
def test_parameters_of_bfloat16_have_an_optimiser_of_float32(name):
  opt = optimizer(OptimConfig(name, learning_rate=1e-2, warmup=0), 10)
  tx, narrow = opt.make({k: jnp.float32(v) for k, v in opt.hparams.items()}), optax.tree.cast(params(), jnp.bfloat16)
  state = tx.init(narrow)
  updates, after = tx.update(narrow, state, narrow)
  floats = [x for x in jax.tree.leaves((state, updates)) if jnp.issubdtype(x.dtype, jnp.floating)]
  assert {str(x.dtype) for x in floats} == {'float32'}
  assert [x.dtype for x in jax.tree.leaves(state)] == [x.dtype for x in jax.tree.leaves(after)]
  wide = optax.tree.cast(narrow, jnp.float32)
  jax.tree.map(np.testing.assert_array_equal, updates, tx.update(wide, tx.init(wide), wide)[0])


def test_muon_treats_each_layer_as_its_own_matrix():
  opt = optimizer(
    OptimConfig(name='muon', learning_rate=1.0, warmup=0, schedule='constant', weight_decay=0.0, clip=0), 9
  )
  tx = opt.make({k: jnp.float32(v) for k, v in opt.hparams.items()})
  grads = params()
  both = tx.update(grads, tx.init(params()), params())[0]['layers']['up']
  for i in range(2):
    one = jax.tree.map(lambda x: x, grads)
    one['layers'] = {k: v[i : i + 1] for k, v in grads['layers'].items()}
    alone = tx.update(one, tx.init(one), one)[0]['layers']['up']
    np.testing.assert_allclose(alone[0], both[i], rtol=1e-4, atol=1e-5)


def test_muon_makes_what_a_matrix_is_multiplied_by_orthogonal():
  """Of attention, heads and their entries together are the inputs of `o` and the outputs of the others."""
  flat = {'q': (8, 8), 'k': (8, 4), 'v': (8, 4), 'o': (8, 8), 'gate': (8, 16), 'up': (8, 16), 'down': (16, 8)}
  given = {**flat, 'q': (8, 2, 4), 'k': (8, 1, 4), 'v': (8, 1, 4), 'o': (2, 4, 8)}
  keys = jax.random.split(jax.random.PRNGKey(0), len(flat))
  grads = {name: jax.random.normal(key, (2, *flat[name])) for key, name in zip(keys, flat, strict=True)}
  layers = {'layers': {name: x.reshape(2, *given[name]) for name, x in grads.items()}}
  opt = optimizer(OptimConfig('muon', weight_decay=0.0, clip=0), 9)
  tx = opt.make({k: jnp.float32(v) for k, v in opt.hparams.items()})
  updates = jax.jit(tx.update)(layers, tx.init(layers), layers)[0]['layers']
  for name, update in updates.items():
    for matrix in np.asarray(update).reshape(2, *flat[name]):
      singular = np.linalg.svd(matrix)[1]
      assert singular.max() / singular.min() < 2, name  # nearly orthogonal


def test_clipping_bounds_the_global_norm_and_zero_means_off():
  opt = optimizer(OptimConfig(warmup=0, schedule='constant', learning_rate=1.0, weight_decay=0.0, clip=1.0), 9)
  tx = opt.make({k: jnp.float32(v) for k, v in opt.hparams.items()})
  clip = optax.clip_by_global_norm(1.0)
  expected = clip.update(params(), clip.init(params()))[0]
  # Adam's first moment shows what came in: mu = (1 - b1) * clipped gradient.
  state = tx.update(params(), tx.init(params()), params())[1]
  mu = next(s.mu for s in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, 'mu')) if hasattr(s, 'mu'))
  jax.tree.map(lambda m, g: np.testing.assert_allclose(m, 0.1 * g, rtol=1e-5), mu, expected)


@pytest.mark.parametrize('name', ['constant', 'linear', 'cosine', 'wsd'])
def test_schedules(name):
  config = OptimConfig(schedule=name, warmup=10, decay=0.25, final=0.1)
  shape = np.array([schedule(config, 100)(jnp.int32(t)) for t in range(101)])
  assert shape[0] == pytest.approx(0.1)  # the first step learns already
  assert shape[9] == shape.max() == 1
  assert shape[100] == pytest.approx(1.0 if name == 'constant' else 0.1)
  assert (np.diff(shape[10:]) <= 1e-7).all()
  if name == 'wsd':
    assert (shape[10:76] == 1).all()
    assert shape[88] == pytest.approx(1 - 0.9 * (0.88 - 0.75) / 0.25, rel=1e-5)
  if name == 'linear':
    reference = optax.linear_schedule(1.0, 0.1, 90)
    np.testing.assert_allclose(shape[10:], [reference(t - 10) for t in range(10, 101)], rtol=1e-5)
  if name == 'cosine':
    reference = optax.cosine_decay_schedule(1.0, 90, alpha=0.1)
    np.testing.assert_allclose(shape[10:], [reference(t - 10) for t in range(10, 101)], rtol=1e-5)
