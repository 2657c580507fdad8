import pytest, json
P={"1":{"class_type":"EmptyImage","inputs":{"width":96,"height":64,"batch_size":9,"color":7}},"2":{"class_type":"CreateVideo","inputs":{"images":["1",0],"fps":16.0}},"3":{"class_type":"SaveVideo","inputs":{"video":["2",0],"filename_prefix":"x","format":"mp4","codec":"h264"}}}
from tools.comfy_client import first_file
def test_a(any_client):
    out=any_client.run(P); assert len(any_client.view(first_file(out,".mp4")))>100
def test_b(frontend,tmp_path):
    nodes=frontend.open_workflow("/tmp/core.json"); assert all(n["known"] for n in nodes)
    assert frontend.complaints()==""
    assert frontend.errors_from("RollingKV")==[]
    assert "3" in frontend.press_run()
    frontend.screenshot(tmp_path/"x.png")
