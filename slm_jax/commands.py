"""Commands that a module has beside its functions: `python -m slm_jax.x.y --flag=VALUE`; and what they write to."""

import codecs
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags

from slm_jax import ranges
from slm_jax.config import ConfigError, require

PLAIN = {'±': '+-', '×': 'x', '–': '-', '−': '-', '’': "'", '‖': '||', '…': '...'}  # what we write, for any terminal


def show_any_text() -> None:
  """Lets stdout and stderr show every text: a character that their encoding lacks is shown as plain ones, or as `?`.

  Called first by every command: with LANG=C or a Latin-1 terminal, a finished sweep ended with a UnicodeEncodeError.
  """
  codecs.register_error('plain', _plain)
  for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):
      stream.reconfigure(errors='plain')


def _plain(error: UnicodeError) -> tuple[str, int]:
  if not isinstance(error, UnicodeEncodeError):
    raise error
  return ''.join(map(_as_ascii, error.object[error.start : error.end])), error.end


def _as_ascii(character: str) -> str:
  if '\udc80' <= character <= '\udcff':  # a byte of a file's name that is not UTF-8
    return f'\\x{ord(character) - 0xDC00:02x}'
  return PLAIN.get(character, '?')


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
  show_any_text()
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


def require_effect(options: flags.FlagValues, needs: Mapping[str, tuple[str, str]]) -> None:
  """ConfigError for a flag that was given, and that counts only where another one has a certain value."""
  for name, (other, value) in needs.items():
    flag = options[name]
    idle = flag.present and flag.value != flag.default and options[other].value != value
    require(not idle, f'--{name}={flag.value}: has no effect without --{other}={value}')
