"""Settings of the stages."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from pydantic import Field, model_validator

from snapfusion.metrics.settings import INCEPTION_FEATURES, INCEPTION_SIZE, Resize
from snapfusion.mini.vocabulary import ATTRIBUTES, IMAGE_SIZE, ORACLE_FEATURES
from snapfusion.mini.weights import WEIGHTS
from snapfusion.settings import Settings
from snapfusion.solver_names import Solver
from snapfusion.training.settings import TargetSettings

if TYPE_CHECKING:
    import torch


class Blocklists(Settings):
    """Text files (UTF-8) of one entry a line, local or on any store; lines that begin with # are comments.

    Attributes:
        domains: hosts; each blocks the domains below it too. `*.example.org` is the same as `example.org`.
        hashes: SHA-256 or MD5 of a picture's bytes, COYO's `image_phash` (16 hexadecimal digits), or LAION's
            `hash` (an integer).
        terms: words or phrases that a caption must not hold, in any case of letters.
    """

    domains: str | None = None
    hashes: str | None = None
    terms: str | None = None


class Encoding(Settings):
    """How images are encoded; every field changes the rows.

    Attributes:
        batch_size: images the encoder sees at once; fixed, because bits depend on it.
    """

    batch_size: int = Field(16, ge=1)


class Device(Settings):
    """Where a stage's network runs.

    Attributes:
        kind: "auto" takes the accelerator if there is one.
        dtype: of the network; arithmetic round it is float32.
        threads: CPU threads of one actor.
    """

    kind: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    threads: int = 1

    def prepare(self) -> str:
        """Set the number of threads; the torch device to use."""
        import torch

        torch.set_num_threads(self.threads)
        return ("cuda" if torch.cuda.is_available() else "cpu") if self.kind == "auto" else self.kind

    @property
    def torch_dtype(self) -> torch.dtype:
        """The network's dtype."""
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def environment(self) -> dict[str, Any]:
        """What the account of a unit records: bits are promised to be the same within equal environments."""
        import torch

        device = self.prepare()
        kind = torch.cuda.get_device_name() if device == "cuda" else torch.backends.cpu.get_cpu_capability()
        return {
            "device": f"{device} {kind}",
            "dtype": self.dtype,
            "threads": self.threads,
            "torch": torch.__version__,
        }


Crop = Literal["center", "top", "random"]


class Buckets(Settings):
    """Bounds on the rectangles that pictures may become; see `buckets_of`.

    Attributes:
        max_aspect: longer side by shorter side, at most.
        min_side: pixels of the shorter side, at least; null for no bound.
        max_side: pixels of the longer side, at most; null for no bound.
    """

    max_aspect: float = Field(2.0, ge=1.0)
    min_side: int | None = Field(None, ge=1)
    max_side: int | None = Field(None, ge=1)


class Generation(Settings):
    """How the teacher draws; every field changes the rows.

    Attributes:
        steps: DDIM steps (50 in SnapFusion Sec. 3.2).
        guidance: w of SnapFusion Eq. 3.
        batch_size: rows the UNet sees at once (twice that with guidance); fixed, because bits depend on it.
        images: whether the teacher's decoded image is stored beside the latent.
        seed: of the noise keys.
        size: side of the pictures in pixels; null takes the teacher's own.
    """

    steps: int = Field(50, ge=1, le=1000)
    guidance: float = Field(7.5, ge=1.0)
    batch_size: int = Field(8, ge=1)
    images: bool = True
    seed: int = Field(0, ge=0)
    size: int | None = Field(None, ge=1)


# Pillow gives up by itself at twice this number, so that a higher bound of ours would not hold.
_PILLOW_MAX_PIXELS: Final = 89_478_485


class ImageBounds(Settings):
    """Bounds on pictures.

    Attributes:
        min_side: shorter sides below this many pixels are rejected; between it and the size that they are
            to have they are enlarged.
        max_pixels: width times height above which a picture is rejected by its header, undecoded.
    """

    min_side: int = Field(16, ge=2)
    max_pixels: int = Field(1 << 25, ge=4, le=_PILLOW_MAX_PIXELS)


