"""merge_states and gated_combine: identities, gradients, dtypes, refusals."""

# ruff: noqa: E501 (tables, one case a line)
import pytest
import torch

from memattn.ops import attention, gated_combine, merge_states


def parts(n=3, dtype=torch.float64, empty=()):
    """n outputs [2, 5, 3, 16] with their lses; the listed (part, row) saw nothing."""
    outputs = [torch.randn(2, 5, 3, 16, dtype=dtype) for _ in range(n)]
    lses = [
        torch.randn(2, 5, 3, dtype=torch.float64 if dtype == torch.float64 else torch.float32) * 3 for _ in range(n)
    ]
    for part, row in empty:
        outputs[part][:, row], lses[part][:, row] = 0.0, -torch.inf
    return outputs, lses


def test_equals_the_weighted_sum():
    outputs, lses = parts()
    total = sum(x.exp() for x in lses)
    o, lse = merge_states(outputs, lses)
    torch.testing.assert_close(lse, total.log())
    torch.testing.assert_close(o, sum((x.exp() / total)[..., None] * y for x, y in zip(lses, outputs, strict=True)))
    one, same = merge_states(outputs[:1], lses[:1])
    torch.testing.assert_close((one, same), (outputs[0], lses[0]))


def test_order_and_nesting_do_not_matter():
    outputs, lses = parts(4, empty=((0, 1), (2, 1)))
    expected = merge_states(outputs, lses)
    torch.testing.assert_close(merge_states(outputs[::-1], lses[::-1]), expected)
    (a, b), (c, d) = (merge_states(outputs[i : i + 2], lses[i : i + 2]) for i in (0, 2))
    torch.testing.assert_close(merge_states([a, c], [b, d]), expected)


def test_parts_that_saw_nothing():
    """Alone they change nothing; all together they give 0, −inf, zero gradient and no NaN."""
    outputs, lses = parts(2, empty=((0, 1), (0, 2), (1, 2)))
    leaves = [x.requires_grad_() for x in (*outputs, *lses)]
    o, lse = merge_states(outputs, lses)
    assert torch.equal(o[:, 1], outputs[1][:, 1]) and torch.equal(lse[:, 1], lses[1][:, 1])
    assert not o[:, 2].any() and (lse[:, 2] == -torch.inf).all()
    gradients = torch.autograd.grad(o.sum() + lse[:, [0, 1, 3, 4]].sum(), leaves)
    assert all(g.isfinite().all() and not g[:, 2].any() for g in gradients)
    assert all(not g[:, 1].any() for g in (gradients[0], gradients[2]))


@pytest.mark.parametrize("sink", [None, torch.randn(3, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)])
def test_sink_and_gradients(sink):
    outputs, lses = parts(2, empty=((1, 3),))

    def op(*leaves):
        o, lse = merge_states(
            leaves[:2],
            [leaves[2], leaves[3].masked_fill(lses[1] == -torch.inf, -torch.inf)],
            sink=leaves[4] if sink is not None else None,
        )
        return o, lse

    leaves = [*outputs, lses[0], lses[1].nan_to_num(neginf=0.0), *([] if sink is None else [sink])]
    leaves = [x.clone().requires_grad_() for x in leaves]
    assert torch.autograd.gradcheck(op, leaves)
    if sink is not None:
        bare = merge_states(outputs, lses)
        o, lse = merge_states(outputs, lses, sink=sink)
        extra = sink.reshape(3, -1).logsumexp(-1)
        torch.testing.assert_close(lse, torch.logaddexp(bare.lse, extra.expand_as(lse)))
        torch.testing.assert_close(o, bare.o * (bare.lse - lse).exp()[..., None])


