# SPDX-License-Identifier: Apache-2.0
"""What drov.py promises, a sentence a test. Everything is real, and small."""

import os

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # subprocesses inherit them

import contextlib
import io
import json
import shutil
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
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch.optim.optimizer import register_optimizer_step_pre_hook as before_steps

import drov

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
CHATML = """{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"""
TEMPLATES = {"chatml": CHATML, "dated": "{{ strftime_now('%d %b %Y') }}" + CHATML}
TEMPLATES["inst"] = """<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]\
{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"""
# fmt: on
main = lambda flags: drov.main(flags.split())
args_of = lambda flags: drov.parse_args(flags.split())
flags = lambda more="", kind="t5", out="run": f"{FLAGS} {kind} --output_dir {out} {more}"
run = lambda more="", kind="t5", out="run": main(flags(more, kind, out))
read_json = lambda path: json.loads(Path(path).read_text())
read_lines = lambda path: list(drov.read_file(path))
write_lines = lambda path, rows: Path(path).write_text("\n".join(map(json.dumps, rows)))


def model_of(family, **more):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **SMALL | more)
    kinds = (transformers.AutoModelForCausalLM, transformers.AutoModelForSeq2SeqLM)
    return kinds[config.is_encoder_decoder].from_config(config).eval()


def tokenizer_of(kind):
    """A real tokenizer: bytes (ByT5's), end (adds nothing), bos (in front), inst (template, EOS),
    chatml and dated (templates with a turn's end of their own), unigram (T5's way)."""
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
    tok.add_special_tokens(special)
    around = {"unigram": "$A </s>", "bos": "<s> $A", "inst": "<s> $A"}.get(kind, "$A")
    tok.post_processor = processors.TemplateProcessing(around, None, [("</s>", 1), ("<s>", 3)])
    names = {"eos_token": "</s>", "unk_token": "<unk>", "bos_token": "<s>", "pad_token": pad}
    names |= {"chat_template": TEMPLATES.get(kind), "model_max_length": 16}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tok, **names)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Where a user is: a T5, a Llama with a chat template, answers rated by their length."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    rng = np.random.default_rng(0)
    for name, family, kind, size in (("t5", "t5", "bytes", 384), ("llama", "llama", "chatml", 263)):
        model_of(family, vocab_size=size).save_pretrained(name)
        tokenizer_of(kind).save_pretrained(name)
    texts = ["".join(rng.choice(list("abc de"), rng.integers(2, 12))) + "." for _ in range(60)]
    rows = [{"prompt": f"say {i % 30}", "completion": y} for i, y in enumerate(texts)]
    write_lines("rows.jsonl", [row | {"reward": len(row["completion"])} for row in rows])


def fails(flags, code=2):
    """Runs drov.py, which must end with `code` and one line; that line."""
    with contextlib.redirect_stderr(io.StringIO()) as stderr, pytest.raises(SystemExit) as caught:
        main(flags)
    says = stderr.getvalue()
    assert (caught.value.code, says[:16], says.count("\n")) == (code, "drov.py: error: ", 1), says
    return says


def begin(more="", kind="t5"):
    """A run before its first step, without what it says."""
    state = drov.begin(args_of(flags(more, kind)), None)
    drov.make_networks(state)
    return state


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
    margins = [(x - 0.3) * (1 if y > 0 else -1) for x, y in zip(ratio.tolist(), r, strict=True)]
    kto = drov.kto_loss(ratio, torch.zeros(6), r > 0, torch.tensor(0.3), tau)
    assert kto.tolist() == approx([1 - 1 / (1 + np.exp(-tau * x)) for x in margins])


@each("family", ["t5", "bart", "llama", "qwen2", "gemma2", "gpt_neox", "gpt2", "opt", "bloom",
                 "mamba"])  # fmt: skip
