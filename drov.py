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
    python drov.py --split_mode prompt_fold --eval_fold_index 0      # the paper's T5-L, one fold
    python drov.py --split_mode prompt_fold --eval_fold_index all    # train once, answer all folds
    python drov.py --dataset_name mine.jsonl --num_eval_prompts 50   # {"prompt", "completion", "reward"}

Read from top to bottom: arguments, data, models, losses, the loop, evaluation, dice, main.
"""

import argparse
import copy
import hashlib
import itertools
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import datasets
import huggingface_hub
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    ByT5Tokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5Config,
    T5ForConditionalGeneration,
)

# ------------------------------------------------------------------------------------ arguments

DEFAULT_MODEL = "google/flan-t5-large"
DEFAULT_DATASET = "openbmb/UltraFeedback"
PINNED_REVISIONS = {
    DEFAULT_MODEL: "0613663d0d48ea86ba8cb3d7a44f0f65dc596a2a",
    DEFAULT_DATASET: "40b436560ca83a8dba36114c22ab3c66e43f6d5e",  # overall_scores of 10 corrected
}
ASPECTS = ("helpfulness", "honesty", "instruction_following", "truthfulness")
SCHEDULES = ("constant_with_warmup", "constant", "linear", "cosine", "inverse_sqrt")

# What --dice changes. The value learns ten times faster than the policy: at equal rates and a small
# τ the policy chases a wrong V first, and mass leaks to strings that are no rolls (README, detail 8).
DICE = dict(
    dataset_name="dice", model_name_or_path="dice", num_eval_prompts=40, sft_steps=400,
    sft_learning_rate=0.1, max_steps=300, warmup_steps=0, lr_scheduler_type="linear",
    per_device_train_batch_size=64, learning_rate=3e-3, value_learning_rate=3e-2, logging_steps=50,
    eval_steps=100, save_steps=300, max_new_tokens=8, num_return_sequences=25,
)  # fmt: skip

# Arguments that change where a run is kept or how the same batch is cut, but not what is learnt.
FREE_ON_RESUME = ("output_dir", "resume", "overwrite_output_dir", "save_steps", "save_total_limit")
FREE_ON_RESUME += ("micro_batch_tokens",)


class UserError(ValueError):
    """Something the user can put right; ends the program with this one line and exit code 2."""


def fail(message: object, code: int = 2) -> NoReturn:
    """One line on stderr, then exit with `code`."""
    print(f"drov.py: error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(code)


def number(kind: type, minimum: float, *, strict: bool = False, maximum: float = math.inf):
    """An argparse type: a finite int or float ≥ `minimum` (> if `strict`) and ≤ `maximum`."""

    def parse(text: str):
        try:
            value = kind(text)
            valid = math.isfinite(value) and minimum <= value <= maximum
        except ValueError:
            valid = False
        if not valid or (strict and value == minimum):
            bounds = f"{'>' if strict else '>='} {minimum}" + f" and <= {maximum}" * (maximum < math.inf)
            noun = "a whole number" if kind is int else "a finite number"
            raise argparse.ArgumentTypeError(f"must be {noun} {bounds}, not {text!r}")
        return value

    return parse


def fold_index(text: str) -> int | str:
    return text if text == "all" else number(int, 0)(text)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags to Namespace; the defaults are the paper's T5-L run. Exits with code 2 on a bad flag."""
    parser = argparse.ArgumentParser("drov.py", description="DRO-V (arXiv 2405.19107) in one file")
    parser.error = fail  # one line instead of the usage text
    count, size, positive = number(int, 0), number(int, 1), number(float, 0, strict=True)
    rate = number(float, 0)
    switch = dict(action="store_true")

    def group(title: str):
        add = parser.add_argument_group(title).add_argument
        return lambda flag, default=None, help="", **rest: add(
            flag, default=default if rest.get("action") != "store_true" else False,
            help=f"{help} (default: {default})" if default is not None else help, **rest,
        )  # fmt: skip

    add = group("run")
    add("--dice", help="preset: the dice example, whose optimum is known; other flags override it", **switch)
    add("--output_dir", type=Path, help="where the run is kept (default: runs/DATASET-SPLIT-FOLD)")
    add("--resume", help="go on from the newest complete checkpoint in --output_dir", **switch)
    add("--overwrite_output_dir", help="replace the run that --output_dir holds", **switch)
    add("--seed", 42, "seed of the split, the batches, the value head and the samples", type=count)
    add("--overfit_one_batch", help="train on one batch, without evaluation, to see the loss vanish", **switch)
    add("--overfit_steps", 300, "steps of --overfit_one_batch", type=size)

    add = group("data")
    add("--dataset_name", DEFAULT_DATASET, "hub name, local file or folder (JSON, CSV, Parquet), or 'dice'")
    add("--dataset_revision", help="hub commit (default: pinned for the default dataset)")
    add("--dataset_split", "train", "split of a hub dataset")
    add("--reward_key", "overall_score", "UltraFeedback's number that is r",
        choices=("overall_score", "fine-grained_score", *ASPECTS))  # fmt: skip
    add("--split_mode", "prompt_seeded", "how prompts are held out: one seeded set, or disjoint folds",
        choices=("prompt_seeded", "prompt_fold"))  # fmt: skip
    add("--num_eval_prompts", 1000, "prompts held out by prompt_seeded", type=size)
    add("--num_eval_folds", 5, "folds held out by prompt_fold; no fold is trained on", type=size)
    add("--eval_prompts_per_fold", 1000, "prompts in each fold", type=size)
    add("--eval_fold_index", 0, "the fold to evaluate, from 0, or 'all'", type=fold_index)
    add("--max_train_samples", help="keep this many training triplets", type=size)
    add("--max_eval_samples", help="keep this many held-out triplets", type=size)
    add("--max_prompt_length", 512, "tokens of x; a longer prompt keeps its end", type=size)
    add("--max_completion_length", 512, "tokens of y; a longer completion keeps its beginning", type=size)

    add = group("models")
    add("--model_name_or_path", DEFAULT_MODEL, "encoder-decoder of the T5 family: π_ref, and π's start")
    add("--model_revision", help="hub commit (default: pinned for the default model)")
    add("--share_policy_and_value_backbone", help="V reads the policy's own encoder (the paper: worse)", **switch)
    add("--gradient_checkpointing", help="recompute activations: less memory, more time", **switch)
    add("--bf16", help="bfloat16 autocast; weights stay float32 (default: on where CUDA has it)",
        action=argparse.BooleanOptionalAction)  # fmt: skip

    add = group("optimisation")
    add("--tau", 1.0, "τ, the KL's weight, in units of the normalised reward", type=positive)
    add("--learning_rate", 1e-4, "the policy's learning rate", type=rate)
    add("--value_learning_rate", 1e-4, "the value model's learning rate", type=rate)
    add("--rescale_policy_lr", help="divide the policy's learning rate by τ, too", **switch)
    add("--optim", "adafactor", "optimiser", choices=("adafactor", "adamw"))
    add("--lr_scheduler_type", SCHEDULES[0], "learning rate over the steps", choices=SCHEDULES)
    add("--warmup_steps", 150, "steps of linear warm-up", type=count)
    add("--max_steps", 40000, "steps of DRO-V; 0 evaluates the starting policy only", type=count)
    add("--max_grad_norm", help="clip each network's gradient to this norm (default: off)", type=positive)
    add("--per_device_train_batch_size", 32, "triplets a step, before accumulation", type=size)
    add("--gradient_accumulation_steps", 1, "multiplies the batch", type=size)
    add("--micro_batch_tokens", 1024, "padded tokens, prompt and completion, that go through the models at once; "
        "cuts the batch, changes no gradient", type=size)  # fmt: skip
    add("--sft_steps", 0, "steps of maximum likelihood before π_ref is fixed", type=count)
    add("--sft_learning_rate", 1e-4, "learning rate of those steps", type=rate)

    add = group("evaluation, logs and checkpoints")
    add("--logging_steps", 10, "steps between two log lines", type=size)
    add("--eval_steps", 2000, "steps between two evaluations", type=size)
    add("--save_steps", 2000, "steps between two checkpoints", type=size)
    add("--save_total_limit", help="checkpoints kept, the newest (default: all)", type=size)
    add("--per_device_eval_batch_size", 32, "prompts answered at once", type=size)
    add("--max_new_tokens", 512, "tokens of an answer", type=size)
    add("--temperature", 1.0, "sampling temperature; 0 is greedy", type=rate)
    add("--top_p", 1.0, "sample from the smallest set of tokens with this mass", type=number(float, 0, strict=True, maximum=1))
    add("--num_return_sequences", 1, "answers to each held-out prompt", type=size)

    if parser.parse_known_args(argv)[0].dice:
        parser.set_defaults(**DICE)
    args = parser.parse_args(argv)
    args.model_revision = args.model_revision or PINNED_REVISIONS.get(args.model_name_or_path)
    args.dataset_revision = args.dataset_revision or PINNED_REVISIONS.get(args.dataset_name)
    fold = args.eval_fold_index if args.split_mode == "prompt_fold" else args.seed
    name = f"{Path(args.dataset_name).stem}-{args.split_mode}-{fold}" + "-overfit" * args.overfit_one_batch
    args.output_dir = args.output_dir or Path("runs") / name
    if args.bf16 is None:
        args.bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    if args.overfit_one_batch:
        args.max_steps, args.warmup_steps, args.logging_steps = args.overfit_steps, 0, 1
    if args.temperature == 0 and args.num_return_sequences > 1:
        fail("--temperature 0 gives one answer: leave out --num_return_sequences or raise the temperature")
    return args


