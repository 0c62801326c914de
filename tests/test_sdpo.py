"""SDPO: who is shown whose success, which attempts carry loss, and how GRPO and the teacher enter it."""

import base64
import contextlib
import json
import math
import os
import pickle
import zlib
from types import SimpleNamespace

import pytest
import torch
import toy
from conftest import make_model, metrics_of, run_here
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

import common
import sdpo
from common import (
    InputError,
    Rollout,
    Run,
    Teacher,
    completion_states,
    head_of,
    load_model,
    parse_args,
)
from sdpo import (
    PRESETS,
    Args,
    Mark,
    Sample,
    hindsight,
    livecodebench_row,
    private_tests,
    sdpo_loss,
    teacher_ids,
    to_row,
)

GROUP = [Mark("a", 0.0, "", "fa"), Mark("b", 1.0, "b", ""), Mark("c", 0.0, "", ""), Mark("d", 1.0, "d", "fd")]
SYSTEM = {"role": "system", "content": "S"}
END = "\n\nCorrectly solve the original question."
FEEDBACK = "\nThe following is feedback from your unsuccessful earlier attempt:\n\n"


# ---- What the teacher reads


def chat(solution, feedback, **flags):
    tokenizer, row = toy.make_tokenizer(), to_row({"prompt": "mul:12"})
    args = Args(**{"chat_kwargs": {}, **flags})
    ids = teacher_ids(row, solution, feedback, tokenizer, args)
    return None if ids is None else tokenizer.decode(ids)


def test_templates_are_the_papers():
    """The yaml's: no blank line before "Correct solution:", nothing after the last sentence."""

    def wrap(text):
        return f"<|user|>mul:12{text}{END}<|end|><|assistant|>"

    assert chat("34", "") == wrap("\nCorrect solution:\n\n34")
    assert chat("", "4:no;") == wrap(f"{FEEDBACK}4:no;")
    assert chat("34", "4:no;") == wrap(f"\nCorrect solution:\n\n34{FEEDBACK}4:no;")
    assert chat("", "") is None


TURNS = (
    '[{"role": "user", "content": "{prompt}"}, {"role": "assistant", "content": "{solution}"},'
    ' {"role": "user", "content": "no:{feedback}"}, {"role": "user", "content": "{prompt}"}]'
)


@pytest.mark.parametrize(
    "solution, feedback, middle",
    [
        ("34", "", "<|assistant|>34<|end|>"),
        ("", "4;", "<|user|>no:4;<|end|>"),
        ("34", "4;", "<|assistant|>34<|end|><|user|>no:4;<|end|>"),
        ("{prompt}", "", "<|assistant|>{prompt}<|end|>"),
    ],
)
def test_turns_hold_the_bare_texts_and_an_empty_one_is_dropped(solution, feedback, middle):
    """A template of chat messages, token by token."""
    tokenizer, row = toy.make_tokenizer(), to_row({"prompt": [SYSTEM, {"role": "user", "content": "mul:12"}]})
    words = f"<|system|>S<|end|><|user|>mul:12<|end|>{middle}<|user|>mul:12<|end|><|assistant|>"
    ids = teacher_ids(row, solution, feedback, tokenizer, Args(chat_kwargs={}, template=TURNS))
    assert ids == tokenizer(words)["input_ids"]
    sdpo.check(Args(template=TURNS), 1000)


@pytest.mark.parametrize("template, length", [(TURNS, 30), (sdpo.TURNS, 29)])
def test_a_long_solution_in_turns_loses_its_own_end(template, length):
    """No more than has to go: where it stands twice, half as much of each copy."""
    told = chat("0123456789" * 5, "", max_teacher_tokens=30, template=template)
    assert told.startswith("<|user|>mul:12<|end|><|assistant|>012")
    assert told.endswith("<|end|><|user|>mul:12<|end|><|assistant|>")
    assert len(toy.make_tokenizer()(told)["input_ids"]) == length
    assert chat("", "", template=template) is None


def test_an_attempt_is_never_its_own_solution():
    """Trap 43: the first other success; a lone success learns from nobody. Trap 20: without its thinking."""
    args = Args(hindsight="solution")
    assert [hindsight(GROUP, i, args)[0] for i in range(4)] == ["b", "d", "b", "b"]
    assert [hindsight(GROUP[:3], i, args)[0] for i in range(3)] == ["b", "", "b"]


@pytest.mark.parametrize(
    "how, want",
    [
        ("solution_or_feedback", [("b", ""), ("d", ""), ("b", ""), ("b", "")]),
        ("solution", [("b", ""), ("d", ""), ("b", ""), ("b", "")]),
        ("feedback", [("", "fa"), ("", ""), ("", ""), ("", "fd")]),
        ("both", [("b", "fa"), ("d", ""), ("b", ""), ("b", "fd")]),
    ],
)
def test_what_hindsight_shows(how, want):
    assert [hindsight(GROUP, i, Args(hindsight=how)) for i in range(4)] == want


def test_feedback_alone_stands_in_where_no_other_attempt_succeeded():
    lone = [Mark("a", 0.0, "", "fa"), Mark("d", 1.0, "d", "")]
    assert hindsight(lone, 0, Args()) == ("d", "")
    assert hindsight(lone, 1, Args()) == ("", "")
    assert hindsight([lone[0], lone[0]], 0, Args()) == ("", "fa")
    assert hindsight([lone[0], lone[0]], 0, Args(hindsight="solution")) == ("", "")


class Judged(SimpleNamespace):
    """As much of a run as `grade_groups` needs; answers are texts."""

    timer = contextlib.nullcontext

    def grade(self, rows, texts):
        return self.verdicts

    def text(self, y):
        return y

    def gather(self, values):
        return values

    def has_special_token(self, text):
        return "<|end|>" in text


def marks_of(*verdicts, success=0.5):
    """The group of these (text, reward, feedback)."""
    texts = [text for text, *_ in verdicts]
    run = Judged(args=Args(rollouts=len(verdicts), success=success), verdicts=[told for _, *told in verdicts])
    [group] = sdpo.grade_groups(run, range(len(texts)), [{}] * len(texts), texts)
    return group


def test_what_an_attempt_shows():
    """Trap 20: no thinking. A success that is all thinking shows nothing: the next one is shown."""
    group = marks_of(("a", 0.0, "fa"), ("<think>only this", 1.0, ""), ("<think>x</think>\nc", 1.0, ""))
    assert [mark.solution for mark in group] == ["", "", "c"]
    assert hindsight(group, 0, Args()) == ("c", "") and hindsight(group[:2], 0, Args()) == ("", "fa")


