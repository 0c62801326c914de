"""Loading and saving: logits are the model's own, LoRA is added exactly, folders reopen as plain ones."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import make_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from common import (
    InputError,
    Objective,
    Run,
    attention_of,
    check_model,
    completion_states,
    distill_loss,
    full_weights,
    head_of,
    load_model,
    load_tokenizer,
    save_folder,
    token_logps,
    vocabulary_of,
)

IDS = torch.tensor([[3, 20, 21, 22, 5, 4, 30, 31]])
PAIRS = [([3, 20, 21, 5, 4], [30, 31, 5]), ([3, 22, 5, 4], [32, 33, 34, 35, 5])]
FAMILIES = [
    ("qwen3", {}),
    ("qwen3", {"tie_word_embeddings": True}),
    ("llama", {"mlp_bias": True}),
    ("gpt2", {}),
    ("gemma2", {"final_logit_softcapping": 3.0}),
    ("granite", {"logits_scaling": 6.0}),
    ("cohere", {"logit_scale": 0.3}),
    ("qwen3_5", {}),
]


@pytest.fixture
def run(tmp_path):
    args = dict(out=str(tmp_path / "run"), seed=0, dtype="auto", activation_checkpointing=False)
    return Run(SimpleNamespace(**args))


@pytest.fixture
def load(run, tmp_path):
    """A model of this family, loaded; its folder is tmp_path / "m"."""

    def load(family="qwen3", lora_rank=0, **changes):
        return load_model(str(make_model(tmp_path / "m", family, **changes)), run, lora_rank)

    return load


def saved(run, model, name="last", card="card"):
    """The folder that a run saves."""
    run.tokenizer = load_tokenizer(model.source)
    run.out.mkdir(exist_ok=True)
    save_folder(run, model, name, card)
    return run.out / name


def refused(model, why):
    with pytest.raises(InputError, match=f"^--model m is not supported{why}"):
        check_model(model, "--model m")


def disturb_lora(model):
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data.normal_(std=0.2)


@pytest.mark.parametrize("family, changes", FAMILIES)
def test_logits_from_hidden_states_are_the_models_own(family, changes, load):
    """Trap 53: soft-capping (Gemma 2), scaling (Granite, Cohere), tied and untied heads."""
    model = load(family, **changes)
    with torch.no_grad():
        ours = head_of(model).logits(model.base_model(input_ids=IDS, use_cache=False).last_hidden_state[0])
        theirs = model(input_ids=IDS, use_cache=False).logits[0]
    assert torch.allclose(ours, theirs, atol=1e-5) and theirs.std() > 0.01


@pytest.mark.parametrize("lora", [0, 2])
def test_a_head_that_does_something_else_is_refused(lora, load):
    model = load(lora_rank=lora)
    model.lm_head.register_forward_hook(lambda module, args, logits: logits + 0.1 * logits.sin())
    refused(model, ": its logits from hidden states differ by ")


@pytest.mark.parametrize(
    "trouble",
    ["cache", "position_ids"]
    + [AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError],
)
def test_a_model_that_decodes_otherwise_or_not_at_all_is_refused(trouble, load):
    """It drops the cache, counts positions from the padding, or raises an error."""
    model = load("gpt2" if trouble == "position_ids" else "qwen3")  # relative positions forgive a shift
    read, forgets = model.read, isinstance(trouble, str)

    def troubled(**inputs):
        if "cache" in inputs and not forgets:
            raise trouble("a cache of my own\nand more lines")
        if "cache" in inputs and inputs["cache"].get_seq_length():
            inputs.pop(trouble)
            inputs.pop("attention_mask")
        return read(**inputs)

    model.read = troubled
    refused(model, ": its logits with a cache differ by " if forgets else r" \(a cache of my own\)$")


def test_adapters_that_the_saved_folder_would_not_contain_are_refused(load):
    model = load(lora_rank=2)
    layer = model.model.layers[0].mlp.up_proj
    delta = layer.get_delta_weight
    layer.get_delta_weight = lambda name: 0.5 * delta(name)
    refused(model, ": its logits from the folder that would be saved differ by ")


EXPERTS = {"qwen3_moe": 33, "qwen3_next": 48, "mixtral": 11, "gpt_oss": 11, "glm4_moe": 69, "deepseek_v3": 72}


@pytest.mark.parametrize("family", EXPERTS)
def test_adapters_of_a_mixture_of_experts_are_on_its_linear_layers_alone(family, load, tmp_path, capsys):
    """Left to itself peft adapts fused experts and routers, and forgets shared experts and dense layers."""
    model = load(family, 2)
    assert f"LoRA: adapters on {EXPERTS[family]}% of the matrix weights" in capsys.readouterr().out
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "m").named_modules()
    linear = {name for name, m in plain if isinstance(m, torch.nn.Linear) and name != "lm_head"}
    assert linear == {name for name, module in model.named_modules() if hasattr(module, "lora_A")}


@pytest.mark.parametrize("family", ["mamba", "jamba"])
def test_recurrent_models_that_our_cache_or_our_folder_cannot_hold_are_refused(family, load):
    with pytest.raises(InputError, match=r"m: \w+ForCausalLM is not supported"):
        load(family, 2)


def test_a_folder_without_some_weights_is_refused(tmp_path, run):
    """transformers makes random ones up and prints a table."""
    folder = make_model(tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="m: no weights for model.layers.1.mlp.up_proj.weight, which Qwen3"):
        load_model(str(folder), run)
    weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 3)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="m: no model could be loaded"):
        load_model(str(folder), run)


@pytest.mark.parametrize(
    "family, attention", [("gemma2", "eager"), ("qwen3", "sdpa"), ("gpt_oss", "eager"), ("qwen3_5", "sdpa")]
)
def test_attention_on_cuda_is_what_the_model_asks_for(family, attention, tmp_path):
    """SDPA would leave out Gemma 2's soft-cap; gpt-oss, with its sinks, knows it cannot use SDPA."""
    cuda = torch.device("cuda")
    config = AutoConfig.from_pretrained(make_model(tmp_path / "m", family))
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention_of(config, cuda))
    assert model.config._attn_implementation == attention
    within = transformers.Gemma3Config(text_config={"attn_logit_softcapping": 50.0})
    assert attention_of(within, cuda) == "eager"


