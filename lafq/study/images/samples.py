"""Generated images, kept in files of one batch each, together with a record of where they come
from.

A profile that keeps its images (KEEP) has them in results/<profile>/samples, found by their
*provenance*; any other has them in build/<profile>/samples, found by the weights they were drawn
from (`sample_key`).

The provenance says in words how the weights were made: sha256 of the FP32 weights, rule, threshold,
format, granularity, format of the weights kept, rounding, and the settings of the Fisher
information (`rows.recipe`). With KEEP, the key of a row is the first 16
hexadecimal digits of the sha256 of the JSON of recipe, steps, seed and batch, its keys sorted. A
file is named <key>_<first image>-<last image>.npz. Fisher values computed on another machine differ
in their last bits and flip some masks; the provenance finds the images all the same, and the record
in the file says which weights, processor, threads and torch drew them.
Keys must not change: images take hours.
"""

import hashlib
import json
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lafq.quantization.checkpoint import save_quantized
from lafq.quantization.model import dequantize, weights_sha256
from lafq.study.diffusion.ddpm import sample
from lafq.study.images import cluster
from lafq.study.workspace import Workspace, kind_of_machine
from lafq.tensors import atomic_write

Provenance = dict[str, Any]


class Sampling(NamedTuple):
    """What is drawn: images 0, ..., images - 1 from the noise of `seed`, in so many sampling steps,
    `batch` images at once.
    """

    images: int
    steps: int
    seed: int
    batch: int = 100


class Sampled(NamedTuple):
    """The images of one row, uint8 (N, 1, 32, 32), its key, and the kinds of machine that drew
    them.
    """

    key: str
    images: Tensor
    machines: frozenset[str]


def row_key(provenance: Provenance, sampling: Sampling) -> str:
    """The key of a row whose images are kept (KEEP), as this module's docstring says it."""
    words = json.dumps({"recipe": provenance, **_drawn(sampling)}, sort_keys=True)
    return hashlib.sha256(words.encode()).hexdigest()[:16]


def sample_key(model: nn.Module, *drawn: int) -> str:
    """The key of a row without KEEP: 16 hexadecimal digits for the weights and the numbers that say
    what was drawn from them.
    """
    return hashlib.sha256(f"{weights_sha256(model)} {drawn}".encode()).hexdigest()[:16]


def cached_samples(
    work: Workspace,
    model: nn.Module,
    sampling: Sampling,
    label: str = "sampling",
    provenance: Provenance | None = None,
) -> Sampled:
    """`ddpm.sample`, batch by batch drawn or taken from where images are kept: with a provenance,
    results/<profile>/samples.

    Raises ValueError for no images, and for a file that is damaged, holds other images than its
    name says, or was drawn on this kind of machine from other weights than the provenance now
    gives.
    """
    if sampling.images < 1:
        raise ValueError(f"{sampling.images} images asked for: at least one is needed")
    key, files = _place(work, model, sampling, provenance)
    drawn = {"recipe": provenance, **_drawn(sampling)}
    weights, found, machines = weights_sha256(model), [], set()
    for part, path in files.items():
        if not path.is_file():
            named = label if len(files) == 1 else f"{label}, images {part.start}-{part.stop - 1}"
            pixels = sample(
                model,
                len(part),
                sampling.steps,
                sampling.seed,
                sampling.batch,
                named,
                first=part.start,
            ).numpy()
            _keep(path, pixels, {**drawn, "drawn_from": weights, "machine": kind_of_machine()})
        pixels, record = read(path)
        if {name: record[name] for name in drawn} != drawn or len(pixels) != len(part):
            raise ValueError(
                f"{path} holds the images of another row: delete it, and the next run draws these "
                f"anew"
            )
        if record["drawn_from"] != weights and record["machine"] == kind_of_machine():
            raise ValueError(
                f"{path} was drawn on this kind of machine from other weights than its provenance "
                f"gives now, so a setting or the "
                "code behind it has changed: delete it, and the next run draws these images anew"
            )
        found.append(torch.from_numpy(pixels))
        machines.add(record["machine"])
    return Sampled(key, torch.cat(found), frozenset(machines))


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


