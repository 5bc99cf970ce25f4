"""What holds for tests of outposts: the core waits for its dialer, however slow the machine is."""

import pytest


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mycoswarmd.outposts.dialing._LISTEN_S", 60.0)
