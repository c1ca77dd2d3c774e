"""Tables as a reader sees them: which rows and columns, rounded, with their intervals."""

import pandas as pd

from lafq.quantization.formats import MIB
from lafq.study.diffusion.unet import LAYERS, UNet
from lafq.study.results import METHODS
from lafq.study.rows import KEY
from lafq.study.workspace import Workspace, load_optional, load_table

CODED, FEEDBACK = "allocator, entropy-coded", "error feedback"
SHOWN = [
    *("method", "threshold", "format", "granularity", "kept_share", "mem_mib", "mem_share"),
    *(
        "fid_mnist",
        "delta_fid_mnist",
        "is_mnist",
        "fid_inception",
        "delta_fid_inception",
        "psnr",
        "class_changed",
    ),
]
DIGITS = {
    **dict.fromkeys(
        (
            "mem_mib",
            "fid_mnist",
            "is_mnist",
            "is_inception",
            "fid_inception",
            "fid_paper",
            "is_paper",
        ),
        "{:.2f}",
    ),
    **dict.fromkeys(
        ("kept_share", "mem_share", "mem_share_paper", "kid_mnist", "kid_inception"), "{:.3f}"
    ),
    **dict.fromkeys(("delta_fid_mnist", "delta_fid_inception", "fid_mnist_delta"), "{:+.3f}"),
    **dict.fromkeys(("predicted", "damage"), "{:.2e}"),
    "psnr": "{:.1f} dB",
    "class_changed": "{:.0%}",
    "delta_loss": "{:+.1e}",
}
WITH_INTERVAL = ("fid_mnist", "delta_fid_mnist", "delta_fid_inception", "delta_loss")


def format_table(
    table: pd.DataFrame, columns: list[str], with_interval: tuple[str, ...] = WITH_INTERVAL
) -> pd.DataFrame:
    """Columns of a table as text: rounded, the 95 % interval in brackets where there is one, "" for
    no value.
    """
    result = table[columns].copy()
    for name in columns:
        if name not in DIGITS:
            continue
        write = DIGITS[name].format
        result[name] = [write(v) if pd.notna(v) else "" for v in table[name]]
        if name in with_interval:
            ends = zip(result[name], table[f"{name}_low"], table[f"{name}_high"], strict=True)
            result[name] = [
                f"{text} [{write(low)}, {write(high)}]" if text else "" for text, low, high in ends
            ]
    return result


def tidy(table: pd.DataFrame) -> pd.DataFrame:
    """A table of `evaluate.evaluate` as it is shown."""
    return format_table(table, [c for c in SHOWN if c in table and not table[c].isna().all()])


def damages_shown(table: pd.DataFrame) -> pd.DataFrame:
    """A table of `damage.measure_damage` as it is shown, intervals in brackets; the rounding
    stands in every name.
    """
    columns = ["method", "budget_bits", "mem_mib", "mem_share", "damage", "fid_mnist_delta"]
    known = [c for c in columns if c in table and not table[c].isna().all()]
    return format_table(
        named_by_rounding(table), known, with_interval=("damage", "fid_mnist_delta")
    )


def with_rounding(method: str) -> str:
    """A method of 06_budget with its rounding: uniform formats and rules go to the nearest code
    unless it says more.
    """
    return (
        method
        if "," in method or method.startswith(("allocator", "by "))
        else f"{method}, nearest code"
    )


def named_by_rounding(table: pd.DataFrame) -> pd.DataFrame:
    """A table with the rounding in every method's name."""
    return table.assign(method=table["method"].map(with_rounding))


