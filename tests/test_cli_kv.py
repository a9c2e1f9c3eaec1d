"""``kvpack kv``, and contexts of ``kvpack generate``."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from integrations.tiny_text_model import TEMPLATE, write_model, write_tokenizer
from typer import Exit
from typer.testing import CliRunner

from kvpack.cli import app

OK, USAGE, CORRUPT = 0, 2, 3
LONG = "the old house was under rain and " * 34


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_model(tmp_path_factory.mktemp("models") / "tiny")
    write_tokenizer(directory, template=TEMPLATE)
    return directory


def run(*arguments: object, code: int = OK, given: str | None = None) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=given, catch_exceptions=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def run_json(*arguments: object, code: int = OK) -> dict[str, Any]:
    report = json.loads(run(*arguments, "--json", code=code).stdout)
    assert isinstance(report, dict)
    assert report["ok"] is (code == OK)
    return report


@pytest.mark.parametrize("bits", [16, 4])
def test_generate_goes_on_from_a_context(tmp_path: Path, model: Path, bits: int) -> None:
    """As if nothing had come between."""
    context = tmp_path / "context"
    options = ("--kv-bits", bits, "--max-new-tokens")
    whole = run_json("generate", model, "--prompt", LONG, *options, 40)
    first = run_json("generate", model, "--prompt", LONG, *options, 10, "--save-context", context)
    assert first["saved_tokens"] == first["prompt_tokens"] + 10
    assert first["saved_bytes"] == context.stat().st_size
    second = run_json("generate", model, "--load-context", context, "--max-new-tokens", 30)
    assert (second["context_tokens"], second["prompt_tokens"]) == (first["saved_tokens"], 0)
    assert first["texts"][0] + second["texts"][0] == whole["texts"][0]
    shown = run("generate", model, "--load-context", context, "--max-new-tokens", 30, "--save-context", context)
    assert shown.stdout == second["texts"][0] + "\n"
    assert f"kvpack: {first['saved_tokens']} tokens of context, 0 prompt tokens" in shown.stderr
    assert f"kvpack: saved a context of {first['saved_tokens'] + 30} tokens, " in shown.stderr


def test_inspect_and_verify(tmp_path: Path, model: Path) -> None:
    context = tmp_path / "context"
    run("generate", model, "--prompt", LONG, "--kv-bits", 4, "--max-new-tokens", 4, "--save-context", context)
    report = run_json("kv", "inspect", context)
    assert report["file_bytes"] == context.stat().st_size
    assert report["formats"] == [["INT4", "INT4"]] * 2
    shown = run("kv", "inspect", context).stdout
    assert f"{report['tokens']} tokens; 2 layers, 2 KV heads of 16, F16" in shown
    assert report["fingerprint"]["model"][:16] in shown
    assert run_json("kv", "verify", context)["intact_tokens"] == report["tokens"]
    assert run("kv", "verify", context).stdout.startswith(f"ok: {report['tokens']} tokens in 1 run, ")
    assert run("verify", context).stdout == run("kv", "verify", context).stdout
    assert run_json("verify", context) == run_json("kv", "verify", context)
    refused = run_json("verify", context, "--against", context, code=USAGE)
    assert refused["message"] == f"{context} is a context; --against is for weights"
    assert "`kvpack kv inspect` says what it is of" in run("inspect", context).stderr
    assert "is a context" not in run("verify", model / "model.safetensors").stderr
    damaged = bytearray(context.read_bytes())
    damaged[-100] ^= 1
    context.write_bytes(damaged)
    assert run_json("kv", "inspect", context)["tokens"] == report["tokens"]
    found = run_json("kv", "verify", context, code=CORRUPT)
    assert found["intact_tokens"] == 0
    assert found["damage"].startswith("run 0 (tokens 0")
    assert "DAMAGED: the first 0 of" in run("kv", "verify", context, code=CORRUPT).stdout
    assert run_json("verify", context, code=CORRUPT)["damage"] == found["damage"]
    assert run_json("generate", model, "--load-context", context, code=CORRUPT)["error"] == "DamagedRunError"
    with pytest.warns(UserWarning, match="^0 of"):
        found = run_json("generate", model, "--load-context", context, "--drop-damaged", code=CORRUPT)
    assert found["message"] == f"{context}: the first tokens are damaged, and nothing is before them"


def test_a_damaged_context_goes_on_before_the_damage(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", positions=3000)
    write_tokenizer(model)
    context, short = tmp_path / "context", tmp_path / "short"
    saved = run_json("generate", model, "--prompt", LONG * 9, "--max-new-tokens", 1, "--save-context", context)
    tokens = saved["saved_tokens"]
    assert tokens > 2048
    damaged = bytearray(context.read_bytes())
    damaged[-100] ^= 1  # in the last run
    context.write_bytes(damaged)
    shown = run("kv", "verify", context, code=CORRUPT).stdout
    assert shown.endswith(f"of {tokens} tokens are intact; kvpack generate --drop-damaged goes on behind them\n")
    intact = int(shown.split()[3])
    assert intact % 2048 == 0 < intact < tokens
    go_on = ("generate", model, "--load-context", context, "--prompt", "rain", "--max-new-tokens", 4)
    assert f"--drop-damaged) loads the {intact} tokens before it" in run(*go_on, code=CORRUPT).stderr
    with pytest.warns(UserWarning, match=f"^{intact} of {tokens} tokens were loaded"):
        report = run_json(*go_on, "--drop-damaged", "--save-context", short)
    assert report["context_tokens"] == intact
    assert run_json("kv", "verify", short)["tokens"] == intact + report["prompt_tokens"] + report["new_tokens"]


def test_a_directory_of_contexts(tmp_path: Path, model: Path) -> None:
    for name, prompt in (("a", LONG), ("b", "rain")):
        run("generate", model, "--prompt", prompt, "--max-new-tokens", 2, "--save-context", tmp_path / name)
    (tmp_path / "notes").write_text("no context")
    os.mkfifo(tmp_path / "pipe")
    report = run_json("kv", "inspect", tmp_path)
    assert [found["file"] for found in report["contexts"]] == ["a", "b"]
    assert [other["file"] for other in report["others"]] == ["notes"]
    shown = run("kv", "inspect", tmp_path)
    first = report["contexts"][0]
    headings, *rows = [re.split(" {2,}", line) for line in shown.stdout.splitlines()[:-1]]
    assert headings == ["context", "model", "pages", "first token", "tokens", "size", "of fp16"]
    assert [row[0] for row in rows] == ["a", "b"]
    assert rows[0][1:5] == [first["fingerprint"]["model"][:16], "FP16", "0", str(first["tokens"])]
    assert rows[0][6] == f"{first['file_bytes'] / first['fp16_bytes']:.3f}"
    assert len({len(line) for line in shown.stdout.splitlines()[:-1]}) == 1  # numbers end where their headings do
    assert max(map(len, shown.stderr.splitlines())) <= 120
    (tmp_path / "b").unlink()
    assert "1 context, " in run("kv", "inspect", tmp_path).stdout
    assert "2 contexts, " in shown.stdout
    assert "kvpack: notes is none: NotAContainerError" in shown.stderr
    # Of several files of other kinds their count; one that is damaged is still told.
    for number in range(9):
        (tmp_path / f"text{number}").write_text("no context")
    (tmp_path / "cut").write_bytes((tmp_path / "a").read_bytes()[:-100])
    told = run("kv", "inspect", tmp_path).stderr.splitlines()
    assert told[0] == "kvpack: 10 other files are none: notes, text0, text1, text2 and 6 more"
    assert len(told) == 2
    assert told[1].startswith("kvpack: cut is none: ")
    assert len(run_json("kv", "inspect", tmp_path)["others"]) == 11


def test_convert(tmp_path: Path, model: Path) -> None:
    wide, narrow, archive = (tmp_path / name for name in ("wide", "narrow", "archive"))
    run("generate", model, "--prompt", LONG, "--max-new-tokens", 2, "--save-context", wide)
    report = run_json("kv", "convert", wide, "-o", narrow, "--kv-bits", 4)
    assert report["output_bytes"] == narrow.stat().st_size < wide.stat().st_size == report["input_bytes"]
    assert run_json("kv", "inspect", narrow)["formats"] == [["INT4", "INT4"]] * 2
    assert run_json("generate", model, "--load-context", narrow, "--max-new-tokens", 4)["new_tokens"] == 4
    assert "--force replaces it" in run("kv", "convert", wide, "-o", narrow, "--kv-bits", 4, code=USAGE).stderr
    run("kv", "convert", wide, "-o", narrow, "--kv-bits", 2, "--force")
    to_x = ("-o", tmp_path / "x")
    assert "fewer bits than INT4" in run("kv", "convert", narrow, *to_x, "--kv-bits", 4, code=USAGE).stderr
    assert "either --kv-bits or --archive" in run("kv", "convert", wide, *to_x, code=USAGE).stderr

    report = run_json("kv", "convert", wide, "-o", archive, "--archive", "--noise", 0.5)
    assert 0.1 < report["noise"][1] < 0.5
    assert archive.stat().st_size < wide.stat().st_size / 2
    refused = run("generate", model, "--load-context", archive, code=CORRUPT).stderr
    assert "an archive of a context: `kvpack kv convert FILE -o OUT`" in refused
    notes = tmp_path / "notes.txt"
    notes.write_text("not to be lost")
    for force in ((), ("--force",)):
        run("kv", "convert", wide, "-o", notes, "--kv-bits", 2, *force, code=USAGE)
        assert notes.read_text() == "not to be lost"
        before = wide.read_bytes()
        assert "is the input" in run("kv", "convert", wide, "-o", wide, "--kv-bits", 2, *force, code=USAGE).stderr
        assert wide.read_bytes() == before
    run("kv", "convert", wide, "-o", archive, "--archive", "--force")
    back = run("kv", "convert", archive, "-o", tmp_path / "back").stdout
    assert back.startswith("a context from an archive: ")
    assert run_json("generate", model, "--load-context", tmp_path / "back", "--max-new-tokens", 4)["new_tokens"] == 4


def test_bench(tmp_path: Path, model: Path) -> None:
    context = tmp_path / "context"
    run("generate", model, "--prompt", LONG, "--kv-bits", 4, "--max-new-tokens", 2, "--save-context", context)
    report = run_json("kv", "bench", context, "--threads", 1, "--plot", tmp_path / "plot.png")
    rows = {row["name"]: row for row in report["rows"]}
    assert rows["kvpack"]["bytes"] == context.stat().st_size
    assert rows["pages"]["of_pages"] == rows["fp16"]["of_fp16"] == 1
    assert rows["kvpack"]["decode_gb_per_s"] > 0
    assert {"lz4"} <= rows.keys()
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    shown = run("kv", "bench", context, "--threads", 1).stdout
    assert "kvpack  " in shown


@pytest.mark.parametrize(
    ("rope", "known"),
    [
        ({"rope_theta": 10000.0}, 16),
        ({"rope_theta": 500000, "rope_type": "default", "partial_rotary_factor": 0.5}, 8),
        ({}, 0),
        ({"rope_theta": 10**400}, 0),
        ({"rope_theta": -1.0}, 0),
        ({"rope_theta": "10000"}, 0),
        ({"rope_theta": 10000.0, "rope_type": "yarn"}, 0),
        *(({"rope_theta": 10000.0, "partial_rotary_factor": share}, 0) for share in ("x", None, -0.5, 1e300, 0.01, [])),
    ],
)
def test_a_rope_that_is_none_is_not_known(rope: Any, known: int) -> None:
    from kvpack.cli.kv import _frequencies

    found = _frequencies(rope, 32)
    assert (0 if found is None else len(found)) == known
    assert found is None or found[0] == 1


def test_no_control_character_of_a_message_reaches_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    from kvpack.cli.failures import ExitCode, fail

    with pytest.raises(Exit):
        fail(ExitCode.MISMATCH, "FingerprintMismatchError", "rope.\x1b[2J: a\nconfig: b", as_json=False)
    assert capsys.readouterr().err == "kvpack: rope.\ufffd[2J: a\nconfig: b\n"


def test_what_generate_refuses_of_contexts(tmp_path: Path, model: Path) -> None:
    context, other = tmp_path / "context", write_model(tmp_path / "other", seed=3)
    generate = ("generate", model, "--max-new-tokens", 2)
    run(*generate, "--prompt", "rain", "--save-context", context)
    found = run_json("generate", other, "--load-context", context, "--prompt", "x", code=USAGE)
    assert found["error"] == "FingerprintMismatchError"
    assert "weights: " in found["message"]
    for given, said in {
        ("--load-context", context, "--kv-bits", 4): "kvpack kv convert",
        ("--prompt", "x", "--drop-damaged"): "--drop-damaged is for --load-context",
        ("--load-context", context, "--chat", "--prompt", "x", "--system", "y"): "is for its beginning",
        ("--prompt", "x", "--prompt", "y", "--save-context", tmp_path / "b"): "a context is of one prompt",
        ("--prompt", "x", "--save-context", model / "config.json"): "no context: it is not replaced",
        ("--prompt", "x", "--save-context", tmp_path / "no" / "b"): "is no directory",
        ("--load-context", tmp_path / "nowhere"): "does not exist",
    }.items():
        result = run(*generate, *given, code=USAGE)
        assert said in " ".join((result.stderr + result.stdout).replace("│", " ").split())
    assert "NotAContainerError" in run_json(*generate, "--load-context", model / "config.json", code=CORRUPT)["error"]


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is loaded fails the test."""
    from kvpack.integrations.transformers import causal_models

    monkeypatch.setattr(causal_models, "load_causal_model", lambda *_, **__: pytest.fail("the model was loaded"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """A folder with a context, an archive of it, and other files."""
    folder = tmp_path_factory.mktemp("saved")
    run("generate", model, "--prompt", "rain", "--max-new-tokens", 2, "--save-context", folder / "context")
    run("kv", "convert", folder / "context", "-o", folder / "archive", "--archive")
    (folder / "text").write_text("It was: a dark night.")
    (folder / "not UTF-8").write_bytes(b"\xff\xfe\xfd")
    return folder


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--prompt-file", "SAVED/missing"), USAGE, "SAVED/missing does not exist"),
        (("--prompt-file", "SAVED"), USAGE, "SAVED is a directory; a text file is wanted"),
        (("--prompt-file", "SAVED/not UTF-8"), USAGE, "SAVED/not UTF-8 is not UTF-8 text"),
        (("--prompt", "a", "--prompt-file", "SAVED/text"), USAGE, "--prompt and --prompt-file are both given"),
        (("--prompt", ""), USAGE, "a prompt has no tokens: it is empty"),
        (("--prompt", "a", "--max-new-tokens", "320"), USAGE, "are more than the 320 positions that the model has"),
        (("--prompt", "a", "--top-p", "0"), USAGE, "0 leaves no token to draw from"),
        (("--prompt", "a", "--kv-bits", "5"), USAGE, "--kv-bits is 5; there are 16, 8, 4, 3, 2"),
        (("--prompt", "a", "--kv-bits", "4", "--kv-budget", "0.5"), USAGE, "either --kv-bits or --kv-budget is given"),
        (("--prompt", "a", "--kv-budget", "0.01"), USAGE, "budget is 0.01; with head_dim"),
        (("--prompt", "a", "--save-context", "SAVED"), USAGE, "SAVED is a directory: name a file in it"),
        (("--prompt", "a", "--save-context", "SAVED/text"), USAGE, "SAVED/text is there, and no context"),
        (("--prompt", "a", "--save-context", "/proc/context"), USAGE, "/proc/context cannot be written (No such file"),
        (("--load-context", "SAVED/missing"), USAGE, "SAVED/missing does not exist"),
        (("--load-context", "SAVED"), USAGE, "name one file; `kvpack kv inspect SAVED` lists its contexts"),
        (
            ("--load-context", "SAVED/text"),
            CORRUPT,
            "text ('It was: a dark night.'), no context: --prompt-file of `kvpack generate` reads texts, and its ",
        ),
        (("--load-context", "SAVED/archive"), CORRUPT, "SAVED/archive: an archive of a context: `kvpack kv convert "),
        (("--load-context", "MODEL/model.safetensors"), CORRUPT, "a safetensors file, but no snapshot of a KV cache"),
        (("--load-context", "SAVED/context", "--kv-bits", "4"), USAGE, "its pages have the bits that they were saved"),
        (("--load-context", "SAVED/context", "--max-new-tokens", "319"), USAGE, "a context of 4 tokens, a prompt of 0"),
    ],
)
def test_bad_inputs_are_refused_before_a_model_is_loaded(
    arguments: tuple[str, ...], code: int, message: str, model: Path, saved: Path
) -> None:
    def named(text: str) -> str:
        return text.replace("SAVED", str(saved)).replace("MODEL", str(model))

    found = run_json("generate", model, *map(named, arguments), code=code)
    assert named(message) in found["message"]
    assert sorted(path.name for path in saved.iterdir()) == ["archive", "context", "not UTF-8", "text"]


