"""Offloaded layers, several devices, autocast with a gradient scaler, gradient accumulation and `torch.compile`."""

import copy
import weakref

import pytest
import torch
from accelerate import Accelerator, cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._dynamo import OptimizedModule
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import MixtralConfig, MixtralForCausalLM

from fim_lora import FimConfig, get_fim_scores, initialize_lora_fim_ranks
from fim_lora.calibration import calibrate
from fim_lora.calls import SavedInput
from fim_lora.estimator import FisherEstimator
from tiny_models import VOCABULARY, llama, lm_batches, names_of, number_of_terms, per_example_scores, sum_of_losses

TARGETS = ("q_proj", "v_proj", "down_proj")
HOST, SECOND = torch.device("cpu"), torch.device("cpu:1")


def fim_config(batches=2, **options):
    fim = FimConfig(fim_calibration_batches=batches, init_lora_weights=options.pop("final", True))
    return LoraConfig(init_lora_weights="fim", fim_config=fim, **({"r": 8, "target_modules": list(TARGETS)} | options))


def fim_model(base, **options):
    torch.manual_seed(1)
    return get_peft_model(base, fim_config(**options))


def truth_of(batches, layers=1):
    model = llama(layers)
    return per_example_scores(model, batches, names_of(model, *TARGETS))


def reference(layers=1, batches=None):
    """Of the plain model in float32, on one device, by a loop of one's own."""
    batches = batches or lm_batches(2)
    model = fim_model(llama(layers), batches=len(batches))
    for batch in batches:
        model(**batch).loss.backward()
    return initialize_lora_fim_ranks(model)


def assert_scores(scores, truth, rel=1e-5, factor=1.0):
    assert set(scores) == set(truth)
    for name, values in truth.items():
        assert scores[name].mean == pytest.approx(factor * values.mean().item(), rel=rel), name


def adapter_state(model):
    return {name: value for name, value in model.named_parameters() if "lora_" in name}


def copy_adapter(source, target):
    values = {name.replace("_orig_mod.", ""): value for name, value in adapter_state(source).items()}
    with torch.no_grad():
        for name, parameter in adapter_state(target).items():
            parameter.copy_(values[name.replace("_orig_mod.", "")])


def assert_trains_alike(model, other, batch):
    """One step from the same weights: the same loss, the same gradients, and the loss goes down."""
    copy_adapter(model, other)
    losses = []
    for one in (model, other):
        one.train()
        one.zero_grad()
        optimizer = torch.optim.SGD([value for value in one.parameters() if value.requires_grad], 0.1)
        loss = one(**batch).loss
        loss.backward()
        gradients = {name.replace("_orig_mod.", ""): value.grad.clone() for name, value in adapter_state(one).items()}
        optimizer.step()
        losses.append((loss.detach(), gradients, one(**batch).loss.item()))
    torch.testing.assert_close(losses[0][:2], losses[1][:2], rtol=1e-4, atol=1e-6)
    assert losses[0][2] < losses[0][0].item()


def test_a_loss_that_is_still_in_scope_does_not_disturb_the_training():
    """Its graph remembers the shapes from before the allocation."""
    model = fim_model(llama(1))
    for batch in lm_batches(2):
        outputs = model(**batch)
        outputs.loss.backward()
    allocation = initialize_lora_fim_ranks(model)
    other = get_peft_model(llama(1), allocation.to_lora_config(fim_config()))
    assert_trains_alike(model, other, lm_batches(1)[0])
    assert outputs.loss.grad_fn is not None


# --- Offloaded layers ---


def dispatched(model, folder):
    model.config.use_cache = False
    places = {"embed_tokens": "cpu", "layers.0": "disk", "layers.1": "cpu", "norm": "cpu", "rotary_emb": "cpu"}
    device_map = {f"model.{name}": place for name, place in places.items()} | {"lm_head": "disk"}
    return dispatch_model(model, device_map, main_device="cpu", offload_dir=folder)


OFFLOADING = {
    "device_map": dispatched,
    "cpu_offload": lambda model, folder: cpu_offload(model, execution_device=HOST),
    "disk_offload": lambda model, folder: disk_offload(model, folder, execution_device=HOST),
}


def offloaded_names(model):
    return {name for name, parameter in model.named_parameters() if parameter.device.type == "meta"}


