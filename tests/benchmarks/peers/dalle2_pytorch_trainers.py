"""DALLE2-pytorch's own trainers and data loaders, in the environment of dalle2-pytorch.txt.

Takes one JSON argument: kind (prior or decoder), model and network (the keywords of both its classes), optimiser (its
trainer's), clip (an open_clip configuration's file), data (the folder that bench_dalle2_pytorch.py wrote), batch,
precision (accelerate's name of it). Answers with one line of JSON about the model, and from then on trains a new one
for as many steps as each line says. The steps are those of its train_diffusion_prior.py and train_decoder.py, which
are no part of the package: captions are tokenised and read by the frozen CLIP, then `forward` and `update`. Left out
are its trackers, its checkpoints and its samples, which cost it nothing here.
"""

import contextlib
import gc
import json
import resource
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import torch
from accelerate import Accelerator
from clip import tokenize
from dalle2_pytorch import (
    Decoder,
    DecoderTrainer,
    DiffusionPrior,
    DiffusionPriorNetwork,
    DiffusionPriorTrainer,
    OpenClipAdapter,
    Unet,
)
from dalle2_pytorch.dataloaders import create_image_embedding_dataloader, get_reader, make_splits
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import ToTensor


def processor() -> float:
    """Processor seconds of this process and of those that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


class Prior:
    """Its prior on embeddings and captions, as train_diffusion_prior.py has it."""

    def __init__(self, asked: dict[str, Any], clip: OpenClipAdapter) -> None:
        torch.manual_seed(0)
        self.asked = asked
        self.model = DiffusionPrior(DiffusionPriorNetwork(**asked["network"]), clip=clip, **asked["model"])
        self.trainer = DiffusionPriorTrainer(
            self.model, Accelerator(cpu=True, mixed_precision=asked["precision"]), **asked["optimiser"]
        )

    def batches(self) -> Iterator[Any]:
        """Image embeddings and tokens, from .npy and .parquet."""
        data = Path(self.asked["data"])
        reader = get_reader(True, str(data / "embeddings"), str(data / "captions"))
        whole = {"batch_size": self.asked["batch"], "num_data_points": reader.count}
        return iter(make_splits(True, train_split=0.98, eval_split=0.01, image_reader=reader, **whole)[0])

    def loss(self, embeddings: torch.Tensor, tokens: torch.Tensor) -> float:
        """Of a batch, its gradient added up."""
        return self.trainer(text=tokens, image_embed=embeddings)


class Pictures:
    """Its decoder on webdataset tars with embeddings beside them, as train_decoder.py has it."""

    def __init__(self, asked: dict[str, Any], clip: OpenClipAdapter) -> None:
        torch.manual_seed(0)
        self.asked, self.clip = asked, clip
        self.model = Decoder(Unet(**asked["network"]), **asked["model"])
        self.trainer = DecoderTrainer(
            self.model, Accelerator(cpu=True, mixed_precision=asked["precision"]), **asked["optimiser"]
        )

    def batches(self) -> Iterator[Any]:
        """Pictures, embeddings and captions."""
        data = Path(self.asked["data"])
        return iter(
            create_image_embedding_dataloader(
                [str(path) for path in sorted((data / "tars").iterdir())],
                num_workers=1,
                batch_size=self.asked["batch"],
                img_embeddings_url=str(data / "embeddings"),
                index_width=4,
                img_preproc=ToTensor(),
                extra_keys=["txt"],
            )
        )

    def loss(self, pictures: torch.Tensor, embeddings: dict[str, torch.Tensor], captions: list[str]) -> float:
        """Of a batch, its gradient added up."""
        read = self.clip.embed_text(tokenize(captions, truncate=True))
        return self.trainer(pictures, image_embed=embeddings["img"], text_encodings=read.text_encodings, unet_number=1)


def fit(asked: dict[str, Any], clip: OpenClipAdapter, steps: int) -> list[float]:
    """Trains a new model; the losses."""
    one = (Prior if asked["kind"] == "prior" else Pictures)(asked, clip)
    one.trainer.train()
    batches = one.batches()
    losses = []
    for _ in range(steps):
        losses.append(one.loss(*next(batches)))
        one.trainer.update()
    return losses


def about(asked: dict[str, Any], clip: OpenClipAdapter) -> dict[str, Any]:
    """Parameters of the model, and FLOPs a sample of its forward and backward pass."""
    one = (Prior if asked["kind"] == "prior" else Pictures)(asked, clip)
    network = one.model.net if asked["kind"] == "prior" else one.model.unets
    batch = next(one.batches())
    with FlopCounterMode(display=False) as counter:
        one.loss(*batch)
    return {
        "torch": torch.__version__,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "flops": counter.get_total_flops() / asked["batch"],
    }


def main() -> None:
    """Reads lines until there are no more."""
    warnings.simplefilter("ignore")
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    open_clip.add_model_config(Path(asked["clip"]))
    clip = OpenClipAdapter(Path(asked["clip"]).stem, pretrained="")
    clip.requires_grad_(False).eval()
    print(json.dumps(about(asked, clip)), flush=True)
    for line in sys.stdin:
        clock, before = time.perf_counter(), processor()
        with contextlib.redirect_stdout(sys.stderr):
            losses = fit(asked, clip, int(line))
            gc.collect()  # and with it the loader's process, whose time counts once it is gone
        took = {"clock": time.perf_counter() - clock, "processor": processor() - before, "loss": losses[-1]}
        print(json.dumps(took), flush=True)


if __name__ == "__main__":
    main()