@pytest.mark.parametrize("rewards, steps", [("0.1", 0), ("0.1 if len(completion) % 2 else 0.2", 1)])
def test_equal_rewards_take_no_step_however_their_mean_is_rounded(rewards, steps, tiny, tmp_path, monkeypatch):
    """Eight times 0.1 over 8 is not 0.1 in floating point."""
    (tmp_path / "v.py").write_text(f"def v(completion, row):\n    return {rewards}\n")
    taken = []
    monkeypatch.setattr(sdpo, "optimizer_step", lambda run, lr: taken.append(lr) or 0.0)
    more = f"--verifier {tmp_path}/v.py:v --policy-weight 1 --rollouts 8 --prompts-per-step 1 --steps 1"
    row = run_here("sdpo", tmp_path / "r", tiny, more)[1]
    assert len(taken) == steps and (row["distill/active_frac"] > 0) == bool(steps)
    assert row["teacher/dropped_prompts"] == 0


def test_what_spells_a_special_token_is_shown_to_nobody():
    """Neither an answer nor feedback; the other of the two is, and the attempt keeps its reward."""
    group = marks_of(("a", 0.0, "fa<|end|>"), ("b<|end|>", 1.0, "fb"), ("c", 1.0, "fc"))
    assert [mark.hidden for mark in group] == [True, True, False] and group[1].reward == 1.0
    both = [hindsight(group, i, Args(hindsight="both")) for i in range(3)]
    assert both == [("c", ""), ("c", "fb"), ("", "fc")]


@pytest.mark.parametrize(
    "text, feedback, spells, active",
    [
        ("4", "no", 0, 1),
        ("4<|end|>", "no", 1, 1),
        ("4", "wrong<|pad|>", 1, 1),
        ("4<|end|>", "<|pad|>", 1, 0),
        ("<|other|>", "< |end|>", 0, 1),
    ],
)
def test_attempts_that_spell_a_special_token_are_counted(text, feedback, spells, active, tiny, tmp_path, monkeypatch):
    """A model can write the characters of <|end|> as ordinary tokens; read again they would end the turn."""
    (tmp_path / "judge.py").write_text(f"def judge(completion, row):\n    return 1.0, {feedback!r}\n")
    monkeypatch.setattr("common.Run.text", lambda run, y: text)
    more = f"--verifier {tmp_path}/judge.py:judge --steps 1 --prompts-per-step 2"
    row = run_here("sdpo", tmp_path / "run", tiny, more)[1]
    assert row["rollout/special_tokens"] == 6 * spells
    assert row["distill/active_frac"] == active


@pytest.mark.parametrize("reward, least, solved", [(0.5, 0.5, 1), (0.49, 0.5, 0), (0.6, 1.0, 0), (1.0, 1.0, 1)])
def test_success_threshold(reward, least, solved):
    """Trap 45: at least .5 (authors' code), or --success 1 (paper)."""
    group = marks_of(("a", 0.0, ""), ("b", reward, ""), success=least)
    assert (hindsight(group, 0, Args())[0] == "b") == solved


@pytest.mark.parametrize("least, solved", [(0.6, 1), (0.7, 0)])
def test_success_threshold_of_pass_at_n_and_of_a_search(least, solved, tiny, tmp_path):
    (tmp_path / "v.py").write_text("def v(completion, row):\n    return 0.6\n")
    flags = f"--verifier {tmp_path}/v.py:v --success {least} --eval-samples 2 --eval-temperature 1"
    row = run_here("sdpo", tmp_path / "r", tiny, f"{flags} --steps 1")[-1]
    assert row["eval/pass@2"] == solved
    assert (row["distill/active_frac"] > 0) == solved
    flags += " --question 3 --prompts-per-step 1 --steps 1 --search best_of_k"
    assert run_here("sdpo", tmp_path / "q", tiny, flags)[-1]["search/solved"] == solved


def test_a_long_solution_loses_its_own_end():
    """Trap 17: question, sentence and generation prompt stay; what cannot fit at all is no hindsight."""
    short = chat("0123456789" * 5, "", max_teacher_tokens=30)
    assert short.startswith("<|user|>mul:12\nCorrect solution:\n\n012")
    assert short.endswith(f"{END}<|end|><|assistant|>")
    assert len(toy.make_tokenizer()(short)["input_ids"]) == 30
    assert chat("1" * 50, "", max_teacher_tokens=10) is None
    alone = chat("", "4:no;")
    fits = len(toy.make_tokenizer()(alone)["input_ids"])
    assert chat("1" * 50, "4:no;", max_teacher_tokens=fits) == alone


def test_a_solution_is_not_cut_within_a_character():
    """A quarter of an emoji would decode to a sign of three tokens, longer than what was cut."""
    letters = sorted(ByteLevel.alphabet())
    words = {"<|end|>": 0} | {letter: i + 1 for i, letter in enumerate(letters)}
    core = Tokenizer(BPE(vocab=words, merges=[]))
    core.pre_tokenizer, core.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template, eos_token="<|end|>")
    whole = teacher_ids({"prompt": [{"role": "user", "content": "q"}]}, "😀😀", "", tokenizer, Args(chat_kwargs={}))
    for limit in range(len(whole) - 7, len(whole)):
        args = Args(chat_kwargs={}, max_teacher_tokens=limit)
        ids = teacher_ids({"prompt": [{"role": "user", "content": "q"}]}, "😀😀", "", tokenizer, args)
        assert (ids is None) == (limit < len(whole) - 4) and (ids is None or tokenizer.decode(ids).count("😀") == 1)
    assert chat("", "4:no;" * 20, max_teacher_tokens=30) is None


def grade_one(returned, row, tmp_path):
    """The marks of one wrong attempt by a verifier that returns this."""
    (tmp_path / "mine.py").write_text(f"def grade(completion, row):\n    return {returned}\n")
    run = Run(Args(out="/nowhere", rollouts=1), toy.make_tokenizer())
    run.verify = common.load_verifier(f"{tmp_path}/mine.py:grade")
    [[mark]] = sdpo.grade_groups(run, [0], [row], [Rollout([5], [-1.0], True)])
    return mark


def test_none_as_feedback_is_no_feedback(tmp_path):
    """The teacher never reads the word "None"; None as a reward is an error."""
    mark = grade_one("0.0, None", {}, tmp_path)
    assert (mark.reward, mark.feedback) == (0.0, "")
    assert hindsight([mark, mark], 0, Args()) == ("", "")


def test_none_as_reward_is_an_error(tmp_path):
    with pytest.raises(common.RunError, match="returned .None, 'f'."):
        grade_one("None, 'f'", {}, tmp_path)


