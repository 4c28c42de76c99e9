"""metrics.jsonl, one JSON object a line, is the truth; TensorBoard and W&B are sinks that may fail."""

import importlib.util
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypedDict

from slm_jax import distributed, schema
from slm_jax.config import require, to_dict, to_install
from slm_jax.files import parse_json, read_json, sealed, write_json, write_text

LOST = 'lost.json'  # beside metrics.jsonl: {phase: seconds of all processes that worked on the run}
# Of what a run leaves (run.json, metrics.jsonl); run.json holds it. 1: other arm ids (ablate/adopt.py).
FORMAT = 2
Seconds = Annotated[float, '[0, inf)']


class _Line(TypedDict):
  """What every line of metrics.jsonl has, beside numbers under other names."""

  step: Annotated[int, '[0, 2^31)']
  kind: Literal['train', 'eval']


class _Evaluation(_Line):
  loss: float | None


class Sink(NamedTuple):
  """Where records go as well."""

  write: Callable[[int, str, Mapping[str, float]], Any]  # (step, kind, values)
  close: Callable[[], Any] = lambda: None


def read(path: Path, warn: Callable[[str], Any] = lambda text: None) -> Iterator[dict[str, Any]]:
  """The lines of a metrics.jsonl; damaged ones are left out with a warning, a last one that was cut short without.

  Each has a step, a kind ('train' or 'eval'), and numbers (or null) under all other names; an evaluation has a
  loss. Lines of an earlier version have no checksum.
  """
  if not path.exists():
    return
  with open(path, encoding='utf-8', errors='replace') as file:
    for number, line in enumerate(file, 1):
      if not line.endswith('\n'):
        return
      record, fault = parse(line)
      if fault:
        warn(f'{path}: line {number} is damaged ({fault}), and left out')
      else:
        yield record


def parse(line: str) -> tuple[dict[str, Any], str]:
  """`(its entries, '')` of a line of metrics.jsonl, or `({}, what is wrong)`."""
  record, fault = parse_json(line, _Line)
  if not fault and record['kind'] == 'eval':
    fault = schema.fault(record, _Evaluation)
  for name, value in () if fault else record.items():
    # Nearly all are finite floats, and a log has many lines.
    if not (type(value) is float and math.isfinite(value)) and name not in ('step', 'kind'):
      fault = fault or schema.fault(value, float | None, name)
  return ({}, fault) if fault else (record, '')


def read_lost(path: Path) -> tuple[dict[str, float], str]:
  """`({phase: seconds}, what is wrong)` of a lost.json; empty if there is none, or something is wrong."""
  lost, fault = read_json(path, dict[str, Seconds])
  return lost or {}, fault


def _text(records: Iterable[Mapping[str, Any]]) -> str:
  """A line for each, with its checksum."""
  return ''.join(json.dumps(sealed(record)) + '\n' for record in records)


