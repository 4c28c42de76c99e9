"""A text of a valid split is never trained on: by a source alone, by several together, and by the tokenizer."""

import json
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from slm_jax.config import ConfigError
from slm_jax.data import sources, stories
from slm_jax.data.config import DataConfig
from slm_jax.data.dataset import open_data
from slm_jax.data.records import Document, Report
from slm_jax.data.sources import HeldOut, Source

few = st.integers(0, 12).map(lambda i: f'text {i}' + ' ' * (i % 3))  # texts that are often equal
many = st.lists(few, min_size=1, max_size=40)


def source(name: str, role: str, read: dict[str, list[str]]) -> Source:
  readers = {split: lambda report, texts=texts: map(Document, texts) for split, texts in read.items()}
  return Source(name, role, readers, f'{name} {read}')


def split(found: list[Source], config: DataConfig) -> list[dict[str, list[str]]]:
  """{split: texts} of every source."""
  held_out, out = HeldOut(found, config), []
  for each in found:
    parts: dict[str, list[str]] = {}
    for part, document in sources.documents(each, config, Report('strict'), held_out):
      parts.setdefault(part, []).append(document.text)
    out.append(parts)
  return out


SHAPES = {
  'one that is cut': lambda a, b, c: [source('a', 'both', {'all': a})],
  'one with names': lambda a, b, c: [source('a', 'both', {'train': a, 'valid': b})],
  'two that are cut': lambda a, b, c: [source('a', 'both', {'all': a}), source('b', 'both', {'all': b})],
  'one of each': lambda a, b, c: [source('a', 'both', {'all': a}), source('b', 'both', {'train': b, 'valid': c})],
  'valid sources': lambda a, b, c: (
    [source('a', 'train', {'all': a}), source('b', 'train', {'train': b, 'valid': c})]
    + [source('c', 'valid', {'all': c})]
  ),
}


@pytest.mark.parametrize('shape', SHAPES)
@settings(deadline=None)
@given(a=many, b=many, c=many, fraction=st.sampled_from([0.05, 0.1, 0.3, 0.5]))
@example(a=[f'text {i}' for i in range(20)] * 10, b=['x'] * 3, c=['y'], fraction=0.1)
def test_no_text_of_a_valid_split_is_trained_on(shape, a, b, c, fraction):
  found, config = SHAPES[shape](a, b, c), DataConfig(valid_fraction=fraction)
  try:
    parts = split(found, config)
  except ConfigError:  # nothing would be left on one side
    return
  held_out = {text.strip() for part in parts for text in part.get('valid', [])}
  trained = [text for part in parts for text in part.get('train', [])]
  assert held_out
  assert trained
  assert not held_out & {text.strip() for text in trained}


@settings(deadline=None)
@given(texts=many, fraction=st.floats(0.01, 0.9))
def test_the_distinct_texts_are_split_and_all_others_stay_where_they_are(texts, fraction):
  distinct = {text.strip() for text in texts}
  valid = max(1, round(len(distinct) * fraction))
  found = [source('a', 'both', {'all': texts})]
  if len(texts) == 1:
    return
  if valid == len(distinct):
    with pytest.raises(ConfigError, match='leave none to train on'):
      split(found, DataConfig(valid_fraction=fraction))
    return
  (parts,) = split(found, DataConfig(valid_fraction=fraction))
  held_out = {text.strip() for text in parts['valid']}
  assert len(held_out) == valid
  assert parts['valid'] == texts[-len(parts['valid']) :]  # the end of the source, as long as it has to be
  before = texts[: -len(parts['valid'])]
  assert parts['train'] == [text for text in before if text.strip() not in held_out]


def test_a_source_that_repeats_a_text_alone_has_nothing_to_hold_out():
  with pytest.raises(ConfigError, match='x: 3 documents, of which 1 differ, with data.valid_fraction=0.1 leave none'):
    split([source('x', 'both', {'all': ['same', 'same ', '\nsame']})], DataConfig())


