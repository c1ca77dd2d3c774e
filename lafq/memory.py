"""Peak memory of sampling from a packed model, measured in a process of its own.

The figure is what the process holds above the interpreter with its libraries loaded: on a CPU the rise of its peak
resident set size over that after a tiny model has sampled, on a CUDA GPU `torch.cuda.max_memory_allocated`.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from lafq import storage
from lafq.diffusion import sample
from lafq.files import read_metadata
from lafq.unet import UNet

MIB = 2**20


def sampling_peak_mib(path: Path, *, images: int = 1, steps: int = 4, device: torch.device | str = "cpu") -> float:
    """Peak MiB while a U-Net written by `storage.save` is loaded and samples `images` digits, as one batch.

    Takes a few seconds, most of them to start Python. The figure varies by some tenths of a MiB between runs.
    Raises ValueError when the measuring process fails, with its last line.
    """
    command = [sys.executable, "-m", "lafq.memory", str(path), str(images), str(steps), str(device), str(torch.get_num_threads())]
    # glibc then returns what is freed at once: the peak is of live memory, not of the allocator's habits.
    allocator = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **allocator})
    if done.returncode:
        raise ValueError(f"measuring the memory of {path} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return float(done.stdout)


def _resident(peak: bool) -> float:
    """MiB of this process in memory, now or at most so far (since `_forget_peak`, where that is possible)."""
    status = Path("/proc/self/status")
    if status.is_file():
        key = "VmHWM:" if peak else "VmRSS:"
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(key)) * 1024 / MIB
    # Not the first choice on Linux: there ru_maxrss starts at the parent's.
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / MIB


def _forget_peak() -> None:
    forget = Path("/proc/self/clear_refs")
    if forget.exists():
        forget.write_text("5")


def _main() -> None:
    parser = argparse.ArgumentParser()
    for name, kind in (("path", Path), ("images", int), ("steps", int), ("device", torch.device), ("threads", int)):
        parser.add_argument(name, type=kind)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sample(UNet(4).to(args.device), 1, 2, seed=0)
    _forget_peak()
    before = _resident(peak=False)
    if args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with torch.device("meta"):
        skeleton = UNet(read_metadata(args.path)["width"])
    model = storage.load(args.path, skeleton).to(args.device, memory_format=torch.channels_last)
    _forget_peak()
    sample(model, args.images, args.steps, seed=0, batch_size=args.images)
    print(json.dumps(torch.cuda.max_memory_allocated() / MIB if args.device.type == "cuda" else _resident(peak=True) - before))


if __name__ == "__main__":
    _main()
