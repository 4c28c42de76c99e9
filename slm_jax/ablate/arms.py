"""From an experiment file to its arms: expanded, checked, linked to their parents and named by what they are.

An experiment module has `config() -> Config` and any number of `sweep()` / `sweep_<name>()` generators of dotted
overrides. An arm is one resolved configuration; its id is the hash of the semantic part, in which every reference to
another arm is that arm's id. So an id says what a run *is*, its teacher and its teacher's teacher included, and two
arms of one id are one run.
"""

import dataclasses
import functools
import inspect
import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from slm_jax.ablate import sweep as sweeps
from slm_jax.ablate import unused
from slm_jax.ablate.sweep import SEEDS, Changes
from slm_jax.config import (
  ConfigError,
  arm_references,
  check,
  diff,
  flatten,
  kind_of,
  override,
  require,
  semantic_hash,
)

if TYPE_CHECKING:
  from slm_jax.data.config import DataConfig
  from slm_jax.experiment import Config

MANY = 10_000  # arms of a sweep; more are likely a mistake
DIGITS = 6  # of a float in a name


class Arm(NamedTuple):
  """One run of a sweep."""

  arm_id: str
  name: str  # shared by the repetitions of an arm over seeds, and by nothing else
  config: 'Config'  # resolved: references to other arms are their ids
  parents: Mapping[str, str]  # {dotted key of the field that names it: arm id}
  diff: Mapping[str, tuple[Any, Any]]  # {dotted key: (in the base, here)}; references by name
  group: str  # the id without seeds, the parents' seeds included: what repetitions have in common
  aliases: tuple[str, ...] = ()  # names of further arms of the sweep that turned out to be this one

  @property
  def title(self) -> str:
    """For a line of what happens."""
    return f'{self.name}, seed {self.config.seed} ({self.arm_id})'


def expand(
  module: ModuleType,
  sweep_name: str | None = None,
  cli_overrides: Changes | None = None,
  *,
  seeds: int = 0,
  trials: Sequence[Changes] = (),
  limit: float = math.inf,
  fingerprint: 'Callable[[DataConfig], str] | None' = None,
) -> list[Arm]:
  """The arms of an experiment, parents before children and otherwise in the order of the sweep.

  sweep_name, seeds, limit: see `changes_of`. cli_overrides change the base, before a sweep that asks for it sees it.
  trials: overrides of more arms, those of a search; with them, the base is an arm only if a sweep has it.
  fingerprint: content hash of a data section; `slm_jax.data.sources.content_of` unless given.
  Raises ConfigError if any arm is impossible: none is returned unless all are sound.
  """
  base = base_of(module, cli_overrides)
  changes = [] if trials and not sweep_name else changes_of(module, sweep_name, base, seeds=seeds, limit=limit)
  changes = [*changes, *trials]
  content = _content_of(fingerprint)
  configs = [_resolve(base, change, content) for change in changes]
  unused.check(base_config(module), configs, changes[: len(changes) - len(trials)])
  names = label(configs, changes)
  return _arms(base, configs, names, link(configs, names, changes))


# ---------------------------------------------------------------------------------------------- base and changes


def base_config(module: ModuleType) -> 'Config':
  require(callable(getattr(module, 'config', None)), f'{module.__name__}: an experiment needs a function config()')
  base = module.config()
  require(dataclasses.is_dataclass(base), f'{module.__name__}: config() returned {base!r}, expected a Config')
  return base


def base_of(module: ModuleType, cli_overrides: Changes | None = None) -> 'Config':
  """The base with the overrides of the command line."""
  try:
    return override(base_config(module), cli_overrides or {})
  except ConfigError as error:
    raise ConfigError(f'--config.{error}' if cli_overrides else str(error)) from None


def sweeps_of(module: ModuleType) -> dict[str, Callable[..., Iterable[Changes]]]:
  """`{'sweep': sweep, 'lr': sweep_lr, ...}` in the order of definition."""
  found = {}
  for name, value in vars(module).items():
    if callable(value) and (name == 'sweep' or name.startswith('sweep_')):
      found[name.removeprefix('sweep_')] = value
  return found


