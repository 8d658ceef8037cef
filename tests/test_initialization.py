"""`initialize_lora_fim_ranks` and `get_fim_scores` on real PEFT models."""

import copy
import inspect
import math
import pickle

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_eva_state_dict,
    get_peft_model,
    initialize_lora_eva_weights,
    inject_adapter_in_model,
)
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import BatchEncoding
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from fim_lora import FimConfig, FimScores, LayerScore, get_fim_scores, initialize_lora_fim_ranks
from fim_lora.peft_integration import resolve_targets
from tiny_models import (
    bert,
    class_batch,
    gpt2,
    llama,
    lm_batches,
    names_of,
    per_example_scores,
    running_out_of_memory,
    t5,
    token_batch,
)


def fim_lora_config(r=8, batches=3, target_modules=("q_proj", "v_proj", "down_proj"), **options):
    fim_options = {key: options.pop(key) for key in list(options) if key in FimConfig.__dataclass_fields__}
    target_modules = list(target_modules) if isinstance(target_modules, tuple) else target_modules
    return LoraConfig(
        r=r,
        init_lora_weights="fim",
        fim_config=FimConfig(fim_calibration_batches=batches, **fim_options),
        target_modules=target_modules,
        **options,
    )


def fim_model(base=None, **options):
    torch.manual_seed(1)
    return get_peft_model(llama() if base is None else base, fim_lora_config(**options))


def run_own_loop(model, batches=None):
    for batch in batches or lm_batches():
        model(**batch).loss.backward()


def lora_layers(model, adapter="default"):
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter in module.r
    }


def hooks_of(model):
    return [
        hook
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]


def logits(model, batch=None):
    model.eval()
    with torch.no_grad():
        return model(**(batch or token_batch())).logits


# --- The three sources of scores ---


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_own_loop_dataloader_and_given_scores_agree_with_autograd(task_type):
    options = {"task_type": task_type}
    batches = lm_batches()
    truth = per_example_scores(llama(), batches, names_of(llama(), "q_proj", "v_proj", "down_proj"))

    own_loop = fim_model(**options)
    run_own_loop(own_loop, batches)
    by_loop = initialize_lora_fim_ranks(own_loop)
    by_loader = initialize_lora_fim_ranks(fim_model(**options), batches, show_progress_bar=False)
    scores = get_fim_scores(llama(), batches, fim_lora_config(**options), show_progress_bar=False)
    by_scores = initialize_lora_fim_ranks(fim_model(**options), fim_scores=scores)

    for allocation in (by_loop, by_loader, by_scores):
        assert allocation.ranks == by_loop.ranks
        assert allocation.num_batches == 3
        assert allocation.num_examples == 12
        for name, values in truth.items():
            assert allocation.scores[name].mean == pytest.approx(values.mean().item(), rel=1e-5)
    assert sum(by_loop.ranks.values()) == by_loop.budget == by_loop.budget_used == 8 * 6
    assert len(set(by_loop.ranks.values())) > 1


def test_given_scores_as_floats_tensors_and_with_prefix():
    names = list(lora_layers(fim_model()))
    floats = {name: float(index + 1) for index, name in enumerate(names)}
    diagonals = {f"base_model.model.{name}": torch.full((4, 3), value) for name, value in floats.items()}
    one = initialize_lora_fim_ranks(fim_model(), fim_scores=floats)
    other = initialize_lora_fim_ranks(fim_model(), fim_scores=diagonals)
    assert one.ranks == other.ranks
    assert [one.ranks[name] for name in names] == [2, 5, 7, 9, 11, 14]
    assert one.num_batches == 0
    assert one.scores[names[0]].standard_error is None


def test_progress_bar(capfd):
    initialize_lora_fim_ranks(fim_model(), lm_batches())
    assert "eFIM: 100%" in capfd.readouterr().err
    initialize_lora_fim_ranks(fim_model(), lm_batches(), show_progress_bar=False)
    assert "eFIM" not in capfd.readouterr().err


def test_forward_fn_decides_the_loss():
    seen = []

    def forward_fn(model, batch):
        seen.append(type(model))
        return 3 * model(**batch).loss

    plain = initialize_lora_fim_ranks(fim_model(), lm_batches(), show_progress_bar=False)
    tripled = initialize_lora_fim_ranks(fim_model(), lm_batches(), forward_fn=forward_fn, show_progress_bar=False)
    assert len(seen) == 3
    for name in plain.ranks:
        assert tripled.scores[name].mean == pytest.approx(9 * plain.scores[name].mean, rel=1e-5)
    assert tripled.ranks == plain.ranks


