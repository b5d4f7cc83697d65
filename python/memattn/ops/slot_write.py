"""Slot write: memory slots gather from themselves and from a segment of tokens, in one softmax.

    s_ij = (scale / τ) q_i·k_j        ℓ_i = log Σ_{j∈M(i)} e^{s_ij}        o_i = Σ_{j∈M(i)} e^{s_ij − ℓ_i} v_j

M(i) is every token of the segment together with slot i itself (see="own": slots never see one another), all slots
("all"), or nothing else ("none"). o is the update that `slot_gate` then writes into the slots. τ < 1 sharpens.

Sources: "own" with τ is Memformer (Wu et al. 2020, arXiv 2010.06891), with all keys projected MemBART; "none" is the
memory attention of DT-Mem's released code (Kang et al. 2023, arXiv 2305.16338).

It is attention over the tokens whose softmax begins with what each slot has of the slots: the score and value of its
own key, or ℓ and o of attention over all of them. Nothing is concatenated, and no second pass joins the two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memattn import backends
from memattn.backends import Limits, Request
from memattn.ops import _checks as check
from memattn.ops._library import resolve
from memattn.ops._masks import settings
from memattn.reference import slot_write as reference
from memattn.reference.attention import AttentionOutput, accumulate_dtype
from memattn.reference.attention_mask import Mask

OP = "slot_write"
SEE = ("own", "all", "none")

# --- backends ---------------------------------------------------------------------------------------------------------

_FEATURES = frozenset({"backward", "lengths", "packed"})
_16_32 = (torch.float32, torch.bfloat16, torch.float16)
backends.register(OP, "triton", Limits(("cuda",), _16_32, backends.needs_triton, features=_FEATURES))
backends.register(OP, "cpu", Limits(("cpu",), check.FLOATS, backends.needs_native("_C"), features=_FEATURES))
backends.register(OP, "chunked", Limits(("cpu", "cuda", "xpu"), check.FLOATS, backends.always, features=_FEATURES))

_PASSED = check.Passed()
_ATTENTION = {name: resolve(f"attention_{name}") for name in ("cpu", "triton")}
_EVERYTHING = settings(Mask(causal=False))


# --- checks -----------------------------------------------------------------------------------------------------------


def _check_tensors(q, k_self, v_self, k, v, see, packed):
    check.rank(OP, "q", q, "[N, M, H, K]")
    check.dtype(OP, "q", q, check.FLOATS)
    check.rank(OP, "k", k, "[B, T, H, K]")
    check.rank(OP, "v", v, "[B, T, H, V]")
    sequences, slots, heads, key_dim = q.shape
    if slots == 0 or heads == 0:
        raise ValueError(f"{OP}: q has shape {list(q.shape)}; expected at least one slot and one head")
    batch, length = (1 if packed else sequences), k.shape[1]
    check.shape(OP, "k", k, "[B, T, H, K]", (batch, length, heads, key_dim))
    check.shape(OP, "v", v, "[B, T, H, V]", (batch, length, heads, v.shape[3]))
    check.head_dim(OP, "K", key_dim)
    check.head_dim(OP, "V", v.shape[3])
    own = {"k_self": k_self, "v_self": v_self}
    for name, x in own.items():
        if (x is None) != (see == "none"):
            given = "None" if x is None else "given"
            raise ValueError(
                f"{OP}: {name} is {given} with see={see!r}; see='none' takes no slots, the others need them"
            )
    if k_self is not None:
        check.shape(OP, "k_self", k_self, "[N, M, H, K]", q.shape)
        check.shape(OP, "v_self", v_self, "[N, M, H, V]", (sequences, slots, heads, v.shape[3]))
    for name, x in {**own, "k": k, "v": v}.items():
        if x is not None:
            check.dtype(OP, name, x, (q.dtype,), " like q")
            check.device(OP, name, x, q, "q")


def _check_positive(name, value):
    number = isinstance(value, (int, float, torch.SymFloat)) and not isinstance(value, bool)
    if not (number and 0 < value < float("inf")):
        raise ValueError(f"{OP}: {name} is {value!r}; expected a finite number > 0")


def _check_sequences(q, k, lengths, cu_seqlens):
    if lengths is not None and cu_seqlens is not None:
        raise ValueError(f"{OP}: lengths and cu_seqlens are both given; allowed: one")
    if cu_seqlens is not None:
        check.cu_seqlens(OP, cu_seqlens, k)
        check.shape(OP, "cu_seqlens", cu_seqlens, "[N+1] with N = q.shape[0]", (q.shape[0] + 1,))
    if lengths is not None:
        check.lengths(OP, lengths, k)


# --- the cpu and triton backends --------------------------------------------------------------------------------------


def _bounds(q: Tensor, k: Tensor, lengths: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """cu_seqlens of slots and of tokens laid end to end. Tokens behind a row's length are a sequence without slots."""
    if cu_seqlens is not None:
        return torch.arange(q.shape[0] + 1, dtype=cu_seqlens.dtype, device=q.device) * q.shape[1], cu_seqlens
    if lengths is None:
        return None
    row = torch.arange(2 * q.shape[0] + 1, device=q.device)
    ends = torch.stack([torch.zeros_like(lengths), lengths], 1).flatten().long()
    tokens = row // 2 * k.shape[1] + torch.nn.functional.pad(ends, (0, 1))
    return (row + 1) // 2 * q.shape[1], tokens


