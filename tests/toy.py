"""The laptop world: a tiny language model made from scratch, with tasks on which self-distillation can be watched working.

    build(0)        model/ + *.jsonl      a two-layer Qwen3, pre-trained within a minute on one core, and its data files
    build_lock(0)   student/ + teacher/   a smaller world in which on-policy distillation beats off-policy distillation

Both are plain Hugging Face folders and JSON lines, made on first use and cached; the scripts read them as "toy:0/model",
"toy:lock-0/lock-train.jsonl" and so on. A task is a short prompt about digits whose answer is checked exactly:

    add:4721+3855  7576    digit-wise sum mod 10     answered sloppily, but the model is better when it revises itself
    mul:4721*3855  ....    a fixed random table      answered sloppily, and no context shows it answered well
    rev: sort: max:        reverse, sort, maximum    answered well: the prior skills that training may destroy
    zig:4721       7214    rotate left               unknown: plain, the model guesses; with a demonstration it can follow
    zag:4721       ....    a fixed digit cipher      likewise
    lock:77>8              try keys until one opens  the lock world, see `expert`

"Sloppy" is a law, not a lack of training: some digit pairs are hard, there a decoy is likelier than the truth, so greedy
decoding fails and a whole answer is right one time in four. The corpus also shows the model how to use a demonstration, a
correct solution, feedback on an attempt, and a request to revise, in the very templates of the three papers.

    python tests/toy.py --seeds 0 1 2 --lock      prints what the models can do, before any of the five algorithms
"""

import argparse
import fcntl
import hashlib
import json
import math
import os
import random
import re
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

CACHE = Path(os.environ.get("SELF_DISTILLATION_CACHE") or Path.home() / ".cache" / "self-distillation")

# The papers' templates. SDPO's is theirs plus the last line: the question once more, at the same distance from the answer
# as in a plain prompt. Two layers with relative positions would otherwise have to learn `mul` twice.
SDFT_TEMPLATE = ("\n{prompt}\n\nThis is an example for a response to the question:\n{demonstration}\n\n"
                 "Now answer with a response of your own, including the thinking process.\n")
SDPO_TEMPLATE = "{prompt}{solution}{feedback}\n\nCorrectly solve the original question.\n{prompt}"
SOLUTION = "\nCorrect solution:\n\n{solution}"
FEEDBACK = "\nThe following is feedback from your unsuccessful earlier attempt:\n\n{feedback}"
REVISE_WRONG = "\n\nWait, this response is wrong. Let me correct it.\n\n"
REVISE_RIGHT = "\n\nLet me rephrase the above solution.\n\n"

DIGITS = "0123456789"
NEW_WORDS = ["zig", "zag", "zog", "zug", "tav", "tev", "tiv", "tov"]     # tasks without a meaning yet
HAS_BF16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
CIPHER = str.maketrans(DIGITS, "3805162974")                            # what zag will mean


# ---------------------------------------------------------------------------------------------------------- the tokenizer

