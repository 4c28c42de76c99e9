"""What an arm will take, before it runs: FLOPs, seconds, chip-hours, dollars, joules.

FLOPs are of two kinds. Model FLOPs (`model/flops.py`, teachers' forward passes included) are what the mathematics
needs: they compare methods, and budgets are given in them. Hardware FLOPs (`perf.matmul_flops` of the traced step) are
what the devices execute: recomputation, hidden scores and pruned weights included. Neither counts evaluation.

Seconds come from a measurement of the arm's own step on this machine (`measure.py`) where there is one, otherwise from
model FLOPs at a stated share of the devices' peak, which is off by a factor of two or more for small models.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from slm_jax import chips, perf
from slm_jax.ablate import measure
from slm_jax.ablate.arms import Arm
from slm_jax.ablate.measure import Pace
from slm_jax.model.flops import flops_per_token, parameter_count
from slm_jax.step import merge_flops
from slm_jax.train import hardware_flops

UTILISATION = 0.35  # of the matrix-product peak, typical of small models; for what has not been measured


class Device(NamedTuple):
  """What arms will run on."""

  kind: str  # as JAX calls it
  chips: int
  peak: float  # FLOP/s of all of them
  source: str  # of the peak
  here: bool
  part: float = 1.0  # of these chips that one arm has, where several workers train side by side

  @property
  def measurable(self) -> bool:
    """Whether a pace of this machine says how fast an arm is. On part of the cores, it takes that much longer."""
    return self.here and (self.part == 1 or self.kind == 'cpu')


class Cost(NamedTuple):
  """What one arm is predicted to take by itself; arms that train together (populations) take less time."""

  parameters: int
  slots: int  # for tokens, in all batches
  flops: float  # model FLOPs
  hardware_flops: float | None  # None if not asked for
  seconds: float
  measured: bool  # whether the seconds are from a measurement
  chip_hours: float
  dollars: float | None  # None if nobody knows the price
  joules: float  # an estimate: chip-seconds times stated watts


def device(name: str = '', count: int = 1) -> Device:
  """The devices of this machine, or `count` chips of that name in chips.toml."""
  if not name:
    devices = jax.devices()
    kind = devices[0].device_kind
    peak, source = perf.peak_flops()
    return Device(kind, chips.count(kind, len(devices), jax.process_count()), peak, source, here=True)
  kind = chips.table()[name].kinds[0]
  return Device(
    kind, count, perf.published_peak(kind) * count, f'published bfloat16 peak of {count} x {name}', here=False
  )


def model_flops(arm: Arm, arms: Mapping[str, Arm]) -> float:
  """Returns the model FLOPs of an arm's training: its own, and what its transforms add, such as a teacher's.

  It is what run.json will call `flops`: the slots of all batches, prompts and padding included, times those of a slot.
  """
  config, length = arm.config, arm.config.data.seq_len
  models = {parent: arms[parent].config.model for parent in arm.parents.values()}
  added = merge_flops(part.count_flops(config.model, length, models) for part in config.transforms)
  return config.train.steps * config.slots * (flops_per_token(config.model, length) + sum(added.values()))


def predict(
  arms: Mapping[str, Arm], on: Device, paces: Mapping[str, Pace] | None = None, hardware: bool = False
) -> dict[str, Cost]:
  """`{arm id: Cost}` of arms in the order in which they run, one after another.

  paces: `{shape key: Pace}` of this machine; they say nothing about another. hardware: whether to trace steps for their
  hardware FLOPs, half a second for each static shape.
  """
  paces = (paces or {}) if on.measurable else {}
  executed: dict[str, float] = {}
  compiled = {(key, pace.steps) for key, pace in paces.items()}
  costs = {}
  for arm in arms.values():
    config, key = arm.config, measure.shape_key(arm, arms)
    steps = config.train.steps
    flops = model_flops(arm, arms)
    if hardware and key not in executed:
      executed[key] = _hardware_flops(arm, arms)
    pace = paces.get(key)
    whole = pace.seconds(config, (key, steps) in compiled) if pace else flops / (UTILISATION * on.peak)
    seconds = whole / on.part
    compiled.add((key, steps))
    chip_seconds = seconds * on.part * on.chips
    price, _ = chips.price(on.kind, config.run.price)
    costs[arm.arm_id] = Cost(
      parameters=parameter_count(config.model),
      slots=steps * config.slots,
      flops=flops,
      hardware_flops=executed[key] * steps if hardware else None,
      seconds=seconds,
      measured=pace is not None,
      chip_hours=chip_seconds / 3600,
      dollars=None if price is None else chip_seconds / 3600 * price,
      joules=chip_seconds * chips.watts(on.kind)[0],
    )
  return costs


def _hardware_flops(arm: Arm, arms: Mapping[str, Arm]) -> float:
  """Of one step, traced here; nothing is allocated or compiled."""
  with tempfile.TemporaryDirectory() as folder:
    return hardware_flops(measure.stand_in(arm.config, arms, Path(folder), allocate=False))


def basis(on: Device, costs: Sequence[Cost]) -> str:
  """What the predicted seconds rest on, in words."""
  guess = f'{UTILISATION:.0%} of {on.peak / 1e9:,.0f} GFLOP/s ({on.source}), without evaluation and compilation'
  measured, how = sum(cost.measured for cost in costs), 'measured on this machine, by a few steps of each shape of arm'
  if measured == len(costs):
    return how
  if measured:
    return f'{how}, for {measured} arms; for the others an estimate, {guess}'
  return f'estimate, {guess}' + ('; --measure takes a few steps instead' if on.measurable else '')
