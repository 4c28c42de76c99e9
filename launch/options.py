"""The flags of a launch: what they are, how they are read, and their help."""

import inspect
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from absl import flags

from launch import budgets
from launch.engines import ENGINES, engine
from launch.plan import experiment_name
from slm_jax.ablate.arms import MANY, base_config, shown, sweeps_of
from slm_jax.config import flatten, require

PREFIX = '--config.'


def split_overrides(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
  """`({'a.b': 'v'}, the other arguments)` of `--config.a.b=v` and `--config.a.b v`."""
  overrides, rest, arguments = {}, [], iter(argv)
  for argument in arguments:
    if not argument.startswith((PREFIX, PREFIX[1:])):
      rest.append(argument)
      continue
    key, equals, value = argument.lstrip('-').removeprefix('config.').partition('=')
    if not equals:
      value = next(arguments, '--')
      require(not value.startswith('--'), f'{PREFIX}{key}: needs a value, as in {PREFIX}{key}=VALUE')
    overrides[key] = value
  return overrides, rest


def parse(argv: Sequence[str], name: str) -> flags.FlagValues:
  """The flags of a launch. Raises flags.Error or ConfigError for anything else."""
  values = flags.FlagValues()
  text = 'which sweep to run: NAME of a sweep_NAME(), several as A,B for their product, none for the base alone'
  flags.DEFINE_string('sweep', None, text, flag_values=values)
  flags.DEFINE_integer('seeds', None, 'repeat a sweep that sets no seeds with so many', 1, flag_values=values)
  text = 'only these arms: names, beginnings of ids or key=value, with * and ?; what they build on comes along'
  flags.DEFINE_list('only', None, text, flag_values=values)
  flags.DEFINE_list('exclude', None, 'all arms but these, given as for --only', flag_values=values)
  flags.DEFINE_integer('limit', None, 'the first so many arms, and what they build on', 1, flag_values=values)
  flags.DEFINE_bool('yes', False, f'more than {MANY:,} arms are meant', flag_values=values)
  text = 'let search(trial) ask for so many arms, each in view of the losses before it; needs Optuna'
  flags.DEFINE_integer('search', None, text, 1, flag_values=values)
  flags.DEFINE_integer('search_round', 1, 'trials that a search asks for at a time', 1, flag_values=values)
  text = 'ID1,ID2: show the settings in which the ids of two arms differ, of this sweep or in the workdir'
  flags.DEFINE_list('why', None, text, flag_values=values)
  flags.DEFINE_string('workdir', f'runs/{name}', 'folder of the results', flag_values=values)
  flags.DEFINE_enum('launch', 'local', list(ENGINES), 'engine', flag_values=values)
  flags.DEFINE_bool(
    'dry_run', False, 'show the arms, what they take and their commands; write nothing', flag_values=values
  )
  flags.DEFINE_list(
    'arm', None, 'run only the arms with these ids, here and now: what a worker does', flag_values=values
  )
  text = 'whether this worker is one of several processes that train an arm together: as JAX detects it (auto; on: or'
  text += ' end), off, or ADDRESS:PORT,COUNT,INDEX'
  flags.DEFINE_string('distributed', 'auto', text, flag_values=values)
  flags.DEFINE_integer(
    'arms_per_job',
    0,
    'arms that one worker runs (default: one, or its share of those that can train in one program)',
    0,
    flag_values=values,
  )
  text = 'FIRST,LAST: take an XProf trace of these steps of each arm (--config.run.profile)'
  flags.DEFINE_string('profile', '', text, flag_values=values)
  text = 'make finished arms again that were made by other code than this, and what builds on them'
  flags.DEFINE_bool('rerun', False, text, flag_values=values)
  flags.DEFINE_bool('fail_fast', False, 'stop at the first arm that fails', flag_values=values)
  budgets.define(values)
  flags.DEFINE_bool('help', False, 'show this', short_name='h', flag_values=values)
  for name in ENGINES:
    engine(name).define(values)
  values.set_gnu_getopt(True)
  stray = values([name, *argv])[1:]
  require(not stray, f'{" ".join(stray)!r}: not a flag; settings are given as {PREFIX}KEY=VALUE')
  for name in ('sweep', 'only', 'exclude', 'why', 'workdir', 'arm'):  # an unset variable of a shell means nothing
    require(bool(values[name].value) or not values[name].present, f'--{name}: needs a value')
  return values


def help_text(module: ModuleType, options: flags.FlagValues) -> str:
  lines = [(module.__doc__ or experiment_name(module)).strip(), '', 'Flags:']
  for flag in (options[name] for name in dict.fromkeys(options[key].name for key in options) if name != 'help'):
    default = '' if flag.default in (None, False) else f' (default: {flag.default})'
    lines.append(f'  --{flag.name}: {flag.help}{default}')
  lines += ['', 'Sweeps:']
  for name, function in sweeps_of(module).items():
    about = (inspect.getdoc(function) or '').partition('\n')[0]
    lines.append(f'  {name}: {about}' if about else f'  {name}')
  lines += ['', 'Settings:']
  lines += [f'  {PREFIX}{key}={_as_given(value)}' for key, value in flatten(base_config(module)).items()]
  return '\n'.join(lines)


def _as_given(value: Any) -> str:
  """A value as the command line takes it, if it can be given there."""
  if value is None:
    return ''
  return ','.join(map(shown, value)) if isinstance(value, list) else shown(value)
