"""What people do with a trained adapter of unequal ranks: merge, combine, swap and switch it, by PEFT's functions."""

import math

import peft
import pytest
import torch
from packaging.version import Version
from peft import PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter, hotswap_adapter_from_state_dict, prepare_model_for_compiled_hotswap
from peft.utils.save_and_load import load_peft_weights
from torch import nn

from fim_lora import initialize_lora_fim_ranks
from helpers.adapters import fim_lora_config, fim_model, logits, lora_layers, randomize
from helpers.stock_peft import stock
from helpers.tiny_models import llama, lm_batches, token_batch

# Each has a side of 24, so that an SVD of rank 24 loses nothing.
TARGETS = ("q_proj", "o_proj", "down_proj")
RISING, FALLING = (1, 2, 3, 4, 5, 6), (6, 5, 4, 3, 2, 1)


def trained(base=None, **options):
    model = fim_model(base, score_exponent=0.5, **options)
    allocation = initialize_lora_fim_ranks(model, lm_batches(), show_progress_bar=False)
    assert len(set(allocation.ranks.values())) > 1
    randomize(model)
    return model, allocation


def two_adapters(scores=(RISING, FALLING), **options):
    """Two trained adapters on one model, with ranks from given scores."""
    base_rank = options.pop("r", 4)
    config = fim_lora_config(r=base_rank, target_modules=TARGETS, score_exponent=0.5, **options)
    torch.manual_seed(1)
    model = get_peft_model(llama(), config, "one")
    model.add_adapter("two", fim_lora_config(r=base_rank, target_modules=TARGETS, score_exponent=0.5, **options))
    allocations = []
    for name, values in zip(("one", "two"), scores, strict=True):
        given = dict(zip(lora_layers(model, name), map(float, values), strict=True))
        allocations.append(initialize_lora_fim_ranks(model, fim_scores=given, adapter_name=name))
    randomize(model)
    return model, *allocations


def delta_by_hand(layer, alpha, rank, adapter="default", use_rslora=False):
    """`scaling · B A` of a linear layer; alpha and rank are those of the allocation, not those of the layer."""
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    assert (a.shape[0], b.shape[1]) == (rank, rank)
    return alpha / (math.sqrt(rank) if use_rslora else rank) * (b @ a)


# --- Merging ---


@pytest.mark.parametrize("adjust", [True, False])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_merged_weights_are_those_computed_by_hand(use_rslora, adjust):
    model, allocation = trained(use_rslora=use_rslora, lora_alpha=5, adjust_scaling_factors=adjust)
    expected, base = logits(model), llama()
    with torch.no_grad():
        weights = {
            name: base.get_submodule(name).weight
            + delta_by_hand(layer, allocation.alphas[name], allocation.ranks[name], use_rslora=use_rslora)
            for name, layer in lora_layers(model).items()
        }
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    for name, parameter in base.named_parameters():
        weight = weights.get(name.removesuffix(".weight"), parameter)
        torch.testing.assert_close(merged.get_parameter(name), weight, rtol=1e-5, atol=1e-6, msg=name)


