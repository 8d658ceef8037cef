"""The hooks of a recorder keep no graph alive after its backward pass."""

import gc
import weakref

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from fim_lora import get_lora_spectrum


class Node:
    """Lives as long as the node of the graph that holds it."""


NODES = []


class Probe(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.node = Node()
        NODES.append(weakref.ref(ctx.node))
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Probed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.second(Probe.apply(torch.tanh(self.first(x)))).square().mean()


def test_a_calibration_frees_the_graph_of_every_batch():
    torch.manual_seed(0)
    model = get_peft_model(Probed(), LoraConfig(r=2, target_modules=["first", "second"], init_lora_weights=False))
    NODES.clear()
    batches = [{"x": torch.randn(3, 4)} for _ in range(4)]
    gc.collect()
    gc.disable()  # graphs have to be freed at once, not when the garbage collector happens to run
    try:
        get_lora_spectrum(model, batches, num_batches=4, show_progress_bar=False)
        alive = sum(node() is not None for node in NODES)
    finally:
        gc.enable()
    assert len(NODES) == 4
    assert alive == 0
