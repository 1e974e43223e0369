"""Stage 4: attention over the kept blocks against dense attention and block-sparse peers.

FLOPs   of the kept blocks: 4 * density * S^2 * D * H forward, 3.5 times that with the backward
bytes   q, k, v, out and the log-sum-exp once; with the backward also dout, dq, dk and dv
E       density * (time of the fastest dense attention) / time
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

import nabla
from benchmarks import block_mask, masks
from benchmarks.accuracy import (
    Accuracy,
    Sample,
    check_attention,
    check_gradients,
    check_mask,
    sampled,
    sampled_dout,
)
from benchmarks.case import Case, Contest, MaskSpec, Shape, forward_bytes, with_role
from benchmarks.peers.peer import Peer
from benchmarks.results import MASK_PART, OURS
from nabla import BlockMask, TokenGrid
from nabla.dispatch import architecture

STAGE = "block_attention"
# Blocks of a group, which load together: query blocks, and with gradients key blocks. On Hopper
# those of the forward by head_dim, and those of dq.
SHARING = 2
HOPPER_SHARING, HOPPER_SHARING_OF_DQ = {64: 4, 128: 3}, 3
BACKWARD_WORK = 3.5  # FLOPs of forward and backward over those of the forward
GRAPHED = 4e12  # FLOPs of a longer forward, which launches do not delay


def cost(
    shape: Shape, specs: Sequence[MaskSpec], *, dense: float = 1.0, sparse: float = 1.0
) -> float:
    """FLOPs of one round of so many that are dense, and so many under each mask."""
    return shape.workload.flops * (dense + sparse * sum(spec.density for spec in specs))


def contest(shape: Shape, specs: Sequence[MaskSpec], peers: list[Peer]) -> Contest:
    """Forward, under masks of every specification."""
    return build(STAGE, shape, specs, peers, with_grad=False)


def build(
    stage: str, shape: Shape, specs: Sequence[MaskSpec], peers: list[Peer], *, with_grad: bool
) -> Contest:
    """The cases of this stage, or with `with_grad` those of train.py."""
    q, k, v = shape.inputs(distinct_blocks=False)
    grid, heads = shape.workload.grid, shape.workload.heads
    attention = _Attention(stage, shape, (q, k, v), with_grad)
    found = Contest(with_grad=with_grad)
    everything = full_mask(grid, shape.device)
    for peer in with_role(peers, "dense", shape.device, with_grad=with_grad):
        found.cases.append(attention.dense(peer, everything))
    for spec in specs:
        mask = make(spec, grid, heads, shape)
        found.cases += attention.under(mask, spec, peers)
    if not with_grad and shape.workload.window is not None:
        found.cases += _windows(attention, grid, peers)
    found.cases.append(attention.mask_building())
    return found


def captured_contest(stage: str, frames: int, shape: Shape, peers: list[Peer]) -> Contest:
    """The tiny model's own q, k and v, of this shape, under the mask that it builds of them."""
    *qkv, mask = masks.captured(frames)
    q, k, v = (x.to(shape.device, shape.dtype) for x in qkv)
    mask = mask.to(shape.device)
    attention = _Attention(stage, shape, (q, k, v), with_grad=False)
    everything = full_mask(mask.grid, shape.device)
    found = Contest()
    for peer in with_role(peers, "dense", shape.device):
        found.cases.append(attention.dense(peer, everything))
    found.cases += attention.under(mask, MaskSpec("captured", 0.0), peers)
    return found


def full_mask(grid: TokenGrid, device: torch.device) -> BlockMask:
    """The mask of dense attention, for any number of heads."""
    keep = torch.ones(grid.num_blocks, grid.num_blocks, dtype=torch.bool, device=device)
    return BlockMask.from_dense(keep, grid=grid)


def make(spec: MaskSpec, grid: TokenGrid, heads: int, shape: Shape) -> BlockMask:
    """A mask of a specification."""
    if spec.kind == "random":
        return masks.random_mask(grid, heads, spec.density, shape.device)
    assert spec.kind == "nabla-like", spec
    return masks.nabla_like_mask(
        grid,
        heads,
        spec.density,
        window=shape.workload.window,
        correlation=spec.correlation,
        device=shape.device,
    )


