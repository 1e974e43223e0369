"""NABLA in the place of F.scaled_dot_product_attention, and in transformers."""

import contextlib
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
import transformers
from oracle import assert_as_accurate_as, block_tokens, token_mask

import nabla
from nabla import TokenGrid
from nabla.integrations.sdpa import override
from nabla.integrations.transformers import register

GRID = TokenGrid(2, 20, 24)
OPTIONS = {"top_p": 0.5, "window": (1, 3, 1)}


def tokens(num, heads=2, batch=2, dim=32):
    return torch.randn(batch, heads, num, dim).mul(2)


def dense_reference(q, k, v, grid, leading=0, **options):
    """Dense attention under the mask of nabla, expanded to tokens in their own order."""
    order = torch.tensor([token for tokens in block_tokens(grid) for token in tokens])
    order = torch.cat([order + leading, torch.arange(leading)])
    grid = TokenGrid(grid.frames, grid.height, grid.width, grid.block, grid.extra + leading)
    mask = nabla.create_block_mask(q[:, :, order], k[:, :, order], grid=grid, **options)
    back = order.argsort()
    keep = token_mask(mask.to_dense(), grid)[:, :, back][..., back]
    return F.scaled_dot_product_attention(q, k, v, keep, enable_gqa=True)


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("grid", [GRID, TokenGrid(2, 13, 20, extra=7)], ids=str)
@pytest.mark.parametrize("leading", [0, 5])
def test_self_attention_is_taken(grid, leading):
    q, k, v = (tokens(grid.num_tokens + leading) for _ in range(3))
    with override(grid, leading=leading, **OPTIONS) as calls:
        out = F.scaled_dot_product_attention(q, k, v)
    assert calls.taken == 1
    assert_close(out, dense_reference(q, k, v, grid, leading, **OPTIONS))
    assert (out - F.scaled_dot_product_attention(q, k, v)).abs().max() > 1e-2


def test_grouped_heads_and_scale():
    q, k, v = tokens(960, heads=4), tokens(960), tokens(960)
    with override(GRID, top_p=1.0):
        out = F.scaled_dot_product_attention(q, k, v, scale=0.3, enable_gqa=True)
    assert_close(out, F.scaled_dot_product_attention(q, k, v, scale=0.3, enable_gqa=True))


X = tokens(960)
LEFT = {
    "cross": (X, tokens(70), tokens(70)),
    "other_length": (tokens(961),) * 3,
    "mask": (X, X, X, torch.ones(960, 960, dtype=torch.bool).tril()),
    "causal": (X, X, X, None, 0.0, True),
    "three_dimensions": (X[0],) * 3,
    "other_value": (X, X, tokens(960, dim=16)),
    "empty_batch": (X[:0],) * 3,
}


@pytest.mark.parametrize("arguments", LEFT.values(), ids=LEFT)
@pytest.mark.filterwarnings("ignore:no self-attention")
def test_other_calls_are_left(arguments):
    expected = F.scaled_dot_product_attention(*arguments)
    with override(GRID, top_p=0.1) as calls:
        out = F.scaled_dot_product_attention(*arguments)
    assert torch.equal(out, expected)
    assert calls.taken == 0


@pytest.mark.filterwarnings("ignore:no self-attention")
def test_dropout_is_left():
    with override(GRID, top_p=0.1) as calls:
        F.scaled_dot_product_attention(X, X, X, dropout_p=0.5)
    assert calls.taken == 0


def test_nothing_taken_is_a_warning():
    with pytest.warns(UserWarning, match="no self-attention over 960 tokens ran within override"):
        with override(GRID):
            F.scaled_dot_product_attention(*[tokens(64)] * 3)