def say(message: str) -> None:
    """Print a line without tearing the progress bar."""
    tqdm.write(message)


# ----------------------------------------------------------------------------------------- data

BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def load_triplets(args: argparse.Namespace, dropped: Counter | None = None) -> datasets.Dataset:
    """Read the data as triplets, from the hub, from files or from `dice_rolls`.

    Columns of the result: `prompt` (str, stripped), `completion` (str), `reward` (float, raw). Rows
    that cannot be used are left out, and counted by cause in one printed line and in `dropped`.
    Raises UserError if the data cannot be read, lack the columns or have no usable row.
    """
    rows = dice_rolls(args.seed) if args.dataset_name == "dice" else read_rows(args)
    names = set(rows.column_names)
    if {"prompt", "completion", "reward"} <= names:
        convert = plain_triplets
    elif {"instruction", "completions"} <= names:
        convert = ultrafeedback_triplets
    else:
        raise UserError(
            f"{args.dataset_name} has the columns {sorted(names)}: it needs prompt, completion and reward, "
            "or UltraFeedback's instruction and completions"
        )
    rows = rows.map(
        convert, fn_kwargs={"reward_key": args.reward_key}, batched=True, remove_columns=rows.column_names,
        features=datasets.Features(TRIPLET_FEATURES), desc="Reading triplets",
    )  # fmt: skip
    counts = Counter(cause for cause in rows["dropped"] if cause)
    triplets = rows.filter(lambda cause: cause is None, input_columns="dropped", desc="Dropping unusable rows")
    causes = ", ".join(f"{count} {cause}" for cause, count in sorted(counts.items())) or "none"
    say(f"{len(triplets)} triplets from {args.dataset_name}; rows dropped: {causes}")
    if not len(triplets):
        raise UserError(f"{args.dataset_name} has no usable row (dropped: {causes})")
    if dropped is not None:
        dropped.update(counts)
    return triplets.remove_columns("dropped")


def read_rows(args: argparse.Namespace) -> datasets.Dataset:
    """The raw rows of a hub dataset, a file or a folder of files."""
    name, path = args.dataset_name, Path(args.dataset_name)
    try:
        if not path.exists() and path.suffix not in BUILDERS:
            return datasets.load_dataset(name, split=args.dataset_split, revision=args.dataset_revision)
        files = [path] if not path.is_dir() else sorted(f for f in path.iterdir() if f.suffix in BUILDERS)
        builders = {BUILDERS.get(file.suffix) for file in files}
        if not path.exists() or len(builders) != 1 or None in builders:
            what = "does not exist" if not path.exists() else "is not one kind of .jsonl, .json, .csv or .parquet"
            raise UserError(f"--dataset_name {name} {what}")
        builder = builders.pop()
        # CSV has no types: without these, a completion "416" becomes a number and "NA" nothing at all.
        options = {"keep_default_na": False, "dtype": str} if builder == "csv" else {}
        return datasets.load_dataset(builder, data_files=[str(file) for file in files], split="train", **options)
    except UserError:
        raise
    except ConnectionError as error:
        raise UserError(f"cannot reach {name} on the hub ({error}): use --dataset_name FILE, or --dice") from error
    except Exception as error:  # the loader's exceptions have no common base
        reason = str(error.__cause__ or error) or "it is empty"
        raise UserError(f"cannot read {name}: {reason[:300]}") from error


TRIPLET_FEATURES = {
    "prompt": datasets.Value("string"),
    "completion": datasets.Value("string"),
    "reward": datasets.Value("float64"),
    "dropped": datasets.Value("string"),  # why the row cannot be used; None if it can
}


def plain_triplets(batch: dict, reward_key: str) -> dict:
    """Rows of prompt, completion, reward: checked one by one."""
    return check_triplets(zip(batch["prompt"], batch["completion"], batch["reward"], strict=True))


