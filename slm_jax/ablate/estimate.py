"""How fast an arm trains where nothing was measured, and what a program of several arms takes, in stated terms.

    a step on a CPU       matrix products at the rates that this machine reaches in the widths of the model; PASSES over
                          the activations of its forward pass; LAYER seconds for each layer; three times all of that
                          with the backward pass; and the optimiser's passes over the parameters
    on an accelerator     the longest of FLOOR (dispatch, host), model FLOPs at UTILISATION of the published peak, and
                          the exchange of gradients among the chips of one slice (`ici` of chips.toml)
    an evaluation         a forward pass for each of its batches
    besides               starting processes and programs, compiling, checkpoints, what follows training: `Terms`

The numbers of CPUs were taken from 17 shapes of 4K to 10M parameters on two cores of an Intel Xeon with jax 0.10.2,
which took between 0.8 and 1.25 of this (median steps, nothing else running). Those of accelerators are assumed:
utilisation by the 40 to 55 % that an H200 reached at 124M and 1B parameters (WORKSPACE.md), the floor by the host's 1.7
ms a step. Left out: the start of machines, making data, a network between slices, and that tokens are written one after
another (on-policy), which takes an accelerator longer than its FLOPs say.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from slm_jax import chips, perf
from slm_jax.ablate.arms import Arm
from slm_jax.ablate.measure import Pace, evaluation_batches
from slm_jax.model.config import ModelConfig
from slm_jax.model.decoder import shapes
from slm_jax.model.flops import attended_keys, flops_per_token, parameter_count
from slm_jax.step import merge_flops

if TYPE_CHECKING:
  from slm_jax.ablate.cost import Device

PASSES = 5.0  # over all numbers of a forward pass: norms, RoPE, softmax, residuals, the loss
LAYER = 0.7e-3  # seconds of a layer's forward pass besides, for starting its some hundred operations
ATTENTION = 0.25  # of the peak: attention's batched products, in the shapes of small models
UPDATE = 5.0  # passes over the parameters, for the optimiser
UTILISATION = 0.4  # of an accelerator's published peak
FLOOR = 2e-3  # seconds of a step on an accelerator
DISK = 1e9  # bytes/s of a checkpoint


class Terms(NamedTuple):
  """Seconds that do not depend on how long an arm trains."""

  process: float  # to start one: Python, imports, devices
  program: float  # to open data, parents and state, for a program
  evaluation: float  # to compile what an arm of no steps needs
  step: float  # to compile the step besides, and `layer` for each of its layers
  layer: float
  cached: float  # in place of all that, where the programs are in the cache
  save: float  # a checkpoint, whatever its size
  finish: float  # after training, once a program: the model, its samples
  judge: float  # the same for each arm that is judged beside a teacher


CPU = Terms(process=3.0, program=1.5, evaluation=2.0, step=2.0, layer=1.0, cached=2.0, save=0.1, finish=4.0, judge=2.5)
ACCELERATOR = Terms(
  process=20.0, program=5.0, evaluation=10.0, step=20.0, layer=2.0, cached=5.0, save=1.0, finish=10.0, judge=5.0
)


def terms(on: 'Device') -> Terms:
  return CPU if on.kind == 'cpu' else ACCELERATOR


# ------------------------------------------------------------------------------------------------------------- FLOPs


def own_flops(arm: Arm, arms: Mapping[str, Arm]) -> float:
  """Model FLOPs of a slot that each arm of a program takes for itself."""
  added = added_flops(arm, arms)
  return _plain(arm) + sum(flops for name, flops in added.items() if name not in arm.parents.values())


def teachers_flops(arm: Arm, arms: Mapping[str, Arm]) -> dict[str, float]:
  """`{arm id: model FLOPs of a slot}` of teachers' passes, which arms that see the same batches share."""
  return {name: flops for name, flops in added_flops(arm, arms).items() if name in arm.parents.values()}


def _plain(arm: Arm) -> float:
  return flops_per_token(arm.config.model, arm.config.data.seq_len)


def added_flops(arm: Arm, arms: Mapping[str, Arm]) -> dict[str, float]:
  """Model FLOPs of a slot that an arm's transforms add, by what is computed; see `step.merge_flops`."""
  config = arm.config
  models = {parent: arms[parent].config.model for parent in arm.parents.values()}
  return merge_flops(part.count_flops(config.model, config.data.seq_len, models) for part in config.transforms)


# -------------------------------------------------------------------------------------------------------------- pace


def pace(arm: Arm, arms: Mapping[str, Arm], on: 'Device') -> Pace:
  """Returns the pace of an arm that trains by itself."""
  config, its = arm.config, terms(on)
  # The whole of a model is compiled forward and backward, a teacher forward only. A scan has one iteration of layers.
  layers = _compiled_layers(config.model) + sum(
    _compiled_layers(arms[name].config.model) / 3 for name in teachers_flops(arm, arms)
  )
  return Pace(
    compiling=its.evaluation + (its.step + its.layer * layers if config.train.steps else 0.0),
    starting=its.cached,
    step=step_seconds(arm, arms, on),
    eval_batch=evaluation_seconds(arm, on),
    save=its.save + 12 * parameter_count(config.model) / DISK,
    steps=config.train.steps,
  )


