"""The error of a model that cannot be used."""


class ModelError(ValueError):
    """A model that is missing, incomplete, altered or unsupported."""
