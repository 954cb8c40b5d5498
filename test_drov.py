# SPDX-License-Identifier: Apache-2.0
"""What drov.py promises, a sentence a test. Everything is real, and small."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # for these models the fastest; subprocesses inherit it

import json
import math
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from torch.optim.optimizer import register_optimizer_step_pre_hook

import drov

SPLIT = {"seed": 1, "num_eval_prompts": 3, "num_eval_folds": 3, "eval_prompts_per_fold": 4}
WORDS = ["".join(w) for w in np.random.default_rng(0).choice(list("abcde"), (40, 3))]
LOSSES = ["", "--value batch", "--value constant", "--loss kto", "--loss sft"]


def rows_file(path, prompts=30, each=2):
    """JSON Lines with long and short completions; the reward is the number of words."""
    rng, lines = np.random.default_rng(0), []
    for i in range(prompts * each):
        text = " ".join(rng.choice(WORDS, rng.integers(1, 8)))
        line = {"prompt": f"say {i % prompts} words", "completion": text, "reward": text.count(" ")}
        lines.append(json.dumps(line))
    path.write_text("\n".join(lines))
    return path


CHATML = """{% for m in messages %}<|im_start|>{{ m['role'] }}
{{ m['content'] | trim }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
INST = "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"


def tokenizer_of(kind):
    """A real tokenizer: end (adds nothing), bos (in front), inst (template, EOS), chatml (template,
    a turn's end of its own), unigram (T5's way)."""
    special = ["<pad>", "</s>", "<unk>", "<s>", "<|im_start|>", "<|im_end|>"]
    texts, pre = (
        [" ".join(WORDS), "say words user assistant [INST] [/INST] 0123456789 AB"],
        tokenizers,
    )
    if kind == "unigram":
        tok = tokenizers.Tokenizer(tokenizers.models.Unigram())
        tok.pre_tokenizer = pre.pre_tokenizers.Metaspace()
        tok.decoder = pre.decoders.Metaspace()
        trainer = tokenizers.trainers.UnigramTrainer(
            vocab_size=150, special_tokens=special, unk_token="<unk>"
        )
    else:
        tok = tokenizers.Tokenizer(tokenizers.models.BPE())
        tok.pre_tokenizer = pre.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tok.decoder = pre.decoders.ByteLevel()
        alphabet = pre.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=300, special_tokens=special, initial_alphabet=alphabet
        )
    tok.train_from_iterator(texts, trainer)
    around = {"unigram": "$A </s>", "bos": "<s> $A", "inst": "<s> $A"}.get(kind)
    if around:
        tok.post_processor = tokenizers.processors.TemplateProcessing(
            single=around, special_tokens=[("</s>", 1), ("<s>", 3)]
        )
    names = {"eos_token": "</s>", "unk_token": "<unk>", "bos_token": "<s>"}
    names |= {"pad_token": "<pad>"} if kind == "unigram" else {"pad_token": "</s>"}
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tok, padding_side="left", model_max_length=16, **names
    )
    wrapped.chat_template = {"inst": INST, "chatml": CHATML}.get(kind)
    return wrapped


SMALL = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
FAMILIES = {
    "llama": SMALL,
    "qwen2": SMALL,
    "gemma2": SMALL | {"sliding_window": 4},
    "mistral": SMALL,
    "gpt_neox": SMALL,
    "gpt2": {"vocab_size": 320, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "phi": SMALL,
    "opt": SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 16, "max_position_embeddings": 256},
    "bloom": SMALL | {"n_head": 4},
    "mamba": SMALL | {"state_size": 4},
}


def causal(family, **more):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **FAMILIES[family] | more)
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folders as a user would have them: a T5 and a Llama with a chat template."""
    folder = tmp_path_factory.mktemp("models")
    drov.load_policy("dice", None, 0)[0].save_pretrained(folder / "t5")
    transformers.ByT5Tokenizer().save_pretrained(folder / "t5")
    causal("llama", attention_dropout=0.5).save_pretrained(folder / "llama")
    tokenizer_of("chatml").save_pretrained(folder / "llama")
    return {kind: str(folder / kind) for kind in ("t5", "llama")}


@pytest.fixture
def flags(models, tmp_path):
    """A run of a few seconds; further flags go behind these."""
    data = rows_file(tmp_path / "rows.jsonl")

    def run(more="", kind="t5", out="run"):
        sizes = (
            "--num_eval_prompts 4 --per_device_train_batch_size 8 --max_steps 4 --warmup_steps 2"
        )
        logs = "--logging_steps 2 --save_steps 2 --max_new_tokens 8 --max_grad_norm 1 --learning_rate 1e-3"
        where = f"--dataset_name {data} --model_name_or_path {models[kind]} --output_dir {tmp_path / out}"
        return f"{where} {sizes} {logs} {more}".split()

    return run


def metrics(folder):
    """metrics.jsonl without what a clock measured."""
    clock = ("step_seconds", "tokens_per_second", "reference_seconds")
    lines = [line for _, line in drov.read_jsonl(f"{folder}/metrics.jsonl")]
    return [{name: x for name, x in line.items() if name not in clock} for line in lines]


def answers(folder, step):
    return [line for _, line in drov.read_jsonl(f"{folder}/generations-{step}.jsonl")]


def fails(capsys, flags, code=2):
    """Runs drov.py, which must end with `code` and one line; returns that line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        drov.main([str(flag) for flag in flags])
    error = capsys.readouterr().err
    assert caught.value.code == code, error
    assert error.startswith("drov.py: error: ") and error.count("\n") == 1, error
    return error


