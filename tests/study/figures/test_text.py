import pandas as pd
import pytest

from lafq.study.figures import text

FRAME = pd.DataFrame(
    {
        "name": ["a", "b"],
        "n": [1, 2],
        "x": [0.5, float("nan")],
        "x_low": [0.25, 0.0],
        "x_high": [1.0, 1.0],
    }
)


@pytest.mark.parametrize(
    ("rule", "format", "rounding", "words"),
    [
        ("baseline", "fp32", "none", "baseline"),
        ("global", "int3", "feedback", "global, error feedback"),
        ("allocate", "any", "nearest", "allocator, nearest code"),
        ("allocate_all", "any", "tuned", "allocator, all weights, tuned"),
        ("allocate", "coded", "feedback", "allocator, entropy-coded"),
    ],
)
def test_a_row_has_a_name_for_readers(rule, format, rounding, words):
    assert text.name({"rule": rule, "format": format, "rounding": rounding}) == words


def test_a_value_with_its_interval():
    assert text.interval(FRAME.iloc[0], "x") == "+0.50 [+0.25, +1.00]"
    assert text.interval(next(FRAME.itertuples()), "x", ".1f") == "0.5 [0.2, 1.0]"
    assert text.interval(FRAME.iloc[1], "x") == ""
    assert text.write(-0.001, "+.2f") == "+0.00"
    assert (
        text.interval({"measured": 2.0, "low": 1.0, "high": 3.0}, "measured", ".0f") == "2 [1, 3]"
    )
    nothing = float("nan")
    assert text.interval({"x": 2.0, "low": nothing, "high": nothing}, "x", ".0f") == "2"


def test_a_table_has_a_column_per_header():
    columns = {
        "row": "name",
        "N": "n",
        "x": ("x", "{:.1f} dB"),
        "with ends": ("x", ".2f", "interval"),
        "both": lambda r: f"{r['name']}{r['n']}",
    }
    assert text.markdown(text.table(FRAME, columns)).splitlines() == [
        "| row | N | x | with ends | both |",
        "| --- | --- | --- | --- | --- |",
        "| a | 1 | 0.5 dB | 0.50 [0.25, 1.00] | a1 |",
        "| b | 2 |  |  | b2 |",
    ]


def test_a_comparison_that_no_longer_holds_stops():
    assert text.holds(FRAME["n"].iloc[0] < 2) == ""
    with pytest.raises(ValueError, match="no longer"):
        text.holds(FRAME["n"].iloc[1] < 2)
