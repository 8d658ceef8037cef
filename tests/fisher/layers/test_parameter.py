"""The eFIM of single parameters, such as experts and routers of a mixture, against autograd in float64."""

import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from fim_lora import FimConfig, get_fim_scores, initialize_lora_fim_ranks
from fim_lora.adapter.targets import resolve_targets
from helpers.calibration import calibrate_norms, norm_recorder
from helpers.mixtures import TARGETS, Experts, Mixture, Router, mixture_model
from helpers.own_warnings import FEWER_BATCHES, UNCERTAIN_ROWS
from helpers.single_layers import (
    WIDTH,
    Net,
    assert_score,
    batches_for,
    batches_of,
    by_row,
    by_type,
    floats,
    per_example_truth,
    under_autocast,
)

# --- Parameters, such as the experts of a mixture ---


@UNCERTAIN_ROWS
@pytest.mark.parametrize("own_loop", [False, True])
def test_experts_equal_autograd(own_loop):
    batches = batches_of(floats(7, WIDTH))
    model = mixture_model(budget="parameters", score_exponent=0.2)
    if own_loop:
        for batch in batches:
            model(**batch)["loss"].backward()
        allocation = initialize_lora_fim_ranks(model)
    else:
        allocation = initialize_lora_fim_ranks(model, batches, show_progress_bar=False)
    for name in TARGETS:
        assert_score(allocation.scores[name], per_example_truth(Mixture(), batches, [name], by_row))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained == allocation.num_parameters
    outer = model.base_model.model.experts
    assert {layer.parameter_name: layer.r["default"] for layer in (outer, outer.base_layer)} == {
        name.rpartition(".")[2]: rank for name, rank in allocation.ranks.items()
    }


@FEWER_BATCHES
def test_experts_of_a_plain_model():
    batches, base = batches_of(floats(7, WIDTH)), Mixture()
    config = LoraConfig(target_modules=["first"], target_parameters=TARGETS)
    scores = get_fim_scores(base, batches, config, show_progress_bar=False)
    assert set(scores) == {*TARGETS, "first"}
    for name in TARGETS:
        assert_score(scores[name], per_example_truth(Mixture(), batches, [name], by_row))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in base.parameters())


@FEWER_BATCHES
def test_a_parameter_that_is_a_matrix():
    """PEFT also accepts `target_parameters` for the weight of an ordinary layer."""
    torch.manual_seed(0)
    model = Net(nn.Linear(WIDTH, 3))
    batches = batches_for(model.layer)
    config = LoraConfig(target_modules=[], target_parameters=["layer.weight"])
    scores = get_fim_scores(model, batches, config, show_progress_bar=False)
    assert_score(scores["layer.weight"], per_example_truth(model, batches, ["layer.weight"], by_row))
    assert scores["layer.weight"].shape == (3, WIDTH)


@FEWER_BATCHES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_parameter_under_autocast(dtype):
    torch.manual_seed(0)
    model = Net(nn.Linear(WIDTH, 3), first=False)
    batches = batches_for(model.layer)
    config = LoraConfig(target_modules=[], target_parameters=["layer.weight"])
    scores = get_fim_scores(model, batches, config, forward_fn=under_autocast(dtype), show_progress_bar=False)
    truth = per_example_truth(model, batches, ["layer.weight"], by_row).mean().item()
    assert scores["layer.weight"].mean == pytest.approx(truth, rel=0.1 if dtype == torch.bfloat16 else 0.01)
    exact = get_fim_scores(model, batches, config, show_progress_bar=False)
    assert scores["layer.weight"].mean != exact["layer.weight"].mean


class Repeating(Experts):
    """Repeats every token for every expert, experts first, as Llama 4 does: rows of one example are not adjacent."""

    def forward(self, hidden):
        h = torch.relu(torch.bmm(hidden.view(len(self.up), -1, WIDTH), self.up.mT))
        return torch.bmm(h, self.down.mT).view(-1, WIDTH)


class RepeatingMixture(Mixture):
    def __init__(self):
        super().__init__()
        self.experts = Repeating(3)

    def forward(self, x, target):
        h = torch.tanh(self.first(x)).flatten(0, 1)
        y = self.experts(h.repeat(3, 1)).view(3, *x.shape).sum(0)
        return {"loss": (torch.tanh(y) - target[:, None, None]).square().flatten(1).sum(1).mean()}


