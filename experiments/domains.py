"""Does it matter on which text one prunes? One model of two domains, pruned for either, tested on both.

A byte model of 420K parameters is trained on books and on medical questions and answers, half and half. Then 60 % of
the layers' matrices is set to zero, by OBD (one budget for all matrices) or SparseGPT, calibrated on 128 sequences of
one of the two; and what is left is tested on each: the loss matrix, domain by calibration.

Expected, written before the run: tested on A, calibrated on A is better than calibrated on B, for both domains and both
criteria, three models each (arXiv 2405.06275, 2502.18424, 2510.22489).

    python -m experiments.domains --config.data.sources=books.txt,medquad.jsonl

with any two sources; the figures below are of ../shared/data (books, medquad).
"""

from collections.abc import Iterator, Sequence
from typing import Any

import launch
from experiments.distilling import Values, claim, merged, student, values
from slm_jax.ablate import stats
from slm_jax.ablate.results import Row
from slm_jax.config import override, require
from slm_jax.experiment import Config
from slm_jax.prune.sparse import OneShot

SEEDS = 3
WAYS = {
  'obd': OneShot('obd', 0.6, allocation='global'),
  'sparsegpt': OneShot('sparsegpt', 0.6),
}
BASELINE = 'dense'


def config() -> Config:
  return override(
    student(1500),
    {
      'model.vocab_size': 264,
      'model.d_model': 128,
      'model.n_heads': 4,
      'model.head_dim': 32,
      'model.n_kv_heads': 4,
      'model.d_ff': 256,
      'model.max_len': 128,
      'data.tokenizer': 'bytes',
      'data.seq_len': 128,
      'data.weights': (0.5, 0.5),
      'data.sources': ('books', 'medquad'),
      'optim.learning_rate': 3e-3,
    },
  )


def sweep(base: Config) -> Iterator[dict[str, Any]]:
  """Pruned arms see the text that calibrates them; a second arm of no steps takes each to the other domain."""
  require(len(base.data.sources) == 2, f'data.sources={base.data.sources}: name two, one for each domain')
  for seed in range(SEEDS):
    seeds = {'seed': seed, 'data.seed': seed}
    dense = 'dense' if seed == 0 else f'dense {seed}'
    yield {'name': dense, **seeds}
    none = {'train.steps': 0, 'data.weights': (), **seeds}
    for on, source in zip('AB', base.data.sources, strict=True):
      yield {'name': f'dense, on {on}', 'init.arm': dense, 'data.sources': (source,), **none}
    for way, spec in WAYS.items():
      for by, calibrating in zip('AB', base.data.sources, strict=True):
        name = f'{way} by {by}, on {by}' if seed == 0 else f'{way} by {by}, on {by} ({seed})'
        yield {'name': name, 'init.arm': dense, 'init.sparse': spec, 'data.sources': (calibrating,), **none}
        for on, tested in zip('AB', base.data.sources, strict=True):
          if on != by:
            yield {'name': f'{way} by {by}, on {on}', 'init.arm': name, 'data.sources': (tested,), **none}


def report(rows: Sequence[Row]) -> str:
  losses: Values = {}
  for name, of in merged(values(rows)).items():
    losses.setdefault(name.partition(' (')[0], {}).update(of)
  lines = ['    ' + 'loss (nats a byte)'.ljust(24) + 'on A'.ljust(20) + 'on B'.ljust(20)]
  for what in ('dense', *(f'{way} by {by}' for way in WAYS for by in 'AB')):
    cells = [stats.interval(losses.get(f'{what}, on {on}', {}).values()) for on in 'AB']
    shown = [stats.digits(cell.mean, cell.half) if cell.n else '–' for cell in cells]
    lines.append('    ' + what.ljust(24) + ''.join(text.ljust(20) for text in shown))
  for way in WAYS:
    for on, other in ('AB', 'BA'):
      ours, theirs = losses.get(f'{way} by {on}, on {on}', {}), losses.get(f'{way} by {other}, on {on}', {})
      lines.append(claim(f'{way}, on {on}: calibrated on {on} < on {other}', ours, theirs))
  return '\n'.join(lines)


if __name__ == '__main__':
  launch.main()
