"""What every list of relations and of planted bugs needs: judging results, running the list, changing one line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import CodeType

import torch

from support.compare import relative_error


def assert_same(actual, expected, what: str) -> None:
    """Equal bit for bit, NaN to NaN."""
    for x, y in zip(actual, expected, strict=True):
        assert x.shape == y.shape and torch.equal(x.nan_to_num(1e30), y.nan_to_num(1e30)), what


def assert_near(actual: dict, expected: dict, what: str, tolerance: float) -> None:
    """Every tensor within a relative error."""
    for name, x in expected.items():
        error = relative_error(actual[name], x)
        assert error <= tolerance, f"{what}, {name}: relative error {error:.3g} > {tolerance:.3g}"


def outcomes(checks: Mapping[str, Callable], *arguments: object) -> dict[str, str | None]:
    """Name → None or the failure, for every check called with `arguments`."""
    results: dict[str, str | None] = {}
    for name, check in checks.items():
        try:
            check(*arguments)
            results[name] = None
        except Exception as failure:
            results[name] = f"{type(failure).__name__}: {failure}"
    return results


def with_bug(bug: str, old: str, new: str, *sources: str) -> list[CodeType]:
    """The sources with `new` in place of `old`, compiled; fails when the line that the bug changes is gone."""
    if not any(old in source for source in sources):
        raise AssertionError(f"planted bug {bug!r}: the reference no longer contains {old!r}")
    return [compile(source.replace(old, new), f"<planted: {bug}>", "exec") for source in sources]
