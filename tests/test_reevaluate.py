"""Other settings of evaluation evaluate finished models; they train nothing."""

import dataclasses
import json
import shutil

import pytest
import tiny
from fakes import experiment

from launch import cli
from slm_jax import reevaluate
from slm_jax.ablate import results
from slm_jax.ablate import workdir as workdirs
from slm_jax.ablate.arms import expand
from slm_jax.config import override
from slm_jax.distill.logits import Distill
from slm_jax.ledger import Diverged

BASE = override(tiny.config(4), {'name': '', 'eval.every': 2, 'run.checkpoint_every': 2, 'run.population': False})
MODULE = experiment(
  base=BASE, sweep=[{'name': 'teacher', 'model.d_ff': 48}, {'name': 'taught', 'transforms': (Distill('teacher'),)}]
)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('trained') / 'runs'
  assert cli.launch(MODULE, [f'--workdir={workdir}']) == 0
  return workdir


@pytest.fixture
def workdir(trained, tmp_path):
  return shutil.copytree(trained, tmp_path / 'runs')


def launched(workdir, capsys, *words: str) -> str:
  assert cli.launch(MODULE, [f'--workdir={workdir}', *words]) == 0
  return capsys.readouterr().out


def runs(workdir) -> dict[str, dict]:
  found = {path.parent.name: json.loads(path.read_text()) for path in workdir.glob('arms/*/run.json')}
  return {run['name']: run for run in found.values()}


def trained_lines(workdir) -> list[str]:
  lines = [line for path in sorted(workdir.glob('arms/*/metrics.jsonl')) for line in path.read_text().splitlines()]
  return [line for line in lines if json.loads(line)['kind'] == 'train']


MEASURED = ('loss', 'bits_per_byte', 'accuracy', 'ece', 'held_out', 'tokens_evaluated', 'floor', 'gap')
BOOKS = ('tokens', 'bytes', 'seconds', 'flops', 'hardware_flops', 'parent_flops', 'parameters', 'steps', 'goodput')


def test_finished_models_are_evaluated_on_what_is_asked_for_now_and_not_trained(workdir, capsys):
  before, steps = runs(workdir), trained_lines(workdir)
  out = launched(workdir, capsys, '--config.eval.bytes=5000', '--config.eval.samples=3')
  assert '2 arms' in out
  assert '0 to run, 2 to evaluate again, since settings of evaluation have changed' in out
  after = runs(workdir)
  for name, run in after.items():
    summary, old = run['summary'], before[name]['summary']
    assert summary.keys() == old.keys()
    assert {key for key in BOOKS if summary[key] != old[key]} == set()
    assert all(summary[key] != old[key] for key in ('loss', 'held_out', 'tokens_evaluated'))
    assert name == 'teacher' or summary['kl'] != old['kl']
    assert summary['tokens_evaluated'] > 4 * old['tokens_evaluated']
    assert run['started'] == before[name]['started']
  assert trained_lines(workdir) == steps
  assert all(len(json.loads(path.read_text())) == 3 for path in workdir.glob('arms/*/samples.json'))
  assert 'nothing to do' in launched(workdir, capsys, '--config.eval.bytes=5000', '--config.eval.samples=3')

  # ---- and back
  out = launched(workdir, capsys)
  assert '2 to evaluate again' in out
  for name, run in runs(workdir).items():
    for key in MEASURED:
      assert run['summary'][key] == before[name]['summary'][key]
  assert 'nothing to do' in launched(workdir, capsys)


def test_how_often_it_was_evaluated_on_the_way_does_not_count(workdir, capsys):
  assert '2 done, 0 to run\n' in launched(workdir, capsys, '--config.eval.every=3')


def test_a_dry_run_says_which_arms_are_evaluated_again(workdir, capsys):
  out = launched(workdir, capsys, '--config.eval.bytes=5000', '--dry_run')
  rows = [line.split() for line in out.splitlines()]
  assert [row[0] for row in rows if row[2:3] in (['taught'], ['teacher'])] == ['evaluate'] * 2


