"""SD-Zero: what the reviser reads, which copy of y carries the loss, and the contract with phase 1."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
import toy
from conftest import checkpoint, flags_of, make_model, part, run_here

import common
import sdzero
from common import (
    InputError,
    Reviser,
    Rollout,
    Run,
    Teacher,
    completion_states,
    head_of,
    load_model,
    parse_args,
)
from sdzero import PRESETS, Args, Sample, fresh_questions, sdzero_loss

TOKENIZER = toy.make_tokenizer()
WRONG, RIGHT = (
    "\n\nWait, this response is wrong. Let me correct it.\n\n",
    "\n\nLet me rephrase the above solution.\n\n",
)
REVISER = Reviser(RIGHT.strip(), WRONG.strip(), {}, [])


@pytest.fixture
def judge(tmp_path):
    """Answers of odd length are right."""
    (tmp_path / "judge.py").write_text("def judge(completion, row):\n    return float(len(completion) % 2)\n")
    return f"--verifier {tmp_path}/judge.py:judge"


def watch_teacher(monkeypatch):
    """The list that grows with every pair the teacher scores."""
    seen, targets = [], Teacher.targets

    def watched(self, pairs):
        seen.extend(pairs)
        return targets(self, pairs)

    monkeypatch.setattr(Teacher, "targets", watched)
    return seen


# ---- What the reviser reads


def test_the_reviser_reads_the_answer_its_verdict_and_the_answer_again(tiny, tmp_path, judge, monkeypatch):
    """x, y without its EOS, P_r; then y with its EOS, which both sides score. Right and wrong alike."""
    seen, scored = [], []
    targets, states = Teacher.targets, sdzero.completion_states

    def watched_targets(self, pairs):
        seen.extend(pairs)
        return targets(self, pairs)

    def watched_states(model, pairs):
        scored.extend(pairs)
        return states(model, pairs)

    monkeypatch.setattr(Teacher, "targets", watched_targets)
    monkeypatch.setattr(sdzero, "completion_states", watched_states)
    run_here("sdzero", tmp_path / "r", tiny, judge)
    verdicts = set()
    for (context, y), (prompt, y_again) in zip(seen, scored, strict=True):
        finished = y[-1] == TOKENIZER.eos_token_id
        solved = len(TOKENIZER.decode(y, skip_special_tokens=True)) % 2 == 1
        assert (
            y == y_again
            and context
            == prompt + (y[:-1] if finished else y) + TOKENIZER(RIGHT if solved else WRONG)["input_ids"]
        )
        verdicts.add((solved, finished))
    assert len(seen) == 24 and {solved for solved, _ in verdicts} == {True, False} == {
        finished for _, finished in verdicts
    }


def test_an_answer_too_long_to_be_read_twice_is_left_out_and_counted(tiny, tmp_path, judge, monkeypatch):
    """|x| + 2|y| + |P_r| over the limit: no loss, never a cut."""
    seen = watch_teacher(monkeypatch)
    rows = run_here("sdzero", tmp_path / "r", tiny, f"{judge} --max-teacher-tokens 60")
    dropped = sum(r["teacher/dropped_prompts"] for r in rows[1:])
    assert (
        0 < dropped < 24
        and len(seen) == 24 - dropped
        and all(len(context) + len(y) <= 60 for context, y in seen)
    )
    assert rows[1]["distill/active_frac"] == 1 - rows[1]["teacher/dropped_prompts"] / 8


# ---- The loss


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    run = Run(SimpleNamespace(out="/nowhere", dtype="auto", activation_checkpointing=False))
    folder = tmp_path_factory.mktemp("world")
    student = load_model(str(make_model(folder / "m")), run)
    teacher = Teacher(str(make_model(folder / "t", seed=3)), 0.0, student, run)
    x, phrase = [3, 20, 5, 4], TOKENIZER(WRONG)["input_ids"]
    ys = [[30, 31, 32, 33, 5], [34, 35, 5]]
    samples = [Sample(x, x + y[:-1] + phrase, y, [-3.0] * len(y), False) for y in ys]
    return SimpleNamespace(student=student, teacher=teacher, samples=samples, x=x, phrase=phrase)


def loss_of(world, samples=None, **flags):
    args, samples = Args(**flags), samples or world.samples
    targets = world.teacher.targets([(s.context, s.y) for s in samples])
    h_ND = completion_states(world.student, [(s.prompt, s.y) for s in samples])
    n = {"tokens": sum(len(s.y) for s in samples)}
    return sdzero_loss(h_ND, head_of(world.student), targets, samples, n, args)


def logps(model, before, y):
    with torch.no_grad():
        return model(torch.tensor([before + y])).logits[0, len(before) - 1 : -1].double().log_softmax(-1)


def by_hand(world, contexts, topk=64):
    """Half forward, half reverse KL on the reviser's likeliest tokens, renormalised; mean over tokens."""
    total = tokens = 0
    for s, context in zip(world.samples, contexts, strict=True):
        p, q = logps(world.student, s.prompt, s.y), logps(world.teacher.model, context, s.y)
        kept = q.topk(topk).indices
        p, q = p.gather(1, kept).log_softmax(-1), q.gather(1, kept).log_softmax(-1)
        total += ((q.exp() * (q - p)).sum() / 2 + (p.exp() * (p - q)).sum() / 2).item()
        tokens += len(s.y)
    return total / tokens


