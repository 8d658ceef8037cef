"""Hooks during the user's own loop: which calls make a batch, and what a pass that fails leaves behind."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fim_lora.fisher.recorder import Recorder
from helpers.calibration import assert_scores, norm_recorder, scores_of
from helpers.own_warnings import SEVERAL_FORWARD_PASSES, UNCERTAIN_BATCH_SIZE
from helpers.tiny_models import bert, class_batch, llama, lm_batches, names_of, per_example_scores, token_batch


class Shared(nn.Module):
    """One layer used three times, once of them twice as wide, optionally under gradient checkpointing."""

    def __init__(self, reentrant=None, checkpoint_first_only=False):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.shared, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.reentrant, self.checkpoint_first_only = reentrant, checkpoint_first_only

    def block(self, x):
        return x + torch.tanh(self.shared(x))

    def forward(self, x, labels):
        x = torch.tanh(self.first(x)).requires_grad_()
        for use in range(3):
            if self.reentrant is None or (self.checkpoint_first_only and use > 0):
                x = self.block(x)
            else:
                x = checkpoint(self.block, x, use_reentrant=self.reentrant)
        return {"loss": F.cross_entropy(self.head(x.mean(1)), labels)}


def shared_batches():
    torch.manual_seed(1)
    return [{"x": torch.randn(3, 5, 6), "labels": torch.tensor([0, 1, 1])} for _ in range(2)]


def truth_of_shared(batches):
    values = {name: [] for name in ("first", "shared", "head")}
    for batch in batches:
        for row in range(len(batch["labels"])):
            model = Shared().double()
            model(batch["x"][row : row + 1].double(), batch["labels"][row : row + 1])["loss"].backward()
            for name, value in values.items():
                value.append(model.get_submodule(name).weight.grad.square().mean().item())
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("first_only", [False, True])
def test_shared_weights_and_checkpointing(reentrant, first_only):
    batches = shared_batches()
    scores = scores_of(Shared(reentrant, first_only), batches, ["first", "shared", "head"])
    assert_scores(scores, truth_of_shared(batches))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_of_transformers_changes_no_score(reentrant):
    batches, names = lm_batches(), names_of(llama(), "q_proj", "down_proj")
    model = llama().train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    recorder = own_loop(model, names, batches)
    assert_scores(recorder.result(), per_example_scores(llama(), batches, names))


def own_loop(model, names, batches, max_batches=None, roots=True):
    recorder = norm_recorder({name: model.get_submodule(name) for name in names})
    recorder.start(*([model] if roots else []), max_batches=max_batches)
    for batch in batches:
        model(**batch).loss.backward()
    return recorder


@pytest.mark.parametrize("roots", [False, True])
def test_own_loop_equals_autograd(roots):
    batches, names = lm_batches(), names_of(llama(), "q_proj", "down_proj")
    recorder = own_loop(llama(), names, batches, roots=roots)
    assert_scores(recorder.result(), per_example_scores(llama(), batches, names))


@SEVERAL_FORWARD_PASSES
def test_evaluation_between_backward_passes_leaves_no_trace():
    batches, names = lm_batches(), names_of(llama(), "q_proj", "down_proj")
    model = llama()
    recorder = norm_recorder({name: model.get_submodule(name) for name in names})
    recorder.start(model)
    for batch in batches:
        with torch.no_grad():
            model(**batch)
            model.generate(batch["input_ids"], max_new_tokens=2, do_sample=False)
        model(**batch)  # with gradients, but without a backward pass
        model(**batch).loss.backward()
        with torch.no_grad():
            model(**batch)
    assert recorder.num_batches == len(batches)
    assert_scores(recorder.result(), per_example_scores(llama(), batches, names))


@SEVERAL_FORWARD_PASSES
def test_two_forward_passes_into_one_loss():
    """Both towers of a contrastive loss are one model: the gradient of an example is the sum of both."""
    model, batches = bert(num_labels=4).eval(), [class_batch(seed=0), class_batch(seed=1)]
    names = names_of(model, "query", "classifier")

    def pair_loss(model, rows=slice(None), factor=1.0):
        one, two = (
            model(input_ids=b["input_ids"][rows], attention_mask=b["attention_mask"][rows]).logits for b in batches
        )
        return (one * two).sum() * factor

    recorder = norm_recorder({name: model.get_submodule(name) for name in names})
    recorder.start(model)
    (pair_loss(model) / 4).backward()
    scores = recorder.result()
    assert scores.num_batches == 1

    double = bert(num_labels=4).eval().double()
    weights = [double.get_submodule(name).weight for name in names]
    rows = [torch.autograd.grad(pair_loss(double, slice(row, row + 1)), weights) for row in range(4)]
    truth = {
        name: torch.stack([gradients[index].square().mean() for gradients in rows]) for index, name in enumerate(names)
    }
    assert_scores(scores, truth)


def test_a_second_backward_through_one_graph_is_refused():
    model = llama()
    recorder = norm_recorder({"lm_head": model.lm_head})
    recorder.start(model)
    loss = model(**token_batch()).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="'lm_head' received a second gradient"):
        loss.backward()


def test_changing_the_input_in_place_is_refused():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            y = self.layer(x)
            x.add_(1)
            return y.sum()

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        scores_of(InPlace(), [torch.randn(2, 3)], ["layer"])


def test_what_follows_a_layer_may_change_its_output_in_place():
    def model(inplace):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace), nn.Linear(4, 4), nn.ReLU(inplace), nn.Linear(4, 1))

    batches = [torch.randn(3, 4)]
    names = ["0", "2", "4"]
    results = [
        scores_of(model(inplace), batches, names, forward_fn=lambda m, x: m(x).mean()) for inplace in (True, False)
    ]
    assert results[0] == results[1]


@SEVERAL_FORWARD_PASSES
def test_copies_and_pickles_of_a_model_with_hooks_go_on_by_themselves():
    batches, names = lm_batches(4), names_of(llama(), "q_proj")
    model = llama()
    recorder = norm_recorder({name: model.get_submodule(name) for name in names})
    model.recorder = recorder
    recorder.start(model, max_batches=4)
    for batch in batches[:2]:
        model(**batch).loss.backward()
    model(**batches[2])  # in flight: a graph cannot be copied
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for clone in copies:
        assert clone.recorder is not recorder
        for batch in batches[2:]:
            clone(**batch).loss.backward()
        assert_scores(clone.recorder.result(), per_example_scores(llama(), batches, names))
        assert not any(module._forward_hooks for module in clone.modules())
    assert recorder.num_batches == 2
    for batch in batches[2:]:
        model(**batch).loss.backward()
    assert recorder.result() == copies[0].recorder.result()


def test_hooks_stop_after_the_last_batch():
    batches, names = lm_batches(3), names_of(llama(), "q_proj", "up_proj")
    model = llama()
    recorder = own_loop(model, names, batches[:2], max_batches=2)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    model(**batches[2]).loss.backward()
    assert recorder.result().num_batches == 2


class _OutOfMemory(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise torch.OutOfMemoryError("out of memory")


@pytest.mark.parametrize("use_reentrant", [None, True, False])
def test_a_backward_pass_that_raised_half_way_counts_nothing(use_reentrant):
    model = llama().double().train()
    if use_reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
    names = names_of(model, "q_proj", "v_proj")
    recorder = norm_recorder({name: model.get_submodule(name) for name in names})
    recorder.start(model)
    batches = lm_batches(3)
    # The backward pass has finished the second layer and not yet reached the first.
    hook = model.model.layers[1].register_forward_pre_hook(
        lambda module, args: (_OutOfMemory.apply(args[0]), *args[1:])
    )
    with pytest.raises(torch.OutOfMemoryError):
        model(**batches[0]).loss.backward()
    hook.remove()
    for batch in batches[1:]:
        model(**batch).loss.backward()
    scores = recorder.result()
    assert scores.num_batches == 2
    for name, values in per_example_scores(llama(), batches[1:], names).items():
        assert scores[name].mean == pytest.approx(values.mean().item(), rel=1e-6)


def test_a_stopped_recorder_goes_on_where_it_was():
    batches, names = lm_batches(5), names_of(llama(), "q_proj", "down_proj")
    model = llama()
    recorder = own_loop(model, names, batches[:2])
    recorder.stop()
    model(**batches[2]).loss.backward()
    assert recorder.num_batches == 2
    recorder.start(model)
    for batch in batches[3:]:
        model(**batch).loss.backward()
    recorded = [*batches[:2], *batches[3:]]
    assert_scores(recorder.result(), per_example_scores(llama(), recorded, names))


def test_starting_twice_registers_the_hooks_once():
    batches, names = lm_batches(2), names_of(llama(), "q_proj")
    model = llama()
    recorder = own_loop(model, names, batches[:1])
    recorder.start(model)
    model(**batches[1]).loss.backward()
    assert_scores(recorder.result(), per_example_scores(llama(), batches, names))
    recorder.stop()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_gradients_of_calls_before_the_start_are_ignored():
    batches, names = lm_batches(3), names_of(llama(), "q_proj")
    model = llama()
    recorder = own_loop(model, names, batches[:1])
    late = model(**batches[1]).loss
    recorder.stop()
    recorder.start(model)
    late.backward()
    assert recorder.num_batches == 1
    model(**batches[2]).loss.backward()
    assert_scores(recorder.result(), per_example_scores(llama(), [batches[0], batches[2]], names))


def test_the_limit_of_batches_counts_from_each_start():
    batches, names = lm_batches(4), names_of(llama(), "q_proj")
    model = llama()
    recorder = own_loop(model, names, batches[:2], max_batches=1)
    assert recorder.num_batches == 1
    recorder.start(model, max_batches=2)
    for batch in batches[1:]:
        model(**batch).loss.backward()
    assert recorder.num_batches == 3
    assert_scores(recorder.result(), per_example_scores(llama(), batches[:3], names))


class MeanInput:
    """A statistic of another kind: the mean of the input of each layer over all positions."""

    def __init__(self):
        self.sums = {}

    def measure(self, layer, calls, rows):
        assert rows.num_groups == rows.batch_size == 4
        return sum(call.input.double().mean() for call in calls) / len(calls)

    def add(self, measured, batch_size, loss):
        for name, value in measured.items():
            self.sums.setdefault(name, []).append(value.item())

    def merge(self, others):
        assert not others
        return self

    def result(self, layers):
        return {name: self.sums[name] for name in layers}


@UNCERTAIN_BATCH_SIZE
def test_a_recorder_takes_any_statistic():
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    batches = [torch.randn(4, 3) for _ in range(2)]
    recorder = Recorder({"0": model[0], "2": model[2]}, MeanInput())
    recorder.start(model)
    for x in batches:
        model(x).square().sum().backward()
    with torch.no_grad():
        hidden = [torch.tanh(model[0](x)) for x in batches]
    expected = {"0": [x.mean().item() for x in batches], "2": [h.mean().item() for h in hidden]}
    assert recorder.result() == {name: pytest.approx(values, rel=1e-5) for name, values in expected.items()}


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_graph_of_an_earlier_session_counts_nothing(reentrant):
    batches, names = lm_batches(2), names_of(llama(), "q_proj")
    model = llama().train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    recorder = norm_recorder({name: model.get_submodule(name) for name in names})
    recorder.start(model)
    late = model(**batches[0]).loss
    recorder.start(model)
    late.backward()
    assert recorder.num_batches == 0
    model(**batches[1]).loss.backward()
    assert_scores(recorder.result(), per_example_scores(llama(), batches[1:], names))


def test_a_late_backward_pass_that_raises_does_not_spoil_the_next_session():
    batches, names = lm_batches(2), names_of(llama(), "q_proj")
    model = llama()
    recorder = norm_recorder({name: model.get_submodule(name) for name in names} | {"unused": nn.Linear(2, 2)})
    recorder.start(model)
    embeddings = _Raise.apply(model.model.embed_tokens(batches[0]["input_ids"]).detach().requires_grad_())
    late = model(inputs_embeds=embeddings, labels=batches[0]["labels"]).loss
    recorder.start(model)
    loss = model(**batches[1]).loss
    recorder.layers["unused"].module(torch.ones(1, 2))
    with pytest.raises(ValueError, match="late"):
        late.backward()
    loss.backward()
    with pytest.warns(UserWarning, match="took no part in the loss"):
        scores = dict(recorder.result())
    del scores["unused"]
    assert_scores(scores, per_example_scores(llama(), batches[1:], names))


class _Raise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise ValueError("late")
