"""Adversarial rows, the exact comparison, relations and planted bugs of top-k selection."""

# ruff: noqa: E501 (tables, one case a line)
from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from memattn.reference import topk as reference
from support import relations

INF, NAN = float("inf"), float("nan")


def _noise(shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _period(shape, seed):
    """The largest scores all in one group of the threshold's estimate, behind each other."""
    x = _noise(shape, seed).clamp(-1, 1)
    x[..., 5::256] += 3
    return x


ROWS: dict[str, Callable] = {
    "random": _noise,
    "ascending": lambda shape, seed: _noise(shape, seed).sort(-1).values,
    "descending": lambda shape, seed: _noise(shape, seed).sort(-1, descending=True).values,
    "all equal": lambda shape, seed: torch.full(shape, 0.75),
    "few values": lambda shape, seed: _noise(shape, seed).mul(1.5).round(),
    "last bits": lambda shape, seed: 1 + _noise(shape, seed).mul(8).round().abs() * 2.0**-23,
    "zeros of both signs": lambda shape, seed: torch.where(_noise(shape, seed) > 0, 0.0, -0.0),
    "masked tail": lambda shape, seed: _noise(shape, seed).masked_fill(torch.arange(shape[-1]) >= shape[-1] // 3, -INF),
    "nothing": lambda shape, seed: torch.full(shape, -INF),
    "all NaN": lambda shape, seed: torch.full(shape, NAN),
    "NaN here and there": lambda shape, seed: _noise(shape, seed).masked_fill(_noise(shape, seed + 1) > 0.5, NAN),
    "NaN, and less than k": lambda shape, seed: torch.full(shape, NAN).index_fill(
        -1, torch.arange(0, shape[-1], 97), 1.0
    ),
    "forced": lambda shape, seed: _noise(shape, seed).index_fill(-1, torch.arange(0, shape[-1], 50), INF),
    "infinities": lambda shape, seed: _noise(shape, seed).mul(3).round().div(0.0),
    "beyond float16": lambda shape, seed: _noise(shape, seed) * 1e5,
    "one group": _period,
    "tiny": lambda shape, seed: _noise(shape, seed) * 1e-42,
}


@dataclass(frozen=True)
class Case:
    """Scores [*shape] of one kind, and what else a call takes."""

    rows: str
    shape: tuple[int, ...] = (3, 1000)
    k: int = 20
    lengths: tuple[int, ...] | None = None
    threshold: float | None = None
    sorted: bool = False
    page_size: int | None = None
    seed: int = 0

    @property
    def name(self) -> str:
        """What differs from the usual."""
        parts = [self.rows, "x".join(map(str, self.shape)), f"k{self.k}"]
        given = {"lengths": self.lengths, "threshold": self.threshold, "pages": self.page_size}
        return ", ".join(parts + [n for n, x in given.items() if x is not None] + ["sorted"] * self.sorted)

    def make(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict:
        """The arguments of one call."""
        scores = ROWS[self.rows](self.shape, self.seed).to(device, dtype)
        given: dict = {"scores": scores, "k": self.k, "threshold": self.threshold, "sorted": self.sorted}
        if self.lengths is not None:
            given["lengths"] = torch.tensor(self.lengths, device=device)
        if self.page_size is not None:
            pages, noise = -(-self.shape[-1] // self.page_size), torch.Generator().manual_seed(self.seed)
            table = torch.stack([torch.randperm(2 * pages, generator=noise)[:pages] for _ in range(self.shape[0])])
            given |= {
                "page_table": table.masked_fill(table < pages, -1).to(device, torch.int32),
                "page_size": self.page_size,
            }
        return given


CASES = (
    *(Case(rows) for rows in ROWS),
    *(Case(rows, sorted=True) for rows in ("random", "few values", "infinities", "zeros of both signs")),
    Case("random", (2, 3, 70), 9, lengths=(0, 50)),
    Case("few values", (4, 200), 16, lengths=(200, 16, 15, 1)),
    Case("random", (2, 500), 30, threshold=1.0),
    Case("few values", (2, 500), 300, threshold=1.5),
    Case("random", (2, 500), 5, threshold=INF),
    Case("forced", (2, 500), 50, threshold=INF),
    Case("random", (2, 4, 64), 8, page_size=1),
    Case("few values", (2, 100), 8, page_size=16, sorted=True),
    Case("random", (5, 33), 33),
    Case("random", (5, 33), 50, sorted=True),
    Case("random", (2, 1), 1),
    Case("random", (2, 0), 3),
    Case("random", (0, 10), 3),
    Case("random", (40, 300), 1),
)  # fmt: skip
LONG = (
    *(Case(rows, (2, 20_000), 300) for rows in ROWS),
    Case("random", (1, 100_000), 64),
    Case("few values", (1, 100_000), 4096),
    Case("one group", (1, 140_000), 700),
    Case("ascending", (1, 140_000), 64),
    Case("random", (3, 70_000), 2048, lengths=(70_000, 65_537, 2_000), sorted=True),
)


def assert_selected(actual, given: dict, what: str = "") -> None:
    """Bit for bit the definition's."""
    given = {n: x.cpu() if isinstance(x, Tensor) else x for n, x in given.items()}
    expected = reference.loop(**given)
    for name in ("counts", "indices", "values"):
        x, y = getattr(actual, name).cpu(), getattr(expected, name)
        assert x.dtype == y.dtype and x.shape == y.shape, f"{what}: {name} is {x.dtype} {list(x.shape)}"
        bits = (
            (x, y)
            if name != "values"
            else (x.double().signbit() + 2 * x.nan_to_num(9), y.double().signbit() + 2 * y.nan_to_num(9))
        )
        assert torch.equal(*bits), f"{what}: {name} differ in {int((x != y).sum())} places"


# --- relations --------------------------------------------------------------------------------------------------------


def adversarial(op, device="cpu"):
    for c in CASES:
        given = c.make(device=device)
        assert_selected(op(**given), given, c.name)


def like_torch(op, device="cpu"):
    """torch.topk of rows without equal scores selects the same."""
    scores = torch.stack([torch.randperm(3000, generator=torch.Generator().manual_seed(n)) for n in range(4)])
    scores = (scores - 1500).float().to(device)
    values, indices = torch.topk(scores, 100)
    found = op(scores, 100, sorted=True)
    relations.assert_same(found[:2], (values, indices.int()), "torch.topk")
    relations.assert_same((op(scores, 100).indices,), (indices.sort(-1).values.int(),), "torch.topk as a set")


def larger_k_extends(op, device="cpu"):
    """Sorted, the first slots of a larger selection are the smaller selection."""
    given = Case("few values", (3, 400), 60, sorted=True).make(device=device)
    few = op(**{**given, "k": 13})
    relations.assert_same(few[:2], [x[..., :13] for x in op(**given)[:2]], "k 60 begins with k 13")


def monotone_map(op, device="cpu"):
    """An increasing map of the scores selects the same."""
    given = Case("random", (3, 400), 20).make(device=device)
    relations.assert_same(
        (op(**given).indices,), (op(**{**given, "scores": given["scores"].double().exp()}).indices,), "exp"
    )


def batch_invariance(op, device="cpu"):
    """A row selects the same in any batch."""
    given = Case("few values", (6, 1000), 30, lengths=(900, 7, 0, 33, 1000, 555)).make(device=device)
    whole = op(**given)
    for n in range(6):
        alone = op(**{**given, "scores": given["scores"][n : n + 1], "lengths": given["lengths"][n : n + 1]})
        relations.assert_same(alone, [x[n : n + 1] for x in whole], f"row {n}")


CHECKS = {f.__name__: f for f in (adversarial, like_torch, larger_k_extends, monotone_map, batch_invariance)}

BUGS = {
    "equal scores by arrival from the back": ("equal.cumsum(-1) <= k", "equal.flip(-1).cumsum(-1).flip(-1) <= k"),
    "one equal score too many": ("equal.cumsum(-1) <= k", "equal.cumsum(-1) <= 1 + k"),
    "NaN selected": ("there = found > -torch.inf", "there = ~(found <= -torch.inf)"),
    "masked scores selected": ("there = found > -torch.inf", "there = found >= -torch.inf"),
    "threshold exclusive": (">= threshold", "> threshold"),
    "lengths ignored": ("if lengths is not None:", "if False:"),
    "length inclusive": ("position < broadcast", "position <= broadcast"),
    "counts of the row, not of the slots": (
        "there.sum(-1, dtype=torch.int32)",
        "(found > -torch.inf).sum(-1, dtype=torch.int32)",
    ),
    "unused slots 0": (".to(torch.int32), pad, value=-1)", ".clamp_min(0).to(torch.int32), pad, value=0)"),
    "page offset left out": ("page * page_size + logical % page_size", "page * page_size"),
    "missing page kept": ("(indices >= 0) & (page >= 0)", "indices >= 0"),
    "sort not stable": (
        "descending=True, stable=True)",
        "descending=True, stable=True); values, rank = values, rank.flip(-1).sort(dim=-1).indices",
    ),
}


def planted(bug: str) -> Callable:
    """`chunked` with `bug`."""
    namespace = dict(vars(reference))
    sources = [inspect.getsource(f) for f in (reference.translated, reference.broadcast_lengths, reference.chunked)]
    for code in relations.with_bug(bug, *BUGS[bug], *sources):
        exec(code, namespace)
    return namespace["chunked"]


def run_all(op) -> dict[str, str | None]:
    """Name → None or the failure, for every relation."""
    return relations.outcomes(CHECKS, op)
