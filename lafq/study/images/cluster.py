"""Sample the rows of a table on a Dask cluster that the user runs; the images are the same wherever
they are drawn, and are kept as they come back.
"""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import nn

from lafq.quantization.checkpoint import load_quantized, save_quantized
from lafq.quantization.model import dequantize_
from lafq.study.diffusion.ddpm import sample
from lafq.study.diffusion.unet import UNet
from lafq.study.workspace import compute_on, kind_of_machine

if TYPE_CHECKING:
    # Imported where it is used: it takes half a second, and few runs need it.
    from distributed import Client

T = TypeVar("T")
REACH = 10  # seconds
AHEAD = 4  # tasks per thread of the workers


def pack(small: nn.Module, model: nn.Module) -> bytes:
    """What a worker is sent: the file of the quantized copy `small` of a model."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "packed.safetensors"
        save_quantized(path, small, model)
        return path.read_bytes()


def draw(packed: bytes, how: dict[str, Any]) -> tuple[np.ndarray, str]:
    """Runs on a worker: uint8 images (N, 1, 32, 32) of a packed model, and the kind of machine."""
    if torch.__version__ != how["torch"]:
        raise RuntimeError(f"a worker has torch {torch.__version__}, not {how['torch']}")
    device = compute_on(how["threads"], how["device"])
    with TemporaryDirectory() as folder:
        path = Path(folder) / "packed.safetensors"
        path.write_bytes(packed)
        model = dequantize_(load_quantized(path, UNet(how["width"]))).to(device)
    images = sample(model, how["images"], how["steps"], how["seed"], how["batch"])
    return images.numpy(), kind_of_machine()


async def _workers(address: str) -> int:
    from distributed.core import rpc

    async with asyncio.timeout(REACH), rpc(address) as scheduler:
        return len((await scheduler.identity())["workers"])


def connect(address: str) -> "Client":
    """A client of a scheduler (tcp://host:8786); ValueError where none with workers answers."""
    from distributed import Client

    # First, since a Client that fails stays half open, and its collection can wait for ever.
    with ThreadPoolExecutor(1) as thread:  # a notebook's own thread has an event loop already
        try:
            if not thread.submit(asyncio.run, _workers(address)).result():
                raise ValueError("it has no workers")
        except (OSError, ValueError, KeyError, TimeoutError) as error:
            raise ValueError(
                f"no Dask scheduler with workers answers at {address!r}: start one (`dask "
                f"scheduler`, `dask worker {address}`) or leave SCHEDULER out"
            ) from error
    return Client(address, timeout=REACH, set_as_default=False)


def sample_all(
    address: str, tasks: Iterator[tuple[T, bytes]], **how: Any
) -> Iterator[tuple[T, np.ndarray, str]]:
    """`draw` the packed models of the tasks (row, packed); yields (row, images, machine). Tasks are
    taken a few for each thread of the workers at a time.
    """
    how |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    with connect(address) as client:
        room = AHEAD * sum(client.nthreads().values())
        while taken := list(islice(tasks, room)):
            rows, packed = zip(*taken, strict=True)
            drawn = client.map(draw, packed, how=how, pure=False)
            for row, future in zip(rows, drawn, strict=True):
                yield row, *future.result()
