"""The damage that a quantized model does, predicted from passes that its plan has not seen.

A plan and its rounding fit the passes that they were made from, noise included, so on these they
look better than they are (`Allocation.damage`). From other passes the prediction is unbiased, to
second order: cross-fitting (Chernozhukov et al. 2018).
"""

from torch import nn

from lafq.fisher.sensitivity import Sensitivity
from lafq.networks import unwrapped
from lafq.quantization.checks import channel_view, check_curvature, check_fisher, check_names
from lafq.quantization.rounding import damage


def predicted_damage(model: nn.Module, small: nn.Module, other: Sensitivity) -> float:
    """Half the squared error, summed over the output, that a quantized copy of a model is predicted
    to make.

    Args:
        model: the FP32 model.
        small: what `quantize` makes of it, or that dequantized.
        other: from other batches and another seed than the plan's, with `estimate_sensitivity(...,
            shrink=False)`, as shrinking moves the estimate.

    Raises ValueError for Fisher values or a curvature that do not fit the model.

    >>> import torch
    >>> from lafq import estimate_sensitivity, quantize
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    >>> other = estimate_sensitivity(model, [(torch.randn(8, 16),) for _ in range(32)], seed=1,
    shrink=False)
    >>> small = quantize(model, {"0.weight": "int4", "2.weight": "int4"})
    >>> 0 < predicted_damage(model, small, other) < 1
    True
    """
    model = unwrapped(model)
    parameters = check_names(model, other.fisher, "the Fisher values name")
    check_curvature(model, other.curvature)
    total = 0.0
    for name, values in other.fisher.items():
        check_fisher(name, parameters[name], values)
        view = channel_view(model, name)
        owner, _, attribute = name.rpartition(".")
        stored = getattr(
            unwrapped(small).get_submodule(owner), attribute
        )  # unpacked, where it is packed
        change = view.of(stored.detach() - parameters[name].detach()).cpu()
        curvature = other.curvature.get(name)
        total += (
            damage(change, view.of(values).cpu(), None if curvature is None else curvature.cpu())
            .sum()
            .item()
        )
    return total