class _Attention:
    """Makes cases of attention over q, k and v of one shape."""

    def __init__(
        self, stage: str, shape: Shape, qkv: tuple[Tensor, Tensor, Tensor], with_grad: bool
    ) -> None:
        self.stage, self.shape, self.with_grad = stage, shape, with_grad
        self.qkv = tuple(x.requires_grad_(with_grad) for x in qkv)
        self.dout = torch.randn_like(self.qkv[0]) if with_grad else None

    def under(self, mask: BlockMask, spec: MaskSpec, peers: list[Peer]) -> list[Case]:
        """Ours and the peers under one mask."""
        density = float(mask.density())
        asked = None if spec.kind == "captured" else spec.density
        about = {"mask": str(spec), "asked": asked, "density": density}
        is_gpu = self.shape.device.type == "cuda"
        shared = self._unions(mask) if is_gpu else {}
        ours = self.case(OURS, _ours, mask, mask, **about, values=shared)
        cases = [ours]
        if is_gpu and self.with_grad and has_fast_gradients(self.shape.device):
            cases.append(deterministic(ours))
        elif is_gpu and not self.with_grad and ours.row.flops < GRAPHED:
            cases.append(replace(ours, row=replace(ours.row, part="graph"), is_graph=True))
        for peer in with_role(peers, "sparse", self.shape.device, with_grad=self.with_grad):
            if peer.block == 64:
                cases.append(self.case(peer.name, peer.prepare, mask, mask, **about))
                continue
            covering = masks.dilated(mask)[1]
            extra = (float(covering.density()) - density) * self.work
            cases.append(
                self.case(
                    peer.name,
                    lambda *x, peer=peer, mask=mask: peer.prepare(*x[:3], mask),
                    covering,
                    covering,
                    **about,
                    extra_flops=extra,
                )
            )
        return cases

    def _unions(self, mask: BlockMask) -> dict[str, float]:
        """What groups of blocks load together, which predictions start from."""
        is_hopper = architecture(self.shape.device) == 90
        sharing = HOPPER_SHARING.get(self.shape.workload.head_dim) if is_hopper else None
        found = {"union": masks.union(mask, sharing or SHARING)}
        if self.with_grad:
            of_queries = HOPPER_SHARING_OF_DQ if is_hopper else SHARING
            found["union_of_keys"] = masks.union(mask, SHARING, of_keys=True)
            found["union_of_queries"] = masks.union(mask, of_queries)
        return found

    def dense(self, peer: Peer, everything: BlockMask) -> Case:
        """A dense peer."""
        case = self.case(peer.name, peer.prepare, everything, mask="dense", density=1.0)
        return replace(case, is_fallback=peer.is_fallback(self.shape.device))

    def mask_building(self) -> Case:
        """Ours, for q and k of this shape: what a model pays beside the attention."""
        q, k, _ = (x.detach() for x in self.qkv)
        workload = self.shape.workload
        build = block_mask.builder(q, k, workload)
        about = block_mask.about(build, q, k)
        row = self.shape.row(self.stage, OURS, part=MASK_PART, **about)
        options = {"top_p": workload.top_p, "window": workload.window}
        return Case(row, build, lambda: check_mask(build(), q, k, **options))

    @property
    def work(self) -> float:
        """FLOPs of dense attention."""
        return self.shape.workload.flops * (BACKWARD_WORK if self.with_grad else 1)

    def case(
        self,
        name: str,
        prepare: Callable[..., Callable[[], object]],
        attended: BlockMask | Sequence[Sample],
        mask_of_blocks: BlockMask | None = None,
        **about,
    ) -> Case:
        """A case of an implementation; what it prepares once is not timed.

        Args:
            name: Of the implementation.
            prepare: Makes its run.
            attended: What its output is checked under: a mask, of which fresh rows are sampled at
                every check, or rows.
            mask_of_blocks: What `prepare` takes beside q, k and v, if anything.
            about: For the row.
        """
        moved = forward_bytes(self.shape) * (3 if self.with_grad else 1)
        row = self.shape.row(
            self.stage, name, flops=about["density"] * self.work, bytes=moved, **about
        )
        arguments = self.qkv if mask_of_blocks is None else (*self.qkv, mask_of_blocks)
        prepared: list[Callable[[], Tensor]] = []

        def attend() -> Tensor:
            if not prepared:
                prepared.append(prepare(*arguments))
            return prepared[0]()

        def forward_and_backward() -> tuple[Tensor, ...]:
            return torch.autograd.grad(attend(), self.qkv, self.dout)

        def check() -> Accuracy:
            out = attend()
            samples = sampled(attended) if isinstance(attended, BlockMask) else attended
            found = check_attention(out.detach(), *(x.detach() for x in self.qkv), samples)
            if not self.with_grad:
                return found
            dout = sampled_dout(out.detach(), samples)
            gradients = torch.autograd.grad(out, self.qkv, dout)
            of_gradients = check_gradients(gradients, dout, *self.qkv, samples)
            return max(found, of_gradients, key=lambda accuracy: accuracy.error / accuracy.allowed)

        return Case(row, forward_and_backward if self.with_grad else attend, check)


