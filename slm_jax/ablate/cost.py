"""What an arm will take, before it runs."""

from collections.abc import Mapping
from typing import NamedTuple

from slm_jax import perf
from slm_jax.ablate.arms import Arm
from slm_jax.model.flops import flops_per_token, parameter_count

UTILISATION = 0.35  # of the matrix-product peak, typical of small models; the prediction of time is no better than this


class Cost(NamedTuple):
  parameters: int
  tokens: int
  flops: float  # of this arm's training, its teachers' forward passes included
  seconds: float  # an estimate


def predict(arms: Mapping[str, Arm]) -> dict[str, Cost]:
  """`{arm id: Cost}`. FLOPs = tokens * (own forward and backward + forward of every arm that a transform refers to)."""
  rate = UTILISATION * perf.peak_flops()[0]
  costs = {}
  for arm in arms.values():
    data, model = arm.config.data, arm.config.model
    tokens = arm.config.train.steps * data.batch_size * data.seq_len
    teachers = [arms[parent].config.model for key, parent in arm.parents.items() if key.startswith('transforms.')]
    a_token = flops_per_token(model, data.seq_len)
    a_token += sum(flops_per_token(teacher, data.seq_len, backward=False) for teacher in teachers)
    flops = tokens * a_token
    costs[arm.arm_id] = Cost(parameter_count(model), tokens, flops, flops / rate)
  return costs


def basis() -> str:
  """What the predicted seconds rest on, in words."""
  peak, source = perf.peak_flops()
  return f'{UTILISATION:.0%} of {peak / 1e9:,.0f} GFLOP/s ({source})'
