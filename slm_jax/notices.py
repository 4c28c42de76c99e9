"""Notices: what changes what a model reads, in sentences, printed once a launch and kept in the run.json of every arm.

The parts of a data set make them (`Dataset.notices`), the same at every opening, so that an arm which finds everything
prepared tells as much as the one that prepared it. `show` prints those that this process has not printed before.
"""

from collections.abc import Iterable

from slm_jax import distributed

_shown: set[str] = set()


def begin() -> None:
  """Starts a launch: what an earlier one printed is printed again."""
  _shown.clear()


def show(lines: Iterable[str]) -> None:
  """Prints the lines that are new; of several processes, the first one does."""
  for line in dict.fromkeys(lines):
    if line not in _shown and distributed.is_main():
      print(f'notice: {line}', flush=True)
    _shown.add(line)
