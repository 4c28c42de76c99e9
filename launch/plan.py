"""A launch that has been checked: what every engine is given."""

import datetime
import hashlib
import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from slm_jax import revision
from slm_jax.ablate import workdir as workdirs
from slm_jax.ablate.alike import groups
from slm_jax.ablate.arms import Arm
from slm_jax.ablate.workdir import Experiment, Launch
from slm_jax.config import to_dict
from slm_jax.files import write_json
from slm_jax.run_files import read_config


class Unit(NamedTuple):
  """What one worker is started for: arms that it runs, as populations where they can be and else one after another."""

  name: str  # unique, and safe in DNS, paths and shells: at most 28 of a-z, 0-9 and -, the first one a letter
  arms: tuple[str, ...]  # arm ids, parents first
  after: tuple[str, ...] = ()  # names of the units that hold parents of its arms: they must be done before


class Plan(NamedTuple):
  """The arms of a launch, parents first, and how to start any one of them by itself."""

  module: ModuleType
  workdir: Path
  arms: Sequence[Arm]
  options: Sequence[str]  # of the command line, those that decide what the arms are
  baseline: str  # name of the arm that others are compared with
  sweep: Sequence[Arm] = ()  # all arms of the sweep, if `arms` is a part of it
  # In a dry run, which moves nothing: {arm id: folder of an earlier version}, and what --rerun would make again.
  adoptable: Mapping[str, str] = {}
  again: Collection[str] = ()
  choice: Sequence[str] = ()  # of the command line, what chose among the arms: --only, --exclude, --limit
  files: Mapping[str, Path] = {}  # of the experiment and what it imports, see `revision.experiment_files`
  code: Mapping[str, str] = {}  # hashes of their content when the launch began
  own_train: bool = (
    False  # whether something else than slm_jax.train trains the arms: it decides how they are evaluated
  )

  @property
  def name(self) -> str:
    return experiment_name(self.module)

  @property
  def everyone(self) -> dict[str, Arm]:
    """All arms of the sweep by their ids."""
    return {arm.arm_id: arm for arm in self.sweep or self.arms}

  def is_done(self, arm_id: str) -> bool:
    return arm_id not in self.again and workdirs.is_done(self.workdir, self.adoptable.get(arm_id, arm_id))

  def is_finished(self, arm_id: str) -> bool:
    """Whether the arm is done, and was evaluated as is asked for now."""
    if self.own_train:
      return self.is_done(arm_id)
    folder, asked = self.adoptable.get(arm_id, arm_id), self.everyone[arm_id].config.eval
    return self.is_done(arm_id) and workdirs.is_evaluated(self.workdir, folder, asked)

  def command(self, *arm_ids: str) -> str:
    """One shell line that runs these arms; the same on every engine."""
    return shlex.join(self.argv(*arm_ids))

  def argv(self, *arm_ids: str) -> list[str]:
    """The command as a list; its first word stands for the interpreter."""
    spec = getattr(self.module, '__spec__', None)
    start = ['-m', spec.name] if spec else [getattr(self.module, '__file__', None) or self.name]
    return ['python', *start, *self.options, f'--workdir={self.workdir}', f'--arm={",".join(arm_ids)}']

  @property
  def is_whole(self) -> bool:
    """Whether these are all arms of the sweep."""
    return self.everyone.keys() == {arm.arm_id for arm in self.arms}

  def launch(self, before: Experiment) -> Launch:
    """What experiment.json should say of this launch. An earlier answer is kept if it is of the same arms and code."""
    ids, code = tuple(arm.arm_id for arm in self.arms), revision.digest(self.code)
    digest = hashlib.sha256(','.join(sorted(ids)).encode()).hexdigest()[:6]
    key = f'{"sweep" if self.is_whole else "part"}-{len(ids)}-arms-{digest}'
    earlier = next((each for each in before.launches if each.arms == ids and each.code == code), Launch(key))
    return earlier._replace(
      key=key,
      arms=ids,
      whole=self.is_whole,
      asked=shlex.join([*self.options, *self.choice]),
      question=(self.module.__doc__ or '').strip(),
      baseline=self.baseline,
      code=code,
    )

  def experiment(self) -> Experiment:
    """What experiment.json should say: this launch is the latest one, and what earlier ones left is kept."""
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
    return before._replace(arms=arms).with_launch(self.launch(before))

  def record(self) -> None:
    """Writes experiment.json, config.json of arms that have none or a damaged one, and a copy of the code."""
    now = datetime.datetime.now().astimezone().isoformat(timespec='seconds')
    with workdirs.recording(self.workdir):
      experiment = self.experiment()
      workdirs.write_experiment(self.workdir, experiment.with_launch(experiment.latest._replace(when=now)))
      workdirs.keep_code(self.workdir, self.files)
      for arm in self.arms:
        folder = workdirs.folder(self.workdir, arm.arm_id)
        if not read_config(folder)[0]:
          write_json(folder / 'config.json', to_dict(arm.config))


def units(plan: Plan, arms_per_job: int, workers: int | None = None) -> list[Unit]:
  """Returns the arms of a plan that are not finished as units of work, parents first.

  The arms of a unit do not build on each other.

  arms_per_job: so many arms, such as can share a program beside each other, are run by one worker. A unit has the same
    name when some of its arms are done: by it, the next launch knows that it runs. 0: arms that can share a program are
    shared out among so many workers; one arm a worker if their number is not known.
  """
  missing = {arm.arm_id: arm for arm in plan.arms if not plan.is_finished(arm.arm_id)}
  cut = list(plan.arms if arms_per_job else missing.values())
  level: dict[str, int] = {}  # the longest way to an arm from one without parents
  for arm in cut:
    level[arm.arm_id] = 1 + max((level.get(parent, -1) for parent in arm.parents.values()), default=-1)
  parts = []
  for height in sorted(set(level.values())):
    alike = groups({arm.arm_id: arm.config for arm in cut if level[arm.arm_id] == height})
    for ids in [[arm_id for group in alike for arm_id in group]] if arms_per_job else alike:
      size = arms_per_job or (-(-len(ids) // workers) if workers else 1)
      parts += [tuple(ids[i : i + size]) for i in range(0, len(ids), size)]
  left = {unit_name(plan.name, part): tuple(arm_id for arm_id in part if arm_id in missing) for part in parts}
  home = {arm_id: name for name, arms in left.items() for arm_id in arms}
  return [
    Unit(
      name,
      arms,
      tuple(dict.fromkeys(home[p] for arm_id in arms for p in missing[arm_id].parents.values() if p in home)),
    )
    for name, arms in left.items()
    if arms
  ]


def unit_name(experiment: str, arm_ids: Sequence[str]) -> str:
  """'shrink-3f9c0a1b2c4d': the experiment, shortened, and the arm's id, or a hash of several."""
  stem = re.sub('[^a-z0-9]+', '-', experiment.lower()).strip('-') or 'x'
  stem = stem if stem[0].isalpha() else f'x{stem}'
  one = arm_ids[0] if len(arm_ids) == 1 else hashlib.sha256(','.join(arm_ids).encode()).hexdigest()[:12]
  return f'{stem[:15].rstrip("-")}-{one}'


def experiment_name(module: ModuleType) -> str:
  """'shrink' of experiments/shrink.py, whether imported, run by `python -m` or run as a file."""
  spec = getattr(module, '__spec__', None)
  name = spec.name if spec else Path(getattr(module, '__file__', None) or module.__name__).stem
  return name.removeprefix('experiments.')
