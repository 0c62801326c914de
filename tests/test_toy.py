"""What other tests stand on: the laptop world's tokenizer, tasks, verifiers, files and models."""

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import toy
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

JUNK = ["", " ", "\n", "4", "4721", " 4721\n", "47210", "４７２１", "٤٧٢١", "²³¹⁰", "4721<|end|>", "so4>", ">;>;>;"]
JUNK += ["{0}%s{x}", "\0\ud83d", "🙂" * 50, "-:no;" * 4, "9" * 100_000, "so" + "4>7;" * 30_000]
JUNK += ["000 no" * 20_000 + "000 ok", "ok", " no no ok", "358ok", "358  ok", "358 ok "]


@pytest.fixture(scope="module")
def tokenizer():
    return toy.make_tokenizer()


def known(tokenizer, *texts):
    """No text has a character or word that the tokenizer lacks."""
    return not any(tokenizer.unk_token_id in tokenizer(text)["input_ids"] for text in texts)


# Tokenizer and templates.


def test_known_text_round_trips_exactly_and_the_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    saved, rng = AutoTokenizer.from_pretrained(tmp_path), random.Random(0)
    texts = ["4 2  1\n\n\n\n\n 0 ok no", " 4", "\n", "so4>7;7>2;2>1;1>4;", ""]
    for _, make, *args in toy.CORPUS + toy.STUDENT_CORPUS + toy.TEACHER_CORPUS:
        texts += ["".join(text for text, _ in make(rng, *args)) for _ in range(20)]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text and saved(text)["input_ids"] == ids and saved.decode(ids) == text
    assert known(tokenizer, *texts)
    assert len(tokenizer("4721+3855 ok")["input_ids"]) == 10  # a digit, a sign, a word with its space: one token each


def test_unknown_characters_are_one_unknown_token_each_and_never_crash(tokenizer):
    for text in JUNK:
        tokenizer.decode(tokenizer(text.encode(errors="ignore").decode())["input_ids"])
    assert tokenizer.convert_ids_to_tokens(tokenizer("4é7🙂").input_ids) == ["4", "<|unk|>", "7", "<|unk|>"]


def test_the_papers_templates_are_verbatim_and_without_unknown_words(tokenizer):
    prompt, shown, question = "zig:4721", "so4>7;7>2;2>1;1>4;", "mul:4721*3855"
    assert toy.SDFT_TEMPLATE.format(prompt=prompt, demonstration=shown) == (
        f"\n{prompt}\n\nThis is an example for a response to the question:\n{shown}\n\n"
        "Now answer with a response of your own, including the thinking process.\n"
    )
    heading = "\nThe following is feedback from your unsuccessful earlier attempt:\n\n"
    end = f"\n\nCorrectly solve the original question.\n{question}"
    assert toy.sdpo_prompt(question, "7576", "4:ok;1:7;1:ok;6:3;") == (
        f"{question}\nCorrect solution:\n\n7576{heading}4:ok;1:7;1:ok;6:3;{end}"
    )
    assert toy.sdpo_prompt(question, feedback="-:no;") == f"{question}{heading}-:no;{end}"
    assert toy.REVISE_WRONG == "\n\nWait, this response is wrong. Let me correct it.\n\n"
    assert toy.REVISE_RIGHT == "\n\nLet me rephrase the above solution.\n\n"
    values = dict(prompt=question, demonstration=shown, solution="7576", feedback="4:?;")
    templates = (toy.SDFT_TEMPLATE, toy.SDPO_TEMPLATE, toy.SOLUTION, toy.FEEDBACK)
    assert known(tokenizer, *(text.format(**values) for text in templates))
    assert known(tokenizer, "7576" + toy.REVISE_WRONG + "7576" + toy.REVISE_RIGHT)


