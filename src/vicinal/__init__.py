"""vicinal: adapt pretrained image and image-text embedding models to your own domain, and prove that it helped.

The public names, loaded when first used, so that `import vicinal` is quick. The whole way is `vicinal.run.run`: a
package cannot hold a module and a function of one name.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOMES = {
    "adapt": "models.adapters",
    "ArcFace": "losses",
    "average": "models.merging",
    "BitFit": "models.adapters",
    "Bottleneck": "models.adapters",
    "check": "data.check",
    "CosFace": "losses",
    "embed": "embedding",
    "embed_classes": "embedding",
    "embed_text": "embedding",
    "Embeddings": "types",
    "Encoder": "models.encoder",
    "Estimate": "types",
    "export": "serving.export",
    "fit": "training.loop",
    "Full": "models.adapters",
    "image_text": "evaluation.image_text",
    "ImageTextObjective": "training.image_text",
    "Index": "serving.index",
    "InfoNCE": "losses",
    "InputError": "types",
    "interpolate": "models.merging",
    "LabelObjective": "training.objectives",
    "LastBlocks": "models.adapters",
    "LinearHead": "models.adapters",
    "load_benchmark": "data.benchmarks",
    "load_encoder": "models.backbones",
    "load_glyphs": "data.glyphs",
    "LoRA": "models.adapters",
    "Manifest": "data.manifest",
    "Matcher": "serving.matching",
    "merge": "models.adapters",
    "NearestPrototype": "heads",
    "ObjectMatcher": "serving.objects",
    "OpenSetThreshold": "heads",
    "paired_difference": "evaluation.intervals",
    "Preprocess": "types",
    "prototypes": "evaluation.protocols",
    "ProxyAnchor": "losses",
    "read_coco": "data.sources",
    "read_folder": "data.sources",
    "read_hub": "data.sources",
    "read_shards": "data.sources",
    "read_table": "data.sources",
    "read_voc": "data.sources",
    "Recipe": "recipe",
    "report": "evaluation.report",
    "retrieval": "evaluation.protocols",
    "SigLIP": "losses",
    "TipAdapter": "heads",
    "VisualPrompt": "models.adapters",
    "write_shards": "data.sources",
    "zero_shot": "evaluation.image_text",
}

__all__ = sorted(_HOMES)

if TYPE_CHECKING:
    from vicinal.data.benchmarks import load_benchmark as load_benchmark
    from vicinal.data.check import check as check
    from vicinal.data.glyphs import load_glyphs as load_glyphs
    from vicinal.data.manifest import Manifest as Manifest
    from vicinal.data.sources import read_coco as read_coco
    from vicinal.data.sources import read_folder as read_folder
    from vicinal.data.sources import read_hub as read_hub
    from vicinal.data.sources import read_shards as read_shards
    from vicinal.data.sources import read_table as read_table
    from vicinal.data.sources import read_voc as read_voc
    from vicinal.data.sources import write_shards as write_shards
    from vicinal.embedding import embed as embed
    from vicinal.embedding import embed_classes as embed_classes
    from vicinal.embedding import embed_text as embed_text
    from vicinal.evaluation.image_text import image_text as image_text
    from vicinal.evaluation.image_text import zero_shot as zero_shot
    from vicinal.evaluation.intervals import paired_difference as paired_difference
    from vicinal.evaluation.protocols import prototypes as prototypes
    from vicinal.evaluation.protocols import retrieval as retrieval
    from vicinal.evaluation.report import report as report
    from vicinal.heads import NearestPrototype as NearestPrototype
    from vicinal.heads import OpenSetThreshold as OpenSetThreshold
    from vicinal.heads import TipAdapter as TipAdapter
    from vicinal.losses import ArcFace as ArcFace
    from vicinal.losses import CosFace as CosFace
    from vicinal.losses import InfoNCE as InfoNCE
    from vicinal.losses import ProxyAnchor as ProxyAnchor
    from vicinal.losses import SigLIP as SigLIP
    from vicinal.models.adapters import BitFit as BitFit
    from vicinal.models.adapters import Bottleneck as Bottleneck
    from vicinal.models.adapters import Full as Full
    from vicinal.models.adapters import LastBlocks as LastBlocks
    from vicinal.models.adapters import LinearHead as LinearHead
    from vicinal.models.adapters import LoRA as LoRA
    from vicinal.models.adapters import VisualPrompt as VisualPrompt
    from vicinal.models.adapters import adapt as adapt
    from vicinal.models.adapters import merge as merge
    from vicinal.models.backbones import load_encoder as load_encoder
    from vicinal.models.encoder import Encoder as Encoder
    from vicinal.models.merging import average as average
    from vicinal.models.merging import interpolate as interpolate
    from vicinal.recipe import Recipe as Recipe
    from vicinal.serving.export import export as export
    from vicinal.serving.index import Index as Index
    from vicinal.serving.matching import Matcher as Matcher
    from vicinal.serving.objects import ObjectMatcher as ObjectMatcher
    from vicinal.training.image_text import ImageTextObjective as ImageTextObjective
    from vicinal.training.loop import fit as fit
    from vicinal.training.objectives import LabelObjective as LabelObjective
    from vicinal.types import Embeddings as Embeddings
    from vicinal.types import Estimate as Estimate
    from vicinal.types import InputError as InputError
    from vicinal.types import Preprocess as Preprocess


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'vicinal' has no attribute {name!r}")
    value = getattr(import_module(f"vicinal.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
