"""What all commands of the benchmark refuse alike."""

import argparse

import pytest

from rolling_kv.bench.cli import add_command
from rolling_kv.cli import main


def subcommands() -> dict[str, argparse.ArgumentParser]:
    commands = argparse.ArgumentParser().add_subparsers()
    add_command(commands)
    bench = commands.choices["bench"]
    (more,) = (action for action in bench._actions if isinstance(action, argparse._SubParsersAction))
    return {"": bench} | more.choices


SIZED = [name for name, parser in subcommands().items() if "--height" in parser._option_string_actions]


def test_most_commands_take_a_size():
    assert len(SIZED) > 8


@pytest.mark.parametrize("side", ["height", "width"])
@pytest.mark.parametrize("name", SIZED)
def test_a_size_of_nothing_is_refused_and_not_the_default(name, side):
    with pytest.raises(SystemExit, match=f"--{side} must be at least 1, got 0"):
        main(["bench", *name.split(), f"--{side}", "0"])
