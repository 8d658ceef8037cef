"""Vision, speech and diffusion models with an adapter, added in the way of each library.

Scores are compared with per-example gradients by autograd in float64; saved adapters are loaded by the stock libraries
in a second process.
"""

import functools
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, FluxTransformer2DModel
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import save_file
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations
from transformers import (
    TimesformerConfig,
    TimesformerForVideoClassification,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from fim_lora import get_fim_scores, initialize_lora_fim_ranks
from fim_lora.fisher.layers.attribution import UnattributableError, by_example
from helpers.adapters import hooks_of, lora_layers, randomize
from helpers.diffusion import unet
from helpers.own_warnings import UNCERTAIN_ROWS
from helpers.proportional import proportional

BATCH, BATCHES, RANK, WORDS = 3, 2, 4, 20


# --- Models ---


LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2}
SMALL = {"hidden_size": 16, "intermediate_size": 24, "initializer_range": 0.2, **LAYERS}


def vit():
    return ViTForImageClassification(ViTConfig(image_size=12, patch_size=4, num_labels=3, **SMALL))


def timesformer(frames=4):
    config = TimesformerConfig(num_frames=frames, image_size=8, patch_size=4, num_labels=3, **SMALL)
    return TimesformerForVideoClassification(config)


def whisper():
    encoder = {"encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 24}
    decoder = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 24}
    tokens = {
        "vocab_size": WORDS,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
    }
    sizes = {"num_mel_bins": 6, "d_model": 16, "max_source_positions": 8, "init_std": 0.2}
    return WhisperForConditionalGeneration(WhisperConfig(**encoder, **decoder, **tokens, **sizes))


def wav2vec2():
    features = {"conv_dim": (8, 8), "conv_stride": (3, 2), "conv_kernel": (5, 3), "num_feat_extract_layers": 2}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    options = {"feat_extract_norm": "layer", "ctc_loss_reduction": "mean"}  # the layer norm is required for masks
    return Wav2Vec2ForCTC(Wav2Vec2Config(vocab_size=WORDS, **features, **positions, **options, **SMALL))


def flux():
    sizes = {"in_channels": 4, "joint_attention_dim": 12, "pooled_projection_dim": 6}
    attention = {"attention_head_dim": 8, "num_attention_heads": 2, "axes_dims_rope": (2, 2, 4)}
    return FluxTransformer2DModel(num_layers=1, num_single_layers=1, **sizes, **attention)


# --- Batches ---


def normal(generator, *shape):
    return torch.randn(BATCH, *shape, generator=generator, dtype=torch.float64)


def integers(generator, low, high, *shape):
    return torch.randint(low, high, (BATCH, *shape), generator=generator)


def words(generator):
    """Every example has a different number of tokens."""
    ids = integers(generator, 3, WORDS, 6)
    return torch.where(torch.arange(6) < torch.tensor([[6], [3], [4]]), ids, -100)


def images(generator):
    return {"pixel_values": normal(generator, 3, 12, 12), "labels": integers(generator, 0, 3)}


def videos(generator, frames=4):
    return {"pixel_values": normal(generator, frames, 3, 8, 8), "labels": integers(generator, 0, 3)}


def speech(generator):
    return {"input_features": normal(generator, 6, 16), "labels": words(generator)}


def waves(generator):
    mask = torch.arange(150) < torch.tensor([[150], [110], [130]])
    return {"input_values": normal(generator, 150), "attention_mask": mask.long(), "labels": words(generator)}


def noised(generator, *shape):
    latents, noise = normal(generator, *shape), normal(generator, *shape)
    return {"latents": latents, "noise": noise, "timesteps": integers(generator, 0, 10)}


def with_text(generator):
    return noised(generator, 2, 8, 8) | {"text": normal(generator, 5, 12)}


def packed(generator):
    return noised(generator, 9, 4) | {"text": normal(generator, 5, 12), "pooled": normal(generator, 6)}


def noisy(batch):
    scheduler = DDPMScheduler(num_train_timesteps=10)
    return scheduler.add_noise(batch["latents"], batch["noise"], batch["timesteps"])


def inputs_of_unet(batch):
    return {"sample": noisy(batch), "timestep": batch["timesteps"], "encoder_hidden_states": batch["text"]}


def inputs_of_flux(batch):
    grid = torch.cartesian_prod(torch.zeros(1), torch.arange(3.0), torch.arange(3.0))
    return {
        "hidden_states": noisy(batch),
        "encoder_hidden_states": batch["text"],
        "pooled_projections": batch["pooled"],
        "timestep": batch["timesteps"] / 10,
        "img_ids": grid,
        "txt_ids": torch.zeros(5, 3),
    }


