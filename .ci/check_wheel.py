"""Imports the installed wheel away from the source tree and uses each part that was built."""

import sys
from pathlib import Path

import torch

import memattn
from memattn import _native
from memattn.ops import gated_delta_rule

location = Path(memattn.__file__).parent
assert location.is_relative_to(sys.prefix), f"memattn was imported from {location}, not from the wheel in {sys.prefix}"
for name in _native.build_info()["built"]:
    reason = _native.native_reason(name)
    assert reason is None or (name == "_C_cuda" and torch.version.cuda is None), f"{name}: {reason}"

import memattn.kernels.gated_delta_rule as kernel  # noqa: E402

assert Path(kernel.__file__).is_relative_to(location), f"the Triton kernels were imported from {kernel.__file__}"

q, k, v = torch.randn(3, 1, 8, 2, 16).unbind()
assert gated_delta_rule(q, k, v, backend="cpu")[0].isfinite().all()
print(f"memattn {memattn.__version__} works from {location}")
