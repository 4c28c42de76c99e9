"""The baseline of bench_step.py: the same GPT in PyTorch, its attention and AdamW fused; eager, or compiled."""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
  def __init__(self, width: int, heads: int):
    super().__init__()
    self.heads = heads
    self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
    self.qkv = nn.Linear(width, 3 * width, bias=False)
    self.out = nn.Linear(width, width, bias=False)
    self.up = nn.Linear(width, 4 * width, bias=False)
    self.down = nn.Linear(4 * width, width, bias=False)

  def forward(self, x):
    b, t, d = x.shape
    q, k, v = (
      part.view(b, t, self.heads, d // self.heads).transpose(1, 2) for part in self.qkv(self.norm_1(x)).split(d, dim=2)
    )
    z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    x = x + self.out(z.transpose(1, 2).reshape(b, t, d))
    return x + self.down(F.gelu(self.up(self.norm_2(x)), approximate='tanh'))


class Gpt(nn.Module):
  def __init__(self, case: dict[str, int]):
    super().__init__()
    width, layers = case['width'], case['layers']
    self.tokens, self.positions = nn.Embedding(case['vocab'], width), nn.Embedding(case['context'], width)
    self.blocks = nn.ModuleList([Block(width, case['heads']) for _ in range(layers)])
    self.norm = nn.LayerNorm(width)
    for name, p in self.named_parameters():
      if p.dim() > 1:
        std = 0.02 / math.sqrt(2 * layers) if name.endswith(('out.weight', 'down.weight')) else 0.02
        nn.init.normal_(p, 0.0, std)

  def forward(self, inputs, targets):
    x = self.tokens(inputs) + self.positions.weight
    for block in self.blocks:
      x = block(x)
    logits = F.linear(self.norm(x), self.tokens.weight)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def torch_step(case: dict[str, int], dtype: str, compiled: bool) -> tuple[Callable[[], float], dict[str, Any]]:
  """(a function that takes one step, facts about it). bfloat16 is autocast's; torch.compile needs a C++ compiler."""
  torch.manual_seed(0)
  model = Gpt(case)
  matrices = [p for p in model.parameters() if p.dim() > 1]
  vectors = [p for p in model.parameters() if p.dim() == 1]
  groups = [{'params': matrices, 'weight_decay': 0.1}, {'params': vectors, 'weight_decay': 0.0}]
  optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
  loss_of = torch.compile(model) if compiled else model
  tokens = torch.randint(case['vocab'], (case['batch'], case['context'] + 1))
  inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

  def step():
    with torch.autocast('cpu', torch.bfloat16, enabled=dtype == 'bfloat16'):
      loss = loss_of(inputs, targets)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()

  facts: dict[str, Any] = {}
  if compiled:
    start = time.perf_counter()
    step()
    facts['compile_seconds'] = time.perf_counter() - start
  facts |= {
    'version': torch.__version__,
    'parameters': sum(p.numel() for p in model.parameters()),
    'threads': torch.get_num_threads(),
  }
  return step, facts
