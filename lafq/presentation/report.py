"""Tables, images and figures of the notebooks: where they are kept, and how they are written."""

from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lafq import paths
from lafq.diffusion.mnist import REFERENCE
from lafq.diffusion.unet import LAYERS, UNet
from lafq.evaluation import samples
from lafq.evaluation.candidates import KEY
from lafq.io import atomic_write

pd.options.display.max_colwidth = None  # tables with sentences in them are shown whole
METHODS = ("baseline", "uniform", "global", "group", "mean_std", "ratio")
SHOWN = [
    *("method", "threshold", "format", "unit", "kept_share", "mem_mib", "mem_share", "peak_mib"),
    *("fid_mnist", "delta_fid_mnist", "is_mnist", "kid_mnist", "fid_inception", "delta_fid_inception", "rmse", "delta_loss"),
    *("n_images", "steps"),
]
DIGITS = {
    **dict.fromkeys(("mem_mib", "fid_mnist", "is_mnist", "fid_inception", "fid_paper", "is_paper"), "{:.2f}"),
    **dict.fromkeys(("kept_share", "mem_share", "mem_share_paper", "kid_mnist", "kid_inception"), "{:.3f}"),
    **dict.fromkeys(("delta_fid_mnist", "delta_fid_inception", "fid_mnist_delta"), "{:+.3f}"),
    **dict.fromkeys(("predicted", "damage"), "{:.2e}"),
    "rmse": "{:.2g}",
    "delta_loss": "{:+.1e}",
}
WITH_INTERVAL = ("fid_mnist", "delta_fid_mnist", "delta_fid_inception", "delta_loss")


def source(compute: bool, profile: str) -> str:
    """The line a notebook opens with: where its tables come from."""
    folder = f"results/{profile}"
    if compute:
        return f"COMPUTE is true: everything below is computed now and written to {folder}"
    return f"COMPUTE is false: tables and images are loaded from {folder}, as the last `make reproduce` wrote them"


def save_table(profile: str, name: str, table: pd.DataFrame) -> None:
    """Write results/<profile>/<name>.csv, six significant digits."""
    with atomic_write(paths.RESULTS / profile / f"{name}.csv") as temporary:
        table.to_csv(temporary, index=False, float_format="%.6g")


def load_table(profile: str, name: str) -> pd.DataFrame:
    """Read results/<profile>/<name>.csv; FileNotFoundError names the remedy when there is none."""
    path = _existing(profile, f"{name}.csv")
    return pd.read_csv(path, dtype={"threshold": str}, keep_default_na=False, na_values=[""])


def load_optional(profile: str, name: str) -> pd.DataFrame | None:
    """Read a table that `make evidence` makes; None, and a line saying so, where it has not been made."""
    if not (paths.RESULTS / profile / f"{name}.csv").is_file():
        print(f"{name}: not made for profile {profile} (`make evidence PROFILE={profile}` makes it)")
        return None
    print(f"{name}: loaded from results/{profile}, as the last `make evidence` wrote it")
    return load_table(profile, name)


def save_images(profile: str, name: str, images: dict[str, np.ndarray]) -> None:
    """Write generated images, uint8 (N, 32, 32) by key, to results/<profile>/<name>.npz."""
    with atomic_write(paths.RESULTS / profile / f"{name}.npz") as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **images)


def load_images(profile: str, name: str) -> dict[str, np.ndarray]:
    """Read what `save_images` wrote."""
    with np.load(_existing(profile, f"{name}.npz")) as file:
        return dict(file)


def save_rows(profile: str, name: str, table: pd.DataFrame, images: dict[str, np.ndarray]) -> None:
    """Write what `evaluate.evaluate` returned: the table, and the images unless they are kept in results/<profile>/samples."""
    if not samples.kept_folder(profile).is_dir():
        save_images(profile, name, images)
    save_table(profile, name, table)


def load_rows(profile: str, name: str, with_baseline: bool = False) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """Read what `save_rows` wrote, on request with the baseline of 01_train as the first row."""
    table = load_table(profile, name)
    if (paths.RESULTS / profile / "peak_memory.csv").is_file():
        table = table.merge(load_table(profile, "peak_memory"), on=KEY, how="left")
    if samples.kept_folder(profile).is_dir():
        images = {row.sample: samples.kept(profile, row.sample, row.n_images) for row in table.itertuples()}
    else:
        images = load_images(profile, name)
    if with_baseline:
        baseline, its_images = load_rows(profile, "01_baseline")
        table, images = pd.concat([baseline, table], ignore_index=True), its_images | images
    return table, images


