"""A shape for a budget: it fits, nothing larger does, and none is within another."""

import dataclasses
import itertools

import pytest

from slm_jax.config import ConfigError
from slm_jax.model import decoder
from slm_jax.model.api import Model
from slm_jax.model.config import ModelConfig
from slm_jax.model.flops import flops_per_token, parameter_count
from slm_jax.prune.choose import at_random, choose
from slm_jax.prune.target import COSTS, kv_bytes, latency, search

CONFIG = ModelConfig(vocab_size=64, d_model=64, n_layers=4, n_heads=8, n_kv_heads=4, head_dim=8, d_ff=160, max_len=32)


def sizes(config):
  return config.n_layers, config.n_kv_heads, config.d_model, config.d_ff


@pytest.mark.parametrize('what', ['parameters', 'flops', 'kv_bytes'])
@pytest.mark.parametrize('share', [0.3, 0.6, 0.95])
def test_what_is_found_fits_and_nothing_larger_does(what, share):
  if what == 'kv_bytes' and share == 0.3:
    share = 0.25  # the least that is tried
  cost = COSTS[what](CONFIG, 8, 32)
  found = search(CONFIG, share, cost)
  assert found
  for one in found:
    decoder.build(one.config)
    choose(CONFIG, one.config, at_random(CONFIG, 0))  # it can be cut out of the whole
    assert one.share == pytest.approx(cost(one.config) / cost(CONFIG))
    assert one.share <= share
    larger = dataclasses.replace(one.config, d_ff=one.config.d_ff + 8)
    assert one.config.d_ff == CONFIG.d_ff or cost(larger) > share * cost(CONFIG)
    assert one.config.d_ff % 8 == one.config.d_model % 8 == 0
  for one in found:
    for other in found:
      assert one is other or any(a > b for a, b in zip(sizes(one.config), sizes(other.config), strict=True))


def test_all_that_fits_is_within_something_found():
  """By trying every shape: 4, 3, 2 layers and groups, three widths, all multiples of 8 for d_ff."""
  config = dataclasses.replace(CONFIG, d_ff=32)
  found = [sizes(one.config) for one in search(config, 0.5, parameter_count)]
  assert all(len(set(each)) > 1 for each in list(zip(*found, strict=True))[:3]), 'depth, groups and width all vary'
  fitting = 0
  for shape in itertools.product((4, 3, 2), (4, 3, 2), (64, 48, 32), range(8, 33, 8)):
    layers, groups, width, d_ff = shape
    one = dataclasses.replace(config, n_layers=layers, n_kv_heads=groups, n_heads=2 * groups, d_model=width, d_ff=d_ff)
    if parameter_count(one) <= 0.5 * parameter_count(config):
      fitting += 1
      assert any(all(a <= b for a, b in zip(shape, other, strict=True)) for other in found), shape
  assert len(found) < fitting < 108


def test_all_of_the_budget_is_the_model_itself():
  assert [one.config for one in search(CONFIG, 1.0, parameter_count)] == [CONFIG]


def test_costs_of_the_cache_and_of_flops():
  half = dataclasses.replace(CONFIG, n_layers=2)
  assert kv_bytes(CONFIG) == 2 * 4 * 4 * 8 * 4 == 2 * kv_bytes(half)
  assert kv_bytes(dataclasses.replace(CONFIG, dtype='bfloat16')) == kv_bytes(CONFIG) / 2
  assert COSTS['flops'](CONFIG, 8, 32)(CONFIG) == flops_per_token(CONFIG, 32, backward=False)


def test_latency_is_a_share_of_the_whole_models():
  large = dataclasses.replace(CONFIG, d_model=256, d_ff=1024, n_layers=4)
  of = latency(large, 8, 32)
  assert of(large) == 1
  assert 0 < of(dataclasses.replace(large, n_layers=1, d_ff=64)) < 1


def test_latency_is_of_the_batch_and_the_length(monkeypatch):
  seen = []

  def build(config):
    def hidden(params, batch):
      seen.append((config.n_layers, batch['inputs'].shape))
      return batch['inputs']

    return Model(config, init=lambda key: {}, hidden=hidden, head=lambda params, x: x, features=None)

  monkeypatch.setattr(decoder, 'build', build)
  COSTS['latency'](CONFIG, 3, 17)(dataclasses.replace(CONFIG, n_layers=2))
  assert seen == [(4, (3, 17)), (2, (3, 17))]


def test_local_layers_and_mup_keep_what_cannot_be_cut():
  gemma = dataclasses.replace(CONFIG, window=4, global_every=2, mup_base_width=32)
  for one in search(gemma, 0.6, parameter_count):
    assert (one.config.n_layers, one.config.d_model) == (4, 64)


@pytest.mark.parametrize(
  'share,multiple,message',
  [
    (0.0, 8, r'share=0.0: must lie in \(0, 1\]'),
    (1.5, 8, 'share=1.5'),
    (0.5, 0, 'multiple=0: must be positive'),
    (0.01, 8, r'share=0.01: nothing fits; the least that is tried costs 0\.'),
  ],
)
def test_impossible_budgets(share, multiple, message):
  with pytest.raises(ConfigError, match=message):
    search(CONFIG, share, parameter_count, multiple)
