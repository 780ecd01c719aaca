"""Every file under examples/ is run or checked here or by a test that this one names."""

from pathlib import Path

import pytest
from trl import ModelConfig, TrlParser

from derta_plugins.adapters.trl import DeRTaSFTConfig
from tests.conftest import byte_level_bpe

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
CHECKED = {
    "trl/train_derta.py",  # run in tests/adapters/test_trl_training.py
    "trl/llama3_8b_full.yaml",
    "trl/llama3_70b_lora.yaml",
    "trl/llama3_base_template.jinja",
}

# Values of the authors' training commands that must reach the parsed config.
PAPER = {
    "llama3_8b_full.yaml": {
        "learning_rate": 2e-5, "weight_decay": 2e-5, "warmup_steps": 0.03, "max_length": 1024, "num_train_epochs": 2,
        "lr_scheduler_type": "cosine", "rto_keep_ratio": 0.05, "prefix_unit": "word", "refusal_text": "Sorry",
        "zero_prefix_ratio": pytest.approx(1 / 3), "normalization": "token_mean", "rto_weight": 1.0, "method": "derta",
    },
    "llama3_70b_lora.yaml": {
        "learning_rate": 1e-4, "weight_decay": 0.0, "warmup_steps": 0, "max_length": 512, "num_train_epochs": 2,
        "rto_keep_ratio": 1.0, "prefix_unit": "word", "refusal_text": "Sorry", "method": "derta",
        "zero_prefix_ratio": pytest.approx(1 / 3), "normalization": "token_mean", "rto_weight": 1.0,
    },
}  # fmt: skip


def load_script():
    """The example script as a module, without running it."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("train_derta", EXAMPLES / "trl" / "train_derta.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_example_is_unchecked():
    found = {str(path.relative_to(EXAMPLES)) for path in EXAMPLES.rglob("*") if path.is_file()}
    assert {name for name in found if "__pycache__" not in name} == CHECKED


@pytest.mark.parametrize("name", PAPER)
def test_paper_settings_parse_to_the_paper_values(name, monkeypatch):
    monkeypatch.chdir(EXAMPLES.parent)
    parser = TrlParser((load_script().DataArguments, DeRTaSFTConfig, ModelConfig))
    arguments = ["--config", str(EXAMPLES / "trl" / name), "--use_cpu", "true", "--bf16", "false"]
    data, args, model = parser.parse_args_and_config(arguments)
    for key, value in PAPER[name].items():
        assert getattr(args, key) == value, key
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps * 8 == 128
    assert Path(args.chat_template_path).is_file()
    assert data.safety
    if "lora" in name:
        assert (model.lora_r, model.lora_alpha, model.lora_dropout) == (96, 16, 0.05)
        assert set(model.lora_target_modules) == {
            "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
        }  # fmt: skip


def test_the_template_lets_a_refusal_begin_with_one_token():
    tokenizer = byte_level_bpe(chat_template=(EXAMPLES / "trl" / "llama3_base_template.jinja").read_text())
    messages = [{"role": "user", "content": "q"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert prompt == "[INST] q [\\INST]\n"
    whole = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": "Sorry, no."}], tokenize=False)
    assert whole == prompt + "Sorry, no.<|im_end|>"
    ids = tokenizer(prompt)["input_ids"]
    assert tokenizer(prompt + "Sorry")["input_ids"] == [*ids, *tokenizer("Sorry")["input_ids"]]
