"""What the benchmarks share: tables that are continued, the diffusion model and the damage of its
quantized copies, processes of their own, time.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from lafq import estimate_sensitivity, quantize
from lafq.fisher.sensitivity import Sensitivity
from lafq.quantization.model import dequantize_
from lafq.quantization.plan import Plan, Recipe
from lafq.study import damage, workspace
from lafq.study.damage import FRESH, FRESH_SEED
from lafq.study.diffusion import training
from lafq.study.diffusion.ddpm import noised_batches
from lafq.study.diffusion.subject import load_model, mnist
from lafq.study.workspace import Workspace, compute_on, load_optional, save_table

WORK = Workspace("benchmarks")
PROFILES = {16: "small", 64: "paper"}  # whose weights a width has
SEED = 0
# By width: noised digits behind a sensitivity, and digits that judge a plan made from it.
SAMPLES, DIGITS = {16: 512, 64: 128}, {16: 500, 64: 100}


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

    def add(self, key: tuple, make: Callable[..., dict[str, Any]], *arguments: Any) -> None:
        """Make, keep and print the row of this key, unless it is there."""
        if key not in self:
            self.rows.append(dict(zip(self.key, key, strict=True)) | make(*arguments))
            save_table(self.work, self.name, self.frame)
            print(*(f"{name} {value}" for name, value in self.rows[-1].items()), sep=", ")

    @property
    def frame(self) -> pd.DataFrame:
        """The table as it is now."""
        return pd.DataFrame(self.rows)


def write(rows: Callable[[], Iterable[dict]]) -> None:
    """Write and print a table that is made anew, named for the function that makes its rows."""
    name = rows.__name__
    table = pd.DataFrame(tqdm(rows(), name))
    save_table(WORK, name, table)
    print(table.to_string(index=False), f"written: results/benchmarks/{name}.csv", sep="\n")


class Subject:
    """The trained diffusion model of a width, and the damage of quantized copies: mean squared
    change of the output, on held-out digits and noise that no plan has seen.
    """

    def __init__(self, width: int, digits: int, seed: int = FRESH_SEED, first: int = FRESH) -> None:
        self.width, self.seed, self.first = width, seed, first
        self.model = load_model(Workspace(PROFILES[width]), width)
        self.outputs = training.held_out_outputs(self.model, seed, digits, first)

    def sensitivity(self, samples: int, seed: int = SEED, **how: Any) -> Sensitivity:
        """From so many noised training digits."""
        batches = noised_batches(mnist(train=True)[0], samples, seed)
        return estimate_sensitivity(self.model, batches, seed, **how)

    def errors(self, whole: nn.Module) -> Tensor:
        """The damage of a copy that computes in FP32, by digit."""
        return damage.output_errors(whole, self.outputs, self.seed, self.first)[0]

    def planned(self, plan: Plan | dict, *recipe: Recipe) -> Tensor:
        """`errors` of the model quantized by a plan."""
        return self.errors(dequantize_(quantize(self.model, plan, *recipe)))


def figure(rows: int, columns: int, **how: Any) -> tuple[Figure, Any]:
    """A figure in the notebooks' style and its axes."""
    workspace.set_style()
    return plt.subplots(rows, columns, **how)


def seconds(function: Callable, *arguments: Any, **options: Any) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    function(*arguments, **options)
    return time.perf_counter() - start


def time_ratio(rounds: int, ours: Callable, ordinary: Callable, *arguments: Any) -> float:
    """Median over rounds of the time of a call over that of an ordinary one just before it."""
    pairs = [(seconds(ordinary, *arguments), seconds(ours, *arguments)) for _ in range(rounds)]
    return statistics.median(own / one for one, own in pairs)


def in_a_process(*asked: Any, environment: dict[str, str] | None = None, **how: Any) -> Any:
    """What a Python process with these arguments prints last, JSON; RuntimeError with its last line
    where it fails.
    """
    command = [sys.executable, *map(str, asked)]
    environment = os.environ | {"TQDM_DISABLE": "1"} | (environment or {})
    done = subprocess.run(command, env=environment, capture_output=True, text=True, **how)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
    return json.loads((done.stdout.splitlines() or ["null"])[-1])


def run(main: Callable, *arguments: str) -> int:
    """A script's function on two threads, what it returns printed as JSON; errors are one sentence
    and exit status 1.
    """
    try:
        compute_on(2, "cpu")
        if (result := main(*arguments)) is not None:
            print(json.dumps(result))
    except (ValueError, OSError, RuntimeError) as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    return 0
