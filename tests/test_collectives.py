"""What devices say to each other in a step, counted in the compiled program; and meshes by other tables."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sharding import BIG, CONFIG, MODEL, TEACHER, batch, layout_of, losses, mesh_of

from launch.aot_hlo import collectives
from slm_jax import sharding
from slm_jax.checkpoint import Checkpoints
from slm_jax.distill.logits import distill
from slm_jax.losses import Term
from slm_jax.model import decoder
from slm_jax.optim import OptimConfig, optimizer
from slm_jax.step import Transform, chain, init_state, make_step

OPTIM = optimizer(OptimConfig(learning_rate=1e-2, warmup=2), 8)
PARAMS = 4 * sum(x.size for x in jax.tree.leaves(jax.eval_shape(MODEL.init, jax.random.PRNGKey(0))))  # bytes
SMALL = 256  # bytes of sums and norms


def fresh(transform):
  return init_state(jax.random.PRNGKey(1), MODEL.init(jax.random.PRNGKey(0)), OPTIM, transform)


def moved(shape, transform=chain(), teacher=None, spread=True, **options):
  """Bytes of each kind of collective in one step, by (kind, devices in a group)."""
  mesh = mesh_of(*shape)
  model = decoder.build(CONFIG, sharding.devices(mesh, grouped=True))
  shapes, axes = jax.eval_shape(lambda: fresh(transform)), decoder.logical_axes(CONFIG)
  layout = layout_of(shapes, axes, mesh) if spread else sharding.shardings(shapes, axes, mesh)
  options = {**sharding.groups(mesh), **options}
  step = jax.jit(make_step(model, OPTIM, transform, **options), donate_argnums=0, out_shardings=(layout, None))
  state = jax.jit(lambda: fresh(transform), out_shardings=layout)()
  compiled = step.lower(state, sharding.placer(mesh)(batch(0)), {'teacher': teacher}).compile()
  found = collections.Counter()
  for one in collectives(compiled.as_text(), 8):
    found[one.kind, one.group] += one.bytes
  return found


@pytest.mark.parametrize('accumulate', [1, 2])
def test_data_parallel_steps_add_their_gradients_up_once(accumulate):
  """However many parts a batch has, and though tied embeddings are used at both ends of the model."""
  found = moved((8, 1, 1), spread=False, accumulate=accumulate, chunk=32)
  assert set(found) == {('all-reduce', 8)}
  assert PARAMS <= found['all-reduce', 8] <= PARAMS + SMALL


def test_a_spread_optimiser_gathers_the_parameters_once():
  found = moved((8, 1, 1))
  assert set(found) == {('all-reduce', 8), ('all-gather', 8)}
  assert PARAMS <= found['all-reduce', 8] <= PARAMS + SMALL
  assert found['all-gather', 8] <= PARAMS


@pytest.mark.parametrize('fsdp', [1, 4])
def test_between_slices_gradients_are_added_up_and_nothing_is_gathered(fsdp):
  """Parameters are gathered among the four devices of a slice, after the update or, fully sharded, in every layer."""
  found = moved((2, 4 // fsdp, fsdp, 1))
  across = {key: size for key, size in found.items() if key[1] in (2, 8)}
  assert {kind for kind, _ in across} == {'all-reduce'}
  assert PARAMS / fsdp <= sum(across.values()) <= PARAMS + SMALL
  assert ('all-gather', 4) in found


def test_a_teacher_that_every_device_has_costs_no_talk():
  mesh = sharding.make_mesh(8, 1, 1)
  its = sharding.place(TEACHER.init(jax.random.PRNGKey(5)), decoder.logical_axes(BIG), mesh)
  teacher = decoder.build(BIG, sharding.devices(mesh))
  plain, taught = moved((8, 1, 1)), moved((8, 1, 1), chain(distill(teacher, 0.5, 2.0)), its)
  assert set(taught) == set(plain)
  assert all(taught[kind] <= plain[kind] + SMALL for kind in plain)


def test_fully_sharded_steps_gather_each_weight_twice_and_scatter_it_once():
  """Forward and backward. Activations stay where their rows are: none is gathered or added up."""
  found = moved((1, 8, 1))
  assert found['all-gather', 8] <= 2 * PARAMS
  assert found['all-reduce', 8] + found['reduce-scatter', 8] <= PARAMS + SMALL
  assert found['all-to-all', 8] <= PARAMS / 4  # of looked-up embeddings: all of the width for one's own tokens
  assert {kind for kind, _ in found} <= {'all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all'}


def test_tensor_parallel_steps_add_up_what_each_matrix_made_in_part():
  """Forward o and down; backward q, k, v, gate and up, whose sums this compiler leaves apart; head and embedding."""
  found, n_tokens = moved((4, 1, 2)), 16 * 16
  activation = 4 * n_tokens // 4 * CONFIG.d_model  # bytes, of the rows of one device
  assert found['all-reduce', 2] <= (7 * CONFIG.n_layers + 2) * activation + 4 * SMALL
  assert found['all-gather', 2] <= SMALL * CONFIG.d_model


@pytest.fixture(scope='module')
def one_device():
  return losses(sharding.make_mesh(devices=jax.devices()[:1]))[0]


def test_sequence_parallel_by_the_table_alone(one_device, monkeypatch):
  monkeypatch.setitem(sharding.RULES, 'time', 'tensor')
  ours, _ = losses(sharding.make_mesh(4, 1, 2))
  np.testing.assert_allclose(ours, one_device, rtol=1e-5)
  plain = moved((4, 1, 2))
  assert plain['all-gather', 2] > SMALL * CONFIG.d_model  # what is cut along time is gathered for attention


def test_a_teacher_may_have_a_table_of_its_own(one_device):
  mesh = sharding.make_mesh(4, 2, 1)
  ours, _ = losses(mesh, spread_teacher=True)
  np.testing.assert_allclose(ours, one_device, rtol=1e-5)
  rules = sharding.rules_of_teachers(spread=True)
  places = sharding.shardings(
    jax.eval_shape(TEACHER.init, jax.random.PRNGKey(0)), decoder.logical_axes(BIG), mesh, rules
  )
  up = jax.ShapeDtypeStruct((3, 64, 64), jnp.float32, sharding=places['layers']['up'])
  assert places['layers']['up'].shard_shape(up.shape) == (3, 8, 64)


def test_an_optimisers_state_is_cut_over_all_devices():
  mesh = sharding.make_mesh(8, 1, 1)
  layout = layout_of(jax.eval_shape(lambda: fresh(chain())), decoder.logical_axes(CONFIG), mesh)
  shapes = jax.eval_shape(lambda: fresh(chain())).opt_state

  def held(where, leaf):
    return int(np.prod(where.shard_shape(leaf.shape)))

  mine = sum(jax.tree.leaves(jax.tree.map(held, layout.opt_state, shapes)))
  assert mine <= 1.02 * sum(x.size for x in jax.tree.leaves(shapes)) / 8


@pytest.mark.parametrize('shape', [(1, 1, 1), (2, 2, 2)])
def test_a_checkpoint_goes_on_on_another_mesh(shape, tmp_path):
  mesh, axes = sharding.make_mesh(8, 1, 1), decoder.logical_axes(CONFIG)
  shapes = jax.eval_shape(lambda: fresh(chain()))
  state = jax.jit(lambda: fresh(chain()), out_shardings=layout_of(shapes, axes, mesh))()
  with Checkpoints(tmp_path, 1, print) as checkpoints:
    checkpoints.save(3, state, {'tokens': 5.0}, None)
  n = int(np.prod(shape))
  other = sharding.make_mesh(*shape, devices=jax.devices()[:n])
  with Checkpoints(tmp_path, 1, print) as checkpoints:
    read, record = checkpoints.latest(sharding.abstract(shapes, layout_of(shapes, axes, other)))
  assert record['tokens'] == 5.0
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(read), jax.device_get(state))


def penalty():
  """A term of the parameters alone: its sum and count do not grow with the batch."""

  def loss(slot, fn):
    def with_norm(params, hidden_BTD, batch, context):
      norm = sum((x**2).sum() for x in jax.tree.leaves(params))
      return {**fn(params, hidden_BTD, batch, context), 'norm': Term(norm, jnp.float32(1), 0.1)}

    return with_norm

  return Transform('penalty', loss=loss)


@pytest.mark.parametrize(('parts', 'groups'), [(2, 1), (1, 4), (4, 2)])
def test_a_term_of_the_parameters_counts_once_however_a_batch_is_cut(parts, groups):
  def after_one(**options):
    state, metrics = jax.jit(make_step(MODEL, OPTIM, penalty(), **options))(fresh(penalty()), batch(0), {})
    return state.params, {name: metrics[name] for name in ('loss', 'norm', 'grad_norm', 'total')}

  whole, cut = after_one(), after_one(accumulate=parts, groups=groups)
  # Adam's first update has the size of the learning rate even where the gradient is next to nothing but rounding.
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), whole[0], cut[0])
  for name in ('loss', 'norm', 'grad_norm'):
    np.testing.assert_allclose(whole[1][name], cut[1][name], rtol=1e-5)
