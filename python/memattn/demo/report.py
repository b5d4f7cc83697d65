"""The report of a run: text for the terminal, a PNG, a self-contained HTML page and the same figures as JSON."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from memattn.demo.checkpoint import write_atomically
from memattn.demo.documents import SizePoint
from memattn.demo.figure import draw, short
from memattn.demo.results import Results
from memattn.demo.stream import Reading

FILES = ("report.html", "report.png", "report.json")
_MIB = 2**20


@dataclass(frozen=True)
class Table:
    title: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""


def write_report(results: Results, folder: Path) -> None:
    png = draw(results)
    contents = (_page(results, png).encode(), png, results.to_json().encode())
    for name, content in zip(FILES, contents, strict=True):
        write_atomically(folder / name, content)


def text(results: Results) -> str:
    lines = [headline(results)]
    for table in tables(results):
        lines += ["", table.title, *_aligned(table)]
        if table.note:
            lines.append(table.note)
    return "\n".join(lines)


def headline(results: Results) -> str:
    state = f"stopped while {results.stopped}; " if results.stopped else ""
    machine = results.machine
    return (
        f"memattn demo, {state}{results.seconds:.0f} s on {machine['device']}, {machine['threads']} threads, "
        f"torch {machine['torch']}, memattn {machine['memattn']}"
    )


def tables(results: Results) -> Iterator[Table]:
    """Those whose phases were reached."""
    if results.corpus:
        yield _about(results)
    if results.baselines or results.stream or results.training.curve_bits:
        yield _bits(results)
    if results.rows:
        yield _positions(results)
    if results.stream:
        yield _stream(results.stream)
    if results.comparison.memory:
        yield _comparison(results)
    if results.memory_sizes:
        yield _memory_sizes(results.memory_sizes)


def _about(results: Results) -> Table:
    corpus, model = results.corpus, results.model
    rows = [
        ("trained on", f"{corpus['train_files']:,} files, {corpus['train_bytes']:,} bytes"),
        ("held out", f"{corpus['held_out_files']:,} files, {corpus['held_out_bytes']:,} bytes"),
        ("model", f"{' + '.join(model['layers'])}, width {model['embed_dim']}, {model['parameters']:,} parameters"),
        (
            "arithmetic",
            model["dtype"] + (f"; gated delta rule on backend {model['backend']}" if model["backend"] else ""),
        ),
    ]
    training = results.training
    if training.curve_bytes:
        rows.append(
            ("training", f"{training.step:,} steps, {training.curve_bytes[-1]:,} bytes in {training.seconds:.0f} s")
        )
    return Table("Text and model", ("", ""), rows, "Text: the standard library of this Python, split by file hash.")


def _bits(results: Results) -> Table:
    rows = [(name, f"{bits:.3f}") for name, bits in results.baselines.items()]
    if results.training.curve_bits:
        rows.append(("model, end of training, on training text", f"{_mean(results.training.curve_bits[-10:]):.3f}"))
    if results.rows:
        name = f"model, {results.rows.rows} texts of {short(results.rows.length)} bytes"
        rows.append((name, f"{results.rows.bits_per_byte:.3f}"))
        if results.wiped is not None:
            rows.append((f"… its memory wiped every {short(results.wiped_every)} bytes", f"{results.wiped:.3f}"))
    if results.stream:
        rows.append(("model, the held-out stream", f"{results.stream.bits_per_byte:.3f}"))
    return Table(
        "Bits per byte, held out",
        ("", "bits/byte"),
        rows,
        "gzip, lzma: the held-out stream alone. Order-2 counts: learned from all training text, scored on the stream.",
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _positions(results: Results) -> Table:
    assert results.rows is not None
    buckets = [(b, f"{results.rows.rows} texts") for b in results.rows.buckets]
    if results.stream:
        buckets += [(b, "stream") for b in results.stream.buckets if b.first >= results.rows.length]
    rows = [
        (
            f"{b.first:,}–{b.last:,}",
            f"{b.bits:.3f}",
            "" if b.error is None else f"± {b.error:.3f}",
            f"{b.count:,}",
            source,
        )
        for b, source in buckets
    ]
    return Table(
        "Held-out bits per byte by position in the context",
        ("bytes before", "bits/byte", "std. error", "bytes", "from"),
        rows,
    )


def _stream(stream: Reading) -> Table:
    rows = [
        ("bytes read", f"{stream.length:,}"),
        ("bytes per second", f"{stream.length / stream.seconds:,.0f}"),
        ("bits per byte", f"{stream.bits_per_byte:.3f}"),
        ("resident memory at the start", f"{stream.resident[0][1] / _MIB:.1f} MiB"),
        ("resident memory at the end", f"{stream.resident[-1][1] / _MIB:.1f} MiB"),
        ("growth over the last nine tenths", f"{stream.growth / _MIB:+.1f} MiB"),
    ]
    return Table("One held-out stream, state carried from chunk to chunk", ("", ""), rows)


def _comparison(results: Results) -> Table:
    comparison = results.comparison
    softmax = {p.context: p for p in comparison.softmax}
    rows = []
    for d in comparison.memory:
        s = softmax.get(d.context)
        rows.append(
            (
                short(d.context),
                *(_speed(p.prefill_seconds, d.context) if p else "–" for p in (d, s)),
                *(_speed(p.decode_seconds, 1) if p else "–" for p in (d, s)),
                *(_mib(p.peak) if p else "–" for p in (d, s)),
                *(_mib(p.state) if p else "–" for p in (d, s)),
            )
        )
    head = ("context", "read/s Δ", "softmax", "write/s Δ", "softmax", "peak MiB Δ", "softmax", "kept MiB Δ", "softmax")
    note = (
        "Δ: the model; softmax: the same model with full attention and a key/value cache in place of every "
        "memory layer. Batch 1; bytes per second; peak: beyond the model, while reading. Softmax reads in one piece, "
        "its fastest form, and writes with a preallocated cache filled with random numbers."
    )
    if comparison.stopped:
        note += f" {comparison.stopped[0].upper()}{comparison.stopped[1:]}."
    return Table("The same model with softmax attention", head, rows, note)


def _memory_sizes(points: Sequence[SizePoint]) -> Table:
    rows = []
    for p in points:
        less, error = p.gain(points[0])
        gain = ("", "") if p is points[0] else (f"{less:+.3f}", "" if error is None else f"± {error:.3f}")
        rows.append((short(p.size) if p.size else "0", f"{p.bits:.3f}", *gain, f"{p.read / p.seconds:,.0f}"))
    note = (
        f"The last bytes of {len(points[0].documents)} held-out files, the same for every size; each file is read from "
        "its start, with an empty memory. One model for all rows: while it was trained, its memory filled up from "
        "nothing again and again, so that none is not new to it."
    )
    head = ("memory, tokens", "bits/byte", "less than with 0", "std. error", "bytes/s")
    return Table("Held-out bits per byte by size of the memory", head, rows, note)


def _speed(seconds: float | None, count: int) -> str:
    return f"{count / seconds:,.0f}" if seconds else "–"


def _mib(size: int | None) -> str:
    return "–" if size is None else f"{size / _MIB:,.1f}"


def _aligned(table: Table) -> list[str]:
    """Words to the left, numbers to the right."""
    lines = [table.head, *table.rows] if any(table.head) else list(table.rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    numeric = [any(table.head) and i > 0 for i in range(len(widths))]
    columns = [
        [cell.rjust(width) if right else cell.ljust(width) for cell in column]
        for column, width, right in zip(zip(*lines, strict=True), widths, numeric, strict=True)
    ]
    return ["  " + "  ".join(cells).rstrip() for cells in zip(*columns, strict=True)]


_CSS = """
:root { color-scheme: light dark; --line: #8884; --quiet: #6b7280; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; margin-bottom: 0; } h2 { font-size: 1.05rem; margin: 2rem 0 .4rem; }
img { width: 100%; background: white; border-radius: 6px; margin-top: 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: .15rem .9rem .15rem 0; border-bottom: 1px solid var(--line); text-align: right; font-weight: 400; }
td:first-child, th:first-child, table.pairs td { text-align: left; } th { color: var(--quiet); }
p.note, p.about { color: var(--quiet); max-width: 50rem; } p.note { font-size: .9em; margin-top: .3rem; }
pre { background: #8881; padding: 1rem; border-radius: 6px; overflow-x: auto; }
"""


def _page(results: Results, png: bytes) -> str:
    picture = base64.b64encode(png).decode()
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>memattn demo</title>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<style>{_CSS}</style><h1>memattn demo</h1><p class='about'>{html.escape(headline(results))}</p>",
        f"<img alt='plots; every number is in the tables below' src='data:image/png;base64,{picture}'>",
        *(_html_table(table) for table in tables(results)),
    ]
    if results.sample is not None:
        parts.append(f"<h2>What it writes</h2><pre>{html.escape(results.sample)}</pre>")
    return "\n".join(parts) + "\n"


def _html_table(table: Table) -> str:
    def line(cells: tuple[str, ...], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    kind = "" if any(table.head) else " class='pairs'"
    body = ([line(table.head, "th")] if any(table.head) else []) + [line(row, "td") for row in table.rows]
    note = f"<p class='note'>{html.escape(table.note)}</p>" if table.note else ""
    return f"<h2>{html.escape(table.title)}</h2><div class='scroll'><table{kind}>{''.join(body)}</table></div>{note}"