def test_nested_tensors_are_left():
    x = torch.nested.nested_tensor([torch.randn(2, 960, 32), torch.randn(2, 70, 32)])
    expected = F.scaled_dot_product_attention(x, x, x)
    with pytest.warns(UserWarning, match="no self-attention"), override(GRID):
        out = F.scaled_dot_product_attention(x, x, x)
    for ours, theirs in zip(out.unbind(), expected.unbind(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.filterwarnings("ignore:no self-attention")
def test_a_scale_that_is_a_tensor_is_left():
    scale = torch.tensor(0.2)
    expected = F.scaled_dot_product_attention(X, X, X, scale=scale)
    with override(GRID, top_p=0.1):
        assert torch.equal(F.scaled_dot_product_attention(X, X, X, scale=scale), expected)


def test_what_sdpa_refuses_is_refused():
    q, k = tokens(960, heads=6), tokens(960, heads=2)
    with override(GRID) as calls:
        with pytest.raises(RuntimeError):
            F.scaled_dot_product_attention(q, k, k)
        one = tokens(960, heads=1)
        F.scaled_dot_product_attention(q, one, one)  # broadcast, as SDPA does
    assert calls.taken == 1


def test_each_time_nothing_is_taken_is_a_warning():
    context = override(GRID)
    with context:
        F.scaled_dot_product_attention(X, X, X)
    with pytest.warns(UserWarning, match="NABLA computed nothing"), context:
        F.scaled_dot_product_attention(X[:, :, 1:], X[:, :, 1:], X[:, :, 1:])


def test_nesting_and_errors():
    other = TokenGrid(1, 8, 40)
    y = tokens(320)
    expected = [dense_reference(x, x, x, grid, top_p=0.3) for x, grid in ((X, GRID), (y, other))]
    dense = F.scaled_dot_product_attention(X, X, X)
    with override(GRID, top_p=0.3) as outer:
        with pytest.raises(KeyError), override(other, top_p=0.3) as inner:
            for x, out in zip((X, y), expected, strict=True):
                assert_close(F.scaled_dot_product_attention(x, x, x), out)
            raise KeyError
        assert_close(F.scaled_dot_product_attention(X, X, X), expected[0])
    assert (outer.taken, inner.taken) == (2, 1)
    assert torch.equal(F.scaled_dot_product_attention(X, X, X), dense)


def test_other_threads_are_left():
    dense, found = F.scaled_dot_product_attention(X, X, X), []
    with override(GRID, top_p=0.3):
        thread = threading.Thread(
            target=lambda: found.append(F.scaled_dot_product_attention(X, X, X))
        )
        thread.start()
        thread.join()
        assert not torch.equal(F.scaled_dot_product_attention(X, X, X), dense)
    assert torch.equal(found[0], dense)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.filterwarnings("ignore:no self-attention")
def test_multihead_attention_of_torch(train):
    """It calls scaled_dot_product_attention from within another function that modes see."""
    layer = torch.nn.MultiheadAttention(64, 2, batch_first=True).train(train)
    x = torch.randn(2, 960, 64)
    expected = layer(x, x, x, need_weights=False)[0]
    with override(GRID, top_p=1.0) as calls:
        out = layer(x, x, x, need_weights=False)[0]
    assert calls.taken == 1
    assert_close(out, expected)
    with override(GRID, top_p=0.2), override((1, 8, 8)):
        assert (layer(x, x, x, need_weights=False)[0] - expected).abs().max() > 1e-3
    assert torch.equal(layer(x, x, x, need_weights=False)[0], expected)


def test_gradients():
    q, k, v = (tokens(960).requires_grad_() for _ in range(3))

    def gradients(attend, dtype=torch.float32):
        inputs = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(attend(*inputs).square().sum(), inputs)

    def dense(q, k, v):
        return dense_reference(q, k, v, GRID, **OPTIONS)

    with override(GRID, **OPTIONS):
        ours = gradients(F.scaled_dot_product_attention)
    for actual, low, exact in zip(
        ours, gradients(dense), gradients(dense, torch.float64), strict=True
    ):
        assert_as_accurate_as(actual, low, exact, factor=3)


def test_compiled():
    torch.compiler.reset()
    attend = torch.compile(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v), fullgraph=True, backend="eager"
    )
    dense = attend(X, X, X)
    with override(GRID, **OPTIONS):
        out = attend(X, X, X)
    assert_close(out, dense_reference(X, X, X, GRID, **OPTIONS))
    assert torch.equal(attend(X, X, X), dense)


BAD = {
    "grid": ({"grid": 960}, "grid=960 is neither a TokenGrid"),
    "window": ({"grid": GRID, "window": (2, 1, 1)}, "three odd extents"),
    "leading": ({"grid": GRID, "leading": -1}, "leading=-1 is not a number of tokens"),
    "top_p": ({"grid": GRID, "top_p": 90}, "top_p=90 .* looks like a percentage"),
    "top_p of heads": ({"grid": GRID, "top_p": [0.5, 2.0]}, "top_p"),
    "top_p in words": ({"grid": GRID, "top_p": "much"}, "top_p"),
    "backend": ({"grid": GRID, "backend": "flex"}, "backend='flex' is unknown"),
}


@pytest.mark.parametrize("takes", [override, register])
@pytest.mark.parametrize("options, message", BAD.values(), ids=BAD)
def test_bad_input(takes, options, message):
    with pytest.raises(ValueError, match=message):
        takes(**options)


# transformers


def vision_transformer(implementation):
    """4 x 5 patches, twice each way, and a class token before them."""
    config = transformers.ViTConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=(96, 160),
        patch_size=4,
        attn_implementation=implementation,
    )
    torch.manual_seed(0)
    model = transformers.ViTModel(config, add_pooling_layer=False).eval()
    for name, parameter in model.named_parameters():
        if "query" in name or "key" in name or "q_proj" in name or "k_proj" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def hidden(model, x):
    with torch.no_grad():
        return model(x).last_hidden_state


