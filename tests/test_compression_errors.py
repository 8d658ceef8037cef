"""Errors of `get_lora_spectrum` and `compress_lora`: what they say, and that they change nothing."""

import copy

import peft
import pytest
import torch
from accelerate import cpu_offload
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.parallel import DataParallel

from fim_lora import FimConfig, compress_lora, get_lora_spectrum
from helpers.adapters import hooks_of, logits, lora_layers
from helpers.every_layer_type import batches, every_type
from helpers.mixtures import Mixture
from helpers.single_layers import WIDTH, batches_of, floats
from helpers.tiny_models import llama, lm_batches, running_out_of_memory, token_batch
from helpers.trained_adapters import fill, lora_layers_of, parts_of, spectrum_of, trained


def snapshot(model):
    """Everything that a call could change. PEFT itself makes the weights of an attention anew in every pass."""
    return (
        {
            name: (
                None if "attention.base_layer" in name else id(value),
                value.shape,
                value.dtype,
                value.requires_grad,
            )
            for name, value in model.named_parameters()
        },
        {name: (id(module), module.training) for name, module in model.named_modules()},
        {
            name: [(dict(part.r), dict(part.scaling), dict(part.lora_alpha)) for part in parts_of(layer)]
            for name, layer in lora_layers(model).items()
        },
        {name: copy.deepcopy(config.__dict__) for name, config in model.peft_config.items()},
        hooks_of(model),
        [parameter.grad for parameter in model.parameters()],
    )


def values_of(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_refused(model, call, error, message):
    before, values = snapshot(model), values_of(model)
    with pytest.raises(error, match=message or None):
        call(model)
    assert snapshot(model) == before
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, values[name], rtol=0, atol=0, equal_nan=True)


# --- Arguments ---

DATA = lm_batches(2)
ARGUMENTS = [
    ({}, ValueError, "Exactly one of keep, r and max_loss_increase says the size; got none"),
    ({"keep": 0.5, "r": 2}, ValueError, r"Exactly one of .* got \{'keep': 0.5, 'r': 2\}"),
    ({"r": 2, "max_loss_increase": 0.1, "eval_dataloader": DATA}, ValueError, "Exactly one of"),
    ({"keep": 0.0}, ValueError, "keep must be above 0 and at most 1, .* got 0.0"),
    ({"keep": 1.5}, ValueError, "keep must be above 0 and at most 1"),
    ({"keep": float("nan")}, ValueError, "keep must be above 0 and at most 1"),
    ({"r": 0}, ValueError, "r must be an integer of at least 1, got 0"),
    ({"r": 2.0}, ValueError, "r must be an integer of at least 1, got 2.0"),
    ({"r": True}, ValueError, "r must be an integer of at least 1, got True"),
    ({"keep": 0.5, "r_max": 0}, ValueError, "r_max must be an integer of at least 1, got 0"),
    ({"max_loss_increase": 0.1}, ValueError, "pass `eval_dataloader`"),
    ({"max_loss_increase": -0.1, "eval_dataloader": DATA}, ValueError, "finite and not negative, got -0.1"),
    ({"max_loss_increase": float("inf"), "eval_dataloader": DATA}, ValueError, "finite and not negative, got inf"),
    ({"keep": 0.5, "eval_dataloader": []}, ValueError, "`eval_dataloader` yielded no batch"),
    ({"keep": 1e-4}, ValueError, "keep=0.0001 leaves no room for a single component: the smallest is 0.0"),
    ({"keep": 0.5, "optimizer": "adam"}, TypeError, "optimizer is a str: pass a torch.optim.Optimizer"),
    (
        {"max_loss_increase": 1e-4, "r_max": 1, "eval_dataloader": DATA, "show_progress_bar": False},
        ValueError,
        "with the largest adapter that r_max=1 allows, more than max_loss_increase=0.0001: raise one of them",
    ),
]


@pytest.mark.parametrize(("options", "error", "message"), ARGUMENTS, ids=[str(one[0])[:40] for one in ARGUMENTS])
def test_arguments_that_make_no_sense(options, error, message):
    model = trained(llama(1))
    spectrum = get_lora_spectrum(model, None)
    assert_refused(model, lambda model: compress_lora(model, spectrum, **options), error, message)


def test_a_cap_below_the_groups_of_the_only_layer():
    model = every_type(names=["convolution"])
    spectrum = get_lora_spectrum(model, None)
    message = "keep=1 leaves no room for a single component.* raise r_max"
    assert_refused(model, lambda model: compress_lora(model, spectrum, keep=1.0, r_max=1), ValueError, message)