def base_weights(model):
    """What Accelerate would load, by name in the base model."""
    return {
        f"{name.removeprefix('base_model.model.').removesuffix('.base_layer')}.{key}": module._hf_hook.weights_map[key]
        for name, module in model.named_modules()
        if isinstance(getattr(module, "_hf_hook", None), AlignDevicesHook) and module._hf_hook.offload
        for key, parameter in module._parameters.items()
        if parameter is not None
    }


@pytest.mark.parametrize("how", OFFLOADING)
def test_scores_of_an_offloaded_model(how, tmp_path):
    batches = lm_batches(2)
    model = OFFLOADING[how](llama(2), tmp_path)
    before = offloaded_names(model)
    assert "model.layers.0.self_attn.q_proj.weight" in before
    scores = get_fim_scores(model, batches, fim_config(), show_progress_bar=False)
    assert_scores(scores, truth_of(batches, layers=2))
    assert scores == get_fim_scores(llama(2), batches, fim_config(), show_progress_bar=False)
    assert offloaded_names(model) == before


@pytest.mark.parametrize("how", OFFLOADING)
@pytest.mark.parametrize("use_dataloader", [False, True])
def test_ranks_and_training_of_an_offloaded_model(how, use_dataloader, tmp_path):
    batches, expected = lm_batches(2), reference(layers=2)
    base = OFFLOADING[how](llama(2), tmp_path)
    hooks = {id(module): module._hf_hook for module in base.modules() if hasattr(module, "_hf_hook")}
    model = fim_model(base)
    before = offloaded_names(model)
    assert before
    assert not any("lora_" in name for name in before)
    if use_dataloader:
        allocation = initialize_lora_fim_ranks(model, batches, show_progress_bar=False)
    else:
        for batch in batches:
            model(**batch).loss.backward()
        allocation = initialize_lora_fim_ranks(model)

    assert allocation.ranks == expected.ranks
    assert_scores(allocation.scores, truth_of(batches, layers=2))
    assert {parameter.device for parameter in adapter_state(model).values()} == {HOST}
    assert offloaded_names(model) == before
    assert {id(module): module._hf_hook for module in model.modules() if id(module) in hooks} == hooks
    original, loaded = dict(llama(2).named_parameters()), base_weights(model)
    assert len(loaded) == len(before)
    assert all(torch.equal(value, original[name]) for name, value in loaded.items())

    other = get_peft_model(llama(2), allocation.to_lora_config(fim_config()))
    assert_trains_alike(model, other, batches[0])
    assert offloaded_names(model) == before


def test_offloaded_layers_under_gradient_checkpointing(tmp_path):
    """The weights of a block are loaded a second time, for its backward pass."""
    batches = lm_batches(2)
    model = fim_model(disk_offload(llama(2), tmp_path, execution_device=HOST)).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for batch in batches:
        model(**batch).loss.backward()
    assert_scores(initialize_lora_fim_ranks(model).scores, truth_of(batches, layers=2))


def mixtral():
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        pad_token_id=0,
        initializer_range=0.2,
    )
    return MixtralForCausalLM(config)


def test_scores_of_offloaded_experts():
    """They are run again for every example, when their weights have been dropped already."""
    batches, names = lm_batches(2), ["experts.gate_up_proj", "experts.down_proj"]
    config = fim_config(target_modules=["q_proj"], target_parameters=names)
    model = cpu_offload(mixtral(), execution_device=HOST)
    scores = get_fim_scores(model, batches, config, show_progress_bar=False)

    double = mixtral().double().eval()
    double.set_experts_implementation("eager")  # the others know no float64
    names = [f"model.layers.0.mlp.{name}" for name in names]
    values = {name: [] for name in names}
    for batch in batches:
        for row in range(len(batch["labels"])):
            share = sum_of_losses(double, batch, slice(row, row + 1)) * len(batch["labels"])
            share = share / number_of_terms(double, batch)
            for name, gradient in zip(
                names, torch.autograd.grad(share, [double.get_parameter(name) for name in names]), strict=True
            ):
                values[name].append(gradient.square().mean())
    assert_scores({name: scores[name] for name in names}, {name: torch.stack(value) for name, value in values.items()})
    assert offloaded_names(model) == {name for name, _ in model.named_parameters()}


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.attention = nn.Linear(8, 8), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        x = self.first(x)
        return {"loss": self.attention(x, x, x, need_weights=False)[0].square().sum((1, 2)).mean()}


