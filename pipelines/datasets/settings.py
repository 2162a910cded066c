"""Settings of LATENTS, PAIRS, TARGETS, SAMPLES and REFERENCES."""

from __future__ import annotations

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
from snapfusion.mini.vocabulary import NUM_CAPTIONS
from snapfusion.settings import Settings


class LatentsSettings(Settings):
    """How LATENTS are made.

    Attributes:
        shards: bounds on what is read.
        selection: which rows are wanted.
        images: which pictures are used, and what of them.
        encoding: what the encoder does.
        rows_per_unit: rows of one data file.
        device: of the encoder.
        readers: the actor pool that streams, selects and decodes.
        encoders: the actor pool of the VAE.
        writers: the actor pool that packs and writes.
        bounds: when to commit and when to stop.
    """

    shards: ShardSettings = ShardSettings()
    selection: Selection = Selection()
    images: ImageSettings = ImageSettings()
    encoding: Encoding = Encoding()
    rows_per_unit: int = Field(128, ge=1)
    device: Device = Device()
    readers: Pool = Pool()
    encoders: Pool = Pool()
    writers: Pool = Pool(cpus=0.25)
    bounds: Bounds = Bounds()


class PairsSettings(Settings):
    """How PAIRS are made.

    Attributes:
        generation: what the teacher does.
        draws: noises a caption; more of them later adds units, and changes none.
        rows_per_unit: rows of one data file.
        device: of the teacher.
        teachers: the actor pool of the teacher.
        writers: the actor pool that packs and writes.
        bounds: when to commit and when to stop.
    """

    generation: Generation = Generation()
    draws: int = Field(1, ge=1)
    rows_per_unit: int = Field(64, ge=1)
    device: Device = Device()
    teachers: Pool = Pool()
    writers: Pool = Pool()
    bounds: Bounds = Bounds()


class ReferencesSettings(Settings):
    """Which real pictures, and how they are described.

    Attributes:
        name: a short name; units are named after it.
        url: a folder of pictures; None takes the miniature's held-out scenes.
        count: how many, by order of their names, by default each of the miniature's captions twice; a picture
            that cannot be read is set aside, not replaced.
        size: side in pixels of the middle square that a picture is made before it is described; scenes are
            drawn at the miniature's size.
        images: bounds on pictures.
        rows_per_unit: rows of one data file.
        device: of the network.
        describers: the actor pool of the network.
        writers: the actor pool that packs and writes.
        bounds: when to commit and when to stop.
    """

    name: str = Field("scenes", pattern=r"^[A-Za-z0-9_.-]+$")
    url: str | None = None
    count: int = Field(2 * NUM_CAPTIONS, ge=2)
    size: int = Field(512, ge=8)
    images: ImageBounds = ImageBounds()
    rows_per_unit: int = Field(500, ge=1)
    device: Device = Device()
    describers: Pool = Pool()
    writers: Pool = Pool(cpus=0.25)
    bounds: Bounds = Bounds()


class SamplesSettings(Settings):
    """How SAMPLES are made, whatever the model.

    Attributes:
        drawing: what all models have in common: noise, batch, whether pictures are stored.
        judging: what their pictures are judged by.
        rows_per_unit: rows of one data file.
        device: of the model and the judges.
        models: the actor pool of the model and the judges.
        writers: the actor pool that packs and writes.
        bounds: when to commit and when to stop.
    """

    drawing: SamplingSettings = SamplingSettings()
    judging: MetricSettings = MetricSettings()
    rows_per_unit: int = Field(100, ge=1)
    device: Device = Device()
    models: Pool = Pool()
    writers: Pool = Pool(cpus=0.25)
    bounds: Bounds = Bounds()


class TargetsSettings(Settings):
    """How TARGETS are made.

    Attributes:
        teaching: what the teacher computes.
        draws: noises a latent; more of them later adds units, and changes none.
        cfg_probability: fraction of the draws that is guided, p of SnapFusion Eq. 11.
        device: of the teacher.
        readers: the actor pool that reads LATENTS.
        teachers: the actor pool of the teacher.
        writers: the actor pool that packs and writes.
        bounds: when to commit and when to stop.
    """

    teaching: TeacherSettings = TeacherSettings()
    draws: int = Field(1, ge=1)
    cfg_probability: float = Field(0.1, ge=0.0, le=1.0)
    device: Device = Device()
    readers: Pool = Pool(cpus=0.25)
    teachers: Pool = Pool()
    writers: Pool = Pool(cpus=0.25)
    bounds: Bounds = Bounds()
