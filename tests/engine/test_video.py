"""The mp4 writer: what is in the file, and what is left on the disk when something goes wrong."""

import gc
import os
import weakref

import av
import numpy as np
import pytest
import torch

from rolling_kv import atomic
from rolling_kv.footage import read_picture
from rolling_kv.growing import GrowingVideo
from rolling_kv.video import ENCODERS, Encoder, VideoWriter, read_frames, read_video_info, to_uint8

COLOURS = torch.tensor(
    [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0], [200, 120, 40]], dtype=torch.uint8
)


class Cancelled(BaseException):
    """Stands for ComfyUI's interrupt, which is a BaseException too."""


def plain_frames(height=32, width=48) -> torch.Tensor:
    """uint8 [6, H, W, 3], one colour each."""
    return COLOURS.view(-1, 1, 1, 3).expand(-1, height, width, 3).contiguous()


def write(path, frames=None, **options):
    frames = plain_frames() if frames is None else frames
    with VideoWriter(path, 48, 32, **options) as writer:
        writer.write(frames)
    return path


def test_the_file_is_what_players_expect(tmp_path):
    with VideoWriter(tmp_path / "new" / "folder" / "video.mp4", 48, 32) as writer:
        for _ in range(3):
            writer.write(plain_frames())
    info = read_video_info(writer.path)
    assert (info.frames, info.width, info.height, info.fps, info.duration) == (18, 48, 32, 16.0, 18 / 16)
    assert (info.codec, info.pix_fmt) == ("h264", "yuv420p")
    data = writer.path.read_bytes()
    assert 0 < data.find(b"moov") < data.find(b"mdat")
    with av.open(str(writer.path)) as container:
        codec = container.streams.video[0].codec_context
        tags = (codec.color_primaries, codec.color_trc, codec.colorspace, codec.color_range)
    assert tags == (1, 1, 1, 1)  # BT.709 thrice, and the limited range
    assert os.listdir(writer.path.parent) == ["video.mp4"]


def test_colours_survive(tmp_path):
    frames = read_frames(write(tmp_path / "video.mp4"))
    assert frames.shape == (6, 32, 48, 3)
    assert (frames.int() - plain_frames().int()).abs().max() <= 3
    with av.open(str(tmp_path / "video.mp4")) as container:
        red = next(container.decode(video=0)).to_ndarray(format="yuv420p")
    assert abs(int(red[0, 0]) - 63) <= 1  # 16 + 219 * 0.2126; BT.601 would give 81


def test_floats_and_bytes_give_the_same_video(tmp_path):
    floats = plain_frames().float().permute(3, 0, 1, 2) / 127.5 - 1
    files = [
        write(tmp_path / f"{i}.mp4", frames)
        for i, frames in enumerate((plain_frames(), floats, floats[None], floats.half()))
    ]
    assert len({file.read_bytes() for file in files}) == 1


@pytest.mark.parametrize("side, frames", [(64, 40), (384, 6)])
def test_the_same_frames_give_the_same_file_whatever_the_memory_held_before(side, frames, tmp_path):
    """Not every processor shows it without the option: on some, x264 decides by what lies beside its pictures."""
    generator = torch.Generator().manual_seed(0)
    given = torch.randint(0, 40, (frames, side, side, 3), generator=generator, dtype=torch.uint8)
    sizes = torch.randint(1, 300_000, (6, 40), generator=generator)
    files = set()
    for row in sizes.tolist():
        junk = [np.full(size, size % 256, np.uint8) for size in row]
        del junk[::2]
        with VideoWriter(tmp_path / "video.mp4", side, side) as writer:
            assert writer._stream.codec_context.options["x264-params"].startswith("cpu-independent=1:")
            writer.write(given)
        files.add(writer.path.read_bytes())
    assert len(files) == 1


def test_to_uint8_rounds_and_clamps():
    values = torch.tensor([-2.0, -1.0, -0.9999, 0.0, 0.9999, 1.0, 2.0])
    assert to_uint8(values).tolist() == [0, 0, 0, 128, 255, 255, 255]


