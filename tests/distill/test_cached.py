"""Learning from a cache: equal to learning from the teacher itself, and an error wherever the two could differ."""

import hashlib
import json
import shutil

import jax
import numpy as np
import pytest
import tiny
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from fakes import arms_of, experiment

from slm_jax import metrics, train
from slm_jax.ablate import cost, measure, population
from slm_jax.checkpoint import load_model
from slm_jax.config import ConfigError, check, override, semantic_hash
from slm_jax.data.packing import spread
from slm_jax.data.tokenizer import Bytes
from slm_jax.distill import capture
from slm_jax.distill.cached import LOOKED_AT, Cache, CachedDistill
from slm_jax.distill.logits import Distill
from slm_jax.distill.records import Layout
from slm_jax.files import read_json, write_json
from slm_jax.model import decoder

V = Bytes.vocab_size
EXACT = {'teacher': 'teacher', 'precision': 'float32'}


pytestmark = pytest.mark.usefixtures('one_fake_device')  # a population does not span devices


def base(*transforms, **changes):
  return override(tiny.config(20), {'transforms': transforms, 'eval.bytes': 500, 'eval.samples': 0, **changes})


@pytest.fixture(scope='module')
def workdir(tmp_path_factory, one_fake_device):
  """With a trained teacher, and one of another seed."""
  folder = tmp_path_factory.mktemp('cached')
  for arm, seed in (('teacher', 0), ('other', 1)):
    assert train.run(base(seed=seed, name=arm), folder, arm) == 0
  return folder


def lines(workdir, arm):
  return list(metrics.read(workdir / 'arms' / arm / 'metrics.jsonl'))


def joined_batch(workdir, config, step=0):
  return train.prepare(config, workdir, workdir).dataset.batch(step)


def cache_of(workdir, folder, layout, arm='teacher', **data):
  """A cache of tiny's data, or of others."""
  config, params, _ = load_model(workdir / 'arms' / arm / 'model')
  dataset = train.open_data(override(base(), data).data, workdir / 'data', print)
  return capture.build(folder, capture.Capture(dataset, decoder.build(config), params, layout), {}, print)


@pytest.fixture(scope='module')
def folder(workdir):
  cache_of(workdir, workdir / 'top8', Layout('top_k', 8, V, 'float16'))
  return workdir / 'top8'


def given(folder, **changes):
  return CachedDistill(cache=str(folder), **{'k': 8, **changes})


# ------------------------------------------------------------------------------------------------------- it is the same


@pytest.mark.parametrize('signal, k', [('dense', 1), ('top_k', V), ('top_k', 6)])
def test_training_with_the_cache_is_training_with_the_teacher(workdir, signal, k):
  """20 steps, to 1e-5; by the whole vocabulary at another temperature, too."""
  settings = {'signal': signal, 'k': k, 'weight': 0.7, 'temperature': 2.0}
  for arm, transform in (('online', Distill('teacher', **settings)), ('cached', CachedDistill(**EXACT, **settings))):
    shutil.rmtree(workdir / 'arms' / arm, ignore_errors=True)
    assert train.run(base(transform, seed=5), workdir, arm) == 0
  pairs = list(zip(lines(workdir, 'online'), lines(workdir, 'cached'), strict=True))
  assert len([1 for a, _ in pairs if a['kind'] == 'train']) == 20
  for a, b in pairs:
    assert b['loss'] == pytest.approx(a['loss'], abs=1e-5)
    if a['kind'] == 'train':
      assert b['cached_distill'] == pytest.approx(a['distill'], abs=1e-5)
      assert b['cached_distill_kl'] == pytest.approx(a['distill_kl'], abs=1e-5)
      assert a['distill'] > 1e-4


def test_the_books(workdir):
  """No step pays for the teacher; what the cache took counts with what went before."""
  assert train.run(base(CachedDistill(teacher='teacher', k=4)), workdir, 'books') == 0
  summaries = [json.loads((workdir / 'arms' / arm / 'run.json').read_text())['summary'] for arm in ('teacher', 'books')]
  assert summaries[1]['flops'] == summaries[0]['flops']
  (made,) = [m for path in workdir.glob('data/teacher-*') if (m := Cache(path).manifest)['key']['size'] == 4]
  assert summaries[1]['parent_flops'] == summaries[0]['flops'] + made['flops']


def test_order_and_text_are_those_of_any_other_arm(workdir, folder):
  for step in (0, 3):
    plain, joined = joined_batch(workdir, base(), step), joined_batch(workdir, base(given(folder)), step)
    assert joined.keys() - plain.keys() == {f'cached_distill_{name}' for name in ('ids', 'log_p', 'log_rest')}
    assert all((plain[name] == joined[name]).all() for name in plain)
    model, params = decoder.build(base().model), load_model(workdir / 'arms' / 'teacher' / 'model')[1]
    logits = model.head(params, model.hidden(params, plain))[..., :V]
    log_p = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), joined['cached_distill_ids'], -1)
    there = plain['mask'] > 0
    np.testing.assert_allclose(joined['cached_distill_log_p'][there], log_p[there], atol=6e-3)


