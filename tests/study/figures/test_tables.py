import pandas as pd
import pytest

from lafq.study import workspace
from lafq.study.figures import audit_tables, benchmarks, tables, terrain
from lafq.study.rows import KEY
from lafq.study.workspace import Workspace


def rows(steps, thresholds):
    columns = {
        "fid_inception": 60.0,
        "delta_fid_inception": 0.25,
        "delta_fid_inception_low": -0.5,
        "delta_fid_inception_high": 1.0,
    }
    return pd.DataFrame(
        [
            dict(zip(KEY, ("ratio", t, "int8", "weight", "nearest"), strict=True))
            | columns
            | {"steps": steps}
            for t in thresholds
        ]
    )


def test_rows_with_two_numbers_of_steps_stand_side_by_side():
    found = tables.by_steps(rows(1000, ["0.35", "0.40"]), rows(100, ["0.30", "0.40"]))
    assert found["setting"].tolist() == ["0.40"]
    assert found["FID, 1,000 steps"].item() == "60.00"
    assert found["difference from FP32, 100 steps"].item() == "+0.250 [-0.500, +1.000]"


def test_terrain_rows_stand_beside_the_allocator_at_their_bytes():
    names = [
        ("fp32", "other noise"),
        ("uniform", "int4"),
        ("uniform", "int8"),
        ("quanto", "qint4"),
        ("torchao", "8"),
    ]
    names += [
        ("allocator", f"bytes of {of}") for of in ("uniform int4", "uniform int8", "quanto qint4")
    ] + [
        ("allocator", "10% of FP32"),
        ("entropy-coded", "bytes of uniform int4"),
        ("entropy-coded", "10% of FP32"),
    ]
    table = pd.DataFrame(names, columns=["method", "format"]).assign(mem_mib=5.0, mem_share=0.13)
    for column in ("decibels", "slope", "roughness", "spectrum"):
        table[column] = [float(i) for i in range(len(names))]
    found = terrain.rows_table(table).set_index("row")
    assert found.index.tolist() == ["uniform int4", "uniform int8", "quanto qint4", "torchao 8"]
    assert (
        found.loc["quanto qint4", "decibels"] == "3.0"
        and found.loc["quanto qint4", "decibels, allocator at these bytes"] == "7.0"
    )
    assert found.loc["torchao 8", "decibels, allocator at these bytes"] == "not made yet"
    assert found["decibels, coded file of these bytes"].to_dict() == {
        **dict.fromkeys(found.index, ""),
        "uniform int4": "9.0",
    }
    assert found.loc["uniform int4", "in memory (share of FP32)"] == "5.00 MiB (13.0%)"
    assert (
        terrain.character_table(table).set_index("maps").loc["uniform INT8", "slope, m per cell"]
        == "2"
    )
    said = terrain.rows_sentence(table)
    assert (
        "the allocator has 5.0 dB and uniform INT4 1.0 dB" in said
        and "the allocator has 8.0 dB, and an entropy-coded file 10.0 dB" in said
    )


def test_passes_are_means_over_draws_with_plain_ones_in_brackets():
    rows = [
        ("net", 1, draw, kind, value, 1.0)
        for draw in (0, 1)
        for kind, value in (("shrunk", 0.5 + draw), ("plain", 4.0))
    ]
    rows += [
        ("net", 64, 0, "shrunk", 0.25, 0.9),
        ("net", 64, 0, "plain", 0.3, 1.2),
        ("other", 1, 0, "shrunk", 0.7, 1.4),
    ]
    rows += [
        ("other", 1, 0, "plain", 9.0, 50.0),
        ("other", 64, 0, "shrunk", 0.6, 1.1),
        ("other", 64, 0, "plain", 0.6, 1.1),
    ]
    rows += [
        ("net", 8, 0, kind, value, 1.0)
        for kind, value in (("shrunk", 0.4), ("plain", 0.8), (benchmarks.FOUR, 0.2))
    ]
    rows += [
        ("other", 8, 0, kind, value, 1.0)
        for kind, value in (("shrunk", 0.4), ("plain", 0.8), (benchmarks.FOUR, 0.5))
    ]
    table = pd.DataFrame(
        rows, columns=["network", "passes", "draw", "estimates", "over_uniform", "over_predicted"]
    )
    shown = benchmarks.passes_table(table).set_index("passes").loc[[1, 64]]
    assert shown["net"].tolist() == ["1 (4)", "0.25 (0.3)"]
    assert shown["other"].tolist() == ["0.7 (9)", "0.6 (0.6)"]
    said = benchmarks.passes_sentence(table)
    assert (
        "The worst of 7 plans does 1.50 times uniform INT4's damage with shrunk estimates; with "
        "plain means, 9.0 times." in said
    )
    assert "0.90 to 1.40 times the predicted one" in said
    assert (
        "From 64 passes on, plain means give 1.00 to 1.20 times the damage of shrunk estimates."
        in said
    )
    assert said.endswith("multiply the damage at 2 to 32 passes by 0.50 to 1.25 (mean 0.88).")


