"""Builds the compiled parts of memattn; everything else is in pyproject.toml.

memattn._C       csrc/cpu    CPU kernels      LibTorch stable ABI, one file for every torch >= 2.11 and every Python
memattn._C_cuda  csrc/cuda   CUDA kernels     the same; compiled and linked without a GPU and without a CUDA torch
memattn._host    csrc/host   tensor-free host code, pybind11, one file per Python version

Compilers are called directly: the stable ABI needs torch's headers and libtorch_cpu, nothing else, and every CUDA file
has its own architectures. Objects stay in build/, so that only what changed is compiled again.

Environment: MEMATTN_CUDA=auto|1|0, MEMATTN_CUDA_ARCHS="80;90a;90+PTX" (90a: only *_sm90a.cu), CXX, CUDA_HOME, MAX_JOBS.
"""

import fcntl
import json
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.machinery import PathFinder
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, SetupError

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
TORCH_TARGET = (2, 11)
MINIMUM_NVCC = (12, 0)
DEFAULT_ARCHS = "80;90a;90+PTX"

WARNINGS = ["-Wall", "-Wextra", "-Wno-unknown-pragmas"]
CXX_FLAGS = ["-O3", "-std=c++20", "-fno-math-errno", "-fPIC", "-fvisibility=hidden", "-g0", *WARNINGS]
NVCC_FLAGS = ["-O3", "-std=c++20", "-lineinfo", "-Xptxas=-v", "-Xcompiler=-fPIC,-fvisibility=hidden", "-DUSE_CUDA"]
TARGET_FLAG = f"-DTORCH_TARGET_VERSION=0x{TORCH_TARGET[0] << 56 | TORCH_TARGET[1] << 48:016x}"

NO_TORCH = """
memattn compiles against the torch it will run with, and {python} has none.
Install torch >= 2.11 first, then memattn:
    pip install torch==2.13.0
    pip install --no-build-isolation .
"""


@dataclass(frozen=True)
class Torch:
    """Where torch's headers and libraries are. Nothing of torch is imported to build."""

    root: Path
    version: str

    @classmethod
    def find(cls) -> "Torch":
        # pip's build isolation hides the installed torch, so the interpreter's own site-packages is searched as well.
        # Naming torch in pyproject.toml instead would download a second torch, with CUDA, only to build.
        hidden = sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), site.getusersitepackages()
        paths = [*sys.path, *hidden]
        spec = PathFinder.find_spec("torch", paths)
        if spec is None or spec.origin is None:
            raise SetupError(NO_TORCH.format(python=sys.executable))
        root = Path(spec.origin).parent
        found = re.search(r"__version__ = '((\d+)\.(\d+)[^']*)'", (root / "version.py").read_text())
        if found is None or (int(found[2]), int(found[3])) < TORCH_TARGET:
            raise SetupError(f"torch in {root} is {found and found[1]}; memattn needs {dotted(TORCH_TARGET)} or later")
        return cls(root, found[1])


def dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def first_line(*command: str, match: str = "") -> str:
    """The first line of a command's output that contains `match`, or an empty string."""
    try:
        out = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
    return next((line.strip() for line in out.splitlines() if match in line), "")


@dataclass
class Cuda:
    """The CUDA toolkit, or the reason there is none to build with."""

    home: Path | None = None
    version: str = ""
    reason: str = ""
    archs: list[str] = field(default_factory=list)

    @classmethod
    def find(cls) -> "Cuda":
        mode = os.environ.get("MEMATTN_CUDA", "auto")
        if mode not in ("auto", "0", "1"):
            raise SetupError(f"MEMATTN_CUDA is {mode!r}; allowed: auto, 1, 0")
        if mode == "0":
            return cls(reason="MEMATTN_CUDA=0")
        # Not `which nvcc`: distributions put a wrapper in /usr/local/bin, away from the headers.
        homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
        home = next((Path(h) for h in homes if h and (Path(h) / "bin/nvcc").is_file()), None)
        found = cls(home, archs=os.environ.get("MEMATTN_CUDA_ARCHS", DEFAULT_ARCHS).split(";"))
        if home is None:
            found.reason = "no nvcc in $CUDA_HOME, $CUDA_PATH or /usr/local/cuda"
        else:
            release = re.search(r"V(\d+)\.(\d+)[.\d]*", first_line(f"{home}/bin/nvcc", "--version", match="release"))
            found.version = release.group(0)[1:] if release else "unknown"
            if not release or (int(release[1]), int(release[2])) < MINIMUM_NVCC:
                found.reason = f"nvcc in {home} is {found.version}; needed: {dotted(MINIMUM_NVCC)} or later"
        if mode == "1" and found.reason:
            raise SetupError(f"MEMATTN_CUDA=1, but {found.reason}")
        return found

    def gencode(self, source: Path) -> list[str]:
        """Architecture flags of one file: only *_sm90a.cu has code that plain sm_90 cannot run."""
        special = source.stem.endswith("_sm90a")
        flags = []
        for arch in self.archs:
            number, ptx = arch.removesuffix("+PTX"), arch.endswith("+PTX")
            if not re.fullmatch(r"\d+a?", number):
                raise SetupError(f"MEMATTN_CUDA_ARCHS has {arch!r}; allowed: numbers as in {DEFAULT_ARCHS!r}")
            if special == number.endswith("a"):
                code = f"[sm_{number},compute_{number}]" if ptx else f"sm_{number}"
                flags.append(f"-gencode=arch=compute_{number},code={code}")
        if not flags:
            raise SetupError(f"MEMATTN_CUDA_ARCHS={';'.join(self.archs)!r} has no architecture for {source.name}")
        return flags

    @property
    def library_dir(self) -> Path:
        return next(d for d in (self.home / "lib64", self.home / "lib") if d.is_dir())


