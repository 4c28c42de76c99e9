"""What a worker does: arms in this process, parents first; those that can share a program together."""

import contextlib
import dataclasses
import functools
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from slm_jax import distributed
from slm_jax.ablate import workdir as workdirs
from slm_jax.ablate.alike import groups
from slm_jax.ablate.arms import Arm
from slm_jax.config import ConfigError
from slm_jax.preempt import EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED
from slm_jax.run_files import read_run

if TYPE_CHECKING:
  from slm_jax.experiment import Config

Train = Callable[..., int]  # (config, workdir, arm_id) -> exit code


def run_arms(
  arms: Sequence[Arm],
  workdir: Path,
  *,
  train: Train | None = None,
  code: Mapping[str, str] = {},
  admit: Callable[[Arm], str] = lambda arm: '',
  fail_fast: bool = False,
  say: Callable[[str], None] = print,
) -> int:
  """Runs what is not done yet, parents first; returns 0 if all is done in the end, 42 if asked to stop, else 1.

  An arm that fails (a NaN, a bug) stops only the arms that build on it. train: `slm_jax.train.run` unless given.
  code: hashes of the experiment's own files, for run.json (`Plan.code`).
  admit: says why an arm may not be started, '' if it may; after the first that may not, none is.
  """
  titles = {arm.arm_id: f'[{i}/{len(arms)}] {arm.title}' for i, arm in enumerate(arms, 1)}
  is_finished = functools.partial(_is_finished, workdir=workdir, own_train=train is not None)
  waiting = [arm for arm in arms if not is_finished(arm)]
  say = say if distributed.is_main() else lambda line: None
  try:
    with sigterm_like_ctrl_c():
      while ready := [arm for arm in waiting if not _waits_for(arm, workdir)]:
        if _is_done(ready[0].arm_id, workdir):
          group, how, word = [ready[0]], _evaluate_again, 'is evaluated again'
        else:
          group, refusal = _admitted([ready[0]] if train else _population(ready, workdir), admit)
          how, word = train or _default_train(code), 'starts'
          if refusal:
            say(f'{titles[ready[0].arm_id]}: not started, {refusal}; {len(waiting)} arms are left')
            waiting = []
            break
        for arm in group:
          say(f'{titles[arm.arm_id]}: {word}' + (f', in one program with {len(group) - 1} more' if group[1:] else ''))
          waiting.remove(arm)
        codes = _run_group(group, workdir, how, code)
        for arm in group:
          if codes[arm.arm_id] != EXIT_PREEMPTED:
            say(f'{titles[arm.arm_id]}: {outcome(workdir, arm, codes[arm.arm_id])}')
        if EXIT_PREEMPTED in codes.values():
          raise KeyboardInterrupt
        if any(codes.values()):
          if not distributed.failed_together():
            return EXIT_FAILED
          if fail_fast:
            break
      else:
        for arm in waiting:
          say(f'{titles[arm.arm_id]}: blocked, {", ".join(_waits_for(arm, workdir))} is not done')
  except KeyboardInterrupt:
    say('stopped; launch again to go on from here')
    return EXIT_PREEMPTED
  return EXIT_DONE if all(map(is_finished, arms)) else EXIT_FAILED


def _is_finished(arm: Arm, workdir: Path, own_train: bool = False) -> bool:
  """Whether the arm is done, and was evaluated as is asked for now (by its own `train`, however that did it)."""
  as_asked = distributed.on_main(workdirs.is_evaluated, workdir, arm.arm_id, arm.config.eval)
  return _is_done(arm.arm_id, workdir) and (own_train or as_asked)


def _is_done(arm_id: str, workdir: Path) -> bool:
  """As the first of several processes sees it: all must do the same."""
  return distributed.on_main(workdirs.is_done, workdir, arm_id)


def _waits_for(arm: Arm, workdir: Path) -> list[str]:
  """What the arm still needs. One that is done needs nothing: it is only evaluated."""
  if _is_done(arm.arm_id, workdir):
    return []
  return [parent for parent in arm.parents.values() if not _is_done(parent, workdir)]


def _population(ready: Sequence[Arm], workdir: Path) -> list[Arm]:
  """The first of the arms, and those that can train with it in one program."""
  import jax

  run = ready[0].config.run
  one_device = jax.device_count() == 1 or run.data_parallel * run.fsdp * run.tensor == 1
  if not one_device or jax.process_count() > 1:
    return [ready[0]]
  by_id = {arm.arm_id: arm for arm in ready if not _is_done(arm.arm_id, workdir)}
  return [by_id[arm_id] for arm_id in groups({i: arm.config for i, arm in by_id.items()})[0]]