@pytest.mark.parametrize("returned, want", [("0.0, None", "own"), ("0.0, 'said'", "said"), ("1.0, None", "")])
def test_a_rows_own_feedback_is_for_failures_without_another(returned, want, tmp_path):
    assert grade_one(returned, {"feedback": "own"}, tmp_path).feedback == want


# ---- Rows

RAW = {
    "question": "Q",
    "choices": {"text": ["x", "y"], "label": ["A", "B"]},
    "answerKey": "A",
    "details": {"level": "L3"},
    "type": "mcq-2-choices",
}


def test_rows_of_the_papers_data_sets():
    assert to_row(RAW)["prompt"][1]["content"] == "Q\n\nA: x\nB: y\nPlease reason step by step."
    theirs = {"prompt": "p", "system": "s", "answer": "A", "kind": "mcq", "idx": 4, "tests": "-"}
    assert [m["role"] for m in to_row(theirs)["prompt"]] == ["system", "user"]
    user = [{"role": "user", "content": "p"}]
    assert to_row({"prompt": "p", "system": "", "answer": "[]"})["prompt"] == user
    assert to_row({"prompt": "p", "answer": "[]", "kind": "tooluse"})["prompt"] == user


def test_raw_sciknoweval_is_filtered_then_split_as_the_authors_did(tmp_path):
    """Level L3, two or four options; a tenth tests, by the library's own split, seed 42."""
    import datasets

    raws = []
    for i in range(60):
        kind = "true_or_false" if i % 7 == 0 else "mcq-2-choices"
        level = {"level": "L3" if i % 5 else "L1"}
        raws.append({**RAW, "question": f"{i}", "details": level, "type": kind})
    (tmp_path / "raw.jsonl").write_text("".join(json.dumps(raw) + "\n" for raw in raws))
    kept = [i for i in range(60) if i % 5 and i % 7]
    want = datasets.Dataset.from_dict({"i": kept}).train_test_split(test_size=0.1, seed=42)
    for part in ("train", "test"):
        rows = common.load_rows(f"{tmp_path}/raw.jsonl#{part}", to_row)
        assert [row["id"] - 1 for row in rows] == want[part]["i"]
        assert rows[0]["where"] == f"raw.jsonl:{rows[0]['id']}"
    (tmp_path / "none.jsonl").write_text(json.dumps(raws[0]) + "\n")
    with pytest.raises(InputError, match="no rows in it"):
        common.load_rows(f"{tmp_path}/none.jsonl", to_row)


ADD = {"inputs": ["[1, 2]\n3", "[]\n0"], "outputs": ["6", "0"], "testtype": "functional", "fn_name": "add"}


def packed(value):
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


def case(given, output):
    return {"input": given, "output": output, "testtype": "functional"}


CODE_RAW = {
    "question_content": "Add {them} up.",
    "starter_code": "class Solution:\n    def add(self, numbers: List[int], more: int) -> int:\n        ",
    "public_test_cases": json.dumps([case("[1, 2]\n3", "6")]),
    "private_test_cases": packed(json.dumps([case("[]\n0", "0")])),
    "metadata": '{"func_name": "add"}',
    "contest_date": "2025-04-30",
}


def test_rows_have_the_authors_prompt_and_all_tests():
    row = livecodebench_row(CODE_RAW)
    assert row["contest_date"] == "2025-04-30"
    assert row["tests"] == {**ADD, "time_limit": 6}
    assert row["prompt"][0]["content"] == (
        "You are a coding expert. You will be given a coding problem, and you need to write a correct Python "
        "program that matches the specification and passes all tests. The time limit is 1 second. "
        "You may start by outlining your thought process. In the end, please provide the complete "
        "code in a code block enclosed with ``` ```.\n\nAdd {them} up.\n\nYour solution should have the "
        "following signature: ```python\ndef add(numbers: List[int], more: int) -> int:\n```"
    )
    stdin = livecodebench_row({**CODE_RAW, "starter_code": "", "private_test_cases": "[]", "metadata": "{}"})
    assert stdin["prompt"][0]["content"].endswith("Add {them} up.")
    assert stdin["tests"]["fn_name"] is None


@pytest.mark.parametrize(
    "date, kept", [("2025-01-31", 0), ("2025-02-01", 1), ("2025-04-30T9", 1), ("2025-05-01", 0)]
)
def test_contests_outside_the_window_are_left_out(date, kept):
    assert (livecodebench_row({**CODE_RAW, "contest_date": date}) is not None) == kept


@pytest.mark.parametrize("private, kept", [(0, 0), (1, 1), (2, 1), (9, 4)])
def test_training_sees_half_of_the_private_tests_and_evaluation_all(private, kept):
    raw = {**CODE_RAW, "private_test_cases": json.dumps([case(str(i), str(i)) for i in range(private)])}
    half = livecodebench_row(raw, half=True)["tests"]
    whole = livecodebench_row(raw)["tests"]
    assert len(half["inputs"]) == len(half["outputs"]) == kept + 1
    assert len(whole["inputs"]) == private + 1
    assert set(half["inputs"]) <= set(whole["inputs"])
    assert half == livecodebench_row(raw, half=True)["tests"]


class Evil:
    def __reduce__(self):
        return os.system, ("true",)


def test_a_pickle_that_calls_something_is_refused():
    """Nothing is executed: the pickle must hold one text and nothing else."""
    with pytest.raises(ValueError, match="too many values"):
        private_tests(packed(Evil()))
    with pytest.raises(ValueError, match="not enough values"):
        private_tests(packed([1, 2]))


def test_raw_livecodebench_through_to_row():
    """Section 2.7: evaluation and test time take all tests, training half of the private ones."""
    raw = {**CODE_RAW, "private_test_cases": json.dumps([case(str(i), str(i)) for i in range(10)])}
    assert len(to_row(raw)["tests"]["inputs"]) == 11
    assert len(to_row(raw, train=True)["tests"]["inputs"]) == 6
    assert to_row({**raw, "contest_date": "2025-05-01"}) is None


@pytest.mark.parametrize("more, tests", [("", 6), ("--question 1 --prompts-per-step 1", 11)])
def test_solved_at_test_time_means_all_tests(more, tests, tiny, tmp_path, monkeypatch):
    """Training on raw LiveCodeBench rows sees half of the private tests; --question is judged by all."""
    private = [case(str(i), str(i)) for i in range(10)]
    raw = {**CODE_RAW, "private_test_cases": json.dumps(private)}
    (tmp_path / "raw.jsonl").write_text(json.dumps(raw) + "\n")
    seen = []
    monkeypatch.setattr(sdpo, "start_run", lambda args, tokenizer, rows, *_, **more: seen.extend(rows) or 1 / 0)
    monkeypatch.setattr(sdpo, "tokenize", lambda rows, *_: rows)
    with pytest.raises(ZeroDivisionError):
        run_here("sdpo", tmp_path / "r", tiny, f"--data {tmp_path}/raw.jsonl {more}")
    assert len(seen[0]["tests"]["inputs"]) == tests


