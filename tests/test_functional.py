"""attention(): the composition, and that it stands where scaled_dot_product_attention stood."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from conftest import BACKENDS
from hypothesis import given
from hypothesis import strategies as st
from oracle import assert_as_accurate_as, attention, block_tokens, token_mask
from test_block_mask import WINDOWS, smooth_tokens
from test_grid import grids
from test_scores import DTYPES

import nabla
from nabla import TokenGrid


def raster(grid, **options):
    """Smooth tokens in raster order."""
    return nabla.fractal_unflatten(smooth_tokens(grid, **options), grid)


@given(
    grid=grids(max_extent=17),
    dtype=st.sampled_from(DTYPES),
    heads=st.sampled_from([(2, 2), (4, 2)]),
    top_p=st.sampled_from([0.2, 0.6, 1.0]),
    window=WINDOWS,
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_attention(backend, grid, dtype, heads, top_p, window):
    q = raster(grid, heads=heads[0], dtype=dtype)
    k, v = (raster(grid, heads=heads[1], dtype=dtype) for _ in range(2))
    out, lse = nabla.attention(
        q,
        k,
        v,
        enable_gqa=heads[0] != heads[1],
        grid=grid,
        top_p=top_p,
        window=window,
        return_lse=True,
        backend=backend,
    )
    order = torch.tensor([token for tokens in block_tokens(grid) for token in tokens])
    keep = nabla.create_block_mask(
        q[:, :, order], k[:, :, order], grid=grid, top_p=top_p, window=window, backend=backend
    ).to_dense()
    mask = token_mask(keep, grid)[:, :, order.argsort()][..., order.argsort()]
    scale = q.shape[-1] ** -0.5
    exact = attention(*(x.double() for x in (q, k, v)), mask, scale)
    low = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    assert_as_accurate_as(out, low, exact[0])
    assert_as_accurate_as(lse, attention(q, k, v, mask, scale)[1], exact[1])


@pytest.mark.parametrize("grid", [None, (3, 12, 20), TokenGrid(3, 12, 20, (1, 4, 4))], ids=str)
def test_everything_kept_is_dense_attention(backend, run, grid):
    q, k, v = (torch.randn(2, 3, 720, 64) for _ in range(3))
    out = run(nabla.attention, q, k, v, grid=grid, top_p=1.0, backend=backend)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), atol=2e-6, rtol=1e-5)


def test_block_order_skips_the_reordering(backend):
    grid = TokenGrid(2, 20, 16)
    q, k, v = (smooth_tokens(grid) for _ in range(3))
    options = {"grid": grid, "top_p": 0.6, "window": (1, 1, 3), "backend": backend}
    out = nabla.attention(q, k, v, order="block", **options)
    outside = nabla.attention(*(nabla.fractal_unflatten(x, grid) for x in (q, k, v)), **options)
    assert torch.equal(out, nabla.fractal_flatten(outside, grid))


def test_every_stage_takes_a_grid_or_its_extents():
    grid, extents = TokenGrid(2, 9, 16), (2, 9, 16)
    x = torch.randn(1, 1, grid.num_tokens, 32)
    scores = nabla.pooled_scores(x, x, grid)
    keep = nabla.sliding_tile_mask(grid, (1, 1, 1)).to_dense()
    for ours, theirs in (
        (nabla.fractal_flatten(x, grid), nabla.fractal_flatten(x, extents)),
        (nabla.fractal_unflatten(x, grid), nabla.fractal_unflatten(x, extents)),
        (nabla.block_mean(x, grid), nabla.block_mean(x, extents)),
        (scores, nabla.pooled_scores(x, x, extents)),
        (
            nabla.select_blocks(scores, grid, top_p=0.5).bits,
            nabla.select_blocks(scores, extents, top_p=0.5).bits,
        ),
        (
            nabla.create_block_mask(x, x, grid=grid, top_p=0.5).bits,
            nabla.create_block_mask(x, x, grid=extents, top_p=0.5).bits,
        ),
        (keep, nabla.sliding_tile_mask(extents, (1, 1, 1)).to_dense()),
        (keep, nabla.BlockMask.from_dense(keep, grid=extents).to_dense()),
    ):
        assert torch.equal(ours, theirs)


def test_signature_is_a_superset_of_sdpa():
    sdpa = ["query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"]
    parameters = inspect.signature(nabla.attention).parameters
    assert list(parameters)[: len(sdpa)] == sdpa
    assert all(parameters[name].kind is not inspect.Parameter.KEYWORD_ONLY for name in sdpa)
    ours = list(parameters.values())[len(sdpa) :]
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in ours)
    q = torch.randn(1, 2, 128, 32)
    positional = nabla.attention(q, q, q, None, 0.0, False, 0.1, False, top_p=1.0)
    torch.testing.assert_close(positional, F.scaled_dot_product_attention(q, q, q, scale=0.1))


def test_autocast_casts_as_sdpa_does(backend):
    q, k, v = (torch.randn(1, 2, 192, 32) for _ in range(3))
    low = nabla.attention(*(x.bfloat16() for x in (q, k, v)), top_p=0.7, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        out = nabla.attention(q, k, v, top_p=0.7, backend=backend)
        assert F.scaled_dot_product_attention(q, k, v).dtype == out.dtype
    assert torch.equal(out, low)


def test_autocast_takes_mixed_dtypes_as_sdpa_does(backend):
    q, k, v = (torch.randn(1, 2, 192, 32) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        out = nabla.attention(q, k.bfloat16(), v.half(), top_p=0.7, backend=backend)
        assert torch.equal(
            out, nabla.attention(q, k, v.half().bfloat16(), top_p=0.7, backend=backend)
        )


def test_a_window_larger_than_any_grid_keeps_everything(backend):
    q = torch.randn(1, 1, 3 * 144, 32)
    out = nabla.attention(
        q, q, q, grid=(3, 9, 16), top_p=0.1, window=(2**40 + 1,) * 3, backend=backend
    )
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, q, q), atol=2e-6, rtol=1e-5)


def test_checkpointing_recomputes_the_same(backend):
    grid = TokenGrid(2, 17, 16)
    q, k, v = (raster(grid).requires_grad_() for _ in range(3))

    def ours(q, k, v):
        return nabla.attention(q, k, v, grid=grid, top_p=0.5, backend=backend)

    plain = torch.autograd.grad(ours(q, k, v).square().sum(), (q, k, v))
    out = torch.utils.checkpoint.checkpoint(ours, q, k, v, use_reentrant=False)
    again = torch.autograd.grad(out.square().sum(), (q, k, v))
    for x, y in zip(plain, again, strict=True):
        assert torch.equal(x, y)


def test_nan_reaches_the_rows_that_attend_to_it(backend):
    grid = TokenGrid(6, 8, 8)
    q, k, v = (smooth_tokens(grid) for _ in range(3))
    options = {"grid": grid, "top_p": 0.3, "order": "block", "backend": backend}
    clean = nabla.attention(q, k, v, **options)
    v[0, 1, 100] = torch.nan
    dirty = nabla.attention(q, k, v, **options)
    attends = nabla.create_block_mask(q, k, grid=grid, top_p=0.3, backend=backend).to_dense()
    rows = attends[0, 1, :, 1].repeat_interleave(64)
    assert not rows.all()
    assert dirty[0, 1, rows].isnan().all()
    assert torch.equal(dirty[0, 1, ~rows], clean[0, 1, ~rows])
    assert torch.equal(dirty[0, 0], clean[0, 0])


Q = torch.zeros(1, 2, 128, 32)
BAD = {
    "attn_mask": ((Q, Q, Q, torch.ones(128, 128)), {}, "attn_mask is not supported"),
    "dropout_p": ((Q, Q, Q), {"dropout_p": 0.1}, "dropout_p=0.1 is not supported: pass 0.0"),
    "is_causal": ((Q, Q, Q), {"is_causal": True}, "is_causal=True is not supported"),
    "percentage": ((Q, Q, Q), {"top_p": 90}, "top_p=90 .* looks like a percentage"),
    "grid": ((Q, Q, Q), {"grid": (2, 8, 9)}, "key has 128 tokens, but .* has 144"),
    "grid type": ((Q, Q, Q), {"grid": 128}, "grid=128 is neither a TokenGrid nor"),
    "grid extents": (
        (Q, Q, Q),
        {"grid": (2.0, 8, 8)},
        "grid has an extent 2.0: give a whole number",
    ),
    "top_p type": ((Q, Q, Q), {"top_p": "0.5"}, "top_p='0.5' is not a number"),
    "window type": ((Q, Q, Q), {"grid": (2, 8, 8), "window": 3}, "window=3 is not three odd"),
    "even window": ((Q, Q, Q), {"grid": (2, 8, 8), "window": (2, 1, 1)}, "three odd extents"),
    "window without grid": ((Q, Q, Q), {"window": (1, 3, 3)}, r"window=\(1, 3, 3\) needs a grid"),
    "window type without grid": ((Q, Q, Q), {"window": 3}, "window=3 needs a grid"),
    "scale": ((Q, Q, Q), {"scale": float("nan")}, "scale=nan is not a finite number"),
    "scale type": ((Q, Q, Q), {"scale": "1"}, "scale='1' is not a finite number"),
    "order": ((Q, Q, Q), {"order": "fractal"}, "order='fractal' is unknown"),
    "grouped heads": ((Q, Q[:, :1], Q[:, :1]), {}, "query has 2 heads .* pass enable_gqa=True"),
    "heads": ((Q, Q.repeat(1, 2, 1, 1), Q.repeat(1, 2, 1, 1)), {"enable_gqa": True}, "must divide"),
    "cross-attention": ((Q[:, :, :64], Q, Q), {}, "query has 64 tokens and key has 128"),
    "empty": ((Q[:, :, :0],) * 3, {}, "query has shape .* which is empty"),
    "devices": ((Q, Q.to("meta"), Q), {}, "key has device meta and query has cpu"),
    "dtypes": ((Q, Q.half(), Q), {}, "key has dtype torch.float16 and query has torch.float32"),
    "integers": ((Q.long(),) * 3, {}, "query has dtype torch.int64: supported are"),
    "head_dims": ((Q, Q, Q[..., :16]), {}, "value has head_dim 16 and query has 32"),
    "unknown backend": ((Q, Q, Q), {"backend": "flex"}, "backend='flex' is unknown: give 'auto'"),
}


@pytest.mark.parametrize("args, options, message", BAD.values(), ids=BAD)
def test_bad_input(args, options, message):
    with pytest.raises(ValueError, match=message):
        nabla.attention(*args, **options)


def test_missing_backends_say_why():
    for name, status in nabla.backends().items():
        if not status.available:
            with pytest.raises(ValueError, match=f"backend='{name}' cannot run this .*Available"):
                nabla.attention(Q, Q, Q, backend=name)
