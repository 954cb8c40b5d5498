# SPDX-License-Identifier: Apache-2.0
"""DRO-V in one file: learning from single rated answers, with a value for every prompt.

The method of "Offline Regularised Reinforcement Learning for Large Language Models Alignment"
(arXiv 2405.19107). The data are triplets (prompt x, completion y, reward r): no pairs, no reward
model, no sampling during training. π_ref is the policy as training finds it. The goal is

    max_π  E[ r(x, y) − τ KL(π(·|x) ‖ π_ref(·|x)) ]                                    (Eq. 1)

Its solution π* and a function V* of the prompt satisfy, for every x and y,

    r(x, y) − V(x) = τ log π(y|x)/π_ref(y|x)                                           (Eq. 3)

so DRO-V fits both networks to make the two sides equal on the data:

    L(π, V) = ½ E[ (r − V − τ log π/π_ref)² ]                                          (Eq. 4)

The algorithm:
    1. score every triplet once with π_ref
    2. draw a batch of triplets (x, y, r), whatever policy wrote y
    3. residual δ = r − V(x) − τ log π(y|x)/π_ref(y|x)
    4. V's gradient is that of ½ δ², the policy's that of ½ δ² / τ, as if they were two losses
    5. one optimiser step for both, each at its own learning rate
    6. go to 2

Runs to paste:
    python drov.py --dice                                            # the answer is known; a minute
    python drov.py --dice --overfit_one_batch                        # can it fit one batch at all?
    python drov.py --dataset_name mine.jsonl --num_eval_prompts 50   # prompt, completion, reward
    python drov.py --split_mode prompt_fold --eval_fold_index 0      # the paper's T5-L, one fold
    python drov.py --split_mode prompt_fold --eval_fold_index all    # train once, answer all folds
    torchrun --nproc_per_node 4 drov.py --split_mode prompt_fold --per_device_train_batch_size 8
                                                                     # the paper's batch, on 4 GPUs

Read from top to bottom: processes, arguments, data, models, losses, the loop, evaluation, dice,
comparison, main.
"""

import argparse
import copy
import ctypes
import functools
import hashlib
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import datasets
import huggingface_hub
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    ByT5Tokenizer,
    DataCollatorForSeq2Seq,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5Config,
    T5ForConditionalGeneration,
)

# ------------------------------------------------------------------------------------ processes

# `torchrun` starts several copies of this program. All hold the same networks and see the same
# rows; each works on its share of a step's rows (`micro_batches`), and they meet where a gradient,
# a number to log, a score or an answer belongs to all. Alone, a process does nothing here.

RANK = int(os.environ.get("RANK", "0"))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", "0"))  # among those of this node
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))


class UserError(ValueError):
    """Something the user can put right; ends the program with this one line and exit code 2."""


def fail(message: object, code: int = 2, *, alone: bool = False) -> NoReturn:
    """One line on stderr, then exit with `code`. What all processes find, each node says once;
    what may have struck this process `alone`, it says."""
    if LOCAL_RANK == 0 or alone:
        print(f"drov.py: error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(code)


def device() -> torch.device:
    """This process's GPU, or the CPU."""
    return torch.device("cuda", LOCAL_RANK) if torch.cuda.is_available() else torch.device("cpu")


def to_device(tensor: Tensor, target: torch.device) -> Tensor:
    """`tensor` on `target`; to a GPU, copied while both it and the CPU do other things."""
    if target.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(target, non_blocking=True)


def meet_processes() -> None:
    """Set up this process's GPU and its connection to the others, before anything else."""
    if device().type == "cuda":
        here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if here > gpus:
            fail(f"{here} processes for {gpus} GPUs: lower --nproc_per_node")
        torch.cuda.set_device(device())
        torch.set_float32_matmul_precision("high")  # TF32, for what stays float32
    if WORLD_SIZE > 1:
        backend = "nccl" if device().type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))  # downloads take their time


def gather(item: Any) -> list:
    """Every process's `item`, in order of rank; all processes wait here for the slowest."""
    items = [item] * WORLD_SIZE
    if WORLD_SIZE > 1:
        dist.all_gather_object(items, item)
    return items


def sum_gradients(parameters: list[nn.Parameter]) -> None:
    """Add up the processes' gradients, once a step; one that a process has not counts as zeros."""
    if WORLD_SIZE > 1:
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for pending in [dist.all_reduce(p.grad, async_op=True) for p in parameters]:
            pending.wait()


def say(message: str) -> None:
    """Print a line, once, without tearing the progress bar."""
    if RANK == 0:
        tqdm.write(message)


# ------------------------------------------------------------------------------------ arguments

DEFAULT_MODEL = "google/flan-t5-large"
DEFAULT_DATASET = "openbmb/UltraFeedback"
PINNED_REVISIONS = {
    DEFAULT_MODEL: "0613663d0d48ea86ba8cb3d7a44f0f65dc596a2a",
    DEFAULT_DATASET: "40b436560ca83a8dba36114c22ab3c66e43f6d5e",  # overall_scores of 10 corrected
}
ASPECTS = ("helpfulness", "honesty", "instruction_following", "truthfulness")
SCHEDULES = ("constant_with_warmup", "constant", "linear", "cosine", "inverse_sqrt")

# What --dice changes. The value learns ten times faster than the policy: at equal rates and a
# small τ the policy chases a wrong V, and mass leaks to what is no roll (README, detail 8).
DICE = {
    "dataset_name": "dice", "model_name_or_path": "dice", "num_eval_prompts": 40,
    "sft_steps": 600, "sft_learning_rate": 0.05, "max_steps": 300, "warmup_steps": 0,
    "learning_rate": 3e-3, "value_learning_rate": 3e-2, "lr_scheduler_type": "linear",
    "per_device_train_batch_size": 64, "micro_batch_tokens": 4096, "logging_steps": 50,
    "eval_steps": 100, "save_steps": 300, "max_new_tokens": 8, "num_return_sequences": 50,
    "bf16": False,
}  # fmt: skip

# Arguments that say where a run is kept or how work is cut, and change nothing that is learnt.
# The batch is compared as `train_batch_size`, over all processes.
FREE_ON_RESUME = {
    "output_dir", "resume", "overwrite_output_dir", "save_steps", "save_total_limit",
    "micro_batch_tokens", "per_device_train_batch_size", "gradient_accumulation_steps",
    "per_device_eval_batch_size",
}  # fmt: skip


