"""Writing a cache: what a record holds, who may build it, what a kill leaves, and what is refused."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny

from slm_jax import train
from slm_jax.checkpoint import load_model
from slm_jax.config import ConfigError, override
from slm_jax.data.dataset import open_data
from slm_jax.data.tokenizer import Bytes
from slm_jax.distill import cache, capture, records
from slm_jax.distill.cached import Cache
from slm_jax.distill.records import Damaged, Layout
from slm_jax.model import decoder

V = Bytes.vocab_size
LAYOUTS = {
  'dense': Layout('dense', 40, 40, 'float32'),
  'top_k': Layout('top_k', 5, 40, 'float32'),
  'wide': Layout('top_k', 5, 70_000, 'float32'),
  'sampled': Layout('sampled', 12, 40, 'float32'),
  'wide draws': Layout('sampled', 12, 70_000, 'float32'),
}


# ------------------------------------------------------------------------------------------------------------- records


def said(layout, length=9, seed=0):
  """A sequence with two documents and padding, and what a made-up teacher says of it."""
  rng = np.random.default_rng(seed)
  sequence = np.stack([rng.integers(0, 40, length + 1), [1, 1, 1, 2, 2, 2, 2, 0, 0, 0]]).astype(np.uint32)
  told = {name: -rng.random((length, layout.size), np.float32) for name in ('log_p',)}
  told |= {name: -rng.random(length, np.float32) for name in ('log_rest', 'log_next')}
  ids = np.stack([rng.choice(layout.vocab, layout.size, layout.method == 'sampled') for _ in range(length)])
  return sequence, told | {'ids': ids.astype(np.int32)}


@pytest.mark.parametrize('name', LAYOUTS)
def test_what_is_written_is_what_is_read(name):
  layout = LAYOUTS[name]
  sequence, told = said(layout)
  read = records.decode(layout, sequence, records.encode(layout, sequence, told), 12)
  mask = records.predicted(sequence)
  assert mask.tolist() == [True, True, False, True, True, True, False, False, False]
  for entry, values in read.items():
    assert not values[~mask].any()
    if entry not in ('ids', 'weights') or layout.method == 'top_k':
      np.testing.assert_array_equal(values[mask], told[entry][mask])
  if layout.method == 'sampled':
    for row in np.flatnonzero(mask):
      there = read['weights'][row] > 0
      ids, counts = np.unique(told['ids'][row], return_counts=True)
      np.testing.assert_array_equal(read['ids'][row][there], ids)
      np.testing.assert_allclose(read['weights'][row][there], counts / 12, rtol=1e-6)


@pytest.mark.parametrize('name', LAYOUTS)
def test_any_changed_byte_and_any_other_sequence_is_noticed(name):
  layout = LAYOUTS[name]
  sequence, told = said(layout)
  data = records.encode(layout, sequence, told)
  for i in range(len(data)):
    with pytest.raises(Damaged):
      records.decode(layout, sequence, data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :], 12)
  other = sequence.copy()
  other[0, -1] += 1  # a token of the padding is a token
  for wrong in (other, sequence[:, ::-1]):
    with pytest.raises(Damaged):
      records.decode(layout, wrong, data, 12)


def test_fewer_of_the_largest_and_all_of_the_rest():
  rng = np.random.default_rng(0)
  p = -np.sort(-rng.dirichlet(np.ones(20), 3))
  told = {'ids': np.tile(np.arange(10), (3, 1)), 'log_p': np.log(p[:, :10]), 'log_rest': np.log(p[:, 10:].sum(-1))}
  less = records.narrowed(told, 4)
  np.testing.assert_allclose(np.exp(less['log_p']), p[:, :4], rtol=1e-6)
  np.testing.assert_allclose(np.exp(less['log_rest']), p[:, 4:].sum(-1), rtol=1e-6)


# ------------------------------------------------------------------------------------------------------------ building


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """With a trained teacher."""
  folder = tmp_path_factory.mktemp('cache')
  assert train.run(override(tiny.config(20), {'name': 'large', 'transforms': ()}), folder, 'teacher') == 0
  return folder


def captured(workdir, layout=None, seed=0):
  dataset = open_data(tiny.config().data, workdir / 'data', print)
  config, params, _ = load_model(workdir / 'arms' / 'teacher' / 'model')
  return capture.Capture(dataset, decoder.build(config), params, layout or Layout('sampled', 50, V, 'float16'), seed)


def entries(folder, what):
  found = Cache(folder)
  return [found.read(what.sequences[i]) for i in range(len(what.sequences))]


def same(a, b):
  return all((x[name] == y[name]).all() for x, y in zip(a, b, strict=True) for name in x)


def quiet(text):
  pass


def test_hosts_and_shards_change_nothing(workdir, tmp_path):
  what = captured(workdir)
  whole = capture.build(tmp_path / 'one', what, {}, quiet)
  for host in (2, 0):
    assert capture.build(tmp_path / 'three', what, {}, quiet, host, 3, shard=2500) is None
    with pytest.raises(ConfigError, match='not finished'):
      Cache(tmp_path / 'three')
  parts = capture.build(tmp_path / 'three', what, {}, quiet, 1, 3, shard=2500)
  assert len(parts['shards']) > 3
  for fact in ('identity', 'records', 'tokens', 'width', 'nats', 'flops'):
    assert parts[fact] == pytest.approx(whole[fact]) if fact == 'nats' else parts[fact] == whole[fact]
  assert same(entries(tmp_path / 'one', what), entries(tmp_path / 'three', what))


def test_draws_of_another_seed_are_others(workdir, tmp_path):
  a, b = captured(workdir), captured(workdir, seed=1)
  assert capture.identity(a.key) != capture.identity(b.key)
  for name, what in (('a', a), ('b', b)):
    capture.build(tmp_path / name, what, {}, quiet)
  assert not all(
    np.array_equal(x['ids'], y['ids'])
    for x, y in zip(entries(tmp_path / 'a', a), entries(tmp_path / 'b', b), strict=True)
  )


def test_draws_take_less_than_48_bytes_a_token_and_nothing_is_lost(workdir, tmp_path):
  what = captured(workdir)
  manifest = capture.build(tmp_path / 'c', what, {}, quiet)
  on_disk = sum(path.stat().st_size for path in (tmp_path / 'c').glob('shard-*/*') if path.name != 'manifest.json')
  tokens = sum(int(records.predicted(what.sequences[i]).sum()) for i in range(len(what.sequences)))
  assert manifest['bytes_per_token'] == on_disk / tokens < 48
  for i, told in enumerate(entries(tmp_path / 'c', what)):
    mask = records.predicted(what.sequences[i])
    np.testing.assert_allclose(told['weights'][mask].sum(-1), 1, rtol=1e-5)


KILLED = """
import os, signal, sys
sys.path.insert(0, 'tests/distill')
from pathlib import Path
from test_cache import captured, capture
lines = []
def log(text):
  lines.append(text)
  if len(lines) == 4:  # the fourth shard is begun
    os.kill(os.getpid(), signal.SIGKILL)