@pytest.mark.parametrize("lora", [0, 2])
def test_the_text_model_of_a_vision_language_folder_is_trained(lora, tmp_path, run):
    """Qwen3.5 is published as one; what is saved is the text model."""
    plain = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "m", "qwen3_5"))
    vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32)
    config = transformers.Qwen3_5Config(text_config=plain.config.to_dict(), vision_config=vision)
    both = transformers.Qwen3_5ForConditionalGeneration(config)
    both.model.language_model.load_state_dict(plain.model.state_dict())
    both.lm_head.load_state_dict(plain.lm_head.state_dict())
    both.save_pretrained(tmp_path / "m")
    model = load_model(str(tmp_path / "m"), run, lora)
    assert type(model).__name__ == "Qwen3_5ForCausalLM"
    assert torch.allclose(model(IDS).logits, plain(IDS).logits, atol=1e-5)


@pytest.mark.parametrize("lora", [0, 2])
@pytest.mark.parametrize("family, cap", [("Gemma3", None), ("Gemma4", 3.0)])
def test_a_vision_language_folder_is_trained_on_text_and_saved_whole(family, cap, lora, tmp_path, run):
    """The configuration of the text lies within another; what reads images stays untouched."""
    folder = make_model(tmp_path / "m", "gemma2")  # for its tokenizer
    text = AutoConfig.from_pretrained(folder).to_dict()
    text = {key: text[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "head_dim")}
    text |= dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3)
    text["final_logit_softcapping"] = cap
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    vision |= dict(image_size=16, patch_size=8, num_key_value_heads=2, head_dim=8)
    config = getattr(transformers, f"{family}Config")(text_config=text, vision_config=vision)
    getattr(transformers, f"{family}ForConditionalGeneration")(config).save_pretrained(folder)
    before, rows = load_file(folder / "model.safetensors"), vocabulary_of(str(folder))
    model = load_model(str(folder), run, lora)
    completion_states(model, PAIRS).sum().backward()
    disturb = {name for name, p in model.named_parameters() if p.grad is not None}
    assert rows == 89 and disturb and not any("vision" in name for name in disturb)
    disturb_lora(model)
    reopened = AutoModelForCausalLM.from_pretrained(saved(run, model), attn_implementation="eager")
    assert torch.allclose(reopened(IDS).logits, model(IDS).logits, atol=1e-4)
    assert load_file(run.out / "last" / "model.safetensors").keys() == before.keys()


