"""Learning from what a teacher wrote: that it is the teacher's text, in the share that was asked for, written once."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from fakes import arms_of, experiment

from slm_jax import train
from slm_jax.ablate import measure, population
from slm_jax.config import ConfigError, check, override
from slm_jax.data import packing
from slm_jax.data.dataset import open_data
from slm_jax.data.tokenizer import Bytes
from slm_jax.distill import sequence
from slm_jax.distill.cached import CachedDistill
from slm_jax.distill.sequence import SequenceDistill
from slm_jax.model import decoder
from slm_jax.model.flops import flops_per_token
from slm_jax.step import Resources

CONFIG = override(tiny.config(6), {'transforms': (), 'data.seq_len': 32, 'eval.bytes': 300, 'eval.samples': 0})
MODEL = decoder.build(CONFIG.model)
PARAMS = jax.tree.map(lambda x: x * 8, MODEL.init(jax.random.PRNGKey(0)))  # so that it is far from uniform


pytestmark = pytest.mark.usefixtures('one_fake_device')  # a population does not span devices


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp('data')


def opened(folder, data=(), params=PARAMS, **settings):
  """(the data as they are, with the teacher's texts among them)"""
  plain = open_data(override(CONFIG, dict(data)).data, folder, print)
  tokens = plain.tokenizer
  resources = Resources(
    6, 32, tokens.vocab_size, MODEL, lambda arm: (MODEL, params), folder, eos=tokens.eos, pad=tokens.pad
  )
  return plain, SequenceDistill('teacher', **{'documents': 96, **settings}).open(plain, resources)


def texts(dataset):
  """(prompt's length, tokens) of every written text; with packing=whole."""
  records, found = dataset.stores[-1].train(), []
  for i in range(len(records)):
    tokens, segments = records[i]
    ids = packing.documents(segments)
    for document in range(1, ids.max() + 1):
      own = ids == document
      found.append((int((segments[own] >= packing.PROMPT).sum()), tokens[own]))
  return found


def logits_of(tokens, vocab):
  batch = {'inputs': jnp.asarray(tokens[None, :-1], jnp.int32)}
  return np.asarray(MODEL.head(PARAMS, MODEL.hidden(PARAMS, batch)))[0, :, :vocab]


WHOLE = {'data.packing': 'whole'}
PROMPTS = {'data.sources': ('addition',), 'data.packing': 'single', 'data.prompt_end': '=', 'data.seq_len': 64}


def test_a_greedy_text_is_the_teachers_most_likely_one_after_a_documents_prompt(folder):
  plain, dataset = opened(folder, {**PROMPTS, 'data.documents': 60}, temperature=0.0, documents=40)
  written, vocab = texts(dataset), plain.tokenizer.vocab_size
  assert len(written) == 40
  of_data = [plain.tokenizer.decode(texts(plain)[i][1]).split('=')[0] for i in range(40)]
  for (prompt, tokens), problem in zip(written, of_data, strict=True):
    assert plain.tokenizer.decode(tokens[1 : prompt - 1]) == problem
    guesses = logits_of(tokens, vocab)
    best = guesses[np.arange(len(tokens) - 1), tokens[1:]]
    assert (best >= guesses.max(-1) - 1e-4)[prompt - 1 :].all()
    assert tokens[-1] == plain.tokenizer.eos or len(tokens) == 65
  mask = dataset.batch(0)['mask']
  assert (mask[:, :7] == 0).all()  # a prompt is not predicted, here either: <bos>, seven characters
  assert mask.any()


def test_texts_are_drawn_from_the_teacher_and_end_where_it_ends_them(folder):
  plain, dataset = opened(folder, WHOLE, documents=960)
  eos, vocab = plain.tokenizer.eos, plain.tokenizer.vocab_size
  written = [tokens for _, tokens in texts(dataset)]
  assert len(written) == 960
  p = np.asarray(jax.nn.softmax(logits_of(np.array([plain.tokenizer.bos] * 2), vocab)[0]), np.float64)
  likely = p > 0.01
  counts = np.bincount([tokens[1] for tokens in written], minlength=vocab)
  assert likely.sum() > 3
  assert (np.abs(counts / 960 - p) < 5 * np.sqrt(p * (1 - p) / 960))[likely].all()
  unfinished = sum(tokens[-1] != eos for tokens in written)
  assert dataset.stores[-1].manifest['unfinished'] == unfinished
  notice = f'sequence_distill: {unfinished} of 960 texts of teacher reached 33 tokens without an end'
  assert dataset.notices == (notice,)
  for tokens in written:
    assert tokens[0] == plain.tokenizer.bos
    assert tokens.max() < vocab
    assert not (tokens[1:-1] == eos).any()
    assert len(tokens) == 33 or tokens[-1] == eos
  facts = dataset.stores[-1].manifest
  assert facts['splits']['train']['tokens'] == sum(map(len, written))
  flops = flops_per_token(MODEL.config, 33, backward=False) * sum(map(len, written))
  assert dataset.made == {dataset.stores[-1].path.name: flops}


def test_texts_of_another_format_of_stores_are_written_anew(folder, monkeypatch):
  _, dataset = opened(folder, documents=8)
  monkeypatch.setattr('slm_jax.data.store.FORMAT', 0)
  _, other = opened(folder, documents=8)
  assert other.stores[-1].path != dataset.stores[-1].path


def rows(dataset, steps):
  return [row.tobytes() for step in range(steps) for row in dataset.batch(step)['inputs']]


@pytest.mark.parametrize('share', [0.25, 1.0])
def test_the_share_of_sequences_and_the_order_of_both(folder, share):
  """The arm's own come in their own order; another order of the data has the same texts in another one."""
  plain, dataset = opened(folder, share=share)
  records = dataset.stores[-1].train()
  its = {np.ascontiguousarray(records[i][0, :-1].astype(np.int32)).tobytes() for i in range(len(records))}
  mixed = rows(dataset, 25)
  assert np.mean([row in its for row in mixed]) == pytest.approx(share, abs=0.01)
  own = [row for row in mixed if row not in its]
  assert own == rows(plain, 25)[: len(own)]
  assert rows(opened(folder, share=share)[1], 25) == mixed
  other = rows(opened(folder, {'data.seed': 1}, share=share)[1], 25)
  assert other != mixed
  assert {row for row in mixed if row in its} & set(other)
  held_out = [[b['inputs'].tobytes() for b in d.valid_batches(8)] for d in (plain, dataset)]
  assert held_out[0] == held_out[1]
  assert plain.valid.packed().digest == dataset.valid.packed().digest


def test_they_are_written_once_and_again_if_anything_differs(folder, monkeypatch):
  opened(folder)
  written = []
  plain_texts = SequenceDistill.texts
  monkeypatch.setattr(SequenceDistill, 'texts', lambda *args: written.append(1) or plain_texts(*args))
  opened(folder, share=0.9)
  opened(folder, {'data.seed': 7})
  assert written == []
  before = {path.name for path in folder.glob('written-*')}
  other = MODEL.init(jax.random.PRNGKey(1))
  for settings in ({'seed': 1}, {'temperature': 0.7}, {'top_p': 0.9}, {'documents': 95}, {'params': other}):
    opened(folder, **settings)
  assert len(written) == 5
  assert len({path.name for path in folder.glob('written-*')} - before) == 5


def test_the_draws_are_those_that_were_asked_for(folder):
  def told(**settings):
    return [tokens.tolist() for _, tokens in texts(opened(folder, WHOLE, documents=24, **settings)[1])]

  base = told()
  for settings in ({'seed': 1}, {'temperature': 0.7}, {'top_p': 0.9}):
    assert told(**settings) != base, settings
  greedy = told(temperature=1e-4)
  assert told(top_p=1e-6) == greedy
  assert len({tuple(tokens) for tokens in greedy}) == 1
  assert len({tuple(tokens) for tokens in base}) > 12


def test_a_build_that_fails_leaves_nothing(tmp_path, monkeypatch):
  def fails(*args, **kwargs):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(sequence, 'generate', fails)
    with pytest.raises(KeyboardInterrupt):
      opened(tmp_path)
  assert list(tmp_path.glob('*written-*/*')) == []
  assert len(rows(opened(tmp_path)[1], 1)) == 8


def test_alone_in_a_population_and_measured(tmp_path, monkeypatch):
  """Both ways the same numbers; what was written is in the books; a measurement writes nothing."""
  config = override(CONFIG, {'model.vocab_size': Bytes.vocab_size})  # without padding, a teacher's loss is its own
  assert train.run(override(config, {'name': 'teacher'}), tmp_path, 'teacher') == 0
  transform = SequenceDistill('teacher', documents=64, share=0.5)
  arms = {
    f'{rate}-{seed}': override(
      config, {'transforms': (transform,), 'optim.learning_rate': rate, 'data.seed': seed, 'seed': 3}
    )
    for rate in (1e-2, 1e-3)
    for seed in (0, 1)
  }
  judged = []
  as_it_is = sequence.asked_at_the_end

  def counted(*args):
    made = as_it_is(*args)
    return made._replace(judge=lambda *given: judged.append(1) or made.judge(*given))

  monkeypatch.setattr(sequence, 'asked_at_the_end', counted)
  assert population.run(arms, tmp_path) == dict.fromkeys(arms, 0)
  assert len(judged) == 1  # compiled once for all four
  assert train.run(arms['0.01-1'], tmp_path, 'alone') == 0
  summaries = {
    arm: json.loads((tmp_path / 'arms' / arm / 'run.json').read_text())['summary']
    for arm in (*arms, 'alone', 'teacher')
  }
  alone, teacher = summaries['alone'], summaries['teacher']
  for name in ('loss', 'kl', 'agreement', 'entropy', 'teacher_loss', 'rollout_kl'):
    assert summaries['0.01-1'][name] == pytest.approx(alone[name], rel=2e-4)
  assert len({summary['loss'] for arm, summary in summaries.items() if arm in arms}) == 4
  (path,) = tmp_path.glob('data/written-*')
  facts = json.loads((path / 'manifest.json').read_text())
  assert alone['parent_flops'] == teacher['flops'] + facts['flops']
  assert alone['flops'] == pytest.approx(alone['steps'] * teacher['flops'] / teacher['steps'])
  assert alone['teacher_loss'] == pytest.approx(teacher['loss'], rel=1e-5)
  assert alone['teacher_ece'] == pytest.approx(teacher['ece'], rel=1e-3)
  assert 'kl' not in teacher

  sweep = [{'name': 'teacher'}, {'name': 'student', 'transforms': (transform,)}]
  resolved = {arm.arm_id: arm for arm in arms_of(experiment(base=config, sweep=sweep))}
  student = next(arm for arm in resolved.values() if arm.name == 'student')
  measure.stand_in(student.config, resolved, tmp_path / 'measured')
  assert not list((tmp_path / 'measured').rglob('written-*'))


@pytest.mark.parametrize(
  'settings, message',
  [
    ({'teacher': ''}, 'name the arm that writes'),
    ({'documents': 0}, 'must be positive'),
    ({'share': 0.0}, r'must lie in \(0, 1\]'),
    ({'temperature': 0.0}, 'all 10000 texts would be the same'),
  ],
)
def test_what_cannot_be_meant(settings, message):
  with pytest.raises(ConfigError, match=message):
    check(override(CONFIG, {'transforms': (SequenceDistill(**{'teacher': 'teacher', **settings}),)}))


def test_what_is_written_comes_before_what_is_written_down_of_it():
  transforms = CachedDistill('teacher'), SequenceDistill('teacher')
  check(override(CONFIG, {'transforms': transforms[::-1]}))
  with pytest.raises(ConfigError, match='sequence_distill must stand before cached_distill'):
    check(override(CONFIG, {'transforms': transforms}))
