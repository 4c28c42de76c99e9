"""The accelerators' kernels compute what the reference does; which one is taken follows from what is compiled for.

On this CPU splash runs interpreted, and cuDNN's part ends at the text that a GPU would be given.
"""

import dataclasses
import functools
import itertools
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax import sharding
from slm_jax.ablate.program import together
from slm_jax.config import ConfigError
from slm_jax.distill.logits import distill
from slm_jax.model import decoder, fused
from slm_jax.model.attention import attention, document_starts
from slm_jax.model.config import ModelConfig
from slm_jax.model.fused import Devices, attend_by, choose
from slm_jax.optim import OptimConfig, optimizer
from slm_jax.prune.transform import prune
from slm_jax.step import chain, init_state, make_step

TPU, GPU, CPU = Devices('tpu'), Devices('gpu'), Devices('cpu')
CALLS = ('Softmax', 'SoftmaxBackward', 'ScaleBiasSoftmax', 'ScaleBiasSoftmaxBackward')  # of cuDNN
WINDOW = dict(window=37, global_every=2)


def model(heads=4, groups=2, size=24, **changes):
  return ModelConfig(n_heads=heads, n_kv_heads=groups, head_dim=size, **changes)


def inputs(config, b, t, dtype=np.float32, seed=0):
  """q, k, v, a cotangent of z, and documents of about 40 tokens."""
  rng = np.random.default_rng(seed)
  h, g, k = config.n_heads, config.n_kv_heads, config.head_dim
  arrays = [jnp.asarray(rng.normal(size=(b, t, n, k)), dtype) for n in (h, g, g, h)]
  return (*arrays, document_starts(jnp.asarray(np.cumsum(rng.random((b, t)) < 1 / 40, axis=1), jnp.int32)))


def value_and_gradients(attend, q, k, v, cotangent):
  """z and its pull-back, as one program."""

  def both(q, k, v):
    z, pull = jax.vjp(attend, q, k, v)
    return (z, *pull(cotangent))

  return jax.jit(both)(q, k, v)


def by_reference(config, documents, is_global, q, k, v):
  slot = jnp.arange(q.shape[1])[None]
  low = jnp.zeros_like(slot) if documents is None else documents
  if config.window and not is_global:
    low = jnp.maximum(low, slot - config.window + 1)
  return attention(q, k, v, jnp.minimum(low, slot), slot, config.query_scale)


def both_ways(config, b, t, packed, is_global=True, devices=None, **options):
  q, k, v, cotangent, documents = inputs(config, b, t, **options)
  documents = documents if packed else None
  attend = attend_by(dataclasses.replace(config, attention='splash'), devices, documents, b, t)
  ours = value_and_gradients(lambda q, k, v: attend(q, k, v, jnp.asarray(is_global)), q, k, v, cotangent)
  theirs = value_and_gradients(functools.partial(by_reference, config, documents, is_global), q, k, v, cotangent)
  return ours, theirs


# --------------------------------------------------------------------------------------------------------- splash


@pytest.mark.parametrize(
  'window, is_global, packed, heads, groups, size, t',
  [
    (0, True, False, 4, 2, 24, 130),
    (0, True, True, 2, 2, 136, 128),
    (37, True, False, 2, 2, 64, 100),
    (37, True, True, 4, 2, 24, 130),
    (37, False, False, 3, 1, 24, 128),
    (37, False, True, 4, 2, 136, 200),
  ],
)
def test_splash_is_the_reference(window, is_global, packed, heads, groups, size, t):
  """Windows x documents x grouped queries x head sizes and lengths that are no multiples of 128; gradients too."""
  config = model(heads, groups, size, **(dict(window=window, global_every=2) if window else {}))
  for got, expected in zip(*both_ways(config, 2, t, packed, is_global), strict=True):
    np.testing.assert_allclose(got, expected, atol=2e-5, rtol=1e-4)


def test_several_blocks_in_bfloat16():
  """640 tokens are five blocks of 128, of which the window leaves two a row."""
  config = model(2, 1, 64, dtype='bfloat16', **WINDOW)
  ours, theirs = both_ways(config, 1, 640, True, False, dtype=jnp.bfloat16)
  for got, expected in zip(ours, theirs, strict=True):
    got, expected = np.asarray(got, np.float32), np.asarray(expected, np.float32)
    assert np.abs(got - expected).max() < 0.02 * np.abs(expected).max()


@pytest.mark.parametrize('shape', [(2, 2, 2), (1, 8, 1)])
def test_on_a_mesh_every_device_has_its_own_sequences_and_heads(shape):
  devices = sharding.devices(sharding.make_mesh(*shape))
  config = model(4, 2, 24, **WINDOW)
  ours, theirs = both_ways(config, 8, 128, True, False, devices)
  for got, expected in zip(ours, theirs, strict=True):
    np.testing.assert_allclose(got, expected, atol=2e-5, rtol=1e-4)


