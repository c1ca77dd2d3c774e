"""Generated images, drawn once and kept: <key>_<first image>-<last image>.npz has those of a batch
and a record of where they come from. Keys must not change: images take hours.

A profile that keeps its images (KEEP) has them in results/<profile>/samples, found by their
*recipe* (`rows.recipe`), which says in words how the weights were made: Fisher values computed on
another machine differ in their last bits and flip some masks, and the recipe finds the images all
the same. Any other profile has its images in build/<profile>/samples, found by the weights they
were drawn from, and beside its tables, in one npz for each.
"""

import hashlib
import json
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from lafq.quantization.model import weights_sha256
from lafq.study.diffusion.ddpm import sample
from lafq.study.workspace import Workspace, kind_of_machine, save_arrays

Recipe = dict[str, Any]
COUNTED = "images.csv"
REMEDY = "delete it, and the next run draws its images anew"


class Sampling(NamedTuple):
    """Images 0, ..., images - 1 from the noise of `seed`, in so many steps, `batch` at once."""

    images: int
    steps: int
    seed: int
    batch: int = 100

    @property
    def batches(self) -> list[range]:
        """The images of every batch."""
        every = range(self.images)
        return [every[start : start + self.batch] for start in every[:: self.batch]]

    @property
    def record(self) -> dict[str, int]:
        """What files and keys say of the draw; the number of images is in the file's name."""
        return {"steps": self.steps, "seed": self.seed, "batch": self.batch}


class Sampled(NamedTuple):
    """The images of a row, uint8 (N, 1, 32, 32), its key, and the kinds of machine that drew."""

    key: str
    images: Tensor
    machines: frozenset[str]


def row_key(recipe: Recipe, sampling: Sampling) -> str:
    """The key of a row whose images are kept."""
    return _key(json.dumps({"recipe": recipe, **sampling.record}, sort_keys=True))


def _key(words: str) -> str:
    return hashlib.sha256(words.encode()).hexdigest()[:16]


def read(path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """The images of a file, uint8 (N, 1, 32, 32), and its record; ValueError when it is damaged."""
    try:
        with np.load(path) as file:
            images, record = file["images"], json.loads(str(file["record"]))
        if hashlib.sha256(images.tobytes()).hexdigest() != record["sha256"]:
            raise ValueError("its images are not those recorded")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error}): {REMEDY}") from None
    return images, record


class RowFiles(NamedTuple):
    """A row's key, the file of each batch, and what their records say: how the images were drawn,
    and the sha256 of the weights.
    """

    key: str
    paths: dict[range, Path]
    about: dict[str, Any]
    weights: str

    @property
    def missing(self) -> list[range]:
        """The batches that are not kept yet."""
        return [batch for batch, path in self.paths.items() if not path.is_file()]

    def keep(self, batch: range, images: np.ndarray, machine: str) -> None:
        """Write the images of a batch, uint8 (B, 1, 32, 32)."""
        sha256 = hashlib.sha256(images.tobytes()).hexdigest()
        made = {"drawn_from": self.weights, "machine": machine, "sha256": sha256}
        words = json.dumps(self.about | made, sort_keys=True)
        save_arrays(self.paths[batch], {"images": images, "record": np.array(words)})

    def read(self, batch: range) -> tuple[np.ndarray, str]:
        """The images of a batch and the kind of machine that drew them; ValueError for others."""
        path = self.paths[batch]
        images, record = read(path)
        if len(images) != len(batch) or any(record[n] != v for n, v in self.about.items()):
            raise ValueError(f"{path} holds the images of another row: {REMEDY}")
        return images, record["machine"]


@dataclass(frozen=True)
class ImageStore:
    """The images of a profile: drawn where they are not kept yet, found by the key of their row.

    recipes: by the sha256 of the weights that they make; equal weights have the first one's images.
    """

    work: Workspace
    recipes: dict[str, Recipe] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where a profile that keeps its images has them."""
        return self.work.results / "samples"

    def files(self, model: nn.Module, sampling: Sampling, recipe: Recipe | None) -> RowFiles:
        """Where the images of a model are, or shall be."""
        weights = weights_sha256(model)
        if recipe is not None:
            recipe = self.recipes.setdefault(weights, recipe)
            folder, key = self.folder, row_key(recipe, sampling)
        else:
            folder = self.work.build / "samples" / f"batch-{sampling.batch}"
            key = _key(f"{weights} {(sampling.images, sampling.steps, sampling.seed)}")
        paths = {b: folder / f"{key}_{b.start:05d}-{b.stop - 1:05d}.npz" for b in sampling.batches}
        return RowFiles(key, paths, {"recipe": recipe, **sampling.record}, weights)

    def draw(
        self,
        model: nn.Module,
        sampling: Sampling,
        label: str = "sampling",
        recipe: Recipe | None = None,
    ) -> Sampled:
        """The images of `ddpm.sample`, drawn or read batch by batch; errors as `RowFiles.read`."""
        if sampling.images < 1:
            raise ValueError(f"{sampling.images} images asked for: at least one is needed")
        files, (_, *how) = self.files(model, sampling, recipe), sampling
        missing = files.missing
        for batch in files.paths:
            if batch in missing:
                drawn = sample(model, len(batch), *how, label, first=batch.start)
                files.keep(batch, drawn.numpy(), kind_of_machine())
            self.count(files.key, batch, "drawn" if batch in missing else "taken")
        images, machines = zip(*map(files.read, files.paths), strict=True)
        return Sampled(files.key, torch.from_numpy(np.concatenate(images)), frozenset(machines))

    def count(self, key: str, batch: range, how: str) -> None:
        """Note in build/<profile>/images.csv that images were drawn, taken or compared."""
        path = self.work.build / COUNTED
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(f"{key},{batch.start},{len(batch)},{how}\n")

    def counts(self) -> dict[str, int]:
        """How many images were drawn, taken and compared since images.csv was begun."""
        path, columns = self.work.build / COUNTED, ["key", "first", "images", "how"]
        table = (
            pd.read_csv(path, names=columns) if path.is_file() else pd.DataFrame(columns=columns)
        )
        table["again"] = table["how"] == "compared"
        # What was drawn in a run, and then read in it, was drawn.
        table = table.drop_duplicates(["key", "first", "again"])
        of = table.groupby("how")["images"].sum()
        return {how: int(of.get(how, 0)) for how in ("drawn", "taken", "compared")}

    def drawn_by(self) -> dict[str, list[str]]:
        """By kind of machine, its torch included, the keys of the rows that it drew images of."""
        rows: dict[str, set[str]] = {}
        for path in self.folder.glob("*.npz"):
            rows.setdefault(read(path)[1]["machine"], set()).add(path.name[:16])
        return {machine: sorted(keys) for machine, keys in rows.items()}

    def images(self, key: str, count: int) -> np.ndarray:
        """The first `count` kept images of a row, uint8 (N, 32, 32), by its key, the `sample` of
        its table; FileNotFoundError when there are fewer, ValueError as `read`.
        """
        # Of two files that begin with the same image, of rows of 150 and of 200, the longer serves.
        files = {int(path.stem[-11:-6]): path for path in sorted(self.folder.glob(f"{key}_*.npz"))}
        parts, there = [], 0
        while there < count and there in files:
            parts.append(read(files[there])[0][:, 0])
            there += len(parts[-1])
        if there < count:
            remedy = f"`make reproduce PROFILE={self.work.profile}` draws the others"
            lack = f"{count} images of row {key} are needed, {self.folder} has {there}"
            raise FileNotFoundError(f"{lack}: {remedy}")
        return np.concatenate(parts)[:count]
