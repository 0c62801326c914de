"""One training step beside TRL's: the same model, prompts, lengths and settings, seconds by phase, tokens/s and memory.

pip install trl==1.16.0                                                not a dependency of this project
python tests/bench_trl.py                                              the check and every case: hours on one core
python tests/bench_trl.py --case sdpo-small-64 --lengths natural --clock cpu --repeats 1
python tests/bench_trl.py --case check                                 only the check

Written for TRL 1.16.0 (experimental SDFTTrainer and SDPOTrainer, DistillationTrainer), transformers 5.19, torch 2.13, CPU, fp32.
ours     `main` of sdpo.py, sdft.py, distill.py with flags, nothing else; phases are time/... of metrics.jsonl
TRL      the trainers as they are. Chosen for them: gradient_checkpointing and bf16 off (both are on by default), eager attention as ours
         on CPU, no shuffling, logging or saving. Micro-batches of 8 rows, on sdpo-small-64 no slower than 4 or 16;
         ours of 2048 tokens, there half the memory of 8192 and no slower beyond the noise; of the smol shape,
         --tokens-per-batch 4096 holds the whole step of 40-16 in less memory than TRL takes.
both     SDPO: 8 questions x 8 attempts, JSD 1/2 over all logits (topk: the student's top 100 and a tail), EMA teacher, three of four
         attempts right. SDFT: 32 prompts, forward KL over all logits, EMA teacher. Distillation: 32 prompts, JSD 1/2, token mean, a
         teacher of the student's shape. AdamW, gradient norm 1, no importance ratio (TRL's is inactive where each batch is used once).
model    random Qwen3. tiny: 4 layers x 128 and the laptop world's 89 tokens; small: 6 x 256 and 32768; smol: the shape of
         SmolLM2-135M, 30 x 576 and 49152, in bf16 autocast on both sides. One direction of the hidden state is constant and the EOS logit
         reads it alone. forced lengths: EOS is never drawn, so that both do the same work; natural: it is drawn with probability of about
         2 / limit at every token: nearly geometric lengths, with the same distribution on both sides
         sdpo-smol and sdft-smol: SmolLM2-135M itself, with the questions of smol.py and natural lengths up to 14, also in bf16 autocast
seconds  of a step, the first one left out; both sides take turns, each in a fresh process; medians over the repeats. --clock cpu counts the
         process's CPU seconds in place of wall time: on one thread the same work, without what a busy machine takes away
         generate | teacher: its forward | student: forward, loss, backward | other. TRL's teacher includes its logits, which ours
         makes inside the loss: there they count as the student's.
bound    seconds of the matrix products alone when every distinct prompt is read once (`least_seconds`)
MiB      growth of the process beyond what it held when the first step began: optimizer state, activations, logits, caches
"""
import argparse
import functools
import importlib
import importlib.util
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"


class Shape(NamedTuple):
    layers: int
    width: int
    mlp: int
    heads: int
    kv_heads: int
    vocabulary: int
    dtype: str = "float32"                                   # of forward passes; weights are fp32


SHAPES = {"tiny": Shape(4, 128, 384, 4, 2, 89), "small": Shape(6, 256, 768, 8, 4, 32768),
          "smol": Shape(30, 576, 1536, 9, 3, 49152, "bfloat16")}
SHAPES["pretrained"] = SHAPES["smol"]


class Case(NamedTuple):
    script: str
    shape: str
    limit: int                                               # longest completion, tokens
    support: str                                             # tokens that the divergence is summed over
    steps: int                                               # timed ones
    prompt: int = 0                                          # tokens of each prompt; 0: 8 to 27


CASES = {"sdpo-tiny-256": Case("sdpo", "tiny", 256, "full", 2), "sdpo-small-64": Case("sdpo", "small", 64, "full", 2),
         "sdft-small-64": Case("sdft", "small", 64, "full", 3), "distill-small-64": Case("distill", "small", 64, "full", 3),
         "sdpo-small-64-topk": Case("sdpo", "small", 64, "student_topk", 2), "sdpo-small-256": Case("sdpo", "small", 256, "full", 1)}
