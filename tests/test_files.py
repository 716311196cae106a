"""Files are replaced whole or not at all, under a name that nobody foresees; devices and pipes are written into."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tfm.errors import UserError
from tfm.files import LEFT_BEHIND, check_writable, is_printed_to, write_atomically

ROOT = Path(__file__).parent.parent


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x"
    write_atomically(path, b"old")

    def full(descriptor):
        (part,) = tmp_path.glob(LEFT_BEHIND)
        assert part.read_bytes() == b"new" * 1000
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match=r"x: cannot be written \(No space left on device\)"):
        write_atomically(path, b"new" * 1000)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("x", b"old")]
    monkeypatch.undo()
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


def test_an_interrupt_while_writing_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "x"
    write_atomically(path, b"old")

    def interrupt(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("x", b"old")]


def test_a_place_that_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (tmp_path / "file" / "x", tmp_path / "file" / "deep" / "x", tmp_path / "folder", tmp_path / "loop"):
        for attempt in (lambda path=path: write_atomically(path, b"data"), lambda path=path: check_writable(path)):
            with pytest.raises(UserError, match="cannot be written"):
                attempt()
    assert names(tmp_path) == ["file", "folder", "loop"]


def test_a_planted_link_is_not_written_through(tmp_path):
    """In a shared folder another user may have foreseen where the first bytes go."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    folder = tmp_path / "shared"
    folder.mkdir()
    (folder / "model.safetensors.part").symlink_to(victim)
    write_atomically(folder / "model.safetensors", b"weights")
    assert victim.read_bytes() == b"mine"
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert (folder / "model.safetensors.part").is_symlink()


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o755])
def test_permissions_stay(tmp_path, mode):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    path.chmod(mode)
    write_atomically(path, b"new")
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert path.read_bytes() == b"new"


def test_what_was_private_is_never_readable_on_the_way(tmp_path, monkeypatch):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    path.chmod(0o600)
    seen = []
    monkeypatch.setattr("os.fchmod", lambda descriptor, mode: seen.append(stat.S_IMODE(os.fstat(descriptor).st_mode)))
    write_atomically(path, b"new")
    assert seen == [0o600]


def test_a_new_file_has_the_permissions_of_a_new_file(tmp_path):
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "x", b"new")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640


def test_links_are_followed(tmp_path):
    (tmp_path / "deep").mkdir()
    real, link, dangling = tmp_path / "deep" / "real", tmp_path / "link", tmp_path / "dangling"
    real.write_bytes(b"old")
    link.symlink_to(Path("deep") / "real")
    dangling.symlink_to(tmp_path / "deep" / "later")
    for path in (link, dangling):
        check_writable(path)
        write_atomically(path, b"new")
        assert path.is_symlink()
    assert real.read_bytes() == (tmp_path / "deep" / "later").read_bytes() == b"new"
    assert names(tmp_path / "deep") == ["later", "real"]


def test_a_pipe_is_written_into(tmp_path):
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    check_writable(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    write_atomically(pipe, b"data" * 50_000)
    reader.join(timeout=30)
    assert read == [b"data" * 50_000]
    assert pipe.is_fifo()


def test_devices_are_written_into(tmp_path):
    """By links: root's mistake here would take the machine its devices."""
    null, full = tmp_path / "null", tmp_path / "full"
    null.symlink_to("/dev/null")
    full.symlink_to("/dev/full")
    check_writable(null)
    write_atomically(null, b"data")
    with pytest.raises(UserError, match=r"full: cannot be written \(No space left on device\)"):
        write_atomically(full, b"data")
    assert all(link.is_symlink() and link.is_char_device() for link in (null, full))


@pytest.mark.parametrize("redirected", [False, True], ids=["pipe", "file"])
def test_standard_output_keeps_what_stands_around(tmp_path, redirected):
    """/dev/stdout opened anew would be another place in a file, from whose start it writes over the rest."""
    link = tmp_path / "link"
    link.symlink_to("/dev/stdout")
    program = (
        "from pathlib import Path\nfrom tfm.files import is_printed_to, write_atomically\n"
        f"path = Path({str(link)!r})\nprint('before')\n"
        "write_atomically(path, b'data ')\nprint('after', is_printed_to(path))"
    )
    command = [sys.executable, "-c", program]
    if redirected:
        with (tmp_path / "out").open("wb") as out:
            subprocess.run(command, cwd=ROOT, stdout=out, check=True)
        found = (tmp_path / "out").read_bytes()
    else:
        found = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
    assert found == b"before\ndata after True\n"
    assert link.is_symlink()


def test_other_files_are_not_what_is_printed(tmp_path):
    (tmp_path / "x").write_bytes(b"")
    assert not any(map(is_printed_to, (tmp_path / "x", tmp_path / "missing", tmp_path / "x" / "below", tmp_path)))


def test_what_can_be_written_is_found_without_writing(tmp_path):
    (tmp_path / "x").write_bytes(b"old")
    for path in (tmp_path / "x", tmp_path / "new", tmp_path / "deep" / "er" / "new"):
        check_writable(path)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("x", b"old")]
    if Path("/proc/self").is_dir():
        with pytest.raises(UserError, match=r"/proc/x: cannot be written"):
            check_writable(Path("/proc/x"))


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unwritable for root")
def test_a_file_that_may_not_be_written_stays(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    path.chmod(0o400)
    for attempt in (check_writable, lambda path: write_atomically(path, b"new")):
        with pytest.raises(UserError, match=r"x: cannot be written \(Permission denied\)"):
            attempt(path)
    assert path.read_bytes() == b"old"
