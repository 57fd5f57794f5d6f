"""Scores of one release: held-out prompts drawn, judged, measured and shown.

`evaluate-sample` draws one chunk of prompts an action; `evaluate` reduces the samples to scores.json and picture grids.
A prompt's seed is its place in the list, so two releases get the same noise and compare prompt by prompt.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.documents import canonical, digest_file
from infra.errors import Refused
from infra.records import Action, Manifest, Record, object_name
from infra.store import Store
from pipelines.evaluate.prompts import Chunk, Prompt, alternatives, chunks
from pipelines.stage import PoolHow, StageBase, plain
from unclip.config import AMOUNT, COUNT, SEED, outside

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

    from unclip.cascade import UnCLIP

SAMPLES = "samples.parquet"
SCORES = "scores.json"
SHOWN = 24
COLUMNS = 6

_loaded: dict[tuple[str, str, str], UnCLIP] = {}


@dataclass(frozen=True)
class EvaluateSpec:
    """What is asked of a release."""

    judge: str | None = None
    """"module:function" that takes (picture uint8 [h, w, 3], expected) and returns {attribute: right?, "all": …}."""
    reference: str | None = None
    """"module:function" that takes (prompts, seed, side) and returns true pictures, uint8 [n, side, side, 3]."""
    chunk: int = 64
    """Prompts a shard."""
    seed: int = 0
    """Seed of the first prompt; each next one has the next."""
    tile: int = 16
    """Pictures that the networks see at a time."""
    guidance: float | None = None
    """The decoder's guidance scale; null for the release's own."""
    prior_guidance: float | None = None
    """The prior's guidance scale; null for the release's own."""

    def __post_init__(self) -> None:
        for name in ("judge", "reference"):
            value = getattr(self, name)
            if value is not None and not re.fullmatch(r"\w+(\.\w+)*:\w+", value):
                raise Refused(f"evaluate.{name} is {value!r}; name a function as module:function")
        if wrong := outside(self, chunk=COUNT, tile=COUNT, seed=SEED, guidance=AMOUNT, prior_guidance=AMOUNT):
            raise Refused(f"evaluate.{wrong}")


def function(name: str | None, what: str) -> Callable[..., Any] | None:
    """The function that "module:function" names; raises Refused where there is none."""
    if name is None:
        return None
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise Refused(f"evaluate.{what} {name!r} cannot be imported: {error}") from None
    if not callable(found):
        raise Refused(f"evaluate.{what} {name!r} is no function")
    return found


def code(name: str | None, what: str) -> str | None:
    """SHA-256 of the file that holds that function; raises Refused where there is none."""
    if name is None:
        return None
    function(name, what)
    file = getattr(importlib.import_module(name.partition(":")[0]), "__file__", None)
    if file is None:
        raise Refused(f"evaluate.{what} {name!r} lies in no file; name a module of Python code")
    return digest_file(Path(file))


@dataclass(frozen=True)
class EvaluateSample(StageBase):
    """Stage: a chunk of prompts → `samples.parquet`, a row a prompt, in their order."""

    spec: EvaluateSpec
    how: PoolHow
    prompts: tuple[Prompt, ...] = field(repr=False)
    name = "evaluate-sample"
    group = "evaluate"
    version = 2
    needs = ("bundle",)
    kind = "actor"

    def __post_init__(self) -> None:
        # At the start of a run, not after its hours of training.
        code(self.spec.judge, "judge")
        code(self.spec.reference, "reference")

    @property
    def shards(self) -> int:
        """Chunks of prompts, known before there is a release."""
        return -(-len(self.prompts) // self.spec.chunk)

    def actions(self, *inputs: Manifest) -> Iterator[Action]:
        """One a chunk, named by the chunk's contents, so that a longer list keeps what its start gave.

        The files of judge and reference are in the key beside their names, since it is their code that decides.
        """
        (bundle,) = inputs
        files = {what: code(getattr(self.spec, what), what) for what in ("judge", "reference")}
        spec = {**plain(self.spec), "code": files}
        for chunk in chunks(self.prompts, self.spec.chunk):
            yield self.action(spec, (bundle.version, chunk.digest))

    def setup(self) -> None:
        """Sets the number of threads; the release is loaded by the first `run`, which knows which one, and stays."""
        import torch

        torch.set_num_threads(self.how.threads)

    def run(self, action: Action, store: Store, out: Path) -> Record:
        import pyarrow.parquet as pq

        version, digest = action.inputs
        (chunk,) = (chunk for chunk in chunks(self.prompts, self.spec.chunk) if chunk.digest == digest)
        model = _opened(store, version, "cuda" if self.how.gpus else "cpu")
        model.tile = self.spec.tile
        table = sample(model, chunk, self.spec)
        pq.write_table(table, out / SAMPLES, compression="zstd")
        return Record.of(action, out, states={"sampled": table.num_rows})


@dataclass(frozen=True)
class Evaluate(StageBase):
    """Stage: all samples → `scores.json` and picture grids."""

    spec: dict[str, Any] = field(default_factory=dict)
    """Empty, for whatever was asked of the samples is in their version; or the metrics that a plug-in added."""
    how = None
    name = group = "evaluate"
    version = 3
    needs = ("evaluate-sample", "bundle")

    def run(self, action: Action, store: Store, out: Path) -> Record:
        import pyarrow as pa
        import pyarrow.parquet as pq

        from pipelines.evaluate import grids, scores

        samples, release = action.inputs
        records = Manifest.load(store, samples).records
        table = pa.concat_tables([pq.read_table(store.local(object_name(record.sha(SAMPLES)))) for record in records])
        rows = table.to_pylist()
        document = scores.score(rows, release)
        (out / SCORES).write_bytes(canonical(document) + b"\n")
        for kind in document["kinds"]:
            shown = _spread([row for row in rows if row["kind"] == kind], SHOWN)
            grids.save(grids.sheet([_cell(row) for row in shown], COLUMNS), out / f"grid-{kind}.png")
        failed = [row for row in rows if row["verdict"] is not None and not json.loads(row["verdict"])[scores.ALL]]
        if failed:
            grids.save(grids.sheet([_cell(row) for row in _spread(failed, SHOWN)], COLUMNS), out / "grid-failures.png")
        return Record.of(action, out, facts={"scores": scores.flat(document), "failed": len(failed)})


def schema(width: int) -> pa.Schema:
    """samples.parquet: verdicts are JSON {attribute: right?}; null is what was not measured."""
    import pyarrow as pa

    texts = ("verdict", "floor_verdict", "true_verdict", "zero_shot")
    return pa.schema(
        [
            ("prompt", pa.string()),
            ("kind", pa.string()),
            ("expected", pa.string()),
            ("seed", pa.int64()),
            ("image", pa.binary()),
            *((name, pa.string()) for name in texts),
            ("clip_score", pa.float32()),
            ("embedding", pa.list_(pa.float32(), width)),
            # Of variable length, since Parquet readers stumble over a null of fixed length.
            ("true_embedding", pa.list_(pa.float32())),
        ]
    )


def sample(model: UnCLIP, chunk: Chunk, spec: EvaluateSpec) -> pa.Table:
    """Draws a chunk's prompts and measures the pictures; rows as in `schema`."""
    import pyarrow as pa

    from pipelines.evaluate.grids import png
    from unclip.metrics import cosine

    judge, reference = function(spec.judge, "judge"), function(spec.reference, "reference")
    texts = [prompt.prompt for prompt in chunk.prompts]
    seeds = [spec.seed + chunk.first + number for number in range(len(texts))]
    drawn = model.generate(texts, seeds=seeds, guidance=spec.guidance, prior_guidance=spec.prior_guidance)
    pictures = drawn.permute(0, 2, 3, 1).contiguous().numpy()
    embedding, words = _images(model, pictures), _texts(model, texts)
    columns: dict[str, list[Any]] = {
        "prompt": texts,
        "kind": [prompt.kind for prompt in chunk.prompts],
        "expected": [_json(prompt.expected) for prompt in chunk.prompts],
        "seed": seeds,
        "image": [png(picture) for picture in pictures],
        "verdict": _judged(judge, pictures, chunk.prompts),
        "floor_verdict": _judged(judge, pictures, _others(chunk.prompts)),
        "clip_score": list(cosine(embedding, words)),
        "embedding": list(embedding),
    }
    if reference is not None:
        # The chunk's place makes the seed: true pictures of the same prompt in two chunks are two pictures.
        true = reference([prompt.document for prompt in chunk.prompts], spec.seed + chunk.first, model.size)
        seen = _images(model, true)
        columns["true_verdict"] = _judged(judge, true, chunk.prompts)
        columns["true_embedding"] = list(seen)
        columns["zero_shot"] = _zero_shot(model, chunk, seen)
    table_schema = schema(model.clip.embedding_width)
    missing = [None] * len(texts)
    return pa.table({name: columns.get(name, missing) for name in table_schema.names}, schema=table_schema)