def test_arguments_come_in_the_order_of_those_of_eva():
    for ours, of_eva in (
        (get_fim_scores, get_eva_state_dict),
        (initialize_lora_fim_ranks, initialize_lora_eva_weights),
    ):
        names, names_of_eva = (list(inspect.signature(function).parameters) for function in (ours, of_eva))
        shared = [name for name in names_of_eva if name in names]
        assert [name for name in names if name in names_of_eva] == shared
        assert {"model", "dataloader", "forward_fn", "adapter_name", "show_progress_bar"} <= set(shared)


def test_trained_modules_to_save_are_part_of_the_loss():
    base = bert()
    model = get_peft_model(base, fim_lora_config(target_modules=("query",), task_type="SEQ_CLS"))
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight.mul_(3)
    truth = bert()
    with torch.no_grad():
        truth.classifier.weight.mul_(3)
    batches = [class_batch(seed=seed) for seed in range(3)]
    expected = per_example_scores(truth, batches, names_of(truth, "query"))
    allocation = initialize_lora_fim_ranks(model, batches, show_progress_bar=False)
    for name, values in expected.items():
        assert allocation.scores[name].mean == pytest.approx(values.mean().item(), rel=1e-5)


# --- What a call does to the model ---


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


def test_the_config_becomes_that_of_plain_lora():
    model = fim_model()
    config = model.peft_config["default"]
    allocation = initialize_lora_fim_ranks(model, lm_batches(), show_progress_bar=False)
    assert model.peft_config["default"] is config
    assert config.init_lora_weights is True
    assert config.fim_config is None
    assert config.rank_pattern == allocation.rank_pattern
    assert config.alpha_pattern == allocation.alpha_pattern
    assert config.r == 8


def test_other_architectures():
    cases = [
        (gpt2(), ("c_attn", "c_proj", "c_fc"), lm_batches()),
        (t5(), ("q", "v", "wo"), lm_batches()),
        (bert(), ("query", "dense"), [class_batch(seed=seed) for seed in range(3)]),
    ]
    for base, targets, batches in cases:
        fan_in_fan_out = any(isinstance(module, Conv1D) for module in base.modules())
        before = copy.deepcopy(base)
        model = fim_model(base, target_modules=targets, fan_in_fan_out=fan_in_fan_out)
        allocation = initialize_lora_fim_ranks(model, batches, show_progress_bar=False)
        assert sum(allocation.ranks.values()) == 8 * len(allocation.ranks)
        model.eval()
        before.eval()
        with torch.no_grad():
            torch.testing.assert_close(model(**batches[0]).loss, before(**batches[0]).loss, rtol=0, atol=0)


def test_injected_adapter_without_a_peft_model():
    base = llama()
    model = inject_adapter_in_model(fim_lora_config(), base)
    assert not isinstance(model, PeftModel)
    run_own_loop(model)
    by_loop = initialize_lora_fim_ranks(model)
    by_loader = initialize_lora_fim_ranks(fim_model(), lm_batches(), show_progress_bar=False)
    assert by_loop.ranks == by_loader.ranks
    assert {name: layer.r["default"] for name, layer in lora_layers(model).items()} == by_loop.ranks


def test_adapter_on_the_meta_device():
    model = get_peft_model(llama(), fim_lora_config(), low_cpu_mem_usage=True)
    initialize_lora_fim_ranks(model, lm_batches(), show_progress_bar=False)
    assert torch.equal(logits(model), logits(llama()))
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def test_user_patterns_set_the_base_ranks_and_alphas():
    patterns = {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"layers.0.self_attn.q_proj": 16}}
    model = fim_model(**patterns, r_max=32)
    allocation = initialize_lora_fim_ranks(model, lm_batches(), show_progress_bar=False)
    assert allocation.budget == 2 * 4 + 4 * 8 == sum(allocation.ranks.values())
    layers = lora_layers(model)
    assert layers["model.layers.0.self_attn.q_proj"].scaling["default"] == pytest.approx(16 / 4)
    assert layers["model.layers.1.self_attn.q_proj"].scaling["default"] == pytest.approx(8 / 4)
    assert layers["model.layers.1.mlp.down_proj"].scaling["default"] == pytest.approx(1)