def _admitted(group: list[Arm], admit: Callable[[Arm], str]) -> tuple[list[Arm], str]:
  """`(the arms of the group that may be started, why not if there are none)`."""
  refusals = [distributed.on_main(admit, arm) for arm in group]
  allowed = [arm for arm, refusal in zip(group, refusals, strict=True) if not refusal]
  return allowed, '' if allowed else refusals[0]


def check_memory(arms: Sequence[Arm], workdir: Path) -> None:
  """ConfigError if an arm that is not done surely takes more memory than the devices of this process have."""
  import jax

  from slm_jax import memory

  seen = set()
  for config in (arm.config for arm in arms if not workdirs.is_done(workdir, arm.arm_id)):
    key = memory.of_device(config, jax.device_count())
    if key not in seen:
      memory.check(config, jax.devices())
    seen.add(key)


def preflight(arms: Sequence[Arm], workdir: Path, own_devices: bool = True) -> None:
  """ConfigError if the data or the devices cannot serve an arm; then `workdir` is as it was. Prints notices.

  Tokenises what is not tokenised yet: a text that cannot be read shows before the first arm starts, not after hours.
  own_devices: False where the devices of this process only stand for those of the workers.
  """
  from slm_jax import notices, perf, train

  perf.keep_freed_memory()  # this is the first to use the devices
  if own_devices:
    check_memory(arms, workdir)
  seen = set()
  try:
    with workdirs.writing(workdir):
      for config in (arm.config for arm in arms if not _is_finished(arm, workdir)):
        data = dataclasses.replace(config.data, seed=0)
        key = (data, config.model.vocab_size, config.run, config.train.accumulate)
        if key not in seen:
          dataset, _ = train.inputs(config, workdir)
          notices.show(dataset.notices)
        seen.add(key)
  except ConfigError:
    for folder in (workdir / 'data', workdir):  # what a failed attempt may leave
      with contextlib.suppress(OSError):
        folder.rmdir()
    raise


def _run_group(group: Sequence[Arm], workdir: Path, train: Train, code: Mapping[str, str]) -> dict[str, int]:
  """The exit code of every arm; whatever is raised is shown here, so that other arms can go on."""
  codes: dict[str, int] = {}
  with contextlib.ExitStack() as locks:
    mine: dict[str, Config] = {}
    for arm in group:
      try:
        distributed.on_main(locks.enter_context, workdirs.lock(workdirs.folder(workdir, arm.arm_id)))
        mine[arm.arm_id] = arm.config
      except ConfigError as error:
        codes[arm.arm_id] = EXIT_FAILED
        print(f'error: {error}', file=sys.stderr)
    for members in groups(mine):  # of what is left of the group
      if EXIT_PREEMPTED in codes.values():
        break
      try:
        if members[1:]:
          codes |= _train_together()({arm_id: mine[arm_id] for arm_id in members}, workdir, code)
        else:
          codes[members[0]] = train(mine[members[0]], workdir, members[0])
      except Exception as error:
        codes |= dict.fromkeys(members, EXIT_FAILED)
        if isinstance(error, ConfigError):
          print(f'error: {error}', file=sys.stderr)
        else:
          traceback.print_exc()
  never_run = EXIT_PREEMPTED if EXIT_PREEMPTED in codes.values() else EXIT_FAILED
  return {arm.arm_id: codes.get(arm.arm_id, never_run) for arm in group}


def _train_together() -> Callable[..., dict[str, int]]:
  from slm_jax.ablate.population import run

  return run


def _evaluate_again(config: 'Config', workdir: Path, arm_id: str) -> int:
  from slm_jax import reevaluate  # heavy, as is training

  return reevaluate.run(config, workdir, arm_id)


def _default_train(code: Mapping[str, str]) -> Train:
  def train(config: 'Config', workdir: Path, arm_id: str) -> int:
    from slm_jax.train import run  # heavy, and not needed where all is done

    return run(config, workdir, arm_id, code)

  return train


def outcome(workdir: Path, arm: Arm, code: int) -> str:
  """What became of an arm that ended with `code`, in words."""
  run, _ = read_run(workdirs.folder(workdir, arm.arm_id))
  if code != EXIT_DONE:
    word = 'diverged' if run.get('status') in ('diverged', 'nan') else 'failed'
    return f'{word} ({run.get("error") or f"exit code {code}"})'
  summary = run.get('summary', {})
  known = [f'{name} {summary[name]:.4g}' for name in ('loss', 'gap', 'seconds') if summary.get(name) is not None]
  return ', '.join(['done', *known])


@contextlib.contextmanager
def sigterm_like_ctrl_c() -> Iterator[None]:
  """Between arms; while one trains, it catches both signals itself and saves first."""
  before = signal.signal(signal.SIGTERM, signal.default_int_handler)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, before)
