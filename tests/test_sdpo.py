"""SDPO: who is shown whose success, which samples carry a signal, and how GRPO, the teacher and the KL enter the loss."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model, run_here

import common
import sdpo
import toy
from common import InputError, Rollout, Run, Teacher, load_model, on_completions, parse
from sdpo import PRESETS, Args, Sample, advantages, distill_weights, grpo_loss, hindsight, sdpo_loss, teacher_ids, to_row

GROUP = [("a", 0.0, "fa"), ("b", 1.0, ""), ("c", 0.0, ""), ("<think>x</think>\nd", 1.0, "fd")]
KEY = (0, 1, 2, 3)


# ---- What the teacher reads

def chat(text, **flags):
    row = to_row({"prompt": "mul:12"})
    return toy.make_tokenizer().decode(teacher_ids(row, *text, toy.make_tokenizer(), Args(**{"teacher_chat_kwargs": {}, **flags})))


def test_templates_are_the_papers():
    """The yaml's: no blank line before "Correct solution:", nothing after the last sentence."""
    wrap = lambda text: f"<|user|>mul:12{text}\n\nCorrectly solve the original question.<|end|><|assistant|>"
    assert chat(("34", "")) == wrap("\nCorrect solution:\n\n34")
    feedback = "\nThe following is feedback from your unsuccessful earlier attempt:\n\n4:no;"
    assert chat(("", "4:no;")) == wrap(feedback) and chat(("34", "4:no;")) == wrap("\nCorrect solution:\n\n34" + feedback)
    assert chat(("", "")) == ""


def test_an_attempt_is_never_its_own_solution():
    """Trap 43: the first other success; a lone success learns from nobody; random is seeded."""
    args = Args(feedback_when="never")
    assert [hindsight(GROUP, i, KEY, args)[0] for i in range(4)] == ["b", "d", "b", "b"]
    assert [hindsight(GROUP[:3], i, KEY, args)[0] for i in range(3)] == ["b", "", "b"]
    group = [(str(i), 1.0, "") for i in range(6)]
    picks = {hindsight(group, 0, (0, step), Args(solution_from="random"))[0] for step in range(40)}
    assert picks == {"1", "2", "3", "4", "5"}
    assert hindsight(group, 0, (0, 7), Args(solution_from="random")) == hindsight(group, 0, (0, 7), Args(solution_from="random"))
    assert hindsight(GROUP, 0, KEY, Args(solution_from="none"))[0] == ""


@pytest.mark.parametrize("when, on, want", [
    ("no_solution", "wrong", ["", "", "", ""]), ("always", "wrong", ["fa", "", "", ""]), ("always", "all", ["fa", "", "", "fd"]), ("never", "all", [""] * 4)])
def test_when_feedback_is_shown(when, on, want):
    assert [hindsight(GROUP, i, KEY, Args(feedback_when=when, feedback_on=on))[1] for i in range(4)] == want


def test_feedback_alone_stands_in_where_no_other_attempt_succeeded():
    lone = [("a", 0.0, "fa"), ("d", 1.0, "fd")]
    assert hindsight(lone, 0, KEY, Args()) == ("d", "") and hindsight(lone, 1, KEY, Args()) == ("", "")
    assert hindsight(lone, 1, KEY, Args(feedback_on="all")) == ("", "fd")


def test_thinking_leaves_solutions_only_by_flag():
    """Trap 20."""
    assert hindsight(GROUP, 1, KEY, Args())[0] == "d" and hindsight(GROUP, 1, KEY, Args(remove_thinking=False))[0] == "<think>x</think>\nd"


@pytest.mark.parametrize("reward, solved", [(0.5, True), (0.49, False), (0.99999, True)])
def test_success_threshold(reward, solved):
    """Trap 45: at least .5."""
    assert (hindsight([("a", 0.0, ""), ("b", reward, "")], 0, KEY, Args())[0] == "b") == solved


