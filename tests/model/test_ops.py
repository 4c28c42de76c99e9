"""A model in low precision multiplies in low precision, in its gradient too, and adds up in float32."""

import dataclasses

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from families import FAMILIES

from slm_jax import losses
from slm_jax.model import decoder, ops


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


@pytest.mark.parametrize(
  'spec, a, b', [('nd,vd->nv', (6, 40), (9, 40)), ('bgnk,bgsk->bgns', (2, 3, 6, 8), (2, 3, 5, 8))]
)
def test_the_gradient_in_low_precision_is_that_of_float32_rounded(spec, a, b):
  rng = np.random.default_rng(0)
  a, b = jnp.asarray(rng.normal(size=a), 'bfloat16'), jnp.asarray(rng.normal(size=b), 'float32')
  b = b.astype('bfloat16').astype('float32')  # so that casting it loses nothing
  out, pull = jax.vjp(lambda a, b: ops.wide_product(spec, a, b), a, b)
  exact, exact_pull = jax.vjp(lambda a, b: jnp.einsum(spec, a, b), a.astype('float32'), b)
  assert out.dtype == jnp.float32
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