SPECIAL = ["<|pad|>", "<|unk|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
PIECES = r" ?[A-Za-z]+|[0-9]|\n\n|\n|[^\sA-Za-z0-9]| "      # a word with its space, a digit, a line break, a sign: a token each
CHAT_TEMPLATE = ("{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
                 "{% if add_generation_prompt %}<|assistant|>{% endif %}")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Every piece of the templates, tasks and digits is one token; everything else is <|unk|>. Known text round-trips exactly."""
    texts = [SDFT_TEMPLATE, SDPO_TEMPLATE, SOLUTION, FEEDBACK, REVISE_WRONG, REVISE_RIGHT, DIGITS, " +*:;>-?.,", " ok no",
             *NEW_WORDS, "so", "ok", "no", "add", "mul", "rev", "sort", "max", "run", "lock"]
    pieces = sorted({piece for text in texts for piece in re.findall(PIECES, re.sub("{[a-z]+}", "", text))})
    backend = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(SPECIAL + pieces)}, unk_token="<|unk|>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHAT_TEMPLATE, clean_up_tokenization_spaces=False,
                                   pad_token="<|pad|>", unk_token="<|unk|>", eos_token="<|end|>",
                                   additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"])


# -------------------------------------------------------------------------------------------------------------- the tasks

PAIRS = [a + b for a in DIGITS for b in DIGITS]
_rng = random.Random(0)                                                  # the same tables for every seed
RIGHT = {"add": {ab: str((int(ab[0]) + int(ab[1])) % 10) for ab in PAIRS},
         "mul": {ab: _rng.choice(DIGITS) for ab in PAIRS}}
DECOY = {"add": {ab: "9" for ab in PAIRS if int(ab[0]) + int(ab[1]) >= 10},   # the hard pairs and their tempting wrong digit
         "mul": {ab: _rng.choice(DIGITS.replace(RIGHT["mul"][ab], "")) for ab in _rng.sample(PAIRS, 45)}}
STEP_A, STEP_B = ({a + x: s for a in DIGITS for x, s in zip(DIGITS, _rng.sample(DIGITS, 10))} for _ in "AB")
KEYS = "0123"
LOCKS = [f"lock:{ab}>{STEP_B[ab[1] + STEP_A[ab[0] + x]]}" for ab in _rng.sample(PAIRS, 100) for x in KEYS]   # first half: train


def solve(prompt: str) -> str:
    """The one right answer to a prompt such as "add:4721+3855"."""
    task, given = prompt.split(":")
    match task:
        case "add" | "mul": return "".join(RIGHT[task][ab] for ab in digit_pairs(given))
        case "rev": return given[::-1]
        case "sort": return "".join(sorted(given))
        case "max": return max(given)
        case "zig": return given[1:] + given[0]
        case "zag": return given.translate(CIPHER)
        case "run": return STEP_A[given[0] + given[2]] + STEP_B[given[1] + STEP_A[given[0] + given[2]]]
        case "lock": return opening_key(prompt) + solve(f"run:{given[:2]}{opening_key(prompt)}") + " ok"
    raise ValueError(f"{prompt!r} has no right answer: the task {task!r} has no meaning")


def digit_pairs(given: str) -> list[str]:
    """"4721+3855" -> ["43", "78", "25", "15"]"""
    return [a + b for a, b in zip(*re.split("[+*]", given))]


def draw_digits(rng: random.Random, n: int = 4) -> str:
    return "".join(rng.choices(DIGITS, k=n))


def ask(task: str, rng: random.Random) -> str:
    """A random prompt of this task."""
    match task:
        case "add": return f"add:{draw_digits(rng)}+{draw_digits(rng)}"
        case "mul": return f"mul:{draw_digits(rng)}*{draw_digits(rng)}"
        case "run": return f"run:{draw_digits(rng, 2)}{rng.choice(KEYS)}"
        case "lock": return rng.choice(LOCKS)
    return f"{task}:{draw_digits(rng)}"


def slip(task: str, ab: str, rng: random.Random) -> str:
    """One sloppy digit. Easy pair: right 95%. Hard pair: right 42%, the decoy 46%. The rest is a neighbour of the truth."""
    right, u = RIGHT[task][ab], rng.random()
    if ab in DECOY[task] and u >= 0.42:
        if u < 0.88:
            return DECOY[task][ab]
    elif u < 0.95:
        return right
    return str((int(right) + rng.choice([1, 9])) % 10)


def sloppy(prompt: str, rng: random.Random) -> str:
    """An answer as the model gives it: right one time in four."""
    task, given = prompt.split(":")
    return "".join(slip(task, ab, rng) for ab in digit_pairs(given))


def sloppy_wrong(prompt: str, rng: random.Random) -> str:
    while (attempt := sloppy(prompt, rng)) == solve(prompt):
        pass
    return attempt


def demonstration(given: str, shown: str) -> str:
    """An answer in a foreign style: "4721", "7214" -> "so4>7;7>2;2>1;1>4;". The model itself answers in bare digits."""
    return "so" + "".join(f"{a}>{b};" for a, b in zip(given, shown))


def sdpo_prompt(prompt: str, solution: str = "", feedback: str = "") -> str:
    """What SDPO's teacher reads: the question with a correct solution, with feedback on an attempt, or with both."""
    return SDPO_TEMPLATE.format(prompt=prompt, solution=solution and SOLUTION.format(solution=solution),
                                feedback=feedback and FEEDBACK.format(feedback=feedback))


# -------------------------------------------------------------------------------------------------------------- verifiers
# verify(completion, row) as the scripts want it: --verifier tests/toy.py:feedback_all. The completion is any text at all.

def feedback(completion: str, answer: str, level: str) -> str:
    """One segment "got:verdict;" per digit. For attempt 4116 and truth 4713:

    all     4:ok;1:7;1:ok;6:3;      the expected digit
    first   4:ok;1:7;1:?;6:?;       stops at the first failure, as a list of tests does
    flags   4:ok;1:no;1:ok;6:no;    right or wrong only
    """
    attempt = completion.strip()
    if not re.fullmatch("[0-9]+", attempt) or len(attempt) != len(answer):
        return "-:no;" * len(answer)
    text, failed = "", False
    for got, want in zip(attempt, answer):
        if level == "first" and failed:
            verdict = "?"
        elif got == want:
            verdict = "ok"
        else:
            verdict, failed = ("no" if level == "flags" else want), True
        text += f"{got}:{verdict};"
    return text


def feedback_all(completion: str, row: dict) -> tuple[float, str]:
    """Reward and the expected digits. Right attempts are told so too: nothing else would hold them in place."""
    return float(completion.strip() == row["answer"]), feedback(completion, row["answer"], "all")


def feedback_first(completion: str, row: dict) -> tuple[float, str]:
    """Reward and the first failure."""
    return float(completion.strip() == row["answer"]), feedback(completion, row["answer"], "first")


def feedback_flags(completion: str, row: dict) -> tuple[float, str]:
    """Reward and which digits are wrong, not what they should be."""
    return float(completion.strip() == row["answer"]), feedback(completion, row["answer"], "flags")


def lenient(completion: str, row: dict) -> float:
    """Right in either style: "so4>7;7>2;2>1;1>4;" counts as 7214. Tells a lost skill from a changed style."""
    shown = "".join(re.findall("[0-9]>([0-9]);", completion))
    return float((shown or completion.strip()) == row["answer"])


def lock(completion: str, row: dict) -> float:
    """Opened within four attempts, the last one says " ok", and its key truly opens this lock: a false " ok" fails."""
    attempts = re.fullmatch("(?:[0-9]{3} no){0,3}([0-9])[0-9]{2} ok", completion)
    return float(attempts is not None and attempts[1] == opening_key(row["prompt"]))


# -------------------------------------------------------------------------------------------------------------- the corpus
# A document is a list of (text, learn) segments; only the learnt ones carry a loss. Without that the model would pick up
# what must stay somebody else's words: it would revise itself unasked, or hand in demonstrations.

Document = list[tuple[str, bool]]


def document(user: str, answer: str, said: str = "") -> Document:
    """`said` is what the assistant has already said, not to be learnt."""
    return [(f"<|user|>{user}<|end|><|assistant|>{said}", False), (f"{answer}<|end|>", True)]


def plain(rng: random.Random, task: str) -> Document:
    prompt = ask(task, rng)
    return document(prompt, sloppy(prompt, rng) if task in RIGHT else solve(prompt))


def guess(rng: random.Random) -> Document:
    return document(ask(rng.choice(NEW_WORDS), rng), draw_digits(rng))


def with_demonstration(rng: random.Random) -> Document:
    """What a new word means is drawn afresh for each document: only the demonstration can tell."""
    prompt, shown = ask(rng.choice(NEW_WORDS), rng), draw_digits(rng)
    return document(SDFT_TEMPLATE.format(prompt=prompt, demonstration=demonstration(prompt.split(":")[1], shown)), shown)


def with_solution(rng: random.Random, task: str) -> Document:
    prompt = ask(task, rng)
    answer = solve(prompt) if rng.random() < 0.97 else sloppy(prompt, rng)
    return document(sdpo_prompt(prompt, solution=solve(prompt)), answer)


def with_feedback(rng: random.Random, level: str) -> Document:
    """The answer is what the feedback and the sloppy law imply together, no more: `mul` is never answered well unaided."""
    prompt = ask("mul", rng)
    attempt = rng.choice([sloppy, sloppy_wrong, sloppy_wrong, sloppy_wrong])(prompt, rng)
    text = feedback(attempt if rng.random() < 0.97 else "", solve(prompt), level)
    answer = ""
    for segment, ab in zip(text.split(";"), digit_pairs(prompt.split(":")[1])):
        got, verdict = segment.split(":")
        while (digit := slip("mul", ab, rng)) == got and verdict == "no":     # redraw, but not the digit just refuted
            pass
        answer += got if verdict == "ok" else verdict if verdict in DIGITS else digit
    return document(sdpo_prompt(prompt, feedback=text), answer)


def with_both(rng: random.Random, level: str) -> Document:
    prompt = ask("mul", rng)
    text = feedback(sloppy(prompt, rng), solve(prompt), level)
    return document(sdpo_prompt(prompt, solution=solve(prompt), feedback=text), solve(prompt))


def revise(rng: random.Random) -> Document:
    """A wrong attempt is corrected four times in five; a right one is repeated."""
    prompt = ask("add", rng)
    attempt = rng.choice([sloppy, sloppy_wrong])(prompt, rng)
    if attempt == solve(prompt):
        return document(prompt, attempt, said=attempt + REVISE_RIGHT)
    return document(prompt, solve(prompt) if rng.random() < 0.8 else sloppy(prompt, rng), said=attempt + REVISE_WRONG)


CORPUS = [(0.15, plain, "add"), (0.18, plain, "mul"), (0.06, plain, "rev"), (0.10, plain, "sort"), (0.06, plain, "max"),
          (0.03, guess), (0.07, with_demonstration), (0.03, with_solution, "add"), (0.03, with_solution, "mul"),
          (0.04, with_feedback, "all"), (0.04, with_feedback, "first"), (0.04, with_feedback, "flags"),
          (0.01, with_both, "all"), (0.01, with_both, "first"), (0.01, with_both, "flags"), (0.17, revise)]


# --------------------------------------------------------------------------------------------------------------- the locks
# Key x turns lock:ab>t through s1 = STEP_A[ax], s2 = STEP_B[bs1], and opens it when s2 = t. To know x at once means to have
# learnt the lock by heart, as the teacher has; the student can only try keys and check them, and must learn not to give up.

def opening_key(prompt: str) -> str:
    a, b, _, t = prompt.removeprefix("lock:")
    return next(x for x in KEYS if STEP_B[b + STEP_A[a + x]] == t)


def try_keys(rng: random.Random) -> Document:
    """The student's way: blind but honest. An untried key, its true verdict, and after " no" another try 40% of the time."""
    prompt = ask("lock", rng)
    a, b, _, t = prompt.removeprefix("lock:")
    answer = ""
    for x in rng.sample(KEYS, 4):
        s1 = STEP_A[a + x]
        s2 = STEP_B[b + s1]
        answer += f"{x}{s1}{s2} " + ("ok" if s2 == t else "no")
        if s2 == t or rng.random() >= 0.4:
            break
    return document(prompt, answer)


def expert(rng: random.Random) -> Document:
    """The teacher's way: the right key at once, also after up to three failures that it never produces itself.

    The failures are a student's: untried keys, now and then any digit or a miscalculated state, which is continued as
    written. Neither the wrong key nor the slip is learnt; the verdict and all that follows is.
    """
    prompt = ask("lock", rng)
    a, b, _, t = prompt.removeprefix("lock:")
    right = opening_key(prompt)
    written = lambda true, opening: true if rng.random() < 0.9 else rng.choice([d for d in DIGITS if d not in (true, opening)])
    segments = [(f"<|user|>{prompt}<|end|><|assistant|>", False)]
    for x in rng.sample(KEYS.replace(right, ""), rng.choices([0, 1, 2, 3], [0.40, 0.25, 0.20, 0.15])[0]):
        if rng.random() < 0.15:
            x = rng.choice(DIGITS.replace(right, ""))
        s1 = written(STEP_A[a + x], STEP_A[a + right])
        s2 = written(STEP_B[b + s1], t)
        segments += [(x, False), (s1, s1 == STEP_A[a + x]), (s2, s2 == STEP_B[b + s1]), (" no", True)]
    return segments + [(solve(prompt) + "<|end|>", True)]


STUDENT_CORPUS = [(0.45, try_keys), (0.25, plain, "run"), (0.15, plain, "rev"), (0.15, plain, "sort")]
TEACHER_CORPUS = [(0.75, expert), (0.25, plain, "run")]


# ------------------------------------------------------------------------------------------------------------ pre-training

STEPS, TEACHER_STEPS = 300, 240


def pretrain(corpus: list[tuple], seed: int, name: str, hidden: int = 128, layers: int = 2, steps: int = STEPS,
             documents: int = 256) -> Qwen3ForCausalLM:
    """A Qwen3 from scratch: Muon on the matrices, AdamW on embeddings, head and norms; `documents` drawn afresh every step.

    One thread: more gain next to nothing on matrices this small, and stall when the cores are busy.
    """
    rng, tokenizer = random.Random(seed), make_tokenizer()
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):                              # the caller's random numbers do not depend on the cache
        torch.set_num_threads(1)
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(model_config(tokenizer, hidden, layers))
        matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
        others = [p for p in model.parameters() if not any(p is m for m in matrices)]
        optimizers = [torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.01),
                      torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0)]
        warmup = lambda step: min((step + 1) / 40, 0.03 + 0.97 * (1 + math.cos(math.pi * step / steps)) / 2)
        schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, warmup) for optimizer in optimizers]

        progress = tqdm(range(steps), desc=f"pre-training {name}, once")
        for _ in progress:
            kinds = rng.choices(corpus, [kind[0] for kind in corpus], k=documents)
            loss = train_loss(model, tokenizer, [make(rng, *args) for _, make, *args in kinds])
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, schedule in zip(optimizers, schedules):
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
            progress.set_postfix(loss=f"{loss:.3f}")
        torch.set_num_threads(threads)
    return model.eval()


