"""JobSets: against the schema of the API, against golden files, against a fake kubectl that is a real process."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import clouds
import pytest
import yaml
from clouds import CHILD, ONE, PARENT, TWO, UNITS, finish, options_of, plan_on
from hypothesis import example, given, settings
from hypothesis import strategies as st

from launch import cloud, gke
from launch.plan import Unit, unit_name
from slm_jax.config import ConfigError

REPO = Path(__file__).parents[2]
DATA = REPO.parent / 'shared' / 'data'
GOLDEN = Path(__file__).parent / 'golden'
HERE = ['--gke_type=v6e-16', '--gke_image=registry/slm_jax:1', '--gke_pvc=slm']
HOSTILE = st.text(st.characters(exclude_characters='\x00', exclude_categories=['Cs']), max_size=40)

# state: {sets: {name: [condition, message]}, then: what becomes of sets as they are applied, broken: looks that fail}
KUBECTL = """
words = sys.argv[1:]
if state.get('broken'):
  state['broken'] -= 1
  leave(err='Unable to connect to the server: no route to host\\n', code=1)
if 'get' in words:
  items = []
  for name, (kind, message, *arms) in state['sets'].items():
    conditions = [{'type': kind, 'status': 'True', 'message': message}] if kind else []
    pod = {'spec': {'containers': [{'args': ['-m', 'x', '--arm=' + ','.join(arms)]}]}}
    spec = {'replicatedJobs': [{'template': {'spec': {'template': pod}}}]}
    items.append({'metadata': {'name': name}, 'status': {'conditions': conditions}, 'spec': spec})
  leave(out=json.dumps({'items': items}))
elif 'apply' in words:
  import yaml
  its = yaml.safe_load(stdin)
  name = its['metadata']['name']
  if name in state['sets']:
    leave(err='the JobSet is immutable\\n', code=1)
  arms = its['spec']['replicatedJobs'][0]['template']['spec']['template']['spec']['containers'][0]['args'][-1]
  what = state['then'].pop(0)
  if not what.get('gone'):
    state['sets'][name] = what.get('condition', ['', ''])
  finish(arms.removeprefix('--arm=').split(',')[: what.get('finish')])
elif 'delete' in words:
  state['sets'].pop(words[words.index('jobset') + 1])
leave()
"""


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
  monkeypatch.setattr(gke, 'POLL', 0.0)
  monkeypatch.setattr(cloud, 'PATIENCE', 0.1)


class Scene:
  def __init__(self, tmp_path, monkeypatch, capfd):
    self.plan = plan_on(tmp_path)
    self.options = options_of(*HERE, f'--gke_mount={tmp_path}')
    self.capfd = capfd
    self.make = lambda **state: clouds.Tool(
      tmp_path, 'kubectl', KUBECTL, monkeypatch, **{'sets': {}, 'workdir': str(self.plan.workdir), **state}
    )

  def name(self, unit):
    return cloud.job_name(self.plan, unit)

  def run(self, units=UNITS, **state):
    """`(exit code, output, [verb and name])` without the looks."""
    tool = self.make(**state)
    code = gke.run(self.plan, units, self.options)
    seen = []
    for words, stdin in tool.calls:
      if 'apply' in words:
        seen.append(f'apply {yaml.safe_load(stdin)["metadata"]["name"]}')
      elif 'delete' in words:
        seen.append(f'delete {words[-2]}')
    return code, self.capfd.readouterr().out, seen


@pytest.fixture
def scene(tmp_path, monkeypatch, capfd):
  return Scene(tmp_path, monkeypatch, capfd)


# ------------------------------------------------------------------------------------------------------- the manifest


def closed(schema):
  """A CRD's schema as JSON Schema in which unknown keys are errors."""
  if not isinstance(schema, dict):
    return schema
  out = {key: value for key, value in schema.items() if not key.startswith('x-kubernetes') and key != 'format'}
  if 'properties' in out:
    out['properties'] = {key: closed(value) for key, value in out['properties'].items()}
    if not schema.get('x-kubernetes-preserve-unknown-fields'):
      out['additionalProperties'] = False
  elif isinstance(out.get('additionalProperties'), dict):
    out['additionalProperties'] = closed(out['additionalProperties'])
  if 'items' in out:
    out['items'] = closed(out['items'])
  return out


