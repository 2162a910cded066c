"""Compile a model for phones: a bundle of ExecuTorch, Core ML and ONNX programs, verified against torch.

MODEL is a diffusers folder, the folder of a training, a URL or a hub id; by default it is the recipe's
`mobile.model`. The bundle is OUT/mobile (`snapfusion.export.bundle` lists its files).
"""

from jobs.cli.job import Job
from jobs.cli.licences import licence_of
from jobs.cli.state import state_of
from jobs.cli.verb import recipe_verb
from jobs.recipes.recipe import Recipe
from jobs.runtime.logs import logger
from pipelines.storage.objects import exists
from snapfusion.export.installed import check_compilers
from snapfusion.export.layout import MANIFEST
from snapfusion.export.settings import LicenceError


def compile_mobile(job: Job) -> None:
    """Make the run's bundle, unless it is published already."""
    settings = licensed_recipe(job).mobile
    try:
        settings.licence.check()
    except LicenceError as error:
        raise LicenceError(f"--set {error}") from None
    if not exists(job.url(f"mobile/{MANIFEST}")):
        check_compilers(settings)

    # Only now: these take seconds.
    from jobs.training.mobile_bundle import parent_record, publish_bundle, summary
    from snapfusion.models.decoder import load_decoder
    from snapfusion.models.load import load

    model, decoder = _model_and_decoder(job)
    manifest = publish_bundle(
        settings,
        bundle=load(model),
        decoder=None if decoder is None else load_decoder(decoder),
        parents={
            "model": parent_record(model, source=job.target or settings.model or job.recipe.model),
            "decoder": decoder and parent_record(decoder, source=settings.decoder or ""),
        },
        out_url=job.url("mobile"),
    )
    for line in summary(manifest):
        logger.info(f"  {line}")


def licensed_recipe(job: Job) -> Recipe:
    """The recipe, without licences that are of another model than the one to compile."""
    model, _ = _model_and_decoder(job)
    mobile = job.recipe.mobile.model_copy(update={"licence": licence_of(job, model)})
    return job.recipe.model_copy(update={"mobile": mobile})


def _model_and_decoder(job: Job) -> tuple[str, str | None]:
    """Sources of the model and of its half-width decoder, if there is to be one."""
    settings = job.recipe.mobile
    model = job.target or (job.resolve(settings.model) if settings.model else job.recipe.model)
    return model, job.resolve(settings.decoder) if settings.decoder else None


def preview(job: Job) -> list[str]:
    """Describe what would be read and written."""
    url, settings = job.url("mobile"), job.recipe.mobile
    model, decoder = _model_and_decoder(job)
    own = f"the decoder {decoder}" if decoder else "its own decoder"
    variants = [
        *(f"ExecuTorch {kind}" for kind in settings.executorch),
        *(f"Core ML {kind}" for kind in settings.coreml),
        *(f"ONNX {kind}" for kind in settings.onnx),
    ]
    return [
        f"would compile {model} with {own} into {url} ({state_of(url, last=MANIFEST)})",
        f"  {', '.join(variants)}; {len(settings.captions)} captions at guidance {settings.guidance:g}",
    ]


def _preview_alone(job: Job) -> list[str]:
    """`preview`, and the licences that have to be given; a pipeline lists them with all that it misses."""
    missing = licensed_recipe(job).mobile.licence.problems()
    return [*preview(job), *(f"missing: {line}" for line in missing)]


main = recipe_verb("compile_mobile", compile_mobile, preview=_preview_alone, about=__doc__, target="MODEL")

if __name__ == "__main__":
    main.exit()
