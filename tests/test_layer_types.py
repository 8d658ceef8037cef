"""The eFIM of every layer type against per-example gradients by autograd in float64, one example at a time."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from fim_lora import FimConfig, get_fim_scores, initialize_lora_fim_ranks
from fim_lora.calibration import calibrate
from fim_lora.calls import CallState
from fim_lora.estimator import FisherEstimator
from fim_lora.gradient_norms import embedding_squared_norms
from fim_lora.layer_types import target_layer
from fim_lora.peft_integration import resolve_targets

WIDTH, CHANNELS, IDS = 6, 4, 11


class Net(nn.Module):
    """A layer between two others, so that its input needs a gradient, or the first of all."""

    def __init__(self, layer, first=True, calls=1):
        super().__init__()
        torch.manual_seed(0)
        self.before = None if first else nn.Linear(WIDTH, WIDTH)
        self.layer = layer
        self.calls = calls

    def forward(self, x, target):
        x = x if self.before is None else torch.tanh(self.before(x))
        y = self.layer(x)
        for _ in range(self.calls - 1):  # shared weights, with another input
            y = y + self.layer(x.flip(-1))
        return {"loss": (torch.tanh(y) - target[:, None]).square().flatten(1).sum(1).mean()}


def batches_of(make_input, batch_size=3, count=2):
    generator = torch.Generator().manual_seed(1)
    return [
        {"x": make_input(batch_size, generator), "target": torch.rand(batch_size, generator=generator)}
        for _ in range(count)
    ]


def batches_for(layer):
    """Targets have the shape of what they are subtracted from, without its second dimension."""
    batches = batches_of(INPUTS[type(layer)])
    for batch in batches:
        y = layer(batch["x"])
        batch["target"] = torch.rand(y.shape[0], *y.shape[2:], generator=torch.Generator().manual_seed(2))
    return batches


def per_example_truth(model, batches, names, split):
    """`mean(G_t ∘ G_t)` over the entries of all `names` together, one example and one backward pass at a time.

    The loss is the mean over examples, so the loss of one example by itself is ℓ_t.
    """
    model = copy.deepcopy(model).double().eval()
    weights = [model.get_parameter(name).requires_grad_() for name in names]
    entries = sum(weight.numel() for weight in weights)
    values = []
    for batch in batches:
        for example in split(batch):
            loss = model(**example)["loss"]
            gradients = torch.autograd.grad(loss, weights)
            values.append(sum(gradient.square().sum() for gradient in gradients) / entries)
    return torch.stack(values)


def by_row(batch):
    batch = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    return [{key: value[row : row + 1] for key, value in batch.items()} for row in range(len(batch["x"]))]


def assert_score(score, values, rtol=1e-5):
    assert score.num_examples == len(values)
    assert score.mean == pytest.approx(values.mean().item(), rel=rtol)
    assert score.standard_error == pytest.approx((values.std() / len(values) ** 0.5).item(), rel=100 * rtol)


def scores_of(model, batches, name="layer", **options):
    layers = {name: model.get_submodule(name)}
    return calibrate(model, layers, batches, len(batches), show_progress_bar=False, **options)


def floats(*shape):
    return lambda batch_size, generator: torch.randn(batch_size, *shape, generator=generator)


def ids(batch_size, generator):
    return torch.randint(0, IDS, (batch_size, 9), generator=generator)


INPUTS = {
    nn.Linear: floats(5, WIDTH),
    Conv1D: floats(5, WIDTH),
    nn.Embedding: ids,
    Gemma3TextScaledWordEmbedding: ids,
    nn.Conv1d: floats(CHANNELS, 13),
    nn.Conv2d: floats(CHANNELS, 9, 7),
    nn.Conv3d: floats(CHANNELS, 5, 6, 7),
}

LAYERS = {
    "linear": lambda: nn.Linear(WIDTH, 3),
    "conv1d of transformers": lambda: Conv1D(3, WIDTH),
    "embedding": lambda: nn.Embedding(IDS, WIDTH),
    "embedding with padding": lambda: nn.Embedding(IDS, WIDTH, padding_idx=3),
    "embedding with a scale": lambda: Gemma3TextScaledWordEmbedding(IDS, WIDTH, 0, embed_scale=2.5),
    "convolution 1d": lambda: nn.Conv1d(CHANNELS, 6, 3),
    "convolution 1d, all at once": lambda: nn.Conv1d(CHANNELS, 6, 3, stride=2, padding=3, dilation=2, groups=2),
    "convolution 2d, 1 x 1": lambda: nn.Conv2d(CHANNELS, 6, 1),
    "convolution 2d, stride, padding": lambda: nn.Conv2d(CHANNELS, 6, (3, 2), stride=(2, 3), padding=(1, 0)),
    "convolution 2d, dilation, groups": lambda: nn.Conv2d(CHANNELS, 6, 3, padding=2, dilation=2, groups=2),
    "convolution 2d, depthwise": lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, groups=CHANNELS, bias=False),
    "convolution 2d, same": lambda: nn.Conv2d(CHANNELS, 6, (2, 3), padding="same"),
    "convolution 2d, valid": lambda: nn.Conv2d(CHANNELS, 6, (2, 3), padding="valid"),
    "convolution 2d, circular": lambda: nn.Conv2d(CHANNELS, 6, 3, padding=1, padding_mode="circular"),
    "convolution 2d, reflect, same": lambda: nn.Conv2d(CHANNELS, 6, 2, padding="same", padding_mode="reflect"),
    "convolution 3d": lambda: nn.Conv3d(CHANNELS, 6, (2, 3, 1), stride=(1, 2, 1), padding=1, groups=2),
}


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_scores_equal_autograd(layer, calls):
    torch.manual_seed(0)
    model = Net(layer(), calls=calls)
    batches = batches_for(model.layer)
    score = scores_of(model, batches)["layer"]
    assert_score(score, per_example_truth(model, batches, ["layer.weight"], by_row))
    weight = target_layer("layer", model.layer).weight
    assert weight.entries == model.layer.weight.numel()


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_dimensions_are_those_of_the_adapter_that_peft_makes(layer):
    """What one rank costs, and which ranks there are, by PEFT's own layer."""
    torch.manual_seed(0)
    base = Net(layer())
    weight = target_layer("layer", base.layer).weight
    rank = 2 * weight.rank_step
    model = get_peft_model(base, LoraConfig(r=rank, target_modules=["layer"]))
    adapter = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    cost = weight.parameters_per_rank or weight.d_in + weight.d_out
    assert sum(parameter.numel() for parameter in adapter) == rank * cost
    assert min(weight.d_out, weight.d_in) >= 1
    if weight.rank_step > 1:
        with pytest.raises(ValueError, match="divisible by groups"):
            get_peft_model(Net(layer()), LoraConfig(r=rank + 1, target_modules=["layer"]))


class Special(nn.Linear):
    pass


def test_subclasses_are_found_and_others_named():
    linear, special = target_layer("a", nn.Linear(2, 3)), target_layer("a", Special(2, 3))
    assert special.layer_type == linear.layer_type
    with pytest.raises(TypeError, match=r"'a\.b' is a .*LayerNorm.*exclude_modules"):
        target_layer("a.b", nn.LayerNorm(2))


@pytest.mark.parametrize("bound", [1, 400, 2**26])
def test_embeddings_in_blocks_of_features(bound):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 5, (3, 8), generator=generator)
    g = torch.randn(3, 8, 7, generator=generator)
    truth = [
        sum(g[row, ids[row] == token].double().sum(0).square().sum() for token in (0, 1, 3, 4)) for row in range(3)
    ]
    norms = embedding_squared_norms(ids, g, padding_idx=2, max_temporary_bytes=bound)
    torch.testing.assert_close(norms.double(), torch.stack(truth), rtol=1e-5, atol=0)


def test_embeddings_of_no_positions():
    assert embedding_squared_norms(torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, 0, 3)).tolist() == [0, 0]


def test_positions_that_all_examples_share_are_said_to_be_approximate():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Embedding(5, WIDTH)

        def forward(self, x, target):
            y = x + self.layer(torch.arange(5)[None])
            return {"loss": (torch.tanh(y) - target[:, None, None]).square().flatten(1).sum(1).mean()}

    batches = batches_of(floats(5, WIDTH))
    with pytest.warns(UserWarning, match="could not be attributed"):
        score = scores_of(Positions(), batches)["layer"]
    assert score.num_examples == len(batches)
    single = [{key: value[row : row + 1] for key, value in batch.items()} for batch in batches for row in range(3)]
    score = scores_of(Positions(), single)["layer"]
    assert_score(score, per_example_truth(Positions(), single, ["layer.weight"], by_row))


