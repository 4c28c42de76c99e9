"""Config: one experiment, as a tree of frozen dataclasses; what `config()` of an experiment file returns.

Each section stands beside the code that reads it; this module only puts them together and checks what spans sections.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal

from slm_jax import chips
from slm_jax.conditions import Needs
from slm_jax.config import require, setting
from slm_jax.data.config import DataConfig
from slm_jax.data.tokenizer import Bytes
from slm_jax.model.config import ModelConfig
from slm_jax.optim import OptimConfig
from slm_jax.prune import rotate
from slm_jax.prune.choose import check_shape
from slm_jax.prune.sparse import OneShot
from slm_jax.step import TransformConfig


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  steps: int = setting(1000, '[0, 2^31)')  # 0: what the arm starts from is evaluated
  accumulate: int = setting(1, '[1, 2^31)')  # parts into which a batch is split, one after another
  z_loss: float = setting(0.0, '[0, inf)')
  loss_chunk: int = setting(2048, '[1, 2^31)', semantic=False)  # tokens whose logits exist at once
  # And for so many tokens of the vocabulary at a time; 0: for all.
  vocab_chunk: int = setting(0, '[0, 2^31)', semantic=False)


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  every: int = setting(200, '[1, 2^31)')  # steps; the last step is always evaluated
  # Of the valid split, about, in whole documents at even distances; 0: all.
  bytes: int = setting(65_536, '[0, 2^31)')
  samples: int = setting(2, '[0, 1000]')  # texts written at the end, as one batch
  sample_tokens: int = setting(96, '[0, 2^31)')
  temperature: float = setting(1.0, '[0, inf)')
  prompt: str = ''


@dataclasses.dataclass(frozen=True)
class InitConfig:
  """Where the parameters come from: an initialiser, or another arm's, cut to the size of this arm's model."""

  arm: str = setting('', arm=True)
  # What stays of a larger one (slm_jax/prune/choose.py): by its weights; by activations on training text, their
  # fluctuations (flap: heads and channels only) or the stream's principal directions (SliceGPT); by what the gates of
  # an arm with L0 (prune/l0.py) left open; or at random.
  by: Literal['magnitude', 'activations', 'flap', 'principal', 'gates', 'random'] = 'magnitude'
  # That stay, 0 for the first; none: chosen, or spread evenly if nothing tells them apart.
  layers: tuple[int, ...] = setting((), '[0, 2^31)')
  sparse: OneShot = OneShot()
  sequences: int = setting(128, '[1, 2^31)')  # of calibration text, at least: for what `by` and `sparse` read of it

  needs: ClassVar[Needs] = dict.fromkeys(('by', 'layers', 'sequences'), (lambda its: its.arm, 'init.arm'))

  def check(self, key: str) -> None:
    require(self.by != 'gates' or not self.layers, f'{key}.layers={self.layers}: with {key}.by=gates they are learnt')
    pruned = self.sparse.criterion != 'none'
    require(bool(self.arm) or not pruned, f"{key}.arm='': name the trained arm that {key}.sparse is to prune")

  def check_model(self, model: ModelConfig, key: str) -> None:
    """ConfigError for what this arm's model cannot start from."""
    if self.arm and self.by == 'principal':
      rotate.check(model, f'{key}.by=principal')
    self.sparse.check_model(model, f'{key}.sparse')

  def check_parent(self, parent: ModelConfig, model: ModelConfig) -> None:
    """ConfigError for a model that cannot be cut out of the parent's, whose tokens may be more, and others."""
    tied = parent.tied and self.by != 'principal'  # which unties it
    source = dataclasses.replace(parent, vocab_size=min(parent.vocab_size, model.vocab_size), tied=tied)
    check_shape(source, model, self.layers, width=self.by != 'flap')


