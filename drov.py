# SPDX-License-Identifier: Apache-2.0
"""DRO-V: fine-tune a language model on answers that were rated one by one.

This is "Offline Regularised Reinforcement Learning for Large Language Models Alignment"
(arXiv 2405.19107) in one file. The data are triplets: a prompt x, a completion y, whoever
wrote it, and its reward r. There are no pairs, no reward model, and no sampling in training.
π_ref is the model that training starts from. The goal is Eq. 1, and Eq. 2 is its solution:

    max_π  E[ r(x, y) − τ KL(π(·|x) ‖ π_ref(·|x)) ]                       (Eq. 1)
    π*(y|x) = π_ref(y|x) exp(r(x, y)/τ) / exp(V*(x)/τ),                   (Eq. 2)
    where V*(x) = τ log E_{y ~ π_ref}[ exp(r(x, y)/τ) ]

In logarithms, Eq. 2 says that at (π*, V*) Eq. 3 holds for every completion. So a policy π and a
value V are fitted to Eq. 3 on the data, by least squares:

    r(x, y) − V(x) = τ log π(y|x)/π_ref(y|x)                              (Eq. 3)
    L(π, V) = ½ E[ (r(x, y) − V(x) − τ log π(y|x)/π_ref(y|x))² ]          (Eq. 4)

Commands to paste:
    python drov.py --dice  # an example whose optimum is known, in a minute
    python drov.py --dataset_name mine.jsonl --num_eval_prompts 50  # your own ratings
    python drov.py --split_mode prompt_fold --eval_fold_index 0  # the paper's T5-L run

Where the paper is silent or contradicts itself, this file decides:
 1. The policy's gradient is Eq. 8 divided by τ, which Algorithm 1 misprints.
 2. The mean and standard deviation that normalise rewards are those of the training rows.
 3. V is a copy of π_ref (or of its encoder), with a linear output that starts at 0.
Left out are LoRA, sharding, dropout, and a copy of π_ref in memory.
"""

import argparse
import ast
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
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn
from tqdm import tqdm

# ================== Part I: the method ==================
# It calls five functions of part II: log, save_json, save_whole, save_checkpoint, completion_end.

# torchrun numbers the processes that it starts. One on its own is number 0 of 1.
WORLD_SIZE = int(os.environ.get("WORLD_SIZE") or 1)
RANK = int(os.environ.get("RANK") or 0) if WORLD_SIZE > 1 else 0
LOCAL_RANK = int(os.environ.get("LOCAL_RANK") or 0) if WORLD_SIZE > 1 else 0
DEVICE = torch.device("cuda", LOCAL_RANK) if torch.cuda.is_available() else torch.device("cpu")


class UserError(ValueError):
    """What the user can put right: `main` prints a line, and exits with 2."""


def require(condition, message):
    """Raises UserError with the message unless the condition holds."""
    if not condition:
        raise UserError(message)


def say(text):
    """Print a line, from the first process alone, above any progress bar."""
    if RANK == 0:
        tqdm.write(text)


def progress(items, work):
    """The items, with a progress bar on a terminal."""
    is_quiet = RANK > 0 or not sys.stderr.isatty()
    return tqdm(items, work, disable=is_quiet, leave=False)


def gather(item):
    """The items of all processes, by rank. All wait here for the slowest."""
    items = [item]
    if WORLD_SIZE > 1:
        items = [None] * WORLD_SIZE
        dist.all_gather_object(items, item)
    return items


# --- losses
# All tensors are (B,), with a number for each row.
def dro_v_loss(policy_logps, ref_logps, values, rewards, tau):
    """DRO-V's losses: (policy_loss, value_loss, residual). Eq. 4 is ½ mean(residual²).

    The mean of policy_loss has the gradient Eq. 8 / (τB) in policy_logps, none in values. The
    mean of value_loss has the gradient Eq. 7 / B in values, none in policy_logps.
    Raises ValueError if shapes differ: torch would silently make (B, B) of (B,) and (B, 1).
    """
    if not policy_logps.shape == ref_logps.shape == values.shape == rewards.shape:
        raise ValueError(f"the shapes differ: values are {tuple(values.shape)}")
    log_ratio = policy_logps - ref_logps  # log π(y|x)/π_ref(y|x)
    residual = rewards - values - tau * log_ratio  # δ, which is 0 where Eq. 3 holds
    # Eq. 7: ∇_φ = (V − r + τ log π/π_ref) ∇V = −δ ∇V, with π held fixed.
    value_loss = 0.5 * (rewards - values - tau * log_ratio.detach()).square()
    # Eq. 8: ∇_θ = −τ [(r − V) ∇log π − (τ/2) ∇(log π/π_ref)²] = −τ δ ∇log π, with V held fixed,
    # for ∇(log π/π_ref)² = 2 log π/π_ref ∇log π. The paper divides it by τ: a small τ shall not
    # shrink it. (Adafactor cancels that, unless gradients are clipped or the body is shared.)
    policy_loss = 0.5 * (rewards - values.detach() - tau * log_ratio).square() / tau
    return policy_loss, value_loss, residual


def dro_p_loss(policy_logps, ref_logps, rewards, mean_u, tau):
    """DRO-P (Eq. 15), which has no V: ½ (u − ū)²/τ with u = r − τ log π/π_ref.

    mean_u: ū, the mean of u over the whole batch, a number. Eq. 15 is ½ Var(u). Since u − ū sums
    to 0, its gradient is mean((u − ū) ∇u), as if ū were constant.
    """
    u = rewards - tau * (policy_logps - ref_logps)
    return 0.5 * (u - mean_u).square() / tau


def kto_loss(policy_logps, ref_logps, desirable, kl, beta):
    """KTO (arXiv 2402.01306), the paper's baseline.

    desirable: bool. kl: z₀ ≥ 0, an estimate of the KL divergence, a number.
    """
    log_ratio = policy_logps - ref_logps
    margin = torch.where(desirable, log_ratio - kl, kl - log_ratio)
    return 1 - torch.sigmoid(beta * margin)


# --- models
# A batch is a dict of tensors as in Hugging Face's libraries, padded on the right. `labels` are
# −100 where nothing is predicted.
#  - Encoder-decoder: `input_ids`, `attention_mask` (B, S) are prompts, `labels` (B, T) completions.
#  - Decoder-only: all three (B, T) are prompt and completion in a row; prompts' labels are −100.
# `rewards` and `ref_logps` are (B,).


# T5's activation, computed in one piece: the same function, but faster.
transformers.activations.NewGELUActivation.forward = lambda _, x: nn.functional.gelu(
    x, approximate="tanh"
)


def autocast(args):
    """A context for products in bfloat16, with --bf16."""
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=args.bf16)


@contextmanager
def float32_head(model, is_selected):
    """Within it, the model's output layer works in float32, and on selected states alone.

    It is the largest product, and in bfloat16 its errors would add up over a completion.
    is_selected: (B, T) bool, true at N places. The logits are (N, vocabulary).
    """
    head = model.get_output_embeddings()

    def forward(states):
        with torch.autocast(DEVICE.type, enabled=False):
            return nn.functional.linear(states[is_selected].float(), head.weight, head.bias)

    head.forward = forward  # It hides head's own method, until it is deleted.
    try:
        yield
    finally:
        del head.forward


def sequence_logps(model, batch):
    """log π(y|x) = Σ_t log π(y_t | x, y_<t), over a completion and its end: (B,) float32."""
    labels = batch["labels"]
    inputs = {"input_ids": batch["input_ids"], "use_cache": False}
    if model.config.is_encoder_decoder:
        inputs["attention_mask"] = batch["attention_mask"]
        # The decoder reads the labels behind a start token, and at place t has read y_<t.
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
        targets = labels
    else:
        # The state at place t predicts the token at t + 1; the prompt's last one predicts y_1.
        # A causal model never sees the padding behind a row, and needs no mask.
        targets = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    is_predicted = targets != -100
    with float32_head(model, is_predicted):
        logits = model(**inputs).logits  # (N, vocabulary)
    token_logps = -nn.functional.cross_entropy(logits, targets[is_predicted], reduction="none")
    logps = token_logps.new_zeros(targets.shape)
    logps[is_predicted] = token_logps
    return logps.sum(-1)


