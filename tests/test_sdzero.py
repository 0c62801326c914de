"""SD-Zero: what the reviser reads, which copy of y carries the loss, and the contract with phase 1."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
import toy
from conftest import checkpoint, flags_of, killed_after, make_model, part, run_here, same
from test_sdft import watch

import common
import sdzero
import srt
from common import InputError, Reviser, Rollout, Run, Teacher, parse_args
from sdzero import PRESETS, Args, Sample, fresh_questions, sdzero_loss

TOKENIZER = toy.make_tokenizer()
WRONG = "\n\nWait, this response is wrong. Let me correct it.\n\n"
RIGHT = "\n\nLet me rephrase the above solution.\n\n"
REVISER = Reviser(RIGHT.strip(), WRONG.strip(), {}, [])


@pytest.fixture
def judge(tmp_path):
    """Answers of odd length are right."""
    (tmp_path / "judge.py").write_text("def judge(completion, row):\n    return float(len(completion) % 2)\n")
    return f"--verifier {tmp_path}/judge.py:judge"


@pytest.fixture
def taught(monkeypatch):
    """The list that grows with every pair the teacher scores."""
    seen = []
    watch(monkeypatch, Teacher, "targets", lambda args, _: seen.extend(args[1]))
    return seen


def dry_run(tiny, out, more):
    flags = flags_of("sdzero", out, tiny, f"{more} --dry-run")
    sdzero.main(parse_args(Args, PRESETS, flags.split()))


# ---- What the reviser reads


def test_the_reviser_reads_the_answer_its_verdict_and_the_answer_again(tiny, tmp_path, judge, taught, monkeypatch):
    """x, y without its EOS, P_r; then y with its EOS, which both sides score. Right and wrong alike."""
    scored = []
    watch(monkeypatch, sdzero, "completion_states", lambda args, _: scored.extend(args[1]))
    run_here("sdzero", tmp_path / "r", tiny, judge)
    verdicts, ends = set(), set()
    for (context, y), (prompt, y_again) in zip(taught, scored, strict=True):
        finished = y[-1] == TOKENIZER.eos_token_id
        solved = len(TOKENIZER.decode(y, skip_special_tokens=True)) % 2 == 1
        phrase = TOKENIZER(RIGHT if solved else WRONG)["input_ids"]
        assert y == y_again and context == prompt + (y[:-1] if finished else y) + phrase
        verdicts.add(solved)
        ends.add(finished)
    assert len(taught) == 24 and verdicts == ends == {True, False}


def test_an_answer_too_long_to_be_read_twice_is_left_out_and_counted(tiny, tmp_path, judge, taught):
    """|x| + 2|y| + |P_r| over the limit: no loss, never a cut."""
    rows = run_here("sdzero", tmp_path / "r", tiny, f"{judge} --max-teacher-tokens 60")
    dropped = sum(r["teacher/dropped_prompts"] for r in rows[1:])
    assert 0 < dropped < 24 and len(taught) == 24 - dropped
    assert all(len(context) + len(y) <= 60 for context, y in taught)
    assert rows[1]["distill/active_frac"] == 1 - rows[1]["teacher/dropped_prompts"] / 8


# ---- The loss


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    run = Run(SimpleNamespace(out="/nowhere", dtype="auto", activation_checkpointing=False))
    folder = tmp_path_factory.mktemp("world")
    student = common.load_model(str(make_model(folder / "m")), run)
    teacher = Teacher(str(make_model(folder / "t", seed=3)), 0.0, student, run)
    x, phrase = [3, 20, 5, 4], TOKENIZER(WRONG)["input_ids"]
    ys = [[30, 31, 32, 33, 5], [34, 35, 5]]
    samples = [Sample(x, x + y[:-1] + phrase, y, [-3.0] * len(y), False) for y in ys]
    return SimpleNamespace(student=student, teacher=teacher, samples=samples, x=x, phrase=phrase)


def loss_of(world, samples=None, **flags):
    args, samples = Args(**flags), samples or world.samples
    targets = world.teacher.targets([(s.context, s.y) for s in samples])
    h_ND = common.completion_states(world.student, [(s.prompt, s.y) for s in samples])
    n = {"tokens": sum(len(s.y) for s in samples)}
    return sdzero_loss(h_ND, common.head_of(world.student), targets, samples, n, args)


def logps(model, before, y):
    with torch.no_grad():
        return model(torch.tensor([before + y])).logits[0, len(before) - 1 : -1].double().log_softmax(-1)


def by_hand(world, contexts, topk):
    """Forward and reverse KL on the reviser's likeliest tokens, renormalised; means over all tokens."""
    sums = torch.zeros(2, dtype=torch.float64)
    for s, context in zip(world.samples, contexts, strict=True):
        p, q = logps(world.student, s.prompt, s.y), logps(world.teacher.model, context, s.y)
        kept = q.topk(topk).indices
        p, q = p.gather(1, kept).log_softmax(-1), q.gather(1, kept).log_softmax(-1)
        sums += torch.stack([(q.exp() * (q - p)).sum(), (p.exp() * (p - q)).sum()])
    return (sums / sum(len(s.y) for s in world.samples)).tolist()


