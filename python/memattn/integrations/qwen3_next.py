"""Hugging Face's Qwen3-Next with this package's ops in place of its torch functions.

`patch(model)` changes the linear-attention layers of one model and nothing else: no module, class or other model is
touched, and `unpatch(model)` restores it. The layer's own forward keeps running with four of its functions replaced:
the chunked rule, the recurrent rule, the causal convolution and its single-token update. Dynamic and static caches
keep their layout. `to_gated_delta_net(layer)` copies one layer's weights into `memattn.nn.GatedDeltaNet`.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memattn.nn import GatedDeltaNet
from memattn.ops.causal_conv1d import causal_conv1d
from memattn.ops.gated_delta_rule import gated_delta_rule, gated_delta_rule_step

LAYER = "Qwen3NextGatedDeltaNet"
TESTED_VERSIONS = ("5.0.0", "5.8.0", "5.16.0", "5.23.0")
_SAVED = "_memattn_saved"  # on a patched layer: its own attributes from before


@dataclass(frozen=True)
class PatchedLayer:
    """One layer: its name in the model, the functions replaced, and where it looks them up.

    via is "forward" where the layer calls functions of its module (transformers ≥ 5.16; the layer gets its own copy of
    that method), "attributes" where it calls its own attributes (earlier versions).
    """

    name: str
    functions: tuple[str, ...]
    via: str


def patch(model: nn.Module, backend: str | None = None, dry_run: bool = False) -> list[PatchedLayer]:
    """Let every Qwen3-Next linear-attention layer inside `model` use memattn's ops; returns what changed.

    backend: as in the ops, None chooses per call. dry_run: only say what would change. While generating, the recurrent
    state is updated in the cache's own tensor. Packed sequences (`cu_seq_lens_q`) are kept apart, which the torch
    functions refuse. state_dict, save_pretrained and deepcopy work on a patched model; unpatch before pickling it.
    """
    plans = [(layer, _plan(name, layer, backend)) for name, layer in _layers(model, "patch")]
    for layer, (_, attributes) in plans:
        if not dry_run:
            _restore(layer)
            _set(layer, attributes)
    return [change for _, (change, _) in plans]


def unpatch(model: nn.Module) -> list[str]:
    """Undo `patch`; returns the names of the layers that had been changed."""
    return [name for name, layer in _layers(model, "unpatch") if _restore(layer)]


@torch.no_grad()
def to_gated_delta_net(layer: Any, backend: str | None = None) -> GatedDeltaNet:
    """A GatedDeltaNet with a copy of the weights of one Qwen3NextGatedDeltaNet; same outputs, float32 to rounding.

    Qwen3-Next stores its projections interleaved by key head: rows of in_proj_qkvz are, for each key head, its query,
    its key, its value heads and their gates; rows of in_proj_ba its β and its decay logits.
    """
    weight = layer.in_proj_qkvz.weight
    heads, key_dim, value_dim, values = layer.num_k_heads, layer.head_k_dim, layer.head_v_dim, layer.num_v_heads
    group = values // heads
    ours = GatedDeltaNet(
        weight.shape[1],
        heads,
        head_dim=key_dim,
        num_value_heads=values,
        value_head_dim=value_dim,
        conv_size=layer.conv_kernel_size,
        conv_bias=layer.conv1d.bias is not None,
        norm_eps=layer.layer_norm_epsilon,
        backend=backend,
        device=weight.device,
        dtype=weight.dtype,
    )
    per_head = weight.unflatten(0, (heads, -1)).split([key_dim, key_dim, group * value_dim, group * value_dim], 1)
    q, k, v, gate = (part.flatten(0, 1) for part in per_head)
    beta, decay = (part.flatten(0, 1) for part in layer.in_proj_ba.weight.unflatten(0, (heads, -1)).chunk(2, 1))
    weights = {
        "qkv_proj.weight": torch.cat([q, k, v]),
        "gate_proj.weight": gate,
        "beta_proj.weight": beta,
        "decay_proj.weight": decay,
        "conv.weight": layer.conv1d.weight.squeeze(1),
        "A_log": layer.A_log,
        "dt_bias": layer.dt_bias,
        "norm.weight": layer.norm.weight,
        "out_proj.weight": layer.out_proj.weight,
    }
    if layer.conv1d.bias is not None:
        weights["conv.bias"] = layer.conv1d.bias
    ours.load_state_dict(weights)
    return ours


# --- finding and changing layers --------------------------------------------------------------------------------------


def _layers(model: nn.Module, caller: str) -> list[tuple[str, Any]]:
    found = [(name, m) for name, m in model.named_modules() if LAYER in (c.__name__ for c in type(m).__mro__)]
    if not found:
        raise ValueError(f"{caller}: {type(model).__name__} has no {LAYER} layer")
    return found


def _bare(name: str) -> str:
    return name.removeprefix("torch_")


def _plan(name: str, layer: nn.Module, backend: str | None) -> tuple[PatchedLayer, dict[str, Any]]:
    """What to report of one layer, and the attributes that change it."""
    calls = inspect.unwrap(type(layer).forward).__code__.co_names
    functions = {call: _MAKERS[_bare(call)](backend) for call in calls if _bare(call) in _MAKERS}
    if not functions:
        raise NotImplementedError(
            f"patch: {name}.forward calls none of the functions known here ({', '.join(_MAKERS)}); "
            f"tested with transformers {', '.join(TESTED_VERSIONS)}"
        )
    if "torch_chunk_gated_delta_rule" not in functions:
        return PatchedLayer(name, tuple(functions), "attributes"), functions
    if "forward" in vars(layer) and _SAVED not in vars(layer):
        raise RuntimeError(
            f"patch: forward of {name} is already replaced, e.g. by an accelerate hook; patch before adding hooks"
        )
    forward = types.MethodType(_with_globals(type(layer).forward, functions), layer)
    return PatchedLayer(name, tuple(functions), "forward"), {"forward": forward}


def _with_globals(function: Any, replacements: dict[str, Callable]) -> Callable:
    """A copy of `function` that sees `replacements` under their global names; decorators around it are kept."""
    if inner := getattr(function, "__wrapped__", None):
        changed = _with_globals(inner, replacements)
        cells = [types.CellType(changed) if c.cell_contents is inner else c for c in function.__closure__]
        return _copy(function, function.__globals__, tuple(cells))
    names = {**function.__globals__, **replacements}
    # With a module's name, torch.compile would look the globals up in that module and find the originals.
    del names["__name__"]
    return _copy(function, names, function.__closure__)


def _copy(function: Any, names: dict[str, Any], closure: tuple | None) -> types.FunctionType:
    copy = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, closure)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _set(layer: nn.Module, attributes: dict[str, Any]) -> None:
    vars(layer)[_SAVED] = {name: vars(layer)[name] for name in attributes if name in vars(layer)}, tuple(attributes)
    vars(layer).update(attributes)


def _restore(layer: nn.Module) -> bool:
    before, changed = vars(layer).pop(_SAVED, ({}, ()))
    for name in changed:
        del vars(layer)[name]
    vars(layer).update(before)
    return bool(changed)


# --- Hugging Face's functions by our ops: their argument names and layouts --------------------------------------------


def _chunk_rule(backend: str | None) -> Callable:
    def chunk_gated_delta_rule(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        chunk_size: int | None = None,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        cu_seqlens: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        return gated_delta_rule(
            query,
            key,
            value,
            g,
            beta,
            initial_state=None if initial_state is None else initial_state.to(g.dtype),
            output_final_state=output_final_state,
            qk_l2norm=use_qk_l2norm_in_kernel,
            cu_seqlens=cu_seqlens,
            chunk_size=chunk_size,
            backend=backend,
        )

    return chunk_gated_delta_rule


def _recurrent_rule(backend: str | None) -> Callable:
    parallel = _chunk_rule(backend)

    def recurrent_gated_delta_rule(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        cu_seqlens: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if torch.is_grad_enabled() or initial_state is None or cu_seqlens is not None:
            return parallel(
                query,
                key,
                value,
                g,
                beta,
                initial_state=initial_state,
                output_final_state=output_final_state,
                use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
                cu_seqlens=cu_seqlens,
            )
        # The caller stores what is returned over initial_state, so updating it in place saves two copies of the state.
        state = initial_state.to(g.dtype).contiguous()
        o = gated_delta_rule_step(query, key, value, g, beta, state, qk_l2norm=use_qk_l2norm_in_kernel, backend=backend)
        return o, state if output_final_state else None

    return recurrent_gated_delta_rule


def _conv(backend: str | None) -> Callable:
    def causal_conv1d_fn(
        hidden_states: Any = None,
        weight: Any = None,
        bias: Tensor | None = None,
        activation: str | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        x: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """hidden_states, named x before transformers 5.16: [B, D, T] -> [B, D, T]."""
        tokens = hidden_states if x is None else x
        if seq_idx is not None and cu_seq_lens_q is None:
            raise ValueError("causal_conv1d_fn: seq_idx is given without cu_seq_lens_q; packing needs the latter")
        y, _ = causal_conv1d(
            tokens.transpose(1, 2), weight, bias, activation=activation, cu_seqlens=cu_seq_lens_q, backend=backend
        )
        return y.transpose(1, 2)

    return causal_conv1d_fn


def _conv_update(backend: str | None) -> Callable:
    def causal_conv1d_update(
        hidden_states: Tensor,
        conv_state: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        """hidden_states [B, D, t] -> [B, D, t]; conv_state [B, D, ≥ W−1] takes the new inputs in at its end."""
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        tail = conv_state[..., conv_state.shape[-1] - weight.shape[-1] + 1 :].to(dtype)
        y, _ = causal_conv1d(
            hidden_states.transpose(1, 2), weight, bias, activation=activation, initial_state=tail, backend=backend
        )
        seen = torch.cat([conv_state, hidden_states.to(conv_state.dtype)], -1)
        conv_state.copy_(seen[..., -conv_state.shape[-1] :])
        return y.transpose(1, 2)

    return causal_conv1d_update


_MAKERS: dict[str, Callable[[str | None], Callable]] = {
    "chunk_gated_delta_rule": _chunk_rule,
    "recurrent_gated_delta_rule": _recurrent_rule,
    "causal_conv1d_fn": _conv,
    "causal_conv1d_update": _conv_update,
}
