"""Checkpoints by orbax: written asynchronously and atomically, verified when read, the last few and the best kept.

A checkpoint is the whole `TrainState` (its step is the position in the data) and a JSON record with a checksum of every
bit of it, and one of its own. A checkpoint that cannot be read, or of which a checksum is wrong, is set aside with a
message and the one before it is used. What a newer version wrote is refused. Nothing is pickled.
"""

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, Required, TypedDict

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from slm_jax import distributed, sharding
from slm_jax.checksum import checksum
from slm_jax.config import ConfigError, check, from_dict, require, to_dict
from slm_jax.data import tokenizer
from slm_jax.data.tokenizer import Tokenizer
from slm_jax.files import DamagedFile, disk_errors, parse_json, read_json, sealed, write_json
from slm_jax.model import decoder
from slm_jax.model.api import Params
from slm_jax.model.config import ModelConfig
from slm_jax.prune import zeros

FORMAT = 1  # of a checkpoint's record and of model.json
MODEL = 'model.json'
# Where devices hold the same array, orbax has each of them write a share of it, which a small program cuts out, one for
# every shape there is: the first checkpoint of a small model on eight devices took 3.9 s, and 1.1 s without.
SHARE = 16 << 20  # bytes, from which on the work of writing is shared
UNRANKED = {'loss': math.inf}  # of a checkpoint that no evaluation goes with: never the best


def _arrays() -> ocp.PyTreeCheckpointHandler:
  handler = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=SHARE)
  return ocp.PyTreeCheckpointHandler(
    type_handler_registry=ocp.type_handlers.create_type_handler_registry((jax.Array, handler))
  )


def _into(abstract: Any) -> ocp.args.PyTreeRestore:
  """Arrays of these shapes, on these shardings."""
  return ocp.args.PyTreeRestore(abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract))


class _Record(TypedDict, total=False):
  """Of a checkpoint: its checksum, and what the run has used so far (ledger.py, energy.py)."""

  format: Required[int]
  checksum: Required[int]
  tokens: float
  seconds: float
  best: float | None
  spent: dict[str, float]
  chip_seconds: float
  joules: float | None
  joules_estimated: float
  energy_source: str


class _ModelFile(TypedDict):
  """model.json."""

  format: int
  checksum: int
  tokenizer: str
  model: dict[str, Any]
  sparsity: NotRequired[zeros.Sparsity]


class Checkpoints:
  """The checkpoints of one arm. A context manager: leaving it waits for the last write."""

  def __init__(self, folder: Path, keep: int, log: Callable[[str], None]):
    policies = ocp.checkpoint_managers
    self._folder, self._log = folder, log
    distributed.on_main(self._check_losses)
    self._manager = ocp.CheckpointManager(
      folder.absolute(),
      item_handlers={'state': _arrays(), 'record': ocp.JsonCheckpointHandler()},
      options=ocp.CheckpointManagerOptions(
        cleanup_tmp_directories=True,
        best_fn=lambda m: m['loss'],  # without it losses are not written down, and the best is lost with the process
        best_mode='min',
        preservation_policy=policies.AnyPreservationPolicy(
          [
            policies.LatestN(keep),
            policies.BestN(
              get_metric_fn=lambda m: m['loss'], reverse=True, n=1, keep_checkpoints_without_metrics=False
            ),
          ]
        ),
      ),
    )

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
    with disk_errors(self._folder):
      try:
        self._manager.wait_until_finished()
      finally:
        self._manager.close()
        halves = self._folder.glob('*.orbax-checkpoint-tmp') if distributed.is_main() else ()
        for half in halves:  # a write that failed: on a full disk, its room is
          shutil.rmtree(half, ignore_errors=True)  # needed for the record of why

  def save(self, step: int, state: Any, record: dict[str, Any], loss: float | None) -> None:
    """Starts writing `state`; training goes on meanwhile. `record` is JSON; `loss` (of an evaluation) ranks 'best'."""
    if step in self.steps():
      if loss is None:
        return
      self._manager.wait_until_finished()
      if distributed.on_main(lambda: (self._manager.metrics(step) or UNRANKED)['loss'] < math.inf):
        return
      self._manager.delete(step)  # written when its evaluation was interrupted: it may be the best, and be lost as such
    record = sealed({**record, 'format': FORMAT, 'checksum': int(jax.device_get(checksum(state)))})
    items = ocp.args.Composite(state=ocp.args.PyTreeSave(state), record=ocp.args.JsonSave(record))
    with disk_errors(self._folder):
      self._manager.save(step, args=items, metrics=UNRANKED if loss is None else {'loss': loss})

  def latest(self, abstract: Any) -> tuple[Any, dict[str, Any]] | None:
    """The newest intact checkpoint as `(state, record)` on the shardings of `abstract`; None if there is none."""
    return next(filter(None, (self.read(step, abstract) for step in reversed(self.steps()))), None)

  def steps(self) -> list[int]:
    """Of the checkpoints that there are, in order."""
    return distributed.on_main(lambda: sorted(self._manager.all_steps()))

  def read(self, step: int, abstract: Any) -> tuple[Any, dict[str, Any]] | None:
    """The checkpoint of one step; None if it is damaged, and then it is out of the way."""
    read, record, fault = None, None, ''
    try:
      items = ocp.args.Composite(state=_into(abstract), record=ocp.args.JsonRestore())
      read = self._manager.restore(step, args=items)
      record, fault = parse_json(json.dumps(read.record), _Record)
    except Exception as error:  # orbax and tensorstore raise many kinds; whatever it is, an older one may do
      fault = _first_line(error)
    fault = distributed.first_of(fault)  # each process reads its own part, and all check the whole
    if read is not None and record is not None and not fault:
      require_known(record['format'], self._folder / str(step))
      found, written = int(checksum(read.state)), record['checksum']
      if found == written:
        return read.state, record
      fault = f'checksum {found}, written {written}'
    distributed.on_main(self._set_aside, step, fault)
    self._manager.reload()
    return None

  def _check_losses(self) -> None:
    """Orbax reads the loss of each checkpoint when it starts, and ends at one that cannot be read."""
    for step in saved(self._folder):
      path = self._folder / str(step) / 'metrics' / 'metrics'
      try:
        if path.exists():
          float(json.loads(path.read_text())['loss'])
      except (OSError, ValueError, KeyError, TypeError) as error:
        self._set_aside(step, f'its loss: {_first_line(error)}')

  def _set_aside(self, step: int, fault: str) -> None:
    target = self._folder.parent / 'damaged' / f'{self._folder.name}-{step}'
    target.parent.mkdir(exist_ok=True)
    while target.exists():
      target = target.with_name(target.name + '+')
    (self._folder / str(step)).rename(target)
    self._log(f'checkpoint {self._folder / str(step)} is damaged ({fault}); moved to {target}')


