# SPDX-License-Identifier: Apache-2.0
"""DRO-V in one file: a policy learns from single rated answers, with a value for every prompt.

The method is that of "Offline Regularised Reinforcement Learning for Large Language Models
Alignment" (arXiv 2405.19107). The data are triplets: a prompt x, a completion y, whoever wrote it,
and its reward r. With π_ref, the model that training starts from, the goal is Eq. 1. Eq. 2 solves
it, and in logarithms is Eq. 3. Two networks, π and V, learn to make its sides equal on the data:

    max_π  E[ r(x, y) − τ KL(π(·|x) ‖ π_ref(·|x)) ]      (Eq. 1)
    π* = π_ref exp((r − V*)/τ),  V*(x) = τ log E_{y~π_ref} exp(r/τ)      (Eq. 2)
    r(x, y) − V(x) = τ log π(y|x)/π_ref(y|x)      (Eq. 3)
    L(π, V) = ½ E[ (r − V − τ log π/π_ref)² ]      (Eq. 4)

Algorithm 1 is `train`; its two gradients are those of `dro_v_loss`. Commands to paste:
    python drov.py --dice  # the answer is known; a minute
    python drov.py --dataset_name mine.jsonl --num_eval_prompts 50  # prompt, completion, reward
    python drov.py --split_mode prompt_fold --eval_fold_index 0  # the paper's T5-L, one fold

Where the paper is silent or contradicts itself (the README has all): Algorithm 1's ½ for Eq. 8's τ/2
is a slip; the training rows alone normalise rewards; V is a copy of π_ref with a linear output. Left
out: pairs, reward models, sampling in training, π_ref in memory, LoRA, dropout.
"""

import argparse
import atexit
import copy
import csv
import itertools
import json
import logging
import math
import os
import re
import shutil
import sys
import time
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn
from tqdm import tqdm

# torchrun starts several processes; one alone is number 0 of 1.
WORLD_SIZE = int(os.environ.get("WORLD_SIZE") or 1)
RANK = int(os.environ.get("RANK") or 0) if WORLD_SIZE > 1 else 0
LOCAL_RANK = int(os.environ.get("LOCAL_RANK") or 0) if WORLD_SIZE > 1 else 0
DEVICE = torch.device(f"cuda:{LOCAL_RANK}" if torch.cuda.is_available() else "cpu")


def say(text):
    """Print a line, above any progress bar; of several processes the first one speaks."""
    if RANK == 0:
        tqdm.write(text)


def progress(items, desc=None):
    """`items`, with a progress bar on a terminal (disable=None) if `desc` gives it a name."""
    return tqdm(items, desc, disable=RANK > 0 or desc is None or None, dynamic_ncols=True)


class UserError(ValueError):
    """What a user can put right: it ends the program with one line and exit code 2."""


def require(condition, message):
    """Raises UserError unless `condition` holds."""
    if not condition:
        raise UserError(message)


@contextmanager
def loading(source):
    """What a library raises within becomes a UserError that names `source` and gives the reason."""
    try:
        yield
    except Exception as error:
        says = f"cannot load {source}: {type(error).__name__}: {error}"[:500]
        raise error if isinstance(error, UserError) else UserError(says) from error


# ---------- losses
def dro_v_loss(policy_logps, ref_logps, values, rewards, tau):
    """DRO-V's policy loss, value loss and the residual of Eq. 3; everything is (B,).

    The gradients of the losses' means are Eq. 8 / τ (in `policy_logps`, none in `values`) and Eq. 7
    (in `values`, none in `policy_logps`), divided by B. Eq. 4 is ½ mean(residual²). Raises ValueError
    where torch would make (B, B) of (B,) and a value head's (B, 1).
    """
    log_ratio = policy_logps - ref_logps  # log π(y|x)/π_ref(y|x)
    residual = rewards - values - tau * log_ratio  # δ, which is 0 at (π*, V*): Eq. 3
    if residual.shape != policy_logps.shape:
        raise ValueError(f"log-probabilities are {policy_logps.shape}, values {values.shape}")
    # Eq. 7: ∇_φ = (V − r + τ log π/π_ref) ∇V = −δ ∇V, with the policy held fixed.
    value_loss = 0.5 * (rewards - values - tau * log_ratio.detach()).square()
    # Eq. 8: ∇_θ = −τ [∇log π (r − V) − (τ/2) ∇(log π/π_ref)²] = −τ δ ∇log π, with V held fixed; and
    # divided by τ, as in the paper: a small τ is to be no small step. (Adafactor and Adam cancel it.)
    policy_loss = 0.5 * (rewards - values.detach() - tau * log_ratio).square() / tau
    return policy_loss, value_loss, residual


def kto_loss(policy_logps, ref_logps, desirable, kl, beta):  # a new loss: here, `train`, --loss
    """KTO (arXiv 2402.01306): (B,); `desirable` bool; `kl` (), z₀ of mismatched pairs, no gradient."""
    log_ratio = policy_logps - ref_logps
    margin = torch.where(desirable, log_ratio - kl, kl - log_ratio)
    return 1 - torch.sigmoid(beta * margin)


# ---------- models
# A policy is an encoder-decoder or a decoder-only model. A batch is Hugging Face's, padded on the
# right: `input_ids` and `attention_mask` (B, S), and `labels`, −100 where nothing is predicted. An
# encoder-decoder's labels are the completion (B, T); a decoder-only model's input is prompt and
# completion in a row, and its labels (B, S) are −100 on the prompt. `rewards`, `ref_logps`: (B,).
def load_policy(source, revision=None, seed=0):
    """A model in float32, without dropout, and its tokenizer; "dice" is a tiny T5. Raises UserError."""
    if source == "dice":
        torch.manual_seed(seed)
        sizes = {"vocab_size": 384, "d_model": 64, "d_ff": 128, "d_kv": 16, "num_heads": 4}
        config = transformers.T5Config(**sizes, num_layers=2, decoder_start_token_id=0)
        policy = transformers.T5ForConditionalGeneration(config)
        return policy.eval().to(DEVICE), transformers.ByT5Tokenizer()
    with loading(source):
        config = transformers.AutoConfig.from_pretrained(source, revision=revision)
        for name, value in vars(config).items():
            if value == "gelu_new":  # the same function in one piece: faster, in less memory
                setattr(config, name, "gelu_pytorch_tanh")
        kinds = (transformers.AutoModelForCausalLM, transformers.AutoModelForSeq2SeqLM)
        load = kinds[1 if config.is_encoder_decoder else 0].from_pretrained
        options = {"revision": revision, "config": config, "dtype": torch.float32}
        policy, info = load(source, output_loading_info=True, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, revision=revision)
        require(not info["missing_keys"], f"{source} lacks weights: {info['missing_keys']}")
    return policy.eval().to(DEVICE), tokenizer


@contextmanager
def float32_head(model, select):
    """Within it the output layer, the largest product, sees only selected states, in float32."""
    head = model.get_output_embeddings()
    exact = torch.autocast(DEVICE.type, enabled=False)  # bfloat16 errors add up over a completion
    head.forward = exact(lambda x: type(head).forward(head, select(x).to(head.weight.dtype)))
    try:
        yield
    finally:
        del head.forward


def sequence_logps(model, batch):
    """log π(y|x) = Σ_t log π(y_t | x, y_<t) of the completion with its end: (B,) float32."""
    labels = batch["labels"]
    inputs = {"input_ids": batch["input_ids"], "use_cache": False}
    if model.config.is_encoder_decoder:
        start = torch.full_like(labels[:, :1], model.config.decoder_start_token_id)
        inputs["attention_mask"] = batch["attention_mask"]
        inputs["decoder_input_ids"] = torch.cat([start, labels[:, :-1].clamp(min=0)], dim=1)
        targets = labels  # the decoder's state at t has read y_<t
    else:
        # The state at t predicts token t + 1: the prompt's last one y_1. What is causal never sees
        # the padding behind it, and needs no mask.
        targets = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    predicted = targets != -100
    with float32_head(model, lambda states: states[predicted]):
        logits = model(**inputs).logits.float()  # (N, vocabulary) for the N tokens of completions
    token_logps = -nn.functional.cross_entropy(logits, targets[predicted], reduction="none")
    return token_logps.new_zeros(targets.shape).masked_scatter(predicted, token_logps).sum(-1)