def test_the_check_leaves_adapters_at_zero_and_the_model_as_the_folder_has_it(load, tmp_path):
    model = load(lora_rank=2)
    assert all((p == 0).all() for name, p in model.named_parameters() if "lora_B" in name)
    assert all((p != 0).any() for name, p in model.named_parameters() if "lora_A" in name)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "m").state_dict()
    weights = dict(full_weights(model))
    assert weights.keys() == plain.keys() and all(torch.equal(weights[name], plain[name]) for name in plain)


def test_folders_without_tokenizer_chat_template_or_model_are_refused(tmp_path, run):
    folder = make_model(tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match="no chat template"):
        load_tokenizer(str(folder))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    before = (folder / "config.json").read_text()
    for config in (before, '{"model_type": "wav2vec2"}'):  # of which transformers raises a TypeError
        (folder / "config.json").write_text(config)
        with pytest.raises(InputError, match="m has no tokenizer file"):
            load_tokenizer(str(folder))
    (folder / "config.json").write_text(before)
    with pytest.raises(InputError, match="nowhere: no tokenizer could be loaded"):
        load_tokenizer(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="no model could be loaded"):
        load_model(str(tmp_path / "nowhere"), run)


@pytest.mark.parametrize("lora", [0, 2])
def test_a_bf16_folder_is_trained_in_fp32_without_dropout_and_saved_in_bf16(lora, tmp_path, run):
    """Traps 25 and 29: two passes of a model with dropout are the same."""
    folder = make_model(tmp_path / "m", attention_dropout=0.5)
    AutoModelForCausalLM.from_pretrained(folder).to(torch.bfloat16).save_pretrained(folder)
    model = load_model(str(folder), run, lora)
    weights = load_file(saved(run, model) / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.bfloat16} == {model.config.dtype}
    assert AutoConfig.from_pretrained(run.out / "last").dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_in_bf16_the_weights_under_adapters_stay_as_they_were_saved(family, tmp_path, run):
    """States, gradients and the saved folder are those of float32 copies."""
    folder = make_model(tmp_path / "m", family)
    AutoModelForCausalLM.from_pretrained(folder).to(torch.bfloat16).save_pretrained(folder)
    run.computes_in_bf16 = True
    model = load_model(str(folder), run, 2)
    disturb_lora(model)
    names = {name for name, p in model.named_parameters() if p.dtype == torch.bfloat16}
    assert names == {name for name, p in model.named_parameters() if ".base_layer.weight" in name}
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        for name, p in model.named_parameters():
            p.data = p.data.to(dtype if name in names else torch.float32)
        model.zero_grad()
        h_ND = completion_states(model, PAIRS)
        h_ND.square().sum().backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        found.append([h_ND, *gradients, *(w for _, w in full_weights(model))])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