CASES |= {f"sdpo-smol-{prompt}-{limit}": Case("sdpo", "smol", limit, "full", 1, prompt) for prompt in (40, 300) for limit in (16, 128)}
CASES |= {f"{script}-smol": Case(script, "pretrained", 14, "full", 1) for script in ("sdpo", "sdft")}
PROMPTS = {"sdpo": (8, 8), "sdft": (32, 1), "distill": (32, 1)}                      # prompts per step, completions of each
PHASES = ("generate", "teacher", "student", "other")
K = 100

TEMPLATE = "{prompt}{solution}{feedback}\n\nCorrectly solve the original question."
SOLUTION = "\nCorrect solution:\n\n{solution}"
DEMONSTRATION = "\n{prompt}\n\nThis is an example for a response to the question:\n{demonstration}\n\nNow answer with a response of your own.\n"


def make_tokenizer(size: int) -> Any:
    """The laptop world's tokenizer, filled up to `size` tokens with words ⟨89⟩, ⟨90⟩, ..., so that text drawn from it reads back alike."""
    import toy
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast
    tokenizer = toy.make_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    words = state["model"]["vocab"]
    words |= {f"⟨{i}⟩": i for i in range(len(tokenizer), size)}
    state["pre_tokenizer"]["pattern"] = {"Regex": "⟨[0-9]+⟩|" + toy.PIECES}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), chat_template=tokenizer.chat_template,
                                   clean_up_tokenization_spaces=False, **tokenizer.special_tokens_map)


@torch.no_grad()
def make_model(folder: Path, shape: str, limit: int, lengths: str, seed: int = 0) -> None:
    """A random Qwen3 that ends its completions as the docstring says."""
    from transformers import Qwen3Config, Qwen3ForCausalLM
    layers, width, mlp, heads, kv_heads, size, _ = SHAPES[shape]
    tokenizer = make_tokenizer(size)
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=size, hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=width // heads, max_position_embeddings=2048, initializer_range=0.1, tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None, pad_token_id=tokenizer.pad_token_id)).eval()
    head = model.lm_head.weight
    model.model.embed_tokens.weight[:, 0] = 1.0
    for layer in model.model.layers:                         # nothing writes to direction 0 of the residual stream
        layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0.0
    head[:, 0] = head[tokenizer.eos_token_id] = 0.0
    h_ND = model.model(torch.randint(len(tokenizer), (8, 64))).last_hidden_state.flatten(0, 1)
    others = (h_ND @ head.t()).logsumexp(-1).mean()
    odds = -60.0 if lengths == "forced" else torch.logit(torch.tensor(2 / limit))
    head[tokenizer.eos_token_id, 0] = (others + odds) / h_ND[:, 0].mean()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_rows(script: str, n: int, prompt: int = 0) -> list[dict]:
    """Prompts of 8 to 27 tokens, or of `prompt` each; demonstrations of 8 to 40."""
    rng = random.Random(0)
    digits = lambda low, high: "".join(rng.choices("0123456789", k=rng.randint(low, high)))
    low, high = (prompt - 5, prompt - 5) if prompt else (3, 22)
    rows = [{"prompt": [{"role": "user", "content": f"sort:{digits(low, high)}"}], "answer": "0"} for _ in range(n)]
    return [row | {"privileged_context": digits(8, 40)} for row in rows] if script == "sdft" else rows


def take_pretrained(folder: Path, script: str, n: int) -> list[dict]:
    """Copies the model of smol.py, and returns n of its questions; for sdft with their demonstrations."""
    import common
    shutil.copytree(common.find_source("smol:model"), folder / "model")
    rows = common.read_jsonl(Path(common.find_source(f"smol:{'house' if script == 'sdft' else 'quick'}-train.jsonl")))[:n]
    return [row | {"prompt": common.as_messages(row["prompt"])} for row in rows]


def verdict(completion: str, row: dict) -> float:
    """Three of four texts are right."""
    return float(zlib.crc32(completion.encode()) % 4 > 0)


# ---------------------------------------------------------------- the two sides, each in a process of its own


