"""What the questions about distillation share: a student, a wider teacher, a table, a claim and its verdict."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

from slm_jax.ablate import stats
from slm_jax.ablate.results import Row
from slm_jax.data.config import DataConfig
from slm_jax.experiment import Config, EvalConfig, RunConfig, TrainConfig
from slm_jax.model.config import ModelConfig
from slm_jax.optim import OptimConfig

TEACHER = 'teacher'

Values = dict[str, dict[Hashable, float]]  # {name: {seeds: value}}


def student(steps: int) -> Config:
  """115K parameters on the embedded stories, 1,024 tokens a step."""
  return Config(
    model=ModelConfig(
      vocab_size=512,
      d_model=64,
      n_layers=2,
      n_heads=4,
      n_kv_heads=4,
      head_dim=16,
      d_ff=128,
      max_len=64,
      qk_norm=True,
      init_std=0.05,
    ),
    data=DataConfig(tokenizer='sentencepiece', vocab_size=512, seq_len=64, batch_size=16),
    optim=OptimConfig(learning_rate=1e-2, warmup=30),
    train=TrainConfig(steps=steps),
    eval=EvalConfig(every=max(steps // 4, 1), sequences=256, samples=0),
    run=RunConfig(keep=1),
  )


def wider(base: Config, steps: float) -> dict[str, Any]:
  """Overrides that make a teacher of the student: twice as wide, `steps` times as long."""
  wide = {f'model.{name}': 2 * getattr(base.model, name) for name in ('d_model', 'n_heads', 'n_kv_heads', 'd_ff')}
  return {'name': TEACHER, 'transforms': (), 'train.steps': round(steps * base.train.steps), **wide}


def values(rows: Sequence[Row], key: str = 'loss') -> Values:
  """Of every arm that has the number."""
  found: Values = {}
  for row in rows:
    if row.summary.get(key) is not None:
      found.setdefault(row.name, {})[row.seeds] = row.summary[key]
  return found


def table(rows: Sequence[Row], columns: Mapping[str, str]) -> list[str]:
  """Means with their 95 % intervals. columns: {key of a summary: its title}."""
  found = {key: values(rows, key) for key in columns}
  names = dict.fromkeys(row.name for row in rows)
  wide = max(map(len, names)) + 3
  lines = ['    ' + ''.ljust(wide) + ''.join(title.ljust(22) for title in columns.values())]
  for name in names:
    cells = [stats.interval(found[key].get(name, {}).values()) for key in columns]
    shown = [stats.digits(cell.mean, cell.half) if cell.n else '–' for cell in cells]
    lines.append('    ' + name.ljust(wide) + ''.join(text.ljust(22) for text in shown))
  return lines


def claim(what: str, better: Mapping[Hashable, float], worse: Mapping[Hashable, float], least: float = 0.0) -> str:
  """'better is less than worse, by at least so much', over paired seeds: one line with its interval and verdict."""
  difference = stats.paired(better, worse)
  shown = stats.digits(difference.mean, difference.half, '+')
  shifted = difference._replace(mean=difference.mean + least)
  return f'- {what}: {shown}, n={difference.n}: {stats.expectation(shifted)}'


def scaled(of: Mapping[Hashable, float], by: float) -> dict[Hashable, float]:
  return {seeds: by * value for seeds, value in of.items()}


def absolute(ours: Mapping[Hashable, float], theirs: Mapping[Hashable, float], within: float) -> str:
  """REPRODUCED if the paired difference's 95 % interval lies within ±`within`, NOT REPRODUCED if outside of it."""
  d = stats.paired(ours, theirs)
  shown = stats.digits(d.mean, d.half, '+')
  if not d.n > 1:
    verdict = 'CANNOT TELL'
  elif abs(d.mean) + d.half <= within:
    verdict = 'REPRODUCED'
  else:
    verdict = 'NOT REPRODUCED' if abs(d.mean) - d.half > within else 'CANNOT TELL'
  return f'{shown}, n={d.n}: {verdict}'


def names_of(rows: Iterable[Row]) -> list[str]:
  return list(dict.fromkeys(row.name for row in rows))
