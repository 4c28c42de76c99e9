"""Matrix products of two arrays, and how one device of a CPU does those of bfloat16.

A product is a function of (spec, a, b), as of `einsum`: of three letters at the end of its terms each is in two of
them, letters before those are in all three. b is cast to the dtype of a. Legend of shapes: slm_jax/model/config.py.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

Product = Callable[[str, jax.Array, jax.Array], jax.Array]


class Products(NamedTuple):
  narrow: Product  # the result in the dtype of a
  wide: Product  # in float32, as it was added up


def _narrow(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.einsum(spec, a, b.astype(a.dtype))


def _wide(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.einsum(spec, a, b.astype(a.dtype), preferred_element_type=jnp.float32)


def _in_rows(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
  """`_wide` as [..., row, inner] x [..., inner, column], all three in row-major order.

  Such products of bfloat16 XLA gives to YNNPACK, which has the CPU's own instructions for them; all others it does in
  float32. So an operand that lies the other way is copied, which takes little beside the product; of a x b and the
  transpose of b' x a', that is done which copies less. Layouts are told because XLA would undo the copies again, after
  it has settled on bfloat16, and then refuse to run what it has made.
  """
  inputs, out = spec.split('->')
  of_a, of_b = inputs.split(',')
  batch, row, column = out[:-2], out[-2], out[-1]
  (inner,) = set(of_a) - set(out)
  x, y, of_x, of_y = (a, b, of_a, of_b) if row in of_a else (b, a, of_b, of_a)
  x, y = x.astype(a.dtype), y.astype(a.dtype)
  x_lies, y_lies = of_x == batch + row + inner, of_y == batch + inner + column
  x, y = x if x_lies else x.mT, y if y_lies else y.mT
  copied = x.size * (not x_lies) + y.size * (not y_lies)
  copied_by_transpose = x.size * x_lies + y.size * y_lies + x.size // x.shape[-1] * y.shape[-1]
  return _dot(x, y) if copied <= copied_by_transpose else _dot(y.mT, x.mT).mT


def _dot(x: jax.Array, y: jax.Array) -> jax.Array:
  z = _row_major(jnp.matmul(_row_major(x), _row_major(y), preferred_element_type=jnp.float32))
  # Compiles to nothing, but no output of a program is a constraint itself: in jax 0.10 others come out transposed then.
  return jnp.copy(z)


def _row_major(x: jax.Array) -> jax.Array:
  return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def _with_narrow_gradient(product: Product) -> Product:
  """The product, and products of its gradient whose operands have the dtype of a as well.

  By itself the float32 cotangent would make them products of float32, which an accelerator does at half the speed or
  less. Nothing can be differentiated forwards through it.
  """

  def pull(spec: str, saved: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    (a, b), (inputs, output) = saved, spec.split('->')
    of_a, of_b = inputs.split(',')
    # Once, before both products: XLA's GPU compiler would leave it to each of them, and write and read float32.
    cotangent = jax.lax.optimization_barrier(cotangent.astype(a.dtype))
    return (
      product(f'{output},{of_b}->{of_a}', cotangent, b).astype(a.dtype),
      product(f'{output},{of_a}->{of_b}', cotangent, a).astype(b.dtype),
    )

  ruled = jax.custom_vjp(product, nondiff_argnums=(0,))
  ruled.defvjp(lambda spec, a, b: (product(spec, a, b), (a, b)), pull)
  return ruled


def _unless_float32(low: Product, full: Product) -> Product:
  return lambda spec, a, b: (full if a.dtype == jnp.float32 else low)(spec, a, b)


_low = _with_narrow_gradient(_in_rows)

ANYWHERE = Products(narrow=_narrow, wide=_unless_float32(_with_narrow_gradient(_wide), _wide))
# For a program of one CPU device: jax 0.10's partitioner gathers what is told a layout. float32 gains nothing by it.
IN_ROWS = Products(
  narrow=_unless_float32(lambda spec, a, b: _low(spec, a, b).astype(a.dtype), _narrow),
  wide=_unless_float32(_low, _wide),
)
