"""A vision tower: any of timm's plain ViTs, as Prismatic uses them.

What it says of an image is the output of its second-to-last block, a vector for each patch. What is no plain
ViT, or would not see all of the picture, is refused before anything is trained.
"""

import timm
import torch
from torch import nn

from machinery.config import UserError


def build_tower(image_size: int, *, model: str, pretrained: bool = False, **kwargs) -> nn.Module:
    """A timm ViT by name, with any of timm's arguments, whose output is (B, patches, width): the
    second-to-last block's, without final norm and class or register tokens (Prismatic's choice,
    prismatic/.../base_vision.py; checkpoints have the last block, too). Raises UserError for no plain ViT."""
    def make(pretrained):
        vit = timm.create_model(model, pretrained, num_classes=0, img_size=image_size, **kwargs)
        # through forward, because ZeRO-3 gathers a module's parameters when it is called; a tensor, because
        # its hooks see no lists
        vit.forward = lambda pixels: vit.forward_intermediates(
            pixels, [len(vit.blocks) - 2], norm=False, stop_early=True, output_fmt="NLC",
            intermediates_only=True)[0]
        return vit

    if random := [key for key, value in kwargs.items() if "drop" in key and value]:
        raise UserError(f"vision_backbone: {model}: remove {random[0]}: a step depends on its batch alone")
    try:  # it looks at an image once, on the meta device, which takes neither memory nor time
        with torch.device("meta"):
            vit = make(pretrained=False)
            features, patches = vit(torch.empty(1, 3, image_size, image_size)), vit.patch_embed.num_patches
        plain = patches and features.shape == (1, patches, vit.embed_dim) and vit.num_prefix_tokens >= 0
        batch_norm = any("running_mean" in name for name, _ in vit.named_buffers())
        reason = "" if plain and not batch_norm else "it has batch normalisation or another shape of output"
        patch = vit.patch_embed.patch_size  # what is no whole one on the right and below would not be seen;
        # Prismatic's towers of 384 pixels were trained so, with patches of 14
        if image_size != 384 and any(image_size % side for side in patch):
            reason = f"patches of {patch[0]} do not cover it: take a multiple"
    except Exception as error:  # timm has many kinds for a wrong argument, and each architecture its own
        reason = str(error).partition("\n")[0] or f"{type(error).__name__}: is it a multiple of its patches?"
    if reason:
        raise UserError(f"vision_backbone: timm makes no plain ViT of {model!r} at image_size {image_size}: "
                        f"{reason}")
    vit = make(pretrained)
    stats = timm.data.resolve_model_data_config(vit)
    vit.mean, vit.std = stats["mean"], stats["std"]  # numbers: as buffers they would be cast to bf16
    return vit


def normalize_pixels(pixels: torch.Tensor, tower: nn.Module) -> torch.Tensor:
    """(B, 3, H, W) float32 in [0, 1] -> of the mean and deviation this tower was pretrained on."""
    channels = zip(pixels.unbind(1), tower.mean, tower.std, strict=True)
    return torch.stack([(channel - mean) / std for channel, mean, std in channels], dim=1)