def stored_images(work: Workspace, key: str, images: int) -> np.ndarray:
    """The first `images` images of a row from results/<profile>/samples, uint8 (N, 32, 32), by the
    `sample` column of its table.

    Raises FileNotFoundError when there are fewer, ValueError as `read`.
    """
    # Rows of 150 and of 200 images leave two files that begin with the same image: the longer one
    # serves both.
    files = {
        int(path.stem[-11:-6]): path for path in sorted(samples_folder(work).glob(f"{key}_*.npz"))
    }
    parts, count = [], 0
    while count < images and count in files:
        parts.append(read(files[count])[0][:, 0])
        count += len(parts[-1])
    if count < images:
        raise FileNotFoundError(
            f"{images} images of row {key} are needed, {samples_folder(work)} has {count}: "
            f"`make reproduce PROFILE={work.profile}` draws the others"
        )
    return np.concatenate(parts)[:images]


def samples_folder(work: Workspace) -> Path:
    """Where a profile that keeps its images has them."""
    return work.results / "samples"


def sample_on_cluster(
    work: Workspace,
    model: nn.Module,
    copies: Iterator[tuple[nn.Module, Callable[[nn.Module], Provenance | None]]],
    total: int,
    sampling: Sampling,
) -> None:
    """Have the workers of a Dask cluster draw what is not yet kept, each of the `total` plans once.

    copies: quantized copies of `model`, each with a function that gives the provenance of its
    dequantized weights; taken one by one as workers have room. Errors are those of
    `cluster.sample_all`.
    """
    waiting: dict[str, tuple[dict[range, Path], dict[str, Any]]] = {}

    def tasks() -> Iterator[tuple[str, bytes]]:
        for small, provenance_of in copies:
            with TemporaryDirectory() as folder:
                file = Path(folder) / "packed.safetensors"
                save_quantized(file, small, model)
                whole = dequantize(small)
                provenance = provenance_of(whole)
                key, files = _place(work, whole, sampling, provenance)
                if key not in waiting and not all(path.is_file() for path in files.values()):
                    waiting[key] = (
                        files,
                        {
                            "recipe": provenance,
                            **_drawn(sampling),
                            "drawn_from": weights_sha256(whole),
                        },
                    )
                    yield key, file.read_bytes()

    def keep(key: str, drawn: np.ndarray, machine: str) -> None:
        files, record = waiting[key]
        for part, path in files.items():
            if not path.is_file():
                _keep(path, drawn[part.start : part.stop], {**record, "machine": machine})

    where = {"width": model.width, "device": next(model.parameters()).device.type}
    cluster.sample_all(work.scheduler, tasks(), total, keep, **sampling._asdict(), **where)


def _drawn(sampling: Sampling) -> dict[str, int]:
    """What a record and the key of a row say of the draw; the number of images is in the file's
    name.
    """
    return {"steps": sampling.steps, "seed": sampling.seed, "batch": sampling.batch}


def _place(
    work: Workspace, model: nn.Module, sampling: Sampling, provenance: Provenance | None
) -> tuple[str, dict[range, Path]]:
    """The key of a row, and the file of every batch of its images."""
    images, steps, seed, batch = sampling
    if provenance is None:
        folder, key = (
            work.build / "samples" / f"batch-{batch}",
            sample_key(model, images, steps, seed),
        )
    else:
        folder, key = samples_folder(work), row_key(provenance, sampling)
    parts = [range(start, min(start + batch, images)) for start in range(0, images, batch)]
    return key, {part: folder / f"{key}_{part.start:05d}-{part.stop - 1:05d}.npz" for part in parts}


def _keep(path: Path, images: np.ndarray, record: dict[str, Any]) -> None:
    record = {**record, "sha256": hashlib.sha256(images.tobytes()).hexdigest()}
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(
            file, images=images, record=np.array(json.dumps(record, sort_keys=True))
        )
