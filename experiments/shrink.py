"""At equal training tokens, is a small model best trained from scratch, distilled from a larger one, or cut out of it?

A teacher is trained first. Then four students of one shape, half as deep and with half as wide a feed-forward block,
each see the same tokens in the same order:

    scratch            random initial parameters, next-token loss
    distilled          random initial parameters, next-token loss and the teacher's distribution
    pruned             cut out of the teacher (every other layer, the strongest feed-forward channels), next-token loss
    pruned+distilled   both

Expected, written before the run: pruned+distilled <= pruned < distilled < scratch in held-out loss. A cut model starts
from what the teacher knows: Minitron (arXiv 2407.14679) reports pruning plus distillation ahead of training from
scratch at a fraction of the tokens; Hinton et al. (arXiv 1503.02531) distillation ahead of plain training. The
teacher's own training is not in the students' tokens; its FLOPs stand in results.csv (parent_flops).

    make quickstart                                                  # the embedded stories: minutes on two cores
    python -m experiments.shrink --config.data.sources=FILE_OR_FOLDER --workdir=runs/shrink_text
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import launch
from slm_jax.ablate.claims import Claim, less, values
from slm_jax.ablate.results import Row
from slm_jax.ablate.sweep import seeds
from slm_jax.data.config import DataConfig
from slm_jax.distill.logits import Distill
from slm_jax.experiment import Config, EvalConfig, InitConfig, TrainConfig
from slm_jax.model.config import ModelConfig
from slm_jax.optim import OptimConfig

BASELINE = 'scratch'
SEEDS = 3


def config() -> Config:
  """The student; the teacher is twice as deep and wide in its feed-forward blocks, and trained for longer."""
  return Config(
    model=ModelConfig(
      vocab_size=1024, d_model=128, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=32, d_ff=192, max_len=256
    ),
    data=DataConfig(tokenizer='sentencepiece', vocab_size=1024, seq_len=256, packing='whole', batch_size=8),
    optim=OptimConfig(learning_rate=5e-3, warmup=20),
    train=TrainConfig(steps=120),
    eval=EvalConfig(every=40, bytes=115_000),
    transforms=(Distill('teacher', weight=0.5, temperature=1.0),),
  )


def sweep(base: Config) -> Iterator[dict[str, Any]]:
  teacher = {'model.n_layers': 2 * base.model.n_layers, 'model.d_ff': 2 * base.model.d_ff}
  yield {'name': 'teacher', 'transforms': (), 'train.steps': 5 * base.train.steps, **teacher}
  for seed in seeds(SEEDS):
    yield {'name': 'scratch', 'transforms': (), **seed}
    yield {'name': 'distilled', **seed}
    yield {'name': 'pruned', 'transforms': (), 'init': InitConfig('teacher'), **seed}
    yield {'name': 'pruned+distilled', 'init': InitConfig('teacher'), **seed}


def report(rows: Sequence[Row]) -> list[Claim]:
  """What became of the expectation."""
  loss = values(rows)
  order = ('pruned+distilled', 'pruned', 'distilled', 'scratch')
  return [less(f'{a} < {b}', loss[a], loss[b], primary=True) for a, b in itertools.pairwise(order)]


if __name__ == '__main__':
  launch.main()