def test_a_source_that_another_one_evaluates_on_whole_is_an_error():
  found = [
    source('a', 'both', {'train': ['one', 'two'], 'valid': ['three']}),
    source('b', 'both', {'train': ['three']}),
  ]
  found[1] = source('b', 'both', {'train': ['three', 'three'], 'valid': ['four']})
  with pytest.raises(ConfigError, match=r'b: all training documents \(2\) stand in a valid split too'):
    split(found, DataConfig())


def test_a_copy_of_a_file_that_is_cut_is_not_trained_on():
  text = ' '.join(map(str, range(100)))
  parts = split([source('a', 'both', {'all': [text]}), source('b', 'both', {'all': [text, *'xyz']})], DataConfig())
  assert [part['train'] for part in parts] == [[text[: int(len(text) * 0.9)]], ['x', 'y']]


def test_splits_that_are_drawn_apart_share_no_text(monkeypatch):
  monkeypatch.setattr(stories, 'documents', lambda n, seed: ((f'story {(i * 7) % 50}', 1.0) for i in range(n)))
  config = DataConfig(documents=200)
  (parts,) = split(sources.open_sources(config), config)
  assert len(parts['valid']) == 20
  assert len(parts['train']) == 100  # of 180, without the 20 texts of 50 that are evaluated on
  assert not set(parts['train']) & set(parts['valid'])


# ---------------------------------------------------------------------------------------------------------- end to end


def write(path: Path, *texts: str) -> Path:
  path.parent.mkdir(exist_ok=True)
  path.write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))
  return path


def texts_of(dataset, part: str) -> set[str]:
  """All texts of a split, from the stores (one a sequence)."""
  if part == 'valid':
    return {its.text for its in dataset.valid}
  found = [store.train() for store in dataset.stores if store.has('train')]
  return {dataset.tokenizer.decode(records[i][0]) for records in found for i in range(len(records))}


def test_a_repeated_file_is_split_and_what_was_left_out_is_a_notice(tmp_path):
  texts = [f'text {i}' for i in range(20)]
  path = write(tmp_path / 'a.jsonl', *texts * 10)
  for _ in range(2):
    dataset = open_data(DataConfig(sources=(str(path),), packing='single'), tmp_path / 'cache', print)
    assert texts_of(dataset, 'train') == set(texts[:18])
    assert texts_of(dataset, 'valid') == set(texts[18:])
    (notice,) = dataset.notices
    said = "18 training documents were left out, since the valid split holds the same text: 'text 18'; 'text 19'; ..."
    assert notice.startswith(f'{path}: {said}; see ')


def test_a_source_is_packed_again_for_other_held_out_texts(tmp_path):
  a = write(tmp_path / 'a.jsonl', 'one', 'two', 'three', 'four')
  b = write(tmp_path / 'b.jsonl', 'four', 'five', 'six', 'seven')

  def opened(*names, **options):
    return open_data(DataConfig(sources=tuple(map(str, names)), packing='single', **options), tmp_path / 'cache', print)

  assert texts_of(opened(b), 'train') == {'four', 'five', 'six'}
  assert texts_of(opened(a, b), 'train') == {'one', 'two', 'three', 'five', 'six'}
  assert texts_of(opened(b, a), 'train') == {'one', 'two', 'three', 'five', 'six'}
  assert texts_of(opened(b, valid_sources=(str(a),)), 'train') == {'five', 'six', 'seven'}
  assert texts_of(opened(b), 'train') == {'four', 'five', 'six'}


def test_the_vocabulary_is_not_learnt_from_held_out_texts(tmp_path):
  words = ' '.join(text for text, _ in stories.documents(50, 'vocabulary'))
  a = write(tmp_path / 'a.jsonl', words, 'the end', ' xyzzy' * 2000)
  b = write(tmp_path / 'b.jsonl', ' xyzzy' * 2000, words + words, 'the very end')
  options = {'tokenizer': 'sentencepiece', 'vocab_size': 400}
  dataset = open_data(DataConfig(sources=(str(a), str(b)), **options), tmp_path / 'cache', print)
  assert not any(b'xyz' in piece for piece in dataset.tokenizer.spelling)
  alone = open_data(DataConfig(sources=(str(b),), **options), tmp_path / 'cache', print)
  assert any(b'xyz' in piece for piece in alone.tokenizer.spelling)