class ValueModel(nn.Module):
    """V_φ(x), what answers to a prompt earn, in normalised rewards; without a policy, one number.

    The paper leaves it open. Here it is a copy of π_ref below the output layer (`shared`: the
    policy's own, found worse), and a linear output of an encoder's mean, or of the prompt's last
    state: the difference of two equal layers, for V to start at 0 and yet learn by Adafactor.
    """

    def __init__(self, policy, shared=False):
        super().__init__()
        self.body = None
        start = torch.ones(1)
        if policy is not None:
            self.is_encoder = policy.config.is_encoder_decoder
            body = policy.get_encoder() if self.is_encoder else policy.base_model
            width = body.get_input_embeddings().weight.shape[1]
            start = torch.randn(width) * width**-0.5
            self.body = body if shared else copy.deepcopy(body)
        self.head = nn.Parameter(start.repeat(2, 1))  # (2, width)

    def forward(self, batch):
        """V of each row's prompt, (B,) float32."""
        ids = batch["input_ids"]
        if self.body is None:
            state = self.head.new_ones(len(ids), 1)
        elif self.is_encoder:
            mask = batch["attention_mask"]
            states = self.body(input_ids=ids, attention_mask=mask).last_hidden_state
            weights = mask / mask.sum(-1, keepdim=True)
            state = (states.float() * weights.unsqueeze(-1)).sum(1)  # (B, width)
        else:
            last = (batch["labels"] != -100).int().argmax(-1) - 1  # (B,) the place before y_1
            ids = ids[:, : last.max() + 1]  # V reads no completion
            states = self.body(input_ids=ids, use_cache=False).last_hidden_state
            state = states[torch.arange(len(last), device=last.device), last].float()
        return (state * (self.head[0] - self.head[1])).sum(-1)  # a product autocast would round


# ---------- data
def read_file(path):
    """The objects of JSON Lines or a JSON array, or the rows of a .csv file. Raises UserError."""
    number = 0

    def lines():
        nonlocal number
        with open(path, "rb") as file:  # "\n" alone ends a line, U+2028 does not
            for number, line in enumerate(file, start=1):
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")

    is_csv = str(path).endswith(".csv")
    try:
        if is_csv:
            csv.field_size_limit(2**31 - 1)
            rows = csv.DictReader(lines(), strict=True)
        elif next(lines(), "").lstrip().startswith("["):
            rows = json.loads("".join(lines()))
        else:
            rows = map(json.loads, filter(str.strip, lines()))
        for row in rows:
            require(isinstance(row, dict), f"{row!r:.50} is no object")
            require(not is_csv or None not in [*row, *row.values()], "not the header's fields")
            yield row
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, line {number} is not UTF-8: save the file as that") from error
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path}, line {number}: {error}") from error


def read_rows(args):
    """The raw rows of dice, of a file, or of what `datasets` finds on disk or the hub."""
    name = args.dataset_name
    with loading(name):
        if name == "dice":
            yield from dice_rolls(args.seed)
        elif name.endswith(".parquet"):
            yield from pyarrow.parquet.read_table(name).to_pylist()
        elif os.path.isfile(name) or name.endswith((".jsonl", ".json", ".csv")):
            yield from read_file(name)
        else:
            split = {"split": args.dataset_split, "revision": args.dataset_revision}
            yield from datasets.load_dataset(name, **split)


def as_messages(prompt):
    """The chat messages that a prompt is, as a list or as its JSON text; None if it is no such."""
    try:
        chat = json.loads(prompt) if isinstance(prompt, str) else prompt
        texts = [turn["content"] for turn in chat if isinstance(turn["role"], str)]
        return chat if len(texts) == len(chat) > 0 else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def usable_text(part, role):
    """A text; of chat messages that end with `role`, one's text, or several's JSON; else None."""
    chat = as_messages(part) if role == "user" or isinstance(part, list) else None
    if chat:
        if chat[-1]["role"] != role or (role == "assistant" and len(chat) > 1):
            return None
        part = chat[0]["content"] if len(chat) == 1 else json.dumps(chat, ensure_ascii=False)
    is_text = isinstance(part, str) and part.strip() and not re.search("[\ud800-\udfff]", part)
    return part if is_text else None


def load_triplets(args, dropped=None):
    """A list of (prompt, completion, raw reward); `dropped` counts the others. Raises UserError."""
    dropped = Counter() if dropped is None else dropped
    triplets = []
    for row in progress(read_rows(args), "Reading rows"):
        answers = [row]
        key = args.reward_key or "reward"
        if "completions" in row and "completion" not in row:  # UltraFeedback's
            answers = row["completions"] or [{}]  # dropped, as one
            key = args.reward_key or "overall_score"
        prompt = usable_text(row.get("prompt", row.get("instruction")), "user")
        for answer in answers:
            completion = usable_text(answer.get("completion", answer.get("response")), "assistant")
            try:
                reward = str(answer.get(key)).strip().lower()
                reward = float({"true": 1, "false": 0}.get(reward, reward))
            except ValueError:
                reward = math.nan
            triplet = (prompt, completion, reward if math.isfinite(reward) else None)
            if None in triplet:
                dropped[("prompt", "completion", "reward")[triplet.index(None)]] += 1
            else:
                triplets.append((prompt.strip(), completion, reward))
    says = f"{len(triplets)} triplets from {args.dataset_name}; dropped for want of {dict(dropped)}"
    columns = list(row) if dropped else "nothing"
    require(triplets, f"{says}: it holds {columns}; --reward_key names the reward's column")
    say(says)
    return triplets


def split_prompts(
    prompts, mode, *, seed, num_eval_prompts, num_eval_folds, eval_prompts_per_fold, eval_fold_index
):
    """(train, eval): disjoint lists of unique prompts, in the order of a seeded hash. Raises UserError."""
    unique = sorted(set(prompts), key=lambda prompt: sha256(f"{seed}\n{prompt}".encode()).digest())
    first = 0
    needed = last = num_eval_prompts
    if mode == "prompt_fold":
        needed = last = num_eval_folds * eval_prompts_per_fold
        if eval_fold_index != "all":
            first = eval_fold_index * eval_prompts_per_fold
            last = first + eval_prompts_per_fold
    require(last <= needed, f"--eval_fold_index must be 0 to {num_eval_folds - 1}, or all")
    enough = needed <= len(unique) and last - first < len(unique)
    require(enough, f"cannot hold out {needed} of {len(unique)} prompts: lower --num_eval_…")
    return unique[:first] + unique[last:], unique[first:last]