def step_gradients(flags):
    """The gradients of a run's first step."""
    seen = []

    def record(optimizer, *_):
        if not seen:
            groups = optimizer.param_groups
            seen.extend(p.grad.flatten().clone() for group in groups for p in group["params"])

    hook = register_optimizer_step_pre_hook(record)
    drov.main(flags)
    hook.remove()
    return torch.cat(seen)


# --------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("tau", [0.1, 1.0, 5.0])
def test_gradients_are_eq_7_for_the_value_and_eq_8_over_tau_for_the_policy(tau):
    torch.manual_seed(0)
    logps, ref_logps, values, rewards = torch.randn(4, 6, dtype=torch.float64)
    logps.requires_grad_(), values.requires_grad_()
    policy_loss, value_loss, residual = drov.dro_v_loss(logps, ref_logps, values, rewards, tau)
    ratio, v, r = (logps - ref_logps).detach(), values.detach(), rewards
    eq_7 = v - r + tau * ratio  # ∇V = 1
    eq_8 = -tau * ((r - v) - tau / 2 * 2 * ratio)  # ∇log π = 1, ∇(log π/π_ref)² = 2 log π/π_ref
    for loss, expected in ((policy_loss, (eq_8 / tau / 6, None)), (value_loss, (None, eq_7 / 6))):
        grads = torch.autograd.grad(
            loss.mean(), (logps, values), retain_graph=True, allow_unused=True
        )
        for grad, right in zip(grads, expected, strict=True):
            assert grad is None if right is None else torch.allclose(grad, right, rtol=1e-12)
    eq_4 = 0.5 * (r - v - tau * ratio).square().mean()
    assert torch.allclose(0.5 * residual.square().mean(), eq_4)


def printed_in_algorithm_1(policy_logps, ref_logps, values, rewards, tau):
    """−(∇log π (r − V) − ½ ∇(log π/π_ref)²): the square has lost its τ."""
    _, value_loss, _ = drov.dro_v_loss(policy_logps, ref_logps, values, rewards, tau)
    square = 0.5 * (policy_logps - ref_logps).square()
    return square - policy_logps * (rewards - values.detach()), value_loss, None


def descend(loss, tau):
    """Gradient descent over 3 prompts × 4 completions, in proportion to an uneven μ: how far off
    Eq. 2's policy and value it ends."""
    torch.manual_seed(1)
    double = partial(torch.tensor, dtype=torch.float64)
    ref_logps = double(torch.randn(3, 4).tolist()).log_softmax(-1)
    rewards, mu = double(torch.randn(3, 4).tolist()), double(torch.rand(3, 4).tolist()) + 0.2
    logits, values = ref_logps.clone().requires_grad_(), double([[0.0]] * 3).requires_grad_()
    for _ in range(1500):
        policy_loss, value_loss, _ = loss(logits.log_softmax(-1), ref_logps, values, rewards, tau)
        ((policy_loss + value_loss) * mu / mu.sum(-1, keepdim=True)).sum().backward()
        for parameter in (logits, values):
            parameter.data -= 0.7 * parameter.grad
            parameter.grad = None
    exact = tau * torch.logsumexp(ref_logps + rewards / tau, -1, keepdim=True)
    policy = (ref_logps + (rewards - exact) / tau).exp()
    return (logits.softmax(-1) - policy).abs().max().item(), (values - exact).abs().max().item()


def test_descent_on_the_loss_reaches_the_optimum_of_eq_2_and_algorithm_1_as_printed_does_not():
    assert max(descend(drov.dro_v_loss, tau=0.5)) < 1e-3
    assert min(descend(printed_in_algorithm_1, tau=0.5)) > 0.03
    assert max(descend(printed_in_algorithm_1, tau=1.0)) < 1e-3  # where the two agree


def test_the_batch_mean_as_value_makes_dro_p_and_kto_is_as_defined():
    torch.manual_seed(0)
    logps, ref_logps, rewards = torch.randn(3, 6, dtype=torch.float64)
    logps.requires_grad_()
    u = rewards - 0.5 * (logps - ref_logps)
    (dro_p,) = torch.autograd.grad(0.5 * u.var(correction=0), logps, retain_graph=True)
    loss, _, _ = drov.dro_v_loss(logps, ref_logps, u.mean().detach().expand(6), rewards, 0.5)
    torch.testing.assert_close(torch.autograd.grad(loss.mean(), logps)[0], dro_p / 0.5)
    sigma = lambda x: 1 / (1 + math.exp(-x))
    losses = drov.kto_loss(logps, ref_logps, rewards > 0, torch.tensor(0.3), 2.0)
    for loss, rho, r in zip(losses, (logps - ref_logps).tolist(), rewards, strict=True):
        sign = 1 if r > 0 else -1
        assert loss.item() == pytest.approx(1 - sigma(2.0 * sign * (rho - 0.3)))


