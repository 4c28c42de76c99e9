"""The engine 'gke': a JobSet with a Kueue label for each unit, on the TPU nodes of a GKE cluster.

A unit is an arm, or a bundle of arms (--arms_per_job) that one warm slice runs back to back. Kueue queues JobSets until
there is quota; JobSet restarts all hosts of a unit when one dies, unless the worker ended with 1 or 2.

JobSets know no order among each other (`dependsOn` orders jobs of one set, which Kueue admits as a whole: a teacher's
slice would wait for those of all its students). So the launch stays: it applies a unit when its parents are done, and
looks on. It may be stopped at any time; the JobSets go on, and the next launch takes up what it finds.

The code is in the image (`launch/Dockerfile`); the workdir is on a ReadWriteMany volume (a PersistentVolumeClaim, from
Filestore say), which the launching machine has mounted at the same path. Never applied to a real cluster; manifests are
checked against the schema of JobSet v1alpha2, and read by kubectl's own parser.
"""

import json
import shlex
import time
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from launch import budgets, cloud, topologies
from launch.cloud import Call
from launch.plan import Plan, Unit
from launch.worker import sigterm_like_ctrl_c
from slm_jax.config import ConfigError, require
from slm_jax.preempt import EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED

POLL = 15.0  # seconds between two looks
TRIES = 20  # looks that may fail in a row: the JobSets do not need this process
LABEL = 'slm-jax/launch'

CAPACITY = {
  'on_demand': {},
  'spot': {'cloud.google.com/gke-spot': 'true'},
  'flex_start': {'cloud.google.com/gke-queued': 'true'},
}


class Refused(Exception):
  """kubectl failed. The message is one line."""


def define(values: flags.FlagValues) -> None:
  def text(name: str, default: str, about: str) -> None:
    flags.DEFINE_string(f'gke_{name}', default, about, flag_values=values)

  text('type', '', 'accelerator type, such as v6e-16')
  text('image', '', 'image of the worker, as launch/Dockerfile makes it')
  text('pvc', '', 'PersistentVolumeClaim (ReadWriteMany) that holds the workdir')
  text('mount', '/mnt/slm', 'where that volume is mounted, here and in the pods')
  text('queue', 'slm-queue', 'LocalQueue of Kueue')
  text('namespace', 'default', 'namespace of queue and claim')
  text('context', '', "kubectl's context, if not the current one")
  text('reservation', '', 'name of a reservation to use')
  flags.DEFINE_enum('gke_capacity', 'on_demand', list(CAPACITY), 'kind of nodes', flag_values=values)
  flags.DEFINE_integer('gke_slices', 1, 'slices that one arm is spread over', 1, flag_values=values)
  flags.DEFINE_integer('gke_restarts', 20, 'how often a JobSet is started again', 0, flag_values=values)


def check(plan: Plan, options: flags.FlagValues) -> None:
  its = topologies.find('gke', options.gke_type, '--gke_type')
  for name, example in {'image': 'europe-docker.pkg.dev/PROJECT/slm/slm_jax:1', 'pvc': 'slm'}.items():
    require(bool(getattr(options, f'gke_{name}')), f'--gke_{name}: needed, as in --gke_{name}={example}')
  cloud.check_share(plan, options.gke_mount, 'gke_mount')
  cloud.check_devices(plan, its.devices * options.gke_slices)
  budgets.assume(options, its.chip, its.chips * options.gke_slices)


def ready(plan: Plan, options: flags.FlagValues) -> None:
  cloud.need('kubectl', 'gcloud components install kubectl, or https://kubernetes.io/docs/tasks/tools')
  try:
    Cluster(plan, options).states()
  except Refused as error:
    raise ConfigError(str(error)) from None


def show(plan: Plan, units: Sequence[Unit], options: flags.FlagValues) -> str:
  cluster, its = Cluster(plan, options), topologies.find('gke', options.gke_type, '--gke_type')
  slices = f'{options.gke_slices} x ' if options.gke_slices > 1 else ''
  lines = [f'# {slices}{its}, {options.gke_capacity}; {its.label}, machine type {its.machine}']
  for unit in units:
    if unit.after:
      lines.append(f'# once done: {", ".join(unit.after)}')
    lines += [
      f"{shlex.join(cluster.apply_command())} <<'MANIFEST'",
      cloud.to_yaml(manifest(plan, unit, options)) + 'MANIFEST',
    ]
  return '\n'.join(lines)


