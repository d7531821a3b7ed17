"""GEM by its theorem: after the projection no constraint is violated, and an unviolated gradient is unchanged."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import numpy as np
import pytest
import quadprog
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from engram.fields import KEY
from engram_trainer import datasets, stream
from engram_trainer.evaluation import accuracy
from engram_trainer.local_memory import LocalConfig, LocalMemory
from engram_trainer.memory import Learned
from engram_trainer.methods import Learner
from engram_trainer.methods.gem import RIDGE, Config, Gem, frozen_statistics, project, project_on_one
from engram_trainer.plain_memory import local_memory
from engram_trainer.preparation import pixels
from engram_trainer.runtime import assign
from engram_trainer.steps import Minibatch
from engram_trainer.stream import Stream, StreamConfig, Task
from tests.trainer.runs import learner_of, quiet, run, runtime_of, same

Problem = tuple[torch.Tensor, torch.Tensor]


def gradients(seed: int, tasks: int, parameters: int, *, alike: float = 0.0) -> Problem:
    """A gradient and references in float64; `alike` mixes a common direction into the references."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(parameters, generator=generator, dtype=torch.float64)
    references = torch.randn(tasks, parameters, generator=generator, dtype=torch.float64) + alike * common
    lengths = 10 ** (4 * torch.rand(tasks, 1, generator=generator, dtype=torch.float64) - 2)
    return torch.randn(parameters, generator=generator, dtype=torch.float64) - alike * common / 2, references * lengths


problems = st.builds(
    gradients,
    st.integers(0, 2**31),
    st.integers(1, 12),
    st.integers(12, 60),
    alike=st.sampled_from([0.0, 0.3, 1.0, 3.0]),
)


@settings(deadline=None)  # the clock of a busy machine is not the subject
@given(problems, st.sampled_from([0.0, 0.1, 1.0]))
def test_the_projection_meets_every_condition_of_the_optimum(problem: Problem, gamma: float) -> None:
    gradient, references = problem
    projected = project(gradient, references, gamma=gamma)
    if projected is gradient:
        assert bool((references @ gradient >= 0).all())
        return
    # Multipliers v of z = g + A'v, recovered from z alone.
    multipliers = torch.linalg.lstsq(references.T, (projected - gradient)[:, None]).solution[:, 0]
    scale = float(gradient.norm() + gamma * references.norm())
    lengths = references.norm(dim=1)
    slack = references @ projected / lengths
    assert bool((references.T @ multipliers - (projected - gradient)).norm() <= 1e-6 * scale)
    assert float(((multipliers - gamma) * lengths).min()) >= -1e-6 * scale
    assert float(slack.min()) >= -2 * np.sqrt(RIDGE) * scale
    complementary = ((multipliers - gamma) * lengths) * slack
    assert float(complementary.abs().max()) <= 2e-3 * scale**2


@settings(deadline=None)
@given(problems, st.sampled_from([0.0, 0.1, 1.0]))
def test_the_projection_agrees_with_a_general_quadratic_programming_solver(problem: Problem, gamma: float) -> None:
    gradient, references = problem
    projected = project(gradient, references, gamma=gamma)
    if projected is gradient:
        return
    lengths = references.norm(dim=1, keepdim=True)
    rows = (references / lengths).numpy()
    hessian = rows @ rows.T + RIDGE * np.eye(len(rows))
    least = gamma * lengths[:, 0].numpy()
    # quadprog minimises 1/2 v'Pv - q'v under C'v >= b.
    weights = quadprog.solve_qp(hessian, -(rows @ gradient.numpy()), np.eye(len(rows)), least)[0]
    expected = gradient.numpy() + weights @ rows
    # The same strictly convex problem; float64 and a condition number of at most k / RIDGE set the tolerance.
    np.testing.assert_allclose(projected.numpy(), expected, atol=1e-6 * (1 + np.abs(expected).max()))