# --------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("family", ["t5", "bart", *FAMILIES])
def test_logps_are_those_of_a_row_alone_one_token_after_the_other(family):
    seq2seq = family in ("t5", "bart")
    if family == "t5":
        model = drov.load_policy("dice", None, 0)[0]
    elif family == "bart":
        sizes = {"d_model": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_layers": 1}
        sizes |= {"decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
        torch.manual_seed(0)
        config = transformers.BartConfig(vocab_size=320, **sizes)
        model = transformers.BartForConditionalGeneration(config)
    else:
        model = causal(family)
    model.eval()
    rng, rows = np.random.default_rng(0), [(3, 4), (9, 1), (1, 7), (5, 5)]
    x, y = ([rng.integers(5, 300, row[i]).tolist() for row in rows] for i in (0, 1))
    side = drov.Side(["p"] * 4, x, y, torch.zeros(4), "right" if seq2seq else "left")
    together, expected = drov.sequence_logps(model, side.batch(np.arange(4))), []
    value_model = drov.ValueModel(model)
    value_model.head.data[0] *= 2
    values = lambda i: value_model(*(side.batch(i)[n] for n in ("input_ids", "attention_mask")))
    for i, (ids, completion) in enumerate(zip(x, y, strict=True)):
        expected.append(0.0)
        for t, token in enumerate(completion):
            inputs = {"input_ids": torch.tensor([ids + completion[:t]])}
            if seq2seq:
                start = [model.config.decoder_start_token_id, *completion[:t]]
                inputs = {
                    "input_ids": torch.tensor([ids]),
                    "decoder_input_ids": torch.tensor([start]),
                }
            expected[i] += model(**inputs).logits[0, -1].log_softmax(-1)[token].item()
        torch.testing.assert_close(
            values(np.array([i])), values(np.arange(4))[i : i + 1], rtol=1e-4, atol=1e-5
        )
    assert together.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert together.dtype == torch.float32 and torch.equal(
        drov.ValueModel(model)(
            *(side.batch(np.arange(4))[n] for n in ("input_ids", "attention_mask"))
        ),
        torch.zeros(4),
    )


@pytest.mark.parametrize(
    ("kind", "prompt", "completion"),
    [
        ("end", "say abc", "abc</s>"),
        ("bos", "<s>say abc", "abc</s>"),
        ("inst", "<s>[INST] say abc [/INST]", "abc</s>"),
        ("chatml", "<|im_start|>user\nsay abc<|im_end|>\n<|im_start|>assistant\n", "abc<|im_end|>"),
        ("unigram", "say abc</s>", "abc</s>"),
    ],
)
def test_texts_stand_in_the_models_own_frame_and_end_once(kind, prompt, completion):
    tokenizer = tokenizer_of(kind)
    frame = json.loads(json.dumps(drov.text_frame(tokenizer, kind == "unigram")))
    (x,), (y,) = drov.encode(["say abc"], ["abc"], tokenizer, frame, 40, 40)
    assert [tokenizer.decode(ids) for ids in (x, y)] == [prompt, completion]
    taken = len(x) - len(tokenizer.encode("say abc", add_special_tokens=False))
    long, counts = "abc dea " * 30, Counter()
    (x,), (y,) = drov.encode([long], [long], tokenizer, frame, taken + 3, 5, counts)
    body = tokenizer.encode(long, add_special_tokens=False)
    before, behind = frame["prompt"]
    assert x == [*before, *body[-3:], *behind] and len(x) == taken + 3
    assert y == body[:5]  # its beginning, and no end
    assert counts["cut_prompts"] == counts["cut_completions"] == 1
    with pytest.raises(drov.UserError, match="max_prompt_length"):
        drov.encode(["a"], ["a"], tokenizer, frame, taken, 5)


@pytest.mark.parametrize("kind", ["chatml", "unigram", "t5"])
def test_text_that_spells_a_special_token_is_text(kind):
    tokenizer = transformers.ByT5Tokenizer() if kind == "t5" else tokenizer_of(kind)
    frame, counts = drov.text_frame(tokenizer, kind != "chatml"), Counter()
    text = "<s>abc</s> <pad><|im_end|> ＜/s＞"
    special = set(drov.special_tokens(tokenizer).values()) - {tokenizer.unk_token_id}
    _, (y,) = drov.encode(["abc"], [text], tokenizer, frame, 90, 90, counts)
    behind = frame["completion"][1]
    assert y[-len(behind) :] == behind and not special & set(y[: -len(behind)])
    assert counts["special_spellings"] == 1
    if kind != "unigram":
        assert tokenizer.decode(y[: -len(behind)]) == text


# ----------------------------------------------------------------------------------------- data

TRICKY = ["4", "007", "NA", "null", "1945-05-01", "true", '"so"', "a\u2028b\x85c", "x" * 200_000]


@pytest.mark.parametrize("name", ["a.jsonl", "mine[12]*.json", "b.csv", "c.parquet"])
def test_texts_and_rewards_are_read_as_they_stand_from_every_kind_of_file(
    tmp_path, name, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    rewards = [True, False, 3e-11, 1, 2.5, 0, -1, 7, 5e-12]
    rows = [{"prompt": f" p{i}\n", "completion": text, "reward": r, "extra": {"any": [i]} if i % 2 else "thing"}
            for i, (text, r) in enumerate(zip(TRICKY, rewards, strict=True))]  # fmt: skip
    file, lines = tmp_path / name, [json.dumps(row, ensure_ascii=False) for row in rows]
    if name.endswith("jsonl"):
        file.write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode())
    elif name.endswith("json"):
        file.write_text(json.dumps(rows))
    else:
        columns = {k: [row[k] for row in rows] for k in ("prompt", "completion")}
        table = datasets.Dataset.from_dict(columns | {"reward": list(map(float, rewards))})
        (table.to_csv if name.endswith("csv") else table.to_parquet)(str(file))
    args = drov.parse_args(["--dataset_name", f"~/{name}"])
    triplets = drov.load_triplets(args)
    assert triplets["completion"][:] == TRICKY and triplets["reward"][:] == list(
        map(float, rewards)
    )
    assert triplets["prompt"][0] == "p0" and [p.name for p in tmp_path.iterdir()] == [name]


GOOD = b'{"prompt": "a", "completion": "b", "reward": 1}\n'


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", GOOD + b"null\n", "line 2 is no JSON object"),
        ("a.jsonl", GOOD * 2 + b'{"prompt": "caf\xe9"}\n', "line 3 is not UTF-8"),
        ("a.jsonl", b"", "has the columns []: it needs prompt, completion and reward"),
        ("a.jsonl", b'{"prompt": "a", "answer": "b"}', "['answer', 'prompt']: it needs prompt"),
        ("a.jsonl", GOOD + GOOD.replace(b'"a"', b'"c"'), "all equal but for rounding"),
        ("a.json", b'{"prompt": "a"}', "a.json"),
        ("a.csv", b"prompt,completion,reward\na,b,1\na,b,c,1\n", "line 3"),
        ("a.csv", b"prompt,completion,reward\na,b,1\na,b\n", "line 3"),
        ("a.csv", b'prompt,completion,reward\na,"b \\"c, d\\" e",1\n', "line 2"),
        ("a.parquet", b"PAR", "cannot load"),
        ("a.txt", b"PAR", "ending"),
        ("a.jsonl", b'{"prompt": "a", "completion": "", "reward": 1}', "no usable row"),
    ],
)
def test_a_broken_file_ends_in_one_line_that_names_the_place(tmp_path, capsys, name, content, says):
    (tmp_path / name).write_bytes(content)
    flags = [
        "--dataset_name",
        tmp_path / name,
        "--num_eval_prompts",
        1,
        "--output_dir",
        tmp_path / "run",
    ]
    assert says in fails(capsys, ["--dice", *flags]) and not (tmp_path / "run").exists()


