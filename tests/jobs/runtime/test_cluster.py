"""Starting Ray on this machine."""

from pathlib import Path

import pytest

from jobs.runtime.cluster import ClusterUnreachable, connect
from jobs.runtime.exit_codes import run_guarded
from jobs.runtime.settings import ClusterSettings
from snapfusion.settings import SettingsError


def test_a_folder_too_deep_for_sockets_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_ADDRESS", "RAY_TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("deep" * 10)))
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # another test's cluster may be up
    with pytest.raises(SettingsError, match=r"^TMPDIR /.* bytes too long .* set RAY_TMPDIR"):
        connect(ClusterSettings())


def test_a_machine_too_busy_for_ray_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def start(**_: object) -> None:
        raise Exception("The current node timed out during startup.")  # noqa: TRY002 - as Ray does

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", start)
    with pytest.raises(ClusterUnreachable, match=r"busy .* \(The current node timed out"):
        connect(ClusterSettings())
    assert run_guarded("evaluate", lambda: connect(ClusterSettings())) == 1
    error = capfd.readouterr().err
    assert error.startswith("evaluate: Ray did not start on this machine")
    assert error.count("\n") == 1
