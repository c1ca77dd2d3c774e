"""Check the committed results of a profile, in minutes and without its FP32 weights: `make verify`.

Of a profile that keeps no images, the tables of the last run are compared with those before it
(`compared`). Otherwise:

Every image file is read and held against its own record; the classifier's scores of all images are
computed again and compared with the tables; a few images are drawn again, from the packed weights
and, where they are given, from the FP32 weights.
"""

import argparse
import shutil
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from torch import nn

from lafq.quantization.checkpoint import load_quantized
from lafq.quantization.model import dequantize_, quantize
from lafq.study import workspace
from lafq.study.diffusion import subject
from lafq.study.diffusion.ddpm import sample
from lafq.study.diffusion.unet import UNet
from lafq.study.images import sampling
from lafq.study.images.evaluate import metric_values
from lafq.study.images.features import mnist_extractor
from lafq.study.images.sampling import ImageStore
from lafq.study.rows import uniform_rows
from lafq.study.workspace import Workspace, compute_on, profile_parameters

PACKED_IMAGES, IMAGES = 8, 4
# Another processor, or other kernels on the same one, computes other last bits. Scores of equal
# images: largest difference, besides the rounding of the tables to six digits.
SCORES = {"fid_mnist": 0.02, "is_mnist": 0.001, "kid_mnist": 0.02}
# Images drawn again: mean absolute difference of a pixel, in grey levels of 255, over all images
# compared. It was 0 with AVX2 kernels and batches of 8, where AVX-512 kernels had drawn batches of
# 25; between uniform INT8 and FP32 it is 0.14.
GREY_LEVELS = 0.02
ROUNDED = 5e-6
TOLERANCES = Path(__file__).with_name("tolerances.yaml")
# Words that name the weights, the machine or a rounded number.
WORDS = ("sample", "reference", "same_machine", "target")
SHOWN = 10


def before(work: Workspace) -> Path:
    """Where a run keeps the tables that were there before it."""
    return work.build / "before"


def keep_aside(work: Workspace) -> None:
    """Copy the tables of a profile to `before`, in place of what is there."""
    shutil.rmtree(before(work), ignore_errors=True)
    before(work).mkdir(parents=True)
    for path in work.results.glob("*.csv"):
        shutil.copy(path, before(work))


def compared(work: Workspace) -> tuple[str, list[str]]:
    """One sentence on all tables of a profile, and a line for every row or verdict that is out of
    its tolerance.

    A table that has been made for the first time is left out; one that is gone is out of its
    tolerance.
    """
    rows, verdicts, out = [0, 0], [0, 0], []
    tables = sorted(before(work).glob("*.csv"))
    for path in tables:
        name, new = path.stem, work.results / path.name
        old = _read(path)
        if (
            not new.is_file()
            or list((table := _read(new)).columns) != list(old.columns)
            or len(table) != len(old)
        ):
            rows[1] += len(old)
            out.append(f"{name}: other rows or columns than before")
            continue
        same = pd.DataFrame(
            {
                column: _within(name, column, table[column], old[column])
                for column in old.columns
                if column not in WORDS
            }
        )
        if "verdict" in same:
            verdicts = [verdicts[0] + same["verdict"].sum(), verdicts[1] + len(same)]
        holds = same.all(axis=1)
        rows = [rows[0] + holds.sum(), rows[1] + len(same)]
        for i in np.flatnonzero(~holds):
            off = same.columns[~same.iloc[i]]
            what = ", ".join(f"{c} {table[c][i]} (before: {old[c][i]})" for c in off[:3])
            out.append(
                f"{name}, row {i + 1}: {what}"
                + (f" and {len(off) - 3} more" if len(off) > 3 else "")
            )
    said = f"reproduced: {rows[0]:,} of {rows[1]:,} rows of {len(tables)} tables within the declared tolerance, "
    return said + f"{verdicts[0]} of {verdicts[1]} verdicts equal", out


def report(work: Workspace) -> bool:
    """Print `compared`, its first lines; returns whether all is within tolerance. Says nothing
    where nothing was kept aside.
    """
    if not any(before(work).glob("*.csv")):
        return True
    said, out = compared(work)
    more = [f"and {len(out) - SHOWN} more"] * (len(out) > SHOWN)
    print("\n  ".join([said, *out[:SHOWN], *more]))
    return not out


def _read(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, keep_default_na=False, na_values=[""])


def _within(name: str, column: str, new: pd.Series, old: pd.Series) -> np.ndarray:
    """Which rows of a column are the same: numbers within the tolerance, words letter by letter."""
    rule = next(
        r
        for r in yaml.safe_load(TOLERANCES.read_text())
        if fnmatch(name, r["table"]) and fnmatch(column, r["column"])
    )
    if rule.get("ignore"):
        return np.ones(len(new), dtype=bool)
    if not (pd.api.types.is_numeric_dtype(new) and pd.api.types.is_numeric_dtype(old)):
        return (new.astype(str) == old.astype(str)).to_numpy()
    return np.isclose(
        new, old, atol=rule.get("absolute", 0.0), rtol=rule.get("relative", 0.0), equal_nan=True
    )


def image_tables(work: Workspace) -> dict[str, pd.DataFrame]:
    """The tables of results/<profile> that name images, by file name."""
    found = {
        path.name: workspace.load_table(work, path.stem)
        for path in sorted(work.results.glob("*.csv"))
    }
    return {
        name: table
        for name, table in found.items()
        if {"sample", "n_images", "steps"} <= set(table.columns)
    }


