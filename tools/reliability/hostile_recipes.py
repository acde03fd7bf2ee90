"""Hostile recipes, values of --set, and arguments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from reliability.hostile_run import RECIPE, Place, Row

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["recipe_rows"]

_HEAD = "schema_version: 1\nname: r\n"
_RULE = 'rules:\n  - {match: "*", weight: {bits: 8}, activation: {bits: 8}}\n'
_VALID = _HEAD + _RULE
_BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)
_MERGES = "a0: &a0 {k: 1}\n" + "".join(
    f"a{i + 1}: &a{i + 1} {{<<: [{', '.join([f'*a{i}'] * 9)}], k{i}: 1}}\n" for i in range(9)
)
_TEXTS: dict[str, str | bytes] = {
    "empty": "",
    "a list": "- a\n- b\n",
    "a number": "7",
    "null": "null",
    "two documents": _VALID + "---\n" + _VALID,
    "no rules": _HEAD,
    "rules: null": _HEAD + "rules:\n",
    "rules: []": _HEAD + "rules: []\n",
    "rules: a text": _HEAD + "rules: all\n",
    "a rule that is a number": _HEAD + "rules: [1]\n",
    "no name": _RULE,
    "not UTF-8": b"name: caf\xe9\n",
    "UTF-16": _VALID.encode("utf-16"),
    "NUL bytes": b"\x00" * 100,
    "random bytes": bytes(range(256)) * 4,
    "tabs as indent": "name: r\nrules:\n\t- {match: a}\n",
    "an unclosed bracket": "name: [r\n",
    "an unclosed quote": 'name: "r\n',
    "an undefined alias": "name: *nothing\n",
    "an alias of itself": "name: r\nrules: &a [*a]\n",
    "a billion laughs": _BOMB + _VALID,
    "a billion merges": _MERGES + _VALID,
    "nested 900 levels": "rules: " + "[" * 900 + "]" * 900 + "\n",
    "nested 100,000 levels": "rules: " + "[" * 100_000,
    "nested mappings": _HEAD + "rules: " + "{a: " * 400 + "1" + "}" * 400 + "\n",
    "the tag of a Python object": 'name: !!python/object/apply:os.system ["touch RAN"]\n' + _RULE,
    "an unknown tag": "name: !evil r\n" + _RULE,
    "binary": "name: !!binary abcd\n" + _RULE,
    "a set": _HEAD + "rules: !!set {a, b}\n",
    "a date that there is not": "name: 2024-13-45\n" + _RULE,
    "a description 2024-02-30": _VALID + "description: 2024-02-30\n",
    "a time with an impossible zone": "name: 2001-12-14t21:59:43.10-25:99\n" + _RULE,
    "a number of 5000 digits": _VALID + "calibration: {prompts: " + "9" * 5000 + "}\n",
    "a hexadecimal number without digits": _VALID + "calibration: {prompts: 0x_}\n",
    "a number to the base of 60": _VALID + "calibration: {prompts: " + "1:" * 3000 + "1}\n",
    "prompts: .inf": _VALID + "calibration: {prompts: .inf}\n",
    "prompts: .nan": _VALID + "calibration: {prompts: .nan}\n",
    "guidance_scale: .nan": _VALID + "calibration: {guidance_scale: .nan}\n",
    "guidance_scale: 1e999": _VALID + "calibration: {guidance_scale: 1.0e+999}\n",
    "max_ratio: .inf": _VALID + 'channel_scale: {match: "*", max_ratio: .inf}\n',
    "budget: .nan": _VALID + "activation_rows: {method: clustered, budget: .nan}\n",
    "weight_target: .nan": _VALID + "bit_allocation: {weight_target: .nan}\n",
    "prompts: 10**9": _VALID + "calibration: {prompts: 1000000000}\n",
    "prompts: -1": _VALID + "calibration: {prompts: -1}\n",
    "steps: 10**9": _VALID + "calibration: {steps: 1000000000}\n",
    "batch_size: 10**12": _VALID + "calibration: {batch_size: 1000000000000}\n",
    "seed: 10**30": _VALID + "calibration: {seed: 1" + "0" * 30 + "}\n",
    "images: 10**9": _VALID + "validation: {images: 1000000000}\n",
    "floor_seeds: 10**9": _VALID + "validation: {floor_seeds: 1000000000}\n",
    "golden: 10**9": _VALID + "validation: {golden: 1000000000}\n",
    "candidates: 10**12": _VALID + "bit_allocation: {candidates: 1000000000000}\n",
    "batch: 10**12": _VALID + "shapes: {batch: 1000000000000}\n",
    "height: 10**9": _VALID + "shapes: {height: 1000000000}\n",
    "batch: 0": _VALID + "shapes: {batch: 0}\n",
    "a thousand profiles": _VALID + "shapes: {profiles: [" + "{batch: 2}, " * 1000 + "]}\n",
    "bits: 1": _VALID.replace("bits: 8", "bits: 1"),
    "bits: 9": _VALID.replace("bits: 8", "bits: 9"),
    "bits: true": _VALID.replace("weight: {bits: 8}", "weight: {bits: [8]}"),
    "schema_version: 2": _VALID.replace("version: 1", "version: 2"),
    "re:(": _VALID.replace('"*"', '"re:("'),
    "re:a{99999999999999}": _VALID.replace('"*"', '"re:a{99999999999999}"'),
    "re: with 900 brackets": _VALID.replace('"*"', '"re:' + "(" * 900 + '"'),
    "a pattern of 100,000 letters": _VALID.replace('"*"', '"' + "*a" * 50_000 + '"'),
    "content: re:(": _VALID + 'bit_allocation: {content: ["re:("]}\n',
    "protect: a pattern of 100,000 stars": _VALID + 'bit_allocation: {protect: ["' + "*." * 50_000 + '"]}\n',
    "5 MB of comments": "# x\n" * 1_300_000 + _VALID,
    "a key that drives the terminal": _VALID + '"\\e]0;owned\\a": 1\n',
    "a key that turns the writing": _VALID + '"\\u202egnp.exe": 1\n',
    "a key with a line of its own": _VALID + '"x\\nError: none": 1\n',
    "a key of 100,000 letters": _VALID + "k" * 100_000 + ": 1\n",
    "a key that is a list": _VALID + "? [a, b]\n: 1\n",
    "a key that is a mapping": _VALID + "? {a: b}\n: 1\n",
    "a key that is a number": _VALID + "7: 1\n",
    "a value that is rich markup": _VALID + 'time_embedding: "[red]x[/]"\n',
    "companions: an unknown network": _VALID + "companions: {networks: [evil]}\n",
    "compute_capabilities: [[8]]": _VALID + "compute_capabilities: [[8]]\n",
}
_FINE: dict[str, str] = {
    "batch: [3, 2, 1] (refused with the model)": _VALID + "shapes: {batch: [3, 2, 1]}\n",
    "opset: 7 (targets have their own limits)": _VALID + "opset: 7\n",
    "a name that drives the terminal": _VALID.replace("name: r", 'name: "\\e]0;owned\\a"'),
    "a description of rich markup": _VALID + 'description: "[bold]x[/bold] [/]"\n',
    "a byte order mark": "\ufeff" + _VALID,
    "CRLF": _VALID.replace("\n", "\r\n"),
    "an alias that is used once": "x: &x {bits: 8}\n".replace("x: &x {bits: 8}\n", "")
    + _VALID.replace("weight: {bits: 8}, activation: {bits: 8}", "weight: &w {bits: 8}, activation: *w"),
}
_SETTINGS: dict[str, tuple[int, ...]] = {
    "rules.\u00b2.match=x": (2,), "rules.0.match=nothing": (2,), "rules.99.match=x": (2,), "rules.-1.match=x": (2,),
    "rules.x.match=y": (2,), "rules.99999999999999999999.match=x": (2,), "rules.0.match=re:([a-z_.0-9]+)+!": (2,),
    "rules.0.match=re:(.*)*(.*)*(.*)*\\3!": (2,), "name=2024-13-45": (2,), "name=[": (2,), "name=\x07": (2,),
    'bit_plan="a\\0b"': (2,), "bit_plan=/dev/zero": (2,), "bit_plan=.": (2,), "bit_plan=nowhere.yaml": (2,),
    "calibration.prompts_file=/dev/zero": (2,), "calibration.prompts_file=.": (2,),
    'calibration.prompts_file="\\0"': (2,), "calibration.prompts=0": (2,), "calibration.prompts=1e400": (2,),
    "calibration.steps=1000000000": (2, 3), "calibration.steps=1001": (2, 3), "calibration.prompts=1000000000": (2,),
    "calibration.batch_size=1000000000": (2,), "calibration.seed=18446744073709551616": (2,),
    "calibration.guidance_scale=.nan": (2,), "calibration.guidance_scale=.inf": (2,), "shapes.batch=1000000000": (2, 3),
    "shapes.height=1000000000": (2, 3), "shapes.batch=[1,2]": (0, 2, 3), "shapes.tokens=1000000000": (2, 3),
    "validation.images=1000000000": (2,), "validation.parity_steps=1000000000": (2,), "calibration=7": (2,),
    "calibration.x.y=7": (2,), "=7": (2,), "x": (2,), "a.b.c.d.e.f=1": (2,), ".=1": (2,), "name.x=1": (2,),
    "activation_rows.count=1000000000": (2,), "channel_scale.groups=1000000000": (2,),
    "channel_scale.max_ratio=.inf": (2,), "companions.networks=[vae_decoder]": (2, 3), "companions.networks=[[]]": (2,),
    "softmax.match=re:(": (2,), "x" * 100_000 + "=1": (2,), "name=" + "[" * 5000: (2,), "\x1b]0;owned\x07=1": (2,),
    "bit_allocation.protect=[nothing]": (2,), "bit_allocation.activation_bits=[1000000]": (2,),
    "bit_allocation.content_weight_bits=[0]": (2,), "compute_capabilities=['\x1b[2J']": (2, 7),
    "description=" + "x" * 200_000: (0, 2), "name='../../evil'": (0, 2), "validation.seed=-1": (2,),
}  # fmt: skip
_ARGUMENTS: dict[str, tuple[list[Any], tuple[int, ...]]] = {
    "no verb that there is": (["\x1b]0;owned\x07"], (2,)),
    "an option that there is not": (["compile", "shapes", "--\x1b[2Jevil"], (2,)),
    "no model": (["compile"], (2,)),
    "a model that is empty": (["quantize", "", "--out", "out"], (3,)),
    "a model that is a dot": (["quantize", ".", "--out", "out"], (3,)),
    "a model that is a root": (["quantize", "/", "--out", "out"], (3,)),
    "a model that is a device": (["quantize", "/dev/zero", "--out", "out"], (3,)),
    "a model of 5000 letters": (["quantize", "a" * 5000, "--out", "out"], (3,)),
    "a model with a NUL": (["quantize", "a\\0b", "--out", "out"], (3,)),
    "a model with an escape": (["quantize", "\x1b]0;owned\x07", "--out", "out"], (3,)),
    "a hub id with an escape": (["quantize", "owner/na\x1bme", "--out", "out"], (3,)),
    "a hub id upwards": (["quantize", "../..", "--out", "out"], (3,)),
    "a hub id with a revision upwards": (["quantize", "a/b@../../..", "--out", "out"], (3,)),
    "a recipe of 5000 letters": (["recipes", "a" * 5000 + ".yaml"], (2,)),
    "a recipe that is empty": (["recipes", ""], (2,)),
    "a recipe that is a folder": (["recipes", "./.yaml"], (2,)),
    "a recipe that there is not": (["recipes", "[red]w8a8[/]"], (2,)),
    "a pass that there is not": (["passes", "\x1b[2J"], (2,)),
    "an unknown target": (["compile", "shapes", "--target", "\x1b[2J"], (2,)),
    "an opset of 10**30": (["compile", "shapes", "--opset", "1" + "0" * 30, "--out", "out"], (2,)),
    "an opset of -1": (["quantize", "shapes", "--opset", "-1", "--out", "out"], (2,)),
    "a body that there is not": (["quantize", "shapes", "--body", "int1"], (2,)),
    "zero workers": (["sensitivity", "shapes", "--workers", "0", "--out", "out"], (2,)),
    "10**20 workers": (["sensitivity", "nowhere", "--workers", "1" + "0" * 20, "--out", "out"], (2, 3)),
    "--target-bits nan": (["allocate", "shapes", "--target-bits", "nan", "--out", "out"], (2,)),
    "--target-bits -1": (["allocate", "shapes", "--target-bits", "-1", "--out", "out"], (2,)),
    "--target-bits inf": (["allocate", "shapes", "--target-bits", "inf", "--out", "out"], (2,)),
    "--companions that there is not": (["quantize", "shapes", "--companions", "evil,\x1b[2J", "--out", "out"], (2,)),
    "--gpu that there is not": (["inspect", "x", "--gpu", "\x1b[2J"], (2, 3)),
    "--seed -1": (["sample", "shapes", "--seed", "-1"], (2,)),
    "--seed 10**30": (["sample", "shapes", "--seed", "1" + "0" * 30], (2,)),
    "--count 10**9": (["sample", "shapes", "--count", "1000000000"], (2,)),
    "--steps 10**9": (["sample", "shapes", "--steps", "1000000000", "--count", "1"], (2, 3)),
    "--guidance-scale nan": (["sample", "shapes", "--guidance-scale", "nan", "--count", "1"], (2, 3)),
    "--ray an address with an escape": (["sensitivity", "shapes", "--ray", "\x1b[2J", "--out", "out"], (9,)),
    "--explain with an escape": (["inspect", "nowhere", "--explain", "\x1b[2J"], (2, 3)),
    "--variant upwards": (["quantize", "shapes", "--variant", "../../x", "--out", "out"], (3,)),
    "--json of an error": (["quantize", "nowhere", "--out", "out", "--json"], (3,)),
    "--json of bad usage": (["quantize", "--json"], (2,)),
    "-vv of an error": (["recipes", "nowhere.yaml"], (2,)),
}


def recipe_rows() -> Iterator[Row]:
    """Recipes as `recipes FILE` reads them, values of --set, and arguments."""
    for what, text in _TEXTS.items():
        yield Row(group="recipe", what=what, make=_recipe(text), codes=(2,), says=("r.yaml",), seconds=60)
    for what, text in _FINE.items():
        yield Row(group="recipe", what=what, make=_recipe(text), codes=(0,), seconds=60)
    yield Row(group="recipe", what="a pattern that backtracks", make=_backtracks, codes=(2,), says=("takes more than",))
    for setting, codes in _SETTINGS.items():
        shown = setting if len(setting) < 50 else f"{setting[:20]}... ({len(setting)} letters)"
        yield Row(group="--set", what=repr(shown)[1:-1], make=_setting(setting), codes=codes)
    for what, (arguments, codes) in _ARGUMENTS.items():
        yield Row(group="arguments", what=what, make=_plain(arguments), codes=codes)


def _recipe(text: str | bytes) -> Any:
    return lambda place: ["recipes", place.write("r.yaml", text)]


def _backtracks(place: Place) -> list[object]:
    recipe = place.write("r.yaml", RECIPE.replace('"*"', '"re:([a-z_.0-9]+)+!"'))
    return ["quantize", place.seeds.nano, "--recipe", recipe, "--out", place.folder / "out"]


def _setting(setting: str) -> Any:
    return lambda place: place.quantize(place.seeds.nano, "--set", setting)


def _plain(arguments: list[Any]) -> Any:
    return lambda _: arguments
