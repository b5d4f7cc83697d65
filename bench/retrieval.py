"""Latency of one decode step of block retrieval against the size of the memory.

python bench/retrieval.py measure --json bench/results/cpu/retrieval/decode.json      minutes; --quick for a look
python bench/retrieval.py page                                                        writes the page and its plots

The step is that of bench/ops/block_retrieval.py: 32 query and 8 key heads of 128, 32 of the blocks of 64 tokens. The
candidates take turns on the same memory, for at least --seconds and LEAST rounds; time is the least of their calls.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "python"), str(ROOT / "tests")]

RESULTS, PAGE = ROOT / "bench/results/cpu/retrieval", ROOT / "docs/benchmarks/retrieval.md"
LENGTHS = tuple(1 << n for n in range(12, 19))
DTYPES = ("float32", "bfloat16")
LEAST = 12  # rounds, after one that loads code
COMMAND = (
    "OMP_NUM_THREADS={} python bench/retrieval.py measure --json bench/results/cpu/retrieval/{}.json --seconds {:g}"
)


# --- measuring --------------------------------------------------------------------------------------------------------


def candidates() -> dict[str, Callable[[Any], object]]:
    """Name -> call, in the order of the plot's legend."""
    from bench.ops import block_retrieval
    from bench.peers import torch_blocks, torch_sdpa

    return {
        "block_scores, topk, sparse_attention": block_retrieval.call("fwd", "cpu"),
        "the same selection in torch": torch_blocks.retrieval,
        "torch SDPA over everything, heads first": torch_sdpa.heads_first,
    }


def points(length: int, dtype: str, seconds: float) -> Iterator[dict[str, Any]]:
    """Least time of each candidate's calls over a memory of so many tokens, in ms."""
    from bench.ops import block_retrieval
    from bench.peers import torch_sdpa
    from bench.registry import DTYPES as KINDS

    case = replace(block_retrieval.RETRIEVAL, tokens=length)
    given = block_retrieval.inputs(case, "fwd", KINDS[dtype], "cpu", 0)
    times: dict[str, list[float]] = {name: [] for name in candidates()}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, times.values())) <= LEAST:
        for name, call in candidates().items():
            start = time.perf_counter()
            call(given)
            times[name].append(1e3 * (time.perf_counter() - start))
    torch_sdpa._of_equal_width.cache_clear()
    for name, found in times.items():
        yield {"name": name, "dtype": dtype, "length": length, "ms": min(found[1:])}


def measure(lengths: tuple[int, ...], seconds: float) -> dict[str, Any]:
    """As stored."""
    from bench import machine

    info, rows = machine.describe(), []
    for dtype in DTYPES:
        for length in lengths:
            for row in points(length, dtype, seconds):
                rows.append(row)
                print("{dtype:9} {name:40} {length:7} tokens {ms:10.3f} ms".format(**row), flush=True)
    return {"machine": info, "seconds": seconds, "points": rows}


# --- the page ---------------------------------------------------------------------------------------------------------


def series(result: dict[str, Any], dtype: str) -> dict[str, dict[int, float]]:
    """Milliseconds by candidate and length."""
    found: dict[str, dict[int, float]] = {}
    for row in result["points"]:
        if row["dtype"] == dtype:
            found.setdefault(row["name"], {})[row["length"]] = row["ms"]
    return found


def draw(result: dict[str, Any]) -> bytes:
    """A panel for each dtype."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    from memattn.demo.figure import short, thousands

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels = figure.subplots(1, len(DTYPES), sharey=True)
    for axes, dtype in zip(panels, DTYPES, strict=True):
        for name, found in series(result, dtype).items():
            axes.plot(list(found), list(found.values()), "o-", ms=3.5, lw=1.5, label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(short))
        axes.yaxis.set_major_formatter(FuncFormatter(thousands))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("tokens in memory")
        axes.grid(True, color="#e5e7eb", lw=0.7)
        axes.set_title(f"one decode step, {dtype}", loc="left")
    panels[0].set_ylabel("ms")
    panels[0].legend(frameon=False, fontsize=8)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def page(files: list[Path]) -> str:
    """The Markdown around the plots."""
    from bench.machine import one_line

    lines = ["# Latency against the size of the memory", ""]
    lines += [
        "Generated by `python bench/retrieval.py page`. One decode step of 32 query and 8 key heads of 128 over a"
    ]
    lines += [
        "memory in RAM: scores of the means of all blocks of 64 tokens, selection of 32 blocks for each key head,"
    ]
    lines += [
        "attention to their 2,048 tokens. The means are kept beside the memory and not formed anew. SDPA attends to"
    ]
    lines += [
        "every token, in the layout that suits it best. The candidates take turns, which empties the cache between"
    ]
    lines += ["two calls where the memory is larger than the cache; times are minima.", ""]
    for file in files:
        result = json.loads(file.read_text())
        command = COMMAND.format(result["machine"]["cpu"]["threads"], file.stem, result["seconds"])
        lines += [f"![latency against tokens in memory](retrieval_{file.stem}.png)", ""]
        lines += [
            f"`{command}` on {one_line(result['machine'])}.",
            "",
        ]
        for dtype in DTYPES:
            found = series(result, dtype)
            lengths = sorted(next(iter(found.values())))
            lines += [f"| {dtype}, ms | " + " | ".join(f"{n // 1024}K" for n in lengths) + " |"]
            lines += ["|---" * (len(lengths) + 1) + "|"]
            lines += [f"| {name} | " + " | ".join(f"{ms[n]:.2f}" for n in lengths) + " |" for name, ms in found.items()]
            lines += [""]
    return "\n".join(lines)


def write_pages() -> None:
    """docs/benchmarks/retrieval.md and one plot per result."""
    files = sorted(RESULTS.glob("*.json"))
    for file in files:
        (PAGE.parent / f"retrieval_{file.stem}.png").write_bytes(draw(json.loads(file.read_text())))
    PAGE.write_text(page(files))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["measure", "page"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=6.0, help="given to each size")
    parser.add_argument("--quick", action="store_true", help="two short lengths")
    options = parser.parse_args()
    if options.what == "page":
        return write_pages()
    result = measure(LENGTHS[:2] if options.quick else LENGTHS, options.seconds)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
