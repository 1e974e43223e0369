"""MagCache against the counters of upstream, written out."""

import pytest
import tiny
import torch

from kandinsky_model.magcache import (
    MagCache,
    RatioMeter,
    read_ratios,
    skip_schedule,
    write_ratios,
)


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


@pytest.mark.parametrize("ratios", [[1.0, float("nan")], [-1.0, 1.0], ["1", 1.0], 3, "11", None])
def test_ratios_that_are_none(ratios):
    with pytest.raises(ValueError, match="magcache ratios .* must be finite numbers from 0"):
        skip_schedule(ratios, 4)


@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("ratios", [[], [1.0], [1.0, 1.0, 1.0]])
def test_ratios_of_no_whole_number_of_steps(ratios, branches):
    """None at all would leave out all that may be left out."""
    with pytest.raises(ValueError, match=f"are {len(ratios)}: there must be two for every step"):
        skip_schedule(ratios, 20, branches=branches)


def test_ratios_without_guidance_are_not_taken_for_those_with_it():
    ratios = [1.01, 0.0, 0.99, 0.0]
    assert any(skip for (skip,) in skip_schedule(ratios, 30, branches=1))
    with pytest.raises(ValueError, match="without text are 0: they were measured without guidance"):
        skip_schedule(ratios, 30)


def test_residuals_that_are_needed_are_kept():
    """Behind every step, what is kept is what the next one adds: a run goes on from anywhere."""
    schedule = skip_schedule(tiny.RATIOS, 20)
    assert 0 < sum(map(any, schedule)) < 20

    def run(cache, start=0, stop=20):
        outs = []
        for step in range(start, stop):
            for branch in range(2):
                generator = torch.Generator().manual_seed(2 * step + branch)
                x = torch.randn(1, 2, 3, generator=generator)
                outs.append(cache(lambda v, a=1 + 0.1 * step, b=branch: a * v + b, x))
        return outs

    whole = run(MagCache(schedule))
    for stop in range(20):
        first = MagCache(schedule)
        run(first, stop=stop)
        assert first.kept.keys() == {f"residual_{b}" for b in range(2) if schedule[stop][b]}
        rest = run(MagCache(schedule, start=stop, kept=first.kept), start=stop)
        assert torch.equal(torch.stack(rest), torch.stack(whole[2 * stop :]))


@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("stop", [0, 1, 3])
def test_ratios_are_measured_token_by_token(branches, stop, tmp_path):
    """Of every branch for itself; a meter that was interrupted goes on."""
    residuals = torch.randn(5, branches, 1, 7, 3)
    norms = residuals.norm(dim=-1)
    expected = (norms[1:] / norms[:-1]).mean((2, 3)).tolist()
    meter = RatioMeter()
    meter.resume({}, branches=branches)
    for step in range(5):
        if step == stop:
            kept, meter = meter.kept, RatioMeter()
            meter.resume(kept, branches=branches)
        for branch in range(branches):
            x = torch.randn(1, 7, 3)
            meter(lambda v, r=residuals[step, branch]: v + r, x)
    wanted = [x for pair in expected for x in (pair if branches == 2 else [*pair, 0.0])]
    assert meter.ratios == pytest.approx(wanted, rel=1e-4)
    write_ratios(meter.ratios, tmp_path / "ratios.json")
    assert read_ratios(tmp_path / "ratios.json") == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.json", "[0.99, 1.01, 1e-05, 1]"),
        ("ours.json", '{"magcache": {"mag_ratios": [0.99, 1.01, 0.00001, 1.0]}}'),
        (
            "upstream.yaml",
            "a: 1\nmagcache:\n  mag_ratios: [.99, 1.01, 1e-5, 1]\n",
        ),
    ],
)
def test_files_of_ratios(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert read_ratios(tmp_path / name) == [0.99, 1.01, 1e-5, 1.0]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no",
        "[1, x]",
        "{a: 1}",
        "magcache: 3",
        "[[1]]",
        "{",
        "\0",
        "[]",
        "magcache: {mag_ratios: '123'}",
    ],
)
def test_files_without_ratios(tmp_path, text):
    (tmp_path / "ratios.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"ratios.yaml holds no ratios.*mag_ratios"):
        read_ratios(tmp_path / "ratios.yaml")
    with pytest.raises(ValueError, match=r"absent.json does not exist.*--measure-magcache"):
        read_ratios(tmp_path / "absent.json")
