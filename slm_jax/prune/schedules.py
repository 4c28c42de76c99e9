"""How much is pruned at a step: s(t), traced in the step and in the target."""

from typing import Literal

import jax
import jax.numpy as jnp

Schedule = Literal['one_shot', 'cubic', 'iterative', 'cyclic']
CYCLES = 4


def sparsity_at(schedule: Schedule, step: jax.Array, first: int, last: int, target: jax.Array) -> jax.Array:
  """0 before the step `first`, the target from `last` on; between them, with p = (step - first)/(last - first):

  one_shot   s(t) = target
  cubic      s(t) = target (1 - (1 - p)^3)                       Zhu & Gupta, arXiv 1710.01878
  iterative  s(t) = 1 - (1 - target)^p: the same share of what is left each round, as in arXiv 1803.03635
  cyclic     the cubic CYCLES times over, from 0 each time: what was pruned may come back (arXiv 2202.01290)
  """
  p = jnp.clip((step - first) / max(last - first, 1), 0, 1)
  if schedule == 'one_shot':
    s = target
  elif schedule == 'iterative':
    s = 1 - (1 - target) ** p
  else:
    s = target * (1 - (1 - (p if schedule == 'cubic' else CYCLES * p % 1)) ** 3)
  return jnp.where(step < first, 0.0, jnp.where(step >= last, target, s))