@pytest.mark.parametrize(("num_batches", "data"), [(0, lm_batches(1)), (-1, lm_batches(1))])
def test_numbers_of_batches(num_batches, data):
    model = trained(llama(1))
    message = f"num_batches must be at least 1, or None, got {num_batches}"
    assert_refused(model, lambda model: get_lora_spectrum(model, data, num_batches=num_batches), ValueError, message)


def test_data_without_batches_and_batches_without_labels():
    model = trained(llama(1))
    unlabeled = [{key: value for key, value in token_batch().items() if key != "labels"}]
    calls = [(iter([]), ValueError, "yielded no batch"), (unlabeled, ValueError, "loss=None")]
    for data, error, message in calls:
        assert_refused(
            model, lambda model, data=data: get_lora_spectrum(model, data, show_progress_bar=False), error, message
        )


# --- Adapters that cannot be truncated ---


def dora():
    return trained(llama(1), use_dora=True)


def alora():
    return trained(llama(1), alora_invocation_tokens=[1, 2])


def initialized(init):
    return lambda: trained(llama(1), init_lora_weights=init)


def awaiting():
    return get_peft_model(llama(1), LoraConfig(init_lora_weights="fim", fim_config=FimConfig(2)))


def merged():
    model = trained(llama(1))
    model.merge_adapter()
    return model


def tied():
    if Version(peft.__version__) < Version("0.19"):
        pytest.skip("this PEFT ties no adapters")
    targets = ["embed_tokens", "lm_head", "q_proj"]
    return trained(llama(1, tie_word_embeddings=True), target_modules=targets, ensure_weight_tying=True)


def shared_by_hand():
    model = trained(llama(2))
    first, second = (layer.self_attn.q_proj for layer in model.get_base_model().model.layers)
    second.lora_A, second.lora_B = first.lora_A, first.lora_B
    return model


def with_weight(value):
    def make():
        model = trained(llama(1))
        with torch.no_grad():
            model.get_base_model().model.layers[0].mlp.down_proj.lora_A["default"].weight[1, 2] = value
        return model

    return make


def without_scaling():
    model = trained(llama(1))
    model.get_base_model().model.layers[0].mlp.down_proj.set_scale("default", 0)
    return model


def adalora():
    config = peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10, init_r=4, target_r=2)
    return get_peft_model(llama(1), config)


def another_kind():
    return get_peft_model(llama(1), peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))


FORMS = {
    "dora": (dora, r"Layer 'model.layers.0.self_attn.q_proj' has a variant of LoRA \(DoRA\).*convert_to_lora"),
    "alora": (alora, r"has a variant of LoRA \(ALora"),
    "pissa": (initialized("pissa"), "initialized with 'pissa', which changed the base weights.*Save it as plain LoRA"),
    "olora": (initialized("olora"), "initialized with 'olora', which changed the base weights"),
    "awaiting": (awaiting, "still awaits its ranks: call `initialize_lora_fim_ranks`, and train it first"),
    "merged": (merged, "are merged into the base weights"),
    "tied": (tied, "'the input embedding' and 'lm_head' share the weights of their adapter"),
    "shared": (shared_by_hand, r"'model.layers.0.self_attn.q_proj' and 'model.layers.1.self_attn.q_proj' share"),
    "NaN": (with_weight(float("nan")), "'model.layers.0.mlp.down_proj' has weights that are not finite"),
    "infinite": (with_weight(float("inf")), "'model.layers.0.mlp.down_proj' has weights that are not finite"),
    "scaling 0": (without_scaling, "'model.layers.0.mlp.down_proj' has scaling 0, so its adapter adds nothing"),
    "adalora": (adalora, "'default' is a AdaLoraConfig adapter, which is not plain LoRA"),
    "another kind": (another_kind, "is a IA3Config adapter, not a LoRA adapter"),
    "offloaded": (
        lambda: cpu_offload(trained(llama(1)), execution_device=torch.device("cpu")),
        "'model.layers.0.self_attn.q_proj' is offloaded, so its weights cannot be read",
    ),
    "no adapter": (lambda: llama(1), "The model has no adapter"),
}


