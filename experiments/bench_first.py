"""How soon does the first step come, from the start of Python to its metrics?

    python -m experiments.bench_first

Of the quickstart's student, with data and tokenizer there: with nothing compiled before (cold), and with its programs
in the cache (warm). Targets on two CPU cores: 15 s and 6 s.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from absl import app

from slm_jax import commands


def quickstart(steps: int) -> Any:
  """The student of `make quickstart`, from scratch."""
  from experiments import shrink
  from slm_jax.config import override

  changes = {'name': 'scratch', 'transforms': (), 'train.steps': steps, 'run.log_every': 1}
  return override(shrink.config(), changes)


FIRST = """
import time
began = time.time()
import pathlib, sys
from experiments.bench_first import quickstart
from slm_jax import train
from slm_jax.ledger import Ledger
settle = Ledger.settle
def settled(self):
  waiting = self._pending is not None
  settle(self)
  if waiting:
    print('first', time.time() - began, flush=True)
Ledger.settle = settled
sys.exit(train.run(quickstart(2), pathlib.Path(sys.argv[1]), sys.argv[2]))
"""


def first_step(workdir: Path, arm: str) -> float:
  """Seconds from the start of Python to the first metrics."""
  done = subprocess.run([sys.executable, '-c', FIRST, str(workdir), arm], stdout=subprocess.PIPE, text=True, check=True)
  return float(next(line for line in done.stdout.splitlines() if line.startswith('first')).split()[1])


def first_steps(workdir: Path) -> tuple[float, float]:
  """(cold, warm), with data and tokenizer there."""
  first_step(workdir, 'data')  # writes them; its programs are not to be found again
  shutil.rmtree(workdir / 'cache')
  return first_step(workdir, 'cold'), first_step(workdir, 'warm')


def main(argv: list[str]) -> None:
  if argv[1:]:
    sys.exit(f'error: {" ".join(argv[1:])}: takes no arguments')
  with tempfile.TemporaryDirectory() as folder:
    cold, warm = first_steps(Path(folder))
  print(f'cold {cold:.1f} s, warm {warm:.1f} s')


if __name__ == '__main__':
  commands.show_any_text()
  app.run(main)
