"""A video that plays while it grows: what a reader sees before the end, and what it becomes."""

import os

import av
import pytest
import torch

from rolling_kv import growing as growing_module
from rolling_kv.growing import GrowingVideo, whole_length
from rolling_kv.video import VideoWriter, read_frames, read_video_info

TAGS = {"prompt": "a red circle", "seed": "1"}


def pictures(count=60, side=64) -> torch.Tensor:
    """uint8 [T, H, W, 3], moving."""
    base = torch.nn.functional.interpolate(
        torch.rand(1, 3, 20, 20, generator=torch.Generator().manual_seed(0)), (side + count, side + count)
    )
    frames = [base[0, :, at : at + side, at // 2 : at // 2 + side] for at in range(count)]
    return (torch.stack(frames).permute(0, 2, 3, 1) * 255).byte()


def readable(path) -> int:
    """Frames that a player shows of a file that may end anywhere."""
    count = 0
    try:
        with av.open(str(path)) as container:
            for _ in container.decode(video=0):
                count += 1
    except av.FFmpegError:
        pass
    return count


def test_the_finished_video_has_the_packets_of_one_that_was_written_at_once(tmp_path):
    frames = pictures()
    with VideoWriter(tmp_path / "a.mp4", 64, 64, metadata=TAGS) as writer:
        writer.write(frames)
    with GrowingVideo(tmp_path / "b.mp4", 64, 64, metadata=TAGS) as video:
        for piece in frames.split(4):
            video.write(piece)
    assert os.listdir(tmp_path).count("b.mp4") == 0
    assert video.finish() == tmp_path / "b.mp4" and sorted(os.listdir(tmp_path)) == ["a.mp4", "b.mp4"]
    packets = []
    for name in ("a.mp4", "b.mp4"):
        with av.open(str(tmp_path / name)) as container:
            packets.append([(p.pts, p.dts, p.duration, bytes(p)) for p in container.demux(video=0)])
    assert packets[0] == packets[1] and len(packets[0]) == 61
    assert read_video_info(tmp_path / "a.mp4") == read_video_info(tmp_path / "b.mp4")
    data = (tmp_path / "b.mp4").read_bytes()
    assert 0 < data.find(b"moov") < data.find(b"mdat")


def test_what_was_written_plays_at_any_time(tmp_path):
    frames = pictures(100)
    with GrowingVideo(tmp_path / "a.mp4", 64, 64, fps=16) as video:
        assert video.growing.exists()  # a place that cannot be written to shows before any work
        for done, frame in enumerate(frames.split(1), 1):
            video.write(frame)
            shown = readable(video.growing)
            assert done - 20 <= shown <= done, (done, shown)  # half a second of a fragment, and nine in the encoder
    assert readable(video.growing) == 100


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_error_the_file_plays_and_the_earlier_video_is_there(error, tmp_path):
    with VideoWriter(tmp_path / "a.mp4", 64, 64) as writer:
        writer.write(pictures(5))
    with pytest.raises(error), GrowingVideo(tmp_path / "a.mp4", 64, 64) as video:
        video.write(pictures(30))
        raise error
    assert readable(video.growing) == 30 and read_video_info(tmp_path / "a.mp4").frames == 5
    video.discard()
    assert os.listdir(tmp_path) == ["a.mp4"]


def test_where_there_is_no_room_for_a_copy_the_whole_fragments_become_the_video(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with GrowingVideo(tmp_path / "a.mp4", 64, 64) as video:
        video.write(pictures(40))
    with video.growing.open("ab") as file:
        file.write((5000).to_bytes(4, "big") + b"moof" + b"\1" * 300)  # as a disk that is full ends it
    monkeypatch.setattr(growing_module, "replacing", full)
    video.finish()
    assert os.listdir(tmp_path) == ["a.mp4"] and len(read_frames(tmp_path / "a.mp4")) == 40
    assert whole_length(tmp_path / "a.mp4") == (tmp_path / "a.mp4").stat().st_size


def test_where_nothing_whole_reached_the_disk_an_earlier_video_stays(tmp_path):
    with VideoWriter(tmp_path / "a.mp4", 64, 64) as writer:
        writer.write(pictures(5))
    earlier = (tmp_path / "a.mp4").read_bytes()
    with GrowingVideo(tmp_path / "a.mp4", 64, 64) as video:
        video.write(pictures(20))
    grown = video.growing.read_bytes()
    for length in (0, 30, 100, grown.index(b"moof") - 4, grown.index(b"mdat") + 10):
        video.growing.write_bytes(grown[:length])
        with pytest.raises(OSError, match="no frame of .*a.mp4 is whole on the disk"):
            video.finish()
        assert (tmp_path / "a.mp4").read_bytes() == earlier and video.place == video.growing


def test_a_frame_of_which_a_part_reached_the_disk_is_left_out(tmp_path):
    with GrowingVideo(tmp_path / "a.mp4", 64, 64) as video:
        video.write(pictures(40))
    grown = video.growing.read_bytes()
    os.truncate(video.growing, grown.rindex(b"mdat") - 4 - 2000)  # within the data of the last but one fragment
    assert 8 <= len(read_frames(video.finish())) < 40


def test_a_name_with_a_colon_is_no_protocol(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with GrowingVideo("12:30.mp4", 64, 64) as video:
        video.write(pictures(5))
    assert read_video_info(video.finish()).frames == 5


def test_without_a_frame_there_is_no_video(tmp_path):
    with GrowingVideo(tmp_path / "a.mp4", 64, 64) as video:
        pass
    with pytest.raises(ValueError, match="no frames were written"):
        video.finish()
    assert os.listdir(tmp_path) == []


def test_a_place_that_cannot_be_written_shows_on_entering(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write .*growing.mp4"), GrowingVideo(tmp_path / "file" / "a.mp4", 64, 64):
        pytest.fail("it opened")
