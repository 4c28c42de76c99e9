"""What arms are evaluated on: the same text, whatever their tokens, their sequences and their packing are."""

import dataclasses
import json
import math

import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_jax.config import ConfigError
from slm_jax.data import packing, stories, valid
from slm_jax.data.config import DataConfig
from slm_jax.data.dataset import open_data
from slm_jax.data.records import Document
from slm_jax.data.tokenizer import Bytes, SentencePiece, train
from slm_jax.data.valid import LONG, Parts, parts_of, piece_of

CONFIG = DataConfig(documents=100, batch_size=4)
SHAPES = [  # that an arm may have
  {},
  {'seq_len': 17},
  {'seq_len': 2000, 'packing': 'whole'},
  {'seq_len': 700, 'packing': 'single'},
  {'tokenizer': 'sentencepiece', 'vocab_size': 350},
  {'tokenizer': 'sentencepiece', 'vocab_size': 500, 'seq_len': 33, 'packing': 'whole'},
]


@pytest.fixture(scope='module')
def opened(tmp_path_factory):
  cache = tmp_path_factory.mktemp('cache')
  return lambda **settings: open_data(dataclasses.replace(CONFIG, **settings), cache, print)


def predicted(dataset, n_bytes: int) -> tuple[int, int]:
  """(bytes of text, ends of documents) that an evaluation predicts."""
  size = ends = 0
  for batch in dataset.valid_batches(4, n_bytes):
    first = (batch['inputs'] == dataset.tokenizer.bos).astype(int)
    size += (dataset.tokenizer.text_bytes[first, batch['targets']] * batch['mask']).sum()
    ends += ((batch['targets'] == dataset.tokenizer.eos) * batch['mask']).sum()
  return int(size), int(ends)


@pytest.mark.parametrize('n_bytes', [0, 1, 1500])
def test_all_arms_predict_the_same_text(opened, n_bytes):
  datasets = [opened(**shape) for shape in SHAPES]
  found = [dataset.valid.packed(n_bytes) for dataset in datasets]
  assert len({(its.digest, its.bytes) for its in found}) == 1
  assert len({predicted(dataset, n_bytes) for dataset in datasets}) == 1
  assert predicted(datasets[0], n_bytes)[0] == found[0].bytes


