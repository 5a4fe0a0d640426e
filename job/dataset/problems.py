"""Every kind of problem a dataset can have: one closed table. What else is found is a bug."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

from job.contract.check import Problem, Severity

FEW_ROWS: Final = 50
"""Below this a fine-tune rarely shows. Source: OpenAI's guide to supervised fine-tuning: "clear improvements from
fine-tuning on 50 to 100 training examples"; LIMA (Zhou et al. 2023) needed 1000 for a style."""

_ROW: Final = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'
_TOOLS: Final = (
    "tool calls are not trained: most chat templates drop them, and would train the stop token alone; "
    "write the turn as text, or remove the row"
)


@dataclass(frozen=True)
class Kind:
    """One kind of problem.

    Args:
        template: of its message, with the names of the values it tells.
        hint: what to do; for a warning, what it will do to the model first.
    """

    severity: Severity
    template: str
    hint: str


class Finding(NamedTuple):
    """A kind of problem and what it says of one line, small enough for a million of them to cross a pipe."""

    code: str
    message: str

    @property
    def is_error(self) -> bool:
        return KINDS[self.code].severity == "error"

    @property
    def hint(self) -> str:
        return KINDS[self.code].hint


def find(code: str, **values: object) -> Finding:
    """A finding of this kind; `values` are those that its message tells."""
    return Finding(code, KINDS[code].template.format_map(values))


def problem_of(finding: Finding, *, file: str, line: int | None = None) -> Problem:
    """The finding with its place, and with what its kind says."""
    kind = KINDS[finding.code]
    return Problem(
        code=finding.code, severity=kind.severity, file=file, line=line, message=finding.message, hint=kind.hint
    )


