"""`build_training_rows`: the built-in transform, or a plugin's, whose rows are never trained unchecked."""

import pickle
from dataclasses import replace
from pathlib import Path

import pytest

from derta_plugins import transforms
from derta_plugins.core.chat import TokenizedAuthorsRow, TokenizedTriple
from derta_plugins.core.config import ConfigError, DeRTaConfig
from derta_plugins.core.records import BadRecordError
from derta_plugins.core.row_check import UnsafeRowError
from derta_plugins.core.transform import build_authors_row, build_rows
from derta_plugins.plugin_manager import PluginError
from derta_plugins.transforms import build_training_rows, transform_code
from tests.third_party import install

TRIPLE = TokenizedTriple((1, 2), (3, 4, 5), (6, 7), end_ids=(0,))
OPTIONS = {"refusal_token_id": 3, "max_length": 9, "index": 4, "epoch": 1}
MODULE = """
from derta_plugins.core.records import BadRecordError
from derta_plugins.core.transform import Row, build_rows
from derta_plugins.hookspecs import Transform, hookimpl

def build(triple, config, *, refusal_token_id, max_length, index, epoch):
    {body}

@hookimpl
def derta_transform():
    return Transform("mine", "for a test", build)
"""


@pytest.fixture(autouse=True)
def forget_transforms():
    transforms._loaded.cache_clear()
    yield
    transforms._loaded.cache_clear()


@pytest.fixture
def transform(monkeypatch, tmp_path):
    """Installs a transform `mine` whose function has the given body, and gives the config that selects it."""

    def install_body(body):
        install(monkeypatch, tmp_path, {"mine": "my_transform"}, {"my_transform.py": MODULE.format(body=body)})
        return DeRTaConfig(transform="mine")

    return install_body


@pytest.mark.parametrize("index", range(5))
def test_without_a_name_the_rows_are_the_cores(index):
    config = DeRTaConfig(seed=1, zero_prefix_ratio=0.0)
    options = {**OPTIONS, "index": index}
    assert build_training_rows(TRIPLE, config, **options) == build_rows(TRIPLE, config, **options)
    for is_rto in (False, True):
        row = TokenizedAuthorsRow((1, 2), (3, 4, 0), is_rto)
        assert build_training_rows(row, config, **options) == build_authors_row(row, config, **options)


def test_a_plugins_transform_builds_the_rows():
    config = DeRTaConfig(transform="everything")
    (row,) = build_training_rows(TRIPLE, config, **OPTIONS)
    assert row == build_rows(TRIPLE, DeRTaConfig(), **OPTIONS)[1]


def test_a_transform_is_told_all(transform):
    config = transform("raise LookupError((triple, config, refusal_token_id, max_length, index, epoch))")
    with pytest.raises(PluginError) as caught:
        build_training_rows(TRIPLE, config, **OPTIONS)
    assert caught.value.__cause__.args[0] == (TRIPLE, config, 3, 9, 4, 1)


def test_a_transform_is_given_tuples_whatever_the_dataset_keeps(transform):
    lists = TokenizedTriple([1, 2], [3, 4, 5], [6, 7], [0], [2], [[0, 1]])
    config = transform("raise LookupError(triple)")
    with pytest.raises(PluginError) as caught:
        build_training_rows(lists, config, **OPTIONS)
    assert caught.value.__cause__.args[0] == replace(TRIPLE, word_ends=(2,), earlier_turns=((0, 1),))


UNSAFE = {
    "harmful answer": "[1, 2, 6, 7, 0], [-100, -100, 6, 7, 0]",
    "harmful prefix": "[1, 2, 6, 3, 4, 5, 0], [-100, -100, 6, 3, 4, 5, 0]",
    "prompt": "[1, 2, 3, 4, 5, 0], [1, 2, 3, 4, 5, 0]",
    "nothing": "[1, 2, 3, 4, 5, 0], [-100] * 6",
    "too much": "[1, 2] + [6] * 7 + [3], [-100] * 9 + [3]",
}


@pytest.mark.parametrize("case", UNSAFE)
@pytest.mark.parametrize("on_bad_record", ["error", "skip"])
def test_rows_that_are_not_safe_end_the_run(transform, case, on_bad_record):
    config = replace(
        transform(f"ids, labels = {UNSAFE[case]}; return [Row(ids, labels, [False] * len(ids), 'mle', 0)]"),
        on_bad_record=on_bad_record,
    )
    match = r"^The transform 'mine' of third-party 1\.0 \(my_transform\) failed at record 4: UnsafeRowError: Row 0 "
    with pytest.raises(PluginError, match=match) as caught:
        build_training_rows(TRIPLE, config, **OPTIONS)
    assert isinstance(caught.value.__cause__, UnsafeRowError)
    assert not isinstance(caught.value, BadRecordError)


