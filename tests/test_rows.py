"""Data: every format and data set's columns, errors with file and row, templates that survive any text."""

import gzip
import importlib
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import toy
from conftest import make_model, run_here
from tokenizers import AddedToken
from transformers import AutoTokenizer

import sdpo
import sdzero
import srt
from common import (
    InputError,
    Run,
    as_messages,
    chat_ids,
    check_ids,
    claim_folder,
    fill_template,
    load_evals,
    load_rows,
    step_rows,
    tokenize,
)
from sdft import Args, to_row, to_training_row

SCRIPTS = ["sdft", "sdpo", "srt", "sdzero", "distill"]
training_row = partial(to_training_row, args=Args())
ROWS = [{"prompt": f"zig:{i}", "answer": str(i)} for i in range(5)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_every_format_gives_the_same_rows(tmp_path):
    """Lines and arrays are told apart by content: the authors' train.json holds JSON lines."""
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(tmp_path / "folder")
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "folders")
    table.to_parquet(tmp_path / "rows.parquet")
    for name in ("lines.json", "lines.jsonl", "lines.txt"):
        write(tmp_path / name, ROWS)
    for name in ("array.json", "array.jsonl", "array.txt"):
        (tmp_path / name).write_text("\n " + json.dumps(ROWS, indent=1))
    marked = (tmp_path / "lines.txt").read_text()
    (tmp_path / "marked.txt").write_text(marked, encoding="utf-8-sig")  # a byte order mark
    for file in tmp_path.iterdir():
        rows = load_rows(str(file), dict)
        assert [{k: row[k] for k in ROWS[0]} for row in rows] == ROWS
        assert [row["id"] for row in rows] == [1, 2, 3, 4, 5]
        assert rows[2]["where"] == f"{file.name}:3"


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\u0085", "\v", "\r"])
def test_lines_end_at_newlines_only(mark, tmp_path):
    rows = [{"prompt": f"a{mark}b", "answer": mark}, {"prompt": "c", "answer": "d"}]
    text = "".join(json.dumps(row, ensure_ascii=mark in "\v\r") + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
    got = load_rows(str(tmp_path / "rows.jsonl"), dict)
    assert [row["prompt"] for row in got] == [f"a{mark}b", "c"]
    assert got[1]["where"] == "rows.jsonl:2"


def test_a_downloaded_folder_of_parquet_files_is_read(tmp_path):
    """As `huggingface-cli download` leaves it, in one split or in several, and without a README too."""
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    with pytest.raises(InputError, match="set: no data could be loaded .*any data files"):
        load_rows(str(folder), dict)
    datasets.Dataset.from_list(ROWS).to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A set\n")
    assert [row["answer"] for row in load_rows(str(folder), dict)] == ["0", "1", "2", "3", "4"]
    datasets.Dataset.from_list(ROWS[3:]).to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    with pytest.raises(InputError, match="set has the splits train, test; name one, as in .*set@train"):
        load_rows(str(folder), dict)
    assert [row["answer"] for row in load_rows(f"{folder}@test", dict)] == ["3", "4"]
    with pytest.raises(InputError, match="set@best: no data could be loaded .*'train', 'test'"):
        load_rows(f"{folder}@best", dict)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that cannot be read, even by root")
def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path):
    (tmp_path / "rows.jsonl").symlink_to("/proc/self/mem")
    with pytest.raises(InputError, match="^rows.jsonl: expected UTF-8 text.*Input/output error"):
        load_rows(str(tmp_path / "rows.jsonl"), dict)
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "folder.json")
    assert len(load_rows(str(tmp_path / "folder.json"), dict)) == len(ROWS)


def test_evaluation_sets_name_their_split_and_keep_apart(tmp_path):
    """It never is the training split by accident."""
    for name, part in (("a", ROWS[:2]), ("b", ROWS[2:])):
        split = datasets.Dataset.from_list(part)
        datasets.DatasetDict({"train": split.select([0]), "test": split}).save_to_disk(tmp_path / name)

    def evals(*sources):
        args = Args(eval_data=tuple(f"{tmp_path}/{source}" for source in sources))
        return load_evals(args, to_row, toy.make_tokenizer())

    sizes = {name: len(rows) for name, rows in evals("a@test", "b@test", "a@test#train").items()}
    assert sizes == {"a@test": 2, "b@test": 3, "a@test#train": 1}
    for source in ("a", "a@validation"):
        with pytest.raises(InputError, match=f"--eval-data .*{source} has the splits train, test; name one"):
            evals(source)


