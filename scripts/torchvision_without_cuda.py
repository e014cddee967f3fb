"""Let torchvision be imported beside a torch without CUDA.  Installed by environment.sh.

The torchvision of PyPI is built for the torch with CUDA; beside one without, its compiled operators
cannot be loaded and its import fails where it describes them.  The processors of VLMs need its
transforms alone, which are plain torch.  So the operators are declared; a call of one fails.
"""

import importlib.abc
import sys
from typing import Any

OPERATORS = (
    "nms", "qnms", "roi_align", "_roi_align_backward", "qroi_align", "ps_roi_align",
    "_ps_roi_align_backward", "roi_pool", "_roi_pool_backward", "ps_roi_pool",
    "_ps_roi_pool_backward", "deform_conv2d", "_deform_conv2d_backward",
)  # fmt: skip


class _Declare(importlib.abc.MetaPathFinder):
    """Declares the operators just before torchvision describes them."""

    library: Any = None

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "torchvision._meta_registrations" and self.library is None:
            import torch

            if not hasattr(torch.ops.torchvision, "nms"):
                self.library = torch.library.Library("torchvision", "DEF")
                for operator in OPERATORS:
                    self.library.define(f"{operator}(Tensor x) -> Tensor")


sys.meta_path.insert(0, _Declare())
