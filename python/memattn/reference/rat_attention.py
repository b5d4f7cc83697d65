"""RAT and RAT+ attention in plain torch.

`loop` is the definition, token by token over a list of entries; in float64 it is the truth every backend is measured
against. `chunked` is the differentiable fallback: the scan of the gated scan's reference, then blocks of queries
against every entry, masked by position. `step` decodes in place.

A state comes and goes as its tensors, in the order of `memattn.ops.rat_attention.RATState`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from memattn.reference.gated_scan import scan
from memattn.reference.rotary import rotate
from memattn.reference.sequences import accumulate_dtype

BLOCK = 256
Parts = tuple[Any, ...]  # tensors, or None for local rows that there are none of


@dataclass(frozen=True)
class Rule:
    """What the arguments of the op say about positions p (of a query, its own entry) and j < p (of a kept entry)."""

    restart: int  # the running state is zero before each multiple of it; 0: never
    stride: int  # token j leaves an entry for good if (j + 1) mod stride = 0
    unit: int  # the rotary position is p // unit
    window: int = 1  # entries i − j < window are seen, the token's own included
    prefix: int = 0  # entries j < prefix are seen

    @classmethod
    def of(cls, chunk_size: int | None, dilation: int | None, window: int, prefix_len: int) -> Rule:
        if dilation is None:
            assert chunk_size is not None
            return cls(chunk_size, chunk_size, chunk_size)
        return cls(0, dilation, 1, max(window, 1), prefix_len)

    @property
    def recent(self) -> int:
        """Tokens before its own that a query's window holds."""
        return self.window - 1

    @property
    def local(self) -> int:
        """Rows of the state that keep the prefix and the window."""
        return self.prefix + self.recent

    def kept(self, length: int) -> int:
        """Entries on the grid that `length` tokens can leave, whatever the position of the first."""
        return -(-length // self.stride)

    def recent_position(self, slot: Tensor, length: Tensor) -> Tensor:
        """Position that slot 0..recent−1 of the ring holds after `length` tokens; negative: none yet."""
        return length - 1 - (length - 1 - slot).remainder(self.recent)


def group(x: Tensor, heads: int, head_map: str) -> Tensor:
    """[..., H, K] -> [..., HV, K]: value head h reads head h // (HV/H) ("gqa") or h mod H ("tile")."""
    repeat = heads // x.shape[-2]
    return x.repeat_interleave(repeat, -2) if head_map == "gqa" else x.repeat(*(1,) * (x.dim() - 2), repeat, 1)


def empty_state(rule: Rule, n: int, v: Tensor, capacity: int = 0) -> Parts:
    """The tensors of a state of n sequences that have seen nothing, with room for `capacity` entries on the grid."""
    heads, dim, wide = v.shape[2], v.shape[3], accumulate_dtype(v.dtype)
    grid, local = ([v.new_zeros(n, size, heads, dim) for _ in range(2)] for size in (capacity, rule.local))
    running = [v.new_zeros(n, heads, dim, dtype=wide) for _ in range(2)]
    length = torch.zeros(n, dtype=torch.int64, device=v.device)
    return (*grid, *running, length, *(local if rule.local else (None, None)))


def loop(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, chunk_size=None, rope_base=10000.0, dilation=None, window=0,
    prefix_len=0, head_map="gqa", scale=None, initial_state=None, output_final_state=False, cu_seqlens=None,
) -> tuple[Tensor, Parts | None]:  # fmt: skip
    """One token after another: advance the running state, attend to [entries seen; own entry], keep the entry."""
    rule, dtype, heads = Rule.of(chunk_size, dilation, window, prefix_len), accumulate_dtype(q.dtype), v.shape[2]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    wide_q, wide_k = (group(x.to(dtype), heads, head_map) for x in (q, k))
    if cu_seqlens is None:
        sequences = [(b, 0, q.shape[1]) for b in range(q.shape[0])]
    else:
        bounds = cu_seqlens.tolist()
        sequences = [(0, a, b) for a, b in zip(bounds, bounds[1:], strict=False)]
    state = initial_state or empty_state(rule, len(sequences), v)
    room = rule.kept(max((end - begin for _, begin, end in sequences), default=q.shape[1]))
    o = torch.zeros(*q.shape[:2], *v.shape[2:], dtype=dtype, device=q.device)
    rows, finals = [list(o[b].unbind(0)) for b in range(q.shape[0])], []
    for n, (b, begin, end) in enumerate(sequences):
        entries = _entries(rule, state, n)
        key, value, length = state[2][n], state[3][n], int(state[4][n])
        for t in range(begin, end):
            p = length + t - begin
            if rule.restart and p % rule.restart == 0:
                key, value = torch.zeros_like(key), torch.zeros_like(value)
            gamma, weight = g[b, t].exp(), -torch.expm1(g[b, t])
            key, value = gamma * key + weight * wide_k[b, t], gamma * value + weight * v[b, t].to(dtype)
            position = torch.tensor(p // rule.unit)
            seen = [j for j in entries if ((j + 1) % rule.stride == 0 or p - j < rule.window or j < rule.prefix)]
            keys = torch.stack([entries[j][0].to(dtype) for j in seen] + [rotate(key, position, rope_base)])
            values = torch.stack([entries[j][1].to(dtype) for j in seen] + [value])
            weights = (scale * (rotate(wide_q[b, t], position, rope_base) * keys).sum(-1)).softmax(0)
            rows[b][t] = (weights[..., None] * values).sum(0)
            entries[p] = (keys[-1].to(q.dtype), value.to(q.dtype))
        finals.append(_parts(rule, entries, state, n, length + end - begin, room, key, value))
    if q.shape[0] and q.shape[1]:
        o = torch.stack([torch.stack(row) for row in rows])
    final = None
    if output_final_state:
        gathered = zip(*finals, strict=True)
        final = tuple(None if x[0] is None else torch.stack(x) for x in gathered)
        final = final or empty_state(rule, 0, v, state[0].shape[1] + room)
    return o.to(q.dtype), final


def _entries(rule: Rule, state: Parts, n: int) -> dict[int, tuple[Tensor, Tensor]]:
    """Position -> (rotated key, value) of what a state holds of sequence n."""
    keys, values, _, _, length, local_keys, local_values = state
    count = int(length[n])
    entries = {(c + 1) * rule.stride - 1: (keys[n, c], values[n, c]) for c in range(count // rule.stride)}
    for slot in range(rule.local):
        ring = torch.tensor(slot - rule.prefix)
        j = slot if slot < rule.prefix else int(rule.recent_position(ring, torch.tensor(count)))
        if 0 <= j < count:
            entries[j] = (local_keys[n, slot], local_values[n, slot])
    return entries


def _parts(rule, entries, state, n, length, room, key, value):
    """The state of one sequence after `length` tokens, from the entries by position."""
    nothing = torch.zeros_like(state[0].new_empty(key.shape))

    def rows(positions):
        pairs = [entries.get(j, (nothing, nothing)) if 0 <= j < length else (nothing, nothing) for j in positions]
        return tuple(torch.stack([x[i] for x in pairs]) if pairs else nothing[None][:0] for i in (0, 1))

    grid = rows([(c + 1) * rule.stride - 1 for c in range(state[0].shape[1] + room)])
    ring = rule.recent_position(torch.arange(rule.recent), torch.tensor(length)).tolist() if rule.recent else []
    local = rows([*range(rule.prefix), *ring]) if rule.local else (None, None)
    return (*grid, key, value, torch.tensor(length), *local)


# --- the fallback ----------------------------------------------------------------------------------------------------


def _advanced(rule, k, v, g, state, position):
    """k̃ and ṽ [N, T, HV, K] of every token, in the dtype of sums."""
    token = torch.arange(k.shape[1], device=k.device)
    since = position % rule.restart if rule.restart else token
    age = torch.minimum(token.expand_as(position), since.expand_as(position))
    gamma, weight = g.exp(), -torch.expm1(g)
    rows = []
    for x, before in ((k, state[2]), (v, state[3])):
        written = weight * x.to(g.dtype)
        if rule.restart:
            before = torch.where((position[:, :1, None] % rule.restart) == 0, 0, before)
        written = torch.cat((written[:, :1] + (gamma[:, :1] * before[:, None]), written[:, 1:]), 1)
        rows.append(scan(g.flatten(2), written.flatten(2), age).unflatten(2, g.shape[2:]))
    return rows


def _taken(old: Tensor, used: Tensor, new: Tensor, token: Tensor) -> Tensor:
    """Rows new[n, token[n, s]] where token ≥ 0, else row s of old [N, S', HV, K] where it is used, else 0."""
    old = torch.nn.functional.pad(old, (0, 0, 0, 0, 0, token.shape[1] - old.shape[1]))
    old = torch.where(used[..., None, None], old, 0)
    index = token.clamp(0, max(new.shape[1] - 1, 0))[..., None, None].expand(-1, -1, *new.shape[2:])
    return torch.where((token >= 0)[..., None, None], new.gather(1, index), old)


def _attend(q, own, own_value, keys, values, seen, scale, operand_dtype):
    """q, own [N, HV, n, K] and entries [N, HV, S, K] with seen [N, n, S] -> o [N, HV, n, K]."""
    operand = q if operand_dtype is None else q.to(operand_dtype).to(q.dtype)
    scores = (scale * (operand @ keys.mT)).masked_fill(~seen[:, None], -torch.inf)
    weights = torch.cat((scores, scale * (q * own).sum(-1, keepdim=True)), -1)
    weights = (weights - weights.amax(-1, keepdim=True).detach()).exp()
    among, alone, total = weights[..., :-1], weights[..., -1:], weights.sum(-1, keepdim=True)
    among = among if operand_dtype is None else among.to(operand_dtype).to(among.dtype)
    return (among @ values + alone * own_value) / total


def chunked(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, chunk_size=None, rope_base=10000.0, dilation=None, window=0,
    prefix_len=0, head_map="gqa", scale=None, initial_state=None, output_final_state=False, cu_seqlens=None,
    operand_dtype=None,
) -> tuple[Tensor, Parts | None]:  # fmt: skip
    """`loop` by whole tensors. operand_dtype rounds the operands of matrix products, as hardware with such does."""
    rule = Rule.of(chunk_size, dilation, window, prefix_len)
    settings = (rule, rope_base, head_map, q.shape[3] ** -0.5 if scale is None else scale, operand_dtype)
    if cu_seqlens is None:
        o, parts = _batch(q, k, v, g, initial_state or empty_state(rule, q.shape[0], v), q.shape[1], settings)
        return o, parts if output_final_state else None
    bounds = cu_seqlens.tolist()
    state = initial_state or empty_state(rule, len(bounds) - 1, v)
    longest = max(b - a for a, b in zip(bounds, bounds[1:], strict=False))
    results = []
    for n, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False)):
        own = tuple(x if x is None else x[n : n + 1] for x in state)
        results.append(_batch(q[:, a:b], k[:, a:b], v[:, a:b], g[:, a:b], own, longest, settings))
    o = torch.cat([o for o, _ in results], 1)
    if not output_final_state:
        return o, None
    parts = zip(*(parts for _, parts in results), strict=True)
    return o, tuple(None if part[0] is None else torch.cat(part) for part in parts)


def _batch(q, k, v, g, state, longest, settings):
    """Rows of one length. The state gets room for what `longest` tokens can leave."""
    rule, base, head_map, scale, operand_dtype = settings
    n, length = q.shape[:2]
    keys, values, key, value, start, local_keys, local_values = state
    after, capacity = start + length, keys.shape[1] + rule.kept(longest)
    slot = torch.arange(capacity, device=q.device)
    at = ((slot + 1) * rule.stride - 1).expand(n, -1)  # position of each entry on the grid
    used = at < start[:, None]
    if length == 0:
        grid = [_taken(x, used, x.new_zeros(n, 1, *v.shape[2:]), -1 - at) for x in (keys, values)]
        copies = (None if x is None else x.clone() for x in (local_keys, local_values))
        return torch.zeros_like(v), (*grid, key.clone(), value.clone(), after, *copies)
    position = start[:, None] + torch.arange(length, device=q.device)
    wide_q, wide_k = (group(x.to(g.dtype), v.shape[2], head_map) for x in (q, k))
    rows_k, rows_v = _advanced(rule, wide_k, v, g, state, position)
    turned_q, turned_k = (rotate(x, position // rule.unit, base) for x in (wide_q, rows_k))
    stored_k, stored_v = turned_k.to(q.dtype), rows_v.to(q.dtype)

    token = torch.where(at < after[:, None], at - start[:, None], -1)
    grid = [_taken(old, used, new, token) for old, new in ((keys, stored_k), (values, stored_v))]
    local: Any = (None, None)
    entries: list[Any] = [grid]
    positions = [at]
    bands = [at >= rule.prefix]  # entries seen once they have left the window
    recent = [torch.zeros_like(bands[0])]  # entries seen inside it
    if rule.local:
        prefix = torch.arange(rule.prefix, device=q.device).expand(n, -1)
        ring = torch.arange(rule.recent, device=q.device)
        ring_old, ring_new = (
            rule.recent_position(ring, x[:, None]) if rule.recent else prefix[:, :0] for x in (start, after)
        )
        held = torch.cat((prefix, ring_old), 1)
        old = (held >= 0) & (held < start[:, None])
        is_prefix = torch.arange(rule.local, device=q.device) < rule.prefix
        entries += [(local_keys, local_values), (stored_k, stored_v)]
        positions += [held, position]
        bands += [old & is_prefix, position < rule.prefix]
        recent += [old & ~is_prefix, torch.ones_like(bands[-1])]
        token = torch.cat((prefix, ring_new), 1)
        token = torch.where((token >= start[:, None]) & (token < after[:, None]), token - start[:, None], -1)
        local = [_taken(x, old, y, token) for x, y in ((local_keys, stored_k), (local_values, stored_v))]

    all_keys, all_values = (torch.cat(x, 1).to(g.dtype).transpose(1, 2) for x in zip(*entries, strict=True))
    j, band, near = (torch.cat(x, 1)[:, None] for x in (positions, bands, recent))
    outputs = []
    for a in range(0, length, BLOCK):
        block = slice(a, a + BLOCK)
        distance = position[:, block, None] - j
        seen = (band & (distance >= rule.window)) | (near & (distance > 0) & (distance < rule.window))
        rows = (x[:, block].transpose(1, 2) for x in (turned_q, turned_k, rows_v))
        arguments = (*rows, all_keys, all_values, seen, scale, operand_dtype)
        recompute = torch.is_grad_enabled() and length > BLOCK
        outputs.append(checkpoint(_attend, *arguments, use_reentrant=False) if recompute else _attend(*arguments))
    o = torch.cat(outputs, 2).transpose(1, 2).to(q.dtype)
    return o, (*grid, rows_k[:, -1].clone(), rows_v[:, -1].clone(), after, *local)


def step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Parts, *, chunk_size=None, rope_base=10000.0, dilation=None,
    window=0, prefix_len=0, head_map="gqa", scale=None, state_indices=None,
) -> Tensor:  # fmt: skip
    """Tokens on rows of a state pool, written back in place; index −1 gives 0 and writes nothing."""
    pool = state[4].shape[0]
    if pool == 0:
        return torch.zeros_like(v)
    rows = torch.arange(q.shape[0], device=q.device) if state_indices is None else state_indices.long()
    live = (rows >= 0) & (rows < pool)
    before = [None if x is None else x[rows.clamp(0, pool - 1)] for x in state]
    o, after = chunked(
        q, k, v, g, chunk_size=chunk_size, rope_base=rope_base, dilation=dilation, window=window,
        prefix_len=prefix_len, head_map=head_map, scale=scale, initial_state=before, output_final_state=True,
    )  # fmt: skip
    assert after is not None
    for mine, new in zip(state, after, strict=True):
        if mine is not None and new is not None:
            mine[rows[live]] = (new[:, : mine.shape[1]] if mine.dim() == 4 else new)[live]
    return torch.where(live[:, None, None, None], o, 0)