def test_sink_of_attention_is_a_sink_of_the_merge():
    q, k, v, sink = torch.randn(1, 20, 2, 16), torch.randn(1, 20, 2, 16), torch.randn(1, 20, 2, 16), torch.randn(2, 3)
    expected = attention(q, k, v, sink=sink)
    torch.testing.assert_close(merge_states(*([x] for x in attention(q, k, v)), sink=sink), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_computed_in_float32(dtype):
    outputs, lses = parts(3, dtype)
    o, lse = merge_states(outputs, lses)
    assert o.dtype == dtype and lse.dtype == torch.float32
    exact, _ = merge_states([x.double() for x in outputs], [x.double() for x in lses])
    assert (o.double() - exact).norm() <= 2 * torch.finfo(dtype).eps * exact.norm()


@pytest.mark.parametrize("shape", [(3,), (2, 5, 3), (2, 5, 3, 16)], ids=str)
def test_gated_combine(shape):
    a, b, gate = torch.randn(2, 5, 3, 16), torch.randn(2, 5, 3, 16), torch.rand(shape)
    wide = gate if gate.dim() == 4 else gate[..., None]
    for mode, expected in (("convex", wide * a + (1 - wide) * b), ("add", a + wide * b), ("mul", wide * a * b)):
        torch.testing.assert_close(gated_combine(a, b, gate, mode), expected)
        low = gated_combine(a.bfloat16(), b.bfloat16(), gate, mode)
        assert low.dtype == torch.bfloat16 and (low.float() - expected).norm() <= 1e-2 * expected.norm()
        leaves = [
            x.double().requires_grad_() for x in (a[:1, :2], b[:1, :2], gate if gate.dim() == 1 else gate[:1, :2])
        ]
        assert torch.autograd.gradcheck(lambda *x, m=mode: gated_combine(*x, m), leaves)


def test_gated_combine_keeps_either_end():
    a, b = torch.randn(1, 2, 3, 16), torch.randn(1, 2, 3, 16)
    assert torch.equal(gated_combine(a, b, torch.zeros(3)), b)
    torch.testing.assert_close(gated_combine(a, b, torch.ones(3)), a)


def test_refusals():
    outputs, lses = parts(2, torch.float32)
    a, b = outputs
    for call, error, message in (
        (lambda: merge_states([], []), ValueError, "merge_states: got 0 outputs and 0 lses; expected n ≥ 1 of each"),
        (lambda: merge_states(outputs, lses[:1]), ValueError, "got 2 outputs and 1 lses"),
        (
            lambda: merge_states([a, b[:1]], lses),
            ValueError,
            r"outputs\[1\] has shape \[1, 5, 3, 16\]; expected .* = \[2, 5, 3, 16\]",
        ),
        (
            lambda: merge_states([a, b.half()], lses),
            TypeError,
            r"outputs\[1\] is float16; expected float32 like outputs\[0\]",
        ),
        (
            lambda: merge_states(outputs, [lses[0], lses[1].double()]),
            TypeError,
            r"lses\[1\] is float64; expected float32",
        ),
        (lambda: merge_states(outputs, [lses[0], lses[1][..., None]]), ValueError, r"lses\[1\] has shape"),
        (
            lambda: merge_states(outputs, lses, sink=torch.zeros(2)),
            ValueError,
            r"sink has shape \[2\]; expected \[H\] or \[H, r\] = \[3\]",
        ),
        (lambda: merge_states(outputs, lses, sink=torch.zeros(3).int()), TypeError, "sink is int32; expected float32"),
        (lambda: gated_combine(a, b[:1], torch.zeros(3)), ValueError, r"gated_combine: b has shape \[1, 5, 3, 16\]"),
        (
            lambda: gated_combine(a, b, torch.zeros(2)),
            ValueError,
            r"gate has shape \[2\]; expected \[H\], \[B, T, H\] or \[B, T, H, V\]",
        ),
        (
            lambda: gated_combine(a, b, torch.zeros(3), "sum"),
            ValueError,
            "mode is 'sum'; allowed: 'convex', 'add', 'mul'",
        ),
        (lambda: gated_combine(a, b.half(), torch.zeros(3)), TypeError, "b is float16; expected float32 like a"),
    ):
        with pytest.raises(error, match=message):
            call()