def test_the_default_loss_is_on_the_second_copy(world):
    """Trap 51: the teacher is aligned with its second copy of y; on the first one it says something else."""
    got = loss_of(world)[0].item()
    assert got == pytest.approx(sum(by_hand(world, [s.context for s in world.samples], 64)) / 2, rel=1e-5)
    assert abs(got - sum(by_hand(world, [s.prompt for s in world.samples], 64)) / 2) > 1e-2
    without = [s._replace(context=s.context[: -len(world.phrase)]) for s in world.samples]
    assert abs(loss_of(world, without)[0].item() - got) > 1e-2
    assert loss_of(world, world.samples[::-1])[0].item() == pytest.approx(got, rel=1e-6)


def test_divergences_by_flag(world):
    hand = by_hand(world, [s.context for s in world.samples], 89)
    for divergence, want in zip(("forward_kl", "reverse_kl"), hand, strict=True):  # Eq. 4 is the reverse
        loss = loss_of(world, divergence=divergence, support="full")[0].item()
        assert loss == pytest.approx(want, rel=1e-5)


# ---- The contract with phase 1


def test_a_model_that_was_not_trained_to_revise_is_refused(tiny, tmp_path):
    """The official script's default silently skips phase 1."""
    message = "no srt.json there, so it was not trained .*; run srt.py first .* --phrases paper"
    with pytest.raises(InputError, match=message):
        run_here("sdzero", tmp_path / "r", tiny, "--phrases srt.json")
    with pytest.raises(InputError, match="--model is missing"):
        sdzero.main(Args(data="x"))


def test_phase_two_finds_what_phase_one_wrote(tiny, tmp_path, taught):
    """Phrases and the questions, which are not asked again; the folder of phase 2 has them too."""
    run_here("srt", tmp_path / "srt", tiny, "--questions 10 --phrases olmo --steps 1")
    run_here("sdzero", tmp_path / "r", tiny, f"--model {tmp_path}/srt/last --phrases srt.json")
    used = {tuple(r["prompt_ids"]) for r in common.read_jsonl(tmp_path / "srt" / "revisions.jsonl")}
    asked = {tuple(context[: context.index(4) + 1]) for context, _ in taught}  # up to <|assistant|>
    assert len(used) == 10 and not used & asked and len(asked) == 14
    wrong = TOKENIZER("\n\nWrong. I need to redo all.\n\n", add_special_tokens=False)["input_ids"]
    assert all(context[-len(wrong) :] == wrong for context, _ in taught)
    saved = json.loads((tmp_path / "r" / "last" / "srt.json").read_text())
    assert saved["wrong"] == "Wrong. I need to redo all." and len(saved["questions"]) == 10


def test_flags_that_contradict_srt_json_are_refused(tiny, tmp_path, capsys):
    """Other phrases or chat arguments than in phase 1; the same phrases keep its questions."""
    folder = make_model(tmp_path / "srt")
    rows = common.load_rows(str(tiny.data), sdzero.competition_row)
    used = [common.question_key(row["prompt"]) for row in rows[:10]]
    reviser = Reviser(*common.PHRASES["olmo"], {}, used)
    (folder / "srt.json").write_text(json.dumps(reviser._asdict()))
    flags = f"--model {folder}"
    with pytest.raises(InputError, match="--phrases qwen: .*srt.json was trained with .* leave --phrases out"):
        dry_run(tiny, tmp_path / "r", flags)
    with pytest.raises(InputError, match="--chat-kwargs .*: .* was trained with {}; use the same"):
        dry_run(tiny, tmp_path / "r", f'{flags} --phrases srt.json --chat-kwargs {{"enable_thinking":true}}')
    dry_run(tiny, tmp_path / "r", f"{flags} --phrases olmo")
    assert "sdzero: 14 of 24 rows (10 used in phase 1" in capsys.readouterr().out
    with pytest.raises(InputError, match="phase 1 used all 10 questions"):
        fresh_questions(rows[:10], reviser, Args(data="d"))
    assert fresh_questions(rows, reviser, Args()) == rows[10:]


