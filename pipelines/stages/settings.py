"""Settings of the stages: which rows are used, and how images, latents and scores are computed."""

from typing import Any, Final, Literal, Self

from pydantic import Field, NonNegativeInt, field_validator, model_validator

from snapfusion.metrics.settings import INCEPTION_FEATURES, Preference, Resize
from snapfusion.mini.vocabulary import ATTRIBUTES, IMAGE_SIZE, ORACLE_FEATURES
from snapfusion.settings import Settings
from snapfusion.solver_names import Solver
from snapfusion.training.settings import CfgRange, TargetSettings


class Blocklists(Settings):
    """URLs of blocklists: UTF-8 text files with one entry a line; lines that begin with # are comments.

    Attributes:
        domains: hosts; each blocks its subdomains too. `*.example.org` is the same as `example.org`.
        hashes: SHA-256 or MD5 of an image's bytes, COYO's `image_phash` (16 hexadecimal digits), or LAION's
            `hash` (an integer).
        terms: words or phrases, in any case, that a caption must not contain.
    """

    domains: str | None = None
    hashes: str | None = None
    terms: str | None = None


class Encoding(Settings):
    """Settings of the VAE encoder; every field changes the rows.

    Attributes:
        batch_size: images in a forward pass; fixed, because bits depend on it.
    """

    batch_size: int = Field(16, ge=1)


class Device(Settings):
    """Device of a stage's network.

    Attributes:
        kind: "auto" takes the GPU if there is one.
        dtype: of the network; arithmetic outside of it is float32.
        threads: CPU threads of one actor.
    """

    kind: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    threads: int = 1


Crop = Literal["center", "top", "random"]


class Buckets(Settings):
    """Bounds on the aspect buckets that images are cropped to; see `buckets_of`.

    Attributes:
        max_aspect: largest ratio of the longer to the shorter side.
        min_side: least pixels of the shorter side; null for no bound.
        max_side: most pixels of the longer side; null for no bound.
    """

    max_aspect: float = Field(2.0, ge=1.0)
    min_side: int | None = Field(None, ge=1)
    max_side: int | None = Field(None, ge=1)


class Generation(Settings):
    """Settings of the teacher's sampling; every field changes the rows.

    Attributes:
        steps: DDIM steps (50 in SnapFusion Sec. 3.2).
        guidance: w of SnapFusion Eq. 3.
        guidance_range: range of which w is drawn for each row instead, from its noise key; null takes
            `guidance`.
        batch_size: rows in a forward pass (twice that with guidance); fixed, because bits depend on it.
        images: whether the teacher's decoded image is stored beside the latent.
        seed: of the noise keys.
        size: pixels a side of the images; null takes the teacher's own size.
    """

    steps: int = Field(50, ge=1, le=1000)
    guidance: float = Field(7.5, ge=1.0)
    guidance_range: CfgRange | None = None
    batch_size: int = Field(8, ge=1)
    images: bool = True
    seed: int = Field(0, ge=0)
    size: int | None = Field(None, ge=1)

    @property
    def is_guided(self) -> bool:
        """Whether a step takes two passes of the UNet."""
        return self.guidance_range is not None or self.guidance != 1.0

    @property
    def guidance_text(self) -> str:
        """The guidance in words, such as "2.5" or "1 to 6"."""
        if self.guidance_range is None:
            return f"{self.guidance:g}"
        return f"{self.guidance_range.low:g} to {self.guidance_range.high:g}"

    def identity(self) -> dict[str, Any]:
        """The settings as JSON values; without a range of guidance, as in tables of version 0.1."""
        values = self.to_values()
        if self.guidance_range is None:
            del values["guidance_range"]
        return values


# Pillow itself fails at twice this number, so a higher bound would have no effect.
_PILLOW_MAX_PIXELS: Final = 89_478_485


class ImageBounds(Settings):
    """Bounds on images.

    Attributes:
        min_side: least pixels of the shorter side; an image between this and the target size is enlarged.
        max_pixels: largest width times height; an image above it is rejected by its header, undecoded.
    """

    min_side: int = Field(16, ge=2)
    max_pixels: int = Field(1 << 25, ge=4, le=_PILLOW_MAX_PIXELS)


class ImageSettings(ImageBounds):
    """Bounds on images, and how they are cropped and resized.

    Attributes:
        size: pixels a side of the square they are cropped to; null takes the model's own size. A multiple of
            the model's granularity, 64 for Stable Diffusion.
        buckets: rectangles of at most that area; an image is cropped to the one nearest to its aspect. Null
            for the square alone.
        crop: the part that is kept: the "center"; the "top" of a tall and the center of a wide image; or a
            "random" part, which follows from the seed and the row's id.
        crop_seed: of random crops.
    """

    size: int | None = Field(None, ge=1)
    buckets: Buckets | None = None
    crop: Crop = "center"
    crop_seed: int = Field(0, ge=0)


