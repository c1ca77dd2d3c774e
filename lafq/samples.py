"""Generated images, kept in build/<profile>/samples by a digest of the weights and the noise they were drawn from."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor, nn

from lafq import cluster, paths, quantize, storage
from lafq.diffusion import sample
from lafq.files import replacing


def sampled(
    model: nn.Module, profile: str, images: int, steps: int, seed: int, label: str = "sampling", batch: int = 100
) -> tuple[str, Tensor]:
    """`diffusion.sample`, drawn or taken from build/<profile>/samples: the digest, and uint8 (images, 1, 32, 32)."""
    key = digest(model, images, steps, seed)
    path = _path(profile, key)
    if not path.is_file():
        _keep(path, sample(model, images, steps, seed, batch, label).numpy())
    return key, torch.from_numpy(np.load(path)["images"])


def draw_elsewhere(
    scheduler: str,
    model: nn.Module,
    packed: Iterator[nn.Module],
    total: int,
    profile: str,
    *,
    images: int,
    steps: int,
    seed: int,
    batch: int = 100,
) -> None:
    """Have the workers of a Dask cluster draw what is not yet in build/<profile>/samples, each of the `total` plans once.

    packed: packed copies of `model`, taken one by one as workers have room. Errors are those of `cluster.sample_all`.
    """

    def tasks() -> Iterator[tuple[Path, bytes]]:
        asked = set()
        for small in packed:
            with TemporaryDirectory() as folder:
                file = Path(folder) / "packed.safetensors"
                storage.save(file, small, model)
                path = _path(profile, digest(quantize.unpack(small), images, steps, seed))
                if path not in asked and not path.is_file():
                    asked.add(path)
                    yield path, file.read_bytes()

    drawn = {"width": model.width, "images": images, "steps": steps, "seed": seed, "batch": batch}
    cluster.sample_all(scheduler, tasks(), total, _keep, **drawn, device=next(model.parameters()).device.type)


def digest(model: nn.Module, *drawn: int) -> str:
    """Sixteen hexadecimal digits for a model's weights and the numbers that say what was drawn from it."""
    return hashlib.sha256(f"{quantize.fingerprint(model)} {drawn}".encode()).hexdigest()[:16]


def _path(profile: str, key: str) -> Path:
    return paths.BUILD / profile / "samples" / f"{key}.npz"


def _keep(path: Path, images: np.ndarray) -> None:
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, images=images)
