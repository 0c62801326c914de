"""vLLM as the engine, for real, on the CPU: the same distribution, our weights before every draw, and an end with a checkpoint when not."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import checkpoint, flags_of, launch, make_model, metrics_of, part, run_here

pytest.importorskip("vllm")
import common  # noqa: E402
import toy  # noqa: E402
from common import InputError, Run, RunError, Sampler, VllmSampler, load_model, on_completions  # noqa: E402

TOKENIZER = toy.make_tokenizer()
ARGS = dict(out="/nowhere", seed=3, max_completion_tokens=12, sample_batch=64, dtype="auto", engine="vllm", engine_cache_gib=0.25,
            engine_tensor_parallel=1)
PROMPTS = [[3, 20, 21, 5, 4], [3, 22, 5, 4], [3, 30, 31, 32, 33, 34, 5, 4], [3, 22, 5, 4], [3, 25, 26, 5, 4]]
SCRIPTS = ["sdft", "sdpo", "srt", "sdzero", "distill"]
JUDGE = "def judge(completion, row):\n    n = sum(map(ord, completion)) % 4\n    return (float(n == 0), f'4:{n % 10};')\n"


@pytest.fixture(scope="module", autouse=True)
def one_engine_per_shape():
    """Engines start without weights, so runs of one shape may share one: it takes seconds to start."""
    engines, start = {}, common.start_vllm
    def shared(student, run, rows, dtype):
        key = ({k: v for k, v in student.config.to_dict().items() if k != "_name_or_path"}, rows, dtype, run.args.sample_batch, run.args.engine_cache_gib)
        if str(key) not in engines:
            engines[str(key)] = start(student, run, rows, dtype)
        return engines[str(key)]
    common.start_vllm = shared
    yield
    common.start_vllm = start


def vllm_model(folder, family="qwen3", seed=0, **changes):
    """vLLM has no CPU attention for heads of width 8. What the folder says about sampling must not be read (trap 41)."""
    make_model(folder, family, seed, **{"head_dim": 32} | changes)
    said = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(said | {"do_sample": True, "top_p": 0.33, "temperature": 0.1, "repetition_penalty": 2.0}))
    return folder


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory):
    """conftest's tiny world with models that vLLM can run."""
    folder = tmp_path_factory.mktemp("vllm")
    return SimpleNamespace(model=vllm_model(folder / "model"), teacher=vllm_model(folder / "teacher", seed=6), data=tiny.data, eval=tiny.eval)


def load(folder, lora_rank=0, **changes):
    run = Run(SimpleNamespace(**ARGS | changes))
    common.check_engine(run.args, 1)
    student = load_model(str(folder), run, lora_rank)
    return student, VllmSampler(TOKENIZER, student, run)


@pytest.fixture
def loaded(world):
    return load(world.model)


def forced(model, prompt, y, temperature=1.0):
    with torch.no_grad():
        logps = on_completions(model, [(prompt, y)], SimpleNamespace(**ARGS), lambda h, head: (head.logits(h) / temperature).log_softmax(-1))
    return logps.gather(1, torch.tensor(y)[:, None])[:, 0].tolist()


def move(model, names="", size=0.05):
    """Adds noise to the weights whose name contains `names`, as an optimiser would: in place."""
    torch.manual_seed(1)
    moved = [p for name, p in model.named_parameters() if names in name and p.requires_grad]
    with torch.no_grad():
        for p in moved:
            p.add_(size * torch.randn_like(p))
    assert moved


# ---- The same distribution

@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
def test_logps_are_those_of_the_tempered_policy(loaded, temperature):
    """Trap 39: they equal a teacher-forced pass at the same temperature, so on-policy ratios are 1."""
    model, sampler = loaded
    for prompt, [y] in zip(PROMPTS, sampler(model, PROMPTS, [0, 1, 2, 3, 4], 1, (1,), temperature=temperature)):
        assert y.logps == pytest.approx(forced(model, prompt, y.ids, temperature or 1.0), abs=1e-4)


