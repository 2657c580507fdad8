"""Make anew what is made from the nodes and the presets. Run it after one of them has changed.

    python -m tools.generate [URL of a ComfyUI that has the pack]

Without a URL it starts a ComfyUI of its own. It writes
  tests/data/object_info.json    the schemas, as the server describes them
  locales/en/nodeDefs.json       the texts in them
  web/docs/RollingKVBenchmark/   the lists of step caches
  web/docs/RollingKVLoadModel/   the tables of presets
  web/docs/*/*.png               the pictures of the help pages
  workflows/, workflows/api/     the examples, built and saved by the real frontend, with their thumbnails
  README.md                      the tables of files and models
  docs/models.md                 the table of families
  docs/memory.md                 the table of cards
  docs/benchmarks.md             the tables of the reports in docs/results/
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..comfyui.client import ComfyClient
from ..comfyui.env import ComfyError, find_install, install_missing
from ..comfyui.server import ComfyServer
from . import help_pages, memory, models, pictures, readme, results, schemas, workflows
from .examples import WORKFLOWS


def generate(client: ComfyClient, names: list[str], models_folder: Path | None = None) -> None:
    """models_folder: of the server, where it is one of our own: it then shows no files as missing in the pictures."""
    readme.generate()
    models.generate()
    memory.generate()
    results.generate()
    help_pages.generate()
    if models_folder is not None:
        workflows.write_stand_ins(models_folder)
    workflows.generate(client.url, names)
    schemas.generate(client)  # also of ComfyUI's nodes in the workflows
    pictures.generate(client.url)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("url", nargs="?", help="of a ComfyUI that has the pack")
    parser.add_argument(
        "--workflows", nargs="+", default=list(WORKFLOWS), choices=list(WORKFLOWS), metavar="NAME",
        help="build only these",
    )  # fmt: skip
    args = parser.parse_args()
    if args.url:
        return generate(ComfyClient(args.url), args.workflows)
    install = find_install()
    if install is None:
        raise ComfyError("No ComfyUI was found: set COMFYUI_PATH to its folder, or give the URL of one that runs.")
    install_missing(install)
    with ComfyServer(install) as server:
        generate(server.client, args.workflows, server.folder / "models")


if __name__ == "__main__":
    main()
