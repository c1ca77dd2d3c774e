import math

import pandas as pd
import pytest
import torch

from lafq.quantization.model import nbytes
from lafq.study.diffusion.mnist import HELD_OUT, mnist
from lafq.study.diffusion.unet import quantizable
from lafq.study.images import evaluate, sampling
from lafq.study.images.evaluate import Measured, compare
from lafq.study.images.features import FeatureExtractor, mnist_extractor
from lafq.study.images.sampling import Sampling
from lafq.study.rows import BASELINE, Row, uniform_rows
from lafq.study.workspace import Workspace

SMOKE = Workspace("smoke")


class Halves(torch.nn.Module):
    """Features and, where asked for, logits of an image: means of its halves."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, x):
        means = x.unflatten(2, (2, 16)).mean((1, 3)).unflatten(2, (2, 16)).mean(-1).flatten(1)
        return means, means if self.logits else None


def halves(logits):
    return FeatureExtractor("inception", Halves(logits), torch.Tensor.float, 10, 100)


def measured(images):
    """Images as `compare` wants them."""
    extractor = mnist_extractor()
    seen = extractor.features(images)
    scores, draws = extractor.scores(seen), extractor.score_draws(seen, 0)
    return Measured(images, seen.logits.argmax(1), scores, draws)


def test_equal_images_differ_by_nothing():
    images = mnist(train=False)[0][HELD_OUT][:20]
    row = compare(measured(images), measured(images.clone()), 0)
    for metric in ("fid_mnist", "is_mnist", "kid_mnist"):
        assert [row[f"delta_{metric}{end}"] for end in ("", "_low", "_high")] == [0, 0, 0]
        assert row[f"{metric}_low"] < row[metric] < row[f"{metric}_high"]
    assert math.isnan(row["fid_inception"])
    assert (row["psnr"], row["class_changed"], row["below_30"]) == (math.inf, 0, 0)
    assert row["image_psnr_low"] == row["image_psnr"] == row["image_psnr_high"] == pytest.approx(80)


def test_every_extractor_has_its_columns_and_is_needs_logits():
    images = mnist(train=False)[0][HELD_OUT][:12]
    row = evaluate.measure(images, [mnist_extractor(), halves(logits=True)], 0)
    assert set(row.scores) == set(row.draws) == set(evaluate.METRICS)
    assert all(len(draws) == 1000 for draws in row.draws.values())
    without = evaluate.measure(images, [mnist_extractor(), halves(logits=False)], 0)
    assert set(row.scores) - set(without.scores) == {"is_inception"}
    assert without.scores["fid_inception"] == row.scores["fid_inception"]


def test_other_images_have_another_class_and_a_known_psnr():
    digits, labels = mnist(train=False)
    other = torch.cat([digits[labels == 1][:5], digits[labels == 0][:5]])
    row = compare(measured(other), measured(digits[labels == 1][:10]), 0)
    assert row["class_changed"] == pytest.approx(0.5)
    faint = torch.full((4, 1, 32, 32), 26, dtype=torch.uint8)
    row = compare(measured(faint), measured(torch.zeros_like(faint)), 0)
    assert row["psnr"] == pytest.approx(20 * math.log10(255 / 26), abs=1e-4)


def test_a_handful_of_images_has_intervals():
    scored = measured(mnist(train=False)[0][HELD_OUT][:3])
    row = compare(scored, scored, 0)
    assert all(v == v for k, v in row.items() if "inception" not in k)


def test_damage_is_of_the_scale_it_says():
    black = torch.zeros(4, 1, 32, 32, dtype=torch.uint8)
    row = compare(measured(black + 255), measured(black), 0)
    assert (row["image_psnr"], row["psnr"], row["below_30"]) == (0, 0, 1)


def test_quality_is_of_all_images_and_of_every_block(tiny, sandbox):
    table = evaluate.quality(SMOKE, tiny, Sampling(8, 2, 0), block=4)
    assert table["images"].tolist() == ["0-7", "0-3", "4-7"]
    assert table["fid_mnist"].nunique() == 3


def test_blocks_of_the_baseline_differ_from_themselves_by_nothing():
    images = mnist(train=False)[0][HELD_OUT][:40, 0].numpy()
    table = evaluate.block_statistics({"a": images, "b": images // 2}, "a")
    assert table["blocks"].tolist() == [10, 10]
    same, faint = table.itertuples()
    assert (same.block_delta_fid_mnist, same.block_delta_fid_mnist_sd) == (0, 0)
    assert faint.block_delta_fid_mnist == pytest.approx(
        faint.block_fid_mnist - same.block_fid_mnist
    )
    assert faint.fid_mnist_inf > same.fid_mnist_inf


@pytest.fixture
def drawn(monkeypatch):
    """A list with an item for every call of `sample`."""
    calls, sample = [], sampling.sample
    monkeypatch.setattr(sampling, "sample", lambda *a, **k: calls.append(1) or sample(*a, **k))
    return calls


@pytest.mark.slow
def test_equal_plans_are_sampled_once_and_finished_rows_not_again(sandbox, drawn, tiny):
    fp16, three = dict.fromkeys(quantizable(tiny), "fp16"), Sampling(3, 2, 0)
    same = Row("ratio", "0.00", "fp16", "weight", "nearest", fp16)
    rows = [BASELINE, same, *uniform_rows(tiny, ("fp16",))]
    table, images = evaluate.evaluate(SMOKE, tiny, rows, three)
    assert len(drawn) == len(images) == 2
    assert table["mem_mib"].iloc[1] == table["mem_mib"].iloc[2] == nbytes(tiny, fp16) / 2**20
    assert table["fid_inception"].isna().all()
    pd.testing.assert_frame_equal(table, evaluate.evaluate(SMOKE, tiny, rows, three)[0])
    assert len(drawn) == 2
    evaluate.evaluate(SMOKE, tiny, rows[:1], three._replace(seed=1))
    assert len(drawn) == 3


def test_a_bad_plan_stops_before_sampling(sandbox, drawn, tiny):
    bad = Row("x", "", "int1", "tensor", "nearest", {"inp.weight": "int1"})
    with pytest.raises(ValueError, match="unknown format 'int1'"):
        evaluate.evaluate(SMOKE, tiny, [BASELINE, bad], Sampling(3, 2, 0))
    with pytest.raises(ValueError, match="0 images asked for"):
        evaluate.evaluate(SMOKE, tiny, [BASELINE], Sampling(0, 2, 0))
    assert not drawn
