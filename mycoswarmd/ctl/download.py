"""Fetches one known file from a package index: found by name, resumed after a break, checked by hash.

Rule: nothing that was downloaded is used before its SHA-256 is the pinned one; more bytes than the pinned
size are never taken; what is written and checked is a file, never where a link leads. Source: the simple
repository API, HTML (PEP 503) and JSON (PEP 691).
"""

import configparser
import hashlib
import http.client
import importlib
import json
import os
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import IO
from urllib.parse import unquote, urljoin, urlsplit

from mycoswarmd.errors import ConfigError, EngineError, StoreError, Unavailable

TIMEOUT_S = 60.0
# A project's page with every version it ever had: some megabytes for the largest.
_MAX_PAGE_BYTES = 64 << 20
_PIECE_BYTES = 256 << 10
# Breaks in a row without a byte in between before we give up; a slow line has many breaks.
_MAX_BREAKS = 4
_ACCEPT = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"
# What urllib and http.client raise for a broken line.
_BROKEN = (OSError, http.client.HTTPException, ValueError)

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pinned:
    """One exact file of a package index."""

    project: str
    version: str
    filename: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Indexes:
    """Where to look, in order, and which certificates to trust."""

    urls: tuple[str, ...]
    certificates: str | None = None


def find_indexes(given: str | None) -> Indexes:
    """Return the indexes to ask: the given one, or those that pip is told to use, or pip's own default."""
    settings = _pip_settings()
    certificates = settings.get("cert")
    if given:
        return Indexes(urls=(given,), certificates=certificates)
    main = settings.get("index-url") or _default_index()
    extra = settings.get("extra-index-url", "").split()
    return Indexes(urls=tuple(url for url in (main, *extra) if url), certificates=certificates)


def _pip_settings() -> Mapping[str, str]:
    """Read what pip reads, in its order: its files, global to site, then the environment."""
    home = Path.home()
    config = os.environ.get("XDG_CONFIG_HOME") or home / ".config"
    paths = [
        *(
            Path(one) / "pip/pip.conf"
            for one in os.environ.get("XDG_CONFIG_DIRS", "/etc/xdg").split(":")
            if one
        ),
        Path("/etc/pip.conf"),
        home / ".pip/pip.conf",
        Path(config) / "pip/pip.conf",
        Path(sys.prefix) / "pip.conf",
    ]
    if named := os.environ.get("PIP_CONFIG_FILE"):
        paths.append(Path(named))
    parser = configparser.RawConfigParser()
    settings: dict[str, str] = {}
    for path in paths:
        try:
            parser.read_string(path.read_text())
        except (OSError, configparser.Error, UnicodeDecodeError):
            continue  # pip's business, not ours
    for section in ("global", "install", "download"):
        if parser.has_section(section):
            settings |= dict(parser.items(section))
    for key in ("index-url", "extra-index-url", "cert"):
        if value := os.environ.get("PIP_" + key.upper().replace("-", "_")):
            settings[key] = value
    return settings


def _default_index() -> str:
    """Return the index that the installed pip asks when nobody tells it another."""
    try:
        module = importlib.import_module("pip._internal.models.index")
    except ImportError:
        return ""
    return str(module.PyPI.simple_url)


def fetch(pinned: Pinned, indexes: Indexes, part: Path, *, progress: Progress) -> None:
    """Download a file to `part`, going on where an earlier download broke off, and check it.

    Raises Unavailable("download-failed"), EngineError("download-corrupt") or StoreError("disk-full").
    """
    if part.is_symlink() or _length(part) > pinned.size_bytes:
        part.unlink()
    if _length(part) < pinned.size_bytes:
        opener = _opener(indexes)
        _resume(opener, find_url(opener, pinned, indexes), pinned, part, progress)
    found = _sha256(part)
    if found != pinned.sha256:
        part.unlink()
        raise EngineError(
            "download-corrupt",
            f"cannot use {pinned.filename!r}: its SHA-256 is {found}, expected {pinned.sha256}",
            hint="it was thrown away; try again, and if it stays so, do not trust this index",
        )


def _opener(indexes: Indexes) -> urllib.request.OpenerDirector:
    try:
        context = ssl.create_default_context(cafile=indexes.certificates)
    except OSError as exc:
        raise ConfigError(
            "bad-certificates",
            f"cannot read the certificates {indexes.certificates!r}: {exc.strerror}",
            hint="PIP_CERT or pip's configuration names them",
        ) from exc
    return urllib.request.build_opener(urllib.request.HTTPSHandler(context=context))


