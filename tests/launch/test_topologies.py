"""The table of slices: facts of the documentation, laws of geometry, errors that help."""

import math

import pytest

from launch import topologies
from launch.topologies import TABLE, find
from slm_jax.config import ConfigError

# (engine, name): (topology, chips, hosts, machine type); from the documentation of Cloud TPU, GKE and XPK.
FACTS = {
  ('tpu_vm', 'v4-8'): ('2x2x1', 4, 1, 'ct4p-hightpu-4t'),
  ('gke', 'v5p-8'): ('2x2x1', 4, 1, 'ct5p-hightpu-4t'),
  ('gke', 'v5p-32'): ('2x2x4', 16, 4, 'ct5p-hightpu-4t'),
  ('tpu_vm', 'v5litepod-8'): ('2x4', 8, 1, None),
  ('gke', 'v5litepod-8'): ('2x4', 8, 2, 'ct5lp-hightpu-4t'),
  ('gke', 'v5litepod-16'): ('4x4', 16, 4, 'ct5lp-hightpu-4t'),
  ('gke', 'v6e-1'): ('1x1', 1, 1, 'ct6e-standard-1t'),
  ('gke', 'v6e-16'): ('4x4', 16, 4, 'ct6e-standard-4t'),
  ('tpu_vm', 'v6e-256'): ('16x16', 256, 64, None),
  ('gke', 'tpu7x-8'): ('2x2x1', 4, 1, 'tpu7x-standard-4t'),
}


@pytest.mark.parametrize('engine, name', FACTS)
def test_facts(engine, name):
  topology, chips, hosts, machine = FACTS[engine, name]
  its = find(engine, name, '--type')
  assert (its.topology, its.chips, its.hosts) == (topology, chips, hosts)
  assert machine in (None, its.machine)


def test_every_slice_is_a_box_of_whole_hosts_and_bears_its_size():
  for (engine, name), its in TABLE.items():
    assert its.name == name
    assert its.chips == math.prod(map(int, its.topology.split('x')))
    assert its.chips % its.hosts == 0
    assert its.chips // its.hosts in (1, 4, 8)
    family, _, size = name.rpartition('-')
    assert int(size) == its.chips * (2 if family in ('v4', 'v5p', 'tpu7x') else 1)
    assert its.devices == its.chips * (2 if family == 'tpu7x' else 1)
    assert its.runtime or engine == 'gke'
  keys = [(engine, its.topology, its.label) for (engine, _), its in TABLE.items()]
  assert len(set(keys)) == len(keys)


def test_tpu7x_is_on_gke_alone():
  assert {engine for engine, name in TABLE if name.startswith('tpu7x')} == {'gke'}


@pytest.mark.parametrize(
  'engine, name, words',
  [
    ('tpu_vm', 'v6e-12', '--type=v6e-12: no such slice; there is: v6e-1, v6e-4, v6e-8, v6e-16'),
    ('gke', 'v5p-4', '--type=v5p-4: no such slice; there is: v5p-8, v5p-16'),
    ('tpu_vm', 'tpu7x-8', 'expected one of v4-N, v5litepod-N, v5p-N, v6e-N'),
    ('gke', 'h100-8', 'tpu7x-N; as in v6e-16'),
    ('gke', 'v6e-', 'no such slice'),
    ('gke', '', 'not given'),
  ],
)
def test_what_does_not_exist_is_answered_with_what_does(engine, name, words):
  with pytest.raises(ConfigError) as error:
    find(engine, name, '--type')
  assert words in str(error.value)
  assert '\n' not in str(error.value)
  family = name.rpartition('-')[0]
  if family in topologies.ENGINES[engine]:
    for word in str(error.value).partition('there is: ')[2].split(', '):
      assert find(engine, word, '--type').name == word
