"""A checkpoint leaves for other programs and comes back as it was, bit for bit."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import freeze, saved_tensors, together, train_all
from support import Site
from transformers import AutoModelForCausalLM, PreTrainedModel

from cluster import exit_codes
from configs.compose import compose
from configs.schema import ConfigError
from trainer.checkpoint import convert
from trainer.distributed import World

STEPS = 3


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A directory with a run of three steps."""
    site = Site.create(tmp_path_factory.mktemp("convert"))
    assert train_all([freeze(compose(site.overrides(STEPS)), site.root / "run")], 1) == {}
    return site


@pytest.fixture(scope="module")
def universal(trained: Site) -> Path:
    """That run's checkpoint in DeepSpeed's layout."""
    folder = trained.root / "universal"
    assert converted(trained.root / "run", "--to", str(folder), "--layout", "universal") == exit_codes.DONE
    return folder


@pytest.fixture
def fresh(trained: Site, tmp_path: Path) -> Path:
    """A run of the same model that has not begun."""
    return freeze(compose(trained.overrides(STEPS)), tmp_path / "fresh").run


def converted(run: Path, *arguments: str) -> int:
    parser = argparse.ArgumentParser()
    convert.add_arguments(parser)
    return convert.run(parser.parse_args([str(run), *arguments]))


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return actual.keys() == expected.keys() and all(torch.equal(actual[n], expected[n]) for n in expected)


def test_universal_and_back_is_the_same_bit_for_bit(trained: Site, universal: Path, fresh: Path) -> None:
    assert converted(fresh, "--from", str(universal)) == exit_codes.DONE
    runs = (trained.root / "run", fresh)
    assert same(*(saved_tensors(checkpoint(run, STEPS)) for run in runs))
    states = [json.loads((checkpoint(run, STEPS) / "state.json").read_text()) for run in runs]
    assert states[0] == states[1]


def test_a_run_goes_on_from_what_it_was_given(trained: Site, universal: Path, tmp_path: Path) -> None:
    longer = compose(trained.overrides(STEPS + 2))
    jobs = [
        freeze(longer, tmp_path / "straight", trained.root / "run", STEPS),
        freeze(longer, tmp_path / "converted"),
    ]
    converted(jobs[1].run, "--from", str(universal))
    assert train_all(jobs, 1) == {}
    assert same(*(saved_tensors(checkpoint(job.run, STEPS + 2)) for job in jobs))


def test_hugging_face_and_back_keeps_the_weights_and_forgets_the_moments(
    trained: Site, fresh: Path, tmp_path: Path
) -> None:
    run = trained.root / "run"
    converted(run, "--to", str(tmp_path / "out"))
    converted(fresh, "--from", str(tmp_path / "out"))
    expected = saved_tensors(checkpoint(run, STEPS))
    expected |= {name: torch.zeros_like(t) for name, t in expected.items() if name.startswith("exp_avg")}
    assert same(saved_tensors(checkpoint(fresh, 0)), expected)


