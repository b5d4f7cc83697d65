"""What a memory carries from one call to the next.

A state is a plain class holding tensors, not a dataclass or NamedTuple: FSDP2's mixed precision looks inside those and
would cast a float32 memory to 16 bit. Each subclass is a pytree node with keys, so torch.compile, torch.export,
checkpointing and `torch.utils._pytree.tree_map` see its tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from typing_extensions import Self


class MemoryState:
    """Base class of all states. Every tensor has one row per sequence in front; rows never mix.

    A subclass names its parts in `fields`, in the order its constructor takes them, and after them its `constants`,
    numbers that are the same for all rows. A part is a tensor, None or another MemoryState. Methods return a new
    state, except `copy_`; layers' `step` also writes in place.
    """

    fields: ClassVar[tuple[str, ...]] = ()
    constants: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        pytree.register_pytree_node(
            cls,
            lambda state: ([getattr(state, name) for name in state.fields], state._constants()),
            lambda parts, context: cls(*parts, *context),
            serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
            flatten_with_keys_fn=lambda state: (
                [(pytree.GetAttrKey(name), getattr(state, name)) for name in state.fields],
                state._constants(),
            ),
        )

    @property
    def batch(self) -> int:
        """Number of sequences."""
        for name in self.fields:
            part = getattr(self, name)
            if part is not None:
                return part.batch if isinstance(part, MemoryState) else part.shape[0]
        raise ValueError(f"{type(self).__name__} holds no tensor, so it has no batch size")

    def detach(self) -> Self:
        """The same memory without its gradient history (between segments of truncated backpropagation)."""
        return self._map(lambda owner, name, tensor: tensor.detach())

    def clone(self) -> Self:
        """A copy that `step` may change without touching this one."""
        return self._map(lambda owner, name, tensor: tensor.clone())

    def reorder(self, indices: Tensor) -> Self:
        """Row i of the result is row indices[i] (int32/int64): beam search, dropping or repeating sequences."""
        return self._map(lambda owner, name, tensor: tensor.index_select(0, indices))

    def reset(self, rows: Tensor | None = None) -> Self:
        """The chosen rows start afresh, e.g. where an episode ended. rows: bool [batch], or row numbers; None: all.

        Nothing of the old memory passes, not its gradient and not its NaN. In place: `state.copy_(state.reset(rows))`.
        """
        mask = self._row_mask(rows)

        def start_afresh(owner: MemoryState, name: str, tensor: Tensor) -> Tensor:
            chosen = mask.to(tensor.device).view(-1, *(1,) * (tensor.dim() - 1))
            return torch.where(chosen, owner._fresh(name, tensor), tensor)

        return self._map(start_afresh)

    def copy_(self, other: Self) -> Self:
        """Writes `other` into this state's tensors, which keep their addresses; returns this state."""
        if type(other) is not type(self):
            raise TypeError(f"copy_: other is {type(other).__name__}; expected {type(self).__name__}")
        for name in self.fields:
            mine, theirs = getattr(self, name), getattr(other, name)
            if (mine is None) != (theirs is None):
                raise ValueError(f"copy_: {name} is missing in {'other' if theirs is None else 'this state'}")
            if isinstance(mine, Tensor) and mine.shape != theirs.shape:
                raise ValueError(f"copy_: {name} has shape {list(theirs.shape)} in other; expected {list(mine.shape)}")
            if mine is not None:
                mine.copy_(theirs)
        return self

    def _fresh(self, name: str, tensor: Tensor) -> Tensor:
        """What part `name` holds before the first token, broadcastable to `tensor`. By default zero."""
        return tensor.new_zeros(())

    def _map(self, function: Callable[[MemoryState, str, Tensor], Tensor]) -> Self:
        """The same kind of state with function(owner, name, tensor) in place of every tensor."""
        parts: list[Any] = []
        for name in self.fields:
            part = getattr(self, name)
            if isinstance(part, MemoryState):
                parts.append(part._map(function))
            else:
                parts.append(None if part is None else function(self, name, part))
        return type(self)(*parts, *self._constants())

    def _constants(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self.constants)

    def _row_mask(self, rows: Tensor | None) -> Tensor:
        if rows is None:
            return torch.ones(self.batch, dtype=torch.bool)
        if rows.dtype == torch.bool:
            if rows.shape != (self.batch,):
                raise ValueError(f"reset: rows has shape {list(rows.shape)}; expected bool [batch] = [{self.batch}]")
            return rows
        if rows.dtype not in (torch.int32, torch.int64) or rows.dim() != 1:
            raise ValueError(f"reset: rows is {_summary(rows)}; expected bool [batch] or int32/int64 [n]")
        return torch.zeros(self.batch, dtype=torch.bool, device=rows.device).index_fill(0, rows.long(), True)

    def __repr__(self) -> str:
        parts = ", ".join(f"{name}={_summary(getattr(self, name))}" for name in (*self.fields, *self.constants))
        return f"{type(self).__name__}({parts})"


def _summary(part: Any) -> str:
    if not isinstance(part, Tensor):
        return repr(part)
    return f"{str(part.dtype).removeprefix('torch.')} {list(part.shape)} on {part.device}"
