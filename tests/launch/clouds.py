"""A launch to clouds without clouds: a plan on a share, and fake gcloud, kubectl and sky as executables on PATH."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fakes import arms_of, experiment

from launch import cli
from launch.plan import Plan, Unit, units
from slm_jax.distill.logits import Distill

ONE, TWO = '0123456789ab', 'ba9876543210'
PARENT = Unit('tiny-0123456789ab', (ONE,))
CHILD = Unit('tiny-ba9876543210', (TWO,), after=(PARENT.name,))
UNITS = [PARENT, CHILD]


def plan_on(share: Path | str, options: Sequence[str] = (), sweep: Any = None) -> Plan:
  """A plan whose workdir is `share`/tiny. Its units in tests are `UNITS`, whose ids never change."""
  module = experiment(sweep=sweep or [{'data.batch_size': 32}])
  return Plan(module, Path(share) / 'tiny', arms_of(module), list(options), 'base', own_train=True)


def bundles(plan: Plan) -> tuple[Plan, list[Unit]]:
  """The plan with two teachers, and a student of each; its units, two arms each."""
  student = {'name': 'student', 'transforms': (Distill('teacher'),)}
  sweep = [{'seed': seed, **arm} for seed in (0, 1) for arm in ({'name': 'teacher', 'model.n_layers': 3}, student)]
  plan = plan._replace(arms=arms_of(experiment(sweep=sweep)))
  return plan, units(plan, 2)


def options_of(*argv: str) -> Any:
  return cli.parse(argv, 'tiny')


def finish(plan: Plan, *arm_ids: str) -> None:
  for arm_id in arm_ids:
    folder = plan.workdir / 'arms' / arm_id
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'DONE').touch()


TOOL = """#!{python}
import json, os, subprocess, sys, time
from pathlib import Path

here = Path({here!r})
state = json.loads((here / 'state.json').read_text())
stdin = '' if sys.stdin.isatty() else sys.stdin.read()
with open(here / 'calls.jsonl', 'a') as file:
  file.write(json.dumps([sys.argv[1:], stdin]) + '\\n')


def leave(out='', err='', code=0):
  (here / 'state.json').write_text(json.dumps(state))
  print(out, end='')
  print(err, end='', file=sys.stderr)
  sys.exit(code)


def finish(arms):
  for arm in arms:
    folder = Path(state['workdir']) / 'arms' / arm
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'DONE').touch()


{body}
"""


class Tool:
  """An executable of that name, first on PATH. It reads and writes `state`, and notes how it was called."""

  def __init__(self, folder: Path, name: str, body: str, monkeypatch: Any, **state: Any):
    self.folder = folder / f'fake_{name}'
    self.folder.mkdir()
    path = self.folder / name
    path.write_text(TOOL.format(python=sys.executable, here=str(self.folder), body=body))
    path.chmod(0o755)
    monkeypatch.setenv('PATH', f'{self.folder}{os.pathsep}{os.environ["PATH"]}')
    self.state = state

  @property
  def state(self) -> dict[str, Any]:
    return json.loads((self.folder / 'state.json').read_text())

  @state.setter
  def state(self, value: dict[str, Any]) -> None:
    (self.folder / 'state.json').write_text(json.dumps(value))

  @property
  def calls(self) -> list[tuple[list[str], str]]:
    path = self.folder / 'calls.jsonl'
    return [tuple(json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


TPU_VM = ['--tpu_vm_type=v6e-16', '--tpu_vm_zone=us-east5-b', '--tpu_vm_share=10.0.0.2:/vol1']  # flags of a launch

# state: {state, ahead: states still to come, creates: [{error} or {ahead}], sshs: [{code, done, then, run}]}
GCLOUD = """
verb = sys.argv[4]
if verb == 'create':
  its = state['creates'].pop(0)
  if 'error' in its:
    leave(err=its['error'] + '\\n', code=1)
  state['ahead'] = its['ahead']
  state['state'] = state['ahead'].pop(0)
elif verb == 'describe':
  if state.get('broken'):
    state['broken'] -= 1
    leave(err='\\nERROR: gcloud crashed (ConnectionError): no route to host\\n\\nTo report it:\\na\\nb\\nc\\n', code=1)
  if not state['state']:
    leave(err='ERROR: (gcloud) NOT_FOUND: Resource was not found\\n', code=1)
  now = state['state']
  if state.get('ahead'):
    state['state'] = state['ahead'].pop(0)
  failed = {'failedData': {'error': {'code': 8, 'message': 'no capacity\\nin this zone'}}} if now == 'FAILED' else {}
  leave(out=json.dumps({'name': 'x', 'state': {'state': now, **failed}}))
elif verb == 'ssh':
  its = state['sshs'].pop(0)
  (here / 'state.json').write_text(json.dumps(state))
  finish(its.get('done', []))
  if its.get('run'):
    line = next(word for word in sys.argv if word.startswith('--command=')).partition('=')[2]
    home = os.environ['VM']
    its['code'] = subprocess.run(['bash', '-c', line], cwd=home, env={**os.environ, 'HOME': home}).returncode
  if its.get('sleep'):
    (here / 'connected').touch()
    time.sleep(its['sleep'])
  state['state'] = its.get('then', state['state'])
  leave(code=its.get('code', 0))
elif verb == 'delete':
  if state.get('undeletable'):
    leave(err='ERROR: (gcloud) PERMISSION_DENIED\\n', code=1)
  if not state['state']:
    leave(err='ERROR: (gcloud) NOT_FOUND\\n', code=1)
  state['state'] = ''
leave()
"""
