"""Training one arm, from its configuration to a finished model. Reads from top to bottom.

    data -> model, optimiser, transforms -> one jitted step -> state (fresh, inherited or resumed) -> loop -> finish

Nothing here knows a transform by name. What a run leaves behind, in WORKDIR/arms/<arm_id>/: config.json, run.json,
metrics.jsonl, checkpoints/, model/, samples.json and DONE.
"""

import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from slm_jax import config as configs
from slm_jax import distributed, energy, evaluate, memory, metrics, notices, observe, perf, pipeline, sharding
from slm_jax.checkpoint import Checkpoints, load_model, load_tokenizer, save_model, sparsity_of
from slm_jax.data.dataset import Dataset, open_data
from slm_jax.data.specialise import within
from slm_jax.data.tokenizer import Tokenizer
from slm_jax.experiment import Config
from slm_jax.files import disk_errors, write_json
from slm_jax.ledger import Diverged, Ledger, goodput
from slm_jax.losses import Terms
from slm_jax.model import decoder
from slm_jax.model.api import Batch, Model, Params
from slm_jax.model.flops import flops_per_token, parameter_count
from slm_jax.optim import optimizer
from slm_jax.preempt import EXIT_DONE, Preempted, Preemption
from slm_jax.prune import zeros
from slm_jax.prune.choose import fit, of_tokens, ranked
from slm_jax.prune.sparse import sparse
from slm_jax.record import Record
from slm_jax.step import Context, Metrics, Resources, Slot, TrainState, chain, init_state, make_step

# Of the last evaluation, and of the books; exact_match is there if the data have completions.
REPORTED = (
  *('loss', 'bits_per_byte', 'perplexity', 'accuracy', 'exact_match', 'ece', 'tokens_evaluated'),
  *('tokens', 'seconds'),
)

Place = Callable[[Any], Any]  # host arrays -> device arrays


class Trained(NamedTuple):
  """Other arms, by arm id."""

  model: Callable[[str], tuple[Model, Params]]
  tokenizer: Callable[[str], Tokenizer]


class Job(NamedTuple):
  """What does not change while an arm trains."""

  config: Config
  folder: Path
  dataset: Dataset
  opened: Callable[[Dataset], Dataset]  # what the transforms make of data, here of those in another order
  step: Callable[[TrainState, Batch, Mapping[str, Any]], tuple[TrainState, Metrics]]  # not compiled yet
  frozen: Mapping[str, Any]
  fresh: Callable[[Config], TrainState]  # of this arm, or of any that differs from it in traced numbers only
  layout: TrainState  # the shardings
  abstract: TrainState  # shapes and shardings, into which a checkpoint is restored
  final: Callable[[TrainState], Params]  # the parameters that evaluation and export see
  measure: Callable[[Params, Batch], Terms]  # the sums that an evaluation is made of
  judge: Callable[[dict[str, Slot], Params, Batch, Context], Terms]  # more of them, of the finished model
  witnesses: Callable[[], Mapping[str, Any]]  # what that needs beside `frozen`
  place: Place  # a batch onto the devices
  flops: float  # of the models for each slot of a batch, teachers included
  began: float  # time.perf_counter() when there was nothing of it yet


def run(config: Config, workdir: Path, arm_id: str, code: Mapping[str, str] = {}) -> int:
  """Trains the arm unless it is done. Returns 0 (done), 1 (failed for good) or 42 (preempted, state saved).

  code: hashes of the experiment's own files, for run.json.
  """
  folder = workdir / 'arms' / arm_id
  if distributed.on_main((folder / 'DONE').exists):
    return EXIT_DONE
  perf.keep_freed_memory()  # before anything is computed
  folder.mkdir(parents=True, exist_ok=True)
  perf.cache_compilations(workdir / 'cache')
  record = Record(folder, arm_id, config, experiment=code)
  try:
    with disk_errors(folder), Preemption(distributed.stop_agreed) as stop:
      with stop.at_once():  # nothing to lose yet
        job = prepare(config, workdir, folder)
        notices.show(job.dataset.notices)
        record.note(job.dataset.notices)
      before = pipeline.before((arm for _, arm in configs.arm_references(config)), job.dataset.made, workdir)
      summary = {**train(job, stop, arm_id), 'parent_flops': pipeline.total(before)}
      check_converged(config, summary)
      ended = record.done(summary, before)
      stop.pass_on()
      return ended
  except Exception as error:
    return record.ended(error)


