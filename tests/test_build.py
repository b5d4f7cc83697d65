"""What the build produced: stable-ABI boundary, dependencies, build.json; and how setup.py decides."""

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
import torch

from memattn import _native

ROOT = Path(__file__).resolve().parents[1]
BUILD = _native.build_info()
STABLE = ("_C", "_C_cuda")
# The C functions behind torch's stable ABI, the CUDA runtime, and the versioned symbols of glibc and libstdc++.
ALLOWED = re.compile(r"(aoti_torch_|torch_)\w+$|(__)?cuda\w+(@.*)?$|\w+@+(GLIBC|GLIBCXX|CXXABI|GCC)_[\w.]+$")


def library(name):
    """The file of an extension; skips with the reason if it was not built on purpose."""
    if not BUILD:
        pytest.skip("nothing is built here: no build.json")
    if name in BUILD["skipped"]:
        pytest.skip(BUILD["skipped"][name])
    path = _native.PACKAGE / f"{name}.abi3.so"
    assert path.is_file(), f"{name} was not built; build.json: {BUILD['built']}"
    return path


def tool(name, *arguments):
    if shutil.which(name) is None:
        pytest.skip(f"no {name}")
    return subprocess.run([name, *map(str, arguments)], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("name", STABLE)
def test_no_symbol_outside_the_stable_abi(name):
    lines = [line.split() for line in tool("nm", "-D", "--undefined-only", library(name)).splitlines()]
    outside = [symbol for kind, symbol in lines if kind == "U" and not ALLOWED.match(symbol)]
    assert not outside


@pytest.mark.parametrize("name", STABLE)
def test_dependencies(name):
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", tool("readelf", "-d", library(name)))
    assert "libtorch_cpu.so" in needed
    assert not {"libc10.so", "libtorch_python.so", "libtorch.so"} & set(needed)
    cuda = {n.split(".so")[0] for n in needed} & {"libtorch_cuda", "libcudart"}
    assert cuda == ({"libtorch_cuda", "libcudart"} if name == "_C_cuda" else set())


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_cuda_extension_asks_the_loader_for_libtorch_cuda():
    with pytest.raises(OSError, match=r"lib(torch_cuda|cudart)\.so.*cannot open shared object file"):
        ctypes.CDLL(str(library("_C_cuda")))


def test_every_cuda_file_is_compiled_for_its_architectures():
    library("_C_cuda")
    log = ROOT / "build/ptxas.log"
    if not log.is_file():
        pytest.skip("no build/ptxas.log: the extension was built elsewhere")
    sections = dict(re.findall(r"^== (.*)\n((?:(?!== ).*\n?)*)", log.read_text(), re.MULTILINE))
    for source in (ROOT / "csrc/cuda").glob("*.cu"):
        expected = {"sm_90a"} if source.stem.endswith("_sm90a") else {"sm_80", "sm_90"}
        assert expected <= set(re.findall(r"for '(sm_\w+)'", sections[source.name])), source.name


def test_cuda_files_include_what_torch_2_11_does_not():
    """Newer torch reaches macros.h through other headers; against 2.11 such a file does not compile."""
    for source in (ROOT / "csrc/cuda").glob("*.cu"):
        text = source.read_text()
        assert "STD_CUDA_" not in text or "#include <torch/csrc/stable/macros.h>" in text, source.name


def test_build_json():
    if not BUILD:
        pytest.skip("nothing is built here: no build.json")
    assert set(BUILD["built"]) | set(BUILD["skipped"]) == {"_C", "_C_cuda", "_host"}
    assert "_C" in BUILD["built"]
    assert BUILD["torch_target"] == "2.11"
    assert "-DTORCH_TARGET_VERSION=0x020b000000000000" in BUILD["cxx_flags"]
    assert "-march" not in BUILD["cxx_flags"], "instruction sets are chosen at run time"
    assert re.fullmatch(r"[0-9a-f]{40}(-changed)?|unknown", BUILD["commit"])
    assert BUILD["cxx"] and BUILD["python"] and BUILD["torch"]
    assert bool(BUILD["nvcc_flags"]) == ("_C_cuda" in BUILD["built"])


def test_every_folder_with_python_files_is_packaged(setup_file):
    packages = setup_file.find_packages(str(ROOT / "python"))
    folders = {p.parent.relative_to(ROOT / "python") for p in (ROOT / "python").glob("memattn/**/*.py")}
    assert {str(f).replace(os.sep, ".") for f in folders} == set(packages)
    assert (ROOT / "kernels/__init__.py").is_file()


@pytest.fixture(scope="module")
def setup_file():
    """setup.py as a module, its setup() call answered by printing the version."""
    pytest.importorskip("setuptools")
    spec = importlib.util.spec_from_file_location("memattn_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["setup.py", "--version"])
        patch.setitem(sys.modules, "memattn_setup", module)
        patch.chdir(ROOT)
        spec.loader.exec_module(module)
    return module


def test_architectures_per_file(setup_file):
    cuda = setup_file.Cuda(Path("/cuda"), archs=["80", "90a", "90+PTX"])
    assert cuda.gencode(Path("conv.cu")) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=[sm_90,compute_90]",
    ]
    assert cuda.gencode(Path("scan_sm90a.cu")) == ["-gencode=arch=compute_90a,code=sm_90a"]
    cuda.archs = ["sm_80"]
    with pytest.raises(setup_file.SetupError, match=r"MEMATTN_CUDA_ARCHS has 'sm_80'; allowed: numbers"):
        cuda.gencode(Path("conv.cu"))
    cuda.archs = ["80"]
    with pytest.raises(setup_file.SetupError, match="'80' has no architecture for scan_sm90a.cu"):
        cuda.gencode(Path("scan_sm90a.cu"))


def test_cuda_switch(setup_file, monkeypatch):
    monkeypatch.setenv("MEMATTN_CUDA", "yes")
    with pytest.raises(setup_file.SetupError, match="MEMATTN_CUDA is 'yes'; allowed: auto, 1, 0"):
        setup_file.Cuda.find()
    monkeypatch.setenv("MEMATTN_CUDA", "0")
    assert setup_file.Cuda.find().reason == "MEMATTN_CUDA=0"


def test_an_old_nvcc_is_left_alone(setup_file, monkeypatch, tmp_path):
    nvcc = tmp_path / "bin/nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 11.8, V11.8.89'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("MEMATTN_CUDA", "auto")
    assert setup_file.Cuda.find().reason == f"nvcc in {tmp_path} is 11.8.89; needed: 12.0 or later"
    monkeypatch.setenv("MEMATTN_CUDA", "1")
    with pytest.raises(setup_file.SetupError, match="MEMATTN_CUDA=1, but nvcc in .* is 11.8.89"):
        setup_file.Cuda.find()


def test_torch_is_found_behind_build_isolation(setup_file, monkeypatch):
    """pip hides site-packages from sys.path while it builds; the interpreter still knows where they are."""
    site = str(Path(torch.__file__).parents[1])
    monkeypatch.setattr(setup_file.sysconfig, "get_path", lambda name: site)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != site])
    found = setup_file.Torch.find()
    assert found.version == torch.__version__
    assert (found.root / "include/torch/csrc/stable/library.h").is_file()