def test_the_default_loss_is_on_the_second_copy(world):
    """Trap 51: the teacher is aligned with its second copy of y; on the first one it says something else."""
    got = loss_of(world)[0].item()
    assert got == pytest.approx(by_hand(world, [s.context for s in world.samples]), rel=1e-5)
    assert abs(got - by_hand(world, [s.prompt for s in world.samples])) > 1e-2


def test_dropping_the_phrase_changes_the_loss_and_permuting_the_batch_does_not(world):
    got = loss_of(world)[0].item()
    without = [s._replace(context=s.context[: -len(world.phrase)]) for s in world.samples]
    assert abs(loss_of(world, without)[0].item() - got) > 1e-2
    assert loss_of(world, world.samples[::-1])[0].item() == pytest.approx(got, rel=1e-6)


def test_divergences_by_flag(world):
    p_q = [
        (logps(world.student, s.prompt, s.y), logps(world.teacher.model, s.context, s.y))
        for s in world.samples
    ]
    reverse = sum((p.exp() * (p - q)).sum().item() for p, q in p_q) / 8
    forward = sum((q.exp() * (q - p)).sum().item() for p, q in p_q) / 8
    assert loss_of(world, divergence="reverse_kl", support="full")[0].item() == pytest.approx(
        reverse, rel=1e-5
    )  # Eq. 4
    assert loss_of(world, divergence="forward_kl", support="full")[0].item() == pytest.approx(
        forward, rel=1e-5
    )


# ---- The contract with phase 1


def test_a_model_that_was_not_trained_to_revise_is_refused(tiny, tmp_path):
    """The official script's default silently skips phase 1."""
    with pytest.raises(
        InputError,
        match="no srt.json there, so it was not trained .*; run srt.py first .* --phrases paper",
    ):
        run_here("sdzero", tmp_path / "r", tiny, "--phrases srt.json")
    with pytest.raises(InputError, match="--model is missing"):
        sdzero.main(Args(data="x"))


def test_phase_two_finds_what_phase_one_wrote(tiny, tmp_path, monkeypatch):
    """Phrases and the questions, which are not asked again; the folder of phase 2 has them too."""
    run_here("srt", tmp_path / "srt", tiny, "--questions 10 --phrases olmo")
    seen = watch_teacher(monkeypatch)
    argv = (
        flags_of("sdzero", tmp_path / "r", tiny)
        .replace(f"--model {tiny.model}", f"--model {tmp_path}/srt/last")
        .replace("--phrases qwen", "--phrases srt.json")
    )
    sdzero.main(parse_args(Args, PRESETS, argv.split()))
    used = {
        tuple(json.loads(line)["prompt_ids"])
        for line in (tmp_path / "srt" / "revisions.jsonl").read_text().splitlines()
    }
    asked = {tuple(context[: context.index(4) + 1]) for context, _ in seen}  # up to <|assistant|>
    assert len(used) == 10 and not used & asked and len(asked) == 14
    wrong = TOKENIZER("\n\nWrong. I need to redo all.\n\n", add_special_tokens=False)["input_ids"]
    assert all(context[-len(wrong) :] == wrong for context, _ in seen)
    saved = json.loads((tmp_path / "r" / "last" / "srt.json").read_text())
    assert saved["wrong"] == "Wrong. I need to redo all." and len(saved["questions"]) == 10


def test_flags_that_contradict_srt_json_are_refused(tiny, tmp_path, capsys):
    """Other phrases or chat arguments than in phase 1; the same phrases keep its questions."""
    run_here("srt", tmp_path / "srt", tiny, "--questions 10 --phrases olmo --steps 1")
    flags = flags_of("sdzero", tmp_path / "r", tiny, f"--dry-run --model {tmp_path}/srt/last").split()
    with pytest.raises(
        InputError, match="--phrases qwen: .*srt.json was trained with .* leave --phrases out"
    ):
        sdzero.main(parse_args(Args, PRESETS, flags))
    with pytest.raises(InputError, match="--chat-kwargs .*: .* was trained with {}; use the same"):
        more = ["--phrases", "srt.json", "--chat-kwargs", '{"enable_thinking": true}']
        sdzero.main(parse_args(Args, PRESETS, [*flags, *more]))
    sdzero.main(parse_args(Args, PRESETS, [*flags, "--phrases", "olmo"]))
    assert "sdzero: 14 of 24 rows (10 used in phase 1" in capsys.readouterr().out


