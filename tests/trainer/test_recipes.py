"""Recipes are published experiments: their settings fit our methods, and they run on small data of the same format."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from engram_trainer import datasets, display, loop, methods, networks, recipes
from engram_trainer.cli import app
from engram_trainer.datasets import Dataset
from engram_trainer.examples import Examples
from engram_trainer.recipes import RECIPES, Recipe, find, operations, shuffled_by_numpy
from engram_trainer.sources.idx import write_idx
from engram_trainer.stream import build

NAMES = [*RECIPES]
CIFAR_100 = ["--recipe", "lucir-cifar100-b50-5"]


def command(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "200", "TERM": "dumb"})


def generated(recipe: Recipe, *, train: int, test: int = 1, side: int | None = None) -> Dataset:
    """As many classes as the recipe wants, each of a colour of its own, in noise."""
    generator = np.random.default_rng(0)
    count, (height, width, channels) = recipe.data.classes, recipe.data.shape
    shape = (side or height, side or width, channels)
    colours = generator.integers(0, 256, (count, 1, 1, channels))
    parts: list[Examples] = []
    for each in (train, test):
        class_ids = np.repeat(np.arange(count), each)
        noise = generator.integers(-20, 21, (len(class_ids), *shape))
        parts.append(Examples.of_arrays((colours[class_ids] + noise).clip(0, 255).astype(np.uint8), class_ids))
    return Dataset("generated", parts[0], parts[1])


def write_cifar(dataset: Dataset, folder: Path) -> Path:
    """As the official binary archives: bytes of the labels, then the planes of the image."""
    is_fine = len(dataset.classes) == 100
    folder = folder / ("cifar-100-binary" if is_fine else "cifar-10-batches-bin")
    folder.mkdir(parents=True)
    names = "".join(f"class {class_id}\n" for class_id in dataset.classes)
    if is_fine:
        (folder / "fine_label_names.txt").write_text(names)
        (folder / "coarse_label_names.txt").write_text("".join(f"group {group}\n" for group in range(20)))
        files = {"train.bin": dataset.train, "test.bin": dataset.test}
    else:
        (folder / "batches.meta.txt").write_text(names)
        rows = np.array_split(np.arange(len(dataset.train)), 5)
        files = {f"data_batch_{place + 1}.bin": dataset.train.select(part) for place, part in enumerate(rows)}
        files["test_batch.bin"] = dataset.test
    for name, examples in files.items():
        planes = examples.read().transpose(0, 3, 1, 2).reshape(len(examples), -1)
        labels = examples.class_ids[:, None].astype(np.uint8)
        columns = [labels // 5, labels, planes] if is_fine else [labels, planes]
        (folder / name).write_bytes(np.hstack(columns).tobytes())
    return folder


def write_folder(dataset: Dataset, folder: Path) -> Path:
    """As train/CLASS and val/CLASS, in ImageNet's way."""
    for split, examples in (("train", dataset.train), ("val", dataset.test)):
        for number, (image, class_id) in enumerate(zip(examples.read(), examples.class_ids, strict=True)):
            path = folder / split / f"n{class_id:08}" / f"{number}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path, "JPEG", quality=95)
    return folder


