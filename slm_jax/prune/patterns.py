"""Which weights of a matrix are kept, given how many: `select(scores, keep, pattern, allocation)` -> masks.

    'layer'    the best of the matrix
    'output'   the best of each output (Wanda's row)
    '2:4'      the best n of every m inputs that follow each other, for each output: along the axis of contraction
    '16x16'    the best square blocks, by the sum of their scores

Exact to one weight (n:m: one a group; blocks: one block), ties cut by index, without sort or gather; budgets may be
traced. Scores are `Matrices` [L,I,O] (matrices.py), NaN counts as smallest. How many: allocate.py.
"""

import re
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from slm_jax.config import require
from slm_jax.prune.allocate import Allocation, Counts, Shapes, allocate, erk, pooled
from slm_jax.prune.matrices import Matrices
from slm_jax.prune.select import largest, ordered


class Pattern(NamedTuple):
  """A pattern's text, taken apart."""

  kind: Literal['layer', 'output', 'n:m', 'block']
  n: int = 0  # kept of every
  m: int = 1  # inputs; or the side of a block

  @classmethod
  def parse(cls, text: str, key: str) -> 'Pattern':
    """ConfigError for what is none."""
    if text in ('layer', 'output'):
      return cls(text)  # type: ignore[arg-type]
    if (found := re.fullmatch(r'(\d+):(\d+)', text)) and 0 < int(found[1]) < int(found[2]):
      return cls('n:m', int(found[1]), int(found[2]))
    found = re.fullmatch(r'(\d+)x\1', text)
    require(
      found is not None and int(found[1]) > 1,
      f'{key}={text}: allowed: layer, output, n of m inputs as in 2:4, square blocks as in 16x16',
    )
    return cls('block', m=int(found[1]))  # type: ignore[index]


def select(
  scores: Matrices,
  keep: jax.Array | float,
  pattern: str = 'layer',
  allocation: Allocation = 'uniform',
  alive: Matrices | None = None,
) -> Matrices:
  """Boolean masks of the share `keep` of the weights with the largest scores.

  alive: masks that the new ones are to be within; they are, however much larger the budget.
  A budget of less than one weight for a matrix (an output, a block) is a ConfigError where `keep` is a Python number,
  and one weight where it is traced. 'n:m' keeps round(keep m) of m, at least n, so a schedule may come down to it.
  """
  rule = Pattern.parse(pattern, 'pattern')
  shapes = {name: s.shape for name, s in scores.items()}
  check_shapes(rule, shapes, 'pattern')
  if not isinstance(keep, jax.Array):
    check_budget(rule, shapes, keep, allocation, 'keep', f'{keep:g}')
  keep = jnp.maximum(keep, rule.n / rule.m)
  most = None
  if alive is not None:
    scores = {name: jnp.where(alive[name], s, -jnp.inf) for name, s in scores.items()}
    most = {name: a.sum((1, 2), jnp.int32) for name, a in alive.items()}
  if rule.kind == 'layer' and allocation in ('tensor', 'global'):
    masks = pooled(scores, keep, allocation)
  else:
    masks = cut(scores, allocate(scores, keep, allocation, most), rule)
  return masks if alive is None else {name: mask & alive[name] for name, mask in masks.items()}


def cut(scores: Matrices, counts: Counts, rule: Pattern) -> Matrices:
  """Masks of the largest scores, so many in each matrix of each layer."""
  of = {'layer': _of_layer, 'output': _of_outputs, 'n:m': _of_groups, 'block': _of_blocks}[rule.kind]
  return {name: of(score_LIO, counts[name], rule) for name, score_LIO in scores.items()}


def _of_layer(score_LIO: jax.Array, count_L: jax.Array, rule: Pattern) -> jax.Array:
  return jax.vmap(lambda score, k: largest([score], k)[0])(score_LIO, count_L)


