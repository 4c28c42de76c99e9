"""A cut model is the masked one, made physically smaller; it is described by its configuration alone."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from slm_jax import metrics, train
from slm_jax.checkpoint import load_model, save_model
from slm_jax.config import ConfigError, from_dict, override, to_dict
from slm_jax.data.tokenizer import Bytes
from slm_jax.model import decoder
from slm_jax.model.config import ModelConfig
from slm_jax.model.decode import generate
from slm_jax.model.flops import parameter_count
from slm_jax.optim import OptimConfig, optimizer
from slm_jax.preempt import EXIT_DONE
from slm_jax.prune import spec
from slm_jax.prune.choose import at_random, best, by_magnitude, choose, fit, ranked
from slm_jax.prune.cut import Kept, cut, cut_state, cut_tree, smaller
from slm_jax.sharding import make_mesh

LLAMA = ModelConfig(vocab_size=64, d_model=32, n_layers=4, n_heads=8, n_kv_heads=4, head_dim=8, d_ff=48, max_len=32)
QWEN = dataclasses.replace(LLAMA, qk_norm=True, tied=False, norm_eps=1e-2)  # eps that is seen
GEMMA = dataclasses.replace(
  LLAMA,
  qk_norm=True,
  norm_offset=1.0,
  post_norms=True,
  mlp='geglu',
  window=4,
  global_every=2,
  softcap=20.0,
  norm_eps=1e-3,
)
GPT2 = dataclasses.replace(
  LLAMA, norm='layer', mlp='gelu', bias=True, positions='learned', n_kv_heads=8, n_heads=8, rope_theta=1e4
)
FAMILIES = {'llama': LLAMA, 'qwen': QWEN, 'gemma': GEMMA, 'gpt2': GPT2}
RNG = np.random.default_rng(0)


def noisy(config):
  """Parameters without the zeros and ones of an initialiser."""
  params = decoder.build(config).init(jax.random.PRNGKey(0))
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.PRNGKey(1), len(leaves))
  return tree.unflatten([x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])


def logits(config, params):
  tokens = jnp.arange(24).reshape(2, 12) % 30
  return decoder.Decoder(config).apply({'params': params}, tokens)


def some(*shape, of):
  """Increasing indices, another choice in each row."""
  rows = [np.sort(RNG.permutation(of)[: shape[-1]]) for _ in range(int(np.prod(shape[:-1], dtype=int)))]
  return np.array(rows).reshape(shape)


def kept_of(config, *units):
  """About half of each."""
  n, g = config.n_layers, config.n_kv_heads
  r = config.n_heads // g
  every = {
    'layers': np.array([0, 3]) if config.window else np.array([0, 2, 3]),
    'channels': some(n, 20, of=config.d_ff),
    'groups': some(n, g // 2, of=g),
    'queries': some(n, g, 1, of=r),
    'width': some(20, of=config.d_model),
    'vocabulary': np.concatenate([np.arange(30), some(10, of=34) + 30]),
  }
  return Kept(**{unit: every[unit] for unit in units})


def masked(config, params, kept):
  """The same with zeros in place of what goes; a layer that goes adds nothing."""

  def keep(axes, x):
    x = np.array(x)
    for axis, letter in enumerate(axes):
      index = {'F': kept.channels, 'G': kept.groups, 'D': kept.width, 'V': kept.vocabulary}.get(letter)
      if letter == 'H' and (kept.groups is not None or kept.queries is not None):
        g, r = config.n_kv_heads, config.n_heads // config.n_kv_heads
        there = np.zeros((config.n_layers, g, r), bool)
        for layer in range(config.n_layers):
          for group in range(g) if kept.groups is None else kept.groups[layer]:
            there[layer, group, range(r) if kept.queries is None else kept.queries[layer, group]] = True
        index = there.reshape(config.n_layers, -1)
        x = x * np.expand_dims(index, [a for a in range(1, x.ndim) if a != axis])
      elif index is not None and np.ndim(index) == 1:
        there = np.isin(np.arange(x.shape[axis]), index)
        x = x * there.reshape([-1 if a == axis else 1 for a in range(x.ndim)])
      elif index is not None:
        there = np.stack([np.isin(np.arange(x.shape[axis]), row) for row in index])
        x = x * np.expand_dims(there, [a for a in range(1, x.ndim) if a != axis])
    return x

  out = jax.tree.map(keep, decoder.letters(config), params)
  if kept.layers is not None:
    gone = [i for i in range(config.n_layers) if i not in kept.layers]
    for name in ('o', 'down', 'o_bias', 'down_bias'):
      if name in out['layers']:
        out['layers'][name][gone] = 0
  return out


CUTS = [('channels',), ('groups',), ('queries',), ('width',), ('layers',), ('vocabulary',)]
CUTS += [('channels', 'groups', 'queries', 'width', 'vocabulary', 'layers')]


# A layer norm over fewer channels is another function, and GPT-2 has no groups of heads.
CASES = [
  (family, some_units)
  for family in FAMILIES
  for units in CUTS
  if (some_units := tuple(u for u in units if family != 'gpt2' or u not in ('width', 'queries')))
]


@pytest.mark.parametrize('family,units', CASES, ids=[f'{family}-{"+".join(units)}' for family, units in CASES])
def test_a_cut_model_is_the_masked_one(family, units):
  config = FAMILIES[family]
  params, kept = noisy(config), kept_of(config, *units)
  new, small = cut(config, params, kept)
  jax.tree.map(lambda s, x: np.testing.assert_equal(x.shape, s.shape), decoder.shapes(new), small)
  assert parameter_count(new) < parameter_count(config)
  expected = logits(config, masked(config, params, kept))
  if kept.vocabulary is not None:
    expected = expected[..., kept.vocabulary]
  got = logits(new, small)
  assert np.abs(expected).max() > 0.1
  np.testing.assert_allclose(got, expected, atol=1e-5 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize('config', [QWEN, GEMMA], ids=['qwen', 'gemma'])
def test_without_the_epsilon_and_the_gain_a_cut_of_the_width_would_be_another_function(config):
  params, kept = noisy(config), kept_of(config, 'width')
  new, small = cut(config, params, kept)
  expected = logits(config, masked(config, params, kept))
  wrong = dataclasses.replace(new, norm_eps=config.norm_eps, qk_norm_eps=0.0)
  assert np.abs(logits(wrong, small) - expected).max() > 1e-4
  assert np.abs(logits(new, cut_tree(config, params, kept)) - expected).max() > 1e-3


def test_the_spec_names_every_axis_once():
  for config in FAMILIES.values():
    named = [(a.parameter, a.axis) for unit, axes in spec.spec(config).items() if unit != 'queries' for a in axes]
    assert len(set(named)) == len(named)
    table = {'.'.join(k.key for k in path): axes for path, axes in jax.tree.leaves_with_path(decoder.letters(config))}
    rest = {(p, i) for p, axes in table.items() for i, _ in enumerate(axes)} - set(named)
    assert {table[p][i] for p, i in rest} <= {'K', 'P'}
  shown = spec.show(LLAMA).splitlines()
  assert shown[1].split() == ['channels', '48', 'layers.down[1],', 'layers.gate[2],', 'layers.up[2]']
  assert len(shown) == len(spec.UNITS)


def test_what_is_cut_saves_loads_from_its_configuration_alone_decodes_and_trains(tmp_path):
  params = noisy(QWEN)
  new, small = cut(QWEN, params, kept_of(QWEN, *CUTS[-1]))
  save_model(tmp_path / 'model', new, jax.tree.map(jnp.asarray, small), Bytes())
  config, loaded, _ = load_model(tmp_path / 'model', make_mesh(1, 1, 1, jax.devices()[:1]))
  assert config == new == from_dict(ModelConfig, json.loads(json.dumps(to_dict(new))), 'model')
  np.testing.assert_allclose(logits(config, loaded), logits(new, small), atol=1e-6)
  prompt = jnp.arange(4)[None]
  text = generate(new, loaded, prompt, jnp.array([4]), jax.random.PRNGKey(0), max_new=5, temperature=0.0, eos=2, pad=0)
  assert text.shape == (1, 5)
  loss, grads = jax.value_and_grad(lambda p: logits(config, p).var())(loaded)
  assert np.isfinite(loss)
  assert float(optax.tree.norm(grads)) > 0


@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_the_state_of_an_optimiser_is_cut_with_the_parameters(name):
  """Also where a part of the parameters has another optimiser (Muon)."""
  params = noisy(LLAMA)
  kept = kept_of(LLAMA, 'channels', 'groups', 'queries', 'layers')
  made = optimizer(OptimConfig(name, clip=0.0), 10)
  numbers = {k: jnp.float32(v) for k, v in made.hparams.items()}
  _, state = made.make(numbers).update(params, made.make(numbers).init(params), params)
  small = cut_state(LLAMA, state, kept)
  expected = made.make(numbers).init(jax.tree.map(jnp.asarray, cut(LLAMA, params, kept)[1]))
  assert jax.tree.structure(small) == jax.tree.structure(expected)
  jax.tree.map(lambda a, b: np.testing.assert_equal(np.shape(a), np.shape(b)), small, expected)
  if name == 'adamw':  # all of it is by weight: the cut of the state of the whole is the state of the cut
    grads = jax.tree.map(jnp.asarray, cut(LLAMA, params, kept)[1])
    _, own = made.make(numbers).update(grads, expected, grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-9), small, own)


# ------------------------------------------------------------------------------------------------------- what stays


def test_the_strongest_channels_stay_and_scale_between_up_and_down_does_not_matter():
  params = noisy(LLAMA)
  layers = {**params['layers'], 'down': params['layers']['down'].at[0, 2].set(0)}  # a dead channel
  scores = by_magnitude(LLAMA, {**params, 'layers': layers})
  assert scores.channels[0].argmin() == 2
  scaled = {
    **layers,
    'up': layers['up'] * 4.0,
    'down': layers['down'] / 4.0,
    'q': layers['q'] * 2,
    'k': layers['k'] / 2,
  }
  again = by_magnitude(LLAMA, {**params, 'layers': scaled})
  np.testing.assert_allclose(again.channels, scores.channels, rtol=1e-6)
  np.testing.assert_allclose(again.groups, scores.groups, rtol=1e-6)


def test_a_dead_head_or_width_goes_first():
  params = noisy(LLAMA)
  layers = {**params['layers'], 'o': params['layers']['o'].at[1, 5].set(0)}  # query 1 of group 2
  params = {**params, 'layers': {n: x.at[..., 7].set(0) if n in ('o', 'down') else x for n, x in layers.items()}}
  params['layers'] |= {n: x.at[:, 7].set(0) for n, x in params['layers'].items() if n in ('q', 'k', 'v', 'gate', 'up')}
  params['embed'] = {'tokens': params['embed']['tokens'].at[:, 7].set(0)}
  scores = by_magnitude(LLAMA, params)
  assert scores.queries[1, 2].argmin() == 1
  assert scores.queries[1, 2].min() == 0
  assert scores.width.argmin() == 7
  small = dataclasses.replace(LLAMA, n_heads=4, d_model=31)
  kept = choose(LLAMA, small, scores)
  assert kept.queries[1, 2] == [0]
  assert 7 not in kept.width


def test_layers_stay_evenly_spread_unless_they_are_scored():
  for n, m, stay in ((4, 2, [0, 2]), (6, 3, [0, 2, 4]), (6, 4, [0, 1, 3, 4]), (3, 3, None)):
    source = dataclasses.replace(LLAMA, n_layers=n)
    kept = choose(source, dataclasses.replace(LLAMA, n_layers=m), at_random(source, 0))
    assert (None if kept.layers is None else kept.layers.tolist()) == stay
  scored = at_random(LLAMA, 0)._replace(layers=np.array([0.3, 0.1, 0.9, 0.2]))
  assert choose(LLAMA, dataclasses.replace(LLAMA, n_layers=2), scored).layers.tolist() == [0, 2]


def test_layers_may_be_named():
  target = dataclasses.replace(LLAMA, n_layers=2)
  assert choose(LLAMA, target, at_random(LLAMA, 0), (1, 2)).layers.tolist() == [1, 2]
  with pytest.raises(ConfigError, match=r'init.layers=\(1,\): model.n_layers=2 of them are needed'):
    choose(LLAMA, target, at_random(LLAMA, 0), (1,))
  with pytest.raises(ConfigError, match=r'init.layers=\(1, 4\): must increase and lie in 0..3'):
    cut(LLAMA, noisy(LLAMA), choose(LLAMA, target, at_random(LLAMA, 0), (1, 4)))


def test_of_equal_scores_the_first_stays():
  assert best(np.array([[1.0, 2.0, 1.0, 1.0], [3.0, 3.0, 3.0, 4.0]]), 2).tolist() == [[0, 1], [0, 3]]


@pytest.mark.parametrize('config', [LLAMA, GPT2], ids=['llama', 'gpt2'])
def test_a_model_is_fitted_to_a_smaller_one(config):
  target = dataclasses.replace(config, n_layers=2, d_ff=16, n_heads=4, n_kv_heads=config.n_kv_heads // 2, max_len=16)
  small = fit(noisy(config), config, target, by_magnitude(config, noisy(config)))
  jax.tree.map(lambda s, x: np.testing.assert_equal(x.shape, s.shape), decoder.shapes(target), small)


# -------------------------------------------------------------------------------------------------- what cannot be


@pytest.mark.parametrize(
  'changes,message',
  [
    ({'d_model': 64}, 'model.d_model=64: larger than 32'),
    ({'n_layers': 5}, 'model.n_layers=5: larger than 4'),
    ({'d_ff': 99}, 'd_ff=99'),
    ({'vocab_size': 32}, 'differs in vocab_size'),
    ({'head_dim': 4}, 'differs in head_dim'),
    ({'n_heads': 8, 'n_kv_heads': 2}, 'n_heads=8: 4 for each of 2 key/value heads.*has 2'),
  ],
)
def test_impossible_targets(changes, message):
  with pytest.raises(ConfigError, match=message):
    choose(LLAMA, dataclasses.replace(LLAMA, **changes), at_random(LLAMA, 0))


@pytest.mark.parametrize(
  'config,kept,message',
  [
    (LLAMA, Kept(channels=np.zeros((4, 0), int)), r'kept.channels: indices of shape \(4, 0\), expected \(4, 1..48\)'),
    (LLAMA, Kept(channels=np.zeros((3, 2), int)), r'expected \(4, 1..48\)'),
    (LLAMA, Kept(queries=some(4, 2, 1, of=2)), r'kept.queries: .* expected \(4, 4, 1..2\)'),
    (LLAMA, Kept(width=[1, 1]), r'kept.width: indices must increase and lie in 0..31'),
    (LLAMA, Kept(vocabulary=[63, 64]), r'kept.vocabulary: indices must differ and lie in 0..63'),
    (
      dataclasses.replace(LLAMA, mup_base_width=16),
      Kept(width=[1, 2]),
      'kept.width: cannot be cut with mup_base_width',
    ),
    (GEMMA, Kept(layers=[0, 2]), r'kept.layers=\[0, 2\]: .*global_every=2'),
  ],
)
def test_impossible_cuts(config, kept, message):
  with pytest.raises(ConfigError, match=message):
    smaller(config, kept)


# ---------------------------------------------------------------------------------------------------------- as an arm


def test_activations_choose_what_the_text_uses():
  """Channels and heads that are silent on the text go first, however large their weights are."""
  params = noisy(LLAMA)
  layers = dict(params['layers'])
  layers['up'] = layers['up'].at[2, :, :7].set(0)  # silent channels, with a large way out
  layers['down'] = layers['down'].at[2, :7].multiply(1e3)
  layers['v'] = layers['v'].at[1, :, 3].set(0)  # a silent group
  params = {**params, 'layers': layers}
  rng = np.random.default_rng(0)
  batches = [{'inputs': rng.integers(0, 60, (4, 16)), 'segments': np.ones((4, 16), np.int32)} for _ in range(2)]
  scores = ranked('activations', decoder.build(LLAMA), params, batches, 0)[2]
  target = dataclasses.replace(LLAMA, d_ff=41, n_kv_heads=3, n_heads=6, n_layers=3)
  kept = choose(LLAMA, target, scores)
  assert kept.channels[2].tolist() == list(range(7, 48))
  assert 3 not in kept.groups[1]
  assert kept.layers.tolist() == sorted(np.argsort(-scores.layers)[:3].tolist())
  again = ranked('magnitude', decoder.build(LLAMA), params, batches, 0)[2]
  assert (choose(LLAMA, target, again).channels != kept.channels).any()


def test_an_arm_starts_from_a_cut_of_another(tmp_path):
  parent = override(tiny.config(10), {'name': 'parent', 'transforms': (), 'eval.samples': 0})
  assert train.run(parent, tmp_path, 'parent') == EXIT_DONE
  losses = {}
  smaller = {'model.d_ff': 20, 'model.n_layers': 1, 'model.d_model': 12, 'init.arm': 'parent', 'train.steps': 1}
  for by in ('magnitude', 'activations', 'random'):
    arm = override(parent, {**smaller, 'name': by, 'init.by': by, 'init.sequences': 16})
    assert train.run(arm, tmp_path, by) == EXIT_DONE
    losses[by] = next(metrics.read(tmp_path / 'arms' / by / 'metrics.jsonl'))['loss']
  assert len(set(losses.values())) == 3
