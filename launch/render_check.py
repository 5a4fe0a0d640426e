"""A check as text: problems by kind, numbers, the lengths as bars, and rows token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Final

from rich.text import Text

from job.contract.check import Check, FileCheck, Lengths, Problem, Severity, Supervision
from job.contract.recipe import Recipe
from job.contract.supervision import ShownRow
from launch.visible import visible

_STYLES: Final[dict[Severity, str]] = {"error": "bold red", "warning": "yellow", "notice": "cyan"}
_WIDTH: Final = 40
"""Of the longest bar."""
_BAR: Final = "█"
_EIGHTHS: Final = " ▏▎▍▌▋▊▉"
TRAINED: Final = ("green", "bold green")
"""In turns, so that neighbouring tokens can be told apart."""
MASKED: Final = ("dim", "dim cyan")
MARK: Final = "dim"
BETWEEN: Final = "┊"
"""Between tokens that are trained, where there are no colours."""
STOP: Final = "bold black on green"
OPEN, CLOSE, STOP_MARK = "⟦", "⟧", "⏹"


def check_text(check: Check, recipe: Recipe, rows: Sequence[ShownRow], *, colours: bool) -> Text:
    """Everything a check found. Control characters of a dataset become visible ones.

    Args:
        colours: whether they will be seen.
    """
    text = Text()
    for file in (check.train, check.held_out):
        if file is not None:
            text.append(_file_line(file) + "\n")
    for severity in _STYLES:
        text.append(_problems(check, severity))
    for row in rows:
        text.append(row_text(row, colours=colours))
    if check.supervision is not None:
        text.append(_numbers(check.supervision, recipe))
    elif check.not_checked:
        text.append(f"\nno numbers: {visible(check.not_checked)}\n")
    text.append("\n")
    text.append(_verdict(check))
    return text


def _file_line(file: FileCheck) -> str:
    parts = [_many(file.rows, "row")]
    if file.blank:
        parts.append(f"{file.blank:,} blank")
    if file.bad:
        parts.append(f"{file.bad:,} with errors")
    size = f"{file.digest.size:,} bytes, sha256 {file.digest.sha256[:12]}"
    return f"{visible(file.digest.uri)}: {_many(file.lines, 'line')}: {', '.join(parts)} ({size})"


def _many(count: float, what: str) -> str:
    return f"{count:,} {what}" + ("" if count == 1 else "s")


def _problems(check: Check, severity: Severity) -> Text:
    text = Text()
    kinds: dict[str, list[Problem]] = {}
    for problem in check.problems:
        if problem.severity == severity:
            kinds.setdefault(problem.code, []).append(problem)
    for code, problems in kinds.items():
        count = check.times(code)
        text.append(f"\n{severity}", style=_STYLES[severity])
        text.append(f" {code}" + (f" ({count:,} times)" if count > 1 else "") + "\n")
        for hint, group in groupby(problems, key=lambda problem: problem.hint):
            for problem in group:
                text.append(f"  {visible(problem.text)}\n")
            if hint:
                text.append(f"    {visible(hint)}\n", style="italic")
        if count > len(problems):
            text.append(f"  ... and {count - len(problems):,} more of this kind\n")
    return text


def _numbers(told: Supervision, recipe: Recipe) -> Text:
    training = recipe.training
    held_out = f", {told.held_out_rows:,} held out" if told.held_out_rows else ", nothing held out"
    share = told.trained_tokens / max(told.tokens, 1)
    lengths = told.lengths
    lines = [
        "",
        f"rows      {told.rows:,} to train{held_out}",
        f"tokens    {told.tokens:,} an epoch, {told.trained_tokens:,} of them trained ({share:.0%})",
        f"cut       {_many(told.cut_rows, 'row')} longer than max_length ({training.max_length:,})",
        f"lengths   shortest {lengths.shortest:,}, median {lengths.median:,}, 95 % up to {lengths.p95:,}, "
        f"longest {lengths.longest:,} tokens",
        *(f"          {line}" for line in bars(lengths)),
    ]
    sequences = _many(told.sequences, "sequence")
    if training.packing:
        lines.append(f"packing   {sequences} of up to {training.max_length:,} tokens, {told.fill:.1%} full")
    else:
        lines.append(f"padding   {sequences}, {1 - told.fill:.1%} of their batches is padding")
    batch = _many(training.batch_size * training.gradient_accumulation, "sequence")
    stops = ", ".join(visible(each) for each in told.stop_tokens)
    lines += [
        f"steps     {told.steps_per_epoch:,} an epoch, {batch} each; {_many(training.epochs, 'epoch')}",
        f"stop      {stops}",
        f"masked by {told.masked_by}",
        f"digest    {told.tokens_sha256} over all tokens and labels",
        "",
    ]
    return Text("\n".join(lines))


def bars(lengths: Lengths) -> Iterator[str]:
    """A line for each bar: its range, a bar, its count."""
    most = max(lengths.counts)
    ranges = [f"{low + 1:,}-{high:,}" for low, high in zip(lengths.edges, lengths.edges[1:], strict=False)]
    width = max(map(len, ranges))
    for span, count in zip(ranges, lengths.counts, strict=True):
        # Whatever is there is seen, however little it is.
        eighths = max(round(8 * _WIDTH * count / most), 1) if count else 0
        bar = _BAR * (eighths // 8) + (_EIGHTHS[eighths % 8] if eighths % 8 else "")
        yield f"{span:>{width}} {bar} {count:,}" if count else f"{span:>{width}}"


def row_text(row: ShownRow, *, colours: bool) -> Text:
    """A row as the model is shown it: what is trained stands in ⟦ ⟧; ⏹ is behind the token that ends a turn. Tokens are
    told apart by colours, or, where they will not be seen, those that are trained by ┊."""
    marks = f"{OPEN}trained{CLOSE}, {STOP_MARK} stop" + ("" if colours else f", {BETWEEN} between tokens")
    text = Text()
    text.append(f"\nline {row.line}: {_many(row.of_tokens, 'token')}; {marks}\n", style="bold")
    inside = False
    for index, token in enumerate(row.tokens):
        if token.trained != inside:
            text.append(OPEN if token.trained else CLOSE, style=MARK)
            inside = token.trained
        elif inside and not colours:
            text.append(BETWEEN)
        style = STOP if token.is_stop else (TRAINED if token.trained else MASKED)[index % 2]
        text.append(visible(token.text, lines=True), style=style)
        if token.is_stop:
            text.append(STOP_MARK, style=STOP)
    if inside:
        text.append(CLOSE, style=MARK)
    if not text.plain.endswith("\n"):
        text.append("\n")
    return text


def _verdict(check: Check) -> Text:
    counts = dict.fromkeys(_STYLES, 0)
    for code, severity in {problem.code: problem.severity for problem in check.problems}.items():
        counts[severity] += check.times(code)
    told = ", ".join(_many(count, severity) for severity, count in counts.items() if count)
    if check.errors:
        return Text(f"refused: {told}", style="bold red")
    told = f": {told}" if told else ""
    if check.supervision is None:
        return Text(f"no errors, but not everything was checked{told}", style="yellow")
    return Text(f"good to launch{told}", style="green")
