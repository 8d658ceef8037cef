"""The eFIM of whole models against per-example gradients by autograd in float64."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fim_lora.calibration import calibrate
from fim_lora.estimator import FisherEstimator
from fim_lora.examples import UnattributableError, batch_size_of, by_example
from tiny_models import bert, class_batch, gpt2, llama, lm_batches, names_of, per_example_scores, t5, token_batch

ARCHITECTURES = {
    "llama": (llama, ("q_proj", "k_proj", "o_proj", "down_proj", "lm_head")),
    "gpt2": (gpt2, ("c_attn", "c_proj", "c_fc")),
    "bert": (bert, ("query", "value", "dense", "classifier")),
    "t5": (t5, ("q", "o", "wi", "wo")),
}


def scores_of(model, batches, names, **options):
    layers = {name: model.get_submodule(name) for name in names}
    return calibrate(model, layers, batches, len(batches), show_progress_bar=False, **options)


def assert_scores(scores, truth, rtol=1e-5):
    assert set(scores) == set(truth)
    for name, values in truth.items():
        score = scores[name]
        assert score.num_examples == len(values)
        assert score.mean == pytest.approx(values.mean().item(), rel=rtol), name
        if len(values) > 1:
            error = (values.std() / len(values) ** 0.5).item()
            assert score.standard_error == pytest.approx(error, rel=100 * rtol), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("padding", ["right", "left"])
def test_scores_equal_autograd(architecture, padding):
    make, ends = ARCHITECTURES[architecture]
    model = make()
    batches = lm_batches(padding=padding) if architecture != "bert" else [class_batch(seed=seed) for seed in range(3)]
    names = names_of(model, *ends)
    scores = scores_of(model, batches, names)
    truth = per_example_scores(make(), batches, names)
    assert_scores(scores, truth)
    assert (
        scores[names[0]].shape == {"llama": (24, 24), "gpt2": (72, 24), "bert": (24, 24), "t5": (24, 24)}[architecture]
    )


@pytest.mark.parametrize(("batch_size", "length"), [(1, 2), (1, 512), (8, 17), (5, 3), (2, 200)])
def test_scores_for_batch_sizes_and_lengths(batch_size, length):
    batches = [token_batch(batch_size, length, seed=1, shortest=2)]
    names = names_of(llama(), "v_proj", "gate_proj")
    assert_scores(scores_of(llama(), batches, names, exact=True), per_example_scores(llama(), batches, names))


def test_a_linear_layer_equals_vmap_of_grad():
    """Per-example gradients by `torch.func`, with a loss reduction that varies from batch to batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    batches = [(torch.randn(size, 7, 6), torch.randn(size, 7, 3), terms) for size, terms in ((1, 3), (4, 11), (8, 40))]

    def forward_fn(model, batch):
        x, y, terms = batch
        return (model(x) - y).square().sum() / terms

    scores = scores_of(model, batches, ["0", "2"], forward_fn=forward_fn)

    double = copy.deepcopy(model).double()
    parameters = {name: value.detach() for name, value in double.named_parameters()}

    def loss(parameters, x, y, factor):
        return (torch.func.functional_call(double, parameters, (x,)) - y).square().sum() * factor

    values = {"0": [], "2": []}
    for x, y, terms in batches:
        factor = len(x) / terms
        gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, None))(
            parameters, x.double(), y.double(), factor
        )
        for name in values:
            values[name].append(gradients[f"{name}.weight"].square().mean((1, 2)))
    assert_scores(scores, {name: torch.cat(value) for name, value in values.items()})


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
    estimator = own_loop(model, names, batches)
    assert_scores(estimator.scores(), per_example_scores(llama(), batches, names))


def own_loop(model, names, batches, max_batches=None, roots=True):
    estimator = FisherEstimator({name: model.get_submodule(name) for name in names}, max_batches)
    estimator.attach(*([model] if roots else []))
    for batch in batches:
        model(**batch).loss.backward()
    return estimator


@pytest.mark.parametrize("roots", [False, True])
def test_own_loop_equals_autograd(roots):
    batches, names = lm_batches(), names_of(llama(), "q_proj", "down_proj")
    estimator = own_loop(llama(), names, batches, roots=roots)
    assert_scores(estimator.scores(), per_example_scores(llama(), batches, names))


def test_evaluation_between_backward_passes_leaves_no_trace():
    batches, names = lm_batches(), names_of(llama(), "q_proj", "down_proj")
    model = llama()
    estimator = FisherEstimator({name: model.get_submodule(name) for name in names})
    estimator.attach(model)
    for batch in batches:
        with torch.no_grad():
            model(**batch)
            model.generate(batch["input_ids"], max_new_tokens=2, do_sample=False)
        model(**batch)  # with gradients, but nobody calls backward
        model(**batch).loss.backward()
        with torch.no_grad():
            model(**batch)
    assert estimator.num_batches == len(batches)
    assert_scores(estimator.scores(), per_example_scores(llama(), batches, names))


