"""Populations: arms that differ only in traced numbers and seeds, trained in one compiled program (program.py).

Each arm keeps what it would have alone: its folder, metrics, checkpoints (which either way of training resumes), its
stop at a NaN. Equal to the arms trained alone up to rounding. FLOPs are booked as if alone; wall time is shared out
equally.
"""

import collections
import contextlib
import dataclasses
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from slm_jax import evaluate, metrics, notices, perf, pipeline
from slm_jax.ablate.alike import groups
from slm_jax.ablate.program import Program, compile_program, memory_limit
from slm_jax.checkpoint import Checkpoints, saved
from slm_jax.config import arm_references
from slm_jax.data.batches import Prefetch
from slm_jax.data.dataset import open_data
from slm_jax.experiment import Config
from slm_jax.files import disk_errors
from slm_jax.ledger import Diverged, Ledger, Phase
from slm_jax.preempt import EXIT_PREEMPTED, Preempted, Preemption
from slm_jax.record import Record
from slm_jax.step import TrainState
from slm_jax.train import Job, check_converged, finish, prepare, valid_batches

# ------------------------------------------------------------------------------------------------------- its members


class Member:
  """One arm of a population: its place in the arrays, its files and its books."""

  def __init__(
    self, config: Config, arm_id: str, at: tuple[int, int], workdir: Path, size: int, code: Mapping[str, str]
  ):
    self.at = at  # order of the data, arm within it
    self.config, self.arm_id, self.folder = config, arm_id, workdir / 'arms' / arm_id
    self.code: int | None = None  # of its exit, once it has ended
    self._share = 1 / size
    self.folder.mkdir(parents=True, exist_ok=True)
    self._record = Record(self.folder, arm_id, config, experiment=code, population=size)

  def open(self, job: Job, workdir: Path, files: contextlib.ExitStack) -> None:
    self.job = job._replace(config=self.config, folder=self.folder)
    self._record.note(job.dataset.notices)
    parents = (arm for _, arm in arm_references(self.config))
    self._pipeline = pipeline.before(parents, job.dataset.made, workdir)
    self.checkpoints = files.enter_context(
      Checkpoints(self.folder / 'checkpoints', self.config.run.keep, logging.warning)
    )

  def start(self, step: int, remembered: Mapping[str, Any], files: contextlib.ExitStack) -> None:
    sinks = metrics.sinks(self.config, self.folder, self.arm_id, logging.warning)
    self.log = metrics.MetricLog(self.folder / 'metrics.jsonl', step, sinks, logging.warning)
    files.callback(self.log.close)
    self.log.keep_evaluations(self.job.dataset.valid.packed(self.config.eval.bytes).tokens)
    starting = time.perf_counter() - self.job.began
    shown = round(1 / self._share) if self.at == (0, 0) else 0
    books = Ledger(self.log, self.config, self.job.flops, step, remembered, self._share, starting, shown)
    self.ledger = files.enter_context(books)

  def add(self, step: int, measured: Mapping[str, Any]) -> None:
    """Books a step; a loss that is not finite ends this arm, with its last good checkpoint, and no other."""
    try:
      self.ledger.add(step, measured)
      self.ledger.settle()
    except Diverged as error:
      self.end(error)

  def end(self, error: BaseException) -> None:
    self.code = self._record.ended(error)

  def finish(self, state: TrainState) -> None:
    """Writes the model and the summary; an arm that has diverged ends, and no other."""
    results = {**self.log.evaluated[self.config.train.steps], **self.ledger.record()}
    try:
      summary = {**finish(self.job, state, results), 'parent_flops': pipeline.total(self._pipeline)}
      check_converged(self.config, summary)
      self.code = self._record.done(summary, self._pipeline)
    except Diverged as error:
      self.end(error)


