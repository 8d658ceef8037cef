"""Which rows of a layer belong to which example, where shapes do not say it; the truth is autograd in float64."""

import copy
import warnings
from collections import UserDict

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BatchEncoding, BatchFeature

import fim_lora
from fim_lora import FimConfig, initialize_lora_fim_ranks
from fim_lora.fisher.layers.batch_size import batch_size_of
from helpers.calibration import assert_scores, scores_of
from helpers.own_warnings import UNATTRIBUTED, UNREACHED
from helpers.tiny_models import llama, token_batch


def stacked_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4)).double()


def pairs(size=4):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(size, 5, generator=generator, dtype=torch.float64) for name in ("a", "b")}


def squared_distances(first, second):
    return (first - second).square().sum(1)


def halves_in_one_pass(net, batch):
    z = net(torch.cat([batch["a"], batch["b"]]))
    return squared_distances(*z.chunk(2)).mean()


def truth_of(loss_of_example, weights, size):
    """`mean(G_t ∘ G_t)` for every example alone."""
    values = {name: [] for name in weights}
    for example in range(size):
        gradients = torch.autograd.grad(loss_of_example(example), list(weights.values()))
        for name, gradient in zip(weights, gradients, strict=True):
            values[name].append(gradient.square().mean())
    return {name: torch.stack(found) for name, found in values.items()}


def truth_of_pairs(net, batch):
    weights = {name: net.get_submodule(name).weight for name in ("0", "2")}

    def loss(example):
        return squared_distances(net(batch["a"][[example]]), net(batch["b"][[example]])).mean()

    return truth_of(loss, weights, len(batch["a"]))


def test_two_stacked_halves():
    net, batch = stacked_net(), pairs()
    truth = truth_of_pairs(net, batch)
    assert_scores(scores_of(net, [batch], ["0", "2"], forward_fn=halves_in_one_pass), truth)


def test_the_values_of_stacked_halves():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4))
    batch = {"a": torch.randn(4, 5), "b": torch.randn(4, 5)}
    found = scores_of(net, [batch], ["0", "2"], forward_fn=halves_in_one_pass)
    assert {name: round(score.mean, 3) for name, score in found.items()} == {"0": 0.189, "2": 0.288}


def test_pairs_that_follow_each_other():
    net, batch = stacked_net(), pairs()

    def interleaved(net, batch):
        z = net(torch.stack([batch["a"], batch["b"]], dim=1).flatten(0, 1)).unflatten(0, (-1, 2))
        return squared_distances(z[:, 0], z[:, 1]).mean()

    assert_scores(scores_of(net, [batch], ["0", "2"], forward_fn=interleaved), truth_of_pairs(net, batch))


def test_later_batches_of_other_sizes():
    net, batches = stacked_net(), [pairs(4), pairs(3), pairs(6)]
    truths = [truth_of_pairs(net, batch) for batch in batches]
    truth = {name: torch.cat([one[name] for one in truths]) for name in truths[0]}
    assert_scores(scores_of(net, batches, ["0", "2"], forward_fn=halves_in_one_pass), truth)


class Routed(nn.Module):
    """An expert that sees only chosen rows; their number is a multiple of the batch by chance."""

    def __init__(self):
        super().__init__()
        self.first, self.expert = nn.Linear(5, 5), nn.Linear(5, 4)

    def forward(self, x):
        hidden = self.first(x).flatten(0, 1)
        chosen = hidden[:, 0].argsort(descending=True)[: 2 * len(x)]
        output = hidden.new_zeros(len(hidden), 4).index_copy(0, chosen, self.expert(hidden[chosen]))
        return output.unflatten(0, x.shape[:2])


def test_rows_that_a_router_chose_belong_to_no_example():
    torch.manual_seed(0)
    net, x = Routed().double(), torch.randn(3, 6, 5, dtype=torch.float64)
    with pytest.warns(UserWarning, match=r"could not be attributed to examples.*\['expert'\]"):
        scores_of(net, [{"x": x}], ["first", "expert"], forward_fn=lambda net, b: net(b["x"]).square().mean())