def run(command: list[str], log: Path | None = None) -> None:
    """Run a compiler; its output is shown if it failed or warned, and kept in `log`."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if log is not None:
        log.write_text(done.stdout)
    shown = [line for line in done.stdout.splitlines() if not line.startswith("ptxas info")]
    if done.returncode or any("warning" in line for line in shown):
        print("\n".join([shlex.join(command), *shown]), flush=True)
    if done.returncode:
        raise CompileError(f"{command[-1]}: exit status {done.returncode}")


def stale(output: Path, command: list[str]) -> bool:
    """Whether `output` is older than what it was made from (its .d file) or was made by another command."""
    record, depfile = output.with_suffix(".cmd"), output.with_suffix(".d")
    if not (output.is_file() and depfile.is_file() and record.is_file() and record.read_text() == shlex.join(command)):
        return True
    made = output.stat().st_mtime
    names = depfile.read_text().replace("\\\n", " ").split(":", 1)[1].split()
    return any(not os.path.exists(n) or os.path.getmtime(n) > made for n in names)


class FreshBuild(build):
    """Setuptools would put files of earlier builds, long deleted here, into a wheel."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class Build(build_ext):
    """Compiles all objects of all extensions in one pool, links, and writes build.json beside the libraries."""

    def run(self) -> None:
        self.torch = Torch.find()
        self.cuda = Cuda.find()
        self.cxx = shlex.split(os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or "c++")
        self.skipped = {e.name: reason for e in self.extensions if (reason := self.skip_reason(e.name))}
        self.extensions = [e for e in self.extensions if e.name not in self.skipped]
        BUILD.mkdir(parents=True, exist_ok=True)
        with open(BUILD / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            super().run()

    def skip_reason(self, name: str) -> str:
        if name == "memattn._C_cuda":
            return self.cuda.reason
        if name == "memattn._host" and not Path(sysconfig.get_path("include"), "Python.h").is_file():
            return f"no Python.h in {sysconfig.get_path('include')} (install the Python development headers)"
        return ""

    def build_extensions(self) -> None:
        if not first_line(*self.cxx, "--version"):
            raise SetupError(f"no C++ compiler: {shlex.join(self.cxx)!r} does not run; install g++ or set CXX")
        jobs = [(e, Path(s)) for e in self.extensions for s in e.sources]
        pool = ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or processors()))
        try:
            objects = list(pool.map(lambda job: self.compile(*job), jobs))
        finally:
            pool.shutdown(cancel_futures=True)
        for extension in self.extensions:
            mine = [o for o, (e, _) in zip(objects, jobs, strict=True) if e is extension]
            self.link(extension, mine, Path(self.get_ext_fullpath(extension.name)))
        self.write_ptxas_log()
        self.write_build_json(Path(self.build_lib) / "memattn")

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        self.copy_file(Path(self.build_lib) / "memattn/build.json", ROOT / "python/memattn/build.json")

    def compile(self, extension: Extension, source: Path) -> Path:
        output = BUILD / extension.name / source.with_suffix(".o")
        output.parent.mkdir(parents=True, exist_ok=True)
        command = [*self.compiler_command(extension, source), "-MD", "-MF", str(output.with_suffix(".d"))]
        command += ["-c", "-o", str(output), str(ROOT / source)]
        if stale(output, command):
            print(f"compiling {source}", flush=True)
            run(command, output.with_suffix(".log"))
            output.with_suffix(".cmd").write_text(shlex.join(command))
        return output

    def compiler_command(self, extension: Extension, source: Path) -> list[str]:
        if extension.name == "memattn._host":
            includes = [sysconfig.get_path("include"), pybind11_include(self.torch)]
            return [*self.cxx, *CXX_FLAGS, *(arg for i in includes for arg in ("-isystem", i))]
        torch_flags = [TARGET_FLAG, "-isystem", f"{self.torch.root}/include"]
        if source.suffix != ".cu":
            return [*self.cxx, *CXX_FLAGS, *torch_flags]
        nvcc = [str(self.cuda.home / "bin/nvcc"), f"-ccbin={self.cxx[0]}"]
        return [*nvcc, *NVCC_FLAGS, *self.cuda.gencode(source), *torch_flags]

    def link(self, extension: Extension, objects: list[Path], output: Path) -> None:
        output.parent.mkdir(parents=True, exist_ok=True)
        command = [*self.cxx, "-shared", "-o", str(output), *map(str, objects)]
        if extension.name != "memattn._host":
            command += ["-Wl,--no-as-needed", f"-L{self.torch.root}/lib", "-ltorch_cpu"]
        if extension.name == "memattn._C":
            command += ["-Wl,-z,defs"]
        if extension.name == "memattn._C_cuda":
            command += [str(self.stub_libtorch_cuda()), f"-L{self.cuda.library_dir}", "-lcudart"]
        run(command)

    def stub_libtorch_cuda(self) -> Path:
        """An empty libtorch_cuda.so to link with: the loader then looks for the real one where the extension runs."""
        stub = BUILD / "stub" / "libtorch_cuda.so"
        stub.parent.mkdir(parents=True, exist_ok=True)
        run([*self.cxx, "-shared", "-Wl,-soname,libtorch_cuda.so", "-o", str(stub), "-xc++", "/dev/null"])
        return stub

    def write_ptxas_log(self) -> None:
        """Registers, spills and shared memory of every CUDA kernel, as ptxas reported them."""
        sources = [Path(s) for e in self.extensions for s in e.sources if s.endswith(".cu")]
        logs = [BUILD / "memattn._C_cuda" / source.with_suffix(".log") for source in sources]
        text = [f"== {log.stem}.cu\n{log.read_text()}" for log in logs]
        (ROOT / "build/ptxas.log").write_text("\n".join(text))

    def write_build_json(self, package: Path) -> None:
        commit = first_line("git", "rev-parse", "HEAD")
        changed = bool(first_line("git", "status", "--porcelain", "--untracked-files=no"))
        info = {
            "version": self.distribution.get_version(),
            "commit": f"{commit}{'-changed' if changed else ''}" if commit else "unknown",
            "built": [e.name.removeprefix("memattn.") for e in self.extensions],
            "skipped": {name.removeprefix("memattn."): reason for name, reason in self.skipped.items()},
            "torch": self.torch.version,
            "torch_target": dotted(TORCH_TARGET),
            "python": sys.version.split()[0],
            "platform": sysconfig.get_platform(),
            "cxx": first_line(*self.cxx, "--version"),
            "cxx_flags": shlex.join([*CXX_FLAGS, TARGET_FLAG]),
            "nvcc": self.cuda.version,
            "nvcc_flags": shlex.join([*NVCC_FLAGS, TARGET_FLAG]) if not self.cuda.reason else "",
            "cuda_archs": self.cuda.archs if not self.cuda.reason else [],
        }
        package.mkdir(parents=True, exist_ok=True)
        (package / "build.json").write_text(json.dumps(info, indent=2) + "\n")


def processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pybind11_include(torch: Torch) -> str:
    try:
        import pybind11
    except ImportError:
        return f"{torch.root}/include"  # torch ships a copy of the headers
    return pybind11.get_include()


def extension(name: str, folder: str, patterns: str, *, abi3: bool) -> list[Extension]:
    """One Extension of all the sources in a folder of csrc; none while the folder is empty."""
    paths = sorted(p.relative_to(ROOT) for pattern in patterns.split() for p in (CSRC / folder).glob(pattern))
    return [Extension(name, list(map(str, paths)), py_limited_api=abi3)] if paths else []


# Without torch the build would fail only after pip has downloaded this package's own requirement, a torch with CUDA.
if {"dist_info", "bdist_wheel", "editable_wheel"} & set(sys.argv):
    Torch.find()

setup(
    packages=[*find_packages("python"), "memattn.kernels"],
    cmdclass={"build": FreshBuild, "build_ext": Build},
    ext_modules=[
        *extension("memattn._C", "cpu", "**/*.cpp", abi3=True),
        *extension("memattn._C_cuda", "cuda", "*.cu *.cpp", abi3=True),
        *extension("memattn._host", "host", "*.cpp", abi3=False),
    ],
)
