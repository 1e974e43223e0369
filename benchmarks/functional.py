"""The stages stacked: nabla.attention from raster order to raster order, and what each stage takes
of it, against dense attention. The density is what its own mask keeps of these q and k.
"""

from __future__ import annotations

import nabla
from benchmarks import block_attention, block_mask
from benchmarks.accuracy import Accuracy, check_attention, check_mask, sampled
from benchmarks.case import Case, Contest, Shape, forward_bytes, with_role
from benchmarks.peers.peer import Peer
from benchmarks.results import OURS

STAGE = "functional"
PARTS = ("reorder", "mask", "attention")


def cost(shape: Shape) -> float:
    """FLOPs of one round."""
    return shape.workload.flops * (1 + 2 * max(shape.workload.densities))


def contest(shape: Shape, peers: list[Peer]) -> Contest:
    """Dense attention, nabla.attention, and its parts one by one."""
    q, k, v = shape.inputs()  # in block order: their blocks differ
    workload, grid = shape.workload, shape.workload.grid
    build = block_mask.builder(q, k, workload)
    mask = build()
    raster = [nabla.fractal_unflatten(x, grid) for x in (q, k, v)]
    out = nabla.block_sparse_attention(q, k, v, mask)
    options = {"grid": grid, "top_p": workload.top_p, "window": workload.window}

    def attention():
        return nabla.attention(*raster, **options)

    def check() -> Accuracy:
        check_mask(build(), q, k, top_p=workload.top_p, window=workload.window)
        whole = nabla.fractal_flatten(attention(), grid)
        return check_attention(whole, q, k, v, sampled(mask))

    def reorder():
        return [nabla.fractal_flatten(x, grid) for x in raster], nabla.fractal_unflatten(out, grid)

    of_mask = block_mask.about(build, q, k)
    work = {"flops": of_mask["density"] * workload.flops, "bytes": forward_bytes(shape)}
    about = {"mask": "built", "density": of_mask["density"]}
    parts = {
        "reorder": (reorder, {"bytes": 8.0 * q.nbytes}),  # q, k, v and out, read and written
        "mask": (build, of_mask),
        "attention": (lambda: nabla.block_sparse_attention(q, k, v, mask), work),
    }
    found = Contest()
    for peer in with_role(peers, "dense", shape.device):
        row = shape.row(
            STAGE,
            peer.name,
            mask="dense",
            density=1.0,
            flops=float(workload.flops),
            bytes=work["bytes"],
        )
        run = peer.prepare(q, k, v)
        found.cases.append(
            Case(
                row,
                run,
                lambda run=run: _check_dense(run(), q, k, v, shape),
                is_fallback=peer.is_fallback(shape.device),
            )
        )
    found.cases.append(Case(shape.row(STAGE, OURS, **about | work), attention, check))
    for part in PARTS:
        run, of_part = parts[part]
        found.cases.append(Case(shape.row(STAGE, OURS, part=part, **about | of_part), run, check))
    return found


def _check_dense(out, q, k, v, shape: Shape) -> Accuracy:
    everything = block_attention.full_mask(shape.workload.grid, q.device)
    return check_attention(out, q, k, v, sampled(everything))