class ImageSettings(ImageBounds):
    """Which pictures are used, and what of them.

    Attributes:
        size: side of the square that they become, in pixels; null takes the model's own. A multiple of the
            model's granularity, 64 for Stable Diffusion.
        buckets: rectangles of that area at most, of which a picture becomes the one nearest to its aspect;
            null for the square alone.
        crop: what is kept of a picture that is too long for its frame: its "center"; the center of a wide and
            the "top" of a tall one; or a "random" part, which follows from the seed and the row's id.
        crop_seed: of random crops.
    """

    size: int | None = Field(None, ge=1)
    buckets: Buckets | None = None
    crop: Crop = "center"
    crop_seed: int = Field(0, ge=0)


_SHA256 = r"^[0-9a-f]{64}$"


class FeatureSettings(Settings):
    """Where the features of FID come from.

    Attributes:
        network: the miniature's oracle, or Inception v3.
        weights: of Inception, as `pinned_file` accepts it; the oracle is bundled.
        sha256: of that file.
        resize: the kernel from the picture's size to Inception's 299 pixels.
    """

    network: Literal["oracle", "inception"] = "oracle"
    weights: str | None = None
    sha256: str | None = Field(None, pattern=_SHA256)
    resize: Resize = "bicubic"

    @model_validator(mode="after")
    def _has_weights(self) -> FeatureSettings:
        if (self.network == "inception") != (self.weights is not None):
            raise ValueError("weights are a file for inception, and null for the oracle, which is bundled")
        return self


class ScorerSettings(Settings):
    """Which CLIP scores.

    Attributes:
        network: "mini" is the bundled scorer; any other name is a model of open_clip, such as "ViT-g-14".
        weights: of the latter, as `pinned_file` accepts it.
        sha256: of that file.
    """

    network: str = "mini"
    weights: str | None = None
    sha256: str | None = Field(None, pattern=_SHA256)

    @model_validator(mode="after")
    def _has_weights(self) -> ScorerSettings:
        if (self.network != "mini") != (self.weights is not None):
            raise ValueError(
                "weights are a file for a model of open_clip, and null for mini, which is bundled"
            )
        return self


def _file(settings: FeatureSettings | ScorerSettings) -> Path:
    if settings.weights is None:
        raise ValueError(f"{settings.network} needs a file of weights")
    from snapfusion.metrics.pinned import pinned_file

    return pinned_file(settings.weights, sha256=settings.sha256)


class MetricSettings(Settings):
    """What pictures are judged by. The defaults are the miniature's.

    Attributes:
        features: for FID.
        scorer: for CLIP.
    """

    features: FeatureSettings = FeatureSettings()
    scorer: ScorerSettings = ScorerSettings()

    @property
    def feature_count(self) -> int:
        """Numbers in a feature vector."""
        return ORACLE_FEATURES if self.features.network == "oracle" else INCEPTION_FEATURES

    @property
    def attribute_count(self) -> int:
        """Attributes that the oracle reads; 0 without the oracle."""
        return len(ATTRIBUTES) if self.features.network == "oracle" else 0

    @property
    def side(self) -> int | None:
        """Pixels of the side of the pictures that can be judged; None where they are resized."""
        return IMAGE_SIZE if self.features.network == "oracle" else None

    def describe_features(self) -> dict[str, Any]:
        """What identifies the features: the network, the SHA-256 of its weights, the kernel."""
        from snapfusion.models.checksums import file_hash

        if self.features.network == "oracle":
            return {"network": "oracle", "sha256": file_hash(WEIGHTS / "oracle" / "model.safetensors")}
        return {
            "network": "inception",
            "sha256": file_hash(_file(self.features)),
            "resize": self.features.resize,
            "side": INCEPTION_SIZE,
        }

    def describe_scorer(self) -> dict[str, Any]:
        """What identifies the CLIP score: the network, and the SHA-256 of its weights."""
        from snapfusion.models.checksums import file_hash

        bundled = self.scorer.network == "mini"
        weights = WEIGHTS / "scorer" / "model.safetensors" if bundled else _file(self.scorer)
        return {"network": self.scorer.network, "sha256": file_hash(weights)}


