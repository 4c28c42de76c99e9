"""Text that a terminal or UTF-8 cannot write: names of files, and what commands print with any encoding."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fakes import FakeTrain, experiment, summary

from launch import cli, report, status
from slm_jax import commands
from slm_jax.ablate import workdir as workdirs
from slm_jax.config import ConfigError
from slm_jax.data import sources, store
from slm_jax.data.config import DataConfig
from slm_jax.data.tokenizer import Bytes

ROOT = Path(__file__).parents[2]
SWEEP = [{'name': 'a', 'seed': s, 'data.seed': s} for s in (0, 1)] + [{'name': 'b', 'seed': s} for s in (0, 1)]
LATIN = os.fsdecode(b'caf\xe9')  # as Python has the name of a file that is not UTF-8


@pytest.fixture
def workdir(tmp_path):
  path = tmp_path / 'runs'
  assert cli.launch(experiment(sweep=SWEEP), [f'--workdir={path}'], train=FakeTrain({'b': 1.25})) == 0
  return path


# --------------------------------------------------------------------------------------------------- any encoding


@pytest.mark.parametrize('env', [{'PYTHONIOENCODING': 'ascii'}, {'PYTHONIOENCODING': 'latin-1'}, {'LC_ALL': 'C'}])
@pytest.mark.parametrize('command', ['status', 'report'])
def test_a_command_writes_with_any_encoding(workdir, env, command):
  """A finished sweep ended with a traceback and exit code 1."""
  env = {**os.environ, 'PYTHONPATH': str(ROOT), 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0', **env}
  done = subprocess.run(
    [sys.executable, '-m', f'launch.{command}', str(workdir)], capture_output=True, env=env, check=False, timeout=120
  )
  assert (done.returncode, done.stderr) == (0, b'')
  shown = done.stdout.decode('latin-1')
  assert '\nb ' in shown if command == 'report' else 'done' in shown
  if env.get('PYTHONIOENCODING') != 'latin-1' and command == 'report':
    assert 'mean +- 95 % t-interval' in shown
    assert shown.isascii()


def test_what_is_lacking_is_shown_as_plain_characters():
  commands.show_any_text()
  told = f'−0.07 ± 0.19 – ‖x‖² × 3 … a teacher’s {LATIN} \ud800 日本'
  assert told.encode('ascii', errors='plain').decode() == "-0.07 +- 0.19 - ||x||? x 3 ... a teacher's caf\\xe9 ? ??"
  assert 'ä ±'.encode('latin-1', errors='plain') == 'ä ±'.encode('latin-1')
  assert told.encode('utf-8', errors='plain').decode() == told.replace(LATIN, 'caf\\xe9').replace('\ud800', '?')


def test_every_command_begins_with_it():
  """By the source: each module that can be started calls it, or what calls it."""
  start = {'show_any_text', 'launch.main', 'commands.run'}
  missing = []
  for path in [p for folder in ('slm_jax', 'launch', 'experiments') for p in sorted((ROOT / folder).rglob('*.py'))]:
    text = path.read_text()
    if not re.search("^if __name__ == '__main__':", text, re.MULTILINE) or path.name == 'leash.py':
      continue  # leash.py becomes another program
    called = {ast.unparse(node.func) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)}
    if not any(name.endswith(one) for name in called for one in start) and 'slm_jax.prune.command' not in text:
      missing.append(path.name)
  assert missing == []


# --------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
  'argv, words',
  [
    ([f'--config.data.sources={LATIN}.txt'], 'config.data.sources='),
    ([f'--config.data.tokenizer_file={LATIN}', '--config.data.tokenizer=sentencepiece'], 'config.data.tokenizer_file='),
    ([f'--config.eval.prompt={LATIN}'], 'config.eval.prompt='),
    ([f'--workdir=out/{LATIN}'], '--workdir=out/'),
  ],
)
@pytest.mark.parametrize('more', [[], ['--dry_run']])
def test_a_name_that_is_not_utf_8_is_refused_before_anything_is_written(
  tmp_path, monkeypatch, capsys, argv, words, more
):
  """Such a source was trained on, and could never be reported."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / f'{LATIN}.txt').write_text('To be, or not to be. ' * 500)
  before = sorted(tmp_path.rglob('*'))
  with pytest.raises(SystemExit) as ended:
    cli.main(experiment(), [*argv, *more])
  error = capsys.readouterr().err
  assert ended.value.code == 1
  assert words in error
  assert 'caf\\udce9' in error
  assert 'must be Unicode text; the name of a file must be UTF-8' in error
  assert error.count('\n') == 1
  assert sorted(tmp_path.rglob('*')) == before


@pytest.mark.parametrize('change', [{'name': f'x {LATIN}'}, {'data.text_field': '\ud800'}])
def test_a_name_in_a_sweep_is_refused_too(tmp_path, change):
  with pytest.raises(ConfigError, match='must be Unicode text'):
    cli.launch(experiment(sweep=[change]), [f'--workdir={tmp_path}/runs'])
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('suffix', ['.txt', '.jsonl', '.parquet'])
def test_a_folder_may_hold_files_of_such_names(tmp_path, suffix):
  """They are in no configuration; what is told of them is JSON, and printed by commands that can."""
  texts, path = [f'To be {i}, or not to be. ' * 50 for i in range(20)], tmp_path / 'in' / f'{LATIN}{suffix}'
  path.parent.mkdir()
  if suffix == '.parquet':
    pa = pytest.importorskip('pyarrow')
    import pyarrow.parquet as pq

    with open(path, 'wb') as file:
      pq.write_table(pa.table({'text': [*texts, None]}), file)
  else:
    path.write_text(texts[0] if suffix == '.txt' else ''.join(json.dumps({'text': t}) + '\n' for t in [*texts, None]))
  config = DataConfig(sources=(str(path.parent),), errors='skip', seq_len=32)
  (source,) = sources.open_sources(config)
  told = []
  found = store.open_store(source, config, Bytes(), tmp_path / 'data', told.append)
  assert len(found.train()) > 5
  if suffix != '.txt':
    assert found.manifest['bad']['places'][0].startswith(f'{path}:21')


# ------------------------------------------------------------------------------------- what older workdirs may hold


def test_a_workdir_that_holds_such_text_is_shown(workdir, capsys):
  """Text from anywhere: names, an answer, errors, samples. Pictures included."""
  found = workdirs.read_experiment(workdir)
  first, *others = found.arms
  strange = f'{LATIN} \ud83d <i>x'
  arms = {
    **found.arms,
    first: {**found.arms[first], 'name': strange, 'command': strange, 'diff': {strange: ['', strange]}},
  }
  launch = found.latest._replace(question=strange, answer=strange, baseline=strange)
  workdirs.write_experiment(workdir, found._replace(arms=arms).with_launch(launch))
  folder = workdirs.folder(workdir, first)
  (folder / 'samples.json').write_text(json.dumps([{'prompt': strange, 'text': strange}]))
  (folder / 'run.json').write_text(json.dumps({'status': 'done', 'error': strange, 'summary': summary(1.5)}))
  for command in (status, report):
    assert command.main([str(workdir)]) == 0
  assert report.main([str(workdir), str(workdir)]) == 0
  assert 'caf\\udce9' in (workdir / 'report.html').read_text()
  assert 'caf\\udce9' in (workdir / 'results.csv').read_text()
  assert '<i>x' not in (workdir / 'report.html').read_text()
  assert others
