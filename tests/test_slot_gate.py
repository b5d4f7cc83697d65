"""slot_gate: formulas, limits, gradients, dtypes, refusals."""

# ruff: noqa: E501 (tables, one case a line)
import pytest
import torch

from memattn.ops import slot_gate

N, M, D = 2, 3, 8
DRAWN = {
    "bias": {"bias": (D,)}, "full": {"logits": (N, M, D)}, "ema": {"decay": (D,)},
    "lstm": {"forget": (N, M, D), "input": (N, M, D)},
    "gru": {"weight_ih": (3 * D, D), "weight_hh": (3 * D, D), "bias_ih": (3 * D,), "bias_hh": (3 * D,)},
    "bias_l2": {"bias": (M, D)},
}  # fmt: skip


def draw(kind, dtype=torch.float64):
    slots, update = torch.randn(N, M, D, dtype=dtype), torch.randn(N, M, D, dtype=dtype)
    parameters = {name: torch.randn(shape, dtype=dtype) for name, shape in DRAWN[kind].items()}
    return slots, update, {n: x.sigmoid() if n == "decay" else x for n, x in parameters.items()}


def formula(kind, m, y, p):
    """The docstring's table, written out slot by slot."""
    new = torch.empty_like(m)
    for n in range(N):
        for i in range(M):
            a, b = m[n, i], y[n, i]
            if kind in ("bias", "full"):
                g = torch.sigmoid(p["bias"] if kind == "bias" else p["logits"][n, i])
                new[n, i] = g * a + (1 - g) * b
            elif kind == "ema":
                new[n, i] = p["decay"] * a + (1 - p["decay"]) * b
            elif kind == "lstm":
                new[n, i] = p["forget"][n, i].sigmoid() * a + p["input"][n, i].sigmoid() * b
            elif kind == "gru":
                cell = torch.nn.GRUCell(D, D, dtype=m.dtype)
                cell.load_state_dict(p)
                new[n, i] = cell(b, a).detach()
            else:
                new[n, i] = (b + p["bias"][i]) / (b + p["bias"][i]).norm()
    return new


@pytest.mark.parametrize("kind", DRAWN)
def test_formula_and_gradients(kind):
    slots, update, parameters = draw(kind)
    torch.testing.assert_close(slot_gate(slots, update, kind, **parameters), formula(kind, slots, update, parameters))
    leaves = [x.requires_grad_() for x in (slots, update, *parameters.values())]

    def op(m, y, *tensors):
        return slot_gate(m, y, kind, **dict(zip(parameters, tensors, strict=True)))

    assert torch.autograd.gradcheck(op, leaves)
    assert torch.autograd.gradgradcheck(op, leaves)


@pytest.mark.parametrize("kind, name", [("bias", "bias"), ("full", "logits")])
def test_closed_and_open(kind, name):
    """A gate at +40 keeps the slots exactly, at −40 takes the update; never NaN at ±inf."""
    slots, update, parameters = draw(kind, torch.float32)
    for value, expected in ((40.0, slots), (-40.0, update), (torch.inf, slots), (-torch.inf, update)):
        full = torch.full_like(parameters[name], value)
        torch.testing.assert_close(slot_gate(slots, update, kind, **{name: full}), expected, rtol=1e-6, atol=1e-6)


def test_limits_of_the_others():
    slots, update, _ = draw("ema", torch.float32)
    torch.testing.assert_close(slot_gate(slots, update, "ema", decay=torch.tensor(1.0)), slots)
    assert torch.equal(slot_gate(slots, update, "ema", decay=torch.tensor(0.0)), update)
    closed, opened = torch.full((N, M, D), -torch.inf), torch.full((N, M, D), torch.inf)
    assert torch.equal(slot_gate(slots, update, "lstm", forget=opened, input=closed), slots)
    assert torch.equal(slot_gate(slots, update, "lstm", forget=closed, input=opened), update)
    assert torch.equal(slot_gate(slots, update, "lstm", forget=closed, input=closed), torch.zeros_like(slots))
    _, _, gru = draw("gru", torch.float32)
    gru["bias_ih"][D : 2 * D] = 100.0  # the update gate z = 1 keeps the state
    torch.testing.assert_close(slot_gate(slots, update, "gru", **gru), slots)
    unit = slot_gate(slots, update, "bias_l2", bias=torch.zeros(D))
    torch.testing.assert_close(unit.norm(dim=-1), torch.ones(N, M))
    zero = slot_gate(slots, torch.zeros_like(update).requires_grad_(), "bias_l2", bias=torch.zeros(D))
    assert not zero.any()


@pytest.mark.parametrize("kind", DRAWN)
def test_permuting_slots_permutes_the_result(kind):
    slots, update, parameters = draw(kind)
    order = torch.tensor([2, 0, 1])
    moved = {n: x[:, order] if x.dim() == 3 else x for n, x in parameters.items()}
    moved = {n: x[order] if kind == "bias_l2" else x for n, x in moved.items()}
    expected = slot_gate(slots, update, kind, **parameters)[:, order]
    torch.testing.assert_close(slot_gate(slots[:, order], update[:, order], kind, **moved), expected)


@pytest.mark.parametrize("kind", DRAWN)
def test_dtypes(kind):
    """The result has the slots' dtype; gates are float32 inside, under autocast too."""
    slots, update, parameters = draw(kind, torch.float32)
    exact = slot_gate(slots, update, kind, **parameters)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(slot_gate(slots, update, kind, **parameters), exact)
    mixed = slot_gate(slots, update.bfloat16(), kind, **parameters)
    assert mixed.dtype == torch.float32 and (mixed - exact).norm() <= 1e-2 * exact.norm()
    low = slot_gate(slots.bfloat16(), update.bfloat16(), kind, **parameters)
    assert low.dtype == torch.bfloat16 and (low.float() - exact).norm() <= 2e-2 * exact.norm()


def test_refusals():
    m = torch.zeros(N, M, D)
    for call, error, message in (
        (lambda: slot_gate(m, m, "reset"), ValueError, "kind is 'reset'; allowed: 'bias', 'full'"),
        (lambda: slot_gate(m[0], m, "bias"), ValueError, r"slots has shape \[3, 8\] of rank 2; expected \[N, M, D\]"),
        (lambda: slot_gate(m, m[:1], "bias"), ValueError, r"update has shape \[1, 3, 8\]; expected .* \[2, 3, 8\]"),
        (lambda: slot_gate(m, m, "bias"), ValueError, r"kind 'bias' got parameters none; expected \['bias'\]"),
        (lambda: slot_gate(m, m, "lstm", forget=m), ValueError, r"got parameters \['forget'\]; expected \['forget', 'in"),
        (lambda: slot_gate(m, m, "bias", bias=m[0]), ValueError, r"bias has shape \[3, 8\]; expected \[D\] with slots"),
        (lambda: slot_gate(m, m, "bias_l2", bias=m), ValueError, r"bias has shape .*; expected \[D\] or \[M, D\] with"),
        (lambda: slot_gate(m, m, "ema", decay=m[0].int()), TypeError, "decay is int32; expected float32"),
        (lambda: slot_gate(m.int(), m, "bias"), TypeError, "slots is int32; expected float32"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            call()