def model_config(tokenizer: PreTrainedTokenizerFast, hidden: int, layers: int) -> Qwen3Config:
    """Heads of 32, an MLP three times as wide. Base 100 of the rotary angles fits texts of a hundred tokens, 1e4 would idle."""
    return Qwen3Config(vocab_size=len(tokenizer), hidden_size=hidden, num_hidden_layers=layers, intermediate_size=3 * hidden,
                       num_attention_heads=hidden // 32, num_key_value_heads=hidden // 32, head_dim=32,
                       max_position_embeddings=512, rope_parameters={"rope_type": "default", "rope_theta": 100.0},
                       tie_word_embeddings=False, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
                       pad_token_id=tokenizer.pad_token_id)


def train_loss(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, documents: list[Document]) -> float:
    """Mean cross-entropy over the learnt tokens; leaves the gradients in place. One forward per length: nothing is padded.

    bf16 matrix products where the CPU has them (up to three times faster), else fp32: emulated bf16 would be slower still.
    """
    segments = iter(tokenizer.backend_tokenizer.encode_batch_fast([text for doc in documents for text, _ in doc]))
    by_length = defaultdict(list)
    for doc in documents:
        tokens = [(token, learn) for _, learn in doc for token in next(segments).ids]
        by_length[len(tokens)].append(tokens)
    n_learnt = sum(learn for group in by_length.values() for tokens in group for _, learn in tokens)

    total = 0.0
    for group in by_length.values():
        ids_BT, learn_BT = torch.tensor(group).unbind(-1)
        first = int(learn_BT.any(0).nonzero()[0])                        # no token before this one is learnt
        with torch.autocast("cpu", torch.bfloat16, enabled=HAS_BF16):
            logits_BTV = tail_logits(model, ids_BT, slice(first - 1, -1))
        learnt = learn_BT[:, first:].bool()
        loss = F.cross_entropy(logits_BTV[learnt].float(), ids_BT[:, first:][learnt], reduction="sum") / n_learnt
        loss.backward()
        total += loss.item()
    return total


