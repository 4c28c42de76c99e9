"""Expansion of experiment files: names, products, references, order, identity."""

import dataclasses
import sys

import pytest
from fakes import arms_of, experiment
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_jax.ablate.arms import expand, show_apart, sweeps_of
from slm_jax.ablate.sweep import product, seeds
from slm_jax.config import ConfigError, semantic_hash
from slm_jax.distill.logits import Distill
from slm_jax.ema import Ema
from slm_jax.experiment import Config
from slm_jax.model.config import ModelConfig

LR = [{'optim.learning_rate': 1e-3}, {'optim.learning_rate': 3e-3}]
STEPS = [{'train.steps': 5}, {'train.steps': 6}, {'train.steps': 7}]
TEACHER = {'name': 'teacher', 'model.n_layers': 4}
STUDENT = {'name': 'student', 'transforms': (Distill('teacher'),)}


# ----------------------------------------------------------------------------------------------- which arms there are


def test_a_file_without_sweeps_is_its_base():
  (arm,) = arms_of(experiment())
  assert arm.name == 'base'
  assert arm.diff == {}
  assert arm.config.data.content == 'content of stories'


@pytest.mark.parametrize(
  'sweeps, asked, n',
  [
    ({'sweep_lr': LR}, None, 2),
    ({'sweep_lr': LR, 'sweep': STEPS}, None, 3),
    ({'sweep_lr': LR, 'sweep_steps': STEPS}, 'lr', 2),
    ({'sweep_lr': LR, 'sweep_steps': STEPS}, 'lr,steps', 6),
    ({'sweep_lr': LR, 'sweep': STEPS}, 'sweep,lr', 6),
    ({'sweep_lr': LR}, 'none', 1),
  ],
)
def test_which_sweep_runs(sweeps, asked, n):
  assert len(arms_of(experiment(**sweeps), asked)) == n


@pytest.mark.parametrize(
  'sweeps, asked, message',
  [
    ({'sweep_lr': LR, 'sweep_steps': STEPS}, None, '--sweep: name one or more of lr, steps; or none'),
    ({'sweep_lr': LR}, 'rl', '--sweep=rl: no such sweep; there is: lr, none'),
    ({'sweep_lr': LR}, 'lr,lr', 'optim.learning_rate is set by two'),
    ({'sweep_lr': []}, 'lr', "sweep 'lr': yields no arms"),
    ({'sweep_lr': [3]}, 'lr', "sweep 'lr': yields 3, expected"),
    ({'sweep_lr': [{'optim.lr': 3}]}, 'lr', "optim.lr: unknown key 'lr'"),
    ({'sweep_x': [{'model.n_kv_heads': 3}]}, 'x', 'must be a multiple of n_kv_heads=3 (in the arm model.n_kv_heads=3)'),
  ],
)
def test_impossible_sweeps_are_one_line(sweeps, asked, message):
  with pytest.raises(ConfigError) as error:
    arms_of(experiment(**sweeps), asked)
  assert message in str(error.value)
  assert '\n' not in str(error.value)


def test_a_sweep_that_returns_nothing_is_one_line():
  """As where `yield` was forgotten."""
  with pytest.raises(ConfigError, match="^sweep 'lr': gives None, not dicts of"):
    arms_of(experiment(sweep_lr=lambda: None), 'lr')


def test_a_sweep_may_ask_for_the_base_after_the_command_line():
  def sweep(base):
    yield {'train.steps': base.train.steps * 2}

  (arm,) = arms_of(experiment(sweep=sweep), **{'train.steps': '11'})
  assert arm.config.train.steps == 22


def test_a_sweep_wins_over_the_command_line_and_both_over_the_base():
  first, second = arms_of(experiment(sweep=LR), **{'optim.learning_rate': '0.5', 'train.steps': '11'})
  assert [a.config.optim.learning_rate for a in (first, second)] == [1e-3, 3e-3]
  assert first.config.train.steps == second.config.train.steps == 11


def test_the_command_line_is_named_where_it_is_wrong():
  with pytest.raises(ConfigError, match=r'^--config\.optim\.lr: unknown key'):
    arms_of(experiment(), **{'optim.lr': '1'})


