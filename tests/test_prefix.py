"""A prompt is read once for all its attempts: states and gradients are those of each text read whole.

Traps 14 to 16: row n predicts completion token n, alone and in any batch, also with absolute positions (GPT-2).
"""

from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import transformers
from conftest import make_model, run_here

import common
from common import Run, Teacher, check_model, completion_states, load_model, micro_batches, tokens_read

A, B, C = [3, 20, 21, 22, 23, 24, 25, 26, 5, 4], [3, 20, 21, 5, 4], [3, 22, 5, 4]
# Attempts apart from each other, ragged, of one token; the prompt of two questions; a prompt asked once.
PAIRS = [
    *((A, [30, 31, 32, 5]), (B, [33]), (A, [34, 35, 5]), (C, [40, 41])),
    *((B, [42, 43, 34, 35, 36, 37, 38, 39, 5]), (A, [30]), (B, [42, 44]), (A, [30, 31, 45])),
]
MODELS = {
    "qwen3": ("qwen3", {}),
    "tied": ("qwen3", {"tie_word_embeddings": True}),
    "llama": ("llama", {"mlp_bias": True}),
    "gpt2": ("gpt2", {"n_positions": 14}),  # as many as any pair has, fewer than the padded batch
    "gemma2": ("gemma2", {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0}),
    "window": ("mistral", {"sliding_window": 6}),  # narrower than a prompt
    "granite": ("granite", {"logits_scaling": 6.0}),
    "cohere": ("cohere", {"logit_scale": 0.3}),
    "hybrid": ("qwen3_5", {}),  # linear attention writes its state in place: a cache with no gradient
}


class Sample(NamedTuple):
    prompt: list
    context: list | None
    y: list


@pytest.fixture
def run(tmp_path):
    args = dict(out=str(tmp_path / "run"), seed=0, dtype="auto", activation_checkpointing=False)
    return Run(SimpleNamespace(**args))


def make(folder, name, run, lora=0):
    family, changes = MODELS[name]
    model = load_model(str(make_model(folder / "m", family, **changes)), run, lora)
    torch.manual_seed(1)
    for key, p in model.named_parameters():
        if "lora_B" in key:
            p.data.normal_(std=0.2)
    return model


def read(model, pairs, whole=False):
    """States, and the gradients of a sum of them that weighs every one differently."""
    model.zero_grad()
    if whole:
        texts = [(len(prompt), torch.tensor([[*prompt, *y]])) for prompt, y in pairs]
        states = [model.base_model(ids, use_cache=False).last_hidden_state[0] for _, ids in texts]
        h_ND = torch.cat([h_LD[start - 1 : -1] for (start, _), h_LD in zip(texts, states, strict=True)])
    else:
        h_ND = completion_states(model, pairs)
    weight_ND = torch.randn(h_ND.shape, generator=torch.Generator().manual_seed(2))
    (weight_ND * h_ND).sum().backward()
    return h_ND.detach(), {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


def check(model, pairs=PAIRS):
    """To a few roundings of fp32: the states, and the gradients tensor by tensor."""
    (h_ND, gradients), (states, wanted) = read(model, pairs), read(model, pairs, whole=True)
    assert h_ND.shape == states.shape and gradients.keys() == wanted.keys() and len(wanted) > 4
    assert (h_ND - states).norm() <= 2e-6 * states.norm()
    for key, gradient in wanted.items():
        assert (gradients[key] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, key


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("lora", [0, 2], ids=["full", "lora"])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "hybrid"])
def test_states_and_gradients_are_those_of_whole_texts(name, lora, attention, tmp_path, run, monkeypatch):
    if (name, attention) == ("gemma2", "sdpa"):
        pytest.skip("SDPA has no soft-cap")
    monkeypatch.setattr(common, "attention_of", lambda config, device: attention)
    model = make(tmp_path, name, run, lora)
    assert model.shares_prompts and model.config._attn_implementation == attention
    for pairs in (PAIRS, PAIRS[:1], [(B, [33])], [(A, [30, 31, 5]), (A, [32, 33, 5])]):
        check(model, pairs)
    model.shares_prompts = False
    check(model)


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "window", "hybrid"])
def test_in_bf16_the_cache_holds_keys_in_bf16_and_nothing_else_changes(name, tmp_path, run, monkeypatch):
    run.computes_in_bf16 = True
    model, prompts = make(tmp_path, name, run), [A, B, A]
    with torch.no_grad():
        ours = common.prefill(model, prompts)
        monkeypatch.setattr(common, "Cache", transformers.DynamicCache)
        plain = common.prefill(model, prompts)
        (h, mask, cache), (wanted, _, other) = ours, plain
        dtypes = [{layer.keys.dtype for layer in c.layers if hasattr(layer, "keys")} for c in (cache, other)]
        assert dtypes == [{torch.bfloat16}, {torch.float32}]
        assert torch.equal(h, wanted)
        ids, mask = torch.tensor([[30, 31], [32, 33], [34, 35]]), torch.cat([mask, mask.new_ones(3, 2)], 1)
        h, wanted = (common.next_states(model, ids, mask, c) for c in (cache, other))
        assert torch.equal(h, wanted)


def watch(monkeypatch, model, shapes):
    """Notes the shape of all that the model reads."""
    read_it = model.read

    def watched(**inputs):
        shapes.append(tuple(inputs["input_ids"].shape))
        return read_it(**inputs)

    monkeypatch.setattr(model, "read", watched)


