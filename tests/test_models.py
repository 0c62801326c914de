"""Loading and saving: logits are the model's own, LoRA is added exactly, folders reopen as any Hugging Face folder."""

import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from common import InputError, Run, check_head, full_weights, head_of, load_model, load_tokenizer, save_folder

IDS = torch.tensor([[3, 20, 21, 22, 5, 4, 30, 31]])


@pytest.fixture
def run(tmp_path):
    return Run(SimpleNamespace(out=str(tmp_path / "run"), seed=0))


def disturb_lora(model):
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data.normal_(std=0.2)


@pytest.mark.parametrize("family, changes", [
    ("qwen3", {}), ("qwen3", {"tie_word_embeddings": True}), ("llama", {"mlp_bias": True}), ("gpt2", {}),
    ("gemma2", {"final_logit_softcapping": 3.0}), ("granite", {"logits_scaling": 6.0}), ("cohere", {"logit_scale": 0.3})])
def test_logits_from_hidden_states_are_the_models_own(family, changes, tmp_path, run):
    """Trap 53: soft-capping (Gemma 2), scaling (Granite, Cohere), tied and untied heads."""
    model = load_model(str(make_model(tmp_path / "m", family, **changes)), run)
    with torch.no_grad():
        ours = head_of(model).logits(model.base_model(input_ids=IDS, use_cache=False).last_hidden_state[0])
        theirs = model(input_ids=IDS, use_cache=False).logits[0]
    assert torch.allclose(ours, theirs, atol=1e-5) and theirs.std() > 0.01


def test_a_head_that_does_something_else_is_refused(tmp_path, run):
    model = load_model(str(make_model(tmp_path / "m")), run)
    head = model.lm_head
    head.register_forward_hook(lambda module, args, out: out + 0.1 * out.sin())
    with pytest.raises(InputError, match="head"):
        check_head(model, "m")


def test_weights_are_fp32_and_dropout_is_off(tmp_path, run):
    """Traps 25 and 29: a bf16 folder is trained in fp32; two passes of a model with dropout are the same."""
    folder = make_model(tmp_path / "m", attention_dropout=0.5, dtype="bfloat16")
    AutoModelForCausalLM.from_pretrained(folder).to(torch.bfloat16).save_pretrained(folder)
    model = load_model(str(folder), run)
    assert {p.dtype for p in model.parameters()} == {torch.float32} and model.source_dtype == torch.bfloat16
    assert torch.equal(model(IDS).logits, model(IDS).logits)


def test_lora_trains_adapters_on_all_linear_layers_but_the_head(tmp_path, run):
    model = load_model(str(make_model(tmp_path / "m")), run, lora_rank=2)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 7 * 2 and all("lora_" in name for name in trained) and "lm_head" not in str(trained)
    assert {m.scaling["default"] for m in model.modules() if hasattr(m, "lora_A")} == {2.0}


def test_merged_weights_are_the_adapted_model_and_leave_it_untouched(tmp_path, run):
    """Trap 55: merging is an addition into a copy; the live weights stay bit for bit."""
    folder = make_model(tmp_path / "m")
    model = load_model(str(folder), run, lora_rank=2)
    disturb_lora(model)
    before = copy.deepcopy(model.state_dict())
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    base = plain(IDS).logits
    plain.load_state_dict(dict(full_weights(model)))
    assert torch.allclose(plain(IDS).logits, model(IDS).logits, atol=1e-4) and not torch.allclose(base, model(IDS).logits, atol=1e-2)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family, lora, changes", [("qwen3", 0, {}), ("qwen3", 2, {}), ("llama", 0, {"tie_word_embeddings": True}), ("gemma2", 2, {})])
def test_a_saved_folder_reopens_and_generates_the_same_tokens(family, lora, changes, tmp_path, run):
    model, tokenizer = load_model(str(make_model(tmp_path / "m", family, **changes)), run, lora), load_tokenizer(str(tmp_path / "m"))
    disturb_lora(model)
    run.out.mkdir()
    save_folder(run, model, tokenizer, "best", "card")
    save_folder(run, model, tokenizer, "best", "card")                               # replaces its predecessor
    reopened = AutoModelForCausalLM.from_pretrained(run.out / "best", attn_implementation="eager")
    config = GenerationConfig(do_sample=False, max_new_tokens=20, eos_token_id=5, pad_token_id=0)
    assert torch.equal(reopened.generate(IDS, generation_config=config), model.generate(IDS, generation_config=config))
    assert torch.allclose(reopened(IDS).logits, model(IDS).logits, atol=1e-4)
    assert AutoTokenizer.from_pretrained(run.out / "best").chat_template == tokenizer.chat_template
    assert sorted(p.name for p in run.out.iterdir()) == ["best"]


def test_folders_without_tokenizer_chat_template_or_model_are_refused(tmp_path, run):
    folder = make_model(tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match="no chat template"):
        load_tokenizer(str(folder))
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(InputError, match="no tokenizer could be loaded"):
        load_tokenizer(str(folder))
    with pytest.raises(InputError, match="no model could be loaded"):
        load_model(str(tmp_path / "nowhere"), run)