def test_scale_repeats_pixels(tmp_path):
    checkers = torch.zeros(2, 3, 5, 3, dtype=torch.uint8)
    checkers[:, ::2, ::2] = 255
    with VideoWriter(tmp_path / "video.mp4", 5, 3, scale=8, crf=0) as writer:
        writer.write(checkers)
    frames = read_frames(writer.path)
    assert frames.shape == (2, 24, 40, 3)
    expected = checkers.repeat_interleave(8, 1).repeat_interleave(8, 2).int()
    assert (frames.int() - expected).abs().max() <= 3


def test_rate_quality_and_metadata(tmp_path):
    noise = torch.randint(0, 256, (8, 32, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    prompt = 'a réd "ball"\nrolls'
    fine = write(tmp_path / "fine.mp4", noise, fps=24, crf=10, metadata={"prompt": prompt})
    coarse = write(tmp_path / "coarse.mp4", noise, fps=29.97, crf=40)
    assert fine.stat().st_size > 2 * coarse.stat().st_size
    assert read_video_info(fine).fps == 24 and abs(read_video_info(coarse).fps - 29.97) < 1e-3
    assert read_video_info(fine).metadata["prompt"] == prompt


def test_the_writer_keeps_no_frames(tmp_path):
    with VideoWriter(tmp_path / "video.mp4", 48, 32) as writer:
        frames = torch.zeros(1, 3, 4, 32, 48)
        gone = weakref.ref(frames)
        writer.write(frames)
        del frames
        gc.collect()
        assert gone() is None
        assert not any(isinstance(value, torch.Tensor) for value in vars(writer).values())


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, Cancelled])
def test_an_exception_leaves_the_folder_as_it_was(error, written, tmp_path):
    earlier = write(tmp_path / "video.mp4").read_bytes()
    with pytest.raises(error):
        with VideoWriter(tmp_path / "video.mp4", 48, 32) as writer:
            if written:
                writer.write(plain_frames()[:3])
            assert len(os.listdir(tmp_path)) == 2
            raise error
    assert os.listdir(tmp_path) == ["video.mp4"]
    assert (tmp_path / "video.mp4").read_bytes() == earlier


def test_an_interrupt_while_opening_or_closing_leaves_nothing(monkeypatch, tmp_path):
    def interrupt(*_, **__):
        raise Cancelled

    with pytest.raises(Cancelled):
        with VideoWriter(tmp_path / "video.mp4", 48, 32) as writer:
            writer.write(plain_frames())
            writer._finish = interrupt
    monkeypatch.setattr(av, "open", interrupt)
    with pytest.raises(Cancelled):
        VideoWriter(tmp_path / "video.mp4", 48, 32).__enter__()
    assert os.listdir(tmp_path) == []


def test_a_finished_video_replaces_an_earlier_one(tmp_path):
    write(tmp_path / "video.mp4")
    write(tmp_path / "video.mp4", plain_frames()[:2])
    assert read_video_info(tmp_path / "video.mp4").frames == 2
    assert os.listdir(tmp_path) == ["video.mp4"]


def test_a_video_that_cannot_be_renamed_is_kept(tmp_path):
    target = tmp_path / "video.mp4"
    with pytest.raises(OSError, match="cannot be replaced .* the video is kept as") as raised:
        with VideoWriter(target, 48, 32) as writer:
            writer.write(plain_frames())
            target.mkdir()  # stands for a file that another program holds open on Windows
    (kept,) = [file for file in tmp_path.iterdir() if file.is_file()]
    assert str(kept) in str(raised.value)
    assert read_video_info(kept).frames == 6


