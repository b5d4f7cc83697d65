"""Cases of segment memory, what any correct one obeys, and its fallback with one wrong line each."""

# ruff: noqa: E501 (tables, one case a line)
from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from memattn.reference import segment_memory as reference
from support import relations
from support.compare import evaluate, relative_error, to_float64

TENSORS = ("q", "k", "v", "beta", "initial_state")
RULE = ("segment_size", "key_segment_size", "delta", "normalize", "correction", "causal", "eps")
TOLERANCE = 2e-5


@dataclass(frozen=True)
class SegmentCase:
    """One input of `segment_memory`. `lengths` and `key_lengths` pack sequences along T and S (then batch is 1)."""

    name: str
    batch: int = 2
    length: int = 75
    key_length: int | None = None  # None: length
    heads: int = 4
    key_heads: int = 2
    key_dim: int = 32
    value_dim: int = 40
    lengths: tuple[int, ...] | None = None
    key_lengths: tuple[int, ...] | None = None
    beta: bool = False
    state: bool = True
    segment_size: int = 16
    key_segment_size: int | None = None
    delta: bool = True
    normalize: bool = True
    correction: bool = False
    causal: bool = True
    eps: float = 1e-5

    @property
    def sequences(self) -> int:
        return self.batch if self.lengths is None else len(self.lengths)

    def make(self, dtype=torch.float32, device="cpu", seed=0, grad=False) -> dict[str, object]:
        """Keyword arguments of the op.

        Features are positive, so small that an undivided delta stays
        bounded; with correction z starts so small that neither end of its clip holds for all keys."""
        generator = torch.Generator().manual_seed(seed)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        key_lengths = self.key_lengths or self.lengths
        tokens = self.length if self.lengths is None else sum(self.lengths)
        keys = (tokens if self.key_length is None else self.key_length) if key_lengths is None else sum(key_lengths)

        def uniform(*shape):
            return torch.rand(*shape, generator=generator, dtype=torch.float64)

        def bounds(lengths):
            ends = torch.tensor((0, *(lengths or ()))).cumsum(0).to(torch.int32)
            return None if lengths is None else ends.to(device)

        size = (0.5 if self.normalize else 0.1) * (32 / self.key_dim) ** 0.5
        rows = (self.batch, keys, self.key_heads)
        tensors = {
            "q": uniform(self.batch, tokens, self.heads, self.key_dim).to(dtype),
            "k": (size * uniform(*rows, self.key_dim)).to(dtype),
            "v": (2 * uniform(*rows, self.value_dim) - 1).to(dtype),
            "beta": uniform(*rows).to(dtype) if self.beta else None,
            "initial_state": None,
        }
        if self.state:
            memory = 2 * uniform(self.sequences, self.key_heads, self.key_dim, self.value_dim) - 1
            z = (1 + uniform(self.sequences, self.key_heads, self.key_dim, 1)) * (0.05 if self.correction else 1)
            tensors["initial_state"] = (torch.cat((memory, z), -1) if self.normalize else memory).to(wide)
        tensors = {n: None if x is None else x.to(device).requires_grad_(grad) for n, x in tensors.items()}
        packed = {"cu_seqlens": bounds(self.lengths), "cu_seqlens_k": bounds(self.key_lengths)}
        return tensors | packed | {name: getattr(self, name) for name in RULE}


def as_op(form: Callable) -> Callable:
    """`loop` or `chunked` of the reference with the arguments of the op."""

    def op(*, output_final_state=True, **arguments):
        settings = {name: arguments.pop(name) for name in RULE}
        settings["key_segment_size"] = settings["key_segment_size"] or settings["segment_size"]
        return form(**arguments, rule=reference.Rule(**settings))

    return op


definition = as_op(reference.loop)


class _RoundedProduct(torch.autograd.Function):
    """a b, and the products of its backward, with every operand rounded."""

    @staticmethod
    def forward(ctx, a, b, dtype):
        ctx.save_for_backward(a, b)
        ctx.dtype = dtype
        return _rounded(a, dtype) @ _rounded(b, dtype)

    @staticmethod
    def backward(ctx, dc):
        a, b, dc = (_rounded(x, ctx.dtype) for x in (*ctx.saved_tensors, dc))
        return dc @ b.mT, a.mT @ dc, None