def validator(name, version):
  """A validator of that version of a CRD; skips where there is none."""
  jsonschema = pytest.importorskip('jsonschema')
  path = DATA / f'{name}_crd.yaml'
  if not path.exists():
    pytest.skip(f'{path} is not there')
  crd = yaml.load(path.read_text(), getattr(yaml, 'CSafeLoader', yaml.SafeLoader))
  (schema,) = [its['schema']['openAPIV3Schema'] for its in crd['spec']['versions'] if its['name'] == version]
  schema = closed(schema)
  schema['properties']['metadata'] = {'type': 'object'}
  return jsonschema.Draft202012Validator(schema)


def manifests():
  many = ['--gke_slices=2', '--gke_capacity=spot', '--gke_reservation=r', '--gke_queue=q', '--gke_namespace=n']
  for argv in ([], many, ['--gke_type=v6e-1', '--gke_capacity=flex_start'], ['--gke_type=tpu7x-8']):
    plan = plan_on('/mnt/slm')
    options = options_of(*HERE, *argv)
    gke.check(plan, options)
    yield gke.manifest(plan, PARENT, options)


def test_jobsets_are_what_the_api_asks_for():
  valid = validator('jobset', 'v1alpha2')
  for its in manifests():
    assert [error.message for error in valid.iter_errors(yaml.safe_load(cloud.to_yaml(its)))] == []
  job = its['spec']['replicatedJobs'][0]['template']['spec']
  job['paralellism'] = 1  # the check can fail
  job['template']['spec']['containers'][0]['args'] = [1]
  assert len(list(valid.iter_errors(its))) == 2


def test_the_queues_that_are_shipped_are_what_kueue_asks_for():
  objects = list(yaml.safe_load_all((REPO / 'launch/k8s/kueue.yaml').read_text()))
  assert [its['kind'] for its in objects] == ['ResourceFlavor', 'ClusterQueue', 'LocalQueue']
  for its in objects:
    valid = validator(f'kueue_{its["kind"].lower()}', its['apiVersion'].partition('/')[2])
    assert [error.message for error in valid.iter_errors(its)] == []
  flavor, cluster_queue, queue = objects
  defaults = options_of(*HERE)
  assert (queue['metadata']['name'], queue['metadata']['namespace']) == (defaults.gke_queue, defaults.gke_namespace)
  assert queue['spec']['clusterQueue'] == cluster_queue['metadata']['name']
  pod = gke.manifest(plan_on('/mnt/slm'), PARENT, defaults)['spec']['replicatedJobs'][0]['template']['spec']['template']
  assert flavor['spec']['nodeLabels'].items() <= pod['spec']['nodeSelector'].items()


def test_golden_manifests():
  plan = plan_on('/mnt/slm', ['--config.name=a b; rm -rf $HOME'], [{'data.batch_size': 64}])
  options = options_of(*HERE, '--gke_slices=2', '--gke_capacity=spot', '--gke_context=c')
  shown = gke.show(plan, UNITS, options)
  assert shown + '\n' == (GOLDEN / 'gke.sh').read_text()
  assert subprocess.run(['bash', '-n'], input=shown, text=True).returncode == 0


def test_bugs_fail_and_all_else_restarts():
  spec = next(manifests())['spec']
  job = spec['replicatedJobs'][0]['template']['spec']
  (rule,) = job['podFailurePolicy']['rules']
  assert (rule['action'], rule['onExitCodes']['values']) == ('FailJob', [1, 2])
  assert job['backoffLimit'] == 0
  assert job['template']['spec']['restartPolicy'] == 'Never'
  assert spec['failurePolicy']['rules'][0]['action'] == 'FailJobSet'
  assert spec['failurePolicy']['maxRestarts'] > 0


def test_no_environment_and_no_secret_is_in_a_manifest(monkeypatch):
  monkeypatch.setenv('WANDB_API_KEY', 'hunter2')
  for its in manifests():
    text = cloud.to_yaml(its)
    assert 'hunter2' not in text
    assert not re.search(r'\benv|secret', text, re.IGNORECASE)


@given(HOSTILE)
@example('$(reboot)\nMANIFEST\n')
@example('1e3')
@example('on')
@settings(max_examples=60, deadline=None)
def test_a_shell_and_a_yaml_reader_give_back_what_was_written(value):
  its = {'args': [value, f'--config.name={value}'], 'name': 'x'}
  text = cloud.to_yaml(its)
  assert yaml.safe_load(text) == its
  shown = f"cat <<'MANIFEST'\n{text}MANIFEST\n"
  assert subprocess.run(['bash', '-c', shown], capture_output=True, check=True).stdout.decode() == text