@FEWER_BATCHES
def test_tokens_that_cannot_be_attributed_are_noticed():
    batches = batches_of(floats(7, WIDTH))
    config = LoraConfig(target_modules=[], target_parameters=["experts.up"])
    with pytest.warns(UserWarning, match="could not be attributed"):
        scores = get_fim_scores(RepeatingMixture(), batches, config, show_progress_bar=False)
    # A batch counts as one example: ‖Σ_t G_t‖² / B.
    truth = per_example_truth(RepeatingMixture(), batches, ["experts.up"], lambda batch: [by_type(batch)]) * 3
    assert scores["experts.up"].mean == pytest.approx(truth.mean().item(), rel=1e-5)

    single = [{key: value[row : row + 1] for key, value in batch.items()} for batch in batches for row in range(3)]
    config = LoraConfig(
        target_modules=[], target_parameters=["experts.up"], init_lora_weights="fim", fim_config=FimConfig(6)
    )
    scores = get_fim_scores(RepeatingMixture(), single, config, show_progress_bar=False)
    assert_score(scores["experts.up"], per_example_truth(RepeatingMixture(), single, ["experts.up"], by_row))


def test_a_module_that_does_not_repeat_itself_is_an_error():
    class Counting(Experts):
        calls = 0

        def forward(self, hidden, index, weights):
            self.calls += 1
            return super().forward(hidden, index, weights) * self.calls

    model = Mixture()
    model.experts = Counting(3)
    config = LoraConfig(target_modules=[], target_parameters=["experts.up"])
    with pytest.raises(RuntimeError, match=r"Counting of 'experts\.up' gave another output"):
        get_fim_scores(model, batches_of(floats(7, WIDTH)), config, show_progress_bar=False)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_batch_that_is_not_finite_is_left_out():
    options = {"init_lora_weights": "fim", "fim_config": FimConfig(3)}
    config = LoraConfig(target_modules=[], target_parameters=TARGETS, **options)
    first, last = batches_of(floats(7, WIDTH))
    damaged = first | {"x": first["x"].clone()}
    damaged["x"][0, 0, 0] = torch.nan
    with pytest.warns(UserWarning, match="1 of 3 calibration batches"):
        scores = get_fim_scores(Mixture(), [first, damaged, last], config, show_progress_bar=False)
    assert scores.num_skipped_batches == 1
    for name in TARGETS:
        assert_score(scores[name], per_example_truth(Mixture(), [first, last], [name], by_row))


class MaskingRouter(Router):
    """Masks the logits of the experts that were not chosen, as router losses want them."""

    def forward(self, hidden):
        logits, scores, index = super().forward(hidden)
        chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, index, True)
        return logits.masked_fill(~chosen, -torch.inf), scores, index


class MaskedMixture(Mixture):
    def __init__(self):
        super().__init__()
        self.router = MaskingRouter(3)

    def forward(self, x, target):
        h = torch.tanh(self.first(x)).flatten(0, 1)
        logits, scores, index = self.router(h)
        y = self.experts(h, index, scores).unflatten(0, x.shape[:2])
        y = y + logits.logsumexp(-1).unflatten(0, x.shape[:2])[..., None]
        return {"loss": (torch.tanh(y) - target[:, None, None]).square().flatten(1).sum(1).mean()}


@FEWER_BATCHES
def test_outputs_may_be_masked_by_minus_infinity():
    batches = batches_of(floats(7, WIDTH))
    config = LoraConfig(target_modules=[], target_parameters=["router.weight"])
    scores = get_fim_scores(MaskedMixture(), batches, config, show_progress_bar=False)
    assert scores.num_skipped_batches == 0
    truth = per_example_truth(MaskedMixture(), batches, ["router.weight"], by_row)
    assert_score(scores["router.weight"], truth)


@FEWER_BATCHES
def test_an_expert_without_tokens_and_an_example_without_a_gradient():
    class Masked(Mixture):
        def forward(self, x, target):
            h = torch.tanh(self.first(x)).flatten(0, 1)
            index = torch.zeros(len(h), 1, dtype=torch.long)
            y = self.experts(h, index, torch.ones(len(h), 1, dtype=h.dtype)).unflatten(0, x.shape[:2])
            return {"loss": (y.square().flatten(1).sum(1) * (target > 0.5)).mean()}

    batches = batches_of(floats(7, WIDTH))
    for batch in batches:
        batch["target"] = torch.tensor([0.0, 1.0, 1.0])
    config = LoraConfig(target_modules=[], target_parameters=TARGETS)
    scores = get_fim_scores(Masked(), batches, config, show_progress_bar=False)
    for name in TARGETS:
        assert_score(scores[name], per_example_truth(Masked(), batches, [name], by_row))


