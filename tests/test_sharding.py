"""Sharded over two and three processes the five scripts compute what one process computes.

They save and resume with any number. Run by torchrun, this file is the processes' side: the runs of a JSON
list, one after the other in one process group.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import common
import pytest
import sdft
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from conftest import JUDGE, ROOT, checkpoint, flags_of, make_model, metrics_of, part, run_here

VOLATILE = ("time/", "memory/")

# name -> (script, flags). Twelve prompts a step give three processes equal shares; two leave one without.
RUNS = {
    "sdft": ("sdft", ""),
    "sdft-lora": ("sdft", "--lora-rank 2 --tokens-per-batch 100 --generate-from teacher --is-cap 0"),
    "sdft-tied": (
        "sdft",
        "--model {tied} --entropy-quantile 0.5 --sample-batch 3 --steps 2 --prompts-per-step 2",
    ),
    "sdpo": (
        "sdpo",
        "--verifier {judge} --prompts-per-step 4 --mini-batch 1 --rollouts 2 --teacher-samples 2 "
        "--average token",
    ),
    "sdpo-lora": (
        "sdpo",
        "--verifier {judge} --lora-rank 2 --teacher trust_region --policy-weight 0.5 --prompts-per-step 4",
    ),
    "srt": ("srt", ""),
    "srt-lora": ("srt", "--lora-rank 2 --tokens-per-batch 200"),
    "sdzero": ("sdzero", "--sync-every 2 --steps 4"),
    "sdzero-lora": ("sdzero", "--lora-rank 2 --prompts-per-step 2 --steps 2"),
    "distill": ("distill", "--lmbda 0.5 --outputs teacher --sample-batch 3 --activation-checkpointing"),
    "distill-lora": (
        "distill",
        "--lora-rank 2 --objective policy_gradient --mini-batch 6 --tokens-per-batch 60 --mask-truncated",
    ),
    "gpt2": ("sdft", "--model {gpt2} --teacher base --lora-rank 1 --steps 2"),
    "hybrid": ("sdft", "--model {hybrid} --steps 2"),
    "hybrid-lora": ("sdft", "--model {hybrid} --lora-rank 2 --steps 2"),
    "experts-lora": ("sdft", "--model {experts} --lora-rank 2 --steps 2"),
}
GRADIENTS = [
    (model, rank, teacher)
    for model in ("model", "tied")
    for rank in (0, 2)
    for teacher in ("base", "trust_region")
] + [("hybrid", 0, "base"), ("hybrid", 2, "base")]


def torchrun(n: int, jobs: list[tuple[str, str, str]], tiny: SimpleNamespace) -> None:
    """Runs [(script, out, flags)] one after the other on n processes."""
    folder = {name: str(path) for name, path in vars(tiny).items()}
    done = subprocess.run(
        [
            *TORCHRUN,
            str(n),
            __file__,
            json.dumps([folder, [[script, str(out), flags] for script, out, flags in jobs]]),
        ],
        cwd=ROOT,
        env=ENV,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-20000:]


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="session")
def world(tiny, tmp_path_factory) -> SimpleNamespace:
    """`out(name, n)`: the folder of run `name` on n processes; all of them are there."""
    folder = tmp_path_factory.mktemp("sharded")
    (folder / "judge.py").write_text(JUDGE)
    place = dict(
        tied=make_model(folder / "tied", tie_word_embeddings=True),
        gpt2=make_model(folder / "gpt2", "gpt2"),
        hybrid=make_model(folder / "hybrid", "qwen3_5"),
        experts=make_model(folder / "experts", "glm4_moe"),
        judge=f"{folder}/judge.py:judge",
    )
    flags = {
        name: f"--prompts-per-step 12 --steps 5 --save-every 1 --eval-temperature 1 {more.format(**place)}"
        for name, (_, more) in RUNS.items()
    }
    for name, (script, _) in RUNS.items():
        run_here(script, folder / "1" / name, tiny, flags[name])
    for model, rank, teacher in GRADIENTS:
        out = folder / "1" / f"{model}-{rank}-{teacher}.pt"
        save_gradients(out, tiny, gradient_flags(place | {"model": tiny.model}, model, rank, teacher))
    for n in (2, 3):
        jobs = [(script, folder / str(n) / name, flags[name]) for name, (script, _) in RUNS.items()]
        for model, rank, teacher in GRADIENTS:
            more = gradient_flags(place | {"model": tiny.model}, model, rank, teacher)
            jobs.append(("gradients", folder / str(n) / f"{model}-{rank}-{teacher}.pt", more))
        torchrun(n, jobs, tiny)
    return SimpleNamespace(tiny=tiny, folder=folder, flags=flags, out=lambda name, n: folder / str(n) / name)


def gradient_flags(place: dict, model: str, rank: int, teacher: str) -> str:
    return f"--model {place[model]} --lora-rank {rank} --teacher {teacher} --ema-rate 0.3 --rollouts 2"


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


def same(a: list[dict], b: list[dict], rel: float = 1e-5) -> None:
    """Every metric of every step, but for times and memory."""
    assert [r["step"] for r in a] == [r["step"] for r in b]
    for x, y in zip(a, b, strict=True):
        keys = {k for k in x | y if not k.startswith((*VOLATILE, "rollout/logp_gap"))}
        assert max(x.get("rollout/logp_gap_max", 0), y.get("rollout/logp_gap_max", 0)) < 1e-4
        assert {k: x[k] for k in keys} == {k: pytest.approx(y[k], rel=rel, abs=1e-9) for k in keys}


def last(out: Path) -> dict:
    return checkpoint(out, metrics_of(out)[-1]["step"])


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("name", RUNS)
def test_the_numbers_of_one_process(name, n, world):
    """Loss, gradient norm, rollouts, evaluation; unequal shares or none, tied heads."""
    one = metrics_of(world.out(name, 1))
    assert all(row["train/grad_norm"] > 0 and row["rollout/length"] > 1 for row in one[1:])
    same(metrics_of(world.out(name, n)), one)


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
    metadata = (
        dcp.FileSystemReader(world.out("sdft", n) / "checkpoints" / "step-00000005")
        .read_metadata()
        .state_dict_metadata
    )
    big = {name: m for name, m in metadata.items() if "gate_proj" in name and not name.endswith("/step")}
    assert {name.split("/")[0] for name in big} == {"student", "teacher", "optimizer"} and {
        len(m.chunks) for m in big.values()
    } == {n}


@pytest.mark.parametrize("name", ["sdft", "sdft-tied", "sdft-lora", "gpt2", "hybrid-lora"])
def test_a_saved_folder_is_the_trained_model(name, world):
    """last/ of two processes: gathered, adapters merged, tied heads once; the weights of one process."""
    from safetensors.torch import load_file

    one, two = (load_file(world.out(name, n) / "last" / "model.safetensors") for n in (1, 2))
    assert one.keys() == two.keys() and not any("lora" in key for key in one)
    assert all(torch.allclose(two[key], tensor, atol=2e-5) for key, tensor in one.items())
    assert ("lm_head.weight" in one) == (name not in ("sdft-tied", "gpt2"))
    assert (world.out(name, 1) / "last" / "config.json").read_text() == (
        world.out(name, 2) / "last" / "config.json"
    ).read_text()


def rewind(world, name: str, n: int, to: str) -> Path:
    """A copy of a run, as if it had been killed after the step before its last."""
    out = world.folder / to
    shutil.copytree(world.out(name, n), out)
    shutil.rmtree(sorted((out / "checkpoints").glob("step-*"))[-1])
    return out


@pytest.mark.parametrize("name", ["sdft", "sdft-lora", "sdzero", "hybrid"])
def test_two_processes_are_continued_by_one(name, world):
    """sdzero after step 3, between two syncs: the teacher is the student of step 2 until step 4."""
    out = rewind(world, name, 2, f"2-1-{name}")
    if name == "sdzero":
        kept = checkpoint(out, 3)
        assert not torch.equal(
            part(kept, "teacher")["lm_head.weight"], part(kept, "student")["lm_head.weight"]
        )
    run_here(RUNS[name][0], out, world.tiny, world.flags[name] + " --resume")
    same(metrics_of(out), metrics_of(world.out(name, 1)))
    a, b = last(out), last(world.out(name, 1))
    for key, tensor in part(a, "teacher").items():
        assert torch.allclose(tensor, part(b, "teacher")[key], rtol=1e-5, atol=2e-5), key


def test_one_process_is_continued_by_three(world):
    names = ["sdft", "sdft-lora"]
    jobs = [
        ("sdft", rewind(world, name, 1, f"1-3-{name}"), world.flags[name] + " --resume") for name in names
    ]
    torchrun(3, jobs, world.tiny)
    for name in names:
        same(metrics_of(world.folder / f"1-3-{name}"), metrics_of(world.out(name, 1)))


# ---- What ends a run


def begun(world, out: Path, judge: str, more: str = "") -> subprocess.Popen:
    """sdpo.py on two processes; `judge` is the body of its verifier, which knows `rank` and `calls`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    file = out.parent / f"{out.name}.py"
    file.write_text(
        f"import os, resource, time\nrank, calls = int(os.environ['RANK']), 0\n"
        f"def judge(completion, row):\n    global calls\n"
        f"    calls += 1\n    {judge}\n    return float(calls % 3 == 0)\n"
    )
    flags = flags_of(
        "sdpo",
        out,
        world.tiny,
        f"--verifier {file}:judge --rollouts 2 --prompts-per-step 4 --steps 4 --save-every 1 "
        f"--teacher-samples 0 {more}",
    )
    return subprocess.Popen(
        [*TORCHRUN, "2", "sdpo.py", *flags.split()],
        cwd=ROOT,
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen, limit: float) -> tuple[str, str]:
    """Its exit within `limit` seconds; what it said, and what its processes called errors."""
    said, errors = process.communicate(timeout=limit)
    return said, "\n".join(
        line for line in errors.splitlines() if "error: " in line and "torch/distributed" not in line
    )


