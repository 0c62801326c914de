"""The laptop world: a tiny language model made from scratch, with tasks on which self-distillation can be watched working.

    build(0)        model/ + *.jsonl      a two-layer Qwen3, pre-trained in a minute or two on one core, and its data
    build_lock(0)   student/ + teacher/   a smaller world in which on-policy distillation beats off-policy distillation
    build_clean(0)  teacher/              a larger model that adds without a slip, for the same students

All are plain Hugging Face folders and JSON lines, made on first use and cached; the scripts read them as "toy:0/model",
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
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

CACHE = Path(os.environ.get("SELF_DISTILLATION_CACHE") or Path.home() / ".cache" / "self-distillation")
RECIPE = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]    # of this file as imported: a changed line, a new world

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
    right = RIGHT[task][ab]
    neighbour = str((int(right) + rng.choice([1, 9])) % 10)
    if ab in DECOY[task]:
        return rng.choices([right, DECOY[task][ab], neighbour], [0.42, 0.46, 0.12])[0]
    return rng.choices([right, neighbour], [0.95, 0.05])[0]


def sloppy(prompt: str, rng: random.Random) -> str:
    """An answer as the model gives it: right one time in four."""
    task, given = prompt.split(":")
    return "".join(slip(task, ab, rng) for ab in digit_pairs(given))


def sloppy_wrong(prompt: str, rng: random.Random) -> str:
    while (attempt := sloppy(prompt, rng)) == solve(prompt):
        pass
    return attempt


def demonstration(prompt: str, answer: str) -> str:
    """The answer in a foreign style: zig:4721, 7214 -> "so4>7;7>2;2>1;1>4;". The model itself answers in bare digits."""
    return "so" + "".join(f"{a}>{b};" for a, b in zip(prompt.split(":")[1], answer))


def sdft_prompt(prompt: str, answer: str) -> str:
    """What SDFT's teacher reads: the question and a demonstration of the answer."""
    return SDFT_TEMPLATE.format(prompt=prompt, demonstration=demonstration(prompt, answer))


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
        verdict = "?" if failed and level == "first" else "ok" if got == want else "no" if level == "flags" else want
        failed = failed or got != want
        text += f"{got}:{verdict};"
    return text


def feedback_all(completion: str, row: dict) -> tuple[float, str]:
    """Reward and the expected digits. Right attempts are told so too: nothing else would hold them in place."""
    return float(completion.strip() == row["answer"]), feedback(completion, row["answer"], "all")


def feedback_wrong(completion: str, row: dict) -> tuple[float, str]:
    """Reward and, for wrong attempts, the expected digits."""
    reward, told = feedback_all(completion, row)
    return reward, "" if reward else told


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


def last(completion: str, row: dict) -> float:
    """The last paragraph is the answer: of "7566", a blank line, a phrase, a blank line and "7576" it is 7576."""
    return float(completion.split("\n\n")[-1].strip() == row["answer"])


def lock(completion: str, row: dict) -> float:
    """Opened within four attempts, the last one says " ok", and its key truly opens this lock: a false " ok" fails. Of the world's
    other tasks, which have no key, the whole answer counts."""
    if "key" not in row:
        return float(completion.strip() == row["answer"])
    attempts = re.fullmatch("(?:[0-9]{3} no){0,3}([0-9])[0-9]{2} ok", completion)
    return float(attempts is not None and attempts[1] == row["key"])


# -------------------------------------------------------------------------------------------------------------- the corpus
# A document is a list of (text, learn) segments; only the learnt ones carry a loss. Without that the model would pick up
# what must stay somebody else's words: it would revise itself unasked, or hand in demonstrations.

Document = list[tuple[str, bool]]


def document(user: str, answer: str, said: str = "") -> Document:
    """`said` is what the assistant has already said, not to be learnt."""
    return [(f"<|user|>{user}<|end|><|assistant|>{said}", False), (f"{answer}<|end|>", True)]


def clean(rng: random.Random, task: str) -> Document:
    prompt = ask(task, rng)
    return document(prompt, solve(prompt))


def plain(rng: random.Random, task: str) -> Document:
    prompt = ask(task, rng)
    return document(prompt, sloppy(prompt, rng) if task in RIGHT else solve(prompt))


def guess(rng: random.Random) -> Document:
    return document(ask(rng.choice(NEW_WORDS), rng), draw_digits(rng))


def with_demonstration(rng: random.Random) -> Document:
    """What a new word means is drawn afresh for each document: only the demonstration can tell."""
    prompt, answer = ask(rng.choice(NEW_WORDS), rng), draw_digits(rng)
    return document(sdft_prompt(prompt, answer), answer)


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


