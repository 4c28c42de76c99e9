"""The engine 'slurm': job arrays of a Slurm cluster, and one small job at the end that writes the report.

A unit is a task of an array. Units that wait for the same parents are one array, with --dependency on exactly the tasks
that train those parents: what fails stops what builds on it, and nothing else. A task starts its worker by
srun, so that a SIGTERM reaches it once (the warning before the time limit, scancel --signal=TERM, a preemption), and
puts itself back into the queue when the worker ended with 42 or was killed. The scripts are in WORKDIR/slurm, beside a
record of which task has which arms; the logs are in WORKDIR/logs.

A launch asks squeue first, and submits what is missing and neither queued nor running. The workdir, the code and this
Python environment must be on a file system that the nodes share with this machine, at the same path.

Tested against a real Slurm 22.05 (tests/slurm/setup.sh) on CPUs; GPUs have never been asked for.
"""

import contextlib
import dataclasses
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Required, TypedDict

from absl import flags, logging

from launch import budgets, cloud
from launch.cloud import Call
from launch.plan import Plan, Unit, unit_name
from slm_jax import notices
from slm_jax.ablate import workdir as workdirs
from slm_jax.config import ConfigError, require
from slm_jax.files import read_json, warn_once, write_json, write_text
from slm_jax.preempt import EXIT_DONE, EXIT_PREEMPTED

LARGEST = 1000  # tasks of an array; Slurm's MaxArraySize is 1001 unless a site changes it
WARNING = 120  # seconds between SIGTERM and the time limit
PATIENCE = 600  # seconds that a task waits for a process that holds its arm, or for the last of its own to end

TIME = r'(\d+-)?\d+(:\d+){0,2}|unlimited'
MEMORY = r'\d+[KMGT]?'
GPUS = r'(?:[\w.-]+:)?([1-9]\d*)'
OWN = {  # options of sbatch that this engine gives: {option: the flag to use instead}
  **dict.fromkeys(('array', 'dependency', 'job-name', 'output', 'error', 'open-mode', 'requeue', 'signal'), ''),
  **dict.fromkeys(('ntasks', 'ntasks-per-node'), 'slurm_tasks_per_node'),
  **dict.fromkeys(('gpus', 'gpus-per-node', 'gpus-per-task', 'gres'), 'slurm_gpus'),
  **{'cpus-per-task': 'slurm_cpus', 'mem': 'slurm_memory', 'nodes': 'slurm_nodes', 'time': 'slurm_time'},
  **{'partition': 'slurm_partition', 'account': 'slurm_account'},
}

TASK = """\
trap : TERM # the worker is told as well, saves and leaves; this script stays for what comes then
for lock in "${{locks[@]}}"; do
  flock --timeout={patience} "$lock" true # after a requeue, the process before may still be on its way out elsewhere
done
task=${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID
echo "$(date --iso-8601=seconds) $(hostname), job $task, restart ${{SLURM_RESTART_COUNT:-0}}: ${{worker[*]@Q}}"
{srun} "${{worker[@]}}"
code=$?
echo "$(date --iso-8601=seconds) the worker ended with $code"
if ((code == 42 || code > 127)); then # preempted or killed; 0 is done, all else would end like that again
  for _ in {{1..720}}; do # the controller may be down for a while
    state=$(squeue --noheader --array --jobs="$task" --format='%T %r') && break
    sleep 5
  done
  # Another state: it was cancelled, and scontrol would bring it back; or Slurm itself is queueing it again.
  if [[ $state == 'RUNNING '* || $state == *' TimeLimit' ]]; then
    if ((${{SLURM_RESTART_COUNT:-0}} >= {restarts})); then
      echo 'not queued again: --slurm_restarts={restarts}'
    else
      scontrol requeue "$task"
    fi
  fi
fi
exit $code
"""


class _Record(TypedDict, total=False):
  """Of a submitted job: which arms its tasks have."""

  arms: Required[list[list[str]]]
  workdir: Required[str]
  job: str


class Job(NamedTuple):
  """What is given to one sbatch: an array of tasks, or the report."""

  name: str
  script: str
  arms: tuple[tuple[str, ...], ...]  # ids, by task; none: the report
  after: str  # the dependency, with {name} for the id of another job of this launch; may be empty


# ------------------------------------------------------------------------------------------------------- the engine


