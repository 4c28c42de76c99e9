"""One-shot pruning as an arm, and recovery from it: exact zeros that stay, and what both cost in loss."""

import functools
import itertools
import json

import jax
import numpy as np
import pytest
import tiny
from toy import toy_batch, toy_model

from slm_jax import train
from slm_jax.ablate import report
from slm_jax.checkpoint import load_model
from slm_jax.config import ConfigError, check, override
from slm_jax.model.api import Feature
from slm_jax.preempt import EXIT_DONE
from slm_jax.prune import criteria, fisher
from slm_jax.prune.matrices import matrices
from slm_jax.prune.sparse import OneShot, sparse
from slm_jax.prune.stats import collect_all
from slm_jax.prune.transform import Prune
from slm_jax.sharding import make_mesh

CRITERIA = ('random', 'magnitude', 'first_order', 'obd', 'wanda', 'ria', 'sparsegpt')
PLAIN = {'transforms': (), 'eval.samples': 0, 'eval.every': 200}


@functools.cache
def weights(workdir, arm):
  _, params, _ = load_model(workdir / 'arms' / arm / 'model', make_mesh(1, 1, 1, jax.devices()[:1]))
  return {name: np.asarray(w) for name, w in matrices(params).items()}


def sparsities(workdir, arm):
  return {name: (w == 0).mean((1, 2)) for name, w in weights(workdir, arm).items()}


def loss(workdir, arm):
  return json.loads((workdir / 'arms' / arm / 'run.json').read_text())['summary']['loss']


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('sparse')
  dense = override(tiny.config(200), {**PLAIN, 'name': 'dense'})
  of = {**PLAIN, 'init.arm': 'dense', 'init.sequences': 32, 'train.steps': 0}
  arms = {'dense': dense, 'same': override(dense, of)}
  for criterion in CRITERIA:
    arms[criterion] = override(dense, {**of, 'init.sparse': OneShot(criterion, 0.75)})
  arms['2:4'] = override(dense, {**of, 'init.sparse': OneShot('sparsegpt', 0.5, '2:4')})
  arms['refitted'] = override(dense, {**of, 'init.sparse': OneShot('magnitude', 0.5, compensate='least_squares')})
  arms['as they are'] = override(dense, {**of, 'init.sparse': OneShot('magnitude', 0.5)})
  arms['global'] = override(dense, {**of, 'init.sparse': OneShot('obd', 0.75, allocation='global')})
  recovery = {**PLAIN, 'init.arm': 'random', 'transforms': (Prune(0.0, ticket='random'),)}
  arms['recovered'] = override(dense, {**recovery, 'train.steps': 20})
  for name, config in arms.items():
    assert train.run(override(config, {'name': name}), folder, name) == EXIT_DONE
  return folder


def test_no_steps_evaluate_what_an_arm_starts_from(workdir):
  assert loss(workdir, 'same') == pytest.approx(loss(workdir, 'dense'), rel=1e-6)
  summary = json.loads((workdir / 'arms' / 'same' / 'run.json').read_text())['summary']
  assert summary['steps'] == summary['tokens'] == summary['flops'] == 0


@pytest.mark.parametrize('criterion', CRITERIA)
def test_each_matrix_has_the_sparsity_that_was_asked_for(workdir, criterion):
  for name, found in sparsities(workdir, criterion).items():
    np.testing.assert_allclose(found, 0.75, atol=2e-3, err_msg=name)


def test_no_two_criteria_have_the_same_zeros(workdir):
  zeros = {criterion: {name: w == 0 for name, w in weights(workdir, criterion).items()} for criterion in CRITERIA}
  for one, other in itertools.combinations(CRITERIA, 2):
    for name, mine in zeros[one].items():
      assert (mine != zeros[other][name]).mean() > 0.01, (one, other, name)


def stream_fed_toy():
  """The toy, whose layers' matrices read the stream as it is before them."""
  model = toy_model()

  def features(params, batch, wanted):
    stream = [Feature('hidden', f.layer - (f.kind != 'hidden')) for f in wanted]
    hidden, seen = model.features(params, batch, stream)
    return hidden, {f: seen[of] for f, of in zip(wanted, stream, strict=True)}

  return model._replace(features=features)


def by_hand(model, params, text, key):
  """The scores of each criterion."""
  w, stats = matrices(params), collect_all(model, params, text)
  return {
    'random': criteria.random(w, key),
    'magnitude': criteria.magnitude(w),
    'first_order': criteria.first_order(w, fisher.average(fisher.gradient, model, params, text)),
    'obd': criteria.obd(w, fisher.average(fisher.sampled, model, params, text, key)),
    'wanda': criteria.wanda(w, stats),
    'ria': criteria.ria(w, stats),
  }


