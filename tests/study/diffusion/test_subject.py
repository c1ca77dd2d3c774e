import pytest
import torch

from lafq.study.diffusion import subject
from lafq.study.diffusion.unet import UNet
from lafq.study.workspace import Workspace, profile_parameters
from lafq.tensors import save_tensors

SMOKE = Workspace("smoke")
P = profile_parameters("smoke")


def weights_file(path, **changes):
    about = {"width": 4, "seed": 0, **P["TRAINING"], **changes}
    save_tensors(path, dict(UNet(about["width"]).named_parameters()), **about)
    return path


def test_weights_are_taken_from_a_path(sandbox):
    subject.take_weights(SMOKE, P, weights_file(sandbox / "x.safetensors"))
    assert subject.load_model(SMOKE, 4).width == 4
    subject.check_weights(SMOKE, P)
    with pytest.raises(ValueError, match="width=4, not 16"):
        subject.load_model(SMOKE, 16)


@pytest.mark.parametrize("change", [{"width": 8}, {"steps": 7}])
def test_weights_of_another_width_or_training_are_refused(sandbox, change):
    path = weights_file(sandbox / "x.safetensors", **change)
    [(name, value)] = change.items()
    with pytest.raises(ValueError, match=rf"{name}={value}, profile smoke has .* WEIGHTS=path"):
        subject.take_weights(SMOKE, P, path)
    assert not (SMOKE.results / subject.WEIGHTS).exists()


def test_missing_weights_and_fisher_values(sandbox):
    with pytest.raises(FileNotFoundError, match="run 01_train with TRAIN=1 first"):
        subject.load_model(SMOKE, 4)
    with pytest.raises(FileNotFoundError, match="run 02_fisher"):
        subject.load_fisher(SMOKE, 4)


def test_fisher_of_other_weights_is_refused(sandbox):
    path = weights_file(SMOKE.results / subject.WEIGHTS)
    subject.save_fisher(SMOKE, {"a": torch.ones(2)}, 4)
    assert subject.load_fisher(SMOKE, 4)["a"].tolist() == [1, 1]
    weights_file(path)
    with pytest.raises(ValueError, match=r"fisher.safetensors was made with weights=.* 02_fisher"):
        subject.load_fisher(SMOKE, 4)
