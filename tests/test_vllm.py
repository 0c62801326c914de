"""vLLM as the engine, for real, on the CPU: the same distribution, and our weights before every draw."""

import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import JUDGE, checkpoint, flags_of, launch, make_model, metrics_of, part, run_here

pytest.importorskip("vllm")
import toy  # noqa: E402

import common  # noqa: E402
from common import RunError, Sampler, Sampling, VllmSampler, completion_states, head_of  # noqa: E402

TOKENIZER = toy.make_tokenizer()
PROMPTS = [[3, 20, 21, 5, 4], [3, 22, 5, 4], [3, 30, 31, 32, 33, 34, 5, 4], [3, 22, 5, 4], [3, 25, 26, 5, 4]]
KEYS = [(row, 0) for row in range(5)]
MANY = PROMPTS * 12, [(row, sample) for sample in range(12) for row in range(5)]
STREAM = (common.TRAIN_STREAM, 5)
FREE, GREEDY = Sampling(12), Sampling(12, temperature=0.0)


@pytest.fixture(scope="module", autouse=True)
def one_engine_per_shape():
    """Engines start without weights, so runs of one shape may share one: it takes seconds to start."""
    engines, start = {}, common.start_vllm

    def shared(student, run, dtype):
        config = {k: v for k, v in student.config.to_dict().items() if k not in ("_name_or_path", "dtype")}
        key = str((config, dtype, run.args.sample_batch, run.args.engine_cache_gib))
        if key not in engines:
            engines[key] = start(student, run, dtype)
        return engines[key]

    common.start_vllm = shared
    yield
    common.start_vllm = start


def vllm_model(folder, family="qwen3", seed=0, **changes):
    """vLLM has no CPU attention for heads of width 8. What the folder says about sampling is not read."""
    make_model(folder, family, seed, **{"head_dim": 32} | changes)
    file = folder / "generation_config.json"
    said = dict(do_sample=True, top_p=0.33, temperature=0.1, repetition_penalty=2.0)
    file.write_text(json.dumps(json.loads(file.read_text()) | said))
    return folder


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory):
    """conftest's tiny world with models that vLLM can run."""
    folder = tmp_path_factory.mktemp("vllm")
    models = dict(model=vllm_model(folder / "model"), teacher=vllm_model(folder / "teacher", seed=6))
    wide = vllm_model(folder / "wide", seed=6, vocab_size=len(TOKENIZER) + 40)
    return SimpleNamespace(**models, wide=wide, data=tiny.data, eval=tiny.eval)


def make_run(**changes):
    args = dict(out="/nowhere", dtype="auto", seed=3, sample_batch=64, activation_checkpointing=False)
    args |= dict(engine="vllm", engine_cache_gib=0.25, engine_tensor_parallel=1)
    run = common.Run(SimpleNamespace(**args | changes), TOKENIZER)
    common.check_engine(run.args, 1)
    return run


def load(folder, lora_rank=0, **changes):
    run = make_run(**changes)
    student = common.load_model(str(folder), run, lora_rank)
    return student, VllmSampler(run, student)


@pytest.fixture
def loaded(world):
    return load(world.model)


@torch.no_grad()
def forced(model, prompt, y, temperature=1.0):
    """Log-probs of y from our own pass over prompt and y together."""
    z_NV = head_of(model).logits(completion_states(model, [(prompt, y)])) / temperature
    return z_NV.log_softmax(-1).gather(1, torch.tensor(y)[:, None])[:, 0].tolist()


def greedy(model, sampler):
    return sampler(model, PROMPTS, KEYS, STREAM, GREEDY)


@torch.no_grad()
def move(model, names="", size=0.05):
    """Adds noise to the weights whose name contains `names`, as an optimiser would: in place."""
    torch.manual_seed(1)
    moved = [p for name, p in model.named_parameters() if names in name and p.requires_grad]
    for p in moved:
        p.add_(size * torch.randn_like(p))
    assert moved


def agree(model, rollouts, prompts=PROMPTS, temperature=1.0, gap=1e-4):
    """Their log-probs are those of our own pass."""
    for prompt, y in zip(prompts, rollouts, strict=True):
        assert y.logps == pytest.approx(forced(model, prompt, y.ids, temperature), abs=gap)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
