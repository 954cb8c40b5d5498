# SPDX-License-Identifier: Apache-2.0
"""What drov.py promises, a sentence a test. Everything is real, and small: a T5 of 0.2M parameters."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # for these models the fastest; subprocesses inherit it

import json
import math
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    ByT5Tokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

import drov

words = str.split  # flags as on the command line, as a list
SPLIT = {"num_eval_prompts": 3, "num_eval_folds": 3, "eval_prompts_per_fold": 4}


@pytest.fixture(scope="session")
def t5(tmp_path_factory):
    """A folder with a small T5 and its tokenizer, as a user would have it."""
    folder = tmp_path_factory.mktemp("t5")
    drov.tiny_t5(0).save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    """A JSON Lines file of 30 prompts with two completions each, short and long ones."""
    rng, file = np.random.default_rng(0), tmp_path_factory.mktemp("data") / "rows.jsonl"
    with file.open("w") as lines:
        for i in range(60):
            words = ["".join(rng.choice(list("abcde"), 3)) for _ in range(rng.integers(1, 8))]
            row = {
                "prompt": f"say {i % 30} words",
                "completion": " ".join(words),
                "reward": len(words),
            }
            lines.write(json.dumps(row) + "\n")
    return file


@pytest.fixture
def flags(t5, rows, tmp_path):
    """A run of a few seconds; further flags go behind these."""
    run = f"--dataset_name {rows} --model_name_or_path {t5} --output_dir {tmp_path / 'run'}"
    sizes = "--num_eval_prompts 4 --per_device_train_batch_size 8 --max_steps 4 --warmup_steps 2"
    logs = "--logging_steps 2 --eval_steps 2 --save_steps 2 --max_new_tokens 8 --max_grad_norm 1"
    return f"{run} {sizes} {logs}".split()


def prepared(flags, *more):
    """The run just before its first step, π_ref fixed."""
    run = drov.start(drov.parse_args([*flags, *more]))
    drov.fix_reference(run)
    return run


def metrics(folder):
    """metrics.jsonl without what a clock measured."""
    timings = ("step_seconds", "tokens_per_second", "reference_seconds")
    lines = drov.read_jsonl(folder / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name not in timings} for line in lines]


def fails(capsys, *flags, code=2):
    """Runs drov.py, which must end with `code` and one line; returns that line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        drov.main([str(flag) for flag in flags])
    error = capsys.readouterr().err
    assert caught.value.code == code
    assert error.startswith("drov.py: error: ") and error.count("\n") == 1, error
    return error


# --------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("tau", [0.1, 1.0, 5.0])
def test_gradients_are_eq_7_for_the_value_and_eq_8_over_tau_for_the_policy(tau):
    torch.manual_seed(0)
    logps, ref_logps, values, rewards = torch.randn(4, 6, dtype=torch.float64)
    logps.requires_grad_(), values.requires_grad_()
    policy_loss, value_loss, residual = drov.dro_v_loss(logps, ref_logps, values, rewards, tau)
    log_ratio = (logps - ref_logps).detach()
    v, r = values.detach(), rewards
    eq_7 = v - r + tau * log_ratio  # ∇V = 1
    eq_8 = -tau * ((r - v) - tau / 2 * 2 * log_ratio)  # ∇log π = 1, ∇(log π/π_ref)² = 2 log π/π_ref
    for loss, expected in ((policy_loss, (eq_8 / tau / 6, None)), (value_loss, (None, eq_7 / 6))):
        grads = torch.autograd.grad(
            loss.mean(), (logps, values), retain_graph=True, allow_unused=True
        )
        for grad, right in zip(grads, expected, strict=True):
            assert grad is None if right is None else torch.allclose(grad, right, rtol=1e-12)
    eq_4 = 0.5 * (r - v - tau * log_ratio).square().mean()
    assert torch.allclose(0.5 * residual.square().mean(), eq_4)


def printed_in_algorithm_1(policy_logps, ref_logps, values, rewards, tau):
    """−(∇log π (r − V) − ½ ∇(log π/π_ref)²): the square has lost its τ."""
    log_ratio = policy_logps - ref_logps
    _, value_loss, _ = drov.dro_v_loss(policy_logps, ref_logps, values, rewards, tau)
    return (
        -(policy_logps * (rewards - values.detach()) - 0.5 * log_ratio.square()),
        value_loss,
        None,
    )


def descend(loss, tau):
    """Gradient descent over 3 prompts × 4 completions, all seen in proportion to an uneven μ."""
    torch.manual_seed(1)
    ref_logps = torch.randn(3, 4, dtype=torch.float64).log_softmax(-1)
    rewards, mu = (
        torch.randn(3, 4, dtype=torch.float64),
        torch.rand(3, 4, dtype=torch.float64) + 0.2,
    )
    logits, values = (
        ref_logps.clone().requires_grad_(),
        torch.zeros(3, 1, dtype=torch.float64, requires_grad=True),
    )
    for _ in range(1500):
        policy_loss, value_loss, _ = loss(logits.log_softmax(-1), ref_logps, values, rewards, tau)
        ((policy_loss + value_loss) * mu / mu.sum(-1, keepdim=True)).sum().backward()
        for parameter in (logits, values):
            parameter.data -= 0.7 * parameter.grad
            parameter.grad = None
    exact_values = tau * torch.logsumexp(ref_logps + rewards / tau, -1, keepdim=True)  # Eq. 2
    exact_policy = (ref_logps + (rewards - exact_values) / tau).exp()
    policy_error = (logits.softmax(-1) - exact_policy).abs().max().item()
    return policy_error, (values - exact_values).abs().max().item()


