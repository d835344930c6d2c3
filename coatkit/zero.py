"""DeepSpeed's ZeRO stages 1 and 2: the optimizer's state, and with 2 the gradients, spread over the processes.

Weights stay whole in every process, and checkpoints are those of any other run: a run may go on without DeepSpeed.
`accelerate launch --use_deepspeed --zero_stage 2` asks for it. DeepSpeed is called directly, as torch's FSDP2 is:
accelerate would read precision, clipping and accumulation from settings of its own, and works with it on a GPU only.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from coatkit.errors import RunError

Moments = dict[str, dict[str, Tensor]]
"""Optimizer state by parameter name."""
_KEPT = ("exp_avg", "exp_avg_sq")


def wanted_stage() -> int:
    """The ZeRO stage that the launcher asks for, taken out of the environment; 0 for none.

    Raises:
        RunError: If DeepSpeed is not installed, or the stage is none that is supported.
    """
    if os.environ.pop("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return 0
    if os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"):
        raise RunError("a DeepSpeed config file is not read: the spec alone decides; give --zero_stage 1 or 2 instead")
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    if stage not in ("1", "2"):
        raise RunError(
            f"DeepSpeed with ZeRO stage {stage}: coatkit trains with stages 1 and 2; to spread the weights as stage 3"
            " does, use `accelerate launch --use_fsdp`"
        )
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed  # noqa: F401
    except Exception as error:  # it looks for compilers and devices when it is imported
        why = "is not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be loaded: {error}"
        raise RunError(f"DeepSpeed {why}; install it with: pip install 'coatkit[deepspeed]'") from None
    return int(stage)


class ZeroOptimizer:
    """AdamW under DeepSpeed, with as much of an optimizer's face as the loop looks at.

    Args:
        model: What is called in training; its parameters that learn are in `optimizer`.
        optimizer: AdamW, fresh.
        named: The parameters that learn, by name.
        stage: 1 or 2.
        clip_norm: Largest norm of the gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        named: Mapping[str, nn.Parameter],
        stage: int,
        clip_norm: float,
    ) -> None:
        import deepspeed

        deepspeed.utils.logger.setLevel("ERROR")
        settings = {
            "train_micro_batch_size_per_gpu": 1,  # of no effect: losses are divided by our own counts
            "gradient_accumulation_steps": 1,
            "gradient_clipping": clip_norm,
            "steps_per_print": 10**9,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        if not deepspeed.comm.is_initialized():
            deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False)
        self.engine, self._zero, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        self._named = dict(named)
        self._stepped = self._filled = False

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self._zero.param_groups
        return groups

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """The way back of one part of a step; the gradient is complete after the last."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss)
        self._filled = True

    def norm(self) -> float:
        """Of the gradient over all processes, before it is clipped; not finite where any of it is not."""
        if not self._filled:
            return 0.0
        found = float(self._zero.scaled_global_norm())
        return found if found >= 0 else math.nan  # below 0 is how it says so

    def step(self) -> None:
        """Clip, and take the step."""
        self.engine.step()
        self._filled = False

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradient of a step that was not taken."""
        if self._filled:
            for gradients in self._zero.averaged_gradients.values():
                for gradient in gradients or ():
                    gradient.fill_(math.nan)  # DeepSpeed takes no step over these, and clears all it holds
            self.engine.step()
            self._filled = False

    def moments(self, *, keep: bool) -> Moments:
        """State by parameter name, whole and on the CPU; to be called by all, and those that do not `keep` get none."""
        found: Moments = {}
        for flat, name, parameter in self._places():
            state = self._zero.optimizer.state.get(flat)
            if not state:
                continue
            whole: dict[str, Tensor] = {"step": torch.as_tensor(state["step"]).clone()}
            for key in _KEPT:  # one at a time, so that no process holds two
                gathered = torch.zeros_like(parameter, dtype=torch.float32).flatten()
                for ours, theirs in _pieces(parameter, state[key], gathered):
                    theirs.copy_(ours)
                torch.distributed.all_reduce(gathered)
                if keep:
                    whole[key] = gathered.reshape(parameter.shape).cpu()
            if keep:
                found[name] = whole
        return found

    def set_moments(self, moments: Moments) -> None:
        """Take over state by parameter name; what is taken is taken out of `moments`."""
        for flat, name, parameter in self._places():
            if name not in moments:
                continue
            kept, state = moments.pop(name), self._zero.optimizer.state[flat]
            state["step"] = kept["step"].clone()
            for key in _KEPT:
                part = state.setdefault(key, torch.zeros_like(flat))
                for ours, theirs in _pieces(parameter, part, kept[key].flatten()):
                    ours.copy_(theirs)

    def _places(self) -> list[tuple[Tensor, str, Any]]:
        """Every parameter with its name and this process's part of the flat tensor that it lies in."""
        names = {id(parameter): name for name, parameter in self._named.items()}
        return [
            (flat, names[id(parameter)], parameter)
            for flat, group in zip(self._zero.single_partition_of_fp32_groups, self._zero.bit16_groups, strict=True)
            for parameter in group
        ]

    def close(self) -> None:
        """Take DeepSpeed's hooks off, so that the next stage can put its own on; parameters keep their values."""
        self.engine.destroy()
        for parameter in self._named.values():
            parameter.data = parameter.data.clone()  # no longer a view of the flat tensor


def _pieces(parameter: Any, flat: Tensor, whole: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What this process's flat part holds of a parameter: in the flat part, and in the flattened whole."""
    mapped = parameter._hp_mapping
    if mapped is None:
        return []
    ours, theirs = mapped.hp_fragment_address, mapped.lp_fragment_address
    return [(flat.narrow(0, ours.start, ours.numel), whole.narrow(0, theirs.start, theirs.numel))]
