"""Files of many kinds, as they are to be seen; and what is left of a file that cannot be read."""

import io
import tracemalloc
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from footage_files import exif, greys, quarters, write_clip
from PIL import Image, ImageOps

from rolling_kv.fitting import Clip, Fitting
from rolling_kv.footage import Footage, read_picture
from rolling_kv.geometry import WAN_21


def pictures_of(file):
    footage = Footage.open(file)
    return footage, [picture for _, picture in footage.read(footage.start)]


def only_picture(file) -> np.ndarray:
    _, (picture,) = pictures_of(file)
    return picture.numpy().astype(int)


def numbers(file, step=5, take="all", seconds=0.0, window=(0, 0)) -> list[int]:
    """Of frames that tell theirs, as `greys` makes them."""
    clip = Clip.of(Footage.open(file, *window), Fitting(32, 48), WAN_21, take, seconds)
    return [round((frame.mean().item() + 1) * 127.5 / step) for frame in clip.frames()]


# --- pictures

FLAT = {".png": 0, ".bmp": 0, ".tiff": 0, ".webp": 3, ".jpg": 90}
"""Kinds without an alpha channel, and how far colours may be off: a JPEG has half of their resolution."""


@pytest.mark.parametrize("suffix", FLAT)
def test_pictures(suffix, tmp_path):
    path = tmp_path / f"picture{suffix}"
    Image.fromarray(quarters()).save(path, **{".webp": {"lossless": True}}.get(suffix, {}))
    assert np.abs(only_picture(path)[..., :3] - quarters()).max() <= FLAT[suffix]


@pytest.mark.parametrize(
    "kind", ["rgba.png", "la.png", "palette.png", "transparent.png", "rgba.webp", "rgba.tiff", "palette.gif"]
)
def test_alpha_channels_are_kept(kind, tmp_path):
    picture, path = Image.fromarray(quarters(alpha=True)), tmp_path / kind
    if kind == "la.png":
        picture = picture.convert("LA")
    if kind == "palette.png":
        picture = picture.quantize(8, method=Image.Quantize.FASTOCTREE)
    if kind == "transparent.png":  # one colour stands for what is not there
        picture = Image.fromarray(quarters())
        picture.save(path, transparency=(255, 0, 0))
    else:
        picture.save(path, **({"lossless": True, "exact": True} if kind == "rgba.webp" else {}))
    footage, (read,) = pictures_of(path)
    assert footage.has_alpha and read.shape == (24, 36, 4)
    assert read[0, 0, 3] == 0 and read[0, -1, 3] == 255
    shown = read_picture(path, 24, 36, background=(1.0, 0.5, 0.0))[0, :, 0]
    torch.testing.assert_close(shown[:, 0, 0], torch.tensor([1.0, 0.0, -1.0]))


@pytest.mark.parametrize("mode", ["L", "1", "P", "I;16", "CMYK"])
def test_pictures_of_other_modes(mode, tmp_path):
    path = tmp_path / f"picture.{'jpg' if mode == 'CMYK' else 'png'}"
    if mode == "I;16":
        grey = np.asarray(Image.fromarray(quarters()).convert("L"))
        Image.fromarray(grey.astype(np.uint16) * 257).save(path)
        expected = np.repeat(grey[..., None], 3, 2)
    else:
        picture = Image.fromarray(quarters()).convert(mode)
        picture.save(path)
        expected = np.asarray(picture.convert("RGB"))
    difference = np.abs(only_picture(path)[..., :3] - expected.astype(int))
    assert difference.max() <= (40 if mode == "CMYK" else 1) and difference.mean() < 3


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_of_a_phone_are_turned(orientation, suffix, tmp_path):
    path = tmp_path / f"picture{suffix}"
    Image.fromarray(quarters()).save(path, exif=exif(orientation))
    with Image.open(path) as picture:
        expected = np.asarray(ImageOps.exif_transpose(picture).convert("RGB")).astype(int)
    footage = Footage.open(path)
    assert (footage.height, footage.width) == expected.shape[:2]
    assert np.abs(only_picture(path) - expected).mean() < 8  # another turn or mirroring is off by 60 and more


