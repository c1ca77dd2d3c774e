import pytest

from lafq.study import poster
from lafq.study.claims import FID_MARGIN, holm, verdict


@pytest.mark.parametrize(
    ("low", "high", "settings", "expected"),
    [
        (0.2, 0.5, {"above": True}, "supported"),
        (-0.5, -0.2, {"above": True}, "contradicted"),
        (-0.1, 0.2, {"above": True}, "inconclusive"),
        (0.2, 0.5, {"above": False}, "contradicted"),
        (-0.5, -0.2, {"above": False}, "supported"),
        (1.2, 3.0, {"above": True, "null": 1.0}, "supported"),
        (0.9, 3.0, {"above": True, "null": 1.0}, "inconclusive"),
        (-0.9, 0.9, {"above": False, "margin": 1.0}, "effect under 1 FID"),
        (0.2, 0.9, {"above": False, "margin": 1.0}, "effect under 1 FID"),
        (-1.0, 0.9, {"above": False, "margin": 1.0}, "inconclusive"),
        (-3.0, -0.5, {"above": False, "margin": 1.0}, "supported"),
        (0.5, 3.0, {"above": False, "margin": 1.0}, "contradicted"),
        (0.2, 0.5, {"above": True, "p": 0.06}, "inconclusive"),
        (-0.9, 0.9, {"above": False, "margin": 1.0, "p": 0.9}, "effect under 1 FID"),
    ],
)
def test_verdict(low, high, settings, expected):
    assert verdict(low, high, **settings) == expected


def test_the_margin_is_a_third_of_the_posters_gain():
    fid = {row.threshold: row.fid for row in poster.POSTER}
    assert pytest.approx((fid["none"] - fid["0.35"]) / 3, abs=0.05) == FID_MARGIN


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []
