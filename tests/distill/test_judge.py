"""What a finished student is measured by: against dense numpy, exact enumeration, and a student that is its teacher."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm_jax import evaluate
from slm_jax.distill import judge as judges
from slm_jax.distill.features import Features, Relations
from slm_jax.distill.logits import Distill, SelfDistill
from slm_jax.model import decoder
from slm_jax.model.config import ModelConfig
from slm_jax.step import Context, Resources

V, PADDED, EOS = 8, 12, 2  # tokens of the tokenizer, of the models
CONFIG = ModelConfig(
  vocab_size=PADDED, d_model=8, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=4, d_ff=8, max_len=64, init_std=0.8
)
MODEL = decoder.build(CONFIG)
TEACHER = decoder.build(dataclasses.replace(CONFIG, n_layers=2))
STUDENT, SAME, A, B = (m.init(jax.random.PRNGKey(i)) for i, m in enumerate((MODEL, MODEL, TEACHER, TEACHER)))
ARMS = {'a': (TEACHER, A), 'b': (TEACHER, B), 'itself': (MODEL, STUDENT)}


def judged(teacher='a', t=6, **settings):
  """(params, batch, step, key) -> terms, of `Distill` as an arm builds it."""
  return judged_by(Distill(teacher, **settings), t)


def judged_by(spec, t=6, average=STUDENT):
  """Of any transform; average: the parameters in its slot when it starts."""
  resources = Resources(10, t, V, MODEL, ARMS.__getitem__, Path(), EOS, 0)
  transform, frozen = spec.build(resources)

  @jax.jit
  def terms(params, batch, step=0, key=jax.random.PRNGKey(0)):  # noqa: B008
    slot = transform.init(key, average)
    return transform.judge(slot, params, batch, Context(jnp.int32(step), key, {}, frozen))

  return terms


def batch_of(b, t, seed=0):
  """Two documents a row, the second of which is cut; tokens of the tokenizer only, a ragged mask."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(3, V, (b, t + 1)).astype(np.int32)
  segments = 1 + (np.arange(t)[None] >= rng.integers(2, t, (b, 1))).astype(np.int32)
  mask = (rng.random((b, t)) < 0.8).astype(np.float32)
  mask[:, 0] = 1
  return {'inputs': tokens[:, :-1], 'targets': tokens[:, 1:], 'segments': segments, 'mask': mask}


def log_probabilities(model, params, batch, vocab=V):
  """float64 [B, T, V], all at once."""
  logits = np.asarray(model.head(params, model.hidden(params, batch))[..., :vocab], np.float64)
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def means(terms):
  return {name: evaluate.mean(term) for name, term in terms.items()}


def test_every_number_is_that_of_dense_numpy():
  """Two chunks of tokens, an ensemble of unequal shares, a padded vocabulary."""
  batch = batch_of(64, 40)
  log_q = log_probabilities(MODEL, STUDENT, batch)
  a, b = (np.exp(log_probabilities(TEACHER, params, batch)) for params in (A, B))
  p = 0.75 * a + 0.25 * b
  q, log_p, mask = np.exp(log_q), np.log(p), batch['mask'].astype(bool)
  found = means(judged('a', 40, co_teachers=('b',), shares=(3.0, 1.0), temperature=3.0)(STUDENT, batch))

  def mean(values):
    return values[mask].mean()

  right = p.argmax(-1) == batch['targets']
  bins = np.minimum((p.max(-1) * 15).astype(int), 14)
  gaps = [((right - p.max(-1)) * (bins == i))[mask].sum() for i in range(15)]
  expected = {
    'teacher_loss': mean(-np.take_along_axis(log_p, batch['targets'][..., None], -1)[..., 0]),
    'agreement': mean(p.argmax(-1) == q.argmax(-1)),
    'kl': mean((p * (log_p - log_q)).sum(-1)),
    'reverse_kl': mean((q * (log_q - log_p)).sum(-1)),
    'entropy': mean(-(q * log_q).sum(-1)),
    'teacher_entropy': mean(-(p * log_p).sum(-1)),
    'teacher_ece': np.abs(gaps).sum() / mask.sum(),
  }
  assert {name: found[name] for name in expected} == pytest.approx(expected, rel=2e-4)
  assert 0 < expected['agreement'] < 1
  assert set(found) == {*expected, 'rollout_kl'}


def test_a_student_that_is_its_teacher():
  found = means(judged('itself')(STUDENT, batch_of(16, 6)))
  assert found['agreement'] == 1
  assert found['entropy'] == found['teacher_entropy'] > 0.5
  for name in ('kl', 'reverse_kl', 'rollout_kl'):
    assert found[name] == pytest.approx(0, abs=1e-6)
  assert means(judged('a')(STUDENT, batch_of(16, 6)))['rollout_kl'] > 0.05


