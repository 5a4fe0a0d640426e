"""Promise: what would train nothing, or the wrong thing, is told before money flows; what was checked is run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from job.contract.check import Check
from job.contract.errors import DatasetInvalid, ModelInvalid
from job.contract.records import RunRecord
from job.contract.supervision import ShownRow, Token
from job.storage import open_store
from job.tiny import CHAT_TEMPLATE
from launch.checking import THOROUGH_BYTES
from launch.cli import cli
from launch.facts import TINY_CONTROL_TOKENS
from launch.recipe_file import read_recipe
from launch.render_check import row_text
from launch.resolve import resolve
from tests.hubserver import HubServer
from tests.launch.kit import Desk, make_recipe, shared_cache, small_model, write_small_model
from tests.watching import wait_for

ROOT = Path(__file__).parents[2]
GOOD = {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}


def ask(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write_rows(folder: Path, *rows: dict[str, Any] | str, name: str = "rows.jsonl") -> None:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def check(path: Path, *options: str, **variables: str) -> Result:
    home = {"FTJOB_HOME": str(path.parent / "home")}
    return CliRunner(mix_stderr=False).invoke(cli, ["check", str(path), *options], env=home | variables)


def check_json(path: Path, *options: str, **variables: str) -> tuple[Check, int]:
    done = check(path, "--json", *options, **variables)
    return Check.model_validate_json(done.stdout), done.exit_code


def codes(found: Check) -> dict[str, int | None]:
    return {problem.code: problem.line for problem in found.errors}


# ----------------------------------------------------------------------------------------------------------- problems


BAD = (
    GOOD,
    '{"messages": [',
    ask("hi", "there"),
    {"messages": [{"role": "bot", "content": "z"}]},
    ask("a<|im_end|>b", "c"),
    ask("x" * 400, "y"),
)


def test_problems_of_rows_and_of_what_becomes_of_them_are_told_all_at_once(tmp_path: Path) -> None:
    path = make_recipe(tmp_path, training={"max_length": 128})
    write_rows(tmp_path, *BAD)
    done = check(path)
    assert done.exit_code == 2
    for said in (
        "rows.jsonl line 2: not JSON",
        'rows.jsonl line 4: turn 1 has the role "bot"',
        "rows.jsonl line 5: turn 1 (user) holds <|im_end|>",
        "rows.jsonl line 6: no token of it would be trained",
        "raise training.max_length",
        "refused: 4 errors",
    ):
        assert said in done.stdout
    found, code = check_json(path)
    assert code == 2
    assert {"role-unknown": 4, "control-token": 5, "nothing-trained": 6}.items() <= codes(found).items()
    assert (found.train.lines, found.train.rows, found.train.bad) == (6, 3, 3)
    assert found.supervision is None
    assert found.not_checked


@pytest.mark.slow
def test_one_row_cannot_be_split_and_that_is_told_here(tmp_path: Path) -> None:
    path = make_recipe(tmp_path, dataset={"train": "rows.jsonl", "held_out": 0.1})
    write_rows(tmp_path, GOOD)
    found, code = check_json(path)
    assert (code, codes(found)) == (2, {"one-row": None})
    make_recipe(tmp_path, dataset={"train": "rows.jsonl", "held_out": None})
    write_rows(tmp_path, GOOD)
    assert check_json(path)[1] == 0


def test_of_each_kind_the_first_are_listed_and_all_are_counted(tmp_path: Path) -> None:
    path = make_recipe(tmp_path, training={"max_length": 64})
    write_rows(tmp_path, *[ask("x" * (80 + n), "y") for n in range(30)], *["{"] * 25)
    done = check(path, "--problems", "3")
    assert "... and 27 more of this kind" in done.stdout
    assert "... and 22 more of this kind" in done.stdout
    found, _ = check_json(path, "--problems", "3")
    assert found.counts["nothing-trained"] == 30
    assert [p.line for p in found.problems if p.code == "nothing-trained"] == [1, 2, 3]


def test_a_good_recipe_has_numbers_and_leaves_0(tmp_path: Path) -> None:
    path = make_recipe(tmp_path, training={"max_length": 64, "batch_size": 2, "gradient_accumulation": 1})
    write_rows(tmp_path, *[ask(f"question {n}", "word " * n) for n in range(1, 41)])
    found, code = check_json(path)
    assert code == 0
    told = found.supervision
    assert told is not None
    assert (told.rows, told.held_out_rows) == (36, 4)
    assert told.stop_tokens == ("<|im_end|>",)
    assert told.trained_tokens < told.tokens <= 36 * 64
    assert told.cut_rows > 0
    assert sum(told.lengths.counts) == 36
    assert told.fill == pytest.approx(told.tokens / (told.sequences * 64))
    assert told.steps_per_epoch == -(-told.sequences // 2)
    done = check(path)
    assert done.exit_code == 0
    for said in ("36 to train, 4 held out", f"{told.tokens:,} an epoch", "% full", "█", told.tokens_sha256, "good to"):
        assert said in done.stdout


@pytest.mark.slow
def test_a_held_out_file_is_rendered_too_and_its_own_problems_are_told(tmp_path: Path) -> None:
    path = make_recipe(tmp_path, dataset={"train": "rows.jsonl", "held_out": "held.jsonl"}, training={"max_length": 64})
    write_rows(tmp_path, ask("other", "row"), ask("x" * 99, "y"), name="held.jsonl")
    found, code = check_json(path)
    assert code == 2
    assert [(p.file, p.line, p.code) for p in found.errors] == [("held.jsonl", 2, "nothing-trained")]


@pytest.mark.slow
def test_nothing_that_a_terminal_obeys_gets_to_it(tmp_path: Path) -> None:
    path = make_recipe(tmp_path, dataset={"train": "rows.jsonl", "held_out": None})
    write_rows(tmp_path, ask("\x1b[31mred\x07\x9b2J \u202eevil", "fine \x1b]0;title\x07"), GOOD)
    done = check(path, "--show", "2")
    assert done.exit_code == 0
    assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(done.stdout)
    assert "␛[31mred␇\\u009b2J \\u202eevil" in done.stdout


# --------------------------------------------------------------------------------------------------------------- show


def test_rows_are_shown_token_by_token_without_colours_too(tmp_path: Path) -> None:
    path = make_recipe(tmp_path, dataset={"train": "rows.jsonl", "held_out": None})
    write_rows(tmp_path, "", ask("Grüße 🙂", "one\ntwo"), ask("q", "a"), ask("long " * 20, "answer"))
    done = check(path, "--show", "3")
    shown = done.stdout
    assert shown.index("line 2: ") < shown.index("line 4: ") < shown.index("line 3: ")  # first, longest, shortest
    assert "<|im_start|>user⏎\nGrüße 🙂<|im_end|>⏎\n<|im_start|>assistant⏎\n⟦o┊n┊e┊⏎\n┊t┊w┊o┊<|im_end|>⏹⟧⏎\n" in shown
    assert "\x1b" not in shown


@pytest.mark.slow
def test_a_row_that_is_cut_is_shown_as_far_as_it_is_trained(tmp_path: Path) -> None:
    path = make_recipe(tmp_path, dataset={"train": "rows.jsonl", "held_out": None}, training={"max_length": 40})
    write_rows(tmp_path, ask("q", "abcdefghijklmnopqrstuvwxyz" * 4), GOOD)
    done = check(path, "--show", "1")
    shown = done.stdout.partition("\nline 1: ")[2].partition("\nrows ")[0]
    assert "⟦a┊b┊c┊d┊e┊f┊g┊h" in shown
    assert "⏹⟧" not in shown
    assert "and the stop token" in done.stdout


def test_neighbouring_tokens_differ_in_colour_where_there_are_colours() -> None:
    tokens = [Token(text=text, trained=at > 2, is_stop=at == 6) for at, text in enumerate("abcdef.")]
    text = row_text(ShownRow(line=1, tokens=tuple(tokens), of_tokens=7), colours=True)
    assert text.plain.endswith("abc⟦def.⏹⟧\n")
    assert not str(text.style)  # or every token would have it
    styles = [str(span.style) for span in text.spans if text.plain[span.start : span.end] in set("abcdef.")]
    assert len(styles) == 7
    assert all(one != other for one, other in pairwise(styles))


def test_showing_rows_is_not_for_programs(tmp_path: Path) -> None:
    assert check(make_recipe(tmp_path), "--show", "1", "--json").exit_code == 2


# --------------------------------------------------------------------------------------------------------- base models


@pytest.mark.slow
def test_a_folders_own_tokenizer_and_template_are_asked(tmp_path: Path) -> None:
    path = make_recipe(tmp_path / "r", base_model={"id": "../model"})
    write_small_model(tmp_path / "model")
    found, code = check_json(path)
    tiny, _ = check_json(make_recipe(tmp_path / "t"))
    assert code == 0
    assert found.supervision == tiny.supervision


@pytest.mark.slow
def test_a_template_that_never_trains_the_stop_token_is_refused(tmp_path: Path) -> None:
    config = json.loads(small_model()["tokenizer_config.json"]) | {"eos_token": "<|pad|>"}
    model = json.loads(small_model()["config.json"]) | {"eos_token_id": 256}
    path = make_recipe(tmp_path / "r", base_model={"id": "../model"})
    files = {"tokenizer_config.json": json.dumps(config).encode(), "config.json": json.dumps(model).encode()}
    write_small_model(tmp_path / "model", **files)
    found, code = check_json(path)
    assert code == 2
    assert [problem.code for problem in found.errors] == ["model"]
    assert "<|im_end|>" in found.errors[0].message
    assert found.errors[0].file == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"tokenizer.json": b"{"}, "tokenizer"),
        ({"tokenizer_config.json": b'{"tokenizer_class": "PreTrainedTokenizerFast"}'}, "no chat template"),
        ({"tokenizer_config.json": b"[]"}, "tokenizer_config.json"),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_the_models_fault(
    tmp_path: Path, files: dict[str, bytes], said: str
) -> None:
    path = make_recipe(tmp_path / "r", base_model={"id": "../model"})
    write_small_model(tmp_path / "model", **files)
    found, code = check_json(path)
    assert code == 2
    assert said in found.errors[0].message
    assert found.errors[0].code == "model"


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    path = make_recipe(tmp_path / "r", base_model={"id": "../model"})
    (write_small_model(tmp_path / "model") / "tokenizer.json").unlink()
    found, code = check_json(path)
    assert code == 2
    assert "no tokenizer among its files" in found.errors[0].message


@pytest.mark.slow
@pytest.mark.parametrize(("packing", "code"), [(True, 2), (False, 0)])
def test_packing_that_would_let_rows_see_each_other_is_refused(tmp_path: Path, packing: bool, code: int) -> None:
    config = json.loads(small_model()["config.json"]) | {"model_type": "mamba"}
    path = make_recipe(tmp_path / "r", base_model={"id": "../model"}, training={"packing": packing})
    write_small_model(tmp_path / "model", **{"config.json": json.dumps(config).encode()})
    found, left = check_json(path)
    assert left == code
    assert [p.code for p in found.errors] == (["packing-leaks"] if packing else [])
    assert all(p.hint == "set training.packing to false" for p in found.errors)


@pytest.mark.parametrize(("kind", "method"), [("fp8", "qlora"), ("fp8", "lora"), ("bitsandbytes", "lora")])
def test_a_model_that_is_published_as_codes_is_refused_on_the_laptop(tmp_path: Path, kind: str, method: str) -> None:
    said = {"quantization_config": {"quant_method": kind, "load_in_4bit": True}}
    config = json.loads(small_model()["config.json"]) | said
    path = make_recipe(tmp_path / "r", base_model={"id": "../model"}, method=method)
    write_small_model(tmp_path / "model", **{"config.json": json.dumps(config).encode()})
    found, code = check_json(path)
    assert code == 2
    assert [p.code for p in found.errors] == ["model"]
    assert "published" in found.errors[0].message
    assert "the model that it was made from" in found.errors[0].hint


@pytest.mark.parametrize(
    ("targets", "unknown"),
    [
        (["nope"], "'nope'"),
        (["q_proj", "v_porj", "proj"], "'v_porj', 'proj'"),
        (["q_proj", "lm_head"], "'lm_head'"),
        (["q_proj", "norm"], "'norm'"),
        (["model.layers.2.mlp.up_proj"], "'model.layers.2.mlp.up_proj'"),
        (["q_proj", "self_attn.v_proj", "model.layers.1.mlp.up_proj", "embed_tokens"], ""),
    ],
)
def test_a_name_that_fits_no_module_is_refused_before_the_weights_are_paid_for(
    tmp_path: Path, targets: list[str], unknown: str
) -> None:
    """The job refuses the same (tests/job/test_model.py), but only a GPU later."""
    found, code = check_json(make_recipe(tmp_path, lora={"target_modules": targets}))
    assert (code, list(codes(found))) == ((2, ["target-modules"]) if unknown else (0, []))
    assert not unknown or found.errors[0].message.endswith(f"with {unknown}")


def test_a_launch_is_refused_for_the_base_model_too(tmp_path: Path) -> None:
    config = json.loads(small_model()["config.json"]) | {"model_type": "mamba"}
    path = make_recipe(tmp_path / "r", base_model={"id": "../model"})
    write_small_model(tmp_path / "model", **{"config.json": json.dumps(config).encode()})
    with pytest.raises(ModelInvalid, match="packed rows would see each other") as caught:
        resolve(read_recipe(path), folder=path.parent, bucket="s3://mine")
    assert caught.value.hint == "set training.packing to false"


def test_rows_are_checked_although_the_base_model_cannot_be_had(tmp_path: Path, hub: HubServer) -> None:
    path = make_recipe(tmp_path, base_model={"id": "org/nothing"})
    write_rows(tmp_path, GOOD, "{")
    found, code = check_json(path)
    assert code == 2
    assert [(problem.code, problem.line) for problem in found.errors] == [("json", 2), ("model", None)]


def test_a_hub_that_is_out_of_reach_hides_no_error_of_the_rows(tmp_path: Path) -> None:
    path = make_recipe(tmp_path, base_model={"id": "org/nothing"})  # nobody listens where these tests' hub is
    found, code = check_json(path)
    assert (code, found.errors) == (0, ())
    assert "was not checked" in found.not_checked
    assert "out of reach" in found.not_checked
    write_rows(tmp_path, GOOD, "{")
    with pytest.raises(DatasetInvalid, match=r"rows\.jsonl line 2"):
        resolve(read_recipe(path), folder=tmp_path, bucket="s3://mine")


def test_the_built_in_models_control_tokens_are_those_that_the_job_writes(tmp_path: Path) -> None:
    from job.dataset.control import control_tokens

    assert control_tokens(write_small_model(tmp_path)) == TINY_CONTROL_TOKENS


def test_a_folder_that_was_written_like_a_hub_id_is_told_apart(tmp_path: Path) -> None:
    write_small_model(tmp_path / "org" / "mine")
    found, _ = check_json(make_recipe(tmp_path, base_model={"id": "org/mine"}))
    assert "for the folder beside the recipe write ./org/mine" in found.not_checked


def with_template(folder: Path, template: str) -> Path:
    """A recipe whose base model has this chat template."""
    config = json.loads(small_model()["tokenizer_config.json"]) | {"chat_template": template}
    write_small_model(folder / "model", **{"tokenizer_config.json": json.dumps(config).encode()})
    return make_recipe(folder / "r", base_model={"id": "../model"})


UNRENDERABLE = "{% set room = 'x' * 10 ** 18 %}" + CHAT_TEMPLATE
"""It asks for more memory than there can be."""


def test_rows_that_could_not_be_rendered_are_not_trained(tmp_path: Path) -> None:
    path = with_template(tmp_path, UNRENDERABLE)
    with pytest.raises(ModelInvalid, match=r"could not be rendered.*MemoryError") as caught:
        resolve(read_recipe(path), folder=path.parent, bucket="s3://mine")
    assert "--anyway" in caught.value.hint


@pytest.mark.slow
def test_rows_that_could_not_be_rendered_are_trained_if_a_person_says_so(tmp_path: Path) -> None:
    path = with_template(tmp_path, UNRENDERABLE)
    found, code = check_json(path)
    assert code == 2
    assert [problem.code for problem in found.errors] == ["not-rendered"]
    resolved = resolve(read_recipe(path), folder=path.parent, bucket="s3://mine", anyway=True)
    assert resolved.check.supervision is None
    assert resolved.check.not_checked == "the rows could not be rendered"
    assert [p.severity for p in resolved.check.problems if p.code == "not-rendered"] == ["warning"]


@pytest.mark.slow
def test_a_process_that_is_killed_while_it_renders_refuses_the_launch(tmp_path: Path) -> None:
    path = make_recipe(tmp_path)
    write_rows(tmp_path, *[ask(f"question {n}", "word " * 50) for n in range(5_000)])
    command = [sys.executable, "-m", "launch.cli", "check", str(path), "--json"]
    variables = os.environ | {"FTJOB_HOME": str(tmp_path / "home")}
    with subprocess.Popen(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, text=True) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        os.kill(int(wait_for(lambda: children.read_text().split())[0]), signal.SIGKILL)
        said, _ = process.communicate()
    assert process.returncode == 2
    errors = Check.model_validate_json(said).errors
    assert [problem.code for problem in errors] == ["not-rendered"]
    assert "was killed: the machine may be short of memory" in errors[0].message


@pytest.mark.slow
def test_of_many_rows_with_errors_one_says_what_is_wrong_with_the_base_model(tmp_path: Path) -> None:
    path = with_template(tmp_path, "")
    rows = [ask("x" * 100_000 + str(n), "y") for n in range(THOROUGH_BYTES // 100_000)]
    write_rows(path.parent, *rows, "{")
    found, code = check_json(path)
    assert code == 2
    assert [problem.code for problem in found.errors] == ["json", "model"]
    assert "rendered when there are no errors" in found.not_checked
    write_rows(make_recipe(tmp_path, training={"max_length": 64}).parent, *rows, "{")
    found, _ = check_json(tmp_path / "recipe.json")
    assert [problem.code for problem in found.errors] == [
        "json"
    ]  # and not, after minutes, 40 prompts that are too long


@pytest.mark.slow
def test_what_a_template_does_to_every_row_is_told_once_with_its_count(tmp_path: Path) -> None:
    earlier = CHAT_TEMPLATE.replace(
        "message['content'] + '<|im_end|>' -", "('' if loop.last else '~') + message['content'] + '<|im_end|>' -"
    )
    path = with_template(tmp_path, earlier)
    write_rows(
        path.parent,
        *[{"messages": ask(f"q{n}", "a")["messages"] + ask("and?", f"b{n}")["messages"]} for n in range(30)],
    )
    found, code = check_json(path)
    assert code == 0
    assert [(p.line, p.code) for p in found.problems if p.line] == [(1, "earlier-turns-differ")]
    assert found.counts["earlier-turns-differ"] == 30
    assert "... and 29 more of this kind" in check(path).stdout


# ------------------------------------------------------------------------------------------------------ plan and launch


@pytest.mark.parametrize(
    "command", [["plan"], ["launch", "--infra", "local"], ["launch", "--infra", "local", "--anyway"]]
)
def test_plan_and_launch_refuse_what_the_check_refuses_and_create_nothing(desk: Desk, command: list[str]) -> None:
    make_recipe(desk.recipe.parent, training={"max_length": 128})
    write_rows(desk.recipe.parent, *[ask("x" * 400 + str(n), "y") for n in range(5)])
    done = desk.ftjob(*command, desk.recipe)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert "ftjob: dataset rows.jsonl line 1: no token of it would be trained" in done.stderr
    assert "; and 2 more" in done.stderr
    assert "hint: `ftjob check RECIPE` shows all of them" in done.stderr
    assert not desk.home.exists()
    assert not list(open_store(desk.settings.bucket).list(""))


def test_warnings_are_notes_of_the_plan_and_the_quote_knows_every_token(desk: Desk) -> None:
    write_rows(desk.recipe.parent, *[ask(f"question {n}", "word " * n) for n in range(1, 41)], ask("last", "one"))
    found, _ = check_json(desk.recipe)
    done = desk.ftjob("plan", "--json", desk.recipe)
    plan = json.loads(done.stdout)
    assert any("rows.jsonl: it has few rows: 41" in note for note in plan["notes"])
    assert found.supervision is not None
    assert plan["quote"]["work"]["tokens_per_epoch"] == found.supervision.tokens
    assert plan["quote"]["work"]["steps_per_epoch"] == found.supervision.steps_per_epoch
    assert plan["quote"]["work"]["spread"] == 0


def test_the_digests_of_the_check_are_those_of_the_run(desk: Desk) -> None:
    resolved = resolve(
        read_recipe(desk.recipe), folder=desk.recipe.parent, bucket=desk.settings.bucket, cache=shared_cache()
    )
    record: RunRecord = desk.create("one")
    assert resolved.train is resolved.check.train.digest
    assert record.train == resolved.check.train.digest
    assert resolved.check.supervision is not None
    assert record.tokens_sha256 == resolved.check.supervision.tokens_sha256


# ----------------------------------------------------------------------------------------------- cache, other machines


def entries(cache: Path) -> list[Path]:
    return sorted((cache / "check").glob("*.json"))


@pytest.mark.slow
def test_rows_are_rendered_once_and_again_when_anything_about_them_changes(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    path = make_recipe(tmp_path)
    first = check_json(path, FTJOB_CACHE=str(cache))
    assert len(entries(cache)) == 1
    # An entry that says something else is believed: so it was read, and nothing was rendered again.
    entry = entries(cache)[0]
    entry.write_text(entry.read_text().replace("<|im_end|>", "FROM THE CACHE"))
    again, _ = check_json(path, FTJOB_CACHE=str(cache))
    assert again.supervision is not None
    assert again.supervision.stop_tokens == ("FROM THE CACHE",)
    entry.write_text(entry.read_text()[:-50])
    assert check_json(path, FTJOB_CACHE=str(cache)) == first  # a damaged one is none
    for changes in ({"max_length": 64}, {"seed": 7}):
        check_json(make_recipe(tmp_path, training=changes), FTJOB_CACHE=str(cache))
    write_rows(tmp_path, *[GOOD] * 5)
    check_json(make_recipe(tmp_path / "other"), FTJOB_CACHE=str(cache))
    assert len(entries(cache)) == 3
    write_rows(tmp_path / "other", *[GOOD] * 5)
    check_json(tmp_path / "other" / "recipe.json", FTJOB_CACHE=str(cache))
    assert len(entries(cache)) == 4


@pytest.mark.slow
def test_the_cache_is_the_persons_own_and_one_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    path = make_recipe(tmp_path)
    _, code = check_json(path, FTJOB_CACHE="")
    assert code == 0
    assert len(entries(tmp_path / "home" / "cache")) == 1
    (tmp_path / "a-file").write_text("")
    found, code = check_json(path, FTJOB_CACHE=str(tmp_path / "a-file"))
    assert code == 0
    assert found.supervision is not None


WITHOUT = """
import sys
for name in ("torch", "transformers", "tokenizers", "jinja2", "numpy", "safetensors"):
    sys.modules[name] = None
