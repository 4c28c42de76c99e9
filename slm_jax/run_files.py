"""What a run leaves beside its log, as others read it: run.json, config.json, samples.json.

Every reader gets `(values, what is wrong)`. The values are empty where something is wrong, so that one bad file hides
no other arm, and no number that may have been changed stands in a table. Written by record.py and train.py.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

from slm_jax import schema
from slm_jax.config import flatten, require
from slm_jax.files import read_json
from slm_jax.metrics import FORMAT

Count = Annotated[int, '[1, 2^31)']
Number = float | bool | None
TEXTS = ('energy_source', 'held_out', 'tokenizer')  # of a summary


class Git(TypedDict, total=False):
  commit: str | None
  dirty: bool | None


class Run(TypedDict, total=False):
  """run.json. `summary` holds numbers, and the TEXTS."""

  format: int
  arm_id: str
  name: str
  status: Literal['running', 'done', 'failed', 'diverged', 'nan', 'preempted']  # nan: of format 1
  started: str
  ended: str
  error: str | None
  summary: dict[str, Any]
  git: Git
  source: dict[str, str]
  experiment: dict[str, str]
  notices: list[str]
  pipeline: dict[str, Annotated[float, '[0, inf)']]
  evaluated: str
  packages: dict[str, str]
  python: str
  machine: str
  device_kind: str
  devices: Count
  processes: Count
  population: Count
  chip_share: Annotated[float, '(0, 1]']


class _Seeded(TypedDict, total=False):
  seed: int


class _Long(TypedDict, total=False):
  steps: int


class _Part(TypedDict):
  kind: str


class _Config(TypedDict, total=False):
  """Of config.json, what is asked for by name; the rest is shown as it is."""

  name: str
  seed: int
  data: _Seeded
  train: _Long
  transforms: list[_Part]


class Sample(TypedDict):
  prompt: str
  text: str


def mend(folder: Path) -> str:
  """What mends a finished run whose run.json is damaged."""
  return f'remove {folder / "DONE"} and launch again: its last checkpoint is evaluated again'


def read_run(folder: Path) -> tuple[Run, str]:
  """run.json of a run. ConfigError if a newer version wrote it."""
  path, done = folder / 'run.json', (folder / 'DONE').exists()
  values, fault = read_json(path)
  if values is None:
    return {}, fault or ('is missing' if done else '')
  written = values.get('format', 1)
  newer = isinstance(written, int) and written > FORMAT
  require(not newer, f'{path}: format {written}, written by a newer version (this one knows {FORMAT})')
  fault = schema.fault(values, Run) or _fault_of_summary(values.get('summary', {}), done)
  return ({}, fault) if fault else (values, '')


def _fault_of_summary(summary: Mapping[str, Any], done: bool) -> str:
  for name, value in summary.items():
    if fault := schema.fault(value, str | None if name in TEXTS else Number, f'summary.{name}'):
      return fault
  return 'summary.loss is missing' if done and summary.get('loss') is None else ''


def read_config(folder: Path) -> tuple[dict[str, Any], str]:
  """config.json of a run, flat: {dotted key: value}."""
  values, fault = read_json(folder / 'config.json', _Config)
  if values is None:
    return {}, fault or ('is missing' if (folder / 'DONE').exists() else '')
  return flatten(values), ''


def read_samples(folder: Path) -> tuple[list[Sample], str]:
  values, fault = read_json(folder / 'samples.json', list[Sample])
  return values or [], fault