def test_unusable_rows_are_counted_by_cause_and_messages_and_ultrafeedback_understood(tmp_path):
    turn = lambda role, text: [{"role": role, "content": text}]
    answer = {"response": "x", "overall_score": 7.5, "annotations": {"honesty": {"Rating": "4"}}}
    unrated = answer | {"overall_score": None, "annotations": {"honesty": {"Rating": "N/A"}}}
    rows = [
        {"prompt": turn("user", "p"), "completion": turn("assistant", "c"), "reward": "true"},
        {"prompt": turn("user", "p") * 2, "completion": "c", "reward": 1},
        {"prompt": "p", "completion": turn("user", "c"), "reward": 1},
        {"prompt": "p", "completion": 6, "reward": 1},
        {"prompt": "p\ud83c", "completion": "c", "reward": 1},
        {"prompt": "p", "completion": "c", "reward": math.nan},
        {"instruction": "u", "completions": [answer, unrated]},
        {"instruction": "u", "completions": []},
    ]
    file, dropped = tmp_path / "a.jsonl", Counter()
    file.write_text("\n".join(map(json.dumps, rows)))
    load = lambda *more: drov.load_triplets(
        drov.parse_args(["--dataset_name", str(file), *more]), dropped
    )
    assert load().to_list() == [{"prompt": "p", "completion": "c", "reward": 1.0},
                                {"prompt": "u", "completion": "x", "reward": 7.5}]  # fmt: skip
    causes = ["prompt that is not one user turn", "completion that is not one assistant turn",
              "completion that is not text", "text that is no valid Unicode",
              "reward that is not finite", "without a reward", "without a completion"]  # fmt: skip
    assert dropped == dict.fromkeys(causes, 1)
    assert load("--reward_key", "honesty")["reward"][1] == 4.0


@pytest.mark.parametrize("mode", ["prompt_seeded", "prompt_fold"])
def test_splits_are_disjoint_repeatable_and_blind_to_the_order_of_rows(mode):
    prompts = [f"prompt {i % 40}" for i in range(120)]
    split = lambda prompts, fold=0, **more: drov.split_prompts(
        prompts, mode, eval_fold_index=fold, **SPLIT | more
    )
    train, held_out = split(prompts)
    assert (train, held_out) == split(prompts[::-1]) == split(sorted(prompts))
    assert held_out != split(prompts, seed=2)[1] and sorted(train + held_out) == sorted(
        set(prompts)
    )
    if mode == "prompt_fold":
        folds = [split(prompts, fold)[1] for fold in range(3)]
        together = [prompt for fold in folds for prompt in fold]
        assert split(prompts, "all")[1] == together and len(set(together)) == 12


