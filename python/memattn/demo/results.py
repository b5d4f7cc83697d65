"""Everything one run found out, filled phase by phase, so that a report can be made at any moment."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

import memattn
from memattn.demo.checkpoint import Progress
from memattn.demo.compare import Comparison
from memattn.demo.documents import SizePoint
from memattn.demo.stream import Reading


@dataclass
class Results:
    """`stopped` names the phase in which the run ended; None means it is complete."""

    machine: dict[str, Any]
    corpus: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    baselines: dict[str, float] = field(default_factory=dict)
    training: Progress = field(default_factory=Progress)
    rows: Reading | None = None
    wiped: float | None = None
    wiped_every: int = 0
    stream: Reading | None = None
    sample: str | None = None
    comparison: Comparison = field(default_factory=Comparison)
    memory_sizes: list[SizePoint] = field(default_factory=list)
    seconds: float = 0.0
    stopped: str | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)


def describe_machine(device: torch.device) -> dict[str, Any]:
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": where,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "memattn": memattn.__version__,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
