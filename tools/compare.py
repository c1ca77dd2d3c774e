"""Tables computed again against those that were there before: how many rows and verdicts are the
same (tolerances.yaml).
"""

import shutil
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from lafq.study.workspace import Workspace

TOLERANCES = Path(__file__).with_name("tolerances.yaml")
# Words that name the weights, the machine or a rounded number.
WORDS = ("sample", "reference", "note", "quantity", "same_machine", "target")
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
    print(said)
    for line in out[:SHOWN]:
        print(f"  {line}")
    if len(out) > SHOWN:
        print(f"  and {len(out) - SHOWN} more")
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
