import math

import pandas as pd
import pytest

from lafq.study.figures import benchmarks


@pytest.fixture
def peers():
    """Two libraries and uniform formats at two numbers of bits; one library fails at 2 bits."""
    rows = [
        (benchmarks.OURS, "", 4, 0.5),
        ("x", "1.0", 4, 0.25),
        ("x", "1.0", 2, 0.125),
        ("y", "2.0", 4, 0.75),
    ]
    table = pd.DataFrame(rows, columns=["library", "version", "bits", "over_all"]).assign(
        width=16, mem_share=0.125, damage=1e-3
    )
    table = table.assign(over_all_low=table["over_all"] / 2, over_all_high=table["over_all"] * 2)
    table = table.assign(
        **{f"over_shared{end}": table[f"over_all{end}"] * 2 for end in ("", "_low", "_high")},
        error="",
    )
    failed = pd.DataFrame(
        [{"library": "y", "bits": 2, "width": 16, "damage": math.nan, "error": "ValueError: no"}]
    )
    return pd.concat([table, failed], ignore_index=True)


def test_peers_are_shown_by_library_and_bits(peers):
    shown = benchmarks.peers_table(peers, "all")
    assert shown.columns.tolist() == ["width", "library", "4 bits", "2 bits"]
    assert shown["library"].tolist() == ["lafq, uniform", "x 1.0", "y 2.0"]
    assert shown.loc[1, "2 bits"] == "0.12 [0.062, 0.25] at 12.5%"
    assert shown.loc[2].tolist() == [16, "y 2.0", "0.75 [0.38, 1.5] at 12.5%", ""]
    assert benchmarks.peers_table(peers, "shared").loc[1, "2 bits"].startswith("0.25 ")


def test_the_worst_comparison_and_failures_are_named(peers):
    said = benchmarks.peers_sentence(peers)
    assert said.startswith(
        "In 3 comparisons at equal bytes the allocator does at most 0.75 times (y, 4 bits, width "
        "16) the damage"
    )
    assert "The maximum is 1.5 times (y, 4 bits, width 16) if it may quantize only" in said
    assert said.endswith("What failed: y, 2 bits, width 16: ValueError: no.")
    assert "What failed" not in benchmarks.peers_sentence(peers[peers["error"] == ""])


def test_growth_is_extrapolated_by_its_exponent():
    """Seconds grow as weights^1.5 and memory as weights; load takes none."""
    rows = [
        (step, w, 10 * w, factor * (10.0 * w) ** 1.5, factor * 10.0 * w)
        for step, factor in (("allocate", 2), ("load", 1))
        for w in (1, 4)
    ]
    table = pd.DataFrame(rows, columns=["step", "width", "weights", "seconds", "peak_mib"])
    assert benchmarks.exponent(table[table["step"] == "allocate"], "seconds") == pytest.approx(1.5)
    shown = benchmarks.growth_table(table)
    assert shown.columns.tolist() == ["step", "width 1", "width 4", "exponent of time", "of memory"]
    assert shown.loc[0].tolist() == ["allocate", "63 s, 20 MiB", "506 s, 80 MiB", "1.5", "1.0"]
    said = benchmarks.growth_sentence(table, weights=4000.0)
    assert "allocate 8,432.7 min and 7.8 GiB; load 4,216.4 min and 3.9 GiB" in said
    assert "`allocate` needs the most memory" in said


def test_blocks_and_running_are_shown_rounded():
    row = {
        "width": 64,
        "largest": 1152,
        "channels": 4096,
        "columns": 1152,
        "curvature_mib": 1234.5,
        "pass_ratio": 2.345,
        "damage": 1.234e-6,
    }
    shown = benchmarks.blocks_table(
        pd.DataFrame(
            [row | {"over_whole": 1.0149, "over_whole_low": 0.99, "over_whole_high": 1.04}]
        )
    )
    assert shown.iloc[0].tolist() == [
        64,
        1152,
        "all",
        "1,234",
        "2.3",
        "1.23e-06",
        "1.01 [0.99, 1.04]",
    ]
    row = {
        "width": 16,
        "model": "int8",
        "mem_mib": 2.178,
        "damage": 6.24e-6,
        "time_batch_1": 1.234,
        "time_batch_100": 1.0,
    }
    assert benchmarks.running_table(pd.DataFrame([row])).iloc[0].tolist() == [
        16,
        "int8",
        "2.18",
        "6.2e-06",
        "1.23",
        "1.00",
    ]


def test_where_groups_pay_is_counted():
    rows = [("midrise2", "channel", 0.6, None, None), ("int2", "channel", 1.0, None, None)]
    rows += [("int2", "64", 0.5, 3.0, 12.0), ("int2", "32", 0.9, 0.5, 0.9)]
    table = pd.DataFrame(
        rows, columns=["format", "group", "damage", "decibels", "decibels_per_bit"]
    ).assign(bits_per_weight=2.0)
    allocated = {
        "format": "allocator, bytes of int4",
        "group": "any",
        "damage": 0.2,
        "decibels": 1.0,
        "bits_per_weight": 4.0,
    }
    allocated |= {"over": 0.8, "over_low": 0.7, "over_high": 0.9}
    table = pd.concat([table, pd.DataFrame([allocated])], ignore_index=True)
    said = benchmarks.groups_sentence(table)
    assert said.startswith("At 2 bits, four levels do 0.60 times the damage of three.")
    assert "more than 6 dB per extra bit in 1 of 2 rows (int2 in groups of 64)" in said
    assert benchmarks.groups_table(table)["decibels"].tolist() == ["", "", "+3.0", "+0.5", "+1.0"]
    assert said.endswith(
        "divided by its damage without groups: 0.80 [0.70, 0.90] at the bytes of int4."
    )
    assert list(benchmarks.groups_table(table))[-1] == "bits_per_weight"
