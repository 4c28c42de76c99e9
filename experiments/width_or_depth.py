"""Is a model better cut in its width or in its depth, at the same parameters and after distillation?

Four layers of width 64 (197K parameters) learn the stories for 1,200 steps. The model is cut to 115K parameters, by
activations on training text (Minitron: block influence for layers), in three ways:

    depth    two of the four layers
    width    half of the heads and of the feed-forward channels, in all layers
    stream   three quarters of the residual stream and of the heads, 92 of 128 feed-forward channels

and is trained for 240 more steps on its uncut parent's distribution alone (KD; equal tokens, a fifth of the parent's).
Controls: models of the same shapes from scratch, with the same teacher and tokens; and from scratch, on the text alone,
with the tokens of the whole pipeline, the parent's included (1,440 steps). Each seed has a parent of its own, so losses
before recovery have their intervals as well.

Expected, written before the run: after recovery width < depth, in every seed (Minitron, arXiv 2407.14679, of models of
up to 15B parameters, each distilled from its uncut parent); each cut is ahead of its shape from scratch by 0.10 or more
(the same; threshold of ../shared/reference/pruning.md, P9). With the pipeline's tokens a model from scratch is behind
the cut one by less than 0.05, or ahead: the parent is not free, and pays where several models are cut from it. Of the
losses before recovery nothing is expected, as they often rank the other way; nor of `stream` against the others. Depth
takes fewer steps one after another, so it is the faster one where that counts; `python -m slm_jax.prune.target
--cost=latency` measures by how much.

Found (2 CPU cores, 5 seeds; WORKSPACE.md has the table): all eight REPRODUCED. Width is ahead of depth by 0.018 +-
0.015; cut models are ahead of their shapes from scratch by 0.4 to 0.5 at equal tokens, and behind them by 0.04 to 0.07
where those are given the whole pipeline's. With one parent for all seeds width was ahead by 0.010 +- 0.003: an interval
of retraining alone, a fifth as wide.

    python -m experiments.width_or_depth
"""

from collections.abc import Iterator, Sequence
from typing import Any

import launch
from experiments.common import student, table
from slm_jax.ablate.claims import Claim, all_of, less, values
from slm_jax.ablate.results import Row
from slm_jax.ablate.sweep import product, seeds
from slm_jax.config import override
from slm_jax.distill.logits import Distill
from slm_jax.experiment import Config

SEEDS = 5
PARENT = 'parent'
LONGER = 5  # the parent's steps, as a multiple of those of a recovery
MARGIN = 0.10  # nats
CLOSE = 0.05  # nats
SHAPES: dict[str, dict[str, int]] = {
  'depth': {'model.n_layers': 2},
  'width': {'model.n_heads': 2, 'model.n_kv_heads': 2, 'model.d_ff': 64},
  'stream': {'model.d_model': 48, 'model.n_heads': 3, 'model.n_kv_heads': 3, 'model.d_ff': 92},
}
BASELINE = 'depth, KD'


def config() -> Config:
  """The parent's shape, and the steps of a recovery."""
  return override(student(240), {'model.n_layers': 4, 'optim.learning_rate': 5e-3})


def sweep(base: Config) -> Iterator[dict[str, Any]]:
  taught = {'transforms': (Distill(PARENT, weight=1.0),)}
  arms: list[dict[str, Any]] = [{'name': PARENT, 'train.steps': LONGER * base.train.steps}]
  for name, shape in SHAPES.items():
    start = {'init.arm': PARENT, 'init.by': 'activations', **shape}
    arms.append({'name': f'{name}, cut', 'train.steps': 0, **start})
    arms.append({'name': f'{name}, KD', 'optim.learning_rate': base.optim.learning_rate / 2, **start, **taught})
    arms.append({'name': f'{name}, scratch', **shape, **taught})
    arms.append({'name': f'{name}, pipeline', 'train.steps': (LONGER + 1) * base.train.steps, **shape})
  yield from product(arms, seeds(SEEDS))


def report(rows: Sequence[Row]) -> list[str | Claim]:
  losses = values(rows)
  lines = table(rows, {'loss': 'loss (nats)', 'ece': 'calibration error'})
  width, depth = losses.get('width, KD', {}), losses.get('depth, KD', {})
  ahead, close = [], []
  for name in SHAPES:
    ours, scratch = losses.get(f'{name}, KD', {}), losses.get(f'{name}, scratch', {})
    ahead.append(less(f'{name}, KD < {name}, scratch by {MARGIN}', ours, scratch, MARGIN))
    whole = losses.get(f'{name}, pipeline', {})
    close.append(less(f'{name}, pipeline < {name}, KD + {CLOSE}', whole, ours, -CLOSE))
  return [
    *lines,
    less('width, KD < depth, KD', width, depth, primary=True),
    all_of(f'each cut is ahead of its shape from scratch by {MARGIN}', ahead, primary=True),
    all_of(f'with the pipeline’s tokens, scratch is behind by less than {CLOSE}', close, primary=True),
    *ahead,
    *close,
  ]


if __name__ == '__main__':
  launch.main()
