"""Truncated adapters in the corner cases of PEFT: other targets, converted targets, dtypes, several adapters."""

import copy

import numpy as np
import peft
import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from fim_lora import compress_lora, get_lora_spectrum, initialize_lora_fim_ranks
from fim_lora.adapter.factors import weights_of
from fim_lora.adapter.truncate import core_map, truncated_weights
from helpers.adapters import logits, lora_layers
from helpers.every_layer_type import batches, every_type, outputs
from helpers.expert_models import mixtral, qwen3_moe
from helpers.mixtures import Mixture
from helpers.proportional import proportional
from helpers.single_layers import WIDTH, batches_of, floats
from helpers.stock_peft import stock
from helpers.tiny_models import gpt2, llama, lm_batches
from helpers.trained_adapters import (
    components_of,
    deltas_of,
    fill,
    lora_layers_of,
    matrices_of,
    spectrum_of,
    trained,
)


def compressed(model, keep, data=None, **options):
    """Compresses, and checks the dense update of every layer against the sum of its kept components."""
    spectrum, before = spectrum_of(model, data), copy.deepcopy(model)
    result = compress_lora(model, spectrum, keep=keep, **options)
    at_least = dict.fromkeys(spectrum, 1) if model.peft_config["default"].bias == "lora_only" else None
    kept = spectrum.keep(spectrum.parameters_of_share(keep), at_least=at_least)
    layers = lora_layers_of(model)
    assert layers.keys() == {name for name, rank in result.ranks.items() if rank}
    for name, layer in lora_layers_of(before).items():
        if name in layers:
            expected = components_of(layer, spectrum[name], kept[name])
            for found, truth in zip(deltas_of(layers[name]), expected, strict=True):
                torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-5)
    return result


# --- Targets and patterns of all forms, loaded again ---

FORMS = {
    "list": {"target_modules": ["q_proj", "down_proj"]},
    "expression": {"target_modules": r".*\.(q|v)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "layers_to_transform": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1, 2]},
    "exclude_modules": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.v_proj"]},
    "layer_replication": {"layer_replication": [[0, 2], [1, 3]]},
    "trainable tokens": {"trainable_token_indices": [3, 5]},
    "patterns": {
        "rank_pattern": {r"layers\.\d+\.self_attn\.q_proj": 3, r"(?:layers\.1)\..*down_proj": 2},
        "alpha_pattern": {r"layers\.\d+\.mlp\..*": 7},
        "use_rslora": True,
    },
    "a fractional alpha": {"lora_alpha": 5.5},
}


def allocated():
    config = LoraConfig(
        r=8,
        target_modules=["q_proj", "v_proj", "down_proj"],
        init_lora_weights="fim",
        fim_config=proportional(fim_calibration_batches=2, r_min=0, score_exponent=0.5),
    )
    model = get_peft_model(llama(layers=3), config)
    allocation = initialize_lora_fim_ranks(model, lm_batches(2), show_progress_bar=False)
    assert len(set(allocation.ranks.values())) > 1
    fill(model)
    return model.eval()


def test_every_form_of_a_config_is_the_same_in_stock_peft(tmp_path):
    models = {name: trained(llama(layers=3), task_type="CAUSAL_LM", **options) for name, options in FORMS.items()}
    models["ranks from an allocation"] = allocated()
    for name, model in models.items():
        config = copy.deepcopy(model.peft_config["default"])
        serving = name == "ranks from an allocation"
        assert compressed(model, 0.3, serving=serving).dropped_layers
        folder = tmp_path / name
        model.save_pretrained(folder)
        torch.save(logits(model), folder / "logits.pt")
        after = model.peft_config["default"]
        for field in ("bias", "use_rslora", "task_type", "trainable_token_indices", "layer_replication"):
            assert getattr(after, field) == getattr(config, field)
    stock(f"""
        from pathlib import Path
        for name in {list(models)!r}:
            folder = Path({str(tmp_path)!r}) / name
            model = PeftModel.from_pretrained(llama(layers=3), folder).eval()
            with torch.no_grad():
                logits = model(**token_batch()).logits
            torch.testing.assert_close(logits, torch.load(folder / "logits.pt"), rtol=1e-5, atol=1e-5)
    """)


@pytest.mark.parametrize(("bias", "keep"), [("all", 0.15), ("lora_only", 0.4)])
def test_trained_biases_are_kept(tmp_path, bias, keep):
    model = trained(gpt2(), target_modules=["c_attn", "c_proj"], bias=bias, fan_in_fan_out=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                parameter.normal_()
    model.save_pretrained(tmp_path / "whole")
    if not torch.allclose(logits(PeftModel.from_pretrained(gpt2(), tmp_path / "whole")), logits(model)):
        pytest.skip("this PEFT does not load the biases")
    result = compressed(model, keep)
    assert bool(result.dropped_layers) == (bias == "all")
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(gpt2(), tmp_path)), logits(model))