def check_files(work: Workspace) -> Iterator[tuple[bool, str]]:
    """Every file of images against its record, and every packed weight against its checksum:
    (whether it holds, a line).
    """
    files = sorted(ImageStore(work).folder.glob("*.npz"))
    damaged, count = [], 0
    for path in files:
        try:
            count += len(sampling.read(path)[0])
        except ValueError as error:
            damaged.append(str(error))
    yield from ((False, line) for line in damaged)
    if not damaged:
        yield bool(files), f"{len(files)} files with {count:,} images agree with their checksums"


def check_tables(work: Workspace) -> Iterator[tuple[bool, str]]:
    """The classifier's scores of every row's images, computed again, against its table."""
    extractor, seen = mnist_extractor(), {}
    for name, table in image_tables(work).items():
        off = dict.fromkeys(SCORES, 0.0)
        for row in table.itertuples():
            key = row.sample, row.n_images
            if key not in seen:
                images = torch.from_numpy(ImageStore(work).images(*key))[:, None]
                seen[key] = metric_values(extractor.features(images), extractor)
            for metric in SCORES:
                expected = getattr(row, metric)
                off[metric] = max(
                    off[metric], abs(seen[key][metric] - expected) - ROUNDED * abs(expected)
                )
        differences = ", ".join(
            f"{metric} {value:.2g} (at most {SCORES[metric]:g})" for metric, value in off.items()
        )
        holds = all(value <= SCORES[metric] for metric, value in off.items())
        yield (
            holds,
            f"{name}: scores of {len(table)} rows computed again, largest difference {differences}",
        )


def check_drawn(
    work: Workspace, name: str, model: nn.Module, row: Any, images: int, seed: int
) -> tuple[bool, str]:
    """The first images of a row drawn again from `model`, against those that are kept."""
    again = sample(model, images, row.steps, seed, batch_size=images)[:, 0].numpy()
    off = np.abs(again.astype(int) - ImageStore(work).images(row.sample, images)).mean()
    line = f"{name}: {images} images drawn again at {row.steps} steps differ by {off:.3g} of 255 grey levels per pixel"
    return bool(off <= GREY_LEVELS), f"{line} (at most {GREY_LEVELS:g})"


def check_packed(work: Workspace, width: int, seed: int) -> tuple[bool, str]:
    """The packed weights: their checksum, and images drawn from them."""
    model = dequantize_(load_quantized(work.results / subject.PACKED, UNet(width)))
    row = next(workspace.load_table(work, "packed").query("rule == 'allocate'").itertuples())
    return check_drawn(work, "packed weights", model, row, PACKED_IMAGES, seed)


def check_weights(
    work: Workspace, path: Path, parameters: dict[str, Any]
) -> Iterator[tuple[bool, str]]:
    """Images of the baseline and of both uniform formats, drawn again from the FP32 weights in a
    file.
    """
    subject.take_weights(
        work, path, parameters["WIDTH"], parameters["SEED"], parameters["TRAINING"]
    )
    model = subject.load_model(work, parameters["WIDTH"])
    baseline = next(workspace.load_table(work, "01_baseline").itertuples())
    yield check_drawn(work, "FP32 baseline", model, baseline, IMAGES, parameters["SEED"])
    table = workspace.load_table(work, "03_global")
    for row in uniform_rows(model):
        [found] = table[(table["rule"] == "uniform") & (table["format"] == row.format)].itertuples()
        small = dequantize_(quantize(model, row.plan))
        yield check_drawn(
            work, f"uniform {row.format.upper()}", small, found, IMAGES, parameters["SEED"]
        )


def checks(work: Workspace, path: Path | None) -> Iterator[tuple[bool | None, str]]:
    """All checks, one after another: whether each holds (None: it could not be made), and a line."""
    p = profile_parameters(work.profile)
    compute_on(p["THREADS"], "cpu")
    if not ImageStore(work).folder.is_dir():
        if p["KEEP"]:
            raise ValueError(
                f"results/{work.profile}/samples is missing: `git checkout -- "
                f"results/{work.profile}` restores it"
            )
        if not before(work).is_dir():
            raise ValueError(
                f"nothing to compare with: `make reproduce PROFILE={work.profile}` keeps the "
                f"earlier tables aside"
            )
        said, out = compared(work)
        yield not out, said
        yield from ((False, line) for line in out)
        return
    yield from check_files(work)
    yield from check_tables(work)
    if (work.results / subject.PACKED).is_file():
        yield check_packed(work, p["WIDTH"], p["SEED"])
    else:
        yield None, f"packed weights: results/{work.profile}/{subject.PACKED} is not there"
    if path:
        yield from check_weights(work, path, p)
    else:
        yield None, "rows drawn from the FP32 weights: give them with WEIGHTS=path"
    yield (
        None,
        f"Inception scores, intervals and Fisher information: `make reproduce "
        f"PROFILE={work.profile}` computes them again",
    )


def main() -> int:
    """Print a line per check; exit status 1 where one does not hold."""
    parser = argparse.ArgumentParser(prog="tools.verify")
    parser.add_argument("--profile", default="paper")
    parser.add_argument("--weights", type=Path)
    args = parser.parse_args()
    words, failed = {True: "ok", False: "FAILED", None: "not checked"}, 0
    try:
        for holds, line in checks(Workspace(args.profile), args.weights):
            print(f"{words[holds]}: {line}", flush=True)
            failed += holds is False
    except (ValueError, OSError, RuntimeError) as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    print(
        f"verify, profile {args.profile}: "
        + (f"{failed} checks FAILED" if failed else "all that was checked holds")
    )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
