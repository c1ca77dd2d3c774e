"""Numbers as a reader sees them: values, intervals, tables, and a guard for words that compare."""

from collections.abc import Callable, Mapping
from functools import partial
from string import Formatter
from typing import Any

import pandas as pd

Spec = str | Callable[[Any], str]
# A column, (column, spec), (column, spec, "interval"), or a function of the row.
Column = str | tuple[str | Spec, ...] | Callable[[pd.Series], str]
WORDS = {"allocate": "allocator", "allocate_all": "allocator, all weights"}
METHODS = {"uniform": "uniform, nearest code", "free": "group, free thresholds"}
METHODS |= {rule: f"{rule}, error feedback" for rule in ("global", "group", "ratio")}
METHODS |= {"noised digits": "allocator, error feedback"}
METHODS |= {"whole sampler, alike": "allocator, by images"}
ROUNDED = {"nearest": "nearest code", "feedback": "error feedback", "none": ""}
# Columns of tables of rows, of these beside the poster's, and of claims.
_KEY = {column: column for column in ("rule", "setting", "format", "granularity")}
_FID = {"fid_inception": ("fid_inception", ".2f")}
_FID |= {"delta_fid_inception": ("delta_fid_inception", "+.3f", "interval")}
ROWS = _KEY | {"kept_share": ("kept_share", ".3f"), "mem_mib": ("mem_mib", ".2f")}
ROWS |= {"mem_share": ("mem_share", ".3f"), "fid_mnist": ("fid_mnist", ".2f", "interval")}
ROWS |= {"delta_fid_mnist": ("delta_fid_mnist", "+.3f", "interval")}
ROWS |= {"is_mnist": ("is_mnist", ".2f")} | _FID
ROWS |= {"image_psnr": ("image_psnr", ".1f", "interval"), "class_changed": ("class_changed", ".0%")}
COMPARED = _KEY | {"fid_paper": ("fid_paper", ".2f")} | _FID
COMPARED |= {"is_paper": ("is_paper", ".2f")}
COMPARED |= {"is_inception": lambda row: write(row["is_inception"], ".2f") or "no last layer"}
COMPARED |= {column: (column, ".2f") for column in ("mem_paper_mib", "mem_mib")}
# What each claim measures, and what else is known of it, with slots for the fields of its row.
_FIDS = "({features} features, N = {n_images:g})"
QUANTITIES = {
    "C1": "mean Fisher at t < 500 divided by that at t >= 500 ({kind})",
    "C2": "mean Fisher per weight, Layers 1-2 divided by Layers 3-6 ({kind})",
    "C2 share": "share of all Fisher information in Layers 1-2, which have {front_weights:.1%} "
    "of the weights ({kind})",
    "C3": "mean FID of ratios 0.35-0.40 minus the others', {format}, single weights kept " + _FIDS,
    "C4 images": "FID of the layer or group row nearest to uniform FP16 in bytes, minus FID of "
    f"uniform FP16 {_FIDS}",
    "C4 bytes": "MiB of the smallest layer or group row in INT8, divided by uniform INT8's; both "
    "within {margin:.2g} FID of FP32 " + _FIDS,
    "rules images": "FID of {rule} minus that of global, {budget_bits:g} bits per weight " + _FIDS,
}
NOTES = {
    "C3": "the best ratio is one of 0.35-0.40 in {best_share:.0%} of resamples (by chance: "
    "{chance:.0%})",
    "C4 images": "{rule} {setting}, {format} by {granularity}, {mem_mib:.2f} MiB (uniform FP16: "
    "{fp16_mib:.2f})",
    "C4 bytes": "{rule} {setting}, {format} by {granularity}, {mem_mib:.2f} MiB (uniform INT8: "
    "{int8_mib:.2f})",
}


def sentence(templates: Mapping[str, str], row: pd.Series) -> str:
    """The sentence of a claim's row; "" where it has none, or a field that it names is empty."""
    template = templates.get(row["claim"], "")
    fields = [field for _, field, _, _ in Formatter().parse(template) if field]
    return "" if row.reindex(fields).isna().any() else template.format(**row)


CLAIMS = {"claim": "claim", "quantity": partial(sentence, QUANTITIES)}
CLAIMS |= {"measured": ("measured", ".4g", "interval"), "verdict": "verdict"}
NOTE = {"note": partial(sentence, NOTES)}


def name(row: pd.Series) -> str:
    """How a reader sees the rule and the rounding of a row: "allocator, error feedback"."""
    rounding = "entropy-coded" if row["format"] == "coded" else row["rounding"]
    words = WORDS.get(row["rule"], row["rule"]), ROUNDED.get(rounding, rounding)
    return ", ".join(word for word in words if word)


def method(row: pd.Series) -> str:
    """How a reader sees what made a plan of results/benchmarks/sampling.csv."""
    return METHODS.get(row["sensitivity"], row["sensitivity"])


def write(value: Any, spec: Spec = "") -> str:
    """A value by a format spec (".2f"), a template ("{:.1f} dB") or a function; "" for no value."""
    if not isinstance(value, str) and pd.isna(value):
        return ""
    if callable(spec):
        return spec(value)
    if "{" in spec:
        return spec.format(value)
    return format(value, spec.replace(".", "z.") if spec[:1] in ("+", ".") else spec)  # no -0.00


def interval(row: Any, name: str, spec: Spec = "+.2f") -> str:
    """ "value [low, high]" of a row, its ends in `<name>_low`, `<name>_high` or `low`, `high`."""
    if isinstance(row, tuple):
        row = row._asdict()
    ends = (f"{name}_low", f"{name}_high") if f"{name}_low" in row else ("low", "high")
    value, low, high = (write(row[column], spec) for column in (name, *ends))
    return f"{value} [{low}, {high}]" if value and low else value


def table(frame: pd.DataFrame, columns: Mapping[str, Column]) -> pd.DataFrame:
    """A table of strings, one column per header of `columns`."""

    def cell(row: pd.Series, column: Column) -> str:
        if callable(column):
            return str(column(row)).strip()
        if isinstance(column, str):
            return write(row[column])
        return interval(row, *column[:2]) if len(column) > 2 else write(row[column[0]], column[1])

    rows = [row for _, row in frame.astype(object).iterrows()]
    shown = {header: [cell(row, column) for row in rows] for header, column in columns.items()}
    return pd.DataFrame(shown, dtype=object)


def markdown(frame: pd.DataFrame) -> str:
    """A table as GitHub shows it, cells as they are printed."""
    cells = frame.astype(str).to_numpy().tolist()
    lines = [frame.columns.tolist(), ["---"] * len(frame.columns), *cells]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def holds(condition: Any) -> str:
    """Guard of a word that compares: "" where the condition is true, else ValueError."""
    if not condition:
        raise ValueError("the results no longer say what the text says")
    return ""
