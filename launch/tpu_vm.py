"""The engine 'tpu_vm': one TPU slice (or several as one) of the Cloud TPU API, by queued resources.

A launch asks for one queued resource, runs its units on it one after another, and deletes it at the end, however it
ends. What is preempted is deleted and asked for again. The name follows from experiment and workdir, so a launch after
one that was killed finds the slice that is still there, uses it, and deletes it.

The code goes there through the workdir (`cloud.send`); `tpu_vm.sh` makes the environment and starts the worker. Hosts
mount the share by NFS: the launching machine must have it mounted at the same path, so it is a VM of the same network.

Never run against the real API. gcloud's own parser knows all commands and flags used here (version 528).
"""

import json
import platform
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from launch import budgets, cloud, topologies
from launch.cloud import Call
from launch.plan import Plan, Unit, unit_name
from launch.worker import sigterm_like_ctrl_c
from slm_jax.config import ConfigError, require
from slm_jax.preempt import EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED

POLL = 30.0  # seconds between two looks at the state
TRIES = 5  # looks that may fail in a row: a network may be down for a while, and the slice does not know
SHIFT = 100  # added to a worker's exit code, to tell it from those of gcloud (1, 2), ssh (255) and tpu_vm.sh (75)

GCLOUD = ('gcloud', 'compute', 'tpus', 'queued-resources')
CAPACITY = {'on_demand': [], 'spot': ['--spot'], 'reserved': ['--reserved']}


class Refused(Exception):
  """There is no slice, and there will be none. The message is one line."""


# ------------------------------------------------------------------------------------------------------- the engine


def define(values: flags.FlagValues) -> None:
  def text(name: str, default: str | None, about: str) -> None:
    flags.DEFINE_string(f'tpu_vm_{name}', default, about, flag_values=values)

  text('type', '', 'accelerator type, such as v6e-16')
  text('zone', '', 'zone')
  text('project', '', "project, if not gcloud's own")
  text('share', '', 'NFS share that holds the workdir, as in 10.0.0.2:/vol1')
  text('mount', '/mnt/slm', 'where the share is mounted, here and on the hosts')
  text('valid_until', '', 'give up if there is no slice after that long, as in 6h')
  about = 'kind of capacity; what is preempted is asked for again'
  flags.DEFINE_enum('tpu_vm_capacity', 'on_demand', list(CAPACITY), about, flag_values=values)
  flags.DEFINE_integer('tpu_vm_slices', 1, 'slices that one arm is spread over', 1, flag_values=values)
  flags.DEFINE_integer('tpu_vm_restarts', 20, 'how often a worker is started again', 0, flag_values=values)
  about = 'one more flag of gcloud ... create, such as --network=N or --service-account=A; may be repeated'
  flags.DEFINE_multi_string('tpu_vm_create', [], about, flag_values=values)
  about = 'one more flag of gcloud ... ssh, such as --internal-ip or --tunnel-through-iap; may be repeated'
  flags.DEFINE_multi_string('tpu_vm_ssh', [], about, flag_values=values)


def check(plan: Plan, options: flags.FlagValues) -> None:
  its = topologies.find('tpu_vm', options.tpu_vm_type, '--tpu_vm_type')
  require(bool(options.tpu_vm_zone), '--tpu_vm_zone: needed, as in --tpu_vm_zone=us-east5-b')
  server, colon, path = options.tpu_vm_share.partition(':')
  known = bool(server and colon) and path.startswith('/') and not path.startswith('//')
  require(known, f'--tpu_vm_share={options.tpu_vm_share}: expected SERVER:/PATH of an NFS share, as in 10.0.0.2:/vol1')
  for name in ('create', 'ssh'):
    for flag in getattr(options, f'tpu_vm_{name}'):
      require(flag.startswith('--'), f'--tpu_vm_{name}={flag}: expected a flag, as in --tpu_vm_{name}=--FLAG=VALUE')
  cloud.check_share(plan, options.tpu_vm_mount, 'tpu_vm_mount')
  cloud.check_devices(plan, its.devices * options.tpu_vm_slices)
  budgets.assume(options, its.chip, its.chips * options.tpu_vm_slices)


def ready(plan: Plan, options: flags.FlagValues) -> None:
  cloud.need('gcloud', 'https://cloud.google.com/sdk/docs/install')
  try:
    Slice(plan, options).state()
  except Refused as error:
    raise ConfigError(str(error)) from None


