"""One decoder for the Llama/SmolLM2, Qwen3, Gemma 3 and GPT-2 families; they differ by fields of ModelConfig only.

    model = build(config)
    logits_BTV = Decoder(config).apply({'params': params}, tokens_BT, segments_BT)

The tree of parameters, the shape of each and the logical names of its axes all follow from one table (`letters`).
Sharding is not mentioned: it is a property of the arguments. The maths of the pieces is in ops.py, rope.py and
attention.py; legend of shapes in config.py.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from slm_jax import config as configs
from slm_jax import vocabulary
from slm_jax.config import require
from slm_jax.model import ops, rope
from slm_jax.model.api import Batch, Feature, Features, Model, Params
from slm_jax.model.attention import Cache, attention, document_starts
from slm_jax.model.config import ModelConfig
from slm_jax.model.fused import Attend, Devices, attend_by
from slm_jax.model.products import ANYWHERE, Products

# ------------------------------------------------------------------------------------------------------ parameters


def letters(config: ModelConfig) -> dict[str, Any]:
  """Every parameter and its axes, by the letters of the legend; P is a learned position."""
  layer = {'attn_norm': 'D', 'q': 'DHK', 'k': 'DGK', 'v': 'DGK', 'o': 'HKD', 'mlp_norm': 'D', 'up': 'DF', 'down': 'FD'}
  if config.mlp != 'gelu':
    layer['gate'] = 'DF'
  if config.post_norms:
    layer |= {'attn_post_norm': 'D', 'mlp_post_norm': 'D'}
  table: dict[str, Any] = {'embed': {'tokens': 'VD'}, 'layers': layer, 'final_norm': 'D'}
  if config.norm == 'layer':
    layer |= {f'{name}_bias': 'D' for name in layer if name.endswith('norm')}
    table['final_norm_bias'] = 'D'
  if config.bias:
    layer |= {'q_bias': 'HK', 'k_bias': 'GK', 'v_bias': 'GK', 'o_bias': 'D', 'up_bias': 'F', 'down_bias': 'D'}
    if 'gate' in layer:
      layer['gate_bias'] = 'F'
  if config.qk_norm:
    layer |= {'q_norm': 'K', 'k_norm': 'K'}
  if config.positions == 'learned':
    table['embed']['positions'] = 'PD'
  if not config.tied:
    table['head'] = 'DV'
  table['layers'] = {name: 'L' + axes for name, axes in layer.items()}
  return table


_LOGICAL = {
  'V': 'vocab',
  'P': None,
  'D': 'embed',
  'L': 'layers',
  'H': 'heads',
  'G': 'kv_heads',
  'K': 'head_dim',
  'F': 'mlp',
}


def logical_axes(config: ModelConfig) -> Any:
  """A tree like the parameters; each leaf is a tuple that names the axes of one, None where there is nothing to say."""
  return jax.tree.map(lambda axes: tuple(_LOGICAL[a] for a in axes), letters(config))


def shapes(config: ModelConfig) -> Any:
  """A tree like the parameters, of jax.ShapeDtypeStruct; nothing is allocated."""
  c = config
  size = {
    'V': c.vocab_size,
    'P': c.max_len,
    'D': c.d_model,
    'L': c.n_layers,
    'H': c.n_heads,
    'G': c.n_kv_heads,
    'K': c.head_dim,
    'F': c.d_ff,
  }
  return jax.tree.map(lambda axes: jax.ShapeDtypeStruct([size[a] for a in axes], c.param_dtype), letters(c))


def _moments(config: ModelConfig, name: str) -> tuple[float, float]:
  """Mean and standard deviation at the start: identity norms; init_std, over sqrt(2 L) into the residual (GPT-2).

  In muP (see ModelConfig) a layer's matrices have it over sqrt(r) too.
  """
  if name.endswith('bias'):
    return 0.0, 0.0
  if name.endswith('norm'):
    return 1 - config.norm_offset, 0.0
  if name in ('tokens', 'positions', 'head'):
    return 0.0, config.init_std
  std = config.init_std / math.sqrt(config.width_ratio)
  return 0.0, std / math.sqrt(2 * config.n_layers) if name in ('o', 'down') else std


def _draw(config: ModelConfig, key: jax.Array, tree: dict[str, jax.ShapeDtypeStruct]) -> Params:
  """Arrays cut from one stream of normals: each use of the generator costs the compiler most of a second."""
  moments = {name: _moments(config, name) for name in tree}
  noise = jax.random.normal(key, [sum(s.size for name, s in tree.items() if moments[name][1])])
  out, at = {}, 0
  for name, s in tree.items():
    mean, std = moments[name]
    value = jnp.full(s.shape, mean)
    if std:
      value, at = std * noise[at : at + s.size].reshape(s.shape), at + s.size
    out[name] = value.astype(s.dtype)
  return out


def _draw_layers(config: ModelConfig, key: jax.Array) -> Params:
  """Layer by layer, so that the noise of no more than one exists."""
  one = {name: jax.ShapeDtypeStruct(s.shape[1:], s.dtype) for name, s in shapes(config)['layers'].items()}
  return jax.lax.map(lambda key: _draw(config, key, one), jax.random.split(key, config.n_layers))


# ------------------------------------------------------------------------------------------------------- one layer


class Place(NamedTuple):
  """Where queries stand and how far back they see, for one kind of layer. The leading axis may be 1 for all rows."""

  angles: tuple[jax.Array, ...]  # of RoPE: cos, sin; none if positions are learned
  low_BT: jax.Array  # first slot seen
  high_BT: jax.Array  # last slot seen, the query's own


def _places(config: ModelConfig, slot_BT: jax.Array, start_BT: jax.Array) -> tuple[Place, Place | None]:
  """The Place in global and in local (sliding-window) layers; None if no layer is local."""

  def place(theta, scaling, low_BT):
    frequencies = rope.frequencies(config.head_dim, theta, scaling)
    turned = rope.angles(slot_BT - start_BT, frequencies) if config.positions == 'rope' else ()
    return Place(turned, jnp.minimum(low_BT, slot_BT), slot_BT)  # padding before a row's start sees itself

  everywhere = place(config.rope_theta, config.rope_scaling, start_BT)
  if not config.window:
    return everywhere, None
  return everywhere, place(config.rope_local_theta, (), jnp.maximum(start_BT, slot_BT - config.window + 1))


def layer(
  config: ModelConfig,
  w: Params,
  x_BTD: jax.Array,
  cache: Cache | None,
  index: jax.Array,
  places: tuple[Place, Place | None],
  attend: Attend | None = None,
  products: Products = ANYWHERE,
) -> tuple[jax.Array, Cache | None, dict[str, jax.Array]]:
  """Attention and MLP, each of a norm of the residual stream x and added to it.

  w: the weights of this layer, whose number is `index` (int32). With a cache, its tokens are attended to as well, and
  the new keys and values are in the one returned. Last comes what `Feature`s of this layer there are, by kind.
  attend: a fused kernel, where one is to take the place of attention.py.
  """
  c = config
  norm = functools.partial(_norm, c, w)
  linear = functools.partial(_linear, c, w, products)
  place, local = places
  is_global = (index + 1) % c.global_every == 0
  if local is not None:
    place = jax.tree.map(lambda a, b: jnp.where(is_global, a, b), place, local)

  a_BTD = norm('attn_norm', x_BTD)
  q_BTHK = linear('q', a_BTD)
  k_BTGK = linear('k', a_BTD)
  v_BTGK = linear('v', a_BTD)
  if c.qk_norm:
    eps = c.qk_norm_eps or c.norm_eps
    q_BTHK = ops.rms_norm(q_BTHK, c.norm_offset + w['q_norm'], eps)
    k_BTGK = ops.rms_norm(k_BTGK, c.norm_offset + w['k_norm'], eps)
  if place.angles:
    q_BTHK, k_BTGK = rope.rotate(q_BTHK, *place.angles), rope.rotate(k_BTGK, *place.angles)
  k_BSGK, v_BSGK = k_BTGK, v_BTGK
  if cache is not None:
    k_BSGK, v_BSGK, cache = cache.insert(index, k_BTGK, v_BTGK)
  if attend is not None:
    z_BTHK = attend(q_BTHK, k_BSGK, v_BSGK, is_global)
  else:
    z_BTHK = attention(q_BTHK, k_BSGK, v_BSGK, place.low_BT, place.high_BT, c.query_scale, products)
  o_BTD = linear('o', z_BTHK, 2)
  x_BTD += norm('attn_post_norm', o_BTD) if c.post_norms else o_BTD

  h_BTD = norm('mlp_norm', x_BTD)
  up_BTF = linear('up', h_BTD)
  gate_BTF = linear('gate', h_BTD) if c.mlp != 'gelu' else None
  act_BTF = ops.activation(c.mlp, up_BTF, gate_BTF)
  m_BTD = linear('down', act_BTF)
  x_BTD += norm('mlp_post_norm', m_BTD) if c.post_norms else m_BTD
  into = {'into_qkv': a_BTD, 'into_o': z_BTHK, 'into_mlp': h_BTD, 'into_down': act_BTF}
  return x_BTD, cache, {'hidden': x_BTD, 'q': q_BTHK, 'k': k_BTGK, 'v': v_BTGK, **into}


def _norm(config: ModelConfig, w: Params, name: str, x: jax.Array) -> jax.Array:
  scale = config.norm_offset + w[name]
  if config.norm == 'layer':
    return ops.layer_norm(x, scale, w[f'{name}_bias'], config.norm_eps)
  return ops.rms_norm(x, scale, config.norm_eps)


def _linear(config: ModelConfig, w: Params, products: Products, name: str, x: jax.Array, n_in: int = 1) -> jax.Array:
  """x times the weights of `name`, over its last n_in axes; plus its tap, whose gradient is the product's cotangent."""
  y = ops.linear(x, w[name], n_in, products)
  y = y + w[f'{name}_tap'] if f'{name}_tap' in w else y
  return y + ops.along(w[f'{name}_bias'].astype(x.dtype), y) if config.bias else y


