"""One arm's training step, compiled for chips that are not here, and what can be read from that."""

import collections
import dataclasses
import functools
import math
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from launch import aot_hlo
from launch.aot_hlo import Collective
from slm_jax import perf, sharding, train
from slm_jax.ablate import estimate, measure, program
from slm_jax.ablate.arms import Arm
from slm_jax.chips import Chip
from slm_jax.config import ConfigError
from slm_jax.experiment import Config
from slm_jax.model.fused import kernels_in

FARTHEST = 64  # times the largest batch that is known to fit, in one try for a larger one
TRIES = 5  # compilations that the search for the largest batch may take
UNITS = {'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


class Facts(NamedTuple):
  """What is known of one compiled step. Bytes are of one chip, FLOPs of all."""

  mesh: tuple[int, int, int]
  batch: int  # sequences
  tokens: int  # of a step, all arms of a population counted
  fits: bool
  needed: float  # bytes
  limit: float  # bytes that the compiler has to give away
  parts: Mapping[str, float]  # of `needed`
  flops: float  # that are executed
  model_flops: float
  traffic: float  # bytes to and from memory
  collectives: Sequence[Collective]
  kernels: Mapping[str, int]  # fused attention; {}: the reference
  seconds: float  # it took to compile

  @property
  def chips(self) -> int:
    return math.prod(self.mesh)

  def roofs(self, chip: Chip) -> dict[str, float]:
    """Seconds below which a step cannot go, by what it would be waiting for; the peaks are the published ones."""
    ici, dcn = (sum(c.sent[i] for c in self.collectives) for i in (0, 1))
    return {
      'compute': self.flops / self.chips / perf.published_peak(chip.kinds[0]),
      'memory': self.traffic / chip.bandwidth,
      'ICI': ici / chip.ici,
      'network': dcn / chip.dcn if chip.dcn else 0.0,
    }

  def bound(self, chip: Chip) -> tuple[float, str]:
    """`(seconds, what sets them)` of a step that overlaps everything perfectly."""
    seconds, what = max((seconds, what) for what, seconds in self.roofs(chip).items())
    return seconds, what

  def mfu(self, chip: Chip) -> float:
    """The most that the bound allows: model FLOPs over what the chips could do in that time."""
    return self.model_flops / (self.bound(chip)[0] * self.chips * perf.published_peak(chip.kinds[0]))


def facts(
  arm: Arm, everyone: Mapping[str, Arm], mesh: Mesh, chip: Chip, group: Sequence[Config] = (), batch: int = 0
) -> Facts:
  """Compiles the step of `arm` for the devices of `mesh`. ConfigError for what does not divide.

  group: arms with which it is one program, a population. batch: in place of the arm's own data.batch_size.
  """
  config = arm.config
  if batch:
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=batch))
  with tempfile.TemporaryDirectory() as folder:
    job = measure.stand_in(config, everyone, Path(folder), allocate=False, mesh=mesh, mapped=bool(group))
  orders = len({member.data.seed for member in group}) or 1
  arms = max(len(group), 1)
  state, traced = _trace(job, (orders, arms // orders), bool(group))
  start = time.monotonic()
  compiled, used, _ = _compile(traced.lower())
  limit = usable(mesh.devices.flat[0]) or chip.hbm
  seconds = time.monotonic() - start
  parts = _parts(state, job.frozen, train.abstract_batch(job), orders)
  if compiled is not None:
    memory = compiled.memory_analysis()
    given = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    parts |= {'activations': memory.temp_size_in_bytes, 'code': memory.generated_code_size_in_bytes}
    parts['padding'] = max(
      given - sum(parts[name] for name in ('parameters', 'optimiser', 'transforms', 'teacher', 'batch')), 0
    )
  else:
    parts['activations'] = used
  text, needed = compiled.as_text() if compiled is not None else '', sum(parts.values())
  tokens = config.data.batch_size * config.data.seq_len
  own, shared = estimate.own_flops(arm, everyone), sum(estimate.teachers_flops(arm, everyone).values())
  return Facts(
    mesh=_shape(mesh),
    batch=config.data.batch_size,
    tokens=tokens * arms,
    fits=compiled is not None and needed <= limit,
    needed=needed,
    limit=limit,
    parts=parts,
    flops=perf.matmul_flops(traced.jaxpr),
    model_flops=tokens * (arms * own + orders * shared),
    traffic=aot_hlo.hbm_bytes(text) if text else 0.0,
    collectives=aot_hlo.collectives(text, mesh.size, slices_of(mesh)) if text else (),
    kernels=kernels_in(text or traced.lower().as_text()),
    seconds=seconds,
  )


def _shape(mesh: Mesh) -> tuple[int, int, int]:
  """data x fsdp x tensor, of all slices together, as `make_mesh` takes it."""
  return mesh.shape['slice'] * mesh.shape['data'], mesh.shape['fsdp'], mesh.shape['tensor']


def slices_of(mesh: Mesh) -> int:
  return len({getattr(device, 'slice_index', None) for device in mesh.devices.flat})


def _trace(job: train.Job, shape: tuple[int, int], together: bool) -> tuple[Any, Any]:
  """`(state, the step that training jits, traced)`, of shapes only."""
  batch = train.abstract_batch(job)
  if not together:
    return job.abstract, train.jitted(job).trace(job.abstract, batch, job.frozen)
  layout = NamedSharding(job.layout.step.mesh, PartitionSpec())  # type: ignore[attr-defined]  # one device
  rows = {
    name: jax.ShapeDtypeStruct((shape[0], *entry.shape), entry.dtype, sharding=layout) for name, entry in batch.items()
  }
  return program.stacked(job.abstract, shape), program.trace(job, shape, rows, side_by_side=True)


def _compile(lowered: Any) -> tuple[Any, float, float]:
  """`(program, 0, 0)`, or `(None, bytes of temporaries it would need, bytes there are)` if memory is too small."""
  try:
    return lowered.compile(), 0.0, 0.0
  except jax.errors.JaxRuntimeError as error:
    text = str(error)
    if 'RESOURCE_EXHAUSTED' not in text and 'Ran out of memory' not in text:
      raise
    amounts = [float(number) * UNITS[unit] for number, unit in re.findall(r'([\d.]+)([KMGT])\b', text)]
    used, limit = amounts[:2] if len(amounts) > 1 else (0.0, 0.0)
    return None, used, limit


@functools.cache
def usable(device: Any) -> float:
  """Bytes of a chip's memory that programs may use: a little is the system's. From the refusal of 10 TB.

  The compiler only holds temporaries against them, not what a program is given as well.
  """
  layout = NamedSharding(Mesh(np.asarray([device]), ('all',)), PartitionSpec())
  much = jax.ShapeDtypeStruct((1 << 21, 1 << 20), np.float32, sharding=layout)
  return _compile(jax.jit(lambda x: (x @ x.T) @ x).lower(much))[2]


def _parts(state: Any, frozen: Any, batch: Any, orders: int) -> dict[str, float]:
  """Bytes of one chip's share of what a step is given."""
  return {
    'parameters': share(state.params),
    'optimiser': share(state.opt_state),
    'transforms': share(state.slots),
    'teacher': share(frozen),
    'batch': orders * share(batch),
  }


def share(tree: Any) -> float:
  """Bytes of one device's part of shapes that have shardings; what has none is taken to be whole on each."""
  total = 0.0
  for leaf in jax.tree.leaves(tree):
    where = getattr(leaf, 'sharding', None)
    shape = where.shard_shape(leaf.shape) if where is not None else leaf.shape
    total += math.prod(shape) * leaf.dtype.itemsize
  return total


# ---------------------------------------------------------------------------------------------------------- searches


def largest(first: Facts, unit: int, of: Callable[[int], Facts]) -> tuple[int, int]:
  """`(largest batch that fits, smallest known that does not)`, in sequences; 0 if none, or none is known.

  unit: sequences that devices and accumulation share out, at least. of: the facts for a batch, which compiles. Memory
  is taken to grow linearly, which is a guess: the compiler recomputes more as it gets scarce. Hence several tries.
  """
  known = {first.batch // unit: first}
  for _ in range(TRIES):
    good = max((n for n, its in known.items() if its.fits), default=0)
    bad = min((n for n, its in known.items() if not its.fits), default=0)
    if bad and bad - good <= max(1, good // 16):
      break
    guess = _guess(known)
    if not bad:
      guess = min(guess, FARTHEST * good)  # of a small batch next to nothing is known of a large one
    elif guess >= bad:
      guess = math.isqrt(max(good, 1) * bad)
    n = max(good + 1, min(guess, bad - 1) if bad else guess)
    known[n] = of(n * unit)
  good = max((n for n, its in known.items() if its.fits), default=0)
  bad = min((n for n, its in known.items() if not its.fits), default=0)
  return good * unit, bad * unit


def _guess(known: Mapping[int, Facts]) -> int:
  """Units whose activations fill what the state leaves, as far as is known of them."""
  fitting = [n for n, its in known.items() if its.fits]
  n = max(fitting) if fitting else min(known)
  its = known[n]
  grows = its.parts['activations'] + its.parts['batch']
  left = its.limit - (its.needed - grows)
  return int(n * left / grows) if grows > 0 and left > 0 else (2 * n if its.fits else n // 2)


def meshes(devices: int, slices: int) -> Iterator[tuple[int, int, int]]:
  """data x fsdp x tensor: tensor up to 8, fsdp by steps of 4 and the most there is."""
  for tensor in (1, 2, 4, 8):
    most = devices // tensor // slices
    sizes = sorted({n for n in (1, 4, 16, 64, 256, 1024, most) if 0 < n <= most})
    for fsdp in sizes:
      if devices % (fsdp * tensor) == 0 and devices // (fsdp * tensor) % slices == 0:
        yield devices // (fsdp * tensor), fsdp, tensor


def sweep(
  shapes: Sequence[tuple[int, int, int]], of: Callable[[tuple[int, int, int]], Facts], chip: Chip
) -> tuple[list[Facts], dict[tuple[int, int, int], str]]:
  """`(what compiled, the fastest bound first and what does not fit last; why others cannot be)`."""
  found, refused = [], {}
  for shape in shapes:
    try:
      found.append(of(shape))
    except ConfigError as error:
      refused[shape] = str(error)
  return sorted(found, key=lambda its: (not its.fits, its.bound(chip)[0])), refused


def by_kind(collectives: Sequence[Collective]) -> dict[str, tuple[int, float]]:
  """`{kind: (how many, bytes)}`"""
  total: dict[str, list[float]] = collections.defaultdict(lambda: [0, 0.0])
  for one in collectives:
    total[one.kind][0] += one.times
    total[one.kind][1] += one.bytes
  return {kind: (int(count), size) for kind, (count, size) in total.items()}


def make_mesh(config: Config, devices: Sequence[Any], shape: tuple[int, int, int] | None = None) -> Mesh:
  run = config.run
  return sharding.make_mesh(*(shape or (run.data_parallel, run.fsdp, run.tensor)), devices=devices)
