"""Time and memory of whole layers against the length of the text, one fresh process per point.

python bench/lengths.py measure --json bench/results/cpu/lengths/float32.json      minutes; --quick for a look
python bench/lengths.py page                                                       writes the page and its plot

A layer has width 512 and 8 heads. Three calls are measured: forward without gradients, forward and backward, and one
token after a text of that length. The memory is what a process held at most during the first such call, above what it
held before; time is the least of a few calls. A layer stops growing once one call took longer than --patience.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "python")]

from bench import fresh  # noqa: E402

RESULTS, PAGE = ROOT / "bench/results/cpu/lengths", ROOT / "docs/benchmarks/lengths.md"
WIDTH, HEADS = 512, 8
LENGTHS = tuple(1 << n for n in range(10, 17))
MODES = {"fwd": "forward", "fwdbwd": "forward and backward", "step": "one more token"}
COMMAND = "python bench/lengths.py measure --json bench/results/cpu/lengths/{}.json --dtype {}"


def layers() -> dict[str, Callable[..., Any]]:
    """Name -> factory taking device and dtype, in the order of the plot's legend."""
    from bench.peers.full_attention import FullAttention
    from memattn import nn

    return {
        "full attention (torch)": lambda **kw: FullAttention(WIDTH, HEADS, **kw),
        "window 512": lambda **kw: nn.SlidingWindowAttention(WIDTH, HEADS, window=512, **kw),
        "RAT, chunk 16": lambda **kw: nn.RAT(WIDTH, HEADS, chunk_size=16, **kw),
        "Infini-attention, segment 2048": lambda **kw: nn.InfiniAttention(WIDTH, HEADS, segment_size=2048, **kw),
        "Gated DeltaNet": lambda **kw: nn.GatedDeltaNet(WIDTH, HEADS, **kw),
    }


# --- one point, in a process of its own -------------------------------------------------------------------------------


def call_of(layer: Any, mode: str, length: int, x: Any) -> Callable[[], object]:
    """What is measured; of a step, the text before it has been read."""
    import torch

    if mode == "fwdbwd":

        def train() -> object:
            given = x.detach().requires_grad_()
            return torch.autograd.grad(layer(given).sum(), [given, *layer.parameters()], allow_unused=True)

        return train
    if mode == "fwd":
        return torch.no_grad()(lambda: layer(x))
    with torch.no_grad():
        _, state = layer(x, return_state=True)
    token = x[:, :1].clone()
    return torch.no_grad()(lambda: layer.step(token, state))


def point(name: str, mode: str, length: int, dtype: str, seconds: float) -> dict[str, Any]:
    """Least time of a call in ms and memory of the first in MiB."""
    import torch

    from bench.registry import DTYPES

    torch.manual_seed(0)
    layer = layers()[name](dtype=DTYPES[dtype])
    x = torch.randn(1, length, WIDTH, dtype=DTYPES[dtype])
    call_of(layer, mode, 64, x[:, :64].clone())()  # loads code, starts threads
    call = call_of(layer, mode, length, x)
    fresh.give_back_free_memory()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before, times = fresh.status_kib("VmRSS"), []
    end = time.perf_counter() + seconds
    while len(times) < 3 or (time.perf_counter() < end and len(times) < 200):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
        if len(times) == 1:
            extra = fresh.status_kib("VmHWM") - before
        if times[-1] > seconds:
            break
    return {"layer": name, "mode": mode, "length": length, "ms": 1e3 * min(times), "mib": extra / 1024}


# --- all of them ------------------------------------------------------------------------------------------------------


def points(dtype: str, lengths: tuple[int, ...], seconds: float, patience: float) -> Iterator[dict[str, Any]]:
    """Every layer at every length, shortest first."""
    for mode, name in itertools.product(MODES, layers()):
        for length in lengths:
            options = {"layer": name, "mode": mode, "length": length, "dtype": dtype, "seconds": seconds}
            command = [sys.executable, __file__, "point", *(str(x) for k, v in options.items() for x in (f"--{k}", v))]
            done = subprocess.run(command, capture_output=True, text=True, env=fresh.environment())
            if done.returncode:
                raise RuntimeError(f"{name}, {mode}, {length} tokens: {done.stderr.strip()[-2000:]}")
            row = json.loads(done.stdout.splitlines()[-1])
            yield row
            if row["ms"] > 1e3 * patience:
                break


