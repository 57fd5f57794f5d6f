"""What was made from what: actions, records and manifests.

In goes what an action made, as files; out comes its record, by key, and the version of the data, by digest. Parquet
schemas of every kind of shard, and what was forgotten for good, stand here too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from infra.lazy import exports

if TYPE_CHECKING:
    from infra.records.commits import check_inputs, commit, current_record
    from infra.records.damage import damaged, explain_damage
    from infra.records.folders import materialise, materialised
    from infra.records.forgotten import (
        FORGOTTEN,
        SALT,
        Forgotten,
        ForgottenNames,
        add_request,
        blank_rows,
        mark_removed,
        read_requests,
        removed_objects,
        url_salt,
    )
    from infra.records.generations import lost_name, newest_generations, split_name
    from infra.records.manifest import Action, Block, File, Manifest, Record
    from infra.records.objects import document, object_name, read_object
    from infra.records.parquet import RowGroups, columns, stored_file
    from infra.records.schemas import (
        INDEX,
        KEPT,
        LISTED,
        MEMBER,
        SELECTION,
        SOURCE,
        UID,
        embedded_schema,
        pair_uid,
        sample_uid,
    )
else:
    __getattr__ = exports(__name__)
