"""Data: every format and data set's columns, errors that name file and row, templates that survive any text."""

import json
from types import SimpleNamespace

import datasets
import pytest

import toy
from common import (InputError, as_messages, batch_rows, chat_ids, fill, fit, load_rows, load_verifier, sciknoweval_row, tokenize, tool_use)
from sdft import to_row, to_training_row

ROWS = [{"prompt": f"zig:{i}", "answer": str(i)} for i in range(5)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_every_format_gives_the_same_rows(tmp_path):
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(tmp_path / "folder")
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "folders")
    table.to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    write(tmp_path / "rows.jsonl", ROWS)
    for name in ("folder", "folders", "rows.parquet", "rows.json", "rows.jsonl"):
        rows = load_rows(str(tmp_path / name))
        assert [{k: row[k] for k in ROWS[0]} for row in rows] == ROWS
        assert [row["id"] for row in rows] == [1, 2, 3, 4, 5] and rows[2]["where"] == f"{name}:3"


@pytest.mark.parametrize("text, message", [
    ("", "no rows in it"),
    ('{"prompt": "a", "privileged_context": "b"}\n' * 16 + '{"prompt": "a", \n', r"rows.jsonl:17: not JSON"),
    ('["prompt"]\n', "rows.jsonl:1: expected a JSON object with named columns, found list"),
    ('{"question": "a", "context": "b"}\n', r"rows.jsonl:1: no 'prompt' in this row \(it has: question, context\)"),
    ('{"prompt": "a", "answer": "b"}\n', r"rows.jsonl:1: no 'privileged_context' in this row \(it has: prompt, answer\)"),
    ('{"prompt": "a", "privileged_context": " "}\n', "rows.jsonl:1: the privileged_context is empty"),
    ('{"prompt": "", "privileged_context": "b"}\n', "rows.jsonl:1: the prompt is empty"),
    ('{"prompt": [{"role": "assistant", "content": "a"}], "privileged_context": "b"}\n', "ends with the user's"),
])
def test_errors_name_file_and_row(text, message, tmp_path):
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(InputError, match=message):
        load_rows(str(tmp_path / "rows.jsonl"), to_training_row)


