import uuid
from pathlib import Path

import folder_paths
from comfy_api.latest import Types, io, ui

from ..rolling_kv.video import read_video_info
from .guard import guarded
from .types import CATEGORY


class RollingKVCompareVideos(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RollingKVCompareVideos",
            display_name="Compare Videos",
            category=CATEGORY,
            description=(
                "Plays two videos in step inside the node, over each other with a wipe or side by side: for two seeds, two "
                "schedules, two settings of the cache. Any videos will do, also of different lengths and sizes."
            ),
            search_aliases=["compare", "side by side", "wipe", "a/b", "difference", "preview video"],
            inputs=[
                io.Video.Input("first", tooltip="On the left. From Decode Video, Stream Video or Load Video."),
                io.Video.Input("second", tooltip="On the right."),
                io.String.Input(
                    "first_name", optional=True, default="", tooltip="What stands in its corner: the seed, say."
                ),
                io.String.Input("second_name", optional=True, default="", tooltip="The same for the second video."),
            ],
            outputs=[
                io.Video.Output(display_name="first", tooltip="The first video as it came, for Save Video."),
                io.Video.Output(display_name="second", tooltip="The second video as it came."),
            ],
            is_output_node=True,
        )

    @classmethod
    @guarded
    def execute(cls, first, second, first_name="", second_name="") -> io.NodeOutput:
        shown = [_playable(first, first_name), _playable(second, second_name)]
        return io.NodeOutput(first, second, ui={"compared": shown})


def _playable(video, name: str) -> dict:
    """The video as an mp4 in ComfyUI's temporary folder, which any browser plays, and what a page needs to know of it.

    Where it is one already, its streams are copied as they are.
    """
    path = Path(folder_paths.get_temp_directory()) / f"rolling_kv_compare_{uuid.uuid4().hex}.mp4"
    path.parent.mkdir(parents=True, exist_ok=True)
    video.save_to(str(path), format=Types.VideoContainer.MP4, codec=Types.VideoCodec.H264)
    info = read_video_info(path)
    facts = {"width": info.width, "height": info.height, "frames": info.frames, "fps": float(info.fps)}
    return {**ui.SavedResult(path.name, "", io.FolderType.temp), "name": " ".join(name.split()), **facts}
