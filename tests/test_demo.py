"""The demo: its text, model, checkpoint, readings and report, and that stopping it loses nothing."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

for package in ("matplotlib", "safetensors", "tqdm"):
    pytest.importorskip(package)

from memattn import demo  # noqa: E402
from memattn.demo import (  # noqa: E402
    checkpoint,
    compare,
    data,
    documents,
    interrupt,
    mixers,
    options,
    report,
    results,
    stream,
    train,
)
from memattn.demo.checkpoint import Progress  # noqa: E402
from memattn.demo.model import ByteModel, ModelConfig  # noqa: E402

PYTHON_FOLDER = Path(demo.__file__).resolve().parents[2]
TINY = ModelConfig(embed_dim=32, num_heads=2, layers=("gdn", "local"), window=8, hidden_dim=32)


@pytest.fixture
def tiny_model():
    torch.manual_seed(0)
    model = ByteModel(TINY)
    torch.nn.init.normal_(model.head.weight, std=0.2)
    return model


def write_files(folder, count, size=200):
    generator = torch.Generator().manual_seed(3)
    for i in range(count):
        content = torch.randint(97, 123, (size,), generator=generator).tolist()
        (folder / f"module_{i}.py").write_bytes(bytes(content))


# --- text ---


def test_split_is_disjoint_complete_and_repeatable(tmp_path):
    write_files(tmp_path, 60)
    (tmp_path / "copy.py").write_bytes((tmp_path / "module_0.py").read_bytes())
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "other.py").write_text("not the library")
    (tmp_path / "notes.txt").write_text("not Python")
    first, again = (data.load_corpus(tmp_path, held_out_bytes=200) for _ in range(2))
    assert set(first.train_files).isdisjoint(first.held_out_files)
    assert len(first.train_files) + len(first.held_out_files) == 60
    texts = [set(bytes(t.tolist()).split(data.FILE_END)) - {b""} for t in (first.train, first.held_out)]
    assert texts[0].isdisjoint(texts[1]) and len(texts[0]) + len(texts[1]) == 60
    assert torch.equal(first.train, again.train) and torch.equal(first.held_out, again.held_out)
    assert first.digest == again.digest and 0 < len(first.held_out_files) < 30


def test_the_library_of_this_python_is_enough():
    corpus = data.load_corpus(held_out_bytes=1 << 20)
    assert len(corpus.held_out) >= 1_000_000 and len(corpus.train) > 3 * len(corpus.held_out)


def test_too_little_text_is_refused(tmp_path):
    write_files(tmp_path, 20)
    with pytest.raises(
        ValueError, match=r"of \.py files to train on and .* held out; the demo needs at least 1,000,000"
    ):
        data.load_corpus(tmp_path, held_out_bytes=1_000_000)


def test_training_rows_go_on_where_they_stopped_until_they_jump():
    text = torch.arange(250, dtype=torch.uint8)
    rows = data.TrainingRows(text, rows=5, length=30, stay=2)
    first, second, third = (rows.batch(i) for i in range(3))
    assert first.shape == (5, 31) and torch.equal(first.diff(), torch.ones(5, 30, dtype=torch.long))
    assert torch.equal(first[:, -1], second[:, 0]) and not torch.equal(second[:, -1], third[:, 0])
    assert [rows.starts_afresh(i) for i in range(4)] == [True, False, True, False]
    assert torch.equal(second, data.TrainingRows(text, 5, 30, 2).batch(1)), "a resumed run reads the same"
    with pytest.raises(ValueError, match=r"text has 250 bytes; stay=9 batches of length=30 need more"):
        data.TrainingRows(text, rows=5, length=30, stay=9)


def test_order2_counts_agree_with_dictionaries():
    train_text, text = b"abracadabra, abracadabra", b"abrabracad"
    counts = [Counter(train_text[i : i + n] for i in range(len(train_text) - n + 1)) for n in (1, 2, 3)]

    def probability(context, byte):
        p = 1 / 256
        for n in range(3):
            before = context[2 - n :]
            seen = sum(c for gram, c in counts[n].items() if gram[:-1] == before)
            p = (counts[n][before + byte] + 4 * p) / (seen + 4)
        return p

    expected = -sum(math.log2(probability(text[i - 2 : i], text[i : i + 1])) for i in range(2, len(text)))
    got = data.order2_bits_per_byte(*(torch.tensor(list(t), dtype=torch.uint8) for t in (train_text, text)))
    assert got == pytest.approx(expected / (len(text) - 2), rel=1e-5)


# --- model ---


def test_local_attention_is_masked_softmax():
    torch.manual_seed(0)
    layer = mixers.LocalAttention(32, 2, window=8).double()
    x = torch.randn(3, 29, 32, dtype=torch.float64)
    q, k, v = layer._project(x)
    distance = torch.arange(29)[:, None] - torch.arange(29)
    slopes = torch.tensor([2.0**-4, 2.0**-8], dtype=torch.float64)
    scores = q @ k.mT / 4 - slopes[:, None, None] * distance
    expected = layer._merge(scores.masked_fill((distance < 0) | (distance >= 8), -torch.inf).softmax(-1) @ v)
    torch.testing.assert_close(layer(x), expected)
    parts, state = [], None
    for piece in x.split((3, 1, 12, 13), dim=1):
        y, state = layer(piece, state, return_state=True)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), expected)
    assert state.k.shape == (3, 2, 8, 16)


@pytest.mark.parametrize("layers", [("gdn", "local"), ("full", "local")])
def test_reading_in_pieces_then_stepping_equals_reading_at_once(tiny_model, layers):
    model = tiny_model if layers == TINY.layers else ByteModel(replace(TINY, layers=layers))
    tokens = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole, _ = model(tokens)
        state, place, parts = model.init_state(2), 0, []
        for end in (13, 21, 30) if "gdn" in layers else (30,):
            y, state = model(tokens[:, place:end], state)
            parts.append(y)
            place = end
        state = [s if not isinstance(s, mixers.GrowingCache) else with_room(s, 10) for s in state]
        for t in range(place, 40):
            y, state = model.step(tokens[:, t], state)
            parts.append(y[:, None])
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)


def with_room(cache, room):
    k, v = (F.pad(t, (0, 0, 0, room)) for t in (cache.k, cache.v))
    return mixers.GrowingCache(k, v, cache.seen)


def test_wrong_layer_name_is_refused():
    with pytest.raises(ValueError, match=r"layers: got 'mamba'; allowed are gdn, deltanet.*, local, full"):
        ByteModel(replace(TINY, layers=("mamba",)))


# --- training and checkpoint ---


def test_learning_rate_rises_then_falls():
    config = train.TrainingConfig(seconds=100, warmup=0.1, final_fraction=0.2)
    rates = [train.rate_fraction(config, s) for s in (0, 5, 10, 55, 100, 200)]
    assert rates == pytest.approx([0, 0.5, 1.0, 0.6, 0.2, 0.2])


def test_resumed_training_takes_the_same_step(tmp_path, tiny_model):
    rows = data.TrainingRows(torch.arange(2000).remainder(97).to(torch.uint8), rows=2, length=16, stay=8)
    config = train.TrainingConfig(seconds=60)
    trainer = train.Trainer(tiny_model, rows, config, Progress(seconds=30.0))
    for i in range(3):
        trainer._step(rows.batch(i), tiny_model.init_state(2))
    path = tmp_path / "c.safetensors"
    checkpoint.save_checkpoint(path, tiny_model, train.optimizer_tensors(trainer.optimizers), trainer.progress, "text")
    saved = checkpoint.load_checkpoint(path)
    assert saved.config == TINY and saved.progress == trainer.progress and saved.corpus == "text"
    resumed = train.Trainer(saved.build_model(), rows, config, saved.progress)
    train.restore_optimizers(resumed.optimizers, saved.optimizer)
    for one in (trainer, resumed):
        one._step(rows.batch(3), one.model.init_state(2))
    after, expected = resumed.model.state_dict(), tiny_model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in expected.items())
    assert not torch.equal(expected["head.weight"], saved.weights["head.weight"])


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, tiny_model, monkeypatch):
    path = tmp_path / "c.safetensors"
    checkpoint.save_checkpoint(path, tiny_model, {}, Progress(step=1), "text")
    before = path.read_bytes()

    def full(handle):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        checkpoint.save_checkpoint(path, tiny_model, {}, Progress(step=2), "text")
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_wrong_checkpoints_are_refused(tmp_path):
    from safetensors.torch import save_file

    noise, foreign = tmp_path / "noise", tmp_path / "foreign"
    noise.write_bytes(b"\xff" * 100)
    save_file({"x": torch.zeros(1)}, foreign)
    for path, reason in ((tmp_path / "none", "no such file"), (noise, "not a readable"), (foreign, "format None")):
        with pytest.raises(ValueError, match=f"checkpoint {re.escape(str(path))}: .*{reason}"):
            checkpoint.load_checkpoint(path)


# --- reading ---


def test_reading_in_chunks_equals_one_shot(tiny_model):
    text = torch.randint(0, 256, (2, 100), generator=torch.Generator().manual_seed(2)).to(torch.uint8)
    with torch.no_grad():
        inputs = torch.cat((torch.zeros(2, 1, dtype=torch.long), text[:, :-1].long()), 1)
        logits, _ = tiny_model(inputs)
    expected = F.cross_entropy(logits.flatten(0, 1), text.flatten().long(), reduction="none").view(2, 100) / math.log(2)
    seen = []
    reading = stream.read(tiny_model, text, 32, interrupt.StopRequest(), lambda count, bits: seen.append((count, bits)))
    torch.testing.assert_close(torch.cat(list(stream.score(tiny_model, text, 32)), 1), expected, rtol=1e-4, atol=1e-5)
    assert reading.bits_per_byte == pytest.approx(float(expected.mean()), rel=1e-5)
    assert [count for count, _ in seen] == [64, 64, 64, 8] and seen[-1][1] == pytest.approx(reading.bits_per_byte)
    assert [place for place, _ in reading.resident] == [32, 64, 96, 100]
    separate = stream.mean_bits(tiny_model, text.reshape(-1, 50), 3, interrupt.StopRequest())
    halves = torch.cat([torch.cat(list(stream.score(tiny_model, t, 50)), 1) for t in text.split(50, 1)], 1)
    assert separate == pytest.approx(float(halves.mean()), rel=1e-5) and separate != pytest.approx(
        reading.bits_per_byte
    )


def test_positions_fall_into_powers_of_two():
    bits = torch.arange(100.0).repeat(2, 1) + torch.tensor([[0.0], [2.0]])
    buckets = stream.by_position(bits)
    assert [(b.first, b.last) for b in buckets] == [(0, 15), (16, 31), (32, 63), (64, 99)]
    assert [b.bits for b in buckets] == [8.5, 24.5, 48.5, 82.5]
    assert all(b.error == pytest.approx(1.0) for b in buckets) and sum(b.count for b in buckets) == 200


def test_generation_is_repeatable_and_depends_on_prompt_and_seed(tiny_model):
    def written(prompt, seed):
        return list(stream.generate(tiny_model, prompt, 12, temperature=1.0, seed=seed))

    assert written(b"import", 0) == written(b"import", 0)
    assert len({tuple(written(p, s)) for p, s in ((b"import", 0), (b"import", 1), (b"class", 0), (b"", 0))}) == 4


# --- memories of several sizes ---


def test_long_documents_are_the_starts_of_files_that_are_long_enough():
    text = torch.tensor(list(b"abc\0defghi\0jklmn\0op\0qrstuv"), dtype=torch.uint8)
    found = documents.long_documents(text, 5, 8)
    assert [bytes(row.tolist()) for row in found] == [b"defgh", b"jklmn"], "the last file has no end: it was cut"
    assert len(documents.long_documents(text, 5, 1)) == 1
    with pytest.raises(ValueError, match="no held-out file has 7 bytes; --memory needs one"):
        documents.long_documents(text, 7, 8)


def test_each_memory_size_is_read_and_scored_on_the_same_bytes():
    torch.manual_seed(0)
    model = ByteModel(replace(TINY, layers=("local", "memorizing")))
    torch.nn.init.normal_(model.head.weight, std=0.5)
    texts = torch.randint(0, 256, (3, 100), generator=torch.Generator().manual_seed(2)).to(torch.uint8)
    seen, stop = [], interrupt.StopRequest()
    got = documents.by_memory_size(model, texts, (0, 16, 64), 20, 30, stop, lambda *step: seen.append(step))
    points = list(got)
    assert [p.size for p in points] == [0, 16, 64] and seen[:5] == [(0, 90), (0, 90), (0, 90), (0, 30), (16, 90)]
    for point in points:
        documents.set_memory_size(model, point.size)
        whole = torch.cat(list(stream.score(model, texts, 100)), 1)[:, -20:].double()
        assert point.documents == pytest.approx(whole.mean(1).tolist(), rel=1e-5) and point.read == 300
        assert point.bits == pytest.approx(float(whole.mean()), rel=1e-5)
    assert len({round(p.bits, 6) for p in points}) == 3, "the size matters"
    less = torch.tensor(points[0].documents) - torch.tensor(points[2].documents)
    assert points[2].gain(points[0]) == pytest.approx((float(less.mean()), float(less.std()) / 3**0.5), rel=1e-3)


# --- comparison ---


def test_comparison_counts_state_and_stops_softmax_in_time(tiny_model):
    softmax = ByteModel(TINY.with_softmax())
    config = compare.ComparisonConfig(contexts=(16, 32, 64), chunk=16, decode_steps=2, softmax_seconds=0.0)
    text = torch.zeros(64, dtype=torch.uint8)
    result = compare.compare(tiny_model, softmax, text, config, interrupt.StopRequest(), lambda so_far: None)
    local = 2 * 8 * 32 * 4  # keys and values of the window, float32
    assert [p.state - local for p in result.softmax] == [2 * n * 32 * 4 for n in (16, 32, 64)]
    assert len({p.state for p in result.memory}) == 1
    assert [p.prefill_seconds is None for p in result.softmax] == [False, True, True]
    assert result.stopped.startswith("softmax prefill stopped before 32 bytes")
    assert all(p.decode_seconds > 0 and p.prefill_seconds > 0 for p in result.memory)


# --- stopping ---


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_request_waits_for_the_check(number):
    before = signal.getsignal(number)
    with interrupt.StopRequest() as stop:
        stop.check()
        os.kill(os.getpid(), number)
        with pytest.raises(interrupt.Stopped) as caught:
            stop.check()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
            time.sleep(1)
    assert caught.value.code == 128 + number and signal.getsignal(number) == before


PHASES = {
    "training": (train.Trainer, "_step"),
    "measuring compressors": (data, "compressor_bits_per_byte"),
    "reading texts": (stream, "mean_bits"),
    "reading the stream": (stream, "by_position"),
    "writing": (stream, "generate"),
    "comparing with softmax attention": (compare, "prefill"),
}


@pytest.mark.parametrize("phase", PHASES)
def test_stopping_in_any_phase_leaves_checkpoint_and_report(tmp_path, monkeypatch, capsys, phase):
    owner, name = PHASES[phase]
    work, calls = getattr(owner, name), []

    def interrupted(*args, **kwargs):
        calls.append(name)
        if len(calls) == (2 if name == "by_position" else 1):  # the first reading is that of the texts
            os.kill(os.getpid(), signal.SIGTERM)
        return work(*args, **kwargs)

    monkeypatch.setattr(owner, name, interrupted)
    assert demo.main(["--smoke", "--seconds", "0.1", "--out", str(tmp_path)]) == 128 + signal.SIGTERM
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["stopped"] == phase and f"stopped while {phase}" in (tmp_path / "report.html").read_text()
    assert checkpoint.load_checkpoint(tmp_path / "checkpoint.safetensors").progress.step >= 1
    assert f"Stopped while {phase}." in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.safetensors", *sorted(report.FILES)]


def test_stopping_between_memory_sizes_keeps_those_that_were_read(tmp_path, monkeypatch, capsys):
    work = documents.set_memory_size

    def interrupted(model, size):
        if size:
            os.kill(os.getpid(), signal.SIGTERM)
        work(model, size)

    monkeypatch.setattr(documents, "set_memory_size", interrupted)
    code = demo.main(["--memory", "--smoke", "--seconds", "0.1", "--out", str(tmp_path)])
    saved = json.loads((tmp_path / "report.json").read_text())
    assert code == 128 + signal.SIGTERM and saved["stopped"] == "reading documents"
    assert [point["size"] for point in saved["memory_sizes"]] == [0]
    assert "demo --memory --resume" in capsys.readouterr().out


def run_demo(*arguments, **more):
    environment = {**os.environ, "PYTHONPATH": str(PYTHON_FOLDER), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "memattn", "demo", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, text=True, stdout=-1, stderr=-1, **more)


def test_ctrl_c_while_training_then_resume_and_generate(tmp_path, capfdbinary):
    process = run_demo("--smoke", "--seconds", 300, "--out", tmp_path)
    file = tmp_path / "checkpoint.safetensors"
    deadline = time.monotonic() + 120
    while not file.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Stopped while training." in out and "Traceback" not in err
    steps = checkpoint.load_checkpoint(file).progress.step
    assert steps > 0 and (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")

    again = tmp_path / "again"
    assert demo.main(["--smoke", "--seconds", "0.1", "--resume", str(file), "--out", str(again)]) == 0
    assert json.loads((again / "report.json").read_text())["training"]["step"] == steps, "its time was already spent"
    capfdbinary.readouterr()
    assert demo.main(["--generate", "import os", "--checkpoint", str(file), "--count", "5"]) == 0
    written = capfdbinary.readouterr().out
    assert written.startswith(b"import os") and len(written) == len(b"import os") + 5 + 1


# --- the whole ---


def test_smoke_run_from_the_command_line(tmp_path):
    process = run_demo("--smoke", "--out", tmp_path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "100%" in err and "bits/byte" in err, "the progress bar"
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["stopped"] is None and set(saved["baselines"]) == {"order-2 counts", "gzip", "lzma"}
    bits = saved["training"]["curve_bits"]
    assert bits[-1] < 8 and saved["stream"]["bits_per_byte"] < 8
    assert saved["stream"]["resident"][-1][0] == saved["stream"]["length"] == 4096
    assert [len(saved["comparison"][kind]) for kind in ("memory", "softmax")] == [2, 2]
    assert saved["sample"] in out and saved["sample"].startswith("def ")
    for part in ("Held-out bits per byte by position", "held-out stream", "softmax attention", "report.html"):
        assert part in out


@pytest.mark.parametrize("arguments", ["--layer rat", "--stack gdn:1,rat:1"])
def test_smoke_run_with_other_layers(tmp_path, arguments):
    process = run_demo("--smoke", "--seconds", "0.3", *arguments.split(), "--out", tmp_path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    saved = json.loads((tmp_path / "report.json").read_text())
    expected = {"--layer rat": ["rat", "local"], "--stack gdn:1,rat:1": ["gdn", "rat"]}
    assert saved["stopped"] is None and saved["model"]["layers"] == expected[arguments]


def test_smoke_run_with_memories(tmp_path):
    process = run_demo("--memory", "--smoke", "--out", tmp_path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["stopped"] is None and saved["model"]["layers"] == ["local", "memorizing"]
    assert [point["size"] for point in saved["memory_sizes"]] == [0, 64, 256]
    assert all(len(point["documents"]) == 4 and max(point["documents"]) < 8.5 for point in saved["memory_sizes"])
    assert "Held-out bits per byte by size of the memory" in out and (tmp_path / "report.png").stat().st_size > 10000


@pytest.mark.parametrize("name", mixers.STACKED)
def test_the_stream_is_shorter_where_memory_grows(name):
    plan, layers = options.Plan(), (name, "local")
    model = ByteModel(ModelConfig(embed_dim=32, num_heads=2, window=16, hidden_dim=64, layers=layers))
    sizes = [compare.state_bytes(compare.prefill(model, torch.zeros(1, n, dtype=int), None)[1]) for n in (512, 1024)]
    shorter = plan.stream_length(layers) < plan.stream_bytes
    assert (sizes[0] < sizes[1]) == shorter == (name in mixers.GROWING)


@pytest.mark.parametrize("name", mixers.STACKED)
def test_every_layer_trains_reads_and_writes(name):
    """What a smoke run does with a layer, without the rest."""
    torch.manual_seed(0)
    model = ByteModel(replace(TINY, layers=(name,), window=16))
    text = torch.randint(97, 105, (4000,), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    config = train.TrainingConfig(seconds=0.2, rows=2, length=40, stay=3)
    trainer = train.Trainer(model, data.TrainingRows(text, 2, 40, 3), config, Progress())
    trainer.run(interrupt.StopRequest(), lambda bits: None, lambda: None)
    assert trainer.progress.step > 0 and all(p.isfinite().all() for p in model.parameters())
    tokens = text[None, :50].long()
    with torch.no_grad():
        whole, _ = model(tokens)
        first, state = model(tokens[:, :23])
        parts = [first]
        for t in range(23, 50):
            y, state = model.step(tokens[:, t], state)
            parts.append(y[:, None])
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-3, atol=1e-4)
    assert len(list(stream.generate(model, b"abc", 5, temperature=1.0, seed=0))) == 5


def test_report_is_one_self_contained_page():
    found = results.Results(results.describe_machine(torch.device("cpu")), sample="<script>1 < 2</script>")
    found.training = Progress(3, 2.0, [1.0, 2.0], [10, 20], [5.0, 4.0])
    buckets = [stream.Bucket(0, 15, 5.0, 0.1, 32), stream.Bucket(16, 31, 4.0, 0.1, 32)]
    found.rows = stream.Reading(2, 32, 1.0, 4.5, buckets, [(32, 10 << 20)])
    found.stream = stream.Reading(
        1, 64, 1.0, 4.2, stream.by_position(torch.ones(1, 64)), [(32, 9 << 20), (64, 11 << 20)]
    )
    delta = [compare.Point(1024, 0.5, 1 << 20, 0.01, 1 << 10), compare.Point(2048, 1.0, 1 << 20, 0.01, 1 << 10)]
    full = [compare.Point(1024, 0.25, 2 << 20, 0.01, 1 << 15), compare.Point(2048, None, None, 0.02, 1 << 16)]
    found.comparison = compare.Comparison(delta, full, "softmax prefill stopped before 2,048 bytes")
    png = report.draw(found)
    page = report._page(found, png)
    assert not re.search(r"https?:|<script|<link|@import|url\(", page)
    assert re.findall(r'src=[\'"]([^,]*),', page) == ["data:image/png;base64"]
    assert "&lt;script&gt;1 &lt; 2" in page and "Softmax prefill stopped before 2,048 bytes." in page
    for cell in ("+2.0 MiB", "2,048", "4,096", "4.200"):
        assert f"<td>{cell}</td>" in page, cell


BAD_ARGUMENTS = {
    "--seconds 0": "argument --seconds: got '0'; allowed is a number >= 0.1",
    "--seconds nan": "argument --seconds: got 'nan'; allowed is a number >= 0.1",
    "--count 2.5": "argument --count: got '2.5'; allowed is a whole number >= 1",
    "--temperature 0": "argument --temperature: got '0'; allowed is a number >= 0.01",
    "--device tpu": "argument --device: got 'tpu'; allowed are auto, cpu, cuda",
    "--generate x": "--generate and --checkpoint go together",
    "--checkpoint x": "--generate and --checkpoint go together",
    "--generate x --checkpoint y --resume z": "--resume trains and --generate does not: give one of them",
    "--resume /no/such/file": "checkpoint /no/such/file: there is no such file",
    "--generate x --checkpoint /no/such/file": "checkpoint /no/such/file: there is no such file",
    "--out /dev/null": "argument --out: /dev/null cannot be a folder",
    "--layer mamba": "argument --layer: got 'mamba'; allowed are gdn, deltanet",
    "--stack gdn:3,mamba": "argument --stack: layers: got 'mamba' in 'gdn:3,mamba'; allowed names: gdn, deltanet",
    "--stack gdn:0": "argument --stack: layers: got '0' after 'gdn' in 'gdn:0'; allowed: a whole number",
    "--layer gdn --stack gdn:2": "--layer replaces the memory layers of the model, --stack names all layers: give one",
    "--layer gdn --resume x": "--layer is for a new model; a checkpoint has its layers",
    "--stack gdn --generate x --checkpoint y": "--stack is for a new model; a checkpoint has its layers",
    "--memory --layer rat": "--memory has a model and a report of its own: it does not go with --layer",
    "--memory --stack gdn": "--memory has a model and a report of its own: it does not go with --stack",
    "--memory --generate x --checkpoint y": "--memory has a model and a report of its own: it does not go with --gen",
    "--fast": "unrecognized arguments: --fast",
}


@pytest.mark.parametrize("arguments", BAD_ARGUMENTS)
def test_bad_arguments_give_one_clear_error(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert demo.main(arguments.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"memattn demo: error: {BAD_ARGUMENTS[arguments]}") and err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_without_a_device_is_refused(capsys):
    assert demo.main(["--device", "cuda"]) == 2
    assert "torch sees no CUDA device here; allowed are auto, cpu" in capsys.readouterr().err


def test_missing_packages_are_named_with_the_fix(capsys, monkeypatch):
    monkeypatch.setattr(demo, "find_spec", lambda name: None if name != "safetensors" else object())
    assert demo.main([]) == 1
    assert capsys.readouterr().err == (
        "memattn demo: error: matplotlib, tqdm not installed; fix: pip install 'memattn[demo]'\n"
    )
