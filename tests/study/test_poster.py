import pandas as pd
import pytest
from scipy import stats

from lafq.study import poster

PUBLISHED = {
    ("baseline", "none"): (59.3030, 1.7225, 134.20),
    ("global", "one tau"): (59.7148, 2.0846, 71.48),
    ("group", "three taus"): (57.8034, 1.7356, None),
    ("mean_std", "mean -+ k*std"): (55.5387, None, 81.56),
    ("ratio", "0.35"): (56.2130, 1.7628, 68.02),
    ("ratio", "0.38"): (55.6704, 1.8436, 64.23),
    ("ratio", "0.40"): (57.7688, 1.7454, 67.70),
}


def test_published_values():
    rows = {(row.method, row.threshold): row for row in poster.POSTER if row.source == "poster"}
    assert {k: (r.fid, r.inception_score, r.mem_mib) for k, r in rows.items()} == PUBLISHED


def test_the_posters_best_ratio_is_in_its_best_range():
    best = min((p for p in poster.POSTER if p.method == "ratio"), key=lambda p: p.fid)
    assert poster.BEST_RATIOS[0] <= float(best.threshold) <= poster.BEST_RATIOS[1]
    assert [float(p.threshold) for p in poster.POSTER if p.method == "ratio"] == list(poster.RATIOS)


def test_the_posters_points_beside_new_noise():
    scores = pd.DataFrame({"features": "Inception", "set": "FP32", "n": [100], "fid_sd": [2.0]})
    table, best = poster.beside_noise(scores), poster.best_ratios(scores)
    assert (len(table), (table["source"] == "poster").sum()) == (11, 6)
    assert table["z"].max() == pytest.approx(4.797 / 8**0.5)
    assert best["change"] == pytest.approx(56.55073 - 62.14, abs=1e-5)
    assert best["z"] == pytest.approx(best["change"] / (2 * (8 / 15) ** 0.5))
    assert best["p"] == pytest.approx(6 * 2 * stats.norm.sf(-best["z"]))


def ours(rule, setting, low="fp16"):
    return pd.DataFrame([{"rule": rule, "setting": setting, "format": low, "mem_mib": 4.0}])


@pytest.mark.parametrize(
    ("row", "fid", "memory"),
    [
        (ours("baseline", "none", "fp32"), 59.303, 134.2),
        (ours("ratio", "0.38"), 55.6704, 64.23),
        (ours("ratio", "0.42"), 64.1, None),
        (ours("group", "factor=1"), 57.8034, 67.9),
        (ours("uniform", "all"), None, 67.7),
        (ours("uniform", "all", "int8"), None, None),
    ],
)
def test_compare_puts_the_published_values_beside_ours(row, fid, memory):
    table = poster.compare(row)
    theirs = table[["fid_paper", "mem_paper_mib", "mem_share_paper"]].iloc[0].fillna(0).tolist()
    assert theirs == [fid or 0, memory or 0, pytest.approx((memory or 0) / 134.20)]
