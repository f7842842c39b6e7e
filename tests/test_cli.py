"""The command line: one line and exit code 2 for a user's mistake, and nothing lost."""

import json
import subprocess
import sys
import time

import pytest
import torch
import yaml

from ftnas import cli, pipeline
from ftnas.config import config_from, config_names, read_config, with_workers
from ftnas.models import ModelConfig, build, describe, save_model

TRAIN = [
    "search=null",
    "control=null",
    "threads=1",
    "train.models={net: {baseline: resnet20, width: 0.25}}",
    "train.recipe.epochs=1",
    "train.recipe.batch_size=256",
    "campaign.devices=2",
    "campaign.sweeps.0.rates=[0.01]",
]


def ftnas(*arguments):
    """Run the command line in this process; return its exit code."""
    saved, sys.argv = sys.argv, ["ftnas", *map(str, arguments)]
    try:
        cli.main()
    except SystemExit as stop:
        return 0 if stop.code is None else stop.code
    finally:
        sys.argv = saved
    return 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("finished") / "run"
    assert ftnas("run", "quickstart", *TRAIN, "--out", path) == 0
    return path


def test_help_answers_at_once_and_loads_nothing_heavy():
    code = (
        "import sys; from ftnas.cli import cli\n"
        "try: cli(['search', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'ray', 'matplotlib', 'tensorboard', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Examples:" in done.stdout and "--resume" in done.stdout


@pytest.mark.parametrize("command", ["--help", "configs"])
def test_output_that_has_no_room_is_one_line(command):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "ftnas", command], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (1, "error: [Errno 28] No space left on device\n")


def test_the_program_is_installed():
    done = subprocess.run([sys.executable, "-m", "ftnas.cli", "--version"], capture_output=True, text=True, check=True)
    assert "ftnas" in done.stdout


@pytest.mark.parametrize("name", config_names())
def test_shipped_configs_are_valid(name, monkeypatch):
    monkeypatch.setenv("FTNAS_CIFAR10_FOLDERS", "/somewhere")
    config = read_config(name)
    assert config.name == name and config.description


def test_a_run_leaves_models_records_and_a_report(finished):
    assert (finished / "train" / "model.pt").read_bytes() == (finished / "train/net/seed-0/model.pt").read_bytes()
    records = [json.loads(line) for line in (finished / "records.jsonl").read_text().splitlines()]
    assert len(records) == 3
    page = (finished / "report" / "report.html").read_text()
    assert "This run has no search/" not in page  # it was not asked for one


def test_a_finished_run_is_not_done_again(finished, capsys):
    model = finished / "train" / "net" / "seed-0" / "model.pt"
    before = model.stat().st_mtime_ns, (finished / "records.jsonl").read_bytes()
    assert ftnas("run", "--resume", finished) == 0
    assert before == (model.stat().st_mtime_ns, (finished / "records.jsonl").read_bytes())
    assert "report" in capsys.readouterr().out


def test_a_trained_model_joins_another_campaign(finished, tmp_path, capsys):
    given = f"models={{ours: {{file: {finished}/train/model.pt}}}}"
    changes = ["search=null", "control=null", "train=null", given, "campaign.devices=1"]
    assert ftnas("campaign", "quickstart", *changes, "--out", tmp_path / "run") == 0
    records = [json.loads(line) for line in (tmp_path / "run" / "records.jsonl").read_text().splitlines()]
    assert {record["model"] for record in records} == {"ours"}
    assert "note: hardware.fault is for search and training" in capsys.readouterr().err


def snapshot(folder):
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def write(path, data):
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data))
    return path


def config_with(tmp_path, **changes):
    base = {
        "version": 1,
        "name": "mine",
        "data": {"name": "digits"},
        "hardware": {"fault": {"name": "mibb", "mac_error_rate": 1e-3}},
        "train": {"recipe": {"epochs": 1, "batch_size": 64, "lr": 0.1}, "models": {"net": {"baseline": "resnet20"}}},
    }
    return write(tmp_path / "mine.yaml", base | changes)


