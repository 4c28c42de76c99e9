"""The FLOPs of an arm's pipeline: the training of all its ancestors, and what it took to make data, each counted once.

    {'3f9c0a1b2c4d': 7.7e12, ...,           the training of an ancestor, by arm id: parents, teachers, tickets, theirs
     'written-0a1b2c3d4e5f6071': 2e11}      texts that a teacher wrote, or its cached predictions, by their content

An arm often reaches one ancestor by several ways: a model that is cut out of a sparse version of `dense` may learn from
`dense` as well. Data are named by their content, so two ancestors that read one cache count it once. run.json holds
these entries as 'pipeline', and their sum as 'parent_flops' in its summary.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from absl import logging

from slm_jax.config import ConfigError
from slm_jax.files import read_object


def before(arms: Iterable[str], made: Mapping[str, float], workdir: Path) -> dict[str, float]:
  """Returns the pipeline of an arm that names the given arms and whose data were `made`, its own training left out.

  ConfigError if the record of an ancestor is damaged.
  """
  found = dict(made)
  for arm in sorted(set(arms)):
    found |= _whole(workdir, arm)
  return found


def total(pipeline: Mapping[str, float]) -> float:
  return math.fsum(pipeline.values())


def _whole(workdir: Path, arm: str) -> dict[str, float]:
  """Returns the pipeline of a finished arm, its own training included."""
  run = read_object(workdir / 'arms' / arm / 'run.json')
  pipeline = run.get('pipeline')
  if not isinstance(pipeline, dict) or None in map(_amount, pipeline.values()):
    pipeline = _rebuilt(workdir, arm)
  return {**pipeline, arm: _flops(workdir, arm)}


def _flops(workdir: Path, arm: str) -> float:
  path = workdir / 'arms' / arm / 'run.json'
  flops = _amount(_summary(workdir, arm).get('flops'))
  if flops is None:
    raise ConfigError(f'{path}: damaged; remove {path.parent}/DONE, and launch again')
  return flops


def _rebuilt(workdir: Path, arm: str) -> dict[str, float]:
  """Returns the pipeline of an arm whose run.json has none: it was written before December 2026.

  Its `parent_flops` are then a sum over its parents of `flops` and `parent_flops`, and of what it took to make data.
  """
  entries = read_object(workdir / 'experiment.json').get('arms')
  known = {entry.get('arm_id'): entry.get('parents') for entry in entries or () if isinstance(entry, dict)}
  parents, recorded = known.get(arm), _amount(_summary(workdir, arm).get('parent_flops'))
  if not isinstance(parents, list):
    logging.warning('arm %s: its record names no ancestors; those that it shares with others count twice', arm)
    return {} if recorded is None else {f'before {arm}': recorded}
  found: dict[str, float] = {}
  sums = []
  for parent in parents:
    found |= _whole(workdir, parent)
    sums += [_flops(workdir, parent), _amount(_summary(workdir, parent).get('parent_flops')) or 0.0]
  data = (recorded or 0.0) - math.fsum(sums)
  return {**found, f'data of {arm}': data} if data > 1e-9 * math.fsum(sums) else found


def _summary(workdir: Path, arm: str) -> dict[str, Any]:
  summary = read_object(workdir / 'arms' / arm / 'run.json').get('summary')
  return summary if isinstance(summary, dict) else {}


def _amount(value: Any) -> float | None:
  """A number of FLOPs; None for anything else that a file may hold."""
  known = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf
  return float(value) if known else None
