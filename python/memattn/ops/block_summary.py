"""One summary per block of keys, to score blocks by instead of tokens.

    mean:    r_j = Σ_{t∈B_j} k_t / |B_j|                    max:    r_j = max_{t∈B_j} k_t, each channel
    minmax:  r_j = [min_{t∈B_j} k_t ; max_{t∈B_j} k_t]      topr:   the mean of the `top` keys of largest weight w_t
    gated:   r_j = Σ_{t∈B_j} softmax_{t∈B_j}(w_t) ⊙ k_t, each channel

B_j is [j·stride, j·stride + block), cut at the end of the row, or what cu_blocks says. Blocks may overlap (stride <
block). A block without tokens has r = 0 and count 0; the last one may hold fewer than `block`, and its count says so.

Sources: mean MoBA (arXiv 2502.13189), NSA (arXiv 2502.11089, 32 tokens by stride 16); max the proxy of block maxima;
minmax Quest (arXiv 2406.10774); topr InfLLM's representative keys (arXiv 2402.04617, w the attention mass that a token
received); gated DeepSeek's compressed entries (w the gate's logits, position bias included); variable blocks EM-LLM's
events (arXiv 2407.09450).
"""

from __future__ import annotations

import torch
from torch import Tensor

from memattn import backends
from memattn.backends import Limits, Request
from memattn.ops import _checks as check
from memattn.ops._library import Differentiable, define_differentiable, resolve
from memattn.reference import block_summary as reference
from memattn.reference.attention import accumulate_dtype
from memattn.reference.block_summary import BlockSummary

OP = "block_summary"
MODES = ("mean", "max", "minmax", "topr", "gated")

# --- the op: mean, max and minmax, of blocks given by their bounds ----------------------------------------------------

_IN_CPP = ("mean", "max", "minmax")
_ARGUMENTS = "Tensor k, Tensor begins, Tensor ends, Tensor? lengths"


def _fake(k, begins, ends, lengths, mode):
    shape = k.shape[0], begins.shape[0]
    width = k.shape[3] * (2 if mode == _IN_CPP.index("minmax") else 1)
    return k.new_empty(*shape, k.shape[2], width), k.new_empty(shape, dtype=torch.int32)


def _backward(op, saved, args, grads):
    return op(grads[0].contiguous(), *saved), None, None, None, None


FAMILY = Differentiable(
    schema=f"({_ARGUMENTS}, int mode) -> (Tensor, Tensor)",
    backward_schema=f"(Tensor dvalues, {_ARGUMENTS}) -> Tensor",
    fake=_fake,
    backward_fake=lambda dvalues, k, *rest: torch.empty_like(k),
    outputs=1,
    save=lambda args, outputs: args[:-1],
    backward=_backward,
)
define_differentiable(f"{OP}_cpu", FAMILY)
_CPU = resolve(f"{OP}_cpu")

_FEATURES = frozenset({"backward", "backward of max and minmax", "topr and gated"})
_MOST = frozenset({"backward"})
backends.register(OP, "cpu", Limits(("cpu",), check.FLOATS, backends.needs_native("_C"), None, _MOST))
backends.register(OP, "chunked", Limits(("cpu", "cuda", "xpu"), check.FLOATS, backends.always, None, _FEATURES))


# --- checks -----------------------------------------------------------------------------------------------------------


def _check_size(name, value, low, high=2**31 - 1):
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)) or not low <= value <= high:
        raise ValueError(f"{OP}: {name} is {value!r}; allowed: {low}..{high}")


def _check_weight(k, weight, mode, top):
    if (weight is None) != (mode not in ("topr", "gated")):
        given = "None" if weight is None else "given"
        raise ValueError(f"{OP}: weight is {given} with mode={mode!r}; 'topr' and 'gated' need one, the others none")
    if (top is None) != (mode != "topr"):
        raise ValueError(f"{OP}: top is {top!r} with mode={mode!r}; 'topr' needs a number, the others none")
    if weight is not None:
        layout, shape = ("[B, T, HKV]", k.shape[:3]) if mode == "topr" else ("[B, T, HKV, D]", k.shape)
        check.shape(OP, "weight", weight, layout, shape)
        check.dtype(OP, "weight", weight, (k.dtype, accumulate_dtype(k.dtype)), f" with {check.dtype_name(k.dtype)} k")
        check.device(OP, "weight", weight, k, "k")


