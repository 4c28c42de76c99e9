"""From an experiment file to its arms: expanded, checked, linked to their parents and named by what they are.

An experiment module has `config() -> Config` and any number of `sweep()` / `sweep_<name>()` generators of dotted
overrides. An arm is one resolved configuration; its id is the hash of the semantic part, in which every reference to
another arm is that arm's id. So an id says what a run *is*, its teacher and its teacher's teacher included, and two
arms of one id are one run.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from slm_jax.ablate import sweep as sweeps
from slm_jax.ablate.sweep import SEEDS, Changes
from slm_jax.config import ConfigError, arm_references, check, diff, kind_of, override, require, semantic_hash

if TYPE_CHECKING:
  from slm_jax.data.config import DataConfig
  from slm_jax.experiment import Config

DERIVED = ('name', 'data.content')  # what is computed, or a mere label, tells nobody how two arms differ


class Arm(NamedTuple):
  """One run of a sweep."""

  arm_id: str
  name: str  # shared by the repetitions of an arm over seeds, and by nothing else
  config: 'Config'  # resolved: references to other arms are their ids
  parents: Mapping[str, str]  # {dotted key of the field that names it: arm id}
  diff: Mapping[str, tuple[Any, Any]]  # {dotted key: (in the base, here)}; references by name
  group: str  # the id without seeds, the parents' seeds included: what repetitions have in common
  aliases: tuple[str, ...] = ()  # names of further arms of the sweep that turned out to be this one


def expand(
  module: ModuleType,
  sweep_name: str | None = None,
  cli_overrides: Changes | None = None,
  *,
  fingerprint: 'Callable[[DataConfig], str] | None' = None,
) -> list[Arm]:
  """The arms of an experiment, parents before children and otherwise in the order of the sweep.

  sweep_name: see `changes_of`. cli_overrides change the base, before a sweep that asks for it sees it.
  fingerprint: content hash of a data section; `slm_jax.data.sources.fingerprint` unless given.
  Raises ConfigError if any arm is impossible: none is returned unless all are sound.
  """
  try:
    base = override(base_config(module), cli_overrides or {})
  except ConfigError as error:
    raise ConfigError(f'--config.{error}' if cli_overrides else str(error)) from None
  changes = changes_of(module, sweep_name, base)
  content = _content_of(fingerprint)
  configs = [_resolve(base, change, content) for change in changes]
  names = label(configs, changes)
  return _arms(base, configs, names, link(configs, names, changes))


# ---------------------------------------------------------------------------------------------- base and changes


def base_config(module: ModuleType) -> 'Config':
  require(callable(getattr(module, 'config', None)), f'{module.__name__}: an experiment needs a function config()')
  base = module.config()
  require(dataclasses.is_dataclass(base), f'{module.__name__}: config() returned {base!r}, expected a Config')
  return base


def sweeps_of(module: ModuleType) -> dict[str, Callable[..., Iterable[Changes]]]:
  """`{'sweep': sweep, 'lr': sweep_lr, ...}` in the order of definition."""
  found = {}
  for name, value in vars(module).items():
    if callable(value) and (name == 'sweep' or name.startswith('sweep_')):
      found[name.removeprefix('sweep_')] = value
  return found


def changes_of(module: ModuleType, sweep_name: str | None, base: 'Config') -> list[Changes]:
  """The overrides of every arm.

  sweep_name: 'a' for `sweep_a`, 'a,b' for the product of two, 'none' for the base alone. Not given: `sweep()` if there
  is one, else the only sweep; a file without sweeps has one arm, its base.
  """
  known = sweeps_of(module)
  if not sweep_name:
    require(
      'sweep' in known or len(known) < 2, f'--sweep: name one or more of {", ".join(known)}; or none for the base alone'
    )
    sweep_name = 'sweep' if 'sweep' in known else next(iter(known), 'none')
  if sweep_name == 'none':
    return [{}]
  parts = []
  for name in sweep_name.split(','):
    require(name in known, f'--sweep={name}: no such sweep; there is: {", ".join([*known, "none"])}')
    parts.append(_yielded(name, known[name], base))
  return list(sweeps.product(*parts))


def _yielded(name: str, function: Callable[..., Iterable[Changes]], base: 'Config') -> list[Changes]:
  parameters = inspect.signature(function).parameters.values()
  wants_base = any(p.default is p.empty for p in parameters)
  changes = list(function(base) if wants_base else function())
  require(len(changes) > 0, f'sweep {name!r}: yields no arms')
  for change in changes:
    require(isinstance(change, Mapping), f'sweep {name!r}: yields {change!r}, expected {{"dotted.key": value}}')
  return changes


def _resolve(base: 'Config', change: Changes, content: 'Callable[[DataConfig], str]') -> 'Config':
  try:
    config = check(override(base, change))
    return dataclasses.replace(config, data=dataclasses.replace(config.data, content=content(config.data)))
  except ConfigError as error:
    where = ', '.join(f'{k}={shown(v)}' for k, v in change.items())
    raise ConfigError(f'{error} (in the arm {where})' if change else str(error)) from None


def _content_of(fingerprint: 'Callable[[DataConfig], str] | None') -> 'Callable[[DataConfig], str]':
  if fingerprint is None:
    from slm_jax.data import sources  # heavier than the rest, and not needed to refuse a wrong sweep

    fingerprint = sources.fingerprint
  cached = functools.cache(fingerprint)
  return lambda data: cached(dataclasses.replace(data, seed=0, content=''))  # the order of batches is not content


# ------------------------------------------------------------------------------------------------------- names


def label(configs: 'Sequence[Config]', changes: Sequence[Changes]) -> list[str]:
  """Names that tell apart what differs in more than its seeds: the given ones, followed by what varies where needed."""
  names = [''] * len(configs)
  for given, members in _by_name(config.name for config in configs).items():
    keys = dict.fromkeys(k for i in members for k in changes[i] if k not in ('name', *SEEDS))
    varying = [k for k in keys if len({shown(changes[i][k]) if k in changes[i] else None for i in members}) > 1]
    last = [k.rsplit('.', 1)[-1] for k in varying]
    short = {k: k if last.count(tail) > 1 else tail for k, tail in zip(varying, last, strict=True)}
    for i in members:
      parts = [f'{short[k]}={shown(changes[i][k])}' for k in varying if k in changes[i]]
      names[i] = ' '.join([given, *parts] if given else parts) or 'base'
  return names


def _by_name(names: Iterable[str]) -> dict[str, list[int]]:
  places: dict[str, list[int]] = {}
  for i, name in enumerate(names):
    places.setdefault(name, []).append(i)
  return places


def shown(value: Any) -> str:
  """A value of a setting, for people: `0.001`, `a+b`, `distill(weight=0.3)`."""
  if isinstance(value, float):
    return f'{value:.6g}'
  if isinstance(value, (tuple, list)):
    return '+'.join(map(shown, value)) or 'none'
  if dataclasses.is_dataclass(value):
    set_here = [f.name for f in dataclasses.fields(value) if getattr(value, f.name) != f.default]
    inside = ', '.join(f'{name}={shown(getattr(value, name))}' for name in set_here)
    return getattr(value, 'kind', type(value).__name__) + (f'({inside})' if inside else '')
  return str(value)


# ------------------------------------------------------------------------------------------- references to arms


class Linked(NamedTuple):
  arm_id: str
  group: str
  config: 'Config'  # with ids in place of names


def link(configs: 'Sequence[Config]', names: Sequence[str], changes: Sequence[Changes]) -> list[Linked]:
  """Replaces names of arms by their ids, parents first, since an arm's id depends on its parents'.

  A reference means the arm of that name (from `label`, or as given). Among several: the one with the same seed, the
  same order of data, and the same of whatever else the sweep varies in all of them and in the arm that refers to it.
  """
  done: dict[int, Linked] = {}
  by_label, by_given = _by_name(names), _by_name(config.name for config in configs)

  def visit(i: int, path: tuple[int, ...]) -> Linked:
    if i in path:
      raise ConfigError(
        'arms depend on each other: ' + ' -> '.join(repr(names[j]) for j in (*path[path.index(i) :], i))
      )
    if i not in done:
      ids, groups = {}, {}
      for key, wanted in arm_references(configs[i]):
        found = {parent.arm_id: parent for parent in (visit(j, (*path, i)) for j in candidates(i, key, wanted))}
        if len(found) > 1:
          raise ConfigError(
            f'{key}={wanted!r} (in the arm {names[i]!r}): could be any of {len(found)} arms of that name'
          )
        ids[key], groups[key] = next((p.arm_id, p.group) for p in found.values())
      config = override(configs[i], ids)
      group = semantic_hash(override(config, {**groups, **dict.fromkeys(SEEDS, 0)}))
      done[i] = Linked(semantic_hash(config), group, config)
    return done[i]

  def candidates(i: int, key: str, wanted: str) -> list[int]:
    found = by_label.get(wanted) or by_given.get(wanted)
    if not found:
      known = ', '.join(dict.fromkeys(names))
      raise ConfigError(f'{key}={wanted!r} (in the arm {names[i]!r}): no arm has that name; there is: {known}')
    found = [j for j in found if configs[j].seed == configs[i].seed] or found
    found = [j for j in found if configs[j].data.seed == configs[i].data.seed] or found
    common = [k for k in changes[i] if all(k in changes[j] for j in found)]
    varied = [k for k in common if any(changes[j][k] != changes[found[0]][k] for j in found)]
    return [j for j in found if all(changes[j][k] == changes[i][k] for k in varied)] or found

  return [visit(i, ()) for i in range(len(configs))]


def _arms(base: 'Config', configs: 'Sequence[Config]', names: Sequence[str], links: Sequence[Linked]) -> list[Arm]:
  arms: dict[str, Arm] = {}
  for named, name, (arm_id, group, config) in zip(configs, names, links, strict=True):
    if arm_id in arms:
      if name not in (arms[arm_id].name, *arms[arm_id].aliases):
        arms[arm_id] = arms[arm_id]._replace(aliases=(*arms[arm_id].aliases, name))
      continue
    config = dataclasses.replace(config, name=name)
    arms[arm_id] = Arm(arm_id, name, config, dict(arm_references(config)), differences(base, named), group)
  return _parents_first(arms)


def differences(base: 'Config', other: 'Config') -> dict[str, tuple[Any, Any]]:
  """`config.diff` for people: without labels and what is computed; a new transform is held against its defaults."""
  own = {type(part): part for part in base.transforms}
  like = dataclasses.replace(base, transforms=tuple(own.get(type(part), type(part)()) for part in other.transforms))
  changed = {key: values for key, values in diff(like, other).items() if key not in DERIVED}
  before, here = ([kind_of(part) for part in config.transforms] for config in (base, other))
  return changed if before == here else {'transforms': (before, here), **changed}


def _parents_first(arms: Mapping[str, Arm]) -> list[Arm]:
  ordered: dict[str, Arm] = {}

  def place(arm: Arm) -> None:
    if arm.arm_id in ordered:
      return
    for parent in arm.parents.values():
      place(arms[parent])
    ordered[arm.arm_id] = arm

  for arm in arms.values():
    place(arm)
  return list(ordered.values())
