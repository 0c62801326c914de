"""Whole runs as a user starts them: any number of processes, killed and resumed, and every mistake answered in one sentence."""

import importlib.machinery
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import ROOT, checkpoint, flags_of, launch, metrics_of, part, run_here

import common

SCRIPTS = ["sdft", "sdpo", "srt", "sdzero", "distill"]
VOLATILE = ("time/", "memory/")


JUDGE = "def judge(completion, row):\n    n = sum(map(ord, completion)) % 4\n    return (float(n == 0), f'4:{n % 10};')\n"


def flags(tiny, out, more=""):
    return flags_of("sdft", out, tiny, more)


def same(a: list[dict], b: list[dict], rel: float) -> None:
    """Every metric of every step, but for times and memory."""
    assert [r["step"] for r in a] == [r["step"] for r in b]
    for x, y in zip(a, b):
        keys = {k for k in x | y if not k.startswith(VOLATILE)}
        assert {k: x[k] for k in keys} == {k: pytest.approx(y[k], rel=rel, abs=1e-9) for k in keys}


@pytest.mark.parametrize("script", SCRIPTS)
def test_micro_batches_do_not_change_the_numbers(script, tiny, tmp_path):
    """Trap 5: loss, gradient norm, rollouts and evaluation, with answers of unequal length. tests/test_sharding.py: nor do processes."""
    more = ""
    if script == "sdpo":
        (tmp_path / "judge.py").write_text(JUDGE)
        more = f"--mini-batch 4 --verifier {tmp_path}/judge.py:judge"
    if script == "distill":
        more = "--mini-batch 4 --lmbda 0.5 --outputs teacher --rollouts 2"
    one = run_here(script, tmp_path / "1", tiny, more)
    assert one[1]["rollout/length"] > 3 and one[1]["train/grad_norm"] > 0
    same(run_here(script, tmp_path / "small", tiny, more + " --tokens-per-batch 8 --sample-batch 3"), one, rel=2e-6)
    if script == "sdft":
        same(run_here(script, tmp_path / "again", tiny, more + " --activation-checkpointing"), one, rel=2e-6)


def test_gradients_do_not_depend_on_the_split(tiny, tmp_path, monkeypatch):
    """To 1e-6 of their norm, tensor by tensor, not only in their norm."""
    grads, step = {}, common.optimizer_step
    def watched(optimizer, lr, run):
        grads.setdefault(run.out.name, [p.grad.clone() for p in optimizer.param_groups[0]["params"]])
        return step(optimizer, lr, run)
    monkeypatch.setattr("sdft.optimizer_step", watched)
    run_here("sdft", tmp_path / "whole", tiny, "--steps 1")
    run_here("sdft", tmp_path / "split", tiny, "--steps 1 --tokens-per-batch 8")
    norm = sum(g.square().sum() for g in grads["whole"]).sqrt()
    gap = sum((a - b).square().sum() for a, b in zip(grads["whole"], grads["split"])).sqrt()
    assert 0 < norm and gap / norm < 1e-6


# ---- Killed and resumed

def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.mark.parametrize("more", ["", "--lora-rank 2"], ids=["full", "lora"])
def test_resume_continues_bit_for_bit(more, tiny, tmp_path, monkeypatch):
    """Trap 32: student, teacher, optimiser and every metric, after a kill between two checkpoints."""
    more += " --steps 6 --save-every 2 --eval-every 2 --eval-temperature 1"
    whole = run_here("sdft", tmp_path / "whole", tiny, more)
    log = common.Run.log
    def die(self, step, metrics):
        log(self, step, metrics)
        if step == 5:
            raise MemoryError
    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "log", die)
        with pytest.raises(MemoryError):
            run_here("sdft", tmp_path / "cut", tiny, more)
    resumed = run_here("sdft", tmp_path / "cut", tiny, more + " --resume")
    same(resumed, whole, rel=0)
    a, b = ({**checkpoint(tmp_path / name, 6), "seconds": 0} for name in ("whole", "cut"))
    assert equal(a, b) and part(a, "teacher") and not equal(part(a, "teacher"), part(a, "student"))
    assert part(a, "optimizer") and not equal(part(a, "student"), part(checkpoint(tmp_path / "cut", 4), "student"))
    samples = [(tmp_path / name / "samples.jsonl").read_text() for name in ("whole", "cut")]
    assert samples[0] == samples[1]


def test_resuming_a_run_without_a_checkpoint_begins_again(tiny, tmp_path, monkeypatch):
    """And does not log its first steps twice."""
    log = common.Run.log
    def die(self, step, metrics):
        log(self, step, metrics)
        if step == 2:
            raise MemoryError
    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "log", die)
        with pytest.raises(MemoryError):
            run_here("sdft", tmp_path / "r", tiny)
    assert [r["step"] for r in run_here("sdft", tmp_path / "r", tiny, "--resume")] == [0, 1, 2, 3]


