"""The calibration loop over a dataloader: its batches, its losses, its errors, and the model afterwards."""

import pytest
import torch
from torch import nn

from helpers.calibration import calibrate_norms, norm_recorder, scores_of
from helpers.tiny_models import llama, lm_batches, names_of, token_batch


def test_batches_that_are_not_finite_are_left_out_and_reported():
    model, names = nn.Linear(2, 1), ["layer"]
    good = [torch.randn(3, 2) for _ in range(2)]
    bad = torch.tensor([[1.0, 2.0], [float("inf"), 1.0]])

    def run(batches):
        return calibrate_norms(
            model, {"layer": model}, batches, len(batches), lambda m, x: m(x).square().mean(), show_progress_bar=False
        )

    with pytest.warns(UserWarning, match="1 of 3 calibration batches"):
        scores = run([good[0], bad, good[1]])
    assert (scores.num_batches, scores.num_skipped_batches, scores[names[0]].num_examples) == (3, 1, 6)
    assert scores["layer"] == run(good)["layer"]
    with pytest.raises(RuntimeError, match="All 2 calibration batches had a loss or gradients that are not finite"):
        run([bad, bad])


def test_zero_everywhere_explains_the_causes():
    batch = token_batch()
    batch["labels"] = torch.full_like(batch["labels"], 5)
    with pytest.raises(RuntimeError, match=r"exactly zero\. Usual causes: the batches have no labels"):
        scores_of(llama(), [batch], ["lm_head"], forward_fn=lambda m, b: m(**b).logits.sum() * 0)


def test_a_layer_outside_of_the_loss_scores_zero_and_is_named():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle, self.never = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            self.idle(x)
            return self.used(x).square().mean()

    with pytest.warns(UserWarning, match=r"2 target layers took no part.*\['idle', 'never'\]"):
        scores = scores_of(Unused(), [torch.randn(3, 2)] * 2, ["used", "idle", "never"])
    assert scores["idle"].mean == scores["never"].mean == 0
    assert scores["idle"].num_examples == 6


@pytest.mark.parametrize(
    ("forward_fn", "error", "message"),
    [
        (lambda m, b: None, TypeError, "returned a NoneType without"),
        (lambda m, b: (m(**b).loss,), TypeError, "returned a tuple without"),
        (lambda m, b: m(b["input_ids"]), ValueError, "loss=None: put labels into the batches"),
        (lambda m, b: m(**b).logits, ValueError, r"shape \(4, 10, 60\)"),
        (lambda m, b: m(**b).loss.detach(), ValueError, "depends on no target layer.*the loss is detached"),
        (lambda m, b: {"loss": 1.0}, TypeError, "The loss is a float"),
    ],
)
def test_unusable_losses(forward_fn, error, message):
    with pytest.raises(error, match=message):
        scores_of(llama(), lm_batches(), ["lm_head"], forward_fn=forward_fn)


def test_no_batch_and_too_few_batches():
    model = llama()
    with pytest.raises(ValueError, match="yielded no batch"):
        calibrate_norms(model, {"lm_head": model.lm_head}, [], 3, show_progress_bar=False)
    with pytest.warns(UserWarning, match="yielded 2 batches, but 3 were asked for"):
        calibrate_norms(model, {"lm_head": model.lm_head}, lm_batches(2), 3, show_progress_bar=False)
    with pytest.raises(RuntimeError, match="No calibration batch was seen"):
        norm_recorder({"lm_head": model.lm_head}).result()


def test_only_the_batches_asked_for_are_read():
    read = []

    def loader():
        for batch in lm_batches(5):
            read.append(batch)
            yield batch

    model = llama()
    scores = calibrate_norms(model, {"lm_head": model.lm_head}, loader(), 2, show_progress_bar=False)
    assert scores.num_batches == len(read) == 2


def state_of(model):
    return (
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        [parameter.grad for parameter in model.parameters()],
        [list(module._forward_hooks.values()) for module in model.modules()],
        [list(module._forward_pre_hooks.values()) for module in model.modules()],
        [list(module._backward_hooks.values()) for module in model.modules()],
    )


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails):
    model = llama().train()
    model.model.layers[0].eval()
    model.model.embed_tokens.weight.requires_grad_(False)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    model.model.norm.register_forward_hook(lambda *args: None)
    before, weights = state_of(model), {key: value.clone() for key, value in model.state_dict().items()}

    def loader():
        yield token_batch()
        if fails:
            raise OSError("disk")

    if fails:
        with pytest.raises(OSError, match="disk"):
            scores = calibrate_norms(model, {"lm_head": model.lm_head}, loader(), 3, show_progress_bar=False)
    else:
        scores = calibrate_norms(model, {"lm_head": model.lm_head}, loader(), 1, show_progress_bar=False)
        assert scores["lm_head"].mean > 0
    after = state_of(model)
    assert all(a is b for a, b in zip(before[2], after[2], strict=True))
    assert before[:2] + before[3:] == after[:2] + after[3:]
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_dropout_is_off_and_weights_get_no_gradient():
    model = llama(attention_dropout=0.5).train()
    batches = lm_batches(1)
    names = names_of(model, "q_proj")
    assert scores_of(model, batches, names) == scores_of(llama(), batches, names)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    "batch",
    [
        {"x": torch.ones(2, 3), "y": torch.ones(2)},
        (torch.ones(2, 3), torch.ones(2)),
        [torch.ones(2, 3), torch.ones(2)],
        torch.ones(2, 3),
    ],
)
def test_kinds_of_batches_and_models_that_are_not_from_transformers(batch):
    class Regression(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, x, y=None):
            return (self.layer(x).squeeze(-1) - (1.0 if y is None else y)).square().mean()

    assert scores_of(Regression(), [batch], ["layer"])["layer"].num_examples == 2
