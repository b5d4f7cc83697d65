"""bench/gpu_check.sh with a stand-in for Python, and its checks on the CPU: what can be known without a GPU."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.gpu import checks  # noqa: E402
from bench.gpu.recorder import record  # noqa: E402

SCRIPT = ROOT / "bench/gpu_check.sh"
STAGES = ["build", "tests", "configs", "sanitizer", "repeat", "graph", "bench"]
STAND_IN = """#!/usr/bin/env bash
case "$*" in
  -c*) echo some-gpu ;;
  *" repeat "*) echo "the repeat stage went wrong"; exit 3 ;;
  *"bench/run.py"*) for last; do :; done; echo '{"rows": []}' >"$last" ;;
  *) echo "called: $*" ;;
esac
"""


def check(*arguments, python=sys.executable, **environment):
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        capture_output=True, text=True, env={**os.environ, "PYTHON": str(python), **environment}, timeout=120,
    )  # fmt: skip


@pytest.fixture
def stand_in(tmp_path):
    path = tmp_path / "python"
    path.write_text(STAND_IN)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_there_is_one_message_and_status_2(tmp_path):
    done = check(OUT=str(tmp_path / "out"))
    assert done.returncode == 2
    assert len(done.stdout.splitlines()) == 1 and "sees no CUDA GPU" in done.stdout
    assert not (tmp_path / "out").exists()


def test_dry_run_prints_every_stage_with_its_limit():
    done = check("--dry-run")
    assert done.returncode == 0
    assert [line.split()[1].rstrip(",") for line in done.stdout.splitlines() if line.startswith("== ")] == STAGES
    assert "at most 570 s in all" in done.stdout and "compute-sanitizer --tool" in done.stdout


@pytest.mark.parametrize(
    "arguments, message", [(["--stage", "fly"], "no stage fly; allowed: build"), (["-x"], "unknown argument -x")]
)
def test_wrong_arguments_are_refused(arguments, message):
    done = check(*arguments)
    assert done.returncode == 64 and message in done.stdout


def test_a_failed_stage_is_reported_and_does_not_stop_the_next(stand_in, tmp_path):
    out = tmp_path / "out"
    done = check("--stage", "configs,repeat,bench", python=stand_in, OUT=str(out))
    assert done.returncode == 1
    summary = json.loads((out / "summary.json").read_text())
    assert [(s["stage"], s["result"], s["status"]) for s in summary["stages"]] == [
        ("configs", "passed", 0), ("repeat", "failed", 3), ("bench", "passed", 0),
    ]  # fmt: skip
    assert summary["gpu"] == "some-gpu" and "the repeat stage went wrong" in done.stdout
    log = (out / "log.txt").read_text()
    assert "== repeat: failed after" in log and "called: -m bench.gpu.checks configs" in log
    assert (out / "bench.json").is_file()


def test_a_stage_out_of_time_is_ended(stand_in, tmp_path):
    stand_in.write_text(STAND_IN.replace('echo "called: $*"', "sleep 60"))
    script = tmp_path / "bench" / "gpu_check.sh"
    script.parent.mkdir()
    script.write_text(SCRIPT.read_text().replace("[graph]=40", "[graph]=6"))
    environment = {**os.environ, "PYTHON": str(stand_in), "OUT": str(tmp_path / "out")}
    command = ["bash", str(script), "--stage", "graph"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    (stage,) = json.loads((tmp_path / "out/summary.json").read_text())["stages"]
    assert done.returncode == 1 and stage["result"] == "out of time" and 5 <= stage["seconds"] <= 20


@pytest.mark.parametrize("name", ["small", "repeat"])
def test_the_checks_themselves_pass_on_the_cpu(name, tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "DTYPES", (torch.float32,))
    monkeypatch.setitem(checks.CHECKS, "repeat", lambda device: checks.repeat(device, times=2))
    path = tmp_path / "checks.json"
    assert checks.main([name, "--device", "cpu", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())[name]
    assert len(rows) >= 3 and all(row["ok"] and row["reason"] == "" for row in rows)


def test_configs_cover_every_pinned_bound():
    assert set(checks.tuned_dims()) >= {16, 128, 256}


def test_a_wrong_configuration_is_seen(monkeypatch):
    right = checks.ops.gated_delta_rule
    monkeypatch.setattr(checks.ops, "gated_delta_rule", lambda **kw: tuple(x * 1.01 for x in right(**kw)))
    monkeypatch.setattr(checks, "tuned_dims", lambda: [16])
    monkeypatch.setattr(checks, "DTYPES", (torch.float32,))
    rows = list(checks.configs("cpu"))
    assert len(rows) == 3 and all("AssertionError: o: error" in wrong for _, wrong in rows)


def test_changing_bits_are_seen():
    calls = iter([torch.zeros(3), torch.zeros(3), torch.tensor([0.0, 1e-7, 0.0])])
    assert "call 3: o differs at [1]" in checks.same_bits(lambda: {"o": next(calls)}, "cpu", 5)


def test_checks_share_one_file(tmp_path):
    path = tmp_path / "a" / "checks.json"
    record(path, "first", [1])
    record(path, "second", {"x": 2})
    assert json.loads(path.read_text()) == {"first": [1], "second": {"x": 2}}
