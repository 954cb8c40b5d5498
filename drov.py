# SPDX-License-Identifier: Apache-2.0
"""DRO-V in one file: learning from single rated answers, with a value for every prompt.

The method of "Offline Regularised Reinforcement Learning for Large Language Models Alignment"
(arXiv 2405.19107). The data are triplets (prompt x, completion y, reward r). The goal is

    max_π  E[ r(x, y) − τ KL(π(·|x) ‖ π_ref(·|x)) ]                                    (Eq. 1)

Its solution π* and a function V* of the prompt satisfy, for every x and y,

    r(x, y) − V(x) = τ log π(y|x)/π_ref(y|x)                                           (Eq. 3)

so DRO-V fits both networks to make the two sides equal on the data:

    L(π, V) = ½ E[ (r − V − τ log π/π_ref)² ]                                          (Eq. 4)

The algorithm:
    1. score every triplet once with π_ref, the model that training starts from
    2. draw a batch of triplets (x, y, r), whoever wrote y
    3. residual δ = r − V(x) − τ log π(y|x)/π_ref(y|x)
    4. V's gradient is that of ½ δ², the policy's that of ½ δ² / τ, as if they were two losses
    5. one optimiser step for both, each at its own learning rate; go to 2

Runs to paste:
    python drov.py --dice                                            # the answer is known; a minute
    python drov.py --dice --value batch                              # what it is without a V(x)
    python drov.py --dataset_name mine.jsonl --num_eval_prompts 50   # prompt, completion, reward
    python drov.py --split_mode prompt_fold --eval_fold_index 0      # the paper's T5-L, one fold
    torchrun --nproc_per_node 4 drov.py --split_mode prompt_fold --per_device_train_batch_size 8

Left out on purpose: pairs and reward models (TRL has both), sampling during training (DRO is
offline), a second copy of π_ref (its log-probabilities are numbers on disk), dropout (log π/π_ref
would not start at 0), LoRA and sharded weights (the loss works in any loop: see the README).

Read from top to bottom: losses, models, data, the loop, evaluation, dice, comparison; then the
machinery that keeps a run safe, the arguments, main.
"""

import argparse
import atexit
import copy
import csv
import ctypes
import functools
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from argparse import Namespace
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import datasets
import filelock
import huggingface_hub
import numpy as np
import pyarrow.parquet
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

# --------------------------------------------------------------------------------------- losses


def dro_v_loss(
    policy_logps: Tensor, ref_logps: Tensor, values: Tensor, rewards: Tensor, tau: float
) -> tuple[Tensor, Tensor, Tensor]:
    """DRO-V's policy loss, value loss and the residual that they share; everything (B,).

    The means of the losses have as gradients Eq. 8 / τ (in `policy_logps`; none in `values`) and
    Eq. 7 (in `values`; none in `policy_logps`), both over B. Eq. 4 is ½ mean(residual²). Raises
    ValueError where torch would make (B, B) of (B,) and a value head's (B, 1).
    """
    log_ratio = policy_logps - ref_logps  # log π(y|x)/π_ref(y|x)
    residual = rewards - values - tau * log_ratio  # δ, zero at (π*, V*): Eq. 3
    if residual.shape != policy_logps.shape:
        raise ValueError(f"log-probabilities are {policy_logps.shape}, values {values.shape}")
    # Eq. 7: ∇_φ = (V − r + τ log π/π_ref) ∇V = −δ ∇V. The policy is held fixed.
    value_loss = 0.5 * (rewards - values - tau * log_ratio.detach()).square()
    # Eq. 8: ∇_θ = −τ [∇log π (r − V) − (τ/2) ∇(log π/π_ref)²] = −τ δ ∇log π, here divided by τ.
    # Algorithm 1 prints ½ for τ/2, which has another fixed point unless τ = 1. Adafactor and Adam
    # all but cancel a gradient's scale: to scale the update itself, divide --learning_rate by τ.
    policy_loss = 0.5 * (rewards - values.detach() - tau * log_ratio).square() / tau
    return policy_loss, value_loss, residual


def kto_loss(
    policy_logps: Tensor, ref_logps: Tensor, desirable: Tensor, kl: Tensor, beta: float
) -> Tensor:
    """KTO's loss (arXiv 2402.01306), the paper's baseline: (B,); `desirable` bool, `kl` () ≥ 0.

    `kl` is z₀, an estimate of the KL from mismatched pairs of the same batch, without a gradient.
    """
    log_ratio = policy_logps - ref_logps
    margin = torch.where(desirable, log_ratio - kl, kl - log_ratio)
    return 1 - torch.sigmoid(beta * margin)


# --------------------------------------------------------------------------------------- models

# A policy is any encoder-decoder or any decoder-only model. This section, `text_frame` and
# `generate` tell the two kinds apart; elsewhere they differ in what counts as a length.


def load_policy(source: str, revision=None, seed=0) -> tuple[PreTrainedModel, Any]:
    """A model and its tokenizer from a folder or the hub, in float32; for "dice" a byte-level T5 of
    0.2M random parameters. Raises UserError if anything is missing."""
    if source == "dice":
        torch.manual_seed(seed)
        sizes = {"vocab_size": 384, "d_model": 64, "d_ff": 128, "d_kv": 16, "num_heads": 4}
        sizes |= {"num_layers": 2, "dropout_rate": 0.0, "decoder_start_token_id": 0}
        config = transformers.T5Config(**sizes)
        return transformers.T5ForConditionalGeneration(config), transformers.ByT5Tokenizer()
    with loading(source, "give a hub name or a (finished run's) folder; --dice needs no network"):
        config = transformers.AutoConfig.from_pretrained(source, revision=revision)
        make_deterministic(config)
        kinds = (transformers.AutoModelForCausalLM, transformers.AutoModelForSeq2SeqLM)
        options = {"revision": revision, "config": config, "dtype": torch.float32}
        load = kinds[config.is_encoder_decoder].from_pretrained
        policy, info = load(source, output_loading_info=True, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, revision=revision)
    lacking = sorted(info["missing_keys"])
    require(not lacking, f"{source} lacks {len(lacking)} weights, such as {lacking[:1]}")
    # A special token that stands in no frame never comes: Gemma 3 embeds none for images.
    frame = text_frame(tokenizer, config.is_encoder_decoder)
    framed = {token for parts in frame.values() for ids in parts for token in ids}
    plain = set(tokenizer.get_vocab().values()) - set(special_tokens(tokenizer).values())
    words, rows = max(plain | framed) + 1, len(policy.get_input_embeddings().weight)
    require(words <= rows, f"{source}: the tokenizer has {words} tokens, the model embeds {rows}")
    try:
        policy.generation_config.validate(strict=True)
    except ValueError:  # it contradicts itself, and could not be saved, either
        policy.generation_config = transformers.GenerationConfig.from_model_config(config)
    config = policy.config  # its own copy
    if not config.is_encoder_decoder:
        with torch.no_grad():
            a, b = policy(torch.tensor([[0, 0], [0, 1]])).logits[:, 0].float()
        causal = torch.allclose(a, b, rtol=1e-4, atol=1e-4, equal_nan=True)
        require(causal, f"{source} reads what is to come: it is no causal language model")
    elif getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = config.pad_token_id
        require(config.pad_token_id is not None, f"{source} has no decoder_start_token_id")
        say(f"{source} names no start token: the pad token, {config.pad_token_id}, is taken")
    return policy, tokenizer


def make_deterministic(config: transformers.PreTrainedConfig) -> None:
    """Set every rate of dropout and jitter to 0, in nested configs too, that log π/π_ref starts at
    0; and take GELU's lighter form."""
    for name, value in list(vars(config).items()):
        if isinstance(value, transformers.PreTrainedConfig):
            make_deterministic(value)
        elif type(value) in (int, float) and ("drop" in name or "jitter" in name):
            setattr(config, name, type(value)(0))
        elif value == "gelu_new":  # the same function in one piece: less is kept for backward()
            setattr(config, name, "gelu_pytorch_tanh")


def position_limit(config: transformers.PreTrainedConfig) -> float:
    """The most tokens a model has positions for; relative ones, such as T5's, have no end."""
    config = config.get_text_config()  # a part of it, where a model reads more than text
    limits = [getattr(config, x, None) for x in ("max_position_embeddings", "n_positions")]
    relative = hasattr(config, "relative_attention_num_buckets")
    return math.inf if relative else min(limit or math.inf for limit in limits)


