"""What the rest of the code knows of a model: two pure functions over a parameter tree."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from slm_jax.model.config import ModelConfig

Params = Any  # a pytree of arrays
Batch = Mapping[str, jax.Array]  # inputs_BT, targets_BT, segments_BT int32, mask_BT float32; transforms may add more


class Model(NamedTuple):
  """A model as two pure functions; their composition gives logits, which the loss never holds all at once."""

  config: ModelConfig
  init: Callable[[jax.Array], Params]
  hidden: Callable[[Params, Batch], jax.Array]  # reads inputs and segments -> x_BTD, after the final norm
  head: Callable[[Params, jax.Array], jax.Array]  # (params, x_...D) -> float32 logits_...V, soft-cap included
