"""Pruning while training: what stays 0, what comes back, by what, and with what moments."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import toy_batch, toy_model

from slm_jax.optim import OptimConfig, optimizer
from slm_jax.prune.allocate import allocate
from slm_jax.prune.matrices import matrices
from slm_jax.prune.schedules import sparsity_at
from slm_jax.prune.transform import DROP, Rules, prune, through, without_moments
from slm_jax.step import Transform, chain, init_state, make_step

MODEL = toy_model()
SIZE = 64  # weights of a matrix of a layer
ADAM = optimizer(OptimConfig(learning_rate=1e-2, warmup=0, weight_decay=0.5), 100)
REGROWING = [Rules(method='set'), Rules('first_order', method='rigl'), Rules(schedule='cyclic')]


def start(transform, optim=ADAM, model=MODEL):
  return init_state(jax.random.PRNGKey(0), model.init(jax.random.PRNGKey(1)), optim, transform)


def walk(transform, steps, optim=ADAM, state=None, model=MODEL):
  """The states before the first step and after each."""
  step = jax.jit(make_step(model, optim, transform))
  states = [start(transform, optim, model) if state is None else state]
  for i in range(steps):
    states.append(step(states[-1], toy_batch(i), {})[0])
  assert step._cache_size() == 1
  return states


def mask_of(state):
  return np.asarray(state.slots['prune'].masks['layers']['up'])


def up(state):
  return np.asarray(state.params['layers']['up'])


def best(scores, k):
  """The k largest."""
  return scores >= np.sort(scores, axis=None)[-k]


def equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


# ---------------------------------------------------------------------------------------------------- what stays 0


def test_all_at_once_at_the_end():
  """start = end: one refresh, at the last step."""
  states = walk(prune(0.75, 6, 6, 5), 8)
  assert [int(mask_of(s).sum()) for s in states] == [2 * SIZE] * 6 + [2 * SIZE // 4] * 3


@pytest.mark.parametrize(
  'rules',
  [
    Rules('first_order', 'output'),
    Rules('movement', '4x4', schedule='iterative'),
    Rules('random', '2:4', schedule='one_shot'),
    Rules(allocation='owl'),
    *REGROWING,
  ],
)
def test_pruned_weights_are_zero_through_a_hundred_adam_steps(rules):
  """Bit for bit, with weight decay, after every step; counts are the schedule's; nested, unless they regrow."""
  states = walk(prune(0.5, 10, 60, 5, rules), 100)
  nested = True
  for t, (before, state) in enumerate(zip(states, states[1:], strict=False), 1):
    mask = mask_of(state)
    assert (up(state)[~mask] == 0).all()
    assert (up(state)[mask_of(before) & ~mask] == 0).all()
    nested &= bool((mask <= mask_of(before)).all())
    if 10 <= t <= 60 and (t - 10) % 5 == 0 and rules.pattern in ('layer', 'output'):
      keep = 1 - float(sparsity_at(rules.schedule, jnp.int32(t), 10, 60, jnp.float32(0.5)))
      assert mask.sum() == pytest.approx(2 * SIZE * keep, abs=1.001)
  assert nested != rules.regrows
  final = mask_of(states[-1])
  assert final.sum() == SIZE
  np.testing.assert_array_equal(final, mask_of(states[60]))  # after `end` they stay
  assert (up(states[-1])[final] != 0).all()
  equal(chain(prune(0.5, 10, 60, 5, rules)).final(states[-1].slots, states[-1].params), states[-1].params)


@pytest.mark.parametrize('name', ['muon', 'adafactor'])
def test_other_optimisers_revive_nothing_either(name):
  """Muon's steps are dense whatever the gradients."""
  optim = optimizer(OptimConfig(name, learning_rate=1e-2, warmup=0), 100)
  for state in walk(prune(0.5, 2, 12, 2, Rules(method='rigl')), 16, optim):
    assert (up(state)[~mask_of(state)] == 0).all()


@functools.cache
def unpruned():
  return walk(chain(), 10)[-1]


@pytest.mark.parametrize('rules', [Rules(), Rules('movement', method='ste'), *REGROWING[:2]])
def test_sparsity_zero_is_plain_training(rules):
  ours, plain = walk(prune(0.0, 1, 8, 2, rules), 10)[-1], unpruned()
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), ours.params, plain.params)
  assert mask_of(ours).all()


# ------------------------------------------------------------------------------------------------------- criteria


def test_criteria_remember_the_gradients_and_the_weights_of_each_step():
  """|g w| as an average over steps, and minus the sum of g w: of the weights that the gradient was taken at."""
  spy = Transform(
    'spy',
    init=lambda key, params: (params, params),
    after=lambda slot, state, update: ((update.grads, update.before), state),
  )
  first_order = movement = np.zeros((2, 8, 8))
  both = [walk(chain(spy, prune(0.5, 99, 99, 1, Rules(c))), 3) for c in ('first_order', 'movement')]
  for one, other in zip(*both, strict=True):
    if one.step > 0:
      (grads, before) = one.slots['spy']
      gw = np.asarray(grads['layers']['up'] * before['layers']['up'])
      first_order, movement = 0.9 * first_order + 0.1 * np.abs(gw), movement - gw
    for state, expected in ((one, first_order), (other, movement)):
      np.testing.assert_allclose(state.slots['prune'].scores['layers']['up'], expected, rtol=1e-5, atol=1e-9)
  assert np.abs(movement).max() > 0


