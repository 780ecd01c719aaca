"""A recipe in the words of each host: what is refused, what is written, and what is said of it. Needs no host."""

import json
import re
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from derta_plugins import cli
from derta_plugins.core.config import DeRTaConfig
from derta_plugins.recipe import schema
from derta_plugins.recipe.checks import RecipeError
from derta_plugins.recipe.convert import HOSTS, convert
from derta_plugins.recipe.reading import read_recipe
from tests.recipes import BASE, BOUNDARY, HELPFUL, SAFETY, recipe

EVERY_HOST = pytest.mark.parametrize("host", schema.HOSTS)


def written(host, **changes) -> dict:
    """The host's config as it stands in the file."""
    return yaml.safe_load(convert(recipe(**changes), host).files[HOSTS[host].config_file])


def remarks(host, **changes) -> str:
    return "\n".join(convert(recipe(**changes), host).remarks)


def test_the_hosts_are_the_same_everywhere():
    assert tuple(HOSTS) == schema.HOSTS


# --- what a host cannot do --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "changes", "message"),
    [
        ("axolotl", {"derta": {"resample_each_epoch": True}}, "`derta.resample_each_epoch: True` has no counterpart"),
        ("axolotl", {"derta": {"boundary_ratio": 0.5}}, "`derta.boundary_ratio: 0.5` has no counterpart in Axo"),
        ("llamafactory", {"derta": {"resample_each_epoch": True}}, "has no counterpart in LLaMA-Factory: rows are"),
        ("llamafactory", {"derta": {"boundary_ratio": 0.0}}, "`derta.boundary_ratio: 0.0` has no counterpart in"),
        ("llamafactory", {"derta": {"apply_chat_template": False}}, "`derta.apply_chat_template: False` has no coun"),
        ("trl", {"tokenizer": "other"}, "`tokenizer` has no counterpart in TRL's script"),
        ("llamafactory", {"tokenizer": "other"}, "`tokenizer` has no counterpart in LLaMA-Factory"),
        ("llamafactory", {"hosts": {}}, "LLaMA-Factory takes no Jinja: name one of its templates under `hosts:"),
        (
            "llamafactory",
            {"hosts": {"llamafactory": {"template": None}}, "chat_template": "it.jinja"},
            "`chat_template: it.jinja` has no counterpart in LLaMA-Factory, and `template: null` would take",
        ),
        ("trl", {"data": [SAFETY, {**HELPFUL, "format": "alpaca"}]}, "helpful.jsonl: `format: alpaca` has no counter"),
        ("trl", {"data": [SAFETY, SAFETY]}, "triples.jsonl: a second file of `kind: safety` has no counterpart in TRL"),
        ("trl", {"data": [{**SAFETY, "columns": {"chosen": "safe"}}]}, "triples.jsonl: `columns` has no counterpart"),
        ("trl", {"data": [{**SAFETY, "split": "test"}]}, "triples.jsonl: `split: test` has no counterpart in"),
        ("axolotl", {"data": [{**SAFETY, "columns": {"chosen": "safe"}}]}, "`columns` of safety records has no coun"),
        (
            "axolotl",
            {"data": [SAFETY, {**HELPFUL, "format": "alpaca", "columns": {"input": "context"}}]},
            "helpful.jsonl: `columns` of `format: alpaca` has no counterpart in Axolotl",
        ),
        *[
            ("llamafactory", {"data": [{**SAFETY, "format": name}]}, f"triples.jsonl: `format: {name}` has no")
            for name in ("conversational-preference", "authors-rows", "pku-saferlhf")
        ],
        *[
            ("llamafactory", {"data": [SAFETY, {**HELPFUL, "format": name}]}, f"helpful.jsonl: `format: {name}` has no")
            for name in ("prompt-completion", "text")
        ],
    ],
)  # fmt: skip
def test_what_would_change_the_training_ends_the_conversion(host, changes, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        convert(recipe(**changes), host)


@EVERY_HOST
@pytest.mark.parametrize("knob", ["resample_each_epoch", "boundary_ratio", "apply_chat_template"])
def test_a_knob_that_a_host_lacks_may_stand_there_at_its_default(host, knob):
    convert(recipe(derta={knob: getattr(DeRTaConfig, knob)}), host)


@pytest.mark.parametrize(
    ("host", "changes", "message"),
    [
        ("trl", {"validation_ratio": 0.1, "eval_steps": 5}, "`validation_ratio: 0.1` and `eval_steps: 5`: the script"),
        ("axolotl", {"fsdp_config": "fsdp.json"}, "`fsdp_config: fsdp.json`: Axolotl takes no file"),
        ("llamafactory", {"packing": True}, "`packing`: every row is a sequence of its own"),
        ("llamafactory", {"chat_template": "it.jinja"}, "`chat_template: it.jinja`: the template 'chatml' stands in"),
    ],
)
def test_what_only_costs_something_is_said(host, changes, message):
    title = f"No counterpart in {HOSTS[host].title}:"
    assert f"{title}\n- {message}" in remarks(host, **changes)
    assert title not in remarks(host)


@pytest.mark.parametrize(
    ("host", "changes", "message"),
    [
        ("trl", {"derta": {"seed": 4}}, "`derta.seed` becomes `data_seed`"),
        ("trl", {"shuffle": False}, "Without `shuffle` rows come in the order helpful, boundary, safety"),
        ("trl", {}, "`format: messages` needs {% generation %} marks"),
        ("axolotl", {"precision": "bf16"}, "`precision: bf16` is the type of the weights too"),
        ("axolotl", {"warmup_ratio": 0.1}, "Warm-up is rounded down to whole steps"),
        ("axolotl", {"data": [SAFETY, {**HELPFUL, "format": "alpaca"}]}, "`format: alpaca` is laid out in Axolotl"),
        ("axolotl", {"data": [SAFETY, BOUNDARY]}, "`kind: boundary` is an ordinary dataset"),
        ("llamafactory", {"data": [SAFETY, BOUNDARY]}, "`kind: boundary` is an ordinary dataset"),
        ("llamafactory", {}, "It goes on from the last checkpoint in `output_dir`"),
    ],
)  # fmt: skip
def test_what_a_host_does_otherwise_is_said(host, changes, message):
    assert f"\n- {message}" in remarks(host, **changes).partition(f"Otherwise in {HOSTS[host].title}:")[2]


@pytest.mark.parametrize(
    ("host", "changes", "message"),
    [
        ("trl", {"data": [HELPFUL, SAFETY], "shuffle": False}, "Without `shuffle`"),
        ("trl", {"data": [SAFETY]}, "{% generation %}"),
        ("axolotl", {"precision": "fp32"}, "type of the weights"),
        ("axolotl", {}, "Warm-up"),
        ("axolotl", {}, "`kind: boundary`"),
    ],
)
def test_nothing_is_said_that_does_not_apply(host, changes, message):
    assert message not in remarks(host, **changes)


def test_defaults_of_the_host_are_said_where_another_value_is_set():
    said = remarks("axolotl", max_length=77, num_epochs=1)
    assert "- `sequence_len: 77` (its own: 512)" in said
    assert "- `warmup_ratio: 0.0` (its own: 3 % of the steps, at most 100)" in said
    assert "num_epochs" not in said
    assert "- `learning_rate: 2.0e-05` (its own: 5e-05)" in remarks("llamafactory")


@pytest.mark.parametrize(
    ("host", "command", "on_two"),
    [
        ("trl", "python train_derta.py --config ", "accelerate launch --num_processes 2 train_derta.py --config "),
        ("axolotl", "axolotl train cfg.yml", "axolotl train cfg.yml -- --num_processes 2"),
        ("llamafactory", "llamafactory-cli train ", "FORCE_TORCHRUN=1 NPROC_PER_NODE=2 llamafactory-cli train "),
    ],
)
def test_the_command_and_the_batch_are_said(host, command, on_two):
    assert f"Start it with: {command}" in remarks(host)
    said = remarks(host, num_devices=2, batch_size=64)
    assert f"Start it with: {on_two}" in said
    assert "Rows per step: 2 device(s) x 8 x 4 = 64." in said


# --- keys for one host ------------------------------------------------------------------------------------------------


@EVERY_HOST
def test_keys_for_one_host_go_to_it_verbatim_and_to_no_other(host):
    block = {**BASE["hosts"].get(host, {}), "some_key": {"a": [1, None]}, "weight_decay": 0.5}
    hosts = {**BASE["hosts"], host: block}
    config = written(host, hosts=hosts)
    assert config | block == config
    for other in set(schema.HOSTS) - {host}:
        assert "some_key" not in written(other, hosts=hosts)


def test_a_key_for_one_host_that_replaces_a_setting_is_said():
    said = remarks("axolotl", hosts={"axolotl": {"weight_decay": 0.5, "lora_r": 3}})
    assert "- `weight_decay: 0.5` of `hosts.axolotl` stands in place of 0.0." in said
    assert "lora_r" not in said


def test_more_plugins_of_axolotl_stand_beside_derta():
    more = ["axolotl.integrations.liger.LigerPlugin"]
    config = written("axolotl", hosts={"axolotl": {"plugins": more}})
    assert config["plugins"] == ["derta_plugins.adapters.axolotl.DeRTaPlugin", *more]
    with pytest.raises(RecipeError, match=r"`hosts.axolotl.plugins` must be a list, got 'derta'"):
        written("axolotl", hosts={"axolotl": {"plugins": "derta"}})


@pytest.mark.parametrize(
    ("host", "key"),
    [
        ("trl", "safety"), ("trl", "rto_weight"), ("trl", "resample_each_epoch"), ("axolotl", "datasets"),
        ("axolotl", "derta"), ("llamafactory", "stage"), ("llamafactory", "dataset"), ("llamafactory", "dataset_dir"),
        ("llamafactory", "derta_rto_weight"), ("llamafactory", "packing"), ("llamafactory", "neat_packing"),
    ],
)  # fmt: skip
def test_what_is_trained_is_said_in_the_recipes_own_keys(host, key):
    with pytest.raises(RecipeError, match=rf"`hosts.{host}.{key}` says what is trained"):
        convert(recipe(hosts={host: {**BASE["hosts"].get(host, {}), key: None}}), host)


# --- settings whose values no parser on a CPU takes -------------------------------------------------------------------


@EVERY_HOST
def test_a_deepspeed_config_is_handed_on(host):
    assert written(host, deepspeed="zero3.json")["deepspeed"] == "zero3.json"


@pytest.mark.parametrize("host", ["trl", "llamafactory"])
def test_an_fsdp_config_is_handed_on(host):
    config = written(host, fsdp_config="fsdp.json")
    assert (config["fsdp"], config["fsdp_config"]) == ("full_shard auto_wrap", "fsdp.json")


# --- data -------------------------------------------------------------------------------------------------------------


def test_data_in_trl():
    config = written("trl", data=[HELPFUL, SAFETY, BOUNDARY])
    assert [config[kind] for kind in ("safety", "helpful", "boundary")] == [
        "triples.jsonl", "helpful.jsonl", "lookalikes.jsonl",
    ]  # fmt: skip
    assert config["assistant_only_loss"] is True
    raw = {"path": "raw.jsonl", "kind": "helpful", "format": "prompt-completion"}
    assert "assistant_only_loss" not in written("trl", data=[raw, SAFETY])


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (SAFETY, {"type": "derta_plugins.adapters.axolotl", "ds_type": "json"}),
        (HELPFUL, {"type": "chat_template", "field_messages": "messages", "roles_to_train": ["assistant"]}),
        (BOUNDARY, {"type": "chat_template", "field_messages": "messages", "roles_to_train": ["assistant"]}),
        ({**HELPFUL, "columns": {"messages": "talk"}}, {"field_messages": "talk"}),
        ({**HELPFUL, "format": "alpaca"}, {"type": "alpaca"}),
        ({**HELPFUL, "format": "text", "columns": {"text": "body"}}, {"type": "completion", "field": "body"}),
        (
            {**HELPFUL, "format": "prompt-completion", "columns": {"completion": "answer"}},
            {
                "type": {
                    "field_instruction": "prompt",
                    "field_output": "answer",
                    "format": "{instruction}",
                    "no_input_format": "{instruction}",
                }
            },
        ),
        ({**HELPFUL, "path": "rows.parquet"}, {"path": "rows.parquet", "ds_type": "parquet"}),
        ({**HELPFUL, "path": "org/rows", "split": "train[:9]"}, {"path": "org/rows", "split": "train[:9]"}),
    ],
)
def test_data_in_axolotl(file, expected):
    dataset = written("axolotl", data=[SAFETY, file])["datasets"][1]
    assert dataset | expected == dataset
    assert ("ds_type" in dataset) == ("." in file["path"])


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (SAFETY, {"columns": {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}}),
        (
            {**SAFETY, "format": "authors-triples"},
            {"columns": {"prompt": "instruction", "chosen": "safe_response", "rejected": "output"}},
        ),
        (
            {**SAFETY, "columns": {"rejected": "harmful"}},
            {"columns": {"prompt": "prompt", "chosen": "chosen", "rejected": "harmful"}},
        ),
        ({**HELPFUL, "columns": {"messages": "talk"}}, {"formatting": "sharegpt", "columns": {"messages": "talk"}}),
        (
            {**HELPFUL, "format": "alpaca", "columns": {"output": "answer"}},
            {"columns": {"prompt": "instruction", "query": "input", "response": "answer"}},
        ),
    ],
)
def test_data_in_llamafactory(file, expected):
    conversion = convert(recipe(data=[{**SAFETY, "path": "first.jsonl"}, file]), "llamafactory")
    entry = json.loads(conversion.files["dataset_info.json"])[Path(file["path"]).stem]
    assert entry | expected == entry
    assert entry["file_name"] == file["path"]
    assert entry.get("ranking", False) == (file["kind"] == "safety")


