"""The one exception of this package that a user can mend."""


class RasterizeError(ValueError):
    """Input that cannot be rendered; the message says what was found, what was expected and how to mend it."""
