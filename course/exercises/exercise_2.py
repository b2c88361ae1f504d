"""Exercise 2. Where do the picture's patches go?   练习 2：图像块放在哪里？

Write the body of VLA.embed (`self` is a VLA), then: python course/check.py 2
写出 VLA.embed 的函数体（self 就是一个 VLA），然后运行上面的命令（加 --zh 用中文）。

What you need is there already    可以直接用：
    self.llm.get_input_embeddings()(input_ids)   (B, L) -> (B, L, hidden)
    self.pixel_values(images)                    -> a list of tensors, one for each tower   每个视觉塔一个
    self.patch_features(pixels)                  that list -> (B * N, patches, features)
    self.projector["projector"](features)        features -> hidden
    self.proprio_projector(proprio)              (B, P) -> (B, hidden)
"""

import torch


def embed(self, images, input_ids, proprio=None):
    """images (B, N, H, W, 3) uint8, input_ids (B, L) -> (B, S, hidden): <s>, the projected patches of
    all N pictures (and the state, if there is one), then the other text.

    Hint: unflatten the features' first dimension, B * N, into (B, N); flatten N and patches; then
    one torch.cat of three parts along dimension 1.
    """
    raise NotImplementedError
