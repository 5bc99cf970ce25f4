"""The agent as one file."""

import io
import subprocess
import zipfile
from pathlib import Path

from mycoswarmd.sandbox import zipapp
from mycoswarmd.sandbox.zipapp import build_agent, build_zip


def names(data: bytes) -> list[str]:
    return zipfile.ZipFile(io.BytesIO(data)).namelist()


def test_the_same_sources_give_the_same_bytes() -> None:
    assert build_agent() == build_agent()
    infos = zipfile.ZipFile(io.BytesIO(build_agent())).infolist()
    assert {info.date_time for info in infos} == {zipapp.EPOCH}
    assert [info.filename for info in infos] == sorted(info.filename for info in infos)


def test_it_holds_the_agent_wire_and_errors_and_nothing_else() -> None:
    packages = {name.removesuffix("c").rpartition("/")[0] for name in names(build_agent())}
    assert packages == {"", "mycoswarmd", "mycoswarmd/agent", "mycoswarmd/wire"}
    top = {name for name in names(build_agent()) if name.startswith("mycoswarmd/") and name.count("/") == 1}
    assert top == {f"mycoswarmd/{name}.{ext}" for name in ("__init__", "errors") for ext in ("py", "pyc")}


def test_the_system_python_runs_it_isolated(tmp_path: Path) -> None:
    path = tmp_path / "agent.pyz"
    path.write_bytes(
        build_zip({"__main__.py": "import sys\nprint(sys.flags.isolated, sys.flags.no_site, __name__)\n"})
    )
    done = subprocess.run(["/usr/bin/python3", "-I", "-S", path], capture_output=True, text=True, check=True)
    assert done.stdout == "1 1 __main__\n"


def test_a_python_that_cannot_use_the_compiled_form_uses_the_source(tmp_path: Path) -> None:
    data = build_zip({"__main__.py": "print('from source')\n"})
    broken = io.BytesIO()
    with zipfile.ZipFile(broken, "w") as target, zipfile.ZipFile(io.BytesIO(data)) as source:
        for name in source.namelist():
            content = source.read(name)
            target.writestr(name, b"\0\0\r\n" + content[4:] if name.endswith("c") else content)
    path = tmp_path / "agent.pyz"
    path.write_bytes(broken.getvalue())
    done = subprocess.run(["/usr/bin/python3", "-I", "-S", path], capture_output=True, text=True, check=True)
    assert done.stdout == "from source\n"