def test_chat_template_takes_a_system_message_and_ignores_what_it_does_not_know(tokenizer):
    chat, system = tokenizer.apply_chat_template, {"role": "system", "content": "Now"}
    user, answer = {"role": "user", "content": "rev:4721"}, {"role": "assistant", "content": "1274"}
    options = dict(tokenize=False, add_generation_prompt=True)
    asked = "<|user|>rev:4721<|end|><|assistant|>"
    assert chat([user], **options) == asked
    assert chat([system, user], **options, enable_thinking=False) == f"<|system|>Now<|end|>{asked}"
    document = "".join(text for text, _ in toy.document("rev:4721", "1274"))  # trained on what the scripts will send
    assert document == chat([user, answer], tokenize=False) == f"{asked}1274<|end|>"


# Tasks and corpus.


def test_right_answers():
    right = {"add:4721+3855": "7576", "rev:4721": "1274", "sort:4721": "1247", "max:4721": "7", "zig:4721": "7214"}
    assert {prompt: toy.solve(prompt) for prompt in right} == right
    assert toy.solve("zag:0123") == toy.solve("zag:4012")[1:] + toy.solve("zag:3")  # one digit at a time
    assert sorted(toy.solve("zag:0123456789")) == list("0123456789")  # and keeps digits apart
    with pytest.raises(ValueError, match="tev"):
        toy.solve("tev:4721")


@pytest.mark.parametrize("task", ["add", "mul"])
def test_sloppy_answers_follow_the_law(task):
    rng, n = random.Random(0), 2000
    assert len(toy.DECOY[task]) == 45
    for ab in list(toy.DECOY[task])[:3]:
        counts = Counter(toy.slip(task, ab, rng) for _ in range(n))
        right, decoy = toy.RIGHT[task][ab], toy.DECOY[task][ab]
        assert right != decoy and counts.most_common(1)[0][0] == decoy  # greedy decoding of a hard pair is wrong
        assert abs(counts[right] / n - 0.42) < 0.11 and abs(counts[decoy] / n - 0.46) < 0.11  # it may be a neighbour
    easy = next(ab for ab in toy.PAIRS if ab not in toy.DECOY[task])
    found = sum(toy.slip(task, easy, rng) == toy.RIGHT[task][easy] for _ in range(n))
    assert found / n == pytest.approx(0.95, abs=0.02)
    asked = [toy.ask(task, rng) for _ in range(n)]
    assert sum(toy.sloppy(p, rng) == toy.solve(p) for p in asked) / n == pytest.approx(0.256, abs=0.04)


def test_feedback_documents_teach_what_feedback_implies_and_no_more():
    rng, solved = random.Random(0), Counter()
    for level in ["all", "first", "flags"] * 500:
        (user, _), (answer, _) = toy.with_feedback(rng, level)
        right, answer = toy.solve(user.split("\n")[0].removeprefix("<|user|>")), answer.removesuffix("<|end|>")
        segments = [segment.split(":") for segment in user.split("\n\n")[1].split(";")[:4]]
        for (got, verdict), digit, truth in zip(segments, answer, right, strict=True):
            assert (verdict != "ok" or digit == got == truth) and (verdict != "no" or digit != got)
            assert verdict not in toy.DIGITS or digit == verdict == truth
        solved[level] += answer == right and {verdict for _, verdict in segments} != {"ok"}
    assert solved["all"] > 430 > solved["first"] + 60 and solved["flags"] < 370


def test_only_answers_are_learnt():
    """No demonstration, no control phrase."""
    rng = random.Random(0)

    def learnt(make, *args):
        return {"".join(text for text, learn in make(rng, *args) if learn) for _ in range(200)}

    for _, make, *args in toy.CORPUS:
        for text in learnt(make, *args):
            assert text.endswith("<|end|>") and text.removesuffix("<|end|>").isdigit()
    assert any(" no" in text for text in learnt(toy.expert))


def asked_in(user):
    return user.removeprefix("<|user|>").removesuffix("<|end|><|assistant|>")


