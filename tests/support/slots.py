"""Cases, evaluation, relations and planted bugs of the slot ops."""

# ruff: noqa: E501 (tables, one case a line)
from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from memattn.ops import merge_states
from memattn.reference import slot_write as reference
from support import relations
from support.compare import CEILING, assert_draws_close_to_truth, relative_error, to_float64
from support.relations import assert_same

TOLERANCE = 2e-5
CHECKS: dict[str, Callable] = {}
TENSORS = ("q", "k_self", "v_self", "k", "v")


@dataclass(frozen=True)
class Case:
    """Inputs of one `slot_write`. `lengths` are the tokens of each sequence: of padded rows, or packed along T."""

    name: str
    batch: int = 2
    slots: int = 5
    tokens: int = 40
    heads: int = 2
    key_dim: int = 16
    value_dim: int = 24
    see: str = "own"
    tau: float = 1.0
    lengths: tuple[int, ...] | None = None
    packed: bool = False
    scale: float | None = None

    def make(self, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> dict:
        """The arguments of one call."""
        noise = torch.Generator().manual_seed(seed)
        sequences = self.batch if self.lengths is None else len(self.lengths)
        rows = (1, sum(self.lengths or ())) if self.packed else (sequences, self.tokens)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(*shape, self.heads, self.key_dim, generator=noise)).to(device, dtype)

        def value(*shape: int) -> Tensor:
            return torch.randn(*shape, self.heads, self.value_dim, generator=noise).to(device, dtype)

        slots, alone = (sequences, self.slots), self.see == "none"
        inputs = {
            "q": normal(*slots, scale=2.0), "k_self": None if alone else normal(*slots),
            "v_self": None if alone else value(*slots), "k": normal(*rows), "v": value(*rows),
            "see": self.see, "tau": self.tau, "scale": self.scale,
        }  # fmt: skip
        if self.packed:
            inputs["cu_seqlens"] = torch.tensor([0, *self.lengths], device=device).cumsum(0)
        elif self.lengths is not None:
            inputs["lengths"] = torch.tensor(self.lengths, device=device)
        return inputs


SMALL = Case("small", tau=0.5)
CASES = (
    SMALL,
    Case("all", see="all"), Case("none", see="none"),
    Case("one slot", slots=1), Case("one token", tokens=1, see="all"),
    Case("no token", tokens=0), Case("no token, all", tokens=0, see="all"),
    Case("lengths", lengths=(40, 7, 0, 1)), Case("lengths, all", lengths=(40, 7, 0, 1), see="all", tau=0.25),
    Case("lengths, none", lengths=(40, 7, 0, 1), see="none"),
    Case("packed", lengths=(9, 0, 1, 33), packed=True), Case("packed, all", lengths=(0, 9, 33), packed=True, see="all"),
    Case("packed, none", lengths=(9, 0, 33), packed=True, see="none"),
    Case("scale and tau", scale=0.6, tau=2.0, key_dim=40, value_dim=16),
    Case("wide", batch=1, heads=1, key_dim=256, value_dim=128, see="all"),
    Case("many slots", batch=1, slots=130, tokens=70, see="own"), Case("many slots, all", batch=1, slots=130, tokens=70, see="all"),
)  # fmt: skip


def evaluate(op: Callable, inputs: dict, seed: int = 1) -> dict[str, Tensor]:
    """o, lse (0 where nothing is seen) and the gradient of every tensor, under fixed cotangents of both."""
    inputs = {
        n: x.detach().clone().requires_grad_() if isinstance(x, Tensor) and n in TENSORS else x
        for n, x in inputs.items()
    }
    o, lse = op(**inputs)
    empty = lse.detach() == -torch.inf
    assert not o[empty].any(), "a slot that sees nothing"
    noise = torch.Generator().manual_seed(seed)
    do, dlse = (torch.randn(x.shape, generator=noise, dtype=torch.float64) for x in (o, lse))
    names = [n for n in TENSORS if inputs[n] is not None]
    ends = (o, lse.masked_fill(empty, 0.0))
    gradients = torch.autograd.grad(ends, [inputs[n] for n in names], (do.to(o), dlse.to(lse)), allow_unused=True)
    results = {"o": o.detach(), "lse": ends[1].detach()}
    for name, gradient in zip(names, gradients, strict=True):
        results[f"d{name}"] = torch.zeros_like(inputs[name]) if gradient is None else gradient
    return results


