"""How a lab model descends: optimizers, schedule, and a faster arithmetic for CPUs."""

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


def _float32_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Attend in float32 under autocast: on CPUs the bfloat16 kernel is 16 times slower."""
    with torch.autocast("cpu", enabled=False):
        attended, _ = sdpa_attention_forward(
            module, query.float(), key.float(), value.float(), attention_mask, **more
        )
    return attended, None


def _packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    cu_seq_lens_q: Tensor,
    **more: Any,
) -> tuple[Tensor, None]:
    """Attend within pictures of one size that come in one row, all in one call.

    Without "flash" in the name of its attention, Qwen's tower calls it once a picture.
    """
    pictures = len(cu_seq_lens_q) - 1
    queries, keys, values = (
        part[0].unflatten(1, (pictures, -1)).transpose(0, 1) for part in (query, key, value)
    )
    more = {name: more[name] for name in ("scaling", "dropout", "is_causal")}
    attended, _ = _float32_attention(module, queries, keys, values, attention_mask, **more)
    return attended.flatten(0, 1).unsqueeze(0), None


FLOAT32_ATTENTION, PACKED_ATTENTION = "sdpa_float32", "flash_like_sdpa_float32"
AttentionInterface.register(FLOAT32_ATTENTION, _float32_attention)
AttentionInterface.register(PACKED_ATTENTION, _packed_attention)
AttentionMaskInterface.register(FLOAT32_ATTENTION, sdpa_mask)


def fast_products() -> torch.dtype:
    """In which arithmetic this CPU multiplies matrices fastest: bfloat16 if it has tiles for it.

    Where vectors alone know bfloat16 (AVX-512), products of the lab's shapes took twice as long as
    in float32: 80 against 155 GFLOP/s of one core.
    """
    return torch.bfloat16 if torch.cpu._is_amx_tile_supported() else torch.float32


def quicken(part: PreTrainedModel, *, packed: bool = False) -> None:
    """Compile the blocks of a tower or a decoder, and let them attend in float32 under autocast.

    ``packed`` is for a tower that gets the patches of all pictures in one row.
    """
    part.config._attn_implementation = PACKED_ATTENTION if packed else FLOAT32_ATTENTION
    blocks = next(inner for inner in part.modules() if isinstance(inner, nn.ModuleList))
    for block in blocks:
        block.compile(dynamic=True)
    if packed:
        # On patches that are cut already a convolution is a product: it took 70 % of a step.
        embed: Any = part.patch_embed
        embed.forward = lambda cut: nn.functional.linear(cut, embed.proj.weight.flatten(1))


def _optimizers(parts: Sequence[nn.Module], rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of linear layers, AdamW for embeddings, biases, norms, convolutions.

    Where the decoder has to learn copying (600 steps of single questions) Muon at 1e-2 reached a
    loss of 0.08 and AdamW at 2e-3, the one rate tried, 0.20.  The other numbers are usual ones and
    were not searched.
    """
    layers = [layer for part in parts for layer in part.modules()]
    inner = [layer.weight for layer in layers if isinstance(layer, nn.Linear)]
    matrices = {id(weight) for weight in inner}
    outer = [w for part in parts for w in part.parameters() if id(w) not in matrices]
    return [
        torch.optim.Muon(
            inner, lr=rate, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(outer, lr=min(rate, 3e-3), weight_decay=0.01, betas=(0.9, 0.98)),
    ]


def descend(
    name: str,
    parts: Sequence[nn.Module],
    loss_of: Callable[[int], Tensor],
    *,
    steps: int,
    peak_rate: float,
) -> None:
    """Descend with warm-up (a twentieth) and cosine decay to 2 %, showing the loss as it falls."""
    parameters = [weight for part in parts for weight in part.parameters()]
    optimizers = _optimizers(parts, peak_rate)
    warmup = max(1, steps // 20)

    def share(step: int) -> float:
        decay = 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))
        return min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * decay)

    schedules = [torch.optim.lr_scheduler.LambdaLR(one, share) for one in optimizers]
    running = 0.0
    bar = tqdm(range(steps), name, mininterval=5, file=sys.stderr)
    for step in bar:
        loss = loss_of(step)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        bar.set_postfix(loss=f"{running:.4f}", refresh=False)
