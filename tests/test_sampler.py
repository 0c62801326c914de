"""Generation: the same rollout in any company, every parameter explicit, log-probs of the distribution that drew the token."""

import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model, run_here
from transformers import AutoModelForCausalLM, GenerationConfig

import toy
from common import InputError, Sampler, draw, make_optimizer, on_completions, optimizer_step, uniforms

ARGS = type("Args", (), dict(seed=3, max_completion_tokens=12, sample_batch=64, dtype="auto"))
PROMPTS = [[3, 20, 21, 5, 4], [3, 22, 5, 4], [3, 30, 31, 32, 33, 34, 5, 4], [3, 22, 5, 4], [3, 25, 26, 5, 4]]


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


@pytest.fixture(scope="module", params=["qwen3", "llama", "gemma2", "gpt2"])
def model(request, tmp_path_factory):
    """Gemma 2 has sliding-window layers (here narrower than the text), GPT-2 absolute positions."""
    changes = {"sliding_window": 6} if request.param == "gemma2" else {}
    return load(make_model(tmp_path_factory.mktemp("model") / request.param, request.param, **changes))


@pytest.fixture
def sampler(model):
    return Sampler(toy.make_tokenizer(), model, ARGS)


def test_a_rollout_is_the_same_alone_and_in_any_batch(model, sampler, monkeypatch):
    """Trap 16; finished rows leave the batch at different times, prompts have different lengths."""
    together = sampler(model, PROMPTS, [0, 1, 2, 3, 4], 3, (1, 5), temperature=1.0)
    assert len({len(y.ids) for group in together for y in group}) > 1
    monkeypatch.setattr(ARGS, "sample_batch", 1)
    for i in (4, 2, 0):
        alone = sampler(model, [PROMPTS[i]], [i], 3, (1, 5), temperature=1.0)[0]
        assert [y.ids for y in alone] == [y.ids for y in together[i]]
        for a, b in zip(alone, together[i]):
            assert a.logps == pytest.approx(b.logps, abs=1e-5)


def test_rows_samples_and_streams_have_random_numbers_of_their_own(model, sampler):
    one = sampler(model, PROMPTS[1:4:2], [1, 3], 2, (1, 5), temperature=1.0)           # the same prompt twice
    texts = [tuple(y.ids) for group in one for y in group]
    assert len(set(texts)) == 4
    assert [y.ids for y in sampler(model, [PROMPTS[1]], [1], 2, (1, 6), temperature=1.0)[0]] != [list(t) for t in texts[:2]]
    assert (uniforms((0, 1, 2), 4)[:2] == uniforms((0, 1, 2), 2)).all()                # position t's number does not depend on the limit


def test_greedy_equals_generate(model, sampler):
    config = GenerationConfig(do_sample=False, max_new_tokens=12, eos_token_id=sampler.eos.tolist(), pad_token_id=0)
    for prompt, [ours] in zip(PROMPTS, sampler(model, PROMPTS, [0] * 5, 1, (1,), temperature=0.0)):
        theirs = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), generation_config=config)
        assert ours.ids == theirs[0, len(prompt):].tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logps_are_those_of_the_tempered_policy(model, sampler, temperature):
    """Trap 39: they equal a teacher-forced pass at the same temperature, so on-policy ratios are 1."""
    for prompt, [y] in zip(PROMPTS, sampler(model, PROMPTS, [0, 1, 2, 3, 4], 1, (1,), temperature=temperature)):
        forced = on_completions(model, [(prompt, y.ids)], ARGS, lambda h, head: (head.logits(h) / temperature).log_softmax(-1))
        assert y.logps == pytest.approx(forced.gather(1, torch.tensor(y.ids)[:, None])[:, 0].tolist(), abs=1e-5)


def test_generation_config_is_not_read(model, sampler):
    """Trap 41: a folder whose generation_config says top_p .33 still samples from the full distribution."""
    before = sampler(model, PROMPTS, [0] * 5, 4, (1,), temperature=1.0)
    model.generation_config = GenerationConfig(do_sample=True, top_p=0.33, temperature=0.1, max_new_tokens=3)
    assert sampler(model, PROMPTS, [0] * 5, 4, (1,), temperature=1.0) == before