# --- The shares ℓ_t of the examples: the loss of a batch is (1/B) Σ_t ℓ_t ---


def share_of_class(model, one, batch):
    return F.cross_entropy(model(one["pixel_values"]).logits, one["labels"])


def share_of_tokens(model, one, batch):
    """The model's loss is a mean over the tokens of the batch."""
    terms = (batch["labels"] != -100).sum()
    summed = F.cross_entropy(model(**one).logits.flatten(0, 1), one["labels"].flatten(), reduction="sum")
    return summed * BATCH / terms


def share_of_transcript(model, one, batch):
    logits = model(one["input_values"], attention_mask=one["attention_mask"]).logits
    frames = model._get_feat_extract_output_lengths(one["attention_mask"].sum(1))
    words = one["labels"][one["labels"] != -100]
    return F.ctc_loss(logits.log_softmax(-1)[0], words, frames[0], torch.tensor(len(words)))


# --- The cases ---


@dataclass(frozen=True)
class Case:
    make: Callable
    batch: Callable
    targets: list[str]
    share: Callable | None = None
    inputs: Callable = dict
    accuracy: float = 1e-9

    def model(self):
        torch.manual_seed(0)
        return self.make().double().eval()

    def batches(self):
        return [self.batch(torch.Generator().manual_seed(seed)) for seed in range(BATCHES)]

    def config(self, **options):
        options = {"r": RANK, "target_modules": self.targets} | options
        return LoraConfig(
            init_lora_weights="fim",
            fim_config=proportional(fim_calibration_batches=BATCHES, score_exponent=0.5),
            **options,
        )

    def loss(self, model, batch):
        """The `forward_fn`. The loss of a diffusion model is the error of the predicted noise."""
        output = model(**self.inputs(batch))
        return output.loss if "labels" in batch else F.mse_loss(output.sample, batch["noise"])


IN_UNET = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "time_emb_proj"]
IN_FLUX = ["to_q", "to_k", "to_v", "to_out.0", "to_add_out", "add_k_proj", "net.2", "norm.linear", "proj_mlp"]
IN_TIMESFORMER = ["qkv", "temporal_dense", "intermediate.dense", "patch_embeddings.projection"]
IN_WAV2VEC2 = ["conv_layers.0.conv", "pos_conv_embed.conv", "q_proj", "v_proj", "intermediate_dense"]
CASES = {
    "vit": Case(vit, images, ["q_proj", "v_proj", "fc1", "fc2", "patch_embeddings.projection"], share_of_class),
    "timesformer": Case(timesformer, videos, IN_TIMESFORMER, share_of_class),
    "whisper": Case(whisper, speech, ["q_proj", "v_proj", "k_proj", "fc1"], share_of_tokens),
    # Its loss is always computed in float32, as are the rotary positions of Flux.
    "wav2vec2": Case(wav2vec2, waves, IN_WAV2VEC2, share_of_transcript, accuracy=1e-5),
    "convolutions of whisper": Case(whisper, speech, ["conv1", "conv2", "k_proj"], share_of_tokens),
    "unet": Case(unet, with_text, IN_UNET, inputs=inputs_of_unet),
    "flux": Case(flux, packed, IN_FLUX, inputs=inputs_of_flux, accuracy=1e-6),
}


@functools.cache
def truth(kind):
    """`mean(G_t ∘ G_t)` of every target layer, over all examples, by one backward pass for each."""
    case, values = CASES[kind], {}
    model = case.model()
    for module in model.modules():
        if is_parametrized(module):  # by weight normalization; the adapter is added to the product
            remove_parametrizations(module, "weight")
    weights = {name: module.weight for name, module in model.named_modules() if name.endswith(tuple(case.targets))}
    for batch in case.batches():
        examples = [{key: value[row : row + 1] for key, value in batch.items()} for row in range(BATCH)]
        shares = [case.share(model, one, batch) if case.share else case.loss(model, one) for one in examples]
        assert torch.stack(shares).mean().item() == pytest.approx(case.loss(model, batch).item(), rel=1e-6)
        for share in shares:
            gradients = torch.autograd.grad(share, list(weights.values()))
            for name, gradient in zip(weights, gradients, strict=True):
                values.setdefault(name, []).append(gradient.square().mean().item())
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


# --- The three ways to an adapter ---


def by_peft(model, config):
    return get_peft_model(model, config)


def by_injection(model, config):
    return inject_adapter_in_model(config, model)


