"""metrics.jsonl, one JSON object a line, is the truth; TensorBoard and W&B are sinks that may fail."""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from slm_jax import distributed
from slm_jax.config import ConfigError, to_dict, to_install
from slm_jax.files import write_text

Sink = Callable[[int, str, Mapping[str, float]], None]  # (step, kind, values)
FORMAT = 1  # of what a run leaves (run.json, metrics.jsonl); a number that run.json holds


def read(path: Path) -> Iterator[dict[str, Any]]:
  """The lines of a metrics.jsonl; a last line that was cut short is left out."""
  if not path.exists():
    return
  with open(path, encoding='utf-8') as file:
    for line in file:
      if not line.endswith('\n'):
        return
      yield json.loads(line)


class MetricLog:
  """Appends to metrics.jsonl, each line flushed, and passes every record on to the sinks.

  Of several processes only the first one has a file and sinks; all know what has been evaluated.
  """

  def __init__(self, path: Path, step: int, sinks: tuple[Sink, ...], warn: Callable[[str], None]):
    """Lines of steps after `step`, from which a run goes on, are dropped: they are about to be written again.

    seconds: what the last line that an earlier process wrote says; silent: how long ago that was.
    """
    evaluated, self.seconds, self.silent = distributed.on_main(_cut_back, path, step)
    self.evaluated = {line['step']: line for line in evaluated}
    where = path if distributed.is_main() else os.devnull
    self._file = open(where, 'a', encoding='utf-8')  # noqa: SIM115  closed by close()
    self._sinks, self._warn = list(sinks), warn

  def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
    """Non-finite numbers are written as null: JSON knows no NaN."""
    record = {'step': step, 'kind': kind} | {k: v if math.isfinite(v) else None for k, v in values.items()}
    self._file.write(json.dumps(record) + '\n')
    self._file.flush()
    if kind == 'eval':
      self.evaluated[step] = record
    for sink in list(self._sinks):
      try:
        sink(step, kind, values)
      except Exception as error:  # a tracker never stops a run
        self._sinks.remove(sink)
        self._warn(f'a metrics sink failed and is switched off: {error}')

  def close(self) -> None:
    self._file.close()


def _cut_back(path: Path, step: int) -> tuple[list[dict[str, Any]], float, float]:
  """Drops the lines of later steps; (evaluations among the others, seconds of the last line of all, its age)."""
  lines = list(read(path))
  age = time.time() - path.stat().st_mtime if lines else 0.0
  kept = [line for line in lines if line['step'] <= step]
  write_text(path, ''.join(json.dumps(line) + '\n' for line in kept))
  return [line for line in kept if line['kind'] == 'eval'], lines[-1].get('seconds') or 0.0 if lines else 0.0, age


def sinks(config: Any, folder: Path, arm_id: str) -> tuple[Sink, ...]:
  """The sinks that `config.run` asks for."""
  found: list[Sink] = []

  def add() -> None:
    if config.run.tensorboard:
      found.append(tensorboard(folder / 'tensorboard'))
    if config.run.wandb:
      found.append(wandb(folder, arm_id, config.name, to_dict(config)))

  distributed.on_main(add)
  return tuple(found)


def tensorboard(folder: Path) -> Sink:
  """Event files for TensorBoard (extra `tensorboard`)."""
  try:
    from tensorboardX import SummaryWriter
  except ImportError:
    raise ConfigError(f'run.tensorboard=True: needs the extra: {to_install("tensorboard")}') from None

  writer = SummaryWriter(str(folder), flush_secs=1)  # by default it keeps events back for two minutes

  def sink(step, kind, values):
    for name, value in values.items():
      writer.add_scalar(f'{kind}/{name}', value, step)

  return sink


def wandb(folder: Path, arm_id: str, name: str, config: Mapping[str, Any]) -> Sink:
  """Weights & Biases (extra `wandb`); set WANDB_MODE=offline where there is no network."""
  try:
    import wandb as client
  except ImportError:
    raise ConfigError(f'run.wandb=True: needs the extra: {to_install("wandb")}') from None

  run = client.init(dir=str(folder), id=arm_id, name=name or arm_id, resume='allow', config=dict(config))
  return lambda step, kind, values: run.log({f'{kind}/{k}': v for k, v in values.items()}, step=step)
