"""SDPO: who is shown whose success, which attempts carry loss, and how GRPO and the teacher enter it."""

import base64
import json
import math
import os
import pickle
import zlib
from types import SimpleNamespace

import datasets
import pytest
import torch
import toy
from conftest import JUDGE, make_model, metrics_of, run_here
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import common
import sdpo
from common import InputError, Rollout, Run, Teacher, completion_states, head_of, load_model, parse_args
from sdpo import PRESETS, Args, Mark, Sample, hindsight, sdpo_loss, teacher_ids, to_row

GROUP = [Mark("a", 0.0, "", "fa"), Mark("b", 1.0, "b", ""), Mark("c", 0.0, "", ""), Mark("d", 1.0, "d", "fd")]
END = "\n\nCorrectly solve the original question."
FEEDBACK = "\nThe following is feedback from your unsuccessful earlier attempt:\n\n"
TURNS = (
    '[{"role": "user", "content": "{prompt}"}, {"role": "assistant", "content": "{solution}"},'
    ' {"role": "user", "content": "no:{feedback}"}, {"role": "user", "content": "{prompt}"}]'
)


# ---- What the teacher reads


def read(prompt, solution, *feedback, **flags):
    """What the teacher reads, as text; None without a prompt for it."""
    tokenizer = toy.make_tokenizer()
    args = Args(**{"chat_kwargs": {}, **flags})
    ids = teacher_ids(to_row({"prompt": prompt}), solution, [*feedback], tokenizer, args)
    return ids and tokenizer.decode(ids)


def size(text):
    return len(toy.make_tokenizer()(text)["input_ids"])


def test_templates_are_the_papers():
    """The yaml's: no blank line before "Correct solution:", nothing after the last sentence."""
    start, end = "<|user|>mul:12", f"{END}<|end|><|assistant|>"
    assert read("mul:12", "34", "") == f"{start}\nCorrect solution:\n\n34{end}"
    assert read("mul:12", "", "4:no;") == f"{start}{FEEDBACK}4:no;{end}"
    assert read("mul:12", "34", "4:no;") == f"{start}\nCorrect solution:\n\n34{FEEDBACK}4:no;{end}"
    assert read("mul:12", "", "") is None


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
    tokenizer = toy.make_tokenizer()
    row = to_row({"prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": "mul:12"}]})
    words = f"<|system|>S<|end|><|user|>mul:12<|end|>{middle}<|user|>mul:12<|end|><|assistant|>"
    ids = teacher_ids(row, solution, [feedback], tokenizer, Args(chat_kwargs={}, template=TURNS))
    assert ids == tokenizer(words)["input_ids"]
    sdpo.check(Args(template=TURNS), 1000)


TURN = "<|end|><|assistant|>012", "<|end|><|user|>mul:12<|end|><|assistant|>"


@pytest.mark.parametrize(
    "template, middle, end, length",
    [
        (sdpo.REPROMPT, "\nCorrect solution:\n\n012", f"{END}<|end|><|assistant|>", 30),
        (TURNS, *TURN, 30),
        (sdpo.TURNS, *TURN, 29),
    ],
)
def test_a_long_solution_loses_its_own_end(template, middle, end, length):
    """Trap 17: the rest stays. No more than has to go: where it stands twice, half as much of each copy."""
    told = read("mul:12", "0123456789" * 5, "", max_teacher_tokens=30, template=template)
    assert told.startswith(f"<|user|>mul:12{middle}") and told.endswith(end)
    assert size(told) == length
    alone = read("mul:12", "", "4:no;", template=template)
    assert read("mul:12", "1" * 50, "4:no;", template=template, max_teacher_tokens=size(alone)) == alone
    assert read("mul:12", "1" * 50, "4:no;", template=template, max_teacher_tokens=10) is None
    assert read("mul:12", "", "", template=template) is None


def byte_tokenizer():
    characters = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(characters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}>"
    names = dict(eos_token="<|end|>", pad_token="<|end|>", chat_template=template)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def test_a_solution_is_not_cut_within_a_character():
    """A quarter of an emoji would decode to a sign of three tokens, longer than what was cut."""
    tokenizer, question = byte_tokenizer(), to_row({"prompt": "q"})
    whole = teacher_ids(question, "😀😀", [], tokenizer, Args(chat_kwargs={}))
    for limit in range(len(whole) - 7, len(whole)):
        ids = teacher_ids(question, "😀😀", [], tokenizer, Args(chat_kwargs={}, max_teacher_tokens=limit))
        assert (tokenizer.decode(ids or []).count("😀") == 1) == (limit >= len(whole) - 4)
        assert ids or limit < len(whole) - 4


