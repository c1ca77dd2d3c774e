import pandas as pd

from lafq.evaluation.candidates import KEY
from lafq.presentation import tables


def rows(steps, thresholds):
    columns = {"fid_inception": 60.0, "delta_fid_inception": 0.25, "delta_fid_inception_low": -0.5, "delta_fid_inception_high": 1.0}
    return pd.DataFrame(
        [dict(zip(KEY, ("ratio", t, "int8", "weight"), strict=True)) | columns | {"steps": steps} for t in thresholds]
    )


def test_rows_with_two_numbers_of_steps_stand_side_by_side():
    found = tables.by_steps(rows(1000, ["0.35", "0.40"]), rows(100, ["0.30", "0.40"]))
    assert found["threshold"].tolist() == ["0.40"]
    assert found["FID, 1,000 steps"].item() == "60.00"
    assert found["difference from FP32, 100 steps"].item() == "+0.250 [-0.500, +1.000]"
