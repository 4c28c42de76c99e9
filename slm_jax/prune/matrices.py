"""The matrices of a model's layers as [L,I,O]: what criteria, selection and compensation work on.

L layers, I inputs, O outputs: heads and their sizes are one axis. Contraction is over I, which is the second axis here
and the last one of W[out, in] in most papers. A matrix of one layer is `w_IO`; an output is a column of it (in the
papers: a row).
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from slm_jax.model.api import Params
from slm_jax.model.config import ModelConfig
from slm_jax.model.decoder import shapes

Into = Literal['into_qkv', 'into_o', 'into_mlp', 'into_down']
Matrices = dict[str, jax.Array]  # [L,I,O] by name; or scores or masks of the same shapes


class Site(NamedTuple):
  into: Into  # the feature of the model (model/api.py) that is multiplied by it
  n_in: int = 1  # axes of its inputs, after that of the layers


SITES = {
  'q': Site('into_qkv'),
  'k': Site('into_qkv'),
  'v': Site('into_qkv'),
  'o': Site('into_o', 2),
  'gate': Site('into_mlp'),
  'up': Site('into_mlp'),
  'down': Site('into_down'),
}


def matrices(params: Params) -> Matrices:
  """Those of the layers, in the order of SITES; of the parameters, or of any tree that is shaped like them."""
  layers = params['layers']
  return {name: _flat(layers[name], site.n_in) for name, site in SITES.items() if name in layers}


def put(params: Params, new: Mapping[str, jax.Array]) -> Params:
  """The parameters with these matrices in place of theirs; dtypes stay."""
  layers = params['layers']
  own = {name: w.reshape(layers[name].shape).astype(layers[name].dtype) for name, w in new.items()}
  return {**params, 'layers': {**layers, **own}}


def full(params: Params, masks: Mapping[str, jax.Array]) -> Any:
  """A tree of booleans like the parameters: the masks, and True for all that has none."""
  return put(jax.tree.map(lambda p: jnp.ones(p.shape, bool), params), masks)


def sizes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """(L, I, O) by name, of a model that need not exist, in the order of SITES."""
  found = jax.eval_shape(matrices, shapes(config))  # which sorts names
  return {name: found[name].shape for name in SITES if name in found}


def _flat(w: jax.Array, n_in: int) -> jax.Array:
  layers, inside, outside = w.shape[0], w.shape[1 : 1 + n_in], w.shape[1 + n_in :]
  return w.reshape(layers, math.prod(inside), math.prod(outside))
