"""Which arms can share one program: those that differ only in traced numbers and seeds. Needs no JAX."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

from slm_jax import config as configs

if TYPE_CHECKING:
  from slm_jax.experiment import Config


def static_key(config: 'Config') -> str:
  """What must be equal for two arms to share a program: all but traced numbers, seeds, names and initial parameters."""
  neutral = configs.static(config)
  data, init = dataclasses.replace(neutral.data, seed=0), dataclasses.replace(neutral.init, arm='')
  return configs.canonical_json(dataclasses.replace(neutral, name='', seed=0, init=init, data=data))


def groups(arms: 'Mapping[str, Config]') -> list[list[str]]:
  """Arm ids, in groups that can be populations: of one static key, and with as many arms for each order of the data."""
  orders: dict[tuple[str, int], list[str]] = {}
  for arm_id, config in arms.items():
    alone = not config.run.population or config.run.profile or config.run.dump
    key = arm_id if alone else static_key(config)
    orders.setdefault((key, config.data.seed), []).append(arm_id)
  found: dict[tuple[str, int], list[str]] = {}
  for (key, _), members in orders.items():
    found.setdefault((key, len(members)), []).extend(members)
  return list(found.values())
