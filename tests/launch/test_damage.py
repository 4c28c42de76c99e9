"""Files of a workdir that are not as they were written: no command ends by them, or shows a number that was changed."""

import csv
import dataclasses
import io
import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from fakes import FakeTrain, experiment
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launch import cli, report, slurm, status
from launch.cloud import Result
from slm_jax import checkpoint, files, metrics, run_files
from slm_jax.ablate import cost, plots, results
from slm_jax.config import ConfigError
from slm_jax.data.tokenizer import Bytes
from slm_jax.distill import capture
from slm_jax.experiment import Config, EvalConfig
from slm_jax.files import CHECKSUM, read_json, write_json

SWEEP = [{'name': 'a'}, {'name': 'b', 'optim.learning_rate': 3e-3}, {'name': 'child', 'init.arm': 'a'}]
STEPS = 4


def config() -> Config:
  base, rarely = tiny.config(STEPS), EvalConfig(every=2, bytes=500, samples=1, sample_tokens=4)
  run = dataclasses.replace(base.run, checkpoint_every=2, keep=3)
  return dataclasses.replace(base, name='', transforms=(), eval=rarely, run=run)


def module():
  return experiment(sweep=SWEEP, base=config())


@pytest.fixture(scope='module')
def whole(tmp_path_factory, one_fake_device):
  """A workdir of two arms and a child of one of them, trained and reported."""
  path = tmp_path_factory.mktemp('whole') / 'runs'
  assert cli.launch(module(), [f'--workdir={path}']) == 0
  return path


@pytest.fixture
def workdir(whole, tmp_path):
  path = tmp_path / 'runs'
  shutil.copytree(whole, path)
  files.warn_once.cache_clear()
  return path


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  """What has nothing to do with files: pictures, and tracing for a dry run."""
  monkeypatch.setattr(plots, 'draw', lambda *args: [])
  monkeypatch.setattr(plots, 'save', lambda *args: [])
  monkeypatch.setattr(cost, '_hardware_flops', lambda *args: 0.0)


def arm(workdir: Path, name: str) -> Path:
  known = {json.loads(path.read_text())['name']: path.parent for path in workdir.glob('arms/*/config.json')}
  return known[name]


def commands(workdir: Path, other: Path, capsys) -> dict[str, tuple[int, str, str]]:
  """`{command: (exit code, what it wrote, what it wrote to stderr)}` of all that read a workdir."""
  argv = [f'--workdir={workdir}']
  every = {
    'status': lambda: status.main([str(workdir)]),
    'report': lambda: report.main([str(workdir)]),
    'compare': lambda: report.main([str(other), str(workdir)]),
    'dry_run': lambda: cli.main(module(), [*argv, '--dry_run']),
    'launch': lambda: cli.main(module(), argv, train=FakeTrain()),
  }
  found = {}
  for name, command in every.items():
    capsys.readouterr()
    try:
      code = command()
    except SystemExit as ended:
      code = ended.code
    out, err = capsys.readouterr()
    found[name] = code, out, err
  return found


def losses(workdir: Path) -> dict[str, str]:
  rows = csv.DictReader(io.StringIO((workdir / 'results.csv').read_text()))
  return {row['arm_id']: row['loss'] for row in rows}


# --------------------------------------------------------------------------------------------------- any damage


JSON = ['run.json', 'config.json', 'lost.json', 'samples.json', 'model/model.json', 'metrics.jsonl', 'experiment.json']
OTHERS = [None, 0, -1, 2.5, 1e308, 'x', '', [], {}, True, [[1]], {'a': None}, 2**70, '../x', '\ud800']


