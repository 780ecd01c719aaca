"""Which models take branch rows and how, and that a model set up for them is otherwise what it was."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma3Config,
    GPT2Config,
    JambaConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3NextConfig,
    T5Config,
)

from derta_plugins.adapters.branch_batch import flatten_batch, layout_for
from derta_plugins.adapters.branch_model import SEGMENTS, BranchAttention, why_not
from derta_plugins.core.branch_layout import positions
from derta_plugins.core.config import ConfigError, DeRTaConfig
from tests.adapters.tiny_models import (
    FAMILIES,
    SIZE,
    VOCABULARY,
    WAYS,
    forget_branches,
    plain_flex_attention,
    tiny_model,
)


class OwnConfig(PreTrainedConfig):
    """A model that transformers does not bring."""

    model_type = "own"


REASONS = {
    "GPT-2, positions are learned": (GPT2Config(), "does not number positions by rotation"),
    "OPT, positions are learned": (OPTConfig(), "does not number positions by rotation"),
    "Bloom, ALiBi": (BloomConfig(), "takes no mask of others"),
    "Falcon": (FalconConfig(), "takes no mask of others"),
    "Mamba": (MambaConfig(), "layers that take no mask|takes no mask of others"),
    "Jamba, hybrid": (JambaConfig(), "layers that take no mask|takes no mask of others"),
    "Qwen3-Next, linear attention": (Qwen3NextConfig(), "layers that take no mask (linear_attention)"),
    "Llama 4, chunked attention": (Llama4TextConfig(), "layers that take no mask (chunked_attention)"),
    "T5, encoder and decoder": (T5Config(), "is no plain causal language model"),
    "Gemma 3 with images": (Gemma3Config(), "is no plain causal language model"),
    "a config of its own": (OwnConfig(), "is no model of transformers' own"),
    "no config": ({"model_type": "mamba"}, "transformers does not know it"),
    "Qwen2-MoE, a window in its mask alone": (
        Qwen2MoeConfig(use_sliding_window=True, sliding_window=16),
        "qwen2_moe does not tell its attention of its sliding window",
    ),
    "a router loss": (MixtralConfig(output_router_logits=True), "trains a router loss"),
}


@pytest.mark.parametrize("name", REASONS)
def test_models_that_cannot_say_why(name):
    config, reason = REASONS[name]
    assert any(part in why_not(config) for part in reason.split("|")), why_not(config)


@pytest.mark.parametrize(
    "config", [*FAMILIES.values(), Phi3Config(), MixtralConfig(), Qwen2MoeConfig()], ids=lambda one: one.model_type
)
def test_models_that_can(config):
    assert why_not(config) == ""


def test_a_model_that_cannot_is_trained_in_rows_and_it_is_said(caplog):
    asked = DeRTaConfig(layout="branch", num_prefixes=3)
    assert layout_for(asked, GPT2Config()) == DeRTaConfig(layout="rows", num_prefixes=3)
    assert "gpt2 does not number positions by rotation" in caplog.text
    assert "layout='rows'" in caplog.text
    caplog.clear()
    assert layout_for(asked, LlamaConfig()) is asked
    assert layout_for(DeRTaConfig(), GPT2Config()) == DeRTaConfig()
    assert not caplog.text


def test_a_model_that_cannot_is_refused_by_its_attention():
    model = AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9))
    with pytest.raises(ConfigError, match="layout='branch' is not for this model: gpt2"):
        BranchAttention.of(model)


def test_each_model_attends_in_the_best_way_it_can():
    assert {family: BranchAttention.of(tiny_model(family)).way for family in FAMILIES} == {
        **dict.fromkeys(FAMILIES, "segments"),
        "gemma2": "dense",
    }
    with pytest.raises(ConfigError, match="gemma2 can attend by dense, flex in branch rows, not by segments"):
        BranchAttention.of(tiny_model("gemma2"), "segments")


def test_segments_are_not_for_a_soft_cap(monkeypatch):
    model = tiny_model("gemma3")
    monkeypatch.setattr(model.config, "attn_logit_softcapping", 30.0)
    assert BranchAttention.of(model).way == "dense"


def test_segments_and_flex_want_one_row_and_dense_takes_a_batch():
    model = tiny_model("llama")
    assert [BranchAttention.of(model, way).flattens for way in ("segments", "flex", "dense")] == [True, True, False]


def test_a_model_that_keeps_its_attention_is_refused(monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr(type(model), "set_attn_implementation", lambda self, name: None)
    with pytest.raises(ConfigError, match="kept its attention 'eager'"):
        BranchAttention.of(model)


def test_a_model_with_flash_attention_is_given_one_that_takes_masks():
    model = tiny_model("llama")
    model.config._attn_implementation_internal = "flash_attention_2"
    BranchAttention.of(model, "dense")
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("family", "way"), [(family, way) for family in FAMILIES for way in (*WAYS[family], "flex")])
def test_the_check_passes_a_model_that_attends_as_it_should(family, way, dtype, monkeypatch):
    plain_flex_attention(monkeypatch)
    model = tiny_model(family).to(dtype)
    attention = BranchAttention.of(model, way)
    attention.check(model, torch.device("cpu"))
    assert model.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_check_sees_a_model_whose_attention_another_tool_changed(monkeypatch, dtype):
    model = tiny_model("llama").to(dtype)
    attention = BranchAttention.of(model)
    forget_branches(monkeypatch)
    with pytest.raises(ConfigError, match="does not attend as branch rows need it"):
        attention.check(model, torch.device("cpu"))


def test_masks_for_each_kind_of_layer():
    position_ids, branch_ids = (torch.tensor([ids]) for ids in positions([0] * 12 + [12, 0, 0]))
    masks = {}
    for family in FAMILIES:
        attention = BranchAttention.of(tiny_model(family), "dense")
        masks[family] = attention.masks(position_ids, branch_ids, torch.float64)
    assert set(masks["gemma3"]) == set(masks["gemma2"]) == {"full_attention", "sliding_attention"}
    full, sliding = masks["llama"], masks["mistral"]
    assert (full >= 0).sum() > (sliding >= 0).sum()
    assert torch.equal(masks["gemma3"]["full_attention"], full)
    assert torch.equal(masks["gemma3"]["sliding_attention"], sliding)
    assert torch.equal(masks["qwen2"], full)
    assert full.dtype == torch.float64


def test_a_window_that_no_layer_has_is_none():
    config = Qwen3Config(**{**SIZE, "num_hidden_layers": 2}, use_sliding_window=True, sliding_window=8)
    assert set(config.layer_types) == {"full_attention"}
    position_ids, branch_ids = (torch.tensor([ids]) for ids in positions([0] * 12 + [12, 0, 0]))
    with_window, without = (
        BranchAttention("dense", of).masks(position_ids, branch_ids, torch.float64) for of in (config, LlamaConfig())
    )
    assert torch.equal(with_window, without)


@pytest.mark.parametrize(
    ("name", "value"), [("softcap", 1.0), ("s_aux", 1.0), ("position_bias", 1.0), ("is_causal", False)]
)
def test_attention_that_segments_do_not_know_is_refused(name, value):
    model = tiny_model("llama")
    attention = BranchAttention.of(model)
    ids = torch.arange(5)[None]
    table = attention.masks(ids, torch.zeros_like(ids), torch.float64)
    with pytest.raises(ConfigError, match=rf"LlamaAttention attends with \['{name}'\], which segments cannot"):
        model(input_ids=ids, position_ids=ids, attention_mask=table, **{name: value})


def test_a_window_that_attention_is_not_told_of_is_refused(monkeypatch):
    """As of models that transformers will bring, which put it into a mask of their own."""
    model = tiny_model("llama")
    monkeypatch.setattr(model.config, "sliding_window", 8, raising=False)
    attention = BranchAttention.of(model)
    with pytest.raises(
        ConfigError, match=r"^LlamaAttention attends with \['a sliding window that it is not told of'\]"
    ):
        attention.check(model, torch.device("cpu"))


def test_a_model_that_fails_with_branch_rows_is_refused(monkeypatch):
    model = tiny_model("llama")
    attention = BranchAttention.of(model, "dense")
    monkeypatch.setattr(model, "forward", lambda **inputs: torch.zeros(2) + torch.zeros(3))
    with pytest.raises(ConfigError, match=r"does not take branch rows: set layout='rows'. \(The size of tensor"):
        attention.check(model, torch.device("cpu"))
    assert model.training


def test_flex_attention_is_not_for_dropout(monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr(model.config, "attention_dropout", 0.1)
    with pytest.raises(ConfigError, match="llama can attend by segments, dense in branch rows, not by flex"):
        BranchAttention.of(model, "flex")


def test_without_a_table_the_model_is_what_it_was(tmp_path):
    """Logits of a padded batch, generation, and what is saved."""
    model = tiny_model("mistral", attention="sdpa").eval()
    torch.manual_seed(0)
    ids = torch.randint(6, VOCABULARY, (2, 20))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        before = model(**given).logits, model.generate(**given, max_new_tokens=6, do_sample=False, pad_token_id=0)
        BranchAttention.of(model)
        assert model.config._attn_implementation == SEGMENTS
        after = model(**given).logits, model.generate(**given, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    model.save_pretrained(tmp_path)
    assert SEGMENTS not in (tmp_path / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_flattening_keeps_tokens_in_order_and_drops_what_is_told_of_sequences():
    batch = {
        "labels": torch.arange(6).reshape(2, 3),
        "attention_mask": torch.tensor([[1, 1, 0], [0, 1, 1]]),
        "position_ids": torch.tensor([[0, 1, 0], [0, 0, 1]]),
        "cu_seq_lens_q": torch.tensor([0, 2, 4]),
        "seq_idx": torch.zeros(2, 3),
        "weight": 3,
    }
    flat = flatten_batch(batch)
    assert set(flat) == {"labels", "position_ids", "weight"}
    assert flat["labels"].tolist() == [[0, 1, 4, 5]]
    assert flat["position_ids"].tolist() == [[0, 1, 0, 1]]
    del batch["attention_mask"]
    assert flatten_batch(batch)["labels"].tolist() == [[0, 1, 2, 3, 4, 5]]


def test_sizes_of_the_tiny_models_let_windows_matter():
    assert FAMILIES["mistral"].sliding_window < 20
    assert SIZE["num_attention_heads"] > SIZE["num_key_value_heads"]
