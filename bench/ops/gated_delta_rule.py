"""The gated delta rule: shapes, calls, truth, and the work it cannot avoid."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace

import torch
from support.cases import Case
from support.compare import CEILING
from torch import Tensor

from bench.registry import Call, Entry, Inputs, Results, Work
from memattn import ops
from memattn.reference import gated_delta_rule as reference

CHUNK_SIZES = (16, 32, 64)
PIECE = 2048  # tokens per call of the float64 reference, so that its scratch stays small
TOKENS = ("q", "k", "v", "g", "beta")  # tensors with one row per token
GRADIENTS = (*TOKENS, "initial_state")

# --- shapes ----------------------------------------------------------------------------------------------------------


def sequence(batch: int, length: int, heads: int, value_heads: int, dim: int = 128) -> Case:
    """A case as layers call the op: normalised q and k, decaying gates, no state handed in."""
    heads_text = f"H{heads}" if heads == value_heads else f"H{heads}/{value_heads}"
    return Case(
        f"B{batch} T{length} {heads_text} D{dim}", batch=batch, length=length, heads=heads, value_heads=value_heads,
        key_dim=dim, value_dim=dim, decay=0.1, beta=1.0, state=False,
    )  # fmt: skip


def packed(count: int, length: int, heads: int, value_heads: int, dim: int = 128) -> Case:
    """`count` sequences of `length` tokens along one row."""
    case = sequence(1, count * length, heads, value_heads, dim)
    return replace(
        case, name=case.name.replace(f"B1 T{count * length}", f"{count}xT{length}"), lengths=(length,) * count
    )


def decode(batch: int, heads: int, value_heads: int, dim: int = 128) -> Case:
    """One token per row, with its state."""
    return replace(sequence(batch, 1, heads, value_heads, dim), state=True)


LONG = (2048, 4096, 8192, 16384, 32768, 65536, 131072)
CPU = {
    "training": (sequence(1, 2048, 16, 16), sequence(2, 1024, 8, 16, 64)),
    "long": tuple(sequence(1, length, 4, 4) for length in LONG),
    "decode": (decode(1, 16, 32), decode(8, 16, 32)),
    "decode-cached": (decode(1, 16, 32),),
    "call": (sequence(1, 1, 1, 1, 16),),
}
# Heads and lengths of the tables that fla, FlashQLA and FlashInfer publish.
HEADS = ((2, 8), (16, 32), (16, 64))
GPU = {
    "training": (
        *(sequence(1, length, *heads) for heads in HEADS for length in (2048, 8192, 32768)),
        *(packed(*rows, *heads) for heads in HEADS for rows in ((8, 1024), (4, 8192))),
    ),
    "long": tuple(sequence(1, length, 16, 32) for length in LONG),
    "decode": tuple(decode(batch, 16, 32) for batch in (1, 8, 32, 64, 128, 256)),
    "decode-cached": (),
    "call": (sequence(1, 1024, 4, 4),),
}


# Times faster than Hugging Face's torch function on two cores, as set out for the first CPU shapes.
GOALS = {
    (mode, dtype, CPU[group][0].name): times
    for mode, group, dtype, times in (
        ("fwd", "training", "float32", 3),
        ("fwd", "training", "bfloat16", 10),
        ("fwdbwd", "training", "float32", 5),
        ("fwdbwd", "training", "bfloat16", 14),
        ("step", "decode", "float32", 6),
        ("step", "decode", "bfloat16", 6),
    )
}


def shapes(device: str, mode: str) -> list[tuple[str, Case]]:
    """(group, case) pairs timed in `mode`."""
    table = GPU if device == "cuda" else CPU
    groups = {"step": ("decode", "decode-cached"), "fwd": ("training", "long", "call"), "fwdbwd": ("training",)}[mode]
    return [(group, case) for group in groups for case in table[group]]


def small(case: Case) -> Case:
    """The case with few tokens."""
    lengths = None if case.lengths is None else (33, 0, 37)
    return replace(case, batch=min(case.batch, 2), length=min(case.length, 70), lengths=lengths)


def inputs(case: Case, mode: str, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """Arguments of one call. Cases longer than PIECE tokens repeat a drawn piece: drawing a billion numbers is slow."""
    drawn: Inputs = dict(replace(case, lengths=None, length=min(case.tokens, PIECE)).make(dtype, device, seed))
    for name in TOKENS:
        if isinstance(x := drawn.get(name), Tensor) and x.dim() > 2 and case.tokens > PIECE:
            drawn[name] = x.repeat(1, -(-case.tokens // PIECE), *[1] * (x.dim() - 2))[:, : case.tokens].contiguous()
    if case.lengths is not None:
        drawn["cu_seqlens"] = torch.tensor([0, *itertools.accumulate(case.lengths)], dtype=torch.int32, device=device)
    if mode == "step":
        drawn["state"] = drawn.pop("initial_state")
        del drawn["cu_seqlens"]
    if mode == "fwdbwd":
        for name in GRADIENTS:
            if isinstance(x := drawn.get(name), Tensor):
                x.requires_grad_()
        noise = torch.Generator(device).manual_seed(seed + 1)
        drawn["do"] = torch.randn(drawn["v"].shape, generator=noise, device=device).to(dtype)
    return drawn


# --- calls -----------------------------------------------------------------------------------------------------------


def differentiated(forward, given: Inputs) -> Results:
    """o and the gradient of every input that requires one, for `forward(**arguments) -> (o, final_state)`."""
    arguments = {n: x for n, x in given.items() if n != "do"}
    o, _ = forward(**arguments)
    leaves = {n: x for n, x in arguments.items() if isinstance(x, Tensor) and x.requires_grad}
    gradients = torch.autograd.grad(o, list(leaves.values()), given["do"])
    return {"o": o.detach(), **{f"d{n}": x for n, x in zip(leaves, gradients, strict=True)}}


def forward_only(forward, given: Inputs) -> Results:
    """o alone, without a graph."""
    with torch.no_grad():
        return {"o": forward(**given)[0]}


def call(mode: str, backend: str) -> Call:
    """Our op as users call it: the Python call is part of the time."""
    if mode == "step":

        def step(given: Inputs) -> Results:
            return {"o": ops.gated_delta_rule_step(**given, backend=backend), "state": given["state"]}

        return step

    def forward(**arguments):
        return ops.gated_delta_rule(**arguments, backend=backend)

    run = differentiated if mode == "fwdbwd" else forward_only
    return lambda given: run(forward, given)


def truth(mode: str, given: Inputs) -> Results:
    """Float64 results: the token loop for steps, the chunk form in pieces for sequences (tests prove them equal)."""
    if mode == "step":
        given = given | {"state": given["state"].clone()}
        return {"o": reference.step(**given), "state": given["state"]}
    forward = functools.partial(in_pieces, reference.chunked)
    return (differentiated if mode == "fwdbwd" else forward_only)(forward, given)


def in_pieces(form, *, initial_state, cu_seqlens, **given):
    """`form` applied to PIECE tokens at a time, the state handed on."""
    tokens = {n: x for n in TOKENS if isinstance(x := given.get(n), Tensor) and x.dim() > 2}
    rest = {n: x for n, x in given.items() if n not in tokens}
    outputs, state = [], None
    bounds = [0, given["q"].shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    for n, (begin, end) in enumerate(itertools.pairwise(bounds)):
        state = initial_state if initial_state is None or cu_seqlens is None else initial_state[n : n + 1]
        for a in range(begin, end, PIECE):
            part = {n: x[:, a : min(a + PIECE, end)] for n, x in tokens.items()}
            o, state = form(**part, **rest, initial_state=state, output_final_state=True)
            outputs.append(o)
    return torch.cat(outputs, 1), state


# --- the work that no implementation avoids --------------------------------------------------------------------------


def chunk_flops(c: int, K: int, V: int, backward: bool) -> int:
    """Multiplies and adds of the matrix products of one chunk of c tokens and a value head, triangles counted as such.

    Forward: K S0, Q S0, K̂ᵀ Vn; L, A; the triangular solve of Vn; A Vn. Backward: K̂ dS1, (e^G Q)ᵀ dO, Kᵀ dR, dO S0ᵀ,
    dR S0ᵀ, Vn dS1ᵀ; Aᵀ dO, the solve of dX; dA, dL; M2 K, M1 K, M1ᵀ Q, (β M2)ᵀ K. Recomputation is not counted.
    """
    state, full, strict = 2 * c * K * V, c * (c + 1), c * (c - 1)
    flops = 3 * state + (strict + full) * K + (strict + full) * V
    if backward:
        flops += 6 * state + (full + strict) * V + (full + strict) * V + 2 * (strict + full) * K
    return flops


def sequence_flops(length: int, K: int, V: int, backward: bool, chunk_size: int) -> int:
    """The same for a sequence of `length` tokens; the last chunk may be shorter."""
    full, rest = divmod(length, chunk_size)
    return full * chunk_flops(chunk_size, K, V, backward) + (chunk_flops(rest, K, V, backward) if rest else 0)


def step_flops(tokens: int, K: int, V: int) -> int:
    """Per value head: k S, q S and the rank-one write, for each token."""
    return tokens * 3 * 2 * K * V


def tensor_bytes(case: Case, dtype: torch.dtype, state: bool) -> dict[str, int]:
    """Bytes of each tensor of a call."""
    size, gates = dtype.itemsize, case.batch * case.tokens * case.value_heads
    keys, values = case.batch * case.tokens * case.heads * case.key_dim, gates * case.value_dim
    return {
        "q": keys * size,
        "k": keys * size,
        "v": values * size,
        "g": 0 if case.decay is None else gates * 4,
        "beta": 0 if case.beta is None else gates * size,
        "state": case.sequences * case.value_heads * case.key_dim * case.value_dim * 4 if state else 0,
        "o": values * size,
    }


def work(case: Case, mode: str, dtype: torch.dtype) -> Work:
    """Bytes and FLOPs of one call; FLOPs for the chunk size that needs fewest."""
    sizes = tensor_bytes(case, dtype, case.state)
    if mode == "step":
        flops = case.batch * case.value_heads * step_flops(case.tokens, case.key_dim, case.value_dim)
        return Work(sum(sizes.values()) + sizes["state"], flops)  # the state is read and written
    lengths = case.lengths or (case.length,) * case.batch
    backward = mode == "fwdbwd"
    flops = min(
        sum(sequence_flops(n, case.key_dim, case.value_dim, backward, c) for n in lengths) * case.value_heads
        for c in CHUNK_SIZES
    )
    # Backward reads the inputs and do, and writes a gradient beside each input.
    read_again = sum(sizes.values()) - sizes["o"]
    return Work(sum(sizes.values()) + backward * (2 * read_again + sizes["o"]), flops)


# --- the entry -------------------------------------------------------------------------------------------------------


ENTRY = Entry(
    op="gated_delta_rule",
    modes=("fwd", "fwdbwd", "step"),
    shapes=shapes,
    small=small,
    tiny=lambda case: replace(sequence(1, 2, 1, 1, 16), state=case.state),
    inputs=inputs,
    call=call,
    truth=truth,
    work=work,
    ceiling=CEILING,
    mutated={"step": ("state",)},
    peers=("huggingface", "fla"),
    goals=GOALS,
)
