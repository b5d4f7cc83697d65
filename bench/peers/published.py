"""Figures that others have published for shapes of ours, on their machines and with their methods: not measured here.

The README of FlashQLA gives milliseconds of the forward on an H200 under CUDA graphs for FlashQLA, FlashInfer
0.6.13 and fla 0.5.1, bfloat16, D 128; several sequences are packed.
"""

from __future__ import annotations

SOURCE = (
    "From the README of FlashQLA (github.com/QwenLM/FlashQLA): H200, CUDA graphs, bfloat16; FlashInfer 0.6.13, "
    "fla 0.5.1. Another GPU or method makes these a scale, not a comparison."
)
WHO = ("FlashQLA", "FlashInfer", "fla")
FORWARD_H200 = {
    "B1 T2048 H2/8 D128": (0.061, 0.109, 0.081),
    "B1 T8192 H2/8 D128": (0.119, 0.417, 0.234),
    "B1 T32768 H2/8 D128": (0.320, 1.655, 0.902),
    "8xT1024 H2/8 D128": (0.061, 0.058, 0.131),
    "B1 T2048 H16/32 D128": (0.109, 0.106, 0.132),
    "B1 T8192 H16/32 D128": (0.280, 0.394, 0.472),
    "B1 T32768 H16/32 D128": (0.877, 1.550, 1.890),
    "8xT1024 H16/32 D128": (0.178, 0.119, 0.501),
    "4xT8192 H16/32 D128": (0.611, 0.425, 1.898),
    "B1 T8192 H16/64 D128": (0.397, 0.392, 0.814),
    "B1 T32768 H16/64 D128": (1.521, 1.552, 3.331),
    "4xT8192 H16/64 D128": (1.214, 0.827, 3.362),
}
PUBLISHED = {
    f"gated_delta_rule fwd {shape}": dict(zip((f"{who}, H200" for who in WHO), ms, strict=True))
    for shape, ms in FORWARD_H200.items()
}
