# SPDX-License-Identifier: Apache-2.0
"""What drov.py promises, a sentence a test. Everything is real, and small."""

import os

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # subprocesses inherit them

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch.optim.optimizer import register_optimizer_step_pre_hook as before_steps

import drov

each, approx, close = pytest.mark.parametrize, pytest.approx, torch.testing.assert_close
# fmt: off
SMALL = {  # for every family, by its own names; with dropout, which drov.py switches off
    "vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "d_kv": 8, "d_ff": 48,
    "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "attention_dropout": 0.5, "encoder_layers": 2,
    "d_model": 32, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "decoder_layers": 2, "ffn_dim": 48,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "decoder_start_token_id": 0, "word_embed_proj_dim": 16}
FLAGS = """--dataset_name rows.jsonl --num_eval_prompts 4 --per_device_train_batch_size 8 --max_steps 4 --learning_rate 1e-3
    --warmup_steps 2 --logging_steps 2 --save_steps 2 --max_new_tokens 8 --max_grad_norm 1 --model_name_or_path"""
CHATML = """{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"""
USER, MODEL = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
TEMPLATES = {"chatml": CHATML, "dated": "{{ strftime_now('%d %b %Y') }}" + CHATML}
TEMPLATES["inst"] = """<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"""
main = lambda flags: drov.main(flags.split())
args_of = lambda flags: drov.parse_args(flags.split())
flags = lambda more="", kind="t5", out="run": f"{FLAGS} {kind} --output_dir {out} {more}"
run = lambda more="", kind="t5", out="run": main(flags(more, kind, out))
read_lines = lambda path: list(drov.read_file(path))
CLOCK = {"step_seconds", "tokens_per_second", "reference_seconds"}
metrics = lambda out: [{k: x[k] for k in x.keys() - CLOCK} for x in read_lines(f"{out}/metrics.jsonl")]
write_lines = lambda path, rows: Path(path).write_text("\n".join(map(json.dumps, rows)))
# fmt: on


def model_of(family, **more):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **SMALL | more)
    kinds = (transformers.AutoModelForCausalLM, transformers.AutoModelForSeq2SeqLM)
    return kinds[config.is_encoder_decoder].from_config(config).eval()


