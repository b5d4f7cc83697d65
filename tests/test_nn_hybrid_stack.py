"""HybridStack: blocks of several kinds in a ratio, called as one layer."""

from pathlib import Path

import pytest
import torch
from support import layers
from support.layers import Lacks, Subject, draw

from memattn.nn import DeltaNet, GatedDeltaNet, HybridStack, RecurrentMemory
from memattn.nn.hybrid_stack import LAYERS, parse_spec

EMBED = 32
SMALL = {"hidden_dim": 32}
WINDOWS = {"swa": {"window": 6}, "lizard": {"window": 5, "feature_dim": 8}}
STACK = {"depth": 3, "autocast_dtype": torch.float32}
SUBJECTS = {
    "gdn:2,deltanet:1": Subject(
        lambda **kw: HybridStack(EMBED, 2, "gdn:2,deltanet:1", **SMALL, **kw), EMBED, 16, **STACK
    ),
    "gdn:1,swa:1,lizard:1": Subject(
        lambda **kw: HybridStack(EMBED, 2, "gdn,swa,lizard", options=WINDOWS, **SMALL, **kw), EMBED, **STACK
    ),
    "a growing cache": Subject(
        lambda **kw: HybridStack(EMBED, 2, "lizard,fox", options={"lizard": WINDOWS["lizard"]}, **SMALL, **kw),
        EMBED,
        state_options={"max_tokens": 40},
        **STACK,
    ),
    "inside a recurrent memory": Subject(
        lambda **kw: RecurrentMemory(
            HybridStack(EMBED, 2, "gdn,swa", options={"swa": WINDOWS["swa"]}, **SMALL, **kw),
            EMBED,
            2,
            segment_size=8,
            **kw,
        ),
        EMBED,
        lacks=Lacks(pool="step takes no state_indices"),
        **STACK,
    ),
}


@pytest.fixture(autouse=True)
def on_device(device):
    """Layers and inputs are made where --device says."""
    torch.set_default_device(None if device == "cpu" else device)
    yield
    torch.set_default_device(None)


@pytest.mark.parametrize("subject, check", layers.matrix(SUBJECTS, compiled=("gdn:1,swa:1,lizard:1",)))
def test_promises_of_a_layer(subject, check):
    layers.run(check, subject)


def test_it_is_blocks_with_residuals():
    stack, x = layers.fresh(SUBJECTS["gdn:2,deltanet:1"]), draw(2, 20, EMBED)
    y = x
    for block in stack.blocks:
        y = y + block.mixer(block.mixer_norm(y))
        y = y + block.mlp(block.mlp_norm(y))
    layers.close(stack(x), y, 0.0)


def test_long_prompts_go_through_the_mlp_in_pieces(monkeypatch):
    from memattn.nn import residual_block

    stack, x = layers.fresh(SUBJECTS["gdn:2,deltanet:1"]), draw(2, 20, EMBED)
    kept, y = x.clone(), stack(x)
    monkeypatch.setattr(residual_block, "_PIECE", 7)
    with torch.no_grad():
        layers.close(stack(x), y, 1e-6)
    assert torch.equal(x, kept)


def test_the_ratio_is_repeated_up_to_the_depth():
    stack = HybridStack(EMBED, 2, "gdn:3,deltanet", depth=6, **SMALL)
    assert [type(block.mixer) for block in stack.blocks] == [*[GatedDeltaNet] * 3, DeltaNet, *[GatedDeltaNet] * 2]
    made = []

    def own(embed_dim, num_heads, **kwargs):
        made.append((embed_dim, num_heads))
        return DeltaNet(embed_dim, num_heads, conv_size=2, **kwargs)

    stack = HybridStack(EMBED, 2, [GatedDeltaNet, own], depth=3)
    assert made == [(EMBED, 2)] and stack.blocks[1].mixer.conv.weight.shape[1] == 2
    assert stack.blocks[0].mlp.inward.weight.shape == (2 * 96, EMBED)
    stack = HybridStack(EMBED, 2, "gdn,deltanet", options={"deltanet": {"conv_size": 3}})
    assert [block.mixer.conv.weight.shape[1] for block in stack.blocks] == [4, 3]


def test_a_growing_cache_inside_a_recurrent_memory_outgrows_its_first_room():
    layer = RecurrentMemory(HybridStack(EMBED, 2, "fox", **SMALL), EMBED, 40, segment_size=100).eval()
    x = draw(2, 230, EMBED)
    with torch.no_grad():
        state, outputs = layer.init_state(2), []
        for token in x.split(1, 1):
            outputs.append(layer.step(token, state)[0])
        layers.close(torch.cat(outputs, 1), layer(x), 1e-5)


def test_every_named_layer_can_be_stacked():
    x = draw(1, 5, EMBED)
    for name in LAYERS:
        required = {"swa": {"window": 4}, "infini": {"segment_size": 4}}
        options = {name: required[name]} if name in required else None
        y, state = HybridStack(EMBED, 2, name, options=options, **SMALL)(x, return_state=True)
        assert y.shape == x.shape and len(state.layers) == 1, name


def test_the_state_holds_those_of_the_layers():
    stack = HybridStack(EMBED, 2, "gdn,deltanet", **SMALL)
    state = stack.init_state(3)
    assert len(state.layers) == 2 and state.batch == 3 and state.layer1.memory.shape == (3, 2, 16, 16)
    assert repr(state).startswith("StackState(layer0=DeltaRuleState(memory=float32 [3, 2, 16, 16] on cpu, conv=")


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: parse_spec("gdn:3,atn:1"), "got 'atn' in 'gdn:3,atn:1'; allowed names: gdn, deltanet"),
        (lambda: parse_spec("gdn:0"), "got '0' after 'gdn' in 'gdn:0'; allowed: a whole number ≥ 1"),
        (lambda: parse_spec("gdn:"), "got '' after 'gdn' in 'gdn:'; allowed: a whole number ≥ 1"),
        (lambda: parse_spec(""), "got '' in ''; allowed names: gdn"),
        (lambda: HybridStack(EMBED, 2, []), "layers is \\[\\] and depth is None; allowed: at least one block"),
        (lambda: HybridStack(EMBED, 2, "gdn", depth=0), "depth is 0; allowed: at least one block"),
        (lambda: HybridStack(EMBED, 2, "gdn", options={"deltanet": {}}), "options are for deltanet; allowed: gdn"),
        (lambda: HybridStack(EMBED, 2, [DeltaNet], options={"deltanet": {}}), "allowed only with a spec of names"),
        (
            lambda: HybridStack(EMBED, 2, "gdn")(draw(1, 3, EMBED), HybridStack(EMBED, 2, "gdn:2").init_state(1)),
            "state has 2 layers; expected 1, one per block",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_option_that_no_layer_takes_is_refused():
    with pytest.raises(TypeError, match="init_state got max_tokens, which no layer takes"):
        HybridStack(EMBED, 2, "gdn").init_state(2, max_tokens=8)


def test_the_page():
    layers.run_page(Path(__file__).resolve().parent.parent / "docs" / "hybrid_stack.md", 3)