def by_library(model, config):
    """`add_adapter` of transformers, or of diffusers."""
    model.add_adapter(config)
    return model


WAYS = {kind: [by_peft, by_injection, by_library] for kind in CASES}
WAYS["convolutions of whisper"].clear()
PAIRS = [(kind, way) for kind, ways in WAYS.items() for way in ways]


def adapted(kind, way, base=None):
    torch.manual_seed(1)
    case = CASES[kind]
    return way(base or case.model(), case.config()).eval()


def allocate(kind, model, own_loop=False):
    case = CASES[kind]
    if not own_loop:
        return initialize_lora_fim_ranks(model, case.batches(), forward_fn=case.loss, show_progress_bar=False)
    for batch in case.batches():
        case.loss(model, batch).backward()
    return initialize_lora_fim_ranks(model)


def output_of(kind, model):
    case = CASES[kind]
    with torch.no_grad():
        output = model(**case.inputs(case.batches()[0]))
    return output.logits if hasattr(output, "logits") else output.sample


def assert_scores(kind, scores):
    assert set(scores) == set(truth(kind))
    for name, values in truth(kind).items():
        assert scores[name].num_examples == len(values) == BATCH * BATCHES, name
        assert values.min() > 0, name
        assert scores[name].mean == pytest.approx(values.mean().item(), rel=CASES[kind].accuracy, abs=0), name


@pytest.mark.parametrize("kind", CASES)
def test_scores_of_the_plain_model_equal_autograd(kind):
    case = CASES[kind]
    scores = get_fim_scores(case.model(), case.batches(), case.config(), forward_fn=case.loss, show_progress_bar=False)
    assert_scores(kind, scores)


@UNCERTAIN_ROWS
@pytest.mark.parametrize("own_loop", [False, True], ids=["dataloader", "own loop"])
@pytest.mark.parametrize(("kind", "way"), PAIRS)
def test_scores_ranks_and_output_of_an_adapter(kind, way, own_loop):
    model = adapted(kind, way)
    allocation = allocate(kind, model, own_loop)
    assert_scores(kind, allocation.scores)
    ranks = {name: layer.lora_A["default"].weight.shape[0] for name, layer in lora_layers(model).items()}
    assert ranks == allocation.ranks
    assert sum(ranks.values()) == allocation.budget == RANK * len(ranks)
    assert len(set(ranks.values())) > 1
    assert torch.equal(output_of(kind, model), output_of(kind, CASES[kind].model()))
    assert not hooks_of(model)


def test_the_convolutions_of_whisper_can_be_scored_but_not_adapted_by_any_peft():
    """If this fails, PEFT or transformers supports it now: move the convolutions to the case above."""
    case = CASES["convolutions of whisper"]
    for config in (LoraConfig(target_modules=case.targets), case.config()):
        model = get_peft_model(case.model(), config)
        with pytest.raises(AttributeError, match="stride"):
            case.loss(model, case.batches()[0])


def windows_with_as_many_positions_as_examples():
    """Frames × examples × features, or examples · patches × frames × features: with B frames both are possible."""
    return Case(functools.partial(timesformer, BATCH), functools.partial(videos, frames=BATCH), IN_TIMESFORMER)


def test_windows_with_as_many_positions_as_examples_are_exact_with_a_dataloader():
    case = windows_with_as_many_positions_as_examples()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        scores = get_fim_scores(case.model(), case.batches(), case.config(), show_progress_bar=False)
    model = case.model()
    for name, score in scores.items():
        weight = model.get_submodule(name).weight
        losses = [
            model(**{key: value[[row]] for key, value in batch.items()}).loss
            for batch in case.batches()
            for row in range(BATCH)
        ]
        values = torch.stack([torch.autograd.grad(loss, weight)[0].square().mean() for loss in losses])
        assert score.num_examples == len(values)
        assert score.mean == pytest.approx(values.mean().item(), rel=1e-6), name


@UNCERTAIN_ROWS
def test_windows_with_as_many_positions_as_examples_are_said_to_be_approximate_in_a_loop_of_ones_own():
    case = windows_with_as_many_positions_as_examples()
    adapter = get_peft_model(case.model(), case.config())
    for batch in case.batches():
        adapter(**batch).loss.backward()
    with pytest.warns(UserWarning, match=r"The inputs of 2 layers could not be attributed.*temporal_attention"):
        scores = initialize_lora_fim_ranks(adapter).scores
    model = case.model()
    for name, score in scores.items():
        is_temporal = "temporal_attention" in name
        assert score.num_examples == (1 if is_temporal else BATCH) * BATCHES, name
        if is_temporal:
            weight = model.get_submodule(name).weight
            gradients = [torch.autograd.grad(model(**batch).loss, weight)[0] for batch in case.batches()]
            value = BATCH * torch.stack(gradients).square().mean().item()
            assert score.mean == pytest.approx(value, rel=1e-6), name
    x = torch.randn(6, 3, 2)
    with pytest.raises(UnattributableError):
        by_example(x, x, 3)
    assert by_example(x[:, :1], x[:, :1], 1)[0].shape == (1, 6, 2)


