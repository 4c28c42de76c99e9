"""Every number of a configuration has a range, and what lies outside is refused before anything is written."""

import dataclasses
import importlib
import math
import pkgutil
import typing

import jax
import numpy as np
import pytest
from fakes import experiment
from hypothesis import given
from hypothesis import strategies as st

import slm_jax
from launch import cli
from slm_jax import ranges
from slm_jax.config import ConfigError, check, override
from slm_jax.distill.logits import Distill
from slm_jax.experiment import Config
from slm_jax.prune.transform import Prune
from slm_jax.step import TransformConfig

FAR = ('1e300', '-1e300', '4294967296', '-1')  # as a command line gives them


def sections():
  """Every section that a configuration can have, of the whole package."""
  for module in pkgutil.walk_packages(slm_jax.__path__, 'slm_jax.'):
    importlib.import_module(module.name)
  found, waiting = [], [Config, *all_below(TransformConfig)]
  while waiting:
    section = waiting.pop()
    if section.__module__.startswith('slm_jax.'):  # not one of another test
      found.append(section)
    waiting += [hint for hint in typing.get_type_hints(section).values() if dataclasses.is_dataclass(hint)]
  return found


def all_below(cls):
  return [each for below in cls.__subclasses__() for each in (below, *all_below(below))]


def numbers(section):
  """`(name, type, range or None)` of the fields of a section that hold numbers."""
  hints = typing.get_type_hints(section)
  for field in dataclasses.fields(section):
    kinds = {*typing.get_args(hints[field.name]), hints[field.name]} & {int, float}
    if kinds:
      yield field.name, kinds.pop(), field.metadata.get('within')


ALL = [(section, *number) for section in sections() for number in numbers(section)]


def test_every_number_of_every_section_has_a_range():
  assert len(ALL) > 80
  assert {section.__name__ for section, *_ in ALL} >= {'Config', 'RunConfig', 'EvalConfig', 'OneShot', 'Prune', 'L0'}
  assert [f'{section.__name__}.{name}' for section, name, _, within in ALL if within is None] == []


@pytest.mark.parametrize('section, name, kind, within', ALL, ids=lambda x: getattr(x, '__name__', x))
def test_the_ends_of_a_range_are_numbers_that_programs_can_hold(section, name, kind, within):
  assert within.high <= (2**32 if kind is int else ranges.LARGEST)
  assert within.high < 2**32 or not within.has_high or kind is float
  assert kind is float or name in ('seed',) or within.fault(2**31)
  default = next(field.default for field in dataclasses.fields(section) if field.name == name)
  assert not any(map(within.fault, default if isinstance(default, tuple) else (default,)))


# -------------------------------------------------------------------------------------------- what a text means

ENDS = st.sampled_from([-2, -1, 0, 1, 2, 5])


@given(st.sampled_from('[('), ENDS, ENDS, st.sampled_from(')]'), st.none() | ENDS, st.floats(-3, 6) | ENDS)
def test_a_text_means_the_interval_of_mathematics(opening, low, high, closing, besides, value):
  text = f'{opening}{low}, {high}{closing}' + ('' if besides is None else f' or {besides}')
  if low >= high:
    with pytest.raises(ValueError, match='is empty'):
      ranges.parse(text)
    return
  inside = (value >= low if opening == '[' else value > low) and (value <= high if closing == ']' else value < high)
  tiny = isinstance(value, float) and 0 < abs(value) < 2.0**-126
  assert (ranges.parse(text).fault(value) == '') == ((inside and not tiny) or value == besides)


@pytest.mark.parametrize('text', ['', '0, 1', '[0,1)', '[0, 1', '[a, 1]', '[0, 1) or x', '[0, 1) or '])
def test_another_text_is_a_mistake_where_it_is_written(text):
  with pytest.raises(ValueError, match='range|could not|invalid'):
    ranges.parse(text)


@pytest.mark.parametrize(
  'text, value, words',
  [
    ('[0, 2^32)', 2**32, 'must lie in [0, 2^32)'),
    ('[0, 2^32)', -1, 'must not be negative'),
    ('[1, 2^31)', 0, 'must be positive'),
    ('(0, inf)', 0.0, 'must be positive'),
    ('(0, inf)', 3.5e38, 'must lie in (0, inf)'),
    ('(0, inf)', 1e-39, 'must be 0 or at least 2^-126, the smallest float32'),
    ('[0, 1)', -0.5, 'must lie in [0, 1)'),
    ('[0, 1] or -1', 1.5, 'must lie in [0, 1], or be -1'),
    ('(0, inf) or -1', 0.0, 'must be positive, or -1'),
    ('(0, inf) or -1', -1.0, ''),
    ('(-inf, inf)', -3.4e38, ''),
    ('(-inf, inf)', -3.5e38, 'must lie in (-inf, inf)'),
  ],
)
def test_words(text, value, words):
  assert ranges.parse(text).fault(value) == words