def number(kind: type, minimum: float, *, above: bool = False, maximum: float = math.inf):
    """An argparse type: a finite int or float, ≥ `minimum` (or above it) and ≤ `maximum`."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
            inside = minimum < value if above else minimum <= value
            if inside and math.isfinite(value) and value <= maximum:
                return value
        except ValueError:
            pass
        noun = "a whole number" if kind is int else "a finite number"
        bound = f"{'>' if above else '>='} {minimum}" + f" and <= {maximum}" * (maximum < math.inf)
        raise argparse.ArgumentTypeError(f"must be {noun} {bound}, not {text!r}")

    return parse


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags to Namespace; the defaults are the paper's T5-L run. Exits with 2 on a bad flag."""
    title = __doc__.split("\n")[0]
    parser = argparse.ArgumentParser("drov.py", description=title, allow_abbrev=False)
    parser.error = fail  # one line instead of the usage text
    count, size = number(int, 0), number(int, 1)
    rate, positive = number(float, 0), number(float, 0, above=True)
    probability = number(float, 0, above=True, maximum=1)
    fold = lambda text: text if text == "all" else count(text)
    switch = {"action": "store_true"}

    def add(flag: str, default: object, text: str, **options) -> None:
        shown = "" if default is None or default is False else f" (default: {default})"
        group.add_argument(flag, default=default, help=text + shown, **options)

    group = parser.add_argument_group("run")
    add("--dice", False, "preset: the example with a known answer; other flags override", **switch)
    add("--output_dir", None, "folder of the run (default: runs/DATASET-SPLIT-FOLD)", type=Path)
    add("--resume", False, "go on from the newest complete checkpoint in --output_dir", **switch)
    add("--overwrite_output_dir", False, "replace the run that --output_dir holds", **switch)
    add("--seed", 42, "seeds split, batches, value head and samples; dice, too", type=count)
    add("--overfit_one_batch", False, "train on one batch, to see the loss vanish", **switch)
    add("--overfit_steps", 300, "steps of --overfit_one_batch", type=size)

    group = parser.add_argument_group("data")
    add("--dataset_name", DEFAULT_DATASET, "hub name, JSON, CSV or Parquet file, folder, or 'dice'")
    add("--dataset_revision", None, "hub commit (default: pinned for the default dataset)")
    add("--dataset_split", "train", "split of a hub dataset")
    rewards = ("overall_score", "fine-grained_score", *ASPECTS)
    add("--reward_key", "overall_score", "the number of UltraFeedback that is r", choices=rewards)
    modes = ("prompt_seeded", "prompt_fold")
    add("--split_mode", modes[0], "hold out one seeded set of prompts, or folds", choices=modes)
    add("--num_eval_prompts", 1000, "prompts held out by prompt_seeded", type=size)
    add("--num_eval_folds", 5, "folds held out by prompt_fold; none is trained on", type=size)
    add("--eval_prompts_per_fold", 1000, "prompts in each fold", type=size)
    add("--eval_fold_index", 0, "the fold to evaluate, from 0, or 'all'", type=fold)
    add("--max_train_samples", None, "keep this many training triplets (default: all)", type=size)
    add("--max_eval_samples", None, "keep this many held-out triplets (default: all)", type=size)
    add("--max_prompt_length", 512, "tokens of x; a longer prompt keeps its end", type=size)
    add("--max_completion_length", 512, "tokens of y; a longer one keeps its beginning", type=size)

    group = parser.add_argument_group("models")
    add("--model_name_or_path", DEFAULT_MODEL, "T5-family encoder-decoder: π_ref, and π's start")
    add("--model_revision", None, "hub commit (default: pinned for the default model)")
    add("--share_policy_and_value_backbone", False, "V reads the policy's own encoder", **switch)
    add("--gradient_checkpointing", False, "recompute activations: slower, less memory", **switch)
    bf16 = "bfloat16 autocast; weights stay float32 (default: on where CUDA has it)"
    add("--bf16", None, bf16, action=argparse.BooleanOptionalAction)

    group = parser.add_argument_group("optimisation")
    add("--tau", 1.0, "τ, the weight of the KL, in units of the normalised reward", type=positive)
    add("--learning_rate", 1e-4, "the policy's learning rate", type=rate)
    add("--value_learning_rate", 1e-4, "the value model's (if shared: its head's)", type=rate)
    add("--rescale_policy_lr", False, "divide the policy's learning rate, too, by τ", **switch)
    add("--optim", "adafactor", "optimiser", choices=("adafactor", "adamw"))
    add("--lr_scheduler_type", SCHEDULES[0], "learning rate over the steps", choices=SCHEDULES)
    add("--warmup_steps", 150, "steps of linear warm-up, of SFT as well", type=count)
    add("--max_steps", 40000, "steps of DRO-V; 0 only evaluates the starting policy", type=count)
    add("--max_grad_norm", None, "clip each network's gradient norm (default: off)", type=positive)
    add("--per_device_train_batch_size", 32, "triplets a step and process", type=size)
    add("--gradient_accumulation_steps", 1, "multiplies the batch", type=size)
    budget = "padded tokens, x and y, that go through the models at once; changes no gradient "
    budget += "(default: 1024 on a CPU, by memory on a GPU)"
    add("--micro_batch_tokens", None, budget, type=size)
    add("--sft_steps", 0, "steps of maximum likelihood before π_ref is fixed", type=count)
    add("--sft_learning_rate", 1e-4, "learning rate of those steps", type=rate)

    group = parser.add_argument_group("evaluation, logs and checkpoints")
    add("--logging_steps", 10, "steps between two log lines", type=size)
    add("--eval_steps", 2000, "steps between two evaluations", type=size)
    add("--save_steps", 2000, "steps between two checkpoints", type=size)
    add("--save_total_limit", None, "checkpoints to keep, the newest (default: all)", type=size)
    add("--per_device_eval_batch_size", 32, "prompts answered at once", type=size)
    add("--max_new_tokens", 512, "tokens of an answer, at most", type=size)
    add("--temperature", 1.0, "sampling temperature; 0 is greedy", type=rate)
    add("--top_p", 1.0, "sample from the smallest set of tokens of this mass", type=probability)
    add("--num_return_sequences", 1, "answers to each held-out prompt", type=size)
    add("--generate_every_save", False, "answer at each --save_steps, too", **switch)

    group = parser.add_argument_group("comparison (after training)")
    policies = "compare two policies, each RUN, RUN@STEP (RUN@0: its start), or several with commas"
    add("--compare", None, policies, nargs=2, metavar=("A", "B"))
    judges = ("reward", "model", "file")
    add("--judge", None, "who judges (default: reward for dice, else file)", choices=judges)
    add("--judge_model_name_or_path", None, "the model that judges, of any instruction-tuned kind")
    add("--judge_both_orders", False, "the model must agree in both orders, else a tie", **switch)
    add("--verdicts", None, "JSON Lines with `id` and `winner`, for --judge file", type=Path)

    if parser.parse_known_args(argv)[0].dice:
        parser.set_defaults(**DICE)
    args = parser.parse_args(argv)
    args.model_revision = args.model_revision or PINNED_REVISIONS.get(args.model_name_or_path)
    args.dataset_revision = args.dataset_revision or PINNED_REVISIONS.get(args.dataset_name)
    if args.output_dir is None:
        part = args.eval_fold_index if args.split_mode == "prompt_fold" else f"seed{args.seed}"
        name = f"{Path(args.dataset_name).stem}-{args.split_mode}-{part}"
        name += "-overfit" if args.overfit_one_batch else ""
        if args.compare:
            name = "compare-" + re.sub(r"[^\w.@-]+", "-", "-vs-".join(args.compare))
        args.output_dir = Path("runs") / name
    if not args.compare and set(",@") & set(str(args.output_dir)):
        fail("--output_dir may not contain a comma or an @: --compare reads them")
    if (args.judge == "model") != bool(args.judge_model_name_or_path):
        fail("--judge model and --judge_model_name_or_path go together")
    if args.judge_both_orders and args.judge != "model":
        fail("--judge_both_orders goes with --judge model")
    if args.verdicts:
        args.judge = args.judge or "file"
        if args.judge != "file":
            fail("--verdicts goes with --judge file")
    if args.resume and args.overwrite_output_dir:
        fail("--resume goes on with a run, --overwrite_output_dir removes it: give one of them")
    if args.bf16 is None:
        args.bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    # A step's rows depend on their number alone, however many processes share them.
    args.train_batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps
    args.train_batch_size *= WORLD_SIZE
    if args.overfit_one_batch:
        args.max_steps, args.warmup_steps, args.logging_steps = args.overfit_steps, 0, 1
    if args.temperature == 0 and args.num_return_sequences > 1:
        fail("--temperature 0 gives one answer: raise it, or leave --num_return_sequences at 1")
    return args


# ----------------------------------------------------------------------------------------- data

# The example whose answer is known: the prompt "Ada rolls 3d6" asks for three rolls of a six-sided
# die, "416" is a completion, 11 its reward.

NAMES = """Ada Alan Blaise Carl Edsger Emmy Grace Hedy Henri John Kurt Leslie Maryam Niels Pierre
Rózsa Sofia Sophie Srinivasa Thomas"""


def dice_rolls(seed: int) -> datasets.Dataset:
    """64 fair rolls for each of 240 prompts: 20 names × 1 to 4 dice × 4, 6 or 8 sides."""
    rng, rows = np.random.default_rng(seed), []
    for name, dice, sides in itertools.product(NAMES.split(), (1, 2, 3, 4), (4, 6, 8)):
        for roll in rng.integers(1, sides + 1, size=(64, dice)):
            completion = "".join(map(str, roll))
            row = {"prompt": f"{name} rolls {dice}d{sides}", "completion": completion}
            rows.append({**row, "reward": int(roll.sum())})
    return datasets.Dataset.from_list(rows)


def parse_dice(prompt: str) -> tuple[int, int]:
    """`Ada rolls 3d6` → (3, 6)."""
    dice, sides = prompt.rsplit(" ", 1)[1].split("d")
    return int(dice), int(sides)


def dice_reward(prompt: str, completion: str) -> int | None:
    """The true reward: the sum of the faces, or None for what is not a roll of these dice."""
    dice, sides = parse_dice(prompt)
    faces = ["12345678".find(face) + 1 for face in completion]  # 0 for what is no face
    return sum(faces) if len(faces) == dice and all(1 <= face <= sides for face in faces) else None


BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def read_rows(args: argparse.Namespace) -> datasets.Dataset:
    """The raw rows of dice, of a file or a folder of files, or of a dataset on the hub."""
    name, path = args.dataset_name, Path(args.dataset_name)
    if name == "dice":
        return dice_rolls(args.seed)
    files = sorted(f for f in path.iterdir() if f.suffix in BUILDERS) if path.is_dir() else [path]
    builders = {BUILDERS.get(file.suffix) for file in files}
    if path.exists() and (len(builders) != 1 or None in builders):
        raise UserError(f"--dataset_name {name} is not one kind of .jsonl, .json, .csv or .parquet")
    if not path.exists() and None not in builders:
        raise UserError(f"--dataset_name {name} does not exist")
    try:
        if not path.exists():
            revision = args.dataset_revision
            return datasets.load_dataset(name, split=args.dataset_split, revision=revision)
        (builder,) = builders
        # CSV has no types: a completion "007" would become a number, and "NA" nothing at all. Those
        # of JSON are guessed chunk by chunk: rewards that begin as whole numbers must remain so.
        texts = dict.fromkeys(("prompt", "completion", "reward"), str)
        options = {"keep_default_na": False, "converters": texts} if builder == "csv" else {}
        options = {"chunksize": 2**30} if builder == "json" else options
        paths = [str(file) for file in files]
        return datasets.load_dataset(builder, data_files=paths, split="train", **options)
    except ConnectionError as error:
        hint = "use --dataset_name FILE, or --dice, which needs no network"
        raise UserError(f"cannot reach the dataset {name} on the hub ({error}): {hint}") from error
    except Exception as error:  # the readers' exceptions have no common base
        reason = str(error.__cause__ or error) or "it is empty"
        raise UserError(f"cannot read the dataset {name}: {reason[:300]}") from error


# The columns of a triplet, and why the row cannot be used, or None if it can.
TYPES = {"prompt": "string", "completion": "string", "reward": "float64", "dropped": "string"}
TRIPLET_FEATURES = datasets.Features({name: datasets.Value(kind) for name, kind in TYPES.items()})


def ultrafeedback_triplets(batch: dict, reward_key: str) -> Iterator[tuple]:
    """Raw (prompt, completion, reward) from rows of an instruction and its rated completions."""
    for prompt, completions in zip(batch["instruction"], batch["completions"], strict=True):
        for completion in completions or [{}]:  # an empty list counts as one row that is dropped
            reward = completion.get(reward_key)
            if reward_key in ASPECTS:
                annotation = (completion.get("annotations") or {}).get(reward_key) or {}
                reward = annotation.get("Rating")
            yield prompt, completion.get("response"), reward


def check_triplets(batch: dict, reward_key: str) -> dict:
    """Columns of TRIPLET_FEATURES from rows in either schema."""
    if batch.keys() >= {"prompt", "completion", "reward"}:
        triplets = zip(batch["prompt"], batch["completion"], batch["reward"], strict=True)
    else:
        triplets = ultrafeedback_triplets(batch, reward_key)
    columns = {name: [] for name in TRIPLET_FEATURES}
    for prompt, completion, reward in triplets:
        if isinstance(reward, str):
            reward = {"true": 1, "false": 0}.get(reward.strip().lower(), reward)
        try:
            reward = float(reward)  # UltraFeedback's ratings are strings; True is 1
        except (TypeError, ValueError):
            reward = None
        cause = None
        if not isinstance(prompt, str) or not prompt.strip():
            cause = "without a prompt"
        elif not isinstance(completion, str) or not completion.strip():
            cause = "without a completion"
        elif reward is None:
            cause = "without a reward"
        elif not math.isfinite(reward):
            cause = "with a reward that is not finite"
        row = (None, None, None, cause) if cause else (prompt.strip(), completion, reward, None)
        for column, value in zip(columns.values(), row, strict=True):
            column.append(value)
    return columns


