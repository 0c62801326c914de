"""An algorithm taken home: its script and common.py alone, with a user's rows, verifier and model."""

import ast
import json
import re
import shutil
import sys
import tomllib

import pytest
from conftest import ROOT, launch, make_model, metrics_of

README = (ROOT / "README.md").read_text()
GRADE = re.search(r"```python\n(def grade.*?)```", README, re.S)[1]
OWN = {
    "sdft": "--preset tooluse --skip-tokens 1",
    "sdpo": "--preset tooluse --rollouts 2 --topk 8 --eval-samples 1",
    "srt": "--preset math --keep all --collect-batch 2 --eval-samples 1",
    "sdzero": "--preset math --phrases qwen --eval-samples 1",
    "distill": "--preset gkd-gsm8k --teacher teacher",
}
ROWS = dict(zip(OWN, re.search(r"```json\n(.*?)```", README, re.S)[1].splitlines(), strict=True))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A small model of another family, and a teacher for distill.py."""
    folder = tmp_path_factory.mktemp("models")
    make_model(folder / "model", "llama")
    make_model(folder / "teacher", "llama", seed=3)
    return folder


@pytest.mark.parametrize("script", ROWS)
def test_two_files_are_enough(script, models, tmp_path, monkeypatch):
    for file in (f"{script}.py", "common.py"):
        shutil.copy(ROOT / file, tmp_path)
    shutil.copytree(models, tmp_path, dirs_exist_ok=True)
    as_messages = {**json.loads(ROWS[script]), "prompt": [{"role": "user", "content": "add:12+34"}]}
    (tmp_path / "rows.jsonl").write_text(f"{ROWS[script]}\n{json.dumps(as_messages)}\n" * 2)
    (tmp_path / "mine.py").write_text(GRADE)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    done = launch(
        f"{script}.py --model model --data rows.jsonl --eval-data rows.jsonl --verifier mine.py:grade --out run "
        f"--steps 2 --prompts-per-step 2 --max-completion-tokens 8 --warmup 1 --lr 1e-3 {OWN[script]}",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert metrics_of(tmp_path / "run")[-1]["step"] == 2
    assert (tmp_path / "run" / "last" / "config.json").exists()


@pytest.mark.parametrize("script", ROWS)
def test_it_needs_what_pyproject_lists(script):
    """On import the two files need the standard library, each other and dependencies; the rest is lazy."""
    lines = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    listed = {re.match(r"[\w-]+", line)[0] for line in lines}
    for file in (script, "common"):
        tree = ast.parse((ROOT / f"{file}.py").read_text())
        names = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
        assert {name.split(".")[0] for name in names} <= listed | {"common"} | sys.stdlib_module_names
