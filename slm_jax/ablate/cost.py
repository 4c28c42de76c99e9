"""What an arm will take, before it runs: FLOPs, seconds, chip-hours, dollars, joules.

FLOPs are of two kinds. Model FLOPs (`model/flops.py`, teachers' forward passes included) are what the mathematics
needs: they compare methods, and budgets are given in them. Hardware FLOPs (`perf.matmul_flops` of the traced step) are
what the devices execute: recomputation, hidden scores and pruned weights included. Neither counts evaluation.

Seconds are of a launch whose programs are not in the cache: what run.json will call `seconds` and `seconds_start`, the
start of the process, and what follows training. A step and an evaluation come from a measurement on this machine
(`measure.py`) where there is one, and otherwise from stated terms (`estimate.py`), as do the rest. Arms that train in
one program share its seconds, and programs of one process its start.
"""

import heapq
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from slm_jax import chips, perf
from slm_jax.ablate import estimate, measure
from slm_jax.ablate.alike import groups, static_key
from slm_jax.ablate.arms import Arm
from slm_jax.ablate.measure import Pace
from slm_jax.experiment import Config
from slm_jax.model.flops import flops_per_token, parameter_count
from slm_jax.train import hardware_flops

Programs = Sequence[Sequence[str]]  # that one process runs one after another: of each, the ids of the arms it trains


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

  @property
  def of_one(self) -> 'Device':
    """What one arm has of it; a CPU's cores are not told apart here."""
    if self.kind == 'cpu' or self.part == 1:
      return self
    return self._replace(chips=max(1, round(self.chips * self.part)), peak=self.peak * self.part, part=1.0)


class Cost(NamedTuple):
  """What one arm is predicted to take: its share, where several train in one program."""

  parameters: int
  slots: int  # for tokens, in all batches
  flops: float  # model FLOPs
  hardware_flops: float | None  # None if not asked for
  seconds: float
  measured: bool  # whether the pace is from a measurement
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
  config, added = arm.config, estimate.added_flops(arm, arms)
  a_slot = flops_per_token(config.model, config.data.seq_len) + sum(added.values())
  return config.train.steps * config.slots * a_slot


def programs(arms: Sequence[Arm], on: Device) -> list[list[str]]:
  """Returns what one worker makes of these arms (launch/worker.py), in its order.

  It takes the first arm whose parents are done, and all others of that kind that can share its program by then.
  """
  left, place = {arm.arm_id: arm for arm in arms}, {arm.arm_id: i for i, arm in enumerate(arms)}
  devices = jax.device_count() if on.kind == 'cpu' else on.of_one.chips

  def kind_of(arm: Arm) -> str:
    run = arm.config.run
    split = devices > 1 and run.data_parallel * run.fsdp * run.tensor != 1  # over all devices, by itself
    return arm.arm_id if split else static_key(arm.config)

  waits = {i: {parent for parent in arm.parents.values() if parent in left} for i, arm in left.items()}
  children: dict[str, list[str]] = {}
  for i, parents in waits.items():
    for parent in parents:
      children.setdefault(parent, []).append(i)
  kinds = {i: kind_of(arm) for i, arm in left.items()}
  ready: dict[str, dict[str, Config]] = {kind: {} for kind in kinds.values()}
  queue: list[int] = []

  def enter(arm_id: str) -> None:
    heapq.heappush(queue, place[arm_id])
    ready[kinds[arm_id]][arm_id] = left[arm_id].config

  for i in [i for i, parents in waits.items() if not parents]:
    enter(i)
  found = []
  while queue:
    first = arms[heapq.heappop(queue)].arm_id
    if first in left:
      found.append(next(group for group in groups(ready[kinds[first]]) if first in group))
      for i in found[-1]:
        del left[i], ready[kinds[i]][i]
      for child in (child for i in found[-1] for child in children.get(i, ())):
        waits[child].difference_update(found[-1])
        if not waits[child] and child not in ready[kinds[child]]:
          enter(child)
  return found


