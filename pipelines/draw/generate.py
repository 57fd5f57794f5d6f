"""Text to pictures with a stored release, for `unclip generate`; loads no more than it needs, to start fast."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from infra.errors import Refused
from infra.store import Store
from pipelines.draw.checks import check_guidance, check_order


def generate_grid(
    store: Store,
    prompts: Sequence[str],
    release: str,
    n: int,
    seed: int,
    guidance: float | None,
    prior_guidance: float | None,
    out: Path | str,
    *,
    labels: Mapping[str, str] | None = None,
    label_guidance: float | None = None,
    clip_guidance: float | None = None,
) -> Path:
    """Draws n pictures a prompt and writes them as one PNG, a row a prompt; returns where.

    release: a reference that `open_release` knows. Pictures of a prompt have the seeds seed, seed + 1, …; guidance None
    means the release's own, as it does of the guides, for whose labels and scales see `unclip.Sampling`.
    Raises Refused for impossible settings, and where there is no such release or guide.
    """
    check_guidance(guidance=guidance, prior_guidance=prior_guidance)
    check_guidance(unguided=0, label_guidance=label_guidance, clip_guidance=clip_guidance)
    check_order(n, rows=len(prompts), seed=seed, out=out)
    # Beside other busy processes, threads that spin while they wait make sampling up to thirty times slower (measured
    # on two cores: 67 s against 3 s); on an idle machine waiting asleep costs a second. Read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from pipelines.release import open_release

    folder = open_release(store, release)
    guides: dict[str, Any] = {"labels": labels, "label_guidance": label_guidance, "clip_guidance": clip_guidance}
    from pipelines.evaluate import grids
    from unclip.cascade import UnCLIP
    from unclip.release import decoder_settings

    if not decoder_settings(folder, **guides).labels and label_guidance is not None:
        raise Refused("--label-guidance is how strongly to guide towards labels, and there are none: add --label")
    model = UnCLIP.load(folder)
    words = [prompt for prompt in prompts for _ in range(n)]
    seeds = [seed + k for _ in prompts for k in range(n)]
    pictures = model.generate(words, seeds=seeds, guidance=guidance, prior_guidance=prior_guidance, **guides)
    table = pictures.permute(0, 2, 3, 1).reshape(len(prompts), n, model.size, model.size, 3).numpy()
    grids.save(grids.rows(table, prompts), Path(out))
    return Path(out)
