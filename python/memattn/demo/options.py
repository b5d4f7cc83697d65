"""What can be asked of the demo: its arguments, and the sizes of a full and of a smoke run."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import torch

from memattn.demo.compare import ComparisonConfig
from memattn.demo.mixers import GROWING, MEMORIES, MEMORIZING, STACKED
from memattn.demo.model import ModelConfig
from memattn.demo.precision import faster_dtype
from memattn.demo.train import TrainingConfig
from memattn.nn.hybrid_stack import parse_spec


@dataclass(frozen=True)
class Plan:
    """All sizes of a run. `rows` texts of `row_bytes` give bits per byte by position.

    The stream has `stream_bytes`, or `growing_stream_bytes` where a layer's memory grows with the text.
    With memory_sizes the run is that of `--memory`: up to `documents` held-out files are read to `document_bytes` with
    each size, and their last `scored_bytes` are scored.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    comparison: ComparisonConfig = field(default_factory=ComparisonConfig)
    text_limit: int | None = None
    rows: int = 32
    row_bytes: int = 16384
    wipe_every: int = 1024
    batch_bytes: int = 16384
    stream_bytes: int = 1 << 20
    growing_stream_bytes: int = 1 << 18
    stream_chunk: int = 4096
    prompt: bytes = b"def read_records(path):\n    "
    sample_bytes: int = 600
    memory_sizes: tuple[int, ...] = ()
    documents: int = 8
    document_bytes: int = 0
    scored_bytes: int = 0

    def stream_length(self, layers: Sequence[str]) -> int:
        """Bytes of the stream for a model of these layers."""
        return min(self.stream_bytes, self.growing_stream_bytes) if {*GROWING} & {*layers} else self.stream_bytes


SMOKE = Plan(
    model=ModelConfig(embed_dim=32, num_heads=2, window=16, hidden_dim=64, layers=("gdn", "local")),
    training=TrainingConfig(seconds=1.0, rows=4, length=64),
    comparison=ComparisonConfig(contexts=(256, 512), chunk=128, decode_steps=4, softmax_seconds=1.0),
    text_limit=1 << 18,
    rows=4,
    row_bytes=256,
    wipe_every=64,
    batch_bytes=1024,
    stream_bytes=1 << 12,
    stream_chunk=256,
    sample_bytes=32,
)
# The document is longer than the largest memory, the two segments beside it, and what is scored.
MEMORY = Plan(
    model=ModelConfig(layers=("local", MEMORIZING, "local")),
    training=TrainingConfig(stay=16),
    memory_sizes=(0, 512, 2048, 8192, 32768),
    document_bytes=32768 + 2 * 128 + 4096,
    scored_bytes=4096,
    stream_chunk=2048,
)
MEMORY_SMOKE = replace(
    SMOKE,
    model=replace(SMOKE.model, layers=("local", MEMORIZING)),
    memory_sizes=(0, 64, 256),
    documents=4,
    document_bytes=256 + 2 * 16 + 64,
    scored_bytes=64,
)

DESCRIPTION = (
    "Train a small byte-level model on the source of the Python standard library, read a long held-out text with "
    "constant memory, and compare speed and memory with softmax attention."
)


class UsageError(Exception):
    """A wrong argument; the message is all the user needs."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def _number(kind: type, text: str, least: float) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not least <= value < float("inf"):
        raise argparse.ArgumentTypeError(
            f"got {text!r}; allowed is {'a' if kind is float else 'a whole'} number >= {least}"
        )
    return value


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="memattn demo", description=DESCRIPTION)
    add = parser.add_argument
    add("--smoke", action="store_true", help="the same run at tiny sizes, under ten seconds")
    add("--layer", metavar="NAME", help=f"the memory layer of the model: {', '.join(MEMORIES)} (default gdn)")
    add("--stack", metavar="SPEC", help="all layers from input to output, e.g. gdn:3,local:1")
    add("--memory", action="store_true", help="a model with a memorizing layer, read with memories of 0 to 32K tokens")
    add("--out", type=Path, default=Path("demo_out"), metavar="DIR", help="folder for report and checkpoint")
    add("--seconds", type=lambda s: _number(float, s, 0.1), help="training time (default 90, smoke 1)")
    add("--device", default="auto", help="auto, cpu or cuda (default auto)")
    add("--dtype", default="auto", help="auto (the faster here), float32 or bfloat16")
    add("--seed", type=lambda s: _number(int, s, 0), default=0)
    add("--resume", type=Path, metavar="CKPT", help="go on with a run that was stopped")
    add("--generate", metavar="PROMPT", help="only write on from this text, with --checkpoint")
    add("--checkpoint", type=Path, metavar="CKPT", help="what --generate writes with")
    add("--count", type=lambda s: _number(int, s, 1), default=600, help="bytes to generate (default 600)")
    add("--temperature", type=lambda s: _number(float, s, 0.01), default=0.7, help="of generation (default 0.7)")
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The checked arguments, `device` and `dtype` resolved; raises UsageError."""
    options = _parser().parse_args(argv)
    _check(options)
    return options


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UsageError(f"argument --{name}: got {value!r}; allowed are {', '.join(allowed)}")


def plan(options: argparse.Namespace) -> Plan:
    """The sizes of the run that was asked for."""
    if options.memory:
        return MEMORY_SMOKE if options.smoke else MEMORY
    return SMOKE if options.smoke else Plan()


def _check_layers(options: argparse.Namespace) -> None:
    chosen = [f"--{name}" for name in ("layer", "stack") if getattr(options, name) is not None]
    if options.memory and (chosen or options.generate is not None):
        other = chosen[0] if chosen else "--generate"
        raise UsageError(f"--memory has a model and a report of its own: it does not go with {other}")
    if len(chosen) == 2:
        raise UsageError("--layer replaces the memory layers of the model, --stack names all layers: give one of them")
    if chosen and (options.resume is not None or options.generate is not None):
        raise UsageError(f"{chosen[0]} is for a new model; a checkpoint has its layers")
    if options.layer is not None:
        _one_of("layer", options.layer, MEMORIES)
    if options.stack is not None:
        try:
            parse_spec(options.stack, STACKED)
        except ValueError as error:
            raise UsageError(f"argument --stack: {error}") from error


def model_config(options: argparse.Namespace, config: ModelConfig) -> ModelConfig:
    """The plan's model with the layers that were asked for."""
    if options.stack is not None:
        return replace(config, layers=tuple(parse_spec(options.stack, STACKED)))
    return config if options.layer is None else config.with_memory(options.layer)


def _dtype(options: argparse.Namespace) -> torch.dtype:
    if options.dtype == "auto":
        return faster_dtype(torch.device(options.device))
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[options.dtype]


def _check(options: argparse.Namespace) -> None:
    if (options.generate is None) != (options.checkpoint is None):
        raise UsageError("--generate and --checkpoint go together: one says what to write on from, the other with what")
    if options.generate is not None and options.resume is not None:
        raise UsageError("--resume trains and --generate does not: give one of them")
    _check_layers(options)
    _one_of("device", options.device, ("auto", "cpu", "cuda"))
    _one_of("dtype", options.dtype, ("auto", "float32", "bfloat16"))
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("argument --device: got 'cuda', but torch sees no CUDA device here; allowed are auto, cpu")
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    options.dtype = _dtype(options)
    if options.generate is None:
        try:
            options.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"argument --out: {options.out} cannot be a folder ({error.strerror})") from error
        if not os.access(options.out, os.W_OK):
            raise UsageError(f"argument --out: {options.out} is not writable")