def steps_saved(out: Path) -> list[int]:
    return sorted(int(folder.name[5:]) for folder in (out / "checkpoints").glob("step-*"))


# Each process grades four evaluation rows, then four attempts a step.
def test_a_verifier_that_fails_is_named_with_its_row(world, tmp_path):
    process = begun(world, tmp_path / "r", "1 / (rank == 0 or calls < 10)")
    _, errors = ended(process, 100)
    assert process.returncode == 1 and steps_saved(tmp_path / "r") == [1], errors
    assert "[rank 1] error: --verifier" in errors and "failed on data.jsonl:" in errors
    assert "(ZeroDivisionError: division by zero)" in errors


def test_a_dead_process_ends_the_run_and_the_last_checkpoint_resumes_it(world, tmp_path):
    """kill -9 of one of two in step 3; torchrun names it and ends the other."""
    mark = tmp_path / "died"
    judge = f"rank == 1 and calls == 14 and not os.path.exists({str(mark)!r})"
    process = begun(world, tmp_path / "r", f"{judge} and (open({str(mark)!r}, 'w'), os.kill(os.getpid(), 9))")
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 1 and steps_saved(tmp_path / "r") == [1, 2]
    assert "SIGKILL" in errors and "local_rank: 1" in errors
    again = begun(
        world, tmp_path / "r", f"{judge} and (open({str(mark)!r}, 'w'), os.kill(os.getpid(), 9))", "--resume"
    )
    ended(again, 100)
    assert (
        again.returncode == 0 and steps_saved(tmp_path / "r") == [3, 4] and (tmp_path / "r" / "last").exists()
    )


