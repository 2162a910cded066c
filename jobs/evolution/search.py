"""Architecture evolving, round by round: score every block, remove or copy some, train robustly. Alg. 1.

OUT/begun.json              what it was begun with; something else is refused here
OUT/round-00/scores/        what was drawn with all blocks and without each, a table SAMPLES
OUT/round-00/decision.json  the scores, and what was decided by them; what is here is not done again
OUT/round-01/first/         the changed model at its first weights
OUT/round-01/trained/       the same after robust training; then as in round 0
OUT/architecture.json       what it came to
OUT/history.json            all rounds; written last
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jobs.evaluation.evaluation import StartTable, captions_of
from jobs.evolution.settings import EvolutionSettings
from jobs.training.initial_weights import own_architecture, with_architecture
from jobs.training.progress_channel import OnReport
from jobs.training.run_folder import check_identity
from jobs.training.student import absolute_source
from jobs.training.velocity import check_training_rows, finetune_vpred
from pipelines.datasets.samples import Scores, generate_samples, read_scores
from pipelines.ray_data.execution import Runner
from pipelines.sources.captions import captions_digest
from pipelines.storage.objects import exists, read_bytes, replace_object, write_once
from pipelines.tables.table import Snapshot, TableError, open_table
from snapfusion.evolution.latency import LatencyError, LatencyTable
from snapfusion.evolution.search import BlockScore, Decision, EvolutionError, decide, next_action
from snapfusion.metrics.intervals import Interval, mean
from snapfusion.models.architecture import Architecture, Block
from snapfusion.models.load import load
from snapfusion.settings import digest

HISTORY = "history.json"
ARCHITECTURE = "architecture.json"
_DECISION = "decision.json"
_STARTED = "begun.json"
_MIN_CAPTIONS = 2

ACTION_HOURS = 2.5
"""What the paper took to score one action, in hours of an A100 (Sec. 3.1)."""


@dataclass(frozen=True, kw_only=True)
class EvolutionRound:
    """A round that is over.

    Attributes:
        number: from 0.
        clip: mean score of the whole model, with its interval; None in a round that scored nothing.
        scores: of each block.
        decision: what was decided.
        action_seconds: that one action's scoring took, on average; None likewise.
    """

    number: int
    clip: tuple[float, float, float] | None
    scores: tuple[BlockScore, ...]
    decision: Decision
    action_seconds: float | None

    def to_values(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "number": self.number,
            "clip": self.clip,
            "scores": [score.to_values() for score in self.scores],
            "decision": self.decision.to_values(),
            "action_seconds": self.action_seconds,
        }


@dataclass(frozen=True, kw_only=True)
class Evolution:
    """An evolution: what it begins with and where it is.

    Attributes:
        settings: how; `latency_ms` is set.
        objective_ms: S.
        model: the source of the robust model.
        latents_url: of the table that robust training reads.
        table: T.
        out: folder or URL.
        start: told of each table that is about to be made.
        run: what sends units through the stages.
        on_report: told of the progress of training.
        on_round: told of each round that is over.
    """

    settings: EvolutionSettings
    objective_ms: float
    model: str
    latents_url: str
    table: LatencyTable
    out: str
    start: StartTable
    run: Runner
    on_report: OnReport
    on_round: Callable[[EvolutionRound], None]

    def evolve(self) -> dict[str, Any]:
        """Go on until the objective is met and growth is over; returns what history.json holds.

        Killed at any moment and called again, it goes on where it stood, and scores no block twice.

        Raises:
            EvolutionError: if no architecture meets the objective, a judge gave no number, or `rounds` are
                over before it is met.
            LatencyError: if the table is of other shapes.
            TableError: if LATENTS do not fit the model.
            TrainingError: if another evolution was begun here, or none of the rows is held out.
        """
        self._begin()
        rounds = list(self._rounds())
        last = rounds[-1].decision
        if last.action != "stop":
            raise EvolutionError(
                f"after {len(rounds)} rounds a pass takes {last.after_ms:.4g} ms, and {self.objective_ms:g} "
                "are wanted or growth is left; raise evolution.rounds or evolution.pace.removed"
            )
        history = {
            "objective_ms": self.objective_ms,
            "latency": {"setting": self.table.setup.to_values(), "date": self.table.date},
            "settings": self.settings.deciding(),
            "model": load(self.model).fingerprint(),
            "captions": self.settings.prompts.limit,
            "origin": own_architecture(self.model).to_values(),
            "rounds": [one.to_values() for one in rounds],
        }
        replace_object(f"{self.out}/{ARCHITECTURE}", last.architecture.to_json().encode())
        text = json.dumps(history, indent=1)
        replace_object(f"{self.out}/{HISTORY}", text.encode())
        return dict(json.loads(text))

    def _begin(self) -> None:
        bundle, latents = load(self.model), open_table(self.latents_url, kind="latents")
        check_training_rows(self.settings.training, bundle=bundle, latents=latents)
        tokens = int(bundle.tokenizer.model_max_length)
        if self.table.dimensions.tokens != tokens:
            raise LatencyError(
                f"the latency table is of something else: tokens is {self.table.dimensions.tokens} there, "
                f"{tokens} here"
            )
        identity = {
            "settings": self.settings.deciding(),
            "captions": captions_digest(captions_of(self.settings.prompts)),
            "model": bundle.describe(),
            "table": digest(self.table.to_values()),
        }
        place = f"{self.out}/{_STARTED}"
        write_once(place, json.dumps({"identity": identity}).encode())
        found = json.loads(read_bytes(place))["identity"]
        check_identity(found, identity, url=self.out, kind="evolution")

    def _rounds(self) -> Iterator[EvolutionRound]:
        architecture, model, growths = own_architecture(self.model), self.model, 0
        for number in range(self.settings.rounds):
            found = self._known(number) or self._round(
                number, model=model, architecture=architecture, growths=growths
            )
            self.on_round(found)
            yield found
            if found.decision.action == "stop":
                return
            growths += found.decision.action == "copy"
            architecture = found.decision.architecture
            if number + 1 < self.settings.rounds:
                model = self._trained(number + 1, model=model, architecture=architecture)

    def _known(self, number: int) -> EvolutionRound | None:
        place = self._place(number, _DECISION)
        if not exists(place):
            return None
        told = json.loads(read_bytes(place))
        return EvolutionRound(
            number=number,
            clip=told["clip"],
            scores=tuple(BlockScore.parse(score) for score in told["scores"]),
            decision=Decision.parse(told["decision"]),
            action_seconds=told["action_seconds"],
        )

    def _round(self, number: int, *, model: str, architecture: Architecture, growths: int) -> EvolutionRound:
        limits = self.settings.pace
        action = next_action(
            architecture, table=self.table, objective_ms=self.objective_ms, limits=limits, growths=growths
        )
        clip, scores, seconds = None, tuple[BlockScore, ...](), None
        if action != "stop":
            drawn = self._draw(number, model=model, architecture=architecture)
            clip, scores = self._scored(drawn, architecture)
            seconds = _action_seconds(drawn)
        decision = decide(
            action, architecture, scores, table=self.table, objective_ms=self.objective_ms, limits=limits
        )
        told = EvolutionRound(
            number=number,
            clip=clip,
            scores=scores,
            decision=decision,
            action_seconds=seconds,
        )
        write_once(self._place(number, _DECISION), json.dumps(told.to_values(), indent=1).encode())
        return told

    def _draw(self, number: int, *, model: str, architecture: Architecture) -> Snapshot:
        settings = self.settings
        origin, on_progress = self.start(f"round {number}", {"model": model, "table": self.table.date})
        return generate_samples(
            settings.samples,
            model=absolute_source(model),
            sampler=settings.sampler,
            guidance=(settings.guidance,),
            captions=captions_of(settings.prompts),
            source=settings.prompts.name,
            url=self._place(number, "scores"),
            cuts={cut_name(block): (block.name,) for block in architecture.blocks},
            origin=origin,
            run=self.run,
            on_progress=on_progress,
        )

    def _scored(self, drawn: Snapshot, architecture: Architecture) -> tuple[Interval, tuple[BlockScore, ...]]:
        whole = self._judged(drawn, cut="")
        if whole is None:
            raise EvolutionError("the whole UNet draws nothing that is a picture; train it first")
        return mean(whole.clip), tuple(
            self._score(block, whole=whole, drawn=drawn, architecture=architecture)
            for block in architecture.blocks
        )

    def _score(
        self, block: Block, *, whole: Scores, drawn: Snapshot, architecture: Architecture
    ) -> BlockScore:
        left = self._judged(drawn, cut=cut_name(block))
        shared = [] if left is None else [id_ for id_ in left.ids if id_ in set(whole.ids)]
        clip, delta = None, None
        if left is not None and len(shared) >= _MIN_CAPTIONS:
            clip = float(left.clip.mean(dtype=np.float64))
            delta = mean(_clip_scores(whole, shared) - _clip_scores(left, shared))
        return BlockScore(
            block=block.name,
            kind=block.kind,
            clip=clip,
            delta_clip=delta,
            delta_ms=self.table.block_ms(architecture, block.name),
            captions=len(shared),
        )

    def _judged(self, drawn: Snapshot, *, cut: str) -> Scores | None:
        """What was said of a cut's pictures; None if none of them is one."""
        settings = self.settings
        try:
            found = read_scores(drawn, source=settings.prompts.name, w=settings.guidance, cut=cut)
        except TableError:
            return None
        if not np.isfinite(found.clip).all():
            caption = next(
                id_ for id_, clip in zip(found.ids, found.clip, strict=True) if not math.isfinite(clip)
            )
            raise EvolutionError(
                f"the scorer gave no number for caption {caption} "
                f"{'without ' + cut if cut else 'with all blocks'}; no block can be valued by it: check "
                f"evolution.samples.judging, and remove {drawn.url}"
            )
        return found

    def _trained(self, number: int, *, model: str, architecture: Architecture) -> str:
        first = with_architecture(model, architecture, url=self._place(number, "first"))
        out = self._place(number, "trained")
        finetune_vpred(
            self.settings.training,
            model=first,
            latents_url=self.latents_url,
            out_url=out,
            further=True,
            on_report=self.on_report,
        )
        return f"{out}/model"

    def _place(self, number: int, name: str) -> str:
        return f"{self.out}/round-{number:02d}/{name}"


def cut_name(block: Block) -> str:
    """What pictures drawn without a block are named after; copies have a plus sign, which names must not."""
    return block.name.replace("+", "copy")


def _clip_scores(found: Scores, ids: Sequence[str]) -> np.ndarray:
    place = {id_: number for number, id_ in enumerate(found.ids)}
    clip: np.ndarray = found.clip.astype(np.float64)[[place[id_] for id_ in ids]]
    return clip


def _action_seconds(drawn: Snapshot) -> float:
    """Seconds that one UNet's pictures took to be drawn and judged: of each action, and of the whole."""
    records = drawn.unit_records()
    ways = {record["unit"].rpartition("-w")[0] for record in records}
    return sum(record["seconds"] or 0.0 for record in records) / len(ways)
