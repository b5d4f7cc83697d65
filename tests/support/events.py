"""Inputs, checks and planted bugs of the segment_events tests."""

# ruff: noqa: E501 (tables, one case a line)
from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable
from itertools import pairwise
from unittest import mock

import torch
from torch import Tensor

from memattn.ops import segment_events
from memattn.reference import segment_events as reference
from memattn.reference.segment_events import Settings, Span
from support import relations

CHECKS: dict[str, Callable] = {}
BASE = {"window": 30, "gamma": 1.0, "min_size": 4, "max_size": 24}
SETTINGS = (
    {},
    {"gamma": 0.3, "min_size": 1, "max_size": 7},
    {"window": 2, "gamma": 2.0},
    {"window": 500, "gamma": -0.5, "min_size": 9},
    {"gamma": 50.0},
    {"min_size": 6, "max_size": 6},
)  # fmt: skip
REFINED = ("modularity", "conductance")


def text(tokens: int, seed: int = 0, batch: int | None = None, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Surprises with spikes, and keys that drift and jump: what both rules have to find."""
    noise, rows = torch.Generator().manual_seed(seed), (1 if batch is None else batch, tokens)
    spikes = (torch.rand(rows, generator=noise) < 0.08) * 4.0
    surprise = torch.rand(rows, generator=noise) + spikes
    topic = torch.randn(rows[0], 40, 2, 6, generator=noise)[:, torch.arange(tokens) // 13 % 40]
    keys = 0.5 + topic + 0.4 * torch.randn(*rows, 2, 6, generator=noise)
    made = {"surprise": surprise.to(dtype), "keys": keys.to(dtype)}
    return made if batch is not None else {n: x[0] for n, x in made.items()}


def bounds_of(events, row: int | None = None) -> list[int]:
    """cu_events without what pads it."""
    cu, count = (events.cu_events, events.counts) if row is None else (events.cu_events[row], events.counts[row])
    return cu[: int(count) + 1].tolist()


def truth(surprise: Tensor, keys: Tensor | None = None, similarity: Tensor | None = None, **settings) -> list[int]:
    """The definition on a whole text of one row."""
    s = Settings(**{"refine": None, **settings})
    span = None if keys is None else Span(keys.double(), 0)
    end = len(surprise)
    begins, *_ = reference_loop(s, 0, 0, Span(surprise.double(), 0), span, similarity, end, True)
    return [0, *begins, end] if end else [0]


reference_loop = reference.loop  # also where a planted bug stands in its place


def check(function: Callable) -> Callable:
    """Enter a check in CHECKS under its name."""
    CHECKS[function.__name__] = function
    return function


def inputs_of(refine: str | None, made: dict[str, Tensor]) -> dict:
    """What a call with this refinement takes."""
    return {"surprise": made["surprise"], "refine": refine} | ({"keys": made["keys"]} if refine else {})


@check
def equals_definition(op):
    for seed, tokens in enumerate((0, 1, 2, 3, 9, 60, 200)):
        for refine in (None, *REFINED):
            for settings in SETTINGS[: 6 if refine is None else 2]:
                given = inputs_of(refine, text(tokens, seed)) | BASE | settings
                assert bounds_of(op(**given)) == truth(**given), f"{tokens} tokens, {settings}, {refine}"


@check
def spikes_begin_events(op):
    """By hand: a flat text with spikes; those too near to a cut are passed over, long events are cut."""
    z = torch.ones(60, dtype=torch.float64)
    z[[10, 12, 20, 50]] = 9.0
    assert bounds_of(op(surprise=z, **{**BASE, "window": 8, "max_size": 20})) == [0, 10, 20, 40, 50, 60]
    assert bounds_of(op(surprise=z, **{**BASE, "window": 8, "max_size": 60, "min_size": 11})) == [0, 12, 50, 60]
    for early, expected in ((1, [0, 9]), (2, [0, 2, 9])):  # one earlier surprise has no deviation
        z = torch.ones(9, dtype=torch.float64)
        z[early] = 9.0
        assert bounds_of(op(surprise=z, **{**BASE, "min_size": 1})) == expected


@check
def thresholds_are_of_the_window(op):
    """z_t against μ + γσ of the last W surprises and no others, around the threshold itself."""
    noise = torch.Generator().manual_seed(3)
    for window in (2, 7, 19):
        z = torch.rand(40, generator=noise, dtype=torch.float64)
        z[:20] += 5 * torch.rand(20, generator=noise, dtype=torch.float64)
        last = z[39 - window : 39]
        for factor, cut in ((1 + 1e-6, True), (1 - 1e-6, False)):
            z[39] = (last.mean() + 1.5 * last.std()) * factor
            found = bounds_of(op(surprise=z, window=window, gamma=1.5, min_size=1, max_size=100))
            assert (39 in found) == cut, f"window {window}, {factor} of the threshold"


@check
def constant_surprise_never_cuts(op):
    """Also where the window has just left other values: rounding is no surprise."""
    for value in (0.0, 0.1, 3.7):
        z = torch.cat([torch.rand(7, dtype=torch.float64) * 3, torch.full((200,), value, dtype=torch.float64)])
        found = bounds_of(op(surprise=z, **{**BASE, "window": 10, "max_size": 500, "gamma": 0.0}))
        assert all(b < 20 for b in found[:-1]), f"{value}: {found}"


@check
def sizes_keep_their_limits(op):
    for refine in (None, *REFINED):
        for settings in SETTINGS[:4]:
            given = inputs_of(refine, text(300, 5)) | BASE | settings
            found = bounds_of(op(**given))
            sizes = [b - a for a, b in pairwise(found)]
            assert found[0] == 0 and found[-1] == 300 and 0 < sizes[-1] <= given["max_size"]
            assert all(given["min_size"] <= n <= given["max_size"] for n in sizes[:-1]), (
                f"{settings}, {refine}: {sizes}"
            )


@check
def topics_are_found(op):
    """Two topics, the surprise some tokens late: refined cuts stand where the topic changes."""
    noise = torch.Generator().manual_seed(1)
    z = torch.rand(80, generator=noise, dtype=torch.float64)
    z[46] = 9.0
    topics = torch.eye(2, dtype=torch.float64)[(torch.arange(80) >= 40).long()]
    keys = (topics + 0.05 + 0.05 * torch.rand(80, 2, generator=noise))[:, None]
    for refine in REFINED:
        given = {"surprise": z, "window": 20, "gamma": 5.0, "min_size": 5, "max_size": 60, "refine": refine}
        assert bounds_of(op(**given, keys=keys)) == [0, 40, 80], refine
        short = {**given, "surprise": z[:50], "keys": keys[:50]}
        assert bounds_of(op(**short)) == [0, 40, 50], f"{refine}, the text ends soon"
        flat = keys.flatten(1)
        assert bounds_of(op(**given, similarity=flat @ flat.mT)) == [0, 40, 80], f"{refine}, a matrix"
        assert bounds_of(op(**given | {"min_size": 43}, keys=keys)) == [0, 43, 80], f"{refine}, min_size"


@check
def quality_is_that_of_graph_theory(op):
    """Against modularity and conductance written as sums over pairs, on a matrix that is no product of keys."""
    noise = torch.Generator().manual_seed(2)
    for refine in REFINED:
        for seed in range(6):
            a = torch.rand(40, 40, generator=noise, dtype=torch.float64) ** 3
            z = torch.rand(40, generator=noise, dtype=torch.float64)
            z[20] = 9.0
            given = {"surprise": z, "window": 15, "gamma": 5.0, "min_size": 3, "max_size": 30}
            graph, values = (a + a.mT)[10 - 10 : 20 + 10, 10 - 10 : 20 + 10] / 2, []
            for split in range(3, 21):
                side = torch.arange(30) < split
                degrees, total = graph.sum(1), graph.sum()
                if refine == "modularity":
                    same = side[:, None] == side
                    values.append((((graph - degrees[:, None] * degrees / total) * same).sum() / total).item())
                else:
                    cut = graph[side][:, ~side].sum()
                    values.append(-(cut / torch.minimum(degrees[side].sum(), degrees[~side].sum())).item())
            best = 3 + max(range(len(values)), key=values.__getitem__)
            found = bounds_of(op(**given, refine=refine, similarity=a))
            assert found[1] == best, f"{refine}, graph {seed}: {found[1]}, not {best}"


@check
def graphs_without_meaning_leave_the_cut(op):
    z = torch.linspace(0, 1, 40, dtype=torch.float64)
    z[20] = 9.0
    given = {"surprise": z, "window": 15, "gamma": 5.0, "min_size": 3, "max_size": 30}
    for keys in (torch.zeros(40, 1, 4), torch.full((40, 1, 4), torch.nan), torch.ones(40, 1, 4)):
        for refine in REFINED:
            expected = 20 if refine == "modularity" or not bool(keys[0, 0, 0] == 1) else None
            found = bounds_of(op(**given, keys=keys, refine=refine))
            assert expected is None or found[1] == expected, f"{refine}, keys {keys[0, 0, 0]}: {found}"
    apart = -torch.ones(40, 40)
    assert all(bounds_of(op(**given, similarity=apart, refine=r))[1] == 20 for r in REFINED)


@check
def rows_do_not_mix(op):
    for refine in (None, *REFINED):
        made = text(150, 7, batch=3)
        events = op(**inputs_of(refine, made), **BASE)
        for b in range(3):
            alone = op(**inputs_of(refine, {n: x[b] for n, x in made.items()}), **BASE)
            assert bounds_of(events, b) == bounds_of(alone), f"row {b}, {refine}"
            assert (events.cu_events[b, int(events.counts[b]) :] == 150).all()


@check
def cuts_into_calls_change_nothing(op):
    """A text in parts, one token at a time too: the same events, each as soon as nothing can change it."""
    for refine in (None, *REFINED):
        made = text(170, 11, batch=2)
        whole = op(**inputs_of(refine, made), **BASE)
        for cuts in ((0, 170), (0, 0, 1, 2, 60, 61, 170, 170), (0, 25, 50, 75, 100, 170), tuple(range(171))):
            state, found = None, [[0], [0]]
            for a, b in pairwise(cuts):
                part = inputs_of(refine, {n: x[:, a:b] for n, x in made.items()})
                events = op(**part, **BASE, initial_state=state, output_final_state=True)
                state = events.final_state
                for row in range(2):
                    bounds = bounds_of(events, row)
                    assert bounds[0] == found[row][-1] and bounds[-1] <= b
                    found[row] += bounds[1:]
            end = inputs_of(refine, {n: x[:, :0] for n, x in made.items()})
            events = op(**end, **BASE, initial_state=state)
            assert events.final_state is None
            for row in range(2):
                found[row] += bounds_of(events, row)[1:]
                assert found[row] == bounds_of(whole, row), f"{refine}, {len(cuts) - 1} calls, row {row}"


@check
def states_are_values(op):
    """Not changed by the call that reads them; rows can be reordered and begun afresh."""
    made, parts = text(120, 13, batch=2), [slice(0, 70), slice(70, 120)]
    first, second = (inputs_of("modularity", {n: x[:, p] for n, x in made.items()}) for p in parts)
    state = op(**first, **BASE, output_final_state=True).final_state
    before = state.clone()
    expected = op(**second, **BASE, initial_state=state)
    for name in state.fields:
        assert torch.equal(getattr(state, name), getattr(before, name)), f"{name} was overwritten"
    swapped = {n: x.flip(0) if isinstance(x, Tensor) else x for n, x in second.items()}
    other = op(**swapped, **BASE, initial_state=state.reorder(torch.tensor([1, 0])))
    assert bounds_of(other, 0) == bounds_of(expected, 1) and bounds_of(other, 1) == bounds_of(expected, 0)
    afresh = op(**second, **BASE, initial_state=state.reset(torch.tensor([True, False])))
    assert bounds_of(afresh, 1) == bounds_of(expected, 1)
    assert bounds_of(afresh, 0) == bounds_of(op(**second, **BASE), 0)


def run_all(op: Callable) -> dict[str, str | None]:
    """Name → None or the failure, for every check."""
    return relations.outcomes(CHECKS, op)


# --- planted bugs: the plain form with one wrong line each ------------------------------------------------------------

BUGS = {
    "window holds the token itself": ("max(0, t - s.window), t)", "max(0, t - s.window), t + 1)"),
    "window one long": ("max(0, t - s.window), t)", "max(0, t - s.window - 1), t)"),
    "deviation divides by n": ("window.std()", "window.std(correction=0)"),
    "gamma ignored": ("s.gamma * deviation", "deviation"),
    "not less than the threshold": ("> s.gamma * deviation + noise", ">= s.gamma * deviation - 2 * noise"),
    "three surprises needed": ("if len(window) < 2:", "if len(window) < 3:"),
    "min_size one less": ("size >= s.min_size and", "size >= s.min_size - 1 and"),
    "max_size one more": ("elif size != s.max_size", "elif size != s.max_size + 1"),
    "long events are not cut": ("elif size != s.max_size:", "else:"),
    "split leaves out the cut itself": ("proposed + 1):", "max(proposed, begin + s.min_size + 1)):"),
    "split nearer than min_size": ("range(begin + s.min_size,", "range(begin + 1,"),
    "first of equally good splits": ("value >= best - ROUNDING or value == best", "value > best + ROUNDING"),
    "conductance at its largest": ("return -float(a[:split, split:].sum())", "return float(a[:split, split:].sum())"),
    "volumes of inner similarities": ("float(degrees[:split].sum()), float(degrees[split:].sum())", "float(a[:split, :split].sum()), float(a[split:, split:].sum())"),
    "expected similarities left out": (" - (left**2 + right**2) / total**2", ""),
    "greater volume": ("least = min(left, right)", "least = max(left, right)"),
    "graph ends at the cut": ("min(end, proposed + around)", "proposed"),
    "graph begins at the event": ("max(0, begin - around)", "begin"),
    "matrix not made symmetric": ("return (a + a.mT) / 2", "return a"),
    "heads kept apart": ("keys.part(first, end).flatten(1).double()", "keys.part(first, end)[:, 0].double()"),
    "surroundings not awaited": ("if not over and t + size // 2 > end:", "if False:"),
    "cuts wait at the end of the text": ("if not over and", "if"),
    "event begins where it was proposed": ("begin = place\n", "begin = t\n"),
}  # fmt: skip


def planted(bug: str) -> Callable:
    """The public op on the plain form with `bug`."""
    name = "planted_segment_events"
    sys.modules[name] = module = types.ModuleType(name)  # dataclasses look their module up
    for code in relations.with_bug(bug, *BUGS[bug], inspect.getsource(reference)):
        exec(code, module.__dict__)

    def op(**given):
        with mock.patch.object(reference, "loop", module.loop):
            return segment_events(**given, backend="chunked")

    return op


STATE_BUGS = ("surprise", "keys", "statistics")


def forgetful(field: str) -> Callable:
    """The public op whose states lose half of one part."""

    def op(**given):
        events = segment_events(**given)
        if events.final_state is not None:
            x = getattr(events.final_state, field)
            x[:, : x.shape[1] * 2 // 3] = 0.5
        return events

    return op