def test_there_are_recipes_for_every_published_experiment() -> None:
    assert len(NAMES) == 21
    for start, count in {"lucir-": 6, "mrdc-": 5, "icarl-": 1, "gem-": 3, "er-": 3, "derpp-": 3}.items():
        assert sum(name.startswith(start) for name in NAMES) == count
    assert all(find(name).name == name for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_has_settings_that_its_method_and_network_know(name: str) -> None:
    recipe = find(name)
    methods.config_class(recipe.config.method)(**recipe.config.options)
    assert recipe.config.network in networks.NETWORKS
    assert recipe.numbers
    assert all(number.source.split(",")[0] in ("code", "quoted", "computed") for number in recipe.numbers)
    assert all(-1 < number.value < 1 for number in recipe.numbers)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_cuts_data_of_its_format_into_its_tasks(name: str) -> None:
    recipe = find(name)
    stream = build(generated(recipe, train=2, side=2), recipe.config.stream)
    base = recipe.config.stream.base_classes
    assert len(stream.tasks) == recipe.config.stream.tasks
    assert base is None or len(stream.tasks[0].classes) == base
    assert stream.class_order == recipe.config.stream.class_order


def test_the_order_of_classes_is_that_of_the_papers_code() -> None:
    """Known from the logs that LUCIR's and iCaRL's code print with seed 1993."""
    assert shuffled_by_numpy(100)[:10] == (68, 56, 78, 8, 23, 84, 90, 65, 74, 76)
    assert find("lucir-cifar100-b50-5").config.stream.class_order == shuffled_by_numpy(100)
    order = find("icarl-cifar100-b0-10").config.stream.class_order
    assert order is not None
    assert order[:10] == (87, 0, 52, 58, 44, 91, 68, 97, 51, 15)
    assert sorted(order) == list(range(100))


def test_an_epoch_of_a_schedule_is_where_the_papers_have_it() -> None:
    for name, epochs in {
        "lucir-cifar100-b50-5": [80, 120],
        "lucir-imagenet-sub-5": [30, 60],
        "icarl-cifar100-b0-10": [49, 63],
    }.items():
        options = find(name).config.options
        assert [round(part * options["epochs"]) for part in options["milestones"]] == epochs


def test_budgets_are_the_bytes_of_the_papers_exemplars() -> None:
    budgets = {name: find(name).config.memory.budget_bytes for name in NAMES}
    assert budgets["lucir-cifar100-b50-5"] == 20 * (3072 + 2)
    assert budgets["lucir-imagenet-sub-5"] == 20 * (256 * 256 * 3 + 2)
    assert budgets["icarl-cifar100-b0-10"] == 2000 * (3072 + 2)
    assert budgets["gem-mnist-rotations"] == 20 * 256 * (784 + 2)
    assert budgets["er-cifar10-200"] == 200 * (3072 + 2)
    assert budgets["derpp-cifar10-200"] == 200 * (3072 + 2 + 20)


def test_the_images_of_a_recipe_are_counted_task_by_task() -> None:
    """By hand: 160 epochs over 25,000 images, then over 5,000 and 20 of each of 50, 60, 70, 80 and 90 old classes."""
    expected = 160 * (25_000 + 5 * 5_000 + 20 * (50 + 60 + 70 + 80 + 90))
    assert find("lucir-cifar100-b50-5").images == expected
    assert find("mrdc-imagenet-sub-5").images == 90 * (65_000 + 65_000 + 37 * 350)
    assert find("gem-mnist-rotations").images == 20_000 + 100 * 256 * 190


def test_operations_are_those_of_the_network_at_the_size_it_sees() -> None:
    """ResNet-18 takes 1.8e9 multiply-adds at 224 pixels (He et al., table 1)."""
    assert operations("resnet18", (224, 224, 3)) == pytest.approx(2 * 1.8e9, rel=0.02)
    assert operations("mlp", (28, 28, 1)) == 2 * (784 * 100 + 100 * 100)
    recipe = find("lucir-imagenet-sub-5")
    assert recipe.hours(is_gpu=False, cores=4) == pytest.approx(recipe.hours(is_gpu=False) / 4)
    assert recipe.hours(is_gpu=True) < recipe.hours(is_gpu=False)


def test_the_budget_of_files_is_measured_on_the_data() -> None:
    recipe = find("mrdc-imagenet-sub-5")
    data = generated(recipe, train=1, side=32)
    smooth = replace(data, train=data.train.mapped(np.zeros_like))
    assert recipe.budget(data) % 37 == 0
    assert 37 * 200 < recipe.budget(smooth) < recipe.budget(data) < 37 * 32 * 32 * 3
    assert recipe.budget(data) == recipe.budget(data)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_says_what_it_needs_and_what_its_paper_reports(name: str) -> None:
    result = command("--recipe", name, "--dry-run")
    assert result.exit_code == 0, result.output
    recipe = find(name)
    for number in recipe.numbers:
        assert f"{100 * number.value:.1f} %" in result.output
    for words in (recipe.title, recipe.data.title, "GB", "on a GPU", "CPU cores", "exemplars", "published"):
        assert words in result.output


def test_recipes_are_listed_and_each_can_be_looked_at() -> None:
    assert command("recipes", NAMES[0]).output == command("--recipe", NAMES[0], "--dry-run").output
    result = command("recipes")
    assert result.exit_code == 0
    assert all(name in result.output for name in NAMES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "lucir"], "there is no recipe 'lucir'; `engram-train recipes` lists them"),
        (["recipes", "lucir"], "there is no recipe 'lucir'"),
        ([*CIFAR_100, "--tasks", "5"], "has settings of its own, so it does not go with --tasks"),
        ([*CIFAR_100, "--network", "conv", "--set", "lr=1"], "it does not go with --network, --set"),
        (CIFAR_100, "needs CIFAR-100: give --data, the folder cifar-100-binary or cifar-100-python"),
        ([*CIFAR_100, "--data", "digits"], "hours on 1 CPU cores; give --device cuda, or --yes"),
        (
            [*CIFAR_100, "--data", "digits", "--yes"],
            "needs CIFAR-100, 100 classes of 32x32x3; 'digits' has 10 classes of 8x8x1",
        ),
        ([*CIFAR_100, "--data", "digits", "--yes", "--quality", "best"], "has 10 classes of 8x8x1"),
        ([*CIFAR_100, "--data", "/nowhere", "--yes"], "/nowhere"),
        (["--dry-run"], "give --recipe NAME"),
        (["--yes"], "give --recipe NAME"),
    ],
)
def test_what_cannot_be_started_is_said_in_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    own = [] if arguments[0] == "recipes" else ["--threads", "1", "--out", str(tmp_path / "run")]
    result = command(*arguments, *own)
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith(("gem", "er", "derpp"))])
def test_a_departure_of_initial_weights_is_that_of_the_recipes_network(name: str) -> None:
    recipe = RECIPES[name]
    told = [departure for departure in recipe.departures if " start " in departure]
    assert ["He's rule" in departure for departure in told] == [recipe.config.network != "mlp"]


