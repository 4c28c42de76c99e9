"""From source strings to documents: formats, splits, policies for bad input, content hashes."""

import gzip
import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_jax.config import ConfigError
from slm_jax.data import sources, stories
from slm_jax.data.config import DataConfig
from slm_jax.data.records import Document, Report
from slm_jax.data.sources import Source

DATA = Path(__file__).parents[2] / '../shared/data'
needs_data = pytest.mark.skipif(not DATA.exists(), reason='the shared data sets are not here')


def read(path, **options) -> tuple[dict[str, list[str]], Report]:
  """{'train': texts, 'valid': texts} of one source, and the report."""
  config = DataConfig(sources=(str(path),), **options)
  report = Report(config.errors)
  texts: dict[str, list[str]] = {}
  for source in sources.open_sources(config):
    for split, document in sources.documents(source, config, report):
      texts.setdefault(split, []).append(document.text)
  return texts, report


def everything(path, **options) -> tuple[list[str], Report]:
  texts, report = read(path, **options)
  return [text for part in texts.values() for text in part], report


def write(path: Path, data: str | bytes) -> Path:
  data = data.encode() if isinstance(data, str) else data
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(gzip.compress(data) if path.suffix == '.gz' else data)
  return path


def left_out(path) -> list[str]:
  """Names of the files that are not read."""
  (source,) = sources.open_sources(DataConfig(sources=(str(path),)))
  return [Path(place.partition(' (')[0]).name for place in source.left_out]


def lines(*texts: str) -> str:
  return ''.join(json.dumps({'text': text}) + '\n' for text in texts)


# ------------------------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize('name', ['a.jsonl', 'a.json', 'a.ndjson', 'a.jsonl.gz'])
def test_a_line_is_a_document(tmp_path, name):
  texts = ['one', 'zwei ü', 'three\nlines\r\n', '<s> is text </s>', '\u2028']
  assert everything(write(tmp_path / name, lines(*texts)))[0] == texts


def test_a_text_file_is_a_document_byte_for_byte(tmp_path):
  texts = {'b.md': '# B\r\n', 'a.txt': '\ufeffä\n\n', 'sub/c.py': 'pass', 'd.txt.gz': 'packed', '.hidden.txt': 'no'}
  for name, text in texts.items():
    write(tmp_path / name, text)
  write(tmp_path / 'picture.png', b'\x89PNG')
  found, _ = everything(tmp_path)
  assert found == [texts[name] for name in ('a.txt', 'b.md', 'd.txt.gz', 'sub/c.py')]
  assert left_out(tmp_path) == ['picture.png']
  assert ''.join(everything(tmp_path / '**/*.py')[0]) == 'pass'


def test_parquet_rows_are_documents(tmp_path):
  pa = pytest.importorskip('pyarrow')
  import pyarrow.parquet as pq

  path = tmp_path / 'a.parquet'
  pq.write_table(pa.table({'body': ['one', None, '', 'four'], 'n': [1, 2, 3, 4]}), path)
  found, report = everything(path, text_field='body', errors='skip')
  assert found == ['one', 'four']
  assert report.places == [f"{path}:2: column 'body' is null, expected a string", f"{path}:3: column 'body' is empty"]
  with pytest.raises(ConfigError, match=r"no column data.text_field='text'; there is: body, n"):
    everything(path)
  with pytest.raises(ConfigError, match='broken.parquet: not a readable Parquet file'):
    everything(write(tmp_path / 'broken.parquet', b'PAR1 nonsense'))


KINDS = [
  'string',
  'large_string',
  'binary',
  'large_binary',
  'dictionary',
  'dictionary of large_string',
  'dictionary of binary',
]


