"""The components of an adapter against the dense Fisher-weighted singular value decomposition in float64."""

import numpy as np
import pytest
import torch

from fim_lora.fisher.basis import (
    Basis,
    basis_of,
    damped,
    gate_gradients,
    reordered,
    root_of_metric,
    root_of_triangle,
)

D_OUT, D_IN, RANK, POSITIONS = 9, 7, 4, 40


class Adapter:
    """A random adapter `B A` with inputs x (n × d_in) and output gradients g (n × d_out), in float64."""

    def __init__(self, seed=0, rank=RANK, scale=1.0):
        random = np.random.default_rng(seed)
        self.a = random.normal(size=(rank, D_IN)) * scale
        self.b = random.normal(size=(D_OUT, rank)) / scale
        # Strongly correlated, so that the metric matters.
        self.x = random.normal(size=(POSITIONS, D_IN)) @ random.normal(size=(D_IN, D_IN))
        self.g = random.normal(size=(POSITIONS, D_OUT)) @ random.normal(size=(D_OUT, D_OUT)) ** 3

    @property
    def delta(self):
        return self.b @ self.a

    @property
    def core_metrics(self):
        """`Σ u uᵀ` and `Σ h hᵀ`, with one part."""
        u, h = self.g @ self.b, self.x @ self.a.T
        return (u.T @ u)[None], (h.T @ h)[None]

    @property
    def dense_metrics(self):
        return self.g.T @ self.g, self.x.T @ self.x

    def component(self, basis, number):
        return self.b @ basis.left[0][:, [number]] @ basis.right[0][[number]] @ self.a

    def first(self, basis, count):
        return sum((self.component(basis, number) for number in range(count)), np.zeros((D_OUT, D_IN)))


def square_root(metric):
    values, vectors = np.linalg.eigh(metric)
    return vectors * np.sqrt(values.clip(0)) @ vectors.T


def dense_truncation(delta, metric_u, metric_h, count):
    """The best approximation of rank `count` in a metric: truncated SVD of `Σ_u^½ ΔW Σ_h^½`, mapped back."""
    root_u, root_h = square_root(metric_u), square_root(metric_h)
    u, values, vt = np.linalg.svd(root_u @ delta @ root_h)
    kept = u[:, :count] * values[:count] @ vt[:count]
    return np.linalg.inv(root_u) @ kept @ np.linalg.inv(root_h), values


@pytest.mark.parametrize("seed", range(3))
def test_the_first_components_are_the_dense_truncated_decomposition(seed):
    adapter = Adapter(seed)
    metric_u, metric_h = adapter.core_metrics
    basis = basis_of(root_of_metric(metric_u), root_of_metric(metric_h))
    for count in range(RANK + 1):
        dense, values = dense_truncation(adapter.delta, *adapter.dense_metrics, count)
        np.testing.assert_allclose(adapter.first(basis, count), dense, rtol=1e-7, atol=1e-9 * abs(adapter.delta).max())
    np.testing.assert_allclose(basis.singular_values[0], values[:RANK], rtol=1e-9)


def test_no_other_choice_of_rank_k_is_closer_in_the_metric():
    """Eckart and Young, by gradient descent from many starts."""
    adapter = Adapter()
    basis = basis_of(*(root_of_metric(metric) for metric in adapter.core_metrics))
    roots = [torch.from_numpy(square_root(metric)) for metric in adapter.dense_metrics]
    delta = torch.from_numpy(adapter.delta)

    def distance(other):
        return (roots[0] @ (delta - other) @ roots[1]).square().sum()

    best = distance(torch.from_numpy(adapter.first(basis, 2)))
    assert best.item() == pytest.approx(np.square(basis.singular_values[0, 2:]).sum())
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        b = torch.randn(D_OUT, 2, generator=generator, dtype=torch.float64).requires_grad_()
        a = torch.randn(2, D_IN, generator=generator, dtype=torch.float64).requires_grad_()
        optimizer = torch.optim.LBFGS([a, b], max_iter=300, line_search_fn="strong_wolfe")

        def closure(a=a, b=b, optimizer=optimizer):
            optimizer.zero_grad()
            loss = distance(b @ a)
            loss.backward()
            return loss

        optimizer.step(closure)
        assert distance((b @ a).detach()) >= best * (1 - 1e-9)


@pytest.mark.parametrize("scale", [1.0, 1e4, 1e-4])
def test_the_plain_metric_gives_the_singular_value_decomposition(scale):
    adapter = Adapter(scale=scale)
    triangles = [np.linalg.qr(tall, mode="r")[None] for tall in (adapter.b, adapter.a.T)]
    plain = basis_of(*(root_of_triangle(triangle) for triangle in triangles))
    by_metric = basis_of(
        root_of_metric((adapter.b.T @ adapter.b)[None]), root_of_metric((adapter.a @ adapter.a.T)[None])
    )
    u, values, vt = np.linalg.svd(adapter.delta)
    for basis in (plain, by_metric):
        np.testing.assert_allclose(basis.singular_values[0], values[:RANK], rtol=1e-9)
        for count in range(RANK + 1):
            truncated = u[:, :count] * values[:count] @ vt[:count]
            np.testing.assert_allclose(adapter.first(basis, count), truncated, rtol=1e-7, atol=1e-9)