def test_descent_on_the_loss_reaches_the_optimum_of_eq_2_and_algorithm_1_as_printed_does_not():
    assert max(descend(drov.dro_v_loss, tau=0.5)) < 1e-3
    assert min(descend(printed_in_algorithm_1, tau=0.5)) > 0.03
    assert max(descend(printed_in_algorithm_1, tau=1.0)) < 1e-3  # where the two agree


# --------------------------------------------------------------------------------------- models


def test_sequence_logps_sum_the_tokens_one_by_one_and_ignore_padding(t5):
    model = AutoModelForSeq2SeqLM.from_pretrained(t5).eval()
    tokenizer = AutoTokenizer.from_pretrained(t5)
    x = tokenizer(["roll two dice", "hi"], padding=True, return_tensors="pt")
    y = tokenizer(["46", "hello"], padding=True, return_tensors="pt")
    labels = y.input_ids.masked_fill(y.attention_mask == 0, -100)
    logps = drov.sequence_logps(model, {**x, "labels": labels})
    for row, text in enumerate(("46", "hello")):
        ids, decoded, expected = tokenizer(text).input_ids, [0], 0.0
        assert ids[-1] == tokenizer.eos_token_id
        prompt = x.input_ids[row][x.attention_mask[row] == 1][None]
        for token in ids:
            logits = model(input_ids=prompt, decoder_input_ids=torch.tensor([decoded])).logits
            expected += logits[0, -1].log_softmax(-1)[token].item()
            decoded.append(token)
        assert logps[row].item() == pytest.approx(expected, rel=1e-4)
    pad = torch.nn.functional.pad
    wider = {"input_ids": pad(x.input_ids, (0, 5)), "attention_mask": pad(x.attention_mask, (0, 5))}
    padded = drov.sequence_logps(model, {**wider, "labels": pad(labels, (0, 7), value=-100)})
    torch.testing.assert_close(padded, logps, rtol=1e-5, atol=1e-4)
    assert logps.dtype == torch.float32 and logps.shape == (2,)


def test_the_policy_starts_at_the_reference(flags):
    run = prepared(flags)
    side, all_rows = run.train_side, np.arange(len(run.train_side.rewards))
    again = drov.score(
        run, side, all_rows, lambda batch: drov.sequence_logps(run.policy, batch), ""
    )
    visited = side.ref_logps.isfinite()
    assert visited.sum() == 4 * 8  # only rows of the 4 steps were scored
    assert (again - side.ref_logps)[visited].abs().max() < 1e-3  # other batches
    held_out = drov.evaluate(run)["metrics"]
    assert held_out["eval_log_ratio_mean"] == 0.0  # the same batches
    assert held_out["eval_value_explained_variance"] == 0.0  # V starts at 0


def test_bf16_computes_the_policy_and_the_reference_alike(flags):
    sizes = ["--micro_batch_tokens", "300", "--num_eval_prompts", "2", "--max_steps", "7"]
    run = prepared(flags, "--bf16", *sizes)
    side, log_ratios = run.train_side, []
    head, logits_are = run.policy.get_output_embeddings(), set()
    head.weight.data *= 4  # as sure of itself as a trained model
    head.register_forward_hook(lambda module, inputs, logits: logits_are.add(logits.dtype))
    side.ref_logps = drov.score(
        run, side, np.arange(56), lambda batch: drov.sequence_logps(run.policy, batch), ""
    )
    for rows in drov.stream_rows(56, 8, range(1, 8), 0):  # with gradients, in other batches
        for micro in drov.micro_batches(rows, side.lengths, 300):
            batch = run.batch(side, micro)
            with run.autocast():
                logps = drov.sequence_logps(run.policy, batch)
            assert logps.requires_grad and logps.dtype == torch.float32
            log_ratios.append(logps.detach() - batch["ref_logps"])
    assert torch.cat(log_ratios).square().mean().sqrt() < 1e-3
    assert logits_are == {torch.float32}


def test_the_gelu_in_one_piece_is_the_one_written_out(tmp_path):
    sizes = {"vocab_size": 384, "d_model": 64, "d_ff": 128, "d_kv": 16, "dropout_rate": 0}
    config = T5Config(
        **sizes, num_layers=2, decoder_start_token_id=0, feed_forward_proj="gated-gelu"
    )
    written_out = T5ForConditionalGeneration(config)
    written_out.save_pretrained(tmp_path)
    ByT5Tokenizer().save_pretrained(tmp_path)
    policy, _ = drov.load_policy(drov.parse_args([]), tmp_path)
    assert written_out.config.dense_act_fn == "gelu_new"
    assert policy.config.dense_act_fn == "gelu_pytorch_tanh"
    x, labels = torch.randint(3, 200, (2, 4, 20))
    batch = {"input_ids": x, "attention_mask": torch.ones_like(x), "labels": labels}
    logps = [drov.sequence_logps(model, batch) for model in (written_out, policy)]
    torch.testing.assert_close(*logps, rtol=1e-6, atol=0)


class Questions(TorchDispatchMode):
    """Notes the functions that read a number off a tensor; of a GPU, they would have to wait."""

    def __init__(self):
        super().__init__()
        self.asked_by = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator._schema.name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal"):
            frames = [f for f in traceback.extract_stack()[:-1] if "/torch/" not in f.filename]
            self.asked_by.add(frames[-1].name)
        return operator(*args, **(kwargs or {}))


