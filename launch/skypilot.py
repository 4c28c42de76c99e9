"""The engine 'skypilot': a managed job of SkyPilot for each unit, on one machine with GPUs or TPUs of any cloud.

The workdir is in a bucket that SkyPilot mounts there and gcsfuse (or the like) mounts here, at the same path. Such a
mount has no locks between machines and no atomic renames: two launches at once on one workdir are not noticed, and a
machine that is lost while it saves may leave a damaged checkpoint, which is found by its checksum and passed over.

`run` queues what can start and returns; launch again for units whose parents are done by then. Never run on a cloud;
the tasks were read by SkyPilot 0.14.1.
"""

import json
import platform
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from launch import budgets, cloud, topologies
from launch.cloud import Call
from launch.plan import Plan, Unit
from slm_jax.config import ConfigError, require
from slm_jax.files import write_text
from slm_jax.preempt import EXIT_DONE

QUEUE = ['sky', 'jobs', 'queue', '--skip-finished', '--all', '--output=json']  # without --all, the 50 latest
NO_JOBS = 'No in-progress managed jobs'  # an error of it, while no controller is up


def define(values: flags.FlagValues) -> None:
  about = 'accelerators of one machine, such as A100:1, H100:8 or tpu-v5litepod-8'
  flags.DEFINE_string('skypilot_accelerators', '', about, flag_values=values)
  flags.DEFINE_string('skypilot_bucket', '', 'bucket that holds the workdir, such as gs://NAME', flag_values=values)
  flags.DEFINE_string('skypilot_mount', '/mnt/slm', 'where it is mounted, here and there', flag_values=values)
  flags.DEFINE_bool('skypilot_spot', False, 'use spot machines', flag_values=values)


def check(plan: Plan, options: flags.FlagValues) -> None:
  name, bucket = options.skypilot_accelerators, options.skypilot_bucket
  gpu = re.fullmatch(r'[A-Za-z0-9-]+(?::([1-9]\d*))?', name)
  require(gpu is not None, f'--skypilot_accelerators={name}: expected NAME or NAME:NUMBER, as in A100:1')
  its = topologies.find('tpu_vm', name[4:], '--skypilot_accelerators=tpu-') if name.startswith('tpu-') else None
  require(its is None or its.hosts == 1, f'--skypilot_accelerators={name}: needs {its and its.hosts} hosts, not one')
  known = re.fullmatch(r'(gs|s3|r2)://[a-z0-9][a-z0-9._-]+', bucket)
  require(known is not None, f'--skypilot_bucket={bucket}: expected gs://NAME, s3://NAME or r2://NAME')
  cloud.check_share(plan, options.skypilot_mount, 'skypilot_mount')
  number = int((gpu and gpu[1]) or 1)
  cloud.check_devices(plan, its.devices if its else number)
  budgets.assume(options, its.chip if its else name.partition(':')[0], its.chips if its else number)


def ready(plan: Plan, options: flags.FlagValues) -> None:
  cloud.need('sky', "pip install 'skypilot[gcp]' (or another cloud), best in an environment of its own")


def task(plan: Plan, unit: Unit, options: flags.FlagValues) -> dict[str, Any]:
  """The task of a unit, as SkyPilot's YAML wants it."""
  name = options.skypilot_accelerators
  tpu = topologies.TABLE['tpu_vm', name[4:]] if name.startswith('tpu-') else None
  extra = 'tpu' if tpu else 'cuda13'
  version = '.'.join(platform.python_version_tuple()[:2])
  recovery = {'max_restarts_on_errors': 0, 'recover_on_exit_codes': [42, 137, 143]}
  return {
    'name': cloud.job_name(plan, unit),
    'resources': {
      'accelerators': name,
      **({'accelerator_args': {'runtime_version': tpu.runtime}} if tpu else {}),
      'use_spot': options.skypilot_spot,
      'job_recovery': recovery,
    },
    'workdir': '.',
    'file_mounts': {options.skypilot_mount: {'source': options.skypilot_bucket, 'mode': 'MOUNT'}},
    'setup': f'python3 -m pip install --quiet uv && python3 -m uv venv --clear --python {version} .venv'
    f" && python3 -m uv pip install --quiet --python .venv/bin/python -r requirements.lock 'jax[{extra}]'",
    'run': f'exec .venv/bin/{shlex.join(plan.argv(*unit.arms))}',
  }


def show(plan: Plan, units: Sequence[Unit], options: flags.FlagValues) -> str:
  lines = [shlex.join(['mkdir', '-p', str(plan.workdir / 'skypilot')])] if units else []
  for unit in units:
    path = _path(plan, unit)
    lines += [f'# once done: {", ".join(unit.after)}'] if unit.after else []
    lines += [f"cat > {shlex.quote(str(path))} <<'TASK'", f'{cloud.to_yaml(task(plan, unit, options))}TASK']
    lines.append(shlex.join(_launch(path)))
  return '\n'.join(lines)


def run(plan: Plan, units: Sequence[Unit], options: flags.FlagValues, call: Call = cloud.call) -> int:
  queued = _queued(call(QUEUE))
  for unit in units:
    if unit.after or cloud.job_name(plan, unit) in queued:
      print(f'{unit.name}: {"waits for " + ", ".join(unit.after) if unit.after else "is queued already"}')
      continue
    path = _path(plan, unit)
    write_text(path, cloud.to_yaml(task(plan, unit, options)))
    done = call(_launch(path))
    require(done.code == 0, f'sky: {done.reason}')
    print(f'{unit.name}: queued as {cloud.job_name(plan, unit)}')
  print('launch again to see to what waits, and for the report')
  return EXIT_DONE


def _queued(found: cloud.Result) -> set[str]:
  """Names of the jobs that run or wait."""
  if found.code and NO_JOBS in found.out + found.err:
    return set()
  require(found.code == 0, f'sky: {found.reason}')
  try:
    return {job['job_name'] for job in json.loads(found.out)}
  except (ValueError, TypeError, KeyError) as error:
    raise ConfigError(f'sky: its list of jobs cannot be read ({error}): {" ".join(found.out.split())[:200]}') from None


def _path(plan: Plan, unit: Unit) -> Path:
  return plan.workdir / 'skypilot' / f'{unit.name}.yaml'


def _launch(path: Path) -> list[str]:
  return ['sky', 'jobs', 'launch', '--yes', '--detach-run', str(path)]
