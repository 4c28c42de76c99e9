"""What went into an arm: each ancestor and each made data set once, from records of today and of before."""

import json

import hypothesis
import pytest
from hypothesis import strategies as st

from slm_jax import pipeline
from slm_jax.config import ConfigError


class Workdir:
  """Arms that are done. What an arm's own launch would record is in `known`."""

  def __init__(self, path):
    self.path = path
    self.known = {}

  def add(self, arm, flops, parents=(), made=None, old=False):
    """old: as a run before December 2026, whose record names no ancestors and counts some of them twice."""
    found = pipeline.before(parents, made or {}, self.path)
    run = {'summary': {'flops': flops, 'parent_flops': pipeline.total(found)}, 'pipeline': found}
    if old:
      before = [json.loads((self.path / 'arms' / p / 'run.json').read_text())['summary'] for p in set(parents)]
      twice = sum(each['flops'] + each['parent_flops'] for each in before) + sum((made or {}).values())
      run = {'summary': {'flops': flops, 'parent_flops': twice}}
    self.write(arm, run)
    self.known[arm] = sorted(set(parents))
    entries = [{'arm_id': name, 'parents': its} for name, its in self.known.items()]
    (self.path / 'experiment.json').write_text(json.dumps({'arms': entries}))
    return found

  def write(self, arm, run):
    (self.path / 'arms' / arm).mkdir(parents=True, exist_ok=True)
    (self.path / 'arms' / arm / 'run.json').write_text(json.dumps(run))


@pytest.fixture
def arms(tmp_path):
  return Workdir(tmp_path)


def test_a_diamond(arms):
  arms.add('dense', 100.0)
  arms.add('sparse', 7.0, ['dense'])
  assert arms.add('child', 1.0, ['sparse', 'dense']) == {'dense': 100.0, 'sparse': 7.0}


def test_data_that_two_ancestors_read_are_made_once(arms):
  arms.add('teacher', 100.0)
  for student in ('one', 'two'):
    arms.add(student, 10.0, ['teacher'], {'teacher-0123': 5.0})
  found = arms.add('child', 1.0, ['one', 'two'], {'written-4567': 3.0})
  assert found == {'teacher': 100.0, 'one': 10.0, 'two': 10.0, 'teacher-0123': 5.0, 'written-4567': 3.0}


@hypothesis.given(st.data())
@hypothesis.settings(deadline=None, max_examples=100)
def test_laws_of_random_families(tmp_path_factory, data):
  """Any family, in which some of the records are old: those of an old arm's own ancestors are old as well."""
  arms, n = Workdir(tmp_path_factory.mktemp('family')), data.draw(st.integers(1, 8))
  flops = data.draw(st.lists(st.integers(0, 2**40).map(float), min_size=n, max_size=n))
  texts = data.draw(st.lists(st.sampled_from([None, 'a', 'b']), min_size=n, max_size=n))
  size, first_new = {'a': 3.0 * 2**30, 'b': 5.0 * 2**30}, data.draw(st.integers(0, n))
  ancestors, read = {}, {}
  for i in range(n):
    parents = data.draw(st.lists(st.integers(0, i - 1), max_size=3)) if i else []
    made = {texts[i]: size[texts[i]]} if texts[i] and i >= first_new else {}
    ancestors[i] = set(parents).union(*(ancestors[p] for p in parents))
    read[i] = set(made).union(*(read[p] for p in parents))
    found = arms.add(f'arm{i}', flops[i], [f'arm{p}' for p in parents], made, old=i < first_new)
    assert found == {**{f'arm{a}': flops[a] for a in ancestors[i]}, **{name: size[name] for name in read[i]}}
    assert pipeline.total(found) == sum(flops[a] for a in ancestors[i]) + sum(size[name] for name in read[i])


def test_what_old_runs_read_is_the_rest_of_what_they_recorded(arms):
  arms.add('teacher', 100.0, old=True)
  arms.add('student', 10.0, ['teacher'], {'teacher-0123': 5.0}, old=True)
  assert arms.add('child', 1.0, ['student', 'teacher']) == {'teacher': 100.0, 'student': 10.0, 'data of student': 5.0}


@pytest.mark.parametrize('parent_flops, counted', [(100.0, {'before old': 100.0}), (None, {})])
def test_an_old_run_that_no_launch_recorded_counts_as_a_whole_and_says_so(arms, caplog, parent_flops, counted):
  arms.write('old', {'summary': {'flops': 10.0, 'parent_flops': parent_flops}})
  assert pipeline.before(['old'], {}, arms.path) == {'old': 10.0, **counted}
  assert 'arm old: its record names no ancestors' in caplog.text


@pytest.mark.parametrize(
  'run',
  [
    *({}, {'summary': None}, {'summary': [1]}),
    *({'summary': summary} for summary in ({}, {'flops': None}, {'flops': '1'})),
    *({'pipeline': damage} for damage in (None, [], {'dense': None}, {'dense': 'x'}, {'dense': True})),
    {'summary': {'flops': 1.0, 'parent_flops': 'many'}},
  ],
)
def test_a_damaged_record_is_one_line(arms, run):
  arms.write('broken', {'pipeline': {}, **run})
  with pytest.raises(ConfigError, match=r'arms/broken/run.json: damaged \(.*\); remove .*/DONE and launch again'):
    pipeline.before(['broken'], {}, arms.path)