def by_progress(arms: Mapping[str, Config], workdir: Path) -> list[dict[str, Config]]:
  """The arms in parts that can go on together: of each, all have a checkpoint of one step, or none has any."""
  left = {arm_id: set(saved(workdir / 'arms' / arm_id / 'checkpoints')) for arm_id in arms}
  parts = []
  while left:
    # The step that most of them have (the later one of two), or to have none.
    counts = collections.Counter(step for steps in left.values() for step in (steps or {-1}))
    common = max(counts, key=lambda step: (counts[step], step))
    chosen = [arm_id for arm_id, steps in left.items() if common in (steps or {-1})]
    parts += [{arm_id: arms[arm_id] for arm_id in group} for group in groups({i: arms[i] for i in chosen})]
    for arm_id in chosen:
      del left[arm_id]
  return parts


def halves(arms: Mapping[str, Config]) -> list[dict[str, Config]]:
  """Two populations in place of one: of half of the arms of every order, or of half of the orders."""
  orders: dict[int, list[str]] = {}
  for arm_id, config in arms.items():
    orders.setdefault(config.data.seed, []).append(arm_id)
  rows = list(orders.values())
  if half := len(rows[0]) // 2:
    split = [row[:half] for row in rows], [row[half:] for row in rows]
  else:
    split = rows[: len(rows) // 2], rows[len(rows) // 2 :]
  return [{arm_id: arms[arm_id] for row in part for arm_id in row} for part in split]


def restore(members: Sequence[Member], program: Program) -> tuple[TrainState, list[Mapping[str, Any]]]:
  """The state of all and the record of each, at the newest step of which all have an intact checkpoint; else fresh.

  One after another into their places, so that no two copies of the whole exist.
  """

  def from_checkpoints(step: int) -> tuple[TrainState, list[Mapping[str, Any]]] | None:
    records: list[Mapping[str, Any]] = []
    state = program.empty()
    for member in members:
      found = member.checkpoints.read(step, member.job.abstract)
      if found is None:
        return None
      state = program.with_one(state, found[0], member.at)
      records.append(found[1])
    return state, records

  def fresh() -> TrainState:
    state = program.empty()
    for member in members:
      state = program.with_one(state, member.job.fresh(member.config), member.at)
    return state

  common = set.intersection(*(set(member.checkpoints.steps()) for member in members))
  found = next(filter(None, map(from_checkpoints, sorted(common, reverse=True))), None)
  return found or (fresh(), [{} for _ in members])


# ---------------------------------------------------------------------------------------------------------- the loop


def run(arms: Mapping[str, Config], workdir: Path, code: Mapping[str, str] = {}) -> dict[str, int]:
  """Trains arms of one group (see `groups`), none of them done yet; `{arm id: exit code}`.

  One program for all, or for the parts of them that fit into memory and have come equally far. code: hashes of the
  experiment's own files, for run.json.
  """
  perf.keep_freed_memory()
  perf.cache_compilations(workdir / 'cache')
  codes: dict[str, int] = {}
  waiting = by_progress(arms, workdir)
  while waiting and EXIT_PREEMPTED not in codes.values():
    part = waiting.pop(0)
    ended = run_part(part, workdir, code)
    if ended is None:
      waiting = halves(part) + waiting
    codes.update(ended or {})
  return codes


def run_part(arms: Mapping[str, Config], workdir: Path, code: Mapping[str, str] = {}) -> dict[str, int] | None:
  """The exit codes; None if there is not enough memory, and nothing was done."""
  in_order = sorted(arms.items(), key=lambda item: item[1].data.seed)
  seeds = list(dict.fromkeys(config.data.seed for _, config in in_order))
  per_order = len(arms) // len(seeds)
  members = [
    Member(config, arm_id, divmod(i, per_order), workdir, len(arms), code)
    for i, (arm_id, config) in enumerate(in_order)
  ]
  try:
    with disk_errors(workdir), Preemption() as stop, contextlib.ExitStack() as files:
      with stop.at_once():  # nothing to lose yet
        side_by_side = jax.default_backend() != 'cpu'
        job = prepare(members[0].config, workdir, workdir, mapped=side_by_side)
        notices.show(job.dataset.notices)
        for member in members:
          member.open(job, workdir, files)
        batch = batches_of(job, seeds, workdir)
      # No compilation is interrupted: it would go on in a thread of its own, and crash as the interpreter shuts down.
      program, needed = compile_program(job, (len(seeds), per_order), job.place(batch(0)), side_by_side)
      stop.check()
      if needed > memory_limit() and len(arms) > 1:
        return None
      state, records = restore(members, program)
      for member, record in zip(members, records, strict=True):
        member.start(int(state.step), record, files)
      state = train(members, program, state, job, batch, stop)
      for member in alive(members):
        member.finish(program.one(state, member.at))
      stop.pass_on()
  except Exception as error:
    for member in members:
      if member.code is None:
        member.end(error)
  return {member.arm_id: member.code for member in members if member.code is not None}


def batches_of(job: Job, seeds: Sequence[int], workdir: Path) -> Callable[[int], dict[str, np.ndarray]]:
  """step -> the batches [S, B, T] of all orders of the data."""
  orders = [dataclasses.replace(job.config.data, seed=seed, content='') for seed in seeds]
  datasets = [job.opened(open_data(data, workdir / 'data', logging.info)) for data in orders]

  def batch(step: int) -> dict[str, np.ndarray]:
    rows = [dataset.batch(step) for dataset in datasets]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

  return batch


def train(
  members: Sequence[Member],
  program: Program,
  state: TrainState,
  job: Job,
  batch: Callable[[int], Any],
  stop: Preemption,
) -> TrainState:
  """The loop of slm_jax/train.py for all that have not ended; returns the state after the last step."""
  config, step = job.config, int(state.step)
  steps, checkpoint_every = config.train.steps, config.run.checkpoint_every
  pending: tuple[int, Any] | None = None

  def settle() -> None:  # what Ledger.settle is for one arm
    nonlocal pending
    if pending is not None:
      (at, measured), pending = jax.device_get(pending), None
      for member in alive(members):
        member.add(at, {name: values[member.at] for name, values in measured.items()})

  def evaluation() -> dict[str, float]:
    """{arm id: loss} of those whose loss is their lowest so far."""
    best = {}
    total = evaluate.totals(program.measure, program.final(state), valid_batches(job), stop.check)
    for member in alive(members):
      own = jax.tree.map(lambda x, at=member.at: x[at], total)
      best[member.arm_id] = member.ledger.evaluated(step, evaluate.means(own))
    return {arm_id: loss for arm_id, loss in best.items() if loss is not None}

  def save(chosen: Collection[str], best: Mapping[str, float]) -> None:
    settle()
    with phase('checkpoint', members):
      for member in alive(members):
        if member.arm_id in chosen:
          member.checkpoints.save(step, program.one(state, member.at), member.ledger.record(), best.get(member.arm_id))

  everyone = [member.arm_id for member in members]
  with jax.transfer_guard('disallow'), Prefetch(batch, step, config.run.prefetch, job.place) as batches:
    try:
      while alive(members):
        best: dict[str, float] = {}
        due = [step not in member.log.evaluated for member in alive(members)]
        if (step % config.eval.every == 0 or step == steps) and any(due):
          settle()
          with phase('eval', members):
            best = evaluation()
        chosen = everyone if step % checkpoint_every == 0 or step == steps else list(best)
        if chosen:
          save(chosen, best)
        if step == steps:
          break
        stop.check()
        with phase('data', members):
          rows = next(batches)
        state, measured = program.step(state, rows, job.frozen)
        step += 1
        settle()
        pending = (step, measured)
    except Preempted:
      save(everyone, {})
      raise
  return state


def alive(members: Sequence[Member]) -> list[Member]:
  return [member for member in members if member.code is None]


@contextlib.contextmanager
def phase(name: Phase, members: Sequence[Member]) -> Iterator[None]:
  with contextlib.ExitStack() as ledgers:
    for member in alive(members):
      ledgers.enter_context(member.ledger.phase(name))
    yield