def _rounded(x, dtype):
    return x.to(dtype).to(x.dtype)


def comparator(dtype: torch.dtype) -> Callable:
    """The fallback with the rounding points of a kernel for `dtype`."""
    if dtype.itemsize != 2:
        return as_op(reference.chunked)
    return as_op(functools.partial(reference.chunked, dot=lambda a, b: _RoundedProduct.apply(a, b, dtype)))


INFINI = SegmentCase("infini")
ARMT = SegmentCase("armt", length=66, key_length=20, heads=1, key_heads=1, key_dim=96, value_dim=300, beta=True, segment_size=16, key_segment_size=4, correction=True)  # fmt: skip
ADDITIVE = replace(INFINI, name="additive", delta=False)
PACKED = replace(INFINI, name="packed", batch=1, lengths=(33, 0, 1, 16, 70))
CASES = (
    INFINI,
    ARMT,
    ADDITIVE,
    PACKED,
    *(replace(INFINI, name=f"T{t}", batch=1, length=t) for t in (1, 15, 16, 17, 32)),
    replace(INFINI, name="long segments", length=400, segment_size=150, key_dim=64),
    replace(INFINI, name="from empty", state=False),
    replace(INFINI, name="from empty, no eps", state=False, eps=0.0),
    replace(INFINI, name="one token a segment", length=20, segment_size=1),
    replace(INFINI, name="odd dims", key_dim=40, value_dim=24, heads=3, key_heads=1),
    replace(INFINI, name="undivided", normalize=False),
    replace(ADDITIVE, name="additive, undivided, beta", normalize=False, beta=True),
    replace(ADDITIVE, name="a set", causal=False, beta=True),
    replace(INFINI, name="a set, delta", causal=False),
    replace(PACKED, name="packed, other keys", key_lengths=(5, 40, 0, 32, 9), key_segment_size=8, beta=True, correction=True),
    replace(ARMT, name="writes alone", length=0, key_length=16),
    replace(ARMT, name="reads alone", key_length=0),
    replace(INFINI, name="more queries than segments", length=90, key_length=20),
)  # fmt: skip
EMPTY = (
    replace(INFINI, name="no tokens", length=0),
    replace(INFINI, name="no rows", batch=0),
    replace(PACKED, name="empty sequences", lengths=(0, 0)),
)
SMALL = replace(INFINI, name="small", batch=1, length=50, beta=True, key_dim=16, value_dim=24, correction=True)

# --- relations -------------------------------------------------------------------------------------------------------

CHECKS: dict[str, Callable] = {}


def relation(check):
    """Enter a check in the list under its name."""
    CHECKS[check.__name__] = check
    return check


def forward(op, inputs, **extra):
    """(o, final_state) without gradient."""
    with torch.no_grad():
        return op(**{**inputs, **extra}, output_final_state=True)


def near(actual, expected, what, tolerance=TOLERANCE):
    """Relative error of each pair within tolerance."""
    for x, y in zip(actual, expected, strict=True):
        error = relative_error(x, y)
        assert error <= tolerance, f"{what}: relative error {error:.3g} > {tolerance:.3g}"


def cut(inputs, queries, keys):
    """Slices of the tokens."""
    of = {"q": queries, "k": keys, "v": keys, "beta": keys}
    return {n: x[:, of[n]] if n in of and x is not None else x for n, x in inputs.items()}


@relation
def equals_definition(op, device="cpu"):
    """Forward and all gradients against the float64 loop."""
    for case in (
        SMALL,
        replace(SMALL, correction=False, beta=False, state=False),
        replace(SMALL, delta=False, causal=False),
        replace(SMALL, lengths=(20, 0, 30), key_lengths=(9, 8, 40), key_segment_size=8),
        replace(SMALL, normalize=False, correction=False),
    ):
        inputs = case.make(device=device)
        actual, truth = evaluate(op, inputs), evaluate(definition, to_float64(inputs))
        for name in truth:
            near([actual[name]], [truth[name]], f"{case} {name}")


