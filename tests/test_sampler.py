"""Generation: the same rollout in any batch, explicit parameters, log-probs of the distribution that drew."""

import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch
import toy
from conftest import make_model, run_here
from transformers import GenerationConfig

import common
from common import EVAL_STREAM, TRAIN_STREAM, InputError, Rollout, Run, Sampler, Sampling
from common import completion_states, draw, head_of, load_model, make_optimizer, optimizer_step

PROMPTS = [[3, 20, 21, 5, 4], [3, 22, 5, 4], [3, 30, 31, 32, 33, 34, 5, 4], [3, 22, 5, 4], [3, 25, 26, 5, 4]]
KEYS = [(0, 0), (1, 0), (2, 0), (3, 0), (4, 0)]
STREAM = (TRAIN_STREAM, 5)
FREE, GREEDY = Sampling(12), Sampling(12, temperature=0.0)


def make_run(**changes):
    args = dict(out="/nowhere", dtype="auto", seed=3, sample_batch=64, activation_checkpointing=False)
    return Run(SimpleNamespace(**args | changes), toy.make_tokenizer())


@pytest.fixture(scope="module", params=["qwen3", "llama", "gemma2", "gpt2"])
def model(request, tmp_path_factory):
    """Gemma 2 has sliding-window layers (here narrower than the text), GPT-2 absolute positions."""
    changes = {"sliding_window": 6} if request.param == "gemma2" else {}
    folder = tmp_path_factory.mktemp("model") / request.param
    return load_model(str(make_model(folder, request.param, **changes)), make_run())


@pytest.fixture
def sampler(model):
    return Sampler(make_run(), model)


def forced(model, prompt, y, temperature=1.0):
    """Log-probs of y from a pass over prompt and y together."""
    with torch.no_grad():
        z_NV = head_of(model).logits(completion_states(model, [(prompt, y)])) / temperature
    return z_NV.log_softmax(-1).gather(1, torch.tensor(y)[:, None])[:, 0].tolist()


def same(rollouts, others):
    """The same tokens, and log-probs up to the rounding of another batch."""
    for a, b in zip(rollouts, others, strict=True):
        assert a.ids == b.ids and a.finished == b.finished
        assert a.logps == pytest.approx(b.logps, abs=1e-5)


def many(times):
    """Prompts and keys of several samples a row."""
    return PROMPTS * times, [(row, sample) for sample in range(times) for row in range(5)]


@pytest.mark.parametrize("sample_batch", [1, 2])
def test_a_rollout_is_the_same_alone_and_in_any_batch(model, sampler, sample_batch):
    """Trap 16; finished rows leave the batch at different times, prompts have different lengths."""
    prompts, keys = many(6)
    together = sampler(model, prompts, keys, STREAM, FREE)
    assert len({len(y.ids) for y in together}) > 2
    same(Sampler(make_run(sample_batch=sample_batch), model)(model, prompts, keys, STREAM, FREE), together)
    for i in (14, 7, 0):
        same(sampler(model, [prompts[i]], [keys[i]], STREAM, FREE), [together[i]])
    assert sampler(model, [], [], STREAM, FREE) == []


def test_rows_samples_streams_and_seeds_have_random_numbers_of_their_own(model, sampler):
    prompts, keys = [PROMPTS[1]] * 4, [(1, 0), (1, 1), (3, 0), (3, 1)]
    texts = {tuple(y.ids) for y in sampler(model, prompts, keys, STREAM, FREE)}
    assert len(texts) == 4
    other_seed = Sampler(make_run(seed=4), model)
    for one, stream in ((sampler, (TRAIN_STREAM, 6)), (sampler, (EVAL_STREAM, 5)), (other_seed, STREAM)):
        assert not texts & {tuple(y.ids) for y in one(model, prompts, keys, stream, FREE)}


def test_a_position_has_its_random_number_whatever_the_limit(model, sampler):
    long, short = (sampler(model, PROMPTS, KEYS, STREAM, Sampling(limit)) for limit in (12, 3))
    assert [y.ids[:3] for y in long] == [y.ids for y in short] and any(len(y.ids) > 3 for y in long)


def test_greedy_equals_generate(model, sampler):
    eos = sampler.eos.tolist()
    config = GenerationConfig(do_sample=False, max_new_tokens=12, eos_token_id=eos, pad_token_id=0)
    for prompt, y in zip(PROMPTS, sampler(model, PROMPTS, KEYS, STREAM, GREEDY), strict=True):
        mask = torch.ones(1, len(prompt), dtype=torch.long)
        theirs = model.generate(torch.tensor([prompt]), attention_mask=mask, generation_config=config)
        assert y.ids == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
