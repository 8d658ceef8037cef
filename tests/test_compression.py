"""`compress_lora`: what the smaller adapter computes, which sizes there are, and what does not change."""

import copy
import math
from itertools import product

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.func import functional_call

from fim_lora import compress_lora, get_lora_spectrum
from fim_lora.compression import measure_sizes
from fim_lora.fisher.evaluation import mean_loss
from helpers.adapters import lora_layers
from helpers.every_layer_type import MODULES, NAMES, batches, every_type, outputs
from helpers.stock_peft import stock
from helpers.tiny_models import llama, lm_batches, token_batch
from helpers.trained_adapters import (
    a_of,
    b_of,
    b_with_core,
    components_of,
    deltas_of,
    fill,
    lora_layers_of,
    matrices_of,
    parts_of,
    spectrum_of,
    trained,
)


def weights_of(model):
    return {name: (id(value), value.detach().clone()) for name, value in model.named_parameters()}


def assert_same_weights(model, before):
    after = weights_of(model)
    assert after.keys() == before.keys()
    for name, (number, value) in before.items():
        if "attention.base_layer" in name:
            # PEFT merges and unmerges the adapter of an attention in every forward pass, and rounds.
            torch.testing.assert_close(after[name][1], value)
            continue
        assert after[name][0] == number, name
        assert torch.equal(after[name][1], value), name


# --- What the smaller adapter computes ---

OPTIONS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "alphas": {"alpha_pattern": {"linear": 3, "experts.down": 11, "attention": 5}, "rank_pattern": {"linear": 6}},
}


@pytest.mark.parametrize("serving", [False, True])
@pytest.mark.parametrize("with_data", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_function_is_the_sum_of_the_kept_components(options, with_data, serving):
    model = every_type(torch.float64, **options)
    spectrum = spectrum_of(model, batches()) if with_data else get_lora_spectrum(model, None)
    layers = lora_layers_of(model)
    assert set(layers) == set(spectrum) == set(NAMES)
    kept = spectrum.keep(int(0.75 * spectrum.num_parameters))
    expected = {name: components_of(layer, spectrum[name], kept[name]) for name, layer in layers.items()}
    result = compress_lora(model, spectrum, keep=0.75, serving=serving)
    assert result.ranks == spectrum.ranks_of(kept)
    after = lora_layers_of(model)
    assert set(after) == {name for name, rank in result.ranks.items() if rank}
    assert len(set(result.ranks.values())) > 1
    for name, layer in after.items():
        for found, truth in zip(deltas_of(layer), expected[name], strict=True):
            torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-6)
    scalings = {name: layer.scaling["default"] for name, layer in after.items()}
    config = model.peft_config["default"]
    if serving:  # a server reads only these
        global_scaling = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
        assert all(math.isclose(one, global_scaling) for one in scalings.values())
        assert math.isclose(global_scaling, 6 / (2 if config.use_rslora else 4))
    else:
        assert all(math.isclose(scalings[name], spectrum[name].scaling) for name in scalings)
    assert config.r == result.r == max(result.ranks.values())
    assert (config.lora_alpha, config.rank_pattern) == (result.lora_alpha, result.rank_pattern)
    assert config.alpha_pattern == result.alpha_pattern