def test_the_batch_is_not_the_leading_dimension_of_the_first_tensor():
    model = llama().double()
    ids = token_batch(6, 8)
    positions = torch.arange(8)[None]
    embeds = model.get_input_embeddings()(ids["input_ids"]).detach()
    names = [name for name, _ in model.named_modules() if name.endswith(("q_proj", "down_proj"))]
    first = {"position_ids": positions, "inputs_embeds": embeds, "labels": ids["labels"]}
    last = {"inputs_embeds": embeds, "labels": ids["labels"], "position_ids": positions}
    found, expected = (scores_of(model, [batch], names) for batch in (first, last))
    assert next(iter(found.values())).num_examples == 6
    for name in names:
        assert found[name].mean == pytest.approx(expected[name].mean, rel=1e-12)


def encoder_layer():
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0).double()


@pytest.mark.parametrize("length", [3, 4, 6, 8])
def test_sequences_first_of_any_length(length):
    """Also with as many positions as examples, and a multiple of them."""
    layer, x = encoder_layer(), torch.randn(length, 4, 8, dtype=torch.float64)
    places = torch.linspace(0, 1, length, dtype=torch.float64)[:, None, None]  # the order of positions matters
    y = torch.randn(4, 8, dtype=torch.float64)

    def loss(layer, batch):
        return (layer(batch["x"] + places)[-1] - batch["y"]).square().sum(1).mean()

    weights = {name: layer.get_submodule(name).weight for name in ("linear1", "linear2")}
    truth = truth_of(lambda t: loss(layer, {"x": x[:, [t]], "y": y[[t]]}), weights, 4)
    found = scores_of(layer, [{"x": x, "y": y}], list(weights), forward_fn=loss)
    assert_scores(found, truth)


@pytest.mark.parametrize("length", [3, 4, 8])
def test_ids_of_sequences_first(length):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(20, 6), nn.Linear(6, 3)).double()
    ids, y = torch.randint(0, 20, (length, 4)), torch.randn(4, 3, dtype=torch.float64)

    def loss(net, batch):
        weight = torch.arange(1.0, length + 1, dtype=torch.float64)[:, None, None]
        return ((net(batch["ids"]) * weight).sum(0) - batch["y"]).square().sum(1).mean()

    weights = {name: net.get_submodule(name).weight for name in ("0", "1")}
    truth = truth_of(lambda t: loss(net, {"ids": ids[:, [t]], "y": y[[t]]}), weights, 4)
    assert_scores(scores_of(net, [{"ids": ids, "y": y}], ["0", "1"], forward_fn=loss), truth)


