"""The allocator beside five other libraries at equal bytes: `make peers` writes
results/benchmarks/peers.csv and a figure.

Each library quantizes the diffusion model beside packages of its own (`peer.py`), and its weights
are judged here: damage on held-out digits and noise that no plan has seen. The allocator then gets
exactly the library's bytes, once for all weights and once for the weights that the library
quantized. All libraries and the sensitivity see the same noised training digits.

Rows that are there already are left alone; delete the table to make them again.
"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import torch
from peer import LIBRARIES, PROFILES, SEED
from torch import Tensor, nn

from lafq import estimate_sensitivity, quantize
from lafq.allocation import allocate as solver
from lafq.quantization.formats import MIB, bit_bytes, unshrunk_scale
from lafq.quantization.model import dequantize_, nbytes
from lafq.quantization.plan import Plan, Recipe
from lafq.study import damage, workspace
from lafq.study.budget.budget import FRESH, FRESH_SEED
from lafq.study.diffusion import training
from lafq.study.diffusion.ddpm import noised_batches
from lafq.study.diffusion.mnist import mnist
from lafq.study.diffusion.subject import load_model
from lafq.study.figures.benchmarks import OURS
from lafq.study.workspace import Workspace, compute_on
from lafq.tensors import load_tensors

WORK = Workspace("benchmarks")
HERE = Path(__file__).parent
BITS = (8, 6, 4, 3, 2)
SAMPLES, DIGITS = {16: 512, 64: 128}, {16: 500, 64: 100}
SCALE_BYTES = 2  # a scale counts as FP16, as ours do
# By library and width the bits, where all would take hours.
FEWER = {("aimet-torch", 16): (4, 2), ("aimet-torch", 64): (), ("brevitas", 64): (4,)}


def installed(library: str) -> Path:
    """The folder with a library and what it needs beside .venv, pinned in requirements-peers/."""
    pinned = HERE / "requirements-peers" / f"{library}.txt"
    folder = (
        WORK.build / "peers" / f"{library}-{hashlib.sha256(pinned.read_bytes()).hexdigest()[:8]}"
    )
    if not folder.is_dir():
        partial = folder.with_suffix(
            ".part"
        )  # an interrupted installation is not taken for a whole one
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--upgrade",
            "--target",
            str(partial),
        ]
        subprocess.run([*command, "-r", str(pinned)], check=True)
        partial.rename(folder)
    return folder


def stored_bytes(model: nn.Module, stored: dict[str, tuple[float, int, int]]) -> int:
    """Bytes that must be stored: codes, scales and zero points of the quantized weights, all else
    in FP32.

    stored: by parameter name the bits per code and the numbers of scales and of zero points, which
    take as many bits as a code.
    """
    total = nbytes(model, {})
    for name, (bits, scales, zero_points) in stored.items():
        count = model.get_parameter(name).numel()
        total += (
            bit_bytes(int(bits), count)
            + bit_bytes(int(bits), zero_points)
            + SCALE_BYTES * scales
            - 4 * count
        )
    return total


def quantized_by(library: str, width: int, bits: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights that a library quantized, and what it says of them; RuntimeError with its own
    message where it fails.
    """
    path = WORK.build / "peers" / f"{library}-{width}-{bits}.safetensors"
    if not path.is_file():
        search = os.pathsep.join((str(installed(library)), os.environ.get("PYTHONPATH", "")))
        command = [
            sys.executable,
            str(HERE / "peer.py"),
            library,
            str(width),
            str(bits),
            str(SAMPLES[width]),
            str(path),
        ]
        done = subprocess.run(
            command,
            env=os.environ | {"PYTHONPATH": search},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return load_tensors(path, "make peers")


class Judge:
    """The diffusion model of one width: the allocator at any bytes, and the damage of quantized
    weights.
    """

    def __init__(self, width: int) -> None:
        self.model, self.width = load_model(Workspace(PROFILES[width]), width), width
        self.known = estimate_sensitivity(
            self.model, noised_batches(mnist(train=True)[0], SAMPLES[width], SEED), SEED
        )
        self.outputs = training.held_out_outputs(
            self.model, SEED + FRESH_SEED, DIGITS[width], FRESH
        )
        self.fronts = solver.frontiers_of(
            self.model, self.known.fisher, "mixed", curvature=self.known.curvature
        )
        self.recipe = Recipe(unshrunk_scale, self.known.fisher, self.known.curvature)

    def errors(self, whole: nn.Module) -> Tensor:
        """Mean squared change of the output, one number per digit."""
        return damage.output_errors(whole, self.outputs, SEED + FRESH_SEED, FRESH)[0]

    def allocated(self, size: int, names: set[str]) -> Tensor:
        """`errors` of the allocator's plan of these bytes, in which only these weights may be
        quantized.
        """
        fronts = {n: front for n, front in self.fronts.items() if n in names}
        plan = solver.solve_budget(self.model, fronts, size / MIB, self.recipe)
        return self.errors(dequantize_(quantize(self.model, plan)))

    def uniform(self, bits: int) -> dict[str, Any]:
        """lafq without the allocator: all weights in one format, rounded to the nearest code."""
        plan = Plan(dict.fromkeys(self.known.fisher, f"int{bits}"))
        return self._row(
            OURS,
            "",
            bits,
            nbytes(self.model, plan),
            dequantize_(quantize(self.model, plan)),
            set(plan),
        )

    def of(self, library: str, bits: int) -> dict[str, Any]:
        """A library's row; its error where it fails."""
        try:
            weights, about = quantized_by(library, self.width, bits)
        except RuntimeError as error:
            return {"width": self.width, "library": library, "bits": bits, "error": str(error)}
        whole = load_model(Workspace(PROFILES[self.width]), self.width)
        with torch.no_grad():
            for name, values in weights.items():
                whole.get_parameter(name).copy_(values)
        return self._row(
            library,
            about["version"],
            bits,
            stored_bytes(self.model, about["stored"]),
            whole,
            set(weights),
        )

    def _row(
        self, library: str, version: str, bits: int, size: int, whole: nn.Module, names: set[str]
    ) -> dict[str, Any]:
        """Bytes and damage, and the allocator's damage at these bytes over it, paired over the
        digits.
        """
        theirs, count = self.errors(whole), len(self.known.fisher)
        found = {
            "width": self.width,
            "library": library,
            "version": version,
            "bits": bits,
            "mem_mib": size / MIB,
        }
        found |= {
            "mem_share": size / nbytes(self.model, {}),
            "tensors_fp32": count - len(names),
            "damage": theirs.mean().item(),
        }
        for name, chosen in (("all", set(self.known.fisher)), ("shared", names)):
            ours = self.allocated(size, chosen)
            ratio = damage.ratio_of_means(ours, theirs, SEED)
            found[f"damage_{name}"] = ours.mean().item()
            found |= dict(
                zip((f"over_{name}", f"over_{name}_low", f"over_{name}_high"), ratio, strict=True)
            )
        return found


def draw(table: pd.DataFrame) -> None:
    """Damage over stored MiB, one panel per width: the libraries, and the allocator at their bytes."""
    workspace.set_style()
    rows = table[table["damage"].notna()]
    figure, axes = plt.subplots(1, rows["width"].nunique(), figsize=(9.5, 4), squeeze=False)
    styles = {
        library: f"C{i}{marker}:"
        for i, (library, marker) in enumerate(zip((OURS, *LIBRARIES), "sv^XP*", strict=True))
    }
    for ax, (width, own) in zip(axes[0], rows.groupby("width"), strict=True):
        for library, line in own.groupby("library", sort=False):
            ax.plot(
                "mem_mib",
                "damage",
                styles[library],
                data=line.sort_values("mem_mib"),
                label=library,
                ms=5,
                lw=1,
            )
        ours = own.sort_values("mem_mib")
        ax.plot(
            "mem_mib",
            "damage_all",
            "D-",
            data=ours,
            label="lafq, allocator",
            color="black",
            ms=4,
            lw=1.2,
        )
        ax.set(xscale="log", yscale="log", xlabel="stored MiB", title=f"width {width}")
        ax.xaxis.set_major_formatter("{x:.2g}")
        ax.xaxis.set_minor_formatter("{x:.2g}")
        ax.tick_params(axis="x", which="both", labelsize=8)
    axes[0, 0].set_ylabel("damage (mean squared change of the output)")
    axes[0, 0].legend(fontsize=7, loc="lower left")  # of the width at which most libraries were run
    worst = rows[rows["library"] != OURS]["over_all"].max()
    figure.suptitle(
        f"At equal bytes the allocator does at most {worst:.2g} times the damage of another "
        f"library",
        fontsize=11,
    )
    workspace.save_figure(
        WORK, "peers", figure, "held-out digits and noise that no plan has seen; lower is better"
    )
    plt.close(figure)


def main() -> int:
    """Make the rows that are missing and the figure; errors are one sentence and exit status 1."""
    compute_on(2, "cpu")
    table = workspace.load_optional(WORK, "peers")
    rows = [] if table is None else table.to_dict("records")
    there = {(row["width"], row["library"], row["bits"]) for row in rows}
    try:
        for width in PROFILES:
            wanted = [
                (name, bits)
                for name in (OURS, *LIBRARIES)
                for bits in FEWER.get((name, width), BITS)
            ]
            todo = [(name, bits) for name, bits in wanted if (width, name, bits) not in there]
            judge = Judge(width) if todo else None
            for name, bits in todo:
                rows.append(judge.uniform(bits) if name == OURS else judge.of(name, bits))
                workspace.save_table(WORK, "peers", pd.DataFrame(rows))
                said = (
                    rows[-1].get(key, "") for key in ("mem_mib", "damage", "over_shared", "error")
                )
                print(width, name, bits, *said, flush=True)
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    draw(workspace.load_table(WORK, "peers"))
    print("written: results/benchmarks/peers.csv, figures/benchmarks/peers.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
