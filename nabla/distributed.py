"""Attention over one sequence whose tokens several GPUs share: exact, forward and backward.

Ranks form a table of queries x heads; rank j * heads + i holds that shard of the tokens.
1. all-to-all over heads      q, k, v [B, H, S_rank, D] -> own heads, tokens of row j
2. all-gather over queries    k, v -> own heads, all tokens
3. mask and attention of own heads and the query blocks of row j: no part of a mask travels
4. all-to-all over heads      out -> [B, H, S_rank, D]
The backward is the same in reverse; over queries, dk and dv are summed in float32, in rank order.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import DeviceMesh, ProcessGroup

from nabla.bits import count_bits
from nabla.block_attention import AttentionOutput, block_sparse_attention
from nabla.block_mask import BlockMask, create_block_mask
from nabla.checks import (
    as_grid,
    cast_for_autocast,
    check_scale,
    check_tensors,
    check_top_p,
    check_window,
)
from nabla.grid import TokenGrid, Window
from nabla.reorder import fractal_flatten, fractal_unflatten

Group = ProcessGroup | DeviceMesh
Assignment = tuple[tuple[int, ...], ...]


def ulysses_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: TokenGrid | Sequence[int],
    top_p: float | Sequence[float] | Tensor = 0.9,
    window: Sequence[int] | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    order: str = "raster",
    return_lse: bool = False,
    backend: str = "auto",
    group: Group | None = None,
    sizes: Sequence[int] | None = None,
    balance: HeadBalance | None = None,
) -> Tensor | AttentionOutput:
    """Compute `nabla.attention` of a sequence whose tokens the ranks of a group share.

    Every rank calls it, with its own shard and the same options. Between the two all-to-alls a rank
    has the whole sequence for some of the heads, so it builds their masks as one process would.
    Differentiable once in q, k and v, through out and lse: what one rank differentiates through,
    every rank has to.

    For CPU tensors, and for others with TORCH_DISTRIBUTED_DEBUG=INFO, the ranks first compare their
    arguments, at the cost of a small exchange and a synchronisation, so that the mistake of one is
    an error of all. Otherwise the others wait for it until the timeout of the group.

    Args:
        q: Queries of the tokens of this rank [B, H, S_rank, D].
        k: Keys of these tokens [B, H, S_rank, D], or [B, Hk, S_rank, D] with enable_gqa.
        v: Values, as k.
        grid: The grid of the tokens of all ranks, or its (frames, height, width).
        top_p: As for `nabla.attention`; one value, or one for each of the H heads.
        window: As for `nabla.attention`.
        scale: Factor of the products; D^-0.5 if None.
        enable_gqa: Whether k and v may have fewer heads than q.
        order: "raster" or "block", of the tokens of all ranks. Over `queries`, queries stay where
            they are if the order is "block" and the rows end where blocks do (see `shard_sizes`).
        return_lse: Whether to return (out, lse).
        backend: "auto", or the name of a backend (see `nabla.backends`).
        group: The ranks. A ProcessGroup, or a DeviceMesh of one dimension, shares the heads; a
            DeviceMesh of the dimensions "queries" and "heads" shares the query blocks, too, and one
            of "queries" only those. None is every process.
        sizes: Tokens of each rank, in the order of the shards; None is as torch.tensor_split does.
        balance: Deals the heads by the blocks they kept; None deals runs of the same length.

    Returns:
        Attention of the tokens of this rank [B, H, S_rank, D]; or AttentionOutput(out, lse) with
        lse [B, H, S_rank].

    Raises:
        ValueError: If an argument is out of its range, the tensors do not match each other or the
            grid, there are fewer heads or blocks than ranks to share them, or ranks disagree.
        RuntimeError: If there is no process group.
    """
    ranks = _ranks(group)
    plan, problem = None, None
    try:
        q, k, v = cast_for_autocast(q=q, k=k, v=v)
        plan = _plan(q, k, v, ranks, grid, top_p, window, scale, enable_gqa, order, sizes, balance)
    except (TypeError, ValueError) as error:
        problem = error
    options = {"top_p": top_p, "scale": scale, "return_lse": return_lse, "backend": backend}
    _compare(ranks, (q, k, v), plan, options, problem)
    assert plan is not None

    if plan.copies > 1:
        k, v = (x.repeat_interleave(plan.copies, 1) for x in (k, v))
    q, k, v = _to_heads(q, k, v, plan, ranks)
    mask, results = _attend(q, k, v, plan, ranks, return_lse, backend)
    if balance is not None:
        balance._record(mask, plan, ranks)
    out, *lse = (_to_tokens(x, plan, ranks) for x in results)
    return AttentionOutput(out, lse[0].squeeze(-1)) if return_lse else out


class HeadBalance:
    """Deals heads to ranks by how many blocks each kept in the last step, longest first.

    Heads differ in density, and the rank with the densest ones keeps the others waiting. Which rank
    computes a head does not change its result. Keep one object for each layer:

        for batch in batches:
            out = ulysses_attention(q, k, v, grid=grid, balance=balance)
            ...  # the backward, if any: recomputed activations need the same assignment
            balance.step()

    `assignment` holds the heads of each rank (with grouped heads: the groups), None before the
    first step.
    """

    def __init__(self) -> None:
        self.assignment: Assignment | None = None
        self._kept: Tensor | None = None
        self._ranks: _Ranks | None = None

    def step(self) -> None:
        """Deal the heads anew, by the blocks kept in the last call. Every rank has to call it.

        Adds up one number a head over the ranks, and waits for it.
        """
        if self._kept is None or self._ranks is None:
            return
        for axis in self._ranks:
            if axis.size > 1:
                dist.all_reduce(self._kept, group=axis.group)
        self.assignment = assign_heads(self._kept.tolist(), self._ranks.heads.size)
        self._kept = None

    def _record(self, mask: BlockMask, plan: _Plan, ranks: _Ranks) -> None:
        """Remember what each unit of heads of this rank kept."""
        kept = (
            count_bits(mask.bits, mask.grid.num_blocks)
            .sum((0, 2))
            .unflatten(0, (-1, plan.unit_heads))
        )
        units = torch.tensor(plan.assignment[ranks.heads.rank], device=kept.device)
        self._kept = kept.new_zeros(plan.units).index_copy(0, units, kept.sum(1))
        self._ranks = ranks


def assign_heads(counts: Sequence[float], num_ranks: int) -> Assignment:
    """Deal heads to ranks so that the sums of their counts are nearly equal.

    The head with the largest count that is left goes to the rank with the smallest sum (the fewest
    heads, the lowest rank): at most 4/3 of the best possible largest sum (Graham 1969).

    Args:
        counts: The work of each head, such as its kept blocks.
        num_ranks: How many ranks there are.

    Returns:
        The heads of each rank, ascending. No rank is without one.

    Raises:
        ValueError: If there are fewer heads than ranks.
    """
    if not 1 <= num_ranks <= len(counts):
        raise ValueError(f"num_ranks={num_ranks} is not in 1 to {len(counts)}, the number of heads")
    heads: list[list[int]] = [[] for _ in range(num_ranks)]
    sums: list[float] = [0] * num_ranks
    for head in sorted(range(len(counts)), key=lambda head: (-counts[head], head)):
        rank = min(range(num_ranks), key=lambda rank: (sums[rank], len(heads[rank]), rank))
        heads[rank].append(head)
        sums[rank] += counts[head]
    return tuple(tuple(sorted(own)) for own in heads)


def shard_sizes(grid: TokenGrid | Sequence[int], group: Group | None = None) -> tuple[int, ...]:
    """Cut the tokens of a grid, in block order, into whole blocks for every rank.

    Args:
        grid: The grid of the tokens, or its (frames, height, width).
        group: The ranks, as for `ulysses_attention`.

    Returns:
        Tokens of each rank, in the order of the shards; their numbers of blocks differ by at most
        one.

    Raises:
        ValueError: If there are fewer blocks than ranks.
    """
    grid, num = as_grid(grid), _ranks(group).size
    if grid.num_blocks < num:
        raise ValueError(
            f"{grid} has {grid.num_blocks} blocks: give it at most so many ranks, not {num}"
        )
    starts = [grid.block_start(grid.num_blocks * rank // num) for rank in range(num + 1)]
    return tuple(stop - start for start, stop in pairwise(starts))


def shard(x: Tensor, dim: int, sizes: Sequence[int], *, group: Group | None = None) -> Tensor:
    """Return the shard of this rank: a view of sizes[rank] tokens along `dim`.

    Args:
        x: Any tensor with sum(sizes) tokens along `dim`.
        dim: The dimension of the tokens.
        sizes: Tokens of each rank, in the order of the shards.
        group: The ranks, as for `ulysses_attention`.

    Raises:
        ValueError: If `sizes` does not fit the ranks or x.
    """
    ranks = _ranks(group)
    _check_sizes(sizes, ranks, x.shape[dim])
    return x.narrow(dim, sum(sizes[: ranks.rank]), sizes[ranks.rank])


def gather(x: Tensor, dim: int, sizes: Sequence[int], *, group: Group | None = None) -> Tensor:
    """Return the shards of all ranks, joined along `dim`: the inverse of `shard`.

    Its gradient is the sum of those of all ranks. Where every rank computes the same loss from the
    result, the gradients of parameters have to be averaged over the ranks, as DDP does.

    Args:
        x: The shard of this rank, with sizes[rank] tokens along `dim`.
        dim: The dimension of the tokens.
        sizes: Tokens of each rank, in the order of the shards.
        group: The ranks, as for `ulysses_attention`.

    Raises:
        ValueError: If `sizes` does not fit the ranks or x.
    """
    ranks = _ranks(group)
    _check_sizes(sizes, ranks, sum(sizes))
    if x.shape[dim] != sizes[ranks.rank]:
        raise ValueError(
            f"x has {x.shape[dim]} tokens along dim={dim}, but by sizes={tuple(sizes)} rank "
            f"{ranks.rank} has {sizes[ranks.rank]}: give the shard of this rank"
        )
    x = _all_gather(x, dim, ranks.row(sizes), ranks.heads)
    return _all_gather(x, dim, ranks.rows(sizes), ranks.queries)


# The ranks.


class _Axis(NamedTuple):
    """One dimension of the ranks, and the place of this process in it."""

    group: ProcessGroup | None = None
    size: int = 1
    rank: int = 0


class _Ranks(NamedTuple):
    queries: _Axis
    heads: _Axis

    @property
    def size(self) -> int:
        return self.queries.size * self.heads.size

    @property
    def rank(self) -> int:
        return self.queries.rank * self.heads.size + self.heads.rank

    def row(self, sizes: Sequence[int]) -> list[int]:
        """The shards of the row of this rank: those that meet over `heads`."""
        first = self.queries.rank * self.heads.size
        return list(sizes[first : first + self.heads.size])

    def rows(self, sizes: Sequence[int]) -> list[int]:
        """The tokens of each row."""
        firsts = range(0, len(sizes), self.heads.size)
        return [sum(sizes[first : first + self.heads.size]) for first in firsts]


def _ranks(group: Group | None) -> _Ranks:
    if not dist.is_initialized():
        raise RuntimeError(
            "there is no process group: start with torchrun, and call "
            "torch.distributed.init_process_group() first"
        )
    if isinstance(group, DeviceMesh):
        names = group.mesh_dim_names or ("heads",) * group.ndim
        if group.ndim == 1 and names[0] != "queries":
            names = ("heads",)
        if sorted(names) not in (["heads"], ["queries"], ["heads", "queries"]):
            raise ValueError(
                f"group is a DeviceMesh with the dimensions {group.mesh_dim_names} of "
                f"{tuple(group.shape)} ranks: give one of one dimension, or name its two "
                "mesh_dim_names=('queries', 'heads')"
            )
        if group.get_coordinate() is None:
            raise ValueError(f"group={group} does not contain this process, rank {dist.get_rank()}")
        axes = {
            name: _Axis(group.get_group(dim), group.size(dim), group.get_local_rank(dim))
            for dim, name in enumerate(names)
        }
        return _Ranks(axes.get("queries", _Axis()), axes.get("heads", _Axis()))
    if group is None:
        group = dist.group.WORLD
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            f"group does not contain this process, rank {dist.get_rank()}: call it on its members"
        )
    if not isinstance(group, ProcessGroup):
        raise TypeError(f"group is a {type(group).__name__}: give a ProcessGroup or a DeviceMesh")
    return _Ranks(_Axis(), _Axis(group, dist.get_world_size(group), dist.get_rank(group)))


def _check_sizes(sizes: Sequence[int], ranks: _Ranks, num_tokens: int) -> None:
    if len(sizes) != ranks.size or sum(sizes) != num_tokens or min(sizes) < 1:
        raise ValueError(
            f"sizes={tuple(sizes)} are not the tokens of {ranks.size} ranks that share "
            f"{num_tokens} tokens: give every rank at least one, or use shard_sizes(grid, group)"
        )


# What is agreed before anything is sent.


class _Plan(NamedTuple):
    """The checked arguments. Heads are dealt in units: a key head with its query heads.

    Where that makes the ranks more equal, a key head is copied first, and its query heads are
    shared out among the copies.
    """

    grid: TokenGrid
    top_p: Tensor
    window: Window | None
    scale: float
    order: str
    sizes: Sequence[int]  # tokens of each rank
    copies: int  # of each key head
    unit_heads: int  # query heads of a unit
    assignment: Assignment  # units of each rank

    @property
    def units(self) -> int:
        return sum(map(len, self.assignment))


def _plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranks: _Ranks,
    grid: TokenGrid | Sequence[int],
    top_p: float | Sequence[float] | Tensor,
    window: Sequence[int] | None,
    scale: float | None,
    enable_gqa: bool,
    order: str,
    sizes: Sequence[int] | None,
    balance: HeadBalance | None,
) -> _Plan:
    check_tensors(q=q, k=k, v=v)
    heads, kv_heads = q.shape[1], k.shape[1]
    if heads != kv_heads and not enable_gqa:
        raise ValueError(f"q has {heads} heads and k has {kv_heads}: pass enable_gqa=True")
    if q.shape[2] != k.shape[2]:
        raise ValueError(
            f"q has {q.shape[2]} tokens and k has {k.shape[2]}: give the shard of this rank of each"
        )
    if order not in ("raster", "block"):
        raise ValueError(f"order={order!r} is unknown: give 'raster' or 'block'")
    grid, window = as_grid(grid), check_window(window)
    if sizes is None:
        rest = grid.num_tokens % ranks.size
        sizes = [grid.num_tokens // ranks.size + (rank < rest) for rank in range(ranks.size)]
    _check_sizes(sizes, ranks, grid.num_tokens)
    if q.shape[2] != sizes[ranks.rank]:
        raise ValueError(
            f"q has {q.shape[2]} tokens, but of the {grid.num_tokens} of {grid} rank {ranks.rank} "
            f"of {ranks.size} has {sizes[ranks.rank]}: give that shard, as torch.tensor_split "
            "makes it, or the sizes of all shards"
        )
    if heads < ranks.heads.size:
        raise ValueError(
            f"q has {heads} heads, fewer than the {ranks.heads.size} ranks that share them: share "
            "query blocks as well, with a DeviceMesh of mesh_dim_names=('queries', 'heads')"
        )
    if grid.num_blocks < ranks.queries.size:
        raise ValueError(
            f"{grid} has {grid.num_blocks} blocks, fewer than the {ranks.queries.size} ranks of "
            "'queries': share heads instead"
        )
    copies = _copies(heads, kv_heads, ranks.heads.size)
    assignment = _contiguous(kv_heads * copies, ranks.heads.size)
    if balance is not None and balance.assignment is not None:
        dealt = balance.assignment
        if len(dealt) != ranks.heads.size or sum(map(len, dealt)) != kv_heads * copies:
            raise ValueError(
                f"balance has dealt {dealt}, but here {ranks.heads.size} ranks share "
                f"{kv_heads * copies} heads: keep a HeadBalance for each layer"
            )
        assignment = dealt
    return _Plan(
        grid,
        check_top_p(top_p, heads, q.device),
        window,
        check_scale(scale, q.shape[3]),
        order,
        sizes,
        copies,
        heads // kv_heads // copies,
        assignment,
    )


def _contiguous(num: int, num_ranks: int) -> Assignment:
    """Runs of units whose lengths differ by at most one, longer ones first."""
    lengths = [num // num_ranks + (rank < num % num_ranks) for rank in range(num_ranks)]
    return tuple(
        tuple(range(stop - n, stop)) for n, stop in zip(lengths, accumulate(lengths), strict=True)
    )


def _copies(heads: int, kv_heads: int, num_ranks: int) -> int:
    """How many copies of a key head give the busiest rank the fewest query heads."""
    group = heads // kv_heads
    possible = [n for n in range(1, group + 1) if group % n == 0 and kv_heads * n >= num_ranks]
    return min(possible, key=lambda n: (-(-kv_heads * n // num_ranks) * (group // n), n))


def _compare(
    ranks: _Ranks,
    qkv: tuple[Tensor, Tensor, Tensor],
    plan: _Plan | None,
    options: dict[str, Any],
    problem: Exception | None,
) -> None:
    """Raise the problem of this rank and, where that is cheap, those of the others."""
    on_cpu = not isinstance(qkv[0], Tensor) or qkv[0].device.type == "cpu"
    cheap = on_cpu or dist.get_debug_level() != dist.DebugLevel.OFF
    reports = []
    if cheap and not torch.compiler.is_compiling():  # a graph cannot raise for what is received
        reports = [(ranks.rank, problem and str(problem), _common(qkv, plan, options))]
    for axis in (ranks.heads, ranks.queries):
        if reports and axis.size > 1:
            gathered: list[Any] = [None] * axis.size
            dist.all_gather_object(gathered, reports, group=axis.group)
            reports = sum(gathered, [])
    if problem is not None:
        raise problem
    for rank, message, _ in reports:
        if message is not None:
            raise ValueError(f"rank {rank} refuses its arguments: {message}")
    for rank, _, common in reports:
        first, _, expected = reports[0]
        for name, value in common.items():
            if value != expected[name]:
                raise ValueError(
                    f"{name} is {expected[name]} on rank {first} and {value} on rank {rank}: "
                    "it has to be the same on every rank"
                )


def _common(
    qkv: tuple[Tensor, Tensor, Tensor], plan: _Plan | None, options: dict[str, Any]
) -> dict[str, str]:
    """What has to be the same on every rank, by name, in words."""
    if plan is None:
        return {}
    q, k, _ = qkv
    common = {
        "batch size": q.shape[0],
        "number of heads": (q.shape[1], k.shape[1]),
        "head_dim": q.shape[3],
        "dtype": q.dtype,
        "need of a gradient": torch.is_grad_enabled() and any(x.requires_grad for x in qkv),
        "grid": plan.grid,
        "window": plan.window,
        "order": plan.order,
        "sizes": tuple(plan.sizes),
        "assignment of heads": plan.assignment,
        **options,
    }
    return {name: repr(value) for name, value in common.items()}


# What runs.


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: _Plan,
    ranks: _Ranks,
    return_lse: bool,
    backend: str,
) -> tuple[BlockMask, list[Tensor]]:
    """The mask, and out (and lse) of the tokens of this row, [B, H_own, S_row, D (or 1)]."""
    grid, row, rows = plan.grid, ranks.queries.rank, ranks.rows(plan.sizes)
    starts = [0, *accumulate(rows)]
    blocks = [grid.block_at(start) for start in starts]
    in_place = plan.order == "block" and [grid.block_start(block) for block in blocks] == starts
    if in_place:
        k, v = _gather_heads((k, v), rows, ranks.queries)
    else:  # a row computes a run of blocks, whichever its own tokens are
        q, k, v = _gather_heads((q, k, v), rows, ranks.queries)
        if plan.order == "raster":
            q, k, v = (fractal_flatten(x, grid) for x in (q, k, v))
        blocks = [grid.num_blocks * j // len(rows) for j in range(len(rows) + 1)]
        ends = [grid.block_start(block) for block in blocks]
        q = q[:, :, ends[row] : ends[row + 1]]

    units = plan.top_p.split(plan.unit_heads)
    mask = create_block_mask(
        q,
        k,
        grid=grid,
        top_p=torch.cat([units[unit] for unit in plan.assignment[ranks.heads.rank]]),
        window=plan.window,
        scale=plan.scale,
        q_block_offset=blocks[row],
        backend=backend,
    )
    out, lse = block_sparse_attention(
        q, k, v, mask, scale=plan.scale, return_lse=True, backend=backend
    )
    results = [out, lse[..., None]] if return_lse else [out]
    if not in_place:
        computed = [stop - start for start, stop in pairwise(ends)]
        results = [_all_gather(x, 2, computed, ranks.queries) for x in results]
        if plan.order == "raster":
            results = [fractal_unflatten(x, grid) for x in results]
        results = [x[:, :, starts[row] : starts[row + 1]] for x in results]
    return mask, results


def _to_heads(
    q: Tensor, k: Tensor, v: Tensor, plan: _Plan, ranks: _Ranks
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of all heads and the tokens of this rank -> own heads, the tokens of the row."""
    if ranks.heads.size == 1:
        return q, k, v
    by_unit = (q.split(plan.unit_heads, 1), k.split(1, 1), v.split(1, 1))
    sent = torch.cat(
        [
            units[unit].transpose(0, 1)
            for own in plan.assignment
            for units in by_unit
            for unit in own
        ]
    )  # [heads, B, S_rank, D]: those for rank 0, those for rank 1, ...
    batch, row = q.shape[0], ranks.row(plan.sizes)
    width = [len(own) * (plan.unit_heads + 2) for own in plan.assignment]  # heads of q, k and v
    row_numel = batch * q.shape[3]
    mine = width[ranks.heads.rank]
    received = _all_to_all(
        sent.flatten(),
        [heads * row[ranks.heads.rank] * row_numel for heads in width],
        [mine * tokens * row_numel for tokens in row],
        ranks.heads,
    )
    parts = [
        part.view(mine, batch, tokens, -1).transpose(0, 1)
        for part, tokens in zip(received, row, strict=True)
    ]
    own = len(plan.assignment[ranks.heads.rank])
    q, k, v = torch.cat(parts, 2).split([own * plan.unit_heads, own, own], 1)
    return q, k, v


