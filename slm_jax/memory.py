"""Whether an arm can fit into memory at all: a bound from below that needs no tracing.

What is refused here cannot run. What is let through may still be too large: activations, logits, teachers, masks and
averages are not counted.
"""

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from slm_jax.config import ConfigError
from slm_jax.experiment import Config
from slm_jax.model.flops import parameter_count

GIB = 2**30
MOMENTS = {'adamw': 8, 'muon': 4, 'adafactor': 0}  # bytes a parameter, at least, of an optimiser's float32 state
TOKEN = 16  # bytes of a token in a batch: inputs, targets, segments, mask


class Least(NamedTuple):
  """Bytes that one device needs at least during a step."""

  parameters: float
  gradients: float
  optimizer: float
  batch: float  # its tokens, and the activations between two layers once


def check(config: Config, devices: Sequence[jax.Device]) -> None:
  """ConfigError if training this arm surely takes more memory than these devices have."""
  own = [device for device in devices if device.process_index == jax.process_index()]
  each, host = of_device(config, len(devices)), own[0].platform == 'cpu'  # whose devices share the machine's memory
  needed, limit = sum(each) * (len(own) if host else 1), of_machine() if host else of_chip(own[0])
  if needed <= limit:
    return
  data, parts = (
    config.data,
    ', '.join(f'{name} {_gib(part)}' for name, part in each._asdict().items() if part > GIB / 20),
  )
  what = f'model with {parameter_count(config.model):,} parameters'
  if each.batch > sum(each) / 2:
    what = f'data.batch_size={data.batch_size}, data.seq_len={data.seq_len}'
  where = 'this machine has' if host else f'a device ({own[0].device_kind}) has'
  copies = f' for each of {len(own)} devices' if host and len(own) > 1 else ''
  raise ConfigError(
    f'{what}: a step needs at least {_gib(needed)} GiB ({parts}{copies}), and {where} {_gib(limit)} GiB'
  )


def _gib(size: float) -> str:
  return f'{size / GIB:,.1f}'


def of_device(config: Config, devices: int) -> Least:
  """The bytes of one of so many devices, if everything is spread as evenly as `config.run` allows."""
  run, model, data = config.run, config.model, config.data
  parameters = parameter_count(model) / (run.fsdp * run.tensor)
  size, width = jnp.dtype(model.param_dtype).itemsize, jnp.dtype(model.dtype).itemsize * model.d_model
  tokens = data.batch_size * data.seq_len * run.tensor / devices
  return Least(
    parameters * size,
    # All of them exist at once, since they are clipped by their common norm.
    parameters * size if config.train.steps else 0.0,
    parameter_count(model) * MOMENTS[config.optim.name] / devices,
    tokens * (TOKEN + width / config.train.accumulate),
  )


def of_chip(device: jax.Device) -> float:
  """Bytes that this process may take of a device; infinity where that is not known."""
  return float((device.memory_stats() or {}).get('bytes_limit', math.inf))


def of_machine() -> float:
  """Bytes of this machine's memory and swap space; infinity where the system does not say."""
  return meminfo('MemTotal') + meminfo('SwapTotal')


def meminfo(name: str) -> float:
  """A number of /proc/meminfo in bytes; infinity where there is none."""
  with contextlib.suppress(OSError, ValueError):
    for line in Path('/proc/meminfo').read_text().splitlines():
      if line.startswith(f'{name}:'):
        return 1024.0 * int(line.split()[1])
  return math.inf
