"""Delete rows, and everything derived from them, from the tables of a run on request.

FILE has one entry per line; lines that begin with # are skipped. Addresses match whatever their scheme,
default port, case of the host and escapes; hashes are the SHA-256 or MD5 of the image, or LAION's row number,
and are looked up in the run's shards and FINGERPRINTS. Only hashes of the entries are stored, and rows on
that list are never read in again. Older versions stay readable until their files are erased.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from jobs.cli.inputs import deletion_list_of, shards_url
from jobs.cli.job import Job
from jobs.cli.verb import recipe_verb
from jobs.runtime.logs import logger
from pipelines.storage.objects import write_once

if TYPE_CHECKING:
    from jobs.deletion.request import DeletionTarget


class FilesInUse(RuntimeError):
    """Old files that an unfinished training still reads."""


def _options() -> list[click.Parameter]:
    """Files of entries, and whether to erase old files."""
    kinds = {"url": "addresses", "hash": "hashes of images", "id": "ids of rows"}
    return [
        *(
            click.Option([f"--{kind}"], multiple=True, metavar="FILE", help=f"file of {entries} to delete")
            for kind, entries in kinds.items()
        ),
        click.Option(["--erase"], is_flag=True, help="also delete the files that only older versions read"),
        click.Option(
            ["--erase-pinned"],
            is_flag=True,
            help="like --erase, even if an unfinished training reads the files; it cannot be resumed then",
        ),
    ]


def forget(job: Job) -> None:
    """Delete the rows, write the receipt and print its summary."""
    from jobs.deletion.delete_request import delete_request
    from jobs.deletion.receipt import receipt_name, receipt_text
    from jobs.deletion.request import read_request

    request = read_request(job.options)
    receipt = delete_request(
        _target(job),
        request,
        deletion_list=deletion_list_of(job),
        settings=job.recipe.digest(),
        erase=job.options["erase"],
        erase_pinned=job.options["erase_pinned"],
    )
    write_once(job.url(f"settings/{receipt.settings[:16]}.json"), job.recipe.to_json().encode())
    text = receipt_text(receipt)
    url = job.url(f"forgotten/receipts/{receipt_name(text)}")
    write_once(url, text.encode())
    for line in receipt.lines():
        logger.info(f"  {line}")
    logger.info(f"  receipt: {url}")
    # After the receipt: the rows are deleted in any case, only the erasure of old files is refused.
    unfinished = receipt.lineage.unfinished
    if unfinished and job.options["erase"] and not job.options["erase_pinned"]:
        named = ", ".join(f"{pin.path} (at {pin.table} version {pin.version})" for pin in unfinished)
        raise FilesInUse(
            f"--erase: nothing was erased, because unfinished trainings read the old files: {named}; finish "
            "or remove them, or give --erase-pinned. The newest versions no longer have the rows."
        )


def _target(job: Job) -> DeletionTarget:
    from jobs.deletion.request import DeletionTarget

    return DeletionTarget.open(job.out, shards_url=shards_url(job), source=job.recipe.source.name)


def preview(job: Job) -> list[str]:
    """Describe the rows that would be deleted."""
    from jobs.deletion.request import read_request, request_keys

    request, target = read_request(job.options), _target(job)
    matches = target.find(request_keys(request))
    entries = {(file.kind, key) for file in request for key in file.entries}
    return [
        f"{len(entries & matches.entries)} of {sum(len(file.entries) for file in request)} entries match; "
        f"{len(deletion_list_of(job).read())} are on the list already",
        *(
            f"would delete {rows} rows and {rejections} rejections from {path}, version "
            f"{target.tables[path].version}"
            for path, (rows, rejections) in matches.rows.items()
        ),
    ]


main = recipe_verb("forget", forget, preview=preview, about=__doc__, writes=False, options=_options())

if __name__ == "__main__":
    main.exit()