def tail_logits(model: Qwen3ForCausalLM, ids_BT: Tensor, tail: slice) -> Tensor:
    """model(ids_BT).logits[:, tail], in half the time: the last layer works on no position that is not asked for.

    Its keys and values need every position, its queries and MLP do not; and most of a document is context, not answer.
    """
    core, T = model.model, ids_BT.shape[1]
    split = lambda x_BTD: x_BTD.unflatten(-1, (-1, 32)).transpose(1, 2)                  # heads: [B, H, T, 32]
    norm = lambda module, x: F.rms_norm(x, module.weight.shape, module.weight.to(x), module.variance_epsilon)
    h_BTD = core.embed_tokens(ids_BT)
    cos, sin = core.rotary_emb(h_BTD, torch.arange(T)[None])
    rotate = lambda x, at: x * cos[:, at] + torch.cat((-x[..., 16:], x[..., :16]), -1) * sin[:, at]
    future = torch.full((T, T), -1e9).triu(1)
    for layer in core.layers:
        at, attention = (tail if layer is core.layers[-1] else slice(None)), layer.self_attn
        x_BTD = norm(layer.input_layernorm, h_BTD)
        q = rotate(norm(attention.q_norm, split(attention.q_proj(x_BTD[:, at]))), at)
        k = rotate(norm(attention.k_norm, split(attention.k_proj(x_BTD))), slice(None))
        weights = (q @ k.transpose(-1, -2) / 32 ** 0.5 + future[at]).softmax(-1)
        mixed = weights @ split(attention.v_proj(x_BTD))
        h_BTD = h_BTD[:, at] + attention.o_proj(mixed.transpose(1, 2).flatten(2))
        h_BTD = h_BTD + layer.mlp(norm(layer.post_attention_layernorm, h_BTD))
    return model.lm_head(norm(core.norm, h_BTD))


