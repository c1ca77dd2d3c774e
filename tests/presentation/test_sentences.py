import numpy as np
import pandas as pd
import pytest

from lafq.paper import poster
from lafq.paper.budget_study.methods import FEEDBACK
from lafq.presentation import sentences


def published(ours, low, high):
    """Rows as `poster.compare` gives them: ours differ from FP32 by `ours` with the interval low..high."""
    rows = [("baseline", "none", "fp32", 59.30, 0.0)]
    rows += [("uniform", "all", f, np.nan, ours) for f in ("fp16", "int8")]
    rows += [("ratio", "0.35", "int8", 56.21, ours), ("global", "tau=1", "int8", 59.71, ours)]
    columns = ["method", "threshold", "format", "fid_paper", "delta_fid_inception"]
    table = pd.DataFrame(rows, columns=columns).assign(n_images=100, steps=1000)
    return table.assign(delta_fid_inception_low=low, delta_fid_inception_high=high)


def budget():
    damages = {"global": 1.0, "group": 5.0, "ratio": 15.0, "magnitude": 9.0, "random": 30.0}
    rows = [{"method": m, "granularity": "weight", "damage": d} for m, d in damages.items()]
    rows += [{"method": "allocator", "granularity": "mixed", "damage": 0.2}]
    uniform = [
        {"method": m, "granularity": "tensor", "damage": 1.0, "budget_bits": 8.0} for m in ("uniform", f"uniform, {FEEDBACK}")
    ]
    table = pd.DataFrame([{"budget_bits": 4.0, "mem_mib": 1.0, "mem_share": 0.125} | r for r in rows + uniform])
    return table.assign(damage_low=0.1, damage_high=0.3, fid_mnist_delta_high=np.nan, n_images=1000)


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(-0.1, 0.2, "0 lie inside"), (-0.1, 0.5, "1 lie inside our 95 % interval (global tau=1)"), (-4, 4, "2 lie inside")],
)
def test_which_published_differences_lie_inside(low, high, said):
    assert f"Of 2 published differences from the baseline, {said}" in sentences.published_inside(published(0.05, low, high))


def test_findings_follow_from_the_tables():
    found = sentences.findings(published(0.05, -0.1, 0.2), budget())
    assert len(found) == 4
    assert "INT8 weights by +0.05 [-0.10, +0.20]" in found[0]
    assert "N = 100, 1,000 sampling steps" in found[0]
    assert "largest gain is 3.09" in found[0]
    assert f"{2**0.5 * poster.FID_NOISE:.1f} (1 sd)" in found[1]
    assert "A threshold per group changes it 5 times as much, one per layer (ratio) 15 times" in found[2]
    assert "0.20 [0.10, 0.30] times the damage" in found[3]


def test_what_drives_the_fisher_claims():
    layers = {"Layer1": 8.0, "Layer2": 3.0, "Layer6": 1.0}
    rows = [
        {"layer": layer, "t_low": t, "t_high": t + 49, "weights": 10, "fisher": f * (4 if t == 0 else 1)}
        for layer, f in layers.items()
        for t in (0, 50)
    ]
    assert sentences.drivers_of_fisher(pd.DataFrame(rows)) == (
        "80% of the trace lies at t <= 49. Per weight, Layer1 has 8.0 times the Fisher information of Layer6, and Layer2 3.0 times."
    )
