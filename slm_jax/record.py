"""run.json: with what a run was made, and what became of it. DONE beside it: it is finished, and never run again."""

import contextlib
import datetime
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from slm_jax import distributed, perf
from slm_jax.config import ConfigError, to_dict
from slm_jax.files import disk_errors, write_json, write_text
from slm_jax.ledger import Diverged
from slm_jax.metrics import FORMAT
from slm_jax.preempt import EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED, Preempted

ROOM = '.room'  # a file that is given up for the last word: on a full disk there is no other room for it


class Record:
  """The record of one run. Making it writes config.json and run.json, with the status 'running'.

  Of several processes only the first one writes; all get the same answers.
  """

  def __init__(self, folder: Path, arm_id: str, config: Any, **more: Any):
    self._folder, self._label = folder, config.name or arm_id
    known = {'format': FORMAT, 'arm_id': arm_id, 'name': config.name, 'started': _now()}
    self._known = {**known, **perf.environment(), **more}
    if distributed.is_main():
      with disk_errors(folder):
        write_json(folder / 'config.json', to_dict(config))
        write_json(folder / 'run.json', {**self._known, 'status': 'running'})
        write_text(folder / ROOM, ' ' * 2**15)

  def note(self, notices: Sequence[str]) -> None:
    """Keeps what changes what the model reads, for the report."""
    self._known['notices'] = list(notices)
    if distributed.is_main():
      write_json(self._folder / 'run.json', {**self._known, 'status': 'running'})

  def done(self, summary: Mapping[str, Any], pipeline: Mapping[str, float]) -> int:
    """Notes the results and, beside them, the FLOPs of each part of the pipeline; see slm_jax/pipeline.py."""
    self._write('done', summary=summary, pipeline=pipeline)
    if distributed.is_main():
      write_text(self._folder / 'DONE', '')
    return EXIT_DONE

  def ended(self, error: BaseException) -> int:
    """Notes why the run ends here, a bug with its traceback on stderr; returns the exit code that says so."""
    expected = isinstance(error, Preempted | Diverged | ConfigError)
    if not expected:
      distributed.failed_together()  # where it came of the death of another process, this one goes no further
    statuses: dict[type[BaseException], str] = {Preempted: 'preempted', Diverged: 'diverged'}
    status = statuses.get(type(error), 'failed')
    reason = str(error) if expected else f'{type(error).__name__}: {error}'
    with contextlib.suppress(OSError):  # the disk may be full; the launcher goes by the code
      self._write(status, **({'error': reason} if reason else {}))
    if not expected:
      traceback.print_exception(error)
      return EXIT_FAILED
    if status == 'preempted':
      return EXIT_PREEMPTED
    logging.error('%s: %s', self._label, error)
    return EXIT_FAILED

  def _write(self, status: str, **more: Any) -> None:
    if distributed.is_main():
      (self._folder / ROOM).unlink(missing_ok=True)
      write_json(self._folder / 'run.json', {**self._known, 'status': status, 'ended': _now(), **more})


def _now() -> str:
  return datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
