"""The hash of the code: what changes it, and what does not."""

import shutil
from pathlib import Path

from slm_jax.revision import source

PACKAGE = Path(__file__).parent.parent / 'slm_jax'


def test_each_part_has_its_own_hash(tmp_path):
  copy = tmp_path / 'elsewhere'
  shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns('__pycache__'))
  before = source(copy)
  assert before == source()
  assert {'step', 'train', 'model', 'data'} <= before.keys()

  def changed():
    after = source(copy)
    return {name for name in {**before, **after} if before.get(name) != after.get(name)}

  with open(copy / 'model' / 'decoder.py', 'a') as file:
    file.write('# another word\n')
  assert changed() == {'model'}
  (copy / 'model' / 'rope.py').rename(copy / 'model' / 'rope2.py')
  assert changed() == {'model'}
  (copy / 'step.py').unlink()
  (copy / 'new.py').write_text('')
  (copy / 'notes.txt').write_text('no code')
  assert changed() == {'model', 'step', 'new'}