def load_triplets(args: argparse.Namespace, dropped: Counter | None = None) -> datasets.Dataset:
    """Read the data as triplets.

    Columns of the result: `prompt` (str, stripped), `completion` (str), `reward` (float, raw). Rows
    that cannot be used are left out, and counted by cause in one printed line and in `dropped`.
    Raises UserError if the data cannot be read, lack the columns or have no usable row.
    """
    rows = read_rows(args)
    names = set(rows.column_names)
    if not ({"prompt", "completion", "reward"} <= names or {"instruction", "completions"} <= names):
        needs = "prompt, completion and reward, or UltraFeedback's instruction and completions"
        raise UserError(f"{args.dataset_name} has the columns {sorted(names)}: it needs {needs}")
    options = {"fn_kwargs": {"reward_key": args.reward_key}, "features": TRIPLET_FEATURES}
    options |= {"remove_columns": rows.column_names, "desc": "Reading triplets"}
    try:
        rows = rows.map(check_triplets, batched=True, **options)
    except (AttributeError, TypeError) as error:
        reason = f"has UltraFeedback's columns with something else in them: {error}"
        raise UserError(f"{args.dataset_name} {reason}") from None
    counts = Counter(cause for cause in rows["dropped"] if cause)
    usable = rows.filter(lambda cause: cause is None, input_columns="dropped", desc="Dropping rows")
    causes = ", ".join(f"{count} {cause}" for cause, count in sorted(counts.items())) or "none"
    say(f"{len(usable)} triplets from {args.dataset_name}; rows dropped: {causes}")
    if not len(usable):
        raise UserError(f"{args.dataset_name} has no usable row (dropped: {causes})")
    if dropped is not None:
        dropped.update(counts)
    return usable.remove_columns("dropped")


def sha256(*texts: object) -> str:
    """Hexadecimal digest of the texts, a line each."""
    return hashlib.sha256("\n".join(map(str, texts)).encode()).hexdigest()


def split_prompts(
    prompts: Iterable[str],
    mode: str,
    *,
    seed: int,
    num_eval_prompts: int,
    num_eval_folds: int,
    eval_prompts_per_fold: int,
    eval_fold_index: int | str,
) -> tuple[list[str], list[str]]:
    """(train, eval): two disjoint lists of unique prompts, folds in their order.

    The order of the prompts is that of a hash, so it depends on their set and `seed` alone.
    prompt_fold holds *all* folds out of training, so that one trained model may be judged on each.
    Raises UserError if there are too few prompts, or no such fold.
    """
    unique = sorted(set(prompts), key=lambda prompt: sha256(seed, prompt))
    seeded = mode == "prompt_seeded"
    held_out = num_eval_prompts if seeded else num_eval_folds * eval_prompts_per_fold
    if held_out >= len(unique):
        flags = "--num_eval_prompts" if seeded else "--num_eval_folds or --eval_prompts_per_fold"
        raise UserError(f"cannot hold out {held_out} of {len(unique)} prompts: lower {flags}")
    if seeded or eval_fold_index == "all":
        return unique[held_out:], unique[:held_out]
    if not 0 <= eval_fold_index < num_eval_folds:
        folds = f"the folds are 0 to {num_eval_folds - 1}, or 'all'"
        raise UserError(f"--eval_fold_index {eval_fold_index} does not exist: {folds}")
    first = eval_fold_index * eval_prompts_per_fold
    return unique[held_out:], unique[first : first + eval_prompts_per_fold]


@dataclass
class Side:
    """The training or the held-out triplets, N of them, tokenised."""

    triplets: datasets.Dataset  # prompt, completion, reward (raw), input_ids, labels
    rewards: Tensor  # (N,) normalised
    lengths: np.ndarray  # (N, 2) tokens of prompt and completion
    fold_of: dict[str, int]  # the fold of each held-out prompt, in the order of the split
    ref_logps: Tensor | None = None  # (N,) log π_ref(y|x); NaN in rows that are never visited


def load_sides(args: argparse.Namespace, tokenizer: Callable) -> tuple[Side, Side, dict]:
    """Triplets → prompt split → normalised rewards → tokens. Returns (train, eval, manifest)."""
    dropped = Counter()
    triplets = load_triplets(args, dropped)
    all_prompts = triplets["prompt"][:]
    names = ("seed", "num_eval_prompts", "num_eval_folds", "eval_prompts_per_fold")
    settings = {name: getattr(args, name) for name in names}
    split = functools.partial(split_prompts, set(all_prompts), args.split_mode, **settings)
    train, held_out = split(eval_fold_index=args.eval_fold_index)
    indices = range(args.num_eval_folds) if args.split_mode == "prompt_fold" else [0]
    folds = {fold: split(eval_fold_index=fold)[1] for fold in indices}
    manifest = {
        "dataset_name": args.dataset_name,
        "dataset_revision": args.dataset_revision,
        "split_mode": args.split_mode,
        **settings,
        "eval_fold_index": args.eval_fold_index,
        "dropped": dict(dropped),
        "reward_key": args.reward_key,
        "held_out": {str(fold): [sha256(p)[:16] for p in folds[fold]] for fold in folds},
    }
    prompts_of = {"train": set(train), "eval": set(held_out)}
    most = {"train": args.max_train_samples, "eval": args.max_eval_samples}
    tables = {}
    for side, prompts in prompts_of.items():
        rows = [row for row, prompt in enumerate(all_prompts) if prompt in prompts]
        tables[side] = table = triplets.select(rows[: most[side]])
        kept = sorted(set(table["prompt"]))
        manifest[f"{side}_rows"], manifest[f"{side}_prompts"] = len(table), len(kept)
        manifest[f"{side}_prompts_sha256"] = sha256(*kept)
    # The paper's "mean 0 and variance 1 across the dataset", from the training side alone:
    # statistics that include the held-out rewards would leak them.
    raw = np.array(tables["train"]["reward"])
    mean, std = float(raw.mean()), float(raw.std())
    if raw.min() == raw.max():
        raise UserError(f"all {len(raw)} training rewards are {mean}: there is nothing to learn")
    manifest["reward_mean"], manifest["reward_std"] = mean, std
    longest_x, longest_y = args.max_prompt_length, args.max_completion_length

    def tokenize(batch: dict) -> dict:
        # Not the tokenizer's own truncation: it appends EOS after the cut, which would teach the
        # policy to stop in mid-sentence. A long prompt keeps its end, EOS included; a long
        # completion loses it.
        x, y = tokenizer(batch["prompt"]).input_ids, tokenizer(batch["completion"]).input_ids
        x, y = [ids[-longest_x:] for ids in x], [ids[:longest_y] for ids in y]
        return {"input_ids": x, "labels": y}

    to_evaluate = prompts_of["eval"]  # one of the folds held out, or all
    fold_of = {prompt: fold for fold in folds for prompt in folds[fold] if prompt in to_evaluate}
    sides = []
    for table in tables.values():
        table = table.map(tokenize, batched=True, desc="Tokenising")
        rewards = (torch.tensor(table["reward"][:], dtype=torch.float64) - mean) / std
        lengths = np.array([[len(ids) for ids in table[x]] for x in ("input_ids", "labels")]).T
        sides.append(Side(table, rewards.float(), lengths, fold_of))
    return *sides, manifest


def stream_rows(num_rows: int, batch_size: int, steps: Iterable[int], seed: int) -> Iterator:
    """The (batch_size,) rows of each step, counted from 1: an endless chain of permutations.

    Batches cross the end of an epoch; a step's rows depend on its number and these arguments alone.
    """

    @functools.lru_cache(maxsize=2)
    def permutation(epoch: int) -> np.ndarray:
        return np.random.default_rng([seed, epoch]).permutation(num_rows)

    for step in steps:
        numbers = np.arange((step - 1) * batch_size, step * batch_size)
        epochs, positions = np.divmod(numbers, num_rows)
        yield np.concatenate([permutation(e)[positions[epochs == e]] for e in np.unique(epochs)])