def _judged(
    judge: Callable[..., Any] | None, pictures: NDArray[np.uint8], prompts: Sequence[Prompt | None]
) -> list[str | None]:
    """What the judge says of each picture; None where it has nothing to expect."""
    return [
        None
        if judge is None or prompt is None or prompt.expected is None
        else _json({name: bool(right) for name, right in judge(picture, prompt.expected).items()})
        for picture, prompt in zip(pictures, prompts, strict=True)
    ]


def _others(prompts: Sequence[Prompt]) -> list[Prompt | None]:
    """For each prompt the chunk's next one of its kind: a caption that has nothing to do with the picture."""
    found: list[Prompt | None] = [None] * len(prompts)
    for kind in {prompt.kind for prompt in prompts}:
        places = [place for place, prompt in enumerate(prompts) if prompt.kind == kind]
        for place, other in zip(places, places[1:] + places[:1], strict=True):
            found[place] = prompts[other] if other != place else None
    return found


def _zero_shot(model: UnCLIP, chunk: Chunk, seen: NDArray[np.float32]) -> list[str | None]:
    """For each true picture and attribute: does CLIP prefer the true prompt to those that differ in that alone?"""
    from unclip.metrics import cosine

    asked = [alternatives(prompt, chunk.values.get(prompt.kind, {})) for prompt in chunk.prompts]
    wanted = sorted({text for one in asked for texts in one.values() for text in texts})
    known = dict(zip(wanted, _texts(model, wanted), strict=True)) if wanted else {}
    answers: list[str | None] = []
    for choices, picture in zip(asked, seen, strict=True):
        right = {}
        for name, texts in choices.items():
            likeness = cosine([picture] * len(texts), [known[text] for text in texts])
            right[name] = bool(likeness.argmax() == 0)
        answers.append(_json({**right, "all": all(right.values())}) if right else None)
    return answers


