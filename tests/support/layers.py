"""What every memory layer promises, as checks: all its forms are one function, and it is an ordinary module.

    SUBJECTS = {"plain": Subject(lambda **kw: MyLayer(48, 3, chunk_size=8, **kw), embed_dim=48, chunk=8)}

    @pytest.mark.parametrize("subject, check", layers.matrix(SUBJECTS))
    def test_promises(subject, check):
        layers.run(check, subject)

A check takes (layer, x, subject): a layer away from its initialisation, x [3, 2·chunk + 3, embed_dim]. States are
judged by what the layer makes of them, since two caches may hold the same tokens in different places; their tensors are
for the layer's own tests. A form that a layer lacks is named in `Lacks` with the reason: then it must refuse, and the
check is skipped with that reason.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from memattn.nn.hybrid_stack import StackState
from memattn.nn.segment_recurrence import SlotMemory
from support.compare import relative_error

REFUSALS = (AttributeError, NotImplementedError, TypeError, ValueError)
MEETS_FLOAT64 = {torch.float32: 1e-5, torch.bfloat16: 3e-2}  # a whole layer; an op alone is held to less


@dataclass(frozen=True)
class Lacks:
    """Why a layer has no such form; None: it has it."""

    step: str | None = None
    padding: str | None = None  # attention_mask
    packed: str | None = None  # cu_seqlens
    pool: str | None = None  # step(state_indices=…)
    split: str | None = None  # states inside a chunk; at its bounds they always hand over
    state_gradient: str | None = None  # the published method stops gradients between calls
    compile: str | None = None
    compile_step: str | None = None
    bfloat16: str | None = None

    def __post_init__(self) -> None:
        for lack in fields(self):
            if getattr(self, lack.name) == "":
                raise ValueError(f"Lacks: {lack.name} is empty; expected the reason or None")


@dataclass(frozen=True)
class Subject:
    """A layer under test. `make` takes device and dtype; `chunk` tokens make a chunk, segment, block or window."""

    make: Callable[..., Any]
    embed_dim: int
    chunk: int = 8
    lacks: Lacks = field(default_factory=Lacks)
    state_options: Mapping[str, Any] = field(default_factory=dict)  # of init_state, e.g. max_tokens
    no_gradient: tuple[str, ...] = ()  # parameters that have none by design
    tolerance: float = 5e-6  # between two forms in float32
    gradient_tolerance: float = 2e-5
    depth: int = 1  # layers on top of each other: their rounding adds up
    autocast_dtype: torch.dtype = torch.bfloat16  # of y; float32 where a residual stream runs through

    @property
    def tokens(self) -> int:
        return 2 * self.chunk + 3

    @property
    def splits(self) -> range:
        """Where one call may end and the next begin."""
        return range(0, 2 * self.chunk + 1, self.chunk if self.lacks.split else 1)


def fresh(subject: Subject, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """The layer in eval mode, every parameter moved from its initialisation, so that zeros and ones are not special."""
    torch.manual_seed(seed)
    layer = subject.make(dtype=dtype).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer


def draw(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same numbers on every device and in every dtype, before rounding."""
    values = torch.randn(*shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    return values.to(torch.get_default_device(), dtype)


def inputs(subject: Subject, batch: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return draw(batch, subject.tokens, subject.embed_dim, dtype=dtype)


def run(name: str, subject: Subject) -> None:
    """The check called `name`, or a skip with the reason why the layer lacks it."""
    CHECKS[name](fresh(subject), inputs(subject), subject)


def matrix(subjects: Mapping[str, Subject], compiled: Collection[str] | None = None) -> list[Any]:
    """Every subject with every check, for parametrize; the slow ones that compile only for `compiled` (None: all)."""
    return [
        pytest.param(subject, check, id=f"{name}-{check}")
        for name, subject in subjects.items()
        for check in CHECKS
        if compiled is None or name in compiled or "compile" not in check
    ]


def close(actual: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{what} relative error {error:.3g} > {tolerance:.3g}"


def same_memory(layer: Any, a: Any, b: Any, subject: Subject, what: str = "", tolerance: float | None = None) -> None:
    """Two states that the layer cannot tell apart over two chunks."""
    probe = draw(a.batch, subject.tokens, subject.embed_dim, seed=5, dtype=next(layer.parameters()).dtype)
    with torch.no_grad():
        ours, theirs = (layer(probe, state.clone()) for state in (a, b))
    close(ours, theirs, subject.tolerance if tolerance is None else tolerance, f"{what} state:")


def warm(layer: Any, batch: int, subject: Subject, seed: int = 2) -> Any:
    """A state that is not empty: half a chunk beyond the first, or two whole ones where only those hand over."""
    tokens = 2 * subject.chunk if subject.lacks.split else subject.chunk + subject.chunk // 2
    x = draw(batch, tokens, subject.embed_dim, seed=seed, dtype=next(layer.parameters()).dtype)
    return layer(x, return_state=True)[1].detach()


def empty(layer: Any, batch: int, subject: Subject) -> Any:
    return layer.init_state(batch, **subject.state_options)


def rows(*numbers: int) -> Tensor:
    return torch.tensor(numbers)


def _lacking(reason: str | None, refused: Callable[[], object] | None = None) -> None:
    """Skips for `reason`; first the call that asks for the form has to be refused."""
    if reason is None:
        return
    if refused is not None:
        with pytest.raises(REFUSALS):
            refused()
    pytest.skip(reason)


def run_page(path: Path, blocks: int) -> dict[str, Any]:
    """Runs the Python of a page of docs from top to bottom; its assertions hold. Returns what it defined."""
    parts = path.read_text().split("```python\n")[1:]
    assert len(parts) == blocks
    torch.manual_seed(0)
    scope: dict[str, Any] = {}
    with torch.device("cpu"):
        for part in parts:
            exec(compile(part.split("```")[0], path.name, "exec"), scope)
    return scope


# --- one layer in all its forms ---------------------------------------------------------------------------------------


def two_calls_equal_one(layer: Any, x: Tensor, subject: Subject) -> None:
    """The state handed over at every token of two chunks (float64: only a wrong state is off by more than rounding)."""
    layer, x = layer.double(), x.double()
    with torch.no_grad():
        y, whole = layer(x, return_state=True)
        for split in subject.splits:
            first, state = layer(x[:, :split], return_state=True)
            kept = state.clone()
            second, after = layer(x[:, split:], state, return_state=True)
            close(torch.cat([first, second], 1), y, 1e-10, f"split at {split}:")
            if subject.lacks.split is None:
                same_memory(layer, after, whole, subject, f"split at {split}:", 1e-10)
            same_memory(layer, state, kept, subject, f"split at {split}, the state that went in:", 0.0)


def prefill_then_step_equals_one_call(layer: Any, x: Tensor, subject: Subject) -> None:
    """Every split of two chunks; the rest token by token, in float64."""
    _lacking(subject.lacks.step, lambda: layer.step(x[:, :1], None))
    layer, x = layer.double(), x.double()
    with torch.no_grad():
        y, whole = layer(x, return_state=True)
        for split in subject.splits:
            first, state = layer(x[:, :split], return_state=True) if split else (x[:, :0], empty(layer, 3, subject))
            outputs = [first]
            for token in x[:, split:].split(1, 1):
                out, returned = layer.step(token, state)
                assert returned is state, "step returns the state it was given"
                outputs.append(out)
            close(torch.cat(outputs, 1), y, 1e-10, f"prefill of {split}:")
            same_memory(layer, state, whole, subject, f"prefill of {split}:", 1e-10)


def step_takes_several_tokens(layer: Any, x: Tensor, subject: Subject) -> None:
    _lacking(subject.lacks.step, lambda: layer.step(x[:, :1], None))
    with torch.no_grad():
        y, state, outputs = layer(x), empty(layer, 3, subject), []
        for part in x.split(3, 1):
            outputs.append(layer.step(part, state)[0])
    close(torch.cat(outputs, 1), y, subject.tolerance)


def the_state_matters(layer: Any, x: Tensor, subject: Subject) -> None:
    """Without this the checks of states could not fail."""
    with torch.no_grad():
        assert relative_error(layer(x, warm(layer, 3, subject)), layer(x)) > 1e-3
        close(layer(x, empty(layer, 3, subject)), layer(x), subject.tolerance, "the empty state is None:")


def no_sequence_is_no_error(layer: Any, x: Tensor, subject: Subject) -> None:
    for mask in (None, torch.ones(0, x.shape[1], dtype=torch.bool)):
        if mask is None or subject.lacks.padding is None:
            y, state = layer(x[:0], return_state=True, **({} if mask is None else {"attention_mask": mask}))
            assert y.shape == x[:0].shape and state.batch == 0
    if subject.lacks.packed is None:
        y, state = layer(x[:1, :0], cu_seqlens=rows(0, 0, 0), return_state=True)
        assert y.shape == x[:1, :0].shape and state.batch == 2
    if subject.lacks.step is None:
        with torch.no_grad():
            assert layer.step(x[:0, :1], empty(layer, 0, subject))[0].shape == x[:0, :1].shape


def no_token_changes_nothing(layer: Any, x: Tensor, subject: Subject) -> None:
    state = warm(layer, 3, subject)
    y, after = layer(x[:, :0], state, return_state=True)
    assert y.shape == x[:, :0].shape
    same_memory(layer, after, state, subject)
    ours, theirs = ({t.data_ptr() for t in pytree.tree_leaves(s) if t is not None} - {0} for s in (after, state))
    assert not ours & theirs, "a returned state aliases its input"


def later_tokens_do_not_reach_back(layer: Any, x: Tensor, subject: Subject) -> None:
    other = x.clone()
    other[:, subject.chunk + 1 :] += 1
    with torch.no_grad():
        y, changed = layer(x), layer(other)
    close(changed[:, : subject.chunk + 1], y[:, : subject.chunk + 1], subject.tolerance)
    assert relative_error(changed[:, subject.chunk + 1], y[:, subject.chunk + 1]) > 1e-3


def a_nan_stays_in_its_sequence(layer: Any, x: Tensor, subject: Subject) -> None:
    """It reaches the rows beside its own neither in a call nor through the state."""
    beside, bad = rows(0, 2), x.clone()
    bad[1, subject.chunk - 1] = torch.nan
    with torch.no_grad():
        (y, state), (other, after) = layer(x, return_state=True), layer(bad, return_state=True)
        assert other[1].isnan().any(), "the NaN was lost"
        assert torch.equal(other[beside], y[beside])
        assert torch.equal(layer(x, after)[beside], layer(x, state)[beside]), "after the state"
        if subject.lacks.step is None:
            assert torch.equal(layer.step(x[:, :1], after)[0][beside], layer.step(x[:, :1], state)[0][beside]), "step"


def padding_bounds(subject: Subject) -> list[tuple[int, int]]:
    """Valid tokens [a, b) of each row."""
    tokens, chunk = subject.tokens, subject.chunk
    return [(0, tokens), (0, chunk + 1), (chunk - 1, tokens), (chunk, chunk + 3), (tokens - 1, tokens), (2, 2)]


def padding_mask(subject: Subject) -> Tensor:
    position = torch.arange(subject.tokens)
    return torch.stack([(a <= position) & (position < b) for a, b in padding_bounds(subject)])


def padded_rows_equal_their_runs_alone(layer: Any, x: Tensor, subject: Subject) -> None:
    """Padding of either side, with and without a state; what is padded may be NaN."""
    bounds, mask = padding_bounds(subject), padding_mask(subject)
    x = inputs(subject, len(bounds))
    _lacking(subject.lacks.padding, lambda: layer(x, attention_mask=mask))
    x[~mask] = torch.nan
    for start in (None, warm(layer, len(bounds), subject)):
        y, padded = layer(x, start, attention_mask=mask, return_state=True)
        assert y[~mask].eq(0).all(), "padded outputs are 0"
        for b, (i, j) in enumerate(bounds):
            before = None if start is None else start.reorder(rows(b))
            alone, state = layer(x[b : b + 1, i:j], before, return_state=True)
            close(y[b : b + 1, i:j], alone, subject.tolerance, f"row {b}:")
            same_memory(layer, padded.reorder(rows(b)), state, subject, f"row {b}:")


def gradients_of_padded_rows(layer: Any, x: Tensor, subject: Subject) -> None:
    """Padding has none, the rest those of the rows alone."""
    bounds, mask = padding_bounds(subject), padding_mask(subject)
    x = inputs(subject, len(bounds)).requires_grad_()
    _lacking(subject.lacks.padding, lambda: layer(x, attention_mask=mask))
    weights = draw(*x.shape, seed=3)
    (layer(x, attention_mask=mask) * weights).sum().backward()
    padded, dx = parameter_gradients(layer), x.grad.clone()
    assert dx[~mask].eq(0).all()
    layer.zero_grad()
    x.grad = None
    for b, (i, j) in enumerate(bounds):
        if i < j:
            (layer(x[b : b + 1, i:j]) * weights[b : b + 1, i:j]).sum().backward()
    close(dx, x.grad, subject.gradient_tolerance, "dx:")
    same_gradients(padded, parameter_gradients(layer), subject)


def packed_sequences_equal_separate_ones(layer: Any, x: Tensor, subject: Subject) -> None:
    """Lengths 0, 1 and on both sides of a chunk, with and without a state."""
    lengths = (subject.chunk + 1, 0, 1, subject.chunk, 2 * subject.chunk - 1)
    bounds = [sum(lengths[:n]) for n in range(len(lengths) + 1)]
    x = draw(1, bounds[-1], subject.embed_dim)
    _lacking(subject.lacks.packed, lambda: layer(x, cu_seqlens=torch.tensor(bounds)))
    for dtype, start in ((torch.int32, None), (torch.int64, warm(layer, len(lengths), subject))):
        y, packed = layer(x, start, cu_seqlens=torch.tensor(bounds, dtype=dtype), return_state=True)
        assert packed.batch == len(lengths)
        for n, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False)):
            before = None if start is None else start.reorder(rows(n))
            alone, state = layer(x[:, a:b], before, return_state=True)
            close(y[:, a:b], alone, subject.tolerance, f"sequence {n}:")
            same_memory(layer, packed.reorder(rows(n)), state, subject, f"sequence {n}:")


# --- states -----------------------------------------------------------------------------------------------------------


def states_are_cloned_reordered_and_reset_by_row(layer: Any, x: Tensor, subject: Subject) -> None:
    state = warm(layer, 3, subject)
    order = rows(2, 0, 0)
    with torch.no_grad():
        close(layer(x[order], state.reorder(order)), layer(x, state)[order], subject.tolerance, "reorder:")
        afresh = state.reset(rows(1))
        y, before, none = layer(x, afresh), layer(x, state), layer(x)
        close(y[1], none[1], subject.tolerance, "a reset row:")
        close(y[[0, 2]], before[[0, 2]], subject.tolerance, "the rows beside it:")
    if subject.lacks.step is None:
        kept = state.clone()
        with torch.no_grad():
            layer.step(x[:, :1], state)
        assert relative_error(layer(x, state), layer(x, kept)) > 1e-4, "step changes the state it is given"
        same_memory(layer, kept, warm(layer, 3, subject), subject, "a clone:", 0.0)
    leaves, spec = pytree.tree_flatten(state)
    assert all(isinstance(leaf, Tensor) or leaf is None for leaf in leaves)
    same_memory(layer, pytree.tree_unflatten(leaves, spec), state, subject, "a pytree:", 0.0)
    same_memory(layer, pickle.loads(pickle.dumps(state)), state, subject, "a pickled", 0.0)


def step_on_a_pool_of_states(layer: Any, x: Tensor, subject: Subject) -> None:
    pool, picked = warm(layer, 5, subject), rows(4, -1, 1)
    _lacking(subject.lacks.step or subject.lacks.pool, lambda: layer.step(x[:, :2], pool, state_indices=picked))
    before = pool.clone()
    with torch.no_grad():
        y, _ = layer.step(x[:, :2], pool, state_indices=picked)
        for b in (0, 2):
            alone, state = layer.step(x[b : b + 1, :2], before.reorder(picked[b : b + 1]))
            close(y[b : b + 1], alone, subject.tolerance, f"row {b}:")
            same_memory(layer, pool.reorder(picked[b : b + 1]), state, subject, f"row {b}:")
    assert y[1].eq(0).all()
    same_memory(layer, pool.reorder(rows(0, 2, 3)), before.reorder(rows(0, 2, 3)), subject, "untouched rows:", 0.0)


# --- gradients --------------------------------------------------------------------------------------------------------


def parameter_gradients(layer: Any) -> dict[str, Tensor]:
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in layer.named_parameters()}