def test_the_density_of_a_print_is_no_shape_of_pixels(tmp_path):
    Image.fromarray(quarters()).save(tmp_path / "picture.jpg", dpi=(72, 144))
    assert Footage.open(tmp_path / "picture.jpg").pixel_aspect == 1


@pytest.mark.parametrize("rows, columns", [(40, 60), (60, 40), (1, 90), (21, 33)])
@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_read_picture_fits_it(fit, rows, columns, tmp_path):
    Image.fromarray(quarters(rows, columns)).save(tmp_path / "picture.png")
    shown = read_picture(tmp_path / "picture.png", 32, 48, fit, (0.5, 0.5, 0.5))
    expected = Fitting(32, 48, fit, (0.5, 0.5, 0.5))(torch.from_numpy(quarters(rows, columns))[None])
    assert shown.shape == (1, 3, 1, 32, 48) and torch.equal(shown, expected)


# --- videos

VIDEOS = {
    "h264.mp4": dict(codec="libx264", pix_fmt="yuv444p", options={"crf": "1"}),
    "ten_bit.mp4": dict(codec="libx264", pix_fmt="yuv420p10le", options={"crf": "1"}),
    "vp9.webm": dict(codec="libvpx-vp9", pix_fmt="yuv420p", options={"crf": "4", "b:v": "0"}),
    "ffv1.mkv": dict(codec="ffv1", pix_fmt="bgr0"),
    "mpeg4.avi": dict(codec="mpeg4", pix_fmt="yuv420p", options={"qscale": "2"}),
    "prores.mov": dict(codec="prores_ks", pix_fmt="yuv422p10le"),
    "raw.h264": dict(codec="libx264", pix_fmt="yuv420p", options={"crf": "1", "bf": "0"}),
    "stream.ts": dict(codec="libx264", pix_fmt="yuv420p", options={"crf": "1"}),
    "grey.mkv": dict(codec="ffv1", pix_fmt="gray"),
    "animation.gif": dict(codec="gif", pix_fmt="rgb8", fps=10),
}


@pytest.mark.parametrize("name", VIDEOS)
def test_videos(name, tmp_path):
    options = {"fps": 16} | VIDEOS[name]
    path = write_clip(tmp_path / name, greys(20), **options)
    footage, pictures = pictures_of(path)
    shades = [picture[..., :3].float().mean().item() for picture in pictures]
    if name == "raw.h264":  # says nothing of a rate
        assert len(pictures) == 20 and footage.fps == 25
    else:
        assert footage.frames == len(pictures) == 20
        assert float(footage.fps) == pytest.approx(options["fps"], rel=0.02)
        assert float(footage.end) == pytest.approx(20 / options["fps"], abs=0.01)
    coarse = {"animation.gif": 20}.get(name, 4)
    assert [shade - 5 * k for k, shade in enumerate(shades)] == pytest.approx([0] * 20, abs=coarse)


@pytest.mark.parametrize("name", VIDEOS)
def test_reading_from_the_middle_gives_the_same_pictures(name, tmp_path):
    """Also where a file has no index to go by, or a key frame lies far off."""
    options = {"fps": 16} | VIDEOS[name]
    footage = Footage.open(write_clip(tmp_path / name, greys(40, step=6), **options))
    whole = list(footage.read(Fraction(0)))
    for start in (whole[13][0], whole[37][0] + Fraction(1, 50)):
        part = list(footage.read(start))
        assert part[0][0] <= start and len(part) <= len(whole)
        for (time, picture), (expected_time, expected) in zip(part, whole[len(whole) - len(part) :]):
            assert time == expected_time and torch.equal(picture, expected)


