"""Which axes of which parameters go together when a model is made smaller: the coupled axes, named once.

    layers        the axis over which layers are stacked
    channels      feed-forward width F: of up, gate and down
    groups        key/value heads G, each with its query heads: of q, k, v and o
    queries       query heads of a group, as many in each: of q and o
    width         the residual stream D: of all that reads or writes it, norms and embeddings included
    vocabulary    tokens V: of the embeddings and the head

`print(show(config))` lists them. They follow from the table of axes from which the model itself is made
(decoder.letters), so that nothing can be forgotten. Head size and positions are not cut: RoPE's pairs stay whole.
"""

from typing import Literal, NamedTuple, get_args

import jax

from slm_jax.model import decoder
from slm_jax.model.config import ModelConfig

Unit = Literal['layers', 'channels', 'groups', 'queries', 'width', 'vocabulary']
UNITS: tuple[Unit, ...] = get_args(Unit)
_LETTERS = {'layers': 'L', 'channels': 'F', 'groups': 'GH', 'queries': 'H', 'width': 'D', 'vocabulary': 'V'}


class Axis(NamedTuple):
  """One axis of one parameter."""

  parameter: str  # 'layers.up'
  axis: int
  letter: str  # of the legend in model/config.py
  size: int


PruneSpec = dict[Unit, tuple[Axis, ...]]


def spec(config: ModelConfig) -> PruneSpec:
  """The axes of each unit, in the order of the parameters."""
  table = jax.tree.leaves_with_path(decoder.letters(config))
  shapes = jax.tree.leaves(decoder.shapes(config))
  found = [
    Axis('.'.join(key.key for key in path), axis, letter, shape.shape[axis])
    for (path, axes), shape in zip(table, shapes, strict=True)
    for axis, letter in enumerate(axes)
  ]
  return {unit: tuple(a for a in found if a.letter in _LETTERS[unit]) for unit in UNITS}


def size(config: ModelConfig, unit: Unit) -> int:
  """How many of the unit there are: in each layer, and in each group, where there are several."""
  return {
    'layers': config.n_layers,
    'channels': config.d_ff,
    'groups': config.n_kv_heads,
    'queries': config.n_heads // config.n_kv_heads,
    'width': config.d_model,
    'vocabulary': config.vocab_size,
  }[unit]


def show(config: ModelConfig) -> str:
  """A line for each unit: how many there are, and the axes that are cut together."""
  lines = []
  for unit, axes in spec(config).items():
    where = ', '.join(f'{a.parameter}[{a.axis}]' for a in axes)
    lines.append(f'{unit:<11}{size(config, unit):>7}  {where}')
  return '\n'.join(lines)