def test_no_torch_is_one_clear_error(setup_file, monkeypatch, tmp_path):
    monkeypatch.setattr(setup_file.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(setup_file.site, "getusersitepackages", lambda: str(tmp_path))
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(setup_file.SetupError, match="memattn compiles against the torch it will run with") as error:
        setup_file.Torch.find()
    assert "pip install --no-build-isolation ." in str(error.value)


def test_an_old_torch_is_one_clear_error(setup_file, monkeypatch, tmp_path):
    package = tmp_path / "torch"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "version.py").write_text("__version__ = '2.9.1+cu128'\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(setup_file.SetupError, match=r"is 2\.9\.1\+cu128; memattn needs 2\.11 or later"):
        setup_file.Torch.find()


def test_objects_follow_their_headers_and_flags(setup_file, tmp_path):
    header, source, output = tmp_path / "a.h", tmp_path / "a.cpp", tmp_path / "a.o"
    header.touch(), source.touch()
    command = ["c++", "-c", "-o", str(output), str(source)]
    assert setup_file.stale(output, command)
    output.with_suffix(".d").write_text(f"{output}: {source} \\\n {header}\n")
    output.with_suffix(".cmd").write_text(setup_file.shlex.join(command))
    output.touch()
    assert not setup_file.stale(output, command)
    assert setup_file.stale(output, [*command, "-O0"])
    os.utime(header, (time.time() + 60, time.time() + 60))
    assert setup_file.stale(output, command)
    header.unlink()
    assert setup_file.stale(output, command)


def test_library_names_are_what_the_loader_looks_for():
    assert sysconfig.get_config_var("EXT_SUFFIX") in _native.importlib.machinery.EXTENSION_SUFFIXES
    for name in set(STABLE) & set(BUILD.get("built", ())):
        assert (_native.PACKAGE / f"{name}.abi3.so").is_file()
