"""The saliency of Optimal Brain Damage against the increase of a quadratic loss, and its errors."""

import pytest
import torch

from fim_lora import obd_saliency


def test_the_saliency_is_the_increase_of_a_quadratic_loss_with_a_diagonal_hessian():
    torch.manual_seed(0)
    weight, hessian = torch.randn(3, 4, dtype=torch.float64), torch.rand(3, 4, dtype=torch.float64)
    found = obd_saliency(weight, hessian)

    def loss(value):
        return (hessian * (value - weight).square()).sum() / 2  # its minimum is the weight

    for place in range(weight.numel()):
        pruned = weight.clone()
        pruned.view(-1)[place] = 0
        assert found.view(-1)[place].item() == pytest.approx((loss(pruned) - loss(weight)).item(), rel=1e-12)


@pytest.mark.parametrize(
    ("weight", "diagonal", "expected"),
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.float32, torch.float32),
        (torch.bfloat16, torch.float64, torch.float64),
        (torch.float64, torch.float32, torch.float64),
    ],
)
def test_precision(weight, diagonal, expected):
    w = torch.tensor([1e-3, 2.0, 300.0]).to(weight).requires_grad_()
    found = obd_saliency(w, torch.tensor([1e-20, 1.0, 1e10]).to(diagonal))
    assert found.dtype == expected
    assert not found.requires_grad
    torch.testing.assert_close(
        found.double(), w.detach().double() ** 2 * torch.tensor([0.5e-20, 0.5, 0.5e10]).double()
    )
    assert w.tolist() == torch.tensor([1e-3, 2.0, 300.0]).to(weight).tolist()


@pytest.mark.parametrize(
    ("weight", "diagonal", "error", "message"),
    [
        (
            torch.ones(2, 3),
            torch.ones(3, 2),
            ValueError,
            r"weight has shape \(2, 3\), but diagonal has shape \(3, 2\)",
        ),
        (torch.ones(2, 3), torch.ones(3), ValueError, "same layer"),  # would be broadcast
        (torch.ones(2, dtype=torch.uint8), torch.ones(2), TypeError, "got torch.uint8. Dequantize"),
        (torch.ones(2).to(torch.float8_e4m3fn), torch.ones(2), TypeError, "got torch.float8_e4m3fn"),
        (torch.ones(2), torch.ones(2, dtype=torch.float16), TypeError, "diagonal must be .* got torch.float16"),
        (torch.ones(2), 1.0, TypeError, "diagonal must be .* got float"),
        (None, torch.ones(2), TypeError, "weight must be .* got NoneType"),
    ],
)
def test_arguments_are_checked(weight, diagonal, error, message):
    with pytest.raises(error, match=message):
        obd_saliency(weight, diagonal)