def micro_batches(rows: np.ndarray, lengths: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """Cut this process's share of `rows` into groups of like length.

    A group has at most `max_tokens`, no more than a tenth of `max_tokens` of them padding, or is a
    single row. The shares are every WORLD_SIZE-th row by length, so that processes have equal work.
    """
    order = np.lexsort((lengths[rows, 0], lengths[rows, 1]))[::-1]  # by completion, then by prompt
    groups, longest, tokens = [], np.zeros(2, dtype=np.int64), 0
    for row in rows[order][RANK::WORLD_SIZE]:
        longest, tokens = np.maximum(longest, lengths[row]), tokens + lengths[row].sum()
        padded = (len(groups[-1]) + 1) * longest.sum() if groups else math.inf
        if padded > max_tokens or padded - tokens > max_tokens / 10:
            groups.append([])
            longest, tokens = lengths[row], lengths[row].sum()
        groups[-1].append(row)
    return [np.array(group) for group in groups]


# --------------------------------------------------------------------------------------- models


def tiny_t5(seed: int) -> T5ForConditionalGeneration:
    """A byte-level T5 of 0.2M random parameters, for dice."""
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=384, d_model=64, d_ff=128, d_kv=16, num_heads=4, num_layers=2, dropout_rate=0.0,
        decoder_start_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


@contextmanager
def loading(source: str | Path) -> Iterator[None]:
    """Turns what goes wrong while a model is loaded into a UserError."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # missing, damaged, unreachable: as many types as causes
        hint = "give a hub name or a folder with a model; without network, try --dice"
        raise UserError(f"cannot load the model {source} ({str(error)[:200]}): {hint}") from error


def load_policy(
    args: argparse.Namespace, source: str | Path
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The policy and its tokenizer, from the hub, a folder, or tiny and random for "dice".

    Raises UserError if they cannot be loaded or are not an encoder-decoder of the T5 family.
    """
    if source == "dice":
        return tiny_t5(args.seed), ByT5Tokenizer()
    revision = args.model_revision if source == args.model_name_or_path else None
    with loading(source):
        config = AutoConfig.from_pretrained(source, revision=revision)
        if not config.is_encoder_decoder:
            raise UserError(f"{source} ({config.model_type}) is decoder-only: not supported yet")
        if not hasattr(config, "dropout_rate"):
            raise UserError(f"{source} ({config.model_type}) is no T5: not supported yet")
        config.dropout_rate = 0.0  # with dropout, log π/π_ref would not be 0 at step 0
        # FLAN-T5's GELU in one piece instead of eight: the same function, less kept for backward().
        if getattr(config, "dense_act_fn", None) == "gelu_new":
            config.dense_act_fn = "gelu_pytorch_tanh"
        options = {"revision": revision, "config": config, "dtype": torch.float32}
        policy = AutoModelForSeq2SeqLM.from_pretrained(source, **options)
        # Sampling is as the flags say: no beams and no penalties of the model's own.
        policy.generation_config = GenerationConfig.from_model_config(config)
        return policy, AutoTokenizer.from_pretrained(source, revision=revision)


@contextmanager
def head_reads(model: PreTrainedModel, select: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within it, the product with the vocabulary sees only selected states, and is in float32
    (TF32 on a GPU).

    It is the largest product of all, and not one for bfloat16: logits would have three digits, and
    their rounding would add up over a completion's tokens (README, detail 16).
    """
    head = model.get_output_embeddings()

    def selected(states: Tensor) -> Tensor:
        bias = None if head.bias is None else head.bias.float()
        with torch.autocast(states.device.type, enabled=False):
            return F.linear(select(states).float(), head.weight.float(), bias)

    head.forward = selected
    try:
        yield
    finally:
        del head.forward


def attended(model: PreTrainedModel, mask: Tensor) -> Tensor | None:
    """What attention needs to know of `mask` (B, S): nothing, where there is no padding.

    transformers would ask the same of a mask on the GPU and wait for the answer, but takes one of
    four dimensions as it is. So we ask, while the mask is on the CPU, where it costs nothing.
    """
    if mask.all():
        return None
    mask = to_device(mask, model.device)
    return mask[:, None, None].bool() if model.config._attn_implementation == "sdpa" else mask


def sequence_logps(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """log π(y|x) = Σ_t log π(y_t | y_<t, x), over the completion's tokens, its EOS included.

    `batch`: `input_ids`, `attention_mask` (B, S); `labels` (B, T), −100 on padding. Returns (B,)
    float32, whatever the autocast. Mask and labels had better be on the CPU, see `attended`.
    """
    labels = batch["labels"]
    real = (labels != -100).flatten().nonzero().squeeze(-1)  # (N,) where the N real tokens are
    decoder_input_ids = model.prepare_decoder_input_ids_from_labels(labels)
    tensors = (real, labels.flatten()[real], decoder_input_ids)
    real, targets, decoder_input_ids = (to_device(x, model.device) for x in tensors)
    with head_reads(model, lambda states: states.flatten(0, 1).index_select(0, real)):
        logits = model(
            input_ids=batch["input_ids"],
            attention_mask=attended(model, batch["attention_mask"]),
            decoder_input_ids=decoder_input_ids,  # not `labels`: no second loss
            use_cache=False,
        ).logits  # (N, vocabulary)
    token_logps = -F.cross_entropy(logits, targets, reduction="none")  # (N,)
    padded = token_logps.new_zeros(labels.numel()).index_copy(0, real, token_logps)
    return padded.view(labels.shape).sum(-1)


def token_budget(args: argparse.Namespace, config: PreTrainedConfig) -> int:
    """Padded tokens that go through the models at once, where --micro_batch_tokens does not say.

    On a GPU, an estimate (README, "On a GPU"). A parameter takes 12 bytes (weight, gradient, its
    bfloat16 copy, some of Adafactor), 8 more with AdamW. For backward(), a layer keeps about 24
    bytes for each token and channel, and the head 12 for each token and word of the vocabulary.
    """
    if device().type == "cpu":
        return 1024
    width = config.d_model + config.d_ff
    layers = 2 * config.num_layers + config.num_decoder_layers  # both encoders, and the decoder
    parameters = 4 * width * config.d_model * layers + 3 * config.vocab_size * config.d_model
    spare = torch.cuda.get_device_properties(device()).total_memory
    spare -= (12 if args.optim == "adafactor" else 20) * parameters
    per_token = 24 * width * max(2 * config.num_layers, config.num_decoder_layers)
    if args.gradient_checkpointing:
        per_token /= 8
    return max(256, int(0.8 * spare / (per_token + 12 * config.vocab_size)))


class ValueModel(nn.Module):
    """V_φ(x), the value of a prompt in normalised rewards: encoder, mean over tokens, linear head.

    The paper leaves the architecture open. The encoder is π_ref's, a copy by default: the value
    model is then half the policy's size. The head is the difference of two that start equal: V
    starts at 0, the mean reward, and yet moves under Adafactor, which moves a parameter in
    proportion to its own size (a head of zeros would stay there).
    """

    def __init__(self, encoder: PreTrainedModel):
        super().__init__()
        self.encoder = encoder
        width = encoder.config.hidden_size
        self.head = nn.Parameter(torch.randn(width).mul(width**-0.5).repeat(2, 1))  # (2, width)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """`input_ids`, `attention_mask` (B, S) → (B,) float32."""
        mask = attended(self.encoder, attention_mask)
        states = self.encoder(input_ids=input_ids, attention_mask=mask).last_hidden_state
        weights = (attention_mask / attention_mask.sum(-1, keepdim=True)).unsqueeze(-1)
        pooled = (states.float() * to_device(weights, states.device)).sum(1)  # (B, width)
        # Not a matrix product, which autocast would round.
        return (pooled * (self.head[0] - self.head[1])).sum(-1)


# --------------------------------------------------------------------------------------- losses


def dro_v_loss(
    policy_logps: Tensor, ref_logps: Tensor, values: Tensor, rewards: Tensor, tau: float
) -> tuple[Tensor, Tensor, Tensor]:
    """DRO-V's two losses and the residual they share; everything (B,).

    The means over B of the losses have as gradients Eq. 8 / τ (in `policy_logps`; none in `values`)
    and Eq. 7 (in `values`; none in `policy_logps`), over B. Eq. 4 is ½ mean(residual²).
    """
    log_ratio = policy_logps - ref_logps  # log π(y|x)/π_ref(y|x)
    residual = rewards - values - tau * log_ratio  # δ, zero at (π*, V*): Eq. 3
    # Eq. 7: ∇_φ = (V − r + τ log π/π_ref) ∇V = −δ ∇V. The policy is held fixed.
    value_loss = 0.5 * (rewards - values - tau * log_ratio.detach()).square()
    # Eq. 8: ∇_θ = −τ [∇log π (r − V) − (τ/2) ∇(log π/π_ref)²] = −τ δ ∇log π, here divided by τ.
    # Algorithm 1 prints ½ instead of τ/2, which has another fixed point unless τ = 1.
    policy_loss = 0.5 * (rewards - values.detach() - tau * log_ratio).square() / tau
    return policy_loss, value_loss, residual


# ------------------------------------------------------------------------------------- the loop

stop_signals: list[int] = []  # Ctrl-C and SIGTERM arrive here, and are obeyed between two batches


class Stopped(Exception):
    """Raised between two batches, where everything is consistent, after Ctrl-C or SIGTERM."""


def request_stop(signum: int, frame: object) -> None:
    """A signal handler: the first signal is noted, a second one raises KeyboardInterrupt."""
    if stop_signals:  # the second time at once
        raise KeyboardInterrupt
    stop_signals.append(signum)


class progress(tqdm):
    """A progress bar, on terminals, over work that may be stopped before each of its items."""

    def __init__(self, items: Iterable, desc: str, **options):
        hidden = True if RANK else None  # None: unless stderr is a terminal
        super().__init__(items, desc=desc, disable=hidden, dynamic_ncols=True, **options)

    def __iter__(self):
        for item in super().__iter__():
            if stop_signals and WORLD_SIZE == 1:  # several processes agree first: see `train`
                raise Stopped
            yield item


@dataclass
class Run:
    """What the loop works on. Steps are counted from the moment π_ref is fixed: SFT's are
    1 − sft_steps … 0, DRO-V's are 1 … max_steps."""

    args: argparse.Namespace
    policy: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    train_side: Side
    eval_side: Side
    manifest: dict
    step: int
    value_model: ValueModel | None = None  # from step 0 on
    optimizer: torch.optim.Optimizer | None = None
    # What was recorded since the last log line, under each name.
    window: dict[str, list] = field(default_factory=lambda: defaultdict(list))

    def batch(self, side: Side, rows: np.ndarray) -> dict[str, Tensor]:
        """Some rows, padded: `input_ids`, `rewards`, `ref_logps` (once known) on the device;
        `attention_mask` and `labels`, whose padding is looked at, on the CPU."""
        table = side.triplets[rows]
        pairs = zip(table["input_ids"], table["labels"])
        examples = [{"input_ids": x, "labels": y} for x, y in pairs]
        batch = dict(DataCollatorForSeq2Seq(self.tokenizer)(examples))
        on_device = {"input_ids": batch["input_ids"], "rewards": side.rewards[rows]}
        if side.ref_logps is not None:
            on_device["ref_logps"] = side.ref_logps[rows]
        return batch | {name: to_device(x, self.policy.device) for name, x in on_device.items()}

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.policy.device.type, dtype=torch.bfloat16, enabled=self.args.bf16)


def pool(window: dict[str, list]) -> dict[str, Tensor]:
    """Each name's tensors and numbers, of all processes, in one CPU tensor."""
    flat = lambda values: torch.cat([torch.as_tensor(v).reshape(-1).cpu() for v in values])
    parts = gather({name: flat(values) for name, values in window.items()})
    return {name: torch.cat([part[name] for part in parts if name in part]) for name in parts[0]}


def check_finite(run: Run, pooled: dict[str, Tensor]) -> None:
    """Raises FloatingPointError if a loss or gradient since the last log line is not finite."""
    checked = ("nll", "residual", "grad_norm", "value_grad_norm")
    bad = [name for name in checked if name in pooled and not pooled[name].isfinite().all()]
    if bad:
        first = run.step - len(pooled["seconds"]) + 1
        steps = f"step {run.step}" if first == run.step else f"steps {first} to {run.step}"
        rows = pooled["row"]
        wrong = rows[~pooled["nll" if "nll" in pooled else "residual"].isfinite()]
        rows = wrong if len(wrong) else rows  # if it is the gradient, any of them may be the cause
        prompts = run.train_side.triplets[rows[:3].numpy()]["prompt"]
        shown = "; ".join(repr(prompt[:80]) for prompt in prompts)
        raise FloatingPointError(
            f"{' and '.join(bad)} not finite in {steps}, with prompts such as {shown}. Nothing of "
            "it was saved; try a lower --learning_rate or --max_grad_norm 1"
        )


def summarise(pooled: dict[str, Tensor], tau: float) -> dict[str, float | None]:
    """What is logged, over all pooled rows: README, "What is logged"."""
    pooled = {name: values.double() for name, values in pooled.items()}
    metrics = {}
    if "residual" in pooled:
        residual, log_ratio, reward = pooled["residual"], pooled["log_ratio"], pooled["reward"]
        target = reward - tau * log_ratio  # what V is fitted to: Eq. 3
        metrics["loss"] = 0.5 * residual.square().mean()  # Eq. 4
        metrics["residual_mean"] = residual.mean()
        metrics["residual_std"] = residual.std(correction=0)
        metrics["value_explained_variance"] = 1 - residual.var() / target.var()
        metrics["log_ratio_mean"] = log_ratio.mean()
        metrics["reward_mean"] = reward.mean()
    if "nll" in pooled:
        metrics["sft_loss"] = pooled["nll"].sum() / pooled["completion_tokens"].sum()
    if "seconds" in pooled:
        norms = [name for name in ("grad_norm", "value_grad_norm") if name in pooled]
        metrics |= {name: pooled[name].mean() for name in norms}
        metrics["step_seconds"] = pooled["seconds"].mean()
        metrics["tokens_per_second"] = pooled["tokens"].sum() / pooled["seconds"].sum()
        metrics["padding"] = 1 - pooled["tokens"].sum() / pooled["padded_tokens"].sum()
    return {name: value.item() if value.isfinite() else None for name, value in metrics.items()}


# What of a line of metrics.jsonl is also printed, and under which name.
SHOWN = {
    "sft_loss": "loss", "loss": "loss", "residual_mean": "residual mean", "residual_std": "std",
    "value_explained_variance": "V explains", "log_ratio_mean": "log π/π_ref",
    "step_seconds": "s/step", "tokens_per_second": "tokens/s",
    "reference_seconds": "seconds for π_ref",
}  # fmt: skip


def log(run: Run, metrics: dict[str, float | None]) -> None:
    """A line of metrics.jsonl for machines, and one for people."""
    if RANK == 0:
        with (run.args.output_dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": run.step, **metrics}) + "\n")
    shown = {name.removeprefix("eval_"): value for name, value in metrics.items()}
    shown = {SHOWN[name]: shown[name] for name in SHOWN if shown.get(name) is not None}
    numbers = [f"{name} {value:.4g}" for name, value in shown.items()]
    held_out = " held out" if "eval_loss" in metrics else ""
    say(f"step {run.step:>5}{held_out}: {', '.join(numbers)}")


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A name to write a file or folder under; it becomes `path` once written whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # a killed run may have left a folder
    yield temporary
    os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    """The whole file, or the old one: nothing in between."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: dict) -> None:
    """`content` for people and machines; what JSON does not know, such as a path, as text."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n")


def read_jsonl(path: Path) -> list[dict]:
    """The lines that were written whole. (`splitlines` would also split inside of texts.)"""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def write_jsonl(path: Path, lines: Iterable[dict]) -> None:
    """A JSON object a line, each with a newline behind it, which `read_jsonl` relies on."""
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def checkpoints(folder: Path) -> dict[int, Path]:
    """The complete checkpoints by their step, oldest first."""
    names = re.compile(r"checkpoint-(-?\d+)")
    found = {int(m[1]): path for path in folder.iterdir() if (m := names.fullmatch(path.name))}
    return dict(sorted(found.items()))


def save_networks(run: Run, folder: Path) -> None:
    """Policy and tokenizer in `folder`, for `from_pretrained`; the value model in `value_model`."""
    run.policy.save_pretrained(folder)
    run.tokenizer.save_pretrained(folder)
    if run.value_model:
        (folder / "value_model").mkdir()
        save_model(run.value_model, str(folder / "value_model" / "model.safetensors"))


def save_checkpoint(run: Run) -> None:
    """Write checkpoint-<step>: both networks, the optimiser, and what was not logged yet.

    Raises FloatingPointError instead where a loss, a gradient or a weight is not finite.
    """
    window = pool(run.window)
    check_finite(run, window)
    networks = [run.policy, run.value_model] if run.value_model else [run.policy]
    if not all(p.isfinite().all() for network in networks for p in network.parameters()):
        raise FloatingPointError(f"weights not finite after step {run.step}: they are not saved")
    folder = run.args.output_dir / f"checkpoint-{run.step}"
    if RANK > 0 or folder.exists():
        return
    with atomic(folder) as temporary:
        save_networks(run, temporary)
        optimizer = run.optimizer.state_dict() if run.optimizer else None
        try:
            torch.save({"optimizer": optimizer, "window": window}, temporary / "training_state.pt")
        except RuntimeError as error:  # what torch makes of a full disk
            raise OSError(f"cannot write {folder}: {error}") from error
    if run.args.save_total_limit:
        for old in [*checkpoints(run.args.output_dir).values()][: -run.args.save_total_limit]:
            half_deleted = old.rename(old.with_name(f".{old.name}.tmp"))  # is not complete
            shutil.rmtree(half_deleted)


def make_optimizer(run: Run, sft: bool) -> Callable[[int], float]:
    """Set run.optimizer; returns the schedule: a factor on the learning rates, by step, from 1."""
    args, steps = run.args, run.args.sft_steps if sft else run.args.max_steps
    policy = list(run.policy.parameters())
    if sft:
        groups = [{"params": policy, "lr": args.sft_learning_rate}]
    else:
        # 1/τ on the gradient, as in dro_v_loss, all but cancels in Adafactor and Adam, which divide
        # by the gradient's own size. The paper may have meant the update: so --rescale_policy_lr.
        policy_lr = args.learning_rate / (args.tau if args.rescale_policy_lr else 1)
        known = set(policy)  # with a shared backbone, only the head is left to the value's group
        value = [parameter for parameter in run.value_model.parameters() if parameter not in known]
        groups = [{"params": policy, "lr": policy_lr}]
        groups += [{"params": value, "lr": args.value_learning_rate}]
    if args.optim == "adafactor":
        # As in T5X: updates in proportion to each parameter's RMS, decay 0.8. The first epsilon is
        # on the gradient's scale; torch's own would let the size of small gradients matter.
        run.optimizer = torch.optim.Adafactor(groups, beta2_decay=-0.8, eps=(1e-15, 1e-3))
    else:
        run.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    # The + 1 and counting from 1: neither the first step nor the last has a learning rate of 0.
    schedule = (args.lr_scheduler_type, run.optimizer, args.warmup_steps, steps + 1)
    return transformers.get_scheduler(*schedule).lr_lambdas[0]


def train(run: Run, last: int) -> Iterator[int]:
    """The loop, from run.step to `last`: SFT up to step 0, DRO-V after it. Yields each step."""
    args, side, sft = run.args, run.train_side, run.step < 0
    begun = -args.sft_steps if sft else 0  # the step at which this optimiser's life began
    schedule = make_optimizer(run, sft)
    if run.step > begun:  # resumed
        file = args.output_dir / f"checkpoint-{run.step}" / "training_state.pt"
        state = torch.load(file, map_location="cpu", weights_only=True)
        run.optimizer.load_state_dict(state["optimizer"])
        if RANK == 0:  # it holds what all processes had recorded
            run.window.update((name, [values]) for name, values in state["window"].items())
    groups = run.optimizer.param_groups
    parameters = [parameter for group in groups for parameter in group["params"]]
    shared = args.share_policy_and_value_backbone  # networks are clipped each by itself
    networks = [parameters] if shared else [group["params"] for group in groups]
    steps = range(run.step + 1 - begun, last + 1 - begun)
    stream = stream_rows(len(side.rewards), args.train_batch_size, steps, args.seed)
    bar = progress(stream, "SFT" if sft else "DRO-V", total=last - begun, initial=run.step - begun)
    for rows in bar:
        started, window = time.perf_counter(), run.window
        divisor = int(side.lengths[rows, 1].sum()) if sft else len(rows)
        for micro in micro_batches(rows, side.lengths, args.micro_batch_tokens):
            batch = run.batch(side, micro)
            with run.autocast():
                policy_logps = sequence_logps(run.policy, batch)
                if sft:  # maximum likelihood: the mean over the batch's tokens
                    row_loss = -policy_logps
                    record = {"nll": row_loss, "completion_tokens": side.lengths[micro, 1]}
                else:
                    values = run.value_model(batch["input_ids"], batch["attention_mask"])
                    ref_logps, rewards = batch["ref_logps"], batch["rewards"]
                    losses = dro_v_loss(policy_logps, ref_logps, values, rewards, args.tau)
                    policy_loss, value_loss, residual = losses
                    row_loss = policy_loss + value_loss
                    log_ratio = policy_logps - ref_logps
                    record = {"residual": residual, "log_ratio": log_ratio, "reward": rewards}
            # The divisor is the whole batch's: cutting the batch changes no gradient.
            (row_loss.sum() / divisor).backward()
            padded_tokens = batch["input_ids"].numel() + batch["labels"].numel()
            record |= {"row": micro, "padded_tokens": padded_tokens}
            for name, value in record.items():
                window[name].append(value.detach() if isinstance(value, Tensor) else value)
        sum_gradients(parameters)
        for name, network in zip(("grad_norm", "value_grad_norm"), networks):
            norm = torch.nn.utils.get_total_norm([p.grad for p in network if p.grad is not None])
            if args.max_grad_norm:
                torch.nn.utils.clip_grads_with_norm_(network, args.max_grad_norm, norm)
            if RANK == 0:
                window[name].append(norm)
        for group in groups:
            group["lr"] = group["initial_lr"] * schedule(run.step + 1 - begun)
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.step += 1
        if RANK == 0:
            window["tokens"].append(side.lengths[rows].sum())
            window["seconds"].append(time.perf_counter() - started)

        if run.step % args.logging_steps == 0 or run.step == last:
            pooled = pool(window)
            check_finite(run, pooled)
            metrics = summarise(pooled, args.tau)
            if run.policy.device.type == "cuda":
                metrics["peak_gpu_bytes"] = torch.cuda.max_memory_allocated()
            metrics |= {name: group["lr"] for name, group in zip(("lr", "value_lr"), groups)}
            log(run, metrics)
            bar.set_postfix(loss=metrics.get("sft_loss", metrics.get("loss")))
            window.clear()
            if WORLD_SIZE > 1 and (stops := [*itertools.chain(*gather(stop_signals))]):
                stop_signals[:] = stops
                raise Stopped
        if run.step % args.save_steps == 0 or run.step == last:
            save_checkpoint(run)
        yield run.step


# ----------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def score(run: Run, side: Side, rows: np.ndarray, function: Callable, desc: str) -> Tensor:
    """`function` (a batch of b rows → (b, …)) on `rows`, in length order. Returns (N, …).

    Rows that are not among `rows` get NaN.
    """
    part = [(np.empty(0, dtype=np.int64), torch.empty(0))]
    for micro in progress(micro_batches(rows, side.lengths, run.args.micro_batch_tokens), desc):
        with run.autocast():
            part.append((micro, function(run.batch(side, micro)).float().cpu()))
    scored, numbers = zip(*itertools.chain.from_iterable(gather(part)))
    numbers = torch.cat(numbers)
    scores = numbers.new_full((len(side.rewards), *numbers.shape[1:]), torch.nan)
    scores[np.concatenate(scored)] = numbers
    return scores


def fix_reference(run: Run) -> None:
    """π_ref is the policy as it is now: score the triplets with it, once, and keep the numbers.

    No copy of the policy is kept, and no step runs one. A resumed run finds the numbers on disk.
    """
    args, file = run.args, run.args.output_dir / "reference_logps.safetensors"
    if gather(file.exists())[0]:
        logps = load_file(file)
    elif run.step > 0:
        raise UserError(f"{file} is gone, and π_ref with it: start again in another --output_dir")
    else:
        save_checkpoint(run)  # checkpoint-0 is π_ref
        total, size = len(run.train_side.rewards), args.train_batch_size
        visited = np.arange(total)
        if args.max_steps * size < total:  # score no row that is not going to be used
            steps = stream_rows(total, size, range(1, args.max_steps + 1), args.seed)
            visited = np.concatenate([visited[:0], *steps])
        started = time.perf_counter()
        log_prob = functools.partial(sequence_logps, run.policy)
        logps = {"train": score(run, run.train_side, visited, log_prob, "π_ref on training rows")}
        log(run, {"reference_seconds": time.perf_counter() - started})
        if not args.overfit_one_batch:
            held_out = np.arange(len(run.eval_side.rewards))
            logps["eval"] = score(run, run.eval_side, held_out, log_prob, "π_ref on held-out rows")
        if RANK == 0:
            with atomic(file) as temporary:
                save_file(logps, temporary)
    run.train_side.ref_logps, run.eval_side.ref_logps = logps["train"], logps.get("eval")
    torch.manual_seed(args.seed)  # for the value head, the only thing that is drawn at random
    encoder = run.policy.get_encoder()
    encoder = encoder if args.share_policy_and_value_backbone else copy.deepcopy(encoder)
    run.value_model = ValueModel(encoder).to(run.policy.device)
    if run.step > 0:  # resumed
        folder = args.output_dir / f"checkpoint-{run.step}" / "value_model"
        load_model(run.value_model, folder / "model.safetensors")


def evaluate(run: Run) -> dict:
    """Log the held-out metrics as eval_…; returns them, each fold's, and log π and V (N,)."""
    side = run.eval_side

    def both(batch: dict[str, Tensor]) -> Tensor:
        values = run.value_model(batch["input_ids"], batch["attention_mask"])
        return torch.stack([sequence_logps(run.policy, batch), values], dim=-1)

    scores = score(run, side, np.arange(len(side.rewards)), both, "π and V on held-out rows")
    policy_logps, values = scores.unbind(-1)
    _, _, residual = dro_v_loss(policy_logps, side.ref_logps, values, side.rewards, run.args.tau)
    log_ratio = policy_logps - side.ref_logps
    numbers = {"residual": residual, "log_ratio": log_ratio, "reward": side.rewards}
    metrics = {f"eval_{name}": value for name, value in summarise(numbers, run.args.tau).items()}
    log(run, metrics)
    row_folds = np.array([side.fold_of[prompt] for prompt in side.triplets["prompt"]])
    of_fold = lambda fold: {name: values[row_folds == fold] for name, values in numbers.items()}
    folds = {str(f): summarise(of_fold(f), run.args.tau) for f in np.unique(row_folds)}
    return {"metrics": metrics, "folds": folds, "policy_logps": policy_logps, "values": values}


@torch.no_grad()
def generate(run: Run) -> None:
    """Answer every held-out prompt and write generations-<step>.jsonl.

    The samples of a batch are seeded by its prompts, at every step alike.
    """
    args, side = run.args, run.eval_side
    row_of = {prompt: row for row, prompt in enumerate(side.triplets["prompt"])}  # any row will do
    prompts = sorted(row_of, key=lambda prompt: -side.lengths[row_of[prompt], 0])
    sampling = {"max_new_tokens": args.max_new_tokens, "do_sample": args.temperature > 0}
    if args.temperature > 0:  # top_k would be 50
        sampling |= {"temperature": args.temperature, "top_p": args.top_p, "top_k": 0}
    size, each = args.per_device_eval_batch_size, args.num_return_sequences
    batches = [prompts[i : i + size] for i in range(0, len(prompts), size)]
    answers = {}
    run.policy.eval()  # in train(), gradient checkpointing would switch off the decoder's cache
    for batch in progress(batches[RANK::WORLD_SIZE], "Answering"):
        torch.manual_seed(int(sha256(args.seed, *batch)[:15], 16))
        inputs = run.batch(side, np.array([row_of[prompt] for prompt in batch]))
        inputs = {x: to_device(inputs[x], device()) for x in ("input_ids", "attention_mask")}
        with run.autocast(), head_reads(run.policy, lambda states: states):
            ids = run.policy.generate(**inputs, **sampling, num_return_sequences=each)
        texts = run.tokenizer.batch_decode(ids, skip_special_tokens=True)
        answers |= {prompt: texts[i * each : (i + 1) * each] for i, prompt in enumerate(batch)}
    run.policy.train()
    answers = functools.reduce(dict.__or__, gather(answers))
    prompts = [prompt for prompt in side.fold_of if prompt in answers]  # less --max_eval_samples
    lines = [{"prompt": p, "fold": side.fold_of[p], "completions": answers[p]} for p in prompts]
    if RANK == 0:
        write_jsonl(args.output_dir / f"generations-{run.step}.jsonl", lines)


# ----------------------------------------------------------------------------------------- dice

# The data are fair rolls, so π_ref is, and Eq. 2 gives the optimum exactly: each die loaded by the
# same amount, π*(k) ∝ exp(k / (s τ)), where s is the standard deviation that normalises rewards.


def dice_optimum(prompt: str, mean: float, std: float, tau: float) -> tuple[np.ndarray, float]:
    """Eq. 2 for dice: (π* of one die's faces, (sides,)), and V*(x) in normalised rewards."""
    dice, sides = parse_dice(prompt)
    # Counted from the highest face: exp() of a small τ would overflow.
    weights = np.exp((np.arange(1, sides + 1) - sides) / (std * tau))
    value = tau * dice * math.log(weights.mean()) + (dice * sides - mean) / std
    return weights / weights.sum(), value


def dice_report(run: Run, final: dict) -> dict:
    """Print SFT, policy and optimum side by side; returns the same numbers."""
    tau, side, folder = run.args.tau, run.eval_side, run.args.output_dir
    statistics = run.manifest["reward_mean"], run.manifest["reward_std"]
    sft = read_jsonl(folder / "generations-0.jsonl")
    policy = read_jsonl(folder / f"generations-{run.step}.jsonl")
    optimum = {line["prompt"]: dice_optimum(line["prompt"], *statistics, tau) for line in sft}
    results = {"tau": tau}
    for name, lines in (("sft", sft), ("policy", policy)):
        rolls = [(line["prompt"], text) for line in lines for text in line["completions"]]
        rewards = [reward for roll in rolls if (reward := dice_reward(*roll)) is not None]
        mean = float(np.mean(rewards)) if rewards else math.nan
        results[name] = {"reward": mean, "valid": len(rewards) / len(rolls)}
    best, fair = [], []
    for prompt, (pi, _) in optimum.items():
        dice, sides = parse_dice(prompt)
        best.append(dice * float(pi @ np.arange(1, sides + 1)))
        fair.append(dice * (sides + 1) / 2)
    for name, rewards in (("optimum", best), ("fair", fair)):
        results[name] = {"reward": float(np.mean(rewards))}
    value_of = dict(zip(side.triplets["prompt"], final["values"].tolist()))
    errors = [value_of[prompt] - exact for prompt, (_, exact) in optimum.items()]
    results["value_rmse"] = float(np.sqrt(np.mean(np.square(errors))))

    # The picture: one die that was held out. Its rolls are rows, so their probabilities are known.
    one_die = [prompt for prompt in optimum if parse_dice(prompt)[0] == 1]
    shown = min(one_die, key=lambda prompt: abs(parse_dice(prompt)[1] - 6), default=None)
    rolls = zip(side.triplets["prompt"], side.triplets["completion"])
    row_of = {face: row for row, (prompt, face) in enumerate(rolls) if prompt == shown}
    if row_of:
        say(f"\n{shown!r}, never trained on: the probability of each face at τ = {tau:g}")
    for face in sorted(row_of):
        exact = optimum[shown][0][int(face) - 1]
        before, after = (
            x[row_of[face]].exp().item() for x in (side.ref_logps, final["policy_logps"])
        )
        for label, p in ((f"{face}  π_ref", before), ("   π_θ  ", after), ("   π*   ", exact)):
            say(f"{label} {p:6.1%} {'█' * round(60 * p)}")
    say(f"\nOn held-out prompts, {len(sft) * len(sft[0]['completions'])} rolls each:")
    say(f"{'':<12}{'mean reward':>12}{'valid rolls':>13}")
    labels = {"fair": "fair dice", "sft": "SFT, π_ref", "policy": "DRO-V, π_θ"}
    for name, label in (labels | {"optimum": "optimum, π*"}).items():
        valid = f"{results[name]['valid']:.1%}" if "valid" in results[name] else ""
        say(f"{label:<12}{results[name]['reward']:>12.2f}{valid:>13}")
    error = results["value_rmse"]
    say(f"V(x) is off V*(x) by {error:.3f} (root mean square, in normalised rewards)")
    return results


# ----------------------------------------------------------------------------------- comparison

# The paper's results are win rates: two policies answer the same held-out prompts, a judge sees the
# answers without knowing whose they are, and the wins are averaged over the folds.

JUDGE_PROMPT = """You are given an instruction and two responses to it. Decide which response is \
more helpful and does better what the instruction asks for.

Instruction:
{prompt}

Response A:
{A}

Response B:
{B}

Which response is better? Answer with A or B alone.
Answer:"""
VERDICT = '{"id": …, "winner": "A", "B" or "tie"}'


def load_answers(policy: str) -> tuple[dict[tuple[int, str], list[str]], list[tuple[str, dict]]]:
    """A policy's answers, by (fold, prompt), and (name, settings) of each run they come from.

    `policy` is RUN or RUN@STEP, or several of them with commas, one for each fold. Raises UserError
    if answers are missing, are given twice, or are to prompts that their run did not hold out.
    """
    answers, runs = {}, []
    for name in policy.split(","):
        path, step = name.rsplit("@", 1) if "@" in name else (name, None)
        try:
            args = json.loads((Path(path) / "args.json").read_text(encoding="utf-8"))["args"]
            file = Path(path) / "prompt_split_manifest.json"
            manifest = json.loads(file.read_text(encoding="utf-8"))
            lines = read_jsonl(Path(path) / f"generations-{step or args['max_steps']}.jsonl")
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{name} is no finished run or RUN@STEP: {error}") from None
        names = ("dataset_name", "dataset_revision", "dataset_split", "split_mode", "temperature")
        names += ("top_p", "max_new_tokens", "num_return_sequences", "max_prompt_length")
        runs.append((name, {key: args[key] for key in names} | {"held_out": manifest["held_out"]}))
        held_out = set().union(*manifest["held_out"].values())
        for line in lines:
            key = (line["fold"], line["prompt"])
            if sha256(line["prompt"])[:16] not in held_out:
                raise UserError(f"{name} answers a prompt it did not hold out: {key[1][:80]!r}")
            if key in answers:
                raise UserError(f"{policy}: fold {key[0]} is answered twice, again by {name}")
            answers[key] = line["completions"]
    return answers, runs


def make_pairs(ours: dict, theirs: dict, seed: int) -> list[dict]:
    """What a judge sees, {"id", "prompt", "A", "B"}, with "fold" and "ours": which of A, B is ours.

    The order comes from a hash of the seed and the texts: swapping policies changes only "ours".
    """
    pairs = []
    for (fold, prompt), completions in ours.items():
        for i, mine in enumerate(completions):
            a, b = sorted((mine, theirs[fold, prompt][i]))
            digest = sha256(seed, prompt, i, a, b)
            a, b = (a, b) if int(digest[-1], 16) % 2 else (b, a)
            pair = {"id": digest[:16], "prompt": prompt, "A": a, "B": b}
            pairs.append(pair | {"fold": fold, "ours": "A" if a == mine else "B"})
    return pairs


def judge_by_reward(pairs: list[dict]) -> np.ndarray:
    """1 where A has the higher true reward, 0 where B has, ½ for a tie. Any roll beats no roll."""
    rewards = np.array([[dice_reward(p["prompt"], p[x]) or -1 for x in "AB"] for p in pairs])
    return (np.sign(rewards[:, 0] - rewards[:, 1]) + 1) / 2


class ModelJudge:
    """Any instruction-tuned model, encoder-decoder or decoder-only: does it say "A" or "B"?"""

    def __init__(self, args: argparse.Namespace):
        source, self.batch_size = args.judge_model_name_or_path, args.per_device_eval_batch_size
        with loading(source):
            self.config = AutoConfig.from_pretrained(source)
            self.decoder_only = not self.config.is_encoder_decoder
            kind = AutoModelForCausalLM if self.decoder_only else AutoModelForSeq2SeqLM
            dtype = torch.bfloat16 if args.bf16 else torch.float32
            self.model = kind.from_pretrained(source, dtype=dtype).to(device()).eval()
            self.tokenizer = AutoTokenizer.from_pretrained(source)
        self.tokenizer.padding_side = "right"
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        encode = functools.partial(self.tokenizer.encode, add_special_tokens=False)
        # A letter's tokens, with a space before it and without.
        self.letters = [sorted({encode(x)[-1], encode(f" {x}")[-1]}) for x in "AB"]
        if set(self.letters[0]) & set(self.letters[1]):
            raise UserError(f"{source} cannot judge: its tokenizer does not tell A from B")
        longest = getattr(self.config, "max_position_embeddings", None) or 4096
        longest = min(longest, self.tokenizer.model_max_length, 4096)
        # Each of the three texts gets a third of what JUDGE_PROMPT leaves, less some for the seams.
        self.part = math.inf  # uncut
        empty = len(self.encode({"prompt": "", "A": "", "B": ""}))
        self.part = (longest - empty - 8) // 3
        if self.part < 1:
            raise UserError(f"{source} cannot judge: it reads only {longest} tokens")

    def encode(self, pair: dict) -> list[int]:
        """The judge's input. Each of the three texts is cut to a third of the room, if need be."""
        texts = {}
        for name in ("prompt", "A", "B"):
            ids = self.tokenizer.encode(pair[name], add_special_tokens=False)
            cut = len(ids) > self.part
            texts[name] = self.tokenizer.decode(ids[: self.part]) if cut else pair[name]
        text = JUDGE_PROMPT.format(**texts)
        if not self.tokenizer.chat_template:
            return self.tokenizer.encode(text)
        chat = [{"role": "user", "content": text}]
        return self.tokenizer.apply_chat_template(chat, add_generation_prompt=True).input_ids

    @torch.no_grad()
    def preference(self, inputs: list[list[int]]) -> Tensor:
        """log p("A") − log p("B") as the next token of b inputs. Returns (b,)."""
        batch = self.tokenizer.pad({"input_ids": inputs}, return_tensors="pt").to(device())
        answer = batch["attention_mask"].sum(1) - 1  # where a decoder-only model's answer begins
        if not self.decoder_only:
            start = self.config.decoder_start_token_id
            batch["decoder_input_ids"] = torch.full_like(batch["input_ids"][:, :1], start)
            answer = torch.zeros_like(answer)
        rows = torch.arange(len(inputs), device=answer.device)
        with head_reads(self.model, lambda states: states[rows, answer]):
            logits = self.model(**batch, use_cache=False).logits  # (b, vocabulary)
        a, b = (logits[:, letters].logsumexp(-1) for letters in self.letters)
        return (a - b).cpu()

    def __call__(self, pairs: list[dict]) -> np.ndarray:
        """1 where A is preferred, 0 where B is, ½ for a tie."""
        inputs = [self.encode(pair) for pair in pairs]
        order = np.argsort([-len(ids) for ids in inputs], kind="stable")
        verdicts = np.zeros(len(pairs))
        for first in progress(range(0, len(order), self.batch_size), "Judging"):
            rows = order[first : first + self.batch_size]
            preference = self.preference([inputs[row] for row in rows])
            verdicts[rows] = (preference.sign().numpy() + 1) / 2
        return verdicts


def read_verdicts(file: Path, pairs: list[dict]) -> np.ndarray:
    """1 where the file's `winner` is A, 0 where it is B, ½ for a tie, NaN where it says nothing."""
    scores, known, unknown, repeated = {}, {pair["id"] for pair in pairs}, 0, 0
    try:
        lines = file.read_text(encoding="utf-8").strip("\n").split("\n")
    except (OSError, UnicodeError) as error:
        raise UserError(f"cannot read --verdicts {file}: {error}") from None
    for line_number, line in enumerate(lines, start=1):
        try:
            verdict = json.loads(line)
            name, score = verdict["id"], {"A": 1.0, "B": 0.0, "tie": 0.5}[verdict["winner"]]
            unknown, repeated = unknown + (name not in known), repeated + (name in scores)
        except (ValueError, KeyError, TypeError):
            message = f"{file}, line {line_number}: {line[:80]!r} is not {VERDICT}"
            raise UserError(message) from None
        scores.setdefault(name, score)
    missing = len(known - set(scores))
    say(f"{file}: {missing} of {len(known)} ids missing, {unknown} unknown, {repeated} repeated")
    return np.array([scores.get(pair["id"], math.nan) for pair in pairs])


def judge_pairs(pairs: list[dict], judge: Callable, both_orders: bool) -> np.ndarray:
    """Our score in each pair: 1 for a win, 0 for a loss, ½ for a tie; NaN for no verdict."""
    verdicts = judge(pairs)
    if both_orders:  # a win only if it is one from either side
        swapped = 1 - judge([pair | {"A": pair["B"], "B": pair["A"]} for pair in pairs])
        verdicts = np.where(verdicts == swapped, verdicts, 0.5)
    ours = np.array([pair["ours"] == "A" for pair in pairs])
    same = np.array([pair["A"] == pair["B"] for pair in pairs])
    return np.where(same, 0.5, np.where(ours, verdicts, 1 - verdicts))


def win_rates(pairs: list[dict], scores: np.ndarray, seed: int, resamples: int = 10_000) -> dict:
    """Win rate over each fold and all, their standard deviation, and a 95 % bootstrap interval.

    A prompt counts once, with the mean of its pairs' scores. The overall rate is the folds' mean.
    """
    of_prompt = defaultdict(list)
    for pair, score in zip(pairs, scores, strict=True):
        if not math.isnan(score):
            of_prompt[pair["fold"], pair["prompt"]].append(score)
    of_fold = defaultdict(list)
    for (fold, _), prompt_scores in sorted(of_prompt.items()):
        of_fold[fold].append(np.mean(prompt_scores))
    if not of_fold:
        raise UserError("there is no verdict to count")
    rng, folds, bootstrap = np.random.default_rng(seed), {}, []
    for fold, prompt_scores in of_fold.items():
        values, counts = np.unique(prompt_scores, return_counts=True)
        total = counts.sum()
        # Drawing prompts with replacement is drawing how often each distinct score comes up.
        bootstrap.append(rng.multinomial(total, counts / total, size=resamples) @ values / total)
        tally = {"wins": values > 0.5, "ties": values == 0.5, "losses": values < 0.5}
        folds[str(fold)] = {"win_rate": float(values @ counts / total), "prompts": int(total)}
        folds[str(fold)] |= {name: int(counts[which].sum()) for name, which in tally.items()}
    rates = [fold["win_rate"] for fold in folds.values()]
    spread = float(np.std(rates, ddof=1)) if len(rates) > 1 else None
    result = {"win_rate": float(np.mean(rates)), "std": spread}
    result["interval"] = np.quantile(np.mean(bootstrap, axis=0), [0.025, 0.975]).tolist()
    for name in ("prompts", "wins", "ties", "losses"):
        result[name] = sum(fold[name] for fold in folds.values())
    return result | {"folds": folds}


def report_win_rates(ours: str, theirs: str, result: dict) -> None:
    """Bars for the folds, and the line that the paper's table has."""
    folds = result["folds"]
    for fold, numbers in folds.items():
        rate = numbers["win_rate"]
        bar = "█" * round(40 * rate) + "░" * (40 - round(40 * rate))
        tally = f"{numbers['wins']} wins, {numbers['ties']} ties, {numbers['losses']} losses"
        say(f"fold {fold} {bar} {rate:6.1%}  {tally}")
    low, high = result["interval"]
    sizes = sorted({numbers["prompts"] for numbers in folds.values()})
    what = f"{len(folds)} fold{'s' * (len(folds) > 1)} × {' or '.join(map(str, sizes))} prompts"
    spread = f" ± {100 * result['std']:.1f} %" if result["std"] is not None else ""
    interval = f"95 % CI {100 * low:.1f}–{100 * high:.1f} %"
    say(f"{ours} vs {theirs}: {100 * result['win_rate']:.1f} %{spread} ({what}, {interval})")


def compare(args: argparse.Namespace) -> dict | None:
    """Judge one policy's answers against another's; prints, writes and returns the win rates.

    Raises UserError if the two did not answer the same prompts in the same way.
    """
    (ours, our_runs), (theirs, their_runs) = map(load_answers, args.compare)
    (first, settings), *others = our_runs + their_runs
    for name, other in others:
        for key in settings:
            if settings[key] != other[key]:
                values = "" if key == "held_out" else f": {settings[key]} and {other[key]}"
                raise UserError(f"{first} and {name} do not compare: they differ in {key}{values}")
    if ours.keys() != theirs.keys():
        folds = [sorted({fold for fold, _ in answers}) for answers in (ours, theirs)]
        numbers = f"{len(ours)} in folds {folds[0]} and {len(theirs)} in folds {folds[1]}"
        raise UserError(f"the policies did not answer the same prompts: {numbers}")
    pairs = make_pairs(ours, theirs, args.seed)
    folder, judge = args.output_dir, args.judge
    folder.mkdir(parents=True, exist_ok=True)
    judge = judge or ("reward" if settings["dataset_name"] == "dice" else "file")
    if judge == "reward":
        if settings["dataset_name"] != "dice":
            raise UserError("--judge reward needs a true reward, which only dice have")
        judge = judge_by_reward
    elif judge == "model":
        judge = ModelJudge(args)
    elif args.verdicts:
        judge = functools.partial(read_verdicts, args.verdicts)
    else:
        seen = [{name: p[name] for name in ("id", "prompt", "A", "B")} for p in pairs]
        write_jsonl(folder / "pairs.jsonl", seen)
        key = [{"id": pair["id"], "policy_1_is": pair["ours"]} for pair in pairs]
        write_jsonl(folder / "key.jsonl", key)
        say(f"{len(pairs)} pairs to judge are in {folder / 'pairs.jsonl'}")
        say(f"go on with --verdicts FILE, a line {VERDICT} for each")
        return None
    result = win_rates(pairs, judge_pairs(pairs, judge, args.judge_both_orders), args.seed)
    report_win_rates(*args.compare, result)
    write_json(folder / "win_rates.json", {"policies": args.compare, **result})
    return result


# ----------------------------------------------------------------------------------------- main

# Any of these: a run, or a model, is here. All that may not outlive a run that is replaced.
RUN_FILES = ("args.json", "config.json", "model.safetensors", "checkpoint-*")
STALE_FILES = (*RUN_FILES, ".*.tmp", "value_model", "metrics.jsonl", "generations-*.jsonl")
STALE_FILES += ("results.json", "win_rates.json", "reference_logps.safetensors")


def as_saved(content: dict) -> dict:
    """`content` as it comes back from a JSON file."""
    return json.loads(json.dumps(content, default=str))


def check_output_dir(args: argparse.Namespace) -> Path | None:
    """The checkpoint to go on from, if any. Raises UserError rather than mix two runs."""
    folder = args.output_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"cannot write in --output_dir {folder}: {error.strerror}") from error
    model = Path(args.model_name_or_path).resolve()
    if model.exists() and folder.resolve() in (model, *model.parents):
        raise UserError(f"--output_dir {folder} holds the model to start from: give another folder")
    holds = {name for name in RUN_FILES if any(folder.glob(name))}
    if args.resume and holds <= {"args.json"}:
        say(f"{folder} holds no complete checkpoint: starting afresh")
        return None
    found = [*checkpoints(folder).values()]
    if not args.overwrite_output_dir and holds and not (args.resume and found):
        raise UserError(
            f"{folder} holds a run or a model: --resume goes on from a checkpoint in it, "
            "--overwrite_output_dir replaces it, another --output_dir leaves it alone"
        )
    if not args.resume:
        return None
    saved = json.loads((folder / "args.json").read_text(encoding="utf-8"))["args"]
    given = as_saved(vars(args))
    names = [name for name in given.keys() - FREE_ON_RESUME if given[name] != saved.get(name)]
    if names:
        changes = [f"{name} was {saved.get(name)} and is {given[name]}" for name in sorted(names)]
        raise UserError(f"--resume needs the interrupted run's arguments: {', '.join(changes)}")
    return found[-1]


