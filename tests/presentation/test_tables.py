import pandas as pd

from lafq.evaluation.candidates import KEY
from lafq.presentation import sentences, tables


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


def test_terrain_rows_stand_beside_the_allocator_at_their_bytes():
    names = [("fp32", "other noise"), ("uniform", "int4"), ("uniform", "int8"), ("quanto", "qint4"), ("torchao", "8")]
    names += [("allocator", f"bytes of {of}") for of in ("uniform int4", "uniform int8", "quanto qint4")] + [
        ("allocator", "10% of FP32")
    ]
    table = pd.DataFrame(names, columns=["method", "format"]).assign(mem_mib=5.0, mem_share=0.13)
    for column in ("decibels", "slope", "roughness", "spectrum"):
        table[column] = [float(i) for i in range(len(names))]
    found = tables.terrain(table).set_index("row")
    assert found.index.tolist() == ["uniform int4", "uniform int8", "quanto qint4", "torchao 8"]
    assert found.loc["quanto qint4", "decibels"] == "3.0" and found.loc["quanto qint4", "allocator at these bytes"] == "7.0"
    assert found.loc["torchao 8", "allocator at these bytes"] == "not made yet"
    assert found.loc["uniform int4", "stored (share of FP32)"] == "5.00 MiB (13.0%)"
    assert tables.terrain_character(table).set_index("maps").loc["uniform INT8", "slope, m per cell"] == "2"
    said = sentences.terrain(table)
    assert "the allocator has 5.0 dB and uniform INT4 1.0 dB" in said and "a tenth of FP32's bytes the allocator has 8.0 dB" in said
