"""A model into a smaller file, and what such a file holds: python -m lafq shrink, python -m lafq
info.
"""

import argparse
import importlib
import inspect
import sys
from pathlib import Path

import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

import lafq
from lafq.quantization.checkpoint import file_contents
from lafq.quantization.formats import MIB

Batches = list[tuple[Tensor, ...]]
NOTES = 64  # bytes of the predicted damage in a file


def model_of(place: str) -> nn.Module:
    """What the function `module:function` returns; modules of the current folder are found."""
    module, _, function = place.partition(":")
    try:
        return getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{place!r} gives no model ({error}): give module:function") from error


def batches_of(path: Path, model: nn.Module, size: int) -> Batches:
    """The model's arguments: a file's tensors, named like those of `forward` if there are several,
    cut into batches along their first dimension.
    """
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file ({error})") from error
    names = list(inspect.signature(model.forward).parameters)
    if len(tensors) != 1 and not set(tensors) <= set(names):
        wanted = f"name them like the arguments of forward ({', '.join(names)})"
        raise ValueError(f"{path} holds the tensors {', '.join(tensors) or 'none'}: {wanted}")
    ordered = [tensors[name] for name in sorted(tensors, key=[*names, *tensors].index)]
    if len({len(tensor) for tensor in ordered}) > 1:
        raise ValueError(f"the tensors of {path} differ in their first dimension, the samples")
    if size < 1:
        raise ValueError(f"batch-size is {size}: give 1 or more")
    return list(zip(*(tensor.split(size) for tensor in ordered), strict=True))


def shrink(args: argparse.Namespace) -> None:
    """Write the file of least predicted damage that has the size."""
    model = model_of(args.model)
    batches = batches_of(args.inputs, model, args.batch_size)
    passes = tqdm(batches, "sensitivity", leave=False, unit="batch")
    known = lafq.estimate_sensitivity(model, passes)
    plan = lafq.allocate(model, known, file_mib=args.file_mib - NOTES / MIB)
    notes, small = {"predicted_damage": f"{plan.damage:.3g}"}, lafq.quantize(model, plan)
    lafq.save_quantized(args.output, small, model, compress=True, notes=notes)
    print(f"{args.output}: {args.output.stat().st_size} bytes, predicted damage {plan.damage:.3g}")


def info(args: argparse.Namespace) -> None:
    """Print what a file holds, and the damage that it does to the outputs for these inputs."""
    rows, notes = file_contents(args.file)
    table = pd.DataFrame(rows)
    table.insert(2, "bits_per_weight", 8 * table["bytes"] / table.pop("weights").clip(1))
    size, stored = args.file.stat().st_size, int(table["bytes"].sum())
    print(table.to_string(index=False, formatters={"bits_per_weight": "{:.2f}".format}))
    print(f"tensors {stored} bytes, header and tables {size - stored}, file {size}")
    if "predicted_damage" in notes:
        print(f"predicted damage {notes['predicted_damage']}")
    if args.model and args.inputs:
        model = model_of(args.model).eval()
        batches = batches_of(args.inputs, model, args.batch_size)
        print(f"measured damage {measured(model, args.file, batches):.3g}")


@torch.no_grad()
def measured(model: nn.Module, path: Path, batches: Batches) -> float:
    """Half the squared error, summed over the output, of a sample on average."""
    small, total = lafq.dequantize(lafq.load_quantized(path, model)), 0.0
    for batch in tqdm(batches, "damage", leave=False, unit="batch"):
        total += (small(*batch) - model(*batch)).double().square().sum().item() / 2
    return total / sum(len(batch[0]) for batch in batches)


def main(arguments: list[str] | None = None) -> int:
    """Errors are one sentence and exit status 1, those of the command line exit status 2."""
    parser = argparse.ArgumentParser(prog="python -m lafq", description="Quantized models as files")
    verbs = parser.add_subparsers(required=True)
    for verb in (shrink, info):
        words = verbs.add_parser(verb.__name__, help=verb.__doc__, description=verb.__doc__)
        words.set_defaults(verb=verb)
        words.add_argument("--inputs", type=Path, required=verb is shrink, help="safetensors file")
        words.add_argument("--batch-size", type=int, default=8, help="samples at a time")
        if verb is shrink:
            words.add_argument("model", help="module:function that returns the model with weights")
            words.add_argument("--file-mib", type=float, required=True, help="size of the file")
            words.add_argument("-o", "--output", type=Path, required=True, help="the file")
        else:
            words.add_argument("file", type=Path, help="written by shrink or save_quantized")
            words.add_argument("--model", help="module:function, to measure the damage")
    args = parser.parse_args(arguments)
    try:
        args.verb(args)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