def changes_of(
  module: ModuleType, sweep_name: str | None, base: 'Config', *, seeds: int = 0, limit: float = math.inf
) -> list[Changes]:
  """The overrides of every arm.

  sweep_name: 'a' for `sweep_a`, 'a,b' for the product of two, 'none' for the base alone. Not given: `sweep()` if there
  is one, else the only sweep; a file without sweeps has one arm, its base.
  seeds: repeats all of it with so many seeds, if positive.
  limit: more arms than that are a ConfigError, raised before they are made; so are more than `sweeps.LARGEST`.
  """
  limit, known = min(limit, sweeps.LARGEST), sweeps_of(module)
  if not sweep_name:
    require(
      'sweep' in known or len(known) < 2, f'--sweep: name one or more of {", ".join(known)}; or none for the base alone'
    )
    sweep_name = 'sweep' if 'sweep' in known else next(iter(known), 'none')
  parts: list[list[Changes]] = [] if sweep_name != 'none' else [[{}]]
  for name in sweep_name.split(',') if sweep_name != 'none' else ():
    require(name in known, f'--sweep={name}: no such sweep; there is: {", ".join([*known, "none"])}')
    parts.append(_yielded(name, known[name], base, limit))
  if seeds:
    own = next((key for part in parts for change in part for key in SEEDS if key in change), None)
    require(own is None, f'--seeds={seeds}: the sweep sets {own} itself')
  n = math.prod(map(len, parts)) * (seeds or 1)
  require(n <= limit, f'sweep {sweep_name!r}: {n:,} arms{_hint(limit)}')
  return list(sweeps.product(*parts, *([sweeps.seeds(seeds)] if seeds else [])))


def _hint(limit: float) -> str:
  return '; --yes if so many are meant' if limit < sweeps.LARGEST else f'; at most {sweeps.LARGEST:,} can be held'


def _yielded(name: str, function: Callable[..., Iterable[Changes]], base: 'Config', limit: float) -> list[Changes]:
  yielded = function(base) if wants_base(function) else function()
  require(isinstance(yielded, Iterable), f'sweep {name!r}: gives {yielded!r}, not dicts of {{"dotted.key": value}}')
  changes = list(itertools.islice(yielded, int(limit) + 1))
  require(len(changes) > 0, f'sweep {name!r}: yields no arms')
  require(len(changes) <= limit, f'sweep {name!r}: more than {limit:,} arms{_hint(limit)}')
  for change in changes:
    require(isinstance(change, Mapping), f'sweep {name!r}: yields {change!r}, expected {{"dotted.key": value}}')
  return changes


def wants_base(function: Callable[..., Any], already: int = 0) -> bool:
  """Whether it has one more parameter that must be given, besides the first `already`."""
  parameters = list(inspect.signature(function).parameters.values())
  return any(p.default is p.empty for p in parameters[already:])


def _resolve(base: 'Config', change: Changes, content: 'Callable[[DataConfig], str]') -> 'Config':
  try:
    config = check(override(base, change))
    given = config.data.content
    require(not given, f"config.data.content={given!r}: is computed of what the sources hold; allowed: ''")
    data = dataclasses.replace(config.data, content=content(config.data))
    transforms = tuple(part.resolved(f'config.transforms.{part.kind}') for part in config.transforms)
    return dataclasses.replace(config, data=data, transforms=transforms)
  except ConfigError as error:
    where = ', '.join(f'{k}={shown(v)}' for k, v in change.items())
    raise ConfigError(f'{error} (in the arm {where})' if change else str(error)) from None


def _content_of(fingerprint: 'Callable[[DataConfig], str] | None') -> 'Callable[[DataConfig], str]':
  if fingerprint is None:
    from slm_jax.data import sources  # heavier than the rest, and not needed to refuse a wrong sweep

    fingerprint = sources.content_of
  cached = functools.cache(fingerprint)
  return lambda data: cached(dataclasses.replace(data, seed=0, content=''))  # the order of batches is not content


# ------------------------------------------------------------------------------------------------------- names


