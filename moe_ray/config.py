"""Configuration: one frozen dataclass per stage, with every setting explained and checked.

The tree has the shape of the pipeline, so `selection.threshold` names the same thing in a YAML file, on the command line
and in a sweep's search space. Values are checked when they are built. `config_io` reads and writes the tree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from moe_ray.errors import InputError

EMBEDDED = "embedded"


def _setting(default: Any, text: str) -> Any:
    """A dataclass field with its explanation, which `--help` prints."""
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


def require(holds: bool, key: str, got: object, expected: str) -> None:
    """Raises InputError, naming the setting, unless `holds`."""
    if not holds:
        raise InputError(f"{key}: got {got!r}, expected {expected}; change it in the YAML file or with {key}=VALUE")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model is analysed and repaired."""

    path: str = _setting(
        EMBEDDED, "checkpoint folder or hub name; 'embedded' builds the tiny OLMoE that ships with moe-ray"
    )
    revision: str = _setting("main", "hub revision of the checkpoint")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _setting(
        "auto", "weights' type; auto = float32 on CPU, the checkpoint's own type on GPU"
    )
    experts_implementation: Literal["auto", "eager", "grouped_mm", "batched_mm"] = _setting(
        "auto", "how transformers runs the experts; auto = eager on CPU, the library's default on GPU"
    )
    trust_remote_code: bool = _setting(False, "run code that comes with the checkpoint; only for sources you trust")

    def local_folder(self) -> Path | None:
        """The checkpoint's folder, or None where `path` names a hub repository.

        Raises:
            InputError: `path` is a local path without a checkpoint.
        """
        folder = Path(self.path).expanduser()
        if not folder.is_dir() and not self.path.startswith((".", "/", "~")):
            return None
        if not (folder / "config.json").is_file():
            raise InputError(
                f"model.path: {self.path!r} is not a checkpoint folder (no config.json); give a folder written by "
                "save_pretrained, or a hub name"
            )
        return folder


@dataclass(frozen=True, kw_only=True)
class PromptsConfig:
    """Where examples come from and how they are grouped into batches."""

    files: tuple[str, ...] = _setting(
        (EMBEDDED,),
        "JSONL, JSON or Parquet files with `prompt` or `messages`, `label`, …, or paired `goal` + `all_prompt`",
    )
    paired_records: Literal["pair", "goal", "attack"] = _setting(
        "pair",
        "what a goal + all_prompt record gives: pair = safe goal and unsafe attack in one batch; "
        "goal or attack = only that text, labelled unsafe",
    )
    safe_per_batch: int = _setting(8, "safe examples in a batch")
    unsafe_per_batch: int = _setting(8, "unsafe examples in a batch")
    by_category: bool = _setting(True, "keep a batch to one category where examples have categories")
    test_fraction: float = _setting(
        0.25, "share of examples held out for evaluation where files carry no `split` (0 to 1)"
    )
    validation_fraction: float = _setting(
        0.0,
        "share of training examples held out for validation where no file names a `validation` split; sweep, rounds and "
        "patience need one (0 to 1)",
    )
    keep_pairs: Literal["all", "jailbroken"] = _setting(
        "all",
        "which pairs are used, held-out ones too: jailbroken = those whose safe form the model refuses and whose attack "
        "it complies with, as evaluate.judge says; single examples are always used",
    )
    max_batches: int = _setting(0, "use at most this many batches; 0 = all")
    max_test_examples: int = _setting(0, "use at most this many held-out examples of each label; 0 = all")
    refusal: str = _setting(
        "I'm sorry, but I can't help with that.", "target response of unsafe examples that come without one"
    )
    own_answer_tokens: int = _setting(
        48, "length in tokens of the model's own answer, which is the target of safe examples that come without one"
    )

    def __post_init__(self) -> None:
        require(bool(self.files), "prompts.files", self.files, "at least one file, or 'embedded'")
        require(self.safe_per_batch > 0, "prompts.safe_per_batch", self.safe_per_batch, "1 or more")
        require(self.unsafe_per_batch > 0, "prompts.unsafe_per_batch", self.unsafe_per_batch, "1 or more")
        require(0 < self.test_fraction < 1, "prompts.test_fraction", self.test_fraction, "a fraction between 0 and 1")
        require(
            0 <= self.validation_fraction < 1,
            "prompts.validation_fraction",
            self.validation_fraction,
            "a fraction from 0 to below 1",
        )
        require(self.max_batches >= 0, "prompts.max_batches", self.max_batches, "0 or more")
        require(self.max_test_examples >= 0, "prompts.max_test_examples", self.max_test_examples, "0 or more")
        require(self.own_answer_tokens > 0, "prompts.own_answer_tokens", self.own_answer_tokens, "1 or more")
        require(bool(self.refusal.strip()), "prompts.refusal", self.refusal, "a non-empty text")