@pytest.mark.parametrize(
    ("make", "experts"), [(mixtral, ["w1", "w2", "w3"]), (qwen3_moe, ["gate_proj", "up_proj", "down_proj"])]
)
@pytest.mark.parametrize("keep", [0.2, 0.8])
def test_targets_that_peft_converts(tmp_path, make, experts, keep):
    """PEFT adapts fused experts, at twice the rank for two matrices in one."""
    if Version(peft.__version__) < Version("0.21"):
        pytest.skip("this PEFT does not convert the targets")
    model = trained(make(), target_modules=["q_proj", *experts])
    assert len(set(spectrum_of(model).ranks.values())) == 2
    result = compressed(model, keep)
    assert bool(result.dropped_layers) == (keep < 0.5)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(make(), tmp_path)), logits(model))


@pytest.mark.parametrize("keep", [0.2, 0.6])
def test_parameters_that_the_config_names(tmp_path, keep):
    data = batches_of(floats(5, WIDTH), count=2)
    model = trained(Mixture(), target_modules=["first"], target_parameters=["experts.up", "experts.down"])
    compressed(model, keep, data)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Mixture(), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**data[0])["loss"], model(**data[0])["loss"])


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "eva"])
def test_initializations_that_leave_the_base_weights_alone(tmp_path, init):
    model = trained(llama(), target_modules=["q_proj", "v_proj"])
    config = model.peft_config["default"]
    config.init_lora_weights = init
    config.eva_config = peft.EvaConfig() if init == "eva" else None
    compressed(model, 0.4)
    model.save_pretrained(tmp_path)
    assert LoraConfig.from_pretrained(tmp_path).init_lora_weights is True
    torch.testing.assert_close(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(model))


# --- Adapters for inference, injected adapters, several adapters ---


def test_an_adapter_that_was_loaded_for_inference_is_not_trained_afterward(tmp_path):
    trained(llama()).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(llama(), tmp_path)
    compressed(model, 0.4)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.peft_config["default"].inference_mode


def test_an_adapter_that_transformers_injected(tmp_path):
    if Version(peft.__version__) < Version("0.20"):
        pytest.skip("transformers needs a newer PEFT")
    model = llama()
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    fill(model)
    result = compressed(model.eval(), 0.2)
    assert result.dropped_layers
    model.save_pretrained(tmp_path)
    again = llama()
    again.load_adapter(tmp_path)
    torch.testing.assert_close(logits(again), logits(model))


@pytest.mark.parametrize("both_active", [False, True])
def test_one_of_several_adapters(both_active):
    model = trained(llama(), "one")
    model.add_adapter("two", LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "o_proj", "down_proj"]))
    fill(model, "two", seed=5)
    active = ["two", "one"] if both_active else "two"
    model.base_model.set_adapter(active)
    spectrum = spectrum_of(model, adapter_name="two")
    before = copy.deepcopy(model)
    kept = spectrum.keep(int(0.3 * spectrum.num_parameters))
    result = compress_lora(model, spectrum, keep=0.3)
    assert result.dropped_layers
    assert model.base_model.active_adapters == (active if both_active else ["two"])
    for name, layer in lora_layers(before, "one").items():
        assert torch.equal(deltas_of(layer, "one")[0], deltas_of(lora_layers(model, "one")[name], "one")[0])
    for name, layer in lora_layers(before, "two").items():
        (expected,) = components_of(layer, spectrum[name], kept[name], "two")
        if kept[name]:
            (found,) = deltas_of(lora_layers(model, "two")[name], "two")
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    model.set_adapter("one")
    before.set_adapter("one")
    assert torch.equal(logits(model), logits(before))


def test_the_other_active_adapter_takes_part_in_the_loss():
    """The spectrum of one adapter is that of the sum of the base weights and the other adapter."""
    model = trained(llama().double(), "one")
    model.add_adapter("two", LoraConfig(r=3, target_modules=["q_proj", "down_proj"]))
    model.double()
    fill(model, "two", seed=5)
    alone = spectrum_of(model, adapter_name="one")
    model.base_model.set_adapter(["one", "two"])
    together = spectrum_of(model, adapter_name="one")
    merged = llama().double()
    for name, layer in lora_layers(model, "two").items():
        merged.get_submodule(name).weight.data += deltas_of(layer, "two")[0]
    expected = spectrum_of(trained(merged, "one"), adapter_name="one")
    for name in expected:
        np.testing.assert_allclose(together[name].saliencies, expected[name].saliencies, rtol=1e-4)
        # The other adapter keeps its scaling in the passes with a quarter of this one's.
        np.testing.assert_allclose(together[name].gains, expected[name].gains, rtol=1e-3, atol=1e-6)
        assert not np.allclose(together[name].saliencies, alone[name].saliencies, rtol=1e-2)


# --- Precision ---


