"""A setting that somebody set and that changes nothing is refused, unless another arm reads it."""

import dataclasses
from typing import Any

import pytest
from fakes import arms_of, experiment

from slm_jax.ablate import unused
from slm_jax.conditions import conditional
from slm_jax.config import ConfigError, flatten, override
from slm_jax.data.config import DataConfig
from slm_jax.distill.cached import CachedDistill
from slm_jax.distill.crossed import CrossDistill
from slm_jax.distill.logits import Distill, SelfDistill
from slm_jax.distill.on_policy import OnPolicy
from slm_jax.distill.sequence import SequenceDistill
from slm_jax.ema import Ema
from slm_jax.experiment import Config
from slm_jax.model.presets import _PRESETS
from slm_jax.optim import OptimConfig
from slm_jax.step import TransformConfig

TEACHER = {'name': 'teacher'}


def taught(transform: TransformConfig, **more: Any) -> list[dict[str, Any]]:
  return [TEACHER, {'name': 'student', 'transforms': (transform,), **more}]


SETTINGS = {  # {what is refused: the arms of a sweep}
  "data.content='x': is computed of what the sources hold": [{'data.content': 'x'}],
  'optim.decay=0.5: has no effect without schedule=wsd; allowed: 0.2': [{'optim.decay': 0.5}],
  'optim.final=0.5: has no effect without a schedule that falls': [{'optim.final': 0.5, 'optim.schedule': 'constant'}],
  'optim.b1=0.5: has no effect without name=adamw or muon': [{'optim.b1': 0.5, 'optim.name': 'adafactor'}],
  'optim.b2=0.5: has no effect': [{'optim.b2': 0.5, 'optim.name': 'adafactor'}],
  'optim.eps=0.5: has no effect': [{'optim.eps': 0.5, 'optim.name': 'adafactor'}],
  'data.vocab_size=300: has no effect without a tokenizer that is trained here': [{'data.vocab_size': 300}],
  r'data.weights=\(1.0,\): has no effect without a second source': [{'data.weights': (1.0,)}],
  'data.valid_fraction=0.2: has no effect': [{'data.valid_fraction': 0.2, 'data.valid_sources': ('addition',)}],
  "data.text_field='body': has no effect without a source of records": [{'data.text_field': 'body'}],
  "init.by='gates': has no effect without init.arm; allowed: 'magnitude'": [{'init.by': 'gates'}],
  r'init.layers=\(0,\): has no effect without init.arm': [{'init.layers': (0,)}],
  'init.sequences=3: has no effect without init.arm': [{'init.sequences': 3}],
  'init.sparse.sparsity=0.1: has no effect without a criterion': [{'init.sparse.sparsity': 0.1}],
  'model.rope_theta=3.0: has no effect without positions=rope': [
    {'model.rope_theta': 3.0, 'model.positions': 'learned'}
  ],
  'model.rope_local_theta=3.0: has no effect without positions=rope and a window': [{'model.rope_local_theta': 3.0}],
  'model.global_every=3: has no effect without a window': [{'model.global_every': 3}],
  'model.qk_norm_eps=0.1: has no effect without qk_norm': [{'model.qk_norm_eps': 0.1}],
  'transforms.distill.mix=0.1: has no effect without divergence=jsd, normalized_jsd': taught(
    Distill('teacher', mix=0.1)
  ),
  'transforms.distill.k=3: has no effect without signal=top_k': taught(Distill('teacher', k=3)),
  "transforms.distill.tail='none': has no effect": taught(Distill('teacher', tail='none')),
  'transforms.distill.draws=3: has no effect without signal=sampled': taught(Distill('teacher', draws=3)),
  "transforms.distill.average='logits': has no effect without co_teachers": taught(
    Distill('teacher', average='logits')
  ),
  'transforms.self_distill.mix=0.1: has no effect': [{'transforms': (SelfDistill(mix=0.1),)}],
  'transforms.cached_distill.draws=3: has no effect': taught(CachedDistill('teacher', draws=3)),
  'transforms.cross_distill.temperature=2.0: has no effect without divergence=alm': taught(
    CrossDistill('teacher', divergence='uld', temperature=2.0)
  ),
  'transforms.sequence_distill.top_p=0.5: has no effect without a temperature above 0': taught(
    SequenceDistill('teacher', temperature=0.0, top_p=0.5, documents=1)
  ),
  'transforms.on_policy.replay=0.1: has no effect without a buffer': taught(
    OnPolicy(replay=0.1, max_new=4, cold_start=True),
    **{
      'transforms': (OnPolicy(replay=0.1, max_new=4, cold_start=True), Distill('teacher')),
      'data.packing': 'single',
      'data.prompt_end': '=',
    },
  ),
}