class _NetworkSettings(Settings):
    """Settings of a network that is bundled, or read from a file of weights."""

    network: str
    weights: str | None = None
    sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")

    @model_validator(mode="after")
    def _has_weights(self) -> Self:
        if (self.network in ("oracle", "mini")) == (self.weights is not None):
            raise ValueError("weights must be a file for inception and open_clip, null for bundled networks")
        return self


class FeatureSettings(_NetworkSettings):
    """Settings of the network whose features FID compares.

    Attributes:
        network: the miniature's oracle, or Inception v3.
        weights: file of Inception, as `pinned_file` accepts it; the oracle is bundled.
        sha256: of that file.
        resize: kernel that resizes images to Inception's 299 pixels.
        scaled_to: side in pixels to which images are first resized by Lanczos, as evaluations of few-step
            models do to 256; null for none.
    """

    network: Literal["oracle", "inception"] = "oracle"
    resize: Resize = "bicubic"
    scaled_to: int | None = Field(None, ge=8)


class ScorerSettings(_NetworkSettings):
    """Settings of the CLIP scorer.

    Attributes:
        network: "mini" for the bundled scorer, or a model of open_clip, such as "ViT-g-14".
        weights: file of the latter, as `pinned_file` accepts it.
        sha256: of that file.
    """

    network: str = "mini"


class PreferenceSettings(Settings):
    """Settings of a score by a network of CLIP's shape that was trained on which images people prefer.

    Attributes:
        name: "pickscore" or "hpsv2".
        weights: file of the network, as `pinned_file` accepts it.
        sha256: of that file.
        shape: of the network, by its name in open_clip.
    """

    name: Preference
    weights: str
    sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")
    shape: str = "ViT-H-14"


class MetricSettings(Settings):
    """Networks that images are scored by; the defaults are the miniature's.

    Attributes:
        features: for FID.
        scorer: for the CLIP score.
        preferences: further scores, each once.
    """

    features: FeatureSettings = FeatureSettings()
    scorer: ScorerSettings = ScorerSettings()
    preferences: tuple[PreferenceSettings, ...] = ()

    @field_validator("preferences")
    @classmethod
    def _are_different(cls, preferences: tuple[PreferenceSettings, ...]) -> tuple[PreferenceSettings, ...]:
        names = [one.name for one in preferences]
        if len(set(names)) < len(names):
            raise ValueError(f"scores repeat: {', '.join(names)}")
        return preferences

    def identity(self) -> dict[str, Any]:
        """The settings as JSON values; what is off is absent, as in records of version 0.1."""
        values = self.to_values()
        return values if self.preferences else {key: values[key] for key in values if key != "preferences"}

    @property
    def feature_count(self) -> int:
        """Length of a feature vector."""
        return ORACLE_FEATURES if self.features.network == "oracle" else INCEPTION_FEATURES

    @property
    def attribute_count(self) -> int:
        """Number of attributes that the oracle reads; 0 without the oracle."""
        return len(ATTRIBUTES) if self.features.network == "oracle" else 0

    @property
    def side(self) -> int | None:
        """Pixels a side of images that the oracle reads; None without it, because Inception resizes."""
        return IMAGE_SIZE if self.features.network == "oracle" else None


class Sampler(Settings):
    """Settings of the sampler, from noise to a latent.

    Attributes:
        solver: one of `snapfusion.solver_names.SOLVERS`.
        steps: of the trailing grid.
        guidance_rescale: share of the output whose standard deviation is that of the conditional one (Lin et
            al. 2023); 0 for none.
        guidance_interval: first and last timestep with guidance (Kynkäänniemi et al. 2024), of 0 to 999;
            null guides at all.
        negative_prompt: the caption that guidance leads away from, instead of the empty one.
    """

    solver: Solver = "ddim"
    steps: int = Field(50, ge=1, le=1000)
    guidance_rescale: float = Field(0.0, ge=0, le=1)
    guidance_interval: tuple[NonNegativeInt, NonNegativeInt] | None = None
    negative_prompt: str = Field("", max_length=2_000)

    @field_validator("guidance_interval")
    @classmethod
    def _is_increasing(cls, interval: tuple[int, int] | None) -> tuple[int, int] | None:
        if interval is not None and interval[0] > interval[1]:
            raise ValueError(f"the first timestep, {interval[0]}, is above the last, {interval[1]}")
        return interval

    def evaluations(self, w: float, *, w_conditioned: bool = False) -> int:
        """Evaluations of the UNet for one image at guidance `w`: one a step, and one more if it is guided.

        Not with w = 1, nor if w is an input of the UNet.
        """
        return self.steps + (0 if w_conditioned or w == 1.0 else self._guided_steps())

    def identity(self) -> dict[str, Any]:
        """The settings as JSON values; what is off is absent, as in tables of version 0.1."""
        return {"solver": self.solver, "steps": self.steps} | self.model_dump(
            mode="json", exclude_defaults=True
        )

    def _guided_steps(self) -> int:
        if self.guidance_interval is None:
            return self.steps
        from snapfusion.sampling import time_grid

        low, high = self.guidance_interval
        return sum(low <= t <= high for t in time_grid(self.steps)[:-1])


