"""What resizing changes in an adapter, and what it leaves as it was."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn

from fim_lora import get_fim_scores, initialize_lora_fim_ranks
from fim_lora.adapter.config_writer import config_with_ranks
from fim_lora.adapter.lora_layers import adapter_layers, layers_rebuilt_together
from fim_lora.adapter.resize import Factors, resize_adapter
from helpers.adapters import fim_lora_config, fim_model, hooks_of, logits, lora_layers, randomize
from helpers.attention import Attention, attention_batches
from helpers.mixtures import TARGETS, Mixture
from helpers.proportional import proportional
from helpers.single_layers import batches_of, floats
from helpers.tiny_models import gpt2, llama, lm_batches, token_batch


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("adjust", [True, False])
def test_ranks_scalings_and_fresh_weights(use_rslora, adjust):
    model = fim_model(use_rslora=use_rslora, adjust_scaling_factors=adjust, lora_alpha=12)
    before = logits(llama())
    allocation = initialize_lora_fim_ranks(model, lm_batches(), show_progress_bar=False)
    root = math.sqrt if use_rslora else float
    for name, layer in lora_layers(model).items():
        rank = allocation.ranks[name]
        assert layer.r["default"] == rank == layer.lora_A["default"].out_features
        assert layer.lora_A["default"].weight.shape[0] == layer.lora_B["default"].weight.shape[1] == rank
        assert layer.scaling["default"] == pytest.approx(12 / root(8) if adjust else 12 / root(rank))
        assert layer.lora_B["default"].weight.count_nonzero() == 0
        # Kaiming-uniform with a=sqrt(5), PEFT's default for A: within ± 1/sqrt(d_in).
        largest = layer.lora_A["default"].weight.abs().max().item()
        assert 0.5 / math.sqrt(layer.in_features) < largest <= 1 / math.sqrt(layer.in_features)
    assert torch.equal(logits(model), before)


def test_what_stays():
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.3), "other")
    model.add_adapter("default", fim_lora_config(lora_dropout=0.2, bias="none"))
    model.set_adapter("default")
    model.train()
    model.base_model.model.model.layers[0].eval()
    layer = lora_layers(model)["model.layers.1.self_attn.q_proj"]
    layer.lora_A["default"].weight.requires_grad_(False)
    dropout, other = layer.lora_dropout["default"], layer.lora_A["other"].weight
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    base = {name: value.clone() for name, value in model.named_parameters() if "default" not in name}

    initialize_lora_fim_ranks(model, lm_batches(), show_progress_bar=False)

    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert layer.lora_dropout["default"] is dropout
    assert layer.lora_A["other"].weight is other
    assert all(torch.equal(parameter, base[name]) for name, parameter in model.named_parameters() if name in base)
    assert model.active_adapters == ["default"]
    assert not hooks_of(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_of_the_adapter_stays(dtype):
    torch.manual_seed(1)
    model = get_peft_model(llama().bfloat16(), fim_lora_config(), autocast_adapter_dtype=dtype == torch.float32)
    initialize_lora_fim_ranks(model, lm_batches(), show_progress_bar=False)
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {dtype}


def test_dora_starts_at_the_base_model():
    model = fim_model(use_dora=True)
    initialize_lora_fim_ranks(model, lm_batches(), show_progress_bar=False)
    torch.testing.assert_close(logits(model), logits(llama()))
    layer = lora_layers(model)["model.layers.0.self_attn.q_proj"]
    expected = torch.linalg.norm(layer.base_layer.weight, dim=1)
    torch.testing.assert_close(layer.lora_magnitude_vector["default"].weight, expected)
    model(**token_batch()).loss.backward()
    assert layer.lora_magnitude_vector["default"].weight.grad is not None


def test_adapter_on_the_meta_device():
    model = get_peft_model(llama(), fim_lora_config(), low_cpu_mem_usage=True)
    initialize_lora_fim_ranks(model, lm_batches(), show_progress_bar=False)
    assert torch.equal(logits(model), logits(llama()))
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtypes_after_the_meta_device_are_those_of_stock_peft(dtype, use_dora):
    targets = ("q_proj", "embed_tokens")
    config = fim_lora_config(target_modules=targets, use_dora=use_dora)
    model = get_peft_model(llama().to(dtype), config, low_cpu_mem_usage=True)
    initialize_lora_fim_ranks(model, lm_batches(), show_progress_bar=False)
    plain = get_peft_model(llama().to(dtype), LoraConfig(target_modules=list(targets), use_dora=use_dora))
    assert {name: parameter.dtype for name, parameter in model.named_parameters()} == {
        name: parameter.dtype for name, parameter in plain.named_parameters()
    }


def test_lora_bias():
    model = fim_model(gpt2(), target_modules=("c_attn", "c_fc"), lora_bias=True, score_exponent=0.5)
    allocation = initialize_lora_fim_ranks(model, lm_batches(), show_progress_bar=False)
    for name, rank in allocation.ranks.items():
        factor = model.get_submodule(f"base_model.model.{name}").lora_B["default"]
        assert factor.weight.shape[1] == rank
        assert factor.bias is not None
        assert factor.bias.requires_grad
        assert not factor.bias.any()
    assert torch.equal(logits(model), logits(gpt2()))


class Layers(nn.Module):
    """One layer of each kind."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.convolution = nn.Embedding(11, 6), nn.Conv1d(6, 6, 3, padding=1)
        self.attention, self.linear = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 2)

    def forward(self, ids):
        x = self.convolution(self.embedding(ids).mT).mT
        x, _ = self.attention(x, x, x, need_weights=False)
        return self.linear(x).square().mean()


