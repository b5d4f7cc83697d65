"""The attention kernels' plans of tiles, run alone, and the kernels with planted bugs."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import triton
import triton.language as tl

import memattn.kernels
from memattn.kernels.attention_mask import key_tiles, row_tiles
from memattn.ops._masks import settings
from support import relations


@triton.jit
def _store(out, a, b, c, d, e):
    tl.store(out, a)
    tl.store(out + 1, b)
    tl.store(out + 2, c)
    tl.store(out + 3, d)
    tl.store(out + 4, e)


@triton.jit
def _plan(
    out, rows, length, causal, window, prefix_len, block_size, summary, dilation, dilated_window, dilated_prefix,
    q_offset, steps, BLOCK: tl.constexpr, DILATED: tl.constexpr,
):  # fmt: skip
    """Program p: the keys that rows pB…pB+B−1 see, and the rows that see keys pB…pB+B−1."""
    mask = (causal, window, prefix_len, block_size, summary, dilation, dilated_window, dilated_prefix)
    p = tl.program_id(0)
    first = tl.minimum(p * BLOCK, rows - 1)
    last = tl.minimum(first + BLOCK, rows) - 1
    a, b, c, d, e = key_tiles(first + q_offset, last + q_offset, length + p * 0, mask, BLOCK, DILATED)
    _store(out + p * 10, a, b, c, d, e)
    b, c, d, e = row_tiles(p * BLOCK, rows + p * 0, length + p * 0, q_offset, steps, mask, BLOCK, BLOCK, DILATED)
    _store(out + p * 10 + 5, b, c, d, e, e)


def plans(mask, rows: int, keys: int, block: int, device: str) -> tuple[list, list]:
    """(a, b, c, d, e) per tile of rows, (b, c, d, e) per tile of keys; see kernels/attention_mask.py."""
    count = triton.cdiv(max(rows, keys), block)
    out = torch.zeros(count, 10, dtype=torch.int32, device=device)
    numbers = settings(mask)
    _plan[(count,)](out, rows, keys, *numbers, rows.bit_length(), BLOCK=block, DILATED=numbers[5] > 1)
    table = out.tolist()
    by_keys = [tuple(x[:5]) for x in table[: triton.cdiv(rows, block)]]
    return by_keys, [tuple(x[5:9]) for x in table[: triton.cdiv(keys, block)]]


def planted(bug: str, name: str, old: str, new: str, folder: Path) -> tuple[Callable, Callable]:
    """forward and backward of a copy of the kernels in which `new` stands for `old`."""
    source = Path(next(iter(memattn.kernels.__path__)))
    texts = {
        n: (source / f"{n}.py").read_text() for n in ("tiles", "attention_mask", "attention", "attention_backward")
    }
    relations.with_bug(bug, old, new, texts[name])
    texts[name] = texts[name].replace(old, new)
    for n, text in texts.items():
        for other in texts:
            text = text.replace(f"from memattn.kernels.{other} import", f"from planted_{other} import")
        path = folder / f"planted_{n}.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        sys.modules[path.stem] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules["planted_attention"].forward, sys.modules["planted_attention_backward"].backward