def column(kind: str, values: list[bytes | None]):
  """An Arrow array of that type with these bytes, UTF-8 or not."""
  pa = pytest.importorskip('pyarrow')
  plain = kind.removeprefix('dictionary of ').replace('dictionary', 'string')
  if kind != plain:
    there = list(dict.fromkeys(value for value in values if value is not None))
    places = [None if value is None else there.index(value) for value in values]
    return pa.DictionaryArray.from_arrays(pa.array(places, pa.int32()), column(plain, there))
  raw = pa.array(values, pa.large_binary() if plain.startswith('large') else pa.binary())
  return raw if plain.endswith('binary') else raw.view(getattr(pa, plain)())


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('errors', ['strict', 'replace', 'skip'])
def test_text_of_a_table_that_is_not_utf_8_is_mended_skipped_or_told(tmp_path, kind, errors):
  """It was a traceback whatever was asked for."""
  pa = pytest.importorskip('pyarrow')
  import pyarrow.parquet as pq

  path = tmp_path / 'a.parquet'
  values = ['ä'.encode(), b'caf\xe9 au lait', 'ö'.encode(), b'']
  pq.write_table(pa.table({'n': [1, 2, 3, 4], 'text': column(kind, values)}), path)
  told = f"{path}:2: column 'text': not UTF-8 at byte offset 3 (0xe9)"
  if errors == 'strict':
    with pytest.raises(ConfigError) as error:
      everything(path)
    assert str(error.value) == f"{told}; data.errors='replace' or 'skip' go on"
    return
  if errors == 'replace':  # which does not allow an empty row
    values = values[:3]
    pq.write_table(pa.table({'n': [1, 2, 3], 'text': column(kind, values)}), path)
  found, report = everything(path, errors=errors)
  assert found == (['ä', 'caf\ufffd au lait', 'ö'] if errors == 'replace' else ['ä', 'ö'])
  assert report.places == [told, f"{path}:4: column 'text' is empty"][: report.count]
  assert report.count == (1 if errors == 'replace' else 2)


@pytest.mark.parametrize('kind', KINDS)
def test_a_missing_text_of_a_table_is_told(tmp_path, kind):
  pa = pytest.importorskip('pyarrow')
  import pyarrow.parquet as pq

  path = tmp_path / 'a.parquet'
  pq.write_table(pa.table({'text': column(kind, [b'one', None, b'three'])}), path)
  found, report = everything(path, errors='skip')
  assert found == ['one', 'three']
  assert report.places == [f"{path}:2: column 'text' is null, expected a string"]


# ------------------------------------------------------------------------------------------------------------ bad input

BAD_LINES = [
  (b'{"text": "cut', 'not JSON'),
  (b'[1, 2]', 'expected a JSON object, got list'),
  (b'{"body": "x"}', "no field 'text'; there is: 'body'"),
  (b'{"text": 3}', "field 'text' is int, expected a string"),
  (b'{"text": null}', "field 'text' is null, expected a string"),
  (b'{"text": ""}', "field 'text' is empty"),
  (b'', 'empty line'),
  (b'[' * 100_000, 'not JSON'),
  (b'{"text": "a\xffb"}', 'not UTF-8 at byte offset 11 (0xff)'),
  (b'{"text": "half \\ud83d pair"}', 'not UTF-8 at byte offset 5 (0xed)'),
]


@pytest.mark.parametrize('line, message', BAD_LINES)
def test_a_bad_line_is_an_error_with_file_and_line_or_is_counted(tmp_path, line, message):
  one, two, three = (lines(text).strip().encode() for text in ('one', 'two', 'three'))
  path = write(tmp_path / 'a.jsonl', b'\n'.join([one, line, two, line, three]) + b'\n')
  with pytest.raises(ConfigError) as caught:
    everything(path)
  assert str(caught.value).startswith(f'{path}:2: ')
  assert message in str(caught.value)
  assert '\n' not in str(caught.value)
  found, report = everything(path, errors='skip')
  assert found == ['one', 'two', 'three']
  assert report.count == 2
  assert [place.split(': ')[0] for place in report.places] == [f'{path}:2', f'{path}:4']


def test_replacement_mends_bytes_and_nothing_else(tmp_path):
  path = write(tmp_path / 'a.jsonl', b'{"text": "a\xffb"}\n{"text": "c"}\n')
  found, report = everything(path, errors='replace')
  assert found == ['a\ufffdb', 'c']
  assert report.count == 1
  assert f'{path}:1: not UTF-8' in report.places[0]
  with pytest.raises(ConfigError, match='a.jsonl:1: not JSON'):
    everything(write(tmp_path / 'a.jsonl', 'nonsense\n'), errors='replace')


