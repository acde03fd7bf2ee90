"""Hostile model folders: configurations, weights, indexes, pickles, tokenizers, schedulers."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from typing import TYPE_CHECKING, Any

from reliability.hostile_run import Place, Row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

__all__ = ["ESCAPE", "JSONS", "PICKLES", "SAFETENSORS", "Evil", "model_rows", "zipped"]

_HUGE = 10**9
ESCAPE = "\x1b]0;owned\x07\u202e"
_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
# by file of the pipeline `nano`: keys of its configuration and hostile values
_UNET: dict[str, list[Any]] = {
    "block_out_channels": [[], 7, None, "x", [0], [-16], [16.5], [_HUGE], ["16"], [10**30], [16] * 1000],
    "norm_num_groups": [0, -1, 3, None, "8", 10**30],
    "layers_per_block": [0, -1, 10**6, 10**12, 1.5, "x", None],
    "sample_size": [_HUGE, [8, 8, 8], 0, -8, "8", [], 1.5, 10**30, None],
    "in_channels": [0, -3, _HUGE, "3", None, 4],
    "out_channels": [0, _HUGE, 4],
    "down_block_types": [[], ["Evil"], "DownBlock2D", [7], ["DownBlock2D"] * 3, [ESCAPE]],
    "attention_head_dim": [0, -8, _HUGE],
    "time_embedding_type": ["evil", 7],
    "freq_shift": ["x", 1e308],
    "act_fn": ["evil", 7, ESCAPE],
    "norm_eps": ["x", -1],
    "dropout": [2, "x"],
    "num_class_embeds": [_HUGE, -1, "x"],
    "class_embed_type": ["evil"],
    "_class_name": ["Evil", 7, None, ESCAPE, "AutoencoderKL", "../UNet2DModel"],
    "quantization_config": [{}, {"quant_method": "evil"}, 7],
}
_SCHEDULER: dict[str, list[Any]] = {
    "prediction_type": ["evil", 7, None, ESCAPE],
    "beta_schedule": ["evil", None],
    "beta_start": ["x", 2, -1, None],
    "trained_betas": [[[1], [2]], [], "x", [0.1] * 3],
    "num_train_timesteps": [0, -1, _HUGE, 10**12, "x", None, 1.5],
    "timestep_spacing": ["evil", 7],
    "steps_offset": [-100, _HUGE, "x"],
    "_class_name": ["EvilScheduler", 7, "UNet2DModel"],
    "clip_sample_range": ["x"],
    "thresholding": ["x"],
}
_INDEX: dict[str, list[Any]] = {
    "_class_name": ["Evil", None, ["a", "b"], 7, ESCAPE, "UNet2DModel", "__name__"],
    "unet": [None, [], ["diffusers"], ["evil", "UNet2DModel"], ["diffusers", "Evil"], ["../x", "UNet2DModel"],
             ["diffusers", "UNet2DModel", "x"], 7, ["os", "system"], ["diffusers", ESCAPE]],
    "scheduler": [[], ["diffusers", "Evil"], [None, None], ["os", "system"], ["builtins", "exec"], ["evil", "X"], "x"],
    "extra": [["diffusers", "AutoencoderKL"], ["evil_module", "X"], ["os", "system"], [ESCAPE, ESCAPE], {"a": 1}],
    "../../evil": [["diffusers", "AutoencoderKL"]],
}  # fmt: skip
_VAE: dict[str, list[Any]] = {
    "latent_channels": [_HUGE, 0, 3, "x"],
    "block_out_channels": [[], [_HUGE], "x", [0]],
    "scaling_factor": [0, "x", None, 1e400],
    "norm_num_groups": [0],
    "_class_name": ["Evil", "UNet2DModel"],
}
_TEXT: dict[str, list[Any]] = {
    "hidden_size": [_HUGE, 0, 7, "x"],
    "vocab_size": [_HUGE, 0, 3],
    "num_hidden_layers": [10**6, 0, -1, "x"],
    "num_attention_heads": [0, 3],
    "max_position_embeddings": [_HUGE, 0, 5],
    "hidden_act": ["evil", 7],
    "architectures": [["Evil"], 7],
    "model_type": ["evil", ESCAPE],
    "auto_map": [{"AutoModel": "evil.Evil"}],
}
JSONS: dict[str, str | bytes] = {
    "empty": "", "no JSON": "{", "a list": "[]", "a number": "7", "null": "null", "an empty object": "{}",
    "nested 100,000 levels": '{"a":' + "[" * 100_000 + "]" * 100_000 + "}",
    "a number of 5000 digits": '{"a":' + "9" * 5000 + "}", "NaN": '{"a": NaN, "_class_name": NaN}',
    "not UTF-8": b'{"a": "\xe9"}', "UTF-16": '{"a": 1}'.encode("utf-16"), "NUL bytes": b"\0" * 64,
    "a byte order mark alone": b"\xef\xbb\xbf", "keys twice": '{"_class_name": "Evil", "_class_name": 7}',
    "a lone surrogate": '{"_class_name": "\\ud800"}',
}  # fmt: skip


def _header(entries: Any, data: bytes = b"\0" * 64, length: int | None = None) -> bytes:
    raw = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


_ENTRY = {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}
SAFETENSORS: dict[str, bytes] = {
    "empty": b"", "seven bytes": b"1234567", "a header of 2**63 bytes": struct.pack("<Q", 2**63) + b"{}",
    "a header of 99 MB that is not there": struct.pack("<Q", 99_000_000) + b"{}", "no JSON": _header(b"{"),
    "a list": _header([]), "no tensors": _header({}), "a tensor that is a list": _header({"w": []}),
    "no offsets": _header({"w": {"dtype": "F32", "shape": [4, 4]}}),
    "offsets that are text": _header({"w": {**_ENTRY, "data_offsets": ["a", "b"]}}),
    "offsets backwards": _header({"w": {**_ENTRY, "data_offsets": [64, 0]}}),
    "negative offsets": _header({"w": {**_ENTRY, "data_offsets": [-64, 0]}}),
    "offsets beyond the file": _header({"w": {**_ENTRY, "data_offsets": [0, 10**15]}}),
    "offsets of 10**30": _header({"w": {**_ENTRY, "data_offsets": [0, 10**30]}}),
    "tensors that overlap": _header({"a": _ENTRY, "b": _ENTRY}),
    "a shape of 10**18": _header({"w": {**_ENTRY, "shape": [10**9, 10**9]}}),
    "a negative shape": _header({"w": {**_ENTRY, "shape": [-4, -4]}}),
    "an unknown type": _header({"w": {**_ENTRY, "dtype": "EVIL"}}),
    "a type that is a list": _header({"w": {**_ENTRY, "dtype": []}}),
    "nested 50,000 levels": _header(b"[" * 50_000), "a number of 5000 digits": _header(b'{"a":' + b"9" * 5000 + b"}"),
    "names that drive the terminal": _header({ESCAPE: _ENTRY}), "other tensors": _header({"w": _ENTRY}),
    "a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "a web page": b"<!DOCTYPE html><html>404</html>", "a zip file": b"PK\x03\x04" + b"\0" * 100,
}  # fmt: skip


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch RAN",)


def _bomb(name: str) -> bytes:
    """A checkpoint of PyTorch's form whose one record unpacks to 4 GB."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open(name, "w", force_zip64=True) as record:
            for _ in range(256):
                record.write(b"\0" * (16 << 20))
        archive.writestr("a/version", "3\n")
    return stream.getvalue()


