"""How fast this machine trains an arm: the real loop, for a few steps, on random tokens and random parameters.

What is run is `train.train` on a job that `train.assemble` made of the arm's own configuration, in a temporary folder:
compiled step, evaluation, checkpoints, books and all; only data and models of other arms are stand-ins of the right
shape. So nothing has to be downloaded, tokenised or trained before, and nothing can be forgotten in the count.

Arms that differ in traced numbers, seeds, names, data, initial parameters or the number of their steps share one
measurement. Results are kept in WORKDIR/cache/measured.json, for this machine; the compiled programs are kept too.
"""

import dataclasses
import hashlib
import json
import math
import platform
import statistics
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from slm_jax import chips, metrics, perf, schema, sharding, train
from slm_jax import config as configs
from slm_jax.ablate import workdir as workdirs
from slm_jax.ablate.arms import Arm
from slm_jax.data import batches
from slm_jax.data.dataset import Dataset
from slm_jax.data.store import Store
from slm_jax.data.tokenizer import Bytes, Tokenizer
from slm_jax.data.valid import Packed
from slm_jax.experiment import Config, EvalConfig, InitConfig
from slm_jax.files import read_json, write_json
from slm_jax.model import decoder
from slm_jax.model.api import Model, Params
from slm_jax.preempt import Preemption

SECONDS = 3.0  # of steps, about, once all is compiled
LEAST, MOST = 6, 60  # steps
VALID_BATCHES = 4  # evaluated, at most
PIECE = 3.0  # bytes of text that a token of a SentencePiece stands for, about


