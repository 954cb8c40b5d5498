# SPDX-License-Identifier: Apache-2.0
"""What drov.py promises, one sentence a test. Models, tokenizers and files are real, and small."""

import os

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", PYTHONPATH=os.path.dirname(__file__))

import contextlib
import io
import json
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch.testing import assert_close

import drov

# Sizes by the names of all families, with dropout, which drov.py switches off.
SMALL = {"vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"intermediate_size": 48, "attention_dropout": 0.5, "decoder_start_token_id": 0}
SMALL |= {"num_key_value_heads": 2, "word_embed_proj_dim": 16, "num_decoder_layers": 2, "d_ff": 48}
FAMILIES = ["t5", "bart", "llama", "qwen2", "gemma2", "gpt_neox", "gpt2", "opt", "bloom", "mamba"]
LOSSES = ["--value prompt", "--value constant", "--value batch", "--loss kto"]
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CHATML += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
DATED = "{{ strftime_now('%d %b %Y') }}" + CHATML
TEMPLATES = {"chatml": CHATML, "sentencepiece": CHATML, "dated": DATED}
GOOD = '{"prompt": "a", "completion": "b", "reward": 1}\n'
OTHER = '{"prompt": "c", "completion": "b", "reward": 0}\n'
CHAT = GOOD.replace('"a"', '[{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]')


def model_of(family):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **SMALL)
    if config.is_encoder_decoder:
        return transformers.AutoModelForSeq2SeqLM.from_config(config).eval()
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def tokenizer_of(kind):
    if kind == "bytes":
        return transformers.ByT5Tokenizer()
    special = ["<pad>", "</s>", "<unk>", "<s>", "<|im_start|>", "<|im_end|>"]
    tokens = [*special, "▁", "\n", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if kind == "unigram":
        backend.model = models.Unigram([(token, -1.0) for token in tokens], 2)
    if kind in ("unigram", "sentencepiece"):
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(special)
    frame = {"unigram": "$A </s>", "bos": "<s> $A"}.get(kind, "$A")
    backend.post_processor = processors.TemplateProcessing(frame, None, [("</s>", 1), ("<s>", 3)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "bos_token": "<s>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = TEMPLATES.get(kind)
    return tokenizer


def read_metrics(folder):
    lines = drov.read_json(f"{folder}/metrics.jsonl")
    return [{name: line[name] for name in line if "second" not in name} for line in lines]


def flags(more="", kind="t5", out="run"):
    return f"""--dataset_name rows.jsonl --num_eval_prompts 4 --per_device_train_batch_size 8
    --max_steps 4 --learning_rate 1e-3 --warmup_steps 2 --logging_steps 2 --save_steps 2 --tau 0.5
    --max_new_tokens 8 --max_grad_norm 1 --model_name_or_path {kind} --output_dir {out} {more}"""


def fails(text):
    """The one line that the program ends with."""
    with contextlib.redirect_stderr(io.StringIO()) as stderr, pytest.raises(SystemExit) as caught:
        drov.main(text.split())
    line = stderr.getvalue()
    assert caught.value.code == 2, line
    assert line.startswith("drov.py: error: ") and line.count("\n") == 1, line
    return line


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Where a user is: a T5, a Llama with a chat template, answers whose rewards are 0 to 6."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, kind in (("t5", "bytes"), ("llama", "chatml")):
        model_of(name).save_pretrained(name)
        tokenizer_of(kind).save_pretrained(name)
    rows = []
    for i in range(60):
        rows.append({"prompt": f"say {i % 30}", "completion": "abc de."[i % 7 :], "reward": i % 7})
    drov.save_json(Path("rows.jsonl"), *rows)


@pytest.mark.parametrize("tau", [0.1, 1.0, 5.0])
def test_losses_have_the_gradients_of_eq_7_eq_8_over_tau_and_eq_15_over_tau(tau):
    torch.manual_seed(0)
    logps, ref_logps, values, r = torch.randn(4, 6, dtype=torch.float64)
    inputs = (logps.requires_grad_(), values.requires_grad_())
    ratio = (logps - ref_logps).detach()
    eq_7 = values.detach() - r + tau * ratio  # with ∇V = 1
    # With ∇log π = 1 and ∇(log π/π_ref)² = 2 log π/π_ref:
    eq_8 = -tau * ((r - values.detach()) - tau / 2 * 2 * ratio)
    policy_loss, value_loss, residual = drov.dro_v_loss(logps, ref_logps, values, r, tau)
    of_policy = torch.autograd.grad(policy_loss.mean(), inputs, materialize_grads=True)
    of_value = torch.autograd.grad(value_loss.mean(), inputs, materialize_grads=True)
    assert_close(of_policy, (eq_8 / tau / 6, torch.zeros_like(eq_8)))
    assert_close((*of_value, residual.detach()), (torch.zeros_like(eq_7), eq_7 / 6, -eq_7))
    u = r - tau * (logps - ref_logps)
    eq_15 = torch.autograd.grad(0.5 * u.var(correction=0), logps)[0]
    loss = drov.dro_p_loss(logps, ref_logps, r, u.mean().item(), tau)
    assert_close(torch.autograd.grad(loss.mean(), logps)[0], eq_15 / tau)
    margin = torch.where(r > 0, ratio - 0.3, 0.3 - ratio)
    kto = drov.kto_loss(ratio, torch.zeros(6), r > 0, 0.3, tau)
    assert_close(kto, 1 - 1 / (1 + torch.exp(-tau * margin)))
    with pytest.raises(ValueError, match="values"):
        drov.dro_v_loss(logps, ref_logps, values[:, None], r, tau)


@pytest.mark.parametrize("family", FAMILIES)
def test_logps_and_values_are_those_of_a_row_alone_one_token_after_the_other(family):
    model = model_of(family)
    x = [np.arange(9 * n, 10 * n) for n in (3, 9, 1, 5)]
    y = [np.arange(9 * n, 10 * n) for n in (4, 1, 7, 5)]
    data = drov.Rows(
        ["p"] * 4, x, y, torch.zeros(4), model.config.is_encoder_decoder, torch.zeros(4)
    )
    expected = torch.zeros(4)
    for row in range(4):
        for t, token in enumerate(y[row].tolist()):
            inputs = {"input_ids": torch.tensor([[*x[row], *y[row][:t]]])}
            if model.config.is_encoder_decoder:
                inputs["input_ids"] = torch.tensor(x[row][None])
                inputs["decoder_input_ids"] = torch.tensor([[0, *y[row][:t]]])
            expected[row] += model(**inputs).logits[0, -1].log_softmax(-1)[token].item()
    batch = data.batch(np.arange(4))
    assert_close(drov.sequence_logps(model, batch), expected, rtol=1e-4, atol=1e-4)
    value_model = drov.ValueModel(model)
    assert value_model(batch).tolist() == [0.0] * 4
    for parameter in value_model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    alone = torch.cat([value_model(data.batch(np.array([row]))) for row in range(4)])
    assert_close(value_model(batch), alone, rtol=1e-4, atol=1e-5)
    assert alone.abs().min() > 1e-4


@pytest.mark.parametrize("kind", ["chatml", "sentencepiece", "dated"])
def test_prompt_and_completion_are_the_dialogue_that_the_template_renders(kind):
    tokenizer = tokenizer_of(kind)
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "say"}]
    for text in ("abc de.", "a\nb 7"):
        [prompt] = drov.encode_prompts(tokenizer, [json.dumps(chat)], False, 99)
        [completion] = drov.encode_completions(tokenizer, [text], False, 99)
        answer = {"role": "assistant", "content": text}
        rendered = tokenizer.apply_chat_template([*chat, answer], return_dict=False)
        assert rendered[: len(prompt + completion)] == prompt + completion
        assert tokenizer.decode(rendered[len(prompt + completion) :]).strip() == ""
    [dated] = drov.encode_prompts(tokenizer, ["say"], False, 99, "2024-11-05")
    assert tokenizer.decode(dated).startswith("05 Nov 2024") == (kind == "dated")


@pytest.mark.parametrize("kind", ["plain", "bos", "bytes", "unigram", "chatml"])
def test_texts_have_one_end_and_control_nothing_and_long_ones_are_cut(kind):
    tokenizer = tokenizer_of(kind)
    is_encoder_decoder = kind in ("bytes", "unigram")
    special = set(tokenizer.all_special_ids)
    texts = ["say abc", "abc dea " * 9, "a <s>a</s><pad><|im_end|> a", "a"]
    prompts = drov.encode_prompts(tokenizer, texts, is_encoder_decoder, 999)
    completions = drov.encode_completions(tokenizer, texts, is_encoder_decoder, 999)
    end = "<|im_end|>" if kind == "chatml" else "</s>"
    assert tokenizer.decode(completions[0]) == "say abc" + end
    bos = 1 if kind == "bos" else 0
    cut_prompts = drov.encode_prompts(tokenizer, texts, is_encoder_decoder, 9)
    assert cut_prompts[1] == prompts[1][:bos] + prompts[1][bos - 9 :]  # its end, with BOS
    cut_completions = drov.encode_completions(tokenizer, texts, is_encoder_decoder, 9)
    assert cut_completions[1] == completions[1][:9]  # its beginning, without an end
    for *_, spelt, plain in (prompts, completions):
        assert [t for t in spelt if t in special] == [t for t in plain if t in special]


@pytest.mark.parametrize("name", ["a.jsonl", "lines.json", "mine[12]*.json"])
def test_texts_and_rewards_are_read_as_they_stand(name):
    texts = ["4", "007", "NA", "null", "1945-05-01", "true", '"so"', "a\u2028b\x85c", "x" * 200_000]
    rewards = [True, False, 3e-11, 1, 2.5, 0, -1, 7, 5e-12]
    rows = [{"prompt": f" p{i}\n", "completion": texts[i], "thumb": rewards[i]} for i in range(9)]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    text = json.dumps(rows) if name.startswith("mine") else lines
    Path(name).write_text(f"\ufeff{text}", encoding="utf-8")
    args = drov.parse_args(["--reward_key", "thumb", "--dataset_name", f"~/{name}"])
    assert drov.load_triplets(args) == [(f"p{i}", texts[i], float(rewards[i])) for i in range(9)]


def test_rows_are_understood_as_people_have_them_and_others_are_counted_by_cause():
    system = {"role": "system", "content": "s"}
    user = {"role": "user", "content": "q"}
    answer = {"role": "assistant", "content": "a"}
    null = {"role": "assistant", "content": None}
    parts = {"role": "user", "content": [{"type": "text", "text": "q"}]}
    image = {"role": "user", "content": [{"type": "image_url", "image_url": "x.png"}]}
    whole = json.dumps([system, user])
    pairs = [("q", "a"), (user, answer), ([parts], [answer]), ("no", [user, answer]), (whole, "a")]
    pairs += [(prompt, "a") for prompt in (None, " ", [], [null, user], [image], "p\ud83c")]
    pairs += [("q", completion) for completion in (None, 6, [], [user], [null])]
    rows = [{"messages": [user, answer]}, {"instruction": "q", "response": "a"}]
    rows += [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    rows += [{"messages": [system, parts, answer]}]
    rows = [{**row, "reward": "true"} for row in rows]
    rows += [{"prompt": "q", "completion": "a", "reward": "good"}]
    rows += [{"prompt": "u", "completions": [{"response": "a", "overall_score": 7}, "no"]}]
    Path("a.json").write_text(json.dumps(rows))
    dropped = Counter()
    triplets = drov.load_triplets(drov.parse_args(["--dataset_name", "a.json"]), dropped)
    assert triplets == [("q", "a", 1.0)] * 6 + [(whole, "a", 1.0)] * 2 + [("u", "a", 7.0)]
    assert dropped == {"prompt": 6, "completion": 6, "reward": 1}
    Path("a.csv").write_text(f'q,c,reward\n"{[system, user]}","{[answer]}",1\n[sic] is Latin,a,1')
    args = drov.parse_args(["--dataset_name=a.csv", "--prompt_key=q", "--completion_key=c"])
    assert drov.load_triplets(args) == [(whole, "a", 1.0), ("[sic] is Latin", "a", 1.0)]


def test_splits_are_disjoint_repeatable_and_blind_to_the_order_of_rows():
    prompts = [f"prompt {i % 40}" for i in range(120)]
    sizes = {"num_eval_prompts": 3, "num_eval_folds": 3, "eval_prompts_per_fold": 4}
    split = partial(drov.split_prompts, **sizes, seed=1, eval_fold_index=0)
    for mode in ("prompt_seeded", "prompt_fold"):
        train, fold_of = split(prompts, mode)
        assert (train, fold_of) == split(prompts[::-1], mode)
        assert sorted([*train, *fold_of]) == sorted(set(prompts))
        assert list(fold_of) != list(split(prompts, mode, seed=2)[1])
    folds = [split(prompts, "prompt_fold", eval_fold_index=index)[1] for index in range(3)]
    assert [len(fold) for fold in folds] == [4, 4, 4]
    assert split(prompts, "prompt_fold", eval_fold_index="all")[1] == folds[0] | folds[1] | folds[2]


@pytest.mark.parametrize("kind", ["t5", "llama"])
@pytest.mark.parametrize("loss", [*LOSSES, "--share_policy_and_value_backbone"])
@pytest.mark.parametrize("micro_batch_tokens", [1, 10_000])
def test_a_step_has_its_losss_gradient_whole_and_in_pieces(micro_batch_tokens, loss, kind):
    more = f"{loss} --overfit_one_batch --overfit_steps 1 --micro_batch_tokens {micro_batch_tokens}"
    state = drov.begin(drov.parse_args(flags(more, kind).split()), None)
    drov.score_reference(state)
    drov.make_networks(state)
    groups = [group["params"] for group in state.optimizer.param_groups]
    parameters = [parameter for group in groups for parameter in group]
    for parameter in parameters:  # away from π_ref, and from V = 0
        parameter.data += 0.05 * torch.randn_like(parameter)
    data = state.data["train"]
    batch = data.batch(np.arange(8))
    r = data.rewards
    logps = drov.sequence_logps(state.policy, batch)
    if loss == "--loss kto":
        pairs = state.data["mismatched"]
        pairs.ref_logps -= 2  # a KL above 0
        pair_logps = drov.sequence_logps(state.policy, pairs.batch(np.arange(8)))
        kl = (pair_logps - pairs.ref_logps).mean().item()
        losses = drov.kto_loss(logps, data.ref_logps, r > r.mean(), kl, 0.5)
    elif loss == "--value batch":
        losses = (r - 0.5 * (logps - data.ref_logps)).var(correction=0)  # Eq. 15 over τ = ½
    else:
        values = state.value_model(batch)
        losses = sum(drov.dro_v_loss(logps, data.ref_logps, values, r, 0.5)[:2])
    losses.mean().backward()
    for group in groups:  # Each network is clipped by itself.
        torch.nn.utils.clip_grad_norm_(group, 1)
    expected = [parameter.grad for parameter in parameters]
    state.optimizer.zero_grad()
    found = []

    def record(*_):
        found.extend(parameter.grad.clone() for parameter in parameters)

    state.optimizer.register_step_pre_hook(record)
    drov.train(state)
    assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_rewards_are_normalised_by_training_rows_and_held_out_numbers_are_what_they_are_called():
    limits = "--max_prompt_length 6 --max_completion_length 4"  # with the ends
    state = drov.begin(drov.parse_args(flags(limits).split()), None)
    data = state.data["train"]
    rows = [row for row in drov.read_json("rows.jsonl") if row["prompt"] in data.prompts]
    raw = np.array([row["reward"] for row in rows])
    assert state.manifest["reward_mean"] == raw.mean()
    assert data.rewards.tolist() == pytest.approx((raw - raw.mean()) / raw.std())
    assert state.manifest["cut_prompts"] == np.mean([len(row["prompt"]) > 5 for row in rows])
    assert state.manifest["cut_completions"] == np.mean(raw < 4)  # They have 7 - raw letters.
    drov.make_networks(state)
    data = state.data["eval"]
    data.ref_logps = drov.score(state.policy_logps, data, np.arange(len(data.x)), state.args)
    drov.evaluate(state)
    data.ref_logps = data.ref_logps - data.rewards  # Now log π/π_ref = r, and V = 0.
    drov.evaluate(state)
    start, line = read_metrics("run")
    r = data.rewards.numpy()
    assert "eval_reward_correlation" not in start
    names = ["loss", "log_ratio_mean", "residual_mean", "residual_std", "reward_correlation"]
    expected = [np.square(0.5 * r).mean() / 2, r.mean(), 0.5 * r.mean(), 0.5 * r.std(), 1]
    assert [line[f"eval_{name}"] for name in names] == pytest.approx(expected, rel=1e-4, abs=1e-4)
    state.policy.shared.weight.data[100] = torch.inf
    state.policy.save_pretrained("t5")
    assert "not every number is finite" in fails(flags(out="infinite"))


@pytest.mark.parametrize(("kind", "signal"), [("t5", 2), ("llama", 9)])
def test_a_killed_run_goes_on_to_the_bit_and_another_run_is_refused(kind, signal):
    more = "--max_steps 30 --save_steps 4 --logging_steps 3 --save_total_limit 3 --bf16"
    drov.main(flags(more, kind, "whole").split())
    cut = flags(more, kind, "cut")
    command = [sys.executable, drov.__file__, *cut.split()]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not Path("cut/checkpoint-4").exists():
        assert process.poll() is None
    process.send_signal(signal)
    _, says = process.communicate()
    if signal == 2:  # Ctrl-C
        assert process.returncode == 130 and says.count("\n") == 1 and "--resume cut" in says
    assert "max_steps was 30" in fails("--resume cut --max_steps 31")
    assert "not an empty folder" in fails(cut)
    Path("cut/checkpoint-best").mkdir()
    Path("cut/metrics.jsonl").write_text("")  # It comes back from the checkpoint.
    drov.main(["--resume", "cut", "--save_total_limit", "2"])
    for file in ("value_model.safetensors", "model.safetensors", "generations-30.jsonl"):
        assert Path("cut", file).read_bytes() == Path("whole", file).read_bytes(), file
    assert read_metrics("cut") == read_metrics("whole")
    final, exact = [drov.load_file(f"whole/{at}model.safetensors") for at in ("", "checkpoint-30/")]
    assert_close(final, {name: exact[name].bfloat16() for name in exact})  # what --bf16 trained
    kept = {path.name for path in Path("cut").glob("checkpoint-*")}
    assert kept == {"checkpoint-28", "checkpoint-30", "checkpoint-best"}
    drov.main(["--resume", "cut"])  # It is finished.
    Path("cut/results.json").unlink()
    Path("cut/reference_logps.safetensors").unlink()
    assert "is gone" in fails("--resume cut")
    drov.save_json(Path("rows.jsonl"), *list(drov.read_json("rows.jsonl"))[::-1])
    assert "not those of" in fails("--resume cut")


def test_processes_train_as_one_does_for_each_loss_and_kind_of_model():
    cases = [(loss, kind) for loss in LOSSES for kind in ("t5", "llama")]
    more = "--max_steps 6 --save_steps 6 --learning_rate 1e-4 --per_device_train_batch_size"
    lines = ["import drov"]
    for i, (loss, kind) in enumerate(cases):
        drov.main(flags(f"{loss} {more} 12", kind, f"one{i}").split())
        lines.append(f"drov.main({flags(f'{loss} {more} 6', kind, f'two{i}').split()})")
    Path("two.py").write_text("\n".join(lines))
    launcher = "-m torch.distributed.run --standalone --nproc_per_node 2 two.py"
    subprocess.run([sys.executable, *launcher.split()], check=True)
    for i in range(len(cases)):
        one, two = [drov.load_file(f"{name}{i}/model.safetensors") for name in ("one", "two")]
        assert_close(one, two, rtol=0, atol=1e-4)
        one, two = [read_metrics(f"{name}{i}")[-1] for name in ("one", "two")]
        assert one == pytest.approx(two, rel=1e-2, abs=1e-3)
    Path("two0/results.json").unlink()
    drov.main(["--resume", "two0", "--gradient_accumulation_steps", "2"])  # by one process


def test_dice_come_to_the_optimum_that_is_known():
    drov.main(["--dice", "--max_steps", "200", "--output_dir", "run"])
    results = json.loads(Path("run/results.json").read_text())
    assert results["gain_share"] >= 0.98
    assert results["policy"]["valid"] >= 0.95
    assert results["value_rmse"] <= 0.15


@pytest.mark.parametrize(("name", "content", "says"), [
    ("a.jsonl", GOOD + "null", "line 2: None is not"), ("a.jsonl", '{"a": 1}', "--completion_key"),
    ("a.jsonl", GOOD + "\xe9", "line 2 is not UTF-8"), ("a.json", "[1]", "1 is not a JSON object"),
    ("a.jsonl", GOOD + OTHER + CHAT, "a chat template"), ("a.jsonl", "", "0 triplets"),
    ("a.jsonl", GOOD + OTHER.replace("0", "1"), "all training rewards are 1"),
    ("a.csv", "prompt,completion,reward\na,b,1\na,b", "line 3"),
    ("a.csv", "prompt,completion,reward\na,b,c,1", "line 2"),
    ("a.csv", 'prompt,completion,reward\na,"b \\"c, d\\" e",1', "line 2"),
])  # fmt: skip
def test_a_broken_file_ends_in_one_line_that_names_the_place(name, content, says):
    Path(name).write_bytes(content.encode("latin-1"))
    assert says in fails(f"--dice --num_eval_prompts 1 --dataset_name {name} --output_dir run")
    assert not Path("run").exists()


@pytest.mark.parametrize(("more", "says"), [
    ("--tau 0", "--tau 0.0 is out of range"), ("--model_name_or_path nobody/no", "nobody/no"),
    ("--loss kto --value constant", "--loss kto"), ("--dataset_name nobody/no", "nobody/no"),
    ("--eval_fold_index 1", "goes with --split_mode prompt_fold"), ("--resume no", "run's folder"),
    ("--value batch --per_device_train_batch_size 1", "several rows"), ("--unknown", ": --unknown"),
    ("--num_eval_prompts 30", "lower --num_eval_prompts"), ("--dataset_name no.jsonl", "no.jsonl"),
    ("--split_mode prompt_fold --eval_fold_index 5", "--num_eval_folds 5"),
    ("--model_name_or_path llama --max_new_tokens 9999", "lower --max_prompt_length"),
])  # fmt: skip
def test_a_wrong_flag_ends_in_one_line_and_writes_nothing(more, says):
    assert says in fails(f"{flags()} {more}")
    assert not Path("run").exists()
