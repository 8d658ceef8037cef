"""A model with every type of layer that PEFT adapts. It does not import fim_lora, so stock PEFT can load it."""

import warnings

import peft
import torch
import torch.nn.functional as F
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

WIDTH, IDS = 6, 20
MODULES = ["embedding", "convolution", "attention", "old_linear", "linear"]
PARAMETERS = ["experts.up", "experts.down"]
if Version(peft.__version__) < Version("0.19"):
    # It builds no adapter of a parameter after one of a Conv1D.
    MODULES.remove("old_linear")
NAMES = [*MODULES, *PARAMETERS]


class ScaledEmbedding(nn.Embedding):
    """As in Gemma, with the attribute that PEFT reads."""

    embed_scale = 2.5

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale


class Experts(nn.Module):
    """Every expert gets every token."""

    def __init__(self, number=3):
        super().__init__()
        self.up = nn.Parameter(torch.randn(number, 5, WIDTH))
        self.down = nn.Parameter(torch.randn(number, WIDTH, 5))

    def forward(self, x):
        h = torch.relu(torch.einsum("bti,eoi->bteo", x, self.up))
        return torch.einsum("bteo,eio->bti", h, self.down) / 4


class EveryType(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = ScaledEmbedding(IDS, WIDTH)
        self.convolution = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=2)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.old_linear = Conv1D(WIDTH, WIDTH)
        nn.init.normal_(self.old_linear.weight, std=0.5)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.experts = Experts()

    def output(self, ids):
        x = self.convolution(self.embedding(ids).mT).mT.contiguous()
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = torch.tanh(self.old_linear(x)) + x
        x = torch.tanh(self.linear(x)) + x
        return self.experts(F.layer_norm(x, (WIDTH,))) + x

    def forward(self, ids):
        y = self.output(ids)
        target = torch.sin(ids.to(y.dtype))[..., None]
        return {"loss": (y - target).square().flatten(1).sum(1).mean() / 10, "output": y}


def batches(seeds=range(3), size=4):
    return [{"ids": torch.randint(IDS, (size, 7), generator=torch.Generator().manual_seed(seed))} for seed in seeds]


def every_type(dtype=torch.float32, names=NAMES, **options):
    """The model with an adapter of random weights."""
    options = {"r": 4, "lora_alpha": 6, "target_modules": [name for name in names if name in MODULES]} | options
    parameters = [name for name in names if name in PARAMETERS]
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT, about Conv1D, groups, and a dictionary as the config of a model
        model = get_peft_model(EveryType().to(dtype), LoraConfig(target_parameters=parameters or None, **options))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def outputs(model, seed=9):
    with torch.no_grad():
        return model(**batches([seed])[0])["output"]