def start(args: argparse.Namespace) -> Run:
    """Load everything, check everything, and only then touch what the output folder holds."""
    checkpoint = check_output_dir(args)
    if args.model_name_or_path == "dice":
        torch.set_num_threads(1)  # so small a model is no faster with more
    if RANK > 0:
        gather(None)  # the first process fills the caches that the others read
    policy, tokenizer = load_policy(args, checkpoint or args.model_name_or_path)
    train_side, eval_side, manifest = load_sides(args, tokenizer)
    if RANK == 0:
        gather(None)
    args.micro_batch_tokens = args.micro_batch_tokens or token_budget(args, policy.config)
    if args.overfit_one_batch:
        side, size = train_side, args.train_batch_size
        rows = np.unique(next(stream_rows(len(side.rewards), size, [1], args.seed)))
        train_side = Side(side.triplets.select(rows), side.rewards[rows], side.lengths[rows], {})
    if args.gradient_checkpointing:
        policy.activation_checkpointing_enable()
    # Left to itself, torch takes one attention kernel for π_ref and another, with gradients, for π:
    # in bfloat16 they round differently, and log π/π_ref would show it (README, detail 16).
    torch.backends.cuda.enable_flash_sdp(False)  # on a CPU, too
    torch.backends.cuda.enable_cudnn_sdp(False)
    policy.train().to(device())
    run = Run(args, policy, tokenizer, train_side, eval_side, manifest, step=-args.sft_steps)
    folder, manifest_file = args.output_dir, args.output_dir / "prompt_split_manifest.json"
    if checkpoint:
        run.step = max(checkpoints(folder))
        if json.loads(manifest_file.read_text(encoding="utf-8")) != as_saved(manifest):
            raise UserError(f"the data have changed since the interrupted run: see {manifest_file}")
        say(f"going on from {checkpoint}")
    if len(set(gather(run.step))) > 1:  # and after this meeting, the first process may write
        raise UserError(f"the processes see different checkpoints: is {folder} shared by all?")
    if RANK > 0:
        return run
    if checkpoint:  # this step's evaluation, and all that was logged after it, comes again
        kept = lambda line: line["step"] < run.step + (0 if "eval_loss" in line else 1)
        write_jsonl(folder / "metrics.jsonl", filter(kept, read_jsonl(folder / "metrics.jsonl")))
        return run
    for path in itertools.chain.from_iterable(folder.glob(name) for name in STALE_FILES):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    write_json(manifest_file, manifest)
    write_jsonl(folder / "metrics.jsonl", [])
    versions = {m.__name__: m.__version__ for m in (torch, transformers, datasets, np)}
    versions["python"] = sys.version
    write_json(folder / "args.json", {"args": vars(args), "versions": versions})
    return run