def test_questions_of_phase_1_are_not_asked_again(tiny, tmp_path, capsys):
    rows = common.load_rows(str(tiny.data), sdzero.competition_row)
    used = REVISER._replace(questions=[common.question_key(row["prompt"]) for row in rows])
    with pytest.raises(InputError, match="phase 1 used all 24 questions"):
        fresh_questions(rows, used, Args(data="d"))
    assert fresh_questions(rows, used._replace(questions=used.questions[5:]), Args()) == rows[:5]
    sdzero.main(
        parse_args(
            Args,
            PRESETS,
            [*flags_of("sdzero", tmp_path / "r", tiny).split(), "--questions", "3", "--dry-run"],
        )
    )
    assert "sdzero: 3 of 24 rows" in capsys.readouterr().out


# ---- The loop


def test_the_reviser_is_frozen_or_synchronised(tiny, tmp_path, judge):
    frozen = [
        r["teacher/distance"] for r in run_here("sdzero", tmp_path / "f", tiny, f"{judge} --steps 4")[1:]
    ]
    synced = [
        r["teacher/distance"]
        for r in run_here("sdzero", tmp_path / "s", tiny, f"{judge} --steps 4 --sync-every 2")[1:]
    ]
    assert 0 < frozen[0] < frozen[1] < frozen[2] < frozen[3] and frozen[0] == synced[0]
    assert synced[1] == synced[3] == 0 < synced[2]


def test_a_run_killed_between_two_syncs_resumes_with_the_same_numbers(tiny, tmp_path, judge, monkeypatch):
    """The checkpoint holds the reviser of the last sync: not the student, not the model at the start."""
    flags = f"{judge} --steps 6 --sync-every 2 --save-every 1"
    whole = run_here("sdzero", tmp_path / "whole", tiny, flags)
    log = Run.log

    def die_at_step_4(self, step, metrics):
        if step == 4:
            raise KeyboardInterrupt
        log(self, step, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", die_at_step_4)
        with pytest.raises(KeyboardInterrupt):
            run_here("sdzero", tmp_path / "r", tiny, flags)
    before, saved = checkpoint(tmp_path / "r", 2), checkpoint(tmp_path / "r", 3)
    for name, weights in part(saved, "teacher").items():
        assert torch.equal(weights, part(before, "student")[name])
    resumed = run_here("sdzero", tmp_path / "r", tiny, flags + " --resume")
    assert len(resumed) == len(whole) == 7
    for a, b in zip(resumed, whole, strict=True):
        assert all(a[name] == b[name] for name in b if not name.startswith(("time/", "memory/")))


def test_divergence_on_right_and_wrong_answers(tiny, tmp_path, judge):
    for r in run_here("sdzero", tmp_path / "r", tiny, judge)[1:]:
        low, high = sorted((r["distill/divergence_right"], r["distill/divergence_wrong"]))
        assert low < r["distill/divergence"] < high
    (tmp_path / "all.py").write_text("def right(completion, row):\n    return 1.0\n")
    for r in run_here("sdzero", tmp_path / "all", tiny, f"--verifier {tmp_path}/all.py:right")[1:]:
        assert r["distill/divergence_right"] == pytest.approx(r["distill/divergence"])
        assert r["distill/divergence_wrong"] == 0


def test_sampled_text_is_graded_not_the_phrase(tiny, tmp_path, monkeypatch):
    """The verdict is on y alone, and on each y of its own row."""
    rows = [json.loads(line) for line in tiny.data.read_text().splitlines()]

    def scripted(self, model, prompts, keys, stream, sampling):
        texts = [rows[row - 1]["answer"] if sample == 0 else "-" for row, sample in keys]
        ids = [TOKENIZER(text)["input_ids"] + [TOKENIZER.eos_token_id] for text in texts]
        return [Rollout(y, [-1.0] * len(y), True) for y in ids]

    monkeypatch.setattr(common.Sampler, "__call__", scripted)
    got = run_here("sdzero", tmp_path / "r", tiny, "--rollouts 2")
    assert [r["rollout/reward"] for r in got[1:]] == [0.5] * 3


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--support sampled", "needs --divergence reverse_kl"),
        ("--temperature -1", "expected a number at least 0"),
        ("--support teacher_topk --topk 1000", "the vocabulary has"),
    ],
)
def test_flags_that_cannot_mean_what_they_say(flags, message, tiny, tmp_path):
    with pytest.raises(InputError, match=message):
        run_here("sdzero", tmp_path / "r", tiny, flags)


