"""The exceptions of this package.

    RadixError
    ├── InvalidInputError (also ValueError)      an argument has a wrong value, shape or length
    │   ├── InvalidDtypeError (also TypeError)   an argument has a wrong dtype or type
    │   └── RejectedItemsError                   some items of a list cannot be run
    ├── UnsupportedModelError                    this model cannot be folded exactly; says why
    ├── UnsupportedCallError                     this call on an enabled model cannot be folded; says why
    │   └── NoCacheError (also AttributeError)   a folded call keeps no key-value cache
    ├── UnsupportedImplError                     this attention implementation does not support the call
    └── EngineError                              the engine could not answer a request
        ├── OverloadedError                      too many requests are waiting already
        ├── DeadlineExceededError (also TimeoutError)    not answered in time
        ├── EngineClosedError                    the engine is closed, or closing
        ├── EngineDeadError                      one of the engine's threads has died; nothing runs any more
        └── InferenceError                       the model failed on this request
            ├── DeviceMemoryError                this request alone does not fit into the device's memory
            └── NonFiniteAnswersError            the model's own answers to these items are NaN or infinite

Every message names the argument or model, the offending value, and what to do instead.
"""

__all__ = [
    "DeadlineExceededError",
    "DeviceMemoryError",
    "EngineClosedError",
    "EngineDeadError",
    "EngineError",
    "InferenceError",
    "InvalidDtypeError",
    "InvalidInputError",
    "NoCacheError",
    "NonFiniteAnswersError",
    "OverloadedError",
    "RadixError",
    "RejectedItemsError",
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


class _WithPlaces(Exception):
    """Of some items: `kind` is their name, `rejected` holds (place in the caller's list, reason), in order."""

    def __init__(self, kind: str, rejected: list[tuple[int, str]]) -> None:
        self.kind = kind
        self.rejected = rejected
        index, reason = rejected[0]
        more = f" ({len(rejected) - 1} more like it)" if len(rejected) > 1 else ""
        super().__init__(f"{kind}[{index}]: {reason}{more}")


class RejectedItemsError(_WithPlaces, InvalidInputError):
    """Some items cannot be run: `rejected` holds (place in the caller's list, reason), in order."""


class UnsupportedModelError(RadixError):
    """The model cannot be folded exactly; the message says why and what to do."""


class UnsupportedCallError(RadixError):
    """A call that must be folded cannot be folded; the message says why and what to do."""


class NoCacheError(UnsupportedCallError, AttributeError):
    """The outputs of a folded call hold no key-value cache. An AttributeError, so that `hasattr` says no."""


class UnsupportedImplError(RadixError):
    """The requested attention implementation cannot run here or lacks an option; nothing falls back silently."""


class EngineError(RadixError):
    """The engine could not answer a request."""


class OverloadedError(EngineError):
    """The engine already has as many requests as it accepts; try again later."""


class DeadlineExceededError(EngineError, TimeoutError):
    """The request was not answered within its timeout; sequences that had not started were not run."""


class EngineClosedError(EngineError):
    """The engine is closed, or is closing and accepts no more requests."""


class EngineDeadError(EngineError):
    """One of the engine's threads has died, so nothing runs any more; the cause says why. Start a new one."""


class InferenceError(EngineError):
    """The model failed on this request; the cause says how."""


class DeviceMemoryError(InferenceError):
    """A request does not fit into the device's memory, not even in a batch of its own.

    `place` is its place in the caller's list, where that is known.
    """

    place: int | None = None

    @property
    def rejected(self) -> list[tuple[int, str]]:
        """(place in the caller's list, reason), as in `NonFiniteAnswersError`; empty where the place is not known."""
        return [] if self.place is None else [(self.place, str(self).removesuffix("."))]


class NonFiniteAnswersError(_WithPlaces, InferenceError):
    """The model's answers to some items are not finite, even with each item run without the others.

    `kind` is the name of the items; `rejected` holds (place in the caller's list, reason), in order.
    """
