"""What does a training step of models of published sizes need of a TPU slice, and how fast can it be there at most?

For machines that one does not have: nothing here is meant to be trained as it stands (the data are the embedded
stories). One arm each of SmolLM2's three sizes and Qwen3-0.6B, and a 1B student (Llama 3.2) that learns from an 8B
teacher (Llama 3.1) beside it, the teacher in bfloat16. Activations are bfloat16, parameters and AdamW's moments
float32; layers are a loop, recomputed in the backward pass.

On v5e:16x16 (16 GiB a chip) AdamW's 16 bytes a parameter, gradient included, are 2.0, 5.4, 8.9 and 25.5 GiB for 135M,
360M, 0.6B and 1.7B: all but the last fit without sharding the state. What was found stands in WORKSPACE.md.

    python -m launch.aot --experiment=experiments/published_sizes.py --topology=v5e:16x16
"""

from collections.abc import Iterator
from typing import Any

import launch
from slm_jax.data.config import DataConfig
from slm_jax.distill.logits import Distill
from slm_jax.experiment import Config, EvalConfig, RunConfig, TrainConfig
from slm_jax.model.presets import preset
from slm_jax.optim import OptimConfig

BASELINE = 'smollm2_135m'
# By preset: devices that the state is sharded over, and sequences a step.
SIZES = {'smollm2_135m': (1, 2048), 'smollm2_360m': (1, 1024), 'qwen3_0_6b': (1, 512), 'smollm2_1_7b': (16, 1024)}
SETTINGS = {'model.dtype': 'bfloat16', 'model.unroll': 1, 'model.remat': 'full'}


def config() -> Config:
  """Of a slice of 256 chips: 2,048 sequences a step of the smallest, 8 a chip."""
  return Config(
    model=preset('smollm2_135m'),
    data=DataConfig(tokenizer='sentencepiece', vocab_size=1024, seq_len=2048, batch_size=2048),
    optim=OptimConfig(learning_rate=3e-4, warmup=100),
    train=TrainConfig(steps=1000, loss_chunk=2048 * 256),  # 2,048 tokens a chip
    eval=EvalConfig(samples=0),
    run=RunConfig(population=False),
  )


def sweep() -> Iterator[dict[str, Any]]:
  for name, (fsdp, batch) in SIZES.items():
    yield {'name': name, 'model': preset(name), 'run.fsdp': fsdp, 'data.batch_size': batch, **SETTINGS}
  teacher = {'name': 'llama3_1_8b', 'model': preset('llama3_1_8b'), 'run.fsdp': 64}
  yield {**teacher, **SETTINGS}
  student = {'name': 'llama3_2_1b by 8b', 'model': preset('llama3_2_1b'), 'run.fsdp': 16, 'data.batch_size': 512}
  yield {**student, **SETTINGS, 'transforms': (Distill('llama3_1_8b', precision='bfloat16'),)}


if __name__ == '__main__':
  launch.main()
