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

from absl import logging

from slm_jax.config import require
from slm_jax.files import read_json
from slm_jax.run_files import Run, mend, read_run


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
  pipeline = _run(workdir, arm).get('pipeline')
  if pipeline is None:
    pipeline = _rebuilt(workdir, arm)
  return {**pipeline, arm: _flops(workdir, arm)}


def _flops(workdir: Path, arm: str) -> float:
  folder, flops = workdir / 'arms' / arm, _amount(workdir, arm, 'flops')
  require(flops is not None, f'{folder / "run.json"}: damaged (summary.flops is missing); {mend(folder)}')
  assert flops is not None
  return flops


def _rebuilt(workdir: Path, arm: str) -> dict[str, float]:
  """Returns the pipeline of an arm whose run.json has none: it was written before December 2026.

  Its `parent_flops` are then a sum over its parents of `flops` and `parent_flops`, and of what it took to make data.
  """
  entries = (read_json(workdir / 'experiment.json')[0] or {}).get('arms')
  known = {entry.get('arm_id'): entry.get('parents') for entry in entries or () if isinstance(entry, dict)}
  parents, recorded = known.get(arm), _amount(workdir, arm, 'parent_flops')
  if not isinstance(parents, list):
    logging.warning('arm %s: its record names no ancestors; those that it shares with others count twice', arm)
    return {} if recorded is None else {f'before {arm}': recorded}
  found: dict[str, float] = {}
  sums = []
  for parent in parents:
    found |= _whole(workdir, parent)
    sums += [_flops(workdir, parent), _amount(workdir, parent, 'parent_flops') or 0.0]
  data = (recorded or 0.0) - math.fsum(sums)
  return {**found, f'data of {arm}': data} if data > 1e-9 * math.fsum(sums) else found


def _run(workdir: Path, arm: str) -> Run:
  """Returns run.json of an ancestor. ConfigError if it is damaged."""
  folder = workdir / 'arms' / arm
  run, fault = read_run(folder)
  require(not fault, f'{folder / "run.json"}: damaged ({fault}); {mend(folder)}')
  return run


def _amount(workdir: Path, arm: str, name: str) -> float | None:
  """A number of FLOPs in an ancestor's summary; None if it is not there, or can be none."""
  value = _run(workdir, arm).get('summary', {}).get(name)
  return None if value is None or value < 0 else float(value)
