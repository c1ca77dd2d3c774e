"""The subject of the experiment: the digits, the model with its layers and their groups, its files.

The rest of the study imports `mnist` and `unet` from here alone, so another data set or another
model takes their place here.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lafq.study.diffusion.mnist import HELD_OUT, REFERENCE, SHAPE, mnist, unpadded
from lafq.study.diffusion.unet import LAYERS, TIMESTEPS, UNet, layer_of, layer_sizes, quantizable
from lafq.study.workspace import Workspace
from lafq.tensors import atomic_write, load_tensors, read_metadata, save_tensors, sha256

__all__ = ["HELD_OUT", "LAYERS", "REFERENCE", "SHAPE", "TIMESTEPS", "UNet", "layer_of"]
__all__ += ["layer_sizes", "mnist", "quantizable", "unpadded"]

CHECKPOINT = "checkpoint.safetensors"
WEIGHTS = "weights/model.safetensors.index.json"
SHARD_BYTES = 45 * 2**20
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


def save_weights(work: Workspace, weights: dict[str, Tensor], **metadata: Any) -> None:
    """Write trained weights, with how they were made, to results/<profile>/weights: safetensors
    shards and an index, as the Hugging Face hub lays them out; the index names the shards' sha256.
    """
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in weights.items():
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = tensor
    hashes, places, path = {}, {}, work.results / WEIGHTS
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_tensors(path.with_name(name), shard, **metadata)
        hashes[name] = sha256(path.with_name(name))
        places |= dict.fromkeys(shard, name)
    total = sum(tensor.nbytes for tensor in weights.values())
    about = {"total_size": total, "sha256": hashes, "training": metadata}
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps({"metadata": about, "weight_map": places}, indent=1) + "\n")
    for shard in path.parent.glob("model-*.safetensors"):
        if shard.name not in hashes:  # of weights that were here before
            shard.unlink()


def check_weights(work: Workspace, parameters: dict[str, Any]) -> list[Path]:
    """The shards of a profile's weights; FileNotFoundError when one is missing, ValueError when one
    is damaged or they were trained with other settings than these parameters name.
    """
    path, restore = work.results / WEIGHTS, f"`git checkout -- results/{work.profile}` restores it"
    remedy = f"{restore}, or train anew with TRAIN=1"
    if not path.is_file():
        raise FileNotFoundError(f"the trained weights {path} are missing: {remedy}")
    try:
        about = json.loads(path.read_text())["metadata"]
        shards, training = about["sha256"], about["training"]
    except (ValueError, LookupError):
        raise ValueError(f"{path} is damaged: {remedy}") from None
    settings = {"width": parameters["WIDTH"]}
    if "TRAINING" in parameters:
        settings |= {"seed": parameters["SEED"], **parameters["TRAINING"]}
    for name, value in settings.items():
        # Weights made before a setting was there do not name it.
        if (theirs := training.get(name, value)) != value:
            differs = f"{name}={theirs}, profile {work.profile} has {value}"
            raise ValueError(f"{path} was trained with {differs}: {remedy}")
    for shard in (paths := [path.with_name(name) for name in shards]):
        if not shard.is_file():
            raise FileNotFoundError(f"{shard} is missing: {remedy}")
        if sha256(shard) != shards[shard.name]:
            raise ValueError(f"{shard} is damaged, its sha256 is not the index's: {remedy}")
    return paths


def load_model(work: Workspace, width: int) -> UNet:
    """The model with its trained EMA weights, in evaluation mode; errors as `check_weights`."""
    model = UNet(width)
    shards = [load_file(path) for path in check_weights(work, {"WIDTH": width})]
    model.load_state_dict({name: tensor for shard in shards for name, tensor in shard.items()})
    return model.eval().to(work.device, memory_format=torch.channels_last)


def save_fisher(work: Workspace, values: dict[str, Tensor], width: int, **settings: int) -> None:
    """Write empirical Fisher values by name; settings: samples, bins and seed of the estimate."""
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
