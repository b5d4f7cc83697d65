"""Real text that every machine has: the source files of the Python standard library, as bytes.

A file's SHA-256 decides everything: its order, and whether it is trained on or held out. Equal files therefore land on
the same side, the split needs no seed, and it is the same on every machine that has the same Python version.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

FILE_END = b"\0"
HELD_OUT_ONE_IN = 8
_NOT_THE_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "lib-dynload"}


@dataclass(frozen=True)
class Corpus:
    """Train and held-out text as uint8 tensors `[bytes]`; files end in a zero byte."""

    train: Tensor
    held_out: Tensor
    train_files: tuple[str, ...]
    held_out_files: tuple[str, ...]
    digest: str


def library_folder() -> Path:
    """Where this Python keeps the source of its standard library."""
    return Path(os.__file__).resolve().parent


def source_files(folder: Path) -> list[Path]:
    """Every .py file below `folder`, sorted, without installed packages."""
    found = []
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(set(folders) - _NOT_THE_LIBRARY)
        found += [Path(root, name) for name in names if name.endswith(".py")]
    return sorted(found)


def load_corpus(folder: Path | None = None, *, held_out_bytes: int, limit: int | None = None) -> Corpus:
    """Read and split the library; at least `held_out_bytes` must be held out. `limit` cuts both sides."""
    folder = library_folder() if folder is None else folder
    by_digest: dict[str, tuple[str, bytes]] = {}
    for path in source_files(folder):
        content = path.read_bytes()
        if content:
            by_digest.setdefault(hashlib.sha256(content).hexdigest(), (str(path.relative_to(folder)), content))
    train: list[tuple[str, bytes]] = []
    held_out: list[tuple[str, bytes]] = []
    for digest in sorted(by_digest):
        side = held_out if _is_held_out(digest) else train
        side.append(by_digest[digest])
    corpus = Corpus(
        train=_text(train, limit),
        held_out=_text(held_out, limit),
        train_files=tuple(name for name, _ in train),
        held_out_files=tuple(name for name, _ in held_out),
        digest=hashlib.sha256("".join(sorted(by_digest)).encode()).hexdigest(),
    )
    _check_size(corpus, folder, held_out_bytes)
    return corpus


def _is_held_out(digest: str) -> bool:
    # The last digit, because the first ones give the order.
    return int(digest[-1], 16) % HELD_OUT_ONE_IN == 0


def _text(files: list[tuple[str, bytes]], limit: int | None) -> Tensor:
    joined = bytearray().join(content + FILE_END for _, content in files)[:limit]
    return torch.frombuffer(joined, dtype=torch.uint8) if joined else torch.empty(0, dtype=torch.uint8)


def _check_size(corpus: Corpus, folder: Path, held_out_bytes: int) -> None:
    if len(corpus.held_out) < held_out_bytes or len(corpus.train) < held_out_bytes:
        raise ValueError(
            f"the Python standard library at {folder} has {len(corpus.train):,} bytes of .py files to train on and "
            f"{len(corpus.held_out):,} held out; the demo needs at least {held_out_bytes:,} of each. Use a Python "
            "that was installed with its source files"
        )


class TrainingRows:
    """`rows` readers of a text: each reads `stay` batches on from a random place, state carried, then all jump.

    Readers that never jump would let the weights adapt to the few files they are in.
    """

    def __init__(self, text: Tensor, rows: int, length: int, stay: int) -> None:
        self.text, self.rows, self.length, self.stay = text, rows, length, stay
        self._places = len(text) - stay * length
        if self._places <= 0:
            raise ValueError(f"text has {len(text):,} bytes; stay={stay} batches of length={length} need more")

    def starts_afresh(self, index: int) -> bool:
        """Whether batch number `index` is the first one after a jump."""
        return index % self.stay == 0

    def batch(self, index: int) -> Tensor:
        """Batch number `index`: bytes `[rows, length + 1]`; until a jump, its last byte is the first of the next."""
        visit, step = divmod(index, self.stay)
        starts = torch.randint(self._places, (self.rows, 1), generator=torch.Generator().manual_seed(visit))
        return self.text[starts + step * self.length + torch.arange(self.length + 1)].long()


def compressor_bits_per_byte(text: Tensor) -> dict[str, float]:
    """What general compressors need for `text` alone."""
    raw = text.numpy().tobytes()
    sizes = {"gzip": len(zlib.compress(raw, 9)), "lzma": len(lzma.compress(raw, preset=6))}
    return {name: 8 * size / len(raw) for name, size in sizes.items()}


def order2_bits_per_byte(train: Tensor, held_out: Tensor, pseudo_count: float = 4.0) -> float:
    """A count model of the two bytes before, over all of `train`, falling back to one byte, none, uniform."""
    probability = torch.full((1, 256), 1 / 256)
    for order in range(3):
        counts = _ngram_counts(train, order + 1).view(-1, 256).float()
        # A context's oldest byte is its leading digit, so the shorter contexts repeat 256 times.
        shorter = probability.repeat(256, 1) if order else probability
        probability = (counts + pseudo_count * shorter) / (counts.sum(-1, keepdim=True) + pseudo_count)
    text = held_out.long()
    context = text[:-2] * 256 + text[1:-1]
    return float(-probability.view(-1)[context * 256 + text[2:]].log2().mean())


def _ngram_counts(text: Tensor, order: int, piece: int = 1 << 22) -> Tensor:
    counts = torch.zeros(256**order, dtype=torch.int64)
    for start in range(0, len(text) - order + 1, piece):
        part = text[start : start + piece + order - 1].long()
        index = torch.zeros(len(part) - order + 1, dtype=torch.int64)
        for offset in range(order):
            index = index * 256 + part[offset : offset + len(index)]
        counts += torch.bincount(index, minlength=len(counts))
    return counts
