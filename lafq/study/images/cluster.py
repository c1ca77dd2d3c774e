"""Sample the rows of a table on a Dask cluster that the user runs; the images are the same wherever
they are drawn.

A task is a packed model as the bytes of its file (`save_quantized`) and the noise to start from.
Tasks are independent: one whose worker is gone is given to another, and the images that have come
back are kept, so `make resume` goes on from there.
"""

import asyncio
import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from lafq.quantization.checkpoint import load_quantized
from lafq.quantization.model import dequantize_
from lafq.study import workspace
from lafq.study.diffusion.ddpm import sample
from lafq.study.diffusion.unet import UNet
from lafq.study.workspace import compute_on, kind_of_machine

if TYPE_CHECKING:
    # Imported where it is used: it takes half a second, and few runs need it.
    from distributed import Client, Future

REACH = 10  # seconds
AHEAD = 2


def software() -> str:
    """What decides the bytes of an image besides weights and noise: a digest of this package's
    code, and torch's version.
    """
    code = hashlib.sha256()
    for path in sorted((workspace.ROOT / "lafq").rglob("*.py")):
        code.update(path.read_bytes())
    return f"code {code.hexdigest()[:12]}, torch {torch.__version__}"


def draw(
    packed: bytes,
    width: int,
    images: int,
    steps: int,
    seed: int,
    batch: int,
    *,
    threads: int,
    device: str,
    expected: str,
) -> tuple[np.ndarray, str]:
    """Runs on a worker: uint8 images (N, 1, 32, 32) of the packed model in the file of these bytes,
    and the kind of machine.

    Raises RuntimeError when the worker's software is not the `expected`, or it has not that device.
    """
    if (own := software()) != expected:
        raise RuntimeError(
            f"a worker has {own}, this machine {expected}: install the same lafq and torch on both"
        )
    chosen = compute_on(threads, device)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "packed.safetensors"
        path.write_bytes(packed)
        model = dequantize_(load_quantized(path, UNet(width)))
    return sample(model.to(chosen), images, steps, seed, batch).numpy(), kind_of_machine()


def connect(address: str) -> "Client":
    """A client of the scheduler at an address such as tcp://host:8786.

    Raises ValueError when none answers there or it has no workers.
    """
    from distributed import Client

    # First, since a Client that fails stays half open, and its collection can wait for ever on a
    # lock of dask's.
    with ThreadPoolExecutor(1) as thread:  # a notebook's own thread has an event loop already
        try:
            found = thread.submit(asyncio.run, _identity(address)).result()
        except (OSError, ValueError, TimeoutError) as error:
            raise ValueError(
                f"no Dask scheduler answers at {address!r}: start one (`dask scheduler`) or leave "
                f"SCHEDULER out"
            ) from error
    if not found.get("workers"):
        raise ValueError(
            f"the Dask scheduler at {address} has no workers: start some (`dask worker {address} "
            f"--nthreads 1`)"
        )
    return Client(address, timeout=REACH, set_as_default=False)


async def _identity(address: str) -> dict[str, Any]:
    """What the scheduler at an address says of itself; ValueError or OSError when it is none,
    TimeoutError when it is silent.
    """
    from distributed.comm import connect as open_comm
    from distributed.comm.addressing import get_address_host_port

    get_address_host_port(address)
    async with asyncio.timeout(REACH):
        comm = await open_comm(address, timeout=REACH)
        try:
            await comm.write({"op": "identity", "reply": True})
            found = await comm.read()
        finally:
            comm.abort()
    if not isinstance(found, dict) or found.get("type") != "Scheduler":
        raise ValueError(f"{address} is no scheduler")
    return found


def sample_all(
    address: str,
    tasks: Iterator[tuple[str, bytes]],
    total: int,
    keep: Callable[[str, np.ndarray, str], None],
    *,
    width: int,
    images: int,
    steps: int,
    seed: int,
    batch: int,
    device: str,
) -> None:
    """Draw the images of packed models on the cluster at `address`, calling keep(key, images, kind
    of machine) as each comes back.

    tasks: the key of a row, and its packed model as a file's bytes; taken as workers have room, two
    per thread ahead. Raises ValueError as `connect`, RuntimeError for a worker of other software or
    one sentence of what failed there.
    """
    from distributed import as_completed

    drawn = (width, images, steps, seed, batch)
    how = {"threads": torch.get_num_threads(), "device": device, "expected": software()}
    with (
        connect(address) as client,
        tqdm(total=total, desc="rows from the cluster", unit="row", leave=False) as bar,
    ):
        keys: dict[Future, str] = {}
        waiting = as_completed([], loop=client.loop, with_results=True)

        def submit() -> None:
            for key, packed in tasks:
                future = client.submit(draw, packed, *drawn, **how, key=f"lafq-{key}", pure=False)
                keys[future] = key
                waiting.add(future)
                return

        for _ in range(AHEAD * sum(client.nthreads().values())):
            submit()
        for future, (generated, machine) in waiting:
            keep(keys.pop(future), generated, machine)
            bar.update()
            submit()
