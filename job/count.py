"""Counts the tokens of rows, for whoever plans a run: `python -m job.count TOKENIZER_FOLDER ROWS.jsonl`.

Prints {"lengths": [...]} on one line: the tokens of each row as the job renders them, before they are cut. A process of
its own, since the launcher never loads the training stack.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from job.contract.errors import FtjobError, ModelInvalid
from job.dataset.reader import read_rows
from job.dataset.render import Tokenizer


def count(folder: Path, rows: Path) -> list[int]:
    """Tokens of each row.

    Raises:
        ModelInvalid: the tokenizer cannot be used, or its chat template refuses a row.
        DatasetInvalid: the file does not hold rows.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        lengths = []
        for row in read_rows(rows, name=str(rows)):
            turns = [{"role": message.role, "content": message.content} for message in row.messages]
            lengths.append(len(tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"]))
    except FtjobError:
        raise
    except Exception as error:  # the library raises whatever a strange file leads it to
        raise ModelInvalid(" ".join(f"{type(error).__name__}: {error}".split())[:300]) from error
    return lengths


def main(arguments: list[str]) -> int:
    """Exit code 0, or 2 with a line on stderr."""
    folder, rows = map(Path, arguments)
    try:
        found = count(folder, rows)
    except FtjobError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(json.dumps({"lengths": found}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
