"""The scripts in benchmarks/ at a small size; what they import beyond .venv is stood in for."""

import ast
import copy
import importlib
import inspect
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from lafq import estimate_sensitivity
from lafq.quantization.checkpoint import save_quantized
from lafq.quantization.model import dequantize_, nbytes, quantize, resident_bytes
from lafq.rng import generator
from lafq.study.diffusion.unet import UNet, quantizable
from lafq.study.images.evaluate import Measured

ROOT = Path(__file__).parents[2]
linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")


@pytest.fixture
def script(monkeypatch):
    """A module of benchmarks/ by name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda p: p.stem)
def test_scripts_import_only_what_is_installed(path):
    """A script's own folder is on its path, the repository's is not: tools/ cannot be imported."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names]
    names += [n.module for n in nodes if isinstance(n, ast.ImportFrom)]
    assert names
    assert "tools" not in {name.partition(".")[0] for name in names}


def test_bytes_of_peers_are_codes_scales_zero_points_and_what_stays_fp32(script, tiny):
    """A tensor of 4 bits with a scale per channel takes what lafq's INT4 takes; zero points take a
    code's bits each.
    """
    peers = script("peers")
    weights = quantizable(tiny)
    shapes = {n: (4, _channels(tiny, n), 0) for n in weights}
    ours = nbytes(tiny, dict.fromkeys(weights, "int4"))
    assert peers.stored_bytes(tiny, shapes) == ours
    name = next(iter(weights))
    assert peers.stored_bytes(tiny, shapes | {name: (*shapes[name][:2], 10)}) == ours + 5
    assert peers.stored_bytes(tiny, {}) == nbytes(tiny, {})


@pytest.fixture
def judge(script, tiny, digits, monkeypatch):
    """Of a tiny model, and a library that rounds it to uniform INT4."""
    peers, shared = script("peers"), script("shared")
    for module in (peers, shared):
        monkeypatch.setattr(module, "load_model", lambda work, width: copy.deepcopy(tiny))
    for name, value in (("PROFILES", "smoke"), ("SAMPLES", 64), ("DIGITS", 20)):
        monkeypatch.setitem(getattr(shared, name), 4, value)
    monkeypatch.setattr(shared, "mnist", lambda train: (digits, None))
    monkeypatch.setattr(peers, "IMAGES", 2)
    monkeypatch.setattr(peers, "STEPS", 2)
    names = [n for n, p in tiny.named_parameters() if p.ndim > 1]
    rounded = dequantize_(quantize(tiny, dict.fromkeys(names, "int4")))
    weights = {n: rounded.get_parameter(n).detach() for n in names}
    about = {"version": "1", "stored": {n: (4, _channels(tiny, n), 0) for n in names}}
    monkeypatch.setattr(peers, "quantized_by", lambda *_: (weights, about))
    return peers.Judge(4)


def test_a_peer_is_judged_at_its_own_bytes(script, judge, monkeypatch):
    """A library that rounds to uniform INT4 does the damage of uniform INT4, and the allocator less
    at these bytes.
    """
    peers = script("peers")
    ours, theirs = judge.of(peers.OURS, 4), judge.of("x", 4)
    assert theirs["image_psnr"] == pytest.approx(ours["image_psnr"], rel=1e-3)
    assert judge.psnr(judge.model) == pytest.approx(80)
    assert theirs["damage"] == pytest.approx(ours["damage"])
    assert theirs["mem_mib"] == ours["mem_mib"]
    assert theirs["tensors_fp32"] == 0
    assert theirs["over_all"] == theirs["over_shared"] < 1

    def fails(*_):
        raise RuntimeError("TypeError: no")

    monkeypatch.setattr(peers, "quantized_by", fails)
    assert judge.of("x", 2) == {"error": "TypeError: no"}


