"""The fault-tolerant loss against its formula, and a fit loop that a kill does not change."""

import math
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ftnas import FixedPoint, inject, train, trainings
from ftnas.data import DataConfig, load
from ftnas.faults import AdSAF, MiBB
from ftnas.faults.hardware import Hardware
from ftnas.recipe import TrainConfig
from ftnas.rng import isolated
from ftnas.rundir import RunDir
from ftnas.storage import Checkpoints, read_journal
from ftnas.train import CHECKPOINT, DivergedError, FaultTolerantLoss, clean_accuracy, fit
from ftnas.trainings import Failure, check_failures, fit_by_rate_protocol

HARDWARE = Hardware(fault=MiBB(mac_error_rate=0.01), layers=None)


def small_net():
    with isolated(0, "net"):
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(16, 10),
        )


@pytest.fixture(scope="module")
def images():
    digits = load(DataConfig(name="digits"), "train")
    return digits.subset(torch.arange(128))


def recipe(**changes):
    return TrainConfig(**({"epochs": 3, "batch_size": 32, "lr": 0.05, "alpha_l": 0.5} | changes))


def test_loss_is_the_weighted_sum_of_clean_and_faulty(images):
    model = small_net().train()
    x, y = next(images.batches(32))
    with HARDWARE.inject(model, seed=3, errors="soft") as injection:
        losses = FaultTolerantLoss(model, alpha_l=0.3)(model, injection, x, y)
    with HARDWARE.with_fault(None).inject(model, seed=3):
        clean = F.cross_entropy(model(x), y)
    with HARDWARE.inject(model, seed=3, errors="soft"):
        faulty = F.cross_entropy(model(x), y)
    assert torch.equal(losses.clean, clean) and torch.equal(losses.faulty, faulty)
    assert not torch.equal(clean, faulty)
    assert torch.allclose(losses.total, 0.7 * clean + 0.3 * faulty)


@pytest.mark.parametrize(("which", "moves"), [("both", 2), ("clean", 1), ("faulty", 1)])
def test_bn_statistics_are_moved_by_the_forward_that_is_named(images, which, moves):
    model = small_net().train()
    x, y = next(images.batches(32))
    with HARDWARE.inject(model, seed=3, errors="soft") as injection:
        FaultTolerantLoss(model, alpha_l=0.5, bn_statistics=which)(model, injection, x, y)
    assert int(model[1].num_batches_tracked) == moves
    reference = small_net().train()
    if which == "clean":
        with HARDWARE.with_fault(None).inject(reference, seed=3):
            reference(x)
        assert torch.equal(model[1].running_mean, reference[1].running_mean)


def test_training_learns_and_a_cut_run_ends_with_the_same_weights(images, tmp_path):
    whole, cut = small_net(), small_net()
    config = recipe(epochs=4)
    with RunDir.create(tmp_path / "a", {}) as run:
        history = fit(whole, images, config=config, hardware=HARDWARE, seed=1, folder=run)
    assert history[-1]["loss"] < history[0]["loss"]
    assert all(record["hits"] > 0 for record in history)
    with RunDir.create(tmp_path / "b", {}) as run:

        class KilledError(Exception):
            pass

        steps = iter(range(6))

        def die(module, inputs):
            if next(steps, None) is None:
                raise KilledError

        handle = cut.register_forward_pre_hook(die)  # dies inside the first epoch, after some steps
        with pytest.raises(KilledError):
            fit(cut, images, config=config, hardware=HARDWARE, seed=1, folder=run)
        handle.remove()
        assert not run.file(CHECKPOINT).exists()
        cut = small_net()
        fit(cut, images, config=recipe(epochs=4), hardware=HARDWARE, seed=1, folder=run)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, cut.state_dict()[name]), name