def save_figure(profile: str, name: str, figure: Figure, note: str = "", pixels: bool = False) -> None:
    """Write figures/<profile>/<name>.png and .svg, without dates so that equal figures are equal bytes.

    pixels: the figure is made of images, so only the .png is written. Below stands the profile, and the note: what the bars are.
    """
    figure.text(1, -0.01, f"profile {profile}" + (f"; {note}" if note else ""), ha="right", va="top", fontsize=8, color="0.35")
    with matplotlib.rc_context({"svg.hashsalt": name}):
        kinds = (("png", {"Software": None}), ("svg", {"Date": None}))
        for suffix, metadata in kinds[:1] if pixels else kinds:
            with atomic_write(paths.FIGURES / profile / f"{name}.{suffix}") as temporary:
                figure.savefig(temporary, format=suffix, dpi=150, bbox_inches="tight", metadata=metadata)


def update_comparison(profile: str, rows: pd.DataFrame) -> pd.DataFrame:
    """Put rows of `poster.compare` into results/<profile>/paper_comparison.csv in place of those of the same methods.

    Returns the rows as the file has them.
    """
    path = paths.RESULTS / profile / "paper_comparison.csv"
    if path.is_file():
        old = load_table(profile, "paper_comparison")
        # The file's own columns may be in another order, or fewer, where an earlier version wrote it.
        rows = pd.concat([old[~old["method"].isin(rows["method"])], rows])[list(rows.columns)]
    rows = rows.drop_duplicates(KEY, keep="last")
    order = [METHODS.index(m) for m in rows["method"]]
    rows = rows.assign(order=order).sort_values(["order", "threshold", "format", "unit"], kind="stable")
    save_table(profile, "paper_comparison", rows.drop(columns="order"))
    return load_table(profile, "paper_comparison")


def update_peaks(profile: str, rows: pd.DataFrame) -> None:
    """Put rows of `evaluate.peak_memory` into results/<profile>/peak_memory.csv in place of those of the same key."""
    path = paths.RESULTS / profile / "peak_memory.csv"
    known = [load_table(profile, "peak_memory")] if path.is_file() else []
    save_table(profile, "peak_memory", pd.concat([*known, rows]).drop_duplicates(KEY, keep="last"))


def note(images: int, steps: int, inception_reference: int) -> str:
    """The sentence over every table: N, sampling, reference sets and padding."""
    inception = f"the first {inception_reference:,} of them for Inception" if inception_reference else "no Inception columns"
    return (
        f"N = {images} images a row, {steps} sampling steps, the same noise in every row. Reference: test digits "
        f"{REFERENCE.start:,}-{REFERENCE.stop - 1:,} ({REFERENCE.stop:,} images) for MNIST features, {inception}; both "
        "sides 32x32 (28x28 zero-padded). IS over one split. MiB = 2**20 bytes. delta_: difference from the FP32 baseline. "
        "In brackets: 95 % intervals of the expected value at this N, bootstrap over the images (1,000 resamples, paired)."
    )


def format_table(table: pd.DataFrame, columns: list[str], with_interval: tuple[str, ...] = WITH_INTERVAL) -> pd.DataFrame:
    """Columns of a table as text: rounded, the 95 % interval in brackets where there is one, "" for no value."""
    result = table[columns].copy()
    for name in columns:
        if name not in DIGITS:
            continue
        write = DIGITS[name].format
        result[name] = [write(v) if pd.notna(v) else "" for v in table[name]]
        if name in with_interval:
            ends = zip(result[name], table[f"{name}_low"], table[f"{name}_high"], strict=True)
            result[name] = [f"{text} [{write(low)}, {write(high)}]" if text else "" for text, low, high in ends]
    return result


def tidy(table: pd.DataFrame) -> pd.DataFrame:
    """A table of `evaluate.evaluate` as it is shown."""
    return format_table(table, [c for c in SHOWN if c in table and not table[c].isna().all()])


