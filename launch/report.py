"""`python -m launch.report WORKDIR [--all]`: the table of a workdir on the terminal; results.csv and report.html anew.

Without --all, the table and the page hold the arms of the latest launch; results.csv always holds every arm.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from slm_jax.ablate import report
from slm_jax.config import ConfigError, require


def main(argv: Sequence[str]) -> int:
  try:
    folders = [argument for argument in argv if argument != '--all']
    known = len(folders) == 1 and not folders[0].startswith('-')
    require(known, f'usage: python -m launch.report WORKDIR [--all]; got: {" ".join(argv) or "nothing"}')
    workdir = Path(folders[0])
    require((workdir / 'arms').is_dir(), f'{workdir}: no arms there; expected the --workdir of an experiment')
    print(report.publish(workdir, everything='--all' in argv))
  except ConfigError as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