def test_each_prompt_is_read_once_by_student_and_teacher(tmp_path, run, monkeypatch):
    model, shapes = make(tmp_path, "qwen3", run), []
    teacher = Teacher("base", 0.0, model, run)
    for m in (model, teacher.model):
        watch(monkeypatch, m, shapes)
    completion_states(model, PAIRS)
    teacher.targets(PAIRS)
    assert shapes == [(3, 10), (8, 8)] * 2


@pytest.mark.parametrize("name, checkpointing", [("hybrid", False), ("qwen3", True)])
def test_a_model_that_cannot_share_reads_each_text_whole_and_says_so(
    name, checkpointing, tmp_path, run, capsys
):
    run.args.activation_checkpointing = checkpointing
    model = make(tmp_path, name, run)
    assert not model.shares_prompts
    assert capsys.readouterr().out.count(f"--model {tmp_path}/m: each attempt reads its prompt again; ") == 1
    check(model)


def test_a_model_that_reads_completions_wrongly_on_a_cache_does_not_share(tmp_path, run, monkeypatch):
    """One token at a time it is right, several at once it forgets the prompt."""
    model, shapes = make(tmp_path, "qwen3", run), []
    read_right = model.read

    def forgetful(**inputs):
        cache = inputs.get("cache")
        if cache is not None and cache.get_seq_length() and inputs["input_ids"].shape[1] > 1:
            inputs = dict(input_ids=inputs["input_ids"], use_cache=False)
        return read_right(**inputs)

    model.read = forgetful
    watch(monkeypatch, model, shapes)
    check_model(model, "--model m")
    assert not model.shares_prompts and (2, 5) in shapes


@pytest.mark.parametrize("rollouts, shares", [(1, False), (2, True)])
def test_one_completion_a_prompt_has_nothing_to_share(rollouts, shares, run, tmp_path, capsys):
    """Then a text is read in one pass."""
    run.args.rollouts = rollouts
    assert make(tmp_path, "qwen3", run).shares_prompts == shares
    assert "reads its prompt again" not in capsys.readouterr().out


# Micro-batches.


def batches(run, samples, tokens, shares=True):
    run.args.tokens_per_batch, run.student = tokens, SimpleNamespace(shares_prompts=shares)
    found = micro_batches(run, samples)
    assert sorted(map(id, samples)) == sorted(id(s) for micro in found for s in micro)
    return found


def test_attempts_of_a_prompt_stay_together_where_prompts_are_long(run):
    samples = [Sample([q] * 100, None, [9] * (5 + i)) for i in range(4) for q in range(4)]
    assert [{s.prompt[0] for s in micro} for micro in batches(run, samples, 200)] == [{3}, {2}, {1}, {0}]
    assert len(batches(run, samples, 200, shares=False)) == 16
    assert max(len({s.prompt[0] for s in micro}) for micro in batches(run, samples, 400)) == 2


def test_completions_of_one_length_go_together_where_prompts_are_short(run):
    samples = [Sample([q, 1], None, [9] * (10 * 4**i)) for q in range(4) for i in range(4)]
    lengths = [sorted({len(s.y) for s in micro}) for micro in batches(run, samples, 700)]
    assert lengths == [[640]] * 4 + [[160], [10, 40]]


@pytest.mark.parametrize("shares", [True, False])
def test_no_micro_batch_reads_more_than_it_may(shares, run):
    """On the side that reads more; a sample too large for any goes alone, and none is much too small."""
    samples = [Sample([i % 5] * 30, [i % 3] * (40 + i), [9] * (1 + 3 * i)) for i in range(30)]
    for tokens in (60, 300, 1000):
        for micro in batches(run, samples, tokens, shares):
            assert tokens_read(micro, shares) <= tokens or len(micro) == 1
    both = [Sample([1] * 10, [2] * 50, [9] * 4), Sample([1] * 10, [3] * 20, [9] * 8)]
    assert tokens_read(both, True) == 2 * 50 + 2 * 50 / 8 + 2 * 8 and tokens_read(both, False) == 2 * 58
    assert tokens_read([both[0]] * 4, True) == 50 + 4 * 50 / 8 + 4 * 4


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5, 8])
def test_a_share_of_neighbours_covers_every_block_once(world, run):
    items, size, parts = list(range(24)), 6, []
    for rank in range(world):
        run.rank, run.world = rank, world
        parts.append(run.share(items, size))
    assert sorted(sum(parts, [])) == items
    for first in range(0, 24, size):
        inside = [[i for i in part if first <= i < first + size] for part in parts]
        assert sum(inside, []) == items[first : first + size] and inside[0]
        assert max(map(len, inside)) - min(map(len, inside)) <= 1
    run.world, run.rank = 2, 1
    assert run.share(items) == items[12:]


def test_sdpo_keeps_the_attempts_of_a_question_on_one_rank(tiny, tmp_path, monkeypatch):
    (tmp_path / "judge.py").write_text("def judge(completion, row):\n    return float(len(completion) % 2)\n")
    seen, share = [], Run.share

    def watched_share(run, items, size=0):
        seen.append((len(items), size))
        return share(run, items, size)

    monkeypatch.setattr(Run, "share", watched_share)
    run_here("sdpo", tmp_path / "r", tiny, f"--verifier {tmp_path}/judge.py:judge --mini-batch 2 --steps 1")
    assert (24, 6) in seen