def test_coded_rows_show_file_and_memory():
    names = [
        ("uniform", 8.02),
        ("allocator, all weights", 3.02),
        ("allocator, all weights", 3.0),
        ("allocator, entropy-coded", 3.0),
    ]
    table = pd.DataFrame(names, columns=["method", "budget_bits"]).assign(
        granularity="channel", file_mib=0.8, mem_mib=1.2
    )
    for name, value in (("damage", 1e-6), ("over_int8", 0.25), ("fid_mnist_delta", float("nan"))):
        table = table.assign(**{name: value, f"{name}_low": value, f"{name}_high": value})
    shown = tables.coded_shown(table)
    assert shown["method"].tolist() == [
        "uniform, nearest code",
        "allocator, all weights",
        "allocator, entropy-coded",
    ]
    assert {"file_mib", "mem_mib"} < set(shown) and "fid_mnist_delta" not in shown


def test_terrain_passes_show_what_the_last_ones_gained():
    table = pd.DataFrame(
        {"passes": [1, 8, 32], "decibels": [10.0, 41.2, 42.0], "predicted": [20.0, 43.0, 41.5]}
    )
    assert terrain.passes_table(table).iloc[1].tolist() == [8, "41.2", "43.0"]
    said = terrain.passes_sentence(table)
    assert said.startswith("From 8 to 32 passes the plan gains 0.8 dB")
    assert said.endswith("Predicted minus measured: -0.5 to +10.0 dB.")


def test_file_resident_and_peak_bytes_stand_side_by_side(sandbox):
    work = Workspace("smoke", keep=True)
    row = {
        "method": "allocator, entropy-coded",
        "granularity": "channel",
        "budget_bits": 3.0,
        "file_mib": 0.8,
        "mem_mib": 1.2,
    }
    coded = pd.DataFrame(
        [
            row
            | {
                "damage": 1.0,
                "damage_low": 0.5,
                "damage_high": 2.0,
                "over_int8": 1.0,
                "fid_mnist_delta": float("nan"),
            }
        ]
    )
    peak = pd.DataFrame(
        [{"method": row["method"], "granularity": "channel", "budget_bits": 3.0, "peak_mib": 9}]
    )
    workspace.save_table(work, "11_peak_memory", peak)
    assert tables.coded_bytes(work, coded).iloc[0, 2:].tolist() == ["0.80", "1.20", 9, "1"]


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("uniform", "uniform, nearest code"),
        ("ratio", "ratio, nearest code"),
        ("ratio, error feedback", "ratio, error feedback"),
        ("allocator", "allocator"),
        ("by Fisher", "by Fisher"),
    ],
)
def test_every_row_of_a_budget_names_its_rounding(method, said):
    assert tables.with_rounding(method) == said


def test_choices_of_fisher_values_have_their_rows():
    choices = pd.DataFrame(
        {
            "choice": ["ours", "one (R2)"],
            "rank_correlation": [1.0, 0.234],
            "kept_in_common": [1.0, 0.579],
        }
    )
    choices["delta_loss_int4"] = [1e-4, 2e-4]
    rows = pd.DataFrame({"threshold": ["0.35, one (R2)", "0.35, ours"]})
    for column, values in {"delta_fid_mnist": (0.5, 0.25), "delta_loss": (2e-6, 1e-6)}.items():
        rows[column], rows[f"{column}_low"], rows[f"{column}_high"] = (
            values,
            (-1.0, -1.0),
            (1.0, 1.0),
        )
    shown = audit_tables.choices_shown(choices, rows)
    assert shown["choice"].tolist() == ["ours", "one (R2)"]
    assert shown["delta_fid_mnist"].tolist() == [
        "+0.250 [-1.000, +1.000]",
        "+0.500 [-1.000, +1.000]",
    ]
    assert shown["delta_loss_int4"].tolist() == ["+1.00e-04", "+2.00e-04"]


def test_a_change_of_protocol_has_its_interval_where_it_is_paired():
    columns = ["features", "choice", "here", "released", "change", "change_low", "change_high"]
    rows = [
        ("MNIST", "a (R1)", 0.44, 0.0, -0.44, -0.92, 0.04),
        ("MNIST", "b (R7)", 0.44, 4.22, 3.78, float("nan"), float("nan")),
    ]
    shown = audit_tables.protocol_shown(pd.DataFrame(rows, columns=columns), "R1", "R7")
    assert shown["change"].tolist() == ["-0.44 [-0.92, +0.04]", "+3.78"]