def test_logps_are_those_of_the_tempered_policy(loaded, temperature):
    """Trap 39: they equal our own pass at the same temperature, so on-policy ratios are 1."""
    model, sampler = loaded
    rollouts = sampler(model, PROMPTS, KEYS, STREAM, Sampling(12, temperature))
    agree(model, rollouts, temperature=temperature or 1.0)
    if temperature == 0:
        other = greedy(model, Sampler(sampler.run, model))
        assert [(y.ids, y.finished) for y in rollouts] == [(y.ids, y.finished) for y in other]


def test_a_rollout_is_the_same_alone_and_in_any_batch(loaded):
    """Seeds belong to (seed, stream, row, sample): neither batch nor number of processes matters."""
    model, sampler = loaded
    prompts, keys = MANY
    together = sampler(model, prompts, keys, STREAM, FREE)
    equal = [y for y, prompt in zip(together, prompts, strict=True) if prompt == PROMPTS[1]]
    assert len(equal) == 24 and len({tuple(y.ids) for y in equal}) > 18
    for i in (14, 7, 0):
        [alone] = sampler(model, [prompts[i]], [keys[i]], STREAM, FREE)
        assert alone.ids == together[i].ids
        assert alone.logps == pytest.approx(together[i].logps, abs=1e-5)
    other = sampler(model, prompts, keys, (common.TRAIN_STREAM, 6), FREE)
    assert [y.ids for y in other] != [y.ids for y in together]
    assert sampler(model, [], [], STREAM, FREE) == []


def test_more_prompts_than_one_batch_holds(loaded):
    """30 of 300 tokens: vLLM reads 4096 at once; a seeded request whose prompt is cut there fails on CPU."""
    model, sampler = loaded
    prompts = [[3, 20 + i, *[21 + (i + t) % 60 for t in range(298)]] for i in range(30)]
    agree(model, sampler(model, prompts, [(i, 0) for i in range(30)], STREAM, FREE), prompts)


def test_tokens_have_their_probabilities(loaded):
    """Shares of 2000 first tokens, each within four standard errors; top-p cuts where it should."""
    model, sampler = loaded
    with torch.no_grad():
        p_V = head_of(model).logits(completion_states(model, [(PROMPTS[0], [0])])).softmax(-1)[0]
    prompts, keys = [PROMPTS[0]] * 2000, [(0, sample) for sample in range(2000)]
    drawn = sampler(model, prompts, keys, STREAM, Sampling(1))
    share_V = torch.bincount(torch.tensor([y.ids[0] for y in drawn]), minlength=len(p_V)) / 2000
    assert ((share_V - p_V).abs() <= 4 * (p_V * (1 - p_V) / 2000).sqrt() + 1e-3).all()
    sorted_V, order = p_V.sort(descending=True)
    nucleus = order[: 1 + int((sorted_V.cumsum(0) < 0.5).sum())]
    drawn = sampler(model, prompts, keys, STREAM, Sampling(1, top_p=0.5))
    assert {y.ids[0] for y in drawn} == set(nucleus.tolist())
    first = drawn[0].ids[0]
    assert drawn[0].logps == pytest.approx([(p_V[first] / p_V[nucleus].sum()).log().item()], abs=1e-4)


def test_any_eos_ends_a_completion_and_stays_in_it(world):
    """Traps 12 and 13."""
    model, sampler = load(world.model)
    ends = set(range(5, 24, 2))
    sampler.eos = torch.tensor(sorted(ends))
    rollouts = sampler(model, *MANY, STREAM, FREE)
    for y in rollouts:
        assert not ends & set(y.ids[:-1]) and y.finished == (y.ids[-1] in ends) and len(y.ids) == len(y.logps)
        assert y.finished or len(y.ids) == 12
    assert len({y.ids[-1] for y in rollouts if y.finished}) > 2
    assert {y.finished for y in rollouts} == {True, False}


PARTS = ["layers.1.mlp", "layers.0.self_attn", "embed_tokens", "norm.weight"]


@pytest.mark.parametrize(
    "family, tied, parts",
    [("qwen3", False, [*PARTS, "lm_head"]), ("qwen3", False, ["lora_"])]
    + [(family, True, PARTS) for family in ("qwen3", "llama", "gemma2")],
)
def test_each_part_of_the_model_reaches_the_engine(family, tied, parts, tmp_path):
    """Trap 42: one part moves at a time; vLLM's greedy answers and log-probs follow, the tied head's too.

    Trap 55: adapters are merged on the way, and the weights they belong to stay as they are."""
    lora_rank = 2 if parts == ["lora_"] else 0
    model, sampler = load(vllm_model(tmp_path / "m", family, tie_word_embeddings=tied), lora_rank)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    before = greedy(model, sampler)
    for weights in parts:
        move(model, weights, size={"norm.weight": 0.5, "lora_": 0.3}.get(weights, 0.1))
        now = greedy(model, sampler)
        assert [y.logps for y in now] != [y.logps for y in before], weights
        agree(model, now, gap=1e-3)
        before = now
    assert all(torch.equal(p, model.get_parameter(name)) for name, p in frozen.items())