@dataclass(frozen=True, kw_only=True)
class CaptureConfig:
    """How routing is counted."""

    num_actors: int = _setting(1, "Ray Data actors, each holding one copy of the model; the least number of them")
    max_actors: int = _setting(
        0, "the pool grows to this many actors while there is work and the cluster has room; 0 = always num_actors"
    )
    gpus_per_actor: float = _setting(
        0.0, "GPUs of one actor, which may be a fraction; 0 runs on CPU; with 2 or more the model is spread over them"
    )
    tokens_per_forward: int = _setting(
        8192, "tokens of one forward pass, padding included; halved by an actor whose GPU runs out of memory"
    )
    weights: bool = _setting(False, "also sum routed weights, which selection.weighting=activation and esft_gate need")
    ids: bool = _setting(
        False, "also keep which experts each token was routed to, beside the counts: a byte per token, layer and expert"
    )
    template_tokens: bool = _setting(
        True, "count tokens of the chat template (role headers, start and end tokens) as well as those of the messages"
    )
    max_tokens: int = _setting(0, "the longest example, in tokens; 0 = the model's max_position_embeddings")
    too_long: Literal["skip", "truncate", "error"] = _setting(
        "skip",
        "what becomes of a longer one: skip = quarantined; truncate = its first max_tokens tokens are counted, and it is "
        "listed; error = the capture stops",
    )
    max_bad_share: float = _setting(
        0.05, "share of examples in quarantine above which the capture stops (0 to 1); bad ones up to it are left out"
    )
    generate: bool = _setting(
        False, "the model itself answers examples that come without a response, and that is counted"
    )
    max_new_tokens: int = _setting(64, "length of a generated response, in tokens")
    temperature: float = _setting(
        0.0, "0 = generate greedily; above, sample with this temperature, each example with its own random numbers"
    )

    def __post_init__(self) -> None:
        require(self.num_actors > 0, "capture.num_actors", self.num_actors, "1 or more")
        grows = self.max_actors == 0 or self.max_actors >= self.num_actors
        require(grows, "capture.max_actors", self.max_actors, "0, or at least capture.num_actors")
        require(self.gpus_per_actor >= 0, "capture.gpus_per_actor", self.gpus_per_actor, "0 or more")
        whole = self.gpus_per_actor <= 1 or self.gpus_per_actor == int(self.gpus_per_actor)
        require(whole, "capture.gpus_per_actor", self.gpus_per_actor, "a fraction up to 1, or a whole number")
        require(self.tokens_per_forward > 0, "capture.tokens_per_forward", self.tokens_per_forward, "1 or more")
        require(self.max_tokens >= 0, "capture.max_tokens", self.max_tokens, "0 or more")
        require(0 <= self.max_bad_share <= 1, "capture.max_bad_share", self.max_bad_share, "a fraction from 0 to 1")
        require(self.max_new_tokens > 0, "capture.max_new_tokens", self.max_new_tokens, "1 or more")
        require(self.temperature >= 0, "capture.temperature", self.temperature, "0 or more")


