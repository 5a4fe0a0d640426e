"""Whether a chat template's own markers stand around what the assistant says, all of it, and nothing else."""

from __future__ import annotations

from job.dataset.refused import RowRefused
from job.dataset.template import Rendering, Spoken


def refuse_others(start: int, end: int, rendering: Rendering) -> None:
    """Raises RowRefused: a mark covers what somebody else than the assistant says."""
    for turn, begins, ends in rendering.others:
        if start < ends and begins < end:
            raise RowRefused(
                "marks-others",
                f"the chat template's markers cover turn {turn}, which is not the assistant's: the model would be "
                "trained to say it",
                hint="{% generation %} and {% endgeneration %} have to stand around the assistant's turns alone",
            )


def refuse_half_marked(spoken: Spoken, *, first: bool, stop: bool) -> None:
    """Raises RowRefused: of an answer the first token, or the one that ends it, is not marked."""
    if not stop:
        raise RowRefused(
            "stop-not-trained",
            f"the chat template's markers leave out the stop token of the answer in turn {spoken.turn}: the model "
            "would never stop",
            hint="the {% endgeneration %} has to stand behind the end of the turn",
        )
    if not first:
        raise RowRefused(
            "start-not-trained",
            f"the chat template's markers leave out the beginning of the answer in turn {spoken.turn}: the model would "
            "not learn how to begin",
            hint="the {% generation %} has to stand right behind what inference sends to ask for an answer",
        )
