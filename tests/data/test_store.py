"""Stores are whole and undamaged, or not there: whatever is cut, flipped, filled up or killed."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from slm_jax.config import ConfigError
from slm_jax.data import folder, packing, sources
from slm_jax.data.config import DataConfig
from slm_jax.data.records import Report
from slm_jax.data.store import open_store
from slm_jax.data.tokenizer import Bytes

CONFIG = DataConfig(documents=200, seq_len=64)


def opened(cache: Path, config: DataConfig = CONFIG):
  said: list[str] = []
  (source,) = sources.open_sources(config)
  return open_store(source, config, Bytes(), cache, said.append), said


def content(store) -> list:
  return [*(record.tolist() for record in store.train()), *store.valid()[0]]


def never(path: Path):
  raise AssertionError('is not to be built')


def test_a_store_holds_the_text(tmp_path):
  store, said = opened(tmp_path)
  tokenizer = Bytes()
  (source,) = sources.open_sources(CONFIG)
  found = list(sources.documents(source, CONFIG, Report('strict')))
  texts = {split: [document.text for its, document in found if its == split] for split in ('train', 'valid')}
  records, facts = store.train(), store.manifest['splits']['train']
  tokens = np.stack([records[i][0] for i in range(len(records))])
  segments = np.stack([records[i][1] for i in range(len(records))])
  mask = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
  assert tokenizer.decode(tokens[:, 1:][mask]) == ''.join(texts['train'])
  assert facts['tokens'] == facts['bytes'] + 2 * facts['documents']
  assert facts['predicted'] == mask.sum() == facts['bytes'] + facts['documents']
  assert facts['records'] == len(records)
  assert facts['padding'] == (segments == 0).mean()
  parts, size = store.valid()
  assert [part.text for part in parts] == texts['valid']
  assert size == store.manifest['splits']['valid']['bytes']
  for split, facts in store.manifest['splits'].items():
    assert facts['documents'] == len(texts[split])
    assert facts['bytes'] == sum(len(text.encode()) for text in texts[split])
  assert said == []


def test_a_record_of_more_documents_than_16_bits_count_is_stored_whole(tmp_path):
  n = 70_000
  path = tmp_path / 'a.jsonl'
  path.write_text('{"text": "a"}\n' * n + '{"text": "b"}\n')
  store, _ = opened(tmp_path / 'cache', DataConfig(sources=(str(path),), seq_len=3 * n - 1))
  (tokens, segments) = store.train()[0]
  assert packing.mask(segments).sum() == store.manifest['splits']['train']['predicted'] == 2 * n
  assert Bytes().decode(tokens) == 'a' * n


def test_a_store_is_written_once_and_the_same_everywhere(tmp_path, monkeypatch):
  first, _ = opened(tmp_path / 'a')
  other, _ = opened(tmp_path / 'b')
  assert first.manifest == other.manifest  # which holds the hashes of all files
  monkeypatch.setattr('slm_jax.data.store._build', never)
  again, said = opened(tmp_path / 'a')
  assert again.manifest == first.manifest
  assert said == []


@pytest.mark.parametrize(
  'change',
  [
    {'seq_len': 65},
    {'packing': 'whole'},
    {'documents': 201},
    {'valid_fraction': 0.2},
    {'errors': 'skip'},
    {'text_field': 'body'},
  ],
)
def test_what_matters_to_the_content_has_a_store_of_its_own(tmp_path, change):
  store, _ = opened(tmp_path)
  other, _ = opened(tmp_path, DataConfig(**{'documents': 200, 'seq_len': 64, **change}))
  assert other.path != store.path


def cut_short(path: Path):
  os.truncate(path / 'train.array_record', (path / 'train.array_record').stat().st_size // 2)


def flip_a_bit(path: Path):
  data = bytearray((path / 'valid.array_record').read_bytes())
  data[len(data) // 2] ^= 1
  (path / 'valid.array_record').write_bytes(data)


DAMAGE = {
  'cut short': (cut_short, 'train.array_record is'),
  'a flipped bit': (flip_a_bit, r'valid.array_record was changed \(SHA-256 differs\)'),
  'a missing file': (lambda path: (path / 'train.array_record').unlink(), 'train.array_record is missing'),
  'no manifest': (lambda path: (path / 'manifest.json').unlink(), 'manifest.json is missing'),
  'half a manifest': (lambda path: os.truncate(path / 'manifest.json', 100), 'manifest.json cannot be read'),
  'another manifest': (lambda path: (path / 'manifest.json').write_text('[]'), 'manifest.json cannot be read'),
}


@pytest.mark.parametrize('name', DAMAGE)
def test_a_damaged_store_is_built_again_and_that_is_said(tmp_path, name):
  damage, message = DAMAGE[name]
  store, _ = opened(tmp_path)
  before = content(store)
  damage(store.path)
  again, said = opened(tmp_path)
  assert content(again) == before
  assert len(said) == 1
  assert str(store.path) in said[0]
  assert re.search(message + '.*it is built again', said[0])
  for store in (again, opened(tmp_path)[0]):  # and from then on
    (notice,) = store.notices
    assert re.search(rf'stories: {store.path} was damaged \({message}.*\), and built again', notice)
  assert [p.name for p in tmp_path.iterdir()] == [store.path.name]  # nothing of the damaged one is left


def test_a_record_damaged_while_it_is_used_is_named(tmp_path):
  store, _ = opened(tmp_path)
  records = store.train()
  path = store.path / 'train.array_record'
  data = bytearray(path.read_bytes())
  half = len(data) // 2
  data[half : half + 4000] = bytes(b ^ 255 for b in data[half : half + 4000])
  path.write_bytes(data)
  with pytest.raises(ConfigError, match=r'train.array_record: record \d+ cannot be read'):
    list(records)
  writer = ArrayRecordWriter(str(path), 'group_size:1')
  writer.write(b'too short')
  writer.close()
  with pytest.raises(ConfigError, match=r'record 0 has 9 bytes, expected 390'):
    store.train()[0]


@pytest.mark.parametrize('how', ['python', 'array_record'])
@pytest.mark.skipif(not Path('/dev/full').exists(), reason='needs /dev/full')
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, how):
  def build(path: Path):
    (path / 'data').symlink_to('/dev/full')
    if how == 'python':
      with open(path / 'data', 'w') as file:
        file.write('x' * 10**6)
    else:
      writer = ArrayRecordWriter(str(path / 'data'), 'group_size:1')
      writer.write(b'x' * 10**6)
      writer.close()
    return {}

  with pytest.raises(ConfigError, match='store: disk full'):
    folder.open_or_build(tmp_path / 'store', build, print)
  assert list(tmp_path.iterdir()) == []


def test_other_errors_pass_through_and_leave_nothing(tmp_path):
  def build(path: Path):
    (path / 'data').write_text('half')
    raise RuntimeError('boom')

  with pytest.raises(RuntimeError, match='boom'):
    folder.open_or_build(tmp_path / 'store', build, print)
  assert list(tmp_path.iterdir()) == []


def test_a_faster_builder_wins(tmp_path):
  place = tmp_path / 'store'

  def fast(path: Path):
    (path / 'data').write_text('same')
    return {'by': 'fast'}

  def slow(path: Path):
    (path / 'data').write_text('same')
    folder.open_or_build(place, fast, print)
    return {'by': 'slow'}

  assert folder.open_or_build(place, slow, print)['by'] == 'fast'
  assert [p.name for p in tmp_path.iterdir()] == ['store']


def test_a_builder_replaces_what_was_damaged_meanwhile(tmp_path):
  place = tmp_path / 'store'

  def build(path: Path):
    (path / 'data').write_text('good')
    place.mkdir(exist_ok=True)
    (place / 'manifest.json').write_text('{"files": {"data": {}}}')
    return {}

  folder.open_or_build(place, build, print)
  assert (place / 'data').read_text() == 'good'
  assert [p.name for p in tmp_path.iterdir()] == ['store']


SCRIPT = """
import sys
from pathlib import Path
from slm_jax.data import sources
from slm_jax.data.config import DataConfig
from slm_jax.data.store import open_store
from slm_jax.data.tokenizer import Bytes
config = DataConfig(documents=int(sys.argv[2]), seq_len=64)
print('ready', flush=True)
sys.stdin.readline()
store = open_store(*sources.open_sources(config), config, Bytes(), Path(sys.argv[1]), print)
assert not {'jax', 'grain'} & set(sys.modules), 'a store is read without jax'
print(store.train()[0].sum())
"""


def builder(cache: Path, documents: int = 200) -> subprocess.Popen:
  """Another process that waits for a line, and then opens a store."""
  root = Path(__file__).parents[2]
  process = subprocess.Popen(
    [sys.executable, '-c', SCRIPT, cache, str(documents)],
    cwd=root,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == 'ready\n'
  return process


def test_builders_at_the_same_time_do_not_clash(tmp_path):
  processes = [builder(tmp_path) for _ in range(3)]
  for process in processes:
    process.stdin.write('\n')
    process.stdin.flush()
  said = [process.communicate(timeout=60)[0] for process in processes]
  assert [process.returncode for process in processes] == [0, 0, 0]
  assert len(set(said)) == 1
  assert len(list(tmp_path.iterdir())) == 1


def test_a_killed_builder_leaves_nothing_that_is_used(tmp_path):
  whole, _ = opened(tmp_path / 'whole', DataConfig(documents=4000, seq_len=64))
  rng = random.Random(0)
  interrupted = 0
  for _ in range(5):
    process = builder(tmp_path / 'cut', 4000)
    process.stdin.write('\n')
    process.stdin.flush()
    time.sleep(rng.uniform(0.02, 0.5))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    stores = [p for p in (tmp_path / 'cut').glob('*') if not p.name.startswith('.')]
    interrupted += not stores
    assert all(folder.damage(p) is None for p in stores)
  assert interrupted
  store, said = opened(tmp_path / 'cut', DataConfig(documents=4000, seq_len=64))
  assert said == []
  assert store.manifest == whole.manifest
  assert [p.name for p in (tmp_path / 'cut').iterdir()] == [store.path.name]  # the dead builders' files are gone too


def test_bad_records_are_a_notice_at_each_opening_and_kept_in_the_manifest(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_text('{"text": "one"}\nnonsense\n{"text": "two"}\n{"text": "three"}\n')
  config = DataConfig(sources=(str(path),), errors='skip', seq_len=8)
  for _ in range(2):
    store, _ = opened(tmp_path / 'cache', config)
    (notice,) = store.notices
    assert notice.startswith(f'{path}: 1 bad records were skipped or mended: {path}:2: not JSON')
  manifest = json.loads((store.path / 'manifest.json').read_text())
  assert manifest['bad']['count'] == 1
  assert manifest['bad']['places'][0].startswith(f'{path}:2: not JSON')


def test_large_vocabularies_are_stored_whole(tmp_path):
  class Wide(Bytes):
    vocab_size = 100_000

    def __init__(self):
      super().__init__()
      self.spelling = [b'x'] * self.vocab_size

    def encode(self, text, inside=False):
      return [70_000 + b for b in text.encode()]

  (source,) = sources.open_sources(CONFIG)
  store = open_store(source, CONFIG, Wide(), tmp_path, print)
  assert store.train()[0][0].max() > 70_000
