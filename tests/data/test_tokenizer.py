"""Laws of tokenizers: nothing is lost, text is only text, the same text gives the same vocabulary."""

import io

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as model_pb2

from slm_jax.config import ConfigError
from slm_jax.data import stories, tokenizer

TEXTS = [text for text, _ in stories.documents(300, 'tokenizer')] + ['def f(x):\n\n    return <s> 123 + é😀']
PIECES = tokenizer.train(TEXTS, 512)
BYTES = tokenizer.Bytes()


def foreign(**options) -> bytes:
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=400, minloglevel=2, **options
  )
  return model.getvalue()


SPACED = tokenizer.SentencePiece(foreign(**{**tokenizer.SETTINGS, 'add_dummy_prefix': True}))  # as Llama 2's

both = pytest.mark.parametrize('tok', [BYTES, PIECES, SPACED], ids=['bytes', 'sentencepiece', 'spaced'])
awkward = st.text() | st.lists(
  st.sampled_from(
    ['<s>', '</s>', '<unk>', '<0x41>', '▁', ' ', '  ', '\t', '\n', '\r\n', '\0', 'é', '😀', '▅', 'the', '12']
  )
).map(''.join)


@both
@given(text=awkward)
def test_decode_inverts_encode(tok, text):
  ids = tok.encode(text)
  assert tok.decode(ids) == text
  assert all(type(i) is int and 0 <= i < tok.vocab_size for i in ids)
  # The special ids never occur in text, whatever the text says; and lengths in bytes add up.
  assert not {tok.pad, tok.bos, tok.eos} & set(ids)
  first = np.arange(len(ids)) == 0
  assert tok.text_bytes[first.astype(int), ids].sum() == len(text.encode())


@both
def test_special_and_unknown_ids_say_nothing(tok):
  ids = tok.encode('cat é')
  assert tok.decode([tok.bos, *ids[:2], tok.pad, *ids[2:], tok.eos, tok.vocab_size, 10**6, -1]) == 'cat é'
  assert tok.decode(tok.encode('ü')[:-1]) == '\ufffd'
  assert [tok.byte_lengths[i] for i in (tok.pad, tok.bos, tok.eos)] == [0, 0, 0]
  assert len(tok.byte_lengths) == tok.vocab_size


def test_bytes_are_a_sentencepiece_without_pieces():
  assert [PIECES.pieces.id_to_piece(i) for i in BYTES.encode('a\n')] == ['<0x61>', '<0x0A>']
  assert (BYTES.pad, BYTES.bos, BYTES.eos) == (PIECES.pad, PIECES.bos, PIECES.eos) == (0, 1, 2)


def test_training_is_deterministic():
  assert tokenizer.train(iter(TEXTS), 512).serialize() == PIECES.serialize()
  other = tokenizer.train(TEXTS[:200], 512)
  assert other.serialize() != PIECES.serialize()
  assert len({other.fingerprint, PIECES.fingerprint, BYTES.fingerprint}) == 3


def test_a_trained_vocabulary_compresses_and_has_the_size_asked_for():
  assert PIECES.vocab_size == 512
  assert len(PIECES.encode(TEXTS[0])) < 0.6 * len(BYTES.encode(TEXTS[0]))
  assert PIECES.encode('1234') == [i for digit in '1234' for i in PIECES.encode(digit)]  # digits stand alone


@both
def test_load_reads_what_serialize_wrote(tok, tmp_path):
  path = tmp_path / 'tokenizer.model'
  path.write_bytes(tok.serialize())
  again = tokenizer.load(path)
  assert type(again) is type(tok)
  assert again.fingerprint == tok.fingerprint
  assert again.encode(TEXTS[-1]) == tok.encode(TEXTS[-1])