def test_a_full_disk_ends_the_run_and_keeps_the_last_checkpoint(world, tmp_path):
    """One of two processes cannot write from step 3 on: both end, the first with the sentence."""
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))"
    full = f"rank == 1 and calls == 14 and {limit}"
    process = begun(world, tmp_path / "r", full)
    _, errors = ended(process, 100)
    assert process.returncode == 1 and "error: the checkpoint of step 3 could not be written (" in errors, (
        errors
    )
    assert "make room and rerun the same command with --resume" in errors and steps_saved(tmp_path / "r") == [
        1,
        2,
    ]


def test_sigterm_reaches_every_process(world, tmp_path):
    """torchrun passes it on; the step under way is finished and saved."""
    process = begun(world, tmp_path / "r", "time.sleep(0.2)", "--steps 500 --save-every 400")
    deadline = time.time() + 100
    while not (tmp_path / "r" / "metrics.jsonl").exists() or len(metrics_of(tmp_path / "r")) < 3:
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said, errors = ended(process, 60)
    step = metrics_of(tmp_path / "r")[-1]["step"]
    assert (
        f"Stopped after step {step}. To continue, rerun the same command with --resume." in said
        and not errors
    )
    assert steps_saved(tmp_path / "r") == [step]


if __name__ == "__main__":
    paths, jobs = json.loads(sys.argv[1])
    tiny = SimpleNamespace(**{name: Path(path) for name, path in paths.items()})
    dist.init_process_group("gloo")
    for script, out, flags in jobs:
        if script == "gradients":
            save_gradients(Path(out), tiny, flags)
        else:
            run_here(script, Path(out), tiny, flags)
    dist.destroy_process_group()
    os._exit(0)  # as common.launch does, and for the same reason
