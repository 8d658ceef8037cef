"""Trained adapters on small models, and the moments of their components by autograd in float64."""

import copy

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Embedding, MultiheadAttention, ParamWrapper, _ConvNd
from torch.func import functional_call

from fim_lora.adapter.plain_adapter import plain_adapters
from fim_lora.fisher.calibration import calibrate
from fim_lora.fisher.factors import AdapterMoments, PathMoments
from fim_lora.spectrum import adapted_layers, checked_layers, get_lora_spectrum
from fim_lora.spectrum import spectrum_of as measured_spectrum
from helpers.tiny_models import lm_batches, sum_of_losses

TARGETS = ("q_proj", "v_proj", "down_proj")


def trained(base, adapter_name="default", **options):
    """A model with a random adapter, as after training: neither A nor B is zero."""
    torch.manual_seed(1)
    targets = options.pop("target_modules", TARGETS)
    targets = list(targets) if isinstance(targets, tuple) else targets
    options = {"r": 4, "lora_alpha": 6, "target_modules": targets} | options
    model = get_peft_model(base, LoraConfig(**options), adapter_name)
    fill(model, adapter_name)
    return model.eval()


def fill(model, adapter_name="default", seed=3, std=0.3):
    """Random weights for one adapter, with components of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and f".{adapter_name}" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator).to(parameter) * std)


def measured(model, batches, adapter_name="default", num_batches=None, **options):
    """The moments of all layers with the adapter as it is, as a training collects them."""
    layers = checked_layers(model, adapter_name)
    shapes = {name: plain.shape for name, plain in plain_adapters(layers, adapter_name).items()}
    return calibrate(
        model,
        adapted_layers(model, layers, adapter_name),
        AdapterMoments.for_layers(shapes),
        batches,
        num_batches or len(batches),
        show_progress_bar=False,
        **options,
    )


def spectrum_by_gates(model, batches, **options):
    """The spectrum from passes with the adapter as it is alone, as those of a training are."""
    layers = checked_layers(model, "default")
    moments = PathMoments.without_scaled(measured(model, batches, **options))
    plain = plain_adapters(layers, "default")
    return measured_spectrum(adapted_layers(model, layers, "default"), plain, moments, "default")


def spectrum_of(model, data=None, **options):
    """The spectrum over all of the batches."""
    data = lm_batches(2) if data is None else data
    return get_lora_spectrum(model, data, num_batches=len(data), show_progress_bar=False, **options)


def keep_call(seen, module, args, output):
    """A forward hook, after `functools.partial`: it keeps the input, and the output with its gradient."""
    output.retain_grad()
    seen.append((args[0], output))


def lora_layers_of(model, adapter_name="default"):
    """The LoRA layers by the names in `checked_layers`."""
    return checked_layers(model, adapter_name)


# --- The truth: an explicit core M = I between B and A, and its gradient for one example after another ---


def parts_of(layer: LoraLayer):
    """A LoRA layer and the one inside that belongs to it."""
    return [layer, layer.base_layer.out_proj] if isinstance(layer, MultiheadAttention) else [layer]


def b_of(part, adapter_name="default"):
    return part.lora_embedding_B[adapter_name] if isinstance(part, Embedding) else part.lora_B[adapter_name].weight


def a_of(part, adapter_name="default"):
    return part.lora_embedding_A[adapter_name] if isinstance(part, Embedding) else part.lora_A[adapter_name].weight


def identity_cores(layer, adapter_name="default"):
    """One core for every part of each LoRA layer (P × r × r)."""
    cores = []
    for part in parts_of(layer):
        number, rank = 1, part.r[adapter_name]
        if isinstance(part, ParamWrapper):
            number = part.num_experts
        elif isinstance(part, _ConvNd):
            number = part.get_base_layer().groups
            rank //= number
        cores.append(torch.eye(rank, dtype=torch.float64).repeat(number, 1, 1).requires_grad_())
    return cores


def b_with_core(part, core, adapter_name="default"):
    """`B M` in the shape of PEFT's weight B."""
    b = b_of(part, adapter_name).detach()
    if isinstance(part, ParamWrapper):  # the experts are the last index
        return torch.einsum("ore,ers->ose", b.unflatten(1, (-1, len(core))), core).flatten(1)
    if isinstance(part, _ConvNd):
        return torch.einsum("gor...,grs->gos...", b.unflatten(0, (len(core), -1)), core).flatten(0, 1)
    return b @ core[0]


