"""SRT: what is collected and kept, a killed collection loses nothing, and which token each loss covers."""

import json
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import toy
from conftest import ROOT, flags_of, launch, make_model, run_here

import common
import srt
from common import (
    InputError,
    Rollout,
    Run,
    completion_states,
    head_of,
    load_model,
    parse_args,
)
from srt import (
    PRESETS,
    Args,
    Sample,
    srt_loss,
    stages,
    strip_opening,
    trim_repeats,
    why_not,
)

TOKENIZER = toy.make_tokenizer()
WRONG, RIGHT = (
    "\n\nWait, this response is wrong. Let me correct it.\n\n",
    "\n\nLet me rephrase the above solution.\n\n",
)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- Collection, with a scripted model: question "add:a+b" is attempted and revised as SAYS tells

SAYS = {
    "add:1+1": ("2", ["2", "3"]),
    "add:2+2": ("9", ["4", "4"]),
    "add:3+3": ("7", ["6", "(cut)"]),
    "add:4+4": ("(cut)", ["8", "1"]),
}


@pytest.fixture
def scripted(tiny, tmp_path, monkeypatch):
    """Four questions, two revisions each; what the model was asked to continue is kept in `asked`."""
    rows = [{"prompt": prompt, "answer": str(sum(map(int, prompt[4:].split("+"))))} for prompt in SAYS]
    (tmp_path / "add.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = []

    def sample(self, model, prompts, keys, stream, sampling):
        out = []
        for prompt, (row, sample) in zip(prompts, keys, strict=True):
            first, revised = SAYS[rows[row - 1]["prompt"]]
            text = first if stream[-1] == 0 else revised[sample]
            cut = text == "(cut)"
            ids = TOKENIZER("55" if cut else text)["input_ids"] + [TOKENIZER.eos_token_id] * (not cut)
            out.append(Rollout(ids, [-1.0] * len(ids), not cut))
            asked.append((stream, (row, sample), TOKENIZER.decode(prompt)))
        return out

    monkeypatch.setattr(common.Sampler, "__call__", sample)

    def run(more=""):
        out = tmp_path / f"r{len(list(tmp_path.iterdir()))}"
        flags = f"--model {tiny.model} --data {tmp_path}/add.jsonl --revisions 2 --collect-only --out {out} "
        srt.main(parse_args(Args, PRESETS, [*(flags + more).split(), "--eval-data"]))
        return {(r["y0"], r["revision"]): r for r in read(out / "revisions.jsonl")}

    return SimpleNamespace(run=run, asked=asked)


def test_the_model_goes_on_in_its_own_turn(scripted):
    """x, y0 without its EOS, the phrase of its verdict; a cut-off y0 is continued as it is."""
    scripted.run()
    seconds = {text for stream, _, text in scripted.asked if stream[-1] == 1}
    turn = "<|user|>{}<|end|><|assistant|>{}{}"
    assert seconds == {
        turn.format("add:1+1", "2", RIGHT),
        turn.format("add:2+2", "9", WRONG),
        turn.format("add:3+3", "7", WRONG),
        turn.format("add:4+4", "55", WRONG),
    }


def test_kept_revisions_verify_and_every_other_says_why(scripted):
    """Trap 52. Wrong, cut off and repeated revisions stay in the file, marked."""
    records = scripted.run()
    assert {key: r["dropped"] for key, r in records.items()} == {
        ("2", 0): "",
        ("2", 1): "wrong",
        ("9", 0): "",
        ("9", 1): "duplicate",
        ("7", 0): "",
        ("7", 1): "cut off",
        ("55", 0): "",
        ("55", 1): "wrong",
    }
    for r in records.values():
        assert r["dropped"] or common.exact(
            r["y1"], {"answer": str(sum(map(int, TOKENIZER.decode(r["prompt_ids"])[12:15].split("+"))))}
        )
        assert (
            r["y0_ids"] == TOKENIZER(r["y0"])["input_ids"]
            and r["y1_ids"] == TOKENIZER(r["y1"])["input_ids"] + [TOKENIZER.eos_token_id] * r["y1_finished"]
        )
        assert TOKENIZER.decode(r["phrase_ids"]) == (RIGHT if r["y0_reward"] else WRONG)


def test_flags_of_the_collection(scripted):
    assert {key for key, r in scripted.run("--keep all").items() if not r["dropped"]} == {
        ("2", 0),
        ("2", 1),
        ("9", 0),
        ("7", 0),
        ("55", 0),
        ("55", 1),
    }
    records = scripted.run("--no-revise-right")
    assert records[("2", -1)]["dropped"] == "right, not revised" and ("2", 0) not in records
    kept = [r for r in scripted.run("--target 1 --collect-batch 1").values() if not r["dropped"]]
    assert len({r["where"] for r in kept}) == 1
    assert len({r["where"] for r in scripted.run("--questions 2").values()}) == 2
    assert {r["dropped"] for r in scripted.run("--max-tokens 15").values()} >= {"20 tokens"}


@pytest.mark.parametrize(
    "flaw, clean",
    [
        ("so it is 4. " * 5, "so it is 4. "),
        ("abcdefghij" * 2, "abcdefghij" * 2),
        ("x" + "0123456789\n" * 3, "x0123456789\n"),
        ("4", "4"),
        ("", ""),
    ],
)
def test_repeating_tails_are_cut(flaw, clean):
    assert trim_repeats(flaw) == clean


@pytest.mark.parametrize(
    "text, clean",
    [
        ("You're right, I erred. the sum is 4.", "The sum is 4."),
        ("Thank you for checking! Good catch. 2+2", "2+2"),
        ("Good work is 4.", "Good work is 4."),
        ("It is 4. Thank you for asking.", "It is 4. Thank you for asking."),
    ],
)
def test_chat_openings_are_cut(text, clean):
    assert strip_opening(text) == clean


def test_a_cleaned_revision_is_verified_again_and_its_tokens_are_new(scripted, monkeypatch):
    monkeypatch.setattr(srt, "strip_opening", lambda text: text.removeprefix("4") or "6")
    records = scripted.run()
    assert records[("9", 0)]["y1"] == "6" and records[("9", 0)]["dropped"] == "wrong"
    assert records[("9", 0)]["y1_ids"] == TOKENIZER("6")["input_ids"] + [TOKENIZER.eos_token_id]


def test_a_cleaned_answer_keeps_the_spelling_of_special_tokens_as_text():
    run = SimpleNamespace(tokenizer=TOKENIZER, text=lambda y: "so<|end|>" + "0123456789" * 3)
    y = Rollout([7, TOKENIZER.eos_token_id], [0.0, 0.0], True)
    y = srt.with_text(run, y, srt.trim_repeats(run.text(y)))
    assert y.ids.count(TOKENIZER.eos_token_id) == 1 and len(y.ids) > 12


# ---- A killed collection


def collect(tiny, out, more=""):
    return f"srt.py {flags_of('srt', out, tiny, f'--collect-only --collect-batch 2 {more}')}"


@pytest.mark.parametrize("place", ["draw 1", "draw 6", "write 2", "write 12", "rename 3", "rename 13"])
def test_a_collection_that_dies_anywhere_goes_on_where_it_was(place, tiny, tmp_path, monkeypatch):
    """In the middle of drawing, of writing a batch, between writing and renaming, and of the final file."""

    def main(name, more=""):
        srt.main(parse_args(Args, PRESETS, collect(tiny, tmp_path / name, more).split()[1:]))

    main("whole")
    what, when = place.split()
    calls = iter(range(1, 1000))

    def dying(step, half=None):
        def call(*a, **k):
            if next(calls) == int(when):
                if half:
                    half(*a)
                raise KeyboardInterrupt
            return step(*a, **k)

        return call

    with monkeypatch.context() as patch:
        if what == "draw":
            patch.setattr(common.Sampler, "__call__", dying(common.Sampler.__call__))
        elif what == "write":
            patch.setattr(
                srt,
                "append_jsonl",
                dying(srt.append_jsonl, lambda path, rows: path.write_text('{"half a li')),
            )
        else:
            patch.setattr(srt.Path, "rename", dying(srt.Path.rename))
        with pytest.raises(KeyboardInterrupt):
            main("r")
    main("r", "--resume")
    assert (tmp_path / "r" / "revisions.jsonl").read_bytes() == (
        tmp_path / "whole" / "revisions.jsonl"
    ).read_bytes()
    assert not (tmp_path / "r" / "collected").exists()


def test_three_kills_at_random_moments_change_nothing(tiny, tmp_path):
    (tmp_path / "slow.py").write_text(
        "import time\ndef slow(completion, row):\n"
        "    time.sleep(0.05)\n    return float(len(completion) % 2)\n"
    )

    def command(name):
        return [
            sys.executable,
            *collect(tiny, tmp_path / name, f"--resume --verifier {tmp_path}/slow.py:slow").split(),
        ]

    assert subprocess.run(command("whole"), cwd=ROOT, capture_output=True).returncode == 0
    for _ in range(3):
        process = subprocess.Popen(
            command("r"), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        while "collected" not in process.stdout.readline():
            pass
        time.sleep(torch.rand(()).item() * 0.5)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "r" / "revisions.jsonl").exists()
    assert subprocess.run(command("r"), cwd=ROOT, capture_output=True).returncode == 0
    assert (tmp_path / "r" / "revisions.jsonl").read_bytes() == (
        tmp_path / "whole" / "revisions.jsonl"
    ).read_bytes()


def test_processes_collect_the_same(tiny, tmp_path):
    for n in (1, 2):
        done = launch(collect(tiny, tmp_path / str(n)), processes=n)
        assert done.returncode == 0, done.stderr
    one, two = (read(tmp_path / n / "revisions.jsonl") for n in "12")
    assert one == two and len(one) == 24


def test_collected_work_is_not_overwritten_by_accident(tiny, tmp_path):
    def main(more=""):
        srt.main(parse_args(Args, PRESETS, collect(tiny, tmp_path / "r", more).split()[1:]))

    main()
    with pytest.raises(InputError, match="already holds a run"):
        main()
    with pytest.raises(InputError, match="was started with --revisions 1, not 2"):
        main("--resume --revisions 2")


# ---- What each loss covers

SAMPLE = Sample([3, 20, 5, 4], [30, 31, 40, 41, 32, 33, 5], 3)  # y0 = 30 31, P_r = 40 41, y1 = 32 33 and EOS


@pytest.mark.parametrize("loss", ["generation", "revision", "joint"])
def test_the_losses_by_hand(loss, tmp_path):
    """Eq. 1-3: the generation loss covers y0, the phrase and y1; the revision loss y1 alone."""
    run = Run(SimpleNamespace(out="/nowhere", dtype="auto", activation_checkpointing=False))
    student = load_model(str(make_model(tmp_path / "m")), run)
    n = {"generation": 14, "revision": 5}
    h_ND = completion_states(student, [(SAMPLE.prompt, SAMPLE.y)])
    found, stats = srt_loss(h_ND, head_of(student), [SAMPLE], n, loss)
    with torch.no_grad():
        logits = student(torch.tensor([SAMPLE.prompt + SAMPLE.y])).logits[0, 3:-1].double().log_softmax(-1)
    logp = logits.gather(1, torch.tensor(SAMPLE.y)[:, None])[:, 0]
    generation, revision = -logp.sum().item() / 14, -logp[4:].sum().item() / 5
    want = {"generation": generation, "revision": revision, "joint": generation + revision}[loss]
    assert found.item() == pytest.approx(want, rel=1e-5)
    assert stats["logp"].tolist() == pytest.approx(logp.tolist(), rel=1e-5)
    assert stats["revision_logp"].tolist() == pytest.approx([0] * 4 + logp[4:].tolist(), rel=1e-5)


def record(reward, name="q"):
    return {"y0_reward": reward, "where": name}


def test_the_authors_two_stages():
    """Stage two takes revisions of right attempts first; right ones left over are in neither stage."""
    kept = [record(0.0, "a"), record(1.0, "b"), record(0.0, "c"), record(1.0, "d"), record(0.0, "e")]

    def name(plan):
        return [(loss, [r["where"] for r in part]) for _, _, loss, part in plan]

    assert name(stages(kept, Args(loss="sequential", stage_two=3))) == [
        ("generation", ["c", "e"]),
        ("revision", ["b", "d", "a"]),
    ]
    assert name(stages(kept, Args(loss="sequential", stage_two=1))) == [
        ("generation", ["a", "c", "e"]),
        ("revision", ["b"]),
    ]
    assert [loss for _, _, loss, _ in stages(kept, Args())] == ["joint"] and [
        loss for _, _, loss, _ in stages(kept, Args(method="rft"))
    ] == ["generation"]


def test_the_second_stage_is_a_run_of_its_own(tiny, tmp_path, monkeypatch):
    """A new optimizer and schedule, and the other loss."""
    made, losses = [], []
    make, loss_of = srt.make_optimizer, srt.srt_loss

    def watched_make(*args):
        made.append(1)
        return make(*args)

    def watched_loss(h_ND, head, micro, n, loss):
        losses.append(loss)
        return loss_of(h_ND, head, micro, n, loss)

    monkeypatch.setattr(srt, "make_optimizer", watched_make)
    monkeypatch.setattr(srt, "srt_loss", watched_loss)
    (tmp_path / "v.py").write_text("def v(completion, row):\n    return float(len(completion) % 2)\n")
    flags = f"--loss sequential --stage-two 5 --steps 2 --warmup 2 --verifier {tmp_path}/v.py:v"
    rows = run_here("srt", tmp_path / "r", tiny, flags)
    assert len(made) == 1 and list(dict.fromkeys(losses)) == ["generation", "revision"]
    assert [r["train/lr"] for r in rows[1:]] == pytest.approx([5e-4, 1e-3, 5e-4, 1e-3])


def test_warmup_is_a_share_of_each_stage_or_a_number_of_steps(tiny, tmp_path):
    (tmp_path / "v.py").write_text("def v(completion, row):\n    return float(len(completion) % 2)\n")
    flags = f"--loss sequential --stage-two 5 --steps 5 --verifier {tmp_path}/v.py:v --schedule constant"
    rows = run_here("srt", tmp_path / "r", tiny, f"{flags} --warmup 0.4")
    assert [r["train/lr"] for r in rows[1:]] == pytest.approx([5e-4, 1e-3, 1e-3, 1e-3, 1e-3] * 2)
    rows = run_here("srt", tmp_path / "n", tiny, f"{flags} --warmup 1")
    assert [r["train/lr"] for r in rows[1:]] == pytest.approx([1e-3] * 10)


def test_the_judge_of_the_paper():
    """Section 3.3: the last box, else "the answer is", else the last number; code: the last Python block."""
    row = srt.competition_row({"problem": "2+3?", "answer": "5"})
    for text, reward in (("So the answer is 5.", 1), ("5", 1), ("\\boxed{4}, the answer is 5", 0)):
        assert common.math_answer(text, row)[0] == reward
    case = {"input_format": "n", "prompt": "Print n.", "examples": [{"input": "1", "output": "1"}]}
    block = common.find_program("```c\nlong long\n```\n```python\n1\n```", srt.competition_row(case)["block"])
    assert block == "1\n"


def test_evaluation_may_have_a_limit_of_its_own(tiny, tmp_path, monkeypatch):
    limits, sample = {}, common.Sampler.__call__

    def watched(self, model, prompts, keys, stream, how):
        limits.setdefault(stream[0], set()).add(how.max_tokens)
        return sample(self, model, prompts, keys, stream, how)

    monkeypatch.setattr(common.Sampler, "__call__", watched)
    run_here("srt", tmp_path / "r", tiny, "--steps 1 --eval-max-tokens 40")
    assert limits == {common.TRAIN_STREAM: {30}, common.EVAL_STREAM: {40}}


def test_resume_within_and_between_stages(tiny, tmp_path, monkeypatch):
    more = "--loss sequential --stage-two 4 --steps 2 --save-every 1"
    whole = run_here("srt", tmp_path / "whole", tiny, more)
    log = Run.log
    for last in (1, 2, 3):

        def die(self, step, metrics, last=last):
            if step > last:
                raise KeyboardInterrupt
            log(self, step, metrics)

        with monkeypatch.context() as patch:
            patch.setattr(Run, "log", die)
            with pytest.raises(KeyboardInterrupt):
                run_here("srt", tmp_path / f"r{last}", tiny, more)
        again = run_here("srt", tmp_path / f"r{last}", tiny, more + " --resume")

        def plain(rows):
            return [{k: v for k, v in r.items() if not k.startswith(("time/", "memory/"))} for r in rows]

        assert plain(again) == plain(whole)


def test_training_later_or_elsewhere_is_the_same(tiny, tmp_path):
    """--collect-only then --resume, and --train-only FILE, end where one run ends."""
    whole = run_here("srt", tmp_path / "whole", tiny)
    with pytest.raises(FileNotFoundError):
        run_here("srt", tmp_path / "r", tiny, "--collect-only")  # no step was taken, so no metrics

    def losses(rows):
        return [r["train/loss"] for r in rows if "train/loss" in r]

    assert losses(run_here("srt", tmp_path / "r", tiny, "--resume")) == losses(whole)
    assert losses(
        run_here("srt", tmp_path / "t", tiny, f"--train-only {tmp_path}/whole/revisions.jsonl")
    ) == losses(whole)


def test_records_of_another_collection_are_refused(tiny, tmp_path):
    """Other phrases, chat arguments or another tokenizer: srt.json would be wrong about the model."""
    run_here("srt", tmp_path / "r", tiny, "--phrases olmo")
    records = tmp_path / "r" / "revisions.jsonl"
    assert all(r["reviser"]["wrong"] == "Wrong. I need to redo all." for r in read(records))
    with pytest.raises(
        InputError, match="revisions.jsonl:1: collected with .* use the same --phrases and --chat"
    ):
        run_here("srt", tmp_path / "t", tiny, f"--train-only {records}")
    argv = flags_of("srt", tmp_path / "t", tiny, f"--train-only {records} --phrases olmo").split()
    with pytest.raises(InputError, match="use the same --phrases and --chat-kwargs"):
        srt.main(parse_args(Args, PRESETS, [*argv, "--chat-kwargs", '{"enable_thinking": false}']))
    lines = read(records)
    lines[2]["phrase_ids"] = [30, *lines[2]["phrase_ids"]]
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    with pytest.raises(InputError, match="other.jsonl:3: collected with another tokenizer"):
        run_here("srt", tmp_path / "t", tiny, f"--train-only {tmp_path}/other.jsonl --phrases olmo")
    assert len(run_here("srt", tmp_path / "t", tiny, f"--train-only {records} --phrases olmo")) == 4


def test_the_contract_travels_with_the_weights(tiny, tmp_path):
    run_here("srt", tmp_path / "r", tiny, "--questions 10")
    saved, records = (
        json.loads((tmp_path / "r" / "last" / "srt.json").read_text()),
        read(tmp_path / "r" / "revisions.jsonl"),
    )
    assert (saved["right"], saved["wrong"], saved["chat_kwargs"]) == (RIGHT.strip(), WRONG.strip(), {})
    assert len(saved["questions"]) == len({r["where"] for r in records}) == 10


def test_rft_learns_its_own_right_answers_and_carries_no_contract(tiny, tmp_path, monkeypatch):
    (tmp_path / "v.py").write_text("def v(completion, row):\n    return float(len(completion) % 2)\n")
    pairs, states = [], srt.completion_states

    def watched(model, part):
        pairs.extend(part)
        return states(model, part)

    monkeypatch.setattr(srt, "completion_states", watched)
    run_here(
        "srt", tmp_path / "r", tiny, f"--method rft --attempts 2 --keep verified --verifier {tmp_path}/v.py:v"
    )
    records = read(tmp_path / "r" / "revisions.jsonl")
    right = {tuple(r["y0_ids"]) for r in records if r["y0_reward"] and r["y0_finished"]}
    assert (
        pairs
        and {tuple(y) for _, y in pairs} <= right
        and all(y[-1] == TOKENIZER.eos_token_id for _, y in pairs)
    )
    assert len(records) == 48 and not (tmp_path / "r" / "last" / "srt.json").exists()


def test_revision_accuracy_by_hand(tiny, tmp_path, monkeypatch):
    """revise/*: answers of even length are right; a wrong one is corrected when its revision is even."""
    (tmp_path / "v.py").write_text("def v(completion, row):\n    return float(len(completion) % 2 == 0)\n")
    drawn, sample = {}, common.Sampler.__call__

    def watched(self, model, prompts, keys, stream, sampling):
        out = sample(self, model, prompts, keys, stream, sampling)
        if stream[:2] == (common.EVAL_STREAM, 1) and len(stream) == 3:
            drawn[stream[2]] = (prompts, out)
        return out

    monkeypatch.setattr(common.Sampler, "__call__", watched)
    row = run_here(
        "srt", tmp_path / "r", tiny, f"--steps 1 --eval-temperature 1 --verifier {tmp_path}/v.py:v"
    )[-1]
    (_, first), (prompts, second) = drawn[0], drawn[1]

    def text(y):
        return TOKENIZER.decode(y.ids, skip_special_tokens=True)

    right, revised = ([len(text(y)) % 2 == 0 for y in part] for part in (first, second))
    assert row["revise/first"] == sum(right) / 8 and row["revise/revised"] == sum(revised) / 8
    assert row["revise/wrong_to_right"] == sum(
        b and not a for a, b in zip(right, revised, strict=True)
    ) / max(8 - sum(right), 1)
    assert row["revise/right_to_right"] == sum(a and b for a, b in zip(right, revised, strict=True)) / max(
        sum(right), 1
    )
    assert row["revise/length"] == sum(len(y.ids) for y in second) / 8
    for prompt, y, r in zip(prompts, first, right, strict=True):
        assert TOKENIZER.decode(prompt).endswith(TOKENIZER.decode(y.without_eos()) + (RIGHT if r else WRONG))


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--collect-only --train-only x", "drop one of them"),
        ("--revisions 0", "expected a number above 0"),
        ("--train-only {tmp}/none.jsonl", "no such file; it takes a revisions.jsonl"),
        ("--train-only {tmp}/bad.jsonl", "bad.jsonl:1: missing column .reviser."),
        ("--keep verified --verifier {tmp}/v.py:never", "no record was kept"),
    ],
)
def test_mistakes_are_one_sentence(flags, message, tiny, tmp_path):
    (tmp_path / "v.py").write_text("def never(completion, row):\n    return 0.0\n")
    (tmp_path / "bad.jsonl").write_text('{"prompt_ids": [1], "y0": "2"}\n')
    with pytest.raises(InputError, match=message):
        run_here("srt", tmp_path / "r", tiny, flags.format(tmp=tmp_path))


