import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from lafq.study import published_images as published
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
        for number, image in zip(
            (2, 10, 11), few[name], strict=True
        ):  # in the order of the numbers, not of the letters
            Image.fromarray(image).convert("RGBA").save(
                tmp_path / "clone" / folder / "inner" / f"{number}.png"
            )
    first, second = (published.read(tmp_path / name) for name in ("images.npz", "clone"))
    assert list(first) == ["FP32", "uniform FP16", "global", "group", "ratio 0.25", "mean_std"]
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["FP32"].shape == (3, 1, 32, 32)


def test_what_is_missing_is_named(few, tmp_path):
    with pytest.raises(
        FileNotFoundError, match="is not there: give a clone of the authors' repository"
    ):
        published.read(tmp_path / "nothing")
    np.savez(tmp_path / "images.npz", **{n: x for n, x in few.items() if n != "group"})
    with pytest.raises(
        ValueError, match=r"has 0 images of the set group \(images/layer_group\), not 3"
    ):
        published.read(tmp_path / "images.npz")


def test_the_test_holds_its_level_and_finds_a_difference():
    ps = [
        published.mmd_test(normal(60, seed=i), normal(60, seed=100 + i), 0, 99)[1]
        for i in range(40)
    ]
    assert sum(p <= 0.05 for p in ps) <= 6
    assert np.mean(ps) == pytest.approx(0.5, abs=0.15)
    distance, p = published.mmd_test(normal(60), normal(80, seed=1, shift=1.0), 0, 99)
    assert p == 0.01
    assert distance > 0


def test_the_statistic_is_kids():
    x, y = normal(30).double(), normal(40, seed=1).double()
    k = lambda a, b: (a @ b.T / 16 + 1) ** 3  # noqa: E731
    within = [(k(z, z).sum() - k(z, z).trace()) / (len(z) * (len(z) - 1)) for z in (x, y)]
    expected = sum(within) - 2 * k(x, y).mean()
    assert published.mmd_test(x.float(), y.float(), 0, 1)[0] == pytest.approx(
        expected.item(), rel=1e-4
    )


def test_sets_are_compared_with_the_unquantized_one():
    features = {
        "FP32": normal(200),
        "same": normal(100, seed=1),
        "other": normal(100, seed=2, shift=0.7),
    }
    classes = {
        "FP32": torch.arange(200) % 10,
        "same": torch.arange(100) % 10,
        "other": torch.zeros(100, dtype=torch.int64),
    }
    table = published.compared(features, classes, seed=0)
    assert table["set"].tolist() == ["FP32, one half against the other", "same", "other"]
    assert table["images"].tolist() == [100, 100, 100]
    assert table["kid_p_holm"].isna().tolist() == [True, False, False]
    same, other = table.iloc[1], table.iloc[2]
    assert min(same["kid_p_holm"], same["classes_p_holm"]) > 0.05
    assert max(other["kid_p_holm"], other["classes_p_holm"]) < 0.01
    assert (other["digit"], other["share"], other["share_fp32"]) == (0, 1, pytest.approx(0.1))
    assert other["fid_to_fp32"] > same["fid_to_fp32"]


def test_scores_are_of_disjoint_blocks():
    table = published.scores(
        normal(1200), torch.randn(1200, 10), Reference(normal(500, seed=1)), seed=0
    )
    assert table["n"].tolist() == [100, 1000, 1200]
    assert table["blocks"].tolist() == [12, 1, 1]
    assert table["fid_sd"].notna().tolist() == [True, False, False]
    assert table["fid"].is_monotonic_decreasing
    without = published.scores(normal(1200), None, Reference(normal(500, seed=1)), seed=0)
    pd.testing.assert_frame_equal(table.drop(columns=["is", "is_sd"]), without)


def test_a_missing_table_names_what_makes_it(tmp_path, monkeypatch):
    monkeypatch.setattr(published, "FOLDER", tmp_path)
    with pytest.raises(FileNotFoundError, match="make evidence PUBLISHED=path"):
        published.load("scores")
