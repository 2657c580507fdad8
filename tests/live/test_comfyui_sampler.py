"""The benchmark with ComfyUI's own sampler in it: the same chunks, from the same weights, prompt and noise."""

import json

import pytest

from rolling_kv.bench.chunks import cli
from rolling_kv.cli import main
from tools.comfyui import sampler as comfyui_sampler


def test_comfyui_makes_the_same_chunks(install, tmp_path, monkeypatch, capsys):
    compared = []
    check = cli.measure.__globals__["check_agreement"]

    def noted(workload, index, videos):
        compared.append({letter for letter, video in videos.items() if video is not None})
        check(workload, index, videos)

    monkeypatch.setitem(cli.measure.__globals__, "check_agreement", noted)
    target = tmp_path / "bench.json"
    main(["bench", "--size", "tiny", "--chunks", "4", "--methods", "ad", "--device", "cpu", "--json", str(target)])
    assert "| (d) ComfyUI SamplerARVideo" in capsys.readouterr().out
    theirs = json.loads(target.read_text())["methods"]["d"]
    assert len(theirs["seconds"][0]) == len(theirs["peak_bytes"]) == 4
    assert theirs["kv_bytes"] == [2 * 4 * 12 * 16 * 128 * 4] * 4, "keys and values of all 12 frames from the start"
    assert compared == [{"a", "d"}] * 3 + [{"a"}], "until the window of 9 frames is full"


def test_comfyuis_last_words_are_passed_on(install, monkeypatch):
    monkeypatch.setattr(comfyui_sampler, "save_file", lambda weights, path: path.write_bytes(b"no weights"))
    with pytest.raises(SystemExit, match="could not be measured; its last words were:\n(.|\n)*Error"):
        main(["bench", "--chunks", "1", "--methods", "d", "--device", "cpu", "--no-memory"])