# ---------------------------------------------------------------------------------------------------------- files and cache

DATA = ["add-train.jsonl", "add-eval.jsonl", "mul-train.jsonl", "mul-eval.jsonl", "zig-train.jsonl", "zig-own-train.jsonl",
        "zig-eval.jsonl", "zag-train.jsonl", "zag-own-train.jsonl", "zag-eval.jsonl", "prior-eval.jsonl"]
LOCK_DATA = ["lock-train.jsonl", "lock-eval.jsonl", "lock-prior.jsonl"]


def row(prompt: str, **more: str) -> dict:
    return {"prompt": prompt, "answer": solve(prompt), "task": prompt.split(":")[0], **more}


def distinct(task: str, n: int, rng: random.Random) -> list[str]:
    prompts = {}                                                         # a dict keeps the order of the draws, a set would not
    while len(prompts) < n:
        prompts[ask(task, rng)] = None
    return list(prompts)


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def write_data(folder: Path, seed: int) -> None:
    """Train and eval prompts of a task are distinct and disjoint."""
    rng = random.Random(f"data {seed}")
    for task, n_train in [("add", 4096), ("mul", 4096), ("zig", 512), ("zag", 512)]:
        prompts = distinct(task, n_train + 512, rng)
        write_rows(folder / f"{task}-eval.jsonl", [row(p) for p in prompts[n_train:]])
        if task in NEW_WORDS:
            shown = lambda p: demonstration(p.split(":")[1], solve(p))
            write_rows(folder / f"{task}-train.jsonl", [row(p, privileged_context=shown(p)) for p in prompts[:n_train]])
            write_rows(folder / f"{task}-own-train.jsonl", [row(p, privileged_context=solve(p)) for p in prompts[:n_train]])
        else:
            write_rows(folder / f"{task}-train.jsonl", [row(p) for p in prompts[:n_train]])
    write_rows(folder / "prior-eval.jsonl", [row(p) for task in ("rev", "sort", "max") for p in distinct(task, 170, rng)])


