"""The demo from start to end: train, measure, write, compare; stop at any point and keep what there is."""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from memattn import backends
from memattn.demo import compare as comparing
from memattn.demo import data, documents, report, stream, train
from memattn.demo import options as asked
from memattn.demo.checkpoint import Checkpoint, Progress, load_checkpoint, save_checkpoint
from memattn.demo.figure import short
from memattn.demo.interrupt import Stopped, StopRequest
from memattn.demo.model import ByteModel
from memattn.demo.options import UsageError, model_config, parse
from memattn.demo.results import Results, describe_machine

CHECKPOINT = "checkpoint.safetensors"


def main(argv: Sequence[str]) -> int:
    try:
        options = parse(argv)
        return _Run(options).run() if options.generate is None else _generate(options)
    except (UsageError, ValueError) as error:
        print(f"memattn demo: error: {error}", file=sys.stderr)
        return 2


def _generate(options: argparse.Namespace) -> int:
    model = load_checkpoint(options.checkpoint).build_model().to(options.device, options.dtype)
    prompt = options.generate.encode()
    sys.stdout.buffer.write(prompt)
    try:
        for byte in stream.generate(model, prompt, options.count, temperature=options.temperature, seed=options.seed):
            sys.stdout.buffer.write(bytes((byte,)))
            sys.stdout.buffer.flush()
    except KeyboardInterrupt:
        return 130
    finally:
        sys.stdout.buffer.write(b"\n")
        sys.stdout.buffer.flush()
    return 0


def _bar(name: str, total: float, layout: str, **more: Any) -> tqdm:
    """A progress bar; where nobody watches, a line every 15 seconds."""
    watched = sys.stderr.isatty()
    layout = f"{name:<10} {{percentage:3.0f}}% {'|{bar:28}| ' if watched else ''}{layout}"
    return tqdm(total=total, bar_format=layout, mininterval=0.2 if watched else 15, **more)


