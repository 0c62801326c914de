"""SRT: what is collected and kept, a killed collection loses nothing, and which token each loss covers."""

import json
from types import SimpleNamespace

import pytest
import torch
import toy
from conftest import flags_of, killed_after, launch, make_model, run_here, same
from test_sdft import watch

import common
import srt
from common import InputError, Rollout, Run, completion_states, head_of, load_model, parse_args, read_jsonl
from srt import PRESETS, Args, Sample, cleaned, schedule, srt_loss, why_not

TOKENIZER = toy.make_tokenizer()
WRONG = "\n\nWait, this response is wrong. Let me correct it.\n\n"
RIGHT = "\n\nLet me rephrase the above solution.\n\n"


@pytest.fixture
def odd(tmp_path):
    """The flag of a verifier that wants texts of odd length."""
    (tmp_path / "v.py").write_text("def v(completion, row):\n    return float(len(completion) % 2)\n")
    return f"--verifier {tmp_path}/v.py:v"


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
        return {(r["y0"], r["revision"]): r for r in read_jsonl(out / "revisions.jsonl")}

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
    dropped = {("2", 0): "", ("2", 1): "wrong", ("9", 0): "", ("9", 1): "duplicate"}
    dropped |= {("7", 0): "", ("7", 1): "cut off", ("55", 0): "", ("55", 1): "wrong"}
    assert {key: r["dropped"] for key, r in records.items()} == dropped
    for r in records.values():
        answer = str(2 * int(TOKENIZER.decode(r["prompt_ids"])[12]))
        assert r["dropped"] or common.exact(r["y1"], {"answer": answer})
        assert r["y0_ids"] == TOKENIZER(r["y0"])["input_ids"]
        assert r["y1_ids"] == TOKENIZER(r["y1"])["input_ids"] + [TOKENIZER.eos_token_id] * r["y1_finished"]
        assert TOKENIZER.decode(r["phrase_ids"]) == (RIGHT if r["y0_reward"] else WRONG)


def test_flags_of_the_collection(scripted):
    kept = {key for key, r in scripted.run("--keep all").items() if not r["dropped"]}
    assert kept == {("2", 0), ("2", 1), ("9", 0), ("7", 0), ("55", 0), ("55", 1)}
    records = scripted.run("--no-revise-right")
    assert records[("2", -1)]["dropped"] == "right, not revised" and ("2", 0) not in records
    for target in (1, 2):
        records = scripted.run(f"--target {target} --collect-batch 1").values()
        assert len({r["where"] for r in records if not r["dropped"]}) == target
    assert len({r["where"] for r in scripted.run("--questions 2").values()}) == 2
    assert {r["dropped"] for r in scripted.run("--max-tokens 15").values()} >= {"20 tokens"}
    half = {"revision": 0, "y1_finished": True, "y1_reward": 0.4}
    assert why_not(half, set(), Args()) == "wrong"


def test_every_revision_of_every_attempt_has_random_numbers_of_its_own(scripted, monkeypatch):
    for question, (first, revised) in SAYS.items():
        monkeypatch.setitem(SAYS, question, (first, revised * 2))
    scripted.run("--attempts 2")
    keys = [key for stream, key, _ in scripted.asked if stream[-1] == 1]
    assert len(set(keys)) == len(keys) == 16


def test_what_a_collection_cost(tiny, tmp_path):
    row = run_here("srt", tmp_path / "r", tiny, "--questions 4 --attempts 2 --revisions 2 --steps 1")[0]
    assert (row["collect/questions"], row["collect/rollouts"]) == (4, 8 + 16)


