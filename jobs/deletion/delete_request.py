"""Deletes the rows that a request names from the tables of a run, and records it in a receipt."""

from collections.abc import Mapping, Sequence

from jobs.deletion.lineage import lineage_of
from jobs.deletion.receipt import DeletionReceipt, outcome_of
from jobs.deletion.request import DeletionTarget, RequestFile, id_keys, request_keys
from pipelines.deletion.erasure import erase_files, old_files, old_sibling_files
from pipelines.deletion.rewrite import Removal, delete_rows
from pipelines.deletion.table_matches import count_matches
from pipelines.tables.deletion_list import DeletionList
from pipelines.tables.manifest import UnitManifest
from pipelines.tables.table import open_table

_DELETED_REASONS = {"forgotten", "withheld"}
"""Reasons of rejections that name deleted rows."""


def delete_request(
    target: DeletionTarget,
    request: Sequence[RequestFile],
    *,
    deletion_list: DeletionList,
    settings: str,
    erase: bool,
    erase_pinned: bool,
) -> DeletionReceipt:
    """Put the request on the deletion list and delete what it names from all tables.

    Args:
        target: the run.
        request: files of entries.
        deletion_list: of the run.
        settings: digest of the recipe.
        erase: whether to erase the old files too, unless an unfinished training reads them.
        erase_pinned: whether to erase them in any case.
    """
    known = deletion_list.read()
    matches = target.find(request_keys(request))
    # The list first: from here on the rows cannot come back, and a killed job resumes from the list alone.
    added = deletion_list.add(request_keys(request) | id_keys(matches.ids))
    keys = deletion_list.read()
    removals = delete_rows([table.url for table in target.tables.values()], keys)
    tables = {path: open_table(table.url) for path, table in target.tables.items()}
    lineage = lineage_of(target.files, {**tables, **target.other_tables})
    old = {path: [*old_files(table, keys), *old_sibling_files(table.url)] for path, table in tables.items()}
    erases = erase_pinned or (erase and not lineage.unfinished)
    if erases:
        for path, files in old.items():
            if any(file.revision for file in tables[path].units):
                erase_files(tables[path].url, files)
    old_paths = [file.removeprefix(f"{target.files.url}/") for files in old.values() for file in files]
    known_keys = {"url": known.urls, "hash": known.hashes, "id": known.ids}
    kept = {path: count_matches(table, keys) for path, table in target.other_tables.items()}
    manifests = {table.url: list(table.manifests().values()) for table in tables.values()}
    return DeletionReceipt(
        settings=settings,
        outcomes=[outcome_of(file, matches.keys(file.kind), known_keys[file.kind]) for file in request],
        added=len(added),
        lookup=matches.lookup,
        tables=dict(zip(target.tables, removals, strict=True)),
        deleted_rows={
            url: sum(manifest.rejected().get("forgotten", 0) for manifest in units)
            for url, units in manifests.items()
        },
        kept={path: count for path, count in kept.items() if count},
        shards=_deleted_shards(removals, manifests),
        lineage=lineage,
        old_files=[] if erases else old_paths,
        erased=old_paths if erases else [],
    )


def _deleted_shards(
    removals: Sequence[Removal], manifests: Mapping[str, Sequence[UnitManifest]]
) -> list[str]:
    """The shards that deleted rows of LATENTS were read from."""
    latents = [removal.url for removal in removals if removal.kind == "latents"]
    return sorted(
        {
            manifest.source
            for url in latents
            for manifest in manifests[url]
            if _DELETED_REASONS & manifest.rejected().keys()
        }
    )
