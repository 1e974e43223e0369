"""What the stages mean, by brute force in float64: loops over tokens, blocks and rows."""

import itertools
import math

import torch


def block_tokens(grid):
    """The raster positions of the tokens of each block, in block order."""
    bt, bh, bw = grid.block
    blocks = []
    for t0 in range(0, grid.frames, bt):
        for h0 in range(0, grid.height, bh):
            for w0 in range(0, grid.width, bw):
                blocks.append(
                    [
                        (t * grid.height + h) * grid.width + w
                        for t in range(t0, min(t0 + bt, grid.frames))
                        for h in range(h0, min(h0 + bh, grid.height))
                        for w in range(w0, min(w0 + bw, grid.width))
                    ]
                )
    video = grid.frames * grid.height * grid.width
    size = bt * bh * bw
    for start in range(0, grid.extra, size):
        stop = min(start + size, grid.extra)
        blocks.append([video + token for token in range(start, stop)])
    return blocks


def block_runs(grid):
    """The positions in block order [start, stop) of each block."""
    stop, runs = 0, []
    for tokens in block_tokens(grid):
        runs.append((stop, stop + len(tokens)))
        stop += len(tokens)
    return runs


def extents_in_blocks(grid):
    extents = (grid.frames, grid.height, grid.width)
    return [math.ceil(n / b) for n, b in zip(extents, grid.block, strict=True)]


def num_video_blocks(grid):
    return math.prod(extents_in_blocks(grid))


def window_mask(grid, window):
    """Booleans [N, N]: the sliding tile window, and the rows and columns of extra tokens."""
    blocks = list(itertools.product(*map(range, extents_in_blocks(grid))))
    num = len(block_tokens(grid))
    keep = torch.zeros(num, num, dtype=torch.bool)
    for i in range(num):
        for j in range(num):
            if i >= len(blocks) or j >= len(blocks):
                keep[i, j] = True
            elif window is not None:
                axes = zip(blocks[i], blocks[j], window, strict=True)
                keep[i, j] = all(abs(a - b) <= extent // 2 for a, b, extent in axes)
    return keep


def block_means(x, runs):
    first = runs[0][0]
    return torch.stack(
        [x[:, :, start - first : stop - first].double().mean(2) for start, stop in runs], 2
    )


def pooled_scores(q, k, grid, scale, q_block_offset=0):
    """Softmax in float64 over the video blocks; the columns of extra tokens are 0."""
    runs = block_runs(grid)
    starts = [start for start, _ in runs] + [runs[-1][1]]
    stop = starts.index(starts[q_block_offset] + q.shape[2])
    q_mean = block_means(q, runs[q_block_offset:stop])
    k_mean = block_means(k, runs).repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = q_mean @ k_mean.transpose(-2, -1) * scale
    logits[..., num_video_blocks(grid) :] = -math.inf
    return logits.softmax(-1)


def fewest(row, top_p):
    """The fewest entries that hold top_p of a row, equal ones lowest index first."""
    ranked = sorted(range(len(row)), key=lambda j: (-row[j], j))
    if top_p >= 1:
        return set(ranked)
    kept, mass, total = set(), 0.0, sum(row)
    for j in ranked:
        if kept and mass >= top_p * total:
            break
        kept.add(j)
        mass += row[j]
    return kept


def assert_selects(keep, scores, top_p, always, band=1e-6, closeness=4e-6):
    """Check rows of a mask against float64 scores.

    Outside a band of mass around the cut, and between scores that are not nearly equal, a row is
    exactly the one that `fewest` keeps; its mass is never below top_p beyond the band.
    """
    rows = keep.flatten(0, -2), scores.flatten(0, -2), always.expand_as(keep).flatten(0, -2)
    top_p = top_p.view(1, -1, 1).expand(keep.shape[:-1]).flatten()
    for kept, row, forced, p in zip(*(x.tolist() for x in (*rows, top_p)), strict=True):
        least, most = fewest(row, p - band), fewest(row, min(p + band, 1.0))
        lowest = min(row[j] for j in least)
        certain = {j for j in least if row[j] > lowest * (1 + closeness)}
        highest_out = min(row[j] for j in most)
        possible = {j for j, score in enumerate(row) if score >= highest_out * (1 - closeness)}
        kept_set = {j for j, is_kept in enumerate(kept) if is_kept}
        forced_set = {j for j, is_forced in enumerate(forced) if is_forced}
        assert forced_set <= kept_set
        assert certain <= kept_set, "a block above the cut is missing"
        assert kept_set <= possible | forced_set, "a block below the cut is kept"
        assert kept_set
        if not forced_set:
            assert sum(row[j] for j in kept_set) >= p * sum(row) - band
            assert len(least) <= len(kept_set) <= len(most)


def token_mask(keep, grid, q_block_offset=0):
    """Booleans [B, H, Sq, Sk] of a mask of blocks [B, H, Nq, Nk]."""
    sizes = torch.tensor([stop - start for start, stop in block_runs(grid)])
    rows = sizes[q_block_offset : q_block_offset + keep.shape[2]]
    return keep.repeat_interleave(rows, 2).repeat_interleave(sizes, 3)


def attention(q, k, v, mask, scale):
    """Dense masked softmax attention in the precision of q: (out, lse). Empty rows: 0 and -inf."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q @ k.transpose(-2, -1) * scale).masked_fill(~mask, -math.inf)
    empty = ~mask.any(-1)
    lse = scores.masked_fill(empty[..., None], 0).logsumexp(-1)
    out = (scores - lse[..., None]).exp() @ v
    return out.masked_fill(empty[..., None], 0), lse.masked_fill(empty, -math.inf)


def assert_as_accurate_as(actual, low, exact, factor=2.0, values=None):
    """Our max and mean error may be `factor` times those of the same-precision dense reference.

    The floor is a few roundings of `values`; of the exact ones, if None.
    """
    assert torch.isfinite(actual).all()
    ours, theirs = ((x.double() - exact).abs() for x in (actual, low))
    values = (exact if values is None else values).abs()
    for stat in (torch.max, torch.mean):
        floor = 4 * torch.finfo(torch.float32).eps * stat(values)
        assert stat(ours) <= factor * stat(theirs) + floor, (
            f"{stat.__name__}: {stat(ours):.3e} vs {stat(theirs):.3e}"
        )
