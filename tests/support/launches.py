"""What the compile-only harness compiles of each op: training steps on meta tensors, through the launchers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = ("bfloat16", "float16", "float32", "tf32")  # tf32: float32 where torch's own matmul may use TF32
DIMS = ("128x128", "64x64", "256x256")


@dataclass(frozen=True)
class Launches:
    """step(dtype, case, **options) is one forward and backward call; options default to what is recorded.

    cases, dtypes: what budgets are recorded for. quick: the (dtype, case) pairs of a default run, on sm_90.
    matrices: kernels that multiply matrices. may_spill(arch, dtype, case, kernel): with the reason where it is given.
    same_kernels: options that must not cause another compile, since only sizes and flags differ.
    """

    step: Callable[..., None]
    cases: tuple[str, ...]
    quick: tuple[tuple[str, str], ...]
    dtypes: tuple[str, ...] = DTYPES
    matrices: frozenset[str] = frozenset()
    may_spill: Callable[[int, str, str, str], bool] = lambda *kernel: False
    same_kernels: tuple[dict, ...] = ()


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def kind_of(dtype: str) -> torch.dtype:
    """The tensors' dtype; sets how float32 products may be computed."""
    torch.backends.cuda.matmul.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
    return torch.float32 if dtype == "tf32" else getattr(torch, dtype)


def bounds(packed: bool) -> Tensor | None:
    """cu_seqlens of three sequences."""
    return empty(4, dtype=torch.int32) if packed else None


# --- the ops ----------------------------------------------------------------------------------------------------------


def gated_delta_rule(
    dtype: str, case: str, *, T: int = 256, chunk_size: int = 64, packed: bool = False, state: bool = True,
    train: bool = True, l2norm: bool = True,
) -> None:  # fmt: skip
    from memattn.kernels.gated_delta_rule import forward
    from memattn.kernels.gated_delta_rule_backward import backward

    kind, (K, V), H, HV = kind_of(dtype), map(int, case.split("x")), 2, 4
    q, k, v = (empty(1, T, heads, dim, dtype=kind) for heads, dim in ((H, K), (H, K), (HV, V)))
    initial = empty(3 if packed else 1, HV, K, V) if state else None
    inputs = (q, k, v, empty(1, T, HV), empty(1, T, HV, dtype=kind), initial, bounds(packed))
    settings = (K**-0.5, l2norm, chunk_size, 8)
    o, final, solve, states = forward(*inputs, *settings, state, train)
    if train:
        backward(torch.empty_like(o), final if state else None, *inputs, solve, states, *settings)


def linear_attention(
    dtype: str, case: str, *, T: int = 256, packed: bool = False, state: bool = True, normalize: bool = True
) -> None:
    from memattn.kernels.linear_attention import backward, forward

    kind, (K, V), H, HV = kind_of(dtype), map(int, case.removesuffix(" sum").split("x")), 2, 4
    normalize = not case.endswith("sum")
    q, k, v = (empty(1, T, heads, dim, dtype=kind) for heads, dim in ((H, K), (H, K), (HV, V)))
    initial = empty(3 if packed else 1, HV, K, V + normalize) if state else None
    inputs, settings = (q, k, v, empty(1, T, HV), initial, bounds(packed)), (K**-0.5, normalize, normalize, 64, 8)
    o, weight, final, states = forward(*inputs, *settings, state, True)
    results = (o, weight) if normalize else (None, None)
    backward(torch.empty_like(o), None, final if state else None, *inputs, *results, states, *settings)


def causal_conv1d(dtype: str, case: str, *, T: int = 256) -> None:
    from memattn.kernels.causal_conv1d import backward, forward

    kind, packed, (D, W) = kind_of(dtype), case == "packed", (1, 2) if case == "one channel" else (4096, 4)
    x, weight, bias = (empty(*shape, dtype=kind) for shape in ((1, T, D), (D, W), (D,)))
    initial = empty(3 if packed else 1, D, W - 1)
    y, final = forward(x, weight, bias, initial, bounds(packed), True, True)
    backward(torch.empty_like(y), final, x, weight, bias, initial, bounds(packed), True)