def test_scores_of_offloaded_attention():
    torch.manual_seed(1)
    batch = {"x": torch.randn(3, 5, 8)}
    model = cpu_offload(Attention(), execution_device=HOST, preload_module_classes=["MultiheadAttention"])
    config = fim_config(target_modules=["attention"], batches=1)
    scores = get_fim_scores(model, [batch], config, show_progress_bar=False)
    double = Attention().double()
    weights = [double.attention.in_proj_weight, double.attention.out_proj.weight]
    values = []
    for row in range(3):
        gradients = torch.autograd.grad(double(batch["x"][row : row + 1].double())["loss"], weights)
        values.append(torch.cat([gradient.flatten() for gradient in gradients]).square().mean())
    assert_scores(scores, {"attention": torch.stack(values)})


@pytest.mark.parametrize("final", ["pissa", "olora"])
def test_an_initialisation_that_changes_offloaded_weights_is_refused(final, tmp_path):
    model = fim_model(disk_offload(llama(1), tmp_path, execution_device=HOST), final=final)
    before = {name: value.clone() for name, value in adapter_state(model).items()}
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.self_attn\.q_proj' is offloaded: load"):
        initialize_lora_fim_ranks(model, lm_batches(2), show_progress_bar=False)
    assert all(torch.equal(value, before[name]) for name, value in adapter_state(model).items())
    assert initialize_lora_fim_ranks(fim_model(llama(1), final=final), lm_batches(2), show_progress_bar=False)


# --- Several devices ---


class OnSecondDevice(torch.Tensor):
    """A tensor on a device that does not exist. Its values are those of a tensor on the CPU."""

    @staticmethod
    def __new__(cls, value):
        return torch.Tensor._make_wrapper_subclass(
            cls, value.shape, strides=value.stride(), dtype=value.dtype, device=SECOND
        )

    def __init__(self, value):
        self.value = value

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return on_one_device(function, args, kwargs or {})