def test_greedy_equals_the_other_engine(loaded):
    model, sampler = loaded
    ours = Sampler(TOKENIZER, model, SimpleNamespace(**ARGS))(model, PROMPTS, [0] * 5, 1, (1,), temperature=0.0)
    theirs = sampler(model, PROMPTS, [0] * 5, 1, (1,), temperature=0.0)
    assert [y.ids for [y] in theirs] == [y.ids for [y] in ours] and [y.finished for [y] in theirs] == [y.finished for [y] in ours]


def test_a_rollout_is_the_same_alone_and_in_any_batch(loaded):
    """Seeds belong to (seed, stream, row, sample): neither the company nor the number of processes matters, and a run is repeatable."""
    model, sampler = loaded
    together = sampler(model, PROMPTS, [0, 1, 2, 3, 4], 3, (1, 5), temperature=1.0)
    assert len({tuple(y.ids) for y in together[1] + together[3]}) == 6                 # the same prompt, two rows
    for i in (4, 2):
        for s in (2, 0):
            [alone] = sampler.each(model, [PROMPTS[i]], [(i, s)], (1, 5), temperature=1.0)
            assert alone.ids == together[i][s].ids and alone.logps == pytest.approx(together[i][s].logps, abs=1e-5)
    assert [y.ids for y in sampler(model, PROMPTS, [0, 1, 2, 3, 4], 3, (1, 6), temperature=1.0)[0]] != [y.ids for y in together[0]]
    assert sampler.each(model, [], [], (1, 5), temperature=1.0) == []


def test_more_prompts_than_one_batch_holds(loaded):
    """30 of 300 tokens: vLLM reads 4096 at once, and on CPU would break at a seeded request whose prompt is cut there."""
    model, sampler = loaded
    prompts = [[3, 20 + i, *[21 + (i + t) % 60 for t in range(298)]] for i in range(30)]
    for prompt, [y] in zip(prompts, sampler(model, prompts, list(range(30)), 1, (1,), temperature=1.0)):
        assert y.logps == pytest.approx(forced(model, prompt, y.ids), abs=1e-4)


def test_tokens_have_their_probabilities(loaded):
    """Of 2000 first tokens, each within four standard errors; a top-k cuts where it should."""
    model, sampler = loaded
    with torch.no_grad():
        p_V = on_completions(model, [(PROMPTS[0], [0])], SimpleNamespace(**ARGS), lambda h, head: head.logits(h).softmax(-1))[0]
    first = lambda **how: torch.bincount(torch.tensor([y.ids[0] for y in sampler(model, [PROMPTS[0]], [0], 2000, (9,), temperature=1.0, **how)[0]]),
                                         minlength=len(p_V)) / 2000
    assert ((first() - p_V).abs() <= 4 * (p_V * (1 - p_V) / 2000).sqrt() + 1e-3).all()
    assert set(first(top_k=3).nonzero()[:, 0].tolist()) == set(p_V.topk(3).indices.tolist())


def test_any_eos_ends_a_completion_and_stays_in_it(world):
    """Traps 12 and 13."""
    model, sampler = load(world.model)
    sampler.eos = torch.tensor([5, 7, 9, 11, 13, 15, 17, 19, 21, 23])
    ends = set(sampler.eos.tolist())
    rollouts = [y for group in sampler(model, PROMPTS, [0, 1, 2, 3, 4], 12, (1,), temperature=1.0) for y in group]
    for y in rollouts:
        assert not ends & set(y.ids[:-1]) and y.finished == (y.ids[-1] in ends) and len(y.ids) == len(y.logps)
        assert y.finished or len(y.ids) == 12
    assert len({y.ids[-1] for y in rollouts if y.finished}) > 2 and {y.finished for y in rollouts} == {True, False}


# ---- Our weights, always

@pytest.mark.parametrize("family, changes", [("qwen3", {}), ("qwen3", {"tie_word_embeddings": True}), ("llama", {"tie_word_embeddings": True}),
                                             ("gemma2", {"tie_word_embeddings": True})], ids=["untied", "tied", "llama-tied", "gemma2-tied"])