# ---- The loop


def test_the_reviser_is_frozen_or_synchronised(tiny, tmp_path, judge):
    def distances(name, more):
        rows = run_here("sdzero", tmp_path / name, tiny, f"{judge} --steps 4 {more}")
        return [r["teacher/distance"] for r in rows[1:]]

    frozen, synced = distances("f", ""), distances("s", "--sync-every 2")
    assert 0 < frozen[0] < frozen[1] < frozen[2] < frozen[3] and frozen[0] == synced[0]
    assert synced[1] == synced[3] == 0 < synced[2]


def test_a_run_killed_between_two_syncs_resumes_with_the_same_numbers(tiny, tmp_path, judge):
    """The checkpoint holds the reviser of the last sync: not the student, not the model at the start."""
    flags = f"{judge} --steps 6 --sync-every 2 --save-every 1"
    whole = run_here("sdzero", tmp_path / "whole", tiny, flags)
    with killed_after(4):
        run_here("sdzero", tmp_path / "r", tiny, flags)
    before, saved = checkpoint(tmp_path / "r", 2), checkpoint(tmp_path / "r", 3)
    for name, weights in part(saved, "teacher").items():
        assert torch.equal(weights, part(before, "student")[name])
    same(run_here("sdzero", tmp_path / "r", tiny, flags + " --resume"), whole)


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


WAYS = """sdzero --divergence reverse_kl --support sampled
sdzero --divergence jsd --support student_topk --topk 5
sdzero --lora-rank 2
sdzero --lora-rank 2 --sync-every 1
sdzero --rollouts 2
sdzero --temperature 0.5
srt --loss generation
srt --loss revision
srt --lora-rank 2
srt --phrases olmo
srt --keep verified --revisions 2"""


@pytest.mark.parametrize("way", WAYS.split("\n"))
def test_every_way_runs(way, tiny, tmp_path, judge):
    script, _, flags = way.partition(" ")
    rows = run_here(script, tmp_path / "r", tiny, f"{judge} --steps 2 {flags}")
    assert all(math.isfinite(r["train/loss"]) and r["train/grad_norm"] > 0 for r in rows[1:])
    assert "revise/first" in rows[-1]


def test_without_evaluation_sets_nothing_is_measured(tiny, tmp_path, judge):
    rows = run_here("sdzero", tmp_path / "r", tiny, f"{judge} --steps 1 --eval-data")
    assert len(rows) == 2 and not any(name.startswith(("eval/", "revise/")) for row in rows for name in row)


def test_a_part_of_the_questions_is_drawn_by_the_seed(tiny, tmp_path, monkeypatch):
    """Not the first rows of the file; with 0 all of them, in their order."""
    seen = []
    watch(monkeypatch, sdzero, "start_run", lambda args, _: seen.append([row["id"] for row in args[2]]))
    for more in ("--questions 6", "--questions 6", "--questions 6 --seed 1", "", "--questions 99"):
        dry_run(tiny, tmp_path / "r", more)
    a, b, c, whole, more = seen
    assert a == b and len(set(a)) == 6 and a != c and sorted(a) != list(range(1, 7))
    assert whole == more == list(range(1, 25))


def test_both_phases_map_rows_alike():
    """One prompt format throughout: a question has the same key in srt.py and here."""
    case = {"input_format": "n", "prompt": "Print n.", "examples": [{"input": "1", "output": "1"}]}
    for raw in ({"prompt": "zig:1", "answer": "1"}, {"problem": "1+1?", "answer": "2", "solution": "s"}, case):
        assert sdzero.competition_row(raw) == srt.competition_row(raw)


def test_presets_are_the_papers():
    """Section 3.5; the authors' code where the paper prints nothing. tests/test_settings.py has the rest."""
    for name in ("math", "code"):
        a = parse_args(Args, PRESETS, ["--preset", name])
        objective = sdzero.objective_of(a)
        assert (a.divergence, a.support, a.topk, a.sync_every) == ("mixed", "teacher_topk", 64, 0)
        assert (objective.beta, objective.tail) == (0.5, False)
        assert (a.questions, a.temperature, a.max_completion_tokens) == (9000, 0.7, 16384)
        assert (a.adam_betas, a.max_teacher_tokens, a.phrases) == ((0.9, 0.999), 32768, "srt.json")
        assert (a.model, a.eval_every) == (f"runs/srt-{name}/last", 20)