@pytest.mark.parametrize(
    "group, how, want",
    [
        (GROUP, "solution_or_feedback", [("b", ""), ("d", ""), ("b", ""), ("b", "")]),
        (GROUP, "solution", [("b", ""), ("d", ""), ("b", ""), ("b", "")]),
        (GROUP, "feedback", [("", "fa"), ("", ""), ("", ""), ("", "fd")]),
        (GROUP, "both", [("b", "fa"), ("d", ""), ("b", ""), ("b", "fd")]),
        (GROUP[:3], "solution", [("b", ""), ("", ""), ("b", "")]),
        (GROUP[:2], "solution_or_feedback", [("b", ""), ("", "")]),
        (GROUP[:1] * 2, "solution_or_feedback", [("", "fa"), ("", "fa")]),
        (GROUP[:1] * 2, "solution", [("", ""), ("", "")]),
    ],
)
def test_an_attempt_is_shown_the_first_other_success_or_its_feedback(group, how, want):
    """Trap 43: an attempt is never its own solution; a lone success learns from nobody."""
    assert [hindsight(group, i, Args(hindsight=how)) for i in range(len(group))] == want


def marks_of(*verdicts, row=None, **flags):
    """The group of these (text, reward, feedback)."""
    run = Run(Args(out="/nowhere", rollouts=len(verdicts), **flags), toy.make_tokenizer())
    told = {text: tuple(verdict) for text, *verdict in verdicts}
    run.text = lambda y: y.ids
    run.gather = lambda marks: marks[::-1]  # of other processes, in any order
    run.verify = common.Verifier("mine", lambda text, row: told[text])
    answers = [Rollout(text, [], True) for text in told]
    [group] = sdpo.grade_groups(run, range(len(answers)), [row or {}] * len(answers), answers)
    return group


def test_what_an_attempt_shows():
    """Trap 20: no thinking. A success that is all thinking shows nothing: the next one is shown."""
    group = marks_of(("a", 0.0, "fa"), ("<think>only this", 1.0, ""), ("<think>x</think>\nc", 1.0, ""))
    assert [mark.solution for mark in group] == ["", "", "c"]
    assert hindsight(group, 0, Args()) == ("c", "") and hindsight(group[:2], 0, Args()) == ("", "fa")


def test_what_spells_a_special_token_is_shown_to_nobody():
    """Neither an answer nor feedback; the other of the two is, and the attempt keeps its reward."""
    wrong, right = ("a", 0.0, "fa<|end|>"), ("b<|end|>", 1.0, "fb")
    group = marks_of(wrong, right, ("c", 1.0, "fc"), ("<|other|>", 1.0, "< |end|>"))
    assert [mark.hidden for mark in group] == [True, True, False, False] and group[1].reward == 1.0
    both = [hindsight(group, i, Args(hindsight="both")) for i in range(4)]
    assert both == [("c", ""), ("c", "fb"), ("<|other|>", "fc"), ("c", "< |end|>")]


@pytest.mark.parametrize("text, feedback, active", [("4<|end|>", "no", 1), ("4<|end|>", "<|pad|>", 0)])
def test_attempts_that_spell_a_special_token_are_counted(text, feedback, active, tiny, tmp_path, monkeypatch):
    """A model can write the characters of <|end|> as ordinary tokens; read again they would end the turn."""
    (tmp_path / "judge.py").write_text(f"def judge(completion, row):\n    return 1.0, {feedback!r}\n")
    monkeypatch.setattr("common.Run.text", lambda run, y: text)
    more = f"--verifier {tmp_path}/judge.py:judge --steps 1 --prompts-per-step 2"
    row = run_here("sdpo", tmp_path / "run", tiny, more)[1]
    assert (row["rollout/special_tokens"], row["distill/active_frac"]) == (6, active)


@pytest.mark.parametrize("least, solved", [(0.6, 1), (0.7, 0)])
def test_success_threshold(least, solved, tiny, tmp_path):
    """Trap 45: of solutions, of pass@n and of a search."""
    (tmp_path / "v.py").write_text("def v(completion, row):\n    return 0.6\n")
    flags = f"--verifier {tmp_path}/v.py:v --success {least} --eval-samples 2 --eval-temperature 1"
    row = run_here("sdpo", tmp_path / "r", tiny, f"{flags} --steps 1")[-1]
    assert row["eval/pass@2"] == solved
    assert (row["distill/active_frac"] > 0) == solved
    flags += " --question 3 --prompts-per-step 1 --steps 1 --search best_of_k"
    assert run_here("sdpo", tmp_path / "q", tiny, flags)[-1]["search/solved"] == solved


def test_a_rows_own_feedback_is_for_failures_without_another():
    """The teacher never reads the word "None", and a reward of None is an error."""
    own = {"feedback": "own"}
    cases = [({}, 0.0, None, ""), (own, 0.0, None, "own"), (own, 0.0, "said", "said"), (own, 1.0, None, "")]
    for row, reward, feedback, want in cases:
        [mark] = marks_of(("a", reward, feedback), row=row)
        assert (mark.reward, mark.feedback) == (reward, want)
    with pytest.raises(common.RunError, match="returned .None, 'f'."):
        marks_of(("a", None, "f"))


