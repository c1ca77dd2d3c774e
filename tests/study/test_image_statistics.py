import pandas as pd
import pytest
import torch

from lafq.study.diffusion.mnist import HELD_OUT, mnist
from lafq.study.images import metrics
from lafq.study.images.features import mnist_extractor
from lafq.study.published_images import REAL_DIGITS, image_statistics, with_damage


def test_ink_digits_and_the_two_terms_of_fid():
    digits, labels = mnist(train=False)
    ones, extractor = digits[labels == 1][:50], mnist_extractor()
    reference = extractor.reference
    sets = {
        "FP32": ones,
        "faint": ones // 2,
        "grey": ones // 2 + 20,
        REAL_DIGITS: digits[HELD_OUT][:50],
    }
    table = image_statistics(sets, extractor).set_index("images")
    assert table.loc["faint", "ink"] == pytest.approx(table.loc["FP32", "ink"] / 2, rel=0.05)
    assert table.loc[REAL_DIGITS, "background"] == 0
    assert table.loc["grey", "background"] == pytest.approx(20 / 255)
    assert (table.loc["FP32", "digit"], table.loc["FP32", "class_changed"]) == (1, 0)
    assert table.loc["FP32", "share"] > 0.9
    assert table.loc[REAL_DIGITS, "fid_mnist"] < table.loc["FP32", "fid_mnist"]
    assert torch.isnan(torch.tensor(table.loc[REAL_DIGITS, "class_changed"]))
    features, _ = extractor.features(sets["FP32"])
    distance = (
        (features.double().mean(0) - torch.as_tensor(reference.statistics["mu"])).square().sum()
    )
    assert table.loc["FP32", "mean_term"] == pytest.approx(distance.item())
    assert table.loc["FP32", "mean_term"] + table.loc["FP32", "covariance_term"] == pytest.approx(
        metrics.fid(features, reference), rel=1e-9
    )


def test_each_set_has_the_damage_of_its_model():
    rows = [
        ("uniform", "nearest", "tensor", 4.02, 1.0),
        ("uniform", "feedback", "tensor", 4.02, 2.0),
        ("global", "nearest", "weight", 6.0, 3.0),
    ]
    budget = pd.DataFrame(
        rows, columns=["rule", "rounding", "granularity", "budget_bits", "damage"]
    )
    table = with_damage(
        pd.DataFrame(
            {"images": ["FP32", "uniform INT4", "global, 6 bits per weight", REAL_DIGITS]}
        ),
        budget,
    )
    assert table["damage"].fillna(0).tolist() == [0.0, 1.0, 3.0, 0.0]