class Frames(Net):
    """Several images of an example as rows of the batch, as vision models do with video and tiles."""

    def forward(self, x, target):
        y = self.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return {"loss": (torch.tanh(y) - target[:, None, None, None, None]).square().flatten(1).sum(1).mean()}


def test_images_of_one_example_belong_together():
    # As many channels as examples: the second dimension of an image is no batch.
    torch.manual_seed(0)
    model = Frames(nn.Conv2d(CHANNELS, 6, 3))
    batches = batches_of(floats(2, CHANNELS, 5, 5), batch_size=CHANNELS)

    def forward_fn(model, batch):
        return model(**batch)

    score = scores_of(model, batches, forward_fn=forward_fn)["layer"]
    assert_score(score, per_example_truth(model, batches, ["layer.weight"], by_row))


def test_one_image_without_a_batch():
    torch.manual_seed(0)
    layer = nn.Conv2d(CHANNELS, 6, 3)
    x = torch.randn(CHANNELS, 5, 5)
    layers = {"layer": layer}
    scores = calibrate(layer, layers, [x], 1, lambda model, x: model(x).square().sum(), show_progress_bar=False)
    weight = layer.weight.detach().double().requires_grad_()
    loss = F.conv2d(x.double(), weight, layer.bias.detach().double()).square().sum()
    (truth,) = torch.autograd.grad(loss, weight)
    # The batch size that the loop reads off the input is wrong here, and so is its reading of the loss as a mean.
    assert scores["layer"].mean == pytest.approx(truth.square().mean().item() * CHANNELS, rel=1e-5)


# --- nn.MultiheadAttention ---


class Attention(nn.Module):
    """Self-attention or attention to a memory, with whatever options PyTorch has."""

    def __init__(self, first=True, memory=False, dropout=0.0, **options):
        super().__init__()
        torch.manual_seed(0)
        self.first = None if first else nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, dropout=dropout, **options)
        with torch.no_grad():  # PyTorch starts with zeros
            for parameter in self.attention.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
        self.memory = memory

    def forward(self, x, target, padding=None):
        h = x if self.first is None else torch.tanh(self.first(x))
        memory = torch.tanh(h.flip(1)[:, :3] * 1.5) if self.memory else h
        if not self.attention.batch_first:
            h, memory = h.transpose(0, 1), memory.transpose(0, 1)
        mask = None if self.memory else torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        y, _ = self.attention(
            h, memory, value=memory, key_padding_mask=padding, attn_mask=mask, need_weights=self.memory
        )
        y = y if self.attention.batch_first else y.transpose(0, 1)
        return {"loss": (torch.tanh(y) - target[:, None, None]).square().flatten(1).sum(1).mean()}


