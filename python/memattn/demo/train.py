"""Training against the clock: the schedule follows the seconds spent, so it is complete on any machine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

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
    length: int = 512
    learning_rate: float = 4e-3
    final_fraction: float = 0.05
    warmup: float = 0.03  # fraction of `seconds`
    weight_decay: float = 0.1
    clip: float = 1.0
    save_every: float = 15.0  # seconds


def learning_rate(config: TrainingConfig, seconds: float) -> float:
    """Linear warm-up, then a cosine down to `final_fraction`, over the fraction of the time that has passed."""
    done = min(1.0, seconds / config.seconds)
    if done < config.warmup:
        return config.learning_rate * done / config.warmup
    cosine = 0.5 * (1 + math.cos(math.pi * (done - config.warmup) / (1 - config.warmup)))
    return config.learning_rate * (config.final_fraction + (1 - config.final_fraction) * cosine)


def make_optimizer(model: ByteModel, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW; only matrices decay."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), eps=1e-10)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": value for index, entry in state.items() for name, value in entry.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    whole = optimizer.state_dict()
    for key, value in tensors.items():
        index, name = key.split(".")
        whole["state"].setdefault(int(index), {})[name] = value
    optimizer.load_state_dict(whole)


class Trainer:
    """One model, its optimizer and how far they are. State is carried from batch to batch (truncated backpropagation).

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
        self.optimizer = make_optimizer(model, config)

    def run(self, stop: StopRequest, on_step: Callable[[float], None], save: Callable[[], None]) -> None:
        """Train for the seconds that are left. `on_step(bits per byte)` after each step; `save()` now and then."""
        device = next(self.model.parameters()).device
        state = self.model.init_state(len(self.rows.starts))
        before, start = self.progress.seconds, time.perf_counter()
        saved = recorded = 0.0
        recent: list[float] = []
        while (elapsed := time.perf_counter() - start) + before < self.config.seconds:
            self.progress.seconds = before + elapsed
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

    def _step(self, batch: Tensor, state: list) -> tuple[float, list]:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.progress.seconds)
        with self.autocast:
            logits, state = self.model(batch[:, :-1], state)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.step()
        return loss.item() / math.log(2), detached(state)

    def _record(self, recent: list[float]) -> None:
        if recent:
            self.progress.curve_seconds.append(round(self.progress.seconds, 2))
            self.progress.curve_bytes.append(self.progress.step * len(self.rows.starts) * self.rows.length)
            self.progress.curve_bits.append(sum(recent) / len(recent))