def mutated(text: str, rng: random.Random) -> bytes:
  """The text with one value of its JSON replaced or a key deleted, one bit flipped, or its end cut off."""
  how = rng.choice(['value', 'value', 'key', 'bit', 'bit', 'cut'])
  raw = bytearray(text.encode())
  if how == 'bit':
    raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    return bytes(raw)
  if how == 'cut':
    return bytes(raw[: rng.randrange(len(raw))])
  lines = text.splitlines() if text.startswith('{"') else [text]
  place = rng.randrange(len(lines))
  value = json.loads(lines[place])
  node, trail = value, []
  while isinstance(node, (dict, list)) and node and (not trail or rng.random() < 0.7):
    trail.append((node, rng.choice(list(node) if isinstance(node, dict) else range(len(node)))))
    node = node[trail[-1][1]]
  holder, key = trail[-1]
  if how == 'key':
    del holder[key]
  else:
    holder[key] = rng.choice(OTHERS)
  lines[place] = json.dumps(value)
  return '\n'.join([*lines, '']).encode()


def without_checksums(workdir: Path) -> None:
  """The files as an earlier version wrote them."""
  for path in [*workdir.rglob('*.json'), *workdir.rglob('*.jsonl')]:
    lines = path.read_text().splitlines() if path.suffix == '.jsonl' else [path.read_text()]
    values = [json.loads(line) for line in lines]
    for value in values:
      if isinstance(value, dict):
        value.pop(CHECKSUM, None)
    path.write_text('\n'.join([*map(json.dumps, values), '']))


@pytest.mark.parametrize('checked', [True, False])
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_damage_ends_a_command_or_changes_a_number(whole, tmp_path_factory, capsys, caplog, checked, data):
  workdir = tmp_path_factory.mktemp('damaged') / 'runs'
  shutil.copytree(whole, workdir, ignore=shutil.ignore_patterns('cache', 'checkpoints', 'data', 'params', 'plots'))
  files.warn_once.cache_clear()
  caplog.clear()
  if not checked:
    without_checksums(workdir)
  name = data.draw(st.sampled_from(JSON))
  path = workdir / name if name == 'experiment.json' else arm(workdir, 'b') / name
  before, seed = path.read_text(), data.draw(st.integers(0, 2**32))
  path.write_bytes(mutated(before, random.Random(seed)))
  value, fault = read_json(path) if name.endswith('.json') else (None, '')

  found = commands(workdir, whole, capsys)

  for command, (code, _, err) in found.items():
    assert code in (0, 1), (command, err)
    if code == 1:
      assert err.splitlines()[-1].startswith('error: ')
      assert 'Traceback' not in err
  newer = 'written by a newer version' in found['status'][2]
  assert newer or all(arm(whole, n).name in found['status'][1] for n in ('a', 'b', 'child'))
  if checked and not newer:
    truth, now = losses(whole), losses(workdir)
    assert {arm_id for arm_id in truth if now[arm_id] not in (truth[arm_id], '')} == set()
    assert all(now[arm(whole, n).name] == truth[arm(whole, n).name] for n in ('a', 'child'))
    if fault and name in ('run.json', 'config.json', 'experiment.json'):  # named by whoever shows the arms
      told = ''.join(found[command][1] + found[command][2] for command in ('status', 'report')) + caplog.text
      assert name in told, (fault, value)


def leaves(value, trail=()):
  """The places of all values in JSON, inner ones too."""
  yield trail
  children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
  for key, child in children:
    yield from leaves(child, (*trail, key))


DELETED = object()


def changed(value, trail, new):
  copy = json.loads(json.dumps(value))
  holder = copy
  for key in trail[:-1]:
    holder = holder[key]
  if new is DELETED:
    del holder[trail[-1]]
  else:
    holder[trail[-1]] = new
  return copy


