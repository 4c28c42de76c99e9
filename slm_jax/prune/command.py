"""Shapes for a budget, from a command line: what a trained model can be cut to, and what each cut costs in loss.

    python -m slm_jax.prune.target --model=WORKDIR/arms/ID --share=0.6 [--cost=flops] [--multiple=8] [--by=activations]
                                   [--text=FILE] [--sequences=64] [--seq_len=N] [--batch=8]

Prints the shapes that `target.search` finds, the one with the lowest loss after the cut first, and what makes it an
arm. There is no recovery in these losses. They are in nats a token of held-out text: of the data that the arm was
trained on, or of the last tenth of --text; units are chosen by the rest of it. Without either, shapes are in order of
their parameters.
"""

import dataclasses
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import flags, logging

from slm_jax import commands, losses, notices
from slm_jax.config import check, require
from slm_jax.data import tokenizer
from slm_jax.data.config import DataConfig, of_arm
from slm_jax.data.dataset import Dataset, open_data
from slm_jax.files import expanded
from slm_jax.model import decoder
from slm_jax.model.api import Params
from slm_jax.model.config import ModelConfig
from slm_jax.model.flops import flops_per_token, parameter_count
from slm_jax.prune import rotate
from slm_jax.prune.choose import fit, ranked
from slm_jax.prune.target import COSTS, Candidate, kv_bytes, search

BYS = ('magnitude', 'activations', 'principal', 'random')  # that can cut all units of a shape
SIZES = ('n_layers', 'n_heads', 'n_kv_heads', 'd_model', 'd_ff', 'unroll')  # that a search changes


class Found(NamedTuple):
  shape: Candidate
  loss: float | None  # after the cut; None where there is no text


def main(argv: Sequence[str] | None = None) -> int:
  """The exit code: 0, or 1 with one line on stderr."""
  logging.use_absl_handler()
  options = flags.FlagValues()
  flags.DEFINE_string('model', None, 'the folder of a finished arm, or of its model', flag_values=options)
  flags.DEFINE_float('share', None, 'of the whole model’s cost, in (0, 1]', flag_values=options)
  flags.DEFINE_enum('cost', 'parameters', list(COSTS), 'what the share is of', flag_values=options)
  flags.DEFINE_integer('batch', 8, 'sequences in a pass whose latency is measured', flag_values=options)
  flags.DEFINE_integer('seq_len', 0, 'tokens in a sequence; 0: those of the text’s batches', flag_values=options)
  flags.DEFINE_integer('multiple', 8, 'what widths are rounded to, down', flag_values=options)
  flags.DEFINE_enum('by', 'activations', BYS, 'which units stay', flag_values=options)
  flags.DEFINE_string('text', '', 'a file or folder, in place of the arm’s own data', flag_values=options)
  flags.DEFINE_integer('sequences', 64, 'of text, to choose units by and to take losses on', flag_values=options)
  flags.DEFINE_integer('seed', 0, 'of by=random', flag_values=options)
  return commands.run(__doc__, options, argv, ('model', 'share'), made)


def made(options: flags.FlagValues) -> str:
  """The table, and the line that makes an arm of what is best."""
  from slm_jax.checkpoint import load_model  # from a floor above

  count = '[1, 2^31)'
  commands.check_ranges(options, batch=count, sequences=count, multiple=count, seq_len='[0, 2^31)', seed='[0, 2^32)')
  commands.require_effect(options, {'batch': ('cost', 'latency'), 'seed': ('by', 'random')})
  given = expanded(options.model)
  folder = given if (given / 'model.json').exists() else given / 'model'
  config, params, _ = load_model(folder)
  if options.by == 'principal':
    rotate.check(config, '--by=principal')
  require(options.seq_len <= config.max_len, f'--seq_len={options.seq_len}: at most model.max_len={config.max_len}')
  with tempfile.TemporaryDirectory() as scratch:
    dataset = text_of(folder, config, options, Path(scratch))
    seq_len = options.seq_len or (dataset.config.seq_len if dataset else config.max_len)
    shapes = search(config, options.share, COSTS[options.cost](config, options.batch, seq_len), options.multiple)
    nats = losses_of(config, params, [shape.config for shape in shapes], dataset, options) if dataset else None
  found = [Found(shape, nats[i + 1] if nats else None) for i, shape in enumerate(shapes)]
  found.sort(key=lambda f: (f.loss if f.loss is not None else 0.0, -parameter_count(f.shape.config)))
  whole = Found(Candidate(config, 1.0), nats[0] if nats else None)
  lines = table([whole, *found], seq_len, options.cost)
  best = changes(config, found[0].shape.config)
  flags_of = ' '.join(f'--config.model.{name}={value}' for name, value in best.items())
  name, own = of_arm(folder.parent)
  name = name or (folder.parent.name if own else 'this model')
  start = f'an arm with init.arm={name}, --config.init.by={options.by}' + (f' and {flags_of}' if best else '')
  return '\n'.join([*lines, '', f'{"best" if nats else "first"}: {start}'])