@pytest.mark.skipif(os.name == "nt", reason="needs pipes, and links that anybody may make")
def test_a_link_is_followed_and_a_pipe_refused(tmp_path):
    (tmp_path / "link.mp4").symlink_to(tmp_path / "video.mp4")
    write(tmp_path / "link.mp4")
    assert (tmp_path / "link.mp4").is_symlink() and read_video_info(tmp_path / "video.mp4").frames == 6
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(OSError, match="pipe.mp4 is a pipe or a device"):
        VideoWriter(tmp_path / "pipe.mp4", 48, 32)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_is_said_of_the_video(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "_begin", lambda part, *_: part.symlink_to("/dev/full"))
    with pytest.raises(OSError, match="cannot write .*video.mp4: No space left on device") as raised:
        write(tmp_path / "video.mp4")
    assert ".part" not in str(raised.value) and os.listdir(tmp_path) == []


def test_a_folder_that_goes_away_is_said_of_the_video(tmp_path):
    with pytest.raises(OSError, match="video.mp4") as raised:
        with VideoWriter(tmp_path / "folder" / "video.mp4", 48, 32) as writer:
            os.rename(tmp_path / "folder", tmp_path / "gone")
            writer.write(plain_frames())
    assert ".part" not in str(raised.value)


def test_a_video_without_frames_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no frames were written"):
        with VideoWriter(tmp_path / "video.mp4", 48, 32):
            pass
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "change, message",
    [
        ({"width": 47}, "even width and height, got 47x32"),
        ({"height": 0}, "even width and height, got 48x0"),
        ({"width": 15, "height": 16, "scale": 3}, "got 45x48"),
        ({"scale": 0}, "scale must be at least 1, got 0"),
        ({"width": 16386}, "at most 16384 pixels wide and high, got 16386x32"),
        ({"height": 2048, "scale": 16}, "at most 16384 pixels"),
        ({"fps": float("nan")}, "fps must be positive, got nan"),
        ({"fps": float("inf")}, "fps must be from 0.01 to 1000, got inf"),
        ({"fps": 1e-9}, "fps must be from 0.01 to 1000"),
        ({"crf": 52}, "crf must be from 0 to 51, got 52"),
        ({"fps": 0}, "fps must be positive, got 0"),
        ({"path": "video.avi"}, "must end in .mp4, got 'video.avi'"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(change, message, tmp_path):
    settings = {"path": "video.mp4", "width": 48, "height": 32} | change
    with pytest.raises(ValueError, match=message):
        VideoWriter(**(settings | {"path": tmp_path / settings["path"]}))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "frames",
    [torch.zeros(3, 2, 32, 46), torch.zeros(2, 3, 2, 32, 48), torch.zeros(2, 32, 48, 3), torch.zeros(3, 32, 48)],
    ids=["size", "batch", "layout", "dims"],
)
def test_frames_of_another_shape_are_refused(frames, tmp_path):
    with pytest.raises(ValueError, match=r"frames must be floats \[3, T, 32, 48\]") as raised:
        write(tmp_path / "video.mp4", frames)
    assert str(list(frames.shape)) in str(raised.value)
    assert os.listdir(tmp_path) == []


def test_a_place_that_cannot_be_written_shows_on_entering(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write into the folder .*file"):
        VideoWriter(tmp_path / "file" / "video.mp4", 48, 32).__enter__()
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(OSError, match="folder.mp4 is a folder"):
        VideoWriter(tmp_path / "folder.mp4", 48, 32).__enter__()
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.mp4"]


@pytest.mark.parametrize("rows, columns", [(40, 60), (60, 40), (1, 90), (20, 20)])
def test_a_picture_fills_the_size(rows, columns, tmp_path):
    """A ramp to the right: what is kept is its middle, and nothing is stretched."""
    ramp = np.tile(np.linspace(0, 255, columns).astype(np.uint8), (rows, 1))
    file = tmp_path / "picture.png"
    with av.open(str(file), "w", format="image2") as container:
        stream = container.add_stream("png", width=columns, height=rows, pix_fmt="rgb24")
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.stack([ramp] * 3, 2), format="rgb24")))
    picture = read_picture(file, 32, 32)
    assert picture.shape == (1, 3, 1, 32, 32) and picture.abs().max() <= 1
    line = picture[0, 0, 0].mean(0)
    assert abs(line.mean()) < 0.05 and (line.diff() > -0.01).all()
    kept = min(rows / columns, 1)
    assert line[-1] - line[0] == pytest.approx(2 * kept, abs=0.1 + 2 * kept / 32)
    assert (picture[0, :, 0] - line).abs().max() < 0.02


