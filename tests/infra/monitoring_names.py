"""The metrics that alerts and dashboard read, and the labels that they select or group by."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import yaml

MONITORING = Path(__file__).parents[2] / "infra/monitoring"


def rules() -> list[dict[str, Any]]:
    """Every rule of every rule file."""
    names = yaml.safe_load((MONITORING / "prometheus.yaml").read_text())["rule_files"]
    files = [yaml.safe_load((MONITORING / name).read_text()) for name in names]
    return [rule for file in files for group in file["groups"] for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    """The dashboard's panels."""
    return json.loads((MONITORING / "dashboard.json").read_text())["panels"]


def expressions() -> dict[str, str]:
    """The expressions of rules and panels, by name."""
    named = ((rule.get("alert") or f"{rule['record']}{rule.get('labels', '')}", rule) for rule in rules())
    found = {name: rule["expr"] for name, rule in named}
    for panel in panels():
        for target in panel["targets"]:
            # Grafana replaces it with the displayed time span.
            found[f"{panel['title']} {target['refId']}"] = target["expr"].replace("$__range", "3h")
    return found


def selected(expression: str) -> Iterator[tuple[str, set[str]]]:
    """Each metric that an expression reads, with the labels that it selects by.

    Raises:
        ValueError: if it is not PromQL.
    """
    found: list[tuple[str, set[str]]] = []

    def note(node: Any) -> None:
        if isinstance(node, promql_parser.MatrixSelector):
            note(node.vector_selector)
        if not isinstance(node, promql_parser.VectorSelector):
            return
        matchers = {matcher.name: matcher.value for matcher in node.matchers.matchers}
        names = [node.name] if node.name else matchers.pop("__name__").split("|")
        found.extend((name, set(matchers)) for name in names)

    walk(promql_parser.parse(expression), note)
    yield from found


def walk(node: Any, visit: Any) -> None:
    visit(node)
    for name in ("lhs", "rhs", "expr", "args"):
        below = getattr(node, name, None)
        for each in below if isinstance(below, list) else [below]:
            if isinstance(each, promql_parser.Expr) or type(each).__module__ == "promql_parser":
                walk(each, visit)


def grouped(expression: str) -> set[str]:
    """The labels by which an expression groups or joins."""
    lists = re.findall(r"\b(?:by|on) \(([\w, ]*)\)", expression)
    return {name.strip() for names in lists for name in names.split(",") if name.strip()}


def recorded() -> set[str]:
    """The names that rules give."""
    return {rule["record"] for rule in rules() if "record" in rule}


def scraped() -> dict[str, set[str]]:
    """The labels by which each metric that nodes must serve is selected or grouped, by metric."""
    found: dict[str, set[str]] = {}
    for expression in expressions().values():
        metrics = dict(selected(expression))
        for name in metrics.keys() - recorded():
            # Beside recorded metrics a label may be theirs.
            groups = set() if metrics.keys() & recorded() else grouped(expression)
            found.setdefault(name, set()).update(metrics[name] | groups)
    return found