class ValueModel(nn.Module):
    """V_φ(x), in normalised rewards. The paper leaves its architecture open.

    The body is a copy of π_ref without its output layer, or of its encoder. With `shared` it is
    the policy's own, which the paper found worse. A linear output reads the encoder's mean state,
    or the state at the prompt's end. Without a policy, V is one learnt number for all prompts.

    The output is the difference of two equal layers. So V starts at 0, as log π/π_ref does, and
    moves, since their gradients are opposite. Zeros would start there, too, but Adafactor moves a
    parameter in proportion to its size.
    """

    def __init__(self, policy, shared=False):
        super().__init__()
        self.is_constant = policy is None
        layer = torch.ones(1)
        if not self.is_constant:
            self.is_encoder_decoder = policy.config.is_encoder_decoder
            body = policy.get_encoder() if self.is_encoder_decoder else policy.base_model
            self.body = body if shared else copy.deepcopy(body)
            width = body.get_input_embeddings().weight.shape[1]
            layer = torch.randn(width) * width**-0.5
        self.head = nn.Parameter(torch.stack([layer, layer]))  # (2, width)

    def forward(self, batch):
        """V(x) of each row's prompt: (B,) float32."""
        ids = batch["input_ids"]
        if self.is_constant:
            states = self.head.new_ones(len(ids), 1)
        elif self.is_encoder_decoder:
            mask = batch["attention_mask"]
            states = self.body(input_ids=ids, attention_mask=mask).last_hidden_state
            weights = mask / mask.sum(-1, keepdim=True)
            states = (states.float() * weights.unsqueeze(-1)).sum(1)
        else:
            is_completion = batch["labels"] != -100
            lengths = batch["attention_mask"].sum(-1) - is_completion.sum(-1)  # (B,) of prompts
            ids = ids[:, : lengths.max()]  # A causal state knows nothing of what is behind.
            states = self.body(input_ids=ids, use_cache=False).last_hidden_state
            states = states[torch.arange(len(ids), device=ids.device), lengths - 1].float()
        with torch.autocast(DEVICE.type, enabled=False):
            return states @ (self.head[0] - self.head[1])


# --- rows
def split_prompts(
    prompts, mode, *, seed, num_eval_prompts, num_eval_folds, eval_prompts_per_fold, eval_fold_index
):
    """Hold out prompts: (train, fold_of), a list, and a dict from held-out prompts to folds.

    A seeded hash orders the prompts, so the split depends on their set and the arguments alone.
    Mode "prompt_seeded" holds out the first num_eval_prompts, as fold 0. Mode "prompt_fold" cuts
    folds, and holds out fold eval_fold_index, or with "all" each of them. Raises UserError.
    """
    digest_of = {prompt: sha256(f"{seed}\n{prompt}".encode()).digest() for prompt in prompts}
    order = sorted(digest_of, key=digest_of.get)
    size = num_eval_prompts
    num_folds = 1
    folds = [0]
    if mode == "prompt_fold":
        size = eval_prompts_per_fold
        num_folds = num_eval_folds
        folds = range(num_folds)
        if eval_fold_index != "all":
            says = f"--eval_fold_index {eval_fold_index} must be below --num_eval_folds {num_folds}"
            require(eval_fold_index < num_folds, says)
            folds = [eval_fold_index]
    fold_of = {}
    for fold in folds:
        for prompt in order[fold * size : (fold + 1) * size]:
            fold_of[prompt] = fold
    train = [prompt for prompt in order if prompt not in fold_of]
    says = f"{len(order)} prompts are too few for {num_folds} fold(s) of {size} and training"
    flag = "--num_eval_prompts" if mode == "prompt_seeded" else "--eval_prompts_per_fold"
    require(num_folds * size <= len(order) and train, f"{says}: lower {flag}")
    return train, fold_of


@dataclass
class Rows:
    """N triplets as tokens. A row is known by its number, from 0 to N − 1."""

    prompts: list[str]
    x: list[np.ndarray]  # each prompt's tokens
    y: list[np.ndarray]  # each completion's tokens
    rewards: Tensor  # (N,) normalised
    is_encoder_decoder: bool
    ref_logps: Tensor  # (N,) log π_ref(y|x); NaN until it is scored

    def __post_init__(self):
        lengths = [[len(x), len(y)] for x, y in zip(self.x, self.y)]
        self.lengths = np.array(lengths)  # (N, 2)
        # What is padded: prompts and completions apart, or, decoder-only, in a row.
        self.widths = self.lengths
        if not self.is_encoder_decoder:
            self.widths = self.lengths.sum(axis=1, keepdims=True)  # (N, 1)

    def batch(self, rows):
        """Some rows as a batch on the device: see "models"."""
        inputs = []
        labels = []
        for row in rows:
            prompt = torch.from_numpy(self.x[row]).long()
            completion = torch.from_numpy(self.y[row]).long()
            if self.is_encoder_decoder:
                inputs.append(prompt)
                labels.append(completion)
            else:
                inputs.append(torch.cat([prompt, completion]))
                labels.append(torch.cat([torch.full_like(prompt, -100), completion]))
        inputs = nn.utils.rnn.pad_sequence(inputs, batch_first=True, padding_value=-100)
        batch = {
            "input_ids": inputs.clamp(min=0),
            "attention_mask": (inputs >= 0).long(),
            "labels": nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100),
            "rewards": self.rewards[rows],
            "ref_logps": self.ref_logps[rows],
        }
        return {name: tensor.to(DEVICE) for name, tensor in batch.items()}


def epoch_order(epoch, num_rows, seed):
    """The rows of an epoch, counted from 0, in their order: (num_rows,)."""
    return np.random.default_rng([seed, epoch]).permutation(num_rows)