def test_a_step_waits_for_no_number_of_the_models(flags):
    run = prepared(flags, "--optim", "adamw", "--logging_steps", "4", "--save_steps", "4")
    before_the_update = set()
    with Questions() as questions:
        note = lambda *_: before_the_update.update(questions.asked_by)
        hook = register_optimizer_step_pre_hook(note)
        next(drov.train(run, 4))
        hook.remove()
    assert before_the_update == {"sequence_logps", "attended"}  # of labels and masks, on the CPU
    prompts = run.train_side.lengths[:, 0]
    batch = run.batch(run.train_side, np.array([prompts.argmin(), prompts.argmax()]))
    padded = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    assert not padded["attention_mask"].all()  # as without `attended`:
    with Questions() as questions:
        expected = run.policy.get_encoder()(**padded).last_hidden_state
    assert questions.asked_by == {"_ignore_bidirectional_mask_sdpa"}
    mask = drov.attended(run.policy, padded.pop("attention_mask"))
    states = run.policy.get_encoder()(**padded, attention_mask=mask).last_hidden_state
    assert states.equal(expected)
    assert drov.attended(run.policy, torch.ones(2, 3)) is None


def test_a_cut_batch_has_the_gradient_of_the_whole(flags):
    def gradients(tokens):
        run, seen = prepared(flags, "--overwrite_output_dir", "--micro_batch_tokens", tokens), []

        def record(optimizer, *_):
            seen.extend(
                p.grad.flatten() for group in optimizer.param_groups for p in group["params"]
            )

        run.value_model.head.data[0] *= (
            1.5  # a V that is not 0, so that its encoder has a gradient, too
        )
        hook = register_optimizer_step_pre_hook(record)
        next(drov.train(run, 4))
        hook.remove()
        return torch.cat(seen)

    whole, cut = gradients("100000"), gradients("1")  # one micro-batch, and one a row
    assert whole.abs().max() > 1e-2
    torch.testing.assert_close(cut, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shared", [False, True])
def test_a_shared_backbone_is_one_and_counted_once(flags, shared):
    run = prepared(flags, *["--share_policy_and_value_backbone"] * shared)
    assert (run.value_model.encoder is run.policy.get_encoder()) == shared
    before = [p.clone() for p in run.policy.parameters()]
    assert list(drov.train(run, 4)) == [1, 2, 3, 4]
    sizes = [sum(p.numel() for p in group["params"]) for group in run.optimizer.param_groups]
    encoder = sum(p.numel() for p in run.value_model.parameters()) - 2 * 64
    assert sizes == [sum(p.numel() for p in before), 2 * 64 + (0 if shared else encoder)]
    assert run.value_model.head[0].ne(run.value_model.head[1]).any()  # V learns
    norms = next(line for line in metrics(run.args.output_dir) if "grad_norm" in line)
    assert ("value_grad_norm" in norms) != shared  # one norm to clip when shared


def test_gradient_checkpointing_changes_no_number_and_bf16_few(flags, tmp_path):
    losses = {}
    for name in ("no-bf16", "gradient_checkpointing", "bf16"):
        folder = tmp_path / name
        drov.main([*flags, "--output_dir", str(folder), f"--{name}", "--max_new_tokens", "1"])
        losses[name] = [line["loss"] for line in metrics(folder) if "loss" in line]
    assert losses["no-bf16"] == pytest.approx(losses["gradient_checkpointing"], rel=1e-5)
    assert losses["no-bf16"] == pytest.approx(losses["bf16"], rel=0.2)
    assert losses["no-bf16"] != losses["bf16"]


# ----------------------------------------------------------------------------------------- data


@pytest.mark.parametrize("mode", ["prompt_seeded", "prompt_fold"])
def test_splits_are_disjoint_repeatable_and_blind_to_the_order_of_rows(mode):
    prompts = [f"prompt {i % 40}" for i in range(120)]
    split = lambda prompts, fold=0, seed=1: drov.split_prompts(
        prompts, mode, seed=seed, eval_fold_index=fold, **SPLIT
    )
    train, held_out = split(prompts)
    assert (train, held_out) == split(prompts[::-1]) == split(sorted(prompts))
    assert held_out != split(prompts, seed=2)[1]
    if mode == "prompt_seeded":
        assert len(held_out) == 3 and sorted(train + held_out) == sorted(set(prompts))
    else:
        folds = [split(prompts, fold) for fold in range(3)]
        everything = [prompt for _, fold in folds for prompt in fold]
        assert all(rest == train and len(fold) == 4 for rest, fold in folds)
        assert len(set(everything)) == 12 and not set(everything) & set(train)
        assert split(prompts, "all")[1] == everything and len(train) == 28


def test_reward_statistics_come_from_the_training_side_alone(tmp_path, t5):
    prompts = [f"p{i}" for i in range(20)]
    _, held_out = drov.split_prompts(prompts, "prompt_seeded", seed=42, eval_fold_index=0, **SPLIT)
    rewards = {p: 1e6 if p in held_out else float(i % 2) for i, p in enumerate(prompts)}
    file = tmp_path / "r.jsonl"
    lines = ({"prompt": f" {p}\n", "completion": "c", "reward": r} for p, r in rewards.items())
    drov.write_jsonl(file, lines)
    args = drov.parse_args(["--dataset_name", str(file), "--num_eval_prompts", "3"])
    train, evaluation, manifest = drov.load_sides(args, AutoTokenizer.from_pretrained(t5))
    trained = [r for p, r in rewards.items() if p not in held_out]
    assert manifest["reward_mean"] == pytest.approx(np.mean(trained))
    assert manifest["reward_std"] == pytest.approx(np.std(trained))
    assert train.rewards.mean().item() == pytest.approx(0, abs=1e-6)
    assert train.rewards.std(correction=0).item() == pytest.approx(1)
    assert evaluation.rewards.min() > 1e5
    assert (manifest["train_rows"], manifest["eval_prompts"]) == (17, 3)
    assert manifest["held_out"] == {"0": [drov.sha256(p)[:16] for p in held_out]}


def test_ultrafeedback_rows_become_triplets_and_unusable_ones_are_counted(tmp_path, capsys):
    def completion(response, overall, rating):
        annotations = {"helpfulness": {"Rating": rating, "Rationale": "because"}}
        return {"response": response, "overall_score": overall, "annotations": annotations}

    lines = [
        {
            "instruction": " a ",
            "completions": [completion("x", 7.5, "4"), completion("y", 2.0, "N/A")],
        },
        {"instruction": "a", "completions": [completion("x", 7.5, "4"), completion("", 1.0, "1")]},
        {"instruction": "b", "completions": []},
        {
            "instruction": "c",
            "completions": [completion("z", None, "5"), completion("w", math.nan, "2")],
        },
        {"instruction": "", "completions": [completion("v", 3.0, "3")]},
    ]
    file = tmp_path / "uf.jsonl"
    drov.write_jsonl(file, lines)
    dropped = Counter()
    args = drov.parse_args(["--dataset_name", str(file)])
    triplets = drov.load_triplets(args, dropped)
    assert triplets.to_list() == [
        {"prompt": "a", "completion": "x", "reward": 7.5},
        {"prompt": "a", "completion": "y", "reward": 2.0},
        {"prompt": "a", "completion": "x", "reward": 7.5},
    ]
    # Between JSON and Arrow, a null and a NaN of one column are the same: both are missing rewards.
    assert dropped["without a completion"] == 2 and dropped["without a prompt"] == 1
    assert dropped.total() == 5
    assert "rows dropped: " in capsys.readouterr().out
    args = drov.parse_args(["--dataset_name", str(file), "--reward_key", "helpfulness"])
    assert drov.load_triplets(args)["reward"] == [4.0, 4.0, 5.0, 2.0]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_thumbs_up_and_down_are_read_from_every_kind_of_file(tmp_path, suffix):
    table = datasets.Dataset.from_dict(
        {"prompt": ["1", "NA"], "completion": ["007", "null"], "reward": [True, False]}
    )
    file = str(tmp_path / f"thumbs.{suffix}")
    {"csv": table.to_csv, "parquet": table.to_parquet}.get(suffix, table.to_json)(file)
    for name in (file, str(tmp_path)):
        triplets = drov.load_triplets(drov.parse_args(["--dataset_name", name]))
        assert triplets.to_list() == [
            {"prompt": "1", "completion": "007", "reward": 1.0},
            {"prompt": "NA", "completion": "null", "reward": 0.0},
        ]


def test_a_cut_prompt_keeps_its_end_and_a_cut_completion_has_no_eos(rows, t5):
    cuts = ["--max_prompt_length", "5", "--max_completion_length", "6", "--num_eval_prompts", "3"]
    kept = ["--max_train_samples", "30", "--max_eval_samples", "4"]
    args = drov.parse_args(["--dataset_name", str(rows), *cuts, *kept])
    tokenizer = AutoTokenizer.from_pretrained(t5)
    train, _, manifest = drov.load_sides(args, tokenizer)
    assert (len(train.rewards), manifest["train_rows"], manifest["eval_rows"]) == (30, 30, 4)
    for row, lengths in zip(train.triplets, train.lengths, strict=True):
        assert (
            row["input_ids"] == tokenizer("ords").input_ids
            and len(row["input_ids"]) == lengths[0] == 5
        )
        whole = tokenizer(row["completion"]).input_ids
        assert row["labels"] == whole[:6] and len(row["labels"]) == lengths[1]
        assert (tokenizer.eos_token_id in row["labels"]) == (len(whole) <= 6)


def test_batches_are_one_endless_stream_and_micro_batches_lose_no_row():
    batches = list(drov.stream_rows(10, 4, range(1, 6), seed=0))
    assert sorted(np.concatenate(batches).tolist()) == sorted(list(range(10)) * 2)
    assert batches[3].tolist() == next(drov.stream_rows(10, 4, [4], seed=0)).tolist()
    lengths = np.random.default_rng(0).integers(1, 100, size=(64, 2))
    parts = drov.micro_batches(np.arange(64), lengths, 512)
    assert sorted(np.concatenate(parts).tolist()) == list(range(64))
    for part in parts:
        padded = len(part) * lengths[part].max(0).sum()
        assert padded <= 512 and padded - lengths[part].sum() <= 51.2
    assert drov.micro_batches(np.arange(0), lengths, 512) == []


# ------------------------------------------------------------------------------------- the loop


def test_one_batch_is_overfitted_a_hundredfold(tmp_path, capsys):
    rates = ["--learning_rate", "1e-2", "--value_learning_rate", "1e-2", "--sft_steps", "0"]
    size = ["--overfit_one_batch", "--overfit_steps", "150", "--per_device_train_batch_size", "8"]
    drov.main(["--dice", "--output_dir", str(tmp_path / "run"), *size, *rates])
    lines = [line for line in metrics(tmp_path / "run") if "loss" in line]
    assert (
        lines[0]["loss"] == pytest.approx(0.5, rel=0.9)
        and lines[-1]["loss"] < lines[0]["loss"] / 100
    )
    printed = capsys.readouterr().out.splitlines()[-1]
    assert printed.startswith(
        f"one batch of 8 triplets, 150 steps: loss {lines[0]['loss']:.4g} at the start"
    )
    assert not list((tmp_path / "run").glob("generations-*"))


def test_step_one_moves_and_each_rate_follows_its_flag(flags):
    for more, expected in (
        (["--lr_scheduler_type", "constant_with_warmup"], [1e-3, 2e-3]),
        (["--lr_scheduler_type", "linear", "--warmup_steps", "0"], [2e-3 * 4 / 5, 2e-3 / 5]),
        (["--tau", "4", "--rescale_policy_lr", "--optim", "adamw"], [1e-3 / 4, 2e-3 / 4]),
    ):
        rates = ["--learning_rate", "2e-3", "--value_learning_rate", "3e-3", "--logging_steps", "1"]
        run = prepared(flags, "--overwrite_output_dir", *rates, *more)
        before = run.policy.shared.weight.detach().clone()
        steps = drov.train(run, 4)
        next(steps)
        assert run.policy.shared.weight.ne(before).any()
        list(steps)
        lines = [line for line in metrics(run.args.output_dir) if "lr" in line]
        assert [lines[0]["lr"], lines[-1]["lr"]] == pytest.approx(expected)
        factor = 4 if "--tau" in more else 1
        assert [line["value_lr"] for line in lines] == pytest.approx(
            [1.5 * factor * l["lr"] for l in lines]
        )


def test_a_killed_and_a_stopped_run_go_on_to_the_bit(flags, tmp_path, capsys):
    flags += words("--sft_steps 2 --max_steps 30 --logging_steps 3 --save_total_limit 3")
    drov.main([*flags, "--output_dir", str(tmp_path / "whole")])
    flags += ["--output_dir", str(tmp_path / "cut")]
    program = [sys.executable, drov.__file__, *flags]

    def interrupt(command, signum, after):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        while not (tmp_path / "cut" / f"checkpoint-{after}").exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        process.send_signal(signum)
        return process.communicate()[1], process.returncode

    _, code = interrupt(program, signal.SIGKILL, after=4)
    assert code == -signal.SIGKILL
    said, code = interrupt([*program, "--resume"], signal.SIGTERM, after=10)
    assert code == 128 + signal.SIGTERM and "with a checkpoint; go on with: python drov.py" in said
    assert "max_steps was 30 and is 31" in fails(capsys, *flags, "--max_steps", 31, "--resume")
    assert "holds a run" in fails(capsys, *flags)
    drov.main([*flags, "--resume"])
    files = (
        "model.safetensors",
        "value_model/model.safetensors",
        "generations-0.jsonl",
        "generations-30.jsonl",
    )
    for file in files:
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), (
            file
        )
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    assert len(drov.checkpoints(tmp_path / "cut")) == 3