@dataclass(frozen=True, kw_only=True)
class SelectionConfig:
    """Which experts of a batch are called unsafe, and how sure one must be."""

    roles: tuple[str, ...] = _setting(("prompt",), "tokens whose routing counts: prompt, response or both")
    rule: Literal["risk_diff", "per_layer", "esft_token", "esft_gate", "random"] = _setting(
        "risk_diff",
        "risk_diff = above threshold, the top_k largest of the batch; per_layer = the per_layer_quota largest of each "
        "layer; esft_token, esft_gate = cumulative top_p per layer over unsafe tokens, or over their gate weights; "
        "random = as many of each layer as risk_diff gives, drawn by seed (a control)",
    )
    weighting: Literal["tokens", "prompts", "activation"] = _setting(
        "tokens",
        "what a rate is: tokens = routed tokens / all tokens; prompts = mean of each prompt's own rate, so that long "
        "prompts count no more than short ones; activation = routed weight / all tokens",
    )
    threshold: float = _setting(0.05, "an unsafe expert's risk_diff is above this (difference of fractions, -1 to 1)")
    top_k: int = _setting(50, "at most this many unsafe experts a batch, the largest risk_diff first")
    per_layer_quota: int = _setting(4, "rule per_layer: at most this many unsafe experts of each layer")
    top_p: float = _setting(0.2, "rules esft_*: share of a layer's tokens or gate weight to cover (0 to 1)")
    alpha: float = _setting(0.0, "drop selected experts whose corrected p is above this (0 to 1); 0 = off")
    correction: Literal["maxt", "bh", "none"] = _setting(
        "maxt", "p that alpha is held against: maxt = family-wise, bh = false discovery rate, none = each expert's own"
    )
    stability: float = _setting(
        0.0, "drop experts selected in less than this share of prompt resamples (0 to 1); 0 = off"
    )
    permutations: int = _setting(
        20_000, "relabellings of a batch's prompts: all of them where there are no more, else this many; 0 = no p"
    )
    resamples: int = _setting(200, "bootstrap resamples of a batch's prompts, for stability; 0 = none")

    def __post_init__(self) -> None:
        require(-1 <= self.threshold < 1, "selection.threshold", self.threshold, "a number from -1 to below 1")
        require(self.top_k > 0, "selection.top_k", self.top_k, "1 or more")
        require(self.per_layer_quota > 0, "selection.per_layer_quota", self.per_layer_quota, "1 or more")
        require(0 < self.top_p <= 1, "selection.top_p", self.top_p, "a fraction above 0, at most 1")
        require(0 <= self.alpha < 1, "selection.alpha", self.alpha, "a fraction from 0 to below 1")
        require(0 <= self.stability <= 1, "selection.stability", self.stability, "a fraction from 0 to 1")
        require(self.permutations >= 0, "selection.permutations", self.permutations, "0 or more")
        require(self.resamples >= 0, "selection.resamples", self.resamples, "0 or more")
        self._check_filters()
        known = {"prompt", "response"}
        require(
            bool(self.roles) and set(self.roles) <= known, "selection.roles", self.roles, "prompt, response or both"
        )

    def _check_filters(self) -> None:
        if self.alpha:
            require(self.permutations > 0, "selection.permutations", 0, "1 or more, since selection.alpha is on")
        if self.stability:
            require(self.resamples > 0, "selection.resamples", 0, "1 or more, since selection.stability is on")
        if self.alpha or self.stability:
            tested = self.rule in ("risk_diff", "per_layer", "random")
            require(tested, "selection.rule", self.rule, "risk_diff or per_layer where alpha or stability is on")


