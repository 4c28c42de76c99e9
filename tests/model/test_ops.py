"""A model in low precision multiplies in low precision, in its gradient too, and adds up in float32."""

import dataclasses
import re

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from families import FAMILIES

from slm_jax import losses
from slm_jax.model import decoder, ops
from slm_jax.model.fused import Devices
from slm_jax.model.products import ANYWHERE, IN_ROWS


def products(jaxpr):
  """The operands' dtypes of every matrix product, inner programs' too."""
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == 'dot_general':
      yield {str(x.aval.dtype) for x in eqn.invars}
    for inner in jax.extend.core.jaxprs_in_params(eqn.params):
      yield from products(inner)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
@pytest.mark.parametrize('family', ['llama', 'gemma3'])
def test_every_product_of_a_gradient_is_in_the_dtype_of_the_model(family, dtype):
  model = decoder.build(dataclasses.replace(FAMILIES[family], dtype=dtype, attention='reference'))
  batch = {name: jnp.ones((2, 16), kind) for name, kind in (('inputs', int), ('targets', int), ('mask', float))}

  def objective(params):
    hidden = model.hidden(params, batch)
    return losses.objective(
      losses.over_chunks(losses.cross_entropy(), model.head, params, hidden, batch, None, chunk=8)
    )

  found = list(products(jax.make_jaxpr(jax.grad(objective))(jax.eval_shape(model.init, jax.random.key(0))).jaxpr))
  assert len(found) > 20
  assert all(kinds == {dtype} for kinds in found)


@pytest.mark.parametrize('products', [ANYWHERE, IN_ROWS], ids=['anywhere', 'in rows'])
@pytest.mark.parametrize(
  'spec, a, b',
  [
    ('ni,io->no', (6, 40), (40, 9)),
    ('ni,io->no', (60, 8), (8, 24)),
    ('nd,vd->nv', (6, 40), (9, 40)),
    ('bgnk,bgsk->bgns', (2, 3, 6, 8), (2, 3, 5, 8)),
    ('bgns,bgsk->bgnk', (2, 3, 16, 32), (2, 3, 32, 8)),
  ],
)
def test_the_gradient_in_low_precision_is_that_of_float32_rounded(spec, a, b, products):
  rng = np.random.default_rng(0)
  a, b = jnp.asarray(rng.normal(size=a), 'bfloat16'), jnp.asarray(rng.normal(size=b), 'float32')
  b = b.astype('bfloat16').astype('float32')  # so that casting it loses nothing
  out, pull = jax.vjp(jax.jit(lambda a, b: products.wide(spec, a, b)), a, b)
  exact, exact_pull = jax.vjp(lambda a, b: jnp.einsum(spec, a, b), a.astype('float32'), b)
  assert out.dtype == jnp.float32
  assert products.narrow(spec, a, b).dtype == jnp.bfloat16
  np.testing.assert_allclose(products.narrow(spec, a, b).astype('float32'), exact, rtol=0.01, atol=1e-3)
  np.testing.assert_allclose(out, exact, rtol=1e-6, atol=1e-5)
  cotangent = jnp.asarray(rng.normal(size=out.shape), 'float32')
  for got, expected, like in zip(pull(cotangent), exact_pull(cotangent), (a, b), strict=True):
    assert got.dtype == like.dtype
    assert np.abs(got.astype('float32') - expected).max() < 0.01 * np.abs(expected).max()


def test_float32_can_be_differentiated_forwards():
  """Which a rule of one's own for the backward pass rules out."""
  x, table = jnp.ones((2, 4)), jnp.ones((3, 4))
  _, tangent = jax.jvp(lambda x: ops.unembed(x, table, 0.0), (x,), (x,))
  np.testing.assert_allclose(tangent, 4.0)


def compiled_products(lowered):
  """The operands' dtypes of every matrix product, once the program is compiled."""
  text = lowered.compile().as_text()
  dtypes = dict(re.findall(r'(%[\w.-]+) = (\w+)\[', text))
  return [tuple(dtypes[name] for name in pair) for pair in re.findall(r' dot\((%[\w.-]+), (%[\w.-]+)\)', text)]


def gradient_program(devices, dtype, over=lambda f: f):
  config = dataclasses.replace(FAMILIES['llama'], dtype=dtype)
  model = decoder.build(config, devices)
  gradient = over(jax.grad(lambda params, tokens: model.head(params, model.hidden(params, {'inputs': tokens})).sum()))
  params, tokens = jax.eval_shape(model.init, jax.random.key(0)), jax.ShapeDtypeStruct((4, 64), jnp.int32)
  if over is jax.vmap:
    params, tokens = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype), (params, tokens))
  return jax.jit(gradient).lower(params, tokens)


@pytest.mark.parametrize('over', [lambda f: f, jax.vmap], ids=['one', 'population'])
def test_a_cpu_multiplies_in_bfloat16_where_a_compiler_left_alone_would_in_float32(over):
  assert {*compiled_products(gradient_program(Devices('cpu'), 'bfloat16', over))} == {('bf16', 'bf16')}
  assert ('f32', 'f32') in compiled_products(gradient_program(None, 'bfloat16', over))


def test_other_devices_and_float32_are_left_alone():
  pair = jax.sharding.Mesh(np.array(jax.devices()[:1] * 2), 'x')
  assert Devices('cpu').products() is IN_ROWS
  assert all(devices.products() is ANYWHERE for devices in (Devices('tpu'), Devices('gpu'), Devices('cpu', pair)))
  assert gradient_program(Devices('cpu'), 'float32').as_text() == gradient_program(None, 'float32').as_text()