WEIGHTS = ["attention.in_proj_weight", "attention.out_proj.weight"]
OPTIONS = [
    {},
    {"batch_first": True},
    {"batch_first": True, "first": False},
    {"memory": True, "bias": False},
    {"memory": True, "add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
]


def attention_batches(memory=False, batch_size=3):
    batches = batches_of(floats(5, 8), batch_size)
    if not memory:
        for batch in batches:
            batch["padding"] = torch.zeros(batch_size, 5, dtype=torch.bool)
            batch["padding"][-1, 3:] = True
    return batches


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_attention_equals_autograd(options):
    batches = attention_batches(options.get("memory", False))
    score = scores_of(Attention(**options), batches, "attention")["attention"]
    assert_score(score, per_example_truth(Attention(**options), batches, WEIGHTS, by_row))


@pytest.mark.parametrize("own_loop", [False, True])
def test_attention_as_peft_adapts_it(own_loop):
    """One rank for both weights, from their eFIM together; one rank costs what PEFT makes of it."""
    batches = attention_batches()
    config = LoraConfig(
        r=4,
        target_modules=["attention", "first"],
        init_lora_weights="fim",
        fim_config=FimConfig(2, budget="parameters", score_exponent=0.5),
    )
    model = get_peft_model(Attention(first=False), config).eval()
    uniform = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if own_loop:
        for batch in batches:
            model(**batch)["loss"].backward()
        allocation = initialize_lora_fim_ranks(model)
    else:
        allocation = initialize_lora_fim_ranks(model, batches, show_progress_bar=False)
    assert set(allocation.ranks) == {"attention", "first"}
    assert allocation.ranks["attention"] != allocation.ranks["first"]
    truth = Attention(first=False)
    assert_score(allocation.scores["attention"], per_example_truth(truth, batches, WEIGHTS, by_row))
    assert_score(allocation.scores["first"], per_example_truth(truth, batches, ["first.weight"], by_row))
    assert allocation.budget == uniform
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained == allocation.num_parameters == allocation.budget_used
    attention = model.base_model.model.attention
    assert attention.r == attention.base_layer.out_proj.r == {"default": allocation.ranks["attention"]}
    with torch.no_grad():
        torch.testing.assert_close(model(**batches[0])["loss"], truth.eval()(**batches[0])["loss"])


def test_attention_of_a_plain_model_is_left_as_it_was():
    base = Attention()
    before = dict(base.named_parameters())
    scores = get_fim_scores(base, attention_batches(), LoraConfig(target_modules=["attention"]))
    assert_score(scores["attention"], per_example_truth(base, attention_batches(), WEIGHTS, by_row))
    assert {name: id(parameter) for name, parameter in base.named_parameters()} == {
        name: id(parameter) for name, parameter in before.items()
    }
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())