KINDS: Final[dict[str, Kind]] = {
    # A line that is no row.
    "utf-16": Kind("error", "UTF-16, not UTF-8", "save the file as UTF-8"),
    "not-utf-8": Kind("error", "not UTF-8 at byte {byte} of the line", "save the file as UTF-8"),
    "line-too-long": Kind(
        "error",
        "longer than {mib} MiB",
        "one JSON object a line; a file that is one JSON list: jq -c '.[]' rows.json > rows.jsonl",
    ),
    "json": Kind("error", "not JSON: {why} at column {column}", "one complete JSON object a line"),
    "json-cut": Kind(
        "error",
        "not JSON: {why} at column {column}, and there the file ends",
        "its end is missing: write or copy the file again",
    ),
    "json-depth": Kind("error", "nested too deeply", f"a row is {_ROW}"),
    "json-number": Kind("error", "a number of thousands of digits", "write it as a text"),
    "duplicate-key": Kind("error", "the key {key} stands twice in one object", "keep one"),
    "not-object": Kind("error", "{kind}, not an object", 'write {"messages": [...]}'),
    "schema": Kind(
        "error", "neither messages nor prompt and completion nor conversations (keys: {keys})", f"write {_ROW}"
    ),
    "ambiguous": Kind("error", "both {one} and {other}: which is the row?", "keep one of them"),
    "no-turns": Kind("error", "{key} is not a list of turns, or is empty", f"write {_ROW}"),
    "turn-not-object": Kind(
        "error", "turn {turn} is {kind}, not an object", 'a turn is {"role": "user", "content": "..."}'
    ),
    "role-missing": Kind("error", "turn {turn} has no role", "roles are system, user, assistant"),
    "role-unknown": Kind("error", "turn {turn} has the role {role}", "roles are system, user, assistant"),
    "system-late": Kind(
        "error",
        "turn {turn} is of the system, which speaks first or not at all",
        "put it first, or into a turn of the user",
    ),
    "no-assistant": Kind(
        "error", "no assistant turn: nothing in it would be trained", "add the answer, or remove the row"
    ),
    "content-kind": Kind("error", "{what} has {kind} as content, not a text", "a content is one text"),
    "content-empty": Kind("error", "{what} is empty", "remove the row, or write what should be said"),
    "surrogate": Kind("error", "{what} holds half of a surrogate pair", "re-export it as UTF-8"),
    "tool-turn": Kind("error", "turn {turn} has the role {role}", _TOOLS),
    "tool-call": Kind("error", "turn {turn} has {key}", _TOOLS),
    "tools": Kind("error", "the row has {key}", _TOOLS),
    "media": Kind(
        "error",
        "{what} has {key}, which the model would not be shown",
        "it would learn to answer what it cannot see or hear: remove the row; or the key, if the text says all",
    ),
    "unwanted": Kind(
        "error",
        "the row has {key} false, which marks an unwanted answer in preference data",
        "it would be trained like a wanted one: remove the row; or the key, if it says something else",
    ),
    "control-token": Kind(
        "error",
        "{what} holds {token}, a control token of the base model",
        "the model would read it as the end of a turn or the start of another; remove it, or break it with a space",
    ),
    # A file.
    "no-rows": Kind("error", "it has no rows", 'one {"messages": [...]} a line'),
    "one-row": Kind(
        "error",
        "one row cannot be split into train and held-out",
        "add rows, or set dataset.held_out to null",
    ),
    "all-shared": Kind(
        "error",
        "all {count} rows are in {other} too",
        "the held-out loss would measure what was learnt by heart: hold out rows that are not trained",
    ),
    # What will be trained, and what it will do.
    "same-role": Kind(
        "warning",
        "turns {one} and {two} are both of the {role}",
        "some chat templates refuse it, others show the model what it will never meet: join them to one turn",
    ),
    "unanswered": Kind(
        "warning",
        "the last turn is of the user, and nothing answers it",
        "it costs tokens and trains nothing: add the answer, or remove the turn",
    ),
    "ignored-key": Kind(
        "warning",
        "turn {turn} has {key}, which is ignored here",
        "every assistant turn is trained, with equal weight, and of a turn only its role and content; "
        "remove rows that should not be trained",
    ),
    "system-key": Kind(
        "warning",
        "the key system beside {beside} is ignored",
        'the model will not see it: write it as the first turn, {"role": "system", "content": "..."}',
    ),
    "duplicate": Kind(
        "warning", "the same row as line {other}", "it is trained that many times over: keep one, unless that is meant"
    ),
    "near-duplicate": Kind(
        "warning",
        "about the same row as line {other}",
        "the model will learn it by heart sooner than the others: keep one; rows that share a long instruction and "
        "differ in little else look alike too",
    ),
    "few-rows": Kind(
        "warning",
        "it has few rows: {rows}",
        f"below about {FEW_ROWS} the model learns the rows and little beyond them: add rows, or train fewer epochs",
    ),
    "prefix-mixed": Kind(
        "warning",
        "turns of the {role} begin with {said}",
        "the template says who speaks; the model will learn to write such a prefix now and then: remove all of them",
    ),
    "unbalanced": Kind(
        "warning",
        "the longest {rows} {share:.0%} of the text",
        "they decide what is learnt, and batches are padded to their length: split or shorten them, or add others",
    ),
    "answer-repeated": Kind(
        "warning",
        "{rows} rows ({share:.0%}) end with the same answer, as line {line} does",
        "the model will give it where it does not fit; well if it is a label of a classification, and as frequent "
        "in use; otherwise remove most of them",
    ),
    "shared": Kind(
        "warning",
        "{count} of {rows} rows are in {other} too: {lines}",
        "the held-out loss will look better than the model is, and stop too late: remove them from one of the files",
    ),
    "shared-near": Kind(
        "warning",
        "{count} of {rows} rows are about the same as rows of {other}: {lines}",
        "the held-out loss will look better than the model is: remove them from one of the files",
    ),
    "shared-split": Kind(
        "warning",
        "{count} of the {rows} rows that are held out are the same as rows that are trained, or nearly: {lines}",
        "the held-out loss will look better than the model is, and stop too late: remove the copies, or hold out a "
        "file of its own",
    ),
    # What was done with rows.
    "sharegpt": Kind("notice", "ShareGPT conversations, read as messages (rows: {count})", ""),
    "prompt-completion": Kind(
        "notice", "prompt and completion, read as a turn of the user and one of the assistant (rows: {count})", ""
    ),
    "byte-order-mark": Kind("notice", "it begins with a byte order mark, which is skipped", ""),
    "crlf": Kind("notice", "lines that end with CR LF, as Windows writes them (lines: {count})", ""),
}
