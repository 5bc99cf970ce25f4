"""What holds for tests of engines: none of the product's limits is near, unless a test brings it near."""

import pytest

from mycoswarmd.engines import peeranswer, peerhttp, peerline, upstream


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in (
        (peerhttp, "_WATCH_HEAD_S"),
        (peerhttp, "_EARLY_S"),
        (peerhttp, "_KNOCK_S"),
        (peerline, "CONNECT_S"),
        (peeranswer, "_ERROR_S"),
    ):
        monkeypatch.setattr(module, name, 60.0)
    monkeypatch.setattr(peerhttp.MemberClient.ask, "__kwdefaults__", {"within_s": 60.0})
    # How long a connection is kept for another request.
    monkeypatch.setattr(upstream, "_KEEPALIVE_S", 60.0)
    monkeypatch.setattr(upstream, "_END_S", 60.0)