def test_statistics_are_the_training_sides_and_limits_keep_whole_prompts_by_hash(tmp_path, models):
    rewards = {f"p{i}": i // 10 for i in range(20)}  # sorted by rating
    _, held_out = drov.split_prompts(rewards, "prompt_fold", eval_fold_index="all", **SPLIT)
    rewards |= dict.fromkeys(held_out, 1e6)
    rows = [
        {"prompt": p, "completion": f"c{k}", "reward": r} for p, r in rewards.items() for k in "ab"
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    split = "--split_mode prompt_fold --eval_fold_index all --num_eval_folds 3 --eval_prompts_per_fold 4"
    limits = f"{split} --seed 1 --max_train_samples 9 --max_eval_samples 15"
    tokenizer = transformers.AutoTokenizer.from_pretrained(models["t5"])
    frame = drov.text_frame(tokenizer, True)
    encoding = partial(
        drov.encode, tokenizer=tokenizer, frame=frame, max_prompt_length=9, max_completion_length=9
    )
    args = drov.parse_args(["--dataset_name", str(tmp_path / "a.jsonl"), *limits.split()])
    sides, fold_of, manifest = drov.load_sides(args, encoding, "right")
    trained = [rewards[p] for p in sides["train"].prompts]
    assert len(trained) == manifest["train_rows"] == 8 and manifest["train_prompts"] == 4
    assert manifest["reward_mean"] == np.mean(trained) and manifest["reward_std"] == np.std(trained)
    assert 0 < np.mean(trained) < 1 and sides["eval"].rewards.min() > 1e5
    assert Counter(fold_of.values()) == {0: 2, 1: 2, 2: 2} and manifest["eval_rows"] == 12
    assert [len(fold) for fold in manifest["held_out"].values()] == [4, 4, 4]


def test_batches_are_one_endless_stream_and_pieces_lose_no_row():
    batches = [drov.step_rows(step, 10, 4, 0).tolist() for step in range(1, 6)]
    assert sorted(row for batch in batches for row in batch) == sorted([*range(10)] * 2)
    lengths = np.random.default_rng(0).integers(1, 100, size=(64, 2))
    pieces = drov.micro_batches(np.arange(64), lengths, 512)
    assert sorted(np.concatenate(pieces).tolist()) == list(range(64))
    for piece in pieces:
        padded = len(piece) * lengths[piece].max(0).sum()
        assert padded <= 512 and padded - lengths[piece].sum() <= 51.2


# ------------------------------------------------------------------------------------- the loop


@pytest.mark.parametrize("kind", ["t5", "llama"])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_cut_batch_has_the_gradient_of_the_whole(flags, loss, kind):
    more = f"{loss} --max_steps 1 --warmup_steps 0 --max_new_tokens 1"
    whole = step_gradients(flags(f"{more} --micro_batch_tokens 100000", kind, "whole"))
    cut = step_gradients(flags(f"{more} --micro_batch_tokens 1", kind, "cut"))
    assert whole.abs().max() > 1e-2
    torch.testing.assert_close(cut, whole, rtol=1e-3, atol=1e-5)


def test_one_batch_is_overfitted_a_hundredfold(flags, tmp_path):
    rates = "--learning_rate 1e-3 --value_learning_rate 1e-2"
    drov.main(flags(f"--overfit_one_batch --overfit_steps 150 {rates}", "llama"))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["last_loss"] < results["first_loss"] / 100
    assert not list((tmp_path / "run").glob("generations-*"))


def test_a_killed_and_a_stopped_run_go_on_to_the_bit(flags, tmp_path, capsys):
    more, kind = "--max_steps 30 --save_total_limit 3", "llama"
    drov.main(flags(more, kind, "whole"))
    whole, cut = tmp_path / "whole", tmp_path / "cut"

    def interrupt(command, signum, after):
        command = [sys.executable, drov.__file__, *command]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        while not (cut / f"checkpoint-{after}").exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.005)
        process.send_signal(signum)
        return process.communicate()[1], process.returncode

    _, code = interrupt(flags(more, kind, "cut"), signal.SIGKILL, after=4)
    assert code == -signal.SIGKILL
    said, code = interrupt(["--resume", str(cut)], signal.SIGTERM, after=10)
    assert code == 128 + signal.SIGTERM and f"go on with --resume {cut}" in said
    assert "--max_steps 31 (it was 30)" in fails(capsys, ["--resume", cut, "--max_steps", 31])
    assert "is not empty" in fails(capsys, flags(more, kind, "cut"))
    drov.main(["--resume", str(cut), "--save_total_limit", "2"])
    files = ("model.safetensors", "value_model/model.safetensors", "generations-30.jsonl")
    for file in (*files, "generations-0.jsonl"):
        assert (cut / file).read_bytes() == (whole / file).read_bytes(), file
    assert metrics(cut) == metrics(whole) and len(drov.checkpoints(cut)) == 2
    drov.main(["--resume", str(cut)])
    assert "is finished" in capsys.readouterr().out


def test_a_damaged_checkpoint_and_changed_data_are_named(flags, tmp_path, capsys):
    drov.main(flags())
    run, newest = tmp_path / "run", tmp_path / "run" / "checkpoint-4"
    (run / "results.json").unlink()
    for file in ("optimizer.pt", "value_model/model.safetensors", "model.safetensors"):
        (newest / file).write_bytes((newest / file).read_bytes()[:1000])
        error = fails(capsys, ["--resume", run])
        assert "checkpoint-4" in error and "goes on from checkpoint-2" in error
    rows = (tmp_path / "rows.jsonl").read_text()
    drov.shutil.rmtree(newest)
    (tmp_path / "rows.jsonl").write_text(rows.replace(WORDS[0], WORDS[1]))
    assert "the data have changed" in fails(capsys, ["--resume", run])
    (tmp_path / "rows.jsonl").write_text(rows)
    with drov.filelock.FileLock(run / ".lock"):
        assert "alive" in fails(capsys, ["--resume", run])
    drov.main(["--resume", str(run)])


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_out_of_memory_halves_the_budget_and_changes_no_number(flags, tmp_path, capsys, kind):
    more = "--micro_batch_tokens 400 --logging_steps 1 --max_new_tokens 1"
    drov.main(flags(more, kind, "plenty"))

    def full(module, args):
        words = isinstance(module, torch.nn.Embedding) and module.num_embeddings > 100
        if words and torch.is_grad_enabled() and args[0].numel() > 150:
            torch.empty(2**50)  # a true error of the allocator

    hook = torch.nn.modules.module.register_module_forward_pre_hook(full)
    drov.main(flags(more, kind, "little"))
    hook.remove()
    assert "out of memory: going on with --micro_batch_tokens" in capsys.readouterr().out
    plenty, little = (
        [line["loss"] for line in metrics(tmp_path / x) if "loss" in line]
        for x in ("plenty", "little")
    )
    assert plenty == pytest.approx(little, rel=1e-4)


def test_what_is_not_finite_and_what_is_random_ends_the_run_and_is_not_saved(
    flags, tmp_path, capsys
):
    more = "--optim adamw --learning_rate 1e37 --max_steps 10"
    assert "not finite by step" in fails(capsys, flags(more), code=1)
    for checkpoint in drov.checkpoints(tmp_path / "run").values():
        assert all(p.isfinite().all() for p in drov.load_policy(str(checkpoint))[0].parameters())
    noise = lambda module, args, out: (
        out + torch.randn_like(out) if type(module).__name__ == "LlamaMLP" else out
    )
    hook = torch.nn.modules.module.register_module_forward_hook(noise)
    assert "alike twice" in fails(capsys, flags(kind="llama", out="noisy"), code=1)
    hook.remove()


def test_rates_follow_their_flags_step_one_moves_and_bf16_starts_at_the_reference(
    flags, tmp_path, capsys
):
    for i, (more, expected) in enumerate((
        ("--bf16", [5e-4, 1e-3]),
        ("--bf16 --lr_scheduler_type linear --warmup_steps 0 --optim adamw", [8e-4, 2e-4]),
    )):  # fmt: skip
        more += " --value_learning_rate 2e-3 --logging_steps 1 --share_policy_and_value_backbone"
        drov.main(flags(f"{more} --gradient_checkpointing", "llama", out=f"run{i}"))
        lines = [line for line in metrics(tmp_path / f"run{i}") if "lr" in line]
        assert [lines[0]["lr"], lines[-1]["lr"]] == pytest.approx(expected)
        assert [x["value_lr"] for x in lines] == pytest.approx([2 * x["lr"] for x in lines])
        assert "value_grad_norm" not in lines[0]  # a shared backbone is clipped as one
        off = capsys.readouterr().out.split("log π/π_ref is ")[1].split()[0]
        assert 0 <= float(off) < 0.1


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_answers_depend_on_prompt_and_seed_alone_and_a_run_leaves_what_it_should(
    flags, tmp_path, kind
):
    model, tokenizer = drov.load_policy(flags(kind=kind)[3])
    model.generation_config.update(num_beams=3, repetition_penalty=9.0, do_sample=True)
    model.save_pretrained(tmp_path / "own"), tokenizer.save_pretrained(tmp_path / "own")
    more = "--split_mode prompt_fold --num_eval_folds 2 --eval_prompts_per_fold 3 --eval_fold_index all"
    drov.main(flags(f"{more} --max_steps 2", kind, out="a"))
    own = f"{more} --max_steps 0 --micro_batch_tokens 1 --model_name_or_path {tmp_path / 'own'}"
    drov.main(flags(own, kind, out="b"))
    drov.main(flags(f"{more} --max_steps 0 --temperature 0.3", kind, out="c"))
    assert answers(tmp_path / "a", 0) == answers(tmp_path / "b", 0) != answers(tmp_path / "c", 0)
    assert [line["fold"] for line in answers(tmp_path / "a", 2)] == [0, 0, 0, 1, 1, 1]
    loaded, tokenizer = drov.load_policy(str(tmp_path / "b"))
    assert loaded.generation_config.repetition_penalty == 9.0
    text = tokenizer.decode(
        loaded.generate(**tokenizer("say", return_tensors="pt"), max_new_tokens=3)[0]
    )
    assert isinstance(text, str)
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    assert 0 <= results["eval_pair_accuracy"] <= 1 and 0 <= results["finished"] <= 1
    zero, *_ = [line for line in metrics(tmp_path / "a") if "eval_loss" in line]
    assert (zero["eval_log_ratio_mean"], zero["eval_pair_accuracy"]) == (
        pytest.approx(0, abs=1e-5),
        0.5,
    )


# ------------------------------------------------------------------------------------ processes

SEVERAL = """
import json, os, sys, drov
for flags in json.load(open(sys.argv[1])):
    drov.main(flags)
"""


@pytest.mark.parametrize("processes", [3])
def test_processes_train_as_one_does_for_each_loss_and_kind_of_model(flags, tmp_path, processes):
    runs, several = [], []
    for kind in ("t5", "llama"):
        for loss in ("--value prompt", "--value batch", "--loss kto"):
            more = f"{loss} --max_steps 6 --save_steps 6 --max_eval_samples 3 --learning_rate 1e-4"
            name = f"{kind}{len(runs)}"
            drov.main(flags(f"{more} --per_device_train_batch_size 12", kind, f"one-{name}"))
            part = f"{more} --per_device_train_batch_size {12 // processes}"
            several.append(flags(part, kind, f"some-{name}"))
            runs.append((tmp_path / f"one-{name}", tmp_path / f"some-{name}"))
    (tmp_path / "all.json").write_text(json.dumps(several))
    (tmp_path / "several.py").write_text(SEVERAL)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    command = [sys.executable, *launcher, str(processes), str(tmp_path / "several.py")]
    where = os.environ | {"PYTHONPATH": str(Path(drov.__file__).parent)}
    done = subprocess.run(
        [*command, str(tmp_path / "all.json")],
        capture_output=True,
        text=True,
        env=where,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for one, some in runs:
        ours, theirs = (drov.load_file(folder / "model.safetensors") for folder in (one, some))
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-4)
        for ours, theirs in zip(metrics(one), metrics(some), strict=True):
            for name in ours.keys() - {"padding"}:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-2, abs=1e-3), name
        assert answers(one, 0) == answers(some, 0)
    (runs[0][1] / "results.json").unlink()
    with pytest.raises(SystemExit):
        drov.main(["--resume", str(runs[0][1])])  # one process, the batch of one of several
    factor = ["--gradient_accumulation_steps", str(processes)]
    drov.main(["--resume", str(runs[0][1]), *factor])