def test_text_that_is_not_utf8_tells_the_byte(tmp_path):
  write(tmp_path / 'a.txt', 'fine')
  path = write(tmp_path / 'b.txt', 'ä'.encode() * 5 + b'\xe9 latin')
  write(tmp_path / 'c.txt', 'fine too')
  with pytest.raises(ConfigError, match=r'b.txt: not UTF-8 at byte offset 10 \(0xe9\)'):
    everything(tmp_path)
  found, report = everything(tmp_path, errors='skip')
  assert found == ['fine', 'fine too']
  assert (report.count, report.places[0].split(': ')[0]) == (1, str(path))
  assert everything(tmp_path, errors='replace')[0][1] == 'äääää\ufffd latin'


@pytest.mark.parametrize(
  'files, source, message',
  [
    ({}, 'storys', "data.sources='storys': no such file; did you mean 'stories'?"),
    ({}, 'missing.txt', 'no such file'),
    ({}, '*.txt', 'no such file'),
    ({'a.docx': b'x'}, 'a.docx', "cannot tell what a '.docx' file holds"),
    ({'d/a.docx': b'x'}, 'd', '1 files, but none that we can read'),
    ({'a.jsonl': b''}, 'a.jsonl', 'no documents'),
    ({'d/a.txt': b'', 'd/b.txt': b''}, 'd', 'no documents'),
    ({'a.txt': b'x'}, 'a.txt', 'too short to be split'),
    ({'d/train.txt': b'', 'd/valid.txt': b'x'}, 'd', 'no documents for the train split'),
    ({'d/train.txt': b'x', 'd/valid.txt': b''}, 'd', 'no documents for the valid split'),
  ],
)
def test_a_source_without_documents_is_an_error(tmp_path, monkeypatch, files, source, message):
  monkeypatch.chdir(tmp_path)
  for name, data in files.items():
    write(tmp_path / name, data)
  with pytest.raises(ConfigError) as caught:
    everything(source)
  assert message in str(caught.value)
  assert source in str(caught.value)


def test_a_gzip_file_cut_short_is_an_error(tmp_path):
  path = write(tmp_path / 'a.jsonl.gz', lines(*map(str, range(1000))))
  path.write_bytes(path.read_bytes()[:-20])
  with pytest.raises(ConfigError, match='a.jsonl.gz: cannot be read'):
    everything(path)


# --------------------------------------------------------------------------------------------------------------- splits


@settings(deadline=None)
@given(st.integers(2, 60), st.floats(0.01, 0.99), st.integers(0, 70))
def test_the_last_documents_are_the_valid_split(n, fraction, limit):
  texts = [str(i) for i in range(n)]
  source = Source('x', 'both', {'all': lambda report: map(Document, texts)}, '')
  config = DataConfig(valid_fraction=fraction, documents=limit if limit != 1 else 0)
  expected = texts[: config.documents or n]
  valid = max(1, round(len(expected) * fraction))
  if valid == len(expected):
    with pytest.raises(ConfigError, match='leave none to train on'):
      list(sources.documents(source, config, Report('strict')))
    return
  found = list(sources.documents(source, config, Report('strict')))
  assert [document.text for _, document in found] == expected
  assert [split for split, _ in found] == ['train'] * (len(expected) - valid) + ['valid'] * valid


@settings(deadline=None)
@given(st.text(min_size=2), st.floats(0.01, 0.99))
def test_a_single_document_is_cut_between_characters(text, fraction):
  source = Source('x', 'both', {'all': lambda report: iter([Document(text)])}, '')
  at = int(len(text) * (1 - fraction))
  if at == 0:
    return
  if text[:at].strip() == text[at:].strip() != '':
    with pytest.raises(ConfigError, match=r'all training documents \(1\) stand in a valid split too'):
      list(sources.documents(source, DataConfig(valid_fraction=fraction), Report('strict')))
    return
  found = list(sources.documents(source, DataConfig(valid_fraction=fraction), Report('strict')))
  assert [(split, d.text) for split, d in found] == [('train', text[:at]), ('valid', text[at:])]


def test_files_named_by_split_are_the_splits(tmp_path):
  names = [
    'train-00001.jsonl',
    'train-00000.jsonl',
    'validation.jsonl',
    'test_published.jsonl',
    'index.jsonl',
    'values.txt',
  ]
  for name in names:
    write(tmp_path / name, lines(name))
  texts, _ = read(tmp_path)
  assert texts == {'train': names[1::-1], 'valid': ['validation.jsonl']}
  assert left_out(tmp_path) == ['test_published.jsonl', 'index.jsonl', 'values.txt']
  assert read(tmp_path / '*.jsonl')[0] == texts
  (tmp_path / 'validation.jsonl').unlink()
  assert read(tmp_path)[0] == {'train': names[1:2], 'valid': names[0:1]}  # the last part of the training files


