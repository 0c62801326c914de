"""A tiny random model of each family, saved as a user's folder would be: enough for all but learning."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)

import toy  # noqa: E402

QUICK = {"test_loss", "test_models", "test_readme", "test_rows", "test_sampler", "test_settings"}
QUICK |= {"test_teacher", "test_verifiers"}
LONG = "endless_answer", "total_time"  # they wait for limits of time
WORLD = {"test_learning", "test_toy"}  # last: they need the laptop worlds, which take minutes to make


def pytest_configure(config):
    """All tests but those marked gpu are of the CPU, in float32, whatever the machine has."""
    if "gpu" not in config.option.markexpr:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list) -> None:
    items.sort(key=lambda item: item.module.__name__ in WORLD)
    for item in items:
        if item.module.__name__ in QUICK and not any(name in item.name for name in LONG):
            item.add_marker("quick")


@pytest.fixture(scope="session", autouse=True)
def worlds(request):
    """The laptop worlds are made beside the other tests, on the second core; a test that is early waits."""
    builder = None
    if {item.module.__name__ for item in request.session.items} & WORLD:
        command = [sys.executable, "-c", "import toy; toy.build(); toy.build_lock()"]
        options = dict(cwd=ROOT / "tests", env={**os.environ, "OMP_NUM_THREADS": "1"})
        builder = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options)
    yield
    if builder:
        builder.send_signal(signal.SIGINT)  # which cleans up behind itself


EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
SHARED = dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, n_shared_experts=1)
SHARED |= dict(first_k_dense_replace=1, n_group=1, topk_group=1)
LATENT = dict(q_lora_rank=None, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
HYBRID = dict(linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2)
HYBRID |= dict(linear_num_value_heads=4, layer_types=["linear_attention", "full_attention"])
MAMBA = dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=4)
FAMILIES = {
    "qwen3": ("Qwen3Config", {}),
    "llama": ("LlamaConfig", {}),
    "gemma2": ("Gemma2Config", {}),
    "gpt2": ("GPT2Config", {}),
    "granite": ("GraniteConfig", {}),
    "cohere": ("CohereConfig", {}),
    "qwen3_5": ("Qwen3_5TextConfig", HYBRID),
    "qwen3_next": ("Qwen3NextConfig", HYBRID | EXPERTS | {"shared_expert_intermediate_size": 16}),
    "qwen3_moe": ("Qwen3MoeConfig", EXPERTS),
    "mistral": ("MistralConfig", {}),
    "mixtral": ("MixtralConfig", dict(num_local_experts=4, num_experts_per_tok=2)),
    "gpt_oss": ("GptOssConfig", dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=8)),
    "glm4_moe": ("Glm4MoeConfig", SHARED),
    "deepseek_v3": ("DeepseekV3Config", SHARED | LATENT | {"num_key_value_heads": 4}),
    "falcon_h1": ("FalconH1Config", {**MAMBA, "mamba_d_ssm": 64}),
    "granite_hybrid": (
        "GraniteMoeHybridConfig",
        {**MAMBA, "layer_types": ["mamba", "attention"], "num_local_experts": 0},
    ),
    "jamba": ("JambaConfig", dict(mamba_d_state=4, attn_layer_period=2, attn_layer_offset=1, num_experts=2)),
    "mamba": ("MambaConfig", dict(state_size=4)),
}


def make_model(folder: Path, family: str = "qwen3", seed: int = 0, **changes) -> Path:
    """A saved random model of `family` with the laptop world's tokenizer; its weights are large."""
    import transformers

    tokenizer = toy.make_tokenizer()
    shape = dict(
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        initializer_range=0.3,
    )
    if family == "gpt2":
        shape |= dict(n_embd=32, n_layer=2, n_head=4, n_positions=512)
    else:
        shape |= dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
        shape |= dict(num_key_value_heads=2, head_dim=8, max_position_embeddings=512)
        shape |= dict(pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=False)
    config_class, own = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, config_class)(**shape | own | changes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> SimpleNamespace:
    """`model`, `teacher`: random Qwen3 folders; `data`: 24 rows with demonstrations; `eval`: 8 rows."""
    folder = tmp_path_factory.mktemp("tiny")
    make_model(folder / "model")
    make_model(folder / "teacher", seed=6)
    digits = ["4721", "38", "905", "1", "66", "7203", "418", "59"]
    rows = []
    for i in range(3):
        for d in digits:  # of unequal length
            context = "so" + "".join(f"{a}>{i % 7};" for a in d)
            row = {"prompt": f"zig:{d}{i % 10}", "privileged_context": context, "answer": d}
            rows.append({**row, "completion": d[::-1]})
    for name, part in (("data", rows), ("eval", rows[:8])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    files = dict(data=folder / "data.jsonl", eval=folder / "eval.jsonl")
    return SimpleNamespace(folder=folder, model=folder / "model", teacher=folder / "teacher", **files)


# A verifier with rewards and feedback for any text.
JUDGE = """
def judge(completion, row):
    n = sum(map(ord, completion)) % 4
    return (float(n == 0), f'4:{n % 10};')
"""


def launch(command: str, processes: int = 1, cwd: Path = ROOT, gpu: bool = False) -> subprocess.CompletedProcess:
    """Runs `sdft.py --flag ...` as a user would, with python or torchrun, one thread per process."""
    runner = [sys.executable]
    if processes > 1:
        runner += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    env |= {} if gpu else {"CUDA_VISIBLE_DEVICES": ""}
    options = dict(capture_output=True, text=True, timeout=600)
    return subprocess.run([*runner, *command.split()], cwd=cwd, env=env, **options)


def metrics_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def checkpoint(out, step):
    """Its tensors by name, whole, and its state."""
    folder = out / "checkpoints" / f"step-{step:08d}"
    metadata = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(m.size, dtype=m.properties.dtype) for name, m in metadata.items()}
    dcp.load(tensors, checkpoint_id=folder, no_dist=True)
    return {**tensors, **json.loads((folder / "state.json").read_text())}


def part(state, name):
    return {key.removeprefix(f"{name}/"): value for key, value in state.items() if key.startswith(f"{name}/")}


def run_here(script: str, out: Path, tiny: SimpleNamespace, flags: str = "") -> list[dict]:
    """One run of a script in this process on the tiny model; its metrics, a row a step."""
    import importlib

    from common import parse_args

    module = importlib.import_module(script)
    module.main(parse_args(module.Args, module.PRESETS, flags_of(script, out, tiny, flags).split()))
    return metrics_of(out)


@contextlib.contextmanager
def killed_after(step: int):
    """A run inside dies when it has logged this step, before it saves it."""
    from common import Run

    log = Run.log

    def die(run, number, metrics):
        log(run, number, metrics)
        if number == step:
            raise MemoryError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(Run, "log", die)
        yield


def same(a: list[dict], b: list[dict], rel: float = 0) -> None:
    """Every metric of every step, but for times, memory and, given `rel`, the gap, which is rounding."""
    assert [r["step"] for r in a] == [r["step"] for r in b]
    for x, y in zip(a, b, strict=True):
        keys = {k for k in x | y if not k.startswith(("time/", "memory/"))}
        if rel:
            keys = {k for k in keys if not k.startswith("rollout/logp_gap")}
            assert max(x.get("rollout/logp_gap_max", 0), y.get("rollout/logp_gap_max", 0)) < 1e-4
        expected = {k: pytest.approx(y[k], rel=rel, abs=1e-9 if rel else 0) for k in keys}
        assert {k: x[k] for k in keys} == expected


def flags_of(script: str, out: Path, tiny: SimpleNamespace, more: str = "") -> str:
    """Three steps of a script on the tiny model, small enough for any test."""
    own = {
        "sdft": "--skip-tokens 1",
        "sdpo": "--rollouts 3 --eval-samples 1 --eval-temperature 0",
        "srt": "--collect-batch 6 --keep all --eval-temperature 0",
        "sdzero": "--phrases qwen --eval-temperature 0",
        "distill": f"--teacher {tiny.teacher} --verifier exact --eval-temperature 0",
    }
    common = (
        f"--model {tiny.model} --data {tiny.data} --eval-data {tiny.eval} --max-completion-tokens 30 "
        f"--max-prompt-tokens 64 --prompts-per-step 8 --steps 3 --warmup 1 --lr 1e-3 --out {out}"
    )
    return f"{common} {own[script]} {more}"
