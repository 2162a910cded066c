"""What is published of a model: its files, its card, and its licence's text."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jobs.publishing.figures import figures, training_folder
from jobs.publishing.hub_card import hub_card, needs_licence_text
from snapfusion.models.card import CARD
from snapfusion.models.checksums import CHECKSUMS_FILE
from snapfusion.models.errors import ModelError
from snapfusion.models.hub import needed_files
from snapfusion.models.load import load
from snapfusion.models.locate import locate
from snapfusion.models.source import parse_source
from snapfusion.settings import SettingsError

LICENCE_FILE = "LICENSE"


@dataclass(frozen=True, kw_only=True)
class Publication:
    """Files by their path in the repository, and the text of the card among them."""

    files: dict[str, Path | bytes]
    card: str

    def lines(self) -> Iterator[str]:
        """A line for each file, and their total."""
        sizes = {name: _size(content) for name, content in self.files.items()}
        for name, size in sorted(sizes.items()):
            yield f"  {size:>13,}  {name}"
        yield f"  {sum(sizes.values()):>13,}  bytes in {len(sizes)} files"


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def publication(
    source: str, *, repository: str, licence: str | None, licence_file: Path | None
) -> Publication:
    """Load a saved model, as every job does, and collect what is published of it.

    Args:
        source: a diffusers folder, a training's folder, or a URL of these.
        repository: OWNER/NAME.
        licence: of the weights; None for what the card states.
        licence_file: with its text.

    Raises:
        ModelError: if it is no saved model, or cannot be used.
        ChecksumError: if it does not match its checksums.
        SettingsError: if its licence, or the text that this requires, is missing.
    """
    model = parse_source(source)
    if model.path != source:
        raise ModelError(f"{source}: a saved model is published, without options; save it with them first")
    folder = locate(source)
    if folder.is_file():
        raise ModelError(f"{source} is a file; a diffusers folder is published")
    bundle = load(source)
    training = training_folder(source, folder)
    card, stated = hub_card(
        folder,
        bundle,
        repository=repository,
        licence=licence,
        figures="" if training is None else figures(training),
    )
    files: dict[str, Path | bytes] = {name: folder / name for name in _names(folder)}
    if licence_file is not None:
        files[LICENCE_FILE] = _read(licence_file)
    elif needs_licence_text(folder, stated):
        raise SettingsError(
            f"the licence is {stated}, which requires a copy of its text; give --licence-file"
        )
    return Publication(files={**files, CARD: card.encode()}, card=card)


def _names(folder: Path) -> list[str]:
    """Files of a model that are published: those with checksums, or else those that are read."""
    present = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    notes = [name for name in present if name.startswith(("LICENSE", "LICENCE", "NOTICE"))]
    if CHECKSUMS_FILE in present:
        lines = (folder / CHECKSUMS_FILE).read_text().splitlines()
        return sorted({CHECKSUMS_FILE, *(line.split("  ", 1)[1] for line in lines), *notes})
    return sorted({*needed_files(present, variant=None), *notes})


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SettingsError(f"--licence-file {path}: {error.strerror or error}") from None