# ----------------------------------------------------------------------------- dice, comparison


def test_dice_is_measured_exactly_and_compared_by_its_true_reward(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(drov.DICE_SFT, "max_steps", 60)
    monkeypatch.setattr(drov, "NAMES", "Ada Emmy Kurt Sofia")
    folds = "--split_mode prompt_fold --num_eval_folds 2 --eval_prompts_per_fold 12"
    run = lambda name, more: drov.main(
        f"--dice {folds} --max_steps 25 --output_dir {tmp_path / name} {more}".split()
    )
    run("all", "--eval_fold_index all")
    assert "π*" in capsys.readouterr().out
    results = json.loads((tmp_path / "all" / "results.json").read_text())
    sft, policy, best = (results[name] for name in ("sft", "policy", "optimum"))
    assert sft["kl"] == 0 and sft["objective"] < policy["objective"] < best["objective"]
    share = (policy["objective"] - sft["objective"]) / (best["objective"] - sft["objective"])
    assert results["gain_share"] == pytest.approx(share) and 0 < share < 1
    for fold in (0, 1):
        run(f"fold{fold}", f"--eval_fold_index {fold}")
    both = [str(tmp_path / f"fold{fold}") for fold in (0, 1)]
    drov.main(["--compare", *both, "--output_dir", str(tmp_path / "versus")])
    rates = json.loads((tmp_path / "versus" / "win_rates.json").read_text())
    assert rates["prompts"] == 24 and set(rates["folds"]) == {"0", "1"} and rates["win_rate"] > 0.5
    drov.shutil.copytree(tmp_path / "all", tmp_path / "warm")
    args = (tmp_path / "warm" / "args.json").read_text()
    (tmp_path / "warm" / "args.json").write_text(
        args.replace('"temperature": 1.0', '"temperature": 0.5')
    )
    refused = lambda *names: fails(
        capsys,
        [
            "--compare",
            tmp_path / names[0],
            "--against",
            tmp_path / names[1],
            "--output_dir",
            tmp_path / "no",
        ],
    )
    assert "differ in ['temperature']" in refused("all", "warm")
    assert "not the same prompts" in refused("all", "fold0")
    assert "answered twice" in fails(capsys, ["--compare", both[0], both[0]])
    lines = (tmp_path / "all" / "generations-25.jsonl").read_text().splitlines(True)
    (tmp_path / "all" / "generations-25.jsonl").write_text("".join(lines[1:]))
    assert "23 answers, 1 fewer" in refused("all", "all")


def pairs_of(n, chance=0.5, seed=0):
    won, sides = np.random.default_rng(seed).random(n) < chance, ({}, {})
    for i, win in enumerate(won):
        for side, good in zip(sides, (win, not win), strict=True):
            side[f"prompt {i}"] = {
                "completions": [f"{'good' if good else 'bad'} {i}"],
                "fold": i % 2,
                "run": "a",
            }
    return drov.make_pairs(*sides), drov.make_pairs(*sides[::-1])


def test_swapping_the_sides_changes_no_pair_and_turns_the_rate_round():
    pairs, swapped = pairs_of(200, 0.7)
    seen = lambda pair: {name: x for name, x in pair.items() if name not in ("ours", "runs")}
    assert list(map(seen, pairs)) == list(map(seen, swapped))
    biased = np.array([float(int(drov.sha256(p["A"])[:4], 16) % 3 > 0) for p in pairs])
    there, back = drov.win_rates(pairs, biased), drov.win_rates(swapped, biased)
    assert there["win_rate"] == pytest.approx(1 - back["win_rate"])
    assert there["wins"] == back["losses"] and 60 < sum(p["ours"] == "A" for p in pairs) < 140


@pytest.mark.parametrize("p", [0.5, 0.9, 0.99])
def test_the_interval_covers_the_true_rate(p):
    covered = 0
    for seed in range(300):
        pairs, _ = pairs_of(100, p, seed)
        good = np.array([float(pair["A"].startswith("good")) for pair in pairs])
        low, high = drov.win_rates(pairs, good)["interval"]
        covered += low <= p <= high
    assert covered / 300 >= 0.90
    low, high = drov.win_rates(pairs[:5], np.array([p["ours"] == "A" for p in pairs[:5]]) * 1.0)[
        "interval"
    ]
    assert low < 0.6 and high == 1  # five verdicts that agree are no certainty


def test_verdicts_of_people_count_with_their_mean_and_wrong_ones_are_named(flags, tmp_path, capsys):
    drov.main(flags("--learning_rate 0.3", "llama"))  # far enough for other answers
    out, file = tmp_path / "versus", tmp_path / "v.jsonl"
    compare = ["--compare", str(tmp_path / "run"), "--output_dir", str(out)]
    drov.main(compare)
    key = [line for _, line in drov.read_jsonl(f"{out}/key.jsonl")]
    pairs = [line for _, line in drov.read_jsonl(f"{out}/pairs.jsonl")]
    assert [set(pair) for pair in pairs] == [{"id", "prompt", "A", "B"}] * 4
    mine = ["A" if line["A"] == str(tmp_path / "run") else "B" for line in key]
    texts = {line["prompt"]: line["completions"][0] for line in answers(tmp_path / "run", 4)}
    assert all(pair[x] == texts[pair["prompt"]] for pair, x in zip(pairs, mine, strict=True))
    mine, key = zip(
        *[(x, k) for x, k, p in zip(mine, key, pairs, strict=True) if p["A"] != p["B"]], strict=True
    )
    verdicts = [{"id": line["id"], "winner": x} for line, x in zip(key, mine, strict=True)]
    verdicts += [verdicts[0] | {"winner": "tie"}, {"id": "else", "winner": "tie"}]
    file.write_text("\ufeff" + "\n".join(map(json.dumps, verdicts)))
    drov.main([*compare, "--verdicts", str(file)])
    assert "have no verdict; unknown ids: 1" in capsys.readouterr().out
    rates = json.loads((out / "win_rates.json").read_text())
    scores = [0.75] + [1] * (len(key) - 1) + [0.5] * (4 - len(key))  # equal answers are a tie
    assert rates["win_rate"] == pytest.approx(np.mean(scores)) and rates["std"] is None
    file.write_text('{"id": "x", "winner": "tie"}\n{"id": "x", "winner": "C"}\n')
    assert "line 2 needs" in fails(capsys, [*compare, "--verdicts", file])
    file.write_text('{"id": "x", "winner": "tie"}\n')
    assert "no known verdict" in fails(capsys, [*compare, "--verdicts", file])


def test_a_model_judges_by_its_letters_and_must_hold_to_it_in_both_orders(tmp_path):
    pairs, _ = pairs_of(8)
    model, tokenizer = causal("phi"), tokenizer_of("chatml")
    args = drov.parse_args(["--compare", "x", "--judge_model", str(tmp_path)])
    tokenizer.save_pretrained(tmp_path), model.save_pretrained(tmp_path)
    with pytest.raises(drov.UserError, match="together"):  # it never learnt to answer
        drov.judge_by_model(args, pairs)
    a, b = (tokenizer.encode(x, add_special_tokens=False)[0] for x in "AB")
    frame = drov.text_frame(tokenizer, False)
    model.lm_head.bias.data[[a, b]] += 6
    model.lm_head.weight.data[[a, b]] *= 20
    model.save_pretrained(tmp_path)
    verdicts, kinds = drov.judge_by_model(args, pairs), set()
    for pair, verdict in zip(pairs, verdicts, strict=True):
        says = []
        for shown in (pair, pair | {"A": pair["B"], "B": pair["A"]}):
            text = drov.JUDGE_PROMPT.format_map(shown)
            (ids,), _ = drov.encode([text], ["A"], tokenizer, frame, 9999, 9999)
            logits = model(torch.tensor([ids])).logits[0, -1]
            says.append(bool(logits[a] > logits[b]))
        kinds.add(verdict)
        assert verdict == (0.5 if says[0] == says[1] else float(says[0]))
    assert 0.5 in kinds


# --------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--tau 0", "--tau must be a finite number > 0"),
        ("--learning_rate nan", "--learning_rate"),
        ("--max_steps 1.5", "--max_steps: invalid int value"),
        ("--unknown", "unrecognized arguments: --unknown"),
        ("--reward_key quality", "--reward_key"),
        ("--save_steps 3 --logging_steps 2", "no multiple"),
        ("--value batch --per_device_train_batch_size 1", "one row is too few"),
        ("--loss kto --value constant", "goes with --loss dro_v"),
        ("--value constant --share_policy_and_value_backbone", "goes with"),
        ("--verdicts v.jsonl", "go with --compare"),
        ("--resume nothing", "it is no run"),
        ("--compare nothing", "no finished run"),
        ("--split_mode prompt_fold --eval_prompts_per_fold 8 --eval_fold_index 5", "must be 0 to 4"),
        ("--num_eval_prompts 240", "cannot hold out 240 of 240 prompts"),
        ("--model_name_or_path nobody/nothing", "--dice needs no network"),
        ("--dataset_name nobody/nothing", "--dice needs none"),
        ("--dataset_name nothing.jsonl", "nothing.jsonl"),
        ("--max_prompt_length 1", "--max_prompt_length must be more"),
    ],
)  # fmt: skip
def test_a_wrong_flag_ends_in_one_line_and_claims_no_folder(
    flags, says, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    dice = [] if "--compare" in flags or "--resume" in flags else ["--dice"]
    out = [] if "--resume" in flags else ["--output_dir", tmp_path / "run"]
    assert says in fails(capsys, [*dice, *flags.split(), *out])
    assert not (tmp_path / "run").exists()


def test_a_wrong_model_ends_in_one_line(flags, models, tmp_path, capsys):
    model, tokenizer = drov.load_policy(models["llama"])

    def broken(name, change):
        folder = tmp_path / name
        model.save_pretrained(folder), tokenizer.save_pretrained(folder)
        change(folder)
        return fails(capsys, flags(f"--model_name_or_path {folder}"))

    weights = lambda folder: drov.load_file(folder / "model.safetensors")
    lacking = lambda f: drov.save_file(
        dict(list(weights(f).items())[3:]), f / "model.safetensors", {"format": "pt"}
    )
    cut = lambda f: (f / "model.safetensors").write_bytes(
        (f / "model.safetensors").read_bytes()[:5000]
    )
    assert "lacks" in broken("a", lacking) and "cannot load" in broken("b", cut)
    silent = lambda f: (
        [p.unlink() for p in f.glob("*token*")] + [p.unlink() for p in f.glob("*.jinja")]
    )
    assert "tokenizer" in broken("c", silent)
    small = causal("llama", vocab_size=100)
    assert "the model embeds 100" in broken("d", small.save_pretrained)
    short = causal("llama", max_position_embeddings=30)
    assert "30 positions" in broken("e", short.save_pretrained)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    assert "chat template" in broken("f", tokenizer.save_pretrained)


@pytest.mark.parametrize(("size", "says"), [("", 0), ("4", 2)])
def test_world_size_without_a_launcher_is_named(size, says):
    env = os.environ | {"WORLD_SIZE": size}
    command = [sys.executable, drov.__file__, "--resume", "nothing" if says else "x"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 2 and ("torchrun" in done.stderr) == bool(says), done.stderr