# ---- The loss


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Three attempts; the last has no hindsight."""
    run = Run(Args(out="/nowhere"))
    folder = tmp_path_factory.mktemp("world")
    student = load_model(str(make_model(folder / "m")), run)
    teacher = Teacher(str(make_model(folder / "t", seed=3)), 0.0, student, run)
    prompts = [[3, 20, 5, 4], [3, 21, 22, 5, 4], [3, 20, 5, 4]]
    contexts = [[3, 20, 40, 41, 5, 4], [3, 43, 5, 4], None]
    ys = [[30, 31, 32, 33, 5], [34, 35, 5], [36, 5]]
    samples = []
    for p, c, y, a in zip(prompts, contexts, ys, [0.75, -0.25, -0.5], strict=True):
        logps = [-3.0, -4.0, -5.0, -2.0, -6.0][: len(y)]
        samples.append(Sample(0, p, c, y, logps, [True] * len(y), a))
    world = SimpleNamespace(run=run, student=student, teacher=teacher, samples=samples)
    samples[2] = samples[2]._replace(logps=drawn(world, samples[2]).tolist())  # a ratio of 1: never clipped
    return world


def loss_of(world, samples=None, **flags):
    """The loss of these samples, divided as if they were a third of the world's attempts each."""
    samples = world.samples if samples is None else samples
    args = Args(**{"support": "full", "is_cap": 0.0, **flags})
    told = [(s.context, s.y) for s in samples if s.context]
    targets = world.teacher.targets(told) if args.policy_weight < 1 else []
    n = {"attempts": 3, "tokens": 10}
    h_ND = completion_states(world.student, [(s.prompt, s.y) for s in samples])
    return sdpo_loss(h_ND, head_of(world.student), targets, samples, n, args)[0]


def gradient_of(world, samples, **flags):
    world.student.zero_grad()
    loss_of(world, samples, **flags).backward()
    params = world.student.parameters()
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in params])


def logps(model, prompt, y):
    with torch.no_grad():
        return model(torch.tensor([prompt + y])).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)


def drawn(world, s):
    return logps(world.student, s.prompt, s.y).gather(1, torch.tensor(s.y)[:, None])[:, 0]


def per_token(world, f):
    """f(student, teacher) at each token of each attempt with hindsight."""
    values = []
    for s in world.samples[:2]:
        p = logps(world.student, s.prompt, s.y)
        q = logps(world.teacher.model, s.context, s.y)
        values.append([f(*pair) for pair in zip(p, q, strict=True)])
    return values


def jsd(p, q):
    m = ((p.exp() + q.exp()) / 2).log()
    return (((p.exp() * (p - m)).sum() + (q.exp() * (q - m)).sum()) / 2).item()


def mean_of_means(values, n=3):
    return sum(sum(each) / len(each) for each in values) / n


def test_default_loss_by_hand(world):
    """JSD 1/2, mean over tokens, then over all attempts: one without hindsight counts as zero."""
    assert loss_of(world).item() == pytest.approx(mean_of_means(per_token(world, jsd)), rel=1e-5)

    def top_and_tail(p, q):
        index = p.topk(5).indices

        def bucket(x):
            return torch.cat([x[index], (1 - x[index].exp().sum()).log()[None]])

        return jsd(bucket(p), bucket(q))

    want = mean_of_means(per_token(world, top_and_tail))
    assert loss_of(world, support="student_topk", topk=5).item() == pytest.approx(want, rel=1e-4)


def grpo_terms(world):
    """Eq. 13: the clip is .2 down and .28 up, and only where it lowers the objective."""
    terms = []
    for s in world.samples:
        ratio = (drawn(world, s) - torch.tensor(s.logps)).exp()
        gain = torch.minimum(ratio * s.advantage, ratio.clamp(0.8, 1.28) * s.advantage)
        terms.append((-gain).tolist())
    return terms


@pytest.mark.parametrize("average", ["sequence", "token"])
def test_average_governs_both_losses(world, average):
    """sequence: mean of token means over attempts. token: mean over the tokens of all attempts, told or not."""
    grpo, distilled = grpo_terms(world), per_token(world, jsd)
    if average == "sequence":
        want = mean_of_means(grpo), mean_of_means(distilled)
    else:
        want = sum(map(sum, grpo)) / 10, sum(map(sum, distilled)) / 10
    assert loss_of(world, average=average, policy_weight=1.0).item() == pytest.approx(want[0], rel=1e-5)
    assert loss_of(world, average=average).item() == pytest.approx(want[1], rel=1e-5)


@pytest.mark.parametrize("average", ["sequence", "token"])
def test_a_mixed_group_has_the_gradient_of_both_losses(world, average):
    """lambda = 1/2, an attempt without hindsight among them: half of SDPO alone and half of GRPO alone."""
    told = [s for s in world.samples if s.context]
    mixed = gradient_of(world, world.samples, policy_weight=0.5, average=average)
    distilled = gradient_of(world, told, policy_weight=0.0, average=average)
    grpo = gradient_of(world, world.samples, policy_weight=1.0, average=average)
    want = 0.5 * distilled + 0.5 * grpo
    assert min(distilled.norm(), grpo.norm()) > 1e-3
    assert (mixed - want).norm() < 1e-5 * want.norm()
    assert loss_of(world, policy_weight=0.9).item() == pytest.approx(
        0.9 * loss_of(world, policy_weight=1.0).item() + 0.1 * loss_of(world).item(), rel=1e-5
    )


def test_a_group_without_any_hindsight_still_has_the_policy_gradient(world):
    alone = world.samples[2:]
    mixed = gradient_of(world, alone, policy_weight=0.5)
    assert torch.allclose(mixed, 0.5 * gradient_of(world, alone, policy_weight=1.0), atol=1e-8)
    assert mixed.norm() > 1e-4


def test_a_masked_token_carries_neither_loss(world):
    """The mask is what --entropy-quantile and --mask-truncated change."""
    first = world.samples[0]
    none = first._replace(mask=[False] * 5)
    for weight in (0.0, 0.5, 1.0):
        assert gradient_of(world, [none], policy_weight=weight).norm() == 0
        assert gradient_of(world, [first], policy_weight=weight).norm() > 0


