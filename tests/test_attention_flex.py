"""Attention's masks against FlexAttention, which is given each as a function of its own: o and the log-sum-exp.

Forward only: torch 2.13 has no backward of FlexAttention on the CPU.
"""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from memattn.ops import attention

QUERIES, HEADS, KEY_HEADS, DIM = 90, 4, 2, 16
# Arguments of the op, number of keys, and the mask in its own words: query i sees key j.
MASKS = {
    "causal": ({}, 90, lambda b, h, i, j: i >= j),
    "full": ({"causal": False}, 70, lambda b, h, i, j: j >= 0),
    "window of 7": ({"window": 7}, 90, lambda b, h, i, j: (i >= j) & (i - j <= 6)),
    "window of 1": ({"window": 1}, 90, lambda b, h, i, j: i == j),
    "prefix and window": ({"prefix_len": 5, "window": 9}, 90, lambda b, h, i, j: (j < 5) | ((i >= j) & (i - j < 9))),
    "inside blocks": ({"block_size": 16}, 90, lambda b, h, i, j: (i >= j) & (i // 16 == j // 16)),
    "causal over blocks": ({"causal": "block", "block_size": 16}, 90, lambda b, h, i, j: i // 16 >= j // 16),
    "chunk ends": ({"chunk_rule": ("summary", 16)}, 6, lambda b, h, i, j: i // 16 > j),
    "dilated": (
        {"chunk_rule": ("dilated", 8, 3, 2)},
        90,
        lambda b, h, i, j: (i >= j) & (((j + 1) % 8 == 0) | (i - j < 3) | (j < 2)),
    ),
    "later queries": ({"q_offset": 20, "window": 30}, 110, lambda b, h, i, j: (i + 20 >= j) & (i + 20 - j < 30)),
}
SCORES = {
    "alibi": ({"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.01])},
              lambda s, c, slopes, h, i, j: s - slopes[h] * (i - j)),
    "decay": ({"log_decay": -torch.rand(1, 90, 4, generator=torch.Generator().manual_seed(3))},
              lambda s, c, slopes, h, i, j: s + c[0, i, h] - c[0, j, h]),
}  # fmt: skip


def draw(keys, device):
    generator = torch.Generator().manual_seed(0)
    shapes = ((QUERIES, HEADS), (keys, KEY_HEADS), (keys, KEY_HEADS))
    return [torch.randn(1, *shape, DIM, generator=generator).to(device) for shape in shapes]


def assert_same(ours, theirs):
    (o, lse), (expected, sums) = ours, theirs
    torch.testing.assert_close(o.transpose(1, 2), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse.transpose(1, 2), sums.masked_fill(sums < -1e30, -torch.inf), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "chunked"])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_mask(name, backend, device):
    if device != "cpu" and backend == "cpu":
        backend = "triton"
    arguments, keys, visible = MASKS[name]
    q, k, v = draw(keys, device)
    mask = create_block_mask(visible, 1, 1, QUERIES, keys, device=device, BLOCK_SIZE=16)
    theirs = flex_attention(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask, enable_gqa=True, return_lse=True)
    assert_same(attention(q, k, v, **arguments, backend=backend), theirs)


@pytest.mark.parametrize("backend", ["cpu", "chunked"])
@pytest.mark.parametrize("name", SCORES)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_score(name, backend, device):
    if device != "cpu" and backend == "cpu":
        backend = "triton"
    arguments, change = SCORES[name]
    arguments = {n: x.to(device) for n, x in arguments.items()}
    q, k, v = draw(QUERIES, device)
    total = arguments["log_decay"].cumsum(1) if "log_decay" in arguments else None

    def score(s, b, h, i, j):
        return torch.where(i >= j, change(s, total, arguments.get("alibi_slopes"), h, i, j), -torch.inf)

    theirs = flex_attention(*(x.transpose(1, 2) for x in (q, k, v)), score_mod=score, enable_gqa=True, return_lse=True)
    assert_same(attention(q, k, v, **arguments, backend=backend), theirs)
