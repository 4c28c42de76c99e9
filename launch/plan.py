"""A launch that has been checked: what every engine is given."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from slm_jax.ablate import workdir as workdirs
from slm_jax.ablate.arms import Arm
from slm_jax.ablate.workdir import Experiment
from slm_jax.config import to_dict
from slm_jax.files import write_json


class Plan(NamedTuple):
  """The arms of a launch, parents first, and how to start any one of them by itself."""

  module: ModuleType
  workdir: Path
  arms: Sequence[Arm]
  options: Sequence[str]  # of the command line, those that decide what the arms are
  baseline: str  # name of the arm that others are compared with

  @property
  def name(self) -> str:
    return experiment_name(self.module)

  def command(self, arm_id: str) -> str:
    """One shell line that runs one arm; the same on every engine."""
    spec = getattr(self.module, '__spec__', None)
    start = ['-m', spec.name] if spec else [getattr(self.module, '__file__', None) or self.name]
    return shlex.join(['python', *start, *self.options, f'--workdir={self.workdir}', f'--arm={arm_id}'])

  def experiment(self) -> Experiment:
    """What experiment.json should say of this launch: earlier launches' arms are kept, and so is the answer."""
    before = workdirs.read_experiment(self.workdir) or Experiment(self.name)
    arms = dict(before.arms)
    for arm in self.arms:
      arms[arm.arm_id] = {
        'name': arm.name,
        'group': arm.group,
        'parents': sorted(set(arm.parents.values())),
        'diff': {key: list(values) for key, values in arm.diff.items()},
        'command': self.command(arm.arm_id),
      }
    return before._replace(
      question=(self.module.__doc__ or '').strip(),
      baseline=self.baseline,
      latest=tuple(arm.arm_id for arm in self.arms),
      arms=arms,
    )

  def record(self) -> None:
    """Writes experiment.json, and config.json of the arms that have none."""
    with workdirs.writing(self.workdir):
      workdirs.write_experiment(self.workdir, self.experiment())
      for arm in self.arms:
        path = workdirs.folder(self.workdir, arm.arm_id) / 'config.json'
        if not path.exists():
          write_json(path, to_dict(arm.config))


def experiment_name(module: ModuleType) -> str:
  """'shrink' of experiments/shrink.py, whether imported, run by `python -m` or run as a file."""
  spec = getattr(module, '__spec__', None)
  name = spec.name if spec else Path(getattr(module, '__file__', None) or module.__name__).stem
  return name.removeprefix('experiments.')
