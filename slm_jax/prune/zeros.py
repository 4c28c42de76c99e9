"""What is zero in a model: how many weights, and in which patterns; for the books, and for who opens it elsewhere.

A runtime that multiplies n of every m inputs only (2:4 on some GPUs) needs to be told which matrices are so.
"""

from typing import Any

import jax
import jax.numpy as jnp

from slm_jax.model.api import Params
from slm_jax.prune.matrices import matrices

PATTERNS = ((1, 4), (2, 4), (4, 8))  # n of every m inputs, the sparsest first


def count(params: Params) -> dict[str, dict[str, jax.Array]]:
  """By matrix: 'zeros', and for each pattern that can be, whether no group has more than n. Jittable."""
  found = {}
  for name, w_LIO in matrices(params).items():
    there, (layers, inputs, outputs) = w_LIO != 0, w_LIO.shape
    found[name] = {'zeros': (~there).sum(dtype=jnp.int32)}
    for n, m in PATTERNS:
      if inputs % m == 0:
        groups = there.reshape(layers, inputs // m, m, outputs).sum(2, dtype=jnp.int32)
        found[name][f'{n}:{m}'] = (groups <= n).all()
  return found


def total(params: Params) -> dict[str, int]:
  """{'zeros': how many}; {} if there are none."""
  n = sum(int(its['zeros']) for its in jax.device_get(jax.jit(count)(params)).values())
  return {'zeros': n} if n else {}


def record(counted: dict[str, dict[str, Any]], sizes: dict[str, int]) -> dict[str, dict[str, Any]]:
  """Of what `count` found, for model.json: share of the weights that is left, and the pattern; only of sparse ones."""
  out: dict[str, dict[str, Any]] = {}
  for name, its in counted.items():
    if zeros := int(its['zeros']):
      patterns = [key for key, holds in its.items() if key != 'zeros' and bool(holds)]
      out[name] = {'density': 1 - zeros / sizes[name], **({'pattern': patterns[0]} if patterns else {})}
  return out