def step_rows(step, num_rows, batch_size, seed):
    """The rows of a step, counted from 1: (batch_size,), the next ones in the epochs' chain."""
    start = (step - 1) * batch_size
    epochs = range(start // num_rows, (start + batch_size - 1) // num_rows + 1)
    chain = np.concatenate([epoch_order(epoch, num_rows, seed) for epoch in epochs])
    first = start % num_rows
    return chain[first : first + batch_size]


def micro_batches(rows, widths, max_tokens):
    """This process's share of the rows, in pieces of like length: a list of lists of rows.

    A piece goes through the networks at once. Padded, it has at most max_tokens tokens, and at
    most max_tokens / 10 of them are padding; but a single row may have more.
    widths: (N, 1) or (N, 2), the lengths of what is padded, of all rows.
    """

    def size(row):
        return widths[row][-1], widths[row][0]  # A completion costs more than a prompt.

    longest_first = sorted(rows, key=size, reverse=True)
    pieces = []
    piece = []
    widest = 0
    tokens = 0
    for row in longest_first[RANK::WORLD_SIZE]:  # Each process has long and short ones.
        new_widest = np.maximum(widest, widths[row])
        new_tokens = tokens + widths[row].sum()
        padded = (len(piece) + 1) * new_widest.sum()
        fits = padded <= max_tokens and padded - new_tokens <= max_tokens / 10
        if not fits or not pieces:
            piece = []
            pieces.append(piece)
            new_widest = widths[row]
            new_tokens = widths[row].sum()
        piece.append(row)
        widest = new_widest
        tokens = new_tokens
    return pieces


# --- the loop
@dataclass
class Run:
    """A run in memory."""

    args: argparse.Namespace  # the flags
    tokenizer: object
    policy: nn.Module  # π, which is π_ref at step 0
    data: dict[str, Rows]  # "train", "eval", for KTO "mismatched" pairs, for dice "rolls"
    fold_of: dict[str, int]  # each held-out prompt's fold
    manifest: dict  # what the data are
    step: int = 0  # the last step that was done
    value_model: ValueModel | None = None  # V, if the loss has one
    optimizer: torch.optim.Optimizer | None = None

    def policy_logps(self, batch):
        """log π(y|x): (B,)."""
        return sequence_logps(self.policy, batch)


@torch.no_grad()
def score(network, data, rows, args):
    """network(batch) of some rows, without gradients: (len(rows),), in all processes.

    network: a function from a batch to (B,), such as run.policy_logps or run.value_model.
    """
    scores = torch.zeros(len(rows))
    places = np.arange(len(rows))
    pieces = micro_batches(places, data.widths[rows], args.micro_batch_tokens)
    for piece in progress(pieces, "Scoring"):
        with autocast(args):
            scores[piece] = network(data.batch(rows[piece])).cpu()
    return sum(gather(scores))  # A score is 0 in all processes but one.


def score_log_ratios(run, data, rows):
    """log π(y|x)/π_ref(y|x) of some rows, like `score`."""
    return score(run.policy_logps, data, rows, run.args) - data.ref_logps[rows]


def score_reference(run):
    """Put log π_ref(y|x) into the rows. It is computed once, and kept on disk."""
    args = run.args
    file = Path(args.output_dir, "reference_logps.safetensors")
    if not file.exists():
        require(run.step == 0, f"{file} is gone, and the policy not π_ref: start a new run")
        scored = {}
        num_visits = args.max_steps * args.train_batch_size
        for name, data in run.data.items():
            rows = np.arange(len(data.x))
            if name in ("train", "mismatched"):  # only rows that some step will visit
                rows = epoch_order(0, len(data.x), args.seed)[:num_visits]
            started = time.perf_counter()
            scored[name] = torch.full([len(data.x)], math.nan)
            scored[name][rows] = score(run.policy_logps, data, rows, args)
            seconds = time.perf_counter() - started
            scored[f"{name}_seconds"] = torch.tensor(seconds)
        save_whole(file, lambda temporary: save_file(scored, temporary))
    scored = load_file(file)
    for name, data in run.data.items():
        data.ref_logps = scored[name]
    if run.step == 0:
        log(run, {"reference_seconds": scored["train_seconds"]})


def make_networks(run):
    """Make the value model, if the loss has one, and the optimiser."""
    args = run.args
    torch.manual_seed(args.seed)  # for V's output layer
    groups = [{"params": list(run.policy.parameters())}]
    # --value is "prompt" for V(x), "constant" for one number, and "batch" for DRO-P.
    if args.loss == "dro_v" and args.value != "batch":
        policy = run.policy if args.value == "prompt" else None
        run.value_model = ValueModel(policy, args.share_policy_and_value_backbone).to(DEVICE)
        own = list(run.value_model.parameters())
        if args.share_policy_and_value_backbone:
            own = [run.value_model.head]  # The body learns as the policy.
        groups.append({"params": own})
    # The decay, 0.8, is the paper's. The first epsilon is so small that a gradient's size does not
    # matter; the second is torch's.
    run.optimizer = torch.optim.Adafactor(groups, beta2_decay=-0.8, eps=(1e-15, 1e-3))


def rate_factor(args, step):
    """What the learning rates are multiplied by in a step, which counts from 1."""
    warm = step / max(1, args.warmup_steps)
    if args.lr_scheduler_type == "constant_with_warmup":
        return min(1.0, warm)
    end = args.max_steps + 1
    return min(1.0, warm, (end - step) / max(1, end - args.warmup_steps))


def update(run, step):
    """Take a step of the optimiser. Returns each network's gradient norm, before clipping."""
    args = run.args
    rates = (args.learning_rate, args.value_learning_rate)  # the second if there is a V
    norms = []
    for group, rate in zip(run.optimizer.param_groups, rates):
        for parameter in group["params"]:
            if WORLD_SIZE > 1 and parameter.grad is not None:
                dist.all_reduce(parameter.grad)  # the sum over processes
        max_norm = args.max_grad_norm or math.inf
        norms.append(nn.utils.clip_grad_norm_(group["params"], max_norm))
        group["lr"] = rate * rate_factor(args, step)
    run.optimizer.step()
    run.optimizer.zero_grad()
    return norms


def train(run):
    """Algorithm 1, from the step after run.step on. Raises UserError for NaN."""
    args = run.args
    data = run.data["train"]
    window = defaultdict(list)  # lists of tensors since the last log line
    for step in progress(range(run.step + 1, args.max_steps + 1), "Training steps"):
        started = time.perf_counter()
        rows = step_rows(step, len(data.x), args.train_batch_size, args.seed)
        # KTO and DRO-P need means over the whole batch, without gradients.
        if args.loss == "kto":
            mean_reward = data.rewards[rows].mean().item()
            mismatched = score_log_ratios(run, run.data["mismatched"], rows)
            kl = max(0.0, mismatched.mean().item())  # z₀
        elif args.value == "batch":
            u = data.rewards[rows] - args.tau * score_log_ratios(run, data, rows)
            mean_u = u.mean().item()
        for piece in micro_batches(rows, data.widths, args.micro_batch_tokens):
            batch = data.batch(piece)
            rewards = batch["rewards"]
            ref_logps = batch["ref_logps"]
            with autocast(args):
                logps = sequence_logps(run.policy, batch)
                if args.loss == "kto":
                    desirable = rewards > mean_reward + 1e-6  # by more than rounding
                    losses = kto_loss(logps, ref_logps, desirable, kl, args.tau)
                    window["loss"].append(losses.detach())
                elif args.value == "batch":
                    losses = dro_p_loss(logps, ref_logps, rewards, mean_u, args.tau)
                else:
                    values = run.value_model(batch)
                    window["values"].append(values.detach())
                    policy_loss, value_loss, _ = dro_v_loss(
                        logps, ref_logps, values, rewards, args.tau
                    )
                    losses = policy_loss + value_loss
            # Gradients of pieces and processes add up to that of the whole batch's mean.
            (losses.sum() / len(rows)).backward()
            window["log_ratios"].append(logps.detach() - ref_logps)
            window["rewards"].append(rewards)
            window["tokens"].append(torch.from_numpy(data.lengths[piece].sum(axis=1)))
        norms = update(run, step)
        window["grad_norm"].append(norms[0].reshape(1))
        if run.value_model:
            window["value_grad_norm"].append(norms[1].reshape(1))
        window["step_seconds"].append(torch.tensor([time.perf_counter() - started]))
        run.step = step
        saves = step % args.save_steps == 0 or step == args.max_steps
        if saves or step % args.logging_steps == 0:
            log_training(run, window)
            window.clear()
        if saves:
            evaluate(run)
            save_checkpoint(run)


def row_metrics(log_ratios, rewards, values, tau):
    """What is logged of rows in training and in evaluation. log_ratios, rewards: (N,).

    values: (N,), or for a loss without V the number that is best in Eq. 4.
    """
    target = rewards - tau * log_ratios  # what V is fitted to, by Eq. 7
    residual = target - values
    metrics = {
        "loss": 0.5 * residual.square().mean(),  # Eq. 4
        "residual_mean": residual.mean(),
        "residual_std": residual.std(correction=0),
        # If it keeps falling, mass leaks to texts outside the data, which Eq. 4 does not see.
        "log_ratio_mean": log_ratios.mean(),
    }
    if target.std(correction=0) > 0:
        unexplained = residual.var(correction=0) / target.var(correction=0)
        metrics["value_explained_variance"] = 1 - unexplained
    return metrics


def log_training(run, window):
    """Log the numbers of a window, from all processes."""
    own = {name: torch.cat(tensors).cpu() for name, tensors in window.items()}
    parts = gather(own)
    pooled = {name: torch.cat([part[name] for part in parts]) for name in own}
    log_ratios = pooled["log_ratios"]
    rewards = pooled["rewards"]
    values = (rewards - run.args.tau * log_ratios).mean()
    if run.value_model:
        values = pooled["values"]
    metrics = row_metrics(log_ratios, rewards, values, run.args.tau)
    if run.args.loss == "kto":
        metrics["loss"] = pooled["loss"].mean()
    for name in ("grad_norm", "value_grad_norm", "step_seconds"):
        if name in pooled:
            metrics[name] = pooled[name].mean()
    seconds = pooled["step_seconds"].sum() / WORLD_SIZE
    metrics["tokens_per_second"] = pooled["tokens"].sum() / seconds
    metrics["lr"] = run.optimizer.param_groups[0]["lr"]
    log(run, metrics)


def evaluate(run):
    """Log the held-out rows' numbers, whose names begin with eval_."""
    args = run.args
    data = run.data["eval"]
    rows = np.arange(len(data.x))
    log_ratios = score_log_ratios(run, data, rows)
    values = (data.rewards - args.tau * log_ratios).mean()
    if run.value_model:
        values = score(run.value_model, data, rows, args)
    metrics = row_metrics(log_ratios, data.rewards, values, args.tau)
    # By Eq. 3 these are proportional. At step 0 the first does not vary.
    sides = torch.stack([log_ratios, data.rewards - values])
    if (sides.std(dim=1, correction=0) > 1e-3).all():
        metrics["reward_correlation"] = sides.corrcoef()[0, 1]
    log(run, {f"eval_{name}": number for name, number in metrics.items()})


def sample_answers(run, prompts, end_tokens):
    """Sample an answer to each prompt: lists of token ids, padded behind their ends."""
    args = run.args
    policy = run.policy
    config = transformers.GenerationConfig(do_sample=args.temperature > 0, top_k=0)
    config.temperature = args.temperature or 1.0
    config.max_new_tokens = args.max_new_tokens
    config.eos_token_id = end_tokens
    config.pad_token_id = end_tokens[0]
    side = "left"  # so that a prompt's end meets its answer
    if policy.config.is_encoder_decoder:
        side = "right"
        label = torch.zeros(1, 1, dtype=torch.long)
        start = policy.prepare_decoder_input_ids_from_labels(label)  # the start token alone
        config.decoder_start_token_id = start.item()
    ids = [torch.from_numpy(prompt).long() for prompt in prompts]
    ids = nn.utils.rnn.pad_sequence(ids, True, -100, padding_side=side).to(DEVICE)
    # transformers fills in what a config lacks from the model's own.
    own_config = policy.generation_config
    policy.generation_config = config
    with torch.no_grad(), autocast(args):
        tokens = policy.generate(ids.clamp(min=0), attention_mask=(ids >= 0).long())
    policy.generation_config = own_config
    num_given = 1 if policy.config.is_encoder_decoder else ids.shape[1]
    return tokens[:, num_given:].tolist()


def generate(run):
    """Write an answer to every held-out prompt. Returns the share that ended by themselves."""
    args = run.args
    data = run.data["eval"]
    prompts = list(run.fold_of)
    ids_of = dict(zip(data.prompts, data.x))
    end = completion_end(run.tokenizer, data.is_encoder_decoder)
    end_tokens = sorted({end, run.tokenizer.eos_token_id} - {None})
    torch.manual_seed(args.seed + RANK)
    widths = np.array([[len(ids_of[prompt]) + args.max_new_tokens] for prompt in prompts])
    # Without gradients, and with one token's logits at a time, eight times as much fits.
    pieces = micro_batches(np.arange(len(prompts)), widths, 8 * args.micro_batch_tokens)
    answers = {}
    for piece in progress(pieces, "Answering"):
        sampled = sample_answers(run, [ids_of[prompts[i]] for i in piece], end_tokens)
        answers.update(zip(piece, sampled))
    for others in gather(answers):
        answers.update(others)
    lines = []
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    for i, prompt in enumerate(prompts):
        ends = [place for place, token in enumerate(answers[i]) if token in end_tokens]
        tokens = answers[i][: ends[0]] if ends else answers[i]
        line = {"prompt": prompt, "fold": run.fold_of[prompt]}
        line["completion"] = run.tokenizer.decode(tokens, **options)
        line["finished"] = len(ends) > 0
        lines.append(line)
    save_json(Path(args.output_dir, f"generations-{run.step}.jsonl"), *lines)
    return sum(line["finished"] for line in lines) / len(lines)


# ========== Part II: what surrounds the method ==========
@contextmanager
def loading(source):
    """What a library raises within becomes a UserError that names the source."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        says = f"cannot use {source}: {type(error).__name__}: {error}"[:500]
        raise UserError(says) from error


# --- reading: files to rows (dicts)
def read_lines(path):
    """Yield the lines of a UTF-8 file, without its BOM. Only a line feed ends a line."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield line.decode("utf-8-sig")
            except UnicodeDecodeError:
                raise UserError(f"{path}, line {number} is not UTF-8: save it as UTF-8")


def as_chat(text, parse=json.loads):
    """The list of chat messages that a text spells; None if it spells anything else."""
    try:
        found = parse(text.strip()) if text.lstrip().startswith("[") else None
    except (ValueError, SyntaxError, TypeError, RecursionError):
        return None
    is_chat = found and all(isinstance(each, dict) and "role" in each for each in found)
    return found if is_chat else None


def read_csv(path):
    """Yield the rows of a CSV file. A conversation may stand there in JSON or in Python."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(read_lines(path), strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise csv.Error("not as many fields as in the header")
            for name, text in row.items():
                python = text.replace("}\n {", "}, {")  # for numpy's repr
                row[name] = as_chat(text) or as_chat(python, ast.literal_eval) or text
            yield row
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.reader.line_num}: {error}")


def read_json(path):
    """Yield the objects of JSON Lines, or of a file that is one JSON array."""
    is_array = next(read_lines(path), "").lstrip().startswith("[")
    texts = ["".join(read_lines(path))] if is_array else read_lines(path)
    for number, text in enumerate(texts, start=1):
        place = path if is_array else f"{path}, line {number}"
        if text.strip():
            try:
                found = json.loads(text)
            except ValueError as error:
                raise UserError(f"{place}: {error}")
            rows = found if is_array else [found]
            for row in rows:
                require(isinstance(row, dict), f"{place}: {row!r:.50} is not a JSON object")
                yield row


def read_rows(args):
    """Yield the rows of dice, of a file, or of what `datasets` finds."""
    name = args.dataset_name
    with loading(name):
        if name == "dice":
            yield from dice_rolls(args.seed)
        elif name.endswith(".csv"):
            yield from read_csv(name)
        elif os.path.isfile(name) or name.endswith((".json", ".jsonl")):
            yield from read_json(name)
        else:
            options = {"split": args.dataset_split, "revision": args.dataset_revision}
            yield from datasets.load_dataset(name, **options)


# --- reading: rows to triplets
def read_text(text):
    """The text. An error in this and the next four functions drops an answer."""
    text.encode()  # Half an emoji raises an error, too.
    require(text.strip(), "empty")
    return text


def read_message(message):
    """A chat message with its content, which may be a list of text parts, as one text."""
    content = message["content"]
    if isinstance(content, list):
        require(all(part["type"] == "text" for part in content), "not text alone")
        content = "".join(part["text"] for part in content)
    require(isinstance(content, str), "no text")
    return {**message, "content": content}


def read_prompt(prompt):
    """A text, or a conversation as its JSON text; but a single user's turn as its text."""
    if isinstance(prompt, str):
        prompt = as_chat(prompt) or [{"role": "user", "content": prompt}]
    turns = [read_message(turn) for turn in prompt]
    last = turns[-1]["content"]
    require(turns[-1]["role"] == "user" and last.strip(), "nothing to answer")
    if len(turns) == 1:
        return read_text(last.strip())
    return read_text(json.dumps(turns, ensure_ascii=False))


def read_completion(completion):
    """A text as it stands, or that of a list of one assistant's message."""
    if isinstance(completion, list):
        [message] = completion
        require(message["role"] == "assistant", "not an answer")
        completion = read_message(message)["content"]
    return read_text(completion)


def read_reward(reward):
    """A finite number, from a number, a text, or a truth value."""
    text = str(reward).strip().lower()
    number = float(text == "true") if text in ("true", "false") else float(text)
    require(math.isfinite(number), "not finite")
    return number


def column(row, flag, *usual):
    """What a row has in the column that a flag names, else in the first usual one."""
    names = [flag] if flag else usual
    for name in names:
        if name in row:
            value = row[name]
            return [value] if isinstance(value, dict) else value  # a message alone
    return None


def rated_answers(row, args):
    """Yield (prompt, completion, reward) of each answer in a row."""
    prompt = column(row, args.prompt_key, "prompt", "instruction")
    completion_keys = (args.completion_key, "completion", "response")
    # UltraFeedback's rows list answers. Any other row is its own answer.
    answers = [row]
    usual_reward = "reward"
    if isinstance(row.get("completions"), list) and column(row, *completion_keys) is None:
        answers = row["completions"] or [None]
        usual_reward = "overall_score"
    for answer in answers:
        answer = answer if isinstance(answer, dict) else {}
        completion = column(answer, *completion_keys)
        if completion is None:
            completion = row.get("messages")
        yield prompt, completion, column(answer, args.reward_key, usual_reward)


def load_triplets(args, dropped=None):
    """Read the data: a list of (prompt, completion, raw reward).

    dropped: a Counter of what cannot be used, by cause: prompt, completion, or reward.
    """
    dropped = Counter() if dropped is None else dropped
    triplets = []
    columns = []
    for row in progress(read_rows(args), "Reading rows"):
        columns = columns or list(row)
        for prompt, completion, reward in rated_answers(row, args):
            try:
                cause = "completion"
                if isinstance(completion, list) and completion[0]["role"] != "assistant":
                    prompt = completion[:-1]  # A whole conversation ends with the completion.
                    completion = completion[-1:]
                completion = read_completion(completion)
                cause = "prompt"
                prompt = read_prompt(prompt)
                cause = "reward"
                triplets.append((prompt, completion, read_reward(reward)))
            except (AttributeError, LookupError, TypeError, ValueError):
                dropped[cause] += 1
    says = f"{len(triplets)} triplets from {args.dataset_name}, dropped: {dict(dropped)}"
    flags = "--prompt_key, --completion_key and --reward_key"
    require(triplets, f"{says}. The columns are {columns}: name yours by {flags}")
    say(says)
    return triplets


# --- encoding: texts to tokens
def render_chats(tokenizer, chats, date, **options):
    """Token ids of chats as the chat template renders them: a list of lists.

    date: such as 2024-11-05, in the place of today's where a template calls strftime_now.
    """
    day = time.strptime(date, "%Y-%m-%d") if date else time.localtime()
    call = r"strftime_now\(\s*['\"](.*?)['\"]\s*\)"
    template = re.sub(
        call, lambda found: repr(time.strftime(found[1], day)), tokenizer.get_chat_template()
    )
    options.update(chat_template=template, enable_thinking=False, return_dict=False)
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    controls = [text for text in added if not text.isspace()]
    with loading("the chat template"):
        rows = tokenizer.apply_chat_template(chats, **options)
        for i, chat in enumerate(chats):
            # A text may spell a control token: sanitised, which is slow, it stays text.
            texts = "".join(turn["content"] for turn in chat)
            if any(control in texts for control in controls):
                options["sanitize_control_tokens"] = True
                rows[i] = tokenizer.apply_chat_template(chat, **options)
    return rows


def special_ids(tokenizer):
    """The special tokens. (T5's tokenizer makes them even of a text that spells them.)"""
    return set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}