def label(configs: 'Sequence[Config]', changes: Sequence[Changes]) -> list[str]:
  """Names that tell apart what differs in more than its seeds: the given ones, followed by what varies where needed."""
  names = [''] * len(configs)
  for given, members in _places(config.name for config in configs).items():
    keys = dict.fromkeys(k for i in members for k in changes[i] if k not in ('name', *SEEDS))
    texts: dict[str, dict[int, str]] = {}
    for k in keys:
      setting = [i for i in members if k in changes[i]]
      found = dict(zip(setting, show_apart([changes[i][k] for i in setting]), strict=True))
      if len(set(found.values())) + (len(setting) < len(members)) > 1:
        texts[k] = found
    last = [k.rsplit('.', 1)[-1] for k in texts]
    short = {k: k if last.count(tail) > 1 else tail for k, tail in zip(texts, last, strict=True)}
    for i in members:
      parts = [f'{short[k]}={of[i]}' for k, of in texts.items() if i in of]
      names[i] = ' '.join([given, *parts] if given else parts) or 'base'
  return names


def _places(keys: Iterable[Any]) -> dict[Any, list[int]]:
  """Where each key stands."""
  places: dict[Any, list[int]] = {}
  for i, key in enumerate(keys):
    places.setdefault(key, []).append(i)
  return places


def show_apart(values: Sequence[Any]) -> list[str]:
  """The values for people, floats with as many digits as tell them apart."""
  different = len({repr(value) for value in values})
  for digits in (DIGITS, 9, 12):
    texts = [shown(value, digits) for value in values]
    if len(set(texts)) == different:
      return texts
  return [shown(value, 17) for value in values]


def shown(value: Any, digits: int = DIGITS) -> str:
  """A value of a setting, for people: `0.001`, `a+b`, `distill(weight=0.3)`. digits: of a float, at most."""
  if isinstance(value, float):
    return f'{value:.{digits}g}'
  if isinstance(value, (tuple, list)):
    return '+'.join(shown(item, digits) for item in value) or 'none'
  if dataclasses.is_dataclass(value):
    set_here = [f.name for f in dataclasses.fields(value) if getattr(value, f.name) != f.default]
    inside = ', '.join(f'{name}={shown(getattr(value, name), digits)}' for name in set_here)
    return getattr(value, 'kind', type(value).__name__) + (f'({inside})' if inside else '')
  return str(value)


# ------------------------------------------------------------------------------------------- references to arms


class Linked(NamedTuple):
  arm_id: str
  group: str
  config: 'Config'  # with ids in place of names
  parents: Mapping[str, str]  # {dotted key: arm id}


def link(configs: 'Sequence[Config]', names: Sequence[str], changes: Sequence[Changes]) -> list[Linked]:
  """Replaces names of arms by their ids, parents first, since an arm's id depends on its parents'.

  A reference means the arm of that name (from `label`, or as given). Among several: the one with the same seed, the
  same order of data, and the same of whatever else the sweep varies in all of them and in the arm that refers to it.
  """
  done: dict[int, Linked] = {}
  candidates = _candidates(configs, names, changes)
  identity = functools.cache(semantic_hash)  # repetitions have one group

  def visit(i: int, path: tuple[int, ...]) -> Linked:
    if i in path:
      raise ConfigError(
        'arms depend on each other: ' + ' -> '.join(repr(names[j]) for j in (*path[path.index(i) :], i))
      )
    if i not in done:
      ids, groups, parents = {}, {}, {}
      for key, wanted in arm_references(configs[i]):
        found = {parent.arm_id: parent for parent in (visit(j, (*path, i)) for j in candidates(i, key, wanted))}
        if len(found) > 1:
          raise ConfigError(
            f'{key}={wanted!r} (in the arm {names[i]!r}): could be any of {len(found)} arms of that name'
          )
        (parent,) = found.values()
        ids[key], groups[key], parents[key] = parent.arm_id, parent.group, parent.config
      try:
        configs[i].check_parents(parents)
      except ConfigError as error:
        raise ConfigError(f'{error} (in the arm {names[i]!r})') from None
      config = override(configs[i], ids)
      group = identity(override(config, {**groups, **dict.fromkeys(SEEDS, 0)}))
      done[i] = Linked(identity(config), group, config, ids)
    return done[i]

  return [visit(i, ()) for i in range(len(configs))]