def test_logps_are_those_of_the_tempered_policy(model, sampler, temperature):
    """Trap 39: they equal a pass at that temperature, so on-policy ratios are 1; greedy: untempered."""
    rollouts = sampler(model, PROMPTS, KEYS, STREAM, Sampling(12, temperature))
    for prompt, y in zip(PROMPTS, rollouts, strict=True):
        assert y.logps == pytest.approx(forced(model, prompt, y.ids, temperature or 1.0), abs=1e-5)


def test_generation_config_is_not_read(model, sampler, monkeypatch):
    """Trap 41: a folder whose generation_config says top_p 0.33 still samples from the full distribution."""
    before = sampler(model, PROMPTS, KEYS, STREAM, FREE)
    said = GenerationConfig(do_sample=True, top_p=0.33, temperature=0.1, max_new_tokens=3)
    monkeypatch.setattr(model, "generation_config", said)
    assert sampler(model, PROMPTS, KEYS, STREAM, FREE) == before


def test_any_eos_ends_a_completion_and_stays_in_it(model, monkeypatch):
    """Traps 12, 13: each id the folder names; the EOS stays in the completion; without one it is cut."""
    named = [7, 9, 11, 13, 15, 17, 19, 21, 23]
    monkeypatch.setattr(model.generation_config, "eos_token_id", named)
    monkeypatch.setattr(model.config, "eos_token_id", 25)
    sampler = Sampler(make_run(), model)
    ends = set(sampler.eos.tolist())
    assert ends == {5, 25, *named}
    rollouts = sampler(model, *many(12), STREAM, FREE)
    for y in rollouts:
        assert not ends & set(y.ids[:-1]) and y.finished == (y.ids[-1] in ends) and len(y.ids) == len(y.logps)
        assert y.finished or len(y.ids) == 12
    assert len({y.ids[-1] for y in rollouts if y.finished}) > 2
    assert {y.finished for y in rollouts} == {True, False}


def test_the_beginning_of_a_longer_turn_has_no_eos():
    assert Rollout([7, 8, 5], [0.0] * 3, True).without_eos() == [7, 8]
    assert Rollout([7, 8, 9], [0.0] * 3, False).without_eos() == [7, 8, 9]


def test_a_pad_token_in_a_prompt_is_read_like_any_other(model, sampler):
    """Trap 11: masks come from lengths, not from ids."""
    prompt = [3, 20, toy.make_tokenizer().pad_token_id, 5, 4]
    [alone] = sampler(model, [prompt], KEYS[:1], STREAM, FREE)
    beside, _ = sampler(model, [prompt, PROMPTS[2]], KEYS[:2], STREAM, FREE)
    [without] = sampler(model, [[3, 20, 5, 4]], KEYS[:1], STREAM, FREE)
    same([beside], [alone])
    assert without.logps[0] != pytest.approx(alone.logps[0], abs=1e-3)


def test_equal_prompts_and_each_token_are_read_once(model, sampler, monkeypatch):
    rows, read = [], model.read

    def counted(**inputs):
        rows.append(len(inputs["input_ids"]))
        return read(**inputs)

    monkeypatch.setattr(model, "read", counted)
    rollouts = sampler(model, [PROMPTS[0]] * 6, [(0, sample) for sample in range(6)], STREAM, FREE)
    assert rows[0] == 1 and rows[1:] == [sum(len(y.ids) > t for y in rollouts) for t in range(1, len(rows))]
    assert len(rows) == max(len(y.ids) for y in rollouts)  # nothing is read after the last token


@pytest.mark.parametrize(
    "temperature, top_p, kept",
    [(1.0, 1.0, [0, 1, 3, 4]), (0.5, 1.0, [0, 1, 3, 4]), (1.0, 0.7, [1, 3]), (1.0, 0.6, [1])],
)
def test_draw_follows_its_distribution(temperature, top_p, kept):
    """Frequencies over an even grid of uniform numbers are the probabilities; top-p cuts where it should."""
    z = torch.tensor([0.0, 2.0, -30.0, 1.0, -1.0])
    grid = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    want = torch.full((5,), -torch.inf)
    want[kept] = z[kept] / temperature
    want = want.softmax(0)
    token, logp = draw(z.expand(20000, 5), grid, Sampling(1, temperature, top_p))
    share = torch.bincount(token, minlength=5) / 20000
    assert share.tolist() == pytest.approx(want.tolist(), abs=2e-4)
    assert ((share > 0) == torch.isin(torch.arange(5), torch.tensor(kept))).all()
    assert logp.exp().tolist() == pytest.approx(want[token].tolist(), abs=1e-6)


