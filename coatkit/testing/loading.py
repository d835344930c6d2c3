"""Checks on what loading reaches for and leaves behind, the same for every kind of component."""

from __future__ import annotations

from coatkit.testing.bench import Workbench
from coatkit.testing.fresh import Found
from coatkit.testing.suite import Conformance


class SharedLoadingChecks(Conformance):
    """Needs two fixtures: `bench`, and `elsewhere`, what a new interpreter saw."""

    def test_entry_module_imports_no_torch(self, bench: Workbench, elsewhere: Found) -> None:
        """`coatkit plugins` and `coatkit check` import every plugin's entry module: seconds for everybody."""
        if not bench.light_modules:
            self.skip("it is no installed plugin, so it has no entry module")
        for name in bench.light_modules:
            if name not in elsewhere.heavy:
                self.fail(f"importing {name} in a new Python process failed: {elsewhere.error}", "repair the import")
            if heavy := elsewhere.heavy[name]:
                self.fail(
                    f"importing {name} imports {', '.join(heavy)}",
                    "name the class in the manifest as 'module:Class' and import nothing of it there; keep the options"
                    " model in a module of its own",
                )

    def test_uses_no_network(self, bench: Workbench, elsewhere: Found) -> None:
        """Training runs on machines without a network; only `coatkit fetch` downloads."""
        bench.use()
        if found := list(dict.fromkeys([*bench.watch.network, *elsewhere.network])):
            self.fail(
                f"loading or using it tried to reach the network: {'; '.join(found[:4])}",
                "list files as Assets in the manifest and find them with coatkit.require, model folders with"
                " coatkit.backbones.folder, which never asks the model hub; import no code that fetches",
            )

    def test_writes_nothing_at_home(self, bench: Workbench, elsewhere: Found) -> None:
        """A home can be read-only or shared by a thousand jobs."""
        bench.use()
        if found := list(dict.fromkeys([*bench.watch.home, *elsewhere.home])):
            self.fail(
                f"loading or using it wrote to the home folder: {', '.join(found[:4])}",
                "write nothing while loading and using it, or only below coatkit's cache folder; what it needs belongs"
                " to the manifest's assets",
            )

    def test_leaves_global_state_alone(self, bench: Workbench) -> None:
        """Random states, grad mode, default dtype and threads belong to the training run."""
        bench.use()
        if bench.touched:
            shown = "; ".join(f"{name} (in {call})" for name, call in bench.touched.items())
            self.fail(
                f"it changed {shown}",
                "draw from a torch.Generator of its own or in torch.random.fork_rng(), as"
                " coatkit.backbones.tiny.tiny_model does; set no global switches; see that dropout is off",
            )