KINDS = ["embedding", "convolution", "attention", "linear"]


@pytest.mark.parametrize("way", ["get_peft_model", "low_cpu_mem_usage", "inject_adapter_in_model"])
def test_every_kind_of_layer_in_every_way_to_make_an_adapter(way):
    config = LoraConfig(
        r=2,
        target_modules=KINDS,
        init_lora_weights="fim",
        fim_config=proportional(fim_calibration_batches=2, score_exponent=0.5),
    )
    batches = [torch.randint(0, 11, (3, 7), generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    plain = get_fim_scores(Layers(), batches, config, show_progress_bar=False)
    if way == "inject_adapter_in_model":
        model = inject_adapter_in_model(config, Layers())
    else:
        model = get_peft_model(Layers(), config, low_cpu_mem_usage=way == "low_cpu_mem_usage")
    on_meta = any(parameter.device.type == "meta" for parameter in model.parameters())
    assert on_meta == (way == "low_cpu_mem_usage")
    allocation = initialize_lora_fim_ranks(model, batches, show_progress_bar=False)
    assert set(allocation.ranks) == set(KINDS)
    assert allocation.scores == plain
    assert sum(allocation.ranks.values()) == 8
    assert not any(parameter.device.type == "meta" for parameter in model.parameters())
    torch.testing.assert_close(model(batches[0]), Layers()(batches[0]))
    model(batches[0]).backward()
    gradients = [name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()]
    # B of each layer, PEFT's A of the embedding, and both projections of attention.
    assert len(gradients) >= 4


def test_parameters_and_attention_on_the_meta_device():
    config = LoraConfig(
        r=2,
        target_modules=["first"],
        target_parameters=TARGETS,
        init_lora_weights="fim",
        fim_config=proportional(fim_calibration_batches=2),
    )
    model = get_peft_model(Mixture(), config, low_cpu_mem_usage=True)
    batches = batches_of(floats(7, 6))
    initialize_lora_fim_ranks(model, batches, show_progress_bar=False)
    torch.testing.assert_close(model(**batches[0])["loss"], Mixture()(**batches[0])["loss"])
    config = fim_lora_config(r=4, target_modules=("attention",), batches=2)
    model = get_peft_model(Attention(), config, low_cpu_mem_usage=True)
    initialize_lora_fim_ranks(model, attention_batches(), show_progress_bar=False)
    batch = attention_batches()[0]
    torch.testing.assert_close(model(**batch)["loss"], Attention()(**batch)["loss"])


def test_a_trained_adapter_beside_it_stays():
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]), "other")
    randomize(model)
    expected = logits(model)
    model.add_adapter("fim", fim_lora_config(target_modules=("embed_tokens", "v_proj")))
    allocation = initialize_lora_fim_ranks(model, lm_batches(), adapter_name="fim", show_progress_bar=False)
    plain = get_fim_scores(
        llama(), lm_batches(), fim_lora_config(target_modules=("embed_tokens", "v_proj")), show_progress_bar=False
    )
    assert allocation.scores == plain
    assert torch.equal(logits(model), expected)
    model.set_adapter("fim")
    assert torch.equal(logits(model), logits(llama()))
    model(**token_batch()).loss.backward()


