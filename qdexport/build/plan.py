"""Reads the kernel plan of an engine from the builder's verbose log.

With detailed profiling verbosity the log holds one section ``Layers:`` with a line per kernel: its type, its
tensors with their data types, and the ONNX nodes that it came from. An engine for several compute
capabilities has one plan for all of them. The section is the only view of an engine that needs no GPU.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from math import prod

from qdexport.core.layer_names import node_names
from qdexport.core.results import KernelFact, Plan
from qdexport.errors import BuildError

__all__ = [
    "COMPUTE_KINDS",
    "KernelCounts",
    "PlanTensor",
    "compute_precision",
    "engine_coverage",
    "frozen_tensors",
    "is_fused_attention",
    "kernel_counts",
    "parse_plan",
    "plan_tensors",
    "quantizes_only",
    "weight_order",
]

# kernels that multiply matrices: those of TensorRT-RTX 1.7, and what published logs of TensorRT 10 show
_RTX_COMPUTE = {"correlation", "gemm", "deconv", "runtime_fusion"}
_TRT10_COMPUTE = {"fusion", "CaskConvolution", "CaskConvActPool", "CaskDeconvolution", "MatrixMultiply"}
COMPUTE_KINDS = frozenset(_RTX_COMPUTE | _TRT10_COMPUTE)
_STREAM_KINDS = frozenset({"signal", "wait"})
_FUSED_KINDS = frozenset({"runtime_fusion", "fusion"})

_DTYPES = {
    "Float": "fp32",
    "FP32": "fp32",
    "Half": "fp16",
    "FP16": "fp16",
    "BFloat16": "bf16",
    "BF16": "bf16",
    "FP8": "fp8",
    "FP4": "nvfp4",
    "FP4E2M1": "nvfp4",
    "Int8": "int8",
    "INT8": "int8",
    "Int4": "int4",
    "INT4": "int4",
}
# from the best that a plan can promise to the worst
_ORDER = ("int4", "nvfp4", "int8", "fp8", "fp16", "bf16", "fp32")
_NARROW = frozenset({"int4", "nvfp4", "int8", "fp8"})

_HEAD = re.compile(r"Name: (?P<name>.*?), LayerType: (?P<kind>[^,]+), ")
_TENSOR = re.compile(
    r"\{ Name: (?P<name>.*?), (?:Location: \w+, )?Dimensions: \[(?P<dims>[^\]]*)\],"
    r"(?P<rest>.*?) \}(?=, \{|\])"
)
_DTYPE = re.compile(r"Datatype: (?P<dtype>[^,]+)")
_WEIGHTS = re.compile(r'Weights: \{"Type": "(?P<dtype>\w+)", "Count": (?P<count>\d+)\}')
_TACTIC = re.compile(r"TacticName: (?P<tactic>[^,]*),")
_SECTIONS = ("Inputs", "Constants", "Outputs")
_NODE = "[ONNX Layer: "
_NODE_END = re.compile(r"\]\x1f?(?=\[ONNX Layer: |$)")

# an epilogue's name begins with its own Mul, so a name that begins like this does nothing else
_QUANTIZE_ONLY = re.compile(
    r"_*myl_(?:Resh|Tran|Move|Conc)*(?:Cast)?(?:Mul|Div)(?:MinMax|MaxMin)?Roun(?:Cast)?(?:Resh|Tran|Move)*_"
)
_ATTENTION = "_gemm_mha"
# TensorRT and TensorRT-RTX compile the graph once per optimization profile and mark all copies but the first
_PROFILE = re.compile(r" \[profile (\d+)\]")
_SUBGRAPH = re.compile(r"_myl(\d+)_\d+$")
_STORED_WEIGHTS = "weights"  # what TensorRT 10 lists as a number of elements


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanTensor:
    """One operand of a kernel; ``dtype`` is int8, fp16 and so on, a dimension of -1 is dynamic."""

    name: str
    dtype: str
    dims: tuple[int, ...]
    constant: bool

    def __str__(self) -> str:
        shape = ",".join(str(dim) for dim in self.dims)
        return f"{'const ' if self.constant else ''}{self.dtype}[{shape}] {self.name}"

    @classmethod
    def parse(cls, text: str) -> PlanTensor:
        """The inverse of ``str``."""
        constant = text.startswith("const ")
        dtype, _, rest = text.removeprefix("const ").partition("[")
        dims, _, name = rest.partition("] ")
        return cls(name=name, dtype=dtype, dims=tuple(int(dim) for dim in dims.split(",") if dim), constant=constant)


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelCounts:
    """What a plan consists of.

    Attributes:
        kernels: entries without stream signals and waits.
        by_type: the same by the builder's own kinds.
        int8_compute: convolutions and matrix products with constant weights whose operands are both integers.
        fp8_compute: those whose operands are both FP8.
        nvfp4_compute: those whose operands are both NVFP4.
        fp_compute: those that compute in a wider floating-point type.
        attention_kernels: fused attention, and matrix products of two activations.
        quantize_only: pointwise kernels that do nothing but quantize.
    """

    kernels: int
    by_type: dict[str, int]
    int8_compute: int
    fp8_compute: int
    nvfp4_compute: int
    fp_compute: int
    attention_kernels: int
    quantize_only: int


def parse_plan(log: str, target: str) -> Plan:
    """Reads the ``Layers:`` section of a verbose build log.

    Args:
        log: the whole log.
        target: the target's name, for the record.

    Raises:
        BuildError: the log has no such section, more than one, or a line of it cannot be read.
    """
    lines = log.split("\n")
    starts = [number for number, line in enumerate(lines) if line.endswith("Layers:")]
    if len(starts) != 1:
        raise BuildError(
            f"the build log holds {len(starts)} kernel plans instead of one, so the engine cannot be "
            "audited: this version of the builder is not known to qdexport; use the versions in "
            "constraints.txt"
        )
    entries = list(takewhile(lambda line: line.startswith("Name: "), lines[starts[0] + 1 :]))
    kernels = [_kernel(index, line) for index, line in enumerate(entries)]
    profiles = _profiles([kernel.name for kernel in kernels], entries)
    return Plan(
        target=target,
        kernels=[
            kernel.model_copy(update={"profile": profile}) for kernel, profile in zip(kernels, profiles, strict=True)
        ],
    )


def plan_tensors(texts: Iterable[str]) -> tuple[PlanTensor, ...]:
    """The operands of a kernel, from ``KernelFact.inputs`` or ``KernelFact.outputs``."""
    return tuple(PlanTensor.parse(text) for text in texts)


def kernel_counts(plan: Plan) -> KernelCounts:
    """Counts the kernels of a plan by what they do."""
    kernels = [kernel for kernel in plan.kernels if kernel.kind not in _STREAM_KINDS]
    frozen = frozen_tensors(kernels)
    weighted: list[str] = []
    attention = 0
    for kernel in kernels:
        if is_fused_attention(kernel):
            attention += 1
        elif kernel.kind in COMPUTE_KINDS:
            if any(tensor.name in frozen for tensor in _operands(kernel)):
                weighted.append(compute_precision(kernel))
            else:
                attention += 1
    by_precision = Counter("int8" if precision == "int4" else precision for precision in weighted)
    return KernelCounts(
        kernels=len(kernels),
        by_type=dict(sorted(Counter(kernel.kind for kernel in kernels).items())),
        int8_compute=by_precision["int8"],
        fp8_compute=by_precision["fp8"],
        nvfp4_compute=by_precision["nvfp4"],
        fp_compute=sum(count for precision, count in by_precision.items() if precision not in _NARROW),
        attention_kernels=attention,
        quantize_only=sum(quantizes_only(kernel) for kernel in kernels),
    )


def engine_coverage(plan: Plan, layers: Sequence[str]) -> dict[str, str]:
    """The compute type of each layer in the compiled plan.

    A layer's kernel is the matrix kernel that names the node ``<layer>/Conv``, ``<layer>/MatMul`` or
    ``<layer>/Gemm``; a merged kernel counts for each of its layers. A layer of a single row may have become
    part of a pointwise kernel, which computes in floating point. With several kernels (one per optimization
    profile) the worst counts.

    Args:
        plan: the plan.
        layers: names of layers, or of their parts (``name#0``).

    Returns:
        ``int8``, ``int4``, ``fp8``, ``fp16``, ``bf16`` or ``fp32`` for each layer, ``missing`` for one
        without kernel.
    """
    by_node: dict[str, list[KernelFact]] = {}
    for kernel in plan.kernels:
        for name in (name for node in kernel.nodes for name in node_names(node)):
            by_node.setdefault(name, []).append(kernel)
    found: dict[str, str] = {}
    for layer in layers:
        kernels = [kernel for op in ("Conv", "MatMul", "Gemm") for kernel in by_node.get(f"{layer}/{op}", ())]
        matrix = [kernel for kernel in kernels if kernel.kind in COMPUTE_KINDS]
        precisions = [compute_precision(kernel) for kernel in matrix] or list(map(_pointwise_precision, kernels))
        found[layer] = _worst(precisions) if precisions else "missing"
    return found


def _kernel(index: int, line: str) -> KernelFact:
    head = _HEAD.match(line)
    if head is None:
        raise BuildError(
            f"cannot read kernel {index} of the build log: {line[:120]!r}; this version of the builder is "
            "not known to qdexport; use the versions in constraints.txt"
        )
    body, _, metadata = line[head.end() :].partition(", Metadata: ")
    inputs = _tensors(body, "Inputs", constant=False) + _tensors(body, "Constants", constant=True)
    if weights := _WEIGHTS.search(body):
        dtype = _DTYPES.get(weights["dtype"], weights["dtype"])
        inputs.append(PlanTensor(name=_STORED_WEIGHTS, dtype=dtype, dims=(int(weights["count"]),), constant=True))
    tactic = _TACTIC.search(body)
    nodes = _nodes(metadata)
    return KernelFact(
        index=index,
        name=head["name"],
        kind=head["kind"],
        inputs=[str(tensor) for tensor in inputs],
        outputs=[str(tensor) for tensor in _tensors(body, "Outputs", constant=False)],
        tactic=tactic["tactic"] if tactic else "",
        nodes=nodes,
        modules=list(dict.fromkeys(module_of(name) for node in nodes for name in node_names(node))),
    )


def _subgraph(name: str) -> str:
    """The builder's number for the compiled graph that a kernel is part of."""
    found = _SUBGRAPH.search(name)
    return found[1] if found else ""


def _profiles(names: Sequence[str], lines: Sequence[str]) -> list[int]:
    """The optimization profile of every kernel, counted from 0: what it or another of its compiled graph says."""
    said: dict[str, int] = {}
    for name, line in zip(names, lines, strict=True):
        if marked := _PROFILE.search(line):
            said[_subgraph(name)] = int(marked[1])
    return [said.get(_subgraph(name), 0) for name in names]


def module_of(node: str) -> str:
    """The torch module path of an ONNX node name; the parts of a split layer belong to one module."""
    return re.sub(r"#\d+(?=\.|$)", "", node.rpartition("/")[0])


def _tensors(body: str, section: str, *, constant: bool) -> list[PlanTensor]:
    start = body.find(f"{section}: [")
    if start < 0:
        return []
    ends = [body.find(f"{other}: [", start + 1) for other in _SECTIONS] + [body.find("TacticName:", start)]
    text = body[start : min((end for end in ends if end > 0), default=len(body))]
    found = []
    for match in _TENSOR.finditer(text):
        dtype = _DTYPE.search(match["rest"])
        dims = tuple(int(dim) for dim in match["dims"].split(",") if dim)
        name = match["name"]
        # TensorRT 10 lists constants among the inputs and marks them by name only
        is_constant = constant or re.search(r"_dconst|const-lit|_constant", name) is not None
        found.append(
            PlanTensor(name=name, dtype=_dtype_name(dtype["dtype"]) if dtype else "", dims=dims, constant=is_constant)
        )
    return found


def _dtype_name(text: str) -> str:
    # "Half", or in older builders "Row major linear FP16 format"
    return next((_DTYPES[word] for word in text.split() if word in _DTYPES), text.lower())


def _nodes(metadata: str) -> list[str]:
    metadata = _PROFILE.sub("", metadata)
    # the builder puts \x1f between the parts; a log that was copied as text may have lost it
    parts = [part.removeprefix(_NODE) for part in _NODE_END.split(metadata.strip()) if part.startswith(_NODE)]
    # what it made of a node it marks behind the name: "post_quant_conv/Conv]__gemm_from_conv1x1"
    return list(dict.fromkeys(part.partition("]__")[0] for part in parts))


def _operands(kernel: KernelFact) -> tuple[PlanTensor, ...]:
    """The two factors of a matrix kernel: scales, biases and the like are left out."""
    tensors = plan_tensors(kernel.inputs)
    activations = tuple(tensor for tensor in tensors if not tensor.constant)
    # constants come in any order, and behind a bias that is computed; the weight is the largest, or the one in NVFP4
    weight = max((tensor for tensor in tensors if tensor.constant), key=weight_order, default=None)
    if kernel.kind in _FUSED_KINDS:
        return activations[:2] if weight is None else (*activations[:1], weight)
    return tensors[:2] if weight is None or not _is_weight(weight) else (*activations[:1], weight)


def weight_order(constant: PlanTensor) -> tuple[bool, int]:
    """Sorts the constants of a kernel so that its weight is last: NVFP4's scales of blocks are padded to tiles, which
    may be larger than a small weight.
    """
    return constant.dtype == "nvfp4", prod(constant.dims)


def _is_weight(constant: PlanTensor) -> bool:
    """Whether a constant is more than numbers per channel: it has two dimensions, or the builder calls it weights."""
    return constant.name == _STORED_WEIGHTS or prod(constant.dims) > max(constant.dims, default=1)


def compute_precision(kernel: KernelFact) -> str:
    """The type in which a matrix kernel multiplies."""
    types = {tensor.dtype for tensor in _operands(kernel)}
    outputs = {tensor.dtype for tensor in plan_tensors(kernel.outputs)}
    if kernel.kind in _FUSED_KINDS and types <= _NARROW and "Cast" in kernel.name.partition("Fc")[0]:
        # `CastMulCastFc` takes integers, dequantizes them and multiplies floats
        return _worst(outputs - _NARROW or {"fp32"})
    if types <= {"int8", "int4"} and len(types) > 1:
        return "int8"
    return _worst(types - _NARROW or types)


def _pointwise_precision(kernel: KernelFact) -> str:
    """The type of the weight, which is the largest constant; a narrow one is dequantized first."""
    constants = [tensor for tensor in plan_tensors(kernel.inputs) if tensor.constant]
    outputs = {tensor.dtype for tensor in plan_tensors(kernel.outputs)}
    weight = max(constants, key=lambda tensor: prod(tensor.dims)).dtype if constants else ""
    return weight if weight and weight not in _NARROW else _worst(outputs - _NARROW or {"fp32"})


def _worst(precisions: Iterable[str]) -> str:
    # an unknown type is worse than any known one: it must be seen
    return max(precisions, key=lambda name: _ORDER.index(name) if name in _ORDER else len(_ORDER))


def frozen_tensors(kernels: Sequence[KernelFact]) -> set[str]:
    """Names of tensors that depend on no network input: constants, and what kernels make of them alone."""
    frozen: set[str] = set()
    for kernel in kernels:
        inputs = plan_tensors(kernel.inputs)
        frozen |= {tensor.name for tensor in inputs if tensor.constant}
        if inputs and all(tensor.name in frozen for tensor in inputs):
            frozen |= {tensor.name for tensor in plan_tensors(kernel.outputs)}
    return frozen


def is_fused_attention(kernel: KernelFact) -> bool:
    """Whether a kernel is a whole attention, whatever kind the builder calls it."""
    return kernel.name.startswith(_ATTENTION)


def quantizes_only(kernel: KernelFact) -> bool:
    """Whether a pointwise kernel does nothing but quantize."""
    outputs = plan_tensors(kernel.outputs)
    return (
        kernel.kind == "kgen"
        and _QUANTIZE_ONLY.match(kernel.name) is not None
        and bool(outputs)
        and all(tensor.dtype in _NARROW for tensor in outputs)
    )
