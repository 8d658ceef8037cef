"""Failures during the calibration: the model is restored, and the next call is not affected.

The references are autograd, one example at a time, in float64, and a model without a failure.
"""

import copy
import math
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model

from fim_lora import FimConfig, get_fim_scores, initialize_lora_fim_ranks
from helpers.own_warnings import SEVERAL_FORWARD_PASSES
from helpers.tiny_models import bert, class_batch, llama, lm_batches, per_example_scores, token_batch

TARGETS = ["q_proj", "v_proj", "down_proj"]
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def fim_model(num_batches=3):
    """In training mode, with one layer in eval mode and gradients left over."""
    config = LoraConfig(
        r=4,
        target_modules=TARGETS,
        lora_dropout=0.1,
        init_lora_weights="fim",
        fim_config=FimConfig(fim_calibration_batches=num_batches),
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(1)
    model = get_peft_model(llama().double(), config).train()
    model.base_model.model.model.layers[0].eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    return model


def names_of(model):
    ends = tuple(TARGETS)
    return [name for name, _ in model.named_modules() if name.endswith(ends)]


def state_of(model):
    """Everything that a call could leave changed; tensors by value and by identity."""
    parameters = {
        name: (id(p), p.requires_grad, p.detach().clone(), None if p.grad is None else p.grad.clone())
        for name, p in model.named_parameters()
    }
    modules = {name: (id(module), module.training) for name, module in model.named_modules()}
    hooks = {
        name: [list(getattr(module, kind)) for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")]
        for name, module in model.named_modules()
    }
    configs = {name: copy.deepcopy(config.__dict__) for name, config in getattr(model, "peft_config", {}).items()}
    disabled = {name: getattr(module, "_disable_adapters", None) for name, module in model.named_modules()}
    return parameters, modules, hooks, configs, disabled


def require_same_state(model, before):
    parameters, *others = state_of(model)
    expected, *expected_others = before
    assert others == expected_others
    assert parameters.keys() == expected.keys()
    for name, (identity, requires_grad, value, gradient) in parameters.items():
        assert (identity, requires_grad) == expected[name][:2], name
        assert torch.equal(value, expected[name][2]), name
        assert (gradient is None) == (expected[name][3] is None), name
        assert gradient is None or torch.equal(gradient, expected[name][3]), name


def result_of(model, batches):
    """Scores, ranks and new weights of a call without a failure."""
    torch.manual_seed(5)
    allocation = initialize_lora_fim_ranks(model, batches, show_progress_bar=False)
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}
    return allocation, weights


def require_same_result(model, batches):
    expected, weights = result_of(fim_model(), batches)
    allocation, found = result_of(model, batches)
    assert allocation == expected
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)


# --- The dataloader ---


def after_one(faulty):
    """A dataloader whose first batch is good."""
    yield token_batch()
    if isinstance(faulty, BaseException):
        raise faulty
    yield faulty


def without(batch, *keys):
    return {key: value for key, value in batch.items() if key not in keys}


LOADER_FAULTS = {
    "raises": (lambda: OSError(5, "Input/output error"), OSError, "Input/output error"),
    "worker dies": (lambda: RuntimeError("DataLoader worker (pid 7) is killed"), RuntimeError, "worker"),
    "interrupted": (KeyboardInterrupt, KeyboardInterrupt, ""),
    "wrong keys": (lambda: {f"my_{key}": value for key, value in token_batch().items()}, ValueError, "input_ids"),
    "no labels": (lambda: without(token_batch(), "labels"), ValueError, "loss=None: put labels into the batches"),
    "no inputs": (lambda: without(token_batch(), "input_ids"), ValueError, "input_ids"),
    "nothing": (lambda: None, Exception, ""),
    "text": (lambda: "a sentence", Exception, ""),
    "empty mapping": (dict, ValueError, "input_ids"),
    "unequal lengths": (lambda: token_batch() | {"labels": torch.ones(4, 9).long()}, ValueError, "batch_size"),
    "unknown token": (lambda: token_batch() | {"input_ids": torch.full((4, 10), 10**6)}, IndexError, "index"),
}
CALLS = {
    "initialize": initialize_lora_fim_ranks,
    "scores of adapter": get_fim_scores,
    "scores of plain model": partial(get_fim_scores, peft_config=LoraConfig(target_modules=TARGETS)),
}