def _check_bounds(k, block, stride, cu_blocks, from_pos, lengths):
    if cu_blocks is None:
        return
    if stride is not None or from_pos or lengths is not None:
        raise ValueError(f"{OP}: stride, from_pos or lengths is given with cu_blocks, which says where blocks lie")
    check.cu_seqlens_layout(OP, cu_blocks, k, "cu_blocks")
    if check.values_checked(cu_blocks):
        low, high = int(cu_blocks[0]), int(cu_blocks[-1])
        least, most = (int(x) for x in cu_blocks.diff().aminmax())
        if low < 0 or high > k.shape[1] or least < 0 or most > block:
            raise ValueError(
                f"{OP}: cu_blocks runs from {low} to {high} in steps of {least}..{most}; allowed: "
                f"within 0..{k.shape[1]}, steps of 0..block = {block}"
            )


# --- the public function ----------------------------------------------------------------------------------------------


def block_summary(
    k: Tensor,
    block: int,
    *,
    mode: str = "mean",
    stride: int | None = None,
    weight: Tensor | None = None,
    top: int | None = None,
    lengths: Tensor | None = None,
    cu_blocks: Tensor | None = None,
    from_pos: int = 0,
    backend: str | None = None,
) -> BlockSummary:
    """Summaries of the blocks of k; the module docstring has the modes and their sources.

    ==========  ===============================  =====================================================================
    argument    shape                            dtype and meaning
    ==========  ===============================  =====================================================================
    k           [B, T, HKV, D]                   float32, bfloat16, float16 or float64
    block       int                              tokens of a block; with cu_blocks the most that one has
    stride      int                              tokens from one block to the next; None: block. 1..block
    weight      [B, T, HKV], [B, T, HKV, D]      k's dtype or float32, with "topr" and with "gated"
    top         int                              tokens that "topr" averages; equal weights by low index, −inf and NaN
                                                 weights never
    lengths     [B]                              int32/int64 in 0..T: tokens of each row; later blocks have count 0
    cu_blocks   [N+1]                            int32/int64 bounds of blocks of any size, with B = 1; need not begin at
                                                 0 or end at T
    from_pos    int                              0..T: only blocks that end behind this token, the others having been
                                                 summarised before; block j of the result is block j + first with
                                                 first = max(0, ⌊(from_pos − block) / stride⌋ + 1)
    ==========  ===============================  =====================================================================

    Returns BlockSummary(values [B, N, HKV, D] in k's dtype, 2D with "minmax"; counts [B, N] int32), N = ⌈T/stride⌉ −
    first. values are differentiable in k and weight ("mean" once on `cpu`). Raises ValueError, TypeError, BackendError.
    """
    check.rank(OP, "k", k, "[B, T, HKV, D]")
    check.dtype(OP, "k", k, check.FLOATS)
    check.choice(OP, "mode", mode, MODES)
    _check_size("block", block, 1)
    if stride is not None:
        _check_size("stride", stride, 1, block)
    _check_size("from_pos", from_pos, 0, k.shape[1])
    _check_weight(k, weight, mode, top)
    if top is not None:
        _check_size("top", top, 1, block)
    _check_bounds(k, block, stride, cu_blocks, from_pos, lengths)
    if lengths is not None:
        check.lengths(OP, lengths, k)
    grad = check.needs_grad(k, weight)
    features = {
        "backward": grad, "backward of max and minmax": grad and mode != "mean", "topr and gated": mode not in _IN_CPP
    }  # fmt: skip
    request = Request(k.device.type, k.dtype, (), frozenset(name for name, given in features.items() if given))
    name = backends.choose(OP, request, backend, lambda: check.describe(k=k, weight=weight))
    if name == "cpu":
        bounds = reference.block_bounds(k.shape[1], block, stride, cu_blocks, from_pos, k.device)
        return BlockSummary(*_CPU(*check.contiguous(k, *bounds, lengths), _IN_CPP.index(mode)))
    return reference.chunked(
        k, block, mode=mode, stride=stride, weight=weight, top=top, lengths=lengths, cu_blocks=cu_blocks,
        from_pos=from_pos,
    )  # fmt: skip