def test_arms_under_vmap():
  """A population is the step under vmap: queries have a further axis, documents do not."""
  config = model(2, 1, 16, attention='splash')
  devices = sharding.devices(sharding.make_mesh(2, 1, 1, jax.devices()[:2]))
  sets = [inputs(config, 2, 128, seed=seed) for seed in (0, 1)]
  documents = sets[0][-1]
  attend = attend_by(config, devices, documents, 2, 128)
  one = functools.partial(value_and_gradients, lambda q, k, v: attend(q, k, v, jnp.asarray(True)))
  together = jax.vmap(one)(*(jnp.stack(pair) for pair in zip(*(s[:4] for s in sets), strict=True)))
  for i, s in enumerate(sets):
    for got, expected in zip(together, one(*s[:4]), strict=True):
      np.testing.assert_allclose(got[i], expected, atol=1e-6)


@pytest.mark.parametrize('unroll, remat', [(0, 'none'), (1, 'dots')])
def test_a_decoder_with_local_layers_gives_the_same_loss_and_gradient(unroll, remat):
  config = model(2, 1, 16, vocab_size=64, d_model=32, d_ff=48, n_layers=2, unroll=unroll, remat=remat, **WINDOW)
  batch = {
    'inputs': jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 96)), jnp.int32),
    'segments': jnp.asarray(np.repeat([[1, 2, 0], [1, 1, 2]], 32, axis=1), jnp.int32),
  }
  params = decoder.build(config).init(jax.random.key(0))

  def run(kernel):
    of = decoder.build(dataclasses.replace(config, attention=kernel))
    return jax.jit(jax.value_and_grad(lambda p: of.head(p, of.hidden(p, batch)).var()))(params)

  (ours, ours_grad), (theirs, theirs_grad) = run('splash'), run('reference')
  assert float(ours) == pytest.approx(float(theirs), rel=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-3), ours_grad, theirs_grad)


# ---------------------------------------------------------------------------------------------------------- cuDNN


@pytest.fixture
def pretended_cudnn(monkeypatch):
  """JAX asks for cuDNN's version before it lowers for a GPU; there is none here to ask."""
  from jax._src.cudnn import fused_attention_stablehlo as cudnn

  monkeypatch.setattr(cudnn, 'check_cudnn_version', lambda: 91_000)


def for_cuda(fn, *args):
  """The text of a function of shapes, for a GPU."""
  allowed = [jax.export.DisabledSafetyCheck.custom_call(f'__cudnn$fmha{name}') for name in CALLS]
  return jax.export.export(jax.jit(fn), platforms=['cuda'], disabled_checks=allowed)(*args).mlir_module()


def batch_of(b=4, t=64):
  tokens, mask = jax.ShapeDtypeStruct((b, t), jnp.int32), jax.ShapeDtypeStruct((b, t), jnp.float32)
  return {'inputs': tokens, 'targets': tokens, 'segments': tokens, 'mask': mask}


def lowered_for_cuda(config, devices, packed=True):
  """Loss and gradient of a decoder."""
  of, batch = decoder.build(config, devices), batch_of()
  if not packed:
    del batch['segments']
  params = jax.eval_shape(of.init, jax.random.key(0))
  return for_cuda(jax.grad(lambda p, batch: of.head(p, of.hidden(p, batch)).var()), params, batch)


@pytest.mark.parametrize('window', [0, 16])
@pytest.mark.parametrize('packed', [False, True])
def test_a_gpu_is_given_cudnn_forward_and_backward(pretended_cudnn, window, packed):
  config = model(
    4, 2, 64, dtype='bfloat16', n_layers=3, unroll=1, **(dict(window=window, global_every=3) if window else {})
  )
  text = lowered_for_cuda(config, GPU, packed=packed)
  assert fused.kernels_in(text) == {'cudnn': 2}, 'one each in the two loops over layers'
  masked = text.count('fmhaScaleBiasSoftmax')
  assert bool(masked) == (packed or bool(window)), 'documents and windows are a mask'


def test_cudnn_is_given_the_scale_and_not_queries_that_it_was_rounded_into(pretended_cudnn):
  text = lowered_for_cuda(model(1, 1, 48, dtype='bfloat16', n_layers=1), GPU)
  scales = [float(x) for x in re.findall(r'fmha_scale\\22: ([0-9.e+-]+)', text)]
  assert scales == pytest.approx([48**-0.5] * 2, rel=1e-6)  # forward and backward


def test_a_gpu_is_given_the_reference_where_cudnn_cannot(pretended_cudnn):
  config = model(4, 2, 64, n_layers=1)
  assert fused.kernels_in(lowered_for_cuda(config, GPU)) == {}, 'float32'
  assert fused.kernels_in(lowered_for_cuda(dataclasses.replace(config, dtype='bfloat16'), None)) == {}, 'nobody said'