@pytest.mark.parametrize(
    "source, message",
    [
        ("", "--data is missing: a JSONL"),
        ("nowhere.jsonl", "nowhere.jsonl: no data could be loaded .no such file"),
        ("broken.parquet", "broken.parquet: no data could be loaded"),
        ("no/such-set:en@train", "no data could be loaded"),
        ("toy:0/nothing.jsonl", "toy:0/nothing"),
        ("rows.jsonl#val", "rows.jsonl#val: use #train or #test"),
        ("one.jsonl#train", "#train: use #train or #test, of at least two rows"),
    ],
)
def test_a_source_without_data_says_what_would_work(source, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows.jsonl", ROWS)
    write(tmp_path / "one.jsonl", ROWS[:1])
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=message):
        load_rows(source, dict)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", ": no rows in it"),
        ('{"prompt": "a", "privileged_context": "b"}\n' * 16 + '{"prompt": "a", \n', ":17: .*JSON"),
        ('["prompt"]\n', ":1: expected a JSON object with named columns, found \\['prompt'\\]"),
        ('{"question": "a"}\n', r":1: missing column 'prompt' \(found: question\)"),
        ('{"prompt": "a", "answer": "b"}\n', ":1: missing column 'privileged_context'"),
        ('{"prompt": "a", "privileged_context": " "}\n', ":1: the privileged_context is empty"),
        ('{"prompt": "", "privileged_context": "b"}\n', ":1: the prompt is empty"),
        ('{"prompt": [{"role": "assistant", "content": "a"}]}\n', ":1: .*ends with the user's"),
        ('{"prompt": null, "x": "b"}\n', r":1: missing column 'prompt' \(found: x\)"),
        ('{"prompt": ["a"]}\n', ":1: a prompt is text, or a list of chat messages"),
        ('{"prompt": "a", "privileged_context": 7}\n', ":1: the privileged_context is .* no text"),
        ('{"prompt": "a", "privileged_context": [{}]}\n', ":1: the privileged_context is .* no text"),
        ('{"prompt": {"role": "user"}}\n', ":1: a prompt is text, or a list of chat messages"),
        ('{"prompt": "a", "system": 7}\n', ":1: a chat message has a role of"),
        ('{"prompt": [{"role": "user"}]}\n', ":1: a chat message has a role of"),
        ('{"prompt": [{"content": "a"}]}\n', ":1: a chat message has a role of"),
        ('{"prompt": [{"role": "human", "content": "a"}]}\n', ":1: a chat message has a role of"),
        ('{"prompt": [{"role": "user", "content": 7}]}\n', ":1: a chat message has a role of"),
        ('{"prompt": [{"role": "user", "content": ["a"]}]}\n', ":1: .* part that is not text"),
        ('{"prompt": [{"role": "user", "content": [{"type": "image"}]}]}\n', ":1: .* part that is not text"),
        ('{"prompt": [{"role": "tool", "content": "a"}]}\n', ":1: .*ends with the user's or a tool's"),
        ('{"data": [\n{"prompt": "a"}]}\n', ":1: not a JSON object"),
        ("[" * 100000, ":1: not a JSON object: maximum recursion depth"),
        ('{"prompt": "a", "privileged_context": "b"}\n\n{}\n', ":3: missing column 'prompt'"),
        ('{"prompt": "a", "privileged_context": "b"}\n\nnull\n', ":3: expected a JSON object"),
        ("caf\xe9".encode("latin-1"), ": expected UTF-8 text; unpack or convert the file first"),
        (gzip.compress(b'{"prompt": "a"}'), ": expected UTF-8 text; unpack or convert the file first"),
    ],
)
def test_errors_name_file_and_row(text, message, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match="rows.jsonl" + message) as error:
        load_rows(str(tmp_path / "rows.jsonl"), training_row)
    assert "\n" not in str(error.value)


