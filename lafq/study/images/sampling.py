"""Generated images: drawn once, and kept in files of one batch each with a record of where they
come from.

A profile that keeps its images (KEEP) has them in results/<profile>/samples, found by their
*recipe* (`rows.recipe`): it says in words how the weights were made. The key of a row is then the
first 16 hexadecimal digits of the sha256 of the JSON of recipe, steps, seed and batch, its keys
sorted. Fisher values computed on another machine differ in their last bits and flip some masks; the
recipe finds the images all the same, and the record in the file says which weights, processor,
threads and torch drew them. Any other profile has its images in build/<profile>/samples, found by
the weights they were drawn from, and beside its tables, in one npz for each.

A file is named <key>_<first image>-<last image>.npz. Keys must not change: images take hours.
"""

import hashlib
import json
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lafq.quantization.checkpoint import save_quantized
from lafq.quantization.model import dequantize_, weights_sha256
from lafq.study.diffusion.ddpm import sample
from lafq.study.images import cluster
from lafq.study.workspace import Workspace, kind_of_machine
from lafq.tensors import atomic_write

Recipe = dict[str, Any]


class Sampling(NamedTuple):
    """What is drawn: images 0, ..., images - 1 from the noise of `seed`, in so many sampling steps,
    `batch` images at once.
    """

    images: int
    steps: int
    seed: int
    batch: int = 100

    @property
    def batches(self) -> list[range]:
        """The images of every batch."""
        starts = range(0, self.images, self.batch)
        return [range(start, min(start + self.batch, self.images)) for start in starts]

    @property
    def record(self) -> dict[str, int]:
        """What files and keys say of the draw; the number of images is in the file's name."""
        return {"steps": self.steps, "seed": self.seed, "batch": self.batch}


class Sampled(NamedTuple):
    """The images of one row, uint8 (N, 1, 32, 32), its key, and the kinds of machine that drew
    them.
    """

    key: str
    images: Tensor
    machines: frozenset[str]


def row_key(recipe: Recipe, sampling: Sampling) -> str:
    """The key of a row whose images are kept (KEEP)."""
    words = json.dumps({"recipe": recipe, **sampling.record}, sort_keys=True)
    return hashlib.sha256(words.encode()).hexdigest()[:16]


def read(path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """The images of a file, uint8 (N, 1, 32, 32), and its record; ValueError when it is damaged."""
    try:
        with np.load(path) as file:
            pixels, record = file["images"], json.loads(str(file["record"]))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}): delete it, and the next run draws its "
            f"images anew"
        ) from None
    if hashlib.sha256(pixels.tobytes()).hexdigest() != record["sha256"]:
        raise ValueError(
            f"{path} is damaged (its images are not those recorded): delete it, and the next run "
            f"draws them anew"
        )
    return pixels, record


