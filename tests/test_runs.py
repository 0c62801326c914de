"""Whole runs as a user starts them: killed and resumed, and every mistake answered in one sentence."""

import importlib.machinery
import json
import math
import os
import re
import signal
import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock, Mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import (
    JUDGE,
    ROOT,
    checkpoint,
    flags_of,
    killed_after,
    launch,
    make_model,
    metrics_of,
    part,
    run_here,
    same,
)
from safetensors.torch import load_file

import common

SCRIPTS = ["sdft", "sdpo", "srt", "sdzero", "distill"]


@pytest.fixture
def judge(tmp_path):
    """The flag of a verifier with the given text, whose function is judge."""

    def write(text):
        (tmp_path / "judge.py").write_text(text)
        return f"--verifier {tmp_path}/judge.py:judge"

    return write


def start(script, argv, monkeypatch, capsys):
    """The exit code of a script started in this process, and what it printed to stdout and stderr."""
    module = importlib.import_module(script)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *argv.split()])
    with pytest.raises(SystemExit) as ended:
        common.launch(module.main, module.Args, module.PRESETS)
    return ended.value.code, *capsys.readouterr()


@pytest.mark.parametrize("script", SCRIPTS)
def test_micro_batches_do_not_change_the_numbers(script, tiny, tmp_path, judge, monkeypatch):
    """Metrics, and the gradients tensor by tensor. tests/test_sharding.py: nor do processes."""
    grads, step = {}, common.optimizer_step

    def watched(run, lr):
        params = run.optimizer.param_groups[0]["params"]
        grads.setdefault(run.out.name, torch.cat([p.grad.flatten() for p in params]))
        return step(run, lr)

    monkeypatch.setattr(f"{script}.optimizer_step", watched)
    own = {"sdpo": f"--mini-batch 4 {judge(JUDGE)}", "srt": "--loss joint"}
    own["distill"] = "--mini-batch 4 --lmbda 0.5 --outputs teacher --rollouts 2"
    more = own.get(script, "")
    one = run_here(script, tmp_path / "1", tiny, more)
    assert one[1]["rollout/length"] > 3 and one[1]["train/grad_norm"] > 0
    splits = {"split": "--tokens-per-batch 8 --sample-batch 3"}
    splits |= {"again": "--activation-checkpointing"} if script == "sdft" else {}
    for name, split in splits.items():
        same(run_here(script, tmp_path / name, tiny, f"{more} {split}"), one, rel=2e-6)
        assert (grads[name] - grads["1"]).norm() < 1e-6 * grads["1"].norm()


# ---- Killed and resumed


def equal(a, b):
    tensors = {name for name, value in a.items() if isinstance(value, torch.Tensor)}
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) if k in tensors else a[k] == b[k] for k in a)


@pytest.mark.parametrize("more", ["", "--lora-rank 2"], ids=["full", "lora"])
def test_resume_continues_bit_for_bit(more, tiny, tmp_path, monkeypatch):
    """Trap 32: student, teacher, optimiser, metrics and samples, after a kill between two checkpoints.

    It tore a file within a letter, and a second one came while --resume wrote the logs. What ends a line for
    str.splitlines may stand in a completion.
    """
    text = common.Run.text
    monkeypatch.setattr(common.Run, "text", lambda run, y: f"{text(run, y)}\u2028\u2029\u0085")
    more += " --steps 6 --save-every 2 --eval-every 1 --eval-temperature 1"
    whole = run_here("sdft", tmp_path / "whole", tiny, more)
    assert len(list((tmp_path / "whole" / "checkpoints").iterdir())) == 2  # of three
    with killed_after(5):
        run_here("sdft", tmp_path / "cut", tiny, more)
    logs = [[tmp_path / run / name for name in ("metrics.jsonl", "samples.jsonl")] for run in ("whole", "cut")]
    for log in logs[1]:
        log.write_bytes(log.read_bytes() + b'{"step": 5, "completion": "\xe2\x80')
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(common, "append_jsonl", Mock(side_effect=MemoryError))
        run_here("sdft", tmp_path / "cut", tiny, more + " --resume")
    same(run_here("sdft", tmp_path / "cut", tiny, more + " --resume"), whole)
    a, b = ({**checkpoint(tmp_path / name, 6), "seconds": 0} for name in ("whole", "cut"))
    assert equal(a, b) and part(a, "teacher") and not equal(part(a, "teacher"), part(a, "student"))
    assert part(a, "optimizer") and not equal(part(a, "student"), part(checkpoint(tmp_path / "cut", 4), "student"))
    samples = [samples.read_text() for _, samples in logs]
    assert samples[0] == samples[1] and samples[0].count("\u2028") == samples[0].count("\n") == 7 * 4


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_hybrid_model_draws_trains_and_resumes(script, tiny, tmp_path, judge):
    """Qwen3.5: recurrent layers beside attention. tests/test_sharding.py has it on several processes."""
    hybrid = SimpleNamespace(**{**vars(tiny), "model": make_model(tmp_path / "m", "qwen3_5")})
    more = "--save-every 1 --tokens-per-batch 100" + " --lora-rank 2" * (script in ("sdpo", "srt"))
    more += "" if script == "distill" else f" {judge(JUDGE)}"
    whole = run_here(script, tmp_path / "whole", hybrid, more)
    assert all(row["train/grad_norm"] > 0 for row in whole[1:])
    assert script == "srt" or all(row["rollout/logp_gap_max"] < 1e-3 for row in whole[1:])
    with killed_after(2):
        run_here(script, tmp_path / "cut", hybrid, more)
    same(run_here(script, tmp_path / "cut", hybrid, f"{more} --resume"), whole)