@pytest.mark.parametrize('message', SETTINGS)
def test_a_setting_without_effect_is_refused(message):
  with pytest.raises(ConfigError, match=message):
    arms_of(experiment(sweep=SETTINGS[message]))


def test_what_the_command_line_sets_for_nothing_is_refused():
  with pytest.raises(ConfigError, match="config.init.by='random': has no effect without init.arm"):
    arms_of(experiment(), **{'init.by': 'random'})
  with pytest.raises(ConfigError, match="config.data.content='x': is computed"):
    arms_of(experiment(), **{'data.content': 'x'})


def test_a_setting_of_the_base_that_another_arm_reads_is_a_remark():
  module = experiment(sweep=[{'name': 'dense'}, {'name': 'cut', 'init.arm': 'dense', 'model.n_layers': 1}])
  arms = arms_of(module, **{'init.by': 'random'})
  assert unused.remarks(arms) == ["init.by='random' has no effect in 1 of 2 arms, without init.arm"]
  with pytest.raises(ConfigError, match="init.layers=.* no effect without init.arm; allowed: .* .in the arm 'dense'"):
    arms_of(experiment(sweep=[{'name': 'dense', 'init.layers': (0,)}, {'name': 'cut', 'init.arm': 'dense'}]))


def test_what_the_file_uses_and_the_command_line_switches_off_is_a_remark():
  base = Config(optim=OptimConfig(b2=0.99))
  arms = arms_of(experiment(base=base), **{'optim.name': 'adafactor'})
  assert unused.remarks(arms) == ['optim.b2=0.99 has no effect in 1 of 1 arms, without name=adamw or muon']
  with pytest.raises(ConfigError, match=r'optim.b2=0.9: has no effect'):  # another value was asked for
    arms_of(experiment(base=base), **{'optim.name': 'adafactor', 'optim.b2': 0.9})


def test_of_a_product_the_arms_without_effect_are_refused():
  arms = [{'optim.schedule': schedule, 'optim.decay': 0.4} for schedule in ('wsd', 'cosine')]
  with pytest.raises(ConfigError, match='optim.decay=0.4: has no effect without schedule=wsd'):
    arms_of(experiment(sweep=arms))
  assert len(arms_of(experiment(sweep=arms[:1]))) == 1


def test_trials_of_a_search_may_draw_what_they_do_not_read():
  from slm_jax.ablate.arms import expand

  trial = {'name': 'trial 0', 'optim.name': 'adafactor', 'optim.b1': 0.5}
  found = expand(experiment(), trials=[trial], fingerprint=lambda data: 'x')
  assert [arm.name for arm in found] == ['trial 0']


@pytest.mark.parametrize('name', _PRESETS)
def test_presets_set_nothing_that_they_do_not_read(name):
  assert all(setting.counts for setting in conditional(_PRESETS[name]))


SECTIONS = (Config(), CachedDistill(), CrossDistill(), Distill(), OnPolicy(), SelfDistill(), SequenceDistill(), Ema())


@pytest.mark.parametrize('section', SECTIONS, ids=lambda section: type(section).__name__)
def test_the_tables_name_settings_that_exist_and_defaults_are_never_refused(section):
  assert list(conditional(section)) == []
  for part in (section, *(v for v in vars(section).values() if dataclasses.is_dataclass(v))):
    assert getattr(part, 'needs', {}).keys() <= {field.name for field in dataclasses.fields(part)}


def test_a_conditional_setting_has_the_key_that_it_is_set_by():
  config = Config(
    optim=OptimConfig(decay=0.5), data=DataConfig(vocab_size=3), transforms=(Distill('teacher', k=3), Ema())
  )
  settings = list(conditional(config))
  assert {setting.key for setting in settings} <= flatten(config).keys()
  undone = override(config, {setting.key: setting.default for setting in settings})
  assert list(conditional(undone)) == []
