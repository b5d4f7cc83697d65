"""The rules of the house that a machine can keep: file sizes, who may import whom, what no kernel may contain."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(
    path
    for folder in ("csrc", "kernels", "python", "tests", "bench", "examples")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in {".py", ".cpp", ".cu", ".cuh", ".h"} and "build" not in path.parts
)
CEILING = 600

# room -> rooms of memattn it may import from; a room is the part after "memattn."
MAY_IMPORT = {
    "nn": {"nn", "ops", "pool", "state"},
    "pool": {"_native", "ops", "pool"},
    "ops": {
        "_native",
        "backends",
        "kernels",
        "ops._checks",
        "ops._library",
        "ops._masks",
        "ops._rat_stages",
        "ops._sequences",
        "reference",
        "state",
    },
    "kernels": {"kernels"},
    "reference": {"reference"},
    "backends": {"_native"},
    "state": set(),
    "integrations": {"integrations", "nn", "ops", "backends", "state"},
}  # fmt: skip
BANNED = {
    r"\bmake_block_ptr\b": "block pointers are gone in Triton 3.9",
    r"@triton\.autotune": "configurations are pinned",
    r"\btl\.atomic_add\b": "float atomics are not repeatable",
    r"use_fast_math|march=native": "not in what ships",
    r"torch/extension\.h|torch/all\.h": "outside the stable ABI",
}


def room_of(path: Path) -> str | None:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "kernels":
        return "kernels"
    if parts[:2] == ("python", "memattn") and len(parts) > 2:
        return parts[2]
    return None


def imports(path: Path) -> list[str]:
    """Every `memattn.x.y` that the file imports, without the leading "memattn."."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return [name.removeprefix("memattn.") for name in names if name.startswith("memattn.")]


def allowed(name: str, rooms: set[str]) -> bool:
    return any(name == room or name.startswith(room + ".") for room in rooms)


def test_no_file_is_too_long():
    long = {str(p.relative_to(ROOT)): n for p in SOURCES if (n := len(p.read_text().splitlines())) > CEILING}
    assert long == {}, f"over {CEILING} lines"


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if room_of(p) in MAY_IMPORT], ids=lambda p: str(p.relative_to(ROOT))
)
def test_imports_stay_in_the_allowed_rooms(path):
    if path.name == "__init__.py":
        return _assert_package_imports_itself(path)
    wrong = [name for name in imports(path) if not allowed(name, MAY_IMPORT[room_of(path)])]
    assert wrong == [], f"{room_of(path)} may import {sorted(MAY_IMPORT[room_of(path)])}"


def _assert_package_imports_itself(path):
    package = (
        ".".join(path.relative_to(ROOT / "python" / "memattn").parts[:-1]) if "python" in path.parts else "kernels"
    )
    wrong = [name for name in imports(path) if not allowed(name, {package})]
    assert wrong == [], f"{package}/__init__.py may import its own files only"


def test_nothing_imports_the_kernels_from_the_source_root():
    pattern = re.compile(r"^\s*(import kernels\b|from kernels\b)", re.M)
    assert [str(p) for p in SOURCES if p.suffix == ".py" and pattern.search(p.read_text())] == []


@pytest.mark.parametrize("pattern", BANNED)
def test_banned_in_what_ships(pattern):
    shipped = [p for p in SOURCES if p.relative_to(ROOT).parts[0] in ("csrc", "kernels", "python")]
    hits = [str(p.relative_to(ROOT)) for p in shipped if re.search(pattern, p.read_text())]
    assert hits == [], BANNED[pattern]