def test_a_run_leaves_every_file_and_a_policy_that_loads_and_generates(flags, tmp_path):
    folds = ["--split_mode", "prompt_fold", "--num_eval_folds", "2", "--eval_prompts_per_fold", "3"]
    answers = words("--eval_fold_index all --num_return_sequences 2 --top_p 0.9 --seed 7")
    drov.main([*flags, *folds, *answers])
    folder = tmp_path / "run"
    policy, tokenizer = (
        AutoModelForSeq2SeqLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    ids = policy.generate(**tokenizer("hello", return_tensors="pt"), max_new_tokens=5)
    assert isinstance(tokenizer.decode(ids[0]), str) and ids.shape[1] > 1
    manifest = json.loads((folder / "prompt_split_manifest.json").read_text())
    assert [len(fold) for fold in manifest["held_out"].values()] == [3, 3]
    lines = drov.read_jsonl(folder / "generations-0.jsonl")
    assert [line["fold"] for line in lines] == [0, 0, 0, 1, 1, 1]
    assert all(len(line["completions"]) == 2 for line in lines)
    assert json.loads((folder / "args.json").read_text())["versions"]["torch"] == torch.__version__
    assert set(json.loads((folder / "results.json").read_text())["folds"]) == {"0", "1"}
    value_model = drov.ValueModel(policy.get_encoder())
    drov.load_model(value_model, folder / "value_model" / "model.safetensors")
    assert [*drov.checkpoints(folder)] == [0, 2, 4]


def test_answers_depend_on_their_batch_and_seed_alone(flags, t5, tmp_path):
    def answers(name, *more):
        drov.main([*flags, "--output_dir", str(tmp_path / name), "--max_steps", "0", *more])
        lines = drov.read_jsonl(tmp_path / name / "generations-0.jsonl")
        return {line["prompt"]: line["completions"] for line in lines}

    sampled = answers("a")
    model = AutoModelForSeq2SeqLM.from_pretrained(t5)
    model.generation_config.update(num_beams=3, repetition_penalty=9.0)
    model.save_pretrained(tmp_path / "t5")
    AutoTokenizer.from_pretrained(t5).save_pretrained(tmp_path / "t5")
    own_sampling = ["--model_name_or_path", str(tmp_path / "t5")]
    assert sampled == answers("b", "--gradient_checkpointing", "--tau", "3", *own_sampling)
    assert sampled != answers("c", "--temperature", "0.3")
    assert answers("d", "--temperature", "0") == answers(
        "e", "--temperature", "0", "--per_device_eval_batch_size", "3"
    )


def test_what_is_not_finite_stops_the_run_and_is_not_saved(flags, tmp_path, capsys):
    error = fails(
        capsys, *flags, "--optim", "adamw", "--learning_rate", "1e37", "--max_steps", 10, code=1
    )
    assert "not finite in steps 1 to 2" in error or "not finite in steps 3 to 4" in error
    assert "say " in error and "words" in error  # some of its prompts
    for checkpoint in drov.checkpoints(tmp_path / "run").values():
        model = AutoModelForSeq2SeqLM.from_pretrained(checkpoint)
        assert all(parameter.isfinite().all() for parameter in model.parameters())


# ------------------------------------------------------------------------------------ processes


def torchrun(processes, *flags):
    launcher = words("-m torch.distributed.run --standalone --nproc_per_node")
    return [sys.executable, *launcher, str(processes), drov.__file__, *flags]


@pytest.mark.parametrize(("processes", "held_out"), [(2, 7), (4, 3)])  # 4: one has no row of 3
def test_processes_train_as_one_does_and_one_goes_on_where_they_stopped(
    processes, held_out, flags, tmp_path
):
    more = ["--max_steps", "6", "--logging_steps", "1", "--save_steps", "3"]
    more += ["--max_eval_samples", str(held_out)]
    one, two = tmp_path / "one", tmp_path / "two"
    drov.main([*flags, *more, "--output_dir", str(one)])
    part = ["--per_device_train_batch_size", str(8 // processes), "--output_dir", str(two)]
    part = [*flags, *more, *part]
    command = torchrun(processes, *part)
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("going on") == 0 and done.stdout.count("held out") == 4  # one speaks

    def same():
        for file in ("model.safetensors", "value_model/model.safetensors"):
            ours, theirs = (drov.load_file(folder / file) for folder in (one, two))
            for name in ours:
                torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-5)
        for ours, theirs in zip(metrics(one), metrics(two), strict=True):
            for name in ours.keys() - {"padding"}:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name
        answers = [(folder / "generations-0.jsonl").read_bytes() for folder in (one, two)]
        assert answers[0] == answers[1]

    same()
    for path in (two / "checkpoint-6", two / "model.safetensors"):  # as if it had stopped at 3
        drov.shutil.rmtree(path) if path.is_dir() else path.unlink()
    drov.main([*part, "--gradient_accumulation_steps", str(processes), "--resume"])
    same()


def test_a_rank_that_dies_ends_the_run(flags, tmp_path):
    endless = [*flags, "--max_steps", "100000", "--output_dir", str(tmp_path / "dies")]
    command, silent = torchrun(2, *endless), subprocess.DEVNULL
    process = subprocess.Popen(command, stdout=silent, stderr=silent)
    while not (tmp_path / "dies" / "checkpoint-2").exists():
        assert process.poll() is None
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert process.wait(timeout=60) != 0


# ----------------------------------------------------------------------------------------- dice


def test_the_optimum_of_dice_is_eq_2():
    mean, std, tau = 9.0, 4.0, 0.5
    pi, value = drov.dice_optimum("Ada rolls 2d4", mean, std, tau)
    rolls = [(a, b) for a in range(1, 5) for b in range(1, 5)]
    rewards = np.array([(a + b - mean) / std for a, b in rolls])
    exact = tau * np.log(np.mean(np.exp(rewards / tau)))
    assert value == pytest.approx(exact)
    steep, high = drov.dice_optimum("Ada rolls 2d4", mean, std, 1e-4)  # all but the best roll
    assert steep.tolist() == [0, 0, 0, 1] and high == pytest.approx((8 - mean) / std, abs=1e-3)
    joint = np.exp((rewards - exact) / tau) / 16
    assert [pi[a - 1] * pi[b - 1] for a, b in rolls] == pytest.approx(joint.tolist())
    assert drov.dice_reward("Ada rolls 2d4", "43") == 7
    assert [
        drov.dice_reward("Ada rolls 2d4", text) for text in ("4", "45", "40", "444", "4x", "")
    ] == [None] * 6


def test_dice_learns_in_a_few_steps_and_reports_it(tmp_path, capsys):
    short = words("--sft_steps 150 --max_steps 100 --num_return_sequences 25")
    short += words("--max_train_samples 8000")
    drov.main(["--dice", "--output_dir", str(tmp_path / "run"), *short])
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["policy"]["reward"] > results["sft"]["reward"] + 0.4
    assert results["fair"]["reward"] < results["optimum"]["reward"] and results["tau"] == 1.0
    assert results["value_rmse"] < 0.5 and results["eval_value_explained_variance"] > 0.5
    printed = capsys.readouterr().out
    assert "1000 rolls each" in printed and "π*" in printed and "optimum" in printed


# --------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--tau 0", "--tau: must be a finite number > 0"),
        ("--tau nan", "--tau"),
        ("--learning_rate -1", "--learning_rate: must be a finite number >= 0"),
        ("--value_learning_rate inf", "--value_learning_rate"),
        ("--per_device_train_batch_size 0", "--per_device_train_batch_size"),
        ("--gradient_accumulation_steps 0", "--gradient_accumulation_steps"),
        ("--max_steps 1.5", "must be a whole number"),
        ("--top_p 1.5", "<= 1"),
        ("--unknown", "unrecognized arguments: --unknown"),
        ("--temperature 0 --num_return_sequences 2", "--temperature 0"),
        ("--resume --overwrite_output_dir", "give one of them"),
        ("--compare a b --verdicts v.jsonl --judge reward", "--verdicts goes with --judge file"),
        (
            "--dice --split_mode prompt_fold --eval_prompts_per_fold 8 --eval_fold_index 5",
            "folds are 0 to 4",
        ),
        ("--dice --num_eval_prompts 240", "cannot hold out 240 of 240 prompts"),
        ("--dice --model_name_or_path nobody/nothing", "--dice"),
        ("--dice --dataset_name nobody/nothing", "--dice"),
        ("--dice --dataset_name nothing.jsonl", "nothing.jsonl does not exist"),
    ],
)
def test_a_wrong_flag_ends_in_one_line_that_says_what_to_do(
    flags, says, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    assert says in fails(capsys, *flags.split(), "--output_dir", tmp_path / "run")
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "cannot read"),
        ("{not json}\n", "cannot read"),
        ('{"prompt": "a", "answer": "b"}\n', "has the columns ['answer', 'prompt']: it needs prompt, completion"),
        ('{"instruction": "a", "completions": "b"}\n', "with something else in them"),
        ('{"prompt": "a", "completion": "", "reward": 1}\n', "has no usable row (dropped: 1 without a completion)"),
        ('{"prompt": "a", "completion": "b", "reward": 1}\n{"prompt": "b", "completion": "b", "reward": 1}\n',
         "training rewards are 1.0"),
    ],
)  # fmt: skip
def test_a_bad_file_ends_in_one_line_that_says_what_it_lacks(text, says, tmp_path, capsys):
    file = tmp_path / "bad.jsonl"
    file.write_text(text)
    flags = ["--dice", "--dataset_name", file, "--output_dir", tmp_path / "run"]
    assert says in fails(capsys, *flags, "--num_eval_prompts", 1)


