"""Check the committed results of a profile, in minutes and without its FP32 weights: `make verify`.

Where images are kept, each file is held against its record, all scores are computed again, and a
few images are drawn again, from the packed weights and, where they are given, from the FP32
weights. Elsewhere the tables of the last run are compared with those before it (`report`).
"""

import argparse
import shutil
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
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
from lafq.study.diffusion.subject import UNet
from lafq.study.images import sampling
from lafq.study.images.features import mnist_extractor
from lafq.study.images.sampling import ImageStore
from lafq.study.rows import uniform_rows
from lafq.study.workspace import Workspace, compute_on, profile_parameters

Check = tuple[bool | None, str]  # whether it holds (None: it was not made), and a line
IMAGES = 4  # drawn again of a row
# Another processor, or other kernels on the same one, computes other last bits. Scores of equal
# images: largest difference, besides the rounding of the tables to six digits.
SCORES, ROUNDED = {"fid_mnist": 0.02, "is_mnist": 0.001, "kid_mnist": 0.02}, 5e-6
# Images drawn again: mean absolute difference of a pixel, in grey levels of 255, over all images
# compared. It was 0 with AVX2 kernels and batches of 8, where AVX-512 kernels had drawn batches of
# 25; between uniform INT8 and FP32 it is 0.14.
GREY_LEVELS = 0.02
TOLERANCES = Path(__file__).with_name("tolerances.yaml")
SHOWN = 10  # cells that do not hold
# Words that name the weights, the machine or a rounded number.
WORDS = ("sample", "reference", "same_machine", "target")


def before(work: Workspace) -> Path:
    """Where a run keeps the tables that were there before it."""
    return work.build / "before"


def keep_aside(work: Workspace) -> None:
    """Copy the tables of a profile to `before`, in place of what is there."""
    shutil.rmtree(before(work), ignore_errors=True)
    before(work).mkdir(parents=True)
    for path in work.results.glob("*.csv"):
        shutil.copy(path, before(work))


def cells(folder: Path, names: list[str]) -> pd.Series:
    """Every cell of these tables as it is written, by table, row and column."""
    tables = {name: pd.DataFrame() for name in names}
    how = {"dtype": str, "na_filter": False, "usecols": lambda column: column not in WORDS}
    for path in (folder / f"{name}.csv" for name in names):
        if path.is_file():
            tables[path.stem] = pd.read_csv(path, **how).rename(index=lambda i: i + 1)
    return pd.concat({name: table.stack() for name, table in tables.items()})


def report(work: Workspace) -> bool:
    """Compare every cell of the tables of `before`, then and now: print how many rows are within
    the tolerance, and the first cells that are not; whether all are.
    """
    if not (names := sorted(path.stem for path in before(work).glob("*.csv"))):
        return True
    both = {"before": cells(before(work), names), "now": cells(work.results, names)}
    table = pd.DataFrame(both).rename_axis(["table", "row", "column"]).reset_index()
    old, new = (pd.to_numeric(table[when], errors="coerce") for when in both)
    allowed, rules = pd.Series(0.0, table.index), yaml.safe_load(TOLERANCES.read_text())
    for (name, column), part in table.groupby(["table", "column"]).groups.items():
        rule = next(r for r in rules if fnmatch(name, r["table"]) and fnmatch(column, r["column"]))
        allowed[part] = rule.get("absolute", 0.0) + rule.get("relative", 0.0) * old[part].abs()
    table["holds"] = (table["before"] == table["now"]) | ((new - old).abs() <= allowed)
    rows = table.groupby(["table", "row"])["holds"].all()
    verdicts, off = table[table["column"] == "verdict"]["holds"], table[~table["holds"]]
    print(f"rows within the declared tolerance: {rows.sum():,} of {len(rows):,}")
    print(f"equal verdicts: {verdicts.sum()} of {len(verdicts)}")
    for cell in off[:SHOWN].itertuples():
        print(f"  {cell.table}, row {cell.row}, {cell.column}: {cell.now} (before: {cell.before})")
    return off.empty


