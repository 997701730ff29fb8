"""Overrides become one checked configuration; a mistake becomes one line: key, value, what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.compose import compose, groups
from configs.load import load
from configs.schema import ConfigError

MISTAKES = {
    "model='a\x1b]0;X\x07\tb'": r"model=a\x1b]0;X\x07\tb: no such preset; ",
    "optimizer.lrr=1": "optimizer.lrr: no such key; did you mean optimizer.lr?",
    "optimzer.lr=1": "optimzer.lr: no such key; did you mean optimizer?",
    "lr=1": "lr: no such key; did you mean optimizer.lr?",
    "optimizer={lrr: 1}": "optimizer.lrr: no such key; did you mean optimizer.lr?",
    "data.corpora.law.trian=x": "data.corpora.law.trian: no such key; did you mean data.corpora.law.train?",
    "+optimizer.momentum=1": "optimizer.momentum: no such key; allowed under optimizer: beta1, beta2, ",
    "hydra.run.dir=x": "hydra.run.dir: no such key; allowed: activation_checkpointing, budget, ",
    "optimizer.lr=fast": "optimizer.lr=fast: must be a number",
    "optimizer.lr=[1]": "optimizer.lr=[1]: must be a number",
    "optimizer.lr=nan": "optimizer.lr=nan: must be a finite number",
    "seed=1.5": "seed=1.5: must be a whole number",
    "compile=maybe": "compile=maybe: must be true or false",
    "run=fast": "run=fast: a section, give run.KEY=VALUE",
    "data.corpora.c4=x": "data.corpora.c4=x: a section, give data.corpora.c4.KEY=VALUE",
    "run.directory=${model}": "must be text",
    "optimizer.lr=0": "optimizer.lr=0: must be greater than 0.0",
    "optimizer.beta1=1": "optimizer.beta1=1: must be less than 1.0",
    "seed=-1": "seed=-1: must be at least 0",
    "schedule.warmup_fraction=1.1": "schedule.warmup_fraction=1.1: must be at most 1.0",
    "data.corpora.c4.train=[]": "data.corpora.c4.train=[]: needs at least 1",
    "run.directory=": "run.directory=: must not be empty",
    "run.name=../up": "run.name=../up: allowed are letters, digits, '.', '_' and '-'",
    "data.corpora.-x.train=y": "data.corpora.-x.train=y: ",
    "precision.compute=fp12": "precision.compute=fp12: allowed: 'fp32', 'bf16', 'fp16' or 'fp8'",
    "data.faults.document=retry": "data.faults.document=retry: allowed: 'skip' or 'fail'",
    "model=llama-7": "model=llama-7: no such preset; did you mean llama-7b?",
    "budget=money": "budget=money: no such preset; allowed: chinchilla, days, epochs, ",
    "model=": "model=: no such preset; allowed: gpt2-124m, hf, ",
    "model=null": "model=None: no such preset; allowed: gpt2-124m, hf, ",
    "model=../model/llama-7b": "model=../model/llama-7b: no such preset; did you mean llama-7b?",
    "model=[llama-7b]": "model=['llama-7b']: no such preset; did you mean llama-7b?",
    "model@budget=llama-7b": "model@budget=llama-7b: a group has one place only; give model=PRESET",
    "model.heads=3": "model.heads=3: must divide model.hidden=256",
    "model.kv_heads=3": "model.kv_heads=3: must divide model.heads=4",
    "model.path=x": "model.path=x: only allowed with model=hf",
    "model.frozen_blocks=9": "model.frozen_blocks=9: must be at most model.layers=",
    "model.lora_rank=257": "model.lora_rank=257: must be at most model.hidden=256",
    "budget.tokens=5": "budget.tokens=5: contradicts budget=chinchilla, choose budget=tokens",
    "model=hf model.path=x model.layers=2": "model.layers=2: not allowed with family hf",
    "schedule=wsd schedule.warmup_fraction=0.9": "schedule.decay_fraction=0.2: with warmup_fraction=0.9 ",
    "checkpoint.every_minutes=null": "checkpoint.every_minutes=null: give checkpoint.every_steps or ",
    "global_batch=7": "global_batch=7: must be a multiple of micro_batch x nodes x gpus_per_node = 8, ",
    "data.corpora.c4.train=null": "data.corpora: nothing to train on, give data.corpora.NAME.train=GLOB",
    "data=local": "data.corpora: nothing to train on, give data.corpora.NAME.train=GLOB",
    "budget=tokens": "budget.tokens: required, give budget.tokens=VALUE",
    "seed=???": "seed: required, give seed=VALUE",
    "~optimizer": "optimizer: required, give optimizer=VALUE",
    "~seed": "~seed: only a group can be removed: budget, checkpoint, ",
    "optimizer.lr=1,2": "optimizer.lr=1,2: a list of values needs a sweep; give one value",
    "seed=range(3)": "seed=range(3): a list of values needs a sweep; give one value",
    "model=llama-7b,hf": "model=llama-7b,hf: a list of values needs a sweep; give one value",
    "optimizer.lr": "optimizer.lr: give KEY=VALUE",
    "=3": ": no such key; allowed: ",
    "run.name=${oops}": "run.name: Interpolation key 'oops' not found",
    "run.name=${oops": "run.name=${oops: ",
    "run.directory=${oc.env:NO_SUCH_VARIABLE}": "run.directory: KeyError raised while resolving ",
    "run.name=$(touch/hacked)": "run.name=$(touch/hacked): ",
    "run.name=`id`": "run.name=`id`: ",
    "run.name='$(id)'": "run.name=$(id): allowed are letters, ",
    "run.name=it's": "run.name=it's: ",
    "run.name='": "run.name=': ",
    'seed="': 'seed=": ',
    "seed=\\": "seed=\\: must be a whole number",
    "run.name=a;b": "run.name=a;b: ",
}
OUT_OF_RANGE = {
    "budget=tokens budget.tokens=1000000000000000001": "at most 1000000000000000000",
    "budget.unique_tokens=1000000000000000001": "at most 1000000000000000000",
    "budget=flops budget.flops=1e33": "at most 1e+32",
    "budget=usd budget.usd=1e14": "at most 10000000000000.0",
    "budget=days budget.days=1e7": "at most 1000000.0",
    "budget=gpu_hours budget.gpu_hours=1e14": "at most 10000000000000.0",
    "budget=epochs budget.epochs=1e7": "at most 1000000.0",
    "budget.tokens_per_parameter=1e300": "at most 10000000.0",
    "nodes=1000001": "at most 1000000",
    "gpus_per_node=10001": "at most 10000",
    "global_batch=2147483648": "less than 2147483648",
    "micro_batch=2147483648": "less than 2147483648",
    "hardware.peak_tflops.bf16=1e-300": "at least 0.001",
    "hardware.peak_tflops.fp32=1e300": "at most 10000000.0",
    "hardware.memory_gib=1e300": "at most 10000000.0",
    "hardware.memory_gb_s=1e-300": "at least 0.001",
    "hardware.intra_node_gb_s=1e-300": "at least 0.001",
    "hardware.inter_node_gb_s=1e-300": "at least 0.001",
    "hardware.host_gb_s=1e-300": "at least 0.001",
    "hardware.efficiency=1e-300": "at least 0.001",
    "hardware.usd_per_hour=1e300": "at most 1000000.0",
    "hardware.usd_per_hour=1e-300": "at least 1e-06",
    "hardware.watts=1e300": "at most 10000000.0",
    "plan.failures_per_1000_node_days=1e-300": "at least 1e-06",
    "plan.failures_per_1000_node_days=1e300": "at most 1000000.0",
    "plan.restart_minutes=1e300": "at most 100000.0",
    "plan.storage_gb_s=1e-300": "at least 0.0001",
    "plan.storage_gb_s=1e300": "at most 1000000.0",
    "plan.productive_share=1e-300": "at least 0.01",
    "plan.deadline_days=1e-300": "at least 1e-09",
    "plan.deadline_days=1e300": "at most 1000000.0",
    "plan.overhead_power=1e300": "at most 100.0",
    "plan.kg_co2_per_kwh=1e300": "at most 100.0",
    "plan.tensor_parallel=2147483648": "less than 2147483648",
    "sharding.bucket_mib=1e-300": "at least 0.001",
    "sharding.live_parameters=1e300": "at most 1000000000000000.0",
    "checkpoint.keep_last=2147483648": "less than 2147483648",
    "checkpoint.every_minutes=1e300": "at most 10000000.0",
    "data.corpora.c4.weight=1e-300": "at least 1e-09",
}
SPACED = {
    "run.name='a\nb'": "run.name=a b: allowed are letters, digits, '.', '_' and '-'",
    "seed=1\n2": "seed=1 2: ",
    "seed=\u2028": "seed= : ",
    "run.name=a\rb": "run.name=a b: ",
    "x\ny=3": "x y=3: ",
    "run.name='a b'": "run.name=a b: allowed are letters, digits, '.', '_' and '-'",
}


def mistake(*overrides: str) -> str:
    with pytest.raises(ConfigError) as raised:
        compose(list(overrides))
    text = str(raised.value)
    assert len(text.splitlines()) == 1
    return text


@pytest.mark.parametrize("overrides", MISTAKES)
def test_a_mistake_is_one_line_that_names_key_value_and_what_is_allowed(overrides: str) -> None:
    assert MISTAKES[overrides] in mistake(*overrides.split(" ") if "{" not in overrides else [overrides])


@pytest.mark.parametrize("overrides", OUT_OF_RANGE)
def test_a_number_that_plans_cannot_compute_with_is_refused_with_its_bound(overrides: str) -> None:
    *group, override = overrides.split(" ")
    assert mistake(*group, override).endswith(f": must be {OUT_OF_RANGE[overrides]}")


def test_all_blocks_may_be_frozen_and_adapters_as_wide_as_the_model() -> None:
    model = compose(["model=llama-7b", "model.frozen_blocks=32", "model.lora_rank=4096"]).model
    assert (model.frozen_blocks, model.lora_rank) == (32, 4096)


@pytest.mark.parametrize("override", SPACED)
def test_a_value_with_line_ends_is_still_one_line(override: str) -> None:
    assert mistake(override).startswith(SPACED[override])


def test_a_value_that_hydra_cannot_read_is_answered_with_how_to_quote_it(tmp_path: Path) -> None:
    assert "needs quotes, \"KEY='VALUE'\"" in mistake("run.directory=/data (old)/run")
    assert compose(["run.directory='/data (old)/run'"]).run.directory == "/data (old)/run"


def test_a_later_override_wins() -> None:
    assert compose(["seed=1", "seed=2"]).seed == 2


def test_an_override_wins_over_a_preset_that_is_named_after_it() -> None:
    assert compose(["optimizer.lr=7", "optimizer=adamw"]).optimizer.lr == 7


def test_values_can_refer_to_one_another() -> None:
    assert compose(["seed=7", "run.name='seed-${seed}'"]).run.name == "seed-7"


def test_relative_paths_mean_the_directory_where_they_were_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    (tmp_path / "tokenizer").mkdir()
    paths = "[text/*.jsonl, '~/more/*.jsonl', hf://datasets/x/*.parquet]"
    own = ["data=local", f"data.corpora.own.train={paths}", "data.corpora.own.validation=held/out.jsonl"]
    config = compose([*own, "model.tokenizer=tokenizer", "run.directory=runs/../a"])
    assert config.data.corpora["own"].train == [
        f"{tmp_path}/text/*.jsonl",
        "/home/someone/more/*.jsonl",
        "hf://datasets/x/*.parquet",
    ]
    assert config.data.corpora["own"].validation == [f"{tmp_path}/held/out.jsonl"]
    assert config.model.tokenizer == f"{tmp_path}/tokenizer"
    assert config.run.directory == f"{tmp_path}/a"


def test_a_home_directory_is_meant_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert compose(["run.directory='~/runs/a'"]).run.directory == "/home/someone/runs/a"


def test_a_hub_id_is_no_path() -> None:
    assert compose(["model.tokenizer=openai-community/gpt2"]).model.tokenizer == "openai-community/gpt2"


@pytest.mark.parametrize("name", ["mine", "it's mine", "über (1)"])
def test_a_directory_of_ones_own_adds_presets_to_groups(tmp_path: Path, name: str) -> None:
    own = tmp_path / name
    (own / "optimizer").mkdir(parents=True)
    (own / "optimizer" / "hot.yaml").write_text("lr: 0.5\n")
    assert compose(["optimizer=hot"], own).optimizer.lr == 0.5
    assert groups(own)["optimizer"] == ["adamw", "hot"]


def test_an_experiment_of_ones_own_sets_keys_anywhere(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\ndefaults:\n  - override /schedule: wsd\nseed: 42\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    config = compose(["experiment=mine"], tmp_path)
    assert (config.schedule.kind, config.seed) == ("wsd", 42)


def test_a_misspelt_key_in_a_file_of_ones_own_is_found(tmp_path: Path) -> None:
    (tmp_path / "optimizer").mkdir()
    (tmp_path / "optimizer" / "hot.yaml").write_text("lr: 0.5\nbeta3: 1\n")
    with pytest.raises(ConfigError, match=r"^optimizer\.beta3: no such key; did you mean optimizer\.beta"):
        compose(["optimizer=hot"], tmp_path)


@pytest.mark.parametrize("content", ["a: [", "\t", "- a\n- b", "lr: 1\nlr: 2\n", "\x00"])
def test_a_file_of_ones_own_that_is_no_mapping_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "optimizer").mkdir()
    (tmp_path / "optimizer" / "hot.yaml").write_text(content)
    with pytest.raises(ConfigError, match=r"hot|optimizer") as raised:
        compose(["optimizer=hot"], tmp_path)
    assert len(str(raised.value).splitlines()) == 1


def test_a_directory_of_ones_own_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--config-dir=.*: no such directory"):
        compose([], tmp_path / "absent")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file or directory; a run directory holds config.yaml"),
        (b"a: [", "not readable as YAML"),
        (b"\xff\xfe\xff", "not readable as YAML"),
        (b"", "holds no configuration"),
        (b"seed: 1", "required"),
    ],
)
def test_a_damaged_frozen_configuration_is_one_line(
    tmp_path: Path, content: bytes | None, reason: str
) -> None:
    file = tmp_path / "config.yaml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=reason) as raised:
        load(file)
    assert len(str(raised.value).splitlines()) == 1
