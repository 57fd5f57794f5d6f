"""Embed's way to a device and CLIP's lower precisions, on a bare GPU machine: torch alone.

    python -m tests.gpu.check_embed [--device cuda] [--batch 64] [--batches 20] [--layers 12] [--width 512]

Checks that a Lane brings back what was sent, in the order in which it was asked for, while the model is at work; that a
text tower in bfloat16 and float16 keeps the directions of float32 (cosine at least .999); and that captions cut to
their lengths keep their embeddings. Prints one line of JSON with captions a second of each precision.
"""

from __future__ import annotations

import argparse
import json
import time
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from pipelines.embed.prefetch import DeviceCopier
from unclip.clip.text import TextTower

LEAST = 0.999
LENGTH = 16
"""Tokens of the short captions."""


def tower(layers: int, width: int) -> TextTower:
    """A text tower with weights of a trained one's size: as open_clip draws them."""
    torch.manual_seed(0)
    text = {"context_length": 77, "vocab_size": 49_408, "width": width, "heads": width // 64, "layers": layers}
    made = TextTower({"embed_dim": width, "text_cfg": text})
    for parameter in (made.positional_embedding, made.text_projection):
        torch.nn.init.normal_(parameter, std=width**-0.5)
    torch.nn.init.normal_(made.token_embedding.weight, std=0.02)
    return made.requires_grad_(False).eval()


def captions(batch: int) -> Tensor:
    """Token ids [batch, 77] of captions of up to LENGTH tokens; the end token has the largest id."""
    ids = torch.zeros(batch, 77, dtype=torch.long)
    for row in ids:
        count = int(torch.randint(3, LENGTH + 1, ()))
        row[:count] = torch.randint(1, 49_000, (count,))
        row[count - 1] = 49_407
    return ids


def brought(made: TextTower, batches: list[Tensor], lane: DeviceCopier) -> tuple[list[Tensor], float]:
    """Each batch's embeddings, one batch behind as embed has it, and seconds of all."""
    began, found, due = time.perf_counter(), [], None
    for ids in batches:
        following = lane.fetch(made(lane.send([ids])).embedding.float())
        if due:
            found.append(due())
        due = following
    assert due is not None
    return [*found, due()], time.perf_counter() - began


def check(device: torch.device, batch: int, batches: int, layers: int, width: int) -> dict[str, Any]:
    """Precision → captions a second, and the least cosine to float32 of whole and of cut captions."""
    lane, asked = DeviceCopier(device), [captions(batch) for _ in range(batches)]
    made = tower(layers, width).to(device)
    exact = [made(ids.to(device)).embedding.cpu() for ids in asked]
    told: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        low = deepcopy(made).to(dtype)
        brought(low, asked, lane)
        found, took = brought(low, asked, lane)
        short, _ = brought(low, [ids[:, :LENGTH] for ids in asked], lane)
        cosines = [
            min(float(torch.cosine_similarity(a, b).min()) for a, b in zip(mine, exact, strict=True))
            for mine in (found, short)
        ]
        name = str(dtype).removeprefix("torch.")
        told[name] = {"captions a second": round(batch * batches / took), "cosine": cosines[0], "cut": cosines[1]}
    return told


def main() -> None:
    """Checks, and prints what it found."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name, default in (("batch", 64), ("batches", 20), ("layers", 12), ("width", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    told = check(torch.device(asked.device), asked.batch, asked.batches, asked.layers, asked.width)
    print(json.dumps({"device": asked.device, "torch": torch.__version__} | told))
    assert all(min(one["cosine"], one["cut"]) >= LEAST for one in told.values())


if __name__ == "__main__":
    main()