def test_masks_are_those_of_the_criterion():
  """Exactly by what it remembers; none is another's, nor magnitude's of the weights that are about to be pruned."""
  spy = Transform('spy', init=lambda key, params: params, after=lambda slot, state, update: (state.params, state))
  masks = {}
  for criterion in ('random', 'first_order', 'movement'):
    slots = walk(chain(spy, prune(0.5, 3, 3, 1, Rules(criterion, schedule='one_shot'))), 3)[-1].slots
    masks[criterion] = np.asarray(slots['prune'].masks['layers']['up'])
    if criterion != 'random':
      scores = np.asarray(slots['prune'].scores['layers']['up'])
      np.testing.assert_array_equal(masks[criterion], [best(s, SIZE // 2) for s in scores], criterion)
  masks['magnitude'] = np.array([best(np.abs(w), SIZE // 2) for w in np.asarray(slots['spy']['layers']['up'])])
  for one, other in itertools.combinations(masks, 2):
    assert (masks[one] != masks[other]).mean() > 0.1, (one, other)


def uneven_model():
  """The toy with two matrices: `q` is square, `up` is three times as wide."""

  def init(key):
    params = MODEL.init(key)
    up = jax.random.normal(key, (2, 8, 24)) * 0.3
    return {**params, 'layers': {'q': params['layers']['up'], 'up': up}}

  def hidden(params, batch):
    x = params['embed']['tokens'][batch['inputs']]
    for q, up in zip(params['layers']['q'], params['layers']['up'], strict=True):
      x = x + jnp.tanh(x @ q) + jnp.tanh(x @ up).reshape(*x.shape, 3).sum(-1)
    return x

  return MODEL._replace(init=init, hidden=hidden, features=lambda params, batch, wanted: (hidden(params, batch), {}))


@pytest.mark.parametrize('method', ['prune', 'set'])
def test_the_allocation_says_how_many_each_matrix_keeps(method):
  rules = Rules(allocation='erk', schedule='one_shot', method=method)
  state = walk(prune(0.5, 1, 3, 1, rules), 3, model=uneven_model())[-1]
  masks, w = matrices(state.slots['prune'].masks), matrices(state.params)
  expected, uniform = (allocate(w, 0.5, allocation) for allocation in ('erk', 'uniform'))
  for name, mask in masks.items():
    np.testing.assert_array_equal(mask.sum((1, 2)), expected[name], name)
    assert (np.abs(expected[name] - uniform[name]) > 4).all()


# ------------------------------------------------------------------------------------------------- what comes back


def moments(state):
  """Everything in the optimiser's state that is shaped like the matrix."""
  return [np.asarray(x) for x in jax.tree.leaves(state.opt_state) if x.shape == (2, 8, 8)]


@pytest.mark.parametrize(
  'rules, optim, number',
  [*[(rules, ADAM, 2) for rules in REGROWING], (REGROWING[0], optimizer(OptimConfig('muon', warmup=0), 100), 1)],
)
def test_what_comes_back_is_zero_and_has_no_moments(rules, optim, number):
  returned = 0
  states = walk(prune(0.5, 5, 45, 5, rules), 30, optim)
  for before, state in zip(states, states[1:], strict=False):
    back = mask_of(state) & ~mask_of(before)
    returned += back.sum()
    assert (up(state)[back] == 0).all()
    assert len(moments(state)) == number
    for m in moments(state):
      assert (m[back] == 0).all()
      assert (m[mask_of(state) & mask_of(before)] != 0).mean() > 0.9
  assert returned > 10


def test_without_moments_finds_them_by_the_tree_alone():
  params = {'layers': {'up': jnp.ones((1, 2, 2))}, 'head': jnp.ones(3)}
  entries = {'layers': {'up': jnp.zeros((1, 2, 2), bool).at[0, 0, 1].set(True)}, 'head': jnp.zeros(3, bool)}
  rows, other = {'rows': {'layers': {'up': jnp.ones((1, 2))}}}, {'layers': {'lift_up': jnp.ones((1, 2, 2))}}
  state = ({'any': [params, jnp.ones(())]}, rows, other)
  cleaned = without_moments(state, entries)
  assert cleaned[0]['any'][0]['layers']['up'].tolist() == [[[1, 0], [1, 1]]]
  equal(cleaned[1:], state[1:])
  equal(cleaned[0]['any'][0]['head'], params['head'])


@functools.cache
def regrown(rules):
  return walk(prune(0.5, 1, 9, 1, rules), 9)


@pytest.mark.parametrize('rules', [Rules(method='set'), Rules(method='rigl'), Rules(schedule='cyclic')])
@pytest.mark.parametrize('pattern', ['output', '2:4'])
def test_what_comes_back_keeps_to_the_pattern(rules, pattern):
  """As many in every group of four inputs; in every output as many or, where it does not divide, one more."""
  masks = [mask_of(state) for state in regrown(rules._replace(pattern=pattern))]
  assert sum(int((new & ~old).sum()) for old, new in itertools.pairwise(masks)) > 10
  counts = [mask.sum(1) if pattern == 'output' else mask.reshape(2, 2, 4, 8).sum(2) for mask in masks]
  assert {int(np.ptp(count)) for count in counts} <= ({0, 1} if pattern == 'output' else {0})
  assert (counts[-1] == (4 if pattern == 'output' else 2)).all()


def test_no_output_gives_up_more_than_the_share_that_is_exchanged():
  for method in ('set', 'rigl'):
    masks = [mask_of(state) for state in regrown(Rules(pattern='output', method=method))]
    for old, new in itertools.pairwise(masks):
      least_L = np.round((1 - DROP) * new.sum((1, 2))) // 8
      assert ((old & new).sum(1) >= least_L[:, None]).all()


def test_set_draws_what_rigl_grows_by_gradients():
  """The first refresh only prunes, so they part at the second."""
  one, other = ([mask_of(s) for s in regrown(Rules(pattern='output', method=m))] for m in ('set', 'rigl'))
  np.testing.assert_array_equal(one[1], other[1])
  for mine, theirs in zip(one[2:], other[2:], strict=True):
    assert (mine != theirs).any()


def test_rigl_grows_the_largest_gradients_and_drops_the_smallest_weights():
  """The first refresh only prunes; the next ones exchange a share that falls as a cosine, by dense gradients."""
  first, last, every = 5, 25, 5
  transform = prune(0.5, first, last, every, Rules(schedule='one_shot', method='rigl'))
  states = walk(transform, last)
  # what the step makes of the weights with the masks as they are
  as_masked = jax.jit(make_step(MODEL, ADAM, transform._replace(after=lambda slot, state, update: (slot, state))))
  for t in range(first, last + 1, every):
    before, state = states[t - 1], states[t]
    old, new = mask_of(before), mask_of(state)
    if t == first:
      assert old.all()
      continue
    grads = np.asarray(dense_gradient(before, toy_batch(t - 1)))
    moved = up(as_masked(before, toy_batch(t - 1), {})[0])
    k = SIZE // 2
    stay = round(k * (1 - DROP / 2 * (1 + np.cos(np.pi * (t - first) / (last - first)))))
    for i in range(2):
      left = best(np.where(old[i], np.abs(moved[i]), -1.0), stay)
      rest = np.where(left, -1.0, np.abs(grads[i]))
      expected = left | (best(rest, k - stay) if stay < k else False)
      np.testing.assert_array_equal(new[i], expected)
  assert (mask_of(states[10]) != mask_of(states[5])).any()


@jax.jit
def dense_gradient(state, batch):
  """Of the loss at the sparse weights, with respect to all of them."""

  def loss(params):
    logits = MODEL.head(params, MODEL.hidden(params, batch))
    nats = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, batch['targets'][..., None], -1)[..., 0]
    return (nats * batch['mask']).sum() / batch['mask'].sum()

  return jax.grad(loss)(state.params)['layers']['up']


def test_dense_gradients_do_not_reach_the_optimiser():
  """Until the first exchange, growing by gradients is plain pruning: moments, clipping and all."""
  one, other = (walk(prune(0.5, 2, 22, 10, Rules(schedule='one_shot', method=m)), 11)[-1] for m in ('rigl', 'prune'))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), one.params, other.params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), one.opt_state, other.opt_state)


# ----------------------------------------------------------------------------------------------- straight through


def test_straight_through_is_masked_forward_and_dense_backward():
  w, mask = jnp.array([3.0, -2.0, 0.5]), jnp.array([True, False, True])
  value, grad = jax.value_and_grad(lambda w: (through(mask, w) ** 2).sum())(w)
  assert value == 9.25
  np.testing.assert_array_equal(grad, [6.0, 0.0, 1.0])  # 2 x what the forward pass saw
  np.testing.assert_array_equal(jax.grad(lambda w: through(mask, w).sum())(w), [1, 1, 1])


def test_ste_keeps_the_weights_below_and_lets_them_back():
  transform = prune(0.5, 2, 40, 1, Rules(schedule='one_shot', method='ste'))
  states = walk(transform, 42)
  back = sum(int((mask_of(b) & ~mask_of(a)).sum()) for a, b in zip(states, states[1:], strict=False))
  assert back > 0
  last = states[-1]
  assert (up(last) != 0).all()
  seen = chain(transform).final(last.slots, last.params)['layers']['up']
  assert (np.asarray(seen != 0) == mask_of(last)).all()
  assert mask_of(last).sum() == SIZE
  masked = ~mask_of(states[20]) & ~mask_of(states[21])
  assert (up(states[20]) != up(states[21]))[masked].mean() > 0.9
