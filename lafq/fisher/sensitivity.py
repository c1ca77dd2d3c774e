"""The diagonal of the true Fisher information at the price of a backward pass.

A network with output f(x) (B, ...) and unit Gaussian noise on it has the true Fisher information
E[J^T n n^T J] = J^T J of one sample, n ~ N(0, I): for the squared error also the Gauss-Newton
matrix (Kunstner et al. 2019). No target is needed.

One backward pass of a batch with n instead of the residual gives g = sum over samples of J_b^T n_b.
The n_b are independent and of mean zero, so E[g_i^2] = sum over samples of (J_b^T J_b)_ii: squares
of batch gradients, which are wrong for the loss itself, are unbiased here. The relative standard
deviation of a weight's estimate is sqrt(2 / passes): many small batches beat few large ones.

The same passes estimate a curvature. The weights of an output channel r have the Gauss-Newton
matrix E[g_r g_r^T], g_r (C,) their gradient in one pass; a channel alone gives too few draws of it.
The channels share H, the mean over passes and channels of g_r g_r^T / mean(g_r^2), (C, C) with a
mean diagonal of 1: up to each channel's mean Fisher value that is its matrix, if the tensor's is a
Kronecker product (Martens and Grosse 2015, "K-FAC"). As each g_r is divided by its own mean square,
large passes count no more than small ones, which narrows H's spectrum. Columns are those of
`channel_view`. The channels of a grouped convolution share one H as well, though each group has
inputs of its own. Where C is large, H is a block diagonal: blocks of consecutive columns,
(B, S, S), which take B times fewer numbers and products.
"""

import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lafq.fisher.empirical import check_sums
from lafq.fisher.shrinkage import Moments
from lafq.networks import (
    Checkpointed,
    arguments_of,
    check_repeats,
    checked_output,
    differentiating,
    evaluating,
    listed,
    named,
    own_defaults,
    unwrapped,
)
from lafq.quantization.channels import ChannelView
from lafq.quantization.checks import channel_view, check_estimates, check_names, obstacle
from lafq.quantization.formats import unshrunk_scale
from lafq.quantization.plan import Recipe
from lafq.quantization.rounding import damage
from lafq.rng import generator

LARGEST = 8192  # columns of one curvature matrix, which takes 256 MiB
CHANNELS = 128  # output channels of a tensor that one pass adds to its curvature


class Sensitivity(NamedTuple):
    """By parameter name: the true Fisher values, of its shape, and the curvature (C, C) of the C
    weights of an output channel, or its blocks (B, S, S).

    passes: batches that both were estimated from. noise: by parameter name, the share of the
    curvature's off-diagonal that is noise and was shrunk away, 0 to 1. None where it was not
    estimated. effective_passes: how many passes of equal Fisher trace x tell as much of its mean,
    (sum of x)^2 / sum of x^2 (Kish 1965); far below `passes` if few inputs make up the trace.
    """

    fisher: dict[str, Tensor]
    curvature: dict[str, Tensor]
    passes: int = 0
    noise: dict[str, float] | None = None
    effective_passes: float = 0.0

    @property
    def recipe(self) -> Recipe:
        """The rounding that `allocate` predicts the damage of."""
        return Recipe(unshrunk_scale, self.fisher, self.curvature)


