"""Configuration: frozen dataclasses, dotted overrides, canonical JSON, a semantic hash.

Every section of a configuration is a frozen dataclass that stands beside the code that reads it. This module knows
none of them; it only knows how to change, check, print and hash such trees:

    config = override(config, {'optim.learning_rate': '3e-4', 'model': 'smollm2_135m'})
    config = check(config)              # values as members of their types; each section's own check()
    arm_id = semantic_hash(config)      # 12 hex digits; fields marked semantic=False, and defaults, do not enter

Errors are `ConfigError`s of one line that name the key, the value and what is allowed.
"""

import dataclasses
import difflib
import functools
import hashlib
import json
import math
import numbers
import types
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union

from slm_jax import ranges

if TYPE_CHECKING:
  from _typeshed import DataclassInstance

T = TypeVar('T', bound='DataclassInstance')

_TRUE, _FALSE = {'true', '1', 'yes'}, {'false', '0', 'no'}
_LEAVES = (str, bool, int)  # types whose values are what they are; asked for first, since a sweep has a million of them


class ConfigError(ValueError):
  """A configuration that cannot be meant. The message is one line: key, value, what is allowed."""


def to_install(extra: str) -> str:
  """The command by which one gets an optional dependency of pyproject.toml; for the end of an error."""
  return f"pip install '.[{extra}]' in the project's folder"


def setting(
  default: Any,
  within: str = '',
  *,
  semantic: bool = True,
  arm: bool = False,
  traced: bool = False,
  unhashed: Any = dataclasses.MISSING,
) -> Any:
  """A dataclass field with a default.

  within: the range of a number, or of each number in a tuple, as in '[0, 1)'; see ranges.py. Every number has one.
  semantic: False for what cannot change the result (paths, device counts, logging); such fields are not hashed.
  arm: True if the value names another arm of the same sweep, on whose checkpoint this one depends.
  traced: True for a number that the compiled step takes as an argument (`hparams`): arms that differ only in such
    numbers share one executable.
  unhashed: the value that does not enter an arm's id; the default unless given. A field whose default changes must name
    its first default here: otherwise a run with the old default and a run with the new one would have one id.
  """
  known = {'within': ranges.parse(within)} if within else {}
  known |= {} if unhashed is dataclasses.MISSING else {'unhashed': unhashed}
  return dataclasses.field(default=default, metadata={'semantic': semantic, 'arm': arm, 'traced': traced, **known})


# ---------------------------------------------------------------------------------------------- dotted overrides


def override(config: T, changes: Mapping[str, Any]) -> T:
  """Returns `config` with `{'dotted.key': value}` applied. Strings are parsed by the field's annotated type.

  A segment that meets a tuple of sections selects the element whose `kind` it is: 'transforms.distill.weight'; one
  that meets another tuple selects by place, from 0.
  Longer keys are applied after shorter ones, so 'model' (a preset) and 'model.n_layers' may come in any order.
  """
  for key in sorted(changes, key=lambda k: k.count('.')):
    config = _replace(config, key.split('.'), changes[key], key)
  return config


def _replace(node: Any, path: list[str], value: Any, key: str) -> Any:
  head, rest = path[0], path[1:]
  if isinstance(node, tuple) and head.isdigit() and int(head) < len(node) and not is_section(node[int(head)]):
    return node[: int(head)] + (value,) + node[int(head) + 1 :]
  if isinstance(node, tuple):
    kinds = [kind_of(item) for item in node]
    if head not in kinds:
      raise ConfigError(f'{key}: no {head!r} here; there is: {", ".join(kinds) or "nothing"}')
    if not rest:
      raise ConfigError(f'{key}: names a whole section; set one of: {", ".join(_names(node[kinds.index(head)]))}')
    i = kinds.index(head)
    return node[:i] + (_replace(node[i], rest, value, key),) + node[i + 1 :]
  if not dataclasses.is_dataclass(node) or isinstance(node, type):
    raise ConfigError(f'{key}: there is nothing below {key.rsplit("." + head, 1)[0]!r}')
  names = _names(node)
  if head not in names:
    close = difflib.get_close_matches(head, names, 1)
    hint = f'did you mean {close[0]!r}? ' if close else ''
    raise ConfigError(f'{key}: unknown key {head!r}; {hint}allowed: {", ".join(names)}')
  if rest:
    return dataclasses.replace(node, **{head: _replace(getattr(node, head), rest, value, key)})
  return dataclasses.replace(node, **{head: coerce(_hints(type(node))[head], value, key)})