@pytest.mark.parametrize(
    "flags",
    [
        "--loss generation",
        "--loss revision",
        "--lora-rank 2",
        "--phrases olmo",
        "--keep verified --revisions 2 --verifier {tmp}/v.py:v",
    ],
)
def test_every_way_runs(flags, tiny, tmp_path):
    (tmp_path / "v.py").write_text("def v(completion, row):\n    return float(len(completion) % 2)\n")
    rows = run_here("srt", tmp_path / "r", tiny, f"--steps 2 {flags}".format(tmp=tmp_path))
    assert all(r["train/loss"] > 0 and r["train/grad_norm"] > 0 for r in rows[1:])


def test_rows_of_the_papers_data_sets():
    raw = {"problem": "1+1?", "answer": "2", "solution": "s"}  # OpenR1-Math, DeepScaleR
    assert [m["content"] for m in srt.competition_row(raw)["prompt"]] == [
        "You are a helpful assistant that solves math problems step by step.",
        "1+1?\n\nPlease reason step by step, and put your final answer within \\boxed{}.",
    ]
    code = srt.competition_row(
        {"input_format": "n", "prompt": "Print n.", "examples": [{"input": "1", "output": "1"}]}
    )
    assert (
        code["prompt"][1]["content"] == "Print n."
        and common.code("```python\nprint(input())\n```", code)[0] == 1.0
    )
    tests = json.dumps({"inputs": ["1"], "outputs": ["1"], "testtype": "stdin", "fn_name": None, "time_limit": 6})
    code = srt.competition_row({"kind": "code", "prompt": "Print n.", "tests": tests})  # LiveCodeBench, SDPO's file
    assert common.code("```python\nprint(input())\n```", code)[0] == 1.0


