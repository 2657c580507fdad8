"""One page of the newest frontend on a server that only plays its part; it stays open from test to test."""

import pytest
from live_page import RENDERERS, LivePage
from stage import Stage, newest_frontend


@pytest.fixture(scope="session")
def opened(chromium):
    with Stage(newest_frontend()) as stage:
        context = chromium.new_context(
            viewport={"width": 1600, "height": 1000}, permissions=["clipboard-read", "clipboard-write"]
        )
        yield LivePage(context.new_page(), stage)
        context.close()


@pytest.fixture(params=RENDERERS)
def live(request, opened):
    """The page, drawing nodes on the canvas, then as Vue components. Nothing that a test sets is left to the next one."""
    opened.stage.reset()
    opened.errors.clear()
    opened.set("Comfy.VueNodes.Enabled", RENDERERS[request.param])
    yield opened
    assert opened.errors == []