def _names(node: Any) -> list[str]:
  return [f.name for f in dataclasses.fields(node)]


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
  return typing.get_type_hints(cls)


def coerce(annotation: Any, value: Any, key: str) -> Any:
  """`value` as a member of `annotation`, or ConfigError. Accepts what a command line or a sweep may give."""
  if type(value) is annotation and (annotation is not float or math.isfinite(value)):
    return value
  origin, args = typing.get_origin(annotation), typing.get_args(annotation)
  if origin is Literal:
    if value not in args:
      raise ConfigError(f'{key}={value!r}: allowed: {", ".join(map(str, args))}')
    return value
  if origin in (Union, types.UnionType):
    if value in (None, 'none') and type(None) in args:
      return None
    return coerce(next(a for a in args if a is not type(None)), value, key)
  if origin is tuple:
    items = value.split(',') if isinstance(value, str) else value
    if not isinstance(items, (tuple, list)):
      raise ConfigError(f'{key}={value!r}: expected a tuple or a comma-separated list')
    return tuple(coerce(args[0], item, key) for item in items if item != '')
  if annotation in (bool, int, float, str):
    return _scalar(annotation, value, key)
  if isinstance(value, str) and hasattr(annotation, 'parse'):
    return annotation.parse(value, key)
  if not isinstance(value, annotation) or isinstance(value, type):
    shown = repr(value) if isinstance(value, (str, int, float)) else getattr(value, '__name__', type(value).__name__)
    raise ConfigError(f'{key}={shown}: expected a {annotation.__name__}')
  return value


def _scalar(annotation: type, value: Any, key: str) -> Any:
  error = ConfigError(f'{key}={value!r}: expected {annotation.__name__}')
  if annotation is bool:
    text = str(value).lower()
    if text in _TRUE | _FALSE and not isinstance(value, float):
      return text in _TRUE
    raise error
  if annotation is str:
    if isinstance(value, str):
      return value
    raise error
  if isinstance(value, bool) or not isinstance(value, (str, numbers.Real)):
    raise error
  try:
    number = float(value)
    if annotation is int:
      if isinstance(value, str) and value.lstrip('+-').isdigit():
        return int(value)
      if number != int(number):
        raise error
      return int(number)
  except (ValueError, OverflowError):
    raise error from None
  if not math.isfinite(number):
    raise ConfigError(f'{key}={value!r}: expected a finite number')
  return number


# ---------------------------------------------------------------------------------------- checking, printing, hash


def check(config: T, key: str = 'config') -> T:
  """Returns `config` with every value as a member of its field's type (1 -> 1.0, a list -> a tuple), or ConfigError.

  Numbers must lie in the range of their field, and text must be Unicode. Depth first, so that a section's own
  `check(key)` sees parts that are valid already.
  """
  hints, changed = _hints(type(config)), {}
  for field in dataclasses.fields(config):
    value = given = getattr(config, field.name)
    if type(given) is not hints[field.name] or type(given) not in _LEAVES:
      name = f'{key}.{field.name}'
      value = coerce(hints[field.name], given, name)
      if is_section(value):
        value = check(value, name)
      elif isinstance(value, tuple):
        value = tuple(check(v, f'{name}.{kind_of(v)}') if is_section(v) else v for v in value)
    if fault := _fault(value, field.metadata.get('within')):
      raise ConfigError(f'{key}.{field.name}={value!r}: {fault}')
    if value is not given:
      changed[field.name] = value
  config = dataclasses.replace(config, **changed) if changed else config
  if hasattr(config, 'check'):
    config.check(key)
  return config


