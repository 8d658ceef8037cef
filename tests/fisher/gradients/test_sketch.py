"""Long examples through a random projection: no bias, the documented noise, and exact results for short examples."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model

from fim_lora import FimConfig, FimScores, LayerScore, get_fim_scores, initialize_lora_fim_ranks
from fim_lora.fisher.gradients.norms import squared_norms
from fim_lora.fisher.gradients.sketch import WIDTH, Sketch, max_exact_positions, random_signs, sketched_squared_norms
from fim_lora.fisher.norm_sums import NormSums
from helpers.calibration import calibrate_norms
from helpers.gradient_pairs import LiveBytes, random_pair
from helpers.tiny_models import llama, names_of, per_example_scores, token_batch

LONG = 150


def drawn_signs(sketch, shape):
    return random_signs(shape, sketch.generator(torch.device("cpu")), torch.float64)


@pytest.mark.parametrize("shape", [(3, 40, 12, 9), (2, 7, 5, 30), (1, 1, 4, 4)])
def test_it_is_the_mean_of_squared_products_with_the_signs(shape):
    examples, _, d_in, d_out = shape
    x, g = random_pair(*shape)
    gradients = g.mT @ x if d_in <= d_out else x.mT @ g
    signs = drawn_signs(Sketch("layer", 0), (examples, min(d_in, d_out), WIDTH))
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    truth = [
        sum((gradients[t] @ signs[t, :, j]).square().sum() for j in range(WIDTH)) / WIDTH for t in range(examples)
    ]
    torch.testing.assert_close(sketched_squared_norms(x, g, Sketch("layer", 0)), torch.stack(truth))


@pytest.mark.parametrize("singular_values", [[1.0], [1.0, 1.0, 1.0, 1.0], [3.0, 1.0, 0.1]])
def test_no_bias_and_the_stated_variance(singular_values):
    """Moments of 4,000 independent estimates against those of Hutchinson's recorder, computed from `Gᵀ G`."""
    torch.manual_seed(0)
    count, rank = 4000, len(singular_values)
    left, right = (torch.linalg.qr(torch.randn(size, rank, dtype=torch.float64))[0] for size in (9, 7))
    x = (right * torch.tensor(singular_values)).mT.expand(count, rank, 7)
    g = left.mT.expand(count, rank, 9)
    estimates = sketched_squared_norms(x, g, Sketch("layer", 0))

    products = (g[0].mT @ x[0]).mT @ (g[0].mT @ x[0])
    truth = products.trace()
    variance = 2 / WIDTH * (products.square().sum() - products.diagonal().square().sum())
    assert abs(estimates.mean() - truth) < 5 * (variance / count).sqrt()
    assert estimates.var().item() == pytest.approx(variance.item(), rel=0.15)
    assert estimates.std() < math.sqrt(2 / WIDTH) * truth


@pytest.mark.parametrize("bound", [1, 2_000, 20_000])
def test_groups_and_blocks_change_nothing(bound):
    x, g = random_pair(5, 37, 12, 9)
    whole = sketched_squared_norms(x, g, Sketch("layer", 0))
    torch.testing.assert_close(sketched_squared_norms(x, g, Sketch("layer", 0), bound), whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(8, 400, 30, 50), (2, 1500, 16, 16)])
def test_temporary_memory_is_bounded(dtype, shape):
    x, g = random_pair(*shape, dtype=dtype)
    with LiveBytes() as memory:
        norms = sketched_squared_norms(x, g, Sketch("layer", 0), 400_000)
    assert norms.nbytes < memory.peak <= 400_000 + 3 * norms.nbytes


