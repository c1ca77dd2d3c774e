"""Numbers as a reader sees them: a value, a value with its interval, a table, and a guard for
words that compare.
"""

from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd

Spec = str | Callable[[Any], str]
Column = str | tuple[str | Spec, ...] | Callable[[pd.Series], str]
WORDS = {"allocate": "allocator", "allocate_all": "allocator, all weights"}
ROUNDED = {"nearest": "nearest code", "feedback": "error feedback", "none": ""}
# Columns of tables of rows, of these beside the poster's, and of claims.
_KEY = {column: column for column in ("rule", "setting", "format", "granularity")}
_FID = {"fid_inception": ("fid_inception", ".2f")}
_FID |= {"delta_fid_inception": ("delta_fid_inception", "+.3f", "interval")}
ROWS = _KEY | {"kept_share": ("kept_share", ".3f"), "mem_mib": ("mem_mib", ".2f")}
ROWS |= {"mem_share": ("mem_share", ".3f"), "fid_mnist": ("fid_mnist", ".2f", "interval")}
ROWS |= {"delta_fid_mnist": ("delta_fid_mnist", "+.3f", "interval")}
ROWS |= {"is_mnist": ("is_mnist", ".2f")} | _FID
ROWS |= {"psnr": ("psnr", "{:.1f} dB"), "class_changed": ("class_changed", ".0%")}
COMPARED = _KEY | {"fid_paper": ("fid_paper", ".2f")} | _FID
COMPARED |= {column: (column, ".2f") for column in ("is_paper", "is_mnist")}
COMPARED |= {column: (column, ".3f") for column in ("mem_share_paper", "mem_share")}
CLAIMS = {"claim": "claim", "quantity": "quantity", "measured": ("measured", ".4g", "interval")}
CLAIMS |= {"verdict": "verdict"}


def name(row: pd.Series) -> str:
    """How a reader sees the rule and the rounding of a row: "allocator, error feedback"."""
    rounding = "entropy-coded" if row["format"] == "coded" else row["rounding"]
    words = WORDS.get(row["rule"], row["rule"]), ROUNDED.get(rounding, rounding)
    return ", ".join(word for word in words if word)


def write(value: Any, spec: Spec = "") -> str:
    """A value by a format spec (".2f"), a template ("{:.1f} dB") or a function; "" for no value."""
    if not isinstance(value, str) and pd.isna(value):
        return ""
    if callable(spec):
        return spec(value)
    return spec.format(value) if "{" in spec else format(value, spec)


def interval(row: Any, name: str, spec: Spec = "+.2f") -> str:
    """ "value [low, high]" of a row (a Series, a mapping, or of itertuples).

    The ends stand in `<name>_low` and `<name>_high`, or in `low` and `high`; without ends, or
    without a value, that part is left out.
    """
    if isinstance(row, tuple):
        row = row._asdict()
    ends = (f"{name}_low", f"{name}_high") if f"{name}_low" in row else ("low", "high")
    value, low, high = (write(row[column], spec) for column in (name, *ends))
    return f"{value} [{low}, {high}]" if value and low else value


def table(frame: pd.DataFrame, columns: Mapping[str, Column]) -> pd.DataFrame:
    """A table of strings, one column per header of `columns`.

    A header names a column, (column, spec), (column, spec, "interval"), or a function of the row.
    """

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