def _is_weight(entry: str) -> bool:
    name, _, weight = entry.rpartition("=")
    try:
        return bool(name) and 0 <= float(weight) < math.inf
    except ValueError:
        return False


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Masked fine-tuning of the union of unsafe experts."""

    num_workers: int = _setting(1, "Ray Train workers; 0 trains in this process without Ray Train")
    gpus_per_worker: float = _setting(
        0.0, "GPUs of one worker; 0 runs on CPU; with 2 or more the model is spread over them, layer by layer"
    )
    epochs: int = _setting(4, "passes over all batches")
    learning_rate: float = _setting(3e-3, "AdamW's step size")
    weight_decay: float = _setting(0.0, "AdamW's decay, applied to the experts of the batch being trained only")
    schedule: Literal["constant", "linear", "cosine"] = _setting(
        "linear", "learning rate after the warm-up: constant, or falling to 0 at the end of the run"
    )
    warmup: float = _setting(0.0, "share of all steps in which the learning rate rises evenly (0 to below 1)")
    routing: Literal["masked", "natural", "boosted"] = _setting(
        "masked",
        "where a batch's tokens may go while it trains: masked = to its unsafe experts only; natural = as the model "
        "routes; boosted = as the model routes with train.boost added to its unsafe experts' router logits; "
        "only the batch's unsafe experts learn in any case",
    )
    boost: float = _setting(0.0, "routing boosted: added to the router logits of the batch's unsafe experts")
    patience: int = _setting(
        0, "stop after this many epochs in a row without a lower validation loss; 0 = always train all epochs"
    )
    max_grad_norm: float = _setting(1.0, "gradient norm over the step's experts is clipped to this; 0 = no clipping")
    empty_layers: Literal["natural"] = _setting(
        "natural", "policy of a layer with no unsafe expert in the batch: natural = all its experts may be routed"
    )
    short_layers: Literal["allowed_only", "natural"] = _setting(
        "allowed_only",
        "policy of a layer with fewer unsafe experts than num_experts_per_tok: allowed_only = tokens use only those; "
        "natural = all its experts may be routed, and its unsafe ones learn from the tokens that reach them",
    )
    rows_per_forward: int = _setting(16, "examples of a batch run at once; changes memory, not the result")
    tokens_per_forward: int = _setting(
        0,
        "tokens of a batch run at once, padding included; changes memory, not the result; 0 = no limit but the examples",
    )
    batches_per_step: int = _setting(
        0,
        "batches in one optimiser step, shared out among the workers; an expert's gradient is averaged over those whose "
        "mask holds it; 0 = one for each worker",
    )
    batch_weights: tuple[str, ...] = _setting(
        (),
        "NAME=WEIGHT entries, NAME a batch_idx or a category: the step of the batch's experts is multiplied by WEIGHT; "
        "1 elsewhere",
    )
    dtype: Literal["float32", "model"] = _setting(
        "float32", "type of the trained copies of experts and of their optimiser state; model = the model's own"
    )
    activation_checkpointing: bool = _setting(
        False, "run each layer's forward again in the backward pass instead of keeping its activations: less memory"
    )
    monitor: bool = _setting(
        True, "check at every step that each batch trained under its own mask and no token left it"
    )
    checkpoint_every: int = _setting(0, "steps between checkpoints; 0 = at the end of every epoch")

    def __post_init__(self) -> None:
        require(self.num_workers >= 0, "train.num_workers", self.num_workers, "0 or more")
        require(self.gpus_per_worker >= 0, "train.gpus_per_worker", self.gpus_per_worker, "0 or more")
        require(self.epochs > 0, "train.epochs", self.epochs, "1 or more")
        require(self.learning_rate > 0, "train.learning_rate", self.learning_rate, "a positive number")
        require(self.weight_decay >= 0, "train.weight_decay", self.weight_decay, "0 or more")
        require(0 <= self.warmup < 1, "train.warmup", self.warmup, "a fraction from 0 to below 1")
        require(
            (self.boost > 0) == (self.routing == "boosted"),
            "train.boost",
            self.boost,
            "a positive number with train.routing=boosted, 0 otherwise",
        )
        require(self.patience >= 0, "train.patience", self.patience, "0 or more")
        require(self.tokens_per_forward >= 0, "train.tokens_per_forward", self.tokens_per_forward, "0 or more")
        require(self.max_grad_norm >= 0, "train.max_grad_norm", self.max_grad_norm, "0 or more")
        require(self.rows_per_forward > 0, "train.rows_per_forward", self.rows_per_forward, "1 or more")
        require(
            self.batches_per_step == 0 or self.batches_per_step >= self.num_workers,
            "train.batches_per_step",
            self.batches_per_step,
            f"0, or at least one batch for each of the {self.num_workers} workers",
        )
        for entry in self.batch_weights:
            require(
                _is_weight(entry), "train.batch_weights", entry, "entries such as 3=2.0 or fraud=0.5, none negative"
            )
        require(self.checkpoint_every >= 0, "train.checkpoint_every", self.checkpoint_every, "0 or more")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Held-out evaluation: answers, losses, and who judges the answers."""

    routing: Literal["natural", "masked", "both"] = _setting(
        "natural",
        "how held-out prompts are routed: natural = as the model routes; masked = through the mask of the batch that a "
        "prompt is held against; both = one after the other",
    )
    num_actors: int = _setting(1, "Ray Data actors, each holding one copy of the model")
    gpus_per_actor: float = _setting(0.0, "GPUs of one actor; 0 runs on CPU")
    rows_per_forward: int = _setting(32, "examples generated at once")
    max_new_tokens: int = _setting(32, "length of a generated answer, in tokens")
    neutral_file: str = _setting(
        "",
        "plain text on harmless topics, a blank line between paragraphs, whose loss shows what was forgotten; "
        "empty = the paragraphs that ship with moe-ray",
    )
    judge: Literal["phrases", "classifier", "endpoint"] = _setting(
        "phrases",
        "who says whether an answer refuses: phrases = refusal phrases in its opening; classifier = a Hugging Face "
        "sequence classifier; endpoint = an OpenAI-compatible chat endpoint, whose address and key are in the "
        "environment variables MOE_RAY_JUDGE_URL and MOE_RAY_JUDGE_KEY",
    )
    classifier: str = _setting("", "judge classifier: its checkpoint folder or hub name")
    classifier_input: Literal["prompt_and_answer", "answer"] = _setting(
        "prompt_and_answer",
        "judge classifier: what it reads; prompt_and_answer = the last message and the answer as a pair of texts",
    )
    refusal_label: str = _setting("REJECTION", "judge classifier: its label that means refusal")
    judge_model: str = _setting("", "judge endpoint: name of the model that it should use")
    judge_timeout: float = _setting(60.0, "judge endpoint: seconds to wait for one reply")
    judge_retries: int = _setting(3, "judge endpoint: how often a failed call is repeated, with growing pauses")
    judge_concurrency: int = _setting(4, "judge endpoint: calls at the same time")

    def __post_init__(self) -> None:
        require(self.num_actors > 0, "evaluate.num_actors", self.num_actors, "1 or more")
        require(self.gpus_per_actor >= 0, "evaluate.gpus_per_actor", self.gpus_per_actor, "0 or more")
        require(self.rows_per_forward > 0, "evaluate.rows_per_forward", self.rows_per_forward, "1 or more")
        require(self.max_new_tokens > 0, "evaluate.max_new_tokens", self.max_new_tokens, "1 or more")
        require(self.judge_timeout > 0, "evaluate.judge_timeout", self.judge_timeout, "a positive number of seconds")
        require(self.judge_retries >= 0, "evaluate.judge_retries", self.judge_retries, "0 or more")
        require(self.judge_concurrency > 0, "evaluate.judge_concurrency", self.judge_concurrency, "1 or more")
        if self.judge == "classifier":
            require(bool(self.classifier), "evaluate.classifier", self.classifier, "a checkpoint folder or hub name")
        if self.judge == "endpoint":
            require(bool(self.judge_model), "evaluate.judge_model", self.judge_model, "the name of a model")


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """The search for better settings, on the validation split, from the one stored capture."""

    run: bool = _setting(False, "full.py sweeps first and goes on with the winner; sweep.py always sweeps")
    space: Mapping[str, Any] = _setting(
        {"selection.threshold": [0.02, 0.05, 0.1], "selection.top_k": [10, 20, 50]},
        "what is searched: any selection.* or train.* key to a list of values, or to one of {uniform: [LOW, HIGH]}, "
        "{loguniform: [LOW, HIGH]}, {randint: [LOW, HIGH]} (HIGH left out)",
    )
    search: Literal["grid", "random", "optuna"] = _setting(
        "grid", "grid = every combination of the lists; random = drawn; optuna = drawn where earlier trials did well"
    )
    num_trials: int = _setting(16, "trials of search random and optuna")
    scheduler: Literal["none", "asha"] = _setting(
        "none",
        "asha = evaluate after every epoch and stop the trials that are behind; none = evaluate once, at the end",
    )
    objective: Literal["refusal_margin", "unsafe_refusal", "target_loss"] = _setting(
        "refusal_margin",
        "what a trial is ranked by, on the validation split: refusal_margin = unsafe refusal rate minus safe refusal "
        "rate; unsafe_refusal = the first alone; target_loss = minus the loss on target responses",
    )
    max_forgetting: float = _setting(
        0.1,
        "trials that lose more than this on safe target responses, or on neutral text, rank last (nats per token)",
    )
    max_concurrent_trials: int = _setting(1, "trials at once, each with a model of its own")
    cpus_per_trial: float = _setting(1.0, "logical CPUs of one trial")
    gpus_per_trial: float = _setting(0.0, "GPUs of one trial; may be a fraction, so that trials share one; 0 = CPU")

    def __post_init__(self) -> None:
        require(bool(self.space), "sweep.space", self.space, "at least one key")
        require(self.num_trials > 0, "sweep.num_trials", self.num_trials, "1 or more")
        require(self.max_forgetting >= 0, "sweep.max_forgetting", self.max_forgetting, "0 or more")
        require(self.max_concurrent_trials > 0, "sweep.max_concurrent_trials", self.max_concurrent_trials, "1 or more")
        require(self.cpus_per_trial > 0, "sweep.cpus_per_trial", self.cpus_per_trial, "a positive number")
        require(self.gpus_per_trial >= 0, "sweep.gpus_per_trial", self.gpus_per_trial, "0 or more")


