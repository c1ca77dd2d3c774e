"""The subject of the experiment: the digits' shape, the model with its layers, and its files.

Another data set or another model takes the place of `mnist` and `unet` here.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lafq.study.diffusion.mnist import SHAPE, mnist
from lafq.study.diffusion.unet import LAYERS, TIMESTEPS, UNet, layer_of, quantizable
from lafq.study.workspace import Workspace
from lafq.tensors import atomic_write, load_tensors, read_metadata, save_tensors, sha256

__all__ = ["LAYERS", "SHAPE", "TIMESTEPS", "UNet", "layer_of", "mnist", "quantizable"]

CHECKPOINT = "checkpoint.safetensors"
WEIGHTS = "ema.safetensors"
PACKED = "packed.safetensors"
FISHER = "fisher.safetensors"


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
    metadata = read_metadata(path)
    for name, value in {"width": width, "seed": seed, **training}.items():
        # Weights made before a setting was there do not name it.
        if metadata.get(name, value) != value:
            raise ValueError(
                f"{path} was trained with {name}={metadata[name]}, profile {work.profile} has "
                f"{value}: give the weights of this profile with WEIGHTS=path, or train them anew "
                f"with TRAIN=1"
            )


def take_weights(
    work: Workspace, path: Path, width: int, seed: int, training: dict[str, Any]
) -> None:
    """Copy trained weights into results/<profile>/; errors as `check_weights`."""
    check_weights(work, width, seed, training, path)
    with atomic_write(work.results / WEIGHTS) as temporary:
        shutil.copyfile(path, temporary)


def load_model(work: Workspace, width: int) -> UNet:
    """The model of a profile with its trained EMA weights, in evaluation mode.

    Raises FileNotFoundError naming what makes them when there are none, ValueError when they are of
    another width or damaged.
    """
    weights, _ = load_tensors(work.results / WEIGHTS, "01_train with TRAIN=1", width=width)
    model = UNet(width)
    model.load_state_dict(weights)
    return model.eval().to(work.device, memory_format=torch.channels_last)


def save_fisher(work: Workspace, values: dict[str, Tensor], width: int, **settings: int) -> None:
    """Write the empirical Fisher values of the six layers' weights (`unet.quantizable`) to
    results/<profile>/fisher.safetensors.

    settings: how it was estimated (samples, bins, seed), kept in the file.
    """
    about = {"weights": _weights_file_sha256(work), "width": width, "settings": settings}
    save_tensors(work.results / FISHER, values, **about)


def fisher_settings(work: Workspace) -> dict[str, int]:
    """The settings that `save_fisher` was given."""
    return read_metadata(work.results / FISHER)["settings"]


def load_fisher(work: Workspace, width: int) -> dict[str, Tensor]:
    """What `save_fisher` wrote, by parameter name.

    Raises FileNotFoundError when there are none, ValueError when they are of other weights than the
    profile's.
    """
    about = {"weights": _weights_file_sha256(work), "width": width}
    return load_tensors(work.results / FISHER, "02_fisher with COMPUTE=True", **about)[0]


def _weights_file_sha256(work: Workspace) -> str:
    path = work.results / WEIGHTS
    return sha256(path) if path.is_file() else "none"
