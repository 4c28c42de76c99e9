"""Overrides, checks, canonical text and identity of configurations."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_jax.config import (
  ConfigError,
  arm_references,
  canonical_json,
  check,
  diff,
  flatten,
  from_dict,
  override,
  semantic_hash,
  setting,
  to_dict,
)
from slm_jax.data.config import DataConfig
from slm_jax.distill.logits import Distill
from slm_jax.ema import Ema
from slm_jax.experiment import Config
from slm_jax.model.config import ModelConfig
from slm_jax.optim import OptimConfig

REPO = Path(__file__).parents[1]
TRANSFORMED = Config(transforms=(Distill('teacher'), Ema()))


# ---------------------------------------------------------------------------------------------------- overrides


@pytest.mark.parametrize(
  'key, given_, expected',
  [
    ('seed', '7', 7),
    ('seed', '1e3', 1000),
    ('seed', np.int64(7), 7),
    ('optim.learning_rate', '3e-4', 3e-4),
    ('optim.learning_rate', 1, 1.0),
    ('optim.learning_rate', np.float32(0.5), 0.5),
    ('model.tied', 'false', False),
    ('model.tied', 'True', True),
    ('model.norm', 'layer', 'layer'),
    ('data.sources', 'a.txt,b.txt', ('a.txt', 'b.txt')),
    ('data.sources', ['a.txt'], ('a.txt',)),
    ('data.weights', '1,2.5', (1.0, 2.5)),
    ('data.weights', '', ()),
    ('transforms.distill.weight', '0.25', 0.25),
    ('transforms.ema.decay', 0.5, 0.5),
  ],
)
def test_values_become_members_of_the_fields_type(key, given_, expected):
  found = flatten(override(TRANSFORMED, {key: given_}))[key]
  expected = list(expected) if isinstance(expected, tuple) else expected
  assert found == expected
  assert type(found) in (type(expected), int)


@pytest.mark.parametrize(
  'key, given_, message',
  [
    ('optim.lr', 1, "optim.lr: unknown key 'lr'; allowed: name, learning_rate"),
    ('modle.d_model', 1, "unknown key 'modle'; did you mean 'model'?"),
    ('model.d_modle', 1, "did you mean 'd_model'?"),
    ('seed', 'x', "seed='x': expected int"),
    ('seed', 1.5, 'seed=1.5: expected int'),
    ('seed', True, 'seed=True: expected int'),
    ('seed', None, 'seed=None: expected int'),
    ('seed', 'inf', "seed='inf': expected int"),
    ('optim.learning_rate', 'nan', "optim.learning_rate='nan': expected a finite number"),
    ('optim.learning_rate', [1], 'optim.learning_rate=[1]: expected float'),
    ('model.tied', 'maybe', "model.tied='maybe': expected bool"),
    ('model.tied', 2, 'model.tied=2: expected bool'),
    ('model.norm', 'batch', "model.norm='batch': allowed: rms, layer"),
    ('model.norm', ['rms'], "model.norm=['rms']: allowed: rms, layer"),
    ('data.sources', 3, 'data.sources=3: expected a tuple'),
    ('data.text_field', 3, 'data.text_field=3: expected str'),
    ('model', 3, 'model=3: expected a ModelConfig'),
    ('model', OptimConfig(), 'model=OptimConfig: expected a ModelConfig'),
    ('transforms', (OptimConfig(),), 'transforms=OptimConfig: expected a TransformConfig'),
    ('transforms', (Distill,), 'transforms=Distill: expected a TransformConfig'),
    ('transforms.prune.sparsity', 0.5, "transforms.prune.sparsity: no 'prune' here; there is: distill, ema"),
    ('transforms.ema', 1, 'transforms.ema: names a whole section; set one of: decay'),
    ('seed.x', 1, "seed.x: there is nothing below 'seed'"),
  ],
)
def test_a_wrong_override_is_one_line_with_key_value_and_what_is_allowed(key, given_, message):
  with pytest.raises(ConfigError) as error:
    override(TRANSFORMED, {key: given_})
  assert message in str(error.value)
  assert '\n' not in str(error.value)


def test_a_preset_and_a_change_to_it_come_in_any_order():
  changes = {'model.n_layers': 3, 'model': ModelConfig(d_model=64)}
  assert override(Config(), changes) == override(Config(), dict(reversed(changes.items())))
  assert override(Config(), changes).model == ModelConfig(d_model=64, n_layers=3)


def test_transforms_can_be_replaced_and_then_changed():
  config = override(Config(), {'transforms': (Distill('t'),), 'transforms.distill.weight': 0.1})
  assert config.transforms == (Distill('t', weight=0.1),)


# ------------------------------------------------------------------------------------------------------- check


def test_check_returns_members_of_the_fields_types():
  loose = Config(seed=1.0, data=DataConfig(sources=['a'], weights=(1,)), optim=OptimConfig(clip=np.float64(1)))
  config = check(loose)
  assert config.data.sources == ('a',)
  assert config.data.weights == (1.0,)
  assert type(config.seed) is int
  assert type(config.optim.clip) is float
  assert check(config) == config


@pytest.mark.parametrize(
  'config, message',
  [
    (Config(seed='x'), "config.seed='x': expected int"),
    (Config(model=OptimConfig()), 'config.model=OptimConfig: expected a ModelConfig'),
    (Config(model=ModelConfig(n_heads=4, n_kv_heads=3)), 'config.model.n_heads=4: must be a multiple of n_kv_heads=3'),
    (Config(transforms=(Ema(decay=2),)), 'config.transforms.ema.decay=2'),
    (Config(transforms=(Ema(decay='x'),)), "config.transforms.ema.decay='x': expected float"),
    (Config(data=DataConfig(seq_len=4096)), 'config.data.seq_len=4096: longer than model.max_len=2048'),
  ],
)
def test_check_names_key_and_value(config, message):
  with pytest.raises(ConfigError) as error:
    check(config)
  assert str(error.value).startswith(message)


# ------------------------------------------------------------------------------------------------- identity


def _leaves(node: Any, key: str = '', semantic: bool = True):
  """`(dotted key, value, whether it enters the identity)` of every field."""
  for field in dataclasses.fields(node):
    value, name = getattr(node, field.name), f'{key}.{field.name}' if key else field.name
    counts = semantic and field.metadata.get('semantic', True)
    if dataclasses.is_dataclass(value):
      yield from _leaves(value, name, counts)
    elif field.name == 'transforms':
      for item in value:
        yield from _leaves(item, f'{name}.{item.kind}', counts)
    else:
      yield name, value, counts


def _another(config: Config, key: str, value: Any) -> Any:
  """A different value that the field can hold, its check aside."""
  if isinstance(value, bool):
    return not value
  if isinstance(value, (int, float)):
    return value + 1
  if isinstance(value, tuple):
    return (*value, value[0] if value else '1')
  for candidate in (
    'none',
    'layer',
    'gelu',
    'learned',
    'bfloat16',
    'full',
    'skip',
    'whole',
    'muon',
    'reference',
    'linear',
    'sentencepiece',
    'jsd',
    'logits',
    'top_k',
    'random',
    'global',
    'mean_shift',
    'layerwise',
    'other',
  ):
    try:
      if candidate != value and override(config, {key: candidate}) != config:
        return candidate
    except ConfigError:
      continue
  raise AssertionError(f'no other value for {key}')


@pytest.mark.parametrize(
  'key, value, semantic', list(_leaves(TRANSFORMED)), ids=lambda x: x if isinstance(x, str) else ''
)
def test_identity_is_made_of_exactly_the_semantic_fields(key, value, semantic):
  changed = override(TRANSFORMED, {key: _another(TRANSFORMED, key, value)})
  assert changed != TRANSFORMED
  assert (semantic_hash(changed) != semantic_hash(TRANSFORMED)) == semantic


def test_what_a_result_cannot_depend_on_is_not_in_the_identity():
  outside = {key for key, _, semantic in _leaves(TRANSFORMED) if not semantic}
  assert {'name', 'data.sources', 'run.fsdp', 'run.wandb', 'train.loss_chunk', 'model.remat'} <= outside
  assert not outside & {'seed', 'data.content', 'data.batch_size', 'optim.learning_rate', 'model.dtype', 'init.arm'}


def test_the_order_of_transforms_is_part_of_the_identity():
  swapped = dataclasses.replace(TRANSFORMED, transforms=TRANSFORMED.transforms[::-1])
  assert semantic_hash(swapped) != semantic_hash(TRANSFORMED)
  assert 'transforms' in diff(TRANSFORMED, swapped)


def test_identity_is_the_same_in_another_process():
  code = (
    'from tests.test_config import *\n'
    'import sys; sys.stdout.write(semantic_hash(TRANSFORMED) + canonical_json(TRANSFORMED))'
  )
  for hash_seed in ('1', '2'):
    env = {**os.environ, 'PYTHONHASHSEED': hash_seed, 'PYTHONPATH': str(REPO)}
    out = subprocess.run([sys.executable, '-c', code], env=env, cwd=REPO, capture_output=True, text=True, check=True)
    assert out.stdout == semantic_hash(TRANSFORMED) + canonical_json(TRANSFORMED)


@settings(deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False, min_value=0, exclude_min=True), st.integers(0, 2**40))
def test_text_and_number_give_one_identity(rate, seed):
  numbers = override(Config(), {'optim.learning_rate': rate, 'seed': seed})
  text = override(Config(), {'optim.learning_rate': repr(rate), 'seed': str(seed)})
  assert canonical_json(numbers) == canonical_json(text)
  assert json.loads(canonical_json(numbers))['optim']['learning_rate'] == rate


def test_one_and_one_point_zero_are_one_setting():
  assert semantic_hash(Config(optim=OptimConfig(clip=1))) == semantic_hash(Config(optim=OptimConfig(clip=1.0)))


# -------------------------------------------------------------------------------------------- reading and showing


@pytest.mark.parametrize('section', [ModelConfig(rope_scaling=(8.0, 1.0, 4.0, 8192.0)), Distill('t'), DataConfig()])
def test_from_dict_inverts_to_dict(section):
  assert from_dict(type(section), json.loads(json.dumps(to_dict(section)))) == section


def test_from_dict_refuses_what_it_does_not_know():
  with pytest.raises(ConfigError, match='unknown keys wings; written by a newer version'):
    from_dict(ModelConfig, {'wings': 2})


def test_flatten_reads_configs_and_their_json_alike():
  assert flatten(json.loads(canonical_json(TRANSFORMED))) == flatten(TRANSFORMED)
  assert flatten(TRANSFORMED)['transforms'] == ['distill', 'ema']
  assert flatten(Config())['transforms'] == []


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(['seed', 'train.steps', 'optim.warmup', 'data.seed']), st.integers(1, 50)))
def test_diff_is_what_override_changed(changes):
  base = Config(seed=100, data=DataConfig(seed=100))
  expected = {k: (flatten(base)[k], v) for k, v in changes.items() if flatten(base)[k] != v}
  assert diff(base, override(base, changes)) == expected
  assert diff(base, base) == {}


def test_arm_references_finds_every_marked_field_by_a_key_that_override_takes():
  @dataclasses.dataclass(frozen=True)
  class Section:
    other: str = setting('', arm=True)

  @dataclasses.dataclass(frozen=True)
  class Root:
    empty: Section = Section()
    deep: Section = Section('a')
    parts: tuple[Any, ...] = (Distill('b'),)

  found = arm_references(Root())
  assert found == [('deep.other', 'a'), ('parts.distill.teacher', 'b')]
  renamed = override(Root(), {key: 'c' for key, _ in found})
  assert [name for _, name in arm_references(renamed)] == ['c', 'c']