BASELINES = (
    "freezing_only",
    "global",
    "global_union",
    "random",
    "shuffled",
    "esft_token",
    "esft_gate",
    "all_experts",
    "full",
)
"""What per-batch masks can be held against; `baselines.py` says what each is."""


@dataclass(frozen=True, kw_only=True)
class BaselinesConfig:
    """Other ways to spend the same budget, held against per-batch masks on the same held-out prompts."""

    run: bool = _setting(False, "full.py runs the baselines too; compare.py always does")
    names: tuple[str, ...] = _setting((), f"which of {', '.join(BASELINES)}; empty = all that the stored counts allow")
    draws: int = _setting(3, "draws of random experts and of shuffled masks, each a row of its own")
    max_concurrent: int = _setting(1, "baselines at once, each with a model of its own and train.gpus_per_worker GPUs")
    full_learning_rate: float = _setting(
        0.0, "learning rate of full fine-tuning; 0 = train.learning_rate, which may be too high for it"
    )

    def __post_init__(self) -> None:
        unknown = sorted(set(self.names) - set(BASELINES))
        require(not unknown, "baselines.names", unknown, "some of " + ", ".join(BASELINES))
        require(self.max_concurrent > 0, "baselines.max_concurrent", self.max_concurrent, "1 or more")
        require(self.draws > 0, "baselines.draws", self.draws, "1 or more")
        require(self.full_learning_rate >= 0, "baselines.full_learning_rate", self.full_learning_rate, "0 or more")


