"""Where the saved configuration lies."""

from pathlib import Path

import pytest

from neuroexapt.backend.config import config_path


def test_the_configuration_is_where_the_user_keeps_configurations(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("NEUROEXAPT_CONFIG")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    assert config_path() == tmp_path / "home" / ".config" / "neuroexapt" / "config.json"
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert config_path() == tmp_path / "neuroexapt" / "config.json"
    monkeypatch.setenv("NEUROEXAPT_CONFIG", str(tmp_path / "mine.json"))
    assert config_path() == tmp_path / "mine.json"