def ultrafeedback_triplets(batch: dict, reward_key: str) -> dict:
    """Rows of UltraFeedback, each an instruction with several rated completions, to triplets."""

    def triplets() -> Iterator[tuple]:
        for prompt, completions in zip(batch["instruction"], batch["completions"], strict=True):
            for completion in completions or [{}]:  # an empty list is one row that is dropped
                if reward_key in ASPECTS:
                    aspect = (completion.get("annotations") or {}).get(reward_key) or {}
                    reward = aspect.get("Rating")
                else:
                    reward = completion.get(reward_key)
                yield prompt, completion.get("response"), reward

    return check_triplets(triplets())


def check_triplets(triplets: Iterator[tuple]) -> dict:
    """Columns of TRIPLET_FEATURES from raw (prompt, completion, reward)."""
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


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def split_prompts(
    prompts: Sequence[str],
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
    Raises UserError if fewer prompts exist than are held out, or the fold does not exist.
    """
    unique = sorted(set(prompts), key=lambda prompt: sha256(f"{seed}\n{prompt}"))
    held_out = num_eval_prompts if mode == "prompt_seeded" else num_eval_folds * eval_prompts_per_fold
    if held_out >= len(unique):
        flags = "--num_eval_prompts" if mode == "prompt_seeded" else "--num_eval_folds or --eval_prompts_per_fold"
        raise UserError(f"{held_out} prompts to hold out, but there are {len(unique)}: lower {flags}")
    if mode == "prompt_seeded" or eval_fold_index == "all":
        return unique[held_out:], unique[:held_out]
    if not 0 <= eval_fold_index < num_eval_folds:
        raise UserError(f"--eval_fold_index {eval_fold_index}: the folds are 0 to {num_eval_folds - 1}, or 'all'")
    start = eval_fold_index * eval_prompts_per_fold
    return unique[held_out:], unique[start : start + eval_prompts_per_fold]


@dataclass
class Side:
    """The training or the held-out triplets, N of them, tokenised."""

    triplets: datasets.Dataset  # prompt, completion, reward (raw), input_ids, labels
    rewards: Tensor  # (N,) normalised
    lengths: np.ndarray  # (N, 2) tokens of prompt and completion
    folds: dict[str, int]  # the fold of each held-out prompt, in their order
    ref_logps: Tensor | None = None  # (N,) log π_ref(y|x); NaN in rows that training never visits


def load_sides(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> tuple[Side, Side, dict]:
    """Triplets → prompt split → normalised rewards → tokens. Returns (train, eval, manifest)."""
    dropped = Counter()
    triplets = load_triplets(args, dropped)
    settings = {
        "seed": args.seed,
        "num_eval_prompts": args.num_eval_prompts,
        "num_eval_folds": args.num_eval_folds,
        "eval_prompts_per_fold": args.eval_prompts_per_fold,
    }
    split = lambda fold: split_prompts(triplets["prompt"], args.split_mode, eval_fold_index=fold, **settings)  # noqa: E731
    train, held_out = map(set, split(args.eval_fold_index))
    folds = range(args.num_eval_folds) if args.split_mode == "prompt_fold" else [0]
    fold_of = {prompt: fold for fold in folds for prompt in split(fold)[1] if prompt in held_out}
    manifest = {
        "dataset_name": args.dataset_name,
        "dataset_revision": args.dataset_revision,
        "split_mode": args.split_mode,
        **settings,
        "eval_fold_index": args.eval_fold_index,
        "dropped": dict(dropped),
        "reward_key": args.reward_key,
        "held_out": {fold: [sha256(prompt)[:16] for prompt in split(fold)[1]] for fold in folds},
    }
    tables = {}
    for side, prompts, most in [("train", train, args.max_train_samples), ("eval", held_out, args.max_eval_samples)]:
        table = triplets.filter(lambda prompt: prompt in prompts, input_columns="prompt", desc=f"Splitting off {side}")
        tables[side] = table = table.select(range(min(most or len(table), len(table))))
        kept = sorted(set(table["prompt"]))
        manifest[f"{side}_rows"], manifest[f"{side}_prompts"] = len(table), len(kept)
        manifest[f"{side}_prompts_sha256"] = sha256("\n".join(kept))
    # The paper's "mean 0 and variance 1 across the dataset", from the training side alone: statistics
    # that include the held-out rewards would leak them.
    rewards = np.array(tables["train"]["reward"])
    mean, std = float(rewards.mean()), float(rewards.std())
    if std == 0:
        raise UserError(f"all {len(rewards)} training rewards are {mean}: there is nothing to learn from them")
    manifest["reward_mean"], manifest["reward_std"] = mean, std

    def tokenize(batch: dict) -> dict:
        # Not the tokenizer's own truncation: it appends EOS after the cut, which would teach the policy
        # to stop in mid-sentence. A long prompt keeps its end, EOS included; a long completion loses it.
        prompts, completions = tokenizer(batch["prompt"]).input_ids, tokenizer(batch["completion"]).input_ids
        return {
            "input_ids": [ids[-args.max_prompt_length :] for ids in prompts],
            "labels": [ids[: args.max_completion_length] for ids in completions],
        }

    sides = []
    for table in tables.values():
        table = table.map(tokenize, batched=True, desc="Tokenising")
        lengths = np.array([[len(x), len(y)] for x, y in zip(table["input_ids"], table["labels"], strict=True)])
        rewards = (torch.tensor(table["reward"]) - mean) / std
        sides.append(Side(table, rewards.float(), lengths, fold_of))
    return *sides, manifest


def stream_rows(num_rows: int, batch_size: int, first_step: int, last_step: int, seed: int) -> Iterator[np.ndarray]:
    """The (batch_size,) row numbers of each step, first to last: one endless chain of permutations.

    Batches cross the end of an epoch; step n's rows depend on n and these arguments alone.
    """
    epoch, permutation = None, None
    for step in range(first_step, last_step + 1):
        rows = np.empty(batch_size, dtype=np.int64)
        for i, position in enumerate(range((step - 1) * batch_size, step * batch_size)):
            if position // num_rows != epoch:
                epoch = position // num_rows
                permutation = np.random.default_rng([seed, epoch]).permutation(num_rows)
            rows[i] = permutation[position % num_rows]
        yield rows


def micro_batches(rows: np.ndarray, lengths: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """Cut `rows` into groups of like length, each at most `max_tokens` when padded (or a single row)."""
    groups = [[]]
    longest = np.zeros(2, dtype=np.int64)
    for row in rows[np.lexsort((lengths[rows, 0], lengths[rows, 1]))[::-1]]:  # by completion, then prompt
        longest = np.maximum(longest, lengths[row])
        if groups[-1] and (len(groups[-1]) + 1) * longest.sum() > max_tokens:
            groups.append([])
            longest = lengths[row]
        groups[-1].append(row)
    return [np.array(group) for group in groups]


# --------------------------------------------------------------------------------------- models


def load_policy(args: argparse.Namespace, source: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The policy and its tokenizer, from the hub, a folder, or tiny and random for "dice".

    Raises UserError if they cannot be loaded or are not an encoder-decoder of the T5 family.
    """
    if source == "dice":
        return tiny_t5(args.seed), ByT5Tokenizer()
    revision = args.model_revision if source == args.model_name_or_path else None
    try:
        config = AutoConfig.from_pretrained(source, revision=revision)
        if not config.is_encoder_decoder or not hasattr(config, "dropout_rate"):
            kind = "an encoder-decoder of another family" if config.is_encoder_decoder else "a decoder-only model"
            raise UserError(f"{source} ({config.model_type}) is {kind}: only the T5 family is supported yet")
        config.dropout_rate = 0.0  # with dropout, log π/π_ref would not be 0 at step 0
        policy = AutoModelForSeq2SeqLM.from_pretrained(
            source, revision=revision, config=config, dtype=torch.float32
        )
        return policy, AutoTokenizer.from_pretrained(source, revision=revision)
    except UserError:
        raise
    except Exception as error:  # missing, damaged, unreachable: as many types as causes
        hint = "--model_name_or_path takes a hub name or a folder with a T5; without network, try --dice"
        raise UserError(f"cannot load the model {source} ({str(error)[:200]}): {hint}") from error


def sequence_logps(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """log π(y|x) = Σ_t log π(y_t | y_<t, x), over the completion's tokens, its EOS included.

    `batch`: `input_ids`, `attention_mask` (B, S); `labels` (B, T), −100 on padding. Returns (B,) float32.
    """
    labels = batch["labels"]
    logits = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        decoder_input_ids=model.prepare_decoder_input_ids_from_labels(labels),  # not `labels`: no second loss
        use_cache=False,
    ).logits  # (B, T, vocabulary)
    token_logps = -F.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="none"
    )  # 0 on padding
    return token_logps.view_as(labels).sum(-1)


