"""Trains on a table and publishes a folder: the frame of UNet trainings and of the decoder's distillation."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np

from jobs.runtime.driver_clock import DRIVER_CLOCK
from jobs.training.follower import Follower, check_followed, save_sources, saved_sources
from jobs.training.progress_channel import OnReport, show_reports
from jobs.training.run_folder import FOLLOWED, RunFolder, begin
from jobs.training.settings import TableTrainingSettings
from jobs.training.spec import TrainingError, TrainingFactory
from jobs.training.trainer import TrainingResult, run_trainings
from pipelines.loading.branches import guided_units
from pipelines.loading.buckets import RowCount, TableLoader, make_loader, total_rows
from pipelines.loading.followed import FollowedUnits
from pipelines.loading.following import FollowingLoader
from pipelines.loading.unit_counts import count_rows_to_train
from pipelines.storage.objects import absolute_url
from pipelines.tables.leases import read_leases
from pipelines.tables.table import Snapshot, open_table
from snapfusion.models.bundle import Bundle
from snapfusion.models.load import load
from snapfusion.models.source import absolute_source
from snapfusion.settings import digest

SettingsT = TypeVar("SettingsT", bound=TableTrainingSettings)


@dataclass(frozen=True, kw_only=True)
class TrainingTable:
    """The table that a training reads.

    Attributes:
        role: its key in identities and lineage ("data", "latents", "pairs").
        kind: of its rows.
        url: of the table.
        branches: of TARGETS that training reads (`BRANCHES`); empty for a table without branches.
        sources: gives the names of the sources of its units in their planned order; None where they are
            unknown, so that the table cannot be followed.
    """

    role: str
    kind: Literal["latents", "targets", "pairs"]
    url: str
    branches: Sequence[bool] = ()
    sources: Callable[[], Sequence[str]] | None = None


@dataclass(frozen=True, kw_only=True)
class TrainingInputs(Generic[SettingsT]):
    """All that a worker needs to assemble its trainings.

    Attributes:
        settings: of the training.
        sources: model sources by role.
        table: at the pinned version; the workers open no log.
        counts: training rows of each unit; none of a table that is followed.
        identity: of the training.
        followed: URL of the records of a table that is followed (`pipelines.loading.followed`); else empty.
    """

    settings: SettingsT
    sources: Mapping[str, str]
    table: Snapshot
    counts: Sequence[RowCount]
    identity: Mapping[str, Any]
    followed: str = ""

    def loader(self, columns: Sequence[str]) -> TableLoader:
        """The loader of the table, which may grow."""
        options = self.loading()
        if not self.followed:
            return make_loader(columns=columns, **options)
        del options["counts"]
        units = FollowedUnits(self.followed, table_url=self.table.url)
        return FollowingLoader(units=units, columns=columns, **options)

    def loading(self) -> dict[str, Any]:
        """Arguments that every loader of the pinned table takes."""
        return {
            "table": self.table,
            "global_batch": self.settings.loop.global_batch,
            "seed": self.settings.loop.seed,
            "settings": self.settings.loader,
            "counts": self.counts,
        }


@dataclass(frozen=True, kw_only=True)
class TableTraining(Generic[SettingsT]):
    """A training on a table, from its parents to the published folder.

    Attributes:
        kind: of the folder.
        settings: of the training.
        sources: model sources by role.
        table: to train on.
        factory: assembles trainings from `inputs: TrainingInputs` and `device`.
        check: refuses a table and models that do not go together; its result is passed to `publish`.
        identity: of models and objective; settings and table are added to it.
        publish: writes the files from the results by name, and returns metrics.
    """

    kind: str
    settings: SettingsT
    sources: Mapping[str, str]
    table: TrainingTable
    factory: TrainingFactory
    check: Callable[[Snapshot, Mapping[str, Bundle]], Any]
    identity: Callable[[Mapping[str, Bundle]], Mapping[str, Any]]
    publish: Callable[[Path, Mapping[str, TrainingResult], TrainingInputs[SettingsT], Any], Mapping[str, Any]]

    def run(self, out_url: str, *, on_report: OnReport | None) -> Any:  # noqa: ANN401 - `TrainingMetrics` of its kind
        """Train, and publish the folder at `out_url`, all or nothing; returns the metrics of metrics.json.

        A run that was killed resumes, with the version of the table that it began with. A published folder
        is left as it is.

        Raises:
            TrainingError: if `out_url` holds or has begun something else, no row is held out, or training
                cannot end.
            TrainingFailed: if workers keep failing.
            TableBusy: if another driver runs this training.
        """
        folder = RunFolder(url=absolute_url(out_url), kind=self.kind)
        sources = {role: absolute_source(source) for role, source in self.sources.items()}
        # Table, arithmetic and order are those that the folder was begun with, else the newest.
        settings, pinned = self.settings, {}
        if (stored := folder.stored_identity()) is not None:
            settings, pinned = settings.as_begun(stored.get("settings", {})), stored[self.table.role]
        follows = {}
        if settings.longest_wait is not None:
            follows = {"sources": pinned.get("sources") or self._save_sources(folder)}
        if follows and not pinned:
            self._follower(folder, settings, follows["sources"]).wait_for_rows()
        table = open_table(self.table.url, version=pinned.get("version"), kind=self.table.kind)
        if follows:
            check_followed(table)
        # A model that has two roles, as in self-distillation, is loaded once.
        bundles = {source: load(source) for source in dict.fromkeys(sources.values())}
        models = {role: bundles[source] for role, source in sources.items()}
        checked = self.check(table, models)
        identity = {
            **self.identity(models),
            "settings": settings.identity(),
            self.table.role: {"identity": digest(table.identity), "version": table.version, **follows},
        }
        if (finished := folder.finished(identity)) is None:
            inputs = TrainingInputs(
                settings=settings,
                sources=sources,
                table=table,
                counts=()
                if follows
                else count_rows(table, held_out=settings.loader.held_out, branches=self.table.branches),
                identity=identity,
                followed=_followed_url(folder) if follows else "",
            )
            parents = {self.table.role: table.lineage()} | {
                role: {"source": sources[role], "weights": model.fingerprint()}
                for role, model in models.items()
            }
            # A worker on this node needs the memory.
            del bundles, models
            with folder.exclusive(seconds=settings.trainer.heartbeat_seconds):
                # Another driver may have published it while this one waited.
                finished = folder.finished(identity) or self._train(
                    folder, inputs, parents=parents, checked=checked, on_report=on_report
                )
        folder.delete_checkpoints()
        return finished

    def _train(
        self,
        folder: RunFolder,
        inputs: TrainingInputs[SettingsT],
        *,
        parents: dict[str, dict[str, Any]],
        checked: Any,  # noqa: ANN401 - the result of `check`
        on_report: OnReport | None,
    ) -> dict[str, Any]:
        """Train, and publish the folder; returns the metrics."""
        began = time.monotonic()
        begin(folder.store_url, inputs.identity, kind=self.kind)
        DRIVER_CLOCK.pause()
        with self._table_in_use(folder, inputs, parents=parents):
            results = run_trainings(
                self.factory,
                {"inputs": inputs},
                store_url=folder.store_url,
                settings=inputs.settings.trainer,
                on_report=on_report or show_reports(),
            )
        DRIVER_CLOCK.run_from_now()
        return folder.publish(
            inputs.identity,
            fill=lambda path: {
                **self.publish(path, results, inputs, checked),
                "settings": inputs.settings.to_values(),
                "parents": parents,
                "seconds": round(time.monotonic() - began, 1),
            },
        )

    @contextmanager
    def _table_in_use(
        self, folder: RunFolder, inputs: TrainingInputs[SettingsT], *, parents: dict[str, dict[str, Any]]
    ) -> Iterator[None]:
        """Hold the versions of the parents within the context; of a followed table record the units.

        Afterwards the parent's version is the one that has all units of it that were read.
        """
        role = self.table.role
        # Training lasts for days: meanwhile no vacuum may remove the files of the pinned version.
        with read_leases(parents.values(), purpose=f"the training {folder.url}"):
            if not inputs.followed:
                yield
                return
            follower = self._follower(folder, inputs.settings, inputs.identity[role]["sources"])
            with follower.recording(inputs.followed) as known:
                yield
        parents[role] = dict(known.lineage)

    def _save_sources(self, folder: RunFolder) -> str:
        if self.table.sources is None:
            raise TrainingError(
                f"{self.table.url} cannot be followed, because the order of its units is not known here; "
                "set follow=false"
            )
        return save_sources(_followed_url(folder), self.table.sources())

    def _follower(self, folder: RunFolder, settings: SettingsT, sources: str) -> Follower:
        """Follows the units of the sources that were saved with this digest."""
        return Follower(
            absolute_url(self.table.url),
            sources=saved_sources(_followed_url(folder), sources),
            loader=settings.loader,
            seconds=settings.longest_wait or 0.0,
        )


def _followed_url(folder: RunFolder) -> str:
    return f"{folder.store_url}/{FOLLOWED}"


def count_rows(table: Snapshot, *, held_out: float, branches: Sequence[bool] = ()) -> Sequence[RowCount]:
    """The training rows of each unit of a table.

    Raises:
        TrainingError: if no row is held out for evaluation, of one of the `branches` if there are any.
    """
    counts = count_rows_to_train(table, held_out=held_out)
    held_out_rows = table.units.rows - np.fromiter(map(total_rows, counts), np.int64, len(counts))
    of_branch = guided_units(table.units) if branches else None
    for guided in branches or (None,):
        if not held_out_rows[... if guided is None else of_branch == guided].sum():
            raise TrainingError(
                f"none of the {table.num_rows} rows of {table.url} is held out for evaluation: raise "
                f"loader.held_out (now {held_out}), or add rows"
            )
    return counts
