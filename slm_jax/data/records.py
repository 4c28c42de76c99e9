"""One file -> documents. What is not as it should be is an error, or is counted with its file and line."""

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from slm_jax.config import ConfigError

PROGRAM = frozenset(
  ('.py', '.c', '.h', '.cc', '.cpp', '.cu', '.java', '.js', '.ts', '.go', '.rs', '.rb', '.sh', '.sql')
)
TEXT = frozenset({'.txt', '.text', '.md', '.rst', '.tex', '.yaml', '.toml'}) | PROGRAM  # a file is a document
LINES = frozenset({'.jsonl', '.json', '.ndjson'})  # a line is a record
TABLE = frozenset({'.parquet'})  # a row is a record
LISTED = 1000  # places of bad input that are kept; all are counted


class Document(NamedTuple):
  text: str
  nats: float | None = None  # exact -log p(text), where the source knows it


class Report:
  """What was wrong with the input. `errors` says what to do about it: 'strict' raises at the first place."""

  def __init__(self, errors: str):
    self.errors = errors
    self.count = 0
    self.places: list[str] = []  # 'file:line: what', the first LISTED
    self.empty: dict[str, None] = {}  # files that hold no text; each once, in order
    self.crossed = 0  # training documents that were dropped because their texts are held out
    self.crossing: dict[str, None] = {}  # how they begin, the first LISTED

  def skip(self, where: str, what: str) -> None:
    """A record that cannot be used; there is nothing to replace it with."""
    if self.errors != 'skip':
      raise ConfigError(f"{where}: {what}; data.errors='skip' leaves such records out")
    self._note(where, what)

  def decode(self, data: bytes, where: str) -> str | None:
    """The text of UTF-8 bytes; None if it is to be left out."""
    try:
      return data.decode()
    except UnicodeDecodeError as error:
      what = f'not UTF-8 at byte offset {error.start} (0x{data[error.start]:02x})'
    if self.errors == 'strict':
      raise ConfigError(f"{where}: {what}; data.errors='replace' or 'skip' go on") from None
    self._note(where, what)
    return data.decode(errors='replace') if self.errors == 'replace' else None

  def cross(self, text: str) -> None:
    """Counts a training document that is dropped because its text stands in a valid split."""
    self.crossed += 1
    if len(self.crossing) < LISTED:
      self.crossing[repr(text[:40])] = None

  def _note(self, where: str, what: str) -> None:
    self.count += 1
    if len(self.places) < LISTED:
      self.places.append(f'{where}: {what}')


def listed(places: Sequence[str], count: int) -> str:
  """The first places of so many, for a message."""
  return '; '.join(places[:3]) + '; ...' * (count > 3)


def kind(path: Path) -> str:
  """'text', 'lines', 'table', or '' for a file that is not read."""
  suffix = suffix_of(path)
  if suffix in TABLE and path.suffix != '.gz':
    return 'table'
  return 'text' if suffix in TEXT else 'lines' if suffix in LINES else ''


def suffix_of(path: Path) -> str:
  """The suffix that says what a file holds, in lower case: that before '.gz'."""
  return Path(path.stem if path.suffix == '.gz' else path.name).suffix.lower()


def read(path: Path, field: str, report: Report) -> Iterator[Document]:
  """The documents of a file. ConfigError if it cannot be read; what `report` does for records that are no documents."""
  try:
    with gzip.open(path) if path.suffix == '.gz' else open(path, 'rb') as file:
      yield from {'table': _table, 'lines': _lines, 'text': _text}[kind(path)](file, path, field, report)
  except (OSError, EOFError, zlib.error) as error:  # gzip raises each of them
    raise ConfigError(f'{path}: cannot be read: {error}') from error


def _text(file: Any, path: Path, field: str, report: Report) -> Iterator[Document]:
  text = report.decode(file.read(), str(path))
  if text:
    yield Document(text)
  elif text == '':
    report.empty[str(path)] = None


def _lines(file: Any, path: Path, field: str, report: Report) -> Iterator[Document]:
  for number, line in enumerate(file, 1):
    where = f'{path}:{number}'
    decoded = report.decode(line, where)
    if decoded is None:
      continue
    try:
      record = json.loads(decoded)
    except (ValueError, RecursionError) as error:
      report.skip(where, f'not JSON ({error})' if decoded.strip() else 'empty line')
      continue
    if not isinstance(record, dict):
      report.skip(where, f'expected a JSON object, got {type(record).__name__}')
    elif field not in record:
      report.skip(where, f'no field {field!r}; there is: {", ".join(map(repr, list(record)[:20])) or "nothing"}')
    else:
      yield from check(record[field], f'field {field!r}', where, report)


def _table(file: Any, path: Path, field: str, report: Report) -> Iterator[Document]:
  import pyarrow.parquet  # slow to import, and seldom needed

  try:
    table = pyarrow.parquet.ParquetFile(file)  # not the path, whose name need not be UTF-8
    if field not in table.schema_arrow.names:
      raise ConfigError(f'{path}: no column data.text_field={field!r}; there is: {", ".join(table.schema_arrow.names)}')
    if pyarrow.types.is_dictionary(table.schema_arrow.field(field).type):
      # Otherwise Arrow makes the dictionary itself, and ends at a text that is not UTF-8.
      table = pyarrow.parquet.ParquetFile(file, read_dictionary=[field])
    number = 0
    for batch in table.iter_batches(columns=[field]):
      for value in entries(batch.column(0)):
        number += 1
        yield from check(value, f'column {field!r}', f'{path}:{number}', report)
  except pyarrow.ArrowException as error:
    raise ConfigError(f'{path}: not a readable Parquet file: {str(error).splitlines()[0]}') from error


def entries(column: Any) -> list[Any]:
  """The entries of an Arrow array. Text comes as bytes: Arrow does not ask whether they are UTF-8, and Python would."""
  import pyarrow

  if pyarrow.types.is_dictionary(column.type):
    column = column.dictionary_decode()
  if pyarrow.types.is_string(column.type):
    column = column.view(pyarrow.binary())
  elif pyarrow.types.is_large_string(column.type):
    column = column.view(pyarrow.large_binary())
  elif pyarrow.types.is_string_view(column.type):
    column = column.cast(pyarrow.large_binary())
  return column.to_pylist()


def check(value: Any, name: str, where: str, report: Report) -> Iterator[Document]:
  """The document in a record's text field, if it is one: a string, or the bytes of one."""
  if isinstance(value, bytes):
    value = report.decode(value, f'{where}: {name}')
    if value is None:
      return
  if not isinstance(value, str):
    report.skip(where, f'{name} is {"null" if value is None else type(value).__name__}, expected a string')
  elif not value:
    report.skip(where, f'{name} is empty')
  else:
    try:
      value.encode()
    except UnicodeEncodeError:  # JSON can say one half of a surrogate pair; UTF-8 cannot
      value = report.decode(value.encode(errors='surrogatepass'), f'{where}: {name}')
    if value:
      yield Document(value)