def test_a_wrong_model_or_folder_ends_in_one_line_and_nothing_is_overwritten(
    flags, tmp_path, t5, capsys
):
    gpt = tmp_path / "gpt"
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=16)).save_pretrained(gpt)
    assert "decoder-only" in fails(capsys, *flags, "--model_name_or_path", gpt)
    for folder in (t5, t5.parent):
        error = fails(capsys, *flags, "--output_dir", folder, "--overwrite_output_dir")
        assert "holds the model to start from" in error
    assert "holds a run or a model" in fails(capsys, *flags, "--output_dir", gpt)
    (tmp_path / "file").touch()
    assert "cannot write in" in fails(capsys, *flags, "--output_dir", tmp_path / "file" / "run")
    assert {path.name for path in gpt.iterdir()} >= {"config.json", "model.safetensors"}
    drov.main([*flags, "--resume", "--max_steps", "1"])  # nothing there yet: afresh
    assert "starting afresh" in capsys.readouterr().out
    assert Path(tmp_path / "run" / "results.json").exists() and os.listdir(t5)


# ----------------------------------------------------------------------------------- comparison


def experiment(folds=2, prompts=100, chance=0.7, seed=0, completions=1):
    """Two policies' answers, where ours is the better one with the given chance."""
    rng = np.random.default_rng(seed)
    ours, theirs = {}, {}
    for key in ((fold, f"prompt {fold} {i}") for fold in range(folds) for i in range(prompts)):
        won = rng.random(completions) < chance
        ours[key] = [f"good {i}" if win else f"bad {i}" for i, win in enumerate(won)]
        theirs[key] = [f"bad {i}" if win else f"good {i}" for i, win in enumerate(won)]
    return ours, theirs


