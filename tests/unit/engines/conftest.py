"""What holds for tests of engines: none of the product's limits is near, unless a test brings it near."""

import pytest

from mycoswarmd.engines import peerhttp, upstream


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_CONNECT_S", "_WATCH_HEAD_S", "_EARLY_S", "_KNOCK_S", "_ERROR_S"):
        monkeypatch.setattr(peerhttp, name, 60.0)
    monkeypatch.setattr(peerhttp.MemberClient.ask, "__kwdefaults__", {"within_s": 60.0})
    # How long a connection is kept for another request.
    monkeypatch.setattr(upstream, "_KEEPALIVE_S", 60.0)
    monkeypatch.setattr(upstream, "_END_S", 60.0)