def test_sweeps_are_found_by_name():
  assert list(sweeps_of(experiment(sweep_b=LR, sweep=LR, sweep_a=LR, swept=3))) == ['b', 'sweep', 'a']


# ----------------------------------------------------------------------------------------------------- identity


def test_identical_arms_are_merged_under_the_first_name():
  arms = arms_of(
    experiment(sweep=[{'name': 'a', 'train.steps': 5}, {'name': 'b', 'train.steps': '5.0'}, {'name': 'c'}])
  )
  assert [(a.name, a.aliases) for a in arms] == [('a', ('b',)), ('c', ())]


def test_an_id_is_the_hash_of_the_resolved_config():
  for arm in arms_of(experiment(sweep=list(product(seeds(2), [TEACHER, STUDENT])))):
    assert arm.arm_id == semantic_hash(arm.config)


def test_labels_paths_and_hardware_do_not_change_an_id_but_content_does():
  base = Config()
  other = dataclasses.replace(base, name='x', run=dataclasses.replace(base.run, fsdp=4, log_every=3))
  other = dataclasses.replace(other, data=dataclasses.replace(base.data, sources=('/elsewhere',)))

  def only(config, content):
    return expand(experiment(base=config), fingerprint=lambda data: content)[0].arm_id

  assert only(base, 'a') == only(other, 'a') != only(base, 'b')


def test_data_are_read_once_for_all_seeds():
  asked = []

  def fingerprint(data):
    asked.append(data)
    return 'c'

  sweep = list(product(seeds(3), [{}, {'data.seq_len': 64}]))
  arms = expand(experiment(sweep=sweep), fingerprint=fingerprint)
  assert len(arms) == 6
  assert len(asked) == 2


# --------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
  'changes, names',
  [
    (LR, ['learning_rate=0.001', 'learning_rate=0.003']),
    ([{}, *LR[1:]], ['base', 'learning_rate=0.003']),
    ([{'seed': 1}, {'seed': 2}], ['base', 'base']),
    ([{**lr, 'train.steps': 5} for lr in LR], ['learning_rate=0.001', 'learning_rate=0.003']),
    ([{'name': 'a', **lr} for lr in LR], ['a learning_rate=0.001', 'a learning_rate=0.003']),
    ([{'name': 'a', 'seed': 1}, {'name': 'a', 'seed': 2}], ['a', 'a']),
    ([{'model.d_model': 8, 'train.steps': 1}, {'train.steps': 2}], ['d_model=8 steps=1', 'steps=2']),
    ([{'model.norm_eps': 1.0}, {'optim.eps': 2.0, 'model.norm_eps': 2.0}], ['norm_eps=1', 'norm_eps=2 eps=2']),
    ([{'model.bias': True}, {'train.steps': 2}], ['bias=True', 'steps=2']),
    ([{'transforms': (Ema(0.5),)}, {'transforms': ()}], ['transforms=ema(decay=0.5)', 'transforms=none']),
  ],
)
def test_names_say_what_varies_beyond_the_seed(changes, names):
  assert [arm.name for arm in arms_of(experiment(sweep=changes))] == names


def test_short_keys_are_written_out_where_they_would_be_ambiguous():
  arms = arms_of(experiment(sweep=[{'seed': 1, 'optim.name': 'muon'}, {'optim.name': 'adamw', 'eval.prompt': 'muon'}]))
  assert arms[1].name == 'name=adamw prompt=muon'
  sweep = [{'optim.warmup': 1, 'data.vocab_size': 9}, {'model.vocab_size': 600}]
  arms = arms_of(experiment(sweep=sweep), **{'data.tokenizer': 'sentencepiece'})
  assert [a.name for a in arms] == ['warmup=1 data.vocab_size=9', 'model.vocab_size=600']


def test_a_difference_is_told_by_names_and_against_a_new_transforms_defaults():
  _, student = arms_of(experiment(sweep=[TEACHER, {'name': 's', 'transforms': (Distill('teacher', weight=0.9),)}]))
  assert student.diff == {
    'transforms': ([], ['distill']),
    'transforms.distill.teacher': ('', 'teacher'),
    'transforms.distill.weight': (0.5, 0.9),
  }