def test_resuming_a_run_without_a_checkpoint_begins_again(tiny, tmp_path):
    """And does not log its first steps twice."""
    with killed_after(2):
        run_here("sdft", tmp_path / "r", tiny)
    with pytest.raises(common.InputError, match="already holds a run"):  # its log is not deleted unasked
        run_here("sdft", tmp_path / "r", tiny)
    assert [r["step"] for r in run_here("sdft", tmp_path / "r", tiny, "--resume")] == [0, 1, 2, 3]


def test_a_whole_last_line_without_a_newline_is_read(tmp_path):
    """Only a torn one is dropped."""
    for last, rows in (('{"step": 2}', [{"step": 1}, {"step": 2}]), ('{"step": 2', [{"step": 1}])):
        (tmp_path / "f.jsonl").write_text('{"step": 1}\n' + last)
        assert common.read_jsonl(tmp_path / "f.jsonl") == rows


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


def test_a_full_disk_ends_the_run_in_one_sentence(tiny, tmp_path, judge, monkeypatch, capsys):
    """From the evaluation of step 2 on; with room again the run continues from step 1."""
    more = "--eval-every 1 --save-every 1 " + judge(f"""from pathlib import Path
calls, log = 0, Path({str(tmp_path)!r}, "r", "samples.jsonl")
def judge(completion, row):
    global calls
    calls += 1
    if calls == 17:
        log.unlink()
        log.symlink_to("/dev/full")
    return 0.0
""")
    code, _, said = start("sdft", flags_of("sdft", tmp_path / "r", tiny, more), monkeypatch, capsys)
    assert code == 1 and "samples.jsonl could not be written ([Errno 28] No space left on device)" in said
    assert "; make room and rerun the same command with --resume" in said
    assert re.search(r"[\r\n](\x1b\[A)*error: ", said)  # not behind the bar
    (tmp_path / "r" / "samples.jsonl").unlink()
    assert [row["step"] for row in run_here("sdft", tmp_path / "r", tiny, f"{more} --resume")] == [0, 1, 2, 3]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_0_and_a_second_one_ends_at_once(signum, tiny, tmp_path, monkeypatch, capsys):
    log = common.Run.log

    def log_and_signal(run, step, metrics):
        log(run, step, metrics)
        if step == 2:
            os.kill(os.getpid(), signum)

    monkeypatch.setattr(common.Run, "log", log_and_signal)
    code, said, _ = start("sdft", flags_of("sdft", tmp_path / "r", tiny, "--steps 9"), monkeypatch, capsys)
    assert code == 0 and [row["step"] for row in metrics_of(tmp_path / "r")] == [0, 1, 2]
    assert [folder.name for folder in (tmp_path / "r" / "checkpoints").iterdir()] == ["step-00000002"]
    assert "Stopped after step 2. To continue, rerun the same command with --resume." in said
    assert signal.getsignal(signum) == signal.SIG_DFL


# ---- What a run leaves behind