def has_fast_gradients(device: torch.device) -> bool:
    """Whether gradients are faster where they may differ from run to run."""
    found = architecture(device) if torch.cuda.is_available() else None
    return found is not None and found < 90


def deterministic(case: Case) -> Case:
    """The same, asking torch for deterministic algorithms."""

    def asking(run: Callable) -> Callable:
        def ask():
            before = torch.are_deterministic_algorithms_enabled()
            only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
            fills = torch.utils.deterministic.fill_uninitialized_memory
            torch.utils.deterministic.fill_uninitialized_memory = False  # would be timed, too
            torch.use_deterministic_algorithms(True, warn_only=True)
            try:
                return run()
            finally:
                torch.use_deterministic_algorithms(before, warn_only=only_warns)
                torch.utils.deterministic.fill_uninitialized_memory = fills

        return ask

    row = replace(case.row, part="deterministic")
    return replace(case, row=row, run=asking(case.run), check=case.check and asking(case.check))


def _ours(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Callable[[], Tensor]:
    return lambda: nabla.block_sparse_attention(q, k, v, mask)


def _windows(attention: _Attention, grid: TokenGrid, peers: list[Peer]) -> list[Case]:
    """Peers with a window of tokens: that of the workload, in tokens. Their tokens are in raster
    order, which random ones are in as well."""
    window = attention.shape.workload.window
    assert window is not None
    extents = (grid.frames, grid.height, grid.width)
    kernel = tuple(
        min(blocks * size, extent)
        for blocks, size, extent in zip(window, grid.block, extents, strict=True)
    )
    density = 1.0
    for size, extent in zip(kernel, extents, strict=True):
        density *= size / extent
    return [
        attention.case(
            peer.name,
            lambda *qkv, peer=peer: peer.prepare(*qkv, grid, kernel),
            _window_samples(grid, kernel, attention.shape),
            mask=f"window {kernel}",
            density=density,
        )
        for peer in with_role(peers, "window", attention.shape.device)
    ]


def _window_samples(grid: TokenGrid, kernel: Sequence[int], shape: Shape) -> list[Sample]:
    """Single tokens in raster order, and the window of each, moved inwards at the borders."""
    extents = (grid.frames, grid.height, grid.width)
    samples = []
    for token in (0, grid.num_tokens // 2, grid.num_tokens - 1):
        at = (
            token // (grid.height * grid.width),
            token // grid.width % grid.height,
            token % grid.width,
        )
        keep = torch.zeros(extents, dtype=torch.bool, device=shape.device)
        starts = [
            min(max(i - size // 2, 0), extent - size)
            for i, size, extent in zip(at, kernel, extents, strict=True)
        ]
        keep[tuple(slice(s, s + size) for s, size in zip(starts, kernel, strict=True))] = True
        samples.append(Sample(0, slice(token, token + 1), keep.flatten()))
    return samples