def inputs(config: Config, workdir: Path) -> tuple[Dataset, jax.sharding.Mesh]:
  """Data and devices. What is wrong with them shows here; a launcher calls this before it writes anything of an arm."""
  metrics.check_sinks(config.run)
  mesh = sharding.make_mesh(config.run.data_parallel, config.run.fsdp, config.run.tensor)
  sharding.check_batch(mesh, config.data.batch_size, config.train.accumulate)
  dataset = distributed.main_first(
    lambda: open_data(config.data, workdir / 'data', logging.info, *sharding.share(mesh)),
  )
  dataset.tokenizer.check_vocabulary(config.model.vocab_size)
  return dataset, mesh


def prepare(config: Config, workdir: Path, folder: Path, mapped: bool = False) -> Job:
  """Everything up to the first step; nothing is compiled yet but the evaluation of shapes. mapped: see `assemble`."""
  began = time.perf_counter()
  memory.check(config, jax.devices())
  dataset, mesh = inputs(config, workdir)

  def model(arm_id: str) -> tuple[Model, Params]:
    rules = sharding.rules_of_teachers(config.run.spread_teacher)
    model_config, params, _ = load_model(workdir / 'arms' / arm_id / 'model', mesh, rules)
    return decoder.build(model_config, sharding.devices(mesh, mapped)), params

  others = Trained(model, lambda arm_id: load_tokenizer(workdir / 'arms' / arm_id / 'model', dataset.tokenizer))
  return assemble(config, folder, dataset, mesh, others, workdir / 'data', mapped=mapped)._replace(began=began)


def assemble(
  config: Config,
  folder: Path,
  dataset: Dataset,
  mesh: jax.sharding.Mesh,
  others: Trained,
  derived: Path,
  stand_in: bool = False,
  mapped: bool = False,
) -> Job:
  """The job of an arm, from its data, its devices and a way to get at other arms.

  derived: folder for data that transforms make. stand_in: whether they make none, for a measurement. mapped: whether
  the step will be one of several under vmap.
  """
  # ---- model, optimiser, transforms -> step
  model = decoder.build(config.model, sharding.devices(mesh, mapped))
  grouped = decoder.build(config.model, sharding.devices(mesh, mapped, grouped=True))  # as the step's gradient sees it
  resources = resources_of(config, dataset, model, others, derived)

  def opened(dataset: Dataset) -> Dataset:
    for spec in config.transforms:
      dataset = (spec.stand_in if stand_in else spec.open)(dataset, resources)
    return dataset

  dataset = opened(dataset)
  built = [spec.build(resources) for spec in config.transforms]
  transform = chain(*(part for part, _ in built))
  frozen = {name: tree for _, its in built for name, tree in its.items()}
  optim = optimizer(config.optim, config.train.steps, config.model.width_ratio)
  step = make_step(
    decoder.in_blocks(grouped, config.train.vocab_chunk),
    optim,
    transform,
    accumulate=config.train.accumulate,
    z_loss=config.train.z_loss,
    chunk=config.train.loss_chunk,
    **sharding.groups(mesh),
  )

  # ---- state: shapes, layout on the devices, how to make a fresh one
  shapes = jax.eval_shape(lambda key: init_state(key, model.init(key), optim, transform), jax.random.PRNGKey(0))
  axes = decoder.logical_axes(config.model)
  layout = layout_of(shapes, axes, mesh, config.run.spread_optimizer)
  own = sharding.shardings(jax.eval_shape(model.init, jax.random.PRNGKey(0)), axes, mesh)  # not what transforms add
  new_params = jax.jit(model.init, out_shardings=own)
  new_state = jax.jit(
    lambda key, params, hparams: init_state(key, params, optim, transform)._replace(hparams=hparams),
    out_shardings=layout,
  )

  def fresh(config: Config) -> TrainState:
    init_key, state_key = jax.random.split(jax.random.PRNGKey(config.seed))
    if config.init.arm:
      params = sharding.place(inherited(config, dataset, others), axes, mesh)
    else:
      params = new_params(init_key)
    # Not Python's floats, whose dtype gives way to others': the program would not be that of a resumed run.
    return new_state(state_key, params, jax.tree.map(np.float32, configs.traced(config)))

  return Job(
    config=config,
    folder=folder,
    dataset=dataset,
    opened=opened,
    step=step,
    frozen=frozen,
    fresh=fresh,
    layout=layout,
    abstract=sharding.abstract(shapes, layout),
    final=lambda state: transform.final(state.slots, state.params),
    measure=evaluate.make_measure(model, dataset.tokenizer, config.train.loss_chunk, config.data.has_completions),
    judge=transform.judge,
    witnesses=transform.witnesses,
    place=sharding.placer(mesh),
    flops=flops_per_token(config.model, config.data.seq_len) + sum(transform.flops.values()),
    began=time.perf_counter(),
  )