def test_a_run_leaves_what_it_promises(tiny, tmp_path):
    from transformers import AutoModelForCausalLM

    out = tmp_path / "r"
    done = launch(f"sdft.py {flags_of('sdft', out, tiny)}")
    assert done.returncode == 0, done.stderr
    files = "config.json metrics.jsonl samples.jsonl curves.png run_card.md checkpoints last"
    assert {p.name for p in out.iterdir()} >= {*files.split()}
    config = json.loads((out / "config.json").read_text())
    assert (config["args"]["ema_rate"], config["args"]["divergence"], config["world"]) == (0.01, "forward_kl", 1)
    assert len(config["data"]) == 64 and config["command"].endswith(f"--out {out} --skip-tokens 1")
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith("r: ") and all(part in last for part in (" → best ", " last ", "±", str(out)))
    for said in ("student reads\n<|user|>zig:", "teacher reads\n<|user|>\nzig:", "divergence"):
        assert said in done.stdout
    assert done.stdout.count(" minutes to go, without evaluations") == 1
    [sample, *_] = common.read_jsonl(out / "samples.jsonl")
    assert sample.keys() == {"step", "set", "where", "prompt", "completion", "reward"}
    saved = AutoModelForCausalLM.from_pretrained(out / "last").state_dict()
    assert equal(dict(saved), part(checkpoint(out, 3), "student"))


def test_the_model_card_has_the_metadata_of_the_hub(tiny, tmp_path, monkeypatch):
    """Ids of the hub are named, paths of this machine are not; the score is that of the first evaluation."""
    from huggingface_hub import ModelCard

    [*_, row] = run_here("sdft", tmp_path / "r", tiny)
    data = ModelCard.load(tmp_path / "r" / "last" / "README.md").data
    assert data.base_model is None and data.datasets is None and data.library_name == "transformers"
    [result] = data.eval_results
    assert (result.dataset_name, result.metric_name, result.metric_value) == ("eval", "avg@1", row["eval/avg@1"])
    names = dict(model="org/model", data="org/data:main@train#test", eval_data=["org/data@test"])
    run = SimpleNamespace(args=SimpleNamespace(**names, eval_samples=4), evals={"data": []}, out=tmp_path / "s")
    data = ModelCard(common.model_card(run, {"avg": 0.5}, "text")).data
    assert (data.base_model, data.datasets) == ("org/model", ["org/data"])
    assert data.eval_results[0].dataset_type == "org/data" and data.eval_results[0].metric_value == 0.5


def test_best_holds_the_weights_of_the_best_evaluation(tiny, tmp_path, judge):
    """A verifier that likes two steps only; neither equal nor worse weights replace the first."""
    likes_1_and_2 = judge(
        "import collections\ncalls = collections.Counter()\ndef judge(completion, row):\n"
        "    calls[row['id']] += 1\n    return float(calls[row['id']] in (2, 3))\n"
    )
    rows = run_here("sdft", tmp_path / "r", tiny, f"{likes_1_and_2} --schedule constant --eval-every 1 --steps 3")
    run_here("sdft", tmp_path / "one", tiny, "--schedule constant --steps 1")
    folders = [tmp_path / "r" / "best", tmp_path / "one" / "last", tmp_path / "r" / "last"]
    best, first, last = (load_file(folder / "model.safetensors") for folder in folders)
    assert [row["eval/avg@1"] for row in rows] == [0, 1, 1, 0]
    assert equal(best, first) and not equal(best, last)
    assert "best 1.000 ± 0.000 (step 1), last 0.000" in (tmp_path / "r" / "run_card.md").read_text()


def test_evaluation_statistics_by_hand(tiny, tmp_path, judge):
    """avg@n, pass@n and the standard error over prompts of rewards known beforehand."""
    known = judge(
        "R = [[], [1, 0], [0, 0], [1, 1], [0, 1], [0, 0], [1, 1], [1, 1], [0, 0]]\n"
        "def judge(completion, row):\n    R[row['id']].append(R[row['id']].pop(0))\n"
        "    return R[row['id']][-1]\n"
    )
    row = run_here("sdft", tmp_path / "r", tiny, f"{known} --eval-samples 2 --eval-temperature 1 --steps 1")[0]
    means = torch.tensor([0.5, 0, 1, 0.5, 0, 1, 1, 0])
    assert row["eval/avg@2"] == 0.5 and row["eval/pass@2"] == 5 / 8
    assert row["eval/se"] == pytest.approx((means.std() / 8**0.5).item(), rel=1e-6)


# ---- Mistakes: one sentence, what would work, exit code 2, no traceback


