"""Writes down what a teacher says of the training text, for students that learn from it (CachedDistill).

    python -m slm_jax.distill.cache --workdir=DIR --teacher=ARM [--method=top_k --k=64] [--out=FOLDER] [--data.KEY=V]

The data are those that the teacher was trained on, unless --data says otherwise. Run it again after an interruption: it
goes on where it was. On n machines that share FOLDER, give each its --host=i --hosts=n; the last to end finishes it.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags, logging

from slm_jax import commands, notices
from slm_jax.config import ConfigError, check, override, require
from slm_jax.data.config import DataConfig, of_arm
from slm_jax.data.dataset import open_data
from slm_jax.distill import capture
from slm_jax.distill.records import Layout
from slm_jax.files import expanded
from slm_jax.model import decoder

PREFIX = '--data.'


def main(argv: Sequence[str] | None = None) -> int:
  """The exit code: 0, or 1 with one line on stderr."""
  logging.set_verbosity(logging.INFO)
  logging.use_absl_handler()
  words = list(sys.argv[1:] if argv is None else argv)
  changes = dict(word.removeprefix(PREFIX).partition('=')[::2] for word in words if word.startswith(PREFIX))
  options = flags.FlagValues()
  flags.DEFINE_string('workdir', None, 'the experiment’s folder, where its arms and its data are', flag_values=options)
  flags.DEFINE_string('teacher', None, 'an arm there, by id or name, or the folder of a model', flag_values=options)
  flags.DEFINE_string('out', '', 'where to; else where an arm with cache=auto looks for it', flag_values=options)
  flags.DEFINE_enum('method', 'top_k', ['top_k', 'sampled', 'dense'], 'what to write down', flag_values=options)
  flags.DEFINE_integer('k', 64, 'entries of top_k', flag_values=options)
  flags.DEFINE_integer('draws', 40, 'of sampled', flag_values=options)
  flags.DEFINE_integer('seed', 0, 'of the draws', flag_values=options)
  flags.DEFINE_enum('precision', 'float16', ['float16', 'float32'], 'of log-probabilities', flag_values=options)
  flags.DEFINE_integer('host', 0, 'which of the hosts this is', flag_values=options)
  flags.DEFINE_integer('hosts', 1, 'that share the work', flag_values=options)
  flagged = [word for word in words if not word.startswith(PREFIX)]
  return commands.run(__doc__, options, flagged, ('workdir', 'teacher'), lambda options: made(options, changes))


def made(options: flags.FlagValues, changes: dict[str, str]) -> str:
  """Builds the cache; a line about it."""
  from slm_jax.checkpoint import load_model, load_tokenizer  # from a floor above

  commands.check_ranges(options, seed='[0, 2^32)')
  require(0 <= options.host < options.hosts, f'--host={options.host}: allowed: 0..{options.hosts - 1}, see --hosts')
  sampled = ('method', 'sampled')
  commands.require_effect(options, {'k': ('method', 'top_k'), 'draws': sampled, 'seed': sampled})
  workdir = expanded(options.workdir)
  folder = teacher_folder(workdir, options.teacher)
  dataset = open_data(data_of(folder, changes), workdir / 'data', logging.info)
  notices.show(dataset.notices)
  model_config, params, _ = load_model(folder)
  dataset.tokenizer.check_same(
    load_tokenizer(folder, dataset.tokenizer), f'--teacher={options.teacher}', dataset.valid.texts(32)
  )
  layout: Layout = capture.layout(
    options.method, options.k, options.draws, dataset.tokenizer.vocab_size, options.precision
  )
  what = capture.Capture(dataset, decoder.build(model_config), params, layout, options.seed)
  out = expanded(options.out) if options.out else capture.place(workdir / 'data', what)
  about = {'teacher': options.teacher}
  manifest = capture.build(out, what, about, logging.info, options.host, options.hosts)
  if manifest is None:
    return f'host {options.host} of {options.hosts} is done; others are not yet: {out}'
  return said(out, manifest)


def said(folder: Path, manifest: dict[str, Any]) -> str:
  key = manifest['key']
  size = {'top_k': f' k={key["size"]}', 'sampled': f' draws={key["size"]}'}.get(key['method'], '')
  return (
    f'{key["method"]}{size}: {manifest["bytes_per_token"]:.1f} bytes a token, {manifest["tokens"]:,} tokens, '
    f'{manifest["bytes"] / 1e6:,.1f} MB; the teacher’s loss is {manifest["nats"]:.4f}: {folder}'
  )


def teacher_folder(workdir: Path, teacher: str) -> Path:
  """The folder of the model that --teacher means."""
  path = expanded(teacher)
  if (path / 'model.json').exists():
    return path
  arms = {config.parent.name: _name(config.parent) for config in sorted(workdir.glob('arms/*/config.json'))}
  found = [arm for arm, name in arms.items() if teacher in (arm, name)]
  known = ', '.join(f'{arm} ({name})' for arm, name in arms.items()) or 'none'
  require(bool(found), f'--teacher={teacher}: no such arm in {workdir}, nor a model’s folder; arms: {known}')
  require(len(found) == 1, f'--teacher={teacher}: could be any of {", ".join(found)}')
  return workdir / 'arms' / found[0] / 'model'


def _name(folder: Path) -> str:
  try:
    return of_arm(folder)[0]
  except ConfigError:
    return '?'


def data_of(folder: Path, changes: dict[str, str]) -> DataConfig:
  """The data that the model was trained on, with the changes of the command line."""
  data = override(of_arm(folder.parent)[1] or DataConfig(), changes)
  return check(dataclasses.replace(data, content='') if changes else data, 'data')


if __name__ == '__main__':
  sys.exit(main())
