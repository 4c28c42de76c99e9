"""An arm's id: what enters it, and that it survives the growth of the project."""

import dataclasses
import importlib
import json
import pkgutil
from pathlib import Path
from typing import Any, ClassVar

import pytest

import slm_jax
from slm_jax.config import identity, override, semantic_hash, setting, to_dict
from slm_jax.ema import Ema
from slm_jax.experiment import Config, EvalConfig
from slm_jax.step import TransformConfig

GOLDEN = Path(__file__).parent / 'golden' / 'unhashed.json'


@dataclasses.dataclass(frozen=True)
class Part:
  a: int = 1
  names: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class GrownPart(Part):
  later: float = 0.5


@dataclasses.dataclass(frozen=True)
class Noise(TransformConfig):
  kind: ClassVar[str] = 'noise'
  target: str  # required: it has no default that could be left out
  rate: float = 0.1


@dataclasses.dataclass(frozen=True)
class GrownNoise(TransformConfig):
  kind: ClassVar[str] = 'noise'
  target: str
  rate: float = 0.1
  later: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Whole:
  part: Any = Part()
  transforms: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True)
class GrownWhole(Whole):
  more: Any = Part(a=3)


def test_a_field_that_is_added_changes_no_id_while_it_is_at_its_default():
  for part in (Part(), Part(a=2), Part(names=('x',))):
    before = Whole(part, (Noise('head', 0.2),))
    grown = GrownPart(**dataclasses.asdict(part))
    after = GrownWhole(grown, (GrownNoise('head', 0.2),))
    assert identity(after) == identity(before)
    assert semantic_hash(after) == semantic_hash(before)
    for other in (
      dataclasses.replace(after, part=dataclasses.replace(grown, later=0.25)),
      dataclasses.replace(after, transforms=(GrownNoise('head', 0.2, (1,)),)),
      dataclasses.replace(after, more=Part(a=4)),
    ):
      assert semantic_hash(other) != semantic_hash(before)


def test_what_has_no_default_always_enters():
  assert identity(Noise('head')) == {'kind': 'noise', 'target': 'head'}
  assert semantic_hash(Whole(transforms=(Noise('head'),))) != semantic_hash(Whole(transforms=(Noise('tail'),)))
  assert semantic_hash(Whole(transforms=(Noise('head'),))) != semantic_hash(Whole())


def test_a_default_that_changes_keeps_its_first_value_out_of_the_id():
  @dataclasses.dataclass(frozen=True)
  class Before:
    warmup: int = 100

  @dataclasses.dataclass(frozen=True)
  class After:
    warmup: int = setting(200, unhashed=100)

  assert semantic_hash(After(100)) == semantic_hash(Before(100))
  assert semantic_hash(After()) == semantic_hash(Before(200)) != semantic_hash(Before())


@pytest.mark.parametrize('field', [field.name for field in dataclasses.fields(EvalConfig)])
def test_settings_of_evaluation_do_not_enter(field):
  value = getattr(EvalConfig(), field)
  other = f'{value}x' if isinstance(value, str) else value + 1
  changed = override(Config(), {f'eval.{field}': other})
  assert changed != Config()
  assert semantic_hash(changed) == semantic_hash(Config())


def test_the_whole_record_still_shows_every_setting():
  assert to_dict(Config(transforms=(Ema(),)))['transforms'] == [{'kind': 'ema', 'decay': 0.99}]
  assert identity(Config(transforms=(Ema(),))) == {'transforms': [{'kind': 'ema'}]}


# ---------------------------------------------------------------------------------------------- defaults are frozen


def sections() -> list[type]:
  """All dataclasses of the project that are a section of a configuration."""
  for module in pkgutil.walk_packages(slm_jax.__path__, 'slm_jax.'):
    importlib.import_module(module.name)
  found: dict[str, type] = {}

  def visit(cls: type) -> None:
    found[cls.__name__] = cls
    for field in dataclasses.fields(cls):
      if dataclasses.is_dataclass(field.default):
        visit(type(field.default))

  def below(cls: type) -> None:
    for sub in cls.__subclasses__():
      if sub.__module__.startswith('slm_jax.') and dataclasses.is_dataclass(sub):
        visit(sub)
      below(sub)

  visit(Config)
  below(TransformConfig)
  return [found[name] for name in sorted(found)]


def unhashed() -> dict[str, Any]:
  """`{'OptimConfig.warmup': 100, ...}`: the values that enter no id."""
  found = {}
  for cls in sections():
    for field in dataclasses.fields(cls):
      if field.metadata.get('semantic', True) and not dataclasses.is_dataclass(field.default):
        value = field.metadata.get('unhashed', field.default)
        found[f'{cls.__name__}.{field.name}'] = 'required' if value is dataclasses.MISSING else value
  return json.loads(json.dumps(found))


def test_values_that_enter_no_id_never_change():
  """An arm's id says nothing of a field at its default: with another default, the same id would mean another run.

  A new field: add its line (python tests/test_identity.py does). A new default: `setting(NEW, unhashed=OLD)`.
  """
  known, now = json.loads(GOLDEN.read_text()), unhashed()
  changed = {name: (known[name], now[name]) for name in known if name in now and known[name] != now[name]}
  assert not changed, 'defaults changed: give each the metadata unhashed=OLD'
  assert now.keys() <= known.keys(), f'add to {GOLDEN.name}: {sorted(now.keys() - known.keys())}'


if __name__ == '__main__':
  GOLDEN.write_text(json.dumps({**unhashed(), **json.loads(GOLDEN.read_text())}, indent=1, sort_keys=True) + '\n')