# ---- Which attempts carry loss


def look_back(rewards, ends=None, **flags):
    """Samples and dropped prompts of attempts with these rewards and the feedback "no", in groups of four."""
    run = Run(Args(out="/nowhere", rollouts=4, chat_kwargs={}, **flags), toy.make_tokenizer())
    marks = [Mark("", reward, f"{i}" * (reward >= 0.5), "no") for i, reward in enumerate(rewards)]
    groups = [marks[i : i + 4] for i in range(0, len(marks), 4)]
    rows = [{**to_row({"prompt": f"mul:{i // 4}"}), "prompt_ids": [i // 4]} for i in range(len(marks))]
    attempts = [Rollout([30 + i, 5], [-1.0, -2.0], end) for i, end in enumerate(ends or [True] * len(marks))]
    places = [*range(1, len(marks)), 0]  # in any order
    rows, attempts = [rows[place] for place in places], [attempts[place] for place in places]
    samples, dropped = sdpo.look_back(run, groups, places, rows, attempts)
    return sorted(samples), dropped


def test_every_attempt_looks_back_at_its_own_group():
    """Traps 44 and 46. Eq. 12: the advantage has no standard deviation. A lone success learns from nobody."""
    rewards = [0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    samples, dropped = look_back(rewards, hindsight="solution")
    assert [s.place for s in samples] == [0, 1, 2, 3, 5, 6, 7] and dropped == 0
    shown, tokenizer = [1, 2, 1, 1, 4, 4, 4], toy.make_tokenizer()
    for s, other in zip(samples, shown, strict=True):
        q = s.place // 4
        assert (s.prompt, s.y, s.logps, s.mask) == ([q], [30 + s.place, 5], [-1.0, -2.0], [True, True])
        assert tokenizer.decode(s.context).startswith(f"<|user|>mul:{q}\nCorrect solution:\n\n{other}\n")
        assert s.advantage == rewards[s.place] - sum(rewards[4 * q : 4 * q + 4]) / 4


def test_equal_rewards_carry_no_loss_however_their_mean_is_rounded():
    """Three times 0.1 over 3 is not 0.1 in floating point. GRPO has no hindsight that could be dropped."""
    grpo = dict(policy_weight=1.0, max_teacher_tokens=10)
    assert look_back([0.1] * 3, **grpo) == ([], 0)
    samples, dropped = look_back([0.1, 0.1, 0.1, 0.2], **grpo)
    assert [s.context for s in samples] == [None] * 4 and dropped == 0


def test_hindsight_that_does_not_fit_is_counted():
    assert look_back([0.0, 1.0, 1.0, 0.0], max_teacher_tokens=10) == ([], 4)
    samples, dropped = look_back([0.0, 1.0, 1.0, 1.0], max_teacher_tokens=10, policy_weight=0.5)
    assert len(samples) == dropped == 4  # the policy gradient needs none


def test_answers_cut_off_carry_no_loss_when_asked():
    """Trap 13. Their reward counts in the group."""
    ends = [True, False, True, False]
    for weight in (0.0, 1.0):
        kept, _ = look_back([0.0, 1.0, 0.0, 0.0], ends, policy_weight=weight)
        masked, _ = look_back([0.0, 1.0, 0.0, 0.0], ends, policy_weight=weight, mask_truncated=True)
        assert [s.place for s in kept] == [0, 1, 2, 3]
        assert masked == [kept[0], kept[2]]


# ---- Rows

RAW = {"question": "Q", "answerKey": "A", "details": {"level": "L3"}, "type": "mcq-2-choices"}
RAW |= {"choices": {"text": ["x", "y"], "label": ["A", "B"]}}


def test_raw_sciknoweval_is_filtered_then_split_as_the_authors_did(tmp_path):
    """Level L3, two or four options; a tenth tests, by the library's own split, seed 42."""
    kinds = ["true_or_false", *["mcq-2-choices", "mcq-4-choices"] * 3]
    levels = [{"level": "L1"}, *[{"level": "L3"}] * 4]
    raws = [{**RAW, "type": kinds[i % 7], "details": levels[i % 5]} for i in range(60)]
    (tmp_path / "raw.jsonl").write_text("".join(json.dumps(raw) + "\n" for raw in raws))
    kept = [i for i in range(60) if i % 5 and i % 7]
    want = datasets.Dataset.from_dict({"i": kept}).train_test_split(test_size=0.1, seed=42)
    for part in ("train", "test"):
        rows = common.load_rows(f"{tmp_path}/raw.jsonl#{part}", to_row)
        assert [row["id"] - 1 for row in rows] == want[part]["i"]
    assert to_row(RAW)["prompt"][1]["content"] == "Q\n\nA: x\nB: y\nPlease reason step by step."
    assert to_row({"prompt": "p", "golden_answer": ["call"]})["answer"] == ["call"]


def packed(value):
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


def case(given, output):
    return {"input": given, "output": output, "testtype": "functional"}


CODE_RAW = {
    "question_content": "Add {them} up.",
    "starter_code": "class Solution:\n    def add(self, numbers: List[int], more: int) -> int:  \n        ",
    "public_test_cases": json.dumps([case("[1, 2]\n3", "6")]),
    "private_test_cases": packed(json.dumps([case("[]\n0", "0")])),
    "metadata": '{"func_name": "add"}',
    "contest_date": "2025-04-30",
}


def test_livecodebench_rows_have_the_authors_prompt_and_all_tests():
    row = to_row(CODE_RAW)
    tests = {"inputs": ["[1, 2]\n3", "[]\n0"], "outputs": ["6", "0"], "testtype": "functional"}
    assert row["tests"] == {**tests, "fn_name": "add", "time_limit": 6}
    assert row["prompt"][0]["content"] == (
        "You are a coding expert. You will be given a coding problem, and you need to write a correct Python "
        "program that matches the specification and passes all tests. The time limit is 1 second. "
        "You may start by outlining your thought process. In the end, please provide the complete "
        "code in a code block enclosed with ``` ```.\n\nAdd {them} up.\n\nYour solution should have the "
        "following signature: ```python\ndef add(numbers: List[int], more: int) -> int:\n```"
    )
    stdin = to_row({**CODE_RAW, "starter_code": "", "private_test_cases": "[]", "metadata": "{}"})
    assert stdin["prompt"][0]["content"].endswith("Add {them} up.")
    assert stdin["tests"]["fn_name"] is None
    dates = ["2025-01-31", "2025-02-01", "2025-04-30T9", "2025-05-01"]
    kept = [to_row({**CODE_RAW, "contest_date": date}) is not None for date in dates]
    assert kept == [False, True, True, False]


def code_raw(private):
    cases = [case(str(i), str(i)) for i in range(private)]
    return {**CODE_RAW, "private_test_cases": json.dumps(cases)}


def test_training_sees_half_of_the_private_tests_and_evaluation_all():
    """Section 2.7."""
    for private, kept in ((0, 0), (1, 1), (2, 1), (9, 4)):
        raw = code_raw(private)
        half, whole = to_row(raw, train=True)["tests"], to_row(raw)["tests"]
        assert len(half["inputs"]) == len(half["outputs"]) == kept + 1
        assert len(whole["inputs"]) == private + 1
        assert [x for x in whole["inputs"] if x in half["inputs"]] == half["inputs"]
        assert half == to_row(raw, train=True)["tests"]


class Evil:
    def __reduce__(self):
        return os.system, ("true",)


@pytest.mark.parametrize("value, message", [(Evil(), "too many values"), ([1, 2], "not enough values")])
def test_a_pickle_that_calls_something_is_refused(value, message):
    """Nothing is executed: the pickle must hold one text and nothing else."""
    with pytest.raises(ValueError, match=message):
        to_row({**CODE_RAW, "private_test_cases": packed(value)})


@pytest.mark.parametrize("more, tests", [("", 6), ("--question 1 --prompts-per-step 1", 11)])
def test_solved_at_test_time_means_all_tests(more, tests, tiny, tmp_path, monkeypatch):
    """Training on raw LiveCodeBench rows sees half of the private tests; --question is judged by all."""
    (tmp_path / "raw.jsonl").write_text(json.dumps(code_raw(10)))
    seen = []
    monkeypatch.setattr(sdpo, "tokenize", lambda rows, *_: seen.extend(rows) or 1 / 0)
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
    three, five = [-3.0, -4.0, -5.0], [-3.0, -4.0, -5.0, -2.0, -6.0]
    samples = [
        Sample(0, [3, 20, 5, 4], [3, 20, 40, 41, 5, 4], [30, 31, 32, 33, 5], five, [True] * 5, 0.75),
        Sample(0, [3, 21, 22, 5, 4], [3, 43, 5, 4], [34, 35, 5], three, [True] * 3, -0.25),
        Sample(0, [3, 20, 5, 4], None, [36, 5], three[:2], [True] * 2, -0.5),
    ]
    world = SimpleNamespace(run=run, student=student, teacher=teacher, samples=samples)
    samples[2] = samples[2]._replace(logps=drawn(world, samples[2]).tolist())  # a ratio of 1: never clipped
    return world


def loss_of(world, samples=None, **flags):
    """The loss of these samples, divided as if they were a third of the world's attempts each."""
    samples = samples or world.samples
    args = Args(**{"support": "full", "is_cap": 0.0, **flags})
    told = [(s.context, s.y) for s in samples if s.context]
    targets = world.teacher.targets(told) if args.policy_weight < 1 else []
    h_ND = completion_states(world.student, [(s.prompt, s.y) for s in samples])
    return sdpo_loss(h_ND, head_of(world.student), targets, samples, {"attempts": 3, "tokens": 10}, args)[0]


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

    def top_and_tail(p, q):
        index = p.topk(5).indices
        return jsd(*(torch.cat([x[index], (1 - x[index].exp().sum()).log()[None]]) for x in (p, q)))

    want = mean_of_means(per_token(world, top_and_tail))
    assert loss_of(world, support="student_topk", topk=5).item() == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("average", ["sequence", "token"])
def test_average_governs_both_losses(world, average):
    """sequence: mean of token means over attempts. token: mean over the tokens of all attempts.

    Eq. 13: the clip is .2 down and .28 up, and only where it lowers the objective.
    """
    grpo, distilled = [], per_token(world, jsd)
    for s in world.samples:
        ratio = (drawn(world, s) - torch.tensor(s.logps)).exp()
        gain = torch.minimum(ratio * s.advantage, ratio.clamp(0.8, 1.28) * s.advantage)
        grpo.append((-gain).tolist())
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
    alone = world.samples[2:]  # nobody has hindsight: the policy gradient is left
    mixed = gradient_of(world, alone, policy_weight=0.5)
    assert torch.allclose(mixed, 0.5 * gradient_of(world, alone, policy_weight=1.0), atol=1e-8)
    assert mixed.norm() > 1e-4


def test_a_masked_token_carries_neither_loss(world):
    """The mask is what --entropy-quantile changes."""
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


# ---- The loop


@pytest.fixture
def judge(tmp_path):
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


def test_teacher_moves_once_per_batch_and_weights_once_per_mini_batch(tiny, tmp_path, monkeypatch):
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


@pytest.mark.parametrize("norms, moves", [([math.nan, 1.0], 1), ([math.nan, math.inf], 0)])
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


def test_what_masks_tokens_masks_them_in_grpo_too(tiny, tmp_path, judge):
    flags = f"{judge} --steps 1 --policy-weight 1"
    whole = run_here("sdpo", tmp_path / "whole", tiny, flags)[1]
    part = run_here("sdpo", tmp_path / "part", tiny, f"{flags} --entropy-quantile 0.3")[1]
    assert 0 < part["distill/tokens"] < whole["distill/tokens"]
    assert part["train/loss"] != whole["train/loss"]


def test_denominators_count_all_attempts_of_a_mini_batch(tiny, tmp_path, judge, monkeypatch):
    """Those without hindsight and those cut off too: a mean over all attempts, or over all their tokens."""
    seen = []
    watch(monkeypatch, sdpo, "sdpo_loss", lambda args, _: seen.append((args[3], args[4])))
    flags = f"{judge} --steps 1 --mini-batch 4 --hindsight solution --mask-truncated"
    row = run_here("sdpo", tmp_path / "r", tiny, flags)[1]
    counted = {n["tokens"]: n["attempts"] for _, n in seen}
    assert list(counted.values()) == [12, 12] and sum(counted) == pytest.approx(24 * row["rollout/length"])
    taught = sum(len(micro) for micro, _ in seen)
    assert row["distill/active_frac"] == taught / 24 < 1


def test_grpo_alone_asks_no_teacher(tiny, tmp_path, judge, monkeypatch):
    monkeypatch.setattr(Teacher, "targets", lambda self, pairs: pytest.fail("a teacher was asked"))
    rows = run_here("sdpo", tmp_path / "r", tiny, f"{judge} --policy-weight 1")
    assert all(r["train/grad_norm"] > 0 and r["teacher/distance"] == 0 for r in rows[1:])


def test_a_step_without_hindsight_costs_no_forward_and_changes_nothing(tiny, tmp_path, monkeypatch):
    """Trap 8, counted."""
    (tmp_path / "never.py").write_text("def never(completion, row):\n    return 0.0\n")
    for name in ("completion_states", "optimizer_step"):
        monkeypatch.setattr(sdpo, name, lambda *_: pytest.fail("a step without hindsight"))
    for r in run_here("sdpo", tmp_path / "r", tiny, f"--verifier {tmp_path}/never.py:never --steps 2")[1:]:
        assert r["distill/active_frac"] == r["train/loss"] == r["teacher/distance"] == 0


def test_stale_rollouts_make_the_ratio_leave_one(tiny, tmp_path, judge):
    """With several optimiser steps a batch the ratio leaves 1; on-policy it is 1."""
    on = run_here("sdpo", tmp_path / "on", tiny, judge)
    off = run_here("sdpo", tmp_path / "off", tiny, f"{judge} --mini-batch 1 --lr 1e-2")
    assert all(r["distill/is_ratio_mean"] == pytest.approx(1, abs=1e-5) for r in on[1:])
    assert any(abs(r["distill/is_ratio_mean"] - 1) > 1e-2 for r in off[1:])
    assert all(r["rollout/logp_gap_max"] < 1e-4 for r in off[1:])  # of the first step alone


def test_a_masked_token_does_not_count_in_its_answers_mean(world):
    values = per_token(world, jsd)[0]
    part = world.samples[0]._replace(mask=[True, True, False, False, False])
    assert loss_of(world, [part]).item() == pytest.approx(sum(values[:2]) / 2 / 3, rel=1e-5)


def test_hindsight_that_never_fits_is_counted_and_nothing_is_learned(tiny, tmp_path, judge):
    flags = f"{judge} --steps 1 --hindsight feedback --max-teacher-tokens 10"
    row = run_here("sdpo", tmp_path / "r", tiny, flags)[1]
    assert (row["teacher/dropped_prompts"], row["distill/active_frac"]) == (24, 0)


def test_the_teachers_accuracy_is_that_of_its_own_answers(tiny, tmp_path, judge, monkeypatch):
    """At step 1 and evaluations; the teacher answers contexts, which moves nothing else."""
    calls = []
    watch(monkeypatch, common.Sampler, "__call__", lambda args, answers: calls.append((*args[1:5], answers)))
    flags = f"{judge} --steps 5 --eval-every 2 --hindsight feedback"
    rows = run_here("sdpo", tmp_path / "r", tiny, f"{flags} --teacher-samples 12")
    assert [r["step"] for r in rows if "teacher/accuracy" in r] == [1, 2, 4, 5]
    asked = [call for call in calls if call[3][0] == sdpo.TEACHER_STREAM]
    text, verdicts = toy.make_tokenizer(), []
    for _, prompts, keys, _, answers in asked:
        assert 0 < len(set(keys)) == len(prompts) <= 12
        assert all("earlier attempt" in text.decode(p) for p in prompts)
        said = [text.decode(y.ids, skip_special_tokens=True) for y in answers]
        verdicts.append(sum(sum(map(ord, words)) % 4 == 0 for words in said) / len(said))
    assert [r["teacher/accuracy"] for r in rows if "teacher/accuracy" in r] == verdicts
    assert len({id(model) for model, *_ in asked}) == 1
    assert len({common.EVAL_STREAM, common.TRAIN_STREAM, sdpo.TEACHER_STREAM}) == 3
    without = run_here("sdpo", tmp_path / "0", tiny, f"{flags} --teacher-samples 0")
    assert not any("teacher/accuracy" in r for r in without)
    assert [r["train/loss"] for r in rows[1:]] == [r["train/loss"] for r in without[1:]]


@pytest.mark.parametrize("flags", ["", "--policy-weight 0.5"])
def test_the_printed_sample_is_the_one_whose_statistics_stand_beside_it(flags, tiny, tmp_path, monkeypatch):
    """In a mixed batch too, where only the attempts with hindsight have a divergence."""
    judge = tmp_path / "judge.py"
    judge.write_text("def judge(completion, row):\n    return float(sum(map(ord, completion)) % 3 == 0)\n")
    printed, micros = [], []
    watch(monkeypatch, sdpo, "explain", lambda args, _: printed.append(args[1:]))
    watch(monkeypatch, sdpo, "sdpo_loss", lambda args, _: micros.append(args[3]))
    by_hindsight = {"key": lambda s: s.context is not None}
    monkeypatch.setattr(sdpo, "micro_batches", lambda run, samples: [sorted(samples, **by_hindsight)])
    more = f"--verifier {judge}:judge --hindsight solution --rollouts 4 --teacher-samples 0 {flags}"
    run_here("sdpo", tmp_path / "r", tiny, more)
    [(prompts, y, stats)] = printed
    if flags:
        assert any(s.context is None for micro in micros for s in micro)
    told = next(told for micro in micros if (told := [s for s in micro if s.context]))
    assert (prompts["student reads"], prompts["teacher reads"], y) == told[0][1:4]
    assert len(stats["logp"]) == sum(len(s.y) for s in told)
    assert stats["logp"][: len(y)].tolist() == pytest.approx(told[0].logps, abs=1e-4)


# ---- Code, end to end: problems with tests, and a scripted policy in place of a model that cannot program


def say(question, i):
    """Attempt i; the last solves question 1."""
    bodies = ["return x", "raise KeyError(7)", "while True: pass", "return 2 * x"]
    *wrong, right = [f"```python\ndef double(x):\n    {body}\n```" for body in bodies]
    return [*wrong, "No code.", right if question == 1 else "I give up."][i]


def test_code_runs_end_to_end(tmp_path, monkeypatch):
    """The teacher reads a program that passed, or what the tests said about this very attempt."""
    tokenizer = byte_tokenizer()
    shape = dict(vocab_size=len(tokenizer), eos_token_id=0, pad_token_id=0, max_position_embeddings=4096)
    tokenizer.save_pretrained(make_model(tmp_path / "m", **shape))
    tests = {"inputs": ["3"], "outputs": ["6"], "testtype": "functional", "fn_name": "double"}
    lines = [{"prompt": f"Question {i}.", "tests": {**tests, "time_limit": 1}} for i in (1, 2)]
    (tmp_path / "code.jsonl").write_text("\n".join(map(json.dumps, lines)))

    def scripted(self, model, prompts, keys, stream, how):
        texts = [say(*key) for key in keys]
        return [Rollout(tokenizer(t)["input_ids"] + [0], [-1.0] * (len(t) + 1), True) for t in texts]

    monkeypatch.setattr(common.Sampler, "__call__", scripted)
    seen = []
    watch(monkeypatch, Teacher, "targets", lambda args, _: seen.extend(args[1]))
    flags = (
        f"--preset lcb --model {tmp_path}/m --data {tmp_path}/code.jsonl --out {tmp_path}/r --rollouts 5 "
        "--chat-kwargs {} --prompts-per-step 2 --mini-batch 1 --steps 1 --teacher-samples 0 --unsafe-code"
    )
    sdpo.main(parse_args(Args, PRESETS, flags.split()))
    row = metrics_of(tmp_path / "r")[-1]
    assert row["rollout/reward"] == 1 / 10
    assert row["distill/active_frac"] == 9 / 10  # a lone success has nobody to learn from
    pairs = [(tokenizer.decode(context), tokenizer.decode(y[:-1])) for context, y in seen]
    shown = {text for text, _ in pairs if "1." in text}
    assert shown == {f"Question 1.\nCorrect solution:\n\n{say(1, 4)}{END}>"}
    told = {y: text for text, y in pairs if text.startswith(f"Question 2.{FEEDBACK}")}
    wrong, error, late, no_code, give_up = (told[say(2, i)] for i in range(5))
    assert "Input\n3\n" in wrong and "Expected\n6\n" in wrong
    assert "KeyError: 7" in error
    assert "Time Limit Exceeded" in late
    assert "Incorrect Format: Put your code inside a ```python ... ``` block." in no_code
    assert give_up == no_code


# ---- Test time: one question, until it is solved

SOLVER = """
import collections
calls = collections.Counter()
def solver(completion, row):
    calls[row["id"]] += row["where"].startswith("data")  # not in evaluations
    n = calls[row["id"]]
    return float(n == 11), f"4:{n % 10};"
"""


@pytest.fixture
def solver(tmp_path, monkeypatch):
    """Flags with which the 11th attempt at a question solves it, and the prompts that were sampled from."""
    (tmp_path / "solver.py").write_text(SOLVER)
    prompts = []

    def see(args, _):
        _, _, asked, keys, stream, _ = args
        if stream[0] == common.TRAIN_STREAM:
            assert [row for row, _ in keys] == [7] * 4 and all(prompt == asked[0] for prompt in asked)
            prompts.append(asked[0])

    watch(monkeypatch, common.Sampler, "__call__", see)
    return (
        f"--verifier {tmp_path}/solver.py:solver --question 7 --prompts-per-step 1 --rollouts 4 --steps 9 "
        "--hindsight feedback --teacher-samples 0 --max-teacher-tokens 200 --chat-kwargs {} --search"
    ), prompts


def found(rows):
    return [(r["step"], r["search/attempts"], r["search/solved"]) for r in rows[1:]]


@pytest.mark.parametrize("search", ["sdpo", "best_of_k", "multi_turn", "multi_turn --max-teacher-tokens 5"])
def test_the_search_ends_with_the_first_success(search, solver, tiny, tmp_path, monkeypatch):
    """Four attempts a step, the 11th solves; nobody trains on the last group. The baselines never train."""
    (flags, prompts), steps = solver, []
    monkeypatch.setitem(PRESETS["toy"], "template", sdpo.REPROMPT)
    watch(monkeypatch, sdpo, "optimizer_step", lambda *_: steps.append(1))
    rows = run_here("sdpo", tmp_path / "r", tiny, f"{flags} {search}")
    assert found(rows) == [(1, 4, 0), (2, 8, 0), (3, 11, 1)]
    assert json.loads((tmp_path / "r" / "solution.json").read_text())["attempt"] == 11
    assert len(steps) == (2 if search == "sdpo" else 0)
    texts = [toy.make_tokenizer().decode(prompt) for prompt in prompts]
    if search == "multi_turn":  # the paper's template with the baseline's blank line
        question, end = texts[0].removesuffix("<|end|><|assistant|>"), f"{END}<|end|><|assistant|>"
        pieces = [f"4:{i};" for i in range(1, 9)]
        assert texts[1:] == [f"{question}\n{FEEDBACK}" + "\n\n".join(pieces[:n]) + end for n in (4, 8)]
    else:
        assert len(set(texts)) == 1
    again = run_here("sdpo", tmp_path / "r", tiny, f"{flags} {search} --resume")
    assert again == rows  # solved: nothing is asked or deleted
    with pytest.raises(InputError, match="already holds a run"):
        run_here("sdpo", tmp_path / "r", tiny, f"{flags} {search}")

    # Stopped and resumed it keeps its log, and asks as it would have.
    asked = prompts.copy()
    prompts.clear()
    common.load_file.cache_clear()
    with monkeypatch.context() as patch:
        watch(patch, sdpo, "grade_groups", lambda args, _: setattr(args[0], "stopped", len(prompts) == 2))
        stopped = run_here("sdpo", tmp_path / "s", tiny, f"{flags} {search}")
    assert [r["step"] for r in stopped] == [0, 1, 2]
    resumed = run_here("sdpo", tmp_path / "s", tiny, f"{flags} {search} --resume")
    assert resumed[:3] == stopped and found(resumed) == found(rows)
    assert prompts == asked


@pytest.mark.parametrize("limit, pieces", [(200, 9), (50, 5)])
def test_multi_turn_reads_the_newest_feedback_that_fits(limit, pieces):
    history = [f"{i}:no;" for i in range(9)]
    told = read("mul:12", "", *history, max_teacher_tokens=limit, template=sdpo.MULTI_TURN)
    shown = "\n\n".join(history[-pieces:])
    assert told == f"<|user|>mul:12\n{FEEDBACK}{shown}{END}<|end|><|assistant|>"
    assert limit - 5 < size(told) <= limit or pieces == 9


WRONG = f"""
--rollouts 1 --hindsight solution | a group of one
--rollouts 1 --policy-weight 1 | a group of one
--mini-batch 3 | must divide --prompts-per-step
--support student_topk --topk 1000 | --topk 1000: the vocabulary has
--support sampled | needs --divergence reverse_kl
--advantage-clip 5 | needs --divergence reverse_kl
--question 1 | add --prompts-per-step 1
--search best_of_k | add --question
--question 99 --prompts-per-step 1 | --question 99: the rows of .* are 1 to 24
--template {{prompt}} | placeholders {{feedback}}, {{solution}}
--template {{prompt}}{{solution}} | placeholders {{feedback}}$
--template {TURNS.replace(" ", "")[:-1]} | expected text or chat messages
"""


@pytest.mark.parametrize("case", WRONG.strip().split("\n"))
def test_flags_that_cannot_mean_what_they_say(case, tiny, tmp_path):
    flags, message = case.split(" | ")
    with pytest.raises(InputError, match=message):
        run_here("sdpo", tmp_path / "r", tiny, flags)


WAYS = """
    --divergence reverse_kl --advantage-clip 0.1 | --divergence reverse_kl --support student_topk --topk 5
    --divergence reverse_kl --support sampled | --teacher trust_region | --teacher base | --teacher live
    --lora-rank 2 | --policy-weight 0.9 | --average token | --entropy-quantile 0.5 | --mask-truncated
    --hindsight feedback | --hindsight both
"""


@pytest.mark.parametrize("flags", [flags.strip() for flags in WAYS.strip().replace("\n", "|").split("|")])
def test_every_way_runs(flags, tiny, tmp_path, judge):
    rows = run_here("sdpo", tmp_path / "r", tiny, f"{judge} --steps 2 {flags}")
    assert all(math.isfinite(r["train/loss"]) and r["train/grad_norm"] > 0 for r in rows[1:])


def test_presets_have_the_papers_values_that_are_in_no_table():
    """Tables 12 and 13, and the authors' yaml; tests/test_settings.py holds the others."""
    for name in ("sciknoweval", "tooluse"):
        a = parse_args(Args, PRESETS, ["--preset", name])
        assert (a.epochs, a.chat_kwargs) == (30.0, {"enable_thinking": False})
    for name in ("lcb", "ttt"):
        a = parse_args(Args, PRESETS, ["--preset", name])
        assert (a.hindsight, a.is_cap, a.success) == ("solution_or_feedback", 2.0, 0.5)
        assert (a.max_prompt_tokens, a.max_completion_tokens, a.max_teacher_tokens) == (2048, 8192, 10240)
        assert sdpo.objective_of(a).tail and sdpo.objective_of(a).beta == 0.5
    assert a.search == "sdpo"
    assert (sdpo.CLIP_LOW, sdpo.CLIP_HIGH) == (0.2, 0.28)
