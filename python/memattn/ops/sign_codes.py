"""Sign codes: vectors as bit strings, compared by counting bits.

    bit j of code(x) = 1 where (x − center)·R_j > 0, else 0

Two vectors at angle θ differ in each bit of a random R with probability θ/π, so that few differing bits mean a small
angle (Charikar 2002, "Similarity estimation techniques from rounding algorithms"); HashAttention (arXiv 2412.14468)
learns R, HAX (arXiv 2507.00449) centres by the mean. Compare codes with `block_scores(kind="hamming")`. A projection is
an argument, not drawn here: a model that must evaluate alike twice keeps it as a buffer.
"""

from __future__ import annotations

from torch import Tensor

from memattn.ops import _checks as check
from memattn.reference import sign_codes as reference
from memattn.reference.attention import accumulate_dtype

OP = "sign_codes"


def sign_codes(x: Tensor, projection: Tensor, *, center: Tensor | None = None) -> Tensor:
    """Codes [..., ⌈bits/32⌉] int32 of vectors x [..., D]; bit j lies in word j // 32 at j mod 32, further bits are 0.

    x: float32, bfloat16, float16 or float64. projection [D, bits] and center [D], or broadcast to x: x's dtype or
    float32. Projected in float32 (float64). A NaN sets no bit. Plain torch; carries no gradient. Raises ValueError,
    TypeError.
    """
    check.tensor(OP, "x", x)
    check.dtype(OP, "x", x, check.FLOATS)
    if x.dim() < 1:
        raise ValueError(f"{OP}: x has shape []; expected [..., D]")
    check.rank(OP, "projection", projection, "[D, bits]")
    check.shape(OP, "projection", projection, "[D, bits]", (x.shape[-1], projection.shape[1]))
    if not projection.shape[1]:
        raise ValueError(f"{OP}: projection has shape {list(projection.shape)}; expected at least one bit")
    given = {"projection": projection} | ({} if center is None else {"center": center})
    for name, tensor in given.items():
        check.tensor(OP, name, tensor)
        check.dtype(OP, name, tensor, (x.dtype, accumulate_dtype(x.dtype)), f" with {check.dtype_name(x.dtype)} x")
        check.device(OP, name, tensor, x, "x")
    if center is not None and center.shape[-1:] != x.shape[-1:]:
        raise ValueError(f"{OP}: center has shape {list(center.shape)}; expected [..., D] with D = {x.shape[-1]}")
    return reference.chunked(x.detach(), projection.detach(), center=None if center is None else center.detach())