def test_a_file_without_a_picture_is_named(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    for name, said in (
        ("text.png", "holds no picture that can be read: give a .png"),
        ("absent.png", "there is no such file"),
    ):
        with pytest.raises(ValueError, match=f"{name}:? {said}"):
            read_picture(tmp_path / name, 32, 32)


def written(kind, path, frames, **options):
    """The writer of a video of that kind, once it is there."""
    height, width = frames.shape[1:3]
    with kind(path, width, height, **options) as writer:
        writer.write(frames)
    if kind is GrowingVideo:
        writer.finish()
    return writer


@pytest.mark.parametrize("kind", [VideoWriter, GrowingVideo])
def test_an_encoder_that_does_not_open_gives_way_to_x264(kind, tmp_path, monkeypatch, caplog):
    missing, refusing = Encoder("no_such_codec", "cq", {}), Encoder("libx264", "crf", {"preset": "none of them"})
    for number, (name, encoder) in enumerate([("hevc_nvenc", missing), ("h264_nvenc", refusing)]):
        monkeypatch.setitem(ENCODERS, name, encoder)
        writer = written(kind, tmp_path / f"{number}.mp4", plain_frames(), encoder=name)
        assert writer.note.startswith(f"the encoder {name} does not open here") and writer.note in caplog.text
        assert "avcodec_open2" not in writer.note, "the call and its options tell nobody anything"
        plain = written(kind, tmp_path / "plain.mp4", plain_frames())
        assert not plain.note and writer.path.read_bytes() == plain.path.read_bytes()


@pytest.mark.skipif("hevc_nvenc" not in av.codecs_available, reason="PyAV was built without NVIDIA's encoders")
@pytest.mark.skipif(torch.cuda.is_available(), reason="an encoder may open here")
@pytest.mark.parametrize("name", ["h264_nvenc", "hevc_nvenc"])
def test_without_a_gpu_its_encoders_give_way(name, tmp_path):
    frames = torch.zeros(2, 240, 320, 3, dtype=torch.uint8)
    assert "NVIDIA GPU" in written(VideoWriter, tmp_path / "a.mp4", frames, encoder=name).note
    assert read_video_info(tmp_path / "a.mp4").codec == "h264"


@pytest.mark.skipif("libx265" not in av.codecs_available, reason="PyAV was built without x265")
@pytest.mark.parametrize("kind", [VideoWriter, GrowingVideo])
def test_an_encoder_that_opens_is_used_and_hevc_has_the_tag_that_players_know(kind, tmp_path, monkeypatch):
    stands_in = ENCODERS["hevc_nvenc"]._replace(
        codec="libx265", quality="crf", options={"x265-params": "log-level=none:pools=none"}
    )
    monkeypatch.setitem(ENCODERS, "hevc_nvenc", stands_in)
    frames = torch.zeros(20, 240, 320, 3, dtype=torch.uint8)
    assert not written(kind, tmp_path / "a.mp4", frames, encoder="hevc_nvenc", crf=20).note
    with av.open(str(tmp_path / "a.mp4")) as container:
        codec = container.streams.video[0].codec_context
        assert (codec.name, codec.codec_tag) == ("hevc", "hvc1")
        assert codec.colorspace == 1 and sum(1 for _ in container.decode(video=0)) == 20


def test_an_encoder_that_nobody_knows_is_refused(tmp_path):
    with pytest.raises(ValueError, match="one of x264, h264_nvenc, hevc_nvenc, got 'av1'"):
        VideoWriter(tmp_path / "a.mp4", 48, 32, encoder="av1")