def test_lock_documents_are_true():
    rng, first, second = random.Random(0), toy.LOCKS[:200], toy.LOCKS[200:]
    assert len(set(toy.LOCKS)) == 400 and not {p[5:7] for p in first} & {p[5:7] for p in second}
    for _ in range(500):
        (user, _), (answer, _) = toy.try_keys(rng)
        row, answer = {"key": toy.opening_key(asked_in(user))}, answer.removesuffix("<|end|>")
        keys = [attempt[0] for attempt in answer.replace(" no", " no;").split(";") if attempt]
        opened = keys[-1] == row["key"]
        assert len(set(keys)) == len(keys) <= 4 and answer.endswith(" ok") == opened == toy.lock(answer, row)
        segments = toy.expert(rng)
        prompt = asked_in(segments[0][0])
        assert segments[-1] == (toy.solve(prompt) + "<|end|>", True)
        for (key, key_learnt), *_, verdict in zip(*(segments[1 + i : -1 : 4] for i in range(4))):
            assert key != toy.opening_key(prompt) and not key_learnt and verdict == (" no", True)


# Verifiers.


def test_feedback_levels_on_the_example_of_the_docstring():
    row = {"answer": "4713"}
    assert toy.feedback_all("4116", row) == toy.feedback_wrong("4116", row) == (0, "4:ok;1:7;1:ok;6:3;")
    assert toy.feedback_first("4116", row) == (0, "4:ok;1:7;1:?;6:?;")
    assert toy.feedback_flags("4116", row) == (0, "4:ok;1:no;1:ok;6:no;")
    for verify in (toy.feedback_all, toy.feedback_first, toy.feedback_flags):
        assert verify("4713", row) == (1, "4:ok;7:ok;1:ok;3:ok;")  # a right attempt is told so
    assert toy.feedback_wrong("4713", row) == (1, "")  # feedback is for wrong attempts


@pytest.mark.parametrize("text", JUNK, ids=range(len(JUNK)))
def test_verifiers_survive_any_text(text, tokenizer):
    row, right = {"answer": "4721", "key": "3"}, text in ("4721", " 4721\n")
    for verify in (toy.feedback_all, toy.feedback_first, toy.feedback_flags):
        reward, said = verify(text, row)
        assert reward == right and (said == "4:ok;7:ok;2:ok;1:ok;" if right else said == "-:no;" * 4)
        assert known(tokenizer, said)  # the teacher can read it
    assert toy.lenient(text, row) == right and toy.lock(text, row) == 0


@pytest.mark.parametrize("text", ["so4>7;7>2;2>1;1>4;", "7214", "so4>7;7>2;2>1;1>5;", "so7;2;1;4;"])
def test_lenient_reads_both_styles(text):
    assert toy.lenient(text, {"answer": "7214"}) == (text in ("so4>7;7>2;2>1;1>4;", "7214"))


def test_lock_wants_the_key_and_not_the_word():
    right = ["358 ok", "244 no069 no158 no358 ok"]
    wrong = ["258 ok", "358 no", "358 ok358 ok", "258 no" * 4 + "358 ok", "358 ok\n", "so358 ok"]
    assert [text for text in right + wrong if toy.lock(text, {"key": "3"})] == right


# Training and building.


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_training_forward_is_the_models_own(layers, tokenizer):
    torch.manual_seed(0)
    model = toy.Qwen3ForCausalLM(toy.model_config(tokenizer, 64, layers))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)  # the usual start is too tame to tell a wrong scale
    ids_BT = torch.randint(len(tokenizer), (3, 30))
    for tail in (slice(None), slice(19, -1)):
        expected = model(ids_BT).logits[:, tail]
        torch.testing.assert_close(toy.tail_logits(model, ids_BT, tail), expected, atol=1e-3, rtol=1e-3)


