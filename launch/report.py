"""Tables on the terminal, and pages, from what the runs of a workdir left.

    python -m launch.report WORKDIR [--all]     its tables; results.csv and report.html anew
    python -m launch.report A B [--all]         two workdirs, arms of one name compared; B/compare.html

Without --all, tables and pages hold the arms of the latest launch; results.csv always holds every arm.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from slm_jax import commands
from slm_jax.ablate import compare, report
from slm_jax.ablate import workdir as workdirs
from slm_jax.config import ConfigError, require

USAGE = 'usage: python -m launch.report WORKDIR [--all], or two workdirs to compare them'


def main(argv: Sequence[str]) -> int:
  commands.show_any_text()
  if '--help' in argv:
    print(USAGE)
    return 0
  try:
    folders = [Path(argument) for argument in argv if argument != '--all']
    known = len(folders) in (1, 2) and not any(str(folder).startswith('-') for folder in folders)
    require(known, f'{USAGE}; got: {" ".join(argv) or "nothing"}')
    for workdir in folders:
      workdirs.check_arms(workdir)
    everything = '--all' in argv
    if len(folders) == 1:
      print(report.publish(folders[0], everything))
    else:
      print(compare.publish(folders[0], folders[1], everything))
  except ConfigError as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
