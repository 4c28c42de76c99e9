"""What the rest of the code knows of a model: a few pure functions over a parameter tree."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax

from slm_jax.model.config import ModelConfig

Params = Any  # a pytree of arrays
Batch = Mapping[str, jax.Array]  # inputs_BT, targets_BT, segments_BT int32, mask_BT float32; transforms may add more


class Feature(NamedTuple):
  """Something that a model computes on its way.

  hidden: the residual stream after layer 1..L, [B,T,D]; layer 0 is the embeddings.
  q, k, v: of layer 1..L as attention takes them, after their norm and RoPE: [B,T,H,K], [B,T,G,K], [B,T,G,K].
  Inputs of the matrices of layer 1..L: into_qkv [B,T,D], into_o [B,T,H,K], into_mlp [B,T,D] (up and gate), into_down
  [B,T,F].
  """

  kind: Literal['hidden', 'q', 'k', 'v', 'into_qkv', 'into_o', 'into_mlp', 'into_down']
  layer: int


Features = dict[Feature, jax.Array]


class Model(NamedTuple):
  """A model as two pure functions; their composition gives logits, which the loss never holds all at once."""

  config: ModelConfig
  init: Callable[[jax.Array], Params]
  hidden: Callable[[Params, Batch], jax.Array]  # reads inputs and segments -> x_BTD, after the final norm
  # (params, x_...D) -> float32 logits_...V, soft-cap included; blocks of them only of `decoder.in_blocks`
  head: Callable[[Params, jax.Array], Any]
  # `hidden` and, of the same pass, what is wanted of it; layers that the model does not have are a ConfigError
  features: Callable[[Params, Batch, Sequence[Feature]], tuple[jax.Array, Features]]
