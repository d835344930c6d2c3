"""The conformance suite for heads. An author's test file needs no more than this:

```python
from coatkit.testing import HeadConformance


class TestConformance(HeadConformance):
    name = "./pooled.py:PooledHead"
```
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from coatkit import build
from coatkit.manifest import Kind
from coatkit.protocols import Head
from coatkit.testing.bench import Failed, Workbench
from coatkit.testing.fresh import Found, look
from coatkit.testing.loading import SharedLoadingChecks

LONG = 750
"""Positions of 30 s of sound."""


class HeadBench(Workbench):
    """Makes and calls a head for the checks.

    Args:
        widths: The backbone's width and the expert's.
        lengths: Thinking positions of the shared sounds; one has none.
    """

    def __init__(
        self, name: str, options: dict[str, object], folder: Path, widths: tuple[int, int], lengths: tuple[int, ...]
    ) -> None:
        super().__init__("head", name, options, folder)
        self.widths = widths
        generator = torch.Generator().manual_seed(0)
        self.lengths = torch.tensor(lengths)
        self.mask = torch.arange(max(lengths)) < self.lengths[:, None]  # [A, L]
        self.hidden = torch.randn(*self.mask.shape, widths[0], generator=generator)  # [A, L, hidden_size]
        self.target = torch.randn(*self.mask.shape, widths[1], generator=generator)  # [A, L, dim]

    def make(self, seed: int = 0, widths: tuple[int, int] | None = None) -> Head:
        """A head as training makes it."""
        hidden_size, dim = widths or self.widths
        component = self.component
        return self.call(
            "making it", lambda: build.load_head(component, component_options(self), hidden_size, dim, seed, "it")
        )

    @cached_property
    def head(self) -> Head | Failed:
        """One head for all checks, not in training mode."""
        made = self.attempt(self.make)
        return made.eval() if isinstance(made, Head) else made

    def run(self, head: Head, hidden: Tensor, mask: Tensor) -> Tensor:
        """What it gives for copies of the states, so that a head that changes them spoils no other check."""
        found: Tensor = self.call("forward", lambda: head(hidden.clone(), mask.clone()))
        return found

    def use(self) -> None:
        head = self.head
        if isinstance(head, Head):
            self.attempt(lambda: _back(_loss(self.run(head, self.hidden, self.mask), self.target, self.mask)))
            head.zero_grad()


def component_options(bench: Workbench) -> dict[str, object]:
    """The author's options, checked and with defaults, as a spec's are."""
    model = bench.component.options_model()
    return dict(bench.options) if model is None else model.model_validate(dict(bench.options)).model_dump()


class HeadConformance(SharedLoadingChecks):
    """Everything a head promises, as checks that pytest collects; `docs/testing.md` lists them.

    Attributes:
        hidden_size: The backbone's width the head is tried with.
        dim: The expert's width it is tried with.
        lengths: Thinking positions of the shared sounds.
        tolerance: Largest difference between a sound in a batch and alone, as a share of the output's RMS.
    """

    kind: ClassVar[Kind] = "head"
    hidden_size: ClassVar[int] = 64
    dim: ClassVar[int] = 12
    lengths: ClassVar[tuple[int, ...]] = (9, 1, 14, 0)
    tolerance: ClassVar[float] = 1e-4

    @pytest.fixture(scope="class")
    @classmethod
    def bench(cls, tmp_path_factory: pytest.TempPathFactory) -> HeadBench:
        """The head, made once for all checks."""
        if not cls.name:
            cls.fail("the test class has no name", f"set name in {cls.__name__} to a plugin's name or ./file.py:Class")
        folder = tmp_path_factory.mktemp("conformance")
        return HeadBench(cls.name, dict(cls.options), folder, (cls.hidden_size, cls.dim), cls.lengths)

    @pytest.fixture(scope="class")
    @classmethod
    def elsewhere(cls, bench: HeadBench, tmp_path_factory: pytest.TempPathFactory) -> Found:
        """What a new interpreter sees when it imports the plugin."""
        return look(bench.light_modules, cls.name, None, torch.get_num_threads(), tmp_path_factory.mktemp("elsewhere"))

    def made(self, bench: HeadBench) -> Head:
        if isinstance(bench.head, Failed):
            self.skip("it could not be made; test_loads says why")
        return bench.head

    def plain(self, bench: HeadBench) -> tuple[Head, Tensor]:
        """The head and what it gives for the shared states; left out where that cannot be used."""
        head = self.made(bench)
        with torch.no_grad():
            found = bench.attempt(lambda: bench.run(head, bench.hidden, bench.mask))
        if not isinstance(found, Tensor) or found.shape != (*bench.mask.shape, self.dim):
            self.skip("its output has another shape; test_output_is_as_declared says which")
        if not bool(found.isfinite().all()):
            self.skip("its output is not finite; test_output_is_as_declared says where")
        return head, found

    def repeatable(self, bench: HeadBench) -> tuple[Head, Tensor]:
        """As `plain`; left out where the same states give other values again, for nothing can be compared."""
        head, found = self.plain(bench)
        with torch.no_grad():
            if not torch.equal(bench.run(head, bench.hidden, bench.mask), found):
                self.skip("forward cannot be repeated; test_forward_is_repeatable says so")
        return head, found

    def differs(self, one: Tensor, other: Tensor) -> str:
        """How two outputs differ beyond `tolerance`; empty where they do not."""
        worst = float((one.double() - other.double()).abs().nan_to_num(float("inf")).max()) if one.numel() else 0.0
        allowed = self.tolerance * (float(other.double().square().mean().sqrt()) if other.numel() else 1.0)
        return f"by up to {worst:.2g}, where {allowed:.2g} is allowed" if worst > allowed else ""

    def test_loads(self, bench: HeadBench) -> None:
        """It is made from `(hidden_size, dim, **options)`, and is a `coatkit.Head`."""
        if isinstance(bench.head, Failed):
            self.fail(
                f"it could not be made with hidden_size {self.hidden_size} and dim {self.dim}: {bench.head}",
                "take (hidden_size, dim, **options); where widths must fit, set hidden_size in this class",
            )
        if not isinstance(bench.head, Head):
            self.fail(f"it is a {type(bench.head).__name__}", "make it a subclass of coatkit.Head")

    def test_output_is_as_declared(self, bench: HeadBench) -> None:
        """[A, L, hidden_size] states and [A, L] mask to finite [A, L, dim], at padding and without positions too."""
        head = self.made(bench)
        found = bench.attempt(lambda: bench.run(head, bench.hidden, bench.mask))
        expected = (*bench.mask.shape, self.dim)
        if isinstance(found, Failed):
            self.fail(f"forward raised {found}", "take hidden [A, L, hidden_size] and mask [A, L], True = valid")
        if not isinstance(found, Tensor) or tuple(found.shape) != expected:
            said = tuple(found.shape) if isinstance(found, Tensor) else f"a {type(found).__name__}"
            self.fail(f"forward gave {said}; expected {expected}", "give a tensor [A, L, dim], a value per position")
        if not bool(found.isfinite().all()):
            where = "a padded position" if bool(found[bench.mask].isfinite().all()) else "a valid position"
            self.fail(
                f"forward gave NaN or infinite values at {where}",
                "padding is masked by multiplication, so it must be finite; a sound may have no valid position at all,"
                " and attention over nothing is NaN: let such a sound see its padding",
            )

    @pytest.mark.parametrize("positions", [1, LONG])
    def test_takes_any_length(self, bench: HeadBench, positions: int) -> None:
        """One thinking position, and the 750 of 30 s."""
        head, _ = self.plain(bench)
        hidden = torch.randn(1, positions, self.hidden_size, generator=torch.Generator().manual_seed(1))
        mask = torch.ones(1, positions, dtype=torch.bool)
        with torch.no_grad():
            found = bench.attempt(lambda: bench.run(head, hidden, mask))
        if isinstance(found, Failed) or found.shape != (1, positions, self.dim) or not bool(found.isfinite().all()):
            said = f"raised {found}" if isinstance(found, Failed) else f"gave {tuple(found.shape)}, or not finite"
            self.fail(f"forward on {positions} position(s) {said}", "fix no number of positions")

    def test_other_widths(self, bench: HeadBench) -> None:
        """Backbones and experts differ in width: it takes any that its options allow."""
        self.plain(bench)
        widths = (2 * self.hidden_size, self.dim + 1)
        head = bench.attempt(lambda: bench.make(widths=widths))
        if isinstance(head, Failed):
            self.fail(f"with hidden_size {widths[0]} and dim {widths[1]} it cannot be made: {head}", "use both widths")
        hidden = torch.cat([bench.hidden, bench.hidden], -1)
        found = bench.attempt(lambda: bench.run(head.eval(), hidden, bench.mask))
        if isinstance(found, Failed) or found.shape != (*bench.mask.shape, widths[1]):
            said = f"raised {found}" if isinstance(found, Failed) else f"gave {tuple(found.shape)}"
            self.fail(f"with hidden_size {widths[0]} and dim {widths[1]} forward {said}", "use both widths")

    def test_forward_is_repeatable(self, bench: HeadBench) -> None:
        """Outside training the same states give the same bits."""
        head, first = self.plain(bench)
        with torch.no_grad():
            again = bench.run(head, bench.hidden, bench.mask)
        if not torch.equal(first, again):
            self.fail("the same states again give other values", "let nothing random be left after .eval()")

    def test_padding_changes_nothing(self, bench: HeadBench) -> None:
        """A sound alone has the values it has in a batch, whatever stands at the padding."""
        head, batch = self.repeatable(bench)
        with torch.no_grad():
            noise = torch.randn(bench.hidden.shape, generator=torch.Generator().manual_seed(2))
            noisy = torch.where(bench.mask[..., None], bench.hidden, 50.0 * noise)
            other = bench.run(head, noisy, bench.mask)
            for sound, length in enumerate(bench.lengths.tolist()):
                hidden, mask = bench.hidden[sound : sound + 1, :length], bench.mask[sound : sound + 1, :length]
                if said := self.differs(other[sound, :length], batch[sound, :length]):
                    self.fail(
                        f"what stands at padded positions leaks into a sound of {length} positions: it differs {said}",
                        "use the mask: attention, pooling and convolution must not see masked positions",
                    )
                if length and (said := self.differs(bench.run(head, hidden, mask)[0], batch[sound, :length])):
                    self.fail(
                        f"a sound of {length} positions has other values in a batch than alone: they differ {said}",
                        "let how many positions are padded change nothing, in norms and means too",
                    )

    def test_other_sounds_change_nothing(self, bench: HeadBench) -> None:
        """Sounds of a batch know nothing of one another, and their order is all the same."""
        head, batch = self.repeatable(bench)
        order = torch.arange(len(bench.lengths)).flip(0)
        with torch.no_grad():
            turned = bench.run(head, bench.hidden[order], bench.mask[order])[order]
            changed = bench.hidden.clone()
            changed[0] = changed[0].flip(0)
            other = bench.run(head, changed, bench.mask)
        for found, why in ((turned[0], "in another place of the batch"), (other[2], "beside another sound")):
            same = batch[0] if why.startswith("in") else batch[2]
            valid = bench.mask[0] if why.startswith("in") else bench.mask[2]
            if said := self.differs(found[valid], same[valid]):
                self.fail(f"a sound has other values {why}: they differ {said}", "mix nothing over the first axis")

    def test_states_matter(self, bench: HeadBench) -> None:
        """Other states give other values at every position."""
        head, batch = self.repeatable(bench)
        with torch.no_grad():
            other = bench.run(head, bench.hidden.flip(-1), bench.mask)
        alike = (other == batch).all(-1) & bench.mask
        if bool(alike.any()):
            self.fail(
                f"{int(alike.sum())} of {int(bench.mask.sum())} positions have the same values for other states",
                "let every position's value follow from the states",
            )

    def test_gradient_reaches_states_and_parameters(self, bench: HeadBench) -> None:
        """Every valid state gets gradient, no padded one does, and so does every parameter that learns."""
        head, _ = self.plain(bench)
        hidden = bench.hidden.clone().requires_grad_()
        head.zero_grad()
        found = bench.attempt(lambda: _back(_loss(head(hidden, bench.mask), bench.target, bench.mask)))
        if isinstance(found, Failed):
            self.fail(f"the way back raised {found}", "detach nothing on the way from states to values")
        gradients = {name: p.grad for name, p in head.named_parameters() if p.requires_grad}
        head.zero_grad()
        reached = torch.zeros_like(bench.mask) if hidden.grad is None else hidden.grad.abs().sum(-1) > 0
        if not bool(reached[bench.mask].all()):
            self.fail(
                f"{int((~reached & bench.mask).sum())} of {int(bench.mask.sum())} valid states get no gradient",
                "detach nothing on the way from states to values: the backbone learns through the head",
            )
        if hidden.grad is not None and not bool(hidden.grad.isfinite().all()):
            self.fail("the gradient of the states is not finite", "divide by nothing that can be 0")
        if bool(reached[~bench.mask].any()):
            self.fail("padded states get gradient", "use the mask: padded positions must not be seen")
        idle = [name for name, gradient in gradients.items() if gradient is None or not bool(gradient.any())]
        if idle:
            self.fail(
                f"{len(idle)} of {len(gradients)} parameters get no gradient, {idle[0]} first",
                "remove parameters that nothing uses, or freeze them with requires_grad_(False)",
            )

    def test_seed_fixes_the_start(self, bench: HeadBench) -> None:
        """Two heads with the same seed start with the same bits; `--resume` and ablations need that."""
        self.made(bench)
        one, two = bench.make().state_dict(), bench.make().state_dict()
        other = [name for name, tensor in one.items() if not torch.equal(tensor, two[name])]
        if other:
            self.fail(
                f"two heads made with one seed differ in {other[0]}",
                "draw from torch's own generator, or one with a fixed seed; not from numpy, random or a time",
            )

    def test_saves_and_loads(self, bench: HeadBench, tmp_path: Path) -> None:
        """What it has learnt is in its state dict: safetensors and back into another head gives the same values."""
        head, batch = self.repeatable(bench)
        file = tmp_path / "head.safetensors"
        found = bench.attempt(lambda: save_file(head.state_dict(), file))
        if isinstance(found, Failed):
            self.fail(
                f"safetensors cannot store it: {found}", "let no two names hold the same tensor, and keep tensors only"
            )
        other = bench.make(seed=1).eval()
        other.load_state_dict(load_file(file))
        with torch.no_grad():
            again = bench.run(other, bench.hidden, bench.mask)
        if not torch.equal(batch, again):
            self.fail(
                "loaded into another head, its state dict gives other values",
                "register what matters as parameters or buffers; a plain tensor attribute is not saved",
            )

    def test_moves_to_another_device(self, bench: HeadBench) -> None:
        """All its tensors move with `.to(device)`; tried on torch's meta device, where `coatkit plan` counts it."""
        self.plain(bench)
        head = bench.make().eval().to("meta")
        hidden, mask = bench.hidden.to("meta"), bench.mask.to("meta")
        found = bench.attempt(lambda: head(hidden, mask))
        if isinstance(found, Failed) and ("device" in str(found) or "meta" in str(found)):
            self.fail(
                f"moved to another device it raises {found}",
                "register tensors with register_buffer, make new ones on hidden.device, and look at no values",
            )

    def test_computes_in_bfloat16(self, bench: HeadBench) -> None:
        """Under autocast, with states in bfloat16, as beside a backbone of that type."""
        head, batch = self.repeatable(bench)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            found = bench.attempt(lambda: head(bench.hidden.bfloat16(), bench.mask))
        if isinstance(found, Failed):
            self.fail(f"with states in bfloat16 under autocast it raises {found}", "fix no type; cast to hidden.dtype")
        if not bool(found.isfinite().all()):
            self.fail("with states in bfloat16 it gives NaN or infinite values", "use no number beyond a type's range")
        apart = float((found.float() - batch)[bench.mask].abs().max()) / (float(batch[bench.mask].std()) or 1.0)
        if apart > 0.5:
            self.fail(f"in bfloat16 its values are off by {apart:.2g} of their spread", "keep sums in float32")

    def test_input_is_left_alone(self, bench: HeadBench) -> None:
        """States and mask are not changed: other heads get them next."""
        head, _ = self.plain(bench)
        hidden, mask = bench.hidden.clone(), bench.mask.clone()
        with torch.no_grad():
            head(hidden, mask)
        for name, now, before in (("hidden", hidden, bench.hidden), ("mask", mask, bench.mask)):
            if not torch.equal(now, before):
                self.fail(f"forward changed {name} in place", "work on a copy; no operations that end in _")


def _loss(values: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error over valid positions."""
    return (values - target)[mask].square().mean()


def _back(loss: Tensor) -> None:
    torch.autograd.backward(loss)