def same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], subject: Subject) -> None:
    """Each within tolerance, measured against the largest where its own is nearly 0."""
    largest = max(x.norm().item() for x in expected.values())
    for name, truth in expected.items():
        scale = max(truth.norm().item(), 1e-3 * largest)
        error = relative_error(actual[name], truth, scale)
        assert error <= subject.gradient_tolerance, f"{name}: relative error {error:.3g}"


def gradients_reach_every_parameter(layer: Any, x: Tensor, subject: Subject) -> None:
    x = x.requires_grad_()
    (layer(x) * draw(*x.shape, seed=3)).sum().backward()
    for name, gradient in parameter_gradients(layer).items():
        assert gradient.isfinite().all(), name
        assert bool(gradient.any()) == (name not in subject.no_gradient), f"{name}: gradient {gradient.norm():.3g}"
    assert x.grad.isfinite().all() and x.grad.abs().sum((0, 2)).gt(0).all(), "every token has a gradient"


def gradients_cross_the_state(layer: Any, x: Tensor, subject: Subject) -> None:
    """Two calls have the gradients of one; where the method stops them, the state that comes out needs none."""
    split = subject.chunk if subject.lacks.split else subject.chunk + 2
    if subject.lacks.state_gradient:
        state = layer(x[:, :split], return_state=True)[1]
        leaves = [leaf for leaf in pytree.tree_leaves(state) if leaf is not None]
        assert not any(leaf.requires_grad for leaf in leaves), "a state that needs gradients"
        pytest.skip(subject.lacks.state_gradient)
    weights = draw(*x.shape, seed=3)
    (layer(x) * weights).sum().backward()
    whole = parameter_gradients(layer)
    layer.zero_grad()
    first, state = layer(x[:, :split], return_state=True)
    (torch.cat([first, layer(x[:, split:], state)], 1) * weights).sum().backward()
    same_gradients(parameter_gradients(layer), whole, subject)


