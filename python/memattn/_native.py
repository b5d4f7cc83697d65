"""Finds and loads the compiled parts, and remembers in words why one is missing.

`_C` and `_C_cuda` are LibTorch stable-ABI libraries: loading one registers its kernels with torch's dispatcher.
`_host` is an ordinary Python module without tensors. A missing part is a normal state, never an import error.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import threading
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

PACKAGE = Path(__file__).resolve().parent
MINIMUM_TORCH = (2, 11)
MINIMUM_TRITON = (3, 6)
REBUILD = "pip install --no-build-isolation -e . (in the source tree; `make` does it)"

_reasons: dict[str, str | None] = {}
_lock = threading.Lock()


def native_reason(name: str) -> str | None:
    """None if the extension `name` ("_C", "_C_cuda", "_host") is loaded, else why not. Loads it at the first call."""
    if name not in _reasons:
        with _lock:
            if name not in _reasons:
                _reasons[name] = _load(name)
    return _reasons[name]


def host() -> ModuleType | None:
    """The pybind11 module `memattn._host`, or None; `native_reason("_host")` says why."""
    return importlib.import_module("memattn._host") if native_reason("_host") is None else None


def triton_reason() -> str | None:
    """None if a Triton this package supports is installed, else why not. Does not import it."""
    return _triton_reason


@cache
def build_info() -> dict[str, Any]:
    """build.json: what was built, by which compiler, against which torch; empty when nothing was built here."""
    path = PACKAGE / "build.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _load(name: str) -> str | None:
    # The stable ABI has no symbols below this release, and a failed dlopen would only name the first one missing.
    if _release(torch.__version__) < MINIMUM_TORCH:
        return f"torch is {torch.__version__}, the extensions need {_text(MINIMUM_TORCH)} or later"
    # `_host` has its Python version in the file name, and only that one can be imported.
    suffixes = importlib.machinery.EXTENSION_SUFFIXES if name == "_host" else [".abi3.so"]
    path = next((p for s in suffixes if (p := PACKAGE / f"{name}{s}").is_file()), None)
    if path is None and (other := next(PACKAGE.glob(f"{name}.*.so"), None)):
        return f"{name} is built for another Python ({other.name}); fix: {REBUILD}"
    if path is None:
        skipped = build_info().get("skipped", {}).get(name)
        return f"{name} was not built: {skipped}" if skipped else f"{name} is not built; fix: {REBUILD}"
    if name == "_C_cuda" and torch.version.cuda is None:
        return f"{name} needs a torch with CUDA; torch is {torch.__version__}"
    try:
        if name == "_host":
            importlib.import_module("memattn._host")
        else:
            torch.ops.load_library(str(path))
    except (OSError, ImportError, RuntimeError) as error:
        # load_library says only that it failed; the loader's own words are the cause.
        return f"{path.name} cannot be loaded: {error.__cause__ or error}"
    return None


def _find_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; fix: pip install 'triton>=3.6,<3.10'"
    version = importlib.metadata.version("triton")
    if _release(version) < MINIMUM_TRITON:
        return f"triton is {version}, supported: {_text(MINIMUM_TRITON)} and later"
    return None


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _text(release: tuple[int, int]) -> str:
    return ".".join(map(str, release))


_triton_reason = _find_triton()  # at import: looking for a package cannot be traced into a graph