def cut_prompt(tokenizer, ids, max_length):
    """The last max_length ids of a prompt; if it began with BOS, it still does."""
    if len(ids) <= max_length:
        return ids
    bos = ids[:1] if ids[0] == tokenizer.bos_token_id else []
    return bos + ids[len(ids) - max_length + len(bos) :]


def encode_prompts(tokenizer, prompts, is_encoder_decoder, max_length, date=None):
    """Token ids of prompts, at most max_length each: a list of lists.

    A decoder-only model's chat template is applied, if it has one.
    """
    chats = [as_chat(prompt) for prompt in prompts]
    if tokenizer.chat_template and not is_encoder_decoder:
        for i, prompt in enumerate(prompts):
            chats[i] = chats[i] or [{"role": "user", "content": prompt}]
        rows = render_chats(tokenizer, chats, date, add_generation_prompt=True)
    else:
        says = "conversations need a decoder-only model with a chat template"
        require(not any(chats), says)
        special = special_ids(tokenizer)
        rows = []
        for ids in tokenizer(list(prompts), split_special_tokens=True).input_ids:
            ends = (0, len(ids) - 1)  # where the tokenizer's own stand
            ids = [id for i, id in enumerate(ids) if i in ends or id not in special]
            if ids[-1] == tokenizer.eos_token_id and not is_encoder_decoder:
                ids = ids[:-1]  # An end behind a text is for encoders alone.
            rows.append(ids)
    return [cut_prompt(tokenizer, ids, max_length) for ids in rows]


