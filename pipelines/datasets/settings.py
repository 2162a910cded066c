"""Settings of the tables LATENTS, PAIRS, TARGETS, SAMPLES and REFERENCES, and of compacted ones."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from pipelines.ray_data.settings import Pool
from pipelines.sources.settings import ShardSettings
from pipelines.stages.settings import (
    Device,
    Encoding,
    Generation,
    ImageBounds,
    ImageSettings,
    MetricSettings,
    SamplingSettings,
    Selection,
    TeacherSettings,
)
from pipelines.tables.settings import Bounds
from snapfusion.mini.split import Split
from snapfusion.mini.vocabulary import NUM_CAPTIONS
from snapfusion.settings import FOLDER_NAME, Settings, differences
from snapfusion.training.settings import StepDistillationSettings


class BuildSettings(Settings):
    """Settings that all tables share; neither changes a row.

    Attributes:
        writers: the actor pool that packs and writes.
        bounds: when to commit and when to stop.
    """

    writers: Pool = Pool(cpus=0.25)
    bounds: Bounds = Bounds()


class LatentsSettings(BuildSettings):
    """Settings of LATENTS.

    Attributes:
        shards: bounds on what is read.
        selection: bounds on metadata and captions.
        images: bounds on images, and how they are cropped and resized.
        encoding: of the VAE encoder.
        rows_per_unit: rows of one data file.
        decode_seconds: for one image whose size does not bound its time (TIFF, AVIF, a JPEG of many scans);
            afterwards it is rejected.
        device: of the encoder.
        readers: the actor pool that streams, selects and decodes.
        encoders: the actor pool of the VAE.
    """

    shards: ShardSettings = ShardSettings()
    selection: Selection = Selection()
    images: ImageSettings = ImageSettings()
    encoding: Encoding = Encoding()
    rows_per_unit: int = Field(128, ge=1)
    decode_seconds: float = Field(60.0, gt=0.0)
    device: Device = Device()
    readers: Pool = Pool()
    encoders: Pool = Pool()


class PairsSettings(BuildSettings):
    """Settings of PAIRS.

    Attributes:
        generation: of the teacher's sampling.
        draws: noises per caption; increasing it adds units and changes none.
        rows_per_unit: rows of one data file.
        device: of the teacher.
        teachers: the actor pool of the teacher.
    """

    generation: Generation = Generation()
    draws: int = Field(1, ge=1)
    rows_per_unit: int = Field(64, ge=1)
    device: Device = Device()
    teachers: Pool = Pool()
    writers: Pool = Pool()


class ReferencesSettings(BuildSettings):
    """Settings of REFERENCES: which real images, and how they are prepared.

    Attributes:
        name: a short name; prefix of the names of units.
        url: a folder of images, or of tars as img2dataset writes them; None takes the miniature's held-out
            scenes.
        paired: whether they are the images of the evaluation's captions, which are COCO's annotations with
            the ids of images; otherwise the first `count`.
        count: their number, in order of their names; by default two for each of the miniature's captions. An
            image that cannot be read is rejected, not replaced.
        split: of the miniature's captions, whose scenes are taken in turn without a `url`; null takes all.
        first: position of the first scene, so that another set of the same captions can be rendered.
        size: pixels a side of the center square that images are cropped and resized to; scenes keep the
            miniature's size.
        images: bounds on images.
        rows_per_unit: rows of one data file.
        device: of the network.
        describers: the actor pool of the network.
    """

    name: str = Field("scenes", pattern=FOLDER_NAME)
    url: str | None = None
    paired: bool = False
    count: int = Field(2 * NUM_CAPTIONS, ge=2)
    split: Split | None = None
    first: int = Field(0, ge=0)
    size: int = Field(512, ge=8)
    images: ImageBounds = ImageBounds()
    rows_per_unit: int = Field(500, ge=1)
    device: Device = Device()
    describers: Pool = Pool()


class SamplesSettings(BuildSettings):
    """Settings of SAMPLES that all compared models share.

    Attributes:
        drawing: noise, batch, and whether images are stored.
        judging: the networks that score images.
        rows_per_unit: rows of one data file.
        device: of the model and the metric networks.
        models: the actor pool of the model and the metric networks.
    """

    drawing: SamplingSettings = SamplingSettings()
    judging: MetricSettings = MetricSettings()
    rows_per_unit: int = Field(100, ge=1)
    device: Device = Device()
    models: Pool = Pool()


class TargetsSettings(BuildSettings):
    """Settings of TARGETS.

    Attributes:
        teaching: of the teacher's targets.
        draws: noises per latent; increasing it adds units and changes none.
        cfg_probability: fraction of the draws that is guided, p of SnapFusion Eq. 11.
        device: of the teacher.
        readers: the actor pool that reads LATENTS.
        teachers: the actor pool of the teacher.
    """

    teaching: TeacherSettings = TeacherSettings()
    draws: int = Field(1, ge=1)
    cfg_probability: float = Field(0.1, ge=0.0, le=1.0)
    device: Device = Device()
    readers: Pool = Pool(cpus=0.25)
    teachers: Pool = Pool()


def differing_targets(teaching: Mapping[str, Any], steps: StepDistillationSettings) -> list[str]:
    """Describe how the teaching of TARGETS differs from what a training needs.

    Args:
        teaching: values of `TeacherSettings`, as settings or a table's identity have them.
        steps: of the training; settings of a branch that it never takes change nothing for it.
    """
    p, needed = steps.cfg_probability, steps.to_values()
    names = ["student_steps", "k", *["cfg_range"] * (p > 0.0), *["caption_dropout"] * (p < 1.0)]
    return [line for name in names for line in differences(teaching[name], needed[name], name)]


def refused_targets(url: str, differing: Sequence[str]) -> str:
    """The message that refuses the TARGETS at `url`, by the first differences."""
    return (
        f"{url} does not fit this training: {'; '.join(differing[:3])}; train as it was made, or compute new "
        "targets"
    )


class CompactionSettings(Settings):
    """Settings of a compacted table.

    Attributes:
        file_mib: MiB of a data file, at most, unless one of the parent is larger already.
        bounds: when to commit.
        compactors: the actor pool that reads and writes.
    """

    file_mib: float = Field(64.0, gt=0.0)
    bounds: Bounds = Bounds()
    compactors: Pool = Pool()
