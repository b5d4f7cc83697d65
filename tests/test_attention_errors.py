"""Bad input to attention: one error naming the argument, what was received and what is allowed."""

# ruff: noqa: E501 (tables, one case a line)
import pytest
import torch
from support.attention import case

import memattn
from memattn.ops import attention

CASE = case("errors", heads=4, key_heads=2, queries=6)
PACKED = case("errors", heads=4, key_heads=2, lengths=((4, 4), (2, 2)))


def x(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


DECAY, SLOPES = {"log_decay": -torch.ones(2, 6, 4)}, {"alibi_slopes": torch.ones(4)}
BAD = {
    "q rank": (dict(q=x(6, 4, 16)), ValueError, r"q has shape \[6, 4, 16\] of rank 3; expected \[B, Tq, HQ, K\]"),
    "q type": (dict(q=[1.0]), TypeError, "q is list; expected a torch.Tensor"),
    "q dtype": (dict(q=x(2, 6, 4, 16, dtype=torch.int64)), TypeError, "q is int64; expected float32 or bfloat16"),
    "k dtype": (dict(k=x(2, 6, 2, 16, dtype=torch.float16)), TypeError, "k is float16; expected float32 like q"),
    "k batch": (
        dict(k=x(3, 6, 2, 16)),
        ValueError,
        r"k has shape \[3, 6, 2, 16\]; expected \[B, Tk, HKV, K\] = \[2, 6, 2, 16\]",
    ),
    "k dim": (dict(k=x(2, 6, 2, 24)), ValueError, r"k has shape \[2, 6, 2, 24\]; expected .* = \[2, 6, 2, 16\]"),
    "v length": (dict(v=x(2, 5, 2, 24)), ValueError, r"v has shape \[2, 5, 2, 24\]; expected .* = \[2, 6, 2, 24\]"),
    "v device": (dict(v=x(2, 6, 2, 24, device="meta")), ValueError, "v is on meta; expected cpu like q"),
    "heads": (dict(q=x(2, 6, 3, 16)), ValueError, "q has 3 heads; expected a positive multiple of k's 2 heads"),
    "head dim": (dict(q=x(2, 6, 4, 8), k=x(2, 6, 2, 8)), ValueError, "head dimension K is 8; allowed: 16..256"),
    "value dim": (dict(v=x(2, 6, 2, 257)), ValueError, "head dimension V is 257; allowed: 16..256"),
    "sink shape": (dict(sink=x(2)), ValueError, r"sink has shape \[2\]; expected \[HQ\] or \[HQ, r\] = \[4\]"),
    "sink dtype": (dict(sink=x(4, dtype=torch.float64)), TypeError, "sink is float64; expected float32"),
    "decay shape": (
        dict(log_decay=x(2, 6, 2)),
        ValueError,
        r"log_decay has shape \[2, 6, 2\]; expected \[B, Tk, HQ\] = \[2, 6, 4\]",
    ),
    "decay dtype": (
        dict(log_decay=x(2, 6, 4, dtype=torch.float16)),
        TypeError,
        "log_decay is float16; expected float32",
    ),
    "decay sign": (
        dict(log_decay=x(2, 6, 4) + 0.5),
        ValueError,
        "log_decay has a value of 0.5; a natural-log decay must be ≤ 0",
    ),
    "slopes shape": (dict(alibi_slopes=x(2)), ValueError, r"alibi_slopes has shape \[2\]; expected \[HQ\] = \[4\]"),
    "decay reach": (
        dict(**DECAY, q_offset=1),
        ValueError,
        "the last query has position 6 and there are 6 keys; with log_decay every query",
    ),
    "slopes reach": (
        dict(**SLOPES, q_offset=2),
        ValueError,
        "the last query has position 7 .* with alibi_slopes every query",
    ),
    "causal": (dict(causal="chunk"), ValueError, "causal is 'chunk'; allowed: True, False, 'block'"),
    "window": (dict(window=0), ValueError, "window is 0; expected an integer ≥ 1 or None"),
    "window type": (dict(window=2.0), ValueError, "window is 2.0; expected an integer ≥ 1 or None"),
    "block size": (dict(block_size=0), ValueError, "block_size is 0; expected an integer ≥ 1 or None"),
    "prefix": (dict(prefix_len=-1), ValueError, "prefix_len is -1; expected an integer ≥ 0"),
    "offset": (dict(q_offset=-1), ValueError, "q_offset is -1; expected an integer ≥ 0"),
    "rule": (
        dict(chunk_rule=("chunks", 4)),
        ValueError,
        r"chunk_rule is \('chunks', 4\); allowed: None, \('summary', L\), \('dilated', D, W, P\)",
    ),
    "rule sizes": (dict(chunk_rule=("dilated", 4, 2)), ValueError, r"chunk_rule is \('dilated', 4, 2\); allowed"),
    "rule value": (
        dict(chunk_rule=("dilated", 0, 2, 0)),
        ValueError,
        r"D of chunk_rule .* is 0; expected an integer ≥ 1",
    ),
    "block without size": (dict(causal="block"), ValueError, "causal is 'block', which needs block_size"),
    "window, not causal": (
        dict(causal=False, window=3),
        ValueError,
        "window counts keys up to the query; it needs causal True or 'block'",
    ),
    "rule, not causal": (
        dict(causal=False, chunk_rule=("summary", 2)),
        ValueError,
        "chunk_rule is .*, causal itself: it needs causal=True",
    ),
    "summary, window": (dict(window=3, chunk_rule=("summary", 2)), ValueError, "chunk_rule 'summary' with window"),
    "summary, block": (
        dict(block_size=3, chunk_rule=("summary", 2)),
        ValueError,
        "chunk_rule 'summary' with block_size",
    ),
    "summary, prefix": (
        dict(prefix_len=3, chunk_rule=("summary", 2)),
        ValueError,
        "chunk_rule 'summary' with prefix_len",
    ),
    "decay, not causal": (
        dict(**DECAY, causal=False),
        ValueError,
        "log_decay is given with causal=False; it needs causal=True",
    ),
    "slopes, blocks": (
        dict(**SLOPES, causal="block", block_size=2),
        ValueError,
        "alibi_slopes is given with causal='block'",
    ),
    "decay, prefix": (dict(**DECAY, prefix_len=1), ValueError, "log_decay is given with prefix_len"),
    "slopes, summary": (
        dict(**SLOPES, chunk_rule=("summary", 2)),
        ValueError,
        "alibi_slopes is given with chunk_rule 'summary'",
    ),
    "merge type": (dict(merge=x(2, 6, 4, 24)), TypeError, r"merge is Tensor; expected the AttentionOutput \(o, lse\)"),
    "merge shape": (
        dict(merge=(x(2, 6, 2, 24), x(2, 6, 4))),
        ValueError,
        r"merge.o has shape \[2, 6, 2, 24\]; expected \[B, Tq, HQ, V\] = \[2, 6, 4, 24\]",
    ),
    "merge dtype": (
        dict(merge=(x(2, 6, 4, 24, dtype=torch.float16), x(2, 6, 4))),
        TypeError,
        "merge.o is float16; expected float32 like q",
    ),
    "merge lse": (dict(merge=(x(2, 6, 4, 24), x(2, 6, 4, 1))), ValueError, r"merge.lse has shape \[2, 6, 4, 1\]"),
    "merge lse dtype": (
        dict(merge=(x(2, 6, 4, 24), x(2, 6, 4, dtype=torch.float64))),
        TypeError,
        "merge.lse is float64; expected float32 with float32 q",
    ),
    "merge device": (
        dict(merge=(x(2, 6, 4, 24, device="meta"), x(2, 6, 4))),
        ValueError,
        "merge.o is on meta; expected cpu like q",
    ),
    "head map": (dict(head_map="mqa"), ValueError, "head_map is 'mqa'; allowed: 'gqa', 'tile'"),
    "scale": (dict(scale=0.0), ValueError, "scale is 0.0; expected a finite number > 0 or None"),
    "scale type": (dict(scale="big"), ValueError, "scale is 'big'; expected a finite number > 0 or None"),
    "backend": (dict(backend="cudnn"), ValueError, "backend is 'cudnn'; allowed: cuda, triton, cpu, chunked"),
    "keys packed alone": (
        dict(cu_seqlens_k=torch.tensor([0, 6])),
        ValueError,
        "cu_seqlens_k is given without cu_seqlens_q",
    ),
    "batch packed": (dict(cu_seqlens_q=torch.tensor([0, 6])), ValueError, "batch size is 2 with cu_seqlens_q"),
}
BAD_PACKED = {
    "falls": (
        dict(cu_seqlens_q=torch.tensor([0, 4, 2, 6])),
        ValueError,
        "cu_seqlens_q falls from 4 to 2 at entry 2; it must not decrease",
    ),
    "keys end": (
        dict(cu_seqlens_k=torch.tensor([0, 4, 5])),
        ValueError,
        "cu_seqlens_k runs from 0 to 5; expected from 0 to T = 6",
    ),
    "dtype": (
        dict(cu_seqlens_q=torch.tensor([0.0, 4.0, 6.0])),
        TypeError,
        "cu_seqlens_q is float32; expected int32 or int64",
    ),
    "count": (
        dict(cu_seqlens_k=torch.tensor([0, 6])),
        ValueError,
        r"cu_seqlens_k has shape \[2\]; expected \[N\+1\] like cu_seqlens_q = \[3\]",
    ),
    "reach": (
        dict(log_decay=-torch.ones(1, 6, 4), cu_seqlens_k=torch.tensor([0, 3, 6])),
        ValueError,
        "packed sequence 0 has queries beyond its keys",
    ),
    "other keys": (
        dict(k=x(1, 7, 2, 16), v=x(1, 7, 2, 24), cu_seqlens_k=None),
        ValueError,
        "q has 6 packed tokens and k has 7; expected cu_seqlens_k then",
    ),
}


@pytest.mark.parametrize("name", [*BAD, *BAD_PACKED])
def test_bad_input(name):
    change, error, message = (BAD | BAD_PACKED)[name]
    with pytest.raises(error, match=message) as caught:
        attention(**{**(PACKED if name in BAD_PACKED else CASE).make(), **change})
    assert str(caught.value).startswith("attention: ")


def test_named_backend_that_cannot_serve_lists_every_reason():
    with pytest.raises(memattn.BackendError) as caught:
        attention(**CASE.make(), backend="cuda")
    assert "received: q float32 [2, 6, 4, 16] on cpu" in str(caught.value)
    assert "cuda: attention has no cuda kernel; it has: triton, cpu, chunked" in str(caught.value)


def test_checks_remembered_for_one_call_do_not_pass_another():
    inputs = CASE.make()
    attention(**inputs)
    for change in (
        dict(window=0),
        dict(causal=1),
        dict(causal="block"),
        dict(head_map="no"),
        dict(scale=-1.0),
        dict(q_offset=-3),
    ):
        with pytest.raises(ValueError):
            attention(**inputs, **change)
    with pytest.raises(ValueError, match="log_decay has a value of 0.25"):
        attention(**inputs, log_decay=torch.full((2, 6, 4), 0.25))


def test_c_entries_check_what_memory_needs():
    """The op of the library is public: it must refuse what would reach outside a tensor."""
    inputs = CASE.make()
    op, q, k, v = torch.ops.memattn.attention_cpu, inputs["q"], inputs["k"], inputs["v"]
    if memattn.backends.why_not("attention", "cpu", memattn.backends.Request("cpu", torch.float32)):
        pytest.skip("the C++ CPU kernels are not built here")
    settings = (1, 0, 0, 0, 0, 0, 0, 0, 0, False, 0.25)
    rest = (None, None, *settings)
    packed, o = PACKED.make(), torch.zeros(2, 6, 4, 24)
    good = torch.tensor([0, 6])
    for arguments, message in (
        ((q, k[:, :, :1], v, None, None, None, None, *rest), "k must be float32"),
        ((q, k, v[:, :5], None, None, None, None, *rest), "v must be float32"),
        ((q, k, v, torch.zeros(3), None, None, None, *rest), "sink must be float32"),
        ((q, k, v, None, torch.zeros(2, 5, 4, dtype=torch.float64), None, None, *rest), "decay must be float64"),
        (
            (q, k, v, None, torch.zeros(2, 6, 4, dtype=torch.float64), None, None, *rest[:10], 3, False, 0.25),
            "with decay every query needs a key",
        ),
        ((q, k, v, None, None, None, None, None, o, *settings), "first scores and values must both be given"),
        ((q, k, v, None, None, None, None, o[..., :1], o, *settings), "first scores must be float32"),
        (
            (q, k, v, None, None, None, None, o[..., 0].contiguous(), o[:, :5], *settings),
            "first values must be float32",
        ),
        (
            (q, k, v, None, None, None, None, None, None, 1, -4, *settings[2:]),
            "sizes of the mask must not be negative; got -4",
        ),
        ((q, k, v, None, None, None, None, None, None, 3, *settings[1:]), "causal must be 0, 1 or 2; got 3"),
        (
            (packed["q"], packed["k"], packed["v"], None, None, good, None, *rest),
            "cu_seqlens must be given for both",
        ),
        (
            (packed["q"], packed["k"], packed["v"], None, None, good, torch.tensor([0, 7]), *rest),
            "cu_seqlens must run from 0 to T = 6",
        ),
        (
            (packed["q"], packed["k"], packed["v"], None, None, good, torch.tensor([0, 2, 6]), *rest),
            "as many sequences of k as of q",
        ),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*arguments)
