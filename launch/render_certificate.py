"""The resume certificate as text: what was killed, each claim with what was found, and the verdict."""

from __future__ import annotations

from collections import Counter

from rich.text import Text

from launch.chaos import Chaos
from launch.render import duration


def certificate_text(found: Chaos) -> Text:
    """The resume certificate."""
    moments = ", ".join(f"{count} at {moment}" for moment, count in Counter(k.moment for k in found.kills).items())
    signals = ", ".join(f"{count} {name}" for name, count in Counter(k.signal for k in found.kills).items())
    text = Text()
    text.append("resume certificate\n", style="bold")
    text.append(f"  kills     {len(found.kills)} of {found.planned}: {moments or 'none'} ({signals or 'none'})\n")
    text.append(f"  attempts  {found.attempts}, {found.steps} steps, {found.steps_repeated} of them repeated\n")
    text.append(f"  time      {duration(found.seconds_untouched)} untouched, {duration(found.seconds_killed)} killed\n")
    for check in found.certificate.checks:
        mark, style = ("ok   ", "green") if check.holds else ("FAIL ", "bold red")
        text.append(f"  {mark}", style=style)
        text.append(f"{check.claim}: {check.found}\n")
    verdict = "clean: the killed run is the untouched run" if found.certificate.clean else "NOT clean"
    text.append(verdict, style="bold green" if found.certificate.clean else "bold red")
    if found.folder:
        text.append(f"\nboth runs are in {found.folder}")
    return text
