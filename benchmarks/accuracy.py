"""Correctness first: what a kernel computes against float64, before it gets a time.

attention   sampled blocks of queries: max and mean error at most twice those of masked
            scaled_dot_product_attention in the same precision, and a few roundings of float32
gradients   likewise three times; dout is zero but for sampled blocks of queries, so that dq, dk and
            dv of whole heads follow from a few rows
masks       sampled rows: exact outside a band of 1e-6 of mass around the cut, and ties
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nabla import BlockMask, TokenGrid

FORWARD_FACTOR, GRADIENT_FACTOR = 2.0, 3.0
FLOOR = 4 * torch.finfo(torch.float32).eps
BAND, CLOSENESS = 1e-6, 4e-6  # of mass around the cut; of scores that count as equal
SAMPLED_PAIRS = 2**24  # of query and key: as many blocks as that allows are compared
LEAST_BLOCKS, MOST_BLOCKS = 4, 32
SAMPLED_ROWS = 64  # of a mask
NEAR = 2.0  # times what is allowed: a single entry of a sample may be as far off by chance


class WrongOutput(Exception):
    """What a kernel computed, and by how much it is wrong.

    Args:
        message: For people.
        excess: The error over what is allowed.
    """

    def __init__(self, message: str, excess: float = math.inf) -> None:
        super().__init__(message)
        self.is_near_miss = excess < NEAR


class Accuracy(NamedTuple):
    """The largest error relative to the largest value, and how large it may be."""

    error: float
    allowed: float


class Sample(NamedTuple):
    """Rows of one head: its index, the tokens, and the tokens [S] that they attend to."""

    head: int
    rows: slice
    keep: Tensor


def sampled(mask: BlockMask) -> list[Sample]:
    """Blocks of queries to compare: the first or the last, and others, of two heads at most."""
    num_blocks, heads = mask.grid.num_blocks, mask.shape[1]
    count = SAMPLED_PAIRS // (2 * mask.grid.block_size * mask.grid.num_tokens)
    count = min(max(count, LEAST_BLOCKS), MOST_BLOCKS)
    end = torch.randint(2, ()).item() * (num_blocks - 1)
    others = torch.randint(num_blocks, (count - 1,)).tolist()
    sizes = mask.grid.starts(mask.device).diff().long()
    return [
        Sample(
            head,
            slice(mask.grid.block_start(block), mask.grid.block_start(block + 1)),
            kept_blocks(mask, head, block).repeat_interleave(sizes),
        )
        for head in sorted({0, heads - 1})
        for block in sorted({end, *others})
    ]


def kept_blocks(mask: BlockMask, head: int, block: int) -> Tensor:
    """Booleans [N] of a row of a mask."""
    row = BlockMask(mask.bits[:1, head : head + 1, block : block + 1], mask.grid)
    return row.to_dense()[0, 0, 0]


def check_attention(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, samples: Sequence[Sample]
) -> Accuracy:
    """Compare sampled rows of attention [1, H, S, D].

    Raises:
        WrongOutput: If they are less exact than the policy asks for.
    """
    ours, low, exact = [], [], []
    with torch.no_grad():
        for head, rows, keep in samples:
            low.append(_attend(q, k, v, head, rows, keep))
            of_head = (x[:, head : head + 1].double() for x in (q, k, v))
            exact.append(_attend(*of_head, 0, rows, keep))
            ours.append(out[:, head, rows])
    return _compare("out", ours, low, exact, FORWARD_FACTOR)


def check_gradients(
    gradients: Sequence[Tensor],
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    samples: Sequence[Sample],
) -> Accuracy:
    """Compare dq, dk and dv of the sampled heads; `dout` has to be zero outside the samples.

    Raises:
        WrongOutput: If they are less exact than the policy asks for.
    """
    worst = Accuracy(0.0, 1.0)
    for head in sorted({sample.head for sample in samples}):
        of_head = [sample for sample in samples if sample.head == head]
        rows = torch.cat([torch.arange(s.rows.start, s.rows.stop) for s in of_head])
        keep = torch.cat([s.keep.expand(s.rows.stop - s.rows.start, -1) for s in of_head])
        low, exact = (
            _gradients([x[0, head].to(dtype) for x in (q, k, v, dout)], rows.to(q.device), keep)
            for dtype in (q.dtype, torch.float64)
        )
        for name, ours, *others in zip(("dq", "dk", "dv"), gradients, low, exact, strict=True):
            one = ours[0, head, rows] if name == "dq" else ours[0, head]
            found = _compare(name, [one], *([x] for x in others), GRADIENT_FACTOR)
            worst = max(worst, found, key=lambda accuracy: accuracy.error / accuracy.allowed)
    return worst


def sampled_dout(like: Tensor, samples: Sequence[Sample]) -> Tensor:
    """Random gradients of the output, zero outside the samples."""
    dout = torch.zeros_like(like)
    for head, rows, _ in samples:
        dout[0, head, rows] = torch.randn_like(dout[0, head, rows])
    return dout


def check_mask(
    mask: BlockMask,
    q: Tensor,
    k: Tensor,
    *,
    top_p: float,
    window: tuple[int, int, int] | None,
) -> Accuracy:
    """Compare sampled rows of a mask with selection in float64.

    Returns:
        The share of blocks that differ outside the band and ties: zero, and zero are allowed.

    Raises:
        WrongOutput: If a block above the cut is missing, or one below it is kept.
    """
    grid = mask.grid
    rows = torch.randperm(grid.num_blocks)[:SAMPLED_ROWS].to(q.device)
    always = grid.kept_by_position(window, q.device)[rows]
    for head in sorted({0, q.shape[1] - 1}):
        scores = _pooled_scores(q[0, head], k[0, head], grid, rows)
        keep = BlockMask(mask.bits[:1, head : head + 1][:, :, rows], grid).to_dense()[0, 0]
        ranked, order = scores.sort(dim=-1, descending=True, stable=True)
        before = ranked.cumsum(-1) - ranked  # the mass of what ranks higher
        position = order.argsort(-1)
        surely, perhaps = before < top_p - BAND, before < top_p + BAND
        surely[:, 0] = perhaps[:, 0] = True
        lowest, highest = _edges(ranked, surely), _edges(ranked, perhaps)
        wanted = surely.gather(-1, position) & (scores > lowest * (1 + CLOSENESS))
        possible = perhaps.gather(-1, position) | (scores >= highest * (1 - CLOSENESS)) | always
        missing, extra = (wanted | always) & ~keep, keep & ~possible
        if wrong := int((missing | extra).sum()):
            raise WrongOutput(
                f"{wrong} of {keep.numel()} blocks of head {head} are not those that hold "
                f"{top_p} of the mass"
            )
    return Accuracy(0.0, 0.0)


def _attend(q: Tensor, k: Tensor, v: Tensor, head: int, rows: slice, keep: Tensor) -> Tensor:
    """Rows of one head, [1, rows, D], in the precision of q; zero where nothing is kept."""
    if not keep.any():
        return torch.zeros_like(q[:, head, rows])
    mask = None if keep.all() else keep[None, None, None]
    one_head = (q[:, head, None, rows], k[:, head, None], v[:, head, None])
    return _sdpa(*one_head, mask)[:, 0]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Masked attention of torch; on a GPU by its own kernels, as cuDNN's are among the measured."""
    if q.device.type != "cuda":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _gradients(head: Sequence[Tensor], rows: Tensor, keep: Tensor) -> list[Tensor]:
    """dq of some rows, dk and dv of masked attention in one head, given q, k, v, dout [S, D]."""
    q, k, v, dout = head
    leaves = [x.detach().clone().requires_grad_() for x in (q[rows], k, v)]
    with torch.enable_grad():
        out = _sdpa(*(x[None, None] for x in leaves), keep[None, None])
    return list(torch.autograd.grad(out, leaves, dout[rows][None, None]))