def layout_of(shapes: TrainState, axes: Any, mesh: jax.sharding.Mesh, spread: bool) -> TrainState:
  """Where a state's arrays lie. spread: whether every device keeps only its share of the optimiser's."""
  layout = sharding.shardings(shapes, axes, mesh)
  return layout._replace(opt_state=sharding.spread(layout.opt_state, shapes.opt_state, mesh)) if spread else layout


def inherited(config: Config, dataset: Dataset, others: Trained) -> Params:
  """Another arm's parameters, cut to this arm's model; its tokenizer may have more tokens than the data's."""
  arm = config.init.arm
  tokens, (parent, params) = others.tokenizer(arm), others.model(arm)
  source, params = parent.config, sharding.to_host(params)
  if tokens.fingerprint != dataset.tokenizer.fingerprint:
    kept = within(dataset.tokenizer, tokens, f'arm {arm}')
    source, params = of_tokens(source, params, kept, config.model.vocab_size)
  batches = functools.partial(dataset.calibration, config.init.sequences)
  source, params, scores = ranked(config.init.by, decoder.build(source), params, batches(), config.seed)
  params = fit(params, source, config.model, scores, config.init.layers)
  return sparse(config.init.sparse, decoder.build(config.model), params, batches(), config.seed)


def resources_of(config: Config, dataset: Dataset, model: Model, others: Trained, derived: Path) -> Resources:
  def load(arm_id: str) -> tuple[Model, Params]:
    dataset.tokenizer.check_same(others.tokenizer(arm_id), f'arm {arm_id}', dataset.valid.texts(32))
    return others.model(arm_id)

  return Resources(
    steps=config.train.steps,
    seq_len=config.data.seq_len,
    vocab=dataset.tokenizer.vocab_size,
    eos=dataset.tokenizer.eos,
    pad=dataset.tokenizer.pad,
    model=model,
    load=load,
    folder=derived,
    load_any=others.model,
    tokenizer=dataset.tokenizer,
    tokenizer_of=others.tokenizer,
    vocab_chunk=config.train.vocab_chunk,
  )


def jitted(job: Job) -> Any:
  """The step as it is run, and as it is compiled ahead of time. Its metrics are on all devices."""
  return jax.jit(job.step, donate_argnums=0, out_shardings=(job.layout, job.layout.step))


