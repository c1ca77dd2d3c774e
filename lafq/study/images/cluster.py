"""Sample the rows of a table on a Dask cluster that the user runs; the images are the same wherever
they are drawn, and are kept as they come back.
"""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load, save
from tqdm import tqdm

from lafq.study.diffusion.ddpm import sample
from lafq.study.diffusion.subject import UNet
from lafq.study.images.sampling import ImageStore, Recipe, RowFiles, Sampling
from lafq.study.workspace import compute_on, kind_of_machine

if TYPE_CHECKING:
    # Imported where it is used: it takes half a second, and few runs need it.
    from distributed import Client, Future

Made = tuple[UNet, Recipe | None]
REACH = 10  # seconds
AHEAD = 2  # models per thread of the workers


def sample_on_worker(weights: bytes, how: dict[str, Any]) -> tuple[np.ndarray, str]:
    """uint8 images (N, 1, 32, 32) of a U-Net with these weights, and the kind of machine."""
    if torch.__version__ != how["torch"]:
        raise RuntimeError(f"a worker has torch {torch.__version__}, not {how['torch']}")
    device, model = compute_on(how["threads"], how["device"]), UNet(how["width"])
    model.load_state_dict(load(weights))
    return sample(model.to(device), *how["sampling"]).numpy(), kind_of_machine()


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
        except (OSError, ValueError, KeyError, TypeError, TimeoutError) as error:
            raise ValueError(
                f"no Dask scheduler with workers answers at {address!r}: start one (`dask "
                f"scheduler`, `dask worker {address}`) or leave SCHEDULER out"
            ) from error
    return Client(address, timeout=REACH, set_as_default=False)


def draw(store: ImageStore, models: Iterator[Made], sampling: Sampling) -> None:
    """Draw the images a store lacks, equal models' once, AHEAD models per thread of the workers."""
    how = {"sampling": tuple(sampling), "device": store.work.device.type}
    how |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    with connect(store.work.scheduler) as client, tqdm(desc="sampled rows", leave=False) as bar:
        room = AHEAD * sum(client.nthreads().values())
        while some := list(islice(models, room)):
            futures: dict[str, tuple[RowFiles, Future]] = {}
            for model, recipe in some:
                files = store.files(model, sampling, recipe)
                if files.missing and files.key not in futures:
                    weights = save({n: t.contiguous() for n, t in model.state_dict().items()})
                    of_model = weights, how | {"width": model.width}
                    task = client.submit(sample_on_worker, *of_model, pure=False)
                    futures[files.key] = files, task
            for files, task in futures.values():
                images, machine = task.result()
                for batch in files.missing:
                    files.keep(batch, images[batch.start : batch.stop], machine)
                bar.update()
