import pytest
import torch

from lafq.study.claims import damage_claims
from lafq.study.damage import (
    COLUMNS,
    PROXIES,
    allocate_by_proxy,
    by_tensor,
    measure_damage,
    output_errors,
    rank_correlations,
)
from lafq.study.diffusion.training import held_out_outputs
from lafq.study.diffusion.unet import UNet, quantizable
from lafq.study.rows import (
    allocated_at_bits,
    bits_of,
    is_allocated,
    measured_sensitivity,
    mib_at,
    rules_at_bits,
    tuned_rows,
    uniform_at_bits,
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return UNet(8).eval()


@pytest.fixture(scope="module")
def known(model):
    return measured_sensitivity(model, 64, seed=0)


@pytest.mark.slow
def test_ratios_of_damages_are_paired(model, known):
    found = [*uniform_at_bits(model, known), *rules_at_bits(model, known, [4.0], seed=0)]
    table = measure_damage(model, found, known, seed=0, digits=20)
    table = table.set_index(["rule", "rounding"])
    int8 = table.loc["uniform", "nearest"].query("format == 'int8'").iloc[0]
    assert (int8["over_int8"], int8["over_int8_low"], int8["over_int8_high"]) == (1, 1, 1)
    for rounding in ("nearest", "feedback"):
        [whole], [ratio] = (
            [row for _, row in table.loc[[(rule, rounding)]].iterrows()]
            for rule in ("global", "ratio")
        )
        assert whole["over_global"] == 1
        assert ratio["over_global"] == pytest.approx(ratio["damage"] / whole["damage"])
        assert ratio["over_global_low"] <= ratio["over_global"] <= ratio["over_global_high"]
    again = measure_damage(model, found[:1], known, seed=0, digits=20, fresh=True)
    assert again["damage"].item() != table["damage"].iloc[0]
    assert [claim.verdict for claim in damage_claims(table.reset_index(), "feedback")]


@pytest.mark.slow
def test_judged_rows_measure_the_plan(model, known):
    rows = [*uniform_at_bits(model, known)[:5], *allocated_at_bits(model, known, [4.0])]
    table = measure_damage(model, rows, known, seed=0, digits=20)
    assert list(table.columns) == COLUMNS
    uniform = table[table["rule"] == "uniform"]
    assert (uniform["damage"].diff().dropna() < 0).all()
    assert (table["damage_low"] <= table["damage"]).all()
    assert uniform["bits_per_weight"].round().tolist() == [2, 3, 4, 6, 8]
    mixed = table[table["granularity"] == "mixed"].set_index(["rule", "rounding"])["damage"]
    assert (
        mixed["allocate_all", "feedback"]
        < mixed["allocate", "feedback"]
        < mixed["allocate", "nearest"]
        < uniform["damage"].iloc[1]
    )
    sizes = table[table["granularity"] == "mixed"]["mem_mib"]
    assert sizes.between(0.98 * mib_at(model, 4.0), mib_at(model, 4.0)).all()
    before = held_out_outputs(model, 0, 20)
    assert not output_errors(model, before, 0)[0].any()


@pytest.mark.slow
def test_tuned_rows_are_the_allocators_with_less_damage(model, known):
    allocated = allocated_at_bits(model, known, [4.0], granularities=("mixed",))
    rows = tuned_rows(allocated, [4.0], steps=40)
    assert [(*r[:5], r.tuned) for r in rows] == [("allocate", "4.000", "any", "mixed", "tuned", 40)]
    before = next(r for r in allocated if is_allocated(r))
    table = measure_damage(model, [before, *rows], known, seed=0, digits=50)
    assert table["mem_mib"].nunique() == table["predicted"].nunique() == 1
    assert table["damage"][1] < table["damage"][0]
    assert table["damage_low"].gt(0).all()


@pytest.mark.slow
def test_points_and_allocations_by_every_prediction(model, known):
    points = by_tensor(model, known, ("int2", "int8"), seed=0, digits=10)
    assert len(points) == 2 * len(quantizable(model))
    ranks = rank_correlations(points)
    assert ranks["prediction"].tolist() == list(PROXIES)
    assert ranks["all formats"].between(-1, 1).all()
    rows = allocate_by_proxy(model, points, 4.0, known)
    assert [r.rule for r in rows] == [*PROXIES, "measured"]
    assert all(bits_of(model, r.plan) <= 4.0 for r in rows)
