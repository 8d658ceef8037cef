"""A call that is run again, in the state of its first run."""

import pytest
import torch

from fim_lora.runtime.replay import CallState


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("after", [False, True])
def test_a_call_is_replayed_under_its_own_autocast(before, after):
    with torch.autocast("cpu", torch.float16, enabled=before):
        state = CallState.capture(torch.ones(1))
    with torch.autocast("cpu", torch.bfloat16, enabled=after):
        with state.restored():
            product = torch.ones(2, 2) @ torch.ones(2, 2)
        assert torch.is_autocast_enabled("cpu") == after
    assert product.dtype == (torch.float16 if before else torch.float32)
