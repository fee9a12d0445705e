"""What every engine is asked: a sample with its token ids, and the size of prose passages."""

from __future__ import annotations

from dataclasses import dataclass

from quality.tasks import Rendered, Sample

PROSE_TASK = "prose"
FULL_METHOD = "full"
# Tokens of a prose passage, and of its continuation whose likelihood is looked at.
PROSE_CONTEXT = 1400
PROSE_CONTINUATION = 64


@dataclass(frozen=True)
class Prompt:
    """A sample with its token ids."""

    sample: Sample
    rendered: Rendered
