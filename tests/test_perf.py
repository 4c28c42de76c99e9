"""FLOPs that the devices execute: against XLA's own count, and against what recomputation must add."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from slm_jax import perf
from slm_jax.ablate import measure
from slm_jax.distill.logits import Distill
from slm_jax.ema import Ema
from slm_jax.experiment import Config, TrainConfig
from slm_jax.model.config import ModelConfig
from slm_jax.model.flops import flops_per_token
from slm_jax.perf import matmul_flops
from slm_jax.prune.transform import Prune
from slm_jax.train import hardware_flops


def flops(f, *shapes):
  return matmul_flops(jax.make_jaxpr(f)(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)))


def test_a_product_counts_two_m_n_k_and_agrees_with_xla():
  a, b = (3, 5), (5, 7)
  assert flops(jnp.matmul, a, b) == 2 * 3 * 5 * 7
  x = [jax.ShapeDtypeStruct(s, jnp.float32) for s in (a, b)]
  assert jax.jit(jnp.matmul).lower(*x).compile().cost_analysis()['flops'] == 2 * 3 * 5 * 7


def test_loops_branches_and_what_nobody_uses():
  square = (4, 4)
  one = 2 * 4**3
  assert flops(lambda x: jax.lax.scan(lambda c, _: (c @ c, None), x, length=9)[0], square) == 9 * one
  assert flops(lambda x: jax.lax.cond(x[0, 0] > 0, lambda: x @ x @ x, lambda: x @ x), square) == 2 * one
  assert flops(lambda x: (x @ x, x + 1)[1], square) == 0
  assert flops(jax.jit(lambda x: x @ x), square) == one


@pytest.mark.parametrize('packed', [False, True])
def test_splash_counts_its_blocks_on_and_below_the_diagonal(packed):
  """2 products forward, 3 for the gradient of the queries, 4 for those of keys and values; on all devices of a mesh."""
  from slm_jax import sharding
  from slm_jax.model.fused import attend_by

  t, heads, size = 1024, 4, 128
  config = ModelConfig(n_heads=heads, n_kv_heads=2, head_dim=size, attention='splash')
  q, k = (jax.ShapeDtypeStruct((8, t, n, size), jnp.float32) for n in (heads, 2))
  documents = jnp.zeros((8, t), jnp.int32) if packed else None
  for mesh in (sharding.make_mesh(1, 1, 1, jax.devices()[:1]), sharding.make_mesh(2, 2, 2)):
    attend = attend_by(config, sharding.devices(mesh), documents, 8, t)
    traced = jax.make_jaxpr(jax.grad(lambda q, k, v, f=attend: f(q, k, v, True).sum(), (0, 1, 2)))(q, k, k)
    assert matmul_flops(traced) == pytest.approx(9 * 2 * 8 * heads * t**2 * size * 3 / 4, rel=1e-3)  # blocks of 512


def step_flops(**changes):
  """(of the traced step, model FLOPs of the step), with a teacher of the name 'teacher' to be had."""
  model = ModelConfig(vocab_size=64, d_model=32, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=16, d_ff=64, max_len=64)
  base = Config(model=model)
  data = dataclasses.replace(base.data, seq_len=32, batch_size=4, tokenizer='sentencepiece')
  config = dataclasses.replace(base, data=data, **changes)
  teacher = {'teacher': type('Arm', (), {'config': dataclasses.replace(base, data=data)})}
  job = measure.stand_in(config, teacher, None, allocate=False)
  return hardware_flops(job), job.flops * 4 * 32


HIDDEN = 3 * 4 * 2 * 16 * 2 * (32 - 16.5) * 4 * 32  # scores that the mask hides: 3 * 4 H K L (T - mean keys) tokens
HEAD = 2 * 32 * 64 * 4 * 32


def test_a_plain_step_executes_its_model_flops_and_the_hidden_scores():
  executed, model = step_flops()
  assert executed == pytest.approx(model + HIDDEN)


def test_chunks_compute_the_head_once_more():
  executed, model = step_flops(train=TrainConfig(loss_chunk=64))
  assert executed == pytest.approx(model + HIDDEN + HEAD)


def test_the_first_pass_of_accumulation_costs_nothing():
  assert step_flops(train=TrainConfig(accumulate=4))[0] == pytest.approx(step_flops()[0])


def test_remat_computes_the_layers_once_more():
  plain, _ = step_flops()
  model = ModelConfig(
    vocab_size=64, d_model=32, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=16, d_ff=64, max_len=64, remat='full'
  )
  executed, same = step_flops(model=model)
  layers = flops_per_token(model, 32, backward=False) * 4 * 32 - HEAD + HIDDEN / 3
  # The layers' forward pass again, but for its last product, which the backward pass does not need.
  assert plain + 0.8 * layers < executed < plain + layers
  assert same == step_flops()[1]


def test_a_teacher_counts_and_masks_save_nothing():
  plain, model = step_flops()
  executed, with_teacher = step_flops(transforms=(Distill('teacher'),))
  assert with_teacher == pytest.approx(model * 4 / 3)
  assert executed == pytest.approx(plain + model / 3 + HIDDEN / 3)
  assert step_flops(transforms=(Prune(0.9), Ema(0.9)))[0] == pytest.approx(plain)


def test_the_peak_of_a_gpu_that_nobody_knows_is_that_of_all_of_them(monkeypatch):
  monkeypatch.setattr(perf, 'measured_matmul', lambda: 1e12)
  assert perf.peak_flops()[0] == 1e12  # of eight fake devices on one CPU

  class Unknown:
    device_kind, platform = 'NVIDIA L4', 'gpu'

  monkeypatch.setattr(jax, 'devices', lambda: [Unknown()] * 8)
  assert perf.peak_flops()[0] == 8e12