def abstract_batch(job: Job) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes and shardings of a batch, of all hosts together."""
  rows, layout = job.config.data.batch_size, sharding.batch_sharding(job.layout.step.mesh)  # type: ignore[attr-defined]
  return {
    name: jax.ShapeDtypeStruct((rows, *entry.shape[1:]), entry.dtype, sharding=layout)
    for name, entry in job.dataset.row().items()
  }


def train(job: Job, stop: Preemption, arm_id: str) -> dict[str, Any]:
  """The loop. Returns the summary of a run that came to its end; raises Preempted with everything saved."""
  config = job.config
  steps, checkpoint_every = config.train.steps, config.run.checkpoint_every
  everywhere = job.layout.step  # so that each host can read the numbers
  take = jitted(job)
  final, measure = jax.jit(job.final), jax.jit(job.measure, out_shardings=everywhere)
  with Checkpoints(job.folder / 'checkpoints', config.run.keep, logging.warning) as checkpoints:
    # ---- where were we?
    state, record = checkpoints.latest(job.abstract) or (job.fresh(config), {})
    step = int(state.step)
    sinks = metrics.sinks(config, job.folder, arm_id, logging.warning)
    log = metrics.MetricLog(job.folder / 'metrics.jsonl', step, sinks, logging.warning)
    log.keep_evaluations(job.dataset.valid.packed(config.eval.bytes).tokens)
    ledger = Ledger(log, config, job.flops, step, record, starting=time.perf_counter() - job.began)
    trace = observe.Trace(job.folder / 'profile', config.run.profile)
    if config.run.dump:
      observe.dump(job.folder / 'hlo', take, (job.abstract, abstract_batch(job), job.frozen))

    def save(loss: float | None = None) -> None:
      ledger.settle()  # a state whose loss is not finite is never saved
      with ledger.phase('checkpoint'):
        checkpoints.save(step, state, ledger.record(), loss)

    # ---- the loop
    try:
      with (
        jax.transfer_guard('disallow'),
        ledger,
        trace,
        job.dataset.batches(step, config.run.prefetch, job.place) as batches,
      ):
        while True:
          best = None
          if (step % config.eval.every == 0 or step == steps) and step not in log.evaluated:
            ledger.settle()
            with ledger.phase('eval'):
              results = evaluate.evaluate(measure, final(state), valid_batches(job), stop.check)
              best = ledger.evaluated(step, results)  # the loss, if it is the lowest so far
          if best is not None or step % checkpoint_every == 0 or step == steps:
            save(best)
          if step == steps:
            break
          stop.check()
          with ledger.phase('data'):
            batch = next(batches)
          trace.at(step, state)
          state, measured = take(state, batch, job.frozen)
          step += 1
          ledger.add(step, measured)  # reads the step before this one: the device never waits for the host
    except Preempted:
      save()
      raise
    finally:
      log.close()
  return finish(job, state, {**log.evaluated[steps], **ledger.record()})


def valid_batches(job: Job) -> Iterator[Batch]:
  """What is evaluated on, on the devices."""
  return map(job.place, job.dataset.valid_batches(job.config.data.batch_size, job.config.eval.bytes))


def finish(job: Job, state: TrainState, results: Mapping[str, float]) -> dict[str, Any]:
  """Writes the finished model and samples of its text; returns what goes into the results table."""
  config = job.config
  params = jax.jit(job.final)(state)
  measured = assess(job, params, results, state)
  patterns = zeros.made(config, lambda arm: sparsity_of(job.folder.parent / arm / 'model'))
  save_model(job.folder / 'model', config.model, params, job.dataset.tokenizer, patterns)
  return {
    **measured,
    'flops': model_flops(job),
    'hardware_flops': config.train.steps * hardware_flops(job) if config.train.steps else 0.0,
    'parameters': parameter_count(config.model),
    **zeros.total(params),
    'steps': config.train.steps,
    **energy.bill(results, config.run.price),
    **goodput(results),
    'peak_bytes': observe.peak_bytes(),
  }


def assess(job: Job, params: Params, results: Mapping[str, float], state: TrainState | None) -> dict[str, Any]:
  """Writes samples of a finished model's text; returns what is reported of its last evaluation.

  state: if it is not known any more, what the transforms measure by it is left out.
  """
  config, dataset = job.config, job.dataset
  if results['loss'] is None:
    raise Diverged('the last evaluation: loss not finite; the last checkpoint is kept')
  samples = evaluate.samples(config, params, dataset.tokenizer)
  if distributed.is_main():
    write_json(job.folder / 'samples.json', samples)
  text, more = dataset.valid.packed(config.eval.bytes), {}
  if state is not None:
    context = Context(state.step, jax.random.PRNGKey(config.seed), state.hparams, {**job.frozen, **job.witnesses()})
    measure = jax.jit(job.judge, out_shardings=job.layout.step)
    more = evaluate.judged(measure, state.slots, params, valid_batches(job), context)
  return {
    **{k: results[k] for k in REPORTED if k in results},
    **more,
    'floor': text.floor,
    'gap': None if text.floor is None else results['loss'] - text.floor,
    'tokenizer': dataset.tokenizer.fingerprint,
    'held_out': text.digest,
    'bytes': results['tokens'] * dataset.bytes_per_token,
  }


def check_converged(config: Config, summary: Mapping[str, Any]) -> None:
  """Raises Diverged for an arm that was trained and knows less than the uniform distribution over its vocabulary.

  An arm that is not trained is measured as it is: a model with too many zeros may be worse than uniform.
  """
  loss, uniform = summary['loss'], math.log(config.model.vocab_size)
  if config.train.steps and loss > uniform:
    raise Diverged(
      f'it ends at a loss of {loss:.4g}, above the {uniform:.4g} nats a token of the uniform distribution;'
      ' the last checkpoint is kept'
    )


def model_flops(job: Job) -> float:
  """Of all steps, as the mathematics needs them: the slots of all batches, prompts and padding included."""
  return job.config.train.steps * job.config.slots * job.flops


def hardware_flops(job: Job) -> float:
  """Of one step, as the devices execute it; what `flops` leaves out is in: see `perf.matmul_flops`."""
  traced = jitted(job).trace(job.abstract, abstract_batch(job), job.frozen)  # not anew, if the step was run
  return perf.matmul_flops(traced.jaxpr)