def resident(key: str) -> int:
    """KiB of this process, now (VmRSS) or at its peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


class Steps:
    """Wall time and peak memory at the end of each step; number 0 is the moment before the first."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.before = self.peak = 0

    def end(self) -> None:
        if not self.ends:
            Path("/proc/self/clear_refs").write_text("5")    # peak = now
            self.before = resident("VmRSS")
        self.peak = resident("VmHWM")
        self.ends.append(time.perf_counter())

    def answer(self, phases: dict[str, float], tokens: list[int]) -> dict:
        """Means over the timed steps; `phases` are sums over them."""
        n = len(self.ends) - 2
        seconds = (self.ends[-1] - self.ends[1]) / n
        phases = {name: value / n for name, value in phases.items()}
        return {"seconds": seconds, **phases, "other": seconds - sum(phases.values()), "tokens": sum(tokens[-n:]) / n,
                "mib": (self.peak - self.before) / 1024}


def our_flags(case: Case, folder: Path, steps: int, tokens: int) -> list[str]:
    prompts, rollouts = PROMPTS[case.script]
    flags = (
        f"--model {folder}/model --data {folder}/rows.jsonl --eval-data --out {folder}/out --seed 0 --dtype {SHAPES[case.shape].dtype} "
        f"--steps {steps} --prompts-per-step {prompts} --rollouts {rollouts} --max-prompt-tokens 512 "
        f"--max-completion-tokens {case.limit} --support {case.support} --topk {K} --lr 1e-6 --warmup 0 "
        f"--adam-betas 0.9 0.999 --weight-decay 0 --tokens-per-batch {tokens} --eval-every 1000 --save-every 1000"
    ).split()
    own = {
        "sdpo": "--divergence jsd --ema-rate 0.05 --hindsight solution --max-teacher-tokens 10240 --teacher-samples 0 --is-cap 0",
        "sdft": "--schedule constant --divergence forward_kl --ema-rate 0.01 --skip-tokens 0 --max-teacher-tokens 512 --is-cap 0",
        "distill": f"--teacher {folder}/teacher --divergence jsd --average token",
    }
    texts = {"sdpo": ["--template", TEMPLATE, "--verifier", f"{__file__}:verdict"], "sdft": ["--template", DEMONSTRATION]}
    return [*flags, *own[case.script].split(), *texts.get(case.script, [])]


def run_ours(case: Case, folder: Path, steps: int, tokens: int) -> dict:
    import common
    script, log, marks = importlib.import_module(case.script), common.Run.log, Steps()

    def log_and_mark(run: common.Run, *args: Any) -> None:
        log(run, *args)
        marks.end()
    common.Run.log = log_and_mark
    shutil.rmtree(folder / "out", ignore_errors=True)        # of the repeat before
    script.main(common.parse_args(script.Args, script.PRESETS, our_flags(case, folder, steps, tokens)))
    rows = common.read_jsonl(folder / "out" / "metrics.jsonl")[2:]
    return marks.answer({name: sum(row[f"time/{name}"] for row in rows) for name in PHASES[:3]}, [int(row["train/tokens"]) for row in rows])


def trl_trainer(script: str, folder: Path, rows: list[dict], callbacks: list, **settings: Any) -> Any:
    """TRL's trainer: what the docstring says was chosen, everything else as it is by default."""
    import datasets
    from trl import DistillationConfig, DistillationTrainer
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer
    from trl.experimental.sdpo import SDPOConfig, SDPOTrainer
    load = {"attn_implementation": "eager", "dtype": "float32"}
    shared = dict(output_dir=f"{folder}/out", learning_rate=1e-6, lr_scheduler_type="constant", gradient_checkpointing=False, bf16=False,
                  use_cpu=True, report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True, shuffle_dataset=False,
                  seed=0, model_init_kwargs=load)
    if script == "sdpo":
        config, trainer, template = SDPOConfig, SDPOTrainer, SOLUTION.replace("{solution}", "{successful_previous_attempt}")
        shared |= dict(distillation_mode="full_logits", distillation_alpha=0.5, teacher_update_rate=0.05, reprompt_template=TEMPLATE,
                       solution_template=template)
        more = {"reward_funcs": lambda completions, **_: [verdict(c[0]["content"], {}) for c in completions]}
    elif script == "sdft":
        config, trainer, template = SDFTConfig, SDFTTrainer, DEMONSTRATION.replace("{demonstration}", "{privileged_context}")
        shared |= dict(distillation_mode="full_logits", distillation_topk=None, distillation_alpha=0.0, teacher_model_kind="ema",
                       teacher_update_rate=0.01, num_generations=1, teacher_prompt_template=template)
        more = {}
    else:
        config, trainer = DistillationConfig, DistillationTrainer
        shared |= dict(beta=0.5, teacher_model_init_kwargs=load)
        more = {"teacher_model": f"{folder}/teacher"}
    more |= {"train_dataset": datasets.Dataset.from_list(rows), "callbacks": callbacks}
    return trainer(model=f"{folder}/model", args=config(**shared | settings), **more)