class ValueModel(nn.Module):
    """V_φ(x), the value of a prompt in normalised rewards: encoder, mean over tokens, linear head.

    The paper leaves the architecture open. The encoder is π_ref's, a copy by default: the value model is
    then half the policy's size. The head has no bias and does not start at 0, because Adafactor moves a
    parameter in proportion to its own size.
    """

    def __init__(self, encoder: PreTrainedModel):
        super().__init__()
        self.encoder = encoder
        width = encoder.config.hidden_size
        self.head = nn.Parameter(torch.randn(width) * width**-0.5)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """`input_ids`, `attention_mask` (B, S) → (B,) float32."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state.float()
        mask = attention_mask.unsqueeze(-1)
        pooled = (hidden * mask).sum(1) / mask.sum(1)  # (B, width)
        return (pooled * self.head).sum(-1)  # not a matmul: autocast would round it


# --------------------------------------------------------------------------------------- losses


def dro_v_loss(
    policy_logps: Tensor, ref_logps: Tensor, values: Tensor, rewards: Tensor, tau: float
) -> tuple[Tensor, Tensor, Tensor]:
    """DRO-V's two losses and the residual they share; everything (B,).

    The means over B of the losses have as gradients Eq. 8 / τ (in `policy_logps`; none in `values`) and
    Eq. 7 (in `values`; none in `policy_logps`), over B. Eq. 4 is ½ mean(residual²).
    """
    log_ratio = policy_logps - ref_logps  # log π(y|x)/π_ref(y|x)
    residual = rewards - values - tau * log_ratio  # δ, zero at (π*, V*): Eq. 3
    # Eq. 7: ∇_φ = (V − r + τ log π/π_ref) ∇V = −δ ∇V. The policy is held fixed.
    value_loss = 0.5 * (rewards - values - tau * log_ratio.detach()).square()
    # Eq. 8: ∇_θ = −τ [∇log π (r − V) − (τ/2) ∇(log π/π_ref)²] = −τ δ ∇log π, here divided by τ. Algorithm 1
    # prints the square's factor as ½ instead of τ/2, which has another fixed point unless τ = 1.
    policy_loss = 0.5 * (rewards - values.detach() - tau * log_ratio).square() / tau
    return policy_loss, value_loss, residual


# ------------------------------------------------------------------------------------- the loop

stop_signals: list[int] = []  # Ctrl-C and SIGTERM arrive here, and are obeyed between two batches


class Stopped(Exception):
    """Raised between two batches, where everything is consistent, after Ctrl-C or SIGTERM."""


def request_stop(signum: int, frame: object) -> None:
    if stop_signals:  # the second time at once
        raise KeyboardInterrupt
    stop_signals.append(signum)


class progress(tqdm):
    """A progress bar, on terminals, over work that may be stopped before each of its items."""

    def __init__(self, items, desc: str, **options):
        super().__init__(items, desc=desc, disable=None, dynamic_ncols=True, **options)

    def __iter__(self):
        for item in super().__iter__():
            if stop_signals:
                raise Stopped
            yield item


@dataclass
class Run:
    """What the loop works on. Time is counted from the moment π_ref is fixed: SFT's steps are
    1 − sft_steps … 0, DRO-V's are 1 … max_steps."""

    args: argparse.Namespace
    policy: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    train: Side
    eval: Side
    step: int
    value_model: ValueModel | None = None  # from step 0 on
    optimizer: torch.optim.Optimizer | None = None
    window: dict[str, list] = field(default_factory=lambda: defaultdict(list))  # since the last log line

    @property
    def device(self) -> torch.device:
        return self.policy.device

    def batch(self, side: Side, rows: np.ndarray, columns: Sequence[str] = ("input_ids", "labels")) -> dict[str, Tensor]:
        """The padded tensors of some rows, on the device: `input_ids`, `attention_mask`, `labels`."""
        table = side.triplets[rows]
        padding = {"input_ids": self.tokenizer.pad_token_id, "labels": -100}
        batch = {c: nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in table[c]], batch_first=True, padding_value=padding[c]) for c in columns}
        lengths = torch.tensor(side.lengths[rows, 0])
        batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.args.bf16)


def check_finite(run: Run) -> None:
    """End the run if a loss or gradient since the last log line is NaN or infinite."""
    window = run.window
    bad = [n for n in ("nll", "residual", "grad_norm", "value_grad_norm") if n in window and not all_finite(window[n])]
    if bad:
        first = run.step - len(window["seconds"]) + 1
        steps = f"step {run.step}" if first == run.step else f"steps {first} to {run.step}"
        rows = torch.cat(window["row"])[:3].tolist()
        prompts = "; ".join(repr(run.train.triplets[row]["prompt"][:80]) for row in rows)
        raise FloatingPointError(
            f"{' and '.join(bad)} not finite in {steps}, with prompts such as {prompts}. Nothing of it was saved; "
            "try a lower --learning_rate or --max_grad_norm 1"
        )


