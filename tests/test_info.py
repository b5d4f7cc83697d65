"""`memattn info` and the command line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from memattn import backends, cli, feature_table, info


@pytest.fixture(scope="module")
def report():
    return info.collect()


def test_every_backend_of_every_op_runs_or_says_why(report):
    assert report["ops"].keys() == backends.registry().keys()
    for op, devices in report["ops"].items():
        for choice in devices.values():
            assert choice["reasons"].keys() == backends.registry()[op].keys()
            assert all(choice["runs"].values()), "chunked runs everywhere"
            for name, reasons in choice["reasons"].items():
                assert reasons or name in choice["runs"].values() or name == "chunked"


def test_text_shows_what_json_holds(report):
    text = info.render(report)
    assert f"torch {report['versions']['torch']}" in text
    for name, state in report["extensions"].items():
        assert f"{name:9} {state}" in text
    for devices in report["ops"].values():
        for choice in devices.values():
            assert all(f"not {name}: {r}" in text for name, found in choice["reasons"].items() for r in found)


def test_json_from_the_command_line():
    done = subprocess.run([sys.executable, "-m", "memattn", "info", "--json"], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["versions"]["python"] == sys.version.split()[0]


def test_a_wrong_instruction_set_is_reported(monkeypatch):
    if info._native.host() is None:
        pytest.skip(info._native.native_reason("_host"))
    monkeypatch.setenv("MEMATTN_CPU_ISA", "sse9")
    cpu = info._cpu()
    assert "isa_selected" not in cpu
    assert cpu["isa_error"].startswith("MEMATTN_CPU_ISA=sse9 cannot be used on this processor; available here: port")


def test_check_passes_here(capsys):
    assert info.main(["--check"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("check ")]
    assert any("cpu chunked float32" in row for row in rows)
    assert all(" ok: error " in row for row in rows)


def test_check_fails_on_a_wrong_result_and_on_an_exception(monkeypatch, capsys):
    exact = info.gated_delta_rule
    monkeypatch.setattr(info, "CEILINGS", {info.torch.float32: 5e-6})
    monkeypatch.setattr(info, "gated_delta_rule", lambda *a, **k: [1.001 * x for x in exact(*a, **k)])
    assert info.main(["--check"]) == 1
    assert "FAILED: error 1.0e-03, allowed 5e-06" in capsys.readouterr().out

    def broken(*args, **kwargs):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(info, "gated_delta_rule", broken)
    assert info.main(["--check"]) == 1
    assert "FAILED: error RuntimeError: no kernel image" in capsys.readouterr().out


def test_command_line(capsys):
    assert cli.main([]) == 0
    usage = capsys.readouterr().out
    assert all(name in usage for name in cli.COMMANDS)
    assert cli.main(["train"]) == 2
    assert capsys.readouterr().err == "memattn: unknown command 'train'; allowed: info, features, demo\n"


def test_the_page_of_features_is_that_of_the_registry(capsys):
    page = Path(__file__).parent.parent / "docs" / "features.md"
    assert cli.main(["features"]) == 0
    assert page.read_text() == capsys.readouterr().out, "python -m memattn features > docs/features.md"


def test_features_show_what_a_backend_lacks():
    limits = backends.Limits(("cpu",), (info.torch.float32,), backends.always, (2, 4), frozenset({"packed"}))
    more = backends.Limits(("cuda",), info.DTYPES, backends.always, features=frozenset({"packed", "backward"}))
    rows = list(feature_table.lines({"op": {"cpu": limits, "triton": more}}))[2:]
    assert rows == [
        "| `op` | devices | – | cuda | cpu | – |",
        "|  | dtypes | – | f32 bf16 f16 f64 | f32 | – |",
        "|  | sizes | – | 16–256 | 2–4 | – |",
        "|  | backward | – | yes | no | – |",
        "|  | packed | – | yes | yes | – |",
    ]
