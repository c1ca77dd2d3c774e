"""The Simple Diffusion Model of the paper: a U-Net of six layers (stages) at any width W; with 64
it has the paper's 35,178,689 parameters (134.20 MiB in FP32).

Source: "Layer-Adaptive Quantization on Diffusion Model using Fisher Information" (IEIE 2024), model
section.
"""

import math

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The layers, and their channels in units of the width.
MULTIPLIERS = {"Layer1": 1, "Layer2": 2, "Layer3": 4, "Layer4": 8, "Layer5": 8, "Layer6": 6}
LAYERS = tuple(MULTIPLIERS)
DOWN = LAYERS[:3]
ATTENTION = ("Layer2", "Layer6")
TIMESTEPS = 1000


def time_table(channels: int, timesteps: int = TIMESTEPS) -> Tensor:
    """Sinusoidal embedding of every timestep, sin and cos interleaved: (timesteps, channels). It is
    made on the CPU even under `torch.device("meta")`: no file stores it.
    """
    exponent = torch.arange(0, channels, 2, device="cpu") * (-math.log(10000.0) / channels)
    angle = torch.arange(timesteps, device="cpu")[:, None] * exponent.exp()
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)


class ResidualBlock(nn.Module):
    """Add the time embedding, then x + conv(ReLU(norm(dropout(conv(ReLU(norm(x)))))))."""

    def __init__(self, channels: int, groups: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x: (B, C, H, W), embedding: (B, at least C), its first C are added -> (B, C, H, W)."""
        x = x + embedding[:, : x.shape[1], None, None]
        h = self.dropout(self.conv1(F.relu(self.norm1(x))))
        return x + self.conv2(F.relu(self.norm2(h)))


class Attention(nn.Module):
    """Multi-head self-attention over the pixels; neither norm nor residual, as in the paper."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) -> (B, C, H, W)."""
        b, c, h, w = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        heads = self.qkv(tokens).view(b, h * w, 3, self.heads, c // self.heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4).to(torch.promote_types(heads.dtype, torch.float32))
        # Not in bfloat16: with heads this narrow its CPU kernel is two to three times slower.
        with torch.autocast("cpu", enabled=False):
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, h * w, c)
        return self.out(y).transpose(1, 2).reshape(b, c, h, w)


class Stage(nn.Module):
    """A "layer" of the paper: two residual blocks, attention in two layers, resampling."""

    def __init__(self, name: str, width: int, dropout: float) -> None:
        super().__init__()
        channels, groups = MULTIPLIERS[name] * width, width // 2
        self.block1 = ResidualBlock(channels, groups, dropout)
        heads = math.gcd(8, channels)
        self.attention = Attention(channels, heads) if name in ATTENTION else nn.Identity()
        self.block2 = ResidualBlock(channels, groups, dropout)
        if name in DOWN:
            self.resample = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1)
        else:
            self.resample = nn.ConvTranspose2d(channels, channels // 2, 4, stride=2, padding=1)

    def forward(self, x: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) -> the output, and the output before resampling (the skip connection)."""
        x = self.block2(self.attention(self.block1(x, embedding)), embedding)
        return self.resample(x), x


class UNet(nn.Module):
    """Noise prediction eps_theta(x_t, t) of the six-layer Simple Diffusion Model.

    width: channels of Layer1 (64 in the paper); ValueError unless it is even and at least 4.
    dropout: probability inside the residual blocks (0.1 in the paper).
    """

    def __init__(self, width: int = 64, dropout: float = 0.1) -> None:
        super().__init__()
        if width < 4 or width % 2:
            raise ValueError(f"width {width} cannot be built: choose an even number of at least 4")
        self.width, self.dropout = width, dropout
        self.register_buffer("times", time_table(8 * width), persistent=False)
        self.inp = nn.Conv2d(1, width, 3, padding=1)
        for name in LAYERS:
            self.add_module(name, Stage(name, width, dropout))
        self.out1 = nn.Conv2d(4 * width, 2 * width, 3, padding=1)
        self.out2 = nn.Conv2d(2 * width, 1, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x: (B, 1, 32, 32), t: (B,) whole numbers in 0..999 -> predicted noise, as x."""
        x, embedding, skips = self.inp(x), self.times[t], []
        for name in LAYERS:
            x, skip = getattr(self, name)(x, embedding)
            if name in DOWN:
                skips.append(skip)
            else:
                x = torch.cat((x, skips.pop()), dim=1)
        return self.out2(F.relu(self.out1(x)))


def layer_of(parameter: str) -> str | None:
    """The layer of a parameter's name, None for the input and output convolutions."""
    layer = parameter.split(".")[0]
    return layer if layer in LAYERS else None


def quantizable(model: nn.Module) -> dict[str, Tensor]:
    """The weight tensors (not biases, not norms) of the six layers, by name."""
    return {n: p.detach() for n, p in model.named_parameters() if p.ndim > 1 and layer_of(n)}


def layer_sizes(model: UNet) -> pd.DataFrame:
    """Parameters and MiB (FP32) of the six layers, of what is outside them, and of all."""
    sizes = pd.Series({name: p.numel() for name, p in model.named_parameters()})
    counts = sizes.groupby(lambda name: layer_of(name) or "input and output").sum()
    counts["total"] = sizes.sum()
    table = counts.rename_axis("layer").reset_index(name="parameters")
    channels = [str(multiplier * model.width) for multiplier in MULTIPLIERS.values()]
    return table.assign(channels=[*channels, "", ""], mib=table["parameters"] * 4 / 2**20)
