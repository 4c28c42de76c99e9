"""What a run shows of itself on request: an XProf trace of chosen steps, the compiled step, the memory it took."""

import json
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from slm_jax import distributed, perf
from slm_jax.files import write_text


class Trace:
  """Of the steps first..last, counted from 1, into a folder for XProf or TensorBoard's profile plugin; of none for ().

  The device is waited for at both ends, and nowhere else.
  """

  def __init__(self, folder: Path, steps: Sequence[int]):
    self._folder, self._open = folder, False
    self._first, self._last = steps or (0, 0)

  def __enter__(self) -> 'Trace':
    return self

  def __exit__(self, *exc: Any) -> None:
    self._stop(None)

  def at(self, done: int, state: Any) -> None:
    """To be called before each step, with the number of those that were taken and the state they left."""
    if self._first and done == self._first - 1:
      jax.block_until_ready(state)
      jax.profiler.start_trace(str(self._folder))
      self._open = True
    if done == self._last:
      self._stop(state)

  def _stop(self, state: Any) -> None:
    if self._open:
      jax.block_until_ready(state)
      jax.profiler.stop_trace()
      self._open = False


def dump(folder: Path, step: Any, args: Sequence[Any]) -> None:
  """The jitted step as it is given to the compiler and as it left it, and what the compiler says that it costs.

      step.stablehlo.mlir   step.hlo.txt   cost.json: of one device, FLOPs, bytes accessed, bytes of memory by kind;
                                                      matmul_flops: of all devices (perf.matmul_flops)

  args: arrays or their shapes.
  """
  traced = step.trace(*args)
  lowered = traced.lower()
  compiled = lowered.compile()
  cost, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
  kinds = ('argument', 'output', 'alias', 'temp', 'generated_code')
  known = {
    'flops': cost.get('flops'),
    'bytes_accessed': cost.get('bytes accessed'),
    'matmul_flops': perf.matmul_flops(traced.jaxpr),
    **{f'{kind}_bytes': getattr(memory, f'{kind}_size_in_bytes', None) for kind in kinds},
  }
  if distributed.is_main():
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / 'step.stablehlo.mlir', lowered.as_text())
    write_text(folder / 'step.hlo.txt', compiled.as_text())
    write_text(folder / 'cost.json', json.dumps(known, indent=1) + '\n')


def peak_bytes() -> int:
  """The most memory that the busiest device has held; on a CPU, this process, all that it did before included."""
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  if all('peak_bytes_in_use' in one for one in stats):
    return max(one['peak_bytes_in_use'] for one in stats)
  scale = 1 if sys.platform == 'darwin' else 1024  # kilobytes elsewhere
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
