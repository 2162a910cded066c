"""Starting Ray on this machine."""

from pathlib import Path

import pytest

from jobs.runtime.cluster import connect
from jobs.runtime.settings import ClusterSettings
from snapfusion.settings import SettingsError


def test_a_folder_too_deep_for_sockets_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_ADDRESS", "RAY_TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("deep" * 10)))
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # another test's cluster may be up
    with pytest.raises(SettingsError, match=r"^TMPDIR /.* bytes too long .* set RAY_TMPDIR"):
        connect(ClusterSettings())
