"""The errors that ottfx raises, each with where, what was expected, what came and what to do."""


class OttfxError(Exception):
    """Base of every error that ottfx raises on purpose."""


class ConfigError(OttfxError, ValueError):
    """An argument or option has a value that cannot work."""


class MatchError(OttfxError, RuntimeError):
    """A graph holds no attention that can be rewritten, although the caller demanded it."""


class CacheError(OttfxError, RuntimeError):
    """A quantized cache was used in a way that would give wrong values."""


class ArtifactError(OttfxError, RuntimeError):
    """A saved cache or model cannot be read here."""