def test_resume_from_a_checkpoint_equals_an_uninterrupted_run(images, tmp_path):
    whole, cut = small_net(), small_net()
    config = recipe(epochs=3)
    with RunDir.create(tmp_path / "a", {}) as run:
        fit(whole, images, config=config, hardware=HARDWARE, seed=1, folder=run)
    with RunDir.create(tmp_path / "b", {}) as run:
        calls = iter(range(2 * 4 * 2 + 3))  # two epochs of four steps with two forwards, and a bit

        def die(module, inputs):
            if next(calls, None) is None:
                raise KeyboardInterrupt

        handle = cut.register_forward_pre_hook(die)
        with pytest.raises(KeyboardInterrupt):
            fit(cut, images, config=config, hardware=HARDWARE, seed=1, folder=run)
        handle.remove()
        fresh = small_net()
        history = fit(fresh, images, config=config, hardware=HARDWARE, seed=1, folder=run)
    assert [record["epoch"] for record in history] == [0, 1, 2]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name]), name


def test_a_run_cut_between_checkpoints_ends_with_the_same_weights(images, tmp_path, monkeypatch):
    whole, fresh, config = small_net(), small_net(), recipe(epochs=6)
    with RunDir.create(tmp_path / "a", {}) as run:
        expected = fit(whole, images, config=config, hardware=HARDWARE, seed=1, folder=run)
    done, saved = [], []

    def epoch_done(record):
        done.append(record["epoch"])
        saved.append(run.load(CHECKPOINT)["epoch"])
        if record["epoch"] == 3:
            raise KeyboardInterrupt

    with RunDir.create(tmp_path / "b", {}) as run:
        with monkeypatch.context() as patch:
            patch.setattr(Checkpoints, "due", property(lambda _: len(done) in (0, 2)))
            with pytest.raises(KeyboardInterrupt):
                fit(small_net(), images, config=config, hardware=HARDWARE, seed=1, folder=run, epoch_done=epoch_done)
            assert (done, saved) == ([0, 1, 2, 3], [1, 1, 3, 3])
            patch.setattr(Checkpoints, "due", False)
            history = fit(fresh, images, config=config, hardware=HARDWARE, seed=1, folder=run)
        assert run.load(CHECKPOINT)["epoch"] == 6
    assert history == expected
    for name, value in whole.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name]), name


def test_a_checkpoint_that_does_not_fit_is_named(images, tmp_path):
    with RunDir.create(tmp_path / "run", {}) as run:
        fit(small_net(), images, config=recipe(epochs=1), hardware=HARDWARE, seed=1, folder=run)
        state = run.load(CHECKPOINT)
        weight = state["model"]["0.weight"]
        for changes, message in (
            ({"model": {**state["model"], "0.weight": weight[:2]}}, "another architecture: '0.weight' should be"),
            ({"model": {**state["model"], "0.weight": weight * float("nan")}}, "'0.weight' holds NaN"),
            ({"model": None}, "tensors by name, got NoneType"),
        ):
            run.save(CHECKPOINT, state | changes)
            with pytest.raises(ValueError, match=message):
                fit(small_net(), images, config=recipe(epochs=2), hardware=HARDWARE, seed=1, folder=run)
        run.save(CHECKPOINT, {"weights": weight})
        with pytest.raises(ValueError, match="not a checkpoint of this stage, it has no 'epoch'"):
            fit(small_net(), images, config=recipe(epochs=2), hardware=HARDWARE, seed=1, folder=run)


def test_rate_protocol_keeps_the_largest_rate_that_passes(images, tmp_path, capsys):
    split = (torch.arange(96), torch.arange(96, 128))
    for threshold, kept in ((0.0, 0.02), (0.999, 0.001)):
        config = recipe(epochs=1, rate_protocol=(0.001, 0.02), rate_threshold=threshold)
        with RunDir.create(tmp_path / str(threshold), {}) as run:
            _, hardware = fit_by_rate_protocol(
                small_net, images, config=config, hardware=HARDWARE, split=split, seed=0, folder=run
            )
        assert hardware.fault.mac_error_rate == kept
        warned = capsys.readouterr().err
        assert ("no rate of rate_protocol passes rate_threshold=0.999; the smallest, 0.001, is kept" in warned) == (
            threshold == 0.999
        )