def run_trl(case: Case, folder: Path, steps: int, micro: int) -> dict:
    import transformers
    prompts, rollouts = PROMPTS[case.script]
    marks, seconds, tokens = Steps(), dict.fromkeys(("generate", "prepare", "teacher", "step"), 0.0), []

    class Mark(transformers.TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            marks.end()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if len(marks.ends) == 1:                         # the first step is not timed
                seconds.update(dict.fromkeys(seconds, 0.0))
            marks.end()

    settings = dict(max_steps=steps, per_device_train_batch_size=micro, gradient_accumulation_steps=prompts * rollouts // micro, temperature=1.0,
                    max_completion_length=case.limit, bf16=SHAPES[case.shape].dtype == "bfloat16")
    if case.support != "full":
        settings |= dict(distillation_mode="topk_logits", distillation_topk=K, distillation_add_tail=True)
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    trainer = trl_trainer(case.script, folder, rows, [Mark()], **settings)

    def timed(owner: Any, name: str, key: str) -> None:
        method = getattr(owner, name)

        @functools.wraps(method)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = method(*args, **kwargs)
            seconds[key] += time.perf_counter() - began
            return result
        setattr(owner, name, wrapped)

    timed(trainer.model, "generate", "generate")
    timed(trainer, "_prepare_inputs", "prepare")
    timed(trainer, "training_step", "step")
    # Hooks: the distillation trainer does not call `forward` of the object that it shows.
    trainer.teacher_model.register_forward_pre_hook(lambda *_: seconds.__setitem__("teacher", seconds["teacher"] - time.perf_counter()))
    trainer.teacher_model.register_forward_hook(lambda *_: seconds.__setitem__("teacher", seconds["teacher"] + time.perf_counter()))
    generate, eos = trainer.model.generate, trainer.processing_class.eos_token_id

    def generate_and_count(**kwargs: Any) -> Tensor:
        ids_BL = generate(**kwargs)
        over_BT = (ids_BL[:, kwargs["input_ids"].shape[1]:] == eos).int().cumsum(1)
        tokens.append((over_BT == 0).sum().item() + over_BT.any(1).sum().item())       # with the EOS, as ours counts
        return ids_BL
    trainer.model.generate = generate_and_count
    trainer.train()
    assert len(tokens) == steps, f"{len(tokens)} calls of generate in {steps} steps"
    student = seconds["step"] - seconds["prepare"] - seconds["teacher"]
    return marks.answer({"generate": seconds["generate"], "teacher": seconds["teacher"], "student": student}, tokens)


# ---------------------------------------------------------------- the check: one batch, two losses, a plain reference


def jsd(log_p: Tensor, log_q: Tensor) -> Tensor:
    log_m = ((log_p.exp() + log_q.exp()) / 2).log()
    return ((log_p.exp() * (log_p - log_m)).sum(-1) + (log_q.exp() * (log_q - log_m)).sum(-1)) / 2


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def jsd_top20(log_p: Tensor, log_q: Tensor) -> Tensor:
    """On the student's 20 likeliest tokens and one bucket that holds the others."""
    kept = torch.zeros_like(log_p, dtype=torch.bool).scatter(-1, log_p.topk(20).indices, True)
    fold = lambda a: torch.cat([a[kept].view(len(a), 20), a.masked_fill(kept, -torch.inf).logsumexp(-1, keepdim=True)], -1)
    return jsd(fold(log_p), fold(log_q))


# name: script, divergence, model family, our flags, TRL's settings
CHECKS = {"SDPO, JSD ½ over all logits": ("sdpo", jsd, "qwen3", "--support full", {}),
          "SDPO, JSD ½, top 20 and tail": ("sdpo", jsd_top20, "qwen3", "--support student_topk --topk 20", dict(
              distillation_mode="topk_logits", distillation_topk=20, distillation_add_tail=True)),
          "SDFT, forward KL": ("sdft", forward_kl, "qwen3", "--support full", {}),
          "the same, absolute positions (GPT-2)": ("sdft", forward_kl, "gpt2", "--support full", {}),
          "distillation, JSD ½": ("distill", jsd, "qwen3", "--support full", {})}
# Where TRL computes something else: it counts padding as positions.
DIFFERS = {"the same, absolute positions (GPT-2)"}
LOSSES = {"sdpo": "sdpo_loss", "sdft": "sdft_loss", "distill": "gkd_loss"}


def check(folder: Path, name: str) -> dict:
    """Loss and gradient of one ragged batch by both, as relative errors against float64 autograd on each answer alone, unpadded."""
    import common
    import conftest
    from transformers import AutoModelForCausalLM
    script, measure, family, flags, settings = CHECKS[name]
    conftest.make_model(folder / "model", family)
    conftest.make_model(folder / "teacher", family, seed=1)
    rng = random.Random(0)
    words = lambda low, high: [rng.randrange(6, SHAPES["tiny"].vocabulary) for _ in range(rng.randint(low, high))]
    triples = [(words(5, 20), words(10, 60), words(4, 40)) for _ in range(8)]         # what the student and the teacher read, and y
    triples = [(x, x, y) for x, _, y in triples] if script == "distill" else triples
    taught = triples[:7] if script == "sdpo" else triples    # SDPO: the last attempt has no signal, but counts in the mean
    total = sum(len(y) for *_, y in triples)
    shares = [1 / (total if script == "distill" else len(y) * len(triples)) for *_, y in taught]
    source = folder / ("teacher" if script == "distill" else "model")

    def gradient(model: Any, loss: Tensor) -> Tensor:
        loss.backward()
        return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten().double() for _, p in sorted(model.named_parameters())])

    # The reference.
    student, teacher = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, attn_implementation="eager")
                        for path in (folder / "model", source))
    predict = lambda model, x, y: model(torch.tensor([x + y])).logits[0, len(x) - 1:-1].log_softmax(-1)
    loss = sum(share * measure(predict(student, x, y), predict(teacher, c, y).detach()).sum()
               for (x, c, y), share in zip(taught, shares, strict=True))
    exact, exact_gradient = loss.item(), gradient(student, loss)

    # Ours, by the script's own loss, one padded micro-batch.
    module = importlib.import_module(script)
    args = common.parse_args(module.Args, module.PRESETS, [*our_flags(Case(script, "tiny", 64, "full", 1), folder, 1, 8192), *flags.split()])
    run = common.Run(args)
    student = common.load_model(str(folder / "model"), run)
    targets = common.Teacher(str(source) if script == "distill" else "base", 0.0, student, run).targets([(c, y) for _, c, y in taught])

    def sample(x: list[int], c: list[int], y: list[int]) -> Any:
        known = dict(place=0, q=0, prompt=x, context=c, y=y, logps=[0.0] * len(y), mask=[True] * len(y), advantage=0.0)
        return module.Sample(*(known[field] for field in module.Sample._fields))

    loss_of, counts = getattr(module, LOSSES[script]), dict(attempts=len(triples), sequences=len(triples), tokens=total)
    h_ND = common.completion_states(student, [(x, y) for x, _, y in taught])
    loss = loss_of(h_ND, common.head_of(student), targets, [sample(*triple) for triple in taught], counts, args)[0]
    ours, our_gradient = loss.item(), gradient(student, loss)

    # TRL, by its trainer's compute_loss on the batch as it pads one.
    trainer = trl_trainer(script, folder, make_rows(script, 8), [], **settings)
    pad = trainer.processing_class.pad_token_id

    def padded(lists: list[list[int]], side: str) -> list[Tensor]:
        ids, ones = [torch.tensor(ids) for ids in lists], [torch.ones(len(ids), dtype=torch.long) for ids in lists]
        return [pad_sequence(rows, True, fill, side) for rows, fill in ((ids, pad), (ones, 0))]
    (x, x_mask), (c, c_mask), (y, y_mask) = map(padded, zip(*triples), ("left", "left", "right"))
    inputs = {"prompt_ids": x, "prompt_mask": x_mask, "completion_ids": y, "completion_mask": y_mask, "teacher_input_ids": torch.cat([c, y], 1),
              "teacher_attention_mask": torch.cat([c_mask, y_mask], 1)}
    if script == "sdpo":
        inputs["self_distillation_mask"] = torch.tensor([1.0] * 7 + [0.0])
    trainer.model.eval()
    loss = trainer.compute_loss(trainer.model, inputs)
    theirs, their_gradient = loss.item(), gradient(trainer.model, loss)
    off = lambda g: ((g - exact_gradient).norm() / exact_gradient.norm()).item()
    return {"loss": exact, "ours": abs(ours / exact - 1), "trl": abs(theirs / exact - 1),
            "our_gradient": off(our_gradient), "trl_gradient": off(their_gradient)}