@dataclass(frozen=True)
class ImageStore:
    """The images of a profile: drawn where they are not kept yet, found by the key of their row."""

    work: Workspace

    @property
    def folder(self) -> Path:
        """Where a profile that keeps its images has them."""
        return self.work.results / "samples"

    def draw(
        self,
        model: nn.Module,
        sampling: Sampling,
        label: str = "sampling",
        recipe: Recipe | None = None,
    ) -> Sampled:
        """The images of `ddpm.sample`, batch by batch drawn or taken from where they are kept.

        Raises ValueError for no images, and for a file that is damaged, holds other images than its
        name says, or was drawn on this kind of machine from other weights than the recipe now
        gives.
        """
        if sampling.images < 1:
            raise ValueError(f"{sampling.images} images asked for: at least one is needed")
        weights = weights_sha256(model)
        key, files = self._place(weights, sampling, recipe)
        record = {"recipe": recipe, **sampling.record, "drawn_from": weights}
        images, machines = [], set()
        for batch, path in files.items():
            if not path.is_file():
                named = f"{label}, images {batch.start}-{batch.stop - 1}"
                pixels = sample(
                    model,
                    len(batch),
                    *(sampling.steps, sampling.seed, sampling.batch),
                    named if len(files) > 1 else label,
                    first=batch.start,
                )
                _keep(path, pixels.numpy(), {**record, "machine": kind_of_machine()})
            pixels, machine = _checked(path, len(batch), record)
            images.append(torch.from_numpy(pixels))
            machines.add(machine)
        return Sampled(key, torch.cat(images), frozenset(machines))

    def draw_on_cluster(
        self,
        model: nn.Module,
        copies: Iterator[tuple[nn.Module, Callable[[nn.Module], Recipe | None]]],
        total: int,
        sampling: Sampling,
    ) -> None:
        """Have the workers of a Dask cluster draw what is not yet kept, each of the `total` plans
        once.

        copies: quantized copies of `model`, each with a function that gives the recipe of its
        dequantized weights; taken one by one as workers have room. Errors are those of
        `cluster.sample_all`.
        """
        waiting: dict[str, tuple[dict[range, Path], dict[str, Any]]] = {}

        def tasks() -> Iterator[tuple[str, bytes]]:
            for small, recipe_of in copies:
                packed = _packed(small, model)
                whole = dequantize_(small)
                recipe, weights = recipe_of(whole), weights_sha256(whole)
                key, files = self._place(weights, sampling, recipe)
                if key not in waiting and not all(path.is_file() for path in files.values()):
                    record = {"recipe": recipe, **sampling.record, "drawn_from": weights}
                    waiting[key] = files, record
                    yield key, packed

        def keep(key: str, drawn: np.ndarray, machine: str) -> None:
            files, record = waiting[key]
            for batch, path in files.items():
                if not path.is_file():
                    _keep(path, drawn[batch.start : batch.stop], {**record, "machine": machine})

        where = {"width": model.width, "device": next(model.parameters()).device.type}
        cluster.sample_all(self.work.scheduler, tasks(), total, keep, **sampling._asdict(), **where)

    def images(self, key: str, count: int) -> np.ndarray:
        """The first `count` kept images of a row, uint8 (N, 32, 32), by the `sample` column of its
        table.

        Raises FileNotFoundError when there are fewer, ValueError as `read`.
        """
        # Rows of 150 and of 200 images leave two files that begin with the same image: the longer
        # one serves both.
        files = {int(path.stem[-11:-6]): path for path in sorted(self.folder.glob(f"{key}_*.npz"))}
        parts, there = [], 0
        while there < count and there in files:
            parts.append(read(files[there])[0][:, 0])
            there += len(parts[-1])
        if there < count:
            raise FileNotFoundError(
                f"{count} images of row {key} are needed, {self.folder} has {there}: "
                f"`make reproduce PROFILE={self.work.profile}` draws the others"
            )
        return np.concatenate(parts)[:count]

    def _place(
        self, weights: str, sampling: Sampling, recipe: Recipe | None
    ) -> tuple[str, dict[range, Path]]:
        """The key of a row, and the file of every batch of its images."""
        if recipe is not None:
            folder, key = self.folder, row_key(recipe, sampling)
        else:
            folder = self.work.build / "samples" / f"batch-{sampling.batch}"
            words = f"{weights} {(sampling.images, sampling.steps, sampling.seed)}"
            key = hashlib.sha256(words.encode()).hexdigest()[:16]
        return key, {
            batch: folder / f"{key}_{batch.start:05d}-{batch.stop - 1:05d}.npz"
            for batch in sampling.batches
        }


def _keep(path: Path, images: np.ndarray, record: dict[str, Any]) -> None:
    record = {**record, "sha256": hashlib.sha256(images.tobytes()).hexdigest()}
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        words = np.array(json.dumps(record, sort_keys=True))
        np.savez_compressed(file, images=images, record=words)


def _checked(path: Path, count: int, expected: dict[str, Any]) -> tuple[np.ndarray, str]:
    """The `count` images of a file with the record expected, and the machine that drew them."""
    pixels, record = read(path)
    same = {name: record[name] == value for name, value in expected.items()}
    other_weights = not same.pop("drawn_from")
    if len(pixels) != count or not all(same.values()):
        raise ValueError(
            f"{path} holds the images of another row: delete it, and the next run draws these anew"
        )
    if other_weights and record["machine"] == kind_of_machine():
        raise ValueError(
            f"{path} was drawn on this kind of machine from other weights than its recipe gives "
            f"now, so a setting or the code behind it has changed: delete it, and the next run "
            f"draws these images anew"
        )
    return pixels, record["machine"]


def _packed(small: nn.Module, model: nn.Module) -> bytes:
    with TemporaryDirectory() as folder:
        file = Path(folder) / "packed.safetensors"
        save_quantized(file, small, model)
        return file.read_bytes()
