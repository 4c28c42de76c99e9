"""What a run uses: chip-seconds, and joules, measured where the hardware has a counter and estimated everywhere.

The two kinds of joules are never mixed: 'joules' is what counters said over the whole run, or None; 'joules_estimated'
is chip-seconds times a stated number of watts. Counters:

    RAPL   CPU packages, /sys/class/powercap; everything that runs on them, so other processes too
    NVML   NVIDIA GPUs (Volta and later), by the package nvidia-ml-py where it is installed; the boards that are used

TPUs have none.
"""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from slm_jax import chips

POWERCAP = Path('/sys/class/powercap')
READ_EVERY = 60.0  # seconds: long before a counter can wrap twice


class Counter(NamedTuple):
  """A running total of joules. It starts anew from 0 once it has reached `wraps`; 0: never."""

  read: Callable[[], float]
  wraps: float = 0.0


class Meter:
  """Adds up what counters advance by. Must be read more often than they wrap: RAPL's do after about an hour of work."""

  def __init__(self, counters: Sequence[Counter], source: str):
    self.source = source  # '' if there is no counter
    self._counters = counters
    self._last = [counter.read() for counter in counters]

  def advance(self) -> float:
    """Joules since the last call, or since it was made."""
    total = 0.0
    for i, counter in enumerate(self._counters):
      now = counter.read()
      step = now - self._last[i]
      total += step + counter.wraps if step < 0 else step
      self._last[i] = now
    return total


def rapl(root: Path = POWERCAP) -> list[Counter]:
  """The counters of the CPU packages; none if there are none or this user may not read them (root only, often)."""
  found = []
  for zone in sorted(root.glob('intel-rapl:*')):  # AMD's too; a package's parts are 'intel-rapl:0:1' and are in it
    try:
      if zone.name.count(':') == 1 and (zone / 'name').read_text().startswith('package'):
        wraps = float((zone / 'max_energy_range_uj').read_text()) / 1e6
        read = _file_counter(zone / 'energy_uj')
        read()
        found.append(Counter(read, wraps))
    except (OSError, ValueError):
      return []  # part of the machine would be less than none: it would look like a measurement
  return found


def _file_counter(path: Path) -> Callable[[], float]:
  return lambda: float(path.read_text()) / 1e6


def nvml() -> list[Counter]:
  """The counters of this process's GPUs; none if they cannot be read."""
  try:
    import pynvml

    pynvml.nvmlInit()
    handles = [_board(pynvml, device.local_hardware_id) for device in jax.local_devices()]
    found = [Counter(functools.partial(_board_joules, pynvml, handle)) for handle in handles]
    for counter in found:
      counter.read()
  except Exception:  # not installed, no driver, a board without the counter: each library version has its own errors
    return []
  return found


def _board_joules(pynvml: Any, handle: Any) -> float:
  return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3


def _board(pynvml: Any, local: int) -> Any:
  """The handle of the GPU that this process sees as number `local`: NVML does not know CUDA_VISIBLE_DEVICES."""
  visible = [name.strip() for name in os.environ.get('CUDA_VISIBLE_DEVICES', '').split(',') if name.strip()]
  name = visible[local] if visible else str(local)
  if name.isdigit():
    return pynvml.nvmlDeviceGetHandleByIndex(int(name))
  return pynvml.nvmlDeviceGetHandleByUUID(name)


def of_devices() -> Meter:
  """What can be measured of the devices that JAX computes on."""
  backend = jax.default_backend()
  counters: list[Counter] = []
  if jax.process_count() == 1:  # the counters of other hosts cannot be read from here, and a part would mislead
    counters = rapl() if backend == 'cpu' else nvml() if backend == 'gpu' else []
  source = {'cpu': 'measured: RAPL, whole CPU packages', 'gpu': 'measured: NVML, GPU boards'}.get(backend, '')
  return Meter(counters, source if counters else '')


class Usage:
  """Chip-seconds and joules of a run, over all its restarts.

  record: what `record()` gave when the run was last saved. share: the part of the devices that this run is charged
  for, below 1 where several arms train in one program. meter: what it is measured with, `of_devices()` unless given.
  """

  def __init__(self, record: Mapping[str, Any], share: float = 1.0, meter: Meter | None = None):
    devices, share = jax.devices(), share * chips.share()
    kind = devices[0].device_kind
    self._chips, self._share = chips.count(kind, len(devices), jax.process_count()) * share, share
    self._watts, self._stated = chips.watts(kind)
    self._chip_seconds, self._estimated = record.get('chip_seconds', 0.0), record.get('joules_estimated', 0.0)
    self._meter, self._unread = meter or of_devices(), 0.0
    # A run of which a part was not measured has no measured total.
    before = record.get('joules') if record else 0.0
    self._joules = before if self._meter.source else None

  def start(self) -> None:
    """Forgets what the counters did until now."""
    self._meter.advance()

  def tick(self, seconds: float) -> None:
    """So much wall time has passed since the last tick."""
    self._chip_seconds += seconds * self._chips
    self._estimated += seconds * self._chips * self._watts
    self._unread += seconds
    if self._unread > READ_EVERY:
      self._read()

  def redo(self, seconds: float) -> None:
    """So much of it was lost with a process; nobody knows what its counters said."""
    self.tick(seconds)
    self._joules = None

  def record(self) -> dict[str, Any]:
    """{chip_seconds, joules (None if not measured), joules_estimated, energy_source}, so far."""
    self._read()
    return {
      'chip_seconds': self._chip_seconds,
      'joules': self._joules,
      'joules_estimated': self._estimated,
      'energy_source': f'estimate: {self._stated}' if self._joules is None else self._meter.source,
    }

  def _read(self) -> None:
    self._unread = 0.0
    if self._joules is not None:
      self._joules += self._meter.advance() * self._share


def bill(record: Mapping[str, Any], terms: str) -> dict[str, Any]:
  """What the summary of a run says of its cost. record: of `Usage`; terms: 'on_demand', 'spot' or dollars an hour.

  dollars is None where the price of the chip is not known.
  """
  hours = record['chip_seconds'] / 3600
  dollars, _ = chips.price(jax.devices()[0].device_kind, terms)
  return {
    'chip_hours': hours,
    'dollars': None if dollars is None else hours * dollars,
    **{name: record[name] for name in ('joules', 'joules_estimated', 'energy_source')},
  }
