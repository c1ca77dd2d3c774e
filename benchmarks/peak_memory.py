"""Peak memory of sampling a digit from a packed model: `make benchmark` writes it to
results/<profile>/peak_memory.csv, for the rows of the poster's table, and to
results/mini/11_peak_memory.csv, for the entropy-coded files of 11_files.

Each model is measured in a process of its own. The figure is what that process holds above the
interpreter with its libraries: on a CPU the rise of its peak resident set size over that after a
tiny model has sampled (Linux), on a CUDA GPU `torch.cuda.max_memory_allocated`. It varies by some
tenths of a MiB between runs.
"""

import sys
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import torch
from shared import PROFILES, forget_peak, in_a_process, memory, run
from torch import nn

from lafq.quantization.checkpoint import load_quantized, save_quantized
from lafq.quantization.formats import MIB
from lafq.quantization.model import quantize
from lafq.study import results
from lafq.study.diffusion.ddpm import sample
from lafq.study.diffusion.subject import load_fisher, load_model
from lafq.study.diffusion.unet import UNet, quantizable
from lafq.study.rows import (
    KEY,
    Row,
    allocated_at_bits,
    coded_at_bits,
    measured_sensitivity,
    published_rows,
    uniform_at_bits,
)
from lafq.study.workspace import Workspace, profile_parameters, save_table

# glibc then returns what is freed at once: the peak is of live memory, not of the allocator's
# habits.
ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**16),
    "MALLOC_TRIM_THRESHOLD_": "0",
}


def peak_mib(path: Path, width: int, device: str = "cpu", steps: int = 4) -> float:
    """Peak MiB of a process in which a U-Net of `save_quantized` is loaded and samples a digit."""
    asked = (__file__, path, width, device, steps, torch.get_num_threads())
    return in_a_process(*asked, environment=ALLOCATOR | {"TQDM_DISABLE": "1"})


def _measure(path: Path, width: int, device: torch.device, steps: int) -> float:
    # Once with a tiny model, so that the libraries' own pages are there before.
    with TemporaryDirectory() as folder:
        tiny, warm = UNet(4), Path(folder) / "tiny.safetensors"
        save_quantized(warm, quantize(tiny, dict.fromkeys(quantizable(tiny), "int8")), tiny)
        small = load_quantized(warm, tiny).to(device, memory_format=torch.channels_last)
        sample(small, 1, 2, seed=0)
        del tiny, small
    before = memory("VmRSS")
    with torch.device("meta"):
        skeleton = UNet(width)
    model = load_quantized(path, skeleton).to(device, memory_format=torch.channels_last)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        sample(model, 1, steps, seed=0, batch_size=1)
        return torch.cuda.max_memory_allocated() / MIB
    forget_peak()
    sample(model, 1, steps, seed=0, batch_size=1)
    return memory("VmHWM") - before


def peaks(model: nn.Module, rows: Iterable[Row], device: str, compress: bool) -> list[int]:
    """Peak memory of each row, whole MiB."""
    with TemporaryDirectory() as folder:
        path, found = Path(folder) / "row.safetensors", []
        for row in rows:
            save_quantized(path, quantize(model, row.plan), model, compress=compress)
            found.append(round(peak_mib(path, model.width, device)))
    return found


def measure(profile: str) -> None:
    """Write the tables of a profile whose weights and Fisher values are there."""
    p = profile_parameters(profile)
    work = Workspace.of(p)
    model, fisher = load_model(work, p["WIDTH"]), load_fisher(work, p["WIDTH"])
    rows = published_rows(model, fisher, p["PUBLISHED"]["ratios"], p["THRESHOLDS"])
    table = pd.DataFrame([row.key for row in rows], columns=KEY)
    found = table.assign(peak_mib=peaks(model, rows, work.device.type, compress=False))
    results.update(work, "peak_memory", found)
    if profile == "mini":
        known = measured_sensitivity(model, p["TRUE_FISHER_SAMPLES"], p["SEED"])
        rows = uniform_at_bits(model, known)
        bits = sorted({*p["BUDGET_BITS"], *(row.bits for row in rows)})
        rows += allocated_at_bits(model, known, bits, (), [("allocate_all", "feedback")])
        rows = [row for row in rows if row.bits < 10]
        rows += coded_at_bits(model, known, p["CODED_BITS"])
        table = pd.DataFrame([row.budget_key for row in rows])
        found = table.assign(peak_mib=peaks(model, rows, work.device.type, compress=True))
        save_table(work, "11_peak_memory", found)


def main() -> None:
    """Measure both profiles, or one model, in the process of `peak_mib`."""
    if len(sys.argv) == 6:
        path, width, device, steps, threads = sys.argv[1:]
        torch.set_num_threads(int(threads))
        print(_measure(Path(path), int(width), torch.device(device), int(steps)))
        return
    for profile in PROFILES.values():
        try:
            measure(profile)
        except FileNotFoundError as error:
            print(f"without profile {profile}: {error}")


if __name__ == "__main__":
    sys.exit(run(main))