def all_finite(tensors: Iterable[Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def pool(window: dict[str, list]) -> dict[str, Tensor]:
    """Each name's tensors and numbers in one CPU tensor."""
    return {name: torch.cat([torch.as_tensor(v).reshape(-1) for v in values]).cpu() for name, values in window.items()}


def summarise(window: dict[str, list], tau: float) -> dict[str, float | None]:
    """What is logged, pooled over all rows in `window`: README, "What is logged"."""
    pooled = {name: values.double() for name, values in pool(window).items()}
    metrics = {}
    if "residual" in pooled:
        residual, log_ratio, reward = pooled["residual"], pooled["log_ratio"], pooled["reward"]
        target = reward - tau * log_ratio  # what V is fitted to: Eq. 3
        metrics["loss"] = 0.5 * residual.square().mean()  # Eq. 4
        metrics["residual_mean"] = residual.mean()
        metrics["residual_std"] = residual.std(correction=0)
        metrics["value_explained_variance"] = 1 - residual.var(correction=0) / target.var(correction=0)
        metrics["log_ratio_mean"] = log_ratio.mean()
        metrics["reward_mean"] = reward.mean()
    if "nll" in pooled:
        metrics["sft_loss"] = pooled["nll"].sum() / pooled["completion_tokens"].sum()
    if "seconds" in pooled:
        metrics |= {name: pooled[name].mean() for name in ("grad_norm", "value_grad_norm") if name in pooled}
        metrics["step_seconds"] = pooled["seconds"].mean()
        metrics["tokens_per_second"] = pooled["tokens"].sum() / pooled["seconds"].sum()
        metrics["padding"] = 1 - pooled["tokens"].sum() / pooled["padded_tokens"].sum()
    return {name: value.item() if value.isfinite() else None for name, value in metrics.items()}


def log(run: Run, metrics: dict) -> None:
    """A line for people and a line of metrics.jsonl for machines."""
    with (run.args.output_dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": run.step, **metrics}) + "\n")
    shown = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in metrics.items()}
    say(f"step {run.step:>5}  " + "  ".join(f"{name} {value}" for name, value in shown.items()))


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A name to write a file or folder under; it becomes `path` once written whole, and not before."""
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # a killed run may have left a folder
    yield temporary
    os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: dict) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints, oldest first."""
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-", 1)[1]))


def save_networks(run: Run, folder: Path) -> None:
    run.policy.save_pretrained(folder)
    run.tokenizer.save_pretrained(folder)
    if run.value_model:
        (folder / "value_model").mkdir()
        save_model(run.value_model, str(folder / "value_model" / "model.safetensors"))


def save_checkpoint(run: Run) -> None:
    """Write checkpoint-<step>: both networks, the optimiser, and what was not logged yet.

    Raises FloatingPointError instead where a loss, a gradient or a weight is not finite.
    """
    folder = run.args.output_dir / f"checkpoint-{run.step}"
    if folder.exists():
        return
    check_finite(run)
    networks = [run.policy] + [run.value_model] * (run.value_model is not None)
    if not all_finite(parameter for network in networks for parameter in network.parameters()):
        raise FloatingPointError(f"weights not finite after step {run.step}: no checkpoint is written from them")
    with atomic(folder) as temporary:
        save_networks(run, temporary)
        optimizer = run.optimizer.state_dict() if run.optimizer else None
        torch.save({"optimizer": optimizer, "window": pool(run.window)}, temporary / "training_state.pt")
    if run.args.save_total_limit:
        for old in checkpoints(run.args.output_dir)[: -run.args.save_total_limit]:
            dying = old.rename(old.with_name(f".{old.name}.tmp"))  # half deleted, it must not look complete
            shutil.rmtree(dying)


def make_optimizer(run: Run, sft: bool) -> Callable[[int], float]:
    """Set run.optimizer; returns the schedule: the factor on the learning rates at a step, from 1."""
    args = run.args
    if sft:
        groups, steps = [{"params": list(run.policy.parameters()), "lr": args.sft_learning_rate}], args.sft_steps
    else:
        # 1/τ on the gradient, as in dro_v_loss, all but cancels in Adafactor and Adam, which divide by the
        # gradient's own size. The paper may have meant the update: --rescale_policy_lr does that, too.
        policy_lr = args.learning_rate / args.tau if args.rescale_policy_lr else args.learning_rate
        policy = list(run.policy.parameters())
        known = set(policy)  # with a shared backbone, what is left to the value's group is its head
        value = [parameter for parameter in run.value_model.parameters() if parameter not in known]
        groups = [{"params": policy, "lr": policy_lr}, {"params": value, "lr": args.value_learning_rate}]
        steps = args.max_steps
    if args.optim == "adafactor":
        # As in T5X: updates in proportion to each parameter's RMS, decay 0.8. The first epsilon is on the
        # gradient's scale; torch's default would make the updates of small gradients depend on their size.
        run.optimizer = torch.optim.Adafactor(groups, beta2_decay=-0.8, eps=(1e-15, 1e-3))
    else:
        run.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    # The + 1 and counting from 1: neither the first step nor the last has a learning rate of 0.
    scheduler = transformers.get_scheduler(args.lr_scheduler_type, run.optimizer, args.warmup_steps, steps + 1)
    return scheduler.lr_lambdas[0]


def train(run: Run, last: int) -> Iterator[int]:
    """The loop, from run.step to `last`: SFT up to step 0, DRO-V after it. Yields each finished step."""
    args, side, sft = run.args, run.train, run.step < 0
    begun = -args.sft_steps if sft else 0  # the step at which this optimiser's life began
    schedule = make_optimizer(run, sft)
    if run.step > begun:  # resumed
        state = torch.load(args.output_dir / f"checkpoint-{run.step}" / "training_state.pt", weights_only=True)
        run.optimizer.load_state_dict(state["optimizer"])
        run.window.update((name, [values]) for name, values in state["window"].items())
    groups = run.optimizer.param_groups
    networks = [[p for group in groups for p in group["params"]]]
    if not args.share_policy_and_value_backbone:
        networks = [group["params"] for group in groups]
    batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps
    stream = stream_rows(len(side.rewards), batch_size, run.step + 1 - begun, last - begun, args.seed)
    bar = progress(stream, "SFT" if sft else "DRO-V", total=last - begun, initial=run.step - begun)
    for rows in bar:
        started = time.perf_counter()
        step, window = run.step + 1, run.window
        divisor = int(side.lengths[rows, 1].sum()) if sft else len(rows)
        for micro in micro_batches(rows, side.lengths, args.micro_batch_tokens):
            batch = run.batch(side, micro)
            with run.autocast():
                policy_logps = sequence_logps(run.policy, batch)
                if sft:  # maximum likelihood: the mean over the batch's tokens
                    row_loss = -policy_logps
                    record = {"nll": row_loss, "completion_tokens": torch.tensor(side.lengths[micro, 1])}
                else:
                    values = run.value_model(batch["input_ids"], batch["attention_mask"])
                    ref_logps, rewards = (t[micro].to(run.device) for t in (side.ref_logps, side.rewards))
                    policy_loss, value_loss, residual = dro_v_loss(policy_logps, ref_logps, values, rewards, args.tau)
                    row_loss = policy_loss + value_loss
                    record = {"residual": residual, "log_ratio": policy_logps - ref_logps, "reward": rewards}
            (row_loss.sum() / divisor).backward()  # over the whole batch: cutting it changes no gradient
            record |= {"row": torch.tensor(micro), "padded_tokens": batch["input_ids"].numel() + batch["labels"].numel()}
            for name, value in record.items():
                window[name].append(value.detach() if isinstance(value, Tensor) else value)
        for name, network in zip(("grad_norm", "value_grad_norm"), networks):
            norm = torch.nn.utils.get_total_norm([p.grad for p in network if p.grad is not None])
            if args.max_grad_norm:
                torch.nn.utils.clip_grads_with_norm_(network, args.max_grad_norm, norm)
            window[name].append(norm)
        for group in groups:
            group["lr"] = group["initial_lr"] * schedule(step - begun)
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.step = step
        window["tokens"].append(int(side.lengths[rows].sum()))
        window["seconds"].append(time.perf_counter() - started)

        if step % args.logging_steps == 0 or step == last:
            check_finite(run)
            metrics = summarise(window, args.tau)
            rates = dict(zip(("lr", "value_lr"), (group["lr"] for group in groups)))
            log(run, {**metrics, **rates})
            bar.set_postfix(loss=metrics.get("sft_loss", metrics.get("loss")))
            window.clear()
        if step % args.save_steps == 0 or step == last:
            save_checkpoint(run)
        yield step


# ----------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def score(run: Run, side: Side, rows: np.ndarray, function: Callable[[dict], Tensor], desc: str) -> Tensor:
    """`function` (a batch of b rows → (b,)) on `rows`, in length order. Returns (N,), NaN elsewhere."""
    scores = torch.full((len(side.rewards),), torch.nan)
    for micro in progress(micro_batches(rows, side.lengths, run.args.micro_batch_tokens), desc):
        with run.autocast():
            scores[micro] = function(run.batch(side, micro)).float().cpu()
    return scores


def fix_reference(run: Run) -> None:
    """π_ref is the policy as it is now: score the triplets with it, once, and keep the numbers.

    No copy of the policy is kept, and no step runs one. A resumed run finds the numbers on disk.
    """
    args, file = run.args, run.args.output_dir / "reference_logps.safetensors"
    if not file.exists():
        save_checkpoint(run)  # checkpoint-0 is π_ref
        batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps
        total = len(run.train.rewards)
        visited = np.arange(total)
        if args.max_steps * batch_size < total:  # score no row that is not going to be used
            steps = stream_rows(total, batch_size, 1, args.max_steps, args.seed)
            visited = np.concatenate([np.empty(0, dtype=np.int64), *steps])
        started = time.perf_counter()
        log_prob = lambda batch: sequence_logps(run.policy, batch)  # noqa: E731
        logps = {"train": score(run, run.train, visited, log_prob, "π_ref on training rows")}
        log(run, {"reference_seconds": time.perf_counter() - started})
        if not args.overfit_one_batch:
            logps["eval"] = score(run, run.eval, np.arange(len(run.eval.rewards)), log_prob, "π_ref on held-out rows")
        with atomic(file) as temporary:
            save_file(logps, temporary)
    logps = load_file(file)
    run.train.ref_logps, run.eval.ref_logps = logps["train"], logps.get("eval")
    torch.manual_seed(args.seed)  # the value head is the only thing drawn at random
    encoder = run.policy.get_encoder()
    run.value_model = ValueModel(encoder if args.share_policy_and_value_backbone else copy.deepcopy(encoder))
    run.value_model.to(run.device)
    if run.step > 0:  # resumed
        load_model(run.value_model, args.output_dir / f"checkpoint-{run.step}" / "value_model" / "model.safetensors")


def evaluate(run: Run) -> dict:
    """Held-out metrics, logged as eval_…; returns the rows' numbers, each (N,), and the metrics."""
    side, rows = run.eval, np.arange(len(run.eval.rewards))
    policy_logps = score(run, side, rows, lambda batch: sequence_logps(run.policy, batch), "π on held-out rows")
    value = lambda batch: run.value_model(batch["input_ids"], batch["attention_mask"])  # noqa: E731
    values = score(run, side, rows, value, "V on held-out rows")
    _, _, residual = dro_v_loss(policy_logps, side.ref_logps, values, side.rewards, run.args.tau)
    numbers = {"residual": residual, "log_ratio": policy_logps - side.ref_logps, "reward": side.rewards}
    of_fold = lambda chosen: summarise({name: [value[chosen]] for name, value in numbers.items()}, run.args.tau)  # noqa: E731
    metrics = {f"eval_{name}": value for name, value in of_fold(slice(None)).items()}
    log(run, metrics)
    folds = torch.tensor([side.folds[prompt] for prompt in side.triplets["prompt"]])
    by_fold = {str(fold): of_fold(folds == fold) for fold in sorted(set(folds.tolist()))}
    return {**numbers, "policy_logps": policy_logps, "values": values, "metrics": metrics, "folds": by_fold}


@torch.no_grad()
def generate(run: Run) -> list[dict]:
    """Answer every held-out prompt and write generations-<step>.jsonl; returns its lines.

    The samples of a batch are seeded by its prompts: they depend on no other batch and on no step.
    """
    args, side = run.args, run.eval
    row_of = {prompt: row for row, prompt in reversed(list(enumerate(side.triplets["prompt"])))}
    prompts = [prompt for prompt in side.folds if prompt in row_of]  # --max_eval_samples may have cut some
    rows = np.array([row_of[prompt] for prompt in prompts])
    order = np.argsort(side.lengths[rows, 0], kind="stable")[::-1]
    size = args.per_device_eval_batch_size
    sampling = dict(do_sample=args.temperature > 0, max_new_tokens=args.max_new_tokens)
    if args.temperature > 0:
        sampling |= dict(temperature=args.temperature, top_p=args.top_p, top_k=0)
        sampling |= dict(num_return_sequences=args.num_return_sequences)
    answers = {}
    run.policy.eval()  # in train(), gradient checkpointing would switch off the decoder's cache
    for batch in progress([order[i : i + size] for i in range(0, len(order), size)], "Answering"):
        torch.manual_seed(int(sha256("\n".join([str(args.seed), *(prompts[i] for i in batch)]))[:15], 16))
        with run.autocast():
            ids = run.policy.generate(**run.batch(side, rows[batch], ["input_ids"]), **sampling)
        texts = run.tokenizer.batch_decode(ids, skip_special_tokens=True)
        each = len(texts) // len(batch)
        answers |= {prompts[i]: texts[k * each : (k + 1) * each] for k, i in enumerate(batch)}
    run.policy.train()
    lines = [{"prompt": p, "fold": side.folds[p], "completions": answers[p]} for p in prompts]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_text(args.output_dir / f"generations-{run.step}.jsonl", text)
    return lines


# ----------------------------------------------------------------------------------------- dice

# The prompt "Ada rolls 3d6" asks for three rolls of a six-sided die; "416" is a completion, 11 its reward.
# The data are fair rolls, so π_ref is, and Eq. 2 gives the optimum exactly: each die loaded by the same
# amount, π*(k) ∝ exp(k / (s τ)), where s is the standard deviation by which rewards are normalised.

NAMES = "Ada Alan Blaise Carl Edsger Emmy Grace Hedy Henri John Kurt Leslie Maryam Niels Pierre Rózsa Sofia Sophie Srinivasa Thomas"  # fmt: skip


def dice_rolls(seed: int) -> datasets.Dataset:
    """64 fair rolls for each of 240 prompts: 20 names × 1 to 4 dice × 4, 6 or 8 sides."""
    rng = np.random.default_rng(seed)
    rows = []
    for name, dice, sides in itertools.product(NAMES.split(), (1, 2, 3, 4), (4, 6, 8)):
        for roll in rng.integers(1, sides + 1, size=(64, dice)):
            completion = "".join(map(str, roll))
            rows.append({"prompt": f"{name} rolls {dice}d{sides}", "completion": completion, "reward": int(roll.sum())})
    return datasets.Dataset.from_list(rows)


def parse_dice(prompt: str) -> tuple[int, int]:
    """"Ada rolls 3d6" → (3, 6)."""
    dice, sides = prompt.rsplit(" ", 1)[1].split("d")
    return int(dice), int(sides)


def dice_reward(prompt: str, completion: str) -> int | None:
    """The true reward: the sum of the faces, or None for what is not a roll of these dice."""
    dice, sides = parse_dice(prompt)
    faces = [int(face) if face in "12345678" else 0 for face in completion]
    return sum(faces) if len(faces) == dice and all(1 <= face <= sides for face in faces) else None


def dice_optimum(prompt: str, mean: float, std: float, tau: float) -> tuple[np.ndarray, float]:
    """Eq. 2 for dice: (π* of one die's faces, (sides,)), and V*(x) in normalised rewards."""
    dice, sides = parse_dice(prompt)
    weights = np.exp(np.arange(1, sides + 1) / (std * tau))
    return weights / weights.sum(), tau * dice * math.log(weights.mean()) - mean / std


def tiny_t5(seed: int) -> T5ForConditionalGeneration:
    """A byte-level T5 of 0.2M random parameters."""
    torch.manual_seed(seed)
    return T5ForConditionalGeneration(T5Config(
        vocab_size=384, d_model=64, d_ff=128, d_kv=16, num_heads=4, num_layers=2, dropout_rate=0.0,
        decoder_start_token_id=0,
    ))  # fmt: skip


def dice_report(run: Run, manifest: dict, final: dict, answers: dict[str, list[dict]]) -> dict:
    """Print SFT, policy and optimum side by side; returns the same numbers."""
    tau, side = run.args.tau, run.eval
    optimum = {line["prompt"]: dice_optimum(line["prompt"], manifest["reward_mean"], manifest["reward_std"], tau) for line in answers["sft"]}  # fmt: skip
    results = {"tau": tau}
    for name, lines in answers.items():
        rewards = [dice_reward(line["prompt"], text) for line in lines for text in line["completions"]]
        valid = [reward for reward in rewards if reward is not None]
        results[name] = {"reward": float(np.mean(valid)) if valid else None, "valid": len(valid) / len(rewards)}
    expected = lambda pi, dice: dice * float(pi @ np.arange(1, len(pi) + 1))  # noqa: E731
    results["optimum"] = {"reward": float(np.mean([expected(pi, parse_dice(x)[0]) for x, (pi, _) in optimum.items()]))}
    results["fair"] = {"reward": float(np.mean([parse_dice(x)[0] * (parse_dice(x)[1] + 1) / 2 for x in optimum]))}
    value_of = dict(zip(side.triplets["prompt"], final["values"].tolist(), strict=True))
    errors = [value_of[prompt] - value for prompt, (_, value) in optimum.items()]
    results["value_rmse"] = float(np.sqrt(np.mean(np.square(errors))))

    # The picture: one die that was held out. Its rolls are rows, so all probabilities are known already.
    one_die = [prompt for prompt in optimum if parse_dice(prompt)[0] == 1]
    if one_die:
        shown = min(one_die, key=lambda prompt: abs(parse_dice(prompt)[1] - 6))
        say(f"\n{shown!r}, never trained on: the probability of each face at τ = {tau:g}")
        rows = {y: i for i, (x, y) in enumerate(zip(side.triplets["prompt"], side.triplets["completion"], strict=True)) if x == shown}  # fmt: skip
        for face, best in enumerate(optimum[shown][0], start=1):
            row = rows.get(str(face))
            if row is None:  # --max_eval_samples left no such roll
                continue
            before, after = side.ref_logps[row].exp().item(), final["policy_logps"][row].exp().item()
            for label, share in [(f"{face}  π_ref", before), ("   π_θ  ", after), ("   π*   ", best)]:
                say(f"{label} {share:6.1%} {'█' * round(60 * share)}")
    say(f"\nHeld-out prompts, {sum(len(line['completions']) for line in answers['sft'])} rolls each")
    say(f"{'':<12}{'mean reward':>12}{'valid rolls':>13}")
    for name, label in [("fair", "fair dice"), ("sft", "SFT, π_ref"), ("policy", "DRO-V, π_θ"), ("optimum", "optimum, π*")]:
        reward, valid = results[name]["reward"], results[name].get("valid")
        say(f"{label:<12}{'—' if reward is None else f'{reward:.2f}':>12}{'' if valid is None else f'{valid:.1%}':>13}")
    say(f"V(x) is off V*(x) by {results['value_rmse']:.3f} (root mean square, in normalised rewards)")
    return results


# ----------------------------------------------------------------------------------------- main

RUN_FILES = ("args.json", "config.json", "model.safetensors", "checkpoint-*")  # any of them: a run is here
OWN_FILES = RUN_FILES + (
    ".*.tmp", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "value_model",
    "prompt_split_manifest.json", "metrics.jsonl", "generations-*.jsonl", "results.json", "reference_logps.safetensors",
)  # fmt: skip


def check_output_dir(args: argparse.Namespace) -> Path | None:
    """The checkpoint to go on from, if any. Raises UserError rather than mix two runs."""
    folder = args.output_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable.tmp").touch()
    except OSError as error:
        raise UserError(f"cannot write in --output_dir {folder}: {error.strerror}") from error
    if not args.resume:
        if not args.overwrite_output_dir and any(any(folder.glob(name)) for name in RUN_FILES):
            raise UserError(
                f"{folder} holds a run or a model already: --resume goes on with it, --overwrite_output_dir "
                "replaces it, another --output_dir leaves it alone"
            )
        return None
    if not checkpoints(folder):
        say(f"{folder} holds no complete checkpoint: starting afresh")
        return None
    saved = json.loads((folder / "args.json").read_text(encoding="utf-8"))["args"]
    given = json.loads(json.dumps(vars(args), default=str))
    names = [name for name in given if name not in FREE_ON_RESUME and given[name] != saved.get(name)]
    if names:
        changes = ", ".join(f"--{name} was {saved.get(name)} and is {given[name]}" for name in names)
        raise UserError(f"--resume needs the interrupted run's arguments: {changes}")
    return checkpoints(folder)[-1]


def start(args: argparse.Namespace) -> tuple[Run, dict]:
    """Load everything, check everything, and only then touch the output folder."""
    checkpoint = check_output_dir(args)
    policy, tokenizer = load_policy(args, checkpoint or args.model_name_or_path)
    train_side, eval_side, manifest = load_sides(args, tokenizer)
    if args.overfit_one_batch:
        batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps
        rows = np.unique(next(stream_rows(len(train_side.rewards), batch_size, 1, 1, args.seed)))
        train_side = Side(train_side.triplets.select(rows), train_side.rewards[rows], train_side.lengths[rows], {})
    if args.gradient_checkpointing:
        policy.gradient_checkpointing_enable()
    policy.train().to("cuda" if torch.cuda.is_available() else "cpu")
    run = Run(args, policy, tokenizer, train_side, eval_side, step=-args.sft_steps)
    folder, manifest_file = args.output_dir, args.output_dir / "prompt_split_manifest.json"
    if checkpoint:
        run.step = int(checkpoint.name.split("-", 1)[1])
        if json.loads(manifest_file.read_text(encoding="utf-8")) != json.loads(json.dumps(manifest)):
            raise UserError(f"the data are not those of the interrupted run: compare with {manifest_file}")
        kept = []  # this step's evaluation, and all that was logged after it, comes again
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            if entry["step"] < run.step or (entry["step"] == run.step and "eval_loss" not in entry):
                kept.append(line + "\n")
        write_text(folder / "metrics.jsonl", "".join(kept))
        say(f"going on from {checkpoint}")
    else:
        for path in itertools.chain.from_iterable(folder.glob(name) for name in OWN_FILES):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        write_json(manifest_file, manifest)
        versions = {module.__name__: module.__version__ for module in (torch, transformers, datasets, np)}
        everything = json.loads(json.dumps(vars(args), default=str))
        write_json(folder / "args.json", {"args": everything, "versions": {"python": sys.version, **versions}})
    return run, manifest


def export(run: Run) -> None:
    """Put the final networks where `from_pretrained(output_dir)` finds them."""
    folder, temporary = run.args.output_dir, run.args.output_dir / ".final.tmp"
    save_networks(run, temporary)
    shutil.rmtree(folder / "value_model", ignore_errors=True)
    for path in temporary.iterdir():
        os.replace(path, folder / path.name)
    temporary.rmdir()


def reproduce(run: Run, manifest: dict) -> None:
    """SFT → π_ref → evaluation → DRO-V, evaluated on the way → results."""
    args, folder = run.args, run.args.output_dir
    if run.step < 0:
        for _ in train(run, 0):
            pass
    fix_reference(run)
    # First the step at which this process takes over (0, or a checkpoint's), then each one trained.
    for step in itertools.chain([run.step], train(run, args.max_steps)):
        if not args.overfit_one_batch and (step % args.eval_steps == 0 or step == args.max_steps):
            final = evaluate(run)
        if not args.overfit_one_batch and step in (0, args.max_steps):
            generate(run)
    export(run)
    if args.overfit_one_batch:
        lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        first, *_, last = [line for line in lines if "loss" in line]
        say(f"one batch of {len(run.train.rewards)} triplets, {args.max_steps} steps: loss {first['loss']:.4g} at the start, "
            f"{last['loss']:.4g} at the end; residual's standard deviation {last['residual_std']:.4g}")  # fmt: skip
        return
    results = {"step": run.step, "tau": args.tau, **final["metrics"], "folds": final["folds"]}
    if args.dataset_name == "dice":
        files = {"sft": folder / "generations-0.jsonl", "policy": folder / f"generations-{run.step}.jsonl"}
        lines = {name: path.read_text(encoding="utf-8").splitlines() for name, path in files.items()}
        answers = {name: [json.loads(line) for line in lines[name]] for name in files}
        results |= dice_report(run, manifest, final, answers)
    write_json(folder / "results.json", results)
    say(f"the policy, its results and its answers are in {folder}")


def main(argv: Sequence[str] | None = None) -> None:
    """The whole program; `argv` as on the command line.

    Exits with code 2 on what the user can put right, 1 on what the machine or the numbers did wrong,
    128 + signal when stopped; always with one line that says how to go on.
    """
    transformers.logging.set_verbosity_error()
    huggingface_hub.logging.set_verbosity_error()
    args, run, handlers = parse_args(argv), None, {}
    flags = [flag for flag in (sys.argv[1:] if argv is None else argv) if flag not in ("--resume", "--overwrite_output_dir")]
    go_on = f"go on with: {shlex.join(['python', 'drov.py', *flags, '--resume'])}"
    try:
        run, manifest = start(args)
        stop_signals.clear()
        handlers = {signum: signal.signal(signum, request_stop) for signum in (signal.SIGINT, signal.SIGTERM)}
        reproduce(run, manifest)
    except UserError as error:
        fail(error)
    except Stopped:
        save_checkpoint(run)
        fail(f"stopped at step {run.step}, with a checkpoint; {go_on}", 128 + stop_signals[0])
    except KeyboardInterrupt:
        fail(f"stopped at once; {go_on}", 128 + signal.SIGINT)
    except FloatingPointError as error:
        fail(error, 1)
    except (OSError, SafetensorError) as error:  # a full disk, most likely
        fail(f"{error}. What was complete is kept; {go_on}", 1)
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


if __name__ == "__main__":
    main()