def test_empty_files_are_told_once_for_all_splits(tmp_path):
  for name, text in {'train1.txt': 'a', 'train2.txt': '', 'valid1.txt': 'b', 'valid2.txt': '', 'x.png': ''}.items():
    write(tmp_path / name, text)
  _, report = read(tmp_path)
  assert left_out(tmp_path) == ['x.png']
  assert [Path(p).name for p in report.empty] == ['train2.txt', 'valid2.txt']
  assert report.count == 0


def test_valid_sources_replace_a_sources_own(tmp_path):
  for name in ('a/train.txt', 'a/valid.txt', 'b.txt'):
    write(tmp_path / name, name)
  texts, _ = read(tmp_path / 'a', valid_sources=(str(tmp_path / 'b.txt'),))
  assert texts == {'train': ['a/train.txt'], 'valid': ['b.txt']}
  texts, _ = read(tmp_path / 'b.txt', valid_sources=(str(tmp_path / 'a'),))
  assert texts == {'train': ['b.txt'], 'valid': ['a/valid.txt']}


# --------------------------------------------------------------------------------------------------------- content hash


def test_the_content_hash_sees_content_and_not_paths(tmp_path):
  def hashed(*paths, **options):
    return sources.fingerprint(DataConfig(sources=tuple(map(str, paths)), **options))

  a = write(tmp_path / 'a/x.txt', 'one')
  same = write(tmp_path / 'b/y.txt', 'one')
  other = write(tmp_path / 'c/x.txt', 'two')
  as_lines = write(tmp_path / 'd/x.jsonl', 'one')
  write(tmp_path / 'e/train.txt', 'one')
  assert hashed(a) == hashed(same) == hashed(tmp_path / 'a')
  model = write(tmp_path / 'x.model', 'one')
  different = [
    hashed(a),
    hashed(other),
    hashed(as_lines),  # the same bytes, read otherwise
    hashed(tmp_path / 'e'),  # split otherwise
    hashed(a, other),
    hashed(other, a),
    hashed(a, valid_sources=(str(other),)),
    hashed('stories'),
    hashed('python_stdlib'),
    hashed(a, tokenizer='sentencepiece', tokenizer_file=str(model)),
  ]
  assert len(set(different)) == len(different)
  before = hashed(tmp_path / 'a')
  write(tmp_path / 'a/new.txt', 'three')
  assert hashed(tmp_path / 'a') != before


def test_the_first_record_of_every_split_and_file_is_tried(tmp_path):
  good, bad = lines('one', 'two'), json.dumps({'body': 'x'}) + '\n'

  def tried(**options) -> str:
    config = DataConfig(sources=(str(tmp_path / 'd'),), **options)
    assert sources.content_of(config) == sources.fingerprint(config)
    return sources.content_of(config)

  write(tmp_path / 'd/train.jsonl', good)
  write(tmp_path / 'd/valid.jsonl', good + bad)
  tried()  # the second record of a file is not looked at
  for name in ('valid1.jsonl', 'train2.jsonl'):
    path = write(tmp_path / 'd' / name, bad)
    with pytest.raises(ConfigError, match=f"{name}:1: no field 'text'; there is: 'body'"):
      tried()
    tried(errors='skip')
    path.unlink()
  path = write(tmp_path / 'd/train3.txt.gz', 'packed' * 100)
  path.write_bytes(path.read_bytes()[:-9])
  with pytest.raises(ConfigError, match='train3.txt.gz: cannot be read'):
    tried()


@needs_data
def test_the_content_hash_of_50_megabytes_is_quick():
  start = time.process_time()
  sources.fingerprint(DataConfig(sources=(str(DATA / 'books'),)))
  assert time.process_time() - start < 1


# ------------------------------------------------------------------------------------------------------------- embedded


