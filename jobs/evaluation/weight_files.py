"""The files of weights that an evaluation reads: whether they are there, before anything is generated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from jobs.evaluation.settings import EvaluationSettings
from pipelines.stages.settings import FeatureSettings, PreferenceSettings, ScorerSettings


@dataclass(frozen=True, kw_only=True)
class WeightFile:
    """A file of weights.

    Attributes:
        setting: that names it.
        source: as `pinned_file` accepts it.
        sha256: expected; None accepts any.
    """

    setting: str
    source: str
    sha256: str | None


def weight_files(settings: EvaluationSettings) -> Iterator[WeightFile]:
    """All files of weights of an evaluation's networks; bundled networks have none."""
    judging, prefix = settings.samples.judging, "evaluation.samples.judging"
    networks: dict[str, FeatureSettings | ScorerSettings | PreferenceSettings] = {
        "features": judging.features,
        "scorer": judging.scorer,
        **{f"preferences[{number}]": one for number, one in enumerate(judging.preferences)},
    }
    for name, one in networks.items():
        if one.weights is not None:
            yield WeightFile(setting=f"{prefix}.{name}.weights", source=one.weights, sha256=one.sha256)
    if (lpips := settings.lpips) is not None:
        setting = "evaluation.lpips"
        yield WeightFile(setting=f"{setting}.backbone", source=lpips.backbone, sha256=lpips.backbone_sha256)
        yield WeightFile(setting=f"{setting}.heads", source=lpips.heads, sha256=lpips.heads_sha256)


def check_weights(settings: EvaluationSettings) -> None:
    """Refuse files that are missing, altered or no safetensors; those of a store or the hub are fetched.

    Raises:
        ValueError: naming the first of them, and the setting.
    """
    from snapfusion.metrics.pinned import check_safetensors, pinned_file

    for file in weight_files(settings):
        try:
            check_safetensors(pinned_file(file.source, sha256=file.sha256))
        except ValueError as error:
            raise ValueError(f"{file.setting}: {error}") from None


def missing_weights(settings: EvaluationSettings, *, examples: str) -> list[str]:
    """A line for each file that is not there; nothing is fetched, and the hub is not asked.

    Args:
        settings: of the evaluation.
        examples: beginning of URLs that stand for one's own, which are not looked for.
    """
    from pipelines.storage.objects import exists
    from snapfusion.metrics.pinned import missing_reason

    def reason_of(source: str) -> str | None:
        if "://" not in source:
            return missing_reason(source)
        return None if source.startswith(examples) or exists(source) else f"there is no {source}"

    found = ((file.setting, reason_of(file.source)) for file in weight_files(settings))
    return [f"{setting}: {reason}" for setting, reason in found if reason is not None]
