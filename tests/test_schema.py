"""Whether JSON is what a type hint says: by examples, and against values that are made from the hint."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple, Required, TypedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm_jax import schema
from slm_jax.files import CHECKSUM, checksum, parse_json, read_json, sealed, write_json


class Git(TypedDict):
  commit: str | None


class Run(TypedDict, total=False):
  status: Required[Literal['done', 'failed']]
  devices: Annotated[int, '[1, 2^31)']
  summary: dict[str, float]
  git: Git
  tags: list[str]


class Experiment(NamedTuple):
  name: str
  latest: tuple[str, ...] = ()
  arms: Mapping[str, Mapping[str, Any]] = {}


GOOD = {'status': 'done', 'devices': 1, 'summary': {'loss': 1.5}, 'git': {'commit': None}, 'tags': ['a'], 'more': 3}


@pytest.mark.parametrize(
  'change, words',
  [
    ({}, ''),
    ({'summary': {'loss': 2}}, ''),
    ({'status': 'gone'}, "status is 'gone', expected 'done' or 'failed'"),
    ({'status': ['done']}, "status is a list, expected 'done' or 'failed'"),
    ({'devices': 0}, 'devices=0: must be positive'),
    ({'devices': 1.0}, 'devices is 1.0, expected an integer'),
    ({'devices': True}, 'devices is true or false, expected an integer'),
    ({'summary': None}, 'summary is null, expected an object'),
    ({'summary': {'loss': '1.5'}}, "summary.loss is '1.5', expected a number"),
    ({'summary': {'loss': float('inf')}}, 'summary.loss is inf, expected a number'),
    ({'summary': {'loss': 10**400}}, 'expected a number'),
    ({'git': {}}, 'git.commit is missing'),
    ({'git': {'commit': 3}}, 'git.commit is 3, expected a string'),
    ({'tags': 'a'}, "tags is 'a', expected a list"),
    ({'tags': ['a', 3]}, 'tags[1] is 3, expected a string'),
  ],
)
def test_what_is_wrong_is_said_with_its_place(change, words):
  found = schema.fault({**GOOD, **change}, Run)
  assert words in found
  assert bool(words) == bool(found)


def test_required_keys_and_the_whole_value():
  assert schema.fault({}, Run) == 'status is missing'
  assert schema.fault([], Run) == 'it is a list, expected an object'
  assert schema.fault({'name': 'x', 'latest': ['a'], 'arms': {'a': {'z': 1}}}, Experiment) == ''
  assert schema.fault({'latest': [1]}, Experiment) == 'latest[0] is 1, expected a string'
  assert schema.fault({'arms': {'a': 1}}, Experiment) == 'arms.a is 1, expected an object'


JSON = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
  lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@given(JSON, st.sampled_from([Run, Experiment, list[str], dict[str, float], float | None, Any, int, dict]))
def test_any_value_gets_an_answer_of_one_line(value, hint):
  found = schema.fault(value, hint)
  assert isinstance(found, str)
  assert '\n' not in found
  assert hint is not Any or found == ''


# ----------------------------------------------------------------------------------------------------- files


OBJECTS = st.dictionaries(st.text(), st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text(), max_size=5)


@given(OBJECTS)
def test_an_object_is_read_as_it_was_written(tmp_path_factory, value):
  value.pop(CHECKSUM, None)
  path = tmp_path_factory.mktemp('json') / 'x.json'
  write_json(path, value)
  assert read_json(path) == (value, '')
  assert json.loads(path.read_text())[CHECKSUM] == checksum(value)


def test_keys_that_are_numbers_and_tuples_are_what_json_makes_of_them(tmp_path):
  write_json(tmp_path / 'x.json', {10: (1, 2), 9: {'a': ('b',)}})
  assert read_json(tmp_path / 'x.json') == ({'10': [1, 2], '9': {'a': ['b']}}, '')


@given(st.data())
def test_a_flipped_bit_is_found(tmp_path_factory, data):
  path = tmp_path_factory.mktemp('json') / 'x.json'
  written = {'summary': {'loss': 3.2410, 'tokens': 1000, 'source': 'RAPL'}, 'status': 'done', 'seeds': [1, 2]}
  write_json(path, written)
  raw = bytearray(path.read_bytes())
  bit = data.draw(st.integers(0, 8 * len(raw) - 1))
  raw[bit // 8] ^= 1 << bit % 8
  path.write_bytes(raw)
  value, fault = read_json(path)
  # Another white space changes nothing; and a checksum under another key is none, beside numbers as they were.
  assert value in (None, written) or CHECKSUM not in json.loads(path.read_text())
  assert bool(fault) == (value is None)
  if value is not None:
    assert {name: value[name] for name in written} == written


@pytest.mark.parametrize(
  'raw, words',
  [
    (b'', 'not JSON'),
    (b'{"a": 1', 'not JSON'),
    (b'\xff', 'not UTF-8 at byte offset 0'),
    (b'[' * 10**5, 'not JSON'),
    (b'{"a": NaN}', 'NaN is no number'),
    (b'{"a": ' + b'9' * 5000 + b'}', 'not JSON'),
    (b'[1]', 'it is a list, expected an object'),
    (json.dumps({'a': 1, CHECKSUM: '00000000'}).encode(), 'its checksum is wrong'),
    (json.dumps({'a': 1, CHECKSUM: None}).encode(), 'its checksum is wrong'),
  ],
)
def test_what_cannot_be_read_is_said(tmp_path, raw, words):
  (tmp_path / 'x.json').write_bytes(raw)
  value, fault = read_json(tmp_path / 'x.json')
  assert value is None
  assert words in fault
  assert read_json(tmp_path / 'none.json') == (None, '')
  assert 'Is a directory' in read_json(tmp_path)[1]


def test_an_object_without_a_checksum_is_of_an_earlier_version():
  assert parse_json('{"loss": 3.241}') == ({'loss': 3.241}, '')
  assert parse_json(json.dumps(sealed({'loss': 3.241})).replace('3.241', '2.241'))[0] is None