def test_fewer_entries_than_the_cache_has(workdir, folder):
  wide, narrow = (joined_batch(workdir, base(given(folder, k=k))) for k in (8, 3))
  assert narrow['cached_distill_ids'].shape[-1] == 3
  there = wide['mask'] > 0
  rest = np.exp(wide['cached_distill_log_p'][..., 3:]).sum(-1) + np.exp(wide['cached_distill_log_rest'])
  np.testing.assert_allclose(np.exp(narrow['cached_distill_log_rest'])[there], rest[there], rtol=1e-5)


def test_a_population_is_its_arms(workdir):
  arms = {
    f'p{i}': base(CachedDistill(teacher='teacher', signal='sampled', weight=weight), **{'data.seed': seed})
    for i, (weight, seed) in enumerate([(0.2, 0), (0.9, 0), (0.2, 1), (0.9, 1)])
  }
  alone = {}
  for arm, config in arms.items():
    assert train.run(config, workdir, arm) == 0
    alone[arm] = [line['loss'] for line in lines(workdir, arm)]
    shutil.rmtree(workdir / 'arms' / arm)
  assert set(population.run(arms, workdir).values()) == {0}
  for arm in arms:
    assert [line['loss'] for line in lines(workdir, arm)] == pytest.approx(alone[arm], abs=2e-4)


def test_workers_share_what_was_made(workdir):
  config = base(CachedDistill(teacher='teacher', k=5))
  joined_batch(workdir, config)
  made = {path: path.stat().st_mtime_ns for path in workdir.glob('data/teacher-*/*')}
  joined_batch(workdir, override(config, {'data.seed': 3, 'transforms.cached_distill.weight': 0.1}))
  assert {path: path.stat().st_mtime_ns for path in workdir.glob('data/teacher-*/*') if path in made} == made
  assert len(list(workdir.glob('data/teacher-*/*'))) == len(made)


# ---------------------------------------------------------------------------------------------------- without the files


@pytest.mark.parametrize('signal', ['dense', 'top_k', 'sampled'])
def test_a_measurement_needs_no_cache_and_has_the_shapes_of_it(workdir, tmp_path, signal):
  config = base(CachedDistill(teacher='teacher', signal=signal, k=6))
  job = measure.stand_in(config, {}, tmp_path, allocate=False)
  mine = {name: (x.shape, x.dtype) for name, x in job.dataset.batch(0).items()}
  real = {name: (x.shape, x.dtype) for name, x in joined_batch(workdir, config).items()}
  if signal == 'sampled':  # the cache knows how many ids there really are
    for name in ('cached_distill_ids', 'cached_distill_weights'):
      assert mine.pop(name)[0][-1] >= real.pop(name)[0][-1]
  assert mine == real
  assert train.hardware_flops(job) > 0


def test_predicted_flops_leave_the_teacher_out():
  arms = arms_of(
    experiment(
      base=base(),
      sweep=[
        {'name': 'teacher'},
        {'name': 'online', 'transforms': (Distill('teacher'),)},
        {'name': 'cached', 'transforms': (CachedDistill(teacher='teacher'),)},
      ],
    )
  )
  by_id = {arm.arm_id: arm for arm in arms}
  flops = {arm.name: cost.model_flops(arm, by_id) for arm in arms}
  assert flops['cached'] == flops['teacher'] < flops['online']


# ------------------------------------------------------------------------------------------------------ what is refused


def refused(workdir, config, message):
  with pytest.raises(ConfigError, match=message) as error:
    train.prepare(config, workdir, workdir)
  assert '\n' not in str(error.value)


def test_a_cache_of_another_corpus(workdir, folder):
  other = base(given(folder), **{'data.sources': ('python_stdlib',), 'data.documents': 3})
  refused(workdir, other, r'train.array_record: record 0: not in the cache .*top8; that was made of stories: another')


def test_a_cache_of_other_sequences_another_tokenizer_or_teacher(workdir, folder):
  refused(workdir, base(given(folder), **{'data.seq_len': 32}), 'of sequences of 64 tokens, but data.seq_len=32')
  words = {'data.tokenizer': 'sentencepiece', 'data.vocab_size': 350}
  refused(workdir, base(given(folder), **words), r'top8.*: of tokenizer \w+, but data has \w+')
  refused(workdir, base(given(folder, teacher='other')), r'top8.*: of teacher \w+, but other is \w+')
  train.prepare(base(given(folder, teacher='teacher')), workdir, workdir)