def define(values: flags.FlagValues) -> None:
  def text(name: str, about: str) -> None:
    flags.DEFINE_string(f'slurm_{name}', '', about, flag_values=values)

  def number(name: str, default: int, about: str, least: int = 1) -> None:
    flags.DEFINE_integer(f'slurm_{name}', default, about, least, flag_values=values)

  text('partition', "partition, if not the cluster's default")
  text('account', 'account that pays')
  text('time', 'time limit of a worker, as in 4:00:00 or 1-12; one that needs longer saves and is queued again')
  number('nodes', 1, 'nodes that train an arm together')
  number('tasks_per_node', 1, 'processes on a node: 1 with all of its GPUs, or one for each GPU')
  text('gpus', 'GPUs on a node, as in 4 or a100:4')
  number('cpus', 1, 'CPUs of a process')
  text('memory', 'memory on a node, as in 32G')
  text('setup', "shell line to run before a worker, as in 'module load cuda/13'")
  about = 'one more option of sbatch, as in --slurm_extra=--qos=high; may be repeated'
  flags.DEFINE_multi_string('slurm_extra', [], about, flag_values=values)
  number('restarts', 20, 'how often a worker is queued again that was killed or preempted', 0)


def check(plan: Plan, options: flags.FlagValues) -> None:
  for name, pattern, example in (('time', TIME, '4:00:00'), ('memory', MEMORY, '32G'), ('gpus', GPUS, 'a100:4')):
    value = getattr(options, f'slurm_{name}')
    known = not value or bool(re.fullmatch(pattern, value, re.IGNORECASE))
    require(known, f'--slurm_{name}={value}: expected something like {example}')
  tasks, gpus = options.slurm_tasks_per_node, gpus_per_node(options)
  known = not gpus or tasks in (1, gpus)
  require(known, f'--slurm_tasks_per_node={tasks}: allowed: 1 or {gpus}, one for each GPU (--slurm_gpus)')
  for extra in options.slurm_extra:
    name = extra.removeprefix('--').partition('=')[0]
    require(extra.startswith('--'), f'--slurm_extra={extra}: expected an option, as in --slurm_extra=--qos=high')
    instead = f'use --{OWN[name]}' if OWN.get(name) else 'that is set already'
    require(name not in OWN, f'--slurm_extra={extra}: {instead}')
  texts = {name: getattr(options, f'slurm_{name}') for name in ('partition', 'account', 'setup')}
  for name, value in {**texts, 'extra': ''.join(options.slurm_extra)}.items():
    require(value.isprintable(), f'--slurm_{name}={value!r}: expected one line of plain text')
  plain = str(plan.workdir).isprintable() and '\\' not in str(plan.workdir)
  require(plain, f'--workdir={str(plan.workdir)!r}: Slurm cannot write logs there; line breaks and \\ are not allowed')
  if gpus:
    cloud.check_devices(plan, options.slurm_nodes * gpus)
    budgets.assume(options, options.slurm_gpus.partition(':')[0], options.slurm_nodes * gpus)
  require(not options.fail_fast, '--fail_fast: not with --launch=slurm, whose tasks do not know of each other')


def ready(plan: Plan, options: flags.FlagValues) -> None:
  for tool in ('sbatch', 'squeue'):
    cloud.need(
      tool, 'log in to a login node of the cluster, or install the client (Debian: apt-get install slurm-client)'
    )
  queued(plan, cloud.call)
  check_data(plan)


def check_data(plan: Plan) -> None:
  """ConfigError if the data cannot serve an arm; then the workdir is as it was. Tokenises, and prints notices."""
  from slm_jax.data.dataset import open_data  # heavy

  missing = (arm.config for arm in plan.arms if not plan.is_finished(arm.arm_id))
  wanted = dict.fromkeys((dataclasses.replace(its.data, seed=0), its.model.vocab_size) for its in missing)
  try:
    for data, vocab_size in wanted:
      dataset = open_data(data, plan.workdir / 'data', logging.info)
      dataset.tokenizer.check_vocabulary(vocab_size)
      notices.show(dataset.notices)
  except ConfigError:
    for path in (plan.workdir / 'data', plan.workdir):
      with contextlib.suppress(OSError):  # not empty
        path.rmdir()
    raise


def show(plan: Plan, units: Sequence[Unit], options: flags.FlagValues) -> str:
  lines = [shlex.join(['mkdir', '-p', str(folder(plan)), str(logs(plan))])]
  ids: dict[str, str] = {}
  for job in jobs(plan, units, options, {}):
    path, end = shlex.quote(str(script_path(plan, job))), f'end-of-{job.name}'
    after = f'"--dependency={job.after.format(**ids)}" ' if job.after else ''
    variable = f'job{len(ids) + 1}'
    ids[job.name] = f'${{{variable}}}'
    lines += [f"cat >{path} <<'{end}'", f'{job.script}{end}', f'{variable}=$(sbatch --parsable {after}{path})']
  return '\n'.join(lines) if ids else '# nothing to submit'