def export(run: Run) -> None:
    """Put the final networks where `from_pretrained(output_dir)` finds them."""
    folder, temporary = run.args.output_dir, run.args.output_dir / ".final.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    save_networks(run, temporary)
    shutil.rmtree(folder / "value_model", ignore_errors=True)
    for path in temporary.iterdir():
        os.replace(path, folder / path.name)
    temporary.rmdir()


def reproduce(run: Run) -> None:
    """SFT → π_ref → DRO-V, evaluated before, on the way and at the end → results."""
    args, folder = run.args, run.args.output_dir
    if run.step < 0:
        for _ in train(run, 0):
            pass
    fix_reference(run)
    # First the step at which this process takes over (0, or a checkpoint's), then each one trained.
    for step in itertools.chain([run.step], train(run, args.max_steps)):
        if not args.overfit_one_batch and (step % args.eval_steps == 0 or step == args.max_steps):
            final = evaluate(run)
        every_save = args.generate_every_save and step % args.save_steps == 0
        if not args.overfit_one_batch and (step in (0, args.max_steps) or every_save):
            generate(run)
    if RANK > 0:
        return
    export(run)
    if args.overfit_one_batch:
        lines = [line for line in read_jsonl(folder / "metrics.jsonl") if "loss" in line]
        first, last = lines[0], lines[-1]
        say(
            f"one batch of {len(run.train_side.rewards)} triplets, {args.max_steps} steps: "
            f"loss {first['loss']:.4g} at the start, {last['loss']:.4g} at the end; "
            f"residual's standard deviation {last['residual_std']:.4g}"
        )
        return
    results = {"step": run.step, "tau": args.tau, **final["metrics"], "folds": final["folds"]}
    if args.dataset_name == "dice":
        results |= dice_report(run, final)
        args.compare = [str(folder), f"{folder}@0"]
        results["win_rate_over_sft"] = compare(args)
    write_json(folder / "results.json", results)
    say(f"the policy, its results and its answers are in {folder}")


