"""Does the learning rate that is best for one width stay the best for others, with and without muP?

Models of four widths, 16 to 128, are trained on the same tokens with learning rates in factors of two: once in the
plain parametrisation, once in muP with the narrowest as its base, where the two are the same and so run once. Heads are
of one size, so wider models have more of them, and the feed-forward block is in proportion. The best learning rate of a
width is the vertex of a parabola in log2 of the rate through the lowest losses; its drift is the slope against log2 of
the width.

Expected, written before the run: without muP the best rate falls by half an octave or more with each octave of width;
with muP it moves by less than a quarter of an octave. Yang et al. (arXiv 2203.03466, figure 1) have it fall for
transformers under Adam, and stay with muP; Wortsman et al. (arXiv 2309.14322) find the same up to 1B parameters. These
widths are small, where the limit that muP is made for is far away.

    python -m experiments.lr_and_width
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

import launch
from slm_jax.ablate.claims import Claim, inside
from slm_jax.ablate.results import Row
from slm_jax.ablate.sweep import seeds
from slm_jax.data.config import DataConfig
from slm_jax.experiment import Config, EvalConfig, RunConfig, TrainConfig
from slm_jax.model.config import ModelConfig
from slm_jax.optim import OptimConfig

WIDTHS = (16, 32, 64, 128)
HEAD = 16
RATES = tuple(2.0**-k for k in range(8, 1, -1))
SEEDS = 3
PLAIN, MUP = 'plain', 'muP'
TRANSFERS = 0.25  # octaves an octave: a drift that would be made nothing of
DRAWS = 2000  # of the bootstrap


def config() -> Config:
  width = WIDTHS[0]
  return Config(
    model=ModelConfig(
      vocab_size=512, n_layers=2, head_dim=HEAD, max_len=64, qk_norm=True, init_std=0.05, **of_width(width)
    ),
    data=DataConfig(tokenizer='sentencepiece', vocab_size=512, seq_len=64, batch_size=16),
    optim=OptimConfig(warmup=30),
    train=TrainConfig(steps=150),
    eval=EvalConfig(every=150, bytes=40_000, samples=0),
    run=RunConfig(keep=1),
  )


def of_width(width: int) -> dict[str, int]:
  return {'d_model': width, 'n_heads': width // HEAD, 'n_kv_heads': width // HEAD, 'd_ff': 2 * width}


def sweep() -> Iterator[dict[str, Any]]:
  for width in WIDTHS:
    for mup in (False, True) if width > WIDTHS[0] else (False,):
      shape = {f'model.{name}': value for name, value in of_width(width).items()}
      shape['model.mup_base_width'] = WIDTHS[0] if mup else 0
      for rate in RATES:
        name = f'{MUP if mup else PLAIN} {width} lr=2^{int(np.log2(rate))}'
        for seed in seeds(SEEDS):
          yield {'name': name, 'optim.learning_rate': rate, **shape, **seed}


# ------------------------------------------------------------------------------------------------------- what came out

Losses = Mapping[int, np.ndarray]  # of one parametrisation: by width, [seeds, rates]


class Best(NamedTuple):
  """The best learning rate of one width."""

  rate: float  # log2
  loss: float  # of the parabola there, mean over seeds
  inside: bool  # whether rates on both sides of it were tried


def report(rows: Sequence[Row]) -> list[str | Claim]:
  rates, losses = read(rows)
  lines = ['    width        plain: best rate, loss           muP: best rate, loss']
  for width in losses[PLAIN]:
    found = [best(rates, losses[kind][width]) for kind in (PLAIN, MUP)]
    lines.append(
      f'    {width:5}' + ''.join(f'   2^{b.rate:6.2f}{" " if b.inside else "*"} {b.loss:9.4f}       ' for b in found)
    )
  if not all(best(rates, its).inside for kind in losses.values() for its in kind.values()):
    lines.append('    * at an end of the rates that were tried: the best may lie beyond')
  return [
    *lines,
    moves(
      f'{PLAIN}: the best rate falls by 0.5 octaves or more an octave of width', rates, losses[PLAIN], -np.inf, -0.5
    ),
    moves(f'{MUP}: it moves by less than {TRANSFERS}', rates, losses[MUP], -TRANSFERS, TRANSFERS),
  ]


def read(rows: Sequence[Row]) -> tuple[np.ndarray, dict[str, dict[int, np.ndarray]]]:
  """`(log2 of the rates, {parametrisation: Losses})`; the base width belongs to both."""
  by_key: dict[tuple[str, int], dict[Any, dict[float, float]]] = {}
  for row in rows:
    kind = MUP if row.config['model.mup_base_width'] else PLAIN
    seed = by_key.setdefault((kind, row.config['model.d_model']), {}).setdefault(row.seeds, {})
    seed[row.config['optim.learning_rate']] = row.summary['loss']
  rates = sorted(next(iter(by_key[PLAIN, WIDTHS[0]].values())))
  table = {key: np.array([[seed[rate] for rate in rates] for seed in its.values()]) for key, its in by_key.items()}
  plain, mup = ({width: its for (k, width), its in table.items() if k == kind} for kind in (PLAIN, MUP))
  return np.log2(rates), {PLAIN: plain, MUP: {WIDTHS[0]: plain[WIDTHS[0]], **mup}}


def best(rates: np.ndarray, losses: np.ndarray) -> Best:
  """The vertex of the parabola through the lowest mean loss [seeds, rates] and its two neighbours.

  No wider: the curve is far steeper towards rates that are too small than towards those that are too large.
  """
  mean = losses.mean(axis=0)
  i = int(mean.argmin())
  if i in (0, len(mean) - 1):
    return Best(float(rates[i]), float(mean[i]), False)
  x, (a, b, c) = rates[i - 1 : i + 2] - rates[i], mean[i - 1 : i + 2]
  left, right = (b - a) / -x[0], (c - b) / x[2]  # slopes on both sides of the middle
  curvature = (right - left) / (x[2] - x[0])
  slope = left + curvature * -x[0]
  if curvature <= 0:  # all three are equal
    return Best(float(rates[i]), float(b), True)
  shift = -slope / (2 * curvature)
  return Best(float(rates[i] + shift), float(b + shift * slope / 2), True)


def drift(rates: np.ndarray, losses: Losses) -> float:
  """Octaves that the best rate moves with each octave of width: the slope of a straight line through the vertices."""
  vertices = [best(rates, its).rate for its in losses.values()]
  return float(np.polyfit(np.log2(list(losses)), vertices, 1)[0])


def moves(what: str, rates: np.ndarray, losses: Losses, low: float, high: float) -> Claim:
  """Claims that the drift lies in a range.

  By draws of seeds, with replacement, for each width by itself; of few seeds rather too narrow. If a width has its best
  rate at an end of the rates, nothing can be told.
  """
  rng = np.random.default_rng(0)
  draws = [
    drift(rates, {width: its[rng.integers(0, len(its), len(its))] for width, its in losses.items()})
    for _ in range(DRAWS)
  ]
  at_an_end = not all(best(rates, its).inside for its in losses.values())
  undecided = 'a best rate is at an end of those that were tried' if at_an_end else ''
  return inside(what, drift(rates, losses), draws, low, high, primary=True, undecided=undecided)


if __name__ == '__main__':
  launch.main()
