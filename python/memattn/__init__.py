"""Memory attention: recurrent and retrieval memories as torch ops and modules, on CPU and CUDA.

`memattn.ops` holds the functions, `memattn.nn` the modules; `python -m memattn info` says what runs on this machine.
"""

from pathlib import Path

__version__ = "0.1.0"

# Installed, the Triton kernels are the subpackage memattn.kernels. In a source tree used through PYTHONPATH=python they
# lie beside python/, so the package looks there too.
_root = Path(__file__).resolve().parents[2]
if not (Path(__file__).parent / "kernels").is_dir() and (_root / "kernels").is_dir():
    __path__.append(str(_root))

from memattn import ops  # noqa: E402
from memattn.backends import BackendError, use_backend  # noqa: E402
from memattn.pool import KVPool  # noqa: E402

__all__ = ["BackendError", "KVPool", "ops", "use_backend"]