def test_attention_in_a_transformer_of_pytorch_with_dropout():
    """In training mode, where the gradient is that of the units that were dropped."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.4, batch_first=True)
    x = torch.randn(1, 6, 8)

    def loss_of(layer):
        torch.manual_seed(3)
        return layer(x.to(next(layer.parameters()).dtype)).pow(3).sum()

    estimator = FisherEstimator({"attention": layer.self_attn, "linear1": layer.linear1})
    estimator.attach(layer)
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    loss_of(layer).backward()
    after = torch.get_rng_state()
    scores = estimator.scores()
    loss_of(layer)
    assert torch.equal(torch.get_rng_state(), after)

    # Dropout draws other units in float64, so a float32 gradient is the truth here.
    single = copy.deepcopy(layer).requires_grad_()
    loss_of(single).backward()
    weights = [single.self_attn.in_proj_weight.grad, single.self_attn.out_proj.weight.grad]
    truth = sum(weight.square().sum() for weight in weights) / sum(weight.numel() for weight in weights)
    assert scores["attention"].mean == pytest.approx(truth.item(), rel=1e-5)


def under_autocast(dtype):
    def forward_fn(model, batch):
        with torch.autocast("cpu", dtype):
            return model(**batch)

    return forward_fn


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_attention_under_autocast(options, dtype):
    """The backward pass is outside of it, and runs the attention again as it was."""
    batches = attention_batches(options.get("memory", False))
    config = LoraConfig(target_modules=["attention"])
    model = Attention(**options)
    scores = get_fim_scores(model, batches, config, forward_fn=under_autocast(dtype), show_progress_bar=False)
    truth = per_example_truth(Attention(**options), batches, WEIGHTS, by_row).mean().item()
    # The forward pass rounds to 8 bits (bfloat16) or 11 bits (float16).
    assert scores["attention"].mean == pytest.approx(truth, rel=0.1 if dtype == torch.bfloat16 else 0.01)
    exact = get_fim_scores(model, batches, config, show_progress_bar=False)
    assert scores["attention"].mean != exact["attention"].mean


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("after", [False, True])
def test_a_call_is_replayed_under_its_own_autocast(before, after):
    with torch.autocast("cpu", torch.float16, enabled=before):
        state = CallState.of(torch.ones(1))
    with torch.autocast("cpu", torch.bfloat16, enabled=after):
        with state.restored():
            product = torch.ones(2, 2) @ torch.ones(2, 2)
        assert torch.is_autocast_enabled("cpu") == after
    assert product.dtype == (torch.float16 if before else torch.float32)


def test_a_loss_on_attention_weights_is_refused():
    class OnWeights(Attention):
        def forward(self, x, target):
            y, weights = self.attention(x, x, x)
            return {"loss": y.square().mean() + weights.square().mean()}

    with pytest.raises(RuntimeError, match="second output of layer 'attention'"):
        scores_of(OnWeights(batch_first=True), batches_of(floats(5, 8)), "attention")


# --- Parameters, such as the experts of a mixture ---


class Mixture(nn.Module):
    """Experts behind a router, in the form that transformers has them."""

    def __init__(self, experts=3):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.router = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, experts)
        self.experts = Experts(experts)

    def forward(self, x, target):
        h = torch.tanh(self.first(x)).flatten(0, 1)
        weights, index = self.router(h).softmax(-1).topk(2)
        y = self.experts(h, index, weights).unflatten(0, x.shape[:2])
        return {"loss": (torch.tanh(y) - target[:, None, None]).square().flatten(1).sum(1).mean()}


class Experts(nn.Module):
    def __init__(self, experts):
        super().__init__()
        self.up = nn.Parameter(torch.randn(experts, 5, WIDTH))
        self.down = nn.Parameter(torch.randn(experts, WIDTH, 5))

    def forward(self, hidden, index, weights):
        y = torch.zeros_like(hidden)
        for expert in range(len(self.up)):
            token, position = torch.where(index == expert)
            h = F.linear(torch.relu(F.linear(hidden[token], self.up[expert])), self.down[expert])
            y = y.index_add(0, token, h * weights[token, position, None])
        return y


TARGETS = ["experts.up", "experts.down"]


def mixture_model(base=None, **options):
    torch.manual_seed(1)
    config = LoraConfig(
        r=2,
        target_modules=[],
        target_parameters=TARGETS,
        init_lora_weights="fim",
        fim_config=FimConfig(2, **options),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(base or Mixture(), config)


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


def test_experts_of_a_plain_model():
    batches, base = batches_of(floats(7, WIDTH)), Mixture()
    config = LoraConfig(target_modules=["first"], target_parameters=TARGETS)
    scores = get_fim_scores(base, batches, config, show_progress_bar=False)
    assert set(scores) == {*TARGETS, "first"}
    for name in TARGETS:
        assert_score(scores[name], per_example_truth(Mixture(), batches, [name], by_row))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in base.parameters())


def test_a_parameter_that_is_a_matrix():
    """PEFT takes `target_parameters` for the weight of an ordinary layer, too."""
    torch.manual_seed(0)
    model = Net(nn.Linear(WIDTH, 3))
    batches = batches_for(model.layer)
    config = LoraConfig(target_modules=[], target_parameters=["layer.weight"])
    scores = get_fim_scores(model, batches, config, show_progress_bar=False)
    assert_score(scores["layer.weight"], per_example_truth(model, batches, ["layer.weight"], by_row))
    assert scores["layer.weight"].shape == (3, WIDTH)


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
    """Repeats every token for every expert, experts first, as Llama 4 does: rows of one example lie apart."""

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


def by_type(batch):
    return {key: value.double() for key, value in batch.items()}


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
    estimator = FisherEstimator({"down": wrapped[0]})
    estimator.attach()
    layer(x, index, weights).backward(g)

    values = []
    for row in range(6):
        weight = layer.down.detach().double().requires_grad_()
        parameters = {"up": layer.up.detach().double(), "down": weight}
        one = (x[row : row + 1].double(), index[row : row + 1], weights[row : row + 1].double())
        y = functional_call(Experts(3).double(), parameters, one)
        (gradient,) = torch.autograd.grad(y, weight, g[row : row + 1].double() * 6)
        values.append(gradient.square().mean())
    assert estimator.scores()["down"].mean == pytest.approx(torch.stack(values).mean().item(), rel=0.01)


# --- Parameters of modules with several outputs, such as the router of a mixture ---


class Router(nn.Module):
    """Logits, the scores that are made of them, and which experts they are for, as in transformers."""

    def __init__(self, experts, kind=tuple):
        super().__init__()
        self.weight, self.kind = nn.Parameter(torch.randn(experts, WIDTH)), kind

    def forward(self, hidden):
        logits = F.linear(hidden, self.weight)
        scores, index = logits.softmax(-1).topk(2)
        outputs = {"logits": logits, "scores": scores / scores.sum(-1, keepdim=True), "index": index}
        return outputs if self.kind is dict else self.kind(outputs.values())


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


@pytest.mark.parametrize("upstream", [False, True])
@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("uses", [("scores",), ("logits",), ("scores", "logits"), ("in place",)], ids="-".join)
def test_all_outputs_with_a_gradient_count(uses, calls, upstream):
    """Logits that get a gradient of their own and through the scores, with a graph that begins before or behind."""
    batches = batches_of(floats(7, WIDTH))
    names = ["router.weight", *(TARGETS if "scores" in uses else [])]
    config = LoraConfig(target_modules=["first"] if upstream else [], target_parameters=names)
    model = RoutedMixture(uses, calls)
    scores = get_fim_scores(model, batches, config, show_progress_bar=False)
    assert_routed(scores, batches, names, uses=uses, calls=calls)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("kind", [tuple, list, dict])
def test_outputs_in_any_container(kind):
    batches = batches_of(floats(7, WIDTH))
    config = LoraConfig(target_modules=["first"], target_parameters=["router.weight"])
    model = RoutedMixture(("scores", "logits"), kind=kind)
    scores = get_fim_scores(model, batches, config, show_progress_bar=False)
    assert_routed(scores, batches, ["router.weight"], uses=("scores", "logits"))


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
    """All first sequences, then all second ones, as trainers of pairs have them."""
    uses = ("scores", "logits")
    batches = batches_of(floats(7, WIDTH), batch_size=6)
    config = LoraConfig(target_modules=["first"], target_parameters=ROUTED)
    model = RoutedMixture(uses)
    targets = resolve_targets(model, config)
    scores = calibrate(model, targets, batches, 2, show_progress_bar=False, sequences_per_example=2)

    def by_pair(batch):
        batch = by_type(batch)
        return [{key: value[row::3] for key, value in batch.items()} for row in range(3)]

    for name in ROUTED:
        assert_score(scores[name], per_example_truth(RoutedMixture(uses), batches, [name], by_pair), rtol=1e-4)


class WithMean(Router):
    """Its last output belongs to no example."""

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
