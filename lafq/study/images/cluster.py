"""Sample the rows of a table on a Dask cluster that the user runs; the images are the same wherever
they are drawn.

A task is a packed model as the bytes of its file (`save_quantized`) and the noise to start from.
Tasks are independent, and the images that have come back are kept, so `make resume` goes on there.
"""

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from lafq.quantization.checkpoint import load_quantized
from lafq.quantization.model import dequantize
from lafq.study.device import compute_on, kind_of_machine
from lafq.study.diffusion.ddpm import sample
from lafq.study.diffusion.unet import UNet

if TYPE_CHECKING:
    # Imported where it is used: it takes half a second, and few runs need it.
    from distributed import Client

REACH = 10  # seconds
AHEAD = 2  # tasks per thread of the workers, so that none waits for its next


def draw(packed: bytes, how: dict[str, Any]) -> tuple[np.ndarray, str]:
    """Runs on a worker: uint8 images (N, 1, 32, 32) of a packed model, and the kind of machine;
    RuntimeError where torch is another version.
    """
    if torch.__version__ != how["torch"]:
        raise RuntimeError(f"a worker has torch {torch.__version__}, not {how['torch']}")
    device = compute_on(how["threads"], how["device"])
    with TemporaryDirectory() as folder:
        path = Path(folder) / "packed.safetensors"
        path.write_bytes(packed)
        model = dequantize(load_quantized(path, UNet(how["width"]))).to(device)
    images = sample(model, how["images"], how["steps"], how["seed"], how["batch"])
    return images.numpy(), kind_of_machine()


async def _workers(address: str) -> int:
    from distributed.core import rpc

    async with asyncio.timeout(REACH):
        with rpc(address) as scheduler:
            return len((await scheduler.identity())["workers"])


def connect(address: str) -> "Client":
    """A client of the scheduler at an address such as tcp://host:8786; ValueError where none with
    workers answers.
    """
    from distributed import Client

    # First, since a Client that fails stays half open, and its collection can wait for ever.
    with ThreadPoolExecutor(1) as thread:  # a notebook's own thread has an event loop already
        try:
            workers = thread.submit(asyncio.run, _workers(address)).result()
        except (OSError, ValueError, KeyError, TimeoutError) as error:
            raise ValueError(
                f"no Dask scheduler answers at {address!r}: start one (`dask scheduler`) or leave "
                f"SCHEDULER out"
            ) from error
    if not workers:
        raise ValueError(f"{address} has no workers: start some (`dask worker {address}`)")
    return Client(address, timeout=REACH, set_as_default=False)


def sample_all(
    address: str,
    tasks: Iterator[tuple[str, bytes]],
    total: int,
    keep: Callable[[str, np.ndarray, str], None],
    **how: Any,
) -> None:
    """Have the cluster at `address` `draw` packed models; keep(key, images, kind of machine) takes
    what comes back. Raises ValueError as `connect`, and what a worker raised.
    """
    from distributed import as_completed

    how |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    with connect(address) as client, tqdm(total=total, desc="sampling on the cluster") as bar:
        running, keys = as_completed(loop=client.loop, with_results=True), {}

        def take() -> None:
            future, (images, machine) = next(running)
            keep(keys.pop(future), images, machine)
            bar.update()

        for key, packed in tasks:
            if len(keys) >= AHEAD * sum(client.nthreads().values()):
                take()
            keys[future := client.submit(draw, packed, how, pure=False)] = key
            running.add(future)
        while keys:
            take()
