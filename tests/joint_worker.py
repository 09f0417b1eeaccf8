"""One of the processes that hold a model together; started by models/test_joint_passes.py."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from ablation_plans import CONFIG, causal_plans
from families import rows, token_ids
from sharded_worker import share_of_bytes

from moe_ray.ablation.ablate import found_in
from moe_ray.ablation.effects import measure_batch
from moe_ray.config.model import ModelConfig
from moe_ray.models.expert_copies import experts_are_copies
from moe_ray.models.joint_passes import Leader, PassBroken, follow
from moe_ray.models.loading import load_model
from moe_ray.models.loss import answer_loss, text_losses
from moe_ray.models.moe_layers import find_moe_layers
from moe_ray.models.token_budget import TokenBudget
from moe_ray.orchestration.cluster.group_holder import LeadingHolder, Meeting, hold_part, join, open_meeting
from moe_ray.routing.capture import count_rows
from moe_ray.routing.counter import counting
from moe_ray.routing.masking import route_rows_through
from moe_ray.storage.folder import Folder

FAMILIES = ("olmoe", "gpt_oss", "deepseek_v3")
"""The second has experts with biases, the third chooses by a bias and has dense layers."""
TEXTS = ["bread filler1 fraud", "theft snow", "music"]


class Ended(Exception):
    """The leader has nothing more to ask for of this model."""


def measure(model):
    """What of a model's passes must not depend on how many processes hold it."""
    found = {}
    batch = rows((5, 4), (3, 2), (7, 3), seed=1)
    layers = find_moe_layers(model)
    masks_BLE = torch.zeros(len(batch), len(layers), layers.num_experts, dtype=torch.bool)
    for row in range(len(batch)):
        masks_BLE[row, :, row : row + 4] = True
    with counting(model, weights=True, ids=False) as counter:
        found["counts"] = count_rows(model, counter, batch, pad_id=0)[0].tolist()
        found["weights"] = counter.last_weights.tolist()
    found |= losses_and_answer(model, batch, "natural")
    with route_rows_through(model, masks_BLE.numpy()):
        found |= losses_and_answer(model, batch, "masked")
    return found


def losses_and_answer(model, batch, name):
    # lm-eval runs models so, beside generation, which has a mode of its own.
    with torch.no_grad():
        losses = answer_loss(model, batch, pad_id=0).tolist()
    with torch.inference_mode():
        ids = token_ids(len(batch), 4, seed=3)
        answer = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, pad_token_id=0
        )
    return {f"{name} losses": losses, f"{name} answer": answer.tolist()}


def losses_of_texts(holder):
    return text_losses(holder.model, holder.tokenizer, TEXTS, budget=TokenBudget(64))["loss"].tolist()


def check_cause(model, tokenizer):
    """Verdict, effects and answers of the causal check."""
    budget = TokenBudget(CONFIG.tokens_per_forward)
    measured = [measure_batch(model, tokenizer, plan, CONFIG, budget=budget) for plan in causal_plans()]
    found = found_in(measured, CONFIG, seed=0)
    return {
        "verdict": found.verdict,
        "effects": found.effects.to_dict("records"),
        "cause answers": found.answers["answer"].tolist(),
    }


def lead(folder, size):
    """Everything that the tests look at, of the process that works."""
    told = {}
    for family in (*FAMILIES, "copies"):
        model = load_model(ModelConfig(path=str(folder / family)), num_shards=size)
        leader = Leader(model)
        told[family] = {} if family == "copies" else measure(model)
        leader.tell("compare")
        told[family]["are copies"] = experts_are_copies(model)
        leader.tell("end")
    holder = LeadingHolder(ModelConfig(path=str(folder / "causal"), num_shards=size), 1)
    told["share"] = [share_of_bytes(holder.model)]
    told["base"] = losses_of_texts(holder)
    told["share"].append(share_of_bytes(holder.model))
    with holder.with_adapter(Folder.open(str(folder / "adapter"))):
        told["repaired"] = losses_of_texts(holder)
    told["base again"] = losses_of_texts(holder)
    told["are copies"] = holder.experts_are_copies()
    told |= check_cause(holder.model, holder.tokenizer)
    ids = torch.tensor([[3, 4]])
    try:
        holder.model(input_ids=ids)
    except RuntimeError as error:
        told["with gradients"] = str(error)
    told["base at last"] = losses_of_texts(holder)

    def end(*_):
        raise torch.OutOfMemoryError("no room for 7 bytes\nand more")

    holder.model.get_output_embeddings().register_forward_pre_hook(end)
    told["broken"] = []
    for _ in range(2):
        try:
            losses_of_texts(holder)
        except PassBroken as error:
            told["broken"].append(str(error))
    (folder / "told.json").write_text(json.dumps(told), encoding="utf-8")


def serve(folder, size):
    """What the others do."""
    for family in (*FAMILIES, "copies"):
        model = load_model(ModelConfig(path=str(folder / family)), num_shards=size)

        def end():
            raise Ended

        try:
            follow(model, {"compare": lambda model=model: experts_are_copies(model), "end": end})
        except Ended:
            continue
    hold_part(ModelConfig(path=str(folder / "causal"), num_shards=size), size)


def main(folder: Path, rank: int, size: int) -> None:
    """Meets the others and works, or serves until it is ended."""
    torch.set_num_threads(1)
    port = folder / "port"
    if rank == 0:
        store, meeting = open_meeting("127.0.0.1", size)
        (folder / "port.new").write_text(str(meeting.port))
        (folder / "port.new").rename(port)
        join(meeting, store)
        lead(folder, size)
        os._exit(0)  # the others wait in a pass that broke
    while not port.exists():
        time.sleep(0.02)
    join(replace(Meeting(host="127.0.0.1", port=int(port.read_text()), size=size), rank=rank))
    serve(folder, size)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