def test_two_forward_passes_into_one_loss():
    """Both towers of a contrastive loss are one model: the gradient of an example is the sum of both."""
    model, batches = bert(num_labels=4).eval(), [class_batch(seed=0), class_batch(seed=1)]
    names = names_of(model, "query", "classifier")

    def pair_loss(model, rows=slice(None), factor=1.0):
        one, two = (
            model(input_ids=b["input_ids"][rows], attention_mask=b["attention_mask"][rows]).logits for b in batches
        )
        return (one * two).sum() * factor

    estimator = FisherEstimator({name: model.get_submodule(name) for name in names})
    estimator.attach(model)
    (pair_loss(model) / 4).backward()
    scores = estimator.scores()
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
    estimator = FisherEstimator({"lm_head": model.lm_head})
    estimator.attach(model)
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


# --- Which rows belong to which example ---


class Rearranging(nn.Module):
    """The same function with the layer's input arranged in another way."""

    def __init__(self, arrange, restore):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3)
        self.arrange, self.restore = arrange, restore

    def forward(self, x):
        return self.restore(torch.tanh(self.layer(self.arrange(x))), x).square().sum((1, 2)).mean()


ARRANGEMENTS = {
    "batch first": (lambda x: x, lambda y, x: y),
    "sequence first": (lambda x: x.transpose(0, 1), lambda y, x: y.transpose(0, 1)),
    "flattened": (lambda x: x.reshape(-1, 4), lambda y, x: y.view(len(x), -1, 3)),
    "heads as dimensions": (lambda x: x.unsqueeze(2), lambda y, x: y.squeeze(2)),
}


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_arrangements_of_the_input_give_the_same_scores(arrangement):
    torch.manual_seed(1)
    x = torch.randn(3, 5, 4)
    scores = scores_of(Rearranging(*ARRANGEMENTS[arrangement]), [x], ["layer"])
    double = Rearranging(*ARRANGEMENTS["batch first"]).double()
    truth = []
    for row in range(3):
        double.zero_grad()
        double(x[row : row + 1].double()).backward()
        truth.append(double.layer.weight.grad.square().mean())
    assert_scores(scores, {"layer": torch.stack(truth)})


def test_rows_that_belong_to_nobody_count_as_one_example():
    """Five routed rows for a batch of three: the batch gradient, with its expectation under independence."""
    torch.manual_seed(1)
    model = nn.Linear(4, 3)
    x = torch.randn(3, 5, 4)

    def forward_fn(model, batch):
        return model(batch.reshape(-1, 4)[:5]).square().sum() / 3

    with pytest.warns(UserWarning, match=r"1 layers could not be attributed.*\['layer'\]"):
        scores = calibrate(model, {"layer": model}, [x], 1, forward_fn, show_progress_bar=False)
    double = copy.deepcopy(model).double()
    forward_fn(double, x.double()).backward()
    assert scores["layer"].mean == pytest.approx(3 * double.weight.grad.square().mean().item(), rel=1e-5)
    assert scores["layer"].num_examples == 1
    assert scores["layer"].standard_error is None


