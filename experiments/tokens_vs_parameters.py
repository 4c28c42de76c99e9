"""What do more parameters buy, and what do more tokens: a small scaling law, on text whose entropy is known.

Models of five widths, from 14K to 0.5M parameters, are each trained on four numbers of tokens (from scratch, with a
schedule of that length) and L(N, D) = E + A N^-alpha + B D^-beta is fitted to their losses. On real text E is a guess;
the embedded stories come from a grammar whose entropy is known exactly (the floor of the valid split), so here it is a
test of the fit. One rule gives the learning rate of a width, taken from experiments/lr_and_width.py.

Expected, written before the run: E of the fit agrees with the floor, and a budget of FLOPs C is best spent on N that
grows as C^a with a = beta / (alpha + beta) between 0.4 and 0.6, parameters and tokens in equal proportion, as Hoffmann
et al. (arXiv 2203.15556, a = 0.46 to 0.50) and Besiroglu et al. (arXiv 2404.10102, 0.51) find on web text. No run comes
near the floor, so E rests on extrapolation: a wide interval would be no surprise.

    python -m experiments.tokens_vs_parameters
"""

from collections.abc import Iterator, Sequence
from typing import Any

import launch
from slm_jax.ablate import scaling, stats
from slm_jax.ablate.claims import Claim, inside
from slm_jax.ablate.results import Row
from slm_jax.ablate.sweep import seeds
from slm_jax.data.config import DataConfig
from slm_jax.experiment import Config, EvalConfig, RunConfig, TrainConfig
from slm_jax.model.config import ModelConfig
from slm_jax.optim import OptimConfig

WIDTHS = (16, 32, 48, 80, 128)
STEPS = (100, 200, 400, 800)
SEEDS = 2
HEAD = 16
EXPONENT = (0.4, 0.6)  # where that of the best size is expected


def config() -> Config:
  return Config(
    model=ModelConfig(
      vocab_size=512, n_layers=2, head_dim=HEAD, max_len=256, qk_norm=True, init_std=0.05, **of_width(WIDTHS[0])
    ),
    data=DataConfig(tokenizer='sentencepiece', vocab_size=512, seq_len=256, packing='whole', batch_size=6),
    optim=OptimConfig(learning_rate=learning_rate(WIDTHS[0]), warmup=STEPS[0] // 5),
    train=TrainConfig(steps=STEPS[0]),
    eval=EvalConfig(every=STEPS[-1], bytes=75_000, samples=0),
    run=RunConfig(keep=1),
  )


def of_width(width: int) -> dict[str, int]:
  return {'d_model': width, 'n_heads': width // HEAD, 'n_kv_heads': width // HEAD, 'd_ff': 2 * width}


def learning_rate(width: int) -> float:
  """The best rates of lr_and_width.py, plain: a straight line in logarithms."""
  return 2**-4.24 * (width / 16) ** -0.80


def sweep() -> Iterator[dict[str, Any]]:
  for width in WIDTHS:
    shape = {f'model.{name}': value for name, value in of_width(width).items()}
    for steps in STEPS:
      rates = {'optim.learning_rate': learning_rate(width), 'optim.warmup': steps // 5}
      for seed in seeds(SEEDS):
        yield {'name': f'{width} wide, {steps} steps', 'train.steps': steps, **shape, **rates, **seed}


def report(rows: Sequence[Row]) -> list[str | Claim]:
  """The losses as a table, the law, and what became of the expectation."""
  parameters, tokens, losses = scaling.points(rows)
  fit = scaling.chinchilla(parameters, tokens, losses)
  law, floor = fit.law, min(row.summary['floor'] for row in rows)
  worst = max(abs(law.loss(*point) - loss) for *point, loss in zip(parameters, tokens, losses, strict=True))
  reach = min(losses) - floor
  lines = table(rows)
  lines.append(
    f'    L = {law.E:.4f} + {law.A:.4g} N^−{law.alpha:.3f} + {law.B:.4g} D^−{law.beta:.3f}; '
    f'no run is further than {worst:.3f} nats from it'
  )
  lines.append(
    f'    alpha in {shown(fit.interval(lambda law: law.alpha))}, beta in {shown(fit.interval(lambda law: law.beta))}'
  )
  draws = {'E': [law.E for law in fit.draws], 'a': [exponent(law) for law in fit.draws]}
  agrees = f'E agrees with the floor {floor:.4f}, within a tenth of the way from the best run to it ({reach / 10:.3f})'
  return [
    *lines,
    inside(agrees, law.E, draws['E'], floor - reach / 10, floor + reach / 10, primary=True),
    inside(f'a lies in {shown(EXPONENT)}', exponent(law), draws['a'], *EXPONENT, primary=True),
  ]


def table(rows: Sequence[Row]) -> list[str]:
  """Mean losses, by parameters and by tokens."""
  cells: dict[tuple[int, int], list[Row]] = {}
  for row in rows:
    cells.setdefault((row.summary['parameters'], row.config['train.steps']), []).append(row)
  sizes, steps = sorted({n for n, _ in cells}), sorted({s for _, s in cells})
  tokens = [next(its[0].summary['tokens'] for (_, s), its in cells.items() if s == step) for step in steps]
  lines = ['    parameters   ' + ''.join(f'{n / 1e3:6,.0f}K tokens' for n in tokens)]
  for size in sizes:
    means = [
      stats.interval(row.summary['loss'] for row in cells[size, step]).mean for step in steps if (size, step) in cells
    ]
    lines.append(f'    {size / 1e3:9,.1f}K   ' + ''.join(f'{mean:14.4f}' for mean in means))
  return lines


def exponent(law: scaling.Chinchilla) -> float:
  """a of N ~ C^a, the best size for a budget."""
  return law.beta / (law.alpha + law.beta)


def shown(interval: tuple[float, float]) -> str:
  return f'[{interval[0]:.3f}, {interval[1]:.3f}]'


if __name__ == '__main__':
  launch.main()