@pytest.mark.parametrize(
    ("body", "match"),
    [
        ("raise KeyError('seed')", r"failed at record 4: KeyError: 'seed'\.$"),
        ("raise SystemExit(0)", r"failed at record 4: SystemExit: 0\.$"),
        ("return None", "UnsafeRowError: Expected at least one row"),
        ("return []", "UnsafeRowError: Expected at least one row"),
        ("return ['row']", "UnsafeRowError: Row 0 must be a core.transform.Row, got str"),
    ],
)
def test_a_transform_that_fails_ends_the_run(transform, body, match):
    with pytest.raises(PluginError, match=match):
        build_training_rows(TRIPLE, transform(body), **OPTIONS)


def test_a_transform_may_say_that_a_record_is_bad(transform):
    with pytest.raises(BadRecordError) as caught:
        build_training_rows(TRIPLE, transform("raise BadRecordError('chosen', 'is too short.')"), **OPTIONS)
    assert caught.value.field == "chosen"


@pytest.mark.parametrize("is_rto", [False, True])
def test_authors_rows_need_the_built_in_transform(is_rto):
    with pytest.raises(ConfigError, match=r"^transform='everything' needs triples: "):
        build_training_rows(TokenizedAuthorsRow((1,), (3, 0), is_rto), DeRTaConfig(transform="everything"), **OPTIONS)


@pytest.mark.parametrize("call", [lambda config: build_training_rows(TRIPLE, config, **OPTIONS), transform_code])
@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("everythin", "^Unknown transform 'everythin'. Did you mean 'everything'"),
        ("working", "is no transform; it is: adapter"),
        ("clash", "is offered by"),
    ],
)
def test_a_transform_that_cannot_be_had_is_not_replaced_by_ours(call, name, match):
    with pytest.raises(PluginError, match=match):
        call(DeRTaConfig(transform=name))


def test_a_transform_is_looked_up_once_for_all_records(monkeypatch):
    names = []
    get = transforms.get_transform
    monkeypatch.setattr(transforms, "get_transform", lambda name: names.append(name) or get(name))
    for index in range(10):
        build_training_rows(TRIPLE, DeRTaConfig(transform="everything"), **{**OPTIONS, "index": index})
    assert names == ["everything"]


# --- what a cache of rows must know -----------------------------------------------------------------------------------


def test_the_built_in_transform_adds_nothing_to_a_cache_key():
    assert transform_code(DeRTaConfig()) == ""


def test_a_changed_module_changes_the_cache_key(transform, tmp_path):
    config = transform("return build_rows(triple, config, refusal_token_id=refusal_token_id)")
    before = transform_code(config)
    assert before.startswith("third-party 1.0 (my_transform) ")
    assert transform_code(config) == before
    module = tmp_path / "my_transform.py"
    module.write_text(module.read_text() + "\n")
    assert transform_code(config) != before


@pytest.mark.parametrize("changed", ["my_package/__init__.py", "my_package/helper.py", "my_package/deep/inner.py"])
def test_a_changed_module_of_its_package_changes_the_cache_key(monkeypatch, tmp_path, changed):
    files = {f"my_package/{name}": "" for name in ("__init__.py", "helper.py", "deep/__init__.py", "deep/inner.py")}
    files["my_package/rows.py"] = MODULE.format(body="return []")
    install(monkeypatch, tmp_path, {"mine": "my_package.rows"}, files)
    config = DeRTaConfig(transform="mine")
    before = transform_code(config)
    (tmp_path / changed).write_text("# changed")
    assert transform_code(config) != before


def test_another_release_changes_the_cache_key(transform, tmp_path):
    config = transform("return []")
    before = transform_code(config)
    metadata = Path(tmp_path, "third_party-1.0.dist-info", "METADATA")
    metadata.write_text(metadata.read_text().replace("1.0", "1.1"))
    assert transform_code(config) != before


def test_the_error_survives_the_way_out_of_a_worker_process(transform):
    with pytest.raises(PluginError) as caught:
        build_training_rows(TRIPLE, transform("return []"), **OPTIONS)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