def measure(dtype: str, lengths: tuple[int, ...], seconds: float, patience: float) -> dict[str, Any]:
    """As stored."""
    from bench import machine

    info, rows = machine.describe(), []
    for row in points(dtype, lengths, seconds, patience):
        rows.append(row)
        print("{mode:7} {layer:32} {length:7} tokens {ms:10.3f} ms {mib:9.1f} MiB".format(**row), flush=True)
    return {"machine": info, "dtype": dtype, "width": WIDTH, "heads": HEADS, "patience_s": patience, "points": rows}


# --- the page ---------------------------------------------------------------------------------------------------------


def series(rows: list[dict[str, Any]], mode: str) -> dict[str, list[dict[str, Any]]]:
    """The points of a mode by layer."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["mode"] == mode:
            found.setdefault(row["layer"], []).append(row)
    return found


def draw(result: dict[str, Any]) -> bytes:
    """Six panels: time above memory, one column per mode."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    from memattn.demo.figure import short, thousands

    figure = Figure(figsize=(14, 7.5), layout="constrained")
    panels = figure.subplots(2, len(MODES))
    for column, (mode, title) in enumerate(MODES.items()):
        for axes, key, unit in zip(panels[:, column], ("ms", "mib"), ("ms", "MiB above the start"), strict=True):
            for name, found in series(result["points"], mode).items():
                known = [(r["length"], r[key]) for r in found if r[key] > 0]
                axes.plot([x for x, _ in known], [y for _, y in known], "o-", ms=3.5, lw=1.5, label=name)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.xaxis.set_major_formatter(FuncFormatter(short))
            axes.yaxis.set_major_formatter(FuncFormatter(thousands))
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.set_xlabel("tokens")
            axes.set_ylabel(unit)
            axes.grid(True, color="#e5e7eb", lw=0.7)
        panels[0, column].set_title(f"{title}, {result['dtype']}", loc="left")
    panels[0, 0].legend(frameon=False, fontsize=8)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def cells(result: dict[str, Any], mode: str, key: str, digits: int) -> Iterator[str]:
    """Rows of a Markdown table, one per layer."""
    lengths = sorted({row["length"] for row in result["points"]})
    yield f"| {MODES[mode]}, {'ms' if key == 'ms' else 'MiB'} | " + " | ".join(f"{n // 1024}K" for n in lengths) + " |"
    yield "|---" * (len(lengths) + 1) + "|"
    for name, found in series(result["points"], mode).items():
        by_length = {row["length"]: row[key] for row in found}
        yield (
            f"| {name} | " + " | ".join(f"{by_length[n]:.{digits}f}" if n in by_length else "" for n in lengths) + " |"
        )


def page(files: list[Path]) -> str:
    """The Markdown around the plots."""
    from bench.machine import one_line

    lines = ["# Time and memory against length", ""]
    lines += ["Generated by `python bench/lengths.py page`. One layer of width 512 with 8 heads, batch 1, projections"]
    lines += ["included, each point in a fresh process. Memory is the most a process held during its first call, above"]
    lines += ["what it held before: under an MiB that is noise. One more token is `step` after a text of that length."]
    lines += ["A row ends where one call took longer than the patience given.", ""]
    for file in files:
        result = json.loads(file.read_text())
        lines += [f"## {result['dtype']}", "", f"![time and memory against length](lengths_{file.stem}.png)", ""]
        lines += [f"`{COMMAND.format(file.stem, result['dtype'])}` on {one_line(result['machine'])}.", ""]
        for mode, (key, digits) in itertools.product(MODES, (("ms", 2), ("mib", 1))):
            lines += [*cells(result, mode, key, digits), ""]
    return "\n".join(lines)


def write_pages() -> None:
    """docs/benchmarks/lengths.md and one plot per result."""
    files = sorted(RESULTS.glob("*.json"))
    for file in files:
        (PAGE.parent / f"lengths_{file.stem}.png").write_bytes(draw(json.loads(file.read_text())))
    PAGE.write_text(page(files))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["measure", "page", "point"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--seconds", type=float, default=0.5, help="given to each point")
    parser.add_argument("--patience", type=float, default=3.0, help="a layer stops growing after a call of this long")
    parser.add_argument("--quick", action="store_true", help="two short lengths")
    parser.add_argument("--layer")
    parser.add_argument("--mode", choices=list(MODES))
    parser.add_argument("--length", type=int)
    options = parser.parse_args()
    if options.what == "page":
        write_pages()
    elif options.what == "point":
        print(json.dumps(point(options.layer, options.mode, options.length, options.dtype, options.seconds)))
    else:
        lengths = LENGTHS[:2] if options.quick else LENGTHS
        result = measure(options.dtype, lengths, options.seconds, options.patience)
        if options.json:
            options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