class Sampler(Settings):
    """How a latent is reached from noise.

    Attributes:
        solver: one of `snapfusion.solver_names.SOLVERS`.
        steps: of the trailing grid; the network is asked once a step, with guidance twice unless told w.
    """

    solver: Solver = "ddim"
    steps: int = Field(50, ge=1, le=1000)

    def evaluations(self, w: float, *, told: bool = False) -> int:
        """How often the UNet is evaluated for one picture at guidance `w`; once a step if it is told w."""
        return self.steps * (1 if told or w == 1.0 else 2)


class SamplingSettings(Settings):
    """How pictures are drawn, whatever the model; every field changes the rows.

    Attributes:
        batch_size: rows the UNet sees at once (twice that with guidance); fixed, because bits depend on it.
        seed: of the noise keys. A caption's noise follows from this and its id, so every model, solver and
            guidance draws it from the same noise.
        images: whether the picture is stored.
        size: side of the pictures in pixels; null takes the model's own.
    """

    batch_size: int = Field(50, ge=1)
    seed: int = Field(0, ge=0)
    images: bool = False
    size: int | None = Field(None, ge=1)


class Selection(Settings):
    """Bounds; None and () ask for nothing. A value equal to its bound is wanted.

    What is missing, null or NaN never speaks against a row. Which columns a bound looks at is in
    `pipelines.sources.layouts.SPELLINGS`, under the meaning that `BOUNDS` gives it.

    Attributes:
        min_width: pixels of the original picture.
        min_height: pixels of the original picture.
        min_side: pixels of its shorter side, whichever that is.
        max_aspect: longer side over shorter side; 1 wants squares alone. COYO was cut at 3.
        min_aesthetic: LAION's aesthetic score, about 1 to 10.
        max_watermark: probability of a watermark, 0 to 1.
        max_unsafe: probability of unsafe content, 0 to 1; of several detectors the highest counts.
        refused_tags: values of LAION's NSFW column that are refused, in any case of letters.
        min_similarity: cosine of CLIP's picture and text features, -1 to 1. Which CLIP is the data set's
            affair: COYO's mean is 0.29 by ViT-B/32 and 0.25 by ViT-L/14, and LAION-400M was cut at 0.3.
        languages: values of the LANGUAGE column that are wanted, as they are spelled there ("en"), in any
            case of letters. Of the layouts only LAION-5B's parts multi and nolang have the column.
        min_caption_chars: characters of the caption, white space made one space.
        max_caption_chars: likewise; the text encoder itself reads 77 tokens of any caption.
        min_caption_words: words of the caption: what white space parts.
        min_latin_share: Latin letters among its letters, 0 to 1; a caption without letters is wanted.
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
    """What the teacher computes; every field changes the rows.

    Attributes:
        student_steps: N_S, the steps of the student's grid.
        k: the teacher's steps for one of the student's, on the grid of k * N_S steps; 2 in SnapFusion.
        cfg_range: of w in guided rows.
        caption_dropout: fraction of vanilla rows that go without their caption (ours, see `draw_caption_dropout`);
            their `token_ids` are the empty caption's, so teacher and student are told the same.
        batch_size: rows the teacher is asked about at once (twice that with guidance); fixed, because bits
            depend on it.
        x_dtype: of the stored target. It is computed in float32.
        seed: of the noise keys.
    """

    student_steps: int = Field(8, ge=1, le=1000)
    k: int = Field(2, ge=1, le=1000)
    batch_size: int = Field(16, ge=1)
    x_dtype: Literal["float16", "float32"] = "float16"
    seed: int = Field(0, ge=0)
