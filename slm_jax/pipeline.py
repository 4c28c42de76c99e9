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

from slm_jax.config import require
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
  path = workdir / 'arms' / arm / 'run.json'
  run = read_object(path)
  summary, pipeline = run.get('summary'), run.get('pipeline')
  flops = summary.get('flops') if isinstance(summary, dict) else None
  require(_is_amount(flops), f'{path}: damaged; remove {path.parent}/DONE, and launch again')
  if not isinstance(pipeline, dict) or not all(map(_is_amount, pipeline.values())):
    pipeline = _rebuilt(workdir, arm, summary)
  return {**pipeline, arm: flops}


def _rebuilt(workdir: Path, arm: str, summary: Mapping[str, Any]) -> dict[str, float]:
  """Returns the pipeline of an arm whose run.json has none: it was written before December 2026.

  Its `parent_flops` are then a sum over its parents of `flops` and `parent_flops`, and of what it took to make data.
  """
  entries = read_object(workdir / 'experiment.json').get('arms')
  known = {entry.get('arm_id'): entry.get('parents') for entry in entries or () if isinstance(entry, dict)}
  parents, recorded = known.get(arm), summary.get('parent_flops')
  if not isinstance(parents, list):
    logging.warning('arm %s: its record names no ancestors; those that it shares with others count twice', arm)
    return {f'before {arm}': recorded} if _is_amount(recorded) else {}
  found, sums = {}, []
  for parent in parents:
    found |= _whole(workdir, parent)
    own = read_object(workdir / 'arms' / parent / 'run.json')['summary']
    sums += [own['flops'], own.get('parent_flops') or 0.0]
  data = recorded - math.fsum(sums) if _is_amount(recorded) else 0.0
  return {**found, f'data of {arm}': data} if data > 1e-9 * math.fsum(sums) else found


def _is_amount(value: Any) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf
