"""Each example workflow in the real frontend: nothing missing, no complaints, and it runs with the Run button."""

import pytest
from graphs import PACK, read_video

from tools.comfy_client import first_file

WORKFLOWS = sorted((PACK / "workflows").glob("*.json"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=[path.stem for path in WORKFLOWS])
def test_a_workflow_opens_and_runs(frontend, path, tmp_path):
    nodes = frontend.open_workflow(path)
    assert nodes and all(node["known"] for node in nodes)
    assert frontend.complaints() == ""
    outputs = frontend.press_run()
    frontend.screenshot(tmp_path / f"{path.stem}.png")
    assert frontend.errors_from("RollingKV", "rolling-kv", "rolling_kv") == []
    video = read_video(frontend.client.view(first_file(outputs, ".mp4")))
    assert len(video.frames) > 16