def _layers(
  config: ModelConfig,
  w: Params,
  x_BTD: jax.Array,
  cache: Cache | None,
  places: tuple[Place, Place | None],
  kinds: Sequence[str],
  attend: Attend | None,
  products: Products,
  stream: Callable[[jax.Array], jax.Array],
) -> tuple[jax.Array, Cache | None, dict[str, jax.Array]]:
  """All layers, by a scan over the leading axis of their weights, recomputed in the backward pass as `remat` says.

  kinds: of features that are wanted: [L,B,T,...] each. Where the scan is unrolled, the compiler keeps those layers of
  them that are used; in a loop, memory holds all. stream: how x lies on the devices, see `Devices`.
  """
  unroll = config.unroll or config.n_layers

  def body(carry, one):
    x_BTD, cache = carry
    x_BTD, cache, made = layer(config, one[0], x_BTD, cache, one[1], places, attend, products)
    return (stream(x_BTD), cache), {kind: made[kind] for kind in kinds}

  if config.remat != 'none':
    # 'dots' keeps the projections' outputs and recomputes the rest: scores, softmax, norms, activations.
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if config.remat == 'dots' else None
    # Between iterations of a loop the compiler cannot merge the two computations; inside an unrolled one it could.
    body = jax.checkpoint(body, policy=policy, prevent_cse=unroll > 1)
  (x_BTD, cache), made = jax.lax.scan(body, (x_BTD, cache), (w, jnp.arange(config.n_layers)), unroll=unroll)
  return x_BTD, cache, made


