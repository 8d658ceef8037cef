"""On a GPU: products in half precision, whole models in every precision, quantized models, training, and cuts.

Skipped without a GPU.
"""

import copy
import importlib.util

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from fim_lora import FimCompressionCallback, compress_lora, get_fim_scores, initialize_lora_fim_ranks
from fim_lora.fisher.gradients.norms import gram_squared_norms, materialized_squared_norms, squared_norms
from fim_lora.fisher.gradients.products import multiplies_uncopied
from fim_lora.fisher.gradients.sketch import WIDTH, Sketch, random_signs, sketched_squared_norms
from helpers.llama_calibration import assert_scores
from helpers.proportional import proportional
from helpers.quantized_models import TARGETS, dequantized_model, float_llama
from helpers.single_layers import LAYERS, Net, assert_score, batches_for, by_row, per_example_truth, scores_of
from helpers.tiny_models import llama, lm_batches, names_of, per_example_scores, token_batch
from helpers.trained_adapters import spectrum_of, trained
from helpers.wide_trainers import CUT, CUT_STEP, NARROW, STEPS, WIDE, trainer_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

GPU = torch.device("cuda")
FORMS = [gram_squared_norms, materialized_squared_norms, squared_norms]
HALF = [torch.float16, torch.bfloat16]
LONG = 150


def pair(examples, positions, d_in, d_out, dtype):
    generator = torch.Generator(GPU).manual_seed(positions)
    sizes = (d_in, d_out)
    return [torch.randn(examples, positions, d, generator=generator, device=GPU).to(dtype) for d in sizes]


def to_gpu(batches):
    return [{key: value.to(GPU) for key, value in batch.items()} for batch in batches]


# --- Norms ---


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64])
@pytest.mark.parametrize("bound", [2_000, 64 * 2**20])
@pytest.mark.parametrize("shape", [(3, 37, 24, 18), (2, 200, 16, 40), (1, 1, 5, 3)])
def test_norms_are_exact(form, dtype, bound, shape):
    x, g = pair(*shape, dtype)
    truth = (g.double().mT @ x.double()).square().sum((1, 2))
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=form is squared_norms):
        norms = form(x, g, bound)
    assert norms.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(norms.double(), truth, rtol=1e-12 if dtype == torch.float64 else 1e-5, atol=0)


