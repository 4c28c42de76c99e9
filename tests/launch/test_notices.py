"""What changes what a model reads is printed once a launch, and stands in the run.json of every arm that reads it."""

import json
import os

import pytest
import tiny
from fakes import experiment

from launch import cli
from slm_jax import notices
from slm_jax.ablate.arms import expand
from slm_jax.config import override
from slm_jax.data.folder import MANIFEST


@pytest.fixture
def corpus(tmp_path):
  folder = tmp_path / 'texts'
  (folder / 'test').mkdir(parents=True)
  (folder / 'test/hidden.txt').write_text('never read')
  (folder / 'picture.png').write_bytes(b'')
  lines = [json.dumps({'text': f'text number {i % 50} of this little corpus'}) for i in range(200)]
  (folder / 'a.jsonl').write_text('\n'.join([*lines, 'nonsense']) + '\n')
  return folder


def module(corpus, **settings):
  changes = {'data.sources': (str(corpus),), 'data.errors': 'skip', 'data.documents': 0, 'transforms': (), **settings}
  base = override(tiny.config(4), {'name': '', 'eval.samples': 0, 'eval.sample_tokens': 96, 'eval.every': 4, **changes})
  arms = [{'name': name, 'seed': seed} for name, seed in (('one', 0), ('two', 1))]
  arms.append({'name': 'wide', 'model.d_ff': 48})  # a program of its own
  return experiment(base=base, sweep=arms)


def launched(its, workdir, capsys, *argv: str) -> list[str]:
  """The notices that a launch prints."""
  assert cli.launch(its, [f'--workdir={workdir}', *argv]) == 0
  return [line.removeprefix('notice: ') for line in capsys.readouterr().out.splitlines() if line.startswith('notice: ')]


def kept(workdir) -> list[list[str]]:
  """The notices of every arm."""
  return [json.loads(path.read_text())['notices'] for path in sorted(workdir.glob('arms/*/run.json'))]


def test_each_notice_is_printed_once_and_kept_by_every_arm(corpus, tmp_path, capsys):
  workdir = tmp_path / 'runs'
  said = launched(module(corpus), workdir, capsys)
  out, bad, crossing = said
  assert out.startswith(f'{corpus}: 2 files were left out: {corpus}/picture.png (not a file of text); ')
  assert f'{corpus}/test/hidden.txt (named test)' in out
  assert bad.startswith(f'{corpus}: 1 bad records were skipped or mended: {corpus}/a.jsonl:201: not JSON')
  assert crossing.startswith(
    f'{corpus}: 15 training documents were left out, since the valid split holds the same text'
  )
  assert kept(workdir) == [said] * 3

  # ---- a launch that finds everything prepared, and one that finds damage
  assert launched(module(corpus, **{'model.d_model': 24}), workdir, capsys) == said
  (store,) = workdir.glob('data/tokens-*')
  os.truncate(store / 'train.array_record', 10)
  again = launched(module(corpus, **{'model.d_model': 32}), workdir, capsys)
  assert again[:3] == said
  assert again[3].startswith(f'{corpus}: {store} was damaged (train.array_record is 10 bytes long, expected ')
  assert json.loads((store / MANIFEST).read_text())['rebuilt'].startswith('train.array_record is 10 bytes long')
  assert sorted(map(len, kept(workdir))) == [3] * 6 + [4] * 3


def test_a_worker_prints_them_too(corpus, tmp_path, capsys):
  its, workdir = module(corpus), tmp_path / 'runs'
  ids = [arm.arm_id for arm in expand(its)]
  said = launched(its, workdir, capsys, f'--arm={",".join(ids[:2])}')
  assert len(said) == 3
  assert launched(its, workdir, capsys, f'--arm={ids[2]}') == said
  assert kept(workdir) == [said] * 3


def test_nothing_is_said_of_data_that_are_read_as_they_come(tmp_path, capsys):
  changes = {'data.sources': ('stories',), 'data.errors': 'strict', 'data.documents': 100}
  assert launched(module('', **changes), tmp_path / 'runs', capsys) == []
  assert kept(tmp_path / 'runs') == [[]] * 3


def test_a_launch_prints_again_what_an_earlier_one_printed(capsys):
  for _ in range(2):
    notices.begin()
    notices.show(['a', 'b', 'a'])
    notices.show(['b'])
    assert capsys.readouterr().out == 'notice: a\nnotice: b\n'