def encode_prompts(tokenizer, prompts, is_encoder_decoder, max_length, date=None):
    """Ids of prompts, as a server would send them; a long one keeps its end, and BOS. Raises UserError."""
    chats = [as_messages(prompt) for prompt in prompts]
    if tokenizer.chat_template and not is_encoder_decoder:
        template = tokenizer.get_chat_template()
        if date is not None:  # a run that goes on tomorrow must train on today's tokens
            day = time.strptime(date, "%Y-%m-%d")
            call = r"strftime_now\(\s*(['\"])(.*?)\1\s*\)"
            template = re.sub(call, lambda found: repr(time.strftime(found[2], day)), template)
        for i, prompt in enumerate(prompts):
            chats[i] = chats[i] or [{"role": "user", "content": prompt}]
        options = {"add_generation_prompt": True, "enable_thinking": False, "return_dict": False}
        options.update(chat_template=template, sanitize_control_tokens=True)
        with loading("the chat template"):
            rows = tokenizer.apply_chat_template(chats, **options)
    else:
        require(not any(chats), "a conversation needs a decoder-only model with a chat template")
        rows = tokenizer(list(prompts), split_special_tokens=True).input_ids
        if not is_encoder_decoder:  # an end behind the text is for an encoder alone
            rows = [ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids for ids in rows]
    for i, ids in enumerate(rows):
        if len(ids) > max_length:
            bos = ids[:1] if ids[0] == tokenizer.bos_token_id else []
            rows[i] = bos + ids[len(ids) - max_length + len(bos) :]
    return rows


def completion_end(tokenizer, is_encoder_decoder):
    """(ids, special): the end of an assistant's turn, or the end token; and all special tokens."""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    if tokenizer.chat_template and not is_encoder_decoder:
        chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "Placeholder"}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, enable_thinking=False)
        ids = tokenizer(text.partition("Placeholder")[2], add_special_tokens=False).input_ids
        for place, token in enumerate(ids):
            if token in special:
                return ids[: place + 1], special
    require(tokenizer.eos_token_id is not None, "the tokenizer has no end token: set eos_token")
    return [tokenizer.eos_token_id], special


def encode_completions(tokenizer, completions, is_encoder_decoder, max_length):
    """Ids of completions, at most `max_length`, with their end, once; but cut ones without one."""
    end, special = completion_end(tokenizer, is_encoder_decoder)
    special -= {tokenizer.unk_token_id}
    options = {"add_special_tokens": False, "split_special_tokens": True}
    rows = []
    for ids in tokenizer(list(completions), **options).input_ids:
        ids = [token for token in ids if token not in special]  # Unigram makes some all the same
        rows.append(ids + end if len(ids + end) <= max_length else ids[:max_length])
    return rows


@dataclass
class Rows:
    """N triplets as tokens. A row is known by its number."""

    prompts: list[str]
    x: list[np.ndarray]  # each prompt's tokens
    y: list[np.ndarray]  # each completion's
    rewards: Tensor  # (N,) normalised
    seq2seq: bool  # encoder and decoder, or one text of both
    ref_logps: Tensor  # (N,) log π_ref(y|x); NaN until it is scored

    def __post_init__(self):
        self.lengths = np.array([list(map(len, self.x)), list(map(len, self.y))]).T  # (N, 2)
        self.widths = self.lengths if self.seq2seq else self.lengths.sum(1, keepdims=True)

    def batch(self, rows):
        """Some rows as a batch on the device."""
        inputs = [torch.from_numpy(self.x[row]).long() for row in rows]
        labels = [torch.from_numpy(self.y[row]).long() for row in rows]
        if not self.seq2seq:
            pairs = list(zip(inputs, labels, strict=True))
            inputs = [torch.cat(pair) for pair in pairs]
            labels = [torch.cat([torch.full_like(x, -100), y]) for x, y in pairs]
        inputs = nn.utils.rnn.pad_sequence(inputs, batch_first=True, padding_value=-100)
        labels = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
        batch = {"input_ids": inputs.clamp(min=0), "attention_mask": (inputs >= 0).long()}
        batch.update(labels=labels, rewards=self.rewards[rows], ref_logps=self.ref_logps[rows])
        return {name: tensor.to(DEVICE) for name, tensor in batch.items()}


def make_rows(args, tokenizer, seq2seq, triplets, mean, std):
    """Tokenise triplets, and normalise their rewards."""
    x = []
    y = []
    # A thousand at a time, and kept as arrays: lists of Python's numbers take nine times as much.
    for start in progress(range(0, len(triplets), 1000), "Tokenising"):
        prompts, completions, _ = zip(*triplets[start : start + 1000], strict=True)
        each = list(dict.fromkeys(prompts))  # once, however many answers it has
        ids = encode_prompts(tokenizer, each, seq2seq, args.max_prompt_length, args.date)
        arrays = {prompt: np.array(row, np.int32) for prompt, row in zip(each, ids, strict=True)}
        x += [arrays[prompt] for prompt in prompts]
        ids = encode_completions(tokenizer, completions, seq2seq, args.max_completion_length)
        y += [np.array(row, np.int32) for row in ids]
    prompts, _, rewards = zip(*triplets, strict=True)
    rewards = ((torch.tensor(rewards, dtype=torch.float64) - mean) / std).float()
    return Rows(list(prompts), x, y, rewards, seq2seq, torch.full_like(rewards, math.nan))


def choose_prompts(args, prompts):
    """Training prompts, and the fold of each held-out one, in the split's order, within the limits."""
    sizes = Counter(prompts)

    def limited(some, most):
        total = np.cumsum([sizes[prompt] for prompt in some])
        return some[: max(1, int(np.searchsorted(total, most or math.inf, side="right")))]

    names = ("seed", "num_eval_prompts", "num_eval_folds", "eval_prompts_per_fold")
    settings = {name: getattr(args, name) for name in names}
    index = args.eval_fold_index or 0  # prompt_seeded has one set, and it has the name 0
    folds = range(args.num_eval_folds) if index == "all" else [index]
    fold_of = {}
    for fold in folds:
        _, held_out = split_prompts(sizes, args.split_mode, eval_fold_index=fold, **settings)
        some = limited(held_out, (args.max_eval_samples or 0) / len(folds))
        fold_of.update(dict.fromkeys(some, fold))
    train, _ = split_prompts(sizes, args.split_mode, eval_fold_index=index, **settings)
    return limited(train, args.max_train_samples), fold_of