class EveryLayerType(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.linear = nn.Linear(6, 10)
        self.convolution = nn.Conv1d(10, 8, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.config = {"model_type": "custom"}

    def forward(self, ids):
        hidden = self.linear(self.embedding(ids))
        hidden = self.convolution(hidden.mT).mT
        return self.attention(hidden, hidden, hidden, need_weights=False)[0]


def given_factors(layer, rank):
    """Random A and B in the shapes of PEFT's own weights at a rank."""
    shapes = {
        nn.Embedding: ((rank, 11), (6, rank)),
        nn.Linear: ((rank, 6), (10, rank)),
        nn.Conv1d: ((rank, 10, 3), (8, rank, 1)),
        nn.MultiheadAttention: ((rank, 8), (24, rank)),
    }
    a, b = shapes[type(layer.get_base_layer())]
    factors = [Factors(torch.randn(a), torch.randn(b))]
    if isinstance(layer.get_base_layer(), nn.MultiheadAttention):
        factors.append(Factors(torch.randn(rank, 8), torch.randn(8, rank)))
    return factors


def update_of(layer, factors, scaling):
    """`ΔW = s B A` as a plain product, in the shape of the base weight."""
    a, b = factors.a.flatten(1), factors.b.flatten(1)
    update = scaling * b @ a
    base = layer.get_base_layer()
    if isinstance(base, nn.Embedding):
        return update.T
    return update.view_as(base.weight) if isinstance(base, nn.Conv1d) else update


EVERY_TARGET = ["embedding", "linear", "convolution", "attention"]


def test_given_factors_become_the_update_of_every_layer_type():
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=EVERY_TARGET)
    model = get_peft_model(EveryLayerType(), config)
    layers = adapter_layers(model, "default")
    ranks = {"embedding": 2, "linear": 3, "convolution": 1, "attention": 2}
    alphas = {name: 1.5 * rank for name, rank in ranks.items()}
    factors = {name: given_factors(layers[name], rank) for name, rank in ranks.items()}
    objects = {name: id(parameter) for name, parameter in model.named_parameters() if "lora_" in name}
    resize_adapter(model, layers, "default", ranks, alphas, config_with_ranks(config, ranks, alphas), factors)
    for name, layer in layers.items():
        for one, given in zip(layers_rebuilt_together(layer), factors[name], strict=True):
            expected = update_of(one, given, 1.5)
            torch.testing.assert_close(
                one.get_delta_weight("default"), expected, msg=lambda text, name=name: f"{name} {text}"
            )
    assert {name: id(parameter) for name, parameter in model.named_parameters() if "lora_" in name} == objects


def test_factors_of_a_wrong_shape_change_nothing():
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["embedding", "linear"])
    model = get_peft_model(EveryLayerType(), config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    layers, ranks = adapter_layers(model, "default"), {"embedding": 2, "linear": 3}
    alphas = dict.fromkeys(ranks, 8)
    factors = {"linear": [Factors(torch.randn(3, 6), torch.randn(9, 3))]}
    with pytest.raises(ValueError, match=r"B of layer 'linear' has shape \(10, 3\) at this rank, but .* \(9, 3\)"):
        resize_adapter(model, layers, "default", ranks, alphas, config_with_ranks(config, ranks, alphas), factors)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert model.peft_config["default"].rank_pattern == {}


def test_without_b_the_update_is_zero_in_every_layer_type():
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=EVERY_TARGET)
    model = get_peft_model(EveryLayerType(), config)
    randomize(model)
    layers, ranks = adapter_layers(model, "default"), dict.fromkeys(EVERY_TARGET, 2)
    alphas = dict.fromkeys(ranks, 4)
    factors = {name: [Factors(one.a) for one in given_factors(layers[name], 2)] for name in layers}
    resize_adapter(model, layers, "default", ranks, alphas, config_with_ranks(config, ranks, alphas), factors)
    for name, layer in layers.items():
        for one, given in zip(layers_rebuilt_together(layer), factors[name], strict=True):
            assert one.get_delta_weight("default").count_nonzero() == 0
            a = dict(one.lora_A)["default"].weight if one.lora_A else one.lora_embedding_A["default"]
            assert torch.equal(a, given.a)


def test_given_factors_of_a_stack_of_experts():
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=[], target_parameters=TARGETS)
    model = get_peft_model(Mixture(), config)
    layers = adapter_layers(model, "default")
    ranks = dict.fromkeys(layers, 2)
    alphas = dict.fromkeys(layers, 4)
    expected, factors = {}, {}
    for name, layer in layers.items():
        experts, d_in, d_out = layer.num_experts, layer.in_features, layer.out_features
        a, b = torch.randn(2 * experts, d_in), torch.randn(d_out, 2 * experts)
        factors[name] = [Factors(a, b)]
        # PEFT keeps A as (experts · r × d_in) and B as (d_out × r · experts): expert e has every e-th column of B.
        expected[name] = [2.0 * b[:, e::experts] @ a[2 * e : 2 * e + 2] for e in range(experts)]
    resize_adapter(model, layers, "default", ranks, alphas, config_with_ranks(config, ranks, alphas), factors)
    for name, layer in layers.items():
        update = layer.get_delta_weight("default")
        for e, one in enumerate(expected[name]):
            torch.testing.assert_close(update[e] if update[e].shape == one.shape else update[e].T, one)


@pytest.mark.parametrize(
    ("options", "name", "message"),
    [
        ({}, "attention", "Factors are given for 'attention', which does not keep an adapter"),
        ({"use_dora": True}, "linear", "A given B cannot be combined with use_dora"),
        ({"lora_bias": True}, "linear", "or without its bias with lora_bias"),
        ({"init_lora_weights": "olora"}, "linear", "PiSSA or OLoRA"),
    ],
)
def test_factors_that_would_not_be_used_as_given_are_refused(options, name, message):
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["linear"], **options)
    model = get_peft_model(EveryLayerType(), config)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    layers, ranks, alphas = adapter_layers(model, "default"), {"linear": 3}, {"linear": 8}
    factors = {name: [Factors(torch.randn(3, 6), torch.randn(10, 3))]}
    with pytest.raises(ValueError, match=message):
        resize_adapter(model, layers, "default", ranks, alphas, config_with_ranks(config, ranks, alphas), factors)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
