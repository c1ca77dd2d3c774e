"""What a run of `make reproduce` changed: the tables before and after, so that the user is told whether they came out equal."""

import pandas as pd

from lafq import paths

MEASURED = ("peak_mib",)  # may differ between equal runs
KEYS = ("sample",)  # digests of what the other columns show


def tables(profile: str) -> dict[str, pd.DataFrame]:
    """Every results/<profile>/*.csv as it is now, by file name."""
    return {path.name: pd.read_csv(path, dtype={"threshold": str}) for path in sorted((paths.RESULTS / profile).glob("*.csv"))}


def summary(before: dict[str, pd.DataFrame], after: dict[str, pd.DataFrame]) -> list[str]:
    """One line on all tables that came out equal (peak memory aside), and one on each that did not."""
    known = [name for name in after if name in before]
    found = {name: _difference(before[name], after[name]) for name in known}
    lines = [f"{sum(not d for d in found.values())} of {len(known)} tables equal those that were there"]
    lines += [f"  {name} differs: {difference}" for name, difference in found.items() if difference]
    return lines + [f"  {name} is new" for name in after if name not in before]


def _difference(before: pd.DataFrame, after: pd.DataFrame) -> str:
    ignored = [*MEASURED, *KEYS]
    old, new = before.drop(columns=ignored, errors="ignore"), after.drop(columns=ignored, errors="ignore")
    if list(old.columns) != list(new.columns) or len(old) != len(new):
        return f"{len(old)} rows of {len(old.columns)} columns before, {len(new)} of {len(new.columns)} now"
    unequal = ~((old == new) | (old.isna() & new.isna()))
    if not unequal.any(axis=None):
        return ""
    numbers = [c for c in new.select_dtypes("number") if unequal[c].any()]
    largest = {c: (old[c] - new[c]).abs().max() for c in numbers}
    worst = ", ".join(f"{c} by {v:.3g}" for c, v in sorted(largest.items(), key=lambda item: -item[1])[:3])
    return f"{int(unequal.any(axis=1).sum())} of {len(new)} rows" + (f", at most: {worst}" if worst else "")