def activation_checkpointing_changes_nothing(layer: Any, x: Tensor, subject: Subject) -> None:
    start, leaves = warm(layer, 3, subject), [x.requires_grad_(), *layer.parameters()]
    gradients = []
    for call in (layer, lambda *args: checkpoint(layer, *args, use_reentrant=False)):
        gradients.append(torch.autograd.grad(call(x, start).square().sum(), leaves, materialize_grads=True))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# --- an ordinary module -----------------------------------------------------------------------------------------------


def deepcopy_and_pickle_keep_it(layer: Any, x: Tensor, subject: Subject) -> None:
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))


def a_state_dict_holds_all_of_it(layer: Any, x: Tensor, subject: Subject) -> None:
    other = fresh(subject, seed=7)
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


def the_meta_device_then_reset_parameters_gives_a_new_layer(layer: Any, x: Tensor, subject: Subject) -> None:
    meta = subject.make(device="meta")
    assert all(p.is_meta for p in meta.parameters())
    y, state = meta(x.to("meta"), return_state=True)  # where no value can be read on the host
    assert y.is_meta and y.shape == x.shape
    assert all(leaf.is_meta for leaf in pytree.tree_leaves(state) if leaf is not None)
    torch.manual_seed(7)
    meta.to_empty(device=torch.get_default_device()).reset_parameters()
    torch.manual_seed(7)
    made = subject.make()
    for (name, p), q in zip(meta.named_parameters(), made.parameters(), strict=True):
        assert p.isfinite().all() and torch.equal(p, q), f"{name} depends on more than reset_parameters"
    close(meta.eval()(x), made.eval()(x), 0.0)


