"""An experiment that trains in seconds, for workers that are several processes.

python tests/many.py --arm=ID --workdir=DIR --distributed=ADDRESS:PORT,COUNT,INDEX

SABOTAGE in the environment: 'bug STEP' is a bug of the last process in that step, 'nan STEP' a NaN of all, and with
'slow STEP' every step takes a while from then on. SHARD: tokens of a part of a cache.
"""

import dataclasses
import functools
import os
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent)]

import jax.numpy as jnp  # noqa: E402
import tiny  # noqa: E402

from slm_jax import distributed  # noqa: E402
from slm_jax.distill import capture  # noqa: E402
from slm_jax.distill.cached import CachedDistill  # noqa: E402
from slm_jax.distill.logits import Distill  # noqa: E402
from slm_jax.experiment import Config  # noqa: E402
from slm_jax.prune.transform import Prune  # noqa: E402

STEPS = 30
PRUNED_AND_TAUGHT = (Prune(0.5, start=0.2, end=0.6, every=4), Distill('teacher', weight=0.5))


def config() -> Config:
  base = tiny.config(STEPS)
  return dataclasses.replace(
    base,
    name='teacher',
    model=dataclasses.replace(base.model, n_kv_heads=2),
    optim=dataclasses.replace(base.optim, learning_rate=2e-3),
    eval=dataclasses.replace(base.eval, every=15, samples=0),
  )


def sweep_pair():
  """A model; a smaller one, cut out of it, pruned and taught by it; and one of what it once said."""
  yield {'name': 'teacher', 'eval.samples': 1}
  yield {'name': 'student', 'init.arm': 'teacher', 'model.n_layers': 1, 'transforms': PRUNED_AND_TAUGHT}
  yield {'name': 'cached', 'transforms': (CachedDistill('teacher', weight=0.5, k=8, precision='float32'),)}


def sabotage(kind: str, step: int) -> None:
  from slm_jax import train
  from slm_jax.ledger import Ledger

  add, make_step = Ledger.add, train.make_step

  def bad_add(self, at, measured):
    if kind == 'bug' and at == step and not distributed.is_main():
      raise RuntimeError('a bug of one process')
    time.sleep(0.2 if kind == 'slow' and at >= step else 0)
    add(self, at, measured)

  def bad_make_step(*args, **kwargs):
    take = make_step(*args, **kwargs)

    def bad(state, batch, frozen):
      state, measured = take(state, batch, frozen)
      return state, {**measured, 'total': jnp.where(state.step == step, jnp.nan, measured['total'])}

    return bad if kind == 'nan' else take

  Ledger.add, train.make_step = bad_add, bad_make_step  # type: ignore[method-assign]


if __name__ == '__main__':
  from launch import cli

  distributed.HEARTBEAT, distributed.GRACE, distributed.SHARED = 8, 4.0, 3.0
  if 'SABOTAGE' in os.environ:
    kind, step = os.environ['SABOTAGE'].split()
    sabotage(kind, int(step))
  if 'SHARD' in os.environ:
    capture.build = functools.partial(capture.build, shard=int(os.environ['SHARD']))  # type: ignore[assignment]
  cli.main()
