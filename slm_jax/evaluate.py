"""Evaluation on held-out text: nats per token, bits per byte, perplexity, accuracy, calibration error, samples.

The reported loss is plain cross-entropy at temperature 1, whatever the training objective was.
"""

import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from slm_jax import losses, sharding
from slm_jax.data.tokenizer import Tokenizer
from slm_jax.experiment import Config
from slm_jax.losses import Term, Terms
from slm_jax.model.api import Batch, Model, Params
from slm_jax.model.decode import generate
from slm_jax.step import Context, Slot


def make_measure(
  model: Model, tokenizer: Tokenizer, chunk: int, completions: bool = False
) -> Callable[[Params, Batch], Terms]:
  """The pure function (params, batch) -> sums over the batch's tokens, whose bytes the tokenizer knows.

  completions: a row is one document with a prompt; count those whose greedy completion is the document's. It is, up to
  its end, exactly if each token is the most likely one after the document's own tokens before it: no need to decode.
  """
  cross_entropy = losses.cross_entropy()

  def token_loss(logits, tokens, context) -> Terms:
    mask, first = tokens['mask'], (tokens['inputs'] == tokenizer.bos).astype(jnp.int32)
    n_bytes = jnp.asarray(tokenizer.text_bytes)[first, tokens['targets']]
    hits = (jnp.argmax(logits, axis=-1) == tokens['targets']).astype(jnp.float32)
    return {
      **cross_entropy(logits, tokens, context),
      'bytes': Term((n_bytes * mask).sum(), mask.sum(), 0.0),
      'ece': losses.calibration(logits, tokens['targets'], mask),
      **({'misses': Term(((1 - hits) * mask).sum(1), mask.sum(1), 0.0)} if completions else {}),
    }

  def measure(params, batch):
    terms = losses.over_chunks(token_loss, model.head, params, model.hidden(params, batch), batch, None, chunk)
    if completions:
      misses = terms.pop('misses')  # [B]
      rows = misses.count > 0
      terms['exact_match'] = Term(((misses.sum == 0) & rows).sum(dtype=jnp.float32), rows.sum(dtype=jnp.float32), 0.0)
    return terms

  return measure


def evaluate(
  measure: Callable[[Params, Batch], Terms], params: Params, batches: Iterable[Batch], poll: Callable[[], None]
) -> dict[str, float]:
  """Means over all tokens of all batches; `poll` is called between batches (and may raise)."""
  return means(totals(measure, params, batches, poll))


def totals(
  measure: Callable[[Params, Batch], Terms], params: Params, batches: Iterable[Batch], poll: Callable[[], None]
) -> Terms:
  """Sums over all batches, in float64."""
  total: Terms | None = None
  for batch in batches:
    poll()
    terms = host_float64(measure(params, batch))
    total = terms if total is None else losses.add(total, terms)
  assert total is not None, 'the valid split holds at least one batch'
  return total


def host_float64(terms: Terms) -> Terms:
  """For sums over millions of tokens: in float32 they would lose their last digits."""
  return jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get(terms))


def means(total: Terms) -> dict[str, float]:
  """What is reported of the sums of a whole evaluation.

  loss: nats per token. bits_per_byte: total nats / ln 2 / total bytes. ece: expected calibration error of the most
  likely token, 15 equal bins of confidence: sum_b n_b/N |accuracy_b - confidence_b| (Guo et al., arXiv 1706.04599).
  exact_match: share of completions that are right as a whole, where they were counted.
  """
  nats, count = float(total['loss'].sum), float(total['loss'].count)
  n_bytes = float(total['bytes'].sum)
  loss = nats / max(count, 1)
  exact = {k: mean(v) for k, v in total.items() if k == 'exact_match'}
  return {
    'loss': loss,
    **exact,
    'bits_per_byte': nats / math.log(2) / n_bytes if n_bytes else float('nan'),
    'perplexity': math.exp(min(loss, 700)),
    'accuracy': mean(total['accuracy']),
    'ece': mean(total['ece']),
    'tokens_evaluated': count,
  }


def mean(term: Term) -> float:
  """sum / count; of a term in bins, the mean over all that was counted of its bin's distance from 0."""
  total, count = np.asarray(term.sum), np.asarray(term.count)
  return float((np.abs(total) if total.ndim else total).sum() / max(count.sum(), 1))


def judged(
  judge: Callable[[dict[str, Slot], Params, Batch, Context], Terms],
  slots: dict[str, Slot],
  params: Params,
  batches: Iterable[Batch],
  context: Context,
) -> dict[str, float]:
  """Means of what the transforms measure a finished model by; `context.step` counts the batches. {} if nothing."""
  total: Terms = {}
  for i, batch in enumerate(batches):
    terms = host_float64(judge(slots, params, batch, context._replace(step=jnp.int32(i))))
    if not terms:
      break
    total = losses.add(total, terms) if total else terms
  return {name: mean(term) for name, term in total.items()}


def samples(config: Config, params: Params, tokenizer: Tokenizer) -> list[dict[str, str]]:
  """`[{'prompt', 'text'}]`: what the model writes after `eval.prompt`, up to its end-of-document token."""
  prompt = [tokenizer.bos, *tokenizer.encode(config.eval.prompt)]
  new = min(config.eval.sample_tokens, config.model.max_len - len(prompt))
  if config.eval.samples == 0 or new <= 0:
    return []
  write = jax.jit(generate, static_argnums=0, static_argnames=('max_new', 'eos', 'pad'))
  tokens = write(
    config.model,
    params,
    jnp.tile(jnp.asarray(prompt, jnp.int32), (config.eval.samples, 1)),
    jnp.full(config.eval.samples, len(prompt), jnp.int32),
    jax.random.PRNGKey(config.seed),
    max_new=new,
    temperature=jnp.float32(config.eval.temperature),
    eos=tokenizer.eos,
    pad=tokenizer.eos,
  )
  rows = [[int(t) for t in row if t != tokenizer.eos and t < tokenizer.vocab_size] for row in sharding.to_host(tokens)]
  return [{'prompt': config.eval.prompt, 'text': tokenizer.decode(row)} for row in rows]
