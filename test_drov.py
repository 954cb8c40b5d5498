# SPDX-License-Identifier: Apache-2.0
"""What drov.py promises, a sentence a test. Everything is real, and small."""

import os

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # subprocesses inherit them

import contextlib
import io
import json
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import datasets
import filelock
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch.nn.modules import module as hooks
from torch.optim.optimizer import register_optimizer_step_pre_hook as before_steps

import drov

COLUMNS = ("prompt", "completion", "reward")
each, approx, close = pytest.mark.parametrize, pytest.approx, torch.testing.assert_close
# fmt: off
SMALL = {  # for every family, by its own names; with dropout, which drov.py switches off
    "vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "attention_dropout": 0.5,
    "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
    "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_start_token_id": 0,
    "ffn_dim": 48, "word_embed_proj_dim": 16, "state_size": 4,
}
FLAGS = """--dataset_name rows.jsonl --num_eval_prompts 4 --per_device_train_batch_size 8 --max_steps 4
    --learning_rate 1e-3 --warmup_steps 2 --logging_steps 2 --save_steps 2 --max_new_tokens 8
    --max_grad_norm 1 --model_name_or_path"""
INST = "<s>[INST] {{ messages[0].content }} [/INST]{{ messages[1].content }}</s>"
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
# fmt: on
save = lambda folder, *parts: [part.save_pretrained(folder) for part in parts]
args_of = lambda flags: drov.parse_args(flags.split())
main = lambda flags: drov.main(flags.split())
flags = lambda more="", kind="t5", out="run": f"{FLAGS} {kind} --output_dir {out} {more}"
run = lambda more="", kind="t5", out="run": main(flags(more, kind, out))
read_json = lambda path: json.loads(Path(path).read_text())
read_lines = lambda path: [line for _, line in drov.read_file(str(path))]
write_lines = lambda path, rows: Path(path).write_text("\n".join(map(json.dumps, rows)))


def model_of(family, **more):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **SMALL | more)
    kinds = (transformers.AutoModelForCausalLM, transformers.AutoModelForSeq2SeqLM)
    return kinds[config.is_encoder_decoder].from_config(config)


def tokenizer_of(kind):
    """A real tokenizer: bytes (ByT5's), end (adds nothing), bos (in front), inst (template, EOS),
    chatml (template, a turn's end of its own), unigram (T5's way)."""
    if kind == "bytes":
        return transformers.ByT5Tokenizer()
    special = ["<pad>", "</s>", "<unk>", "<s>", "<|im_start|>", "<|im_end|>"]
    tokens, pad = [*special, "▁", *sorted(pre_tokenizers.ByteLevel.alphabet())], "</s>"
    tok = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    if kind == "unigram":
        pad, tok = "<pad>", Tokenizer(models.Unigram([(token, -1.0) for token in tokens], 2))
        tok.pre_tokenizer, tok.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        tok.normalizer = normalizers.NFKC()
    tok.add_special_tokens([*special, "<image>"])  # as Gemma 3, whose model embeds none
    around = {"unigram": "$A </s>", "bos": "<s> $A", "inst": "<s> $A"}.get(kind, "$A")
    tok.post_processor = processors.TemplateProcessing(around, None, [("</s>", 1), ("<s>", 3)])
    names = {"eos_token": "</s>", "unk_token": "<unk>", "bos_token": "<s>", "pad_token": pad}
    names |= {"chat_template": {"inst": INST, "chatml": CHATML}.get(kind), "model_max_length": 16}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tok, **names)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Where a user is: a T5, a Llama with a chat template, answers rated by their length."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    save("t5", model_of("t5"), tokenizer_of("bytes"))
    save("llama", model_of("llama", vocab_size=263), tokenizer_of("chatml"))
    texts = ["".join(rng.choice(list("abc de"), rng.integers(2, 12))) + "." for _ in range(60)]
    rows = zip([f"say {i % 30}" for i in range(60)], texts, map(len, texts))
    write_lines("rows.jsonl", [dict(zip(COLUMNS, row)) for row in rows])


def fails(flags, code=2, main=drov.main):
    """Runs drov.py, which must end with `code` and one line; that line."""
    with contextlib.redirect_stderr(io.StringIO()) as stderr, pytest.raises(SystemExit) as caught:
        main(flags.split())
    says = stderr.getvalue()
    assert (caught.value.code, says[:16], says.count("\n")) == (code, "drov.py: error: ", 1), says
    return says


def begin(more="", kind="t5"):
    """A run before its first step."""
    with contextlib.ExitStack() as locks:
        return drov.start(args_of(flags(more, kind)), locks)