def test_half_precision_experts_keep_small_gradients():
    """Products of 1e-7 vanish in float16, unless they are scaled."""
    torch.manual_seed(0)
    layer = Experts(3).half()
    x, index, weights = torch.randn(6, WIDTH).half(), torch.randint(0, 3, (6, 2)), torch.rand(6, 2).half() / 10
    g = torch.full((6, WIDTH), 2e-7).half()
    wrapped = nn.Sequential(layer)
    get_peft_model(wrapped, LoraConfig(target_modules=[], target_parameters=["0.down"]))
    recorder = norm_recorder({"down": wrapped[0]})
    recorder.start()
    layer(x, index, weights).backward(g)

    values = []
    for row in range(6):
        weight = layer.down.detach().double().requires_grad_()
        parameters = {"up": layer.up.detach().double(), "down": weight}
        one = (x[row : row + 1].double(), index[row : row + 1], weights[row : row + 1].double())
        y = functional_call(Experts(3).double(), parameters, one)
        (gradient,) = torch.autograd.grad(y, weight, g[row : row + 1].double() * 6)
        values.append(gradient.square().mean())
    assert recorder.result()["down"].mean == pytest.approx(torch.stack(values).mean().item(), rel=0.01)


# --- Parameters of modules with several outputs, such as the router of a mixture ---


class RoutedMixture(nn.Module):
    """Chosen outputs of the router get gradients; it is called once or twice, checkpointed or not."""

    def __init__(self, uses=("scores",), calls=1, reentrant=None, kind=tuple):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.experts = nn.Linear(WIDTH, WIDTH), Experts(3)
        self.router = Router(3, kind)
        self.uses, self.calls, self.reentrant = uses, calls, reentrant

    def block(self, h):
        outputs = self.router(h.flatten(0, 1))
        logits, scores, index = outputs.values() if isinstance(outputs, dict) else outputs
        y = torch.zeros_like(h)
        if "scores" in self.uses:
            y = y + self.experts(h.flatten(0, 1), index, scores).view_as(h)
        if "logits" in self.uses:
            y = y + logits.square().sum(-1).view(*h.shape[:2], 1)
        if "in place" in self.uses:
            y = y + logits.mul_(2).exp_().sum(-1).view(*h.shape[:2], 1) * scores.neg_().prod(-1).view(*h.shape[:2], 1)
        return torch.tanh(y)

    def forward(self, x, target):
        h = torch.tanh(self.first(x))
        for _ in range(self.calls):
            if self.reentrant is None:
                h = h + self.block(h)
            else:
                h = h + checkpoint(self.block, h, use_reentrant=self.reentrant)
        return {"loss": (h - target[:, None, None]).square().flatten(1).sum(1).mean()}


ROUTED = ["router.weight", *TARGETS]


def assert_routed(scores, batches, names=ROUTED, **options):
    for name in names:
        assert_score(scores[name], per_example_truth(RoutedMixture(**options), batches, [name], by_row), rtol=1e-4)


@FEWER_BATCHES
@pytest.mark.parametrize("upstream", [False, True])
@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("uses", [("scores",), ("logits",), ("scores", "logits"), ("in place",)], ids="-".join)
def test_all_outputs_with_a_gradient_count(uses, calls, upstream):
    """Logits receive a gradient directly and through the scores. The graph begins before or after the router."""
    batches = batches_of(floats(7, WIDTH))
    names = ["router.weight", *(TARGETS if "scores" in uses else [])]
    config = LoraConfig(target_modules=["first"] if upstream else [], target_parameters=names)
    model = RoutedMixture(uses, calls)
    scores = get_fim_scores(model, batches, config, show_progress_bar=False)
    assert_routed(scores, batches, names, uses=uses, calls=calls)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@FEWER_BATCHES
@pytest.mark.parametrize("kind", [tuple, list, dict])
def test_outputs_in_any_container(kind):
    batches = batches_of(floats(7, WIDTH))
    config = LoraConfig(target_modules=["first"], target_parameters=["router.weight"])
    model = RoutedMixture(("scores", "logits"), kind=kind)
    scores = get_fim_scores(model, batches, config, show_progress_bar=False)
    assert_routed(scores, batches, ["router.weight"], uses=("scores", "logits"))


@UNCERTAIN_ROWS
@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("calls", [1, 2])
def test_a_router_in_a_loop_of_your_own(reentrant, calls):
    batches, uses = batches_of(floats(7, WIDTH)), ("scores", "logits")
    config = LoraConfig(
        r=2,
        target_modules=["first"],
        target_parameters=ROUTED,
        init_lora_weights="fim",
        fim_config=FimConfig(2),
    )
    model = get_peft_model(RoutedMixture(uses, calls, reentrant), config)
    for batch in batches:
        model(**batch)["loss"].backward()
    allocation = initialize_lora_fim_ranks(model)
    assert_routed(allocation.scores, batches, uses=uses, calls=calls)
    model(**batches[0])["loss"].backward()
    assert model.base_model.model.router.lora_B["default"].weight.grad.any()


