"""Which worker runs which file of the suite."""

from xdist.scheduler import LoadFileScheduling

LIVE = "live/"


def next_file(files: list[str], live: bool) -> str:
    """The file that a worker runs next: the first of its kind, else the last that is left for the other one."""
    return next((file for file in files if file.startswith(LIVE) == live), files[-1])


class FromTwoEnds(LoadFileScheduling):
    """The first worker has the files that need servers, so that each server is started once; the others have the rest.

    Whoever is done with its own goes on with what the other one would come to last, so that both end at about the same time.
    """

    def _assign_work_unit(self, node):
        file = next_file(list(self.workqueue), live=node.gateway.id == "gw0")
        self.workqueue.move_to_end(file, last=False)
        super()._assign_work_unit(node)