@pytest.mark.usefixtures("unloaded")
def test_contexts_of_others_are_refused_before_a_model_is_loaded(model: Path, saved: Path, tmp_path: Path) -> None:
    """Where a configuration or a dtype tells; other weights are found out when they are there."""
    go_on = ("--load-context", saved / "context", "--prompt", "a")
    other = run_json("generate", write_model(tmp_path / "other", positions=400), *go_on, code=USAGE)
    assert other["error"] == "FingerprintMismatchError"
    first, _, of_model, *lines = other["message"].splitlines()
    assert first == "the pages are of another model, to which alone they mean anything"
    assert of_model == "  fingerprint of the model: not known, its weights were not loaded"
    assert [line.split(":")[0] for line in lines] == ["  config"]
    in_half = write_model(tmp_path / "half", dtype="bfloat16")
    for found in (
        run_json("generate", in_half, *go_on, code=USAGE),
        run_json("generate", model, *go_on, "--dtype", "bfloat16", code=USAGE),
    ):
        first, *_, dtype = found["message"].splitlines()
        assert (
            first == "the pages were made in another dtype than the model is in: load it in float32 (--dtype float32)"
        )
        assert dtype == "  dtype: float32 in the file, bfloat16 in the model"


def test_a_context_goes_on_in_the_dtype_that_a_refusal_names(model: Path, saved: Path, tmp_path: Path) -> None:
    in_half = write_model(tmp_path / "half", dtype="bfloat16")
    context = tmp_path / "context"
    run("generate", in_half, "--prompt", "a", "--dtype", "float16", "--max-new-tokens", 2, "--save-context", context)
    go_on = ("generate", in_half, "--load-context", context, "--max-new-tokens", 2)
    assert "load it in float16 (--dtype float16)" in run_json(*go_on, code=USAGE)["message"]
    assert run_json(*go_on, "--dtype", "float16")["new_tokens"] == 2