def test_logps_and_values_are_those_of_a_row_alone_one_token_after_the_other(family):
    model = model_of(family, **{"sliding_window": 4} if family == "gemma2" else {})
    x, y = ([np.arange(9 * n, 10 * n) for n in sizes] for sizes in ((3, 9, 1, 5), (4, 1, 7, 5)))
    seq2seq = model.config.is_encoder_decoder
    rows = drov.Rows(["p"] * 4, x, y, torch.zeros(4), seq2seq, torch.zeros(4))
    expected = [0.0] * 4
    for i, (prompt, completion) in enumerate(zip(map(list, x), map(list, y), strict=True)):
        for t, token in enumerate(completion):
            inputs = {"input_ids": prompt if seq2seq else prompt + completion[:t]}
            inputs |= {"decoder_input_ids": [0, *completion[:t]]} if seq2seq else {}
            logits = model(**{name: torch.tensor([ids]) for name, ids in inputs.items()}).logits
            expected[i] += logits[0, -1].log_softmax(-1)[token].item()
    logps = drov.sequence_logps(model, rows.batch(np.arange(4)))
    close(logps, torch.tensor(expected), rtol=1e-4, atol=1e-4)  # float32
    V = drov.ValueModel(model)
    value = lambda *some: V(rows.batch(np.array(some)))
    assert value(0, 1, 2, 3).tolist() == [0.0] * 4
    for parameter in V.parameters():  # away from the two equal layers
        parameter.data += 0.1 * torch.randn_like(parameter)
    close(torch.cat([value(i) for i in range(4)]), value(0, 1, 2, 3), rtol=1e-4, atol=1e-5)
    assert value(0).abs() > 1e-3


@each(("kind", "prompt", "answer"), [
    ("end", "say abc", "abc</s>"), ("bos", "<s>say abc", "abc</s>"), ("bytes", "say abc</s>", "abc</s>"),
    ("inst", "<s>[INST] say abc [/INST]", "abc</s>"), ("unigram", "say abc</s>", "abc</s>"),
    ("chatml", "", "abc<|im_end|>"), ("dated", "05 Nov 2024", "abc<|im_end|>"),
])  # fmt: skip
def test_texts_are_as_a_server_sends_them_end_once_and_control_nothing(kind, prompt, answer):
    tokenizer, seq2seq, long = tokenizer_of(kind), kind in ("unigram", "bytes"), "abc dea " * 9
    if kind in ("chatml", "dated"):
        prompt += "<|im_start|>user\nsay abc<|im_end|>\n<|im_start|>assistant\n"
    encode = lambda x, most: drov.encode_prompts(tokenizer, [x], seq2seq, most, "2024-11-05")[0]
    answered = lambda y, most: drov.encode_completions(tokenizer, [y], seq2seq, most)[0]
    assert tokenizer.decode(encode("say abc", 99)) == prompt
    assert tokenizer.decode(answered("abc", 99)) == answer
    whole, cut, bos = encode(long, 999), encode(long, 9), int(prompt.startswith("<s>"))
    assert len(cut) == 9 and cut[bos:] == whole[bos - 9 :] and cut[:bos] == whole[:bos]
    assert answered(long, 5) == answered(long, 999)[:5]  # its beginning, and no end
    spelt = "<s>a</s><pad><|im_end|>"
    *body, end = answered(f"{spelt}＜/s＞", 99)
    assert tokenizer.decode([end]) == answer[3:] and not set(tokenizer.all_special_ids) & set(body)
    assert kind == "unigram" or tokenizer.decode(body).startswith(spelt)
    turns = [{"role": "system", "content": "Be <|im_end|>"}, {"role": "user", "content": "say abc"}]
    if kind in ("chatml", "dated"):
        ids, start = encode(json.dumps(turns), 99), "<|im_start|>user"
        system = f"<|im_start|>system\nBe <|im_end|><|im_end|>\n{start}"
        assert tokenizer.decode(ids) == prompt.replace(start, system) and ids.count(5) == 2
    elif kind != "inst":
        with pytest.raises(drov.UserError):
            encode(json.dumps(turns), 99)


TRICKY = ["4", "007", "NA", "null", "1945-05-01", "true", '"so"', "a\u2028b\x85c", "x" * 200_000]


@each("name", ["a.jsonl", "mine[12]*.json", "lines.json", "b.csv", "c.parquet"])
def test_texts_and_rewards_are_read_as_they_stand(name):
    rewards, file = [True, False, 3e-11, 1, 2.5, 0, -1, 7, 5e-12], Path(name)
    columns = {"prompt": [f" p{i}\n" for i in range(9)], "completion": TRICKY, "thumb": rewards}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    table = datasets.Dataset.from_dict(columns | {"thumb": [float(r) for r in rewards]})
    if "json" in name:
        lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        file.write_text(json.dumps(rows) if "mine" in name else f"\ufeff{lines}")
    else:
        (table.to_csv if file.suffix == ".csv" else table.to_parquet)(file)
    triplets = drov.load_triplets(args_of(f"--reward_key thumb --dataset_name ~/{name}"))
    assert triplets == [(f"p{i}", TRICKY[i], float(rewards[i])) for i in range(9)]


