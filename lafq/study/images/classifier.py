"""The MNIST feature extractor: a small convolutional classifier of 32x32 digits, shipped in
results/classifier.

`python -m lafq.study.images.classifier` trains it anew and writes the weights and a record (test
accuracy, sha256, seed). FID and KID use its 128 features before the last layer, the inception score
its ten logits.
"""

import json
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import RandomAffine
from tqdm import trange

from lafq.rng import generator
from lafq.study import workspace
from lafq.study.diffusion.ddpm import unit_interval
from lafq.study.diffusion.mnist import mnist
from lafq.tensors import atomic_write, load_tensors, save_tensors, sha256

FOLDER = workspace.RESULTS / "classifier"
MADE_BY = "`python -m lafq.study.images.classifier`"
FEATURES = 128


class Classifier(nn.Module):
    """Three stages of convolution and pooling, then 128 features and 10 logits."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels_in, channels in ((1, 16), (16, 32), (32, 64)):
            for c in (channels_in, channels):
                layers += [
                    nn.Conv2d(c, channels, 3, padding=1, bias=False),
                    nn.BatchNorm2d(channels),
                    nn.ReLU(),
                ]
            layers.append(nn.MaxPool2d(2))
        self.body = nn.Sequential(
            *layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 16, FEATURES), nn.ReLU()
        )
        self.head = nn.Linear(FEATURES, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (B, 1, 32, 32) in [0, 1] -> features (B, 128) and logits (B, 10)."""
        features = self.body(x)
        return features, self.head(features)


def load(folder: Path = FOLDER) -> Classifier:
    """The shipped classifier in evaluation mode; ValueError when its file is not the one that was
    recorded.
    """
    path = folder / "classifier.safetensors"
    tensors, _ = load_tensors(path, MADE_BY)
    if sha256(path) != json.loads((folder / "classifier.json").read_text())["sha256"]:
        raise ValueError(
            f"{path} is not the file that classifier.json describes: restore it, or run {MADE_BY} "
            f"again"
        )
    model = Classifier()
    model.load_state_dict(tensors)
    return model.eval()


@torch.inference_mode()
def accuracy(model: Classifier, images: Tensor, labels: Tensor) -> float:
    """Share of uint8 images (N, 1, 32, 32) whose largest logit is that of the label."""
    predictions = [model(unit_interval(batch))[1].argmax(1) for batch in images.split(1000)]
    return (torch.cat(predictions) == labels).float().mean().item()


def train(epochs: int = 6, batch_size: int = 128, peak: float = 4e-3, seed: int = 0) -> Classifier:
    """Train on the 60,000 training digits, slightly shifted and turned, with AdamW and a one-cycle
    learning rate.
    """
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
    """Train, write results/classifier and print the test accuracy."""
    torch.set_num_threads(threads)
    model = train(seed=seed)
    path = FOLDER / "classifier.safetensors"
    save_tensors(path, model.state_dict(), seed=seed)
    record = {
        "test_accuracy": round(accuracy(model, *mnist(train=False)), 4),
        "parameters": sum(p.numel() for p in model.parameters()),
        "sha256": sha256(path),
        "seed": seed,
        "threads": threads,
    }
    with atomic_write(FOLDER / "classifier.json") as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n")
    print(f"{path.relative_to(workspace.ROOT)}: test accuracy {record['test_accuracy']:.2%}")


if __name__ == "__main__":
    main()