def test_a_cache_of_something_else(workdir, folder):
  refused(workdir, base(given(folder, k=9)), 'holds k=8, but cached_distill.k=9')
  refused(workdir, base(given(folder, signal='sampled')), 'holds signal=top_k, but cached_distill.signal=sampled')
  refused(workdir, base(given(folder, precision='float32')), 'holds precision=float16')
  refused(workdir, base(given(folder, content='0123')), 'now holds .*; it was 0123 when this was launched')
  refused(workdir, base(given(workdir / 'nothing')), 'no cache there')
  refused(workdir, base(CachedDistill(teacher='teacher', k=300)), r'cached_distill.k=300: allowed: 1..259')
  refused(workdir, base(CachedDistill(teacher='nobody')), 'nobody')


@pytest.mark.parametrize(
  'transform, message',
  [
    (CachedDistill(), "teacher='': name the arm"),
    (CachedDistill(cache=''), "cache='': allowed: auto, or a folder"),
    (CachedDistill(teacher='t', k=1000), 'k=1000: larger than model.vocab_size=384'),
    (CachedDistill(teacher='t', divergence='jsd'), 'divergence=jsd: needs the whole distribution'),
    (CachedDistill(teacher='t', signal='dense', divergence='policy_gradient'), 'needs text that the student writes'),
  ],
)
def test_what_cannot_be_meant(transform, message):
  with pytest.raises(ConfigError, match=message):
    check(base(transform))


def test_the_identity_is_what_the_folder_holds_and_not_where_it_is(folder, tmp_path):
  moved = tmp_path / 'moved'
  shutil.copytree(folder, moved)
  one, two = (given(path).resolved('x') for path in (folder, moved))
  assert one.content == two.content == Cache(folder).manifest['identity']
  assert semantic_hash(base(one)) == semantic_hash(base(two)) != semantic_hash(base(given(folder)))
  with pytest.raises(ConfigError, match="config.transforms.cached_distill.cache='/none': no cache there"):
    arms_of(experiment(base=base(given('/none'))))
  (arm,) = arms_of(experiment(base=base(given(folder))))
  assert arm.config.transforms[0].content == one.content
  assert arm.diff == {}


# ------------------------------------------------------------------------------------------------------ what is damaged


def flip_a_token(path, at):
  """Writes a store anew with another token in one record, and signs for it."""
  manifest, _ = read_json(path / 'manifest.json')
  file = path / 'train.array_record'
  source = ArrayRecordDataSource(str(file))
  data = [bytearray(source[i]) for i in range(len(source))]
  data[at][10] ^= 1  # of the sixth token
  writer = ArrayRecordWriter(str(file), 'group_size:1')
  for record in data:
    writer.write(bytes(record))
  writer.close()
  with open(file, 'rb') as opened:
    digest = hashlib.file_digest(opened, 'sha256').hexdigest()
  manifest['files'][file.name] = {'size': file.stat().st_size, 'sha256': digest}
  write_json(path / 'manifest.json', manifest)


@pytest.mark.parametrize('at', [0, 7])
def test_one_flipped_token_is_an_error_that_names_the_record(workdir, folder, tmp_path, at):
  """Before anything is compiled if it is one of those that are looked at, else when it comes to be learnt from."""
  shutil.copytree(workdir / 'data', tmp_path / 'data')
  job = train.prepare(base(given(folder)), tmp_path, tmp_path)
  (store,) = job.dataset.stores
  n = len(store.train())
  assert spread(n, LOOKED_AT)[:2] == [0, n // LOOKED_AT] != [0, 7]
  flip_a_token(store.path, at)

  def learn():
    dataset = train.prepare(base(given(folder)), tmp_path, tmp_path).dataset
    assert at == 7
    for step in range(n // 8 + 1):
      dataset.batch(step)

  with pytest.raises(ConfigError) as error:
    learn()
  assert f'{store.path / "train.array_record"}: record {at}' in str(error.value)
  assert 'a token was changed' in str(error.value)


def test_a_flipped_byte_of_the_cache_is_never_read(workdir, folder, tmp_path):
  """Anywhere in its files: either all is read as it was (a byte of no meaning), or an error names the place."""
  dataset = train.prepare(base(), workdir, workdir).dataset
  sequences = [dataset.train[i] for i in range(len(dataset.stores[0].train()))]
  whole = list(map(Cache(folder).read, sequences))
  broken, named = tmp_path / 'broken', 0
  shutil.copytree(folder, broken)
  rng = np.random.default_rng(0)
  for path in [path for path in broken.glob('shard-*/*') if path.name != 'manifest.json']:
    data = path.read_bytes()
    for at in rng.integers(0, len(data), 12):
      path.write_bytes(data[:at] + bytes([data[at] ^ (1 << rng.integers(8))]) + data[at + 1 :])
      fault = ''
      try:
        again = list(map(Cache(broken).read, sequences))
      except ConfigError as error:
        fault = str(error)
      if fault:
        assert fault.startswith(str(broken))
        named += 'record ' in fault
        continue
      assert sum(told is None for told in again) <= (path.name == 'index')  # the join names what is lost
      assert all((w[n] == a[n]).all() for w, a in zip(whole, again, strict=True) if a for n in w)
    path.write_bytes(data)
  assert named > 6
