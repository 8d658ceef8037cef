"""Quantized base weights: the eFIM is that of the dequantized weight, computed by autograd on a float64 copy."""

import copy
import importlib.util
import inspect
import os
import pickle
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from fim_lora import compress_lora, get_fim_scores, initialize_lora_fim_ranks
from fim_lora.fisher.evaluation import mean_loss
from helpers.adapters import fim_lora_config, logits, lora_layers, randomize, run_own_loop
from helpers.packed_layers import LIBRARIES, PackedLinear, assert_scores_of_packed_layers
from helpers.quantized_models import TARGETS, dequantized, dequantized_model, float_llama, worst_error
from helpers.stock_peft import stock
from helpers.tiny_models import llama, lm_batches, names_of, per_example_scores, running_out_of_memory
from helpers.trained_adapters import components_of, deltas_of, spectrum_of, trained


def nf4(compute_dtype=torch.float32):
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def torchao(name, **options):
    return TorchAoConfig(getattr(importlib.import_module("torchao.quantization"), name)(**options))


# The configuration, and the largest relative error of a score. Measured: at most 5e-7, the noise of float32, and 6e-3
# if bitsandbytes multiplies in bfloat16. The weights before quantization have scores that differ by 0.3 % to 50 %.
CASES = {
    "bnb int8": (partial(BitsAndBytesConfig, load_in_8bit=True), 1e-5),
    "bnb nf4": (nf4, 1e-5),
    "bnb nf4 bfloat16": (partial(nf4, torch.bfloat16), 2e-2),
    "torchao int8": (partial(torchao, "Int8WeightOnlyConfig"), 1e-5),
    "torchao int4": (partial(torchao, "IntxWeightOnlyConfig", weight_dtype=torch.int4), 1e-5),
    "torchao float8": (partial(torchao, "Float8WeightOnlyConfig"), 1e-5),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    float_llama().save_pretrained(folder)
    return folder


def load(folder, quantization_config):
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization_config, dtype=torch.float32)


def has_inference_kernel(quantization):
    """Whether bitsandbytes computes differently in eval mode and in training mode on this CPU.

    In eval mode, its int8 layers also quantize the activations. Its 4-bit layers, on CPUs with AVX512-BF16, repack
    their weight for a kernel that has no backward pass and multiplies in bfloat16.
    """
    functional = importlib.import_module("bitsandbytes").functional
    return quantization == "bnb int8" or (quantization.startswith("bnb nf4") and functional.has_avx512bf16())


@pytest.fixture(scope="module")
def truth(folder):
    """Per-example scores of the dequantized model, computed once for each quantization."""
    known = {}

    def of(quantization):
        if quantization not in known:
            make, tolerance = CASES[quantization]
            model = dequantized_model(load(folder, make()))
            names = names_of(model, *TARGETS)
            known[quantization] = per_example_scores(model, lm_batches(), names)
            original = per_example_scores(float_llama(), lm_batches(), names)
            differences = [abs(original[name].mean() / known[quantization][name].mean() - 1) for name in names]
            # Otherwise the comparisons below could not distinguish the two models.
            assert max(differences) > 5 * tolerance
            assert sum(difference > tolerance for difference in differences) > len(names) / 2
        return known[quantization]

    return of


def adapted(base, kbit=False):
    if kbit:
        base = prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(1)
    return get_peft_model(base, fim_lora_config(target_modules=TARGETS, task_type="CAUSAL_LM"))


# --- Libraries that run here ---


@pytest.mark.parametrize("kbit", [False, True])
@pytest.mark.parametrize("quantization", CASES)
def test_own_loop_equals_autograd_of_the_dequantized_weight(folder, truth, quantization, kbit):
    make, tolerance = CASES[quantization]
    model = adapted(load(folder, make()), kbit).train()
    run_own_loop(model)
    scores = initialize_lora_fim_ranks(model).scores
    assert worst_error(scores, truth(quantization)) < tolerance


@pytest.mark.parametrize("with_adapter", [False, True])
@pytest.mark.parametrize("quantization", CASES)
def test_dataloader_equals_autograd_of_the_dequantized_weight(folder, truth, quantization, with_adapter):
    make, tolerance = CASES[quantization]
    base = load(folder, make())
    if with_adapter:
        scores = initialize_lora_fim_ranks(adapted(base), lm_batches(), show_progress_bar=False).scores
    else:
        scores = get_fim_scores(base, lm_batches(), fim_lora_config(target_modules=TARGETS), show_progress_bar=False)
    assert worst_error(scores, truth(quantization)) < tolerance


