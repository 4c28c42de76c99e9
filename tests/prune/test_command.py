"""The command that finds a shape for a budget: what it prints is what an arm of that shape starts with."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from slm_jax import train
from slm_jax.config import override
from slm_jax.model.flops import parameter_count
from slm_jax.preempt import EXIT_DONE
from slm_jax.prune import command

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('command')
  base = override(tiny.config(60), {'name': 'dense', 'transforms': (), 'eval.samples': 0, 'eval.every': 60})
  assert train.run(base, folder, 'dense') == EXIT_DONE
  return folder, base


def table(out):
  lines = out.splitlines()
  heads = re.split(r'\s{2,}', lines[0].strip())
  return [
    dict(zip(heads, re.split(r'\s{2,}', line.strip()), strict=True))
    for line in lines[1:]
    if line.strip()[0:1].isdigit()
  ]


def test_the_best_shape_is_first_and_an_arm_of_it_starts_with_that_loss(workdir, capsys):
  folder, base = workdir
  words = [f'--model={folder}/arms/dense', '--share=0.7', '--sequences=16', '--multiple=4']
  assert command.main(words) == 0
  out = capsys.readouterr().out
  whole, *found = table(out)
  assert len(found) >= 2
  losses = [float(row['loss']) for row in found]
  assert losses == sorted(losses)
  assert (whole['of parameters'], whole['parameters']) == ('100%', f'{parameter_count(base.model):,}')
  for row in found:
    share = int(row['parameters'].replace(',', '')) / parameter_count(base.model)
    assert share <= 0.7
    assert row['of parameters'] == f'{share:.0%}'
  line = out.splitlines()[-1]
  assert line.startswith('best: an arm with init.arm=dense, --config.init.by=activations and --config.model.')
  best = dict(re.findall(r'--config\.(\S+)=(\S+)', line))
  start = {'name': 'cut', 'init.arm': 'dense', 'train.steps': 0, 'init.sequences': 16, 'eval.bytes': 1000}
  assert train.run(override(base, {**start, **best}), folder, 'cut') == EXIT_DONE
  summary = json.loads((folder / 'arms' / 'cut' / 'run.json').read_text())['summary']
  assert summary['loss'] == pytest.approx(losses[0], abs=1e-4)
  assert f'{summary["parameters"]:,}' == found[0]['parameters']


def test_as_a_program_with_a_text_of_its_own(workdir, tmp_path):
  folder, _ = workdir
  text = tmp_path / 'text.txt'
  text.write_text('A cat sat on a mat. ' * 400)
  shutil.copytree(folder / 'arms' / 'dense' / 'model', tmp_path / 'model')  # of no arm
  words = ['--model=model', '--share=0.5', '--cost=kv_bytes', '--by=magnitude', '--sequences=4', '--seq_len=32']
  run = [sys.executable, '-m', 'slm_jax.prune.target', *words]
  env = {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT), 'PATH': '/usr/bin:/bin'}
  done = subprocess.run([*run, f'--text={text}'], cwd=tmp_path, env=env, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  whole, *found = table(done.stdout)
  assert {row['of kv_bytes'] for row in found} == {'50%'}
  assert all(float(row['loss']) > 0 for row in [whole, *found])
  assert sorted(path.name for path in tmp_path.iterdir()) == ['model', 'text.txt']  # nothing is left behind


def test_without_text_there_are_no_losses(workdir, tmp_path, capsys):
  shutil.copytree(workdir[0] / 'arms' / 'dense' / 'model', tmp_path / 'model')
  assert command.main([f'--model={tmp_path}', '--share=0.8', '--cost=flops']) == 0
  out = capsys.readouterr().out
  assert {row['loss'] for row in table(out)} == {'–'}
  sizes = [int(row['parameters'].replace(',', '')) for row in table(out)[1:]]
  assert sizes == sorted(sizes, reverse=True)
  assert out.splitlines()[-1].startswith('first: an arm with init.arm=this model')


@pytest.mark.parametrize(
  'words,message',
  [
    (['--share=0.5'], '--model: must be given'),
    (['--model=DENSE'], '--share: must be given'),
    (['--model=nowhere', '--share=0.5'], 'nowhere/model: no finished model there'),
    (['--model=DENSE', '--share=1.5'], r'share=1.5: must lie in \(0, 1\]'),
    (['--model=DENSE', '--share=0.01'], 'share=0.01: nothing fits; the least that is tried costs 0'),
    (['--model=DENSE', '--share=half'], '--share=half: could not convert string to float'),
    (['--model=DENSE', '--share=0.5', '--cost=joules'], 'one of <parameters.flops.kv_bytes.latency>'),
    (['--model=DENSE', '--share=0.5', '--by=flap'], 'one of <magnitude.activations.principal.random>'),
    (['--model=DENSE', '--share=0.5', '--by=principal'], '--by=principal: model.tied=true: .*allowed: false'),
    (['--model=DENSE', '--share=0.5', '--multiple=0'], 'multiple=0: must be positive'),
    (['--model=DENSE', '--share=0.5', '--batch=4'], '--batch=4: has no effect without --cost=latency'),
    (['--model=DENSE', '--share=0.5', '--seed=4'], '--seed=4: has no effect without --by=random'),
    (['--model=DENSE', '--share=0.5', '--batch=0'], '--batch=0: must be positive'),
    (['--model=DENSE', '--share=0.5', '--sequences=0'], '--sequences=0: must be positive'),
    (['--model=DENSE', '--share=0.5', '--seed=4294967296'], r'--seed=4294967296: must lie in \[0, 2\^32\)'),
    (['--model=DENSE', '--share=0.5', '--seq_len=97'], '--seq_len=97: at most model.max_len=96'),
    (['--model=DENSE', '--share=0.5', '--text=nowhere.txt'], "data.sources='nowhere.txt': no such file"),
    (['--model=DENSE', '--share=0.5', 'more'], 'unexpected: more'),
    (['--model=DENSE', '--share=0.5', '--depth=2'], 'Unknown command line flag .depth.'),
  ],
)
def test_what_is_wrong_is_one_line(workdir, capsys, words, message):
  assert command.main([word.replace('DENSE', f'{workdir[0]}/arms/dense') for word in words]) == 1
  out, err = capsys.readouterr()
  assert out == ''
  assert re.fullmatch(f'error: .*{message}.*\n', err)


def test_help(capsys):
  assert command.main(['--help']) == 0
  assert '--share' in capsys.readouterr().out