def test_outputs_are_those_of_an_explicit_core():
    """The sum of the kept components as a core between B and A of the model before."""
    model = every_type(torch.float64)
    spectrum = spectrum_of(model, batches())
    kept = spectrum.keep(spectrum.num_parameters // 2)
    before = copy.deepcopy(model)
    names = {id(parameter): name for name, parameter in before.named_parameters()}
    replaced = {}
    for name, layer in lora_layers_of(before).items():
        core = torch.from_numpy(spectrum[name].left[:, :, kept[name]] @ spectrum[name].right[:, kept[name]]).double()
        for part, own in zip(parts_of(layer), core.chunk(len(parts_of(layer))), strict=True):
            replaced[names[id(b_of(part))]] = b_with_core(part, own)
    with torch.no_grad():
        expected = functional_call(before, replaced, (), batches([9])[0])["output"]
    compress_lora(model, spectrum, keep=0.5)
    torch.testing.assert_close(outputs(model), expected, rtol=1e-5, atol=1e-6)
    assert (expected - outputs(before)).abs().max() > 0.1


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}])
@pytest.mark.parametrize("serving", [False, True])
def test_biases_of_b(options, serving):
    model = trained(llama().double(), lora_bias=True, alpha_pattern={"v_proj": 9}, **options)
    spectrum = spectrum_of(model)
    before = copy.deepcopy(model)
    kept = spectrum.keep(spectrum.num_parameters // 2, at_least=dict.fromkeys(spectrum, 1))
    bias = {
        name: layer.scaling["default"] * layer.lora_B["default"].bias.detach()
        for name, layer in lora_layers(model).items()
    }
    expected = {
        name: components_of(layer, spectrum[name], kept[name])[0] for name, layer in lora_layers(before).items()
    }
    result = compress_lora(model, spectrum, keep=0.5, serving=serving)
    assert result.ranks == spectrum.ranks_of(kept)
    for name, layer in lora_layers(model).items():
        torch.testing.assert_close(layer.scaling["default"] * layer.lora_B["default"].bias, bias[name])
        torch.testing.assert_close(deltas_of(layer)[0], expected[name], rtol=1e-5, atol=1e-6)


def test_the_whole_adapter_stays_as_it_is():
    model = every_type()
    before, expected, config = weights_of(model), outputs(model), copy.deepcopy(model.peft_config["default"].to_dict())
    result = compress_lora(model, spectrum_of(model, batches()), keep=1.0)
    assert_same_weights(model, before)
    assert torch.equal(outputs(model), expected)
    assert result.ranks == result.ranks_before
    assert result.predicted == (0.0, 0.0)
    assert (result.share, result.dropped_layers) == (1.0, [])
    assert model.peft_config["default"].to_dict() == config


def test_all_components_under_another_scaling_keep_the_function():
    model = every_type(torch.float64, alpha_pattern={"linear": 3, "experts.down": 11, "attention": 5})
    expected = outputs(model)
    compress_lora(model, spectrum_of(model, batches()), keep=1.0, serving=True)
    torch.testing.assert_close(outputs(model), expected)
    assert {layer.scaling["default"] for layer in lora_layers(model).values()} == {1.5}


def test_factors_are_balanced():
    model = every_type()
    for layer in lora_layers_of(model).values():
        for part in parts_of(layer):
            a_of(part).data *= 10
    result = compress_lora(model, spectrum_of(model, batches()), keep=0.5)
    for name, layer in lora_layers_of(model).items():
        if result.ranks[name] == result.ranks_before[name]:
            continue  # nothing changed here
        for a, b in matrices_of(layer):
            assert len(a) == result.ranks[name] // spectrum_step(name)
            torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0), rtol=1e-4, atol=1e-7)


def spectrum_step(name):
    return 2 if name == "convolution" else 1


def test_without_data_the_kept_components_are_those_of_the_singular_value_decomposition():
    model = trained(llama().double())
    before = copy.deepcopy(model)
    result = compress_lora(model, get_lora_spectrum(model, None), keep=0.5)
    squares = []
    for name, layer in lora_layers(before).items():
        u, values, vt = torch.linalg.svd(deltas_of(layer)[0], full_matrices=False)
        squares += [(float(value**2) / sum(layer.get_base_layer().weight.shape), name) for value in values[:4]]
        rank = result.ranks[name]
        if rank:
            truncated = (u[:, :rank] * values[:rank]) @ vt[:rank]
            (found,) = deltas_of(lora_layers(model)[name])
            torch.testing.assert_close(found, truncated, rtol=1e-5, atol=1e-6)
    # One threshold over all layers, on the squared norm per parameter.
    kept = sorted(squares, reverse=True)[: sum(result.ranks.values())]
    assert result.ranks == {name: sum(one == name for _, one in kept) for name in result.ranks}
    assert result.predicted is None
    assert "without data" in str(result)


# --- Sizes ---


@pytest.mark.parametrize("keep", [0.1, 0.25, 0.5, 0.9])
def test_a_share_of_the_parameters(keep):
    model = trained(llama())
    spectrum = spectrum_of(model)
    result = compress_lora(model, spectrum, keep=keep)
    entries = sum(parameter.numel() for name, parameter in model.named_parameters() if "lora_" in name)
    assert entries == result.num_parameters
    assert keep - max(spectrum.costs.values()) / spectrum.num_parameters < result.share <= keep
    assert result.size == ("keep", keep)


