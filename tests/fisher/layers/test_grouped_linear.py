"""A linear layer of several groups is refused by its name and class."""

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4GroupedLinear

from fim_lora import get_fim_diagonals, get_fim_scores


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), DeepseekV4GroupedLinear(3, 8, n_groups=2)

    def forward(self, x):
        return {"loss": self.second(self.first(x).unflatten(-1, (2, 3))).square().sum((1, 2)).mean()}


@pytest.mark.parametrize("measure", [get_fim_scores, get_fim_diagonals])
def test_grouped_layers_are_refused_by_name(measure):
    batches, options = [{"x": torch.randn(4, 6)}], {"show_progress_bar": False}
    message = r"'second' has a weight of shape \(8, 3\), but its DeepseekV4GroupedLinear maps 3 inputs to 4 outputs.*"
    scored = measure is get_fim_scores
    with pytest.raises(ValueError, match=message + "exclude_modules"):
        measure(Grouped(), batches, LoraConfig(target_modules=["first", "second"]) if scored else None, **options)
    with pytest.warns(UserWarning, match="1 batches"):
        measure(Grouped(), batches, LoraConfig(target_modules=["first"]) if scored else ["first"], **options)