def test_the_rungs_of_the_ladder_have_equal_bytes(script, judge, sandbox):
    """The edges are FP16 on each; uniform INT4 on the lowest does its own damage."""
    peers, table = script("peers"), script("shared").Table("x", ("width", "bits", "rung"))
    judge.ladder(table, 4)
    rows = table.frame.set_index("rung")
    assert list(rows.index) == [peers.FIRST, *judge.rungs]
    assert rows["over"].iloc[0] == 1
    assert (rows["mem_mib"] <= rows["mem_mib"].iloc[0]).all()
    assert rows["over"]["error feedback"] < rows["over"]["absmax scales"]


def _channels(model, name):
    weight = model.get_parameter(name)
    transposed = isinstance(model.get_submodule(name.removesuffix(".weight")), nn.ConvTranspose2d)
    return weight.shape[1] if transposed else weight.shape[0]


def test_plans_are_judged_by_images(script, tiny, digits, sandbox, monkeypatch):
    """Estimates give plans of the bytes of a uniform format, nearer to FP32's images; rows are
    paired with today's plan.
    """
    sampling, shared = script("sampling"), script("shared")
    for name, value in (("STEPS", 3), ("IMAGES", {"chosen": 4}), ("LOOKED_AT", 2), ("DRAWS", 16)):
        monkeypatch.setattr(sampling, name, value)
    monkeypatch.setattr(shared, "load_model", lambda work, width: copy.deepcopy(tiny))
    for module in (shared, sampling):
        monkeypatch.setattr(module, "mnist", lambda train: (digits, None))
    monkeypatch.setattr(sampling, "subject", sampling.cache(sampling.Sampled))

    def looked(images, noise):
        pixels = (images * 255).round().to(torch.uint8)
        return Measured(pixels, images.flatten(1).argmax(1), {}, {})

    monkeypatch.setattr(sampling, "seen", looked)
    sampling.timesteps()
    few = {"draws": {"draws": 16}, "images": {"images": 4}}
    for name, make in sampling.ESTIMATES.items():
        named = inspect.signature(make).parameters
        how = {k: v for part, how in few.items() if part in named for k, v in how.items()}
        monkeypatch.setitem(sampling.ESTIMATES, name, partial(make, **how))
    names = "uniform", sampling.TODAY, "states, images alike", sampling.ALIKE, "free", "ratio"
    rows = [("ddpm", name, 0, ("int4",)) for name in names]
    monkeypatch.setitem(sampling.ROWS, "chosen", rows)
    for asked in rows:
        sampling.measure("chosen", asked)
    table = pd.DataFrame(sampling.lines("chosen")).set_index("sensitivity")
    assert (table["mib"] <= table.loc["uniform", "mib"]).all()
    ours = table.loc[[sampling.TODAY, "states, images alike", sampling.ALIKE]]
    assert (ours["image_psnr"] > table.loc["uniform", "image_psnr"]).all()
    assert table["over_response"].gt(0).all()
    assert table.loc[sampling.TODAY, ["gain", "gain_low", "gain_high"]].eq(0).all()


@linux
def test_growth_measures_each_step(script):
    cost = script("cost")
    for step in cost.STEPS:
        found = cost.step(step, "4")
        assert found["seconds"] > 0
        assert found["weights"] == sum(p.numel() for p in UNet(4).parameters())


