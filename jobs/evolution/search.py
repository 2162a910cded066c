"""Architecture evolution in rounds: score every block, remove or copy some, train. SnapFusion Alg. 1.

OUT/begun.json              identity that the evolution was begun with
OUT/round-00/scores/        samples of the whole UNet and without each block, a table SAMPLES
OUT/round-00/decision.json  scores and decision of a finished round
OUT/round-01/first/         the changed model with its initial weights
OUT/round-01/trained/       the same after robust training; then as in round 0
OUT/architecture.json       the final architecture
OUT/history.json            all rounds; written last
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jobs.evaluation.captions import captions_of
from jobs.evaluation.curve_tables import StartTable
from jobs.evolution.settings import EvolutionSettings
from jobs.runtime.logs import logger
from jobs.runtime.progress import format_duration
from jobs.training.initial_weights import own_architecture, with_architecture
from jobs.training.run_folder import begin
from jobs.training.velocity import check_training, finetune_vpred
from pipelines.datasets.samples import Scores, generate_samples, read_scores, source_name
from pipelines.ray_data.execution import Runner
from pipelines.sources.captions import captions_digest
from pipelines.storage.objects import exists, replace_object, write_once
from pipelines.storage.records import read_record
from pipelines.tables.schemas import from_png
from pipelines.tables.table import Snapshot, TableError, open_table
from snapfusion.evolution.latency import LatencyError, LatencyTable, MeasurementSetup
from snapfusion.evolution.search import BlockScore, Decision, EvolutionError, decide, next_action
from snapfusion.metrics.intervals import Interval, mean
from snapfusion.models.architecture import Architecture, Block
from snapfusion.models.load import load
from snapfusion.models.source import absolute_source
from snapfusion.settings import Settings, digest

HISTORY = "history.json"
ARCHITECTURE = "architecture.json"
_DECISION = "decision.json"
_MIN_CAPTIONS = 2

ACTION_HOURS = 2.5
"""Time to score one action in the paper, in hours of an A100 (Sec. 3.1)."""


class EvolutionRound(Settings):
    """A finished round, as decision.json holds it.

    Attributes:
        number: from 0.
        clip: mean CLIP score of the whole model with its interval; null in a round that scored nothing.
        scores: of each block.
        decision: of the round.
        action_seconds: mean time to score one action; null likewise.
    """

    number: int
    clip: tuple[float, float, float] | None
    scores: tuple[BlockScore, ...]
    decision: Decision
    action_seconds: float | None


class TableOrigin(Settings):
    """The machine, runtime and time of a latency table's measurement."""

    setting: MeasurementSetup
    date: str


class EvolutionHistory(Settings):
    """A finished evolution, as history.json holds it.

    Attributes:
        objective_ms: latency objective S.
        latency: origin of the latency table.
        settings: that determine the result.
        model: hashes of the robust model's weights.
        captions: number of captions by which blocks are scored.
        origin: architecture before the first round.
        rounds: in order.
    """

    objective_ms: float
    latency: TableOrigin
    settings: dict[str, Any]
    model: dict[str, str]
    captions: int
    origin: Architecture
    rounds: tuple[EvolutionRound, ...]