def run(plan: Plan, units: Sequence[Unit], options: flags.FlagValues, call: Call = cloud.call) -> int:
  there = queued(plan, call)
  if there:
    print(f'{len(there)} arms are queued or running since an earlier launch')
  ids: dict[str, str] = {}
  try:
    with workdirs.writing(plan.workdir):
      logs(plan).mkdir(parents=True, exist_ok=True)
      for job in jobs(plan, units, options, there):
        ids[job.name] = submit(plan, job, job.after.format(**ids), call)
  except KeyboardInterrupt:
    print('stopped; what was submitted stays, launch again for the rest')
    return EXIT_PREEMPTED
  if ids or there:
    print(f'queued; to see how it goes: {shlex.join(["python", "-m", "launch.status", str(plan.workdir)])}')
  return EXIT_DONE


# --------------------------------------------------------------------------------------------------------- the jobs


def jobs(plan: Plan, units: Sequence[Unit], options: flags.FlagValues, there: Mapping[str, str]) -> list[Job]:
  """What is to be submitted, in this order. there: the tasks that have arms already, as `{arm id: '123_4'}`."""
  tasks = {unit.name: [there[arm_id] for arm_id in unit.arms if arm_id in there] for unit in units}
  alike: dict[tuple[str, ...], list[Unit]] = {}  # by the units that they wait for
  for unit in units:
    rest = tuple(arm_id for arm_id in unit.arms if arm_id not in there)
    if rest:
      alike.setdefault(unit.after, []).append(unit._replace(arms=rest))
  # Of a bundle some may fail, so its end must do: the worker of what builds on it looks whose parents are done.
  bundles = any(unit.arms[1:] for unit in units) or len(set(there.values())) < len(there)
  found = []
  for after, members in alike.items():
    parents = dict.fromkeys(task for name in after for task in tasks[name])
    for part in (members[i : i + LARGEST] for i in range(0, len(members), LARGEST)):
      arms = tuple(unit.arms for unit in part)
      name = job_name(plan, *(','.join(ids) for ids in arms))
      waits = ':'.join(['afterany' if bundles else 'afterok', *parents]) if parents else ''
      found.append(Job(name, array_script(plan, name, arms, options), arms, waits))
      for task, unit in enumerate(part):
        tasks[unit.name].append(f'{{{name}}}_{task}')
  if found:
    name = job_name(plan, 'report')
    before = dict.fromkeys(task.partition('_')[0] for task in there.values())
    waits = ':'.join(['afterany', *(f'{{{job.name}}}' for job in found), *before])
    found.append(Job(name, report_script(plan, name, options), (), waits))
  return found


def job_name(plan: Plan, *parts: str) -> str:
  """Another one for another workdir: its arms may be the same."""
  return unit_name(plan.name, (os.path.abspath(plan.workdir), *parts))


def array_script(plan: Plan, name: str, arms: Sequence[Sequence[str]], options: flags.FlagValues) -> str:
  """Everything from a configuration is in the commands of `Plan`, which are quoted."""
  lines = [
    *directives(plan, name, '%a', options),
    f'#SBATCH --array=0-{len(arms) - 1}',
    '#SBATCH --requeue',
    f'#SBATCH --signal=TERM@{WARNING}',
    '#SBATCH --kill-on-invalid-dep=yes',
    f'#SBATCH --nodes={options.slurm_nodes}',
    f'#SBATCH --ntasks-per-node={options.slurm_tasks_per_node}',
    f'#SBATCH --cpus-per-task={options.slurm_cpus}',
    *([f'#SBATCH --gpus-per-node={options.slurm_gpus}'] if options.slurm_gpus else []),
    *([f'#SBATCH --mem={options.slurm_memory}'] if options.slurm_memory else []),
    '',
    *environment(options),
  ]
  lines.append('case $SLURM_ARRAY_TASK_ID in')
  for task, ids in enumerate(arms):
    locks = shlex.join(str(workdirs.folder(plan.workdir, arm_id) / 'lock') for arm_id in ids)
    lines += [f'{task})', f'  locks=({locks})', f'  worker=({plan.command(*ids)})', '  ;;']
  lines.append('esac')
  together = options.slurm_nodes * options.slurm_tasks_per_node > 1
  # One that ends lets the others save and end by themselves, in PATIENCE seconds.
  many = ['--label', '--kill-on-bad-exit=0', f'--wait={PATIENCE}'] if together else []
  srun = shlex.join(['srun', f'--cpus-per-task={options.slurm_cpus}', *many])
  task_lines = TASK.format(patience=PATIENCE, srun=srun, restarts=options.slurm_restarts)
  return '\n'.join(lines) + '\n' + task_lines


