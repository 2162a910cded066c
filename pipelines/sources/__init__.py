"""Where rows come from."""


class SourceError(ValueError):
    """A source that is not there or has not the promised form; the message says what to give."""