class _Run:
    """One run. Each phase fills its part of `results`."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, torch.device(options.device)
        plan = asked.plan(options)
        seconds = plan.training.seconds if options.seconds is None else options.seconds
        model = model_config(options, plan.model)
        self.plan = replace(plan, model=model, training=replace(plan.training, seconds=seconds))
        torch.manual_seed(options.seed)
        before = load_checkpoint(options.resume) if options.resume else None
        self.text = data.load_corpus(
            held_out_bytes=max(plan.stream_bytes, plan.rows * plan.row_bytes), limit=plan.text_limit
        )
        self.model = (before.build_model() if before else ByteModel(self.plan.model)).to(self.device)
        self.results = Results(describe_machine(self.device))
        self.trainer = self._trainer(before)

    def _trainer(self, before: Checkpoint | None) -> train.Trainer:
        training = self.plan.training
        rows = data.TrainingRows(self.text.train, training.rows, training.length, training.stay)
        trainer = train.Trainer(
            self.model, rows, training, before.progress if before else Progress(), self.options.dtype
        )
        if before is not None:
            train.restore_optimizers(trainer.optimizers, before.optimizer)
            if before.corpus != self.text.digest:
                print("The checkpoint was trained on another standard library: held-out text may not be new to it.")
        return trainer

    def _phases(self) -> list[tuple[str, Callable[[StopRequest], None]]]:
        if self.plan.memory_sizes:
            return [("training", self._train), ("reading documents", self._documents)]
        return [
            ("training", self._train),
            ("measuring compressors", self._baselines),
            ("reading texts", self._rows),
            ("reading the stream", self._stream),
            ("writing", self._write),
            ("comparing with softmax attention", self._compare),
        ]

    def run(self) -> int:
        start, code = time.perf_counter(), 0
        self._describe()
        with StopRequest() as stop:
            try:
                for name, phase in self._phases():
                    self.results.stopped = name
                    phase(stop)
                    stop.check()
                self.results.stopped = None
            except Stopped as stopped:
                code = stopped.code
            finally:
                self.results.seconds = time.perf_counter() - start
                self._save()
                report.write_report(self.results, self.options.out)
        self._tell()
        return code

    def _describe(self) -> None:
        text, model = self.text, self.model
        self.results.corpus = {
            "train_files": len(text.train_files),
            "train_bytes": len(text.train),
            "held_out_files": len(text.held_out_files),
            "held_out_bytes": len(text.held_out),
            "sha256": text.digest,
        }
        self.results.model = {
            **model.config.to_dict(),
            "parameters": model.parameter_count(),
            "dtype": str(self.options.dtype).removeprefix("torch."),
            "backend": self._delta_rule_backend(),
        }
        self.results.training = self.trainer.progress

    def _delta_rule_backend(self) -> str | None:
        """Which backend serves the model's gated delta rule, if it has one."""
        if not {"gdn", "deltanet"} & set(self.model.config.layers):
            return None
        request = backends.Request(self.device.type, self.options.dtype, features=frozenset({"backward"}))
        return backends.choose("gated_delta_rule", request)

    def _save(self) -> None:
        optimizer = train.optimizer_tensors(self.trainer.optimizers)
        path = self.options.out / CHECKPOINT
        save_checkpoint(path, self.model, optimizer, self.trainer.progress, self.text.digest)

    def _train(self, stop: StopRequest) -> None:
        self._save()
        progress, total = self.trainer.progress, self.plan.training.seconds
        with _bar("training", total, "{n:.0f} of {total:.0f} s{postfix}", postfix="") as bar:
            recent: deque[float] = deque(maxlen=20)

            def on_step(bits: float) -> None:
                recent.append(bits)
                bar.set_postfix_str(f"{sum(recent) / len(recent):.3f} bits/byte  step {progress.step:,}", refresh=False)
                bar.update(min(progress.seconds, total) - bar.n)

            self.trainer.run(stop, on_step, self._save)
        self._save()

    def _reader(self) -> ByteModel:
        """The trained model as it is used: all of it in the faster dtype."""
        return copy.deepcopy(self.model).to(self.options.dtype)

    def _baselines(self, stop: StopRequest) -> None:
        held_out = self._stream_text()
        bits = {"order-2 counts": data.order2_bits_per_byte(self.text.train, held_out)}
        self.results.baselines = bits | data.compressor_bits_per_byte(held_out)

    def _rows(self, stop: StopRequest) -> None:
        plan, held_out = self.plan, self.text.held_out
        apart = len(held_out) // plan.rows
        texts = held_out[: apart * plan.rows].view(plan.rows, apart)[:, : plan.row_bytes]
        self.results.rows = self._read("texts", texts, plan.batch_bytes // plan.rows, stop)
        # The same bytes with less memory: every text in pieces that each start from an empty state.
        pieces = texts.reshape(-1, plan.wipe_every)
        self.results.wiped_every = plan.wipe_every
        self.results.wiped = stream.mean_bits(self._reader(), pieces, plan.batch_bytes // plan.wipe_every, stop)

    def _documents(self, stop: StopRequest) -> None:
        plan = self.plan
        texts = documents.long_documents(self.text.held_out, plan.document_bytes, plan.documents)
        total = texts.numel() * len(plan.memory_sizes)
        with _bar("documents", total, "{n_fmt} of {total_fmt} bytes{postfix}", unit_scale=True, postfix="") as bar:

            def on_chunk(size: int, count: int) -> None:
                bar.set_postfix_str(f"memory {short(size)}", refresh=False)
                bar.update(count)

            points = documents.by_memory_size(
                self._reader(), texts, plan.memory_sizes, plan.scored_bytes, plan.stream_chunk, stop, on_chunk
            )
            for point in points:
                self.results.memory_sizes.append(point)

    def _stream(self, stop: StopRequest) -> None:
        text = self._stream_text()[None]
        self.results.stream = self._read("stream", text, self.plan.stream_chunk, stop)

    def _stream_text(self) -> Tensor:
        return self.text.held_out[: self.plan.stream_length(self.model.config.layers)]

    def _read(self, name: str, text: Tensor, chunk: int, stop: StopRequest) -> stream.Reading:
        layout = "{n_fmt} of {total_fmt} bytes  {rate_fmt}{postfix}"
        with _bar(name, text.numel(), layout, unit="", unit_scale=True, postfix="") as bar:

            def on_chunk(count: int, bits: float) -> None:
                bar.set_postfix_str(f"{bits:.3f} bits/byte", refresh=False)
                bar.update(count)

            return stream.read(self._reader(), text, chunk, stop, on_chunk)

    def _write(self, stop: StopRequest) -> None:
        plan, written = self.plan, bytearray(self.plan.prompt)
        for byte in stream.generate(
            self._reader(), plan.prompt, plan.sample_bytes, temperature=0.7, seed=self.options.seed
        ):
            written.append(byte)
            self.results.sample = written.decode(errors="replace")
            stop.check()

    def _compare(self, stop: StopRequest) -> None:
        config = self.plan.comparison
        softmax = ByteModel(self.model.config.with_softmax()).to(self.device, self.options.dtype)
        with _bar("comparing", 2 * len(config.contexts), "{n_fmt} of {total_fmt}{postfix}", postfix="") as bar:

            def on_point(so_far: comparing.Comparison) -> None:
                self.results.comparison = so_far
                bar.set_postfix_str(f"context {so_far.memory[-1].context:,}", refresh=False)
                bar.update()

            comparing.compare(self._reader(), softmax, self.text.held_out, config, stop, on_point)

    def _tell(self) -> None:
        results, out = self.results, self.options.out
        print(report.text(results))
        if results.sample is not None:
            print(f"\nWhat it writes\n{results.sample}")
        print(f"\nReport: {out / report.FILES[0]}, {out / report.FILES[1]}. Checkpoint: {out / CHECKPOINT}")
        if results.stopped:
            again = "--memory --resume" if self.options.memory else "--resume"
            print(f"Stopped while {results.stopped}. Go on: python -m memattn demo {again} {out / CHECKPOINT}")
