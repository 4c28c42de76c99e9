"""What a worker does: arms one after another, in this process, parents first."""

import contextlib
import dataclasses
import json
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from slm_jax.ablate import workdir as workdirs
from slm_jax.ablate.arms import Arm
from slm_jax.config import ConfigError
from slm_jax.preempt import EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED

Train = Callable[..., int]  # (config, workdir, arm_id) -> exit code


def run_arms(
  arms: Sequence[Arm],
  workdir: Path,
  *,
  train: Train | None = None,
  fail_fast: bool = False,
  say: Callable[[str], None] = print,
) -> int:
  """Runs what is not done yet, parents first; returns 0 if all is done in the end, 42 if asked to stop, else 1.

  An arm that fails (a NaN, a bug) stops only the arms that build on it. train: `slm_jax.train.run` unless given.
  """
  failed = 0
  try:
    with _sigterm_like_ctrl_c():
      for i, arm in enumerate(arms, 1):
        title = f'[{i}/{len(arms)}] {arm.name}, seed {arm.config.seed} ({arm.arm_id})'
        if workdirs.is_done(workdir, arm.arm_id):
          continue
        waits_for = [parent for parent in arm.parents.values() if not workdirs.is_done(workdir, parent)]
        if waits_for:
          say(f'{title}: blocked, {", ".join(waits_for)} is not done')
          continue
        say(f'{title}: starts')
        code = _run_arm(arm, workdir, train)
        if code == EXIT_PREEMPTED:
          raise KeyboardInterrupt
        say(f'{title}: {_outcome(workdir, arm, code)}')
        failed += code != EXIT_DONE
        if failed and fail_fast:
          break
  except KeyboardInterrupt:
    say('stopped; launch again to go on from here')
    return EXIT_PREEMPTED
  return EXIT_DONE if all(workdirs.is_done(workdir, arm.arm_id) for arm in arms) else EXIT_FAILED


def preflight(arms: Sequence[Arm], workdir: Path) -> None:
  """ConfigError if the data or the devices cannot serve an arm; then `workdir` is as it was.

  Tokenises what is not tokenised yet: a text that cannot be read shows before the first arm starts, not after hours.
  """
  from slm_jax import perf, train

  perf.keep_freed_memory()  # this is the first to use the devices
  seen = set()
  try:
    for config in (arm.config for arm in arms if not workdirs.is_done(workdir, arm.arm_id)):
      data = dataclasses.replace(config.data, seed=0)
      key = (data, config.model.vocab_size, config.run, config.train.accumulate)
      if key not in seen:
        train.inputs(config, workdir)
      seen.add(key)
  except ConfigError:
    for folder in (workdir / 'data', workdir):  # what a failed attempt may leave
      with contextlib.suppress(OSError):
        folder.rmdir()
    raise


def _run_arm(arm: Arm, workdir: Path, train: Train | None) -> int:
  """The arm's exit code; whatever it raises is shown here, so that the others can go on."""
  try:
    with workdirs.lock(workdirs.folder(workdir, arm.arm_id)):
      return (train or _default_train())(arm.config, workdir, arm.arm_id)
  except ConfigError as error:
    print(f'error: {error}', file=sys.stderr)
  except Exception:
    traceback.print_exc()
  return EXIT_FAILED


def _default_train() -> Train:
  from slm_jax.train import run  # heavy, and not needed where all is done

  return run


def _outcome(workdir: Path, arm: Arm, code: int) -> str:
  try:
    run = json.loads((workdirs.folder(workdir, arm.arm_id) / 'run.json').read_text(encoding='utf-8'))
  except (OSError, ValueError):
    run = {}
  if code != EXIT_DONE:
    return (
      f'{"stopped at a NaN" if run.get("status") == "nan" else "failed"} ({run.get("error") or f"exit code {code}"})'
    )
  summary = run.get('summary', {})
  known = [f'{name} {summary[name]:.4g}' for name in ('loss', 'gap', 'seconds') if summary.get(name) is not None]
  return ', '.join(['done', *known])


@contextlib.contextmanager
def _sigterm_like_ctrl_c() -> Iterator[None]:
  """Between arms; while one trains, it catches both signals itself and saves first."""
  before = signal.signal(signal.SIGTERM, signal.default_int_handler)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, before)