def test_a_kill_while_saving_leaves_the_last_good_checkpoint(tiny, tmp_path, monkeypatch):
    save = dcp.save
    def die(state, checkpoint_id, **kwargs):
        save(state, checkpoint_id=checkpoint_id, **kwargs)
        if state["optimizer/lm_head.weight/step"] == 4:
            (checkpoint_id / ".metadata").write_bytes(b"half")
            raise MemoryError
    with monkeypatch.context() as patch:
        patch.setattr(dcp, "save", die)
        with pytest.raises(MemoryError):
            run_here("sdft", tmp_path / "r", tiny, "--steps 6 --save-every 2")
    rows = run_here("sdft", tmp_path / "r", tiny, "--steps 6 --save-every 2 --resume")
    assert [r["step"] for r in rows] == list(range(7))


def test_sigterm_saves_and_exits_0(tiny, tmp_path):
    out = tmp_path / "r"
    command = [sys.executable, "sdft.py", *flags(tiny, out, "--steps 2000 --save-every 1000").split()]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.time() + 120
    while not (out / "metrics.jsonl").exists() or len(metrics_of(out)) < 4:
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "--resume" in said
    [folder] = (out / "checkpoints").glob("step-*")
    assert checkpoint(out, metrics_of(out)[-1]["step"])["step"] == int(folder.name[5:])
    assert f"go on with: python {' '.join(command[1:])} --resume" in said


# ---- What a run leaves behind

def test_a_run_leaves_what_it_promises(tiny, tmp_path):
    from transformers import AutoModelForCausalLM
    out = tmp_path / "r"
    done = launch(f"sdft.py {flags(tiny, out)}")
    assert done.returncode == 0, done.stderr
    assert {p.name for p in out.iterdir()} >= {"config.json", "metrics.jsonl", "samples.jsonl", "curves.png", "run_card.md", "checkpoints", "last"}
    config = json.loads((out / "config.json").read_text())
    assert config["args"]["ema_rate"] == 0.01 and config["args"]["divergence"] == "forward_kl" and config["world"] == 1 and "torch" in config["versions"]
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith("r: ") and " → best " in last and " last " in last and str(out) in last and "±" in last
    assert "student reads\n<|user|>zig:" in done.stdout and "teacher reads\n<|user|>\nzig:" in done.stdout and "divergence" in done.stdout
    assert json.loads((out / "samples.jsonl").read_text().splitlines()[0]).keys() == {"step", "set", "where", "prompt", "completion", "reward"}
    saved = AutoModelForCausalLM.from_pretrained(out / "last").state_dict()
    assert equal(dict(saved), part(checkpoint(out, 3), "student"))


def test_best_holds_the_weights_of_the_best_evaluation(tiny, tmp_path, monkeypatch):
    """A verifier that likes one step only; later and worse weights do not replace it."""
    (tmp_path / "judge.py").write_text("import collections\ncalls = collections.Counter()\ndef judge(completion, row):\n"
                                       "    calls[row['id']] += 1\n    return float(calls[row['id']] == 2)\n")
    out = tmp_path / "r"
    run_here("sdft", out, tiny, f"--verifier {tmp_path}/judge.py:judge --eval-every 1 --save-every 1")
    from transformers import AutoModelForCausalLM
    best = AutoModelForCausalLM.from_pretrained(out / "best").state_dict()
    last = AutoModelForCausalLM.from_pretrained(out / "last").state_dict()
    assert metrics_of(out)[1]["eval/avg@1"] == 1.0 and metrics_of(out)[2]["eval/avg@1"] == 0.0
    assert not all(torch.equal(best[k], last[k]) for k in best)
    assert "best 1.000 ± 0.000 (step 1), last 0.000" in (out / "run_card.md").read_text()


def test_evaluation_statistics_by_hand(tiny, tmp_path):
    """avg@n, pass@n and the standard error over prompts of rewards known beforehand."""
    (tmp_path / "judge.py").write_text("R = [[], [1, 0], [0, 0], [1, 1], [0, 1], [0, 0], [1, 1], [1, 1], [0, 0]]\n"
                                       "def judge(completion, row):\n    R[row['id']].append(R[row['id']].pop(0))\n    return R[row['id']][-1]\n")
    row = run_here("sdft", tmp_path / "r", tiny, f"--verifier {tmp_path}/judge.py:judge --eval-samples 2 --eval-temperature 1 --steps 1")[0]
    means = torch.tensor([0.5, 0, 1, 0.5, 0, 1, 1, 0])
    assert row["eval/avg@2"] == 0.5 and row["eval/pass@2"] == 5 / 8
    assert row["eval/se"] == pytest.approx((means.std() / 8**0.5).item(), rel=1e-6)


# ---- Mistakes: one sentence, what would work, exit code 2, no traceback

def one_sentence(done: subprocess.CompletedProcess, *words: str) -> None:
    text = done.stderr + done.stdout
    assert done.returncode == 2 and "Traceback" not in text, text
    for word in words:
        assert word in text, text