@pytest.mark.parametrize("fault", LOADER_FAULTS)
@pytest.mark.parametrize("call", CALLS)
def test_a_dataloader_that_fails_leaves_no_trace(fault, call):
    make, error, message = LOADER_FAULTS[fault]
    model = llama().double().train() if call == "scores of plain model" else fim_model()
    before = state_of(model)
    with pytest.raises(error, match=message or None):
        CALLS[call](model, after_one(make()), show_progress_bar=False)
    require_same_state(model, before)
    if call != "scores of plain model":
        require_same_result(model, lm_batches())


class Broken(torch.utils.data.Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        if index == 9:
            raise OSError("shard 9 is gone")
        return {key: value[0] for key, value in token_batch(1, seed=index).items()}


def test_a_dataloader_of_torch_whose_worker_raises():
    model = fim_model()
    before = state_of(model)
    loader = torch.utils.data.DataLoader(Broken(), batch_size=4, num_workers=1, multiprocessing_context="fork")
    with pytest.raises(OSError, match="shard 9 is gone"):
        initialize_lora_fim_ranks(model, loader, show_progress_bar=False)
    require_same_state(model, before)
    require_same_result(model, lm_batches())


def scores_of(batches, num_batches=None):
    config = LoraConfig(target_modules=TARGETS)
    config.fim_config = FimConfig(fim_calibration_batches=num_batches or len(batches))
    return get_fim_scores(llama().double(), batches, config, show_progress_bar=False)


def require_truth(scores, batches):
    model = llama().double()
    names = names_of(model)
    truth = per_example_scores(model, batches, names)
    assert set(scores) == set(names)
    for name in names:
        assert scores[name].num_examples == len(truth[name])
        assert scores[name].mean == pytest.approx(truth[name].mean().item(), rel=1e-6, abs=0)
        error = truth[name].std().item() / math.sqrt(len(truth[name]))
        assert scores[name].standard_error == pytest.approx(error, rel=1e-6, abs=0)


def test_a_dataloader_that_ends_early():
    batches = lm_batches(2)
    with pytest.warns(UserWarning, match="yielded 2 batches, but 5 were asked for"):
        scores = scores_of(batches, 5)
    assert scores.num_batches == 2
    require_truth(scores, batches)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (4, 1, 3), (1, 7), (5,)])
def test_batches_of_one_example_and_of_unequal_sizes(sizes):
    batches = [token_batch(size, 4 + place, seed=place) for place, size in enumerate(sizes)]
    require_truth(scores_of(batches), batches)


def only_padding():
    batch = token_batch(3)
    mask = torch.zeros_like(batch["attention_mask"])
    return {"input_ids": mask.clone(), "attention_mask": mask, "labels": torch.full_like(mask, -100)}


def one_example_of_padding():
    """A batch in which one example has no term in the loss: its gradient is zero, and it counts."""
    batch = token_batch(3)
    batch["labels"][1] = -100
    return batch


def test_an_example_of_only_padding_counts_with_gradient_zero():
    batches = [token_batch(), one_example_of_padding()]
    require_truth(scores_of(batches), batches)


@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_batch_of_only_padding_is_left_out_and_told(position):
    # The mean over no tokens is NaN.
    good = lm_batches(2)
    batches = [*good[:position], only_padding(), *good[position:]]
    with pytest.warns(UserWarning, match="1 of 3 calibration batches"):
        scores = scores_of(batches)
    assert (scores.num_batches, scores.num_skipped_batches) == (3, 1)
    require_truth(scores, good)


def test_nothing_but_padding():
    model = fim_model()
    before = state_of(model)
    with pytest.raises(RuntimeError, match="All 3 calibration batches had a loss or gradients that are not finite"):
        initialize_lora_fim_ranks(model, [only_padding()] * 3, show_progress_bar=False)
    require_same_state(model, before)
    require_same_result(model, lm_batches())


# --- The loss ---


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("bad", [{1}, {0, 2}])
@pytest.mark.parametrize("own_loop", [False, True])
def test_a_loss_that_is_not_finite_leaves_the_other_batches_exact(value, bad, own_loop):
    batches = lm_batches(4)
    calls = iter(range(4))

    def forward_fn(model, batch):
        return model(**batch).loss * (value if next(calls) in bad else 1.0)

    model = fim_model(4)
    arguments = {"dataloader": batches, "forward_fn": forward_fn}
    if own_loop:
        arguments = {}
        for batch in batches:
            forward_fn(model.eval(), batch).backward()
    with pytest.warns(UserWarning, match=f"{len(bad)} of 4 calibration batches"):
        scores = initialize_lora_fim_ranks(model, **arguments, show_progress_bar=False).scores
    assert (scores.num_batches, scores.num_skipped_batches) == (4, len(bad))
    require_truth(scores, [batch for place, batch in enumerate(batches) if place not in bad])


