"""Code blocks and shell commands of a Markdown text."""

from __future__ import annotations

import re
import shlex


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language, without their fences, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def commands(text: str) -> list[list[str]]:
    """Every command of the bash blocks as words, without comments; continued lines are joined."""
    found = []
    for block in blocks(text, "bash"):
        rest = ""
        for line in block.replace("\\\n", " ").splitlines():
            rest += line + "\n"
            try:
                words = shlex.split(rest, comments=True)
            except ValueError:
                # A quoted text that goes on in the next line.
                continue
            rest = ""
            if words:
                found.append(words)
        assert not rest, f"an open quote: {rest}"
    return found