@pytest.mark.parametrize(
    "revision, flaw, text",
    [
        (False, "so it is 4. " * 5, "so it is 4. "),
        (True, "abcdefghij" * 2, "abcdefghij" * 2),
        (True, "x" + "0123456789\n" * 3, "x0123456789\n"),
        (False, "4", "4"),
        (True, "", ""),
        (True, "You're right, I erred. the sum is 4.", "The sum is 4."),
        (False, "You're right, I erred. the sum is 4.", "You're right, I erred. the sum is 4."),
        (True, "Thank you for checking! Good catch. 2+2", "2+2"),
        (True, "Good work is 4.", "Good work is 4."),
        (True, "It is 4. Thank you for asking.", "It is 4. Thank you for asking."),
        (True, "Good catch. " + "0123456789" * 3, "0123456789"),
    ],
)
def test_repeating_tails_and_chat_openings_are_cut(revision, flaw, text):
    """The tokens are new, but for the EOS, where something was cut."""
    run = SimpleNamespace(text=lambda y: flaw, tokenizer=lambda text, **_: {"input_ids": list(text)})
    y = Rollout(["old", "EOS"], [0.0, 0.0], True)
    assert cleaned(run, y, revision).ids == (y.ids if flaw == text else [*text, "EOS"])


def test_a_cleaned_revision_is_verified_again_and_its_tokens_are_new(scripted, monkeypatch):
    sixes = TOKENIZER("6")["input_ids"] + [TOKENIZER.eos_token_id]
    monkeypatch.setattr(srt, "cleaned", lambda run, y, revision: y._replace(ids=sixes) if revision else y)
    records = scripted.run()
    assert records[("9", 0)]["y1"] == "6" and records[("9", 0)]["dropped"] == "wrong"
    assert records[("9", 0)]["y1_ids"] == sixes


def test_a_cleaned_answer_keeps_the_spelling_of_special_tokens_as_text():
    run = SimpleNamespace(tokenizer=TOKENIZER, text=lambda y: "so<|end|>" + "0123456789" * 3)
    y = cleaned(run, Rollout([7, TOKENIZER.eos_token_id], [0.0, 0.0], True), False)
    assert y.ids.count(TOKENIZER.eos_token_id) == 1 and len(y.ids) > 12


# ---- A killed collection


def collect(tiny, out, more=""):
    """The bytes that a collection in batches of two leaves."""
    flags = flags_of("srt", out, tiny, f"--collect-only --collect-batch 2 {more}")
    srt.main(parse_args(Args, PRESETS, flags.split()))
    found = (out / "revisions.jsonl").read_bytes()
    assert not (out / "collected").exists()
    return found