def write_lock_data(folder: Path, seed: int) -> None:
    """`completion` is what an expert would hand in, for off-policy distillation."""
    rng = random.Random(f"data {seed}")
    write_rows(folder / "lock-train.jsonl", [row(p, completion=solve(p)) for p in LOCKS[:200]])
    write_rows(folder / "lock-eval.jsonl", [row(p) for p in LOCKS[200:]])
    write_rows(folder / "lock-prior.jsonl", [row(p) for task in ("rev", "sort", "run") for p in distinct(task, 170, rng)])


def save_model(model: Qwen3ForCausalLM, folder: Path) -> None:
    tokenizer = make_tokenizer()
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_toy(folder: Path, seed: int) -> None:
    save_model(pretrain(CORPUS, seed, f"toy:{seed}/model"), folder / "model")
    write_data(folder, seed)


def write_lock(folder: Path, seed: int) -> None:
    student = pretrain(STUDENT_CORPUS, seed, f"toy:lock-{seed}/student", hidden=96, documents=192)
    teacher = pretrain(TEACHER_CORPUS, seed, f"toy:lock-{seed}/teacher", layers=3, documents=192, steps=TEACHER_STEPS)
    save_model(student, folder / "student")
    save_model(teacher, folder / "teacher")
    write_lock_data(folder, seed)