def test_null_columns_are_absent_columns_and_text_parts_are_joined(tmp_path):
    """Every parquet file with mixed columns has them, in messages too."""
    parts = [{"type": "text", "text": text} for text in ("zig", ":1")]
    message = {"role": "user", "content": parts, "name": None, "tool_calls": None}
    rows = [
        {"prompt": [message], "teacher_prompt": None, "privileged_context": "so1>1;"},
        {"prompt": [message], "teacher_prompt": "rev:1", "privileged_context": None},
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    told, own = load_rows(f"{tmp_path}/rows.parquet", training_row)
    assert told["prompt"] == as_messages("zig:1")
    assert "so1>1;" in told["teacher_messages"][0]["content"]
    assert own["teacher_messages"] == as_messages("rev:1")


def test_a_template_that_fails_names_file_and_row():
    """Gemma's refuses a system message."""
    tokenizer = toy.make_tokenizer()
    refuse = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    tokenizer.chat_template = refuse + tokenizer.chat_template
    system = [{"role": "system", "content": "S"}, {"role": "user", "content": "a"}]
    rows = [{"prompt": as_messages(prompt), "where": f"f:{i}"} for i, prompt in enumerate(("a", system))]
    with pytest.raises(InputError, match="f:1: no system role"):
        tokenize(rows, tokenizer, Args())
    assert tokenize(rows[:1], tokenizer, Args())


def dry_run(script, tmp_path, row, more=""):
    """The script on one good row and this one."""
    model = tmp_path / "m"
    if not model.exists():
        make_model(model)
    good = {"prompt": "zig:1", "answer": "1", "privileged_context": "so1>1;", "completion": "1"}
    files = dict(data=write(tmp_path / "rows.jsonl", [good, {**good, **row}]))
    files["eval"] = write(tmp_path / "eval.jsonl", [good])
    tiny = SimpleNamespace(model=model, teacher=model, **files)
    return run_here(script, tmp_path / "run", tiny, f"--verifier exact --dry-run {more}")


@pytest.mark.parametrize("examples", [None, [{"input": "1"}], 7])
def test_examples_of_a_programming_problem_that_are_missing(examples, tmp_path):
    data = write(tmp_path / "rows.jsonl", [{"prompt": "Add", "input_format": "a line", "examples": examples}])
    for module in (srt, sdzero):
        with pytest.raises(InputError, match="rows.jsonl:1: "):
            load_rows(data, module.competition_row)


@pytest.mark.parametrize("completion", [None, [], [{"role": "assistant"}], 7, " "])
def test_completions_that_are_no_text(completion, tmp_path):
    with pytest.raises(InputError, match="rows.jsonl:2: .*(completion|content)"):
        dry_run("distill", tmp_path, {"completion": completion}, "--lmbda 0 --outputs completion")


@pytest.mark.parametrize("answer", [None, "", " ", [], float("nan")])
@pytest.mark.parametrize("script", SCRIPTS)
def test_training_rows_that_are_graded_need_an_answer(script, answer, tmp_path):
    if script in ("sdft", "distill"):  # which only evaluate with the verifier
        with pytest.raises(FileNotFoundError):  # the dry run went through and left no metrics
            dry_run(script, tmp_path, {"answer": answer})
    else:
        with pytest.raises(InputError, match="rows.jsonl:2: .*answer.*--verifier exact needs"):
            dry_run(script, tmp_path, {"answer": answer})


def test_a_token_beyond_the_embedding_is_named_with_its_row(tmp_path):
    """A tokenizer with words added after the model was made; unused ones do no harm (Gemma 3 has one)."""
    folder = make_model(tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<late>"])
    tokenizer.save_pretrained(folder)
    rows = tokenize([{"prompt": as_messages("so"), "where": "f:1"}], tokenizer, Args())
    check_ids(rows, tokenizer, str(folder))
    message = "rows.jsonl:2: token '<late>' has id 89, but the embedding of --model .* 89 rows"
    with pytest.raises(InputError, match=message):
        dry_run("sdft", tmp_path, {"prompt": "<late>"})


@pytest.mark.parametrize(
    "column, value",
    [
        ("prompt", as_messages("so<|end|>no")),
        ("prompt", as_messages("so", "<|pad|>")),
        ("prompt", [{"role": "assistant", "content": "<|user|>"}, *as_messages("so")]),
        ("prompt", as_messages("<late>")),
        ("prompt", as_messages("so\ud800")),
        ("teacher_messages", as_messages("so<|end|>")),
        ("expert_text", "no<late>"),
        ("expert_text", "\udfff"),
    ],
)
def test_special_tokens_and_lone_surrogates_are_refused(column, value):
    """A spelled one would end the turn; the template's are none of the text, <think> is an ordinary token."""
    tokenizer = toy.make_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.add_tokens([AddedToken("<late>", special=True)])  # as Gemma 3 has <end_of_turn>
    good = {"prompt": as_messages("so<think>no</think>"), "expert_text": "<|END|> < |end|>", "where": "f:1"}
    assert tokenize([good], tokenizer, Args())
    message = "f:2: (the text <.*> would be read as a special token|.*surrogates not allowed)"
    with pytest.raises(InputError, match=message):
        tokenize([good, {"prompt": as_messages("so"), "where": "f:2", column: value}], tokenizer, Args())


@pytest.mark.parametrize("end", ["<end_of_turn>", "<answer_ends>", "<|end|>", ""])
def test_a_turn_ends_as_the_template_ends_it(end):
    """Gemma's <end_of_turn> is not its EOS; without a special token it is."""
    tokenizer = toy.make_tokenizer()
    tokenizer.add_tokens([AddedToken(name, special=True) for name in ("<end_of_turn>", "<answer_ends>")])
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content | trim }}" + end + "\n{% endfor %}"
    )
    [row] = tokenize([{"prompt": as_messages("so"), "expert_text": "no", "where": "f:1"}], tokenizer, Args())
    assert tokenizer.decode(row["completion_ids"]) == "no" + (end or tokenizer.eos_token)