@functools.cache
def truth_of(case: Case, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """The definition in float64 on the case's inputs."""
    return evaluate(reference.loop, to_float64(case.make(dtype, seed=seed)))


def by_parts(q, k_self, v_self, k, v, *, see="own", operand_dtype=None, **settings):
    """The plain-torch form with the kernels' rounding points: slots first, tokens after them."""
    part = functools.partial(reference.chunked, see="none", operand_dtype=operand_dtype)
    tokens = part(q, None, None, k, v, **settings)
    if see == "none":
        return tokens
    settings.update(lengths=None, cu_seqlens=None)
    if see == "own":  # every slot a sequence of its own
        alone = (x.flatten(0, 1)[:, None] for x in (q, k_self, v_self))
        slots = [x.view(*q.shape[:2], *x.shape[2:]) for x in part(next(alone), None, None, *alone, **settings)]
    else:
        slots = part(q, None, None, k_self, v_self, **settings)
    return merge_states(*zip(slots, tokens, strict=True))


def judge(case: Case, dtype: torch.dtype, *actual: dict[str, Tensor], comparator: Callable = by_parts) -> None:
    """The tolerance rule of support.compare, for results of draws 0, 1, ... of the case's inputs.

    A handful of values proves nothing about the ratio of two roundings.
    """
    rounding = dtype if dtype in (torch.bfloat16, torch.float16) else None
    draws = []
    for seed, results in enumerate(actual):
        truth = truth_of(case, dtype, seed)
        other = evaluate(functools.partial(comparator, operand_dtype=rounding), case.make(dtype, seed=seed))
        other = {n: x if x.numel() >= 100 else truth[n] * (1 + CEILING[dtype]) for n, x in other.items()}
        draws.append((results, other, truth, {}))
    assert_draws_close_to_truth(draws, CEILING[dtype])


def relation(check: Callable) -> Callable:
    """Enter a check in CHECKS under its name."""
    CHECKS[check.__name__] = check
    return check


def forward(op: Callable, inputs: dict, **change: object) -> list[Tensor]:
    """[o, lse] without gradient."""
    with torch.no_grad():
        return list(op(**{**inputs, **change}))


assert_near = functools.partial(relations.assert_near, tolerance=TOLERANCE)


@relation
def equals_definition(op, device="cpu"):
    """Forward and every gradient, with cotangents of o and of lse, against the float64 loop."""
    for c in (c for c in CASES if c.slots < 100 and c.key_dim < 100):
        assert_near(evaluate(op, c.make(device=device)), truth_of(c), c.name)


@relation
def slots_never_see_one_another(op, device="cpu"):
    """ "own": what slot 3 holds reaches slot 3 alone, gradient too; "all": it reaches every slot."""
    for c in (SMALL, Case("packed", lengths=(9, 33), packed=True), Case("lengths", lengths=(9, 33))):
        for see in ("own", "all"):
            inputs = replace(c, see=see).make(device=device)
            base = forward(op, inputs)
            for name in ("k_self", "v_self"):
                other = inputs[name].clone()
                other[:, 3] += 1
                changed = (forward(op, inputs, **{name: other})[0] != base[0]).any(-1).any(-1)
                expected = torch.full_like(changed, see == "all")
                expected[:, 3] = True
                assert torch.equal(changed, expected), f"{c.name}, {see}: a change of {name}"


@relation
def permuted_slots_give_permuted_updates(op, device="cpu"):
    order = torch.tensor([3, 0, 4, 1, 2])
    for see in ("own", "all"):
        inputs = replace(SMALL, see=see).make(device=device)
        moved = {n: x[:, order] if n in ("q", "k_self", "v_self") else x for n, x in inputs.items()}
        for x, y in zip(forward(op, moved), forward(op, inputs), strict=True):
            assert relative_error(x, y[:, order]) <= 1e-6, see


@relation
def the_order_of_tokens_does_not_matter(op, device="cpu"):
    inputs = SMALL.make(device=device)
    flipped = {n: x.flip(1) if n in ("k", "v") else x for n, x in inputs.items()}
    for x, y in zip(forward(op, flipped), forward(op, inputs), strict=True):
        assert relative_error(x, y) <= 1e-6


@relation
def every_token_of_its_sequence_counts_and_no_other(op, device="cpu"):
    """The first and last token of every row or packed sequence reach its own slots only; padding, even NaN, nobody."""
    for c in (Case("lengths", lengths=(9, 0, 31), tokens=40), Case("packed", lengths=(9, 0, 31), packed=True)):
        inputs = c.make(device=device)
        starts = (0, 9, 9) if c.packed else (0, 0, 0)
        base = forward(op, inputs)[0]
        for n, (start, count) in enumerate(zip(starts, c.lengths, strict=True)):
            for at in {start, start + count - 1} if count else ():
                v = inputs["v"].clone()
                v[0 if c.packed else n, at] += 1
                changed = (forward(op, inputs, v=v)[0] != base).flatten(1).any(1).tolist()
                assert changed == [m == n for m in range(3)], f"{c.name}: token {at} of sequence {n}"
        if not c.packed:
            poisoned = dict(inputs)
            hidden = torch.arange(40, device=device) >= inputs["lengths"][:, None]
            for name in ("k", "v"):
                poisoned[name] = inputs[name].masked_fill(hidden[..., None, None], torch.nan)
            expected, actual = evaluate(op, inputs), evaluate(op, poisoned)
            assert_same(actual.values(), expected.values(), "padding was used")
            assert not actual["dk"][hidden].any() and not actual["dv"][hidden].any()


@relation
def packed_equals_separate(op, device="cpu", tolerance=1e-6, see=("own", "all", "none")):
    for c in (Case("packed", lengths=(9, 0, 1, 33), packed=True, see=x) for x in see):
        inputs = c.make(device=device)
        bounds = inputs["cu_seqlens"].tolist()
        whole = forward(op, inputs)
        for n, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False)):
            part = {
                m: inputs[m] if inputs[m] is None else inputs[m][:, a:b] if m in ("k", "v") else inputs[m][n : n + 1]
                for m in TENSORS
            }
            alone = forward(op, {**inputs, **part, "cu_seqlens": None})
            for x, y in zip(alone, whole, strict=True):
                assert relative_error(x, y[n : n + 1]) <= tolerance, f"sequence {n}"