def _pooled_scores(q: Tensor, k: Tensor, grid: TokenGrid, rows: Tensor) -> Tensor:
    """Softmax in float64 between means of blocks, [rows, N], given q and k [S, D]."""
    sizes = grid.starts(q.device).diff().long()
    block = torch.arange(grid.num_blocks, device=q.device).repeat_interleave(sizes)
    means = []
    for x in (q, k):
        sums = x.new_zeros(grid.num_blocks, x.shape[-1], dtype=torch.float64)
        means.append(sums.index_add_(0, block, x.double()) / sizes[:, None])
    return (means[0][rows] @ means[1].T * q.shape[-1] ** -0.5).softmax(-1)


def _edges(ranked: Tensor, is_kept: Tensor) -> Tensor:
    """The lowest kept score of each row, [rows, 1]."""
    return ranked.gather(-1, is_kept.sum(-1, keepdim=True) - 1)


def _compare(
    name: str,
    ours: Sequence[Tensor],
    low: Sequence[Tensor],
    exact: Sequence[Tensor],
    factor: float,
) -> Accuracy:
    """Apply the policy to all samples together."""
    truth = torch.cat([x.double().flatten() for x in exact])
    errors = [
        (torch.cat([x.double().flatten() for x in parts]) - truth).abs() for parts in (ours, low)
    ]
    largest = truth.abs().max().item() or 1.0
    for stat in (torch.mean, torch.max):
        error, reference = (stat(x).item() for x in errors)
        allowed = factor * reference + FLOOR * stat(truth.abs()).item()
        if not error <= allowed:
            raise WrongOutput(
                f"{name}: {stat.__name__} error {error:.2e} above the {allowed:.2e} that "
                f"{factor:g} times the error of masked SDPA allows",
                excess=error / allowed if error == error else math.inf,
            )
    return Accuracy(error / largest, allowed / largest)