def test_the_triangles_keep_singular_values_that_the_metric_would_lose():
    adapter = Adapter()
    u, _, vt = np.linalg.svd(adapter.delta, full_matrices=False)
    values = np.array([1.0, 1e-3, 1e-7, 1e-11])
    adapter.b, adapter.a = u[:, :RANK] * np.sqrt(values), np.sqrt(values)[:, None] * vt[:RANK]
    triangles = [np.linalg.qr(tall, mode="r")[None] for tall in (adapter.b, adapter.a.T)]
    basis = basis_of(*(root_of_triangle(triangle) for triangle in triangles))
    np.testing.assert_allclose(basis.singular_values[0], values, rtol=1e-4)
    for count in range(RANK + 1):
        truncated = u[:, :count] * values[:count] @ vt[:count]
        np.testing.assert_allclose(adapter.first(basis, count), truncated, atol=1e-14)


@pytest.mark.parametrize("metrics", ["Fisher", "plain", "damped", "random"])
def test_components_sum_to_the_identity(metrics):
    adapter = Adapter(1)
    fisher = adapter.core_metrics
    plain = ((adapter.b.T @ adapter.b)[None], (adapter.a @ adapter.a.T)[None])
    random = np.random.default_rng(0).normal(size=(2, 1, RANK, RANK))
    chosen = {
        "Fisher": fisher,
        "plain": plain,
        "damped": tuple(damped(*pair, 1.0) for pair in zip(fisher, plain, strict=True)),
        "random": tuple(one @ np.swapaxes(one, -1, -2) for one in random),
    }[metrics]
    basis = basis_of(*map(root_of_metric, chosen))
    np.testing.assert_allclose(basis.left @ basis.right, np.eye(RANK)[None], atol=1e-9)
    norms = [np.linalg.norm(one) for one in (basis.left[0][:, 0], basis.right[0][0])]
    assert all(norms)


def test_parts_are_independent():
    adapters = [Adapter(seed) for seed in range(3)]
    metrics = [np.concatenate(of_parts) for of_parts in zip(*(one.core_metrics for one in adapters), strict=True)]
    together = basis_of(*map(root_of_metric, metrics))
    for part, adapter in enumerate(adapters):
        alone = basis_of(*map(root_of_metric, adapter.core_metrics))
        for number in range(RANK):
            one = Basis(*(field[part : part + 1] for field in together))
            np.testing.assert_allclose(adapter.component(one, number), adapter.component(alone, number), atol=1e-9)


# --- Singular metrics ---


@pytest.mark.parametrize("missing", [1, 2])
def test_where_a_metric_is_singular_the_components_keep_what_it_sees(missing):
    """Inputs that never reach some directions of A: the function on all other inputs stays."""
    adapter = Adapter(2)
    null = np.linalg.qr(np.random.default_rng(1).normal(size=(RANK, missing)))[0]
    unseen = np.linalg.pinv(adapter.a) @ null  # inputs with A x in the null space
    q = np.linalg.qr(unseen)[0]
    adapter.x = adapter.x - adapter.x @ q @ q.T
    h = adapter.x @ adapter.a.T
    metric_h = (h.T @ h)[None]
    rank = np.linalg.matrix_rank(metric_h[0], rtol=1e-9)
    basis = basis_of(root_of_metric(adapter.core_metrics[0]), root_of_metric(metric_h))
    assert (basis.singular_values[0] > 1e-6 * basis.singular_values[0, 0]).sum() == rank
    core = basis.left[0] @ basis.right[0]
    np.testing.assert_allclose(core @ h.T, h.T, atol=1e-7 * abs(h).max())
    assert np.isfinite(basis.left).all()
    assert np.isfinite(basis.right).all()


def test_more_ranks_than_outputs():
    """B of a classifier with two outputs has rank 2 at most: all other components are exactly worth nothing."""
    random = np.random.default_rng(0)
    b, a = random.normal(size=(2, RANK)), random.normal(size=(RANK, D_IN))
    triangle_b = np.zeros((1, RANK, RANK))
    triangle_b[0, :2] = np.linalg.qr(b, mode="r")
    triangle_a = np.linalg.qr(a.T, mode="r")[None]
    for root in (root_of_triangle(triangle_b), root_of_metric((b.T @ b)[None])):
        basis = basis_of(root, root_of_triangle(triangle_a))
        np.testing.assert_allclose(b @ basis.left[0][:, :2] @ basis.right[0][:2] @ a, b @ a, atol=1e-9)
        for number in range(2, RANK):
            component = b @ basis.left[0][:, [number]] @ basis.right[0][[number]] @ a
            np.testing.assert_allclose(component, 0, atol=1e-9)


