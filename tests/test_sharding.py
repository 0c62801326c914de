"""Sharded over two and three processes the five scripts compute what one process computes.

They save and resume with any number. Run by torchrun, this file is the processes' side: the runs of a JSON
list, one after the other in one process group.
"""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from conftest import JUDGE, ROOT, checkpoint, flags_of, launch, make_model, metrics_of, part, run_here, same
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import common
import sdft

# Flags by name, which begins with the script. Twelve prompts a step give three processes equal shares; two
# leave one without.
RUNS = {
    "sdft": "",
    "sdft-lora": "--lora-rank 2 --tokens-per-batch 100 --generate-from teacher --is-cap 0",
    "sdft-tied": "--model {tied} --entropy-quantile 0.5 --sample-batch 3 --steps 2 --prompts-per-step 2",
    "sdft-gpt2": "--model {gpt2} --teacher base --lora-rank 1 --steps 2",
    "sdft-hybrid": "--model {hybrid} --steps 2",
    "sdft-hybrid-lora": "--model {hybrid} --lora-rank 2 --steps 2",
    "sdft-experts-lora": "--model {experts} --lora-rank 2 --steps 2",
    "sdpo": "{judge} --mini-batch 1 --rollouts 2 --teacher-samples 2 --average token --prompts-per-step 4",
    "sdpo-lora": "{judge} --lora-rank 2 --teacher trust_region --policy-weight 0.5 --prompts-per-step 4",
    "srt": "",
    "srt-lora": "--lora-rank 2 --tokens-per-batch 200",
    "sdzero": "--sync-every 2 --steps 4",
    "sdzero-lora": "--lora-rank 2 --prompts-per-step 2 --steps 2",
    "distill": "--lmbda 0.5 --outputs teacher --sample-batch 3 --activation-checkpointing",
    "distill-lora": "--lora-rank 2 --objective policy_gradient --mini-batch 6 --tokens-per-batch 60 {masked}",
}
SCRIPT = {name: name.partition("-")[0] for name in RUNS}
GRADIENTS = [*itertools.product(("model", "tied"), (0, 2), ("base", "trust_region"))]
GRADIENTS += [("hybrid", 0, "base"), ("hybrid", 2, "base")]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
OPTIONS = dict(cwd=ROOT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})


def torchrun(n: int, jobs: list[tuple[str, str, str]], tiny: SimpleNamespace) -> None:
    """Runs [(script, out, flags)] one after the other on n processes."""
    folder = {name: str(path) for name, path in vars(tiny).items()}
    work = json.dumps([folder, [[script, str(out), flags] for script, out, flags in jobs]])
    done = subprocess.run([*TORCHRUN, str(n), __file__, work], capture_output=True, timeout=900, **OPTIONS)
    assert done.returncode == 0, done.stderr[-20000:]


@pytest.fixture(scope="session")
def world(tiny, tmp_path_factory) -> SimpleNamespace:
    """`out(name, n)`: the folder of run `name` on n processes; all of them are there."""
    folder = tmp_path_factory.mktemp("sharded")
    (folder / "judge.py").write_text(JUDGE)
    place = dict(judge=f"--verifier {folder}/judge.py:judge", masked="--mask-truncated", model=tiny.model)
    for name, family in (("gpt2", "gpt2"), ("hybrid", "qwen3_5"), ("experts", "glm4_moe"), ("tied", "qwen3")):
        place[name] = make_model(folder / name, family, tie_word_embeddings=name in ("tied", "gpt2"))
    fixed = "--prompts-per-step 12 --steps 5 --save-every 1 --eval-temperature 1"
    flags = {name: f"{fixed} {more.format(**place)}" for name, more in RUNS.items()}
    for n in (1, 2, 3):
        jobs = [(SCRIPT[name], folder / str(n) / name, flags[name]) for name in RUNS]
        for model, rank, teacher in GRADIENTS:
            more = f"--model {place[model]} --lora-rank {rank} --teacher {teacher} --ema-rate 0.3"
            out = folder / str(n) / f"{model}-{rank}-{teacher}.pt"
            jobs.append(("gradients", out, f"{more} --rollouts 2"))
        if n == 1:
            work(jobs, tiny)
        else:
            torchrun(n, jobs, tiny)
    return SimpleNamespace(tiny=tiny, folder=folder, flags=flags, out=lambda name, n: folder / str(n) / name)


