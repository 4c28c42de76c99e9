"""One table of axes: the same run on one and on eight devices, whatever the mesh."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from slm_jax import sharding
from slm_jax.config import ConfigError
from slm_jax.distill.logits import distill
from slm_jax.ema import ema
from slm_jax.model import decoder
from slm_jax.model.config import ModelConfig
from slm_jax.optim import OptimConfig, optimizer
from slm_jax.prune.transform import Rules, prune
from slm_jax.step import chain, init_state, make_step

CONFIG = ModelConfig(
  vocab_size=64, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=48, max_len=32, unroll=1
)
BIG = ModelConfig(
  vocab_size=64, d_model=64, n_layers=3, n_heads=4, n_kv_heads=4, head_dim=16, d_ff=64, max_len=32, unroll=1
)
MODEL, TEACHER = decoder.build(CONFIG), decoder.build(BIG)


def batch(step):
  rng = np.random.default_rng(step)
  tokens = rng.integers(0, 64, (16, 17)).astype(np.int32)
  segments = np.cumsum(rng.random((16, 17)) < 0.1, axis=1).astype(np.int32) + 1
  same = (segments[:, 1:] == segments[:, :-1]).astype(np.float32)
  return {'inputs': tokens[:, :-1], 'targets': tokens[:, 1:], 'segments': segments[:, :-1], 'mask': same}


def mesh_of(*shape):
  """data x fsdp x tensor, or, of four numbers, as many slices of those: which devices of a CPU are not in."""
  return (
    sharding.make_mesh(*shape) if len(shape) == 3 else Mesh(np.asarray(jax.devices()).reshape(shape), sharding.AXES)
  )


def losses(mesh, steps=8, spread_teacher=False, **options):
  """As train.assemble makes it."""
  model = decoder.build(CONFIG, sharding.devices(mesh, grouped=True))
  teacher = decoder.build(BIG, sharding.devices(mesh))
  options = {**sharding.groups(mesh), **options}
  optim = optimizer(OptimConfig(learning_rate=1e-2, warmup=2), steps)
  transform = chain(distill(teacher, 0.5, 2.0), prune(0.5, 2, 6, 2, Rules(allocation='global')), ema(0.9))
  axes = decoder.logical_axes(CONFIG)

  def fresh():
    return init_state(jax.random.PRNGKey(1), MODEL.init(jax.random.PRNGKey(0)), optim, transform)

  layout = layout_of(jax.eval_shape(fresh), axes, mesh)
  state = jax.jit(fresh, out_shardings=layout)()
  rules = sharding.rules_of_teachers(spread_teacher)
  places = sharding.shardings(
    jax.eval_shape(TEACHER.init, jax.random.PRNGKey(5)), decoder.logical_axes(BIG), mesh, rules
  )
  its = jax.jit(TEACHER.init, out_shardings=places)(jax.random.PRNGKey(5))
  step = jax.jit(make_step(model, optim, transform, **options), donate_argnums=0, out_shardings=(layout, None))
  put, out = sharding.placer(mesh), []
  for i in range(steps):
    state, metrics = step(state, put(batch(i)), {'teacher': its})
    out.append((float(metrics['loss']), float(metrics['distill']), float(metrics['density'])))
  return np.array(out), state


def layout_of(shapes, axes, mesh):
  layout = sharding.shardings(shapes, axes, mesh)
  return layout._replace(opt_state=sharding.spread(layout.opt_state, shapes.opt_state, mesh))


@pytest.fixture(scope='module')
def one_device():
  return losses(sharding.make_mesh(devices=jax.devices()[:1]))[0]


@pytest.mark.parametrize(
  'shape', [(8, 1, 1), (1, 8, 1), (4, 1, 2), (2, 2, 2), (1, 4, 2), (2, 4, 1, 1), (2, 1, 4, 1), (2, 2, 1, 2)]
)
def test_every_mesh_gives_the_losses_of_one_device(shape, one_device):
  """Distilling and pruning included; the masks come out equal, so the density does too."""
  ours, state = losses(mesh_of(*shape))
  np.testing.assert_allclose(ours, one_device, rtol=1e-5)
  used = {axis for axis in state.params['layers']['up'].sharding.spec if axis}
  assert used == {name for name, size in zip(('fsdp', 'tensor'), shape[-2:], strict=True) if size > 1}


def test_accumulation_on_a_mesh(one_device):
  ours, _ = losses(sharding.make_mesh(4, 2, 1), accumulate=2, chunk=64)
  np.testing.assert_allclose(ours, one_device, rtol=1e-5)


@pytest.mark.parametrize('shape', [(1, 8, 1), (2, 2, 2)])
@pytest.mark.parametrize('name', ['muon', 'adafactor'])
def test_every_optimisers_state_lies_somewhere(name, shape):
  """Adafactor's, too, which has a single number where a parameter is not factored."""
  optim = optimizer(OptimConfig(name, learning_rate=1e-2, warmup=1), 10)
  mesh = sharding.make_mesh(*shape)

  def fresh():
    return init_state(jax.random.PRNGKey(1), MODEL.init(jax.random.PRNGKey(0)), optim)

  def loss(mesh):
    layout = layout_of(jax.eval_shape(fresh), decoder.logical_axes(CONFIG), mesh)
    state = jax.jit(fresh, out_shardings=layout)()
    model = decoder.build(CONFIG, sharding.devices(mesh, grouped=True))
    step = jax.jit(make_step(model, optim, **sharding.groups(mesh)), out_shardings=(layout, None))
    for i in range(3):
      state, measured = step(state, sharding.placer(mesh)(batch(i)), {})
    return float(measured['loss'])

  assert loss(mesh) == pytest.approx(loss(sharding.make_mesh(devices=jax.devices()[:1])), rel=1e-5)


