"""Whether a value that was read from JSON is what a type hint says.

Hints are those of the readers' own types: TypedDict and NamedTuple classes, `list[str]`, `dict[str, float]`,
`int | None`, `Literal['done', 'failed']`, and `Annotated[int, '[1, 2^31)']` for a number in a range (ranges.py). A
float is any finite number, a tuple is a list, and the fields of a NamedTuple may be absent. Keys that a class does not
name are allowed: a later version may have added them.
"""

import functools
import math
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union

from slm_jax import ranges

_WORDS = {dict: 'an object', list: 'a list', str: 'a string', bool: 'true or false', type(None): 'null'}


def fault(value: Any, hint: Any, where: str = '') -> str:
  """Says where the value is not as the hint says, and what is expected there; '' if it is."""
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if hint is Any:
    return ''
  if origin is typing.Required or origin is typing.NotRequired:
    return fault(value, args[0], where)
  if origin is Annotated:
    outside = '' if fault(value, args[0], where) else ranges.parse(args[1]).fault(value)
    return f'{where or "value"}={value!r}: {outside}' if outside else fault(value, args[0], where)
  if origin in (Union, types.UnionType):
    found = [fault(value, each, where) for each in args]
    return '' if '' in found else found[0]
  if origin is Literal:
    return '' if value in args and isinstance(value, str) else _expected(where, value, ' or '.join(map(repr, args)))
  if origin in (list, tuple):
    return _fault_of_items(value, args[0], where)
  if origin in (dict, Mapping):
    return _fault_of_entries(value, dict.fromkeys(value, args[1]) if isinstance(value, dict) else {}, (), where)
  if hasattr(hint, '__annotations__'):
    return _fault_of_entries(value, _hints(hint), getattr(hint, '__required_keys__', ()), where)
  return _fault_of_leaf(value, hint, where)


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
  return typing.get_type_hints(kind, include_extras=True)


def _fault_of_leaf(value: Any, hint: Any, where: str) -> str:
  if hint in (int, float):
    # Python reads integers of any size, and 1e999 as infinity.
    good = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    good = good or (hint is float and isinstance(value, float) and math.isfinite(value))
    return '' if good else _expected(where, value, 'an integer' if hint is int else 'a number')
  kind = type(None) if hint is None else hint
  return '' if isinstance(value, kind) else _expected(where, value, _WORDS[kind])


def _fault_of_items(value: Any, hint: Any, where: str) -> str:
  if not isinstance(value, list):
    return _expected(where, value, 'a list')
  return next(filter(None, (fault(item, hint, f'{where}[{i}]') for i, item in enumerate(value))), '')


def _fault_of_entries(value: Any, hints: Mapping[str, Any], needed: typing.Iterable[str], where: str) -> str:
  if not isinstance(value, dict):
    return _expected(where, value, 'an object')
  for name in needed:
    if name not in value:
      return f'{where}.{name} is missing'.lstrip('.')
  entries = ((value[name], hint, f'{where}.{name}'.lstrip('.')) for name, hint in hints.items() if name in value)
  return next(filter(None, (fault(*entry) for entry in entries)), '')


def _expected(where: str, value: Any, what: str) -> str:
  kind = 'a number' if isinstance(value, (int, float)) and not isinstance(value, bool) else _WORDS[type(value)]
  given = repr(value) if kind == 'a number' or (kind == 'a string' and len(value) < 40) else kind
  return f'{where or "it"} is {given[:60]}, expected {what}'