class Nested(nn.Module):
    """The name of one layer, `proj`, is the end of another's, `block.proj`; and one has a dot-like character."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.block = nn.ModuleDict({"proj": nn.Linear(8, 8), "a+b": nn.Linear(8, 8)})
        self.proj = nn.Linear(8, 8)
        self.blockxproj = nn.Linear(8, 8)

    def forward(self, x):
        return self.proj(torch.tanh(self.block["a+b"](self.block["proj"](x)) + self.blockxproj(x)))


@pytest.mark.parametrize(
    "ranks",
    [
        {"proj": 1, "block.proj": 4, "block.a+b": 6, "blockxproj": 5},  # the longer name has the global rank
        {"proj": 4, "block.proj": 1, "block.a+b": 6, "blockxproj": 5},
        {"block.proj": 3, "block.a+b": 1, "proj": 6, "blockxproj": 6},
    ],
)
def test_names_that_are_ends_of_other_names(ranks, tmp_path):
    model = get_peft_model(Nested(), fim_lora_config(r=4, target_modules=r".*(proj|b)", r_max=8))
    allocation = initialize_lora_fim_ranks(model, fim_scores={name: float(rank) for name, rank in ranks.items()})
    assert allocation.ranks == ranks
    meant = {name: layer.r["default"] for name, layer in lora_layers(model).items()}
    assert meant == allocation.ranks
    randomise(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Nested(), tmp_path)
    assert {name: layer.r["default"] for name, layer in lora_layers(loaded).items()} == meant
    x = torch.randn(2, 8)
    torch.testing.assert_close(loaded.eval()(x), model.eval()(x))


def randomise(model):
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("adjust", [True, False])
def test_save_and_load_keep_ranks_scalings_and_outputs(tmp_path, use_rslora, adjust):
    model = fim_model(use_rslora=use_rslora, adjust_scaling_factors=adjust, lora_alpha=5)
    initialize_lora_fim_ranks(model, lm_batches(), show_progress_bar=False)
    randomise(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    for (name, one), (_, other) in zip(lora_layers(model).items(), lora_layers(loaded).items(), strict=True):
        assert one.r == other.r, name
        assert one.scaling["default"] == pytest.approx(other.scaling["default"])
    torch.testing.assert_close(logits(loaded), logits(model))


# --- The optimizer and the hooks ---


def test_an_optimizer_built_before_trains_the_new_weights():
    model = fim_model(r_max=16)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1)
    run_own_loop(model)
    initialize_lora_fim_ranks(model)
    assert {name: p for name, p in model.named_parameters() if p.requires_grad} == parameters
    assert all(p.grad is None for p in parameters.values())

    before = {name: p.detach().clone() for name, p in parameters.items()}
    for _ in range(2):
        loss = model(**token_batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(not torch.equal(p, before[name]) for name, p in parameters.items())
    assert model(**token_batch()).loss < loss


def test_an_optimizer_that_has_stepped_raises_instead_of_training_stale_state():
    model = fim_model()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for batch in lm_batches():
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    initialize_lora_fim_ranks(model)
    model(**token_batch()).loss.backward()
    with pytest.raises(RuntimeError, match="size of tensor"):
        optimizer.step()


def test_hooks_stop_and_go_without_an_allocation():
    model = fim_model(batches=2)
    assert hooks_of(model)
    run_own_loop(model)
    assert not hooks_of(model)
    assert initialize_lora_fim_ranks(model).num_batches == 2


def test_copies_pickles_and_checkpoints_of_a_model_with_hooks(tmp_path):
    model = fim_model()
    run_own_loop(model, lm_batches()[:1])
    clones = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    model.save_pretrained(tmp_path)
    assert hooks_of(model)
    for clone in clones:
        run_own_loop(clone, lm_batches()[1:])
        assert not hooks_of(clone)
    assert hooks_of(model)
    run_own_loop(model, lm_batches()[1:])
    ranks = initialize_lora_fim_ranks(model).ranks
    assert all(initialize_lora_fim_ranks(clone).ranks == ranks for clone in clones)


def test_a_dataloader_does_not_disturb_the_own_loop():
    model = fim_model()
    run_own_loop(model, lm_batches()[:1])
    before = hooks_of(model)
    scores = get_fim_scores(model, lm_batches(), show_progress_bar=False)
    assert hooks_of(model) == before
    run_own_loop(model, lm_batches()[1:])
    allocation = initialize_lora_fim_ranks(model)
    for name, score in scores.items():
        assert allocation.scores[name].mean == pytest.approx(score.mean, rel=1e-5)


# --- Which layers ---


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "layers.1.mlp.up_proj"]},
        {"target_modules": r".*layers\.0.*(k|v)_proj"},
        {"target_modules": "all-linear"},
        {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
        {"target_modules": ["q_proj"], "exclude_modules": r".*layers\.1.*"},
        {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
        {},
    ],
)
def test_targets_are_those_of_peft_and_no_adapter_is_created(options):
    base = llama()
    base.model.embed_tokens.weight.requires_grad_(False)
    modules = dict(base.named_modules())
    flags = [parameter.requires_grad for parameter in base.parameters()]
    config = LoraConfig(**options)
    before = copy.deepcopy(config)
    scores = get_fim_scores(base, lm_batches(8), config, show_progress_bar=False)
    assert config == before
    assert dict(base.named_modules()) == modules
    assert [parameter.requires_grad for parameter in base.parameters()] == flags
    assert not hasattr(base, "peft_config")
    assert list(scores) == list(lora_layers(get_peft_model(llama(), LoraConfig(**options))))


def test_targets_by_default_of_other_architectures():
    for base in (gpt2(), t5(), bert()):
        expected = lora_layers(get_peft_model(copy.deepcopy(base), LoraConfig()))
        assert list(resolve_targets(base, LoraConfig())) == list(expected)
    options = {"target_modules": "all-linear", "task_type": "SEQ_CLS"}
    expected = lora_layers(get_peft_model(bert(), LoraConfig(**options)))
    assert list(resolve_targets(bert(), LoraConfig(**options))) == list(expected)


def test_nothing_targeted_is_an_error_of_peft():
    with pytest.raises(ValueError, match="not found in the base model"):
        get_fim_scores(llama(), lm_batches(), LoraConfig(target_modules=["nothing"]))


class UnknownLora(nn.Module, LoraLayer):
    """A LoRA layer that somebody registered with PEFT for a layer of their own."""

    def __init__(self, base_layer, adapter_name, r=0, **kwargs):
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self.r[adapter_name] = r


@pytest.mark.parametrize("existing_adapter", [False, True])
def test_an_unsupported_layer_is_named_before_anything_is_changed_or_read(existing_adapter):
    base = llama()
    if existing_adapter:
        base = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
    modules, flags = dict(base.named_modules()), [p.requires_grad for p in base.parameters()]
    config = fim_lora_config(target_modules=("q_proj", "input_layernorm"))
    config._register_custom_module({LlamaRMSNorm: UnknownLora})
    message = r"'model\.layers\.0\.input_layernorm' is a transformers.*RMSNorm.*`exclude_modules`"
    if existing_adapter:
        with pytest.raises(TypeError, match=message):
            base.add_adapter("fim", config)
    else:
        with pytest.raises(TypeError, match=message):
            get_peft_model(base, config)
        with pytest.raises(TypeError, match=message):
            get_fim_scores(base, iter(lambda: pytest.fail("data was read"), None), config)
    assert dict(base.named_modules()) == modules
    assert [p.requires_grad for p in base.parameters()] == flags


def test_scores_of_a_plain_lora_adapter():
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    scores = get_fim_scores(model, lm_batches(8), show_progress_bar=False)
    assert scores.num_batches == 8
    expected = get_fim_scores(llama(), lm_batches(8), LoraConfig(target_modules=["q_proj"]), show_progress_bar=False)
    assert scores == expected


# --- Errors, and that they leave no trace ---


def state_of(model):
    config = model.peft_config["default"]
    return (
        {name: (id(module), module.training) for name, module in model.named_modules()},
        {name: (id(p), p.requires_grad, p.shape) for name, p in model.named_parameters()},
        {
            name: (dict(layer.r), dict(layer.scaling), dict(layer.lora_alpha))
            for name, layer in lora_layers(model).items()
        },
        [layer.disable_adapters for layer in lora_layers(model).values()],
        copy.deepcopy(config.__dict__),
        hooks_of(model),
    )


def failing_loader():
    yield token_batch()
    raise OSError("disk")


NAMES = list(lora_layers(get_peft_model(llama(), LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"]))))
ONES = dict.fromkeys(NAMES, 1.0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, RuntimeError, "No calibration batch was seen"),
        ({"adapter_name": "other"}, ValueError, r"no adapter 'other'; it has \['default'\]"),
        ({"dataloader": [], "fim_scores": {}}, ValueError, "Both `dataloader` and `fim_scores`"),
        ({"dataloader": []}, ValueError, "yielded no batch"),
        ({"dataloader": failing_loader()}, OSError, "disk"),
        ({"fim_scores": dict(list(ONES.items())[1:])}, ValueError, rf"lacks 1 of 6 target layers: \['{NAMES[0]}'\]"),
        ({"fim_scores": ONES | {"lm_head": 1.0}}, ValueError, r"names 1 layers .* \['lm_head'\]"),
        ({"fim_scores": ONES | {NAMES[2]: float("nan")}}, ValueError, f"'{NAMES[2]}' cannot be used.*nan"),
        ({"fim_scores": ONES | {NAMES[2]: torch.tensor([1.0, float("inf")])}}, ValueError, f"'{NAMES[2]}'.*inf"),
        ({"fim_scores": ONES | {NAMES[2]: -1.0}}, ValueError, f"'{NAMES[2]}'.*-1.0"),
        ({"fim_scores": dict.fromkeys(NAMES, 0.0)}, ValueError, "Every score in `fim_scores` is zero"),
    ],
)
def test_errors_leave_no_trace(arguments, error, message):
    model = fim_model()
    before = state_of(model)
    with pytest.raises(error, match=message):
        initialize_lora_fim_ranks(model, show_progress_bar=False, **arguments)
    assert state_of(model) == before
    run_own_loop(model)
    initialize_lora_fim_ranks(model)


def test_a_failure_while_layers_are_rebuilt_leaves_no_trace():
    model = fim_model(lora_dropout=0.1, use_dora=True)
    randomise(model)
    run_own_loop(model)
    before, output = state_of(model), logits(model)
    before = state_of(model)
    with running_out_of_memory(list(lora_layers(model).values())[-1]):
        initialize_lora_fim_ranks(model)
    assert state_of(model) == before
    assert torch.equal(logits(model), output)
    initialize_lora_fim_ranks(model)


MERGED_CALLS = {
    "own loop": lambda model: initialize_lora_fim_ranks(model),
    "dataloader": lambda model: initialize_lora_fim_ranks(model, lm_batches(), show_progress_bar=False),
    "given scores": lambda model: initialize_lora_fim_ranks(model, fim_scores=ONES),
    "scores": lambda model: get_fim_scores(model, lm_batches(), show_progress_bar=False),
}


@pytest.mark.parametrize("merged", ["default", "other"])
@pytest.mark.parametrize("call", MERGED_CALLS)
def test_merged_adapters_are_refused(call, merged):
    """The truth is a model in which nothing was ever merged."""

    def make():
        model = fim_model()
        model.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj", "o_proj"]))
        run_own_loop(model)
        randomise(model)
        return model

    model = make()
    model.merge_adapter([merged])
    before, weights = state_of(model), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=rf"\['{merged}'\] are merged .* 'model\.layers\.0\..*unmerge_adapter\(\)"):
        MERGED_CALLS[call](model)
    assert state_of(model) == before
    assert model.base_model.model.model.layers[0].self_attn.v_proj.merged_adapters == [merged]
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    model.unmerge_adapter()
    result, expected = MERGED_CALLS[call](model), MERGED_CALLS[call](untouched := make())
    for one, other in zip(*(getattr(found, "scores", found).values() for found in (result, expected)), strict=True):
        assert one.mean == pytest.approx(other.mean, rel=1e-4)
    torch.testing.assert_close(logits(model), logits(untouched), rtol=1e-4, atol=1e-4)
    if call != "scores":
        torch.testing.assert_close(logits(model), logits(llama()), rtol=1e-4, atol=1e-4)


def test_only_an_adapter_that_waits_is_allocated():
    model = fim_model()
    initialize_lora_fim_ranks(model, fim_scores=ONES)
    with pytest.raises(ValueError, match="does not await FIM allocation: it has init_lora_weights=True"):
        initialize_lora_fim_ranks(model, fim_scores=ONES)
    with pytest.raises(ValueError, match="The model has no adapter"):
        initialize_lora_fim_ranks(llama(), fim_scores=ONES)
    with pytest.raises(ValueError, match="pass a LoraConfig"):
        get_fim_scores(llama(), lm_batches())


@pytest.mark.parametrize("bounds", [{"r_min": 9}, {"r_max": 7}])
def test_infeasible_bounds_name_a_layer(bounds):
    model = fim_model(**bounds)
    before = state_of(model)
    with pytest.raises(ValueError, match=r"Layer 'model\.layers.*' has base rank 8"):
        initialize_lora_fim_ranks(model, fim_scores=ONES)
    assert state_of(model) == before


def test_given_layer_scores_keep_their_errors():
    scores = FimScores({name: LayerScore(1.0, 0.5, 7, (24, 24)) for name in NAMES}, num_batches=2)
    allocation = initialize_lora_fim_ranks(fim_model(), fim_scores=scores)
    assert (allocation.num_batches, allocation.num_examples) == (2, 7)
    assert allocation.scores[NAMES[0]].standard_error == 0.5


def test_replicated_layers_are_scored_in_the_adapted_model():
    options = {"layer_replication": [(0, 2), (1, 2)], "target_modules": ("q_proj",)}
    base = llama()
    with pytest.raises(ValueError, match="With layer_replication"):
        get_fim_scores(base, lm_batches(), fim_lora_config(**options))
    assert base.config.num_hidden_layers == 2
    allocation = initialize_lora_fim_ranks(fim_model(base, **options), lm_batches(), show_progress_bar=False)
    assert len(allocation.ranks) == 3


def test_an_adapter_unloaded_before_its_allocation_leaves_no_hooks_to_the_next():
    model = fim_model()
    base = model.unload()
    model = get_peft_model(base, fim_lora_config())
    run_own_loop(model)
    assert not hooks_of(model)
    initialize_lora_fim_ranks(model)
    assert not any(name.startswith("_fim") for module in model.modules() for name in vars(module))


def test_a_calibration_of_one_adapter_is_none_of_another_that_waits():
    model = fim_model()
    model.add_adapter("other", fim_lora_config())
    initialize_lora_fim_ranks(model, lm_batches(), show_progress_bar=False)
    before = state_of(model)
    with pytest.raises(RuntimeError, match="No calibration batch was seen"):
        initialize_lora_fim_ranks(model, adapter_name="other")
    assert state_of(model) == before
    run_own_loop(model)
    by_own_loop = initialize_lora_fim_ranks(model, adapter_name="other").scores
    expected = get_fim_scores(llama(), lm_batches(), fim_lora_config(), show_progress_bar=False)
    for name, score in expected.items():
        assert by_own_loop[name].mean == pytest.approx(score.mean, rel=1e-5)


def test_two_adapters_of_one_config_object_are_refused():
    # As TRL's DPOTrainer makes its reference of a PeftModel.
    model = fim_model()
    model.add_adapter("ref", model.peft_config["default"])
    before = state_of(model)
    with pytest.raises(ValueError, match="'ref' was made from the same config object as 'default'"):
        initialize_lora_fim_ranks(model, lm_batches(), show_progress_bar=False)
    assert state_of(model) == before


@pytest.mark.parametrize("order", ["compiled outside", "compiled inside"])
def test_a_compiled_data_parallel_model_has_the_names_of_the_model(order):
    # Compilation begins with the first call, which force_eager leaves out.
    base = llama()
    wrapped = {
        "compiled outside": lambda: torch.compile(nn.DataParallel(base)),
        "compiled inside": lambda: nn.DataParallel(torch.compile(base)),
    }[order]()
    scores = get_fim_scores(wrapped, lm_batches(), fim_lora_config(), show_progress_bar=False)
    assert scores == get_fim_scores(llama(), lm_batches(), fim_lora_config(), show_progress_bar=False)


def test_batches_of_tokenizers():
    batches = [BatchEncoding(batch) for batch in lm_batches()]
    by_encoding = initialize_lora_fim_ranks(fim_model(), batches, show_progress_bar=False)
    assert by_encoding.ranks == initialize_lora_fim_ranks(fim_model(), lm_batches(), show_progress_bar=False).ranks


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