@dataclass(frozen=True, kw_only=True)
class Evolution:
    """An evolution in the folder `out`.

    Attributes:
        settings: of the evolution.
        objective_ms: latency objective S.
        model: source of the robust model.
        latents_url: URL of LATENTS for robust training.
        table: latency table T.
        out: folder or URL.
        start: called for each table before it is filled.
        run: executes stages.
    """

    settings: EvolutionSettings
    objective_ms: float
    model: str
    latents_url: str
    table: LatencyTable
    out: str
    start: StartTable
    run: Runner

    def evolve(self) -> EvolutionHistory:
        """Run rounds until the objective is met and growth is over.

        Killed at any moment and called again, it resumes, and scores no block twice.

        Raises:
            EvolutionError: if no architecture meets the objective, a score is not finite, or the rounds end
                before the objective is met.
            LatencyError: if the table is of other shapes.
            TableError: if LATENTS do not fit the model.
            TrainingError: if another evolution was begun here, or no row is held out.
        """
        self._begin()
        rounds = list(self._rounds())
        last = rounds[-1].decision
        if last.action != "stop":
            raise EvolutionError(
                f"after {len(rounds)} rounds a pass takes {last.after_ms:.4g} ms, and the objective of "
                f"{self.objective_ms:g} ms is not met, or growths are left: raise evolution.rounds or "
                "evolution.pace.removed"
            )
        history = EvolutionHistory(
            objective_ms=self.objective_ms,
            latency=TableOrigin(setting=self.table.setup, date=self.table.date),
            settings=self.settings.identity(),
            model=load(self.model).fingerprint(),
            captions=self.settings.prompts.num_images,
            origin=own_architecture(self.model),
            rounds=tuple(rounds),
        )
        replace_object(f"{self.out}/{ARCHITECTURE}", last.architecture.to_json().encode())
        replace_object(f"{self.out}/{HISTORY}", json.dumps(history.to_values(), indent=1).encode())
        return history

    def _begin(self) -> None:
        bundle, latents = load(self.model), open_table(self.latents_url, kind="latents")
        check_training(self.settings.training, bundle=bundle, latents=latents)
        tokens = int(bundle.tokenizer.model_max_length)
        if self.table.dimensions.tokens != tokens:
            raise LatencyError(
                f"the latency table is of other shapes: tokens is {self.table.dimensions.tokens} there, "
                f"{tokens} here"
            )
        identity = {
            "settings": self.settings.identity(),
            "captions": captions_digest(captions_of(self.settings.prompts)),
            "model": bundle.describe(),
            "table": digest(self.table.to_values()),
        }
        begin(self.out, identity, kind="evolution")

    def _rounds(self) -> Iterator[EvolutionRound]:
        architecture, model, growths = own_architecture(self.model), self.model, 0
        for number in range(self.settings.rounds):
            finished = self._read_round(number) or self._run_round(
                number, model=model, architecture=architecture, growths=growths
            )
            logger.info(f"  {describe_round(finished)}")
            yield finished
            if finished.decision.action == "stop":
                return
            growths += finished.decision.action == "copy"
            architecture = finished.decision.architecture
            # The last round's model would be trained for nothing.
            if number + 1 < self.settings.rounds:
                model = self._train(number + 1, model=model, architecture=architecture)

    def _read_round(self, number: int) -> EvolutionRound | None:
        url = self._url(number, _DECISION)
        return EvolutionRound.parse(read_record(url)) if exists(url) else None

    def _run_round(
        self, number: int, *, model: str, architecture: Architecture, growths: int
    ) -> EvolutionRound:
        rules: dict[str, Any] = {
            "table": self.table,
            "objective_ms": self.objective_ms,
            "limits": self.settings.pace,
        }
        action = next_action(architecture, growths=growths, **rules)
        clip, scores, seconds = None, tuple[BlockScore, ...](), None
        if action != "stop":
            samples = self._sample(number, model=model, architecture=architecture)
            clip, scores = self._score_blocks(samples, architecture)
            seconds = _action_seconds(samples)
        decision = decide(action, architecture, scores, **rules)
        finished = EvolutionRound(
            number=number, clip=clip, scores=scores, decision=decision, action_seconds=seconds
        )
        # The commit point of a round: what follows is derived from the decision, so it is written once.
        write_once(self._url(number, _DECISION), json.dumps(finished.to_values(), indent=1).encode())
        return finished

    def _sample(self, number: int, *, model: str, architecture: Architecture) -> Snapshot:
        settings = self.settings
        origin, on_progress = self.start(f"round {number}", {"model": model, "table": self.table.date})
        return generate_samples(
            settings.samples,
            model=absolute_source(model),
            sampler=settings.sampler,
            guidance=(settings.guidance,),
            captions=captions_of(settings.prompts),
            source=settings.prompts.name,
            url=self._url(number, "scores"),
            cuts={cut_name(block): (block.name,) for block in architecture.blocks},
            origin=origin,
            run=self.run,
            on_progress=on_progress,
        )

    def _score_blocks(
        self, samples: Snapshot, architecture: Architecture
    ) -> tuple[Interval, tuple[BlockScore, ...]]:
        whole = self._read_scores(samples, cut="")
        if whole is None:
            raise EvolutionError("the whole UNet generates no finite image; train it first")
        return mean(whole.clip), tuple(
            self._score_block(block, whole=whole, samples=samples, architecture=architecture)
            for block in architecture.blocks
        )

    def _score_block(
        self, block: Block, *, whole: Scores, samples: Snapshot, architecture: Architecture
    ) -> BlockScore:
        without = self._read_scores(samples, cut=cut_name(block))
        # Without the block some images may be lost: the difference is over captions that have both.
        shared = [] if without is None else [id_ for id_ in without.ids if id_ in set(whole.ids)]
        clip, delta = None, None
        if without is not None and len(shared) >= _MIN_CAPTIONS:
            clip = float(without.clip.mean(dtype=np.float64))
            delta = mean(_clip_scores(whole, shared) - _clip_scores(without, shared))
        return BlockScore(
            block=block.name,
            kind=block.kind,
            clip=clip,
            delta_clip=delta,
            delta_ms=self.table.block_ms(architecture, block.name),
            captions=len(shared),
        )

    def _read_scores(self, samples: Snapshot, *, cut: str) -> Scores | None:
        """The scores of the UNet without some blocks; None if it generated no finite image."""
        settings = self.settings
        try:
            scores = read_scores(samples, source=settings.prompts.name, w=settings.guidance, cut=cut)
        except TableError:
            return None
        if not np.isfinite(scores.clip).all():
            caption = next(
                id_ for id_, clip in zip(scores.ids, scores.clip, strict=True) if not math.isfinite(clip)
            )
            raise EvolutionError(
                f"the score of caption {caption} {'without ' + cut if cut else 'with all blocks'} is not "
                f"finite: check evolution.samples.judging, and remove {samples.url}"
            )
        return scores

    def _train(self, number: int, *, model: str, architecture: Architecture) -> str:
        """Train the changed model robustly; returns its source."""
        url = self._url(number, "trained")
        finetune_vpred(
            self.settings.training,
            model=with_architecture(model, architecture, url=self._url(number, "first")),
            latents_url=self.latents_url,
            out_url=url,
            further=True,
        )
        return f"{url}/model"

    def _url(self, number: int, name: str) -> str:
        return f"{self.out}/round-{number:02d}/{name}"