def report_script(plan: Plan, name: str, options: flags.FlagValues) -> str:
  report = shlex.join(['python', '-m', 'launch.report', str(plan.workdir)])
  return '\n'.join([*directives(plan, name, 'report', options), '', *environment(options), f'{report}\n'])


def directives(plan: Plan, name: str, log: str, options: flags.FlagValues) -> list[str]:
  """The first lines of a script. log: what to add to the name of the job for that of its log."""
  path = str(logs(plan) / name).replace('%', '%%') + f'_{log}.log'
  values = {
    'job-name': name,
    'output': path,
    'open-mode': 'append',
    'partition': options.slurm_partition,
    'account': options.slurm_account,
    'time': options.slurm_time,
  }
  lines = [f'#SBATCH --{option}={_word(value)}' for option, value in values.items() if value]
  return ['#!/usr/bin/env bash', *lines, *(f'#SBATCH {_word(extra)}' for extra in options.slurm_extra)]


def _word(value: str) -> str:
  """One word of an #SBATCH line: there, sbatch knows quotes, but no backslash before a space."""
  if re.fullmatch(r'[\w@%+=:,./-]+', value):
    return value
  return '"' + re.sub(r'(["\\])', r'\\\1', value) + '"'


def environment(options: flags.FlagValues) -> list[str]:
  """The Python of this launch is `python`, unless the setup says otherwise."""
  here = shlex.quote(os.path.dirname(sys.executable))
  setup = [options.slurm_setup] if options.slurm_setup else []
  return [f'export PATH={here}:$PATH PYTHONUNBUFFERED=1', *setup]


def gpus_per_node(options: flags.FlagValues) -> int:
  found = re.fullmatch(GPUS, options.slurm_gpus)
  return int(found[1]) if found else 0


# ------------------------------------------------------------------------------------------------------- the queue


def folder(plan: Plan) -> Path:
  return plan.workdir / 'slurm'


def logs(plan: Plan) -> Path:
  return plan.workdir / 'logs'


def script_path(plan: Plan, job: Job) -> Path:
  return folder(plan) / f'{job.name}.sh'


def submit(plan: Plan, job: Job, after: str, call: Call) -> str:
  """The job's id. What its tasks are is recorded first: a launch that is killed right then will know them."""
  path, record = script_path(plan, job), {'arms': job.arms, 'workdir': _where(plan)}
  write_text(path, job.script)
  write_json(path.with_suffix('.json'), record)
  done = call(['sbatch', '--parsable', *([f'--dependency={after}'] if after else []), str(path)])
  if done.code:
    raise ConfigError(f'sbatch {path}: {done.reason}; what was submitted before stays, launch again for the rest')
  job_id = done.out.strip().partition(';')[0]
  write_json(path.with_suffix('.json'), {**record, 'job': job_id})
  print(
    f'job {job_id}: {job.name}, ' + (f'{len(job.arms)} tasks' if job.arms else 'the report') + (after and f', {after}')
  )
  return job_id


def _where(plan: Plan) -> str:
  return os.path.realpath(plan.workdir)


def queued(plan: Plan, call: Call) -> dict[str, str]:
  """`{arm id: '123_4'}`: the tasks of earlier launches of this workdir that are queued or running."""
  done = call(['squeue', '--noheader', '--array', '--me', '--format=%i %j'])
  if done.code:
    raise ConfigError(f'squeue: {done.reason}')
  found: dict[str, str] = {}
  for line in done.out.splitlines():
    task, _, name = line.strip().partition(' ')
    job, _, index = task.partition('_')
    path = folder(plan) / f'{name}.json'
    record, fault = read_json(path, _Record) if index.isdecimal() else (None, '')
    if record and int(index) >= len(record['arms']):
      record, fault = None, f'it has no task {index}'
    if fault:  # two tasks of one arm do no harm: the second waits for the arm's lock, and then finds it done
      warn_once(f'{path}: damaged ({fault}): which arms task {task} has is not known, so they may be submitted again')
    if record and record['workdir'] == _where(plan):  # a copied workdir has the records, not the jobs
      found |= dict.fromkeys(record['arms'][int(index)], task)
  return found
