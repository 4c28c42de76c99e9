"""What a chip costs an hour, what it draws and how fast its memory is: chips.toml beside this file, to be edited.

A 'chip' is what a cloud bills: a TPU chip, a GPU, or, on the CPU, the whole machine.
"""

import functools
import math
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from slm_jax.config import ConfigError, require

TABLE = Path(__file__).with_name('chips.toml')
ON_DEMAND, SPOT = 'on_demand', 'spot'
SHARE = 'SLM_CHIP_SHARE'  # environment variable by which a pool tells a worker what part of its chips it has
CORE_WATTS = 15.0  # of a busy core of a server, its share of the package


class Chip(NamedTuple):
  """A line of the table."""

  name: str
  kinds: tuple[str, ...]  # what JAX calls it
  prices: Mapping[str, float]  # dollars a chip-hour, by 'on_demand' and perhaps 'spot'
  price_source: str
  watts: float
  power_source: str
  hbm: float  # bytes
  bandwidth: float  # of its memory, bytes/s
  ici: float  # to chips of its slice or machine, one direction, bytes/s
  dcn: float  # between slices, bytes/s; 0 where nobody says
  memory_source: str


def table() -> dict[str, Chip]:
  """`{name: Chip}` of chips.toml; ConfigError if somebody's edit broke it."""
  return _read(TABLE)


@functools.cache
def _read(path: Path) -> dict[str, Chip]:
  try:
    entries = tomllib.loads(path.read_text(encoding='utf-8'))
    return {name: _chip(name, entry) for name, entry in entries.items()}
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise ConfigError(f'{path}: cannot be read ({type(error).__name__}: {error})') from None


def _chip(name: str, entry: Mapping[str, Any]) -> Chip:
  prices = {terms: float(entry[terms]) for terms in (ON_DEMAND, SPOT) if terms in entry}
  require(all(0 <= p < math.inf for p in prices.values()), f'{TABLE}: {name}: a price must be a number of dollars')
  speeds = {key: float(entry[key]) * 1e9 for key in ('bandwidth', 'ici', 'dcn')}
  return Chip(
    name,
    tuple(entry['kinds']),
    prices,
    entry['price'],
    float(entry['watts']),
    entry['power'],
    hbm=float(entry['hbm']) * 2**30,
    memory_source=entry['memory'],
    **speeds,
  )


def of_kind(kind: str) -> Chip | None:
  """The chip that JAX calls `kind`; None if the table does not hold it."""
  return next((chip for chip in table().values() if kind in chip.kinds), None)


def check_terms(terms: str, key: str) -> None:
  """ConfigError unless `terms` says how an hour is paid: 'on_demand', 'spot' or a number of dollars."""
  require(
    terms in (ON_DEMAND, SPOT) or _number(terms) is not None,
    f'{key}={terms!r}: allowed: {ON_DEMAND}, {SPOT} (prices of {TABLE.name}), or dollars for each hour of a chip',
  )


def price(kind: str, terms: str) -> tuple[float | None, str]:
  """`(dollars for an hour of one chip, where the number is from)`; None where nobody knows.

  A CPU that no price is given for is taken to be the user's own: 0.
  """
  given = _number(terms)
  if given is not None:
    return given, 'as given'
  if kind == 'cpu':
    return 0.0, 'this machine, no price given'
  chip = of_kind(kind)
  if chip is None or terms not in chip.prices:
    return None, f'no {terms} price of {kind} in {TABLE.name}'
  return chip.prices[terms], f'{terms}, {chip.price_source}'


def watts(kind: str) -> tuple[float, str]:
  """`(W of one chip at work, where the number is from)`; on the CPU of all cores that its pool has, or it alone."""
  if kind == 'cpu':
    cores = round(usable_cores() / share())
    return CORE_WATTS * cores, f'{CORE_WATTS:.0f} W for each of {cores} cores'
  chip = of_kind(kind)
  if chip is None:
    return 300.0, f'300 W, assumed: {kind} is not in {TABLE.name}'
  return chip.watts, f'{chip.watts:.0f} W a chip, {chip.power_source}'


def count(kind: str, devices: int, processes: int) -> int:
  """How many chips that many JAX devices are: on the CPU, devices may be fakes on one machine's cores."""
  return processes if kind == 'cpu' else devices


def share() -> float:
  """The part of the chips that this process has: below 1 where workers share a GPU, or the cores of a machine."""
  return float(os.environ.get(SHARE, '1'))


def usable_cores() -> int:
  return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def _number(text: str) -> float | None:
  try:
    value = float(text)
  except ValueError:
    return None
  return value if 0 <= value < math.inf else None