def gated_scan(dtype: str, case: str, *, T: int = 256, D: int = 4096) -> None:
    from memattn.kernels.gated_scan import backward, forward

    kind, packed, chunk = kind_of(dtype), "packed" in case, 0 if "whole" in case else 16
    n = 3 if packed else 1
    g, x, x2 = empty(1, T, D), empty(1, T, D // 8, dtype=kind), empty(1, T, D, dtype=kind)
    inputs = (g, x, x2, empty(n, D), empty(n, D), bounds(packed), True, chunk)
    y, y2, ends, ends2, final, final2 = forward(*inputs, True, chunk > 0, True)
    backward(y, y2, *((ends, ends2) if chunk else (None, None)), final, final2, *inputs)


def attention(
    dtype: str, case: str, *, T: int = 256, q_offset: int = 0, packed: bool = False, sink: bool = True, **mask: int
) -> None:
    from memattn.kernels.attention import forward
    from memattn.kernels.attention_backward import backward

    kind, (dims, _, form) = kind_of(dtype), case.partition(" ")
    (K, V), HQ, HKV = map(int, dims.split("x")), 4, 2
    q, k, v = (empty(1, T, heads, dim, dtype=kind) for heads, dim in ((HQ, K), (HKV, K), (HKV, V)))
    logits, decay = empty(HQ) if sink else None, empty(1, T, HQ, dtype=torch.float64) if form == "decay" else None
    mask = {"causal": 1, "window": 0, "prefix_len": 0, "block_size": 0, "summary": 0} | mask
    settings = (*mask.values(), *((16, 32, 8) if form == "dilated" else (0, 0, 0)), q_offset, False, K**-0.5)
    inputs = (q, k, v, logits, decay, bounds(packed), bounds(packed), None, None)
    o, lse = forward(*inputs, *settings)
    backward(torch.empty_like(o), lse, o, lse, *inputs, *settings)


def segment_memory(
    dtype: str, case: str, *, T: int = 256, size: int = 64, packed: bool = False, state: bool = True,
    beta: bool = True, causal: bool = True,
) -> None:  # fmt: skip
    """A case is KxV and a rule: nothing (delta, normalised), "sum" (neither), "corrected" (ARMT's), "long" segments."""
    from memattn.kernels.segment_memory import forward
    from memattn.kernels.segment_memory_backward import backward

    kind, (dims, _, form) = kind_of(dtype), case.partition(" ")
    (K, V), HQ, H, plain = map(int, dims.split("x")), 4, 2, form == "sum"
    q, k, v = (empty(1, T, heads, dim, dtype=kind) for heads, dim in ((HQ, K), (H, K), (H, V)))
    initial = empty(3 if packed else 1, H, K, V + (not plain)) if state else None
    inputs = (q, k, v, empty(1, T, H, dtype=kind) if beta else None, initial, bounds(packed), bounds(packed))
    size = 2048 if form == "long" else size
    settings = (size, size, not plain, not plain, form == "corrected", causal, 1e-5)
    o, final, table = forward(*inputs, *settings)
    backward(torch.empty_like(o), final if state else None, *inputs, o, table, *settings)


def attention_mass(
    dtype: str, case: str, *, T: int = 256, q_offset: int = 0, packed: bool = False, start: int = 0,
    grouped: bool = False, **mask: int,
) -> None:  # fmt: skip
    from memattn.kernels.attention_mass import forward

    kind, (dim, _, form), HQ, HKV = kind_of(dtype), case.partition(" "), 4, 2
    q, k = (empty(1, T, heads, int(dim), dtype=kind) for heads in (HQ, HKV))
    decay = empty(1, T, HQ, dtype=torch.float64) if form == "decay" else None
    mask = {"causal": 1, "window": 0, "prefix_len": 0, "block_size": 0, "summary": 0} | mask
    settings = (*mask.values(), *((16, 32, 8) if form == "dilated" else (0, 0, 0)), q_offset, False, int(dim) ** -0.5)
    forward(q, k, empty(1, T, HQ), decay, bounds(packed), bounds(packed), *settings, start, 2**31 - 1, grouped)


LENGTHS = tuple({"T": T} for T in (1, 63, 64, 2048, 2049))
LAYOUTS = tuple({**length, "packed": p, "state": s} for length in LENGTHS for p in (False, True) for s in (False, True))
MASKS = ({"causal": 0}, {"causal": 2, "block_size": 64}, {"window": 1}, {"window": 100, "prefix_len": 16})
ATTENTION_LAYOUTS = (*LENGTHS, *MASKS, {"q_offset": 5}, {"packed": True}, {"sink": False})
CHUNK_MATRICES = frozenset(
    f"{name}_kernel" for name in ("prepare", "scan", "output", "reverse", "pairs", "gradient")
)  # l2norm, reduce and divide only stream rows


SEGMENTS = tuple({"size": size, "causal": size < 64} for size in (1, 16, 128))


def _delta_rule_may_spill(arch: int, dtype: str, case: str, kernel: str) -> bool:
    """Whole K×V states of 256 keys in IEEE float32 outgrow the registers in the two sequential kernels."""
    return (dtype, case) == ("float32", "256x256") and kernel in ("scan_kernel", "reverse_kernel")


OPS = {
    "gated_delta_rule": Launches(
        gated_delta_rule,
        cases=DIMS,
        quick=(("bfloat16", "128x128"),),
        matrices=CHUNK_MATRICES,
        may_spill=_delta_rule_may_spill,
        same_kernels=LAYOUTS,
    ),
    "linear_attention": Launches(
        linear_attention,
        cases=(*DIMS, "128x128 sum"),
        quick=(("bfloat16", "128x128"),),
        matrices=CHUNK_MATRICES,
        # Tiles are those of the delta rule; others for older GPUs and float32 wait for a GPU to choose them by.
        may_spill=lambda arch, dtype, case, kernel: arch != 90 or dtype == "float32",
        dtypes=("bfloat16", "float32"),
        same_kernels=LAYOUTS,
    ),
    "attention": Launches(
        attention,
        cases=(*DIMS, "128x128 decay", "128x128 dilated", "256x256 decay"),
        quick=(("bfloat16", "128x128"),),
        matrices=frozenset({"forward_kernel", "queries_kernel", "keys_kernel"}),
        # float32 and the other architectures: tiles chosen, budgets not all recorded yet.
        may_spill=lambda arch, dtype, case, kernel: arch != 90 or dtype == "float32",
        dtypes=("bfloat16", "float32"),
        same_kernels=ATTENTION_LAYOUTS,
    ),
    "attention_mass": Launches(
        attention_mass,
        cases=("64", "128", "256", "128 decay", "128 dilated"),
        quick=(("bfloat16", "128"),),
        matrices=frozenset({"mass_kernel"}),
        # IEEE float32 rows held whole; with decay on sm_100 a few registers more than there are.
        may_spill=lambda arch, dtype, case, kernel: dtype == "float32" or (arch, case) == (100, "128 decay"),
        dtypes=("bfloat16", "float32"),
        same_kernels=(*LENGTHS, *MASKS, {"q_offset": 5}, {"packed": True}, {"start": -32}, {"grouped": True}),
    ),
    "causal_conv1d": Launches(
        causal_conv1d,
        cases=("dense", "packed", "one channel"),
        quick=(("bfloat16", "dense"), ("bfloat16", "packed"), ("float32", "dense"), ("float32", "packed")),
        dtypes=("bfloat16", "float32"),
        same_kernels=LENGTHS,
    ),
    "gated_scan": Launches(
        gated_scan,
        cases=("chunks", "packed, whole", "packed, chunks"),
        quick=(("bfloat16", "chunks"), ("bfloat16", "packed, whole"), ("float32", "packed, chunks")),
        dtypes=("bfloat16", "float32"),
        same_kernels=LENGTHS,
    ),
    "segment_memory": Launches(
        segment_memory,
        cases=("128x128", "128x128 long", "64x64 long", "256x256 long", "128x128 sum", "384x2048 corrected"),
        quick=(("bfloat16", "128x128"), ("bfloat16", "128x128 long")),
        matrices=frozenset(f"{name}_kernel" for name in ("outer", "read", "queries", "values", "keys")),
        # A few registers: IEEE float32 products are unrolled.
        may_spill=lambda arch, dtype, case, kernel: dtype == "float32" and kernel in ("outer_kernel", "read_kernel"),
        dtypes=("bfloat16", "float32"),
        same_kernels=(*LAYOUTS, *SEGMENTS),
    ),
}