class TwoDevices(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return on_one_device(function, args, kwargs or {})


def on_one_device(function, args, kwargs):
    """As PyTorch does it for GPUs: only copies go from device to device, and numbers may come from the host."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    devices = {tensor.device for tensor in tensors if tensor.ndim or tensor.device != HOST}
    copies = function is torch.ops.aten.copy_.default
    if len(devices) > 1 and not copies:
        raise RuntimeError(f"{function} of tensors on {devices}")
    device = kwargs.get("device") or (tensors[0].device if copies else next(iter(devices), HOST))

    def inside(value):
        if isinstance(value, OnSecondDevice):
            return value.value
        return HOST if value == SECOND else value

    result = function(*tree_map(inside, args), **tree_map(inside, kwargs))
    if function._schema.name.endswith("_"):
        return args[0]
    return tree_map(
        lambda value: OnSecondDevice(value) if isinstance(value, torch.Tensor) and device == SECOND else value, result
    )


def moving_its_input(layer_class):
    """As layers behave under the hooks of Accelerate: whoever watches the call sees the input before it is moved."""

    class Moving(layer_class):
        def forward(self, *args, **kwargs):
            device = next(self.parameters()).device
            return super().forward(*(x.to(device) for x in args), **kwargs)

    return Moving


class OfAllTypes(nn.Module):
    """Embedding and convolution on the second device, the rest on the first, and back to the second."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = moving_its_input(nn.Embedding)(9, 6)
        self.first = moving_its_input(nn.Linear)(6, 6)
        self.convolution = moving_its_input(nn.Conv1d)(6, 4, 3)
        self.attention = moving_its_input(nn.MultiheadAttention)(4, 2, batch_first=True)
        self.last = moving_its_input(nn.Linear)(4, 3)

    def forward(self, ids):
        x = torch.tanh(self.first(self.embedding(ids)))
        x = torch.tanh(self.convolution(x.mT)).mT.to(HOST)
        x = self.attention(x, x, x, need_weights=False)[0].to(HOST)
        return self.last(x).square().sum((1, 2)).mean()


def test_layers_on_several_devices():
    torch.manual_seed(1)
    batches = [torch.randint(0, 9, (3, 7)) for _ in range(2)]
    names = ["embedding", "first", "convolution", "attention", "last"]

    def layers(model):
        return {name: model.get_submodule(name) for name in names}

    model, values = OfAllTypes().double(), {name: [] for name in names}
    for batch in batches:
        for row in range(3):
            model.zero_grad()
            model(batch[row : row + 1]).backward()
            for name, layer in layers(model).items():
                weights = [value.grad for key, value in layer.named_parameters() if key.endswith("weight")]
                values[name].append(torch.cat([gradient.flatten() for gradient in weights]).square().mean())
    truth = {name: torch.stack(value) for name, value in values.items()}

    model = OfAllTypes()
    with TwoDevices():
        for name in ("embedding", "convolution", "attention", "last"):
            for module in model.get_submodule(name).modules():
                for key, parameter in module.named_parameters(recurse=False):
                    module._parameters[key] = nn.Parameter(OnSecondDevice(parameter.detach()))
        with pytest.raises(RuntimeError, match="of tensors on"):
            nn.Linear.forward(model.last, torch.randn(2, 4))
        scores = calibrate(model, layers(model), batches, 2, show_progress_bar=False)
    assert_scores(scores, truth)


# --- Mixed precision ---


def scaled_loop(model, batches, dtype, scale, overflow=()):
    """The calibration part of a loop with a gradient scaler; its scale stays, because no optimizer takes a step."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    for index, batch in enumerate(batches):
        with torch.autocast("cpu", dtype):
            loss = model(**batch).loss
        if index in overflow:
            loss = loss * 1e30
        scaler.scale(loss).backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_with_a_gradient_scaler(dtype):
    batches, truth, allocations = lm_batches(3), truth_of(lm_batches(3)), {}
    for scale in (1.0, 2.0**10):
        model = fim_model(llama(1), batches=3)
        scaled_loop(model, batches, dtype, scale)
        allocations[scale] = initialize_lora_fim_ranks(model)
        assert allocations[scale].scores.num_skipped_batches == 0
        # The forward pass rounds to 8 bits (bfloat16) or 11 bits (float16).
        assert_scores(allocations[scale].scores, truth, rel=0.1 if dtype == torch.bfloat16 else 0.01, factor=scale**2)
    plain, scaled = allocations[1.0], allocations[2.0**10]
    assert scaled.ranks == plain.ranks
    for name, score in plain.scores.items():
        # A power of two changes no digit, as long as nothing is so small that float16 rounds it more coarsely.
        rel = 1e-6 if dtype == torch.bfloat16 else 1e-3
        assert scaled.scores[name].mean == pytest.approx(2.0**20 * score.mean, rel=rel)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_batch_that_overflows_is_left_out(dtype):
    batches = lm_batches(3)
    model = fim_model(llama(1), batches=3)
    scaled_loop(model, batches, dtype, 2.0**10, overflow={1})
    with pytest.warns(UserWarning, match="1 of 3 calibration batches had a loss or gradients that are not finite"):
        allocation = initialize_lora_fim_ranks(model)
    assert (allocation.num_batches, allocation.scores.num_skipped_batches, allocation.num_examples) == (3, 1, 8)

    without = fim_model(llama(1), batches=2)
    scaled_loop(without, [batches[0], batches[2]], dtype, 2.0**10)
    assert dict(initialize_lora_fim_ranks(without).scores) == dict(allocation.scores)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_forward_function_under_autocast(dtype):
    batches = lm_batches(2)

    def forward_fn(model, batch):
        with torch.autocast("cpu", dtype):
            return model(**batch)

    scores = get_fim_scores(llama(1), batches, fim_config(), forward_fn=forward_fn, show_progress_bar=False)
    assert_scores(scores, truth_of(batches), rel=0.1 if dtype == torch.bfloat16 else 0.01)
    exact = get_fim_scores(llama(1), batches, fim_config(), show_progress_bar=False)
    assert all(scores[name].mean != exact[name].mean for name in scores)


@pytest.fixture
def new_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield lambda **options: Accelerator(cpu=True, **options)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_bfloat16_of_accelerate(new_accelerator):
    batches = lm_batches(2)
    accelerator = new_accelerator(mixed_precision="bf16")
    by_hand = fim_model(llama(1))
    scaled_loop(by_hand, batches, torch.bfloat16, 1.0)
    expected = initialize_lora_fim_ranks(by_hand)

    model = accelerator.prepare(fim_model(llama(1)))
    for batch in batches:
        accelerator.backward(model(**batch).loss)
    allocation = initialize_lora_fim_ranks(accelerator.unwrap_model(model))
    assert allocation.scores == expected.scores
    assert allocation.ranks == expected.ranks
    by_loader = initialize_lora_fim_ranks(accelerator.prepare(fim_model(llama(1))), batches, show_progress_bar=False)
    assert by_loader.ranks == expected.ranks
    assert_scores(by_loader.scores, truth_of(batches), rel=0.1)


# --- Gradient accumulation ---


@pytest.mark.parametrize("steps", [2, 4])
def test_every_micro_batch_is_a_calibration_batch(steps):
    batches = lm_batches(4)
    expected = reference(batches=batches[:3])
    model = fim_model(llama(1), batches=3)
    for batch in batches:  # one more than are asked for
        (model(**batch).loss / steps).backward()
    allocation = initialize_lora_fim_ranks(model)
    assert (allocation.num_batches, allocation.num_examples) == (3, 12)
    assert_scores(allocation.scores, truth_of(batches[:3]), factor=1 / steps**2)
    assert allocation.ranks == expected.ranks


def test_accumulate_of_accelerate(new_accelerator):
    batches = lm_batches(4)
    accelerator = new_accelerator(gradient_accumulation_steps=2)
    model = fim_model(llama(1), batches=4)
    adapter = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(adapter, lr=0.0))
    for batch in batches:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    allocation = initialize_lora_fim_ranks(accelerator.unwrap_model(model))
    assert allocation.num_batches == 4
    assert_scores(allocation.scores, truth_of(batches), factor=1 / 4)
    undivided = initialize_lora_fim_ranks(fim_model(llama(1), batches=4), batches, show_progress_bar=False)
    assert allocation.ranks == undivided.ranks


# --- torch.compile ---


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled_in_place(model, backend):
    model.compile(backend=backend)
    return model


COMPILING = {
    "torch.compile(model)": lambda model, backend: torch.compile(model, backend=backend),
    "model.compile()": compiled_in_place,
}


@pytest.mark.parametrize("how", COMPILING)
@pytest.mark.parametrize("use_before", [False, True])
def test_a_calibration_with_a_dataloader_runs_without_the_compiled_code(how, use_before):
    """Dynamo does not look whether hooks have come, so code of before the calibration would not call them."""
    batches = lm_batches(2)
    model = COMPILING[how](llama(1).eval(), "aot_eager")
    if use_before:
        model(**batches[0]).loss.backward()
    scores = get_fim_scores(model, batches, fim_config(), show_progress_bar=False)
    assert_scores(scores, truth_of(batches))
    assert scores == get_fim_scores(llama(1), batches, fim_config(), show_progress_bar=False)


def test_a_compiled_adapter_calibrates_with_a_dataloader_even_as_one_graph():
    batches = lm_batches(2)
    inner = fim_model(llama(1))
    model = torch.compile(inner, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="fim_lora watches this pass to collect the eFIM"):
        model(**batches[0])
    allocation = initialize_lora_fim_ranks(model, batches, show_progress_bar=False)
    assert_scores(allocation.scores, truth_of(batches))
    other = get_peft_model(llama(1), allocation.to_lora_config(fim_config()))
    assert_trains_alike(model, other, batches[0])


COMPILED_ADAPTERS = {
    "torch.compile(get_peft_model(base))": lambda backend: torch.compile(fim_model(llama(1)), backend=backend),
    "get_peft_model(torch.compile(base))": lambda backend: fim_model(torch.compile(llama(1), backend=backend)),
    "model.compile()": lambda backend: compiled_in_place(fim_model(llama(1)), backend),
}


@pytest.mark.parametrize(
    ("how", "backend"), list(zip(COMPILED_ADAPTERS, ["aot_eager", "eager", "eager"], strict=True))
)
def test_the_own_loop_of_a_compiled_adapter(how, backend):
    batches = lm_batches(2)
    model = COMPILED_ADAPTERS[how](backend)
    counters.clear()
    for batch in batches:
        model(**batch).loss.backward()
    assert counters["stats"]["unique_graphs"] > 1  # it was compiled, around the hooks
    # Whoever holds the compiled model may well pass the one inside.
    inner = model._orig_mod if isinstance(model, OptimizedModule) else model
    allocation = initialize_lora_fim_ranks(inner)
    assert_scores(allocation.scores, truth_of(batches))
    assert allocation.ranks == reference().ranks

    counters.clear()
    other = get_peft_model(llama(1), allocation.to_lora_config(fim_config()))
    assert_trains_alike(model, other, batches[0])
    assert counters["stats"]["unique_graphs"] == 1  # as for stock PEFT: nothing is left of the hooks
    assert not counters["graph_break"]


def test_a_layer_that_was_compiled_and_used_before_is_watched():
    batches, base = lm_batches(2), llama(1)
    base.model.layers[0].self_attn.v_proj.compile(backend="eager")
    base(**batches[0])
    model = fim_model(base)
    for batch in batches:
        model(**batch).loss.backward()
    assert_scores(initialize_lora_fim_ranks(model).scores, truth_of(batches))


def test_inductor():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    batches = [torch.randn(4, 7, 6) for _ in range(2)]
    double = copy.deepcopy(model).double()
    values = {"0": [], "2": []}
    for x in torch.cat(batches).double():
        double.zero_grad()
        double(x[None]).square().sum().backward()
        for name, value in values.items():
            value.append(double.get_submodule(name).weight.grad.square().mean())
    truth = {name: torch.stack(value) for name, value in values.items()}

    compiled = torch.compile(model, backend="inductor")
    compiled(batches[0]).square().sum().backward()
    estimator = FisherEstimator({name: model.get_submodule(name) for name in values})
    torch.compiler.reset()
    estimator.attach(model)
    for x in batches:
        (compiled(x).square().sum() / len(x)).backward()
    assert_scores(estimator.scores(), truth)
    scores = calibrate(
        compiled, estimator.layers, batches, 2, lambda model, x: model(x).square().sum() / len(x), False
    )
    assert_scores(scores, truth)


# --- What autograd keeps ---


class Kept:
    """A tensor that autograd keeps, as long as it does."""

    def __init__(self, tensor):
        self.tensor = tensor


def bytes_kept(model, batch):
    """Of all tensors that autograd has at the end of a forward pass, by storage."""
    kept = weakref.WeakSet()

    def keep(tensor):
        kept.add(holder := Kept(tensor))
        return holder

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda holder: holder.tensor):
        loss = model(**batch).loss
    storages = [holder.tensor.untyped_storage() for holder in kept]
    total = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    loss.backward()
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hooks_keep_hardly_more_than_plain_lora(dtype):
    """Where the model is in bfloat16, PEFT's adapters are in float32, and so is the copy of the input they work on."""
    batch = lm_batches(1, length=40)[0]
    base = llama(4).to(dtype)
    plain = get_peft_model(copy.deepcopy(base), LoraConfig(r=8, target_modules=list(TARGETS)))
    model = fim_model(copy.deepcopy(base), batches=2)
    input_of_first_block = batch["input_ids"].numel() * base.config.hidden_size * dtype.itemsize
    more = bytes_kept(model, batch) - bytes_kept(plain, batch)
    assert more <= (0 if dtype == torch.float32 else input_of_first_block) + 2000  # some small numbers


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("adapters", [["default"], ["other", "default"]])
def test_scores_are_those_of_the_input_whatever_the_adapter_is_called_with(dropout, adapters):
    batches = lm_batches(2)
    base = llama().to(torch.bfloat16)
    truth = get_fim_scores(copy.deepcopy(base), batches, fim_config(), show_progress_bar=False)
    model = fim_model(base, lora_dropout=dropout)
    if len(adapters) > 1:
        model.add_adapter("other", LoraConfig(r=4, target_modules=list(TARGETS)))
        model.base_model.set_adapter(adapters)
    for batch in batches:
        model(**batch).loss.backward()
    scores = initialize_lora_fim_ranks(model).scores
    for name, score in scores.items():
        # B is zero, so the passes are those of the plain model but for the order of rounding.
        assert score.mean == pytest.approx(truth[name].mean, rel=2e-2)


def test_a_copy_of_another_tensor_or_to_a_coarser_dtype_is_not_taken_for_the_input():
    x = torch.randn(2, 3, dtype=torch.bfloat16).requires_grad_() * 1
    x, beside = torch.cat([x, 2 * x]).chunk(2)  # two outputs of one step
    for copied in (x.half(), beside.float(), (x * 2).float(), x.float() * 2, x.detach().float(), x.float()[:1]):
        saved = SavedInput(x)
        saved.keep_instead(copied)
        assert torch.equal(saved.take("layer", x).input, x)
    saved = SavedInput(x)
    saved.keep_instead(x.float())
    kept = saved._saved._anchor.grad_fn.saved_tensors[0]
    assert kept.dtype == torch.float32
    assert torch.equal(saved.take("layer", x).input, x)