def test_a_long_solution_loses_its_own_end():
    """Trap 17: question, sentence and generation prompt stay; what cannot fit at all is no signal."""
    short = chat(("0123456789" * 5, ""), max_teacher_tokens=30)
    assert short.startswith("<|user|>mul:12\nCorrect solution:\n\n012") and short.endswith("\n\nCorrectly solve the original question.<|end|><|assistant|>")
    assert len(toy.make_tokenizer()(short)["input_ids"]) == 30
    assert chat(("1" * 50, ""), max_teacher_tokens=10) == "" and chat(("", "4:no;" * 20), max_teacher_tokens=30) == ""


RAW = {"question": "Q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "A", "details": {"level": "L3"}, "type": "mcq-2-choices"}


def test_rows_of_the_papers_data_sets():
    assert to_row(RAW)["prompt"][1]["content"] == "Q\n\nA: x\nB: y\nPlease reason step by step."
    assert [m["role"] for m in to_row({"prompt": "p", "system": "s", "answer": "A", "kind": "mcq"})["prompt"]] == ["system", "user"]
    assert to_row({"prompt": "p", "system": "", "answer": "[]"})["prompt"] == [{"role": "user", "content": "p"}]


def test_raw_sciknoweval_is_filtered_then_split_as_the_authors_did(tmp_path):
    """Level L3 and two or four options; of what is left nine tenths train and one tenth test, by the library's own split, seed 42."""
    import datasets
    raws = [{**RAW, "question": f"{i}", "details": {"level": "L3" if i % 5 else "L1"}, "type": "true_or_false" if i % 7 == 0 else "mcq-2-choices"} for i in range(60)]
    (tmp_path / "raw.jsonl").write_text("".join(json.dumps(raw) + "\n" for raw in raws))
    kept = [i for i in range(60) if i % 5 and i % 7]
    want = datasets.Dataset.from_dict({"i": kept}).train_test_split(test_size=0.1, seed=42)
    for part in ("train", "test"):
        rows = common.load_rows(f"{tmp_path}/raw.jsonl#{part}", to_row)
        assert [row["id"] - 1 for row in rows] == want[part]["i"] and rows[0]["where"] == f"raw.jsonl:{rows[0]['id']}"
    (tmp_path / "none.jsonl").write_text(json.dumps(raws[0]) + "\n")
    with pytest.raises(InputError, match="no rows in it after the filter of its data set"):
        common.load_rows(f"{tmp_path}/none.jsonl", to_row)


def test_raw_livecodebench_trains_on_half_of_the_private_tests():
    """Section 2.7: contests of February to April 2025; evaluation takes all tests, training half of the private ones, at least one."""
    case = lambda i: {"input": str(i), "output": str(i), "testtype": "stdin"}
    raw = {"question_content": "q", "starter_code": "", "contest_date": "2025-02-01T00:00:00", "metadata": "{}",
           "public_test_cases": json.dumps([case(0)]), "private_test_cases": json.dumps([case(i) for i in range(1, 11)])}
    assert len(to_row(raw)["tests"]["inputs"]) == 11
    half = to_row(raw, train=True)["tests"]["inputs"]
    assert half[0] == "0" and len(half) == 6 and half == to_row(raw, train=True)["tests"]["inputs"] and half[1:] == sorted(half[1:], key=int)
    assert len(to_row({**raw, "private_test_cases": json.dumps([case(1)])}, train=True)["tests"]["inputs"]) == 2
    for date in ("2025-01-31", "2025-05-01"):
        assert to_row({**raw, "contest_date": date}) is None


# ---- The loss

def test_advantages_and_their_clip():
    """Eq. 12-13: no standard deviation by default; the clip is .2 down and .28 up, and only where it lowers the objective."""
    assert advantages([1.0, 0.0, 0.0, 0.0], std=False) == [0.75, -0.25, -0.25, -0.25]
    assert advantages([1.0, 0.0], std=True) == pytest.approx([1.0, -1.0], abs=1e-5) and advantages([1.0, 1.0], std=True) == [0.0, 0.0]
    ratio, A = torch.tensor([1.5, 0.5, 1.5, 0.5]), torch.tensor([1.0, 1.0, -1.0, -1.0])
    assert grpo_loss(ratio.log(), torch.zeros(4), A, Args()).tolist() == pytest.approx([-1.28, -0.5, 1.5, 0.8])


def test_samples_without_a_signal_count_as_zeros():
    """The code's effective average: 1/N over all attempts. Trap 7 is the choice --average token."""
    sample = lambda mask: Sample({}, [], [], [1] * len(mask), [], mask, 0.0)
    assert distill_weights(sample([True] * 4), 8, 20, "sequence") == [1 / 32] * 4
    assert distill_weights(sample([True] * 4), 8, 20, "token") == [1 / 20] * 4
    assert distill_weights(sample([False] * 4), 8, 20, "sequence") == distill_weights(sample([False] * 4), 8, 20, "token") == [0] * 4


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    run = Run(SimpleNamespace(out="/nowhere", dtype="auto"))
    folder = tmp_path_factory.mktemp("world")
    student = load_model(str(make_model(folder / "m")), run)
    teacher = Teacher(str(make_model(folder / "t", seed=3)), 0.0, student, run)
    ys = [[30, 31, 32, 33, 5], [34, 35, 5]]
    samples = [Sample({}, p, c, y, [-3.0, -4.0, -5.0, -2.0, -6.0][:len(y)], [True] * len(y), a)
               for p, c, y, a in zip([[3, 20, 5, 4], [3, 21, 22, 5, 4]], [[3, 20, 40, 41, 5, 4], [3, 43, 5, 4]], ys, [0.75, -0.25])]
    return SimpleNamespace(run=run, student=student, teacher=teacher, samples=samples)


def loss_of(world, **flags):
    args = Args(**{"support": "full", "is_cap": 0.0, **flags})
    targets, initial = world.teacher.targets([(s.context, s.y) for s in world.samples]), world.teacher.targets([(s.prompt, s.y) for s in world.samples])
    weight_N = torch.tensor([w for s in world.samples for w in distill_weights(s, 2, 8, args.average)])
    return on_completions(world.student, [(s.prompt, s.y) for s in world.samples], args,
                          lambda h, head: sdpo_loss(h, head, targets, initial, world.samples, weight_N, 8, args))


def logps(model, prompt, y):
    with torch.no_grad():
        return model(torch.tensor([prompt + y])).logits[0, len(prompt) - 1:-1].double().log_softmax(-1)


def per_token(world, f):
    return [[f(p, q, t) for t, (p, q) in enumerate(zip(logps(world.student, s.prompt, s.y), logps(world.teacher.model, s.context, s.y)))] for s in world.samples]


def jsd(p, q, t):
    m = ((p.exp() + q.exp()) / 2).log()
    return (((p.exp() * (p - m)).sum() + (q.exp() * (q - m)).sum()) / 2).item()


def test_default_loss_by_hand(world):
    """JSD 1/2, mean over tokens, then over sequences; on the student's top 100 and a tail when the vocabulary is larger."""
    want = sum(sum(d) / len(d) for d in per_token(world, jsd)) / 2
    assert loss_of(world)[0].item() == pytest.approx(want, rel=1e-5)

    def top_and_tail(p, q, t):
        index = p.topk(5).indices
        bucket = lambda x: torch.cat([x[index], (1 - x[index].exp().sum()).log()[None]])
        return jsd(bucket(p), bucket(q), t)
    want = sum(sum(d) / len(d) for d in per_token(world, top_and_tail)) / 2
    assert loss_of(world, support="student_topk", topk=5)[0].item() == pytest.approx(want, rel=1e-4)


def test_grpo_by_hand_and_the_blend(world):
    """lambda = 1 is GRPO alone, a token mean over all attempts; between, Eq. 3 is linear."""
    want = 0.0
    for s in world.samples:
        logp = logps(world.student, s.prompt, s.y).gather(1, torch.tensor(s.y)[:, None])[:, 0]
        ratio = (logp - torch.tensor(s.logps)).exp()
        want -= torch.minimum(ratio * s.advantage, ratio.clamp(0.8, 1.28) * s.advantage).sum().item() / 8
    grpo, sdpo_ = loss_of(world, policy_weight=1.0)[0].item(), loss_of(world)[0].item()
    assert grpo == pytest.approx(want, rel=1e-5)
    assert loss_of(world, policy_weight=0.9)[0].item() == pytest.approx(0.9 * grpo + 0.1 * sdpo_, rel=1e-5)


def test_kl_to_the_initial_model_is_really_applied(world):
    kl = sum((p.exp() * (p - q)).sum().item() for s in world.samples
             for p, q in zip(logps(world.student, s.prompt, s.y), logps(world.teacher.model, s.prompt, s.y))) / 8
    assert loss_of(world, kl_coef=0.3)[0].item() - loss_of(world)[0].item() == pytest.approx(0.3 * kl, rel=1e-4)


def test_advantages_are_clipped_by_flag(world):
    """Table 12: the log-ratio of student and teacher counts up to +-clip."""
    clipped = lambda p, q, t: (p.exp() * (p - q).clamp(-0.5, 0.5)).sum().item()
    want = sum(sum(d) / len(d) for d in per_token(world, clipped)) / 2
    assert loss_of(world, divergence="reverse_kl", advantage_clip=0.5)[0].item() == pytest.approx(want, rel=1e-5)
    assert abs(loss_of(world, divergence="reverse_kl")[0].item() - want) > 1e-2


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_importance_ratio_by_hand(world, level):
    """Trap 40: min(student / sampler, cap), for each token or as its mean over the attempt."""
    want = 0.0
    for s, D in zip(world.samples, per_token(world, jsd)):
        logp = logps(world.student, s.prompt, s.y).gather(1, torch.tensor(s.y)[:, None])[:, 0]
        r = (logp - torch.tensor(s.logps)).exp().clamp(max=2.0)
        r = r if level == "token" else r.mean().expand(len(r))
        want += (r * torch.tensor(D)).mean().item() / 2
    assert loss_of(world, is_cap=2.0, is_level=level)[0].item() == pytest.approx(want, rel=1e-5) != loss_of(world)[0].item()


# ---- The loop

JUDGE = "def judge(completion, row):\n    n = sum(map(ord, completion)) % {}\n    return (float(n == 0), f'4:{{n % 10}};')\n"


@pytest.fixture
def judge(tmp_path):
    """Rewards some attempts, by their text alone; feedback for all."""
    (tmp_path / "judge.py").write_text(JUDGE.format(4))
    return f"--verifier {tmp_path}/judge.py:judge"


def test_teacher_moves_once_per_batch_and_weights_once_per_mini_batch(tiny, tmp_path, judge, monkeypatch):
    calls = []
    update, step = Teacher.update, sdpo.optimizer_step
    monkeypatch.setattr(Teacher, "update", lambda self: (calls.append("teacher"), update(self))[1])
    monkeypatch.setattr(sdpo, "optimizer_step", lambda *a: (calls.append("step"), step(*a))[1])
    score = sdpo.on_completions
    monkeypatch.setattr(sdpo, "on_completions", lambda model, pairs, *rest: (calls.append(pairs), score(model, pairs, *rest))[1])
    run_here("sdpo", tmp_path / "r", tiny, f"{judge} --steps 2 --mini-batch 2 --prompts-per-step 4 --solution-from none --feedback-on all")
    assert [c for c in calls if isinstance(c, str)] == ["step", "step", "teacher"] * 2
    parts = [c for c in calls if not isinstance(c, str)]
    assert [len(part) for part in parts] == [6] * 4          # two questions of three attempts, each question in one mini-batch only
    for first, second in (parts[:2], parts[2:]):
        assert not {tuple(prompt) for prompt, _ in first} & {tuple(prompt) for prompt, _ in second}


def test_scored_pairs_belong_together(tiny, tmp_path, judge, monkeypatch):
    """Traps 18, 44 and 46: every context holds its own question, and no attempt's own text as its solution."""
    seen, targets = [], Teacher.targets
    monkeypatch.setattr(Teacher, "targets", lambda self, pairs: (seen.extend(pairs), targets(self, pairs))[1])
    scored, score = [], sdpo.on_completions
    monkeypatch.setattr(sdpo, "on_completions", lambda model, pairs, *rest: (scored.extend(pairs), score(model, pairs, *rest))[1])
    run_here("sdpo", tmp_path / "r", tiny, f"{judge} --steps 2")
    tokenizer = toy.make_tokenizer()
    assert len(seen) == len(scored) > 8
    for (context, y), (prompt, y_again) in zip(seen, scored):
        question, text = tokenizer.decode(prompt)[:-len("<|end|><|assistant|>")], tokenizer.decode(context)
        assert y == y_again and text.startswith(question + "\n") and "Correctly solve" not in tokenizer.decode(prompt)
        solution = text.partition("Correct solution:\n\n")[2].partition("\n\nCorrectly")[0]
        assert not solution or solution != tokenizer.decode(y, skip_special_tokens=True)


def test_answers_cut_off_are_dropped_when_asked(tiny, tmp_path, judge):
    """Trap 13."""
    kept, dropped = (run_here("sdpo", tmp_path / how, tiny, f"{judge} --steps 1 --cut-off {how}")[1] for how in ("keep", "drop"))
    assert 0 < kept["rollout/cut_frac"] == dropped["rollout/cut_frac"] < 1
    assert kept["distill/active_frac"] > dropped["distill/active_frac"] > 0
    assert dropped["distill/active_frac"] <= 1 - dropped["rollout/cut_frac"] + 1e-9


def test_grpo_alone_asks_no_teacher(tiny, tmp_path, judge, monkeypatch):
    monkeypatch.setattr(Teacher, "targets", lambda self, pairs: pytest.fail("a teacher was asked"))
    rows = run_here("sdpo", tmp_path / "r", tiny, f"{judge} --policy-weight 1")
    assert all(r["train/grad_norm"] > 0 and r["teacher/distance"] == 0 for r in rows[1:])


def test_a_step_without_a_signal_costs_no_forward_and_changes_nothing(tiny, tmp_path, monkeypatch, capsys):
    """Trap 8, counted, and advice after ten in a row."""
    (tmp_path / "never.py").write_text("def never(completion, row):\n    return 0.0\n")
    monkeypatch.setattr(sdpo, "on_completions", lambda *a: pytest.fail("a forward without a signal"))
    rows = run_here("sdpo", tmp_path / "r", tiny, f"--verifier {tmp_path}/never.py:never --steps 11")
    assert all(r["distill/active_frac"] == r["train/loss"] == r["teacher/distance"] == 0 for r in rows[1:])
    assert capsys.readouterr().out.count("ten steps in a row without any signal") == 1


def test_stale_rollouts_make_ratio_and_cap_bite(tiny, tmp_path, judge):
    """With several optimiser steps a batch the ratio leaves 1; on-policy it is 1."""
    on = run_here("sdpo", tmp_path / "on", tiny, judge)
    off = run_here("sdpo", tmp_path / "off", tiny, f"{judge} --mini-batch 1 --lr 1e-2")
    assert all(r["distill/is_ratio_mean"] == pytest.approx(1, abs=1e-5) for r in on[1:])
    assert any(abs(r["distill/is_ratio_mean"] - 1) > 1e-2 for r in off[1:])


def test_the_teachers_accuracy_is_that_of_its_own_answers(tiny, tmp_path, judge, monkeypatch):
    """At step 1 and at evaluations the teacher's model answers contexts, an even choice of those with a signal; sampling it moves nothing else."""
    asked, each = [], common.Sampler.each
    def watched(self, model, prompts, keys, stream, **how):
        answers = each(self, model, prompts, keys, stream, **how)
        if stream[0] == common.TEACHER_STREAM:
            asked.append((model, prompts, keys, answers))
        return answers
    monkeypatch.setattr(common.Sampler, "each", watched)
    flags = f"{judge} --steps 5 --eval-every 2 --solution-from none --feedback-on all"
    rows = run_here("sdpo", tmp_path / "r", tiny, f"{flags} --teacher-samples 8")
    assert [r["step"] for r in rows if "teacher/accuracy" in r] == [1, 2, 4] and len(asked) == 3
    text, verdicts = toy.make_tokenizer(), []
    for model, prompts, keys, answers in asked:
        assert len(prompts) == 8 and len(set(keys)) == 8 and all("earlier attempt" in text.decode(p) for p in prompts)
        verdicts.append(sum(sum(map(ord, text.decode(y.ids, skip_special_tokens=True))) % 4 == 0 for y in answers) / 8)
    assert [r["teacher/accuracy"] for r in rows if "teacher/accuracy" in r] == verdicts and len({id(model) for model, *_ in asked}) == 1
    without = run_here("sdpo", tmp_path / "0", tiny, f"{flags} --teacher-samples 0")
    assert not any("teacher/accuracy" in r for r in without) and [r["train/loss"] for r in rows[1:]] == [r["train/loss"] for r in without[1:]]


# ---- Code, end to end: problems with tests, and a scripted policy in place of a model that cannot program

PROBLEMS = [("add", "a, b", "a + b", "a - b", ["1\n2", "5\n7"], ["3", "12"]), ("double", "x", "2 * x", "x", ["3"], ["6"]),
            ("largest", "xs", "max(xs)", "min(xs)", ["[3, 9, 2]"], ["9"]), ("backwards", "s", "s[::-1]", "s", ['"abc"'], ['"cba"']),
            ("evens", "xs", "[x for x in xs if x % 2 == 0]", "xs", ["[1, 2, 3, 4]"], ["[2, 4]"]), ("length", "s", "len(s)", "0", ['"four"'], ["4"]),
            ("square", "x", "x ** 2", "x * 2", ["5"], ["25"]), ("total", "xs", "sum(xs)", "xs[0]", ["[4, 5, 6]"], ["15"]),
            ("is_even", "x", "x % 2 == 0", "x % 2 == 1", ["7"], ["false"]), ("join", "xs", "'-'.join(xs)", "''.join(xs)", ['["a", "b"]'], ['"a-b"'])]
BLOCK = "```python\ndef {}({}):\n    {}\n```"


def test_code_runs_end_to_end(tmp_path, monkeypatch):
    """Ten problems; every other one is solved by an attempt. The teacher reads that program, or what the tests said about this very one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    characters = {c: i for i, c in enumerate(["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(characters, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>", chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}>")
    make_model(tmp_path / "m", vocab_size=len(tokenizer), eos_token_id=0, pad_token_id=0, max_position_embeddings=4096)
    tokenizer.save_pretrained(tmp_path / "m")
    rows = [{"prompt": f"Write {name}({args}).", "tests": {"inputs": inputs, "outputs": outputs, "testtype": "functional", "fn_name": name, "time_limit": 1}}
            for name, args, _, _, inputs, outputs in PROBLEMS]
    (tmp_path / "code.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def say(number, i):
        name, args, right, wrong, *_ = PROBLEMS[number - 1]
        solved = BLOCK.format(name, args, f"return {right}") if number % 2 else "I give up."
        return [BLOCK.format(name, args, f"return {wrong}"), BLOCK.format(name, args, "raise KeyError(7)"), BLOCK.format(name, args, "while True: pass"),
                "No code.", solved][i]
    write = lambda text: Rollout(tokenizer(text)["input_ids"] + [0], [-1.0] * (len(text) + 1), True)
    monkeypatch.setattr(common.Sampler, "each", lambda self, model, prompts, keys, stream, **how: [write(say(*key)) for key in keys])
    seen, targets = [], Teacher.targets
    monkeypatch.setattr(Teacher, "targets", lambda self, pairs: (seen.extend(pairs), targets(self, pairs))[1])
    args = (f"--preset lcb --model {tmp_path}/m --data {tmp_path}/code.jsonl --out {tmp_path}/r --prompts-per-step 10 --rollouts 5 --mini-batch 1 --steps 1 "
            "--student-chat-kwargs {} --teacher-chat-kwargs {} --teacher-samples 0 --average token")
    sdpo.main(parse(Args, PRESETS, args.split()))
    row = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()][-1]
    assert row["rollout/reward"] == 5 / 50 and row["distill/active_frac"] == 45 / 50       # a lone success has nobody to learn from
    read = {(tokenizer.decode(y, skip_special_tokens=True), tokenizer.decode(context).split(").")[0]): tokenizer.decode(context) for context, y in seen}
    feedback = "\nThe following is feedback from your unsuccessful earlier attempt:\n\n"
    for number, (name, args, right, *_, inputs, outputs) in enumerate(PROBLEMS, 1):
        question = f"Write {name}({args}"
        end = "\n\nCorrectly solve the original question.>"
        if number % 2:
            shown = f"{question}).\nCorrect solution:\n\n{say(number, 4)}{end}"
            assert [read[say(number, i), question] for i in range(4)] == [shown] * 4
        else:
            wrong, error, late, no_code, give_up = (read[say(number, i), question].removeprefix(f"{question}).{feedback}").removesuffix(end) for i in range(5))
            assert wrong.startswith("Test Case 1: Wrong Answer\n\nInput\n" + inputs[0]) and wrong.endswith("Expected\n" + outputs[0])
            assert error.startswith("Runtime Error\nKeyError: 7") and late.startswith("Time Limit Exceeded\n\nLast Executed Input\n" + inputs[0])
            assert no_code == give_up == "Incorrect Format: Put your code inside a ```python ... ``` block."


# ---- Test time: one question, until it is solved

SOLVER = """import collections
calls = collections.Counter()
def solver(completion, row):
    calls[row["id"]] += "truncated" in row                   # not in evaluations
    return float(calls[row["id"]] == {}), f"4:{{calls[row['id']] % 10}};"
"""


@pytest.fixture
def solver(tmp_path):
    """The 11th attempt at a question solves it; feedback on all."""
    (tmp_path / "solver.py").write_text(SOLVER.format(11))
    return f"--verifier {tmp_path}/solver.py:solver --question 7 --prompts-per-step 1 --rollouts 4 --steps 9 --feedback-on all --teacher-samples 0"


@pytest.mark.parametrize("search", ["sdpo", "best_of_k", "multi_turn"])
def test_the_search_ends_with_the_first_success(search, solver, tiny, tmp_path, monkeypatch):
    """Four attempts a step, the 11th solves: three steps, and nobody trains on the last group. Baselines train never."""
    steps, prompts = [], []
    step, each = sdpo.optimizer_step, common.Sampler.each
    monkeypatch.setattr(sdpo, "optimizer_step", lambda *a: (steps.append(1), step(*a))[1])
    monkeypatch.setattr(sdpo, "grade", lambda run, verify, pairs: [verify(*pair) for pair in pairs])        # in order, so that the 11th call is attempt 11
    def watched(self, model, asked, keys, stream, **how):
        if stream[0] == common.TRAIN_STREAM:
            assert [row for row, _ in keys] == [7] * 4
            prompts.append({tuple(p) for p in asked})
        return each(self, model, asked, keys, stream, **how)
    monkeypatch.setattr(common.Sampler, "each", watched)
    rows = run_here("sdpo", tmp_path / "r", tiny, f"{solver} --search {search} --max-teacher-tokens 200 --teacher-chat-kwargs {{}}")
    assert [(r["search/attempts"], r["search/solved"]) for r in rows[1:]] == [(4, 0), (8, 0), (11, 1)]
    assert json.loads((tmp_path / "r" / "solution.json").read_text())["attempt"] == 11
    assert len(steps) == (2 if search == "sdpo" else 0) and all(len(p) == 1 for p in prompts)
    assert len(set.union(*prompts)) == (3 if search == "multi_turn" else 1)
    question, four, eight = (len(next(iter(p))) for p in prompts)
    assert search != "multi_turn" or eight - four == 4 * 5 < four - question        # four more pieces of feedback, each with a blank line


def test_multi_turn_reads_the_question_and_the_newest_feedback_that_fits():
    row, history = to_row({"prompt": "mul:12"}), [f"{i}:no;" for i in range(9)]
    read = lambda limit: toy.make_tokenizer().decode(sdpo.multi_turn_ids({**row, "prompt_ids": []}, history, toy.make_tokenizer(), Args(
        teacher_chat_kwargs={}, max_teacher_tokens=limit)))
    head, end = "<|user|>mul:12\n\nThe following is feedback from your unsuccessful earlier attempt:\n\n", "\n\nCorrectly solve the original question.<|end|><|assistant|>"
    assert read(200) == head + "\n\n".join(history) + end
    assert read(50) == head + "\n\n".join(history[-5:]) + end and 45 < len(toy.make_tokenizer()(read(50))["input_ids"]) <= 50


@pytest.mark.parametrize("flags, message", [
    ("--rollouts 1 --feedback-when never", "a group of one"), ("--rollouts 1 --policy-weight 1", "a group of one"),
    ("--solution-from none --feedback-when never", "nothing to read"), ("--mini-batch 3", "must divide --prompts-per-step"),
    ("--policy-weight 2", "--policy-weight 2.0: a share"), ("--support student_topk --topk 1000", "--topk 1000: the vocabulary has"),
    ("--temperature 0.5", "--is-cap compares"), ("--support sampled", "add --divergence reverse_kl"), ("--advantage-clip 5", "add --divergence reverse_kl"),
    ("--question 1", "add --prompts-per-step 1"), ("--search best_of_k", "name it with --question"),
    ("--question 99 --prompts-per-step 1", "has no such row; its rows are 1 to 24")])
def test_flags_that_cannot_mean_what_they_say(flags, message, tiny, tmp_path):
    with pytest.raises(InputError, match=message):
        run_here("sdpo", tmp_path / "r", tiny, flags)


@pytest.mark.parametrize("flags", ["--divergence reverse_kl --advantage-clip 0.1", "--teacher trust_region", "--teacher base", "--teacher live", "--lora-rank 2", "--divergence reverse_kl --support student_topk --topk 5",
                                   "--divergence reverse_kl --support sampled", "--policy-weight 0.9 --std-advantage", "--kl-coef 0.1", "--average token",
                                   "--entropy-quantile 0.5", "--solution-from none", "--cut-off drop"])
def test_every_way_runs(flags, tiny, tmp_path, judge):
    rows = run_here("sdpo", tmp_path / "r", tiny, f"{judge} --steps 2 {flags}")
    assert all(math.isfinite(r["train/loss"]) and r["train/grad_norm"] > 0 for r in rows[1:])


def test_presets_are_the_papers():
    """Tables 12 and 13, column of section 3; the authors' yaml where the paper is silent."""
    for name in ("sciknoweval", "tooluse"):
        a = parse(Args, PRESETS, ["--preset", name])
        assert (a.model, a.prompts_per_step, a.rollouts, a.mini_batch) == ("Qwen/Qwen3-8B", 32, 8, 0)
        assert (a.max_prompt_tokens, a.max_completion_tokens, a.max_teacher_tokens) == (2048, 8192, 10240)
        assert (a.temperature, a.top_p, a.top_k, a.divergence, a.beta, a.support, a.topk, a.tail) == (1.0, 1.0, 0, "jsd", 0.5, "student_topk", 100, True)
        assert (a.teacher, a.ema_rate, a.lr, a.schedule, a.warmup, a.weight_decay, a.grad_clip) == ("ema", 0.05, 1e-5, "constant", 10, 0.01, 1.0)
        assert (a.adam_betas, a.is_cap, a.is_level, a.eval_samples, a.eval_temperature, a.eval_top_p, a.eval_every) == ((0.9, 0.999), 2.0, "token", 16, 0.6, 0.95, 5)
        assert (a.clip_low, a.clip_high, a.std_advantage, a.kl_coef, a.epochs, a.feedback_when) == (0.2, 0.28, False, 0.0, 30.0, "never")
        assert a.student_chat_kwargs == a.teacher_chat_kwargs == {"enable_thinking": False} and a.average == "sequence"
    a = parse(Args, PRESETS, ["--preset", "ttt"])
    assert (a.prompts_per_step, a.rollouts, a.mini_batch, a.divergence, a.topk, a.ema_rate, a.lr, a.advantage_clip) == (1, 16, 1, "reverse_kl", 20, 0.01, 1e-6, 5.0)
    assert a.verifier == "code" and a.steps * a.rollouts == 2752 and a.search == "sdpo" and a.max_teacher_tokens == 10240
    a = parse(Args, PRESETS, ["--preset", "lcb"])
    assert (a.divergence, a.topk, a.tail, a.ema_rate, a.lr, a.warmup, a.mini_batch, a.eval_samples) == ("reverse_kl", 20, True, 0.01, 1e-6, 0, 1, 4)
    assert (a.verifier, a.feedback_when, a.feedback_on, a.is_cap, a.rollouts) == ("code", "no_solution", "wrong", 2.0, 8)
    assert common.SOLVED == 0.5