def good_wins(pairs):
    return np.array([float(pair["A"].startswith("good")) for pair in pairs])


def rates(ours, theirs, judge, both=False, seed=0):
    pairs = drov.make_pairs(ours, theirs, seed)
    return drov.win_rates(pairs, drov.judge_pairs(pairs, judge, both), seed)


def test_the_order_is_seeded_and_balanced_and_a_judge_that_always_says_a_finds_no_winner():
    ours, theirs = experiment(prompts=500)
    always_a = lambda pairs: np.ones(len(pairs))
    orders = [[p["ours"] for p in drov.make_pairs(ours, theirs, seed)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert rates(ours, theirs, always_a)["win_rate"] == pytest.approx(0.5, abs=0.05)
    assert rates(ours, theirs, always_a, both=True)["ties"] == 1000
    assert rates(ours, theirs, good_wins) == rates(ours, theirs, good_wins, both=True)


def test_swapping_the_policies_gives_one_minus_the_win_rate_whatever_the_bias():
    ours, theirs = experiment(completions=3)
    theirs[0, "prompt 0 0"] = ours[0, "prompt 0 0"]  # the same answers: ties
    biased = lambda pairs: np.array(
        [1.0 if int(drov.sha256(p["A"], p["prompt"])[:4], 16) % 3 else 0.0 for p in pairs]
    )
    there, back = rates(ours, theirs, biased), rates(theirs, ours, biased)
    assert there["win_rate"] == pytest.approx(1 - back["win_rate"], abs=1e-12)
    assert (there["wins"], there["ties"]) == (back["losses"], back["ties"])
    assert there["prompts"] == 200 and there["folds"]["0"]["win_rate"] != 0.5
    pairs, swapped = drov.make_pairs(ours, theirs, 0), drov.make_pairs(theirs, ours, 0)
    seen = lambda pair: {name: value for name, value in pair.items() if name != "ours"}
    assert list(map(seen, pairs)) == list(map(seen, swapped))


def test_the_interval_covers_the_true_win_rate_about_95_times_in_100():
    covered = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        pairs = [{"fold": fold, "prompt": str(i)} for fold in range(2) for i in range(100)]
        result = drov.win_rates(
            pairs, rng.choice([0, 0.5, 1], p=[0.2, 0.2, 0.6], size=200), seed, 1000
        )
        low, high = result["interval"]
        covered += low <= 0.7 <= high
    assert 0.91 <= covered / 300 <= 0.98
    one_fold = drov.win_rates(pairs[:100], np.ones(100), 0)
    assert one_fold["std"] is None and one_fold["interval"] == [1.0, 1.0]


def test_dice_runs_are_compared_fold_by_fold_and_bad_comparisons_are_refused(tmp_path, capsys, t5):
    common = words("--dice --split_mode prompt_fold --num_eval_folds 2 --eval_prompts_per_fold 20")
    common += words("--sft_steps 60 --max_steps 4 --save_steps 2 --generate_every_save")
    common += words("--num_return_sequences 2 --max_train_samples 500 --max_eval_samples 1000")

    def run(name, *more):
        drov.main([*common, "--output_dir", str(tmp_path / name), *more])
        return str(tmp_path / name)

    both = run("both", "--eval_fold_index", "all")
    printed = capsys.readouterr().out
    assert f"{both} vs {both}@0: " in printed and "2 folds × " in printed
    assert (tmp_path / "both" / "generations-2.jsonl").exists()
    single = [run(f"fold{fold}", "--eval_fold_index", str(fold)) for fold in (0, 1)]
    versus = ["--compare", ",".join(single), f"{single[0]}@0,{single[1]}@2"]
    drov.main([*versus, "--output_dir", str(tmp_path / "versus")])
    result = json.loads((tmp_path / "versus" / "win_rates.json").read_text())
    assert set(result["folds"]) == {"0", "1"} and 0 <= result["win_rate"] <= 1
    other = run("other", "--eval_fold_index", "all", "--temperature", "0.5")
    seed = run("seed", "--eval_fold_index", "all", "--seed", "43")
    refused = lambda *policies: fails(
        capsys, "--compare", *policies, "--output_dir", tmp_path / "no"
    )
    assert "they differ in temperature: 1.0 and 0.5" in refused(both, other)
    assert "they differ in held_out" in refused(both, seed)
    assert "did not answer the same prompts" in refused(both, single[0])
    assert "fold 0 is answered twice" in refused(both, f"{single[0]},{single[0]}")
    assert "is no finished run" in refused(both, f"{both}@3")
    lines = drov.read_jsonl(tmp_path / "other" / "generations-4.jsonl")
    drov.write_jsonl(
        tmp_path / "other" / "generations-4.jsonl", [*lines[1:], lines[0] | {"prompt": "new"}]
    )
    assert "did not hold out: 'new'" in refused(other, both)


def test_a_reward_judge_lets_no_roll_lose_to_any_and_two_of_them_tie():
    pairs = [{"prompt": "Ada rolls 1d6", "A": a, "B": b} for a, b in ("65", "1x", "xy", "y1", "44")]
    assert drov.judge_by_reward(pairs).tolist() == [1, 1, 0.5, 0, 0.5]


def test_verdicts_of_a_file_are_unblinded_and_bad_ones_named(flags, tmp_path, capsys):
    drov.main([*flags, "--learning_rate", "0.3"])  # far enough for other answers
    run, out = str(tmp_path / "run"), tmp_path / "versus"
    compare = ["--compare", run, f"{run}@0", "--output_dir", str(out)]
    drov.main(compare)
    pairs, key = drov.read_jsonl(out / "pairs.jsonl"), drov.read_jsonl(out / "key.jsonl")
    assert [set(pair) for pair in pairs] == [{"id", "prompt", "A", "B"}] * 4
    assert run not in (out / "pairs.jsonl").read_text()
    answers = {
        line["prompt"]: line["completions"][0]
        for line in drov.read_jsonl(tmp_path / "run" / "generations-4.jsonl")
    }
    for pair, line in zip(pairs, key, strict=True):
        assert pair["id"] == line["id"] and pair[line["policy_1_is"]] == answers[pair["prompt"]]
    verdicts = [
        {"id": line["id"], "winner": line["policy_1_is"]} for line in key
    ]  # policy 1 always wins
    file = tmp_path / "verdicts.jsonl"
    drov.write_jsonl(file, [*verdicts[1:], verdicts[1], {"id": "else", "winner": "tie"}])
    capsys.readouterr()
    drov.main([*compare, "--verdicts", str(file)])
    printed = capsys.readouterr().out
    assert "1 of 4 ids missing, 1 unknown, 1 repeated" in printed
    assert "100.0 % (1 fold × 3 prompts, 95 % CI 100.0–100.0 %)" in printed
    file.write_text('{"id": "x", "winner": "tie"}\n{"id": "x", "winner": "C"}\n')
    assert "line 2: " in fails(capsys, *compare, "--verdicts", file)
    assert "cannot read" in fails(capsys, *compare, "--verdicts", tmp_path / "none")
    assert "only dice have" in fails(capsys, *compare, "--judge", "reward")
    assert "--judge_model_name_or_path go together" in fails(capsys, *compare, "--judge", "model")


@pytest.mark.parametrize("kind", ["encoder-decoder", "decoder-only", "chat"])
def test_a_model_judges_by_its_log_probabilities_and_sees_no_name(kind, t5, tmp_path):
    folder = tmp_path / "judge"
    tokenizer = ByT5Tokenizer(model_max_length=700)
    if kind == "chat":
        tokenizer.chat_template = "User: {{ messages[0]['content'] }} Judge: "
    tokenizer.save_pretrained(folder)
    if kind == "encoder-decoder":
        drov.tiny_t5(1).save_pretrained(folder)
    else:
        torch.manual_seed(0)
        sizes = {
            "n_layer": 2,
            "n_head": 2,
            "n_embd": 32,
            "vocab_size": 384,
            "initializer_range": 0.3,
        }
        GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(folder)
    size = words("--judge model --per_device_eval_batch_size 3")
    args = drov.parse_args([*size, "--judge_model_name_or_path", str(folder)])
    judge = drov.ModelJudge(args)
    pairs = [{"prompt": "p" * n, "A": "a" * (3 * n), "B": "bc" * n} for n in (1, 20, 3, 200, 7)]
    verdicts = judge(pairs)
    for pair, verdict in zip(pairs, verdicts, strict=True):
        ids = torch.tensor([judge.encode(pair)])
        assert ids.shape[1] <= 700
        text = tokenizer.decode(ids[0])
        assert (
            "Response A:\na" in text and "Response B:\nbc" in text and "Answer:" in text
        )  # all cut alike
        assert text.endswith("Judge: ") == (kind == "chat")
        start = {"decoder_input_ids": torch.tensor([[0]])} if kind == "encoder-decoder" else {}
        with torch.no_grad():
            logits = judge.model(input_ids=ids, **start).logits[0, -1]
        a, b = tokenizer.encode("AB", add_special_tokens=False)
        assert verdict == float(logits[a] > logits[b])
