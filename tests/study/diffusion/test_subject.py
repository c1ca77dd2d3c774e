import pytest
import torch

from lafq.study.diffusion import subject
from lafq.study.diffusion.unet import UNet
from lafq.study.workspace import Workspace, profile_parameters

SMOKE = Workspace("smoke")
P = profile_parameters("smoke")


def save(**changes):
    about = {"width": 4, "seed": 0, **P["TRAINING"], **changes}
    weights = dict(UNet(about["width"]).named_parameters())
    subject.save_weights(SMOKE, weights, **about)
    return weights


def test_weights_come_back_from_their_shards_as_one(sandbox, monkeypatch):
    monkeypatch.setattr(subject, "SHARD_BYTES", 40_000)
    weights, model = save(), subject.load_model(SMOKE, 4)
    assert len(subject.check_weights(SMOKE, P)) > 2
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    monkeypatch.setattr(subject, "SHARD_BYTES", 80_000)
    save()
    shards = (SMOKE.results / subject.WEIGHTS).parent.glob("*.safetensors")
    assert sorted(shards) == subject.check_weights(SMOKE, P)


@pytest.mark.parametrize("change", [{"width": 8}, {"steps": 7}])
def test_weights_of_another_width_or_training_are_refused(sandbox, change):
    save(**change)
    [(name, value)] = change.items()
    with pytest.raises(ValueError, match=rf"{name}={value}, profile smoke has .* TRAIN=1"):
        subject.check_weights(SMOKE, P)


def test_a_missing_and_a_damaged_shard(sandbox, monkeypatch):
    monkeypatch.setattr(subject, "SHARD_BYTES", 40_000)
    save()
    first, second, *_ = subject.check_weights(SMOKE, P)
    second.unlink()
    restore = "`git checkout -- results/smoke` restores it, or train anew with TRAIN=1"
    with pytest.raises(FileNotFoundError, match=f"{second.name} is missing: {restore}"):
        subject.load_model(SMOKE, 4)
    first.write_bytes(first.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=f"{first.name} is damaged, .*: {restore}"):
        subject.load_model(SMOKE, 4)
    (SMOKE.results / subject.WEIGHTS).write_text("{")
    with pytest.raises(ValueError, match=r"index.json is damaged"):
        subject.load_model(SMOKE, 4)


def test_missing_weights_and_fisher_values(sandbox):
    with pytest.raises(FileNotFoundError, match=r"are missing: .* or train anew with TRAIN=1"):
        subject.load_model(SMOKE, 4)
    with pytest.raises(FileNotFoundError, match="run 02_fisher"):
        subject.load_fisher(SMOKE, 4)


def test_fisher_of_other_weights_is_refused(sandbox):
    save()
    subject.save_fisher(SMOKE, {"a": torch.ones(2)}, 4)
    assert subject.load_fisher(SMOKE, 4)["a"].tolist() == [1, 1]
    save()
    with pytest.raises(ValueError, match=r"fisher.safetensors was made with weights=.* 02_fisher"):
        subject.load_fisher(SMOKE, 4)