def test_examples_of_two_sequences_and_several_outputs():
    """All first sequences, then all second sequences, as trainers of pairs order them."""
    uses = ("scores", "logits")
    batches = batches_of(floats(7, WIDTH), batch_size=6)
    config = LoraConfig(target_modules=["first"], target_parameters=ROUTED)
    model = RoutedMixture(uses)
    targets = resolve_targets(model, config)
    scores = calibrate_norms(model, targets, batches, 2, show_progress_bar=False, sequences_per_example=2)

    def by_pair(batch):
        batch = by_type(batch)
        return [{key: value[row::3] for key, value in batch.items()} for row in range(3)]

    for name in ROUTED:
        assert_score(scores[name], per_example_truth(RoutedMixture(uses), batches, [name], by_pair), rtol=1e-4)


class WithMean(Router):
    """Its last output does not belong to any example."""

    def forward(self, hidden):
        logits, scores, index = super().forward(hidden)
        return logits, scores, index, logits.square().mean()


class MeanMixture(RoutedMixture):
    def __init__(self, weight):
        super().__init__()
        torch.manual_seed(0)
        self.router, self.weight = WithMean(3), weight

    def forward(self, x, target):
        h = torch.tanh(self.first(x))
        _, scores, index, mean = self.router(h.flatten(0, 1))
        y = torch.tanh(self.experts(h.flatten(0, 1), index, scores).view_as(h))
        loss = (y - target[:, None, None]).square().flatten(1).sum(1).mean()
        return {"loss": loss + self.weight * mean if self.weight else loss}


class NearlyOne(WithMean):
    """A mean that hardly differs between examples, as losses that balance the experts do."""

    def forward(self, hidden):
        *outputs, mean = super().forward(hidden)
        return *outputs, 1 + 1e-3 * mean


@FEWER_BATCHES
def test_an_output_that_belongs_to_no_example():
    batches = batches_of(floats(7, WIDTH))
    config = LoraConfig(target_modules=["first"], target_parameters=["router.weight"])
    scores = get_fim_scores(MeanMixture(0), batches, config, show_progress_bar=False)
    assert_score(scores["router.weight"], per_example_truth(MeanMixture(0), batches, ["router.weight"], by_row))

    with pytest.warns(UserWarning, match="could not be attributed"):
        scores = get_fim_scores(MeanMixture(3), batches, config, show_progress_bar=False)
    # A batch counts as one example: ‖Σ_t G_t‖² / B.
    truth = per_example_truth(MeanMixture(3), batches, ["router.weight"], lambda batch: [by_type(batch)]) * 3
    assert scores["router.weight"].mean == pytest.approx(truth.mean().item(), rel=1e-5)

    balanced = MeanMixture(3e3)
    torch.manual_seed(0)
    balanced.router = NearlyOne(3)
    truth = per_example_truth(balanced, batches, ["router.weight"], lambda batch: [by_type(batch)]) * 3
    with pytest.warns(UserWarning, match="could not be attributed"):
        scores = get_fim_scores(balanced, batches, config, show_progress_bar=False)
    assert scores["router.weight"].mean == pytest.approx(truth.mean().item(), rel=1e-5)


def test_outputs_with_a_graph_that_is_kept_for_a_second_gradient():
    model = get_peft_model(
        RoutedMixture(("scores", "logits")),
        LoraConfig(
            target_modules=[], target_parameters=["router.weight"], init_lora_weights="fim", fim_config=FimConfig(3)
        ),
    )
    loss = model(**batches_of(floats(7, WIDTH))[0])["loss"]
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"'router\.weight' received a second gradient"):
        loss.backward()


class TwoOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x):
        return x @ self.weight, (x @ self.weight).square()


@pytest.mark.parametrize("reentrant", [False, True])
def test_hooks_keep_no_argument_of_a_checkpointed_call(reentrant):
    """Under checkpointing, the input of a module is gone after the forward pass and recomputed in the backward."""
    model, inputs = nn.Sequential(nn.Linear(WIDTH, WIDTH), TwoOutputs()), []
    model[1].register_forward_pre_hook(lambda module, args: inputs.append(weakref.ref(args[0])))
    recorder = norm_recorder(resolve_targets(model, LoraConfig(target_modules=[], target_parameters=["1.weight"])))
    recorder.start()
    x = torch.randn(3, WIDTH, requires_grad=True)
    loss = sum(output.sum() for output in checkpoint(model, x, use_reentrant=reentrant))
    assert [reference() is None for reference in inputs] == [True]
    loss.backward()
    assert recorder.num_batches == 1
    assert [reference() is None for reference in inputs] == [True, True]