def test_files_that_are_refused_load_no_torch(model: Path, saved: Path) -> None:
    """In a process of its own, since it is loaded here: loading it takes seconds."""
    for arguments in (("--load-context", saved / "text"), ("--prompt", "a", "--save-context", saved)):
        code = f"""
import sys
from kvpack.cli import app
try:
    app({["generate", str(model), *map(str, arguments)]!r})
except SystemExit as ended:
    assert ended.code, "refused"
assert not sys.modules.keys() & {{"torch", "transformers"}}
"""
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_what_is_no_context_says_what_it_is(saved: Path) -> None:
    for name, said in {
        "text": "text ('It was: a dark night.'), no context: --prompt-file",
        "archive": "an archive of a context: `kvpack kv convert FILE -o OUT` makes a context of it",
    }.items():
        assert said in run_json("kv", "inspect", saved / name, code=CORRUPT)["message"]


def test_prompts_of_a_batch_go_on_from_one_context(tmp_path: Path, model: Path) -> None:
    context = tmp_path / "context"
    run("generate", model, "--prompt", LONG, "--kv-bits", 4, "--max-new-tokens", 2, "--save-context", context)
    prompts = (" and the rain said", " night", " the young light walked into the house")
    options = ("--load-context", context, "--max-new-tokens", 12)
    batch = run_json("generate", model, *(x for prompt in prompts for x in ("--prompt", prompt)), *options)
    singles = [run_json("generate", model, "--prompt", prompt, *options)["texts"][0] for prompt in prompts]
    assert batch["texts"] == singles


def test_a_chat_goes_on(tmp_path: Path, model: Path) -> None:
    """The second turn is what the template makes of the whole conversation."""
    context = tmp_path / "context"
    chat = ("generate", model, "--chat", "--max-new-tokens", 8, "--kv-bits", 16)
    first = run_json(*chat, "--prompt", "the old house", "--save-context", context)
    turn = ("generate", model, "--chat", "--max-new-tokens", 8, "--load-context", context)
    second = run_json(*turn, "--prompt", "the rain", "--save-context", context)
    answer = first["texts"][0]
    whole = f"[user] the old house\n[assistant] {answer}\n[user] the rain\n[assistant] "
    from integrations.tiny_text_model import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    assert tokenizer.decode(tokenizer(whole).input_ids) == whole
    straight = run_json("generate", model, "--prompt", whole, "--max-new-tokens", 8, "--kv-bits", 16)
    assert second["context_tokens"] + second["prompt_tokens"] == straight["prompt_tokens"]
    assert second["texts"] == straight["texts"]
