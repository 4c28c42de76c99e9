"""From a folder or a glob to its files: splits by name at any depth, links, and what is left out and named."""

import glob
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm_jax.config import ConfigError
from slm_jax.data import paths
from slm_jax.data.paths import locate


def make(root: Path, *names: str) -> Path:
  """Files that each hold their own name."""
  for name in names:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(name)
  return root


def splits(source: Path | str, root: Path) -> dict[str, list[str]]:
  """{split: names}; what is left out is under ''."""
  located = locate(str(source), 'data.sources', ('stories',))
  names = {split: [str(p.relative_to(root)) for p in files] for split, files in located.splits.items()}
  out = sorted(str(Path(place.partition(' (')[0]).relative_to(root)) for place in located.left_out)
  return {**names, **({'': out} if out else {})}


# --------------------------------------------------------------------------------------------------------------- splits

FOLDERS = {
  'folders': (
    ['train/a.txt', 'Validation/b.txt', 'test/c.txt'],
    {'train': ['train/a.txt'], 'valid': ['Validation/b.txt'], '': ['test/c.txt']},
  ),
  'folders below folders': (
    ['en/train/a.txt', 'en/dev/b.txt', 'en/TEST/c.txt', 'en/train/more/d.txt'],
    {'train': ['en/train/a.txt', 'en/train/more/d.txt'], 'valid': ['en/dev/b.txt'], '': ['en/TEST/c.txt']},
  ),
  'files below folders': (
    ['en/train.txt', 'en/val.txt', 'en/test.txt'],
    {'train': ['en/train.txt'], 'valid': ['en/val.txt'], '': ['en/test.txt']},
  ),
  'test goes before train': (
    ['test/train.txt', 'train/test.txt', 'train/a.txt'],
    {'train': ['train/a.txt'], '': ['test/train.txt', 'train/test.txt']},
  ),
  'valid goes before train': (
    ['train/valid.txt', 'train/a.txt'],
    {'train': ['train/a.txt'], 'valid': ['train/valid.txt']},
  ),
  'a valid part, and the rest': (
    ['a.txt', 'b/c.txt', 'validation/d.txt', 'test/e.txt'],
    {'train': ['a.txt', 'b/c.txt'], 'valid': ['validation/d.txt'], '': ['test/e.txt']},
  ),
  'a test part, and the rest': (
    ['a.txt', 'test/b.txt', 'test-00001.jsonl'],
    {'all': ['a.txt'], '': ['test-00001.jsonl', 'test/b.txt']},
  ),
  'words after the name, with train': (
    ['train_books.txt', 'valid_books.txt', 'test_published.txt', 'index.txt'],
    {'train': ['train_books.txt'], 'valid': ['valid_books.txt'], '': ['index.txt', 'test_published.txt']},
  ),
  'words after the name, without': (
    ['test_plan.md', 'dev-guide.md', 'notes.md'],
    {'all': ['dev-guide.md', 'notes.md', 'test_plan.md']},
  ),
  'a project of programs': (
    ['src/train.py', 'src/test_utils.py', 'src/dev.c', 'tests/test_train.py', 'trainer/loop.py', 'docs/guide.md'],
    {
      'all': [
        *('docs/guide.md', 'src/dev.c', 'src/test_utils.py', 'src/train.py'),
        *('tests/test_train.py', 'trainer/loop.py'),
      ]
    },
  ),
  'programs in folders of splits': (
    ['train/a.py', 'valid/b.py', 'test/c.py'],
    {'train': ['train/a.py'], 'valid': ['valid/b.py'], '': ['test/c.py']},
  ),
}


@pytest.mark.parametrize('case', FOLDERS)
def test_the_names_of_folders_and_files_say_the_split(case, tmp_path):
  names, expected = FOLDERS[case]
  make(tmp_path / 'data', *names)
  assert splits(tmp_path / 'data', tmp_path / 'data') == expected
  assert splits(tmp_path / 'data/**/*.*', tmp_path / 'data') == expected


def test_a_name_above_the_given_folder_says_nothing(tmp_path):
  make(tmp_path / 'test/data', 'a.txt', 'b.txt')
  assert splits(tmp_path / 'test/data', tmp_path / 'test/data') == {'all': ['a.txt', 'b.txt']}
  assert splits(tmp_path / 'test/data/*.txt', tmp_path / 'test/data') == {'all': ['a.txt', 'b.txt']}
  assert splits(tmp_path / 'test', tmp_path / 'test') == {'all': ['data/a.txt', 'data/b.txt']}
  assert splits(tmp_path / 'test/data/a.txt', tmp_path / 'test/data') == {'all': ['a.txt']}


def test_only_test_data_are_an_error(tmp_path):
  make(tmp_path / 'data', 'test/a.txt', 'test/b.txt')
  with pytest.raises(ConfigError, match="data': all 2 files are named test; to read them, name them themselves"):
    splits(tmp_path / 'data', tmp_path)


def test_a_valid_split_that_no_train_split_goes_with_is_said(tmp_path):
  make(tmp_path / 'data', 'a.txt', 'b.txt', 'dev/c.txt')
  said = locate(str(tmp_path / 'data'), 'data.sources', ()).about_splits
  assert said == f'{tmp_path}/data: 1 of 3 files are the valid split, by their names: {tmp_path}/data/dev/c.txt'
  make(tmp_path / 'data', 'train/d.txt')
  assert locate(str(tmp_path / 'data'), 'data.sources', ()).about_splits == ''


words = st.sampled_from(
  ['train', 'Validation', 'val', 'dev', 'TEST', 'testing', 'tests', 'a', 'trainer', 'test_x', 'x1']
)


