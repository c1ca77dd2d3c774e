"""What the benchmarks share: a table that is continued where it was left, and the memory of a
process.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from lafq.study.workspace import Workspace, compute_on, load_optional, save_table

WORK = Workspace("benchmarks")
PROFILES = {16: "mini", 64: "paper"}  # whose weights a width has


class Table:
    """The table results/<folder>/<name>.csv, written again after every row.

    A row that is there already is not made again; delete the table to make all anew.
    """

    def __init__(self, name: str, key: tuple[str, ...], work: Workspace = WORK) -> None:
        self.name, self.key, self.work = name, key, work
        table = load_optional(work, name)
        self.rows: list[dict[str, Any]] = [] if table is None else table.to_dict("records")

    def __contains__(self, key: tuple) -> bool:
        return any(tuple(row[name] for name in self.key) == key for row in self.rows)

    def add(self, key: tuple, make: Callable[[], dict[str, Any]]) -> None:
        """Make, keep and print the row of this key, unless it is there."""
        if key not in self:
            self.rows.append(dict(zip(self.key, key, strict=True)) | make())
            save_table(self.work, self.name, self.frame)
            print(*(f"{name} {value}" for name, value in self.rows[-1].items()), sep=", ")

    @property
    def frame(self) -> pd.DataFrame:
        """The table as it is now."""
        return pd.DataFrame(self.rows)


def memory(field: str) -> float:
    """MiB of this process: VmRSS now, VmHWM the most since `forget_peak` (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def forget_peak() -> None:
    """Let VmHWM start anew."""
    Path("/proc/self/clear_refs").write_text("5")


def run(main: Callable[[], None]) -> int:
    """A script's main function on two threads; errors are one sentence and exit status 1."""
    try:
        compute_on(2, "cpu")
        main()
    except (ValueError, OSError, RuntimeError) as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    return 0
