"""Populations are the same arms, only faster: equal to the arms alone, each with its own files, stop and resume."""

import collections
import json
import os
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from toy import toy_batch, toy_model

from slm_jax import metrics, sharding, train
from slm_jax.ablate import alike, population, program
from slm_jax.checkpoint import Checkpoints, load_model, saved
from slm_jax.config import override, static, traced
from slm_jax.distill.logits import Distill, distill
from slm_jax.ema import Ema, ema
from slm_jax.experiment import Config
from slm_jax.ledger import Ledger
from slm_jax.optim import OptimConfig, optimizer
from slm_jax.prune.transform import Prune, prune
from slm_jax.step import Resources, chain, init_state, make_step

STEPS = 50


def base(**changes):
  return override(tiny.config(STEPS), {'eval.every': 25, 'run.checkpoint_every': 20, **changes})


pytestmark = pytest.mark.usefixtures('one_fake_device')  # a population does not span devices


@pytest.fixture(scope='module')
def root(tmp_path_factory, one_fake_device):
  """A workdir with a trained teacher."""
  workdir = tmp_path_factory.mktemp('population')
  teacher = base(**{'name': 'teacher', 'model.d_model': 24, 'train.steps': 10, 'eval.every': 10})
  assert train.run(teacher, workdir, 'teacher') == 0
  return workdir


def sweep(*more):
  """Six arms: two orders of the data times three of everything that is traced."""
  transforms = (Distill('teacher'), Ema(0.9), *more)
  arms = {}
  for seed in (0, 1):
    for rate, weight, sparsity in ((1e-2, 0.2, 0.5), (3e-3, 0.5, 0.8), (1e-3, 0.9, 0.3)):
      config = base(**{'seed': seed, 'data.seed': seed, 'optim.learning_rate': rate, 'transforms': transforms})
      sparse = {'transforms.prune.sparsity': sparsity} if more else {}
      arms[f'{rate}-{seed}'] = override(config, {'transforms.distill.weight': weight, **sparse})
  return arms


@pytest.fixture(scope='module')
def alone(root):
  """The arms one after another: {arm id: (evaluations, sorted checkpoints)}."""
  for arm_id, config in sweep().items():
    assert train.run(config, root, arm_id) == 0
  return {arm_id: losses(root, arm_id) for arm_id in sweep()}


def losses(workdir, arm_id):
  return [line['loss'] for line in metrics.read(workdir / 'arms' / arm_id / 'metrics.jsonl')]


