"""The examples run, and fail when they should."""

import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parent.parent / "examples" / "million_tokens.py"


@pytest.fixture
def example(monkeypatch):
    spec = importlib.util.spec_from_file_location("million_tokens", PATH)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "million_tokens", module)
    spec.loader.exec_module(module)
    short = replace(module.SMOKE, tokens=1 << 13, facts=4, steps=1, budget=1 << 40)
    monkeypatch.setattr(module, "SMOKE", short)
    return module


def test_a_stream_larger_than_the_budget_is_read_and_every_fact_found(tmp_path):
    done = subprocess.run(
        [sys.executable, str(PATH), "--smoke", "--folder", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "10 of 10 facts found; within the budget" in done.stdout and "moved, file to device" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_facts_across_chunks_are_written_whole(example):
    noise = example.torch.Generator().manual_seed(0)
    facts = example.Facts.spread(example.SMOKE, noise)
    facts.begins[0] = 505
    parts = [example.torch.zeros(2, 512, 8, 128) for _ in range(2)]
    for i, (k, v) in enumerate(parts):
        facts.write(k, v, 512 * i)
    k, v = example.torch.cat(parts, 1)[:, 505 : 505 + example.FACT]
    assert (k == facts.keys[0]).all() and (v == facts.codes[0]).all()
    assert (parts[1][0][:9] == facts.keys[0]).all() and not parts[0][0][:505].any()


@pytest.mark.parametrize(
    "bug, text",
    [
        ("none", "4 of 4 facts found; within"),
        ("selects nothing but the first and last pages", "1 of 4 facts found; within"),
        ("scores without sense", "0 of 4 facts found; within"),
        ("forgets one fact", "3 of 4 facts found; within"),
        ("budget", "4 of 4 facts found; OVER"),
    ],
)
def test_the_exit_status_says_when_a_fact_is_missed_or_the_budget_broken(example, bug, text, monkeypatch, capsys):
    if bug == "selects nothing but the first and last pages":
        monkeypatch.setattr(example, "SELECTED", 3)
    elif bug == "scores without sense":
        right = example.block_scores
        monkeypatch.setattr(example, "block_scores", lambda q, r, **settings: -right(q, r, **settings))
    elif bug == "forgets one fact":
        append = example.KVPool.append

        def forgetful(self, layer, k, v):
            return append(self, layer, k, v if self.lengths(0)[0] >= 2048 else v * 0)

        monkeypatch.setattr(example.KVPool, "append", forgetful)
    elif bug == "budget":
        monkeypatch.setattr(example, "SMOKE", replace(example.SMOKE, budget=1))
    assert example.main(["--smoke"]) == (bug != "none")
    assert text in capsys.readouterr().out