def _compiled_layers(model: ModelConfig) -> int:
  return min(model.unroll or model.n_layers, model.n_layers)


def step_seconds(arm: Arm, arms: Mapping[str, Arm], on: 'Device', members: int = 1, orders: int = 1) -> float:
  """Seconds of a step of `members` arms in one program, that see `orders` orders of the data."""
  config, slots, teachers = arm.config, arm.config.slots, teachers_flops(arm, arms)
  if on.kind != 'cpu':
    flops = slots * (members * own_flops(arm, arms) + orders * sum(teachers.values()))
    return max(FLOOR, flops / (UTILISATION * on.peak), _exchange(arm, on))
  length = config.data.seq_len
  passes = (4 if config.model.remat == 'full' else 3) * own_flops(arm, arms) / _plain(arm)
  own = passes * _forward(config.model, slots, length, on, config.train.accumulate)
  own += UPDATE * parameter_count(config.model) / perf.measured_elementwise()
  shared = 0.0
  for name, flops in teachers.items():
    model = arms[name].config.model
    shared += _forward(model, slots, length, on) * flops / flops_per_token(model, length, backward=False)
  return members * own + orders * shared


def evaluation_seconds(arm: Arm, on: 'Device', members: int = 1) -> float:
  """Seconds of a batch of an evaluation."""
  config = arm.config
  if on.kind != 'cpu':
    return max(FLOOR, members * config.slots * _plain(arm) / 3 / (UTILISATION * on.peak))
  return members * _forward(config.model, config.slots, config.data.seq_len, on)


def _forward(model: ModelConfig, slots: int, seq_len: int, on: 'Device', parts: int = 1) -> float:
  """Seconds of a forward pass on this CPU; parts: one after another, into which the batch is split."""
  layers, keys = shapes(model)['layers'], attended_keys(model, seq_len)
  sizes = [math.prod(layers[name].shape[1:]) for name in ('q', 'k', 'v', 'o', 'gate', 'up', 'down') if name in layers]
  head = model.d_model * model.vocab_size
  products = model.n_layers * sum(2 * size / rate(math.sqrt(size), model.dtype) for size in sizes)
  products += 2 * head / rate(math.sqrt(head), model.dtype)
  products += 4 * model.n_heads * model.head_dim * keys / (ATTENTION * on.peak)
  numbers = model.n_layers * (4 * model.d_model + model.d_ff) + model.n_heads * keys + model.vocab_size
  return slots * (products + PASSES * numbers / perf.measured_elementwise()) + parts * LAYER * model.n_layers


def rate(n: float, dtype: str) -> float:
  """FLOP/s of products with an n x n matrix, between those that are measured: of 32, 64, ... 1024."""
  place = min(max(math.log2(n), 5.0), 10.0)
  low = min(int(place), 9)
  a, b = (perf.measured_products(2**i, dtype) for i in (low, low + 1))
  return a * (b / a) ** (place - low)


def _exchange(arm: Arm, on: 'Device') -> float:
  """Seconds of adding up gradients and handing parameters round, 4 bytes each, over the links of one slice."""
  chip, run = chips.of_kind(on.kind), arm.config.run
  if chip is None or not chip.ici:
    return 0.0
  size = 4 * parameter_count(arm.config.model) / run.tensor
  copies = max(on.chips / (run.fsdp * run.tensor), 1)
  gathered = 3 * size * (1 - 1 / run.fsdp)  # twice the parameters, and the gradients once
  return (gathered + 2 * size / run.fsdp * (1 - 1 / copies)) / chip.ici


# ------------------------------------------------------------------------------------------------ several in a program


def together(own: Pace, members: Sequence[Arm], arms: Mapping[str, Arm], on: 'Device') -> Pace:
  """Returns the pace of a program of several arms, by that of one alone, measured or estimated."""
  first, n, orders = members[0], len(members), len({arm.config.data.seed for arm in members})
  return own._replace(
    step=own.step * step_seconds(first, arms, on, n, orders) / step_seconds(first, arms, on),
    eval_batch=own.eval_batch * evaluation_seconds(first, on, n) / evaluation_seconds(first, on),
    save=n * own.save,
  )


def finish_seconds(members: Sequence[Arm], on: 'Device', own: Pace) -> float:
  """Seconds after training, which run.json does not hold: models, samples, and comparisons with teachers."""
  config, its = members[0].config, terms(on)
  judged = sum(any(key.endswith('.teacher') for key in arm.parents) for arm in members)
  return its.finish + judged * (its.judge + 3 * evaluation_batches(config) * own.eval_batch)
