import numpy as np
import pandas as pd
import pytest
from distributed import LocalCluster

from lafq.study import rows as study_rows
from lafq.study import workspace
from lafq.study.images import cluster, sampling
from lafq.study.images import evaluate as evaluation
from lafq.study.rows import BASELINE
from lafq.study.workspace import Workspace
from tools.pages import notebooks
from tools.run import check


@pytest.fixture
def workers():
    """A function that starts so many workers here, and gives their scheduler's address."""
    started = []

    def start(count):
        where = {"processes": False, "protocol": "tcp://", "dashboard_address": None}
        started.append(LocalCluster(n_workers=count, threads_per_worker=1, **where))
        return started[-1].scheduler_address

    yield start
    for found in started:
        found.close()


@pytest.mark.slow
def test_rows_are_the_same_bytes_on_a_cluster(workers, sandbox, tiny, monkeypatch):
    rows = [BASELINE, *study_rows.uniform_rows(tiny, ("fp16", "int8"))]
    drawn, here = sampling.Sampling(3, 2, 0, 2), Workspace("smoke", keep=True)
    table, images = evaluation.evaluate(here, tiny, rows, drawn)
    for name in ("BUILD", "RESULTS"):
        monkeypatch.setattr(workspace, name, sandbox / "elsewhere")
    monkeypatch.setattr(sampling, "sample", None)
    there = Workspace("smoke", keep=True, scheduler=workers(2))
    again, found = evaluation.evaluate(there, tiny, rows, drawn)
    pd.testing.assert_frame_equal(again, table, check_exact=True)
    assert images.keys() == found.keys()
    assert all(np.array_equal(images[key], found[key]) for key in images)


def test_a_worker_with_another_torch_is_refused(monkeypatch):
    with pytest.raises(RuntimeError, match=r"a worker has torch .*, not 1.0"):
        cluster.sample_on_worker(b"", {"torch": "1.0"})


@pytest.mark.parametrize(
    "address", ["nowhere", "ftp://127.0.0.1:1", "tls://127.0.0.1:1", "tcp://127.0.0.1:1"]
)
def test_no_scheduler_is_one_sentence_before_anything_runs(address, monkeypatch):
    monkeypatch.setattr(cluster, "REACH", 1)
    with pytest.raises(ValueError, match=f"no Dask scheduler with workers answers at '{address}'"):
        check("smoke", {"SCHEDULER": address}, notebooks())


def test_a_scheduler_without_workers_is_named(workers):
    with pytest.raises(ValueError, match="no Dask scheduler with workers answers"):
        cluster.connect(workers(0))