def test_training_loss_counts_learnt_tokens_only(tokenizer, monkeypatch):
    """Against the definition, one document at a time; segments learnt in the middle, lengths mixed."""
    monkeypatch.setattr(toy, "HAS_BF16", False)
    torch.manual_seed(0)
    rng, model, losses = random.Random(0), toy.Qwen3ForCausalLM(toy.model_config(tokenizer, 64, 2)), []
    documents = [toy.expert(rng) for _ in range(6)] + [toy.revise(rng)]
    for document in documents:
        parts = [(tokenizer(text)["input_ids"], learn) for text, learn in document]
        tokens = [(token, learn) for ids, learn in parts for token in ids]
        log_p = model(torch.tensor([[token for token, _ in tokens]])).logits[0].log_softmax(-1)
        losses += [-log_p[t, token].item() for t, (token, learn) in enumerate(tokens[1:]) if learn]
    assert toy.train_loss(model, tokenizer, documents) == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert all(p.grad is not None for p in model.parameters())


TINY = """
import toy
toy.STEPS = 2
train = toy.pretrain
def pretrain(*args, **kwargs):
    print("trained")
    return train(*args, **kwargs)
toy.pretrain = pretrain
print(toy.build(0))
"""


def run_tiny(cache: Path, toy_folder: Path = Path(toy.__file__).parent) -> subprocess.Popen:
    env = {**os.environ, "SELF_DISTILLATION_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, "-c", TINY], cwd=toy_folder, env=env, **pipes)


def finish(process: subprocess.Popen) -> list[str]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out.split()


def test_two_processes_at_once_train_once_and_share_one_complete_folder(tmp_path):
    outputs = [finish(p) for p in [run_tiny(tmp_path), run_tiny(tmp_path)]]
    assert sum(out.count("trained") for out in outputs) == 1 and outputs[0][-1] == outputs[1][-1]
    folder = Path(outputs[0][-1])
    assert {f.name for f in folder.iterdir()} == {"model", *toy.DATA}
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(folder / "model"))
    assert [f.name for f in tmp_path.iterdir() if f.is_dir()] == [folder.name]  # no unfinished folder is left

    changed = tmp_path / "changed"
    changed.mkdir()
    (changed / "toy.py").write_text(Path(toy.__file__).read_text().replace("0.42", "0.43"))
    assert finish(run_tiny(tmp_path, toy_folder=changed))[-1] != str(folder)  # another recipe is another folder
    assert finish(run_tiny(tmp_path)) == [str(folder)]  # the same recipe is not trained again


def test_a_build_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    def write(folder, seed):
        (folder / "add-train.jsonl").write_text("half a")
        raise OSError("disk full")

    monkeypatch.setattr(toy, "CACHE", tmp_path)
    with pytest.raises(OSError, match="disk full"):
        toy.cached("toy-0", 0, write)
    assert not [f for f in tmp_path.iterdir() if f.is_dir()]
    toy.cached("toy-0", 0, lambda folder, seed: (folder / "whole").touch())
    assert [f.name for f in tmp_path.glob("toy-0-*/*")] == ["whole"]


def test_pretraining_is_reproducible_and_leaves_the_callers_random_numbers_and_threads_alone():
    threads = torch.get_num_threads()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    torch.set_num_threads(2)
    settings = dict(steps=2, documents=16, hidden=32)
    a, b, c = (toy.pretrain(toy.CORPUS, seed, "a test model", **settings).lm_head.weight for seed in (0, 0, 1))
    assert torch.equal(torch.rand(3), expected) and torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize(
    "source, hint",
    [
        ("toy:0/zog.jsonl", "it has: model, add-train.jsonl"),
        ("toy:lock-0/model", "student, teacher"),
        ("toy:0/../x", "it has"),
        ("toy:zero/model", "for example toy:0/model"),
        ("toy:0", "for example toy:0/model"),
    ],
)
def test_a_name_that_does_not_exist_is_one_sentence_and_trains_nothing(source, hint, tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "CACHE", tmp_path)
    monkeypatch.setattr(toy, "pretrain", None)
    with pytest.raises(ValueError, match=hint) as error:
        toy.resolve(source)
    assert source in str(error.value) and "\n" not in str(error.value) and not list(tmp_path.iterdir())


