"""Adaptive search: an experiment file says what may vary, and each trial is an ordinary arm.

    def search(trial):      # beside config(); search(trial, base) if it wants the base
      return {'optim.learning_rate': trial.suggest_float('learning_rate', 1e-4, 1e-2, log=True)}

Optuna (the extra 'search') asks for trials and is told their final losses, in bits per byte. Its sampler is the
tree-structured Parzen estimator (Bergstra et al., NeurIPS 2011). It keeps nothing: a sampler of fixed seed that is told
the same losses in the same order asks for the same trials. So what was done before is found in the results of the arms,
and only there.

A search has looked at its seeds; what it finds is to be compared with anything else on other ones.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from slm_jax.ablate import workdir as workdirs
from slm_jax.ablate.arms import wants_base
from slm_jax.ablate.sweep import Changes
from slm_jax.config import ConfigError, require, to_install
from slm_jax.run_files import read_run

if TYPE_CHECKING:
  from slm_jax.experiment import Config

Losses = Callable[[Sequence[Changes]], Sequence[float | None]]  # of the arms with these overrides; None: not known


def explore(module: ModuleType, base: 'Config', n: int, together: int, losses: Losses) -> None:
  """Asks for n trials, `together` at a time (the last round may have fewer), and for their losses after each round.

  Ends early where a loss is not known. Trials are named 'trial 0', 'trial 1', ... The n of a shorter search are the
  first ones of a longer one; another `together` is another search. ConfigError if the module has no search(trial), or
  it returns anything but overrides.
  """
  optuna = _optuna()
  study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))  # the smaller, the better
  function = getattr(module, 'search', None)
  require(callable(function), f'--search={n}: {module.__name__} has no function search(trial)')
  for first in range(0, n, together):
    trials = [study.ask() for _ in range(first, min(first + together, n))]
    found = losses([_changes(function, trial, base) for trial in trials])
    for trial, loss in zip(trials, found, strict=True):
      if loss is None:
        return
      study.tell(trial, loss)


def _changes(function: Any, trial: Any, base: 'Config') -> Changes:
  changes = function(trial, base) if wants_base(function, already=1) else function(trial)
  require(isinstance(changes, dict), f'search(trial) returned {changes!r}, expected {{"dotted.key": value}}')
  require('name' not in changes, "search(trial) sets 'name'; trials have names of their own")
  return {'name': f'trial {trial.number}', **changes}


def outcome(workdir: Path, arm_id: str) -> float | None:
  """Bits per byte of an arm that is done, infinity if it diverged; None if it is to be run (again).

  Bits per byte order trials of one tokenizer as their losses do, and compare trials of several.
  """
  run, _ = read_run(workdirs.folder(workdir, arm_id))
  if workdirs.is_done(workdir, arm_id) and 'summary' in run:
    return float(run['summary']['bits_per_byte'])
  return math.inf if run.get('status') in ('diverged', 'nan') else None  # nan: of format 1


def check_comparable(workdir: Path, arm_ids: Iterable[str]) -> None:
  """ConfigError if trials that are done were evaluated on different text: their losses rank nothing."""
  runs = [read_run(workdirs.folder(workdir, arm_id))[0] for arm_id in arm_ids]
  texts = {run['summary'].get('held_out') for run in runs if 'summary' in run}
  require(len(texts) < 2, 'search(trial): trials are evaluated on different held-out text, so that none is the best')


def _optuna() -> Any:
  try:
    import optuna
  except ImportError:
    raise ConfigError(f'--search: needs Optuna; {to_install("search")}, or pip install optuna') from None
  optuna.logging.set_verbosity(optuna.logging.WARNING)
  return optuna