def test_draw_is_exact_in_a_large_vocabulary():
    """Sums in float32 would move the boundaries between tokens by more than the thousandth tried here."""
    V = 100_003
    place = torch.arange(V - 100, V, 2)
    for offset in (0.001, 0.999):
        token, _ = draw(torch.zeros(len(place), V), (place.double() + offset) / V, FREE)
        assert token.tolist() == place.tolist()


def test_draw_never_leaves_the_support_at_the_edges():
    z = torch.tensor([[-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf]] * 2)
    token, logp = draw(z, torch.tensor([0.0, 1.0 - 2**-53], dtype=torch.float64), FREE)
    assert token.tolist() == [1, 3] and logp.isfinite().all()
    z = torch.randn(500, 50, generator=torch.Generator().manual_seed(0))
    for largest, last in ((1.0 - 2**-53, 49), (1.0 - 2**-40, 48)):
        token, _ = draw(z, torch.full((500,), largest, dtype=torch.float64), FREE)
        assert (token == last).all()
        z[:, -1] = -torch.inf


# The other engine, where it is not installed or does not fit (with it: test_vllm.py).


@pytest.mark.parametrize(
    "version, flags, message",
    [
        (None, "", "--engine vllm needs vLLM: pip install 'vllm>=0.32,<0.33'"),
        ((0, 31, 4), "", "--engine vllm: this is vLLM 0.31.4; pip install 'vllm>=0.32,<0.33'"),
        ((0, 33, 0), "", "--engine vllm: this is vLLM 0.33.0; pip install"),
        ((0, 32, 1), "--engine-tensor-parallel 2", "--engine-tensor-parallel 2 must divide the 1 processes"),
        ((0, 32, 1), "--engine-cache-gib 0", "--engine-cache-gib 0: expected a number above 0"),
    ],
)
def test_an_engine_that_cannot_start_is_refused_before_a_model_loads(version, flags, message, tiny, tmp_path, monkeypatch):
    spec = importlib.util.find_spec

    def find_spec(name, *rest):
        return version if name == "vllm" else spec(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    stub = SimpleNamespace(__version__=".".join(map(str, version or ())), __version_tuple__=version)
    monkeypatch.setitem(sys.modules, "vllm", stub)
    monkeypatch.setattr("sdft.load_model", lambda *args, **more: pytest.fail("a model was loaded first"))
    with pytest.raises(InputError, match=message):
        run_here("sdft", tmp_path / "r", tiny, f"--engine vllm {flags}")
    assert not (tmp_path / "r").exists()


def test_every_optimiser_step_counts_as_a_write():
    """By these counts vLLM's weights are known to be stale; the fused kernel alone does not count."""
    model = torch.nn.Linear(3, 2)
    run = make_run(lr=0.1, adam_betas=(0.9, 0.999), weight_decay=0.0)
    run.optimizer = make_optimizer(model, run.args)
    model(torch.ones(3)).sum().backward()
    before = [p._version for p in model.parameters()]
    assert optimizer_step(run, 0.1) > 0
    assert all(p._version > count for p, count in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("first_process", [True, False])
@pytest.mark.parametrize("sample_batch", [1, 64])
def test_the_bar_counts_the_answers_and_is_shown_by_the_first_process_alone(first_process, model, sample_batch, monkeypatch):
    bars = []

    class Bar(common.tqdm):
        def __init__(self, **options):
            super().__init__(**options)
            self.hidden, self.counted = self.disable, 0  # close() hides it
            bars.append(self)

        def update(self, n=1):
            self.counted += n
            return super().update(n)

    monkeypatch.setattr(common, "tqdm", Bar)
    sampler = Sampler(make_run(sample_batch=sample_batch), model)
    sampler.run.main = first_process
    rollouts = sampler(model, *many(12), STREAM, FREE)
    assert {y.finished for y in rollouts} == {True, False}
    assert [(bar.counted, bar.hidden, bar.leave) for bar in bars] == [(60, not first_process, False)]