def test_weights_are_handed_over_only_when_they_moved(loaded, monkeypatch):
    model, sampler = loaded
    handed, weights = [], VllmSampler.weights

    def counted(self, model):
        handed.append(1)
        return weights(self, model)

    monkeypatch.setattr(VllmSampler, "weights", counted)
    greedy(model, sampler)
    at = len(handed)
    greedy(model, sampler)
    assert len(handed) == at
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, foreach=True)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    greedy(model, sampler)
    assert len(handed) == at + 1


def test_the_prefix_cache_does_not_outlive_the_weights(loaded, monkeypatch):
    """A prompt of several blocks: nothing of the old weights is read again, even without sleep."""
    model, sampler = loaded
    sampler.llm.wake_up()
    monkeypatch.setattr(sampler.llm, "sleep", lambda level: None)
    monkeypatch.setattr(sampler.llm, "wake_up", lambda: None)
    prompts = [[3] + [20 + i % 50 for i in range(300)]] * 2
    sampler(model, prompts, KEYS[:2], STREAM, GREEDY)
    move(model)
    agree(model, sampler(model, prompts, KEYS[:2], STREAM, GREEDY), prompts, gap=1e-3)


STALE = r"vLLM: its weights are not ours: log-probs of a fixed text differ by [\d.e-]+"
RESUME = "; rerun the same command with --resume$"


def test_a_skipped_sync_is_caught(loaded):
    """torch does not count a write through .data: nothing is handed over, and the fixed text tells."""
    model, sampler = loaded
    greedy(model, sampler)
    for p in model.parameters():
        p.data += 0.01
    with pytest.raises(RunError, match=f"^{STALE}{RESUME}"):
        greedy(model, sampler)
    sampler.held = []
    greedy(model, sampler)


def test_bfloat16(world):
    """The engine computes in the dtype of our forward passes; the gap is that of bf16, within its limit."""
    model, sampler = load(world.model, dtype="bfloat16")
    gaps = []
    for prompt, y in zip(MANY[0], sampler(model, *MANY, STREAM, FREE), strict=True):
        gaps += [abs(a - b) for a, b in zip(y.logps, forced(model, prompt, y.ids), strict=True)]
    assert 1e-4 < sum(gaps) / len(gaps) < common.LARGEST_GAP["bfloat16"]
    move(model, size=0.2)
    sampler.sync = lambda model: None
    with pytest.raises(RunError, match=STALE):
        greedy(model, sampler)


def test_a_model_of_another_shape_answers_with_transformers(loaded, tmp_path):
    model, sampler = loaded
    other = common.load_model(str(vllm_model(tmp_path / "m", num_hidden_layers=1)), sampler.run)
    ours = Sampler(sampler.run, other)(other, PROMPTS, KEYS, STREAM, FREE)
    assert sampler(other, PROMPTS, KEYS, STREAM, FREE) == ours


def test_a_copy_of_the_student_is_sampled_by_vllm_after_a_folder_was_saved_too(loaded, tmp_path, monkeypatch):
    """A teacher that was copied before still has the student's config after it."""
    model, sampler = loaded
    teacher = common.Teacher("ema", 0.1, model, sampler.run).model
    sampler.run.out = tmp_path
    common.save_folder(sampler.run, model, "best", "card")
    move(model)
    monkeypatch.setattr(Sampler, "__call__", lambda *args: pytest.fail("the other engine was asked"))
    agree(teacher, greedy(teacher, sampler))


@pytest.fixture
def judge(tmp_path):
    (tmp_path / "judge.py").write_text(JUDGE)
    return f"--verifier {tmp_path}/judge.py:judge"


