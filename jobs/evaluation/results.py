"""Types of the results of an evaluation, whose keys are those of results.json."""

from typing import Any, TypedDict


class Comparison(TypedDict):
    """All other contenders beside one: differences of metrics at every guidance, and of CLIP at equal FID."""

    differences: dict[str, list[dict[str, Any]]]
    equal_fid: dict[str, dict[str, Any]]


class EvaluationResults(Comparison):
    """The results of an evaluation; an interval is an `Interval`, and a list of three numbers in the file.

    Attributes:
        protocol: contenders, captions and sampling.
        floor: FID and KID of real images, mean and standard deviation over redraws; None if not measured.
        tuning: what was chosen on other captions; None if nothing.
        tables: lineage of each contender's samples.
        curves: each contender with its metrics at every guidance ("points"), and the guidance that was best
            on the tuning captions ("best_w").
        baseline: contender of the comparison.
        against: the comparison with each further contender.
        gaps: shares of FID gaps that students close.
        criteria: the thresholds stated beforehand, with the measured difference and whether it meets them.
        versions: of the packages.
    """

    protocol: dict[str, Any]
    floor: dict[str, Any] | None
    tuning: dict[str, Any] | None
    tables: dict[str, dict[str, Any]]
    curves: dict[str, dict[str, Any]]
    baseline: str
    against: dict[str, Comparison]
    gaps: list[dict[str, Any]]
    criteria: list[dict[str, Any]]
    versions: dict[str, str]
