"""The compiler passes, in the order in which they run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qdexport.passes.bias_in_product import BiasInProduct
from qdexport.passes.expand_group_norm import ExpandGroupNorm
from qdexport.passes.fold_adapters import FoldAdapters
from qdexport.passes.fold_reparam import FoldReparam
from qdexport.passes.fold_time_embedding import FoldTimeEmbedding
from qdexport.passes.guard_labels import GuardLabels
from qdexport.passes.legalize_types import LegalizeTypes
from qdexport.passes.lower_bitwidth import LowerBitwidth
from qdexport.passes.lower_log2 import LowerLog2
from qdexport.passes.lower_nvfp4 import LowerNvfp4
from qdexport.passes.lower_timestep_scale import LowerTimestepScale
from qdexport.passes.lower_zero_point import LowerZeroPoint
from qdexport.passes.merge_projections import MergeProjections
from qdexport.passes.plain_attention import PlainAttention
from qdexport.passes.precompute_bos import PrecomputeBos
from qdexport.passes.sequence_first import SequenceFirst
from qdexport.passes.share_quantizers import ShareQuantizers
from qdexport.passes.sink_cast import SinkCast
from qdexport.passes.split_shortcut import SplitShortcut

if TYPE_CHECKING:
    from qdexport.graph.runner import FormPass, GraphPass

__all__ = ["DEFAULT_ORDER", "FLOATING_POINT", "FORM_PASSES", "default_passes", "floating_point_passes"]

DEFAULT_ORDER: tuple[type[GraphPass], ...] = (
    ShareQuantizers,
    SplitShortcut,
    FoldTimeEmbedding,
    GuardLabels,
    ExpandGroupNorm,
    PlainAttention,
    SequenceFirst,
    FoldAdapters,
    FoldReparam,
    PrecomputeBos,
    MergeProjections,
    LowerLog2,
    LowerNvfp4,
    LowerZeroPoint,
    LowerTimestepScale,
    SinkCast,
    LowerBitwidth,
    LegalizeTypes,
)

# those that have something to do in a network without quantizers and timestep
FLOATING_POINT: tuple[type[GraphPass], ...] = (
    ExpandGroupNorm,
    PlainAttention,
    SequenceFirst,
    BiasInProduct,
    LegalizeTypes,
)
# those that write an operator in one of several forms, which a table chooses; the first form is that of the export
FORM_PASSES: tuple[type[FormPass], ...] = (ExpandGroupNorm, PlainAttention, SequenceFirst)


def default_passes() -> list[GraphPass]:
    """One instance of every pass, in order."""
    return [graph_pass() for graph_pass in DEFAULT_ORDER]


def floating_point_passes() -> list[GraphPass]:
    """The passes for a text encoder or a VAE, in order."""
    return [graph_pass() for graph_pass in FLOATING_POINT]
