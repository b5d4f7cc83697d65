"""Slot gate: how much of a gathered update is written into the slots of a memory.

    kind       m' of slot m and update y                       parameters
    "bias"     g m + (1 − g) y, g = σ(bias)                    bias [D]
    "full"     g m + (1 − g) y, g = σ(logits)                  logits [N, M, D]
    "ema"      a m + (1 − a) y                                 decay a in 0..1: [], [D], [N, M, 1] or [N, M, D]
    "lstm"     σ(forget) m + σ(input) y                        forget, input [N, M, D]
    "gru"      a GRU cell with input y and state m             weight_ih, weight_hh [3D, D], bias_ih, bias_hh [3D]
    "bias_l2"  (y + bias) / ‖y + bias‖                         bias [D] or [M, D]

Sources: "bias", "full" and "lstm" are the gates of Block-Recurrent Transformers (Hutchins et al. 2022, arXiv
2203.07852), whose logits come from a projection with 1 added for keeping and 1 taken off for writing; "ema" MemBART's
a M + (1 − a) M_old with the roles of a and 1 − a exchanged, so that a is always what is kept; "gru" slot attention's
(Locatello et al. 2020, arXiv 2006.15055), gates in torch.nn.GRUCell's order; "bias_l2" Memformer's (arXiv 2010.06891),
whose slot enters through its own key.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memattn.ops import _checks as check
from memattn.reference.attention import accumulate_dtype

OP = "slot_gate"
PARAMETERS = {
    "bias": ("bias",), "full": ("logits",), "ema": ("decay",), "lstm": ("forget", "input"),
    "gru": ("weight_ih", "weight_hh", "bias_ih", "bias_hh"), "bias_l2": ("bias",),
}  # fmt: skip
L2_EPS = 1e-12  # least norm that is divided by, as in torch.nn.functional.normalize


def _layouts(name: str, kind: str, slots: Tensor) -> dict[str, tuple[int, ...]]:
    """Allowed layouts of parameter `name`."""
    n, m, d = slots.shape
    one_per_slot: dict[str, tuple[int, ...]] = {"[M, D]": (m, d)}
    each: dict[str, tuple[int, ...]] = {"[N, M, D]": (n, m, d)}
    layouts: dict[str, dict[str, tuple[int, ...]]] = {
        "bias": {"[D]": (d,), **(one_per_slot if kind == "bias_l2" else {})},
        "logits": each, "forget": each, "input": each, "decay": {"[]": (), "[D]": (d,), "[N, M, 1]": (n, m, 1), **each},
        "weight_ih": {"[3D, D]": (3 * d, d)}, "weight_hh": {"[3D, D]": (3 * d, d)},
        "bias_ih": {"[3D]": (3 * d,)}, "bias_hh": {"[3D]": (3 * d,)},
    }  # fmt: skip
    return layouts[name]


def _check(slots, update, kind, parameters):
    check.rank(OP, "slots", slots, "[N, M, D]")
    check.dtype(OP, "slots", slots, check.FLOATS)
    check.shape(OP, "update", update, "[N, M, D]", slots.shape)
    check.dtype(OP, "update", update, check.FLOATS)
    check.device(OP, "update", update, slots, "slots")
    check.choice(OP, "kind", kind, tuple(PARAMETERS))
    if set(parameters) != set(PARAMETERS[kind]):
        raise ValueError(
            f"{OP}: kind {kind!r} got parameters {sorted(parameters) or 'none'}; expected {list(PARAMETERS[kind])}"
        )
    for name, x in parameters.items():
        check.tensor(OP, name, x)
        check.dtype(OP, name, x, check.FLOATS)
        check.device(OP, name, x, slots, "slots")
        layouts = _layouts(name, kind, slots)
        if tuple(x.shape) not in layouts.values():
            allowed = " or ".join(layouts)
            raise ValueError(
                f"{OP}: {name} has shape {list(x.shape)}; expected {allowed} with slots {list(slots.shape)}"
            )


def slot_gate(slots: Tensor, update: Tensor, kind: str, **parameters: Tensor) -> Tensor:
    """The new slots [N, M, D]; the module docstring has the table of kinds and their parameters.

    slots, update [N, M, D] and the parameters may differ in float dtype (16-bit updates beside float32 slots). Gates
    are computed in float32 (float64 with float64 slots), the result has slots' dtype. Plain torch, differentiable any
    number of times in all tensors. A zero vector stays zero under "bias_l2".

    Raises ValueError, TypeError.
    """
    _check(slots, update, kind, parameters)
    dtype = accumulate_dtype(slots.dtype)
    m, y, p = slots.to(dtype), update.to(dtype), {name: x.to(dtype) for name, x in parameters.items()}
    if kind == "gru":
        with torch.autocast(slots.device.type, enabled=False):
            new = torch.gru_cell(y.flatten(0, 1), m.flatten(0, 1), *(p[name] for name in PARAMETERS["gru"])).view_as(m)
    elif kind == "lstm":
        new = p["forget"].sigmoid() * m + p["input"].sigmoid() * y
    elif kind == "bias_l2":
        new = torch.nn.functional.normalize(y + p["bias"], dim=-1, eps=L2_EPS)
    else:
        keep = p["decay"] if kind == "ema" else p["bias" if kind == "bias" else "logits"].sigmoid()
        new = y + keep * (m - y)
    return new.to(slots.dtype)