# --------------------------------------------------------------------------------------- losses
@each("tau", [0.1, 1.0, 5.0])
def test_gradients_are_eq_7_and_eq_8_over_tau_and_kto_is_as_defined(tau):
    torch.manual_seed(0)
    logps, ref_logps, values, r = torch.randn(4, 6, dtype=torch.float64)
    inputs = logps.requires_grad_(), values.requires_grad_()
    *losses, residual = drov.dro_v_loss(logps, ref_logps, values, r, tau)
    gradients = partial(torch.autograd.grad, inputs=inputs, allow_unused=True)
    (policy, none), (no_other, value) = (gradients(loss.mean()) for loss in losses)
    ratio, v = (logps - ref_logps).detach(), values.detach()
    eq_7 = v - r + tau * ratio  # ∇V = 1
    eq_8 = -tau * ((r - v) - tau / 2 * 2 * ratio)  # ∇log π = 1, ∇(log π/π_ref)² = 2 log π/π_ref
    assert none is no_other is None
    with pytest.raises(ValueError, match="values"):
        drov.dro_v_loss(logps, ref_logps, values[:, None], r, tau)
    close((policy, value, residual), (eq_8 / tau / 6, eq_7 / 6, -eq_7), rtol=1e-12, atol=1e-12)
    margins = [(x - 0.3) * (1 if y > 0 else -1) for x, y in zip(ratio.tolist(), r)]
    kto = drov.kto_loss(ratio, torch.zeros(6), r > 0, torch.tensor(0.3), tau)
    assert kto.tolist() == approx([1 - 1 / (1 + np.exp(-tau * x)) for x in margins])


@each(("tau", "printed", "ends_there"), [(0.5, False, True), (0.5, True, False), (1.0, True, True)])
def test_descent_ends_at_eq_2_and_of_algorithm_1_as_printed_only_at_tau_1(tau, printed, ends_there):
    torch.manual_seed(1)
    draw = partial(torch.randn, 3, 4, dtype=torch.float64)  # 3 prompts × 4 completions
    ref_logps, rewards, mu = draw().log_softmax(-1), draw(), draw().sigmoid() + 0.2  # uneven
    logits, values = ref_logps.clone().requires_grad_(), draw()[:, :1].requires_grad_()
    for _ in range(1500):
        logps = logits.log_softmax(-1)
        loss, value_loss, _ = drov.dro_v_loss(logps, ref_logps, values, rewards, tau)
        if printed:  # −(∇log π (r − V) − ½ ∇(log π/π_ref)²): the square has lost its τ
            loss = 0.5 * (logps - ref_logps).square() - logps * (rewards - values.detach())
        loss = ((loss + value_loss) * mu / mu.sum(-1, keepdim=True)).sum()
        for x, gradient in zip((logits, values), torch.autograd.grad(loss, (logits, values))):
            x.data -= 0.7 * gradient
    exact = tau * torch.logsumexp(ref_logps + rewards / tau, -1, keepdim=True)
    policy = (ref_logps + (rewards - exact) / tau).exp()
    off = [(logits.softmax(-1) - policy).abs().max().item(), (values - exact).abs().max().item()]
    assert max(off) < 1e-3 if ends_there else min(off) > 0.03


# --------------------------------------------------------------------------------------- models
@each("family", ["t5", "bart", "llama", "qwen2", "gemma2", "mistral", "gpt_neox", "gpt2", "phi",
                 "opt", "bloom", "mamba"])  # fmt: skip
def test_logps_and_values_are_those_of_a_row_alone_one_token_after_the_other(family):
    model = model_of(family, **{"sliding_window": 4} if family == "gemma2" else {}).eval()
    x, y = ([[*range(9 * n, 10 * n)] for n in sizes] for sizes in ((3, 9, 1, 5), (4, 1, 7, 5)))
    seq2seq, expected = model.config.is_encoder_decoder, [0.0] * 4
    side = drov.Side(["p"] * 4, x, y, torch.zeros(4), "right" if seq2seq else "left")
    for i, (prompt, completion) in enumerate(zip(x, y, strict=True)):
        for t, token in enumerate(completion):
            inputs = {"input_ids": prompt if seq2seq else prompt + completion[:t]}
            inputs |= {"decoder_input_ids": [0, *completion[:t]]} if seq2seq else {}
            logits = model(**{name: torch.tensor([ids]) for name, ids in inputs.items()}).logits
            expected[i] += logits[0, -1].log_softmax(-1)[token].item()
    logps = drov.sequence_logps(model, side.batch(np.arange(4)))
    close(logps, torch.tensor(expected), rtol=1e-4, atol=1e-4)  # float32
    V, names = drov.ValueModel(model), ("input_ids", "attention_mask")
    value = lambda *rows: V(*map(side.batch(np.array(rows)).get, names))
    assert value(0, 1, 2, 3).tolist() == [0.0] * 4
    for parameter in V.parameters():  # away from the two equal heads
        parameter.data += 0.1 * torch.randn_like(parameter)
    close(torch.cat([value(i) for i in range(4)]), value(0, 1, 2, 3), rtol=1e-4, atol=1e-5)
    assert value(0).abs() > 1e-3


