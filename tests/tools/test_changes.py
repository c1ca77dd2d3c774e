import pandas as pd

from tools import changes


def test_summary():
    old = pd.DataFrame({"threshold": ["a", "b"], "fid": [1.0, None], "peak_mib": [3, 4], "sample": ["x", "y"]})
    again = old.assign(peak_mib=[4, 4], sample=["p", "q"])
    moved = old.assign(fid=[1.5, None])
    before = {"a.csv": old, "b.csv": old, "c.csv": old}
    lines = changes.summary(before, {"a.csv": again, "b.csv": moved, "c.csv": old.iloc[:1], "d.csv": old})
    assert lines == [
        "1 of 3 tables equal those that were there",
        "  b.csv differs: 1 of 2 rows, at most: fid by 0.5",
        "  c.csv differs: 2 rows of 2 columns before, 1 of 2 now",
        "  d.csv is new",
    ]