@relation
def batch_invariance(op, device="cpu", tolerance=1e-6, see=("own", "all", "none")):
    for c in (Case("rows", lengths=(40, 7, 21), see=x) for x in see):
        inputs = c.make(device=device)
        expected = forward(op, inputs)
        for rows in ([1], [2, 0, 1], [0, 0]):
            part = {n: x[rows] if isinstance(x, Tensor) else x for n, x in inputs.items()}
            for x, y in zip(forward(op, part), expected, strict=True):
                assert relative_error(x, y[rows]) <= tolerance, f"{c.see}: batch rows {rows}"


@relation
def temperature_limits(op, device="cpu"):
    """τ → 0 leaves each slot its best match, τ → ∞ the mean of all it sees; τ divides whatever scale is given."""
    inputs = SMALL.make(device=device)
    mean = (inputs["v"].sum(1, keepdim=True) + inputs["v_self"]) / 41
    assert relative_error(forward(op, inputs, tau=1e9)[0], mean) <= 1e-5
    s = torch.einsum("nmhk,nthk->nmht", inputs["q"], inputs["k"])
    own = (inputs["q"] * inputs["k_self"]).sum(-1)
    best = inputs["v"].transpose(1, 2).gather(2, s.argmax(-1).transpose(1, 2)[..., None].expand(-1, -1, -1, 24))
    expected = torch.where((own > s.amax(-1))[..., None], inputs["v_self"], best.transpose(1, 2))
    assert relative_error(forward(op, inputs, tau=1e-6)[0], expected) <= 1e-5
    for x, y in zip(forward(op, inputs, scale=0.3, tau=0.5), forward(op, inputs, scale=0.6, tau=1.0), strict=True):
        assert relative_error(x, y) <= 1e-6


