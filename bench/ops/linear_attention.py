"""Linear attention: shapes, calls, truth, and the work it cannot avoid."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from support.compare import CEILING
from support.linear import LinearCase, as_op

from bench.ops import gated_delta_rule as delta
from bench.registry import Call, Entry, Inputs, Results, Work
from memattn import ops
from memattn.reference import linear_attention as reference

# --- shapes ----------------------------------------------------------------------------------------------------------


def case(batch: int, length: int, heads: int, value_heads: int, key_dim: int = 128, value_dim: int = 128, **more):
    """A case as layers call the op, no state handed in. A gate per token unless `more` says otherwise."""
    more = {"decay": 0.1, "state": False} | more
    heads_text = f"H{heads}" if heads == value_heads else f"H{heads}/{value_heads}"
    dims = f"D{key_dim}" if key_dim == value_dim else f"K{key_dim} V{value_dim}"
    words = [word for word, wanted in (("per head", "per_head"), ("normalised", "normalize")) if more.get(wanted)]
    return LinearCase(
        " ".join((f"B{batch} T{length} {heads_text} {dims}", *words)), batch=batch, length=length, heads=heads,
        value_heads=value_heads, key_dim=key_dim, value_dim=value_dim, beta=None, **more,
    )  # fmt: skip


LONG = (2048, 4096, 8192, 16384, 32768, 65536, 131072)
CPU = {
    "training": (
        case(1, 2048, 16, 16),
        case(1, 2048, 16, 16, per_head=True),
        case(1, 2048, 16, 16, normalize=True),
        case(2, 1024, 8, 16, 64, 64),
        case(1, 2048, 1, 24, 256),  # the state space layer of Falcon-H1 3B, one group
    ),
    "long": tuple(case(1, length, 4, 4) for length in LONG),
    "decode": (case(1, 1, 16, 32, state=True), case(8, 1, 16, 32, state=True, normalize=True)),
}
# The published heads of Lightning Attention (MiniMax) and Mamba-2 (Nemotron-H).
GPU = {
    "training": (case(1, 8192, 64, 64, per_head=True), case(1, 8192, 8, 128, 128, 64)),
    "long": tuple(case(1, length, 16, 16) for length in LONG),
    "decode": tuple(case(batch, 1, 64, 64, state=True) for batch in (1, 32, 256)),
}


def shapes(device: str, mode: str) -> list[tuple[str, LinearCase]]:
    """(group, case) pairs timed in `mode`."""
    groups = {"step": ("decode",), "fwd": ("training", "long"), "fwdbwd": ("training",)}[mode]
    return [(group, c) for group in groups for c in (GPU if device == "cuda" else CPU)[group]]


# --- calls -----------------------------------------------------------------------------------------------------------


def call(mode: str, backend: str) -> Call:
    """Our op as users call it: the Python call is part of the time."""
    if mode == "step":

        def step(given: Inputs) -> Results:
            return {"o": ops.linear_attention_step(**given, backend=backend), "state": given["state"]}

        return step
    run = delta.differentiated if mode == "fwdbwd" else delta.forward_only
    return lambda given: run(functools.partial(ops.linear_attention, backend=backend), given)


def truth(mode: str, given: Inputs) -> Results:
    """Float64 results: the token loop for steps, the chunk form in pieces for sequences (tests prove them equal)."""
    if mode == "step":
        normalize, given = given["normalize"], {n: x for n, x in given.items() if n != "normalize"}
        given["state"] = given["state"].clone()
        rows = reference.step(**given, normaliser=normalize)
        return {"o": reference.divide(rows) if normalize else rows, "state": given["state"]}
    forward = functools.partial(delta.in_pieces, as_op(reference.chunked))
    return (delta.differentiated if mode == "fwdbwd" else delta.forward_only)(forward, given)


# --- the work that no implementation avoids --------------------------------------------------------------------------


def chunk_flops(c: int, K: int, V: int, backward: bool) -> int:
    """Multiplies and adds of the matrix products of one chunk of c tokens and a value head, triangles counted as such.

    Forward: Q S0, K̂ᵀ V; A; A V. Backward: K̂ dS1, (e^G Q)ᵀ dO, dO S0ᵀ, V dS1ᵀ; Aᵀ dO, dA; M K, Mᵀ Q. Recomputation is
    not counted.
    """
    state, full = 2 * c * K * V, c * (c + 1)
    flops = 2 * state + full * (K + V)
    return flops + 4 * state + 2 * full * (K + V) if backward else flops


def work(case: LinearCase, mode: str, dtype: torch.dtype) -> Work:
    """Bytes and FLOPs of one call; FLOPs for the chunk size that needs fewest. A normaliser is one more column."""
    V = case.value_dim + case.normalize
    sizes = delta.tensor_bytes(case, dtype, case.state)
    sizes["state"] = case.sequences * case.value_heads * case.key_dim * V * 4 * case.state
    if case.per_head and case.decay is not None:
        sizes["g"] = case.value_heads * 4
    if mode == "step":
        flops = case.batch * case.value_heads * case.tokens * 2 * 2 * case.key_dim * V
        return Work(sum(sizes.values()) + sizes["state"], flops)  # the state is read and written
    backward = mode == "fwdbwd"

    def flops_of(chunk_size: int) -> int:
        full, rest = divmod(case.length, chunk_size)
        return full * chunk_flops(chunk_size, case.key_dim, V, backward) + chunk_flops(rest, case.key_dim, V, backward)

    flops = case.batch * case.value_heads * min(map(flops_of, delta.CHUNK_SIZES))
    read_again = sum(sizes.values()) - sizes["o"]  # and a gradient beside each input
    return Work(sum(sizes.values()) + backward * (2 * read_again + sizes["o"]), flops)


# --- the entry -------------------------------------------------------------------------------------------------------


ENTRY = Entry(
    op="linear_attention",
    modes=("fwd", "fwdbwd", "step"),
    shapes=shapes,
    small=lambda case: replace(case, batch=min(case.batch, 2), length=min(case.length, 70)),
    tiny=lambda c: case(1, 2, 1, 1, 16, 16, state=c.state, normalize=c.normalize),
    inputs=delta.inputs,
    call=call,
    truth=truth,
    work=work,
    ceiling=CEILING,
    mutated={"step": ("state",)},
    peers=("linear_forms",),
    goals={},
)