@pytest.mark.parametrize("place", ["draw 1", "draw 6", "write 3", "write 13", "rename 3", "rename 13"])
def test_a_collection_that_dies_anywhere_goes_on_where_it_was(place, tiny, tmp_path, monkeypatch):
    """In the middle of drawing, of writing a batch, between writing and renaming, and of the final file."""
    what, when = place.split()
    places = {"draw": (common.Sampler, "__call__"), "write": (srt.Path, "write_text"), "rename": (srt.Path, "rename")}
    done, calls = getattr(*places[what]), iter(range(1, 1000))

    def dying(*args, **kwargs):
        if next(calls) == int(when):
            if what == "write":
                done(args[0], '{"half a li')
            raise KeyboardInterrupt
        return done(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(*places[what], dying)
        collect(tiny, tmp_path / "r")
    assert collect(tiny, tmp_path / "r", "--resume") == collect(tiny, tmp_path / "whole")


def test_a_killed_collection_keeps_its_batches(tiny, tmp_path, capsys):
    """kill -9 when 7 batches of 4 completions are there and the next is half graded."""
    (tmp_path / "v.py").write_text(
        f"import os, pathlib\ncalls, killed = [], pathlib.Path('{tmp_path}/killed')\n"
        "def v(completion, row):\n    calls.append(1)\n"
        "    if len(calls) == 30 and not killed.exists():\n"
        "        killed.write_text('')\n        os.kill(os.getpid(), 9)\n"
        "    return float(len(completion) % 2)\n"
    )
    more = f"--verifier {tmp_path}/v.py:v --collect-batch 2 --collect-only"
    assert launch(f"srt.py {flags_of('srt', tmp_path / 'r', tiny, more)}").returncode == -9
    assert not (tmp_path / "r" / "revisions.jsonl").exists()
    resumed, said = collect(tiny, tmp_path / "r", f"{more} --resume"), capsys.readouterr().out
    assert "collected 14 of 24" not in said and "collected 16 of 24" in said
    assert resumed == collect(tiny, tmp_path / "whole", more)


def test_a_stopped_collection_says_how_to_continue(tiny, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch, pytest.raises(FileNotFoundError):
        patch.setattr(Run, "gather", lambda run, values: setattr(run, "stopped", True) or values)
        collect(tiny, tmp_path / "r")
    assert "rerun the same command with --resume" in capsys.readouterr().out
    assert len(list((tmp_path / "r" / "collected").iterdir())) == 1
    assert collect(tiny, tmp_path / "r", "--resume") == collect(tiny, tmp_path / "whole")


def test_processes_collect_the_same(tiny, tmp_path):
    flags = flags_of("srt", tmp_path / "2", tiny, "--collect-only --collect-batch 2")
    done = launch(f"srt.py {flags}", processes=2)
    assert done.returncode == 0, done.stderr
    one = collect(tiny, tmp_path / "1")
    assert one == (tmp_path / "2" / "revisions.jsonl").read_bytes() and one.count(b"\n") == 24


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


def test_the_authors_two_stages():
    """Stage two takes revisions of right attempts first; right ones left over are in neither stage."""
    kept = [{"y0_reward": float(name in "bd"), "where": name} for name in "abcde"]

    def plan(**flags):
        steps = schedule(kept, Args(**flags, epochs=1, prompts_per_step=2))
        return [(loss, "".join(r["where"] for r in part), at, length) for loss, part, at, length in steps]

    assert plan(loss="sequential", stage_two=3) == [
        ("generation", "ce", 1, 1), ("revision", "bda", 1, 2), ("revision", "bda", 2, 2)]  # fmt: skip
    assert plan(loss="sequential", stage_two=1, steps=1) == [("generation", "ace", 1, 1), ("revision", "b", 1, 1)]
    assert plan(loss="sequential", stage_two=5, steps=1) == [("revision", "bdace", 1, 1)]
    assert plan()[2:] == [("joint", "abcde", 3, 3)] and plan(method="rft")[2:] == [("generation", "abcde", 3, 3)]


def test_the_second_stage_is_a_run_of_its_own(tiny, tmp_path, monkeypatch, odd):
    """A new optimizer, the other loss, a warm-up of its own: a share of its steps, or a number of steps."""
    made, losses = [], []
    watch(monkeypatch, srt, "make_optimizer", lambda args, _: made.append(args))
    watch(monkeypatch, srt, "srt_loss", lambda args, _: losses.append(args[-1]))
    flags = f"--loss sequential --stage-two 5 {odd}"
    rows = run_here("srt", tmp_path / "r", tiny, f"{flags} --steps 2 --warmup 2")
    assert len(made) == 1 and list(dict.fromkeys(losses)) == ["generation", "revision"]
    assert [r["train/lr"] for r in rows[1:]] == pytest.approx([5e-4, 1e-3] * 2)
    rows = run_here("srt", tmp_path / "s", tiny, f"{flags} --steps 5 --warmup 0.4 --schedule constant")
    assert [r["train/lr"] for r in rows[1:]] == pytest.approx([5e-4, 1e-3, 1e-3, 1e-3, 1e-3] * 2)
    rows = run_here("srt", tmp_path / "n", tiny, f"{flags} --steps 2 --warmup 1 --schedule constant")
    assert [r["train/lr"] for r in rows[1:]] == pytest.approx([1e-3] * 4)


def test_data_sets_and_the_judge_of_the_paper():
    """Section 3.3: the last box, else "the answer is", else the last number; code: the last Python block."""
    row = srt.competition_row({"problem": "1+1?", "answer": "2", "solution": "s"})  # OpenR1-Math, DeepScaleR
    assert [m["content"] for m in row["prompt"]] == [
        "You are a helpful assistant that solves math problems step by step.",
        "1+1?\n\nPlease reason step by step, and put your final answer within \\boxed{}.",
    ]
    for text, reward in (("So the answer is 2.", 1), ("2", 1), ("\\boxed{4}, the answer is 2", 0)):
        assert common.math_answer(text, row)[0] == reward
    text = "```c\nlong long\n```\n```python\nprint(input())\n```"
    case = {"input_format": "n", "prompt": "Print n.", "examples": [{"input": "1", "output": "1"}]}
    tests = json.dumps({"inputs": ["1"], "outputs": ["1"], "testtype": "stdin", "fn_name": None, "time_limit": 6})
    for raw in (case, {"kind": "code", "prompt": "Print n.", "tests": tests}):  # LiveCodeBench, SDPO's file
        row = srt.competition_row(raw)
        assert row["prompt"][-1]["content"] == "Print n." and common.code(text, row)[0] == 1.0
    assert srt.competition_row(case)["prompt"][0]["content"].endswith("solves coding problems step by step.")
    assert common.find_program(text, row["block"]) == "print(input())\n"
    assert Args().max_tokens == 32768
    assert [phrases[1] for phrases in common.PHRASES.values()] == [
        "Wait, this response is not correct, let me start over.",
        "Wait, this response is wrong. Let me correct it.",
        "Wrong. I need to redo all.",
    ]


def test_resume_within_and_between_stages(tiny, tmp_path):
    more = "--loss sequential --stage-two 4 --steps 2 --save-every 1"
    whole = run_here("srt", tmp_path / "whole", tiny, more)
    for last in (2, 3, 4):
        with killed_after(last):
            run_here("srt", tmp_path / f"r{last}", tiny, more)
        same(run_here("srt", tmp_path / f"r{last}", tiny, more + " --resume"), whole)


def test_training_later_or_elsewhere_is_the_same(tiny, tmp_path):
    """--collect-only then --resume, and --data FILE, end where one run ends, with the same contract."""
    few = "--questions 10"
    whole = run_here("srt", tmp_path / "whole", tiny, few)
    with pytest.raises(FileNotFoundError):
        run_here("srt", tmp_path / "r", tiny, f"{few} --collect-only")  # no step was taken, so no metrics
    with pytest.raises(InputError, match="already holds a run"):
        run_here("srt", tmp_path / "r", tiny, few)
    elsewhere = f"{few} --data {tmp_path}/whole/revisions.jsonl"
    for name, how in (("r", f"{few} --resume"), ("t", elsewhere)):
        same(run_here("srt", tmp_path / name, tiny, how), whole)
    texts = {(tmp_path / name / "last" / "srt.json").read_text() for name in ("whole", "r", "t")}
    [saved] = map(json.loads, texts)
    assert (saved["right"], saved["wrong"], saved["chat_kwargs"]) == (RIGHT.strip(), WRONG.strip(), {})
    records = read_jsonl(tmp_path / "whole" / "revisions.jsonl")
    assert len(saved["questions"]) == len({r["where"] for r in records}) == 10
    assert whole[0]["collect/questions"] == 10 and whole[0]["collect/rollouts"] == 20
    assert whole[0]["collect/kept"] == sum(not r["dropped"] for r in records)


def test_records_of_another_collection_are_refused(tiny, tmp_path):
    """Other phrases, chat arguments or another tokenizer: srt.json would be wrong about the model."""
    run_here("srt", tmp_path / "r", tiny, "--phrases olmo --steps 1")
    file, other = tmp_path / "r" / "revisions.jsonl", tmp_path / "other.jsonl"
    good = read_jsonl(file)
    assert all(r["reviser"]["wrong"] == "Wrong. I need to redo all." for r in good)

    def refused(message, more, *records):
        other.write_text("".join(json.dumps(r) + "\n" for r in records))
        with pytest.raises(InputError, match=message):
            run_here("srt", tmp_path / "t", tiny, f"--data {other} {more}")

    refused("other.jsonl:1: collected with .* use the same --phrases and --chat-kwargs", "", *good)
    refused("other.jsonl: collected with another --method than rft", "--phrases olmo --method rft", *good)
    refused("other.jsonl holds collected records already", "--phrases olmo --collect-only", *good)
    refused("--data .*other.jsonl: no record was kept", "--phrases olmo", *({**r, "dropped": "wrong"} for r in good))
    refused("use the same --phrases and --chat", '--phrases olmo --chat-kwargs {"enable_thinking":false}', *good)
    foreign = {**good[2], "phrase_ids": [30, *good[2]["phrase_ids"]]}
    refused("other.jsonl:3: collected with another tokenizer", "--phrases olmo", *good[:2], foreign)
    refused("other.jsonl:1: missing column 'phrase_ids'", "--phrases olmo", {"reviser": good[0]["reviser"]})
    refused("other.jsonl:2: missing column 'prompt'", "--phrases olmo", {"prompt": "1", "answer": "1"}, good[0])
    assert len(run_here("srt", tmp_path / "t", tiny, f"--data {file} --phrases olmo")) == 4


def test_nothing_to_train_on(tiny, tmp_path):
    (tmp_path / "never.py").write_text("def never(completion, row):\n    return 0.0\n")
    with pytest.raises(InputError, match="no record was kept"):
        run_here("srt", tmp_path / "r", tiny, f"--keep verified --verifier {tmp_path}/never.py:never")


def test_rft_learns_its_own_right_answers_and_carries_no_contract(tiny, tmp_path, monkeypatch, odd):
    ys = []
    watch(monkeypatch, srt, "completion_states", lambda args, _: ys.extend(y for _, y in args[1]))
    run_here("srt", tmp_path / "r", tiny, f"--method rft --attempts 2 --keep verified {odd}")
    records = read_jsonl(tmp_path / "r" / "revisions.jsonl")
    right = [r["y0_ids"] for r in records if r["y0_reward"] and r["y0_finished"]]
    assert ys and all(y in right and y[-1] == TOKENIZER.eos_token_id for y in ys)
    assert len(records) == 48 and not (tmp_path / "r" / "last" / "srt.json").exists()


def test_revision_accuracy_by_hand(tiny, tmp_path, monkeypatch, odd):
    """revise/*: a wrong answer is corrected when its revision is right."""
    drawn = []

    def see(args, rollouts):
        if args[4][:2] == (common.EVAL_STREAM, 1) and len(args[4]) == 3:
            drawn.append((args[2], rollouts))

    watch(monkeypatch, common.Sampler, "__call__", see)
    row = run_here("srt", tmp_path / "r", tiny, f"--steps 1 --eval-temperature 1 {odd}")[-1]
    (_, first), (prompts, second) = drawn[-2:]
    texts = [[TOKENIZER.decode(y.ids, skip_special_tokens=True) for y in part] for part in (first, second)]
    right, revised = ([len(text) % 2 == 1 for text in part] for part in texts)
    corrected, kept = (sum(b and a == was for a, b in zip(right, revised, strict=True)) for was in (False, True))
    assert row["revise/first"] == sum(right) / 8 and row["revise/revised"] == sum(revised) / 8
    assert row["revise/wrong_to_right"] == corrected / max(8 - sum(right), 1)
    assert row["revise/right_to_right"] == kept / max(sum(right), 1) and 0 < sum(right) < 8
    assert row["revise/length"] == sum(len(y.ids) for y in second) / 8
    for prompt, y, r in zip(prompts, first, right, strict=True):
        assert TOKENIZER.decode(prompt).endswith(TOKENIZER.decode(y.without_eos()) + (RIGHT if r else WRONG))