def text_of(folder: Path, config: ModelConfig, options: flags.FlagValues, scratch: Path) -> Dataset | None:
  """The data of --text, or those that the arm was trained on; None if there are neither."""
  _, own = of_arm(folder.parent)
  if own is None and not options.text:
    return None
  if not options.text:
    assert own is not None
    data = dataclasses.replace(own, seq_len=options.seq_len or own.seq_len)
    cache = folder.parent.parent.parent / 'data'
    return same_tokens(open_data(check(data, 'data'), cache, logging.info), folder)
  spelt = tokenizer.load(folder / 'tokenizer.model')
  seq_len = options.seq_len or (own.seq_len if own else min(config.max_len, DataConfig().seq_len))
  data = DataConfig(
    sources=(options.text,), seq_len=seq_len, batch_size=min(DataConfig().batch_size, options.sequences)
  )
  if not isinstance(spelt, tokenizer.Bytes):
    data = dataclasses.replace(data, tokenizer='sentencepiece', tokenizer_file=str(folder / 'tokenizer.model'))
  return same_tokens(open_data(check(data, 'data'), scratch, logging.info), folder)


def same_tokens(dataset: Dataset, folder: Path) -> Dataset:
  from slm_jax.checkpoint import load_tokenizer  # from a floor above

  dataset.tokenizer.check_same(load_tokenizer(folder, dataset.tokenizer), f'--model={folder}', dataset.valid.texts(32))
  notices.show(dataset.notices)
  return dataset


def losses_of(
  config: ModelConfig, params: Params, shapes: Sequence[ModelConfig], dataset: Dataset, options: flags.FlagValues
) -> list[float]:
  """Nats a token of the whole model, and of it cut to each of the shapes, on held-out text."""
  from slm_jax import evaluate  # from a floor above

  n_bytes = math.ceil(options.sequences * dataset.config.seq_len * dataset.bytes_per_token)
  held_out: list[Any] = list(dataset.valid_batches(min(dataset.config.batch_size, options.sequences), n_bytes))

  def loss(config: ModelConfig, params: Any) -> float:
    measure = evaluate.make_measure(decoder.build(config), dataset.tokenizer, losses.CHUNK)
    return evaluate.evaluate(jax.jit(measure), params, held_out, lambda: None)['loss']

  text = dataset.calibration(options.sequences)
  source, turned, scores = ranked(options.by, decoder.build(config), params, text, options.seed)
  host = jax.device_get(turned)
  return [loss(config, params), *(loss(shape, fit(host, source, shape, scores)) for shape in shapes)]


def table(found: Sequence[Found], seq_len: int, cost: str) -> list[str]:
  """A line for each, the whole model's first; shares are of its cost."""
  heads = (
    'layers',
    'heads',
    'kv heads',
    'width',
    'd_ff',
    f'of {cost}',
    'parameters',
    'FLOPs/token',
    'KV bytes/token',
    'loss',
  )
  rows: list[tuple[str, ...]] = [heads]
  for (c, share), loss in found:
    sizes = (c.n_layers, c.n_heads, c.n_kv_heads, c.d_model, c.d_ff)
    costs = (parameter_count(c), flops_per_token(c, seq_len, backward=False), kv_bytes(c))
    shown = '–' if loss is None else f'{loss:.4f}'
    rows.append((*map(str, sizes), f'{share:.0%}', *(f'{n:,.0f}' for n in costs), shown))
  wide = [max(len(row[i]) for row in rows) for i in range(len(heads))]
  return ['  '.join(text.rjust(w) for text, w in zip(row, wide, strict=True)) for row in rows]


def changes(whole: ModelConfig, small: ModelConfig) -> Mapping[str, int]:
  return {name: getattr(small, name) for name in SIZES if getattr(small, name) != getattr(whole, name)}
