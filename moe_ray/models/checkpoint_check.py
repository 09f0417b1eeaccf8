"""Whether a checkpoint's weights belong to its configuration, found before any of them is read."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from moe_ray.errors import InputError
from moe_ray.models.weight_files import stored_shapes


def check_shapes(model: PreTrainedModel, folder: Path) -> None:
    """Refuses stored weights that have other shapes than the model that the configuration describes.

    Experts are left out, and quantised weights: they are stored in forms of their own, and seen when they are loaded.

    Args:
        model: made from the configuration, with its weights on the meta device.
        folder: of the checkpoint.

    Raises:
        InputError: a tensor has another shape, or the files cannot be read.
    """
    stored = stored_shapes(folder)
    if getattr(model.config, "quantization_config", None) is not None:
        return
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if "expert" not in name}
    wrong = sorted(name for name in wanted.keys() & stored.keys() if wanted[name] != stored[name])
    if wrong:
        raise InputError(
            f"model.path: {len(wrong)} weights in {str(folder)!r} are not those of a {type(model).__name__} with its "
            f"config.json, such as {wrong[0]}: got shape {stored[wrong[0]]}, expected {wanted[wrong[0]]}; copy or download "
            "the checkpoint again, and check that config.json belongs to it"
        )
