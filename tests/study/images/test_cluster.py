import gc
import os
import signal
import socketserver
import threading

import numpy as np
import pandas as pd
import pytest
from distributed import Client, LocalCluster

from lafq.quantization.model import dequantize, quantize
from lafq.study import threshold_rows, workspace
from lafq.study.diffusion.unet import quantizable
from lafq.study.images import cluster, sampling
from lafq.study.images import evaluate as evaluation
from lafq.study.images.sampling import ImageStore
from lafq.study.rows import BASELINE
from lafq.study.workspace import Workspace
from tools.notebooks import notebooks
from tools.run import check

SMOKE = Workspace("smoke")
DRAWN = sampling.Sampling(3, 2, 0)


@pytest.fixture(scope="module")
def two_workers():
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as found:
        yield found


def on(cluster, **settings):
    return Workspace("smoke", scheduler=cluster.scheduler_address, **settings)


def plans_of(model):
    return [
        {},
        *(
            dict.fromkeys(quantizable(model), low)
            for low in ("fp16", "int8", "int4", "int3", "int2")
        ),
    ]


@pytest.mark.slow
def test_rows_are_the_same_bytes_on_a_cluster(two_workers, sandbox, tiny, monkeypatch):
    rows = [BASELINE, *threshold_rows.uniform(tiny, ("fp16", "int8"))]
    here, images = evaluation.evaluate(SMOKE, tiny, rows, DRAWN)
    with monkeypatch.context() as patch:
        patch.setattr(workspace, "BUILD", sandbox / "elsewhere")
        patch.setattr(sampling, "sample", None)
        there, drawn = evaluation.evaluate(on(two_workers), tiny, rows, DRAWN)
    pd.testing.assert_frame_equal(here, there, check_exact=True)
    assert images.keys() == drawn.keys()
    assert all(np.array_equal(images[key], drawn[key]) for key in images)


@pytest.mark.slow
def test_images_kept_by_recipe_are_the_same_files_on_a_cluster(
    two_workers, sandbox, tiny, monkeypatch
):
    drawn, rows = DRAWN._replace(batch=2), threshold_rows.uniform(tiny)
    here, _ = evaluation.evaluate(Workspace("smoke", keep=True), tiny, rows, drawn)
    first = {path.name: sampling.read(path) for path in ImageStore(SMOKE).folder.iterdir()}
    monkeypatch.setattr(workspace, "RESULTS", sandbox / "elsewhere")
    there, _ = evaluation.evaluate(on(two_workers, keep=True), tiny, rows, drawn)
    pd.testing.assert_frame_equal(
        here.drop(columns="same_machine"), there.drop(columns="same_machine"), check_exact=True
    )
    for path in ImageStore(SMOKE).folder.iterdir():
        images, record = sampling.read(path)
        assert np.array_equal(images, first[path.name][0])
        assert record["drawn_from"] == first[path.name][1]["drawn_from"]


@pytest.mark.slow
def test_a_killed_worker_loses_no_row(two_workers, sandbox, tiny, monkeypatch):
    packed = ((quantize(tiny, plan), lambda _: None) for plan in plans_of(tiny))
    kept, killed, machines = {}, [], set()

    def keep(path, images, record):
        if not kept:
            worker = next(iter(two_workers.workers.values()))
            os.kill(worker.pid, signal.SIGKILL)
            killed.append(worker.pid)
        kept[path.stem.partition("_")[0]] = images
        machines.add(record["machine"])

    monkeypatch.setattr(samples, "_keep", keep)
    samples.sample_on_cluster(on(two_workers), tiny, packed, 6, DRAWN)
    expected = [dequantize(quantize(tiny, plan)) for plan in plans_of(tiny)]
    assert killed
    assert len(machines) == 1
    assert kept.keys() == {samples.sample_key(model, *DRAWN[:3]) for model in expected}
    for model in expected:
        assert np.array_equal(
            kept[samples.sample_key(model, *DRAWN[:3])], sampling.sample(model, *DRAWN[:3]).numpy()
        )


def test_a_worker_of_other_software_is_refused(two_workers, sandbox, tiny, monkeypatch):
    monkeypatch.setattr(cluster, "software", lambda: "code of another day")
    rows = threshold_rows.uniform(tiny, ("fp16",))
    with pytest.raises(RuntimeError, match="install the same lafq and torch on both"):
        evaluation.evaluate(on(two_workers), tiny, rows, DRAWN)


def test_no_scheduler_is_one_sentence_before_anything_runs(monkeypatch):
    monkeypatch.setattr(cluster, "REACH", 1)
    with pytest.raises(ValueError, match=r"no Dask scheduler answers at 'tcp://127\.0\.0\.1:1'"):
        check("smoke", {"SCHEDULER": "tcp://127.0.0.1:1"}, notebooks())


@pytest.mark.parametrize("address", ["nowhere", "ftp://127.0.0.1:1", "tcp://127.0.0.1:1"])
def test_no_half_open_client_is_left(address, monkeypatch):
    monkeypatch.setattr(cluster, "REACH", 1)
    with pytest.raises(ValueError, match=f"no Dask scheduler answers at '{address}'"):
        cluster.connect(address)
    assert not [
        found
        for found in gc.get_objects()
        if type(found) is Client and found.status == "connecting"
    ]


class Silent(socketserver.BaseRequestHandler):
    """A service that takes a connection and says nothing, as a dashboard does to a client of
    another protocol.
    """

    def handle(self):
        while self.request.recv(1024):
            pass


def test_a_port_that_is_no_scheduler_is_named_in_bounded_time(monkeypatch):
    monkeypatch.setattr(cluster, "REACH", 1)
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Silent) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"tcp://127.0.0.1:{server.server_address[1]}"
        with pytest.raises(ValueError, match=f"no Dask scheduler answers at '{address}'"):
            cluster.connect(address)
        server.shutdown()


def test_a_worker_is_no_scheduler(two_workers):
    worker = next(iter(two_workers.workers.values())).worker_address
    with pytest.raises(ValueError, match="no Dask scheduler answers"):
        cluster.connect(worker)


def test_a_scheduler_without_workers_is_named():
    with (
        LocalCluster(
            n_workers=0, dashboard_address=":0", processes=False, protocol="tcp://"
        ) as empty,
        pytest.raises(ValueError, match="has no workers: start some"),
    ):
        cluster.connect(empty.scheduler_address)
