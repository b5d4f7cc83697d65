"""memory_recall: truth, gradients, empty memories, relations, refusals."""

# ruff: noqa: E501 (tables, one case a line)
import pytest
import torch
from support.compare import CEILING, relative_error

from memattn.ops import attention, memory_recall, merge_states
from memattn.reference import memory_recall as reference

LAYOUTS = {
    "plain": dict(q=(2, 3, 2, 16), keys=(2, 7, 2, 16), values=(2, 7, 2, 20)),
    "raw rows": dict(q=(2, 1, 1, 40), keys=(2, 9, 1, 40)),
    "lengths": dict(q=(4, 2, 1, 24), keys=(4, 6, 1, 24), values=(4, 6, 1, 8), lengths=(6, 1, 0, 3)),
    "raw rows, lengths": dict(q=(3, 1, 2, 24), keys=(3, 6, 2, 24), lengths=(2, 0, 6)),
    "no rows": dict(q=(2, 1, 1, 24), keys=(2, 0, 1, 24)),
    "no queries": dict(q=(2, 0, 1, 24), keys=(2, 5, 1, 24)),
    "wide": dict(q=(1, 1, 1, 4096), keys=(1, 11, 1, 4096)),
}


def make(name, dtype=torch.float32, device="cpu"):
    layout = LAYOUTS[name]
    noise = torch.Generator().manual_seed(0)
    q, keys, values = (
        None if shape is None else torch.randn(shape, generator=noise).to(device, dtype)
        for shape in (layout["q"], layout["keys"], layout.get("values"))
    )
    lengths = torch.tensor(layout["lengths"], device=device) if "lengths" in layout else None
    return {"q": 2 * q, "memory_keys": keys, "memory_values": values, "lengths": lengths}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equals_the_definition(name, dtype, device):
    inputs = make(name, dtype, device)
    exact = {n: x.cpu().double() if x is not None and x.is_floating_point() else x for n, x in inputs.items()}
    exact["lengths"] = None if inputs["lengths"] is None else inputs["lengths"].cpu()
    truth, actual = reference.loop(**exact, scale=0.3), memory_recall(**inputs, scale=0.3)
    assert actual.o.dtype == dtype and actual.lse.dtype == torch.promote_types(dtype, torch.float32)
    for x, y in zip(actual, truth, strict=True):
        assert relative_error(x, y) <= CEILING[dtype]


@pytest.mark.parametrize("name", [n for n in LAYOUTS if n != "wide"])
def test_gradients(name, device):
    inputs = make(name, torch.float64, device)
    leaves = {n: x.requires_grad_() for n, x in inputs.items() if n != "lengths" and x is not None and x.numel()}

    def op(*tensors):
        o, lse = memory_recall(**{**inputs, **dict(zip(leaves, tensors, strict=True))})
        return o, lse.masked_fill(lse == -torch.inf, 0.0)

    if name != "no queries":
        assert torch.autograd.gradcheck(op, list(leaves.values()))
        assert torch.autograd.gradgradcheck(op, list(leaves.values()), fast_mode=True)


def test_an_empty_memory_gives_zero(device):
    inputs = make("raw rows, lengths", device=device)
    leaves = [inputs[n].requires_grad_() for n in ("q", "memory_keys")]
    o, lse = memory_recall(**inputs)
    assert not o[1].any() and (lse[1] == -torch.inf).all() and lse[[0, 2]].isfinite().all()
    dq, dkeys = torch.autograd.grad(o.sum() + lse[[0, 2]].sum(), leaves)
    assert not dq[1].any() and not dkeys[1].any() and not dkeys[0, 2:].any() and dkeys[0, :2].any()
    assert dq.isfinite().all() and dkeys.isfinite().all()
    o, lse = memory_recall(**make("no rows", device=device))
    assert not o.any() and (lse == -torch.inf).all()


def test_lengths_count_rows_exactly(device):
    """lengths[b] rows are read: the last of them matters, the next does not."""
    inputs = make("lengths", device=device)
    base = memory_recall(**inputs).o
    for row, at, seen in ((3, 2, True), (3, 3, False), (1, 0, True), (1, 1, False), (2, 0, False)):
        values = inputs["memory_values"].clone()
        values[row, at] += 1
        changed = (memory_recall(**{**inputs, "memory_values": values}).o != base).flatten(1).any(1)
        assert changed.tolist() == [seen and b == row for b in range(4)], f"row {row}, entry {at}"


def test_equals_attention_where_that_can_serve(device):
    inputs = make("plain", device=device)
    inputs = {n: x for n, x in inputs.items() if n != "lengths"}
    torch.testing.assert_close(memory_recall(**inputs), attention(*inputs.values(), causal=False), rtol=1e-5, atol=1e-5)


def test_parts_of_the_memory_merge(device):
    inputs = make("plain", device=device)
    parts = [
        memory_recall(inputs["q"], inputs["memory_keys"][:, a:b], inputs["memory_values"][:, a:b])
        for a, b in ((0, 2), (2, 2), (2, 7))
    ]
    torch.testing.assert_close(merge_states(*zip(*parts, strict=True)), memory_recall(**inputs))


def test_hmt_needs_no_projection_of_the_memory(device):
    """softmax(q W_q (M W_k)ᵀ / √d) M = memory_recall(q W_q W_kᵀ, M), the module docstring's identity."""
    q, memory, w_q, w_k = (torch.randn(s, dtype=torch.float64) for s in ((2, 3, 12), (2, 7, 12), (12, 20), (12, 20)))
    weights = (q @ w_q @ (memory @ w_k).mT / 20**0.5).softmax(-1)
    o, _ = memory_recall((q @ w_q @ w_k.mT)[:, :, None], memory[:, :, None], scale=20**-0.5)
    torch.testing.assert_close(o[:, :, 0], weights @ memory)


def test_autocast_and_compile(device):
    inputs = make("lengths", device=device)
    expected = memory_recall(**inputs)
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(memory_recall(**inputs).o, expected.o)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(memory_recall, fullgraph=True, backend="aot_eager")(**inputs), expected)


def test_refusals():
    q, keys = torch.zeros(2, 1, 1, 8), torch.zeros(2, 5, 1, 8)
    for call, error, message in (
        (lambda: memory_recall(q, keys[:1]), ValueError, r"memory_keys has shape \[1, 5, 1, 8\]; expected .*\[2, 5, 1, 8"),
        (lambda: memory_recall(q, keys, keys[:, :4]), ValueError, r"memory_values has shape \[2, 4, 1, 8\]; expected"),
        (lambda: memory_recall(q, keys.half()), TypeError, "memory_keys is float16; expected float32 like q"),
        (lambda: memory_recall(q[..., :0], keys[..., :0]), ValueError, "q has head dimension 0; expected K ≥ 1"),
        (lambda: memory_recall(q, keys, scale=-1.0), ValueError, "scale is -1.0; expected a finite number > 0 or None"),
        (lambda: memory_recall(q, keys, lengths=torch.tensor([6, 0])), ValueError, r"lengths holds 0\.\.6; allowed: 0\.\.5"),
        (lambda: memory_recall(q[0], keys), ValueError, r"q has shape \[1, 1, 8\] of rank 3; expected \[B, Q, H, K\]"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            call()