@pytest.mark.parametrize('accumulate, groups', [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_a_whole_step_that_distils_and_prunes_is_lowered_for_gpus(pretended_cudnn, accumulate, groups):
  """As train.py jits it: parts of a batch, groups of rows, AdamW, masks and all; the teacher's forward pass too."""
  config = model(4, 2, 64, dtype='bfloat16', n_layers=2, unroll=1)
  student = decoder.build(config, GPU._replace(grouped=groups > 1))
  teacher = decoder.build(dataclasses.replace(config, n_layers=3), GPU)
  optim = optimizer(OptimConfig(), 100)
  transform = chain(distill(teacher, 0.5, 2.0), prune(0.5, 10, 50, 10))
  state = jax.eval_shape(lambda key: init_state(key, student.init(key), optim, transform), jax.random.key(0))
  frozen = {'teacher': jax.eval_shape(teacher.init, jax.random.key(0))}
  step = make_step(student, optim, transform, accumulate=accumulate, groups=groups)
  text = for_cuda(step, state, batch_of(), frozen)
  assert fused.kernels_in(text)['cudnn'] >= 3, 'forward and backward of the student, forward of the teacher'


def test_a_population_is_lowered_for_a_gpu(pretended_cudnn):
  """By the reference: see `unsuited`."""
  config = model(4, 2, 64, dtype='bfloat16', n_layers=2, unroll=1)
  student, optim = decoder.build(config, GPU._replace(mapped=True)), optimizer(OptimConfig(), 100)
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 6).reshape(2, 3))
  fresh = jax.vmap(jax.vmap(lambda key: init_state(key, student.init(key), optim)))
  states = jax.eval_shape(fresh, keys)._replace(step=jax.ShapeDtypeStruct((), jnp.int32))
  batch = {name: jax.ShapeDtypeStruct((2, *x.shape), x.dtype) for name, x in batch_of().items()}
  assert fused.kernels_in(for_cuda(together(make_step(student, optim), True), states, batch, {})) == {}


# ------------------------------------------------------------------------------------------------------ the choice


@pytest.mark.parametrize(
  'devices, config, shape, expected',
  [
    (None, {}, (2, 64), 'reference'),
    (CPU, {}, (2, 64), 'reference'),
    (TPU, {}, (2, 63), 'splash'),
    (TPU, {'size': 10}, (2, 64), 'splash'),
    (TPU, {'attention': 'reference'}, (2, 64), 'reference'),
    (GPU, {}, (2, 64), 'reference'),
    (GPU, {'dtype': 'bfloat16'}, (2, 64), 'cudnn'),
    (GPU, {'dtype': 'bfloat16'}, (2, 63), 'reference'),
    (GPU, {'dtype': 'bfloat16', 'size': 10}, (2, 64), 'reference'),
    (GPU, {'dtype': 'bfloat16', 'size': 256}, (2, 64), 'reference'),
    (GPU._replace(widest=256), {'dtype': 'bfloat16', 'size': 256}, (2, 64), 'cudnn'),
    (GPU._replace(mapped=True), {'dtype': 'bfloat16'}, (2, 64), 'reference'),
    (CPU, {'attention': 'splash'}, (2, 64), 'splash'),
  ],
)
def test_what_is_compiled_for_decides(devices, config, shape, expected):
  assert choose(model(**config), devices, *shape) == expected


def test_what_a_mesh_cannot_split_falls_back_and_is_an_error_if_asked_for():
  mesh = sharding.make_mesh(4, 1, 2)
  for groups, b in itertools.product((1, 2), (4, 6)):
    devices = sharding.devices(mesh)._replace(platform='tpu')
    expected = 'splash' if (groups, b) == (2, 4) else 'reference'
    assert choose(model(2, groups), devices, b, 64) == expected


@pytest.mark.parametrize(
  'changes, message',
  [
    ({}, 'model.attention=cudnn: cuDNN needs model.dtype=bfloat16, not float32; allowed: auto, reference'),
    ({'dtype': 'bfloat16', 'size': 10}, 'multiple of 8 up to 256, not 10'),
  ],
)
def test_what_was_asked_for_and_cannot_be_is_one_line(changes, message):
  with pytest.raises(ConfigError, match=message):
    choose(model(**changes, attention='cudnn'), None, 2, 64)


@pytest.mark.parametrize('devices', [CPU, TPU])
def test_cudnn_is_of_gpus_only(devices):
  with pytest.raises(ConfigError, match='cuDNN needs a GPU, and the device is a [ct]pu; allowed: auto, reference'):
    choose(model(dtype='bfloat16', attention='cudnn'), devices, 2, 64)