# ----------------------------------------------------------------------------------------------------- references


def test_an_arm_refers_to_the_one_of_its_own_seed_and_comes_after_it():
  arms = arms_of(experiment(sweep=list(product(seeds(3), [STUDENT, TEACHER]))))
  place = {arm.arm_id: i for i, arm in enumerate(arms)}
  students = [arm for arm in arms if arm.name == 'student']
  assert len(students) == 3
  for arm in students:
    (parent,) = arm.parents.values()
    assert arms[place[parent]].config.seed == arm.config.seed
    assert arms[place[parent]].name == 'teacher'
    assert place[parent] < place[arm.arm_id]
    assert arm.config.transforms[0].teacher == parent


def test_the_only_arm_of_a_name_is_shared_by_all_seeds():
  arms = arms_of(experiment(sweep=[TEACHER, *product(seeds(3), [STUDENT])]))
  assert {tuple(a.parents.values()) for a in arms if a.name == 'student'} == {(arms[0].arm_id,)}


def test_arms_of_a_product_refer_within_their_own_combination():
  arms = arms_of(experiment(sweep_m=[TEACHER, STUDENT], sweep_lr=LR, sweep_s=list(seeds(2))), 'm,lr,s')
  by_id = {arm.arm_id: arm for arm in arms}
  students = [arm for arm in arms if arm.parents]
  assert len(students) == 4
  for arm in students:
    parent = by_id[arm.parents['transforms.distill.teacher']]
    assert parent.config.optim.learning_rate == arm.config.optim.learning_rate
    assert parent.config.seed == arm.config.seed


def test_an_id_depends_on_the_parents_all_the_way_up():
  def ids(width):
    sweep = [
      {'name': 'a', 'model.d_ff': width},
      {'name': 'b', 'init.arm': 'a'},
      {'name': 'c', 'init.arm': 'b'},
      {'name': 'd'},
    ]
    return {arm.name: arm.arm_id for arm in arms_of(experiment(sweep=sweep))}

  one, two = ids(512), ids(640)
  assert one['d'] == two['d']
  assert all(one[name] != two[name] for name in 'abc')


def test_an_arm_that_cannot_be_cut_out_of_its_parent_is_refused_before_any_is_trained():
  parent = {'name': 'a', 'model.d_ff': 64, 'model.n_layers': 2}
  for child, message in (
    ({'model.d_ff': 65}, r"model.d_ff=65: larger than 64 of the arm it is cut from \(in the arm 'b'\)"),
    ({'model.d_ff': 8, 'model.mlp': 'gelu'}, 'init.arm: its model differs in mlp; only layers, widths and heads'),
    ({'model.d_ff': 8, 'model.d_model': 8, 'init.by': 'flap'}, 'init.by=flap: .*model.d_model=8 is less than 128'),
    ({'model.d_ff': 8, 'model.n_heads': 2, 'model.n_kv_heads': 1}, 'model.n_heads=2: 2 for each of 1 .* has 1'),
    ({'model.d_ff': 8, 'model.n_layers': 1, 'init.layers': (2,)}, r'init.layers=\(2,\): must increase and lie in 0..1'),
    ({'model.d_ff': 8, 'model.n_layers': 1, 'init.layers': (0, 1)}, r'init.layers=\(0, 1\): model.n_layers=1 of them'),
  ):
    with pytest.raises(ConfigError, match=message) as error:
      arms_of(experiment(sweep=[parent, {'name': 'b', 'init.arm': 'a', 'model.n_layers': 2, **child}]))
    assert '\n' not in str(error.value)
  rotated = {'name': 'b', 'init.arm': 'a', 'init.by': 'principal', 'model.tied': False, 'model.d_model': 64}
  assert len(arms_of(experiment(sweep=[parent, {**parent, **rotated}]))) == 2


def test_a_group_is_what_repetitions_have_in_common_parents_included():
  arms = arms_of(experiment(sweep=list(product(seeds(3), [TEACHER, STUDENT]))))
  groups = {name: {arm.group for arm in arms if arm.name == name} for name in ('teacher', 'student')}
  assert [len(g) for g in groups.values()] == [1, 1]
  assert groups['teacher'] != groups['student']