def test_a_model_in_half_precision_is_taken_in_at_the_step_that_is_said(
    trained: Site, fresh: Path, tmp_path: Path
) -> None:
    model = exported(trained, tmp_path / "out", torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    converted(fresh, "--from", str(tmp_path / "half"), "--step", "2")
    tensors = saved_tensors(checkpoint(fresh, 2))
    for name, parameter in model.named_parameters():
        assert torch.equal(tensors[f"weight/{name}"], parameter.float())


def test_files_for_deepspeed_hold_tensors_and_plain_values_only(universal: Path) -> None:
    files = list(universal.rglob("*.pt"))
    assert len(files) > 20
    for file in files:
        torch.load(file, weights_only=True)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_goes_on_from_ours_and_we_from_deepspeeds(
    stage: int, trained: Site, universal: Path, fresh: Path, tmp_path: Path
) -> None:
    """DeepSpeed's own engine on two ranks loads, trains a step and saves; its converter does the rest."""
    exported(trained, tmp_path / "model").save_pretrained(tmp_path / "model")
    assert together(2, visit, stage, tmp_path / "model", universal, tmp_path / "there")
    loaded = torch.load(tmp_path / "there" / "loaded.pt", weights_only=True)
    assert same(loaded, saved_tensors(checkpoint(trained.root / "run", STEPS)))
    converted(fresh, "--from", str(tmp_path / "there"))
    stepped = torch.load(tmp_path / "there" / "stepped.pt", weights_only=True)
    assert same(saved_tensors(checkpoint(fresh, STEPS + 1)), stepped)
    state = json.loads((checkpoint(fresh, STEPS + 1) / "state.json").read_text())
    assert (state["step"], state["progress"]["updates"]) == (STEPS + 1, STEPS + 1)


def test_another_models_checkpoint_is_refused(trained: Site, universal: Path, tmp_path: Path) -> None:
    exported(trained, tmp_path / "hf").save_pretrained(tmp_path / "hf")
    wider = freeze(compose([*trained.overrides(STEPS), "model.ffn=96"]), tmp_path / "wider").run
    for source in (universal, tmp_path / "hf"):
        with pytest.raises(ConfigError, match=r"--from=.*: another model: .*mlp.* is \[.*64.*\] there"):
            converted(wider, "--from", str(source))
    assert not (wider / "checkpoints").exists()


def test_a_deeper_models_checkpoint_is_refused(trained: Site, universal: Path, tmp_path: Path) -> None:
    shallow = freeze(compose([*trained.overrides(STEPS), "model.layers=1"]), tmp_path / "shallow").run
    with pytest.raises(ConfigError, match=r"another model: .*layers\.1.* absent here"):
        converted(shallow, "--from", str(universal))


def test_a_run_that_has_come_as_far_is_left_alone(trained: Site, universal: Path) -> None:
    run = trained.root / "run"
    before = (checkpoint(run, STEPS) / "manifest.json").stat()
    with pytest.raises(ConfigError, match=r"^--step=3: .* has step-00000003 already"):
        converted(run, "--from", str(universal))
    assert (checkpoint(run, STEPS) / "manifest.json").stat() == before


def test_what_is_neither_is_refused(fresh: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--from=.*: neither a Hugging Face model nor a universal"):
        converted(fresh, "--from", str(tmp_path))


def test_a_step_that_was_not_saved_is_refused(trained: Site, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no step-00000002"):
        converted(trained.root / "run", "--to", str(tmp_path), "--layout", "universal", "--step", "2")


def test_a_step_that_is_there_already_is_not_written_again(trained: Site, universal: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--to=.*: has step-00000003 already"):
        converted(trained.root / "run", "--to", str(universal), "--layout", "universal")


def test_a_file_that_would_run_code_is_refused(universal: Path, fresh: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "ran"),))

    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "zero").symlink_to(universal / f"step-{STEPS:08d}" / "zero")
    evil = copy / "mp_rank_00_model_states.pt"
    torch.save({"global_steps": 3, "trainyard": Evil()}, evil)
    with pytest.raises(ConfigError, match=f"^{evil}: cannot be read"):
        converted(fresh, "--from", str(copy))
    assert not (tmp_path / "ran").exists()


def exported(trained: Site, target: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    convert.export(trained.root / "run", None, target)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(target, dtype=dtype)
    return model


def visit(world: World, stage: int, model: Path, universal: Path, folder: Path) -> None:
    """A user of DeepSpeed: load ours, say what came, train a step, save and convert."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from deepspeed.checkpoint.ds_to_universal import main as ds_to_universal

    module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(7)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "checkpoint": {"load_universal": True},
    }
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    engine = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)[0]
    _, client = engine.load_checkpoint(str(universal))
    assert client["trainyard"]["step"] == STEPS
    folder.mkdir(exist_ok=True)
    say(engine, folder / "loaded.pt")
    rows = torch.arange(16)[None] + world.rank
    engine.backward(engine(input_ids=rows, labels=rows).loss)
    engine.step()
    say(engine, folder / "stepped.pt")
    engine.save_checkpoint(str(folder / "own"), tag="there")
    if world.main:
        arguments = argparse.Namespace(
            input_folder=str(folder / "own" / "there"),
            output_folder=str(folder / "there"),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=False,
            inject_missing_state=True,
        )
        ds_to_universal(arguments)
    world.barrier()


def say(engine: Any, file: Path) -> None:
    """Write the engine's state under our names."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    tensors = {}
    for name, parameter in engine.module.named_parameters():
        tensors[f"weight/{name}"] = safe_get_full_fp32_param(parameter)
        for kind in ("exp_avg", "exp_avg_sq"):
            tensors[f"{kind}/{name}"] = safe_get_full_optimizer_state(parameter, kind)
    torch.save({name: tensor.cpu().clone() for name, tensor in tensors.items()}, file)
