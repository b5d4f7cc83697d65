"""The picture of a run: six panels, or two of a run with `--memory`, one PNG."""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from memattn.demo.compare import Point
from memattn.demo.mixers import MEMORIZING
from memattn.demo.results import Results

DELTA, SOFTMAX, QUIET, ACCENT = "#1b6ca8", "#d1495b", "#6b7280", "#2a9d6f"
_STYLE = {
    "font.size": 9,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9ca3af",
    "axes.grid": True,
    "grid.color": "#e5e7eb",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 8,
}
Panel = Callable[[Axes, Results], bool]
Formatter = Callable[[float, object], str]


def draw(results: Results) -> bytes:
    """The PNG. A panel whose phase has not been reached says so."""
    panels: list[tuple[str, Panel]] = [
        ("Bits per byte while training", _training),
        ("Held-out bits per byte by position", _position),
        ("Memory while reading the held-out stream", _resident),
        ("Reading speed as the context grows", _prefill),
        ("Writing speed as the context grows", _decode),
        ("Memory as the context grows", _memory),
    ]
    rows, size = 2, (13.5, 7.6)
    if MEMORIZING in results.model.get("layers", ()):
        panels, rows, size = [panels[0], ("Held-out bits per byte by size of the memory", _memory_size)], 1, (11, 4.2)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
        for axes, (title, panel) in zip(figure.subplots(rows, len(panels) // rows).flat, panels, strict=True):
            axes.set_title(title)
            if not panel(axes, results):
                _not_reached(axes)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=130)
    return file.getvalue()


def _not_reached(axes: Axes) -> None:
    axes.text(0.5, 0.5, "not reached", ha="center", va="center", color=QUIET, transform=axes.transAxes)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)