def saved(folder: Path) -> list[int]:
  """The steps of the finished checkpoints in a folder, without opening any."""
  return sorted(int(path.name) for path in folder.glob('[0-9]*') if path.name.isdigit())


# ------------------------------------------------------------------------------------------------- finished models


def save_model(
  folder: Path,
  config: ModelConfig,
  params: Params,
  tokens: Tokenizer,
  patterns: Mapping[str, Sequence[str]] = {},
) -> None:
  """A finished model: parameters, its tokenizer, and model.json, from which alone it can be built again.

  model.json says of sparse matrices how dense they are, and which of every m inputs are left if a recipe made it so.
  patterns: see `zeros.record`.
  """
  with disk_errors(folder), ocp.Checkpointer(_arrays()) as writer:
    writer.save(folder.absolute() / 'params', ocp.args.PyTreeSave(params), force=True)
  sparsity = zeros.record(params, patterns)
  record = {'tokenizer': tokens.fingerprint, 'format': FORMAT, 'checksum': int(checksum(params)), 'sparsity': sparsity}
  if distributed.is_main():
    (folder / 'tokenizer.model').write_bytes(tokens.serialize())
    write_json(folder / MODEL, {**record, 'model': to_dict(config)})


def load_model(
  folder: Path, mesh: Mesh | None = None, rules: sharding.Rules | None = None
) -> tuple[ModelConfig, Params, dict[str, Any]]:
  """`(config, params, record)` of a finished model; ConfigError if it is missing or damaged.

  mesh: over whose devices it is spread, by the rules, or as `sharding` says; unless given, all devices have all of it.
  """
  record = model_file(folder)
  config = check(from_dict(ModelConfig, record.pop('model'), f'{folder / MODEL}:model'), f'{folder / MODEL}:model')
  try:
    shapes = jax.eval_shape(decoder.build(config).init, jax.random.PRNGKey(0))
    layout = sharding.shardings(shapes, decoder.logical_axes(config), mesh or sharding.make_mesh(), rules)
    with ocp.Checkpointer(_arrays()) as reader:
      params = reader.restore(folder.absolute() / 'params', _into(sharding.abstract(shapes, layout)))
    if int(checksum(params)) != record['checksum']:
      raise ValueError('its checksum is wrong')
  except Exception as error:
    raise DamagedFile(f'{folder}: damaged model ({_first_line(error)}); train that arm again') from error
  return config, params, record


def load_tokenizer(folder: Path, known: Tokenizer) -> Tokenizer:
  """Of a finished model: `known` if it is that one; ConfigError if it is missing or damaged."""
  expected = model_file(folder)['tokenizer']
  if expected == known.fingerprint:
    return known
  found = tokenizer.load(folder / 'tokenizer.model')
  if found.fingerprint != expected:
    raise ConfigError(f'{folder}: its tokenizer is {found.fingerprint}, expected {expected}; train that arm again')
  return found


def model_file(folder: Path) -> dict[str, Any]:
  """What model.json says. ConfigError if there is none, it is damaged, or a newer version wrote it."""
  record, fault = read_json(folder / MODEL, _ModelFile)
  require(bool(record or fault), f'{folder}: no finished model there (no {MODEL}); has that arm been trained?')
  if fault:
    raise DamagedFile(f'{folder}: damaged model ({MODEL}: {fault}); train that arm again')
  require_known(record['format'], folder / MODEL)
  return record


def sparsity_of(folder: Path) -> zeros.Sparsity:
  """What model.json says of zeros; {} where there is none."""
  return model_file(folder).get('sparsity', {}) if (folder / MODEL).exists() else {}


def require_known(written: int, path: Path) -> None:
  """ConfigError for the format of a newer version."""
  require(written <= FORMAT, f'{path}: format {written}, written by a newer version (this one knows {FORMAT})')


def _first_line(error: Exception) -> str:
  return str(error).strip().split('\n')[0][:200] or type(error).__name__