def test_each_part_of_the_model_reaches_the_engine(family, changes, tmp_path):
    """Trap 42: one part moves at a time; vLLM's greedy answers and their log-probs follow, the tied head's too."""
    model, sampler = load(vllm_model(tmp_path / "m", family, **changes))
    before = sampler(model, PROMPTS, [0] * 5, 1, (1,), temperature=0.0)
    for weights in ("layers.1.mlp", "layers.0.self_attn", "embed_tokens", "norm.weight", "" if changes else "lm_head"):
        move(model, weights, size=0.5 if "norm" in weights else 0.1)
        now = sampler(model, PROMPTS, [0] * 5, 1, (1,), temperature=0.0)
        assert [y.logps for [y] in now] != [y.logps for [y] in before], weights
        for prompt, [y] in zip(PROMPTS, now):
            assert y.logps == pytest.approx(forced(model, prompt, y.ids), abs=1e-3), weights
        before = now


def test_adapters_are_merged_on_the_way(world):
    model, sampler = load(world.model, lora_rank=2)
    before = sampler(model, PROMPTS, [0] * 5, 1, (1,), temperature=0.0)
    weights = {name: w.clone() for name, w in model.state_dict().items() if "lora_" not in name}
    move(model, "lora_", size=0.3)
    for prompt, [y], [old] in zip(PROMPTS, sampler(model, PROMPTS, [0] * 5, 1, (1,), temperature=0.0), before):
        assert y.logps == pytest.approx(forced(model, prompt, y.ids), abs=1e-3) != old.logps
    assert all(torch.equal(w, model.state_dict()[name]) for name, w in weights.items())                      # trap 55


def test_weights_are_handed_over_only_when_they_moved(loaded, monkeypatch):
    model, sampler = loaded
    handed, weights = [], VllmSampler.weights
    monkeypatch.setattr(VllmSampler, "weights", lambda self, m: (handed.append(1), weights(self, m))[1])
    draw = lambda: sampler(model, PROMPTS, [0] * 5, 1, (1,), temperature=0.0)
    draw()
    at = len(handed)
    draw()
    assert len(handed) == at
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, foreach=True)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    draw()
    assert len(handed) == at + 1


def test_the_prefix_cache_does_not_outlive_the_weights(loaded, monkeypatch):
    """A prompt of several blocks, asked before and after: what was computed with the old weights is not read again, even without sleep."""
    model, sampler = loaded
    sampler.llm.wake_up()
    monkeypatch.setattr(sampler.llm, "sleep", lambda level: None)
    monkeypatch.setattr(sampler.llm, "wake_up", lambda: None)
    prompt = [3] + [20 + i % 50 for i in range(300)]
    sampler(model, [prompt], [0], 2, (1,), temperature=0.0)
    move(model)
    [[y, _]] = sampler(model, [prompt], [0], 2, (1,), temperature=0.0)
    assert y.logps == pytest.approx(forced(model, prompt, y.ids), abs=1e-3)


def test_a_skipped_sync_is_caught(loaded):
    """torch does not count a write through .data: nothing is handed over, and the fixed text tells."""
    model, sampler = loaded
    sampler(model, PROMPTS, [0] * 5, 1, (1,), temperature=0.0)
    for p in model.parameters():
        p.data += 0.01
    with pytest.raises(RunError, match=r"vLLM: its weights are not ours: of the fixed text, token \d+ at place \d+ has log-prob -[\d.]+ there and "
                                       r"-[\d.]+ here, the mean gap is [\d.]+ and 0.0001 is allowed; the run stands after step 0"):
        sampler(model, PROMPTS, [0] * 5, 1, (1,), temperature=0.0)
    sampler.held = []
    sampler(model, PROMPTS, [0] * 5, 1, (1,), temperature=0.0)


def test_bfloat16(world):
    """The engine computes in the dtype of the trainer's forward passes; the gap is that of bf16, and within its limit."""
    model, sampler = load(world.model, dtype="bfloat16")
    rollouts = sampler(model, PROMPTS, [0, 1, 2, 3, 4], 4, (1,), temperature=1.0)
    gaps = [abs(a - b) for prompt, group in zip(PROMPTS, rollouts) for y in group for a, b in zip(y.logps, forced(model, prompt, y.ids))]
    assert 1e-4 < sum(gaps) / len(gaps) < common.LARGEST_GAP["bfloat16"]
    move(model, size=0.2)
    sampler.sync = lambda model: None
    with pytest.raises(RunError, match="its weights are not ours.* 0.05 is allowed"):
        sampler(model, PROMPTS, [0] * 5, 1, (1,), temperature=0.0)


