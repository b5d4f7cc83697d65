"""The command line: `memattn COMMAND …`; each command lives in its own module and is imported only when asked for."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "info": ("memattn.info", "what runs on this machine, and for everything else the reason why not"),
    "features": ("memattn.feature_table", "the table op × backend × feature, as Markdown"),
    "demo": ("memattn.demo", "train a small model on real text, read a million bytes with it, and generate"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command with the arguments after it; the exit status."""
    name, *rest = [*(sys.argv[1:] if argv is None else argv)] or ["--help"]
    if name in ("-h", "--help"):
        print("usage: memattn COMMAND [options]      memattn COMMAND --help for its options\n")
        print("\n".join(f"  {command:10}{text}" for command, (_, text) in COMMANDS.items()))
        return 0
    if name not in COMMANDS:
        print(f"memattn: unknown command {name!r}; allowed: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return importlib.import_module(COMMANDS[name][0]).main(rest) or 0
