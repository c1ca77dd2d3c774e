import pytest

from lafq import evaluation, experiment, paths, report, shipping
from lafq.files import save_tensors
from lafq.methods import measured_sensitivity
from lafq.quantize import fingerprint, nbytes

MANY = {"images": 20, "steps": 2, "seed": 0}


@pytest.fixture
def known(tiny):
    return measured_sensitivity(tiny, 20, seed=0)


def test_packed_weights_are_loaded_where_there_are_no_others(sandbox, tiny, known, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "_peak", lambda *_: 1.0)
    budget = 0.3 * nbytes(tiny, {}) / 2**20
    table = shipping.ship(tiny, known, "smoke", budget, **MANY)
    report.save_table("smoke", "06_shipped", table)
    path = paths.RESULTS / "smoke" / experiment.PACKED
    assert table["mem_mib"].iloc[1] * 2**20 <= path.stat().st_size
    assert table["mem_mib"].iloc[1] <= budget
    shipped = experiment.load_model("smoke", 4)
    assert f"weights: {experiment.PACKED}" in capsys.readouterr().out
    assert evaluation.sampled(shipped, "smoke", **MANY)[0] == table["sample"].iloc[1]
    assert "are shipped in" in shipping.sentence("smoke")
    save_tensors(paths.RESULTS / "smoke" / experiment.WEIGHTS, dict(tiny.named_parameters()), width=4)
    assert fingerprint(experiment.load_model("smoke", 4)) == fingerprint(tiny)


def test_too_small_a_size_to_ship(sandbox, tiny, known):
    with pytest.raises(ValueError, match="the smallest"):
        shipping.ship(tiny, known, "smoke", 0.01, **MANY)
    assert not (paths.RESULTS / "smoke" / experiment.PACKED).exists()


def test_weights_shipped_as_they_are(sandbox):
    assert shipping.sentence("smoke") == "The weights of profile smoke are shipped as they were trained."
