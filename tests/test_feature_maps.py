"""The feature maps of linear attention against their definitions."""

# ruff: noqa: E501 (tables, one case a line)
import pytest
import torch

from memattn.ops.feature_maps import dpfp, elu_plus_one, hedgehog

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_elu_plus_one_to_the_last_bit_but_one(dtype, device):
    x = torch.cat([torch.linspace(-30, 30, 1001), torch.tensor([0.0, -0.0, 1e-6, -1e-6])]).to(dtype).to(device)
    exact = x.double()
    exact = torch.where(exact > 0, exact + 1, exact.exp())
    y = elu_plus_one(x)
    assert y.dtype == dtype and y.shape == x.shape and (y >= 0).all()
    # Relative: elu(x) + 1 through expm1 would lose every digit of e^-20. Subnormal float16 has fewer digits.
    normal = exact > torch.finfo(dtype).tiny
    error = ((y.double() - exact) / exact)[normal].abs().max().item()
    assert error <= {torch.float64: 4e-16}.get(dtype, torch.finfo(dtype).eps)


def test_elu_plus_one_limits_and_gradient(device):
    x = torch.tensor([-torch.inf, torch.inf, torch.nan, 1e30], device=device)
    y = elu_plus_one(x)
    assert y[0] == 0 and y[1] == torch.inf and y[2].isnan() and y[3] == 1e30
    leaf = torch.linspace(-3, 3, 13, dtype=torch.float64, device=device).add(0.01).requires_grad_()
    assert torch.autograd.gradcheck(elu_plus_one, leaf)
    large = torch.tensor([200.0], device=device, requires_grad=True)
    elu_plus_one(large).backward()
    assert large.grad.item() == 1, "the branch not taken overflowed into the gradient"


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("activation", ["softmax", "exp"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_hedgehog_equals_its_definition(dtype, activation, shared, device):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 3, 8, generator=draw).to(dtype).to(device)
    weight = (torch.randn(3, 8, 6, generator=draw) / 4).to(dtype).to(device)
    given = weight[0] if shared else weight
    y = hedgehog(x, given, activation=activation)
    assert y.shape == (2, 5, 3, 12) and y.dtype == dtype
    for h in range(3):
        scores = x[:, :, h].double() @ (given if shared else given[h]).double()
        f = {"softmax": lambda s: s.softmax(-1), "exp": torch.exp}[activation]
        expected = torch.cat([f(scores), f(-scores)], -1)
        error = ((y[:, :, h].double() - expected).norm() / expected.norm()).item()
        assert error <= {torch.float64: 1e-15, torch.float32: 1e-6}.get(dtype, torch.finfo(dtype).eps)


def test_hedgehog_gradient_and_large_arguments(device):
    x = torch.randn(1, 2, 2, 4, dtype=torch.float64, device=device, requires_grad=True)
    weight = torch.randn(2, 4, 3, dtype=torch.float64, device=device, requires_grad=True)
    for activation in ("softmax", "exp"):
        assert torch.autograd.gradcheck(lambda a, b, name=activation: hedgehog(a, b, activation=name), (x, weight))
    assert hedgehog(1e4 * x, weight).isfinite().all(), "softmax features are bounded"


def test_bad_input(device):
    x, weight = torch.zeros(1, 2, 3, 8, device=device), torch.zeros(3, 8, 4, device=device)
    cases = (
        (lambda: elu_plus_one([1.0]), TypeError, "elu_plus_one: x is list; expected a torch.Tensor"),
        (lambda: elu_plus_one(x.int()), TypeError, "elu_plus_one: x is int32; expected float32 or bfloat16"),
        (
            lambda: hedgehog(x[0], weight),
            ValueError,
            r"hedgehog: x has shape \[2, 3, 8\] of rank 3; expected \[B, T, H",
        ),
        (
            lambda: hedgehog(x, weight[:2]),
            ValueError,
            r"weight has shape \[2, 8, 4\]; expected \[H, K, F\] = \[3, 8, F\]",
        ),
        (lambda: hedgehog(x, weight.double()), TypeError, "weight is float64; expected float32 with float32 x"),
        (lambda: hedgehog(x, weight, activation="relu"), ValueError, "activation is 'relu'; allowed: 'exp', 'softmax'"),
    )
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dpfp_equals_its_definition(dtype, device):
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)).to(dtype).to(device)
    y = dpfp(x, 3)
    assert y.shape == (2, 5, 48) and y.dtype == dtype and (y >= 0).all()
    u = torch.cat([x.double().clamp(min=0), (-x.double()).clamp(min=0)], -1)
    for j in (1, 2, 3):
        for i in range(16):  # feature i meets the one j before it, around the end
            expected = (u[..., i] * u[..., (i - j) % 16]).to(dtype)
            assert torch.equal(y[..., (j - 1) * 16 + i], expected)


def test_dpfp_gradient_and_refusals(device):
    leaf = torch.randn(3, 4, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(dpfp, leaf)
    for nu in (0, 8, True, 1.5):
        with pytest.raises(ValueError, match="dpfp: nu is .*; allowed: 1..7"):
            dpfp(leaf, nu)