def _candidates(
  configs: 'Sequence[Config]', names: Sequence[str], changes: Sequence[Changes]
) -> Callable[[int, str, str], list[int]]:
  """The function from (an arm, its key, the name there) to the arms that may be meant; see `link`.

  Everything is looked up: thousands of arms may each refer to one of thousands.
  """
  labels, given = set(names), [config.name for config in configs]
  seeds = [(config.seed, config.data.seed) for config in configs]
  kinds = ((True, True), (True, False), (False, True), (False, False))  # which seeds must be the same, best first

  def seeds_of(i: int, kind: tuple[bool, bool]) -> tuple[int | None, ...]:
    return tuple(seed if needed else None for seed, needed in zip(seeds[i], kind, strict=True))

  @functools.cache
  def of(kind: tuple[bool, bool], by_label: bool) -> dict[Hashable, list[int]]:
    return _places((name, seeds_of(i, kind)) for i, name in enumerate(names if by_label else given))

  @functools.cache
  def varied(kind: tuple[bool, bool], by_label: bool, at: Hashable) -> tuple[str, ...]:
    first, *others = (changes[j] for j in of(kind, by_label)[at])
    common = [key for key in first if all(key in other for other in others)]
    return tuple(key for key in common if any(other[key] != first[key] for other in others))

  @functools.cache
  def of_values(
    kind: tuple[bool, bool], by_label: bool, at: Hashable, keys: tuple[str, ...]
  ) -> Mapping[Any, list[int]]:
    found = of(kind, by_label)[at]
    places = _places(tuple(_hashable(changes[j][key]) for key in keys) for j in found)
    return {values: [found[p] for p in where] for values, where in places.items()}

  def candidates(i: int, key: str, wanted: str) -> list[int]:
    by_label = wanted in labels
    for kind in kinds:
      at = (wanted, seeds_of(i, kind))
      if at in of(kind, by_label):
        keys = tuple(k for k in varied(kind, by_label, at) if k in changes[i])
        same = of_values(kind, by_label, at, keys).get(tuple(_hashable(changes[i][k]) for k in keys))
        return same or of(kind, by_label)[at]
    known = ', '.join(dict.fromkeys(names))
    raise ConfigError(f'{key}={wanted!r} (in the arm {names[i]!r}): no arm has that name; there is: {known}')

  return candidates


def _hashable(value: Any) -> Hashable:
  try:
    hash(value)
  except TypeError:
    return repr(value)
  return value


def _arms(base: 'Config', configs: 'Sequence[Config]', names: Sequence[str], links: Sequence[Linked]) -> list[Arm]:
  arms: dict[str, Arm] = {}
  aliases: dict[str, dict[str, None]] = {}
  for named, name, (arm_id, group, config, parents) in zip(configs, names, links, strict=True):
    if arm_id in arms:
      aliases.setdefault(arm_id, {})[name] = None
      continue
    config = dataclasses.replace(config, name=name)
    arms[arm_id] = Arm(arm_id, name, config, parents, differences(base, named), group)
  for arm_id, others in aliases.items():
    arms[arm_id] = arms[arm_id]._replace(aliases=tuple(other for other in others if other != arms[arm_id].name))
  return _parents_first(arms)


def differences(base: 'Config', other: 'Config') -> dict[str, tuple[Any, Any]]:
  """`config.diff` for people: without labels and what is computed; a new transform is held against its defaults."""
  own = {type(part): part for part in base.transforms}
  like = dataclasses.replace(base, transforms=tuple(own.get(type(part), type(part)()) for part in other.transforms))
  # What is computed, or a mere label, tells nobody how two arms differ.
  told = {key: values for key, values in diff(_flat(like), other).items() if key != 'name'}
  changed = {key: values for key, values in told.items() if not key.endswith('.content')}
  before, here = ([kind_of(part) for part in config.transforms] for config in (base, other))
  return changed if before == here else {'transforms': (before, here), **changed}


@functools.lru_cache(maxsize=64)
def _flat(config: 'Config') -> dict[str, Any]:
  return flatten(config)  # of the base, the same for all arms that have its transforms


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