def find_url(opener: urllib.request.OpenerDirector, pinned: Pinned, indexes: Indexes) -> str:
    """Return the address of a file, from the first index that lists it."""
    problems = []
    for index in indexes.urls:
        page = f"{index.rstrip('/')}/{pinned.project}/"
        try:
            for name, url in _links(opener, page):
                if name == pinned.filename:
                    return url
        except _BROKEN as exc:
            problems.append(f"{_host(index)}: {_cause(exc)}")
        else:
            problems.append(f"{_host(index)}: it does not list the file")
    raise Unavailable(
        "download-failed",
        f"cannot find {pinned.filename!r}: {'; '.join(problems) or 'no package index is known'}",
        hint="is this machine online? --index-url or PIP_INDEX_URL names another package index",
    )


def _links(opener: urllib.request.OpenerDirector, page: str) -> Iterator[tuple[str, str]]:
    """Yield name and address of each file on a project's page."""
    request = urllib.request.Request(page, headers={"Accept": _ACCEPT})  # noqa: S310 - the user's own index
    with opener.open(request, timeout=TIMEOUT_S) as response:
        untrusted = response.read(_MAX_PAGE_BYTES)
        base, kind = response.url, response.headers.get_content_type()
    if kind.endswith("json"):
        for one in json.loads(untrusted)["files"]:
            yield one["filename"], urljoin(base, one["url"])
        return
    parser = _Anchors()
    parser.feed(untrusted.decode("utf-8", "replace"))
    for href in parser.found:
        url = urljoin(base, href)
        yield unquote(urlsplit(url).path.rsplit("/", 1)[-1]), url


class _Anchors(HTMLParser):
    """Collects the links of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep a link's address."""
        href = dict(attrs).get("href")
        if tag == "a" and href:
            self.found.append(href)


def _resume(
    opener: urllib.request.OpenerDirector, url: str, pinned: Pinned, part: Path, progress: Progress
) -> None:
    """Take what is missing, with a few attempts: a long download over a bad line breaks."""
    breaks = 0
    cause = ""
    while (have := _length(part)) < pinned.size_bytes:
        if breaks > _MAX_BREAKS:
            raise Unavailable(
                "download-failed",
                f"cannot download {pinned.filename!r} from {_host(url)}: {cause}",
                hint=f"{have} of {pinned.size_bytes} bytes are kept; the same command goes on from there",
            )
        time.sleep(min(breaks, 3) * 0.5)
        try:
            _take(opener, url, pinned, part, progress)
            cause = "the connection ended early"
        except _BROKEN as exc:
            cause = _cause(exc)
        breaks = 0 if _length(part) > have else breaks + 1


def _take(
    opener: urllib.request.OpenerDirector, url: str, pinned: Pinned, part: Path, progress: Progress
) -> None:
    have = _length(part)
    request = urllib.request.Request(url)  # noqa: S310 - found in the user's own index
    if have:
        request.add_header("Range", f"bytes={have}-")
    with opener.open(request, timeout=TIMEOUT_S) as response:
        # A server that does not know ranges sends the whole file again.
        is_rest = response.status == 206 and response.headers.get("Content-Range", "").startswith(
            f"bytes {have}-"
        )
        have = have if is_rest else 0
        with _open_part(part, is_rest=is_rest) as file:
            while have < pinned.size_bytes and (
                piece := response.read(min(_PIECE_BYTES, pinned.size_bytes - have))
            ):
                try:
                    file.write(piece)
                    file.flush()
                except OSError as exc:
                    raise disk_error(part, exc) from exc
                have += len(piece)
                progress(have)


def disk_error(path: Path, exc: OSError) -> StoreError:
    """Make our error of a file that cannot be written."""
    return StoreError(
        "disk-full",
        f"cannot write {str(path)!r}: {exc.strerror}",
        hint="make room or choose another place with --state; nothing is half installed",
    )


def _length(path: Path) -> int:
    try:
        return path.lstat().st_size
    except FileNotFoundError:
        return 0


def _open_part(part: Path, *, is_rest: bool) -> IO[bytes]:
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    flags |= os.O_APPEND if is_rest else os.O_TRUNC
    return os.fdopen(os.open(part, flags, 0o644), "ab" if is_rest else "wb")


def _sha256(path: Path) -> str:
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _host(url: str) -> str:
    """Return an address without what may be secret in it."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname or ''}{parts.path if parts.scheme == 'file' else ''}"


def _cause(exc: Exception) -> str:
    if isinstance(exc, urllib.error.HTTPError):
        return f"it answered {exc.code}"
    if isinstance(exc, urllib.error.URLError):
        return str(exc.reason)
    return str(exc) or type(exc).__name__