class Pace(NamedTuple):
  """Seconds that one static shape takes on this machine."""

  compiling: float  # of a run whose programs are not in the cache yet: tracing, compiling, opening files
  starting: float  # the same where they are
  step: float
  eval_batch: float
  save: float  # a checkpoint
  steps: int  # for which the programs are in the cache: schedules are compiled in

  def seconds(self, config: Config, compiled: bool) -> float:
    """What run.json will call `seconds`: the loop from its first compilation to its last checkpoint.

    Every evaluation is taken to be the best so far, and hence saved.
    """
    steps, every, save_every = config.train.steps, config.eval.every, config.run.checkpoint_every
    evaluations, checkpoints, both = (-(-steps // n) for n in (every, save_every, math.lcm(every, save_every)))
    once = self.starting if compiled else self.compiling
    evaluating = (evaluations + 1) * evaluation_batches(config) * self.eval_batch
    return once + steps * self.step + evaluating + (evaluations + checkpoints - both + 1) * self.save


def evaluation_batches(config: Config) -> int:
  """Of one evaluation, about. The text is not known here: with eval.bytes=0 the default is taken for granted."""
  per_token = 1 if config.data.tokenizer == 'bytes' else PIECE
  tokens = (config.eval.bytes or EvalConfig.bytes) / per_token
  return math.ceil(tokens / (config.data.seq_len * config.data.batch_size))


# ----------------------------------------------------------------------------------------------------------- keys


_LAYOUT = ('data_parallel', 'fsdp', 'tensor', 'spread_optimizer', 'spread_teacher')  # where arrays lie


def shape_key(arm: Arm, arms: Mapping[str, Arm]) -> str:
  """A hash of all that the pace of an arm depends on. arms: of the whole sweep, for its teachers' shapes."""
  config = configs.static(arm.config)
  teachers = {
    key: configs.canonical_json(arms[parent].config.model)
    for key, parent in arm.parents.items()
    if key.startswith('transforms.')
  }
  plain = configs.to_dict(configs.override(config, teachers))
  shape = {
    **{name: plain[name] for name in ('model', 'optim', 'transforms')},
    'train': {**plain['train'], 'steps': 0},
    'data': {name: plain['data'][name] for name in ('seq_len', 'batch_size')},
    'run': {name: plain['run'][name] for name in (*_LAYOUT, 'prefetch')},
  }
  return hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:12]


def machine() -> str:
  """What a measurement holds for."""
  devices = jax.devices()
  parts = (platform.node(), devices[0].device_kind, len(devices), chips.usable_cores(), jax.__version__)
  return ', '.join(map(str, parts))


# --------------------------------------------------------------------------------------------------- the memory of it


def known(workdir: Path) -> dict[str, Pace]:
  """`{shape key: Pace}` measured on this machine before."""
  here = _read(workdir).get(machine(), {})
  # What is of another version is measured anew.
  return {key: Pace(**entry) for key, entry in here.items() if _is_pace(entry)}


def _is_pace(entry: Any) -> bool:
  return not schema.fault(entry, Pace) and entry.keys() == set(Pace._fields) and min(entry.values()) >= 0


def _read(workdir: Path) -> dict[str, dict[str, dict[str, Any]]]:
  """`{machine: {shape key: the fields of a Pace}}`."""
  return read_json(workdir / 'cache' / 'measured.json', dict[str, dict[str, Any]])[0] or {}


def measure_all(arms: Iterable[Arm], everyone: Mapping[str, Arm], workdir: Path) -> dict[str, Pace]:
  """`known`, with what was missing for `arms` measured now and written down."""
  paces = known(workdir)
  for arm in arms:
    key = shape_key(arm, everyone)
    if key not in paces:
      with workdirs.writing(workdir):
        paces[key] = measure(arm, everyone, workdir)
        here = {machine(): {key: pace._asdict() for key, pace in paces.items()}}
        write_json(workdir / 'cache' / 'measured.json', {**_read(workdir), **here})
  return paces


# ---------------------------------------------------------------------------------------------------- the measurement


def measure(arm: Arm, everyone: Mapping[str, Arm], workdir: Path) -> Pace:
  """Two short runs: one that compiles, one that finds its programs in the cache, as the next arm of the shape will."""
  perf.keep_freed_memory()
  perf.cache_compilations(workdir / 'cache')
  (workdir / 'cache').mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(prefix='measure-', dir=workdir / 'cache') as folder:
    first = _probe(arm, everyone, Path(folder) / 'first', LEAST)
    steps = min(max(int(SECONDS / first.step), LEAST), MOST)
    second = _probe(arm, everyone, Path(folder) / 'second', steps)
  return Pace(
    # The steps of the first run, which are fewer, count at the second one's pace.
    compiling=max(first.seconds - first.rest(second), second.once),
    starting=second.once,
    step=second.step,
    eval_batch=second.evaluation / second.eval_batches,
    save=second.save,
    steps=arm.config.train.steps,
  )


class Probe(NamedTuple):
  """What a short run took: seconds in all, and those of a step, an evaluation and a save at its end."""

  seconds: float
  steps: int
  step: float
  evaluation: float
  eval_batches: int
  save: float

  def rest(self, other: 'Probe') -> float:
    """Seconds that its steps, its two evaluations and its two saves would have taken at the other's pace."""
    return self.steps * other.step + 2 * (other.evaluation + other.save)

  @property
  def once(self) -> float:
    return max(self.seconds - self.rest(self), 0.0)


def _probe(arm: Arm, everyone: Mapping[str, Arm], folder: Path, steps: int) -> Probe:
  """The loop from the middle of the run on. What is done now and then only (a mask refresh) is not in the median."""
  config = dataclasses.replace(arm.config, init=InitConfig())
  job, start = stand_in(config, everyone, folder), max(config.train.steps // 2, steps)
  short = dataclasses.replace(
    config,
    train=dataclasses.replace(config.train, steps=start + steps),
    eval=dataclasses.replace(config.eval, every=start, samples=0),
    run=dataclasses.replace(
      config.run, log_every=1, checkpoint_every=2 * (start + steps), tensorboard=False, wandb=False
    ),
  )

  def fresh(config: Config) -> Any:
    return job.fresh(config)._replace(step=jax.device_put(jnp.int32(start), job.layout.step))

  summary = train.train(job._replace(config=short, fresh=fresh), Preemption(), 'measure')
  lines = list(metrics.read(folder / 'metrics.jsonl'))
  ends = [line['seconds'] for line in lines if line['kind'] == 'train']
  evaluated = [line['seconds'] for line in lines if line['kind'] == 'eval'][-1]
  return Probe(
    seconds=summary['seconds'],
    steps=steps,
    step=statistics.median(b - a for a, b in zip(ends[1:], ends[2:], strict=False)),  # the first one compiles
    evaluation=evaluated - ends[-1],
    eval_batches=min(evaluation_batches(config), VALID_BATCHES),
    save=summary['seconds'] - evaluated,
  )


# ------------------------------------------------------------------------------------------------------- stand-ins


def stand_in(
  config: Config,
  everyone: Mapping[str, Arm],
  folder: Path,
  allocate: bool = True,
  mesh: jax.sharding.Mesh | None = None,
  mapped: bool = False,
) -> train.Job:
  """The job of an arm without its data and its teachers: random tokens, random parameters.

  allocate: False if the step shall only be traced or compiled, not run: teachers are shapes.
  mesh: of devices that may be elsewhere; unless given, the arm's own of all devices, or one device if nothing is run.
  mapped: see `train.assemble`.
  """
  if mesh is None and not allocate:
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
  else:
    mesh = mesh or sharding.make_mesh(config.run.data_parallel, config.run.fsdp, config.run.tensor)
    sharding.check_batch(mesh, config.data.batch_size, config.train.accumulate)

  def load(arm_id: str) -> tuple[Model, Params]:
    model = decoder.build(everyone[arm_id].config.model, sharding.devices(mesh, mapped))
    axes = decoder.logical_axes(model.config)
    if not allocate:
      shapes = jax.eval_shape(model.init, jax.random.PRNGKey(0))
      loaded.append(sharding.abstract(shapes, sharding.shardings(shapes, axes, mesh)))
      return model, loaded[-1]
    params = jax.jit(model.init)(jax.random.PRNGKey(0))
    return model, sharding.place(params, axes, mesh)

  loaded: list[Params] = []
  others = train.Trained(load, lambda arm_id: tokens_of(everyone[arm_id].config))
  job = train.assemble(config, folder, noise(config), mesh, others, folder, stand_in=True, mapped=mapped)
  return job._replace(frozen={name: _where_it_was(tree, loaded) for name, tree in job.frozen.items()})


def _where_it_was(tree: Any, loaded: Iterable[Params]) -> Any:
  """Shapes that came of a model's, in another precision, have lost their shardings; arrays would have kept them."""
  for params in loaded:
    if _shapes(tree) == _shapes(params):
      return jax.tree.map(lambda x, p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=p.sharding), tree, params)
  return tree


def _shapes(tree: Any) -> Any:
  return jax.tree.map(lambda x: x.shape, tree)


def noise(config: Config) -> Dataset:
  """Random tokens in the shapes of the arm's data."""
  vocab, length = config.model.vocab_size, config.data.seq_len
  sequences = Noise(1024, length, vocab)
  facts = {'records': 1, 'bytes': 1, 'predicted': 1}
  store = Store('noise', Path(), {'splits': {'train': facts}})
  n = min(evaluation_batches(config), VALID_BATCHES) * config.data.batch_size
  evaluated = Packed(Noise(n, length, vocab), n * length, 0, None, '')
  valid: Any = SimpleNamespace(packed=lambda n_bytes: evaluated, texts=lambda n: [])
  return Dataset(config.data, tokens_of(config), (store,), batches.order([sequences], (), 0), valid)


def tokens_of(config: Config) -> Tokenizer:
  """The lengths of tokens are compiled into the evaluation, so that of bytes is the arm's own program."""
  return Bytes() if config.data.tokenizer == 'bytes' else NoTokens(config.model.vocab_size)


class Noise:
  """`n` sequences [2, length + 1]: random tokens, one document each."""

  def __init__(self, n: int, length: int, vocab: int):
    self._n, self._shape, self._vocab = n, length + 1, vocab

  def __len__(self) -> int:
    return self._n

  def __getitem__(self, index: int) -> np.ndarray:
    tokens = np.random.default_rng(index).integers(0, self._vocab, self._shape)
    return np.stack([tokens, np.ones_like(tokens)]).astype(np.uint32)


class NoTokens(Tokenizer):
  """A vocabulary without text."""

  def __init__(self, vocab: int):
    self.vocab_size, self.spelling, self.fingerprint = vocab, [b' '] * vocab, ''
    self.pad = self.bos = self.eos = 0

  def encode(self, text: str, inside: bool = False) -> list[int]:
    return []

  def decode(self, ids: Iterable[int]) -> str:
    return ''

  def serialize(self) -> bytes:
    return b''
