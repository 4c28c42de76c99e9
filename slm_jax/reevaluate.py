"""A finished model is evaluated again, because other settings of evaluation are asked for. Nothing is trained."""

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import logging

from slm_jax import config as configs
from slm_jax import distributed, evaluate, metrics, notices, perf
from slm_jax.checkpoint import Checkpoints, load_model
from slm_jax.config import ConfigError, require, to_dict
from slm_jax.data.dataset import Dataset
from slm_jax.experiment import Config, InitConfig
from slm_jax.files import disk_errors, read_json, write_json
from slm_jax.ledger import Diverged
from slm_jax.model.api import Params
from slm_jax.preempt import EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED, Preempted, Preemption
from slm_jax.run_files import mend, read_run
from slm_jax.step import TrainState
from slm_jax.train import Job, assess, check_converged, prepare, valid_batches


def run(config: Config, workdir: Path, arm_id: str) -> int:
  """Evaluates an arm that is done. Returns 0, 1 (it failed, and is as it was) or 42 (preempted).

  What its books say of its training stays. An arm that turns out to have diverged is no longer done.
  """
  folder = workdir / 'arms' / arm_id
  perf.keep_freed_memory()
  perf.cache_compilations(workdir / 'cache')
  try:
    with disk_errors(folder), Preemption(distributed.stop_agreed) as stop:
      with stop.at_once():
        job, params, state = restored(config, workdir, folder)
        before = distributed.on_main(known_run, folder)
        told = [*job.dataset.notices, *leaked(job.dataset, before)]
        notices.show(told)
      measure = jax.jit(job.measure, out_shardings=job.layout.step)
      results = evaluate.evaluate(measure, params, valid_batches(job), stop.check)
      results |= {name: before['summary'][name] for name in ('tokens', 'seconds')}
      found = assess(job, params, results, state)
      check_converged(config, found)
      log = metrics.MetricLog(folder / 'metrics.jsonl', config.train.steps, (), logging.warning)
      log.write(config.train.steps, 'eval', results)
      log.close()
      distributed.on_main(record, folder, found, to_dict(config.eval), told)
      return EXIT_DONE
  except Preempted:
    return EXIT_PREEMPTED
  except (ConfigError, Diverged) as error:
    if isinstance(error, Diverged):
      distributed.on_main(withdraw, folder, str(error))
    logging.error('%s: %s', config.name or arm_id, error)
    return EXIT_FAILED


def restored(config: Config, workdir: Path, folder: Path) -> tuple[Job, Params, TrainState | None]:
  """The arm's job, its finished parameters, and its last state.

  Without the state or what the arm builds on, its transforms are left out: only the finished model is needed.
  """
  parents = {arm for _, arm in configs.arm_references(config)}
  known = distributed.on_main(lambda: all((workdir / 'arms' / arm / 'DONE').exists() for arm in parents))
  if known:
    job = prepare(config, workdir, folder)
    with Checkpoints(folder / 'checkpoints', config.run.keep, logging.warning) as checkpoints:
      steps = config.train.steps
      read = checkpoints.read(steps, job.abstract) if steps in checkpoints.steps() else None
    if read is not None:
      return job, jax.jit(job.final)(read[0]), read[0]
  job = prepare(dataclasses.replace(config, transforms=(), init=InitConfig()), workdir, folder)
  mesh = job.layout.step.mesh  # type: ignore[attr-defined]
  return job, load_model(folder / 'model', mesh)[1], None


def known_run(folder: Path) -> dict[str, Any]:
  """Returns run.json of a finished arm. ConfigError if it is damaged."""
  run, fault = read_run(folder)
  require(not fault, f'{folder / "run.json"}: damaged ({fault}); {mend(folder)}')
  return dict(run)


def leaked(dataset: Dataset, run: Mapping[str, Any]) -> list[str]:
  """A notice if an earlier version trained the arm on text that is held out. run: its run.json."""
  n = sum(store.manifest['crossing']['count'] for store in dataset.stores)
  if not n or 'notices' in run:
    return []
  return [
    f'{run["name"]}: was trained on {n} documents of the held-out text by an earlier version; --rerun makes it again'
  ]


def record(folder: Path, found: Mapping[str, Any], settings: Mapping[str, Any], told: Sequence[str]) -> None:
  """Writes what was found. config.json comes last: by it, the evaluation is done."""
  now = datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
  run, (config, _) = known_run(folder), read_json(folder / 'config.json')
  write_json(
    folder / 'run.json', {**run, 'summary': {**run['summary'], **found}, 'evaluated': now, 'notices': list(told)}
  )
  write_json(folder / 'config.json', {**(config or {}), 'eval': dict(settings)})


def withdraw(folder: Path, reason: str) -> None:
  """Takes back that the arm is done."""
  write_json(folder / 'run.json', {**known_run(folder), 'status': 'diverged', 'error': reason})
  (folder / 'DONE').unlink()
