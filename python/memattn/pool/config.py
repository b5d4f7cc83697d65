"""What a pool is made of: sizes and options, checked once, and written into the header of a saved pool."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

POOL = "KVPool"
DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64,
}  # fmt: skip
CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
SUMMARIES = ("mean", "min", "max")


class PoolFull(RuntimeError):
    """There is no room for what was to be written; the pool is as it was before the call."""


@dataclass(frozen=True)
class PoolConfig:
    """The options of a pool that its memory depends on; `KVPool` explains them."""

    layers: int
    kv_heads: int
    head_dim: int
    value_dim: int
    batch: int
    page_size: int
    dtype: torch.dtype
    compress: str | None
    summaries: tuple[str, ...]
    unrotated_keys: bool

    def __post_init__(self) -> None:
        for name in ("layers", "kv_heads", "head_dim", "value_dim", "batch", "page_size"):
            positive(name, getattr(self, name))
        if self.dtype not in DTYPES.values():
            raise TypeError(f"{POOL}: dtype is {self.dtype}; allowed: {', '.join(DTYPES)}")
        if self.compress not in (None, *CODES):
            raise ValueError(
                f"{POOL}: compress is {self.compress!r}; allowed: None, {', '.join(map(repr, CODES))} "
                "(product quantisation is not built)"
            )
        if self.compress is not None and self.dtype == torch.float64:
            raise TypeError(
                f"{POOL}: dtype is float64 with compress={self.compress!r}; compressed pools take 16 or 32 bit"
            )
        for name in self.summaries:
            if name not in SUMMARIES:
                raise ValueError(f"{POOL}: summaries has {name!r}; allowed: {', '.join(SUMMARIES)}")

    @property
    def streams(self) -> int:
        """Page lists: one per layer and batch row."""
        return self.layers * self.batch

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"dtype": str(self.dtype).removeprefix("torch."), "summaries": list(self.summaries)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PoolConfig:
        """The inverse of `to_dict`."""
        return cls(**values | {"dtype": DTYPES[values["dtype"]], "summaries": tuple(values["summaries"])})


def positive(name: str, value: object) -> None:
    """`value` is an int ≥ 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{POOL}: {name} is {value!r}; expected an integer ≥ 1")
