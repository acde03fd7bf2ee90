"""The weight files of one component: which there are, and whether they are whole, finite and safe to read.

Everything is checked here, before diffusers sees the folder, so that a user reads which file is wrong.
Tensors are looked at one at a time through a memory map: a check costs one pass over the disk and no memory.
"""

from __future__ import annotations

import json
import logging
import math
import pickle
import re
import struct
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open

from qdexport.core.paths import below
from qdexport.core.reading import read_json_file, reading, reason
from qdexport.errors import ModelError

__all__ = [
    "WeightFiles",
    "check_weights",
    "find_weights",
    "open_safetensors",
    "read_json",
    "stored_dtype",
    "stored_extent",
    "variants_in",
]

logger = logging.getLogger(__name__)

# diffusers models, then transformers models; the second name of each is the pickled form
_STEMS: Final = (
    ("diffusion_pytorch_model", "diffusion_pytorch_model"),
    ("model", "pytorch_model"),
)
_SAFETENSORS_DTYPES: Final = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
_TORCH_DTYPES: Final = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_LFS_POINTER: Final = b"version https://git-lfs"
_REMEDY: Final = "download it again"
_UNPACKED: Final = 2
_HEADER_LIMIT: Final = 100_000_000  # the safetensors format's own limit


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFiles:
    """The files that hold one component's weights.

    Attributes:
        files: One file, or all shards of an index.
        pickled: Whether they are PyTorch pickles, not safetensors.
        index: The index of a sharded checkpoint, or None.
    """

    files: tuple[Path, ...]
    pickled: bool
    index: Path | None = None


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        ModelError: The file is missing, no JSON, or not an object.
    """
    if not path.exists():
        raise ModelError(f"{path} is missing; download the model again")
    value = read_json_file(path, ModelError, "download it again")
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a JSON {type(value).__name__}, expected an object with named fields")
    return value


def find_weights(folder: Path, variant: str | None) -> WeightFiles:
    """Finds the weights of a variant: safetensors before pickles, an index before a single file.

    Args:
        folder: A component's folder.
        variant: For instance `fp16` (`model.fp16.safetensors`); None for the files without a variant.

    Raises:
        ModelError: There are none (the message lists the variants there), or a shard of the index is missing.
    """
    for pickled in (False, True):
        for safe_stem, pickle_stem in _STEMS:
            stem, suffix = (pickle_stem, "bin") if pickled else (safe_stem, "safetensors")
            index = _first_file(folder, _index_names(stem, suffix, variant))
            if index is not None:
                return WeightFiles(files=_shards(index), pickled=pickled, index=index)
            single = _first_file(folder, (".".join(_with_variant([stem, suffix], variant)),))
            if single is not None:
                return WeightFiles(files=(single,), pickled=pickled)
    raise ModelError(_no_weights_message(folder, variant))


def variants_in(folder: Path) -> list[str]:
    """Names of the variants that a component folder has weights of, without the plain one."""
    stems = "|".join(sorted({re.escape(stem) for pair in _STEMS for stem in pair}))
    patterns = (
        rf"(?:{stems})\.([A-Za-z0-9_]+)(?:-\d+-of-\d+)?\.(?:safetensors|bin)",
        rf"(?:{stems})-\d+-of-\d+\.([A-Za-z0-9_]+)\.(?:safetensors|bin)",
    )
    matches = (re.fullmatch(pattern, item.name) for item in folder.iterdir() for pattern in patterns)
    return sorted({match[1] for match in matches if match is not None})


def stored_dtype(weights: WeightFiles, *, strict: bool = True) -> str:
    """The type of most weights on disk: `fp32`, `fp16` or `bf16`.

    Args:
        weights: The files.
        strict: Refuses other types (float8, integers); else their own names are returned.

    Raises:
        ModelError: There are no tensors, or most of them have another type.
    """
    sizes: Counter[str] = Counter()
    for path in weights.files:
        if weights.pickled:
            for tensor in _load_pickle(path).values():
                sizes[_TORCH_DTYPES.get(tensor.dtype, str(tensor.dtype))] += tensor.nbytes
        else:
            for entry in _read_header(path).values():
                begin, end = entry["data_offsets"]
                sizes[_SAFETENSORS_DTYPES.get(entry["dtype"], entry["dtype"])] += end - begin
    if not sizes:
        raise ModelError(f"{weights.files[0]} holds no tensors; download the model again")
    dtype, _ = sizes.most_common(1)[0]
    if strict and dtype not in _SAFETENSORS_DTYPES.values():
        raise ModelError(
            f"the weights in {weights.files[0].parent} are stored as {dtype}, not as fp32, fp16 or bf16; "
            "give torch_dtype to convert them while loading, or start from the unquantized checkpoint"
        )
    return dtype


def stored_extent(weights: WeightFiles) -> tuple[int, int]:
    """How many tensors and how many numbers the files hold.

    Raises:
        ModelError: a file is damaged.
    """
    tensors = numbers = 0
    for path in weights.files:
        if weights.pickled:
            shapes = [tuple(tensor.shape) for tensor in _load_pickle(path).values()]
        else:
            shapes = [tuple(entry["shape"]) for entry in _read_header(path).values()]
        tensors, numbers = tensors + len(shapes), numbers + sum(math.prod(shape) for shape in shapes)
    return tensors, numbers


def check_weights(weights: WeightFiles) -> None:
    """Reads every weight once and refuses files that are truncated or hold NaN or infinity.

    Raises:
        ModelError: Names the file, and the tensor where one is wrong.
    """
    for path in weights.files:
        count = 0
        for name, tensor in _tensors(path, pickled=weights.pickled):
            count += 1
            _check_finite(path, name, tensor)
        logger.debug("%s: %d tensors, all finite", path, count)


def _with_variant(parts: list[str], variant: str | None) -> list[str]:
    return parts if variant is None else [*parts[:-1], variant, parts[-1]]


def _index_names(stem: str, suffix: str, variant: str | None) -> tuple[str, ...]:
    if variant is None:
        return (f"{stem}.{suffix}.index.json",)
    # the second spelling is the one diffusers wrote before 0.31
    return (f"{stem}.{suffix}.index.{variant}.json", f"{stem}.{variant}.{suffix}.index.json")


def _first_file(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _shards(index: Path) -> tuple[Path, ...]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index} has no weight_map; download the model again")
    names = sorted({str(name) for name in weight_map.values()})
    # a model's files may be links to where a tool keeps their contents, in the model's own folder
    whole = index.parent.parent
    home = whole if (whole / "model_index.json").is_file() else None
    with reading(index, ModelError, _REMEDY, what="names shards that there cannot be"):
        shards = tuple(below(index.parent, name, index, home=home) for name in names)
        missing = [name for name, path in zip(names, shards, strict=True) if not path.is_file()]
    if missing:
        raise ModelError(
            f"{index} names {len(names)} shards, but {missing[0]} is not there "
            f"({len(missing)} missing); download the model again"
        )
    return shards


def _no_weights_message(folder: Path, variant: str | None) -> str:
    variants = variants_in(folder)
    listing = f"variants there: {', '.join(variants)}" if variants else "there are no variants"
    if variant is not None:
        return f"no weights of variant {variant!r} in {folder}; {listing}; or leave the variant out"
    names = " or ".join(f"{stem}.safetensors" for stem, _ in _STEMS)
    remedy = f"give variant={variants[0]!r}" if variants else "download the model again"
    return f"no weights in {folder} ({names}); {listing}; {remedy}"


def open_safetensors(path: Path, remedy: str = _REMEDY) -> Any:
    """An open safetensors file, a context manager; a pipe, which would never open, is refused.

    Raises:
        ModelError: it is no regular file, or its header is not whole.
    """
    if not path.is_file():
        raise ModelError(f"{path} is no file; {remedy}")
    _read_header(path, remedy)
    return safe_open(path, framework="pt")


def _tensors(path: Path, *, pickled: bool) -> Iterator[tuple[str, torch.Tensor]]:
    if pickled:
        yield from _load_pickle(path).items()
        return
    with (
        reading(path, ModelError, "download it again", what="is not a legal safetensors file"),
        open_safetensors(path) as reader,
    ):
        for name in reader.keys():  # noqa: SIM118 - a reader is not iterable
            yield name, reader.get_tensor(name)


def _read_header(path: Path, remedy: str = _REMEDY) -> dict[str, dict[str, Any]]:
    """The tensors that a safetensors file declares; refuses a file that is shorter or longer than it says."""
    _refuse_pointer(path)
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else _HEADER_LIMIT + 1
        if length > _HEADER_LIMIT:
            raise ModelError(f"{path} ({size} bytes) has no safetensors header; {remedy}")
        raw = stream.read(length)
    if len(raw) < length:
        raise ModelError(
            f"{path} is truncated: it has {size} bytes, its header alone {8 + length}; {remedy}"
        )
    with reading(path, ModelError, remedy, what="has a broken safetensors header"):
        header = json.loads(raw)
        if not isinstance(header, dict):
            raise ValueError(f"it is a JSON {type(header).__name__}, not an object")  # noqa: TRY004 - of the file
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        declared = 8 + length + max(map(_end_of, entries, entries.values()), default=0)
    if size < declared:
        raise ModelError(
            f"{path} is truncated: it has {size} bytes, its header declares {declared}; {remedy}"
        )
    return entries


def _end_of(name: str, entry: Any) -> int:
    """Where the numbers of a tensor end, counted from the header's end."""
    known = {"dtype": str, "shape": list, "data_offsets": list}
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), kind) for key, kind in known.items()):
        raise ValueError(f"tensor {name!r} has no dtype, shape and data_offsets")
    numbers = [*entry["shape"], *entry["data_offsets"]]
    if len(entry["data_offsets"]) != 2 or not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"tensor {name!r} has the shape {entry['shape']} at {entry['data_offsets']}")
    return int(entry["data_offsets"][1])


