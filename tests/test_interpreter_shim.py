"""bfloat16 in Triton's interpreter: repaired, and the self-test that guards the repair notices when it is not."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")


@pytest.fixture
def shim(device, interpreter):
    from support import interpreter as module

    if device != "cpu" or not module.available():
        pytest.skip("the interpreter is not in use")
    return module


def test_repaired(shim):
    shim.self_test()


def test_casts_match_torch_bit_for_bit(shim):
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    numbers = bits[~bits.isnan()].float()
    assert torch.equal(torch.from_numpy(shim.widen(numbers.bfloat16().view(torch.int16).numpy().view("u2"))), numbers)
    # Halfway between neighbours and just beside it: every rounding decision there is.
    for offset in (0x7FFF, 0x8000, 0x8001):
        x = (numbers.view(torch.int32) + offset).view(torch.float32)
        x = x[~x.isnan()]
        ours = torch.from_numpy(shim.narrow(x.numpy()).view("i2")).view(torch.bfloat16)
        assert torch.equal(ours, x.bfloat16()), f"offset {offset:#x}"


@pytest.mark.parametrize(
    "entry,noticed", [("create_dot", "dot"), ("binary_op", "add"), ("unary_op", "neg"), ("cast_impl", "to bfloat16")]
)
def test_a_lost_patch_is_noticed(shim, monkeypatch, entry, noticed):
    """Undo one patch at a time, as a Triton that renamed its internals would."""
    patched = getattr(shim.InterpreterBuilder, entry)
    monkeypatch.setattr(shim.InterpreterBuilder, entry, patched.__closure__[0].cell_contents)
    with pytest.raises(Exception, match=noticed):
        shim.self_test()


def test_missing_entry_is_named(shim, monkeypatch):
    monkeypatch.setattr(shim.InterpreterBuilder, "repaired_bfloat16", False)
    monkeypatch.delattr(shim.InterpreterBuilder, "create_clampf")
    with pytest.raises(RuntimeError, match="no longer has create_clampf"):
        shim.install()