capture.build(Path(sys.argv[2]), captured(Path(sys.argv[1])), {}, log, shard=2500)
"""


def test_a_killed_builder_is_gone_on_with(workdir, tmp_path):
  root = Path(__file__).parents[2]
  env = {**os.environ, 'PYTHONPATH': f'{root}:{root / "tests"}'}
  command = [sys.executable, '-c', KILLED, str(workdir), str(tmp_path / 'c')]
  assert subprocess.run(command, cwd=root, env=env).returncode == -signal.SIGKILL
  kept = {path: path.stat().st_ino for path in (tmp_path / 'c').glob('shard-*')}
  assert len(kept) == 3
  what = captured(workdir)
  capture.build(tmp_path / 'c', what, {}, quiet, shard=2500)
  assert all(path.stat().st_ino == inode for path, inode in kept.items())
  capture.build(tmp_path / 'again', what, {}, quiet)
  assert same(entries(tmp_path / 'c', what), entries(tmp_path / 'again', what))


def test_a_folder_of_something_else_is_left_alone(workdir, tmp_path):
  capture.build(tmp_path / 'c', captured(workdir), {}, quiet)
  with pytest.raises(ConfigError, match='c: holds a cache of another size; choose another folder'):
    capture.build(tmp_path / 'c', captured(workdir, Layout('sampled', 9, V, 'float16')), {}, quiet)
  (tmp_path / 'mine').mkdir()
  (tmp_path / 'mine' / 'thesis.tex').touch()
  with pytest.raises(ConfigError, match='mine: holds something else'):
    capture.build(tmp_path / 'mine', captured(workdir), {}, quiet)


def test_a_new_field_of_the_model_and_another_kernel_leave_a_cache_as_it_is(workdir):
  what = captured(workdir)
  wider = dataclasses.make_dataclass('Later', [('added', int, 0)], bases=(type(what.model.config),), frozen=True)

  def key(config):
    return dataclasses.replace(what, model=what.model._replace(config=config)).key

  assert key(wider(**vars(what.model.config))) == key(override(what.model.config, {'remat': 'full'})) == what.key
  assert key(wider(**vars(what.model.config), added=1)) != what.key
  assert key(override(what.model.config, {'rope_theta': 5e5})) != what.key


def test_another_process_may_begin_the_same_cache_at_the_same_moment(tmp_path, monkeypatch):
  folder, exists = tmp_path / 'c', Path.exists
  folder.mkdir()

  def late(path, **options):
    found = exists(path, **options)
    if path.name == capture.MANIFEST and not found:  # now the other one writes it
      with monkeypatch.context() as once:
        once.setattr(Path, 'exists', exists)
        capture.begin(folder, {'teacher': 't'})
    return found

  monkeypatch.setattr(Path, 'exists', late)
  capture.begin(folder, {'teacher': 't'})
  assert json.loads((folder / capture.MANIFEST).read_text())['key'] == {'teacher': 't'}


# ---------------------------------------------------------------------------------------------------- the command line


def run(*words):
  return cache.main(list(map(str, words)))


def test_the_command_line_says_where_it_is_and_what_it_takes(workdir, capsys):
  """By the arm's name, at the place where an arm with cache=auto would look for it."""
  assert run(f'--workdir={workdir}', '--teacher=large', '--k=4') == 0
  line = capsys.readouterr().out.strip().splitlines()[-1]
  folder = Path(line.rsplit(': ', 1)[-1])
  manifest = json.loads((folder / 'manifest.json').read_text())
  assert line.startswith(f'top_k k=4: {manifest["bytes_per_token"]:.1f} bytes a token')
  assert folder == capture.place(workdir / 'data', captured(workdir, Layout('top_k', 4, V, 'float16')))
  assert manifest['teacher'] == 'large'