def check_tables(work: Workspace) -> Iterator[Check]:
    """The classifier's scores of every row's images, computed again, against its table."""
    extractor, allowed = mnist_extractor(), pd.Series(SCORES)

    @cache
    def scores(sample: str, count: int) -> dict[str, float]:
        images = torch.from_numpy(ImageStore(work).images(sample, count))[:, None]
        return extractor.scores(extractor.features(images))

    for path in sorted(work.results.glob("*.csv")):
        table = workspace.load_table(work, path.stem)
        if {"sample", "n_images", "steps"} <= set(table.columns):
            again = map(scores, table["sample"], table["n_images"])
            old, new = table[allowed.index], pd.DataFrame(again)[allowed.index]
            off = ((new - old).abs() - ROUNDED * old.abs()).max().clip(0)
            largest = ", ".join(f"{n} {v:.2g} (at most {SCORES[n]:g})" for n, v in off.items())
            line = f"{path.name}: scores of {len(table)} rows, largest difference {largest}"
            yield bool((off <= allowed).all()), line


def models(
    work: Workspace, weights: Path | None, p: dict[str, Any]
) -> Iterator[tuple[str, nn.Module, pd.Series]]:
    """What images can be drawn from: a name, the model, and its row."""
    if (path := work.results / subject.PACKED).is_file():
        row = workspace.load_table(work, "packed").query("rule == 'allocate'").iloc[0]
        yield "packed weights", dequantize_(load_quantized(path, UNet(p["WIDTH"]))), row
    if weights:
        subject.take_weights(work, p, weights)
        model = subject.load_model(work, p["WIDTH"])
        yield "FP32", model, workspace.load_table(work, "01_baseline").iloc[0]
        table = workspace.load_table(work, "03_global").query("rule == 'uniform'")
        for row in uniform_rows(model):
            small = dequantize_(quantize(model, row.plan))
            yield f"uniform {row.format}", small, table[table["format"] == row.format].iloc[0]


def checks(work: Workspace, weights: Path | None) -> Iterator[Check]:
    """All checks, one after another; ValueError for a damaged file of images."""
    p, store, folder = profile_parameters(work.profile), ImageStore(work), f"results/{work.profile}"
    compute_on(p["THREADS"], "cpu")
    again = f"`make reproduce PROFILE={work.profile}`"
    if store.folder.is_dir():
        files = [sampling.read(path)[0] for path in sorted(store.folder.glob("*.npz"))]
        yield bool(files), f"checksums of {len(files)} files, {sum(map(len, files)):,} images"
        yield from check_tables(work)
        for name, model, row in models(work, weights, p):
            images = sample(model, IMAGES, row["steps"], p["SEED"], batch_size=IMAGES)[:, 0].numpy()
            off = np.abs(images.astype(int) - store.images(row["sample"], IMAGES)).mean()
            line = f"{IMAGES} images drawn again, {off:.3g} of 255 grey levels per pixel"
            yield bool(off <= GREY_LEVELS), f"{name}: {line} (at most {GREY_LEVELS:g})"
        if not (work.results / subject.PACKED).is_file():
            yield None, f"packed weights: {folder}/{subject.PACKED} is missing"
        if not weights:
            yield None, "rows drawn from the FP32 weights: give them with WEIGHTS=path"
        yield None, f"Inception scores, intervals, Fisher information: {again} computes them"
    elif p["KEEP"]:
        raise ValueError(f"{folder}/samples is missing: `git checkout -- {folder}` restores it")
    elif not any(before(work).glob("*.csv")):
        raise ValueError(f"nothing to compare with: {again} keeps the earlier tables aside")
    else:
        yield report(work), "tables of the last run, compared with those before"


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
    print(f"verify, profile {args.profile}: checks that failed: {failed}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