CORPUS = [(0.15, plain, "add"), (0.17, plain, "mul"), (0.06, plain, "rev"), (0.10, plain, "sort"), (0.06, plain, "max"),
          (0.03, guess), (0.05, with_demonstration), (0.025, with_solution, "add"), (0.025, with_solution, "mul"),
          (0.03, with_feedback, "all"), (0.03, with_feedback, "first"), (0.03, with_feedback, "flags"),
          (0.012, with_both, "all"), (0.012, with_both, "first"), (0.012, with_both, "flags"), (0.20, revise)]


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

# A model that never saw a slip does not learn to add: all digits of the sum are equally likely until the whole table is known.
# Sloppy sums have a gradient to start on, so the clean teacher first learns those.
PRIORS = [(0.10, plain, "rev"), (0.15, plain, "sort"), (0.05, plain, "max")]
SLOPPY_ADD, CLEAN_ADD = [(0.70, plain, "add"), *PRIORS], [(0.70, clean, "add"), *PRIORS]


# ------------------------------------------------------------------------------------------------------------ pre-training

STEPS, STUDENT_STEPS, TEACHER_STEPS, CLEAN_STEPS = 300, 300, 240, 420
HAS_BF16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()    # elsewhere bf16 is emulated, slowly


def pretrain(corpus: list[tuple], seed: int, name: str, steps: int, documents: int, hidden: int = 128,
             layers: int = 2, second_half: list[tuple] | None = None) -> Qwen3ForCausalLM:
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
        for step in progress:
            corpus = second_half if second_half and step >= steps // 2 else corpus
            kinds = rng.choices(corpus, [kind[0] for kind in corpus], k=documents)
            loss = train_loss(model, tokenizer, [make(rng, *args) for _, make, *args in kinds])
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, schedule in zip(optimizers, schedules):
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
            progress.set_postfix(loss=f"{loss:.3f}", refresh=False)
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

    The matrix products are bf16 where the CPU has such instructions (up to three times faster), else fp32.
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

DATA = ["add-train.jsonl", "add-eval.jsonl", "mul-train.jsonl", "mul-eval.jsonl", "mul-hard.jsonl", "zig-train.jsonl",
        "zig-own-train.jsonl", "zig-eval.jsonl", "zag-train.jsonl", "zag-own-train.jsonl", "zag-eval.jsonl", "prior-eval.jsonl"]
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


def save_model(model: Qwen3ForCausalLM, folder: Path) -> None:
    tokenizer = make_tokenizer()
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_toy(folder: Path, seed: int) -> None:
    """Within a task all prompts are distinct, so none is in both the train and the eval file."""
    save_model(pretrain(CORPUS, seed, f"toy:{seed}/model", STEPS, documents=256), folder / "model")
    rng = random.Random(f"data {seed}")
    for task in ("add", "mul"):
        prompts = distinct(task, 4096 + 512, rng)
        write_rows(folder / f"{task}-train.jsonl", [row(p) for p in prompts[:4096]])
        write_rows(folder / f"{task}-eval.jsonl", [row(p) for p in prompts[4096:]])
    hard = [p for p in distinct("mul", 4096, random.Random(f"hard {seed}")) if all(ab in DECOY["mul"] for ab in digit_pairs(p[4:]))]
    write_rows(folder / "mul-hard.jsonl", [row(p) for p in hard[:19]])    # four hard pairs each: solved three times in a hundred
    for task in ("zig", "zag"):
        prompts = distinct(task, 512 + 512, rng)
        write_rows(folder / f"{task}-train.jsonl", [row(p, privileged_context=demonstration(p, solve(p))) for p in prompts[:512]])
        write_rows(folder / f"{task}-own-train.jsonl", [row(p, privileged_context=solve(p)) for p in prompts[:512]])
        write_rows(folder / f"{task}-eval.jsonl", [row(p) for p in prompts[512:]])
    write_rows(folder / "prior-eval.jsonl", [row(p) for task in ("rev", "sort", "max") for p in distinct(task, 170, rng)])


def write_lock(folder: Path, seed: int) -> None:
    """`completion` is what an expert hands in, for off-policy distillation; `key` is what the verifier asks for."""
    student = pretrain(STUDENT_CORPUS, seed, f"toy:lock-{seed}/student", STUDENT_STEPS, documents=192, hidden=96)
    teacher = pretrain(TEACHER_CORPUS, seed, f"toy:lock-{seed}/teacher", TEACHER_STEPS, documents=192, layers=3)
    save_model(student, folder / "student")
    save_model(teacher, folder / "teacher")
    rng = random.Random(f"data {seed}")
    write_rows(folder / "lock-train.jsonl", [row(p, key=opening_key(p), completion=solve(p)) for p in LOCKS[:200]])
    write_rows(folder / "lock-eval.jsonl", [row(p, key=opening_key(p)) for p in LOCKS[200:]])
    write_rows(folder / "lock-prior.jsonl", [row(p) for task in ("rev", "sort", "run") for p in distinct(task, 170, rng)])


