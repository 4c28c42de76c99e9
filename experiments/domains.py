"""Does it matter on which text one prunes? One model of two domains, pruned for either, tested on both.

A byte model of 420K parameters is trained on books and on medical questions and answers, half and half. Then 60 % of
the layers' matrices is set to zero, by OBD (one budget for all matrices) or SparseGPT, calibrated on 128 sequences of
one of the two; and what is left is tested on each: the loss matrix, domain by calibration.

Expected, written before the run: tested on A, calibrated on A is better than calibrated on B, for both domains and both
criteria, three models each (arXiv 2405.06275, 2502.18424, 2510.22489).

Found (2 CPU cores, three models; the first 4 MB of ../shared/data books, A, and of medquad, B, question and answer as
one text), nats a byte: dense 1.509 on A and 1.058 on B. SparseGPT by A 1.691 +- 0.031 on A and 1.433 +- 0.044 on B,
by B 1.721 +- 0.019 and 1.361 +- 0.040; OBD by A 1.824 +- 0.097 and 1.62 +- 0.13, by B 1.876 +- 0.099 and 1.59 +-
0.12. All four expectations REPRODUCED: -0.030 +- 0.013 and -0.072 +- 0.035 (SparseGPT), -0.052 +- 0.011 and -0.026 +-
0.018 (OBD).

    python -m experiments.domains --config.data.sources=books.txt,medquad.jsonl

with any two sources.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import launch
from experiments.common import Values, claim, merged, student, values
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