def test_advantages_are_clipped_by_flag(world):
    """Table 12: the log-ratio of student and teacher counts up to +-clip."""
    values = per_token(world, lambda p, q: (p.exp() * (p - q).clamp(-0.5, 0.5)).sum().item())
    want = mean_of_means(values)
    clipped = loss_of(world, divergence="reverse_kl", advantage_clip=0.5).item()
    assert clipped == pytest.approx(want, rel=1e-5)
    assert abs(loss_of(world, divergence="reverse_kl").item() - want) > 1e-2


def test_importance_ratio_by_hand(world):
    """Trap 40: min(student / sampler, cap) for each token."""
    weighted = []
    for s, values in zip(world.samples, per_token(world, jsd), strict=False):
        ratio = (drawn(world, s) - torch.tensor(s.logps)).exp().clamp(max=2.0)
        weighted.append((ratio * torch.tensor(values)).tolist())
    got = loss_of(world, is_cap=2.0).item()
    assert got == pytest.approx(mean_of_means(weighted), rel=1e-5)
    assert got != loss_of(world).item()


def test_advantages_have_no_standard_deviation(tiny, tmp_path, monkeypatch):
    """Eq. 12: r_i minus the group's mean; and a lone success has nobody to learn from."""
    grade = "def grade(completion, row):\n    return float(sum(map(ord, completion)) % 3 == 0)\n"
    (tmp_path / "v.py").write_text(grade)
    graded, seen = [], []
    watch(monkeypatch, sdpo, "grade_groups", lambda _, groups: graded.extend(groups))
    watch(monkeypatch, sdpo, "sdpo_loss", lambda args, _: seen.extend(args[3]))
    flags = f"--verifier {tmp_path}/v.py:grade --rollouts 4 --steps 1 --policy-weight 0.5"
    run_here("sdpo", tmp_path / "r", tiny, flags)
    assert len(graded) == 8 and len(seen) > 8
    for s in seen:
        rewards = [mark.reward for mark in graded[s.place // 4]]
        assert s.advantage == rewards[s.place % 4] - sum(rewards) / 4
        others = sum(rewards) - rewards[s.place % 4]
        assert (s.context is not None) == (others > 0)


# ---- The loop

JUDGE = """
def judge(completion, row):
    n = sum(map(ord, completion)) % 4
    return float(n == 0), f"4:{n % 10};" if n else ""
"""


@pytest.fixture
def judge(tmp_path):
    """Rewards some attempts, by their text alone; feedback on the others."""
    (tmp_path / "judge.py").write_text(JUDGE)
    return f"--verifier {tmp_path}/judge.py:judge"


def watch(monkeypatch, owner, name, see):
    """Calls `see` with the arguments and the result of every call of owner.name."""
    real = getattr(owner, name)

    def watched(*args, **kwargs):
        result = real(*args, **kwargs)
        see(args, result)
        return result

    monkeypatch.setattr(owner, name, watched)


def test_teacher_moves_once_per_batch_and_weights_once_per_mini_batch(tiny, tmp_path, judge, monkeypatch):
    calls, parts = [], []
    watch(monkeypatch, Teacher, "update", lambda *_: calls.append("teacher"))
    watch(monkeypatch, sdpo, "optimizer_step", lambda *_: calls.append("step"))
    watch(monkeypatch, sdpo, "completion_states", lambda args, _: parts.append(args[1]))
    (tmp_path / "all.py").write_text("def told(completion, row):\n    return 0.0, '4:no;'\n")
    flags = "--steps 2 --mini-batch 2 --prompts-per-step 4 --hindsight feedback"
    run_here("sdpo", tmp_path / "r", tiny, f"--verifier {tmp_path}/all.py:told {flags}")
    assert calls == ["step", "step", "teacher"] * 2
    assert [len(part) for part in parts] == [6] * 4  # two questions of three attempts
    for first, second in (parts[:2], parts[2:]):
        assert not {tuple(prompt) for prompt, _ in first} & {tuple(prompt) for prompt, _ in second}


@pytest.mark.parametrize("norms, moves", [([math.nan, 1.0], 1), ([math.nan, math.inf], 0), ([1.0, 1.0], 1)])
def test_the_teacher_waits_when_every_gradient_was_skipped(norms, moves, tiny, tmp_path, judge, monkeypatch):
    """As in the authors' code: one finite gradient of a batch is enough for the EMA to follow."""
    left, moved = iter(norms), []
    monkeypatch.setattr(sdpo, "optimizer_step", lambda *_: next(left))
    watch(monkeypatch, Teacher, "update", lambda *_: moved.append(1))
    run_here("sdpo", tmp_path / "r", tiny, f"{judge} --steps 1 --mini-batch 4 --hindsight feedback")
    assert len(moved) == moves


def test_scored_pairs_belong_together(tiny, tmp_path, judge, monkeypatch):
    """Traps 18, 44 and 46: each context holds its own question, and never its own attempt as solution."""
    taught, scored = [], []
    watch(monkeypatch, Teacher, "targets", lambda args, _: taught.extend(args[1]))
    watch(monkeypatch, sdpo, "completion_states", lambda args, _: scored.extend(args[1]))
    run_here("sdpo", tmp_path / "r", tiny, f"{judge} --steps 2")
    tokenizer = toy.make_tokenizer()
    assert len(taught) == len(scored) > 8
    for (context, y), (prompt, y_again) in zip(taught, scored, strict=True):
        question, text = tokenizer.decode(prompt)[: -len("<|end|><|assistant|>")], tokenizer.decode(context)
        assert y == y_again
        assert text.startswith(question + "\n")
        assert "Correctly solve" not in tokenizer.decode(prompt)
        solution = text.partition("Correct solution:\n\n")[2].partition("\n\nCorrectly")[0]
        assert not solution or solution != tokenizer.decode(y, skip_special_tokens=True)


def test_answers_cut_off_carry_no_loss_when_asked(tiny, tmp_path, judge):
    """Trap 13."""
    flags = f"{judge} --steps 1"
    kept = run_here("sdpo", tmp_path / "kept", tiny, flags)[1]
    masked = run_here("sdpo", tmp_path / "masked", tiny, f"{flags} --mask-truncated")[1]
    assert 0 < kept["rollout/cut_frac"] == masked["rollout/cut_frac"] < 1
    assert kept["distill/active_frac"] > masked["distill/active_frac"] > 0
    assert masked["distill/active_frac"] <= 1 - masked["rollout/cut_frac"] + 1e-9


@pytest.mark.parametrize("more", ["--mask-truncated", "--entropy-quantile 0.3"])
def test_what_masks_tokens_masks_them_in_grpo_too(more, tiny, tmp_path, judge):
    flags = f"{judge} --steps 1 --policy-weight 1"
    whole = run_here("sdpo", tmp_path / "whole", tiny, flags)[1]
    part = run_here("sdpo", tmp_path / "part", tiny, f"{flags} {more}")[1]
    assert 0 < part["distill/tokens"] < whole["distill/tokens"]
    assert part["train/loss"] != whole["train/loss"]
    assert part["train/grad_norm"] != whole["train/grad_norm"]


def test_denominators_count_all_attempts_of_a_mini_batch(tiny, tmp_path, judge, monkeypatch):
    """Those without hindsight and those cut off too: a mean over all attempts, or over all their tokens."""
    seen = []
    watch(monkeypatch, sdpo, "sdpo_loss", lambda args, _: seen.append((args[3], args[4])))
    flags = f"{judge} --steps 1 --mini-batch 4 --hindsight solution --mask-truncated"
    row = run_here("sdpo", tmp_path / "r", tiny, flags)[1]
    counted = {n["tokens"]: n["attempts"] for _, n in seen}
    assert list(counted.values()) == [12, 12] and sum(counted) == pytest.approx(24 * row["rollout/length"])
    assert sum(len(micro) for micro, _ in seen) < 24


def test_average_changes_both_runs(tiny, tmp_path, judge):
    for weight in ("0", "1"):
        norms = []
        for average in ("sequence", "token"):
            flags = f"{judge} --steps 1 --policy-weight {weight} --average {average}"
            norms.append(run_here("sdpo", tmp_path / (weight + average), tiny, flags)[1]["train/grad_norm"])
        assert norms[0] != pytest.approx(norms[1], rel=1e-3)


def test_grpo_alone_asks_no_teacher(tiny, tmp_path, judge, monkeypatch):
    monkeypatch.setattr(Teacher, "targets", lambda self, pairs: pytest.fail("a teacher was asked"))
    rows = run_here("sdpo", tmp_path / "r", tiny, f"{judge} --policy-weight 1")
    assert all(r["train/grad_norm"] > 0 and r["teacher/distance"] == 0 for r in rows[1:])


def test_a_step_without_hindsight_costs_no_forward_and_changes_nothing(tiny, tmp_path, monkeypatch, capsys):
    """Trap 8, counted, and advice after ten in a row."""
    (tmp_path / "never.py").write_text("def never(completion, row):\n    return 0.0\n")
    monkeypatch.setattr(sdpo, "completion_states", lambda *a: pytest.fail("a forward without hindsight"))
    rows = run_here("sdpo", tmp_path / "r", tiny, f"--verifier {tmp_path}/never.py:never --steps 11")
    for r in rows[1:]:
        assert r["distill/active_frac"] == r["train/loss"] == r["teacher/distance"] == 0
    assert capsys.readouterr().out.count("ten steps without anything to learn") == 1


def test_stale_rollouts_make_the_ratio_leave_one(tiny, tmp_path, judge):
    """With several optimiser steps a batch the ratio leaves 1; on-policy it is 1."""
    on = run_here("sdpo", tmp_path / "on", tiny, judge)
    off = run_here("sdpo", tmp_path / "off", tiny, f"{judge} --mini-batch 1 --lr 1e-2")
    assert all(r["distill/is_ratio_mean"] == pytest.approx(1, abs=1e-5) for r in on[1:])
    assert any(abs(r["distill/is_ratio_mean"] - 1) > 1e-2 for r in off[1:])


def test_the_teachers_accuracy_is_that_of_its_own_answers(tiny, tmp_path, judge, monkeypatch):
    """At step 1 and evaluations; the teacher answers contexts, which moves nothing else."""
    asked = []

    def see(args, answers):
        _, model, prompts, keys, stream, _ = args
        if stream[0] == common.TEACHER_STREAM:
            asked.append((model, prompts, keys, answers))

    watch(monkeypatch, common.Sampler, "__call__", see)
    flags = f"{judge} --steps 5 --eval-every 2 --hindsight feedback"
    rows = run_here("sdpo", tmp_path / "r", tiny, f"{flags} --teacher-samples 24")
    assert [r["step"] for r in rows if "teacher/accuracy" in r] == [1, 2, 4, 5]
    text, verdicts = toy.make_tokenizer(), []
    for _, prompts, keys, answers in asked:
        assert 0 < len(set(keys)) == len(prompts) <= 24
        assert all("earlier attempt" in text.decode(p) for p in prompts)
        said = [text.decode(y.ids, skip_special_tokens=True) for y in answers]
        verdicts.append(sum(sum(map(ord, words)) % 4 == 0 for words in said) / len(said))
    assert [r["teacher/accuracy"] for r in rows if "teacher/accuracy" in r] == verdicts
    assert len({id(model) for model, *_ in asked}) == 1
    without = run_here("sdpo", tmp_path / "0", tiny, f"{flags} --teacher-samples 0")
    assert not any("teacher/accuracy" in r for r in without)
    assert [r["train/loss"] for r in rows[1:]] == [r["train/loss"] for r in without[1:]]


# ---- Code, end to end: problems with tests, and a scripted policy in place of a model that cannot program

PROBLEMS = [
    ("add", "a, b", "a + b", "a - b", ["1\n2", "5\n7"], ["3", "12"]),
    ("double", "x", "2 * x", "x", ["3"], ["6"]),
    ("largest", "xs", "max(xs)", "min(xs)", ["[3, 9, 2]"], ["9"]),
    ("backwards", "s", "s[::-1]", "s", ['"abc"'], ['"cba"']),
]
BLOCK = "```python\ndef {}({}):\n    {}\n```"


def say(number, i):
    """Attempt i at a problem; the last of every other problem solves it."""
    name, args, right, wrong, *_ = PROBLEMS[number - 1]
    bodies = [f"return {wrong}", "raise KeyError(7)", "while True: pass"]
    said = [BLOCK.format(name, args, body) for body in bodies]
    solved = BLOCK.format(name, args, f"return {right}") if number % 2 else "I give up."
    return [*said, "No code.", solved][i]


def byte_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(characters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}>"
    names = dict(eos_token="<|end|>", pad_token="<|end|>", chat_template=template)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def test_code_runs_end_to_end(tmp_path, monkeypatch):
    """The teacher reads a program that passed, or what the tests said about this very attempt."""
    tokenizer = byte_tokenizer()
    shape = dict(vocab_size=len(tokenizer), eos_token_id=0, pad_token_id=0, max_position_embeddings=4096)
    make_model(tmp_path / "m", **shape)
    tokenizer.save_pretrained(tmp_path / "m")
    lines = []
    for name, args, _, _, inputs, outputs in PROBLEMS:
        tests = {"inputs": inputs, "outputs": outputs, "testtype": "functional", "fn_name": name}
        lines.append({"prompt": f"Write {name}({args}).", "tests": {**tests, "time_limit": 1}})
    (tmp_path / "code.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def scripted(self, model, prompts, keys, stream, how):
        texts = [say(*key) for key in keys]
        return [Rollout(tokenizer(t)["input_ids"] + [0], [-1.0] * (len(t) + 1), True) for t in texts]

    monkeypatch.setattr(common.Sampler, "__call__", scripted)
    seen = []
    watch(monkeypatch, Teacher, "targets", lambda args, _: seen.extend(args[1]))
    flags = (
        f"--preset lcb --model {tmp_path}/m --data {tmp_path}/code.jsonl --out {tmp_path}/r "
        "--chat-kwargs {} --prompts-per-step 4 --rollouts 5 --mini-batch 1 --steps 1 "
        "--teacher-samples 0 --unsafe-code"
    )
    sdpo.main(parse_args(Args, PRESETS, flags.split()))
    row = metrics_of(tmp_path / "r")[-1]
    assert row["rollout/reward"] == 2 / 20
    assert row["distill/active_frac"] == 18 / 20  # a lone success has nobody to learn from
    read = {}
    for context, y in seen:
        text = tokenizer.decode(context)
        read[tokenizer.decode(y, skip_special_tokens=True), text.split(").")[0]] = text
    for number, (name, args, *_, inputs, outputs) in enumerate(PROBLEMS, 1):
        question = f"Write {name}({args}"
        shown = [read.get((say(number, i), question)) for i in range(5)]
        if number % 2:
            assert shown[:4] == [f"{question}).\nCorrect solution:\n\n{say(number, 4)}{END}>"] * 4
            continue
        told = [text.removeprefix(f"{question}).{FEEDBACK}").removesuffix(f"{END}>") for text in shown]
        wrong, error, late, no_code, give_up = told
        assert inputs[0] in wrong and outputs[0] in wrong
        assert "KeyError: 7" in error
        assert "Time Limit Exceeded" in late
        assert no_code == give_up == "Incorrect Format: Put your code inside a ```python ... ``` block."


# ---- Test time: one question, until it is solved

SOLVER = """
import collections
calls = collections.Counter()
def solver(completion, row):
    calls[row["id"]] += row["where"].startswith("data")  # not in evaluations
    n = calls[row["id"]]
    return float(n == {}), f"4:{{n % 10}};"
"""


@pytest.fixture
def solver(tmp_path):
    """The 11th attempt at a question solves it; feedback on all."""
    (tmp_path / "solver.py").write_text(SOLVER.format(11))
    return (
        f"--verifier {tmp_path}/solver.py:solver --question 7 --prompts-per-step 1 --rollouts 4 --steps 9 "
        "--hindsight feedback --teacher-samples 0 --max-teacher-tokens 200 --chat-kwargs {}"
    )


@pytest.mark.parametrize("search", ["sdpo", "best_of_k", "multi_turn"])
def test_the_search_ends_with_the_first_success(search, solver, tiny, tmp_path, monkeypatch):
    """Four attempts a step, the 11th solves; nobody trains on the last group. The baselines never train."""
    steps, prompts = [], []

    def see(args, _):
        _, _, asked, keys, stream, _ = args
        if stream[0] == common.TRAIN_STREAM:
            assert [row for row, _ in keys] == [7] * 4
            prompts.append({tuple(p) for p in asked})

    watch(monkeypatch, sdpo, "optimizer_step", lambda *_: steps.append(1))
    watch(monkeypatch, common.Sampler, "__call__", see)
    rows = run_here("sdpo", tmp_path / "r", tiny, f"{solver} --search {search}")
    found = [(r["search/attempts"], r["search/solved"]) for r in rows[1:]]
    assert found == [(4, 0), (8, 0), (11, 1)]
    assert json.loads((tmp_path / "r" / "solution.json").read_text())["attempt"] == 11
    assert len(steps) == (2 if search == "sdpo" else 0)
    assert all(len(p) == 1 for p in prompts)
    assert len(set.union(*prompts)) == (3 if search == "multi_turn" else 1)
    question, four, eight = (len(next(iter(p))) for p in prompts)
    assert search != "multi_turn" or eight - four == 4 * 5 < four - question  # 4 pieces and blank lines
    again = run_here("sdpo", tmp_path / "r", tiny, f"{solver} --search {search} --resume")
    assert again == rows  # solved: nothing is asked or deleted
    with pytest.raises(InputError, match="already holds a run"):
        run_here("sdpo", tmp_path / "r", tiny, f"{solver} --search {search}")


@pytest.mark.parametrize("search", ["best_of_k", "multi_turn"])
def test_a_search_that_is_stopped_goes_on_where_it_was(search, solver, tiny, tmp_path, monkeypatch):
    """Its log stays, and multi_turn asks with all feedback of before."""
    prompts = []

    def see(args, _):
        if args[4][0] == common.TRAIN_STREAM:
            prompts.append(args[2][0])

    watch(monkeypatch, common.Sampler, "__call__", see)
    flags = f"{solver} --search {search}"
    whole = run_here("sdpo", tmp_path / "whole", tiny, flags)
    asked = prompts.copy()
    prompts.clear()
    common.load_file.cache_clear()

    def stop(args, _):
        args[0].stopped = args[0].stopped or len(prompts) == 2

    with monkeypatch.context() as patch:
        watch(patch, sdpo, "grade_groups", stop)
        stopped = run_here("sdpo", tmp_path / "r", tiny, flags)
    assert [r["step"] for r in stopped] == [0, 1, 2]
    resumed = run_here("sdpo", tmp_path / "r", tiny, f"{flags} --resume")
    assert resumed[:3] == stopped
    found = [(r["step"], r["search/attempts"], r["search/solved"]) for r in resumed[1:]]
    assert found == [(r["step"], r["search/attempts"], r["search/solved"]) for r in whole[1:]]
    assert prompts == asked


def test_multi_turn_reads_the_question_and_the_newest_feedback_that_fits():
    tokenizer, history = toy.make_tokenizer(), [f"{i}:no;" for i in range(9)]
    row = {**to_row({"prompt": "mul:12"}), "prompt_ids": []}

    def read(limit):
        args = Args(chat_kwargs={}, max_teacher_tokens=limit, template=sdpo.MULTI_TURN)
        return tokenizer.decode(sdpo.multi_turn_ids(row, history, tokenizer, args))

    head, end = f"<|user|>mul:12\n{FEEDBACK}", f"{END}<|end|><|assistant|>"
    assert read(200) == head + "\n\n".join(history) + end
    assert read(50) == head + "\n\n".join(history[-5:]) + end
    assert 45 < len(tokenizer(read(50))["input_ids"]) <= 50
    assert read(5) == ""


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--rollouts 1 --hindsight solution", "a group of one"),
        ("--rollouts 1 --policy-weight 1", "a group of one"),
        ("--mini-batch 3", "must divide --prompts-per-step"),
        ("--policy-weight 2", "--policy-weight 2: expected"),
        ("--support student_topk --topk 1000", "--topk 1000: the vocabulary has"),
        ("--support sampled", "needs --divergence reverse_kl"),
        ("--advantage-clip 5", "needs --divergence reverse_kl"),
        ("--question 1", "add --prompts-per-step 1"),
        ("--search best_of_k", "add --question"),
        ("--question 99 --prompts-per-step 1", "--question 99: the rows of .* are 1 to 24"),
        ("--template {prompt}", "placeholders {feedback}, {solution}"),
        ("--template {prompt}{solution}", "placeholders {feedback}$"),
        (f"--template {TURNS.replace(' ', '')[:-1]}", "expected text or chat messages"),
    ],
)
def test_flags_that_cannot_mean_what_they_say(flags, message, tiny, tmp_path):
    with pytest.raises(InputError, match=message):
        run_here("sdpo", tmp_path / "r", tiny, flags)


WAYS = [
    "--divergence reverse_kl --advantage-clip 0.1",
    "--teacher trust_region",
    "--teacher base",
    "--teacher live",
    "--lora-rank 2",
    "--divergence reverse_kl --support student_topk --topk 5",
    "--divergence reverse_kl --support sampled",
    "--policy-weight 0.9",
    "--average token",
    "--entropy-quantile 0.5",
    "--hindsight feedback",
    "--hindsight both",
    "--mask-truncated",
]


@pytest.mark.parametrize("flags", WAYS)
def test_every_way_runs(flags, tiny, tmp_path, judge):
    rows = run_here("sdpo", tmp_path / "r", tiny, f"{judge} --steps 2 {flags}")
    assert all(math.isfinite(r["train/loss"]) and r["train/grad_norm"] > 0 for r in rows[1:])


# ---- Presets


def test_presets_are_the_papers():
    """Tables 12 and 13, column of section 3; the authors' yaml where the paper is silent."""
    for name in ("sciknoweval", "tooluse"):
        a = parse_args(Args, PRESETS, ["--preset", name])
        assert (a.model, a.prompts_per_step, a.rollouts, a.mini_batch) == ("Qwen/Qwen3-8B", 32, 8, 0)
        assert (a.max_prompt_tokens, a.max_completion_tokens, a.max_teacher_tokens) == (2048, 8192, 10240)
        assert (a.divergence, a.support, a.topk) == ("jsd", "student_topk", 100)
        assert (a.teacher, a.ema_rate, a.lr, a.warmup, a.weight_decay) == ("ema", 0.05, 1e-5, 10, 0.01)
        assert (a.adam_betas, a.is_cap, a.average) == ((0.9, 0.999), 2.0, "sequence")
        evaluation = (a.eval_samples, a.eval_temperature, a.eval_top_p, a.eval_every)
        assert evaluation == (16, 0.6, 0.95, 5)
        assert (a.epochs, a.hindsight, a.chat_kwargs) == (30.0, "solution", {"enable_thinking": False})
    a = parse_args(Args, PRESETS, ["--preset", "ttt"])
    assert (a.prompts_per_step, a.rollouts, a.mini_batch) == (1, 16, 1)
    assert (a.divergence, a.topk, a.ema_rate, a.lr, a.advantage_clip) == ("reverse_kl", 20, 0.01, 1e-6, 5.0)
    assert (a.verifier, a.steps * a.rollouts, a.search) == ("code", 2752, "sdpo")
    assert a.max_teacher_tokens == 10240
    a = parse_args(Args, PRESETS, ["--preset", "grpo"])
    assert (a.policy_weight, a.lr, a.mini_batch, a.warmup, a.rollouts) == (1.0, 1e-6, 8, 10, 8)
    a = parse_args(Args, PRESETS, ["--preset", "lcb"])
    assert (a.divergence, a.topk, a.ema_rate, a.lr, a.warmup) == ("reverse_kl", 20, 0.01, 1e-6, 0)
    assert (a.mini_batch, a.eval_samples, a.verifier, a.is_cap, a.rollouts) == (1, 4, "code", 2.0, 8)
    assert a.hindsight == "solution_or_feedback"
    assert (a.success, sdpo.CLIP_LOW, sdpo.CLIP_HIGH) == (0.5, 0.2, 0.28)
    assert sdpo.objective_of(a).tail
    assert sdpo.objective_of(a).beta == 0.5


@pytest.mark.parametrize("flags", ["", "--policy-weight 0.5"])
def test_the_printed_sample_is_the_one_whose_statistics_stand_beside_it(flags, tiny, tmp_path, monkeypatch):
    """In a mixed batch too, where only the attempts with hindsight have a divergence."""
    judge = tmp_path / "judge.py"
    judge.write_text("def judge(completion, row):\n    return float(sum(map(ord, completion)) % 3 == 0)\n")
    seen, losses = [], []
    explain, loss = sdpo.explain, sdpo.sdpo_loss

    def watched(run, prompts, y, stats):
        seen.append((prompts["teacher reads"], y, stats))
        explain(run, prompts, y, stats)

    def kept(h_ND, head, targets, micro, *rest):
        losses.append(micro)
        return loss(h_ND, head, targets, micro, *rest)

    def without_hindsight_first(run, samples):
        return [sorted(samples, key=lambda s: s.context is not None)]

    monkeypatch.setattr(sdpo, "explain", watched)
    monkeypatch.setattr(sdpo, "sdpo_loss", kept)
    monkeypatch.setattr(sdpo, "micro_batches", without_hindsight_first)
    more = f"--verifier {judge}:judge --hindsight solution --rollouts 4 --teacher-samples 0 {flags}"
    run_here("sdpo", tmp_path / "r", tiny, more)
    [(context, y, stats)] = seen
    if flags:
        assert any(s.context is None for micro in losses for s in micro)
    micro = next(micro for micro in losses if any(s.context for s in micro))
    told = [s for s in micro if s.context]
    assert (context, y) == (told[0].context, told[0].y)
    assert len(stats["logp"]) == sum(len(s.y) for s in told)
    assert stats["logp"][: len(y)].tolist() == pytest.approx(told[0].logps, abs=1e-4)