@relation
def own_key_out_of_weight(op, device="cpu"):
    """A slot whose own key is infinitely far is one that sees the tokens alone; without tokens it keeps its value."""
    inputs = replace(SMALL, tau=1.0).make(device=device)
    far = -1e4 * inputs["q"]
    bare = forward(op, inputs, see="none", k_self=None, v_self=None)
    for x, y in zip(forward(op, inputs, k_self=far), bare, strict=True):
        assert relative_error(x, y) <= 1e-6
    nothing = {**inputs, "k": inputs["k"][:, :0], "v": inputs["v"][:, :0]}
    assert torch.equal(forward(op, nothing)[0], inputs["v_self"])


@relation
def inputs_unchanged_and_strided(op, device="cpu"):
    inputs = replace(SMALL, see="all").make(device=device)
    before = {n: x.clone() for n, x in inputs.items() if isinstance(x, Tensor)}
    first = evaluate(op, inputs)
    assert_same(evaluate(op, inputs).values(), first.values(), "a second call gives other bits")
    for name, x in before.items():
        assert torch.equal(inputs[name], x), f"{name} was overwritten"
    other = {
        n: x.transpose(1, 2).contiguous().transpose(1, 2) if isinstance(x, Tensor) else x for n, x in inputs.items()
    }
    assert_near(evaluate(op, other), first, "strided inputs", tolerance=1e-6)


# Where: what is there -> what is put in its place.
BUGS = {
    "tokens one short": ("token < lengths[:, None, None, None]", "token < lengths[:, None, None, None] - 1"),
    "tokens one long": ("token < lengths[:, None, None, None]", "token <= lengths[:, None, None, None]"),
    "packed sequences leak": ("(token >= begin) & (token < end)", "(token >= begin) & (token <= end)"),
    "first packed token lost": ("(token >= begin) & (token < end)", "(token > begin) & (token < end)"),
    "padding ignored": ("None if lengths is None else token", "None if True else token"),
    "slots see one another": ('if see == "own" else queries @', 'if False else queries @'),
    "slot diagonal shifted": ("(queries * k_self).sum", "(queries * k_self.roll(1, 2)).sum"),
    "own value of the neighbour": ("by_slots * v_self if", "by_slots * v_self.roll(1, 2) if"),
    "own key without its value": ("if see == \"own\" else by_slots @ v_self", "if see != \"own\" else 0.0"),
    "tau multiplies": ("if scale is None else scale) / tau)", "if scale is None else scale) * tau)"),
    "tau ignored": ("if scale is None else scale) / tau)", "if scale is None else scale))"),
    "scale ignored": ("(dim**-0.5 if scale is None else scale) / tau)", "dim**-0.5 / tau)"),
    "tau on the tokens only": ("(queries * k_self).sum", "(queries * tau * k_self).sum"),
    "two softmaxes": ("s = torch.cat(scores, -1)", "s = torch.cat([x.log_softmax(-1) if x.shape[-1] else x for x in scores], -1)"),
    "lse of the tokens": ("lse.masked_fill(empty, -torch.inf)\n", "lse.masked_fill(empty, -torch.inf) - 0.5\n"),
    "lse detached": ("lse.masked_fill(empty, -torch.inf)\n", "lse.masked_fill(empty, -torch.inf).detach() + 0 * s.nan_to_num(0, 0, 0).sum(-1)\n"),
    "empty rows not guarded": ("s.masked_fill(empty[..., None], 0.0).logsumexp(-1)", "s.logsumexp(-1)"),
    "padding reaches sums": ("torch.where(seen[..., 0, :, None], x, 0.0)", "x"),
    "heads of packed slots mixed": ("x.transpose(0, 1).flatten(1, 2)[None]", "x.flatten(0, 1).unflatten(0, (x.shape[1], -1)).flatten(1, 2)[None]"),
    "v overwritten": ("    scores = [tokens", "    v_self is None or v_self.requires_grad or v_self.mul_(1.01)\n    scores = [tokens"),
}  # fmt: skip


def planted(bug: str) -> Callable:
    """`chunked` with `bug`."""
    module = types.ModuleType("planted_slot_write")
    for code in relations.with_bug(bug, *BUGS[bug], inspect.getsource(reference)):
        exec(code, module.__dict__)
    return module.chunked


def run_all(op: Callable, device: str = "cpu") -> dict[str, str | None]:
    """Name → None or the failure, for every check."""
    return relations.outcomes(CHECKS, op, device)