def _fault(value: Any, within: ranges.Range | None) -> str:
  """Says what is wrong with a leaf, or with the first one of a tuple that is wrong; '' if nothing is."""
  if isinstance(value, tuple):
    return next(filter(None, (_fault(each, within) for each in value)), '')
  if isinstance(value, str) and not is_unicode(value):
    return 'must be Unicode text; the name of a file must be UTF-8'
  return within.fault(value) if within is not None and value is not None else ''


def is_unicode(text: str) -> bool:
  """False for a text with half of a surrogate pair, such as the name of a file that is not UTF-8."""
  return text.isascii() or not any('\ud800' <= c <= '\udfff' for c in text)


def is_section(value: Any) -> bool:
  return dataclasses.is_dataclass(value) and not isinstance(value, type)


def kind_of(section: Any) -> str:
  """What a section in a tuple of sections is called in dotted keys."""
  return getattr(section, 'kind', type(section).__name__)


def require(condition: bool, message: str) -> None:
  """Raises `ConfigError(message)` unless the condition holds."""
  if not condition:
    raise ConfigError(message)


def to_dict(config: Any, semantic_only: bool = False) -> dict[str, Any]:
  """Nested plain dict (JSON types). Elements of section tuples carry their `kind`."""
  out = {'kind': config.kind} if hasattr(config, 'kind') else {}
  for field in dataclasses.fields(config):
    if semantic_only and not field.metadata.get('semantic', True):
      continue
    out[field.name] = _plain(getattr(config, field.name), semantic_only)
  return out


def _plain(value: Any, semantic_only: bool) -> Any:
  if type(value) in _LEAVES:
    return value
  if dataclasses.is_dataclass(value):
    return to_dict(value, semantic_only)
  if isinstance(value, (tuple, list)):
    return [_plain(v, semantic_only) for v in value]
  if isinstance(value, float) and value.is_integer():
    return int(value)  # 1 and 1.0 in a field of floats are the same setting, and must be the same text
  return value


def from_dict(cls: type[T], values: Mapping[str, Any], key: str = 'config') -> T:
  """The inverse of `to_dict` for sections without section tuples (a ModelConfig from a checkpoint's JSON, say)."""
  hints, names = _hints(cls), _names(cls)
  values = {name: value for name, value in values.items() if name != 'kind'}
  unknown = sorted(set(values) - set(names))
  require(not unknown, f'{key}: unknown keys {", ".join(unknown)}; written by a newer version?')
  parts = {}
  for name, value in values.items():
    hint = hints[name]
    nested = dataclasses.is_dataclass(hint) and isinstance(hint, type)
    parts[name] = from_dict(hint, value, f'{key}.{name}') if nested else coerce(hint, value, f'{key}.{name}')
  return cls(**parts)


def canonical_json(config: Any) -> str:
  """One line, sorted keys, no NaN; floats by shortest round trip, so 1e-3 and 0.001 are the same text."""
  return json.dumps(to_dict(config), sort_keys=True, separators=(',', ':'), allow_nan=False)


def identity(config: Any, default: Any = None) -> dict[str, Any]:
  """Returns the semantic settings that differ from their defaults: all that an arm's id is a hash of.

  A field that is added to a section later changes no id while it is at its default. See `setting` for defaults that
  change. default: a section whose values are the defaults, in place of those of its class.
  """
  out = {'kind': config.kind} if hasattr(config, 'kind') else {}
  for field in dataclasses.fields(config):
    if not field.metadata.get('semantic', True):
      continue
    value, unhashed = getattr(config, field.name), _unhashed(field, default)
    if is_section(value):
      inside = identity(value, unhashed if is_section(unhashed) else None)
      if inside.keys() - {'kind'} or inside.get('kind') != getattr(unhashed, 'kind', None):
        out[field.name] = inside
    elif isinstance(value, (tuple, list)) and any(map(is_section, value)):
      out[field.name] = [identity(item) if is_section(item) else _plain(item, True) for item in value]
    elif unhashed is dataclasses.MISSING or _plain(value, True) != _plain(unhashed, True):
      out[field.name] = _plain(value, True)
  return out