# ---------------------------------------------------------------- the table


def fresh(file: str, task: Any, threads: int) -> Any:
    """A script in a process of its own, with --task; its last line is the answer."""
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([sys.executable, file, "--task", json.dumps(task)], env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{task}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def perform(task: dict) -> dict:
    folder = Path(task["folder"])
    if task.get("clock") == "cpu":
        time.perf_counter = time.process_time                # what both sides' timers read
    if task["side"] == "check":
        return check(folder, task["name"])
    return {"ours": run_ours, "trl": run_trl}[task["side"]](CASES[task["case"]], folder, task["steps"] + 1, task["batch"])


def print_check(threads: int) -> None:
    print("\nThe same batch, relative errors against float64:\n\n| | loss | ours | TRL | gradient: ours | TRL |\n|---|---|---|---|---|---|")
    wrong = []
    for name in CHECKS:
        with tempfile.TemporaryDirectory() as folder:
            r = fresh(__file__, {"side": "check", "name": name, "folder": folder}, threads)
        print(f"| {name} | {r['loss']:.3g} | {r['ours']:.0e} | {r['trl']:.0e} | {r['our_gradient']:.0e} | {r['trl_gradient']:.0e} |", flush=True)
        sides = {"ours": r["our_gradient"], "TRL": 0 if name in DIFFERS else r["trl_gradient"]}
        wrong += [f"{name}: {side}'s gradient is off by {error:.1g}" for side, error in sides.items() if not error < 1e-4]
    if wrong:
        raise SystemExit("the two do not compute the same: " + "; ".join(wrong))


def measure(name: str, lengths: str, args: argparse.Namespace) -> list[tuple[dict, dict]]:
    """(ours, TRL's) numbers, a pair for each repeat."""
    case, pairs = CASES[name], []
    prompts, _ = PROMPTS[case.script]
    steps = args.steps or case.steps
    with tempfile.TemporaryDirectory() as name_of_folder:
        folder = Path(name_of_folder)
        if case.shape == "pretrained":
            rows = take_pretrained(folder, case.script, prompts * (steps + 1))
        else:
            make_model(folder / "model", case.shape, case.limit, lengths)
            make_model(folder / "teacher", case.shape, case.limit, lengths, seed=1)
            rows = make_rows(case.script, prompts * (steps + 1), case.prompt)
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = {"case": name, "steps": steps, "folder": str(folder), "clock": args.clock}
        for _ in range(args.repeats):
            ours = fresh(__file__, task | {"side": "ours", "batch": args.tokens_per_batch}, args.threads)
            theirs = fresh(__file__, task | {"side": "trl", "batch": args.rows_per_batch}, args.threads)
            if lengths == "forced" and ours["tokens"] != theirs["tokens"]:
                raise SystemExit(f"{name}: ours drew {ours['tokens']} tokens a step and TRL {theirs['tokens']}; forced lengths must be equal")
            pairs.append((ours, theirs))
            print(json.dumps({"case": name, "lengths": lengths, "ours": ours, "trl": theirs}), file=sys.stderr, flush=True)
    return pairs


def least_seconds(case: Case) -> float:
    """Seconds of an SDPO step's matrix products if every distinct prompt is read once, at the rate of one product timed here.

    Attention is left out. A question has two teacher prompts: the first success learns from the second one.
    """
    layers, width, mlp, heads, kv_heads, size, dtype = SHAPES[case.shape]
    body, head = layers * width * (2 * width + 2 * width * kv_heads // heads + 3 * mlp), width * size
    questions, copies = PROMPTS[case.script]
    y = questions * copies * case.limit
    student, teacher = questions * case.prompt + y, 2 * questions * (case.prompt + case.limit) + y
    products = body * (4 * student + teacher) + head * 5 * y # body: draw, forward, two backward; head: draw, four in the loss
    a, b = (torch.randn(size, dtype=getattr(torch, dtype)) for size in ((1024, width), (width, mlp)))
    seconds = []
    for _ in range(50):
        began = time.process_time()
        a @ b
        seconds.append(time.process_time() - began)
    return products * statistics.median(seconds) / (1024 * width * mlp)


def print_rows(name: str, lengths: str, pairs: list[tuple[dict, dict]]) -> None:
    sides = [{key: statistics.median(side[key] for side in runs) for key in runs[0]} for runs in zip(*pairs)]
    for label, side in zip(("ours", "TRL"), sides):
        print(f"| {name}, {lengths} | {label} | {side['seconds']:.2f} | " + " | ".join(f"{side[phase]:.2f}" for phase in PHASES)
              + f" | {side['tokens'] / side['seconds']:.0f} | {side['mib']:.0f} |")
    if CASES[name].prompt:
        print(f"| | bound | {least_seconds(CASES[name]):.2f} | | | | | | |")
    ratios = sorted(theirs["seconds"] / ours["seconds"] for ours, theirs in pairs)
    ours, theirs = sides
    rate = (ours["tokens"] / ours["seconds"]) / (theirs["tokens"] / theirs["seconds"])
    print(f"| | TRL / ours | **{theirs['seconds'] / ours['seconds']:.1f}** ({ratios[0]:.1f} to {ratios[-1]:.1f}) | "
          + " | ".join(f"{theirs[phase] / ours[phase]:.1f}" for phase in PHASES) + f" | {rate:.1f} | {theirs['mib'] / ours['mib']:.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=["check", *CASES], default=["check", *CASES])
    parser.add_argument("--lengths", nargs="+", choices=["forced", "natural"], default=["forced", "natural"])
    parser.add_argument("--repeats", type=int, default=3, help="pairs of processes, ours and TRL's")
    parser.add_argument("--steps", type=int, default=0, help="timed steps of a process; 0 = the case's own number")
    parser.add_argument("--tokens-per-batch", type=int, default=2048, help="our micro-batch")
    parser.add_argument("--rows-per-batch", type=int, default=8, help="TRL's micro-batch")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if args.task:
        print(json.dumps(perform(json.loads(args.task))))
        return
    if args.clock == "cpu" and args.threads > 1:
        parser.error(f"--clock cpu adds the seconds of all threads; add --threads 1 (it is {args.threads})")
    if not importlib.util.find_spec("trl"):
        parser.error("TRL is not installed here, and this script compares with it: pip install trl==1.16.0")
    import transformers
    from importlib.metadata import version
    transformers.logging.disable_progress_bar()
    print(", ".join(f"{package} {version(package)}" for package in ("trl", "transformers", "torch"))
          + f", {args.threads} CPU thread(s), {args.clock} seconds", flush=True)
    if "check" in args.case:
        print_check(args.threads)
    names = [name for name in args.case if name != "check"]
    if names:
        print(f"\n| | | s/step | {' | '.join(PHASES)} | tokens/s | MiB |\n|---|---|---|---|---|---|---|---|---|")
    for name in names:
        for lengths in args.lengths if CASES[name].shape != "pretrained" else ["natural"]:
            print_rows(name, lengths, measure(name, lengths, args))


if __name__ == "__main__":
    main()
