"""Real ComfyUI servers and a real browser, each started once and only when a test asks for it."""

import signal

import pytest
from browser import Pages, fresh_page
from other_packs import write_packs
from servers import start
from stage import newest_frontend

from tools.comfyui.env import find_install, install_missing


def pytest_configure(config):
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the servers are stopped then too
    config.addinivalue_line("markers", "traceback_expected: the test makes a node fail, which the server logs")


@pytest.fixture(scope="session")
def install(request):
    """The ComfyUI of this machine with the pack's requirements in its environment, or a skip."""
    found = find_install()
    if found is None:
        pytest.skip("no ComfyUI was found; set COMFYUI_PATH to its folder")
    reporter = request.config.pluginmanager.getplugin("terminalreporter")  # a process beside the first one has none
    install_missing(found, say=reporter.write_line if reporter else print)
    return found


def complaints(log: str) -> list[str]:
    return [line for line in log.splitlines() if "Traceback" in line or "IMPORT FAILED" in line]


@pytest.fixture(scope="session")
def default_server(install):
    with start(install) as server:
        assert not complaints(server.log), server.log
        yield server


@pytest.fixture(scope="session")
def cacheless_server(install):
    with start(install, "--cache-none") as server:
        assert not complaints(server.log), server.log
        yield server


@pytest.fixture(scope="session")
def newest_server(install):
    """With the newest frontend that the tests know, where ComfyUI pins an older one."""
    with start(install, "--front-end-root", newest_frontend()) as server:
        yield server


@pytest.fixture(scope="session")
def classic_server(install):
    with start(install, "--cache-classic") as server:
        yield server


@pytest.fixture(scope="session")
def lru_server(install):
    with start(install, "--cache-lru", "10") as server:
        yield server


@pytest.fixture(scope="session")
def crowded_server(install, tmp_path_factory):
    """With other packs beside this one."""
    with start(install, packs=write_packs(tmp_path_factory.mktemp("packs"))) as server:
        yield server


@pytest.fixture
def watch_log(request):
    """Fails the test when the servers it names logged a traceback meanwhile, unless it is marked traceback_expected."""
    watched = []

    def watch(server):
        watched.append((server, len(server.log)))
        return server

    yield watch
    for server, before in watched:
        news = server.log[before:]
        assert request.node.get_closest_marker("traceback_expected") or not complaints(news), news


@pytest.fixture
def server(default_server, watch_log):
    """The shared server with ComfyUI's default cache; `.client` talks to it, `.log` is what it has printed."""
    return watch_log(default_server)


@pytest.fixture
def client(server):
    return server.client


@pytest.fixture
def cacheless_client(cacheless_server, watch_log):
    return watch_log(cacheless_server).client


@pytest.fixture(params=["default_server", "cacheless_server"], ids=["default-cache", "cache-none"])
def any_client(request, watch_log):
    """A client of the server with the default cache, then of the one with --cache-none."""
    return watch_log(request.getfixturevalue(request.param)).client


@pytest.fixture(params=["default", "classic", "lru", "cacheless"])
def every_server(request, watch_log):
    """A server with each way that ComfyUI has to keep what nodes put out."""
    return watch_log(request.getfixturevalue(f"{request.param}_server"))


@pytest.fixture
def every_client(every_server):
    return every_server.client


@pytest.fixture(scope="module")
def pages(chromium):
    pages = Pages(chromium)
    yield pages
    pages.close()


@pytest.fixture(params=[False, True], ids=["classic-nodes", "nodes-2"])
def frontend(request, pages, client):
    """ComfyUI's own frontend, drawing nodes on the canvas, then as Vue components (Nodes 2.0), in a page that stays open."""
    return pages.of(client, request.param)


@pytest.fixture(params=[False, True], ids=["classic-nodes", "nodes-2"])
def fresh_frontend(request, chromium, client):
    """The same in a browser profile of its own."""
    with fresh_page(chromium, client, request.param) as page:
        yield page


@pytest.fixture(params=[("default", False), ("default", True), ("newest", False), ("newest", True)],
                ids=["pinned-classic", "pinned-nodes-2", "newest-classic", "newest-nodes-2"])  # fmt: skip
def every_frontend(request, pages, watch_log):
    """ComfyUI's own frontend and the newest one, each with both ways to draw nodes."""
    name, in_vue = request.param
    return pages.of(watch_log(request.getfixturevalue(f"{name}_server")).client, in_vue)