def test_llamafactory_finds_files_from_the_folder_of_dataset_info(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    files = [SAFETY, {**HELPFUL, "path": str(tmp_path / "elsewhere.jsonl")}, {**HELPFUL, "path": "folder"}]
    conversion = convert(recipe(data=files), "llamafactory", output_dir="configs/run")
    assert conversion.config["dataset_dir"] == "configs/run"
    found = json.loads(conversion.files["dataset_info.json"])
    assert found["triples"]["file_name"] == "../../triples.jsonl"
    assert found["elsewhere"]["file_name"] == str(tmp_path / "elsewhere.jsonl")
    assert found["folder"]["file_name"] == "../../folder"


def test_llamafactory_takes_hub_names_and_splits():
    hub = {**HELPFUL, "path": "org/rows", "split": "test"}
    entry = json.loads(convert(recipe(data=[SAFETY, hub]), "llamafactory").files["dataset_info.json"])["rows"]
    assert (entry["hf_hub_url"], entry["split"]) == ("org/rows", "test")
    assert "file_name" not in entry


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/rows,1.jsonl", "b/rows 1.jsonl", "c/rows-1.json"], ["rows_1", "rows_1_2", "rows_1_3"]),
        (["rows_2.json", "rows.json", "a/rows.json"], ["rows_2", "rows", "rows_3"]),
    ],
)
def test_llamafactory_names_are_distinct_and_free_of_commas(paths, names):
    conversion = convert(recipe(data=[{**SAFETY, "path": path} for path in paths]), "llamafactory")
    assert conversion.config["dataset"] == ",".join(names)
    entries = json.loads(conversion.files["dataset_info.json"])
    assert [(name, entry["file_name"]) for name, entry in entries.items()] == list(zip(names, paths, strict=True))


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(BASE))
    return path