def run(plan: Plan, units: Sequence[Unit], options: flags.FlagValues, call: Call = cloud.call) -> int:
  cluster = Cluster(plan, options, call)
  try:
    with sigterm_like_ctrl_c():
      return _follow(plan, units, options, cluster)
  except (Refused, KeyboardInterrupt) as error:
    print(f'stopped looking on{f": {error}" if isinstance(error, Refused) else ""}')
    code = EXIT_FAILED if isinstance(error, Refused) else EXIT_PREEMPTED
  print('what was applied goes on; launch again to see to the rest, or end it all:')
  print(f'  {shlex.join(cluster.command("delete", "jobsets", f"--selector={cluster.selector}"))}')
  return code


def _follow(plan: Plan, units: Sequence[Unit], options: flags.FlagValues, cluster: 'Cluster') -> int:
  """Applies units as their parents get done, until all have ended."""
  ended: dict[str, bool] = {}  # {unit: is it done?}
  applied: set[str] = set()
  misses = 0
  while len(ended) < len(units):
    try:
      states, misses = cluster.states(), 0
    except Refused:
      misses += 1
      if misses == TRIES:
        raise
      time.sleep(POLL)
      continue
    for unit in (unit for unit in units if unit.name not in ended):
      outcome, parents = None, [ended.get(parent) for parent in unit.after]
      if unit.name in applied:
        outcome = _outcome(plan, unit, states.get(cloud.job_name(plan, unit), ('', '')))
      elif None not in parents and not all(parents) and not cloud.can_start(plan, unit):
        outcome = False, 'blocked, what it builds on failed'
      elif options.fail_fast and not all(ended.values()):
        outcome = False, 'not started, another one failed'
      elif None not in parents and (other := cluster.holder(plan, unit)):
        outcome = False, f'not started, {other} of another launch has arms of it; launch again when that has ended'
      elif None not in parents:
        cluster.start(manifest(plan, unit, options), states)
        applied.add(unit.name)
        print(f'{unit.name}: applied as {cloud.job_name(plan, unit)}')
      if outcome:
        ended[unit.name], words = outcome
        print(f'{unit.name}: {words}')
    if len(ended) < len(units):
      time.sleep(POLL)
  return EXIT_DONE if all(ended.values()) else EXIT_FAILED


def _outcome(plan: Plan, unit: Unit, state: tuple[str, str]) -> tuple[bool, str] | None:
  """`(is it done?, in words)`; None while it runs. The workdir is the truth, the cluster says whether to wait."""
  if cloud.is_done(plan, unit):
    return True, 'done'
  word, why = state
  if word == 'Failed':
    return False, f'failed ({why}); {cloud.why(plan, unit)}'
  if word == 'running' or cloud.is_done(plan, unit, cloud.PATIENCE):
    return None if word == 'running' else (True, 'done')
  return False, f'its JobSet {"ended well" if word else "is gone"}, and {plan.workdir} here does not hold its results'


# ---------------------------------------------------------------------------------------------------- the manifest


