"""Models inside of wrappers."""

import pytest
import torch
from torch import nn

from fim_lora import get_fim_scores
from helpers.adapters import fim_lora_config
from helpers.tiny_models import llama, lm_batches


@pytest.mark.parametrize("order", ["compiled outside", "compiled inside"])
def test_a_compiled_data_parallel_model_has_the_names_of_the_model(order):
    # Compilation begins with the first call, and force_eager skips it.
    base = llama()
    wrapped = {
        "compiled outside": lambda: torch.compile(nn.DataParallel(base)),
        "compiled inside": lambda: nn.DataParallel(torch.compile(base)),
    }[order]()
    scores = get_fim_scores(wrapped, lm_batches(), fim_lora_config(), show_progress_bar=False)
    assert scores == get_fim_scores(llama(), lm_batches(), fim_lora_config(), show_progress_bar=False)