@pytest.mark.parametrize("turn", [0, 90, 180, 270])
def test_videos_of_a_phone_are_turned(turn, tmp_path):
    frames = np.stack([quarters(32, 48)] * 5)
    path = write_clip(tmp_path / "phone.mp4", frames, turn=turn, pixel_aspect=Fraction(4, 3))
    footage, pictures = pictures_of(path)
    expected = np.rot90(quarters(32, 48), turn // 90)
    assert (footage.height, footage.width) == expected.shape[:2]
    assert np.abs(pictures[0].numpy().astype(int) - expected).mean() < 12
    assert footage.pixel_aspect == (Fraction(3, 4) if turn % 180 else Fraction(4, 3))


def test_a_video_at_another_angle_is_refused(tmp_path):
    path = write_clip(tmp_path / "slanted.mp4", greys(2), turn=30)
    with pytest.raises(ValueError, match="slanted.mp4 is to be shown turned by (-)?(29|30) degrees: only right angles"):
        Footage.open(path)


@pytest.mark.parametrize(
    "name, codec, pix_fmt, metadata",
    [
        ("vp9.webm", "libvpx-vp9", "yuva420p", {}),
        ("ffv1.mkv", "ffv1", "bgra", {}),
        ("prores.mov", "prores_ks", "yuva444p10le", {}),
        ("animation.mov", "qtrle", "argb", {}),
    ],
)
def test_the_alpha_channel_of_a_video(name, codec, pix_fmt, metadata, tmp_path):
    path = write_clip(tmp_path / name, np.stack([quarters(32, 48, alpha=True)] * 5), 16, codec, pix_fmt)
    footage, pictures = pictures_of(path)
    assert footage.has_alpha and len(pictures) == 5
    for frame in Clip.of(footage, Fitting(32, 48), WAN_21).frames():
        assert frame[..., :20].max() < -0.9 and frame[..., 28:].mean() > 0


def test_hdr_is_noted(tmp_path):
    options = {"x264-params": "transfer=smpte2084:colorprim=bt2020:colormatrix=bt2020nc"}
    path = write_clip(tmp_path / "hdr.mp4", greys(3), pix_fmt="yuv420p10le", options=options)
    assert Footage.open(path).note == f"{path} has HDR colours (PQ): they are taken as they are, and look pale."
    assert Footage.open(write_clip(tmp_path / "plain.mp4", greys(3))).note == ""


def test_a_variable_rate(tmp_path):
    times = [0, 100, 130, 500, 1000, 1060]
    path = write_clip(
        tmp_path / "v.mkv", greys(6, step=20), 30, "ffv1", "bgr0", times=times, time_base=Fraction(1, 1000)
    )
    clip = Clip.of(Footage.open(path), Fitting(32, 48), WAN_21, "first", 1.06)
    expected = [max(k for k in range(6) if times[k] <= i * 62.5 + 7.8) for i in range(clip.count)]
    assert numbers(path, step=20) == expected == [0, 0, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3, 4]


def test_the_rate_of_the_model_survives_a_file_that_rounds_to_milliseconds(tmp_path):
    path = write_clip(tmp_path / "v.webm", greys(41), 16, "libvpx-vp9", options={"crf": "4", "b:v": "0"})
    assert numbers(path) == list(range(41))


@pytest.mark.parametrize("bframes", [0, 3])
def test_the_last_seconds_and_a_window(bframes, tmp_path):
    options = {"g": "12", "bf": str(bframes), "crf": "0"}
    path = write_clip(tmp_path / "v.mp4", greys(250, step=1), 16, "libx264rgb", "rgb24", options=options)
    assert numbers(path, 1, take="last", seconds=1) == list(range(233, 250))
    assert numbers(path, 1, take="first", seconds=0.5) == list(range(9))
    assert numbers(path, 1, window=(5, 1.1)) == list(range(80, 97))
    assert numbers(path, 1, window=(5, 2), take="last", seconds=0.5) == list(range(103, 112))
    with pytest.raises(ValueError, match="is 15.625 s long, and is to be taken from 16 s on"):
        Footage.open(path, start=16)


def test_the_last_seconds_may_begin_with_the_first_picture(tmp_path):
    """It comes a little late for the first moment, and not every kind of file can be searched for a time before it."""
    write_clip(tmp_path / "a.flv", greys(278, step=0.5), codec="flv", fps=Fraction(30000, 1001))
    clip = Clip.of(Footage.open(tmp_path / "a.flv"), Fitting(32, 48), WAN_21, "last", 100)
    assert clip.start < 0 and sum(1 for _ in clip.frames()) == clip.count == 149


def test_a_video_in_memory(tmp_path):
    path = write_clip(tmp_path / "v.mp4", greys(20), options={"crf": "1"})
    assert numbers(io.BytesIO(path.read_bytes())) == numbers(path) == list(range(17))


def test_odd_sizes_and_one_frame(tmp_path):
    frames = np.stack([quarters(31, 47)])
    path = write_clip(tmp_path / "one.mkv", frames, 30, "ffv1", "bgr0")
    footage = Footage.open(path)
    assert (footage.frames, footage.height, footage.width) == (1, 31, 47)
    assert Clip.of(footage, Fitting(32, 48), WAN_21).count == 1


# --- what cannot be read


def test_files_without_a_picture_are_named(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "folder.mp4").mkdir()
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    for name in ("text.png", "empty.mp4", "sound.wav"):
        with pytest.raises(ValueError, match=f"{name} holds no picture that can be read: give a .png"):
            Footage.open(tmp_path / name)
    for name in ("absent.png", "folder.mp4"):
        with pytest.raises(ValueError, match=f"{name}: there is no such file"):
            Footage.open(tmp_path / name)
    with pytest.raises(ValueError, match="the video holds no picture"):
        Footage.open(io.BytesIO(b"no video"))


def test_pictures_in_parts_are_refused(tmp_path):
    Image.fromarray(quarters(alpha=True)).save(tmp_path / "parts.avif")
    with pytest.raises(ValueError, match="parts.avif keeps its picture in several parts .* save it as .png"):
        Footage.open(tmp_path / "parts.avif")
    Image.fromarray(quarters()).save(tmp_path / "whole.avif")
    assert np.abs(only_picture(tmp_path / "whole.avif") - quarters()).mean() < 12


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_video_that_breaks_off_is_taken_as_far_as_it_goes(share, tmp_path):
    path = write_clip(tmp_path / "v.mkv", greys(40), 16, "ffv1", "bgr0")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    taken = numbers(path)
    assert taken == list(range(len(taken))) and abs(len(taken) - 40 * share) < 9


def test_damaged_pictures_leave_the_one_before_in_view(tmp_path):
    path = write_clip(tmp_path / "v.mkv", greys(21), 16, "libx264", options={"g": "1", "crf": "1"})
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        payloads = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    start = data.find(payloads[10])
    data[start + 4 : start + len(payloads[10])] = bytes(len(payloads[10]) - 4)
    path.write_bytes(data)
    taken = numbers(path)
    assert taken[:9] == list(range(9)) and taken[-1] == 20 and len(taken) == 21 and taken == sorted(taken)


# --- memory


def test_a_long_video_is_read_in_the_memory_of_a_short_one(tmp_path):
    """Its last second, or all of it: what Python holds at the peak does not grow with ten times the length."""

    def peak(count: int, take: str) -> int:
        path = tmp_path / f"{count}.mp4"
        if not path.exists():
            options = {"preset": "ultrafast", "g": "50"}
            write_clip(path, np.broadcast_to(quarters(64, 96), (count, 64, 96, 3)), 30, options=options)
        tracemalloc.start()
        frames = Clip.of(Footage.open(path), Fitting(32, 48), WAN_21, take, 1.0).frames()
        made = sum(1 for _ in frames)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert made == (17 if take == "last" else WAN_21.whole_frames(round(count * 16 / 30)))
        return most

    for take in ("all", "last"):  # a frame takes 18 kB, its times 16 bytes
        assert peak(1000, take) < peak(100, take) + 500_000