@pytest.mark.parametrize('lost', ['checkpoints', 'parent'])
def test_the_finished_model_is_enough(workdir, capsys, lost):
  before = runs(workdir)['taught']['summary']
  if lost == 'checkpoints':
    for path in workdir.glob('arms/*/checkpoints'):
      shutil.rmtree(path)
  else:
    teacher, *_ = expand(MODULE)
    shutil.rmtree(workdirs.folder(workdir, teacher.arm_id))
  for words in (['--config.eval.bytes=5000'], []):
    launched(workdir, capsys, '--only=taught', *words)
  after = runs(workdir)['taught']['summary']
  assert after['held_out'] == before['held_out']
  for key in ('loss', 'bits_per_byte', 'gap'):
    assert after[key] == pytest.approx(before[key], rel=1e-6)


def test_curves_are_of_the_text_of_the_last_evaluation(workdir, capsys):
  def curve():
    row = next(row for row in results.read(workdir) if row.name == 'taught')
    points = results.curve(workdir, row)
    assert points[-1].loss == row.summary['loss']
    return [point.step for point in points]

  assert curve() == [0, 2, 4]
  launched(workdir, capsys, '--config.eval.bytes=5000')
  assert curve() == [4]


def test_an_evaluation_that_is_cut_off_is_done_again(workdir, capsys, monkeypatch):
  write = reevaluate.write_json

  def cut_off(path, value):
    if path.name == 'config.json':
      raise KeyboardInterrupt
    write(path, value)

  monkeypatch.setattr(reevaluate, 'write_json', cut_off)
  assert cli.launch(MODULE, [f'--workdir={workdir}', '--config.eval.bytes=5000']) == 42
  monkeypatch.undo()
  capsys.readouterr()
  assert '2 to evaluate again' in launched(workdir, capsys, '--config.eval.bytes=5000')


def test_an_arm_that_turns_out_to_have_diverged_is_no_longer_done(workdir, monkeypatch, capsys):
  def diverged(config, summary):
    raise Diverged('above uniform')

  monkeypatch.setattr(reevaluate, 'check_converged', diverged)
  assert cli.launch(MODULE, [f'--workdir={workdir}', '--config.eval.bytes=5000', '--only=teacher']) == 1
  assert runs(workdir)['teacher']['status'] == 'diverged'
  assert 'diverged (above uniform)' in capsys.readouterr().out


def test_an_arm_that_goes_on_forgets_what_was_evaluated_on_other_text(tmp_path, capsys):
  """Also where the last evaluation of the cut-off run stands at the very step from which it goes on."""
  workdir = tmp_path / 'runs'
  module = experiment(base=dataclasses.replace(BASE, name='one'))
  assert cli.launch(module, [f'--workdir={workdir}']) == 0
  (folder,) = workdir.glob('arms/*')
  (folder / 'DONE').unlink()
  assert cli.launch(module, [f'--workdir={workdir}', '--config.eval.bytes=5000']) == 0
  (row,) = results.read(workdir)
  assert [point.step for point in results.curve(workdir, row)] == [4]
  assert results.curve(workdir, row)[-1].loss == row.summary['loss']
  assert workdirs.is_evaluated(workdir, row.arm_id, override(BASE, {'eval.bytes': '5000'}).eval)


def test_an_arm_of_an_earlier_version_that_was_trained_on_held_out_text_is_named(tmp_path, capsys):
  lines = [json.dumps({'text': f'text number {i % 30} of a corpus that repeats itself'}) for i in range(90)]
  (tmp_path / 'a.jsonl').write_text('\n'.join(lines))
  module = experiment(base=override(BASE, {'data.sources': (str(tmp_path / 'a.jsonl'),), 'data.documents': '0'}))
  words = [f'--workdir={tmp_path / "runs"}', '--config.eval.bytes=200']
  assert cli.launch(module, words[:1]) == 0
  (path,) = (tmp_path / 'runs').glob('arms/*/run.json')
  run = json.loads(path.read_text())
  assert len(run.pop('notices')) == 1  # that they were left out
  del run['crc32']
  path.write_text(json.dumps(run))  # as an earlier version left it, which left out none
  capsys.readouterr()
  assert cli.launch(module, words) == 0
  assert '6 documents of the held-out text by an earlier version; --rerun makes it again' in capsys.readouterr().out
  assert len(json.loads(path.read_text())['notices']) == 2
