import numpy as np
import pandas as pd
import pytest
import torch

from lafq.allocation.rules import by_granularity, keep_above
from lafq.fisher.sensitivity import Sensitivity, predicted_damage
from lafq.quantization.model import nbytes, quantize
from lafq.quantization.plan import make_plan
from lafq.study import budget_rows, rows
from lafq.study.budget_rows import free_groups, mib_at, rules_at_bits
from lafq.study.diffusion.unet import quantizable
from lafq.study.rows import keep_ratio, rule_scores

MIB = 2**20


def test_thresholds_fill_the_budget(model, fisher):
    rows = rules_at_bits(model, Sensitivity(fisher, {}), [3.5, 12.0, 20.0], seed=0)
    names = {"global", "group", "ratio", "mean_std", "magnitude", "random"}
    assert {r.rule for r in rows} == names
    assert {(r.bits, r.format) for r in rows} == {(3.5, "int3"), (12.0, "int8"), (20.0, "fp16")}
    assert len(rows) == 36
    for row in rows:
        size = nbytes(model, row.plan) / MIB
        assert 0.97 * mib_at(model, row.bits) < size <= mib_at(model, row.bits)
    ratio = next(r for r in rows if r.rule == "ratio" and r.bits == 12)
    kept = [
        p.keep_mask.float().mean().item()
        for n, p in ratio.plan.entries.items()
        if n.startswith("Layer1")
    ]
    assert 0 < np.mean(kept) < 1


def test_free_group_thresholds_do_no_more_predicted_damage_than_one(model, fisher):
    known = Sensitivity(fisher, {})
    one = next(
        r for r in rules_at_bits(model, known, [4.0], 0, ["global"]) if r.rounding != "nearest"
    )
    free = free_groups(model, known, 4.0)
    of = [predicted_damage(model, quantize(model, row.plan), known) for row in (free, one)]
    assert of[0] < of[1]
    assert 0.97 * mib_at(model, 4.0) < nbytes(model, free.plan) / MIB <= mib_at(model, 4.0)
    assert (free.rule, free.format, free.rounding) == ("free", "int3", "feedback")


@pytest.mark.parametrize("ratio", [-0.1, 1.01, float("nan")])
def test_ratio_out_of_range(ratio):
    with pytest.raises(ValueError, match=r"outside \[0, 1\]"):
        keep_ratio({"Layer1.a": torch.ones(2)}, ratio)


def test_a_layer_in_no_group():
    with pytest.raises(ValueError, match="unknown layer 'Layer7': the groups cover Layer1, "):
        rule_scores("group", {"Layer7.a": torch.ones(1)})


def test_the_size_nearest_a_share_is_that_of_its_row(tiny):
    scores = {n: w.square() for n, w in quantizable(tiny).items()}
    table = rows.size_sweep(tiny, scores, "int8", "weight", 20)
    assert table["kept_share"].iloc[[0, -1]].tolist() == [0, 1]
    assert table["kept_share"].is_monotonic_increasing
    assert table["mem_share"].iloc[-1] == 1
    nearest = rows.nearest_size(table, 0.5)
    assert abs(nearest["mem_share"].item() - 0.5) == (table["mem_share"] - 0.5).abs().min()
    [row] = rows.threshold_rows("global", scores, nearest)
    assert nbytes(tiny, row.plan) / MIB == nearest["mem_mib"].item()


@pytest.mark.parametrize("granularity", ["tensor", "weight"])
@pytest.mark.parametrize("low", ["fp16", "int8"])
def test_sizes_counted_are_those_of_the_plans(tiny, low, granularity):
    scores = by_granularity({n: w.square() for n, w in quantizable(tiny).items()}, granularity)
    table = rows.size_sweep(tiny, scores, low, granularity, 20)
    made = [make_plan(keep_above(scores, cut), low) for cut in table["threshold"]]
    counted = table[["kept_share", "mem_mib", "mem_share"]]
    pd.testing.assert_frame_equal(counted, rows.sizes(tiny, made), check_exact=True)


def test_a_budget_of_a_tiny_model_is_filled():
    model = torch.nn.Linear(8, 8, bias=False)
    scores = {"weight": torch.arange(64.0).view(8, 8)}
    plan = budget_rows.at_bytes(model, scores, "int4", "fp16", 90 / MIB)
    assert 80 < nbytes(model, plan) <= 90