def test_columns_of_the_papers_data_sets():
    calls = [{"Action": "a", "Action_Input": "{}"}]
    tool = {"prompt": "Task", "golden_answer": calls, "golden_response": ["Thought: x", "Action: a"]}
    row = training_row(tool)
    assert row["privileged_context"] == "Thought: x\nAction: a"
    assert row["answer"] == calls
    assert row["prompt"] == as_messages("Task")
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    row = training_row({"messages": messages, "output_text": "demo"})
    assert row["prompt"] == messages
    assert row["privileged_context"] == "demo"
    row = training_row({"Question": "q", "Complex_CoT": "think", "Response": "r"})
    assert row["privileged_context"] == "think\n\nr"
    raw = {"question": "Q?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"}
    raw |= {"details": {"level": "L3"}, "type": "mcq-2-choices"}
    system, user = to_row(raw)["prompt"]
    assert user["content"] == "Q?\n\nA: x\nB: y"
    assert system["content"].startswith("\nGiven a question")
    assert system["content"].endswith("</answer>\n")
    assert sdpo.to_row(raw)["prompt"][1]["content"].endswith("B: y\nPlease reason step by step.")
    assert sdpo.to_row(raw)["prompt"][0] == system
    assert to_row(raw)["answer"] == "B"
    assert to_row({**raw, "details": {"level": "L1"}}) is None


def test_templates_keep_braces_and_percent_signs():
    """Trap 47: values that look like places stay what they are."""
    values = dict(prompt="{demonstration} %d", demonstration="{prompt}")
    filled = fill_template("{prompt} {x} %s {demonstration}", **values)
    assert filled == "{demonstration} %d {x} %s {prompt}"


def test_chat_ids_go_up_to_the_generation_prompt():
    tokenizer = toy.make_tokenizer()
    ids = chat_ids(tokenizer, as_messages("zig:4721"), {}, Args())
    text = "<|user|>zig:4721<|end|><|assistant|>"
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    tokenizer.chat_template += "{% if enable_thinking is defined and not enable_thinking %} no{% endif %}"
    quick = chat_ids(tokenizer, as_messages("zig:4721"), {}, Args(chat_kwargs={"enable_thinking": False}))
    assert quick == ids + tokenizer(" no")["input_ids"]


def test_long_prompts_are_left_out_and_something_is_left():
    tokenizer, texts = toy.make_tokenizer(), ("add:1+2", "add:" + "1" * 40)
    rows = [{"prompt": as_messages(text), "where": f"f:{i}"} for i, text in enumerate(texts)]
    args = Args(max_prompt_tokens=20)
    assert tokenize(rows, tokenizer, args) == rows[:1]
    assert rows[0]["prompt_ids"] == chat_ids(tokenizer, rows[0]["prompt"], {}, args)
    assert len(tokenize(rows, tokenizer, Args(max_prompt_tokens=len(rows[1]["prompt_ids"])))) == 2
    with pytest.raises(InputError, match="none of the 1 rows fits; raise --max-prompt-tokens"):
        tokenize(rows[1:], tokenizer, args)


def test_a_long_evaluation_row_is_an_error(tmp_path):
    data = write(tmp_path / "e.jsonl", [{"prompt": text, "answer": "1"} for text in ("add:1", "1" * 40)])
    with pytest.raises(InputError, match="e.jsonl:2: 43 tokens; raise --max-prompt-tokens"):
        load_evals(Args(max_prompt_tokens=20, eval_data=(data,)), to_row, toy.make_tokenizer())