class SamplingSettings(Settings):
    """Settings of sampling that all compared models share; every field changes the rows.

    Attributes:
        batch_size: rows in a forward pass (twice that with guidance); fixed, because bits depend on it.
        seed: of the noise keys. A caption's noise follows from this and its id, so that every model, solver
            and guidance starts from the same noise.
        images: whether the image is stored.
        size: pixels a side of the images; null takes the model's own size.
    """

    batch_size: int = Field(50, ge=1)
    seed: int = Field(0, ge=0)
    images: bool = False
    size: int | None = Field(None, ge=1)


class Selection(Settings):
    """Bounds on metadata and captions; None and () set none. A value equal to its bound is accepted.

    A value that is missing, null or NaN violates no bound. The columns that a bound reads are in
    `pipelines.sources.layouts.SPELLINGS`, under the meanings that `BOUNDS` gives it.

    Attributes:
        min_width: pixels of the original image.
        min_height: pixels of the original image.
        min_side: pixels of its shorter side.
        max_aspect: longer side over shorter side; 1 accepts squares alone. COYO was cut at 3.
        min_aesthetic: LAION's aesthetic score, about 1 to 10.
        max_watermark: probability of a watermark, 0 to 1.
        max_unsafe: probability of unsafe content, 0 to 1; the highest of several detectors counts.
        refused_tags: values of LAION's NSFW column to reject, in any case.
        min_similarity: cosine of CLIP's image and text features, -1 to 1. The CLIP model depends on the data
            set: COYO's mean is 0.29 by ViT-B/32 and 0.25 by ViT-L/14, and LAION-400M was cut at 0.3.
        languages: values of the LANGUAGE column to accept, as they are spelled there ("en"), in any case.
            Only LAION-5B's parts multi and nolang have the column.
        min_caption_chars: characters of the caption, runs of white space counted as one.
        max_caption_chars: likewise; the text encoder itself reads 77 tokens of any caption.
        min_caption_words: words of the caption, separated by white space.
        min_latin_share: share of Latin letters among its letters, 0 to 1; a caption without any is accepted.
    """

    min_width: int | None = Field(None, ge=1)
    min_height: int | None = Field(None, ge=1)
    min_side: int | None = Field(None, ge=1)
    max_aspect: float | None = Field(None, ge=1)
    min_aesthetic: float | None = None
    max_watermark: float | None = Field(None, ge=0, le=1)
    max_unsafe: float | None = Field(None, ge=0, le=1)
    refused_tags: tuple[Literal["UNLIKELY", "UNSURE", "NSFW"], ...] = ()
    min_similarity: float | None = Field(None, ge=-1, le=1)
    languages: tuple[str, ...] = ()
    min_caption_chars: int | None = Field(None, ge=1)
    max_caption_chars: int | None = Field(None, ge=1)
    min_caption_words: int | None = Field(None, ge=1)
    min_latin_share: float | None = Field(None, ge=0, le=1)


class TeacherSettings(TargetSettings):
    """Settings of the teacher's targets; every field changes the rows.

    Attributes:
        student_steps: N_S, the steps of the student's grid.
        k: the teacher's steps for one of the student's, on the grid of k * N_S steps; 2 in SnapFusion.
        cfg_range: of w in guided rows.
        caption_dropout: fraction of vanilla rows without their caption (ours, see `draw_caption_dropout`);
            their `token_ids` are the empty caption's, so that teacher and student have the same condition.
        batch_size: rows in a forward pass (twice that with guidance); fixed, because bits depend on it.
        x_dtype: of the stored target, which is computed in float32.
        seed: of the noise keys.
    """

    student_steps: int = Field(8, ge=1, le=1000)
    k: int = Field(2, ge=1, le=1000)
    batch_size: int = Field(16, ge=1)
    x_dtype: Literal["float16", "float32"] = "float16"
    seed: int = Field(0, ge=0)
