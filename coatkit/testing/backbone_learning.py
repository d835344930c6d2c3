"""Checks on what learns in a backbone, what must not, and on keeping what was learnt."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from coatkit import checkpoint
from coatkit.backbones.hf import HFBackbone
from coatkit.backbones.options import BackboneOptions
from coatkit.errors import CoatkitError
from coatkit.model import CoatModel
from coatkit.protocols import Backbone, Inputs
from coatkit.testing.backbone_base import BackboneBase, difference
from coatkit.testing.backbone_bench import BackboneBench, calls
from coatkit.testing.backbone_forward import unlike
from coatkit.testing.bench import Failed

_CHOICES = ("lm: full", "lm: none", "tower: full", "projector: full", "projector: none", "tokens: all", "tokens: none")


class Fault(NamedTuple):
    """What is wrong, and what to do."""

    what: str
    remedy: str


FINE = Fault("", "")


class LearningChecks(BackboneBase):
    """Gradients, optimizer steps, the training mode, and checkpoints."""

    def options_model(self, bench: BackboneBench) -> HFBackbone:
        """The backbone, where it takes the options that every adapter takes; the check is left out where not."""
        backbone = self.adapter(bench)
        if not isinstance(backbone.options, BackboneOptions):
            self.skip("its options are no coatkit.BackboneOptions")
        return backbone

    def learners(self, backbone: Backbone) -> dict[str, nn.Parameter]:
        """Parameters that ask for gradient, by name."""
        return {name: p for name, p in backbone.model.named_parameters() if p.requires_grad}

    def learning(self, bench: BackboneBench) -> Backbone:
        """The backbone, where its parts and gradients are right; the check is left out where they are not."""
        backbone, inputs, _ = self.plain(bench)
        if not self.learners(backbone):
            self.skip("with these options nothing in it learns")
        if "gradients" not in bench.faults:
            bench.faults["gradients"] = self.parts_fault(backbone)
            if bench.faults["gradients"] == FINE:
                bench.faults["gradients"] = self.gradient_fault(bench, backbone, inputs)
        if bench.faults["gradients"] != FINE:
            self.skip("what learns is not right; test_parts_are_what_learns or test_gradient_reaches_... says why")
        return backbone

    def must(self, fault: Fault, where: str = "") -> None:
        """Fail where there is a fault."""
        if fault != FINE:
            self.fail(where + fault[0], fault[1])

    def test_parts_are_what_learns(self, bench: BackboneBench) -> None:
        """`parts` names every parameter that asks for gradient once: the optimizer gets those, a checkpoint too."""
        self.must(self.parts_fault(self.loaded(bench)))

    def parts_fault(self, backbone: Backbone) -> Fault:
        """What is wrong with `parts`."""
        learn = {id(p): name for name, p in self.learners(backbone).items()}
        named = [parameter for part in backbone.parts().values() for parameter in part]
        remedy = "let parts() give every parameter with requires_grad, each in one part"
        if len({id(p) for p in named}) < len(named):
            return Fault("parts() names a parameter twice", remedy)
        if missed := [name for i, name in learn.items() if i not in {id(p) for p in named}]:
            return Fault(f"{missed[0]} asks for gradient and is in none of parts()", remedy)
        if extra := sum(id(p) not in learn for p in named):
            return Fault(f"{extra} parameters in parts() are frozen, or none of the network's", remedy)
        if empty := [name for name, part in backbone.parts().items() if not part]:
            return Fault(f"part {empty[0]!r} is empty", "leave a part out where nothing in it learns")
        return FINE

    def test_gradient_reaches_what_learns(self, bench: BackboneBench) -> None:
        """Every parameter that learns gets gradient from rows with sounds, and nothing else does."""
        backbone, inputs, _ = self.plain(bench)
        if not self.learners(backbone):
            self.skip("with these options nothing in it learns")
        self.must(self.gradient_fault(bench, backbone, inputs))

    def gradient_fault(self, bench: BackboneBench, backbone: Backbone, inputs: Inputs) -> Fault:
        """What is wrong with the gradient of one pass."""
        found = bench.attempt(lambda: bench.gradients(backbone, inputs))
        if isinstance(found, Failed):
            return Fault(f"the backward pass raised {found}", "let forward() work with gradient")
        learn = self.learners(backbone)
        for name, gradient in found.items():
            if name not in learn and gradient is not None:
                return Fault(f"{name} is frozen and gets gradient", "call requires_grad_(False) on it in load")
            if name in learn and gradient is None:
                return Fault(
                    f"{name} is to learn and gets no gradient",
                    "freeze what no pass uses: with several processes, each waits for its gradient",
                )
            if gradient is not None and not gradient.isfinite().all():
                return Fault(f"the gradient of {name} is NaN or infinite", "look for a division by zero")
        for part, parameters in backbone.parts().items():
            names = [name for name, p in learn.items() if any(p is q for q in parameters)]
            if not any(bool(torch.count_nonzero(g)) for name in names if (g := found[name]) is not None):
                return Fault(f"part {part!r} gets a gradient of zeros", "see that the loss depends on it")
        return FINE

    def test_adapters_are_on_the_language_model_only(self, bench: BackboneBench) -> None:
        """Every layer of the language model has the adapters of `lora.targets`; nothing else has one."""
        backbone = self.options_model(bench)
        if backbone.options.train.lm != "lora":
            self.skip("its options give the language model no adapters")
        inside = {id(module) for module in backbone.language_model.modules()}
        adapted = {n: m for n, m in backbone.model.named_modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")}
        remedy = "set language_model_path to the decoder, whose children are layers.0, layers.1, ..."
        if outside := [name for name, module in adapted.items() if id(module) not in inside]:
            self.fail(f"{len(outside)} adapters are outside of the language model, {outside[0]} first", remedy)
        wanted = set(backbone.options.lora.targets)
        for i, layer in enumerate(backbone.language_model.layers):
            names = {name.rpartition(".")[2] for name, m in layer.named_modules() if hasattr(m, "lora_A")}
            if names != wanted:
                self.fail(f"layer {i} has adapters on {sorted(names)}; lora.targets are {sorted(wanted)}", remedy)

    def test_step_moves_only_what_learns(self, bench: BackboneBench) -> None:
        """After steps with weight decay all else is as it was, the embedding matrix and the output rows among it."""
        self.learning(bench)
        self.must(self.plain_step(bench))

    def plain_step(self, bench: BackboneBench) -> Fault:
        """What is wrong with a step; tried once for all checks."""
        if "step" not in bench.faults:
            bench.faults["step"] = self.step_fault(bench, bench.awake())
        return Fault(*bench.faults["step"])

    def step_fault(self, bench: BackboneBench, backbone: Backbone) -> Fault:
        """What a step moves that it must not, or leaves that it should move."""
        before, after = bench.step(backbone, bench.prepare(backbone))
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        learn = set(self.learners(backbone))
        if wrong := sorted(changed - learn):
            return Fault(
                f"an optimizer step over parts() moves {wrong[0]}, which is frozen",
                "share no tensor between what learns and what does not, and change none in forward()",
            )
        if still := sorted(learn - changed):
            return Fault(f"{still[0]} is in parts() and does not move", "see that the loss depends on it")
        if not isinstance(backbone, HFBackbone) or backbone.options.train.tokens != "new":
            return FINE
        if backbone.options.train.lm == "full":  # the output matrix learns then, and so does the embedding it may be
            return FINE
        for where in ("input", "output"):
            weight = getattr(backbone.stock, f"get_{where}_embeddings")().weight
            if weight.requires_grad:
                return Fault(f"the {where} embedding learns", "freeze it; the three rows are apart from it")
        rows = backbone.thinking_rows.rows
        name = next(n for n, p in backbone.model.named_parameters() if p is rows)
        if backbone.thinking is not None and not bool((before[name] != after[name]).any(-1).all()):
            return Fault("not all three thinking rows learn", "see that all three tokens are in the block")
        return FINE

    def test_thinking_rows_are_the_blocks(self, bench: BackboneBench) -> None:
        """The decoder sees the three rows at the three tokens, and the embedding matrix's rows everywhere else."""
        self.plain(bench)
        self.adapter(bench)
        backbone: Any = bench.awake()
        inputs, seen = bench.prepare(backbone), []
        for values in ([1.0, 2.0, 3.0], [4.0, 5.0, 6.0]):
            with torch.no_grad():
                backbone.thinking_rows.rows.copy_(torch.tensor(values)[:, None])
            with calls(backbone.language_model, lambda _, kwargs: kwargs["inputs_embeds"].detach().clone()) as found:
                bench.forward(backbone, inputs)
            seen.append(found[0])
        ids = inputs.tokens["input_ids"]
        for value, token in zip((1.0, 2.0, 3.0), backbone.preparer.tokens.ids, strict=True):
            if not bool((seen[0][ids == token] == value).all()):
                self.fail(
                    f"where {backbone.preparer.tokenizer.decode([token])} stands, the decoder does not see its row",
                    "let ThinkingRows replace the embedding's output, and the decoder see that unchanged",
                )
        others = ~torch.isin(ids, torch.tensor(backbone.preparer.tokens.ids))
        if not torch.equal(seen[0][others], seen[1][others]):
            self.fail("the three rows change what stands at other tokens", "replace the three tokens' embeddings only")

    def test_frozen_tower_stays_in_eval_mode(self, bench: BackboneBench) -> None:
        """`model.train()` leaves a frozen tower as it is: with dropout on, the target would be noise."""
        self.plain(bench)
        backbone = bench.awake()
        inputs = bench.prepare(backbone)
        backbone.model.train()
        remedy = "keep HFBackbone's model.train, which puts a frozen tower back in evaluation mode"
        frozen = True
        if isinstance(backbone, HFBackbone):
            frozen = not any(p.requires_grad for p in backbone.tower.parameters())
            if frozen and (name := next((n or "top" for n, m in backbone.tower.named_modules() if m.training), None)):
                self.fail(f"after model.train() the frozen audio tower's {name} is in training mode", remedy)
        first, again = (bench.forward(backbone, inputs).audio for _ in range(2))
        backbone.model.eval()
        calm = bench.forward(backbone, inputs).audio
        assert first is not None
        assert again is not None
        assert calm is not None
        for other, when in ((again, "twice in training mode"), (calm, "in training mode and in evaluation mode")):
            a, b = first.tower, other.tower
            if frozen and a is not None and b is not None and not torch.equal(a, b):
                self.fail(f"audio.tower of the same sounds differs, heard {when}", remedy)
        if busy := next((name for name, module in backbone.model.named_modules() if module.training), None):
            self.fail(f"after model.eval() {busy} is in training mode", "let model.eval() reach every module")

    @pytest.mark.parametrize("tower", ["frozen", "learning"])
    def test_gradient_checkpointing_changes_no_gradient(self, bench: BackboneBench, tower: str) -> None:
        """Layers of the language model are run again in the backward pass, the tower is not, and gradients agree."""
        self.learning(bench)
        self.twice(bench)
        self.options_model(bench)
        more: dict[str, Any] = {} if tower == "frozen" else {"train": {"tower": "full"}}
        if more and isinstance(refused := bench.attempt(lambda: bench.load(**more)), Failed):
            self.skip(f"its tower cannot learn: {refused}")
        found: list[dict[str, Tensor | None]] = []
        once = 0
        for on in (False, True):
            backbone: Any = bench.awake(gradient_checkpointing=on, **more)
            backbone.model.train()
            inputs = bench.prepare(backbone)
            layer = next(m for m in backbone.language_model.layers[0].modules() if isinstance(m, nn.Linear))
            heard = next(m for m in backbone.tower.modules() if isinstance(m, nn.Linear))
            with (
                calls(layer, lambda *_: 1) as layers,
                calls(heard, lambda *_: 1) as towers,
                torch.random.fork_rng(devices=[]),
            ):
                torch.manual_seed(0)
                found.append(bench.gradients(backbone, inputs))
            if len(layers) != 1 + on:
                self.fail(
                    f"with gradient_checkpointing: {str(on).lower()} the language model's first layer runs"
                    f" {len(layers)} times; expected {1 + on}",
                    "switch it on for language_model only, as HFBackbone.load does, on a model that supports it",
                )
            if on and len(towers) != once:
                self.fail(
                    f"with gradient checkpointing the audio tower runs {len(towers)} times, without it {once}",
                    "switch it on for the language model only",
                )
            once = len(towers)
        for name, expected in found[0].items():
            got = found[1][name]
            if (got is None) != (expected is None):
                self.fail(f"with gradient checkpointing {name} has no gradient", "use use_reentrant=False")
            if got is not None and expected is not None and (problem := difference(got, expected, 1e-3)):
                self.fail(f"gradient checkpointing changes the gradient of {name}: {problem}", "use_reentrant=False")

    @pytest.mark.parametrize("choice", _CHOICES)
    def test_train_options(self, bench: BackboneBench, choice: str) -> None:
        """The option `train` chooses what learns in each part; a choice that cannot be made is refused by name."""
        self.learning(bench)
        usual = set(self.options_model(bench).parts())
        key, _, value = choice.partition(": ")
        found = bench.attempt(lambda: bench.awake(train={key: value}))
        if isinstance(found, Failed):
            if isinstance(found.error, CoatkitError) and key in str(found.error):
                self.skip(f"it refuses train: {{{choice}}}: {found.error}")
            self.broken(f"loading with train: {{{choice}}}", found, "take the value, or refuse it in the options model")
        wanted = {"lm": usual - {"lora", "lm"}, "tokens": usual - {"tokens"}}.get(key, usual - {key})
        wanted |= set() if value == "none" else {key}
        if set(found.parts()) != wanted:
            self.fail(
                f"with train: {{{choice}}} the parts that learn are {sorted(found.parts())}; expected {sorted(wanted)}",
                "set language_model_path, tower_path and projector_path to the modules' names",
            )
        where = f"with train: {{{choice}}} "
        self.must(self.parts_fault(found), where)
        if wanted:
            self.must(self.gradient_fault(bench, found, bench.prepare(found)), where)

    def test_bfloat16_trains(self, bench: BackboneBench) -> None:
        """With `dtype: bfloat16` what learns stays in float32, and loss, gradient and answers work."""
        usual = self.plain(bench).output
        self.learning(bench)
        self.options_model(bench)
        backbone = self.working(bench.variant(dtype="bfloat16"), "it with dtype: bfloat16")
        kinds = {p.dtype for p in self.learners(backbone).values()}
        if kinds - {torch.float32}:
            self.fail(f"with dtype: bfloat16 what learns is {kinds}", "make what learns float32, as HFBackbone does")
        if not any(p.dtype == torch.bfloat16 for p in backbone.model.parameters()):
            self.fail("with dtype: bfloat16 no weight is bfloat16", "hold the frozen weights in the given dtype")
        inputs = bench.prepare(backbone)
        if self.learners(backbone):
            self.must(self.gradient_fault(bench, backbone, inputs), "with dtype: bfloat16 ")
        cost = float(bench.forward(backbone, inputs).ce_sum)
        if not abs(cost - float(usual.ce_sum)) < 0.1 * float(usual.ce_sum):
            self.fail(
                f"the loss is {cost:.4g} in bfloat16 and {float(usual.ce_sum):.4g} in float32", "look for overflow"
            )
        asked = bench.prepare(backbone, train=False)
        answers = bench.attempt(lambda: bench.generate(backbone, asked, 2))
        if isinstance(answers, Failed):
            self.broken("answering with dtype: bfloat16", answers, "cast features to the weights' type")

    def test_checkpoint_brings_back_what_was_learnt(self, bench: BackboneBench) -> None:
        """Saved after training and loaded into a new instance, it gives the same bits and the same answers."""
        self.learning(bench)
        self.twice(bench)
        if self.plain_step(bench) != FINE:
            self.skip("a step moves what is frozen; test_step_moves_only_what_learns says what")
        self._returns(bench, bench.awake(), bench.awake(), "")

    def _returns(self, bench: BackboneBench, trained: Backbone, fresh: Backbone, what: str) -> None:
        inputs, asked = bench.prepare(trained), bench.prepare(trained, train=False)
        bench.step(trained, inputs)
        remedy = "give every tensor that training changes requires_grad, and change no other"
        expected = bench.forward(trained, inputs)
        models = [CoatModel(backbone, {}, {}) for backbone in (trained, fresh)]
        names = frozenset(name for name, p in models[0].named_parameters() if p.requires_grad)
        place = bench.folder / f"checkpoints{len(list(bench.folder.glob('checkpoints*')))}"
        saved = checkpoint.save(place, checkpoint.learned(models[0], names), {}, [], checkpoint.Position(1), keep=1)
        loaded = bench.attempt(lambda: checkpoint.load_model(saved, models[1], names))
        if isinstance(loaded, Failed):
            self.broken(f"{what}loading its own checkpoint", loaded, remedy)
        if problem := unlike(bench.forward(fresh, inputs), expected):
            self.fail(f"{what}with what was learnt loaded into a new instance, {problem} is another one", remedy)
        if bench.generate(fresh, asked, 6) != bench.generate(trained, asked, 6):
            self.fail(f"{what}with what was learnt loaded into a new instance, answers are other ones", remedy)

    def test_merged_adapters_change_nothing(self, bench: BackboneBench) -> None:
        """Adapters merged into the weights, as for serving, give the outputs they gave beside them."""
        _, inputs, _ = self.plain(bench)
        if self.options_model(bench).options.train.lm != "lora":
            self.skip("its options give the language model no adapters")
        backbone: Any = bench.awake()
        expected = bench.forward(backbone, inputs)
        with backbone.peft.disable_adapter():
            without = bench.forward(backbone, inputs)
        if not unlike(without, expected):
            self.fail("its adapters have no effect", "put them on the layers that the pass runs")
        backbone.peft.merge_adapter()
        merged = bench.forward(backbone, inputs)
        assert merged.thinking is not None
        assert expected.thinking is not None
        pairs = {
            "the loss": (merged.ce_sum[None], expected.ce_sum[None]),
            "the thinking states": (merged.thinking, expected.thinking),
        }
        for name, (one, other) in pairs.items():
            if problem := difference(one, other, 10 * self.tolerance):
                self.fail(f"merging the adapters changes {name}: {problem}", "adapt plain linear layers only")

    @pytest.mark.parametrize("embeddings", ["tied", "untied"])
    def test_embeddings(self, bench: BackboneBench, embeddings: str) -> None:
        """With output rows that are the input embedding itself, or a matrix of their own, nothing of either moves."""
        self.learning(bench)
        self.twice(bench)
        if self.options_model(bench).options.train.tokens == "all":
            self.skip("with these options the embedding learns")
        if self.plain_step(bench) != FINE:
            self.skip("a step moves what is frozen; test_step_moves_only_what_learns says what")

        def change(stock: Any) -> None:
            rows = stock.get_input_embeddings().weight
            stock.get_output_embeddings().weight = rows if embeddings == "tied" else nn.Parameter(rows.detach().clone())

        made = bench.attempt(lambda: [bench.remade(change) for _ in range(3)])
        what = f"with {embeddings} embeddings "
        if isinstance(made, Failed):
            self.broken(f"loading it {what.rstrip()}", made, "treat input and output rows as one tensor where they are")
        self.must(self.step_fault(bench, made[0]), what)
        self._returns(bench, made[1], made[2], what)