MISTAKES = {
    "--preset sience": "--preset sience: expected one of toy, smol, tooluse, science, medical, knowledge",
    "--learning-rate 1": "--learning-rate",
    "--model {tmp}/nothing": "nothing: no tokenizer could be loaded",
    "--data {tmp}/nothing.jsonl": "nothing.jsonl: no data could be loaded (no such file)",
    "--data {tmp}/columns.jsonl": "columns.jsonl:1: missing column 'privileged_context' (found: prompt,",
    "--max-prompt-tokens 3": "none of the 24 rows fits; raise --max-prompt-tokens, --max-teacher-tokens",
    "--eval-data {tmp}/long.jsonl": "long.jsonl:1: 303 tokens; raise --max-prompt-tokens",
    "--out /proc/run": "--out /proc/run: [Errno 2] No such file or directory: '/proc/run'; use another folder",
}


@pytest.mark.parametrize("mistake", MISTAKES, ids=range(len(MISTAKES)))
def test_mistakes_are_answered_in_one_sentence(mistake, tiny, tmp_path, monkeypatch, capsys):
    (tmp_path / "columns.jsonl").write_text('{"prompt": "zig:1", "answer": "1"}\n')
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "1" * 300, "answer": "1"}) + "\n")
    argv = flags_of("sdft", tmp_path / "r", tiny, mistake.format(tmp=tmp_path))
    code, _, text = start("sdft", argv, monkeypatch, capsys)
    assert code == 2 and MISTAKES[mistake] in text and "Traceback" not in text, text
    assert not (tmp_path / "r").exists()


RANGES = """
    sdft --is-cap -1 | sdft --eval-top-p 0 | sdft --eval-top-p 1.1 | sdft --eval-temperature -1 | sdft --steps -3
    sdft --epochs 0 | sdft --max-completion-tokens 0 | sdft --prompts-per-step 0 | sdft --rollouts 0
    sdft --eval-every 0 | sdft --save-every 0 | sdft --seed -1 | sdft --lr -1 | sdft --lr 0 | sdft --lr nan
    sdft --lora-rank -1 | sdft --ema-rate 1.5 | sdft --skip-tokens -1 | sdft --warmup -1 | sdft --topk 0
    sdft --adam-betas 0.9 2 | sdft --weight-decay -1 | sdft --tokens-per-batch 0 | sdft --sample-batch 0
    sdft --entropy-quantile 1.5 | sdft --max-prompt-tokens 0 | sdft --eval-samples 0
    sdpo --policy-weight 2 | sdpo --advantage-clip -1 | sdpo --mini-batch -1 | sdpo --teacher-samples -1
    srt --attempts 0 | srt --collect-batch 0 | srt --temperature -1 | srt --max-tokens 0 | srt --revisions 0
    sdzero --sync-every -1 | sdzero --temperature -1 | distill --beta 2 | distill --lmbda 1.5
"""


@pytest.mark.parametrize("wrong", [wrong.strip() for wrong in RANGES.strip().replace("\n", "|").split("|")])
def test_every_number_flag_has_a_range(wrong, monkeypatch, capsys):
    script, flag, *values = wrong.split()
    code, _, text = start(script, " ".join([flag, *values]), monkeypatch, capsys)
    assert code == 2 and text.startswith(f"error: {flag} {values[-1]}: expected a number "), text
    assert text.count("\n") == 1


def test_changed_data_is_refused_on_resume_and_flags_of_speed_are_not(tiny, tmp_path):
    """The same path with another text: --resume would go on with other rows than it began with."""
    data, text = tmp_path / "data.jsonl", tiny.data.read_text()
    data.write_text(text)
    run_here("sdft", tmp_path / "r", tiny, f"--data {data}")
    for flag, was, now in (("ema-rate", 0.01, 0.5), ("seed", 0, 1)):
        with pytest.raises(common.InputError, match=f"was started with --{flag} {was}, not {now}"):
            run_here("sdft", tmp_path / "r", tiny, f"--data {data} --resume --{flag} {now}")
    data.write_text(text.replace("zig:47210", "zig:47211", 1))
    with pytest.raises(common.InputError, match="the data or the chat template changed since"):
        run_here("sdft", tmp_path / "r", tiny, f"--data {data} --resume")
    data.write_text(text)
    more = f"--data {data} --resume --tokens-per-batch 99 --eval-every 1"
    assert len(run_here("sdft", tmp_path / "r", tiny, more)) == 4
    (tmp_path / "r" / "config.json").unlink()
    with pytest.raises(common.InputError, match="config.json.; use another folder"):
        run_here("sdft", tmp_path / "r", tiny, more)