def estimate_sensitivity(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, ...] | Tensor],
    seed: int = 0,
    names: list[str] | None = None,
    shrink: bool = True,
    largest: int = LARGEST,
    channels: int | None = CHANNELS,
    draws: int = 1,
    curvature: bool = True,
    through: Callable[..., Tensor] | None = None,
) -> Sensitivity:
    """Estimate the diagonal of the true Fisher information, and from the same passes the curvature
    that output channels share.

    Args:
        model: any network; called as `model(*batch)`.
        batches: the model's arguments, first (B, ...), for one tensor (B, ...). Many small ones of
            equal size beat few large ones.
        seed: of the noise that is sent back through the network.
        names: the parameters; None: all with two dimensions or more that plans can name. A warning
            tells of others, and of output channels without a gradient in any batch: these count as
            the others of their tensor do in the mean, or as the median tensor.
        shrink: shrink noisy estimates (`fisher.shrinkage`), else take the means over passes as they
            are.
        largest: columns of a curvature matrix; that of a tensor with more weights per output
            channel is estimated in blocks.
        channels: output channels that one pass adds to a curvature; those of a tensor with more
            take turns (None: no turns).
        draws: of noise per pass. If batches are few, 4 tell more of each; a draw takes a backward
            pass and memory for a gradient.
        curvature: False gives means of Fisher values alone, with the memory of training and one
            gradient more; a curvature needs C^2 numbers per tensor besides.
        through: how the model is used, called as `through(model, *batch)` instead of
            `model(*batch)`: a sampler, say, which takes the noise of all steps and returns images.
            The sensitivity is then of what it returns. Each call of the model in it is computed
            again in the backward pass, so that it takes the memory of one.

    Raises ValueError for an unknown name, no batch, an output that does not depend on the weights,
    a `through` that draws random numbers of its own, a result that is not finite or zero
    everywhere, and draws below 1; MemoryError for a batch that does not fit.

    >>> import torch
    >>> batches = [torch.randn(8, 3) for _ in range(100)]
    >>> estimate_sensitivity(nn.Linear(3, 2), batches).curvature["weight"].shape
    torch.Size([3, 3])
    """
    if draws < 1:
        raise ValueError(f"draws is {draws}: a pass needs one draw of noise or more")
    model, noise = unwrapped(model), generator(seed, 1)
    chosen = named(model, _default_names(model) if names is None else list(names))
    matrices = [name for name, p in chosen.items() if p.ndim > 1] if curvature else []
    views = {name: channel_view(model, name) for name in chosen}
    with evaluating(model, gradients=True), differentiating():
        sums = _Sums(chosen, views, matrices, largest, channels)
        for name, p in model.named_parameters():
            p.requires_grad_(name in chosen)
        run = model if through is None else partial(through, Checkpointed(model))
        takes = model.forward if through is None else partial(through, model)
        device = next(iter(chosen.values())).device
        for batch in listed(batches):
            arguments = arguments_of(batch, device, takes)
            try:
                output = checked_output(run(*arguments), len(arguments[0]))
                if through is not None and not sums.traces:
                    check_repeats(
                        output, checked_output(run(*arguments_of(batch, device)), len(output))
                    )
                sums.add(output, draws, noise)
            except RuntimeError as error:
                if not any(words in str(error) for words in ("out of memory", "allocate memory")):
                    raise
                much = f"a pass of {len(arguments[0])} samples does not fit into memory"
                raise MemoryError(f"{much}: give smaller batches") from error
    check_sums(sums.squares, sums.samples)
    if not any(square.any() for square in sums.squares.values()):
        advice = "these batches give the output no gradient, give others"
        raise ValueError(f"the Fisher information is zero everywhere: {advice}")
    if shrink and matrices and len(sums.traces) == 1:
        effect = "all weights of a tensor count the same: give more batches"
        warnings.warn(f"one pass says nothing about its noise, so {effect}", stacklevel=2)
    return sums.sensitivity(shrink)


@own_defaults()
def predicted_damage(model: nn.Module, small: nn.Module, other: Sensitivity) -> float:
    """Half the squared error, summed over the output, that a quantized copy of a model is predicted
    to make, if the output were linear in the weights and H the curvature of each channel. Plans of
    `allocate` are chosen for a low prediction, and do more damage (docs/own-model.md).

    Args:
        model: the FP32 model.
        small: what `quantize` makes of it, or that dequantized.
        other: from other batches and another seed than the plan's, with `estimate_sensitivity(...,
            shrink=False)`, as shrinking moves the estimate.

    Raises ValueError for Fisher values or a curvature that do not fit the model.
    """
    model, small = unwrapped(model), unwrapped(small)
    parameters = check_estimates(model, other.fisher, other.curvature)
    total = 0.0
    for name, fisher in other.fisher.items():
        owner, _, attribute = name.rpartition(".")
        # As an attribute, which unpacks it where it is packed.
        stored = getattr(small.get_submodule(owner), attribute)
        view, h = channel_view(model, name), other.curvature.get(name)
        change = view.of(stored.detach() - parameters[name].detach()).cpu()
        h = None if h is None else h.cpu()
        total += damage(change, view.of(fisher).cpu(), h).sum().item()
    return total


