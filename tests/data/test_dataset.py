"""From a configuration to batches, end to end."""

import math
from pathlib import Path

import numpy as np
import pytest

from slm_jax.config import ConfigError
from slm_jax.data import sources, stories
from slm_jax.data.config import DataConfig
from slm_jax.data.dataset import open_data

DATA = Path(__file__).parents[2] / '../shared/data'
needs_data = pytest.mark.skipif(not DATA.exists(), reason='the shared data sets are not here')


def texts(dataset, found) -> list[str]:
  """The documents that stand whole in these sequences."""
  out = []
  for sequence in found:
    for segment in range(1, int(sequence[1].max()) + 1):
      tokens = sequence[0][sequence[1] == segment]
      if tokens[0] == dataset.tokenizer.bos and tokens[-1] == dataset.tokenizer.eos:
        out.append(dataset.tokenizer.decode(tokens))
  return out


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  config = DataConfig(documents=300, tokenizer='sentencepiece', packing='whole', seq_len=300, batch_size=8)
  return open_data(config, tmp_path_factory.mktemp('cache'), print)


def test_batches_are_the_training_text_and_a_function_of_the_step(whole, tmp_path):
  again = open_data(whole.config, tmp_path, print)  # another machine
  for step in (0, 3, 50):
    a, b = whole.batch(step), again.batch(step)
    assert all(np.array_equal(a[name], b[name]) for name in a)
  with whole.batches(3) as ahead:
    assert np.array_equal(next(ahead)['inputs'], whole.batch(3)['inputs'])
  train = {text for s in (whole.train[i] for i in range(len(whole.stores[0].train()))) for text in texts(whole, [s])}
  valid = {part.text for part in whole.valid}
  assert (len(train), len(valid)) == (270, 30)
  assert not train & valid


def test_hosts_have_their_rows(whole):
  parts = [open_data(whole.config, whole.stores[0].path.parent, print, host, 4) for host in range(4)]
  assert np.array_equal(np.concatenate([part.batch(5)['targets'] for part in parts]), whole.batch(5)['targets'])
  with pytest.raises(ConfigError, match='data.batch_size=8: not divisible among 3 hosts'):
    open_data(whole.config, whole.stores[0].path.parent, print, 0, 3)


def write_pair(folder: Path, train: str, valid: str) -> Path:
  folder.mkdir(exist_ok=True)
  (folder / 'train.txt').write_text(train)
  (folder / 'valid.txt').write_text(valid)
  return folder


def test_the_vocabulary_is_learnt_from_the_training_split_alone(tmp_path):
  text = ' '.join(text for text, _ in stories.documents(50, 'vocabulary'))
  options = {'tokenizer': 'sentencepiece', 'vocab_size': 400}
  made = [
    open_data(DataConfig(sources=(str(write_pair(tmp_path / str(i), *pair)),), **options), tmp_path / 'cache', print)
    for i, pair in enumerate([(text, 'one'), (text, ' zebra' * 50), (text + ' zebra' * 50, 'one')])
  ]
  prints = [dataset.tokenizer.fingerprint for dataset in made]
  assert prints[0] == prints[1] != prints[2]


def test_a_tokenizer_file_is_used_as_it_is(whole, tmp_path):
  (tmp_path / 'my.model').write_bytes(whole.tokenizer.serialize())
  config = DataConfig(documents=20, tokenizer='sentencepiece', tokenizer_file=str(tmp_path / 'my.model'))
  assert open_data(config, tmp_path, print).tokenizer.fingerprint == whole.tokenizer.fingerprint


def test_a_mixture_has_the_shares_asked_for(tmp_path):
  (tmp_path / 'a.txt').write_text('aaaa' * 2000)
  (tmp_path / 'b.txt').write_text('bbbb' * 500)
  config = DataConfig(sources=(str(tmp_path / 'a.txt'), str(tmp_path / 'b.txt')), weights=(1.0, 3.0), seq_len=16)
  dataset = open_data(config, tmp_path, print)
  letters = np.concatenate([dataset.batch(step)['targets'][:, 4] for step in range(30)])
  assert np.mean(letters == dataset.tokenizer.encode('b')[0]) == pytest.approx(0.75, abs=0.02)
  by_size = open_data(DataConfig(sources=config.sources, seq_len=16), tmp_path, print)
  letters = np.concatenate([by_size.batch(step)['targets'][:, 4] for step in range(30)])
  assert np.mean(letters == dataset.tokenizer.encode('b')[0]) == pytest.approx(0.2, abs=0.05)


def test_files_that_changed_since_the_launch_are_an_error(tmp_path):
  path = tmp_path / 'a.txt'
  path.write_text('before ' * 10)
  content = sources.fingerprint(DataConfig(sources=(str(path),)))
  config = DataConfig(sources=(str(path),), content=content)
  open_data(config, tmp_path, print)
  path.write_text('after ' * 10)
  with pytest.raises(ConfigError, match=f"data.content='{content}': the files now hold .* they changed"):
    open_data(config, tmp_path, print)


def test_text_that_spells_special_tokens_is_text(tmp_path):
  text = 'A <s> and a </s> and <unk> and <0x0A>, ▁ too. ' * 20
  (tmp_path / 'a.txt').write_text(text)
  for options in ({}, {'tokenizer': 'sentencepiece', 'vocab_size': 275}):
    config = DataConfig(sources=(str(tmp_path / 'a.txt'),), packing='whole', seq_len=1200, **options)
    dataset = open_data(config, tmp_path, print)
    found = texts(dataset, [dataset.train[0]]) + texts(dataset, dataset.valid.packed().sequences)
    assert ''.join(found) == text


@needs_data
def test_books_are_read_packed_and_compressed(tmp_path):
  config = DataConfig(
    sources=(str(DATA / 'books'),), documents=150, tokenizer='sentencepiece', vocab_size=1024, seq_len=256, batch_size=8
  )
  dataset = open_data(config, tmp_path, print)
  facts = dataset.stores[0].manifest['splits']
  assert (facts['train']['documents'], facts['valid']['documents']) == (150, 150)
  assert facts['train']['padding'] < 0.01
  assert 2.5 < dataset.bytes_per_token < 4
  assert dataset.batch(0)['mask'].mean() > 0.9
  text = dataset.valid[0].text
  assert sum(c.isalpha() or c.isspace() for c in text) > 0.9 * len(text)


@needs_data
def test_tinyshakespeare_bytes_are_its_characters(tmp_path):
  config = DataConfig(sources=(str(DATA / 'tinyshakespeare.txt'),), seq_len=64)
  dataset = open_data(config, tmp_path, print)
  facts = dataset.stores[0].manifest['splits']
  assert (facts['train']['bytes'], facts['valid']['bytes']) == (1_003_854, 111_540)
  assert math.isclose(dataset.bytes_per_token, 1, rel_tol=1e-4)