def test_any_eos_ends_a_completion_and_stays_in_it(model):
    """Traps 12 and 13: every id that the folder names; the EOS is part of the completion; no EOS means not finished."""
    model.generation_config.eos_token_id = [7, 9, 11, 13, 15, 17, 19, 21, 23]
    sampler = Sampler(toy.make_tokenizer(), model, ARGS)
    ends = set(sampler.eos.tolist())
    assert ends == {5, 7, 9, 11, 13, 15, 17, 19, 21, 23}
    rollouts = [y for group in sampler(model, PROMPTS, [0, 1, 2, 3, 4], 12, (1,), temperature=1.0) for y in group]
    for y in rollouts:
        assert not ends & set(y.ids[:-1]) and y.finished == (y.ids[-1] in ends) and len(y.ids) == len(y.logps)
        assert y.finished or len(y.ids) == 12
    assert len({y.ids[-1] for y in rollouts if y.finished}) > 2 and {y.finished for y in rollouts} == {True, False}


def test_a_pad_token_in_a_prompt_is_read_like_any_other(model, sampler):
    """Trap 11: masks come from lengths, not from ids."""
    prompt = [3, 20, toy.make_tokenizer().pad_token_id, 5, 4]
    alone = sampler(model, [prompt], [0], 1, (1,), temperature=1.0)[0][0]
    beside = sampler(model, [prompt, PROMPTS[2]], [0, 1], 1, (1,), temperature=1.0)[0][0]
    without = sampler(model, [[3, 20, 5, 4]], [0], 1, (1,), temperature=1.0)[0][0]
    assert beside.ids == alone.ids and beside.logps == pytest.approx(alone.logps, abs=1e-5) and without.logps[0] != pytest.approx(alone.logps[0], abs=1e-3)


def test_draw_follows_its_distribution():
    """Frequencies over an even grid of uniform numbers are the probabilities; top-k and top-p cut where they should."""
    z = torch.tensor([2.0, 1.0, 0.0, -1.0, -30.0])
    grid = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    for temperature, top_p, top_k, support in [(1.0, 1.0, 0, 4), (0.5, 1.0, 0, 4), (1.0, 1.0, 2, 2), (1.0, 0.7, 0, 2), (1.0, 0.6, 0, 1)]:
        token, logp = draw(z.expand(20000, 5), grid, temperature, top_p, top_k)
        share = torch.bincount(token, minlength=5) / 20000
        want = (z[:support] / temperature).softmax(0)
        assert share[:support].tolist() == pytest.approx(want.tolist(), abs=2e-4) and share[support:].sum() == 0
        assert logp.exp().tolist() == pytest.approx(want[token].tolist(), abs=1e-6)


def test_draw_never_leaves_the_support_at_the_edges():
    z = torch.tensor([[-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf]] * 2)
    token, logp = draw(z, torch.tensor([0.0, 1.0 - 2**-53], dtype=torch.float64), 1.0, 1.0, 0)
    assert token.tolist() == [1, 3] and logp.isfinite().all()


# ---- The other engine, where it is not installed or does not fit (with it: test_vllm.py)

@pytest.mark.parametrize("version, flags, message", [
    (None, "", "--engine vllm: vLLM is not installed; pip install 'vllm>=0.32,<0.33'"),
    ((0, 31, 4), "", "--engine vllm: this is vLLM 0.31.4; pip install 'vllm>=0.32,<0.33'"),
    ((0, 33, 0), "", "--engine vllm: this is vLLM 0.33.0; pip install"),
    ((0, 32, 1), "--engine-tensor-parallel 2", "--engine-tensor-parallel 2: it must divide the 1 processes"),
    ((0, 32, 1), "--engine-cache-gib 0", "--engine-cache-gib 0.0: a size above 0"),
])
def test_an_engine_that_cannot_start_is_refused_before_a_model_loads(version, flags, message, tiny, tmp_path, monkeypatch):
    spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: version if name == "vllm" else spec(name, *rest))
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__=".".join(map(str, version or ())), __version_tuple__=version))
    monkeypatch.setattr("sdft.load_model", lambda *a: pytest.fail("a model was loaded first"))
    with pytest.raises(InputError, match=message):
        run_here("sdft", tmp_path / "r", tiny, f"--engine vllm {flags}")
    assert not (tmp_path / "r").exists()


def test_every_optimiser_step_counts_as_a_write():
    """By these counts the vLLM engine knows that its weights are stale; the fused kernel alone leaves them as they were."""
    model, args = torch.nn.Linear(3, 2), SimpleNamespace(lr=0.1, adam_betas=(0.9, 0.999), weight_decay=0.0, grad_clip=1.0)
    run, optimizer = SimpleNamespace(args=args, skipped=0, skipped_all=0), make_optimizer(model, args)
    model(torch.ones(3)).sum().backward()
    before = [p._version for p in model.parameters()]
    assert optimizer_step(optimizer, 0.1, run) > 0
    assert all(p._version > count for p, count in zip(model.parameters(), before))