def show(plan: Plan, units: Sequence[Unit], options: flags.FlagValues) -> str:
  its, code = Slice(plan, options), cloud.code_path(plan, cloud.pack(plan)[0])
  many = f'{options.tpu_vm_slices} x ' if options.tpu_vm_slices > 1 else ''
  return '\n'.join(
    [
      f'# {many}{topologies.find("tpu_vm", options.tpu_vm_type, "--tpu_vm_type")}, {options.tpu_vm_capacity}',
      shlex.join(its.create_command()),
      f'# until its state is ACTIVE, every {POLL:.0f} s:',
      shlex.join(its.command('describe', '--format=json')),
      '# one after another, again after a preemption; then, and however it ends, the last line',
      *(shlex.join(its.ssh_command(remote(plan, unit, code, options))) for unit in units),
      shlex.join(its.delete_command()),
    ]
  )


def run(plan: Plan, units: Sequence[Unit], options: flags.FlagValues, call: Call = cloud.call) -> int:
  code, its = cloud.send(plan), Slice(plan, options, call)
  try:
    with sigterm_like_ctrl_c():
      return _run_units(plan, units, its, code, options)
  except Refused as error:
    print(f'stopped: {error}')
    return EXIT_FAILED
  except KeyboardInterrupt:
    print('stopped; what was trained since the last checkpoint is lost; launch again to go on')
    return EXIT_PREEMPTED
  finally:
    its.delete_for_good()


def _run_units(plan: Plan, units: Sequence[Unit], its: 'Slice', code: Path, options: flags.FlagValues) -> int:
  failed: set[str] = set()
  for unit in units:
    blocked = [name for name in unit.after if name in failed]
    if blocked and not cloud.can_start(plan, unit):
      print(f'{unit.name}: blocked, {", ".join(blocked)} failed')
    elif _run_unit(plan, unit, its, remote(plan, unit, code, options), options.tpu_vm_restarts):
      print(f'{unit.name}: done')
      continue
    failed.add(unit.name)
    if options.fail_fast:
      break
  return EXIT_FAILED if failed else EXIT_DONE


def _run_unit(plan: Plan, unit: Unit, its: 'Slice', command: str, restarts: int) -> bool:
  """Whether its arms are done in the end."""
  for attempt in range(restarts + 1):
    its.acquire()
    code = its.ssh(command)
    if cloud.is_done(plan, unit, cloud.PATIENCE if code == 0 else 0):
      return True
    if code == 0:
      print(f'{unit.name}: the worker says that it is done, and {plan.workdir} here does not; is it the same share?')
      return False
    if code - SHIFT in (1, 2):  # a bug or bad input: it would end like that again
      print(f'{unit.name}: failed; {cloud.why(plan, unit)}')
      return False
    of = f'{code - SHIFT}' if SHIFT < code < 255 else f'{code} (of gcloud, ssh or tpu_vm.sh)'
    if attempt < restarts:
      print(f'{unit.name}: ended with {of}; starts again')
      time.sleep(POLL)
  print(f'{unit.name}: failed; ended with {of} after --tpu_vm_restarts={restarts}')
  return False


def remote(plan: Plan, unit: Unit, code: Path, options: flags.FlagValues) -> str:
  """The shell line that every host runs: the share, the code, the worker.

  Ends with 75 if there is no worker, else with the worker's code plus SHIFT.
  """
  mount, share = shlex.quote(options.tpu_vm_mount), shlex.quote(options.tpu_vm_share)
  archive, folder = shlex.quote(str(code)), f'slm_jax-{code.name.removesuffix(".tar.gz")}'
  log = shlex.quote(str(plan.workdir / 'logs' / unit.name))
  version = '.'.join(platform.python_version_tuple()[:2])  # an arm's identity may depend on it (python_stdlib)
  mounted = (
    f'mountpoint -q {mount} || {{ sudo apt-get -qq update && sudo apt-get -qq install -y nfs-common'
    f' && sudo mkdir -p {mount} && sudo mount -t nfs {share} {mount}; }}'
  )
  unpacked = f'mkdir -p {folder} && tar -xzf {archive} -C {folder} && cd {folder}'
  worker = f'bash launch/tpu_vm.sh {version} {log}.$(hostname).log {shlex.join(plan.argv(*unit.arms))}'
  return f'{{ {mounted}; }} && {unpacked} || exit 75; {worker} || exit $(($? == 75 ? 75 : $? + {SHIFT}))'