@pytest.mark.parametrize("with_data", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_forms_of_adapters(form, with_data):
    make, message = FORMS[form]
    model = make()
    data = lm_batches(1) if with_data else None
    if form in ("no adapter", "another kind", "offloaded"):
        with pytest.raises(ValueError, match=message):
            get_lora_spectrum(model, data, show_progress_bar=False)
        return
    assert_refused(model, lambda model: get_lora_spectrum(model, data, show_progress_bar=False), ValueError, message)


@pytest.mark.parametrize("form", ["dora", "pissa", "merged", "shared"])
def test_forms_are_refused_again_where_they_came_after_the_spectrum(form):
    """With a spectrum of the same layers and weights."""
    make, message = FORMS[form]
    model = make()
    spectrum = get_lora_spectrum(trained(llama(len(model.get_base_model().model.layers))), None)
    assert_refused(model, lambda model: compress_lora(model, spectrum, keep=0.5), ValueError, message)


def test_a_wrapped_model_is_refused_by_the_truncation_only():
    model = trained(llama(1))
    wrapped = DataParallel(model)
    spectrum = spectrum_of(wrapped)
    assert spectrum == spectrum_of(model)
    assert_refused(
        model,
        lambda model: compress_lora(wrapped, spectrum, keep=0.5),
        ValueError,
        "wrapped in DataParallel.*pass `model.module`",
    )


def test_an_adapter_that_is_not_active():
    model = trained(llama(1), "one")
    model.add_adapter("two", LoraConfig(target_modules=["q_proj"]))
    model.set_adapter("two")
    message = r"Adapter 'one' is not active in layer .*: call `set_adapter\('one'\)`"
    assert_refused(model, lambda model: spectrum_of(model, adapter_name="one"), ValueError, message)
    spectrum = get_lora_spectrum(model, None, adapter_name="one")
    evaluated = {"eval_dataloader": DATA, "show_progress_bar": False}
    assert_refused(model, lambda model: compress_lora(model, spectrum, keep=0.5, **evaluated), ValueError, message)
    with model.disable_adapter():
        assert_refused(model, lambda model: spectrum_of(model, adapter_name="two"), ValueError, "is not active")
    compress_lora(model, spectrum, keep=0.5)  # needs no forward pass


def test_a_name_that_does_not_exist():
    model = trained(llama(1))
    assert_refused(
        model, lambda model: spectrum_of(model, adapter_name="other"), ValueError, r"no adapter 'other'; it has"
    )


# --- A spectrum of other weights ---


def changed_weight(model):
    with torch.no_grad():
        model.get_base_model().model.layers[0].mlp.down_proj.lora_B["default"].weight[3, 1] += 1e-3


def changed_scaling(model):
    model.get_base_model().model.layers[0].mlp.down_proj.set_scale("default", 0.9)


@pytest.mark.parametrize("change", [changed_weight, changed_scaling])
def test_weights_that_changed_after_the_spectrum(change):
    model = trained(llama(1))
    spectrum = spectrum_of(model)
    change(model)
    message = r"layer 'model.layers.0.mlp.down_proj' has other weights.*Measure it again"
    assert_refused(model, lambda model: compress_lora(model, spectrum, keep=0.5), ValueError, message)


@pytest.mark.parametrize(
    "other",
    [
        lambda: trained(llama(2)),
        lambda: trained(llama(1), target_modules=["q_proj"]),
        lambda: trained(llama(1), target_modules=["q_proj", "k_proj", "down_proj"]),
    ],
)
def test_a_spectrum_of_another_adapter(other):
    model = trained(llama(1))
    spectrum = get_lora_spectrum(other(), None)
    assert_refused(
        model,
        lambda model: compress_lora(model, spectrum, keep=0.5),
        ValueError,
        "have different layers, such as .*the spectrum is of another adapter",
    )


def test_a_truncated_adapter_needs_a_new_spectrum():
    model = trained(llama(1))
    spectrum = spectrum_of(model)
    compress_lora(model, spectrum, keep=0.9)
    assert_refused(model, lambda model: compress_lora(model, spectrum, keep=0.5), ValueError, "Measure it again")


def test_a_spectrum_of_the_same_adapter_on_another_copy_is_good():
    model, copied = trained(llama(1)), trained(llama(1))
    first = compress_lora(model, spectrum_of(copied), keep=0.5)
    assert first == compress_lora(copied, spectrum_of(copied), keep=0.5)
    assert torch.equal(logits(model), logits(copied))


# --- Layers that cannot lose their adapter ---


@pytest.mark.parametrize("options", [{"bias": "lora_only"}, {"lora_bias": True}])
def test_trained_biases_need_a_rank(options):
    model = trained(llama(1), **options)
    spectrum = get_lora_spectrum(model, None)
    message = r"would lose its adapter, and with it a trained bias .*: keep=0.1 is too small"
    assert_refused(model, lambda model: compress_lora(model, spectrum, keep=0.1), ValueError, message)


def test_a_parameter_that_another_adapter_adapts_too():
    options = {"target_modules": ["first"], "target_parameters": ["experts.up"]}
    model = trained(Mixture(), "one", **options)
    try:
        model.add_adapter("two", LoraConfig(r=2, **options))
    except ValueError as error:
        pytest.skip(f"this PEFT says: {error}")
    model.set_adapter("one")
    data = batches_of(floats(5, WIDTH))
    spectrum = get_lora_spectrum(model, data, adapter_name="one", num_batches=2, show_progress_bar=False)
    smallest = {name: layer.parameters_per_component for name, layer in spectrum.items()}
    too_small = (smallest["experts.up"] - 1) / spectrum.num_parameters
    message = "Layer 'experts.up' would lose its adapter, and with it .*the place of another adapter"
    assert_refused(model, lambda model: compress_lora(model, spectrum, keep=too_small), ValueError, message)
    enough = (smallest["experts.up"] + 0.5) / spectrum.num_parameters
    assert compress_lora(model, spectrum, keep=enough).ranks == {"first": 0, "experts.up": 1}


# --- Failures on the way ---


@pytest.mark.parametrize("place", [0, -1])
def test_a_failure_inside_of_peft_leaves_everything_as_it_was(place):
    model = every_type().train()
    spectrum = spectrum_of(model, batches())
    ranks = spectrum.ranks_of(spectrum.keep(spectrum.num_parameters // 2))
    kept = [name for name, rank in ranks.items() if rank]
    layer = lora_layers_of(model)[kept[place]]
    optimizer = torch.optim.Adam([value for value in model.parameters() if value.requires_grad])
    model(**batches()[0])["loss"].backward()
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    spectrum = spectrum_of(model, batches())
    before, values = snapshot(model), values_of(model)
    with running_out_of_memory(layer):
        compress_lora(model, spectrum, keep=0.5, optimizer=optimizer)
    assert snapshot(model) == before
    torch.testing.assert_close(model.state_dict(), values, rtol=0, atol=0)
    torch.testing.assert_close(optimizer.state_dict(), state, rtol=0, atol=0)
    compress_lora(model, spectrum, keep=0.5, optimizer=optimizer)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("place", ["dataloader", "forward", "backward"])
def test_an_exception_while_the_spectrum_is_measured_leaves_no_trace(place):
    model = trained(llama()).train()
    model.model.model.layers[1].eval()
    model(**token_batch()).loss.backward()
    before, values = snapshot(model), values_of(model)
    seen = 0

    def data():
        yield token_batch(seed=0)
        if place == "dataloader":
            raise Interrupted
        yield token_batch(seed=1)

    class Breaking(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise Interrupted

    def forward(model, batch):
        nonlocal seen
        seen += 1
        if seen == 2 and place == "forward":
            model.model.model.layers[0](torch.zeros(1, 1, 24), position_embeddings=(torch.ones(1, 1, 6),) * 2)
            raise Interrupted
        loss = model(**batch).loss
        return Breaking.apply(loss) if seen == 2 and place == "backward" else loss

    with pytest.raises(Interrupted):
        get_lora_spectrum(model, data(), num_batches=2, forward_fn=forward, show_progress_bar=False)
    assert snapshot(model) == before
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    expected = spectrum_of(trained(llama()))
    assert spectrum_of(model) == expected


def test_an_exception_while_the_loss_is_measured_leaves_no_trace():
    model = trained(llama()).train()
    spectrum, calls = spectrum_of(model), 0

    def forward(model, batch):
        nonlocal calls
        calls += 1
        if calls > 4:
            raise Interrupted
        return model(**batch)

    assert_refused(
        model,
        lambda model: compress_lora(
            model,
            spectrum,
            max_loss_increase=0.1,
            eval_dataloader=DATA,
            forward_fn=forward,
            show_progress_bar=False,
        ),
        Interrupted,
        "",
    )
    assert calls == 5


def test_a_layer_whose_class_is_unknown():
    class Strange(nn.Linear):
        pass

    class Wrapper(peft.tuners.lora.Linear):
        """No LoRA layer of PEFT's, but still one that calls its A."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Strange(WIDTH, WIDTH)

        def forward(self, x, target):
            return {"loss": (self.layer(x) - target[:, None, None]).square().mean()}

    config = LoraConfig(r=2, target_modules=["layer"])
    config._register_custom_module({Strange: Wrapper})
    model = get_peft_model(Net(), config)
    fill(model)
    data = batches_of(floats(5, WIDTH))
    result = compress_lora(model, spectrum_of(model, data), keep=0.5)
    assert result.ranks == {"layer": 1}
