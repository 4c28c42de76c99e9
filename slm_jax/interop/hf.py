"""From Hugging Face: a transformers config and an in-memory state dict become a ModelConfig and parameters.

    config = config_from_hf(hf_model.config)          # or the dict of a config.json
    params = params_from_hf(hf_model.state_dict(), config)

Families by `model_type`: llama (SmolLM2), qwen3, gemma3_text, gpt2. Neither torch nor transformers is imported. What
this decoder cannot express is refused by name, never approximated.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from slm_jax import config as configs
from slm_jax.config import ConfigError, require
from slm_jax.model.api import Params
from slm_jax.model.config import ModelConfig
from slm_jax.model.decoder import shapes

# ---------------------------------------------------------------------------------------------------------- config


def config_from_hf(hf: Any) -> ModelConfig:
  """ModelConfig of a transformers config, given as an object or as a dict (config.json of version 4 or 5).

  ConfigError if the family is not one of the four, a needed key is missing, or a setting cannot be expressed.
  """
  hf = _Settings(hf if isinstance(hf, Mapping) else hf.to_dict())
  families = {'llama': _llama, 'qwen3': _qwen3, 'gemma3_text': _gemma3, 'gpt2': _gpt2}
  family = hf.get('model_type')
  require(family in families, f'model_type={family!r}: allowed: {", ".join(families)}')
  config = families[family](hf)
  configs.check(config, family)
  return config


class _Settings(dict):
  """A config.json that says which key is missing, and refuses values that cannot be expressed."""

  def __missing__(self, key: str) -> Any:
    raise ConfigError(f'{self.get("model_type")} config: key {key!r} is missing')

  def within(self, part: Mapping[str, Any]) -> '_Settings':
    """A part of it that is a mapping, which says so too."""
    return _Settings({**part, 'model_type': self['model_type']})

  def only(self, key: str, *allowed: Any) -> None:
    """The first allowed value is the default."""
    value = self.get(key, allowed[0])
    require(value in allowed, f'{self["model_type"]} config: {key}={value!r} is not supported; allowed: {allowed[0]!r}')


def _llama(hf: _Settings) -> ModelConfig:
  hf.only('hidden_act', 'silu', 'swish')
  bias = bool(hf.get('attention_bias', False))
  require(
    bias == bool(hf.get('mlp_bias', False)),
    f'{hf["model_type"]} config: attention_bias={bias}, mlp_bias={not bias} is not supported; allowed: both or neither',
  )
  rope = hf.get('rope_parameters') or {'rope_theta': hf.get('rope_theta', 10_000.0), **(hf.get('rope_scaling') or {})}
  theta, scaling = _rope(hf, rope)
  heads = hf['num_attention_heads']
  return ModelConfig(
    vocab_size=hf['vocab_size'],
    d_model=hf['hidden_size'],
    n_layers=hf['num_hidden_layers'],
    n_heads=heads,
    n_kv_heads=hf.get('num_key_value_heads') or heads,
    head_dim=hf.get('head_dim') or hf['hidden_size'] // heads,
    d_ff=hf['intermediate_size'],
    max_len=hf['max_position_embeddings'],
    norm_eps=hf['rms_norm_eps'],
    bias=bias,
    rope_theta=theta,
    rope_scaling=scaling,
    tied=hf.get('tie_word_embeddings', False),
    init_std=hf.get('initializer_range', 0.02),
  )


def _qwen3(hf: _Settings) -> ModelConfig:
  hf.only('attention_bias', False)
  hf.only('use_sliding_window', False)
  return configs.override(_llama(_Settings(hf | {'head_dim': hf.get('head_dim', 128)})), {'qk_norm': True})


def _gemma3(hf: _Settings) -> ModelConfig:
  hf.only('hidden_activation', 'gelu_pytorch_tanh')
  hf.only('attention_bias', False)
  hf.only('attn_logit_softcapping', None)
  hf.only('use_bidirectional_attention', False, None)
  both = hf.within(
    hf.get('rope_parameters')
    or {
      'full_attention': {'rope_theta': hf.get('rope_theta', 1_000_000.0), **(hf.get('rope_scaling') or {})},
      'sliding_attention': {'rope_theta': hf.get('rope_local_base_freq', 10_000.0)},
    }
  )
  local_theta, local_scaling = _rope(hf, both['sliding_attention'])
  require(not local_scaling, 'gemma3_text config: rope scaling of sliding_attention is not supported; allowed: none')
  window, every = _pattern(hf)
  common = {'rope_parameters': both['full_attention'], 'head_dim': hf.get('head_dim', 256)}
  changes = {
    'norm_offset': 1.0,
    'post_norms': True,
    'qk_norm': True,
    'mlp': 'geglu',
    'rope_local_theta': local_theta,
    'window': window,
    'global_every': every,
    'attn_scale': (hf.get('query_pre_attn_scalar') or 256) ** -0.5,
    'embed_scale': hf['hidden_size'] ** 0.5,
    'softcap': hf.get('final_logit_softcapping') or 0.0,
    'tied': hf.get('tie_word_embeddings', True),
  }
  return configs.override(_llama(_Settings(hf | common)), changes)


def _gpt2(hf: _Settings) -> ModelConfig:
  hf.only('activation_function', 'gelu_new', 'gelu_pytorch_tanh')
  hf.only('scale_attn_by_inverse_layer_idx', False)
  hf.only('add_cross_attention', False)
  heads = hf['n_head']
  return ModelConfig(
    vocab_size=hf['vocab_size'],
    d_model=hf['n_embd'],
    n_layers=hf['n_layer'],
    n_heads=heads,
    n_kv_heads=heads,
    head_dim=hf['n_embd'] // heads,
    d_ff=hf.get('n_inner') or 4 * hf['n_embd'],
    max_len=hf['n_positions'],
    norm='layer',
    norm_eps=hf.get('layer_norm_epsilon', 1e-5),
    mlp='gelu',
    bias=True,
    positions='learned',
    attn_scale=0.0 if hf.get('scale_attn_weights', True) else 1.0,
    tied=hf.get('tie_word_embeddings', True),
    init_std=hf.get('initializer_range', 0.02),
  )


def _rope(hf: _Settings, rope: Mapping[str, Any]) -> tuple[float, tuple[float, ...]]:
  """(theta, Llama 3's scaling or none) of one `rope_parameters`; old files say `type` for `rope_type`."""
  rope = hf.within(rope)
  kind = rope.get('rope_type', rope.get('type', 'default'))
  require(rope.get('partial_rotary_factor', 1.0) == 1.0, f'{hf["model_type"]} config: partial_rotary_factor must be 1')
  if kind == 'default':
    return rope['rope_theta'], ()
  require(kind == 'llama3', f'{hf["model_type"]} config: rope_type={kind!r} is not supported; allowed: default, llama3')
  keys = ('factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings')
  return rope['rope_theta'], tuple(float(rope[key]) for key in keys)


def _pattern(hf: _Settings) -> tuple[int, int]:
  """(window, global_every) of Gemma 3's layer types: every n-th layer is global."""
  n = hf['num_hidden_layers']
  every = hf.get('sliding_window_pattern') or hf.get('_sliding_window_pattern') or 6
  types = hf.get('layer_types')
  if types:
    every = types.index('full_attention') + 1 if 'full_attention' in types else n + 1
    expected = ['sliding_attention' if (i + 1) % every else 'full_attention' for i in range(n)]
    require(list(types) == expected, 'gemma3_text config: layer_types: not every n-th layer is global')
  return (hf['sliding_window'], every) if every > 1 else (0, 1)


# ------------------------------------------------------------------------------------------------------ parameters


class _Names(NamedTuple):
  """Where a family keeps what: `body` + name, and in layer i `body` + `layers` + i + name + .weight or .bias."""

  body: str
  top: Mapping[str, str]
  layers: str
  layer: Mapping[str, str]
  transposed: bool  # the layers' matrices: torch.nn.Linear stores [out, in], GPT-2's Conv1D [in, out]


_LLAMA = _Names(
  body='model.',
  top={'tokens': 'embed_tokens.weight', 'final_norm': 'norm.weight'},
  layers='layers.',
  layer={
    'attn_norm': 'input_layernorm',
    'q': 'self_attn.q_proj',
    'k': 'self_attn.k_proj',
    'v': 'self_attn.v_proj',
    'o': 'self_attn.o_proj',
    'q_norm': 'self_attn.q_norm',
    'k_norm': 'self_attn.k_norm',
    'mlp_norm': 'post_attention_layernorm',
    'gate': 'mlp.gate_proj',
    'up': 'mlp.up_proj',
    'down': 'mlp.down_proj',
  },
  transposed=True,
)

_GEMMA_NORMS = {
  'attn_post_norm': 'post_attention_layernorm',
  'mlp_norm': 'pre_feedforward_layernorm',
  'mlp_post_norm': 'post_feedforward_layernorm',
}
_GEMMA = _LLAMA._replace(layer={**_LLAMA.layer, **_GEMMA_NORMS})

_GPT2 = _Names(
  body='transformer.',
  top={
    'tokens': 'wte.weight',
    'positions': 'wpe.weight',
    'final_norm': 'ln_f.weight',
    'final_norm_bias': 'ln_f.bias',
  },
  layers='h.',
  layer={
    'attn_norm': 'ln_1',
    'q': 'attn.c_attn',
    'k': 'attn.c_attn',
    'v': 'attn.c_attn',
    'o': 'attn.c_proj',
    'mlp_norm': 'ln_2',
    'up': 'mlp.c_fc',
    'down': 'mlp.c_proj',
  },
  transposed=False,
)

_HEAD = 'lm_head.weight'
_BUFFERS = ('.rotary_emb.inv_freq', '.attn.bias', '.attn.masked_bias')  # constants that older versions saved


class _Source(NamedTuple):
  """Where a parameter comes from: tensor name ({} is the layer), its shape there, and how to read it."""

  key: str
  shape: tuple[int, ...]
  transposed: bool = False
  part: int | None = None  # which of q, k, v, where they lie side by side in the last axis


def params_from_hf(state_dict: Mapping[str, Any], config: ModelConfig) -> Params:
  """The parameters of `build(config)` from a state dict of numpy arrays or torch tensors, in `param_dtype`.

  The state dict of the body alone ('layers.0...' for 'model.layers.0...') will do if the head is tied. ConfigError,
  naming the tensors, if some are missing, unexpected or of another shape, or if a tied model has another lm_head.
  """
  names = _GPT2 if config.positions == 'learned' else _GEMMA if config.post_norms else _LLAMA
  if not any(key.startswith(names.body) for key in state_dict):
    state_dict = {key if key == _HEAD else names.body + key: value for key, value in state_dict.items()}
  tree = shapes(config)
  plan = jax.tree.map_with_path(lambda path, s: _source(names, path[0].key, path[-1].key, s.shape), tree)
  _check_keys(state_dict, plan, config)

  def read(s, source):
    if '{}' not in source.key:
      return jnp.asarray(_read(state_dict, source, s.shape), s.dtype)
    layers = [source._replace(key=source.key.format(i)) for i in range(config.n_layers)]
    return jnp.asarray(np.stack([_read(state_dict, one, s.shape[1:]) for one in layers]), s.dtype)

  return jax.tree.map(read, tree, plan)


def _source(names: _Names, group: str, name: str, shape: tuple[int, ...]) -> _Source:
  """Where the family keeps this parameter; `shape` is ours, with the layers' axis."""
  if name == 'head':
    return _Source(_HEAD, shape[::-1], transposed=True)
  stem, kind = (name.removesuffix('_bias'), 'bias') if name.endswith('_bias') else (name, 'weight')
  require(name in names.top or stem in names.layer, f'{group}.{name}: no tensor of {names.body}* corresponds to it')
  if name in names.top:
    return _Source(names.body + names.top[name], shape)
  if kind == 'bias' or name.endswith('norm'):
    flat: tuple[int, ...] = (math.prod(shape[1:]),)
    transposed = False
  else:
    inputs = 3 if name == 'o' else 2  # axes up to the last one that is summed over, the layer's included
    flat = (math.prod(shape[1:inputs]), math.prod(shape[inputs:]))
    transposed = names.transposed
  part = 'qkv'.index(stem) if names.layer[stem].endswith('c_attn') else None
  if part is not None:
    flat = (*flat[:-1], 3 * flat[-1])
  key = f'{names.body}{names.layers}{{}}.{names.layer[stem]}.{kind}'
  return _Source(key, flat[::-1] if transposed else flat, transposed, part)


def _check_keys(state_dict: Mapping[str, Any], plan: Any, config: ModelConfig) -> None:
  """Everything that is needed is there, and nothing else: a tensor that nobody reads is a model that was not meant."""
  sources = jax.tree.leaves(plan, is_leaf=lambda x: isinstance(x, _Source))
  needed = {source.key.format(i) for source in sources for i in range(config.n_layers)}
  missing = sorted(needed - state_dict.keys())
  extra = sorted(key for key in state_dict.keys() - needed if not key.endswith(_BUFFERS))
  if config.tied and _HEAD in extra:
    extra.remove(_HEAD)
    tokens = plan['embed']['tokens']
    copy = _read(state_dict, tokens._replace(key=_HEAD), tokens.shape)
    same = np.array_equal(copy, _read(state_dict, tokens, tokens.shape))
    require(same, f'{_HEAD}: differs from {tokens.key}, but the configuration has tied=True')
  require(not missing, f'state dict: missing {_some(missing)}')
  require(not extra, f'state dict: unexpected {_some(extra)}')


def _read(state_dict: Mapping[str, Any], source: _Source, shape: tuple[int, ...]) -> np.ndarray:
  value = state_dict[source.key]
  value = value.detach().cpu().float().numpy() if hasattr(value, 'detach') else np.asarray(value)
  require(value.shape == source.shape, f'{source.key}: shape {value.shape}, expected {source.shape}')
  if source.part is not None:
    value = np.split(value, 3, axis=-1)[source.part]
  return (value.T if source.transposed else value).reshape(shape)


def _some(keys: list[str], most: int = 8) -> str:
  more = f' and {len(keys) - most} more' if len(keys) > most else ''
  return ', '.join(keys[:most]) + more
