"""Wan's numbers: how pixels, latent frames, tokens and seconds follow from each other.

They belong to a VAE and to the transformer that works on its latents. A model of another compression is another
`Geometry`, and no other line of the code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

LONGEST_SECONDS = 366 * 24 * 3600
TEXT_LENGTH = 512
"""Tokens that a prompt embedding is zero-padded to, as in training."""


@dataclass(frozen=True)
class Geometry:
    """The sizes that a VAE and its transformer impose on a video.

    name: of the models that have it, for people.
    channels: of the latents.
    spatial: pixels per latent cell along height and width.
    temporal: pixel frames per latent frame; the very first latent frame is a single pixel frame.
    patch: latent cells per token, along time, height and width.
    fps: frames per second that the models were trained at.
    size: height and width in pixels that they were trained at.
    """

    name: str = "Wan 2.1"
    channels: int = 16
    spatial: int = 8
    temporal: int = 4
    patch: tuple[int, int, int] = (1, 2, 2)
    fps: int = 16
    size: tuple[int, int] = (480, 832)

    @classmethod
    def of(cls, transformer) -> Geometry:
        """That of a diffusers `WanTransformer3DModel`. Raises ValueError for latents that belong to no known VAE."""
        config = transformer.config
        return replace(geometry_of(config.in_channels), patch=tuple(config.patch_size))

    @property
    def multiple(self) -> int:
        """Pixel heights and widths must be multiples of this."""
        return self.spatial * math.lcm(*self.patch[1:])

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """The latent size of a video of `height` x `width` pixels. Raises ValueError unless both are multiples."""
        multiple, wrong = self.multiple, []
        for name, value in (("height", height), ("width", width)):
            if value < multiple or value % multiple:
                lower = max(value // multiple * multiple, multiple)
                wrong.append(
                    f"{name} must be a multiple of {multiple} pixels, got {value}; "
                    f"the nearest are {lower} and {lower + multiple}"
                )
        if wrong:
            raise ValueError(", and ".join(wrong))
        return height // self.spatial, width // self.spatial

    def pixel_size(self, latent_height: int, latent_width: int) -> tuple[int, int]:
        """Height and width in pixels of a video with that latent size."""
        return latent_height * self.spatial, latent_width * self.spatial

    def grid(self, latent_height: int, latent_width: int) -> tuple[int, int]:
        """Tokens along height and width of one latent frame."""
        _, patch_height, patch_width = self.patch
        return latent_height // patch_height, latent_width // patch_width

    def tokens_per_frame(self, latent_height: int, latent_width: int) -> int:
        """Tokens of one latent frame."""
        return math.prod(self.grid(latent_height, latent_width))

    @property
    def cells_per_token(self) -> int:
        """Latent cells that make one token."""
        return math.prod(self.patch)

    def pixel_frames(self, latent_frames: int) -> int:
        """Pixel frames that `latent_frames` latent frames decode to, counted from the start of the video."""
        return 0 if latent_frames == 0 else self.temporal * (latent_frames - 1) + 1

    def latent_frames(self, pixel_frames: int) -> int:
        """The fewest latent frames that decode to at least `pixel_frames` pixel frames, from the start of the video."""
        return 0 if pixel_frames == 0 else math.ceil((pixel_frames - 1) / self.temporal) + 1

    def whole_frames(self, pixel_frames: int) -> int:
        """The most of so many pixel frames, from the start of a video, that make whole latent frames."""
        return pixel_frames - (pixel_frames - 1) % self.temporal

    def seconds(self, latent_frames: int) -> float:
        """Length of a video of `latent_frames` latent frames."""
        return self.pixel_frames(latent_frames) / self.fps

    def latent_frames_for(self, seconds: float, after: int = 0) -> int:
        """The fewest latent frames that add at least `seconds` to a video of `after` latent frames.

        Raises ValueError unless `seconds` is positive and at most a year.
        """
        if not seconds > 0:
            raise ValueError(f"the length must be positive, got {seconds} seconds")
        if seconds > LONGEST_SECONDS:
            raise ValueError(f"the length must be at most a year of video, got {seconds:g} seconds")
        end = self.pixel_frames(after) + max(round(seconds * self.fps), 1)
        return self.latent_frames(end) - after


WAN_21 = Geometry()
"""Of the Wan 2.1 VAE and the 1.3B and 14B transformers: 8x8 pixels and 4 frames per latent cell, 16 channels, 16 fps."""

WAN_22 = Geometry("Wan 2.2 5B", channels=48, spatial=16, fps=24, size=(704, 1280))
"""Of the Wan 2.2 VAE and the 5B transformer (TI2V-5B) alone: Wan 2.2's 14B models have Wan 2.1's."""

GEOMETRIES = {geometry.channels: geometry for geometry in (WAN_21, WAN_22)}
"""Every geometry that is known, by the number of latent channels: the one number that latents themselves tell."""


def geometry_of(channels: int) -> Geometry:
    """The geometry of latents with that many channels. Raises ValueError for a number that belongs to no known VAE."""
    if channels not in GEOMETRIES:
        known = " or ".join(map(str, GEOMETRIES))
        raise ValueError(f"latents of the models here have {known} channels, got {channels}")
    return GEOMETRIES[channels]