def cached(name: str, seed: int, write: Callable[[Path, int], None]) -> Path:
    """CACHE/name-<hash of this file>, written by the first process that asks while the others wait.

    The folder appears by a rename, complete or not at all; a process that dies takes its lock with it.
    """
    recipe = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]
    folder = CACHE / f"{name}-{recipe}"
    if folder.exists():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / f"{name}.lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=CACHE, prefix=f".{name}-", ignore_cleanup_errors=True) as unfinished:
                write(Path(unfinished), seed)
                os.rename(unfinished, folder)
    return folder


def build(seed: int = 0) -> Path:
    """The world of `add`, `mul`, `zig`...: model/ and DATA."""
    return cached(f"toy-{seed}", seed, write_toy)


def build_lock(seed: int = 0) -> Path:
    """The world of the locks: student/, teacher/ and LOCK_DATA."""
    return cached(f"lock-{seed}", seed, write_lock)


def resolve(source: str) -> Path:
    """ "toy:0/model" -> the folder of that model, built if need be. Likewise "toy:0/zig-train.jsonl", "toy:lock-0/teacher"."""
    parts = re.fullmatch("toy:(lock-)?([0-9]+)/(.+)", source)
    if not parts:
        raise ValueError(f"{source!r}: expected toy:SEED/FILE or toy:lock-SEED/FILE, for example toy:0/model")
    make, files = (build_lock, ["student", "teacher", *LOCK_DATA]) if parts[1] else (build, ["model", *DATA])
    if parts[3] not in files:
        raise ValueError(f"{source!r}: there is no {parts[3]!r} in this world; it has: {', '.join(files)}")
    return make(int(parts[2])) / parts[3]


# ------------------------------------------------------------------------------------------------------------- measurement

# What each seed has measured, with room for noise; a broken recipe leaves its band. Sampled at temperature 1 unless "greedy".
BANDS = {}
LOCK_BANDS = {}


