"""Every instruction-set table of the CPU backend that this machine has, each forced in a process; AMX in software.

Against the float64 loop with the tolerance of the other backends; bitwise the same on any number of threads and in any
batch; and without gradients in bounded scratch whatever the length.
"""

import functools
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import attention
from support.cases import BASE
from support.compare import CEILING, assert_close_to_truth, evaluate, relative_error, to_float64
from support.linear import LinearCase, comparator, definition

from memattn import _native
from memattn.reference import gated_delta_rule as reference

ROOT = Path(__file__).resolve().parent.parent
TABLES = _native.host().available_isas() if _native.native_reason("_host") is None else []
pytestmark = pytest.mark.skipif(_native.native_reason("_C") is not None, reason=f"{_native.native_reason('_C')}")

SMALL = replace(BASE, name="ragged", length=75, key_dim=40, value_dim=56)
CASES = (
    SMALL,
    replace(SMALL, name="packed", batch=1, lengths=(33, 0, 1, 40), qk_l2norm=False, beta=0.02),
    replace(SMALL, name="wide", batch=1, length=100, heads=1, value_heads=2, key_dim=64, value_dim=128, decay=40.0),
)
# float16 differs from float32 in its loads and stores only.
PAIRS = [(case, dtype) for case in CASES for dtype in (torch.float32, torch.bfloat16, torch.float64)]
PAIRS.append((SMALL, torch.float16))
LINEAR = (
    LinearCase("linear", length=75, key_dim=40, value_dim=56, value_heads=4),
    LinearCase("linear normalised", lengths=(33, 0, 1, 40), key_dim=32, value_dim=64, normalize=True),
)
LINEAR_PAIRS = [(case, dtype) for case in LINEAR for dtype in (torch.float32, torch.bfloat16, torch.float64)]
LONG = replace(SMALL, name="long", batch=3, length=200, heads=1, value_heads=2, value_dim=96)
SCRATCH_PER_THREAD = 2 << 20


