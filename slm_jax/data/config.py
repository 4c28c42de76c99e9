"""DataConfig: which text, cut into which tokens, packed how."""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar, Literal, TypedDict

from slm_jax.conditions import Needs
from slm_jax.config import from_dict, require, setting
from slm_jax.files import DamagedFile, read_json

EMBEDDED = ('stories', 'addition', 'python_stdlib')  # sources that are no files


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Sources are 'stories', 'addition', 'python_stdlib', a file, a folder, a glob, or 'hf:NAME'; see data/sources.py.

  Paths are not part of an arm's identity; `content`, the hash of what they hold, is. It is filled in when an experiment
  is resolved (`sources.fingerprint`).
  """

  sources: tuple[str, ...] = setting(('stories',), semantic=False)
  weights: tuple[float, ...] = setting((), '(0, inf)')  # share of training sequences from each source; empty: by size
  valid_sources: tuple[str, ...] = setting((), semantic=False)  # empty: a source's own valid files, or its last part
  valid_fraction: float = setting(0.1, '(0, 1)')  # the last part of each source that has no valid files of its own
  content: str = ''
  text_field: str = 'text'  # of JSONL, Parquet and Hugging Face records
  errors: Literal['strict', 'replace', 'skip'] = 'strict'  # of text that is not UTF-8, lines that are not records
  # At most so many from each source, or from its train and its valid files; 0: all (drawn: 20,000).
  documents: int = setting(0, '[0, 2^31)')
  tokenizer: Literal['bytes', 'sentencepiece'] = 'bytes'
  tokenizer_file: str = setting('', semantic=False)  # a SentencePiece .model; empty: trained on the training split
  vocab_size: int = setting(512, '[1, 2^31)')  # of a SentencePiece that is trained here
  seq_len: int = setting(128, '[1, 2^31)')
  # whole: only a document longer than seq_len is cut; single: one document a sequence, and a longer one is an error
  packing: Literal['split', 'whole', 'single'] = 'split'
  # A text that is one token, and in every document: up to the first one nothing is predicted. '': no prompts
  prompt_end: str = ''
  batch_size: int = setting(32, '[1, 2^31)')  # sequences in a global batch
  seed: int = setting(0, '[0, 2^32)')  # order of the batches

  needs: ClassVar[Needs] = {
    'vocab_size': (
      lambda its: its.tokenizer == 'sentencepiece' and not its.tokenizer_file,
      'a tokenizer that is trained here: tokenizer=sentencepiece, and no tokenizer_file',
    ),
    'text_field': (lambda its: {*its.sources, *its.valid_sources}.difference(EMBEDDED), 'a source of records'),
    'weights': (lambda its: len(its.sources) > 1, 'a second source'),
    'valid_fraction': (
      lambda its: not its.valid_sources,
      'a source that holds out its own last part: no valid_sources',
    ),
  }

  def check(self, key: str) -> None:
    require(len(self.sources) > 0, f'{key}.sources=(): name at least one source')
    require(
      len(self.weights) in (0, len(self.sources)),
      f'{key}.weights={self.weights}: expected none, or one for each of the {len(self.sources)} sources',
    )
    require(
      not self.tokenizer_file or self.tokenizer == 'sentencepiece',
      f"{key}.tokenizer_file={self.tokenizer_file!r}: needs {key}.tokenizer='sentencepiece'",
    )

  @property
  def has_completions(self) -> bool:
    """Whether a sequence is one document, of a prompt and what is to follow it."""
    return self.packing == 'single' and bool(self.prompt_end)


class _File(TypedDict):
  """Of an arm's config.json, what is read here."""

  name: str
  data: dict[str, Any]


def of_arm(folder: Path) -> tuple[str, DataConfig | None]:
  """`(name, data)` of the arm in a folder, by its config.json; nothing if there is none. ConfigError if it is bad."""
  path = folder / 'config.json'
  values, fault = read_json(path, _File)
  if fault:
    raise DamagedFile(f'{path}: cannot be read ({fault})')
  return (values['name'], from_dict(DataConfig, values['data'], f'{path}:data')) if values else ('', None)