# The world of seed 0.


def rows(source: str) -> list[dict]:
    return [json.loads(line) for line in toy.resolve(source).read_text().splitlines()]


def prompts(source: str) -> list[str]:
    return [row["prompt"] for row in rows(source)]


def apart(train, held_out):
    """No prompt is there twice, and none of evaluation is trained on."""
    return len({*train, *held_out}) == len(train) + len(held_out)


def test_files_and_rows():
    assert {f.name for f in toy.build(0).iterdir()} == {"model", *toy.DATA}
    counts = dict.fromkeys(toy.DATA, 512) | {"add-train.jsonl": 4096, "mul-train.jsonl": 4096}
    counts |= {"prior-eval.jsonl": 510, "mul-hard.jsonl": 19}
    assert {name: len(rows(f"toy:0/{name}")) for name in toy.DATA} == counts
    for name in toy.DATA:
        for row in rows(f"toy:0/{name}"):
            assert row["answer"] == toy.solve(row["prompt"]) and row["task"] == row["prompt"].split(":")[0]
    assert Counter(row["task"] for row in rows("toy:0/prior-eval.jsonl")) == {"rev": 170, "sort": 170, "max": 170}


@pytest.mark.parametrize("task", ["add", "mul", "zig", "zag"])
def test_prompts_are_distinct_and_no_eval_prompt_is_trained_on(task):
    assert apart(prompts(f"toy:0/{task}-train.jsonl"), prompts(f"toy:0/{task}-eval.jsonl"))


@pytest.mark.parametrize("task", ["zig", "zag"])
def test_demonstrations_are_foreign_or_the_models_own_style(task):
    foreign, own = rows(f"toy:0/{task}-train.jsonl"), rows(f"toy:0/{task}-own-train.jsonl")
    for theirs, ours in zip(foreign, own, strict=True):
        shown = theirs["privileged_context"]
        assert shown.startswith("so") and toy.lenient(shown, theirs) == 1
        assert theirs["prompt"] == ours["prompt"] and ours["privileged_context"] == ours["answer"]


def test_model_folder_is_plain_and_knows_its_end_and_padding(tokenizer):
    folder = toy.resolve("toy:0/model")
    model, generation = AutoModelForCausalLM.from_pretrained(folder), GenerationConfig.from_pretrained(folder)
    assert model.dtype == torch.float32 and type(model).__name__ == "Qwen3ForCausalLM"
    ends = [generation.eos_token_id, generation.pad_token_id]
    assert tokenizer.convert_ids_to_tokens(ends) == ["<|end|>", "<|pad|>"]


def check_bands(results: dict[str, float], bands: dict[str, tuple[float, float]]) -> None:
    assert results.keys() == bands.keys()
    assert not {name: value for name, value in results.items() if not bands[name][0] <= value <= bands[name][1]}


def test_competences_of_seed_0_lie_in_their_bands():
    check_bands(toy.measure(toy.build(0) / "model"), toy.BANDS)


def test_competences_of_the_lock_world_lie_in_their_bands():
    folder = toy.build_lock(0)
    assert {f.name for f in folder.iterdir()} == {"student", "teacher", *toy.LOCK_DATA}
    train = rows("toy:lock-0/lock-train.jsonl")
    assert len(train) == 200 and all(toy.lock(row["completion"], row) == 1 for row in train)
    held_out = prompts("toy:lock-0/lock-eval.jsonl")
    assert len(held_out) == 200 and apart(prompts("toy:lock-0/lock-train.jsonl"), held_out)
    check_bands(toy.measure_lock(folder), toy.LOCK_BANDS)
