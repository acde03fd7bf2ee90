from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qdexport.errors import ModelError
from qdexport.models.weights import (
    WeightFiles,
    check_weights,
    find_weights,
    read_json,
    stored_dtype,
    variants_in,
)

STEM = "diffusion_pytorch_model"


def _save(path: Path, **tensors: torch.Tensor) -> Path:
    save_file(tensors or {"weight": torch.ones(4, 4)}, path)
    return path


def _save_sharded(folder: Path, index: str = f"{STEM}.safetensors.index.json") -> list[Path]:
    shards = [folder / f"{STEM}-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for number, shard in enumerate(shards):
        _save(shard, **{f"layer{number}": torch.ones(2)})
    weight_map = {f"layer{number}": shard.name for number, shard in enumerate(shards)}
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return shards


def test_safetensors_win_over_pickles(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2)}, tmp_path / f"{STEM}.bin")
    assert find_weights(tmp_path, None).pickled
    file = _save(tmp_path / f"{STEM}.safetensors")
    found = find_weights(tmp_path, None)
    assert (found.files, found.pickled, found.index) == ((file,), False, None)


@pytest.mark.parametrize("name", ["model.fp16.safetensors", f"{STEM}.fp16.safetensors"])
def test_variant_is_part_of_the_file_name(tmp_path: Path, name: str) -> None:
    file = _save(tmp_path / name)
    assert find_weights(tmp_path, "fp16").files == (file,)
    assert variants_in(tmp_path) == ["fp16"]


@pytest.mark.parametrize(
    "index", [f"{STEM}.safetensors.index.fp16.json", f"{STEM}.fp16.safetensors.index.json"]
)
def test_sharded_variant_in_both_spellings(tmp_path: Path, index: str) -> None:
    shards = _save_sharded(tmp_path, index)
    assert find_weights(tmp_path, "fp16").files == tuple(shards)


def test_index_lists_all_shards(tmp_path: Path) -> None:
    shards = _save_sharded(tmp_path)
    found = find_weights(tmp_path, None)
    assert found.files == tuple(shards)
    assert found.index is not None
    check_weights(found)


