"""The device that computes, its threads and its memory, and the kind of machine it is."""

import math
import os
import platform
from collections.abc import Callable
from pathlib import Path

import torch

DEVICES = ("auto", "cpu", "cuda")


def cores(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """CPU cores that this process may use: of the machine, or fewer where its container limits them
    (cgroup, CPU_LIMIT).
    """
    limits = [
        float(
            len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count() or 1
        )
    ]
    if quota.is_file() and not (words := quota.read_text().split())[0].startswith("max"):
        limits.append(int(words[0]) / int(words[1]))
    if named := os.environ.get("CPU_LIMIT"):
        limits.append(float(named))
    return max(1, math.floor(min(limits)))


def compute_on(threads: int, device: str = "auto") -> torch.device:
    """Fix the number of threads (fewer where there are fewer cores) and how FP32 is computed;
    choose the device.

    "auto": a CUDA GPU where one is visible. Raises ValueError for another device, RuntimeError when
    CUDA is asked for and absent.
    """
    if device not in DEVICES:
        raise ValueError(f"DEVICE is {device!r}: choose one of {', '.join(DEVICES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("DEVICE is cuda, but no CUDA GPU is visible: set DEVICE to auto or cpu")
    if (available := cores()) < threads:
        print(f"threads: {available} instead of {threads}, one per available core")
    torch.set_num_threads(min(threads, available))
    chosen = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    # Quantization is judged in FP32 compute: TF32 keeps 10 mantissa bits, as FP16 does.
    torch.backends.cudnn.deterministic = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return torch.device(chosen)


def kind_of_machine() -> str:
    """Processor, its vector instructions as torch uses them, threads and torch: what decides the
    last bits of an image.
    """
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    words, cpuinfo = {}, Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []:
        name, _, value = line.partition(":")
        words.setdefault(name.strip(), value.strip())
    number = f"{words['cpu family']}/{words['model']}" if "cpu family" in words else ""
    processor = " ".join(
        filter(
            None, (words.get("model name") or platform.processor() or platform.machine(), number)
        )
    )
    instructions = torch.backends.cpu.get_cpu_capability() + (
        " AMX" if "amx_tile" in words.get("flags", "").split() else ""
    )
    return (
        f"{processor}, {instructions}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )


def out_of_memory_error(
    batch: int, parameter: str, attempt: Callable[[int], object]
) -> RuntimeError:
    """The error for a batch that ran out of memory.

    It names the largest of batch / 2, batch / 4, ... with which attempt(size) runs now.
    """
    size = batch // 2
    while size:
        try:
            attempt(size)
        except torch.OutOfMemoryError:
            size //= 2
        else:
            return RuntimeError(
                f"batches of {batch} images do not fit into the GPU's memory: set {parameter} to "
                f"{size}, which fits"
            )
    return RuntimeError(
        "not even one image fits into the GPU's memory beside what is there: free some of it, or "
        "set DEVICE to cpu"
    )