def damages_shown(table: pd.DataFrame) -> pd.DataFrame:
    """A table of `budget.measure_candidates` as it is shown, intervals in brackets."""
    columns = ["method", "unit", "budget_bits", "mem_mib", "mem_share", "predicted", "damage", "delta_loss", "fid_mnist_delta"]
    return format_table(
        table, [c for c in columns if c in table and not table[c].isna().all()], with_interval=("damage", "fid_mnist_delta")
    )


def comparison(profile: str, *methods: str) -> pd.DataFrame:
    """The rows of paper_comparison.csv of some methods (all without any), as they are shown."""
    table = load_table(profile, "paper_comparison")
    table = table[table["method"].isin(methods or METHODS)].reset_index(drop=True)
    ours = ("fid_inception", "fid_mnist", "delta_fid_mnist", "is_mnist", "kid_mnist", "mem_mib", "mem_share")
    return format_table(table, [*KEY, "fid_paper", "is_paper", "mem_share_paper", *ours])


def claims_shown(profile: str, name: str = "claims") -> pd.DataFrame:
    """A table of claims as it is shown: the interval in brackets behind the measured value."""
    table = load_table(profile, name)
    ends = zip(table["measured"], table["low"], table["high"], strict=True)
    table["measured"] = [f"{v:.4g} [{low:.4g}, {high:.4g}]" if low < high else f"{v:.6g}" for v, low, high in ends]
    return table.drop(columns=["low", "high"])


def evidence_claims(profile: str) -> pd.DataFrame | None:
    """The claims with more images and over other training runs, as they are shown; None where `make evidence` made neither."""
    names = ("evidence_rows_claims", "evidence_runs_over")
    made = [claims_shown(profile, name) for name in names if (paths.RESULTS / profile / f"{name}.csv").is_file()]
    return pd.concat(made, ignore_index=True).drop(columns="paper") if made else None


def extremes(table: pd.DataFrame) -> pd.DataFrame:
    """The baseline, the uniform rows and, for every format and unit, the smallest and the largest ratio sampled."""
    ratio = table[(table["method"] == "ratio") & ~table["threshold"].isin(["0.00", "1.00"])]
    ends = [rows.iloc[[0, -1]] for _, rows in ratio.groupby(["format", "unit"])]
    return pd.concat([table[table["method"].isin(["baseline", "uniform"])], *ends], ignore_index=True)


def fisher_by_layer(timesteps: pd.DataFrame) -> pd.DataFrame:
    """Weights, mean Fisher a weight and share of the Fisher trace, by layer, over all timesteps."""
    total = timesteps.assign(trace=timesteps["fisher"] * timesteps["weights"])
    by_layer = total.groupby("layer")[["weights", "trace"]].sum()
    table = pd.DataFrame({"weights": by_layer["weights"] // timesteps["t_low"].nunique()})
    table["mean_fisher"] = (by_layer["trace"] / by_layer["weights"]).map("{:.3g}".format)
    table["trace_share"] = (by_layer["trace"] / by_layer["trace"].sum()).map("{:.1%}".format)
    return table.reset_index()


def group_table(means: dict[str, dict[str, float]]) -> pd.DataFrame:
    """Mean Fisher value of each group, a column a unit: tau of a group is the factor times this."""
    return pd.DataFrame(means).rename_axis("group").reset_index()


def layer_table(model: UNet) -> pd.DataFrame:
    """Parameters and MiB (FP32) of the six layers, of the rest and of the whole model."""
    layers = {name: sum(p.numel() for p in getattr(model, name).parameters()) for name in LAYERS}
    total = sum(p.numel() for p in model.parameters())
    layers |= {"input and output": total - sum(layers.values()), "total": total}
    table = pd.DataFrame({"layer": list(layers), "parameters": list(layers.values())})
    channels = {name: getattr(model, name).block1.conv1.in_channels for name in LAYERS}
    table.insert(1, "channels", [str(channels.get(name, "")) for name in layers])
    return table.assign(mib=(table["parameters"] * 4 / 2**20).round(3))


def _existing(profile: str, name: str) -> Path:
    path = paths.RESULTS / profile / name
    if not path.is_file():
        raise FileNotFoundError(f"results/{profile}/{name} is missing: `make reproduce PROFILE={profile}` makes it")
    return path