def test_nothing_tells_sequences_from_examples():
    """Positions and examples of equal number, which no loss distinguishes."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(5, 4)).double(), torch.randn(4, 4, 5, dtype=torch.float64)
    with pytest.warns(UserWarning, match="could not be attributed to examples"):
        scores_of(net, [{"x": x}], ["0"], forward_fn=lambda net, batch: net(batch["x"]).square().mean())


class WithPositions(nn.Module):
    def __init__(self):
        super().__init__()
        self.positions, self.out = nn.Embedding(9, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.out(x + self.positions(torch.arange(x.shape[1])))


def test_positions_that_all_examples_share():
    torch.manual_seed(0)
    net, x = WithPositions().double(), torch.randn(4, 4, 6, dtype=torch.float64)
    y = torch.randn(4, 4, 3, dtype=torch.float64)
    with pytest.warns(UserWarning, match=r"could not be attributed to examples.*\['positions'\]"):
        scores_of(
            net,
            [{"x": x, "labels": y}],
            ["positions", "out"],
            forward_fn=lambda net, batch: (net(batch["x"]) - batch["labels"]).square().mean(),
        )


def test_an_unambiguous_model_is_not_run_again():
    model, calls = llama(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    scores_of(model, [token_batch(seed=0), token_batch(seed=1)], ["model.layers.0.self_attn.q_proj"])
    assert len(calls) == 2


def test_flattened_rows_cost_one_more_forward_pass():
    calls = []
    net = nn.Sequential(nn.Linear(5, 4))
    net.register_forward_hook(lambda *_: calls.append(1))
    batches = [{"x": torch.randn(4, 3, 5)} for _ in range(3)]
    scores_of(net, batches, ["0"], forward_fn=lambda net, batch: net(batch["x"].view(-1, 5)).square().mean())
    assert len(calls) == 4


def test_random_losses_go_on_as_without_the_further_pass():
    net = nn.Sequential(nn.Linear(5, 4))
    noise = []

    def loss(net, batch):
        noise.append(torch.rand(()))
        return (net(batch["x"].view(-1, 5)) + noise[-1]).square().mean()

    torch.manual_seed(3)
    scores_of(net, [{"x": torch.randn(4, 3, 5)}] * 2, ["0"], forward_fn=loss)
    first, again, second = noise
    torch.manual_seed(3)
    torch.randn(4, 3, 5)
    assert [first, second] == [torch.rand(()), torch.rand(())]
    assert again == first


# Loops of one's own


class Pairs(nn.Sequential):
    """A model that stacks its two inputs."""

    def forward(self, first, second=None):
        return super().forward(first if second is None else torch.cat([first, second]))


def own_loop_model():
    config = LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights="fim", fim_config=FimConfig())
    return get_peft_model(Pairs(*stacked_net()), config)


def distance_of_pairs(model, batch):
    return squared_distances(*model(batch["a"], batch["b"]).chunk(2)).mean()


def scores_in_own_loop(model):
    return initialize_lora_fim_ranks(model).scores


def test_stacked_halves_in_a_loop_of_ones_own_warn():
    model = own_loop_model()
    distance_of_pairs(model, pairs()).backward()
    with pytest.warns(UserWarning, match="2 layers could belong to the examples of a batch in several ways"):
        scores_in_own_loop(model)


@pytest.mark.parametrize(("rows", "is_right"), [("stacked", True), ("consecutive", False)])
def test_declared_rows(rows, is_right):
    model, batch = own_loop_model(), pairs()
    truth = truth_of_pairs(stacked_net(), batch)
    with fim_lora.calibration_batch(model, 4, rows=rows):
        distance_of_pairs(model, batch).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = scores_in_own_loop(model)
    right = {name: scores[name].mean == pytest.approx(value.mean().item(), rel=1e-6) for name, value in truth.items()}
    assert set(right.values()) == {is_right}


def batch_of_classes():
    torch.manual_seed(1)
    return torch.randn(6, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 1])


def truth_of_classes(x, y):
    net = stacked_net()
    weights = {name: net.get_submodule(name).weight for name in ("0", "2")}
    return truth_of(lambda t: F.cross_entropy(net(x[[t]]), y[[t]]), weights, len(x))


def in_pieces(model, x, y):
    return F.cross_entropy(torch.cat([model(piece) for piece in x.chunk(2)]), y)


def test_pieces_of_a_batch_in_a_loop_of_ones_own_warn():
    model = own_loop_model()
    in_pieces(model, *batch_of_classes()).backward()
    with pytest.warns(UserWarning, match="called several times before one backward pass"):
        scores_in_own_loop(model)


def test_declared_pieces_of_a_batch():
    model, (x, y) = own_loop_model(), batch_of_classes()
    with fim_lora.calibration_batch(model, len(x)):
        in_pieces(model, x, y).backward()
    assert_scores(scores_in_own_loop(model), truth_of_classes(x, y))


def test_two_views_of_the_same_examples_are_exact():
    model, batch = own_loop_model(), pairs()
    with fim_lora.calibration_batch(model, 4):
        squared_distances(model(batch["a"]), model(batch["b"])).mean().backward()
    assert_scores(scores_in_own_loop(model), truth_of_pairs(stacked_net(), batch))


def test_passes_without_gradient_before_those_with_gradient_do_not_count():
    model, (x, y) = own_loop_model(), batch_of_classes()
    with torch.no_grad():
        for piece in x.split(4):
            model(piece)
    F.cross_entropy(model(x), y).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_scores(scores_in_own_loop(model), truth_of_classes(x, y))


def test_an_unknown_order_of_rows():
    with pytest.raises(ValueError, match=r"rows='mixed'.*'consecutive', 'stacked' or 'sequence-first'"):
        fim_lora.calibration_batch(own_loop_model(), 4, rows="mixed").__enter__()


@pytest.mark.parametrize("number", [0, -1, 2.5, True])
def test_a_number_of_examples_that_is_none(number):
    with pytest.raises(ValueError, match=f"num_examples must be a positive integer, got {number}"):
        fim_lora.calibration_batch(own_loop_model(), number).__enter__()


def test_an_adapter_that_does_not_exist():
    with pytest.raises(ValueError, match="other"):
        fim_lora.calibration_batch(own_loop_model(), 4, adapter_name="other").__enter__()


def test_a_copy_inside_of_the_block_knows_nothing_of_it():
    model = own_loop_model()
    with fim_lora.calibration_batch(model, 4, rows="stacked"):
        other = copy.deepcopy(model)
        distance_of_pairs(model, pairs()).backward()
    distance_of_pairs(other, pairs()).backward()
    with pytest.warns(UserWarning, match="several ways"):
        scores_in_own_loop(other)


def test_declaring_after_the_allocation_changes_nothing():
    model, batch = own_loop_model(), pairs()
    with fim_lora.calibration_batch(model, 4, rows="stacked"):
        distance_of_pairs(model, batch).backward()
    scores_in_own_loop(model)
    with fim_lora.calibration_batch(model, 4, rows="stacked"):
        distance_of_pairs(model, batch).backward()


@UNATTRIBUTED
def test_inputs_that_do_not_show_the_number_of_examples_warn():
    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 4)

        def forward(self, edges, nodes):
            return self.layer(nodes + nodes[edges[0]].sum(0)).square().sum()

    torch.manual_seed(0)
    batch = {"edges": torch.randint(0, 6, (2, 9)), "nodes": torch.randn(6, 5)}
    with pytest.warns(UserWarning, match="do not show how many examples they hold"):
        scores_of(Graph(), [batch], ["layer"])


# What else is measured on the rows of examples


def halves_in_two_passes(net, batch):
    return squared_distances(net(batch["a"]), net(batch["b"])).mean()


def trained_adapter():
    config = LoraConfig(r=3, target_modules=["0", "2"], init_lora_weights=False)
    return get_peft_model(stacked_net(), config).double()


def test_a_spectrum_of_stacked_halves():
    stacked, separate = (
        fim_lora.get_lora_spectrum(trained_adapter(), [pairs()], num_batches=1, forward_fn=forward_fn)
        for forward_fn in (halves_in_one_pass, halves_in_two_passes)
    )
    for name, layer in separate.items():
        assert layer.gates.shape[0] == 4
        assert stacked[name].saliencies == pytest.approx(layer.saliencies, rel=1e-5), name


def test_diagonals_of_stacked_halves():
    stacked, separate = (
        fim_lora.get_fim_diagonals(stacked_net(), [pairs()], ["0.weight", "2.weight"], num_batches=1, forward_fn=one)
        for one in (halves_in_one_pass, halves_in_two_passes)
    )
    for name, diagonal in separate.items():
        torch.testing.assert_close(stacked[name], diagonal, rtol=1e-6, atol=0)


# What must not mislead the further pass


class Flattening(nn.Module):
    """A layer that keeps the batch, and one that flattens it."""

    def __init__(self, width=5):
        super().__init__()
        torch.manual_seed(0)
        self.kept, self.flattened = nn.Linear(width, 7), nn.Linear(7, 3)

    def forward(self, x):
        return self.flattened(torch.tanh(self.kept(x)).flatten(0, 1)).unflatten(0, x.shape[:2])


def flattening_batch(size=4, length=3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, length, 5, generator=generator, dtype=torch.float64)
    return {"x": x, "y": torch.randn(size, length, 3, generator=generator, dtype=torch.float64)}


def squared_errors(net, batch):
    return (net(batch["x"]) - batch["y"]).square().mean()


def truth_of_flattening(batch):
    net = Flattening().double()
    weights = {name: net.get_submodule(name).weight for name in ("kept", "flattened")}
    return truth_of(
        lambda t: squared_errors(net, {name: value[[t]] for name, value in batch.items()}), weights, len(batch["x"])
    )


def assert_flattening_scores(batches, forward_fn, batch=None):
    truth = truth_of_flattening(batch or flattening_batch())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert_scores(scores_of(Flattening().double(), batches, list(truth), forward_fn=forward_fn), truth)


@pytest.mark.parametrize("kind", [BatchEncoding, BatchFeature, UserDict, dict])
def test_batches_of_other_mappings(kind):
    assert_flattening_scores([kind(flattening_batch())], squared_errors)


def test_a_list_of_examples():
    batch = flattening_batch()
    examples = [{name: value[t] for name, value in batch.items()} for t in range(4)]

    def of_list(net, examples):
        return squared_errors(net, {name: torch.stack([one[name] for one in examples]) for name in ("x", "y")})

    assert_flattening_scores([examples], of_list)


def test_texts_that_the_forward_function_tokenizes():
    batch = flattening_batch()
    rows = {text: batch["x"][place] for place, text in enumerate("abcd")}

    def tokenized(net, batch):
        return squared_errors(net, {"x": torch.stack([rows[text] for text in batch["texts"]]), "y": batch["y"]})

    assert_flattening_scores([{"texts": list("abcd"), "y": batch["y"]}], tokenized)


def test_a_forward_function_that_changes_the_batch():
    def popping(net, batch):
        y = batch.pop("y")
        batch["x"].mul_(2)
        return squared_errors(net, {"x": batch["x"], "y": y})

    batch = flattening_batch()
    doubled = {"x": 2 * batch["x"], "y": batch["y"]}
    assert_flattening_scores([batch], popping, doubled)


def test_several_rows_of_the_batch_for_each_example():
    """As packed patches of images: the batch itself has three rows for each example."""
    batch = flattening_batch()
    packed = {"patches": batch["x"].flatten(0, 1), "labels": batch["y"]}

    def unpacking(net, batch):
        x = batch["patches"].unflatten(0, (len(batch["labels"]), -1))
        return squared_errors(net, {"x": x, "y": batch["labels"]})

    assert_flattening_scores([packed], unpacking)


def test_labels_of_flattened_positions_are_not_the_examples():
    batch = flattening_batch()
    flat = {"x": batch["x"], "y": batch["y"][..., 0].flatten()}
    assert batch_size_of(flat) == (4, False)


def noisy(net, batch):
    return squared_errors(net, {"x": batch["x"] + torch.randn_like(batch["x"]), "y": batch["y"]})


def refusing_another_order(net, batch):
    if not torch.equal(batch["x"], flattening_batch()["x"]):
        raise RuntimeError("lengths have to be sorted")
    return squared_errors(net, batch)


@pytest.mark.parametrize("forward_fn", [noisy, refusing_another_order])
def test_a_further_pass_that_says_nothing_spoils_only_what_is_open(forward_fn):
    net = Flattening().double()
    with pytest.warns(UserWarning, match=r"The inputs of 1 layers could not be attributed.*\['flattened'\]"):
        scores = scores_of(net, [flattening_batch()], ["kept", "flattened"], forward_fn=forward_fn)
    assert (scores["kept"].num_examples, scores["flattened"].num_examples) == (4, 1)


def test_a_batch_without_a_finite_loss_decides_nothing():
    bad = flattening_batch() | {"y": torch.full((4, 3, 3), torch.nan, dtype=torch.float64)}
    net = Flattening().double()
    with pytest.warns(UserWarning, match="not finite") as warned:
        scores = scores_of(net, [bad, flattening_batch()], ["kept", "flattened"], forward_fn=squared_errors)
    assert len(warned) == 1
    assert {score.num_examples for score in scores.values()} == {4}


def test_no_memory_in_the_further_pass_is_an_error():
    calls = []

    def failing(net, batch):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no memory")
        return squared_errors(net, batch)

    net = Flattening().double()
    state = torch.get_rng_state()
    with pytest.raises(torch.OutOfMemoryError):
        scores_of(net, [flattening_batch()], ["kept", "flattened"], forward_fn=failing)
    assert not net.flattened._forward_hooks
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("length", [4, 12, 64])
@pytest.mark.parametrize("dimensions", [1, 2])
def test_position_tables_of_any_length_belong_to_no_example(length, dimensions):
    """Also smooth ones, whose rows hardly differ from their neighbors."""

    class WithTable(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.table, self.smooth, self.out = nn.Embedding(length, 6), nn.Linear(2, 6), nn.Linear(6, 3)

        def forward(self, x):
            places = torch.arange(length)
            waves = torch.stack([(places / 30).sin(), (places / 30).cos()], dim=-1).double()
            if dimensions == 2:
                places, waves = places[None], waves[None]
            return self.out(x + self.table(places) + self.smooth(waves))

    net, generator = WithTable().double(), torch.Generator().manual_seed(0)
    x, y = (torch.randn(4, length, size, generator=generator, dtype=torch.float64) for size in (6, 3))
    with pytest.warns(UserWarning, match=r"could not be attributed") as warned:
        scores = scores_of(net, [{"x": x, "y": y}], ["table", "smooth", "out"], forward_fn=squared_errors)
    assert "['smooth', 'table']" in str(warned[0].message)
    assert scores["out"].num_examples == 4


# What a declaration means


def declared_scores(num_examples, run, rows="consecutive", model=None):
    model = model or own_loop_model()
    with fim_lora.calibration_batch(model, num_examples, rows=rows):
        run(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return scores_in_own_loop(model)


def test_inputs_that_are_stacked_before_the_model_is_called():
    scores = declared_scores(4, lambda model: halves_in_one_pass(model, pairs()).backward(), "stacked")
    assert_scores(scores, truth_of_pairs(stacked_net(), pairs()))


def test_a_backward_pass_after_the_block():
    model = own_loop_model()
    with fim_lora.calibration_batch(model, 4, rows="stacked"):
        loss = distance_of_pairs(model, pairs())
    loss.backward()
    assert_scores(scores_in_own_loop(model), truth_of_pairs(stacked_net(), pairs()))


def test_a_block_without_a_forward_pass():
    model = own_loop_model()
    loss = distance_of_pairs(model, pairs())
    with (
        pytest.raises(ValueError, match="No forward pass with gradients is inside"),
        fim_lora.calibration_batch(model, 4, rows="stacked"),
    ):
        loss.backward()


@pytest.mark.parametrize("sizes", [(3, 3), (4, 2), (1, 2, 3)])
def test_pieces_of_a_batch_of_any_size(sizes):
    x, y = batch_of_classes()

    def run(model):
        F.cross_entropy(torch.cat([model(piece) for piece in x.split(sizes)]), y).backward()

    assert_scores(declared_scores(6, run), truth_of_classes(x, y))


def adapted_flattening():
    fim = {"init_lora_weights": "fim", "fim_config": FimConfig()}
    return get_peft_model(Flattening().double(), LoraConfig(r=2, target_modules=["kept", "flattened"], **fim))


def test_pieces_of_a_batch_through_layers_that_flatten_it():
    batch = flattening_batch(size=4, length=6)

    def run(model):
        outputs = [model(piece) for piece in batch["x"].split(2)]
        (torch.cat(outputs) - batch["y"]).square().mean().backward()

    assert_scores(declared_scores(4, run, model=adapted_flattening()), truth_of_flattening(batch))


def test_stacked_inputs_through_layers_that_flatten_them():
    batch = flattening_batch()
    other = flattening_batch()["x"] * 0.5

    def loss(net, x, other, y):
        first, second = net(torch.cat([x, other])).chunk(2)
        return (first * second - y).square().mean()

    net = Flattening().double()
    weights = {name: net.get_submodule(name).weight for name in ("kept", "flattened")}
    truth = truth_of(lambda t: loss(net, batch["x"][[t]], other[[t]], batch["y"][[t]]), weights, 4)
    scores = declared_scores(
        4, lambda model: loss(model, batch["x"], other, batch["y"]).backward(), "stacked", adapted_flattening()
    )
    assert_scores(scores, truth)


@pytest.mark.parametrize(("num_examples", "rows"), [(3, "consecutive"), (8, "consecutive"), (2, "sequence-first")])
def test_a_number_of_examples_that_fits_to_nothing(num_examples, rows):
    model = own_loop_model()
    with (
        pytest.raises(ValueError, match=f"told of {num_examples} examples.*called with 4 rows"),
        fim_lora.calibration_batch(model, num_examples, rows=rows),
    ):
        model(pairs()["a"]).square().mean().backward()


@UNREACHED
def test_a_layer_that_is_called_without_the_model_warns():
    model = own_loop_model()
    model.get_base_model()[0](torch.randn(6, 5, dtype=torch.float64)).square().mean().backward()
    with pytest.warns(UserWarning, match="do not show how many examples they hold"):
        scores_in_own_loop(model)


@UNATTRIBUTED
@pytest.mark.parametrize("length", [4, 8])
def test_ids_of_sequences_first_in_a_loop_of_ones_own_warn(length):
    """As many positions as examples, and a multiple of them."""
    config = LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights="fim", fim_config=FimConfig())
    model = get_peft_model(OfSequencesFirst(nn.Embedding(20, 6), nn.Linear(6, 3)), config)
    model(torch.randint(0, 20, (length, 4)), torch.randn(4)).backward()
    with pytest.warns(UserWarning, match=r"several ways.*'0'"):
        scores_in_own_loop(model)


class OfSequencesFirst(nn.Sequential):
    def forward(self, ids, y):
        return (super().forward(ids).sum((0, 2)) - y).square().mean()


def test_positions_in_a_loop_of_ones_own_warn():
    config = LoraConfig(r=2, target_modules=["positions", "out"], init_lora_weights="fim", fim_config=FimConfig())
    model = get_peft_model(WithPositions(), config)
    model(torch.randn(4, 4, 6)).square().mean().backward()
    with pytest.warns(UserWarning, match=r"several ways.*'positions'"):
        scores_in_own_loop(model)
