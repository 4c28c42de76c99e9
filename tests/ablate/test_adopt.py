"""A workdir of format 1: its arms stay done under their new ids, and are recognised by their settings alone.

tests/golden/workdir_format_1 is what the last version of that format left of `EXPERIMENT`, models and logs left out.
"""

import dataclasses
import fcntl
import json
import shutil
from pathlib import Path

import pytest
from fakes import FakeTrain, experiment

from launch import cli
from slm_jax.ablate import results
from slm_jax.ablate import workdir as workdirs
from slm_jax.ablate.adopt import adopt, find_adoptable
from slm_jax.ablate.arms import expand
from slm_jax.ablate.sweep import product, seeds
from slm_jax.config import ConfigError, override
from slm_jax.data.config import DataConfig
from slm_jax.distill.logits import Distill
from slm_jax.experiment import Config, EvalConfig, RunConfig, TrainConfig
from slm_jax.model.config import ModelConfig
from slm_jax.optim import OptimConfig

GOLDEN = Path(__file__).parent.parent / 'golden' / 'workdir_format_1'

BASE = Config(
  model=ModelConfig(vocab_size=384, d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=32, max_len=96),
  data=DataConfig(documents=200, seq_len=64, batch_size=8),
  optim=OptimConfig(learning_rate=1e-2, warmup=5),
  train=TrainConfig(steps=40),
  eval=EvalConfig(every=10, samples=1, sample_tokens=8),
  run=RunConfig(checkpoint_every=10),
)
METHODS = [
  {'name': 'teacher', 'model.d_model': 32},
  {'name': 'alone'},
  {'name': 'taught', 'transforms': (Distill('teacher'),)},
]


def module(base=BASE, methods=METHODS):
  found = experiment('Does a teacher help a tiny model?', base, sweep=list(product(methods, seeds(2))))
  found.__name__, found.BASELINE = 'two_sizes', 'alone'
  return found


@pytest.fixture
def workdir(tmp_path):
  return Path(shutil.copytree(GOLDEN, tmp_path / 'workdir'))


def contents(folder):
  return {path.relative_to(folder): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def test_every_arm_is_recognised_and_nothing_is_written_to_find_out(workdir):
  before, arms = contents(workdir), expand(module())
  found = find_adoptable(workdir, arms)
  assert found.keys() == {arm.arm_id for arm in arms}
  assert set(found.values()) == {path.name for path in (workdir / 'arms').iterdir()}
  assert contents(workdir) == before
  recorded = workdirs.read_experiment(workdir).arms
  for arm in arms:
    assert recorded[found[arm.arm_id]]['name'] == arm.name
    assert recorded[found[arm.arm_id]]['parents'] == [found[parent] for parent in arm.parents.values()]


def test_adopted_arms_keep_their_numbers_and_know_their_parents(workdir):
  before = {(row.name, row.seeds): row.summary['loss'] for row in results.read(workdir)}
  arms = expand(module())
  adopt(workdir, arms, find_adoptable(workdir, arms))
  rows = results.read(workdir)
  assert {row.arm_id for row in rows} == {arm.arm_id for arm in arms}
  assert {(row.name, row.seeds): row.summary['loss'] for row in rows} == before
  assert all(row.status == 'done' for row in rows)
  by_id = {row.arm_id: row for row in rows}
  for arm in arms:
    assert by_id[arm.arm_id].parents == tuple(arm.parents.values())
  assert find_adoptable(workdir, arms) == {}
  assert not any(workdirs.is_evaluated(workdir, arm.arm_id, arm.config.eval) for arm in arms)  # on other text: again


def test_a_launch_that_is_killed_while_it_renames_is_followed_by_one_that_goes_on(workdir):
  arms = expand(module())
  found = find_adoptable(workdir, arms)
  part = dict(list(found.items())[:3])
  adopt(workdir, arms, part)  # then killed
  rest = find_adoptable(workdir, arms)
  assert rest == {new: old for new, old in found.items() if new not in part}
  adopt(workdir, arms, rest)
  assert all(row.status == 'done' for row in results.read(workdir))


@pytest.mark.parametrize(
  'change', [{'train.steps': 41}, {'data.batch_size': 16}, {'optim.learning_rate': 0.02}, {'data.valid_fraction': 0.2}]
)
def test_another_run_is_not_taken_for_it(workdir, change):
  assert find_adoptable(workdir, expand(module(override(BASE, change)))) == {}


def test_what_cannot_change_a_result_may_differ(workdir):
  changed = override(BASE, {'eval.every': 5, 'run.log_every': 3, 'model.remat': 'full', 'train.loss_chunk': 512})
  assert len(find_adoptable(workdir, expand(module(changed)))) == 6


def edit(workdir, change):
  for path in (workdir / 'arms').glob('*/config.json'):
    settings = json.loads(path.read_text())
    change(settings)
    path.write_text(json.dumps(settings))


def test_a_setting_that_came_later_is_taken_to_be_at_its_default(workdir):
  edit(workdir, lambda settings: settings['model'].pop('attn_scale'))
  assert len(find_adoptable(workdir, expand(module()))) == 6
  assert find_adoptable(workdir, expand(module(override(BASE, {'model.attn_scale': 0.25})))) == {}


def test_a_setting_that_nobody_knows_any_more_makes_another_run_of_it(workdir):
  edit(workdir, lambda settings: settings['optim'].update(momentum=0.5))
  assert find_adoptable(workdir, expand(module())) == {}


def test_a_child_is_adopted_with_its_parent_only(workdir):
  methods = [{**METHODS[0], 'train.steps': 30}, *METHODS[1:]]
  arms = expand(module(methods=methods))
  found = find_adoptable(workdir, arms)
  assert {arm.name for arm in arms if arm.arm_id in found} == {'alone'}


def test_an_arm_on_which_a_process_works_is_left_alone(workdir):
  arms = expand(module())
  found, before = find_adoptable(workdir, arms), contents(workdir)
  path = workdir / 'arms' / next(iter(found.values())) / 'lock'
  with open(path, 'w') as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    with pytest.raises(ConfigError, match='a process of an earlier version works on this arm'):
      adopt(workdir, arms, found)
  path.unlink()
  assert contents(workdir) == before


def launch(workdir, *words):
  train = FakeTrain()
  code = cli.launch(module(), [f'--workdir={workdir}', *words], train)
  return code, train.called


def test_a_relaunch_trains_nothing_again(workdir, capsys):
  before = contents(workdir)
  assert launch(workdir, '--dry_run') == (0, [])
  assert contents(workdir) == before
  out = capsys.readouterr().out
  assert '6 arms were recorded by an earlier version under other ids; a launch renames them' in out
  assert '6 arms, 0 to run' in out
  assert launch(workdir) == (0, [])
  assert 'they have their new ids now, and are not trained again' in capsys.readouterr().out
  assert len(list((workdir / 'arms').iterdir())) == 6
  assert json.loads((workdir / 'experiment.json').read_text())['format'] == workdirs.FORMAT
  assert launch(workdir) == (0, [])
  assert 'all 6 arms are done; nothing to do' in capsys.readouterr().out


def test_an_older_version_refuses_the_new_format(workdir, monkeypatch):
  launch(workdir)
  monkeypatch.setattr(workdirs, 'FORMAT', 1)
  with pytest.raises(ConfigError, match='format 2, written by a newer version'):
    workdirs.read_experiment(workdir)


def test_a_report_needs_no_launch(workdir):
  rows = results.read(workdir)
  assert [row.status for row in rows] == ['done'] * 6
  assert dataclasses.asdict(BASE)['data']['documents'] == rows[0].config['data.documents']
