"""Checks that the cluster can run the workers of a job, before the job makes or waits for anything."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jobs.runtime.logs import logger
from jobs.runtime.progress import doing
from snapfusion.settings import SettingsError


@dataclass(frozen=True, kw_only=True)
class Demand:
    """Workers that must run at the same time.

    Attributes:
        setting: the dotted name of what asks for them, as pairs.teachers.
        bundles: resources of each worker, by Ray's names.
        labels: that the node of each must have.
    """

    setting: str
    bundles: tuple[Mapping[str, float], ...]
    labels: Mapping[str, str]

    def total(self, resource: str) -> float:
        """The amount of a resource that all workers need together."""
        return sum(bundle.get(resource, 0.0) for bundle in self.bundles)

    def describe(self) -> str:
        """As text: "pairs.teachers: 1 worker of 1 CPU, 1 GPU"."""
        each = ", ".join(f"{amount:g} {name}" for name, amount in self.bundles[0].items())
        count = len(self.bundles)
        labels = f" on nodes with {dict(self.labels)}" if self.labels else ""
        return f"{self.setting}: {count} worker{'s' if count > 1 else ''} of {each}{labels}"


_OFFERED: set[str] = set()
"""Settings whose workers the cluster of this process has had room for."""


class ResourcesUnavailable(RuntimeError):
    """A cluster that did not offer the resources of a job in time."""


def refuse_beyond_machine(demands: Sequence[Demand], *, cpus: float) -> None:
    """Check that a local cluster, to which no node will come, can run each group of workers.

    Args:
        demands: the groups.
        cpus: logical CPUs of the cluster; its GPUs are those of this machine.

    Raises:
        SettingsError: naming the setting that asks for more than there is.
    """
    for demand in demands:
        for resource, count in (("GPU", _num_gpus), ("CPU", lambda: cpus)):
            needed = demand.total(resource)
            if needed and needed > (found := count()):
                raise SettingsError(
                    f"--set {demand.setting}: its workers need {needed:g} {resource}s at the same time, and "
                    f"this machine offers {found:g}; ask for less, or give cluster.address"
                )
        # Ray itself labels every node with names of its own.
        if missing := [label for label in demand.labels if not label.startswith("ray.io/")]:
            raise SettingsError(
                f"--set {demand.setting}.labels: this machine has no label {missing[0]!r}; leave it out, or "
                "give cluster.address"
            )


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def wait_for_resources(demands: Sequence[Demand], *, minutes: float) -> None:
    """Wait until a shared cluster has had the resources of each group of workers free at once.

    Reserving them makes an autoscaler start nodes; the reservations are released again.

    Raises:
        ResourcesUnavailable: after `minutes`.
    """
    from ray.util import placement_group, remove_placement_group

    for demand in demands:
        if demand.setting in _OFFERED:
            continue
        group = placement_group(
            [dict(bundle) for bundle in demand.bundles],
            bundle_label_selector=[dict(demand.labels)] * len(demand.bundles) if demand.labels else None,
        )
        try:
            if not group.wait(timeout_seconds=1):
                logger.info(f"  waiting up to {minutes:g} min (cluster.wait) for {demand.describe()}")
                doing(f"waiting for {demand.describe()}")
            if not group.wait(timeout_seconds=60 * minutes):
                raise ResourcesUnavailable(
                    f"the cluster has not offered {demand.describe()} within {minutes:g} min (cluster.wait); "
                    "add nodes, ask for less, or wait longer"
                )
            _OFFERED.add(demand.setting)
        finally:
            remove_placement_group(group)