def tokenizer_of(kind):
    if kind == "bytes":
        return transformers.ByT5Tokenizer()
    special = ["<pad>", "</s>", "<unk>", "<s>", "<|im_start|>", "<|im_end|>"]
    tokens = [*special, "▁", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tok = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    if kind == "unigram":
        tok = Tokenizer(models.Unigram([(token, -1.0) for token in tokens], 2))
        tok.pre_tokenizer, tok.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tok.add_special_tokens(special)
    around = {"unigram": "$A </s>", "bos": "<s> $A", "inst": "<s> $A"}.get(kind, "$A")
    tok.post_processor = processors.TemplateProcessing(around, None, [("</s>", 1), ("<s>", 3)])
    names = {"eos_token": "</s>", "unk_token": "<unk>", "bos_token": "<s>", "pad_token": "<pad>"}
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
    with contextlib.redirect_stderr(io.StringIO()) as stderr, pytest.raises(SystemExit) as caught:
        main(flags)
    says = stderr.getvalue()
    assert (caught.value.code, says[:16], says.count("\n")) == (code, "drov.py: error: ", 1), says
    return says


@each("tau", [0.1, 1.0, 5.0])
def test_gradients_are_eq_7_and_eq_8_over_tau_and_kto_is_as_defined(tau):
    torch.manual_seed(0)
    logps, ref_logps, values, r = torch.randn(4, 6, dtype=torch.float64)
    inputs = logps.requires_grad_(), values.requires_grad_()
    *losses, residual = drov.dro_v_loss(logps, ref_logps, values, r, tau)
    grads = [torch.autograd.grad(x.mean(), inputs, allow_unused=True) for x in losses]
    assert grads[0][1] is grads[1][0] is None  # each loss moves its own network alone
    ratio, v = (logps - ref_logps).detach(), values.detach()
    eq_7 = v - r + tau * ratio  # ∇V = 1
    eq_8 = -tau * ((r - v) - tau / 2 * 2 * ratio)  # ∇log π = 1, ∇(log π/π_ref)² = 2 log π/π_ref
    found = (grads[0][0], grads[1][1], residual)
    close(found, (eq_8 / tau / 6, eq_7 / 6, -eq_7), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="values"):
        drov.dro_v_loss(logps, ref_logps, values[:, None], r, tau)
    margins = np.where(r > 0, ratio - 0.3, 0.3 - ratio)
    kto = drov.kto_loss(ratio, torch.zeros(6), r > 0, torch.tensor(0.3), tau)
    assert kto.tolist() == approx(1 - 1 / (1 + np.exp(-tau * margins)))


@each(
    "family",
    ["t5", "bart", "llama", "qwen2", "gemma2", "gpt_neox", "gpt2", "opt", "bloom", "mamba"],
)
def test_logps_and_values_are_those_of_a_row_alone_one_token_after_the_other(family):
    model = model_of(family, **{"sliding_window": 4} if family == "gemma2" else {})
    x, y = ([np.arange(9 * n, 10 * n) for n in sizes] for sizes in ((3, 9, 1, 5), (4, 1, 7, 5)))
    seq2seq, expected = model.config.is_encoder_decoder, [0.0] * 4
    rows = drov.Rows(["p"] * 4, x, y, torch.zeros(4), seq2seq, torch.zeros(4))
    for i, (prompt, completion) in enumerate(zip(map(list, x), map(list, y), strict=True)):
        for t, token in enumerate(completion):
            inputs = {"input_ids": prompt if seq2seq else prompt + completion[:t]}
            inputs |= {"decoder_input_ids": [0, *completion[:t]]} if seq2seq else {}
            logits = model(**{name: torch.tensor([ids]) for name, ids in inputs.items()}).logits
            expected[i] += logits[0, -1].log_softmax(-1)[token].item()
    logps = drov.sequence_logps(model, rows.batch(np.arange(4)))
    close(logps, torch.tensor(expected), rtol=1e-4, atol=1e-4)  # float32
    V = drov.ValueModel(model)
    assert V(rows.batch(np.arange(4))).tolist() == [0.0] * 4
    for parameter in V.parameters():  # away from the two equal layers
        parameter.data += 0.1 * torch.randn_like(parameter)
    alone = torch.cat([V(rows.batch(np.array([i]))) for i in range(4)])
    close(V(rows.batch(np.arange(4))), alone, rtol=1e-4, atol=1e-5)
    assert alone.abs().min() > 1e-4


@each(("kind", "prompt", "answer"), [
    ("end", "say abc", "abc</s>"), ("bos", "<s>say abc", "abc</s>"), ("bytes", "say abc</s>", "abc</s>"),
    ("inst", "<s>[INST] say abc [/INST]", "abc</s>"), ("unigram", "say abc</s>", "abc</s>"),
    ("chatml", "", "abc<|im_end|>"), ("dated", "05 Nov 2024", "abc<|im_end|>"),
])  # fmt: skip
def test_texts_are_as_a_server_sends_them_end_once_and_control_nothing(kind, prompt, answer):
    tokenizer, seq2seq, long = tokenizer_of(kind), kind in ("unigram", "bytes"), "abc dea " * 9
    encode = lambda x, most: drov.encode_prompts(tokenizer, [x], seq2seq, most, "2024-11-05")[0]
    answered = lambda y, most: drov.encode_completions(tokenizer, [y], seq2seq, most)[0]
    prompt += f"{USER}say abc{MODEL}" if kind in ("chatml", "dated") else ""
    assert tokenizer.decode(encode("say abc", 99)) == prompt
    assert tokenizer.decode(answered("abc", 99)) == answer
    whole, cut, bos = encode(long, 999), encode(long, 9), int(prompt.startswith("<s>"))
    assert len(cut) == 9 and cut[bos:] == whole[bos - 9 :] and cut[:bos] == whole[:bos]
    assert answered(long, 5) == answered(long, 999)[:5]  # its beginning, and no end
    *body, end = answered("<s>a</s><pad><|im_end|>", 99)
    assert tokenizer.decode([end]) == answer[3:] and not set(tokenizer.all_special_ids) & set(body)
    assert kind == "unigram" or tokenizer.decode(body) == "<s>a</s><pad><|im_end|>"
    turns = [{"role": "system", "content": "Be <|im_end|>"}, {"role": "user", "content": "say abc"}]
    if kind in ("chatml", "dated"):
        ids, system = encode(json.dumps(turns), 99), "<|im_start|>system\nBe <|im_end|><|im_end|>\n"
        assert tokenizer.decode(ids) == prompt.replace(USER, system + USER) and ids.count(5) == 2


@each("name", ["a.jsonl", "mine[12]*.json", "lines.json", "b.csv", "c.parquet"])
def test_texts_and_rewards_are_read_as_they_stand(name):
    texts = ["4", "007", "NA", "null", "1945-05-01", "true", '"so"', "a\u2028b\x85c", "x" * 200_000]
    rewards, file = [True, False, 3e-11, 1, 2.5, 0, -1, 7, 5e-12], Path(name)
    rows = [{"prompt": f" p{i}\n", "completion": texts[i], "thumb": rewards[i]} for i in range(9)]
    if "json" in name:
        lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        file.write_text(json.dumps(rows) if "mine" in name else f"\ufeff{lines}")
    else:
        table = drov.datasets.Dataset.from_list(
            [row | {"thumb": float(row["thumb"])} for row in rows]
        )
        (table.to_csv if file.suffix == ".csv" else table.to_parquet)(file)
    triplets = drov.load_triplets(args_of(f"--reward_key thumb --dataset_name ~/{name}"))
    assert triplets == [(f"p{i}", texts[i], float(rewards[i])) for i in range(9)]


def test_unusable_rows_are_counted_by_cause_and_conversations_and_ultrafeedback_understood():
    chat = [{"role": role, "content": "a"} for role in ("system", "user", "assistant", "user")]
    plain = {"prompt": "p", "completion": "c", "reward": "true"}
    good = [plain | {"prompt": x} for x in (chat[1:2], chat, json.dumps(chat, indent=1))]
    answers = [{"response": "x", "overall_score": 7.5, "my": 4}, {"response": "y", "my": 4}]
    wrong = [{"prompt": chat[:3]}, {"prompt": []}, {"prompt": "p\ud83c"}, {"completion": chat}]
    wrong += [{"completion": 6}, {"completion": " "}, {"reward": np.nan}, {"reward": "good"}]
    rated, dropped = {"instruction": "u", "completions": answers}, drov.Counter()
    write_lines("a.jsonl", [*good, rated, *[plain | x for x in wrong]])
    first, *both, last = drov.load_triplets(args_of("--dataset_name a.jsonl"), dropped)
    assert first == ("a", "c", 1.0) and last == ("u", "x", 7.5)
    assert both[0] == both[1] and json.loads(both[0][0]) == chat
    assert dropped == {"prompt": 3, "completion": 3, "reward": 3}
    write_lines("a.jsonl", [rated])
    assert len(drov.load_triplets(args_of("--dataset_name a.jsonl --reward_key my"))) == 2


def test_splits_are_disjoint_repeatable_and_blind_to_the_order_of_rows():
    prompts = [f"prompt {i % 40}" for i in range(120)]
    how = {"num_eval_prompts": 3, "num_eval_folds": 3, "eval_prompts_per_fold": 4}
    split = lambda x, mode, i, s=1: drov.split_prompts(x, mode, eval_fold_index=i, seed=s, **how)
    for mode in ("prompt_seeded", "prompt_fold"):
        train, held_out = split(prompts, mode, 0)
        assert (train, held_out) == split(prompts[::-1], mode, 0)
        assert sorted(train + held_out) == sorted(set(prompts))
        assert held_out != split(prompts, mode, 0, 2)[1]
    folds = [prompt for fold in range(3) for prompt in split(prompts, mode, fold)[1]]
    assert split(prompts, mode, "all")[1] == folds and len(set(folds)) == 12


def test_statistics_are_the_training_sides_and_limits_keep_whole_prompts_by_hash():
    rows = [{"prompt": f"p{i // 2}", "completion": "c", "reward": i // 20} for i in range(40)]
    write_lines("rows.jsonl", rows)  # sorted by rating
    more = "--split_mode prompt_fold --num_eval_folds 3 --eval_prompts_per_fold 4 --eval_fold_index all"
    more += " --max_train_samples 9 --max_eval_samples 15 --max_completion_length 1"
    state = drov.begin(args_of(flags(more)), None)
    train, manifest = state.data["train"], state.manifest
    trained = np.array([int(prompt[1:]) // 10 for prompt in train.prompts])
    assert manifest["reward_mean"] == trained.mean() and 0 < trained.mean() < 1
    assert train.rewards.tolist() == approx((trained - trained.mean()) / trained.std())
    assert [manifest[name] for name in ("train_rows", "train_prompts", "eval_rows")] == [8, 4, 12]
    assert [(fold, len(x)) for fold, x in manifest["held_out"].items()] == [(i, 2) for i in "012"]


@each("kind", ["t5", "llama"])
@each("loss", ["--value prompt", "--value constant", "--value batch", "--loss kto", "--loss sft"])
def test_a_step_has_its_losss_gradient_whole_and_cut(loss, kind):
    more = f"{loss} --tau 0.5 --learning_rate 0 --value_learning_rate 0 --overfit_steps 2"
    state, found = drov.begin(args_of(flags(f"{more} --overfit_one_batch", kind)), None), []
    drov.make_networks(state)
    drov.score_reference(state)
    groups = [group["params"] for group in state.optimizer.param_groups]
    gradient = lambda: torch.cat([p.grad.flatten() for group in groups for p in group])
    for parameter in [p for group in groups for p in group]:  # away from π_ref and from V = 0
        parameter.data += 0.05 * torch.randn_like(parameter)
    rows, other = state.data["train"], state.data.get("mismatched")
    if other:
        other.ref_logps -= 2  # a KL above 0

    def record(*_):  # the same batch in each step: whole, then row by row
        found.append(gradient())
        state.args.micro_batch_tokens = 1

    with before_steps(record):
        drov.train(state)
    chosen = drov.step_rows(1, len(rows.x), 8, 42)
    batch, r = rows.batch(chosen), rows.rewards[chosen]
    logps, ref_logps = drov.sequence_logps(state.policy, batch), rows.ref_logps[chosen]
    if loss == "--loss sft":
        losses = -8 * logps / sum(len(rows.y[row]) for row in chosen)
    elif loss == "--loss kto":
        kl = (drov.score(state, other, chosen)[0] - other.ref_logps)[chosen].mean()
        losses = drov.kto_loss(logps, ref_logps, r > r.mean(), kl, 0.5)
    elif loss == "--value batch":  # DRO-P: ½ Var(r − τ log π/π_ref) / τ
        losses = (r - 0.5 * (logps - ref_logps)).var(correction=0)
    else:
        losses = sum(drov.dro_v_loss(logps, ref_logps, state.value_model(batch), r, 0.5)[:2])
    state.optimizer.zero_grad()
    losses.mean().backward()
    for group in groups:  # each network is clipped by itself
        torch.nn.utils.clip_grad_norm_(group, 1)
    close(found, [gradient()] * 2, rtol=1e-3, atol=1e-5)


@each("kind,signum,more", [("t5", 2, "--bf16 --optim adamw"), ("llama", 9, "--share_policy_and_value_backbone")])  # fmt: skip
def test_a_killed_run_goes_on_to_the_bit_and_another_run_is_refused(kind, signum, more):
    more = (f"{more} --max_steps 30 --save_steps 4 --logging_steps 3 --save_total_limit 3", kind)
    run(*more, "whole")
    command = [sys.executable, drov.__file__, *flags(*more, "cut").split()]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not Path("cut/checkpoint-4").exists():
        assert process.poll() is None
    process.send_signal(signum)
    _, says = process.communicate()
    if signum == 2:
        assert process.returncode == 130 and says.count("\n") == 1 and "--resume cut" in says
    assert "max_steps was 30" in fails("--resume cut --max_steps 31")
    assert "is not empty" in fails(flags(*more, "cut"))
    main("--resume cut --save_total_limit 2")
    for file in ("value_model.safetensors", "model.safetensors", "generations-30.jsonl"):
        assert Path("cut", file).read_bytes() == Path("whole", file).read_bytes(), file
    assert metrics("cut") == metrics("whole")
    assert {path.name for path in Path("cut").glob("check*")} == {"checkpoint-28", "checkpoint-30"}
    main("--resume cut")  # it is finished
    Path("cut/results.json").unlink()
    Path("cut/reference_logps.safetensors").unlink()
    assert "π_ref with it" in fails("--resume cut")
    Path("cut/checkpoint-30/model.safetensors").write_bytes(b"damaged")
    assert "checkpoint-30" in fails("--resume cut")
    Path("cut/checkpoint-30").rename("damaged")
    write_lines("rows.jsonl", read_lines("rows.jsonl")[::-1])
    assert "the data are not those" in fails("--resume cut")


def test_held_out_numbers_are_what_they_are_called():
    state = drov.begin(args_of(flags("--tau 0.5")), None)
    drov.make_networks(state)
    rows = state.data["eval"]
    rows.ref_logps = drov.score(state, rows)[0]
    drov.evaluate(state)
    rows.ref_logps = rows.ref_logps - rows.rewards  # now log π/π_ref = r, and V = 0
    drov.evaluate(state)
    (start, line), r = metrics("run"), rows.rewards.numpy()
    assert start["eval_pair_accuracy"] == 0.5 and "eval_reward_correlation" not in start
    names = "loss residual_mean residual_std log_ratio_mean pair_accuracy reward_correlation"
    expected = [np.square(0.5 * r).mean() / 2, 0.5 * r.mean(), 0.5 * r.std(), r.mean(), 1, 1]
    assert [line[f"eval_{name}"] for name in names.split()] == approx(expected, rel=1e-4, abs=1e-4)


def test_processes_train_as_one_does_for_each_loss_and_kind_of_model():
    runs = [
        (x, y) for x in ("--value prompt", "--value batch", "--loss kto") for y in ("t5", "llama")
    ]
    more = "--max_steps 6 --save_steps 6 --max_eval_samples 3 --learning_rate 1e-4"
    size = lambda n, i, loss, kind: (f"{more} {loss} --per_device_train_batch_size {n}", kind, i)
    some = [flags(*size(6, f"some{i}", *run)) for i, run in enumerate(runs)]
    Path("several.py").write_text(f"import drov\nfor x in {some}:\n    drov.main(x.split())\n")
    launcher = "-m torch.distributed.run --standalone --nproc_per_node 2 several.py"
    env = os.environ | {"PYTHONPATH": str(Path(drov.__file__).parent)}
    subprocess.run([sys.executable, *launcher.split()], env=env, check=True)
    for i, (loss, kind) in enumerate(runs):
        run(*size(12, f"one{i}", loss, kind))
        one, two = (drov.load_file(f"{out}{i}/model.safetensors") for out in ("one", "some"))
        close(one, two, rtol=0, atol=1e-4)
        assert metrics(f"one{i}")[-1] == approx(metrics(f"some{i}")[-1], rel=1e-2, abs=1e-3)
    Path("some0/results.json").unlink()
    main("--resume some0 --gradient_accumulation_steps 2")  # one process, twice the work


@pytest.fixture(scope="session", autouse=True)
def dice(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dice") / "run"
    more = f"{drov.__file__} --dice --max_steps 200 --output_dir {folder}"
    process = subprocess.Popen([sys.executable, *more.split()], stdout=subprocess.DEVNULL)
    yield lambda: process.wait() or folder
    process.kill()


def test_verdicts_count_with_their_mean_and_what_does_not_compare_is_refused():
    run("--learning_rate 0.3", "llama")  # far enough for other answers
    compare = "--compare run --output_dir versus"
    main(compare)
    sides = [{x["prompt"]: x for x in read_lines(f"run/generations-{i}.jsonl")} for i in (4, 0)]
    there, back = drov.make_pairs(*sides), drov.make_pairs(*sides[::-1])
    assert all(x | {"ours": y["ours"]} == y for x, y in zip(there, back, strict=True))
    names, texts = ("id", "prompt", "A", "B"), [x["completion"] for x in sides[0].values()]
    assert read_lines("versus/pairs.jsonl") == [{name: x[name] for name in names} for x in there]
    wins = [{"id": x["id"], "winner": x["ours"]} for x in there if x["A"] != x["B"]]
    write_lines("v.jsonl", [*wins, wins[0] | {"winner": "tie"}, {"id": "else", "winner": "tie"}])
    main(f"{compare} --verdicts v.jsonl")
    rates = json.loads(Path("versus/win_rates.json").read_text())
    score = len(wins) - 0.25 + 0.5 * (4 - len(wins))
    assert rates["win_rate"] == score / 4 and rates["std"] is None  # equal answers are a tie
    assert rates["mean_characters"][0] == np.mean([len(text) for text in texts])
    low, high = drov.win_rates(np.ones(5), np.arange(5))["interval"]
    assert 0.5 < low < 0.6 and high == 1  # Wilson's: five that agree are no certainty
    run("--temperature 0", "llama", "cold")
    assert "do not compare" in fails("--compare run --against cold")


def test_dice_come_to_the_optimum_that_is_known(dice):
    results = json.loads((dice() / "results.json").read_text())
    assert results["gain_share"] >= 0.98 and results["policy"]["valid"] >= 0.95


GOOD = '{"prompt": "a", "completion": "b", "reward": 1}\n'
CHAT = GOOD.replace('"a"', '[{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]')
CSV = "prompt,completion,reward\na,b,1\n"


@each(("name", "content", "says"), [
    ("a.jsonl", f"{GOOD}null", "line 2: None is no object"), ("a.parquet", "P", "cannot load"),
    ("a.jsonl", f"{GOOD}\xe9", "line 2 is not UTF-8"), ("a.jsonl", "", "0 triplets"),
    ("a.jsonl", '{"prompt": "a", "label": 1}', "--reward_key"), ("a.json", "[1]", "1 is no object"),
    ("a.jsonl", GOOD + GOOD.replace('"a"', '"c"'), "but for rounding"), ("a.csv", f"{CSV}a,b", "line 3"),
    ("a.csv", f"{CSV}a,b,c,1", "line 3"), ("a.csv", f'{CSV}a,"b \\"c, d\\" e",1', "line 3"),
    ("a.jsonl", f"{GOOD}{CHAT}{CHAT.replace('1', '0')}", "a conversation needs"),
])  # fmt: skip
def test_a_broken_file_ends_in_one_line_that_names_the_place(name, content, says):
    Path(name).write_bytes(content.encode("latin-1"))
    assert says in fails(f"--dice --num_eval_prompts 1 --dataset_name {name} --output_dir run")
    assert not Path("run").exists()


@each(("more", "says"), [
    ("--tau 0", "--tau 0.0 is out of range"), ("--unknown", "unrecognized arguments: --unknown"),
    ("--compare nothing", "finished run"), ("--eval_fold_index 1", "goes with --split_mode"),
    ("--value batch --per_device_train_batch_size 1", "one row"), ("--resume no", "a run's folder"),
    ("--loss kto --value constant", "go with --loss dro_v"), ("--dataset_name no.jsonl", "no.jsonl"),
    ("--split_mode prompt_fold --eval_prompts_per_fold 4 --eval_fold_index 5", "must be 0 to 4"),
    ("--model_name_or_path nobody/no", "nobody/no"), ("--dataset_name nobody/no", "nobody/no"),
    ("--num_eval_prompts 30", "30 of 30 prompts: lower --num_eval_"), ("--verdicts v.jsonl", "--compare"),
    ("--optim adamw --learning_rate 1e9", "not finite"),
])  # fmt: skip
def test_a_wrong_flag_ends_in_one_line_and_claims_no_folder(more, says):
    assert says in fails(f"{flags()} {more}", 1 if says == "not finite" else 2)
    assert not list(Path().glob("run/checkpoint*" if says == "not finite" else "run"))