@settings(deadline=None)
@given(problems, st.floats(-4, 4), st.floats(-4, 4))
def test_the_projection_does_not_depend_on_the_scale_of_the_gradients(
    problem: Problem, decades: float, reference_decades: float
) -> None:
    gradient, references = problem
    projected = project(gradient, references)
    everything = project(gradient * 10**decades, references * 10**decades)
    torch.testing.assert_close(
        everything, projected * 10**decades, rtol=1e-6, atol=1e-6 * float(gradient.norm()) * 10**decades
    )
    # The cone is the same however long its rows are.
    only_references = project(gradient, references * 10**reference_decades)
    torch.testing.assert_close(only_references, projected, rtol=1e-6, atol=1e-6 * float(gradient.norm()))


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1.0, 1e4])
def test_small_float32_gradients_are_constrained_as_well_as_large_ones(scale: float) -> None:
    gradient, references = (tensor.float() * scale for tensor in gradients(3, 8, 5000, alike=0.5))
    projected = project(gradient, references)
    cosines = references @ projected / references.norm(dim=1) / gradient.norm()
    assert float((references @ gradient).min()) < 0
    assert float(cosines.min()) > -1e-3


@pytest.mark.parametrize("exponent", range(-26, -14))
def test_rows_too_short_for_float32_products_are_harmless(exponent: int) -> None:
    """A task that is known by heart has gradients like these."""
    gradient, references = (tensor.float() for tensor in gradients(3, 4, 500, alike=1.0))
    projected = project(gradient, torch.cat([references[:2], references[2:] * 10**exponent]))
    assert float((references[:2] @ projected).min()) > -1e-3 * float(gradient.norm())
    assert bool(torch.isfinite(project(gradient, references * 10**exponent)).all())


@settings(deadline=None)
@given(problems)
def test_an_unbroken_gradient_comes_back_as_the_same_object(problem: Problem) -> None:
    gradient, references = problem
    agreeing = references * torch.sign(references @ gradient)[:, None]
    before = gradient.clone()
    assert project(gradient, agreeing, gamma=0.5) is gradient
    assert torch.equal(gradient, before)


def test_the_sign_of_the_published_text_breaks_the_constraints() -> None:
    """The paper writes G = -(g_1, ..., g_k) and z = G'v + g; taken at its word, earlier tasks are turned uphill."""
    gradient, references = gradients(7, 5, 40, alike=1.0)
    rows = -references
    hessian = (rows @ rows.T).numpy() + 1e-9 * np.eye(5)
    weights = quadprog.solve_qp(hessian, (rows @ gradient).numpy(), np.eye(5), np.zeros(5))[0]
    literal = gradient + rows.T @ torch.from_numpy(weights)
    right = project(gradient, references)
    assert float((references @ literal).min()) < -0.01 * float(gradient.norm())
    assert float((references @ right / references.norm(dim=1)).min()) > -1e-3 * float(gradient.norm())


@settings(deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 60), st.sampled_from([1e-4, 1.0, 1e4]))
def test_with_one_earlier_task_gem_is_the_closed_form_of_a_gem(seed: int, parameters: int, scale: float) -> None:
    gradient, references = gradients(seed, 1, parameters, alike=1.0)
    gradient, references = gradient * scale, references * scale
    torch.testing.assert_close(
        project(gradient, references),
        project_on_one(gradient, references[0]),
        rtol=0,
        atol=1e-5 * float(gradient.norm()),
    )


def test_a_gradient_straight_against_its_reference_becomes_zero() -> None:
    gradient = torch.tensor([3.0, -4.0], dtype=torch.float64)
    assert float(project(gradient, -gradient[None]).norm()) <= 1e-5 * 5
    assert torch.equal(project_on_one(gradient, -gradient), torch.zeros(2, dtype=torch.float64))


