"""clip-retrieval's own reader, mapper and writer, run by its own Runner, in the environment of clip-retrieval.txt.

Takes one JSON argument: config and weights (of an open_clip model), tars, out, batch, workers, extension. Loads the
model and warms it up as clip-retrieval does, answers with one line of JSON, and from then on runs the whole inference
once for each line that it reads. Left out is its logger, a process that imports wandb: it would cost seconds a run.
"""

import json
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import open_clip
import torch
from all_clip import load_clip
from clip_retrieval.clip_inference.mapper import ClipMapper
from clip_retrieval.clip_inference.reader import WebdatasetReader
from clip_retrieval.clip_inference.runner import Runner
from clip_retrieval.clip_inference.writer import NumpyWriter


class NoLogger:
    """In the place of LoggerWriter."""

    def start(self) -> None: ...

    def end(self) -> None: ...

    def __call__(self, stats: dict[str, Any]) -> None: ...


def processor() -> float:
    """Processor seconds of this process and of those that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def main() -> None:
    """Reads lines until there are no more."""
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    open_clip.add_model_config(Path(asked["config"]))
    settings = {"use_jit": False, "warmup_batch_size": asked["batch"], "clip_cache_path": None}
    name = f"open_clip:{Path(asked['config']).stem}/{asked['weights']}"
    _, preprocess, tokenizer = load_clip(clip_model=name, **settings)

    def reader(sampler: Any) -> WebdatasetReader:
        return WebdatasetReader(
            sampler, preprocess, tokenizer, asked["tars"], asked["batch"], asked["workers"],
            wds_image_key=asked["extension"],
        )  # fmt: skip

    def mapper() -> ClipMapper:
        return ClipMapper(True, True, False, False, name, settings["use_jit"], "", asked["batch"], None)

    def writer(number: int) -> NumpyWriter:
        return NumpyWriter(number, asked["out"], True, True, False, 1)

    runner = Runner(reader, mapper, writer, lambda _: NoLogger(), 1)
    print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads()}), flush=True)
    for _ in sys.stdin:
        shutil.rmtree(asked["out"], ignore_errors=True)
        clock, before = time.perf_counter(), processor()
        runner(0)
        print(json.dumps({"clock": time.perf_counter() - clock, "processor": processor() - before}), flush=True)


if __name__ == "__main__":
    main()
