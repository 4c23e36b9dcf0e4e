"""Cases of safetensors and huggingface_hub that are about files, and what tieaudit does with them.

ST: huggingface/safetensors, HUB: huggingface/huggingface_hub, IS: issue threads. See docs/peer-cases.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tieaudit.errors import CorruptFile
from tieaudit.find import find
from tieaudit.formats.safetensors.write import NewEntry, write_safetensors
from tieaudit.load import load_one
from tieaudit.model import Model
from tieaudit.regions import overlapping
from tieaudit.scan import scan
from tieaudit.storage import MemoryStorage


def random(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def write(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> Path:
    entries = [
        NewEntry(name, str(values.dtype), values.shape, MemoryStorage(values.tobytes(), name))
        for name, values in tensors.items()
    ]
    write_safetensors(entries, {"format": "pt"} | dict(metadata or {}), path)
    return path


def groups(model: Model, origin: str) -> list[set[str]]:
    return [set(tie.ids) for tie in find(model).ties if tie.origin == origin]


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        pytest.param([(0, 36), (0, 12)], [[0, 1]], id="ST-2 a part of a whole"),
        pytest.param([(0, 8), (8, 16)], [], id="ST-4 two halves"),
        pytest.param([(0, 8), (4, 16)], [[0, 1]], id="ST-5 an overlap"),
        pytest.param([(0, 40), (4, 12), (20, 28)], [[0, 1, 2]], id="a whole with two parts"),
    ],
)
def test_ST_2_ST_4_ST_5_ranges_overlap_exactly_where_they_have_bytes_in_common(
    spans: list[tuple[int, int]], expected: list[list[int]]
) -> None:
    # safetensors remembers the last end, not the largest one, and leaves out the second part of a whole
    assert [sorted(group) for group in overlapping([("storage", *span) for span in spans])] == expected


def test_ST_4_ST_5_a_file_in_which_two_names_share_bytes_is_refused_by_name(tmp_path: Path) -> None:
    for begin, outcome in ((4, "refused"), (8, "read")):
        header = {
            name: {"dtype": "F32", "shape": [2], "data_offsets": [at, at + 8]} for name, at in (("B", 0), ("C", begin))
        }
        text = json.dumps(header).encode()
        path = tmp_path / f"{outcome}.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text + random(begin // 4 + 2).tobytes())
    assert groups(load_one(tmp_path / "read.safetensors"), "aliased") == []
    with pytest.raises(CorruptFile, match="overlap"):
        load_one(tmp_path / "refused.safetensors")


def test_ST_10_HUB_2_names_that_a_writer_dropped_are_absent_members_of_a_class(tmp_path: Path) -> None:
    kept = {"a.weight": random(8, 4), "a.bias": random(8, seed=1)}
    dropped = {"b.weight": "a.weight", "b.bias": "a.bias"}
    model = load_one(write(tmp_path / "m.safetensors", kept, dropped))
    assert sorted(sorted(one.members) for one in model.declarations) == [["a.bias", "b.bias"], ["a.weight", "b.weight"]]
    assert {weight.name for weight in model.weights if weight.absent} == {"b.weight", "b.bias"}
    assert scan(model).summary.n_parameters == 8 * 4 + 8  # not 80: each class is one parameter


def test_ST_11_HUB_5_the_class_is_the_same_whichever_of_its_names_was_kept(tmp_path: Path) -> None:
    table = random(8, 4)
    classes = []
    for kept, dropped in (("a.weight", "b.weight"), ("b.weight", "a.weight")):
        model = load_one(write(tmp_path / f"{kept}.safetensors", {kept: table}, {dropped: kept}))
        (one,) = model.declarations
        assert one.members[0] == kept  # the canonical name is the stored one
        classes.append(set(one.members))
    assert classes[0] == classes[1]


def test_ST_13_a_deep_copy_is_measured_as_a_duplicate_and_not_as_one_storage(tmp_path: Path) -> None:
    # safetensors: four sets of one name, for it looks at storages; here equal bytes are a class of their own kind
    weight, bias = random(8, 4), random(8, seed=1)
    tensors = {"a.weight": weight, "a.bias": bias, "b.weight": weight, "b.bias": bias}
    model = load_one(write(tmp_path / "m.safetensors", tensors))
    assert groups(model, "aliased") == []
    assert sorted(map(sorted, groups(model, "measured"))) == [["a.bias", "b.bias"], ["a.weight", "b.weight"]]


@pytest.mark.parametrize("where", ["index", "shard", "both"])
def test_HUB_4_an_alias_map_is_read_wherever_a_sharded_checkpoint_has_it(tmp_path: Path, where: str) -> None:
    # huggingface_hub writes it into the index only, and the name that it dropped is in no shard
    shared, unique = random(8, 4), random(8, 4, seed=1)
    shards = {
        "model-00001-of-00002.safetensors": {"shared_2": shared},
        "model-00002-of-00002.safetensors": {"u": unique},
    }
    for name, tensors in shards.items():
        aliases = {"shared_1": "shared_2"} if "shared_2" in tensors and where != "index" else None
        write(tmp_path / name, tensors, aliases)
    index = {
        "metadata": {"total_size": 256} | ({"shared_1": "shared_2"} if where != "shard" else {}),
        "weight_map": {tensor: name for name, tensors in shards.items() for tensor in tensors},
    }
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    model = load_one(path)
    (one,) = model.declarations
    assert one.members == ("shared_2", "shared_1")
    assert model.by_id["shared_1"].absent
    assert scan(model).summary.n_parameters == 2 * 32
    assert "TIE105" in {one.code for one in scan(model).cannot_tell}  # nothing restores it


def test_IS_6_an_alias_map_alone_is_documented_and_restores_nothing(tmp_path: Path) -> None:
    # transformers ignores the map and would leave the dropped name random
    model = load_one(write(tmp_path / "m.safetensors", {"a": random(8, 4)}, {"b": "a"}))
    (one,) = model.declarations
    assert not one.restores
    assert not any("transformers" in loader for loader in one.honoured_by)
    assert groups(model, "absent") == []


def test_IS_7_tensors_without_elements_are_never_a_tie(tmp_path: Path) -> None:
    empty = np.zeros((0, 4), np.float32)
    model = load_one(write(tmp_path / "m.safetensors", {"a": empty, "b": empty, "w": random(8, 4)}))
    assert find(model).ties == ()
    assert find(model).constant_classes == ()
