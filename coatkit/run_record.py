"""What a run writes down about itself before it starts, and the lines it opens with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coatkit.data.rows import Rows
from coatkit.data.scan import Scan
from coatkit.files import file_sha256
from coatkit.model import CoatModel
from coatkit.run_folder import environment
from coatkit.spec_file import LoadedSpec


def describe(loaded: LoadedSpec, model: CoatModel, sources: Mapping[str, tuple[Rows, Scan]]) -> dict[str, Any]:
    """The contents of run.json."""
    components = {}
    for place, chosen in loaded.chosen.items():
        entry = {
            "use": chosen.component.use,
            "from": chosen.component.distribution,
            "version": chosen.component.version,
        }
        source = chosen.component.source_file()
        if source is not None:
            entry["sha256"] = file_sha256(source)
        if chosen.component.manifest is not None:
            entry["weights_licence"] = chosen.component.manifest.weights_licence
        components[place] = entry
    return {
        "name": loaded.spec.name,
        "folder": str(loaded.folder),
        "random_weights": [p for p, c in loaded.chosen.items() if c.options.get("weights") == "random"],
        "components": components,
        "experts": {
            name: {
                "dim": expert.dim,
                "frame_rate": expert.frame_rate,
                "sample_rate": expert.sample_rate,
                "fingerprint": expert.fingerprint(),
            }
            for name, expert in model.experts.items()
        },
        "backbone": {"fingerprint": model.backbone.fingerprint()},
        "data": {
            str(rows.path): {
                "sha256": rows.fingerprint(),
                "rows": len(rows),
                "bad_rows": len(found.bad),
                "left_out": len(found.left_out),
                "hours": round(float(found.seconds.sum()) / 3600, 4),
            }
            for rows, found in sources.values()
        },
        "parameters": {
            "trainable": {part: sum(p.numel() for p in ps) for part, ps in model.parts().items()},
            "total": sum(p.numel() for p in model.parameters()),
        },
        "environment": environment(),
    }


def opening_lines(loaded: LoadedSpec, record: Mapping[str, Any], begun: int) -> list[str]:
    """What a person should know before the bar starts; random weights come first."""
    spec = loaded.spec
    lines = []
    if record["random_weights"]:
        lines.append(f"RANDOM WEIGHTS in {', '.join(record['random_weights'])}: this run teaches nothing real.")
    rows = ", ".join(
        f"{d['rows'] - d['bad_rows'] - d['left_out']} rows ({d['hours']:.2f} h)" for d in record["data"].values()
    )
    learns = ", ".join(f"{part} {count / 1e6:.2f} M" for part, count in record["parameters"]["trainable"].items())
    lines.append(f"{spec.name}: {spec.backbone.use}, experts {', '.join(spec.experts) or 'none'}; {rows}")
    lines.append(f"learns: {learns}; of {record['parameters']['total'] / 1e6:.1f} M in all")
    if bad := sum(d["bad_rows"] for d in record["data"].values()):
        lines.append(f"{bad} bad rows set aside; see {loaded.output / 'quarantine.jsonl'}")
    if spec.calibrate and spec.calibrate.losses:
        scales = ", ".join(f"{name} {loss:.3g}" for name, loss in spec.calibrate.losses.items())
        lines.append(f"calibrated: losses are divided by those of predicting the mean: {scales}")
    lines += [f"note: {note}" for note in loaded.notes]
    if begun:
        lines.append(f"continuing from step {begun} of {spec.total_steps}")
    return lines
