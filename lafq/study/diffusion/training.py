"""Training: noise-prediction loss, AdamW, an exponential moving average of the weights, and
checkpoints.

Source: Ho et al. 2020, algorithm 1; the paper's own settings are in notebooks/profiles/paper.yaml.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from lafq.rng import generator
from lafq.study.diffusion.noising import add_noise, unit_interval
from lafq.study.diffusion.unet import TIMESTEPS
from lafq.tensors import load_tensors, save_tensors


def ema_of(model: nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average of a model's weights; the decay warms up as (1 + n) / (10 + n) to
    `decay`.
    """

    def update(ema: list[Tensor], current: list[Tensor], n: Tensor) -> None:
        torch._foreach_lerp_(ema, current, 1 - min(decay, (1 + int(n)) / (10 + int(n))))

    return AveragedModel(model, multi_avg_fn=update)


def learning_rate(step: int, peak: float, steps: int, warmup: int, decay: int) -> float:
    """Linear warm-up, constant, then linear decay to zero over the last `decay` of `steps`."""
    return peak * min(1.0, (step + 1) / max(1, warmup), (steps - step) / max(1, decay))


def train(
    model: nn.Module,
    ema: AveragedModel,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    steps: int,
    *,
    start: int = 0,
    batch_size: int,
    peak: float,
    warmup: int,
    decay: int,
    seed: int,
    bf16: bool,
) -> Iterator[tuple[int, float]]:
    """Run steps `start`..`steps` - 1 of noise-prediction training, yielding (step, loss) after
    each.

    The loss is the mean over batch and pixels of (eps - eps_theta(x_t, t))^2, t uniform in 0..999.
    The draws of a step come from (seed, step), so a run continued from a checkpoint is the run that
    was never interrupted.
    images: uint8 (N, 1, 32, 32). bf16: bfloat16 autocast of the forward pass; weights and loss stay
    FP32.
    """
    device = next(model.parameters()).device
    model.train()
    for step in range(start, steps):
        g = generator(seed, step)
        torch.manual_seed(int(torch.randint(2**62, (), generator=g)))
        chosen = torch.randint(len(images), (batch_size,), generator=g)
        t = torch.randint(TIMESTEPS, (batch_size,), generator=g).to(device)
        noise = torch.randn(batch_size, 1, 32, 32, generator=g).to(device)
        x = add_noise(unit_interval(images[chosen]).to(device), t, noise).to(
            memory_format=torch.channels_last
        )
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, peak, steps, warmup, decay)
        optimizer.zero_grad()
        loss = _backward(model, x, t, noise, bf16)
        optimizer.step()
        ema.update_parameters(model)
        yield step, loss.item()


def _backward(model: nn.Module, x: Tensor, t: Tensor, noise: Tensor, bf16: bool) -> Tensor:
    """The loss of a batch, its gradient added to that of the weights."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        eps = model(x, t)
    loss = (noise - eps.float()).square().mean()
    loss.backward()
    return loss.detach()


def fit(
    model: nn.Module,
    images: Tensor,
    checkpoint: Path,
    *,
    steps: int,
    ema_decay: float,
    every: int = 250,
    compile: bool = False,
    **settings: Any,
) -> tuple[dict[str, Tensor], list[float]]:
    """Train from scratch, or on from `checkpoint` if there is one, and return the EMA weights and
    every step's loss.

    The checkpoint is rewritten every `every` steps and kept; `settings` are those of `train`.
    compile: with torch.compile, which takes a C++ compiler, is faster and rounds differently. A run
    may be prolonged (other `steps`) as long as its learning rate has not begun to fall. Raises
    ValueError when the checkpoint belongs to other settings.
    """
    record = {
        "width": model.width,
        "dropout": model.Layer1.block1.dropout.p,
        "ema_decay": ema_decay,
        "compile": compile,
        **settings,
    }
    ema = ema_of(model, ema_decay)
    if compile:
        model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True)
    losses: list[float] = []
    if checkpoint.is_file():
        tensors = _checked(checkpoint, steps, settings["decay"], record)
        losses = tensors["loss"].tolist()
        _restore(tensors, model, ema, optimizer)
    bar = tqdm(initial=len(losses), total=steps, desc="training", unit="step", leave=False)
    for step, loss in train(model, ema, optimizer, images, steps, start=len(losses), **settings):
        losses.append(loss)
        bar.update()
        if (step + 1) % every == 0 or step + 1 == steps:
            save_tensors(checkpoint, _state(model, ema, optimizer, losses), steps=steps, **record)
            bar.set_postfix(loss=sum(losses[-every:]) / len(losses[-every:]))
    bar.close()
    return {n: p.detach() for n, p in ema.module.named_parameters()}, losses


def _checked(checkpoint: Path, steps: int, decay: int, record: dict[str, Any]) -> dict[str, Tensor]:
    tensors, metadata = load_tensors(checkpoint, "01_train", **record)
    done = len(tensors["loss"])
    if steps != metadata["steps"] and done > min(steps, metadata["steps"]) - decay:
        raise ValueError(
            f"{checkpoint} is {done} steps into a run of {metadata['steps']}, past where {steps} "
            f"steps would "
            "have changed the learning rate: delete it to train anew"
        )
    return tensors


def _state(
    model: nn.Module, ema: AveragedModel, optimizer: torch.optim.AdamW, losses: list[float]
) -> dict[str, Tensor]:
    state = {"loss": torch.tensor(losses, dtype=torch.float64)}
    for name, p in model.named_parameters():
        moments = optimizer.state[p]
        state |= {
            f"model/{name}": p.detach(),
            f"m/{name}": moments["exp_avg"],
            f"v/{name}": moments["exp_avg_sq"],
        }
    return state | {f"ema/{n}": p.detach() for n, p in ema.module.named_parameters()}


def _restore(
    state: dict[str, Tensor], model: nn.Module, ema: AveragedModel, optimizer: torch.optim.AdamW
) -> None:
    done = torch.tensor(float(len(state["loss"])))
    with torch.no_grad():
        ema.n_averaged.fill_(int(done))
        for (name, p), q in zip(model.named_parameters(), ema.module.parameters(), strict=True):
            p.copy_(state[f"model/{name}"])
            q.copy_(state[f"ema/{name}"])
            # The fused kernel walks memory, so the moments need the strides of the parameter.
            moments = {k: torch.empty_like(p).copy_(state[f"{k}/{name}"]) for k in ("m", "v")}
            optimizer.state[p] = {
                "step": done.to(p.device, copy=True),
                "exp_avg": moments["m"],
                "exp_avg_sq": moments["v"],
            }