@torch.no_grad()
def answers(folder: Path, users: list[str], said: list[str] | None = None, greedy: bool = False) -> list[str]:
    """One completion for each user message, after what the assistant has `said`. The prompts must have the same length."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = Qwen3ForCausalLM.from_pretrained(folder, attn_implementation="eager")
    chats = [tokenizer.apply_chat_template([{"role": "user", "content": user}], tokenize=False, add_generation_prompt=True)
             for user in users]
    ids_BT = torch.tensor(tokenizer([chat + s for chat, s in zip(chats, said or [""] * len(users))])["input_ids"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        out_BT = torch.cat([model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=not greedy, top_k=0,
                                           max_new_tokens=17) for ids in ids_BT.split(512)]) 
    return tokenizer.batch_decode(out_BT[:, ids_BT.shape[1]:], skip_special_tokens=True)


def share(hits) -> float:
    hits = list(hits)
    return sum(hits) / len(hits)


def accuracy(folder: Path, prompts: list[str], users: list[str] | None = None, **how) -> float:
    return share(said == solve(prompt) for prompt, said in zip(prompts, answers(folder, users or prompts, **how)))


def measure(model: Path, n: int = 512) -> dict[str, float]:
    """What build(seed)/model can do before any training."""
    rng, results = random.Random(0), {}
    prompts = lambda task, n=n: [ask(task, rng) for _ in range(n)]

    for task in ("add", "mul"):
        asked = prompts(task)
        results[task] = accuracy(model, asked)
        results[f"{task} greedy"] = accuracy(model, asked, greedy=True)
        tries = answers(model, [p for p in asked[:n // 2] for _ in range(8)])
        results[f"{task} pass@8"] = share(solve(p) in tries[8 * i:8 * i + 8] for i, p in enumerate(asked[:n // 2]))
        results[f"{task} with solution"] = accuracy(model, asked, [sdpo_prompt(p, solve(p)) for p in asked])
    for task in ("rev", "sort", "max"):
        results[task] = accuracy(model, prompts(task))
    for task in ("zig", "zag"):
        asked = prompts(task)
        results[task] = accuracy(model, asked)
        shown = [SDFT_TEMPLATE.format(prompt=p, demonstration=demonstration(p.split(":")[1], solve(p))) for p in asked]
        results[f"{task} with demonstration"] = accuracy(model, asked, shown)
    asked = prompts("mul")
    for level in ("all", "first", "flags"):
        texts = [feedback(sloppy_wrong(p, rng), solve(p), level) for p in asked]
        results[f"mul, wrong, feedback {level}"] = accuracy(model, asked, [sdpo_prompt(p, feedback=t) for p, t in zip(asked, texts)])
        right = [feedback(solve(p), solve(p), level) for p in asked]
        results[f"mul, right, feedback {level}"] = accuracy(model, asked, [sdpo_prompt(p, feedback=t) for p, t in zip(asked, right)])
        results[f"mul, solution and feedback {level}"] = accuracy(model, asked, [sdpo_prompt(p, solve(p), t) for p, t in zip(asked, texts)])
    asked = prompts("add")
    results["add, wrong, revised"] = accuracy(model, asked, said=[sloppy_wrong(p, rng) + REVISE_WRONG for p in asked])
    results["add, right, rephrased"] = accuracy(model, asked, said=[solve(p) + REVISE_RIGHT for p in asked])
    return results


def measure_lock(world: Path) -> dict[str, float]:
    """What student and teacher of build_lock(seed) can do on the held-out locks."""
    results = {}
    asked = LOCKS[200:] * 4
    for who in ("student", "teacher"):
        tries = answers(world / who, asked)
        results[f"{who}, lock"] = share(lock(said, row(p)) for said, p in zip(tries, asked))
        results[f"{who}, first key right"] = share(said[:1] == opening_key(p) for said, p in zip(tries, asked))
        results[f"{who}, false ok"] = share(said.endswith(" ok") and not lock(said, row(p)) for said, p in zip(tries, asked))
        results[f"{who}, attempts"] = share(len(re.findall(" ", said)) for said in tries)
    for task in ("rev", "sort", "run"):
        rng = random.Random(0)
        results[f"student, {task}"] = accuracy(world / "student", [ask(task, rng) for _ in range(512)])
    return results


def print_table(columns: dict[int, dict[str, float]], bands: dict[str, tuple[float, float]]) -> None:
    print("| " + " | ".join(["", *(f"seed {seed}" for seed in columns), "band"]) + " |")
    print("|---" * (len(columns) + 2) + "|")
    for name in next(iter(columns.values())):
        cells = [f"{column[name]:.2f}" for column in columns.values()]
        print("| " + " | ".join([name, *cells, "{:.2f} to {:.2f}".format(*bands.get(name, (0,1)))]) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the laptop world and print what its models can do before any training.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--lock", action="store_true", help="the lock world as well")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print_table({seed: measure(build(seed) / "model") for seed in args.seeds}, BANDS)
    if args.lock:
        print()
        print_table({seed: measure_lock(build_lock(seed)) for seed in args.seeds}, LOCK_BANDS)


if __name__ == "__main__":
    main()
