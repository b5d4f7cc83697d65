"""Joining attention results: the exact merge of disjoint sets of keys by their log-sum-exp, and gates between branches.

    ℓ = log Σ_n e^{ℓ_n}        o = Σ_n e^{ℓ_n − ℓ} o_n

is what one softmax over all keys would give. A part that saw nothing (ℓ_n = −inf) has no weight; where all parts saw
nothing, o = 0 and ℓ = −inf. A sink adds e^{sink} to the sum and nothing to o. Same merge as in ring attention (Liu et
al. 2023, arXiv 2310.01889) and FlashInfer's cascades (Ye et al. 2025, arXiv 2501.01005).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from memattn.ops import _checks as check
from memattn.reference.attention import AttentionOutput, accumulate_dtype, joined, one_sink

MODES = ("convex", "add", "mul")


def merge_states(outputs: Sequence[Tensor], lses: Sequence[Tensor], *, sink: Tensor | None = None) -> AttentionOutput:
    """One attention result from n parts over disjoint keys; the module docstring has the equations.

    outputs: n ≥ 1 tensors [B, T, H, V] of one dtype. lses: n tensors [B, T, H], natural log, float32 (float64 with
    float64 outputs). sink: [H] or [H, r] logits that no part has counted yet.

    Returns AttentionOutput(o [B, T, H, V] in outputs' dtype, lse [B, T, H]). Plain torch: differentiable any number of
    times, through o and lse, in outputs, lses and sink. Raises ValueError, TypeError.
    """
    op = "merge_states"
    if not outputs or len(outputs) != len(lses):
        raise ValueError(f"{op}: got {len(outputs)} outputs and {len(lses)} lses; expected n ≥ 1 of each")
    first = outputs[0]
    check.rank(op, "outputs[0]", first, "[B, T, H, V]")
    check.dtype(op, "outputs[0]", first, check.FLOATS)
    dtype = accumulate_dtype(first.dtype)
    for n, (o, lse) in enumerate(zip(outputs, lses, strict=True)):
        check.shape(op, f"outputs[{n}]", o, "[B, T, H, V]", first.shape)
        check.dtype(op, f"outputs[{n}]", o, (first.dtype,), " like outputs[0]")
        check.shape(op, f"lses[{n}]", lse, "[B, T, H]", first.shape[:3])
        check.dtype(op, f"lses[{n}]", lse, (dtype,), f" with {check.dtype_name(first.dtype)} outputs")
        for name, x in ((f"outputs[{n}]", o), (f"lses[{n}]", lse)):
            check.device(op, name, x, first, "outputs[0]")
    parts = list(lses)
    if sink is not None:
        check.tensor(op, "sink", sink)
        check.shape(op, "sink", sink, "[H] or [H, r]", (first.shape[2], *sink.shape[1:2]))
        check.dtype(op, "sink", sink, (first.dtype, dtype), f" with {check.dtype_name(first.dtype)} outputs")
        check.device(op, "sink", sink, first, "outputs[0]")
        parts.append(one_sink(sink, dtype).expand(first.shape[:3]))
    o, lse = joined([x.to(dtype) for x in outputs], parts)
    return AttentionOutput(o.to(first.dtype), lse)


def gated_combine(a: Tensor, b: Tensor, gate: Tensor, mode: str = "convex") -> Tensor:
    """Two branches [B, T, H, V] joined by a linear gate: "convex" g a + (1 − g) b, "add" a + g b, "mul" g a b.

    gate broadcasts to a: [H], [B, T, H] (one number per head) or [B, T, H, V]; a's dtype or float32 (float64 with
    float64 a). It is not bounded here. Computed in float32 (float64), returned in a's dtype. Plain torch,
    differentiable in a, b and gate. "convex" is Infini-attention's gate (arXiv 2404.07143), "add" Lizard's α, "mul" the
    product of Titans' MAG.

    Raises ValueError, TypeError.
    """
    op = "gated_combine"
    check.rank(op, "a", a, "[B, T, H, V]")
    check.dtype(op, "a", a, check.FLOATS)
    check.shape(op, "b", b, "[B, T, H, V]", a.shape)
    check.tensor(op, "gate", gate)
    check.choice(op, "mode", mode, MODES)
    dtype = accumulate_dtype(a.dtype)
    check.dtype(op, "b", b, (a.dtype,), " like a")
    check.dtype(op, "gate", gate, (a.dtype, dtype), f" with {check.dtype_name(a.dtype)} a")
    for name, x in (("b", b), ("gate", gate)):
        check.device(op, name, x, a, "a")
    if tuple(gate.shape) not in ((a.shape[2],), tuple(a.shape[:3]), tuple(a.shape)):
        raise ValueError(
            f"{op}: gate has shape {list(gate.shape)}; expected [H], [B, T, H] or [B, T, H, V] of {list(a.shape)}"
        )  # noqa: E501
    x, y, g = a.to(dtype), b.to(dtype), gate.to(dtype)
    g = g if g.dim() == 4 else g[..., None]
    mixed = y + g * (x - y) if mode == "convex" else x + g * y if mode == "add" else g * x * y
    return mixed.to(a.dtype)
