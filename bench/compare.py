"""Gate, then time: candidates on the same inputs, checked against float64 before and after, interleaved.

A candidate whose results are wrong gets no time. Each side is warmed until three calls agree within 5 % (at least 8
calls: a first call can be several times slower, and timing it would flatter whoever goes second). Then the candidates
take turns, A B A B, each call on another input set than the one before, so that neither cached inputs nor a slow
minute of the machine favours one of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from support.compare import relative_error
from torch import Tensor

from bench.registry import Call, Entry, Inputs, Results

WARM_AGREEING, WARM_TOLERANCE, WARM_LEAST, WARM_MOST = 3, 0.05, 8, 40
ROUNDS_LEAST, ROUNDS_MOST = 5, 100
BLOCK_SECONDS = 2e-3  # short calls are timed in blocks of at least this long
BLOCK_MOST = 50  # calls
QUEUE_CYCLES = 400_000  # about 0.2 ms of GPU sleep per call of a block, during which the host enqueues the block
FAILURES = (RuntimeError, ValueError, TypeError, NotImplementedError, MemoryError)  # become a row that says so


@dataclass(frozen=True)
class Candidate:
    """One column of the comparison: a backend of ours or a peer."""

    name: str
    version: str
    call: Call
    judged: bool = True  # False: another function of equal width, of which finite results are all one can ask


@dataclass
class Outcome:
    """What came out for one candidate: a status, errors against float64, and times only if every gate was green."""

    name: str
    version: str
    status: str = "PASSED"  # or INCORRECT, ERROR, UNAVAILABLE
    reason: str = ""
    errors: dict[str, dict[str, float]] = field(default_factory=dict)  # "before" and "after": tensor -> relative error
    warm_calls: int = 0
    calls_per_block: int = 1
    seconds: list[float] = field(default_factory=list)  # per call
    extra_mib: float | None = None  # GPU memory of one call above inputs and results

    def fail(self, status: str, reason: str) -> None:
        """No time for a wrong answer."""
        self.status, self.reason, self.seconds = status, reason, []

    def summary(self) -> dict[str, Any]:
        """As stored in the JSON results; times in milliseconds."""
        row: dict[str, Any] = {k: getattr(self, k) for k in ("name", "version", "status", "reason", "errors")}
        if self.extra_mib is not None:
            row["extra_mib"] = self.extra_mib
        if self.seconds:
            ms = sorted(1e3 * s for s in self.seconds)
            row |= {"min_ms": ms[0], "median_ms": statistics.median(ms)}
            row |= {"p20_ms": ms[len(ms) // 5], "p80_ms": ms[(4 * len(ms)) // 5], "rounds": len(ms)}
            row |= {"warm_calls": self.warm_calls, "calls_per_block": self.calls_per_block}
        return row


# --- the gate --------------------------------------------------------------------------------------------------------


def in_float64(given: Inputs) -> Inputs:
    """The same inputs, exactly, in float64; what required a gradient still does."""

    def convert(x: Any) -> Any:
        if not (isinstance(x, Tensor) and x.is_floating_point()):
            return x
        return x.detach().double().requires_grad_(x.requires_grad)

    return {name: convert(x) for name, x in given.items()}


def copy_of(given: Inputs) -> Inputs:
    """Clones of all tensors, to know afterwards what a call was given."""

    def copied(x: Any) -> Any:
        return x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x

    return {name: copied(x) for name, x in given.items()}


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """torch.empty gives NaN inside: an element that a kernel forgets to write shows."""
    before, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)


class Gate:
    """Compares a call's results with float64, and its inputs with what they were."""

    def __init__(self, entry: Entry, mode: str, ceiling: float):
        self.entry, self.mode, self.ceiling = entry, mode, ceiling
        self.mutated = entry.mutated.get(mode, ())
        self.known: dict[int, Results] = {}

    def truth(self, index: int, given: Inputs) -> Results:
        """Float64 results for input set `index`; kept for the next candidate where the inputs stay the same."""
        if self.mutated:
            return self.entry.truth(self.mode, in_float64(given))
        if index not in self.known:
            self.known[index] = self.entry.truth(self.mode, in_float64(given))
        return self.known[index]

    def judge(self, index: int, before: Inputs, after: Inputs, results: Results) -> tuple[dict[str, float], str]:
        """(error of each tensor, "" or what is wrong) of a call on input set `index`."""
        errors, wrong = {}, []
        for name, expected in self.truth(index, before).items():
            errors[name] = relative_error(results[name], expected) if name in results else float("inf")
            if not errors[name] <= self.ceiling:  # NaN is red too
                wrong.append(f"{name} is off by {errors[name]:.2g}, allowed {self.ceiling:.0e}")
        for name, x in before.items():
            if isinstance(x, Tensor) and name not in self.mutated and not torch.equal(x, after[name]):
                wrong.append(f"input {name} was overwritten")
        return errors, "; ".join(wrong)


