# SPDX-License-Identifier: Apache-2.0
"""What drov.py promises, one sentence a test. Models, tokenizers and files are real, and small."""

import os

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")  # Subprocesses inherit them.

import contextlib
import io
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.testing import assert_close

import drov

# Sizes by the names of all families, with dropout, which drov.py switches off.
# fmt: off
SMALL = {
    "vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "attention_dropout": 0.5,
    "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
    "encoder_layers": 2, "decoder_layers": 2, "ffn_dim": 48, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "decoder_start_token_id": 0, "word_embed_proj_dim": 16,
}
# fmt: on
FAMILIES = ["t5", "bart", "llama", "qwen2", "gemma2", "gpt_neox", "gpt2", "opt", "bloom", "mamba"]
LOSSES = ["--value prompt", "--value constant", "--value batch", "--loss kto"]
FLAGS = """--dataset_name rows.jsonl --num_eval_prompts 4 --per_device_train_batch_size 8
    --max_steps 4 --learning_rate 1e-3 --warmup_steps 2 --logging_steps 2 --save_steps 2
    --max_new_tokens 8 --max_grad_norm 1"""
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DATED = "{{ strftime_now('%d %b %Y') }}" + CHATML
TEMPLATES = {"chatml": CHATML, "sentencepiece": CHATML, "dated": DATED}
CLOCK = ("step_seconds", "tokens_per_second", "reference_seconds")


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
    ends = [("</s>", 1), ("<s>", 3)]
    backend.post_processor = processors.TemplateProcessing(frame, None, ends)
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "bos_token": "<s>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = TEMPLATES.get(kind)
    return tokenizer


def write_lines(path, rows):
    Path(path).write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")


def read_metrics(folder):
    lines = drov.read_json(f"{folder}/metrics.jsonl")
    return [{name: line[name] for name in line if name not in CLOCK} for line in lines]


def flags(more="", kind="t5", out="run"):
    return f"{FLAGS} --model_name_or_path {kind} --output_dir {out} {more}"