PICKLES: dict[str, Callable[[], bytes]] = {
    "a pickle that runs a command": lambda: pickle.dumps({"w": Evil()}),
    "a pickle of a list": lambda: pickle.dumps([1, 2]), "a pickle of text": lambda: pickle.dumps({"w": "x"}),
    "empty": lambda: b"", "random bytes": lambda: bytes(range(256)), "cut short": lambda: pickle.dumps({"w": 1})[:-3],
    "a pickle nested 100,000 levels": lambda: b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "a pickle with a string of 2**62 bytes": lambda: b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"x.",
    "an empty zip file": lambda: b"PK\x05\x06" + b"\0" * 18,
    "a zip file without data.pkl": lambda: zipped({"a/x": b"1"}),
    "a zip file whose data.pkl runs a command": lambda: zipped({"a/data.pkl": pickle.dumps({"w": Evil()})}),
    "a zip file whose data.pkl is no pickle": lambda: zipped({"a/data.pkl": b"\xff" * 50, "a/version": b"3\n"}),
    "a zip file upwards": lambda: zipped({"../../evil/data.pkl": pickle.dumps({}), "../../evil/version": b"3\n"}),
    "a zip bomb of 4 GB": lambda: _bomb("a/data.pkl"),
}  # fmt: skip


def zipped(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return stream.getvalue()


_SHARDS: dict[str, Any] = {
    "no weight_map": {}, "weight_map: []": {"weight_map": []}, "weight_map: a text": {"weight_map": "x"},
    "a shard upwards": {"weight_map": {"a": "../../../etc/passwd"}}, "a shard with a root": {"weight_map": {"a": "/x"}},
    "a shard that is not there": {"weight_map": {"a": "none.safetensors"}}, "a shard that is a list":
    {"weight_map": {"a": ["x"]}}, "a shard that is a dot": {"weight_map": {"a": "."}}, "a shard with a NUL":
    {"weight_map": {"a": "a\0b"}}, "a shard with an escape": {"weight_map": {"a": f"{ESCAPE}.safetensors"}},
    "a shard that is the folder": {"weight_map": {"a": ".."}}, "a shard that is its configuration":
    {"weight_map": {"a": "config.json"}},
}  # fmt: skip
_TOKENIZER: dict[str, tuple[str, str | bytes]] = {
    **{f"tokenizer.json: {what}": ("tokenizer/tokenizer.json", text) for what, text in list(JSONS.items())[:9]},
    **{f"tokenizer_config.json: {what}": ("tokenizer/tokenizer_config.json", text) for what, text in
       list(JSONS.items())[:9]},
    "tokenizer_class: Evil": ("tokenizer/tokenizer_config.json", '{"tokenizer_class": "Evil"}'),
    "tokenizer_config.json: auto_map": (
        "tokenizer/tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["e.E", 1]}}'),
    "model_max_length: -1": ("tokenizer/tokenizer_config.json",
                             '{"tokenizer_class": "CLIPTokenizer", "model_max_length": -1}'),
    "model_max_length: 10**30": ("tokenizer/tokenizer_config.json",
                                 '{"tokenizer_class": "CLIPTokenizer", "model_max_length": 1' + "0" * 30 + "}"),
}  # fmt: skip
_MODEL = (3,)
_MAY_WORK = (0, 2, 3)


def model_rows() -> Iterator[Row]:
    """Model folders as `quantize` reads them: `nano`, or the whole Stable Diffusion pipeline."""
    for seed, file, table in (
        ("nano", "unet/config.json", _UNET), ("nano", "scheduler/scheduler_config.json", _SCHEDULER),
        ("nano", "model_index.json", _INDEX), ("sd", "vae/config.json", _VAE),
        ("sd", "text_encoder/config.json", _TEXT),
    ):  # fmt: skip
        for key, values in table.items():
            for value in values:
                yield _row(file, f"{key}: {_short(value)}", _changed(seed, file, key, value), _MAY_WORK)
    for file in ("unet/config.json", "scheduler/scheduler_config.json", "model_index.json"):
        for what, text in JSONS.items():
            harmless = file.startswith("scheduler") and what in {"an empty object", "a lone surrogate"}
            codes = _MAY_WORK if harmless else _MODEL
            yield _row(file, what, _replaced("nano", file, text), codes)
    for what, data in SAFETENSORS.items():
        yield _row(_WEIGHTS, what, _replaced("nano", _WEIGHTS, data), _MODEL)
    for what, make in PICKLES.items():
        yield _row("diffusion_pytorch_model.bin", what, _pickled(make), _MODEL)
    for what, index in _SHARDS.items():
        yield _row("index of shards", what, _sharded(index), _MODEL)
    for what, (file, text) in _TOKENIZER.items():
        yield _row("tokenizer", what, _replaced("sd", file, text), _MAY_WORK)
    yield from _odd_folders()


def _row(group: str, what: str, make: Any, codes: tuple[int, ...]) -> Row:
    return Row(group=group, what=what, make=make, codes=codes)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 40 else f"{text[:25]}... ({len(text)} letters)"


def _changed(seed: str, file: str, key: str, value: Any) -> Any:
    def make(place: Place) -> list[object]:
        model = place.copy(seed)
        path = model / file
        path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
        return place.quantize(model)

    return make


def _replaced(seed: str, file: str, content: str | bytes) -> Any:
    def make(place: Place) -> list[object]:
        model = place.copy(seed)
        place.write(f"{seed}/{file}", content)
        return place.quantize(model)

    return make


def _pickled(content: Callable[[], bytes]) -> Any:
    def make(place: Place) -> list[object]:
        model = place.copy("nano")
        (model / _WEIGHTS).unlink()
        (model / "unet/diffusion_pytorch_model.bin").write_bytes(content())
        return place.quantize(model)

    return make


def _sharded(index: Any) -> Any:
    def make(place: Place) -> list[object]:
        model = place.copy("nano")
        (model / _WEIGHTS).unlink()
        (model / f"{_WEIGHTS}.index.json").write_text(json.dumps(index))
        return place.quantize(model)

    return make


def _odd_folders() -> Iterator[Row]:
    def change(what: str, function: Callable[[Path], Any], codes: tuple[int, ...] = _MODEL, seed: str = "nano") -> Row:
        def make(place: Place) -> list[object]:
            model = place.copy(seed)
            function(model)
            return place.quantize(model)

        return _row("model folder", what, make, codes)

    def nine_channels(model: Path) -> None:
        from qdexport.models.synthetic import random_unet

        unet: Any = random_unet("tiny_sd", in_channels=9)
        unet.save_pretrained(model / "unet")

    def with_values(value: float) -> Callable[[Path], None]:
        def write(model: Path) -> None:
            import torch
            from safetensors.torch import load_file, save_file

            tensors = load_file(model / _WEIGHTS)
            filled = {name: torch.full(tuple(tensors[name].shape), value) for name in tensors}
            save_file(filled, model / _WEIGHTS)

        return write

    yield change("a UNet of nine channels in a text-to-image pipeline", nine_channels, seed="sd")
    yield change("weights of NaN", with_values(float("nan")))
    yield change("weights of infinity", with_values(float("inf")))
    yield change("weights of 3e38", with_values(3e38), _MAY_WORK)
    yield change("weights of 0", with_values(0.0), _MAY_WORK)
    yield change("a file whose name is not UTF-8", lambda d: open(os.fsencode(d) + b"/caf\xe9.txt", "w").close(), (0,))
    yield change("a file whose name drives the terminal", lambda d: (d / f"{ESCAPE}.txt").touch(), (0,))
    yield change("code of its own", lambda d: (d / "pipeline.py").write_text("open('RAN', 'w')"), (0,))
    yield change("no scheduler folder", lambda d: __import__("shutil").rmtree(d / "scheduler"))
    yield change("no weights", lambda d: (d / _WEIGHTS).unlink())
    yield change("a variant alone", lambda d: (d / _WEIGHTS).rename(d / _WEIGHTS.replace("model.", "model.\x1b[2J.")))
    yield change("a link to itself in place of weights", lambda d: _link(d / _WEIGHTS, d / _WEIGHTS))
    yield change("a link in a circle beside the weights", lambda d: (d / "unet" / "loop").symlink_to(d), (0,))
    yield change("no vocabulary", lambda d: (d / "tokenizer/tokenizer.json").unlink(), _MAY_WORK, seed="sd")
    yield change(
        "an empty text encoder", lambda d: _emptied(d / "text_encoder"), seed="sd"
    )


def _emptied(folder: Path) -> None:
    for item in folder.iterdir():
        item.unlink()


def _link(path: Path, to: Path) -> None:
    path.unlink()
    path.symlink_to(to)
