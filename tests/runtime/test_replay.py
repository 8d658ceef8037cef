"""A call that is run again, in the state of its first run."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fim_lora.runtime.replay import CallState, RandomState


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


@pytest.fixture
def generator(monkeypatch):
    """The generator of a stand-in for an Apple GPU. `torch.mps` itself is real, and cannot select a device."""
    generator = torch.Generator().manual_seed(7)
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda device="mps": generator.get_state())
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda state, device="mps": generator.set_state(state))
    return generator


def test_random_numbers_of_an_apple_gpu_are_drawn_again(generator):
    with FakeTensorMode():
        there = torch.ones(2, device="mps")
    torch.rand(1, generator=generator)
    state = CallState.capture(torch.ones(1), {"x": [there, there]})
    drawn = torch.rand(3), torch.rand(3, generator=generator)
    before = torch.get_rng_state(), generator.get_state()
    with state.restored():
        again = torch.rand(3), torch.rand(3, generator=generator)
    assert all(map(torch.equal, drawn, again))
    assert all(map(torch.equal, before, (torch.get_rng_state(), generator.get_state())))


def test_random_numbers_of_the_devices_of_the_tensors_are_drawn_again(monkeypatch):
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    monkeypatch.setattr(torch.xpu, "get_rng_state", lambda device: generators[device].get_state())
    monkeypatch.setattr(torch.xpu, "set_rng_state", lambda state, device: generators[device].set_state(state))
    with FakeTensorMode():
        there = [torch.ones(2, device=f"xpu:{index}") for index in (2, 0, 2)]
    state = RandomState.capture(torch.ones(1), there)
    drawn = [torch.rand(3, generator=generator) for generator in generators]
    with state.restored():
        again = [torch.rand(3, generator=generator) for generator in generators]
    assert [torch.equal(*pair) for pair in zip(drawn, again, strict=True)] == [True, False, True]
    assert (state.devices, len(state.states)) == ([0, 2], 2)
