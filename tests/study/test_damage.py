import math

import pandas as pd
import pytest

from lafq.quantization.formats import MIB
from lafq.quantization.model import nbytes
from lafq.study import budget_rows, damage
from lafq.study.damage import measure_damage
from lafq.study.diffusion.training import held_out_outputs
from lafq.study.diffusion.unet import quantizable


@pytest.fixture(scope="module")
def known(model):
    return budget_rows.measured_sensitivity(model, 64, seed=0)


@pytest.fixture(scope="module")
def allocated(model, known):
    return budget_rows.allocated_at_bits(model, known, [4.0])


@pytest.mark.slow
def test_ratios_of_damages_are_paired(model, known):
    rows = budget_rows.uniform_at_bits(model, known)
    rows += budget_rows.rules_at_bits(model, known, [4.0], seed=0)
    table = measure_damage(model, rows, known, seed=0, digits=20)
    by = table.set_index(["rule", "rounding", "format"])
    int8 = by.loc["uniform", "nearest", "int8"]
    assert (int8["over_int8"], int8["over_int8_low"], int8["over_int8_high"]) == (1, 1, 1)
    for rounding in ("nearest", "feedback"):
        whole, ratio = (by.loc[rule, rounding, "int3"] for rule in ("global", "ratio"))
        assert whole["over_global"] == 1
        assert ratio["over_global"] == pytest.approx(ratio["damage"] / whole["damage"])
        assert ratio["over_global_low"] <= ratio["over_global"] <= ratio["over_global_high"]
    again = measure_damage(model, rows[:1], known, seed=0, digits=20, fresh=True)
    assert again["damage"].item() != table["damage"].iloc[0]


@pytest.mark.slow
def test_judged_rows_measure_the_plan(model, known, allocated):
    rows = [*budget_rows.uniform_at_bits(model, known)[:5], *allocated]
    table = measure_damage(model, rows, known, seed=0, digits=20)
    assert list(table.columns) == damage.COLUMNS
    uniform = table[table["rule"] == "uniform"]
    assert (uniform["damage"].diff().dropna() < 0).all()
    assert (table["damage_low"] <= table["damage"]).all()
    assert uniform["bits_per_weight"].round().tolist() == [2, 3, 4, 6, 8]
    mixed = table[table["granularity"] == "mixed"].set_index(["rule", "rounding"])
    best, fed, nearest = (
        mixed["damage"][kind]
        for kind in (
            ("allocate_all", "feedback"),
            ("allocate", "feedback"),
            ("allocate", "nearest"),
        )
    )
    assert best < fed < nearest < uniform["damage"].iloc[1]
    budget = budget_rows.mib_at(model, 4.0)
    assert mixed["mem_mib"].between(0.98 * budget, budget).all()
    assert not damage.output_errors(model, held_out_outputs(model, 0, 20), 0)[0].any()


@pytest.mark.slow
def test_tuned_rows_are_the_allocators_with_less_damage(model, known, allocated):
    rows = budget_rows.tuned_rows(allocated, [4.0], steps=40)
    assert [(*r[:5], r.tuned) for r in rows] == [("allocate", "4.000", "any", "mixed", "tuned", 40)]
    before = next(filter(budget_rows.is_allocated, allocated))
    table = measure_damage(model, [before, *rows], known, seed=0, digits=50)
    assert table["mem_mib"].nunique() == table["predicted"].nunique() == 1
    assert 0 < table["damage"][1] < table["damage"][0]


def test_files_hold_the_stored_form_of_every_row(model, known):
    rows = budget_rows.uniform_at_bits(model, known)[:5]
    files = damage.coded_files(model, rows, seed=0)["file_mib"]
    assert (files.diff().dropna() > 0).all()
    assert files.max() < nbytes(model, {}) / MIB / 2


@pytest.mark.slow
def test_points_and_allocations_by_every_prediction(model, known):
    points = damage.by_tensor(model, known, ("int2", "int8"), seed=0, digits=10)
    assert len(points) == 2 * len(quantizable(model))
    ranks = damage.rank_correlations(points)
    assert ranks["prediction"].tolist() == list(damage.PROXIES)
    assert ranks["all formats"].between(-1, 1).all()
    rows = damage.allocate_by_proxy(model, points, 4.0, known)
    assert [r.rule for r in rows] == [*damage.PROXIES, "measured"]
    assert all(budget_rows.bits_of(model, r.plan) <= 4.0 for r in rows)


@pytest.mark.parametrize(
    ("of", "bits"), [(1e-4, 3), (1e-3, 2.5), (1e-1, math.nan), (1e-7, math.nan)]
)
def test_bits_of_equal_damage_lie_between_two_rows_and_never_outside(of, bits):
    rows = pd.DataFrame({"budget_bits": [2.0, 3.0, 4.0], "damage": [1e-2, 1e-4, 1e-6]})
    assert damage.bits_of_equal_damage(rows, of) == pytest.approx(bits, nan_ok=True)
