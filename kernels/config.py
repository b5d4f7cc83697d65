"""Pinned kernel configurations: one JSON file per architecture in _tuned/, read once, never searched for at run time.

A file maps kernel -> operand bits ("16", or "32" for float32 and float64) -> entries in order of head dim. The first
entry with max(K, V) <= "dim" applies. BLOCK_K and BLOCK_V are upper bounds: never wider than the padded head dim.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton import knobs

TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


@functools.cache
def _architecture(device: int) -> str:
    """Which file serves a device: sm90 for 9.x, sm100 for 10.x, sm80 for the rest.

    12.x, like 8.6 and 8.9, has 99 KiB of shared memory a block, which is what the sm80 file keeps to.
    """
    return {9: "sm90", 10: "sm100"}.get(triton.runtime.driver.active.get_current_target().arch // 10, "sm80")


def architecture() -> str:
    """Name of the file for the current device; the interpreter takes sm90's."""
    return "sm90" if knobs.runtime.interpret else _architecture(triton.runtime.driver.active.get_current_device())


@functools.cache
def _file(name: str) -> dict:
    return json.loads((Path(__file__).parent / "_tuned" / f"{name}.json").read_text())


@functools.cache
def _entry(name: str, kernel: str, bits: int, K: int, V: int) -> dict:
    entry = next(e for e in _file(name)[kernel][str(bits)] if max(K, V) <= e["dim"])
    launch = {key: value for key, value in entry.items() if key != "dim"}
    for block, dim in (("BLOCK_K", K), ("BLOCK_V", V)):
        if block in launch:
            launch[block] = min(launch[block], triton.next_power_of_2(dim))
    return {**launch, "enable_fp_fusion": True}


def pinned(kernel: str, bits: int, K: int, V: int) -> dict:
    """Blocks, num_warps, num_stages and enable_fp_fusion of one kernel on the current device."""
    return _entry(architecture(), kernel, bits, K, V)


def precision() -> str:
    """How float32 products are computed: as torch's own matmul is allowed to."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