def describe_round(finished: EvolutionRound) -> str:
    """One line about a finished round."""
    decision = finished.decision
    if decision.action == "stop":
        return f"round {finished.number}: {decision.after_ms:.4g} ms, objective met"
    clip = "" if finished.clip is None else f"CLIP {finished.clip[0]:.4f}; "
    verb = {"remove": "removed", "copy": "copied"}[decision.action]
    return (
        f"round {finished.number}: {clip}{verb} {', '.join(decision.blocks)}: {decision.before_ms:.4g} to "
        f"{decision.after_ms:.4g} ms"
    )


def describe_cost(settings: EvolutionSettings) -> str:
    """Describe the cost of scoring an action, beside the paper's."""
    captions, steps = settings.prompts.num_images, settings.sampler.steps
    paper_ms = 3.6e6 * ACTION_HOURS / (2_000 * 50)
    hours = captions * steps * paper_ms / 3.6e6
    return (
        f"each action: {captions:,} captions of {steps} steps at guidance {settings.guidance:g}; the paper's "
        f"2,000 captions of 50 steps took {ACTION_HOURS} A100 hours, {paper_ms:.0f} ms a guided step of "
        f"SD-v1.5, at which rate this takes {format_duration(3600 * hours)}"
    )


def round_images(
    settings: EvolutionSettings, history: EvolutionHistory, *, out: str, limit: int
) -> tuple[list[str], dict[str, list[np.ndarray]]]:
    """The first captions, and images of them by the whole UNet of each scored round, if images were kept."""
    captions, images = list[str](), dict[str, list[np.ndarray]]()
    if not settings.samples.drawing.images:
        return captions, images
    prefix = f"{source_name(settings.prompts.name, settings.guidance)}-"
    for finished in history.rounds:
        if finished.clip is not None:
            table = open_table(f"{out}/round-{finished.number:02d}/scores")
            unit = next(file for file in table.units if file.unit.startswith(prefix))
            rows = table.read_unit(unit, ["caption", "image"]).slice(0, limit).to_pylist()
            captions = [row["caption"] for row in rows]
            images[f"round {finished.number}"] = [from_png(row["image"]) for row in rows]
    return captions, images


def cut_name(block: Block) -> str:
    """Name of the samples without a block: names must not have the plus sign of a copied block."""
    return block.name.replace("+", "copy")


def _clip_scores(scores: Scores, ids: Sequence[str]) -> np.ndarray:
    index_of = {id_: index for index, id_ in enumerate(scores.ids)}
    clip: np.ndarray = scores.clip.astype(np.float64)[[index_of[id_] for id_ in ids]]
    return clip


def _action_seconds(samples: Snapshot) -> float:
    """Mean seconds to generate and score one UNet's samples, over the whole UNet and each action."""
    records = samples.unit_records()
    unets = {record.unit.rpartition("-w")[0] for record in records}
    return sum(record.seconds or 0.0 for record in records) / len(unets)