@pytest.mark.parametrize(
  'data, message',
  [
    (lambda: b'', 'not a SentencePiece model'),
    (lambda: PIECES.serialize()[:1000], 'not a SentencePiece model'),
    (lambda: b'\x00\xff' * 50, 'not a SentencePiece model'),
    (lambda: foreign(model_type='bpe'), 'loses text'),  # normalises, and has no bytes to fall back to
    (lambda: foreign(**{**tokenizer.SETTINGS, 'remove_extra_whitespaces': True}), "loses text; '  two  spaces '"),
    (lambda: foreign(**tokenizer.SETTINGS, bos_id=-1), 'no ids for the begin'),
  ],
)
def test_a_file_that_is_no_fit_tokenizer_is_refused(tmp_path, data, message):
  path = tmp_path / 'x.model'
  path.write_bytes(data())
  with pytest.raises(ConfigError, match=message) as caught:
    tokenizer.load(path)
  assert str(path) in str(caught.value)
  assert '\n' not in str(caught.value)


def test_a_missing_file_and_an_impossible_vocabulary(tmp_path):
  with pytest.raises(ConfigError, match='nothing.model.*No such file'):
    tokenizer.load(tmp_path / 'nothing.model')
  with pytest.raises(ConfigError, match='data.vocab_size=400: Vocabulary size too high'):
    tokenizer.train(['a b c'], 400)
  with pytest.raises(ConfigError, match='data.vocab_size=100: Vocabulary size is smaller than required'):
    tokenizer.train(['a b c'], 100)


def test_a_tokenizer_must_fit_the_model():
  PIECES.check_vocabulary(512)
  BYTES.check_vocabulary(512)
  with pytest.raises(ConfigError, match=r'model.vocab_size=511: too small for the tokenizer, which has 512 tokens'):
    PIECES.check_vocabulary(511)


def changed(change):
  """PIECES, with a change to its model's file."""
  model = model_pb2.ModelProto.FromString(PIECES.serialize())
  change(model)
  return tokenizer.SentencePiece(model.SerializeToString())


def swapped(a, b):
  def change(model):
    model.pieces[a].piece, model.pieces[b].piece = model.pieces[b].piece, model.pieces[a].piece

  return changed(change)


def test_two_files_of_one_vocabulary_are_the_same_tokens():
  other = changed(lambda model: setattr(model.trainer_spec, 'input_sentence_size', 7))
  assert other.fingerprint != PIECES.fingerprint
  PIECES.check_same(PIECES, 'arm x', TEXTS)
  PIECES.check_same(other, 'arm x', TEXTS)


def test_another_vocabulary_of_the_same_size_is_told_by_a_text():
  the = PIECES.encode('The')[0]
  rare = PIECES.pieces.piece_to_id('f')  # a letter that is in none of the probes
  for other, texts, said in (
    (BYTES, [], "'The cat.'"),
    (swapped(the, the + 1), [], "'The cat.'"),
    (changed(lambda model: setattr(model.pieces[rare], 'piece', 'ж')), [], 'they differ in spelling'),
  ):
    with pytest.raises(ConfigError, match=f'arm x .*{other.fingerprint}.*{PIECES.fingerprint}.*({said})') as error:
      PIECES.check_same(other, 'arm x', texts)
    assert '\n' not in str(error.value)


@given(st.lists(st.text(max_size=20), max_size=60), st.integers(1, 200))
def test_a_sample_is_even_and_bounded(texts, limit):
  found = tokenizer.sample(iter(texts), limit)
  assert sum(len(text.encode()) for text in found) <= limit
  cut = [text.encode()[:limit].decode(errors='ignore') for text in texts]
  assert any(found == cut[:: 2**k] for k in range(8))
  if sum(len(text.encode()) for text in texts) <= limit:
    assert found == texts


def test_long_lines_are_learnt_from_too():
  text = 'abc' * 50_000  # far beyond SentencePiece's longest sentence, and without a space
  assert len(tokenizer.train([text], 270).encode(text)) < len(text) / 10


def test_a_newline_is_a_token_by_itself():
  newline = PIECES.encode('\n')
  assert len(newline) == 1
  assert PIECES.encode('the\n\nthe') == PIECES.encode('the') + 2 * newline + PIECES.encode('the')