def args_of(text):
    return drov.parse_args(text.split())


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
    """Where a user is: a T5, a Llama with a chat template, answers rated by their length."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, kind in (("t5", "bytes"), ("llama", "chatml")):
        model_of(name).save_pretrained(name)
        tokenizer_of(kind).save_pretrained(name)
    rng = np.random.default_rng(0)
    rows = []
    for i in range(60):
        text = "".join(rng.choice(list("abc de"), rng.integers(2, 12))) + "."
        rows.append({"prompt": f"say {i % 30}", "completion": text, "reward": len(text)})
    write_lines("rows.jsonl", rows)


@pytest.fixture(scope="session", autouse=True)
def dice(tmp_path_factory):
    """The example, which runs beside the tests."""
    folder = tmp_path_factory.mktemp("dice") / "run"
    command = f"{sys.executable} {drov.__file__} --dice --max_steps 200 --output_dir {folder}"
    process = subprocess.Popen(command.split(), stdout=subprocess.DEVNULL)
    yield process, folder
    process.kill()


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
    on_logps, on_values = torch.autograd.grad(policy_loss.mean(), inputs, allow_unused=True)
    assert_close(on_logps, eq_8 / tau / 6)
    assert on_values is None
    on_logps, on_values = torch.autograd.grad(value_loss.mean(), inputs, allow_unused=True)
    assert_close((on_values, residual.detach()), (eq_7 / 6, -eq_7))
    assert on_logps is None
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
    is_encoder_decoder = model.config.is_encoder_decoder
    x = [np.arange(9 * n, 10 * n) for n in (3, 9, 1, 5)]
    y = [np.arange(9 * n, 10 * n) for n in (4, 1, 7, 5)]
    data = drov.Rows(["p"] * 4, x, y, torch.zeros(4), is_encoder_decoder, torch.zeros(4))
    expected = torch.zeros(4)
    for row in range(4):
        for t, token in enumerate(y[row].tolist()):
            inputs = {"input_ids": torch.tensor([[*x[row], *y[row][:t]]])}
            if is_encoder_decoder:
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

    def encode(text, most):
        [prompt] = drov.encode_prompts(tokenizer, [text], is_encoder_decoder, most)
        [completion] = drov.encode_completions(tokenizer, [text], is_encoder_decoder, most)
        return prompt, completion

    end = "<|im_end|>" if kind == "chatml" else "</s>"
    assert tokenizer.decode(encode("say abc", 99)[1]) == "say abc" + end
    whole = encode("abc dea " * 9, 999)
    cut = encode("abc dea " * 9, 9)
    bos = 1 if kind == "bos" else 0
    assert cut[0] == whole[0][:bos] + whole[0][bos - 9 :]  # its end, with BOS
    assert cut[1] == whole[1][:9]  # its beginning, without an end
    spelt = encode("a <s>a</s><pad><|im_end|> a", 999)
    for found, plain in zip(spelt, encode("a", 999), strict=True):
        assert [t for t in found if t in special] == [t for t in plain if t in special]


@pytest.mark.parametrize("name", ["a.jsonl", "lines.json", "mine[12]*.json"])
def test_texts_and_rewards_are_read_as_they_stand(name):
    texts = ["4", "007", "NA", "null", "1945-05-01", "true", '"so"', "a\u2028b\x85c", "x" * 200_000]
    rewards = [True, False, 3e-11, 1, 2.5, 0, -1, 7, 5e-12]
    rows = []
    for i in range(9):
        rows.append({"prompt": f" p{i}\n", "completion": texts[i], "thumb": rewards[i]})
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    if name.startswith("mine"):
        text = json.dumps(rows)
    Path(name).write_text(f"\ufeff{text}", encoding="utf-8")
    triplets = drov.load_triplets(args_of(f"--reward_key thumb --dataset_name ~/{name}"))
    assert triplets == [(f"p{i}", texts[i], float(rewards[i])) for i in range(9)]


def test_rows_are_understood_as_people_have_them_and_others_are_counted_by_cause():
    user = {"role": "user", "content": "q"}
    answer = {"role": "assistant", "content": "a"}
    parts = {"role": "user", "content": [{"type": "text", "text": "q"}]}
    null = {"role": "assistant", "content": None}
    image = {"role": "user", "content": [{"type": "image_url", "image_url": "x.png"}]}
    system = {"role": "system", "content": "s"}
    whole = json.dumps([system, user])
    pairs = [("q", "a"), (user, answer), ([parts], [answer]), ("else", [user, answer])]
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    rows += [{"messages": [user, answer]}, {"instruction": "q", "response": "a"}]
    rows += [{"prompt": whole, "completion": "a"}, {"messages": [system, parts, answer]}]
    for prompt in (None, " ", [], [null, user], [image], "p\ud83c"):
        rows.append({"prompt": prompt, "completion": "a"})
    for completion in (None, 6, [], [user], [null]):
        rows.append({"prompt": "q", "completion": completion})
    rows = [{**row, "reward": "true"} for row in rows]
    rows.append({"prompt": "q", "completion": "a", "reward": "good"})
    rows.append({"prompt": "u", "completions": [{"response": "a", "overall_score": 7}, "no"]})
    write_lines("a.jsonl", rows)
    dropped = Counter()
    triplets = drov.load_triplets(args_of("--dataset_name a.jsonl"), dropped)
    assert triplets == [("q", "a", 1.0)] * 6 + [(whole, "a", 1.0)] * 2 + [("u", "a", 7.0)]
    assert dropped == {"prompt": 6, "completion": 6, "reward": 1}
    Path("a.csv").write_text(f'q,c,r\n"{[system, user]}","{[answer]}",1\n[sic] is Latin,a,1')
    keys = "--prompt_key q --completion_key c --reward_key r"
    triplets = drov.load_triplets(args_of(f"--dataset_name a.csv {keys}"))
    assert triplets == [(whole, "a", 1.0), ("[sic] is Latin", "a", 1.0)]


def test_splits_are_disjoint_repeatable_and_blind_to_the_order_of_rows():
    prompts = [f"prompt {i % 40}" for i in range(120)]
    sizes = {"num_eval_prompts": 3, "num_eval_folds": 3, "eval_prompts_per_fold": 4}

    def split(some, mode, index, seed=1):
        return drov.split_prompts(some, mode, eval_fold_index=index, seed=seed, **sizes)

    for mode in ("prompt_seeded", "prompt_fold"):
        train, fold_of = split(prompts, mode, 0)
        assert (train, fold_of) == split(prompts[::-1], mode, 0)
        assert sorted([*train, *fold_of]) == sorted(set(prompts))
        assert list(fold_of) != list(split(prompts, mode, 0, seed=2)[1])
    folds = [split(prompts, "prompt_fold", index)[1] for index in range(3)]
    assert [len(fold) for fold in folds] == [4, 4, 4]
    assert split(prompts, "prompt_fold", "all")[1] == folds[0] | folds[1] | folds[2]


def test_rewards_are_normalised_by_the_training_side_and_cut_texts_are_counted():
    rows = []
    for i in range(40):  # sorted by reward
        rows.append({"prompt": f"p{i // 2}", "completion": "c" * (1 + i % 2), "reward": i // 20})
    write_lines("rows.jsonl", rows)
    limits = "--max_completion_length 2 --max_prompt_length 3"  # "c" and "p1", each with its end
    state = drov.begin(args_of(flags(limits)), None)
    data = state.data["train"]
    raw = np.array([int(prompt[1:]) // 10 for prompt in data.prompts])
    assert state.manifest["reward_mean"] == raw.mean()
    assert 0 < raw.mean() < 1
    assert data.rewards.tolist() == pytest.approx((raw - raw.mean()) / raw.std())
    assert state.manifest["cut_completions"] == 0.5
    assert state.manifest["cut_prompts"] == np.mean([len(p) > 2 for p in data.prompts])


@pytest.mark.parametrize("kind", ["t5", "llama"])
@pytest.mark.parametrize("loss", [*LOSSES, "--share_policy_and_value_backbone"])
def test_a_step_has_its_losss_gradient_whole_and_in_pieces(loss, kind):
    more = "--learning_rate 0 --value_learning_rate 0 --overfit_one_batch --overfit_steps 2"
    state = drov.begin(args_of(flags(f"{loss} {more} --tau 0.5", kind)), None)
    drov.score_reference(state)
    drov.make_networks(state)
    groups = [group["params"] for group in state.optimizer.param_groups]
    parameters = [parameter for group in groups for parameter in group]
    for parameter in parameters:  # away from π_ref, and from V = 0
        parameter.data += 0.05 * torch.randn_like(parameter)
    data = state.data["train"]
    mismatched = state.data.get("mismatched", data)
    if loss == "--loss kto":
        mismatched.ref_logps -= 2  # a KL above 0
    found = []

    def record(*_):  # the same batch in each step: whole, then row by row
        found.append([parameter.grad.clone() for parameter in parameters])
        state.args.micro_batch_tokens = 1

    state.args.micro_batch_tokens = 10_000
    with register_optimizer_step_pre_hook(record):
        drov.train(state)
    batch = data.batch(np.arange(8))
    r = data.rewards
    logps = drov.sequence_logps(state.policy, batch)
    if loss == "--loss kto":
        pairs = drov.sequence_logps(state.policy, mismatched.batch(np.arange(8)))
        kl = (pairs - mismatched.ref_logps).mean().item()
        losses = drov.kto_loss(logps, data.ref_logps, r > r.mean(), kl, 0.5)
    elif loss == "--value batch":
        losses = (r - 0.5 * (logps - data.ref_logps)).var(correction=0)  # Eq. 15 over τ = ½
    else:
        values = state.value_model(batch)
        losses = sum(drov.dro_v_loss(logps, data.ref_logps, values, r, 0.5)[:2])
    state.optimizer.zero_grad()
    losses.mean().backward()
    for group in groups:  # Each network is clipped by itself.
        torch.nn.utils.clip_grad_norm_(group, 1)
    expected = [parameter.grad for parameter in parameters]
    assert_close(found, [expected, expected], rtol=1e-3, atol=1e-5)


def test_held_out_numbers_are_what_they_are_called():
    state = drov.begin(args_of(flags("--tau 0.5")), None)
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
        assert process.returncode == 130
        assert says.count("\n") == 1 and "--resume cut" in says
    assert "max_steps was 30" in fails("--resume cut --max_steps 31")
    assert "not an empty folder" in fails(cut)
    Path("cut/checkpoint-best").mkdir()
    drov.main("--resume cut --save_total_limit 2".split())
    for file in ("value_model.safetensors", "model.safetensors", "generations-30.jsonl"):
        assert Path("cut", file).read_bytes() == Path("whole", file).read_bytes(), file
    assert read_metrics("cut") == read_metrics("whole")
    kept = {path.name for path in Path("cut").glob("checkpoint-*")}
    assert kept == {"checkpoint-28", "checkpoint-30", "checkpoint-best"}
    drov.main(["--resume", "cut"])  # It is finished.
    Path("cut/results.json").unlink()
    Path("cut/reference_logps.safetensors").unlink()
    assert "is gone" in fails("--resume cut")
    write_lines("rows.jsonl", list(drov.read_json("rows.jsonl"))[::-1])
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
    environment = os.environ | {"PYTHONPATH": str(Path(drov.__file__).parent)}
    subprocess.run([sys.executable, *launcher.split()], env=environment, check=True)
    for i in range(len(cases)):
        one, two = [drov.load_file(f"{name}{i}/model.safetensors") for name in ("one", "two")]
        assert_close(one, two, rtol=0, atol=1e-4)
        one, two = [read_metrics(f"{name}{i}")[-1] for name in ("one", "two")]
        assert one == pytest.approx(two, rel=1e-2, abs=1e-3)
    Path("two0/results.json").unlink()
    drov.main("--resume two0 --gradient_accumulation_steps 2".split())  # by one process


def test_dice_come_to_the_optimum_that_is_known(dice):
    process, folder = dice
    assert process.wait() == 0
    results = json.loads((folder / "results.json").read_text())
    assert results["gain_share"] >= 0.98
    assert results["policy"]["valid"] >= 0.95
    assert results["value_rmse"] <= 0.15


GOOD = '{"prompt": "a", "completion": "b", "reward": 1}\n'
OTHER = GOOD.replace('"a"', '"c"').replace("1", "0")
CHAT = GOOD.replace('"a"', '[{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]')


@pytest.mark.parametrize(("name", "content", "says"), [
    ("a.jsonl", f"{GOOD}null", "line 2: None is not"), ("a.jsonl", f"{GOOD}\xe9", "line 2 is not UTF-8"),
    ("a.jsonl", '{"ask": 1}', "--completion_key"), ("a.json", "[1]", "1 is not a JSON object"),
    ("a.jsonl", GOOD + OTHER.replace("0", "1"), "all training rewards are 1"),
    ("a.csv", "prompt,completion,reward\na,b,1\na,b", "line 3"),
    ("a.csv", "prompt,completion,reward\na,b,c,1", "line 2"),
    ("a.csv", 'prompt,completion,reward\na,"b \\"c, d\\" e",1', "line 2"),
    ("a.jsonl", "", "0 triplets"), ("a.jsonl", GOOD + OTHER + CHAT, "a chat template"),
])  # fmt: skip
def test_a_broken_file_ends_in_one_line_that_names_the_place(name, content, says):
    Path(name).write_bytes(content.encode("latin-1"))
    assert says in fails(f"--dice --num_eval_prompts 1 --dataset_name {name} --output_dir run")
    assert not Path("run").exists()


@pytest.mark.parametrize(("more", "says"), [
    ("--tau 0", "--tau 0.0 is out of range"), ("--unknown", "arguments: --unknown"),
    ("--eval_fold_index 1", "goes with --split_mode prompt_fold"), ("--resume no", "a run's folder"),
    ("--value batch --per_device_train_batch_size 1", "one row has no mean"),
    ("--loss kto --value constant", "go with --loss kto"), ("--dataset_name no.jsonl", "no.jsonl"),
    ("--split_mode prompt_fold --eval_fold_index 5", "--num_eval_folds 5"),
    ("--num_eval_prompts 30", "lower --num_eval_prompts"), ("--dataset_name nobody/no", "nobody/no"),
    ("--model_name_or_path llama --max_new_tokens 9999", "lower --max_prompt_length"),
    ("--model_name_or_path nobody/no", "nobody/no"),
])  # fmt: skip
def test_a_wrong_flag_ends_in_one_line_and_writes_nothing(more, says):
    assert says in fails(f"{flags()} {more}")
    assert not Path("run").exists()


def test_numbers_that_are_not_finite_end_a_run():
    model = model_of("t5")
    model.shared.weight.data[100] = torch.inf
    model.save_pretrained("t5")
    assert "not every number is finite" in fails(flags())
