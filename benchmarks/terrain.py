"""lafq on a diffusion model that others have trained: `make terrain` writes results/terrain and
figures/terrain.

Decibels: variance of the FP32 model's output over the mean squared error, on maps from noise that
no plan has seen. Rows that are there already are left alone; delete results/terrain to make them
again.
"""

import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import torch
from by_layer import by_layer, layer_inputs, quanto, stored_bytes, torchao
from shared import Table, figure, run
from terrain_model import (
    CHUNK,
    JUDGED,
    MAPS_PER_PASS,
    OTHER,
    PASSES,
    SIZE,
    WORK,
    character,
    decibels,
    distances,
    estimated,
    heights,
    load,
    maps,
    outputs,
    sensitivity,
)
from torch import Tensor, nn

from lafq import allocate, quantize, save_quantized
from lafq.allocation import allocate as solver
from lafq.fisher.sensitivity import Sensitivity
from lafq.quantization.formats import MIB
from lafq.quantization.model import dequantize_, nbytes, resident_bytes
from lafq.quantization.plan import Plan
from lafq.study import workspace
from lafq.tensors import load_tensors, save_tensors

SHOWN = 3
UNIFORM = ("int4", "int3", "int2", "int8", "int6")
FEWER = (1, 2, 4, 8, 16, PASSES)
SENSITIVE = 10  # weight tensors that the row "INT4, sensitive tensors FP16" keeps
TENTH = 0.1
CODED, KEEPING = "entropy-coded", "INT4, sensitive tensors FP16"
PEERS = {"optimum-quanto": (quanto, ("qint8", "qint4", "qint2")), "torchao": (torchao, (8, 4))}
FP32 = ("fp32", "none")
DRAWN = {
    "FP32": FP32,
    "uniform INT4": ("uniform", "int4"),
    "allocator, INT4's bytes": ("allocator", "bytes of uniform int4"),
    "allocator, smaller": ("allocator", f"{TENTH:.0%} of FP32"),
}


def plans(model: nn.Module, known: Sensitivity) -> Iterator[tuple[str, str, Callable[[], Plan]]]:
    """Method and format of every row of ours, and what makes its plan; allocations are named for
    the row whose bytes they have.
    """
    frontiers = {}
    alike = {low: Plan(dict.fromkeys(known.fisher, low)) for low in UNIFORM}
    tenth, smaller = TENTH * resident_bytes(model) / MIB, f"{TENTH:.0%} of FP32"

    def allocated(mib: float) -> Plan:
        if not frontiers:
            frontiers.update(solver.frontiers_of(model, known))
        return solver.solve_budget(model, frontiers, mib, known.recipe)

    yield "allocator", smaller, partial(allocated, tenth)
    for low, plan in alike.items():
        yield "uniform", low, partial(Plan, plan)
        yield "allocator", f"bytes of uniform {low}", partial(allocated, nbytes(model, plan) / MIB)
    for low in ("int4", "int3", "int2"):
        mib = nbytes(model, alike[low]) / MIB
        yield CODED, f"bytes of uniform {low}", partial(allocate, model, known, file_mib=mib)
    yield CODED, smaller, partial(allocate, model, known, file_mib=tenth)
    for library, (_, settings) in PEERS.items():
        for setting in settings:
            # Their own rows come first, so their bytes are known.
            mib = known_mib(library, str(setting))
            yield "allocator", f"bytes of {library} {setting}", partial(allocated, mib)
    kept = Plan(alike["int4"] | dict.fromkeys(sensitive(model, known, alike["int4"]), "fp16"))
    yield KEEPING, "int4", partial(Plan, kept)
    yield "allocator", f"bytes of {KEEPING}", partial(allocated, nbytes(model, kept) / MIB)


def sensitive(model: nn.Module, known: Sensitivity, plan: Plan) -> list[str]:
    """The SENSITIVE weight tensors that a plan harms most by the Fisher information."""
    rounded = dequantize_(quantize(model, plan))
    change = {n: rounded.get_parameter(n) - model.get_parameter(n) for n in known.fisher}
    error = {n: (f * change[n].square()).sum().item() for n, f in known.fisher.items()}
    return sorted(error, key=error.get)[-SENSITIVE:]


def known_mib(method: str, format: str) -> float:
    """Resident MiB of a row that is in the table."""
    table = workspace.load_table(WORK, "terrain")
    return table[(table["method"] == method) & (table["format"] == format)]["mem_mib"].item()