@pytest.mark.parametrize("r", [1, 2, 3, 4, 9])
def test_the_parameters_of_a_uniform_rank(r):
    model = every_type()
    spectrum = spectrum_of(model, batches())
    result = compress_lora(model, spectrum, r=r)
    entries = sum(parameter.numel() for name, parameter in model.named_parameters() if "lora_" in name)
    assert entries == result.num_parameters <= r * sum(layer.parameters_per_rank for layer in spectrum.values())
    if r >= 4:
        assert result.share == 1


@pytest.mark.parametrize("r_max", [1, 2, 3])
def test_a_cap_on_every_rank(r_max):
    model = every_type()
    spectrum = spectrum_of(model, batches())
    result = compress_lora(model, spectrum, keep=1.0, r_max=r_max)
    steps = {name: 2 if name == "convolution" else 1 for name in spectrum}
    assert result.ranks == {name: r_max // steps[name] * steps[name] for name in spectrum}
    assert model.peft_config["default"].r == r_max
    assert ("convolution" in lora_layers(model)) == (r_max > 1)


def test_the_smallest_adapter_within_a_measured_increase():
    data = lm_batches(3)
    model = trained(llama())
    spectrum, start = spectrum_of(model), copy.deepcopy(model)
    loss_before = mean_loss(start, data, show_progress_bar=False)
    for increase in (0.0, 0.05, 0.3, 1.0):
        model = copy.deepcopy(start)
        result = compress_lora(
            model, spectrum, max_loss_increase=increase, eval_dataloader=data, show_progress_bar=False
        )
        loss_after = mean_loss(model, data, show_progress_bar=False)
        assert result.loss_before == pytest.approx(loss_before)
        assert result.loss_after == pytest.approx(loss_after, rel=1e-5)
        assert loss_after <= loss_before + increase + 1e-6
        assert result.loss_increase == result.loss_after - result.loss_before
        # With one component less the increase is larger.
        count = sum(result.ranks.values())
        if count > 1:
            kept = list(spectrum.order())[: count - 1]
            fewer = copy.deepcopy(start)
            numbers = {name: [one.number for one in kept if one.layer == name] for name in spectrum}
            for name, layer in lora_layers(fewer).items():
                (delta,) = components_of(layer, spectrum[name], sorted(numbers[name]))
                layer.get_base_layer().weight.data += delta.float()
            with fewer.disable_adapter():
                assert mean_loss(fewer, data, show_progress_bar=False) > loss_before + increase


def test_measured_losses_beside_another_size():
    data = lm_batches(3)
    model = trained(llama())
    before = mean_loss(model, data, show_progress_bar=False)
    result = compress_lora(model, spectrum_of(model), keep=0.3, eval_dataloader=iter(data), show_progress_bar=False)
    assert result.loss_before == pytest.approx(before)
    assert result.loss_after == pytest.approx(mean_loss(model, data, show_progress_bar=False), rel=1e-5)


def test_losses_of_several_sizes_are_those_after_a_truncation():
    data = lm_batches(2)
    model = trained(llama())
    spectrum, before = spectrum_of(model), weights_of(model)
    sizes = [1, spectrum.num_parameters // 4, spectrum.num_parameters]
    measured = measure_sizes(model, spectrum, sizes, iter(data), show_progress_bar=False)
    assert_same_weights(model, before)
    assert len(measured) == 2  # no component has a single parameter
    for parameters, loss in measured:
        copied = copy.deepcopy(model)
        result = compress_lora(copied, spectrum, keep=parameters / spectrum.num_parameters)
        assert result.num_parameters == parameters
        assert loss == pytest.approx(mean_loss(copied, data, show_progress_bar=False), rel=1e-5)


def test_an_autocast_around_everything_rounds_no_weights_and_sees_the_present_ones():
    """Autocast keeps the cast of a parameter until its block ends, also when the parameter changes."""
    data = lm_batches(2)
    model = trained(llama())
    spectrum, copied = spectrum_of(model), copy.deepcopy(model)

    def in_autocast(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return model(**batch).loss

    whole = mean_loss(model, data, in_autocast, show_progress_bar=False)
    compress_lora(copied, spectrum, keep=1 / 8)
    small = mean_loss(copied, data, in_autocast, show_progress_bar=False)
    assert abs(small - whole) > 0.04
    with torch.autocast("cpu", torch.bfloat16):
        assert mean_loss(model, data, show_progress_bar=False) == whole
        [(_, loss)] = measure_sizes(model, spectrum, [spectrum.num_parameters // 8], data, show_progress_bar=False)
        assert loss == pytest.approx(small, rel=1e-2)
        assert mean_loss(model, data, show_progress_bar=False) == whole
        result = compress_lora(model, spectrum, keep=1 / 8, eval_dataloader=data, show_progress_bar=False)
        assert result.loss_after == loss
        assert mean_loss(model, data, show_progress_bar=False) == small
    for (name, found), expected in zip(model.named_parameters(), copied.parameters(), strict=True):
        assert torch.equal(found, expected), name


def own_mean_loss(model, data):
    """The loss over all labels together; nothing predicts the first one of a sequence."""
    terms = [int((batch["labels"][:, 1:] != -100).sum()) for batch in data]
    with torch.no_grad():
        return sum(model(**batch).loss.item() * n for batch, n in zip(data, terms, strict=True)) / sum(terms)


def test_the_loss_of_batches_has_the_weight_of_their_labels():
    data = [token_batch(2, 4, seed=0), token_batch(7, 14, seed=1)]
    model = trained(llama()).train()
    modes = [module.training for module in model.modules()]
    found = mean_loss(model, data, show_progress_bar=False)
    assert [module.training for module in model.modules()] == modes
    assert found == pytest.approx(own_mean_loss(model.eval(), data))
    with pytest.raises(ValueError, match="yielded no batch"):
        mean_loss(model, [], show_progress_bar=False)
    empty = data[0] | {"labels": torch.full_like(data[0]["labels"], -100)}
    with pytest.raises(ValueError, match=r"The loss of a batch of `eval_dataloader` is nan"):
        mean_loss(model, [empty], show_progress_bar=False)


# --- What does not change ---


def test_an_adapter_with_the_same_config_object_keeps_its_config():
    config = LoraConfig(r=4, target_modules=["q_proj"])
    model = get_peft_model(llama(1), config, "one")
    model.add_adapter("two", config)
    for name in ("one", "two"):
        fill(model, name)
    before = copy.deepcopy(config.to_dict())
    compress_lora(model, get_lora_spectrum(model, None, adapter_name="one"), keep=0.5)
    assert model.peft_config["two"].to_dict() == model.base_model.peft_config["two"].to_dict() == before
    assert model.peft_config["one"].r == model.base_model.peft_config["one"].r == 2


def test_everything_else_stays():
    """dtypes, `requires_grad`, objects, dropout, training mode, other adapters, and modules that are trained whole."""
    base = llama(tie_word_embeddings=False).bfloat16()
    model = trained(base, lora_dropout=0.25, modules_to_save=["lm_head"], bias="all")
    model.add_adapter("other", LoraConfig(r=3, target_modules=["q_proj", "o_proj"], lora_dropout=0.5))
    fill(model, "other")
    model.train()
    layers = lora_layers(model)
    first, *_, last = layers.values()
    a_of(first).requires_grad_(False)
    for part in (last.lora_A, last.lora_B):
        part["default"].to(torch.bfloat16)
    last.lora_dropout["default"].eval()
    before = {id(value): (value.dtype, value.requires_grad) for value in model.parameters()}
    others = {name: value.clone() for name, value in model.named_parameters() if ".default" not in name}
    modes = {name: module.training for name, module in model.named_modules()}
    dropouts = {name: layer.lora_dropout["default"] for name, layer in layers.items()}
    config = copy.deepcopy(model.peft_config["other"].to_dict())
    spectrum = spectrum_of(model)
    result = compress_lora(model, spectrum, keep=0.5)
    assert len(set(result.ranks.values())) > 1
    after = dict(model.named_parameters())
    assert {id(value): (value.dtype, value.requires_grad) for value in after.values()}.items() <= before.items()
    assert len(before) - len(after) == 2 * len(result.dropped_layers)
    for name, value in others.items():
        if name in after:
            assert torch.equal(after[name], value), name
    assert {name: module.training for name, module in model.named_modules()}.items() <= modes.items()
    for name, layer in lora_layers(model).items():
        assert layer.lora_dropout["default"] is dropouts[name]
    assert model.peft_config["other"].to_dict() == config
    assert model.active_adapters == ["default"]
    assert a_of(first).shape[0] == next(iter(result.ranks.values()))


# PEFT merges and unmerges both adapters of an attention in every forward pass.
@pytest.mark.filterwarnings("ignore:Already following adapters were merged:UserWarning")
def test_another_adapter_keeps_its_gradients_where_a_layer_is_dropped():
    names = [name for name in NAMES if name in MODULES]
    model = every_type(names=names)
    model.add_adapter("other", LoraConfig(r=2, target_modules=names))
    fill(model, "other")
    model.base_model.set_adapter(["default", "other"])
    model(**batches([9])[0])["loss"].backward()
    gradients = {name: value.grad.clone() for name, value in model.named_parameters() if ".other" in name}
    removed = {value for name, value in model.named_parameters() if "lora_" in name and ".default" in name}
    result = compress_lora(model, get_lora_spectrum(model, None), keep=0.1)
    assert len(result.dropped_layers) >= 2
    left = dict(model.named_parameters())
    for name, gradient in gradients.items():
        assert left[name].grad is not None, name
        assert torch.equal(left[name].grad, gradient), name
    assert all(value.grad is None for value in removed)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_layers_that_lose_their_adapter_are_plain_again(options):
    model = every_type(**options)
    spectrum = spectrum_of(model, batches())
    types = {name: type(layer.get_base_layer()) for name, layer in lora_layers_of(model).items()}
    alphas = {name: layer.lora_alpha["default"] for name, layer in lora_layers_of(model).items()}
    result = compress_lora(model, spectrum, keep=0.1, serving=True)
    assert len(result.dropped_layers) >= 4
    assert {name: result.alphas[name] for name in result.dropped_layers} == {
        name: pytest.approx(alphas[name]) for name in result.dropped_layers
    }
    base = model.get_base_model()
    for name in result.dropped_layers:
        if name.startswith("experts"):
            assert name not in lora_layers_of(model)
            continue
        assert type(base.get_submodule(name)) is types[name]
    if {"experts.up", "experts.down"} <= set(result.dropped_layers):
        assert type(base.experts).__name__ == "Experts"


def test_training_goes_on():
    model = every_type().train()
    compress_lora(model, spectrum_of(model, batches()), keep=0.5)
    weights = [value for value in model.parameters() if value.requires_grad]
    assert all("lora_" in name for name, value in model.named_parameters() if value.requires_grad)
    optimizer, losses = torch.optim.Adam(weights, lr=3e-3), []
    for _ in range(20):
        loss = sum(model(**batch)["loss"] for batch in batches())
        optimizer.zero_grad()
        loss.backward()
        assert all(weight.grad is not None and weight.grad.any() for weight in weights)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_twice_in_a_row():
    model = every_type(torch.float64)
    first = compress_lora(model, spectrum_of(model, batches()), keep=0.7)
    spectrum = spectrum_of(model, batches())
    assert spectrum.num_parameters == first.num_parameters
    kept = spectrum.keep(spectrum.num_parameters // 2)
    expected = {
        name: components_of(layer, spectrum[name], kept[name]) for name, layer in lora_layers_of(model).items()
    }
    second = compress_lora(model, spectrum, keep=0.5)
    assert second.num_parameters < first.num_parameters
    for name, layer in lora_layers_of(model).items():
        for found, truth in zip(deltas_of(layer), expected[name], strict=True):
            torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-6)


# --- Stock PEFT in another process ---


def test_stock_peft_loads_every_layer_type(tmp_path):
    folders = []
    for serving, keep in product((False, True), (0.15, 0.6)):
        model = every_type(alpha_pattern={"linear": 3, "experts.down": 11, "attention": 5})
        result = compress_lora(model, spectrum_of(model, batches()), keep=keep, serving=serving)
        assert bool(result.dropped_layers) == (keep < 0.5)
        folders.append(str(tmp_path / f"{serving} {keep}"))
        model.save_pretrained(folders[-1])
        torch.save(outputs(model), f"{folders[-1]}/outputs.pt")
    stock(f"""
        warnings.simplefilter("ignore")  # of PEFT, about groups and Conv1D
        from helpers.every_layer_type import EveryType, outputs
        for folder in {folders!r}:
            model = PeftModel.from_pretrained(EveryType(), folder).eval()
            expected = torch.load(folder + "/outputs.pt")
            torch.testing.assert_close(outputs(model), expected, rtol=1e-5, atol=1e-5)
    """)
