import pytest
import torch

from lafq.study import device
from lafq.study.device import compute_on, cores


@pytest.mark.parametrize(
    ("quota", "limit", "expected"),
    [
        ("max 100000", None, 8),
        ("150000 100000", None, 1),
        ("50000 100000", None, 1),
        ("400000 100000", "2.5", 2),
        (None, None, 8),
    ],
)
def test_cores_are_those_of_the_container(tmp_path, monkeypatch, quota, limit, expected):
    monkeypatch.setattr(device.os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.delenv("CPU_LIMIT", raising=False)
    if limit:
        monkeypatch.setenv("CPU_LIMIT", limit)
    path = tmp_path / "cpu.max"
    if quota:
        path.write_text(quota + "\n")
    assert cores(path) == expected


def test_fewer_threads_where_there_are_fewer_cores_and_a_line_says_so(monkeypatch, capsys):
    monkeypatch.setattr(device, "cores", lambda: 1)
    try:
        compute_on(2)
        assert torch.get_num_threads() == 1
        assert capsys.readouterr().out == "threads: 1 instead of 2, one per available core\n"
    finally:
        torch.set_num_threads(1)
    monkeypatch.setattr(device, "cores", lambda: 4)
    try:
        compute_on(2)
        assert torch.get_num_threads() == 2
        assert capsys.readouterr().out == ""
    finally:
        torch.set_num_threads(1)