def load_data(args, tokenizer, seq2seq):
    """Triplets → split → tokens, normalised rewards. Returns (rows by name, folds, manifest)."""
    names = [name for name in vars(args) if name.startswith(("dataset", "split", "num_", "eval_"))]
    manifest = {name: getattr(args, name) for name in (*names, "seed", "reward_key")}
    dropped = Counter()
    triplets = load_triplets(args, dropped)
    train, fold_of = choose_prompts(args, [prompt for prompt, _, _ in triplets])
    chosen = {}
    for name, prompts in {"train": set(train), "eval": set(fold_of)}.items():
        chosen[name] = [triplet for triplet in triplets if triplet[0] in prompts]
        manifest[f"{name}_rows"] = len(chosen[name])
        manifest[f"{name}_prompts"] = len(prompts)
        text = "\n".join(map(json.dumps, chosen[name]))
        manifest[f"{name}_sha256"] = sha256(text.encode()).hexdigest()
    # The paper's "mean 0 and variance 1", of the training rows: no held-out reward leaks.
    raw = np.array([reward for _, _, reward in chosen["train"]])
    mean = float(raw.mean())
    std = float(raw.std())
    differ = 1e-12 * np.abs(raw).max() < std < math.inf
    require(differ or args.loss == "sft", f"all training rewards are {mean:.6g}, but for rounding")
    if args.dataset_name == "dice":
        chosen["rolls"] = every_roll(fold_of)
    data = {}
    for name, some in chosen.items():
        data[name] = make_rows(args, tokenizer, seq2seq, some, mean, std if differ else 1.0)
    full = data["train"].lengths == [args.max_prompt_length, args.max_completion_length]
    manifest.update(cut_prompts=full[:, 0].mean(), cut_completions=full[:, 1].mean())
    manifest.update(reward_mean=mean, reward_std=std, reward_min=raw.min(), reward_max=raw.max())
    say(", ".join(f"{name} {x:.6g}" for name, x in manifest.items() if isinstance(x, int | float)))
    manifest.update(dropped=dict(dropped), held_out=defaultdict(list))
    for prompt, fold in fold_of.items():
        manifest["held_out"][str(fold)].append(sha256(prompt.encode()).hexdigest()[:16])
    if args.loss == "kto":  # mismatched: each prompt with the completion half the rows further on,
        own = np.array(data["train"].prompts, dtype=object)
        partner = np.roll(np.arange(len(own)), -(len(own) // 2))
        require(len(train) > 1, "--loss kto needs two training prompts")
        while (own[partner] == own).any():  # or with the next one of another prompt
            partner = (partner + (own[partner] == own)) % len(own)
        data["mismatched"] = replace(data["train"], y=[data["train"].y[row] for row in partner])
    return data, fold_of, manifest


def step_rows(step, num_rows, batch_size, seed):
    """The (batch_size,) rows of a step, from 1: a part of an endless chain of permutations."""
    places = np.arange((step - 1) * batch_size, step * batch_size)
    epochs = places // num_rows
    orders = {e: np.random.default_rng([seed, e]).permutation(num_rows) for e in np.unique(epochs)}
    return np.array([orders[e][place] for e, place in zip(epochs, places % num_rows, strict=True)])


def micro_batches(rows, widths, max_tokens):
    """This process's share of `rows`, in pieces of like length: a tenth at most is padding."""
    order = np.lexsort(widths[rows].T)[::-1]  # longest first, by the last width, then the first
    pieces = [[]]
    for row in rows[order][RANK::WORLD_SIZE]:
        piece = [*pieces[-1], row]
        padded = len(piece) * widths[piece].max(0).sum()
        fits = padded <= max_tokens and padded - widths[piece].sum() <= max_tokens / 10
        if fits or not pieces[-1]:
            pieces[-1] = piece
        else:
            pieces.append([row])
    return [np.array(piece, dtype=int) for piece in pieces if piece]


# ---------- the loop
# `state` is a run in memory: args, policy, tokenizer, data (Rows by name), fold_of, manifest, step
# (the last one done), and from `make_networks` value_model and optimizer.
def make_networks(state):
    """The value model, where the loss has one, and one optimiser for both networks."""
    args = state.args
    torch.manual_seed(args.seed)  # for V's output layer
    policy_parameters = list(state.policy.parameters())
    groups = [{"params": policy_parameters, "lr": args.learning_rate}]
    if args.loss == "dro_v" and args.value != "batch":
        body = state.policy if args.value == "prompt" else None
        state.value_model = ValueModel(body, args.share_policy_and_value_backbone).to(DEVICE)
        shared = set(policy_parameters)  # a shared body learns at the policy's rate
        own = [each for each in state.value_model.parameters() if each not in shared]
        groups.append({"params": own, "lr": args.value_learning_rate})
    if args.optim == "adamw":
        state.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    else:  # the paper's decay, 0.8, and an epsilon so small that a gradient's size does not matter
        state.optimizer = torch.optim.Adafactor(groups, beta2_decay=-0.8, eps=(1e-15, 1e-3))


def gather(item):
    """Every process's `item`, in the order of their ranks; all wait here for the slowest."""
    items = [item] * WORLD_SIZE
    if WORLD_SIZE > 1:
        dist.all_gather_object(items, item)
    return items


@torch.no_grad()
def score(state, data, rows=None, value_model=None, desc=None):
    """log π(y|x), and V(x) with a `value_model`, of `rows` or all: (N,) each, NaN where not asked."""
    rows = np.arange(len(data.x)) if rows is None else rows
    scores = torch.full((2, len(data.x)), math.nan)
    pieces = micro_batches(rows, data.widths, 4 * state.args.micro_batch_tokens)
    for piece in progress(pieces, desc):
        batch = data.batch(piece)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=state.args.bf16):
            scores[0, piece] = sequence_logps(state.policy, batch).cpu()
            if value_model:
                scores[1, piece] = value_model(batch).cpu()
    own = np.array([row for piece in pieces for row in piece], dtype=int)
    for some, some_scores in gather((own, scores[:, own])):
        scores[:, some] = some_scores
    return scores[0], scores[1]


def score_reference(state):
    """Put log π_ref(y|x), scored once and kept on disk, into the rows. Raises UserError."""
    args = state.args
    file = Path(args.output_dir, "reference_logps.safetensors")
    if not file.exists():
        require(state.step == 0, f"{file} is gone, and π_ref with it: start again elsewhere")
        # No row is scored that will not be visited: `step_rows` begins with the first epoch.
        total = len(state.data["train"].x)
        steps = 1 if args.overfit_one_batch else args.max_steps
        visited = step_rows(1, total, total, args.seed)[: max(1, steps * args.train_batch_size)]
        scored = {}
        for name, data in state.data.items():
            started = time.perf_counter()
            rows = visited if name in ("train", "mismatched") else None
            scored[name], _ = score(state, data, rows, desc=f"π_ref on {name} rows")
            scored[f"{name}_seconds"] = torch.tensor(time.perf_counter() - started)
        save_whole(file, lambda path: save_file(scored, path))
    with loading(file):
        scored = load_file(file)
    for name, data in state.data.items():
        data.ref_logps = scored[name]
    if state.step == 0:
        log(state, {"reference_seconds": scored["train_seconds"]})


def train(state):
    """Algorithm 1. At a log line: log, evaluate, save, in this order."""
    args = state.args
    data = state.data["train"]
    groups = state.optimizer.param_groups
    # The rates' factor by step (and initial_lr, in the groups); + 1 that no step's rate is 0.
    schedule = (args.lr_scheduler_type, state.optimizer, args.warmup_steps, args.max_steps + 1)
    factor = transformers.get_scheduler(*schedule).lr_lambdas[0]
    window = defaultdict(list)  # what is recorded since the last log line, by name
    for step in progress(range(state.step + 1, args.max_steps + 1), f"{args.loss} steps"):
        started = time.perf_counter()
        batch_of = 1 if args.overfit_one_batch else step
        rows = step_rows(batch_of, len(data.x), args.train_batch_size, args.seed)
        # A mean over the whole batch, SFT's over its tokens, however it is cut into pieces.
        divisor = data.lengths[rows, 1].sum() if args.loss == "sft" else len(rows)
        if args.loss == "kto" or args.value == "batch":  # KTO's z₀, of mismatched pairs; DRO-P's ū
            other = state.data.get("mismatched", data)
            mean_log_ratio = (score(state, other, rows)[0] - other.ref_logps)[rows].mean().item()
            mean_reward = data.rewards[rows].mean().item()
        for piece in micro_batches(rows, data.widths, args.micro_batch_tokens):
            batch = data.batch(piece)
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=args.bf16):
                logps = sequence_logps(state.policy, batch)
                if args.loss == "sft":
                    loss = -logps
                elif args.loss == "kto":
                    desirable = batch["rewards"] > mean_reward + 1e-6  # not by rounding alone
                    kl = torch.tensor(max(0.0, mean_log_ratio))
                    loss = kto_loss(logps, batch["ref_logps"], desirable, kl, args.tau)
                else:
                    if state.value_model:
                        values = state.value_model(batch)
                    else:  # DRO-P, Eq. 15: the gradient of ½ Var(u), u = r − τ log π/π_ref, is
                        # mean((u − ū) ∇u), DRO-V's with V = ū held fixed
                        values = torch.full_like(logps, mean_reward - args.tau * mean_log_ratio)
                    terms = (logps, batch["ref_logps"], values, batch["rewards"], args.tau)
                    policy_loss, value_loss, _ = dro_v_loss(*terms)
                    loss = policy_loss + value_loss
                    window["value"].append(values.detach())
            (loss.sum() / divisor).backward()
            window["loss"].append(loss.detach())
            window["tokens"].append(torch.from_numpy(data.lengths[piece]))
            window["log_ratio"].append(logps.detach() - batch["ref_logps"])
            window["reward"].append(batch["rewards"])
        if step == 1:
            off = torch.cat(window["log_ratio"]).square().mean().sqrt()
            say(f"before the first update log π/π_ref is {off:.2g} (root mean square)")
        for name, group in zip(("grad_norm", "value_grad_norm"), groups, strict=False):
            for each in group["params"]:  # processes have parts of one mean: they add up
                if WORLD_SIZE > 1 and each.grad is not None:
                    dist.all_reduce(each.grad)
            norm = nn.utils.clip_grad_norm_(group["params"], args.max_grad_norm or math.inf)
            window[name].append(norm.reshape(1))
            group["lr"] = group["initial_lr"] * factor(step)
        state.optimizer.step()
        state.optimizer.zero_grad()
        window["step_seconds"].append(torch.tensor([time.perf_counter() - started]))
        state.step = step
        save = step == args.max_steps or step % args.save_steps == 0
        if save or step % args.logging_steps == 0:
            log(state, summarise(window, args) | {"lr": groups[0]["lr"]})
            window.clear()
        if save:
            evaluate(state)
            save_checkpoint(state)