@given(st.lists(st.tuples(st.lists(words, max_size=3), words), min_size=1, unique_by=str))
def test_every_file_is_in_one_split_and_no_test_file_is_read(found):
  files = {Path(*folders, f'{name}.txt'): (*folders, f'{name}.txt') for folders, name in found}
  named = paths.named_splits(files)
  assert sorted(p for part in named.values() for p in part) == sorted(files)
  assert named.keys() <= {'all'} | {'test'} or named.keys() <= {'train', 'valid', 'test', ''}
  for split in named.keys() & {'all', 'train', 'valid'}:
    for path in named[split]:
      lower = [part.lower().removesuffix('.txt') for part in path.parts]
      assert not {'test', 'testing'} & set(lower)
      assert split == 'valid' or not {'validation', 'val', 'dev'} & set(lower)


# ---------------------------------------------------------------------------------------------------------------- links


def reasons(source: Path | str) -> dict[str, str]:
  """{name: why it is left out}."""
  places = (place.partition(' (') for place in locate(str(source), 'data.sources', ()).left_out)
  return {Path(path).name: why.removesuffix(')') for path, _, why in places}


def test_folders_behind_links_are_read(tmp_path):
  make(tmp_path / 'elsewhere', 'b.txt', 'sub/c.txt', '.git/d.txt')
  make(tmp_path / 'data', 'a.txt')
  (tmp_path / 'data/link').symlink_to(tmp_path / 'elsewhere')
  assert splits(tmp_path / 'data', tmp_path / 'data') == {'all': ['a.txt', 'link/b.txt', 'link/sub/c.txt']}
  assert splits(tmp_path / 'data/**/*.txt', tmp_path / 'data') == {'all': ['a.txt', 'link/b.txt', 'link/sub/c.txt']}


def test_the_name_of_a_link_says_the_split(tmp_path):
  make(tmp_path / 'elsewhere', 'a.txt')
  make(tmp_path / 'data', 'train/b.txt')
  (tmp_path / 'data/validation').symlink_to(tmp_path / 'elsewhere')
  assert splits(tmp_path / 'data', tmp_path / 'data') == {'train': ['train/b.txt'], 'valid': ['validation/a.txt']}


def test_no_file_is_read_twice_and_cycles_end(tmp_path):
  data = make(tmp_path / 'data', 'a.txt', 'sub/b.txt')
  (data / 'again').symlink_to(data / 'sub')
  (data / 'sub/loop').symlink_to(data)
  (data / 'up').symlink_to(tmp_path)
  (data / 'copy.txt').symlink_to(data / 'a.txt')
  make(tmp_path, 'beside.txt')
  found = splits(data, data)
  assert found == {
    'all': ['a.txt', 'sub/b.txt', 'up/beside.txt'],
    '': ['again', 'copy.txt', 'sub/loop'],
  }
  assert set(reasons(data).values()) == {'a link to a folder that is read already', 'the same file as another'}
  globbed = splits(data / '**/*.txt', data)
  assert [name for name in globbed['all'] if not name.startswith('up/')] == ['a.txt', 'sub/b.txt']
  assert len(globbed['all']) == 3


@pytest.fixture(scope='module')
def tree(tmp_path_factory) -> Path:
  names = ('a.txt', 'b.md', 'sub/a.txt', 'sub/c.txt', 'sub/sub/d.md', '.hid/e.txt', 'sub/.f.txt', 'sub/.hid/sub/g.txt')
  return make(tmp_path_factory.mktemp('tree'), *names)


@given(st.lists(st.sampled_from(['**', '*', 'sub', 's*', '.hid', '.*', '*.txt', '?.md', '[ab].*']), max_size=4))
def test_a_glob_means_what_it_means_to_python(tree, pattern):
  pattern = ['**', *pattern]
  wanted = sorted(p for p in glob.glob(str(tree.joinpath(*pattern)), recursive=True) if Path(p).is_file())
  found, _ = paths._matches(tree.joinpath(*pattern), tree)
  assert list(map(str, found)) == list(dict.fromkeys(wanted))


def test_links_that_lead_nowhere_are_named(tmp_path):
  data = make(tmp_path / 'data', 'a.txt')
  (data / 'gone.txt').symlink_to(tmp_path / 'nowhere.txt')
  (data / 'folder').symlink_to(tmp_path / 'nowhere')
  (data / 'itself.txt').symlink_to(data / 'itself.txt')
  os.mkfifo(data / 'pipe.txt')
  lost = 'a link to what does not exist'
  assert reasons(data) == {'gone.txt': lost, 'folder': lost, 'itself.txt': lost, 'pipe.txt': 'not a file'}
  assert reasons(data / '*.txt') == {'gone.txt': lost, 'itself.txt': lost}


def test_one_file_may_stand_in_both_splits_where_its_text_is_held_out(tmp_path):
  data = make(tmp_path / 'data', 'train/a.txt', 'train/b.txt')
  (data / 'valid').mkdir()
  (data / 'valid/b.txt').symlink_to(data / 'train/b.txt')
  assert splits(data, data) == {'train': ['train/a.txt', 'train/b.txt'], 'valid': ['valid/b.txt']}


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
  data = make(tmp_path / 'data', 'a.txt', 'closed/b.txt')
  listed = os.scandir

  def scandir(path):
    if Path(path).name == 'closed':
      raise PermissionError(13, 'Permission denied', str(path))
    return listed(path)

  monkeypatch.setattr(os, 'scandir', scandir)
  with pytest.raises(ConfigError, match='closed: cannot be read: Permission denied'):
    locate(str(data), 'data.sources', ())
