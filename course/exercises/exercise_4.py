"""Exercise 4. The loss of a training step.   练习 4：一步训练的损失。

Write the body of VLA.forward (`self` is a VLA), then: python course/check.py 4
写出 VLA.forward 的函数体（self 就是一个 VLA），然后运行上面的命令（加 --zh 用中文）。

What you need is there already    可以直接用：
    self.embed(images, input_ids)                        (B, S, hidden): S = L + patches, put in after <s>
    self.llm.base_model(inputs_embeds=..., use_cache=False).last_hidden_state     (B, S, hidden)
    self.llm.get_output_embeddings()(hidden)             hidden -> logits of the vocabulary   词表的 logits
    self.num_action_tokens                               T; labels hold T ids of actions, and </s>
    IGNORE_INDEX                                         -100, the label of all that is not learned   不学的位置的标签

This exercise leaves out the robot's state and parallel decoding: ignore the last two arguments.
本练习不考虑机器人状态和并行解码：最后两个参数不用管。
"""

import torch
import torch.nn.functional as F

from action_tokenizer import IGNORE_INDEX
from model import at_positions


def forward(self, images, input_ids, labels, proprio=None, prefix_length=0):
    """-> the loss, the predicted ids (B, T), and the true ids (B, T), T = num_action_tokens.

    Hint: position i predicts token i + 1. Find where the labels begin, shift by the patches, and
    take the hidden states one position earlier; at_positions(sequence, positions) picks them. Or
    compute all logits, and leave it to cross_entropy to ignore -100.
    """
    raise NotImplementedError
