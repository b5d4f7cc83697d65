"""Joining attention results: the exact merge of disjoint sets of keys by their log-sum-exp, and gates between branches.

    ℓ = log Σ_n e^{ℓ_n}        o = Σ_n e^{ℓ_n − ℓ} o_n

is what one softmax over all keys would give. A part that saw nothing (ℓ_n = −inf) has no weight; where all parts saw
nothing, o = 0 and ℓ = −inf. A sink adds e^{sink} to the sum and nothing to o. Same merge as in ring attention (Liu et
al. 2023, arXiv 2310.01889) and FlashInfer's cascades (Ye et al. 2025, arXiv 2501.01005). Backward, w_n = e^{ℓ_n − ℓ}:

    do_n = w_n dO    dℓ_n = w_n (dO·o_n − Δ)    dsink = −Σ e^{sink − ℓ} Δ    Δ = Σ_n w_n dO·o_n − dℓ
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from memattn import backends
from memattn.backends import Limits, Request
from memattn.ops import _checks as check
from memattn.ops._library import Differentiable, define_differentiable, resolve
from memattn.reference import merge_states as reference
from memattn.reference.attention import AttentionOutput, accumulate_dtype, one_sink

MERGE, COMBINE = "merge_states", "gated_combine"
MODES = ("convex", "add", "mul")

# --- the ops: schemas, shapes, gradients ------------------------------------------------------------------------------


def _merge_backward(op, saved, args, grads):
    *parts, sink, lse = saved
    do, dlse = grads
    n = len(parts) // 2
    do = torch.zeros_like(parts[0]) if do is None else do.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    doutputs, dlses, dsink = op(do, dlse, lse, parts[:n], parts[n:], sink)
    return doutputs.unbind(0), dlses.unbind(0), None if sink is None else dsink


def _merge_backward_fake(do, dlse, lse, outputs, lses, sink):
    n = len(outputs)
    dsink = lse.new_empty(0 if sink is None else lse.shape[2])
    return do.new_empty(n, *do.shape), lse.new_empty(n, *lse.shape), dsink


def _combine_backward(op, saved, args, grads):
    return *op(grads[0].contiguous(), *saved, args[3]), None


define_differentiable(
    f"{MERGE}_cpu",
    Differentiable(
        schema="(Tensor[] outputs, Tensor[] lses, Tensor? sink) -> (Tensor, Tensor)",
        backward_schema="(Tensor do, Tensor? dlse, Tensor lse, Tensor[] outputs, Tensor[] lses, Tensor? sink)"
        " -> (Tensor, Tensor, Tensor)",
        fake=lambda outputs, lses, sink: (torch.empty_like(outputs[0]), torch.empty_like(lses[0])),
        backward_fake=_merge_backward_fake,
        outputs=2,
        save=lambda args, results: (*args[0], *args[1], args[2], results[1]),
        backward=_merge_backward,
    ),
)
define_differentiable(
    f"{COMBINE}_cpu",
    Differentiable(
        schema="(Tensor a, Tensor b, Tensor gate, int mode) -> Tensor",
        backward_schema="(Tensor dy, Tensor a, Tensor b, Tensor gate, int mode) -> (Tensor, Tensor, Tensor)",
        fake=lambda a, b, gate, mode: torch.empty_like(a),
        backward_fake=lambda dy, a, b, gate, mode: tuple(torch.empty_like(x) for x in (a, b, gate)),
        outputs=1,
        save=lambda args, results: args[:3],
        backward=_combine_backward,
    ),
)
_MERGE_CPU, _COMBINE_CPU = resolve(f"{MERGE}_cpu"), resolve(f"{COMBINE}_cpu")

_FEATURES = frozenset({"backward"})
for _op in (MERGE, COMBINE):
    _native = Limits(("cpu",), check.FLOATS, backends.needs_native("_C"), dims=(1, 4096), features=_FEATURES)
    backends.register(_op, "cpu", _native)
    _anywhere = Limits(("cpu", "cuda", "xpu", "mps"), check.FLOATS, backends.always, dims=None, features=_FEATURES)
    backends.register(_op, "chunked", _anywhere)


def _choose(op: str, like: Tensor, backend: str | None, *tensors: Tensor | None) -> str:
    train = frozenset({"backward"}) if check.needs_grad(*tensors) else frozenset()
    request = Request(like.device.type, like.dtype, (("V", like.shape[3]),), train)
    return backends.choose(op, request, backend, lambda: check.describe(first=like))


# --- the public functions ---------------------------------------------------------------------------------------------


def merge_states(
    outputs: Sequence[Tensor], lses: Sequence[Tensor], *, sink: Tensor | None = None, backend: str | None = None
) -> AttentionOutput:
    """One attention result from n parts over disjoint keys; the module docstring has the equations.

    outputs: n ≥ 1 tensors [B, T, H, V] of one dtype. lses: n tensors [B, T, H], natural log, float32 (float64 with
    float64 outputs). sink: [H] or [H, r] logits that no part has counted yet.

    Returns AttentionOutput(o [B, T, H, V] in outputs' dtype, lse [B, T, H]). Differentiable once, through o and lse, in
    outputs, lses and sink (any number of times with backend "chunked"). Where the other part comes from `attention`
    too, its argument `merge` saves this pass. Raises ValueError, TypeError, BackendError.
    """
    op = MERGE
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
    if sink is not None:
        check.tensor(op, "sink", sink)
        check.shape(op, "sink", sink, "[H] or [H, r]", (first.shape[2], *sink.shape[1:2]))
        check.dtype(op, "sink", sink, (first.dtype, dtype), f" with {check.dtype_name(first.dtype)} outputs")
        check.device(op, "sink", sink, first, "outputs[0]")
    if _choose(op, first, backend, *outputs, *lses, sink) == "chunked":
        with torch.autocast(first.device.type, enabled=False):
            return reference.chunked(outputs, lses, sink=sink)
    logit = None if sink is None else one_sink(sink, dtype).contiguous()
    return AttentionOutput(*_MERGE_CPU(check.contiguous(*outputs), check.contiguous(*lses), logit))


def gated_combine(a: Tensor, b: Tensor, gate: Tensor, mode: str = "convex", *, backend: str | None = None) -> Tensor:
    """Two branches [B, T, H, V] joined by a linear gate: "convex" g a + (1 − g) b, "add" a + g b, "mul" g a b.

    gate broadcasts to a: [H], [B, T, H] (one number per head) or [B, T, H, V]; a's dtype or float32 (float64 with
    float64 a). It is not bounded here. Computed in float32 (float64), returned in a's dtype. Differentiable
    once in a, b and gate (any number of times with backend "chunked"). "convex" is Infini-attention's gate (arXiv
    2404.07143), "add" Lizard's α, "mul" the product of Titans' MAG.

    Raises ValueError, TypeError, BackendError.
    """
    op = COMBINE
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
    if _choose(op, a, backend, a, b, gate) == "chunked":
        with torch.autocast(a.device.type, enabled=False):
            return reference.combined(a, b, gate, mode)
    gate = gate.to(a.dtype if gate.dim() == 4 else dtype)
    return _COMBINE_CPU(*check.contiguous(a, b, gate), MODES.index(mode))