def test_where_there_is_no_metric_at_all_the_components_are_still_independent():
    """B of an expert that no token reached is zero. A must not become zero, or it could never be trained."""
    adapter = Adapter()
    zero, metric_h = np.zeros((1, RANK, RANK)), adapter.core_metrics[1]
    for root in (root_of_metric(zero), root_of_triangle(zero)):
        basis = basis_of(root, root_of_metric(metric_h))
        np.testing.assert_allclose(basis.left @ basis.right, np.eye(RANK)[None], atol=1e-9)
    both = np.concatenate([zero, adapter.core_metrics[0]])
    basis = basis_of(root_of_metric(both), root_of_metric(np.concatenate([metric_h, metric_h])))
    alone = basis_of(root_of_metric(both[1:]), root_of_metric(metric_h))
    np.testing.assert_array_equal(basis.left[1:], alone.left)


def test_rounding_errors_of_a_singular_metric_are_cut():
    random = np.random.default_rng(0)
    tall = random.normal(size=(RANK, 2)).astype(np.float32)
    metric = (tall @ tall.T).astype(np.float64)[None]
    root = root_of_metric(metric)
    np.testing.assert_allclose(root.matrix @ np.swapaxes(root.matrix, -1, -2), metric, atol=1e-6)
    projection = root.matrix @ root.inverse
    np.testing.assert_allclose(projection @ projection, projection, atol=1e-6)


# --- Damping ---


def test_damping_is_relative_to_the_size_of_the_metric():
    adapter = Adapter()
    metric, plain = adapter.core_metrics[0], (adapter.b.T @ adapter.b)[None]
    found = damped(metric, plain, 0.5)
    expected = metric + 0.5 * np.trace(metric[0]) / np.trace(plain[0]) * plain
    np.testing.assert_allclose(found, expected)
    np.testing.assert_allclose(damped(1e-12 * metric, plain, 0.5), 1e-12 * found)
    np.testing.assert_allclose(damped(metric, 1e6 * plain, 0.5), found)
    np.testing.assert_array_equal(damped(metric, plain, 0.0), metric)


def test_strong_damping_is_the_plain_decomposition():
    adapter = Adapter()
    plain = ((adapter.b.T @ adapter.b)[None], (adapter.a @ adapter.a.T)[None])
    metrics = (damped(*pair, 1e9) for pair in zip(adapter.core_metrics, plain, strict=True))
    basis = basis_of(*map(root_of_metric, metrics))
    expected = basis_of(*map(root_of_metric, plain))
    for number in range(RANK):
        np.testing.assert_allclose(adapter.component(basis, number), adapter.component(expected, number), atol=1e-6)


def test_a_part_that_no_loss_depends_on_gets_the_plain_metric():
    adapter = Adapter()
    plain = np.concatenate([(adapter.b.T @ adapter.b)[None]] * 2)
    metric = np.concatenate([adapter.core_metrics[0], np.zeros((1, RANK, RANK))])
    found = damped(metric, plain, 1.0)
    np.testing.assert_array_equal(found[1], plain[1])
    np.testing.assert_array_equal(found[:1], damped(adapter.core_metrics[0], plain[:1], 1.0))


# --- Gates ---


def test_gradients_of_gates_are_those_of_autograd():
    """Explicit gates of value 1 on every component, and a loss that is not linear in them."""
    adapters = [Adapter(seed) for seed in range(2)]
    metrics = [np.concatenate(of_parts) for of_parts in zip(*(one.core_metrics for one in adapters), strict=True)]
    basis = basis_of(*map(root_of_metric, metrics))
    left, right = torch.from_numpy(basis.left), torch.from_numpy(basis.right)
    gates = torch.ones(len(adapters), RANK, dtype=torch.float64, requires_grad=True)
    cores = torch.eye(RANK, dtype=torch.float64).repeat(len(adapters), 1, 1).requires_grad_()
    examples = range(3)

    def loss(core, example):
        rows = slice(5 * example, 5 * example + 5)
        outputs = [
            torch.from_numpy(one.x[rows] @ one.a.T) @ of_part.T @ torch.from_numpy(one.b.T)
            for one, of_part in zip(adapters, core, strict=True)
        ]
        return torch.tanh(sum(outputs) / 10).square().sum()

    core_gradients = [torch.autograd.grad(loss(cores, example), cores)[0] for example in examples]
    gated = torch.einsum("pik,pk,pkj->pij", left, gates, right)
    expected = [torch.autograd.grad(loss(gated, example), gates, retain_graph=True)[0] for example in examples]
    found = gate_gradients(basis, torch.stack(core_gradients).numpy())
    np.testing.assert_allclose(found, torch.stack(expected).numpy(), rtol=1e-8, atol=1e-12)


def test_a_new_order_moves_whole_components():
    adapter = Adapter()
    basis = basis_of(*map(root_of_metric, adapter.core_metrics))
    order = np.array([[2, 0, 3, 1]])
    moved = reordered(basis, order)
    for place, number in enumerate(order[0]):
        np.testing.assert_array_equal(adapter.component(moved, place), adapter.component(basis, number))
        assert moved.singular_values[0, place] == basis.singular_values[0, number]
