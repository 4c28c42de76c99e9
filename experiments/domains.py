"""Does it matter on which text one prunes? One model of two domains, pruned for either, tested on both.

A byte model of 420K parameters is trained on books and on medical questions and answers, half and half. Then 60 % of
the layers' matrices is set to zero, by OBD (one budget for all matrices) or SparseGPT, calibrated on 128 sequences of
one of the two; what is left is tested on each, and so is what it becomes in 300 steps of training, zeros kept, on one
of the two: the loss matrix, domain by calibration and recovery. The dense model trained as much more on one domain is
the reference for it.

Expected, written before the run: tested on A, calibrated on A is better than calibrated on B, for both domains and both
criteria, three models each (arXiv 2405.06275, 2502.18424, 2510.22489). Written when that was known, before anything was
trained: on A, it is still so after both were trained on A; calibrated and trained on A, a sparse model is better there
than the dense model of both domains, and worse on B by 0.10 nats or more.

Found (2 CPU cores, three models; the first 4 MB of ../shared/data books, A, and of medquad, B, question and answer as
one text): at once, calibrated on what is tested is better in all four cases (REPRODUCED, 0.03 to 0.07 nats a byte).
After training on one domain nothing is left of that: by A or by B, trained on A, differ by less than 0.003 (four times
CANNOT TELL). What a sparse model is trained on is what matters: 0.05 better on its domain than the dense model of both
(REPRODUCED, 0.03 to 0.06 short of a dense one trained as much on it), 0.34 to 0.55 worse on the other. The matrix is in
WORKSPACE.md.

    python -m experiments.domains --config.data.sources=books.txt,medquad.jsonl

with any two sources.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import launch
from experiments.common import student
from slm_jax.ablate import stats
from slm_jax.ablate.claims import Claim, all_of, less, values
from slm_jax.ablate.results import Row
from slm_jax.ablate.sweep import product, seeds
from slm_jax.config import override, require
from slm_jax.experiment import Config
from slm_jax.prune.sparse import OneShot
from slm_jax.prune.transform import Prune

SEEDS = 3
RECOVERY = 300  # steps
WAYS = {
  'obd': OneShot('obd', 0.6, allocation='global'),
  'sparsegpt': OneShot('sparsegpt', 0.6),
}
BASELINE = 'dense'

Texts = Mapping[str, Mapping[str, Any]]  # {domain: overrides}


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
  texts: dict[str, dict[str, Any]] = {}
  for domain, source in zip('AB', base.data.sources, strict=True):
    texts[domain] = {'data.sources': (source,), 'data.weights': ()}
  yield from product(_arms(base, texts), seeds(SEEDS))


def _arms(base: Config, texts: Texts) -> Iterator[dict[str, Any]]:
  yield {'name': 'dense'}
  for on in 'AB':
    yield {'name': f'dense, on {on}', 'init.arm': 'dense', 'train.steps': 0, **texts[on]}
    yield from _recovered('dense', 'dense', on, base, texts)
  for way, spec in WAYS.items():
    for by in 'AB':
      start = {'init.arm': 'dense', 'init.sparse': spec, 'train.steps': 0, **texts[by]}
      yield from _on_both(f'{way} by {by}', start, by, texts)
      for on in 'AB':
        yield from _recovered(f'{way} by {by}', f'{way} by {by}, on {by}', on, base, texts)


def _on_both(what: str, arm: dict[str, Any], here: str, texts: Texts) -> Iterator[dict[str, Any]]:
  """The arm, which is tested on the domain it sees, and one of no steps that takes it to the other."""
  name, there = f'{what}, on {here}', 'AB'.replace(here, '')
  yield {'name': name, **arm}
  yield {'name': f'{what}, on {there}', 'init.arm': name, 'train.steps': 0, **texts[there]}


def _recovered(what: str, start: str, on: str, base: Config, texts: Texts) -> Iterator[dict[str, Any]]:
  """Trained on one domain, its zeros kept."""
  arm = {'init.arm': start, 'train.steps': RECOVERY, 'optim.learning_rate': base.optim.learning_rate / 2, **texts[on]}
  kept = {'transforms': (Prune(0.0, ticket=start),)} if what != 'dense' else {}
  yield from _on_both(f'{what}, trained on {on}', arm | kept, on, texts)


def report(rows: Sequence[Row]) -> list[str | Claim]:
  losses = values(rows)
  lines = ['    ' + 'loss (nats a byte)'.ljust(32) + 'on A'.ljust(20) + 'on B'.ljust(20)]
  starts = ('dense', *(f'{way} by {by}' for way in WAYS for by in 'AB'))
  for what in (f'{start}{then}' for start in starts for then in ('', ', trained on A', ', trained on B')):
    cells = [stats.interval(losses.get(f'{what}, on {on}', {}).values()) for on in 'AB']
    shown = [stats.digits(cell.mean, cell.half) if cell.n else '–' for cell in cells]
    lines.append('    ' + what.ljust(32) + ''.join(text.ljust(20) for text in shown))

  def on(domain: str, what: str) -> Mapping[Hashable, float]:
    return losses.get(f'{what}, on {domain}', {})

  at_once, later, narrow = [], [], []
  for way in WAYS:
    for a, b in ('AB', 'BA'):
      own, other = (on(a, f'{way} by {by}') for by in (a, b))
      at_once.append(less(f'{way}, on {a}: calibrated on {a} < on {b}', own, other))
      own, other = (on(a, f'{way} by {by}, trained on {a}') for by in (a, b))
      later.append(less(f'{way}, on {a}, trained on {a}: calibrated on {a} < on {b}', own, other))
      narrow.append(less(f'{way}, on {a}: by {a}, trained on {a} < dense', own, on(a, 'dense')))
      away = on(b, f'{way} by {a}, trained on {a}')
      narrow.append(less(f'{way}, on {b}: dense + 0.10 < by {a}, trained on {a}', on(b, 'dense'), away, 0.10))
  return [
    *lines,
    all_of('at once, calibration on the tested domain is better', at_once, primary=True),
    all_of('it still is after training on that domain', later, primary=True),
    all_of('a narrow sparse model is better on its domain, and worse by 0.10 on the other', narrow, primary=True),
    *at_once,
    *later,
    *narrow,
  ]


if __name__ == '__main__':
  launch.main()
