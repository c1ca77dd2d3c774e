"""Check the committed results of a profile in minutes: `make verify`.

Where images are kept, files are held against their checksums, scores, masks and bytes are computed
again, and a few images drawn again. Elsewhere the last run's tables are compared (`report`).
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

from lafq.study import workspace
from lafq.study.diffusion import subject
from lafq.study.diffusion.subject import REFERENCE, UNet, mnist, quantizable
from lafq.study.fisher_by_timestep import fisher_by_timestep
from lafq.study.images import sampling
from lafq.study.images.evaluate import GREY_LEVELS, redraw
from lafq.study.images.features import FeatureExtractor, inception_extractor, mnist_extractor
from lafq.study.images.metrics import Reference
from lafq.study.images.sampling import ImageStore, Sampling
from lafq.study.rows import BASELINE, mask_sample, published_rows, sizes, uniform_rows
from lafq.study.workspace import Workspace, compute_on, profile_parameters

Check = tuple[bool | None, str]  # whether it holds (None: it was not made), and a line
HEADLINE, MASKS = "05_published", "05_masks"
# Another processor, or other kernels on the same one, computes other last bits. Scores of equal
# images: largest difference, besides the rounding of the tables to six digits.
SCORES, ROUNDED = {"fid_mnist": 0.02, "is_mnist": 0.001, "kid_mnist": 0.02}, 5e-6
INCEPTION = {"fid_inception": 0.02}
BYTES, FLIPS = 1e-4, 1e-4  # shares of FP32's bytes, and of mask entries
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
    for path in [*work.results.glob("*.csv"), *work.results.glob("*_masks.npz")]:
        shutil.copy(path, before(work))


def flipped(old: dict[str, np.ndarray], new: dict[str, np.ndarray]) -> float:
    """Share of the entries that differ in the masks of two runs (`rows.mask_sample`)."""
    if old.keys() != new.keys():
        raise ValueError(f"masks of {sorted(new)} are compared with those of {sorted(old)}")
    return float(np.mean([np.unpackbits(bits ^ new[row]).mean() for row, bits in old.items()]))


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
    for path in before(work).glob("*_masks.npz"):
        with np.load(path) as old, np.load(work.results / path.name) as new:
            share = flipped(dict(old), dict(new))
        print(f"mask entries that flipped: {share:.2g} of all (at most {FLIPS:g})")
    return off.empty


def off_scores(table: pd.DataFrame, again: list[dict[str, float]], allowed: dict) -> Check:
    """Scores computed again against a table's: the largest differences, and whether all hold."""
    limits, old = pd.Series(allowed), table[list(allowed)]
    off = ((pd.DataFrame(again)[list(allowed)] - old).abs() - ROUNDED * old.abs()).max().clip(0)
    line = ", ".join(f"{n} {value:.2g} (at most {limits[n]:g})" for n, value in off.items())
    return bool((off <= limits).all()), f"scores of {len(table)} rows, largest difference {line}"


def check_tables(work: Workspace, inception_reference: int) -> Iterator[Check]:
    """The classifier's scores of every row's images, computed again, against its table; of the
    headline also Inception's.
    """

    @cache
    def scores(extractor: FeatureExtractor, sample: str, count: int) -> dict[str, float]:
        images = torch.from_numpy(ImageStore(work).images(sample, count))[:, None]
        return extractor.scores(extractor.features(images))

    for path in sorted(work.results.glob("*.csv")):
        table, judged = workspace.load_table(work, path.stem), {mnist_extractor(): SCORES}
        if not {"sample", "n_images", "fid_mnist"} <= set(table.columns):
            continue
        if path.stem == HEADLINE and (inception := inception_extractor(inception_reference)):
            digits = mnist(train=False)[0][REFERENCE][:inception_reference]
            inception.reference = Reference(inception.features(digits).features)
            judged[inception] = INCEPTION
        for extractor, allowed in judged.items():
            again = [scores(extractor, *r) for r in table[["sample", "n_images"]].to_numpy()]
            holds, line = off_scores(table, again, allowed)
            yield holds, f"{path.name}: {line}"