def test_zeros_are_those_of_the_criterion_over_all_of_the_text():
  """The first batch is one token over and over, so that it says other things of the inputs than both do."""
  one_token = toy_batch(0)
  model, text = stream_fed_toy(), [{**one_token, 'inputs': one_token['inputs'] * 0}, toy_batch(1)]
  params, key = model.init(jax.random.PRNGKey(1)), jax.random.PRNGKey(3)
  whole, of_the_first = (by_hand(model, params, batches, key) for batches in (text, text[:1]))
  for criterion, scores in whole.items():
    pruned = matrices(sparse(OneShot(criterion, 0.5, 'output'), model, params, iter(text), 3))['up']
    four_best, of_less = (s['up'] >= np.sort(s['up'], axis=1)[:, -4:-3] for s in (scores, of_the_first[criterion]))
    np.testing.assert_array_equal(pruned != 0, four_best, criterion)
    assert (of_less == four_best).all() == (criterion in ('random', 'magnitude')), criterion


def test_an_arm_can_have_its_weights_fitted_anew(workdir):
  """The same zeros, other weights. That a matrix's error falls is a law of test_oneshot.py.

  This model's loss hardly rises without half of its weights, and which of the two is lower depends on rounding.
  """
  as_they_are, refitted = (weights(workdir, arm) for arm in ('as they are', 'refitted'))
  for name, w in as_they_are.items():
    np.testing.assert_array_equal(w == 0, refitted[name] == 0)
    assert not np.allclose(w, refitted[name], atol=1e-3), name
  assert loss(workdir, 'refitted') == pytest.approx(loss(workdir, 'dense'), abs=0.1)


def test_a_global_budget_is_shared_out_and_n_of_m_is_exact(workdir):
  shares = np.concatenate(list(sparsities(workdir, 'global').values()))
  assert shares.std() > 0.01
  assert all((found == 0.5).all() for found in sparsities(workdir, '2:4').values())


def test_recovery_keeps_the_zeros_and_regains_something(workdir):
  for name, w in weights(workdir, 'recovered').items():
    np.testing.assert_array_equal(w == 0, weights(workdir, 'random')[name] == 0, name)
  assert loss(workdir, 'recovered') < loss(workdir, 'random')


def test_a_report_can_be_made_of_arms_without_steps(workdir):
  assert 'sparsegpt' in report.publish(workdir, everything=True)


@pytest.mark.parametrize(
  'changes,message',
  [
    ({'init.sparse': OneShot('magnitude')}, "init.arm='': name the trained arm that .*init.sparse is to prune"),
    ({'init.arm': 'x', 'init.sparse': OneShot('obd', 1.0)}, r'sparsity=1.0: must lie in \[0, 1\)'),
    ({'init.arm': 'x', 'init.sparse': OneShot('obd', 0.6, '2:4')}, 'sparsity=0.6: must be 0.5 with pattern=2:4'),
    ({'init.arm': 'x', 'init.sparse': OneShot('sparsegpt', 0.5, 'output')}, 'pattern=output.*: sparsegpt chooses'),
    ({'init.arm': 'x', 'init.sparse': OneShot('obd', 0.5, '3:6')}, '3:6.*'),
    ({'init.arm': 'x', 'init.sparse': OneShot('obd', 0.99999)}, 'sparsity=0.99999'),
    (
      {'init.arm': 'x', 'init.sparse': OneShot('sparsegpt', compensate='least_squares')},
      'compensate=least_squares: with criterion=sparsegpt there is an update already; allowed: none',
    ),
    ({'init.sparse': OneShot(compensate='mean_shift')}, 'compensate=mean_shift: .*nothing to make up for'),
    (
      {'init.arm': 'x', 'init.sparse': OneShot('wanda', compensate='mean_shift')},
      'init.sparse.compensate=mean_shift: needs biases, and model.bias=false; allowed: none, least_squares',
    ),
    ({'init.sequences': 0}, 'init.sequences=0: must be positive'),
    ({'train.steps': -1}, 'train.steps=-1: must not be negative'),
  ],
)
def test_what_cannot_be_is_one_line(changes, message):
  with pytest.raises(ConfigError, match=message) as error:
    check(override(tiny.config(4), changes), 'config')
  assert '\n' not in str(error.value)


def test_what_is_zero_is_in_the_books_and_in_model_json(workdir):
  def told(arm):
    summary = json.loads((workdir / 'arms' / arm / 'run.json').read_text())['summary']
    model = json.loads((workdir / 'arms' / arm / 'model' / 'model.json').read_text())
    return summary.get('zeros', 0), model['sparsity']

  assert told('dense') == (0, {})
  zeros, sparsity = told('2:4')
  assert sparsity == {name: {'density': 0.5, 'pattern': '2:4'} for name in sparsities(workdir, '2:4')}
  zeros_of, found = told('magnitude')
  assert zeros_of == pytest.approx(1.5 * zeros, rel=2e-3)
  assert {name: its['density'] for name, its in found.items()} == pytest.approx(dict.fromkeys(found, 0.25), abs=2e-3)
  assert not any('pattern' in its for its in found.values())