# --- clocks ----------------------------------------------------------------------------------------------------------


def seconds_cpu(call: Call, sets: list[Inputs]) -> tuple[float, Results]:
    """Mean seconds of one call over `sets`, and the last call's results."""
    start = time.perf_counter()
    for given in sets:
        results = call(given)
    return (time.perf_counter() - start) / len(sets), results


def seconds_cuda(call: Call, sets: list[Inputs]) -> tuple[float, Results]:
    """Device time by events. A sleep goes first: short calls are then queued when they begin, not timed as launches."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(QUEUE_CYCLES * (len(sets) + 4))
    start.record()
    for given in sets:
        results = call(given)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / len(sets), results


def seconds_host(call: Call, sets: list[Inputs]) -> tuple[float, Results]:
    """What the host spends on a call, whether or not the device has finished."""
    elapsed, results = seconds_cpu(call, sets)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return elapsed, results


def clock(device: str) -> Callable[[Call, list[Inputs]], tuple[float, Results]]:
    """The clock of a device."""
    return seconds_cuda if device == "cuda" else seconds_cpu


# --- the comparison --------------------------------------------------------------------------------------------------


class Race:
    """Candidates on one (op, mode, shape, dtype)."""

    def __init__(self, gate: Gate, sets: list[Inputs], device: str, seconds: float):
        self.gate, self.sets, self.device, self.budget = gate, sets, device, seconds
        self.time, self.turn = clock(device), 0

    def run(self, candidates: list[Candidate]) -> list[Outcome]:
        """One outcome per candidate, in order."""
        outcomes = [Outcome(c.name, c.version) for c in candidates]
        alive = []
        for candidate, outcome in zip(candidates, outcomes, strict=True):
            try:
                self._check(candidate, outcome, "before")
                if outcome.status == "PASSED":
                    self._warm(candidate, outcome)
                    alive.append((candidate, outcome))
            except FAILURES as error:
                outcome.fail("ERROR", f"{type(error).__name__}: {str(error).splitlines()[0]}")
        self._rounds(alive)
        for candidate, outcome in alive:
            self._check(candidate, outcome, "after")
        return outcomes

    def check_only(self, candidates: list[Candidate]) -> list[Outcome]:
        """The gate without the timing."""
        outcomes = [Outcome(c.name, c.version, "CHECKED") for c in candidates]
        for candidate, outcome in zip(candidates, outcomes, strict=True):
            try:
                self._check(candidate, outcome, "before")
            except FAILURES as error:
                outcome.fail("ERROR", f"{type(error).__name__}: {str(error).splitlines()[0]}")
        return outcomes

    def _check(self, candidate: Candidate, outcome: Outcome, when: str) -> None:
        """One call judged: before timing on the first input set; after it on the last, called as the timed ones."""
        index = 0 if when == "before" else len(self.sets) - 1
        given = self.sets[index]
        before = copy_of(given)
        if when == "before":
            with poisoned_allocations():
                results = candidate.call(given)
        else:
            held = self._memory()
            results = self.time(candidate.call, [given])[1]
            if held is not None:
                kept = sum(x.nbytes for x in results.values() if all(x is not y for y in given.values()))
                outcome.extra_mib = (torch.cuda.max_memory_allocated() - held - kept) / 2**20
        if candidate.judged:
            errors, wrong = self.gate.judge(index, before, given, results)
        else:
            errors, wrong = {}, "" if all(x.isfinite().all() for x in results.values()) else "results are not finite"
        outcome.errors[when] = errors
        if wrong:
            outcome.fail("INCORRECT", f"{when} timing: {wrong}")

    def _memory(self) -> int | None:
        """GPU bytes held now, the peak counter set back to them."""
        if self.device != "cuda":
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def _next(self, count: int) -> list[Inputs]:
        chosen = [self.sets[(self.turn + i) % len(self.sets)] for i in range(count)]
        self.turn += count
        return chosen

    def _warm(self, candidate: Candidate, outcome: Outcome) -> None:
        recent: list[float] = []
        started = time.perf_counter()
        while len(recent) < WARM_MOST:
            recent.append(self.time(candidate.call, self._next(1))[0])
            last = recent[-WARM_AGREEING:]
            agree = max(last) <= (1 + WARM_TOLERANCE) * min(last)
            late = time.perf_counter() - started > self.budget
            if len(recent) >= WARM_LEAST and (agree or late):
                break
        outcome.warm_calls = len(recent)
        outcome.calls_per_block = max(1, min(BLOCK_MOST, round(BLOCK_SECONDS / max(min(recent), 1e-9))))

    def _rounds(self, alive: list[tuple[Candidate, Outcome]]) -> None:
        started = time.perf_counter()
        for done in range(ROUNDS_MOST):
            if done >= ROUNDS_LEAST and time.perf_counter() - started > self.budget:
                break
            for candidate, outcome in alive:
                outcome.seconds.append(self.time(candidate.call, self._next(outcome.calls_per_block))[0])
