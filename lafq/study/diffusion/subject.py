"""The subject of the experiment: the digits, the model with its layers and their groups, its files.

The rest of the study imports `mnist` and `unet` from here alone, so another data set or another
model takes their place here.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lafq.study.diffusion.mnist import HELD_OUT, REFERENCE, SHAPE, mnist, unpadded
from lafq.study.diffusion.unet import (
    LAYERS,
    TIMESTEPS,
    UNet,
    layer_of,
    layer_sizes,
    quantizable,
)
from lafq.study.workspace import Workspace
from lafq.tensors import atomic_write, load_tensors, read_metadata, save_tensors, sha256

__all__ = ["HELD_OUT", "LAYERS", "REFERENCE", "SHAPE", "TIMESTEPS", "UNet", "layer_of"]
__all__ += ["layer_sizes", "mnist", "quantizable", "unpadded"]

CHECKPOINT = "checkpoint.safetensors"
WEIGHTS = "ema.safetensors"
PACKED = "packed.safetensors"
FISHER = "fisher.safetensors"
# The groups that share a threshold under the rule "group".
GROUPS = {
    "Layer1-2": ("Layer1", "Layer2"),
    "Layer3-5": ("Layer3", "Layer4", "Layer5"),
    "Layer6": ("Layer6",),
}
FRONT = GROUPS["Layer1-2"]  # of which C2 speaks


def group_of(name: str) -> str:
    """The group of a parameter's layer; ValueError for a layer of no group."""
    layer = name.split(".", 1)[0]
    groups = {layer: group for group, layers in GROUPS.items() for layer in layers}
    if layer not in groups:
        raise ValueError(f"unknown layer {layer!r}: the groups cover {', '.join(groups)}")
    return groups[layer]


def check_weights(work: Workspace, parameters: dict[str, Any], path: Path | None = None) -> None:
    """Check the weights of a profile with these parameters, or those in the file `path`.

    Raises FileNotFoundError when there are none, ValueError when they are damaged or were trained
    with other settings than the profile's.
    """
    path = path or work.results / WEIGHTS
    remedy = "give a file that has them with WEIGHTS=path, or train them anew with TRAIN=1"
    if not path.is_file():
        raise FileNotFoundError(f"the trained weights {path} are missing: {remedy}")
    metadata = read_metadata(path)
    settings = {"width": parameters["WIDTH"], "seed": parameters["SEED"], **parameters["TRAINING"]}
    for name, value in settings.items():
        # Weights made before a setting was there do not name it.
        if (theirs := metadata.get(name, value)) != value:
            differs = f"{name}={theirs}, profile {work.profile} has {value}"
            raise ValueError(f"{path} was trained with {differs}: {remedy}")


def take_weights(work: Workspace, parameters: dict[str, Any], path: Path) -> None:
    """Copy trained weights into results/<profile>/; errors as `check_weights`."""
    check_weights(work, parameters, path)
    with atomic_write(work.results / WEIGHTS) as temporary:
        shutil.copyfile(path, temporary)


def load_model(work: Workspace, width: int) -> UNet:
    """The model with its trained EMA weights, in evaluation mode; errors as `load_tensors`."""
    weights, _ = load_tensors(work.results / WEIGHTS, "01_train with TRAIN=1", width=width)
    model = UNet(width)
    model.load_state_dict(weights)
    return model.eval().to(work.device, memory_format=torch.channels_last)


def save_fisher(work: Workspace, values: dict[str, Tensor], width: int, **settings: int) -> None:
    """Write the empirical Fisher values of the six layers' weights, by name, to
    results/<profile>/fisher.safetensors; settings: samples, bins and seed of the estimate.
    """
    save_tensors(work.results / FISHER, values, **_origin(work, width), settings=settings)


def fisher_settings(work: Workspace) -> dict[str, int]:
    """The settings that `save_fisher` was given."""
    return read_metadata(work.results / FISHER)["settings"]


def load_fisher(work: Workspace, width: int) -> dict[str, Tensor]:
    """What `save_fisher` wrote; errors as `load_tensors`, also for values of other weights."""
    path = work.results / FISHER
    return load_tensors(path, "02_fisher with COMPUTE=True", **_origin(work, width))[0]


def _origin(work: Workspace, width: int) -> dict[str, Any]:
    path = work.results / WEIGHTS
    return {"weights": sha256(path) if path.is_file() else "none", "width": width}
