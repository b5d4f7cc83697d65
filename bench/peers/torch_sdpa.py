"""torch's scaled_dot_product_attention, in its own layout: the transposes of q, k and v are views.

To RAT, sparse attention and block retrieval it is what they stand in for: (causal) attention over all tokens, another
function.
"""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path

import torch
from torch.nn import functional as F

from bench.compare import Candidate
from bench.registry import Inputs, Results

LONGEST_MASK = 4096  # tokens


def forward(*, q, k, v, window):
    """q, k, v [B,T,H,D] -> o [B,T,H,D]. A window is a mask of T×T values there."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if window is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    if q.shape[2] > LONGEST_MASK:
        raise NotImplementedError(f"a window takes a mask of T×T values, here {q.shape[2]}²")
    position = torch.arange(q.shape[2], device=q.device)
    ahead = position[:, None] - position
    return F.scaled_dot_product_attention(q, k, v, (ahead >= 0) & (ahead < window)).transpose(1, 2)


def decode(given):
    """The last query [B,1,HQ,D] over a full cache [B,S,HKV,D]."""
    q, k, v = (given[name].transpose(1, 2) for name in ("q", "k_cache", "v_cache"))
    with torch.no_grad():
        return {"o": F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)}


@cache
def _of_equal_width(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, length: int
) -> list[torch.Tensor]:
    """q, k, v, do [B, H, T, D] for `length` keys, and for one query of a step."""
    batch, tokens, heads, dim = shape
    noise = torch.Generator(device).manual_seed(0)
    sizes = (tokens, length, length, tokens)
    return [torch.randn(batch, heads, n, dim, generator=noise, device=device).to(dtype) for n in sizes]


def instead_of_rat(mode: str, given: Inputs) -> Results:
    """Attention over as many tokens, of v's heads; the tensors are its own."""
    v = given["v"]
    length = int(given["length"].max()) if mode == "step" else v.shape[1]
    q, k, v, do = _of_equal_width(tuple(v.shape), v.dtype, v.device, length)
    if mode != "fwdbwd":
        with torch.no_grad():
            return {"o": F.scaled_dot_product_attention(q, k, v, is_causal=mode == "fwd")}
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o = F.scaled_dot_product_attention(*leaves, is_causal=True)
    return {"o": o.detach(), **dict(zip(("dq", "dk", "dv"), torch.autograd.grad(o, leaves, do), strict=True))}


def over_everything(mode: str, given: Inputs) -> Results:
    """Attention to all tokens instead of the listed ones; of several queries the causal one."""
    leaves = [given[n] for n in "qkv"]
    q, k, v = (x.transpose(1, 2) for x in leaves)
    grouped, causal = q.shape[1] != k.shape[1], q.shape[2] > 1
    with torch.set_grad_enabled(mode == "fwdbwd"):
        o = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped).transpose(1, 2)
    if mode == "fwd":
        return {"o": o}
    gradients = torch.autograd.grad(o, leaves, given["do"])
    return {"o": o.detach(), **dict(zip(("dq", "dk", "dv"), gradients, strict=True))}


def heads_first(given: Inputs) -> Results:
    """One query over a cache in the layout that suits torch best, the heads of a group as rows; tensors of its own."""
    (_, _, heads, dim), (_, tokens, key_heads, _), q = given["q"].shape, given["k"].shape, given["q"]
    q, k, v, _ = _of_equal_width((1, heads // key_heads, key_heads, dim), q.dtype, q.device, tokens)
    with torch.no_grad():
        return {"o": F.scaled_dot_product_attention(q, k, v)}


def gathered(given: Inputs) -> Results:
    """The listed tokens of one query copied together, then attention to them."""
    q, k, v, blocks, unit = (given[n] for n in ("q", "k", "v", "indices", "unit"))
    if q.shape[1] > 1:
        raise NotImplementedError("a copy of the listed tokens for each of several queries does not fit")
    rows = (blocks.long()[0, 0][..., None] * unit + torch.arange(unit, device=q.device)).flatten(1)  # [HKV, m]
    head = torch.arange(k.shape[2], device=q.device)[:, None]
    with torch.no_grad():
        k, v = k[0, rows, head][None], v[0, rows, head][None]
        return {"o": F.scaled_dot_product_attention(q.transpose(1, 2), k, v, enable_gqa=True).transpose(1, 2)}


def candidates(op: str, mode: str, device: str, wheel: Path | None) -> list[Candidate | tuple[str, str]]:
    """torch itself. `wheel` is another peer's."""
    if op == "attention_decode":
        return [Candidate("torch SDPA", torch.__version__, decode)]
    if op == "rat_attention":
        call = partial(instead_of_rat, mode)
        return [Candidate("torch SDPA of equal width", torch.__version__, call, judged=False)]
    if op == "sparse_attention":
        call = partial(over_everything, mode)
        everything = Candidate("torch SDPA over everything", torch.__version__, call, judged=False)
        return [everything] + ([Candidate("torch gather + SDPA", torch.__version__, gathered)] if mode == "fwd" else [])
    if op == "block_retrieval":
        calls = {"": partial(over_everything, mode), ", heads first": heads_first}
        return [
            Candidate(f"torch SDPA over everything{layout}", torch.__version__, call, judged=False)
            for layout, call in calls.items()
        ]
    if op != "attention":
        return []
    from bench.ops.attention import runner

    return [Candidate("torch SDPA", torch.__version__, lambda given: runner(mode)(forward, given))]