def test_terrain_plans_have_the_bytes_of_the_rows_beside_them(script, monkeypatch, tmp_path):
    """On a small network: each allocation fits in the bytes that it is named for."""
    terrain = script("terrain")
    torch.manual_seed(0)
    first, second, third = (nn.Conv2d(*c, 3, padding=1) for c in ((1, 32), (32, 32), (32, 1)))
    model = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third).eval()
    batches = [(torch.randn(2, 1, 8, 8, generator=generator(i)),) for i in range(16)]
    known = estimate_sensitivity(model, batches)
    monkeypatch.setattr(terrain, "known_mib", lambda *_: 0.02)
    monkeypatch.setattr(terrain, "SENSITIVE", 1)
    monkeypatch.setattr(terrain, "TENTH", 0.3)
    made = {(method, format): make() for method, format, make in terrain.plans(model, known)}
    for low in terrain.UNIFORM:
        allocated = made["allocator", f"bytes of uniform {low}"]
        assert nbytes(model, allocated) <= nbytes(model, made["uniform", low])
    kept = made["INT4, sensitive tensors FP16", "int4"]
    assert sorted(kept.entries.values()) == ["fp16", "int4", "int4"]
    for low in ("int4", "int3"):
        coded = made[terrain.CODED, f"bytes of uniform {low}"]
        assert coded.file_bytes <= nbytes(model, made["uniform", low])


def test_terrain_decibels_and_character(script):
    terrain = script("terrain")
    maps = torch.rand(2, 1, 128, 128, generator=generator(0)) * 2 - 1
    noise = 0.1 * torch.randn(maps.shape, generator=generator(1))
    assert terrain.decibels(maps, maps + noise) == pytest.approx(
        10 * np.log10(maps.var().item() / noise.square().mean().item()), abs=1e-3
    )
    look = terrain.character(maps)
    assert set(terrain.distances(look, look).values()) == {0.0}
    assert min(terrain.distances(look, terrain.character(maps + noise)).values()) > 0
    flat = terrain.character(torch.full((1, 1, 128, 128), 0.5) + torch.linspace(0, 1e-3, 128))
    assert flat["slope"].std() < 0.05 * flat["slope"].mean()


def test_passes_are_measured_over_uniform(script, sandbox):
    damage_by = script("damage_by")
    torch.manual_seed(0)
    subject = damage_by.Small([nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)], (16,))
    subject.draws = 1
    table = script("shared").Table("x", ("network", "passes", "draw", "estimates"))
    damage_by.by_passes(table, "x", subject, (1, 64))
    table = table.frame
    kinds = ["shrunk", "plain", "shrunk, 4 draws"]
    expected = [[count, kind] for count in (1, 64) for kind in kinds]
    assert table[["passes", "estimates"]].values.tolist() == expected
    assert table["over_uniform"].iloc[3] < 1.05
    assert (table["over_predicted"] > 0).all()


@pytest.mark.slow
@linux
def test_sampling_from_packed_weights_takes_less_memory(script, tmp_path):
    cost, model = script("cost"), UNet(32)
    sizes, peaks = [], []
    for low in (None, "int8"):
        small = quantize(model, dict.fromkeys(quantizable(model), low) if low else {})
        save_quantized(tmp_path / "model.safetensors", small, model)
        sizes.append(resident_bytes(small) / 2**20)
        peaks.append(cost.peak_mib(tmp_path / "model.safetensors", 32, steps=2))
    # What is not saved of the stored bytes: one layer at a time is FP32 while it is used.
    assert peaks[0] - peaks[1] > 0.6 * (sizes[0] - sizes[1])


def test_measuring_the_memory_of_a_file_that_is_none(script, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_text("no model")
    with pytest.raises(RuntimeError, match=r"model.safetensors is damaged"):
        script("cost").peak_mib(path, 4)


def test_a_table_is_continued(script, sandbox):
    for key, value in (((1, "a"), 1.5), ((2, "b"), 2.5), ((1, "a"), 3.5)):
        table = script("shared").Table("x", ("n", "word"))
        table.add(key, lambda value=value: {"value": value})
    assert table.frame.to_numpy().tolist() == [[1, "a", 1.5], [2, "b", 2.5]]


def test_a_fisher_estimate_of_every_method_is_near_the_loops(script, monkeypatch):
    cost = script("cost")
    monkeypatch.setitem(cost.FISHER_BATCH, 4, 8)
    of = cost.Estimates(4)
    assert cost.error(of.random_signs(), of.loop()) < 1
    assert cost.error(of.true(2, curvature=True), of.true(8)) < 1
