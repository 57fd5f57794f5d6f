"""The data's stages on an S3 server that fails in a fifth of all requests, against a folder that nobody disturbs."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra.errors import Refused
from infra.records.manifest import Manifest
from infra.store.opening import open_store
from pipelines.engine.graph import resolve
from pipelines.engine.ray_shards import perform
from pipelines.select.stage import FeatureStage, Select
from tests.fixtures.faulty_s3 import Fault, FaultyS3, at_random, unharmed
from tests.fixtures.stages import RULES, Data, download, source

FAULTS = [fault for fault in Fault if fault is not Fault.STALL]  # which costs seconds each; see tests/infra


@pytest.mark.full
@pytest.mark.slow
def test_stages_on_a_server_that_fails_again_and_again_give_the_same_data(
    data: Data, s3_uri: str, proxy: FaultyS3, tmp_path: Path
) -> None:
    proxy.plan = at_random(0, 0.2, FAULTS)
    stages = (
        (source(data.rows), (), data.source),
        (download(data.server.port), (data.source,), data.download),
        (FeatureStage("filter", RULES), (data.download,), data.looks),
        (Select("filter", RULES), (data.looks, data.download), data.filter),
    )
    for stage, inputs, expected in stages:
        made: Manifest | None = None
        while made is None:  # as one who gives the same command again
            try:
                store = open_store(s3_uri, endpoint=proxy.endpoint, cache=tmp_path / "copies")
                resolved = resolve(stage, inputs, store)
                made = resolved.manifest([perform(stage, action, store) for action in resolved.todo])
                made.save(store)
            except Refused as refused:
                if refused.code != 5:
                    raise
        assert made.body == expected.body
    assert set(proxy.happened) == set(FAULTS)
    proxy.plan = unharmed
    seen = open_store(s3_uri, create=False, cache=tmp_path / "elsewhere")
    assert [resolve(stage, inputs, seen).todo for stage, inputs, _ in stages] == [()] * len(stages)
    done = [action for stage, inputs, _ in stages for action in resolve(stage, inputs, data.store).actions]
    assert {entry.name for entry in seen.list("records/")} == {action.record_name() for action in done}