from launch.cli import cli
cli(["check", *sys.argv[1:]], prog_name="ftjob")
"""


def test_with_the_base_install_rows_are_checked_and_what_is_not_is_told(tmp_path: Path) -> None:
    path = make_recipe(tmp_path)
    variables = os.environ | {"FTJOB_HOME": str(tmp_path / "home"), "FTJOB_CACHE": str(tmp_path / "cache")}

    def without(*options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", WITHOUT, str(path), *options],
            cwd=ROOT,
            env=variables,
            capture_output=True,
            text=True,
            check=False,
        )

    done = without()
    assert done.returncode == 0, done.stderr
    assert "transformers and tokenizers and jinja2 not installed" in done.stdout
    assert "pip install 'ftjob[launch]'" in done.stdout
    assert "no errors, but not everything was checked" in done.stdout
    write_rows(tmp_path, GOOD, ask("a<|im_end|>b", "c"))
    done = without("--json")
    assert done.returncode == 2
    assert codes(Check.model_validate_json(done.stdout)) == {"control-token": 2}


def test_rows_that_were_rendered_from_other_bytes_are_not_those_that_were_checked(tmp_path: Path) -> None:
    """As when the file changes between the two: the answer tells which bytes it is about."""
    path = make_recipe(tmp_path)
    cache = tmp_path / "cache"
    found, _ = check_json(path, FTJOB_CACHE=str(cache))
    entry = entries(cache)[0]
    entry.write_text(entry.read_text().replace(found.train.digest.sha256, "0" * 64))
    done = check(path, FTJOB_CACHE=str(cache))
    assert done.exit_code == 2
    assert "rows.jsonl was changed while it was checked" in done.stderr