def test_transformers_vision_model():
    x = torch.randn(2, 3, 96, 160)
    dense = hidden(vision_transformer("sdpa"), x)
    register("nabla", grid=(1, 24, 40), leading=1, top_p=1.0)
    model = vision_transformer("nabla")
    assert_close(hidden(model, x), dense)
    register("nabla", grid=(1, 24, 40), leading=1, top_p=0.4)
    sparse = hidden(model, x)
    assert (sparse - dense).abs().max() > 1e-2
    with override((1, 24, 40), leading=1, top_p=0.4) as calls:
        assert_close(hidden(vision_transformer("sdpa"), x), sparse)
    assert calls.taken == 2
    model.set_attn_implementation("sdpa")
    assert torch.equal(hidden(model, x), dense)


def test_transformers_with_another_grid_is_dense_and_says_so():
    x = torch.randn(1, 3, 96, 160)
    register("nabla", grid=(1, 24, 40), top_p=0.4)  # the class token is forgotten
    with pytest.warns(UserWarning, match="self-attention over 961 tokens is not over the 960"):
        out = hidden(vision_transformer("nabla"), x)
    assert torch.equal(out, hidden(vision_transformer("sdpa"), x))


def test_transformers_gets_its_masks_and_sdpa_where_nabla_does_not_fit():
    config = transformers.LlamaConfig(
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        vocab_size=10,
    )
    model = transformers.LlamaModel(config).eval()
    ids = torch.randint(0, 10, (2, 64))
    padding = (torch.arange(64) >= torch.tensor([[0], [20]])).long()
    register("nabla_text", grid=(1, 8, 8), top_p=0.1)
    for inputs in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": padding}):
        found = []
        for implementation in ("sdpa", "nabla_text"):
            model.set_attn_implementation(implementation)
            with torch.no_grad():
                found.append(model(**inputs).last_hidden_state)
        assert torch.equal(*found)


@pytest.mark.parametrize("name", ["sdpa", "eager", "flash_attention_2"])
def test_transformers_implementations_are_not_replaced(name):
    with pytest.raises(ValueError, match=f"name='{name}' is an implementation of transformers"):
        register(name, grid=GRID)


# A library that is not there


@contextlib.contextmanager
def without(library, adapter):
    """Importing the library fails, and the adapter has not been imported."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(sys.modules):
            if name == adapter or name.startswith(f"{adapter}."):
                patch.delitem(sys.modules, name)
            if name == library or name.startswith(f"{library}."):
                patch.setitem(sys.modules, name, None)
        yield


@pytest.mark.parametrize("library", ["diffusers", "transformers"])
def test_a_missing_library_says_how_to_install_it(library):
    adapter = f"nabla.integrations.{library}"
    __import__(adapter)
    with without(library, adapter), pytest.raises(ImportError, match=f"pip install '{library}>="):
        __import__(adapter)
