import math

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from lafq.study import published_images as published
from lafq.study import workspace
from lafq.study.diffusion.mnist import HELD_OUT, mnist
from lafq.study.images import metrics
from lafq.study.images.features import Features, mnist_extractor
from lafq.study.images.metrics import Reference


def normal(n, d=16, seed=0, shift=0.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + shift


@pytest.fixture
def few(monkeypatch):
    """Sets of a few images."""
    sets = {name: (words, folder, 3) for name, (words, folder, _) in published.SETS.items()}
    monkeypatch.setattr(published, "SETS", sets)
    return {
        name: np.random.default_rng(i).integers(0, 256, (3, 32, 32), np.uint8)
        for i, name in enumerate(sets)
    }


def test_a_file_and_a_clone_give_the_same_images(few, tmp_path):
    np.savez(tmp_path / "images.npz", **few)
    for name, (_, folder, _) in published.SETS.items():
        (tmp_path / "clone" / folder / "inner").mkdir(parents=True)
        # In the order of the numbers, not of the letters.
        for number, image in zip((2, 10, 11), few[name], strict=True):
            path = tmp_path / "clone" / folder / "inner" / f"{number}.png"
            Image.fromarray(image).convert("RGBA").save(path)
    first, second = (published.read(tmp_path / name) for name in ("images.npz", "clone"))
    assert list(first) == ["FP32", "uniform FP16", "global", "group", "ratio 0.25", "mean_std"]
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["FP32"].shape == (3, 1, 32, 32)


def test_what_is_missing_is_named(few, tmp_path):
    with pytest.raises(FileNotFoundError, match="is not there: give a clone of the authors'"):
        published.read(tmp_path / "nothing")
    np.savez(tmp_path / "images.npz", **{n: x for n, x in few.items() if n != "group"})
    message = r"has 0 images of the set group \(images/layer_group\), not 3"
    with pytest.raises(ValueError, match=message):
        published.read(tmp_path / "images.npz")


def test_the_test_holds_its_level_and_finds_a_difference():
    pairs = [(normal(60, seed=i), normal(60, seed=100 + i)) for i in range(40)]
    ps = [published.mmd_test(*pair, 0, 99)[1] for pair in pairs]
    assert sum(p <= 0.05 for p in ps) <= 6
    assert np.mean(ps) == pytest.approx(0.5, abs=0.15)
    distance, p = published.mmd_test(normal(60), normal(80, seed=1, shift=1.0), 0, 99)
    assert p == 0.01
    assert distance > 0


def test_the_statistic_is_kids():
    x, y = normal(30).double(), normal(40, seed=1).double()
    xx, xy, yy = ((a @ b.T / 16 + 1) ** 3 for a, b in ((x, x), (x, y), (y, y)))
    within = [(k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in (xx, yy)]
    expected = sum(within) - 2 * xy.mean()
    statistic, _ = published.mmd_test(x.float(), y.float(), 0, 1)
    assert statistic == pytest.approx(expected.item(), rel=1e-4)


def test_sets_are_compared_with_the_unquantized_one():
    sets = {
        "FP32": (normal(200), torch.arange(200) % 10),
        "same": (normal(100, seed=1), torch.arange(100) % 10),
        "other": (normal(100, seed=2, shift=0.7), torch.zeros(100, dtype=torch.int64)),
    }
    table = published.compared(sets, seed=0)
    assert table["set"].tolist() == ["FP32, one half against the other", "same", "other"]
    assert table["images"].tolist() == [100, 100, 100]
    assert table["kid_p_holm"].isna().tolist() == [True, False, False]
    same, other = table.iloc[1], table.iloc[2]
    assert min(same["kid_p_holm"], same["classes_p_holm"]) > 0.05
    assert max(other["kid_p_holm"], other["classes_p_holm"]) < 0.01
    assert (other["digit"], other["share"], other["share_fp32"]) == (0, 1, pytest.approx(0.1))
    assert other["fid_to_fp32"] > same["fid_to_fp32"]


def test_scores_are_of_disjoint_blocks():
    features, reference = normal(1200), Reference(normal(500, seed=1))
    logits, sizes = torch.randn(1200, 10), [100, 1000, 1200]
    table = published.block_scores(Features(features, logits), reference, 0, sizes)
    assert table["n"].tolist() == sizes
    assert table["blocks"].tolist() == [12, 1, 1]
    assert table["fid_sd"].notna().tolist() == [True, False, False]
    assert table["fid"].is_monotonic_decreasing
    without = published.block_scores(Features(features, None), reference, 0, sizes)
    pd.testing.assert_frame_equal(table.drop(columns=["is", "is_sd"]), without)


def test_floor_goes_down_with_n_and_its_extrapolation_near_nothing(monkeypatch):
    monkeypatch.setattr(published, "FLOOR_SIZES", (50, 100, 200, 500, 2000, 9999))
    table = published.floor(normal(2000), Reference(normal(5000, seed=1)), seed=0)
    fid, kid = (table[table["metric"] == metric].set_index("n") for metric in ("fid", "kid"))
    assert fid["mean"].is_monotonic_decreasing
    assert abs(fid.loc[math.inf, "mean"]) < 0.1 * fid.loc[100, "mean"]
    assert fid["blocks"].tolist() == [20, 20, 10, 4, 1, 1]
    assert (kid["mean"].abs() < 4 * kid.loc[50, "sd"]).all()


def test_a_missing_table_names_what_makes_it(sandbox):
    with pytest.raises(FileNotFoundError, match="make evidence PUBLISHED=path"):
        workspace.load_table(published.PUBLISHED, "scores")


def test_ink_digits_and_the_two_terms_of_fid():
    digits, labels = mnist(train=False)
    ones, extractor = digits[labels == 1][:50], mnist_extractor()
    sets = {"FP32": ones, "faint": ones // 2, "grey": ones // 2 + 20}
    sets[published.REAL_DIGITS] = digits[HELD_OUT][:50]
    table = published.image_statistics(sets, extractor).set_index("images")
    fp32, real = table.loc["FP32"], table.loc[published.REAL_DIGITS]
    assert table.loc["faint", "ink"] == pytest.approx(fp32["ink"] / 2, rel=0.05)
    assert table.loc["grey", "background"] == pytest.approx(20 / 255)
    assert (fp32["digit"], fp32["class_changed"]) == (1, 0)
    assert fp32["share"] > 0.9
    assert (real["background"], math.isnan(real["class_changed"])) == (0, True)
    assert real["fid_mnist"] < fp32["fid_mnist"]
    features, mean = extractor.features(ones).features, extractor.reference.statistics["mu"]
    distance = (features.double().mean(0) - torch.as_tensor(mean)).square().sum()
    assert fp32["mean_term"] == pytest.approx(distance.item())
    fid = metrics.fid(features, extractor.reference)
    assert fp32["mean_term"] + fp32["covariance_term"] == pytest.approx(fid, rel=1e-9)


def test_each_set_has_the_damage_of_its_model():
    rows = [("uniform", "nearest", "tensor", 4.02, 1.0), ("uniform", "feedback", "tensor", 4.02, 2)]
    rows += [("global", "nearest", "weight", 6.0, 3.0)]
    columns = ["rule", "rounding", "granularity", "budget_bits", "damage"]
    names = ["FP32", "uniform INT4", "global, 6 bits per weight", published.REAL_DIGITS]
    damages = pd.DataFrame(rows, columns=columns)
    table = published.with_damage(pd.DataFrame({"images": names}), damages)
    assert table["damage"].fillna(0).tolist() == [0.0, 1.0, 3.0, 0.0]
