"""Lineage of a run: every commit with its identity and parents, parents before children."""

from collections.abc import Mapping
from typing import Any

from jobs.cli.inputs import shards_url
from jobs.cli.state import read_json
from jobs.reports.model_facts import ModelFacts
from jobs.reports.run_page import LineageNode
from jobs.reports.run_records import CommittedRun
from jobs.training.metrics import METRICS, PROVENANCE, StudentMetrics
from snapfusion.settings import digest

_PARENTS = {"latents": ("SHARDS", "TEACHER"), "pairs": ("LATENTS", "TEACHER")}
_TABLE_FIELDS = ("url", "identity", "version", "rows_read", "rows_written", "rejected")


def lineage_nodes(
    run: CommittedRun, tables: Mapping[str, Mapping[str, Any]], *, models: ModelFacts
) -> tuple[LineageNode, ...]:
    """All commits of a run.

    Args:
        run: its committed parts.
        tables: metrics of its tables.
        models: identities of its models.
    """
    return tuple(_Lineage(run, models).nodes(tables))


class _Lineage:
    """Nodes in order of creation, looked up by name or by identity."""

    def __init__(self, run: CommittedRun, models: ModelFacts) -> None:
        self._run = run
        self._identities = models.identities
        self._nodes: list[LineageNode] = []

    def nodes(self, tables: Mapping[str, Mapping[str, Any]]) -> list[LineageNode]:
        """All commits, from the parts of the run and the metrics of its tables."""
        run, job = self._run, self._run.job
        self._add("SHARDS", "shards", url=shards_url(job), identity=digest(job.recipe.source.to_values()))
        model = job.recipe.model
        self._add("TEACHER", "model", url=model, identity=self._identities[model])
        for name, metrics in tables.items():
            fields = {key: metrics[key] for key in _TABLE_FIELDS}
            self._add(name.upper(), "table", parents=self._existing(*_PARENTS[name]), **fields)
        self._add_efficient()
        if run.student:
            self._add_student(run.student)
        if run.decoder:
            identity, origin = run.decoder["settings_hash"], ("PAIRS", "TEACHER")
            self._add("DECODER", "checkpoint", url=job.url("decoder"), identity=identity, parents=origin)
        if run.mobile:
            # The bundle names its parents by the hash of their settings.
            records = run.mobile["identity"]["parents"].values()
            hashes = {parent["settings_hash"] for parent in records if parent}
            parents = tuple(node.name for node in self._nodes if node.identity in hashes)
            identity = run.mobile["settings_hash"]
            self._add("MOBILE", "bundle", url=job.url("mobile"), identity=identity, parents=parents)
        return self._nodes

    def _add_efficient(self) -> None:
        """Add the efficient model, after the model that its weights come from."""
        job = self._run.job
        metrics = read_json(job.url(f"efficient/{METRICS}"))
        origin = read_json(job.url(f"efficient-first/{PROVENANCE}"))
        if metrics is None or origin is None:
            return
        source, url = job.resolve(job.recipe.efficient.begin), job.url("efficient")
        parent = self._model("TEACHER OF STEPS", source, origin["weights"])
        identity, parents = self._identities[url], self._existing("LATENTS", parent)
        self._add("EFFICIENT", "checkpoint", url=url, identity=identity, parents=parents)

    def _add_student(self, student: StudentMetrics) -> None:
        """Add the student, after its teacher and its initial weights."""
        roles = {"teacher": "TEACHER OF STEPS", "student": "INITIAL WEIGHTS"}
        models = [
            self._model(name, student["parents"][role]["source"], student["parents"][role]["weights"])
            for role, name in roles.items()
        ]
        data = "LATENTS" if student["settings"]["targets"] == "online" else "TARGETS"
        self._add(
            "STUDENT",
            "checkpoint",
            url=self._run.job.url(self._run.job.recipe.distill.name),
            identity=student["settings_hash"],
            parents=self._existing(data, *dict.fromkeys(models)),
        )

    def _model(self, name: str, source: str, weights: Mapping[str, str]) -> str:
        """The name of the node with these weights, which is added as `name` if there is none."""
        identity = digest(weights)
        # A model may have several roles, as the teacher that is the recipe's own model too.
        for node in reversed(self._nodes):
            if node.identity == identity:
                return node.name
        self._add(name, "model", url=source, identity=identity)
        return name

    def _existing(self, *names: str) -> tuple[str, ...]:
        known = {node.name for node in self._nodes}
        return tuple(name for name in names if name in known)

    def _add(self, name: str, kind: str, **fields: Any) -> None:  # noqa: ANN401 - of LineageNode
        self._nodes.append(LineageNode(name=name, kind=kind, **fields))