def run(*arguments):
    return CliRunner().invoke(cli.app, ["recipe", "convert", *map(str, arguments)], env={"COLUMNS": "200"})


@EVERY_HOST
def test_the_command_writes_what_it_says(recipe_file, tmp_path, host):
    folder = tmp_path / "made" / host
    done = run(recipe_file, "--to", host, "--output-dir", folder)
    assert done.exit_code == 0, done.output
    files = {HOSTS[host].config_file, *(["dataset_info.json"] if host == "llamafactory" else [])}
    assert {path.name for path in folder.iterdir()} == files
    for name in files:
        assert f"wrote {folder / name}\n" in done.stdout
    text = (folder / HOSTS[host].config_file).read_text()
    assert yaml.safe_load(text) == convert(read_recipe(recipe_file), host, output_dir=str(folder)).config
    comments = [line.removeprefix("# ") for line in text.splitlines() if line.startswith("#")]
    assert comments[0].startswith("Written from recipe.yaml by `derta recipe convert`")
    assert comments[1:] == done.stdout.splitlines()[len(files) :]


def test_existing_files_are_kept_unless_forced(recipe_file, tmp_path):
    info = tmp_path / "dataset_info.json"
    info.write_text("{}")
    refused = run(recipe_file, "--to", "llamafactory", "--output-dir", tmp_path)
    assert refused.exit_code == 2
    assert f"derta: {info} exists already: give another --output-dir, or --force to overwrite." in refused.output
    assert info.read_text() == "{}"
    assert not (tmp_path / "train.yaml").exists(), "half of a run's files was written"
    assert run(recipe_file, "--to", "llamafactory", "--output-dir", tmp_path, "--force").exit_code == 0
    assert json.loads(info.read_text()).keys() == {"triples", "helpful"}