def work(jobs: list[tuple[str, str, str]], tiny: SimpleNamespace) -> None:
    for script, out, flags in jobs:
        if script == "gradients":
            save_gradients(Path(out), tiny, flags)
        else:
            run_here(script, Path(out), tiny, flags)


def save_gradients(out: Path, tiny: SimpleNamespace, more: str) -> None:
    """Gradients of one loss on fixed texts, whole, in a file: divergence plus NLL through one head."""
    argv = flags_of("sdft", out.with_suffix(""), tiny, more).split()
    args = common.parse_args(sdft.Args, sdft.PRESETS, argv)
    run = common.Run(args)
    if run.world > 1:
        run.mesh = init_device_mesh("cpu", (run.world,))
    torch.manual_seed(0)
    student = common.load_model(args.model, run, args.lora_rank)
    teacher = common.Teacher(args.teacher, args.ema_rate, student, run)
    hybrid = student.config.model_type.startswith("qwen3_5")  # its recurrent state has no gradient
    assert student.shares_prompts == teacher.model.shares_prompts == (not hybrid)
    with torch.no_grad():  # away from the teacher, and from adapters of 0, whose gradients would be 0
        trained = {name: p for name, p in common.parameters_of(student).items() if p.requires_grad}
        for tensor in common.local(trained):
            tensor.add_(0.02)
    texts = [([5 + i // 2, 9, 20], [7, 30 - i, 12, 40][: 1 + i % 4]) for i in range(5)]
    mine = run.share(texts)
    targets = teacher.targets([([3, 4, *x], y) for x, y in mine])
    h_ND = common.completion_states(student, mine)
    head = common.head_of(student)
    y_N = torch.tensor([token for _, y in mine for token in y])
    weight_N = torch.full(y_N.shape, 1 / sum(len(y) for _, y in texts))
    loss, _ = common.distill_loss(h_ND, head, targets, y_N, weight_N, common.Objective("jsd"))
    logp_N, _ = common.token_logps(h_ND, head, y_N)
    (loss - (weight_N * logp_N).sum()).backward()
    grads = {name: p.grad for name, p in common.parameters_of(student).items() if p.requires_grad}
    grads = {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in grads.items()}
    if run.main:
        out.parent.mkdir(parents=True, exist_ok=True)
        torch.save(grads, out)


def last(out: Path) -> dict:
    return checkpoint(out, metrics_of(out)[-1]["step"])


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("name", RUNS)
def test_the_numbers_of_one_process(name, n, world):
    """Loss, gradient norm, rollouts, evaluation; unequal shares or none, tied heads."""
    one = metrics_of(world.out(name, 1))
    assert all(row["train/grad_norm"] > 0 and row["rollout/length"] > 1 for row in one[1:])
    same(metrics_of(world.out(name, n)), one, rel=1e-5)


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("name", ["sdft", "sdft-lora", "sdpo", "sdzero"])
def test_student_and_teacher_tensor_by_tensor(name, n, world):
    """Whole tensors of the sharded run against those of one process."""
    a, b = last(world.out(name, 1)), last(world.out(name, n))
    assert part(a, "teacher").keys() == part(a, "student").keys() and a.keys() == b.keys()
    for side in ("student", "teacher"):
        for key, tensor in part(a, side).items():
            assert torch.allclose(part(b, side)[key], tensor, rtol=1e-5, atol=2e-5), (side, key)
    moved = [not torch.equal(part(a, "teacher")[key], tensor) for key, tensor in part(a, "student").items()]
    assert all(moved) if name != "sdzero" else not any(moved)  # there the teacher has just become the student


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("model, rank, teacher", GRADIENTS)
def test_gradients_tensor_by_tensor(model, rank, teacher, n, world):
    """A head used after the forward pass: its gradient is added up over processes once, tied or not."""
    file = f"{model}-{rank}-{teacher}.pt"
    one, more = torch.load(world.folder / "1" / file), torch.load(world.folder / str(n) / file)
    assert one.keys() == more.keys() and len(one) > 20
    for name, gradient in one.items():
        assert gradient.norm() > 0, name
        assert torch.allclose(more[name], gradient, rtol=1e-5, atol=1e-5 * gradient.norm().item()), name


@pytest.mark.parametrize("n", [2, 3])
def test_every_process_holds_its_share(n, world):
    """A tensor of 64 rows lies in n pieces, moments and teacher as well: nothing is replicated."""
    reader = dcp.FileSystemReader(world.out("sdft", n) / "checkpoints" / "step-00000005")
    metadata = reader.read_metadata().state_dict_metadata
    big = {name: m for name, m in metadata.items() if "gate_proj" in name and not name.endswith("/step")}
    assert {name.split("/")[0] for name in big} == {"student", "teacher", "optimizer"}
    assert {len(m.chunks) for m in big.values()} == {n}


@pytest.mark.parametrize("name", ["sdft", "sdft-tied", "sdft-lora", "sdft-gpt2", "sdft-hybrid-lora"])
def test_a_saved_folder_is_the_trained_model(name, world):
    """last/ of two processes: gathered, adapters merged, tied heads once; the weights of one process."""
    from safetensors.torch import load_file

    one, two = (load_file(world.out(name, n) / "last" / "model.safetensors") for n in (1, 2))
    assert one.keys() == two.keys() and not any("lora" in key for key in one)
    assert all(torch.allclose(two[key], tensor, atol=2e-5) for key, tensor in one.items())
    assert ("lm_head.weight" in one) == (name not in ("sdft-tied", "sdft-gpt2"))
    configs = [(world.out(name, n) / "last" / "config.json").read_text() for n in (1, 2)]
    assert configs[0] == configs[1]


def rewind(world, name: str, n: int, to: str) -> Path:
    """A copy of a run, as if it had been killed after the step before its last."""
    out = world.folder / to
    shutil.copytree(world.out(name, n), out)
    shutil.rmtree(sorted((out / "checkpoints").glob("step-*"))[-1])
    return out


@pytest.mark.parametrize("name", ["sdft", "sdft-lora", "sdzero", "sdft-hybrid"])
def test_two_processes_are_continued_by_one(name, world):
    """sdzero after step 3, between two syncs: the teacher is the student of step 2 until step 4."""
    out = rewind(world, name, 2, f"2-1-{name}")
    if name == "sdzero":
        kept = checkpoint(out, 3)
        assert not torch.equal(kept["teacher/lm_head.weight"], kept["student/lm_head.weight"])
    run_here(SCRIPT[name], out, world.tiny, world.flags[name] + " --resume")
    same(metrics_of(out), metrics_of(world.out(name, 1)), rel=1e-5)
    a, b = last(out), last(world.out(name, 1))
    for key, tensor in part(a, "teacher").items():
        assert torch.allclose(tensor, part(b, "teacher")[key], rtol=1e-5, atol=2e-5), key


def test_one_process_is_continued_by_three(world):
    outs = {name: rewind(world, name, 1, f"1-3-{name}") for name in ("sdft", "sdft-lora")}
    torchrun(3, [("sdft", out, world.flags[name] + " --resume") for name, out in outs.items()], world.tiny)
    for name, out in outs.items():
        same(metrics_of(out), metrics_of(world.out(name, 1)), rel=1e-5)


def command(world, out: Path, judge: str, more: str = "") -> str:
    """sdpo.py, with a verifier whose body is `judge`, which knows `rank` and `calls`.

    On two processes each grades four evaluation rows, then four attempts a step."""
    file = out.with_suffix(".py")
    file.write_text(
        f"import os, resource, time\nrank, calls = int(os.environ['RANK']), 0\n"
        f"def judge(completion, row):\n    global calls\n"
        f"    calls += 1\n    {judge}\n    return float(calls % 3 == 0)\n"
    )
    fixed = f"--verifier {file}:judge --rollouts 2 --prompts-per-step 4 --steps 4 --save-every 1"
    return "sdpo.py " + flags_of("sdpo", out, world.tiny, f"{fixed} --teacher-samples 0 {more}")


def steps_saved(out: Path) -> list[int]:
    return sorted(int(folder.name[5:]) for folder in (out / "checkpoints").glob("step-*"))


def test_a_verifier_that_fails_is_named_with_its_row(world, tmp_path):
    out = tmp_path / "r"
    done = launch(command(world, out, "1 / (rank == 0 or calls < 10)"), 2)
    assert done.returncode == 1 and steps_saved(out) == [1], done.stderr
    named = r"\[rank 1\] error: --verifier .* failed on data.jsonl:.* \(ZeroDivisionError: division by zero\)"
    assert re.search(named, done.stderr), done.stderr


def test_a_dead_process_ends_the_run_and_the_last_checkpoint_resumes_it(world, tmp_path):
    """kill -9 of one of two in step 3; torchrun names it and ends the other."""
    out, mark = tmp_path / "r", tmp_path / "died"
    judge = f"rank == 1 and calls == 14 and not os.path.exists({str(mark)!r})"
    judge += f" and (open({str(mark)!r}, 'w'), os.kill(os.getpid(), 9))"
    done = launch(command(world, out, judge), 2)
    assert done.returncode == 1 and steps_saved(out) == [1, 2]
    assert "SIGKILL" in done.stderr and "local_rank: 1" in done.stderr
    assert launch(command(world, out, judge, "--resume"), 2).returncode == 0
    assert steps_saved(out) == [3, 4] and (out / "last").exists()


def test_a_full_disk_ends_the_run_and_keeps_the_last_checkpoint(world, tmp_path):
    """One of two processes cannot write from step 3 on: both end, the first with the sentence."""
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))"
    done = launch(command(world, tmp_path / "r", f"rank == 1 and calls == 14 and {limit}"), 2)
    assert done.returncode == 1 and steps_saved(tmp_path / "r") == [1, 2]
    assert "error: the checkpoint of step 3 could not be written (" in done.stderr, done.stderr
    assert "make room and rerun the same command with --resume" in done.stderr


def test_sigterm_reaches_every_process(world, tmp_path):
    """torchrun passes it on; the step under way is finished and saved."""
    out = tmp_path / "r"
    words = command(world, out, "time.sleep(0.2)", "--steps 500 --save-every 400").split()
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process = subprocess.Popen([*TORCHRUN, "2", *words], **pipes, **OPTIONS)
    deadline = time.time() + 600
    while not (out / "metrics.jsonl").exists() or len(metrics_of(out)) < 3:
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said, errors = process.communicate(timeout=600)
    step = metrics_of(out)[-1]["step"]
    assert f"Stopped after step {step}. To continue, rerun the same command with --resume." in said
    assert not [line for line in errors.splitlines() if "error: " in line and "torch/distributed" not in line]
    assert steps_saved(out) == [step]


if __name__ == "__main__":
    paths, jobs = json.loads(sys.argv[1])
    dist.init_process_group("gloo")
    work(jobs, SimpleNamespace(**{name: Path(path) for name, path in paths.items()}))
    dist.destroy_process_group()
    os._exit(0)  # as common.launch does, and for the same reason