@relation
def split_at_segment_ends(op, device="cpu"):
    inputs = replace(SMALL, length=64, key_length=32, key_segment_size=8).make(device=device)
    o, final = forward(op, inputs)
    for segments in (1, 2, 3):
        t, s = 16 * segments, 8 * segments
        first, state = forward(op, cut(inputs, slice(0, t), slice(0, s)))
        rest = cut(inputs, slice(t, None), slice(s, None)) | {"initial_state": state}
        second, last = forward(op, rest)
        near((torch.cat([first, second], 1), last), (o, final), f"split after segment {segments}", 1e-6)


@relation
def gradients_through_the_state(op, device="cpu"):
    """A cut leaves every gradient as it is."""
    inputs = SMALL.make(device=device)

    def in_two(**given):
        first, state = op(**cut(given, slice(0, 32), slice(0, 32)), output_final_state=True)
        rest = cut(given, slice(32, None), slice(32, None)) | {"initial_state": state}
        second, last = op(**{**rest, "output_final_state": True})
        return torch.cat([first, second], 1), last

    def without_flag(**given):
        given.pop("output_final_state")
        return in_two(**given)

    whole = evaluate(op, inputs)
    for name, x in evaluate(without_flag, inputs).items():
        near([x], [whole[name]], name)


@relation
def packed_equals_separate(op, device="cpu"):
    inputs = replace(PACKED, beta=True).make(device=device)
    o, final = forward(op, inputs)
    bounds = inputs["cu_seqlens"].tolist()
    for n, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False)):
        part = cut(inputs, slice(a, b), slice(a, b)) | {"cu_seqlens": None}
        part["initial_state"] = inputs["initial_state"][n : n + 1]
        near(forward(op, part), (o[:, a:b], final[n : n + 1]), f"sequence {n}", 1e-6)


@relation
def additive_is_an_exclusive_prefix_sum(op, device="cpu"):
    """Infini: the memory before a segment is the sum of what the earlier ones wrote."""
    inputs = replace(ADDITIVE, length=64, state=False).make(device=device)
    q, k, v = (inputs[n].double().unflatten(1, (4, 16)) for n in ("q", "k", "v"))
    written = torch.einsum("bschk,bschv->bshkv", k, torch.cat((v, torch.ones_like(v[..., :1])), -1))
    before = written.cumsum(1) - written
    rows = torch.einsum("bschgk,bshkv->bschgv", q.unflatten(3, (2, 2)), before).flatten(3, 4).flatten(1, 2)
    expected = rows[..., :-1] / (rows[..., -1:] + inputs["eps"])
    near(forward(op, inputs), (expected, written.sum(1)), "prefix sum")


@relation
def delta_is_affine_in_the_memory(op, device="cpu"):
    """M' = (I − Kᵀ diag(β / (K z + ε)) K) M + Kᵀ β V, segment by segment."""
    inputs = replace(SMALL, correction=False).make(device=device)
    k, v, beta, state = (inputs[n].double() for n in ("k", "v", "beta", "initial_state"))
    memory, z = state[..., :-1], state[..., -1:]
    for s in range(0, k.shape[1], 16):
        K, V, b = (x[:, s : s + 16].transpose(1, 2) for x in (k, v, beta[..., None]))
        step = torch.eye(K.shape[-1], device=device) - K.mT @ (b / (K @ z + inputs["eps"]) * K)
        memory, z = step @ memory + K.mT @ (b * V), z + K.sum(2)[..., None]
    near([forward(op, inputs)[1]], [torch.cat((memory, z), -1)], "affine form")


@relation
def reads_before_it_writes(op, device="cpu"):
    """A segment's own keys and values change no output of it, and those of later segments none before."""
    inputs = SMALL.make(device=device)
    changed = {n: x.clone() if isinstance(x, torch.Tensor) else x for n, x in inputs.items()}
    changed["v"][:, 16:] += 1
    changed["k"][:, 16:] += 0.1
    a, b = forward(op, inputs)[0], forward(op, changed)[0]
    assert torch.equal(a[:, :32], b[:, :32]), "a segment read what it or a later one wrote"
    assert not torch.equal(a[:, 32:48], b[:, 32:48]), "a segment did not read the one before"