def test_the_ends_are_those_of_float32():
  assert float(np.finfo(np.float32).max) == ranges.LARGEST
  assert float(np.finfo(np.float32).tiny) == ranges.SMALLEST


# -------------------------------------------------------------------------------------- at the front door


def leaves():
  """`(dotted key, config that has it)` of every number that a command line can set."""
  config = Config(transforms=(Distill('t'), Prune(0.5)))
  for section, key in ((Config, ''), *((type(getattr(config, n)), f'{n}.') for n in vars(config))):
    if dataclasses.is_dataclass(section):
      yield from (f'{key}{name}' for name, *_ in numbers(section))
  yield from (f'init.sparse.{name}' for name, *_ in numbers(type(config.init.sparse)))
  for part in config.transforms:
    yield from (f'transforms.{part.kind}.{name}' for name, *_ in numbers(type(part)))


@pytest.mark.parametrize('key', list(leaves()))
@pytest.mark.parametrize('text', FAR)
def test_numbers_far_outside_are_refused_by_name(key, text):
  """-1 means something to a few, and some floats may be as large as float32 can say."""
  base = Config(transforms=(Distill('t'), Prune(0.5)))
  meant = {'transforms.distill.weight_end', 'transforms.distill.temperature_end', 'model.norm_offset'}
  if (text == '-1' and key in meant) or (text == '4294967296' and float_without_end(key)):
    return
  with pytest.raises(ConfigError) as error:
    check(override(base, {key: text}))
  assert str(error.value).removeprefix('config.').startswith(f'{key}=')
  assert '\n' not in str(error.value)


def float_without_end(key):
  found = [within for _, name, kind, within in ALL if key.endswith(f'.{name}') and kind is float]
  return any(within.high == ranges.LARGEST for within in found)


@pytest.mark.parametrize('how', ['flag', 'sweep'])
@pytest.mark.parametrize('more', [[], ['--dry_run']])
@pytest.mark.parametrize(
  'key, value, message',
  [
    ('seed', '4294967296', 'seed=4294967296: must lie in [0, 2^32)'),
    ('data.seed', '-1', 'data.seed=-1: must not be negative'),
    ('data.batch_size', '3e9', 'data.batch_size=3000000000: must lie in [1, 2^31)'),
    ('model.d_model', '1e11', 'model.d_model=100000000000: must lie in [1, 2^31)'),
    ('train.steps', '1e30', 'train.steps=1000000000000000019884624838656: must lie in [0, 2^31)'),
    ('eval.samples', '1e9', 'eval.samples=1000000000: must lie in [0, 1000]'),
    ('optim.learning_rate', '1e39', 'optim.learning_rate=1e+39: must lie in (0, inf)'),
  ],
)
def test_refused_in_one_line_before_anything_is_written(key, value, message, how, more, tmp_path, capsys):
  module = experiment(sweep=[{key: float(value) if 'e' in value else int(value)} if how == 'sweep' else {'name': 'a'}])
  given_ = [f'--config.{key}={value}'] if how == 'flag' else []
  with pytest.raises(SystemExit) as ended:
    cli.main(module, [f'--workdir={tmp_path}/runs', *given_, *more])
  error = capsys.readouterr().err
  assert ended.value.code == 1
  assert message in error
  assert error.count('\n') == 1
  assert not (tmp_path / 'runs').exists()


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_two_seeds_of_the_range_have_two_keys(one, other):
  keys = [tuple(np.asarray(jax.random.key_data(jax.random.PRNGKey(seed))).tolist()) for seed in (one, other)]
  assert (keys[0] == keys[1]) == (one == other)


def test_the_next_seed_would_be_the_first_again():
  """The reason for the range: two arms of two ids would have the same bits."""
  assert (jax.random.PRNGKey(0) == jax.random.PRNGKey(2**32)).all()
  assert ranges.parse('[0, 2^32)').fault(2**32)
  assert math.isfinite(ranges.LARGEST)
