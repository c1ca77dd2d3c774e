import importlib.util
import io
import json
from unittest import mock

import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import BasicConv2d, FeatureExtractorInceptionV3

from lafq.study import workspace
from lafq.study.diffusion.mnist import HELD_OUT, mnist
from lafq.study.images import features, inception
from lafq.study.images.features import FeatureExtractor, mnist_extractor


@pytest.fixture(scope="module")
def images():
    return mnist(train=False)[0]


class Pixels(torch.nn.Module):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return x.flatten(1), None


def test_features_come_batch_by_batch_and_are_kept(sandbox, images):
    network = Pixels()
    extractor = FeatureExtractor("pixels", network, torch.Tensor.float, 2, 10, kept=True)
    seen = extractor.features(images[:5])
    assert (seen.features.shape, seen.logits, network.calls) == ((5, 1024), None, 3)
    assert torch.equal(extractor.features(images[:5]).features, seen.features)
    assert network.calls == 3
    assert torch.equal(extractor.reference.features, images[:10].float().flatten(1))
    assert len(list((workspace.BUILD / "features").iterdir())) == 2


def test_a_reference_of_more_digits_than_there_are(sandbox):
    extractor = FeatureExtractor("pixels", Pixels(), torch.Tensor.float, 100, 5001)
    with pytest.raises(
        ValueError, match=r"5001 .* reference images asked for: choose at most 5000"
    ):
        _ = extractor.reference


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.rand(4, 1, 32, 32), r"images must be uint8 \(N, 1, H, W\), these are torch.float32"),
        (torch.zeros(4, 32, 32, dtype=torch.uint8), r"images must be uint8 \(N, 1, H, W\)"),
        (torch.zeros(4, 1, 28, 28, dtype=torch.uint8), r"images must be \(N, \*\(1, 32"),
    ],
    ids=["float", "no channel", "28x28"],
)
def test_images_of_another_kind_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        mnist_extractor().features(wrong)


def test_classifier_is_as_accurate_as_recorded():
    recorded = json.loads((features.FOLDER / "classifier.json").read_text())["test_accuracy"]
    digits, labels = mnist(train=False)
    correct = mnist_extractor().features(digits).logits.argmax(1) == labels
    assert correct.float().mean().item() == pytest.approx(recorded, abs=2e-4)
    assert recorded >= 0.993


def test_classifier_of_another_sha256(tmp_path):
    content = (features.FOLDER / "classifier.safetensors").read_bytes()
    (tmp_path / "classifier.safetensors").write_bytes(content[:-4] + b"\0\0\0\0")
    (tmp_path / "classifier.json").write_text((features.FOLDER / "classifier.json").read_text())
    with pytest.raises(ValueError, match=r"not the file that classifier\.json describes"):
        features.load_classifier(tmp_path)


@pytest.mark.parametrize("reference_images", [0, 5])
def test_no_inception_is_said_in_one_line(monkeypatch, capsys, reference_images):
    monkeypatch.delenv("LAFQ_INCEPTION", raising=False)
    monkeypatch.setattr(features, "PACKAGE", "no_such_package")
    assert features.inception_extractor(reference_images) is None
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("Inception columns: left empty")


def test_a_package_of_another_content_is_refused(tmp_path):
    (tmp_path / "default_1.pt").write_bytes(b"other")
    with pytest.raises(ValueError, match="not the file expected"):
        inception.package_inception(tmp_path)


@pytest.fixture
def whole():
    """torch-fidelity's own network, with random weights."""
    torch.save({}, nothing := io.BytesIO())
    nothing.seek(0)
    torch.manual_seed(0)
    outputs = ["2048", "logits_unbiased"]
    with mock.patch.object(FeatureExtractorInceptionV3, "load_state_dict"):
        network = FeatureExtractorInceptionV3(
            "inception", outputs, feature_extractor_weights_path=nothing
        )
    return network.eval()


def test_named_weights_with_the_last_layer_give_logits_too(tmp_path, monkeypatch, images, whole):
    path = tmp_path / "weights.pth"
    monkeypatch.setenv("LAFQ_INCEPTION", str(path))
    with pytest.raises(ValueError, match=r"cannot be read .*FileNotFoundError"):
        features.inception_extractor(5)
    torch.save(whole.state_dict(), path)
    extractor = features.inception_extractor(2)
    # Normalization is folded into the convolutions: the same network up to the last digits.
    x = extractor.prepare(images[:2])
    for ours, theirs in zip(extractor.network(x), whole(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_the_packages_network_becomes_torch_fidelitys(images, whole):
    blocks, script = [m for m in whole.modules() if isinstance(m, BasicConv2d)], {}
    for i, block in enumerate(blocks):
        for part in (block.bn.bias, block.bn.running_mean, block.bn.running_var):
            part.add_(torch.rand_like(part) * 0.1)
        script[f"net.layer_{i}.weight"] = block.conv.weight
        script[f"net.layer_{i}.beta"] = block.bn.bias
        script[f"net.layer_{i}.mean"] = block.bn.running_mean
        script[f"net.layer_{i}.var"] = block.bn.running_var
    assert len(script) == 4 * 94
    x = images[:1].expand(-1, 3, -1, -1)
    seen, logits = inception.Inception(script)(x)
    torch.testing.assert_close(seen, whole(x)[0], rtol=1e-3, atol=1e-4)
    assert (seen.shape, logits) == ((1, 2048), None)


@pytest.mark.skipif(
    importlib.util.find_spec(features.PACKAGE) is None, reason="no Inception weights here"
)
def test_inception_tells_digits_from_noise(sandbox, monkeypatch, images):
    monkeypatch.delenv("LAFQ_INCEPTION", raising=False)
    extractor, g = features.inception_extractor(1), torch.Generator().manual_seed(0)
    noise = torch.randint(256, (8, 1, 32, 32), dtype=torch.uint8, generator=g)
    sets = (images[HELD_OUT][:8], images[HELD_OUT][8:16], noise)
    first, second, other = (extractor.features(x).features.mean(0) for x in sets)
    assert (first - other).norm() > 3 * (first - second).norm()
