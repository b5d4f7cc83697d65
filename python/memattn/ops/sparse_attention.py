"""Attention of each query to the tokens or blocks that its own list names.

    s_ij = scale · q_i·k_j + bias_ie        ℓ_i = log(Σ_{e∈I(i)} Σ_{j∈e} e^{s_ij} + Σ_r e^{sink_r})
    o_i = Σ_{e∈I(i)} Σ_{j∈e} e^{s_ij − ℓ_i} v_j

I(i) is a list of tokens (unit=1: entry x is token x) or of blocks (unit=b: entry x is tokens xb … xb + b − 1), one per
query and key head, shared by the query heads of that key head. It is what the selection of retrieval methods ends in:
kNN memories (Memorizing Transformers, Wu et al. 2022, arXiv 2203.08913), block memories (InfLLM, arXiv 2402.04617),
trained block sparsity (NSA, arXiv 2502.11089; MoBA, arXiv 2502.13189) and token sparsity (DeepSeek-V3.2's DSA). The
lists are constants: they get no gradient. Because ℓ is differentiable, the result joins with attention over other keys
(a window, a summary) exactly, by `merge_states`. Backward, P again from ℓ:

    dS_ij = P_ij (dO_i·v_j − Δ_i + dℓ_i)    Δ_i = dO_i·O_i    dsink = Σ_i e^{sink − ℓ_i} (dℓ_i − Δ_i)
    dq_i = scale Σ_j dS_ij k_j    dk_j = scale Σ_i dS_ij q_i    dv_j = Σ_i P_ij dO_i    dbias_ie = Σ_{j∈e} dS_ij

dK and dV are summed over inverted lists (which queries name a block), in the order of the queries: no atomics.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memattn import backends
from memattn.backends import Limits, Request
from memattn.ops import _checks as check
from memattn.ops._library import Differentiable, define_differentiable, resolve
from memattn.reference import sparse_attention as reference
from memattn.reference.attention import AttentionOutput, accumulate_dtype, one_sink

OP = "sparse_attention"


# --- the op: schema, shapes, gradients --------------------------------------------------------------------------------

_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor indices, Tensor? counts, Tensor? q_positions, Tensor? bias, Tensor? sink, "
    "Tensor? page_table, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, int unit, float scale"
)
_TENSORS, _BIAS, _SINK = 11, 6, 7  # how many; places of two


def _fake(q, k, v, *rest):
    o = q.new_empty(*q.shape[:3], v.shape[3])
    return o, q.new_empty(q.shape[:3], dtype=accumulate_dtype(q.dtype))


def _backward_fake(do, dlse, o, lse, q, k, v, *rest):
    optional = (lse.new_empty(0) if x is None else torch.empty_like(x) for x in (rest[_BIAS - 3], rest[_SINK - 3]))
    memory = (torch.empty_like(x) if rest[-1] else x.new_empty(0) for x in (k, v))
    return torch.empty_like(q), *memory, *optional


def _save(args, outputs):
    return (*args[:_TENSORS], *outputs)


def _backward(op, saved, args, grads):
    *tensors, o, lse = saved
    do, dlse = grads
    do = torch.zeros_like(o) if do is None else do.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    memory = tensors[1].requires_grad or tensors[2].requires_grad  # a frozen one may be too large for gradients
    dq, dk, dv, dbias, dsink = op(do, dlse, o, lse, *tensors, *args[_TENSORS:], memory)
    dk, dv = (dk, dv) if memory else (None, None)
    dbias = None if tensors[_BIAS] is None else dbias
    dsink = None if tensors[_SINK] is None else dsink
    return dq, dk, dv, None, None, None, dbias, dsink, *(None,) * (len(args) - 8)


FAMILY = Differentiable(
    schema=f"({_ARGUMENTS}) -> (Tensor, Tensor)",
    backward_schema=f"(Tensor do, Tensor? dlse, Tensor o, Tensor lse, {_ARGUMENTS}, bool memory)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    backward_fake=_backward_fake,
    outputs=2,
    save=_save,
    backward=_backward,
)

define_differentiable(f"{OP}_cpu", FAMILY)
_FEATURES = frozenset({"backward", "packed", "paged"})
backends.register(OP, "cpu", Limits(("cpu",), check.FLOATS, backends.needs_native("_C"), features=_FEATURES))
_ANYWHERE = Limits(("cpu", "cuda", "xpu"), check.FLOATS, backends.always, features=_FEATURES)
backends.register(OP, "chunked", _ANYWHERE)

_PASSED = check.Passed()
_CPU = resolve(f"{OP}_cpu")


# --- checks -----------------------------------------------------------------------------------------------------------


def _check_memory(q, k, v, page_table):
    batch, _, heads, key_dim = q.shape
    where = "[B, T, HKV, {}]" if page_table is None else "[pages, page, HKV, {}]"
    check.rank(OP, "k", k, where.format("K"))
    rows = batch if page_table is None else k.shape[0]
    check.shape(OP, "k", k, where.format("K"), (rows, *k.shape[1:3], key_dim))
    check.rank(OP, "v", v, where.format("V"))
    check.shape(OP, "v", v, where.format("V"), (*k.shape[:3], v.shape[3]))
    if k.shape[2] == 0 or heads == 0 or heads % k.shape[2]:
        raise ValueError(f"{OP}: q has {heads} heads; expected a positive multiple of k's {k.shape[2]} heads")
    check.head_dim(OP, "K", key_dim)
    check.head_dim(OP, "V", v.shape[3])


def _check_lists(q, k, indices, counts, q_positions, bias):
    (batch, length), key_heads = q.shape[:2], k.shape[2]
    for name, x in (("indices", indices), ("bias", bias)):
        if x is None:
            continue
        check.rank(OP, name, x, "[B, S, HKV or 1, n]")
        if x.shape[2] not in (1, key_heads):
            raise ValueError(f"{OP}: {name} has {x.shape[2]} heads; expected 1 or k's {key_heads}")
        expected = (batch, length, x.shape[2], indices.shape[3])
        check.shape(OP, name, x, "[B, S, HKV or 1, n]", expected)
    if counts is not None:
        check.shape(OP, "counts", counts, "[B, S, heads of indices]", indices.shape[:3])
    if q_positions is not None:
        check.shape(OP, "q_positions", q_positions, "[B, S]", (batch, length))


def _check_tensors(q, k, v, indices, counts, q_positions, bias, sink, page_table):
    check.rank(OP, "q", q, "[B, S, HQ, K]")
    check.dtype(OP, "q", q, check.FLOATS)
    _check_memory(q, k, v, page_table)
    _check_lists(q, k, indices, counts, q_positions, bias)
    sums, integers = accumulate_dtype(q.dtype), (torch.int32, torch.int64)
    with_q = f" with {check.dtype_name(q.dtype)} q"
    for name, x, allowed, why in (
        ("k", k, (q.dtype,), " like q"),
        ("v", v, (q.dtype,), " like q"),
        ("indices", indices, integers[:1], ""),
        ("counts", counts, integers[:1], ""),
        ("q_positions", q_positions, integers, ""),
        ("bias", bias, (sums,), with_q),
        ("sink", sink, (q.dtype, sums), with_q),
        ("page_table", page_table, integers[:1], ""),
    ):
        if x is not None:
            check.tensor(OP, name, x)
            check.dtype(OP, name, x, allowed, why)
            check.device(OP, name, x, q, "q")
    if sink is not None:
        check.shape(OP, "sink", sink, "[HQ] or [HQ, r]", (q.shape[2], *sink.shape[1:2]))
    if page_table is not None:
        check.rank(OP, "page_table", page_table, "[B, P]")
        check.shape(OP, "page_table", page_table, "[B, P]", (q.shape[0], page_table.shape[1]))


def _check_settings(unit, scale):
    if isinstance(unit, bool) or not isinstance(unit, int) or not 1 <= unit < 2**31:
        raise ValueError(f"{OP}: unit is {unit!r}; expected an integer ≥ 1: tokens of an entry")
    if scale is not None and not (isinstance(scale, (int, float)) and 0 < scale < float("inf")):
        raise ValueError(f"{OP}: scale is {scale!r}; expected a finite number > 0 or None")


def _check_packed(q, k, page_table, cu_seqlens_q, cu_seqlens_k):
    """cu_seqlens_k None means cu_seqlens_q: queries and keys of the same sequences."""
    if cu_seqlens_q is None:
        if cu_seqlens_k is not None:
            raise ValueError(f"{OP}: cu_seqlens_k is given without cu_seqlens_q; packed keys need packed queries")
        return
    if page_table is not None:
        raise ValueError(f"{OP}: page_table is given with cu_seqlens_q; allowed: one of them")
    check.cu_seqlens(OP, cu_seqlens_q, q, "cu_seqlens_q")
    if cu_seqlens_k is None and k.shape[1] != q.shape[1]:
        raise ValueError(f"{OP}: q has {q.shape[1]} packed tokens and k has {k.shape[1]}; expected cu_seqlens_k then")
    if cu_seqlens_k is not None:
        check.cu_seqlens(OP, cu_seqlens_k, k, "cu_seqlens_k")
        check.shape(OP, "cu_seqlens_k", cu_seqlens_k, "[N+1] like cu_seqlens_q", cu_seqlens_q.shape)


def _in_range(name, x, low, high, meaning):
    if check.values_checked(x) and x.numel():
        least, most = (int(bound) for bound in x.aminmax())
        if least < low or most > high:
            raise ValueError(f"{OP}: {name} holds {least}..{most}; allowed: {low}{meaning}..{high}")


def _check_values(k, indices, counts, unit, page_table):
    """Entries beyond the end of a packed sequence shorter than k are left to the kernels, which do not see them."""
    tokens = k.shape[1] if page_table is None else k.shape[1] * page_table.shape[1]
    _in_range("indices", indices, -1, -(-tokens // unit) - 1, " (none)")
    if counts is not None:
        _in_range("counts", counts, 0, indices.shape[3], "")
    if page_table is not None:
        _in_range("page_table", page_table, -1, k.shape[0] - 1, " (no page)")


# --- the public function ----------------------------------------------------------------------------------------------


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    *,
    unit: int = 1,
    counts: Tensor | None = None,
    q_positions: Tensor | None = None,
    bias: Tensor | None = None,
    sink: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> AttentionOutput:
    """Attention over listed tokens or blocks; the module docstring has the equations and sources.

    ==============  ======================  ==================================================================
    argument        shape                   dtype and meaning
    ==============  ======================  ==================================================================
    q               [B, S, HQ, K]           float32, bfloat16, float16 or float64, the same for q, k, v
    k, v            [B, T, HKV, K|V]        HQ a multiple of HKV; with page_table a pool [pages, page, HKV, K|V]
    indices         [B, S, HKV or 1, n]     int32: tokens (unit 1) or blocks of `unit` tokens; −1 anywhere: none.
                                            One head: all key heads read that list
    counts          [B, S, heads of it]     int32 in 0..n: only the first entries of a list count
    q_positions     [B, S]                  int32/int64: a query sees a token at j only if j ≤ its position (causal
                                            inside its own block; a cache that is not full)
    bias            [B, S, HKV or 1, n]     float32: added to the scores of an entry's tokens; −inf hides them
    sink            [HQ] or [HQ, r]         q's dtype or float32: logits in the denominator that have no value
    page_table      [B, P]                  int32: token j lies on page page_table[b, j // page]; −1: no page, its
                                            tokens are not seen
    cu_seqlens_q/k  [N+1]                   int32/int64 bounds of sequences packed along S and T, then B = 1; k
                                            None: as q. Entries and q_positions count within each sequence
    ==============  ======================  ==================================================================

    The last block of a sequence may be partial. The order of a list changes rounding alone. An entry named twice
    counts twice: selections that may overlap must be made one set first. `scale` None means K**-0.5. S, T, n ≥ 0 and
    empty sequences are legal; K, V in 16..256.

    Returns AttentionOutput(o [B, S, HQ, V] in q's dtype, lse [B, S, HQ] natural log, float32). A row whose list names
    nothing it sees gives o = 0, lse = −inf (of sinks: their log-sum) and no gradient. Differentiable once, through o
    and lse, in q, k, v, bias and sink. NaN and inf reach only rows whose lists name the token or its block.

    Raises ValueError (shapes, values, combinations without meaning), TypeError (dtypes), BackendError.
    """
    _check_settings(unit, scale)  # before the signature, where 1, 1.0 and True are the same
    signature = _PASSED.signature(q, k, v, indices, counts, q_positions, bias, sink, page_table, unit, scale)
    if signature not in _PASSED:
        _check_tensors(q, k, v, indices, counts, q_positions, bias, sink, page_table)
        _PASSED.add(signature)
    _check_packed(q, k, page_table, cu_seqlens_q, cu_seqlens_k)
    _check_values(k, indices, counts, unit, page_table)
    given = {
        "backward": check.needs_grad(q, k, v, bias, sink), "packed": cu_seqlens_q is not None,
        "paged": page_table is not None,
    }  # fmt: skip
    features = frozenset(name for name, used in given.items() if used)
    request = Request(q.device.type, q.dtype, (("K", q.shape[3]), ("V", v.shape[3])), features)
    name = backends.choose(OP, request, backend, lambda: check.describe(q=q, k=k, v=v, indices=indices, bias=bias))
    if name == "chunked":
        with torch.autocast(q.device.type, enabled=False):
            return reference.chunked(
                q, k, v, indices, unit=unit, counts=counts, q_positions=q_positions, bias=bias, sink=sink,
                page_table=page_table, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, scale=scale,
            )  # fmt: skip
    tensors = check.contiguous(
        q, k, v, indices, counts, q_positions,
        None if bias is None else bias.expand(-1, -1, k.shape[2], -1),
        None if sink is None else one_sink(sink, accumulate_dtype(q.dtype)),
        page_table, cu_seqlens_q, cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k,
    )  # fmt: skip
    return AttentionOutput(*_CPU(*tensors, unit, q.shape[3] ** -0.5 if scale is None else float(scale)))
