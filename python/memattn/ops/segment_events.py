"""Events of a text: it is cut where a token surprises, and the cut is moved to where the keys part.

    t begins an event  ⇔  (z_t > μ_t + γ σ_t and the open event has at least min_size tokens)
                          or the open event has max_size tokens

z_t = −log p(x_t | x_<t); μ_t and σ_t are the mean and the standard deviation (dividing by n − 1) of the last `window`
surprises before t, of as many as there are; before the third token nothing surprises. With `refine` a surprising t is
only proposed: with a the begin of the open event and n = t − a, the event begins at the split s in a + min_size..t that
parts the tokens of the graph G = a − n//2..t + n//2 (as far as the text goes) best, the last of equally good ones. With
A_ij = Σ_h k_ih·k_jh, S = {i < s}, S̄ = {i ≥ s}, vol(C) = Σ_{i∈C} Σ_j A_ij and W = vol(G):

    "modularity"     largest    Q(s) = Σ_{C∈{S,S̄}} [Σ_{i,j∈C} A_ij / W − (vol(C) / W)²]
    "conductance"    smallest   φ(s) = Σ_{i∈S,j∈S̄} A_ij / min(vol(S), vol(S̄))

Source: EM-LLM (Fountas et al. 2024, arXiv 2407.09450). Our readings where its text and its released code differ: the
window of μ_t, σ_t ends at t − 1 for every token, where the code takes one window for a whole chunk of the prompt; Q is
the usual modularity, which the code halves (the same split); vol(C) sums degrees, the usual conductance, where the code
sums only the similarities inside C; t itself is among the splits, which the code leaves out; cuts at max_size are not
refined. Self-similarities A_ii count, as there. Where W or a volume is not positive a split has no meaning, and if none
has, the cut stays at t. The last event of a text may be shorter than min_size.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from memattn import _native, backends
from memattn.backends import Limits, Request
from memattn.ops import _checks as check
from memattn.reference import segment_events as reference
from memattn.reference.segment_events import Settings, Span
from memattn.state import MemoryState

OP = "segment_events"
REFINEMENTS = (None, "modularity", "conductance")
_FEATURES = frozenset({"refine", "state"})

for _name, _available in (("cpu", backends.needs_native("_host")), ("chunked", backends.always)):
    _limits = Limits(("cpu", "cuda", "xpu"), check.FLOATS, _available, dims=None, features=_FEATURES)
    backends.register(OP, _name, _limits)


class EventState(MemoryState):
    """What a text has told so far, on the CPU: the tokens that a later event may still need, and where things stand.

    surprise [B, window + max_size] float64 and keys [B, 2·max_size, H·K] (None without refine) are those of the last
    tokens; begin, following and position [B] int64 count tokens: begin of the open event, first token not judged yet,
    tokens read. statistics [B, 3] float64 are the sums of the window before `following`.
    """

    fields = ("surprise", "keys", "begin", "following", "position", "statistics")

    def __init__(
        self, surprise: Tensor, keys: Tensor | None, begin: Tensor, following: Tensor, position: Tensor,
        statistics: Tensor,
    ) -> None:  # fmt: skip
        self.surprise, self.keys = surprise, keys
        self.begin, self.following, self.position = begin, following, position
        self.statistics = statistics


class Events(NamedTuple):
    """cu_events int64 [E+1] or [B, E+1]: event e of a row is cu_events[e]..cu_events[e+1], positions in its text;
    rows with fewer events repeat their last bound. counts int64 [] or [B]: events of each row. final_state or None."""

    cu_events: Tensor
    counts: Tensor
    final_state: EventState | None


# --- checks -----------------------------------------------------------------------------------------------------------


def _check_settings(s: Settings):
    for name, value, least in (("window", s.window, 2), ("min_size", s.min_size, 1), ("max_size", s.max_size, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{OP}: {name} is {value!r}; expected an integer ≥ {least}")
    if s.min_size > s.max_size:
        raise ValueError(f"{OP}: min_size is {s.min_size} and max_size {s.max_size}; expected min_size ≤ max_size")
    if not isinstance(s.gamma, (int, float)) or not math.isfinite(s.gamma):
        raise ValueError(f"{OP}: gamma is {s.gamma!r}; expected a finite number")
    check.choice(OP, "refine", s.refine, REFINEMENTS)


def _check_tensors(surprise, keys, similarity, refine, streams):
    check.tensor(OP, "surprise", surprise)
    if surprise.dim() not in (1, 2):
        raise ValueError(f"{OP}: surprise has shape {list(surprise.shape)}; expected [T] or [B, T]")
    check.dtype(OP, "surprise", surprise, check.FLOATS)
    if refine is None and (keys is not None or similarity is not None):
        raise ValueError(
            f"{OP}: {'similarity' if keys is None else 'keys'} is given without refine, which would read it"
        )
    if refine is not None and (keys is None) == (similarity is None):
        given = "neither is" if keys is None else "both are"
        raise ValueError(f"{OP}: refine is {refine!r}, which needs keys or similarity; {given} given")
    rows, batch = tuple(surprise.shape), "B, " if surprise.dim() == 2 else ""
    if keys is not None:
        check.rank(OP, "keys", keys, f"[{batch}T, H, K]")
        check.shape(OP, "keys", keys, f"[{batch}T, H, K]", (*rows, *keys.shape[-2:]))
        check.dtype(OP, "keys", keys, check.FLOATS)
    if similarity is not None:
        check.tensor(OP, "similarity", similarity)
        check.shape(OP, "similarity", similarity, f"[{batch}T, T]", (*rows, rows[-1]))
        check.dtype(OP, "similarity", similarity, check.FLOATS)
        if streams:
            raise ValueError(f"{OP}: similarity holds a whole text; with initial_state or output_final_state give keys")
    if not bool(surprise.isfinite().all()):
        where = (~surprise.isfinite()).nonzero()[0].tolist()
        raise ValueError(f"{OP}: surprise{where} is {surprise[tuple(where)].item()}; expected finite numbers")


def _check_state(state, s: Settings, batch: int, width: int | None):
    if not isinstance(state, EventState):
        raise TypeError(f"{OP}: initial_state is {type(state).__name__}; expected the EventState of an earlier call")
    expected = f"a state of {batch} rows, window {s.window} and max_size {s.max_size}"
    if tuple(state.surprise.shape) != (batch, s.window + s.max_size):
        raise ValueError(f"{OP}: initial_state has surprises {list(state.surprise.shape)}; expected {expected}")
    held = None if state.keys is None else tuple(state.keys.shape)
    if held != (None if width is None else (batch, 2 * s.max_size, width)):
        raise ValueError(
            f"{OP}: initial_state has keys {None if held is None else list(held)}; expected {expected} and "
            f"{'no keys' if width is None else f'keys of {width} values'}"
        )


# --- the loop over rows -----------------------------------------------------------------------------------------------


def _fresh(s: Settings, batch: int, keys: Tensor | None) -> EventState:
    surprise = torch.zeros(batch, s.window + s.max_size, dtype=torch.float64)
    tail = None if keys is None else keys.new_zeros(batch, 2 * s.max_size, keys.shape[2])
    begin, following, position = (torch.zeros(batch, dtype=torch.int64) for _ in range(3))
    return EventState(surprise, tail, begin, following, position, torch.zeros(batch, 3, dtype=torch.float64))


def _joined(held: Tensor | None, new: Tensor | None) -> Tensor | None:
    return None if held is None or new is None else torch.cat([held, new.to(held.dtype)], 1)


def _ending_at(rows: Tensor, end: int) -> Span:
    return Span(rows, end - rows.shape[0])


def _by_host(
    s: Settings, progress: tuple, surprise: Span, keys: Span | None, matrix: Tensor | None, end: int, over: bool
) -> tuple[list[int], tuple]:
    """(begins, progress) from the C++ loop; progress is (begin, following, *statistics)."""
    host = _native.host()
    assert host is not None
    rows = None if keys is None else keys.rows
    wide = rows is not None and rows.dtype == torch.float64
    return host.segment_events(
        progress, surprise.rows.data_ptr(), surprise.first,
        rows.data_ptr() if rows is not None and not wide else 0, rows.data_ptr() if rows is not None and wide else 0,
        0 if keys is None else keys.first, 0 if rows is None else rows.shape[1],
        0 if matrix is None else matrix.data_ptr(), end, over, s.window, float(s.gamma), s.min_size, s.max_size,
        REFINEMENTS.index(s.refine),
    )  # fmt: skip


def _by_definition(
    s: Settings, progress: tuple, surprise: Span, keys: Span | None, matrix: Tensor | None, end: int, over: bool
) -> tuple[list[int], tuple]:
    begins, begin, following = reference.loop(s, progress[0], progress[1], surprise, keys, matrix, end, over)
    return begins, (begin, following, *progress[2:])


def _padded(bounds: list[list[int]]) -> tuple[Tensor, Tensor]:
    counts = [len(row) - 1 for row in bounds]
    longest = max(counts, default=0)
    rows = [row + row[-1:] * (longest + 1 - len(row)) for row in bounds]
    return torch.tensor(rows, dtype=torch.int64).view(len(rows), longest + 1), torch.tensor(counts, dtype=torch.int64)


# --- the public function ----------------------------------------------------------------------------------------------


def segment_events(
    surprise: Tensor,
    *,
    keys: Tensor | None = None,
    similarity: Tensor | None = None,
    window: int = 4096,
    gamma: float = 1.0,
    min_size: int = 8,
    max_size: int = 128,
    refine: str | None = None,
    initial_state: EventState | None = None,
    output_final_state: bool = False,
    backend: str | None = None,
) -> Events:
    """The bounds of the events of each text; the module docstring has the rule, its source and our readings.

    =============  ==========================  ================================================================
    argument       shape                       dtype and meaning
    =============  ==========================  ================================================================
    surprise       [T] or [B, T]               float32, bfloat16, float16 or float64, finite: −log p(x_t | x_<t)
    keys           [T, H, K] or [B, T, H, K]   with refine: un-rotated keys; heads of several layers side by side
                                               along H. Products in float64 of values held in float32 (float64)
    similarity     [T, T] or [B, T, T]         with refine, instead of keys: A, of which (A + Aᵀ)/2 counts
    window         ≥ 2                         tokens behind μ and σ; EM-LLM's code takes its local window, 4096
    gamma          finite                      deviations above the mean
    min_size       ≥ 1                         least and greatest number of tokens of an event; EM-LLM's 8 and 128
    refine         None, "modularity", "conductance"
    =============  ==========================  ================================================================

    Returns Events(cu_events, counts, final_state). Each row of cu_events counts up from 0 to T and serves as
    cu_seqlens. Texts that come in parts: with output_final_state=True the text goes on, only events that later tokens
    cannot change are returned, and the rest is in final_state; without it the text ends with this call, which may have
    T = 0. Bounds are positions in the whole text, those of a call begin where those of the call before ended, and
    wherever the text is cut, they are the same. initial_state is not changed.

    Runs on the host, also for tensors elsewhere; not inside torch.compile. Nothing is differentiable: cuts are places.

    Raises ValueError (shapes, values, settings, a state of others), TypeError (dtypes), BackendError; RuntimeError
    inside torch.compile.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError(f"{OP} reads its input on the host; call it outside of torch.compile")
    settings = Settings(window, gamma, min_size, max_size, refine)
    streams = initial_state is not None or output_final_state
    _check_settings(settings)
    _check_tensors(surprise, keys, similarity, refine, streams)
    features = frozenset(({"refine"} if refine else set()) | ({"state"} if streams else set()))
    request = Request(surprise.device.type, surprise.dtype, (), features)
    name = backends.choose(OP, request, backend, lambda: check.describe(surprise=surprise, keys=keys))
    single = surprise.dim() == 1
    z = (surprise[None] if single else surprise).detach().to("cpu", torch.float64)
    if keys is not None:
        held = torch.float64 if keys.dtype == torch.float64 else torch.float32
        keys = (keys[None] if single else keys).detach().to("cpu", held).flatten(2)
    if similarity is not None:
        similarity = (similarity[None] if single else similarity).detach().to("cpu", torch.float64).contiguous()
    (batch, length), width = z.shape, None if keys is None else keys.shape[2]
    if initial_state is not None:
        _check_state(initial_state, settings, batch, width)
    state = _fresh(settings, batch, keys) if initial_state is None else initial_state
    surprises, all_keys = torch.cat([state.surprise, z], 1), _joined(state.keys, keys)
    run, rows, bounds = (_by_host if name == "cpu" else _by_definition), [], []
    for b in range(batch):
        end = int(state.position[b]) + length
        progress = (int(state.begin[b]), int(state.following[b]), *state.statistics[b].tolist())
        held_keys = None if all_keys is None else _ending_at(all_keys[b], end)
        matrix = None if similarity is None else similarity[b]
        begins, after = run(
            settings, progress, _ending_at(surprises[b], end), held_keys, matrix, end, not output_final_state
        )
        closed = [] if output_final_state or end == after[0] else [end]
        bounds.append([progress[0], *begins, *closed])
        rows.append((*after, end))
    cu_events, counts = _padded(bounds)
    final_state = _state_after(rows, surprises, all_keys, settings) if output_final_state else None
    return Events(cu_events[0] if single else cu_events, counts[0] if single else counts, final_state)


def _state_after(rows: list[tuple], surprise: Tensor, keys: Tensor | None, s: Settings) -> EventState:
    """The state from each row's (begin, following, *statistics, position)."""
    numbers = torch.tensor([[row[0], row[1], row[-1]] for row in rows], dtype=torch.int64).view(-1, 3)
    statistics = torch.tensor([row[2:5] for row in rows], dtype=torch.float64).view(-1, 3)
    tail = None if keys is None else keys[:, keys.shape[1] - 2 * s.max_size :].clone()
    begin, following, position = numbers.unbind(1)
    held = surprise[:, surprise.shape[1] - s.window - s.max_size :].clone()
    return EventState(held, tail, begin, following, position, statistics)