@pytest.mark.parametrize("dtype", HALF)
def test_canceling_gradients_stay_exact(dtype):
    """Positions whose gradients sum to nearly nothing, with a large common input."""
    x, g = pair(2, 256, 32, 16, dtype)
    x, g = x + 5, (g - g.mean(1, keepdim=True, dtype=torch.float32).to(dtype))
    truth = (g.double().mT @ x.double()).square().sum((1, 2))
    for form in FORMS:
        torch.testing.assert_close(form(x, g).double(), truth, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtypes", [(a, b) for a in (*HALF, torch.float32) for b in (*HALF, torch.float32)])
@pytest.mark.parametrize("one_by_one", [False, True])
def test_the_projection_is_that_of_the_signs(dtypes, one_by_one):
    """For both dtypes of input and gradient, and with sums beyond the range of float16."""
    (x, _), (_, g) = (pair(3, 150, 24, 40, dtype) for dtype in dtypes)
    x *= 1000
    generator = Sketch("layer", 0).generator(GPU)
    drawn = [1, 1, 1] if one_by_one else [3]
    signs = torch.cat([random_signs((count, 24, WIDTH), generator, torch.float64) for count in drawn])
    truth = (g.double().mT @ x.double() @ signs).square().sum((1, 2)) / WIDTH
    norms = sketched_squared_norms(x, g, Sketch("layer", 0), 20_000 if one_by_one else 2**26)
    torch.testing.assert_close(norms.double(), truth, rtol=1e-5, atol=0)


def through_projection(x, g, bound):
    return sketched_squared_norms(x, g, Sketch("a", 0), bound)


@pytest.mark.parametrize("form", [gram_squared_norms, materialized_squared_norms, through_projection])
@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("shape", [(4, 2048, 1024, 1024), (1, 4096, 512, 4096)])
def test_temporary_memory_is_bounded(form, dtype, shape):
    x, g = pair(*shape, dtype)
    bound = 2**24
    form(x, g, bound)  # the workspace of the linear-algebra library stays allocated
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    form(x, g, bound)
    assert 0 < torch.cuda.max_memory_allocated() - before <= bound + 2**20


def test_half_precision_is_not_copied():
    x, g = pair(1, 512, 2048, 2048, torch.bfloat16)
    if not multiplies_uncopied(x, g, torch.float32):
        pytest.skip("this PyTorch copies")
    squared_norms(x, g)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    squared_norms(x, g)
    # Two Gram matrices in float32, and no copy of x in float32.
    assert torch.cuda.max_memory_allocated() - before < 2 * 512**2 * 4 + x.numel() * 2


# --- Layer types and models ---


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_layer_types_equal_autograd(layer):
    torch.manual_seed(0)
    model = Net(layer())
    batches = batches_for(model.layer)
    truth = per_example_truth(model, batches, ["layer.weight"], by_row)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        assert_score(scores_of(model.to(GPU), to_gpu(batches))["layer"], truth, rtol=1e-4)


def truth_of(model, batches, *ends):
    model = copy.deepcopy(model).cpu()
    return per_example_scores(model, [{k: v.cpu() for k, v in b.items()} for b in batches], names_of(model, *ends))


def fim_model(base, batches, **options):
    fim_config = proportional(fim_calibration_batches=batches, **options)
    config = LoraConfig(r=8, target_modules=list(TARGETS), init_lora_weights="fim", fim_config=fim_config)
    return get_peft_model(base, config)


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2), (torch.float16, 1e-2)])
def test_whole_models_equal_autograd(dtype, rel):
    """In half precision, up to the rounding of the passes themselves."""
    batches = to_gpu(lm_batches(2))
    base = llama().to(GPU, dtype)
    truth = truth_of(base, batches, *TARGETS)
    scores = get_fim_scores(fim_model(base, 2), batches, show_progress_bar=False)
    assert_scores(scores, truth, rel)


def test_long_examples_are_projected():
    batches = to_gpu([token_batch(8, LONG, seed=seed, shortest=LONG) for seed in range(4)])
    base = llama().to(GPU)
    truth = truth_of(base, batches, *TARGETS)
    random_state = torch.cuda.get_rng_state()
    scores = get_fim_scores(fim_model(llama().to(GPU), 4), batches, show_progress_bar=False)
    assert torch.equal(torch.cuda.get_rng_state(), random_state)
    for name, values in truth.items():
        assert not scores[name].exact
        noise = (2 / WIDTH * values.square().sum()).sqrt() / len(values)
        assert 0 < abs(scores[name].mean - values.mean()) < 5 * noise


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_a_loop_of_ones_own(dtype, checkpointing):
    """Hooks, autocast with a gradient scaler, checkpointing; then the adapter trains with the existing optimizer."""
    batches = to_gpu(lm_batches(2))
    truth = truth_of(llama(), batches, *TARGETS)
    model = fim_model(llama().to(GPU), 2)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], 1e-2)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10, enabled=dtype == torch.float16)

    def loss_of(batch):
        with torch.autocast("cuda", dtype=dtype, enabled=dtype is not None):
            return model(**batch).loss

    for batch in batches:
        scaler.scale(loss_of(batch)).backward()
    factor = scaler.get_scale() ** 2 if dtype == torch.float16 else 1.0
    allocation = initialize_lora_fim_ranks(model)
    assert_scores(allocation.scores, truth, {None: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}[dtype], factor)
    assert len(set(allocation.ranks.values())) > 1

    first = loss_of(batches[0]).item()
    for _ in range(5):
        optimizer.zero_grad()
        loss_of(batches[0]).backward()
        optimizer.step()
    assert loss_of(batches[0]).item() < first
    assert all(parameter.device.type == "cuda" for parameter in model.parameters())


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize(
    ("quantization", "rel"),
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, 1e-4),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}, 5e-2),
        ({"load_in_8bit": True}, 1e-1),
    ],
    ids=["nf4", "nf4 bfloat16", "int8"],
)
def test_quantized_models_equal_autograd_of_the_dequantized(tmp_path, quantization, rel):
    """Int8 also quantizes the activations, which the dequantized model does not."""
    float_llama().save_pretrained(tmp_path)
    quantized = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(**quantization), dtype=torch.float32, device_map={"": 0}
    )
    batches = to_gpu(lm_batches(2))
    truth = truth_of(dequantized_model(quantized), batches, *TARGETS)
    model = fim_model(quantized, 2)
    scores = get_fim_scores(model, batches, show_progress_bar=False)
    assert_scores(scores, truth, rel)
    initialize_lora_fim_ranks(model, fim_scores=scores)
    model(**batches[0]).loss.backward()
    assert all(torch.isfinite(value.grad).all() for value in model.parameters() if value.requires_grad)


