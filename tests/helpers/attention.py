"""A model around `nn.MultiheadAttention`, and batches for it."""

import torch
from torch import nn

from helpers.single_layers import batches_of, floats


class Attention(nn.Module):
    """Self-attention or attention to a memory, with any options of PyTorch."""

    def __init__(self, first=True, memory=False, dropout=0.0, **options):
        super().__init__()
        torch.manual_seed(0)
        self.first = None if first else nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, dropout=dropout, **options)
        with torch.no_grad():  # PyTorch starts with zeros
            for parameter in self.attention.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
        self.memory = memory

    def forward(self, x, target, padding=None):
        h = x if self.first is None else torch.tanh(self.first(x))
        memory = torch.tanh(h.flip(1)[:, :3] * 1.5) if self.memory else h
        if not self.attention.batch_first:
            h, memory = h.transpose(0, 1), memory.transpose(0, 1)
        mask = None if self.memory else torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        y, _ = self.attention(
            h, memory, value=memory, key_padding_mask=padding, attn_mask=mask, need_weights=self.memory
        )
        y = y if self.attention.batch_first else y.transpose(0, 1)
        return {"loss": (torch.tanh(y) - target[:, None, None]).square().flatten(1).sum(1).mean()}


def attention_batches(memory=False, batch_size=3):
    batches = batches_of(floats(5, 8), batch_size)
    if not memory:
        for batch in batches:
            batch["padding"] = torch.zeros(batch_size, 5, dtype=torch.bool)
            batch["padding"][-1, 3:] = True
    return batches