def test_weights_of_diffusers_without_a_config_need_an_alpha_of_r():
    """Scripts of diffusers write such files. diffusers then uses the rank of each layer as alpha."""
    differences = {}
    for alpha in (RANK, 2 * RANK):
        model = CASES["unet"].model()
        model.add_adapter(CASES["unet"].config(lora_alpha=alpha))
        allocate("unet", model.eval())
        randomize(model)
        loaded = CASES["unet"].model()
        loaded.load_lora_adapter(get_peft_model_state_dict(model), prefix=None)
        differences[alpha] = (output_of("unet", loaded) - output_of("unet", model)).abs().max().item()
    assert differences[RANK] < 1e-9
    assert differences[2 * RANK] > 0.01


# --- The second process ---


STOCK = """
import importlib, json, pathlib, sys, traceback, warnings
warnings.simplefilter("ignore")
import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file

def by_peft(base, folder):
    return PeftModel.from_pretrained(base, folder)

def by_injection(base, folder):
    model = inject_adapter_in_model(LoraConfig.from_pretrained(folder), base)
    result = set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
    assert not result.unexpected_keys
    assert not any("lora_" in name for name in result.missing_keys)
    return model

def by_library(base, folder):
    if type(base).__module__.startswith("diffusers"):
        base.load_lora_adapter(folder, prefix=None, use_safetensors=True)
        return base
    if type(base).__name__ == "Wav2Vec2ForCTC":  # its own `load_adapter` loads adapters for languages
        return by_peft(base, folder)
    return type(base).from_pretrained(folder, dtype=torch.float64)  # the base model and the adapter on it

def check(folder, module, name, way):
    case = torch.load(folder / "case.pt")
    library, _, _ = module.partition(".")
    base = getattr(importlib.import_module(library), name).from_pretrained(folder / "base", torch_dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # transformers raises one about itself, and PEFT one about grouped convolutions, for any adapter.
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        warnings.filterwarnings("ignore", "LoRA adapter added to ConvNd layer with groups > 1")
        model = globals()[way](base, folder / "adapter").eval()
    with torch.no_grad():
        output = model(**case["inputs"])
    output = output.logits if hasattr(output, "logits") else output.sample
    torch.testing.assert_close(output, case["output"], rtol=1e-9, atol=1e-9)

failures = 0
for folder, *case in json.load(sys.stdin):
    try:
        check(pathlib.Path(folder), *case)
    except Exception:
        print(case, traceback.format_exc(), file=sys.stderr)
        failures += 1
assert not any(name.startswith("fim_lora") for name in sys.modules)
sys.exit(failures)
"""


def save(model, folder, way):
    if way is by_injection:
        folder.mkdir()
        save_file(get_peft_model_state_dict(model), folder / "adapter_model.safetensors")
        model.peft_config["default"].save_pretrained(folder)
    elif way is by_library and hasattr(model, "save_lora_adapter"):
        model.save_lora_adapter(folder)
    else:
        model.save_pretrained(folder)


def test_saved_adapters_give_equal_outputs_in_the_stock_libraries(tmp_path):
    cases = []
    for kind, way in PAIRS:
        case, folder = CASES[kind], tmp_path / f"{kind} {way.__name__}"
        case.model().save_pretrained(folder / "base")
        base = type(case.model()).from_pretrained(folder / "base", torch_dtype=torch.float64)
        model = adapted(kind, way, base)
        allocate(kind, model)
        before = output_of(kind, model)
        randomize(model)
        output = output_of(kind, model)
        assert (output - before).abs().max() > 0.01
        save(model, folder / "adapter", way)
        torch.save({"inputs": case.inputs(case.batches()[0]), "output": output}, folder / "case.pt")
        cases.append((str(folder), type(base).__module__, type(base).__name__, way.__name__))
    command, options = [sys.executable, "-c", STOCK], {"capture_output": True, "text": True, "check": False}
    result = subprocess.run(command, input=json.dumps(cases), env=os.environ, **options)
    assert result.returncode == 0, result.stderr
