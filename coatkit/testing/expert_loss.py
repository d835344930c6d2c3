"""Checks on how an expert judges a prediction."""

from __future__ import annotations

import torch
from torch import Tensor

from coatkit.testing.bench import Bench, Failed, Lesson, parameters
from coatkit.testing.expert_base import ExpertBase

_GARBAGE = 1e3


class LossChecks(ExpertBase):
    """The loss on the shared sounds' features at thinking positions, with a prediction some way off."""

    def terms(self, bench: Bench, predicted: Tensor, lesson: Lesson) -> dict[str, Tensor]:
        """Loss terms; the check is left out where they are no use."""
        found = bench.attempt(lambda: bench.loss(self.loaded(bench), predicted, lesson))
        if isinstance(found, Failed) or _wrong(found):
            self.skip("its loss cannot be used; test_loss_gives_named_scalars says why")
        return found

    def total(self, bench: Bench, predicted: Tensor, lesson: Lesson) -> Tensor:
        """The sum of the terms, as it is trained on with weight 1."""
        return torch.stack([value.float() for value in self.terms(bench, predicted, lesson).values()]).sum()

    def test_loss_gives_named_scalars(self, bench: Bench) -> None:
        """A dict of names to finite scalar tensors, which carry gradient."""
        lesson = self.lesson(bench)
        predicted = lesson.predicted.clone().requires_grad_()
        found = bench.attempt(lambda: bench.loss(self.loaded(bench), predicted, lesson))
        if isinstance(found, Failed):
            self.fail(
                f"loss raised {found}",
                f"take [A, L, dim] at any frame rate; here {tuple(lesson.target.shape)} at {self.thinking_rate:g} Hz",
            )
        if problem := _wrong(found):
            self.fail(problem, 'give a dict of names to scalar tensors, e.g. {"mse": coatkit.masked_mse(...)}')

    def test_loss_is_least_for_the_target(self, bench: Bench) -> None:
        """A perfect prediction costs less than a random one, and no more than one that is a little off or shifted."""
        lesson = self.lesson(bench)
        # Noise alone would find a loss that wants something else only by luck: its mean, which is what pulls, is near
        # zero. A shift of every value, up and down, is what such a loss prefers.
        shift = 0.5 * lesson.noise[lesson.mask].square().mean().sqrt()
        with torch.no_grad():
            perfect = float(self.total(bench, lesson.target.clone(), lesson))
            near = min(
                float(self.total(bench, lesson.target + error, lesson))
                for error in (0.1 * lesson.noise, -0.1 * lesson.noise, shift, -shift)
            )
            far = float(self.total(bench, lesson.noise.clone(), lesson))
        remedy = (
            "compare like with like: what is done to the target before comparing (a classifier, a sigmoid, a layer over"
            " time) must be done to the prediction, at the same frame rate"
        )
        if not perfect < far:
            self.fail(f"the loss of the target itself is {perfect:.4g}, that of random values is {far:.4g}", remedy)
        if perfect > near + 1e-6 * abs(near):
            self.fail(f"the loss of the target itself is {perfect:.6g}, that of one that is off {near:.6g}", remedy)

    def test_loss_ignores_padding(self, bench: Bench) -> None:
        """What stands at masked positions, and how many of them there are, changes no term."""
        lesson = self.lesson(bench)
        with torch.no_grad():
            before = self.terms(bench, lesson.predicted.clone(), lesson)
            garbage = torch.full_like(lesson.target[:, :3], _GARBAGE)
            outside = ~lesson.mask[..., None]
            target = torch.cat([lesson.target.masked_fill(outside, _GARBAGE), garbage], 1)
            predicted = torch.cat([lesson.predicted.masked_fill(outside, -_GARBAGE), -garbage], 1)
            mask = torch.cat([lesson.mask, torch.zeros_like(lesson.mask[:, :3])], 1)
            after = self.terms(bench, predicted, Lesson(target, mask, predicted, predicted))
        for name, value in before.items():
            if abs(float(after[name]) - float(value)) > 1e-5 * max(abs(float(value)), 1e-6):
                self.fail(
                    f"loss term {name!r} is {float(value):.6g} with zeros at masked positions and"
                    f" {float(after[name]):.6g} with other values and three more masked positions there",
                    "take the mean over positions in the mask only (coatkit.masked_mse), and zero masked positions"
                    " before any layer that looks over time",
                )

    def test_gradient_reaches_valid_positions_only(self, bench: Bench) -> None:
        """Every valid position is taught, and no padding is."""
        lesson = self.lesson(bench)
        predicted = lesson.predicted.clone().requires_grad_()
        total = self.total(bench, predicted, lesson)
        if not total.requires_grad:
            self.fail(
                "the loss carries no gradient", "compute it with torch from `predicted`, without detach or no_grad"
            )
        (gradient,) = torch.autograd.grad(total, predicted, allow_unused=True)
        if gradient is None:
            self.fail("the loss does not depend on the prediction", "compute it from `predicted`")
        if not gradient.isfinite().all():
            self.fail("the gradient is NaN or infinite", "look for a square root, a logarithm or a division at zero")
        reached = (gradient != 0).any(-1)
        if missed := int((lesson.mask & ~reached).sum()):
            self.fail(
                f"{missed} of {int(lesson.mask.sum())} valid positions get no gradient",
                "compare every position in the mask, and detach nothing of the prediction",
            )
        if leaked := int((reached & ~lesson.mask).sum()):
            self.fail(f"{leaked} masked positions get gradient", "select positions with the mask before any mean")

    def test_gradient_stays_out_of_the_teacher(self, bench: Bench) -> None:
        """The prediction is the only thing that a step of the optimizer may move."""
        lesson, expert = self.lesson(bench), self.loaded(bench)
        predicted = lesson.predicted.clone().requires_grad_()
        total = self.total(bench, predicted, lesson)
        named = {id(tensor): name for name, tensor in parameters(expert).items()}
        others = [leaf for leaf in _leaves(total) if leaf is not predicted]
        if others:
            shown = ", ".join(named.get(id(leaf), f"a tensor {tuple(leaf.shape)}") for leaf in others[:4])
            self.fail(
                f"the loss sends gradient to {len(others)} tensor(s) of the teacher: {shown}",
                "call .requires_grad_(False) on every module in load, and pass the target through them under no_grad",
            )

    def test_loss_leaves_its_arguments_alone(self, bench: Bench) -> None:
        """Prediction, target and mask are as before; other terms read them too."""
        expert, lesson = self.loaded(bench), self.lesson(bench)
        predicted = lesson.predicted.clone()
        given = {"predicted": predicted, "target": lesson.target.clone(), "mask": lesson.mask.clone()}
        # Without gradient, in-place changes to the prediction are not stopped by autograd itself.
        self.terms(bench, predicted.clone(), lesson)
        with torch.no_grad():
            bench.call("loss", lambda: expert.loss(*given.values()))
        before = {"predicted": lesson.predicted, "target": lesson.target, "mask": lesson.mask}
        for name, tensor in given.items():
            if not torch.equal(tensor, before[name]):
                self.fail(f"loss changed {name} in place", "work on a copy: no in-place operation on what it is given")


def _wrong(terms: object) -> str:
    """What is wrong with what `loss` gave; empty where nothing is."""
    if not isinstance(terms, dict) or not terms:
        return f"loss gave {terms!r:.80}, not a dict with at least one term"
    for name, value in terms.items():
        if not isinstance(name, str) or not name:
            return f"loss gave a term named {name!r}"
        if not isinstance(value, Tensor) or value.ndim:
            kind = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            return f"loss term {name!r} is {kind}, not a scalar tensor"
        if not value.isfinite():
            return f"loss term {name!r} is {float(value)} for finite predictions and targets"
    return ""


def _leaves(total: Tensor) -> list[Tensor]:
    """Tensors that a backward pass from `total` would give gradient to."""
    found: list[Tensor] = []
    todo, seen = [total.grad_fn], set()
    for node in todo:
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(leaf := getattr(node, "variable", None), Tensor):
            found.append(leaf)
        todo += [inner for inner, _ in node.next_functions]
    return found
