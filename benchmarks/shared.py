"""What the benchmarks share: a table that is continued where it was left, the diffusion model and
the damage of its quantized copies, and the memory of a process.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor, nn

from lafq import estimate_sensitivity, quantize
from lafq.fisher.sensitivity import Sensitivity
from lafq.quantization.model import dequantize_
from lafq.quantization.plan import Plan, Recipe
from lafq.study import damage
from lafq.study.damage import FRESH, FRESH_SEED
from lafq.study.diffusion import training
from lafq.study.diffusion.ddpm import noised_batches
from lafq.study.diffusion.mnist import mnist
from lafq.study.diffusion.subject import load_model
from lafq.study.workspace import Workspace, compute_on, load_optional, save_table

WORK = Workspace("benchmarks")
PROFILES = {16: "mini", 64: "paper"}  # whose weights a width has
SEED = 0


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


class Subject:
    """The trained diffusion model of a width, and the damage of quantized copies: mean squared
    change of the output, on held-out digits and noise that no plan has seen.
    """

    def __init__(self, width: int, digits: int, seed: int = FRESH_SEED, first: int = FRESH) -> None:
        self.width, self.seed, self.first = width, seed, first
        self.model = load_model(Workspace(PROFILES[width]), width)
        self.outputs = training.held_out_outputs(self.model, seed, digits, first)

    def sensitivity(self, samples: int, seed: int = SEED, **sizes: int) -> Sensitivity:
        """From so many noised training digits."""
        batches = noised_batches(mnist(train=True)[0], samples, seed)
        return estimate_sensitivity(self.model, batches, seed, **sizes)

    def errors(self, whole: nn.Module) -> Tensor:
        """The damage of a copy that computes in FP32, by digit."""
        return damage.output_errors(whole, self.outputs, self.seed, self.first)[0]

    def planned(self, plan: Plan | dict, *recipe: Recipe) -> Tensor:
        """`errors` of the model quantized by a plan."""
        return self.errors(dequantize_(quantize(self.model, plan, *recipe)))


def over(name: str, errors: Tensor, reference: Tensor, seed: int = SEED) -> dict[str, float]:
    """The mean error over that of a reference, paired over the digits, with its interval: the
    columns name, name_low and name_high.
    """
    return damage.over(name, errors, reference, seed)


def write(name: str, rows: list[dict]) -> None:
    """Write and print a table that is made anew."""
    table = pd.DataFrame(rows)
    save_table(WORK, name, table)
    print(table.to_string(index=False), f"written: results/benchmarks/{name}.csv", sep="\n")


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