# ------------------------------------------------------------------------------------------------ the queued resource


class Slice:
  """The queued resource of a launch."""

  def __init__(self, plan: Plan, options: flags.FlagValues, call: Call = cloud.call):
    self.name = unit_name(plan.name, ('tpu_vm', str(plan.workdir)))
    self._options, self._call = options, call
    self._asked = False  # in this launch; what failed in an earlier one is asked for anew

  def command(self, verb: str, *more: str) -> list[str]:
    project = [f'--project={self._options.tpu_vm_project}'] if self._options.tpu_vm_project else []
    return [*GCLOUD, verb, self.name, f'--zone={self._options.tpu_vm_zone}', *project, *more]

  def create_command(self) -> list[str]:
    options = self._options
    many = options.tpu_vm_slices > 1
    limit = [f'--valid-until-duration={options.tpu_vm_valid_until}'] if options.tpu_vm_valid_until else []
    return self.command(
      'create',
      *(
        [f'--node-count={options.tpu_vm_slices}', f'--node-prefix={self.name}'] if many else [f'--node-id={self.name}']
      ),
      f'--accelerator-type={options.tpu_vm_type}',
      f'--runtime-version={topologies.find("tpu_vm", options.tpu_vm_type, "--tpu_vm_type").runtime}',
      *CAPACITY[options.tpu_vm_capacity],
      *limit,
      *options.tpu_vm_create,
      '--quiet',
    )

  def ssh_command(self, line: str) -> list[str]:
    # Without --batch-size=all gcloud runs 64 hosts, waits for them, and only then starts those they wait for.
    everywhere = ('--node=all', '--worker=all', '--batch-size=all')
    return self.command('ssh', *everywhere, *self._options.tpu_vm_ssh, '--quiet', f'--command={line}')

  def delete_command(self) -> list[str]:
    return self.command('delete', '--force', '--quiet')

  def state(self) -> tuple[str, str]:
    """`(state, why)`; ('', '') if there is no such resource. Refused if that cannot be found out."""
    done = self._call(self.command('describe', '--format=json'))
    if done.code:
      if 'NOT_FOUND' in done.err:
        return '', ''
      raise Refused(f'gcloud: {done.reason}')
    try:
      state = json.loads(done.out)['state']
      return state['state'], state.get('failedData', {}).get('error', {}).get('message', '')
    except (ValueError, KeyError, TypeError):
      raise Refused(f'gcloud: not the description of a queued resource: {done.out[:200]!r}') from None

  def acquire(self) -> None:
    """Returns once the slice is there. Refused if it cannot be had."""
    said, misses = '', 0
    while True:
      try:
        (state, why), misses = self.state(), 0
      except Refused:
        misses += 1
        if misses == TRIES:
          raise
        time.sleep(POLL)
        continue
      if state and state != said:
        print(f'{self.name}: {state}')
        said = state
      if state == 'ACTIVE':
        self._asked = True
        return
      if state == 'FAILED' and self._asked:
        raise Refused(f'{self.name}: no slice: {" ".join(why.split()) or "no reason given"}')
      if state in ('SUSPENDED', 'FAILED'):  # preempted, or left by an earlier launch; stays so until it is deleted
        self._do(self.delete_command())
      elif not state:
        self._asked = True
        self._do(self.create_command())
      else:  # on its way, perhaps since an earlier launch
        self._asked = True
        time.sleep(POLL)

  def ssh(self, line: str) -> int:
    return self._call(self.ssh_command(line), show=True).code

  def delete_for_good(self) -> None:
    """Deletes it if there may be one; says how to do it by hand if that fails."""
    if not self._asked:
      return
    print(f'{self.name}: deleting')
    reason = 'interrupted'
    try:
      done = self._call(self.delete_command())
      reason = '' if done.code == 0 or 'NOT_FOUND' in done.err else done.reason
    finally:
      if reason:
        print(f'{self.name}: NOT deleted ({reason}), and it costs money until you do:')
        print(f'  {shlex.join(self.delete_command())}')

  def _do(self, command: Sequence[str]) -> None:
    done = self._call(command)
    if done.code:
      raise Refused(f'{self.name}: {done.reason}')