def test_a_case_by_hand() -> None:
    """Going right hurts the first task, which wants (-1, 1); the nearest harmless step is half of (1, 1)."""
    gradient = torch.tensor([1.0, 0.0], dtype=torch.float64)
    references = torch.tensor([[-1.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(project(gradient, references), torch.tensor([0.5, 0.5]).double(), rtol=0, atol=1e-5)


def test_rows_of_zeros_are_dropped() -> None:
    gradient, references = gradients(1, 3, 10, alike=1.0)
    with_zero = torch.cat([references, torch.zeros(1, 10, dtype=torch.float64)])
    assert torch.equal(project(gradient, with_zero), project(gradient, references))
    assert project(gradient, torch.zeros(2, 10, dtype=torch.float64)) is gradient


def test_equal_and_opposite_references_leave_only_what_is_orthogonal_to_them() -> None:
    row = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    projected = project(torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64), torch.stack([row, row, -row]))
    torch.testing.assert_close(projected, torch.tensor([0.0, 1.0, 0.0]).double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_are_refused(value: float) -> None:
    gradient, references = gradients(1, 3, 10)
    broken = references.clone()
    broken[1, 2] = value
    for bad_gradient, bad_references in ((gradient, broken), (broken[1], references)):
        with pytest.raises(FloatingPointError, match="not finite"):
            project(bad_gradient, bad_references)
    with pytest.raises(FloatingPointError, match="not finite"):
        project_on_one(broken[1], references[0])


def test_a_negative_margin_is_refused() -> None:
    with pytest.raises(ValueError, match=r"-0\.1"):
        project(torch.ones(2), torch.ones(1, 2), gamma=-0.1)


def test_replay_passes_leave_the_statistics_of_batch_normalisation_alone() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten())
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.rand(5, 1, 6, 6) + 3
    with frozen_statistics(model):
        replayed = model(images)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    torch.testing.assert_close(replayed, model(images))  # normalised by the batch, as in training
    assert not torch.equal(before["1.running_mean"], model.state_dict()["1.running_mean"])


@pytest.fixture(scope="module")
def tasks() -> Stream:
    dataset = datasets.load("digits").first(train=20, test=10)
    return stream.build(dataset, StreamConfig(scenario="permuted", tasks=3, seed=1))


def learned(tasks: Stream, **options: Any) -> Gem:
    learner: Gem = learner_of("gem", tasks, seed=5, **options)
    run(learner, local_memory(LocalConfig(kind="strips", budget_bytes=10**6, ranking="random", quality=90)), tasks)
    return learner


@pytest.mark.parametrize("options", [{}, {"average": True}, {"replay_batch": 16}], ids=["gem", "a-gem", "drawn"])
def test_two_runs_with_one_seed_are_bit_identical(tasks: Stream, options: dict[str, Any]) -> None:
    first, second = learned(tasks, **options), learned(tasks, **options)
    assert same(first.state_dict(), second.state_dict())
    assert first.corrected_steps == second.corrected_steps > 0


def test_the_first_task_has_no_constraints(tasks: Stream) -> None:
    learner: Gem = learner_of("gem", tasks, seed=5)
    learner.learn(tasks.tasks[0], local_memory(LocalConfig(kind="raw", budget_bytes=10**6)), quiet)
    assert learner.corrected_steps == 0


def test_exemplars_of_the_current_task_are_not_a_constraint(tasks: Stream) -> None:
    """A task that is learned again after a crash, or visited twice, must not constrain itself."""
    memory = local_memory(LocalConfig(kind="raw", budget_bytes=10**6))
    memory.add(Learned(0, tasks.tasks[0].train))
    alone: Gem = learner_of("gem", tasks, seed=5)
    alone.learn(tasks.tasks[0], memory, quiet)
    assert alone.corrected_steps == 0


def test_one_step_along_the_corrected_gradient_raises_no_earlier_loss(tasks: Stream) -> None:
    learner = learned(tasks, lr=0.05)
    task, parameters = tasks.tasks[2], list(learner.model.parameters())
    earlier = {0: tasks.tasks[0], 1: tasks.tasks[1]}

    def loss(each: Task) -> torch.Tensor:
        labels = learner.runtime.labels(each.train.class_ids)
        return learner.losses(pixels(each.train.read()), labels, tasks.seen(2)).mean()

    def gradient_of(each: Task) -> torch.Tensor:
        return torch.cat([part.reshape(-1) for part in torch.autograd.grad(loss(each), parameters)])

    references = torch.stack([gradient_of(each) for each in earlier.values()])
    against = gradient_of(task) - references.sum(dim=0)  # surely breaks the constraints
    corrected = project(against, references)
    assert corrected is not against
    before = [loss(each).item() for each in earlier.values()]
    # First order only, so a small step; float32 losses near 1 are exact to about 1e-6.
    step = 1e-3 / float(against.norm())
    with torch.no_grad():
        assign(parameters, corrected)
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.sub_(parameter.grad, alpha=step)
    for each, was in zip(earlier.values(), before, strict=True):
        assert loss(each).item() <= was + 2e-6


@pytest.mark.parametrize(
    ("options", "least"),
    [
        pytest.param({"epochs": 2}, 0.6, id="gem"),
        pytest.param(
            {"average": True, "epochs": 20, "batch_size": 50, "lr": 0.03}, 0.15, id="a-gem", marks=pytest.mark.slow
        ),
    ],
)
def test_earlier_classes_hold_their_own_against_newer_ones(options: dict[str, Any], least: float) -> None:
    """Constraints that do not see the logits of newer classes let these win every image: 0 % on all earlier tasks."""
    tasks = stream.build(datasets.load("digits"), StreamConfig(tasks=5, seed=1))
    learner = learned(tasks, **options)
    assert (
        fmean([accuracy(learner.scores, learner.runtime, task, learned=4) or 0.0 for task in tasks.tasks[:-1]]) > least
    )


def test_gem_forgets_less_than_plain_training(tasks: Stream) -> None:
    plain = learner_of("finetune", tasks, seed=5, epochs=1, batch_size=10, lr=0.1, momentum=0.0, milestones=())
    run(plain, local_memory(LocalConfig(kind="raw", budget_bytes=10**6)), tasks)
    gem = learned(tasks)

    def mean(learner: Learner) -> float:
        return fmean([accuracy(learner.scores, gem.runtime, task, learned=2) or 0.0 for task in tasks.tasks])

    assert mean(gem) > mean(plain)


class Recording(Gem):
    """GEM that notes which tasks each step is constrained by."""

    constraints: set[tuple[int, ...]]

    def _references(self, replay: Minibatch, parameters: list[nn.Parameter], seen: int) -> torch.Tensor:
        references_KP = super()._references(replay, parameters, seen)
        assert len(references_KP) == len(set(replay.tasks.tolist()))
        self.constraints.add(tuple(sorted(set(replay.tasks.tolist()))))
        return references_KP


def returning(**options: Any) -> Stream:
    dataset = datasets.load("digits").first(train=20, test=10)
    return stream.build(dataset, StreamConfig(scenario="permuted", tasks=3, seed=1, **options))


def with_ring(tasks: Stream, slots: int, **options: Any) -> tuple[Recording, LocalMemory]:
    learner = Recording(runtime_of(tasks, 5), Config(fill="online", slots=slots, **options), network="mlp")
    learner.constraints = set()
    config = LocalConfig(kind="raw", budget_bytes=10**6, share_by="task", fields={KEY: "utf8"})
    return learner, local_memory(config)


def test_where_tasks_return_there_is_one_constraint_for_each_distinct_task_but_the_current_one() -> None:
    tasks = returning(visits=(0, 1, 2, 0, 1, 1))
    learner, memory = with_ring(tasks, 60)
    for visit, constraints in enumerate([set(), {(0,)}, {(0, 1)}, {(1, 2)}, {(0, 2)}, {(0, 2)}]):
        learner.constraints = set()
        run(learner, memory, tasks, visit + 1, first=visit)
        assert learner.constraints == constraints


def test_the_ring_holds_the_last_images_of_each_task_those_of_its_last_visit_first() -> None:
    tasks = returning(visits=(0, 1, 2, 0))
    learner, memory = with_ring(tasks, 3 * 60, flush=7)
    run(learner, memory, tasks, 3)
    assert {task: sum(classes.values()) for task, classes in memory.counts().items()} == {0: 60, 1: 60, 2: 60}
    assert {key.partition("-")[0] for key in set(memory.keys())} == {"v0", "v1", "v2"}
    run(learner, memory, tasks, 4, first=3)
    # Task 0 has 200 images, 100 for each of its two visits: the ring has turned once and more.
    assert {key.partition("-")[0] for key in set(memory.keys())} == {"v1", "v2", "v3"}
    assert {task: sum(classes.values()) for task, classes in memory.counts().items()} == {0: 60, 1: 60, 2: 60}


def test_the_ring_keeps_what_was_trained_on_last() -> None:
    tasks = returning()
    order: list[int] = []

    class Watching(Recording):
        def losses(self, images_NCHW: torch.Tensor, labels_N: torch.Tensor, seen: int) -> torch.Tensor:
            order.extend(labels_N.tolist())
            return super().losses(images_NCHW, labels_N, seen)

    _, memory = with_ring(tasks, 3 * 8)
    learner = Watching(runtime_of(tasks, 5), Config(fill="online", slots=3 * 8, flush=1), network="mlp")
    run(learner, memory, tasks, 1)
    (kept,) = memory.walk(100)
    assert sorted(tasks.labels(kept.class_ids).tolist()) == sorted(order[-8:])
