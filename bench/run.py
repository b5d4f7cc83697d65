"""Times ops against their peers and prints a table with floors and ratios.

    python bench/run.py --op gated_delta_rule                 the whole table for this machine
    python bench/run.py --op gated_delta_rule --mode step --json out.json
    python bench/run.py --list                                what there is to time
    python bench/run.py --dry-run --device cuda               on any machine: bytes, FLOPs, floors, small checks

Every candidate is compared with float64 before and after it is timed; a wrong one gets no time.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "python")]

import torch  # noqa: E402

from bench import fresh, machine, roofline, tables  # noqa: E402
from bench.contest import Choice, contests, listing  # noqa: E402
from bench.registry import DTYPES, GROUPS, MODES, OPS  # noqa: E402

# An H100 SXM's data sheet: floors of --dry-run on a machine without one.
DATA_SHEET = roofline.Ceilings(memory=3.35e12, cached=3.35e12, float32=67e12, bfloat16=989e12)
WRONG = ("INCORRECT", "ERROR")


def several(allowed):
    """Argument type: names among `allowed`, separated by commas."""

    def split(text: str) -> tuple[str, ...]:
        chosen = tuple(text.split(","))
        if unknown := set(chosen) - set(allowed):
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))} is not among {', '.join(allowed)}")
        return chosen

    return split


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("--op", type=several(OPS), default=OPS, help="comma-separated; default: all")
    add("--mode", type=several(MODES), default=MODES)
    add("--shapes", type=several(GROUPS), default=GROUPS)
    add("--dtype", type=several(DTYPES), default=("float32", "bfloat16"))
    add("--backend", default="auto", help="auto (what a user gets), all, or names separated by commas")
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seconds", type=float, default=2.0, help="time given to each row's rounds")
    add("--hf-wheel", type=Path, help="a transformers wheel of another version, timed beside the installed one")
    add("--json", type=Path, help="write everything there")
    add("--quick", action="store_true", help="the first shape of each group, no import times and memory")
    add("--dry-run", action="store_true", help="count and check, time nothing")
    add("--list", action="store_true")
    return made


def write(path: Path | None, document: dict[str, Any]) -> None:
    """Write what there is so far: a run that is cut short keeps its rows."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n")


def run(choice: Choice, command: str, path: Path | None) -> dict[str, Any]:
    """Measure, print and write."""
    info = machine.describe()
    sheet = choice.dry and choice.device == "cuda"
    ceilings = DATA_SHEET if sheet else roofline.measure(choice.device)
    print(machine.one_line(info))
    print(tables.rates(ceilings, "from the data sheet of an H100 SXM, not measured" if sheet else "measured now"))
    rows: list[dict[str, Any]] = []
    document: dict[str, Any] = {"schema": 1, "command": command, "device": choice.device, "dry_run": choice.dry}
    document |= {"machine": info, "ceilings": ceilings.as_dict(), "rows": rows}
    for contest in contests(choice):
        rows.append(contest.row(ceilings, choice))
        print(tables.race(rows[-1]), flush=True)
        write(path, document)
    if not choice.dry:
        ceilings = ceilings.best(roofline.measure(choice.device))
        print("\n" + tables.rates(ceilings, "the better of before and after; the JSON's floors are of these"))
        document |= {"ceilings": ceilings.as_dict(), "rows": [row | ceilings.floor_of(row) for row in rows]}
        write(path, document)
    print(tables.per_token(rows))
    if not (choice.quick or choice.dry):
        document["facts"] = fresh.facts(choice)
        print(tables.facts(document["facts"]))
        write(path, document)
    return document


def main(arguments: list[str] | None = None) -> int:
    """Exit status 1 if a backend of ours gave a wrong result, 2 if the device is not there."""
    options = parser().parse_args(arguments)
    if options.list:
        print(listing())
        return 0
    if options.device == "cuda" and not options.dry_run and not torch.cuda.is_available():
        print("bench/run.py: --device cuda needs an NVIDIA GPU that torch can use; --dry-run works without one")
        return 2
    choice = Choice(
        options.op, options.mode, options.shapes, options.dtype, options.device, options.backend, options.hf_wheel,
        options.seconds, options.quick, options.dry_run,
    )  # fmt: skip
    words = sys.argv[1:] if arguments is None else arguments
    # Absolute paths are this machine's business; a page shows the names.
    shown = (Path(word).name if Path(word).is_absolute() else word for word in words)
    variables = (f"{name}={value}" for name, value in machine.environment().items())
    document = run(choice, " ".join([*variables, "python bench/run.py", *shown]), options.json)
    everyone = (c for row in document["rows"] for c in row["candidates"])
    return int(any(c["name"].startswith("memattn") and c["status"] in WRONG for c in everyone))


if __name__ == "__main__":
    sys.exit(main())