# ----------------------------------------------------------------------------------------------------- the decoder


class Decoder(nn.Module):
  """Tokens to logits. `hidden` and `head` are its two halves; `run` is `hidden` with a cache."""

  config: ModelConfig
  devices: Devices | None = None  # that the program is for; they say which kernel attention takes

  def setup(self):
    c = self.config

    def declare(name, tree):
      if name == 'layers':
        return self.param(name, functools.partial(_draw_layers, c))
      if isinstance(tree, dict):
        return self.param(name, lambda key: _draw(c, key, tree))
      return self.param(name, lambda key: _draw(c, key, {name: tree})[name])

    self.weights = {name: declare(name, tree) for name, tree in shapes(c).items()}

  def __call__(self, tokens_BT: jax.Array, segments_BT: jax.Array | None = None) -> jax.Array:
    """float32 logits_BTV. segments: see `hidden`."""
    return self.head(self.hidden(tokens_BT, segments_BT))

  def hidden(self, tokens_BT: jax.Array, segments_BT: jax.Array | None = None) -> jax.Array:
    """x_BTD after the final norm. segments: see `features`."""
    return self.features(tokens_BT, segments_BT)[0]

  def features(
    self, tokens_BT: jax.Array, segments_BT: jax.Array | None = None, wanted: Sequence[Feature] = ()
  ) -> tuple[jax.Array, Features]:
    """x_BTD after the final norm, and what else is wanted of the same pass.

    segments: int32, 0 for padding, documents numbered from 1 in each row; None: every row is one document. Attention
    stays inside a document, and positions start anew in each.
    """
    t = tokens_BT.shape[1]
    require(t <= self.config.max_len, f'tokens: a sequence of {t} is longer than model.max_len={self.config.max_len}')
    start_BT = jnp.zeros((1, t), jnp.int32) if segments_BT is None else document_starts(segments_BT)
    return self.run(tokens_BT, start_BT, None, wanted, packed=segments_BT is not None)[::2]

  def run(
    self,
    tokens_BT: jax.Array,
    start_BT: jax.Array,
    cache: Cache | None = None,
    wanted: Sequence[Feature] = (),
    packed: bool = True,
  ) -> tuple[jax.Array, Cache | None, Features]:
    """(x_BTD, cache, features): T tokens after those in the cache; start: the first slot of each token's document.

    packed: False if every row is known to be one document.
    """
    c = self.config
    documents_BT = start_BT if packed else None
    attend = attend_by(c, self.devices, documents_BT, *tokens_BT.shape) if cache is None else None
    slot_BT = jnp.arange(tokens_BT.shape[1])[None] + (0 if cache is None else cache.used)
    told = self.devices if cache is None else None
    products = told.products() if told else ANYWHERE
    stream = (told and told.stream) or (lambda x_BTD: x_BTD)
    embedded = (told and told.embedded) or (lambda look_up, tokens_BT: look_up(tokens_BT))
    table = self.weights['embed']
    x_BTD = embedded(lambda tokens_BT: ops.embed(table['tokens'], tokens_BT, c.embed_scale, c.dtype), tokens_BT)
    if c.positions == 'learned':
      position_BT = jnp.maximum(slot_BT - start_BT, 0)  # negative in the padding before a row's start
      x_BTD = x_BTD + ops.embed(table['positions'], position_BT, 1.0, c.dtype)
    x_BTD = stream(x_BTD)
    places = _places(c, slot_BT, start_BT)
    embedded_BTD, kinds = x_BTD, sorted({feature.kind for feature in wanted if feature.layer})
    weights = {**self.weights['layers'], **self.variables['params'].get('taps', {})}
    x_BTD, cache, made = _layers(c, weights, x_BTD, cache, places, kinds, attend, products, stream)
    features = {f: made[f.kind][f.layer - 1] if f.layer else embedded_BTD for f in wanted}
    if cache is not None:
      cache = cache._replace(used=cache.used + tokens_BT.shape[1])
    return _norm(c, self.weights, 'final_norm', x_BTD), cache, features

  def head(self, x: jax.Array) -> jax.Array:
    """x_...D -> float32 logits_...V, soft-cap included. In muP they are divided by r, which is cheaper done to x."""
    return _unembed(self.config, self.devices, _unembedding(self.config, self.weights), x)