def completion_end(tokenizer, is_encoder_decoder):
    """The token that ends a completion: the first added one that a chat template writes behind
    an answer, or else eos_token. Raises UserError if there is none.
    """
    end = tokenizer.eos_token_id
    if tokenizer.chat_template and not is_encoder_decoder:
        chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "Placeholder"}]
        with loading("the chat template"):
            text = tokenizer.apply_chat_template(chat, tokenize=False, enable_thinking=False)
        behind = text.rpartition("Placeholder")[2]
        ids = tokenizer(behind, add_special_tokens=False).input_ids
        added = [token for token in ids if token in tokenizer.added_tokens_decoder]
        end = added[0] if added else end
    require(end is not None, "the tokenizer has no end token: set its eos_token")
    return end


def encode_completions(tokenizer, completions, is_encoder_decoder, max_length):
    """Token ids of completions with their ends, at most max_length each: a list of lists.

    With a chat template, they are what it renders behind a prompt. A longer completion keeps
    its beginning, and no end.
    """
    end = completion_end(tokenizer, is_encoder_decoder)
    special = special_ids(tokenizer)
    options = {"add_special_tokens": False, "split_special_tokens": True}
    rows = []
    for ids in tokenizer(list(completions), **options).input_ids:
        rows.append([token for token in ids if token not in special])
    if tokenizer.chat_template and not is_encoder_decoder:
        user = {"role": "user", "content": "?"}
        [prompt] = render_chats(tokenizer, [[user]], None, add_generation_prompt=True)
        chats = [[user, {"role": "assistant", "content": text}] for text in completions]
        for i, ids in enumerate(render_chats(tokenizer, chats, None)):
            # Some templates write <think> into the prompt alone: then the text's own ids stay.
            if ids[: len(prompt)] == prompt:
                rows[i] = ids[len(prompt) :]
                if end in rows[i]:
                    rows[i] = rows[i][: rows[i].index(end)]
    return [[*ids, end][:max_length] for ids in rows]