def _to_tokens(x: Tensor, plan: _Plan, ranks: _Ranks) -> Tensor:
    """[B, H_own, S_row, D] -> [B, H, S_rank, D]: all heads, the tokens of this rank."""
    if ranks.heads.size == 1:
        return x
    row = ranks.row(plan.sizes)
    mine = row[ranks.heads.rank]
    batch, own, _, dim = x.shape
    heads = [len(units) * plan.unit_heads for units in plan.assignment]
    received = _all_to_all(
        x.movedim(2, 0).flatten(),
        [tokens * batch * own * dim for tokens in row],
        [mine * batch * theirs * dim for theirs in heads],
        ranks.heads,
    )
    units: list[Tensor] = []
    for part, theirs in zip(received, heads, strict=True):
        part = part.view(mine, batch, theirs, dim).movedim(0, 2)
        units += part.split(plan.unit_heads, 1)
    dealt = [unit for own_units in plan.assignment for unit in own_units]
    return torch.cat([units[dealt.index(unit)] for unit in range(plan.units)], 1)


def _gather_heads(
    tensors: tuple[Tensor, ...], sizes: Sequence[int], axis: _Axis
) -> tuple[Tensor, ...]:
    """Each of the tensors [B, H, S_rank, D] with the tokens of all ranks, in one collective."""
    if axis.size == 1:
        return tensors
    joined = _all_gather(torch.cat(tensors, 1), 2, sizes, axis)
    return joined.split([x.shape[1] for x in tensors], 1)


