"""Optimisers and schedules against optax's own, with numbers traced."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from slm_jax import optim
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
  rate = optax.join_schedules([warm, cosine], [4])
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


# ---------------------------------------------------------------------------------------------------------------- muon

AS_MATRIX = {'q': (8, 8), 'k': (8, 4), 'v': (8, 4), 'o': (8, 8), 'gate': (8, 16), 'up': (8, 16), 'down': (16, 8)}


def whole_model():
  """Shapes of all kinds of parameters: those that Muon trains, and those that it must not."""
  return {
    'embed': {'tokens': (10, 8), 'positions': (6, 8)},
    'head': (8, 10),
    'final_norm': (8,),
    'features': {'1_to_2': (8, 6)},
    'layers': {
      'attn_norm': (2, 8),
      'mlp_norm_bias': (2, 8),
      'q_norm': (2, 4),
      'up_bias': (2, 16),
      'q': (2, 8, 2, 4),
      'k': (2, 8, 1, 4),
      'v': (2, 8, 1, 4),
      'o': (2, 2, 4, 8),
      **{name: (2, *AS_MATRIX[name]) for name in ('gate', 'up', 'down')},
    },
  }


def draws(seed):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda shape: rng.normal(size=shape), whole_model(), is_leaf=lambda x: isinstance(x, tuple))


def newton_schulz(x):
  """github.com/KellerJordan/Muon, zeropower_via_newtonschulz5, without its bfloat16."""
  tall = x.shape[0] > x.shape[1]
  x = x.T if tall else x
  x = x / np.linalg.norm(x)
  for _ in range(5):
    a = x @ x.T
    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
  return x.T if tall else x


def reference_muon(w, g, momentum, beta, shape):
  """muon_update of the same file for each layer: momentum.lerp_(g, 1 - beta), update = g.lerp_(momentum, beta); times
  the scale of Moonlight, arXiv 2502.16982, in place of its own."""
  momentum[:] = momentum + (1 - beta) * (g - momentum)
  mixed = g + beta * (momentum - g)
  update = np.stack([newton_schulz(x.reshape(shape)) for x in mixed]).reshape(w.shape)
  return 0.2 * np.sqrt(max(shape)) * update


def reference_adam(g, m, v, b1, b2, eps, t):
  m[:], v[:] = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
  return m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)


def test_muon_is_keller_jordans_with_adamw_for_all_that_is_no_matrix_of_a_layer():
  """Four steps in float64, with a decay, by the published formulas."""
  lr, decay, b1, b2, eps = 1e-2, 0.3, 0.8, 0.95, 1e-8
  config = OptimConfig('muon', lr, warmup=0, schedule='constant', weight_decay=decay, b1=b1, b2=b2, eps=eps, clip=0.0)
  opt = optimizer(config, 10)
  tx = opt.make({k: jnp.float32(v) for k, v in opt.hparams.items()})
  ours = jax.tree.map(jnp.float32, draws(0))
  state, update = tx.init(ours), jax.jit(tx.update)
  theirs = jax.tree.map(lambda x: np.asarray(x, np.float64), ours)
  m, v = jax.tree.map(np.zeros_like, theirs), jax.tree.map(np.zeros_like, theirs)
  for t in range(1, 5):
    grads = jax.tree.map(jnp.float32, draws(t))
    updates, state = update(grads, state, ours)
    ours = optax.apply_updates(ours, updates)

    def step(path, w, g, m, v, t=t):
      name, g = path[-1].key, np.asarray(g, np.float64)
      if path[0].key == 'layers' and name in AS_MATRIX:
        direction = reference_muon(w, g, m, b2, AS_MATRIX[name])
      else:
        direction = reference_adam(g, m, v, b1, b2, eps, t)
      matrix = 'norm' not in name and 'bias' not in name
      return w - lr * (direction + decay * matrix * w)

    theirs = jax.tree_util.tree_map_with_path(step, theirs, grads, m, v)

    def close(path, a, b):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(close, ours, theirs)


def test_the_state_of_muon_has_the_structure_of_optax_contrib_muon():
  """With which checkpoints were written until 2026-11-30: they are resumed."""
  before = optax.chain(
    optax.contrib.muon(1.0, muon_weight_dimension_numbers=lambda p: optim._dimensions(p), consistent_rms=0.2),
    optax.scale(-1.0),
  )
  shapes = jax.tree.map(
    lambda s: jax.ShapeDtypeStruct(s, jnp.float32), whole_model(), is_leaf=lambda x: type(x) is tuple
  )
  config = OptimConfig('muon')
  ours = jax.eval_shape(optax.chain(optim.muon(config), optax.identity()).init, shapes)
  assert jax.tree.structure(ours) == jax.tree.structure(jax.eval_shape(before.init, shapes))


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


SCHEDULES = typing.get_args(typing.get_type_hints(OptimConfig)['schedule'])


def shape_of(name, steps, **settings):
  return np.array(schedule(OptimConfig(schedule=name, **settings), steps)(jnp.arange(steps)))


@pytest.mark.parametrize('name', SCHEDULES)
@pytest.mark.parametrize('steps, warmup', [(200, 0), (200, 1), (200, 20), (100, 99), (7, 3), (2, 1), (20, 18)])
@pytest.mark.parametrize('final', [0.1, 0.0, 0.07])
def test_the_peak_is_reached_at_the_end_of_the_warm_up_and_final_in_the_last_step(name, steps, warmup, final):
  """Exactly. After the peak the learning rate never rises."""
  shape = shape_of(name, steps, warmup=warmup, final=final, decay=0.2)
  peak = max(warmup, 1) - 1
  np.testing.assert_allclose(shape[: peak + 1], (1 + np.arange(peak + 1)) / max(warmup, 1), rtol=1e-6)
  assert shape[peak] == shape.max() == 1
  assert shape[-1] == np.float32(1.0 if name == 'constant' else final)
  assert (np.diff(shape[peak:]) <= 0).all()


@pytest.mark.parametrize('name', SCHEDULES)
@pytest.mark.parametrize('warmup', [20, 30])
def test_a_warm_up_as_long_as_the_run_is_all_that_there_is(name, warmup):
  np.testing.assert_allclose(shape_of(name, 20, warmup=warmup), np.arange(1, 21) / warmup, rtol=1e-6)


def test_the_shapes_between_the_peak_and_the_end():
  steps, settings = 100, {'warmup': 11, 'final': 0.1}
  after = np.arange(90)  # from the peak in step 10, counted from 0, to the last step
  for name, reference in (
    ('linear', optax.linear_schedule(1.0, 0.1, 89)),
    ('cosine', optax.cosine_decay_schedule(1.0, 89, alpha=0.1)),
  ):
    np.testing.assert_allclose(shape_of(name, steps, **settings)[10:], [reference(t) for t in after], rtol=1e-5)
  wsd = shape_of('wsd', steps, **settings, decay=0.25)
  assert (wsd[10:75] == 1).all()
  np.testing.assert_allclose(wsd[75:], 1 - 0.9 * np.arange(1, 26) / 25, rtol=1e-5)  # 25 steps of 100
  overlap = {'warmup': 81, 'final': 0.1, 'decay': 0.25}  # the warm-up leaves 19 of the 25
  np.testing.assert_array_equal(shape_of('wsd', steps, **overlap), shape_of('linear', steps, **overlap))


@pytest.mark.parametrize('name', SCHEDULES)
def test_the_last_update_of_a_run_has_the_final_learning_rate(name):
  """What the step logs, and what the optimiser does, count alike."""
  steps = 6
  config = OptimConfig(learning_rate=1e-2, warmup=2, schedule=name, weight_decay=0.0, clip=0.0, b1=0.0, b2=0.0)
  opt = optimizer(config, steps)
  hparams = {k: jnp.float32(v) for k, v in opt.hparams.items()}
  tx = opt.make(hparams)
  w = {'embed': {'tokens': jnp.ones((1, 1))}}
  state, sizes = tx.init(w), []
  for _ in range(steps):
    updates, state = tx.update(w, state, w)
    sizes.append(-float(updates['embed']['tokens'][0, 0]))
  np.testing.assert_allclose(sizes, [opt.rate(hparams, jnp.int32(t)) for t in range(steps)], rtol=1e-6)
  assert sizes[-1] == pytest.approx(1e-2 if name == 'constant' else 1e-3, rel=1e-6)