@pytest.mark.parametrize(
  'sweep, message',
  [
    ([STUDENT], "transforms.distill.teacher='teacher' (in the arm 'student'): no arm has that name; there is: student"),
    ([{'name': 'a', 'init.arm': 'a'}], "depend on each other: 'a' -> 'a'"),
    (
      [{'name': 'a', 'init.arm': 'b'}, {'name': 'b', 'init.arm': 'c'}, {'name': 'c', 'init.arm': 'b'}],
      "depend on each other: 'b' -> 'c' -> 'b'",
    ),
    ([TEACHER, {**TEACHER, 'train.steps': 5}, {**TEACHER, 'train.steps': 6}, STUDENT], None),
    (
      [{**TEACHER, 'train.steps': 5}, {**TEACHER, 'train.steps': 6}, STUDENT],
      "transforms.distill.teacher='teacher' (in the arm 'student'): could be any of 2 arms",
    ),
    ([{**TEACHER, 'seed': 1}, {**TEACHER, 'seed': 2}, {**STUDENT, 'seed': 3}], 'could be any of 2 arms'),
  ],
)
def test_impossible_references_are_one_line(sweep, message):
  if message is None:  # three arms were called 'teacher', but one of them is still called just that
    assert arms_of(experiment(sweep=sweep))[3].parents
    return
  with pytest.raises(ConfigError) as error:
    arms_of(experiment(sweep=sweep))
  assert message in str(error.value)
  assert '\n' not in str(error.value)


@settings(deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 8))
def test_parents_come_first_in_any_graph(random, n):
  """Arm i starts from some arm before it in a random order of names; the sweep yields them in another order."""
  names = [f'arm{i}' for i in range(n)]
  sweep = [{'name': names[0], 'model.d_ff': 64}]  # each has less, so that it can be cut out of any before it
  for i in range(1, n):
    sweep.append({'name': names[i], 'model.d_ff': 64 - i, 'init.arm': random.choice(names[:i])})
  random.shuffle(sweep)
  arms = arms_of(experiment(base=Config(model=ModelConfig(n_layers=1)), sweep=sweep))
  seen = set()
  for arm in arms:
    assert seen.issuperset(arm.parents.values())
    seen.add(arm.arm_id)
  assert len(seen) == n


def test_the_work_grows_with_the_number_of_arms_and_not_with_its_square():
  """Calls of functions, counted: four times as many teachers, each with its student, take four times as many."""

  def calls(n):
    rates, count = [{'optim.learning_rate': 1e-6 * (1 + i)} for i in range(n)], 0
    module = experiment(sweep=list(product(rates, [TEACHER, STUDENT])))

    def note(*_):
      nonlocal count
      count += 1

    sys.setprofile(note)
    try:
      arms_of(module)
    finally:
      sys.setprofile(None)
    return count

  calls(5)
  assert calls(200) / calls(50) == pytest.approx(4, rel=0.01)


@pytest.mark.parametrize(
  'values, expected',
  [
    ([0.1, 0.2], ['0.1', '0.2']),
    ([0.1234567, 0.1234568], ['0.1234567', '0.1234568']),
    ([1e-9, 1.0000000001e-9, 2e-9], ['1e-09', '1.0000000001e-09', '2e-09'][:3]),
    ([0.1 + 0.2, 0.3], ['0.30000000000000004', '0.29999999999999999']),
    ([(0.1234567, 1), (0.1234568, 1)], ['0.1234567+1', '0.1234568+1']),
    (['a', 3, True], ['a', '3', 'True']),
  ],
)
def test_floats_have_as_many_digits_as_tell_them_apart(values, expected):
  assert show_apart(values) == expected


def test_arms_that_differ_in_the_last_digits_have_names_that_differ():
  arms = arms_of(experiment(sweep=[{'optim.weight_decay': x} for x in (0.1, 0.10000001, 0.10000002)]))
  assert [arm.name for arm in arms] == ['weight_decay=0.1', 'weight_decay=0.10000001', 'weight_decay=0.10000002']
