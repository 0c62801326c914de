"""Sharded over two and three processes the five scripts compute what one process computes; they save and resume with any number.

Run by torchrun, this file is the processes' side: the runs of a JSON list, one after the other in one process group.
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

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import ROOT, checkpoint, flags_of, make_model, metrics_of, part, run_here

VOLATILE = ("time/", "memory/")
JUDGE = "def judge(completion, row):\n    n = sum(map(ord, completion)) % 4\n    return (float(n == 0), f'4:{n % 10};')\n"

# name -> (script, flags). Twelve prompts a step: a share for each of one, two and three processes.
RUNS = {
    "sdft": ("sdft", "--steps 5"),
    "sdft-lora": ("sdft", "--lora-rank 2 --average token --tokens-per-batch 100 --generate-from teacher --is-cap 0"),
    "sdft-tied-lockstep": ("sdft", "--model {tied} --entropy-quantile 0.5 --no-gather-to-sample --sample-batch 3 --steps 2"),
    "sdpo": ("sdpo", "--verifier {judge} --steps 5 --prompts-per-step 4 --mini-batch 1 --rollouts 2 --teacher-samples 2 --is-level sequence"),
    "sdpo-lora": ("sdpo", "--verifier {judge} --lora-rank 2 --teacher trust_region --kl-coef 0.1 --policy-weight 0.5 --prompts-per-step 4"),
    "srt": ("srt", "--steps 5"),
    "srt-lora": ("srt", "--lora-rank 2 --no-gather-to-sample --tokens-per-batch 200"),
    "sdzero": ("sdzero", "--steps 5"),
    "sdzero-lora": ("sdzero", "--lora-rank 2 --sync-every 1"),
    "distill": ("distill", "--steps 5 --lmbda 0.5 --outputs teacher --sample-batch 3 --activation-checkpointing"),
    "distill-lora": ("distill", "--lora-rank 2 --objective policy_gradient --is-cap inf --mini-batch 6 --tokens-per-batch 60 --cut-off drop"),
    "gpt2": ("sdft", "--model {gpt2} --teacher base --lora-rank 1 --steps 2"),
}


def torchrun(n: int, jobs: list[tuple[str, str, str]], tiny: SimpleNamespace) -> None:
    """Runs [(script, out, flags)] one after the other on n processes."""
    folder = {name: str(path) for name, path in vars(tiny).items()}
    done = subprocess.run([*TORCHRUN, str(n), __file__, json.dumps([folder, [[script, str(out), flags] for script, out, flags in jobs]])],
                          cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-20000:]


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="session")
def world(tiny, tmp_path_factory) -> SimpleNamespace:
    """`out(name, n)`: the folder of run `name` on n processes; all of them are there."""
    folder = tmp_path_factory.mktemp("sharded")
    (folder / "judge.py").write_text(JUDGE)
    place = dict(tied=make_model(folder / "tied", tie_word_embeddings=True), gpt2=make_model(folder / "gpt2", "gpt2"), judge=f"{folder}/judge.py:judge")
    flags = {name: f"--prompts-per-step 12 --steps 5 --save-every 1 --eval-temperature 1 {more.format(**place)}" for name, (_, more) in RUNS.items()}
    for name, (script, _) in RUNS.items():
        run_here(script, folder / "1" / name, tiny, flags[name])
    for n in (2, 3):
        torchrun(n, [(script, folder / str(n) / name, flags[name]) for name, (script, _) in RUNS.items()], tiny)
    return SimpleNamespace(tiny=tiny, folder=folder, flags=flags, out=lambda name, n: folder / str(n) / name)


def same(a: list[dict], b: list[dict], rel: float = 1e-5) -> None:
    """Every metric of every step, but for times and memory."""
    assert [r["step"] for r in a] == [r["step"] for r in b]
    for x, y in zip(a, b):
        keys = {k for k in x | y if not k.startswith(VOLATILE)}
        assert {k: x[k] for k in keys} == {k: pytest.approx(y[k], rel=rel, abs=1e-9) for k in keys}


def last(out: Path) -> dict:
    return checkpoint(out, metrics_of(out)[-1]["step"])


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("name", RUNS)
def test_the_numbers_of_one_process(name, n, world):
    """Loss, gradient norm, rollouts, evaluation; ranks with unequal shares or none, tied heads, lock-step sampling, checkpointed layers."""
    one = metrics_of(world.out(name, 1))
    assert all(row["train/grad_norm"] > 0 and row["rollout/length"] > 3 for row in one[1:])
    same(metrics_of(world.out(name, n)), one)


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("name", ["sdft", "sdft-lora", "sdpo", "sdzero-lora"])
def test_student_and_teacher_tensor_by_tensor(name, n, world):
    """Trap 34. Whole tensors of the sharded run against those of one process, relative to how far they moved at most."""
    a, b = last(world.out(name, 1)), last(world.out(name, n))
    assert part(a, "teacher").keys() == part(a, "student").keys() and a.keys() == b.keys()
    for side in ("student", "teacher"):
        for key, tensor in part(a, side).items():
            assert torch.allclose(part(b, side)[key], tensor, rtol=1e-5, atol=2e-5), (side, key)
    moved = [not torch.equal(part(a, "teacher")[key], tensor) for key, tensor in part(a, "student").items()]
    assert all(moved) or name == "sdzero-lora"               # there the teacher has just become the student


@pytest.mark.parametrize("n", [2, 3])
def test_every_process_holds_its_share(n, world):
    """A tensor of 64 rows lies in n pieces, moments and teacher as well: nothing is replicated."""
    metadata = dcp.FileSystemReader(world.out("sdft", n) / "checkpoints" / "step-00000005").read_metadata().state_dict_metadata
    big = {name: m for name, m in metadata.items() if "gate_proj" in name and not name.endswith("/step")}
    assert {name.split("/")[0] for name in big} == {"student", "teacher", "optimizer"} and {len(m.chunks) for m in big.values()} == {n}


@pytest.mark.parametrize("name", ["sdft", "sdft-tied-lockstep", "sdft-lora", "gpt2"])
def test_a_saved_folder_is_the_trained_model(name, world):
    """last/ of two processes: gathered, adapters merged, tied heads once; it reopens with the weights of one process."""
    from safetensors.torch import load_file
    one, two = (load_file(world.out(name, n) / "last" / "model.safetensors") for n in (1, 2))
    assert one.keys() == two.keys() and not any("lora" in key for key in one)
    assert all(torch.allclose(two[key], tensor, atol=2e-5) for key, tensor in one.items())
    assert ("lm_head.weight" in one) == (name in ("sdft", "sdft-lora"))
    assert (world.out(name, 1) / "last" / "config.json").read_text() == (world.out(name, 2) / "last" / "config.json").read_text()


def rewind(world, name: str, n: int, to: str) -> Path:
    """A copy of a run, as if it had been killed after the step before its last."""
    out = world.folder / to
    shutil.copytree(world.out(name, n), out)
    shutil.rmtree(sorted((out / "checkpoints").glob("step-*"))[-1])
    return out


@pytest.mark.parametrize("name", ["sdft", "sdft-lora"])
def test_two_processes_are_continued_by_one(name, world):
    out = rewind(world, name, 2, f"2-1-{name}")
    run_here("sdft", out, world.tiny, world.flags[name] + " --resume")
    same(metrics_of(out), metrics_of(world.out(name, 1)))


def test_one_process_is_continued_by_three_and_copies_count_once(world):
    """And, on four, two copies of a model that two processes share each (--replicas 2): their gradients are added up once."""
    names = ["sdft", "sdft-lora"]
    torchrun(3, [("sdft", rewind(world, name, 1, f"1-3-{name}"), world.flags[name] + " --resume") for name in names], world.tiny)
    torchrun(4, [("sdft", rewind(world, name, 3, f"3-4-{name}"), world.flags[name] + " --replicas 2 --resume") for name in names], world.tiny)
    for name in names:
        for way in ("1-3", "3-4"):
            same(metrics_of(world.folder / f"{way}-{name}"), metrics_of(world.out(name, 1)))


# ---- What ends a run, and what does not

def begun(world, out: Path, judge: str, more: str = "") -> subprocess.Popen:
    """sdpo.py by torchrun on two processes; `judge` is the body of its verifier, which knows `rank` and the number `calls` so far."""
    out.parent.mkdir(parents=True, exist_ok=True)
    file = out.parent / f"{out.name}.py"
    file.write_text(f"import os, resource, signal, time\nrank, calls = int(os.environ['RANK']), 0\ndef judge(completion, row):\n    global calls\n"
                    f"    calls += 1\n    {judge}\n    return float(calls % 3 == 0)\n")
    flags = flags_of("sdpo", out, world.tiny, f"--verifier {file}:judge --rollouts 2 --prompts-per-step 4 --steps 4 --save-every 1 --teacher-samples 0 {more}")
    return subprocess.Popen([*TORCHRUN, "2", "sdpo.py", *flags.split()], cwd=ROOT, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen, limit: float) -> tuple[str, str]:
    """Its exit within `limit` seconds; what it said, and what its processes called errors."""
    said, errors = process.communicate(timeout=limit)
    return said, "\n".join(line for line in errors.splitlines() if "error: " in line and "torch/distributed" not in line)


def steps_saved(out: Path) -> list[int]:
    return sorted(int(folder.name[5:]) for folder in (out / "checkpoints").glob("step-*"))


# Eight attempts and four evaluation rows to each process, which grades 4 + 4 of them before step 2 and 4 a step.
def test_a_verifier_that_hangs_is_named_with_its_row(world, tmp_path):
    """No verdict for half of --timeout: one sentence, every process ends, and the last checkpoint is there."""
    process = begun(world, tmp_path / "r", "time.sleep(300 * (rank == 1 and calls == 10))", "--timeout 0.4")
    _, errors = ended(process, 100)
    assert process.returncode == 1 and "[rank 1] error: the verifier has not come back from data.jsonl:" in errors and "0.2 minutes" in errors
    assert steps_saved(tmp_path / "r") == [1]


def test_a_verifier_that_breaks_is_named_with_its_row(world, tmp_path):
    process = begun(world, tmp_path / "r", "1 / (rank == 0 or calls < 10)")
    _, errors = ended(process, 100)
    assert process.returncode == 1 and "broke on data.jsonl:" in errors and "[rank 1] error: --verifier" in errors and "ZeroDivisionError" in errors


def test_a_dead_process_ends_the_others_and_the_run_goes_on_from_its_checkpoint(world, tmp_path):
    """kill -9 of one of two in step 3; the other names what happened, and one process continues to the end."""
    process = begun(world, tmp_path / "r", "rank == 1 and calls == 14 and not os.path.exists(__file__ + '.died') and (open(__file__ + '.died', 'w'), os.kill(os.getpid(), 9))")
    _, errors = ended(process, 100)
    assert process.returncode == 1 and steps_saved(tmp_path / "r")[-1] == 2
    assert "[rank 0] error: another process is gone" in errors and "torchrun --nproc-per-node 2 sdpo.py" in errors and "--resume" in errors
    whole = begun(world, tmp_path / "r", "pass", "--resume")
    ended(whole, 100)
    assert whole.returncode == 0 and steps_saved(tmp_path / "r") == [3, 4] and (tmp_path / "r" / "last").exists()


def test_a_silent_process_ends_the_others_after_the_timeout(world, tmp_path):
    """A stopped process answers nothing and is not dead: --timeout, not half an hour."""
    process = begun(world, tmp_path / "r", "rank == 1 and calls == 10 and os.kill(os.getpid(), signal.SIGSTOP)", "--timeout 0.4")
    began = time.time()
    _, errors = ended(process, 150)
    assert process.returncode == 1 and "has not answered for --timeout minutes" in errors and time.time() - began < 140


def test_a_full_disk_stops_the_run_or_not(world, tmp_path):
    """No file may grow from step 3 on: the checkpoint of step 2 stays, and with --keep-going the run ends as it should."""
    full = "rank == 1 and calls == 14 and resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))"
    process = begun(world, tmp_path / "stops", full)
    _, errors = ended(process, 100)
    assert process.returncode == 1 and "the checkpoint of step 3 could not be written (rank 1: " in errors and "step-00000002" in errors
    assert steps_saved(tmp_path / "stops") == [1, 2] and "go on with: torchrun" in errors
    process = begun(world, tmp_path / "goes", full, "--keep-going")
    said, errors = ended(process, 100)
    assert process.returncode == 0 and not errors and said.count("could not be written") == 2 and steps_saved(tmp_path / "goes") == [1, 2]
    assert [row["step"] for row in metrics_of(tmp_path / "goes")] == [0, 1, 2, 3, 4]


def test_sigterm_reaches_every_process(world, tmp_path):
    """torchrun passes it on; the step under way is finished, saved, and the command that goes on is printed."""
    process = begun(world, tmp_path / "r", "time.sleep(0.2)", "--steps 500 --save-every 400")
    deadline = time.time() + 100
    while not (tmp_path / "r" / "metrics.jsonl").exists() or len(metrics_of(tmp_path / "r")) < 3:
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said, errors = ended(process, 60)
    assert "go on with: torchrun --nproc-per-node 2 sdpo.py" in said and not errors
    assert steps_saved(tmp_path / "r") == [metrics_of(tmp_path / "r")[-1]["step"]]


if __name__ == "__main__":
    place, jobs = json.loads(sys.argv[1])
    for script, out, flags in jobs:
        run_here(script, Path(out), SimpleNamespace(**{name: Path(path) for name, path in place.items()}), flags)
    torch.distributed.destroy_process_group()