def manifest(plan: Plan, unit: Unit, options: flags.FlagValues) -> dict[str, Any]:
  """The JobSet of a unit. All that comes from a configuration is in lists of arguments; nothing passes a shell."""
  its = topologies.find('gke', options.gke_type, '--gke_type')
  reservation = {'cloud.google.com/reservation-name': options.gke_reservation} if options.gke_reservation else {}
  command, *arguments = plan.argv(*unit.arms)
  pod = {
    'restartPolicy': 'Never',  # podFailurePolicy asks for it
    'terminationGracePeriodSeconds': 60,  # time to save
    'hostNetwork': True,
    'dnsPolicy': 'ClusterFirstWithHostNet',
    'nodeSelector': {
      'cloud.google.com/gke-tpu-accelerator': its.label,
      'cloud.google.com/gke-tpu-topology': its.topology,
      **CAPACITY[options.gke_capacity],
      **reservation,
    },
    'tolerations': [{'key': 'google.com/tpu', 'operator': 'Exists'}],
    'containers': [
      {
        'name': 'main',
        'image': options.gke_image,
        'command': [command],
        'args': arguments,
        'securityContext': {'privileged': True, 'runAsUser': 0},  # the TPU's devices are root's
        'resources': {'limits': {'google.com/tpu': its.chips // its.hosts}},
        'volumeMounts': [
          {'name': 'share', 'mountPath': options.gke_mount},
          {'name': 'dshm', 'mountPath': '/dev/shm'},
        ],
      }
    ],
    'volumes': [
      {'name': 'share', 'persistentVolumeClaim': {'claimName': options.gke_pvc}},
      {'name': 'dshm', 'emptyDir': {'medium': 'Memory'}},
    ],
  }
  bug = {'action': 'FailJob', 'onExitCodes': {'containerName': 'main', 'operator': 'In', 'values': [1, 2]}}
  job = {
    'parallelism': its.hosts,
    'completions': its.hosts,
    'backoffLimit': 0,  # restarts are the JobSet's
    'podFailurePolicy': {'rules': [bug]},
    'template': {'spec': pod},
  }
  return {
    'apiVersion': 'jobset.x-k8s.io/v1alpha2',
    'kind': 'JobSet',
    'metadata': {
      'name': cloud.job_name(plan, unit),
      'namespace': options.gke_namespace,
      'labels': {'kueue.x-k8s.io/queue-name': options.gke_queue, LABEL: cloud.launch_name(plan)},
      'annotations': {'alpha.jobset.sigs.k8s.io/exclusive-topology': 'cloud.google.com/gke-nodepool'},
    },
    'spec': {
      'ttlSecondsAfterFinished': 3600,
      'failurePolicy': {
        'maxRestarts': options.gke_restarts,
        'rules': [{'name': 'bug', 'action': 'FailJobSet', 'onJobFailureReasons': ['PodFailurePolicy']}],
      },
      'replicatedJobs': [{'name': 'slice', 'replicas': options.gke_slices, 'template': {'spec': job}}],
    },
  }


# ----------------------------------------------------------------------------------------------------- the cluster


class Cluster:
  """The JobSets of a launch, by kubectl."""

  def __init__(self, plan: Plan, options: flags.FlagValues, call: Call = cloud.call):
    self.selector = f'{LABEL}={cloud.launch_name(plan)}'
    self._options, self._call = options, call
    self._running: dict[str, Sequence[str]] = {}  # {name: arms}, as of the last look

  def command(self, *words: str) -> list[str]:
    context = [f'--context={self._options.gke_context}'] if self._options.gke_context else []
    return ['kubectl', *context, f'--namespace={self._options.gke_namespace}', *words]

  def apply_command(self) -> list[str]:
    return self.command('apply', '--filename=-')

  def states(self) -> dict[str, tuple[str, str]]:
    """`{name: ('running', 'Failed' or 'Completed', why)}` of the JobSets that are there."""
    done = self._call(self.command('get', 'jobsets', f'--selector={self.selector}', '--output=json'))
    if done.code:
      raise Refused(f'kubectl: {done.reason}')
    sets = json.loads(done.out)['items']
    states = dict(map(_state, sets))
    arms = {its['metadata']['name']: _arms(its) for its in sets}
    self._running = {name: arms[name] for name, (word, _) in states.items() if word == 'running'}
    return states

  def holder(self, plan: Plan, unit: Unit) -> str:
    """Another JobSet that runs arms of the unit; '' if there is none."""
    others = (name for name, arms in self._running.items() if not set(arms).isdisjoint(unit.arms))
    return next((name for name in others if name != cloud.job_name(plan, unit)), '')

  def start(self, its: Mapping[str, Any], states: Mapping[str, tuple[str, str]]) -> None:
    """Applies a manifest. One of that name that still runs is left as it is; one that has ended makes room first."""
    name = its['metadata']['name']
    word, _ = states.get(name, ('', ''))
    if word == 'running':
      return
    if word:
      self._do(self.command('delete', 'jobset', name, '--ignore-not-found'))
    self._do(self.apply_command(), stdin=cloud.to_yaml(its))

  def _do(self, command: Sequence[str], stdin: str = '') -> None:
    done = self._call(command, stdin=stdin)
    if done.code:
      raise Refused(f'kubectl: {done.reason}')


def _arms(its: Mapping[str, Any]) -> list[str]:
  """Of the JobSet of a `manifest`."""
  container = its['spec']['replicatedJobs'][0]['template']['spec']['template']['spec']['containers'][0]
  return container['args'][-1].removeprefix('--arm=').split(',')


def _state(its: Mapping[str, Any]) -> tuple[str, tuple[str, str]]:
  for condition in its.get('status', {}).get('conditions', []):
    if condition['type'] in ('Failed', 'Completed') and condition['status'] == 'True':
      return its['metadata']['name'], (condition['type'], ' '.join(condition.get('message', '').split()))
  return its['metadata']['name'], ('running', '')
