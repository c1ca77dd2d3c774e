import pytest
import torch

from lafq.study.diffusion.mnist import HELD_OUT, mnist
from lafq.study.images import metrics
from lafq.study.images.features import mnist_extractor
from lafq.study.images.metrics import Reference, fid_draws, interval, resamples


def gaussians(count, dimensions, seed, shift=0.2):
    spread = torch.linspace(0.5, 2, dimensions)
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, dimensions, generator=g) * spread + shift


def reference(dimensions):
    return Reference(gaussians(3000, dimensions, 10**6, shift=0))


def everything(n):
    return torch.arange(n)[None]


def test_fid_of_known_gaussians():
    g = torch.Generator().manual_seed(0)
    other = Reference(torch.randn(20_000, 4, generator=g) + 2)
    features = torch.randn(20_000, 4, generator=g) * 3
    assert metrics.fid(features, other) == pytest.approx(4 * 2**2 + 4 * (3 - 1) ** 2, rel=0.02)


def test_kid_is_zero_for_one_distribution_and_positive_for_two():
    g = torch.Generator().manual_seed(1)
    other, features = Reference(torch.randn(500, 4, generator=g)), torch.randn(500, 4, generator=g)
    assert abs(metrics.kid(features, other)) < 0.03
    assert metrics.kid(features + 2, other) > 1


def test_inception_score_of_certain_and_of_undecided_logits():
    assert metrics.inception_score(100 * torch.eye(10).repeat(10, 1)) == pytest.approx(10)
    assert metrics.inception_score(torch.zeros(50, 10)) == pytest.approx(1)


@pytest.mark.parametrize("metric", [metrics.fid, metrics.kid])
def test_what_is_refused_and_half_precision(metric):
    with pytest.raises(ValueError, match="at least two images"):
        metric(torch.zeros(1, 4), reference(4))
    with pytest.raises(ValueError, match="not finite"):
        metric(torch.full((3, 4), torch.nan), reference(4))
    half = 20 * torch.rand(8, 4, generator=torch.Generator().manual_seed(0)).half()
    assert metric(half, reference(4)) == metric(half.float(), reference(4))


@pytest.mark.slow
def test_torchmetrics_agrees():
    from torchmetrics.image.fid import FrechetInceptionDistance

    images, extractor = mnist(train=False)[0], mnist_extractor()

    class Features(torch.nn.Module):
        num_features = 128

        def forward(self, x):
            return extractor.features(x).features

    theirs = FrechetInceptionDistance(feature=Features(), input_img_size=(1, 32, 32))
    theirs.set_dtype(torch.float64)
    theirs.update(images[:5000], real=True)
    theirs.update(images[HELD_OUT][:1000], real=False)
    ours = metrics.fid(extractor.features(images[HELD_OUT][:1000]).features, extractor.reference)
    assert ours == pytest.approx(theirs.compute().item(), rel=1e-3)


def test_real_digits_score_well_and_noise_badly():
    extractor, g = mnist_extractor(), torch.Generator().manual_seed(0)
    noise = torch.randint(256, (200, 1, 32, 32), dtype=torch.uint8, generator=g)
    real, other = (
        extractor.scores(extractor.features(images))
        for images in (mnist(train=False)[0][HELD_OUT][:200], noise)
    )
    assert real["is_mnist"] > 8
    assert other["fid_mnist"] > 10 * real["fid_mnist"]


@pytest.mark.parametrize(("n", "d"), [(40, 16), (300, 16), (100, 128)])
def test_a_resample_of_everything_is_the_value(n, d):
    other, x = reference(d), gaussians(n, d, 0)
    assert fid_draws(x, other, everything(n)).item() == pytest.approx(
        metrics.fid(x, other), rel=1e-5
    )


def test_many_features_have_torch_fidelitys_fid_too(monkeypatch):
    other, x = reference(16), gaussians(40, 16, 0)
    expected = metrics.fid(x, other)
    monkeypatch.setattr(metrics, "LARGE", 8)
    assert metrics.fid(x, other) == pytest.approx(expected, rel=1e-5)


def test_kid_and_inception_score_of_everything_are_the_values():
    other, x = reference(8), gaussians(400, 8, 0, shift=0.5)
    # torch-fidelity averages over 100 subsets of the reference, here it is taken whole.
    assert metrics.kid_draws(x, other, everything(400)).item() == pytest.approx(
        metrics.kid(x, other), rel=0.05
    )
    logits = torch.randn(50, 10, generator=torch.Generator().manual_seed(0)) * 3
    assert metrics.inception_score_draws(logits, everything(50)).item() == pytest.approx(
        metrics.inception_score(logits), rel=1e-5
    )


def test_a_resample_scores_as_the_repeated_images_do():
    other, x = reference(16), gaussians(60, 16, 1)
    indices = resamples(60, seed=0, count=3)
    expected = [metrics.fid(x[i], other) for i in indices]
    assert fid_draws(x, other, indices).tolist() == pytest.approx(expected, rel=1e-5)


def coverage(n, d, trials):
    """Shares of the trials whose centred, and whose plain percentile, interval holds the expected
    FID at this N.
    """
    other = reference(d)
    expected = sum(metrics.fid(gaussians(n, d, 10**4 + i), other) for i in range(200)) / 200
    hits, plain = 0, 0
    for i in range(trials):
        x = gaussians(n, d, i)
        draws = fid_draws(x, other, resamples(n, seed=i, count=300))
        low, high = interval(metrics.fid(x, other), draws)
        hits += low <= expected <= high
        ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
        low, high = torch.quantile(draws, ends).tolist()
        plain += low <= expected <= high
    return hits / trials, plain / trials


@pytest.mark.slow
def test_intervals_cover_the_expected_value():
    # 95 % of 100 trials has a standard deviation of 2.2 %; the percentile interval misses on
    # account of its bias.
    centred, plain = coverage(100, 16, trials=100)
    assert centred >= 0.88
    assert plain < centred
    # Fewer images than features: never too narrow, where the percentile interval never covers.
    centred, plain = coverage(60, 128, trials=10)
    assert centred >= 0.9
    assert plain == 0


def test_intervals_cover_a_paired_difference():
    other, n, trials = reference(16), 100, 60
    pairs = [
        (gaussians(n, 16, i), gaussians(n, 16, i) + 0.02 * gaussians(n, 16, i + 10**5))
        for i in range(trials + 200)
    ]
    deltas = [metrics.fid(b, other) - metrics.fid(a, other) for a, b in pairs]
    expected = sum(deltas[trials:]) / 200
    hits, widths = 0, []
    for i in range(trials):
        indices = resamples(n, seed=i, count=300)
        a, b = (fid_draws(x, other, indices) for x in pairs[i])
        low, high = interval(deltas[i], b - a)
        hits += low <= expected <= high
        alone = interval(0, a)
        widths.append((high - low) / (alone[1] - alone[0]))
    assert hits / trials >= 0.85
    assert max(widths) < 0.3  # common noise: far narrower than one side's interval


def test_fid_at_infinity_is_the_intercept():
    sizes = [200, 500, 1000]
    assert metrics.fid_at_infinity(sizes, [7 + 300 / n for n in sizes]) == pytest.approx(7)
