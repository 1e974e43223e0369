"""MagCache against the counters of upstream, written out."""

import pytest
import tiny
import torch

from kandinsky_model.magcache import MagCache, skip_schedule
from kandinsky_model.presets import PRESETS


def upstream(magnitudes, num_steps, *, guided):
    """Upstream's decisions, one model call after the other: call 2 i + b is branch b of step i.

    In the first step, where it has no residual to add, it may decide to leave out a call of a run
    of few steps; that it never does here.
    """
    ratios = [1.0, 1.0, *magnitudes]
    total = 2 * num_steps
    if len(ratios) != total:
        last = len(ratios) // 2 - 1
        at = [
            round(i * last / (num_steps - 1)) if num_steps > 1 else last for i in range(num_steps)
        ]
        ratios = [ratios[2 * i + b] for i in at for b in (0, 1)]
    ratio, error, steps, skipped = [1.0, 1.0], [0.0, 0.0], [0, 0], []
    for call in range(0, total, 1 if guided else 2):
        branch, skip = call % 2, False
        if call >= max(2, int(total * 0.2)):
            ratio[branch] *= ratios[call]
            steps[branch] += 1
            error[branch] += abs(1 - ratio[branch])
            skip = error[branch] < 0.12 and steps[branch] <= 2
            if not skip:
                ratio[branch], error[branch], steps[branch] = 1.0, 0.0, 0
        skipped.append(skip)
    return skipped


@pytest.mark.parametrize("num_steps", [1, 2, 13, 16, 50, 77])
@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("spread", [0.01, 0.05, 0.2])
def test_leaves_out_what_upstream_does(num_steps, guided, spread):
    generator = torch.Generator().manual_seed(num_steps)
    magnitudes = (1 + spread * torch.randn(98, generator=generator)).tolist()
    schedule = skip_schedule(magnitudes, num_steps, branches=2 if guided else 1)
    flat = [skip for step in schedule for skip in step]
    assert flat == upstream(magnitudes, num_steps, guided=guided)
    if num_steps == 50 and spread == 0.01:
        assert 0.4 < sum(flat) / len(flat) < 0.7, "2 of 3 calls behind the first 20 %"


def test_takes_the_residual_of_the_last_computed_call_of_the_branch():
    schedule = ((False, False), (True, False), (True, True), (False, True))
    cache, x = MagCache(schedule), torch.ones(1, 2, 3)
    computed = iter([10.0, 20.0, 30.0, 40.0])
    out = [cache(lambda v: v + next(computed), x * i) for i in range(8)]
    residuals = [10, 20, 10, 30, 10, 30, 40, 30]
    for i, (value, residual) in enumerate(zip(out, residuals, strict=True)):
        assert torch.equal(value, x * i + residual)


def test_a_run_without_skips_is_the_plain_run():
    model = tiny.cross_dit(tiny.CONFIG)
    x = torch.randn(1, 2, 4, 4, model.config.input_dim)
    arguments = x, torch.randn(1, 3, 32), torch.randn(1, 24), torch.tensor([0.5])
    with torch.no_grad():
        plain = model(*arguments)
        cached = model(*arguments, cache=MagCache(((False,), (True,))))
    assert torch.equal(plain, cached)


def test_published_magnitudes_give_a_schedule():
    measured = [row for row in PRESETS.values() if row.magnitudes is not None]
    for row in measured:
        schedule = skip_schedule(row.magnitudes, row.num_steps)
        assert not any(skip for step in schedule[: row.num_steps // 5] for skip in step)


def test_magnitudes_come_in_pairs():
    with pytest.raises(ValueError, match="two finite numbers"):
        skip_schedule([1.0, 1.0, 1.0], 4)
