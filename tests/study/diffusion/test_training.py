import pytest
import torch

from lafq.study.diffusion import training
from lafq.study.diffusion.training import ema_of, fit, learning_rate
from lafq.study.diffusion.unet import UNet

SETTINGS = {"batch_size": 2, "peak": 1e-3, "warmup": 2, "decay": 2, "seed": 0, "bf16": True}


def run(path, digits, steps=8, width=4, **changes):
    torch.manual_seed(0)
    model = UNet(width).to(memory_format=torch.channels_last)
    return fit(model, digits, path, steps=steps, ema_decay=0.999, every=2, **SETTINGS | changes)


def interrupted(path, digits, at, monkeypatch, **changes):
    whole = training.training_steps

    def cut(*args, **kwargs):
        for step, loss in whole(*args, **kwargs):
            if step == at:
                raise KeyboardInterrupt
            yield step, loss

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "training_steps", cut)
        run(path, digits, **changes)


@pytest.mark.parametrize("steps_before", [8, 6])
def test_resumed_or_prolonged_is_uninterrupted(tmp_path, digits, monkeypatch, steps_before):
    whole, losses = run(tmp_path / "a", digits, steps=8)
    interrupted(tmp_path / "b", digits, 5, monkeypatch, steps=steps_before)
    resumed, resumed_losses = run(tmp_path / "b", digits, steps=8)
    assert losses == resumed_losses
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_finished_run_cannot_be_prolonged(tmp_path, digits):
    run(tmp_path / "a", digits, steps=6)
    with pytest.raises(ValueError, match="delete it to train anew"):
        run(tmp_path / "a", digits, steps=10)
    assert len(run(tmp_path / "a", digits, steps=6)[1]) == 6


def test_a_damaged_checkpoint_and_one_of_another_width(tmp_path, digits):
    run(tmp_path / "a", digits, steps=2)
    with pytest.raises(ValueError, match="made with width=4, not 6"):
        run(tmp_path / "a", digits, steps=2, width=6)
    content = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="is damaged"):
        run(tmp_path / "a", digits, steps=2)


@pytest.mark.slow
def test_loss_falls(tmp_path, digits):
    _, losses = run(tmp_path / "a", digits, steps=40, peak=3e-3, batch_size=4)
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_ema_warms_up():
    model = torch.nn.Linear(1, 1, bias=False)
    ema = ema_of(model, 0.999)
    for value in (0.0, 1.0, 1.0):
        torch.nn.init.constant_(model.weight, value)
        ema.update_parameters(model)
    assert ema.module.weight.item() == pytest.approx(1 - (2 / 11) * (3 / 12))


def test_learning_rate():
    rates = [learning_rate(step, 1.0, 10, 2, 4) for step in range(10)]
    assert rates == [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]


def test_held_out_losses_are_those_of_the_digits_and_the_seed(tiny):
    first = training.held_out_losses(tiny, seed=0, digits=20)
    assert torch.equal(first, training.held_out_losses(tiny, seed=0, digits=20))
    assert first.shape == (20,)
    assert 0.5 < first.mean() < 2
