import pandas as pd
import pytest

from lafq.study import workspace
from lafq.study.figures import tables
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
