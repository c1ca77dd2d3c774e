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

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from by_layer import by_layer, layer_inputs, quanto, stored_bytes, torchao
from shared import Table, run
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
CODED = "entropy-coded"
PEERS = {"optimum-quanto": (quanto, ("qint8", "qint4", "qint2")), "torchao": (torchao, (8, 4))}


DRAWN = {
    "FP32": ("fp32", "none"),
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

    def allocated(mib: float) -> Plan:
        if not frontiers:
            frontiers.update(solver.frontiers_of(model, known))
        return solver.solve_budget(model, frontiers, mib, known.recipe)

    def sensitive() -> Plan:
        rounded = dequantize_(quantize(model, alike["int4"]))
        error = {
            n: (f * (rounded.get_parameter(n) - model.get_parameter(n)).square()).sum().item()
            for n, f in known.fisher.items()
        }
        return Plan(
            alike["int4"] | dict.fromkeys(sorted(error, key=error.get)[-SENSITIVE:], "fp16")
        )

    yield (
        "allocator",
        f"{TENTH:.0%} of FP32",
        partial(allocated, TENTH * resident_bytes(model) / MIB),
    )
    for low, plan in alike.items():
        yield "uniform", low, partial(Plan, plan)
        yield "allocator", f"bytes of uniform {low}", partial(allocated, nbytes(model, plan) / MIB)
    for low in ("int4", "int3", "int2"):
        yield (
            CODED,
            f"bytes of uniform {low}",
            partial(allocate, model, known, file_mib=nbytes(model, alike[low]) / MIB),
        )
    yield (
        CODED,
        f"{TENTH:.0%} of FP32",
        partial(allocate, model, known, file_mib=TENTH * resident_bytes(model) / MIB),
    )
    for library, (_, settings) in PEERS.items():
        for setting in settings:
            # Their own rows come first, so their bytes are known.
            yield (
                "allocator",
                f"bytes of {library} {setting}",
                partial(allocated, known_mib(library, str(setting))),
            )
    kept = sensitive()
    yield "INT4, sensitive tensors FP16", "int4", partial(Plan, kept)
    yield (
        "allocator",
        "bytes of INT4, sensitive tensors FP16",
        partial(allocated, nbytes(model, kept) / MIB),
    )


def known_mib(method: str, format: str) -> float:
    """Resident MiB of a row that is in the table."""
    table = workspace.load_table(WORK, "terrain")
    return table[(table["method"] == method) & (table["format"] == format)]["mem_mib"].item()


def measured(
    whole: nn.Module,
    expected: Tensor,
    look: dict[str, np.ndarray],
    drawn: dict[str, Tensor],
    name: str,
) -> dict[str, Any]:
    """Decibels and the distances of a model that computes in FP32; its first maps go to `drawn`."""
    found = outputs(whole, JUDGED)
    drawn[name] = found[:CHUNK]
    return {"decibels": decibels(expected, found), **distances(look, character(found))}


def main() -> None:
    """Make the rows that are missing and the figure."""
    # The converter warns of what its resizing leaves out; `load` compares the output with ONNX
    # Runtime's.
    warnings.filterwarnings("ignore", module="onnx2pytorch")
    try:
        model = load()
    except ModuleNotFoundError as error:
        raise RuntimeError(f"{error.name} is not installed: `make terrain` installs it") from None
    known, expected = sensitivity(model), outputs(model, JUDGED)
    make_rows(model, known, expected, character(expected))
    by_passes(model, expected)


def make_rows(
    model: nn.Module, known: Sensitivity, expected: Tensor, look: dict[str, np.ndarray]
) -> None:
    """The table results/terrain/terrain.csv, written again after every row, and the figure.

    A row that is there is made again only where the figure needs its maps, which are kept in
    build/.
    """
    table, maps_at = Table("terrain", ("method", "format"), WORK), WORK.build / "maps.safetensors"
    drawn = {"fp32 none": expected[:CHUNK]}
    if maps_at.is_file():
        drawn, _ = load_tensors(maps_at, "make terrain")

    def add(method: str, format: str, make: Callable[[], dict[str, Any]]) -> None:
        key = (method, format)
        if key not in table:
            table.add(key, make)
        elif key in DRAWN.values() and " ".join(key) not in drawn:
            make()
        save_tensors(maps_at, drawn)

    full = resident_bytes(model) / MIB
    add(
        "fp32",
        "other noise",
        lambda: (
            {"mem_mib": full, "mem_share": 1.0, "decibels": float("nan")} | other_noise(model, look)
        ),
    )
    x = maps(OTHER, MAPS_PER_PASS)
    with torch.no_grad():
        inputs = layer_inputs(model, known.fisher, *x)

    def peer(setting: str | int, quantizer: Callable, name: str) -> dict[str, Any]:
        with torch.no_grad():
            small, left = by_layer(quantizer(setting))(model, inputs)
        size = stored_bytes(small)
        sizes = {"mem_mib": size / MIB, "mem_share": size / resident_bytes(model)}
        sizes["layers_left_fp32"] = left
        return sizes | measured(small, expected, look, drawn, name)

    def ours(plan_of: Callable[[], Plan], name: str) -> dict[str, Any]:
        small = quantize(model, plan_of())
        with TemporaryDirectory() as folder:
            path = Path(folder) / "small.safetensors"
            save_quantized(path, small, model, compress=True)
            file = path.stat().st_size
        size = resident_bytes(small)
        sizes = {"mem_mib": size / MIB, "mem_share": size / resident_bytes(model)}
        sizes["file_mib"] = file / MIB
        return sizes | measured(dequantize_(small), expected, look, drawn, name)

    for library, (quantizer, settings) in PEERS.items():
        for setting in settings:
            add(library, str(setting), partial(peer, setting, quantizer, f"{library} {setting}"))
    for method, format, plan_of in plans(model, known):
        add(method, format, partial(ours, plan_of, f"{method} {format}"))
    draw(table.frame, drawn)


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


def other_noise(model: nn.Module, look: dict[str, np.ndarray]) -> dict[str, float]:
    """How far maps of the same model from other noise are: what a distance is held against."""
    return distances(look, character(outputs(model, OTHER)))


def draw(table: pd.DataFrame, drawn: dict[str, Tensor]) -> None:
    """Maps by row: FP32, uniform INT4, the allocator at INT4's bytes and at a tenth of FP32's."""
    workspace.set_style()
    figure, axes = plt.subplots(len(DRAWN), SHOWN, figsize=(5.6, 7.2))
    by = table.set_index(["method", "format"])
    scale = heights(drawn["fp32 none"]).max((1, 2))
    for row, (title, key) in zip(axes, DRAWN.items(), strict=True):
        size = (
            ""
            if key == ("fp32", "none")
            else f"\n{by.loc[key, 'mem_share']:.1%} of the bytes\n{by.loc[key, 'decibels']:.1f} dB"
        )
        for ax, z, top in zip(row, heights(drawn[" ".join(key)]), scale, strict=False):
            ax.imshow(z, cmap="viridis", vmin=0, vmax=top)
            ax.set(xticks=[], yticks=[])
        row[0].set_ylabel(f"{title}{size}", fontsize=8)
    figure.suptitle("Height maps from the same noise", fontsize=10)
    note = "colours from 0 to the highest point of the FP32 map"
    workspace.save_figure(WORK, "maps", figure, note, pixels=True, model="a public model of others")
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(run(main))
