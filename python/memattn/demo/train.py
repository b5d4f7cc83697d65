"""Training against the clock: the schedule follows the seconds spent, so it is complete on any machine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from memattn.demo.checkpoint import Progress
from memattn.demo.data import TrainingRows
from memattn.demo.interrupt import StopRequest
from memattn.demo.model import ByteModel, detached

_RECORD_EVERY = 0.5  # seconds between points of the saved curve


@dataclass(frozen=True)
class TrainingConfig:
    seconds: float = 90.0
    rows: int = 8
    length: int = 256
    stay: int = 8  # batches that one text is read for
    matrix_rate: float = 0.02  # Muon
    other_rate: float = 0.01  # AdamW
    final_fraction: float = 0.05
    warmup: float = 0.03  # fraction of `seconds`
    weight_decay: float = 0.1
    clip: float = 1.0
    save_every: float = 15.0  # seconds


def rate_fraction(config: TrainingConfig, seconds: float) -> float:
    """Of the learning rates: a linear warm-up, then a cosine down to `final_fraction`, over the time."""
    done = min(1.0, seconds / config.seconds)
    if done < config.warmup:
        return done / config.warmup
    cosine = 0.5 * (1 + math.cos(math.pi * (done - config.warmup) / (1 - config.warmup)))
    return config.final_fraction + (1 - config.final_fraction) * cosine


def make_optimizers(model: ByteModel, config: TrainingConfig) -> dict[str, torch.optim.Optimizer]:
    """Muon for the projections inside the blocks, AdamW for what is no such matrix.

    Muon (Jordan et al. 2024) takes about half of AdamW's steps to the same bits per byte here, which is what counts in
    90 seconds.
    """
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2 and min(p.shape) >= 16]
    chosen = set(map(id, matrices))
    others = [p for p in model.parameters() if id(p) not in chosen]
    muon = torch.optim.Muon(
        matrices, lr=config.matrix_rate, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    return {"muon": muon, "adamw": torch.optim.AdamW(others, lr=config.other_rate, betas=(0.9, 0.95), weight_decay=0.0)}


def optimizer_tensors(optimizers: dict[str, torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Their state as named tensors."""
    return {
        f"{kind}.{index}.{name}": value
        for kind, optimizer in optimizers.items()
        for index, entry in optimizer.state_dict()["state"].items()
        for name, value in entry.items()
    }


def restore_optimizers(optimizers: dict[str, torch.optim.Optimizer], tensors: dict[str, Tensor]) -> None:
    for kind, optimizer in optimizers.items():
        whole = optimizer.state_dict()
        for key, value in tensors.items():
            owner, index, name = key.split(".")
            if owner == kind:
                whole["state"].setdefault(int(index), {})[name] = value
        optimizer.load_state_dict(whole)


class Trainer:
    """One model, its optimizers and how far they are. State is carried from batch to batch (truncated backpropagation).

    With `dtype` bfloat16 the products run in it (autocast); weights, optimizer, gates and state stay float32.
    """

    def __init__(
        self,
        model: ByteModel,
        rows: TrainingRows,
        config: TrainingConfig,
        progress: Progress,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.model, self.rows, self.config, self.progress = model, rows, config, progress
        device = next(model.parameters()).device
        self.autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
        self.optimizers = make_optimizers(model, config)
        self._rates = {kind: optimizer.defaults["lr"] for kind, optimizer in self.optimizers.items()}

    def run(self, stop: StopRequest, on_step: Callable[[float], None], save: Callable[[], None]) -> None:
        """Train for the seconds that are left. `on_step(bits per byte)` after each step; `save()` now and then."""
        device = next(self.model.parameters()).device
        state = self.model.init_state(self.rows.rows)
        before, start = self.progress.seconds, time.perf_counter()
        saved = recorded = 0.0
        recent: list[float] = []
        while (elapsed := time.perf_counter() - start) + before < self.config.seconds:
            self.progress.seconds = before + elapsed
            if self.rows.starts_afresh(self.progress.step):
                state = self.model.init_state(self.rows.rows)
            batch = self.rows.batch(self.progress.step).to(device)
            bits, state = self._step(batch, state)
            self.progress.step += 1
            recent.append(bits)
            if elapsed - recorded >= _RECORD_EVERY:
                self._record(recent)
                recorded, recent = elapsed, []
            on_step(bits)
            stop.check()
            if elapsed - saved >= self.config.save_every:
                saved = elapsed
                save()
        self.progress.seconds = before + time.perf_counter() - start
        self._record(recent)

    def _step(self, batch: Tensor, state: list[Any]) -> tuple[float, list[Any]]:
        with self.autocast:
            logits, state = self.model(batch[:, :-1], state)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        fraction = rate_fraction(self.config, self.progress.seconds)
        for kind, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = self._rates[kind] * fraction
            optimizer.step()
        return loss.item() / math.log(2), detached(state)

    def _record(self, recent: list[float]) -> None:
        if recent:
            self.progress.curve_seconds.append(round(self.progress.seconds, 2))
            self.progress.curve_bytes.append(self.progress.step * self.rows.rows * self.rows.length)
            self.progress.curve_bits.append(sum(recent) / len(recent))