def _images(model: UnCLIP, pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Raw CLIP embeddings of pictures, uint8 [n, h, w, 3] → float32 [n, d]; always in full batches, filled up."""
    import numpy as np
    import torch

    tensor = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2)
    parts = [model.clip.encode_images(_full(part, model.tile))[: len(part)] for part in tensor.split(model.tile)]
    return torch.cat(parts).cpu().numpy()


def _texts(model: UnCLIP, texts: Sequence[str]) -> NDArray[np.float32]:
    """Raw CLIP embeddings of texts → float32 [n, d]; always in full batches, filled up."""
    import torch

    parts = []
    for first in range(0, len(texts), model.tile):
        part = list(texts[first : first + model.tile])
        filled = part + part[-1:] * (model.tile - len(part))
        parts.append(model.clip.encode_text(filled).embedding[: len(part)])
    return torch.cat(parts).cpu().numpy()


def _full(batch: Any, size: int) -> Any:
    import torch

    return torch.cat([batch, batch[-1:].expand(size - len(batch), -1, -1, -1)])


def _json(document: Any) -> str | None:
    return None if document is None else canonical(document).decode()


def _spread(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """At most `count` rows, evenly over all of them."""
    return [rows[len(rows) * k // min(count, len(rows))] for k in range(min(count, len(rows)))]


def _cell(row: dict[str, Any]) -> Any:
    from pipelines.evaluate.grids import Cell, pixels

    verdict = json.loads(row["verdict"]) if row["verdict"] else {}
    wrong = [name for name, right in verdict.items() if not right and name != "all"]
    return Cell(pixels(row["image"]), row["prompt"], f"wrong: {', '.join(wrong)}" if wrong else "")


def _opened(store: Store, version: str, device: str) -> UnCLIP:
    """The release of that version, kept for the next chunk."""
    from pipelines.release import open_release
    from unclip.cascade import UnCLIP

    key = (store.uri, version, device)
    if key not in _loaded:
        _loaded.clear()
        _loaded[key] = UnCLIP.load(open_release(store, version)).to(device)
    return _loaded[key]
