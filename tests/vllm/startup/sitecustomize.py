"""Lets torchvision be imported beside a torch without CUDA, in `make test-vllm` alone.

The package registry has torchvision built against CUDA; its compiled operators do not load beside vLLM's torch, and
then it fails at import, because one of them is not there to be described. Qwen2.5-Omni's processor imports it for
images, of which these tests have none. Elsewhere, install the torchvision that belongs to your torch.
"""

import importlib.abc
import sys


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            torch._coatkit_library = library  # kept: it goes with its last reference
        return None


sys.meta_path.insert(0, _Finder())
