"""What `import memattn` needs and costs, and what the loader says when a compiled part is missing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from memattn import _native

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("triton", "torch._dynamo", "torch._inductor", "sympy", "transformers", "matplotlib")


def python(code, **environment):
    """Run code in a fresh interpreter away from the source tree; its output."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd="/", env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def bare_tree(tmp_path):
    """The source tree as a clone has it: nothing built."""
    ignore = shutil.ignore_patterns("*.so", "build.json", "__pycache__")
    shutil.copytree(ROOT / "python/memattn", tmp_path / "python/memattn", ignore=ignore)
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=ignore)
    return tmp_path


def test_import_loads_nothing_heavy():
    listing = f"print(*sorted(m for m in sys.modules if m.startswith({HEAVY!r})))"
    with_torch, with_memattn = (set(python(f"import sys, {name}; {listing}").split()) for name in ("torch", "memattn"))
    assert with_memattn <= with_torch


def test_import_time():
    code = "import time, torch; t = time.perf_counter(); import memattn; print(time.perf_counter() - t)"
    assert min(float(python(code)) for _ in range(3)) < 0.3


def test_works_without_anything_built(bare_tree):
    """No extension, no Triton, no compiler: the ops run in plain torch and say so."""
    code = """
import sys, warnings
sys.modules["triton"] = None
import torch, memattn
from memattn import _native
assert not _native.build_info()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    o, _ = memattn.ops.gated_delta_rule(*torch.randn(3, 1, 5, 2, 16).unbind())
assert o.isfinite().all()
print(memattn.__file__, _native.native_reason("_C"), _native.native_reason("_host"), caught[0].message)
"""
    out = python(code, PYTHONPATH=str(bare_tree / "python"), PATH="")
    assert out.startswith(str(bare_tree))
    assert "_C is not built; fix: pip install --no-build-isolation -e ." in out
    assert "_host is not built" in out
    assert "plain torch" in out


def test_kernels_of_a_source_tree_are_a_subpackage(bare_tree):
    code = "import memattn, importlib.util as u; print(u.find_spec('memattn.kernels.gated_delta_rule').origin)"
    path = python(code, PYTHONPATH=str(bare_tree / "python"))
    assert path == str(bare_tree / "kernels/gated_delta_rule.py")


@pytest.mark.parametrize("name", ["_C", "_host"])
def test_reason_quotes_the_loader(tmp_path, monkeypatch, name):
    suffix = ".abi3.so" if name == "_C" else _native.importlib.machinery.EXTENSION_SUFFIXES[0]
    (tmp_path / f"{name}{suffix}").write_text("not a library, but long enough for an ELF header to be read from it")
    monkeypatch.setattr(_native, "PACKAGE", tmp_path)
    if name == "_host":
        monkeypatch.setattr("memattn.__path__", [str(tmp_path)])
        monkeypatch.delitem(sys.modules, "memattn._host", raising=False)
    reason = _native._load(name)
    assert reason is not None and reason.startswith(f"{name}{suffix} cannot be loaded: ")
    assert "invalid ELF header" in reason or "file too short" in reason


def test_reason_for_another_python(tmp_path, monkeypatch):
    (tmp_path / "_host.cpython-27-other.so").touch()
    monkeypatch.setattr(_native, "PACKAGE", tmp_path)
    assert _native._load("_host").startswith("_host is built for another Python (_host.cpython-27-other.so); fix: ")


def test_reason_for_an_old_torch(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.10.1+cpu")
    assert _native._load("_C") == "torch is 2.10.1+cpu, the extensions need 2.11 or later"


def test_reason_for_a_part_left_out_of_the_build(tmp_path, monkeypatch):
    monkeypatch.setattr(_native, "PACKAGE", tmp_path)
    monkeypatch.setattr(_native, "build_info", lambda: {"skipped": {"_C_cuda": "MEMATTN_CUDA=0"}})
    assert _native._load("_C_cuda") == "_C_cuda was not built: MEMATTN_CUDA=0"


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_reason_for_cuda_on_a_cpu_torch(tmp_path, monkeypatch):
    (tmp_path / "_C_cuda.abi3.so").touch()
    monkeypatch.setattr(_native, "PACKAGE", tmp_path)
    assert _native._load("_C_cuda") == f"_C_cuda needs a torch with CUDA; torch is {torch.__version__}"


def test_reason_for_an_old_triton(monkeypatch):
    monkeypatch.setattr(_native.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(_native.importlib.metadata, "version", lambda name: "3.5.1")
    assert _native._find_triton() == "triton is 3.5.1, supported: 3.6 and later"
    monkeypatch.setattr(_native.importlib.util, "find_spec", lambda name: None)
    assert _native._find_triton().startswith("triton is not installed; fix: ")