def test_a_model_of_another_shape_answers_with_transformers(loaded, world, tmp_path):
    model, sampler = loaded
    other = load_model(str(vllm_model(tmp_path / "m", num_hidden_layers=1)), sampler.run)
    ours = Sampler(TOKENIZER, other, SimpleNamespace(**ARGS))(other, PROMPTS, [0] * 5, 2, (1,), temperature=1.0)
    assert sampler(other, PROMPTS, [0] * 5, 2, (1,), temperature=1.0) == ours


# ---- Whole runs

@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_trains_on_what_vllm_draws(script, world, tmp_path):
    """rollout/logp_gap <= 1e-3 and ratio 1 +- 1e-3, at every step and after every update."""
    (tmp_path / "judge.py").write_text(JUDGE)
    flags = f"--engine vllm --verifier {tmp_path}/judge.py:judge {'' if script == 'srt' else '--is-cap 2'}"
    rows = run_here(script, tmp_path / "r", world, flags)[1:]
    assert len(rows) == 3 and all(row["train/grad_norm"] > 0 for row in rows)
    if script == "srt":                                      # its rollouts come before any training
        return
    for row in rows:
        assert 0 < row["rollout/logp_gap_mean"] <= row["rollout/logp_gap_max"] < 1e-3 and row["distill/is_ratio_mean"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("script, flags", [
    ("sdft", "--lora-rank 2"), ("sdft", "--generate-from teacher --is-cap 0 --ema-rate 0.5"), ("sdpo", "--mini-batch 4 --policy-weight 1"),
    ("distill", "--mini-batch 4 --objective policy_gradient"), ("distill", "--lmbda 0.5 --outputs teacher")])
def test_other_ways_to_train(script, flags, world, tmp_path):
    (tmp_path / "judge.py").write_text(JUDGE)
    rows = run_here(script, tmp_path / "r", world, f"--engine vllm --verifier {tmp_path}/judge.py:judge {flags}")[1:]
    assert all(row["train/grad_norm"] > 0 and row.get("rollout/logp_gap_max", 0) < 1e-3 for row in rows)
    gapless = [row["step"] for row in rows if "rollout/logp_gap_max" not in row]
    assert gapless == ([1, 2, 3] if "teacher --is-cap" in flags else [row["step"] for row in rows if row.get("distill/on_policy") == 0])


def test_heads_padded_to_different_sizes(world, tmp_path):
    """The student's rows beyond the teacher's exist neither in the loss nor in vLLM."""
    student = vllm_model(tmp_path / "student", vocab_size=len(TOKENIZER) + 40)
    rows = run_here("distill", tmp_path / "r", world, f"--engine vllm --model {student}")[1:]
    assert all(row["rollout/logp_gap_max"] < 1e-3 for row in rows)


def test_stale_weights_show_and_the_cap_bites(world, tmp_path, monkeypatch):
    """Weights handed over once, and no limit that stops the run: the gap grows, and ratios above the cap are cut."""
    monkeypatch.setitem(common.LARGEST_GAP, "float32", 1e9)
    sync = VllmSampler.sync
    monkeypatch.setattr(VllmSampler, "sync", lambda self, model: None if self.held else sync(self, model))
    capped, free = (run_here("sdft", tmp_path / f"cap{cap}", world, f"--engine vllm --is-cap {cap} --lr 3e-3")[1:] for cap in (1.01, 1000))
    assert capped[0]["rollout/logp_gap_max"] < 1e-3 and capped[0]["distill/is_ratio_mean"] == pytest.approx(1, abs=1e-3)
    for row in capped[1:]:
        assert row["rollout/logp_gap_max"] > 0.1 and row["distill/is_ratio_mean"] < 0.99
    assert free[1]["distill/is_ratio_mean"] > capped[1]["distill/is_ratio_mean"] + 0.01


@pytest.mark.parametrize("when", ["draw", "evaluation", "stale"])
def test_trouble_inside_vllm_leaves_a_checkpoint_and_one_sentence(when, world, tmp_path, monkeypatch):
    """Out of memory at the draw of step 4 or at the evaluation after step 3, or a sync that is left out: the run goes on as if it had not been."""
    flags = "--engine vllm --steps 5 --eval-every 3 --eval-temperature 1 --save-every 10"
    whole = run_here("sdft", tmp_path / "whole", world, flags)
    draw, sync = VllmSampler.draw, VllmSampler.sync
    def dying(self, prompts, keys, stream, *how):
        if (stream == (common.TRAIN_STREAM, 4) and when == "draw") or (stream[0] == common.EVAL_STREAM and self.run.done and when == "evaluation"):
            raise torch.OutOfMemoryError("out of memory. Tried to allocate 7 GiB\nand more lines")
        return draw(self, prompts, keys, stream, *how)
    message = "vLLM: out of memory. Tried to allocate 7 GiB" if when != "stale" else "vLLM: its weights are not ours: .*"
    with monkeypatch.context() as patch:
        patch.setattr(VllmSampler, "draw", dying)
        patch.setattr(VllmSampler, "sync", lambda self, model: None if when == "stale" and self.run.done == 3 else sync(self, model))
        patch.setattr("sys.argv", ["sdft.py", "--preset", "toy"])
        with pytest.raises(RunError, match=f"^{message}; the run stands after step 3, go on with: python sdft.py --preset toy --resume$"):
            run_here("sdft", tmp_path / "cut", world, flags)
    assert [p.name for p in (tmp_path / "cut" / "checkpoints").iterdir()] == ["step-00000003"]
    run_here("sdft", tmp_path / "cut", world, flags + " --resume")
    a, b = (part(checkpoint(tmp_path / name, 5), "student") for name in ("whole", "cut"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) and len(whole) == 6


def test_an_answer_longer_than_the_cache_is_not_cut_in_silence(loaded):
    model, sampler = loaded
    with pytest.raises(RunError, match="it holds 512 tokens of a sequence and 513 are needed; raise --engine-cache-gib"):
        sampler(model, [[3] * 501], [0], 1, (1,), temperature=1.0)


def test_what_vllm_cannot_do_is_one_sentence(tiny, world, tmp_path):
    with pytest.raises(RunError, match="^vLLM: Unsupported CPU attention configuration: head_dim=8.*; the run stands after step 0"):
        run_here("sdft", tmp_path / "width", tiny, "--engine vllm")
    with pytest.raises(RunError, match="^vLLM did not start: .*memory"):
        run_here("sdft", tmp_path / "cache", world, "--engine vllm --engine-cache-gib 1e-7")


@pytest.mark.parametrize("script, more, tensor_parallel", [("sdft", "--lora-rank 2", 1), ("sdpo", "", 2)])
def test_two_processes_draw_the_same_as_one(script, more, tensor_parallel, world, tmp_path):
    """Each with its own engine, or both with halves of one; nothing but the sentence of success is printed at the end."""
    (tmp_path / "judge.py").write_text(JUDGE)
    flags = f"--engine vllm --steps 2 --verifier {tmp_path}/judge.py:judge {more}"
    one = run_here(script, tmp_path / "1", world, flags)
    done = launch(f"{script}.py {flags_of(script, tmp_path / '2', world, flags + f' --engine-tensor-parallel {tensor_parallel}')}", processes=2)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    for a, b in zip(one, metrics_of(tmp_path / "2"), strict=True):
        keys = {k for k in a | b if not k.startswith(("time/", "memory/", "rollout/logp_gap"))}
        assert {k: a[k] for k in keys} == {k: pytest.approx(b[k], rel=1e-4, abs=1e-6) for k in keys}


@pytest.mark.parametrize("script", ["sdft", "sdpo", "sdzero", "distill"])
def test_a_ratio_with_truncated_sampling_is_refused(script, world, tmp_path):
    """Trap 39; GRPO has a ratio of its own."""
    for truncated in ("--top-p 0.9", "--top-k 5"):
        with pytest.raises(InputError, match="--is-cap"):
            run_here(script, tmp_path / "r", world, f"--engine vllm --is-cap 2 {truncated}")
        if script == "sdpo":
            with pytest.raises(InputError, match="--policy-weight"):
                run_here(script, tmp_path / "r", world, f"--engine vllm --is-cap 0 --policy-weight 0.5 {truncated}")
