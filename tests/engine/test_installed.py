"""Packages that do not go together are named before they are imported, with the command that mends it."""

import sys

import pytest

from rolling_kv.installed import check_installed


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Makes a package known as installed; it is empty."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(name, version, *needs):
        info = tmp_path / f"{name}-{version}.dist-info"
        info.mkdir()
        lines = [
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}",
            *(f"Requires-Dist: {need}" for need in needs),
        ]
        (info / "METADATA").write_text("\n".join(lines) + "\n", encoding="utf-8")

    return make


def test_what_the_tests_run_with_goes_together():
    check_installed()


def test_a_package_beside_a_version_that_it_cannot_use_is_named(install):
    install("some_library", "0.42.1", "some-hub<3.0,>=1.32.0", 'not-there; extra == "all"')
    install("some_hub", "0.36.2")
    with pytest.raises(ImportError) as told:
        check_installed("some_library")
    message = str(told.value)
    assert "some_library 0.42.1 needs some-hub<3.0,>=1.32.0, but 0.36.2 is installed" in message
    assert f"{sys.executable} -m pip install -r " in message and message.endswith("requirements.txt")


def test_what_is_not_installed_is_named(install):
    with pytest.raises(ImportError, match="some_library is not installed"):
        check_installed("some_library")
    install("some_library", "1.0", "some-hub")
    with pytest.raises(ImportError, match="some-hub is not installed"):
        check_installed("some_library")


def test_packages_that_go_together_pass(install):
    install("some_library", "1.0", "some-hub>=1", 'never; python_version < "3"')
    install("some_hub", "1.0rc1.post1")
    with pytest.raises(ImportError):
        check_installed("some_library")
    install("other_library", "1.0", "some-hub>=0.9")
    check_installed("other_library")
