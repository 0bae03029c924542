"""The saved configuration: one JSON file, at ``NEUROEXAPT_CONFIG`` or among the user's configurations."""

import json
import os
from pathlib import Path
from typing import Any

from neuroexapt.errors import UserError


def config_path() -> Path:
    """Where the configuration is saved."""
    if chosen := os.environ.get("NEUROEXAPT_CONFIG"):
        return Path(chosen)
    configurations = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(configurations) / "neuroexapt" / "config.json"


def load_config(path: Path | None = None) -> dict[str, Any]:
    """The saved configuration, empty where none was saved."""
    path = path or config_path()
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the configuration {path}: {error}; mend or delete it") from error
    if not isinstance(config, dict):
        raise UserError(f"the configuration {path} is not a JSON object; mend or delete it")
    return config


def save_config(changes: dict[str, Any], path: Path | None = None) -> Path:
    """Merge ``changes`` into the saved configuration and return its path."""
    path = path or config_path()
    try:
        config = {**load_config(path), **changes}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(config, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"cannot write the configuration {path}: {error}") from error
    return path