def keep_freed_memory() -> None:
    """On a CPU with glibc, let tensors reuse what others freed.

    By default glibc returns blocks of over 32 MB, such as logits, to the system, which hands them
    out again page by page and cleared.
    """
    with suppress(AttributeError, TypeError):  # elsewhere there is no such thing
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: smaller blocks come from the heap,
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: and the heap is not given back


def main(argv: Sequence[str] | None = None) -> None:
    """The whole program; `argv` as on the command line.

    Exits with code 2 on what the user can put right, 1 on what the machine or the numbers did
    wrong, 128 + signal when stopped; always with one line that says how to go on.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity_error()
    if RANK > 0 or not sys.stderr.isatty():
        datasets.disable_progress_bars()
    keep_freed_memory()
    meet_processes()
    args, run, handlers = parse_args(argv), None, {}
    flags = sys.argv[1:] if argv is None else argv
    flags = [flag for flag in flags if flag not in ("--resume", "--overwrite_output_dir")]
    flags += [] if args.compare else ["--resume"]
    program = "python" if WORLD_SIZE == 1 else "torchrun …"
    go_on = f"go on with: {program} drov.py {shlex.join(flags)}"
    stop_signals.clear()
    try:
        if args.compare:
            if RANK == 0:
                compare(args)
            return
        run = start(args)
        for signum in (signal.SIGINT, signal.SIGTERM):
            handlers[signum] = signal.signal(signum, request_stop)
        try:
            reproduce(run)
        except Stopped:
            save_checkpoint(run)
            gather(None)  # the others may not leave before the first has written
            fail(f"stopped at step {run.step}, with a checkpoint; {go_on}", 128 + stop_signals[0])
    except UserError as error:
        fail(error, alone=error.__cause__ is not None)  # with a cause, it may be this process's
    except KeyboardInterrupt:
        fail(f"stopped at once; {go_on}", 128 + signal.SIGINT, alone=True)
    except FloatingPointError as error:
        fail(error, 1)
    except torch.OutOfMemoryError:
        budgets = {"--per_device_eval_batch_size": args.per_device_eval_batch_size}
        if not args.compare:
            budgets["--micro_batch_tokens"] = args.micro_batch_tokens
        tries = " and ".join(f"{flag} {size // 2} (was {size})" for flag, size in budgets.items())
        fail(f"out of GPU memory: try {tries}; what was complete is kept; {go_on}", 1, alone=True)
    except (OSError, SafetensorError) as error:  # a full disk, most likely
        fail(f"{error}. What was complete is kept; {go_on}", 1, alone=True)
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    if WORLD_SIZE > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