def test_blank_lines_are_passed_over_but_counted(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n\n{"prompt": "b"}\n\n')
    assert [(row["prompt"], row["where"]) for row in load_rows(str(tmp_path / "rows.jsonl"))] == [("a", "rows.jsonl:1"), ("b", "rows.jsonl:3")]


@pytest.mark.parametrize("line, message", [("{}", "rows.jsonl:3: no 'prompt'"), ("null", "rows.jsonl:3: expected a JSON object"), ("[]", "rows.jsonl:3: expected")])
def test_an_empty_row_is_no_blank_line(line, message, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n\n' + line + "\n")
    with pytest.raises(InputError, match=message):
        load_rows(str(tmp_path / "rows.jsonl"), to_row)


def test_a_missing_source_says_what_would_work(tmp_path):
    with pytest.raises(InputError, match="no --data given"):
        load_rows("")
    with pytest.raises(InputError, match="no such file"):
        load_rows(str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(InputError, match="neither a file nor a folder"):
        load_rows("no/such-set:en@train")
    with pytest.raises(InputError, match="toy:0/nothing"):
        load_rows("toy:0/nothing.jsonl")


def test_columns_of_the_papers_data_sets():
    tool = {"prompt": "Your task", "golden_answer": [{"Action": "a", "Action_Input": "{}"}], "golden_response": ["Thought: x", "Action: a"], "name": "n"}
    row = to_training_row(tool)
    assert row["privileged_context"] == "Thought: x\nAction: a" and row["answer"] == tool["golden_answer"] and row["prompt"][0]["content"] == "Your task"
    science = {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}], "output_text": "demo"}
    row = to_training_row(science)
    assert row["prompt"] == science["messages"] and row["privileged_context"] == "demo"
    row = to_training_row({"Question": "q", "Complex_CoT": "think", "Response": "r"})
    assert row["privileged_context"] == "think\n\nr"
    raw = {"question": "Q?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B", "domain": "Physics",
           "details": {"level": "L3"}, "type": "mcq-2-choices"}
    system, user = to_row(raw)["prompt"]
    assert user["content"] == "Q?\n\nA: x\nB: y" and system["content"].startswith("\nGiven a question") and system["content"].endswith("</answer>\n")
    assert sciknoweval_row(raw, "\nPlease reason step by step.")["prompt"][1]["content"].endswith("B: y\nPlease reason step by step.")
    assert to_row(raw)["answer"] == "B"


def test_templates_keep_braces_and_percent_signs():
    """Trap 47: values that look like places stay what they are."""
    assert fill("{prompt} {x} %s {demonstration}", prompt="{demonstration} %d", demonstration="{prompt}") == "{demonstration} %d {x} %s {prompt}"


def test_prompts_over_a_limit_are_an_error_or_a_drop():
    assert fit([1] * 4, 4, "--max-prompt-tokens", "f:1", drop=False) and not fit([1] * 5, 4, "--max-prompt-tokens", "f:1", drop=True)
    with pytest.raises(InputError, match="f:1: 5 tokens, over --max-prompt-tokens 4"):
        fit([1] * 5, 4, "--max-prompt-tokens", "f:1", drop=False)


def test_chat_ids_go_up_to_the_generation_prompt():
    tokenizer = toy.make_tokenizer()
    ids = chat_ids(tokenizer, as_messages("zig:4721"), {})
    assert ids == tokenizer("<|user|>zig:4721<|end|><|assistant|>", add_special_tokens=False)["input_ids"]
    tokenizer.chat_template = tokenizer.chat_template + "{% if enable_thinking is defined and not enable_thinking %} no{% endif %}"
    assert chat_ids(tokenizer, as_messages("zig:4721"), {"enable_thinking": False}) == ids + tokenizer(" no")["input_ids"]


def test_batches_are_epochs_laid_end_to_end_and_shared_by_ranks():
    """Trap 46 too: a row stays whole through shuffling."""
    rows, run = [dict(row, id=i) for i, row in enumerate(ROWS)], lambda rank, world: type("R", (), dict(rank=rank, world=world))
    whole = [batch_rows(rows, step, 4, run(0, 1), seed=1) for step in range(1, 6)]             # 20 rows = 4 epochs of 5
    flat = [row["id"] for batch in whole for row in batch]
    assert all(sorted(flat[i:i + 5]) == [0, 1, 2, 3, 4] for i in range(0, 20, 5)) and len({tuple(flat[i:i + 5]) for i in range(0, 20, 5)}) > 1
    assert all(row["answer"] == row["prompt"].removeprefix("zig:") for batch in whole for row in batch)
    for step, batch in enumerate(whole, 1):
        shares = [batch_rows(rows, step, 4, run(rank, 2), seed=1) for rank in range(2)]
        assert sorted(row["id"] for share in shares for row in share) == sorted(row["id"] for row in batch) and len(shares[0]) == 2
    assert whole != [batch_rows(rows, step, 4, run(0, 1), seed=2) for step in range(1, 6)]


ANYTHING = ["", " ", "<answer>", "</answer><answer>", "{" * 5000, "Action Input: {", "Action Input: " + "{\"a\":" * 3000 + "}", "\0\ud7ff", "Action: a\nAction Input: [1]", "🙂" * 1000]


@pytest.mark.parametrize("name, row, right, wrong", [
    ("exact", {"answer": "42"}, [" 42\n"], ["4 2", "42."]),
    ("choice", {"answer": "B"}, ["<answer>\nB\n</answer>", "<answer>A</answer> no <answer>B", "B"], ["<answer>A</answer>", "<answer>b</answer>", "the answer is B"]),
    ("tool_use", {"answer": [{"Action": "get", "Action_Input": '{"id": 1}'}, {"Action": "put", "Action_Input": '{"x": "y"}'}]},
     ['Action: put\nAction Input: {"x": "y"}\nAction: get\nAction Input: {"id": 1}', 'Action: get Action: put Action Input: {"x": "y", "id": 1}'],
     ['Action: get\nAction Input: {"id": 1}', 'Action: get Action: put Action Input: {"x": "y", "id": 2}', 'Action: get Action: put Action: put Action Input: {"x": "y", "id": 1}']),
])
def test_verifiers(name, row, right, wrong):
    row = {**row, "where": "f:1"}
    verify = load_verifier(name)
    assert [verify(text, row)[0] for text in right] == [1.0] * len(right)
    assert [verify(text, row)[0] for text in wrong + ANYTHING] == [0.0] * len(wrong + ANYTHING)


def test_tool_use_takes_answers_as_json_text_and_explains():
    row = {"answer": json.dumps([{"Action": "get", "Action_Input": '{"id": 1}'}])}
    assert tool_use('Action: get\nAction Input: {"id": 1}', row) == (1.0, "")
    assert tool_use('Action: put\nAction Input: {"id": 2}', row) == (0.0, "Actions mismatch: predicted ['put'], expected ['get']; "
                                                                          "Action inputs mismatch: predicted {'id': 2}, expected {'id': 1}")


def test_long_prompts_stop_or_are_left_out_and_something_is_left():
    tokenizer, rows = toy.make_tokenizer(), [{"prompt": as_messages(text), "where": f"f:{i}"} for i, text in enumerate(("add:1+2", "add:" + "1" * 40))]
    args = SimpleNamespace(student_chat_kwargs={}, max_prompt_tokens=20, drop_long=True, data="f")
    assert tokenize(rows, tokenizer, args) == rows[:1] and rows[0]["prompt_ids"] == chat_ids(tokenizer, rows[0]["prompt"], {})
    with pytest.raises(InputError, match="f: --drop-long left no row; raise --max-prompt-tokens"):
        tokenize(rows[1:], tokenizer, args)
    args.drop_long = False
    with pytest.raises(InputError, match="f:1: .* over --max-prompt-tokens 20"):
        tokenize(rows, tokenizer, args)


def test_a_verifier_of_ones_own(tmp_path):
    (tmp_path / "mine.py").write_text("def half(completion, row):\n    return (0.5, 'nearly')\ndef broken(completion, row):\n    return 'yes'\n")
    assert load_verifier(f"{tmp_path}/mine.py:half")("", {}) == (0.5, "nearly")
    with pytest.raises(RuntimeError, match="gave 'yes' for f:3"):
        load_verifier(f"{tmp_path}/mine.py:broken")("", {"where": "f:3"})
    for name, message in [("exakt", "expected exact, choice, tool_use, math, code or path"), (f"{tmp_path}/mine.py:none", "defines no function none"), ("no.py:f", "there is no file no.py; expected exact")]:
        with pytest.raises(InputError, match=message):
            load_verifier(name)
