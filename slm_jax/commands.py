"""Commands that a module has beside its functions: `python -m slm_jax.x.y --flag=VALUE`."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from slm_jax import ranges
from slm_jax.config import ConfigError, require


def check_ranges(options: flags.FlagValues, **within: str) -> None:
  """ConfigError unless each flag named in `within` lies in its range (ranges.py)."""
  for name, text in within.items():
    value: Any = options[name].value
    fault = ranges.parse(text).fault(value)
    require(not fault, f'--{name}={value}: {fault}')


def run(
  about: str | None,
  options: flags.FlagValues,
  words: Sequence[str] | None,
  needed: Sequence[str],
  made: Callable[[flags.FlagValues], str],
) -> int:
  """Reads the words (None: this process's) into the flags and prints what is made by them, or, for --help, `about`.

  The exit code: 0, or 1 with one line on stderr for a wrong flag, one of `needed` that is not there, or a ConfigError.
  """
  flags.DEFINE_boolean('help', False, 'show this', flag_values=options, short_name='h')
  try:
    rest = options(['command', *(sys.argv[1:] if words is None else words)])[1:]
    if options.help:
      print(f'{(about or "").strip()}\n\n{options.get_help()}')
      return 0
    require(not rest, f'unexpected: {" ".join(rest)}')
    for name in needed:
      require(options[name].value not in (None, '', []), f'--{name}: must be given')
    print(made(options))
    return 0
  except (ConfigError, flags.Error) as error:
    print('error:', ' '.join(str(error).split()), file=sys.stderr)
    return 1