@contextmanager
def float32_head(model: PreTrainedModel, select: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within it the product with the vocabulary, the largest of all, sees selected states alone,
    and not in bfloat16, in which a logit has three digits, and rounding adds up over tokens."""
    head, exact = model.get_output_embeddings(), torch.autocast(DEVICE.type, enabled=False)
    dtype = head.weight.dtype  # float32, unless a loop of your own has loaded it otherwise
    head.forward = exact(lambda states: type(head).forward(head, select(states).to(dtype)))
    try:
        yield
    finally:
        del head.forward


def padded_behind(real: Tensor, *parts: Tensor) -> list[Tensor]:
    """(B, T) tensors with what is real in front, cut to the longest row: prompts come padded on the
    left, as generation wants them. Padding behind is unseen by what is causal, which needs no mask
    and no positions then."""
    order = real.sort(dim=1, descending=True, stable=True)[1][:, : real.sum(1).max()]
    return [part.gather(1, order) for part in parts]


def sequence_logps(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """log π(y|x) = Σ_t log π(y_t | x, y_<t), over the completion's tokens, its end included.

    `batch`: `input_ids`, `attention_mask` (B, S), padded on the right for an encoder-decoder and on
    the left for a decoder-only model; `labels` (B, T), −100 on padding. Returns (B,) float32.
    """
    x, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
    real, y = labels != -100, labels.clamp(min=0)
    if model.config.is_encoder_decoder:  # the decoder's state at t has read y_<t
        start = torch.full_like(y[:, :1], model.config.decoder_start_token_id)
        inputs = {"input_ids": x, "attention_mask": mask, "use_cache": False}
        inputs["decoder_input_ids"] = torch.cat([start, y[:, :-1]], dim=1)  # (B, T)
        predicts = real
    else:  # x and y are one text, and y_1 is predicted at the prompt's last token
        text, predicts = torch.cat([x, y], dim=1), F.pad(real, (x.shape[1] - 1, 1))  # (B, S + T)
        text, predicts = padded_behind(torch.cat([mask.bool(), real], dim=1), text, predicts)
        inputs = {"input_ids": text, "use_cache": False}
    with float32_head(model, lambda states: states[predicts]):
        logits = model(**inputs).logits.float()  # (N, vocabulary), for the N real tokens of y
    token_logps = -F.cross_entropy(logits, labels[real], reduction="none")  # (N,)
    return token_logps.new_zeros(labels.shape).masked_scatter(real, token_logps).sum(-1)


class ValueModel(nn.Module):
    """V_φ(x), the value of a prompt in normalised rewards; or, of no policy, one learnt number.

    The paper leaves the architecture open. Here it is a copy of π_ref below its head: an encoder's
    mean over the prompt's tokens; of a decoder-only model the state at the prompt's last token. The
    head is the difference of two that start equal: V starts at exactly 0, the mean reward, and yet
    learns (Adafactor moves a parameter in proportion to its own size: zeros would stay zeros).
    """

    def __init__(self, policy: PreTrainedModel | None, shared: bool = False):
        super().__init__()
        self.body, start = None, torch.ones(1)
        if policy is not None:
            self.mean = policy.config.is_encoder_decoder
            body = policy.get_encoder() if self.mean else policy.base_model
            self.body = body if shared else copy.deepcopy(body)
            width = body.get_input_embeddings().weight.shape[1]
            start = torch.randn(width) * width**-0.5
        self.head = nn.Parameter(start.repeat(2, 1))  # (2, width)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """`input_ids`, `attention_mask` (B, S), padded as for `sequence_logps` → (B,) float32."""
        if self.body is None:
            pooled = self.head.new_ones(len(input_ids), 1)
        elif self.mean:
            states = self.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            weights = attention_mask / attention_mask.sum(-1, keepdim=True)
            pooled = (states.float() * weights.unsqueeze(-1)).sum(1)  # (B, width)
        else:
            (ids,) = padded_behind(attention_mask.bool(), input_ids)
            states = self.body(input_ids=ids, use_cache=False).last_hidden_state
            pooled = states[range(len(ids)), attention_mask.sum(1) - 1].float()  # (B, width)
        # Not a matrix product, which autocast would round.
        return (pooled * (self.head[0] - self.head[1])).sum(-1)


# ----------------------------------------------------------------------------------------- data

# Files are read here, value by value as they stand: a library that guesses a column's type makes a
# number of "4", a time of a date, and 0 of 3e-11.


def read_file(path: str) -> Iterator[tuple[int, dict]]:
    """The objects of a .json, .csv or else JSON Lines file, with their lines' numbers (an array's
    items'). Raises UserError with the number of the line where something else stands."""
    number, ending = 0, Path(path).suffix.lower()

    def lines() -> Iterator[str]:  # a newline ends one, U+2028 and its like do not
        nonlocal number
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")

    try:
        if ending == ".json":
            rows = json.loads("".join(lines()))
        elif ending == ".csv":
            csv.field_size_limit(2**31 - 1)
            rows = csv.DictReader(lines(), strict=True)
        else:
            rows = map(json.loads, filter(str.strip, lines()))
        for item, row in enumerate(rows, start=1):
            number = item if ending == ".json" else number
            require(isinstance(row, dict), f"{row!r:.50} is no JSON object")
            if ending == ".csv":  # DictReader puts None where a field lacks a name or a value
                fits = None not in (*row, *row.values()) and len(row) == len(rows.fieldnames)
                says = f"other fields than the header's {rows.fieldnames}, or a column twice"
                require(fits, says)
            yield number, row
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, line {number} is not UTF-8: save it as that") from error
    except (ValueError, TypeError, RecursionError, csv.Error) as error:
        number = getattr(error, "lineno", number) if ending == ".json" else number
        raise UserError(f"{path}, line {number}: {getattr(error, 'msg', error)}") from error


def read_rows(args: Namespace) -> Iterator[dict]:
    """The raw rows of dice, a file, or what `datasets` reads: a folder or a name on the hub."""
    name, ending = args.dataset_name, Path(args.dataset_name).suffix.lower()
    takes = "--dataset_name takes a .jsonl, .json, .csv or .parquet file, a folder or a hub name"
    endings = (".jsonl", ".json", ".csv", ".parquet")
    a_file = os.path.isfile(name) or ending in endings or name[:1] in "./~"
    with loading(name, f"{takes}; --dice needs none"):
        if name == "dice":
            yield from dice_rolls(args.seed)
        elif os.path.isdir(name) or not a_file:
            options = {"split": args.dataset_split, "revision": args.dataset_revision}
            yield from datasets.load_dataset(name, **options)
        elif ending == ".parquet":
            file = pyarrow.parquet.ParquetFile(name)
            columns = [x for x in file.schema_arrow.names if x in COLUMNS] or None
            for batch in file.iter_batches(1000, columns=columns):
                yield from batch.to_pylist()
        else:
            require(ending in endings, f"{name} is none of these: {takes}")
            yield from (row for _, row in read_file(name))


COLUMNS = ("prompt", "completion", "reward", "instruction", "completions")
ASPECTS = ("helpfulness", "honesty", "instruction_following", "truthfulness")


def text_of(part: Any, name: str, role: str) -> str:
    """A text as it stands, or a chat message's. Raises UserError with the cause for neither."""
    match part:
        case [{"role": speaker, "content": content}] if speaker == role:
            part = content
        case list():
            raise UserError(f"{name} that is not one {role} turn")
    require(isinstance(part, str | None), f"{name} that is not text")
    require(part and part.strip(), f"without a {name}")
    require(not re.search("[\ud800-\udfff]", part), "text that is no valid Unicode")
    return part


def load_triplets(args: Namespace, dropped: Counter | None = None) -> datasets.Dataset:
    """Read the data: columns `prompt` (str, stripped), `completion` (str), `reward` (float, raw).

    Rows are plain or UltraFeedback's, which have `completions`. What cannot be used is left out and
    counted by cause, in a printed line and in `dropped`. Raises UserError if data cannot be read,
    lack the columns or have no usable row.
    """
    name, key, seen, tables = args.dataset_name, args.reward_key, set(), []
    dropped = Counter() if dropped is None else dropped
    keys = ("annotations", key, "Rating") if key in ASPECTS else (key,)
    get = lambda part, name: part.get(name) if isinstance(part, dict) else None

    def triplets() -> Iterator[dict]:
        for row in progress(read_rows(args), "Reading", unit=" rows"):
            seen.update(row)
            parts = [(row.get("prompt"), row.get("completion"), row.get("reward"))]
            if "completions" in row and "completion" not in row:
                given, x = row["completions"], row.get("instruction")
                answers = given if isinstance(given, list) and given else [None]  # dropped, as one
                parts = [(x, get(y, "response"), functools.reduce(get, keys, y)) for y in answers]
            for x, y, reward in parts:
                try:
                    x, y = text_of(x, "prompt", "user"), text_of(y, "completion", "assistant")
                    # UltraFeedback's ratings are strings, thumbs booleans; float() takes "1_0".
                    number = str(reward).strip().lower().replace("_", "?")
                    reward = float({"true": 1, "false": 0}.get(number, number))
                    require(math.isfinite(reward), "reward that is not finite")
                    yield {"prompt": x.strip(), "completion": y, "reward": reward}
                except UserError as error:
                    dropped[str(error)] += 1
                except ValueError:
                    dropped["without a reward that is a number"] += 1

    usable = triplets()
    while block := list(itertools.islice(usable, 8000)):  # all at once takes four times as much
        tables.append(datasets.Dataset.from_list(block))
    known = seen >= {"prompt", "completion", "reward"} or seen >= {"instruction", "completions"}
    needs = "it needs prompt, completion and reward, or UltraFeedback's instruction and completions"
    require(known, f"{name} has the columns {sorted(seen)}: {needs}")
    causes = ", ".join(f"{count} {cause}" for cause, count in sorted(dropped.items())) or "none"
    says = f"{sum(map(len, tables))} triplets from {name}; rows dropped: {causes}"
    require(tables, f"no usable row: {says}")
    say(says)
    return datasets.concatenate_datasets(tables)


def sha256(*texts: object) -> str:
    """Hexadecimal digest of the texts, a line each."""
    return hashlib.sha256("\n".join(map(str, texts)).encode()).hexdigest()


def split_prompts(
    prompts, mode, *, seed, num_eval_prompts, num_eval_folds, eval_prompts_per_fold, eval_fold_index
) -> tuple[list[str], list[str]]:
    """(train, eval): two disjoint lists of unique prompts, in the order of a seeded hash.

    It depends on the set of prompts and the arguments alone. prompt_seeded holds out the first
    `num_eval_prompts`; prompt_fold one fold, or with "all" every fold (the paper's protocol: train
    once, answer all). Raises UserError if there are too few prompts, or no such fold.
    """
    unique = sorted(set(prompts), key=lambda prompt: sha256(seed, prompt))
    folds, size, index = num_eval_folds, eval_prompts_per_fold, eval_fold_index
    if mode == "prompt_seeded":
        folds, size, index = 1, num_eval_prompts, 0
    says = f"--eval_fold_index must be 0 to {folds - 1}, or all"
    require(index == "all" or 0 <= index < folds, says)
    first, last = (0, folds * size) if index == "all" else (index * size, (index + 1) * size)
    lower = "num_eval_prompts" if mode == "prompt_seeded" else "eval_prompts_per_fold"
    says = f"cannot hold out {folds * size} of {len(unique)} different prompts: lower --{lower}"
    require(folds * size <= len(unique) and last - first < len(unique), says)
    return unique[:first] + unique[last:], unique[first:last]


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The tokens that control a model, by their spelling."""
    added = {str(t): number for number, t in tokenizer.added_tokens_decoder.items() if t.special}
    return added | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids))


def text_frame(tokenizer: PreTrainedTokenizerBase, is_encoder_decoder: bool) -> dict[str, list]:
    """The ids around texts: {"prompt": [before, behind], "completion": [before, behind]}.

    They are what the tokenizer puts around a text, or the chat template, rendered once and with
    placeholders (a template may edit an answer, or write the date). A completion ends with the end
    of its turn, or an end token, once. Raises UserError where neither can be found.
    """
    plain = functools.partial(tokenizer.encode, add_special_tokens=False)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def around(**text: str) -> list[list[int]]:
        ids, body = tokenizer(**text).input_ids, plain("a")
        places = [i for i in range(len(ids)) if ids[i : i + len(body)] == body]
        cure = "is it the model's, and saved beside it?"
        require(body and places, f"the tokenizer does not know, or rewrites, the text a: {cure}")
        return [ids[: places[0]], ids[places[0] + len(body) :]]

    before, behind = [], []
    if is_encoder_decoder:
        prompt, (before, behind) = around(text="a"), around(text_target="a")
        behind = list(dict.fromkeys(behind))  # an end token, once
    elif not tokenizer.chat_template:
        prompt = [around(text="a")[0], []]
    else:
        user, answer = "Placeholder-of-the-prompt", "Placeholder-of-the-answer"
        turns = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
        with loading("the chat template", "it does not show a user's turn and an answer once each"):
            text = tokenizer.apply_chat_template(turns, tokenize=False, enable_thinking=False)
            start, rest = text.split(user)  # raises where it stands twice, or not at all
            between, rest = rest.split(answer)
        prompt, ids = [plain(start), plain(between)], plain(rest)
        control = special_tokens(tokenizer).values()
        ends = [i + 1 for i, token in enumerate(ids) if token in control]
        behind = ids[: ends[0]] if ends else plain(rest.rstrip()) + end
    ended = end or behind and behind[-1] in special_tokens(tokenizer).values()
    require(ended, "the tokenizer has no end token: set its eos_token")
    return {"prompt": prompt, "completion": [before, behind or end]}


def encode(
    prompts, completions, tokenizer, frame, max_prompt_length, max_completion_length, counts=None
) -> tuple[list[list[int]], list[list[int]]]:
    """Ids of prompts and of completions, in their frame, none longer than its limit.

    A long prompt keeps its frame and its end; a long completion its beginning and no end token,
    which would teach to stop in mid-sentence. Text is not control: what spells a special token is
    cut behind its first character. `counts` (a Counter) is told what was cut, spelt and unknown.
    Raises UserError where the frame leaves no room.
    """
    counts, control = Counter() if counts is None else counts, special_tokens(tokenizer)
    spelling = "|".join(map(re.escape, filter(None, control))) or r"(?!)"
    spelt, cut = re.compile(spelling), re.compile(f"(?<=(?=(?:{spelling})).)", re.DOTALL)
    unknown, chain = tokenizer.unk_token_id, itertools.chain.from_iterable
    forbidden, sides = set(control.values()) - {unknown}, {"prompt": [], "completion": []}
    limits = (prompts, max_prompt_length), (completions, max_completion_length)
    for (name, side), (texts, limit) in zip(sides.items(), limits):
        before, behind = frame[name]
        room = limit - len(before) - len(behind)
        require(room > 0, f"the frame has {limit - room} tokens: --max_{name}_length must be more")
        # Each different text is tokenised once, in pieces where it spells a special token.
        parts = {text: cut.split(text) if spelt.search(text) else [text] for text in texts}
        flat = list(chain(parts.values()))
        ids = iter(tokenizer(flat, add_special_tokens=False, return_attention_mask=False).input_ids)
        bodies = {text: list(chain(itertools.islice(ids, len(parts[text])))) for text in parts}
        for text in texts:
            # What a normaliser has made a special token's spelling is left out.
            body = [token for token in bodies[text] if token not in forbidden]
            counts["tokens"] += len(body)
            counts["unknown_tokens"] += body.count(unknown)
            counts["special_spellings"] += len(parts[text]) > 1
            counts[f"cut_{name}s"] += len(body) > room
            keeps_end = name == "prompt" or len(body) <= room
            side.append(before + body[-room:] + behind if keeps_end else (before + body)[:limit])
        require(all(side), f"a {name} has no token: the tokenizer knows nothing of it")
    return sides["prompt"], sides["completion"]


@dataclass
class Side:
    """N rows that go through the models: one side of the split, mismatched pairs, rolls of dice."""

    prompts: list[str]
    x: list[np.ndarray]  # each prompt's ids, in their frame
    y: list[np.ndarray]  # each completion's
    rewards: Tensor  # (N,) normalised
    padding: str  # where prompts are padded, "left" or "right"
    ref_logps: Tensor | None = None  # (N,) log π_ref(y|x); NaN in rows that are never visited

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """(N, 2) tokens of prompt and completion."""
        return np.stack([list(map(len, self.x)), list(map(len, self.y))], axis=1)

    @functools.cached_property
    def widths(self) -> np.ndarray:
        """What a row takes in a batch: encoder and decoder (N, 2), or one text of both (N, 1)."""
        return self.lengths if self.padding == "right" else self.lengths.sum(1, keepdims=True)

    def batch(self, rows: np.ndarray) -> dict[str, Tensor]:
        """Some rows on the device, padded by position: whatever stands there is masked."""

        def pad(column: list[np.ndarray], side: str) -> Tensor:
            ids = [torch.tensor(column[row], dtype=torch.int64) for row in rows]
            return nn.utils.rnn.pad_sequence(ids, True, -100, side).to(DEVICE)

        x, y = pad(self.x, self.padding), pad(self.y, "right")
        return {"input_ids": x.clamp(min=0), "attention_mask": (x >= 0).long(), "labels": y}


def make_side(prompts, completions, rewards, encoding: Callable, padding: str) -> Side:
    """Tokenise N rows; `encoding` is `encode`, given all but the texts."""
    side = Side(prompts, [], [], torch.tensor(rewards, dtype=torch.float32), padding)
    require(side.rewards.isfinite().all(), "a reward is too far from the training side's")
    for start in progress(range(0, len(prompts), 1000), "Tokenising"):
        part = slice(start, start + 1000)
        for known, ids in zip((side.x, side.y), encoding(prompts[part], completions[part])):
            known.extend(np.array(row, dtype=np.int32) for row in ids)
    return side


def load_sides(args: Namespace, encoding: Callable, padding: str) -> tuple[dict, dict, dict]:
    """Triplets → prompt split → normalised rewards → tokens. Returns the sides ("train" and "eval";
    for KTO "mismatched", for dice "rolls"), each held-out prompt's fold in the order of the split,
    and the manifest. Raises UserError."""
    dropped, counts, index, sides, manifest = Counter(), Counter(), args.eval_fold_index, {}, {}
    triplets = load_triplets(args, dropped)
    row_prompts = triplets["prompt"][:]
    names = ("seed", "num_eval_prompts", "num_eval_folds", "eval_prompts_per_fold")
    settings, sizes = {name: getattr(args, name) for name in names}, Counter(row_prompts)
    split = functools.partial(split_prompts, sizes, args.split_mode, **settings)
    fold_names = range(args.num_eval_folds) if args.split_mode == "prompt_fold" else [0]
    folds = {fold: split(eval_fold_index=fold)[1] for fold in fold_names}
    asked = [index] if index in folds else folds  # all of them, or prompt_seeded's one

    def limited(prompts: list[str], most: float) -> list[str]:
        """The first whole prompts of no more than `most` triplets; one at least."""
        total = np.cumsum([sizes[prompt] for prompt in prompts])
        return prompts[: max(1, int(np.searchsorted(total, most, side="right")))]

    train = set(limited(split(eval_fold_index=index)[0], args.max_train_samples or math.inf))
    share = (args.max_eval_samples or math.inf) / len(asked)
    fold_of = {prompt: fold for fold in asked for prompt in limited(folds[fold], share)}
    names = ("dataset_name", "dataset_revision", "dataset_split", "reward_key", "split_mode")
    settings |= {name: getattr(args, name) for name in (*names, "eval_fold_index")}
    for name, prompts in {"train": train, "eval": fold_of}.items():
        table = triplets.select([i for i, prompt in enumerate(row_prompts) if prompt in prompts])
        texts, raw = (table["prompt"][:], table["completion"][:]), np.array(table["reward"][:])
        if name == "train":
            # The paper's "mean 0 and variance 1 across the dataset", from the training side alone:
            # statistics that include the held-out rewards would leak them.
            mean, std, low, high = (float(f(raw)) for f in (np.mean, np.std, np.min, np.max))
            usable = 1e-12 * max(abs(low), abs(high)) < std < math.inf
            says = f"training rewards, {low} to {high}: all equal but for rounding, or too wide"
            require(usable or args.loss == "sft", says)  # SFT reads none
            std = std if usable else 1.0
        encoder = functools.partial(encoding, counts=counts)
        sides[name] = make_side(*texts, (raw - mean) / std, encoder, padding)
        manifest |= {f"{name}_rows": len(raw), f"{name}_prompts": len(prompts)}
        manifest[f"{name}_prompts_sha256"] = sha256(*sorted(prompts))
        digests = (sha256(json.dumps(batch)) for batch in table.iter(1000))
        manifest[f"{name}_triplets_sha256"] = sha256(*digests)
    manifest |= {"reward_mean": mean, "reward_std": std, "reward_min": low, "reward_max": high}
    rows = manifest["train_rows"] + manifest["eval_rows"]
    manifest |= {name: counts[name] / rows for name in ("cut_prompts", "cut_completions")}
    manifest["unknown_tokens"] = unknown = counts["unknown_tokens"] / max(1, counts["tokens"])
    manifest["special_spellings"] = counts["special_spellings"]
    known = {ids.tobytes() for ids in sides["train"].x}
    alike = {p for p, x in zip(sides["eval"].prompts, sides["eval"].x) if x.tobytes() in known}
    manifest["held_out_read_like_training"] = len(alike)
    say(", ".join(f"{name} {x:.6g}" for name, x in manifest.items() if type(x) in (int, float)))
    says = f"{unknown:.0%} of the tokens are unknown to the tokenizer"
    require(unknown <= 0.05, f"{says}: it is not made for these texts, or its files are missing")
    if unknown:
        say("of unknown tokens: a T5's tokenizer has none for line breaks and braces")
    manifest["held_out"] = {str(k): [sha256(p)[:16] for p in folds[k]] for k in folds}
    if args.overfit_one_batch:
        del sides["eval"]
    if args.loss == "kto":
        sides["mismatched"] = mismatched(sides["train"])
    if args.dataset_name == "dice" and args.loss != "sft" and "eval" in sides:
        rolls = [(p, *roll) for p in fold_of if " 4d" not in p for roll in all_rolls(p).items()]
        require(rolls, "no held-out prompt has less than four dice: hold out more")
        *texts, raw = zip(*rolls)
        sides["rolls"] = make_side(*texts, (np.array(raw) - mean) / std, encoding, padding)
    return sides, fold_of, settings | manifest | {"dropped": dict(dropped)}


def mismatched(side: Side) -> Side:
    """KTO's mismatched pairs: each row's prompt with the completion of the row N/2 further on, or
    of the next one with another prompt."""
    prompts = np.array(side.prompts, dtype=object)
    require(len(set(prompts)) > 1, "--loss kto needs a second training prompt, to mismatch answers")
    partner = np.roll(np.arange(len(prompts)), -(len(prompts) // 2))
    while (same := prompts[partner] == prompts).any():
        partner[same] = (partner[same] + 1) % len(prompts)
    return Side(side.prompts, side.x, [side.y[row] for row in partner], side.rewards, side.padding)


def step_rows(step: int, num_rows: int, batch_size: int, seed: int) -> np.ndarray:
    """The (batch_size,) rows of a step, counted from 1: a part of an endless chain of permutations.

    Nothing but the arguments decides, so a resumed run needs no state, and processes no talk.
    """
    epochs, places = np.divmod(np.arange((step - 1) * batch_size, step * batch_size), num_rows)
    orders = {e: np.random.default_rng([seed, e]).permutation(num_rows) for e in np.unique(epochs)}
    return np.array([orders[epoch][place] for epoch, place in zip(epochs, places)])


def micro_batches(rows: np.ndarray, widths: np.ndarray, max_tokens: float) -> list[np.ndarray]:
    """Cut `rows` into pieces of like length: at most `max_tokens` with padding, and a tenth of that
    of padding; or a single row."""
    order = np.lexsort(widths[rows].T)[::-1]  # by completion, then by prompt; or by the whole text
    pieces, longest, tokens = [], 0, 0
    for row in rows[order]:
        longest, tokens = np.maximum(longest, widths[row]), tokens + widths[row].sum()
        padded = (len(pieces[-1]) + 1) * longest.sum() if pieces else math.inf
        if padded > max_tokens or padded - tokens > max_tokens / 10:
            pieces.append([])
            longest, tokens = widths[row], widths[row].sum()
        pieces[-1].append(row)
    return [np.array(piece) for piece in pieces]


# ------------------------------------------------------------------------------------- the loop


@dataclass
class Run:
    """What the loop works on."""

    args: Namespace
    policy: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sides: dict[str, Side] = field(default_factory=dict)
    fold_of: dict[str, int] = field(default_factory=dict)
    manifest: dict = field(default_factory=dict)
    value_model: ValueModel | None = None
    optimizer: torch.optim.Optimizer | None = None
    step: int = 0  # the last one done, or the one being done

    def __post_init__(self) -> None:
        args = self.args
        # A GPU takes a batch at once. On a CPU this much is about as fast as more; a model with an
        # encoder has half of its layers, and of the memory for them, for each token.
        tokens = 1024 if self.policy.config.is_encoder_decoder else 640
        if DEVICE.type == "cuda":
            tokens = args.max_prompt_length + args.max_completion_length
            tokens *= args.per_device_train_batch_size
        args.micro_batch_tokens = args.micro_batch_tokens or tokens
        # Embeddings get sparse gradients: a piece has few of all words, adding zeros takes long.
        for module in self.policy.modules():
            if getattr(module, "weight", None) is self.policy.get_input_embeddings().weight:
                module.sparse = True


def in_pieces(run: Run, side: Side, rows: np.ndarray, *passes: tuple[Callable, np.ndarray]) -> list:
    """For each pass, (work, widths), `work(piece, batch)` for each piece of this process's share of
    `rows`; the results, in a list. Out of memory halves the pieces, drops the gradients so far and
    begins again; RunError if a single row does not fit."""
    args, by_length = run.args, rows[np.argsort(side.lengths[rows].sum(1), kind="stable")]
    own = by_length[RANK::WORLD_SIZE]  # every n-th row by length: processes have equal work
    while True:
        cut = [(work, micro_batches(own, to, args.micro_batch_tokens)) for work, to in passes]
        try:
            with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=args.bf16):
                return [work(piece, side.batch(piece)) for work, pieces in cut for piece in pieces]
        except (RuntimeError, MemoryError) as error:
            if not isinstance(error, MemoryError) and not OUT_OF_MEMORY.search(str(error)):
                raise
        # Here, outside of `except`, nothing holds the failed piece's tensors any longer.
        if run.optimizer:
            run.optimizer.zero_grad(set_to_none=False)
        pieces = [piece for _, pieces in cut for piece in pieces]
        largest = int(max(len(piece) * side.widths[piece].max(0).sum() for piece in pieces))
        if max(map(len, pieces)) == 1:
            cure = "--resume it where there is more memory, or start elsewhere with lower lengths"
            raise RunError(f"out of memory: one row of {largest} tokens does not fit: {cure}")
        args.micro_batch_tokens = min(args.micro_batch_tokens, largest) // 2
        say(f"out of memory: going on with --micro_batch_tokens {args.micro_batch_tokens}")


def for_each(run: Run, side: Side, rows, function, desc="", widths=None, grad=False) -> list:
    """`function(piece, batch)`, an item for each row of a piece, in length order, without gradients
    unless `grad`: the items of all `rows`, in their order, on all processes."""

    @torch.set_grad_enabled(grad)
    def work(piece: np.ndarray, batch: dict[str, Tensor]) -> list[tuple[int, Any]]:
        return list(zip(piece.tolist(), function(piece, batch), strict=True))

    widths, parts = side.widths if widths is None else widths, []
    # Chunks are alike on all processes, though one may have run out of memory.
    chunks = micro_batches(rows, widths, 16 * max(gather(run.args.micro_batch_tokens)))
    # What has a `desc` stands outside of steps: a signal ends it here if nothing is lost by that,
    # the run being at a checkpoint or at step 0; else at the next log line.
    may_stop = desc and gather(run.step in (0, *checkpoints(Path(run.args.output_dir))))[0]
    for chunk in progress(chunks, desc) if desc else chunks:
        if may_stop and any(gather(bool(stop_signals))):
            raise KeyboardInterrupt("stopped")
        parts += in_pieces(run, side, chunk, (work, widths))
    items = {row: item for own in gather(parts) for part in own for row, item in part}
    return [items[row] for row in rows.tolist()]


def score(run: Run, side: Side, rows=None, desc="", values=False, grad=False) -> tuple[Tensor, ...]:
    """log π(y|x) and, with `values`, V(x) of a side or of some of its rows, (N,) each."""

    def function(piece: np.ndarray, batch: dict[str, Tensor]) -> list[list[float]]:
        logps = sequence_logps(run.policy, batch)
        value = run.value_model if values and run.value_model else lambda x, mask: logps * math.nan
        return torch.stack([logps, value(batch["input_ids"], batch["attention_mask"])], -1).tolist()

    rows = np.arange(len(side.x)) if rows is None else rows
    items = for_each(run, side, rows, function, desc, grad=grad)
    logps, value = torch.tensor(items, dtype=torch.float32).reshape(-1, 2).unbind(-1)
    if not logps.isfinite().all():
        raise RunError("a log-probability is not finite: the model is damaged, or has diverged")
    return logps, value


def fix_reference(run: Run) -> None:
    """Score with π_ref, the policy before its first step, once: the numbers are on disk, no copy of
    it is kept. Then score a batch twice. Raises RunError if that differs: the model is random."""
    args, side, first = run.args, run.sides["train"], run.step == 0
    file, total = Path(args.output_dir, "reference_logps.safetensors"), len(side.x)
    if args.loss != "sft" and not gather(file.exists())[0]:
        require(first, f"{file} is gone, and π_ref with it: start again, elsewhere")
        logps, started = {}, time.perf_counter()
        # Score no row that is not going to be used: the first epoch, as `step_rows` has it.
        steps = 1 if args.overfit_one_batch else args.max_steps
        used = step_rows(1, total, total, args.seed)[: steps * args.train_batch_size]
        for name, scored in run.sides.items():
            rows = used if name in ("train", "mismatched") else np.arange(len(scored.x))
            logps[name] = torch.full((len(scored.x),), math.nan)
            logps[name][rows] = score(run, scored, rows, f"π_ref on {name} rows")[0]
            if name == "train":
                log(run, {"reference_seconds": time.perf_counter() - started})
        on_first(lambda: write(file, lambda path: save_file(logps, path)))
    if args.loss != "sft":
        with loading(file, "π_ref is lost with it: start again, elsewhere"):
            logps = load_file(file)
            for name, scored in run.sides.items():
                require(len(scored.x) == len(logps[name]), f"{file} is another run's")
                scored.ref_logps = logps[name]
    if first and args.max_steps > 0:
        rows = np.unique(step_rows(1, total, args.train_batch_size, args.seed))
        # With gradients, as in a step: for them torch may take other kernels.
        once, again = (score(run, side, rows, grad=True)[0] for _ in range(2))
        if not torch.allclose(once, again, rtol=1e-3, atol=1e-3):
            raise RunError("a batch does not score alike twice: is there NaN, dropout or noise?")
        if args.loss != "sft":
            off = (once - side.ref_logps[rows]).square().mean().sqrt()
            say(f"before the first step log π/π_ref is {off:.2g} on its batch (root mean square)")


def step_passes(
    run: Run, divisor: float, mean_reward: float, mean_log_ratio: float
) -> list[tuple[Callable, np.ndarray]]:
    """What adds a step's gradient, as passes of `in_pieces`; a record is what is logged, by name.
    Another loss of log π/π_ref is a function like `kto_loss`, a branch here, a name in
    `make_parser`."""
    args, side = run.args, run.sides["train"]
    logps = torch.zeros(len(side.x), device=DEVICE)  # of the step's rows, no graph; so are values
    # DRO-P, Eq. 15: of ½ Var(u), u = r − τ log π/π_ref, the gradient is mean((u − ū) ∇u): V = ū
    values = torch.full_like(logps, mean_reward - args.tau * mean_log_ratio)

    def descend(losses: Tensor) -> None:
        with torch.autocast(DEVICE.type, enabled=False):
            (losses.sum() / divisor).backward()

    @torch.no_grad()
    def fix_values(piece: np.ndarray, batch: dict[str, Tensor]) -> None:
        values[piece] = run.value_model(batch["input_ids"], batch["attention_mask"])

    def policy_gradient(piece: np.ndarray, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        logp, rewards = sequence_logps(run.policy, batch), side.rewards[piece].to(DEVICE)
        tokens, padded = side.widths[piece].sum(), len(piece) * side.widths[piece].max(0).sum()
        record = {"tokens": torch.tensor([tokens]), "padded_tokens": torch.tensor([padded])}
        if args.loss == "sft":  # maximum likelihood
            losses = record["loss"] = -logp
            record["completion_tokens"] = (batch["labels"] != -100).sum(-1)
        else:
            ref_logp = side.ref_logps[piece].to(DEVICE)
            record |= {"log_ratio": logp - ref_logp, "reward": rewards}
        if args.loss == "kto":
            desirable = rewards > mean_reward + 1e-6  # not by rounding alone
            kl = torch.tensor(max(0.0, mean_log_ratio))
            losses = record["loss"] = kto_loss(logp, ref_logp, desirable, kl, args.tau)
        elif args.loss == "dro_v":
            record["value"] = values[piece]
            losses, _, _ = dro_v_loss(logp, ref_logp, values[piece], rewards, args.tau)
        logps[piece] = logp.detach()
        descend(losses)
        return {name: tensor.detach() for name, tensor in record.items()}

    def value_gradient(piece: np.ndarray, batch: dict[str, Tensor]) -> None:
        ref_logp, rewards = side.ref_logps[piece].to(DEVICE), side.rewards[piece].to(DEVICE)
        value = run.value_model(batch["input_ids"], batch["attention_mask"])
        _, losses, _ = dro_v_loss(logps[piece], ref_logp, value, rewards, args.tau)
        descend(losses)

    # Both gradients are taken at the same π and V. V reads prompts alone, so its pieces have more
    # rows (without a graph, as in `generate`, eight times more); and one graph at a time is alive.
    passes = [(policy_gradient, side.widths)]
    if run.value_model:
        prompts = side.lengths[:, :1]
        passes = [(fix_values, prompts / 8), *passes, (value_gradient, prompts)]
    return passes


def train(run: Run) -> None:
    """The loop, in the order in which things happen; at a log line: log, evaluate, save, stop."""
    args, side, groups = run.args, run.sides["train"], run.optimizer.param_groups
    parameters = [p for group in groups for p in group["params"]]
    # Networks are clipped each by itself; a shared backbone makes them one.
    parts = [parameters] if args.share_policy_and_value_backbone else [g["params"] for g in groups]
    networks = dict(zip(("grad_norm", "value_grad_norm"), parts))
    # The + 1 and steps from 1: neither the first step nor the last has a learning rate of 0.
    schedule = (args.lr_scheduler_type, run.optimizer, args.warmup_steps, args.max_steps + 1)
    factor = transformers.get_scheduler(*schedule).lr_lambdas[0]
    window = defaultdict(list)  # recorded since the last log line, by name
    for step in progress(range(run.step + 1, args.max_steps + 1), f"{args.loss} steps"):
        run.step = step
        started = time.perf_counter()
        data_step = 1 if args.overfit_one_batch else step
        rows = step_rows(data_step, len(side.x), args.train_batch_size, args.seed)
        # A mean over the whole batch, SFT's over its tokens: cutting it changes no gradient.
        divisor = side.lengths[rows, 1].sum() if args.loss == "sft" else len(rows)
        # The whole batch's mean reward and log π/π_ref (KTO's of mismatched pairs), where needed.
        means = (math.nan, math.nan)
        if args.loss == "kto" or args.value == "batch":
            other = run.sides.get("mismatched", side)
            log_ratio = score(run, other, rows)[0] - other.ref_logps[rows]
            means = side.rewards[rows].mean().item(), log_ratio.mean().item()
        records = in_pieces(run, side, rows, *step_passes(run, divisor, *means))
        for record in filter(None, records):  # V's passes leave none
            for name, tensor in record.items():
                window[name].append(tensor)
        if dist.is_initialized():
            for pending in [dist.all_reduce(p.grad, async_op=True) for p in parameters]:
                pending.wait()
        for name, network in networks.items():
            norm = nn.utils.get_total_norm([p.grad for p in network])
            window[name].append(norm.reshape(1))
            if args.max_grad_norm:
                nn.utils.clip_grads_with_norm_(network, args.max_grad_norm, norm)
        for group in groups:  # initial_lr: get_scheduler has put it there
            group["lr"] = group["initial_lr"] * factor(run.step)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=False)
        window["step_seconds"].append(torch.tensor([time.perf_counter() - started]))
        last = run.step == args.max_steps
        if run.step % args.logging_steps and not last:
            continue

        metrics = summarise(window, args.tau)
        window.clear()
        finite = all(parameter.isfinite().all() for parameter in parameters)
        if not finite or None in map(metrics.get, ("loss", *networks)):  # None: not finite
            cure = "start elsewhere, with a lower --learning_rate or --max_grad_norm 1"
            raise RunError(f"loss, gradient or weights not finite by step {run.step}: {cure}")
        log(run, metrics | {name: group["lr"] for name, group in zip(("lr", "value_lr"), groups)})
        save = last or run.step % args.save_steps == 0
        if save and not args.overfit_one_batch:
            evaluate(run)
        stop = any(gather(bool(stop_signals)))
        if save or stop:
            on_first(lambda: save_checkpoint(run))
        if stop:
            raise KeyboardInterrupt(f"stopped after step {run.step}, with a checkpoint")


def summarise(window: dict[str, list[Tensor]], tau: float) -> dict[str, float | None]:
    """What is logged, over all rows of all processes: README, "What is logged"."""
    parts = gather({name: torch.cat(tensors).double().cpu() for name, tensors in window.items()})
    names = dict.fromkeys(itertools.chain.from_iterable(parts))  # one may have had no rows
    pooled = {name: torch.cat([part[name] for part in parts if name in part]) for name in names}
    metrics, mean = {}, {name: values.mean() for name, values in pooled.items()}
    if "log_ratio" in pooled:
        target = pooled["reward"] - tau * pooled["log_ratio"]  # what V is fitted to: Eq. 3
        # Where there is no V, the best single one for these rows: all losses' numbers compare.
        residual = target - pooled.get("value", target.mean())
        metrics["loss"] = 0.5 * residual.square().mean()  # Eq. 4
        spread = residual.std(correction=0)
        metrics |= {"residual_mean": residual.mean(), "residual_std": spread}
        metrics["value_explained_variance"] = 1 - (spread / target.std(correction=0)) ** 2
        metrics |= {"log_ratio_mean": mean["log_ratio"], "reward_mean": mean["reward"]}
    if "loss" in pooled:  # KTO's own, or SFT's: nats a token
        metrics["loss"] = mean["loss"] / mean.get("completion_tokens", 1)
    plain = ("pair_accuracy", "grad_norm", "value_grad_norm", "step_seconds")
    metrics |= {name: mean[name] for name in plain if name in mean}
    if "tokens" in pooled:
        seconds = pooled["step_seconds"].sum() / WORLD_SIZE
        metrics["tokens_per_second"] = pooled["tokens"].sum() / seconds
        metrics["padding"] = 1 - mean["tokens"] / mean["padded_tokens"]
    return {name: value.item() if value.isfinite() else None for name, value in metrics.items()}


def log(run: Run, metrics: dict[str, float | None]) -> None:
    """A line of metrics.jsonl for machines, and one for people."""
    if RANK == 0:
        with open(f"{run.args.output_dir}/metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": run.step, **metrics}) + "\n")
    numbers = ", ".join(f"{name} {x:.4g}" for name, x in metrics.items() if x is not None)
    say(f"step {run.step}: {numbers}")


# ----------------------------------------------------------------------------------- evaluation


def rows_by_prompt(side: Side) -> dict[str, list[int]]:
    """The rows of each prompt."""
    rows = defaultdict(list)
    for row, prompt in enumerate(side.prompts):
        rows[prompt].append(row)
    return rows


def evaluate(run: Run) -> None:
    """Log the held-out numbers as eval_…, by the same formulas for every loss."""
    side, ordered = run.sides["eval"], []
    logps, values = score(run, side, desc="π and V on held-out rows", values=True)
    numbers = {"loss": -logps, "completion_tokens": torch.from_numpy(side.lengths[:, 1])}
    if run.args.loss != "sft":
        numbers = {"log_ratio": logps - side.ref_logps, "reward": side.rewards}
        numbers |= {"value": values} if run.value_model else {}
        # Of two answers to a prompt: does log π/π_ref order them as rewards do? A tie counts ½.
        for rows in rows_by_prompt(side).values():
            rewards, log_ratio = side.rewards[rows], numbers["log_ratio"][rows]
            margin = (log_ratio[:, None] - log_ratio)[rewards[:, None] > rewards]  # each pair once
            ordered.append((margin > 1e-3) + 0.5 * (margin.abs() <= 1e-3))
        numbers["pair_accuracy"] = torch.cat(ordered)
    metrics = summarise({name: [x] for name, x in numbers.items()}, run.args.tau)
    log(run, {f"eval_{name}": x for name, x in metrics.items()})


def sample(uniform: Tensor, temperature: float, width: int, ids: Tensor, scores: Tensor) -> Tensor:
    """The inverse CDF at numbers drawn beforehand: answers are the same in any company."""
    cdf = (scores.float() / temperature).softmax(-1).double().cumsum(-1)
    mark = uniform[:, ids.shape[1] - width, None] * cdf[:, -1:]
    token = torch.searchsorted(cdf, mark, right=True).clamp(max=scores.shape[1] - 1)
    return torch.full_like(scores, -math.inf).scatter(1, token, 0.0)


def generate(run: Run) -> None:
    """Answer every held-out prompt, once, and write generations-<step>.jsonl."""
    args, policy, side = run.args, run.policy, run.sides["eval"]
    seq2seq, behind = policy.config.is_encoder_decoder, run.manifest["frame"]["completion"][1]
    # Nothing is kept for backward(): here a token takes an eighth of what it takes in training.
    widths = (side.lengths[:, :1] + args.max_new_tokens) / 8
    ends = {behind[-1], run.tokenizer.eos_token_id} - {None}
    config = {"max_new_tokens": args.max_new_tokens, "do_sample": False, "num_beams": 1}
    config |= {"eos_token_id": sorted(ends), "pad_token_id": behind[-1]}
    config |= {"decoder_start_token_id": policy.config.decoder_start_token_id} if seq2seq else {}

    def answer(piece: np.ndarray, batch: dict[str, Tensor]) -> list[dict]:
        width, lines = 1 if seq2seq else batch["input_ids"].shape[1], []
        seeds = [int(sha256(args.seed, side.prompts[row])[:16], 16) for row in piece]
        uniform = np.stack([np.random.default_rng(x).random(args.max_new_tokens) for x in seeds])
        uniform = torch.from_numpy(uniform).to(DEVICE)
        sampler = functools.partial(sample, uniform, args.temperature, width)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with float32_head(policy, lambda states: states):
            ids = policy.generate(**inputs, logits_processor=[sampler] if args.temperature else [])
        for tokens in ids[:, width:].tolist():
            end = next((i + 1 for i, token in enumerate(tokens) if token in ends), None)
            body = tokens[:end]
            body = body[: -len(behind)] if body[-len(behind) :] == behind else body
            body = [token for token in body if token < len(run.tokenizer)]  # embeddings may be more
            text = run.tokenizer.decode(body, True, clean_up_tokenization_spaces=False)
            lines.append({"completions": [text], "finished": [end is not None]})
        return lines

    # The model's own penalties, beams and limits are not the flags'; they are saved as they came.
    own = policy.generation_config
    policy.generation_config = transformers.GenerationConfig(**config)
    policy.eval()  # in train(), gradient checkpointing would switch off the decoder's cache
    rows_of = rows_by_prompt(side)
    rows = np.array([rows_of[prompt][0] for prompt in run.fold_of])
    answers = for_each(run, side, rows, answer, "Answering", widths)
    policy.train().generation_config = own
    lines = [{"prompt": p, "fold": k} | line for (p, k), line in zip(run.fold_of.items(), answers)]
    on_first(lambda: write_json(Path(args.output_dir, f"generations-{run.step}.jsonl"), *lines))


# ----------------------------------------------------------------------------------------- dice

# The example whose answer is known: the prompt "Ada rolls 3d6" asks for three rolls of a six-sided
# die, "416" is a completion, 11 its reward. SFT learns fair dice; DRO-V should load them.

NAMES = """Ada Alan Blaise Carl Edsger Emmy Grace Hedy Henri John Kurt Leslie Maryam Niels Pierre
Rózsa Sofia Sophie Srinivasa Thomas"""


def dice_rolls(seed: int) -> Iterator[dict]:
    """64 fair rolls for each of 240 prompts: 20 names × 1 to 4 dice × 4, 6 or 8 sides."""
    rng = np.random.default_rng(seed)
    for name, dice, sides in itertools.product(NAMES.split(), (1, 2, 3, 4), (4, 6, 8)):
        for roll in rng.integers(1, sides + 1, size=(64, dice)):
            row = {"prompt": f"{name} rolls {dice}d{sides}", "completion": "".join(map(str, roll))}
            yield row | {"reward": int(roll.sum())}


def all_rolls(prompt: str) -> dict[str, int]:
    """Every valid roll and its reward, the sum of its faces."""
    dice, sides = map(int, prompt.rsplit(" ", 1)[1].split("d"))
    rolls = itertools.product(range(1, sides + 1), repeat=dice)
    return {"".join(map(str, roll)): sum(roll) for roll in rolls}


def dice_report(run: Run) -> dict:
    """Exactly, over every roll: how much the policy has of the rise of Eq. 1 that can be had from
    the trained π_ref. All of it given a valid roll, as nothing rates others; their mass beside."""
    tau, side, table, errors, shown = run.args.tau, run.sides["rolls"], [], [], {}
    logps, values = score(run, side, desc="every roll", values=True)
    for prompt, rows in rows_by_prompt(side).items():
        ref, rewards = side.ref_logps[rows].double(), side.rewards[rows].double()
        optimum = ref.log_softmax(0) + rewards / tau  # log π* + V*/τ: Eq. 2
        errors.append(values[rows[0]].item() - tau * optimum.logsumexp(0).item())
        logs = torch.stack([ref, logps[rows].double(), optimum.log_softmax(0)])  # (3, rolls)
        mass, log_p = logs.logsumexp(1).exp(), logs.log_softmax(1)
        p = log_p.exp()
        table.append(torch.stack([p @ rewards, mass, (p * (log_p - log_p[0])).sum(1)]))
        shown[abs(len(rows) - 6)] = prompt, p.T[:8].tolist()  # one of about six rolls is printed
    prompt, bars = shown[min(shown)]
    say(f"\n{prompt!r}, never trained on: the probability of each roll at τ = {tau:g}")
    policies = {"π_ref": "sft", "π_θ": "policy", "π*": "optimum"}
    for roll, shares in zip(all_rolls(prompt), bars):
        for name, x in zip(policies, shares):
            start = roll if name == "π_ref" else " " * len(roll)
            say(f"{start}  {name:<6}{x:6.1%} {'█' * round(60 * x)}")
    say(f"\nExactly, over every roll of {len(errors)} held-out prompts of at most three dice:")
    say(f"{'':<8}{'mean reward':>12}{'KL':>9}{'objective':>11}{'valid mass':>12}")
    results, means = {"tau": tau}, torch.stack(table).mean(0).T.tolist()
    for (name, key), (reward, valid, kl) in zip(policies.items(), means):
        raw = reward * run.manifest["reward_std"] + run.manifest["reward_mean"]
        goal = reward - tau * kl  # Eq. 1
        results[key] = {"reward": raw, "valid": valid, "kl": kl, "objective": goal}
        say(f"{name:<8}{raw:>12.3f}{kl:>9.4f}{goal:>11.4f}{valid:>12.2%}")
    low, reached, best = (results[key]["objective"] for key in policies.values())
    gain = (reached - low) / max(best - low, 1e-12)
    rmse = float(np.sqrt(np.mean(np.square(errors)))) if run.value_model else None
    off = f"; V(x) is off V*(x) by {rmse:.3f} (root mean square)" if run.value_model else ""
    say(f"π_θ has {gain:.2%} of the rise of the objective that π* has{off}")
    return results | {"gain_share": gain, "value_rmse": rmse}


# ----------------------------------------------------------------------------------- comparison

# The paper's results are win rates: two policies answer the same held-out prompts, and a judge sees
# the answers without knowing whose they are.

JUDGE_PROMPT = (
    "Here are an instruction and two responses to it. Which response is more helpful, and does "
    "better what the instruction asks for?\n\nInstruction:\n{prompt}\n\nResponse A:\n{A}\n\n"
    "Response B:\n{B}\n\nWhich response is better? Answer with one letter, A or B.\nAnswer:"
)
PROTOCOL = (
    "dataset_name", "dataset_revision", "dataset_split", "split_mode", "seed", "held_out",
    "max_prompt_length", "max_completion_length", "max_new_tokens", "temperature",
)  # fmt: skip


def load_answers(args: Namespace) -> tuple[dict[str, dict], dict[str, dict], dict]:
    """The lines of generations-<step>.jsonl by prompt, with "run", ours and theirs; what all runs
    have in common. Raises UserError unless all are finished and answer the same questions, once."""
    ours, theirs, protocol = {}, {}, {}
    runs = [(ours, run, "") for run in args.compare]
    runs += [(theirs, run, "" if args.against else "@0") for run in args.against or args.compare]
    for side, run, at in runs:
        with loading(run, "it is no finished run, or one without answers"):
            has = load_json(run, "prompt_split_manifest.json") | load_json(run, "args.json")["args"]
            last = load_json(run, "results.json")["step"]
            require(last or not at, f"{run} has taken no step: name another run with --against")
            lines = read_file(f"{run}/generations-{0 if at else last}.jsonl")
            new = {line["prompt"]: line | {"run": run + at} for _, line in lines}
            differ = [key for key in PROTOCOL if protocol.setdefault(key, has[key]) != has[key]]
        require(not differ, f"{runs[0][1]} and {run} do not compare: they differ in {differ}")
        missing = has["eval_prompts"] - len(new)
        require(not missing, f"{run} has {len(new)} answers, {missing} fewer than prompts")
        says = f"{run} answers a fold again: the other policy goes behind --against"
        require(side.keys().isdisjoint(new), says)
        side.update(new)
    says = f"not the same prompts are answered: {len(ours)} and {len(theirs)}, or other folds"
    require(ours.keys() == theirs.keys(), says)
    return ours, theirs, protocol


def make_pairs(ours: dict[str, dict], theirs: dict[str, dict]) -> list[dict]:
    """What a judge sees, {"id", "prompt", "A", "B"}, with "fold", whose "runs" they are, and which
    of A and B is "ours". The id, and which text is A, follow from the prompt and both texts alone:
    swapping the sides, or cutting the folds into several runs, changes neither."""
    pairs = []
    for prompt, line in ours.items():
        mine, other = line["completions"][0], theirs[prompt]["completions"][0]
        digest = sha256(json.dumps([prompt, *sorted([mine, other])]))
        a, b = sorted([mine, other], reverse=int(digest[-1], 16) % 2 == 0)
        pair = {"id": digest[:16], "prompt": prompt, "A": a, "B": b, "fold": line["fold"]}
        us, them = "AB" if a == mine else "BA"
        pairs.append(pair | {"runs": {us: line["run"], them: theirs[prompt]["run"]}, "ours": us})
    return pairs


def judge_by_model(args: Namespace, pairs: list[dict]) -> np.ndarray:
    """1 where the model prefers A, 0 where B, in both orders; ½ where it does not hold to it; NaN
    for a pair that it has no positions for. Raises UserError if it does not answer with A or B."""
    name, (model, tokenizer) = args.judge_model, load_policy(args.judge_model)
    seq2seq, limit = model.config.is_encoder_decoder, position_limit(model.config)
    frame = text_frame(tokenizer, seq2seq)
    encoding = lambda *texts: encode(*texts, tokenizer, frame, sys.maxsize, sys.maxsize)
    letters = ("A", "B") if tokenizer.chat_template and not seq2seq else (" A", " B")
    shown = [x for pair in pairs for x in (pair, pair | {"A": pair["B"], "B": pair["A"]})]
    rows = [(JUDGE_PROMPT.format_map(x), letter) for x in shown for letter in letters]
    side = make_side(*zip(*rows), np.zeros(len(rows)), encoding, "right" if seq2seq else "left")
    a, b = (ids.tolist() for ids in side.y[:2])
    require(a != b, f"{name} cannot judge: its tokenizer tells no A from B")
    first = len(os.path.commonprefix([a, b]))  # the frame, and of a byte-level tokenizer the space
    side.y = [ids[: first + 1] for ids in side.y]
    fits = (side.widths.max(1) <= limit).reshape(-1, 4).all(1)
    require(fits.any(), f"{name} cannot judge: all pairs are longer than its {limit} positions")
    run = Run(args, model.to(DEVICE), tokenizer)
    logps = score(run, side, np.flatnonzero(fits.repeat(4)), "Judging")[0].view(-1, 2, 2).numpy()
    mass = np.exp(logps).sum() / (2 * len(logps))
    say(f"{name} gives A and B together {mass:.1%}; {(~fits).sum()} pairs are too long for it")
    require(mass >= 0.1, f"{name} cannot judge: it gives A and B together {mass:.1%}, not 10 %")
    margins = (logps[:, :, 0] - logps[:, :, 1]) * [1, -1]  # in the second order A is called B
    verdicts = np.full(len(pairs), math.nan)
    verdicts[fits] = np.select([(margins > 0).all(1), (margins < 0).all(1)], [1, 0], default=0.5)
    return verdicts


def win_rates(pairs: list[dict], verdicts: np.ndarray) -> dict:
    """Our win rate over all prompts, its interval (Wilson's, 95 %), its standard deviation over
    folds (n − 1), and the folds'. Raises UserError without a verdict."""
    require(not np.isnan(verdicts).all(), "there is no known verdict on any of these pairs")
    folds, same, ours = np.array([(p["fold"], p["A"] == p["B"], p["ours"] == "A") for p in pairs]).T
    scores = np.where(same, 0.5, np.where(ours, verdicts, 1 - verdicts))
    folds, scores = folds[~np.isnan(scores)], scores[~np.isnan(scores)]

    def tally(x: np.ndarray) -> dict:
        counts = {"wins": x > 0.5, "ties": x == 0.5, "losses": x < 0.5, "prompts": x >= 0}
        return {"win_rate": float(x.mean())} | {key: int(n.sum()) for key, n in counts.items()}

    result, n, z = tally(scores) | {"same_answers": int(same.sum())}, len(scores), 1.959964
    of_folds = {str(fold): tally(scores[folds == fold]) for fold in np.unique(folds)}
    rates, p = [fold["win_rate"] for fold in of_folds.values()], result["win_rate"]
    # A score in [0, 1] has a variance of at most p (1 − p): with ties this errs on the wide side.
    half = z * math.sqrt(p * (1 - p) / n + (z / n / 2) ** 2)
    low, high = ((p + z * z / (2 * n) + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    std = float(np.std(rates, ddof=1)) if len(rates) > 1 else None
    return result | {"interval": [max(0.0, low), min(1.0, high)], "std": std, "folds": of_folds}


def compare(args: Namespace) -> None:
    """Judge one policy's answers against another's, or against its own start."""
    ours, theirs, protocol = load_answers(args)
    pairs, folder = make_pairs(ours, theirs), Path(args.output_dir)
    blind = [{name: pair[name] for name in ("id", "prompt", "A", "B")} for pair in pairs]
    holds = {path.name for path in folder.glob("[!.]*")} - {"key.jsonl", "win_rates.json"}
    old = [x for _, x in read_file(f"{folder}/pairs.jsonl")] if "pairs.jsonl" in holds else blind
    says = f"--output_dir {folder} holds something else than this comparison"
    require(holds <= {"pairs.jsonl"} and old == blind, says)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "pairs.jsonl", *blind)
    write_json(folder / "key.jsonl", *({"id": pair["id"]} | pair["runs"] for pair in pairs))
    sides = {"compare": args.compare, "against": args.against or ["its start"]}
    names = [" + ".join(side) for side in sides.values()]
    for name, side in zip(names, (ours, theirs)):
        ended = np.mean([line["finished"][0] for line in side.values()])
        say(f"{ended:.1%} of the answers of {name} ended by themselves")
    judge = args.judge_model or args.verdicts or "the true reward"
    if args.judge_model:
        verdicts = judge_by_model(args, pairs)
    elif args.verdicts:
        file, given = args.verdicts, {pair["id"]: [] for pair in pairs}
        points = {"A": 1.0, "B": 0.0, "tie": 0.5}
        with loading(file, "--verdicts needs a file of JSON Lines"):
            for number, x in read_file(file):
                says = f'{file}, line {number} needs an "id", a text, and a "winner": A, B or tie'
                require(isinstance(x.get("id"), str) and x.get("winner") in list(points), says)
                given.setdefault(x["id"], []).append(points[x["winner"]])
        verdicts = np.array([np.mean(given[pair["id"]] or math.nan) for pair in pairs])
        missing = sum(pair["A"] != pair["B"] and not given[pair["id"]] for pair in pairs)
        unknown = len(given) - len(pairs)
        say(f"{file}: {missing} of {len(pairs)} pairs lack a verdict; unknown ids: {unknown}")
    elif protocol["dataset_name"] == "dice":  # by the true reward; any roll beats no roll
        A, B = (np.array([all_rolls(p["prompt"]).get(p[x], -1) for p in pairs]) for x in "AB")
        verdicts = (np.sign(A - B) + 1) / 2
    else:
        same = sum(pair["A"] == pair["B"] for pair in pairs)
        says = f"{len(pairs)} blind pairs ({same} of equal answers) are in {folder}/pairs.jsonl;"
        return say(says + ' then --verdicts FILE, lines of {"id": …, "winner": "A", "B" or "tie"}')
    result = win_rates(pairs, verdicts)
    write_json(folder / "win_rates.json", sides | {"judge": judge} | result, indent=2)
    for fold, x in result["folds"].items():
        bar = f"{'█' * round(40 * x['win_rate']):░<40} {x['win_rate']:6.1%}"
        say(f"fold {fold} {bar}  {x['wins']} wins, {x['ties']} ties, {x['losses']} losses")
    rate, low, high = (100 * x for x in (result["win_rate"], *result["interval"]))
    spread = "" if result["std"] is None else f" ± {100 * result['std']:.1f} %"
    what = f"{result['prompts']} prompts, {result['same_answers']} with equal answers"
    say(f"{' vs '.join(names)}: {rate:.1f} %{spread} ({what}; 95 % CI {low:.1f}–{high:.1f} %)")


# ------------------------------------------------------------------------------------ machinery


class UserError(ValueError):
    """Something the user can put right; ends the program with this one line and exit code 2. (A
    ValueError: where a file is read, it gets the line's number.)"""


class RunError(Exception):
    """What went wrong with a run that had begun; every checkpoint is kept; exit code 1."""


OUT_OF_MEMORY = re.compile(r"out of memory|allocate memory|bad_alloc|ALLOC_FAILED")
stop_signals: list[int] = []  # Ctrl-C and SIGTERM arrive here


def request_stop(signum: int, frame: object) -> None:
    """A signal handler: the first signal is noted, a second one ends the program at once."""
    stop_signals.append(signum)
    if len(stop_signals) > 1:
        raise KeyboardInterrupt
    if RANK == 0:  # print() may be what was interrupted
        os.write(2, b"\nstopping at the next log line; a second signal stops at once\n")


def require(ok: object, message: str) -> None:
    """Raises UserError unless `ok`."""
    if not ok:
        raise UserError(message)


@contextmanager
def loading(source: object, hint: str, always: bool = False) -> Iterator[None]:
    """What goes wrong within, a UserError excepted unless `always`, becomes a UserError that names
    `source` and ends with `hint`; not so if memory runs out."""
    try:
        yield
    except Exception as error:  # missing, damaged, unreachable: as many types as causes
        as_it_is = isinstance(error, UserError) and not always
        if as_it_is or isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error)):
            raise
        raise UserError(f"cannot load {source} ({str(error)[:200]}): {hint}") from error


# `torchrun` starts several copies of this program. All hold the same networks and see the same
# rows; each works on its share of them (`in_pieces`), and they meet where a gradient, a number to
# log, a score or an answer belongs to all. A process alone neither waits nor sends.

SEVERAL = os.environ.get("WORLD_SIZE", "") not in ("", "1")
ALONE = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}
LAUNCH = {name: os.environ.get(name, "") for name in ALONE} if SEVERAL else ALONE
WORLD_SIZE, RANK, LOCAL_RANK = (int(x) if x.isdecimal() else 0 for x in LAUNCH.values())
DEVICE = torch.device(f"cuda:{LOCAL_RANK}" if torch.cuda.is_available() else "cpu")
# The first process prints: a line, or, where it has a terminal, a bar, which a line does not tear.
say = tqdm.write if RANK == 0 else lambda message: None
progress = functools.partial(tqdm, disable=True if RANK else None, dynamic_ncols=True)