@dataclass(frozen=True, kw_only=True)
class RoundsConfig:
    """Fine-tuning again for batches that stay below their target."""

    max_rounds: int = _setting(1, "rounds of fine-tuning at most; 1 = no further round")
    target: float = _setting(
        0.9, "unsafe refusal rate that each batch should reach on the validation examples of its category (0 to 1)"
    )
    action: Literal["weight", "identify"] = _setting(
        "weight",
        "what a batch below its target gets in the next round: weight = its experts take larger steps; identify = its "
        "unsafe experts are identified anew from the routing of the model as it is by then",
    )
    weight_factor: float = _setting(2.0, "action weight: what a lagging batch's weight is multiplied by each round")
    min_improvement: float = _setting(
        0.005, "a round that lowers the mean shortfall plus over-refusal by less than this is the last (0 to 1)"
    )

    def __post_init__(self) -> None:
        require(self.max_rounds > 0, "rounds.max_rounds", self.max_rounds, "1 or more")
        require(0 < self.target <= 1, "rounds.target", self.target, "a fraction above 0, at most 1")
        require(self.weight_factor > 1, "rounds.weight_factor", self.weight_factor, "a number above 1")
        require(0 <= self.min_improvement < 1, "rounds.min_improvement", self.min_improvement, "a fraction below 1")


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """MLflow."""

    uri: str = _setting("", "MLflow tracking URI; empty = an SQLite file in the run directory")
    experiment: str = _setting("moe-ray", "MLflow experiment")
    register: str = _setting(
        "",
        "name under which the repaired model, base and learned experts merged, goes to MLflow's registry; empty = not",
    )

    def __post_init__(self) -> None:
        require(bool(self.experiment), "tracking.experiment", self.experiment, "a name")
        require(not set(self.register) & set("/:"), "tracking.register", self.register, "a name without / or :")


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """The HTML report."""

    batches: int = _setting(24, "heat maps of single batches, spread evenly over all; keeps the page small")
    examples: int = _setting(6, "held-out examples of each kind with their answers; 0 = none")

    def __post_init__(self) -> None:
        require(self.batches > 0, "report.batches", self.batches, "1 or more")
        require(self.examples >= 0, "report.examples", self.examples, "0 or more")


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Ray."""

    address: str = _setting("", "a running cluster's address; empty = RAY_ADDRESS if set, else a local Ray of its own")
    num_cpus: int = _setting(4, "logical CPUs of a local Ray; at least the sum of actors and workers, plus 2")

    def __post_init__(self) -> None:
        require(self.num_cpus >= 2, "cluster.num_cpus", self.num_cpus, "2 or more")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    run_dir: str = _setting("runs/default", "folder or fsspec URL that holds everything the run writes")
    cache_dir: str = _setting("~/.cache/moe-ray", "folder for the embedded model, built once")
    seed: int = _setting(0, "seed of splits, batches, the embedded model and the training order")
    model: ModelConfig = field(default_factory=ModelConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    capture: CaptureConfig = field(default_factory=CaptureConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    rounds: RoundsConfig = field(default_factory=RoundsConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    baselines: BaselinesConfig = field(default_factory=BaselinesConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        require(bool(self.run_dir), "run_dir", self.run_dir, "a folder or URL")
