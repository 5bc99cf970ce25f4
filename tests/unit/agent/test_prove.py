"""Probes of a cage whose answer depends on the machine, for machines that are not at hand."""

import os
from types import SimpleNamespace

import pytest

from mycoswarmd.agent import prove

ASKED = 1_000_001
PAGES = [4096, 16384, 65536]


def said_by_kernel(monkeypatch: pytest.MonkeyPatch, page: int, blocks: int) -> None:
    """Have a file system of memory say how large it is."""
    found = SimpleNamespace(f_blocks=blocks, f_frsize=page, f_files=1)
    monkeypatch.setattr(os, "statvfs", lambda _path: found)


@pytest.mark.parametrize("page", PAGES)
def test_a_size_is_rounded_up_to_the_pages_of_this_kernel(monkeypatch: pytest.MonkeyPatch, page: int) -> None:
    expect = {"sizes": {"/tmp": ASKED}, "files": {"/tmp": 1}, "quotas": {"/tmp": ASKED}}
    blocks = -(-ASKED // page)
    said_by_kernel(monkeypatch, page, blocks)
    assert prove.FAMILIES_OF_PROBES["size"](expect, "/tmp") is None
    assert prove.PROBES["disk-quota"](expect) is None
    said_by_kernel(monkeypatch, page, blocks + 1)
    assert prove.FAMILIES_OF_PROBES["size"](expect, "/tmp") == "has no bound"
    assert prove.PROBES["disk-quota"](expect) == "is larger in ['/tmp']"


def test_a_size_without_bound_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    # What the kernel says of a tmpfs that was given no size.
    said_by_kernel(monkeypatch, 4096, 0)
    expect = {"sizes": {"/tmp": ASKED}, "files": {"/tmp": 1}}
    assert prove.FAMILIES_OF_PROBES["size"](expect, "/tmp") == "has no bound"