def test_steps_are_epochs_laid_end_to_end():
    rows = [dict(row, id=i) for i, row in enumerate(ROWS)]
    whole = [step_rows(rows, step, 4, 1, 1) for step in range(1, 6)]  # 20 rows are 4 epochs of 5
    flat = [row["id"] for step in whole for row in step]
    epochs = [flat[i : i + 5] for i in range(0, 20, 5)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1
    assert whole != [step_rows(rows, step, 4, 1, 2) for step in range(1, 6)]


def test_a_row_twice_in_one_step_has_random_numbers_of_its_own():
    """More prompts per step than rows; the first copies keep the numbers that they would have alone."""
    rows = [{"id": 7}, {"id": 9}]
    twice, once = (step_rows(rows, 1, per_step, 2, 1) for per_step in (4, 2))
    assert sorted(row["rollout_key"] for row in twice) == [(i, n) for i in (7, 9) for n in range(4)]
    assert twice[:4] == once


def test_other_data_is_refused_on_resume(tmp_path):
    """config.json holds a hash of all token ids: of prompts, contexts and their order."""

    def claim(rows, resume=True):
        return claim_folder(Run(Args(out=str(tmp_path / "r"), resume=resume)), rows)

    rows = [{"prompt_ids": [1, 2], "teacher_ids": [3]}, {"prompt_ids": [4], "teacher_ids": [5]}]
    assert claim(rows, resume=False) == ""
    (tmp_path / "r" / "checkpoints").mkdir()
    assert claim([{**row, "where": "elsewhere:1"} for row in rows]) == ""
    for other in (rows[::-1], rows[:1], [{**rows[0], "teacher_ids": [9]}, rows[1]]):
        assert "the data or the chat template changed" in claim(other)


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": {"enum": None}}}}}


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])], ids=["list", "text"])
def test_tools_reach_the_template_without_null_keys(tools):
    """Parquet files fill the schema of every tool with None; many sets keep tools as JSON text."""
    tokenizer = toy.make_tokenizer()
    tokenizer.chat_template = "{{ tools | tojson }}" + tokenizer.chat_template
    shown = tokenizer.apply_chat_template
    tokenizer.apply_chat_template = lambda *args, **options: shown(*args, **{**options, "tokenize": False})
    text = chat_ids(tokenizer, as_messages("so"), {"tools": tools}, Args())
    assert '"name": "f"' in text and '"x": {}' in text and "null" not in text


def test_a_prompt_may_end_with_a_tools_message():
    """Then the template follows as a new user message: the tool's stays a tool's."""
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "x": None}}]}
    prompt = [{"role": "user", "content": "so"}, call, {"role": "tool", "content": "42"}]
    row = training_row({"prompt": prompt, "privileged_context": "no"})
    assert row["prompt"][1] == {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}
    *before, last = row["teacher_messages"]
    assert before == row["prompt"]
    assert last == training_row({"prompt": "so", "privileged_context": "no"})["teacher_messages"][0]
    args = sdpo.Args(template="{prompt};{solution}{feedback}")
    tokenizer = toy.make_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("m['content']", "m['content'] or 'ok'")
    tokenizer.add_tokens([AddedToken("<|tool|>", special=True)])
    ids = sdpo.teacher_ids(sdpo.to_row({"prompt": prompt}), "no", [], tokenizer, args)
    text = "<|user|>so<|end|><|assistant|>ok<|end|><|tool|>42<|end|><|user|>so;"
    assert tokenizer.decode(ids).startswith(text)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_authors_own_columns(script):
    """SDPO's JSON lines as they are shipped: `system` is the prompt's, null where there is none."""
    module = importlib.import_module(script)
    convert = getattr(module, "competition_row", None) or module.to_row
    science = {"idx": 7, "kind": "mcq", "dataset": "sciknoweval", "answer": "B", "elo": 1500}
    science |= {"prompt": "Which?\n\nA: x\nB: y", "description": "d", "tests": "-", "embedding": []}
    row = convert({**science, "system": "\nGiven a question"})
    assert row["answer"] == "B"
    assert row["prompt"] == as_messages("Which?\n\nA: x\nB: y", "\nGiven a question")
    for more in ({"elo": 1500}, {"system": ""}):
        tools = {"kind": "tooluse", "prompt": "Your task", "answer": '[{"Action": "f"}]', **more}
        assert convert(tools)["prompt"] == as_messages("Your task")