def run_jobs(folder, jobs, isa=None, library=None, **environment):
    """Results of the jobs from a worker process, and the table it used."""
    files = [folder / "jobs.pt", folder / "results.pt", *([library] if library else [])]
    torch.save(jobs, files[0])
    env = {**os.environ, **environment, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    if isa:
        env["MEMATTN_CPU_ISA"] = isa
    command = [sys.executable, ROOT / "tests" / "support" / "cpu_worker.py", *files]
    done = subprocess.run([*map(str, command)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(files[1])


@functools.cache
def expected(case, dtype):
    """Inputs, the comparator's results and the truth."""
    inputs = case.make(dtype)
    rounding = dtype if dtype in (torch.bfloat16, torch.float16) else None
    comparator = evaluate(functools.partial(reference.chunked, operand_dtype=rounding), inputs)
    return inputs, comparator, evaluate(reference.loop, to_float64(inputs))


def check_training(case, dtype, actual):
    inputs, comparator, truth = expected(case, dtype)
    scales = {"dg": truth["dbeta"].norm().item()} if (case.decay or 0) > 30 else {}
    assert_close_to_truth(actual, comparator, truth, CEILING[dtype], scales)


def check_decoding(case, dtype, actual):
    truth = expected(case, dtype)[2]
    exact = CEILING[torch.float64] if dtype == torch.float64 else CEILING[torch.float32]  # nothing rounded but o
    assert relative_error(actual["o"], truth["o"]) <= max(exact, torch.finfo(dtype).eps)
    assert relative_error(actual["final_state"], truth["final_state"]) <= exact


@pytest.fixture(scope="module", params=TABLES)
def table(request, tmp_path_factory):
    """One worker run per table: every job the tests below look at, by name."""
    jobs = {}
    for case, dtype in PAIRS:
        if dtype == torch.float64 and request.param != "portable":  # the only table of float64
            continue
        inputs = expected(case, dtype)[0]
        for chunk_size in (16, 64) if case is SMALL else (32,):
            jobs[case.name, dtype, chunk_size] = ("train", (inputs, chunk_size))
        if case.lengths is None:
            jobs[case.name, dtype, "decode"] = ("decode", (inputs,))
    for case, dtype in LINEAR_PAIRS:
        if dtype != torch.float64 or request.param == "portable":
            jobs[case.name, dtype] = ("train_linear", (case.make(dtype), 16))
    for dtype in (torch.float32, torch.bfloat16):
        inputs, every_row = LONG.make(dtype), list(range(LONG.batch))
        generator = torch.Generator().manual_seed(2)
        shapes = (inputs["v"].shape, inputs["initial_state"].shape)
        cotangents = [torch.randn(shape, generator=generator) for shape in shapes]
        cotangents[0] = cotangents[0].to(dtype)
        for threads in (1, 2, 3):
            jobs[LONG.name, dtype, "threads", threads] = ("train_rows", (inputs, cotangents, every_row, threads))
        for row in every_row:
            jobs[LONG.name, dtype, "row", row] = ("train_rows", (inputs, cotangents, [row], 2))
    folder = tmp_path_factory.mktemp(request.param)
    isa, results = run_jobs(folder, list(jobs.values()), isa=request.param)
    assert isa == request.param
    return dict(zip(jobs, results, strict=True))


@pytest.mark.parametrize("case,dtype", PAIRS, ids=lambda x: getattr(x, "name", str(x)))
def test_table_within_tolerance_of_truth(table, case, dtype):
    runs = {key[2]: result for key, result in table.items() if key[:2] == (case.name, dtype)}
    if not runs:
        pytest.skip("float64 has the portable table only")
    for kind, actual in runs.items():
        (check_decoding if kind == "decode" else check_training)(case, dtype, actual)


def check_linear(case, dtype, actual):
    inputs = case.make(dtype)
    truth = evaluate(definition, to_float64(inputs))
    assert_close_to_truth(actual, evaluate(comparator(dtype), inputs), truth, CEILING[dtype])


@pytest.mark.parametrize("case,dtype", LINEAR_PAIRS, ids=lambda x: getattr(x, "name", str(x)))
def test_table_of_linear_attention_within_tolerance(table, case, dtype):
    if (case.name, dtype) not in table:
        pytest.skip("float64 has the portable table only")
    check_linear(case, dtype, table[case.name, dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_threads_or_batch(table, dtype):
    one = table[LONG.name, dtype, "threads", 1]
    for threads in (2, 3):
        for name, x in table[LONG.name, dtype, "threads", threads].items():
            assert torch.equal(x, one[name]), f"{name} differs between 1 and {threads} threads"
    alone = [table[LONG.name, dtype, "row", row] for row in range(LONG.batch)]
    for name, x in one.items():
        assert torch.equal(torch.cat([part[name] for part in alone]), x), f"{name} differs in a batch"


def test_unavailable_table_is_refused():
    code = "import torch; from memattn.ops import gated_delta_rule as f; x = torch.ones(1, 1, 1, 16); f(x, x, x)"
    env = {**os.environ, "MEMATTN_CPU_ISA": "sse9", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode != 0
    assert f"MEMATTN_CPU_ISA=sse9 cannot be used on this processor; available here: {', '.join(TABLES)}" in done.stderr


@pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc")
def test_scratch_does_not_grow_with_the_length(tmp_path):
    shapes = {
        "short": ((2048, 1, 1, 64), torch.float32, 64),
        "long": ((131072, 1, 1, 64), torch.float32, 64),
        "widest": ((2048, 1, 4, 256), torch.float32, 64),
        "widest_rounded": ((2048, 2, 8, 256), torch.bfloat16, 64),
    }
    threads = 2
    # Without this glibc learns to keep freed memory, and what one call took would not be seen in the next.
    environment = {"MALLOC_MMAP_THRESHOLD_": "131072", "OMP_NUM_THREADS": str(threads)}
    _, results = run_jobs(tmp_path, [("peak_scratch", arguments) for arguments in shapes.values()], **environment)
    peaks = {name: result["bytes"].item() for name, result in zip(shapes, results, strict=True)}
    allowed = threads * SCRATCH_PER_THREAD + (256 << 10)  # the counters of the kernel lag by some pages
    assert all(0 < peak <= allowed for peak in peaks.values()), f"{peaks}, allowed {allowed}"


@pytest.fixture(scope="module")
def emulated_amx(tmp_path_factory):
    """A library with the CPU ops whose bf16 products all go through the AMX table, its instructions in software."""
    compiler = os.environ.get("CXX", "g++")
    if platform.machine() != "x86_64" or shutil.which(compiler) is None:
        pytest.skip("needs g++ on x86-64")
    folder, torch_root = tmp_path_factory.mktemp("amx"), Path(torch.__file__).parent
    include = torch_root / "include"
    flags = ["-O1", "-std=c++20", "-fPIC", "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-isystem{include}"]
    flags += [f"-isystem{include / 'torch/csrc/api/include'}"]
    flags += [f'-DMEMATTN_AMX_EMULATION="{ROOT / "tests/support/amx_emulation.h"}"']
    cpu = ROOT / "csrc" / "cpu"
    engine = ("gated_delta_rule", "gated_delta_rule_backward", "gated_delta_rule_step", "linear_attention")
    sources = [cpu / f"{name}.cpp" for name in (*engine, "attention", "attention_backward")]
    sources += [cpu / "isa/portable.cpp"]
    sources += [cpu / "isa/amx.cpp", ROOT / "tests/support/amx_select.cpp"]
    running = [
        subprocess.Popen([compiler, *flags, "-c", str(s), "-o", str(folder / f"{s.stem}.o")], stderr=subprocess.PIPE)
        for s in sources
    ]
    for process in running:
        _, errors = process.communicate()
        assert process.returncode == 0, errors.decode()[-3000:]
    library, lib = folder / "amx.so", torch_root / "lib"
    objects = [str(folder / f"{s.stem}.o") for s in sources]
    subprocess.run([compiler, "-shared", "-o", str(library), *objects, f"-L{lib}", "-ltorch_cpu", "-lc10"], check=True)
    return library


def test_amx_table_in_software(emulated_amx, tmp_path):
    dtype = torch.bfloat16
    jobs = [("train", (expected(case, dtype)[0], chunk)) for case, chunk in zip(CASES, (16, 32, 64), strict=True)]
    jobs += [("train_linear", (case.make(dtype), 32)) for case in LINEAR]
    _, results = run_jobs(tmp_path, jobs, library=emulated_amx)
    for case, actual in zip((*CASES, *LINEAR), results, strict=True):
        (check_training if case in CASES else check_linear)(case, dtype, actual)


def test_attention_on_the_amx_table_in_software(emulated_amx, tmp_path):
    names = ("prefix", "dilated", "sink", "decay", "many heads", "packed window", "scale")
    cases = [c for c in attention.CASES if c.name in names]
    jobs = [("attend", (c.make(torch.bfloat16),)) for c in cases]
    _, results = run_jobs(tmp_path, jobs, library=emulated_amx)
    for case, actual in zip(cases, results, strict=True):
        attention.judge(case, torch.bfloat16, actual, definition=attention.reference.chunked)