def _of_outputs(score_LIO: jax.Array, count_L: jax.Array, rule: Pattern) -> jax.Array:
  """The outputs get as many each; of what does not divide, one each for the first of them."""
  outputs = score_LIO.shape[2]
  more_LO = jnp.arange(outputs)[None] < (count_L % outputs)[:, None]
  count_LO = jnp.maximum((count_L // outputs)[:, None] + more_LO, 1)
  one_layer = jax.vmap(lambda score, k: largest([score], k)[0], in_axes=(1, 0), out_axes=1)
  return jax.vmap(one_layer)(score_LIO, count_LO)


def _of_groups(score_LIO: jax.Array, count_L: jax.Array, rule: Pattern) -> jax.Array:
  """A score is kept if fewer than n of its group are before it; each is compared with all m, one after another."""
  layers, inputs, outputs = score_LIO.shape
  key = ordered(score_LIO).reshape(layers, inputs // rule.m, rule.m, outputs)
  place = jnp.arange(rule.m).reshape(1, 1, rule.m, 1)
  before = jnp.zeros(key.shape, jnp.int32)
  for j in range(rule.m):
    other = key[:, :, j : j + 1]
    before += (other > key) | ((other == key) & (j < place))
  n_L = jnp.round(count_L * (rule.m / (inputs * outputs))).astype(jnp.int32).clip(1, rule.m)
  return (before < n_L.reshape(layers, 1, 1, 1)).reshape(score_LIO.shape)


def _of_blocks(score_LIO: jax.Array, count_L: jax.Array, rule: Pattern) -> jax.Array:
  layers, inputs, outputs = score_LIO.shape
  b = rule.m
  each = score_LIO.reshape(layers, inputs // b, b, outputs // b, b)
  alive = each != -jnp.inf
  # Of the weights that may stay: those that may not are no reason to take another block.
  blocks = jnp.where(alive.any((2, 4)), jnp.where(alive, each, 0).sum((2, 4)), -jnp.inf)
  kept = _of_layer(blocks, jnp.maximum(jnp.round(count_L / b**2).astype(jnp.int32), 1), rule)
  return jnp.repeat(jnp.repeat(kept, b, axis=1), b, axis=2)


# ------------------------------------------------------------------------------------------------- what cannot be meant


def check_sparsity(rule: Pattern, sparsity: float, allocation: Allocation, key: str) -> None:
  """ConfigError for a share of zeros that the pattern does not have; key: of the settings."""
  if rule.kind == 'n:m':
    text, left = f'{rule.n}:{rule.m}', 1 - rule.n / rule.m
    require(abs(sparsity - left) < 1e-6, f'{key}.sparsity={sparsity}: must be {left:g} with pattern={text}')
    require(
      allocation == 'uniform',
      f'{key}.allocation={allocation}: with pattern={text} every matrix keeps the same share: uniform',
    )


def check_shapes(rule: Pattern, shapes: Shapes, key: str) -> None:
  """ConfigError for a matrix that the pattern does not divide."""
  for name, (_, inputs, outputs) in shapes.items():
    text = f'{rule.n}:{rule.m}' if rule.kind == 'n:m' else f'{rule.m}x{rule.m}'
    require(inputs % rule.m == 0, f'{key}={text}: {rule.m} does not divide the {inputs} inputs of {name}')
    require(
      rule.kind != 'block' or outputs % rule.m == 0,
      f'{key}={text}: {rule.m} does not divide the {outputs} outputs of {name}',
    )


def check_budget(rule: Pattern, shapes: Shapes, keep: float, allocation: Allocation, key: str, value: str) -> None:
  """ConfigError for a share that leaves a matrix, or an output of one, without any weight.

  What depends on the scores is not known before there are any: those budgets are one weight at least.
  """
  if allocation in ('tensor', 'global'):
    matrices = {name: (s[0], s[0] * s[1] * s[2]) for name, s in shapes.items()}
    pools = [[m] for m in matrices.values()] if allocation == 'tensor' else [list(matrices.values())]
    for pool in pools:
      left, needed = round(keep * sum(size for _, size in pool)), sum(layers for layers, _ in pool)
      require(left >= needed, f'{key}={value}: leaves {left} weights for {needed} matrices, each of which needs one')
    return
  if rule.kind == 'n:m':
    require(keep > rule.n / rule.m - 1e-6, f'{key}={value}: less than the {rule.n} of {rule.m} of the pattern')
    return
  shares = dict(zip(shapes, erk(shapes, keep) if allocation == 'erk' else [keep] * len(shapes), strict=True))
  for name, (_, inputs, outputs) in shapes.items():
    left = round(shares[name] * inputs * outputs)
    units, what = {
      'layer': (left, 'weight in a matrix'),
      'output': (left // outputs, 'weight in an output'),
      'block': (round(left / rule.m**2), 'block in a matrix'),
    }[rule.kind]
    require(units >= 1, f'{key}={value}: leaves no {what} of {name}')
