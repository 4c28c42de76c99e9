"""Settings that count only under a condition: which those are, and whether the condition holds."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from slm_jax.config import is_section, kind_of

# A section's table of settings that count only under a condition: {field: (condition on the section, in words)}. It is
# a class variable `needs`; the words follow 'without'.
Needs = Mapping[str, tuple[Callable[[Any], Any], str]]


class Conditional(NamedTuple):
  """A setting that is not at its default, and that counts only under a condition."""

  key: str
  value: Any
  default: Any
  counts: bool  # whether the condition holds
  needs: str  # the condition in words


def conditional(config: Any, key: str = '') -> Iterator[Conditional]:
  """Yields the settings of a tree of sections that stand in their tables `needs` and are not at their defaults."""
  table = getattr(config, 'needs', {})
  for field in dataclasses.fields(config):
    value, name = getattr(config, field.name), f'{key}.{field.name}' if key else field.name
    if field.name in table and value != field.default:
      condition, words = table[field.name]
      yield Conditional(name, value, field.default, bool(condition(config)), words)
    if is_section(value):
      yield from conditional(value, name)
    elif isinstance(value, tuple):
      for item in value:
        if is_section(item):
          yield from conditional(item, f'{name}.{kind_of(item)}')