@pytest.mark.parametrize(
  'words, message',
  [
    (['--teacher=nobody'], '--teacher=nobody: no such arm in'),
    (['--teacher=teacher', '--k=300'], '--k=300: allowed: 1..259, the tokens of the tokenizer'),
    (['--teacher=teacher', '--method=sampled', '--k=4'], '--k=4: has no effect without --method=top_k'),
    (['--teacher=teacher', '--draws=4'], '--draws=4: has no effect without --method=sampled'),
    (['--teacher=teacher', '--method=sampled', '--draws=300'], '--draws=300: allowed: 1..255'),
    (['--teacher=teacher', '--host=2', '--hosts=2'], '--host=2: allowed: 0..1'),
    (['--teacher=teacher', '--seed=-1'], '--seed=-1: must not be negative'),
    (['--teacher=teacher', '--data.seq_lne=3'], "seq_lne: unknown key 'seq_lne'; did you mean 'seq_len'?"),
    (['--teacher=teacher', '--data.sources=/no/such.txt'], 'no such file'),
    (['--teacher=teacher', '--data.tokenizer=sentencepiece'], 'was trained with another tokenizer'),
    (['--teacher=teacher', 'more'], 'unexpected: more'),
    ([], '--teacher: must be given'),
  ],
)
def test_what_cannot_be_meant_is_one_line(workdir, capsys, words, message):
  assert run(f'--workdir={workdir}', *words) == 1
  error = capsys.readouterr().err.strip().splitlines()[-1]
  assert error.startswith('error: ')
  assert message in error
