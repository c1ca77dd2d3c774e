import numpy as np
import pandas as pd

from lafq.study.budget import summaries


def table(ratio, delta_high):
    columns = {
        "granularity": "tensor",
        "damage_low": 0,
        "damage_high": 0,
        "fid_mnist_delta_high": np.nan,
        "n_images": 1000,
    }
    uniform = [
        {"method": m, "budget_bits": b, "damage": 2.0**-b, "mem_mib": b}
        for m in ("uniform", f"uniform, {summaries.FEEDBACK}")
        for b in (2, 4, 8)
    ]
    ours = [
        {
            "method": "allocator",
            "granularity": "mixed",
            "budget_bits": b,
            "damage": d,
            "mem_mib": b,
            "mem_share": b / 32,
            "fid_mnist_delta_high": h,
        }
        for b, d, h in (
            (2, 2.0**-2 * ratio, 99),
            (4, 2.0**-8 * ratio, delta_high),
            (8, 2.0**-8 * ratio, 0),
        )
    ]
    found = pd.DataFrame([columns | row for row in uniform + ours])
    over = found["damage"] / 2.0**-8
    return found.assign(over_int8=over, over_int8_low=over - 0.1, over_int8_high=over + 0.1)


def test_the_summary_follows_from_the_table():
    said = summaries.summary_sentences(
        table(0.3, 2), pd.DataFrame({"method": ["baseline"], "fid_mnist": [100.0]})
    )
    assert "0.30 [0.20, 0.40] times" in said
    assert (
        "The smallest model whose whole FID-rise interval lies below 3.00 (3 % of FP32's FID; N ="
        in said
    )
    assert "3 %" not in summaries.summary_sentences(table(0.3, 2), None)


def test_a_tuned_row_counts_for_the_rise_of_fid():
    rows = table(0.3, 4)
    row = rows[(rows["method"] == "allocator") & (rows["budget_bits"] == 4)]
    rows = pd.concat([rows, row.assign(method="allocator, tuned", fid_mnist_delta_high=2.9)])
    assert summaries.smallest_with_fid(rows, 100.0)["method"] == "allocator, tuned"
    assert summaries.smallest_with_fid(rows, 90.0)["budget_bits"] == 8