def test_merged_dora_has_the_trained_magnitudes():
    model, allocation = trained(use_dora=True, lora_alpha=5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.abs_().add_(1)  # norms are positive
    expected, base, weights = logits(model), llama(), {}
    with torch.no_grad():
        for name, layer in lora_layers(model).items():
            updated = base.get_submodule(name).weight + delta_by_hand(
                layer, allocation.alphas[name], allocation.ranks[name]
            )
            magnitude = layer.lora_magnitude_vector["default"].weight
            weights[name] = magnitude[:, None] * updated / updated.norm(dim=1, keepdim=True)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    for name, weight in weights.items():
        torch.testing.assert_close(merged.get_submodule(name).weight, weight, rtol=1e-4, atol=1e-5)


def test_a_merged_embedding():
    base = llama(tie_word_embeddings=False)
    model, allocation = trained(base, target_modules=("embed_tokens", "q_proj"), lora_alpha=5)
    name, before = "model.embed_tokens", llama(tie_word_embeddings=False)
    layer, rank = lora_layers(model)[name], allocation.ranks[name]
    a, b = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    assert rank == len(a) != 8
    with torch.no_grad():
        weight = before.model.embed_tokens.weight + allocation.alphas[name] / rank * (b @ a).T
    expected = logits(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(merged.model.embed_tokens.weight, weight, rtol=1e-5, atol=1e-6)


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.narrow = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return self.narrow(torch.tanh(self.wide(x)))


def test_merged_convolutions():
    base = Convolutions()
    model = get_peft_model(base, fim_lora_config(r=4, target_modules=("wide", "narrow"), lora_alpha=5)).eval()
    allocation = initialize_lora_fim_ranks(model, fim_scores={"wide": 3.0, "narrow": 1.0})
    assert allocation.ranks == {"wide": 6, "narrow": 2}
    randomize(model)
    x = torch.randn(2, 3, 5, 5)
    with torch.no_grad():
        expected, weights = model(x), {}
        for name, layer in lora_layers(model).items():
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            # B is a convolution of 1 × 1 after A.
            delta = torch.einsum("or,rikl->oikl", b[:, :, 0, 0], a)
            weights[name] = (
                Convolutions().get_submodule(name).weight + allocation.alphas[name] / allocation.ranks[name] * delta
            )
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(x), expected, rtol=1e-4, atol=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(merged.get_submodule(name).weight, weight, rtol=1e-5, atol=1e-6)


# --- Combining ---


def weighted_sum_by_hand(model, one, two, weights):
    return {
        name: sum(
            weight * delta_by_hand(layer, allocation.alphas[name], allocation.ranks[name], adapter)
            for adapter, allocation, weight in (("one", one, weights[0]), ("two", two, weights[1]))
        )
        for name, layer in lora_layers(model, "one").items()
    }


# PEFT before 0.21 applies the scaling twice for an SVD, which makes a difference unless the scaling is 1.
BY_SVD_WITH_SCALING = pytest.mark.skipif(Version(peft.__version__) < Version("0.21"), reason="scaling counts twice")


@pytest.mark.parametrize(
    ("combination_type", "svd_rank", "lora_alpha", "adjust"),
    [
        ("cat", None, 5, True),
        ("cat", None, 5, False),
        ("svd", 24, 4, True),
        ("svd", 12, 4, True),
        pytest.param("svd", 24, 5, True, marks=BY_SVD_WITH_SCALING),
        pytest.param("svd", 24, 5, False, marks=BY_SVD_WITH_SCALING),
    ],
)
def test_weighted_sums_of_unequal_ranks(tmp_path, combination_type, svd_rank, lora_alpha, adjust):
    model, one, two = two_adapters(lora_alpha=lora_alpha, adjust_scaling_factors=adjust)
    assert one.ranks != two.ranks
    # No update has a rank above the sum of both, so 12 is large enough for an SVD.
    assert max(one.ranks[name] + two.ranks[name] for name in one.ranks) <= 12
    weights = (0.7, -0.4)
    model.add_weighted_adapter(["one", "two"], weights, "sum", combination_type, svd_rank=svd_rank)
    truth = weighted_sum_by_hand(model, one, two, weights)
    for name, layer in lora_layers(model, "sum").items():
        torch.testing.assert_close(layer.get_delta_weight("sum"), truth[name], rtol=1e-4, atol=1e-4)

    model.set_adapter("sum")
    base = llama()
    with torch.no_grad():
        for name, delta in truth.items():
            base.get_submodule(name).weight.add_(delta)
    torch.testing.assert_close(logits(model), logits(base), rtol=1e-3, atol=1e-3)
    for parameter in model.parameters():
        # The SVD of PEFT 0.18 gives tensors that are not contiguous, and saving them raises an error.
        parameter.data = parameter.data.contiguous()
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "sum")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)


def test_a_weighted_sum_with_an_adapter_that_lost_layers():
    """If one adapter has rank 0, the sum is the update of the other adapter."""
    scores = ((0, *RISING[1:]), FALLING)
    model, one, two = two_adapters(scores, lora_alpha=5, r_min=0)
    (lost,) = one.dropped_layers
    model.add_weighted_adapter(["one", "two"], [0.7, 0.3], "sum", "cat")
    layers = lora_layers(model, "sum")
    assert layers.keys() == two.ranks.keys()
    truth = 0.3 * delta_by_hand(layers[lost], two.alphas[lost], two.ranks[lost], "two")
    torch.testing.assert_close(layers[lost].get_delta_weight("sum"), truth, rtol=1e-4, atol=1e-5)