def test_presets_are_the_papers():
    """Appendix C; the authors' code where the paper prints nothing."""
    for name in ("math", "code"):
        a = parse_args(Args, PRESETS, ["--preset", name])
        assert (a.model, a.attempts, a.revisions, a.questions, a.target, a.revise_right) == (
            "Qwen/Qwen3-4B-Instruct-2507",
            1,
            3,
            10000,
            6000,
            True,
        )
        assert (a.lr, a.epochs, a.schedule, a.weight_decay, a.adam_betas, a.prompts_per_step, a.loss) == (
            5e-6,
            2.0,
            "cosine",
            1e-4,
            (0.9, 0.95),
            4,
            "joint",
        )
        assert (a.temperature, a.max_completion_tokens, a.max_tokens, a.phrases, a.eval_samples) == (
            0.7,
            16384,
            32768,
            "paper",
            8,
        )
        assert (a.warmup, a.eval_max_tokens) == (0.05, 32768)
    a = parse_args(Args, PRESETS, ["--preset", "math-sequential"])
    assert (a.loss, a.epochs, a.warmup, a.stage_two, a.revise_right) == ("sequential", 3.0, 0.05, 1000, False)
    assert (a.attempts, a.revisions, a.temperature, a.phrases, a.target) == (3, 3, 1.0, "qwen", 6000)
    assert common.PHRASES["paper"][1] == "Wait, this response is not correct, let me start over."
    assert (
        common.PHRASES["qwen"][1] == "Wait, this response is wrong. Let me correct it."
        and common.PHRASES["olmo"][1] == "Wrong. I need to redo all."
    )


def test_why_not_is_decided_in_one_place():
    base = {
        "prompt_ids": [1],
        "y0_ids": [1],
        "phrase_ids": [1],
        "y1_ids": [1],
        "y0_reward": 0.0,
        "y1_reward": 1.0,
        "y1_finished": True,
        "revision": 0,
        "where": "d:1",
        "y0": "a",
        "y1": "b",
    }
    assert (
        why_not(base, set(), Args()) == "" and why_not({**base, "y1_reward": 0.4}, set(), Args()) == "wrong"
    )
    assert (
        why_not(base, {("d:1", "a", "b")}, Args()) == "duplicate"
        and why_not(base, set(), Args(max_tokens=3)) == "4 tokens"
    )