def test_no_weights_at_all(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no weights in .*there are no variants; download the model again"):
        find_weights(tmp_path, None)


def test_only_a_variant_is_there(tmp_path: Path) -> None:
    _save(tmp_path / f"{STEM}.fp16.safetensors")
    with pytest.raises(ModelError, match="variants there: fp16; give variant='fp16'"):
        find_weights(tmp_path, None)


def test_unknown_variant_lists_those_there(tmp_path: Path) -> None:
    _save(tmp_path / f"{STEM}.safetensors")
    _save(tmp_path / f"{STEM}.fp16.safetensors")
    with pytest.raises(ModelError, match=r"no weights of variant 'bf16'.*variants there: fp16"):
        find_weights(tmp_path, "bf16")


def test_missing_shard_is_named(tmp_path: Path) -> None:
    shards = _save_sharded(tmp_path)
    shards[1].unlink()
    with pytest.raises(ModelError, match=r"names 2 shards, but .*00002-of-00002.safetensors is not there"):
        find_weights(tmp_path, None)


def test_shard_outside_the_folder_is_refused(tmp_path: Path) -> None:
    index = {"weight_map": {"weight": "../other/model.safetensors"}}
    (tmp_path / f"{STEM}.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="leaves that folder"):
        find_weights(tmp_path, None)


def test_index_without_weight_map(tmp_path: Path) -> None:
    (tmp_path / f"{STEM}.safetensors.index.json").write_text("{}")
    with pytest.raises(ModelError, match="no weight_map"):
        find_weights(tmp_path, None)


@pytest.mark.parametrize(
    ("cut", "message"), [(-1, "its header declares"), (40, "its header alone"), (3, "no safetensors")]
)
def test_truncated_file_is_named(tmp_path: Path, cut: int, message: str) -> None:
    file = _save(tmp_path / f"{STEM}.safetensors")
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(ModelError, match=f"{STEM}.safetensors.*{message}"):
        check_weights(find_weights(tmp_path, None))


def test_file_that_is_no_safetensors(tmp_path: Path) -> None:
    (tmp_path / f"{STEM}.safetensors").write_bytes(b"<html>not found</html>" * 10)
    with pytest.raises(ModelError, match="no safetensors header"):
        check_weights(find_weights(tmp_path, None))


def test_broken_header(tmp_path: Path) -> None:
    text = b'{"weight": 3}'
    (tmp_path / f"{STEM}.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(ModelError, match="broken safetensors header"):
        check_weights(find_weights(tmp_path, None))


def test_illegal_offsets_are_found_by_the_reader(tmp_path: Path) -> None:
    text = b'{"weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}'
    (tmp_path / f"{STEM}.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(ModelError, match="not a legal safetensors file"):
        check_weights(find_weights(tmp_path, None))


@pytest.mark.parametrize("name", [f"{STEM}.safetensors", f"{STEM}.bin"])
def test_git_lfs_pointer(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ModelError, match="git-lfs pointer; run `git lfs pull`"):
        check_weights(find_weights(tmp_path, None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_name_tensor_and_file(
    tmp_path: Path, dtype: torch.dtype, value: float
) -> None:
    bad = torch.ones(3, 3, dtype=dtype)
    bad[1, 2] = value
    _save(tmp_path / f"{STEM}.safetensors", good=torch.ones(2), bad=bad)
    with pytest.raises(ModelError, match=f"{STEM}.safetensors: tensor 'bad' holds -?(nan|inf)"):
        check_weights(find_weights(tmp_path, None))


def test_integers_and_empty_tensors_are_fine(tmp_path: Path) -> None:
    _save(tmp_path / "model.safetensors", ids=torch.arange(3), none=torch.empty(0), weight=torch.ones(2))
    check_weights(find_weights(tmp_path, None))


def test_stored_dtype_is_that_of_most_bytes(tmp_path: Path) -> None:
    half, single = torch.ones(100, dtype=torch.float16), torch.ones(10)
    _save(tmp_path / "model.safetensors", half=half, single=single)
    assert stored_dtype(find_weights(tmp_path, None)) == "fp16"
    torch.save({"half": half, "single": single}, tmp_path / f"{STEM}.bin")
    (tmp_path / "model.safetensors").unlink()
    assert stored_dtype(find_weights(tmp_path, None)) == "fp16"


def test_stored_dtype_refuses_float8(tmp_path: Path) -> None:
    _save(tmp_path / "model.safetensors", weight=torch.ones(8).to(torch.float8_e4m3fn))
    weights = find_weights(tmp_path, None)
    check_weights(weights)
    with pytest.raises(ModelError, match="stored as F8_E4M3"):
        stored_dtype(weights)


def test_file_without_tensors(tmp_path: Path) -> None:
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="holds no tensors"):
        stored_dtype(find_weights(tmp_path, None))


class _Attack:
    """A pickle that leaves a mark when it is executed."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("legacy", [False, True])
def test_pickle_with_code_is_refused_and_not_run(tmp_path: Path, legacy: bool) -> None:
    mark = tmp_path / "executed"
    state = {"weight": torch.ones(2), "attack": _Attack(mark)}
    torch.save(state, tmp_path / f"{STEM}.bin", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ModelError, match=f"{STEM}.bin is damaged or holds more than weights"):
        check_weights(find_weights(tmp_path, None))
    assert not mark.exists()


def test_bare_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(_Attack(mark), protocol=2))
    with pytest.raises(ModelError, match=r"pytorch_model.bin is (damaged|not a whole)"):
        check_weights(find_weights(tmp_path, None))
    assert not mark.exists()


def test_truncated_pickle(tmp_path: Path) -> None:
    file = tmp_path / f"{STEM}.bin"
    torch.save({"weight": torch.ones(1000)}, file)
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(ModelError, match=f"{STEM}.bin is (damaged|not a whole)"):
        check_weights(find_weights(tmp_path, None))


def test_pickle_of_something_else(tmp_path: Path) -> None:
    torch.save({"state_dict": {"weight": torch.ones(2)}}, tmp_path / f"{STEM}.bin")
    with pytest.raises(ModelError, match="not a dictionary of tensors"):
        check_weights(find_weights(tmp_path, None))


def test_pickled_weights_are_checked_for_nan(tmp_path: Path) -> None:
    torch.save({"bad": torch.tensor([1.0, float("nan")])}, tmp_path / f"{STEM}.bin")
    with pytest.raises(ModelError, match="tensor 'bad' holds nan"):
        check_weights(find_weights(tmp_path, None))


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is not JSON"), ("[1]", "holds a JSON list"), (None, "is missing")]
)
def test_read_json_says_what_is_wrong(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=f"config.json {message}"):
        read_json(tmp_path / "config.json")


def test_an_archive_that_unpacks_to_gigabytes_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "diffusion_pytorch_model.bin"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\0" * 150_000_000)
    with pytest.raises(ModelError, match=r"unpacks to 150 MB, which no checkpoint of PyTorch does"):
        check_weights(WeightFiles(files=(path,), pickled=True))