def test_layers_on_two_devices():
    """The head is on the host: norms of both devices are combined."""

    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(6, 5).to(GPU), nn.Linear(5, 3)

        def forward(self, x, target):
            y = self.second(torch.tanh(self.first(x.to(GPU))).cpu()).to(target.device)
            return {"loss": (torch.tanh(y) - target[:, None]).square().flatten(1).sum(1).mean()}

    model = Split()
    batches = batches_for(nn.Linear(6, 3))
    for name in ("first", "second"):
        truth = per_example_truth(model, batches, [f"{name}.weight"], by_row)
        assert_score(scores_of(model, batches, name)[name], truth, rtol=1e-4)


# --- After and during training ---


def steps(model, batches, optimizer):
    """The loss of each step."""
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def adam(model):
    return torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)


def test_a_spectrum_and_a_cut_are_those_on_the_host_and_training_goes_on():
    batches = lm_batches(4)
    results, losses, spectra = [], [], []
    for device, data in ((torch.device("cpu"), batches), (GPU, to_gpu(batches))):
        model = trained(llama()).double().to(device)
        optimizer = adam(model)
        first = steps(model, data, optimizer)
        spectra.append(spectrum_of(model, data))
        results.append(compress_lora(model, spectra[-1], keep=0.5, optimizer=optimizer))
        losses.append(first + steps(model, data, optimizer))
        assert all(value.device.type == device.type for value in model.parameters())
    assert results[0].ranks == results[1].ranks
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for name, on_host in spectra[0].items():
        assert spectra[1][name].saliencies == pytest.approx(on_host.saliencies, rel=1e-3)
        assert spectra[1][name].gains.tolist() == pytest.approx(on_host.gains.tolist(), rel=1e-2, abs=1e-6)


@pytest.mark.parametrize("precision", [{}, {"bf16": True}])
def test_a_training_that_begins_wide(tmp_path, precision):
    callback = FimCompressionCallback(**CUT)
    trainer = trainer_of(tmp_path, [callback], use_cpu=False, **precision)
    trainer.train()
    assert trainer.state.global_step == STEPS
    assert callback.cut_at_step == CUT_STEP
    assert callback.compression.share <= NARROW / WIDE
    for name, weight in trainer.model.named_parameters():
        assert weight.device.type == GPU.type, name
        assert torch.isfinite(weight).all(), name


def test_a_quantized_model_keeps_its_weights_when_its_adapter_is_cut(tmp_path):
    float_llama().save_pretrained(tmp_path)
    quantized = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        device_map={"": 0},
    )
    model = trained(quantized, target_modules=TARGETS)
    before = {name: value.clone() for name, value in model.named_parameters() if "lora_" not in name}
    spectrum = spectrum_of(model, to_gpu(lm_batches(2)))
    result = compress_lora(model, spectrum, keep=0.5)
    assert 0.4 < result.share <= 0.5
    after = dict(model.named_parameters())
    for name, value in before.items():
        assert torch.equal(after.get(name, after.get(name.replace(".base_layer", ""))), value), name
