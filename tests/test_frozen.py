"""What a redesign must not change: the keys of kept images, the weights of the packed file."""

import hashlib

from lafq.quantization.checkpoint import load_quantized
from lafq.quantization.model import dequantize_, weights_sha256
from lafq.study import workspace
from lafq.study.diffusion.unet import UNet
from lafq.study.images.sampling import Sampling, read, row_key

PAPER = workspace.RESULTS / "paper"
KEPT_SHA256 = "7cfa5ede0e0b80a49c2cab401af89479bc4a72a88089b9bf864ecdc552c7c263"
PACKED_SHA256 = "71ffb12f938a019fb3a9023c9ffb5538e36f8148f604b33b5891bb0411d9f178"


def test_kept_images_have_the_keys_that_they_had():
    names = sorted(path.name for path in (PAPER / "samples").glob("*.npz"))
    assert hashlib.sha256("\n".join(names).encode()).hexdigest() == KEPT_SHA256
    for name in names:
        _, record = read(PAPER / "samples" / name)
        sampling = Sampling(1, record["steps"], record["seed"], record["batch"])
        assert name.startswith(row_key(record["recipe"], sampling))


def test_the_packed_file_holds_the_weights_that_it_held():
    model = dequantize_(load_quantized(PAPER / "packed.safetensors", UNet(64)))
    assert weights_sha256(model) == PACKED_SHA256