def bfloat16_is_near_float64(layer: Any, x: Tensor, subject: Subject) -> None:
    """As a bfloat16 layer, and as a float32 one under autocast; a step likewise."""
    _lacking(subject.lacks.bfloat16)
    for dtype, ceiling in MEETS_FLOAT64.items():
        narrow = copy.deepcopy(layer).to(dtype)
        exact = copy.deepcopy(narrow).double()
        rounded = x.to(dtype)
        y, state = narrow(rounded, return_state=True)
        truth = exact(rounded.double())
        assert y.dtype == dtype
        close(y, truth, subject.depth * ceiling, f"{dtype}:")
        if subject.lacks.step is None:
            with torch.no_grad():
                token, after = rounded[:, :1], exact(rounded.double(), return_state=True)[1]
                stepped, truth = narrow.step(token, state)[0], exact.step(token.double(), after)[0]
                close(stepped, truth, subject.depth * ceiling, f"{dtype} step:")
    with torch.autocast(x.device.type, torch.bfloat16):
        y, state = layer(x, return_state=True)
        y = layer(x, state) + layer(x, empty(layer, 3, subject)) + y
        if subject.lacks.step is None:
            with torch.no_grad():  # where autocast casts the state and where it does not
                for start in (state.detach().clone(), empty(layer, 3, subject)):
                    assert layer.step(x[:, :1], start)[0].dtype == subject.autocast_dtype
    assert y.dtype == subject.autocast_dtype
    y.float().square().sum().backward()
    assert all(p.grad is None or (p.grad.dtype == p.dtype and p.grad.isfinite().all()) for p in layer.parameters())