def summarise(window, args):
    """What is logged of lists of tensors (N,) by name, from all processes."""
    parts = gather({name: torch.cat(x).cpu().numpy() for name, x in window.items()})
    numbers = {name: np.concatenate([part[name] for part in parts]) for name in window}
    target = numbers["reward"] - args.tau * numbers["log_ratio"]  # what V is fitted to: Eq. 7
    # Where there is no V, the best constant for these rows: so all losses' numbers compare.
    residual = target - numbers.get("value", target.mean())
    metrics = {"loss": 0.5 * np.square(residual).mean()}  # Eq. 4
    if args.loss == "sft":
        metrics["loss"] = numbers["loss"].sum() / numbers["tokens"][:, 1].sum()  # nats a token
    elif args.loss == "kto" and "step_seconds" in numbers:
        metrics["loss"] = numbers["loss"].mean()
    metrics.update(residual_mean=residual.mean(), residual_std=residual.std())
    if target.std() > 0:
        metrics["value_explained_variance"] = 1 - residual.var() / target.var()
    # Sinking and sinking, it warns that mass leaks to texts outside the data, of which Eq. 4 sees
    # nothing. A V that learns faster helps: --value_learning_rate.
    metrics["log_ratio_mean"] = numbers["log_ratio"].mean()
    if "step_seconds" in numbers:
        seconds = numbers["step_seconds"].sum() / WORLD_SIZE
        metrics["tokens_per_second"] = numbers["tokens"].sum() / seconds
    means = {name: x.mean() for name, x in numbers.items() if name.endswith(("norm", "seconds"))}
    return metrics | means


def log(state, metrics):
    """A line of metrics.jsonl, and one to read. Raises FloatingPointError if one is not finite."""
    metrics = {"step": state.step} | {name: float(x) for name, x in metrics.items()}
    says = ", ".join(f"{name} {x:.4g}" for name, x in metrics.items())
    if not all(map(math.isfinite, metrics.values())):
        raise FloatingPointError(f"not finite: {says}; take lower rates or --max_grad_norm 1")
    if RANK == 0:
        with open(Path(state.args.output_dir, "metrics.jsonl"), "a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")
    say(says)


# ---------- evaluation
def evaluate(state):
    """Log the held-out numbers as eval_…, by one formula for all losses (but SFT's eval_loss)."""
    data = state.data["eval"]
    logps, values = score(state, data, None, state.value_model, "π and V on held-out rows")
    log_ratio = logps - data.ref_logps
    window = {"log_ratio": [log_ratio], "reward": [data.rewards]}
    window.update(loss=[-logps], tokens=[torch.from_numpy(data.lengths)])
    if state.value_model:
        window["value"] = [values]
    metrics = summarise(window, state.args)
    points = []  # for each two answers to a prompt that log π/π_ref orders rightly; a tie is ½
    for prompt in state.fold_of:
        rows = [row for row, other in enumerate(data.prompts) if other == prompt]
        better = data.rewards[rows][:, None] > data.rewards[rows]
        margins = (log_ratio[rows][:, None] - log_ratio[rows])[better]
        points += torch.where(margins.abs() <= 1e-3, 0.5, (margins > 0).float()).tolist()
    if points:
        metrics["pair_accuracy"] = np.mean(points)
    pair = torch.stack([log_ratio, data.rewards - values.nan_to_num()])  # needs no second answer
    if (pair.std(1, correction=0) > 1e-3).all():
        metrics["reward_correlation"] = pair.corrcoef()[0, 1]
    log(state, {f"eval_{name}": x for name, x in metrics.items()})


def generate(state):
    """Answer every held-out prompt once, and write generations-<step>.jsonl."""
    args = state.args
    policy = state.policy
    seq2seq = policy.config.is_encoder_decoder
    data = state.data["eval"]
    prompt_ids = [data.x[data.prompts.index(prompt)] for prompt in state.fold_of]
    end = completion_end(state.tokenizer, seq2seq)[0][-1]
    ends = {end, state.tokenizer.eos_token_id} - {None}
    # In the place of the model's own, from which transformers would take penalties and limits.
    own_config = policy.generation_config
    policy.generation_config = transformers.GenerationConfig(
        do_sample=args.temperature > 0, temperature=args.temperature or 1.0, top_k=0,
        max_new_tokens=args.max_new_tokens, eos_token_id=sorted(ends), pad_token_id=end,
        decoder_start_token_id=getattr(policy.config, "decoder_start_token_id", None),
    )  # fmt: skip
    torch.manual_seed(args.seed + RANK)  # the same command gives the same answers
    widths = np.array([[len(ids) + args.max_new_tokens] for ids in prompt_ids])
    pieces = micro_batches(np.arange(len(widths)), widths, 8 * args.micro_batch_tokens)
    answers = {}
    for piece in progress(pieces, "Answering"):
        x = [torch.from_numpy(prompt_ids[number]).long() for number in piece]
        padded = nn.utils.rnn.pad_sequence(x, True, -100, "right" if seq2seq else "left").to(DEVICE)
        bfloat16 = torch.autocast(DEVICE.type, torch.bfloat16, enabled=args.bf16)
        with torch.no_grad(), bfloat16, float32_head(policy, lambda states: states):
            ids = policy.generate(padded.clamp(min=0), attention_mask=(padded >= 0).long())
        start = 1 if seq2seq else padded.shape[1]
        answers.update(zip(piece.tolist(), ids[:, start:].tolist(), strict=True))
    policy.generation_config = own_config
    lines = [{"prompt": prompt, "fold": fold} for prompt, fold in state.fold_of.items()]
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    for number, tokens in itertools.chain(*[others.items() for others in gather(answers)]):
        lines[number]["completion"] = state.tokenizer.decode(tokens, **options)
        lines[number]["finished"] = not ends.isdisjoint(tokens)
    save_json(Path(args.output_dir, f"generations-{state.step}.jsonl"), *lines)


# ---------- dice
# "Ada rolls 3d6" is a prompt, "416" a completion, 11 its reward; DRO-V should load the dice.
def dice_rolls(seed):
    """64 fair rolls for each of 240 prompts: 20 names × 1 to 4 dice × 4, 6 or 8 sides."""
    names = """Ada Alan Blaise Carl Edsger Emmy Grace Hedy Henri John Kurt Leslie Maryam Niels Pierre
    Rózsa Sofia Sophie Srinivasa Thomas"""
    rng = np.random.default_rng(seed)
    for name, dice, sides in itertools.product(names.split(), (1, 2, 3, 4), (4, 6, 8)):
        for roll in rng.integers(1, sides + 1, size=(64, dice)):
            completion = "".join(map(str, roll))
            prompt = f"{name} rolls {dice}d{sides}"
            yield {"prompt": prompt, "completion": completion, "reward": int(roll.sum())}


