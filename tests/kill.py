"""kill -9 at random moments of a run on two processes; --resume must end with the undisturbed run's bytes.

    python tests/kill.py --kills 20 --script sdpo

A third of the kills wait until a checkpoint is half written. Prints a line for each kill, and exits 1 if any
run ends otherwise.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch

from conftest import JUDGE, ROOT, checkpoint, flags_of, make_model

STEPS = 12
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def start(script: str, flags: str) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    command = [*TORCHRUN, f"{script}.py", *flags.split()]
    return subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True, **quiet)


def tensors(out: Path) -> dict[str, torch.Tensor]:
    """Student, teacher and optimiser after the last step."""
    return {name: value for name, value in checkpoint(out, STEPS).items() if isinstance(value, torch.Tensor)}


def children(pid: int) -> list[int]:
    """torchrun puts each process into a session of its own."""
    tasks = Path(f"/proc/{pid}/task/{pid}/children")
    own = [int(child) for child in tasks.read_text().split()] if tasks.exists() else []
    return [*own, *(grandchild for child in own for grandchild in children(child))]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--script", default="sdpo")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    make_model(folder / "model", hidden_size=256, intermediate_size=512)
    make_model(folder / "teacher", seed=6)
    rows = [
        {"prompt": f"zig:{i}7{i}", "privileged_context": f"so{i}>7;", "answer": str(i)} for i in range(24)
    ]
    rows = [{**row, "completion": row["answer"]} for row in rows]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "judge.py").write_text(JUDGE)
    data = folder / "data.jsonl"
    tiny = SimpleNamespace(model=folder / "model", teacher=folder / "teacher", data=data, eval=data)
    more = f"--steps {STEPS} --save-every 1 --eval-every 4 --verifier {folder}/judge.py:judge"

    def flags(name: str) -> str:
        return flags_of(args.script, folder / name, tiny, more)

    if start(args.script, flags("whole")).wait():
        raise SystemExit(f"{args.script}.py fails undisturbed")
    whole, rng, failed = tensors(folder / "whole"), random.Random(0), 0
    logged = (folder / "whole" / "metrics.jsonl").read_text().splitlines()
    for kill in range(args.kills):
        out = folder / f"killed-{kill}"
        run, half, step = start(args.script, flags(out.name)), kill % 3 == 0, rng.randint(0, STEPS - 1)
        log, lines = out / "metrics.jsonl", 0
        while run.poll() is None:  # at the chosen step, and for some kills in the middle of its save
            lines = log.read_text().count("\n") if log.exists() else 0
            if lines > step and (not half or (out / "checkpoints" / ".aside").exists()):
                break
            time.sleep(0.001)
        time.sleep(0 if half else rng.random() * 0.4)
        for pid in [*children(run.pid), run.pid]:
            with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
                os.kill(pid, signal.SIGKILL)
        run.wait()
        left = sorted(path.name for path in (out / "checkpoints").glob("*"))
        resumed = start(args.script, flags(out.name) + " --resume")
        code = resumed.wait()
        now = tensors(out) if code == 0 else {}
        same = now.keys() == whole.keys()
        same = same and all(torch.equal(tensor, whole[name]) for name, tensor in now.items())
        same = same and len(log.read_text().splitlines()) == len(logged)
        failed += not same
        verdict = "the same bytes" if same else f"NOT the same, exit {code}"
        found = " ".join(left) or "none"
        print(f"kill {kill + 1} after {lines} lines, checkpoints {found}: {verdict}", flush=True)
        shutil.rmtree(out)
    print(f"{args.script}: {args.kills - failed} of {args.kills} ended with the same bytes")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
