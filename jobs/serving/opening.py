"""Opens what the command line of `serve` names."""

from types import SimpleNamespace

from jobs.evaluation.generators import load_model, load_programs
from jobs.serving.image_request import Limits
from jobs.serving.served_models import Served, ServedModel, ServedPrograms


def limits_of(options: SimpleNamespace) -> Limits:
    """The limits that are given; the others are the usual ones."""
    given = {"steps": options.max_steps, "size": options.max_size, "waiting": options.max_waiting}
    return Limits.parse({name: value for name, value in given.items() if value is not None})


def open_models(options: SimpleNamespace) -> list[Served]:
    """Load each model once, then the bundle.

    Raises:
        SettingsError: if one cannot be loaded, or there is no such device.
    """
    limits = limits_of(options)
    models: list[Served] = [
        ServedModel(
            loaded=load_model(
                source,
                device=options.device or "cpu",
                check_safety=not options.no_safety_checker,
                option="MODEL",
            ),
            limits=limits,
        )
        for source in dict.fromkeys(options.model)
    ]
    if options.bundle is not None:
        models.append(ServedPrograms(loaded=load_programs(options.bundle, variant=options.variant)))
    return models
