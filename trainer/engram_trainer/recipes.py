"""Published experiments as configurations, with the numbers of their papers.

A `Recipe` is data: a `RunConfig` with every published setting, what the experiment needs, the paper's numbers with
where each was read, and in which ways our run departs from it. `RECIPES` has them by name.

The memory of a recipe is its paper's (raw pixels, or JPEG files for MRDC), and its budget is what the paper's exemplars
take there, so another kind of memory, an Engram service or strips, gets the same bytes and holds more:

    raw pixels    exemplars * (height * width * channels + 2 bytes of class id + what a method stores with each)
    JPEG files    exemplars * the mean size of the data's own images at the paper's quality, measured at the start

Where a number was read is one of: the paper or its code ("code"), another publication that prints it ("quoted"), or
our arithmetic on such numbers ("computed"). Published numbers that nobody could be found to print are left out.

Source: LUCIR, Hou et al. (CVPR 2019), code hshustc/CVPR19_Incremental_Learning at e5a90ae; MRDC, Wang et al. (ICLR
2022), code lywang3081/MRDC at bd9170e; iCaRL, Rebuffi et al. (CVPR 2017), code srebuffi/iCaRL at 90ac1be; GEM,
Lopez-Paz & Ranzato (NIPS 2017), code facebookresearch/GradientEpisodicMemory at 34c6b8e; DER, Buzzega et al. (NeurIPS
2020), code aimagelab/mammoth at e75a491.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from engram_trainer import networks
from engram_trainer.configuration import MemoryConfig, PrepareConfig, RunConfig
from engram_trainer.datasets import Dataset
from engram_trainer.examples import Shape
from engram_trainer.plain_memory import CLASS_ID_BYTES, JpegFiles
from engram_trainer.stream import StreamConfig

Measure = Literal["average_incremental", "last", "acc", "bwt"]
MEASURES: Mapping[Measure, str] = {
    "average_incremental": "average incremental accuracy",
    "last": "accuracy on all classes after the last task",
    "acc": "ACC, mean over tasks",
    "bwt": "BWT, backward transfer",
}

GPU_FLOPS, CORE_FLOPS = 3e12, 50e9
"""Operations per second in training, for estimates: a GPU of the last years in single precision (assumed, on the safe
side), and one CPU core (measured with the ResNets of `networks`, 37 to 70e9)."""
PATIENCE_HOURS = 2.0
"""A run that takes a CPU longer asks for a GPU, or to be told that this is known."""

SAMPLE_IMAGES = 200
"""Over so many images the size of a JPEG file is measured."""


@dataclass(frozen=True)
class Data:
    """A data set as a recipe needs it."""

    title: str
    classes: int
    train_per_class: int
    """About: MNIST and ImageNet differ from class to class."""
    shape: Shape
    """As the memory stores it."""
    where: str
    """What `--data` names."""
    disk_gb: float


CIFAR10 = Data(
    "CIFAR-10", 10, 5000, (32, 32, 3), "the folder cifar-10-batches-bin or cifar-10-batches-py, or its archive", 0.2
)
CIFAR100 = Data(
    "CIFAR-100", 100, 500, (32, 32, 3), "the folder cifar-100-binary or cifar-100-python, or its archive", 0.2
)
MNIST = Data("MNIST", 10, 6000, (28, 28, 1), "a folder with MNIST's four IDX files", 0.06)
IMAGENET_SUB = Data(
    "ImageNet, 100 classes",
    100,
    1300,
    (256, 256, 3),
    "a folder with train/CLASS and val/CLASS for the 100 classes that LUCIR's gen_imagenet_subset.py chooses: "
    "numpy.random.seed(1993); numpy.random.choice(the 1,000 sorted names, 100, replace=False)",
    14,
)
IMAGENET = Data("ImageNet", 1000, 1281, (256, 256, 3), "a folder with train/CLASS and val/CLASS for 1,000 classes", 145)


@dataclass(frozen=True)
class Number:
    """A published number, as a fraction."""

    measure: Measure
    value: float
    source: str
    """Where it was read: code, quoted or computed, and from what."""
    spread: float | None = None
    """Standard deviation, where one was printed."""


@dataclass(frozen=True)
class Recipe:
    """One published experiment."""

    title: str
    config: RunConfig
    """Every setting; `data` is empty, and the budget that of the paper's exemplars as `memory.kind` counts them."""
    data: Data
    exemplars: int
    """What the paper's memory holds, in all or of each class, as `config.memory.per` says."""
    images: int
    """Images that are trained on in all, exemplars and repetitions included."""
    numbers: tuple[Number, ...]
    departures: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Its key in `RECIPES`."""
        return str(self.config.recipe)

    def check(self, dataset: Dataset) -> None:
        """The data are those that the recipe needs.

        Raises:
            ValueError: they have other classes, or images of another shape.
        """
        found = (len(dataset.classes), dataset.shape)
        if found != (self.data.classes, self.data.shape):
            needed, given = (
                f"{count} classes of {shape[0]}x{shape[1]}x{shape[2]}"
                for count, shape in ((self.data.classes, self.data.shape), found)
            )
            raise ValueError(f"recipe {self.name} needs {self.data.title}, {needed}; '{dataset.name}' has {given}")

    def budget(self, dataset: Dataset) -> int:
        """Bytes of the paper's memory: those of the configuration, or measured on these data where it holds files."""
        if self.config.memory.kind != "files":
            return self.config.memory.budget_bytes
        return self.exemplars * _file_bytes(dataset, quality=self.config.memory.quality or 0)

    def hours(self, *, is_gpu: bool, cores: int = 1) -> float:
        """Estimated: operations of all passes over what the device does in an hour."""
        crop = self.config.prepare.crop
        shape = self.data.shape if crop is None else (crop, crop, self.data.shape[2])
        rate = GPU_FLOPS if is_gpu else CORE_FLOPS * cores
        return 3 * operations(self.config.network, shape) * self.images / rate / 3600  # backward is twice forward

    def shrunk(self, *, network: str | None = None, side: int | None = None) -> Recipe:
        """The same with one epoch for each phase, for a trial on small data.

        Args:
            network: in place of the recipe's.
            side: height and width of the images; what the network sees is cropped as much as before.
        """
        config, data = self.config, self.data
        options = {name: 1 for name in ("epochs", "balance_epochs") if config.options.get(name)}
        config = replace(config, options={**config.options, **options}, network=network or config.network)
        if side is not None:
            height, _, channels = data.shape
            crop = config.prepare.crop
            config = replace(
                config,
                resize=config.resize and side,
                prepare=replace(config.prepare, crop=crop and crop * side // height),
            )
            data = replace(data, shape=(side, side, channels))
        return replace(self, config=config, data=data)


@cache
def operations(network: str, shape: Shape) -> int:
    """Floating-point operations of one image's way through a network."""
    with torch.device("meta"):
        built = networks.build(network, shape, seed=0)
        images_NCHW = torch.empty(1, shape[2], shape[0], shape[1])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        built.eval()(images_NCHW)
    return int(counter.get_total_flops())


def _file_bytes(dataset: Dataset, *, quality: int) -> int:
    """The mean size of an exemplar of these data as a JPEG file, over images that lie evenly among all."""
    rows = np.linspace(0, len(dataset.train) - 1, min(SAMPLE_IMAGES, len(dataset.train))).astype(np.int64)
    files = JpegFiles.encode(dataset.train.images.read(rows), quality=quality, subsampling="4:2:0")
    return round(float(files.sizes.mean())) + CLASS_ID_BYTES


def shuffled_by_numpy(count: int, *, seed: int = 1993, before: tuple[int, ...] = ()) -> tuple[int, ...]:
    """0..count-1 as `numpy.random.seed(seed); numpy.random.shuffle` orders them in the papers' code.

    Args:
        count: how many classes there are.
        seed: 1993 in all of them.
        before: lengths of what the code shuffles first.
    """
    generator = np.random.RandomState(seed)
    for length in before:
        generator.shuffle(np.arange(length))
    order = np.arange(count)
    generator.shuffle(order)
    return tuple(order.tolist())


CIFAR_BYTES = 32 * 32 * 3 + CLASS_ID_BYTES
MNIST_BYTES = 28 * 28 + CLASS_ID_BYTES
CROP_BYTES = 256 * 256 * 3 + CLASS_ID_BYTES
LOGITS_BYTES = 2 * 10
"""float16, of CIFAR-10's classes."""

STORED_CROPS = (
    "images are stored as 256x256 centre crops, in the memory and for training, and random crops are cut from those; "
    "the paper's come from the originals"
)
XAVIER = "weights start as PyTorch's, the code's by Xavier's rule"
LUCIR_ORDER = "one class order, that of seed 1993"
PODNET_QUOTES = "quoted, LUCIR's own runs in table 1 of PODNet"
PODNET_RUNS = "quoted, three class orders, in table 1 of PODNet"
PASS_QUOTES = "quoted, in table III of PASS++"
PASS_AND_AFEC_QUOTES = "quoted, in table III of PASS++ and table 6 of AFEC"
MRDC_README = "code, the README's accuracies after each task"
MRDC_MEAN = "computed, the mean of the README's accuracies after each task, the first included"


def _grown(count: int, first: int, steps: int, per_class: int, kept: int, epochs: int) -> int:
    """Images that are trained on when each task is learned with all exemplars of the tasks before."""
    size = (count - first) // steps
    olds = [0, *(first + size * step for step in range(steps))]
    news = [first, *[size] * steps]
    return epochs * sum(new * per_class + old * kept for new, old in zip(news, olds, strict=True))


def _lucir_cifar100(steps: int, numbers: tuple[Number, ...]) -> Recipe:
    return Recipe(
        f"LUCIR on CIFAR-100: 50 classes, then {steps} steps",
        RunConfig(
            recipe=f"lucir-cifar100-b50-{steps}",
            data="",
            prepare=PrepareConfig(normalise="cifar100"),
            stream=StreamConfig(tasks=steps + 1, base_classes=50, class_order=shuffled_by_numpy(100)),
            method="lucir",
            options={
                "epochs": 160,
                "batch_size": 128,
                "lr": 0.1,
                "milestones": (0.5, 0.75),
                "momentum": 0.9,
                "weight_decay": 5e-4,
                "less_forget_weight": 5.0,
                "margin": 0.5,
                "margin_classes": 2,
                "margin_weight": 1.0,
                "replay_ratio": 0.0,
                "codec_ratio": 0.0,
                "balance_epochs": 0,
                "padding": 4,
                "flip": True,
            },
            network="resnet32",
            memory=MemoryConfig(kind="raw", budget_bytes=20 * CIFAR_BYTES, per="class"),
        ),
        CIFAR100,
        exemplars=20,
        images=_grown(100, 50, steps, 500, 20, 160),
        numbers=numbers,
        departures=(LUCIR_ORDER,),
    )


def _imagenet(
    name: str, title: str, data: Data, steps: int, memory: MemoryConfig, kept: int, numbers: tuple[Number, ...]
) -> Recipe:
    is_full = data is IMAGENET
    departures: tuple[str, ...] = (STORED_CROPS, LUCIR_ORDER)
    if memory.kind == "files":
        departures += (
            "the paper's budget is 20 original files per class, which hold 37 at quality 50; here it is what 37 stored "
            "crops take at quality 50",
        )
    if is_full:
        departures += ("the balanced fine-tune trains the embeddings of all classes, MRDC's code those of new classes",)
    return Recipe(
        f"{title}: {data.classes // 2} classes, then {steps} steps",
        RunConfig(
            recipe=f"{name}-{steps}",
            data="",
            resize=256,
            prepare=PrepareConfig(crop=224, normalise="imagenet"),
            stream=StreamConfig(
                tasks=steps + 1, base_classes=data.classes // 2, class_order=shuffled_by_numpy(data.classes)
            ),
            method="lucir",
            options={
                "epochs": 90,
                "batch_size": 128,
                "lr": 0.1,
                "milestones": (1 / 3, 2 / 3),
                "momentum": 0.9,
                "weight_decay": 1e-4,
                "less_forget_weight": 10.0,
                "margin": 0.5,
                "margin_classes": 2,
                "margin_weight": 1.0,
                "replay_ratio": 0.0,
                "codec_ratio": 0.0,
                "balance_epochs": 20 if is_full else 0,
                "balance_lr": 0.01,
                "balance_milestones": (0.5,),
                "padding": 0,
                "flip": True,
                "resized_crop": True,
            },
            network="resnet18",
            memory=memory,
        ),
        data,
        exemplars=kept,
        images=_grown(data.classes, data.classes // 2, steps, data.train_per_class, kept, 90),
        numbers=numbers,
        departures=departures,
    )


def _lucir_imagenet_sub(steps: int, average: float, source: str) -> Recipe:
    memory = MemoryConfig(kind="raw", budget_bytes=20 * CROP_BYTES, per="class")
    numbers = (Number("average_incremental", average, source),)
    return _imagenet("lucir-imagenet-sub", "LUCIR on ImageNet-Sub", IMAGENET_SUB, steps, memory, 20, numbers)


def _mrdc(data: Data, steps: int, average: float, last: float) -> Recipe:
    # The budget is measured on the data: see Recipe.budget.
    memory = MemoryConfig(kind="files", budget_bytes=1, per="class", quality=50)
    numbers = (Number("average_incremental", average, MRDC_MEAN), Number("last", last, MRDC_README))
    short, title = ("full", "ImageNet") if data is IMAGENET else ("sub", "ImageNet-Sub")
    return _imagenet(f"mrdc-imagenet-{short}", f"LUCIR with MRDC on {title}", data, steps, memory, 37, numbers)


def _icarl() -> Recipe:
    return Recipe(
        "iCaRL on CIFAR-100: 10 tasks of 10 classes",
        RunConfig(
            recipe="icarl-cifar100-b0-10",
            data="",
            prepare=PrepareConfig(normalise="cifar100"),
            # The code shuffles the images of each class, 500 a time, before the classes.
            stream=StreamConfig(tasks=10, class_order=shuffled_by_numpy(100, before=(500,) * 100)),
            method="icarl",
            options={
                "epochs": 70,
                "batch_size": 128,
                "lr": 2.0,
                "milestones": (0.7, 0.9),
                "decay": 0.2,
                "momentum": 0.9,
                "weight_decay": 2e-5,  # the gradient of the code's 1e-5 |w|^2
                "replay_ratio": 0.0,
                "padding": 4,
                "flip": True,
            },
            network="resnet32",
            memory=MemoryConfig(kind="raw", budget_bytes=2000 * CIFAR_BYTES),
        ),
        CIFAR100,
        exemplars=2000,
        images=70 * (50_000 + 9 * 2000),
        numbers=(Number("average_incremental", 0.641, "quoted, the paper's table 1a, mean of ten class orders"),),
        departures=(
            "one class order, the first of the code's ten",
            "images are divided by their deviation, too; the code subtracts the mean image only",
        ),
    )


def _gem(
    short: str,
    title: str,
    data: Data,
    *,
    stream: StreamConfig,
    network: str,
    each_bytes: int,
    numbers: tuple[Number, ...],
    departures: tuple[str, ...],
) -> Recipe:
    per_task = stream.train_per_task or 2500
    replayed = 256 * per_task // 10 * sum(range(20))
    return Recipe(
        f"GEM on {title}: 20 tasks",
        RunConfig(
            recipe=f"gem-{short}",
            data="",
            stream=stream,
            method="gem",
            options={"epochs": 1, "batch_size": 10, "lr": 0.1, "gamma": 0.5, "fill": "online", "flush": 256},
            network=network,
            memory=MemoryConfig(kind="raw", budget_bytes=20 * 256 * each_bytes, share_by="task"),
        ),
        data,
        exemplars=20 * 256,
        images=20 * per_task + replayed,
        numbers=numbers,
        departures=(
            *departures,
            "BWT is a mean over the 19 tasks that can be forgotten; the code divides by 20",
        ),
    )


def _mammoth(method: str, slots: int, options: Mapping[str, Any], numbers: tuple[Number, ...]) -> Recipe:
    title = {"er": "ER", "derpp": "DER++"}[method]
    each_bytes = CIFAR_BYTES + (LOGITS_BYTES if method == "derpp" else 0)
    return Recipe(
        f"{title} on Seq-CIFAR-10: 5 tasks of 2 classes, {slots:,} exemplars",
        RunConfig(
            recipe=f"{method}-cifar10-{slots}",
            data="",
            prepare=PrepareConfig(normalise="cifar10"),
            stream=StreamConfig(tasks=5, class_order=tuple(range(10))),
            method=method,
            options={
                "epochs": 50,
                "batch_size": 32,
                "replay_batch": 32,
                "milestones": (),
                "momentum": 0.0,
                "weight_decay": 0.0,
                "padding": 4,
                "flip": True,
                "fill": "online",
                "flush": 1,
                "compete": "all",
                **options,
            },
            network="resnet18-cifar",
            memory=MemoryConfig(kind="raw", budget_bytes=slots * each_bytes),
        ),
        CIFAR10,
        exemplars=slots,
        images=50 * 50_000 * (3 if method == "derpp" else 2),
        numbers=numbers,
        departures=("convolutions start by He's rule, Mammoth's as PyTorch's",),
    )


CO2L_QUOTES = "quoted, of the DER paper, in table 1 of Co2L"
DER_QUOTES = "quoted, a transcription of table 2 of the DER paper"
MAMMOTH_RUN = "code, Mammoth's scripts/reproduce.json"


def _all() -> Iterator[Recipe]:
    """Every recipe, in the order in which they are listed."""
    for steps, one, mean, spread in ((5, 0.6342, 0.6401, 0.0091), (10, 0.6018, 0.6122, 0.0069)):
        yield _lucir_cifar100(
            steps,
            (
                Number("average_incremental", one, PODNET_QUOTES),
                Number("average_incremental", mean, PODNET_RUNS, spread),
            ),
        )
    yield _lucir_cifar100(25, (Number("average_incremental", 0.5757, PODNET_RUNS, 0.0023),))
    for steps, average, source in (
        (5, 0.7084, PASS_AND_AFEC_QUOTES),
        (10, 0.6832, PASS_AND_AFEC_QUOTES),
        (25, 0.6144, PASS_QUOTES),
    ):
        yield _lucir_imagenet_sub(steps, average, source)
    for data, steps, average, last in (
        (IMAGENET_SUB, 5, 0.7357, 0.6557),
        (IMAGENET_SUB, 10, 0.7295, 0.6499),
        (IMAGENET_SUB, 25, 0.7176, 0.6372),
        (IMAGENET, 5, 0.6758, 0.6123),
        (IMAGENET, 10, 0.6530, 0.5755),
    ):
        yield _mrdc(data, steps, average, last)
    yield _icarl()
    yield _gem(
        "mnist-permutations",
        "MNIST permutations",
        MNIST,
        stream=StreamConfig("permuted", tasks=20, class_order=tuple(range(10)), train_per_task=1000),
        network="mlp",
        each_bytes=MNIST_BYTES,
        numbers=(Number("acc", 0.83, "quoted, the reference column of Avalanche's baselines"),),
        departures=(XAVIER,),
    )
    yield _gem(
        "mnist-rotations",
        "MNIST rotations",
        MNIST,
        stream=StreamConfig("rotated", tasks=20, class_order=tuple(range(10)), train_per_task=1000),
        network="mlp",
        each_bytes=MNIST_BYTES,
        numbers=(
            Number("acc", 0.86, "quoted, a transcription of the paper's table 3"),
            Number("bwt", 0.05, "quoted, a transcription of the paper's table 3"),
        ),
        departures=(XAVIER, "angles are drawn by the run's seed, the code's by a generator without one"),
    )
    yield _gem(
        "cifar100",
        "CIFAR-100, the task of a test image given",
        CIFAR100,
        stream=StreamConfig("task-incremental", tasks=20, class_order=tuple(range(100))),
        network="resnet18-reduced",
        each_bytes=CIFAR_BYTES,
        numbers=(Number("acc", 0.654, "quoted, a transcription of the paper's table 2"),),
        departures=(
            "BatchNorm's running statistics do not move when exemplars pass, the code's do",
            "convolutions start by He's rule, the code's as PyTorch's",
        ),
    )
    for slots, value, spread, source in (
        (200, 0.4479, 0.0186, CO2L_QUOTES),
        (500, 0.5774, 0.0027, CO2L_QUOTES),
        (5120, 0.8247, 0.0052, DER_QUOTES),
    ):
        rerun = (Number("last", 0.6339, MAMMOTH_RUN),) if slots == 500 else ()
        yield _mammoth("er", slots, {"lr": 0.1}, (Number("last", value, source, spread), *rerun))
    for slots, alpha, beta, value, spread, source in (
        (200, 0.1, 0.5, 0.6488, 0.0117, CO2L_QUOTES),
        (500, 0.2, 0.5, 0.7270, 0.0136, CO2L_QUOTES),
        (5120, 0.1, 1.0, 0.8524, 0.0049, DER_QUOTES),
    ):
        options = {"lr": 0.03, "alpha": alpha, "beta": beta}
        yield _mammoth("derpp", slots, options, (Number("last", value, source, spread),))


RECIPES: Mapping[str, Recipe] = {recipe.name: recipe for recipe in _all()}


def find(name: str) -> Recipe:
    """The recipe of a name.

    Raises:
        ValueError: there is none.
    """
    if name not in RECIPES:
        raise ValueError(f"there is no recipe {name!r}; `engram-train recipes` lists them")
    return RECIPES[name]


def beside(recipe: Recipe, metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The paper's numbers, each with ours: None where it was not measured."""
    return [{**dataclasses.asdict(number), "ours": metrics.get(number.measure)} for number in recipe.numbers]