@relation
def a_set_has_no_order(op, device="cpu"):
    """Non-causal and additive: series may change places, and every one reads all."""
    inputs = replace(ADDITIVE, length=64, causal=False, beta=True).make(device=device)
    order = torch.tensor([2, 0, 3, 1], device=device)
    permuted = {
        n: x.unflatten(1, (4, 16))[:, order].flatten(1, 2) if n in ("q", "k", "v", "beta") else x
        for n, x in inputs.items()
    }
    o, final = forward(op, inputs)
    near(forward(op, permuted), (o.unflatten(1, (4, 16))[:, order].flatten(1, 2), final), "order of the series")
    first = forward(op, cut(inputs, slice(0, 16), slice(None)))[0]
    near([first], [o[:, :16]], "the first series reads all")


@relation
def a_zero_key_writes_nothing(op, device="cpu"):
    for eps in (1e-5, 0.0):
        inputs = replace(SMALL, eps=eps, state=False).make(device=device)
        inputs["k"] = inputs["k"].clone()
        inputs["k"][:, 40:] = 0
        part = forward(op, cut(inputs, slice(0, 40), slice(0, 40)))[1]
        near([forward(op, inputs)[1]], [part], "zero keys", 1e-6)


@relation
def an_empty_memory_reads_zero(op, device="cpu"):
    for eps in (1e-5, 0.0):
        inputs = replace(SMALL, eps=eps, state=False, length=16).make(device=device)
        results = evaluate(op, inputs)
        assert not results["o"].any() and results["final_state"].isfinite().all()
        assert all(x.isfinite().all() for x in results.values()), "NaN from an empty memory"
        assert not results["dq"].any()


@relation
def heads_are_grouped(op, device="cpu"):
    """Query head h reads memory h // (HQ/H)."""
    inputs = SMALL.make(device=device)
    spread = {n: inputs[n].repeat_interleave(2, 2) for n in ("k", "v", "beta")}
    spread["initial_state"] = inputs["initial_state"].repeat_interleave(2, 1)
    o, final = forward(op, inputs)
    near(forward(op, {**inputs, **spread}), (o, final.repeat_interleave(2, 1)), "one memory per query head", 1e-6)


@relation
def nan_canaries(op, device="cpu"):
    """Inputs are views into NaN: any read past their end poisons the result."""

    def guarded(x):
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            return x
        padded = x.new_full((x.numel() + 4096,), float("nan"))
        padded[2048 : 2048 + x.numel()] = x.flatten()
        return padded[2048 : 2048 + x.numel()].view(x.shape)

    for case in (SMALL, ARMT, PACKED):
        inputs = case.make(device=device)
        for x, y in zip(forward(op, {n: guarded(x) for n, x in inputs.items()}), forward(op, inputs), strict=True):
            assert torch.equal(x, y), "a value outside the inputs was used"


@relation
def inputs_unchanged(op, device="cpu"):
    inputs = SMALL.make(device=device)
    before = {n: x.clone() for n, x in inputs.items() if isinstance(x, torch.Tensor)}
    first = evaluate(op, inputs)
    for name, x in before.items():
        assert torch.equal(inputs[name], x), f"{name} was overwritten"
    for name, x in evaluate(op, inputs).items():
        assert torch.equal(x, first[name]), f"{name}: a second call gives other bits"


@relation
def strided_inputs(op, device="cpu"):
    inputs = SMALL.make(device=device)
    other = {
        n: x.transpose(1, 2).contiguous().transpose(1, 2) if isinstance(x, torch.Tensor) and x.dim() > 2 else x
        for n, x in inputs.items()
    }
    for x, y in zip(forward(op, other), forward(op, inputs), strict=True):
        assert torch.equal(x, y), "strides change the result"