def test_kubectls_own_reader_sees_the_same(tmp_path):
  if not shutil.which('kubectl'):
    pytest.skip('kubectl is not installed')
  plan = plan_on('/mnt/slm', ['--config.name=1e3', '--config.x=on', 'on', '1e3', '0o17', '2026-01-01', 'é"\n\'$'])
  its = gke.manifest(plan, PARENT, options_of(*HERE))
  (tmp_path / 'jobset.yaml').write_text(cloud.to_yaml(its))
  (tmp_path / 'kustomization.yaml').write_text('resources: [jobset.yaml]\n')
  done = subprocess.run(['kubectl', 'kustomize', str(tmp_path)], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert yaml.safe_load(done.stdout) == its


HERE_AND_THERE = plan_on('/mnt/slm'), plan_on('/mnt/other')


@given(st.text(max_size=40), st.lists(st.text('0123456789abcdef', min_size=12, max_size=12), min_size=1, max_size=3))
def test_names_are_valid_where_they_are_used(experiment, arms):
  unit = Unit(unit_name(experiment, arms), tuple(arms))
  here, there = HERE_AND_THERE
  name = cloud.job_name(here, unit)
  assert re.fullmatch('[a-z]([a-z0-9-]*[a-z0-9])?', name)
  assert len(f'{name}-slice-99-9999') <= 63  # of a pod, which is a host name
  assert name != cloud.job_name(there, unit)


# --------------------------------------------------------------------------------------------------- following a launch


def test_children_are_applied_when_their_parents_are_done(scene):
  code, out, seen = scene.run(then=[{}, {}])
  assert code == 0
  assert seen == [f'apply {scene.name(PARENT)}', f'apply {scene.name(CHILD)}']
  assert out.index(f'{PARENT.name}: done') < out.index(f'{CHILD.name}: applied')


def test_a_failed_jobset_is_told_and_blocks_its_children(scene):
  run = scene.plan.workdir / 'arms' / ONE / 'run.json'
  run.parent.mkdir(parents=True)
  run.write_text(json.dumps({'status': 'failed', 'error': 'no such file'}))
  failed = {'finish': 0, 'condition': ['Failed', 'jobset failed due to\nPodFailurePolicy']}
  code, out, seen = scene.run(then=[failed])
  assert code == 1
  assert len(seen) == 1
  assert f'failed (jobset failed due to PodFailurePolicy); {ONE}: failed (no such file)' in out
  assert f'{CHILD.name}: blocked' in out


@pytest.mark.parametrize('finished, built_upon', [(0, False), (1, True)])
def test_of_a_bundle_that_failed_what_is_done_is_built_upon(scene, finished, built_upon):
  scene.plan, (teachers, students) = clouds.bundles(scene.plan)
  code, out, seen = scene.run([teachers, students], then=[{'finish': finished, 'condition': ['Failed', '']}, {}])
  assert code == 1
  assert len(seen) == 1 + built_upon
  assert (f'{students.name}: done' in out, f'{students.name}: blocked' in out) == (built_upon, not built_upon)


def test_others_go_on_after_a_failure_unless_told_otherwise(scene):
  other = PARENT._replace(name='tiny-other', arms=(TWO,))
  failed = {'finish': 0, 'condition': ['Failed', '']}
  code, out, seen = scene.run([PARENT, other], then=[failed, {}])
  assert (code, len(seen)) == (1, 2)
  assert 'tiny-other: done' in out


def test_fail_fast_applies_nothing_more(scene):
  scene.options.fail_fast = True
  other = PARENT._replace(name='tiny-other', arms=(TWO,))
  after = CHILD._replace(after=(other.name,))
  failed = {'finish': 0, 'condition': ['Failed', '']}
  code, out, seen = scene.run([PARENT, other, after], then=[failed, {}])
  assert code == 1
  assert seen == [f'apply {scene.name(PARENT)}', f'apply {scene.name(other)}']
  assert f'{CHILD.name}: not started, another one failed' in out


def test_results_that_do_not_appear_here_are_an_error(scene):
  code, out, _ = scene.run([PARENT], then=[{'finish': 0, 'condition': ['Completed', '']}])
  assert code == 1
  assert 'ended well' in out
  assert 'does not hold its results' in out


def test_a_jobset_that_is_gone_without_results_is_an_error(scene):
  code, out, _ = scene.run([PARENT], then=[{'finish': 0, 'gone': True}])
  assert code == 1
  assert 'its JobSet is gone' in out


def test_a_second_launch_takes_up_what_runs_and_replaces_what_failed(scene):
  sets = {scene.name(PARENT): ['', ''], scene.name(CHILD): ['Failed', 'x']}
  finish(scene.plan, ONE)
  code, _, seen = scene.run(sets=sets, then=[{}])
  assert code == 0
  assert seen == [f'delete {scene.name(CHILD)}', f'apply {scene.name(CHILD)}']


def test_arms_that_run_in_another_bundle_are_not_started_beside_it(scene):
  sets = {'a-bundle': ['', '', 'another', ONE], 'an-ended-one': ['Failed', 'x', TWO]}
  apart = CHILD._replace(after=())
  code, out, seen = scene.run([PARENT, apart], sets=sets, then=[{}])
  assert (code, seen) == (1, [f'apply {scene.name(CHILD)}'])
  assert f'{PARENT.name}: not started, a-bundle of another launch has arms of it' in out


def test_a_cluster_out_of_reach_for_a_while_ends_nothing(scene):
  assert scene.run(then=[{}, {}], broken=gke.TRIES - 1)[0] == 0


def test_a_cluster_that_stays_out_of_reach_ends_the_looking_on(scene):
  code, out, _ = scene.run(broken=gke.TRIES)
  assert code == 1
  assert 'stopped looking on: kubectl: Unable to connect to the server' in out
  assert shlex.split(out.splitlines()[-1])[:2] == ['kubectl', '--namespace=default']


def test_ctrl_c_leaves_the_jobsets_alone(scene, monkeypatch):
  def interrupted(seconds):
    raise KeyboardInterrupt

  monkeypatch.setattr(gke.time, 'sleep', interrupted)
  code, out, seen = scene.run(then=[{'finish': 0}])
  assert code == 42
  assert seen == [f'apply {scene.name(PARENT)}']
  assert 'what was applied goes on; launch again' in out


@pytest.mark.parametrize(
  'argv, words',
  [
    (['--gke_type=v6e-3'], '--gke_type=v6e-3: no such slice; there is: v6e-1, v6e-4'),
    (['--gke_image='], '--gke_image: needed'),
    (['--gke_pvc='], '--gke_pvc: needed'),
    (['--gke_mount=/elsewhere'], 'share no folder with this machine but --gke_mount=/elsewhere'),
    (['--gke_slices=3'], 'data.batch_size=32: not divisible'),
  ],
)
def test_what_cannot_be_meant_is_one_line(argv, words):
  with pytest.raises(ConfigError) as error:
    gke.check(plan_on('/mnt/slm'), options_of(*HERE, *argv))
  assert words in str(error.value)
  assert '\n' not in str(error.value)


def test_ready_says_what_is_missing(scene, monkeypatch, tmp_path):
  scene.make(broken=1)
  with pytest.raises(ConfigError, match='kubectl: Unable to connect to the server: no route to host'):
    gke.ready(scene.plan, scene.options)
  gke.ready(scene.plan, scene.options)
  monkeypatch.setenv('PATH', str(tmp_path))
  with pytest.raises(ConfigError, match='kubectl: no such command on this machine; to get it: gcloud components'):
    gke.ready(scene.plan, scene.options)


# ---------------------------------------------------------------------------------------------------------- the image


def test_the_image_holds_what_a_worker_needs_and_nothing_else():
  lines = (REPO / 'launch/Dockerfile').read_text().replace('\\\n', ' ').splitlines()
  words = [shlex.split(line, comments=True) for line in lines]
  copied = {word for line in words if line[:1] == ['COPY'] for word in line[1:-1]}
  assert copied == {'requirements.lock', 'slm_jax', 'launch', 'experiments'}
  assert all((REPO / name).exists() for name in copied)
  users = [line[1] for line in words if line[:1] == ['USER']]
  assert users
  assert users[-1] not in ('root', '0')
  python = next(line[1] for line in words if line[:1] == ['ARG']).partition('=')[2]
  assert python in ('3.11', '3.12', '3.13')
