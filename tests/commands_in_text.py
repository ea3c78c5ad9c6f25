"""`dkdetr` commands in documentation: found, and parsed by the program itself without running."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from typer.main import get_command

import cli

ROOT = Path(__file__).parents[1]
RUNNABLE = "<!-- runnable -->"
_FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
_SHELL = {"", "sh", "bash", "console", "shell"}


@dataclass(frozen=True)
class Block:
    """A fenced block; `line` is that of its first line."""

    file: Path
    line: int
    language: str
    text: str
    is_runnable: bool

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line}"


def documents() -> list[Path]:
    """Every page of the project, but none in folders that users make."""
    rooms = ("cache/*.md", "dkdetr/**/*.md", "pipeline/**/*.md", "docker/**/*.md", "tests/**/*.md")
    return sorted({*ROOT.glob("*.md"), *(path for room in rooms for path in ROOT.glob(room))})


def blocks(file: Path) -> Iterator[Block]:
    text = file.read_text(encoding="utf-8")
    for found in _FENCE.finditer(text):
        before = text[: found.start()].rstrip()
        yield Block(
            file=file,
            line=text.count("\n", 0, found.start(3)) + 1,
            language=found.group(2),
            text=found.group(3),
            is_runnable=before.endswith(RUNNABLE),
        )


def shell_lines(text: str) -> list[str]:
    """Returns a block's lines, continued ones joined, without prompts."""
    joined = re.sub(r"\\\n\s*", " ", text)
    return [line.strip().removeprefix("$ ") for line in joined.splitlines()]


def commands_of(text: str) -> list[str]:
    """Returns the `dkdetr` commands among a block's lines, torchrun's too."""
    return [line for line in shell_lines(text) if re.match(r"(dkdetr|torchrun) ", line)]


def commands_of_header(file: Path) -> list[str]:
    """Returns the commands in the comment at the head of an experiment file."""
    lines = [line for line in file.read_text("utf-8").splitlines() if line.startswith("#")]
    bare = "\n".join(re.sub(r"^#\s*(Command\s+)?(or: |\(or: )?", "", line) for line in lines)
    return [line.rstrip(")") for line in commands_of(bare)]


def inline_commands(file: Path) -> list[str]:
    """Returns what stands between single backquotes in a text and begins with `dkdetr`."""
    text = _FENCE.sub("", file.read_text(encoding="utf-8"))
    return [" ".join(found.split()) for found in re.findall(r"`(dkdetr [^`]+)`", text)]


def words_of(command: str) -> list[str]:
    """Returns the words after `dkdetr`, torchrun's own and comments left out."""
    words = shlex.split(command, comments=True)
    return words[words.index("dkdetr") + 1 :]


def parse(words: list[str]) -> None:
    """Raises what the program would if it did not take these words; runs nothing."""
    command = get_command(cli.app)
    rest = list(words)
    while hasattr(command, "commands"):
        if not rest or rest[0] not in command.commands:
            raise LookupError(f"no such command: {' '.join(words)}")
        command = command.commands[rest.pop(0)]
    command.make_context("dkdetr", rest)


def known_part(words: list[str]) -> str | None:
    """Returns what is wrong with a command that a text only alludes to, arguments missing or not.

    Its command must exist, and so must its options.
    """
    command = get_command(cli.app)
    for number, word in enumerate(words):
        children = getattr(command, "commands", None)
        if children is None:
            options = {name for p in command.params for name in (*p.opts, *p.secondary_opts)}
            named = {each.partition("=")[0] for each in words[number:] if each.startswith("--")}
            unknown = named - options - {"--help"}
            return f"no option {sorted(unknown)}" if unknown else None
        if word.startswith("--"):
            return None if number == 0 else f"no option {word}"
        if word not in children:
            return f"no command '{word}'"
        command = children[word]
    return None


def every_command() -> list[tuple[str, ...]]:
    """Returns the path of every command that does something."""
    found: list[tuple[str, ...]] = []
    waiting = [((), get_command(cli.app))]
    while waiting:
        path, command = waiting.pop(0)
        for name, child in getattr(command, "commands", {}).items():
            waiting.append(((*path, name), child))
        if not hasattr(command, "commands"):
            found.append(path)
    return found
