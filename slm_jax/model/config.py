"""ModelConfig: what distinguishes one decoder from another, as data. Presets are in presets.py."""

import dataclasses
from typing import ClassVar, Literal

from slm_jax.conditions import Needs
from slm_jax.config import require, setting


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder-only transformer. The defaults are a Llama; the notes name the families that need each switch.

  Legend used in the model and losses: B batch, T time, S source time (keys), V vocabulary, D model width, L layers,
  H query heads, G key/value heads (groups), K head size, F feed-forward width, N tokens (B*T), C a chunk of tokens.

  With mup_base_width the model is in maximal update parametrisation for Adam (muP; arXiv 2203.03466, table 8), in which
  a learning rate that is best at one width should be best at all. With r = d_model / mup_base_width:

      matrices of the layers              initial deviation / sqrt(r), learning rate / r (slm_jax/optim.py)
      embeddings, head, norms, biases     as without
      logits                              / r
      scores of attention                 q k / K in place of q k / sqrt(K), equal at K = mup_base_head_dim

  At r = 1 nothing changes. H*K and F are to grow in proportion to D, and settings that some families derive from the
  width (embed_scale, attn_scale) are to stay those of the base.
  """

  vocab_size: int = setting(512, '[1, 2^31)')
  d_model: int = setting(128, '[1, 2^31)')
  n_layers: int = setting(4, '[1, 10000]')  # each of them is a part of the program, unless `unroll` makes a loop
  n_heads: int = setting(4, '[1, 2^31)')
  n_kv_heads: int = setting(4, '[1, 2^31)')
  head_dim: int = setting(32, '[1, 2^31)')  # H*K may differ from D (Qwen3, Gemma 3)
  d_ff: int = setting(384, '[1, 2^31)')
  max_len: int = setting(2048, '[1, 2^31)')  # positions; a longer sequence is an error

  norm: Literal['rms', 'layer'] = 'rms'  # 'layer': GPT-2 (with bias)
  norm_eps: float = setting(1e-5, '[0, inf)')
  norm_offset: float = setting(0.0, '(-inf, inf)')  # Gemma: scale is (1 + w)
  post_norms: bool = False  # Gemma 3: norms after attention and after the MLP too
  qk_norm: bool = False  # Qwen3, Gemma 3: RMSNorm per head before RoPE
  qk_norm_eps: float = setting(0.0, '[0, inf)')  # of that norm; 0: norm_eps
  mlp: Literal['swiglu', 'geglu', 'gelu'] = 'swiglu'  # geglu: Gemma; gelu (tanh, no gate): GPT-2
  bias: bool = False  # GPT-2: biases on all projections
  positions: Literal['rope', 'learned'] = 'rope'
  rope_theta: float = setting(10_000.0, '(0, inf)')
  rope_local_theta: float = setting(10_000.0, '(0, inf)')  # theta of the sliding-window layers
  # Llama 3: (factor, low_freq_factor, high_freq_factor, original positions).
  rope_scaling: tuple[float, ...] = setting((), '(0, inf)')
  window: int = setting(0, '[0, 2^31)')  # sliding window of the local layers; 0: none are local
  # Every n-th layer attends globally (Gemma 3: 6), the others within the window.
  global_every: int = setting(1, '[1, 2^31)')
  attn_scale: float = setting(0.0, '[0, inf)')  # query multiplier; 0 means head_dim**-0.5
  tied: bool = True  # head = transposed embedding
  embed_scale: float = setting(1.0, '(0, inf)')  # Gemma: sqrt(d_model)
  softcap: float = setting(0.0, '[0, inf)')  # logits = c*tanh(logits/c); 0: off

  dtype: Literal['float32', 'bfloat16'] = 'float32'  # of activations; losses and norms' statistics are float32
  param_dtype: Literal['float32', 'bfloat16'] = 'float32'  # optimisers compute in float32, and keep their state so
  init_std: float = setting(0.02, '[0, inf)')
  # d_model of the model whose learning rate is to be right for this one; 0: no muP.
  mup_base_width: int = setting(0, '[0, 2^31)')
  # Its head_dim; 0: this one's, wider models have more heads and not larger ones.
  mup_base_head_dim: int = setting(0, '[0, 2^31)')
  remat: Literal['none', 'full', 'dots'] = setting('none', semantic=False)
  unroll: int = setting(0, '[0, 2^31)', semantic=False)  # layers a scan iteration; 0: all of them
  # By which kernel; auto: the fastest that the devices have and that can do it (slm_jax/model/fused.py)
  attention: Literal['auto', 'reference', 'splash', 'cudnn'] = setting('auto', semantic=False)

  needs: ClassVar[Needs] = {
    'qk_norm_eps': (lambda its: its.qk_norm, 'qk_norm'),
    **dict.fromkeys(('rope_theta', 'rope_scaling'), (lambda its: its.positions == 'rope', 'positions=rope')),
    'rope_local_theta': (lambda its: its.positions == 'rope' and its.window, 'positions=rope and a window'),
    'global_every': (lambda its: its.window, 'a window'),
  }

  def check(self, key: str) -> None:
    require(
      self.n_heads % self.n_kv_heads == 0,
      f'{key}.n_heads={self.n_heads}: must be a multiple of n_kv_heads={self.n_kv_heads}',
    )
    require(
      self.positions != 'rope' or self.head_dim % 2 == 0,
      f'{key}.head_dim={self.head_dim}: RoPE needs an even head size',
    )
    require(
      len(self.rope_scaling) in (0, 4),
      f'{key}.rope_scaling={self.rope_scaling}: expected none or (factor, low, high, original positions)',
    )
    require(
      not self.window or self.global_every > 1,
      f'{key}.window={self.window}: no layer is local with global_every=1; allowed: 2 or more',
    )
    require(
      self.mup_base_width > 0 or not self.mup_base_head_dim,
      f'{key}.mup_base_head_dim={self.mup_base_head_dim}: needs {key}.mup_base_width, which is 0 (no muP)',
    )
    require(self.unroll <= self.n_layers, f'{key}.unroll={self.unroll}: must be 0..n_layers={self.n_layers}')

  @property
  def width_ratio(self) -> float:
    """Of muP: how many times as wide as its base; 1 without muP."""
    return self.d_model / self.mup_base_width if self.mup_base_width else 1.0

  @property
  def query_scale(self) -> float:
    """What scores are multiplied by: attn_scale or K0^-1/2, times K0 / K; K0 is muP's base head size, K without one."""
    base = self.mup_base_head_dim or self.head_dim
    return (self.attn_scale or base**-0.5) * (base / self.head_dim)

  @classmethod
  def parse(cls, name: str, key: str) -> 'ModelConfig':
    from slm_jax.model.presets import preset  # presets are made of ModelConfigs

    return preset(name, key)