def test_half_precision_is_computed_in_single_precision():
    x, g = random_pair(3, 400, 12, 9, torch.bfloat16)
    expected = sketched_squared_norms(x.float(), g.float(), Sketch("layer", 0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        norms = squared_norms(x, g, sketch=Sketch("layer", 0))
    assert norms.dtype == torch.float32
    torch.testing.assert_close(norms, expected)


@pytest.mark.parametrize(
    ("d_in", "d_out", "positions"), [(16, 16, 128), (1024, 1024, 128), (4096, 4096, 512), (4096, 14336, 796)]
)
def test_short_examples_are_exact(d_in, d_out, positions):
    assert max_exact_positions(d_in, d_out) == positions


def test_the_documented_length_decides():
    x, g = random_pair(2, 128, 6, 5)
    sketch = Sketch("layer", 0)
    assert torch.equal(squared_norms(x, g, sketch=sketch), squared_norms(x, g))
    assert not sketch.used
    x, g = random_pair(2, 129, 6, 5)
    assert not torch.equal(squared_norms(x, g, sketch=sketch), squared_norms(x, g))
    assert sketch.used


def test_signs_differ_between_examples_layers_batches_and_processes():
    shape = (2, 30, WIDTH)
    base = drawn_signs(Sketch("a", 0, 0), shape)
    assert torch.equal(base, drawn_signs(Sketch("a", 0, 0), shape))
    others = [drawn_signs(Sketch(*which), shape) for which in (("b", 0, 0), ("a", 1, 0), ("a", 0, 1))]
    for signs in (base[1], *(other[0] for other in others)):
        agreement = (base[0] == signs).double().mean()
        assert abs(agreement - 0.5) < 5 * 0.5 / math.sqrt(30 * WIDTH)


def scores_of(model, batches, names, **options):
    layers = {name: model.get_submodule(name) for name in names}
    return calibrate_norms(model, layers, batches, len(batches), show_progress_bar=False, **options)


def test_whole_models_against_autograd():
    """Equal with `exact`. Without it, every layer is within five standard deviations of the projection."""
    batches = [token_batch(8, LONG, seed=seed, shortest=LONG) for seed in range(4)]
    names = names_of(llama(), "q_proj", "down_proj")
    truth = per_example_scores(llama(), batches, names)
    exact = scores_of(llama(), batches, names, exact=True)
    random_state = torch.get_rng_state()
    scores = scores_of(llama(), batches, names)
    assert torch.equal(torch.get_rng_state(), random_state)
    for name, values in truth.items():
        assert exact[name].mean == pytest.approx(values.mean().item(), rel=1e-5)
        assert exact[name].exact
        assert not scores[name].exact
        noise = math.sqrt(2 / WIDTH * values.square().sum()) / len(values)
        assert 0 < abs(scores[name].mean - values.mean()) < 5 * noise
    assert scores == scores_of(llama(), batches, names)
    assert (
        scores.measured == f"32 examples in 4 batches, {len(names)} of {len(names)} layers through a random projection"
    )
    assert exact.measured == "32 examples in 4 batches"


def test_the_standard_error_has_the_noise_in_it():
    """Copies of one example differ only by the projection."""
    batch = token_batch(1, LONG, shortest=LONG)
    same = {name: tensor.expand(64, -1) for name, tensor in batch.items()}
    names = names_of(llama(), "v_proj")
    exact, scores = (scores_of(llama(), [same], names, exact=exact) for exact in (True, False))
    for name in names:
        assert exact[name].standard_error < 1e-6 * exact[name].mean
        most = math.sqrt(2 / WIDTH / 64) * exact[name].mean
        assert most / 20 < scores[name].standard_error < 1.5 * most
        assert abs(scores[name].mean - exact[name].mean) < 5 * scores[name].standard_error


@pytest.mark.parametrize("exact", [False, True])
def test_the_config_decides_in_both_ways_of_calibrating(exact):
    batches = [token_batch(2, LONG, seed=seed) for seed in range(2)]
    fim_config = FimConfig(fim_calibration_batches=2, exact=exact)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="fim", fim_config=fim_config)
    plain = get_fim_scores(llama(), batches, config, show_progress_bar=False)
    model = get_peft_model(llama(), config)
    adapted = get_fim_scores(model, batches, show_progress_bar=False)
    for batch in batches:
        model(**batch).loss.backward()
    own_loop = initialize_lora_fim_ranks(model).scores
    for scores in (plain, adapted, own_loop):
        assert [score.exact for score in scores.values()] == [exact] * 2


def test_one_process_that_projects_is_told_of():
    sums = [NormSums.for_layers(["a", "b"]), NormSums.for_layers(["a", "b"])]
    sums[1].sketched.add("b")
    assert sums[0].merge(sums[1:]).sketched == {"b"}


def test_files_say_it_and_files_without_it_are_exact(tmp_path):
    scores = FimScores({"a": LayerScore(1.0, 0.1, 4, (3, 5), exact=False)}, 1)
    scores.save(tmp_path / "scores.json")
    assert FimScores.load(tmp_path / "scores.json") == scores
    content = scores.to_dict()
    del content["layers"]["a"]["exact"]
    assert FimScores.from_dict(content)["a"].exact
    content["layers"]["a"]["exact"] = "no"
    with pytest.raises(TypeError):
        FimScores.from_dict(content)