@pytest.mark.parametrize(
    "flags",
    [
        "--divergence reverse_kl --support sampled",
        "--divergence jsd --support student_topk --topk 5",
        "--lora-rank 2",
        "--lora-rank 2 --sync-every 1",
        "--rollouts 2",
        "--mask-truncated",
        "--temperature 0.5",
    ],
)
def test_every_way_runs(flags, tiny, tmp_path, judge):
    rows = run_here("sdzero", tmp_path / "r", tiny, f"{judge} --steps 2 {flags}")
    assert all(math.isfinite(r["train/loss"]) and r["train/grad_norm"] > 0 for r in rows[1:])
    assert "revise/first" in rows[-1]


def test_without_evaluation_sets_nothing_is_measured(tiny, tmp_path, judge):
    argv = flags_of("sdzero", tmp_path / "r", tiny, f"{judge} --steps 1").replace(
        f"--eval-data {tiny.eval}", ""
    )
    sdzero.main(parse_args(Args, PRESETS, [*argv.split(), "--eval-data"]))
    rows = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert not any(name.startswith(("eval/", "revise/")) for row in rows for name in row)


def test_answers_cut_off_are_dropped_when_asked(tiny, tmp_path):
    """Trap 13."""
    kept = run_here("sdzero", tmp_path / "keep", tiny, "--steps 1")[1]
    dropped = run_here("sdzero", tmp_path / "drop", tiny, "--steps 1 --mask-truncated")[1]
    assert 0 < kept["rollout/cut_frac"] == dropped["rollout/cut_frac"] < 1
    assert kept["distill/active_frac"] == 1 and dropped["distill/active_frac"] == pytest.approx(
        1 - dropped["rollout/cut_frac"]
    )


def test_a_part_of_the_questions_is_drawn_by_the_seed(tiny, tmp_path, monkeypatch):
    """Not the first rows of the file; with 0 all of them, in their order."""
    seen, start = [], sdzero.start_run

    def watched(args, tokenizer, rows, to_row, graded):
        seen.append([row["id"] for row in rows])
        return start(args, tokenizer, rows, to_row, graded)

    monkeypatch.setattr(sdzero, "start_run", watched)
    for i, more in enumerate(("--questions 6", "--questions 6", "--questions 6 --seed 1", "", "--questions 99")):
        argv = [*flags_of("sdzero", tmp_path / str(i), tiny, more).split(), "--dry-run"]
        sdzero.main(parse_args(Args, PRESETS, argv))
    a, b, c, whole, more = seen
    assert a == b and len(set(a)) == 6 and a != c and sorted(a) != list(range(1, 7))
    assert whole == more == list(range(1, 25))


def test_evaluation_may_have_a_limit_of_its_own(tiny, tmp_path, monkeypatch):
    limits, sample = {}, common.Sampler.__call__

    def watched(self, model, prompts, keys, stream, how):
        limits.setdefault(stream[0], set()).add(how.max_tokens)
        return sample(self, model, prompts, keys, stream, how)

    monkeypatch.setattr(common.Sampler, "__call__", watched)
    run_here("sdzero", tmp_path / "r", tiny, "--steps 1 --eval-max-tokens 40")
    assert limits == {common.TRAIN_STREAM: {30}, common.EVAL_STREAM: {40}}


def test_both_phases_map_rows_alike():
    """One prompt format throughout: a question has the same key in srt.py and here."""
    import srt

    rows = [
        {"prompt": "zig:1", "answer": "1"},
        {"problem": "1+1?", "answer": "2", "solution": "s"},
        {"input_format": "n", "prompt": "Print n.", "examples": [{"input": "1", "output": "1"}]},
    ]
    for raw in rows:
        assert sdzero.competition_row(raw) == srt.competition_row(raw)


def test_presets_are_the_papers():
    """Section 3.5; the authors' code where the paper prints nothing."""
    for name in ("math", "code"):
        a = parse_args(Args, PRESETS, ["--preset", name])
        objective = sdzero.objective_of(a)
        assert (a.divergence, a.support, a.topk, objective.beta, objective.tail, a.sync_every) == (
            "mixed",
            "teacher_topk",
            64,
            0.5,
            False,
            0,
        )
        assert (
            a.prompts_per_step,
            a.rollouts,
            a.lr,
            a.epochs,
            a.questions,
            a.temperature,
            a.max_completion_tokens,
        ) == (128, 1, 5e-6, 1.0, 9000, 0.7, 16384)
        assert (a.warmup, a.weight_decay, a.adam_betas, a.max_teacher_tokens) == (
            20,
            0.01,
            (0.9, 0.999),
            32768,
        )
        assert (
            a.model == f"runs/srt-{name}/last"
            and a.phrases == "srt.json"
            and a.eval_samples == 8
            and a.eval_every == 20
            and a.eval_max_tokens == 32768
        )