@pytest.mark.parametrize(
    ("hours", "text"),
    [(0.1, "10 minutes"), (0.5, "30 minutes"), (1.2, "1 hour"), (1.6, "2 hours"), (47.4, "47 hours"), (48, "2 days")],
)
def test_a_duration_is_said_in_the_unit_that_suits_it(hours: float, text: str) -> None:
    assert display.duration(hours) == text


def assert_runs(recipe: Recipe, data: Path, folder: Path) -> None:
    """The shrunk recipe runs as the command runs it, and its report has the paper's numbers beside ours."""
    dataset = datasets.load(str(data), resize=recipe.config.resize)
    recipe.check(dataset)
    memory = replace(recipe.config.memory, budget_bytes=recipe.budget(dataset))
    loop.run(replace(recipe.config, data=str(data), memory=memory), folder, pictures=False)
    report = json.loads((folder / "report.json").read_text())
    assert [number["value"] for number in report["paper"]] == [number.value for number in recipe.numbers]
    assert all(isinstance(number["ours"], float) for number in report["paper"])
    assert report["memory"][-1]["exemplars"]


ONE_OF_EACH = ["derpp-cifar10-200", "mrdc-imagenet-sub-5"]
"""Of each format of files."""


@pytest.mark.parametrize(
    "name", [*ONE_OF_EACH, *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES if name not in ONE_OF_EACH)]
)
def test_a_recipe_runs_on_small_data_of_its_format(name: str, tmp_path: Path) -> None:
    recipe = find(name).shrunk(network="mlp", side=16 if "imagenet" in name else None)
    if recipe.data.title == "MNIST":
        write_idx(generated(recipe, train=2), tmp_path / "mnist")
        data = tmp_path / "mnist"
    elif "ImageNet" in recipe.data.title:
        data = write_folder(generated(recipe, train=2, side=20), tmp_path / "imagenet")
    else:
        data = write_cifar(generated(recipe, train=2), tmp_path)
    assert_runs(recipe, data, tmp_path / "run")


@pytest.mark.slow
def test_a_recipe_for_photographs_runs_at_their_size(tmp_path: Path) -> None:
    recipe = find("mrdc-imagenet-sub-5").shrunk(network="mlp")
    data = write_folder(generated(recipe, train=2, side=72), tmp_path / "imagenet")
    assert_runs(recipe, data, tmp_path / "run")


def test_the_command_runs_a_recipe_and_prints_the_papers_numbers_beside_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = find("er-cifar10-500").shrunk(network="mlp")
    monkeypatch.setattr(recipes, "RECIPES", {recipe.name: recipe})
    data = write_cifar(generated(recipe, train=5), tmp_path)
    run = ["--recipe", recipe.name, "--data", str(data), "--out", str(tmp_path / "run"), "--seed", "3"]
    result = command(*run)
    assert result.exit_code == 0, result.output
    table = result.output.split("recipe er-cifar10-500")[1]
    assert "57.7 % ± 0.3" in table
    assert "Mammoth's scripts/reproduce.json" in table
    found = json.loads((tmp_path / "run" / "run.json").read_text())["config"]
    assert (found["recipe"], found["seed"], found["stream"]["seed"]) == (recipe.name, 3, 3)
    assert found["memory"] == json.loads(json.dumps(vars(recipe.config.memory)))
    other = command(*run, "--resume", "--memory", "strips", "--quality", "75")
    assert other.exit_code == 1
    assert "memory.kind: raw before, strips now; memory.quality: None before, 75 now" in other.output