def every_roll(prompts):
    """The triplets of all valid rolls of those prompts that have at most three dice."""
    triplets = []
    for prompt in prompts:
        dice, sides = map(int, prompt.split()[-1].split("d"))
        if dice <= 3:
            for roll in itertools.product(range(1, sides + 1), repeat=dice):
                triplets.append((prompt, "".join(map(str, roll)), sum(roll)))
    require(triplets, "no held-out prompt has less than four dice: hold out more")
    return triplets


def dice_reference(state):
    """Train `state.policy` on fair rolls: π_ref. It is kept in RUN/sft, for a run that goes on."""
    folder = Path(state.args.output_dir, "sft")
    if not gather(folder.exists())[0]:
        data = state.data["train"]
        parameters = list(state.policy.parameters())
        optimizer = torch.optim.Adafactor(parameters, beta2_decay=-0.8, eps=(1e-15, 1e-3))
        for step in progress(range(1, 601), "π_ref learns to roll fair dice"):
            rows = step_rows(step, len(data.x), 64, state.args.seed)
            tokens = data.lengths[rows, 1].sum()
            (-sequence_logps(state.policy, data.batch(rows)).sum() / tokens).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.param_groups[0]["lr"] = 0.05 * (601 - step) / 601
            optimizer.step()
            optimizer.zero_grad()
        save_whole(folder, lambda path: save_networks(state, path))
    state.policy, _ = load_policy(folder)


def dice_report(state):
    """The share that the policy has of the rise of Eq. 1, over all rolls, given valid ones."""
    tau = state.args.tau
    data = state.data["rolls"]
    logps, values = score(state, data, None, state.value_model, "every roll")
    names = {"sft": "π_ref", "policy": "π_θ", "optimum": "π*"}
    table = []
    errors = []
    for prompt in dict.fromkeys(data.prompts):
        rows = [row for row, other in enumerate(data.prompts) if other == prompt]
        rewards = data.rewards[rows].double()
        ref_logps = data.ref_logps[rows].double()
        optimum = ref_logps.log_softmax(0) + rewards / tau  # log π* + V*/τ: Eq. 2
        errors.append(values[rows[0]].nan_to_num() - tau * optimum.logsumexp(0))  # V, or 0, − V*
        three = torch.stack([ref_logps, logps[rows].double(), optimum.log_softmax(0)])  # (3, rolls)
        log_p = three.log_softmax(1)
        p = log_p.exp()
        kl = (p * (log_p - log_p[0])).sum(1)
        table.append(torch.stack([p @ rewards, kl, three.logsumexp(1).exp()], dim=1))
        if len(table) == 1 or len(rows) <= 6:
            shown = list(zip(rows, p.T.tolist(), strict=True))[:8]
    say(f"\nEach roll's probability, for a prompt that was never trained on, at τ = {tau:g}:")
    for row, shares in shown:
        for name, share in zip(names.values(), shares, strict=True):
            roll = state.tokenizer.decode(data.y[row], skip_special_tokens=True)
            say(f"{data.prompts[row]}: {roll}  {name:<6}{share:6.1%} {'█' * round(60 * share)}")
    say(f"\nExactly, over every roll of {len(table)} held-out prompts of at most three dice:")
    say(f"{'':<8}{'mean reward':>12}{'KL':>9}{'objective':>11}{'valid mass':>12}")
    results = {"tau": tau, "value_rmse": float(np.sqrt(np.mean(np.square(errors))))}
    for key, (reward, kl, valid) in zip(names, torch.stack(table).mean(0).tolist(), strict=True):
        raw = reward * state.manifest["reward_std"] + state.manifest["reward_mean"]
        objective = reward - tau * kl  # Eq. 1
        results[key] = {"reward": raw, "kl": kl, "objective": objective, "valid": valid}
        say(f"{names[key]:<8}{raw:>12.3f}{kl:>9.4f}{objective:>11.4f}{valid:>12.2%}")
    start, reached, best = [results[key]["objective"] for key in names]
    results["gain_share"] = (reached - start) / (best - start)
    says = f"π_θ has {results['gain_share']:.2%} of π*'s rise of the objective, given a valid roll"
    say(f"{says}; V(x) is off V*(x) by {results['value_rmse']:.3f} (root mean square)")
    return results


# ---------- comparison
def load_answers(folders, first):
    """Last or `first` answers by prompt, of runs that are folds of one policy; runs' settings."""
    prefixes = ("dataset", "split", "seed", "num_", "eval_p", "max_p", "max_c", "max_n", "temp")
    answers = {}
    settings = []
    for folder in map(Path, folders):
        with loading(f"{folder}, which must be a finished run"):
            args = json.loads((folder / "args.json").read_text("utf-8"))
            step = json.loads((folder / "results.json").read_text("utf-8"))["step"]
            lines = list(read_file(folder / f"generations-{0 if first else step}.jsonl"))
        new = {line["prompt"]: line for line in lines}
        require(answers.keys().isdisjoint(new), f"{folder} answers a prompt again")
        answers.update(new)
        settings.append({name: x for name, x in args.items() if name.startswith(prefixes)})
    return answers, settings


def make_pairs(ours, theirs):
    """Blind pairs: `id`, `prompt`, `A`, `B`; and `fold`, `ours`. Swapped sides give the same ones."""
    pairs = []
    for prompt, line in ours.items():
        texts = sorted([line["completion"], theirs[prompt]["completion"]])
        key = sha256(json.dumps([prompt, *texts]).encode()).hexdigest()
        if int(key[-1], 16) % 2 == 0:
            texts.reverse()
        pair = {"id": key[:16], "prompt": prompt, "A": texts[0], "B": texts[1]}
        mine = "A" if texts[0] == line["completion"] else "B"
        pairs.append(pair | {"fold": line["fold"], "ours": mine})
    return pairs


def load_scores(file, pairs):
    """Our score in each pair, (N,): 1 won, 0 lost, ½ a tie; of several verdicts the mean, or NaN."""
    winners = defaultdict(list)
    with loading(file):
        for line in read_file(file):
            require(line["winner"] in ("A", "B", "tie"), f"{line} is no verdict")
            winners[line["id"]].append(line["winner"])
    scores = []
    for pair in pairs:
        points = {"A": 0.0, "B": 0.0, "tie": 0.5, pair["ours"]: 1.0}
        given = [points[winner] for winner in winners[pair["id"]]] or [math.nan]
        scores.append(0.5 if pair["A"] == pair["B"] else np.mean(given))
    missing = np.isnan(scores).sum()
    require(missing < len(pairs), f"{file} has no verdict on any of these pairs")
    say(f"{file}: {missing} of {len(pairs)} pairs lack a verdict")
    return np.array(scores)


def win_rates(scores, folds):
    """From scores and folds, (N,): win rate, Wilson's 95 % interval, folds' rates, and their std."""
    folds = folds[~np.isnan(scores)]
    scores = scores[~np.isnan(scores)]
    # A score in [0, 1] has a variance of at most p (1 − p): with ties this errs on the wide side.
    p = scores.mean()
    n = len(scores)
    z = 1.959964
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(p * (1 - p) / n + (z / n / 2) ** 2) / (1 + z**2 / n)
    results = {"win_rate": p, "interval": [max(0.0, middle - half), min(1.0, middle + half)]}
    results.update(wins=int((scores > 0.5).sum()), losses=int((scores < 0.5).sum()), prompts=n)
    results["ties"] = n - results["wins"] - results["losses"]
    rates = {str(fold): scores[folds == fold].mean() for fold in np.unique(folds)}
    std = np.std(list(rates.values()), ddof=1) if len(rates) > 1 else None
    return results | {"folds": rates, "std": std}


