"""python -m lafq, on a tiny model of a module that the tests write."""

import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lafq import __main__ as command
from lafq import load_quantized, save_quantized
from lafq.quantization.formats import MIB
from lafq.quantization.model import dequantize_, quantize, resident_bytes

MODULE = """
import torch
from torch import nn


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 32))

    def forward(self, x, t):
        return self.layers(x) * t


def make():
    torch.manual_seed(0)
    return Scaled()
"""
WANTED = 0.01


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """With own.py and inputs.safetensors, whose samples are the rows of two arguments."""
    (tmp_path / "own.py").write_text(MODULE)
    g = torch.Generator().manual_seed(1)
    tensors = {"t": torch.rand(64, 1, generator=g), "x": torch.randn(64, 32, generator=g)}
    save_file(tensors, tmp_path / "inputs.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("own", None)


def run(line):
    return command.main(line.split())


def shrink(line=""):
    given = f"shrink own:make --inputs inputs.safetensors --file-mib {WANTED} -o small.safetensors"
    return run(f"{given} {line}")


def number(text, output):
    return float(re.search(rf"{text} ([\d.e+-]+)", output)[1])


def test_a_file_of_the_size_and_what_it_holds(folder, capsys):
    assert shrink() == 0
    path = folder / "small.safetensors"
    assert 0.95 * WANTED * MIB < path.stat().st_size <= WANTED * MIB
    model = command.model_of("own:make")
    assert resident_bytes(load_quantized(path, model)) < resident_bytes(model) / 2
    predicted = number("predicted damage", capsys.readouterr().out)
    assert run("info small.safetensors --model own:make --inputs inputs.safetensors") == 0
    told = capsys.readouterr().out
    assert number("predicted damage", told) == predicted
    assert number("measured damage", told) == pytest.approx(predicted, rel=0.5)
    sizes = dict(re.findall(r"^ *(\S+) .* [\d.]+ +(\d+)$", told, re.MULTILINE))
    assert set(sizes) == {f"layers.{i}.{p}" for i in (0, 2) for p in ("weight", "bias")}
    total = re.search(r"tensors (\d+) bytes, header and tables (\d+), file", told)
    assert sum(map(int, sizes.values())) == int(total[1])
    assert int(total[1]) + int(total[2]) == path.stat().st_size


def test_measured_damage_is_half_the_summed_squared_error(folder):
    shrink()
    model, path = command.model_of("own:make"), folder / "small.safetensors"
    [*batches] = command.batches_of(folder / "inputs.safetensors", model, 7)
    x, t = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert x.shape == (64, 32) and t.shape == (64, 1)
    with torch.no_grad():
        change = dequantize_(load_quantized(path, model))(x, t) - model(x, t)
    expected = change.double().square().sum(1).mean().item() / 2
    assert command.measured(model, path, batches) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("compress", [False, True])
def test_a_file_without_notes(folder, capsys, compress):
    model = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32))
    plan = {"0.weight": "int4"}
    save_quantized("a.safetensors", quantize(model, plan), model, compress=compress)
    assert run("info a.safetensors") == 0
    told = capsys.readouterr().out
    assert re.search(r"0\.weight +int4", told) and re.search(r"1\.running_var +float32", told)
    assert "damage" not in told


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("shrink own:make --inputs none.safetensors", "No such file"),
        ("shrink own:made --inputs inputs.safetensors", "'own:made' gives no model"),
        ("shrink other:make --inputs inputs.safetensors", "'other:make' gives no model"),
        ("shrink own --inputs inputs.safetensors", "'own' gives no model"),
        ("shrink own:make --inputs own.py", "own.py is no safetensors file"),
        ("shrink own:make --inputs named.safetensors", r"like the arguments of forward \(x, t\)"),
        ("shrink own:make --inputs uneven.safetensors", "differ in their first dimension"),
        ("shrink own:make --inputs inputs.safetensors --batch-size 0", "batch-size is 0"),
        ("info own.py", "own.py is damaged or not a lafq file"),
        ("info none.safetensors", "none.safetensors is missing"),
    ],
)
def test_errors_are_one_sentence(folder, capsys, line, message):
    save_file({"x": torch.ones(2, 32), "y": torch.ones(2, 1)}, folder / "named.safetensors")
    save_file({"x": torch.ones(2, 32), "t": torch.ones(3, 1)}, folder / "uneven.safetensors")
    rest = f" --file-mib {WANTED} -o small.safetensors" if line.startswith("shrink") else ""
    assert run(line + rest) == 1
    told = capsys.readouterr().err
    assert re.match(rf"stopped: .*{message}", told) and told.count("\n") == 1
    assert not (folder / "small.safetensors").exists()


def test_a_budget_that_cannot_be_met_names_the_smallest(folder, capsys):
    assert shrink("--file-mib 0.0001") == 1
    assert "the smallest possible is 0.00" in capsys.readouterr().err


def test_from_a_shell(folder):
    for line, status in (("info none.safetensors", 1), ("shrink own:make", 2), ("grow", 2)):
        done = subprocess.run(
            [sys.executable, "-m", "lafq", *line.split()], capture_output=True, text=True
        )
        assert done.returncode == status and done.stderr and not done.stdout
