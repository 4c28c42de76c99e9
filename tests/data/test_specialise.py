"""A specialised vocabulary loses no text, can make each of its pieces, and takes a model's embeddings along."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import SentencePieceTrainer

from slm_jax import metrics, train
from slm_jax.checkpoint import load_model
from slm_jax.config import ConfigError, override
from slm_jax.data import specialise, stories, tokenizer
from slm_jax.data.specialise import specialised, within
from slm_jax.model import decoder
from slm_jax.preempt import EXIT_DONE, EXIT_FAILED
from slm_jax.prune.choose import of_tokens
from slm_jax.sharding import make_mesh

TEXTS = [text for text, _ in stories.documents(200, 'specialise')]
LARGE = tokenizer.train([*TEXTS, 'Übergrößenträger, naïve façade; 12345 -> {"a": [1, 2]}\n' * 40], 600)
DOMAIN = [' '.join(word for word in text.split() if word[0] in 'abcdefgTL') for text in TEXTS[:40]]
SMALL = specialised(LARGE, DOMAIN, 380)


@given(text=st.text() | st.sampled_from(TEXTS))
def test_no_text_is_lost(text):
  assert SMALL.decode(SMALL.encode(text)) == text


@pytest.mark.parametrize('size', [262, 300, 380, 600])
def test_every_piece_can_be_made_and_the_count_is_exact(size):
  small = specialised(LARGE, DOMAIN, size)
  assert small.vocab_size == size
  pieces = [i for i in range(size) if small.spelling[i] and not small.pieces.is_byte(i)]
  assert all(small.encode(small.spelling[i].decode()) == [i] for i in pieces)
  assert [small.spelling[i] for i in within(small, small, 'x')] == list(small.spelling)


def test_the_domain_keeps_its_tokens_where_other_texts_lose_theirs():
  def rate(of, texts):
    return sum(len(of.encode(text)) for text in texts)

  assert rate(SMALL, DOMAIN) < 1.1 * rate(LARGE, DOMAIN)
  other = specialised(LARGE, ['Übergrößenträger, naïve façade; 12345 -> {"a": [1, 2]}\n'], 380)
  assert rate(SMALL, DOMAIN) < rate(other, DOMAIN)
  assert rate(SMALL, TEXTS[100:]) > rate(LARGE, TEXTS[100:])


def test_all_of_it_is_itself():
  same = specialised(LARGE, DOMAIN, 600)
  LARGE.check_same(same, 'x', TEXTS)


def test_ids_go_by_spelling():
  kept = within(SMALL, LARGE, 'arm x')
  assert [LARGE.spelling[i] for i in kept] == list(SMALL.spelling)
  assert kept[[SMALL.pad, SMALL.bos, SMALL.eos]].tolist() == [LARGE.pad, LARGE.bos, LARGE.eos]
  assert (np.diff(kept) > 0).all()
  assert within(tokenizer.Bytes(), LARGE, 'arm x').tolist() == list(range(259))
  with pytest.raises(ConfigError, match='arm x: its tokenizer .* lacks 220 tokens of data.tokenizer, such as'):
    within(LARGE, SMALL, 'arm x')


def test_special_tokens_of_its_own_are_found_by_their_names():
  model = io.BytesIO()
  settings = {**tokenizer.SETTINGS, 'control_symbols': ['<mask>', '<sep>'], 'minloglevel': 2}
  SentencePieceTrainer.train(sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=400, **settings)
  large = tokenizer.SentencePiece(model.getvalue())
  small = specialised(large, DOMAIN, 330)
  names = [
    [of.pieces.id_to_piece(i) for i in ids] for of, ids in ((small, range(330)), (large, within(small, large, 'x')))
  ]
  assert names[0] == names[1]
  assert {'<unk>', '<mask>', '<sep>'} < set(names[0])


def test_a_model_of_fewer_tokens_says_the_same_of_them():
  config = override(tiny.config(), {'model.vocab_size': 608, 'model.tied': False}).model
  params = decoder.build(config).init(jax.random.PRNGKey(0))
  kept = within(SMALL, LARGE, 'x')
  small, its = of_tokens(config, params, kept, 384)
  assert small.vocab_size == 384
  tokens = jnp.asarray([SMALL.encode(DOMAIN[0])[:20]])
  whole = decoder.Decoder(config).apply({'params': params}, jnp.asarray(kept)[tokens])
  part = decoder.Decoder(small).apply({'params': its}, tokens)
  np.testing.assert_allclose(part[..., :380], whole[..., kept], atol=1e-6)
  with pytest.raises(ConfigError, match='model.vocab_size=379: allowed: 380..608'):
    of_tokens(config, params, kept, 379)


def test_an_arm_starts_from_one_with_a_larger_vocabulary(tmp_path):
  files = {name: tmp_path / f'{name}.model' for name in ('large', 'small')}
  for name, tokens in (('large', LARGE), ('small', SMALL)):
    files[name].write_bytes(tokens.serialize())
  of = {'transforms': (), 'eval.samples': 0, 'data.tokenizer': 'sentencepiece', 'data.seq_len': 48}
  parent = override(
    tiny.config(12), {**of, 'data.tokenizer_file': str(files['large']), 'model.vocab_size': 608, 'name': 'parent'}
  )
  child = override(
    tiny.config(1), {**of, 'data.tokenizer_file': str(files['small']), 'model.vocab_size': 384, 'name': 'child'}
  )
  assert train.run(parent, tmp_path, 'parent') == EXIT_DONE
  started = override(child, {'init.arm': 'parent', 'model.d_ff': 24, 'init.by': 'activations', 'init.sequences': 8})
  assert train.run(started, tmp_path, 'child') == EXIT_DONE
  assert train.run(child, tmp_path, 'fresh') == EXIT_DONE

  def first(arm):
    return next(metrics.read(tmp_path / 'arms' / arm / 'metrics.jsonl'))['loss']

  assert first('child') < first('fresh') - 0.3
  config, _, _ = load_model(tmp_path / 'arms' / 'child' / 'model', make_mesh(1, 1, 1, jax.devices()[:1]))
  assert (config.vocab_size, config.d_ff) == (384, 24)
  back = override(parent, {'init.arm': 'child', 'model.d_ff': 24})
  assert train.run(back, tmp_path, 'back') == EXIT_FAILED
  assert 'lacks 220 tokens' in (tmp_path / 'arms' / 'back' / 'run.json').read_text()


# ------------------------------------------------------------------------------------------------------ command line


def run(tmp_path, *words):
  return specialise.main([f'--out={tmp_path / "out.model"}', *words])


def test_the_command_writes_a_file_that_loads(tmp_path, capsys):
  (tmp_path / 'large.model').write_bytes(LARGE.serialize())
  (tmp_path / 'domain.txt').write_text('\n'.join(DOMAIN))
  words = [f'--tokenizer={tmp_path / "large.model"}', f'--text={tmp_path / "domain.txt"}']
  assert run(tmp_path, *words, '--vocab_size=380') == 0
  assert capsys.readouterr().out.startswith('380 of 600 tokens; bytes a token on these texts: ')
  assert tokenizer.load(tmp_path / 'out.model').vocab_size == 380
  assert run(tmp_path / 'new' / 'folder', *words, '--vocab_size=380') == 0
  assert tokenizer.load(tmp_path / 'new' / 'folder' / 'out.model').vocab_size == 380


@pytest.mark.parametrize(
  'words,message',
  [
    (['--vocab_size=200'], 'vocab_size=200: allowed: 260 (bytes and special tokens) .. 600'),
    (['--vocab_size=700'], 'vocab_size=700: allowed'),
    (['--vocab_size=300', '--text=/nowhere.txt'], '--text=/nowhere.txt: '),
    (['--vocab_size=300', '--tokenizer=/nowhere.model'], '/nowhere.model'),
    (['--vocab_size=300', 'what'], 'unexpected: what'),
    ([], '--vocab_size: must be given'),
    (['--vocab_size=many'], 'vocab_size'),
    (['--vocab_size=300', '--out=/proc/nowhere/out.model'], '--out=/proc/nowhere/out.model: '),
  ],
)
def test_wrong_arguments_are_one_line(tmp_path, capsys, words, message):
  (tmp_path / 'large.model').write_bytes(LARGE.serialize())
  (tmp_path / 'domain.txt').write_text('\n'.join(DOMAIN))
  given = [f'--tokenizer={tmp_path / "large.model"}', f'--text={tmp_path / "domain.txt"}']
  assert run(tmp_path, *given, *words) == 1
  error = capsys.readouterr().err
  assert error.startswith('error: ')
  assert message in error
  assert error.count('\n') == 1
