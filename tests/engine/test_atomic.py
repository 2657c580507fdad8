"""Files and folders that appear when they are whole: what is left on the disk, whatever goes wrong."""

import errno
import os
import subprocess
import sys

import psutil
import pytest

from rolling_kv import atomic
from rolling_kv.atomic import claiming, replacing

unix = pytest.mark.skipif(os.name == "nt", reason="needs pipes, and links that anybody may make")


def begin(place, text="half"):
    """Write a file as far as a process that is killed in the middle does; the hidden file that is left."""
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr(atomic, "_remove", lambda path: None)
        with replacing(place) as part:
            part.write_text(text)
            raise KeyboardInterrupt
    return part


def of_process(part, number):
    """Rename a hidden file to what another process would have called it."""
    return part.rename(part.with_name(part.name.replace(f"-{os.getpid()}.", f"-{number}.")))


def a_number_that_no_process_has():
    return max(psutil.pids()) + 1_000_000


def test_a_file_takes_its_place_when_it_is_whole(tmp_path):
    place = tmp_path / "new" / "folder" / "a.txt"
    for text in ("first", "second"):
        with replacing(place) as part:
            assert part.read_text() == "" and part.parent == place.parent
            part.write_text(text)
        assert place.read_text() == text and os.listdir(place.parent) == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt, SystemExit])
def test_whatever_goes_wrong_leaves_what_was_there(error, tmp_path):
    (tmp_path / "a.txt").write_text("earlier")
    with pytest.raises(error):
        with replacing(tmp_path / "a.txt") as part:
            part.write_text("half")
            raise error
    assert os.listdir(tmp_path) == ["a.txt"] and (tmp_path / "a.txt").read_text() == "earlier"


def test_a_folder_is_made_and_removed_alike(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with replacing(tmp_path / "model", folder=True) as part:
            (part / "file").write_text("half")
            raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []
    with replacing(tmp_path / "model", folder=True) as part:
        (part / "file").write_text("whole")
    assert (tmp_path / "model" / "file").read_text() == "whole"


def test_what_a_killed_writer_leaves_goes_with_the_next_one(tmp_path):
    place = tmp_path / "a.txt"
    program = (
        "import os, sys; from rolling_kv.atomic import replacing\n"
        "with replacing(sys.argv[1]) as part:\n"
        "    part.write_text('half'); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", program, place], cwd=atomic.Path(atomic.__file__).parents[1])
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".a.txt.") and left.endswith(".part")
    with replacing(tmp_path / "b.txt"):
        assert left in os.listdir(tmp_path), "of another place"
    with replacing(place):
        assert left not in os.listdir(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "b.txt"]


def test_what_others_are_writing_stays(tmp_path):
    place = tmp_path / "a.txt"
    of_this_process = begin(place)
    of_another = of_process(begin(place), psutil.Process().ppid())
    elsewhere = of_process(begin(place), a_number_that_no_process_has())
    elsewhere = elsewhere.rename(elsewhere.with_name(".a.txt.00000000-" + elsewhere.name.partition("-")[2]))
    with replacing(place):
        pass
    assert of_this_process.exists() and of_another.exists()
    assert elsewhere.exists(), "its machine shares the folder; its processes are not seen here"


def test_a_number_that_another_process_has_by_now_is_not_mistaken(tmp_path):
    """In a container every run may have the same number."""
    left = begin(tmp_path / "a.txt")
    os.utime(left, (1_000_000, 1_000_000))  # long before this process began
    gone = of_process(begin(tmp_path / "a.txt"), a_number_that_no_process_has())
    with replacing(tmp_path / "a.txt"):
        assert not left.exists() and not gone.exists()


@pytest.mark.parametrize("length", [5, 60])
def test_who_writes_to_a_name_stops_nobody_who_writes_to_another_that_begins_alike(tmp_path, length):
    """As videos of a batch do, whose names are made of one prompt."""
    one, two = (tmp_path / f"{'x' * length}-{seed}.mp4" for seed in range(2))
    with claiming(one), claiming(two):
        with pytest.raises(FileExistsError, match="is being written by another run"), claiming(one):
            pass
    assert os.listdir(tmp_path) == []


def test_long_names_have_room(tmp_path):
    place = tmp_path / ("я" * 125 + ".txt")  # 254 bytes
    with replacing(place) as part:
        part.write_text("whole")
    assert place.read_text() == "whole"
    with pytest.raises(OSError, match="cannot write .*name too long"):
        replacing(tmp_path / ("я" * 126 + ".txt")).__enter__()


@unix
def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "files").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "files" / "a.txt")
    for text in ("first", "second"):  # the first time it leads nowhere
        with replacing(tmp_path / "link") as part:
            part.write_text(text)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "files" / "a.txt").read_text() == text
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(OSError, match="a link that leads to itself"):
        replacing(tmp_path / "loop").__enter__()


@unix
def test_what_a_file_cannot_replace_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    refused = {"pipe": "a pipe or a device", "folder": "is a folder", "file/a.txt": "cannot write into the folder"}
    for name, message in refused.items():
        with pytest.raises(OSError, match=message):
            replacing(tmp_path / name).__enter__()
    with pytest.raises(OSError, match="file is a file"):
        replacing(tmp_path / "file", folder=True).__enter__()
    with pytest.raises(ValueError, match="zero character"):
        replacing(tmp_path / "a\0b").__enter__()
    assert sorted(os.listdir(tmp_path)) == ["file", "folder", "pipe"]


def test_messages_name_the_place_and_not_the_hidden_file(tmp_path):
    for filename in (True, False):
        with pytest.raises(OSError, match="a.txt: No space left on device") as raised:
            with replacing(tmp_path / "a.txt") as part:
                raise OSError(errno.ENOSPC, "No space left on device", *[str(part)] * filename)
        assert ".part" not in str(raised.value)
    with pytest.raises(FileNotFoundError, match="other.txt"):
        with replacing(tmp_path / "a.txt"):
            (tmp_path / "other.txt").read_text()


@pytest.mark.parametrize("folder", [True, False])
def test_what_cannot_take_its_place_is_kept_where_people_see_it(folder, tmp_path, monkeypatch):
    place = tmp_path / "a.txt"
    replace = os.replace

    def in_use(source, target):  # as on Windows, where another program holds the file open
        if target == place:
            raise PermissionError(errno.EACCES, "Access is denied")
        replace(source, target)

    with pytest.raises(OSError, match="a.txt cannot be replaced") as raised:
        with replacing(place, what="report") as part:
            part.write_text("whole")
            if folder:
                place.mkdir()
            else:
                monkeypatch.setattr(os, "replace", in_use)
    (kept,) = [path for path in tmp_path.iterdir() if path.is_file()]
    assert not kept.name.startswith(".") and kept.suffix == ".txt" and kept.read_text() == "whole"
    assert f"the report is kept as {kept}" in str(raised.value)
    assert ("it is a folder now" if folder else "is it open in another program?") in str(raised.value)