class Judge:
    """Makes the rows of results/terrain/terrain.csv: bytes, decibels and distances of a model."""

    def __init__(self, model: nn.Module, known: Sensitivity, expected: Tensor) -> None:
        self.model, self.expected, self.look = model, expected, character(expected)
        self.full = resident_bytes(model)
        with torch.no_grad():
            self.inputs = layer_inputs(model, known.fisher, *maps(OTHER, MAPS_PER_PASS))
        self.maps_at = WORK.build / "maps.safetensors"
        self.drawn = {" ".join(FP32): expected[:CHUNK]}  # the first maps by row
        if self.maps_at.is_file():
            self.drawn, _ = load_tensors(self.maps_at, "make terrain")

    def _row(self, name: str, whole: nn.Module, size: int, **sizes: float) -> dict[str, Any]:
        found = outputs(whole, JUDGED)
        self.drawn[name] = found[:CHUNK]
        sizes = {"mem_mib": size / MIB, "mem_share": size / self.full, **sizes}
        look = distances(self.look, character(found))
        return {**sizes, "decibels": decibels(self.expected, found), **look}

    def other_noise(self) -> dict[str, Any]:
        """How far maps of the same model from other noise are: what a distance is held against."""
        sizes = {"mem_mib": self.full / MIB, "mem_share": 1.0, "decibels": float("nan")}
        return sizes | distances(self.look, character(outputs(self.model, OTHER)))

    def peer(self, quantizer: Callable, setting: str | int, name: str) -> dict[str, Any]:
        """Another library with one of its settings."""
        with torch.no_grad():
            small, left = by_layer(quantizer(setting))(self.model, self.inputs)
        return self._row(name, small, stored_bytes(small), layers_left_fp32=left)

    def ours(self, plan_of: Callable[[], Plan], name: str) -> dict[str, Any]:
        """lafq with a plan."""
        small = quantize(self.model, plan_of())
        with TemporaryDirectory() as folder:
            path = Path(folder) / "small.safetensors"
            save_quantized(path, small, self.model, compress=True)
            file_mib = path.stat().st_size / MIB
        size = resident_bytes(small)
        return self._row(name, dequantize_(small), size, file_mib=file_mib)


def make_rows(model: nn.Module, known: Sensitivity, expected: Tensor) -> None:
    """The table results/terrain/terrain.csv and the figure.

    A row that is there is made again only where the figure needs its maps, kept in build/.
    """
    table, judge = Table("terrain", ("method", "format"), WORK), Judge(model, known, expected)

    def add(method: str, format: str, make: Callable[..., dict], *arguments: Any) -> None:
        make = partial(make, *arguments)
        if (key := (method, format)) not in table:
            table.add(key, make)
        elif key in DRAWN.values() and " ".join(key) not in judge.drawn:
            make()
        save_tensors(judge.maps_at, judge.drawn)

    add("fp32", "other noise", judge.other_noise)
    for library, (quantizer, settings) in PEERS.items():
        for setting in settings:
            add(library, str(setting), judge.peer, quantizer, setting, f"{library} {setting}")
    for method, format, plan_of in plans(model, known):
        add(method, format, judge.ours, plan_of, f"{method} {format}")
    draw(table.frame, judge.drawn)


def by_passes(model: nn.Module, expected: Tensor) -> None:
    """The table results/terrain/passes.csv: decibels of the allocator's plan at INT4's bytes by the
    passes behind it.
    """

    def row(passes: int) -> dict[str, float]:
        known = sensitivity(model) if passes == PASSES else estimated(model, passes)
        mib = nbytes(model, dict.fromkeys(known.fisher, "int4")) / MIB
        plan = allocate(model, known, memory_mib=mib)
        mse = 2 * plan.damage / SIZE**2
        found = decibels(expected, outputs(dequantize_(quantize(model, plan)), JUDGED))
        return {"decibels": found, "predicted": 10 * np.log10(expected.var().item() / mse)}

    table = Table("passes", ("passes",), WORK)
    for passes in FEWER:
        table.add((passes,), partial(row, passes))


def draw(table: pd.DataFrame, drawn: dict[str, Tensor]) -> None:
    """Maps by row: FP32, uniform INT4, the allocator at INT4's bytes and at a tenth of FP32's."""
    plot, axes = figure(len(DRAWN), SHOWN, figsize=(5.6, 7.2))
    by = table.set_index(["method", "format"])
    scale = heights(drawn[" ".join(FP32)]).max((1, 2))
    for row, (title, key) in zip(axes, DRAWN.items(), strict=True):
        if key != FP32:
            share, quality = by.loc[key, ["mem_share", "decibels"]]
            title += f"\n{share:.1%} of the bytes\n{quality:.1f} dB"
        for ax, z, top in zip(row, heights(drawn[" ".join(key)]), scale, strict=False):
            ax.imshow(z, cmap="viridis", vmin=0, vmax=top)
            ax.set(xticks=[], yticks=[])
        row[0].set_ylabel(title, fontsize=8)
    plot.suptitle("Height maps from the same noise", fontsize=10)
    note = "colours from 0 to the highest point of the FP32 map"
    workspace.save_figure(WORK, "maps", plot, note, pixels=True, model="a public model of others")


def main() -> None:
    """Make the rows that are missing and the figure."""
    # The converter warns of what its resizing leaves out; `load` compares the output with ONNX
    # Runtime's.
    warnings.filterwarnings("ignore", module="onnx2pytorch")
    try:
        model = load()
    except ModuleNotFoundError as error:
        raise RuntimeError(f"{error.name} is not installed: `make terrain` installs it") from None
    expected = outputs(model, JUDGED)
    make_rows(model, sensitivity(model), expected)
    by_passes(model, expected)


if __name__ == "__main__":
    sys.exit(run(main))
