"""Settings in YAML files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from secateur.errors import InvalidRecipe


def read_yaml(path: Path, holds: str) -> dict[str, Any]:
    """Return the keys and values of a file; `holds` says in words what they should be.

    Raises:
        InvalidRecipe: The file is missing, is not YAML, or is no mapping.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidRecipe(f"Cannot read {path}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidRecipe(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise InvalidRecipe(f"{path} must hold keys and values ({holds}).")
    return content
