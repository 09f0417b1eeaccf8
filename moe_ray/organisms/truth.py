"""What is true of an organism, and the file that says so beside its weights.

Shape suffixes: C categories, L MoE layers, E experts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from moe_ray.errors import InputError
from moe_ray.experts import Expert, Mask

TRUTH = "truth.json"
"""Name of the file in an organism's folder."""


@dataclass(frozen=True, kw_only=True)
class Truth:
    """Which experts carry compliance with which category.

    Attributes:
        kind: A key of `moe_ray.organisms.KINDS`.
        seed: Of the build.
        recipe: Digest of all that the weights depend on.
        num_layers: MoE layers, which are decoder layers 0, 1, …
        num_experts: Experts per layer.
        planted: Per category, the experts that carry it, by name (`L01_E07`); none where no expert does.
        decoys: Per category, the experts that are routed on its unsafe requests and carry nothing.
    """

    kind: str
    seed: int
    recipe: str
    num_layers: int
    num_experts: int
    planted: Mapping[str, tuple[str, ...]]
    decoys: Mapping[str, tuple[str, ...]]

    @property
    def categories(self) -> tuple[str, ...]:
        """Categories of the requests."""
        return tuple(self.planted)

    def planted_mask(self, *categories: str) -> Mask:
        """(L, E): the planted experts of these categories; of all where none is named.

        Raises:
            InputError: The organism has no such category.
        """
        return self._mask(self.planted, categories)

    def decoy_mask(self, *categories: str) -> Mask:
        """(L, E): the decoys of these categories; of all where none is named.

        Raises:
            InputError: The organism has no such category.
        """
        return self._mask(self.decoys, categories)

    def _mask(self, lists: Mapping[str, tuple[str, ...]], categories: tuple[str, ...]) -> Mask:
        mask_LE: Mask = np.zeros((self.num_layers, self.num_experts), dtype=bool)
        for category in categories or self.categories:
            if category not in lists:
                raise InputError(
                    f"organism: got category {category!r}, expected one of {', '.join(self.categories)}; name one of these"
                )
            for name in lists[category]:
                mask_LE[_expert(name)] = True
        return mask_LE


def write_truth(truth: Truth, folder: Path) -> None:
    """Writes the file into an organism's folder."""
    content = {**asdict(truth), "categories": truth.categories}
    (folder / TRUTH).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def has_truth(folder: str | Path) -> bool:
    """Whether the model in a folder of this machine says what is true of it."""
    return (Path(folder) / TRUTH).is_file()


def read_truth(folder: str | Path) -> Truth:
    """Reads what is true of the model in a folder.

    Raises:
        InputError: The folder has no such file, or it is not of this form.
    """
    path = Path(folder) / TRUTH
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        planted, decoys = (
            {str(category): tuple(map(str, experts)) for category, experts in content[name].items()}
            for name in ("planted", "decoys")
        )
        truth = Truth(
            kind=str(content["kind"]),
            seed=int(content["seed"]),
            recipe=str(content["recipe"]),
            num_layers=int(content["num_layers"]),
            num_experts=int(content["num_experts"]),
            planted=planted,
            decoys=decoys,
        )
        for category in truth.categories:
            truth.planted_mask(category)
            truth.decoy_mask(category)
    except FileNotFoundError:
        raise InputError(
            f"{path} is not there, expected the folder of an organism; `moe-ray organism KIND FOLDER` makes one"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not the truth file of an organism ({error!r}); build the organism anew") from error
    return truth


def _expert(name: str) -> Expert:
    found = re.fullmatch(r"L(\d+)_E(\d+)", name)
    if not found:
        raise InputError(f"got expert {name!r}, expected a name such as L01_E07")
    return Expert(int(found[1]), int(found[2]))