READ = "reads: <|user|>zig:47210<|end|><|assistant|>"
DRY = {"sdft": ["3 steps of 8 prompts", f"student {READ}", "teacher reads: <|user|>\nzig:47210\n"]}
DRY["distill"] = [f"student and teacher {READ.replace('reads', 'read')}"]


@pytest.mark.parametrize("script", DRY)
def test_dry_run_checks_and_shows_both_sides_but_leaves_nothing(script, tiny, tmp_path, monkeypatch, capsys):
    code, text, _ = start(script, flags_of(script, tmp_path / "r", tiny, "--dry-run"), monkeypatch, capsys)
    assert code == 0 and all(line in text for line in DRY[script]), text
    assert not (tmp_path / "r").exists()


def test_non_finite_gradients_skip_and_then_stop(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("sdft.learning_rate", lambda *a: float("inf"))
    with pytest.raises(common.RunError, match="five gradients in a row were not finite"):
        run_here("sdft", tmp_path / "r", tiny, "--steps 6")  # the first one makes the weights infinite


def test_four_gradients_in_a_row_may_be_skipped_again_and_again(tiny, tmp_path, monkeypatch):
    norms = [*[math.inf] * 4, 1.0, *[math.nan] * 4]
    clip = Mock(side_effect=[torch.tensor(norm) for norm in norms])
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    rows = run_here("sdft", tmp_path / "r", tiny, "--steps 9")
    assert [row["train/skipped"] for row in rows[1:]] == [1, 2, 3, 4, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_needs_no_world(script, monkeypatch, capsys):
    code, text, _ = start(script, "--help", monkeypatch, capsys)
    assert code == 0 and "--max-completion-tokens" in text and "minimise" in text


def test_importing_the_scripts_does_nothing():
    command = [sys.executable, "-c", f"import {', '.join(SCRIPTS)}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == ""


def test_a_search_that_ends_at_once_has_no_curves(tmp_path):
    common.append_jsonl(tmp_path / "metrics.jsonl", [{"step": 1, "search/attempts": 3, "search/solved": 1}])
    common.draw_curves(tmp_path)
    assert not (tmp_path / "curves.png").exists()
    common.append_jsonl(tmp_path / "metrics.jsonl", [{"step": 2, "train/loss": 0.5}])
    common.draw_curves(tmp_path)
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_wandb_gets_every_row_and_a_resumed_run_goes_on_there(tiny, tmp_path, monkeypatch):
    wandb = MagicMock(__spec__=importlib.machinery.ModuleSpec("wandb", None))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    more = "--wandb-project p --save-every 1"
    with killed_after(2):
        run_here("sdft", tmp_path / "r", tiny, more)
    rows = run_here("sdft", tmp_path / "r", tiny, f"{more} --resume")
    logged = [(call.kwargs["step"], call.args[0]) for call in wandb.init.return_value.log.call_args_list]
    steps = [(step, metrics["step"]) for step, metrics in logged if "step" in metrics]
    assert steps == [(i, i) for i in (0, 1, 2, 2, 3)] and logged[-1][1] == rows[-1]
    first, second = wandb.init.call_args_list
    assert first == second and first.kwargs["id"]
    assert (first.kwargs["project"], first.kwargs["name"], first.kwargs["resume"]) == ("p", "r", "allow")
    samples = common.read_jsonl(tmp_path / "r" / "samples.jsonl")
    tables = [call.args for call in wandb.Table.call_args_list]
    assert [dict(zip(columns, row, strict=True)) for columns, data in tables for row in data] == samples
    assert sum(metrics == {"samples/eval": wandb.Table.return_value} for _, metrics in logged) == len(tables)
    [summary] = [call.args[0] for call in wandb.init.return_value.summary.update.call_args_list]
    averages = [row["eval/avg@1"] for row in rows if "eval/avg@1" in row]
    assert summary == {"base/avg": averages[0], "best/avg": max(averages), "last/avg": averages[-1]}


def test_wandb_that_is_not_there(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(common.InputError, match="--wandb-project p needs wandb: pip install wandb"):
        run_here("sdft", tmp_path / "r", tiny, "--wandb-project p")