def it_compiles_as_one_graph(layer: Any, x: Tensor, subject: Subject) -> None:
    """Forward with a state and backward, under aot_eager."""
    _lacking(subject.lacks.compile)
    torch._dynamo.reset()
    start = warm(layer, 3, subject)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    outputs, gradients = [], []
    for call in (layer, compiled):
        y, state = call(x, start, return_state=True)
        layer.zero_grad()
        (y * x).sum().backward()
        outputs.append((y, state.detach()))
        gradients.append(parameter_gradients(layer))
    close(outputs[1][0], outputs[0][0], subject.tolerance)
    same_memory(layer, outputs[1][1], outputs[0][1], subject)
    same_gradients(gradients[1], gradients[0], subject)


def padding_and_packing_compile(layer: Any, x: Tensor, subject: Subject) -> None:
    _lacking(subject.lacks.compile or (subject.lacks.padding and subject.lacks.packed))
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    if subject.lacks.padding is None:
        mask, x = padding_mask(subject), inputs(subject, len(padding_bounds(subject)))
        close(compiled(x, attention_mask=mask), layer(x, attention_mask=mask), subject.tolerance, "padded:")
    if subject.lacks.packed is None:
        bounds, packed = rows(0, 3, 3, subject.tokens), x[:1]
        close(compiled(packed, cu_seqlens=bounds), layer(packed, cu_seqlens=bounds), subject.tolerance, "packed:")