def _default_names(model: nn.Module) -> list[str]:
    parameters = check_names(model, (), "")
    matrices = [n for n, p in model.named_parameters() if p.ndim > 1]
    left_out = {n: why for n in matrices if (why := obstacle(model, n, parameters))}
    if left_out:
        words = ", ".join(f"{n} {why}" for n, why in left_out.items())
        warnings.warn(f"left out, as no plan can name it: {words}", stacklevel=3)
    return [n for n in matrices if n not in left_out]


class _Sums:
    """Over passes: squared gradients by name, their mean over the draws of a pass; `Moments` of
    the matrices; samples; of each pass the sum of its squares over all weights.
    """

    def __init__(
        self,
        chosen: dict[str, nn.Parameter],
        views: dict[str, ChannelView],
        matrices: list[str],
        largest: int,
        channels: int | None,
    ) -> None:
        self.chosen, self.views, self.samples, self.traces = chosen, views, 0, []
        # FP32 at least: the squares of half precision's gradients are too small for it.
        self.squares = {
            n: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
            for n, p in chosen.items()
        }
        of_rows = {n: views[n].of(self.squares[n]) for n in matrices}
        self.moments = {n: Moments(rows, largest, channels) for n, rows in of_rows.items()}

    def add(self, output: Tensor, draws: int, noise: torch.Generator) -> None:
        """Add a pass: the gradients of the output times N(0, I), as often as there are draws."""
        by_draw, trace = [], 0.0
        for left in reversed(range(draws)):
            drawn = {"dtype": torch.float32, "device": "cpu"}
            n = torch.randn(output.shape, generator=noise, **drawn).to(output)
            how = {"retain_graph": left > 0, "allow_unused": True, "materialize_grads": True}
            by_draw.append(torch.autograd.grad(output, list(self.chosen.values()), n, **how))
        for name, *gradients in zip(self.chosen, *by_draw, strict=True):
            gradients = [g.to_dense().to(self.squares[name].dtype) for g in gradients]
            for gradient in gradients:
                self.squares[name].addcmul_(gradient, gradient, value=1 / draws)
                trace += torch.linalg.vector_norm(gradient).item() ** 2 / draws
            if name in self.moments:
                self.moments[name].add(*map(self.views[name].of, gradients))
        self.samples, self.traces = self.samples + len(output), [*self.traces, trace]

    def sensitivity(self, shrink: bool) -> Sensitivity:
        """The means over samples and passes, shrunk or as they are."""
        curvature, noise, squares = {}, {} if shrink else None, dict(self.squares)
        for name, m in self.moments.items():
            if not shrink:
                curvature[name] = m.plain_curvature()
                continue
            curvature[name], noise[name] = m.shrunk_curvature()
            rows = m.shrunk_squares(self.views[name].of(squares[name]))
            squares[name] = self.views[name].back(rows).contiguous()
        fisher = {name: square / self.samples for name, square in squares.items()}
        self._fill(fisher, curvature, shrink and len(self.traces) == 1)
        effective = sum(self.traces) ** 2 / sum(x * x for x in self.traces)
        return Sensitivity(fisher, curvature, len(self.traces), noise, effective)

    def _fill(self, fisher: dict[str, Tensor], curvature: dict[str, Tensor], alike: bool) -> None:
        """Output channels without a gradient in any pass count as the others of their tensor do in
        the mean, or as the median tensor: their token or expert may come in use. An input that no
        pass had is left as it is, as trained networks have channels that are never active. alike:
        the channels of a tensor are shrunk to one value already.
        """
        seen = {n: self.views[n].of(s > 0).any(1) for n, s in self.squares.items()}
        values = {n: self.views[n].of(f) for n, f in fisher.items()}
        levels = {n: f[seen[n]].double().mean() for n, f in values.items() if seen[n].any()}
        median = torch.stack(list(levels.values())).median()
        for name, f in values.items():
            missed = ~seen[name] & self.views[name].of(self.chosen[name] != 0).any(1)
            if not missed.any() or (alike and name in levels):
                continue
            count = f"{int(missed.sum())} of {len(missed)} output channels of {name}"
            words = "got no gradient from any batch: they count like the others"
            warnings.warn(f"{count} {words}", stacklevel=4)
            level = levels.get(name, median).to(f)
            filled = torch.where(missed[:, None], level, f)
            fisher[name] = self.views[name].back(filled).contiguous()
            if name in curvature and name not in levels:
                curvature[name].diagonal(dim1=-2, dim2=-1).fill_(1)
