"""Summary tokens that accumulate (Memo, arXiv 2510.19732, after AutoCompressors, arXiv 2305.14788), any backbone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from memattn.nn.memory_tokens import MemoryTokens, MemoryTokensState

MODES = ("accumulate", "overwrite")


class SummaryTokens(MemoryTokens):
    """Learned queries close each segment; the backbone's outputs there are the inputs of all later segments.

    [·, y_s, Σ_s] = backbone([Σ_0 … Σ_{s−1}, x_s, queries]),  queries [num_summary_tokens, embed_dim], learned

    mode "accumulate" keeps the summaries of the last max_segments segments (the paper keeps all of an episode: give
    max_segments accordingly), "overwrite" those of the last one only, the paper's recurrent-memory baseline. A segment
    of t tokens so costs (min(s, max_segments) + 1) · num_summary_tokens + t rows. Each segment starts the backbone
    afresh, so positions, where it has them, restart at 0, prefix included.

    backbone as in `RecurrentMemory`. In training mode only: segment_jitter j draws every segment's length uniformly
    from segment_size · (1 ± j), rounded (the paper's j is 0.2; drawn on the host, so not under torch.compile);
    detach_probability is that of a segment whose prefix passes no gradient. bptt_depth as in `RecurrentMemory`.

    The queries start normal with deviation 0.02. Equations and sizes as in the authors' code (gunshi/memo), which at
    decoding keeps the summaries' keys and values instead of reading them again at the start of each segment.
    """

    def __init__(
        self,
        backbone: nn.Module,
        embed_dim: int,
        num_summary_tokens: int,
        *,
        segment_size: int,
        mode: str = "accumulate",
        max_segments: int = 16,
        segment_jitter: float = 0.0,
        detach_probability: float = 0.0,
        bptt_depth: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(backbone, embed_dim, segment_size, bptt_depth)
        name = type(self).__name__
        if mode not in MODES:
            raise ValueError(f"{name}: mode is {mode!r}; allowed: {', '.join(map(repr, MODES))}")
        for argument, value in (("num_summary_tokens", num_summary_tokens), ("max_segments", max_segments)):
            if value < 1:
                raise ValueError(f"{name}: {argument} is {value}; allowed: ≥ 1")
        for argument, part in (("segment_jitter", segment_jitter), ("detach_probability", detach_probability)):
            if not 0 <= part < 1:
                raise ValueError(f"{name}: {argument} is {part}; allowed: 0 ≤ {argument} < 1")
        self.mode, self.max_segments = mode, max_segments if mode == "accumulate" else 1
        self.segment_jitter, self.detach_probability = segment_jitter, detach_probability
        self.queries = nn.Parameter(torch.empty(num_summary_tokens, embed_dim, device=device, dtype=dtype))
        self._reset_own()

    def _reset_own(self) -> None:
        nn.init.normal_(self.queries, std=0.02)

    def _empty_memory(self, batch: int) -> Tensor:
        count, width = self.queries.shape
        return self.queries.new_zeros(batch, self.max_segments * count, width)

    def _queries(self, memory: Tensor, closed: Tensor) -> Tensor:
        return self.queries.expand(closed.shape[0], -1, -1)

    def _prefix(self, memory: Tensor, closed: Tensor, most: int | None) -> tuple[Tensor, Tensor]:
        count = self.queries.shape[0]
        kept = self.max_segments if most is None else min(most, self.max_segments)
        rows = memory[:, memory.shape[1] - kept * count :]
        age = torch.arange(kept * count, 0, -1, device=memory.device)  # 1 is the newest row
        return rows, age <= closed[:, None] * count

    def _updated(self, memory: Tensor, written: Tensor) -> Tensor:
        return torch.cat([memory, written.to(memory.dtype)], 1)[:, written.shape[1] :]

    def _sizes(self, tokens: int, opened: bool) -> list[int]:
        if not (self.training and self.segment_jitter):
            return super()._sizes(tokens, opened)
        spread = round(self.segment_jitter * self.segment_size)
        tokens += self.segment_size + spread - 1 if opened and tokens else 0
        sizes: list[int] = []
        while sum(sizes) < tokens:
            sizes.append(self.segment_size + int(torch.randint(-spread, spread + 1, ())))
        return sizes

    def _cut(self, state: MemoryTokensState, n: int, segments: Tensor | None) -> MemoryTokensState:
        detached = self.training and self.detach_probability > 0 and float(torch.rand(())) < self.detach_probability
        return super()._cut(state.detach() if detached else state, n, segments)

    def _refuse(self, x, state, masked, return_state) -> None:
        super()._refuse(x, state, masked, return_state)
        if state is not None:
            raise NotImplementedError(
                f"{type(self).__name__}: state is given and {type(self.backbone).__name__} takes no attention_mask, so "
                "rows with fewer summaries than others cannot be told apart; allowed: None"
            )

    def extra_repr(self) -> str:
        text = f"{self.embed_dim}, num_summary_tokens={self.queries.shape[0]}, segment_size={self.segment_size}"
        text += f", mode={self.mode!r}" + (f", max_segments={self.max_segments}" if self.mode == MODES[0] else "")
        for name in ("segment_jitter", "detach_probability", "bptt_depth"):
            if getattr(self, name):
                text += f", {name}={getattr(self, name)}"
        return text