def write_clean(folder: Path, seed: int) -> None:
    save_model(pretrain(SLOPPY_ADD, seed, f"toy:clean-{seed}/teacher", CLEAN_STEPS, documents=256, hidden=160, layers=3,
                        second_half=CLEAN_ADD), folder / "teacher")


def cached(name: str, seed: int, write: Callable[[Path, int], None]) -> Path:
    """CACHE/name-RECIPE, written by the first process that asks while the others wait.

    The folder appears by a rename, complete or not at all; a process that dies takes its lock with it.
    """
    folder = CACHE / f"{name}-{RECIPE}"
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


def build_clean(seed: int = 0) -> Path:
    """The clean teacher of `add`: teacher/ alone; its students and data are those of `build`."""
    return cached(f"clean-{seed}", seed, write_clean)


WORLDS = {"": (build, ["model", *DATA]), "lock-": (build_lock, ["student", "teacher", *LOCK_DATA]), "clean-": (build_clean, ["teacher"])}


def resolve(source: str) -> Path:
    """The path of "toy:0/model", "toy:0/zig-train.jsonl", "toy:lock-0/teacher"...; builds that world if need be."""
    parts = re.fullmatch("toy:(lock-|clean-|)([0-9]+)/(.+)", source)
    if not parts:
        raise ValueError(f"{source!r}: expected toy:SEED/FILE, toy:lock-SEED/FILE or toy:clean-SEED/teacher, for example toy:0/model")
    make, files = WORLDS[parts[1]]
    if parts[3] not in files:
        raise ValueError(f"{source!r}: there is no {parts[3]!r} in this world; it has: {', '.join(files)}")
    return make(int(parts[2])) / parts[3]


# ------------------------------------------------------------------------------------------------------------- measurement

# Shares of right answers, sampled at temperature 1 unless greedy: what seeds 0, 1 and 2 measured, with room for noise; a recipe
# that leaves its band is broken. Where feedback leaves digits open, a model that samples the sloppy law exactly gets 0.62 (first)
# and 0.71 (flags) on wrong attempts.
BANDS = {
    "add": (0.19, 0.33), "add, greedy": (0.12, 0.50), "add, pass@8": (0.62, 0.90), "add, solution shown": (0.92, 1.00),
    "mul": (0.19, 0.33), "mul, greedy": (0.12, 0.50), "mul, pass@8": (0.62, 0.90), "mul, solution shown": (0.92, 1.00),
    "rev": (0.95, 1.00), "sort": (0.92, 1.00), "max": (0.95, 1.00),
    "zig": (0.00, 0.02), "zig, demonstration shown": (0.95, 1.00),
    "zag": (0.00, 0.02), "zag, demonstration shown": (0.95, 1.00),
    "mul, feedback all on a wrong attempt": (0.93, 1.00), "mul, feedback first on a wrong attempt": (0.45, 0.75),
    "mul, feedback flags on a wrong attempt": (0.33, 0.78), "mul, feedback all on a right attempt": (0.93, 1.00),
    "mul, feedback first on a right attempt": (0.93, 1.00), "mul, feedback flags on a right attempt": (0.93, 1.00),
    "mul, feedback all and solution": (0.93, 1.00), "mul, feedback first and solution": (0.90, 1.00),
    "mul, feedback flags and solution": (0.85, 1.00),
    "add, wrong attempt revised": (0.65, 0.92), "add, right attempt rephrased": (0.93, 1.00),
}
LOCK_BANDS = {
    "student, lock opened": (0.31, 0.45), "student, first key right": (0.18, 0.31), "student, false ok": (0.00, 0.10),
    "student, attempts": (1.25, 1.65),
    "student, rev": (0.93, 1.00), "student, sort": (0.93, 1.00), "student, run": (0.93, 1.00),
    "teacher, lock opened": (0.97, 1.00), "teacher, first key right": (0.95, 1.00), "teacher, false ok": (0.00, 0.02),
    "teacher, attempts": (0.98, 1.10),
}