def test_a_rate_that_diverges_does_not_pass(images, tmp_path, monkeypatch, capsys):
    diverges = {0.02}

    def fit_or_diverge(model, *args, hardware, **kwargs):
        if hardware.fault.mac_error_rate in diverges:
            raise train.diverged("the loss", "epoch 0")
        return fit(model, *args, hardware=hardware, **kwargs)

    monkeypatch.setattr(trainings, "fit", fit_or_diverge)
    config = recipe(epochs=1, rate_protocol=(0.001, 0.02), rate_threshold=0.0)
    split = (torch.arange(96), torch.arange(96, 128))
    given = {"config": config, "hardware": HARDWARE, "split": split, "seed": 0}
    with RunDir.create(tmp_path / "run", {}) as run:
        _, hardware = fit_by_rate_protocol(small_net, images, folder=run, **given)
    assert hardware.fault.mac_error_rate == 0.001
    tried = [line for line in read_journal(tmp_path / "run" / "events.jsonl")[0] if line["kind"] == "rate_protocol"]
    assert [(line["rate"], line["passed"]) for line in tried] == [(0.02, False), (0.001, True)]
    assert tried[0]["clean_accuracy"] is None and "NaN or infinite in epoch 0" in tried[0]["reason"]
    assert "train at 0.02: the loss became NaN or infinite in epoch 0" in capsys.readouterr().err

    diverges.add(0.001)
    with RunDir.create(tmp_path / "none", {}) as run, pytest.raises(DivergedError):
        fit_by_rate_protocol(small_net, images, folder=run, **given)


def test_clean_accuracy_keeps_mode_and_statistics(images):
    model = small_net().train()
    before = model[1].running_mean.clone()
    accuracy = clean_accuracy(model, images, hardware=HARDWARE, batch_size=64)
    assert 0.0 <= accuracy <= 1.0 and model.training
    assert torch.equal(before, model[1].running_mean)


@pytest.mark.parametrize("name", ["0.weight", "1.running_var"])
def test_what_the_last_step_of_an_epoch_breaks_reaches_no_checkpoint(name, images, tmp_path, monkeypatch):
    config, steps, move = recipe(epochs=3), [], train.move
    per_epoch = images.num_images // config.batch_size

    def breaks(parameters, *args):
        move(parameters, *args)
        steps.append(None)
        if len(steps) == 2 * per_epoch:
            model.state_dict()[name].view(-1)[1] = math.inf

    def train_in(run):
        fit(model, images, config=config, hardware=HARDWARE, seed=1, folder=run)

    model = small_net()
    with RunDir.create(tmp_path / "whole", {}) as run:
        train_in(run)
    whole = {key: value.clone() for key, value in model.state_dict().items()}
    model = small_net()
    with RunDir.create(tmp_path / "run", {}) as run:
        monkeypatch.setattr(train, "move", breaks)
        with pytest.raises(DivergedError, match=f"'{name}' became NaN or infinite in the last step of epoch 1"):
            train_in(run)
        monkeypatch.setattr(train, "move", move)
        assert run.load(CHECKPOINT)["epoch"] == 1
        train_in(run)
    assert all(torch.equal(value, whole[key]) for key, value in model.state_dict().items())


def test_faults_that_hit_nothing_are_told(images, tmp_path, capsys):
    for rate, told in ((1e-12, True), (0.01, False)):
        hardware = Hardware(fault=MiBB(mac_error_rate=rate), layers=None)
        with RunDir.create(tmp_path / str(rate), {}) as run:
            fit(small_net(), images, config=recipe(epochs=2), hardware=hardware, seed=1, folder=run)
        assert capsys.readouterr().err.count("no fault hit anything in epoch 0") == int(told)