@each(("kind", "prompt", "answer"), [
    ("end", "say abc", "abc</s>"), ("bos", "<s>say abc", "abc</s>"), ("bytes", "say abc</s>", "abc</s>"),
    ("inst", "<s>[INST] say abc [/INST]", "abc</s>"), ("unigram", "say abc</s>", "abc</s>"),
    ("chatml", "<|im_start|>user\nsay abc<|im_end|>\n<|im_start|>assistant\n", "abc<|im_end|>"),
])  # fmt: skip
def test_texts_stand_in_the_models_frame_end_once_and_spell_no_special_token(kind, prompt, answer):
    tokenizer, counts, long = tokenizer_of(kind), Counter(), "abc dea " * 9
    frame = json.loads(json.dumps(drov.text_frame(tokenizer, kind in ("unigram", "bytes"))))
    (x,), (y,) = drov.encode(["say abc"], ["abc"], tokenizer, frame, 99, 99)
    assert [tokenizer.decode(ids) for ids in (x, y)] == [prompt, answer]
    (before, behind), body = frame["prompt"], tokenizer.encode(long, add_special_tokens=False)
    room = len(before + behind) + 3
    (x,), (y,) = drov.encode([long], [long], tokenizer, frame, room, 5, counts)
    assert x == [*before, *body[-3:], *behind] and y == body[:5]  # its beginning, and no end
    spelt = "<s>a</s><pad><|im_end|>"
    _, ((*body, end),) = drov.encode(["abc"], [f"{spelt}＜/s＞"], tokenizer, frame, 99, 99, counts)
    special = set(drov.special_tokens(tokenizer).values()) - {tokenizer.unk_token_id}
    assert [end] == frame["completion"][1] and not special & set(body)
    assert tokenizer.decode(body).replace(" ", "").startswith(spelt)
    assert [counts[x] for x in ("cut_prompts", "cut_completions", "special_spellings")] == [1, 1, 1]


# ----------------------------------------------------------------------------------------- data
TRICKY = ["4", "007", "NA", "null", "1945-05-01", "true", '"so"', "a\u2028b\x85c", "x" * 200_000]


