"""Native Sparse Attention (NSA; Yuan et al. 2025, arXiv 2502.11089)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memattn.nn.block_retrieval import BlockRetrieval, Seen, block_ends
from memattn.nn.inputs import check_sizes
from memattn.ops.block_scores import block_scores
from memattn.ops.block_summary import block_summary
from memattn.ops.sparse_attention import sparse_attention

COMPRESSIONS = ("mean", "mlp")


class NativeSparseAttention(BlockRetrieval):
    """Compressed, selected and near tokens, each with a softmax of its own, joined by gates of each head and token.

        o_t = Σ_c g_tc o_tc, c ∈ {compressed, selected, window}        g = sigmoid(gate_proj x_t)

    compressed: attention to K̃_i = φ(K_i), Ṽ_i = φ(V_i) of all blocks of `compressed_block` tokens, every
    `compressed_stride`, that end at or before t; P_ti are its weights.
    selected: attention to the `top_blocks` blocks of `block_size` tokens with the largest importance
    Σ_h∈group Σ_i ω_ij P_hti, ω_ij the strides that compressed block i and block j share. The first `first_blocks` and
    the last `last_blocks`, the query's own included, are always among them. The heads of a group share the list.
    window: the last `window` tokens.

    φ, "mean": the average; "mlp": W₂ relu(W₁ [x_1 + e_1 ; … ; x_l + e_l]) over the tokens of a block, of keys and of
    values apart, e a position in the block for each head, as in lucidrains' native-sparse-attention-pytorch. A group
    may have any number of heads. Keys and values are shared by the three branches (the paper gives each its own).
    Keys are turned by their position before they are compressed, as in flash-linear-attention. A query that no
    compressed block precedes gets 0 from that branch.

    The defaults are the paper's sizes. The state is a `BlockRetrievalState`: all keys and values, and [K̃ ; Ṽ].
    Arguments: num_kv_heads, head_dim, rope_base, qk_norm, norm_eps, bias as in `AttentionLayer`; backend of the three
    attentions; calls as in `GatedDeltaNet`.

    >>> layer = NativeSparseAttention(256, num_heads=4, num_kv_heads=1, window=128, top_blocks=8)
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        compressed_block: int = 32,
        compressed_stride: int = 16,
        block_size: int = 64,
        top_blocks: int = 16,
        first_blocks: int = 1,
        last_blocks: int = 2,
        window: int = 512,
        compression: str = "mean",
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        rope_base: float | None = 10000.0,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        bias: bool = False,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            embed_dim,
            num_heads,
            block=compressed_block,
            stride=compressed_stride,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rope_base=rope_base,
            qk_norm=qk_norm,
            norm_eps=norm_eps,
            bias=bias,
            backend=backend,
            device=device,
            dtype=dtype,
        )
        check_sizes(self, compressed_stride=compressed_stride, block_size=block_size, window=window)
        self._check_chosen(top_blocks=top_blocks)
        for name, size in (("compressed_block", compressed_block), ("block_size", block_size)):
            if size % compressed_stride:
                raise ValueError(
                    f"NativeSparseAttention: {name} is {size}; expected a multiple of compressed_stride "
                    f"{compressed_stride}"
                )
        if first_blocks < 0 or last_blocks < 1 or first_blocks + last_blocks > top_blocks:
            raise ValueError(
                f"NativeSparseAttention: first_blocks is {first_blocks}, last_blocks {last_blocks}; expected at least "
                f"0 and 1, together at most top_blocks {top_blocks}"
            )
        if compression not in COMPRESSIONS:
            raise ValueError(f"NativeSparseAttention: compression is {compression!r}; allowed: {COMPRESSIONS}")
        self.block_size, self.top_blocks, self.window, self.compression = block_size, top_blocks, window, compression
        self.first_blocks, self.last_blocks = first_blocks, last_blocks
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.gate_proj = nn.Linear(embed_dim, 3 * num_heads, bias=False, **factory)
        learnt = compression == "mlp"
        self.compress_k, self.compress_v = (
            _Compression(self.num_kv_heads, compressed_block, self.head_dim, last_bias, **factory) if learnt else None
            for last_bias in (False, True)  # the same for all K̃ would not change their softmax
        )

    def _summarise(self, k: Tensor, v: Tensor) -> Tensor:
        if self.compress_k is None or self.compress_v is None:
            return block_summary(torch.cat([k, v], -1), self.block, stride=self.stride).values
        kept = (phi(_windows(x, self.block, self.stride)) for phi, x in ((self.compress_k, k), (self.compress_v, v)))
        return torch.cat(list(kept), -1).to(k.dtype)

    def _mask(self) -> dict[str, Any]:
        return {"window": self.window}

    def _attend(self, q: Tensor, x: Tensor, seen: Seen) -> Tensor:
        compressed: Any = seen.summaries
        k, v = compressed.split(self.head_dim, -1)
        queries, ends = q.to(k.dtype), block_ends(k, self.block, self.stride)
        blocks = -(-seen.cache.capacity // self.block_size)

        def importance(at: slice) -> Tensor:
            positions = seen.positions[:, at]
            p = block_scores(
                queries[:, at], k, scale=self.head_dim**-0.5, norm="softmax", over="group", block_ends=ends,
                q_positions=positions,
            )  # fmt: skip
            return self._importance(p.masked_fill(p == -torch.inf, 0.0), positions, blocks)

        lists = self._choose(importance, seen.positions, k.shape[1], self.top_blocks)
        branches = (
            self._over_compressed(q, k, v, seen.positions),
            self._listed(q, lists, seen, self.block_size),
            seen.nearby(),
        )
        gates = self.gate_proj(x).view(*x.shape[:2], self.num_heads, 3)
        dtype = torch.promote_types(gates.dtype, torch.float32)
        gates = gates.to(dtype).sigmoid()
        return sum(gates[..., c, None] * o.to(dtype) for c, o in enumerate(branches)).to(q.dtype)

    def _over_compressed(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        """One list entry that spans all compressed blocks; the last one that a query sees is its position."""
        lists = positions.new_zeros(*positions.shape, 1, min(1, k.shape[1]), dtype=torch.int32)
        last = torch.div(positions + 1 - self.block, self.stride, rounding_mode="floor").clamp(min=-1)
        return sparse_attention(
            q.to(k.dtype), k, v, lists, unit=max(1, k.shape[1]), q_positions=last, backend=self.backend
        ).o

    def _importance(self, p: Tensor, positions: Tensor, blocks: int) -> Tensor:
        """Scores [B, S, HKV, blocks] of the blocks to select, from the weights p [B, S, HKV, N] of compressed ones."""
        spans, strides = self.block // self.stride, self.block_size // self.stride
        padded = F.pad(p, (spans - 1, max(0, blocks * strides - p.shape[3])))
        shared = sum(padded[..., a : a + blocks * strides] for a in range(spans))  # of every stride of the text
        assert isinstance(shared, Tensor)
        scores = shared.unflatten(-1, (blocks, strides)).sum(-1)
        block = torch.arange(blocks, device=p.device)
        own = (positions // self.block_size)[:, :, None, None]
        forced = (block < self.first_blocks) | (block > own - self.last_blocks)
        return scores.masked_fill(forced, torch.inf).masked_fill(block > own, -torch.inf)

    def extra_repr(self) -> str:
        compressed = f"compressed_block={self.block}, compressed_stride={self.stride}, compression={self.compression!r}"
        return (
            f"{super().extra_repr()}, {compressed}, block_size={self.block_size}, top_blocks={self.top_blocks}, "
            f"first_blocks={self.first_blocks}, last_blocks={self.last_blocks}, window={self.window}"
        )


class _Compression(nn.Module):
    """Blocks of tokens [N, blocks, block, H, D] → [N, blocks, H, D]: positions in the block, then two linear maps."""

    def __init__(self, heads: int, block: int, dim: int, bias: bool, **factory: Any) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.empty(block, heads, dim, **factory))
        self.hidden = nn.Linear(block * dim, block * dim, **factory)
        self.out = nn.Linear(block * dim, dim, bias=bias, **factory)
        nn.init.zeros_(self.positions)

    def reset_parameters(self) -> None:
        """Positions 0, the maps as torch.nn.Linear."""
        nn.init.zeros_(self.positions)
        self.hidden.reset_parameters()
        self.out.reset_parameters()

    def forward(self, windows: Tensor) -> Tensor:
        tokens = (windows + self.positions).transpose(2, 3).flatten(3)  # [N, blocks, H, block · D]
        return self.out(self.hidden(tokens).relu())


def _windows(x: Tensor, block: int, stride: int) -> Tensor:
    """[N, ⌈T/stride⌉, block, H, D] tokens of each block of x [N, T, H, D], 0 behind the end."""
    blocks = -(-x.shape[1] // stride)
    token = torch.arange(blocks, device=x.device)[:, None] * stride + torch.arange(block, device=x.device)
    padded = F.pad(x, (0, 0, 0, 0, 0, max(0, (blocks - 1) * stride + block - x.shape[1])))
    return padded.index_select(1, token.flatten()).unflatten(1, (blocks, block))
