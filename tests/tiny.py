"""An experiment that trains in seconds: for tests of the loop, and as a program for tests that kill it.

python tests/tiny.py WORKDIR STEPS [noise]      trains the arm 'tiny' in WORKDIR and exits with run()'s code
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from slm_jax.data.config import DataConfig  # noqa: E402
from slm_jax.ema import Ema  # noqa: E402
from slm_jax.experiment import Config, EvalConfig, RunConfig, TrainConfig  # noqa: E402
from slm_jax.model.config import ModelConfig  # noqa: E402
from slm_jax.optim import OptimConfig  # noqa: E402


def config(steps: int = 40) -> Config:
  return Config(
    name='tiny',
    model=ModelConfig(
      vocab_size=384, d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=32, max_len=96, unroll=1
    ),
    data=DataConfig(documents=200, seq_len=64, batch_size=8),
    optim=OptimConfig(learning_rate=1e-2, warmup=5),
    train=TrainConfig(steps=steps),
    eval=EvalConfig(every=10, bytes=1000, samples=1, sample_tokens=8),
    transforms=(Ema(0.9),),
    run=RunConfig(log_every=1, checkpoint_every=10),
  )


def arm(workdir: Path) -> Path:
  return workdir / 'arms' / 'tiny'


if __name__ == '__main__':
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  from slm_jax.train import run

  sys.exit(run(config(int(sys.argv[2])), Path(sys.argv[1]), 'tiny'))
