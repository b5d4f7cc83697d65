"""Results as text for the terminal; report.py turns the same rows into pages."""

from __future__ import annotations

from typing import Any

from bench.roofline import Ceilings

REASON = 120  # characters of a reason on the terminal; the JSON has all of it
BELOW = 0.8  # of the floor: less than torch's best rates allow, so that something was measured wrongly

Row = dict[str, Any]


def number(x: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{x:.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}" if x >= 1 else f"{x:.3f}"


def rates(ceilings: Ceilings, source: str) -> str:
    """What the machine can do at most."""
    memory = f"memory {ceilings.memory / 1e9:.0f} GB/s read plus written ({ceilings.cached / 1e9:.0f} in cache)"
    product = f"{ceilings.float32 / 1e9:.0f} GFLOP/s float32, {ceilings.bfloat16 / 1e9:.0f} bfloat16"
    return f"ceilings ({source}): {memory}; matrix product {product}"


def ours(row: Row) -> Row | None:
    """Our fastest backend's summary, which ratios refer to."""
    timed = [c for c in row["candidates"] if "min_ms" in c and c["name"].startswith("memattn")]
    return min(timed, key=lambda c: c["min_ms"]) if timed else None


def largest_error(summary: Row) -> str:
    """Of any tensor, before or after timing."""
    errors = [e for gate in summary["errors"].values() for e in gate.values()]
    return f"{max(errors):.1e}" if errors else "-"


def title(row: Row) -> str:
    """Op, shape, floor and work."""
    cached = " (state in cache)" if row["group"].endswith("-cached") else ""
    name = f"{row['op']} {row['mode']} {row['dtype']} {row['shape']}{cached}"
    work = f"{row['bytes'] / 1e6:.1f} MB, {row['flops'] / 1e9:.3g} GFLOP"
    return f"{name}: floor {number(row['floor_ms'])} ms ({row['bound']}; {work})"


def line(row: Row, c: Row, base: Row | None) -> str:
    """One candidate."""
    if "min_ms" not in c:
        reason = f": {c['reason'][:REASON]}" if c["reason"] else ""
        return f"  {c['name']:26} {c['status'].lower()}{reason}" + (
            f", error {largest_error(c)}" if c["errors"] else ""
        )
    spread = f"p20-p80 {number(c['p20_ms'])}-{number(c['p80_ms'])}"
    times = f"min {number(c['min_ms']):>6} ms  median {number(c['median_ms']):>6} ms  {spread}"
    gap = "" if row["group"] == "call" else f"  {c['min_ms'] / row['floor_ms']:5.1f} x floor"
    text = f"  {c['name']:26} {times}{gap}  error {largest_error(c)}"
    if base is not None and c is not base:
        minima, medians = c["min_ms"] / base["min_ms"], c["median_ms"] / base["median_ms"]
        text += f"  ours is {minima:.2f} x as fast (minima), {medians:.2f} (medians)"
    return text + ("  BELOW THE FLOOR" if c["min_ms"] < BELOW * row["floor_ms"] else "")


def race(row: Row) -> str:
    """One shape: a title with the floor, a line per candidate."""
    base = ours(row)
    return "\n".join([f"\n{title(row)}", *(line(row, c, base) for c in row["candidates"])])


def per_token(rows: list[Row]) -> str:
    """Nanoseconds per token over T, for the rows that grow T alone."""
    lines = []
    for row in (r for r in rows if r["group"] == "long"):
        if (base := ours(row)) is not None:
            tokens = row["case"]["batch"] * row["case"]["length"]
            name = f"{row['op']} {row['dtype']} {row['shape']}"
            lines.append(f"  {name:50} {1e6 * base['min_ms'] / tokens:8.1f} ns  ({base['name']})")
    return "\n".join(["\ntime per token (minimum):", *lines]) if lines else ""


def facts(found: Row) -> str:
    """Import time, cost of a call, peak memory."""
    imports = found["import"]
    lines = [f"\nimport memattn adds {imports['extra_s']:.3f} s to import torch (allowed {imports['allowed_s']} s)"]
    for name, r in imports["imports"].items():
        lines.append(f"  {name:18} min {r['min_s']:.3f} s, median {r['median_s']:.3f} s")
    lines.append("memory of one call above inputs and results, first call at that size in a fresh process:")
    for m in found["memory"]:
        where = f"({m['mode']} {m['dtype']} {m['shape']}, {m['threads']} threads)" if "shape" in m else ""
        size = m["error"] if "error" in m else f"{m['extra_mib']:8.1f} MiB"
        lines.append(f"  {m['name']:26} {size}  {where}")
    return "\n".join(lines)