@dataclasses.dataclass(frozen=True)
class RunConfig:
  """How, not what: nothing here changes a result beyond rounding, and nothing here enters an arm's identity."""

  data_parallel: int = setting(0, '[0, 2^31)')  # devices on the mesh axis 'data'; 0: all that are left
  fsdp: int = setting(1, '[1, 2^31)')
  tensor: int = setting(1, '[1, 2^31)')
  spread_optimizer: bool = True  # each of the devices on 'data' has its share of the optimiser's state, and not all
  spread_teacher: bool = False  # and of teachers' parameters, which are gathered when they are used
  log_every: int = setting(10, '[1, 2^31)')
  checkpoint_every: int = setting(500, '[1, 2^31)')
  keep: int = setting(2, '[1, 2^31)')  # checkpoints beside the best one
  prefetch: int = setting(2, '[1, 1000]')  # batches on the device ahead of the step
  population: bool = True  # train in one program with arms that differ in traced numbers and seeds only
  tensorboard: bool = False
  wandb: bool = False
  # First and last step of an XProf trace, in the arm's profile/; none: no trace.
  profile: tuple[int, ...] = setting((), '[1, 2^31)')
  dump: bool = False  # write the compiled step and its costs into the arm's hlo/
  price: str = 'on_demand'  # of a chip-hour: 'on_demand' or 'spot' of chips.toml, or dollars

  def check(self, key: str) -> None:
    known = not self.profile or (len(self.profile) == 2 and self.profile[0] <= self.profile[1])
    require(known, f'{key}.profile={self.profile}: must be the first and the last step of a trace, as in 10,12')
    chips.check_terms(self.price, f'{key}.price')


@dataclasses.dataclass(frozen=True)
class Config:
  name: str = setting('', semantic=False)  # the arm's label in tables; other arms may refer to it
  # Of the initial parameters and of all randomness in the step; the order of data has its own.
  seed: int = setting(0, '[0, 2^32)')
  model: ModelConfig = ModelConfig()
  data: DataConfig = DataConfig()
  optim: OptimConfig = OptimConfig()
  train: TrainConfig = TrainConfig()
  eval: EvalConfig = setting(EvalConfig(), semantic=False)  # measures a model, and does not change it
  init: InitConfig = InitConfig()
  transforms: tuple[TransformConfig, ...] = ()
  run: RunConfig = setting(RunConfig(), semantic=False)

  def check(self, key: str) -> None:
    data, train = self.data, self.train
    require(
      data.seq_len <= self.model.max_len,
      f'{key}.data.seq_len={data.seq_len}: longer than model.max_len={self.model.max_len} positions',
    )
    require(
      data.batch_size % train.accumulate == 0,
      f'{key}.data.batch_size={data.batch_size}: not divisible by train.accumulate={train.accumulate}',
    )
    tokens = Bytes.vocab_size if data.tokenizer == 'bytes' else 0 if data.tokenizer_file else data.vocab_size
    require(
      tokens <= self.model.vocab_size,
      f'{key}.model.vocab_size={self.model.vocab_size}: too small for the {tokens} tokens of {data.tokenizer}',
    )
    require(
      not self.model.mup_base_width or self.optim.name == 'adamw',
      f'{key}.optim.name={self.optim.name}: has no muP (model.mup_base_width={self.model.mup_base_width}); use adamw',
    )
    self.init.check_model(self.model, f'{key}.init')
    kinds = [transform.kind for transform in self.transforms]
    require(len(set(kinds)) == len(kinds), f'{key}.transforms={", ".join(kinds)}: one of a kind at most')
    for place, transform in enumerate(self.transforms):
      late = [kind for kind in kinds[:place] if kind in transform.before]
      require(not late, f'{key}.transforms={", ".join(kinds)}: {transform.kind} must stand before {", ".join(late)}')
      transform.check_in(self, f'{key}.transforms.{transform.kind}')

  @property
  def slots(self) -> int:
    """The slots for tokens in a batch: prompts and padding take as many FLOPs as the tokens that are predicted."""
    return self.data.batch_size * self.data.seq_len

  def check_parents(self, parents: Mapping[str, 'Config']) -> None:
    """ConfigError for an arm that cannot be made of those which it names: {dotted key: the arm's configuration}."""
    if 'init.arm' in parents:
      self.init.check_parent(parents['init.arm'].model, self.model)