@pytest.mark.parametrize("own_loop", [False, True])
def test_a_loss_that_is_never_finite(own_loop):
    model = fim_model()
    arguments = {"dataloader": lm_batches(), "forward_fn": lambda m, b: m(**b).loss * math.nan}
    if own_loop:
        arguments = {}
        for batch in lm_batches():
            (model(**batch).loss * math.nan).backward()
    before = state_of(model)
    with pytest.raises(RuntimeError, match="All 3 calibration batches had a loss or gradients that are not finite"):
        initialize_lora_fim_ranks(model, **arguments, show_progress_bar=False)
    if not own_loop:  # NaN gradients are not equal to themselves
        require_same_state(model, before)
    require_same_result(model, lm_batches())


def test_labels_of_classes_that_the_head_does_not_have():
    model = bert(num_labels=3)
    names = [name for name, _ in model.named_modules() if name.endswith("query")]
    before = state_of(model)
    config = LoraConfig(target_modules=names)
    wrong = class_batch() | {"labels": torch.tensor([0, 1, 2, 7])}
    with pytest.raises(IndexError, match="Target 7 is out of bounds"):
        get_fim_scores(model, [class_batch(), wrong], config, show_progress_bar=False)
    require_same_state(model, before)


# --- Memory and interruption inside of a pass ---


class Fault:
    """Raises in the forward or the backward pass through one module, at one pass."""

    def __init__(self, module, where, error, at):
        self.where, self.error, self.at, self.passes = where, error, at, 0
        self.handle = module.register_forward_hook(self)

    def __call__(self, module, args, output):
        self.passes += 1
        if self.passes != self.at:
            return
        if self.where == "forward":
            raise self.error
        output.register_hook(self.fail)

    def fail(self, gradient):
        raise self.error


def middle_of(model):
    return model.get_submodule("base_model.model.model.layers.1.post_attention_layernorm")


ERRORS = pytest.mark.parametrize("error", [OUT_OF_MEMORY, MemoryError(), KeyboardInterrupt()], ids=repr)
PASSES = pytest.mark.parametrize("where", ["forward", "backward"])


@PASSES
@ERRORS
@pytest.mark.parametrize("at", [1, 2])
def test_a_failure_inside_of_a_pass_leaves_no_trace(where, error, at):
    model = fim_model()
    before = state_of(model)
    fault = Fault(middle_of(model), where, error, at)
    with pytest.raises(type(error)):
        initialize_lora_fim_ranks(model, lm_batches(), show_progress_bar=False)
    fault.handle.remove()
    require_same_state(model, before)
    require_same_result(model, lm_batches())


@SEVERAL_FORWARD_PASSES
@PASSES
@ERRORS
def test_an_own_loop_that_goes_on_after_a_failure(where, error):
    # A common pattern: catch the error, free memory, and continue with the next batch.
    batches = lm_batches(3)
    model = fim_model(2).eval()
    fault = Fault(middle_of(model), where, error, at=2)
    for batch in batches:
        try:
            model(**batch).loss.backward()
        except type(error):
            model.zero_grad()
    fault.handle.remove()
    scores = initialize_lora_fim_ranks(model).scores
    assert (scores.num_batches, scores.num_skipped_batches) == (2, 0)
    require_truth(scores, [batches[0], batches[2]])


@SEVERAL_FORWARD_PASSES
@PASSES
def test_an_own_loop_that_tries_again_with_half_a_batch(where):
    whole = token_batch(6)
    halves = [{key: value[rows] for key, value in whole.items()} for rows in (slice(0, 3), slice(3, 6))]
    model = fim_model(2).eval()
    fault = Fault(middle_of(model), where, OUT_OF_MEMORY, at=1)
    with pytest.raises(torch.OutOfMemoryError):
        model(**whole).loss.backward()
    fault.handle.remove()
    for half in halves:
        model(**half).loss.backward()
    require_truth(initialize_lora_fim_ranks(model).scores, halves)


def test_a_failure_between_the_calibration_and_the_new_weights(monkeypatch):
    from fim_lora.adapter import resize

    model = fim_model()
    before = state_of(model)
    rebuilt = []
    original = resize.resize_layer

    def fail_at_the_third(*args):
        rebuilt.append(args)
        if len(rebuilt) == 3:
            raise OUT_OF_MEMORY
        return original(*args)

    monkeypatch.setattr(resize, "resize_layer", fail_at_the_third)
    with pytest.raises(torch.OutOfMemoryError):
        initialize_lora_fim_ranks(model, lm_batches(), show_progress_bar=False)
    monkeypatch.undo()
    require_same_state(model, before)
    require_same_result(model, lm_batches())