# --- the data of a run
def load_policy(source, revision=None, seed=0):
    """(model, tokenizer) in float32, without dropout. "dice" is a tiny T5."""
    if source == "dice":
        torch.manual_seed(seed)
        sizes = {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_heads": 4, "num_layers": 2}
        config = transformers.T5Config(vocab_size=384, decoder_start_token_id=0, **sizes)
        policy = transformers.T5ForConditionalGeneration(config)
        return policy.eval().to(DEVICE), transformers.ByT5Tokenizer()
    with loading(source):
        config = transformers.AutoConfig.from_pretrained(source, revision=revision)
        kind = transformers.AutoModelForCausalLM
        if config.is_encoder_decoder:
            kind = transformers.AutoModelForSeq2SeqLM
        options = {"dtype": torch.float32, "output_loading_info": True}
        policy, info = kind.from_pretrained(source, revision=revision, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, revision=revision)
        ids = tokenizer("abc", add_special_tokens=False).input_ids
        knows_words = tokenizer.decode(ids, skip_special_tokens=True).strip()
    require(not info["missing_keys"], f"{source} lacks weights: {info['missing_keys']}")
    require(knows_words, f"{source} has no usable tokenizer: add its files")
    if hasattr(tokenizer, "legacy"):  # Llama's tokens depend on it, and it would not be saved.
        tokenizer.init_kwargs["legacy"] = tokenizer.legacy
    return policy.eval().to(DEVICE), tokenizer


def make_rows(args, tokenizer, is_encoder_decoder, triplets, mean, std):
    """Triplets as Rows, the shares of prompts and completions that were cut, and a hash."""
    x = []
    y = []
    num_cut = np.zeros(2)
    end = completion_end(tokenizer, is_encoder_decoder)
    # A thousand at a time, for lists take nine times the memory of arrays.
    for start in progress(range(0, len(triplets), 1000), "Tokenising"):
        prompts, completions, _ = zip(*triplets[start : start + 1000])
        unique = list(dict.fromkeys(prompts))
        whole = encode_prompts(tokenizer, unique, is_encoder_decoder, sys.maxsize, args.date)
        whole_of = dict(zip(unique, whole))
        for prompt in prompts:
            ids = cut_prompt(tokenizer, whole_of[prompt], args.max_prompt_length)
            x.append(np.array(ids, dtype=np.int32))
            num_cut[0] += len(ids) < len(whole_of[prompt])
        limit = args.max_completion_length
        for ids in encode_completions(tokenizer, completions, is_encoder_decoder, limit):
            y.append(np.array(ids, dtype=np.int32))
            num_cut[1] += ids[-1] != end
    prompts, _, rewards = zip(*triplets)
    raw = torch.tensor(rewards, dtype=torch.float64)
    rewards = ((raw - mean) / std).float()
    ref_logps = torch.full_like(rewards, math.nan)
    rows = Rows(list(prompts), x, y, rewards, is_encoder_decoder, ref_logps)
    digest = sha256(rows.lengths.tobytes())
    for array in [*x, *y, raw.numpy()]:
        digest.update(array.tobytes())
    return rows, num_cut / len(x), digest.hexdigest()


# fmt: off
DATA_FLAGS = (
    "dataset_name", "dataset_revision", "dataset_split", "prompt_key", "completion_key",
    "reward_key", "split_mode",
)
SPLIT_FLAGS = (
    "seed", "num_eval_prompts", "num_eval_folds", "eval_prompts_per_fold", "eval_fold_index",
)
# fmt: on


def load_data(args, tokenizer, is_encoder_decoder):
    """Triplets, split, tokenised, normalised: (Rows by name, fold_of, manifest)."""
    dropped = Counter()
    triplets = load_triplets(args, dropped)
    settings = {name: getattr(args, name) for name in SPLIT_FLAGS}
    prompts = {prompt for prompt, _, _ in triplets}
    _, fold_of = split_prompts(prompts, args.split_mode, **settings)
    train = [triplet for triplet in triplets if triplet[0] not in fold_of]
    held_out = [triplet for triplet in triplets if triplet[0] in fold_of]
    # The paper's "mean 0 and variance 1". No held-out reward leaks into it.
    raw = np.array([reward for _, _, reward in train])
    mean = float(raw.mean())
    std = float(raw.std())
    differ = std > 1e-12 * np.abs(raw).max()
    says = f"all training rewards are {mean:.6g}: take another --reward_key or --seed"
    require(differ, says)
    if args.overfit_one_batch:
        first_rows = epoch_order(0, len(train), args.seed)[: args.train_batch_size]
        train = [train[row] for row in first_rows]
    terms = (args, tokenizer, is_encoder_decoder)
    data = {}
    data["train"], cut, train_sha256 = make_rows(*terms, train, mean, std)
    data["eval"], _, eval_sha256 = make_rows(*terms, held_out, mean, std)
    if args.dataset_name == "dice":
        data["rolls"], _, _ = make_rows(*terms, every_roll(fold_of), mean, std)
    if args.loss == "kto":  # Each prompt gets another row's completion (a few, their own).
        partners = np.random.default_rng(args.seed).permutation(len(train))
        completions = [data["train"].y[row] for row in partners]
        data["mismatched"] = replace(data["train"], y=completions)
    manifest = {name: getattr(args, name) for name in (*DATA_FLAGS, *SPLIT_FLAGS)}
    manifest.update(train_rows=len(train), train_prompts=len({prompt for prompt, _, _ in train}))
    manifest.update(eval_rows=len(held_out), eval_prompts=len(fold_of))
    manifest.update(reward_mean=mean, reward_min=float(raw.min()))
    manifest.update(reward_std=std, reward_max=float(raw.max()))
    manifest.update(cut_prompts=cut[0], cut_completions=cut[1], dropped=dict(dropped))
    manifest.update(train_sha256=train_sha256, eval_sha256=eval_sha256)
    say(json.dumps(manifest, indent=1, ensure_ascii=False))
    manifest["held_out"] = defaultdict(list)
    for prompt, fold in fold_of.items():
        manifest["held_out"][str(fold)].append(sha256(prompt.encode()).hexdigest()[:16])
    return data, fold_of, manifest


# --- a run on disk
# A file is whole or not there, so a kill loses only what came after a checkpoint. metrics.jsonl
# grows, but --resume takes the checkpoint's. The policy counts when results.json is there.
def save_whole(path, write):
    """write(temporary) makes a file or folder, which is renamed to `path` when it is whole."""
    if RANK == 0:
        temporary = path.with_name(f".{path.name}.tmp")
        write(temporary)
        os.replace(temporary, path)
    gather("it is written")


def save_json(path, *objects, indent=None):
    """Write objects as JSON, one behind the other."""
    texts = [json.dumps(each, indent=indent, ensure_ascii=False) + "\n" for each in objects]
    save_whole(path, lambda temporary: temporary.write_bytes("".join(texts).encode()))


def log(run, metrics):
    """Add a line to metrics.jsonl, and say it. Raises UserError for NaN."""
    line = {"step": run.step} | {name: float(number) for name, number in metrics.items()}
    says = ", ".join(f"{name} {number:.4g}" for name, number in line.items())
    is_finite = all(math.isfinite(number) for number in line.values())
    require(is_finite, f"not every number is finite ({says}): lower the learning rates")
    if RANK == 0:
        with open(Path(run.args.output_dir, "metrics.jsonl"), "a") as file:
            file.write(json.dumps(line) + "\n")
    say(says)


def save_networks(run, folder):
    """Write policy and tokenizer, for `from_pretrained`, and V."""
    run.policy.save_pretrained(folder)
    run.tokenizer.save_pretrained(folder)
    if run.value_model:
        save_model(run.value_model, str(folder / "value_model.safetensors"))


def checkpoints(folder):
    """(step, path) of each checkpoint in a run's folder, the newest last."""
    found = []
    for path in Path(folder).glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        if step.isdigit():
            found.append((int(step), path))
    return sorted(found)


def save_checkpoint(run):
    """Write what --resume needs. (`evaluate`, before it, has found no NaN.)"""
    folder = Path(run.args.output_dir)

    def write(temporary):
        save_networks(run, temporary)
        torch.save(run.optimizer.state_dict(), temporary / "optimizer.pt")
        shutil.copy(folder / "metrics.jsonl", temporary)

    save_whole(folder / f"checkpoint-{run.step}", write)
    if RANK == 0 and run.args.save_total_limit:
        for _, path in checkpoints(folder)[: -run.args.save_total_limit]:
            # Renamed first: half of one must not look like a checkpoint.
            shutil.rmtree(path.rename(path.with_name(f".{path.name}.tmp")))


def load_checkpoint(run, path):
    """Take a checkpoint's V, optimiser and log. `begin` has loaded its policy."""
    with loading(path):
        if run.value_model:
            load_model(run.value_model, path / "value_model.safetensors")
        state = torch.load(path / "optimizer.pt", map_location="cpu")
        run.optimizer.load_state_dict(state)
    if RANK == 0:
        shutil.copy(path / "metrics.jsonl", run.args.output_dir)


# --- dice: an example whose optimum is known
# "Ada rolls 3d6" asks for three six-sided dice. "416" is an answer, and 11, its sum, its reward.
# The policy should learn to load the dice, by as much as Eq. 2 says.
def dice_rolls(seed):
    """Yield 64 fair rolls for each of 240 prompts, of 1 to 4 dice with 4, 6 or 8 sides."""
    names = """Ada Alan Blaise Carl Edsger Emmy Grace Hedy Henri John Kurt Leslie Maryam
    Niels Pierre Rózsa Sofia Sophie Srinivasa Thomas"""
    rng = np.random.default_rng(seed)
    for name, dice, sides in itertools.product(names.split(), (1, 2, 3, 4), (4, 6, 8)):
        for roll in rng.integers(1, sides + 1, size=(64, dice)):
            completion = "".join(str(face) for face in roll)
            prompt = f"{name} rolls {dice}d{sides}"
            yield {"prompt": prompt, "completion": completion, "reward": int(roll.sum())}


def every_roll(prompts):
    """The triplets of all valid rolls of those prompts that have at most three dice."""
    triplets = []
    for prompt in prompts:
        dice, sides = map(int, prompt.split()[-1].split("d"))
        if dice <= 3:
            for roll in itertools.product(range(1, sides + 1), repeat=dice):
                triplets.append((prompt, "".join(str(face) for face in roll), sum(roll)))
    return triplets


def dice_reference(run):
    """Make π_ref, and keep it in RUN/sft: train the policy by maximum likelihood on fair rolls.

    The rolls answer all prompts, for π_ref is given, and not learnt from the split.
    """
    folder = Path(run.args.output_dir, "sft")
    if not folder.exists():
        rolls = [tuple(row.values()) for row in dice_rolls(run.args.seed)]
        data, _, _ = make_rows(run.args, run.tokenizer, True, rolls, 0.0, 1.0)
        parameters = list(run.policy.parameters())
        optimizer = torch.optim.Adafactor(parameters, beta2_decay=-0.8, eps=(1e-15, 1e-3))
        for step in progress(range(1, 601), "π_ref learns to roll fair dice"):
            rows = step_rows(step, len(data.x), 64, run.args.seed)
            num_tokens = data.lengths[rows, 1].sum()
            (-sequence_logps(run.policy, data.batch(rows)).sum() / num_tokens).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.param_groups[0]["lr"] = 0.05 * (601 - step) / 601
            optimizer.step()
            optimizer.zero_grad()
        save_whole(folder, lambda temporary: save_networks(run, temporary))
    run.policy, _ = load_policy(folder)


def dice_report(run):
    """Compare π_θ with π_ref and the optimum π*, over every valid roll: results.json's part."""
    tau = run.args.tau
    data = run.data["rolls"]
    logps = score(run.policy_logps, data, np.arange(len(data.x)), run.args)
    rows_of = defaultdict(list)
    for row, prompt in enumerate(data.prompts):
        rows_of[prompt].append(row)
    outcomes = []  # for each prompt (3, 3): reward, KL and valid mass of π_ref, π_θ and π*
    v_star = []
    for rows in rows_of.values():
        rewards = data.rewards[rows].double()
        ref = data.ref_logps[rows].double()
        tilted = ref + rewards / tau
        v_star.append(tau * tilted.logsumexp(0))
        optimum = tilted.log_softmax(0)  # Eq. 2
        log_p = torch.stack([ref, logps[rows].double(), optimum])
        valid_mass = log_p.exp().sum(1)
        log_q = log_p.log_softmax(1)  # given a valid roll
        q = log_q.exp()
        kl = (q * (log_q - log_q[0])).sum(1)
        outcomes.append(torch.stack([q @ rewards, kl, valid_mass], dim=1))
    say(f"\nMeans over {len(rows_of)} held-out prompts of up to three dice, given a valid roll:")
    say(f"{'':<8}{'mean reward':>12}{'KL':>9}{'objective':>11}{'valid mass':>12}")
    results = {"tau": tau}
    names = {"sft": "π_ref", "policy": "π_θ", "optimum": "π*"}
    for key, (reward, kl, valid) in zip(names, torch.stack(outcomes).mean(0).tolist()):
        pips = reward * run.manifest["reward_std"] + run.manifest["reward_mean"]
        objective = reward - tau * kl  # Eq. 1
        results[key] = {"reward": pips, "kl": kl, "objective": objective, "valid": valid}
        say(f"{names[key]:<8}{pips:>12.3f}{kl:>9.4f}{objective:>11.4f}{valid:>12.2%}")
    start, reached, best = (results[key]["objective"] for key in names)
    share = (reached - start) / (best - start)
    results["gain_share"] = share
    say(f"π_θ has {share:.2%} of the rise of the objective (Eq. 1 in normalised rewards).")
    if run.value_model:
        firsts = np.array([rows[0] for rows in rows_of.values()])
        errors = score(run.value_model, data, firsts, run.args) - torch.stack(v_star)
        results["value_rmse"] = errors.square().mean().sqrt().item()
        say(f"V(x) is off V*(x) by {results['value_rmse']:.3f} (root mean square).")
    return results


# --- arguments
MODEL = "google/flan-t5-large"
DATASET = "openbmb/UltraFeedback"
PINNED = {MODEL: "0613663d0d48ea86ba8cb3d7a44f0f65dc596a2a"}
PINNED[DATASET] = "40b436560ca83a8dba36114c22ab3c66e43f6d5e"  # corrects some overall_scores
# fmt: off
DICE = {
    "dataset_name": "dice", "model_name_or_path": "dice", "num_eval_prompts": 40,
    "learning_rate": 3e-3, "value_learning_rate": 3e-2,  # A slow V lets mass leak.
    "lr_scheduler_type": "linear", "warmup_steps": 60, "max_steps": 300, "bf16": False,
    "per_device_train_batch_size": 64, "micro_batch_tokens": 4096, "max_new_tokens": 8,
    "logging_steps": 50, "save_steps": 300,
}
MAY_BE_0 = (
    "seed", "eval_fold_index", "warmup_steps", "max_steps", "temperature", "learning_rate",
    "value_learning_rate",
)
# What --resume may change; but the product of the batch's factors must stay.
FREE = (
    "output_dir", "per_device_train_batch_size", "gradient_accumulation_steps", "resume",
    "micro_batch_tokens", "save_total_limit",
)
# fmt: on


def make_parser():
    """The flags. What the paper says of T5-L is the default."""
    parser = argparse.ArgumentParser("drov.py", allow_abbrev=False)
    parser.error = lambda message: require(False, message)  # one line, without the usage
    path = os.path.expanduser
    has_gpu = torch.cuda.is_available()

    def fold(text):
        return text if text == "all" else int(text)

    def add(flag, default, text, **options):
        if "action" not in options:
            options.setdefault("type", type(default))
        text = f"{text} (default: {default})"
        parser.add_argument(flag, default=default, help=text, **options)

    switch = {"action": "store_true"}
    add("--dice", False, "Run the worked example.", **switch)
    add("--output_dir", None, "A new folder, else one in runs/.", type=path)
    add("--resume", None, "The folder of a run to go on with.", type=path)
    add("--seed", 42, "Of split, batches, V's output, answers, dice.")
    add("--overfit_one_batch", False, "Train on one batch alone.", **switch)
    add("--overfit_steps", 300, "How many steps that takes.")
    add("--dataset_name", DATASET, "A file, a folder, or a name on the hub.", type=path)
    add("--dataset_revision", None, "The dataset's commit on the hub.", type=str)
    add("--dataset_split", "train", "The split of a dataset.")
    add("--prompt_key", None, "A column, else prompt or instruction.", type=str)
    add("--completion_key", None, "A column, else completion or response.", type=str)
    add("--reward_key", None, "A column, else reward or overall_score.", type=str)
    modes = ("prompt_seeded", "prompt_fold")
    add("--split_mode", modes[0], "Hold out one set of prompts, or folds.", choices=modes)
    add("--num_eval_prompts", 1000, "Prompts that prompt_seeded holds out.")
    add("--num_eval_folds", 5, "Folds that prompt_fold cuts.")
    add("--eval_prompts_per_fold", 1000, "Prompts in a fold.")
    add("--eval_fold_index", 0, "The held-out fold, from 0, or all.", type=fold)
    add("--max_prompt_length", 512, "In tokens; a longer one loses its beginning.")
    add("--max_completion_length", 512, "In tokens; a longer one loses its end.")
    add("--model_name_or_path", MODEL, "π_ref: a folder, or a name on the hub.", type=path)
    add("--model_revision", None, "The model's commit on the hub.", type=str)
    add("--share_policy_and_value_backbone", False, "V has the policy's body.", **switch)
    bf16 = has_gpu and torch.cuda.is_bf16_supported()
    add("--bf16", bf16, "Products and result in bfloat16.", action=argparse.BooleanOptionalAction)
    add("--loss", "dro_v", "DRO, or the baseline KTO.", choices=("dro_v", "kto"))
    values = ("prompt", "constant", "batch")
    add("--value", values[0], "V(x), one number for all x, or DRO-P.", choices=values)
    add("--tau", 1.0, "The weight of the KL divergence; KTO's β.")
    add("--learning_rate", 1e-4, "The policy's learning rate.")
    add("--value_learning_rate", 1e-4, "V's learning rate.")
    schedules = ("constant_with_warmup", "linear")
    add("--lr_scheduler_type", schedules[0], "The learning rates' course.", choices=schedules)
    add("--warmup_steps", 150, "Steps of linear warm-up.")
    add("--max_steps", 40000, "Steps. With 0 it evaluates and answers.")
    add("--max_grad_norm", None, "Clip each network's gradient to it.", type=float)
    add("--per_device_train_batch_size", 32, "Triplets a step, for each process.")
    add("--gradient_accumulation_steps", 1, "Multiplies that number.")
    tokens = 8192 if has_gpu else 640
    add("--micro_batch_tokens", tokens, "Padded tokens at once, at most.")
    add("--logging_steps", 10, "Steps between two log lines.")
    add("--save_steps", 2000, "Steps between evaluations with a checkpoint.")
    add("--save_total_limit", None, "Checkpoints to keep, else all.", type=int)
    add("--max_new_tokens", 512, "Tokens of an answer, at most.")
    add("--temperature", 1.0, "Of answers. 0 is greedy.")
    return parser


def check_args(args, saved):
    """Refuse numbers out of range, flags that contradict each other or the saved ones."""
    for name, value in vars(args).items():
        if type(value) in (int, float):
            in_range = 0 < value < 2**32 or (value == 0 and name in MAY_BE_0)
            require(in_range, f"--{name} {value} is out of range")
        if name in saved and name not in FREE:
            says = f"{name} was {saved[name]}: start a new run for {value}"
            require(value == saved[name], says)
    if args.split_mode == "prompt_seeded" and args.eval_fold_index != 0:
        raise UserError("--eval_fold_index goes with --split_mode prompt_fold")
    if args.loss == "kto" and args.value != "prompt":
        raise UserError("--loss kto has no V: leave out --value")
    if args.train_batch_size == 1 and (args.loss == "kto" or args.value == "batch"):
        raise UserError("this loss needs several rows: raise --per_device_train_batch_size")


def parse_args(argv=None):
    """Flags to a Namespace. --resume, --dice, --overfit_one_batch change others' defaults."""
    parser = make_parser()
    typed = parser.parse_args(argv)  # to see which defaults change
    saved = {}
    if typed.resume:
        with loading(f"--resume {typed.resume} (is it a run's folder?)"):
            saved = json.loads(Path(typed.resume, "args.json").read_text())
            parser.set_defaults(**saved)
    elif typed.overfit_one_batch:
        parser.set_defaults(num_eval_prompts=1, eval_prompts_per_fold=1, warmup_steps=0)
    if typed.dice:
        parser.set_defaults(**DICE)
    args = parser.parse_args(argv)
    if args.overfit_one_batch:
        args.max_steps = args.overfit_steps
    args.date = saved.get("date", time.strftime("%Y-%m-%d"))
    args.model_revision = args.model_revision or PINNED.get(args.model_name_or_path)
    args.dataset_revision = args.dataset_revision or PINNED.get(args.dataset_name)
    args.train_batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps
    args.train_batch_size *= WORLD_SIZE
    new_folder = time.strftime(f"runs/%Y%m%d-%H%M%S-{os.getpid()}")
    args.output_dir = args.resume or args.output_dir or new_folder
    check_args(args, saved)
    return args


# --- main
def begin(args, newest):
    """Load and check everything, then write: a Run. newest: a checkpoint, or None."""
    folder = Path(args.output_dir)
    is_taken = folder.is_file() or any(folder.glob("*"))
    says = f"--output_dir {folder} is not an empty folder: take another"
    require(args.resume or not is_taken, says)
    source = newest or args.model_name_or_path
    policy, tokenizer = load_policy(source, args.model_revision, args.seed)
    is_encoder_decoder = policy.config.is_encoder_decoder
    data, fold_of, manifest = load_data(args, tokenizer, is_encoder_decoder)
    answered = 0 if is_encoder_decoder else data["eval"].lengths[:, 0].max()
    longest = max(rows.widths.max() for rows in data.values())
    longest = max(longest, answered + args.max_new_tokens)
    config = policy.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or math.inf
    says = f"{longest} tokens are too many for the model's {limit} positions: lower "
    flags = "--max_prompt_length, --max_completion_length or --max_new_tokens"
    require(longest <= limit, says + flags)
    largest = max(ids.max() for rows in data.values() for ids in [*rows.x, *rows.y])
    num_tokens = policy.get_input_embeddings().weight.shape[0]
    says = f"the model has no token with the number {largest}: take its own tokenizer"
    require(largest < num_tokens, says)
    file = folder / "prompt_split_manifest.json"
    is_known = gather(file.exists())[0]  # All have looked into the folder before one writes.
    if RANK == 0 and not args.resume:
        with loading(f"--output_dir {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / "args.json", "x") as new:  # never over another
                new.write(json.dumps(vars(args), indent=2))
    if not is_known:
        save_json(file, manifest, indent=2)
    elif json.loads(file.read_text("utf-8")) != json.loads(json.dumps(manifest)):
        raise UserError(f"the data are not those of {file}: start a new run")
    return Run(args, tokenizer, policy, data, fold_of, manifest)


def carry_out(args):
    """A run, from its start or its newest checkpoint. Comments name the files it writes."""
    folder = Path(args.output_dir)
    step, newest = max(checkpoints(folder), default=(0, None))
    run = begin(args, newest)  # args.json, prompt_split_manifest.json
    run.step = step
    if RANK == 0 and args.resume:
        for leftover in folder.glob(".checkpoint-*.tmp"):  # of a kill
            shutil.rmtree(leftover)
        if newest is None:
            (folder / "metrics.jsonl").unlink(missing_ok=True)
    if args.model_name_or_path == "dice" and newest is None:
        dice_reference(run)  # sft
    score_reference(run)  # reference_logps.safetensors
    make_networks(run)
    if newest:
        load_checkpoint(run, newest)
    else:
        evaluate(run)  # metrics.jsonl
        finished = generate(run)  # generations-0.jsonl
    train(run)  # metrics.jsonl, checkpoint-<step>
    if run.step > 0:
        finished = generate(run)  # generations-<step>.jsonl
    *_, results = read_json(folder / "metrics.jsonl")  # the last evaluation
    results["finished"] = finished
    if "rolls" in run.data:
        results.update(dice_report(run))
    if RANK == 0:
        if args.bf16:  # Products saw rounded weights; unrounded, it is another policy.
            run.policy.to(torch.bfloat16)
        save_networks(run, folder)  # the policy, value_model.safetensors
    save_json(folder / "results.json", results, indent=2)  # Now the run is finished.
    say(f"The policy and its results are in {folder}.")


def main(argv=None):
    """The program. It exits with 2 for a UserError, and with 130 for Ctrl-C."""
    logging.disable(logging.WARNING)
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
        datasets.disable_progress_bars()
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU
    args = None
    try:
        if WORLD_SIZE > 1 and not dist.is_initialized():
            if DEVICE.type == "cuda":
                torch.cuda.set_device(DEVICE)
            with loading("the other processes (use torchrun, or unset WORLD_SIZE)"):
                dist.init_process_group("nccl" if DEVICE.type == "cuda" else "gloo")
            atexit.register(dist.destroy_process_group)
        args = gather(parse_args(argv))[0]  # The folder's name may hold the time.
        if args.dice:
            torch.set_num_threads(1)  # Its model is tiny.
        if args.resume and Path(args.resume, "results.json").exists():
            say(f"{args.resume} is finished: see results.json.")
        else:
            carry_out(args)
    except UserError as error:
        says = " ".join(str(error).split())
        if RANK == 0:
            print(f"drov.py: error: {says}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        if RANK == 0 and args and os.path.exists(args.output_dir):
            print(f"drov.py: stopped: go on with --resume {args.output_dir}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # where a terminal knows no π
    main()
