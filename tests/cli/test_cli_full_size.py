"""A checkpoint of Stable Diffusion 1.5's shape, 512 by 512, from the command line: does it fit, does it end?"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from sumuk.families.sd import CLIP, SINGLE, UNET, VAE
from sumuk.files.tensors import Lazy, Tensors, write
from sumuk.generate.receipt import read_receipt
from sumuk.nets.clip import ClipShape, ClipText
from sumuk.nets.unet import UNet, UNetShape
from sumuk.nets.vae import Vae, VaeShape

STABLE_DIFFUSION_1 = UNetShape(
    model_channels=320,
    channel_mult=(1, 2, 4, 4),
    num_res_blocks=2,
    transformer_depth=(1, 1, 1, 0),
    middle_depth=1,
    context_dim=768,
    heads=8,
)


def random_file(path: Path) -> None:
    """Two gigabytes of float16 that keep the size of signals, made and written one tensor at a time."""
    with torch.device("meta"):
        networks = {
            UNET: UNet(STABLE_DIFFUSION_1),
            VAE: Vae(VaeShape()),
            CLIP: ClipText(ClipShape(), eos=49407),
        }
    prefixes = {part.name: prefix for part, prefix in SINGLE.parts}
    generator = torch.Generator().manual_seed(0)

    def make(shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) < 2:
            return torch.full(shape, 0.5, dtype=torch.float16)
        noise = torch.empty(shape, dtype=torch.float32).normal_(generator=generator)
        return (noise * torch.Size(shape[1:]).numel() ** -0.5).half()

    tensors: Tensors = {}
    for part, network in networks.items():
        for name, value in network.state_dict().items():
            shape = tuple(value.shape)
            tensors[prefixes[part.name] + name] = Lazy(shape, "F16", partial(make, shape))
    write(path, tensors)


@pytest.mark.slow
def test_stable_diffusion_15_at_its_own_size(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    random_file(path)
    assert 2.0e9 < path.stat().st_size < 2.2e9
    peak = "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)"
    code = f"import resource, sumuk.cli.main as main\ntry: main.main()\nfinally: {peak}"
    arguments = [
        "generate",
        "a castle",
        "-m",
        str(path),
        "--steps",
        "1",
        "--seed",
        "1",
        "-o",
        str(tmp_path / "a.png"),
    ]
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=os.environ, capture_output=True, text=True, timeout=900
    )
    print(f"{time.perf_counter() - began:.0f} s, peak {done.stdout.splitlines()[-1]} GiB")
    assert done.returncode == 0, done.stderr
    picture, receipt = read_receipt(tmp_path / "a.png")
    assert picture.size == (512, 512) and receipt["settings"]["guidance"] == 7.5
    assert receipt["machine"]["dtype"] == "float32", "float16 is slow on a CPU"
    assert len(set(picture.resize((8, 8)).getdata())) > 8
    assert float(done.stdout.splitlines()[-1]) < 9, (
        "weights in float32 are 4 GiB; the rest is the decoder's activations"
    )
