"""What the notebooks do again and again: set up, train or load the weights, keep their Fisher information."""

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from lafq import paths
from lafq.diffusion import training
from lafq.diffusion.mnist import mnist
from lafq.diffusion.unet import UNet
from lafq.io import atomic_write, load_tensors, read_metadata, save_tensors, sha256

CHECKPOINT, WEIGHTS, PACKED, FISHER = "checkpoint.safetensors", "ema.safetensors", "packed.safetensors", "fisher.safetensors"


def train(
    profile: str, width: int, device: torch.device, *, seed: int, steps: int, dropout: float, window: int = 50, **settings: Any
) -> None:
    """Train (or continue) the model of a profile; writes results/<profile>/ema.safetensors and training.csv.

    training.csv has the loss averaged over windows of `window` steps. `settings` are those of `training.fit`.
    """
    torch.manual_seed(seed)
    model = UNet(width, dropout).to(device, memory_format=torch.channels_last)
    checkpoint = paths.BUILD / profile / CHECKPOINT
    weights, losses = training.fit(model, mnist(train=True)[0], checkpoint, steps=steps, seed=seed, **settings)
    save_tensors(paths.RESULTS / profile / WEIGHTS, weights, width=width, steps=steps, seed=seed, dropout=dropout, **settings)
    loss = pd.Series(losses, index=range(1, steps + 1)).groupby(lambda step: -(-step // window) * window).mean()
    with atomic_write(paths.RESULTS / profile / "training.csv") as temporary:
        loss.rename_axis("step").rename("loss").to_csv(temporary, float_format="%.6f")


def check_weights(profile: str, width: int, seed: int, training: dict[str, Any], path: Path | None = None) -> None:
    """Check the weights of a profile, or those in the file `path`, without reading their tensors.

    Raises FileNotFoundError naming the two ways to get them when there are none, ValueError when they are damaged or were
    trained with other settings than the profile's (`width`, `seed` and `training`).
    """
    path = path or paths.RESULTS / profile / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(
            f"the trained weights {path} are missing: give a file that has them with WEIGHTS=path, or train them anew with TRAIN=1"
        )
    found = read_metadata(path)
    for name, value in {"width": width, "seed": seed, **training}.items():
        # Weights made before a setting was there do not name it.
        if found.get(name, value) != value:
            raise ValueError(
                f"{path} was trained with {name}={found[name]}, profile {profile} has {value}: give the weights of this profile "
                "with WEIGHTS=path, or train them anew with TRAIN=1"
            )


def take_weights(path: Path, profile: str, width: int, seed: int, training: dict[str, Any]) -> None:
    """Copy trained weights into results/<profile>/, where the notebooks look; errors as `check_weights`."""
    check_weights(profile, width, seed, training, path)
    with atomic_write(paths.RESULTS / profile / WEIGHTS) as temporary:
        shutil.copyfile(path, temporary)


def load_model(profile: str, width: int, device: torch.device | str = "cpu") -> UNet:
    """The model of a profile with its trained EMA weights, in evaluation mode.

    Raises FileNotFoundError naming what makes them when there are none, ValueError when they are of another width or damaged.
    """
    model = UNet(width)
    model.load_state_dict(load_tensors(paths.RESULTS / profile / WEIGHTS, "01_train with TRAIN=1", width=width)[0])
    return model.eval().to(device, memory_format=torch.channels_last)


def save_fisher(profile: str, values: dict[str, Tensor], width: int, **settings: int) -> None:
    """Write every weight's Fisher value to results/<profile>/fisher.safetensors (not committed: 02_fisher makes it).

    settings: how it was estimated (samples, bins, seed), kept in the file.
    """
    save_tensors(paths.RESULTS / profile / FISHER, values, weights=_weights(profile), width=width, settings=settings)


def fisher_settings(profile: str) -> dict[str, int]:
    """The settings that `save_fisher` was given."""
    return read_metadata(paths.RESULTS / profile / FISHER)["settings"]


def load_fisher(profile: str, width: int) -> dict[str, Tensor]:
    """The Fisher value of every weight, by parameter name, as `save_fisher` wrote them.

    Raises FileNotFoundError when there are none, ValueError when they are of other weights than the profile's.
    """
    path = paths.RESULTS / profile / FISHER
    return load_tensors(path, "02_fisher with COMPUTE=True", weights=_weights(profile), width=width)[0]


def _weights(profile: str) -> str:
    path = paths.RESULTS / profile / WEIGHTS
    return sha256(path) if path.is_file() else "none"