def short(number: float, _: object = None) -> str:
    """1024 → 1K, 65536 → 64K, 1048576 → 1M."""
    for size, unit in ((1 << 20, "M"), (1 << 10, "K")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def thousands(number: float, _: object = None) -> str:
    """2000 → 2k, 3500000 → 3.5M."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def binary_size(size: float, _: object = None) -> str:
    """In KiB, MiB or GiB."""
    for power, unit in ((30, "GiB"), (20, "MiB")):
        if size >= 1 << power:
            return f"{size / (1 << power):.3g} {unit}"
    return f"{size / 1024:.3g} KiB"


def _bytes_axis(axes: Axes, places: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks([p for i, p in enumerate(places) if (len(places) - 1 - i) % math.ceil(len(places) / 9) == 0])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(short))


def _value_axis(axes: Axes, values: list[float], base: int, steps: tuple[int, ...], names: Formatter) -> None:
    """A log axis from zero-free `values`, with ticks at `steps` times the powers of `base`."""
    axes.set_yscale("log", base=base)
    axes.set_ylim(min(values) / 1.6, max(values) * 1.6)
    axes.yaxis.set_major_locator(LogLocator(base=base, subs=steps, numticks=10))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(names))


def _training(axes: Axes, results: Results) -> bool:
    progress = results.training
    if not progress.curve_bits:
        return False
    axes.plot(progress.curve_seconds, progress.curve_bits, color=DELTA, alpha=0.3, lw=1)
    axes.plot(progress.curve_seconds, smooth(progress.curve_bits), color=DELTA, lw=1.8, label="model, on training text")
    for name, dashes in (("order-2 counts", "--"), ("gzip", ":"), ("lzma", "-.")):
        if name in results.baselines:
            bits = results.baselines[name]
            axes.axhline(bits, color=QUIET, ls=dashes, lw=1, label=f"{name} {bits:.2f}")
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("bits per byte")
    axes.set_ylim(1, max(4.0, min(6.0, max(progress.curve_bits))))
    axes.legend()
    return True


def _memory_size(axes: Axes, results: Results) -> bool:
    points = results.memory_sizes
    if not points:
        return False
    places, names = range(len(points)), [short(p.size) if p.size else "none" for p in points]
    gains = [p.gain(points[0]) for p in points]
    axes.errorbar(
        places, [points[0].bits - less for less, _ in gains], [error or 0.0 for _, error in gains], fmt="o-",
        color=DELTA, ms=5, capsize=3, label=f"last bytes of {len(points[0].documents)} files; bars: error of the gain",
    )  # fmt: skip
    axes.set_xticks(places, names)
    axes.set_xlabel("tokens in the memory")
    axes.set_ylabel("bits per byte")
    axes.legend()
    return True


def smooth(values: list[float], reach: int = 5) -> list[float]:
    """Mean of each value and up to `reach` neighbours on either side."""
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _position(axes: Axes, results: Results) -> bool:
    if results.rows is None:
        return False
    rows = results.rows
    places = [b.last + 1 for b in rows.buckets]
    bits, errors = [b.bits for b in rows.buckets], [b.error or 0.0 for b in rows.buckets]
    axes.plot(places, bits, "o-", color=DELTA, ms=4, label=f"mean of {rows.rows} texts")
    low, high = ([b + sign * e for b, e in zip(bits, errors, strict=True)] for sign in (-1, 1))
    axes.fill_between(places, low, high, color=DELTA, alpha=0.15, lw=0)
    if results.wiped is not None:
        name = f"same texts, memory wiped every {short(results.wiped_every)}"
        axes.plot((results.wiped_every, rows.length), 2 * (results.wiped,), ":", color=SOFTMAX, lw=1.8, label=name)
    if results.stream is not None:
        late = [b for b in results.stream.buckets if b.first >= rows.length]
        places += [b.last + 1 for b in late]
        axes.plot([b.last + 1 for b in late], [b.bits for b in late], "D", color=ACCENT, ms=5, label="one long stream")
    _bytes_axis(axes, places)
    axes.set_xlabel("up to this many bytes read before")
    axes.set_ylabel("bits per byte")
    axes.legend()
    return True


def _resident(axes: Axes, results: Results) -> bool:
    if results.stream is None:
        return False
    places, sizes = zip(*results.stream.resident, strict=True)
    axes.plot([p / 1e6 for p in places], [s / 2**20 for s in sizes], color=DELTA, lw=1.8)
    axes.set_ylim(0, 1.4 * max(sizes) / 2**20)
    axes.set_xlabel("million bytes read")
    axes.set_ylabel("resident memory of the process, MiB")
    axes.text(
        0.03, 0.06, f"{results.stream.growth / 2**20:+.1f} MiB over the last nine tenths", transform=axes.transAxes
    )
    return True


def _pair(axes: Axes, results: Results, value: Callable[[Point], float | None], style: str = "o-") -> list[float]:
    """Both models' `value` by context; returns all values drawn."""
    drawn = []
    for points, color, name in (
        (results.comparison.softmax, SOFTMAX, "softmax attention"),
        (results.comparison.memory, DELTA, "memory layers"),
    ):
        known = [(p.context, y) for p in points if (y := value(p)) is not None]
        axes.plot([x for x, _ in known], [y for _, y in known], style, color=color, ms=4, lw=1.6, label=name)
        drawn += [y for _, y in known]
    return drawn


def _speed(axes: Axes, results: Results, value: Callable[[Point], float | None], unit: str) -> bool:
    if not results.comparison.softmax:
        return False
    _value_axis(axes, _pair(axes, results, value), 10, (1, 2, 5), thousands)
    _bytes_axis(axes, [p.context for p in results.comparison.memory])
    axes.set_xlabel("context, bytes")
    axes.set_ylabel(unit)
    axes.legend()
    return True


def _prefill(axes: Axes, results: Results) -> bool:
    def speed(point: Point) -> float | None:
        return point.context / point.prefill_seconds if point.prefill_seconds else None

    drawn = _speed(axes, results, speed, "bytes read per s")
    if results.comparison.stopped:
        last = [p for p in results.comparison.softmax if p.prefill_seconds][-1]
        place = (last.context, speed(last) or 0.0)
        axes.annotate("stopped", place, (6, 0), textcoords="offset points", va="center", color=SOFTMAX, fontsize=8)
    return drawn


def _decode(axes: Axes, results: Results) -> bool:
    return _speed(axes, results, lambda p: 1 / p.decode_seconds, "bytes written per s")


def _memory(axes: Axes, results: Results) -> bool:
    if not results.comparison.softmax:
        return False
    values = _pair(axes, results, lambda p: p.peak or None)
    values += _pair(axes, results, lambda p: p.state, "--")
    _value_axis(axes, values, 4, (1,), binary_size)
    _bytes_axis(axes, [p.context for p in results.comparison.memory])
    axes.set_xlabel("context, bytes")
    axes.set_ylabel("memory beyond the model")
    names = ("softmax attention, peak while reading", "GatedDeltaNet, peak while reading", "… kept", "… kept")
    axes.legend(axes.get_lines(), names)
    return True