def test_half_precision_factors_are_rounded_once():
    """The maps and the products are not rounded, although large entries of them cancel."""
    model = half_precision()
    spectrum = get_lora_spectrum(model, None)
    for name, layer in lora_layers(model).items():
        (one,) = weights_of(layer, "default")
        ((a, b),) = matrices_of(layer)
        left, right = (torch.from_numpy(side).double() for side in (spectrum[name].left, spectrum[name].right))
        found = one.with_rows(one.a.detach(), right), one.with_columns(one.b.detach(), left)
        for rounded, exact in zip(found, (right[0] @ a, b @ left[0]), strict=True):
            assert rounded.dtype == torch.bfloat16
            # Half a unit in the last of the 8 bits of bfloat16, and the errors of float32.
            bound = 1e-4 * exact.abs().max().item()
            torch.testing.assert_close(rounded.double(), exact, rtol=1.01 * 2**-8, atol=bound)


@pytest.mark.parametrize("keep", [0.6, 1.0])
def test_float32_adapters_of_a_half_precision_model_keep_their_precision(keep):
    """PEFT makes new weights in the dtype of the base weight, even for an adapter in float32."""
    model = trained(llama().bfloat16(), r=6)
    spectrum, before = get_lora_spectrum(model, None), copy.deepcopy(model)
    kept = spectrum.keep(int(keep * spectrum.num_parameters))
    compress_lora(model, spectrum, keep=keep)
    for name, layer in lora_layers(model).items():
        assert layer.lora_A["default"].weight.dtype == torch.float32
        (found,), (expected,) = deltas_of(layer), components_of(lora_layers(before)[name], spectrum[name], kept[name])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    if keep == 1:
        for name, value in before.named_parameters():
            assert torch.equal(dict(model.named_parameters())[name], value)


def half_precision():
    model = get_peft_model(
        llama().bfloat16(),
        LoraConfig(r=8, target_modules=["q_proj", "down_proj"]),
        autocast_adapter_dtype=False,
    )
    fill(model)
    # Ill-conditioned factors, so that the components are large combinations of their rows and columns.
    for layer in lora_layers(model).values():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        a.data, b.data = (a[:1] + 0.02 * a).to(a.dtype), (b[:, :1] + 0.02 * b).to(b.dtype)
    return model.eval()


def test_truncated_weights_are_temporary_and_compute_the_kept_components():
    model = every_type(torch.float64)
    spectrum = spectrum_of(model, batches())
    layers = lora_layers_of(model)
    kept = spectrum.keep(spectrum.num_parameters // 2)
    before = {name: value.clone() for name, value in model.named_parameters() if "lora_" in name}
    maps = {name: core_map(one.left, one.right, kept[name]) for name, one in spectrum.items()}
    expected = {name: components_of(layer, spectrum[name], kept[name]) for name, layer in layers.items()}
    with truncated_weights(layers, "default", maps):
        for name, layer in layers.items():
            for found, truth in zip(deltas_of(layer), expected[name], strict=True):
                torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-6)
        inside = outputs(model)
    after = {name: value for name, value in model.named_parameters() if "lora_" in name}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    with pytest.raises(KeyError), truncated_weights(layers, "default", maps):
        raise KeyError
    assert all(torch.equal(after[name], value) for name, value in before.items())
    compress_lora(model, spectrum, keep=0.5)
    torch.testing.assert_close(outputs(model), inside, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rank", [2, 6])
def test_matrices_are_written_as_they_are_read(rank):
    """For every layer type, and for another rank than the present one."""
    model = every_type()
    generator = torch.Generator().manual_seed(0)
    for layer in lora_layers_of(model).values():
        for one in weights_of(layer, "default"):
            a, b = one.matrices()
            torch.testing.assert_close(one.form.write_a(a), one.a.detach())
            torch.testing.assert_close(one.form.write_b(b), one.b.detach())
            new_a = torch.randn(len(a), rank, a.shape[2], generator=generator)
            new_b = torch.randn(len(b), b.shape[1], rank, generator=generator)
            torch.testing.assert_close(one.form.read_a(one.form.write_a(new_a)), new_a)
            torch.testing.assert_close(one.form.read_b(one.form.write_b(new_b)), new_b)


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.used, self.unused = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, target):
        return {"loss": (torch.tanh(self.used(x)) - target[:, None, None]).square().flatten(1).sum(1).mean()}


def test_a_layer_that_was_never_trained_can_still_be_trained():
    """Its B is zero. If it keeps components under a cap, its A is not zero."""
    model = trained(Unused(), target_modules=["used", "unused"])
    layer = model.get_base_model().unused
    layer.lora_B["default"].weight.data.zero_()
    with pytest.warns(UserWarning, match="took no part in the loss"):
        spectrum = spectrum_of(model, batches_of(floats(5, WIDTH)))
    assert compress_lora(model, spectrum, keep=1.0, r_max=2).ranks == {"used": 2, "unused": 2}
    assert not layer.lora_B["default"].weight.any()
    assert (layer.lora_A["default"].weight.norm(dim=1) > 0.01).all()