def _unembedding(config: ModelConfig, params: Params) -> jax.Array:
  """[V,D]"""
  return params['embed']['tokens'] if config.tied else params['head'].T


def _unembed(config: ModelConfig, devices: Devices | None, table_VD: jax.Array, x: jax.Array) -> jax.Array:
  x = x if config.width_ratio == 1 else x / config.width_ratio
  return ops.unembed(x, table_VD, config.softcap, devices.products() if devices else ANYWHERE)


def apply(config: ModelConfig, params: Params, *args: Any, method: str, devices: Devices | None = None) -> Any:
  """That method of the decoder of these parameters."""
  return Decoder(config, devices).apply({'params': params}, *args, method=method)


def build(config: ModelConfig, devices: Devices | None = None) -> Model:
  """The decoder as pure functions of its parameters. ConfigError if the configuration is impossible.

  devices: that its programs are for; unless given, attention is the reference, which runs on all.
  """
  configs.check(config, 'model')

  def init(key: jax.Array) -> Params:
    return Decoder(config).init(key, method=lambda decoder: decoder.weights)['params']

  def hidden(params: Params, batch: Batch) -> jax.Array:
    return apply(config, params, batch['inputs'], batch.get('segments'), method='hidden', devices=devices)

  def head(params: Params, x: jax.Array) -> jax.Array:
    return apply(config, params, x, method='head', devices=devices)

  def features(params: Params, batch: Batch, wanted: Sequence[Feature]) -> tuple[jax.Array, Features]:
    for kind, layer in wanted:
      first = 0 if kind == 'hidden' else 1
      require(
        first <= layer <= config.n_layers,
        f'{kind} of layer {layer}: a model of {config.n_layers} layers has {first}..{config.n_layers}',
      )
    given = (batch['inputs'], batch.get('segments'), tuple(wanted))
    return apply(config, params, *given, method='features', devices=devices)

  return Model(config, init, hidden, head, features)


def in_blocks(model: Model, width: int) -> Model:
  """The model with a head whose logits exist for `width` tokens of the vocabulary at a time; 0: for all."""
  config = model.config
  if not width or width >= config.vocab_size:
    return model

  def head(params: Params, x: jax.Array) -> vocabulary.Logits:
    return vocabulary.blocks(lambda rows_WD: _unembed(config, None, rows_WD, x), _unembedding(config, params), width)

  return model._replace(head=head)
