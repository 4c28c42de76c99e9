"""FLOP counts against the matrix products that are in the program, and against XLA's own count."""

import dataclasses
import math

import jax
import jax.extend
import jax.numpy as jnp
import pytest
from families import FAMILIES

from slm_jax.model.config import ModelConfig
from slm_jax.model.decoder import Decoder, build
from slm_jax.model.flops import flops_per_token, parameter_count
from slm_jax.model.presets import preset


def matmul_flops(jaxpr, times=1):
  """2 * M * N * K of every dot_general, loops multiplied out."""
  total = 0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == 'dot_general':
      (contracted, _), _ = eqn.params['dimension_numbers']
      inner = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
      total += times * 2 * inner * math.prod(eqn.outvars[0].aval.shape)
    inner_times = times * eqn.params.get('length', 1) if eqn.primitive.name == 'scan' else times
    for sub in jax.extend.core.jaxprs_in_params(eqn.params):
      total += matmul_flops(sub, inner_times)
  return total


def per_token(config, t, backward):
  params = jax.eval_shape(build(config).init, jax.random.key(0))

  def loss(params, tokens):
    return Decoder(config).apply({'params': params}, tokens).var()

  f = jax.grad(loss) if backward else loss
  return matmul_flops(jax.make_jaxpr(f)(params, jnp.zeros((1, t), jnp.int32)).jaxpr) / t


@pytest.mark.parametrize('backward', [False, True])
@pytest.mark.parametrize('family', FAMILIES)
def test_equals_the_matrix_products_of_the_program(family, backward):
  """The program computes the whole T x T square of attention; the count leaves out the part that the mask hides."""
  config = FAMILIES[family]
  t = 20
  hidden_by_mask = 0.0
  for layer in range(config.n_layers):
    local = config.window and (layer + 1) % config.global_every
    seen = sum(min(i + 1, config.window) if local else i + 1 for i in range(t)) / t
    hidden_by_mask += 4 * config.n_heads * config.head_dim * (t - seen) * (3 if backward else 1)
  assert flops_per_token(config, t, backward) == pytest.approx(per_token(config, t, backward) - hidden_by_mask)


def test_equals_what_xla_counts_up_to_elementwise_work():
  config = ModelConfig(vocab_size=512, d_model=128, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=64, d_ff=512)
  params = jax.eval_shape(build(config).init, jax.random.key(0))
  f = jax.jit(lambda p, tokens: Decoder(config).apply({'params': p}, tokens))
  cost = f.lower(params, jnp.zeros((4, 32), jnp.int32)).compile().cost_analysis()
  assert cost['flops'] / (4 * 32) == pytest.approx(flops_per_token(config, 32, backward=False), rel=0.06)


def test_agrees_with_six_n_for_a_wide_model_and_a_short_context():
  """The usual estimate 6 N with N the parameters that are multiplied; within 2 % at SmolLM2-1.7B and 128 tokens."""
  config = preset('smollm2_1_7b')
  assert flops_per_token(config, 128) == pytest.approx(6 * parameter_count(config), rel=0.02)


def test_non_embedding_count_ignores_the_vocabulary():
  config = FAMILIES['gpt2']
  larger = dataclasses.replace(config, vocab_size=1000, max_len=512, tied=False)
  assert parameter_count(config, embeddings=False) == parameter_count(larger, embeddings=False)
  tables = config.d_model * (2 * 1000 + 512)
  assert parameter_count(larger) == parameter_count(larger, embeddings=False) + tables