def core_gradients_of(model, layers, losses, adapter_name="default"):
    """Layer name to `Γ_t` (N × P × r × r). Each loss is a function of a callable model: the summed loss of example t.

    `model` is in float64 and stays as it is.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    cores = {name: identity_cores(layer, adapter_name) for name, layer in layers.items()}
    replaced = {
        names[id(b_of(part, adapter_name))]: b_with_core(part, core, adapter_name)
        for name, layer in layers.items()
        for part, core in zip(parts_of(layer), cores[name], strict=True)
    }

    def with_cores(*args, **kwargs):
        return functional_call(model, replaced, args, kwargs)

    leaves = [core for of_layer in cores.values() for core in of_layer]
    by_example = {name: [] for name in layers}
    for loss in losses:
        gradients = torch.autograd.grad(loss(with_cores), leaves, retain_graph=True, allow_unused=True)
        found = iter(
            torch.zeros_like(leaf) if one is None else one for leaf, one in zip(leaves, gradients, strict=True)
        )
        for name, of_layer in cores.items():
            by_example[name].append(torch.cat([next(found) for _ in of_layer]))
    return {name: torch.stack(gradients) for name, gradients in by_example.items()}


def matrices_of(layer, adapter_name="default"):
    """A_p (r × d_in) and B_p (d_out × r) of every part of the adapter, in float64."""
    found = []
    for part in parts_of(layer):
        a, b = (of(part, adapter_name).detach().double().cpu() for of in (a_of, b_of))
        if isinstance(part, ParamWrapper):
            rows, columns = a.unflatten(0, (part.num_experts, -1)), b.unflatten(1, (-1, part.num_experts))
            found += [(rows[expert], columns[:, :, expert]) for expert in range(part.num_experts)]
        elif isinstance(part, _ConvNd):
            groups = part.get_base_layer().groups
            found += list(zip(a.flatten(1).chunk(groups), b.flatten(1).chunk(groups), strict=True))
        else:
            found.append((a, b))
    return found


def deltas_of(layer, adapter_name="default"):
    """`ΔW_p = s · B_p A_p` of every part, dense, in float64."""
    return [layer.scaling[adapter_name] * b @ a for a, b in matrices_of(layer, adapter_name)]


def components_of(layer, of_layer, numbers, adapter_name="default"):
    """The sum of some components of a spectrum, as a dense matrix for every part."""
    return [
        layer.scaling[adapter_name]
        * b
        @ torch.from_numpy(left[:, numbers]).double()
        @ torch.from_numpy(right[numbers]).double()
        @ a
        for (a, b), left, right in zip(matrices_of(layer, adapter_name), of_layer.left, of_layer.right, strict=True)
    ]


def in_float64(model):
    """A copy in float64, in which PEFT's wrappers of parameters and all buffers work as in the model."""
    return copy.deepcopy(model).double().eval()


def losses_of_rows(batches, double=True):
    """For models whose loss is a mean over examples: the loss of every example by itself."""
    for batch in batches:
        for row in range(len(next(iter(batch.values())))):
            one = {key: value[row : row + 1] for key, value in batch.items()}
            if double:
                one = {key: value.double() if value.is_floating_point() else value for key, value in one.items()}
            yield lambda model, one=one: model(**one)["loss"]


class _Callable:
    """What `sum_of_losses` asks a model for, around a function."""

    def __init__(self, function, model):
        self.function = function
        if hasattr(model, "encoder"):
            self.encoder, self._shift_right = model.encoder, model._shift_right

    def __call__(self, **batch):
        return self.function(**batch)


def losses_of_tokens(model, batches):
    """For models of transformers: the summed loss over the labels of every example."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    for batch in batches:
        for row in range(len(batch["input_ids"])):
            yield lambda function, batch=batch, row=row: sum_of_losses(
                _Callable(function, inner), batch, slice(row, row + 1)
            )