def _unhashed(field: dataclasses.Field, default: Any) -> Any:
  """The value of a field that enters no id; MISSING if every value does."""
  if 'unhashed' in field.metadata:
    return field.metadata['unhashed']
  if hasattr(default, field.name):
    return getattr(default, field.name)
  return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def semantic_hash(config: Any) -> str:
  """Computes an arm's id: the first 12 hex digits of SHA-256 over the JSON of its `identity`."""
  text = json.dumps(identity(config), sort_keys=True, separators=(',', ':'), allow_nan=False)
  return hashlib.sha256(text.encode()).hexdigest()[:12]


def flatten(config: Any) -> dict[str, Any]:
  """`{'optim.learning_rate': 0.001, ...}` of a config or of its `to_dict`: leaves only.

  A tuple of sections gives a leaf with their kinds, in their order, besides their own leaves.
  """
  out: dict[str, Any] = {}

  def visit(value: Any, key: str) -> None:
    if type(value) in _LEAVES:
      out[key] = value
    elif isinstance(value, Mapping):
      for name, item in value.items():
        visit(item, f'{key}.{name}' if key else name)
    elif isinstance(value, list) and value and all(isinstance(v, Mapping) for v in value):
      out[key] = [item.get('kind', '?') for item in value]
      for item in value:
        visit({k: v for k, v in item.items() if k != 'kind'}, f'{key}.{item.get("kind", "?")}')
    else:
      out[key] = value

  visit(config if isinstance(config, Mapping) else to_dict(config), '')
  return out


def diff(base: Any, other: Any) -> dict[str, tuple[Any, Any]]:
  """`{dotted key: (value in base, value in other)}` where the two differ; a key missing on one side shows as None."""
  a, b = flatten(base), flatten(other)
  return {k: (a.get(k), b.get(k)) for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)}


def traced(config: Any) -> dict[str, float]:
  """The values of the fields marked `traced`, by the names of `TrainState.hparams`: optim.clip, distill.weight."""
  found: dict[str, float] = {}

  def visit(node: Any, key: str) -> None:
    for field in dataclasses.fields(node):
      value = getattr(node, field.name)
      if field.metadata.get('traced'):
        found[f'{key}.{field.name}'] = float(value)
      elif is_section(value):
        visit(value, field.name)
      elif isinstance(value, tuple):
        for item in value:
          if is_section(item):
            visit(item, kind_of(item))

  visit(config, '')
  return found


def static(config: T) -> T:
  """`config` with its traced fields at their defaults: arms for which this is equal can share one executable."""
  parts: dict[str, Any] = {}
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if field.metadata.get('traced'):
      parts[field.name] = field.default
    elif is_section(value):
      parts[field.name] = static(value)
    elif isinstance(value, tuple):
      parts[field.name] = tuple(static(item) if is_section(item) else item for item in value)
  return dataclasses.replace(config, **parts)


def arm_references(config: Any) -> list[tuple[str, str]]:
  """`[(dotted key, arm name)]` of the fields that name another arm (`setting(..., arm=True)`), empty names left out."""
  found: list[tuple[str, str]] = []

  def visit(node: Any, key: str) -> None:
    for field in dataclasses.fields(node):
      value = getattr(node, field.name)
      if not field.metadata.get('arm') and type(value) in _LEAVES:
        continue
      name = f'{key}.{field.name}' if key else field.name
      if field.metadata.get('arm') and value:
        several = isinstance(value, tuple)
        found.extend([(f'{name}.{i}', arm) for i, arm in enumerate(value)] if several else [(name, value)])
      elif dataclasses.is_dataclass(value):
        visit(value, name)
      elif isinstance(value, tuple):
        for item in value:
          if dataclasses.is_dataclass(item):
            visit(item, f'{name}.{kind_of(item)}')

  visit(config, '')
  return found
