"""What is unpacked can be read by the user that runs it."""

import os
import zipfile
from pathlib import Path

from mycoswarmd.ctl.unpack import unpack_tree


def test_a_tree_is_readable_for_all_whatever_the_umask(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        archive.writestr("package/deep/module.py", "pass")
    before = os.umask(0o077)
    try:
        unpack_tree(tmp_path / "a.whl", tmp_path / "engine")
    finally:
        os.umask(before)
    found = [tmp_path / "engine", *sorted((tmp_path / "engine").rglob("*"))]
    assert [path.stat().st_mode & 0o777 for path in found] == [0o755, 0o755, 0o755, 0o644]