def test_a_folder_that_cannot_be_written_is_named(recipe_file):
    refused = run(recipe_file, "--to", "trl", "--output-dir", recipe_file)
    assert refused.exit_code == 2
    assert re.search(r"^derta: .*recipe\.yaml: cannot be written: ", refused.output)


def test_the_commands_errors_speak_of_keys_and_not_of_options(recipe_file, tmp_path):
    recipe_file.write_text(recipe_file.read_text() + "derta: {boundary_ratio: 2}\n")
    refused = run(recipe_file, "--to", "axolotl", "--output-dir", tmp_path / "out")
    assert refused.exit_code == 2
    assert refused.output.startswith("derta: `derta.boundary_ratio: 2` has no counterpart in Axolotl")
    assert not (tmp_path / "out").exists()
    unknown = run(recipe_file, "--to", "axolot")
    assert unknown.output == "derta: Unknown host 'axolot': expected one of trl, axolotl, llamafactory.\n"


@pytest.mark.parametrize("width", ["80", "120"])
def test_help_explains_every_option(width):
    shown = CliRunner().invoke(cli.app, ["recipe", "convert", "--help"], env={"COLUMNS": width})
    assert shown.exit_code == 0
    for option, words in {"--to": "The host: trl", "--output-dir": "Folder for", "--force": "Overwrite"}.items():
        assert re.search(rf"│ [* ] *{option} .*{words}", shown.stdout), option


def test_without_yaml_the_command_says_what_brings_it(recipe_file, monkeypatch):
    for name in ("reading", "convert"):
        monkeypatch.delitem(sys.modules, f"derta_plugins.recipe.{name}")
    monkeypatch.setitem(sys.modules, "yaml", None)
    failed = run(recipe_file, "--to", "trl")
    assert failed.exit_code == 2
    assert failed.output == "derta: `yaml` is not installed; it comes with pip install 'derta-plugins[trl]'.\n"
