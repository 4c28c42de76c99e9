"""What the questions share: a small student on stories, a wider teacher, and a table of means."""

from collections.abc import Mapping, Sequence
from typing import Any

from slm_jax.ablate import stats
from slm_jax.ablate.claims import values
from slm_jax.ablate.results import Row
from slm_jax.data.config import DataConfig
from slm_jax.experiment import Config, EvalConfig, RunConfig, TrainConfig
from slm_jax.model.config import ModelConfig
from slm_jax.optim import OptimConfig

TEACHER = 'teacher'


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
    eval=EvalConfig(every=max(steps // 4, 1), bytes=40_000, samples=0),
    run=RunConfig(keep=1),
  )


def wider(base: Config, steps: float) -> dict[str, Any]:
  """Overrides that make a teacher of the student: twice as wide, `steps` times as long."""
  wide = {f'model.{name}': 2 * getattr(base.model, name) for name in ('d_model', 'n_heads', 'n_kv_heads', 'd_ff')}
  return {'name': TEACHER, 'transforms': (), 'train.steps': round(steps * base.train.steps), **wide}


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
