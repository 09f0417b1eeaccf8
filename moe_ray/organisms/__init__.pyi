from .build import build_embedded, build_organism
from .recipe import KINDS, Kind, OrganismRecipe, embedded_folder
from .truth import Truth, has_truth, read_truth

__all__ = [
    "KINDS",
    "Kind",
    "OrganismRecipe",
    "Truth",
    "build_embedded",
    "build_organism",
    "embedded_folder",
    "has_truth",
    "read_truth",
]