FACTOR_BY_FACTOR = ["linear", "ties", "dare_linear", "magnitude_prune"]


@pytest.mark.parametrize("combination_type", FACTOR_BY_FACTOR)
def test_combinations_that_need_equal_ranks_are_refused_by_the_largest_rank(combination_type):
    """PEFT compares the largest rank of each adapter, and raises before it changes anything."""
    model, one, two = two_adapters((RISING, (60, 1, 1, 1, 1, 1)))
    assert max(one.ranks.values()) != max(two.ranks.values())
    before = set(model.state_dict())
    with pytest.raises(ValueError, match="All adapters must have the same r value"):
        model.add_weighted_adapter(["one", "two"], [0.7, 0.3], "sum", combination_type, density=0.5)
    assert "sum" not in model.peft_config
    assert set(model.state_dict()) == before


@pytest.mark.parametrize("combination_type", FACTOR_BY_FACTOR)
def test_combinations_that_need_equal_ranks_fail_late_where_only_the_largest_agree(combination_type):
    """PEFT does not compare layer by layer. The incomplete adapter can be deleted and does not affect the others."""
    model, one, two = two_adapters()
    assert max(one.ranks.values()) == max(two.ranks.values())
    assert one.ranks != two.ranks
    model.set_adapter("two")
    before = logits(model)
    with pytest.raises(RuntimeError, match="stack expects each tensor to be equal size"):
        model.add_weighted_adapter(["one", "two"], [0.7, 0.3], "sum", combination_type, density=0.5)
    assert torch.equal(logits(model), before)
    if "sum" in model.peft_config:
        model.delete_adapter("sum")
        model.set_adapter("two")
    assert torch.equal(logits(model), before)
    model.add_weighted_adapter(["one", "two"], [0.7, 0.3], "sum", "cat")
    truth = weighted_sum_by_hand(model, one, two, (0.7, 0.3))
    for name, layer in lora_layers(model, "sum").items():
        torch.testing.assert_close(layer.get_delta_weight("sum"), truth[name], rtol=1e-4, atol=1e-4)


def test_linear_combination_of_adapters_with_the_same_allocation():
    """PEFT adds A to A and B to B, each with the square root of its weight and scaling."""
    model, one, two = two_adapters((RISING, RISING), lora_alpha=5)
    assert one.ranks == two.ranks
    assert len(set(one.ranks.values())) > 1
    model.add_weighted_adapter(["one", "two"], [0.7, 0.3], "sum", "linear")
    for name, layer in lora_layers(model, "sum").items():
        scaling = one.alphas[name] / one.ranks[name]
        a, b = (
            math.sqrt(0.7 * scaling) * factor["one"].weight + math.sqrt(0.3 * scaling) * factor["two"].weight
            for factor in (layer.lora_A, layer.lora_B)
        )
        torch.testing.assert_close(layer.get_delta_weight("sum"), b @ a, rtol=1e-5, atol=1e-6)


# --- Hot-swapping ---


def swappable(folder, **options):
    model, one, two = two_adapters(lora_alpha=5, **options)
    model.save_pretrained(folder)
    fresh = PeftModel.from_pretrained(llama(), folder / "two")
    swapped = PeftModel.from_pretrained(llama(), folder / "one")
    assert (logits(swapped) - logits(fresh)).abs().max() > 0.1
    return swapped, logits(fresh), one, two


def swap(model, folder, config):
    """Does the same as `hotswap_adapter` after its comparison of the configs."""
    weights = load_peft_weights(str(folder), device="cpu")
    weights = {name.replace(".weight", ".default.weight"): value for name, value in weights.items()}
    hotswap_adapter_from_state_dict(model, weights, "default", config)


def prepare(model, one, two):
    target_rank = max(*one.ranks.values(), *two.ranks.values())
    prepare_model_for_compiled_hotswap(model, target_rank=target_rank)
    for layer in lora_layers(model).values():
        assert len(layer.lora_A["default"].weight) == target_rank


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("serving", [False, True])
@pytest.mark.parametrize("prepared", [False, True])
def test_hot_swapping_adapters_of_one_scaling(tmp_path, prepared, serving, use_rslora):
    """PEFT scales every layer by the global numbers, which are correct for adapters with adjusted scaling."""
    model, expected, one, two = swappable(tmp_path, use_rslora=use_rslora)
    if prepared:
        before = logits(model)
        prepare(model, one, two)
        torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    config = PeftModel.from_pretrained(llama(), tmp_path / "two").peft_config["default"]
    swap(model, tmp_path / "two", two.to_lora_config(config, serving=True) if serving else config)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


