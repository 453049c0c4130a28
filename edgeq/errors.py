"""Every error that edgeq raises on purpose.

::

    EdgeqError
    ├── FormatError     a file's bytes are not what the format demands
    ├── ModelError      a readable file's model is incomplete, inconsistent or unsupported
    ├── TokenizerError  a vocabulary cannot be used, or an id is outside it
    ├── TemplateError   a chat template is refused or fails
    ├── RequestError    a parameter, flag or prompt is out of range
    ├── ResourceError   disk, memory or a file of the system is not available
    └── KernelError     a kernel cannot be compiled or chosen for this machine

A message is one line: file, field, value, what was expected, and what to do. The command line
prints it and exits with code 2.

>>> raise FormatError("model.gguf: version 9 is not supported: expected 2 or 3")
Traceback (most recent call last):
    ...
edgeq.errors.FormatError: model.gguf: version 9 is not supported: expected 2 or 3
"""

__all__ = [
    "EdgeqError",
    "FormatError",
    "KernelError",
    "ModelError",
    "RequestError",
    "ResourceError",
    "TemplateError",
    "TokenizerError",
]


class EdgeqError(Exception):
    """Root of all errors that edgeq raises on purpose."""


class FormatError(EdgeqError):
    """A file's bytes are not what its format demands."""


class ModelError(EdgeqError):
    """A readable file describes a model that is incomplete, inconsistent or not supported."""


class TokenizerError(EdgeqError):
    """A vocabulary cannot be used, or an id lies outside it."""


class TemplateError(EdgeqError):
    """A chat template was refused by the sandbox or failed while rendering."""


class RequestError(EdgeqError):
    """A parameter, flag or prompt is out of range."""


class ResourceError(EdgeqError):
    """Disk, memory or a system file is not available."""


class KernelError(EdgeqError):
    """A kernel cannot be compiled or chosen for this machine."""
