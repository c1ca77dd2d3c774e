"""Peak memory of sampling from a packed model, measured in a process of its own.

The figure is what the process holds above the interpreter with its libraries loaded: on a CPU the
rise of its peak resident set size over that after a tiny model has sampled, on a CUDA GPU
`torch.cuda.max_memory_allocated`.
"""

import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Self

import torch

from lafq.quantization.checkpoint import load_quantized, save_quantized
from lafq.quantization.formats import MIB
from lafq.quantization.model import quantize
from lafq.study.diffusion.ddpm import sample
from lafq.study.diffusion.unet import UNet, quantizable
from lafq.tensors import read_metadata


class PeakMeter:
    """Measures in forks of one other process, which is started at the first question; a context
    manager.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = device
        self._process: subprocess.Popen | None = None
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed on leaving)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process:
            self._process.communicate()
        self._errors.close()

    def mib(self, path: Path, *, images: int = 1, steps: int = 4) -> float:
        """Peak MiB while a U-Net written by `save_quantized` is loaded and samples `images` digits,
        as one batch.

        The figure varies by some tenths of a MiB between runs.
        Raises ValueError when the measuring process fails, with its last line.
        """
        self._process = self._process or self._start()
        try:
            self._process.stdin.write(json.dumps([str(path), images, steps]) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self._process.wait()
            self._errors.seek(0)
            last = (self._errors.read().strip().splitlines() or ["no message"])[-1]
            raise ValueError(f"measuring the memory of {path} failed: {last}")
        return json.loads(answer)

    def _start(self) -> subprocess.Popen:
        command = [
            sys.executable,
            "-m",
            "lafq.study.images.peak_memory",
            str(self.device),
            str(torch.get_num_threads()),
        ]
        # glibc then returns what is freed at once: the peak is of live memory, not of the
        # allocator's habits.
        allocator = {
            "MALLOC_ARENA_MAX": "1",
            "MALLOC_MMAP_THRESHOLD_": str(2**16),
            "MALLOC_TRIM_THRESHOLD_": "0",
        }
        streams = {
            "stdin": subprocess.PIPE,
            "stdout": subprocess.PIPE,
            "stderr": self._errors,
            "text": True,
        }
        return subprocess.Popen(
            command, **streams, env={**os.environ, **allocator, "TQDM_DISABLE": "1"}
        )


def _resident(peak: bool) -> float:
    """MiB of this process in memory, now or at most so far (since `_forget_peak`, where that is
    possible).
    """
    status = Path("/proc/self/status")
    if status.is_file():
        key = "VmHWM:" if peak else "VmRSS:"
        return (
            next(
                int(line.split()[1])
                for line in status.read_text().splitlines()
                if line.startswith(key)
            )
            * 1024
            / MIB
        )
    # Not the first choice on Linux: there ru_maxrss starts at the parent's.
    import resource

    return (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024)
        / MIB
    )


def _forget_peak() -> None:
    forget = Path("/proc/self/clear_refs")
    if forget.exists():
        forget.write_text("5")


def _peak(path: Path, images: int, steps: int, device: torch.device) -> float:
    _forget_peak()
    before = _resident(peak=False)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with torch.device("meta"):
        skeleton = UNet(read_metadata(path)["width"])
    model = load_quantized(path, skeleton).to(device, memory_format=torch.channels_last)
    _forget_peak()
    sample(model, images, steps, seed=0, batch_size=images)
    return (
        torch.cuda.max_memory_allocated() / MIB
        if device.type == "cuda"
        else _resident(peak=True) - before
    )


def _warm_up(path: Path, device: torch.device) -> None:
    """Do once with a tiny model all that is measured, so that the libraries' own pages are there
    before.
    """
    tiny = UNet(4)
    save_quantized(path, quantize(tiny, dict.fromkeys(quantizable(tiny), "int8")), tiny)
    sample(load_quantized(path, tiny).to(device, memory_format=torch.channels_last), 1, 2, seed=0)
    path.unlink()


def _main() -> None:
    """Answer every line of stdin from a fork: what one measurement leaves in memory would be
    missing from the next.
    """
    device, threads = torch.device(sys.argv[1]), int(sys.argv[2])
    for line in sys.stdin:
        if child := os.fork():
            if os.waitpid(child, 0)[1]:
                sys.exit(1)
            continue
        try:
            torch.set_num_threads(threads)
            path, images, steps = json.loads(line)
            _warm_up(Path(path).with_suffix(".warm"), device)
            print(json.dumps(_peak(Path(path), images, steps, device)), flush=True)
        except Exception:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)


if __name__ == "__main__":
    _main()