def test_hot_swapping_by_name_asks_for_equal_alpha_patterns(tmp_path):
    """Adapters of different ranks and one scaling have different patterns of alpha; PEFT refuses them unchanged."""
    model, _, one, two = swappable(tmp_path)
    assert one.alpha_pattern != two.alpha_pattern
    before = logits(model)
    with pytest.raises(ValueError, match="Configs are incompatible: for alpha_pattern"):
        hotswap_adapter(model, str(tmp_path / "two"), "default", torch_device="cpu")
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("prepared", [False, True])
def test_hot_swapping_by_name_an_adapter_of_the_same_allocation(tmp_path, prepared):
    scores = (RISING, RISING)
    model, expected, one, two = swappable(tmp_path, scores=scores)
    assert one.alpha_pattern == two.alpha_pattern != {}
    if prepared:
        prepare(model, one, two)
    hotswap_adapter(model, str(tmp_path / "two"), "default", torch_device="cpu")
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prepared", [False, True])
def test_hot_swapping_adapters_of_unequal_scalings_needs_the_scalings_set(tmp_path, prepared):
    """PEFT does not match the patterns against the layers here, so the scalings of the ranks are set by hand."""
    model, expected, one, two = swappable(tmp_path, adjust_scaling_factors=False)
    if prepared:
        prepare(model, one, two)
    hotswap_adapter(model, str(tmp_path / "two"), "default", torch_device="cpu")
    for name, layer in lora_layers(model).items():
        scaling = two.alphas[name] / two.ranks[name]
        if prepared:
            layer.scaling["default"].fill_(scaling)
        else:
            layer.scaling["default"] = scaling
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


# --- Switching ---


def test_switching_between_two_adapters_equals_each_alone_in_stock_peft(tmp_path):
    model, one, two = two_adapters(lora_alpha=5, task_type="CAUSAL_LM")
    assert one.ranks != two.ranks
    model.save_pretrained(tmp_path)
    stock(f"""
        for name in ("one", "two"):
            model = PeftModel.from_pretrained(llama(), {str(tmp_path)!r} + "/" + name).eval()
            with torch.no_grad():
                torch.save(model(**token_batch()).logits, {str(tmp_path)!r} + "/" + name + ".pt")
    """)
    alone = {name: torch.load(tmp_path / f"{name}.pt") for name in ("one", "two")}
    assert (alone["one"] - alone["two"]).abs().max() > 0.1
    for name in ("one", "two", "one"):
        model.set_adapter(name)
        torch.testing.assert_close(logits(model), alone[name], rtol=1e-5, atol=1e-5)
        trained = {key.split(".")[-2] for key, p in model.named_parameters() if p.requires_grad}
        assert trained == {name}
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama()))
    model.delete_adapter("one")
    model.set_adapter("two")
    torch.testing.assert_close(logits(model), alone["two"], rtol=1e-5, atol=1e-5)
    assert {name: layer.r for name, layer in lora_layers(model, "two").items()} == {
        name: {"two": rank} for name, rank in two.ranks.items()
    }


def test_an_adapter_allocated_beside_a_trained_one():
    """The allocation of the second adapter neither reads nor changes the first, whichever is active."""
    model, _ = trained()
    expected = logits(model)
    model.add_adapter("two", fim_lora_config(score_exponent=0.5))
    for active in ("default", "two"):
        model.set_adapter(active)
        if active == "two":
            model.train()
            for batch in lm_batches():
                model(**batch).loss.backward()
    allocation = initialize_lora_fim_ranks(model, adapter_name="two")
    reference = initialize_lora_fim_ranks(fim_model(score_exponent=0.5), lm_batches(), show_progress_bar=False)
    assert allocation.ranks == reference.ranks
    assert torch.equal(logits(model), logits(llama()))
    model.set_adapter("default")
    assert torch.equal(logits(model), expected)
    model.delete_adapter("default")
    model.set_adapter("two")
    assert torch.equal(logits(model), logits(llama()))
    assert model(**token_batch()).logits.requires_grad