def compare(args):
    """Write blind pairs of one policy's answers and another's; with --verdicts, say who won."""
    ours, settings = load_answers(args.compare, first=False)
    theirs, others = load_answers(args.against or args.compare, first=args.against is None)
    for each in settings + others:
        require(each == settings[0], f"the runs do not compare: {each} and {settings[0]}")
    require(ours.keys() == theirs.keys(), "the runs do not answer the same prompts")
    pairs = make_pairs(ours, theirs)
    file = Path(args.output_dir, "pairs.jsonl")
    save_json(file, *[{name: pair[name] for name in ("id", "prompt", "A", "B")} for pair in pairs])
    lengths = [np.mean([len(x["completion"]) for x in side.values()]) for side in (ours, theirs)]
    equal = sum(pair["A"] == pair["B"] for pair in pairs)
    says = f"{len(pairs)} blind pairs for --verdicts are in {file}, {equal} of equal answers; on average"
    say(f"{says} ours have {lengths[0]:.0f} characters, theirs {lengths[1]:.0f}")
    if args.verdicts:
        folds = np.array([pair["fold"] for pair in pairs])
        results = win_rates(load_scores(args.verdicts, pairs), folds)
        results.update(compare=args.compare, against=args.against, mean_characters=lengths)
        save_json(file.with_name("win_rates.json"), results, indent=2)
        low, high = results["interval"]
        spread = "" if results["std"] is None else f" ± {results['std']:.1%}"
        say(f"win rate {results['win_rate']:.1%}{spread}, 95 % interval {low:.1%} to {high:.1%}")


# ---------- a run on disk
# `run` says in which order it is written. Each is whole or not there (metrics.jsonl is put back by
# --resume; the last policy counts with results.json): a kill loses what is after a checkpoint.
def save_whole(path, write):
    """`write` makes a file or folder under another name, which becomes `path` once it is whole."""
    if RANK == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        write(temporary)
        os.replace(temporary, path)
    gather("it is written")


def save_json(path, *objects, indent=None):
    """The objects, with a line break behind each."""
    text = "".join(json.dumps(each, indent=indent, ensure_ascii=False) + "\n" for each in objects)
    save_whole(path, lambda file: file.write_text(text, encoding="utf-8", newline="\n"))


def save_networks(state, folder):
    """Policy and tokenizer, for `from_pretrained`, and the value model."""
    state.policy.save_pretrained(folder)
    state.tokenizer.save_pretrained(folder)
    if state.value_model:
        save_model(state.value_model, str(folder / "value_model.safetensors"))


def checkpoints(args):
    """The checkpoints in the run's folder, the newest last."""
    found = Path(args.output_dir).glob("checkpoint-*")
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def save_checkpoint(state):
    """Networks, optimiser and the log so far, after an evaluation: with no weight that is not finite."""

    def write(folder):
        save_networks(state, folder)
        torch.save(state.optimizer.state_dict(), folder / "optimizer.pt")
        shutil.copy(folder.with_name("metrics.jsonl"), folder)

    save_whole(Path(state.args.output_dir, f"checkpoint-{state.step}"), write)
    if RANK == 0 and state.args.save_total_limit:
        for old in checkpoints(state.args)[: -state.args.save_total_limit]:
            shutil.rmtree(old.rename(old.with_name(f".{old.name}.tmp")))  # never half of one


def load_checkpoint(state, folder):
    """Go on from there: V, optimiser, log and step; the policy is loaded."""
    with loading(folder):
        if state.value_model:
            load_model(state.value_model, folder / "value_model.safetensors")
        optimizer = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        state.optimizer.load_state_dict(optimizer)
    if RANK == 0:
        shutil.copy(folder / "metrics.jsonl", folder.parent)
    state.step = int(folder.name.split("-")[1])


# ---------- arguments
MODEL = "google/flan-t5-large"
DATASET = "openbmb/UltraFeedback"
PINNED = {MODEL: "0613663d0d48ea86ba8cb3d7a44f0f65dc596a2a"}
PINNED[DATASET] = "40b436560ca83a8dba36114c22ab3c66e43f6d5e"  # with overall_scores of 10 corrected
DICE = {
    "dataset_name": "dice", "model_name_or_path": "dice", "num_eval_prompts": 40, "max_steps": 300,
    "learning_rate": 3e-3, "value_learning_rate": 3e-2, "lr_scheduler_type": "linear",  # a V that is slower leaks mass
    "bf16": False, "warmup_steps": 60, "per_device_train_batch_size": 64, "micro_batch_tokens": 4096,
    "logging_steps": 50, "save_steps": 300, "max_new_tokens": 8,
}  # fmt: skip
MAY_BE_0 = ("seed", "eval_fold_index", "warmup_steps", "max_steps", "temperature")
# What --resume may change, for it changes nothing that is learnt:
FREE = ("per_device", "gradient_acc", "micro_batch", "save_total", "resume", "output_dir")


def make_parser():
    """The flags; their defaults are the paper's T5-L run."""
    parser = argparse.ArgumentParser("drov.py", allow_abbrev=False)
    parser.error = lambda message: require(False, message)  # in one line
    path = os.path.expanduser
    fold = lambda text: text if text == "all" else int(text)
    gpu = torch.cuda.is_available()
    switch = {"action": "store_true"}

    def add(flag, default, text, **options):
        if "action" not in options:
            options.setdefault("type", type(default))
        parser.add_argument(flag, default=default, help=f"{text} (default: {default})", **options)

    # fmt: off
    add("--dice", False, "the example", **switch)
    add("--output_dir", None, "new or empty folder; else runs/TIME", type=path)
    add("--resume", None, "go on with a run", type=path)
    add("--seed", 42, "of split, batches, V's output, answers, dice")
    add("--overfit_one_batch", False, "train on one batch, to see the loss vanish", **switch)
    add("--overfit_steps", 300, "steps of --overfit_one_batch")
    add("--dataset_name", DATASET, "hub name, folder, .jsonl, .json, .csv or .parquet", type=path)
    add("--dataset_revision", None, "hub commit", type=str)
    add("--dataset_split", "train", "of a hub dataset")
    add("--reward_key", None, "column that is r; else reward or overall_score", type=str)
    add("--split_mode", "prompt_seeded", "one set or folds", choices=("prompt_seeded", "prompt_fold"))
    add("--num_eval_prompts", 1000, "prompts that prompt_seeded holds out")
    add("--num_eval_folds", 5, "folds that prompt_fold cuts")
    add("--eval_prompts_per_fold", 1000, "prompts in each fold")
    add("--eval_fold_index", None, "fold held out, from 0, or 'all'", type=fold)
    add("--max_train_samples", None, "whole prompts of at most so many triplets", type=int)
    add("--max_eval_samples", None, "the same of the held-out ones", type=int)
    add("--max_prompt_length", 512, "tokens of x")
    add("--max_completion_length", 512, "tokens of y")
    add("--model_name_or_path", MODEL, "hub name or folder: π_ref", type=path)
    add("--model_revision", None, "hub commit", type=str)
    add("--share_policy_and_value_backbone", False, "V reads π's states; paper: worse", **switch)
    add("--bf16", gpu and torch.cuda.is_bf16_supported(), "bfloat16 autocast", action=argparse.BooleanOptionalAction)
    add("--loss", "dro_v", "DRO-V, KTO, or maximum likelihood", choices=("dro_v", "kto", "sft"))
    add("--value", "prompt", "V(x), a number, DRO-P", choices=("prompt", "constant", "batch"))
    add("--tau", 1.0, "τ, the weight of the KL; KTO's β")
    add("--learning_rate", 1e-4, "the policy's")
    add("--value_learning_rate", 1e-4, "the value model's")
    add("--optim", "adafactor", "optimiser", choices=("adafactor", "adamw"))
    add("--lr_scheduler_type", "constant_with_warmup", "rate over the steps", choices=("constant_with_warmup", "constant", "linear", "cosine", "inverse_sqrt"))
    add("--warmup_steps", 150, "steps of linear warm-up")
    add("--max_steps", 40000, "steps; 0 only evaluates and answers")
    add("--max_grad_norm", None, "clip each network's gradient", type=float)
    add("--per_device_train_batch_size", 32, "triplets a step and process")
    add("--gradient_accumulation_steps", 1, "multiplies the batch")
    add("--micro_batch_tokens", 8192 if gpu else 640, "padded tokens at once; changes no gradient")
    add("--logging_steps", 10, "steps between two log lines")
    add("--save_steps", 2000, "steps between two checkpoints")
    add("--save_total_limit", None, "checkpoints to keep; else all", type=int)
    add("--max_new_tokens", 512, "tokens of an answer, at most")
    add("--temperature", 1.0, "of sampling; 0 is greedy")
    add("--compare", None, "a run, or several with a fold each", type=path, nargs="+")
    add("--against", None, "the other one; else each run's start", type=path, nargs="+")
    add("--verdicts", None, "JSON Lines with `id` and `winner`", type=path)
    # fmt: on
    return parser


