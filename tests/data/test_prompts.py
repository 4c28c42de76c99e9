"""Prompts: what a document has before a marker is read and never predicted, whatever the packing."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm_jax.config import ConfigError
from slm_jax.data import packing
from slm_jax.data.config import DataConfig
from slm_jax.data.dataset import open_data
from slm_jax.data.packing import Piece

PACK = {'split': packing.split, 'whole': packing.whole}


def opened(tmp_path, texts, train=(), **settings):
  for split, part in (('train', ['=7', *train]), ('valid', texts)):  # another one: what is held out is not trained on
    lines = ''.join(f'{{"text": "{text}"}}\n' for text in part)
    (tmp_path / f'{split}.jsonl').write_text(lines)
  config = DataConfig(sources=(str(tmp_path),), batch_size=1, **settings)
  return open_data(config, tmp_path / 'cache', print)


def rows(dataset):
  return list(dataset.valid_batches(1))


@pytest.mark.parametrize('packing', ['split', 'whole', 'single'])
def test_predicted_is_what_follows_the_first_marker_and_the_end(tmp_path, packing):
  texts = ['1+2=3=3', '=5', '40+2=42']
  dataset = opened(tmp_path, texts, packing=packing, prompt_end='=', seq_len=9)
  found = []
  for batch in rows(dataset):
    found += batch['targets'][0][batch['mask'][0] > 0].tolist()
  after = [text.partition('=')[2] for text in texts]
  expected = [[*dataset.tokenizer.encode(text), dataset.tokenizer.eos] for text in after]
  assert sorted(found) == sorted(sum(expected, []))
  assert dataset.valid.packed().bytes == sum(map(len, after))
  assert all(batch['segments'].max() < 100 for batch in rows(dataset))  # no flags


@pytest.mark.parametrize('pack', PACK)
@given(
  documents=st.lists(st.integers(2, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))), min_size=1),
  length=st.integers(1, 12),
)
def test_cut_anywhere_each_token_after_the_prompt_is_predicted_once(pack, documents, length):
  ends = np.cumsum([n for n, _ in documents])
  pieces = [Piece(np.arange(end - n, end) + 1, prompt) for (n, prompt), end in zip(documents, ends, strict=True)]
  found = []
  for record in PACK[pack](pieces, length, 0):
    found += record.tokens[1:][packing.mask(record.segments)].tolist()
  assert sorted(found) == [int(t) for piece in pieces for t in piece.tokens[max(piece.prompt, 1) :]]


def test_single_is_one_document_a_row_padded_on_the_right(tmp_path):
  texts = ['a=b', '=', 'd=efg']
  dataset = opened(tmp_path, texts, packing='single', seq_len=7, prompt_end='=')
  assert len(rows(dataset)) == 3
  for text, batch in zip(texts, rows(dataset), strict=True):
    n, prompt = len(text) + 1, text.index('=') + 1  # predictions, with those of the prompt
    assert batch['segments'][0].tolist() == [1] * (n + 1) + [0] * (6 - n)
    assert batch['mask'][0].tolist() == [0] * prompt + [1] * (n - prompt) + [0] * (7 - n)
  for parts in ((['=a', *texts], ()), (['=a'], ['=8', *texts])):
    with pytest.raises(ConfigError, match=r'document [45] has 7 tokens, data.seq_len=5 . 1 allowed'):
      opened(tmp_path, *parts, packing='single', seq_len=5, prompt_end='=')


@pytest.mark.parametrize(
  'end, message',
  [('==', "prompt_end='==': must be one token, and is 2"), ('|', "prompt_end='|': not a token of the document '=7'")],
)
def test_a_marker_must_be_a_token_of_every_document(tmp_path, end, message):
  with pytest.raises(ConfigError) as error:
    opened(tmp_path, ['1=2'], prompt_end=end)
  assert message in str(error.value)


def test_addition_is_a_source(tmp_path):
  config = DataConfig(sources=('addition',), documents=100, packing='single', prompt_end='=', seq_len=40, batch_size=4)
  dataset = open_data(config, tmp_path, print)
  batch = dataset.batch(0)
  assert (batch['mask'].argmax(1) == 8).all()  # <bos> and 7 characters; '=' is the input there
  assert len(dataset.valid) == 10