def test_stories_know_their_probability_and_splits_share_no_text():
  config = DataConfig(documents=300)
  (source,) = sources.open_sources(config)
  found = list(sources.documents(source, config, Report('strict')))
  assert [split for split, _ in found] == ['train'] * 270 + ['valid'] * 30
  assert len({document.text for _, document in found}) == 300
  for _, document in found[::50]:
    assert stories.log_prob(document.text) == -document.nats


def test_the_standard_library_is_real_text_of_several_megabytes():
  texts, report = read('python_stdlib')
  sizes = {split: sum(len(text.encode()) for text in part) for split, part in texts.items()}
  assert sum(sizes.values()) > 4_000_000
  assert 0.02 < sizes['valid'] / sum(sizes.values()) < 0.3
  assert report.count == 0
  assert any(text == Path(json.__file__).read_text() for part in texts.values() for text in part)
  assert not [path for path in sources.stdlib_files() if {'test', 'site-packages'} & set(path.parts[-3:])]
  assert texts == read('python_stdlib')[0]


# ------------------------------------------------------------------------------------------------------------------ hub


def test_without_the_datasets_package_the_error_names_the_extra(monkeypatch):
  monkeypatch.setitem(sys.modules, 'datasets', None)
  with pytest.raises(
    ConfigError,
    match=r"data.sources='hf:x': needs the package datasets; pip install '\.\[hf\]' in the project's folder",
  ):
    everything('hf:x')


@pytest.mark.skipif(importlib.util.find_spec('datasets') is None, reason='the package datasets is not installed')
def test_a_hub_data_set_has_its_own_splits(tmp_path, monkeypatch):
  monkeypatch.setenv('HF_DATASETS_OFFLINE', '1')
  write(tmp_path / 'train.jsonl', lines('a', 'b'))
  write(tmp_path / 'validation.jsonl', lines('c'))
  write(tmp_path / 'test.jsonl', lines('d'))
  assert read(f'hf:{tmp_path}')[0] == {'train': ['a', 'b'], 'valid': ['c']}
  (source,) = sources.open_sources(DataConfig(sources=(f'hf:{tmp_path}',)))
  assert source.notices == [f'hf:{tmp_path}: 1 splits were left out: test']
  with pytest.raises(ConfigError, match="no column data.text_field='body'; there is: text"):
    everything(f'hf:{tmp_path}', text_field='body')
  with pytest.raises(ConfigError, match='hf:/nowhere/at/all'):
    everything('hf:/nowhere/at/all')


@pytest.mark.skipif(importlib.util.find_spec('datasets') is None, reason='the package datasets is not installed')
@pytest.mark.parametrize('kind', ['string', 'large_string'])
def test_text_of_a_hub_data_set_that_is_not_utf_8_is_told(tmp_path, monkeypatch, kind):
  pa = pytest.importorskip('pyarrow')
  import pyarrow.parquet as pq

  monkeypatch.setenv('HF_DATASETS_OFFLINE', '1')
  monkeypatch.setenv('HF_DATASETS_CACHE', str(tmp_path / 'cache'))
  (tmp_path / 'set').mkdir()
  values = [value for i in range(2000) for value in (b'fine %d' % i, b'caf\xe9', b'ok %d' % i)]
  pq.write_table(pa.table({'text': column(kind, values)}), tmp_path / 'set/train.parquet')
  name = f'hf:{tmp_path}/set'
  with pytest.raises(ConfigError, match=r"/train:2: column 'text': not UTF-8 at byte offset 3 \(0xe9\)"):
    everything(name)
  found, report = everything(name, errors='skip')
  assert found == [text for i in range(2000) for text in (f'fine {i}', f'ok {i}')]
  assert report.count == 2000
  assert report.places[-1].startswith(f'{name}/train:{3 * 999 + 2}: ')


# ------------------------------------------------------------------------------------------------------------ real data


@needs_data
def test_tinyshakespeare_is_split_as_published():
  text = (DATA / 'tinyshakespeare.txt').read_text()
  texts, _ = read(DATA / 'tinyshakespeare.txt')
  assert [len(part[0]) for part in texts.values()] == [1_003_854, 111_540]
  assert texts['train'][0] + texts['valid'][0] == text


@needs_data
def test_books_come_with_their_splits():
  texts, _ = read(DATA / 'books')
  assert {split: len(part) for split, part in texts.items()} == {'train': 2331, 'valid': 189}
  assert left_out(DATA / 'books') == ['test.jsonl.gz', 'index.jsonl']