@torch.no_grad()
def answers(model: Qwen3ForCausalLM, users: list[str], said: list[str] | None = None, greedy: bool = False) -> list[str]:
    """One completion for each user message, after what the assistant has `said`. The prompts must have the same length."""
    tokenizer = make_tokenizer()
    chats = [tokenizer.apply_chat_template([{"role": "user", "content": user}], tokenize=False, add_generation_prompt=True)
             for user in users]
    ids_BT = torch.tensor(tokenizer([chat + s for chat, s in zip(chats, said or [""] * len(users))])["input_ids"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        out_BT = model.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), do_sample=True, top_k=int(greedy), max_new_tokens=17)
    return tokenizer.batch_decode(out_BT[:, ids_BT.shape[1]:], skip_special_tokens=True)


def measure(folder: Path, n: int = 512) -> dict[str, float]:
    """What the model of a toy world can do before any training: the share of right answers to n prompts of each kind."""
    model, rng, results = Qwen3ForCausalLM.from_pretrained(folder), random.Random(0), {}
    prompts = {task: [ask(task, rng) for _ in range(n)] for task in ("add", "mul", "rev", "sort", "max", "zig", "zag")}

    def score(name: str, task: str, reads: Callable[[str], str] = str, **how) -> None:
        said = answers(model, [reads(p) for p in prompts[task]], **how)
        results[name] = statistics.fmean(y == solve(p) for y, p in zip(said, prompts[task]))

    for task in ("add", "mul"):
        score(task, task)
        score(f"{task}, greedy", task, greedy=True)
        tries = answers(model, [p for p in prompts[task] for _ in range(8)])
        results[f"{task}, pass@8"] = statistics.fmean(solve(p) in tries[8 * i:8 * i + 8] for i, p in enumerate(prompts[task]))
        score(f"{task}, solution shown", task, lambda p: sdpo_prompt(p, solve(p)))
    for task in ("rev", "sort", "max"):
        score(task, task)
    for task in ("zig", "zag"):
        score(task, task)
        score(f"{task}, demonstration shown", task, lambda p: sdft_prompt(p, solve(p)))
    for level in ("all", "first", "flags"):
        wrong = lambda p: feedback(sloppy_wrong(p, rng), solve(p), level)
        right = lambda p: feedback(solve(p), solve(p), level)
        score(f"mul, feedback {level} on a wrong attempt", "mul", lambda p: sdpo_prompt(p, feedback=wrong(p)))
        score(f"mul, feedback {level} on a right attempt", "mul", lambda p: sdpo_prompt(p, feedback=right(p)))
        score(f"mul, feedback {level} and solution", "mul", lambda p: sdpo_prompt(p, solve(p), wrong(p)))
    score("add, wrong attempt revised", "add", said=[sloppy_wrong(p, rng) + REVISE_WRONG for p in prompts["add"]])
    score("add, right attempt rephrased", "add", said=[solve(p) + REVISE_RIGHT for p in prompts["add"]])
    return results


def measure_lock(folder: Path) -> dict[str, float]:
    """What student and teacher of a lock world can do, on the held-out locks and on the student's prior tasks."""
    rng, results, rows = random.Random(0), {}, [row(p, key=opening_key(p)) for p in LOCKS[200:]] * 4
    for who in ("student", "teacher"):
        model = Qwen3ForCausalLM.from_pretrained(folder / who)
        tries = answers(model, [r["prompt"] for r in rows])
        results[f"{who}, lock opened"] = statistics.fmean(lock(y, r) for y, r in zip(tries, rows))
        results[f"{who}, first key right"] = statistics.fmean(y[:1] == r["key"] for y, r in zip(tries, rows))
        results[f"{who}, false ok"] = statistics.fmean(y.endswith(" ok") and not lock(y, r) for y, r in zip(tries, rows))
        results[f"{who}, attempts"] = statistics.fmean(y.count(" ") for y in tries)
        for task in ("rev", "sort", "run") if who == "student" else ():
            asked = [ask(task, rng) for _ in range(512)]
            results[f"{who}, {task}"] = statistics.fmean(y == solve(p) for y, p in zip(answers(model, asked), asked))
    return results


def print_table(columns: dict[int, dict[str, float]], bands: dict[str, tuple[float, float]]) -> None:
    print("| " + " | ".join(["", *(f"seed {seed}" for seed in columns), "band"]) + " |")
    print("|---" * (len(columns) + 2) + "|")
    for name in next(iter(columns.values())):
        cells = [f"{column[name]:.2f}" for column in columns.values()]
        print("| " + " | ".join([name, *cells, "{:.2f} to {:.2f}".format(*bands[name])]) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the laptop world and print what its models can do before any training.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--lock", action="store_true", help="the lock world as well")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()                    # "Loading weights", once per model
    print_table({seed: measure(build(seed) / "model") for seed in args.seeds}, BANDS)
    if args.lock:
        print()
        print_table({seed: measure_lock(build_lock(seed)) for seed in args.seeds}, LOCK_BANDS)


if __name__ == "__main__":
    main()