def test_the_rollouts_divergence_is_that_of_all_texts():
  """Of up to two tokens after one, with <eos> among them: the sums over all, each with its probability under q."""

  def by_hand(start):
    """The mean, the same if texts went on after <eos>, and the tokens that a rollout has in the mean."""
    texts = np.stack([np.full(V, start), np.arange(V), np.zeros(V)], axis=1).astype(np.int32)
    log_p, log_q = (
      log_probabilities(model, params, {'inputs': texts, 'segments': np.ones_like(texts)})
      for model, params in ((TEACHER, A), (MODEL, STUDENT))
    )
    nats = (np.exp(log_q) * (log_q - log_p)).sum(-1)  # [first token, position]
    first, goes_on = np.exp(log_q[0, 0]), np.arange(V) != EOS
    length = 1 + first[goes_on].sum()
    mean = (nats[0, 0] + (first * goes_on * nats[:, 1]).sum()) / length
    return mean, (nats[0, 0] + (first * nats[:, 1]).sum()) / 2, length

  # the token after which it matters most that a text ends
  start = max(range(3, V), key=lambda token: abs(by_hand(token)[0] - by_hand(token)[1]))
  expected, beyond_its_end, length = by_hand(start)
  prompt = np.full((64, 3), start, np.int32)
  batch = {'inputs': prompt, 'targets': prompt, 'segments': np.ones_like(prompt), 'mask': np.ones((64, 3), np.float32)}

  terms = judged('a', 3)
  keys = jax.random.split(jax.random.PRNGKey(1), 300)
  each = jax.lax.map(lambda key: terms(STUDENT, batch, 0, key)['rollout_kl'], keys)
  sums, counts = np.asarray(each.sum, np.float64), np.asarray(each.count, np.float64)
  error = (sums - expected * counts).std(ddof=1) / np.sqrt(len(keys)) / counts.mean()
  assert abs(sums.sum() / counts.sum() - expected) < 4 * error
  assert counts.mean() == pytest.approx(64 * length, rel=0.02)
  assert abs(beyond_its_end - expected) > 8 * error  # it would show


def test_only_the_first_batches_are_gone_on_from():
  terms, batch = judged('a'), batch_of(16, 6)
  counts = [float(terms(STUDENT, batch, step)['rollout_kl'].count) for step in range(6)]
  assert min(counts[:4]) > 0
  assert counts[4:] == [0, 0]
  assert float(judged('a')(STUDENT, batch_of(200, 6))['rollout_kl'].count) <= judges.SEQUENCES * 4


def test_rows_that_fill_a_batch_up_do_not_count():
  terms, batch = judged('a'), batch_of(16, 6)
  filled = {name: np.pad(x, ((0, 16), (0, 0))) for name, x in batch.items()}
  plain, more = means(terms(STUDENT, batch)), means(terms(STUDENT, filled))
  assert {**more, 'rollout_kl': 0} == pytest.approx({**plain, 'rollout_kl': 0}, rel=1e-5)
  empty = {name: np.zeros_like(x) for name, x in batch.items()}
  assert float(terms(STUDENT, empty)['rollout_kl'].count) == 0


def test_prompts_are_the_datas_own_or_the_beginning_of_one_document():
  resources = Resources(10, 20, V, MODEL, ARMS.__getitem__, Path(), EOS, 0)
  batch = batch_of(32, 20)
  batch['mask'][:8, :3] = 0  # the prompts of eight rows have four tokens
  batch['mask'][:8, 3] = 1
  batch['segments'][:8] = 1
  batch['mask'][8, :18] = 0  # and this one leaves no room
  rows = jax.tree.map(np.asarray, judges.written(MODEL, STUDENT, batch, jax.random.PRNGKey(0), resources))
  first = (batch['segments'] == 1).sum(1)
  others = np.arange(32) >= 9
  assert (rows.start[:8] == 4).all()
  assert rows.end[8] == rows.start[8] == 0
  assert (rows.start[others] == np.maximum(1, np.minimum(first - 1, 5))[others]).all()
  assert (rows.start[others] < first[others]).all()
  for tokens, start, end, of_data in zip(rows.tokens, rows.start, rows.end, batch['inputs'], strict=True):
    assert (tokens[:start] == of_data[:start]).all()
    assert tokens.max() < V
    assert not (tokens[start : end - 1] == EOS).any()  # it ends with the first one
    assert end - start <= 15
    assert end - start == 15 or end == 0 or tokens[end - 1] == EOS
  assert len({tuple(row) for row in rows.tokens}) > 20


def test_all_that_can_ask_a_teacher_are_judged_alike():
  batch = batch_of(16, 6)
  expected = means(judged('a')(STUDENT, batch))
  for spec in (
    Features('a', layers=('1:2',)),
    Relations('a', heads=2),
    Distill('a', signal='top_k', k=3),
    Distill('a', divergence='taid', weight=0.3),
  ):
    assert means(judged_by(spec)(STUDENT, batch)) == pytest.approx(expected, rel=1e-5)


def test_its_own_average_judges_a_student_that_teaches_itself():
  batch = batch_of(16, 6)
  same = means(judged_by(SelfDistill())(STUDENT, batch))
  assert same['agreement'] == 1
  assert same['kl'] == pytest.approx(0, abs=1e-6)
  behind = means(judged_by(SelfDistill(), average=SAME)(STUDENT, batch))
  assert behind['kl'] > 0.05
  log_p = log_probabilities(MODEL, SAME, batch)
  nats = -np.take_along_axis(log_p, batch['targets'][..., None], -1)[..., 0]
  assert behind['teacher_loss'] == pytest.approx((nats * batch['mask']).sum() / batch['mask'].sum(), rel=1e-5)