def test_buffers_of_ones_own_may_hold_anything(images, tmp_path):
    class Own(nn.Sequential):
        def get_extra_state(self):
            return {"version": 1}

        def set_extra_state(self, state):
            assert state == {"version": 1}

    model = Own(*small_net())
    model.register_buffer("mask", torch.full((4, 4), -math.inf).triu(1))  # as in causal attention
    model.register_buffer("narrow", torch.zeros(3, dtype=torch.float8_e4m3fn))
    with RunDir.create(tmp_path / "run", {}) as run:
        fit(model, images, config=recipe(epochs=1), hardware=HARDWARE, seed=1, folder=run)


def test_the_hits_of_a_known_device_are_told_in_every_epoch(images, tmp_path):
    fault = AdSAF(sa0_rate=0.1, sa1_rate=0.05)
    with torch.no_grad(), inject(small_net(), fault, quantization=FixedPoint(), seed=3) as injection:
        injection._model(next(images.batches(4))[0])
        injection.plans().save(tmp_path / "device.npz")
    given = {"config": recipe(epochs=3), "hardware": Hardware(defects=str(tmp_path / "device.npz")), "seed": 1}

    def stops(record):
        if record["epoch"] == 0:
            raise KeyboardInterrupt

    with RunDir.create(tmp_path / "whole", {}) as run:
        whole = fit(small_net(), images, folder=run, **given)
    with RunDir.create(tmp_path / "cut", {}) as run:
        with pytest.raises(KeyboardInterrupt):
            fit(small_net(), images, folder=run, epoch_done=stops, **given)
        resumed = fit(small_net(), images, folder=run, **given)
    assert whole == resumed
    assert {(line["hits"], line["sites"]) for line in whole} == {(injection.record.hits, injection.record.sites)}


def test_what_diverged_is_told_across_processes():
    error = train.diverged("the loss", "epoch 3")
    again = pickle.loads(pickle.dumps(error))  # as Ray sends it
    assert type(again) is DivergedError and str(again) == str(error)


def test_a_diverging_loss_is_an_error(images, tmp_path):
    with RunDir.create(tmp_path / "run", {}) as run, pytest.raises(RuntimeError, match="NaN or infinite in epoch 0"):
        fit(small_net(), images, config=recipe(lr=1e30, grad_clip=None), hardware=HARDWARE, seed=0, folder=run)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha_l": 0.0, "mask_gradients": True}, "no effect"),
        ({"alpha_l": 1.5}, "less than or equal to 1"),
        ({"rate_protocol": ()}, "at least one rate"),
        ({"rate_threshold": 0.4}, "rate_threshold=0.4 belongs to rate_protocol, and there is none; remove it"),
        ({"holdout": 0.2}, "holdout=0.2 belongs to rate_protocol"),
    ],
)
def test_settings_without_effect_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        recipe(**changes)


def test_faulty_loss_needs_a_fault(images, tmp_path):
    with RunDir.create(tmp_path / "run", {}) as run, pytest.raises(ValueError, match="there is no fault model"):
        fit(small_net(), images, config=recipe(), hardware=Hardware(), seed=0, folder=run)


@pytest.mark.parametrize(
    ("keys", "num", "said"),
    [
        (["a/seed-0"], 1, "1 of 1 trainings failed (a/seed-0) with why; events.jsonl in"),
        (["a/seed-0", "b/seed-0"], 2, "2 of 2 trainings failed (a/seed-0, b/seed-0), the last with why; events"),
        (["a/seed-0"], 3, "1 of 3 trainings failed (a/seed-0) with why; the others are done; events.jsonl in"),
        (["a/seed-0/rate-0.1", "a/seed-0/rate-0.2"], 1, "1 of 1 trainings failed"),
    ],
)
def test_others_are_said_to_be_done_only_where_there_are_others(keys, num, said):
    with pytest.raises(RuntimeError) as error:
        check_failures([Failure(key, "why") for key in keys], num, folder=Path("runs/a"))
    assert str(error.value).startswith(said) and "--resume runs/a" in str(error.value)
    assert ("others" in str(error.value)) == (num == 3)