def test_unusable_rows_are_counted_by_cause_and_conversations_and_ultrafeedback_understood():
    chat = [{"role": role, "content": "a"} for role in ("system", "user", "assistant", "user")]
    plain = {"prompt": "p", "completion": "c", "reward": "true"}
    good = [plain | {"prompt": x} for x in (chat[1:2], chat, json.dumps(chat, indent=1))]
    answers = [{"response": "x", "overall_score": 7.5, "my": 4}, {"response": "y", "my": 4}]
    rated = {"instruction": "u", "completions": answers}
    wrong = [{"prompt": chat[:3]}, {"prompt": []}, {"prompt": "p\ud83c"}, {"completion": chat}]
    wrong += [{"completion": 6}, {"completion": " "}, {"reward": np.nan}, {"reward": "good"}]
    write_lines("a.jsonl", [*good, rated, *[plain | x for x in wrong]])
    dropped = Counter()
    first, *both, last = drov.load_triplets(args_of("--dataset_name a.jsonl"), dropped)
    assert first == ("a", "c", 1.0) and last == ("u", "x", 7.5)
    assert both[0] == both[1] and json.loads(both[0][0]) == chat
    assert dropped == {"prompt": 3, "completion": 3, "reward": 3}
    write_lines("a.jsonl", [rated])
    assert len(drov.load_triplets(args_of("--dataset_name a.jsonl --reward_key my"))) == 2


FOLDS = {"seed": 1, "num_eval_prompts": 3, "num_eval_folds": 3, "eval_prompts_per_fold": 4}


def test_splits_are_disjoint_repeatable_and_blind_to_the_order_of_rows():
    prompts = [f"prompt {i % 40}" for i in range(120)]
    split = lambda some, mode, fold, **x: drov.split_prompts(
        some, mode, eval_fold_index=fold, **FOLDS | x
    )
    for mode in ("prompt_seeded", "prompt_fold"):
        train, held_out = split(prompts, mode, 0)
        assert (train, held_out) == split(prompts[::-1], mode, 0)
        assert sorted(train + held_out) == sorted(set(prompts))
        assert held_out != split(prompts, mode, 0, seed=2)[1]
    folds = [prompt for fold in range(3) for prompt in split(prompts, mode, fold)[1]]
    assert split(prompts, mode, "all")[1] == folds and len(set(folds)) == 12


