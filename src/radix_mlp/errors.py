"""The exceptions of this package.

    RadixError
    ├── InvalidInputError (also ValueError)      an argument has a wrong value, shape or length
    │   └── InvalidDtypeError (also TypeError)   an argument has a wrong dtype or type
    ├── UnsupportedModelError                    this model cannot be folded exactly; says why
    ├── UnsupportedCallError                     this call on an enabled model cannot be folded; says why
    │   └── NoCacheError (also AttributeError)   a folded call kept no key-value cache
    └── UnsupportedImplError                     this way to run attention cannot do what was asked

Every message names the argument or model, the offending value, and what to do instead.
"""

__all__ = [
    "InvalidDtypeError",
    "InvalidInputError",
    "NoCacheError",
    "RadixError",
    "UnsupportedCallError",
    "UnsupportedImplError",
    "UnsupportedModelError",
]


class RadixError(Exception):
    """Base of all exceptions raised by this package."""


class InvalidInputError(RadixError, ValueError):
    """An argument has a wrong value, shape or length."""


class InvalidDtypeError(InvalidInputError, TypeError):
    """An argument has a wrong dtype or Python type."""


class UnsupportedModelError(RadixError):
    """The model cannot be folded exactly; the message says why and what to do."""


class UnsupportedCallError(RadixError):
    """A call that must be folded cannot be; the message says why and what to do."""


class NoCacheError(UnsupportedCallError, AttributeError):
    """The outputs of a folded call hold no key-value cache. An AttributeError, so that `hasattr` says no."""


class UnsupportedImplError(RadixError):
    """The requested attention implementation cannot run here or lacks an option; nothing falls back silently."""
