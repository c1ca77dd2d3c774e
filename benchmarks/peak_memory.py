"""Peak memory of sampling a digit from a packed model: `make benchmark` writes it to
results/<profile>/peak_memory.csv, for the rows of the poster's table.

Each model is measured in a process of its own. The figure is what that process holds above the
interpreter with its libraries: on a CPU the rise of its peak resident set size over that after a
tiny model has sampled (Linux), on a CUDA GPU `torch.cuda.max_memory_allocated`. It varies by some
tenths of a MiB between runs.
"""

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import torch
from shared import PROFILES, forget_peak, memory, run

from lafq.quantization.checkpoint import load_quantized, save_quantized
from lafq.quantization.formats import MIB
from lafq.quantization.model import quantize
from lafq.study import results
from lafq.study.diffusion.ddpm import sample
from lafq.study.diffusion.subject import load_fisher, load_model
from lafq.study.diffusion.unet import UNet, quantizable
from lafq.study.rows import KEY, published_rows
from lafq.study.workspace import Workspace, profile_parameters

# glibc then returns what is freed at once: the peak is of live memory, not of the allocator's
# habits.
ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**16),
    "MALLOC_TRIM_THRESHOLD_": "0",
}


def peak_mib(path: Path, width: int, device: str = "cpu", steps: int = 4) -> float:
    """Peak MiB while a U-Net written by `save_quantized` is loaded and samples a digit; ValueError
    when the measuring process fails, with its last line.
    """
    asked = map(str, (__file__, path, width, device, steps, torch.get_num_threads()))
    environment = {**os.environ, **ALLOCATOR, "TQDM_DISABLE": "1"}
    done = subprocess.run(
        [sys.executable, *asked], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"measuring the memory of {path} failed: {last}")
    return float(done.stdout)


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


def rows(profile: str) -> pd.DataFrame:
    """Columns KEY and peak_mib, whole MiB, of the rows that 08_published has."""
    p = profile_parameters(profile)
    work, found = Workspace.of(p), []
    model, fisher = load_model(work, p["WIDTH"]), load_fisher(work, p["WIDTH"])
    ratios = p["PUBLISHED"]["ratios"]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "row.safetensors"
        for row in published_rows(model, fisher, ratios, p["THRESHOLDS"]):
            save_quantized(path, quantize(model, row.plan), model)
            found.append(
                row.key | {"peak_mib": round(peak_mib(path, p["WIDTH"], work.device.type))}
            )
    return pd.DataFrame(found, columns=[*KEY, "peak_mib"])


def main() -> None:
    """Measure the profiles whose weights and Fisher values are there."""
    if len(sys.argv) == 6:  # the process of `peak_mib`
        path, width, device, steps, threads = sys.argv[1:]
        torch.set_num_threads(int(threads))
        print(_measure(Path(path), int(width), torch.device(device), int(steps)))
        return
    for profile in PROFILES.values():
        try:
            results.update(Workspace(profile), "peak_memory", rows(profile))
        except FileNotFoundError as error:
            print(f"without profile {profile}: {error}")


if __name__ == "__main__":
    sys.exit(run(main))
