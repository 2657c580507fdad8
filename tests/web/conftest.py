"""One page of the newest frontend on a server that only plays its part; it stays open from test to test."""

import pytest
from browser import new_context
from live_page import RENDERERS, LivePage
from stage import Stage, newest_frontend


@pytest.fixture(scope="session")
def opened(chromium):
    with Stage(newest_frontend()) as stage:
        context = new_context(chromium, permissions=["clipboard-read", "clipboard-write"])
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


@pytest.fixture(scope="module")
def bare_context(chromium):
    context = new_context(chromium, viewport={"width": 600, "height": 500})
    yield context
    context.close()


@pytest.fixture
def bare(bare_context):
    """Opens a page without ComfyUI, of a kind of `BarePage`; it has no errors at the end."""
    opened = []

    def open_page(kind):
        opened.append(kind(bare_context.new_page()))
        return opened[-1]

    yield open_page
    for bare in opened:
        assert bare.errors == []
        bare.page.close()