def _all_gather(x: Tensor, dim: int, sizes: Sequence[int], axis: _Axis) -> Tensor:
    """The shards of all ranks of an axis, joined along `dim`; differentiable."""
    if axis.size == 1:
        return x
    return _AllGather.apply(x.movedim(dim, 0), list(sizes), axis).movedim(0, dim)


def _all_to_all(x: Tensor, sent: list[int], received: list[int], axis: _Axis) -> tuple[Tensor, ...]:
    """Send runs of x [N, ...] of these lengths; return those received; differentiable."""
    return _AllToAll.apply(x, sent, received, axis.group).split(received)


class _AllToAll(torch.autograd.Function):
    """Runs of the rows of x [N, ...] to every rank, and theirs in return."""

    @staticmethod
    def forward(ctx, x, sent, received, group):
        ctx.lengths, ctx.group = (received, sent), group
        out = x.new_empty(sum(received), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx, dout):
        return _AllToAll.apply(dout, *ctx.lengths, ctx.group), None, None, None


# Before torch 2.13 it had another name.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class _AllGather(torch.autograd.Function):
    """The rows of all ranks. Its gradient is a sum in float32 and in rank order: deterministic."""

    @staticmethod
    def forward(ctx, x, sizes, axis):
        ctx.sizes, ctx.axis = sizes, axis
        longest = max(sizes)  # collectives take equal lengths
        padded = x.new_zeros(longest, *x.shape[1:])
        padded[: len(x)] = x
        out = x.new_empty(axis.size * longest, *x.shape[1:])
        _all_gather_single(out, padded, group=axis.group)
        if min(sizes) == longest:
            return out
        return torch.cat([part[:n] for part, n in zip(out.split(longest), sizes, strict=True)])

    @staticmethod
    def backward(ctx, dout):
        mine = ctx.sizes[ctx.axis.rank]
        parts = _AllToAll.apply(dout, ctx.sizes, [mine] * ctx.axis.size, ctx.axis.group)
        exact = torch.promote_types(dout.dtype, torch.float32)
        return sum(part.to(exact) for part in parts.split(mine)).to(dout.dtype), None, None
