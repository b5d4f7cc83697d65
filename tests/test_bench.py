"""The benchmark harness: its counts against brute force, its gate against planted faults, its command line."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import fresh, lengths, machine, registry, report, retrieval, roofline, run, tables  # noqa: E402
from bench.compare import Candidate, Gate, Race  # noqa: E402
from bench.contest import Choice, contests  # noqa: E402
from bench.ops import gated_delta_rule as entry  # noqa: E402
from bench.ops import linear_attention as linear  # noqa: E402
from bench.registry import Work  # noqa: E402
from memattn.reference import gated_delta_rule as reference  # noqa: E402

TINY = entry.Case("tiny", batch=1, length=11, heads=1, value_heads=1, key_dim=5, value_dim=3, state=True)


# --- counts: the chunk algorithm in numpy, every multiply-add of a matrix product counted as it is done ---------------


class Counter:
    """Matrix products that count what they do; a mask says which entries of the left factor or the result exist."""

    def __init__(self):
        self.flops = 0

    def __call__(self, a, b, left=None, out=None):
        result = np.zeros((a.shape[0], b.shape[1]))
        for i in range(a.shape[0]):
            for j in range(b.shape[1]):
                if out is not None and not out[i, j]:
                    continue
                for m in range(a.shape[1]):
                    if left is None or left[i, m]:
                        result[i, j] += a[i, m] * b[m, j]
                        self.flops += 2
        return result

    def solve(self, lower, b):
        """(I + lower)^-1 b by substitution."""
        x = b.copy()
        for i in range(len(b)):
            for m in range(i):
                x[i] -= lower[i, m] * x[m]
                self.flops += 2 * b.shape[1]
        return x


def chunk(dot, q, k, v, g, beta, S0, do=None, dS1=None):
    """One chunk: (o, S1) and, given cotangents, (dq, dk, dv, dS0); the products that `chunk_flops` names, no others."""
    c = len(g)
    G = np.cumsum(g)
    full, strict = np.tril(np.ones((c, c), bool)), np.tril(np.ones((c, c), bool), -1)
    decay = np.where(full, np.exp(np.where(full, G[:, None] - G[None], 0)), 0)
    b, eG, to_end = beta[:, None], np.exp(G)[:, None], np.exp(G[-1] - G)[:, None]
    R, QS = dot(k, S0), dot(q, S0)
    L, A = b * dot(k, k.T, out=strict) * decay, dot(q, k.T, out=full) * decay
    Vn = dot.solve(L, b * (v - eG * R))
    o = eG * QS + dot(A, Vn, left=full)
    S1 = np.exp(G[-1]) * S0 + dot((to_end * k).T, Vn)
    if do is None:
        return o, S1
    dVn = dot(A.T, do, left=full.T) + dot(to_end * k, dS1)
    dX = dot.solve(L.T[::-1, ::-1], dVn[::-1])[::-1]  # the transposed system is upper triangular
    dR = -b * eG * dX
    dS0 = np.exp(G[-1]) * dS1 + dot((eG * q).T, do) + dot(k.T, dR)
    M1, M2 = dot(do, Vn.T, out=full) * decay, -dot(dX, Vn.T, out=strict) * decay
    dq = eG * dot(do, S0.T) + dot(M1, k, left=full)
    dk = dot(dR, S0.T) + dot(M1.T, q, left=full.T) + b * dot(M2, k, left=strict)
    dk += dot((b * M2).T, k, left=strict.T) + to_end * dot(Vn, dS1.T)
    return o, S1, dq, dk, b * dX, dS0


def inputs_of(case):
    given = replace(case, qk_l2norm=False, scale=1.0, beta=0.2).make(torch.float64)
    return given, [given[n].detach().numpy()[0, :, 0] for n in ("q", "k", "v", "g", "beta")] + [
        given["initial_state"].numpy()[0, 0]
    ]


@pytest.mark.parametrize("size", [1, 4, 8, 11])
def test_forward_flops_are_those_of_a_right_algorithm(size):
    given, (*tensors, S) = inputs_of(TINY)
    dot, outputs = Counter(), []
    for a in range(0, TINY.length, size):
        o, S = chunk(dot, *(x[a : a + size] for x in tensors), S)
        outputs.append(o)
    expected, final = reference.loop(**given, output_final_state=True)
    np.testing.assert_allclose(np.concatenate(outputs), expected[0, :, 0], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(S, final[0, 0], rtol=1e-10, atol=1e-12)
    assert dot.flops == entry.sequence_flops(TINY.length, TINY.key_dim, TINY.value_dim, False, size)


def test_backward_flops_are_those_of_a_right_algorithm():
    given, (*tensors, S0) = inputs_of(TINY)
    generator = np.random.default_rng(0)
    do, dS1 = generator.normal(size=(TINY.length, TINY.value_dim)), generator.normal(size=S0.shape)
    dot = Counter()
    *_, dq, dk, dv, dS0 = chunk(dot, *tensors, S0, do, dS1)
    leaves = [given[n].requires_grad_() for n in ("q", "k", "v", "initial_state")]
    o, final = reference.loop(**given, output_final_state=True)
    loss = (o[0, :, 0] * torch.from_numpy(do)).sum() + (final[0, 0] * torch.from_numpy(dS1)).sum()
    expected = [x.squeeze().numpy() for x in torch.autograd.grad(loss, leaves)]
    for ours, theirs in zip((dq, dk, dv, dS0), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-11)
    assert dot.flops == entry.chunk_flops(TINY.length, TINY.key_dim, TINY.value_dim, True)


def test_flops_scale_with_batch_and_heads_and_take_the_cheapest_chunk():
    case = replace(TINY, batch=3, value_heads=2, length=70)
    counts = [entry.sequence_flops(70, TINY.key_dim, TINY.value_dim, False, c) for c in (16, 32, 64)]
    assert entry.work(case, "fwd", torch.float32).flops == 6 * min(counts)


def test_flops_of_linear_attention_are_those_of_a_right_algorithm():
    case = linear.LinearCase("tiny", length=11, heads=1, value_heads=1, key_dim=5, value_dim=3, scale=1.0)
    given = case.make(torch.float64)
    leaves = [given[n].requires_grad_() for n in ("q", "k", "v", "initial_state")]
    q, k, v, S0 = (x.detach().squeeze().numpy() for x in leaves)
    generator = np.random.default_rng(0)
    do, dS1 = generator.normal(size=v.shape), generator.normal(size=S0.shape)
    G, full, dot = np.cumsum(given["g"].squeeze().numpy()), np.tril(np.ones((11, 11), bool)), Counter()
    decay = np.where(full, np.exp(np.where(full, G[:, None] - G[None], 0)), 0)
    eG, to_end = np.exp(G)[:, None], np.exp(G[-1] - G)[:, None]
    A = dot(q, k.T, out=full) * decay
    o = eG * dot(q, S0) + dot(A, v, left=full)
    S1 = np.exp(G[-1]) * S0 + dot(k.T, to_end * v)
    assert dot.flops == linear.chunk_flops(11, 5, 3, False)
    dS0 = np.exp(G[-1]) * dS1 + dot((eG * q).T, do)
    M = dot(do, v.T, out=full) * decay
    dq = eG * dot(do, S0.T) + dot(M, k, left=full)
    dk = dot(M.T, q, left=full.T) + to_end * dot(v, dS1.T)
    dv = dot(A.T, do, left=full.T) + to_end * dot(k, dS1)
    assert dot.flops == linear.chunk_flops(11, 5, 3, True)
    del given["normalize"]
    expected = linear.reference.loop(**given, output_final_state=True)
    loss = sum((x.squeeze() * torch.from_numpy(y)).sum() for x, y in zip(expected, (do, dS1), strict=True))
    truth = [*expected, *torch.autograd.grad(loss, leaves)]
    for ours, theirs in zip((o, S1, dq, dk, dv, dS0), truth, strict=True):
        np.testing.assert_allclose(ours, theirs.detach().squeeze().numpy(), rtol=1e-9, atol=1e-11)


def nbytes(tensors):
    return sum(x.nbytes for x in tensors if isinstance(x, torch.Tensor))


@pytest.mark.parametrize("op", registry.OPS)
@pytest.mark.parametrize("mode", registry.MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_tensors(op, mode, dtype):
    """Inputs once, results once; backward: inputs and cotangent read again. What is updated in place counts twice."""
    one = registry.load(op)
    if mode not in one.modes:
        pytest.skip(f"{op} has no {mode}")
    _, case = one.shapes("cpu", mode)[-1]
    case = one.small(case)
    if op == "block_retrieval":  # reads only the selected blocks: select all
        case = replace(case, entries=case.blocks)
    given = one.inputs(case, mode, dtype, "cpu", 0)
    results = one.truth(mode, {n: x.double() if isinstance(x, torch.Tensor) else x for n, x in given.items()})
    wide = ("state", "dg", "dweight", "dbias", "mass", "dlse0", "dlse1", "dlse2", "dlse3")
    dtypes = {**dict.fromkeys(wide, torch.float32), "summary": torch.float64}
    written = sum(x.numel() * dtypes.get(n, dtype).itemsize for n, x in results.items())
    read = nbytes(given.values())
    if mode == "fwdbwd":
        read += nbytes(x for n, x in given.items() if n not in ("do", "dy"))
    assert one.work(case, mode, dtype).bytes == read + written


def test_attention_flops_count_the_pairs_of_the_mask():
    one = registry.load("attention")
    for window in (None, 1, 7, 20):
        case = one.small(replace(one.shapes("cpu", "fwd")[0][1], length=11, heads=3, dim=16))
        case = replace(case, window=window)
        pairs = sum(j <= i and (window is None or i - j < window) for i in range(11) for j in range(11))
        assert [one.work(case, m, torch.float32).flops for m in one.modes] == [n * 2 * 3 * 16 * pairs for n in (2, 7)]


def test_sparse_attention_flops_count_the_listed_tokens_that_are_seen():
    one = registry.load("sparse_attention")
    for _, case in one.shapes("cpu", "fwd"):
        case = replace(one.small(case), heads=6, key_heads=3, dim=16)
        given = one.inputs(case, "fwd", torch.float32, "cpu", 0)
        last = given.get("q_positions", torch.full((1, 1), case.tokens))
        tokens = given["indices"].long()[..., None] * case.unit + torch.arange(case.unit)
        pairs = int(((tokens >= 0) & (tokens <= last[:, :, None, None, None])).sum()) * 2  # heads of a key head
        assert [one.work(case, m, torch.float32).flops for m in one.modes] == [n * 2 * 16 * pairs for n in (2, 7)]


def test_segment_memory_flops_count_the_rows_that_meet_a_memory():
    one = registry.load("segment_memory")
    for delta in (True, False):
        case = replace(one.small(one.shapes("cpu", "fwd")[0][1]), length=11, segment_size=4, heads=6, key_heads=3)
        case = replace(case, delta=delta, key_dim=16, value_dim=24)
        reads = sum(6 for t in range(11) if t // 4 > 0)
        writes = sum(3 * (1 + (delta and s // 4 > 0)) for s in range(11) if s // 4 < 2)
        product = 2 * 16 * 24
        assert [one.work(case, m, torch.float32).flops for m in one.modes] == [
            n * product * (reads + writes) for n in (1, 3)
        ]


def test_step_flops_are_three_products_per_token():
    case = replace(TINY, batch=2, length=3, value_heads=4)
    assert entry.work(case, "step", torch.float32).flops == 2 * 4 * 3 * 3 * (2 * TINY.key_dim * TINY.value_dim)


def test_floor_takes_the_slower_of_moving_and_computing():
    ceilings = roofline.Ceilings(memory=10.0, cached=100.0, float32=1000.0, bfloat16=4000.0)
    assert ceilings.floor(Work(bytes=100, flops=1000), torch.float32) == (10.0, "bytes")
    assert ceilings.floor(Work(bytes=100, flops=40000), torch.float16) == (10.0, "bytes")
    assert ceilings.floor(Work(bytes=100, flops=40000), torch.float32) == (40.0, "flops")
    assert ceilings.floor(Work(bytes=100, flops=100), torch.float32, cached=True) == (1.0, "bytes")


# --- the gate: no time for a wrong answer ----------------------------------------------------------------------------


def race(call, mode="fwd", rounds=0.01):
    one = registry.load("gated_delta_rule")
    sets = [one.inputs(one.small(one.shapes("cpu", mode)[0][1]), mode, torch.float32, "cpu", seed) for seed in (0, 1)]
    (outcome,) = Race(Gate(one, mode, 5e-6), sets, "cpu", rounds).run([Candidate("candidate", "0", call)])
    return outcome


def right(given):
    return entry.call("fwd", "chunked")(given)


def test_right_results_are_timed():
    outcome = race(right)
    assert outcome.status == "PASSED" and len(outcome.seconds) >= 5 and outcome.warm_calls >= 8
    assert set(outcome.errors) == {"before", "after"} and outcome.summary()["min_ms"] > 0


def test_wrong_results_get_no_time():
    outcome = race(lambda given: {"o": right(given)["o"] * 1.001})
    assert outcome.status == "INCORRECT" and "o is off by" in outcome.reason and "min_ms" not in outcome.summary()


def test_unwritten_elements_are_seen():
    def call(given):
        o = torch.empty_like(given["v"])  # NaN while the gate poisons allocations
        o[:, 1:] = right(given)["o"][:, 1:]
        return {"o": o}

    assert race(call).status == "INCORRECT"


def test_replaying_an_old_result_is_seen_after_timing():
    kept = []

    def call(given):
        kept.append(kept[-1] if len(kept) > 1 else right(given))  # computes twice, then replays
        return kept[-1]

    outcome = race(call)
    assert outcome.status == "INCORRECT" and outcome.reason.startswith("after timing") and not outcome.seconds


def test_overwritten_inputs_are_seen():
    def call(given):
        results = right(given)
        given["g"].mul_(1.5)
        return results

    outcome = race(call)
    assert outcome.status == "INCORRECT" and "input g was overwritten" in outcome.reason


def test_a_failing_candidate_becomes_a_row_with_the_reason():
    def call(given):
        raise ValueError("no such thing\nsecond line")

    outcome = race(call)
    assert (outcome.status, outcome.reason) == ("ERROR", "ValueError: no such thing")


def test_steps_may_change_their_state_and_nothing_else():
    outcome = race(entry.call("step", "chunked"), mode="step")
    assert outcome.status == "PASSED" and set(outcome.errors["after"]) == {"o", "state"}


def test_float64_reference_in_pieces_equals_the_loop(monkeypatch):
    monkeypatch.setattr(entry, "PIECE", 16)
    given = replace(TINY, length=37).make(torch.float64)
    expected, _ = reference.loop(**given)
    assert torch.allclose(entry.truth("fwd", given)["o"], expected, rtol=1e-10, atol=1e-12)


# --- pages -----------------------------------------------------------------------------------------------------------


def summary(name, ms):
    errors = {"before": {"o": 1e-7}, "after": {"o": 3e-7}}
    times = {"min_ms": ms, "median_ms": 1.1 * ms, "p20_ms": ms, "p80_ms": 1.2 * ms, "rounds": 9}
    return {"name": name, "version": "1", "status": "PASSED", "reason": "", "errors": errors, **times}


def document(*rows):
    info = machine.describe()
    return {"schema": 1, "command": "python bench/run.py --op x", "device": "cpu", "dry_run": False, "machine": info,
            "ceilings": roofline.Ceilings(1e10, 2e10, 1e11, 2e11).as_dict(), "rows": list(rows)}  # fmt: skip


def row(ours, theirs, **more):
    absent = {"name": "fla", "version": "", "status": "UNAVAILABLE", "reason": "fla is not installed", "errors": {}}
    wrong = summary("transformers 9", 1.0) | {"status": "INCORRECT", "reason": "after timing: o is off"}
    del wrong["min_ms"]
    base = {"op": "gated_delta_rule", "mode": "fwd", "group": "training", "dtype": "float32", "shape": "B1 T8 H1 D16"}
    base |= {"case": {"batch": 1, "length": 8}, "bytes": 10, "flops": 10, "floor_ms": 1.0, "bound": "flops", "goal": 3}
    people = [summary("memattn cpu", ours), summary("transformers 4", theirs), wrong, absent]
    return base | {"candidates": people} | more


def test_a_page_says_what_was_won_and_lost(tmp_path):
    results = document(row(2.0, 9.0), row(4.0, 3.0, shape="B9 T8 H1 D16", goal=None), row(8.0, 9.0, mode="step"))
    (tmp_path / "a.json").write_text(json.dumps(results))
    text = report.page(tmp_path)
    assert "| 3 × | 4.50 × | met |" in text and "| 3 × | 1.12 × | missed |" in text
    assert "- gated_delta_rule forward B9 T8 H1 D16 float32: transformers 4 takes 0.75 of our time" in text
    assert "transformers 9 | incorrect: after timing: o is off" in text and "- fla: fla is not installed" in text
    assert text.count("    python bench/run.py --op x") == 2  # under each table
    assert "3.0e-07" in text and "Nowhere" not in text


def test_no_loss_is_said_and_a_missing_time_of_ours_is_a_loss():
    assert report.losses([row(2.0, 9.0)]) == ["Nowhere among the rows above: no peer that ran was faster."]
    nothing = row(2.0, 9.0)
    nothing["candidates"] = nothing["candidates"][1:]
    assert report.losses([nothing])[0].endswith("no time of ours, see the table")


def test_published_figures_stand_beside_ours_and_say_so():
    here = row(0.5, 9.0, dtype="bfloat16", shape="B1 T8192 H16/32 D128", group="training")
    text = "\n".join(report.published_table([here]))
    assert "not measured here" in text and "| FlashQLA, H200 | 0.280 | 0.500 |" in text
    assert report.published_table([row(1.0, 2.0)]) == []


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory of a process needs Linux's /proc")
def test_peak_memory_is_measured_and_a_failure_is_a_row_with_its_reason():
    made = {"op": "gated_delta_rule", "mode": "fwd", "case": 0}
    memory = [fresh.peak_in_fresh_process(**made, name=name) for name in ("memattn cpu", "nobody")]
    assert 0 < memory[0]["extra_mib"] < 2 * memory[0]["threads"], "scratch without a graph is at most 2 MiB per thread"
    text = "\n".join(report.memory_table([row(1.0, 2.0)], {"memory": memory}))
    assert f"| memattn cpu | forward | B1 T2048 H16 D128 float32 | {memory[0]['extra_mib']:.1f} |" in text
    assert "| nobody |  |  | no figure: StopIteration |" in text


def test_times_far_below_the_floor_are_called_suspect():
    assert "suspect" in "\n".join(report.race_table([row(0.5, 9.0)]))
    assert "suspect" not in "\n".join(report.race_table([row(0.9, 9.0)]))


# --- command line ----------------------------------------------------------------------------------------------------


def test_dry_run_counts_and_checks_everything(capsys):
    assert run.main(["--dry-run", "--quick", "--device", "cuda", "--dtype", "float32"]) == 0
    text = capsys.readouterr().out
    for op in registry.OPS:
        for mode in registry.load(op).modes:
            assert f"{op} {mode} float32" in text
    assert "floor" in text and "checked" in text and "min " not in text and "data sheet" in text


def test_json_has_times_machine_and_errors(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(roofline, "measure", lambda device: roofline.Ceilings(1e10, 2e10, 1e11, 2e11))
    path = tmp_path / "deep" / "out.json"
    arguments = ["--op", "gated_delta_rule", "--mode", "step", "--shapes", "decode", "--dtype", "float32", "--quick"]
    assert (
        run.main([*arguments, "--device", "cpu", "--backend", "chunked", "--seconds", "0.01", "--json", str(path)]) == 0
    )
    document = json.loads(path.read_text())
    assert "python bench/run.py --op gated_delta_rule" in document["command"]
    assert document["machine"]["versions"]["torch"] == torch.__version__ and document["machine"]["cpu"]["cores"] >= 1
    (row,) = document["rows"]
    ours = tables.ours(row)
    assert (
        ours["name"] == "memattn chunked"
        and 0 < ours["min_ms"] <= ours["median_ms"]
        and ours["errors"]["after"]["state"] < 5e-6
    )
    assert row["floor_ms"] == pytest.approx(1e3 * row["bytes"] / 1e10)


@pytest.mark.parametrize(
    "arguments, message", [(["--op", "nothing"], "nothing is not among"), (["--shapes", "x"], "x is not")]
)
def test_unknown_words_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        run.main(arguments)
    assert message in capsys.readouterr().err


def test_unknown_backend_is_refused_with_the_allowed_ones():
    choice = Choice(("gated_delta_rule",), ("fwd",), ("training",), ("float32",), "cpu", backend="fast", dry=True)
    with pytest.raises(ValueError, match=r"--backend has fast; allowed for gated_delta_rule fwd: auto, all, "):
        next(contests(choice)).outcomes(choice)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_one_clear_message(capsys):
    assert run.main(["--device", "cuda"]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().out


@pytest.mark.parametrize("module, name", [(lengths, "lengths"), (retrieval, "retrieval")])
def test_the_pages_against_size_are_those_of_their_results(module, name):
    files = sorted(module.RESULTS.glob("*.json"))
    assert files
    assert module.PAGE.read_text() == module.page(files), f"python bench/{name}.py page"
    for file in files:
        assert (module.PAGE.parent / f"{name}_{file.stem}.png").stat().st_size > 10_000


@pytest.mark.parametrize("dtype", retrieval.DTYPES)
def test_every_way_of_retrieval_has_a_time(dtype):
    rows = list(retrieval.points(2048, dtype, 0))
    assert [row["name"] for row in rows] == list(retrieval.candidates()) and all(row["ms"] > 0 for row in rows)


@pytest.mark.parametrize("name", lengths.layers())
@pytest.mark.parametrize("mode", lengths.MODES)
def test_every_layer_has_a_time_at_every_length(name, mode):
    row = lengths.point(name, mode, 70, "float32", 0.01)
    assert row["ms"] > 0 and row["mib"] >= 0
