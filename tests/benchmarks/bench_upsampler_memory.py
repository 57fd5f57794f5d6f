"""Memory and time of one upsampler call in one piece and in strips, each in a process of its own.

Run with `make bench`. The peak is the resident set's above what the weights and inputs take, so that what a convolution
allocates for itself counts too, which torch's own books leave out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MEASURE = """
import json, sys, time
from pathlib import Path
import torch
from unclip.models.upsampler import Upsampler, UpsamplerConfig

side, workspace = int(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
torch.manual_seed(0)
model = Upsampler(UpsamplerConfig(low=64, size=256, channels=32, multiples=(1, 1, 2, 2), depth=2, groups=8)).eval()

def call(low):
    # The noise of a shape, drawn once: a network's input in a sampling.
    x = torch.randn(1, 3, 4 * low.shape[2], 4 * low.shape[3], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        if workspace:
            return model.denoise_in_strips(x, torch.tensor([500]), low, workspace=workspace)
        return model.denoise(x, torch.tensor([500]), low)

def resident(name):
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) << 10

for parameter in model.parameters():
    torch.nn.init.normal_(parameter, std=0.05)
low = torch.rand(1, 3, side // 4, side // 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
call(low[:, :, :16, :16])
Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
before = resident("VmRSS")
began = time.perf_counter()
out = call(low).eps
took = time.perf_counter() - began
sample = out[0, :, ::17, ::17].flatten().tolist()
print(json.dumps({"bytes": resident("VmHWM") - before, "seconds": took, "sample": sample}))
"""


def measured(side: int, workspace: int) -> dict:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEASURE, str(side), str(workspace)]
    return json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


@pytest.mark.slow
def test_strips_take_a_fraction_of_the_memory_and_give_the_same_picture() -> None:
    layer = 32 * 4  # bytes a pixel of the widest layer
    print("\nside  in one piece        in strips           memory  time")
    for side in (256, 512):
        whole, strips = measured(side, 0), measured(side, 1 << 20)
        shares = [run["bytes"] / (layer * side**2) for run in (whole, strips)]
        print(
            f"{side:4}  {whole['bytes'] / 2**20:5.0f} MiB = {shares[0]:4.1f} layers  "
            f"{strips['bytes'] / 2**20:5.0f} MiB = {shares[1]:4.1f} layers  "
            f"{strips['bytes'] / whole['bytes']:.2f}    {strips['seconds'] / whole['seconds']:.2f}"
        )
        assert strips["sample"] == pytest.approx(whole["sample"], abs=1e-4)
    assert strips["bytes"] < 0.6 * whole["bytes"]
