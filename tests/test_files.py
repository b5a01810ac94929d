"""Promises of atomic writing: the old file or the whole new one, whatever happens on the way."""

import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from stream_hbaf.errors import StreamHbafError
from stream_hbaf.files import (
    WriteError,
    atomic_write,
    atomic_write_bytes,
    atomic_write_text,
    remove_unfinished,
)


def test_new_content_takes_the_files_place(tmp_path: Path) -> None:
    """The folder is made, and nothing but the file is left in it."""
    file = tmp_path / "new" / "file.txt"
    for text in ("one", "zwö"):
        atomic_write_text(file, text, durable=True)
        assert file.read_bytes() == text.encode()
    assert list(file.parent.iterdir()) == [file]


def test_old_content_stays_when_the_writer_fails(tmp_path: Path) -> None:
    """An error of any kind leaves the old file, and no temporary one."""
    file = tmp_path / "file"
    file.write_bytes(b"old")

    def fail(kind: type[BaseException]) -> None:
        with atomic_write(file) as part:
            part.write_bytes(b"half of the ne")
            assert file.read_bytes() == b"old"
            raise kind

    for kind in (ValueError, KeyboardInterrupt):
        with pytest.raises(kind):
            fail(kind)
    with pytest.raises(FileNotFoundError, match="other"), atomic_write(file):
        (tmp_path / "other").read_bytes()
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_two_writers_of_one_file_do_not_mix(tmp_path: Path) -> None:
    """Each has a temporary file of its own; the last to finish counts."""
    file = tmp_path / "file"
    with atomic_write(file) as first, atomic_write(file) as second:
        first.write_bytes(b"first")
        second.write_bytes(b"second")
        assert first.parent == second.parent == tmp_path
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"first"]


@pytest.mark.parametrize("mode", [0o600, 0o666])
def test_permissions(tmp_path: Path, mode: int) -> None:
    """What is private is never readable by others, not even on its way; else the umask decides."""
    umask = os.umask(0o022)
    try:
        with atomic_write(tmp_path / "file", mode=mode) as part:
            assert stat.S_IMODE(part.stat().st_mode) == mode & ~0o022
        assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode & ~0o022
    finally:
        os.umask(umask)


def test_what_a_killed_writer_left_can_be_removed(tmp_path: Path) -> None:
    """Of this file alone."""
    (tmp_path / ".file.123-abcd.part").touch()
    (tmp_path / ".file2.123-abcd.part").touch()
    remove_unfinished(tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == [".file2.123-abcd.part"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 80 kB, for which one must be root."""
    (folder := tmp_path / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=80k", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system may be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_is_one_line(small_disk: Path) -> None:
    """It names the folder and the space left there; the old file stays."""
    file = small_disk / "file"
    file.write_bytes(b"old")
    with pytest.raises(StreamHbafError) as raised:
        atomic_write_bytes(file, bytes(100_000))
    assert str(raised.value) == (
        f"{small_disk}: disk full (No space left on device, 0 MB left); make room"
    )
    assert [path.read_bytes() for path in small_disk.iterdir()] == [b"old"]


def test_folder_that_refuses_is_one_line(tmp_path: Path) -> None:
    """The error is the project's and the operating system's at once."""
    (tmp_path / "file").touch()
    with pytest.raises(WriteError) as raised:
        atomic_write_text(tmp_path / "file" / "below", "text")
    assert str(raised.value) == (
        f"{tmp_path}/file/below: can't be written (File exists); "
        "correct the folder or its permissions"
    )
    assert isinstance(raised.value, OSError)