@relation
def empty_calls(op, device="cpu"):
    for case in EMPTY:
        inputs = case.make(device=device)
        o, final = forward(op, inputs)
        assert o.shape == (*inputs["q"].shape[:3], inputs["v"].shape[3])
        assert torch.equal(final, inputs["initial_state"]), "no token, yet the state changed"
        assert final.numel() == 0 or final.data_ptr() != inputs["initial_state"].data_ptr(), "state aliases its input"


@relation
def batch_invariance(op, device="cpu"):
    inputs = replace(SMALL, batch=3).make(device=device)
    alone = {n: x[1:2] if isinstance(x, torch.Tensor) else x for n, x in inputs.items()}
    for x, y in zip(forward(op, inputs), forward(op, alone), strict=True):
        assert torch.equal(x[1:2], y), "bits depend on the batch size"


def run_all(op, device: str = "cpu") -> dict[str, str | None]:
    """Name → None or the failure, for every check."""
    return relations.outcomes(CHECKS, op, device)


# The fallback with one wrong line each: what is there -> what is put in its place.
BUGS = {
    "reads after it writes": ("if rule.causal:\n            outputs.append(read(q[:, :, s * size : (s + 1) * size], state))\n        here", "here"),
    "writes see each other": ("new = v - _read(rule, k, state, dot) if rule.delta else v", "new = v - _read(rule, k, state + 1e-3 * dot(k.mT, v).abs().mean(), dot) if rule.delta else v"),
    "erases at full strength": ("dot(k.mT, beta * new)", "dot(k.mT, beta * v + new - v)"),
    "beta enters the normaliser": ("k.mT @ _counts(rule, k, state)", "k.mT @ (beta * _counts(rule, k, state))"),
    "erase not divided": ("v - _read(rule, k, state, dot)", "v - dot(k, state[..., : v.shape[-1]])"),
    "eps left out": ("x @ state[..., -1:] + rule.eps", "x @ state[..., -1:] * (1 + rule.eps)"),
    "correction without clip": (".clamp(0, 1)", ""),
    "correction not detached": ("k, z = k.detach(), state[..., -1:].detach()", "z = state[..., -1:]"),
    "correction ignored": ("if not rule.correction", "if True"),
    "heads tiled instead of grouped": ("rows.unflatten(1, (k.shape[1], group))", "rows.unflatten(1, (group, k.shape[1])).transpose(1, 2)"),
    "causal ignored": ("read(q[:, :, segments * size if rule.causal else 0 :], state)", "read(q[:, :, segments * size :], state)"),
    "segment one token short": ("slice(s * key_size, (s + 1) * key_size)", "slice(s * key_size, (s + 1) * key_size - 1)"),
    "query segments of the keys' size": ("size, key_size = q.shape[1] // k.shape[1], rule.segment_size, rule.key_segment_size", "size, key_size = q.shape[1] // k.shape[1], rule.key_segment_size, rule.key_segment_size"),
    "initial state ignored": ("state = initial_state\n", "state = None if initial_state is None else 0 * initial_state\n"),
    "state of the first sequence for all": ("state[i : i + 1]", "state[:1]"),
    "final state without a gradient": ("state.clone()", "state.detach().clone()"),
    "final state aliases its input": ("state.clone()", "state"),
    "state rounded to bfloat16 per segment": ("state = state + written", "state = state.bfloat16().to(state.dtype) + written"),
    "keys of the queries' bounds": ("(cu_seqlens if cu_seqlens_k is None else cu_seqlens_k).tolist()", "cu_seqlens.tolist()"),
    "no guard on an empty memory": (".masked_fill(nothing, 1).reciprocal().masked_fill(nothing, 0)", ".reciprocal()"),
}  # fmt: skip


@functools.cache
def planted(bug: str) -> Callable:
    """`chunked` with `bug`."""
    namespace: dict = {"__name__": reference.__name__}
    exec(*relations.with_bug(bug, *BUGS[bug], inspect.getsource(reference)), namespace)

    def op(*, output_final_state=True, **arguments):
        settings = {name: arguments.pop(name) for name in RULE}
        settings["key_segment_size"] = settings["key_segment_size"] or settings["segment_size"]
        return namespace["chunked"](**arguments, rule=namespace["Rule"](**settings))

    return op