def _refuse_pointer(path: Path) -> None:
    with path.open("rb") as stream:
        if stream.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ModelError(f"{path} is a git-lfs pointer; run `git lfs pull` in {path.parent}")


def _refuse_bomb(path: Path) -> None:
    """Refuses an archive that unpacks to much more than it is; PyTorch does not compress."""
    if not zipfile.is_zipfile(path):
        return
    with reading(path, ModelError, _REMEDY, what="is not a whole PyTorch checkpoint"), zipfile.ZipFile(path) as archive:
        unpacked, size = sum(item.file_size for item in archive.infolist()), path.stat().st_size
    if unpacked > _UNPACKED * size + _HEADER_LIMIT:
        raise ModelError(
            f"{path} has {size / 1e6:,.1f} MB and unpacks to {unpacked / 1e6:,.0f} MB, which no checkpoint of PyTorch "
            "does; do not use it"
        )


def _load_pickle(path: Path) -> dict[str, torch.Tensor]:
    """A pickled state dict, through the unpickler that builds nothing but tensors and containers."""
    _refuse_pointer(path)
    _refuse_bomb(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        first_line = str(error).strip().splitlines()[0]
        raise ModelError(
            f"{path} is damaged or holds more than weights, and loading it could run code ({first_line}); "
            "convert it to safetensors where you trust it"
        ) from error
    except Exception as error:
        raise ModelError(f"{path} is not a whole PyTorch checkpoint ({reason(error)}); download it again") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ModelError(f"{path} is not a dictionary of tensors; save the model with save_pretrained")
    return state


def _check_finite(path: Path, name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    # aminmax makes no mask of the tensor's size, and NaN wins over every number; float8 has no kernel for it
    low, high = torch.aminmax(tensor if tensor.element_size() > 1 else tensor.float())
    for value in (low.item(), high.item()):
        if not math.isfinite(value):
            raise ModelError(f"{path}: tensor {name!r} holds {value}; take another checkpoint or variant")