def check_masks(work: Workspace, model: UNet, p: dict[str, Any]) -> Iterator[Check]:
    """Masks and bytes of the headline's rows, from the Fisher values of the weights."""
    draws = {"samples": p["FISHER_SAMPLES"], "bins": p["TIMESTEP_BINS"], "seed": p["SEED"]}
    digits, names = mnist(train=True)[0], list(quantizable(model))
    fisher = fisher_by_timestep(model, names, digits, **draws).by_weight
    table = workspace.load_table(work, HEADLINE)
    rows = published_rows(model, fisher, p["RATIOS"], p["THRESHOLDS"])
    again = sizes(model, [row.plan for row in rows])
    off = (again["mem_share"] - table["mem_share"]).abs().max()
    yield bool(off <= BYTES), f"bytes of {len(rows)} rows: largest difference {off:.2g} of FP32's"
    kept = workspace.load_images(work, MASKS)
    share = flipped(kept, mask_sample(model, rows))
    yield share <= FLIPS, f"masks: {share:.2g} of the entries flipped (at most {FLIPS:g})"


def check_drawn(work: Workspace, model: UNet, p: dict[str, Any]) -> Iterator[Check]:
    """Images of the baseline and of uniform INT8, drawn again."""
    how = Sampling(p["IMAGES"], p["SAMPLING_STEPS"], p["SEED"], p["SAMPLING_BATCH"])
    rows = [BASELINE, *uniform_rows(model, ("int8",))]
    for row in redraw(work, model, rows, how).itertuples():
        off = f"{row.grey_levels:.3g} of 255 grey levels per pixel (at most {GREY_LEVELS:g})"
        yield row.within, f"{row.rule}: {row.n_images} images drawn again, {off}"


def checks(work: Workspace) -> Iterator[Check]:
    """All checks, one after another; ValueError for a damaged file of images or weights."""
    p, store = profile_parameters(work.profile), ImageStore(work)
    again = f"`make reproduce PROFILE={work.profile}`"
    if store.folder.is_dir():
        shards = subject.check_weights(work, p)
        yield True, f"checksums of the weights: {len(shards)} shards"
        files = [sampling.read(path)[0] for path in sorted(store.folder.glob("*.npz"))]
        yield bool(files), f"checksums of {len(files)} files, {sum(map(len, files)):,} images"
        model = subject.load_model(work, p["WIDTH"])
        yield from check_drawn(work, model, p)
        yield from check_tables(work, p["INCEPTION_REFERENCE"])
        if (work.results / f"{HEADLINE}.csv").is_file():
            yield from check_masks(work, model, p)
        yield (
            None,
            f"Inception scores of other tables, intervals, claims: {again} computes them",
        )
    elif p["KEEP"]:
        folder = f"results/{work.profile}"
        raise ValueError(f"{folder}/samples is missing: `git checkout -- {folder}` restores it")
    elif not any(before(work).glob("*.csv")):
        raise ValueError(f"nothing to compare with: {again} keeps the earlier tables aside")
    else:
        yield report(work), "tables of the last run, compared with those before"


def main() -> int:
    """Print a line per check; exit status 1 where one does not hold."""
    parser = argparse.ArgumentParser(prog="tools.verify")
    parser.add_argument("--profile", default="paper")
    args = parser.parse_args()
    words, failed = {True: "ok", False: "FAILED", None: "not checked"}, 0
    try:
        p = profile_parameters(args.profile)
        device = compute_on(p["THREADS"], p["DEVICE"])
        for holds, line in checks(Workspace(args.profile, device, keep=True)):
            print(f"{words[holds]}: {line}", flush=True)
            failed += holds is False
    except (ValueError, OSError, RuntimeError) as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    print(f"verify, profile {args.profile}: checks that failed: {failed}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
