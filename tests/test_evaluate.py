"""Evaluation against models whose numbers are known."""

import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import toy_batch, toy_model

from slm_jax.evaluate import evaluate, make_measure
from slm_jax.model.config import ModelConfig
from slm_jax.model.decode import generate
from slm_jax.model.decoder import build

VOCAB = 11
LENGTHS = np.array([0, 1, 2, 3, 1, 1, 1, 4, 1, 1, 1], np.int32)
BOS = 1
# Right after <bos> token 3 stands for a byte less.
TOKENIZER = types.SimpleNamespace(bos=BOS, text_bytes=np.stack([LENGTHS, LENGTHS - (np.arange(VOCAB) == 3)]))


def measure(params, batches, chunk=10_000, model=None):
  step = make_measure(model or toy_model(vocab=VOCAB), TOKENIZER, chunk)
  return evaluate(step, params, batches, lambda: None)


def params():
  return toy_model(vocab=VOCAB).init(jax.random.PRNGKey(0))


def test_a_model_that_knows_nothing_has_the_loss_of_a_uniform_guess():
  uniform = {**params(), 'head': jnp.zeros((8, VOCAB))}
  batch = {name: np.array(values) for name, values in toy_batch(0).items()}
  batch['inputs'][0, 0], batch['targets'][0, 0], batch['mask'][0, 0] = BOS, 3, 1  # the first piece of a document
  result = measure(uniform, [batch])
  mask = np.asarray(batch['mask'])
  inputs, targets = np.asarray(batch['inputs']), np.asarray(batch['targets'])
  first = (inputs == BOS) & (targets == 3) & (mask > 0)
  count, n_bytes = mask.sum(), (LENGTHS[targets] * mask).sum() - first.sum()
  assert first.any()
  assert result['loss'] == pytest.approx(math.log(VOCAB), rel=1e-6)
  assert result['perplexity'] == pytest.approx(VOCAB, rel=1e-5)
  assert result['bits_per_byte'] == pytest.approx(math.log2(VOCAB) * count / n_bytes, rel=1e-5)
  assert result['tokens_evaluated'] == count
  # argmax of equal logits is token 0: right as often as that is the target, confident by 1/V
  hits = ((np.asarray(batch['targets']) == 0) * mask).sum() / count
  assert result['accuracy'] == pytest.approx(hits)
  assert result['ece'] == pytest.approx(abs(hits - 1 / VOCAB), abs=1e-6)


def test_calibration_error_is_the_definition():
  batch = toy_batch(1, b=16, t=20)
  model, p = toy_model(vocab=VOCAB), params()
  p['head'] = 4 * p['head']
  probability = jax.nn.softmax(model.head(p, model.hidden(p, batch)))
  confidence, guess = np.asarray(probability.max(-1)), np.asarray(probability.argmax(-1))
  mask = np.asarray(batch['mask']) > 0
  confidence, right = confidence[mask], (guess == np.asarray(batch['targets']))[mask]
  expected = 0.0
  for low in np.arange(15) / 15:
    inside = (confidence >= low) & (confidence < low + 1 / 15)
    if inside.any():
      expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
  assert measure(p, [batch])['ece'] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize('chunk', [1, 13, 40])
def test_chunks_and_batches_do_not_matter(chunk):
  whole = toy_batch(0, b=8)
  halves = [{k: v[i : i + 4] for k, v in whole.items()} for i in (0, 4)]
  expected = measure(params(), [whole])
  assert measure(params(), [whole], chunk) == pytest.approx(expected, rel=1e-5)
  assert measure(params(), halves) == pytest.approx(expected, rel=1e-5)


def test_padding_rows_do_not_count():
  batch = toy_batch(0)
  padded = {k: jnp.pad(v, ((0, 5), (0, 0))) for k, v in batch.items()}
  assert measure(params(), [padded]) == pytest.approx(measure(params(), [batch]), rel=1e-5)


def test_poll_is_asked_before_every_batch_and_may_stop():
  class Stop(Exception):
    pass

  calls = []

  def poll():
    calls.append(1)
    if len(calls) == 2:
      raise Stop

  step = make_measure(toy_model(vocab=VOCAB), TOKENIZER, 1000)
  with pytest.raises(Stop):
    evaluate(step, params(), [toy_batch(0), toy_batch(1)], poll)


def test_exact_match_is_that_of_greedy_decoding():
  config = ModelConfig(vocab_size=5, d_model=8, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=4, d_ff=8, init_std=0.5)
  model, eos, t = build(config), 2, 4
  weights = model.init(jax.random.PRNGKey(0))
  prompts = jax.random.randint(jax.random.PRNGKey(1), (40, 2), 3, 5)
  new = generate(config, weights, prompts, jnp.full(40, 2), jax.random.PRNGKey(2), max_new=3, temperature=0.0, eos=eos)
  tokens = np.concatenate([prompts, new], axis=1)
  first_spoilt, spoilt = (np.arange(40) % 4 == i for i in (1, 0))
  for rows, at in ((first_spoilt, 2), (spoilt, 4)):  # the last token counts where no <eos> is before it
    tokens[rows, at] = (tokens[rows, at] + 1) % 5
  tokens = jnp.asarray(tokens)
  batch = {'inputs': tokens[:, :-1], 'targets': tokens[:, 1:], 'segments': jnp.ones((40, t), jnp.int32)}
  done = jnp.cumsum(batch['inputs'][:, 1:] == eos, axis=1) > 0
  mask = jnp.concatenate([jnp.zeros((40, 1)), 1.0 - done], axis=1)
  right = (~first_spoilt & (~spoilt | (np.asarray(mask)[:, -1] == 0))).mean()
  for chunk in (40, 1000):
    step = make_measure(model, TOKENIZER, chunk, completions=True)
    padded = {k: jnp.pad(v, ((0, 5), (0, 0))) for k, v in (batch | {'mask': mask}).items()}
    assert evaluate(step, weights, [padded], lambda: None)['exact_match'] == pytest.approx(right)
  assert 0 < right < 1
