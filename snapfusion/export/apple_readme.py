"""README of a folder of resources for Apple's ml-stable-diffusion: how to compile, load and sample them."""

from snapfusion.export.apple_resources import AppleResources
from snapfusion.export.apple_schedulers import DPM, PNDM
from snapfusion.models.bundle import Bundle

README = "README.md"

_TEXT = """# Resources for Apple's ml-stable-diffusion

{packages}, `vocab.json` and `merges.txt`, in the layout of github.com/apple/ml-stable-diffusion. The model
makes images of {side} x {side} pixels; the SHA-256 of its UNet's weights is `{unet}`.

## On a Mac

Its Swift pipeline loads compiled packages, which Apple's compiler makes:

```
mkdir Resources
for name in {names}; do xcrun coremlcompiler compile $name.mlpackage Resources; done
cp vocab.json merges.txt Resources
```

## In Swift

```swift
let pipeline = try StableDiffusionPipeline(resourcesAt: resources, controlNet: [])
var configuration = StableDiffusionPipeline.Configuration(prompt: "{caption}")
configuration.schedulerType = .{dpm}
configuration.schedulerTimestepSpacing = .linspace
configuration.stepCount = {steps}
configuration.guidanceScale = {guidance:g}
let images = try pipeline.generateImages(configuration: configuration)
```

{schedulers} Leave `decoderScaleFactor` at its default: the decoder's package has the model's own factor.

## In Python

Its Python pipeline takes any scheduler of diffusers. This one takes the steps that the model was made for;
the packages give eps, whatever the network predicts:

```python
DDIMScheduler(
    beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="epsilon",
    timestep_spacing="trailing", steps_offset=1, set_alpha_to_one=True, clip_sample=False,
)
```

## Agreement with torch

{parity}

PSNR, peak = max |reference|, of packages that were read back and evaluated operation by operation. No Mac and
no phone has run them.

## Limits

- Apple's Swift tokenizer splits captions at spaces only: punctuation that touches a word gives other tokens
  than in training. Of a caption that is too long it drops the end token, too.{padding}{added}
- There is no safety checker here: generated images are not checked.
"""

_PADDING = """
- It pads captions with the end token, and this model was trained with `{pad}`."""
_ADDED = """
- It does not find the tokens of textual inversions, such as `{token}`."""


def apple_readme(resources: AppleResources, bundle: Bundle, *, caption: str) -> str:
    """The text, in Markdown.

    Args:
        resources: as they were written.
        bundle: the model.
        caption: of the image that was compared.
    """
    tokenizer, added = bundle.tokenizer, bundle.added_tokens
    padded = tokenizer.pad_token == tokenizer.eos_token
    names = list(resources.packages)
    return _TEXT.format(
        packages=", ".join(f"`{name}.mlpackage`" for name in names),
        names=" ".join(names),
        side=bundle.image_size,
        unet=bundle.fingerprint()["unet"],
        caption=caption.replace("\\", "\\\\").replace('"', '\\"'),
        dpm=DPM,
        steps=resources.steps,
        guidance=resources.guidance,
        schedulers=fitting_scheduler(resources),
        parity="\n".join(f"- {line}" for line in parity_lines(resources)),
        padding="" if padded else _PADDING.format(pad=tokenizer.pad_token),
        added=_ADDED.format(token=added[0]) if added else "",
    )


def fitting_scheduler(resources: AppleResources) -> str:
    """Which of the Swift pipeline's schedulers fits the model, with what was measured."""
    dpm = f"`.{DPM}` with `.linspace` fits: its times are at most 1 from those of the model's own DDIM steps."
    found = f"The PSNR of its image to the one by these is {_decibels(resources.schedulers[DPM])}"
    if PNDM not in resources.schedulers:
        return f"{dpm} {found}."
    return f"{dpm} {found}, that of `.{PNDM}`, the default, {_decibels(resources.schedulers[PNDM])}."


def parity_lines(resources: AppleResources) -> list[str]:
    """A line for each package and the image."""
    return [
        f"{name}: {'equal' if parity.psnr_db is None else _decibels(parity.psnr_db)}"
        for name, parity in resources.parity.items()
    ]


def _decibels(value: float) -> str:
    return f"{value:.1f} dB"