@pytest.mark.parametrize('name', ['run.json', 'config.json', 'experiment.json', 'lost.json', 'samples.json'])
def test_no_value_of_a_wrong_type_ends_a_table(whole, workdir, name):
  """Each value of a file of before there were checksums, in turn: whatever it is, the other arms are shown."""
  without_checksums(workdir)
  path = workdir / name if name == 'experiment.json' else arm(workdir, 'b') / name
  value, others = json.loads(path.read_text()), {arm(whole, n).name for n in ('a', 'child')}
  places = [trail for trail in leaves(value) if trail]
  if name == 'run.json':  # the hash of each module is one like another
    places = [trail for trail in places if len(trail) == 1 or trail[0] != 'source' or trail[1] == 'step']
  if name == 'config.json':  # so is a setting
    places = [trail for trail in places if len(trail) == 1 or trail[0] in ('data', 'train', 'init')]
  for trail in places:
    for new in (None, -1, 'x', [], {}, DELETED) if trail == ('format',) else (None, -1, 'x', [], {}, 2**70, DELETED):
      path.write_text(json.dumps(changed(value, trail, new)))
      assert {row.arm_id for row in results.read(workdir) if row.summary} >= others, (trail, new)
      assert report.report.publish(workdir)
      found = status.read(workdir)
      assert others <= {one.arm_id for one in found if one.state == 'done'}
      assert status.show(found, 20)