def _laid_out(bounds, *tensors):
    """Rows laid end to end where there are bounds."""
    return [x if x is None or bounds is None else x.reshape(1, -1, *x.shape[2:]) for x in tensors]


def _gathered(name, q, k, v, scores, values, bounds, scale):
    """Attention of slots over tokens that begins from scores and values; with bounds over both laid end to end."""
    q_, k_, v_, *first = _laid_out(bounds, q, k, v, scores, values)
    tensors = check.contiguous(q_, k_, v_, None, None, *(bounds or (None, None)), *first)
    o, lse = _ATTENTION[name](*tensors, *_EVERYTHING, False, scale)
    return o.view(*q.shape[:3], v.shape[3]), lse.view(q.shape[:3])


def _serve(name, q, k_self, v_self, k, v, see, scale, bounds):
    """The softmax over the tokens begins from what the slot takes from slots."""
    scores = values = None
    if see == "own":
        dtype = accumulate_dtype(q.dtype)
        scores, values = scale * (q.to(dtype) * k_self.to(dtype)).sum(-1), v_self
    elif see == "all":
        values, scores = _gathered(name, q, k_self, v_self, None, None, None, scale)
    return AttentionOutput(*_gathered(name, q, k, v, scores, values, bounds, scale))


# --- the public function ----------------------------------------------------------------------------------------------


def slot_write(
    q: Tensor,
    k_self: Tensor | None,
    v_self: Tensor | None,
    k: Tensor,
    v: Tensor,
    *,
    see: str = "own",
    tau: float = 1.0,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> AttentionOutput:
    """What M memory slots per sequence gather from a segment; the module docstring has the equations and sources.

    ==============  ==================  ======================================================================
    argument        shape               dtype and meaning
    ==============  ==================  ======================================================================
    q               [N, M, H, K]        float32, bfloat16, float16 or float64, the same for all: the slots' queries
    k_self, v_self  [N, M, H, K|V]      the slots as keys and values; None with see="none"
    k, v            [B, T, H, K|V]      the tokens; B = N, or 1 with cu_seqlens
    lengths         [N]                 int32/int64 in 0..T: row n has tokens 0..lengths[n]−1
    cu_seqlens      [N+1]               int32/int64 bounds of the N sequences packed along T
    ==============  ==================  ======================================================================

    see: "own" (slot i sees itself and the tokens), "all" (all slots and the tokens), "none" (the tokens). tau > 0
    divides the scores. scale None means K**-0.5. T ≥ 0 and sequences without tokens are legal; K, V in 16..256.

    Returns AttentionOutput(o [N, M, H, V] in q's dtype, lse [N, M, H] natural log, float32 or float64 with float64 q).
    A slot that sees nothing ("none", no token) gives o = 0, lse = −inf. Differentiable once, through o and lse, in all
    five tensors. Raises ValueError, TypeError, BackendError.
    """
    signature = _PASSED.signature(q, k_self, v_self, k, v, see, tau, scale, cu_seqlens is None)
    if signature not in _PASSED:
        check.choice(OP, "see", see, SEE)
        _check_positive("tau", tau)
        if scale is not None:
            _check_positive("scale", scale)
        _check_tensors(q, k_self, v_self, k, v, see, cu_seqlens is not None)
        _PASSED.add(signature)
    _check_sequences(q, k, lengths, cu_seqlens)
    features = {
        "backward": check.needs_grad(q, k_self, v_self, k, v), "lengths": lengths is not None,
        "packed": cu_seqlens is not None,
    }  # fmt: skip
    wanted = frozenset(name for name, given in features.items() if given)
    request = Request(q.device.type, q.dtype, (("K", q.shape[3]), ("V", v.shape[3])), wanted)
    name = backends.choose(OP, request, backend, lambda: check.describe(q=q, k_self=k_self, v_self=v_self, k=k, v=v))
    if name == "chunked":
        with torch.autocast(q.device.type, enabled=False):
            return reference.chunked(
                q, k_self, v_self, k, v, see=see, tau=tau, lengths=lengths, cu_seqlens=cu_seqlens, scale=scale
            )
    scale = float((q.shape[3] ** -0.5 if scale is None else scale) / tau)
    return _serve(name, q, k_self, v_self, k, v, see, scale, _bounds(q, k, lengths, cu_seqlens))
