"""The methods that begin wide: when they cut, to what size, and at which learning rate."""

import pytest
import torch

import quality_cuts
import quality_methods
import quality_tasks
import quality_training
from fim_lora import get_lora_spectrum
from helpers.benchmark_runs import CALIBRATION_BATCHES, STEPS, tiny_setting
from helpers.own_warnings import FEWER_BATCHES
from quality_results import Run

RANK = 2


RATE = 1e-2
WEIGHT = "bert.encoder.layer.0.intermediate.dense"


def trained(method, monkeypatch):
    """After every step: the adapter's parameters, how far one weight of it moved, and how many steps Adam knows of."""
    model = quality_training.METHODS[method](tiny_setting())
    optimizers = []
    made = quality_training.optimizer_and_schedule

    def keep(*arguments):
        optimizer, schedule = made(*arguments)
        optimizers.append(optimizer)
        return optimizer, schedule

    monkeypatch.setattr(quality_training, "optimizer_and_schedule", keep)
    bench = quality_training.Bench("", {}, torch.device("cpu"))
    data = iter([CALIBRATION_BATCHES[step % len(CALIBRATION_BATCHES)] for step in range(STEPS)])
    run = Run("banking77", "all-linear", RANK, method, RATE, 0, STEPS)
    weight = model.base_model.model.get_submodule(WEIGHT).lora_B["default"].weight
    sizes, moves, numbers = [], [], []
    before = weight.detach().clone()
    for _ in bench._train(model, quality_tasks.TASKS["banking77"], run, data):
        sizes.append(quality_methods.adapter_parameters(model))
        moves.append((weight - before).abs().max().item() if weight.shape == before.shape else None)
        numbers.append(int(optimizers[0].state[weight]["step"]) if weight in optimizers[0].state else 0)
        before = weight.detach().clone()
    monkeypatch.setattr(quality_training, "optimizer_and_schedule", made)
    return sizes, moves, numbers


def size_of(rank):
    return quality_methods.adapter_parameters(tiny_setting().adapted(tiny_setting().config(rank)))


@FEWER_BATCHES
@pytest.mark.parametrize(
    ("method", "cut_step"),
    [("cut", 4), ("cut-10%", 2), ("cut-50%", 10), ("cut-random", 4), ("cut-by-norm", 4), ("cut-with-gains", 4)],
)
def test_the_adapter_is_cut_once(method, cut_step, monkeypatch):
    sizes, _, _ = trained(method, monkeypatch)
    assert sizes[: cut_step - 1] == [size_of(4 * RANK)] * (cut_step - 1)
    assert len(set(sizes[cut_step - 1 :])) == 1
    assert 0.9 * size_of(RANK) <= sizes[-1] <= size_of(RANK)


def test_two_cuts_are_in_geometric_progression(monkeypatch):
    sizes, _, _ = trained("cut-twice", monkeypatch)
    assert sizes[:1] == [size_of(8)]
    assert 0.9 * size_of(4) <= sizes[1] == sizes[2] <= size_of(4)
    assert 0.9 * size_of(2) <= sizes[3] <= size_of(2)
    scales = [phase.wide_scale for phase in quality_cuts.CUTS["cut-twice"].phases(2, 120)]
    assert scales == pytest.approx([1 / 4, 1 / 2])


@pytest.mark.parametrize(("method", "scale"), [("cut", 1 / 4), ("cut-root-rate", 1 / 2), ("cut-full-rate", 1)])
def test_the_rate_is_smaller_before_the_cut(method, scale, monkeypatch):
    """Adam's first step moves every weight of B by the learning rate, which is half of its peak in the warm-up."""
    _, moves, _ = trained(method, monkeypatch)
    assert moves[0] == pytest.approx(RATE / 2 * scale, rel=1e-3)


def test_a_fresh_optimizer_forgets_the_adapter(monkeypatch):
    _, _, kept = trained("cut", monkeypatch)
    assert kept == list(range(1, STEPS + 1))
    _, _, fresh = trained("cut-fresh-optimizer", monkeypatch)
    assert fresh == [1, 2, 3, 0, *range(1, STEPS - 3)]


def test_random_components_are_of_every_layer():
    """Layers of unequal cost keep as many of their components on average."""
    torch.manual_seed(0)
    model = tiny_setting().adapted(tiny_setting().config(8))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    spectrum = get_lora_spectrum(model, None)
    costs = set(spectrum.costs.values())
    assert len(costs) > 1
    kept = dict.fromkeys(costs, 0)
    for seed in range(20):
        shuffled = quality_cuts._shuffled(spectrum, seed)
        for name, rank in shuffled.ranks_of(shuffled.keep(shuffled.num_parameters // 2)).items():
            kept[spectrum.costs[name]] += rank
    shares = [kept[cost] / sum(8 * 20 for one in spectrum.costs.values() if one == cost) for cost in costs]
    assert shares == pytest.approx([0.5] * len(costs), abs=0.06)


def test_a_slow_start_has_a_quarter_of_the_rate(monkeypatch):
    _, moves, _ = trained(quality_cuts.SLOW_START, monkeypatch)
    assert moves[0] == pytest.approx(RATE / 2 / 4, rel=1e-3)
    sizes, uniform, _ = trained("uniform", monkeypatch)
    assert uniform[0] == pytest.approx(RATE / 2, rel=1e-3)
    assert set(sizes) == {size_of(RANK)}


def test_rows_of_a_keep_their_norms_and_nothing_jumps():
    model = tiny_setting().adapted(tiny_setting().config(4))
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad])
    model(**CALIBRATION_BATCHES[0]).loss.backward()
    optimizer.step()
    model.eval()
    before = model(**CALIBRATION_BATCHES[1]).logits.detach()
    norms = {name: 2.0 for name, _ in quality_cuts._lora_layers(model)}
    quality_cuts._rescale(model, optimizer, norms)
    torch.testing.assert_close(model(**CALIBRATION_BATCHES[1]).logits, before, rtol=1e-4, atol=1e-5)
    assert quality_cuts._mean_norms_of_a(model) == pytest.approx(norms, rel=1e-5)