MISTAKES = {
    "unknown config": (["run", "quickstrat"], "did you mean 'quickstart'"),
    "config path that is not there": (["run", "nowhere/mine.yaml"], "no such file"),
    "no config at all": (["search"], "give a config"),
    "unknown key": (["run", "quickstart", "search.epochz=3"], "search.epochz: unknown key; did you mean 'epochs'"),
    "unknown section": (["run", "quickstart", "serach.epochs=3"], "did you mean 'search'"),
    "override without a value": (["run", "quickstart", "seed"], "key.path=value"),
    "wrong type": (["run", "quickstart", "search.epochs=many"], "search.epochs: input should be a valid integer"),
    "below its range": (["run", "quickstart", "search.epochs=0"], "greater than or equal to 1, got 0"),
    "rate above one": (["run", "quickstart", "campaign.sweeps.0.rates=[0.1,1.5]"], "less than or equal to 1, got 1.5"),
    "rate below zero": (["run", "quickstart", "hardware.fault.mac_error_rate=-1"], "greater than or equal to 0"),
    "unknown fault": (["run", "quickstart", "hardware.fault={name: mibbb}"], "did you mean 'mibb'"),
    "unknown space": (["search", "quickstart", "search.space=smal-8x8"], "did you mean 'small-8x8'"),
    "unknown data": (["run", "quickstart", "data.name=digit"], "did you mean 'digits'"),
    "unknown baseline": (["run", "quickstart", "train.models={a: {baseline: resnet81}}"], "did you mean 'resnet"),
    "two kinds of model": (
        ["run", "quickstart", "train.models={a: {baseline: vgg16, genotype: w-ftt-net}}"],
        "exactly one of",
    ),
    "genotype of a search that is not there": (["run", "quickstart", "control=null"], "genotype of a control"),
    "faulty loss without faults": (["run", "quickstart", "hardware.fault=null"], "there is no fault model"),
    "statistics that nothing moves": (
        ["train", "quickstart", *TRAIN, "train.recipe.alpha_l=1", "train.recipe.bn_statistics=clean"],
        "running statistics would never move",
    ),
    "gpu of workers": (
        ["train", "quickstart", "device=cuda:1", "pool={workers: 2}"],
        "Ray gives each training a GPU, and device=cuda:1 names one",
    ),
    "device that nothing trains for": (["campaign", "reliability", "hardware.defects=chip.npz"], "has no effect"),
    "protection from a known device": (
        ["train", "quickstart", "hardware.protect=[conv2d]", "campaign.defects=[chip.npz]"],
        "hardware.protect keeps nothing from the devices of campaign.defects",
    ),
    "errors of known devices": (
        ["train", "quickstart", "campaign={defects: [chip.npz], errors: soft}"],
        "campaign.errors is for sweeps",
    ),
    "protection without a method": (["campaign", "reliability", "protections.0.method=tmr"], "'triplicate', 'ecc' or"),
    "single faults that cannot be counted": (
        ["campaign", "reliability", "single_faults.0.fault={name: log_normal_variation, sigma: 0.1}"],
        "no single faults to count",
    ),
    "half-width without devices": (["campaign", "reliability", "campaign.half_width=0.01"], "allow more devices"),
    "negative seed": (["run", "quickstart", "--seed", "-1"], "greater than or equal to 0"),
    "device that is not there": (["train", "quickstart", *TRAIN, "device=tpu"], "device"),
    "model called like a file": (
        ["train", "quickstart", *TRAIN, "train.models={Model.pt: {baseline: resnet8}}"],
        "models.Model.pt: a run has a file of that name",
    ),
    "model called like a folder of the trials": (
        ["train", "quickstart", *TRAIN, "train.models={tune: {baseline: resnet8}}"],
        "models.tune: a run has a file of that name",
    ),
    "given model called like a table": (
        ["campaign", "quickstart", *TRAIN, "models={table.md: {file: model.pt}}"],
        "models.table.md: a run has a file of that name",
    ),
    "layers that match nothing": (
        ["train", "quickstart", *TRAIN, "hardware.layers=conv3d"],
        "net: layers='conv3d' matches no layer",
    ),
    "batch above the set": (["train", "quickstart", *TRAIN, "train.recipe.batch_size=5000"], "is above the 1438"),
    "missing data": (
        ["train", "quickstart", *TRAIN, "data={name: cifar10, root: /nonexistent}"],
        "data.download=true",
    ),
    "missing image folder": (
        ["train", "quickstart", *TRAIN, "data={name: image_folder, root: /nonexistent}"],
        "/nonexistent",
    ),
    "unset variable": (
        ["train", "quickstart", *TRAIN, "data={name: image_folder, root: $NOT_SET_ANYWHERE}"],
        "environment variable",
    ),
    "resume what is no run": (["run", "--resume", "."], "run.json"),
    "resume with a config": (["run", "quickstart", "--resume", "runs/x"], "give it alone"),
    "report of what is no run": (["report", "/nonexistent"], "/nonexistent"),
    "unknown command": (["serach", "quickstart"], "No such command"),
    "unknown option": (["run", "quickstart", "--colour"], "No such option"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(mistake, tmp_path, monkeypatch, capsys):
    arguments, message = MISTAKES[mistake]
    monkeypatch.chdir(tmp_path)
    assert ftnas(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    lines = [line for line in error.splitlines() if line.lower().startswith("error")]
    assert len(lines) == 1 and "Traceback" not in error


def file_mistakes(tmp_path, finished):
    """Yield arguments and message of mistakes that need files of their own."""
    broken = write(tmp_path / "broken.yaml", "version: [1")
    yield ["run", broken], "not valid YAML"
    yield ["run", write(tmp_path / "list.yaml", "- 1")], "expected keys and values"
    twice = write(tmp_path / "twice.yaml", "version: 1\nname: a\ndata: {name: digits}\nname: b\n")
    yield ["run", twice], "not valid YAML: key 'name' is given twice (line 4, column 1)"
    yield ["run", "quickstart", "train.recipe={epochs: 1, epochs: 2}"], "key 'epochs' is given twice"
    yield ["run", write(tmp_path / "bare.yaml", {"version": 1, "name": "bare"})], "data: required"
    genotype = write(tmp_path / "genotype.json", '{"version": 1, "normal": {"2": [["skip", 7], ["skip", 0]]}}')
    models = {"net": {"genotype": str(genotype), "space": "small-8x8"}}
    recipe = {"epochs": 1, "batch_size": 64, "lr": 0.1}
    yield ["train", config_with(tmp_path, train={"recipe": recipe, "models": models})], "genotype"
    space = write(tmp_path / "space.yaml", {"version": 1, "name": "s", "nodes": 3, "primitives": ["none"]})
    yield ["search", "quickstart", f"search.space={space}", f"control.space={space}"], "space"
    whole = (finished / "train" / "model.pt").read_bytes()
    cut = tmp_path / "cut.pt"
    cut.write_bytes(whole[: len(whole) // 2])
    only = ["campaign", "quickstart", "search=null", "control=null", "train=null"]
    yield [*only, f"models={{cut: {{file: {cut}}}}}"], "cut.pt"
    other = ModelConfig(baseline="resnet20", width=0.5)
    size = {"num_classes": 10, "in_channels": 1, "image_size": 8}
    spec = describe(ModelConfig(baseline="resnet20", width=0.25), **size)
    wrong = tmp_path / "wrong.pt"
    save_model(wrong, build(other, **size, seed=0), spec, {})
    yield [*only, f"models={{wrong: {{file: {wrong}}}}}"], "state of another architecture"
    plain = tmp_path / "plain.pt"
    torch.save({"a": torch.zeros(1)}, plain)
    yield [*only, f"models={{plain: {{file: {plain}}}}}"], "not a model file"
    yield ["run", "quickstart", "--out", finished], "--resume"
    below = write(tmp_path / "file", "")
    yield ["run", "quickstart", "--out", below / "run"], "file"
    yield ["run", "quickstart", "--out", tmp_path, "--overwrite"], "run"


def test_what_is_refused_anew_is_read_of_a_run(tmp_path):
    protected = {"hardware": {"layers": ["conv2d"], "protect": ["depth:0"]}, "campaign": {"defects": ["chip.npz"]}}
    protected["campaign"]["errors"] = "soft"
    path = config_with(tmp_path, **protected, train=None, models={"net": {"file": "model.pt"}})
    with pytest.raises(ValueError, match="hardware.protect"):
        read_config(path)
    assert config_from(yaml.safe_load(path.read_text())).campaign.errors == "soft"


def test_mistakes_in_files_lose_nothing(tmp_path, finished, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = snapshot(finished)
    for number, (arguments, message) in enumerate(file_mistakes(tmp_path, finished)):
        own = snapshot(tmp_path)
        out = [] if "--out" in arguments else ["--out", tmp_path / f"out-{number}"]
        assert ftnas(*arguments, *out) == 2, arguments
        error = capsys.readouterr().err
        assert message in error, arguments
        assert "Traceback" not in error
        assert all(snapshot(tmp_path)[path] == data for path, data in own.items())
    assert snapshot(finished) == before


def test_a_training_killed_by_signal_9_is_resumed(tmp_path):
    run = tmp_path / "run"
    changes = [*TRAIN, "campaign=null", "train.recipe.epochs=12"]
    command = [sys.executable, "-m", "ftnas.cli", "train", "quickstart", *changes, "--out", str(run)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    checkpoint = run / "train" / "net" / "seed-0" / "checkpoint.pt"
    deadline = time.monotonic() + 300
    while not checkpoint.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert checkpoint.exists() and not (run / "train" / "model.pt").exists()
    assert ftnas("train", "--resume", run) == 0
    history = [json.loads(line) for line in (checkpoint.parent / "epochs.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in history] == list(range(12))


FACTORIES = {
    "raises": ("json:loads", "called with num_classes=10, in_channels=1 it raised TypeError"),
    "returns no module": ("builtins:dict", "must return a torch.nn.Module, got dict"),
}


@pytest.mark.parametrize("kind", FACTORIES)
def test_a_factory_that_fails_is_the_users_to_mend(kind, finished, tmp_path, capsys):
    name, message = FACTORIES[kind]
    trained = ["train", "quickstart", *TRAIN, f"train.models={{a: {{factory: '{name}'}}}}", "campaign=null"]
    assert ftnas(*trained, "--out", tmp_path / "trained") == 2
    given = f"models={{a: {{factory: '{name}', checkpoint: {finished}/train/model.pt}}}}"
    campaign = ["campaign", "quickstart", "search=null", "control=null", "train=null", given]
    assert ftnas(*campaign, "--out", tmp_path / "given") == 2
    error = capsys.readouterr().err
    assert error.count(message) == 2 and "Traceback" not in error


NETWORKS = {
    "too many": (
        "nn.Linear(64, num_classes + 1)",
        "x",
        r"must give logits, [2, 10] for two images of 10 classes, got [2, 11]",
    ),
    "two": (
        "nn.Linear(64, num_classes)",
        "(x, x)",
        "must give logits, [2, 10] for two images of 10 classes, got tuple",
    ),
    "maps": ("nn.Linear(64, num_classes)", "x[..., None]", "of 10 classes, got [2, 10, 1]"),
    "raises": (
        "nn.Linear(64, num_classes)",
        "{}['no']",
        "on images of shape [2, 1, 8, 8] its forward raises KeyError: 'no'",
    ),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_network_of_ones_own_must_give_logits(kind, tmp_path, monkeypatch, capsys):
    layer, given, message = NETWORKS[kind]
    (tmp_path / f"own_{kind.replace(' ', '_')}.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, num_classes, in_channels):\n"
        f"        super().__init__()\n        self.layer = {layer}\n"
        "    def forward(self, x):\n"
        f"        x = self.layer(x.flatten(1))\n        return {given}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    name = f"own_{kind.replace(' ', '_')}:Net"
    classes = 11 if kind == "too many" else 10
    torch.save({"layer.weight": torch.zeros(classes, 64), "layer.bias": torch.zeros(classes)}, tmp_path / "own.pt")
    trained = ["train", "quickstart", *TRAIN, f"train.models={{a: {{factory: '{name}'}}}}", "campaign=null"]
    own = f"models={{a: {{factory: '{name}', checkpoint: {tmp_path}/own.pt}}}}"
    campaign = ["campaign", "quickstart", "search=null", "control=null", "train=null", own]
    for place, command in (("trained", trained), ("given", campaign)):
        assert ftnas(*command, "--out", tmp_path / place) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: a: ") and message in error


def test_nan_in_the_users_weights_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "own_net.py").write_text(
        "from torch import nn\n"
        "def make(num_classes, in_channels):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64 * in_channels, num_classes))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    torch.save({"1.weight": torch.full((10, 64), torch.nan), "1.bias": torch.zeros(10)}, tmp_path / "own.pt")
    given = f"models={{a: {{factory: 'own_net:make', checkpoint: {tmp_path}/own.pt}}}}"
    campaign = ["campaign", "quickstart", "search=null", "control=null", "train=null", given]
    assert ftnas(*campaign, "--out", tmp_path / "run") == 2
    assert "own.pt: '1.weight' holds NaN" in capsys.readouterr().err


def test_workers_go_on_with_the_threads_that_a_run_began_with(finished, capsys):
    """Float sums depend on them, and ``--resume`` takes no other settings."""
    with pytest.MonkeyPatch.context() as patch:
        used = []
        patch.setattr(pipeline.Pipeline, "stages", lambda self: used.append(self.config.pool) or [])
        patch.setattr(cli, "_report", lambda run: None)
        assert ftnas("run", "--resume", finished, "--workers", 2) == 0
    assert (used[0].workers, used[0].threads) == (2, 1)
    config = read_config("quickstart", ["threads=null"])
    assert with_workers(config, 3, threads=2).pool.threads == 2  # the run's own
    assert with_workers(config, 3, threads=None).pool.threads == 1
    assert with_workers(read_config("quickstart", ["pool.threads=4"]), 3, threads=2).pool.threads == 4
    joined = read_config("quickstart", ["pool.workers=2", "pool.address='10.0.0.1:6379'"])
    assert with_workers(joined, 0, threads=1).pool.address is None