@pytest.mark.parametrize("mistake, words", [
    ("--preset sience", ["--preset sience", "toy, tooluse, science, medical, knowledge"]),
    ("--learning-rate 1", ["--learning-rate"]),
    ("--model {tmp}/nothing", ["--model", "no tokenizer could be loaded", "hub id"]),
    ("--data {tmp}/nothing.jsonl", ["nothing.jsonl: no such file"]),
    ("--prompts-per-step 5", ["--prompts-per-step 5", "2 processes", "4 or 6 can"]),
    ("--max-prompt-tokens 3", ["data.jsonl:1", "over --max-prompt-tokens 3", "--drop-long"]),
    ("--max-completion-tokens 1", ["all 8 answers of step 1 were cut off", "--cut-off keep"]),
    ("--out /proc/run", ["--out /proc/run", "cannot write"]),
], ids=lambda m: m.split()[0].strip("-") + m.split()[1][:3] if isinstance(m, str) else "")
def test_mistakes_are_answered_in_one_sentence(mistake, words, tiny, tmp_path):
    done = launch(f"sdft.py {flags(tiny, tmp_path / 'r', mistake.format(tmp=tmp_path))}", processes=2 if "processes" in str(words) else 1)
    if "processes" in str(words):                            # torchrun reports with an exit code and traceback of its own
        assert done.returncode and all(word in done.stderr for word in words), done.stderr
    else:
        one_sentence(done, *words)


def test_a_folder_in_use_and_a_changed_config_are_refused(tiny, tmp_path):
    run_here("sdft", tmp_path / "r", tiny)
    with pytest.raises(common.InputError, match="already holds a run: add --resume .* --overwrite"):
        run_here("sdft", tmp_path / "r", tiny)
    with pytest.raises(common.InputError, match="begun with other flags .--ema-rate 0.01 then, 0.5 now"):
        run_here("sdft", tmp_path / "r", tiny, "--resume --ema-rate 0.5")
    assert len(run_here("sdft", tmp_path / "r", tiny, "--overwrite --ema-rate 0.5")) == 4


def test_dry_run_checks_and_shows_both_sides_but_leaves_nothing(tiny, tmp_path):
    done = launch(f"sdft.py {flags(tiny, tmp_path / 'r', '--dry-run')}")
    assert done.returncode == 0 and "student reads: <|user|>zig:" in done.stdout and "3 steps of 8 prompts" in done.stdout
    assert not (tmp_path / "r").exists()


def test_non_finite_gradients_skip_and_then_stop(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("sdft.learning_rate", lambda *a: float("inf"))
    with pytest.raises(common.RunError, match="five gradients in a row were not finite"):
        run_here("sdft", tmp_path / "r", tiny, "--steps 9")


@pytest.mark.parametrize("script", SCRIPTS)
def test_importing_a_script_does_nothing_and_help_needs_no_world(script, tmp_path):
    done = launch(f"{script}.py --help")
    assert done.returncode == 0 and "--max-completion-tokens" in done.stdout and "minimise" in done.stdout
    assert subprocess.run([sys.executable, "-c", f"import {script}"], cwd=ROOT, capture_output=True, text=True).stdout == ""


def test_a_search_that_ends_at_once_has_no_curves(tmp_path):
    common.append_jsonl(tmp_path / "metrics.jsonl", [{"step": 1, "search/attempts": 3, "search/solved": 1}])
    common.draw_curves(tmp_path)
    assert not (tmp_path / "curves.png").exists()
    common.append_jsonl(tmp_path / "metrics.jsonl", [{"step": 2, "train/loss": 0.5}])
    common.draw_curves(tmp_path)
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_wandb_gets_every_row_and_a_resumed_run_goes_on_there(tiny, tmp_path, monkeypatch):
    class Wandb:
        begun, rows = [], []
        __spec__ = importlib.machinery.ModuleSpec("wandb", None)

        @classmethod
        def init(cls, **kwargs):
            cls.begun.append(kwargs)
            return SimpleNamespace(log=lambda metrics, step: cls.rows.append((step, metrics)))
    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    more = "--wandb-project p --save-every 1"
    monkeypatch.setattr(common.Run, "stop_requested", lambda run: run.done == 1)
    run_here("sdft", tmp_path / "r", tiny, more)
    monkeypatch.setattr(common.Run, "stop_requested", lambda run: False)
    rows = run_here("sdft", tmp_path / "r", tiny, f"{more} --resume")
    assert [(step, metrics["step"]) for step, metrics in Wandb.rows] == [(i, i) for i in range(4)] and Wandb.rows[-1][1] == rows[-1]
    first, second = Wandb.begun
    assert first["id"] and first["project"] == "p" and first["name"] == "r" and first == second


def test_wandb_that_is_not_there(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(common.InputError, match="--wandb-project p: pip install wandb"):
        run_here("sdft", tmp_path / "r", tiny, "--wandb-project p")


def test_the_command_that_goes_on_names_what_several_machines_need(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sdft.py", "--lr", "1", "--overwrite"])
    assert common.again() == "python sdft.py --lr 1 --resume"
    monkeypatch.setattr(common, "NODES", "2")
    assert common.again().endswith("--resume (on every machine, and with torchrun's --rdzv flags as before)")
