"""Settings of pruning while training: schedules, tickets, what cannot be meant, what each of them changes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from toy import toy_batch, toy_model

from slm_jax import train
from slm_jax.checkpoint import load_model
from slm_jax.config import ConfigError, arm_references, check, override
from slm_jax.experiment import Config
from slm_jax.optim import OptimConfig, optimizer
from slm_jax.prune.matrices import matrices
from slm_jax.prune.schedules import CYCLES, sparsity_at
from slm_jax.prune.transform import Prune
from slm_jax.step import Resources, init_state, make_step

MODEL = toy_model()
ADAM = optimizer(OptimConfig(learning_rate=1e-2, warmup=0), 100)


def start(transform):
  return init_state(jax.random.PRNGKey(0), MODEL.init(jax.random.PRNGKey(1)), ADAM, transform)


def equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


# -------------------------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize('schedule', ['one_shot', 'cubic', 'iterative', 'cyclic'])
def test_schedules_begin_at_zero_and_end_at_the_target(schedule):
  """Also where there is one step between, or none; the target is traced."""
  at = jax.jit(lambda step, target: sparsity_at(schedule, step, 8, 48, target))
  for target in (0.0, 0.3, 0.9):
    curve = np.array([at(jnp.int32(t), jnp.float32(target)) for t in range(60)])
    assert (curve[:8] == 0).all()
    assert (curve[48:] == np.float32(target)).all()
    assert ((curve >= 0) & (curve <= np.float32(target))).all()
    rising = (np.diff(curve) >= -1e-7).all()
    assert rising == (schedule != 'cyclic' or target == 0)
  assert at._cache_size() == 1
  assert sparsity_at(schedule, jnp.int32(5), 5, 5, jnp.float32(0.5)) == 0.5


def test_the_shapes_of_the_schedules():
  p, target = np.arange(1, 40) / 40, np.float32(0.8)
  curves = {
    s: np.array([sparsity_at(s, jnp.int32(8 + t), 8, 48, jnp.float32(target)) for t in range(41)])
    for s in ('one_shot', 'cubic', 'iterative', 'cyclic')
  }
  np.testing.assert_allclose(curves['one_shot'], target)
  np.testing.assert_allclose(curves['cubic'][1:-1], target * (1 - (1 - p) ** 3), rtol=1e-5)
  left = 1 - curves['iterative']
  np.testing.assert_allclose(left[1:] / left[:-1], 0.2 ** (1 / 40), rtol=1e-5)  # the same share each round
  length = 40 // CYCLES
  assert (curves['cyclic'][:-1:length] == 0).all()
  np.testing.assert_allclose(curves['cyclic'][:length], curves['cubic'][:-1:CYCLES], rtol=1e-5)


@pytest.mark.parametrize('end, steps', [(0.0, 100), (0.004, 100), (1.0, 1)])
def test_a_window_that_ends_before_the_first_step_is_that_step(end, steps):
  transform, _ = Prune(0.5, start=0.0, end=end, schedule='one_shot').build(resources(None, steps))
  state, _ = jax.jit(make_step(MODEL, ADAM, transform))(start(transform), toy_batch(), {})
  left = [float(mask.mean()) for mask in matrices(state.slots['prune'].masks).values()]
  np.testing.assert_allclose(left, 0.5, atol=0.02)


# ---------------------------------------------------------------------------------------------------------- tickets


def resources(load, steps=100):
  return Resources(steps=steps, seq_len=6, vocab=11, model=MODEL, load=load, folder=None)


def test_a_ticket_finished_and_rewound(tmp_path, one_fake_device):
  """Arms as users write them: prune at the end, then the same seed, masked from the start and pruned further."""
  small = override(tiny.config(4), {'eval.every': 4, 'train.steps': 4, 'transforms': ()})
  once = Prune(0.5, allocation='global', start=1.0, end=1.0)
  parent = dataclasses.replace(small, transforms=(once,))
  child = dataclasses.replace(small, transforms=(dataclasses.replace(once, sparsity=0.75, ticket='parent'),))
  same = dataclasses.replace(small, transforms=(Prune(0.0, ticket='parent', start=0.0, every=1),))
  assert arm_references(child) == [('transforms.prune.ticket', 'parent')]
  masks = []
  for name, config in {'parent': parent, 'child': child, 'same': same}.items():
    assert train.run(check(config), tmp_path, name) == 0
    params = load_model(tmp_path / 'arms' / name / 'model')[1]
    masks.append({n: np.asarray(w != 0) for n, w in matrices(params).items()})
  job = train.prepare(check(child), tmp_path, tmp_path)
  fresh = job.fresh(check(child))
  old, new, again = masks
  equal(again, old)  # a sparsity of 0 prunes no more
  equal(matrices(fresh.slots['prune'].masks), old)
  plain = train.prepare(check(small), tmp_path, tmp_path).fresh(check(small))
  equal(fresh.params, plain.params)  # the weights are step 0's
  total = sum(m.size for m in old.values())
  assert [sum(int(m.sum()) for m in one.values()) for one in (old, new)] == [total // 2, total // 4]
  assert all((new[n] <= old[n]).all() for n in old)


def test_a_ticket_of_another_shape_and_of_shapes_only():
  other = toy_model(width=16)
  spec = Prune(ticket='t')
  with pytest.raises(ConfigError, match='ticket=t: its model has other shapes of q, k, v, o, '):
    spec.build(resources(lambda arm: (other, other.init(jax.random.PRNGKey(0)))))
  shapes = jax.eval_shape(MODEL.init, jax.random.PRNGKey(0))
  transform, frozen = spec.build(resources(lambda arm: (MODEL, shapes)))  # a plan that is traced and not run
  assert all(m.all() for m in jax.tree.leaves(start(transform).slots['prune'].masks))
  assert frozen == {}


# --------------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
  'spec, message',
  [
    (Prune(1.0), 'sparsity=1.0: must lie in [0, 1)'),
    (Prune(start=0.8, end=0.2), 'start=0.8, end=0.2: need 0 <= start <= end <= 1'),
    (Prune(every=0), 'every=0: must be positive'),
    (Prune(criterion='size'), "criterion='size': allowed: magnitude, first_order, movement, random"),
    (Prune(pattern='row'), 'pattern=row: allowed: layer, output, n of m inputs as in 2:4, square blocks as in 16x16'),
    (Prune(0.6, pattern='2:4'), 'sparsity=0.6: must be 0.5 with pattern=2:4'),
    (Prune(0.5, pattern='2:4', allocation='erk'), 'allocation=erk: with pattern=2:4 every matrix keeps the same share'),
    (Prune(method='rigl', allocation='global'), 'allocation=global: where weights come back (method=rigl'),
    (Prune(schedule='cyclic', allocation='owl'), 'allocation=owl: where weights come back'),
    (Prune(method='ste', ticket='t'), 'method=ste: chooses among all weights; a ticket does not'),
    (Prune(0.5, pattern='5:10'), 'pattern=5:10: 10 does not divide the 128 inputs of q'),
    (Prune(pattern='48x48'), 'pattern=48x48: 48 does not divide the 128 inputs of q'),
    (Prune(0.99999), 'sparsity=0.99999: leaves no weight in a matrix of q'),
    (Prune(0.995, pattern='output'), 'sparsity=0.995: leaves no weight in an output of q'),
  ],
)
def test_what_cannot_be_meant_is_one_line(spec, message):
  with pytest.raises(ConfigError) as error:
    check(override(Config(), {'model.d_model': 128, 'transforms': (spec,)}))
  assert message in str(error.value)
  assert str(error.value).startswith('config.transforms.prune.')
  assert '\n' not in str(error.value)


OTHERS = {
  'criterion': 'movement',
  'pattern': '2:4',
  'allocation': 'owl',
  'schedule': 'iterative',
  'method': 'ste',
  'start': 0.1,
  'end': 0.9,
  'every': 7,
}


def test_every_setting_changes_the_program():
  def text(spec):
    transform = spec.build(resources(None))[0]
    return jax.jit(make_step(MODEL, ADAM, transform)).lower(start(transform), toy_batch(), {}).as_text()

  texts = [text(Prune())] + [text(dataclasses.replace(Prune(), **{name: value})) for name, value in OTHERS.items()]
  assert len(set(texts)) == len(texts)
  assert set(OTHERS) | {'sparsity', 'ticket'} == {f.name for f in dataclasses.fields(Prune)}
