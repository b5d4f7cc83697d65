"""One safetensors file holds the weights, the optimizer, the configuration and the training curve."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from memattn.demo.model import ByteModel, ModelConfig

_FORMAT = "memattn-demo-2"


@dataclass
class Progress:
    """How far training is, and the curve so far: one entry per recorded step."""

    step: int = 0
    seconds: float = 0.0
    curve_seconds: list[float] = field(default_factory=list)
    curve_bytes: list[int] = field(default_factory=list)
    curve_bits: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Checkpoint:
    config: ModelConfig
    progress: Progress
    corpus: str
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]

    def build_model(self) -> ByteModel:
        model = ByteModel(self.config)
        model.load_state_dict(self.weights)
        return model


def write_atomically(path: Path, content: bytes) -> None:
    """Either the old file or the whole new one is there, whatever happens in between."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def save_checkpoint(
    path: Path, model: ByteModel, optimizer: dict[str, Tensor], progress: Progress, corpus: str
) -> None:
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"optimizer.{name}": value for name, value in optimizer.items()}
    metadata = {
        "format": _FORMAT,
        "config": json.dumps(model.config.to_dict()),
        "progress": json.dumps(asdict(progress)),
        "corpus": corpus,
    }
    write_atomically(path, save({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, metadata))


def load_checkpoint(path: Path) -> Checkpoint:
    """Raises ValueError with one clear reason when `path` is not a checkpoint of the demo."""
    if not path.is_file():
        raise ValueError(f"checkpoint {path}: there is no such file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, Any] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"checkpoint {path}: not a readable safetensors file ({error})") from error
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"checkpoint {path}: format {metadata.get('format')!r}; allowed is {_FORMAT!r}")
    return Checkpoint(
        config=ModelConfig.from_dict(json.loads(metadata["config"])),
        progress=Progress(**json.loads(metadata["progress"])),
        corpus=metadata["corpus"],
        weights=_below("model.", tensors),
        optimizer=_below("optimizer.", tensors),
    )


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
