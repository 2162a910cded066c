"""Records which Delta tables a test opens."""

import pytest
from deltalake import DeltaTable


def record_opens(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The URLs of the Delta tables opened from now on, in their order."""
    opened: list[str] = []
    init = DeltaTable.__init__

    def recording(self: DeltaTable, url: str, **options: object) -> None:
        opened.append(url)
        init(self, url, **options)

    monkeypatch.setattr(DeltaTable, "__init__", recording)
    return opened