def test_moments_masks_and_averages_lie_like_their_parameters():
  mesh = sharding.make_mesh(1, 4, 2)
  _, state = losses(mesh, steps=1)
  up = state.params['layers']['up'].sharding
  assert up.spec == PartitionSpec(None, 'fsdp', 'tensor')
  moments = [s for s in jax.tree.leaves(state.opt_state) if s.shape == state.params['layers']['up'].shape]
  places = [m.sharding for m in moments]
  places += [tree['layers']['up'].sharding for tree in (state.slots['prune'].masks, state.slots['ema'])]
  assert len(places) >= 4
  assert all(place.is_equivalent_to(up, 3) for place in places)


class Sliced:
  """A device of a multi-slice topology."""

  def __init__(self, index, slice_index):
    self.id, self.process_index, self.slice_index, self.platform = index, index // 4, slice_index, 'tpu'


def sliced(*counts):
  return [Sliced(16 * s + i, s) for s, count in enumerate(counts) for i in range(count)]


def test_a_slice_has_an_axis_of_its_own():
  mesh = sharding.make_mesh(4, 2, 1, sliced(4, 4)[::-1])
  assert dict(mesh.shape) == {'slice': 2, 'data': 2, 'fsdp': 2, 'tensor': 1}
  assert [{device.slice_index for device in devices.flat} for devices in mesh.devices] == [{0}, {1}]


def test_a_model_is_told_where_its_sequences_and_heads_are():
  told = sharding.devices(sharding.make_mesh(2, 2, 2))
  assert (told.platform, told.rows, told.heads, told.ways()) == ('cpu', ('slice', 'data', 'fsdp'), 'tensor', (4, 2))


@pytest.mark.parametrize('capability, widest', [('8.9', 128), ('9.0', 256), ('10.0', 256), ('gfx942', 0)])
def test_a_gpu_says_which_heads_its_cudnn_can_do(capability, widest):
  gpu = Sliced(0, 0)
  gpu.platform, gpu.compute_capability = 'gpu', capability
  assert sharding.devices(sharding.make_mesh(devices=[gpu])).widest == widest


@pytest.mark.parametrize(
  'call,message',
  [
    (lambda: sharding.make_mesh(1, 8, 1, sliced(4, 4)), 'data_parallel=1: does not split over the 2 slices'),
    (lambda: sharding.make_mesh(3, 1, 1), '3 x 1 x 1 is not the 8 devices'),
    (lambda: sharding.make_mesh(0, 3, 1), '3 does not divide the 8 devices'),
    (lambda: sharding.check_batch(sharding.make_mesh(), 12, 1), 'batch_size=12: not divisible by .* 8 data-parallel'),
    (lambda: sharding.check_batch(sharding.make_mesh(), 8, 2), 'accumulate=2 x 8'),
    (
      lambda: sharding.shardings(
        jax.eval_shape(MODEL.init, jax.random.PRNGKey(0)), decoder.logical_axes(CONFIG), sharding.make_mesh(1, 1, 8)
      ),
      "axis 'kv_heads' of size 2 does not split over 8|axis 'heads' of size 4",
    ),
  ],
)
def test_what_does_not_fit_is_one_line(call, message):
  with pytest.raises(ConfigError, match=message) as error:
    call()
  assert '\n' not in str(error.value)


def test_no_model_code_mentions_devices():
  """`NamedSharding` on the arguments of the step, and nowhere below."""
  from pathlib import Path

  import slm_jax

  root = Path(slm_jax.__file__).parent
  for path in [*root.glob('model/*.py'), root / 'losses.py', root / 'step.py', root / 'optim.py']:
    text = path.read_text()
    assert 'NamedSharding' not in text, path
    assert 'with_sharding_constraint' not in text, path