def test_statistics_are_the_training_sides_and_limits_keep_whole_prompts_by_hash():
    rewards = {f"p{i}": i // 10 for i in range(20)}  # sorted by rating
    _, held_out = drov.split_prompts(rewards, "prompt_fold", eval_fold_index="all", **FOLDS)
    rewards |= dict.fromkeys(held_out, 1e6)
    rows = [{"prompt": x, "completion": y, "reward": rewards[x]} for x in rewards for y in "ab"]
    write_lines("rows.jsonl", rows)
    more = FOLDS | {"split_mode": "prompt_fold", "eval_fold_index": "all"}
    more |= {"max_train_samples": 9, "max_eval_samples": 15, "max_completion_length": 1}
    state = begin(" ".join(f"--{name} {x}" for name, x in more.items()))
    train, manifest = state.data["train"], state.manifest
    trained = np.array([rewards[prompt] for prompt in train.prompts])
    mean, std = manifest["reward_mean"], manifest["reward_std"]
    assert (mean, std) == (trained.mean(), trained.std()) and 0 < mean < 1
    assert train.rewards.tolist() == approx((trained - mean) / std)
    assert state.data["eval"].rewards.min() > 1e5 and manifest["cut_completions"] == 1
    assert [manifest[name] for name in ("train_rows", "train_prompts", "eval_rows")] == [8, 4, 12]
    assert [(fold, len(x)) for fold, x in manifest["held_out"].items()] == [(i, 2) for i in "012"]


@each("kind", ["t5", "llama"])
@each("loss", ["--value prompt", "--value constant", "--value batch", "--loss kto", "--loss sft"])
def test_a_step_has_its_losss_gradient_whole_and_cut(loss, kind):
    more = "--tau 0.5 --learning_rate 0 --value_learning_rate 0 --overfit_one_batch"
    state, found = begin(f"{more} --overfit_steps 2 {loss}", kind), []
    groups = [group["params"] for group in state.optimizer.param_groups]
    gradient = lambda: torch.cat([p.grad.flatten() for group in groups for p in group])

    def record(*_):  # the same batch in each step: whole, then row by row
        found.append(gradient())
        state.args.micro_batch_tokens = 1

    drov.score_reference(state)
    for parameter in [p for group in groups for p in group]:  # away from π_ref and from V = 0
        parameter.data += 0.05 * torch.randn_like(parameter)
    rows, other = state.data["train"], state.data.get("mismatched")
    if other:
        other.ref_logps -= 2  # a KL above 0
    with before_steps(record):
        drov.train(state)
    chosen = drov.step_rows(1, len(rows.x), 8, 42)
    batch, r = rows.batch(chosen), rows.rewards[chosen]
    logps, ref_logps = drov.sequence_logps(state.policy, batch), rows.ref_logps[chosen]
    if loss == "--loss sft":
        losses = -8 * logps / sum(len(rows.y[row]) for row in chosen)
    elif loss == "--loss kto":
        kl = (drov.score(state, other, chosen)[0] - other.ref_logps)[chosen].mean()
        assert kl > 0
        losses = drov.kto_loss(logps, ref_logps, r > r.mean(), kl, 0.5)
    elif loss == "--value batch":  # DRO-P: ½ Var(r − τ log π/π_ref) / τ
        losses = (r - 0.5 * (logps - ref_logps)).var(correction=0)
    else:
        losses = sum(drov.dro_v_loss(logps, ref_logps, state.value_model(batch), r, 0.5)[:2])
    state.optimizer.zero_grad()
    losses.mean().backward()
    for group in groups:  # each network is clipped by itself
        torch.nn.utils.clip_grad_norm_(group, 1)
    assert gradient().abs().max() > 1e-3
    close(found, [gradient()] * 2, rtol=1e-3, atol=1e-5)


def metrics(folder):
    clock = {"step_seconds", "tokens_per_second", "reference_seconds"}
    return [{k: x[k] for k in x.keys() - clock} for x in read_lines(f"{folder}/metrics.jsonl")]


def test_one_batch_is_overfitted_a_hundredfold():
    more = "--overfit_one_batch --overfit_steps 150 --per_device_train_batch_size 4"
    run(f"{more} --learning_rate 3e-3 --value_learning_rate 1e-2 --logging_steps 1", "llama")
    losses = [line["loss"] for line in metrics("run") if "loss" in line]
    assert len(losses) == 150 and losses[-1] < losses[0] / 100


@each(("kind", "signum"), [("t5", signal.SIGKILL), ("llama", signal.SIGKILL), ("t5", signal.SIGINT)])  # fmt: skip
def test_a_killed_run_goes_on_to_the_bit_and_another_run_is_refused(kind, signum):
    more = ("--max_steps 30 --save_steps 4 --logging_steps 3 --save_total_limit 3", kind)
    run(*more, "whole")
    command = [sys.executable, drov.__file__, *flags(*more, "cut").split()]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not Path("cut/checkpoint-4").exists():
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signum)
    _, says = process.communicate()
    if signum == signal.SIGINT:
        assert process.returncode == 130 and says.count("\n") == 1 and "--resume cut" in says
    assert "max_steps was 30" in fails("--resume cut --max_steps 31")
    assert "is not empty" in fails(flags(*more, "cut"))
    main("--resume cut --save_total_limit 2")
    answers = ("generations-0.jsonl", "generations-30.jsonl")
    for file in ("value_model.safetensors", "model.safetensors", *answers):
        assert Path("cut", file).read_bytes() == Path("whole", file).read_bytes(), file
    assert metrics("cut") == metrics("whole")
    kept = [path.name for path in drov.checkpoints(args_of("--output_dir cut"))]
    assert kept == ["checkpoint-28", "checkpoint-30"]
    main("--resume cut")  # it is finished
    Path("cut/results.json").unlink()
    file = Path("cut/checkpoint-30/model.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    assert "checkpoint-30" in fails("--resume cut")
    shutil.rmtree("cut/checkpoint-30")
    Path("cut/reference_logps.safetensors").unlink()
    assert "π_ref with it" in fails("--resume cut")
    write_lines("rows.jsonl", read_lines("rows.jsonl")[::-1])
    assert "the data are not those" in fails("--resume cut")


def test_what_is_not_finite_ends_the_run_and_is_not_saved():
    says = fails(flags("--optim adamw --learning_rate 1e9 --max_steps 10"), code=1)
    assert "not finite" in says and not list(Path("run").glob("checkpoint-*"))
    assert "not finite" in fails("--resume run", code=1)


def test_the_same_command_gives_the_same_answers_with_a_shared_backbone_and_in_bf16():
    more = "--split_mode prompt_fold --num_eval_folds 2 --eval_prompts_per_fold 3 --optim adamw"
    more += " --eval_fold_index all --share_policy_and_value_backbone --bf16 --max_steps"
    for kind in ("t5", "llama"):
        for out, more_still in {"a": "2", "b": "0", "c": "0 --temperature 0"}.items():
            run(f"{more} {more_still}", kind, kind + out)
        ours, same, greedy = (read_lines(f"{kind}{out}/generations-0.jsonl") for out in "abc")
        assert ours == same != greedy
        folds = [line["fold"] for line in read_lines(f"{kind}a/generations-2.jsonl")]
        assert folds == [0, 0, 0, 1, 1, 1]
    policy, value = (load_file(f"llamaa/{x}model.safetensors") for x in ("", "value_"))
    assert policy["model.norm.weight"].equal(value["body.norm.weight"])  # one backbone for both


def test_held_out_numbers_are_what_they_are_called():
    state = begin("--tau 0.5")
    rows = state.data["eval"]
    rows.ref_logps = drov.score(state, rows)[0]
    drov.evaluate(state)
    rows.ref_logps = rows.ref_logps - rows.rewards  # now log π/π_ref = r, and V = 0
    drov.evaluate(state)
    start, line = metrics("run")
    assert (start["eval_log_ratio_mean"], start["eval_pair_accuracy"]) == (0, 0.5)
    assert "eval_reward_correlation" not in start
    r = rows.rewards.double().numpy()
    expected = {"pair_accuracy": 1, "log_ratio_mean": r.mean(), "reward_correlation": 1}
    expected |= {"loss": 0.5 * np.square(0.5 * r).mean(), "residual_std": 0.5 * r.std()}
    expected |= {"value_explained_variance": 0, "residual_mean": 0.5 * r.mean()}
    found = {name[5:]: x for name, x in line.items() if name != "step"}
    assert found == approx(expected, rel=1e-4, abs=1e-4)


def test_processes_train_as_one_does_for_each_loss_and_kind_of_model():
    more = "--max_steps 6 --save_steps 6 --max_eval_samples 3 --learning_rate 1e-4"
    losses = [f"{more} {loss}" for loss in ("--value prompt", "--value batch", "--loss kto")]
    runs = [(loss, kind) for kind in ("t5", "llama") for loss in losses]
    size = lambda n, i, loss, kind: (f"{loss} --per_device_train_batch_size {n}", kind, i)
    some = [flags(*size(6, f"some{i}", *run)) for i, run in enumerate(runs)]
    Path("several.py").write_text(f"import drov\nfor x in {some}:\n    drov.main(x.split())\n")
    launcher = "-m torch.distributed.run --standalone --nproc_per_node 2 several.py"
    env = os.environ | {"PYTHONPATH": str(Path(drov.__file__).parent)}
    subprocess.run([sys.executable, *launcher.split()], env=env, check=True)
    for i, (loss, kind) in enumerate(runs):
        run(*size(12, f"one{i}", loss, kind))
        pairs = [load_file(f"{out}{i}/model.safetensors") for out in ("one", "some")]
        close(*pairs, rtol=0, atol=1e-4)
        for ours, theirs in zip(metrics(f"one{i}"), metrics(f"some{i}"), strict=True):
            assert ours == approx(theirs, rel=1e-2, abs=1e-3)
    Path("some0/results.json").unlink()
    assert "train_batch_size was 12" in fails("--resume some0")  # one process, half of the batch
    main("--resume some0 --gradient_accumulation_steps 2")


@pytest.fixture(scope="session", autouse=True)
def dice(tmp_path_factory):
    """The example, beside the other tests; its folder."""
    folder = tmp_path_factory.mktemp("dice") / "run"
    command = [sys.executable, drov.__file__, "--dice", "--output_dir", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    yield lambda: process.wait() or folder
    process.kill()


def test_verdicts_count_with_their_mean_and_what_does_not_compare_is_refused():
    run("--learning_rate 0.3", "llama")  # far enough for other answers
    compare = "--compare run --output_dir versus"
    main(compare)
    pairs, ours = read_lines("versus/pairs.jsonl"), read_lines("run/generations-4.jsonl")
    assert [set(pair) for pair in pairs] == [{"id", "prompt", "A", "B"}] * 4
    texts = {x["prompt"]: x["completion"] for x in ours}
    mine = {x["id"]: "A" if x["A"] == texts[x["prompt"]] else "B" for x in pairs}
    wins = [{"id": x["id"], "winner": mine[x["id"]]} for x in pairs if x["A"] != x["B"]]
    write_lines("v.jsonl", [*wins, wins[0] | {"winner": "tie"}, {"id": "else", "winner": "tie"}])
    main(f"{compare} --verdicts v.jsonl")
    rates, score = read_json("versus/win_rates.json"), len(wins) - 0.25 + 0.5 * (4 - len(wins))
    assert rates["win_rate"] == score / 4 and rates["std"] is None  # equal answers are a tie
    assert rates["mean_characters"][0] == np.mean([len(x["completion"]) for x in ours])
    low, high = drov.win_rates(np.ones(5), np.arange(5))["interval"]
    assert 0.5 < low < 0.6 and high == 1  # Wilson's: five that agree are no certainty
    sides = [{x["prompt"]: x for x in read_lines(f"run/generations-{i}.jsonl")} for i in (4, 0)]
    there, back = drov.make_pairs(*sides), drov.make_pairs(*sides[::-1])
    assert all(x | {"ours": y["ours"]} == y for x, y in zip(there, back, strict=True))
    write_lines("v.jsonl", [{"id": "else", "winner": "C"}])
    assert "no verdict" in fails(f"{compare} --verdicts v.jsonl")
    run("--temperature 0.5", "llama", "warm")
    assert "do not compare" in fails("--compare run --against warm")
    assert "answers a prompt again" in fails("--compare run run")


def test_dice_come_to_the_optimum_that_is_known(dice):
    results = read_json(dice() / "results.json")
    assert results["gain_share"] >= 0.98 and results["policy"]["valid"] >= 0.95
    assert results["value_rmse"] < 0.15 and results["sft"]["kl"] == 0


GOOD = b'{"prompt": "a", "completion": "b", "reward": 1}\n'
CSV = b"prompt,completion,reward\na,b,1\n"


@each(("name", "content", "says"), [
    ("a.jsonl", GOOD + b"null\n", "line 2: None is no object"), ("a.parquet", b"PAR", "cannot load"),
    ("a.jsonl", GOOD * 2 + b'{"prompt": "caf\xe9"}\n', "line 3 is not UTF-8"),
    ("a.jsonl", b"", "0 triplets"), ("a.jsonl", b'{"prompt": "a", "label": 1}', "--reward_key"),
    ("a.jsonl", GOOD + GOOD.replace(b'"a"', b'"c"'), "but for rounding"),
    ("a.csv", CSV + b"a,b,c,1\n", "line 3"), ("a.csv", CSV + b"a,b\n", "line 3"),
    ("a.csv", CSV + b'a,"b \\"c, d\\" e",1\n', "line 3"), ("a.json", b"[1]", "1 is no object"),
])  # fmt: skip
def test_a_broken_file_ends_in_one_line_that_names_the_place(name, content, says):
    Path(name).write_bytes(content)
    assert says in fails(f"--dice --num_eval_prompts 1 --dataset_name {name} --output_dir run")
    assert not Path("run").exists()


@each(("more", "says"), [
    ("--tau 0", "--tau 0.0 is out of range"), ("--learning_rate nan", "--learning_rate"),
    ("--unknown", "unrecognized arguments: --unknown"), ("--verdicts v.jsonl", "--compare"),
    ("--compare nothing", "finished run"), ("--eval_fold_index 1", "goes with --split_mode"),
    ("--value batch --per_device_train_batch_size 1", "one row"), ("--resume no", "a run's folder"),
    ("--loss kto --value constant", "go with --loss dro_v"), ("--dataset_name no.jsonl", "no.jsonl"),
    ("--split_mode prompt_fold --eval_prompts_per_fold 4 --eval_fold_index 5", "must be 0 to 4"),
    ("--num_eval_prompts 30", "cannot hold out 30 of 30 different prompts"),
    ("--model_name_or_path nobody/no", "nobody/no"), ("--dataset_name nobody/no", "nobody/no"),
])  # fmt: skip
def test_a_wrong_flag_ends_in_one_line_and_claims_no_folder(more, says):
    assert says in fails(f"{flags()} {more}") and not Path("run").exists()
