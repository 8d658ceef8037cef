"""Models and layers under `torch.compile`."""

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch._dynamo import OptimizedModule
from torch._dynamo.utils import counters

from fim_lora import get_fim_scores, initialize_lora_fim_ranks
from fim_lora.adapter.plain_adapter import plain_adapters
from fim_lora.fisher.factors import AdapterMoments
from fim_lora.fisher.recorder import Recorder
from fim_lora.spectrum import adapted_layers, checked_layers
from helpers.calibration import calibrate_norms, norm_recorder
from helpers.llama_calibration import assert_scores, assert_trains_alike, fim_config, fim_model, reference, truth_of
from helpers.tiny_models import llama, lm_batches
from helpers.trained_adapters import trained


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
    """Dynamo does not check for new hooks, so code compiled before the calibration would not call them."""
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
    with pytest.raises(torch._dynamo.exc.Unsupported, match="fim_lora watches this pass, until"):
        model(**batches[0])
    allocation = initialize_lora_fim_ranks(model, batches, show_progress_bar=False)
    assert_scores(allocation.scores, truth_of(batches))
    other = get_peft_model(llama(1), allocation.to_lora_config(fim_config()))
    assert_trains_alike(model, other, batches[0])


@pytest.mark.parametrize("compiled", ["", "model.layers.0"])
def test_one_graph_with_a_watched_adapter_is_refused_with_the_fix(compiled):
    """`FimCompressionCallback` watches the passes of a training, where the hook on a base layer is the first."""
    model = trained(llama(1))
    model.get_base_model().get_submodule(compiled).compile(backend="eager", fullgraph=True)
    layers = checked_layers(model, "default")
    shapes = {name: one.shape for name, one in plain_adapters(layers, "default").items()}
    recorder = Recorder(adapted_layers(model, layers, "default"), AdapterMoments.for_layers(shapes))
    recorder.start(model)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"until .* or `FimCompressionCallback` cuts"):
        model(**lm_batches(1)[0])


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
    # Users may pass the inner model instead of the compiled one.
    inner = model._orig_mod if isinstance(model, OptimizedModule) else model
    allocation = initialize_lora_fim_ranks(inner)
    assert_scores(allocation.scores, truth_of(batches))
    assert allocation.ranks == reference().ranks

    counters.clear()
    other = get_peft_model(llama(1), allocation.to_lora_config(fim_config()))
    assert_trains_alike(model, other, batches[0])
    assert counters["stats"]["unique_graphs"] == 1  # as for stock PEFT: no hooks are left
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
    recorder = norm_recorder({name: model.get_submodule(name) for name in values})
    torch.compiler.reset()
    recorder.start(model)
    for x in batches:
        (compiled(x).square().sum() / len(x)).backward()
    assert_scores(recorder.result(), truth)
    scores = calibrate_norms(
        compiled, recorder.layers, batches, 2, lambda model, x: model(x).square().sum() / len(x), False
    )
    assert_scores(scores, truth)
