"""Models exported and loaded, and refusals that say what to type."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel

from crpo_fast.models import (
    EOS_TOKEN,
    ModelError,
    build_model,
    check_model,
    eos_ids,
    export_model,
    load_model,
    load_tokenizer,
    train_tokenizer,
)

TEXTS = ["I lost my job, and nobody calls.", "<think>rent is due</think><answer>Yes</answer>"] * 9


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 400, ["<think>", "</think>", "<answer>", "</answer>"])


def small(tokenizer, *, num_layers: int = 2, tie_word_embeddings: bool = True):
    return build_model(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_layers=num_layers,
        num_heads=4,
        tie_word_embeddings=tie_word_embeddings,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


@pytest.fixture
def folder(tokenizer, tmp_path):
    return export_model(small(tokenizer), tokenizer, tmp_path / "model")


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("tied", [True, False])
def test_an_export_loads_in_transformers_and_is_the_same_model(tied, tokenizer, tmp_path):
    model = small(tokenizer, tie_word_embeddings=tied)
    folder = export_model(model, tokenizer, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([encode(tokenizer, TEXTS[0])])
    assert torch.equal(model(ids).logits, loaded(ids).logits)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    assert loaded.generation_config.eos_token_id == tokenizer.eos_token_id
    assert encode(AutoTokenizer.from_pretrained(folder), TEXTS[1]) == encode(tokenizer, TEXTS[1])
    generated = loaded.generate(ids, max_new_tokens=4, do_sample=False)
    assert generated.shape[1] > ids.shape[1]


def test_an_export_of_a_full_state_dict_in_bf16(tokenizer, tmp_path):
    model = small(tokenizer)
    state = {name: value + 1.0 for name, value in model.state_dict().items()}
    assert "lm_head.weight" in state
    folder = export_model(
        model, tokenizer, tmp_path / "a" / "model", state_dict=state, dtype=torch.bfloat16
    )
    assert "lm_head.weight" in state  # the caller's dictionary is left alone
    stored = load_file(folder / "model.safetensors")
    assert set(stored) == set(state) - {"lm_head.weight"}
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(stored[name], state[name].bfloat16())
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_model(folder, dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_an_export_replaces_the_older_one_and_leaves_nothing_else(folder, tokenizer):
    (folder / "stale").touch()
    model = small(tokenizer, num_layers=1)
    export_model(model, tokenizer, folder)
    assert not (folder / "stale").exists()
    assert load_model(folder)[0].config.num_hidden_layers == 1
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    modes = {path.stat().st_mode for path in folder.iterdir()}
    assert len(modes) == 1  # whoever may read the config may read the weights


def test_an_export_says_nothing_of_deepspeed(tokenizer, tmp_path, monkeypatch, caplog):
    """transformers' save_pretrained imports it through accelerate; on a CPU it warns."""
    model, logger = small(tokenizer), logging.getLogger("DeepSpeed")
    save = model.save_pretrained

    def warn_and_save(*args, **kwargs):
        logger.warning("Setting accelerator to CPU.")
        logger.error("an error")
        save(*args, **kwargs)

    monkeypatch.setattr(model, "save_pretrained", warn_and_save)
    export_model(model, tokenizer, tmp_path / "model")
    logger.warning("a word of the user's own run")
    assert [r.getMessage() for r in caplog.records] == ["an error", "a word of the user's own run"]


def test_a_failed_export_leaves_the_older_one(folder, tokenizer):
    model = small(tokenizer)
    state = model.state_dict()
    state["lm_head.weight"] = state["lm_head.weight"] + 1.0
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(ModelError, match=r"lm_head\.weight equal to model\.embed_tokens\.weight"):
        export_model(model, tokenizer, folder, state_dict=state)
    assert sorted(path.name for path in folder.iterdir()) == before
    load_model(folder)


def test_loading_takes_dtype_and_attention(folder):
    model, tokenizer = load_model(folder, dtype=torch.float64, attention="eager")
    assert model.dtype == torch.float64
    assert model.config._attn_implementation == "eager"
    assert tokenizer.eos_token == EOS_TOKEN
    assert load_model(folder)[0].config._attn_implementation == "sdpa_packed"


def test_all_end_tokens_of_model_and_tokenizer(folder):
    model, tokenizer = load_model(folder)
    assert eos_ids(model, tokenizer) == (1,)
    model.generation_config.eos_token_id = [7, 5]
    assert eos_ids(model, tokenizer) == (1, 5, 7)
    model.generation_config.eos_token_id = None
    assert eos_ids(model, tokenizer) == (1,)
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="expected an eos id, got none"):
        eos_ids(model, tokenizer)


def change_json(path, **changes):
    values = json.loads(path.read_text())
    values.update(changes)
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def test_refuses_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(
        ModelError, match=r"there is none.*crpo_fast\.models smollm2.*--model\.path"
    ):
        load_model(tmp_path / "nowhere")


def test_refuses_a_folder_without_a_config(tmp_path):
    with pytest.raises(ModelError, match=r"config\.json.*without one.*--model\.path <run>/final"):
        check_model(tmp_path)


def test_refuses_a_hub_name_that_cannot_be_reached():
    with pytest.raises(ModelError, match=r"nobody/nothing: .*Give a folder on this machine"):
        load_model("nobody/nothing")


def test_refuses_a_config_of_no_known_type(folder):
    (folder / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="expected a model folder"):
        check_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="expected a model folder"):
        check_model(folder)


def test_refuses_an_encoder(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=20, intermediate_size=16, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"causal language model.*type bert / BertModel.*smollm2"):
        load_model(tmp_path)


def test_refuses_other_heads_and_other_types(folder):
    change_json(folder / "config.json", architectures=["LlamaForSequenceClassification"])
    with pytest.raises(ModelError, match=r"causal language model.*LlamaForSequenceClassification"):
        load_model(folder)
    change_json(folder / "config.json", architectures=None, model_type="t5")
    with pytest.raises(ModelError, match=r"causal language model.*of type t5\."):
        load_model(folder)


def test_refuses_a_tokenizer_without_an_eos_id(folder):
    change_json(folder / "tokenizer_config.json", eos_token=None)
    with pytest.raises(ModelError, match=r'with an eos id, got none.*"eos_token"'):
        load_model(folder)


def test_refuses_a_folder_without_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match=r"expected a tokenizer .*Copy tokenizer\.json"):
        load_model(folder)


def test_refuses_a_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"loadable weights.*Copy model\.safetensors"):
        load_model(folder)


def test_refuses_a_damaged_file_of_weights(folder):
    (folder / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(ModelError, match="loadable weights"):
        load_model(folder)


def test_refuses_weights_that_are_incomplete(folder):
    change_json(folder / "config.json", num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"got none for 9 parameters .*whole model"):
        load_model(folder)


def test_refuses_a_tokenizer_that_is_larger_than_the_model(folder):
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens([f"extra{i}" for i in range(500)])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"expected a tokenizer with at most \d+ ids"):
        load_model(folder)
