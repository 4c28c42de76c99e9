"""What the questions share: a small student on stories, a wider teacher, a table, a claim and its verdict."""

from collections.abc import Callable, Hashable, Mapping, Sequence
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


def values(rows: Sequence[Row], key: str = 'loss', of: Callable[[float], float] = lambda value: value) -> Values:
  """Of every arm that has the number in its summary, or of a function of it."""
  found: Values = {}
  for row in rows:
    if row.summary.get(key) is not None:
      found.setdefault(row.name, {})[row.seeds] = of(row.summary[key])
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


def equal(what: str, ours: Mapping[Hashable, float], theirs: Mapping[Hashable, float], within: float) -> str:
  """'The two are equal within so much', over paired seeds; an interval across the limit cannot tell."""
  difference = stats.paired(ours, theirs)
  size, shown = abs(difference.mean), stats.digits(difference.mean, difference.half, '+')
  if not difference.n > 1 or abs(size - within) < difference.half:
    verdict = 'CANNOT TELL'
  else:
    verdict = 'REPRODUCED' if size <= within else 'NOT REPRODUCED'
  return f'- {what} within {within:g}: {shown}, n={difference.n}: {verdict}'
