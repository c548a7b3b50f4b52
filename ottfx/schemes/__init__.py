"""Published quantization schemes, one method a file.

This package imports none of them, so that the registry, the ops and the schemes may import each other's bases in any
order; the registry imports the modules named here.
"""

MODULES = ("none", "kivi", "ott", "ott_plus", "turbo", "polar", "polar_pairs", "qjl")
"""Modules of this package that register a scheme."""

DEFAULT_SCHEME = "ott+"
"""What is used where no scheme is named: the least KL at its bits of all that were measured (docs/quality.md)."""