def coded_shown(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of 11_files as they are shown: file and resident MiB side by side, damage also over
    uniform INT8's.
    """
    columns = [
        "method",
        "granularity",
        "budget_bits",
        "file_mib",
        "mem_mib",
        "damage",
        "over_int8",
        "fid_mnist_delta",
    ]
    fixed, coded = (
        table["method"] == "allocator, all weights",
        table["method"] == "allocator, entropy-coded",
    )
    plain = (table["method"] == "uniform") & (table["budget_bits"] < 8)
    shown = table[
        ~plain
        & ~(fixed & ~table["budget_bits"].isin([3.0, 4.0, 6.0]))
        & ~(coded & (table["budget_bits"] > 4))
    ]
    known = [c for c in columns if not shown[c].isna().all()]
    shown = shown.assign(
        file_mib=shown["file_mib"].map("{:.2f}".format),
        over_int8=shown["over_int8"].map("{:.2g}".format),
    )
    return format_table(
        named_by_rounding(shown), known, with_interval=("damage", "fid_mnist_delta")
    )


def at_posters_size(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of evidence_damages as they are shown: of the uniform formats and the rules one rounding
    each.
    """
    columns = ["method", "granularity", "budget_bits", "mem_mib", "file_mib", "damage", "over_int8"]
    uniform, ruled = (
        table["method"] == "uniform",
        table["method"].str.endswith(FEEDBACK) & table["over_global"].notna(),
    )
    shown = table[
        (uniform & (table["budget_bits"] < 9)) | table["method"].isin(["allocator", CODED]) | ruled
    ]
    digits = {"file_mib": "{:.2f}", "over_int8": "{:.2g}"}
    text = {c: [f.format(v) if pd.notna(v) else "" for v in shown[c]] for c, f in digits.items()}
    return format_table(named_by_rounding(shown.assign(**text)), columns, with_interval=("damage",))


def coded_bytes(work: Workspace, table: pd.DataFrame) -> pd.DataFrame:
    """The rows of `coded_shown` with their file, resident and (measured once) peak MiB."""
    shown, peaks = coded_shown(table), load_optional(work, "11_peak_memory")
    if peaks is not None:
        key = ["method", "granularity", "budget_bits"]
        shown = shown.merge(named_by_rounding(peaks), on=key)
    columns = ("file_mib", "mem_mib", "peak_mib", "over_int8", "fid_mnist_delta")
    return shown[["method", "budget_bits", *(c for c in columns if c in shown)]]


def comparison(work: Workspace, *methods: str) -> pd.DataFrame:
    """Rows of paper_comparison.csv as they are shown: of some methods (all without any), of the
    ratios `listed` ones.
    """
    table = load_table(work, "paper_comparison")
    table = listed(table[table["method"].isin(methods or METHODS)]).reset_index(drop=True)
    features = "mnist" if table["fid_inception"].isna().all() else "inception"
    fid = ["fid_paper", f"fid_{features}", f"delta_fid_{features}"]
    return format_table(table, [*KEY, *fid, "is_paper", "is_mnist", "mem_share_paper", "mem_share"])


def listed(table: pd.DataFrame) -> pd.DataFrame:
    """The rows that the poster's table lists: of the ratios 0.35, 0.38 and 0.40, with single
    weights kept.
    """
    ratio = table["threshold"].isin(["0.35", "0.38", "0.40"]) & (table["granularity"] == "weight")
    return table[(table["method"] != "ratio") | ratio]


def by_steps(*compared: pd.DataFrame) -> pd.DataFrame:
    """FID and its difference from FP32 (Inception features) of the rows that all these tables have,
    one pair of columns per table.

    Each table has one number of sampling steps, which its columns name.
    """
    found = compared[0][KEY]
    for table in compared:
        shown = format_table(table, [*KEY, "fid_inception", "delta_fid_inception"])
        steps = f"{table['steps'].iloc[0]:,} steps"
        names = {
            "fid_inception": f"FID, {steps}",
            "delta_fid_inception": f"difference from FP32, {steps}",
        }
        found = found.merge(shown.rename(columns=names), on=KEY)
    return found


def three_rows(table: pd.DataFrame, method: str, threshold: str = "") -> pd.DataFrame:
    """FP32, uniform INT8, and the first INT8 row of a method on single weights: the rows whose
    images are drawn.
    """
    int8 = table[table["format"] == "int8"]
    ours = int8[
        (int8["method"] == method)
        & (int8["granularity"] == "weight")
        & int8["threshold"].str.startswith(threshold)
    ]
    kinds = table[table["method"] == "baseline"], int8[int8["method"] == "uniform"], ours
    return pd.concat([rows.iloc[:1] for rows in kinds], ignore_index=True)


def claims_shown(work: Workspace, name: str) -> pd.DataFrame:
    """A table of claims as it is shown: the interval in brackets behind the measured value."""
    return claims_text(load_table(work, name))


def claims_text(table: pd.DataFrame) -> pd.DataFrame:
    """Claims, one per row, as text."""
    ends = zip(table["measured"], table["low"], table["high"], strict=True)
    table = table.assign(measured=[f"{v:.4g} [{low:.4g}, {high:.4g}]" for v, low, high in ends])
    if "p" in table:
        table["p"] = [f"{p:.2g}" if pd.notna(p) else "" for p in table["p"]]
        table["note"] = ["" if pd.isna(note) else note for note in table["note"]]
    return table.drop(columns=["low", "high"]).rename(columns={"paper": "statement"})


def rules_shown(table: pd.DataFrame) -> pd.DataFrame:
    """Claims about threshold rules as text; the poster makes none, and each is tested once."""
    shown = claims_text(table).drop(columns=["claim", "p", "note"])
    return shown.rename(columns={"statement": "hypothesis (not the poster's)"})


def evidence_claims(work: Workspace) -> pd.DataFrame | None:
    """The claims with more images and over other training runs, as they are shown; None where `make
    evidence` made neither.
    """
    names = [
        n
        for n in ("evidence_rows_claims", "evidence_runs_over")
        if load_optional(work, n) is not None
    ]
    if not names:
        return None
    shown = pd.concat([claims_shown(work, name) for name in names], ignore_index=True)
    return shown[["claim", "quantity", "measured", "verdict"]]


def peaks(work: Workspace, table: pd.DataFrame) -> pd.DataFrame:
    """Peak memory of sampling from each row's file, where it was measured (benchmarks/peak_memory),
    beside the bytes that it stores.
    """
    measured = load_optional(work, "peak_memory")
    if measured is None:
        return pd.DataFrame()
    found = table[[*KEY, "mem_mib"]].merge(measured, on=KEY)
    return format_table(found, [*KEY, "mem_mib", "peak_mib"])


def fisher_by_layer(timesteps: pd.DataFrame) -> pd.DataFrame:
    """Weights, mean Fisher per weight and share of the Fisher trace, by layer, over all timesteps."""
    total = timesteps.assign(trace=timesteps["fisher"] * timesteps["weights"])
    by_layer = total.groupby("layer")[["weights", "trace"]].sum()
    table = pd.DataFrame({"weights": by_layer["weights"] // timesteps["t_low"].nunique()})
    table["mean_fisher"] = (by_layer["trace"] / by_layer["weights"]).map("{:.3g}".format)
    table["share_of_all"] = (by_layer["trace"] / by_layer["trace"].sum()).map("{:.1%}".format)
    return table.reset_index()


def group_table(means: dict[str, dict[str, float]]) -> pd.DataFrame:
    """Mean Fisher value of each group, one column per granularity: tau of a group is the factor
    times this.
    """
    return pd.DataFrame(means).rename_axis("group").reset_index()


def layer_table(model: UNet) -> pd.DataFrame:
    """Parameters and MiB (FP32) of the six layers, of the rest and of the whole model."""
    layers = {name: sum(p.numel() for p in getattr(model, name).parameters()) for name in LAYERS}
    total = sum(p.numel() for p in model.parameters())
    layers |= {"input and output": total - sum(layers.values()), "total": total}
    table = pd.DataFrame({"layer": list(layers), "parameters": list(layers.values())})
    channels = {name: getattr(model, name).block1.conv1.in_channels for name in LAYERS}
    table.insert(1, "channels", [str(channels.get(name, "")) for name in layers])
    return table.assign(mib=(table["parameters"] * 4 / MIB).round(3))