def copy(root, tmp_path):
  """A workdir with the data and the teacher of another."""
  for name in ('data', 'cache', 'arms/teacher'):
    (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
    (tmp_path / name).symlink_to(root / name)
  return tmp_path


def ranks(monkeypatch):
  """{arm id: {step: loss}} of the checkpoints that are saved from here on with one, by which they are ranked."""
  original, ranked = Checkpoints.save, collections.defaultdict(dict)

  def save(self, step, state, record, loss):
    if loss is not None:
      ranked[self._folder.parent.name][step] = loss
    original(self, step, state, record, loss)

  monkeypatch.setattr(Checkpoints, 'save', save)
  return ranked


def stack(states, orders):
  """States as the state of a population, order by order."""
  together = jax.tree.map(lambda *x: jnp.stack(x).reshape(orders, -1, *x[0].shape), *states)
  return together._replace(step=states[0].step)


# ------------------------------------------------------------------------------------------------- what is traced


def test_fields_marked_as_traced_are_exactly_what_the_step_takes_as_arguments():
  teacher = toy_model()
  params = teacher.init(jax.random.PRNGKey(0))
  resources = Resources(steps=10, seq_len=6, vocab=11, model=teacher, load=lambda arm: (teacher, params), folder=None)
  for name in ('adamw', 'muon', 'adafactor'):
    config = Config(optim=OptimConfig(name), transforms=(Distill('t', weight=0.3), Prune(0.7), Ema(0.5)))
    transform = chain(*(spec.build(resources)[0] for spec in config.transforms))
    assert traced(config) == {**optimizer(config.optim, 10).hparams, **transform.hparams}


def test_one_key_is_one_program(root):
  """And a difference in any field that is not traced is another."""
  one, other = list(sweep(Prune(every=5)).values())[::5]
  assert one != other
  assert alike.static_key(one) == alike.static_key(other)

  def lowered(config):
    job = train.prepare(config, root, root)
    batch = job.place(job.dataset.batch(0))
    return jax.jit(job.step).lower(job.abstract, batch, job.frozen).as_text()

  assert lowered(one) == lowered(other)
  for key, value in {'optim.b1': 0.8, 'train.steps': 60, 'model.d_ff': 48, 'transforms.prune.every': 7}.items():
    assert alike.static_key(override(one, {key: value})) != alike.static_key(one)
  assert static(static(one)) == static(one)


def test_groups_are_rectangular():
  arms = sweep()
  assert [sorted(group) for group in alike.groups(arms)] == [sorted(arms)]
  del arms['0.001-1']
  assert [len(group) for group in alike.groups(arms)] == [3, 2]
  off = {arm_id: override(config, {'run.population': False}) for arm_id, config in arms.items()}
  assert [len(group) for group in alike.groups(off)] == [1] * 5


# ------------------------------------------------------------------------------------------------- equal to alone


def test_equal_to_the_arms_alone(root, alone, tmp_path, monkeypatch):
  """And two arms among them whose loss does not stay finite stop by themselves."""
  workdir, arms = copy(root, tmp_path), sweep()
  bad = {f'bad-{s}': override(arms[f'0.01-{s}'], {'optim.learning_rate': 1e38}) for s in (0, 1)}
  take = population.Prefetch.__next__

  def slow(batches):
    time.sleep(0.02)
    return take(batches)

  monkeypatch.setattr(population.Prefetch, '__next__', slow)
  ranked, began = ranks(monkeypatch), time.perf_counter()
  assert population.run(arms | bad, workdir) == dict.fromkeys(arms, 0) | dict.fromkeys(bad, 1)
  wall = time.perf_counter() - began
  spent = [json.loads((workdir / 'arms' / arm_id / 'run.json').read_text())['summary'] for arm_id in arms]
  assert sum(its['seconds'] + its['seconds_start'] for its in spent) <= wall
  assert all(its['seconds_data'] >= STEPS * 0.02 / len(arms | bad) for its in spent)
  assert all(its['seconds_start'] > 0 for its in spent)
  final = {}
  for arm_id in arms:
    np.testing.assert_allclose(losses(workdir, arm_id), alone[arm_id], rtol=0, atol=1e-5)
    ours, theirs = (json.loads((w / 'arms' / arm_id / 'run.json').read_text()) for w in (workdir, root))
    assert ours['population'] == len(arms | bad)
    for name in ('tokens', 'flops', 'parent_flops', 'floor', 'parameters'):
      assert ours['summary'][name] == theirs['summary'][name]
    assert (workdir / 'arms' / arm_id / 'samples.json').exists()
    lines = metrics.read(workdir / 'arms' / arm_id / 'metrics.jsonl')
    evaluated = {line['step']: line['loss'] for line in lines if line['kind'] == 'eval'}
    lowest = {step: x for step, x in evaluated.items() if all(x < evaluated[s] for s in evaluated if s < step)}
    assert ranked[arm_id] == lowest
    final[arm_id] = losses(workdir, arm_id)[-1], alone[arm_id][-1]
  assert sorted(arms, key=lambda a: final[a][0]) == sorted(arms, key=lambda a: final[a][1])
  for arm_id in bad:
    record = json.loads((workdir / 'arms' / arm_id / 'run.json').read_text())
    assert record['status'] == 'diverged'
    assert 'not finite' in record['error']
    assert max(saved(workdir / 'arms' / arm_id / 'checkpoints')) < 25


def test_an_arm_that_ends_above_the_uniform_loss_has_diverged_and_no_other(root, tmp_path):
  workdir = copy(root, tmp_path)
  arms = {
    str(rate): base(**{'optim.learning_rate': rate, 'train.steps': 10, 'optim.warmup': 0, 'transforms': ()})
    for rate in (1e-3, 100.0)
  }
  assert population.run(arms, workdir) == {'0.001': 0, '100.0': 1}
  record = json.loads((workdir / 'arms' / '100.0' / 'run.json').read_text())
  assert record['status'] == 'diverged'
  assert 'above the 5.951 nats a token of the uniform distribution' in record['error']
  assert not (workdir / 'arms' / '100.0' / 'DONE').exists()


def test_masked_arms_are_equal_but_for_choices_among_near_equals(root, tmp_path):
  """Rounding may decide which of two weights goes, and everything after that; but never how many go."""
  workdir = copy(root, tmp_path)
  arms = {arm_id: config for arm_id, config in sweep(Prune(every=5)).items() if config.data.seed == 0}
  assert population.run(arms, workdir) == dict.fromkeys(arms, 0)
  for arm_id, config in arms.items():
    assert train.run(config, workdir, f'{arm_id}-alone') == 0
    np.testing.assert_allclose(losses(workdir, arm_id), losses(workdir, f'{arm_id}-alone'), rtol=0, atol=5e-3)
    counts = []
    for name in (arm_id, f'{arm_id}-alone'):
      _, params, _ = load_model(workdir / 'arms' / name / 'model', sharding.make_mesh(1, 1, 1))
      counts.append(sum(int((x == 0).sum()) for x in jax.tree.leaves(params)))
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize('side_by_side', [True, False])
def test_fifty_steps_of_a_population_equal_fifty_steps_alone(side_by_side):
  """Both ways of mapping, with a shared teacher; no masks, in which rounding may change which weight goes."""
  student, teacher = toy_model(width=8), toy_model(width=20)
  transform, optim = chain(distill(teacher, 0.5, 2.0), ema(0.9)), optimizer(OptimConfig(warmup=1), 50)
  step = make_step(student, optim, transform)
  keys = jax.random.split(jax.random.PRNGKey(0), 6)
  states = [init_state(key, student.init(key), optim, transform) for key in keys]
  for i, state in enumerate(states):
    state.hparams['optim.learning_rate'] = jnp.float32(10.0 ** (-1 - i / 3))
    state.hparams['distill.weight'] = jnp.float32(i / 6)
  frozen = {'teacher': teacher.init(jax.random.PRNGKey(1))}
  many, one = jax.jit(program.together(step, side_by_side)), jax.jit(step)
  together = stack(states, 2)
  for t in range(50):
    batches = [toy_batch(2 * t), toy_batch(2 * t + 1)]
    together, measured = many(together, jax.tree.map(lambda *x: jnp.stack(x), *batches), frozen)
    for i, state in enumerate(states):
      states[i], alone = one(state, batches[i // 3], frozen)
      np.testing.assert_allclose(measured['total'][divmod(i, 3)], alone['total'], rtol=0, atol=1e-5)
  assert together.step == 50


def test_asked_to_stop_while_it_compiles_it_stops_after_that(root, tmp_path, monkeypatch):
  """An interrupted compilation goes on in a thread, which crashes with the interpreter."""
  workdir, arms, real = copy(root, tmp_path), sweep(), population.compile_program
  compiled = []

  def compile_program(*given):
    os.kill(os.getpid(), signal.SIGTERM)
    compiled.append(real(*given))
    return compiled[-1]

  monkeypatch.setattr(population, 'compile_program', compile_program)
  monkeypatch.setattr(population, 'restore', None)
  assert population.run(arms, workdir) == dict.fromkeys(arms, 42)
  assert len(compiled) == 1


def test_asked_to_stop_while_models_are_written_it_writes_them_and_begins_no_other_part(root, tmp_path, monkeypatch):
  workdir, arms, real = copy(root, tmp_path), dict(list(sweep().items())[:2]), population.finish

  def finish(*given):
    os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(population, 'finish', real)
    return real(*given)

  monkeypatch.setattr(population, 'finish', finish)
  monkeypatch.setattr(population, 'by_progress', lambda arms, workdir: [arms, {'never': None}])
  with pytest.raises(KeyboardInterrupt):
    population.run(arms, workdir)
  assert all((workdir / 'arms' / arm_id / 'DONE').exists() for arm_id in arms)


def test_split_where_memory_is_short(tmp_path, monkeypatch):
  """Into halves that are populations: of the arms of each order, then of the orders."""
  parts = []

  def run_part(part, workdir, code):
    parts.append(list(part))
    return dict.fromkeys(part, 0) if len(part) < 2 else None

  monkeypatch.setattr(population, 'run_part', run_part)
  arms = sweep()
  assert population.run(arms, tmp_path) == dict.fromkeys(arms, 0)
  assert [len(part) for part in parts] == [6, 2, 1, 1, 4, 2, 1, 1, 2, 1, 1]
  assert all(len(alike.groups({i: arms[i] for i in part})) == 1 for part in parts)


def test_no_state_exists_before_it_is_known_to_fit(root, tmp_path, monkeypatch):
  monkeypatch.setattr(population, 'memory_limit', lambda: 0)
  monkeypatch.setattr(population, 'restore', None)
  arms = dict(list(sweep().items())[:2])
  assert population.run_part(arms, root) is None


# -------------------------------------------------------------------------------------------------------- resuming


def interrupted(workdir, arms, monkeypatch):
  """A population that was asked to stop on its way."""
  with monkeypatch.context() as patch:
    original = population.evaluate.totals

    def totals(measure, params, batches, poll):
      if seen:
        signal.raise_signal(signal.SIGTERM)
      seen.append(1)
      return original(measure, params, batches, poll)

    seen: list[int] = []
    patch.setattr(population.evaluate, 'totals', totals)
    assert population.run(arms, workdir) == dict.fromkeys(arms, 42)
  for arm_id in arms:
    assert json.loads((workdir / 'arms' / arm_id / 'run.json').read_text())['status'] == 'preempted'
    assert saved(workdir / 'arms' / arm_id / 'checkpoints')[-1] == 25


def test_preempted_and_resumed(root, alone, tmp_path, monkeypatch):
  """By a population, and (one of its arms) alone; and a population goes on with what was begun alone."""
  workdir, arms = copy(root, tmp_path), sweep()
  interrupted(workdir, arms, monkeypatch)
  add, taken = Ledger.add, set()
  monkeypatch.setattr(Ledger, 'add', lambda self, step, measured: taken.add(step) or add(self, step, measured))
  assert train.run(arms['0.01-0'], workdir, '0.01-0') == 0
  left = {arm_id: config for arm_id, config in arms.items() if arm_id != '0.01-0'}
  for group in alike.groups(left):
    assert set(population.run({arm_id: left[arm_id] for arm_id in group}, workdir).values()) == {0}
  for arm_id in arms:
    np.testing.assert_allclose(losses(workdir, arm_id), alone[arm_id], rtol=0, atol=1e-5)
    steps = [line['step'] for line in metrics.read(workdir / 'arms' / arm_id / 'metrics.jsonl')]
    assert steps == sorted(steps)
    assert steps.count(30) == 1
  assert min(taken) == 26, 'none began anew'


def test_arms_that_are_not_equally_far_go_on_apart(tmp_path):
  """Where no step is common to all; one save more or less, as a kill in between leaves it, does not part them."""
  arms = {arm_id: config for arm_id, config in sweep().items() if config.data.seed == 0}
  for arm_id, steps in {'0.01-0': (20, 40), '0.003-0': (20,), '0.001-0': ()}.items():
    for step in steps:
      (tmp_path / 'arms' / arm_id / 'checkpoints' / str(step)).mkdir(parents=True)
  assert population.by_progress(dict(list(arms.items())[:2]), tmp_path) == [dict(list(arms.items())[:2])]
  assert [list(part) for part in population.by_progress(arms, tmp_path)] == [['0.01-0', '0.003-0'], ['0.001-0']]


# ----------------------------------------------------------------------------------------------------- the program


def distilling(layers: int = 3):
  """A student and a step that shares a teacher, with a mask refresh under a cond."""
  student, teacher = toy_model(width=8), toy_model(width=20, layers=layers)
  transform = chain(distill(teacher, 0.5, 1.0), prune(0.5, 2, 8, 2))
  optim = optimizer(OptimConfig(warmup=1), 10)
  step = make_step(student, optim, transform)
  states = [init_state(k, student.init(k), optim, transform) for k in jax.random.split(jax.random.PRNGKey(0), 4)]
  frozen = {'teacher': teacher.init(jax.random.PRNGKey(1))}
  return step, stack(states, 1), jax.tree.map(lambda x: x[None], toy_batch()), frozen


def test_the_teacher_runs_once_and_unbatched_and_the_cond_stays_one():
  step, state, batch, frozen = distilling()
  text = jax.jit(program.together(step, side_by_side=True)).lower(state, batch, frozen).as_text()
  products = [line for line in text.splitlines() if 'dot_general' in line and 'tensor<20x20xf32>' in line]
  assert len(products) == 3  # one for each of its layers
  assert all('x20xf32>' in line and 'tensor<1x4x' not in line for line in products)
  assert text.count('stablehlo.case') == 1


def test_the_loop_of_the_cpu_leaves_the_teacher_outside():
  step, state, batch, frozen = distilling()
  compiled = jax.jit(program.together(step, side_by_side=False)).lower(state, batch, frozen).compile().as_text()
  computations = compiled.split('\n\n')
  with_teacher = [c for c in computations if 'f32[20,20]' in c and ' dot(' in c]
  assert with_teacher
  loops = {name for c in computations for name in _called_by_loops(c)}
  inner = [c for c in with_teacher if c.lstrip().split(' ')[0].lstrip('%') in loops]
  assert not inner


def _called_by_loops(text: str):
  for line in text.splitlines():
    if ' while(' in line and 'body=' in line and 'trip_count":{"n":"4"' in line:
      yield line.split('body=')[1].split(',')[0].lstrip('%')


def test_a_vmapped_step_equals_a_looped_one():
  step, state, batch, frozen = distilling()
  both = [jax.jit(program.together(step, side))(state, batch, frozen) for side in (True, False)]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *both)
  assert both[0][0].step == 1
  assert both[0][1]['loss'].shape == (1, 4)
  assert jnp.unique(both[0][1]['total']).size == 4


def test_arms_that_train_one_after_another_share_one_executable(root, tmp_path):
  workdir = copy(root, tmp_path)
  names: list[str] = []
  jax.monitoring.register_event_listener(lambda name, **_: names.append(name))
  short = {'train.steps': 10, 'seed': 7}
  arms = {arm_id: override(config, short) for arm_id, config in list(sweep().items())[:2]}
  missed = []
  for arm_id, config in arms.items():
    jax.clear_caches()
    names.clear()
    assert train.run(config, workdir, arm_id) == 0
    missed.append(names.count('/jax/compilation_cache/cache_misses'))
  assert missed[1] == 0
  assert names.count('/jax/compilation_cache/cache_hits') > 0