@pytest.mark.parametrize('name', ['run.json', 'lost.json', 'model/model.json', 'checkpoints/4/record/metadata'])
def test_no_flipped_bit_of_a_record_is_taken_for_what_was_written(whole, name):
  raw = (arm(whole, 'b') / name).read_bytes()
  written, _ = files.parse_json(raw.decode())
  found = set()
  for bit in range(8 * len(raw)):
    flipped = bytearray(raw)
    flipped[bit // 8] ^= 1 << bit % 8
    try:
      value, fault = files.parse_json(flipped.decode())
    except UnicodeDecodeError:
      continue
    if value == written and not fault:  # another white space
      continue
    unsealed = value and {k: v for k, v in value.items() if k in written} == written  # only the checksum's name
    assert value is None or unsealed
    found.add('renamed' if unsealed else 'found')
  assert found == {'found', 'renamed'}


# ---------------------------------------------------------------------------------------------------- one by one


def flip(path: Path, there: str, here: str) -> None:
  """One bit of a file."""
  text = path.read_text()
  assert text.count(there) >= 1
  assert sum(bin(a ^ b).count('1') for a, b in zip(there.encode(), here.encode(), strict=True)) == 1
  path.write_text(text.replace(there, here, 1))


def test_a_key_that_a_bit_changed_does_not_end_an_arm(workdir, capsys, one_fake_device):
  """It was a KeyError at every resume and report."""
  folder = arm(workdir, 'b')
  flip(folder / 'metrics.jsonl', '"kind": "eval"', '"kine": "eval"')
  (folder / 'DONE').unlink()
  before = json.loads((folder / 'run.json').read_text())['summary']
  assert cli.launch(module(), [f'--workdir={workdir}']) == 0
  assert json.loads((folder / 'run.json').read_text())['summary']['loss'] == before['loss']
  steps = [line['step'] for line in metrics.read(folder / 'metrics.jsonl') if line['kind'] == 'eval']
  assert steps == [2, 4]
  capsys.readouterr()
  assert report.main([str(workdir)]) == 0


def test_a_number_that_a_bit_changed_is_in_no_table_and_how_to_mend_it_is_said(workdir, capsys, one_fake_device):
  folder = arm(workdir, 'b')
  summary = json.loads((folder / 'run.json').read_text())['summary']
  loss = str(summary['loss'])
  flip(folder / 'run.json', f'"loss": {loss}', f'"loss": {int(loss[0]) ^ 1}{loss[1:]}')
  assert run_files.read_run(folder)[1] == 'its checksum is wrong, so some of it was changed'
  assert status.main([str(workdir)]) == 0
  out = capsys.readouterr().out
  assert '1 damaged, 2 done' in out
  assert f'{folder / "run.json"}: its checksum is wrong' in out
  assert f'remove {folder}/DONE and launch again: its last checkpoint is evaluated again' in out
  assert cli.launch(module(), [f'--workdir={workdir}']) == 0  # there is nothing to run, and the damage is told
  assert f'damaged, and left out: b: {folder / "run.json"}' in capsys.readouterr().out
  assert losses(workdir)[folder.name] in ('', loss)

  (folder / 'DONE').unlink()
  assert cli.launch(module(), [f'--workdir={workdir}']) == 0
  mended = json.loads((folder / 'run.json').read_text())['summary']
  assert {k: mended[k] for k in ('loss', 'tokens', 'flops')} == {k: summary[k] for k in ('loss', 'tokens', 'flops')}
  assert losses(workdir)[folder.name] == loss


def test_what_builds_on_a_damaged_record_says_so_in_one_line(workdir, capsys, one_fake_device):
  """A parent without its FLOPs was a KeyError."""
  parent, child = arm(workdir, 'a'), arm(workdir, 'child')
  values = json.loads((parent / 'run.json').read_text())
  del values['summary']['flops'], values[CHECKSUM]
  write_json(parent / 'run.json', values)
  (child / 'DONE').unlink()
  assert cli.launch(module(), [f'--workdir={workdir}']) == 1
  error = json.loads((child / 'run.json').read_text())['error']
  assert error == f'{parent / "run.json"}: damaged (summary.flops is missing); {run_files.mend(parent)}'


def test_a_damaged_config_is_written_anew_by_the_next_launch(workdir, capsys):
  folder = arm(workdir, 'b')
  before = (folder / 'config.json').read_text()
  flip(folder / 'config.json', '"learning_rate": 0.003', '"learning_rate": 0.001'[:-1] + '2')
  assert next(row for row in results.read(workdir) if row.arm_id == folder.name).status == 'damaged'
  assert cli.launch(module(), [f'--workdir={workdir}']) == 0
  assert (folder / 'config.json').read_text() == before
  assert {row.status for row in results.read(workdir)} == {'done'}


def test_a_damaged_experiment_json_hides_no_arm_and_stops_a_launch(workdir, capsys):
  (workdir / 'experiment.json').write_text('{"format": 1, "arms": 3}')
  assert [row.status for row in results.read(workdir)] == ['done'] * 3
  assert report.main([str(workdir)]) == 0
  out = capsys.readouterr().out
  assert all(f'\n{name} ' in out for name in ('a', 'b', 'child'))
  with pytest.raises(ConfigError, match=r'experiment.json: damaged \(.*; move it away and launch again') as error:
    cli.launch(module(), [f'--workdir={workdir}'])
  assert '\n' not in str(error.value)
  (workdir / 'experiment.json').unlink()
  assert cli.launch(module(), [f'--workdir={workdir}']) == 0
  assert [row.status for row in results.read(workdir)] == ['done'] * 3


@pytest.mark.parametrize('name', [*JSON, 'model'])
def test_a_file_that_is_gone_hides_no_arm(whole, workdir, capsys, name):
  path = workdir / name if name == 'experiment.json' else arm(workdir, 'b') / name
  shutil.rmtree(path) if path.is_dir() else path.unlink()
  found = commands(workdir, whole, capsys)
  assert [code for code, _, _ in found.values()] == [0] * 5
  states = {one.name: one.state for one in status.read(workdir)}
  gone = name == 'run.json'  # config.json was written anew by the launch
  assert states == {'a': 'done', 'b': 'damaged' if gone else 'done', 'child': 'done'}
  assert ('1 damaged' in found['status'][1]) == (name in ('run.json', 'config.json'))


def test_the_record_of_a_job_that_is_damaged_is_told(tmp_path, caplog):
  plan = SimpleNamespace(workdir=tmp_path)
  record = {'arms': [['a1'], ['b2', 'b3']], 'workdir': str(tmp_path.resolve()), 'job': '7'}

  def queued(**changes):
    files.warn_once.cache_clear()
    caplog.clear()
    write_json(tmp_path / 'slurm' / 'tiny-1.json', {**record, **changes})
    return slurm.queued(plan, lambda argv: Result(0, '7_1 tiny-1\n8_0 tiny-2\n9_[0-3] tiny-1\n10 other\n'))

  assert queued() == {'b2': '7_1', 'b3': '7_1'}
  assert caplog.text == ''
  for changes in ({'arms': 3}, {'arms': [['a1']]}, {'arms': [3, 4]}, {'workdir': None}):
    assert queued(**changes) == {}
    assert f'{tmp_path}/slurm/tiny-1.json: damaged' in caplog.text
  assert queued(workdir='/elsewhere') == {}
  assert caplog.text == ''


# ------------------------------------------------------------------------------------------- formats, models, stores


def reseal(path: Path, **changes) -> None:
  values, _ = read_json(path)
  write_json(path, {**values, **changes})


def test_a_model_of_a_newer_version_is_refused(workdir, capsys, one_fake_device):
  folder = arm(workdir, 'a') / 'model'
  reseal(folder / 'model.json', format=99)
  words = r'model.json: format 99, written by a newer version \(this one knows 1\)'
  with pytest.raises(ConfigError, match=words):
    checkpoint.load_model(folder)
  with pytest.raises(ConfigError, match=words):
    checkpoint.load_tokenizer(folder, Bytes())
  from slm_jax.prune import command

  assert command.main([f'--model={folder}', '--share=0.5']) == 1
  assert 'format 99' in capsys.readouterr().err
  (arm(workdir, 'child') / 'DONE').unlink()
  shutil.rmtree(arm(workdir, 'child') / 'checkpoints')
  assert cli.launch(module(), [f'--workdir={workdir}']) == 1
  assert 'format 99' in run_files.read_run(arm(workdir, 'child'))[0]['error']


@pytest.mark.parametrize(
  'change, words',
  [
    ({'format': 'x'}, "format is 'x', expected an integer"),
    ({'model': []}, 'model is a list, expected an object'),
    ({'model': {'d_model': 'wide'}}, "model.d_model='wide': expected int"),
    ({'model': {'d_model': 10**12}}, r'model.d_model=1000000000000: must lie in \[1, 2\^31\)'),
    ({'model': {'wings': 2}}, 'unknown keys wings'),
    ({'checksum': 0}, 'its checksum is wrong'),
  ],
)
def test_a_damaged_model_is_one_line(workdir, change, words):
  folder = arm(workdir, 'a') / 'model'
  reseal(folder / 'model.json', **change)
  with pytest.raises(ConfigError, match=words) as error:
    checkpoint.load_model(folder)
  assert '\n' not in str(error.value)


def test_a_setting_of_a_model_that_a_bit_changed_is_found(workdir):
  """Its parameters are as they were, and so is their checksum."""
  folder = arm(workdir, 'a') / 'model'
  flip(folder / 'model.json', '"rope_theta": 10000', '"rope_theta": 10001')
  with pytest.raises(ConfigError, match='damaged model .model.json: its checksum is wrong, so some of it was changed'):
    checkpoint.load_model(folder)


def record_of(folder: Path, step: int) -> Path:
  return folder / 'checkpoints' / str(step) / 'record' / 'metadata'


def test_a_checkpoint_of_a_newer_version_is_refused_and_stays(workdir, capsys, one_fake_device):
  folder = arm(workdir, 'b')
  path = record_of(folder, STEPS)
  values = {k: v for k, v in json.loads(path.read_text()).items() if k != CHECKSUM}
  path.write_text(json.dumps(files.sealed({**values, 'format': 99})))
  (folder / 'DONE').unlink()
  assert cli.launch(module(), [f'--workdir={workdir}']) == 1
  assert 'format 99, written by a newer version' in run_files.read_run(folder)[0]['error']
  assert path.exists()


@pytest.mark.parametrize('change', ['"tokens": 1', '"checksum": 1'])
def test_a_checkpoint_whose_record_was_changed_is_set_aside_and_the_one_before_is_used(
  workdir, caplog, one_fake_device, change
):
  """Its tokens and seconds go into tables."""
  folder = arm(workdir, 'b')
  path, before = record_of(folder, STEPS), run_files.read_run(folder)[0]['summary']
  values = json.loads(path.read_text())
  name = change.split('"')[1]
  path.write_text(json.dumps({**values, name: values[name] + 1}))
  (folder / 'DONE').unlink()
  assert cli.launch(module(), [f'--workdir={workdir}']) == 0
  assert f'checkpoint {path.parents[1]} is damaged (its checksum is wrong' in caplog.text
  after = run_files.read_run(folder)[0]['summary']
  assert {k: after[k] for k in ('loss', 'tokens', 'flops')} == {k: before[k] for k in ('loss', 'tokens', 'flops')}


@pytest.mark.parametrize('checked', [True, False])
def test_a_store_whose_manifest_was_changed_is_built_again(workdir, one_fake_device, checked):
  (path,) = workdir.glob('data/tokens-*/manifest.json')
  before = path.read_text()
  values = json.loads(before)
  values['splits']['train']['predicted'] = values['splits']['train']['predicted'] + 1 if checked else 'many'
  path.write_text(json.dumps(values if checked else {k: v for k, v in values.items() if k != CHECKSUM}))
  (arm(workdir, 'b') / 'DONE').unlink()
  assert cli.launch(module(), [f'--workdir={workdir}']) == 0
  after = json.loads(path.read_text())
  assert 'checksum' in after.pop('rebuilt') if checked else "'many'" in after.pop('rebuilt')
  assert {**after, CHECKSUM: ''} == {**json.loads(before), CHECKSUM: ''}


def test_a_teachers_cache_whose_manifest_was_changed_is_refused(tmp_path):
  """Its FLOPs go into the books of the arms that learn from it."""
  key = {'format': capture.FORMAT, 'method': 'top_k'}
  manifest = {'key': key, 'identity': capture.identity(key), 'shards': [{'name': 's', 'records': 1}], 'flops': 2e9}
  path = tmp_path / 'manifest.json'
  write_json(path, manifest)
  assert capture.read_manifest(tmp_path, 'cache') == manifest
  flip(path, '"flops": 2000000000.0', '"flops": 3000000000.0')
  with pytest.raises(ConfigError, match=r'manifest.json: cannot be read \(its checksum is wrong'):
    capture.read_manifest(tmp_path, 'cache')
  for changes, words in (
    ({'flops': 'x'}, "flops is 'x', expected a number"),
    ({'shards': 3}, 'shards is 3, expected a list'),
    ({'key': None}, 'key is null, expected an object'),
    ({'key': {'format': 99}}, 'format 99, this version knows 1; make the cache again'),
    ({'identity': 'x'}, 'it was changed'),
  ):
    path.write_text(json.dumps({**manifest, **changes}))
    with pytest.raises(ConfigError, match=words):
      capture.read_manifest(tmp_path, 'cache')


def test_a_measured_pace_that_is_no_pace_is_measured_again(workdir):
  from slm_jax.ablate import measure

  pace = dict.fromkeys(measure.Pace._fields, 1)
  good = {'k1': pace, 'k2': {**pace, 'step': 'x'}, 'k3': {**pace, 'more': 1}, 'k4': 3}
  write_json(workdir / 'cache' / 'measured.json', {measure.machine(): good})
  assert measure.known(workdir) == {'k1': measure.Pace(*[1] * len(pace))}
  for text in ('[]', '{"x": 3}', '{', json.dumps({measure.machine(): 3})):
    (workdir / 'cache' / 'measured.json').write_text(text)
    assert measure.known(workdir) == {}
