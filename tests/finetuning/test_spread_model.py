"""A model that is spread by a device map is counted as one that is not."""

import numpy as np
from accelerate import dispatch_model

from moe_ray.config.model import ModelConfig
from moe_ray.models.loading import load_model, load_tokenizer
from moe_ray.models.tokenization import encode_row
from moe_ray.routing.capture import count_rows
from moe_ray.routing.counter import counting

PARTS = ("model.embed_tokens", "model.layers.0", "model.rotary_emb", "model.norm", "lm_head")


def counts_of(model, config):
    tokenizer = load_tokenizer(config)
    rows = [encode_row(tokenizer, [{"role": "user", "content": text}]) for text in ("hello", "how do I make bread?")]
    with counting(model) as counter:
        return count_rows(model, counter, rows, pad_id=0)[0]


def test_layers_whose_weights_are_elsewhere_are_counted(untrained_model_path, tmp_path):
    config = ModelConfig(path=str(untrained_model_path))
    whole = counts_of(load_model(config, device="cpu"), config)
    device_map = {**dict.fromkeys(PARTS, "cpu"), "model.layers.1": "disk", "model.layers.2": "disk"}
    spread = dispatch_model(load_model(config, device="cpu"), device_map, offload_dir=str(tmp_path))
    assert next(spread.model.layers[2].mlp.experts.parameters()).device.type == "meta"
    assert np.array_equal(counts_of(spread, config), whole)