def parse_args(argv=None):
    """Flags to Namespace; what is typed wins over --resume, --dice, ... Raises UserError."""
    parser = make_parser()
    args = parser.parse_args(argv)
    saved = {}
    if args.resume:
        with loading(f"--resume {args.resume}, which must be a run's folder"):
            saved = json.loads(Path(args.resume, "args.json").read_text("utf-8"))
    parser.set_defaults(**(saved or (DICE if args.dice else {})))
    if args.overfit_one_batch and not saved:
        parser.set_defaults(warmup_steps=0, logging_steps=1, max_eval_samples=1)
    args = parser.parse_args(argv)
    args.max_steps = args.overfit_steps if args.overfit_one_batch else args.max_steps
    args.date = saved.get("date", time.strftime("%Y-%m-%d"))  # for a template that writes it
    args.model_revision = args.model_revision or PINNED.get(args.model_name_or_path)
    args.dataset_revision = args.dataset_revision or PINNED.get(args.dataset_name)
    # A step's rows depend on the whole batch alone, however it is shared out.
    args.train_batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps
    args.train_batch_size *= WORLD_SIZE
    args.output_dir = args.resume or args.output_dir or time.strftime("runs/%Y%m%d-%H%M%S")
    for name, x in vars(args).items():
        is_zero = x == 0 and (name in MAY_BE_0 or "learning_rate" in name)
        in_range = type(x) not in (int, float) or 0 < x < 2**32 or is_zero
        require(in_range, f"--{name} {x} is out of range")
        same = x == saved.get(name, x) or name.startswith(FREE)
        require(same, f"{name} was {saved.get(name)}: {x} would make it another run")
    one_set = args.split_mode == "prompt_seeded" and args.eval_fold_index is not None
    require(not one_set, "--eval_fold_index goes with --split_mode prompt_fold")
    require(args.compare or not (args.against or args.verdicts), "--verdicts: of which --compare?")
    of_v = args.value != "prompt" or args.share_policy_and_value_backbone
    require(args.loss == "dro_v" or not of_v, "--value and --share_… go with --loss dro_v")
    takes_mean = args.loss == "kto" or args.value == "batch"
    require(args.train_batch_size > 1 or not takes_mean, "one row has no batch's mean")
    return args


# ---------- main
def begin(args, newest):
    """Load and check all, and only then write; a run that goes on must find the same data."""
    folder = Path(args.output_dir)
    require(args.resume or not any(folder.glob("[!.]*")), f"--output_dir {folder} is not empty")
    model = newest or args.model_name_or_path
    policy, tokenizer = load_policy(model, args.model_revision, args.seed)
    seq2seq = policy.config.is_encoder_decoder
    data, fold_of, manifest = load_data(args, tokenizer, seq2seq)
    limit = getattr(policy.config.get_text_config(), "max_position_embeddings", None) or math.inf
    prompt = 0 if seq2seq else data["eval"].lengths[:, 0].max()
    needed = max(prompt + args.max_new_tokens, *[rows.widths.max() for rows in data.values()])
    require(needed <= limit, f"{needed} tokens are too many for the model's {limit} positions")
    file = folder / "prompt_split_manifest.json"
    known = gather(file.exists())[0]  # all have looked into the folder before one writes
    if not args.resume:
        save_json(folder / "args.json", vars(args), indent=2)
    if not known:
        save_json(file, manifest, indent=2)
    same = json.loads(file.read_text("utf-8")) == json.loads(json.dumps(manifest))
    require(same, f"the data are not those of {file}")
    state = {"data": data, "fold_of": fold_of, "manifest": manifest, "value_model": None, "step": 0}
    return argparse.Namespace(args=args, policy=policy, tokenizer=tokenizer, **state)


def run(args):
    """A run, from its start or from where it was killed, in the order of what it leaves on disk."""
    folder = Path(args.output_dir)
    newest = (checkpoints(args) or [None])[-1]
    state = begin(args, newest)  # args.json, prompt_split_manifest.json
    if args.model_name_or_path == "dice" and newest is None:
        dice_reference(state)  # sft
    make_networks(state)
    if newest:
        load_checkpoint(state, newest)
    elif RANK == 0:
        (folder / "metrics.jsonl").unlink(missing_ok=True)
    score_reference(state)  # reference_logps.safetensors
    if state.step == 0:
        evaluate(state)
        generate(state)  # generations-0.jsonl
    train(state)  # metrics.jsonl, checkpoint-…
    if state.step > 0:
        generate(state)
    results = list(read_file(folder / "metrics.jsonl"))[-1]  # held-out numbers
    if "rolls" in state.data:
        results.update(dice_report(state))
    answers = read_file(folder / f"generations-{state.step}.jsonl")
    results["finished"] = np.mean([answer["finished"] for answer in answers])
    if RANK == 0:
        save_networks(state, folder)
    save_json(folder / "results.json", results, indent=2)  # now the run is a finished one
    say(f"the policy and its results are in {folder}")


def main(argv=None):
    """The program. Exits with 2 for a UserError, 1 if memory or numbers fail, 130 at Ctrl-C."""
    logging.disable(logging.WARNING)  # of all libraries
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
        datasets.disable_progress_bars()
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU, for what stays float32
    args = None
    try:
        if WORLD_SIZE > 1 and not dist.is_initialized():
            if DEVICE.type == "cuda":
                torch.cuda.set_device(DEVICE)
            with loading("the other processes (start them with torchrun, or unset WORLD_SIZE)"):
                dist.init_process_group("nccl" if DEVICE.type == "cuda" else "gloo")
            atexit.register(dist.destroy_process_group)
        args = gather(parse_args(argv))[0]  # the name may hold the time
        if args.dice:
            torch.set_num_threads(1)  # so small a model is no faster with more
        if args.compare:
            compare(args)
        elif args.resume and Path(args.resume, "results.json").exists():
            say(f"{args.resume} is finished: see its results.json")
        else:
            run(args)
    except (UserError, FloatingPointError, MemoryError, RuntimeError, KeyboardInterrupt) as error:
        says = " ".join(str(error).split())[:500] or type(error).__name__
        if isinstance(error, RuntimeError) and "memory" not in says:
            raise
        code = {UserError: 2, KeyboardInterrupt: 130}.get(type(error), 1)
        if args and code != 2 and "finite" not in says and os.path.exists(args.output_dir):
            says += f"; go on with --resume {args.output_dir} (and a lower --micro_batch_tokens)"
        if RANK == 0 or code == 1:  # a UserError is the same for all
            tqdm.write(f"drov.py: error: {says}", file=sys.stderr)
        sys.exit(code)


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # where a terminal knows no π
    main()