def test_it_is_whole_documents_at_even_distances_that_hold_about_the_bytes_asked_for(opened):
  dataset = opened(documents=1000, seq_len=2000)
  all_texts = [part.text for part in dataset.valid]
  assert len(all_texts) == 100
  longest = max(map(len, all_texts))
  for wanted in (1, 2000, 9000, 20_000):
    its = dataset.valid.packed(wanted)
    texts = []
    for sequence in its.sequences:
      for segment in range(1, sequence[1].max() + 1):
        texts.append(dataset.tokenizer.decode(sequence[0][sequence[1] == segment]))
    assert abs(its.bytes - wanted) < longest + wanted / 10
    places = sorted(map(all_texts.index, texts))
    assert places == [i * 100 // len(texts) for i in range(len(texts))]
    assert its.bytes == sum(map(len, texts))
  assert dataset.valid.packed(10**9).digest == dataset.valid.packed().digest


def test_the_floor_is_that_of_precisely_the_texts_evaluated(opened):
  for shape in SHAPES:
    dataset = opened(**shape)
    n = len(dataset.valid)
    for wanted in (0, 1500):
      k = max(1, round(n * wanted / sum(len(part.text) for part in dataset.valid))) if wanted else n
      texts = [dataset.valid[i * n // k].text for i in range(k)]
      tokens = sum(len(dataset.tokenizer.encode(text)) + 1 for text in texts)
      nats = -sum(stories.log_prob(text) for text in texts)
      assert dataset.valid.packed(wanted).floor == pytest.approx(nats / tokens, rel=1e-12)


def test_there_is_no_floor_where_a_text_is_of_no_known_distribution(tmp_path, opened):
  (tmp_path / 'a.txt').write_text('some text that no grammar knows')
  mixed = opened(sources=('stories', str(tmp_path / 'a.txt')))
  assert mixed.valid.packed().floor is None


def test_other_text_is_another_evaluation(opened):
  found = [
    opened().valid.packed(0),
    opened().valid.packed(1500),
    opened(valid_fraction=0.2).valid.packed(0),
    opened(prompt_end='.').valid.packed(0),
  ]
  assert len({its.digest for its in found}) == 4


# ------------------------------------------------------------------------------------------------------ long documents


def foreign() -> SentencePiece:
  """A tokenizer that puts a space before every text, as that of Llama 2 does."""
  from sentencepiece import sentencepiece_model_pb2

  own = train([text for text, _ in stories.documents(200, 'foreign')], 400)
  proto = sentencepiece_model_pb2.ModelProto.FromString(own.serialize())
  proto.normalizer_spec.add_dummy_prefix = True
  found = SentencePiece(proto.SerializeToString())
  assert found.prefix == 1
  return found


TOKENIZERS = [Bytes(), foreign()]
texts = st.builds(
  lambda words, times: ' '.join(words) * times,
  st.lists(st.text(st.characters(exclude_categories=('Cs',)), max_size=12), min_size=1, max_size=8),
  st.integers(1, 4 * LONG // 50),
)


@settings(deadline=None, max_examples=30)
@given(text=texts)
def test_a_long_document_is_the_sum_of_its_parts_and_each_token_knows_the_one_before(text):
  parts = list(parts_of(Document(text, 1.0)))
  assert ''.join(part.text for part in parts) == text
  assert all(part.text or len(parts) == 1 for part in parts)
  assert all(len(part.text) <= LONG + LONG // 2 for part in parts)
  assert [part.ends for part in parts] == [False] * (len(parts) - 1) + [True]
  assert [part.nats for part in parts] == ([1.0] if len(parts) == 1 else [None] * len(parts))
  for a, b in zip(parts, parts[1:], strict=False):
    assert b.before
    assert a.text.endswith(b.before)
  for tokenizer in TOKENIZERS:
    pieces = [piece_of(part, CONFIG, tokenizer) for part in parts]
    assert sum(valid.bytes_of(piece, tokenizer) for piece in pieces) == len(text.encode())
    spelt = b''.join(tokenizer.spelling[token] for piece in pieces for token in piece.tokens[1:])
    assert spelt[len(spelt) - len(text.encode()) :] == text.encode()
    assert pieces[0].tokens[0] == tokenizer.bos
    assert all(tokenizer.bos not in piece.tokens for piece in pieces[1:])


def test_parts_end_before_white_space_so_that_words_stay_whole():
  text = ' '.join(f'word{i}' for i in range(10_000))
  parts = list(parts_of(Document(text)))
  assert len(parts) > 5
  assert all(part.text[0] == ' ' for part in parts[1:])
  assert len(list(parts_of(Document('x' * 10 * LONG)))) > 5  # and a text without any is cut all the same


def test_a_book_is_evaluated_in_some_of_its_parts(tmp_path):
  (tmp_path / 'a.txt').write_text(' '.join(f'word{i}' for i in range(100_000)))
  dataset = open_data(DataConfig(sources=(str(tmp_path / 'a.txt'),), valid_fraction=0.5), tmp_path, print)
  whole, some = dataset.valid.packed(), dataset.valid.packed(5 * LONG)
  assert whole.bytes == dataset.stores[0].manifest['splits']['valid']['bytes'] > 50 * LONG
  assert some.bytes == pytest.approx(5 * LONG, rel=0.1)


def test_a_document_with_a_prompt_stays_whole(tmp_path):
  text = 'question= ' + 'word ' * LONG
  for name in ('train', 'valid'):
    (tmp_path / f'{name}.jsonl').write_text(json.dumps({'text': name + text}))
  dataset = open_data(DataConfig(sources=(str(tmp_path),), prompt_end='='), tmp_path / 'cache', print)
  assert len(dataset.valid) == 1
  assert dataset.valid.packed(10).bytes == len(text) - len('question=')


# --------------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize('data', [b'not JSON', b'[1, 2, 3, 4, 5]', b'{"text": "a"}', b'[]', b'\xff'])
def test_a_damaged_record_is_named(tmp_path, data):
  writer = ArrayRecordWriter(str(tmp_path / 'valid.array_record'), 'group_size:1')
  writer.write(data)
  writer.close()
  with pytest.raises(ConfigError, match=r'valid.array_record: record 0 cannot be read'):
    Parts(tmp_path / 'valid.array_record')[0]


def test_tokens_and_bytes_of_the_training_text(opened):
  """What a token of the training text stands for, on average: `bytes` of a summary go by it."""
  dataset = opened(tokenizer='sentencepiece', vocab_size=350)
  n_bytes = tokens = 0
  for i in range(len(dataset.stores[0].train())):
    ids, segments = dataset.stores[0].train()[i]
    mask = packing.mask(segments)
    n_bytes += dataset.tokenizer.byte_lengths[ids[1:][mask]].sum()
    tokens += mask.sum()
  assert dataset.bytes_per_token == pytest.approx(n_bytes / tokens, rel=1e-9)
  assert math.isclose(opened().bytes_per_token, 1, rel_tol=0.01)
