"""What is learnt beside the model: a group of its own in the optimiser, and nothing in what is exported."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from within import FROZEN, MODEL, batch_of, close, hidden_states, own, start

from slm_jax import train
from slm_jax.checkpoint import load_model
from slm_jax.config import check
from slm_jax.distill.features import Features, Relations
from slm_jax.distill.logits import Distill
from slm_jax.model import decoder
from slm_jax.optim import OptimConfig, optimizer
from slm_jax.sharding import make_mesh
from slm_jax.step import make_step

# ----------------------------------------------------------------------------------- their own group of the optimiser


@pytest.mark.parametrize('name', ['adamw', 'muon', 'adafactor'])
def test_projections_have_their_own_learning_rate_and_do_not_decay(name):
  optim = optimizer(OptimConfig(name, learning_rate=1e-2, warmup=0, weight_decay=0.5), 100)

  before = start(hidden_states(), optim=optim)
  step = jax.jit(make_step(MODEL, optim, hidden_states()))

  def moved(rate, weight=1.0):
    numbers = {'features.rate': jnp.float32(rate), 'features.weight': jnp.float32(weight)}
    after, _ = step(before._replace(hparams=before.hparams | numbers), batch_of(), FROZEN)
    return jax.tree.map(lambda a, b: np.asarray(a - b), after.params, before.params)

  still, slow, fast = moved(0.0), moved(0.5), moved(2.0)
  assert all((w == 0).all() for w in still['features'].values())
  assert all(np.abs(w).max() > 1e-3 for w in slow['features'].values())
  jax.tree.map(
    lambda s, f: np.testing.assert_allclose(4 * s, f, rtol=2e-3, atol=1e-6), slow['features'], fast['features']
  )
  close(own(still), own(fast), 1e-6)
  assert all(np.abs(w).max() < 1e-8 for w in moved(1.0, 0.0)['features'].values())


def test_what_clips_the_model_is_its_own_gradient():
  optim = optimizer(OptimConfig(warmup=0, clip=0.1, schedule='constant'), 9)
  transform = hidden_states()
  tx = optim.make({k: jnp.float32(v) for k, v in {**optim.hparams, **transform.hparams}.items()})
  plain = optim.make({k: jnp.float32(v) for k, v in optim.hparams.items()})
  params = start(transform).params
  grads = jax.tree.map(jnp.ones_like, own(params)) | {'features': jax.tree.map(lambda w: 9 * w, params['features'])}
  _, ours = tx.update(grads, tx.init(params), params)
  _, alone = plain.update(own(grads), plain.init(own(params)), own(params))
  mus = [
    next(s.mu for s in jax.tree.leaves(o, is_leaf=lambda s: hasattr(s, 'mu')) if hasattr(s, 'mu'))
    for o in (ours, alone)
  ]
  close(own(mus[0]), mus[1], 1e-6)
  norm = np.sqrt(sum((np.asarray(m) ** 2).sum() for m in mus[0]['features'].values()))
  assert norm == pytest.approx(0.1 * 0.1, rel=1e-4)


# --------------------------------------------------------------------------------------------------------- end to end


def test_an_arm_from_its_file_to_its_exported_model(tmp_path):
  """Teacher, then student with both kinds and Distill, stopped nowhere; what is exported is the plain model."""
  base = tiny.config(6)
  model = dataclasses.replace(base.model, d_model=24, n_layers=3)
  assert train.run(dataclasses.replace(base, model=model, transforms=()), tmp_path, 'teacher') == 0
  taught = (
    Features(teacher='teacher', layers=('1:1', '2:3'), rate=3.0),
    Relations(teacher='teacher', heads=2, relations=('qk', 'vv')),
    Distill('teacher'),
    *base.transforms,
  )
  config = check(dataclasses.replace(base, transforms=taught, optim=OptimConfig('muon', 1e-2, warmup=2)))
  assert train.run(config, tmp_path, 'student') == 0
  lines = [json.loads(line) for line in (tmp_path / 'arms' / 'student' / 'metrics.jsonl').read_text().splitlines()]
  assert any('features' in line and 'relations' in line for line in lines)
  exported, params, _ = load_model(tmp_path / 'arms' / 'student' / 'model', make_mesh())
  assert exported == base.model
  assert jax.tree.structure(params) == jax.tree.structure(decoder.shapes(base.model))


def test_a_run_that_goes_on_has_its_projections(tmp_path):
  base = tiny.config(4)
  assert train.run(dataclasses.replace(base, transforms=()), tmp_path, 'teacher') == 0
  config = dataclasses.replace(base, transforms=(Features(teacher='teacher', layers=('2:2',)),))
  job = train.prepare(config, tmp_path, tmp_path / 'arms' / 'student')
  state = job.fresh(config)
  assert list(state.params['features']) == ['2_to_2']
  assert state.params['features']['2_to_2'].sharding.is_fully_replicated
  assert 'features' not in job.final(state)