class MetricLog:
  """Appends to metrics.jsonl, each line flushed, and passes every record on to the sinks.

  Of several processes only the first one has a file and sinks; all know what has been evaluated.
  """

  def __init__(self, path: Path, step: int, sinks: tuple[Sink, ...], warn: Callable[[str], None]):
    """Lines of steps after `step`, from which a run goes on, are dropped: they are about to be written again.

    seconds: what the last line that an earlier process wrote says; silent: how long ago that was. lost: what `remember`
    was told last, whatever has been dropped since.
    """
    evaluated, self.seconds, self.silent = distributed.on_main(_cut_back, path, step, warn)
    self._lost = path.with_name(LOST)
    self.lost, fault = distributed.on_main(read_lost, self._lost)
    if fault:
      warn(f'{self._lost}: damaged ({fault}), and left out: seconds that were lost before are not counted')
    self.evaluated = {line['step']: line for line in evaluated}
    where = path if distributed.is_main() else os.devnull
    self._file = open(where, 'a', encoding='utf-8')  # noqa: SIM115  closed by close()
    self._sinks, self._warn = list(sinks), warn

  def keep_evaluations(self, tokens: float) -> None:
    """Forgets evaluations on other text, before a setting of evaluation was changed: on another number of tokens."""
    self.evaluated = {k: line for k, line in self.evaluated.items() if line.get('tokens_evaluated') == tokens}

  def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
    """Non-finite numbers are written as null: JSON knows no NaN."""
    record = {'step': step, 'kind': kind} | {k: v if math.isfinite(v) else None for k, v in values.items()}
    self._file.write(_text([record]))
    self._file.flush()
    if kind == 'eval':
      self.evaluated[step] = record
    self._to_all(lambda sink: sink.write(step, kind, values))

  def remember(self, lost: Mapping[str, float]) -> None:
    """Seconds that no checkpoint may know of: they stand beside the log, whose later lines a restart drops."""
    if distributed.is_main():
      write_json(self._lost, dict(lost))

  def close(self) -> None:
    self._file.close()
    self._to_all(lambda sink: sink.close())

  def _to_all(self, tell: Callable[[Sink], Any]) -> None:
    for sink in list(self._sinks):
      try:
        tell(sink)
      except Exception as error:  # a tracker never stops a run
        self._sinks.remove(sink)
        self._warn(f'a metrics sink failed and is switched off: {error}')


def _cut_back(path: Path, step: int, warn: Callable[[str], None]) -> tuple[list[dict[str, Any]], float, float]:
  """Drops the lines of later steps; (evaluations among the others, seconds of the last line of all, its age)."""
  lines = list(read(path, warn))
  age = time.time() - path.stat().st_mtime if lines else 0.0
  kept = [line for line in lines if line['step'] <= step]
  write_text(path, _text(kept))
  return [line for line in kept if line['kind'] == 'eval'], lines[-1].get('seconds') or 0.0 if lines else 0.0, age


def check_sinks(run: Any) -> None:
  """ConfigError if the package of a sink that `config.run` asks for is not there."""
  for name, package in (('tensorboard', 'tensorboardX'), ('wandb', 'wandb')):
    missing = getattr(run, name) and importlib.util.find_spec(package) is None
    require(not missing, f'run.{name}=True: needs the extra: {to_install(name)}')


def sinks(config: Any, folder: Path, arm_id: str, warn: Callable[[str], None]) -> tuple[Sink, ...]:
  """The sinks that `config.run` asks for; without those that cannot be opened now, about which it warns."""
  found: list[Sink] = []
  asked = {
    'tensorboard': lambda: tensorboard(folder / 'tensorboard'),
    'wandb': lambda: wandb(folder, arm_id, config.name, to_dict(config)),
  }

  def add() -> None:
    for name, sink in asked.items():
      try:
        if getattr(config.run, name):
          found.append(sink())
      except Exception as error:  # no key, no network, no room
        warn(f'run.{name}: goes without, since it failed to start: {" ".join(str(error).split())[:200]}')

  distributed.on_main(add)
  return tuple(found)


def tensorboard(folder: Path) -> Sink:
  """Event files for TensorBoard (extra `tensorboard`)."""
  from tensorboardX import SummaryWriter

  writer = SummaryWriter(str(folder), flush_secs=1)  # by default it keeps events back for two minutes

  def write(step, kind, values):
    for name, value in values.items():
      writer.add_scalar(f'{kind}/{name}', value, step)

  return Sink(write, writer.close)


def wandb(folder: Path, arm_id: str, name: str, config: Mapping[str, Any]) -> Sink:
  """Weights & Biases (extra `wandb`); set WANDB_MODE=offline where there is no network."""
  import wandb as client

  run = client.init(
    dir=str(folder),
    id=arm_id,
    name=name or arm_id,
    resume='allow',
    config=dict(config),
    reinit='create_new',  # arms of one process, one after another or at once, are runs of their own
  )
  return Sink(lambda step, kind, values: run.log({f'{kind}/{k}': v for k, v in values.items()}, step=step), run.finish)
