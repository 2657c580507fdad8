"""Pictures of any size and rate become frames of one size and rate: against plain references."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from rolling_kv.fitting import FITS, Clip, Fitting, Pictures, on_screen, read_colour
from rolling_kv.geometry import WAN_21, WAN_22

sides = st.integers(1, 60)
rates = st.fractions(Fraction(1, 2), 240, max_denominator=1001)


def numbered(count: int, fps) -> Pictures:
    """Frame k is grey k / 1000."""
    return Pictures((torch.arange(count) / 1000).view(-1, 1, 1, 1).expand(-1, 4, 4, 3), Fraction(fps))


def numbers(clip: Clip) -> list[int]:
    return [round((frame.mean().item() + 1) * 500) for frame in clip.frames()]


@settings(deadline=None)
@example(2, 9, 1, 3, "crop", Fraction(1, 2))  # one row and a half becomes two
@given(sides, sides, st.integers(1, 8), st.integers(1, 8), st.sampled_from(FITS), rates)
def test_a_box_lies_in_its_picture_and_keeps_its_shape(rows, columns, height, width, how, aspect):
    height, width = height * 16, width * 16
    kept, filled = Fitting(height, width, how).boxes(rows, columns, aspect)
    for box, (tall, wide) in ((kept, (rows, columns)), (filled, (height, width))):
        assert 0 <= box.top <= tall - box.height and 0 <= box.left <= wide - box.width
        assert box.height >= 1 and box.width >= 1
        assert abs(2 * box.top + box.height - tall) <= 1 and abs(2 * box.left + box.width - wide) <= 1
    if how != "crop":
        assert kept == (0, 0, rows, columns)
    if how != "pad":
        assert filled == (0, 0, height, width)
    if how == "stretch":
        return
    # The shape is right to within half a pixel of the side that was rounded, or a single pixel is left of it.
    scale = Fraction(filled.height, kept.height)
    wide = kept.width * aspect * scale
    slack = (
        max(aspect * scale, scale, Fraction(filled.width, 2 * kept.height), 1)
        if how == "crop"
        else max(Fraction(1), wide / filled.height)
    )
    assert abs(wide - filled.width) <= slack or 1 in (kept.height, kept.width, filled.height, filled.width)


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from(["crop", "pad", "stretch"]), st.integers(0, 9))
def test_it_is_the_box_resized_by_another_library(rows, columns, how, seed):
    """Pillow rounds to bytes, and cuts off, after each direction."""
    picture = np.random.default_rng(seed).integers(80, 176, (rows, columns, 3), np.uint8)
    fitting = Fitting(32, 48, how, (0.2, 0.4, 0.6))
    kept, filled = fitting.boxes(rows, columns)
    part = Image.fromarray(picture[kept.top : kept.top + kept.height, kept.left : kept.left + kept.width])
    expected = Image.new("RGB", (48, 32), (51, 102, 153))
    expected.paste(part.resize((filled.width, filled.height), Image.Resampling.BICUBIC), (filled.left, filled.top))
    (fitted,) = fitting(torch.from_numpy(picture)[None])[0].permute(1, 2, 3, 0)
    difference = (fitted * 127.5 + 127.5).numpy() - np.asarray(expected, dtype=float)
    assert np.abs(difference).max() < 2.5


def test_a_picture_of_the_size_stays_as_it_is():
    picture = torch.rand(2, 32, 48, 3)
    for how in FITS:
        assert torch.equal(Fitting(32, 48, how)(picture), (picture * 2 - 1).permute(3, 0, 1, 2)[None])


def test_bytes_and_floats_are_the_same_picture():
    picture = torch.randint(0, 256, (1, 20, 30, 4), dtype=torch.uint8)
    fitting = Fitting(32, 32, "pad")
    assert torch.equal(fitting(picture), fitting(picture.float() / 255))


@settings(deadline=None)
@given(st.sampled_from(FITS), st.sampled_from([16, 40, 64]))
def test_hidden_colours_show_nowhere(how, side):
    """What is transparent is the background, and its edge no mixture with what lies hidden behind it."""
    picture = torch.zeros(1, 32, 48, 4)
    picture[..., :3] = torch.tensor([1.0, 0.0, 0.0])
    picture[:, :, 24:] = torch.tensor([0.0, 0.0, 1.0, 1.0])  # blue on the right, hidden red on the left
    red, green, blue = Fitting(side, side, how, (0.0, 1.0, 0.0))(picture)[0, :, 0]
    assert red.max() == -1 and green[:, 0].min() > 0.99 and blue[side // 2, -1] > 0.99
    half = torch.full((1, 4, 4, 4), 0.5)
    assert torch.allclose(Fitting(16, 16, how, (1, 0, 0))(half)[0, :, 0, 8, 8], torch.tensor([0.5, -0.5, -0.5]))


def test_grey_pictures_have_three_channels():
    grey = torch.rand(1, 16, 16, 1)
    assert torch.equal(Fitting(16, 16)(grey), Fitting(16, 16)(grey.expand(-1, -1, -1, 3)))
    with_alpha = torch.cat([grey, torch.zeros_like(grey)], dim=3)
    assert (Fitting(16, 16)(with_alpha) == -1).all()


@pytest.mark.parametrize("shape", [(16, 16, 3), (1, 16, 16, 5), (0, 16, 16, 3), (1, 0, 16, 3)])
def test_other_tensors_are_refused(shape):
    with pytest.raises(ValueError, match=r"pictures must be \[T, H, W"):
        Fitting(16, 16)(torch.zeros(shape))


def test_anamorphic_pixels():
    """PAL DVD: 720x576 with pixels of 64:45 is a picture of 16:9."""
    aspect = Fraction(64, 45)
    assert Fitting(576, 1024).boxes(576, 720, aspect) == ((0, 0, 576, 720), (0, 0, 576, 1024))
    assert Fitting(576, 576).boxes(576, 720, aspect)[0] == (0, 157, 576, 405)
    assert Fitting(1024, 1024, "pad").boxes(576, 720, aspect)[1] == (224, 0, 576, 1024)
    assert Fitting(576, 1024).words(576, 720, aspect) == ""


# --- the moments that are taken


@settings(deadline=None)
@given(st.integers(1, 25), st.fractions(5, 240, max_denominator=1001))
def test_a_frame_is_what_is_seen_at_its_moment(count, fps):
    """Against the whole list searched for every moment."""
    source = numbered(count, fps)
    clip = Clip.of(source, Fitting(16, 16), WAN_21)
    late = Fraction(1, 16 * 8)
    expected = [
        max((k for k in range(count) if k / fps <= Fraction(i, 16) + late), default=0) for i in range(clip.count)
    ]
    assert numbers(clip) == expected
    assert clip.count % 4 == 1 and (count > 1 or clip.count == 1)
    if count > 1:
        missing = source.end * 16 - clip.count
        assert -1 < missing <= 4 or clip.count == 1


@settings(deadline=None)
@given(st.integers(1, 60), st.sampled_from([WAN_21, WAN_22]))
def test_at_the_models_rate_every_frame_is_taken(count, geometry):
    clip = Clip.of(numbered(count, geometry.fps), Fitting(16, 16), geometry)
    assert numbers(clip) == list(range(geometry.whole_frames(count)))


@settings(deadline=None)
@given(st.integers(2, 200), rates, st.floats(0.01, 20))
def test_the_last_seconds_end_with_the_last_picture(count, fps, seconds):
    clip = Clip.of(numbered(count, fps), Fitting(16, 16), WAN_21, "last", seconds)
    taken = numbers(clip)
    assert taken[-1] == count - 1 and clip.count % 4 == 1
    assert clip.start >= -Fraction(1, 8 * 16)
    wanted = WAN_21.pixel_frames(WAN_21.latent_frames(max(round(seconds * 16), 1)))
    assert clip.count == wanted or clip.count < wanted and clip.start < Fraction(4, 16)


def test_the_first_seconds():
    source = numbered(300, 30)
    assert [Clip.of(source, Fitting(16, 16), WAN_21, "first", s).count for s in (0.01, 1, 6, 100)] == [1, 17, 97, 157]
    assert numbers(Clip.of(source, Fitting(16, 16), WAN_21, "first", 0.3)) == [0, 2, 3, 5, 7]


def test_a_slide_stays_until_the_next_one_comes():
    """Of a variable frame rate every frame counts for as long as it is seen, and timestamps in milliseconds for what they mean."""
    slides = [(Fraction(0), "a"), (Fraction(4, 10), "b"), (Fraction(45, 100), "c"), (Fraction(2), "d")]
    seen = list(on_screen(slides, [Fraction(i, 4) for i in range(10)], Fraction(0)))
    assert "".join(seen) == "aaccccccdd"
    rounded = [(Fraction(round(k * 62.5 + 0.01), 1000), k) for k in range(50)]
    assert list(on_screen(rounded, (Fraction(k, 16) for k in range(50)), Fraction(1, 128))) == list(range(50))
    assert list(on_screen([], [Fraction(0)], Fraction(0))) == []
    assert list(on_screen([(Fraction(3), "late")], [Fraction(0), Fraction(9)], Fraction(0))) == ["late", "late"]


def test_frames_are_taken_one_at_a_time():
    read = []

    def frames():
        for index in range(10):
            read.append(index)
            yield Fraction(index), index

    seen = on_screen(frames(), map(Fraction, range(10)), Fraction(0))
    for moment in range(5):
        assert next(seen) == moment and len(read) <= moment + 2


@pytest.mark.parametrize(
    "source, fitting, how, said",
    [
        (
            numbered(300, 30), Fitting(480, 832), ("all",),
            "4x4 at 30 fps -> 832x480 at 16 fps, cropped 50 %, 157 frames, 9.81 of 10 s",
        ),
        (
            numbered(300, 30), Fitting(64, 64), ("last", 2),
            "4x4 at 30 fps -> 64x64 at 16 fps, 33 frames, the last 2.06 of 10 s",
        ),
        (
            Pictures(torch.zeros(1, 21, 33, 4), Fraction(16)), Fitting(64, 64, "pad", (1, 0.5, 0)), ("all",),
            "33x21 -> 64x64, bars on 36 %, transparent parts on #ff8000",
        ),
        (
            Pictures(torch.zeros(2, 20, 30, 3), Fraction(24000, 1001)), Fitting(64, 64, "stretch"), ("all",),
            "30x20 at 23.98 fps -> 64x64 at 16 fps, stretched 50 %, 1 frame, 0.06 of 0.08 s",
        ),
    ],
    ids=["crop", "last", "pad", "stretch"],
)  # fmt: skip
def test_what_was_taken_is_said_in_a_line(source, fitting, how, said):
    assert str(Clip.of(source, fitting, WAN_21, *how)) == said


@pytest.mark.parametrize("take, seconds", [("last", 0), ("first", -1), ("last", float("nan")), ("first", float("inf"))])
def test_seconds_are_positive(take, seconds):
    with pytest.raises(ValueError, match="the seconds to be taken must be positive"):
        Clip.of(numbered(3, 16), Fitting(16, 16), WAN_21, take, seconds)


def test_unknown_words_are_refused():
    with pytest.raises(ValueError, match="fit must be one of crop, pad, stretch, got 'cover'"):
        Fitting(16, 16, "cover")
    with pytest.raises(ValueError, match="taken must be one of all, first, last, got 'middle'"):
        Clip.of(numbered(3, 16), Fitting(16, 16), WAN_21, "middle")


def test_colours():
    assert read_colour("#ff8000") == (1, 128 / 255, 0) and read_colour(" FFFFFF ") == (1, 1, 1)
    for text in ("", "#fff", "red", "#12345g", "#1234567"):
        with pytest.raises(ValueError, match="a colour is written as #"):
            read_colour(text)