@pytest.mark.parametrize(
    "script, flags, drawn_by_the_student",
    [
        ("sdft", "--is-cap 2", True),
        ("sdft", "--lora-rank 2", True),
        ("sdft", "--generate-from teacher --is-cap 0 --ema-rate 0.5", False),
        ("sdpo", "--is-cap 2", True),
        ("sdpo", "--mini-batch 4 --policy-weight 1", True),
        ("srt", "", None),  # its rollouts come before any training
        ("sdzero", "", True),
        ("distill", "", True),
        ("distill", "--mini-batch 4 --objective policy_gradient", True),
        ("distill", "--teacher {wide}", True),  # heads padded to different sizes
        ("distill", "--lmbda 0 --outputs teacher", False),
    ],
)
def test_scripts_train_on_what_vllm_draws(script, flags, drawn_by_the_student, world, judge, tmp_path):
    """The gap stays below 1e-3, and the ratio at 1, at every step and after every update."""
    flags = flags.format(wide=world.wide)
    rows = run_here(script, tmp_path / "r", world, f"--engine vllm {judge} {flags}")[1:]
    assert len(rows) == 3 and all(row["train/grad_norm"] > 0 for row in rows)
    for row in rows:
        if drawn_by_the_student:
            assert 0 < row["rollout/logp_gap_mean"] <= row["rollout/logp_gap_max"] < 1e-3
        elif drawn_by_the_student is False:
            assert row["rollout/logp_gap_max"] == 0
        if drawn_by_the_student and "--mini-batch" not in flags:
            assert row["distill/is_ratio_mean"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("name, call", [("draw", 4), ("draw", 5), ("sync", 4)])
def test_trouble_inside_vllm_is_one_sentence_and_the_run_resumes(name, call, world, tmp_path, monkeypatch):
    """Out of memory at the draw of step 3 or the evaluation after it, or a sync left out.

    The resumed run equals a whole one. The first call is the evaluation before training."""
    flags = "--engine vllm --steps 5 --eval-every 3 --eval-temperature 1 --save-every 2"
    run_here("sdft", tmp_path / "whole", world, flags)
    method, calls = getattr(VllmSampler, name), itertools.count(1)

    def failing(*args):
        if next(calls) != call:
            return method(*args)
        if name == "draw":
            raise torch.OutOfMemoryError("out of memory. Tried to allocate 7 GiB\nand more lines")

    message = STALE if name == "sync" else "vLLM: out of memory. Tried to allocate 7 GiB"
    with monkeypatch.context() as patch, pytest.raises(RunError, match=f"^{message}{RESUME}"):
        patch.setattr(VllmSampler, name, failing)
        run_here("sdft", tmp_path / "cut", world, flags)
    assert [p.name for p in (tmp_path / "cut" / "checkpoints").iterdir()] == ["step-00000002"]
    run_here("sdft", tmp_path / "cut", world, flags + " --resume")
    a, b = (part(checkpoint(tmp_path / name, 5), "student") for name in ("whole", "cut"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_an_answer_longer_than_the_cache_is_not_cut_in_silence(loaded):
    model, sampler = loaded
    with pytest.raises(RunError, match="^vLLM: it holds 512 tokens per sequence; raise --engine-cache-gib"):
        sampler(model, [[3] * 501], KEYS[:1], STREAM, FREE)


def test_what_vllm_cannot_do_is_one_sentence(tiny, world, tmp_path):
    message = "^vLLM: Unsupported CPU attention configuration: head_dim=8.*"
    with pytest.raises(RunError, match=message + RESUME):
        run_here("sdft", tmp_path / "width", tiny, "--engine vllm")
    with pytest.raises(RunError, match="^vLLM did not start: .*memory.*" + RESUME):
        run_here("sdft", tmp_path / "cache", world, "--engine vllm --engine-cache-gib 1e-7")


@pytest.mark.parametrize("script, more, tensor_parallel", [("sdft", "--lora-rank 2", 1), ("sdpo", "", 2)])
def test_two_processes_draw_the_same_as_one(script, more, tensor_parallel, world, judge, tmp_path):
    """Each with its own engine, or both with halves of one; no traceback is printed at the end."""
    flags = f"--engine vllm --steps 2 {judge} {more}"
    one = run_here(script, tmp_path / "1", world, flags)
    flags = flags_of(script, tmp_path / "2", world, f"{flags} --engine-tensor-parallel {tensor_parallel}")
    done = launch(f"{script}.py {flags}", processes=2)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    for a, b in zip(one, metrics_of(tmp_path / "2"), strict=True):
        keys = {k for k in a | b if not k.startswith(("time/", "memory/", "rollout/logp_gap"))}
        assert {k: a[k] for k in keys} == {k: pytest.approx(b[k], rel=1e-4, abs=1e-6) for k in keys}