@pytest.mark.parametrize("quantization", ["bnb int8", "bnb nf4"])
def test_calibration_leaves_the_packed_weights_alone(folder, quantization):
    model = load(folder, CASES[quantization][0]())
    names = names_of(model, *TARGETS)
    before = {name: model.get_submodule(name).weight.detach().clone() for name in names}
    get_fim_scores(model, lm_batches(), fim_lora_config(target_modules=TARGETS), show_progress_bar=False)
    assert all(torch.equal(model.get_submodule(name).weight, before[name]) for name in names)
    assert not model.training
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("quantization", ["bnb int8", "bnb nf4"])
def test_a_failure_while_olora_quantizes_anew_leaves_the_weights_as_they_were(folder, quantization):
    model = load(folder, CASES[quantization][0]())
    config = fim_lora_config(target_modules=TARGETS, init_lora_weights="olora", task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    run_own_loop(model.train())
    before = {name: dequantized_after_a_pass(layer.get_base_layer()) for name, layer in layers.items()}
    parameters = {name: layer.get_base_layer().weight for name, layer in layers.items()}
    with running_out_of_memory(list(layers.values())[-1]):
        initialize_lora_fim_ranks(model)
    for name, layer in layers.items():
        base = layer.get_base_layer()
        assert base.weight is parameters[name]
        assert torch.equal(dequantized_after_a_pass(base), before[name])
        assert getattr(base, "quant_state", None) is getattr(base.weight, "quant_state", None)
    with torch.no_grad():
        output = model.train()(**lm_batches()[0]).logits
        expected = load(folder, CASES[quantization][0]()).train()(**lm_batches()[0]).logits
    assert torch.equal(output, expected)


def dequantized_after_a_pass(layer):
    """A pass moves the statistics of int8 from the weight to the layer."""
    if type(layer.weight).__name__ == "Int8Params" and layer.weight.SCB is None:
        return layer.state.CB.double() * layer.state.SCB.double()[:, None] / 127
    return dequantized(layer)


@pytest.mark.parametrize("source", ["own loop", "dataloader"])
def test_weights_repacked_by_an_evaluation_before_are_an_error_and_no_wrong_score(folder, source):
    if not has_inference_kernel("bnb nf4"):
        pytest.skip("bitsandbytes repacks weights only on CPUs with AVX512-BF16")
    model = adapted(load(folder, nf4()))
    logits(model)
    model.train()
    with pytest.raises(RuntimeError, match="bitsandbytes"):  # noqa: PT012
        if source == "own loop":
            run_own_loop(model)
        initialize_lora_fim_ranks(model, None if source == "own loop" else lm_batches(), show_progress_bar=False)


def test_from_loading_to_stock_peft(folder, tmp_path):
    """Ranks, an unchanged output, and an adapter that stock PEFT loads on the same quantized model."""
    configs = {}
    for quantization, kbit in [*((quantization, False) for quantization in CASES), ("bnb nf4", True)]:
        make, _ = CASES[quantization]
        configs[f"{quantization} {kbit}"] = (make(), kbit)
        base = load(folder, make())
        if kbit:
            base = prepare_model_for_kbit_training(base)
        expected = logits(base)
        model = adapted(load(folder, make()), kbit).train()
        run_own_loop(model)
        allocation = initialize_lora_fim_ranks(model)
        assert len(set(allocation.ranks.values())) > 1
        assert sum(allocation.ranks.values()) == allocation.budget
        assert torch.equal(logits(model), expected)
        randomize(model)
        with_adapter = logits(model)  # before saving, because bitsandbytes then unpacks its weights with a loss
        assert not torch.allclose(with_adapter, expected, atol=0.1)
        adapter = tmp_path / f"{quantization} {kbit}"
        model.save_pretrained(adapter)
        torch.save(with_adapter, adapter / "logits.pt")
    (tmp_path / "configs.pickle").write_bytes(pickle.dumps(configs))
    stock(f"""
        warnings.simplefilter("ignore")
        import pickle
        from pathlib import Path
        from peft import prepare_model_for_kbit_training
        from transformers import AutoModelForCausalLM
        folder = Path({str(tmp_path)!r})
        for name, (config, kbit) in pickle.loads((folder / "configs.pickle").read_bytes()).items():
            base = AutoModelForCausalLM.from_pretrained(
                {str(folder)!r}, quantization_config=config, dtype=torch.float32
            )
            if kbit:
                base = prepare_model_for_kbit_training(base)
            model = PeftModel.from_pretrained(base, folder / name).eval()
            with torch.no_grad():
                logits = model(**token_batch()).logits
            torch.testing.assert_close(logits, torch.load(folder / name / "logits.pt"), rtol=1e-5, atol=1e-5)
    """)


def test_refusals_of_peft_reach_the_user():
    """torchao packs an `Int4Tensor` only on a GPU, but PEFT's error for one can be tested anywhere."""
    if "Int4Tensor" not in inspect.getsource(importlib.import_module("peft.tuners.lora.torchao")):
        pytest.skip("this version of PEFT refuses no Int4Tensor")
    int4_tensor = importlib.import_module("torchao.quantization").Int4Tensor
    scale = torch.ones(1, 24, dtype=torch.bfloat16)
    weight = int4_tensor(torch.zeros(24, 12, dtype=torch.int8), scale, scale, [1, 24], torch.Size([24, 24]))
    model = llama()
    model.model.layers[1].self_attn.q_proj.weight = nn.Parameter(weight, requires_grad=False)
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(TypeError, match="TorchaoLoraLinear only supports int8 weights for now"):
        get_fim_scores(model, lm_batches(), fim_lora_config(), show_progress_bar=False)
    assert [(name, type(module)) for name, module in model.named_modules()] == before


def test_layers_that_pass_no_gradient_on_are_an_error(folder):
    """torchao's int8 product of two quantized matrices has no gradient, so earlier layers cannot be trained either."""
    model = load(folder, torchao("Int8DynamicActivationInt8WeightConfig"))
    config = fim_lora_config(target_modules=TARGETS)
    with pytest.raises(RuntimeError, match=r"self_attn\.o_proj.*passes no gradient to its input"):
        get_fim_scores(model, lm_batches(), config, show_progress_bar=False)
    trained_model = trained(load(folder, torchao("Int8DynamicActivationInt8WeightConfig")), target_modules=TARGETS)
    with pytest.raises(RuntimeError, match="passes no gradient to its input"):
        spectrum_of(trained_model)
    with pytest.raises(RuntimeError, match="passes no gradient to its input"):
        run_own_loop(get_peft_model(load(folder, torchao("Int8DynamicActivationInt8WeightConfig")), config))


@pytest.mark.parametrize("quantization", CASES)
def test_a_trained_adapter_is_measured_and_truncated(folder, quantization):
    """Its spectrum is that on the dequantized weights in float64, and the base weights stay as they are."""
    make, tolerance = CASES[quantization]
    model = trained(load(folder, make()), target_modules=TARGETS)
    found = spectrum_of(model)
    expected = spectrum_of(trained(dequantized_model(load(folder, make())), target_modules=TARGETS))
    original = spectrum_of(trained(float_llama(), target_modules=TARGETS))
    errors = []
    for name, layer in expected.items():
        # Sorted, because rounding may change the order of components that are worth about the same.
        saliencies, scale = sorted(layer.saliencies), max(layer.saliencies)
        assert sorted(found[name].saliencies) == pytest.approx(saliencies, rel=20 * tolerance, abs=tolerance * scale)
        errors.append(abs(max(original[name].saliencies) / scale - 1))
    assert max(errors) > 20 * tolerance  # the comparison above can distinguish the two models
    before = copy.deepcopy(lora_layers(model))
    data = lm_batches(2)
    result = compress_lora(model, found, keep=0.4, eval_dataloader=data, show_progress_bar=False)
    assert result.loss_after == pytest.approx(mean_loss(model, data, show_progress_bar=False), rel=1e-4)
    kept = found.keep(int(0.4 * found.num_parameters))
    for name, layer in lora_layers(model).items():
        (truth,) = components_of(before[name], found[name], kept[name])
        torch.testing.assert_close(deltas_of(layer)[0], truth, rtol=1e-4, atol=1e-5)
    for name in result.dropped_layers:
        assert type(model.get_base_model().get_submodule(name)) is type(before[name].get_base_layer())


# --- Libraries that do not run here: a layer of the same kind under PEFT's own LoRA layers for them ---


@pytest.mark.parametrize(
    ("module", "name"),
    [("gptq", "GPTQLoraLinear"), ("awq", "AwqLoraLinear"), ("aqlm", "AqlmLoraLinear"), ("te", "TeLinear")],
)
def test_lora_layers_of_peft_that_need_no_library(module, name):
    module = f"peft.tuners.lora.{module}"
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"this version of PEFT has no {name}")
    assert_scores_of_packed_layers(PackedLinear, name, getattr(importlib.import_module(module), name))


def test_lora_layers_of_peft_that_need_their_library(tmp_path):
    """PEFT defines them if their library can be found, and uses only the class that is replaced here."""
    for _, module, layer, _ in LIBRARIES:
        path = tmp_path.joinpath(*module.split("."))
        path.mkdir(parents=True)
        (path / "__init__.py").write_text(f"from torch import nn\nclass {layer}(nn.Module): pass\n")
    code = """
        import importlib
        from helpers.packed_layers import LIBRARIES, PackedLinear, assert_scores_of_packed_layers
        for lora_class_name, module, layer, packed_name in LIBRARIES:
            bases = (PackedLinear, getattr(importlib.import_module(module), layer))
            layer_class = type(layer, bases, {"packed_name": packed_name})
            assert_scores_of_packed_layers(layer_class, lora_class_name)
    """
    paths = [str(tmp_path), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
