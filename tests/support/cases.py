"""Case generator of the gated delta rule, shared by tests and bench: speed is measured on shapes that are tested."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

TENSORS = ("q", "k", "v", "g", "beta", "initial_state")


@dataclass(frozen=True)
class Case:
    """One input of `gated_delta_rule`. `lengths` packs sequences along T (then batch is 1)."""

    name: str
    batch: int = 1
    length: int = 64
    heads: int = 2
    value_heads: int = 2
    key_dim: int = 32
    value_dim: int = 32
    lengths: tuple[int, ...] | None = None
    decay: float | None = 0.5  # g is uniform in [−decay, 0]; None passes g=None
    beta: float | None = 1.0  # beta is uniform in [0, beta]; None passes beta=None
    correlation: float = 0.0  # share of a common direction in the keys
    state: bool = True
    qk_l2norm: bool = True
    scale: float | None = None

    @property
    def sequences(self) -> int:
        """Number of sequences N."""
        return self.batch if self.lengths is None else len(self.lengths)

    @property
    def tokens(self) -> int:
        """Tokens per batch row."""
        return self.length if self.lengths is None else sum(self.lengths)

    def make(
        self, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0, grad: bool = False
    ) -> dict[str, object]:
        """Keyword arguments of the op. The same seed draws the same values whatever the dtype (before rounding)."""
        generator = torch.Generator().manual_seed(seed)
        state_dtype = torch.float64 if dtype == torch.float64 else torch.float32

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator, dtype=torch.float64)

        rows = (self.batch, self.tokens)
        q = normal(*rows, self.heads, self.key_dim)
        k = normal(*rows, self.heads, self.key_dim)
        k = (1 - self.correlation) * k + self.correlation * normal(1, 1, self.heads, self.key_dim)
        v = normal(*rows, self.value_heads, self.value_dim)
        gate, strength = uniform(*rows, self.value_heads), uniform(*rows, self.value_heads)
        state = normal(self.sequences, self.value_heads, self.key_dim, self.value_dim)
        tensors = {
            "q": q.to(dtype),
            "k": k.to(dtype),
            "v": v.to(dtype),
            "g": None if self.decay is None else (-self.decay * gate).to(state_dtype),
            "beta": None if self.beta is None else (self.beta * strength).to(dtype),
            "initial_state": state.to(state_dtype) if self.state else None,
        }
        tensors = {n: None if x is None else x.to(device).requires_grad_(grad) for n, x in tensors.items()}
        bounds = None
        if self.lengths is not None:
            bounds = torch.tensor([0, *torch.tensor(self.lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)
        return {**tensors, "cu_seqlens": bounds, "qk_l2norm": self.qk_l2norm, "scale": self.scale}


BASE = Case("base", batch=2, length=150, heads=2, value_heads=4, key_dim=32, value_dim=48)
RAGGED = tuple(replace(BASE, name=f"T{t}", batch=1, length=t) for t in (1, 2, 15, 16, 17, 63, 64, 65, 127, 200))
CASES = (
    BASE,
    *RAGGED,
    replace(BASE, name="no_gate", decay=None),
    replace(BASE, name="no_beta_no_state", beta=None, state=False),
    replace(BASE, name="no_l2norm", qk_l2norm=False, beta=0.02, scale=0.7),
    replace(BASE, name="packed", batch=1, lengths=(33, 0, 1, 64, 70)),
    replace(BASE, name="wide_key", heads=1, value_heads=1, key_dim=256, value_dim=16, length=70),
    replace(BASE, name="wide_value", heads=1, value_heads=2, key_dim=16, value_dim=256, length=70),
    replace(BASE, name="odd_dims", key_dim=40, value_dim=24, length=70),
    replace(BASE, name="strong_decay", decay=40.0),
    replace(BASE, name="full_forgetting", decay=1e4, batch=1),
    replace(BASE, name="negative_eigenvalues", beta=1.9, correlation=0.3),
    replace(BASE, name="correlated_keys", correlation=0.9),
    replace(BASE, name="square128", batch=1, length=192, heads=1, value_heads=2, key_dim=128, value_dim=128),
)
EMPTY = (
    replace(BASE, name="no_tokens", length=0),
    replace(BASE, name="no_rows", batch=0),
    replace(BASE, name="empty_sequences", batch=1, lengths=(0, 0)),
)


def by_name(name: str) -> Case:
    """The case called `name`."""
    return next(case for case in (*CASES, *EMPTY) if case.name == name)
