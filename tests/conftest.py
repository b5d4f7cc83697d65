"""Where tests run (--device), how much (--full), and what makes a CPU stand in for a GPU: Triton's interpreter."""

import os
import sys

import pytest


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where the ops run")
    parser.addoption("--full", action="store_true", help="full matrices, all architectures")


def pytest_configure(config):
    # `import kernels` from the source root would make a second copy of every kernel (and pass for another package of
    # that name); they are memattn.kernels.
    sys.modules.setdefault("kernels", None)
    # Must be in place before the first import of Triton decides what @triton.jit makes.
    if config.getoption("--device") == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def device(request) -> str:
    """The device that the ops' tensors live on."""
    return request.config.getoption("--device")


@pytest.fixture(scope="session")
def full(request) -> bool:
    """Whether to run the full matrices."""
    return request.config.getoption("--full")


@pytest.fixture(scope="session")
def interpreter(device):
    """Triton kernels on CPU tensors, with bfloat16 repaired; skips where there is no Triton."""
    pytest.importorskip("triton", reason="triton is not installed")
    if device == "cpu":
        from support.interpreter import install

        install()


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that torch hands out uninitialised holds NaN, so that a result nobody wrote shows."""
    import torch

    def poison(make):
        def poisoned_make(*args, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() and x.device.type != "meta" else x

        return poisoned_make

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))


@pytest.fixture(autouse=True)
def _seeded():
    import torch

    torch.manual_seed(0)