def predict(
  arms: Mapping[str, Arm],
  on: Device,
  paces: Mapping[str, Pace] | None = None,
  hardware: bool = False,
  processes: Sequence[Programs] = (),
) -> dict[str, Cost]:
  """`{arm id: Cost}` of arms in their order, which is that of their programs as well.

  paces: `{shape key: Pace}` of this machine; they say nothing about another. hardware: whether to trace steps for their
  hardware FLOPs, half a second for each static shape. processes: what each process of the launch runs; arms that stand
  in none train by themselves, and the start of a process is not counted for them.
  """
  paces = (paces or {}) if on.measurable else {}
  executed: dict[str, float] = {}
  keys = {arm_id: measure.shape_key(arm, arms) for arm_id, arm in arms.items()}
  own = {arm_id: paces[key] for arm_id, key in keys.items() if key in paces}
  compiled = {(key, pace.steps, 1, 1) for key, pace in paces.items()}
  seconds = _seconds(arms, on, keys, own, compiled, processes)
  costs = {}
  for arm in arms.values():
    config, steps, key = arm.config, arm.config.train.steps, keys[arm.arm_id]
    if hardware and key not in executed:
      executed[key] = _hardware_flops(arm, arms)
    chip_seconds = seconds[arm.arm_id] * on.part * on.chips
    price, _ = chips.price(on.kind, config.run.price)
    costs[arm.arm_id] = Cost(
      parameters=parameter_count(config.model),
      slots=steps * config.slots,
      flops=model_flops(arm, arms),
      hardware_flops=executed[key] * steps if hardware else None,
      seconds=seconds[arm.arm_id],
      measured=arm.arm_id in own,
      chip_hours=chip_seconds / 3600,
      dollars=None if price is None else chip_seconds / 3600 * price,
      joules=chip_seconds * chips.watts(on.kind)[0],
    )
  return costs


def _seconds(
  arms: Mapping[str, Arm],
  on: Device,
  keys: Mapping[str, str],
  paces: Mapping[str, Pace],
  compiled: set[tuple[str, int, int, int]],
  processes: Sequence[Programs],
) -> dict[str, float]:
  """`{arm id: seconds}`. keys: of the arms' shapes. paces: of the arms that were measured.

  compiled: the programs that are in the cache, by key, steps, arms and orders of the data; those of `arms` are added.
  """
  its, one = estimate.terms(on), on.of_one
  placed = {program[0]: (program, its.process / len(process)) for process in processes for program in process}
  members = {arm_id for program, _ in placed.values() for arm_id in program}
  found: dict[str, float] = {}
  for arm in arms.values():
    if arm.arm_id in members and arm.arm_id not in placed:
      continue  # one of a program, and not its first
    program, starting = placed.get(arm.arm_id, ([arm.arm_id], 0.0))
    group = [arms[arm_id] for arm_id in program]
    own = paces.get(arm.arm_id) or estimate.pace(arm, arms, one)
    kind = keys[arm.arm_id], arm.config.train.steps, len(group), len({each.config.data.seed for each in group})
    loop = estimate.together(own, group, arms, one).seconds(arm.config, kind in compiled)
    compiled.add(kind)
    busy = loop + estimate.finish_seconds(group, one, own)  # all cores; what comes before needs one
    found |= dict.fromkeys(program, (starting + its.program + busy / one.part) / len(group))
  return found


def _hardware_flops(arm: Arm, arms: Mapping[str, Arm]) -> float:
  """Of one step, traced here; nothing is allocated or compiled."""
  with tempfile.TemporaryDirectory() as folder:
    return hardware_flops(measure.stand_in(arm.config, arms, Path(folder), allocate=False))


def basis(on: Device, costs: Mapping[str, Cost], arms: Mapping[str, Arm]) -> str:
  """What the predicted seconds rest on, in words. arms: of the sweep, those of the costs among them."""
  its = estimate.terms(on)
  once = (
    f'{its.process:.0f} s to start a process, {its.program:.3g} s a program and {its.finish:.0f} s to finish it'
    f' ({its.judge:.3g} s more for an arm with a teacher) are assumed; making data is not counted'
  )
  how, estimated = 'measured on this machine, by a few steps of each shape', [i for i in costs if not costs[i].measured]
  if not estimated:
    return f'{how}; {once}'
  compiling = f'{its.evaluation + its.step:.0f} s and {its.layer:.0f} s a layer to compile'
  if on.kind == 'cpu':
    models = [arms[arm_id].config.model for arm_id in estimated]
    rates = sorted(estimate.rate(model.d_model, model.dtype) / 1e9 for model in models)
    guess = (
      f'estimate: products at {" to ".join(dict.fromkeys(f"{rate:.0f}" for rate in (rates[0], rates[-1])))} GFLOP/s'
      f' and {estimate.PASSES:.0f} passes over activations at {perf.measured_elementwise() / 1e9:.1f}G numbers/s'
      f' (both measured); {compiling}'
    )
  else:
    guess = (
      f'estimate: {estimate.UTILISATION:.0%} of {on.peak / 1e9:,.0f} GFLOP/s ({on.source}), at least'
      f' {1e3 * estimate.FLOOR:.0f} ms a step; {compiling}; without the start of machines, and traffic between slices'
    )
  if len(estimated) < len(costs):
    return f'{how}, for {len(costs) - len(estimated)} arms; for the others an {guess}; {once}'
  return f'{guess}; {once}' + ('; --measure takes a few steps instead' if on.measurable else '')