class Routed(nn.Module):
    """Some rows of some batches reach an expert, in an order that says nothing of their examples."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.expert, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x, rows):
        y = x.reshape(-1, 4)
        if rows:
            y = torch.cat([self.expert(y[:rows]), y[rows:]])
        return self.head(y.reshape(x.shape)).square().sum() / len(x)


@pytest.mark.parametrize("first", [0, 1])
def test_every_batch_weighs_as_much_as_its_examples_also_where_rows_belong_to_nobody(first):
    x = torch.randn(4, 5, 4)

    def expert_of(*rows):
        model = Routed()
        batches = [(x, number) for number in rows]
        with pytest.warns(UserWarning, match="could not be attributed"):
            return scores_of(model, batches, ["expert", "head"], forward_fn=lambda m, b: m(*b))["expert"].mean

    always = expert_of(7, 7)
    # Half of the examples have no gradient there.
    assert expert_of(*[(7, 0), (0, 7)][first]) == pytest.approx(always / 2, rel=1e-6)
    # All rows of a batch belong to somebody: exact there, and both batches weigh the same.
    exact = scores_of(Routed(), [(x, 20)], ["expert", "head"], forward_fn=lambda m, b: m(*b))["expert"].mean
    assert expert_of(*[(7, 20), (20, 7)][first]) == pytest.approx((always + exact) / 2, rel=1e-6)


def test_rule_of_rows():
    x, g = torch.randn(6, 2), torch.randn(6, 3)
    assert by_example(x, g, 6)[0] is x
    assert by_example(x, g, 3)[0].shape == (3, 2, 2)
    with pytest.raises(UnattributableError):
        by_example(x, g, 4)
    assert by_example(torch.randn(5, 3, 2), torch.randn(5, 3, 4), 3)[1].shape == (3, 5, 4)
    assert by_example(torch.randn(2), torch.randn(3), 1)[1].shape == (1, 3)


def test_batch_size():
    ids = torch.zeros(3, 7)
    assert batch_size_of({"position_ids": torch.zeros(1, 7), "input_ids": ids}, "input_ids") == 3
    assert batch_size_of({"flag": True, "scale": torch.tensor(1.0), "x": ids}) == 3
    assert batch_size_of([("text", ids), ids[:2]]) == 3
    assert batch_size_of(ids) == 3
    assert batch_size_of({"text": "abc"}) is None


# --- What goes wrong ---


def test_batches_that_are_not_finite_are_left_out_and_reported():
    model, names = nn.Linear(2, 1), ["layer"]
    good = [torch.randn(3, 2) for _ in range(2)]
    bad = torch.tensor([[1.0, 2.0], [float("inf"), 1.0]])

    def run(batches):
        return calibrate(
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
        (lambda m, b: m(b["input_ids"]), ValueError, "loss=None: the batches need labels"),
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
        calibrate(model, {"lm_head": model.lm_head}, [], 3, show_progress_bar=False)
    with pytest.warns(UserWarning, match="yielded 2 batches where fim_calibration_batches=3"):
        calibrate(model, {"lm_head": model.lm_head}, lm_batches(2), 3, show_progress_bar=False)
    with pytest.raises(RuntimeError, match="No calibration batch was seen"):
        FisherEstimator({"lm_head": model.lm_head}).scores()


def test_only_the_batches_asked_for_are_read():
    read = []

    def loader():
        for batch in lm_batches(5):
            read.append(batch)
            yield batch

    model = llama()
    scores = calibrate(model, {"lm_head": model.lm_head}, loader(), 2, show_progress_bar=False)
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
            scores = calibrate(model, {"lm_head": model.lm_head}, loader(), 3, show_progress_bar=False)
    else:
        scores = calibrate(model, {"lm_head": model.lm_head}, loader(), 1, show_progress_bar=False)
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


def test_copies_and_pickles_of_a_model_with_hooks_go_on_by_themselves():
    batches, names = lm_batches(4), names_of(llama(), "q_proj")
    model = llama()
    estimator = FisherEstimator({name: model.get_submodule(name) for name in names}, 4)
    model.estimator = estimator
    estimator.attach(model)
    for batch in batches[:2]:
        model(**batch).loss.backward()
    model(**batches[2])  # in flight: a graph cannot be copied
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for clone in copies:
        assert clone.estimator is not estimator
        for batch in batches[2:]:
            clone(**batch).loss.backward()
        assert_scores(clone.estimator.scores(), per_example_scores(llama(), batches, names))
        assert not any(module._forward_hooks for module in clone.modules())
    assert estimator.num_batches == 2
    for batch in batches[2:]:
        model(**batch).loss.backward()
    assert estimator.scores() == copies[0].estimator.scores()


def test_hooks_stop_after_the_last_batch():
    batches, names = lm_batches(3), names_of(llama(), "q_proj", "up_proj")
    model = llama()
    estimator = own_loop(model, names, batches[:2], max_batches=2)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    model(**batches[2]).loss.backward()
    assert estimator.scores().num_batches == 2


def test_half_precision_model_and_autocast():
    batches, names = lm_batches(), names_of(llama(), "q_proj", "down_proj")
    exact = scores_of(llama(), batches, names)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        half = scores_of(llama().bfloat16(), batches, names)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = scores_of(llama(), batches, names)
    for name in names:
        # The noise of a forward and backward pass in bfloat16.
        assert half[name].mean == pytest.approx(exact[name].mean, rel=0.1)
        assert mixed[name].mean == pytest.approx(exact[name].mean, rel=0.1)


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
    estimator = FisherEstimator({name: model.get_submodule(name) for name in names})
    estimator.attach(model)
    batches = lm_batches(3)
    # Behind the second layer, before the first, seen from the loss.
    hook = model.model.layers[1].register_forward_pre_hook(
        lambda module, args: (_OutOfMemory.apply(args[0]), *args[1:])
    )
    with pytest.raises(torch.OutOfMemoryError):
        model(**batches[0]).loss.backward()
    hook.remove()
    for batch in batches[1:]:
        model(**batch).loss.backward()
    scores = estimator.scores()
    assert scores.num_batches == 2
    for name, values in per_example_scores(llama(), batches[1:], names).items():
        assert scores[name].mean == pytest.approx(values.mean().item(), rel=1e-6)


def test_a_layer_of_which_only_a_part_is_here_is_refused():
    model = llama()
    mlp = model.model.layers[1].mlp
    # As tensor parallelism leaves it: the class still says the whole size.
    for layer in (mlp.gate_proj, mlp.up_proj):
        layer.weight = nn.Parameter(layer.weight[:20].detach())
    mlp.down_proj.weight = nn.Parameter(mlp.down_proj.weight[:, :20].detach())
    for name in ("up_proj", "down_proj"):
        with pytest.raises(ValueError, match=rf"layers\.1\.mlp\.{name}' is .*Tensor parallelism is not supported"):
            scores_of(model, lm_batches(), [f"model.layers.1.mlp.{name}"])