@each("name", ["a.jsonl", "mine[12]*.json", "b.csv", "c.parquet"])
def test_texts_and_rewards_are_read_as_they_stand(tmp_path, name, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    rewards, file = [True, False, 3e-11, 1, 2.5, 0, -1, 7, 5e-12], Path(name)
    columns = {"prompt": [f" p{i}\n" for i in range(9)], "completion": TRICKY, "reward": rewards}
    rows = [dict(zip(columns, row)) | {"extra": row[1:]} for row in zip(*columns.values())]
    table = datasets.Dataset.from_dict(columns | {"reward": [float(r) for r in rewards]})
    if "json" in name:
        lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        file.write_text(json.dumps(rows) if file.suffix == ".json" else f"\ufeff{lines}")
    else:
        (table.to_csv if file.suffix == ".csv" else table.to_parquet)(file)
    triplets = drov.load_triplets(args_of(f"--dataset_name ~/{name}"))
    assert triplets["completion"][:] == TRICKY and triplets["reward"][:] == table["reward"][:]
    assert triplets["prompt"][0] == "p0"


def test_unusable_rows_are_counted_by_cause_and_messages_and_ultrafeedback_understood():
    turn = lambda role, text: [{"role": role, "content": text}]
    answer = {"response": "x", "overall_score": 7.5, "annotations": {"honesty": {"Rating": "4"}}}
    unrated = answer | {"overall_score": None, "annotations": {"honesty": {"Rating": "N/A"}}}
    plain, dropped = {"prompt": "p", "completion": "c", "reward": 1}, Counter()
    causes = {
        "prompt that is not one user turn": plain | {"prompt": turn("user", "p") * 2},
        "completion that is not one assistant turn": plain | {"completion": turn("user", "c")},
        "completion that is not text": plain | {"completion": 6},
        "text that is no valid Unicode": plain | {"prompt": "p\ud83c"},
        "reward that is not finite": plain | {"reward": np.nan},
        "without a reward that is a number": {"instruction": "u", "completions": [answer, unrated]},
        "without a completion": {"instruction": "u", "completions": []},
    }
    chat = {"prompt": turn("user", "p"), "completion": turn("assistant", "c"), "reward": "true"}
    write_lines("a.jsonl", [chat, *causes.values()])
    load = lambda more="": drov.load_triplets(args_of(f"--dataset_name a.jsonl {more}"), dropped)
    assert load().to_list() == [plain, {"prompt": "u", "completion": "x", "reward": 7.5}]
    assert dropped == dict.fromkeys(causes, 1)
    assert load("--reward_key honesty")["reward"][1] == 4.0


FOLDS = {"seed": 1, "num_eval_prompts": 3, "num_eval_folds": 3, "eval_prompts_per_fold": 4}


@each("mode", ["prompt_seeded", "prompt_fold"])
def test_splits_are_disjoint_repeatable_and_blind_to_the_order_of_rows(mode):
    prompts, how = [f"prompt {i % 40}" for i in range(120)], {"eval_fold_index": 0} | FOLDS
    split = lambda prompts, **more: drov.split_prompts(prompts, mode, **how | more)
    train, held_out = split(prompts)
    assert (train, held_out) == split(prompts[::-1]) == split(sorted(prompts))
    assert sorted(train + held_out) == sorted(set(prompts))
    assert held_out != split(prompts, seed=2)[1]
    if mode == "prompt_fold":
        one, two, three = (split(prompts, eval_fold_index=fold)[1] for fold in range(3))
        assert split(prompts, eval_fold_index="all")[1] == one + two + three
        assert len(set(one + two + three)) == 12


def test_statistics_are_the_training_sides_and_limits_keep_whole_prompts_by_hash():
    rewards = {f"p{i}": i // 10 for i in range(20)}  # sorted by rating
    _, held_out = drov.split_prompts(rewards, "prompt_fold", eval_fold_index="all", **FOLDS)
    rewards |= dict.fromkeys(held_out, 1e6)
    rows = [(x, y, rewards[x]) for x in rewards for y in "ab"]
    write_lines("rows.jsonl", [dict(zip(COLUMNS, row)) for row in rows])
    more = FOLDS | {"split_mode": "prompt_fold", "eval_fold_index": "all"}
    more |= {"max_train_samples": 9, "max_eval_samples": 15}
    state = begin(" ".join(f"--{name} {x}" for name, x in more.items()))
    train, manifest = state.sides["train"], state.manifest
    trained = np.array([rewards[prompt] for prompt in train.prompts])
    mean, std = manifest["reward_mean"], manifest["reward_std"]
    assert (mean, std) == (trained.mean(), trained.std()) and 0 < mean < 1
    assert train.rewards.tolist() == approx((trained - mean) / std)
    assert state.sides["eval"].rewards.min() > 1e5
    assert Counter(state.fold_of.values()) == {0: 2, 1: 2, 2: 2}
    assert [manifest[name] for name in ("train_rows", "train_prompts", "eval_rows")] == [8, 4, 12]
    assert [len(fold) for fold in manifest["held_out"].values()] == [4, 4, 4]


def test_batches_are_one_endless_stream_and_pieces_lose_no_row():
    batches = [drov.step_rows(step, 10, 4, 0) for step in range(1, 6)]
    assert sorted(np.concatenate(batches)) == sorted([*range(10)] * 2)
    lengths = np.random.default_rng(0).integers(1, 100, size=(64, 2))
    pieces = drov.micro_batches(np.arange(64), lengths, 512)
    assert sorted(np.concatenate(pieces)) == list(range(64))
    padded = np.array([len(piece) * lengths[piece].max(0).sum() for piece in pieces])
    tokens = np.array([lengths[piece].sum() for piece in pieces])
    assert (padded <= 512).all() and (padded - tokens <= 51.2).all()


# ------------------------------------------------------------------------------------- the loop
@each("kind", ["t5", "llama"])
@each("loss", ["--value prompt", "--value constant", "--value batch", "--loss kto", "--loss sft"])
def test_a_step_has_its_losss_gradient_whole_or_cut_and_after_out_of_memory(capsys, loss, kind):
    more = "--tau 0.5 --learning_rate 0 --value_learning_rate 0 --overfit_one_batch"
    state, found, full = begin(f"{more} --overfit_steps 3 {loss}", kind), [], [50]
    groups = [group["params"] for group in state.optimizer.param_groups]
    gradient = lambda: torch.cat([p.grad.flatten() for group in groups for p in group])

    def record(*_):  # the same batch in each step: whole, row by row, and until memory runs out
        found.append(gradient())
        state.args.micro_batch_tokens = (1, 100, 100)[len(found) - 1]

    def fill(module, _):  # once, when a piece of the third step has left its gradient
        if len(found) == 2 and full and getattr(module, "sparse", 0) and module.weight.grad.any():
            torch.empty(2 ** full.pop())  # a true error of the allocator

    drov.fix_reference(state)
    for parameter in [p for group in groups for p in group]:  # away from π_ref and from V = 0
        parameter.data += 0.05 * torch.randn_like(parameter)
    side, other = state.sides["train"], state.sides.get("mismatched")
    if other:
        other.ref_logps -= 2  # a KL above 0
    with before_steps(record), hooks.register_module_forward_pre_hook(fill):
        drov.train(state)
    assert "out of memory: going on with --micro_batch_tokens" in capsys.readouterr().out
    rows = drov.step_rows(1, state.manifest["train_rows"], 8, 42)
    batch, r = side.batch(rows), side.rewards[rows]
    logps = drov.sequence_logps(state.policy, batch)
    ref_logps = None if loss == "--loss sft" else side.ref_logps[rows]
    if loss == "--loss sft":
        losses = -8 * logps / (batch["labels"] != -100).sum()
    elif loss == "--loss kto":
        kl = (drov.score(state, other, rows)[0] - other.ref_logps[rows]).mean()
        assert kl > 0
        losses = drov.kto_loss(logps, ref_logps, r > r.mean(), kl, 0.5)
    elif loss == "--value batch":  # DRO-P: ½ Var(r − τ log π/π_ref) / τ
        losses = (r - 0.5 * (logps - ref_logps)).var(correction=0)
    else:
        values = state.value_model(batch["input_ids"], batch["attention_mask"])
        losses = sum(drov.dro_v_loss(logps, ref_logps, values, r, 0.5)[:2])
    losses.mean().backward()
    for group in groups:  # each network is clipped by itself
        torch.nn.utils.clip_grad_norm_(group, 1)
    assert gradient().abs().max() > 1e-3
    close(found, [gradient()] * 3, rtol=1e-3, atol=1e-5)


def test_one_batch_is_overfitted_a_hundredfold():
    more = "--overfit_one_batch --overfit_steps 150 --per_device_train_batch_size 4"
    run(f"{more} --learning_rate 3e-3 --value_learning_rate 1e-2", "llama")
    results = read_json("run/results.json")
    assert results["last_loss"] < results["first_loss"] / 100


def metrics(folder):
    clock = {"step_seconds", "tokens_per_second", "reference_seconds", "padding"}
    return [{k: x[k] for k in x.keys() - clock} for x in read_lines(f"{folder}/metrics.jsonl")]


def test_a_killed_and_a_stopped_run_go_on_to_the_bit_and_what_stands_in_the_way_is_named(capsys):
    more = ("--max_steps 30 --save_steps 4 --save_total_limit 3", "llama")
    signals = [signal.SIGTERM]
    run(*more, "whole")
    process = subprocess.Popen([sys.executable, drov.__file__, *flags(*more, "cut").split()])
    while not Path("cut/checkpoint-4").exists():
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    with before_steps(lambda *_: signal.raise_signal(signals.pop()) if signals else None):
        assert "go on with --resume cut" in fails("--resume cut", 128 + signal.SIGTERM)
    assert "--max_steps 31 (it was 30)" in fails("--resume cut --max_steps 31")
    assert "is not empty" in fails(flags(*more, "cut"))
    main("--resume cut --save_total_limit 2")
    weights = ["value_model/model.safetensors", "model.safetensors"]
    for file in (*weights, "generations-0.jsonl", "generations-30.jsonl"):
        assert Path("cut", file).read_bytes() == Path("whole", file).read_bytes(), file
    assert metrics("cut") == metrics("whole") and list(drov.checkpoints(Path("cut"))) == [28, 30]
    main("--resume cut")
    assert "is finished" in capsys.readouterr().out
    Path("cut/results.json").unlink()
    read_last_first = ("optimizer.pt", weights[0], "metrics.jsonl", weights[1])
    for file in (Path("cut/checkpoint-30", name) for name in read_last_first):
        file.write_bytes(file.read_bytes()[:1000])
        says = fails("--resume cut")
        assert "checkpoint-30" in says and "goes on from checkpoint-28" in says
    shutil.rmtree("cut/checkpoint-30")
    Path("cut/reference_logps.safetensors").unlink()
    assert "π_ref with it" in fails("--resume cut")
    write_lines("rows.jsonl", read_lines("rows.jsonl")[::-1])
    assert "the data have changed" in fails("--resume cut")
    Path("cut/prompt_split_manifest.json").unlink()
    assert "put it back" in fails("--resume cut")
    with filelock.FileLock("cut/.lock"):
        assert "alive" in fails("--resume cut")


def test_what_is_not_finite_and_what_is_random_ends_the_run_and_is_not_saved():
    says = fails(flags("--optim adamw --learning_rate 1e37 --max_steps 10"), code=1)
    assert "not finite by step 2" in says and not list(Path("run").glob("checkpoint-*"))
    noisy = lambda module, out: "MLP" in type(module).__name__ and out.requires_grad
    noise = lambda module, _, out: out + torch.randn_like(out) if noisy(module, out) else None
    with hooks.register_module_forward_hook(noise):
        assert "alike twice" in fails(flags("", "llama", "noisy"), code=1)
    model = model_of("t5")
    model.shared.weight.data[7] = np.nan
    save("t5", model)
    assert "not finite: the model" in fails(flags("--max_steps 0", out="nan"), code=1)


@each(("more", "ends"), [
    ("", (5e-4, 1e-3)), ("--lr_scheduler_type linear --warmup_steps 0 --optim adamw", (8e-4, 2e-4)),
])  # fmt: skip
def test_rates_follow_their_flags_with_a_shared_backbone_in_bf16(more, ends):
    more += " --share_policy_and_value_backbone --gradient_checkpointing --bf16 --logging_steps 1"
    run(f"{more} --value_learning_rate 2e-3", "llama")
    lines = [line for line in metrics("run") if "lr" in line]
    assert [lines[0]["lr"], lines[-1]["lr"]] == approx(ends)
    assert [x["value_lr"] for x in lines] == approx([2 * x["lr"] for x in lines])
    policy, value = (load_file(f"run/{x}model.safetensors") for x in ("", "value_model/"))
    assert policy["model.norm.weight"].equal(value["body.norm.weight"])  # one backbone for both


@each("kind", ["t5", "llama"])
def test_answers_depend_on_prompt_and_seed_alone_and_a_run_leaves_what_it_should(kind):
    own = drov.load_policy(kind)
    own[0].generation_config.update(num_beams=3, repetition_penalty=9.0, do_sample=True)
    save("own", *own)
    more = "--split_mode prompt_fold --num_eval_folds 2 --eval_prompts_per_fold 3"
    more += " --eval_fold_index all --max_steps"
    run(f"{more} 2", kind, "a")
    run(f"{more} 0 --micro_batch_tokens 1", "own", "b")
    run(f"{more} 0 --temperature 0.3", kind, "c")
    ours, same, cold = (read_lines(f"{out}/generations-0.jsonl") for out in "abc")
    assert ours == same != cold
    assert [line["fold"] for line in read_lines("a/generations-2.jsonl")] == [0, 0, 0, 1, 1, 1]
    assert drov.load_policy("b")[0].generation_config.repetition_penalty == 9.0


def test_held_out_numbers_are_what_they_are_called():
    state = begin("--tau 0.5")
    side = state.sides["eval"]
    side.ref_logps = drov.score(state, side)[0]
    drov.evaluate(state)
    side.ref_logps = side.ref_logps - side.rewards  # now log π/π_ref = r, and V = 0
    drov.evaluate(state)
    (start, line), r = metrics("run"), side.rewards.double().numpy()
    assert (start["eval_log_ratio_mean"], start["eval_pair_accuracy"]) == (0, 0.5)
    names = ("pair_accuracy", "log_ratio_mean", "loss", "residual_std", "value_explained_variance")
    expected = (1, r.mean(), 0.5 * np.square(0.5 * r).mean(), 0.5 * r.std(), 0)
    assert [line[f"eval_{name}"] for name in names] == approx(expected, rel=1e-4, abs=1e-4)


# ------------------------------------------------------------------------------------ processes
@each("processes", [3])
def test_processes_train_as_one_does_for_each_loss_and_kind_of_model(processes):
    more = "--max_steps 6 --save_steps 6 --max_eval_samples 3 --learning_rate 1e-4"
    losses = [f"{more} {loss}" for loss in ("--value prompt", "--value batch", "--loss kto")]
    runs = [(loss, kind) for kind in ("t5", "llama") for loss in losses]
    size = lambda n, i, loss, kind: (f"{loss} --per_device_train_batch_size {n}", kind, i)
    some = [flags(*size(12 // processes, f"some{i}", *run)) for i, run in enumerate(runs)]
    Path("several.py").write_text(f"import drov\nfor x in {some}:\n    drov.main(x.split())\n")
    launcher = f"-m torch.distributed.run --standalone --nproc_per_node {processes} several.py"
    env = os.environ | {"PYTHONPATH": str(Path(drov.__file__).parent)}
    subprocess.run([sys.executable, *launcher.split()], env=env, check=True)
    for i, (loss, kind) in enumerate(runs):
        run(*size(12, f"one{i}", loss, kind))
        pairs = [load_file(f"{out}{i}/model.safetensors") for out in ("one", "some")]
        close(*pairs, rtol=0, atol=1e-4)
        for ours, theirs in zip(metrics(f"one{i}"), metrics(f"some{i}"), strict=True):
            assert ours == approx(theirs, rel=1e-2, abs=1e-3)
        one, some = (read_lines(f"{out}{i}/generations-0.jsonl") for out in ("one", "some"))
        assert one == some
    Path("some0/results.json").unlink()
    assert "a step has 12 rows" in fails("--resume some0")  # one process, the batch of several
    main(f"--resume some0 --gradient_accumulation_steps {processes}")


@each(("size", "says"), [("", "it is no run"), ("4", "torchrun")])
def test_world_size_without_a_launcher_is_named(size, says, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", size)
    assert says in fails("--resume nothing", main=runpy.run_path(drov.__file__)["main"])


# ----------------------------------------------------------------------------- dice, comparison
def test_dice_is_measured_exactly_and_compared_by_its_true_reward(monkeypatch):
    monkeypatch.setitem(drov.DICE_SFT, "max_steps", 40)
    monkeypatch.setattr(drov, "NAMES", "Ada Emmy Kurt Sofia")
    more = "--max_steps 20 --split_mode prompt_fold --num_eval_folds 2 --eval_prompts_per_fold 12"
    main(f"--dice {more} --eval_fold_index all --output_dir all")
    results = read_json("all/results.json")
    sft, policy, best = (results[name]["objective"] for name in ("sft", "policy", "optimum"))
    assert results["sft"]["kl"] == 0 and sft < policy < best
    for fold in (0, 1):
        more += f" --model_name_or_path all/sft --eval_fold_index {fold} --output_dir fold{fold}"
        main(f"--dice {more}")
    main("--compare fold0 fold1 --output_dir versus")
    rates = read_json("versus/win_rates.json")
    assert rates["prompts"] == 24 and set(rates["folds"]) == {"0", "1"} and rates["win_rate"] > 0.5
    args = Path(shutil.copytree("all", "warm"), "args.json")
    args.write_text(args.read_text().replace('"temperature": 1.0', '"temperature": 0.5'))
    assert "differ in ['temperature']" in fails("--compare all --against warm")
    assert "not the same prompts" in fails("--compare all --against fold0")
    assert "behind --against" in fails("--compare fold0 fold0")
    write_lines("all/generations-20.jsonl", read_lines("all/generations-20.jsonl")[1:])
    assert "23 answers, 1 fewer" in fails("--compare all")


def pairs_of(n, chance=0.5, seed=0):
    """Pairs of which ours is the good one by chance, and the same with the sides swapped."""
    ours, theirs = {}, {}
    for i, win in enumerate(np.random.default_rng(seed).random(n) < chance):
        for side, answer in zip((ours, theirs), ("good", "bad") if win else ("bad", "good")):
            side[f"prompt {i}"] = {"completions": [f"{answer} {i}"], "fold": i % 2, "run": "a"}
    return drov.make_pairs(ours, theirs), drov.make_pairs(theirs, ours)


@each("p", [0.5, 0.9, 0.99])
def test_the_interval_covers_the_true_rate_and_swapping_the_sides_turns_it_round(p):
    good = lambda pairs: np.array([float(pair["A"].startswith("good")) for pair in pairs])
    rates = lambda pairs: drov.win_rates(pairs, good(pairs))
    seen = lambda pairs: [[pair[name] for name in ("id", "prompt", "A", "B")] for pair in pairs]
    intervals = [rates(pairs_of(100, p, seed)[0])["interval"] for seed in range(200)]
    assert np.mean([low <= p <= high for low, high in intervals]) >= 0.90
    low, high = rates(pairs_of(5, 1.0)[0])["interval"]
    assert low < 0.6 and high == 1  # five that agree are no certainty
    pairs, swapped = pairs_of(200, p)
    assert seen(pairs) == seen(swapped) and 60 < sum(pair["ours"] == "A" for pair in pairs) < 140
    assert rates(pairs)["win_rate"] == approx(1 - rates(swapped)["win_rate"])


def test_verdicts_of_people_count_with_their_mean_and_wrong_ones_are_named(capsys):
    run("--learning_rate 0.3", "llama")  # far enough for other answers
    compare = "--compare run --output_dir versus"
    main(compare)
    pairs, key = read_lines("versus/pairs.jsonl"), read_lines("versus/key.jsonl")
    assert [set(pair) for pair in pairs] == [{"id", "prompt", "A", "B"}] * 4
    texts = {x["prompt"]: x["completions"][0] for x in read_lines("run/generations-4.jsonl")}
    mine = {line["id"]: "A" if line["A"] == "run" else "B" for line in key}
    assert all(pair[mine[pair["id"]]] == texts[pair["prompt"]] for pair in pairs)
    wins = [{"id": x["id"], "winner": mine[x["id"]]} for x in pairs if x["A"] != x["B"]]
    unknown = {"id": "else", "winner": "tie"}
    write_lines("v.jsonl", [*wins, wins[0] | {"winner": "tie"}, unknown])
    main(f"{compare} --verdicts v.jsonl")
    assert "lack a verdict; unknown ids: 1" in capsys.readouterr().out
    rates, score = read_json("versus/win_rates.json"), len(wins) - 0.25 + 0.5 * (4 - len(wins))
    assert rates["win_rate"] == score / 4 and rates["std"] is None  # equal answers are a tie
    for last, says in ((unknown, "no known verdict"), ({"id": "x", "winner": "C"}, "line 2 needs")):
        write_lines("v.jsonl", [unknown, last])
        assert says in fails(f"{compare} --verdicts v.jsonl")


def test_a_model_judges_by_its_letters_and_must_hold_to_it_in_both_orders():
    (pairs, _), model, tokenizer = pairs_of(8), model_of("phi").eval(), tokenizer_of("chatml")
    args = drov.parse_args(["--judge_model", "judge", "--compare", "x"])
    save("judge", model, tokenizer)
    with pytest.raises(drov.UserError, match="together"):  # it never learnt to answer
        drov.judge_by_model(args, pairs)
    letters = [tokenizer.encode(x, add_special_tokens=False)[0] for x in "AB"]
    orders = [shown for x in pairs for shown in (x, x | {"A": x["B"], "B": x["A"]})]
    texts = [drov.JUDGE_PROMPT.format_map(shown) for shown in orders]
    ids, _ = drov.encode(texts, ["A"], tokenizer, drov.text_frame(tokenizer, False), 9999, 9999)
    model.lm_head.bias.data[letters] += 6  # now it does, and what it reads tells
    model.lm_head.weight.data[letters] *= 20
    for parameter in model.model.parameters():
        parameter.data *= 3
    margins = [model(torch.tensor([text])).logits[0, -1, letters] for text in ids]
    margins = torch.stack([a - b for a, b in margins])
    bias = margins.median() + 0.1  # half of the time A
    model.lm_head.bias.data[letters[0]] -= bias.item()
    save("judge", model)
    says = (margins < bias).view(-1, 2)
    expected = [0.5 if first == second else float(second) for first, second in says.tolist()]
    assert drov.judge_by_model(args, pairs).tolist() == expected and {0.5} < set(expected)


# --------------------------------------------------------------------------------------- errors
GOOD = b'{"prompt": "a", "completion": "b", "reward": 1}\n'
CSV = b"prompt,completion,reward\na,b,1\n"


@each(("name", "content", "says"), [
    ("a.jsonl", GOOD + b"null\n", "line 2: None is no JSON object"), ("a.txt", b"PAR", "is none"),
    ("a.jsonl", GOOD * 2 + b'{"prompt": "caf\xe9"}\n', "line 3 is not UTF-8"),
    ("a.jsonl", b"", "has the columns []: it needs prompt, completion and reward"),
    ("a.jsonl", b'{"prompt": "a", "answer": "b"}', "['answer', 'prompt']: it needs prompt"),
    ("a.jsonl", GOOD + GOOD.replace(b'"a"', b'"c"'), "all equal but for rounding"),
    ("a.jsonl", GOOD.replace(b'"b"', b'""'), "no usable row"), ("a.json", GOOD, "is no JSON object"),
    ("a.csv", CSV + b"a,b,c,1\n", "line 3"), ("a.csv", CSV + b"a,b\n", "line 3"),
    ("a.csv", CSV.replace(b"reward", b"prompt"), "a column twice"),
    ("a.csv", CSV + b'a,"b \\"c, d\\" e",1\n', "line 3"), ("a.parquet", b"PAR", "cannot load"),
])  # fmt: skip
def test_a_broken_file_ends_in_one_line_that_names_the_place(name, content, says):
    Path(name).write_bytes(content)
    assert says in fails(f"--dice --num_eval_prompts 1 --dataset_name {name} --output_dir run")
    assert not Path("run").exists()


@each(("flags", "says"), [
    ("--tau 0", "--tau must be a number > 0"), ("--learning_rate nan", "--learning_rate"),
    ("--unknown", "unrecognized arguments: --unknown"), ("--verdicts v.jsonl", "go with --compare"),
    ("--save_steps 3 --logging_steps 2", "no multiple"), ("--compare nothing", "no finished run"),
    ("--value batch --per_device_train_batch_size 1", "one row is too few"),
    ("--loss kto --value constant", "goes with --loss dro_v"), ("--dataset_name no.jsonl", "no.jsonl"),
    ("--value constant --share_policy_and_value_backbone", "goes with"),
    ("--split_mode prompt_fold --eval_prompts_per_fold 8 --eval_fold_index 5", "must be 0 to 4"),
    ("--num_eval_prompts 240", "cannot hold out 240 of 240 different prompts"),
    ("--model_name_or_path nobody/nothing", "--dice needs no network"),
    ("--dataset_name nobody/nothing", "--dice needs none"),
    ("--max_prompt_length 1", "--max_prompt_length must be more"),
])  # fmt: skip
def test_a_wrong_flag_ends_in_one_line_and_claims_no_folder(flags, says):
    assert says in fails(f"--dice {flags} --output_dir run") and not Path("run").exists()


LLAMA, BERT = Path("llama"), transformers.BertConfig(**SMALL)
WEIGHTS = LLAMA / "model.safetensors"


@each(("says", "change"), [
    ("30 positions", lambda: save(LLAMA, model_of("llama", max_position_embeddings=30))),
    ("the model embeds 100", lambda: save(LLAMA, model_of("llama", vocab_size=100))),
    ("lacks", lambda: save_file(dict([*load_file(WEIGHTS).items()][3:]), WEIGHTS, {"format": "pt"})),
    ("cannot load", lambda: WEIGHTS.write_bytes(WEIGHTS.read_bytes()[:5000])),
    ("chat template", lambda: (LLAMA / "chat_template.jinja").write_text("{{ messages[0].content }}")),
    ("tokenizer", lambda: (shutil.rmtree(LLAMA), save(LLAMA, model_of("llama")))),
    ("reads what is to come", lambda: save(LLAMA, transformers.BertForMaskedLM(BERT))),
])  # fmt: skip
def test_a_wrong_model_ends_in_one_line(says, change):
    change()
    assert says in fails(flags("", "llama"))


def test_a_t5_without_a_start_token_starts_with_its_pad_and_says_so(capsys):
    config = read_json("t5/config.json") | {"decoder_start_token_id": None}
    Path("t5/config.json").write_text(json.dumps(config))
    run("--max_steps 1 --loss sft")
    assert "names no start token: the pad token, 0" in capsys.readouterr().out