def meet_processes() -> None:
    """Connect this process to the others, if a launcher has started several."""
    if not SEVERAL or dist.is_initialized():
        return
    gpus, cure = torch.cuda.device_count(), "start processes with torchrun, or unset WORLD_SIZE"
    require(all(map(str.isdecimal, LAUNCH.values())), f"the launcher set {LAUNCH}: {cure}")
    require(LOCAL_RANK < gpus or not gpus, f"there are {gpus} GPUs: lower --nproc_per_node")
    address = [os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT")]
    print(f"process {RANK} of {WORLD_SIZE} waits for the others at {address}", file=sys.stderr)
    with loading("the other processes", cure):
        if gpus:
            torch.cuda.set_device(DEVICE)
        dist.init_process_group("nccl" if gpus else "gloo", timeout=timedelta(hours=2))
        atexit.register(dist.destroy_process_group)  # else its threads may abort what has ended


def gather(item: Any) -> list:
    """Every process's `item`, in order of rank; all processes wait here for the slowest."""
    items = [item] * WORLD_SIZE
    if dist.is_initialized():
        dist.all_gather_object(items, item)
    return items


def on_first(work: Callable[[], Any]) -> None:
    """Do it on the first process; the others wait, and raise what it raises."""
    error = None
    try:
        work() if RANK == 0 else None
    except Exception as caught:  # noqa: BLE001 whatever it is, all raise it
        error = caught
        if type(caught) in (RuntimeError, Exception):  # torch's and tokenizers' of a full disk
            error = OSError(str(caught))
    if error := gather(error)[0]:
        raise error


def write(path: Path, content: Callable[[Path], Any]) -> None:
    """`content` writes a file or folder under another name; it becomes `path` once it is whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    content(temporary)
    os.replace(temporary, path)


def write_json(path: Path, *objects: dict, indent: int | None = None) -> None:
    """The objects, each with a line break behind it; the whole file, or the old one."""
    text = "".join(json.dumps(x, indent=indent, ensure_ascii=False) + "\n" for x in objects)
    # A file's name may be no UTF-8; its escape in JSON is the same name.
    write(path, lambda file: file.write_text(text, "utf-8", "backslashreplace", "\n"))


def load_json(folder: str | Path, name: str) -> dict:
    """The object in a JSON file of a run."""
    return json.loads(Path(folder, name).read_text(encoding="utf-8"))


def checkpoints(folder: Path) -> dict[int, Path]:
    """The complete checkpoints by their step, oldest first."""
    found = {int(p.name[11:]): p for p in folder.glob("checkpoint-*") if p.name[11:].isdecimal()}
    return dict(sorted(found.items()))


# A run on disk, in the order of writing: args.json, the manifest, π_ref's numbers, first answers,
# checkpoints, last answers, the policy, results.json; each whole or not there, but for the policy,
# which counts once results.json is there. --resume takes the arguments and π_ref's numbers from the
# run, networks, optimiser and log from its newest checkpoint (without one it begins at step 0), and
# a step's rows from the step's number.


def save_networks(run: Run, folder: Path) -> None:
    """Policy and tokenizer in `folder`, for `from_pretrained`; the value model in `value_model`."""
    run.policy.save_pretrained(folder)
    run.tokenizer.save_pretrained(folder)
    if run.value_model:
        (folder / "value_model").mkdir(exist_ok=True)
        save_model(run.value_model, str(folder / "value_model" / "model.safetensors"))


def save_checkpoint(run: Run) -> None:
    """Write checkpoint-<step>: networks, optimiser and the log so far, whole or not at all."""
    folder, keep = Path(run.args.output_dir), run.args.save_total_limit or sys.maxsize

    def content(checkpoint: Path) -> None:
        save_networks(run, checkpoint)
        shutil.copy(folder / "metrics.jsonl", checkpoint)
        torch.save(run.optimizer.state_dict(), checkpoint / "optimizer.pt")

    write(folder / f"checkpoint-{run.step}", content)
    for old in list(checkpoints(folder).values())[:-keep]:
        shutil.rmtree(old.rename(old.with_name(f".{old.name}.tmp")))  # half deleted, it is none


# ------------------------------------------------------------------------------------ arguments

MODEL, DATASET = "google/flan-t5-large", "openbmb/UltraFeedback"
PINNED = {MODEL: "0613663d0d48ea86ba8cb3d7a44f0f65dc596a2a"}
PINNED[DATASET] = "40b436560ca83a8dba36114c22ab3c66e43f6d5e"  # overall_scores of 10 corrected
# What --dice changes: SFT in RUN/sft, then a run from it. The value learns ten times faster than
# the policy: else the policy chases a wrong V, and mass leaks to what is no roll.
DICE = {
    "dataset_name": "dice", "model_name_or_path": "sft", "num_eval_prompts": 40, "max_steps": 300,
    "learning_rate": 3e-3, "value_learning_rate": 3e-2, "lr_scheduler_type": "linear",
    "bf16": False, "warmup_steps": 0, "per_device_train_batch_size": 64, "micro_batch_tokens": 4096,
    "logging_steps": 50, "save_steps": 300, "max_new_tokens": 8,
}  # fmt: skip
DICE_SFT = {
    "loss": "sft", "value": "prompt", "model_name_or_path": "dice", "optim": "adafactor",
    "learning_rate": 0.05, "lr_scheduler_type": "linear", "warmup_steps": 0, "max_grad_norm": 1.0,
    "max_steps": 600, "logging_steps": 100, "save_steps": 600, "overfit_one_batch": False,
    "share_policy_and_value_backbone": False, "as_is": False,
}  # fmt: skip


def make_parser() -> tuple[argparse.ArgumentParser, dict[str, Any]]:
    """The flags, and their defaults: the paper's T5-L run."""
    parser = argparse.ArgumentParser("drov.py", None, __doc__.split("\n")[0], allow_abbrev=False)
    parser.error = functools.partial(require, False)  # one line instead of the usage text
    path, defaults, switch = os.path.expanduser, {}, {"action": "store_true"}
    runs = {"type": path, "nargs": "+", "metavar": "RUN"}

    def add(flag: str, default: object, text: str, **options) -> None:
        # Defaults are filled in later, so that it is known which flags were given.
        shown = "" if default is None or default is False else f" (default: {default})"
        group.add_argument(flag, default=argparse.SUPPRESS, help=text + shown, **options)
        defaults[flag[2:]] = default

    def fold(text: str) -> int | str:
        return text if text == "all" else int(text)

    # fmt: off
    group = parser.add_argument_group("run")
    add("--dice", False, "the example with a known answer; other flags override what it sets", **switch)
    add("--output_dir", None, "the run's folder, new or empty (default: runs/DATASET-SPLIT-TIME)", type=path)
    add("--resume", None, "go on with a run that was interrupted", type=path, metavar="RUN")
    add("--seed", 42, "seeds split, batches, value head and samples; dice, too", type=int)
    add("--overfit_one_batch", False, "train on one batch, to see the loss vanish", **switch)
    add("--overfit_steps", 300, "steps of --overfit_one_batch", type=int)
    group = parser.add_argument_group("data")
    add("--dataset_name", DATASET, "hub name, folder, or .jsonl, .json, .csv, .parquet file", type=path)
    add("--dataset_revision", None, "hub commit (default: pinned for the default dataset)")
    add("--dataset_split", "train", "split of a hub dataset")
    add("--reward_key", "overall_score", "UltraFeedback's number that is r", choices=("overall_score", "fine-grained_score", *ASPECTS))
    add("--split_mode", "prompt_seeded", "hold out one seeded set of prompts, or folds", choices=("prompt_seeded", "prompt_fold"))
    add("--num_eval_prompts", 1000, "prompts held out by prompt_seeded", type=int)
    add("--num_eval_folds", 5, "folds that prompt_fold cuts", type=int)
    add("--eval_prompts_per_fold", 1000, "prompts in each fold", type=int)
    add("--eval_fold_index", 0, "the fold to hold out, from 0, or 'all' of them", type=fold)
    add("--max_train_samples", None, "keep whole prompts of at most this many triplets (default: all)", type=int)
    add("--max_eval_samples", None, "the same of the held-out ones, each fold its share", type=int)
    add("--max_prompt_length", 512, "tokens of x; a longer prompt keeps its end", type=int)
    add("--max_completion_length", 512, "tokens of y; a longer one keeps its beginning", type=int)
    group = parser.add_argument_group("models")
    add("--model_name_or_path", MODEL, "hub name or folder: π_ref, and where π starts", type=path)
    add("--model_revision", None, "hub commit (default: pinned for the default model)")
    add("--share_policy_and_value_backbone", False, "V reads the policy's own states; paper: worse", **switch)
    add("--gradient_checkpointing", False, "recompute activations: slower, less memory", **switch)
    add("--bf16", torch.cuda.is_bf16_supported(including_emulation=False), "bfloat16 autocast where CUDA has it, weights stay float32", action=argparse.BooleanOptionalAction)
    group = parser.add_argument_group("training")
    add("--loss", "dro_v", "DRO-V, KTO, or maximum likelihood", choices=("dro_v", "kto", "sft"))
    add("--value", "prompt", "V(x); one learnt number; the batch's mean: DRO-P", choices=("prompt", "constant", "batch"))
    add("--tau", 1.0, "τ, the weight of the KL, in normalised rewards; KTO's β", type=float)
    add("--learning_rate", 1e-4, "the policy's learning rate", type=float)
    add("--value_learning_rate", 1e-4, "the value model's (if shared: its head's)", type=float)
    add("--optim", "adafactor", "optimiser", choices=("adafactor", "adamw"))
    add("--lr_scheduler_type", "constant_with_warmup", "learning rate over the steps", choices=("constant_with_warmup", "constant", "linear", "cosine", "inverse_sqrt"))
    add("--warmup_steps", 150, "steps of linear warm-up", type=int)
    add("--max_steps", 40000, "steps; 0 only evaluates and answers", type=int)
    add("--max_grad_norm", None, "clip each network's gradient norm (default: off)", type=float)
    add("--per_device_train_batch_size", 32, "triplets a step and process", type=int)
    add("--gradient_accumulation_steps", 1, "multiplies the batch", type=int)
    add("--micro_batch_tokens", None, "padded tokens that go through the models at once; changes no gradient (default: a full batch on a GPU; 1024 on a CPU, for a decoder-only model 640)", type=int)
    group = parser.add_argument_group("evaluation, logs and checkpoints")
    add("--logging_steps", 10, "steps between two log lines", type=int)
    add("--save_steps", 2000, "steps between two evaluations with a checkpoint", type=int)
    add("--save_total_limit", None, "checkpoints to keep, the newest (default: all)", type=int)
    add("--max_new_tokens", 512, "tokens of an answer, at most", type=int)
    add("--temperature", 1.0, "sampling temperature; 0 is greedy", type=float)
    group = parser.add_argument_group("comparison of runs (instead of training)")
    add("--compare", None, "one policy: a run, or several with a fold each", **runs)
    add("--against", None, "the other one (default: each run's own start)", **runs)
    add("--judge_model", None, "an instruction-tuned model that says A or B", type=path, metavar="NAME")
    add("--verdicts", None, "JSON Lines with `id` and `winner`, of people or a hosted model", type=path, metavar="FILE")
    # fmt: on
    return parser, defaults


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """Flags to Namespace. Raises UserError for a bad one, or for some that do not go together."""
    parser, defaults = make_parser()
    given = vars(parser.parse_args(argv))
    zeros = ("seed", "eval_fold_index", "warmup_steps", "max_steps", "temperature")
    for name, x in given.items():
        may_be_0 = name in zeros or "learning_rate" in name
        most = 2**32 if type(x) is int else 1e38
        right = type(x) not in (int, float) or 0 < x < most or may_be_0 and x == 0
        least = ">= 0" if may_be_0 else "> 0"
        require(right, f"--{name} must be a number {least}, below {most:.10g}, not {x}")
    if "resume" in given:
        return resumed_args(given, defaults)
    preset = DICE if given.get("dice") else {}
    if preset and given.get("loss") == "sft":
        preset = preset | DICE_SFT
    args = Namespace(**defaults | preset | given)
    args.as_is = args.dice and given.keys() <= {"dice", "seed", "tau", "output_dir"}
    args.model_revision = args.model_revision or PINNED.get(args.model_name_or_path)
    args.dataset_revision = args.dataset_revision or PINNED.get(args.dataset_name)
    stem, now = Path(args.dataset_name).stem[:60], time.strftime("%Y%m%d-%H%M%S")
    name = f"{stem}-{args.split_mode}-{now}"
    if args.compare:
        sides = (args.compare, args.against or ["start"])
        name = "-vs-".join("+".join(Path(run).name for run in side) for side in sides)
        name = f"compare-{name[:60]}"  # a file's name may have 255 bytes
    args.output_dir = args.output_dir or os.path.join("runs", name)
    if args.overfit_one_batch:
        args.max_steps = args.save_steps = args.overfit_steps
        args.warmup_steps, args.logging_steps = 0, 1
    # A step's rows depend on their number alone, however many processes share them.
    size, log, save = args.per_device_train_batch_size, args.logging_steps, args.save_steps
    args.train_batch_size = size * args.gradient_accumulation_steps * WORLD_SIZE
    V, judges = args.value if args.loss == "dro_v" else None, (args.judge_model, args.verdicts)
    apart = args.compare or not any((args.against, *judges))
    require(apart, "--against, --judge_model and --verdicts go with --compare")
    require(not all(judges), "--judge_model and --verdicts are two judges: give one")
    require(V or args.value == "prompt", f"--value {args.value} goes with --loss dro_v")
    fits = V == "prompt" or not args.share_policy_and_value_backbone
    require(fits, "a shared backbone goes with --loss dro_v --value prompt")
    enough = args.train_batch_size > 1 or args.loss != "kto" and V != "batch"
    require(enough, "--loss kto and --value batch take a batch's mean: one row is too few")
    require(save % log == 0, f"--save_steps {save} is no multiple of --logging_steps {log}")
    return args


def resumed_args(given: dict[str, Any], defaults: dict[str, Any]) -> Namespace:
    """The arguments of the run in given["resume"], or else a UserError."""
    # How work is cut, and what is kept, changes nothing that is learnt.
    free = {"gradient_accumulation_steps", "per_device_train_batch_size"}
    folder, free = given.pop("resume"), free | {"micro_batch_tokens", "save_total_limit"}
    with loading(f"--resume {folder}", "it is no run"):
        args = Namespace(**load_json(folder, "args.json")["args"])
        require(defaults.keys() <= vars(args).keys(), f"{folder}/args.json lacks arguments")
        for name, value in given.items():
            if value != (old := getattr(args, name)):
                change = f"--{name} {value} (it was {old})"
                require(name in free, f"{change} would make it another run: start one")
                say(f"going on with {change}")
                setattr(args, name, value)
    B, others = args.train_batch_size, args.gradient_accumulation_steps * WORLD_SIZE
    cure = f"give --per_device_train_batch_size {B // others}"
    cure = "take another number of them" if B % others else cure
    says = f"a step has {B} rows, {WORLD_SIZE} processes share it: {cure}"
    require(args.per_device_train_batch_size * others == B, says)
    args.resume = args.output_dir = folder
    return args


# ----------------------------------------------------------------------------------------- main


def start(args: Namespace, locks: ExitStack) -> Run:
    """Load everything, check everything, and only then claim the folder. Raises UserError."""
    folder, kept = Path(args.output_dir), "prompt_split_manifest.json"
    lock = filelock.FileLock(folder / ".lock", blocking=False)
    if args.resume:
        with loading(folder, "a run that is alive works there, or it cannot be written to"):
            on_first(lambda: locks.enter_context(lock))
    holds = gather({path.name for path in folder.glob("*")} - {".lock", ".args.json.tmp"})[0]
    says = f"--output_dir {folder} is not empty: give another one, or --resume it"
    require(args.resume or not holds, says)
    found, saved = checkpoints(folder), {}
    if found or (folder / kept).exists():
        with loading(folder / kept, "put it back, or start again elsewhere"):
            saved = load_json(folder, kept)
            require("frame" in saved, f"{folder / kept} is no manifest: start again elsewhere")
    newest, before = [*reversed(found.values()), None, None][:2]
    cure = f"remove it, and --resume goes on from {before.name if before else 'the beginning'}"
    sft_first = args.dice and args.model_name_or_path == "sft" and not newest
    source = str(newest or ("dice" if sft_first else args.model_name_or_path))
    with loading(source, cure if newest else "is it a language model?", always=bool(newest)):
        policy, tokenizer = load_policy(source, args.model_revision, args.seed)
    recomputes = policy.supports_gradient_checkpointing or not args.gradient_checkpointing
    require(recomputes, f"{source} does not support --gradient_checkpointing")
    seq2seq = policy.config.is_encoder_decoder
    frame = saved.get("frame") or text_frame(tokenizer, seq2seq)
    limits = {name: getattr(args, name) for name in ("max_prompt_length", "max_completion_length")}
    encoding = functools.partial(encode, tokenizer=tokenizer, frame=frame, **limits)
    sides, fold_of, manifest = load_sides(args, encoding, "right" if seq2seq else "left")
    manifest["frame"] = frame
    changed = [name for name in saved if saved[name] != manifest.get(name)]
    require(not changed, f"the data have changed since this run began: {', '.join(changed)}")
    lengths = np.concatenate([side.lengths for side in sides.values()])
    (x, y), both, new = lengths.max(0), lengths.sum(1).max(), args.max_new_tokens
    needed, limit = max(x, y, new) if seq2seq else max(both, x + new), position_limit(policy.config)
    says = f"{needed} tokens, but the model has {limit} positions: lower --max_prompt_length"
    require(needed <= limit, f"{says}, --max_completion_length or --max_new_tokens")
    if args.warmup_steps > args.max_steps > 0:
        say(f"--warmup_steps {args.warmup_steps} is longer than the run: its rate is never reached")

    def claim() -> None:
        if not args.resume:
            versions = {m.__name__: m.__version__ for m in (torch, transformers, datasets, np)}
            content = {"args": vars(args), "versions": versions | {"python": sys.version}}
            with loading(folder, "it cannot be written to, or another run has just taken it"):
                folder.mkdir(parents=True, exist_ok=True)
                locks.enter_context(lock)
                require(not (folder / "args.json").exists(), f"{folder} has just been taken")
                write_json(folder / "args.json", content, indent=2)
        write_json(folder / kept, manifest, indent=2)
        (folder / "metrics.jsonl").unlink(missing_ok=True)
        for half_written in folder.glob(".checkpoint-*.tmp"):
            shutil.rmtree(half_written)

    on_first(claim)
    for signum in (signal.SIGINT, signal.SIGTERM):  # until here, they end the program at once
        locks.callback(signal.signal, signum, signal.signal(signum, request_stop))
    if sft_first:
        policy, tokenizer = dice_sft(args, locks)
    run = Run(args, policy.train().to(DEVICE), tokenizer, sides, fold_of, manifest)
    if args.gradient_checkpointing:
        policy.activation_checkpointing_enable()
    torch.manual_seed(args.seed)  # for the value head, the only thing that is drawn at random
    groups = [{"params": list(policy.parameters()), "lr": args.learning_rate}]
    if args.loss == "dro_v" and args.value != "batch":
        body, known = policy if args.value == "prompt" else None, set(policy.parameters())
        run.value_model = ValueModel(body, args.share_policy_and_value_backbone).to(DEVICE)
        own = [p for p in run.value_model.parameters() if p not in known]  # a shared body is π's
        groups.append({"params": own, "lr": args.value_learning_rate})
    for p in itertools.chain.from_iterable(group["params"] for group in groups):
        p.grad = torch.zeros_like(p)  # once: taken anew in every step, they fragment the memory
    if args.optim == "adamw":
        run.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    else:
        # As in T5X: updates in proportion to each parameter's RMS, decay 0.8. The first epsilon is
        # on the gradient's scale; torch's own would let the size of small gradients matter.
        run.optimizer = torch.optim.Adafactor(groups, beta2_decay=-0.8, eps=(1e-15, 1e-3))
    if newest:
        run.step = max(found)
        with loading(newest, cure, always=True):
            lines = [line for _, line in read_file(f"{newest}/metrics.jsonl")]
            on_first(lambda: write_json(folder / "metrics.jsonl", *lines))  # the log as it was then
            if run.value_model:
                load_model(run.value_model, newest / "value_model" / "model.safetensors")
            state = torch.load(newest / "optimizer.pt", map_location="cpu", weights_only=True)
            run.optimizer.load_state_dict(state)
    if args.resume:
        say(f"going on from {newest or 'step 0'}")
    return run


def dice_sft(args: Namespace, locks: ExitStack) -> tuple[PreTrainedModel, Any]:
    """The run of SFT in RUN/sft, begun, gone on with or finished: its policy, π_ref for `args`."""
    folder = Path(args.output_dir, "sft")
    holds = gather({path.name for path in folder.glob("*.json")})[0]
    where = {"output_dir": str(folder), "resume": str(folder) if "args.json" in holds else None}
    if "results.json" not in holds:
        say("\nSFT, which is to be π_ref, learns to roll fair dice")
        reproduce(start(Namespace(**vars(args) | DICE_SFT | where), locks))
        say("\nand from there:")
    return load_policy(str(folder))


def reproduce(run: Run) -> None:
    """π_ref → evaluation → training → answers → results.json, which makes a run a finished one."""
    args, folder, answers = run.args, Path(run.args.output_dir), not run.args.overfit_one_batch
    fix_reference(run)
    if run.step == 0 and answers:
        evaluate(run)
        generate(run)
    train(run)
    if answers and args.max_steps > 0:
        generate(run)
    results = {"step": run.step} | (dice_report(run) if "rolls" in run.sides else {})
    lines = [line for _, line in read_file(f"{folder}/metrics.jsonl")]
    if answers:
        results |= [line for line in lines if "eval_loss" in line][-1]
        ended = [x["finished"] for _, x in read_file(f"{folder}/generations-{run.step}.jsonl")]
        results["finished"] = float(np.mean(ended))
        say(f"{results['finished']:.1%} of {len(ended)} answers ended by themselves")
    else:
        losses = [line["loss"] for line in lines if "loss" in line]
        results |= {"first_loss": losses[0], "last_loss": losses[-1]}
        left = losses[-1] / losses[0]
        say(f"one batch, {run.step} steps: {left:.2%} of loss {losses[0]:.4g} is left (goal: 1 %)")
    on_first(lambda: save_networks(run, folder))
    on_first(lambda: write_json(folder / "results.json", results, indent=2))
    say(f"the policy and its results are in {folder}")
    if args.as_is and not (results["gain_share"] >= 0.98 and results["policy"]["valid"] >= 0.95):
        shares = f"{results['gain_share']:.1%} of the gain, {results['policy']['valid']:.1%} valid"
        raise RunError(f"the example misses its target, 98 % and 95 %: {shares}")


def main(argv: Sequence[str] | None = None) -> None:
    """The whole program; `argv` as on the command line. Exits with 2 on what a user can put right,
    1 on what the machine or the numbers did wrong, 128 + signal when stopped; with one line, which
    says how to go on. A traceback is a fault of this program."""
    for stream in (sys.stdout, sys.stderr):  # a terminal that knows no π shows a question mark
        with suppress(AttributeError):
            stream.reconfigure(errors="replace")
    transformers.logging.set_verbosity_error()
    huggingface_hub.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # and the hub's with it
    if sys.stderr.isatty():
        huggingface_hub.utils.enable_progress_bars()  # a first download takes long
    else:
        datasets.disable_progress_bars()
    # On a CPU with glibc let tensors reuse what others freed: by default blocks of over 32 MB go
    # back to the system, which hands them out again page by page and cleared.
    with suppress(AttributeError, TypeError, OSError):  # elsewhere there is no such thing
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: smaller blocks come from the heap,
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: and the heap is not given back
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU, for what stays float32
    stop_signals.clear()
    code, says, args = 0, "", None
    try:
        with ExitStack() as locks:
            meet_processes()
            args = parse_args(argv)
            args.output_dir = gather(args.output_dir)[0]  # a name may hold the time
            # Left to itself, torch takes one attention kernel for π_ref and another, with a graph,
            # for π: in bfloat16 they round differently, and log π/π_ref would show it.
            torch.backends.cuda.enable_flash_sdp(not args.bf16)
            torch.backends.cuda.enable_cudnn_sdp(not args.bf16)
            if args.compare:
                require(WORLD_SIZE == 1, "--compare takes one process: start it without torchrun")
                compare(args)
            elif args.resume and Path(args.resume, "results.json").exists():
                say(f"{args.resume} is finished: see its results.json")
            else:
                if args.dice:
                    torch.set_num_threads(1)  # so small a model is no faster with more
                reproduce(start(args, locks))
    except (UserError, RunError) as error:
        code, says = 2 if isinstance(error, UserError) else 1, error
    except KeyboardInterrupt as error:
        code, says = 128 + [*stop_signals, signal.SIGINT][0], str(error) or "stopped at once"
    except (RuntimeError, MemoryError, OSError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and not OUT_OF_MEMORY.search(str(error)):
            raise
        code, says = 1, str(error) or "out of memory"
    begun = args and os.path.exists(f"{args.output_dir}/args.json")
    unfinished = begun and not os.path.exists(f"{args.output_dir}/results.json")
    if unfinished and not isinstance(says, UserError | RunError):  # they bring their own cure
        says = f"{says}; what was complete is kept: go on with --resume {args.output_dir}"
    if code and (LOCAL_RANK == 0 or code == 1 or not dist.is_initialized()):  # once on each machine
        print(f"drov.py: error: {' '.join(str(says).split())}", file=sys.stderr)
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()