def the_step_compiles_as_one_graph(layer: Any, x: Tensor, subject: Subject) -> None:
    _lacking(subject.lacks.step or subject.lacks.compile_step or subject.lacks.compile)
    torch._dynamo.reset()
    step = torch.compile(layer.step, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        ours, theirs = empty(layer, 3, subject), empty(layer, 3, subject)
        for token in x[:, :4].split(1, 1):
            close(step(token, ours)[0], layer.step(token, theirs)[0], subject.tolerance)
    same_memory(layer, ours, theirs, subject)


# --- refusals ---------------------------------------------------------------------------------------------------------


def wrong_inputs_are_refused_by_name(layer: Any, x: Tensor, subject: Subject) -> None:
    """Each error names the argument, what came and what is allowed."""
    name, width = type(layer).__name__, subject.embed_dim
    shape = rf"{name}: x has shape \[.*\]; expected \[B, T, embed_dim\] with {width}"
    for wrong in (x[0], x[:, :, : width - 1]):
        with pytest.raises(ValueError, match=shape):
            layer(wrong)
    mask, bounds = torch.ones(1, subject.tokens, dtype=torch.bool), rows(0, subject.tokens)
    if subject.lacks.padding is None and subject.lacks.packed is None:
        with pytest.raises(ValueError, match="attention_mask and cu_seqlens are both given; allowed: one"):
            layer(x[:1], attention_mask=mask, cu_seqlens=bounds)
    if subject.lacks.padding is None and x.device.type == "cpu":
        holes = torch.ones(3, subject.tokens, dtype=torch.bool)
        holes[1, 1] = False
        with pytest.raises(ValueError, match="row 1 has 2 runs of valid tokens; expected one"):
            layer(x, attention_mask=holes)
        with pytest.raises(ValueError, match=r"attention_mask has shape \[1, .*\]; expected \[B, T\]"):
            layer(x, attention_mask=mask)
    with pytest.raises(ValueError, match="shape|batch|rows"):
        layer(x, warm(layer, 2, subject))
    other = SlotMemory(x.new_zeros(3, 1), rows(0, 0, 0)) if name != "WorkingMemory" else StackState()
    with pytest.raises(TypeError, match=rf"is {type(other).__name__}; expected \w+"):
        layer(x, other)
    if subject.lacks.step is None:
        with pytest.raises(ValueError, match=shape):
            layer.step(x[0], empty(layer, 3, subject))
        for wrong in (other, None):
            with pytest.raises(TypeError, match=rf"{name}: state is {type(wrong).__name__}; expected \w+, as of"):
                layer.step(x[:, :1], wrong)
        with pytest.raises(ValueError, match=f"{name}: state has 2 rows; expected 3, one per sequence of x"):
            layer.step(x[:, :1], warm(layer, 2, subject))
        with pytest.raises(ValueError, match=f"{name}.step: x has 0 tokens; expected at least 1"):
            layer.step(x[:, :0], warm(layer, 3, subject))
        with pytest.raises(RuntimeError, match="no_grad|inference"):
            layer.step(x[:, :1], empty(layer, 3, subject))


def its_repr_tells_its_sizes(layer: Any, x: Tensor, subject: Subject) -> None:
    assert str(subject.embed_dim) in layer.extra_repr() or str(subject.embed_dim) in repr(layer)


CHECKS: dict[str, Callable[[Any, Tensor, Subject], None]] = {
    check.__name__: check
    for check in (
        two_calls_equal_one,
        prefill_then_step_equals_one_call,
        step_takes_several_tokens,
        the_state_matters,
        no_sequence_is_no_error,
        no_token_changes_nothing,
        later_tokens_do_not_reach_back,
        a_nan_stays_in_its_sequence,
        padded_rows_equal_their_runs_alone,
        gradients_of_padded_rows,
        packed_sequences_equal_separate_ones,
        states_are_cloned_reordered_and_reset_by_row,
        step_on_a_pool_of_states,
        gradients_reach_every_parameter,
        gradients_cross_the_state,
        activation_checkpointing_changes_nothing,
        deepcopy_and_pickle_keep_it,
        a_state_dict_holds_all_of_it,
        the_meta_device_then_reset_parameters_gives_a_new_layer,
        bfloat16_is_near_float64,
        it_compiles_as_one_graph,
        padding_and_packing_compile,
        the_step_compiles_as_one_graph,
        wrong_inputs_are_refused_by_name,
        its_repr_tells_its_sizes,
    )
}
