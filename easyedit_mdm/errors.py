"""Every error that the package raises on purpose.

Each message says what was wrong, with which value, where it came from, and what to do. All derive from
`EasyEditMDMError`, so that one `except` catches them; each also derives from the built-in it resembles.
"""

from __future__ import annotations


class EasyEditMDMError(Exception):
    """Base of all errors of this package."""


class UnknownNameError(EasyEditMDMError, KeyError):
    """A name (schedule, order, family, method, hyperparameter) that is not registered."""

    def __str__(self) -> str:
        """The message as written; `KeyError` would show its repr."""
        return str(self.args[0]) if self.args else ""


class NameTakenError(EasyEditMDMError, ValueError):
    """A name (schedule, order, family, method) under which something else is registered already."""


class HostNotFoundError(EasyEditMDMError, ImportError):
    """EasyEdit could not be found."""


class HostImportError(EasyEditMDMError, ImportError):
    """EasyEdit was found and cannot be imported with what is installed."""


class MissingPackageError(EasyEditMDMError, ImportError):
    """A third-party package, or a part of one, was used and is not installed, or its installed version has it
    no more.
    """


class IncompatibleVersionError(EasyEditMDMError, ImportError):
    """An installed package (transformers, ...) lacks something that this one is built on."""


class CheckpointError(EasyEditMDMError, ValueError):
    """A model folder that cannot be loaded: no such folder, missing keys, wrong shapes, unknown family."""


class ModelError(EasyEditMDMError, ValueError):
    """A loaded model that cannot do what was asked: no mask id, too few positions, no such module."""


class RequestError(EasyEditMDMError, ValueError):
    """An edit request that cannot be carried out: subject not in prompt, empty target, target too long."""


class HyperParameterError(EasyEditMDMError, ValueError):
    """A hyperparameter that is missing, unknown or out of range."""


class OptimisationError(EasyEditMDMError, ArithmeticError):
    """The value optimisation or the closed form left the finite numbers; no weight was changed."""


class StatisticsError(EasyEditMDMError, ValueError):
    """Second moments that are missing, unusable, or belong to another model or setting."""


class EditError(EasyEditMDMError, RuntimeError):
    """An edit that cannot be applied to, or taken back from, this model."""


class DataError(EasyEditMDMError, ValueError):
    """A data file that is missing or cannot be read."""


class FileError(EasyEditMDMError, OSError):
    """A file that cannot be written: disk full, read-only folder, or something stands there already."""


class CollapseError(EasyEditMDMError, ArithmeticError):
    """An edit that the collapse guard refused, or rolled back, with the figures."""