LLAMA_LAYERS = {f"self_attn.{name}_proj" for name in "qkvo"}
LLAMA_LAYERS |= {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
GPT2_LAYERS = {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}


@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma2", "granite", "cohere", "gpt2"])
def test_lora_trains_adapters_on_all_linear_layers_but_the_head(family, load, capsys):
    """The names are those in checkpoints: a run of an older version resumes only if they stay."""
    model = load(family, 2)
    blocks, layers = ("transformer.h", GPT2_LAYERS) if family == "gpt2" else ("model.layers", LLAMA_LAYERS)
    modules = [f"{blocks}.{i}.{layer}" for i in range(2) for layer in layers]
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == {f"{module}.lora_{side}.default.weight" for module in modules for side in "AB"}
    assert {m.scaling["default"] for m in model.modules() if hasattr(m, "lora_A")} == {2.0}
    assert "LoRA" not in capsys.readouterr().out  # every matrix has adapters


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("lora", [0, 2], ids=["full", "lora"])
@pytest.mark.parametrize("family, tied", [("qwen3", False), ("qwen3", True), ("gpt2", True)])
def test_gradients_with_the_head_used_after_the_forward_are_those_of_one_graph(
    family, tied, lora, checkpointing, load, run
):
    """A tied head adds to the gradient of the embedding; each trained weight gets one, frozen ones none."""
    run.args.activation_checkpointing = checkpointing
    model = load(family, lora, tie_word_embeddings=tied)
    disturb_lora(model)
    y_N = torch.tensor([token for _, y in PAIRS for token in y])
    weight_N, t_NV = torch.linspace(0.2, 1, len(y_N)), torch.randn(len(y_N), 89)
    teacher = [(1.0, t_NV, head_of(model)._replace(weight=torch.eye(89), bias=None))]

    h_ND = completion_states(model, PAIRS)
    divergence, _ = distill_loss(h_ND, head_of(model), teacher, y_N, weight_N, Objective(chunk=3))
    logp_N, _ = token_logps(h_ND, head_of(model), y_N, chunk=3)
    (divergence - (weight_N * logp_N).sum()).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}

    model.zero_grad()
    texts = [(len(prompt), torch.tensor([prompt + y])) for prompt, y in PAIRS]
    z = [model(ids, use_cache=False).logits[0, start - 1 : -1] for start, ids in texts]
    log_p, log_q = torch.cat(z).log_softmax(-1), t_NV.log_softmax(-1)
    each = (log_q.exp() * (log_q - log_p)).sum(-1) - log_p.gather(1, y_N[:, None])[:, 0]
    (weight_N * each).sum().backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(found[name], p.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    "family, lora, changes",
    [("qwen3", 0, {}), ("qwen3", 2, {}), ("llama", 0, {"tie_word_embeddings": True}), ("gemma2", 2, {})]
    + [(family, 2, {}) for family in ("gpt2", "qwen3_5", "falcon_h1", "granite_hybrid", *EXPERTS)],
)
def test_a_saved_folder_reopens_and_generates_the_same_tokens(family, lora, changes, load, run):
    """Trap 55: merging adds into a copy; live weights stay bit for bit. GPT-2's layers are transposed."""
    model = load(family, lora, **changes)
    disturb_lora(model)
    run.files["commands.txt"] = "a file that every folder contains"
    config, before = copy.deepcopy(model.config), copy.deepcopy(model.state_dict())
    saved(run, model, "best", "the old card")
    best = saved(run, model, "best")
    reopened = AutoModelForCausalLM.from_pretrained(best, attn_implementation="eager")
    greedy = GenerationConfig(do_sample=False, max_new_tokens=20, eos_token_id=5, pad_token_id=0)
    theirs, ours = (m.generate(IDS, generation_config=greedy) for m in (reopened, model))
    assert torch.equal(theirs, ours)
    assert torch.allclose(reopened(IDS).logits, model(IDS).logits, atol=1e-4)
    assert AutoTokenizer.from_pretrained(best).chat_template == run.tokenizer.chat_template
    assert (best / "README.md").read_text() == "card" and (best / "commands.txt").exists()
    assert [p.name for p in run.out.iterdir()] == ["best"]
    assert model.config == config  # by which copies of the model are known
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("said", [{"temperature": 0.7}, {"top_p": 0.8, "top_k": 20, "do_sample": False}])
def test_a_generation_config_that_transformers_would_not_write_is_saved(said, tmp_path, run):
    """Sampling parameters beside do_sample = false: such folders load, and must not fail at the end."""
    folder = make_model(tmp_path / "m")
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | said))
    written = saved(run, load_model(str(folder), run)) / "generation_config.json"
    found = json.loads(written.read_text())
    said.pop("do_sample", None)
    assert said.items() <= found.items() and found["do_sample"] is True and found["eos_token_id"] == 5
