"""muP: equal to the plain parametrisation at the base width, and at others what a training step changes is as large."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import FAMILIES, SMALL, params_of

from slm_jax import sharding
from slm_jax.config import ConfigError, check
from slm_jax.experiment import Config
from slm_jax.model import decoder, ops
from slm_jax.model.config import ModelConfig
from slm_jax.optim import OptimConfig, optimizer
from slm_jax.step import init_state, make_step

CONSTANT = OptimConfig(learning_rate=3e-3, warmup=0, schedule='constant', weight_decay=0.0, clip=0.0)


def batch_of(vocab, b=4, t=16, seed=0):
  tokens = np.random.default_rng(seed).integers(0, vocab, (b, t + 1), dtype=np.int32)
  ones = np.ones((b, t), np.int32)
  return {'inputs': tokens[:, :-1], 'targets': tokens[:, 1:], 'segments': ones, 'mask': ones.astype(np.float32)}


def trained(config, steps, optim=CONSTANT, seed=0):
  """`(parameters at the start, at the end, losses)` of a few steps on one batch."""
  model, opt = decoder.build(config), optimizer(optim, steps, config.width_ratio)
  first = jax.jit(model.init)(jax.random.key(seed))
  state, losses = init_state(jax.random.PRNGKey(1), first, opt), []
  step, batch = jax.jit(make_step(model, opt)), batch_of(config.vocab_size)
  for _ in range(steps):
    state, metrics = step(state, batch, {})
    losses.append(float(metrics['loss']))
  return first, state.params, losses


def with_mup(config, times=1.0):
  """`config` as a model `times` as wide as its base, head size included."""
  return dataclasses.replace(
    config, mup_base_width=round(config.d_model / times), mup_base_head_dim=round(config.head_dim / times)
  )


# --------------------------------------------------------------------------------------------------- at the base width


@pytest.mark.parametrize('family', FAMILIES)
def test_at_its_base_width_a_model_is_the_same_program(family):
  def text(config):
    model, opt = decoder.build(config), optimizer(CONSTANT, 4, config.width_ratio)
    new = jax.jit(lambda key: init_state(key, model.init(key), opt))
    key, batch = jax.random.PRNGKey(0), batch_of(config.vocab_size)
    return new.lower(key).as_text(), jax.jit(make_step(model, opt)).lower(new.eval_shape(key), batch, {}).as_text()

  config = FAMILIES[family]
  assert text(with_mup(config)) == text(config)
  assert text(with_mup(config, 2)) != text(config)


def test_at_its_base_width_a_model_starts_and_trains_as_without():
  config, optim = FAMILIES['qwen3'], dataclasses.replace(CONSTANT, weight_decay=0.1, clip=1.0)
  plain, ours = (trained(c, 4, optim) for c in (config, with_mup(config)))
  jax.tree.map(np.testing.assert_array_equal, plain, ours)


# ------------------------------------------------------------------------------------------ table 8 of arXiv 2203.03466


def test_initial_deviations():
  config = ModelConfig(**{**SMALL, 'd_model': 64, 'd_ff': 256}, init_std=0.1, tied=False, positions='learned')
  params = jax.jit(decoder.build(with_mup(config, 4)).init)(jax.random.key(0))
  layers, residual = params['layers'], 6**0.5
  for w in (*params['embed'].values(), params['head']):
    assert np.std(w) == pytest.approx(0.1, rel=0.1)
  for w in (layers['q'], layers['k'], layers['v'], layers['up'], layers['gate']):
    assert np.std(w) == pytest.approx(0.1 / 2, rel=0.1)
  for w in (layers['o'], layers['down']):
    assert np.std(w) == pytest.approx(0.1 / 2 / residual, rel=0.1)


def test_logits_are_divided_and_soft_capped_after_that():
  config = dataclasses.replace(FAMILIES['gemma3'], softcap=0.0)
  x = jax.random.normal(jax.random.key(0), (3, config.d_model))
  params = params_of(config)
  heads = [decoder.build(c).head for c in (config, with_mup(config, 4))]
  plain, ours = (np.asarray(head(params, x)) for head in heads)
  np.testing.assert_allclose(ours, plain / 4, rtol=1e-5, atol=1e-6)
  capped = decoder.build(dataclasses.replace(with_mup(config, 4), softcap=2.0)).head(params, x)
  np.testing.assert_allclose(capped, 2 * np.tanh(plain / 4 / 2), rtol=1e-5, atol=1e-6)


def test_scores_go_with_the_head_size_and_not_its_root():
  base = ModelConfig(d_model=64, head_dim=16, mup_base_width=64, mup_base_head_dim=16)
  wide = dataclasses.replace(base, d_model=256, head_dim=64)
  assert base.query_scale == 16**-0.5
  assert wide.query_scale == base.query_scale / 4
  assert dataclasses.replace(wide, attn_scale=1.0).query_scale == 1 / 4
  more_heads = dataclasses.replace(base, d_model=256, n_heads=16, n_kv_heads=16, mup_base_head_dim=0)
  assert more_heads.query_scale == base.query_scale


def test_adam_moves_hidden_matrices_less_and_decay_pulls_at_them_as_before():
  """A first step of Adam is lr in every coordinate, whatever the gradient; q and o are stacked over layers."""
  config = dataclasses.replace(FAMILIES['gpt2'], tied=False)
  params = params_of(config)
  grads = jax.tree.map(jnp.ones_like, params)

  def moved(width_ratio, decay):
    opt = optimizer(dataclasses.replace(CONSTANT, weight_decay=decay), 9, width_ratio)
    tx = opt.make({k: jnp.float32(v) for k, v in opt.hparams.items()})
    return tx.update(grads, tx.init(params), params)[0]

  still, pulled = moved(4.0, 0.0), moved(4.0, 0.5)
  hidden = {'q', 'k', 'v', 'o', 'up', 'down'}
  for path, update in jax.tree.leaves_with_path(still):
    share = 4 if path[0].key == 'layers' and path[-1].key in hidden else 1
    np.testing.assert_allclose(update, -3e-3 / share, rtol=1e-4, err_msg=str(path))
  plain = jax.tree.map(jnp.subtract, moved(1.0, 0.5), moved(1.0, 0.0))
  jax.tree.map(
    lambda a, b, c: np.testing.assert_allclose(a - b, c, atol=1e-7), pulled, still, plain
  )  # the same pull at any width


def test_any_mesh_gives_the_losses_of_one_device():
  config = with_mup(ModelConfig(**{**SMALL, 'vocab_size': 64, 'd_model': 32, 'd_ff': 48}), 4)
  model, opt = decoder.build(config), optimizer(CONSTANT, 4, config.width_ratio)

  def losses(mesh):
    def fresh():
      return init_state(jax.random.PRNGKey(1), model.init(jax.random.PRNGKey(0)), opt)

    layout = sharding.shardings(jax.eval_shape(fresh), decoder.logical_axes(config), mesh)
    state, put = jax.jit(fresh, out_shardings=layout)(), sharding.placer(mesh)
    step = jax.jit(make_step(model, opt), out_shardings=(layout, None))
    for i in range(4):
      state, metrics = step(state, put(batch_of(64, seed=i)), {})
      yield float(metrics['loss'])

  one = list(losses(sharding.make_mesh(devices=jax.devices()[:1])))
  np.testing.assert_allclose(list(losses(sharding.make_mesh(2, 2, 2))), one, rtol=1e-5)


@pytest.mark.parametrize(
  'change,message',
  [
    ({'optim': OptimConfig(name='muon')}, r'optim.name=muon: has no muP \(model.mup_base_width=64\); use adamw'),
    ({'optim': OptimConfig(name='adafactor')}, 'optim.name=adafactor: has no muP'),
    ({'model': ModelConfig(mup_base_width=-1)}, 'model.mup_base_width=-1: must not be negative'),
    ({'model': ModelConfig(mup_base_head_dim=16)}, 'model.mup_base_head_dim=16: needs .*mup_base_width, which is 0'),
  ],
)
def test_what_cannot_be_is_one_line(change, message):
  with pytest.raises(ConfigError, match=message) as error:
    check(Config(**{'model': ModelConfig(mup_base_width=64), **change}))
  assert '\n' not in str(error.value)


def test_an_optimiser_without_mup_refuses_another_width():
  assert optimizer(OptimConfig(name='muon'), 10, 1.0)
  with pytest.raises(ConfigError, match='optim.name=muon: has no muP, and the width is 4 times the base'):
    optimizer(OptimConfig(name='muon'), 10, 4.0)


# ----------------------------------------------------------------------------------------------------- coordinate check


def model_of(width, mup):
  """Four heads that grow with the width, so that the scale of the scores matters; the base is 64 wide."""
  size = dict(d_model=width, d_ff=width, head_dim=width // 4, n_heads=4, n_kv_heads=4)
  return ModelConfig(
    **{**SMALL, **size, 'n_layers': 2},
    mup_base_width=64 if mup else 0,
    mup_base_head_dim=16 if mup else 0,
  )


def coordinates(config, params, tokens):
  """The residual stream after every layer, and the logits."""
  x = ops.embed(params['embed']['tokens'], tokens, config.embed_scale, config.dtype)
  slots = jnp.arange(tokens.shape[1])[None]
  places, found = decoder._places(config, slots, jnp.zeros_like(slots)), []
  for i in range(config.n_layers):
    w = jax.tree.map(lambda stacked, i=i: stacked[i], params['layers'])
    x = decoder.layer(config, w, x, None, jnp.int32(i), places)[0]
    found.append(x)
  model = decoder.build(config)
  return [*found, model.head(params, model.hidden(params, {'inputs': tokens}))]


def slopes(mup, widths=(64, 128, 256, 512, 1024), steps=4):
  """d log(mean |change of a coordinate| after training) / d log(width), for every layer's output and for the logits."""
  changes = []
  for width in widths:
    config = model_of(width, mup)
    tokens = batch_of(config.vocab_size)['inputs']
    look = jax.jit(functools.partial(coordinates, config))
    first, last, _ = trained(config, steps)
    pairs = zip(look(first, tokens), look(last, tokens), strict=True)
    changes.append([float(jnp.abs(after - before).mean()) for before, after in pairs])
  return np.polyfit(np.log(widths), np.log(np.array(changes)), 1)[0], np.array(changes)


def test_coordinate_check():
  flat, _ = slopes(True)
  assert np.abs(flat).max() < 0.1


def test_the_coordinate_check_can_fail():
  steep, changes = slopes(False, widths=(64, 256, 1024))
  assert np.isfinite(changes).all()
  assert steep.min() > 0.5
