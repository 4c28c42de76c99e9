"""What is zero in a model: how many weights, and in which patterns; for the books, and for who opens it elsewhere.

A runtime that multiplies n of every m inputs only (2:4 on some GPUs) needs to be told which matrices are so. What it is
told is what the arm's recipe made: a small matrix of random zeros may fit a pattern by chance.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from slm_jax.model.api import Params
from slm_jax.prune.matrices import matrices
from slm_jax.prune.patterns import Pattern

# By matrix: the share of the weights that is left, and the pattern, if one was made.
Sparsity = dict[str, dict[str, Any]]


def count(params: Params, patterns: Sequence[str] = ()) -> dict[str, dict[str, jax.Array]]:
  """By matrix: its zeros, and for each n:m pattern whether no group of m inputs has more than n other weights."""
  found = {}
  for name, w_LIO in matrices(params).items():
    there, (layers, inputs, outputs) = w_LIO != 0, w_LIO.shape
    found[name] = {'zeros': (~there).sum(dtype=jnp.int32)}
    for pattern in patterns:
      rule = Pattern.parse(pattern, 'pattern')
      if inputs % rule.m == 0:
        groups = there.reshape(layers, inputs // rule.m, rule.m, outputs).sum(2, dtype=jnp.int32)
        found[name][pattern] = (groups <= rule.n).all()
  return found


_count = jax.jit(count, static_argnums=1)


def total(params: Params) -> dict[str, int]:
  """{'zeros': how many}; {} if there are none."""
  n = sum(int(its['zeros']) for its in jax.device_get(_count(params)).values())
  return {'zeros': n} if n else {}


def made(config: Any, recorded: Callable[[str], Sparsity]) -> dict[str, list[str]]:
  """The n:m patterns that an arm's recipe put into each matrix, the latest first.

  recorded: what the model of another arm (id) says of itself, for the zeros that this one started with.
  """
  found: dict[str, list[str]] = {}
  own = [getattr(part, 'pattern', '') for part in config.transforms if getattr(part, 'sparsity', 0.0) > 0]
  if config.init.sparse.criterion != 'none':
    own.append(config.init.sparse.pattern)
  others = [config.init.arm, *(getattr(part, 'ticket', '') for part in config.transforms)]
  for arm in filter(None, others):
    for name, its in recorded(arm).items():
      found.setdefault(name, []).extend([its['pattern']] if 'pattern' in its else [])
  patterns = [pattern for pattern in own if Pattern.parse(pattern or 'layer', 'pattern').kind == 'n:m']
  return {'': patterns, **found}


def record(params: Params, patterns: Mapping[str, Sequence[str]]) -> Sparsity:
  """For model.json, of matrices with zeros: share of the weights that is left, and the pattern.

  patterns: those that were `made`, by matrix; under '', in all matrices. Training may have filled the zeros since, so
  each is checked.
  """
  known = tuple(dict.fromkeys(pattern for each in patterns.values() for pattern in each))
  sizes = {name: w.size for name, w in matrices(params).items()}
  out: Sparsity = {}
  for name, its in jax.device_get(_count(params, known)).items():
    if zeros := int(its['zeros']):
      holds = [each for each in (*patterns.get('', ()), *patterns.get(name, ())) if its.get(each)]
      out[name] = {'density': 1 - zeros / sizes[name], **({'pattern': holds[0]} if holds else {})}
  return out
