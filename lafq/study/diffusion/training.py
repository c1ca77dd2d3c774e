"""Training: noise-prediction loss, AdamW, an exponential moving average of the weights, and
checkpoints.

Source: Ho et al. 2020, algorithm 1; the paper's own settings are in notebooks/profiles/paper.yaml.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from lafq.networks import evaluating
from lafq.rng import generator
from lafq.study.diffusion import subject
from lafq.study.diffusion.ddpm import add_noise, unit_interval
from lafq.study.diffusion.subject import HELD_OUT, SHAPE, TIMESTEPS, UNet, mnist, save_weights
from lafq.study.workspace import Workspace
from lafq.tensors import atomic_write, load_tensors, save_tensors

LOSS_DIGITS = 200
WINDOW = 50  # steps whose mean loss is a row of training.csv


def train(
    work: Workspace, width: int, *, seed: int, steps: int, dropout: float, **settings: Any
) -> None:
    """Train (or continue) a profile's model as `fit`; writes its weights and training.csv."""
    torch.manual_seed(seed)
    model = UNet(width, dropout).to(work.device, memory_format=torch.channels_last)
    digits, checkpoint = mnist(train=True)[0], work.build / subject.CHECKPOINT
    weights, losses = fit(model, digits, checkpoint, steps=steps, seed=seed, **settings)
    save_weights(work, weights, width=width, steps=steps, seed=seed, dropout=dropout, **settings)
    loss = pd.Series(losses, index=range(1, steps + 1), name="loss")
    windows = loss.groupby(lambda step: -(-step // WINDOW) * WINDOW).mean()
    with atomic_write(work.results / "training.csv") as temporary:
        windows.rename_axis("step").to_csv(temporary, float_format="%.6f")


def ema_of(model: nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average of a model's weights; the decay warms up as (1 + n) / (10 + n)."""

    def update(ema: list[Tensor], current: list[Tensor], n: Tensor) -> None:
        torch._foreach_lerp_(ema, current, 1 - min(decay, (1 + int(n)) / (10 + int(n))))

    return AveragedModel(model, multi_avg_fn=update)


def learning_rate(step: int, peak: float, steps: int, warmup: int, decay: int) -> float:
    """Linear warm-up, constant, then linear decay to zero over the last `decay` of `steps`."""
    return peak * min(1.0, (step + 1) / max(1, warmup), (steps - step) / max(1, decay))


def training_steps(
    model: nn.Module,
    ema: AveragedModel,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    steps: range,
    *,
    batch_size: int,
    peak: float,
    warmup: int,
    decay: int,
    seed: int,
    bf16: bool,
) -> Iterator[tuple[int, float]]:
    """Train on uint8 images (N, *SHAPE), yielding (step, loss) after each step.

    The draws of a step come from (seed, step), so a run continued from a checkpoint is the run that
    was never interrupted. bf16: bfloat16 autocast of the forward pass alone.
    """
    device = next(model.parameters()).device
    model.train()
    for step in steps:
        g = generator(seed, step)
        torch.manual_seed(int(torch.randint(2**62, (), generator=g)))
        chosen = torch.randint(len(images), (batch_size,), generator=g)
        t = torch.randint(TIMESTEPS, (batch_size,), generator=g).to(device)
        eps = torch.randn(batch_size, *SHAPE, generator=g).to(device)
        x_t = add_noise(unit_interval(images[chosen]).to(device), t, eps)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, peak, steps.stop, warmup, decay)
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            eps_theta = model(x_t.to(memory_format=torch.channels_last), t)
        loss = (eps - eps_theta.float()).square().mean()
        loss.backward()
        optimizer.step()
        ema.update_parameters(model)
        yield step, loss.item()


def fit(
    model: nn.Module,
    images: Tensor,
    checkpoint: Path,
    *,
    steps: int,
    ema_decay: float,
    every: int = 250,
    **settings: Any,
) -> tuple[dict[str, Tensor], list[float]]:
    """Train, on from `checkpoint` if there is one, and return the EMA weights and all losses;
    settings as `training_steps`.

    The checkpoint is rewritten every `every` steps; ValueError when it is damaged or belongs to
    other settings. A run may be prolonged as long as its learning rate has not begun to fall.
    """
    record = {"width": model.width, "dropout": model.dropout, "ema_decay": ema_decay, **settings}
    ema = ema_of(model, ema_decay)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True)
    kept: dict[str, Tensor] = {"loss": torch.empty(0)}
    if checkpoint.is_file():
        kept, metadata = load_tensors(checkpoint, "01_train", **record)
        done, planned = len(kept["loss"]), metadata["steps"]
        if steps != planned and done > min(steps, planned) - settings["decay"]:
            differs = f"was made for {planned} steps, not {steps}"
            raise ValueError(f"{checkpoint} {differs}: delete it to train anew")
    losses: list[float] = kept.pop("loss").tolist()
    state = _state(model, ema, optimizer, len(losses))
    for name, tensor in kept.items():
        state[name].copy_(tensor)
    remaining = range(len(losses), steps)
    run = training_steps(model, ema, optimizer, images, remaining, **settings)
    bar = tqdm(run, "training", steps, leave=False, unit="step", initial=len(losses))
    for step, loss in bar:
        losses.append(loss)
        if (step + 1) % every == 0 or step + 1 == steps:
            state["loss"] = torch.tensor(losses, dtype=torch.float64)
            save_tensors(checkpoint, state, steps=steps, **record)
            bar.set_postfix(loss=sum(losses[-every:]) / len(losses[-every:]))
    return {n: p.detach() for n, p in ema.module.named_parameters()}, losses


def _state(
    model: nn.Module, ema: AveragedModel, optimizer: torch.optim.AdamW, done: int
) -> dict[str, Tensor]:
    """What a checkpoint holds beside the losses: the run's own tensors, changed in place."""
    state = {}
    ema.n_averaged.fill_(done)
    for (name, p), q in zip(model.named_parameters(), ema.module.parameters(), strict=True):
        moments = {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] = {"step": torch.tensor(float(done), device=p.device), **moments}
        state |= {f"model/{name}": p.detach(), f"ema/{name}": q.detach()}
        state |= {f"{key}/{name}": moment for key, moment in moments.items()}
    return state


@torch.inference_mode()
def held_out_outputs(
    model: nn.Module, seed: int, digits: int = LOSS_DIGITS, first: int = 0
) -> tuple[Tensor, Tensor]:
    """Predicted and true noise (digits, *SHAPE) of so many held-out digits from number `first` on;
    the timesteps are spread evenly over the digits, the noise is the seed's, whatever the model.
    """
    device = next(model.parameters()).device
    x_0 = unit_interval(mnist(train=False)[0][HELD_OUT][first : first + digits])
    t = torch.arange(digits) * TIMESTEPS // digits
    eps = torch.randn(x_0.shape, generator=generator(seed, HELD_OUT.start + first))
    x_t = add_noise(x_0, t, eps).contiguous(memory_format=torch.channels_last).to(device)
    batches = zip(x_t.split(100), t.to(device).split(100), strict=True)
    with evaluating(model):
        outputs = [model(*batch).cpu() for batch in batches]
    return torch.cat(outputs), eps


def held_out_losses(model: nn.Module, seed: int, digits: int = LOSS_DIGITS) -> Tensor:
    """Mean over the pixels of (eps - eps_theta)^2 for the first held-out digits (digits,)."""
    eps_theta, eps = held_out_outputs(model, seed, digits)
    return (eps_theta - eps).square().flatten(1).mean(1)
