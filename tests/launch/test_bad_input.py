"""Every bad input, through the front door: one line on stderr that names the thing, exit code 1, nothing written."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from slm_jax.ablate.workdir import Experiment, write_experiment

ROOT = Path(__file__).parents[2]

CASES = {
  'unknown flag': (['--lanch=local'], 'lanch'),
  'no such user': (['--workdir=~nobody-here/runs'], '~nobody-here/runs: no such user'),
  'unknown key': (['--config.model.n_layer=2'], "did you mean 'n_layers'"),
  'wrong type': (['--config.train.steps=many'], "train.steps='many': expected int"),
  'not a choice': (['--config.optim.name=sgd'], 'allowed: adamw, muon, adafactor'),
  'unknown preset': (['--config.model=smollm2'], 'smollm2_135m'),
  'unknown sweep': (['--sweep=lr'], '--sweep=lr: no such sweep'),
  'heads and KV heads': (['--config.model.n_kv_heads=3'], 'n_heads=4: must be a multiple of n_kv_heads=3'),
  'positions': (['--config.data.seq_len=65'], 'data.seq_len=65: longer than model.max_len=64'),
  'accumulation': (['--config.train.accumulate=5'], 'batch_size=12: not divisible by train.accumulate=5'),
  'devices': (['--config.data.batch_size=10'], 'batch_size=10: not divisible by .* x 4 data-parallel devices'),
  'mesh': (['--config.run.fsdp=3'], 'run.fsdp=3, run.tensor=1: 3 does not divide the 4 devices'),
  'vocabulary': (['--config.model.vocab_size=200'], 'model.vocab_size=200: too small for the 259 tokens of bytes'),
  'no such file': (['--config.data.sources=nowhere.txt'], 'nowhere.txt'),
  'empty folder': (['--config.data.sources=nothing/'], "nothing/': an empty folder"),
  'hub without a name': (['--config.data.sources=hf:'], "'hf:': expected hf:NAME"),
  'empty corpus': (['--config.data.sources=empty.txt'], 'empty.txt'),
  'not UTF-8': (['--config.data.sources=latin.txt'], 'latin.txt: not UTF-8 at byte offset 3'),
  'not a record': (['--config.data.sources=lines.jsonl'], 'lines.jsonl.*2'),
  'wrong field, dry run': (
    ['--config.data.sources=lines.jsonl', '--config.data.text_field=body', '--dry_run'],
    "lines.jsonl:1: no field 'body'; there is: 'text'",
  ),
  'not an archive, dry run': (['--config.data.sources=shards', '--dry_run'], 'b.jsonl.gz: cannot be read: Not a gzip'),
  'not UTF-8, dry run': (['--config.data.sources=latin.txt', '--dry_run'], 'latin.txt: not UTF-8 at byte offset 3'),
  'experiment of another workdir': (['--workdir=taken'], "holds the experiment 'another'"),
}


@pytest.mark.parametrize('case', CASES)
def test_bad_input_is_one_line_and_leaves_nothing(case, tmp_path):
  (tmp_path / 'text.txt').write_text('To be, or not to be, that is the question. ' * 200)
  (tmp_path / 'empty.txt').write_text('')
  (tmp_path / 'nothing').mkdir()
  (tmp_path / 'latin.txt').write_bytes(b'Caf\xe9 ' * 100)
  (tmp_path / 'lines.jsonl').write_text('{"text": "fine"}\nnot JSON\n')
  (tmp_path / 'shards').mkdir()
  (tmp_path / 'shards/a.jsonl').write_text('{"text": "fine"}\n')
  (tmp_path / 'shards/b.jsonl.gz').write_text('{"text": "not packed"}\n')
  (tmp_path / 'taken').mkdir()
  write_experiment(tmp_path / 'taken', Experiment('another'))
  before = sorted(tmp_path.rglob('*'))

  arguments, message = CASES[case]
  command = [sys.executable, '-m', 'experiments.shakespeare_char', '--config.data.sources=text.txt', '--workdir=out']
  environment = {
    **os.environ,
    'PYTHONPATH': str(ROOT),
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': '--xla_force_host_platform_device_count=4',
  }
  done = subprocess.run(
    [*command, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=120
  )
  assert done.returncode == 1, done.stdout + done.stderr
  errors = done.stderr.strip().split('\n')
  assert len(errors) == 1, done.stderr
  assert errors[0].startswith('error: ')
  assert re.search(message, errors[0]), errors[0]
  assert sorted(tmp_path.rglob('*')) == before
