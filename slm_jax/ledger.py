"""The books of a run: tokens, seconds and what they went to; metrics one step late, NaN noticed, progress shown."""

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

import jax
import numpy as np

from slm_jax import distributed, energy, perf
from slm_jax.experiment import Config
from slm_jax.metrics import MetricLog
from slm_jax.progress import Progress

# Where the wall time of an arm goes, over all its restarts (see `goodput`). data: the loop waits for a batch.
Phase = Literal['compile', 'step', 'data', 'eval', 'checkpoint']
# Not in `seconds`: before the loop; steps whose results were lost and that are taken again (which are paid for, too);
# when no process ran.
BESIDE = ('start', 'redone', 'down')


class Diverged(ArithmeticError):
  """The loss or the gradient is no longer a number, or the model ends worse than one that knows nothing."""


class Ledger:
  """Counts what a run has used, over all its restarts, and writes it to the log.

  `add` only notes a step's metrics and reads those of the step before, which the device has long finished: the host
  never waits for a step that it has just started. `settle` reads what is outstanding.
  """

  def __init__(
    self,
    log: MetricLog,
    config: Config,
    flops: float,
    step: int,
    record: Mapping[str, Any],
    share: float = 1.0,
    starting: float = 0.0,
    shown: int = 1,
  ):
    """flops: of the models for each slot of a batch. share: of the wall time that is booked; 1/n for one of n arms that
    train in one program.

    starting: seconds that this process took before the loop. shown: for how many arms this one shows the progress; 0:
    another one does.
    """
    self._share = share
    self._log, self._every = log, config.run.log_every
    self._flops, self._peak = config.slots * flops, perf.peak_flops()[0]  # of a step, of a second
    self._tokens, self._seconds = record.get('tokens', 0.0), record.get('seconds', 0.0)
    self._best: float | None = record.get('best')
    self._usage = energy.Usage(record, share)
    self._spent = {phase: 0.0 for phase in (*get_args(Phase), *BESIDE)} | record.get('spent', {})
    billed, started = self._spent['redone'], self._spent['start']
    self._spent |= log.lost  # of processes as well that saved nothing
    self._spent['start'] += share * starting
    self._spent['redone'] += max(log.seconds - self._seconds, 0.0)
    self._spent['down'] += share * max(log.silent - starting, 0.0)
    log.remember({phase: self._spent[phase] for phase in BESIDE})
    self._usage.tick((self._spent['start'] - started) / share)  # no loop runs yet, but it is paid for
    if again := self._spent['redone'] - billed:
      self._usage.redo(again / share)
    self._pending: tuple[int, Any] | None = None
    self._since = time.perf_counter()
    self._window = np.zeros(3)  # steps, tokens and training seconds since the last line of the log
    self._compiled = False  # the first step compiles, and does not count for the speed
    quiet = not shown or not distributed.is_main()
    self._progress = Progress(config.name or 'run', config.train.steps, step, max(shown, 1), quiet)

  def __enter__(self) -> 'Ledger':
    self._since = time.perf_counter()
    self._usage.start()
    return self

  def __exit__(self, *exc: Any) -> None:
    self._progress.close()

  def record(self) -> dict[str, Any]:
    """What a checkpoint remembers of it."""
    self._tick()
    used = {'tokens': self._tokens, 'seconds': self._seconds, 'spent': dict(self._spent), **self._usage.record()}
    return {**used, 'best': self._best}

  def add(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
    """Notes the metrics of the step that was just started, and settles those of the one before."""
    self.settle()
    self._pending = (step, metrics)

  def settle(self) -> None:
    """Reads outstanding metrics; raises Diverged if there is no number where one should be."""
    if self._pending is None:
      return
    step, metrics = self._pending
    self._pending = None
    with jax.transfer_guard_device_to_host('allow'):  # they are meant; device_get takes ten times as long
      values = {k: float(np.asarray(v)) for k, v in metrics.items()}
    self._tick()
    self._tokens += values['tokens']
    self._window[:2] += np.array([1, values['tokens']]) * self._compiled
    self._compiled = True
    bad = [k for k in ('total', 'grad_norm') if not math.isfinite(values[k])]
    if step % self._every == 0 or bad:
      steps, tokens, seconds = self._window.tolist()
      speed, pace = (tokens / seconds, steps / seconds) if seconds else (math.nan, math.nan)
      mfu = pace * self._flops / self._peak
      self._window[:] = 0
      used = {'tokens': self._tokens, 'seconds': self._seconds, 'tokens_per_second': speed, 'mfu': mfu}
      self._log.write(step, 'train', {**values, **used})
      self._progress.show(f'loss {values["loss"]:.3f}, {speed:,.0f} tokens/s, MFU {mfu:.0%}')
    self._progress.update(step, values['loss'], self._tokens)
    if bad:
      raise Diverged(f'step {step}: {" and ".join(bad)} not finite; the last good checkpoint is kept')

  @contextlib.contextmanager
  def phase(self, phase: Phase) -> Iterator[None]:
    """Time in here goes to that; only steps and data count for the speed."""
    self._tick()
    try:
      yield
    finally:
      self._tick(phase)

  def evaluated(self, step: int, results: Mapping[str, float]) -> float | None:
    """Writes an evaluation; returns its loss if it is a number, and the lowest so far."""
    self._tick('eval')
    self._log.write(step, 'eval', {**results, 'tokens': self._tokens, 'seconds': self._seconds})
    loss = results['loss']
    if not math.isfinite(loss) or (self._best is not None and loss >= self._best):
      return None
    self._best = loss
    return loss

  def _tick(self, phase: Phase | None = None) -> None:
    """Books the time since the last tick: in `phase`, or else to the steps, of which the first one is compiled."""
    phase = phase or ('step' if self._compiled else 'compile')
    now = time.perf_counter()
    self._usage.tick(now - self._since)
    passed = self._share * (now - self._since)
    self._seconds += passed
    self._spent[phase] += passed
    if self._compiled and phase in ('step', 'data'):
      self._window[2] += passed
    self._since = now


def goodput(record: Mapping[str, Any]) -> dict[str, float]:
  """Share of all wall time that went into steps which count, and the seconds of each phase; record: of `Ledger`.

  Down: from the last line that an earlier process left in the log until this one began.
  """
  spent = record['spent']
  total = sum(spent.values())
  return {'goodput': spent['step'] / total if total else 0.0, **{f'seconds_{name}': x for name, x in spent.items()}}
