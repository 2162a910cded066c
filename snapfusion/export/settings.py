"""What is asked of a mobile bundle: which variants, held to what, under which licences."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from snapfusion.settings import Settings

AttentionLayout = Literal["diffusers", "channels-first", "split-heads"]
"""How attention is laid out: as in diffusers; as here; or as here with one head after the other."""


PSNR_LIMIT_DB = 35.0
"""Where float artifacts are refused; rounding to float16 alone stays far above it."""


ExecuTorchKind = Literal["float32", "int8", "coreml"]
CoreMLKind = Literal["float16", "palette-6", "palette-8", "int8"]

QUANTIZED_LIMIT_DB = 20.0
"""Where images of compressed weights are refused: at 20 dB the mean error is a tenth of the range."""


class LicenceError(ValueError):
    """A bundle for which nobody has said under what licence it may be handed on."""


class Licence(Settings):
    """Under what terms a bundle may be handed on.

    Attributes:
        weights: of the teacher's weights, which pass to what is distilled from them.
        data: of the pictures and captions it was trained on.
        text: a file with the licence's text, to go into the bundle; needed where the weights' licence asks
            for it, as those of the RAIL family do.
    """

    weights: str | None = None
    data: str | None = None
    text: str | None = None

    def check(self) -> None:
        """Refuse to export what nobody may use.

        Raises:
            LicenceError: naming the setting that is missing.
        """
        for name in ("weights", "data"):
            if not (getattr(self, name) or "").strip():
                raise LicenceError(
                    f"mobile.licence.{name} is not stated; give the licence of the {_LICENCE_SUBJECTS[name]}, "
                    f'as in --set mobile.licence.{name}="CreativeML OpenRAIL-M"'
                )
        if "rail" in (self.weights or "").lower() and not self.text:
            raise LicenceError(
                f"mobile.licence.weights is {self.weights}, which asks that its text goes with them; "
                "give the file with --set mobile.licence.text=FILE"
            )


_LICENCE_SUBJECTS = {"weights": "teacher's weights", "data": "training data"}


class MobileSettings(Settings):
    """What is compiled, and how it is held to torch.

    Attributes:
        model: whose programs; after "run:" a place in the run. An argument of the job takes its place.
        decoder: the half-width decoder's folder, likewise; null for the model's own.
        executorch: variants of ExecuTorch programs: XNNPACK in float32, in 8 bits, or lowered to Core ML.
        coreml: variants of Core ML packages: float16; weights of 6 or 8 bits by a palette, or linear in 8.
        attention: how Core ML's programs lay it out; XNNPACK's are fastest as diffusers has it.
        conditions: 2 computes both halves of the guidance in one call of the UNet; 1 needs two calls.
        chunk_bytes: a UNet whose package is larger becomes two packages.
        steps: of the sampler; null for those that the model was distilled for, else 50.
        guidance: w of Eq. 3.
        captions: drawn by every variant and compared.
        seed: of their noise.
        parity_limit_db: the lowest PSNR, peak = max |reference|, of each float module and of its images.
        quantized_limit_db: likewise, of the final images of compressed weights.
        override: variants to be accepted below these limits, with the reason, which the manifest records.
        licence: under which it may be handed on.
        safety_checker: a .pte file that takes the image and gives one number, above 0 for a picture that is
            not to be shown; null leaves the place empty, and the manifest says so.
    """

    model: str | None = None
    decoder: str | None = None
    executorch: tuple[ExecuTorchKind, ...] = ("float32", "int8")
    coreml: tuple[CoreMLKind, ...] = ("float16", "palette-6")
    attention: AttentionLayout = "channels-first"
    conditions: Literal[1, 2] = 2
    chunk_bytes: PositiveInt = 2**30
    steps: PositiveInt | None = None
    guidance: Annotated[float, Field(ge=1.0)] = 7.5
    captions: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "a photo of an astronaut riding a horse on mars",
        "a bowl of ripe strawberries on a wooden table",
    )
    seed: NonNegativeInt = 0
    parity_limit_db: PositiveFloat = PSNR_LIMIT_DB
    quantized_limit_db: PositiveFloat = QUANTIZED_LIMIT_DB
    override: dict[str, str] = Field(default_factory=dict)
    licence: Licence = Licence()
    safety_checker: str | None = None
