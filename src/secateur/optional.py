"""The one door to optional dependencies."""

from __future__ import annotations

import importlib
from types import ModuleType

from secateur.errors import MissingDependency


def optional_import(module: str, extra: str) -> ModuleType:
    """Return the imported module, or raise with the command that installs it.

    Args:
        module: Dotted name, for example ``"onnxruntime"``.
        extra: The extra of secateur that contains it, for example ``"onnx"``.

    Raises:
        MissingDependency: The module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependency(
            f"This needs the package {module!r}, which could not be imported ({error}). "
            f"Install it with: pip install 'secateur[{extra}]'"
        ) from error
