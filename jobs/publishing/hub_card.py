"""The card of a model that is published: that in its folder, completed from records and by options."""

import re
from pathlib import Path
from typing import Any

import yaml

from snapfusion.models.bundle import Bundle
from snapfusion.models.card import (
    CARD,
    FIGURES_ELSEWHERE,
    LICENCE,
    SAMPLER,
    header_text,
    licence_fields,
    licence_text,
    model_card,
    sampler_text,
)
from snapfusion.settings import SettingsError

FIGURES = "## Figures"
_HEADER = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)
_LICENCE_FILES = ("LICENSE*", "LICENCE*")


def hub_card(
    folder: Path, bundle: Bundle, *, repository: str, licence: str | None, figures: str
) -> tuple[str, str]:
    """The card of a repository, and the licence that its header states.

    A card may have been completed by hand: only what it lacks is added, and examples name the repository.

    Args:
        folder: of the model; without a card there is a new one.
        bundle: the model.
        repository: OWNER/NAME.
        licence: of the weights; None for the one that the card states.
        figures: of its records, "" for none.

    Raises:
        SettingsError: if no licence is stated, or the card's header is damaged.
    """
    path = folder / CARD
    text = path.read_text(encoding="utf-8") if path.is_file() else model_card(bundle)
    header, body = _split(text)
    if licence is not None:
        header = {key: value for key, value in header.items() if not key.startswith("license")}
        header |= licence_fields(licence)
        body = _with_section(body, LICENCE, licence_text(licence))
    if not header.get("license"):
        raise SettingsError(
            "the model's card states no licence of its weights; give it, as in "
            '--licence "CreativeML OpenRAIL-M", or write `license:` into the header of its README.md'
        )
    if f"\n{SAMPLER}\n" not in body:
        body = _with_section(body, SAMPLER, sampler_text(bundle))
    if figures:
        body = _with_section(body.replace(f" {FIGURES_ELSEWHERE}", ""), FIGURES, figures)
    body = body.replace('from_pretrained("FOLDER"', f'from_pretrained("{repository}"')
    body = body.replace("--model FOLDER", f"--model {repository}")
    name = str(header.get("license_name") or header["license"])
    return f"{header_text(header)}\n\n{body.lstrip()}", name


def needs_licence_text(folder: Path, licence: str) -> bool:
    """Tell whether a licence requires a copy of its text, and the folder has none."""
    has_text = any(path for pattern in _LICENCE_FILES for path in folder.glob(pattern))
    return "rail" in licence.lower() and not has_text


def _split(text: str) -> tuple[dict[str, Any], str]:
    """The fields of a card's header, and the text below it."""
    found = _HEADER.match(text)
    if found is None:
        return {"library_name": "diffusers", "pipeline_tag": "text-to-image"}, text
    try:
        values = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        raise SettingsError(f"{CARD}: its header is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise SettingsError(f"{CARD}: its header has no fields; `key: value` lines are accepted")
    return values, text[found.end() :]


def _with_section(body: str, heading: str, text: str) -> str:
    """The text with a section of this heading, in place of one that is there."""
    section = f"{heading}\n\n{text}\n"
    pattern = re.compile(rf"^{re.escape(heading)}\n.*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
    if pattern.search(body):
        return pattern.sub(lambda _: f"{section}\n", body, count=1)
    return f"{body.rstrip()}\n\n{section}"
