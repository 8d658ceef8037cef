"""Mixtures of experts and routers, in the form that transformers uses."""

import warnings

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn

from fim_lora import FimConfig
from helpers.single_layers import WIDTH


class Mixture(nn.Module):
    """Experts after a router, in the form that transformers uses."""

    def __init__(self, experts=3):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.router = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, experts)
        self.experts = Experts(experts)

    def forward(self, x, target):
        h = torch.tanh(self.first(x)).flatten(0, 1)
        weights, index = self.router(h).softmax(-1).topk(2)
        y = self.experts(h, index, weights).unflatten(0, x.shape[:2])
        return {"loss": (torch.tanh(y) - target[:, None, None]).square().flatten(1).sum(1).mean()}


class Experts(nn.Module):
    def __init__(self, experts):
        super().__init__()
        self.up = nn.Parameter(torch.randn(experts, 5, WIDTH))
        self.down = nn.Parameter(torch.randn(experts, WIDTH, 5))

    def forward(self, hidden, index, weights):
        y = torch.zeros_like(hidden)
        for expert in range(len(self.up)):
            token, position = torch.where(index == expert)
            h = F.linear(torch.relu(F.linear(hidden[token], self.up[expert])), self.down[expert])
            y = y.index_add(0, token, h * weights[token, position, None])
        return y


TARGETS = ["experts.up", "experts.down"]


def mixture_model(base=None, **options):
    torch.manual_seed(1)
    config = LoraConfig(
        r=2,
        target_modules=[],
        target_parameters=TARGETS,
        init_lora_weights="fim",
        fim_config=FimConfig(2, **options),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(base or Mixture(), config)


class Router(nn.Module):
    """Returns logits, the scores computed from them, and the indices of their experts, as in transformers."""

    def __init__(self, experts, kind=tuple):
        super().__init__()
        self.weight, self.kind = nn.Parameter(torch.randn(experts, WIDTH)), kind

    def forward(self, hidden):
        logits = F.linear(hidden, self.weight)
        scores, index = logits.softmax(-1).topk(2)
        outputs = {"logits": logits, "scores": scores / scores.sum(-1, keepdim=True), "index": index}
        return outputs if self.kind is dict else self.kind(outputs.values())
