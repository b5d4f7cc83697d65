"""Cases, relations and planted bugs of the nearest-key search and the attention over what it finds."""

# ruff: noqa: E501 (tables, one case a line)
from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from memattn.reference import knn_attention as reference
from support import relations
from support.compare import CEILING, assert_close_to_truth, relative_error, to_float64
from support.relations import assert_same
from support.topk import assert_selected


@dataclass(frozen=True)
class Case:
    """q [B,S,H,D], keys [B,T,HKV,D], values [B,T,HKV,V]. Small whole numbers: products are exact, and many are equal."""

    name: str
    batch: int = 2
    queries: int = 5
    heads: int = 2
    tokens: int = 300
    key_heads: int = 2
    dim: int = 16
    value_dim: int = 24
    k: int = 9
    metric: str = "dot"
    lengths: tuple[int, ...] | None = None
    threshold: float | None = None
    whole: bool = True

    def make(self, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> dict:
        """The arguments of one `knn_attention`; without values those of `knn`."""
        noise = torch.Generator().manual_seed(seed)

        def vectors(*shape: int) -> Tensor:
            x = torch.randn(*shape, generator=noise)
            return ((1.5 * x).round() if self.whole else x).to(device, dtype)

        given = {
            "q": vectors(self.batch, self.queries, self.heads, self.dim),
            "keys": vectors(self.batch, self.tokens, self.key_heads, self.dim),
            "values": vectors(self.batch, self.tokens, self.key_heads, self.value_dim),
            "k": self.k, "metric": self.metric, "threshold": self.threshold,
        }  # fmt: skip
        return given | ({} if self.lengths is None else {"lengths": torch.tensor(self.lengths, device=device)})


SMALL = Case("small")
CASES = (
    SMALL,
    Case("one query", batch=1, queries=1, heads=1, key_heads=1, tokens=100),
    Case("grouped", heads=6, key_heads=2),
    Case("many queries", batch=1, queries=300, heads=2, key_heads=1, tokens=400, k=32),
    Case("k of all", tokens=9),
    Case("fewer than k", tokens=5, k=128),
    Case("no key", tokens=0),
    Case("no query", queries=0),
    Case("lengths", lengths=(130, 0)),
    Case("threshold", threshold=9.0),
    Case("threshold 0", threshold=0.0, k=100),
    Case("threshold beyond all", threshold=1e9),
    Case("odd sizes", dim=37, value_dim=5, tokens=333, k=17),
    Case("largest k", tokens=700, k=128),
    Case("dim 1", dim=1, tokens=200),
)
COSINE = tuple(replace(c, metric="cos", whole=False) for c in CASES if c.threshold is None) + (
    Case("cosine threshold", metric="cos", whole=False, threshold=0.25, k=100),
)
TENSORS = ("q", "keys", "values")


def search(given: dict) -> dict:
    """Of the arguments those of `knn`."""
    return {n: x for n, x in given.items() if n != "values"}


def exact_scores(given: dict) -> Tensor:
    """All scores in float64, [B, S, H, T]."""
    q, keys = (given[n].cpu().double() for n in ("q", "keys"))
    if given["metric"] == "cos":
        q, keys = reference.normalised(q), reference.normalised(keys)
    return torch.einsum("bshd,bthd->bsht", q, keys.repeat_interleave(q.shape[2] // keys.shape[2], 2))


def assert_found(found, given: dict, what: str = "") -> None:
    """Whole numbers: bit for bit what `topk`'s definition selects from exact scores."""
    rest = {
        n: given[n].cpu() if isinstance(given[n], Tensor) else given[n]
        for n in ("k", "threshold", "lengths")
        if n in given
    }
    unsigned = found._replace(values=found.values + 0.0)  # −0 is a matter of how zeros are added
    assert_selected(unsigned, {**rest, "scores": exact_scores(given).to(found.values.dtype) + 0.0}, what)


def assert_nearest(found, given: dict, what: str = "") -> None:
    """Any numbers: values are those of the keys named, and no other key is nearer by more than rounding."""
    scores = exact_scores(given)
    position = torch.arange(scores.shape[3])
    if "lengths" in given:
        scores = scores.masked_fill(position >= given["lengths"].cpu()[:, None, None, None], -torch.inf)
    indices, counts = found.indices.cpu().long(), found.counts.cpu()
    slot = torch.arange(indices.shape[3])
    assert torch.equal(indices >= 0, slot < counts[..., None]), f"{what}: counts and indices differ"
    assert torch.equal(indices.clamp_min(0).diff(dim=-1) > 0, slot[1:] < counts[..., None]), f"{what}: not by index"
    padded = torch.nn.functional.pad(scores, (0, 1), value=-torch.inf)
    named = padded.gather(-1, indices.masked_fill(indices < 0, scores.shape[3]))
    tolerance = CEILING[torch.float64 if given["q"].dtype == torch.float64 else torch.float32]
    assert relative_error(found.values, named) <= tolerance, f"{what}: values are not those of the keys"
    least = -torch.inf if given["threshold"] is None else given["threshold"]
    expected = padded.where(padded >= least, -torch.inf)
    best = torch.nn.functional.pad(expected, (0, given["k"]), value=-torch.inf).topk(given["k"]).values
    assert relative_error(named.sort(-1, descending=True).values, best) <= tolerance, f"{what}: nearer keys exist"


# --- relations, of functions called as `knn_attention` that return ((o, lse), found) ------------------------------------


def attention_error(op, c: Case, dtype=torch.float32, device="cpu") -> None:
    """o, lse and gradients within the tolerance of the definition."""
    given = c.make(dtype, device)
    cotangents = [
        torch.randn(*given["q"].shape[:3], *n, generator=torch.Generator().manual_seed(1)).mul(32).round() / 32
        for n in ((c.value_dim,), ())
    ]

    def results(f, inputs):
        leaves = {n: inputs[n].detach().clone().requires_grad_() for n in TENSORS}
        (o, lse), found = f(**{**inputs, **leaves})
        kept = lse.masked_fill(lse == -torch.inf, 0.0)
        loss = (o.double() * cotangents[0].to(o.device)).sum() + (kept.double() * cotangents[1].to(o.device)).sum()
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        gradients = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves.values(), gradients, strict=True)]
        return {"o": o.detach(), "lse": lse.detach(), **{f"d{n}": g for n, g in zip(TENSORS, gradients, strict=True)}}

    truth = results(reference.loop, to_float64(given))
    scales = {n: 1.0 for n, x in truth.items() if x.numel() == 0 or x[x.isfinite()].norm() == 0}
    assert_close_to_truth(results(op, given), results(reference.chunked, given), truth, CEILING[dtype], scales)


def finds_the_nearest(op, device="cpu"):
    for c in CASES:
        given = c.make(device=device)
        assert_found(op(**given)[1], given, c.name)


def finds_by_cosine(op, device="cpu"):
    for c in COSINE:
        given = c.make(device=device)
        assert_nearest(op(**given)[1], given, f"{c.name}, cosine")


def attends_to_what_it_finds(op, device="cpu"):
    for name in ("small", "grouped", "lengths", "fewer than k", "threshold beyond all", "no key"):
        attention_error(op, next(c for c in CASES if c.name == name), device=device)


def all_keys_are_attention(op, device="cpu"):
    """With k of all keys: softmax attention over the memory."""
    given = replace(SMALL, tokens=40, k=64, whole=False).make(device=device)
    q, k, v = (given[n].transpose(1, 2) for n in TENSORS)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    torch.testing.assert_close(op(**given)[0][0], expected, rtol=1e-5, atol=1e-5)


def poison_beyond_the_length(op, device="cpu"):
    """Rows behind the length may hold anything."""
    given = replace(SMALL, lengths=(130, 0)).make(device=device)
    (o, lse), found = op(**given)
    for name in ("keys", "values"):
        given[name] = given[name].clone()
        given[name][0, 130:], given[name][1] = float("nan"), float("inf")
    (other, other_lse), other_found = op(**given)
    assert_same((o, lse, *found), (other, other_lse, *other_found), "poison")


def a_broken_key_is_not_found(op, device="cpu"):
    given = SMALL.make(device=device)
    given["keys"][0, 7] = float("nan")
    (o, _), found = op(**given)
    assert bool(o.isfinite().all()) and not bool((found.indices[0] == 7).any())


CHECKS = {
    f.__name__: f
    for f in (
        finds_the_nearest,
        finds_by_cosine,
        attends_to_what_it_finds,
        all_keys_are_attention,
        poison_beyond_the_length,
        a_broken_key_is_not_found,
    )
}

BUGS = {
    "heads tiled instead of grouped": (
        "heads, device=q.device) // (heads // key_heads)",
        "heads, device=q.device) % key_heads",
    ),
    "search with tiled heads": (
        "q.view(batch, queries, key_heads, group, dim).permute(0, 2, 3, 1, 4)",
        "q.view(batch, queries, group, key_heads, dim).permute(0, 3, 2, 1, 4)",
    ),
    "keys not normalised": ("normalised(q), normalised(keys)", "normalised(q), keys"),
    "lengths ignored": ("if lengths is not None:", "if False:"),
    "position within the part": ("torch.arange(first, first + part.shape[3]", "torch.arange(0, part.shape[3]"),
    "last part only": (
        "scores = torch.cat([best.values, scores], -1)",
        "best = TopK(best.values[..., :0], best.indices[..., :0], best.counts); scores = torch.cat([best.values, scores], -1)",
    ),
    "threshold on the first part only": (
        "selection.chunked(scores, k, threshold=threshold)",
        "selection.chunked(scores, k, threshold=threshold if first == 0 else None)",
    ),
    "scale ignored": ("s = scale * (gathered", "s = (gathered"),
    "empty is NaN": ("s.masked_fill(empty[..., None], 0.0).logsumexp(-1)", "s.logsumexp(-1)"),
    "unused slots attended": ("s = s.masked_fill(~seen, -torch.inf)", "s = s"),
    "broken rows weighed by 0": (
        "torch.where(seen[..., None], found.to(dtype), 0.0)",
        "found.to(dtype) * seen[..., None]",
    ),
    "rows of the first batch": ("[:, None, None, None] * tokens", "[:, None, None, None] * 0"),
}


def planted(bug: str) -> Callable:
    """`chunked` with `bug`, in parts of 64 keys."""
    namespace = {**vars(reference), "PART": 64}
    functions = (reference._prepared, reference.chunked_knn, reference.attend, reference._attend, reference.chunked)
    for code in relations.with_bug(bug, *BUGS[bug], *map(inspect.getsource, functions)):
        exec(code, namespace)
    return namespace["chunked"]


def run_all(op) -> dict[str, str | None]:
    """Name → None or the failure, for every relation."""
    return relations.outcomes(CHECKS, op)
