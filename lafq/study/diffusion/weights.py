"""The trained weights of a profile: make, check, load; and keep their empirical Fisher information."""

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from lafq.study.diffusion import training
from lafq.study.diffusion.mnist import mnist
from lafq.study.diffusion.unet import UNet
from lafq.study.workspace import Workspace
from lafq.tensors import atomic_write, load_tensors, read_metadata, save_tensors, sha256

CHECKPOINT, WEIGHTS, PACKED, FISHER = (
    "checkpoint.safetensors",
    "ema.safetensors",
    "packed.safetensors",
    "fisher.safetensors",
)


def train(
    work: Workspace,
    width: int,
    *,
    seed: int,
    steps: int,
    dropout: float,
    window: int = 50,
    **settings: Any,
) -> None:
    """Train (or continue) the model of a profile; writes results/<profile>/ema.safetensors and
    training.csv.

    training.csv has the loss averaged over windows of `window` steps. `settings` are those of
    `training.fit`.
    """
    torch.manual_seed(seed)
    model = UNet(width, dropout).to(work.device, memory_format=torch.channels_last)
    checkpoint = work.build / CHECKPOINT
    weights, losses = training.fit(
        model, mnist(train=True)[0], checkpoint, steps=steps, seed=seed, **settings
    )
    save_tensors(
        work.results / WEIGHTS,
        weights,
        width=width,
        steps=steps,
        seed=seed,
        dropout=dropout,
        **settings,
    )
    loss = (
        pd.Series(losses, index=range(1, steps + 1))
        .groupby(lambda step: -(-step // window) * window)
        .mean()
    )
    with atomic_write(work.results / "training.csv") as temporary:
        loss.rename_axis("step").rename("loss").to_csv(temporary, float_format="%.6f")


def check_weights(
    work: Workspace, width: int, seed: int, training: dict[str, Any], path: Path | None = None
) -> None:
    """Check the weights of a profile, or those in the file `path`, without reading their tensors.

    Raises FileNotFoundError naming the two ways to get them when there are none, ValueError when
    they are damaged or were trained with other settings than the profile's (`width`, `seed` and
    `training`).
    """
    path = path or work.results / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(
            f"the trained weights {path} are missing: give a file that has them with WEIGHTS=path, "
            f"or train them anew with TRAIN=1"
        )
    found = read_metadata(path)
    for name, value in {"width": width, "seed": seed, **training}.items():
        # Weights made before a setting was there do not name it.
        if found.get(name, value) != value:
            raise ValueError(
                f"{path} was trained with {name}={found[name]}, profile {work.profile} has "
                f"{value}: give the weights of this "
                "profile with WEIGHTS=path, or train them anew with TRAIN=1"
            )


def take_weights(
    work: Workspace, path: Path, width: int, seed: int, training: dict[str, Any]
) -> None:
    """Copy trained weights into results/<profile>/, where the notebooks look; errors as
    `check_weights`.
    """
    check_weights(work, width, seed, training, path)
    with atomic_write(work.results / WEIGHTS) as temporary:
        shutil.copyfile(path, temporary)


def load_model(work: Workspace, width: int) -> UNet:
    """The model of a profile with its trained EMA weights, in evaluation mode.

    Raises FileNotFoundError naming what makes them when there are none, ValueError when they are of
    another width or damaged.
    """
    model = UNet(width)
    model.load_state_dict(
        load_tensors(work.results / WEIGHTS, "01_train with TRAIN=1", width=width)[0]
    )
    return model.eval().to(work.device, memory_format=torch.channels_last)


def save_fisher(work: Workspace, values: dict[str, Tensor], width: int, **settings: int) -> None:
    """Write the empirical Fisher values of the six layers' weights (`unet.quantizable`) to
    results/<profile>/fisher.safetensors.

    settings: how it was estimated (samples, bins, seed), kept in the file.
    """
    save_tensors(
        work.results / FISHER,
        values,
        weights=_weights_file_sha256(work),
        width=width,
        settings=settings,
    )


def fisher_settings(work: Workspace) -> dict[str, int]:
    """The settings that `save_fisher` was given."""
    return read_metadata(work.results / FISHER)["settings"]


def load_fisher(work: Workspace, width: int) -> dict[str, Tensor]:
    """The empirical Fisher values of the six layers' weights (`unet.quantizable`), by parameter
    name, as `save_fisher` wrote them.

    Raises FileNotFoundError when there are none, ValueError when they are of other weights than the
    profile's.
    """
    path = work.results / FISHER
    return load_tensors(
        path, "02_fisher with COMPUTE=True", weights=_weights_file_sha256(work), width=width
    )[0]


def _weights_file_sha256(work: Workspace) -> str:
    path = work.results / WEIGHTS
    return sha256(path) if path.is_file() else "none"
